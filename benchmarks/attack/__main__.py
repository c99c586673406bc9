"""Run the attack, print every trial that went wrong, and write the table."""

import argparse
import collections
import os
import pathlib
import platform
import random
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator

import jax

from benchmarks.attack.damages import network_damages, results_damages
from benchmarks.attack.inputs import input_trials
from benchmarks.attack.outcomes import BAD, Outcome, Trial
from benchmarks.attack.processes import Reference, full_disk, kills, races
from experiments.harness.results import describe_environment

# Number of trials of each part, and what runs them.
PARTS: dict[str, tuple[int, Callable[[Reference, int, random.Random], Iterator[Trial]]]] = {
    "kills": (50, kills),
    "races": (20, races),
    "full_disk": (10, full_disk),
    "results": (200, results_damages),
    "networks": (100, network_damages),
    "inputs": (400, input_trials),
}

_PAGE = pathlib.Path(__file__).parents[2] / "docs" / "reliability.md"
_START, _END = "<!-- attack: begin -->", "<!-- attack: end -->"


def run_attack(only: list[str] | None, num: int | None, seed: int, *, show_all: bool) -> bool:
    """Run parts of the attack, and write the table to the docs if all of them ran in full.

    Args:
      only: names of parts; `None` for all.
      num: trials of each part; `None` for the part's own number.
      seed: seed of the moments, sizes and damages.
      show_all: whether to print every trial, not only what went wrong.

    Returns:
      Whether anything bad came of a trial.
    """
    counts: dict[str, collections.Counter[Outcome]] = {}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory(prefix="attack") as folder:
        reference = Reference(pathlib.Path(folder))
        for part in only or list(PARTS):
            total, trials = PARTS[part]
            counts[part] = collections.Counter()
            for trial in trials(reference, num or total, random.Random(f"{part} {seed}")):
                counts[part][trial.outcome] += 1
                if trial.outcome in BAD or show_all:
                    print(f"{trial.outcome.value}: {part}: {trial.name}: {trial.detail}", flush=True)
            seconds = time.perf_counter() - began
            print(f"{part}: {_sentence(counts[part])} ({seconds:.0f} s so far)", flush=True)
    table = _table(counts, time.perf_counter() - began, seed)
    print(table)
    if not (only or num):
        text = _PAGE.read_text()
        inside = f"{_START}\n{table}\n{_END}"
        _PAGE.write_text(re.sub(f"{_START}.*{_END}", lambda _: inside, text, flags=re.DOTALL))
    return any(counts[part][outcome] for part in counts for outcome in BAD)


def _sentence(count: collections.Counter[Outcome]) -> str:
    return ", ".join(f"{count[outcome]} {outcome.value}" for outcome in Outcome)


def _table(counts: dict[str, collections.Counter[Outcome]], seconds: float, seed: int) -> str:
    """Return the table in Markdown, below how it was made."""
    environment = describe_environment()
    made = (
        f"`python -m benchmarks.attack --seed={seed}`, commit {environment['commit']}, jax "
        f"{jax.__version__}, Python {platform.python_version()}, {environment['platform']}, "
        f"{os.cpu_count()} cores, {seconds / 60:.0f} minutes."
    )
    head = ["part", "trials", *(outcome.value for outcome in Outcome)]
    rows = [
        [part, str(sum(count.values())), *(str(count[outcome]) for outcome in Outcome)]
        for part, count in counts.items()
    ]
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join([made, "", *(f"| {' | '.join(line)} |" for line in lines)])


def main() -> None:
    """Read the command line and run the attack."""
    # Not absl: the binaries that are attacked define flags of the same names in this process.
    parser = argparse.ArgumentParser(prog="python -m benchmarks.attack", description="See the package.")
    parser.add_argument("--only", type=lambda text: text.split(","), help=f"some of {', '.join(PARTS)}")
    parser.add_argument("--num", type=int, help="trials of each part")
    parser.add_argument("--seed", type=int, default=0, help="seed of the moments, sizes and damages")
    parser.add_argument("--all", action="store_true", help="print every trial, not only what went wrong")
    arguments = parser.parse_args()
    unknown = set(arguments.only or ()) - set(PARTS)
    if unknown:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    sys.exit(run_attack(arguments.only, arguments.num, arguments.seed, show_all=arguments.all))


if __name__ == "__main__":
    main()
