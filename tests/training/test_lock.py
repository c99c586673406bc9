"""Folders that one process at a time may write to."""

import fcntl
import os
import re
import signal
import socket
import subprocess
import sys

import pytest

from rebasin.errors import RebasinError
from rebasin.training.data import load_dataset
from rebasin.training.lock import LOCK_FILE, FolderInUseError, locked
from rebasin.training.loop import train
from rebasin.training.trajectory import Trajectory

HOLD = """
import pathlib, sys, time
from rebasin.training.lock import locked
with locked(pathlib.Path(sys.argv[1])):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_a_folder_in_use_is_refused_and_free_again_afterwards(tmp_path):
    with locked(tmp_path):
        with pytest.raises(FolderInUseError) as info, locked(tmp_path):
            pass
        assert isinstance(info.value, RebasinError)
        who = re.escape(f"{tmp_path} is in use by process {os.getpid()} on {socket.gethostname()} (")
        assert re.fullmatch(
            who + r".*, since .*\); wait until that ends, or stop it, or choose another folder",
            str(info.value),
        )
        assert (tmp_path / LOCK_FILE).exists()
    assert not list(tmp_path.iterdir())
    with locked(tmp_path):
        pass


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_killed_process_leaves_no_lock(tmp_path):
    holder = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert holder.stdout.readline() == "locked\n"
    with pytest.raises(FolderInUseError, match=f"process {holder.pid} on "), locked(tmp_path):
        pass
    holder.kill()
    holder.communicate()
    assert (tmp_path / LOCK_FILE).exists()
    with locked(tmp_path):
        assert f"process {os.getpid()} " in (tmp_path / LOCK_FILE).read_text()
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_deleted_before_it_is_locked_does_not_count(tmp_path, monkeypatch):
    """The last holder deletes the file after we opened it, and before we lock it."""
    lock, locks = fcntl.flock, []

    def flock(file, operation):
        if not locks:
            (tmp_path / LOCK_FILE).unlink()
        locks.append(file)
        lock(file, operation)

    monkeypatch.setattr("fcntl.flock", flock)
    with locked(tmp_path):
        assert len(locks) == 2
        with pytest.raises(FolderInUseError), locked(tmp_path):
            pass


def test_a_file_system_without_locks_is_said(tmp_path, monkeypatch):
    def no_locks(*_):
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr("fcntl.flock", no_locks)
    said = f"{tmp_path} is not locked, since its file system has no locks"
    with pytest.warns(UserWarning, match=said), locked(tmp_path):
        pass


def test_a_run_that_another_process_trains_is_refused_and_unchanged(finished, unfinished):
    folder = unfinished(3)
    with locked(folder), pytest.raises(FolderInUseError, match=f"{folder} is in use by process"):
        train(finished.recipe, load_dataset("digits"), seed=0, directory=folder, resume=True)
    assert Trajectory(folder).epochs == (0, 1, 2)
    resumed = train(finished.recipe, load_dataset("digits"), seed=0, directory=folder, resume=True)
    assert resumed.complete
    assert not (folder / LOCK_FILE).exists()


def test_a_finished_run_is_read_while_somebody_holds_its_lock(finished, copied):
    with locked(copied):
        again = train(finished.recipe, load_dataset("digits"), seed=0, directory=copied)
    assert again.epochs == finished.epochs
