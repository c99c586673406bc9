"""The command line: which command was asked for, its flags, and errors as one message."""

import os
import sys
from collections.abc import Sequence

import jax

from rebasin.errors import RebasinError
from rebasin.files import explain

__all__ = ["main", "run"]

_USAGE = """\
rebasin aligns neural networks modulo permutation.

  rebasin align     permute the units of network B so that they match those of A
  rebasin diagnose  say why there is a barrier between A and B, and what to try
  rebasin inspect   print the symmetries of a network, and why the rest stays
  rebasin merge     average networks that are aligned

`rebasin align --help` lists the flags of a command, with an example."""


def main(arguments: Sequence[str]) -> int:
    """Run a command and return the exit status: 0, 1 after an error, 2 where the command line is wrong.

    Args:
      arguments: the command and its flags, without the name of the program.
    """
    try:
        from absl import flags
    except ImportError:
        print("error: the command needs absl-py: pip install 'rebasin-jax[checkpoints]'", file=sys.stderr)
        return 1
    from rebasin.command.align import ALIGN
    from rebasin.command.diagnose import DIAGNOSE
    from rebasin.command.inspect import INSPECT
    from rebasin.command.merge import MERGE

    commands = {command.name: command for command in (ALIGN, DIAGNOSE, INSPECT, MERGE)}
    if not arguments or arguments[0] in ("help", "--help", "-h"):
        print(_USAGE)
        return 0 if arguments else 2
    command = commands.get(arguments[0])
    if command is None:
        print(f"error: there is no command {arguments[0]!r}\n\n{_USAGE}", file=sys.stderr)
        return 2
    try:
        options = command.parse(arguments[1:])
        if options is not None:
            command.run(options)
    except flags.Error as error:
        print(f"error: {error}; see rebasin {command.name} --help", file=sys.stderr)
        return 2
    except RebasinError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        print(f"error: {explain(error)}", file=sys.stderr)
        return 1
    except (MemoryError, jax.errors.JaxRuntimeError) as error:
        if not (isinstance(error, MemoryError) or "RESOURCE_EXHAUSTED" in str(error)):
            raise
        print("error: out of memory; nothing was written", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        return 130
    return 0


def run() -> None:
    """Run the command that the shell gave; the console script ``rebasin``."""
    # JAX looks for accelerators and reports what it does not find.
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    sys.exit(main(sys.argv[1:]))


if __name__ == "__main__":
    run()
