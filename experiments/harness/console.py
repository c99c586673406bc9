"""What a person sees while an experiment runs: bars on a terminal, plain lines in a log."""

import contextlib
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

from experiments.harness.results import Results

__all__ = ["Reporter", "cell"]


class Reporter:
    """Prints to one console; a test passes its own."""

    def __init__(self, console: Console | None = None) -> None:
        # Logs have no width of their own.
        self.console = console or Console(width=None if sys.stdout.isatty() else 80, highlight=False)

    def say(self, text: str) -> None:
        """Prints a line as it is: a long path that is broken cannot be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Shows the progress of `total` steps; yields the function to call after each.

        On a terminal a bar with the time left; elsewhere a line at the end, and one a minute until then.
        Nothing where nothing is to be done.
        """
        if total == 0:
            yield lambda: None
            return
        if self.console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(bar_width=20),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TextColumn("left"),
                TimeRemainingColumn(),
            )
            with Progress(*columns, console=self.console) as progress:
                task = progress.add_task(description, total=total)
                yield lambda: progress.advance(task)
            return
        began = last = time.perf_counter()
        done = 0

        def advance() -> None:
            nonlocal done, last
            done += 1
            now = time.perf_counter()
            if now - last > 60 and done < total:
                last = now
                left = (now - began) / done * (total - done)
                self.say(f"{description}: {done}/{total} after {now - began:.0f} s, about {left:.0f} s left")

        yield advance
        self.say(f"{description}: {done}/{total} in {time.perf_counter() - began:.1f} s")

    def table(self, header: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
        """Prints a table of text, numbers to the right."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for name in header:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def conclude(self, results: Results, paths: Iterable[pathlib.Path]) -> None:
        """Prints the claims, the computing time and the files of a finished run."""
        if results.claims:
            alone = " (one pair has no 95 % interval: its value decides)"
            self.say("\nclaims of the paper" + alone * (results.config["replicates"] == 1))
        for claim in results.claims:
            low, high = _number(claim.low), _number(claim.high)
            spread = f" [{low}, {high}]" if (low, high) != ("none", "none") else ""
            verdict = "holds" if claim.holds else "does not hold"
            self.wrap(claim.statement, head=f"{verdict:>13}  ")
            measured = f"measured {_number(claim.measured)}{spread}; paper: {claim.paper}"
            self.wrap(measured, head=" " * 15)
        spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in results.seconds.items())
        self.say(f"\ncomputing time: {spent}")
        for path in paths:
            self.say(str(path))

    def wrap(self, text: str, *, head: str = "") -> None:
        """Prints text behind a head, its later lines below its first."""
        width = min(self.console.width, 100)
        self.say(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)))


def cell(interval: Mapping[str, float | None], *, percent: bool) -> str:
    """Mean and standard deviation, in at most eight characters so that a table fits 80 columns.

    Args:
      interval: with the fields ``mean`` and ``deviation`` of `experiments.harness.statistics.Interval`.
      percent: a fraction, told in % with one digit; else two digits.

    Examples:
      >>> cell({"mean": 0.7379, "deviation": 0.0921}, percent=True)
      '73.8±9.2'
      >>> cell({"mean": 0.7379, "deviation": None}, percent=False)
      '0.74'
    """
    scale, digits = (100, 1) if percent else (1, 2)
    mean, spread = interval["mean"], interval["deviation"]
    text = "none" if mean is None else f"{scale * mean:.{digits}f}"
    # JSON has no NaN: a single replicate's spread is None when it was read back.
    if spread is None or spread != spread:
        return text
    spread *= scale
    text += f"±{spread:.{digits if spread < 9.95 else 0}f}"
    return text if percent else text.replace("±0.", "±.")


def _number(value: float | None) -> str:
    """Three digits; what is not known is NaN, or None when it was read back, as JSON has no NaN."""
    return "none" if value is None or value != value else f"{value:.3f}"
