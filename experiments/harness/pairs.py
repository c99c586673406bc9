"""Trained networks, found by recipe and seed, and trained where they are not there yet."""

import dataclasses
import hashlib
import json
import math
import os
import pathlib
import time
from collections.abc import Collection, Sequence
from typing import NamedTuple

from experiments.harness.console import Reporter
from experiments.harness.results import Results
from rebasin.errors import TrajectoryError
from rebasin.training.data import Dataset
from rebasin.training.loop import train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

__all__ = ["Pair", "run_directory", "shared_runs", "train_networks", "warn_if_guessing"]

# Share of the loss of guessing from which on a network counts as one that guesses.
_LEARNED = 0.99


class Pair(NamedTuple):
    """Which two networks: how both are trained, and the seed of each."""

    recipe: Recipe
    seeds: tuple[int, int]

    def __str__(self) -> str:
        return f"seeds {self.seeds[0]} and {self.seeds[1]}"


def shared_runs(given: str | None) -> pathlib.Path:
    """The folder of networks that experiments share: as given, by environment, or by default."""
    folder = given or os.environ.get("REBASIN_RUNS_DIR", "~/.cache/rebasin/runs")
    return pathlib.Path(folder).expanduser()


def run_directory(runs_dir: pathlib.Path, recipe: Recipe, seed: int) -> pathlib.Path:
    """Where a network of a recipe and seed is kept: a folder that tells what it is, with a hash."""
    text = json.dumps(dataclasses.asdict(recipe), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    return (
        runs_dir
        / f"{recipe.dataset}-{recipe.model}-w{recipe.width}-e{recipe.epochs}-{digest}"
        / f"seed_{seed}"
    )


def train_networks(
    recipe: Recipe,
    dataset: Dataset,
    seeds: Sequence[int],
    *,
    runs_dir: pathlib.Path,
    reporter: Reporter,
    results: Results,
    keep: Collection[int] | None = None,
) -> list[Trajectory]:
    """Trains one network for each seed, unless it is there; an interrupted run of the same recipe goes on.

    Args:
      recipe: how to train.
      dataset: the data.
      seeds: one for each network.
      runs_dir: where networks are kept.
      reporter: shows progress.
      results: counts the seconds spent.
      keep: epochs to store; `None` stores all.

    Returns:
      The trajectories, in the order of `seeds`.
    """
    trajectories = []
    for seed in seeds:
        directory = run_directory(runs_dir, recipe, seed)
        begun = _last_stored(directory)
        where = f" from epoch {begun}" if begun else ""
        began = time.perf_counter()
        with reporter.stage(f"train seed {seed}{where}", recipe.epochs - begun) as advance:
            trajectory = train(
                recipe,
                dataset,
                seed=seed,
                directory=directory,
                keep=keep,
                progress=lambda *_, advance=advance: advance(),
                resume=True,
            )
        results.add_seconds("training", time.perf_counter() - began)
        warn_if_guessing(trajectory, f"seed {seed}", dataset, reporter)
        trajectories.append(trajectory)
    return trajectories


def warn_if_guessing(trajectory: Trajectory, name: str, dataset: Dataset, reporter: Reporter) -> None:
    """Says so where a network ends training no better than at guessing, as one whose units all died does.

    Args:
      trajectory: the network.
      name: what to call it.
      dataset: what it was trained on.
      reporter: says it.
    """
    loss = trajectory.metrics(max(trajectory.epochs)).get("loss", 0.0)
    guessing = math.log(dataset.num_classes)
    if loss > _LEARNED * guessing:
        reporter.wrap(
            f"{name} ends at a training loss of {loss:.3f}, where guessing has {guessing:.3f}: it has "
            "learned nothing, and barriers to it mean nothing. Try more --warmup_epochs.",
            head="warning: ",
        )


def _last_stored(directory: pathlib.Path) -> int:
    """The epoch at which training goes on, 0 where it begins."""
    try:
        return max(Trajectory(directory).epochs, default=0)
    except TrajectoryError:
        return 0
