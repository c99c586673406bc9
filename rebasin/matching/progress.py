"""Progress of a matching, for whoever waits for it."""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple, TypeAlias

from rebasin.matching.result import MatchResult

__all__ = ["MatchProgress", "ProgressFn", "Reporter", "report_end"]


class MatchProgress(NamedTuple):
    """How far a matching is.

    Attributes:
      method: name of the method, as in `rebasin.METHODS`.
      stage: what is going on: ``"ascent"``, ``"restart 1"``, ``"depth"`` (groups in order of depth),
        ``"pass"`` (over the data) or ``"step"``; ``"end"`` in the last call.
      iteration: number of iterations of this stage that are finished, at the end of all iterations.
      limit: the most iterations that this stage may take, `None` where that is not known. A stage that has
        converged ends earlier.
      objective: the method's own objective, the best so far, `None` where it is only known at the end.
      done: whether the matching has ended; true in the last call alone.
    """

    method: str
    stage: str
    iteration: int
    limit: int | None
    objective: float | None
    done: bool = False


# Called on the host between iterations, never from compiled code. What it raises ends the matching.
ProgressFn: TypeAlias = Callable[[MatchProgress], object]


@dataclasses.dataclass(frozen=True)
class Reporter:
    """Tells a function, if there is one, how far a method is.

    Attributes:
      method: name of the method.
      progress: the function that is told; with `None`, reporting does nothing.
      scale: what the objectives that are reported have to be multiplied by.
    """

    method: str
    progress: ProgressFn | None = None
    scale: float = 1.0

    def __call__(self, stage: str, iteration: int, limit: int | None, objective: float | None = None) -> None:
        """Report that some iterations of a stage are finished."""
        if self.progress is not None:
            value = None if objective is None else float(objective) * self.scale
            self.progress(MatchProgress(self.method, stage, iteration, limit, value))


def report_end(method: str, progress: ProgressFn | None, match: MatchResult) -> MatchResult:
    """Report that a matching has ended, and return it."""
    if progress is not None:
        made = match.num_iterations
        progress(MatchProgress(method, "end", made, made, float(match.objective[-1]), done=True))
    return match
