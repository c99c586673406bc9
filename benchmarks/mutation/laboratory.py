"""A copy of the checkout in which one file at a time is mutated, and tests are run."""

import os
import pathlib
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from benchmarks.mutation.catalogue import Mutation, mutate
from rebasin.errors import ConfigError

__all__ = ["Laboratory", "Outcome", "read_outcome"]

# What pytest needs of the checkout; documents, results and the rest are not copied.
_COPIED = ("rebasin", "experiments", "benchmarks", "tests", "pyproject.toml", "setup.py")

# A new file needs a time of its own, since Python tells compiled files of one size apart by whole seconds.
_FIRST_TIME = 2_000_000_000


class Outcome(NamedTuple):
    """What came of the tests of one mutation.

    Attributes:
      killed_by: the test that failed first, with its file; ``""`` if all passed.
      seconds: how long the tests ran.
    """

    killed_by: str
    seconds: float


class Laboratory:
    """A copy of a checkout, in which mutations are made and undone.

    Compiled programs of JAX are shared by all runs, so that a run compiles only what its mutation changes.

    Args:
      root: the checkout.
      folder: an empty folder for the copy.
      timeout: seconds after which tests are stopped; a mutation that makes them hang is killed.

    Raises:
      ConfigError: the tests would not import the copy.
    """

    def __init__(self, root: pathlib.Path, folder: pathlib.Path, *, timeout: float) -> None:
        self._tree, self._timeout, self._clock = folder / "tree", timeout, _FIRST_TIME
        self._tree.mkdir()
        for name in _COPIED:
            if (root / name).is_dir():
                shutil.copytree(root / name, self._tree / name, ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy2(root / name, self._tree / name)
        self._environment = {**os.environ, "REBASIN_TESTS_CACHE": str(folder / "cache")}
        found = self._python("-c", "import rebasin; print(rebasin.__file__)").stdout.strip()
        if not pathlib.Path(found or "/").is_relative_to(self._tree.resolve()):
            raise ConfigError(f"the tests would import {found or 'nothing'}, wanted the copy in {self._tree}")

    def run_unmutated(self, tests: Sequence[str]) -> Outcome:
        """Run tests of the code as it is, all that were chosen for any mutation."""
        return self._run_tests(sorted(set(tests)), timeout=None)

    def run_mutated(self, mutation: Mutation) -> Outcome:
        """Make a mutation, run its tests until one fails, and undo the mutation."""
        path = self._tree / mutation.file
        original = path.read_text()
        try:
            self._write(path, mutate(mutation, original))
            return self._run_tests(mutation.tests, timeout=self._timeout)
        finally:
            self._write(path, original)

    def _write(self, path: pathlib.Path, text: str) -> None:
        path.write_text(text)
        self._clock += 2
        os.utime(path, (self._clock, self._clock))

    def _run_tests(self, tests: Sequence[str], *, timeout: float | None) -> Outcome:
        options = ("-x", "-q", "--no-header", "--tb=no", "-rfE", "-p", "no:cacheprovider")
        began = time.perf_counter()
        try:
            done = self._python("-m", "pytest", *options, *tests, timeout=timeout)
        except subprocess.TimeoutExpired:
            return Outcome(f"no end after {timeout:.0f} s", time.perf_counter() - began)
        return Outcome(read_outcome(done.returncode, done.stdout), time.perf_counter() - began)

    def _python(self, *arguments: str, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=self._tree,
            env=self._environment,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )


def read_outcome(status: int, output: str) -> str:
    r"""Return the first test that failed, as pytest tells it; ``""`` if all passed.

    Args:
      status: exit status of pytest.
      output: what it printed.

    Raises:
      ConfigError: pytest ran no test, or could not run.

    Examples:
      >>> read_outcome(1, "F\nFAILED tests/test_axis.py::test_sizes[1] - assert 1 == 2\n1 failed in 0.5s")
      'tests/test_axis.py::test_sizes[1]'
      >>> read_outcome(0, "3 passed in 0.5s")
      ''
    """
    if status == 0:
        return ""
    failed = list(_failures(output))
    if status not in (1, 2) or not failed:
        raise ConfigError(f"pytest ended with status {status}: {output.strip()[-500:]}")
    return failed[0]


def _failures(output: str) -> Iterator[str]:
    for match in re.finditer(r"^(?:FAILED|ERROR) (\S+)", output, re.MULTILINE):
        yield match.group(1)
