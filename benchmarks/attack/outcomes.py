"""What can come of a trial, and how it is counted."""

import contextlib
import enum
import io
from collections.abc import Callable
from typing import Any, NamedTuple

from rebasin.errors import RebasinError

__all__ = ["BAD", "Outcome", "Trial", "attempt"]


class Outcome(enum.Enum):
    """What came of a trial."""

    REFUSED = "refused in a sentence"
    RIGHT = "right result"
    TRACEBACK = "TRACEBACK"
    SILENT = "SILENT"
    LOST = "LOST"


# What must not happen: an error without a sentence, a wrong result without a word, work that is gone.
BAD = (Outcome.TRACEBACK, Outcome.SILENT, Outcome.LOST)


class Trial(NamedTuple):
    """One trial and what came of it.

    Attributes:
      name: what was done, enough to do it again.
      outcome: what came of it.
      detail: the error or the difference, in one line.
    """

    name: str
    outcome: Outcome
    detail: str = ""


def attempt(name: str, run: Callable[[], Any], right: Callable[[Any], bool]) -> Trial:
    """Call a function in this process and judge what comes of it.

    Args:
      name: what the trial is called.
      run: the function.
      right: says whether what it returns is right.
    """
    printed = io.StringIO()
    try:
        with contextlib.redirect_stderr(printed):
            value = run()
            outcome, detail = (Outcome.RIGHT, "") if right(value) else (Outcome.SILENT, repr(value))
    except RebasinError as error:
        outcome, detail = Outcome.REFUSED, f"{type(error).__name__}: {error}"
    except OSError as error:
        # The system's own errors name the file; experiments make sentences of them.
        outcome = Outcome.REFUSED if error.filename is not None else Outcome.TRACEBACK
        detail = f"{type(error).__name__}: {error}"
    except Exception as error:
        outcome, detail = Outcome.TRACEBACK, f"{type(error).__name__}: {error}"
    if "Traceback" in printed.getvalue():
        outcome, detail = Outcome.TRACEBACK, "printed by a thread: " + printed.getvalue()
    return Trial(name, outcome, " ".join(detail.split())[:200])
