"""A limit on the time of a run: whether another step fits, by how long steps of its kind have taken."""

import contextlib
import time
from collections.abc import Callable, Iterator

__all__ = ["Deadline", "OutOfTime"]

# Left at the end for figures, tables and the end of the process, as a fraction of the limit.
_RESERVE = 0.05

# A kind of step that was not seen yet compiles its programs, and may take this multiple of the longest step
# of any other kind, and at least this fraction of the limit.
_UNKNOWN, _UNKNOWN_AT_LEAST = 3.0, 0.1

# A step may take longer than the longest of the last few of its kind by this factor. The first one of a kind
# compiles and counts only as long as it is the only one.
_SLACK, _REMEMBERED = 1.2, 5


class OutOfTime(Exception):
    """The next step might not end before the limit."""


class Deadline:
    """Says whether there is time for another step.

    Args:
      limit: seconds from now on; `None` for no limit.
      clock: returns the time in seconds.
    """

    def __init__(self, limit: float | None = None, *, clock: Callable[[], float] = time.monotonic) -> None:
        self.limit, self.clock = limit, clock
        self._began = clock()
        self._steps: dict[str, list[float]] = {}

    @property
    def elapsed(self) -> float:
        """Seconds since this deadline was made."""
        return self.clock() - self._began

    def estimate(self, kind: str) -> float:
        """Return the seconds that the next step of a kind may take."""
        own = self._steps.get(kind, [])
        if own:
            return _SLACK * max(own[1:][-_REMEMBERED:] or own)
        longest = max((max(steps) for steps in self._steps.values()), default=0.0)
        return max(_UNKNOWN * longest, _UNKNOWN_AT_LEAST * (self.limit or 0.0))

    def require(self, kind: str) -> None:
        """Raise `OutOfTime` unless there is time for another step of a kind."""
        if self.limit is None:
            return
        if self.elapsed + self.estimate(kind) > (1 - _RESERVE) * self.limit:
            raise OutOfTime(f"after {self.elapsed:.0f} of {self.limit:g} s there is no time for {kind}")

    def add(self, kind: str, seconds: float) -> None:
        """Remember how long a step has taken."""
        self._steps.setdefault(kind, []).append(seconds)

    @contextlib.contextmanager
    def step(self, kind: str) -> Iterator[None]:
        """Require the time for a step, and remember how long the body of the ``with`` statement takes."""
        self.require(kind)
        began = self.clock()
        yield
        self.add(kind, self.clock() - began)
