"""Runs the sections of a reproduction one after the other, each in a process of its own.

A process for each section costs it the seconds of importing JAX, and programs are compiled again that another
section has compiled. In return a section that runs out of memory or crashes takes nothing with it, memory is
given back, and what runs is exactly the command that the report prints and that anyone can run alone. Nothing
is kept in memory between sections: they share what is on disk. So a reproduction may be killed at any point.
"""

import collections
import contextlib
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from rich.progress import BarColumn, Progress, TextColumn

from experiments.harness.console import Reporter
from experiments.harness.results import open_results
from experiments.report.plans import Section
from experiments.report.settings import config_of, experiment_of
from experiments.report.text import minutes
from rebasin.errors import ConfigError, problem_list
from rebasin.training.lock import FolderInUseError, locked

__all__ = ["Task", "is_done", "prepare", "run_tasks"]

# How often a process, or a folder that another one uses, is looked at again.
_POLL_SECONDS = 0.2

# How long a section has after Ctrl-C to store what it has.
_GRACE_SECONDS = 60.0

# How many lines of a section that failed are shown.
_LAST_LINES = 12

# Sections whose time is not known count as this long beside each other.
_UNKNOWN_SECONDS = 60.0


class Task(NamedTuple):
    """A section with everything that its command needs.

    Attributes:
      section: the section.
      folder: its folder of results.
      arguments: all of its flags but ``--resume``.
      seconds: how long it is expected to take, relative to the others.
      command: what runs it.
    """

    section: Section
    folder: pathlib.Path
    arguments: tuple[str, ...]
    seconds: float
    command: tuple[str, ...]


def prepare(sections: Sequence[Section], arguments: Callable[[Section], Sequence[str]]) -> list[Task]:
    """Return the tasks of a plan, after everything that can be wrong with them was checked.

    Args:
      sections: the plan.
      arguments: makes the flags of a section, with ``--output_dir`` last.

    Raises:
      ConfigError: a config cannot work, or a folder holds results of another one; all are listed.
    """
    tasks, problems = [], []
    for section in sections:
        flags = tuple(arguments(section))
        folder = pathlib.Path(flags[-1].partition("=")[2])
        command = (sys.executable, "-m", f"experiments.{section.binary}", *flags, "--resume")
        task = Task(section, folder, flags, section.seconds or _UNKNOWN_SECONDS, command)
        try:
            is_done(task)
        except ConfigError as error:
            problems.append(f"{section.name}: {error}")
        tasks.append(task)
    if problems:
        raise ConfigError(problem_list("these sections cannot run:", problems))
    return tasks


def is_done(task: Task) -> bool:
    """Say whether a section's results are finished and drawn; nothing is run again then.

    Raises:
      ConfigError: the folder holds results of another config, or damaged ones, or the config cannot work.
    """
    config, experiment = config_of(task.section.binary, task.arguments), experiment_of(task.section.binary)
    results = open_results(task.folder, experiment.schema, config, resume=True)
    files = (experiment.csv, *experiment.figures)
    return results.finished and all((task.folder / name).is_file() for name in files)


def run_tasks(tasks: Sequence[Task], reporter: Reporter) -> dict[str, str]:
    """Run all tasks that are not done; one that fails does not stop the others.

    Args:
      tasks: in the order in which they run.
      reporter: shows one line for each, and on a terminal a bar with the time left.

    Returns:
      Why each section that failed did so, by its name.

    Raises:
      KeyboardInterrupt: after the running section has stored what it has.
    """
    done = [is_done(task) for task in tasks]
    for task, finished in zip(tasks, done, strict=True):
        if finished:
            reporter.say(f"{task.section.name}: done before")
    left = [task for task, finished in zip(tasks, done, strict=True) if not finished]
    clock, failures = _Clock(left), {}
    for i, task in enumerate(left):
        title = f"{i + 1}/{len(left)} {task.section.name}"
        reporter.say(f"{title}: {clock.left(0.0)} left in all")
        began = time.perf_counter()
        with _bar(reporter, title, clock) as show:
            status = _run(task, reporter, show)
        seconds = time.perf_counter() - began
        clock.finish(seconds)
        if status == 0 and is_done(task):
            reporter.say(f"    {minutes(seconds)}, {_verdict(task)}")
        else:
            failures[task.section.name] = _reason(task, status)
            reporter.wrap(f"failed: {failures[task.section.name]}", head="    ")
            reporter.say(f"    {_log(task)}")
    if left:
        over = len(tasks) - len(failures)
        reporter.say(f"{over} of {len(tasks)} sections are finished, after {minutes(clock.took)}")
    return failures


class _Clock:
    """Estimates the time left, from expected times and from how long the finished sections took."""

    def __init__(self, tasks: Sequence[Task]) -> None:
        self._to_come = collections.deque(task.seconds for task in tasks)
        self._known = all(task.section.seconds for task in tasks)
        self._expected = self.took = 0.0

    def step(self, elapsed: float) -> float:
        """Return the fraction of all that is over after some seconds of the running section."""
        everything = self._expected + sum(self._to_come)
        running = min(elapsed / self._pace, 0.95 * self._to_come[0])
        return (self._expected + running) / everything

    def left(self, elapsed: float) -> str:
        """Say how much time is left after some seconds of the running section."""
        if not self._known and not self.took:
            return "an unknown time"
        running = min(elapsed / self._pace, 0.95 * self._to_come[0]) if self._to_come else 0.0
        return f"about {minutes(self._pace * (sum(self._to_come) - running))}"

    def finish(self, seconds: float) -> None:
        """Count a section that took some seconds as over."""
        self._expected += self._to_come.popleft()
        self.took += seconds

    @property
    def _pace(self) -> float:
        return self.took / self._expected if self.took else 1.0


@contextlib.contextmanager
def _bar(reporter: Reporter, title: str, clock: _Clock) -> Iterator[Callable[[float], None]]:
    """Yield a function of the elapsed seconds that moves a bar on a terminal, and does nothing elsewhere."""
    if not reporter.console.is_terminal:
        yield lambda elapsed: None
        return
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=20),
        TextColumn("{task.percentage:>3.0f}%"),
        TextColumn("{task.fields[left]} left"),
    )
    with Progress(*columns, console=reporter.console, transient=True) as progress:
        bar = progress.add_task(title, total=1.0, left="")
        yield lambda elapsed: progress.update(bar, completed=clock.step(elapsed), left=clock.left(elapsed))


def _log(task: Task) -> pathlib.Path:
    return task.folder / "log.txt"


def _run(task: Task, reporter: Reporter, show: Callable[[float], None]) -> int:
    """Run the process of a section, and return its exit status."""
    task.folder.mkdir(parents=True, exist_ok=True)
    _wait_until_free(task.folder, reporter)
    began = time.perf_counter()
    with _log(task).open("wb") as log:
        environment = os.environ | {"COLUMNS": "80"}
        process = subprocess.Popen(
            task.command,
            stdout=log,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            env=environment,
            start_new_session=True,
        )
        try:
            while (status := process.poll()) is None:
                show(time.perf_counter() - began)
                time.sleep(_POLL_SECONDS)
            return status
        except BaseException:
            # The section has a session of its own, so that Ctrl-C reaches it once, and from here.
            process.send_signal(signal.SIGINT)
            try:
                process.wait(_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            raise


def _wait_until_free(folder: pathlib.Path, reporter: Reporter) -> None:
    """Wait for a section that was left running by a reproduction that was killed."""
    said = False
    while True:
        try:
            with locked(folder):
                return
        except FolderInUseError as error:
            if not said:
                reporter.say(f"    waiting for {error.holder}")
            said = True
            time.sleep(_POLL_SECONDS)


def _verdict(task: Task) -> str:
    claims = experiment_of(task.section.binary).load(task.folder / "results.json").claims
    held = sum(claim.holds for claim in claims)
    return f"{held} of {len(claims)} claims hold" if claims else "finished (it makes no claims)"


def _reason(task: Task, status: int) -> str:
    """Return the error that a section ended with, or else the last line that it wrote."""
    text = _log(task).read_text(errors="replace")
    lines = [line.strip() for line in text.splitlines()[-_LAST_LINES:] if line.strip()]
    errors = [line for line in lines if line.startswith("error:")]
    how = f"signal {-status}" if status < 0 else f"exit status {status}"
    return (errors or lines or ["it wrote nothing"])[-1].removeprefix("error: ") + f" ({how})"
