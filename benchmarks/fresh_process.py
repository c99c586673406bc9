"""A function called in an interpreter of its own, for what only a first call shows."""

import pathlib
import pickle
import pkgutil
import subprocess
import sys
from typing import Any

__all__ = ["run_fresh"]

_ROOT = pathlib.Path(__file__).parents[1]


def run_fresh(function: str, *args: Any) -> Any:
    """The result of ``function(*args)``, computed in a new interpreter.

    Args:
      function: its name, for example ``"benchmarks.methods:first_call"``.
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
        raise RuntimeError(f"{function} failed:\n{done.stderr.decode()}")
    # The result comes last: a library may have written to stdout before.
    return pickle.loads(bytes.fromhex(done.stdout.decode().splitlines()[-1]))


def main() -> None:
    """Reads a call from stdin, and writes what it returns."""
    function, args = pickle.load(sys.stdin.buffer)
    print(pickle.dumps(pkgutil.resolve_name(function)(*args)).hex())


if __name__ == "__main__":
    main()
