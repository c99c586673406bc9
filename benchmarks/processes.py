"""Python processes of their own, for first calls and for the library of another checkout."""

import os
import pathlib
import pickle
import pkgutil
import subprocess
import sys
import tempfile
import threading
from types import TracebackType
from typing import Any, Self

from rebasin.errors import ConfigError

__all__ = ["Worker", "run_fresh"]

_ROOT = pathlib.Path(__file__).parents[1]


class Worker:
    """A new Python process that calls functions on request, one after the other, until it is closed.

    The functions come from this checkout, whichever library they call. With another checkout, `rebasin` is
    the library of that checkout, and its folder is the current directory. Such functions, and the modules
    that they are in, may only use what both versions of the library have.

    Args:
      checkout: a folder that holds another version of `rebasin`; by default the worker uses this checkout.

    Raises:
      ConfigError: there is no library in that folder.
    """

    def __init__(self, checkout: pathlib.Path | None = None) -> None:
        library = (checkout or _ROOT).resolve() / "rebasin"
        if not (library / "__init__.py").exists():
            raise ConfigError(f"no checkout of this repository, as there is no file {library}/__init__.py")
        self._files = tempfile.TemporaryDirectory()
        folder = pathlib.Path(self._files.name)
        # A folder with nothing but the library, ahead of this checkout.
        (folder / "search").mkdir()
        (folder / "search/rebasin").symlink_to(library)
        search = [str(folder / "search"), str(_ROOT)]
        self._errors = (folder / "stderr").open("w+b")
        self._process = subprocess.Popen(
            # Without -P Python would find the benchmarks of the other checkout in its current directory.
            [sys.executable, "-P", "-m", "benchmarks.processes"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            cwd=checkout or _ROOT,
            env={**os.environ, "PYTHONPATH": os.pathsep.join(search)},
        )

    def call(self, function: str, *args: Any) -> Any:
        """Return the result of ``function(*args)``, computed by the worker.

        Args:
          function: module and name, for example ``"benchmarks.methods:first_call"``.
          *args: anything that can be pickled.

        Raises:
          RuntimeError: the call failed, with what the worker wrote to stderr.
        """
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        try:
            pickle.dump((function, args), self._process.stdin)
            self._process.stdin.flush()
            return pickle.load(self._process.stdout)
        except (EOFError, BrokenPipeError):
            self._process.wait()
            self._errors.seek(0)
            raise RuntimeError(f"{function} failed:\n{self._errors.read().decode()}") from None

    def kill(self) -> None:
        """Kill the process, so that a call in progress fails."""
        self._process.kill()

    def close(self) -> None:
        """End the process."""
        self._process.communicate()
        self._errors.close()
        self._files.cleanup()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def run_fresh(
    function: str, *args: Any, checkout: pathlib.Path | None = None, limit: float | None = None
) -> Any:
    """Return the result of ``function(*args)``, computed in a new process.

    Args:
      function: module and name, for example ``"benchmarks.methods:first_call"``.
      *args: anything that can be pickled.
      checkout: a folder that holds another version of `rebasin`; see `Worker`.
      limit: seconds after which the process is killed; by default it may take as long as it likes.

    Raises:
      ConfigError: there is no library in that folder.
      RuntimeError: the process failed, with what it wrote to stderr.
      TimeoutError: the process did not end within the limit.
    """
    with Worker(checkout) as worker:
        has_expired = threading.Event()

        def expire() -> None:
            has_expired.set()
            worker.kill()

        timer = threading.Timer(limit, expire) if limit is not None else None
        if timer is not None:
            timer.start()
        try:
            return worker.call(function, *args)
        except RuntimeError:
            if has_expired.is_set():
                raise TimeoutError(f"{function} took longer than {limit:g} s") from None
            raise
        finally:
            if timer is not None:
                timer.cancel()


def main() -> None:
    """Read calls from stdin until it ends, and write what they return to stdout."""
    # A library may print to stdout as well. From here on that goes to stderr, and results have stdout alone.
    results = os.fdopen(os.dup(sys.stdout.fileno()), "wb")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    while True:
        try:
            function, args = pickle.load(sys.stdin.buffer)
        except EOFError:
            return
        pickle.dump(pkgutil.resolve_name(function)(*args), results)
        results.flush()


if __name__ == "__main__":
    main()
