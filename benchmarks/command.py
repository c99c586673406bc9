"""What all benchmarks share as commands: flags that several of them have, and errors in one line.

A benchmark defines its flags in a function that it calls when it is run as a command, not when it is
imported: absl allows each flag name once in a process, and tests import several benchmarks.
"""

import sys
from collections.abc import Callable, Collection
from typing import Any

from absl import app, flags, logging

from rebasin.errors import RebasinError

__all__ = ["define_data_flags", "flag_values", "run"]

flags.disclaim_key_flags()  # --help lists what is defined here among the flags of the benchmark


def define_data_flags() -> None:
    """Define the flags that say where trained networks and prepared datasets are."""
    flags.DEFINE_string(
        "runs_dir", None, "Folder of trained networks; by default $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs."
    )
    flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")


def flag_values(*, without: Collection[str]) -> dict[str, Any]:
    """Return the values of all flags of the benchmark that runs.

    Args:
      without: flags to leave out, such as those that do not influence what is measured.
    """
    given = flags.FLAGS.get_key_flags_for_module(sys.argv[0])
    return {flag.name: flag.value for flag in given if flag.name not in without}


def run(main: Callable[[], None]) -> None:
    """Parse the command line and run a benchmark; a mistake of the user becomes one line on stderr."""

    def checked(arguments: list[str]) -> None:
        if len(arguments) > 1:
            raise app.UsageError(f"unknown arguments {arguments[1:]}")
        logging.set_verbosity(logging.WARNING)  # JAX reports the backends that it looks for
        try:
            main()
        except RebasinError as error:
            sys.exit(f"error: {error}")

    app.run(checked)
