"""What benchmarks print and store: progress and tables on a console, tables and numbers in files."""

import json
import os
import pathlib
import platform
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Console

from experiments.harness.console import Reporter
from experiments.harness.results import describe_environment
from experiments.harness.serialisation import to_json
from experiments.harness.statistics import student_interval

__all__ = [
    "WIDTH",
    "Reporter",
    "build_reporter",
    "describe_machine",
    "mean_and_interval",
    "to_json",
    "save_report",
]

# Columns that the tables need. A log's 80 would break them.
WIDTH = 100


def build_reporter() -> Reporter:
    """Return a reporter that prints to the terminal, or to a log that is wide enough for the tables."""
    return Reporter(Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))


def describe_machine() -> dict[str, Any]:
    """Return what timings depend on: versions, the processor, and load averages.

    A load average above the benchmark's own load tells that something else was running.
    """
    processor = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    hardware = {"processor": processor, "cores": os.cpu_count(), "load_average": os.getloadavg()}
    return {"environment": describe_environment(), "hardware": hardware}


def mean_and_interval(values: Sequence[float] | np.ndarray, digits: int) -> str:
    """Write the mean over independent replicates ± half of its 95 % interval (Student's t)."""
    interval = student_interval(values)
    return f"{interval.mean:.{digits}f} ± {interval.high - interval.mean:.{digits}f}"


def save_report(
    directory: pathlib.Path, name: str, content: Mapping[str, Any], report: Callable[[Reporter], None]
) -> None:
    """Write ``<name>.json`` with all numbers and ``<name>.txt`` with the tables.

    Args:
      directory: folder of both files; it is made if it does not exist.
      name: name of both files without the suffix.
      content: what the JSON file holds, written in full precision.
      report: prints the tables with the reporter that it is given.
    """
    directory.mkdir(parents=True, exist_ok=True)
    (directory / f"{name}.json").write_text(json.dumps(content, indent=1) + "\n")
    with (directory / f"{name}.txt").open("w") as file:
        report(Reporter(Console(file=file, width=WIDTH)))
