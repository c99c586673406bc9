import dataclasses
import json
import logging
import pathlib
import shutil
import signal
import subprocess
import sys
import time

import chex
import jax
import numpy as np
import pytest

from rebasin.errors import ConfigError, TrajectoryError
from rebasin.training.data import load_dataset
from rebasin.training.lock import LOCK_FILE
from rebasin.training.loop import InitialState, train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory, open_run

DIGITS = load_dataset("digits")
RECIPE = Recipe("digits", "mlp", width=8, epochs=6, num_train=200, batch_size=64, warmup_epochs=1)

# A process that trains RECIPE and kills itself before the N-th change to its run folder. A save by Orbax
# consists of new folders and renames, and Python raises an audit event before each of them.
KILLED_RUN = """
import itertools, os, signal, sys
from rebasin.training.data import load_dataset
from rebasin.training.recipes import Recipe
from rebasin.training.lock import LOCK_FILE
from rebasin.training.loop import train

directory, last = sys.argv[1], int(sys.argv[2])
counter = itertools.count(1)

def kill_at_last(event, arguments):
    if event in ("os.mkdir", "os.rename") and str(arguments[0]).startswith(directory):
        if next(counter) == last:
            os.kill(os.getpid(), signal.SIGKILL)

sys.addaudithook(kill_at_last)
recipe = Recipe("digits", "mlp", width=8, epochs=6, num_train=200, batch_size=64, warmup_epochs=1)
train(recipe, load_dataset("digits"), seed=0, directory=directory, resume=True)
"""


def contents(directory):
    return {path: path.read_bytes() for path in sorted(directory.rglob("*")) if path.is_file()}


def test_a_trajectory_maps_epochs_to_trees(finished):
    trajectory = Trajectory(finished.directory)
    assert trajectory.epochs == tuple(trajectory) == (0, 1, 2, 3, 4, 5, 6)
    assert len(trajectory) == 7
    assert 6 in trajectory
    assert 7 not in trajectory
    assert trajectory.complete
    assert (trajectory.recipe, trajectory.seed) == (RECIPE, 0)
    chex.assert_trees_all_equal(trajectory.last, trajectory[6])
    assert trajectory.metrics(6) == finished.metrics(6)
    assert repr(trajectory) == f"Trajectory({str(finished.directory)!r}, epochs='0-6', complete=True)"


def test_trees_are_plain_dicts_of_numpy_arrays(finished):
    tree = finished[0]
    assert type(tree) is dict
    assert type(tree["params"]["Dense_0"]) is dict
    assert all(type(leaf) is np.ndarray for leaf in jax.tree.leaves(tree))
    assert tree["params"]["Dense_0"]["kernel"].shape == (64, 8)
    assert not tree["params"]["Dense_0"]["bias"].any()
    assert finished[1]["params"]["Dense_0"]["bias"].any()


def test_epochs_may_be_sparse(copied):
    for epoch in (1, 3, 4):
        shutil.rmtree(copied / str(epoch))
    trajectory = Trajectory(copied)
    assert trajectory.epochs == (0, 2, 5, 6)
    assert "epochs='0, 2, 5-6'" in repr(trajectory)
    assert trajectory.complete


def test_run_json_says_all_that_fixes_the_run(finished):
    content = json.loads((finished.directory / "run.json").read_text())
    # Fields that were added after the first runs are left out at their defaults, so that those are found.
    recipe = dataclasses.asdict(RECIPE)
    assert (recipe.pop("optimizer"), recipe.pop("warmup_steps")) == ("sgd", 0)
    assert set(content.pop("versions")) == {"jax", "flax", "optax", "orbax-checkpoint"}
    assert content == {
        "schema_version": 1,
        "recipe": recipe,
        "seed": 0,
        "num_examples": 200,
        "leaves": {
            "params/Dense_0/bias": "float32[8]",
            "params/Dense_0/kernel": "float32[64, 8]",
            "params/Dense_1/bias": "float32[8]",
            "params/Dense_1/kernel": "float32[8, 8]",
            "params/Dense_2/bias": "float32[8]",
            "params/Dense_2/kernel": "float32[8, 8]",
            "params/Dense_3/bias": "float32[10]",
            "params/Dense_3/kernel": "float32[8, 10]",
        },
        "start": None,
    }


def test_a_finished_run_is_returned_as_it_is(finished):
    before = contents(finished.directory)
    for resume in (False, True):
        calls = []
        again = train(
            RECIPE,
            DIGITS,
            seed=0,
            directory=finished.directory,
            resume=resume,
            progress=lambda *call, calls=calls: calls.append(call),
        )
        assert again.complete
        assert not calls
    assert contents(finished.directory) == before


def test_saving_and_reading_say_nothing_and_leave_logging_alone(tmp_path, capfd):
    logger = logging.getLogger("absl")
    level = logger.level
    trajectory = train(dataclasses.replace(RECIPE, epochs=1), DIGITS, seed=0, directory=tmp_path, resume=True)
    assert trajectory[1]
    assert capfd.readouterr() == ("", "")
    assert logger.level == level


@pytest.mark.parametrize("stored", [1, 4])
def test_resume_ends_at_the_same_bits(finished, unfinished, stored):
    trajectory = train(RECIPE, DIGITS, seed=0, directory=unfinished(stored), resume=True)
    assert trajectory.epochs == finished.epochs
    for epoch in finished:
        chex.assert_trees_all_equal(trajectory[epoch], finished[epoch])


def test_chosen_epochs_are_kept_and_are_those_of_a_whole_run(finished, tmp_path, monkeypatch):
    sparse = train(RECIPE, DIGITS, seed=0, directory=tmp_path / "sparse", keep=(1, 3))
    assert sparse.epochs == (1, 3, 6)
    assert sparse.complete
    for epoch in sparse:
        chex.assert_trees_all_equal(sparse[epoch], finished[epoch])
    # With a save after every epoch, there is always one epoch besides the kept ones, and none at the end.
    monkeypatch.setattr("rebasin.training.loop.RESUME_SECONDS", 0.0)
    seen = []
    folder = tmp_path / "watched"

    def watch(*_):
        seen.append(Trajectory(folder).epochs)

    train(RECIPE, DIGITS, seed=0, directory=folder, keep=(0, 3), progress=watch)
    assert seen == [(0, 1), (0, 2), (0, 3), (0, 3, 4), (0, 3, 5), (0, 3, 6)]


def test_a_sparse_run_that_progress_stops_loses_no_epoch_and_resumes_at_the_same_bits(finished, tmp_path):
    class Killed(Exception):
        pass

    def kill(epoch, *_):
        if epoch == 5:
            raise Killed

    arguments = {"seed": 0, "directory": tmp_path / "run", "keep": ()}
    with pytest.raises(Killed):
        train(RECIPE, DIGITS, progress=kill, **arguments)
    assert Trajectory(tmp_path / "run").epochs == (5,)
    resumed = train(RECIPE, DIGITS, resume=True, **arguments)
    assert resumed.epochs == (6,)
    chex.assert_trees_all_equal(resumed.last, finished.last)


def test_dropped_epochs_are_gone_and_the_last_stays(copied):
    trajectory = Trajectory(copied)
    trajectory.drop((1, 2, 4, 99))
    assert trajectory.epochs == Trajectory(copied).epochs == (0, 3, 5, 6)
    assert not (copied / "2").exists()
    with pytest.raises(TrajectoryError, match=rf"epoch 6 is the last stored of {copied}: without it the run"):
        trajectory.drop((0, 6))
    assert trajectory.epochs == (0, 3, 5, 6)


def test_a_run_killed_while_run_json_is_written_begins_anew(finished, tmp_path, monkeypatch):
    (tmp_path / "run").mkdir()  # whoever trains has made and locked it
    write_text = pathlib.Path.write_text

    def half(path, text):
        write_text(path, text[: len(text) // 2])
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pathlib.Path, "write_text", half)
        with pytest.raises(KeyboardInterrupt):
            open_run(tmp_path / "run", finished.record, resume=False)
    assert open_run(tmp_path / "run", finished.record, resume=False).record == finished.record


@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
def test_a_run_killed_again_and_again_ends_at_the_same_bits(finished, tmp_path):
    directory = tmp_path / "run"
    # A run begins with two changes: its folder, and the rename to run.json. A save makes four: a folder for
    # the epoch, one inside it, and two renames, of which the second commits. These processes therefore die
    # before run.json is there, before the first save, before epoch 1 is committed, and, after resuming,
    # before the inner rename of epoch 2.
    for change in (2, 2, 8, 7):
        command = [sys.executable, "-c", KILLED_RUN, str(directory), str(change)]
        killed = subprocess.run(command, capture_output=True, text=True, timeout=120)
        assert killed.returncode == -signal.SIGKILL, killed.stderr
    # The lock's file stays behind, but nobody holds it.
    left = {"run.json", "0", "1", "2.orbax-checkpoint-tmp", LOCK_FILE}
    assert {path.name for path in directory.iterdir()} == left
    assert Trajectory(directory).epochs == (0, 1)

    trajectory = train(RECIPE, DIGITS, seed=0, directory=directory, resume=True)
    assert trajectory.epochs == finished.epochs
    for epoch in finished:
        chex.assert_trees_all_equal(trajectory[epoch], finished[epoch])
        assert trajectory.metrics(epoch) == finished.metrics(epoch)


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="no SIGKILL on this platform")
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_at_random_moments_ends_at_the_same_bits(finished, tmp_path, seed):
    """Kill the process three times, each time up to two seconds after the run folder has appeared."""
    directory, rng = tmp_path / "run", np.random.default_rng(seed)
    command = [sys.executable, "-c", KILLED_RUN, str(directory), "-1"]
    for _ in range(3):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        while process.poll() is None and not directory.exists():
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 2))
        process.kill()
        process.wait()
    trajectory = train(RECIPE, DIGITS, seed=0, directory=directory, resume=True)
    assert trajectory.epochs == finished.epochs
    for epoch in finished:
        chex.assert_trees_all_equal(trajectory[epoch], finished[epoch])
        assert trajectory.metrics(epoch) == finished.metrics(epoch)


def test_not_a_trajectory(tmp_path):
    with pytest.raises(TrajectoryError) as info:
        Trajectory(tmp_path)
    assert str(info.value) == f"{tmp_path} is not a trajectory: it has no run.json"

    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(TrajectoryError, match="is not a trajectory: it has no run.json"):
        train(RECIPE, DIGITS, seed=0, directory=tmp_path, resume=True)
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


@pytest.mark.parametrize("resume", [False, True])
def test_another_run_in_the_folder(finished, resume):
    before = contents(finished.directory)
    recipe = dataclasses.replace(RECIPE, width=4, num_train=None)
    with pytest.raises(TrajectoryError) as info:
        train(recipe, DIGITS, seed=3, directory=finished.directory, resume=resume)
    assert str(info.value).splitlines() == [
        f"{finished.directory} holds another run:",
        "  recipe.width: stored 8, wanted 4",
        "  recipe.num_train: stored 200, wanted None",
        "  seed: stored 0, wanted 3",
        "  num_examples: stored 200, wanted 1437",
        "  leaves.params/Dense_0/bias: stored 'float32[8]', wanted 'float32[4]'",
        "  leaves.params/Dense_0/kernel: stored 'float32[64, 8]', wanted 'float32[64, 4]'",
        "  leaves.params/Dense_1/bias: stored 'float32[8]', wanted 'float32[4]'",
        "  leaves.params/Dense_1/kernel: stored 'float32[8, 8]', wanted 'float32[4, 4]'",
        "  leaves.params/Dense_2/bias: stored 'float32[8]', wanted 'float32[4]'",
        "  leaves.params/Dense_2/kernel: stored 'float32[8, 8]', wanted 'float32[4, 4]'",
        "  leaves.params/Dense_3/kernel: stored 'float32[8, 10]', wanted 'float32[4, 10]'",
    ]
    assert contents(finished.directory) == before


def test_a_child_of_another_start(finished, tmp_path):
    train(RECIPE, DIGITS, seed=1, directory=tmp_path, start=InitialState(finished[5], 5))
    with pytest.raises(TrajectoryError) as info:
        train(RECIPE, DIGITS, seed=1, directory=tmp_path, start=InitialState(finished[4], 5))
    headline, difference = str(info.value).splitlines()
    assert headline == f"{tmp_path} holds another run:"
    assert difference.startswith("  start.sha256: stored '")


def test_an_unfinished_run_needs_resume(copied, unfinished):
    before = contents(unfinished(3))
    with pytest.raises(TrajectoryError) as info:
        train(RECIPE, DIGITS, seed=0, directory=copied)
    assert str(info.value) == (
        f"{copied} holds an unfinished run (stored epochs: 0-2; wanted up to 6); pass resume=True to go on "
        "with it, or choose another folder"
    )
    assert contents(copied) == before


@pytest.mark.parametrize("name", ["../up", "a/../b", "x*y", "a#b c", "ünï 文件", "a{b}c", "$HOME"])
def test_networks_in_folders_with_odd_names_are_read_again(name, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    trajectory = train(RECIPE, DIGITS, seed=0, directory=name)
    assert trajectory.directory == (tmp_path / "here" / name).resolve()
    for epoch in trajectory.epochs:
        chex.assert_trees_all_equal(Trajectory(name)[epoch], trajectory[epoch])


@pytest.mark.parametrize(
    ("name", "found"),
    [("[red]x", "'[' and ']'"), ("a**b", "'**'"), ("gs:/x", "'gs:'"), ("a\\b", r"'\\'")],
)
def test_folders_whose_networks_could_not_be_read_again_are_refused(name, found, tmp_path):
    with pytest.raises(TrajectoryError) as info:
        train(RECIPE, DIGITS, seed=0, directory=tmp_path / name)
    assert str(info.value) == (
        f"{tmp_path / name}: checkpoints below a folder with {found} in its path cannot be read again; "
        "choose another folder"
    )
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(TrajectoryError, match="the folder of a run has an empty name"):
        train(RECIPE, DIGITS, seed=0, directory="")


def test_a_tilde_is_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    train(RECIPE, DIGITS, seed=0, directory="~/run")
    assert Trajectory(tmp_path / "run").complete
    with pytest.raises(ConfigError, match=r"'~nobody_of_this_name/x': no such home folder is known"):
        Trajectory("~nobody_of_this_name/x")
