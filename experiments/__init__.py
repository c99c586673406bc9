"""One absl binary for each section of the paper, over typed functions that read no flags."""

import sys
from types import TracebackType


def _show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Print one line for Ctrl-C while a binary is still being imported, and a traceback for all else."""
    if issubclass(kind, KeyboardInterrupt):
        print("interrupted", file=sys.stderr)
    else:
        sys.__excepthook__(kind, error, trace)


# Importing JAX and Flax takes seconds, and begins before a binary can handle anything. While Python looks for
# the module of ``python -m experiments.…``, the name of the program is still the flag.
if sys.argv and sys.argv[0] == "-m":
    sys.excepthook = _show
