"""The networks of experiments: found by recipe and seed, trained where missing, deleted once measured."""

import functools
import hashlib
import itertools
import json
import math
import os
import pathlib
import shutil
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple, TypeVar

import jax

from experiments.harness.console import Reporter
from experiments.harness.deadline import Deadline
from experiments.harness.results import Seconds
from rebasin.errors import ConfigError, TrajectoryError
from rebasin.training.data import Dataset
from rebasin.training.folders import expand_home
from rebasin.training.imp import Level, Rewind, prune_iteratively
from rebasin.training.lock import FolderInUseError
from rebasin.training.loop import InitialState, train
from rebasin.training.recipes import Recipe, recipe_fields
from rebasin.training.trajectory import Trajectory

__all__ = [
    "CHILDREN",
    "KEEP",
    "WAIT_SECONDS",
    "Networks",
    "Pair",
    "child_seed",
    "dataset_of",
    "holds_epochs",
    "run_directory",
    "shared_runs",
    "train_networks",
]

# What stays on disk of the networks that an experiment trains.
KEEP = {
    "all": "every epoch, in runs_dir, for other experiments to find",
    "measured": "the epochs that are measured, in runs_dir, and of children the last",
    "ends": "first and last epochs (of children the last), in OUTPUT_DIR/networks",
    "none": "nothing",
}

# Those of them with which parents are trained in runs_dir.
_SHARED = ("all", "measured")

# The children that leave a pair of parents at a spawn epoch, A¹, A² and B¹, each as the index of its parent
# in the pair and its own number among the parent's children.
CHILDREN = ((0, 1), (0, 2), (1, 1))

# How often a network that another process trains is looked at again.
WAIT_SECONDS = 1.0

# A step of training, for a deadline.
_EPOCH = "another epoch of training"

T = TypeVar("T")

# A network whose training loss is at least this fraction of the loss of guessing has learned nothing.
_GUESSING = 0.99


class Pair(NamedTuple):
    """Networks that differ in their seeds and are measured together: two, or more in some experiments.

    Attributes:
      recipe: how all of them are trained.
      seeds: seed of each network.
    """

    recipe: Recipe
    seeds: tuple[int, ...]

    @property
    def key(self) -> jax.Array:
        """The key of matching methods, which a pair has in whatever run it is measured."""
        return jax.random.key(self.seeds[0])

    def __str__(self) -> str:
        *first, last = self.seeds
        return f"seeds {', '.join(map(str, first))} and {last}"


def shared_runs(given: str | None) -> pathlib.Path:
    """Return the folder of networks that experiments share.

    Args:
      given: the folder that the user names; by default that of ``$REBASIN_RUNS_DIR``, else
        ``~/.cache/rebasin/runs``.
    """
    folder = given or os.environ.get("REBASIN_RUNS_DIR", "~/.cache/rebasin/runs")
    return expand_home(folder)


def run_directory(runs_dir: pathlib.Path, recipe: Recipe, seed: int) -> pathlib.Path:
    """Return the folder of one network, whose name tells the recipe and ends with a hash of it."""
    text = json.dumps(recipe_fields(recipe), sort_keys=True)
    digest = hashlib.sha256(text.encode()).hexdigest()[:10]
    name = f"{recipe.dataset}-{recipe.model}-w{recipe.width}-e{recipe.epochs}-{digest}"
    return runs_dir / name / f"seed_{seed}"


@functools.lru_cache(maxsize=16)
def dataset_of(name: str, dataset: Dataset) -> Dataset:
    """Return the data of a recipe, of which an experiment over image sizes has one for each size.

    Args:
      name: the dataset in the recipe.
      dataset: the dataset of the run.
    """
    return dataset.named(name)


def child_seed(parent: int, epoch: int, number: int) -> int:
    """Return the seed of a child's data order.

    No two children of an experiment have the same seed, and none has the seed of a parent.

    Examples:
      >>> child_seed(3, epoch=20, number=2)
      10030202
    """
    return 10_000_000 + (parent * 1000 + epoch) * 10 + number


def train_networks(
    recipe: Recipe,
    dataset: Dataset,
    seeds: Sequence[int],
    *,
    runs_dir: pathlib.Path,
    reporter: Reporter,
    seconds: Seconds,
    keep: Collection[int] | None = None,
    deadline: Deadline | None = None,
) -> list[Trajectory]:
    """Train one network for each seed, unless it is there; go on with an interrupted run of the same recipe.

    Args:
      recipe: how to train.
      dataset: the data to train on.
      seeds: seed of each network.
      runs_dir: folder in which networks are kept.
      reporter: shows progress.
      seconds: counts the time that training takes.
      keep: epochs to store; `None` stores all.
      deadline: ends the training between two epochs when time is up.

    Returns:
      The trajectories, in the order of `seeds`. A network that another process trains is waited for.

    Raises:
      OutOfTime: there may be no time for another epoch. Epochs that are stored stay.
    """
    deadline = deadline or Deadline()

    def train_one(seed: int) -> Trajectory:
        directory = run_directory(runs_dir, recipe, seed)
        begun = _last_stored(directory)
        title = f"train seed {seed}" + f" from epoch {begun}" * bool(begun)
        if begun < recipe.epochs:
            deadline.require(_EPOCH)
        last = deadline.elapsed

        def progress(done: int, epochs: int, metrics: Mapping[str, float]) -> None:
            nonlocal last
            del metrics
            advance()
            deadline.add(_EPOCH, deadline.elapsed - last)
            last = deadline.elapsed
            if done < epochs:
                deadline.require(_EPOCH)

        with seconds.count("training"), reporter.stage(title, recipe.epochs - begun) as advance:
            options = {"keep": keep, "resume": True, "progress": progress}
            return train(recipe, dataset, seed=seed, directory=directory, **options)

    trajectories = []
    for seed in seeds:
        trajectory = _when_free(functools.partial(train_one, seed), reporter)
        _warn_if_guessing(trajectory, f"seed {seed}", dataset, reporter)
        trajectories.append(trajectory)
    return trajectories


def _when_free(run: Callable[[], T], reporter: Reporter) -> T:
    """Call a function that trains, and wait as long as another process trains the same network.

    Two experiments with one folder of networks share the work in this way. If the other process ends without
    having finished the network, training goes on here.
    """
    said = False
    while True:
        try:
            return run()
        except FolderInUseError as error:
            if not said:
                reporter.say(f"waiting for {error.holder}, which trains {error.directory}")
            said = True
            time.sleep(WAIT_SECONDS)


class Networks:
    """Parents and children of an experiment, by recipe and seed.

    Unless all epochs are kept, networks that are not in `runs_dir` are trained in ``output_dir/networks``,
    where only those epochs are stored that are needed. Networks that were found in `runs_dir` are never
    deleted.

    Args:
      dataset: the data to train on.
      runs_dir: folder in which networks are found by recipe and seed.
      output_dir: folder of the experiment.
      keep: a name in `KEEP`.
      reporter: shows progress.
      seconds: counts the time that training takes.
      deadline: ends the training of parents between two epochs when time is up.

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
        seconds: Seconds,
        deadline: Deadline | None = None,
    ) -> None:
        if keep not in KEEP:
            raise ConfigError(f"keep: wanted one of {', '.join(KEEP)}, got {keep!r}")
        self.dataset, self.keep = dataset, keep
        self.runs_dir, self.scratch = runs_dir, output_dir / "networks"
        self.reporter, self.seconds, self.deadline = reporter, seconds, deadline

    @property
    def shares_parents(self) -> bool:
        """Whether parents are trained in `runs_dir`, where other experiments find them."""
        return self.keep in _SHARED

    def parents(self, pair: Pair, epochs: Collection[int]) -> list[Trajectory]:
        """Return the trajectories of a pair, with at least the wanted epochs.

        Raises:
          ConfigError: a finished run lacks some of the epochs.
        """
        found = []
        for seed in pair.seeds:
            # A network that is kept for other experiments is also trained in the folder that they share.
            shared = self.shares_parents or holds_epochs(
                run_directory(self.runs_dir, pair.recipe, seed), epochs
            )
            (trajectory,) = train_networks(
                pair.recipe,
                dataset_of(pair.recipe.dataset, self.dataset),
                (seed,),
                runs_dir=self.runs_dir if shared else self.scratch,
                reporter=self.reporter,
                seconds=self.seconds,
                keep=None if self.keep == "all" else tuple(epochs),
                deadline=self.deadline,
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
        """Return the last tree of a child that leaves its parent, with a data order of its own.

        Args:
          parent: trajectory of the parent.
          tree: the parent's tree at `epoch`.
          epoch: epoch at which the child leaves its parent.
          number: number of the child among those of its parent and epoch, from 1 on.
          advance: called once for each epoch of the child, also for epochs that were stored already.
        """
        directory = self._child_directory(parent, epoch, number)
        to_come = parent.recipe.epochs - epoch

        def progress(done: int, last: int, metrics: Mapping[str, float]) -> None:
            nonlocal to_come
            while to_come > last - done:
                to_come -= 1
                advance()

        def train_child() -> Trajectory:
            with self.seconds.count("training"):
                return train(
                    parent.recipe,
                    self.dataset,
                    seed=child_seed(parent.seed, epoch, number),
                    directory=directory,
                    start=InitialState(tree, epoch),
                    keep=None if self.keep == "all" else (),
                    resume=True,
                    progress=progress,
                )

        trajectory = _when_free(train_child, self.reporter)
        progress(parent.recipe.epochs, parent.recipe.epochs, {})
        name = f"child {number} of seed {parent.seed} from epoch {epoch}"
        _warn_if_guessing(trajectory, name, self.dataset, self.reporter)
        last = trajectory.last
        if self.keep == "none":
            shutil.rmtree(directory)
        return last

    def _child_directory(self, parent: Trajectory, epoch: int, number: int) -> pathlib.Path:
        runs = self.runs_dir if self.keep == "all" else self.scratch
        base = run_directory(runs, parent.recipe, parent.seed).parent
        return base / "children" / f"seed_{parent.seed}_epoch_{epoch}_child_{number}"

    def levels(
        self,
        parent: Trajectory,
        levels: int,
        *,
        rewind_epoch: int,
        rewind: Rewind,
        advance: Callable[[], None],
    ) -> Iterator[Level]:
        """Return the levels of pruning of a network, each of which is trained when it is asked for.

        Args:
          parent: trajectory of the dense network.
          levels: number of levels beside the dense one.
          rewind_epoch: epoch to which weights or learning rate return.
          rewind: what returns to it.
          advance: called once for each level beside the dense one, when it is trained.
        """
        begin = functools.partial(
            prune_iteratively,
            parent,
            self.dataset,
            directory=self._levels_directory(parent.recipe, parent.seed) / f"{rewind}_{rewind_epoch}",
            levels=levels,
            rewind_epoch=rewind_epoch,
            rewind=rewind,
            resume=True,
        )
        found = begin()

        def next_level(number: int) -> Level:
            nonlocal found
            try:
                return next(found)
            except FolderInUseError:
                # An iterator ends with its first error. A new one finds the levels before this one.
                found = itertools.islice(begin(), number, None)
                raise

        def run() -> Iterator[Level]:
            for number in range(levels + 1):
                with self.seconds.count("training"):
                    level = _when_free(functools.partial(next_level, number), self.reporter)
                if number:
                    advance()
                yield level

        return run()

    def retrained(
        self, parent: Trajectory, start: InitialState, mask: Any, name: str, *, seed: int | None = None
    ) -> Any:
        """Return the last tree of a network that is rewound and trained with a mask.

        Args:
          parent: trajectory of the dense network, which gives the recipe.
          start: the rewound network.
          mask: the mask in the order of units of `start`.
          name: name of the folder of the network, one for each mask, rewinding and seed.
          seed: seed of the data order, by default the parent's.
        """
        retrain = functools.partial(
            train,
            parent.recipe,
            self.dataset,
            seed=parent.seed if seed is None else seed,
            directory=self._levels_directory(parent.recipe, parent.seed) / "masks" / name,
            start=start,
            mask=mask,
            keep=(),
            resume=True,
        )
        with self.seconds.count("training"):
            return _when_free(retrain, self.reporter).last

    def _levels_directory(self, recipe: Recipe, seed: int) -> pathlib.Path:
        runs = self.runs_dir if self.keep == "all" else self.scratch
        return run_directory(runs, recipe, seed).parent / "levels" / f"seed_{seed}"

    def release(self, pair: Pair) -> None:
        """Delete what need not stay of a pair whose measurements are stored."""
        for directory in (run_directory(self.scratch, pair.recipe, seed) for seed in pair.seeds):
            if self.keep == "none":
                shutil.rmtree(directory, ignore_errors=True)
            elif self.keep == "ends" and directory.exists():
                trajectory = Trajectory(directory)
                trajectory.drop(trajectory.epochs[1:-1])
        if self.keep == "none":
            base = run_directory(self.scratch, pair.recipe, pair.seeds[0]).parent
            # Children of a run that was killed while it trained them. What else is there is not ours.
            for seed in pair.seeds:
                for child in base.glob(f"children/seed_{seed}_epoch_*_child_*"):
                    shutil.rmtree(child, ignore_errors=True)
                shutil.rmtree(self._levels_directory(pair.recipe, seed), ignore_errors=True)
            for folder in (base / "children", base / "levels", base, self.scratch):
                if folder.is_dir() and not any(folder.iterdir()):
                    folder.rmdir()


def _warn_if_guessing(trajectory: Trajectory, name: str, dataset: Dataset, reporter: Reporter) -> None:
    """Warn of a network that ends training no better than at guessing, as one does whose units all died."""
    loss = trajectory.metrics(max(trajectory.epochs)).get("loss", 0.0)
    guessing = math.log(dataset.num_classes)
    if loss > _GUESSING * guessing:
        reporter.wrap(
            f"{name} ends at a training loss of {loss:.3f}, where guessing has {guessing:.3f}: it has "
            "learned nothing, and barriers to it mean nothing. Try more --warmup_epochs.",
            head="warning: ",
        )


def _last_stored(directory: pathlib.Path) -> int:
    """Return the epoch at which training goes on, 0 where it begins."""
    try:
        return max(Trajectory(directory).epochs, default=0)
    except TrajectoryError:
        return 0


def holds_epochs(directory: pathlib.Path, epochs: Collection[int]) -> bool:
    """Say whether a folder holds a finished run with these epochs.

    Args:
      directory: folder of the run.
      epochs: the epochs that must be stored.
    """
    try:
        trajectory = Trajectory(directory)
    except TrajectoryError:
        return False
    return trajectory.complete and set(epochs) <= set(trajectory.epochs)
