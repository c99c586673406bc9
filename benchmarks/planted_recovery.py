"""How often matching undoes a random permutation of Gaussian weights exactly: ours, and git-re-basin's loop.

  python -m benchmarks.planted_recovery

Every method gets 20 networks of each of six models, together with the same network with its units in random
order. The network counts as recovered if every leaf of the permuted network is that of the other bit for bit.
The table has the number of recovered networks and the medians of iterations, assignments and milliseconds
(warm). It takes a few minutes on two CPU cores.
"""

import contextlib
import itertools
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import rebasin
from benchmarks.architectures import CIFAR_SHAPE, Architecture, ResidualMLP, draw_network
from benchmarks.command import run
from benchmarks.methods import METHODS
from benchmarks.reports import build_reporter
from rebasin.errors import SpecError
from rebasin.models import MLP, VGG16, ResNet20, ViT

__all__ = ["PLANTED", "Outcome", "is_recovered", "plant", "recover"]

SEEDS = 20
HEADER = ("model", "method", "recovered", "iterations", "assignments", "ms")

# Models in which a planted permutation has to be found, whatever the seed. The MLPs have few inputs, so that
# little distinguishes their first units: that is where ascents from the identity get stuck.
PLANTED: Mapping[str, Architecture] = {
    "MLP 8-64×4-4": Architecture(MLP((64,) * 4, 4), (1, 1, 1, 8)),
    "residual MLP, 4 blocks": Architecture(ResidualMLP(4), (1, 8)),
    "residual MLP, 8 blocks": Architecture(ResidualMLP(8), (1, 8)),
    "ResNet-20 width 8": Architecture(ResNet20(8, 10), CIFAR_SHAPE),
    "VGG-16 width 8": Architecture(VGG16(8, 10), CIFAR_SHAPE),
    "ViT width 32": Architecture(ViT(32, 10, num_heads=4), (1, 8, 8, 1)),
}


class Outcome(NamedTuple):
    """One attempt to recover a network.

    Attributes:
      recovered: whether the network was recovered bit for bit.
      num_iterations: number of passes over the groups.
      num_assignments: number of linear assignments.
      milliseconds: time of the matching.
    """

    recovered: bool
    num_iterations: int
    num_assignments: int
    milliseconds: float


def plant(architecture: Architecture, seed: int) -> tuple[rebasin.PermutationSpec, Any, Any]:
    """Return a spec, a network, and the same network with its units in random order."""
    spec, shapes = architecture.trace()
    params = draw_network(shapes, seed)
    permutation = rebasin.random_permutation(spec, params, key=jax.random.key(seed))
    return spec, params, rebasin.permute(spec, permutation, params)


def is_recovered(
    spec: rebasin.PermutationSpec, params_a: Any, params_b: Any, permutation: Mapping[str, Any]
) -> bool:
    """Return whether a permutation of B gives A, every leaf bit for bit."""
    moved = jax.tree.leaves(rebasin.permute(spec, permutation, params_b))
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(params_a), moved, strict=True))


def recover(architecture: Architecture, method: str, seed: int) -> Outcome:
    """Plant a permutation and let a method look for it."""
    spec, a, b = plant(architecture, seed)
    began = time.perf_counter()
    permutation, iterations, assignments = METHODS[method](spec, a, b, key=jax.random.key(seed))
    milliseconds = 1000 * (time.perf_counter() - began)
    return Outcome(is_recovered(spec, a, b, permutation), iterations, assignments, milliseconds)


def _row(name: str, method: str, outcomes: list[Outcome]) -> tuple[str, ...]:
    """Return the cells of one row; `outcomes` is empty where the method cannot take the spec."""
    if not outcomes:
        return name, method, "no table", "", "", ""
    recovered = sum(outcome.recovered for outcome in outcomes)
    medians = np.median([outcome[1:] for outcome in outcomes], axis=0)
    return name, method, f"{recovered}/{len(outcomes)}", *(f"{value:.0f}" for value in medians)


def main() -> None:
    """Print a row for each model and method, with medians over the seeds."""
    reporter = build_reporter()
    rows = []
    with reporter.stage("models × methods × seeds", len(PLANTED) * len(METHODS) * SEEDS) as advance:
        for (name, architecture), method in itertools.product(PLANTED.items(), METHODS):
            outcomes = []
            for seed in range(SEEDS):
                with contextlib.suppress(SpecError):  # an inner group, which git-re-basin's table lacks
                    if seed == 0:
                        recover(architecture, method, seed)  # compiles
                    outcomes.append(recover(architecture, method, seed))
                advance()
            rows.append(_row(name, method, outcomes))
    reporter.say("")
    reporter.table(HEADER, rows)


if __name__ == "__main__":
    run(main)
