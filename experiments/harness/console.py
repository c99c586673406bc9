"""What a person sees while an experiment runs: bars on a terminal, plain lines in a log."""

import contextlib
import math
import pathlib
import sys
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

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

from experiments.harness.results import PartialResults, Results
from experiments.harness.statistics import Interval

__all__ = ["Reporter", "cell"]


class Reporter:
    """Prints to one console.

    Args:
      console: where to print; by default the terminal.
    """

    def __init__(self, console: Console | None = None) -> None:
        # Logs have no width of their own.
        self.console = console or Console(width=None if sys.stdout.isatty() else 80, highlight=False)

    def say(self, text: str) -> None:
        """Print a line without breaking it, since a long path that is broken cannot be copied."""
        self.console.print(text, markup=False, soft_wrap=True)

    @contextlib.contextmanager
    def stage(self, description: str, total: int) -> Iterator[Callable[[], None]]:
        """Show the progress of `total` steps, and yield the function to call after each step.

        A terminal shows a bar with the time left; elsewhere a line is printed each minute and at the end.
        Nothing is shown where `total` is 0.
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
        """Print a table of text, with all columns aligned to the right."""
        table = Table(box=None, padding=(0, 1, 0, 0), pad_edge=False)
        for name in header:
            table.add_column(name, justify="right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        self.console.print(table)

    def conclude(self, results: Results[Any, Any, Any], paths: Iterable[pathlib.Path]) -> None:
        """Print the claims, what is missing, the computing time and the files of a run."""
        if results.claims:
            alone = f" (one {results.config.unit} has no 95 % interval: its value decides)"
            self.say("\nclaims of the paper" + alone * (results.config.replicates == 1))
        for claim in results.claims:
            low, high = _number(claim.low), _number(claim.high)
            spread = f" [{low}, {high}]" if (low, high) != ("none", "none") else ""
            verdict = "holds" if claim.holds else "does not hold"
            self.wrap(claim.statement, head=f"{verdict:>13}  ")
            measured = f"measured {_number(claim.measured)}{spread}; paper: {claim.paper}"
            self.wrap(measured, head=" " * 15)
        if isinstance(results, PartialResults):
            self.say("\nmissing, as the run is unfinished (go on with --resume)")
            for line in results.missing:
                self.wrap(line, head="  ")
        spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in results.seconds.items())
        self.say(f"\ncomputing time: {spent}")
        for path in paths:
            self.say(str(path))

    def wrap(self, text: str, *, head: str = "") -> None:
        """Print text behind a head, with later lines indented as far as the first."""
        width = min(self.console.width, 100)
        self.say(textwrap.fill(text, width, initial_indent=head, subsequent_indent=" " * len(head)))


def cell(interval: Interval, *, percent: bool) -> str:
    """Write mean and standard deviation in at most eight characters, so that a table fits 80 columns.

    Args:
      interval: what to write; the deviation is left out where it is NaN.
      percent: whether to write a fraction in %, with one digit, rather than a number with two digits.

    Examples:
      >>> cell(Interval(0.7379, 0.6, 0.9, 0.0921), percent=True)
      '73.8±9.2'
      >>> cell(Interval(0.7379, math.nan, math.nan, math.nan), percent=False)
      '0.74'
    """
    scale, digits = (100, 1) if percent else (1, 2)
    text = "none" if math.isnan(interval.mean) else f"{scale * interval.mean:.{digits}f}"
    if math.isnan(interval.deviation):
        return text
    spread = scale * interval.deviation
    text += f"±{spread:.{digits if spread < 9.95 else 0}f}"
    return text if percent else text.replace("±0.", "±.")


def _number(value: float) -> str:
    """Write a number with three digits; NaN stands for what is not known."""
    return "none" if math.isnan(value) else f"{value:.3f}"
