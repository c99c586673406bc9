"""What an experiment costs, counted from its config: networks, epochs, sweeps, matchings, disk and hours."""

import dataclasses
import functools
import heapq
import math
import re
from collections.abc import Callable, Sequence
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np

from experiments.harness.experiment import Config
from experiments.harness.paths import network_shapes
from experiments.report.plans import Section
from rebasin.models import build_model
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import tree_bytes

__all__ = ["RATES", "Cost", "Rates", "count_costs", "makespan"]


class Rates(NamedTuple):
    """What one H200 did per second and call, measured with jax 0.11.2 at the width of the paper.

    An H100 has the same processor and slower memory; these rates stand for "one H100-class GPU".

    Attributes:
      images: training images per second (batch 128, one scan an epoch).
      path_images: images per second on a path, each at one alpha.
      match: seconds of a weight matching, warm.
    """

    images: float
    path_images: float
    match: float


# VGG-16 of width 64: 50,050 images/s in training, a sweep of 25 alphas and 20,000 images in 1.39 s, a
# matching in 1.27 s. ResNet-20 of width 64: 27,490 images/s, 3.79 s, 0.44 s. Of the MLP only the matching was
# measured, 0.30 s; its other rates are taken to be those of VGG-16, which has 450 times its products.
# Narrower networks are taken to be as slow as those of width 64. Both err on the side of more hours.
RATES = {
    "vgg16": Rates(50_050, 25 * 20_000 / 1.39, 1.27),
    "resnet20": Rates(27_490, 25 * 20_000 / 3.79, 0.44),
    "mlp": Rates(50_050, 25 * 20_000 / 1.39, 0.30),
}

# Seconds until a section has started and compiled its programs: first calls of initialisation, of an epoch
# and of a sweep took 5 + 9 + 9 s, and a matching 11 s.
_START_SECONDS = 35.0

# Algorithms that align several networks together or learn a permutation take several matchings; this many is
# a guess, as none of them was measured on an accelerator.
_JOINT_MATCHES = 10

# Training examples, test examples, shape of an image, classes.
_DATASETS = {
    "digits": (1_437, 360, (8, 8, 1), 10),
    "mnist": (60_000, 10_000, (28, 28, 1), 10),
    "cifar10": (50_000, 10_000, (32, 32, 3), 10),
    "cifar100": (50_000, 10_000, (32, 32, 3), 100),
    "svhn_cropped": (73_257, 26_032, (32, 32, 3), 10),
}

# Networks are stored with their momentum.
_STORED = 2


@dataclasses.dataclass(frozen=True)
class Cost:
    """What a section costs.

    Attributes:
      networks: networks that it trains, those of earlier sections left out.
      epochs: epochs of training, of all networks together.
      matches: calls of a matching method.
      points: networks that are evaluated on paths and grids, one for each alpha or point.
      gigabytes: disk space that the networks keep.
      hours: hours on one H100-class GPU; `None` for a model without measured rates.
      replicates: independent parts into which the section falls.
    """

    networks: int
    epochs: int
    matches: int
    points: int
    gigabytes: float
    hours: float | None
    replicates: int


@dataclasses.dataclass
class _Work:
    """What one replicate needs beside its parents: further networks, as numbers of epochs, and calls."""

    extra: list[int] = dataclasses.field(default_factory=list)
    matches: float = 0
    sweeps: float = 0
    grid_points: float = 0


def count_costs(sections: Sequence[Section], configs: Sequence[Config], keep: Sequence[str]) -> list[Cost]:
    """Return the cost of sections that run one after the other and share their networks.

    Args:
      sections: the sections.
      configs: the config of each.
      keep: what stays on disk of the networks of each, a name in `experiments.harness.networks.KEEP`.
    """
    there: set[tuple[Recipe, int]] = set()
    levels: set[tuple[Any, ...]] = set()
    costs = []
    for section, config, kept in zip(sections, configs, keep, strict=True):
        parents = {(pair.recipe, seed) for pair in config.pairs for seed in pair.seeds} - there
        if kept in ("all", "measured"):
            there |= parents
        costs.append(_cost(section.binary, config, parents, kept, levels))
    return costs


def makespan(costs: Sequence[Cost], devices: int) -> float:
    """Return the hours until all replicates of all sections are done on some devices, the longest first.

    Replicates are taken to be independent: two sections that share networks train them once each.

    Examples:
      >>> makespan([Cost(0, 0, 0, 0, 0.0, 6.0, 3), Cost(0, 0, 0, 0, 0.0, 1.0, 1)], devices=2)
      4.0
    """
    tasks = sorted((cost.hours or 0.0) / cost.replicates for cost in costs for _ in range(cost.replicates))
    loads = [0.0] * devices
    for hours in reversed(tasks):
        heapq.heapreplace(loads, loads[0] + hours)
    return max(loads)


def _cost(
    binary: str, config: Any, parents: set[tuple[Recipe, int]], kept: str, levels: set[tuple[Any, ...]]
) -> Cost:
    works = [(recipe, _COUNTERS[binary](config, recipe)) for recipe in _recipes(config)]
    epochs = sum(recipe.epochs for recipe, _ in parents)
    stored = sum(_stored_epochs(config, recipe, kept) * _bytes(recipe) for recipe, _ in parents)
    networks, matches, points, seconds = len(parents), 0.0, 0.0, 0.0
    for recipe, work in works:
        shared = _shared_levels(binary, config, recipe, levels) if kept == "all" else 0
        extra = work.extra * config.replicates
        further = sorted(extra)[shared:] if shared else extra
        networks += len(further)
        epochs += sum(further)
        stored += len(further) * _bytes(recipe) if kept != "none" else 0
        matches += work.matches * config.replicates
        points += (work.sweeps * config.num_alphas + work.grid_points) * config.replicates
    # MLPs of fewer hidden layers cost at most what that of three costs.
    rates = RATES.get(re.sub(r"^mlp_\d$", "mlp", config.recipe.model))
    hours = None
    if rates:
        train, test, _, _ = _dataset(config.recipe.dataset)
        chosen = getattr(config, "num_eval", None) or getattr(config, "num_test", None)
        evaluated = min(chosen or train, train) + min(chosen or test, test)
        images = epochs * min(config.recipe.num_train or train, train)
        activations = 2 * min(config.num_match or train, train) / rates.path_images
        seconds = images / rates.images + points * evaluated / rates.path_images
        hours = (seconds + matches * (rates.match + activations) + _START_SECONDS) / 3600
    return Cost(
        networks,
        epochs,
        math.ceil(matches),
        math.ceil(points),
        stored * _STORED / 1e9,
        hours,
        config.replicates,
    )


def _recipes(config: Any) -> list[Recipe]:
    """Return the recipe of each width or regime, once."""
    return list(dict.fromkeys(pair.recipe for pair in config.pairs))


def _stored_epochs(config: Any, recipe: Recipe, kept: str) -> int:
    return {
        "all": recipe.epochs + 1,
        "measured": len(set(config.wanted_epochs)),
        "ends": 2,
        "none": 0,
    }[kept]


def _dataset(name: str) -> tuple[int, int, tuple[int, ...], int]:
    """Return what `_DATASETS` has of a dataset, with shrunk images where its name ends as ``_7x7`` does."""
    shrunk = re.fullmatch(r"(.+)_(\d+)x\2", name)
    if shrunk is None:
        return _DATASETS[name]
    train, test, (_, _, channels), classes = _DATASETS[shrunk[1]]
    return train, test, (int(shrunk[2]), int(shrunk[2]), channels), classes


def _bytes(recipe: Recipe) -> int:
    """Return the size of a network's weights."""
    _, _, shape, classes = _dataset(recipe.dataset)
    return _model_bytes(recipe.model, recipe.width, shape, classes)


@functools.cache
def _model_bytes(model: str, width: int, shape: tuple[int, ...], classes: int) -> int:
    dataset: Any = SimpleNamespace(train=SimpleNamespace(inputs=np.empty((1, *shape))))
    return tree_bytes(network_shapes(build_model(model, width=width, num_classes=classes), dataset)[0])


def _shared_levels(binary: str, config: Any, recipe: Recipe, levels: set[tuple[Any, ...]]) -> int:
    """Return how many sparse networks an earlier section has trained already, and note those of this one."""
    if not hasattr(config, "levels"):
        return 0
    rewind = getattr(config, "rewind", "weights")
    seeds = [seed for pair in config.pairs if pair.recipe == recipe for seed in pair.seeds]
    wanted = {
        (recipe, seed, rewind, config.rewind_epoch, level)
        for seed in seeds
        for level in range(1, config.levels + 1)
    }
    found = len(wanted & levels)
    levels |= wanted
    return found


def _trajectories(config: Any, recipe: Recipe) -> _Work:
    times, sources, methods = len(config.epochs), len(config.match_epochs), len(config.methods)
    return _Work(matches=times * methods, sweeps=times * (1 + methods * (sources + 2)))


def _instability(config: Any, recipe: Recipe) -> _Work:
    methods, spawns = len(config.methods), config.epochs
    children = [recipe.epochs - epoch for epoch in spawns for _ in range(3)]
    return _Work(children, methods * (len(spawns) + 1), len(spawns) * (2 + 2 * methods) + 1 + methods)


def _sparse(config: Any, recipe: Recipe) -> _Work:
    methods, levels = len(config.methods), config.levels
    trained = [recipe.epochs - config.rewind_epoch] * (2 * levels)
    return _Work(trained, methods * (levels + 1), (levels + 1) * (3 + 4 * methods))


def _transport(config: Any, recipe: Recipe) -> _Work:
    methods, levels = len(config.methods), config.levels
    trained = [recipe.epochs - config.rewind_epoch] * (levels * (5 + 2 * methods))
    # Networks are measured by themselves, of which a path counts `num_alphas`.
    return _Work(trained, methods * (levels + 1), grid_points=(levels + 1) * (5 + 2 * methods))


def _transport_widths(config: Any, recipe: Recipe) -> _Work:
    methods, levels = len(config.methods), config.levels
    trained = [recipe.epochs - config.rewind_epoch] * (levels * (4 + methods))
    return _Work(trained, methods, grid_points=(levels + 1) * (2 + methods))


def _strong(config: Any, recipe: Recipe) -> _Work:
    methods, joint = len(config.methods), len(config.joint)
    return _Work([], 3 * methods + _JOINT_MATCHES * joint, 3 + 4 * methods + 3 * joint)


def _transitivity(config: Any, recipe: Recipe) -> _Work:
    methods, joint, k = len(config.methods), len(config.joint), config.num_networks
    pairs = k * (k - 1) // 2
    matches = methods * (pairs + k - 1) + _JOINT_MATCHES * (joint + k)
    simplex = 45  # points of a simplex of three networks with eight steps along an edge
    definitions = 1 + methods + joint
    sweeps = pairs * (definitions + 2 + methods * (1 + len(config.wanted_epochs)) + 2)
    return _Work([], matches, sweeps, definitions * (simplex + k))


def _magnitude(config: Any, recipe: Recipe) -> _Work:
    cases = len(config.epochs) * len(config.fractions) * 2 * len(config.methods)
    return _Work([], cases, cases + 1)


def _layerwise(config: Any, recipe: Recipe) -> _Work:
    groups = {"vgg16": 15, "resnet20": 13, "mlp": 3}.get(recipe.model, 10)
    cases = len(config.epochs) * 4 * groups * len(config.methods)
    return _Work([], cases, cases + 1)


def _stability(config: Any, recipe: Recipe) -> _Work:
    methods, times = len(config.methods), len(config.epochs)
    return _Work([recipe.epochs] * 2, methods, 1 + times * (1 + methods))


def _landscape(config: Any, recipe: Recipe) -> _Work:
    times, methods = len(config.epochs), len(config.methods)
    train, test, _, _ = _dataset(recipe.dataset)
    evaluated = min(config.num_eval or train, train) + min(config.num_eval or test, test)
    # Grids are measured on fewer examples, and for one replicate alone.
    share = config.num_grid / evaluated / _REPLICATES_OF_GRIDS
    grid = methods * times**2 * config.grid_size**2 * share
    return _Work([], methods * times, methods * times**2 + times, grid)


# The first replicate's grids are spread over the replicates that the paper has.
_REPLICATES_OF_GRIDS = 5


def _methods(config: Any, recipe: Recipe) -> _Work:
    methods = len(config.methods)
    return _Work([], _JOINT_MATCHES * methods, 2 * (1 + methods))


def _rates(config: Any, recipe: Recipe) -> _Work:
    return _Work([], 3, 4)


_COUNTERS: dict[str, Callable[[Any, Recipe], _Work]] = {
    "training_trajectories": _trajectories,
    "sgd_instability": _instability,
    "sparse_connectivity": _sparse,
    "mask_transport": _transport,
    "mask_transport_widths": _transport_widths,
    "strong_connectivity": _strong,
    "transitivity": _transitivity,
    "weight_magnitude": _magnitude,
    "layerwise_alignment": _layerwise,
    "stability_interventions": _stability,
    "loss_landscape": _landscape,
    "compare_methods": _methods,
    "learning_rates": _rates,
    "optimal_transport": _rates,
    "width_scaling": _rates,
}
