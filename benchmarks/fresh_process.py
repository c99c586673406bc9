"""A function called in an interpreter of its own, for what only a first call shows."""

import pathlib
import pickle
import subprocess
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["run_fresh"]

_ROOT = pathlib.Path(__file__).parents[1]


def run_fresh(function: Callable[..., Any], *args: Any) -> Any:
    """The result of ``function(*args)``, computed in a new interpreter.

    Args:
      function: a public function of a module, so that it can be named.
      *args: anything that can be pickled.

    Raises:
      RuntimeError: the process failed; with what it wrote.
    """
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.fresh_process"],
        input=pickle.dumps((function, args)),
        capture_output=True,
        cwd=_ROOT,
    )
    if done.returncode:
        raise RuntimeError(f"{function.__module__}.{function.__name__} failed:\n{done.stderr.decode()}")
    # The result comes last: a library may have written to stdout before.
    return pickle.loads(bytes.fromhex(done.stdout.decode().splitlines()[-1]))


def main() -> None:
    """Reads a call from stdin, and writes what it returns."""
    function, args = pickle.load(sys.stdin.buffer)
    print(pickle.dumps(function(*args)).hex())


if __name__ == "__main__":
    main()
