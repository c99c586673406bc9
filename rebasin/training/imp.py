"""Iterative magnitude pruning (IMP): ever sparser networks from one dense network, level by level on disk.

A level prunes a fifth of the remaining weights, those of least magnitude at the end of the level before,
rewinds the network, and trains what is left (arXiv 2404.06498, App. A). Two rewindings are known (arXiv
2003.02389):

- ``weights``: the remaining weights return to their values at the rewind epoch, and train from there;
- ``learning_rate``: they keep their values, and only the learning rate returns to the rewind epoch.

The folder of a sequence holds for each level the run, such as ``level_03``, and its mask, ``level_03.npz``. A
level follows from the one before bit for bit. So a killed sequence is continued with ``resume=True``, and
ends where the uninterrupted one ends.
"""

import functools
import os
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, get_args

from rebasin.errors import ConfigError, TrajectoryError
from rebasin.masks import full_mask, save_mask
from rebasin.pruning import PRUNED_PER_LEVEL, level_sparsity, magnitude_mask
from rebasin.training.data import Dataset
from rebasin.training.loop import InitialState, train
from rebasin.training.trajectory import Trajectory, make_run_folder

__all__ = ["Level", "LevelProgress", "Rewind", "check_levels", "prune_iteratively"]

Rewind: TypeAlias = Literal["weights", "learning_rate"]

# Called after each epoch with the level, the epoch, the last epoch, and the training metrics.
LevelProgress = Callable[[int, int, int, Mapping[str, float]], None]


class Level(NamedTuple):
    """One level of a sequence of pruned networks.

    Attributes:
      level: how often weights were pruned; 0 is the dense network.
      mask: the weights that are left.
      trajectory: the run of the level. Its last tree is the pruned and trained network.
    """

    level: int
    mask: Any
    trajectory: Trajectory


def prune_iteratively(
    parent: Trajectory,
    dataset: Dataset,
    *,
    directory: str | os.PathLike[str],
    levels: int,
    rewind_epoch: int = 5,
    rewind: Rewind = "weights",
    fraction: float = PRUNED_PER_LEVEL,
    leaves: Sequence[str] | None = None,
    keep: Collection[int] | None = (),
    resume: bool = False,
    progress: LevelProgress | None = None,
) -> Iterator[Level]:
    """Prune and train a network again and again, and yield every level when it is trained.

    Every level trains with the recipe, the data order and the augmentation of its parent, from the rewind
    epoch to the last. Its momentum is zero at first, and the learning rate is that of the epoch.

    Args:
      parent: the finished run of the dense network.
      dataset: the data that it was trained on.
      directory: folder of the levels.
      levels: number of levels beside the dense one.
      rewind_epoch: epoch to which weights or learning rate return.
      rewind: what returns to it.
      fraction: fraction of the remaining weights that a level prunes.
      leaves: path names of the leaves that are pruned; by default all kernels
        (`rebasin.pruning.prunable_leaves`).
      keep: epochs of each level to keep on disk, beside the last; `None` keeps all.
      resume: continue an unfinished level. Finished levels are found again in any case.
      progress: function called after every epoch.

    Returns:
      An iterator of levels 0 to `levels`, of which level 0 is the parent with nothing pruned. A level is
      trained when it is asked for; everything that can be checked before is checked at once.

    Raises:
      ConfigError: the rewind epoch is not before the parent's last, `rewind` or `fraction` is none, or the
        last level would have fewer weights than leaves.
      TrajectoryError: the parent is unfinished or lacks the rewind epoch of its weights; or the folder of a
        level holds another run, or an unfinished one without `resume`.
    """
    tree = check_levels(
        parent, levels, rewind_epoch=rewind_epoch, rewind=rewind, fraction=fraction, leaves=leaves
    )
    folder = make_run_folder(directory)

    def run() -> Iterator[Level]:
        level = Level(0, full_mask(tree), parent)
        yield level
        for number in range(1, levels + 1):
            last = level.trajectory.last
            sparsity = level_sparsity(number, fraction=fraction)
            mask = magnitude_mask(last, sparsity, within=level.mask, leaves=leaves)
            trajectory = train(
                parent.recipe,
                dataset,
                seed=parent.seed,
                directory=folder / f"level_{number:02d}",
                start=InitialState(tree if rewind == "weights" else last, rewind_epoch),
                mask=mask,
                keep=keep,
                resume=resume,
                progress=None if progress is None else functools.partial(progress, number),
            )
            # The mask follows from the level before. It is stored for those who read this level alone.
            path = trajectory.directory.with_suffix(".npz")
            if not path.exists():
                save_mask(path, mask)
            level = Level(number, mask, trajectory)
            yield level

    return run()


def check_levels(
    parent: Trajectory,
    levels: int,
    *,
    rewind_epoch: int,
    rewind: Rewind,
    fraction: float = PRUNED_PER_LEVEL,
    leaves: Sequence[str] | None = None,
) -> Any:
    """Return the tree from which the first level starts, once all that `prune_iteratively` needs is there.

    Args:
      parent: as in `prune_iteratively`, like all other arguments.
      levels: number of levels beside the dense one.
      rewind_epoch: epoch to which weights or learning rate return.
      rewind: what returns to it.
      fraction: fraction of the remaining weights that a level prunes.
      leaves: path names of the leaves that are pruned.

    Raises:
      ConfigError: as `prune_iteratively`.
      TrajectoryError: the parent is unfinished or lacks the rewind epoch of its weights.
    """
    last = parent.recipe.epochs
    if rewind not in get_args(Rewind):
        raise ConfigError(f"rewind: wanted one of {', '.join(get_args(Rewind))}, got {rewind!r}")
    if not 0 <= rewind_epoch < last:
        raise ConfigError(f"rewind_epoch: wanted at least 0 and less than {last}, got {rewind_epoch}")
    if levels < 0:
        raise ConfigError(f"levels: wanted at least 0, got {levels}")
    if not parent.complete:
        raise TrajectoryError(f"{parent.directory} is not finished: its last epoch, {last}, is not stored")
    # A learning rate returns to an epoch that need not be stored.
    tree = parent[rewind_epoch] if rewind == "weights" else parent.last
    # The mask of the sparsest level, of whatever weights, fails where that level would.
    magnitude_mask(tree, level_sparsity(levels, fraction=fraction), leaves=leaves)
    return tree
