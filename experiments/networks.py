"""The networks of an experiment: trained where they are missing, and dropped when they have served."""

import math
import pathlib
import shutil
import time
from collections.abc import Collection, Sequence
from typing import Any

import jax

from experiments.console import Reporter
from experiments.pairs import run_directory, train_networks
from experiments.results import Results
from rebasin.data import Dataset
from rebasin.errors import ConfigError, TrajectoryError
from rebasin.models import build_model
from rebasin.recipes import Recipe
from rebasin.training import Start, train
from rebasin.trajectory import Trajectory

__all__ = ["KEEP", "Networks", "child_seed"]

# What stays on disk of the networks that an experiment trains.
KEEP = {
    "all": "every epoch, in runs_dir, for other experiments to find",
    "ends": "first and last epochs (of children the last), in OUTPUT_DIR/networks",
    "none": "nothing",
}


def child_seed(parent: int, epoch: int, number: int) -> int:
    """Seed of the data order of a child; no two of an experiment are equal, and none is a parent's.

    Examples:
      >>> child_seed(3, epoch=20, number=2)
      10030202
    """
    return 10_000_000 + (parent * 1000 + epoch) * 10 + number


class Networks:
    """Parents and children of one recipe.

    Unless all is kept, networks that are not in `runs_dir` are trained in ``output_dir/networks``, with only
    those epochs stored that are needed; what was found in `runs_dir` is never deleted.

    Args:
      recipe: how to train.
      dataset: the data.
      runs_dir: where networks are found by recipe and seed.
      output_dir: the experiment's folder.
      keep: a name in `KEEP`.
      reporter: shows progress.
      results: counts the seconds spent.

    Raises:
      ConfigError: `keep` is not in `KEEP`.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        *,
        runs_dir: pathlib.Path,
        output_dir: pathlib.Path,
        keep: str,
        reporter: Reporter,
        results: Results,
    ) -> None:
        if keep not in KEEP:
            raise ConfigError(f"keep: wanted one of {', '.join(KEEP)}, got {keep!r}")
        self.recipe, self.dataset, self.keep = recipe, dataset, keep
        self.runs_dir, self.scratch = runs_dir, output_dir / "networks"
        self.reporter, self.results = reporter, results

    def parents(self, seeds: Sequence[int], epochs: Collection[int]) -> list[Trajectory]:
        """One trajectory for each seed, with at least the epochs wanted.

        Raises:
          ConfigError: a finished run lacks some of them.
        """
        found = []
        for seed in seeds:
            ours = not self._found(seed, epochs)
            (trajectory,) = train_networks(
                self.recipe,
                self.dataset,
                (seed,),
                runs_dir=self.scratch if ours else self.runs_dir,
                reporter=self.reporter,
                results=self.results,
                keep=tuple(epochs) if ours else None,
            )
            missing = sorted(set(epochs) - set(trajectory.epochs))
            if missing:
                raise ConfigError(
                    f"{trajectory.directory} is finished and does not hold the epochs {missing}; name "
                    "another folder for networks, or delete this one to train them anew"
                )
            found.append(trajectory)
        return found

    def child(self, parent: Trajectory, tree: Any, epoch: int, number: int) -> Any:
        """The last tree of a child that leaves its parent at `epoch`, with a data order of its own.

        Args:
          parent: the parent's trajectory.
          tree: the parent at `epoch`.
          epoch: the epoch at which they part.
          number: tells the children of one parent and epoch apart, from 1 on.
        """
        runs = self.runs_dir if self.keep == "all" else self.scratch
        base = run_directory(runs, self.recipe, parent.seed).parent
        directory = base / "children" / f"seed_{parent.seed}_epoch_{epoch}_child_{number}"
        began = time.perf_counter()
        trajectory = train(
            self.recipe,
            self.dataset,
            seed=child_seed(parent.seed, epoch, number),
            directory=directory,
            start=Start(tree, epoch),
            keep=None if self.keep == "all" else (),
            resume=True,
        )
        self.results.add_seconds("training", time.perf_counter() - began)
        last = trajectory.last
        if self.keep == "none":
            shutil.rmtree(directory)
        return last

    def release(self, seeds: Sequence[int]) -> None:
        """Drops what need not stay of networks whose measurements are stored."""
        for directory in (run_directory(self.scratch, self.recipe, seed) for seed in seeds):
            if self.keep == "none":
                shutil.rmtree(directory, ignore_errors=True)
            elif self.keep == "ends" and directory.exists():
                trajectory = Trajectory(directory)
                trajectory.drop(trajectory.epochs[1:-1])
        if self.keep == "none":
            # Empty folders above, and children of a run that was killed while it trained them.
            shutil.rmtree(self.scratch, ignore_errors=True)

    def say_disk_use(
        self, pairs: Sequence[Sequence[int]], epochs: Sequence[int], spawned: Sequence[int] = ()
    ) -> None:
        """Says how much disk the networks still to be trained take at most.

        Args:
          pairs: seeds of the parents of each replicate.
          epochs: epochs wanted of each parent.
          spawned: epochs at which three children part from each pair.
        """
        model = build_model(self.recipe.model, width=self.recipe.width, num_classes=self.dataset.num_classes)
        image = jax.ShapeDtypeStruct((1, *self.dataset.train.images.shape[1:]), jax.numpy.float32)
        tree = jax.eval_shape(model.init, jax.random.key(0), image)
        # A stored epoch has its momentum beside it.
        size = 2 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        last = self.recipe.epochs
        new = [sum(not self._found(seed, epochs) for seed in seeds) for seeds in pairs]
        if self.keep == "all":
            new = [
                sum(not _holds(run_directory(self.runs_dir, self.recipe, s), epochs) for s in p)
                for p in pairs
            ]
            count = sum(new) * (last + 1) + 3 * len(pairs) * sum(last - t + 1 for t in spawned)
        else:
            # One epoch more while a run goes on: the one to resume at.
            working = max(new, default=0) * (len(set(epochs)) + 1)
            staying = 2 * sum(new) + 3 * len(spawned) * len(pairs) if self.keep == "ends" else 0
            count = working + staying + (2 if spawned else 0)
        where = self.runs_dir if self.keep == "all" else self.scratch
        self.reporter.say(
            f"disk: at most {_bytes(count * size)} for networks in {where}, {_bytes(size)} an epoch "
            f"(keeping {self.keep})"
        )

    def _found(self, seed: int, epochs: Collection[int]) -> bool:
        """Whether a network is to be read from, or trained in, the folder that experiments share."""
        return self.keep == "all" or _holds(run_directory(self.runs_dir, self.recipe, seed), epochs)


def _holds(directory: pathlib.Path, epochs: Collection[int]) -> bool:
    """Whether a folder holds a finished run with these epochs."""
    try:
        trajectory = Trajectory(directory)
    except TrajectoryError:
        return False
    return trajectory.complete and set(epochs) <= set(trajectory.epochs)


def _bytes(count: float) -> str:
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
