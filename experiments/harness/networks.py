"""The networks of an experiment: trained where they are missing, and dropped when they have served."""

import math
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax

from experiments.harness.console import Reporter
from experiments.harness.pairs import Pair, run_directory, train_networks, warn_if_guessing
from experiments.harness.paths import network_shapes
from experiments.harness.results import Results
from rebasin.errors import ConfigError, TrajectoryError
from rebasin.models import build_model
from rebasin.training.data import Dataset
from rebasin.training.loop import Start, train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

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
    """Parents and children, by recipe and seed.

    Unless all is kept, networks that are not in `runs_dir` are trained in ``output_dir/networks``, with only
    those epochs stored that are needed; what was found in `runs_dir` is never deleted.

    Args:
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
        self.dataset, self.keep = dataset, keep
        self.runs_dir, self.scratch = runs_dir, output_dir / "networks"
        self.reporter, self.results = reporter, results

    def parents(self, pair: Pair, epochs: Collection[int]) -> list[Trajectory]:
        """Both trajectories of a pair, with at least the epochs wanted.

        Raises:
          ConfigError: a finished run lacks some of them.
        """
        found = []
        for seed in pair.seeds:
            ours = not self._shared(pair.recipe, seed, epochs)
            (trajectory,) = train_networks(
                pair.recipe,
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

    def child(
        self, parent: Trajectory, tree: Any, epoch: int, number: int, advance: Callable[[], None]
    ) -> Any:
        """The last tree of a child that leaves its parent at `epoch`, with a data order of its own.

        Args:
          parent: the parent's trajectory.
          tree: the parent at `epoch`.
          epoch: the epoch at which they part.
          number: tells the children of one parent and epoch apart, from 1 on.
          advance: called for each epoch of the child, for those that are stored already at once.
        """
        runs = self.runs_dir if self.keep == "all" else self.scratch
        base = run_directory(runs, parent.recipe, parent.seed).parent
        directory = base / "children" / f"seed_{parent.seed}_epoch_{epoch}_child_{number}"
        began = time.perf_counter()
        to_come = parent.recipe.epochs - epoch

        def progress(done: int, last: int, metrics: Mapping[str, float]) -> None:
            nonlocal to_come
            while to_come > last - done:
                to_come -= 1
                advance()

        trajectory = train(
            parent.recipe,
            self.dataset,
            seed=child_seed(parent.seed, epoch, number),
            directory=directory,
            start=Start(tree, epoch),
            keep=None if self.keep == "all" else (),
            resume=True,
            progress=progress,
        )
        progress(parent.recipe.epochs, parent.recipe.epochs, {})
        self.results.add_seconds("training", time.perf_counter() - began)
        name = f"child {number} of seed {parent.seed} from epoch {epoch}"
        warn_if_guessing(trajectory, name, self.dataset, self.reporter)
        last = trajectory.last
        if self.keep == "none":
            shutil.rmtree(directory)
        return last

    def release(self, pair: Pair) -> None:
        """Drops what need not stay of networks whose measurements are stored."""
        for directory in (run_directory(self.scratch, pair.recipe, seed) for seed in pair.seeds):
            if self.keep == "none":
                shutil.rmtree(directory, ignore_errors=True)
            elif self.keep == "ends" and directory.exists():
                trajectory = Trajectory(directory)
                trajectory.drop(trajectory.epochs[1:-1])
        if self.keep == "none":
            # Empty folders above, and children of a run that was killed while it trained them.
            shutil.rmtree(self.scratch, ignore_errors=True)

    def say_disk_use(self, pairs: Sequence[Pair], epochs: Sequence[int], spawned: Sequence[int] = ()) -> None:
        """Says how much disk the networks still to be trained take at most.

        Args:
          pairs: those not yet measured, of one model and number of epochs.
          epochs: epochs wanted of each parent.
          spawned: epochs at which three children part from each pair.
        """
        if not pairs:
            return
        new = [
            sum(not _holds(run_directory(self.runs_dir, p.recipe, seed), epochs) for seed in p.seeds)
            for p in pairs
        ]
        if not any(new) and not spawned:
            self.reporter.say(f"networks: all found in {self.runs_dir}")
            return
        recipe = pairs[0].recipe
        model = build_model(recipe.model, width=recipe.width, num_classes=self.dataset.num_classes)
        tree, _ = network_shapes(model, self.dataset)
        # A stored epoch has its momentum beside it.
        size = 2 * sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))
        if self.keep == "all":
            children = sum(recipe.epochs - t + 1 for t in spawned)
            count = sum(new) * (recipe.epochs + 1) + 3 * len(pairs) * children
        else:
            # One epoch more while a run goes on: the one to resume at.
            working = max(new) * (len(set(epochs)) + 1)
            ends = min(2, len(set(epochs)))
            staying = ends * sum(new) + 3 * len(spawned) * len(pairs) if self.keep == "ends" else 0
            count = working + staying + (2 if spawned else 0)
        where = self.runs_dir if self.keep == "all" else self.scratch
        self.reporter.say(
            f"disk: at most {_bytes(count * size)} for networks in {where}, {_bytes(size)} an epoch "
            f"(keeping {self.keep})"
        )

    def _shared(self, recipe: Recipe, seed: int, epochs: Collection[int]) -> bool:
        """Whether a network is to be read from, or trained in, the folder that experiments share."""
        return self.keep == "all" or _holds(run_directory(self.runs_dir, recipe, seed), epochs)


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
