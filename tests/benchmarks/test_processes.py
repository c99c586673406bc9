"""Processes of their own: what they return, how they fail, and whose library they use."""

import functools
import pathlib

import numpy as np
import pytest

from benchmarks.processes import Worker, run_fresh
from rebasin.errors import ConfigError


def test_a_failure_in_a_fresh_process_is_told():
    with pytest.raises(RuntimeError, match=r"(?s)math:sqrt failed:.*ValueError"):
        run_fresh("math:sqrt", -1.0)


@pytest.mark.skipif(
    not pathlib.Path("/proc/self/clear_refs").exists(), reason="peaks come from Linux's /proc"
)
def test_memory_that_is_taken_and_freed_is_seen():
    growth = run_fresh("benchmarks.memory:resident_growth", functools.partial(np.ones, 8 * 2**20))
    assert 64 * 2**20 <= growth < 66 * 2**20


def test_a_worker_keeps_its_state_and_what_is_printed_does_not_disturb():
    with Worker() as worker:
        assert worker.call("builtins:print", "noise") is None
        assert worker.call("os:getpid") == worker.call("os:getpid")


@pytest.fixture
def checkout(tmp_path):
    """Another library, and other benchmarks, which must not be taken."""
    (tmp_path / "rebasin").mkdir()
    (tmp_path / "rebasin/__init__.py").touch()
    (tmp_path / "rebasin/errors.py").write_text("class ConfigError(Exception):\n    pass\n")
    (tmp_path / "rebasin/version.py").write_text("def describe():\n    return 'another'\n")
    (tmp_path / "benchmarks").mkdir()
    (tmp_path / "benchmarks/__init__.py").write_text("1 / 0")
    return tmp_path


def test_another_checkout_gives_the_library_and_the_current_directory(checkout):
    with Worker(checkout) as worker:
        assert worker.call("rebasin.version:describe") == "another"
        assert worker.call("os:getcwd") == str(checkout)
        assert worker.call("benchmarks.timing:median_ratio", [2.0], [1.0]) == 2.0


def test_a_folder_without_a_library_is_refused(tmp_path):
    with pytest.raises(
        ConfigError, match=r"no checkout of this repository, as there is no file .*__init__.py"
    ):
        Worker(tmp_path)


def test_a_process_that_takes_too_long_is_killed():
    with pytest.raises(TimeoutError, match=r"time:sleep took longer than 1 s"):
        run_fresh("time:sleep", 60, limit=1.0)
    assert run_fresh("math:sqrt", 4.0, limit=60.0) == 2.0
