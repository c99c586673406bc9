"""The memory and the disk space that the networks of an experiment take, against what is there."""

import contextlib
import pathlib
from collections.abc import Sequence

from experiments.harness.networks import CHILDREN, Networks, Pair, holds_epochs, run_directory
from experiments.harness.paths import network_shapes
from rebasin.models import build_model
from rebasin.training.resources import check_disk, check_memory, format_bytes
from rebasin.training.trajectory import tree_bytes

__all__ = ["check_resources"]


def check_resources(
    networks: Networks,
    pairs: Sequence[Pair],
    epochs: Sequence[int],
    spawned: Sequence[int] = (),
    further: int = 0,
) -> None:
    """Say how much disk space the networks that are still to be trained take at most.

    Args:
      networks: finds and trains the networks.
      pairs: pairs that are not measured yet, of one number of epochs; models and widths may differ.
      epochs: epochs that are wanted of each parent.
      spawned: epochs at which `CHILDREN` leave each pair.
      further: number of other networks of each pair whose last epoch is stored.

    Raises:
      ConfigError: the networks are too large for the memory or the disk.
    """
    if not pairs:
        return
    new = {p: sum(not _is_there(networks, p, seed, epochs) for seed in p.seeds) for p in pairs}
    if not any(new.values()) and not spawned and not further:
        networks.reporter.say(f"networks: all found in {networks.runs_dir}")
        return
    kinds = sorted({(pair.recipe.width, pair.recipe.model) for pair in pairs})
    size, count, needed = 0, 0, 0
    for width, name in kinds:
        own = [pair for pair in pairs if (pair.recipe.width, pair.recipe.model) == (width, name)]
        model = build_model(name, width=width, num_classes=networks.dataset.num_classes)
        # Where images are shrunk for some pairs, those of the run are the largest.
        size = max(size, tree_bytes(network_shapes(model, networks.dataset)[0]))
        check_memory(size, f"a network ({name}) of width {width}")
        missing = [new[pair] for pair in own]
        stored = _count_stored(networks.keep, own[0].recipe.epochs, missing, epochs, spawned)
        # With keep="none" they go once their pair is measured; one more is stored for resuming.
        stored += further * (1 if networks.keep == "none" else len(missing)) + (1 if further else 0)
        count, needed = count + stored, needed + stored * size
    where = networks.runs_dir if networks.shares_parents else networks.scratch
    bases = {run_directory(where, pair.recipe, pair.seeds[0]).parent for pair in pairs}
    if count:
        check_disk(needed // count, count, where, "the networks", stored=sum(map(_disk_use, bases)))
    # A stored epoch has its momentum beside it.
    each = "up to " * (len(kinds) > 1) + format_bytes(2 * size)
    networks.reporter.say(
        f"disk: at most {format_bytes(2 * needed)} for networks in {where}, {each} an epoch "
        f"(keeping {networks.keep})"
    )


def _is_there(networks: Networks, pair: Pair, seed: int, epochs: Sequence[int]) -> bool:
    return holds_epochs(run_directory(networks.runs_dir, pair.recipe, seed), epochs)


def _count_stored(
    keep: str, last: int, new: Sequence[int], epochs: Sequence[int], spawned: Sequence[int]
) -> int:
    """Count the epochs that are on disk at most; `new` says how many parents of each pair are trained."""
    families = len(CHILDREN) * len(new)
    if keep == "all":
        return sum(new) * (last + 1) + families * sum(last - epoch + 1 for epoch in spawned)
    # While a run goes on, the epoch at which it would resume is stored too.
    working = max(new) * (len(set(epochs)) + 1)
    ends = len(set(epochs)) if keep == "measured" else min(2, len(set(epochs)))
    staying = ends * sum(new) + families * len(spawned) if keep != "none" else 0
    return working + staying + (2 if spawned else 0)


def _disk_use(folder: pathlib.Path) -> int:
    """Return the size of all files below a folder, in bytes; 0 for one that is not there."""
    total = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(OSError):  # deleted by another process meanwhile
            total += path.stat().st_size if path.is_file() else 0
    return total
