"""Every matching method on pairs of trained digits networks, and several of them merged into one.

  python -m benchmarks.digits_methods

The first table has, for each method, barriers of error (in percent) and loss between the two networks of a
pair, as the mean over seven independent pairs ± half of the 95 % interval, the mean of ⟨A, P[B]⟩ and the
median of the seconds. The second table is about three to five networks that are brought into one order and
averaged: means over three disjoint sets, with accuracies in percent. The fifteen networks are trained first;
everything together takes several minutes on two CPU cores.
"""

import functools
import itertools
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import rebasin
from benchmarks.command import run
from benchmarks.problems import find_recipe, train_network
from benchmarks.reports import Reporter, build_reporter, mean_and_interval
from rebasin.arithmetic import inner_product
from rebasin.matching.many import UniverseResult, cycle_error, match_to_reference
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply

NETWORKS = 15  # seven pairs; three disjoint sets of each size
SETS = 3
KEY = jax.random.key(0)


_PAIR_HEADER = ("method", "train error", "test error", "train loss", "⟨A,P[B]⟩", "s")
_SET_HEADER = (
    "\nnetworks",
    "\nmethod",
    "cycle\nerror",
    "\nΣ⟨P_i[θ_i],P_j[θ_j]⟩",
    "merged\ntrain",
    "merged\ntest",
    "their\nmean",
    "\ns",
)


class Setting(NamedTuple):
    """Trained networks and what measures them.

    Attributes:
      spec: the symmetries.
      trees: the networks, by seed.
      metrics_fn: loss and error of each example.
      train: the training examples.
      test: the test examples.
    """

    spec: rebasin.PermutationSpec
    trees: list[Any]
    metrics_fn: Callable[..., Mapping[str, jax.Array]]
    train: rebasin.Batch
    test: rebasin.Batch


def build_setting() -> Setting:
    """Train the networks of the digits preset, seeds 0 and up."""
    dataset = load_dataset("digits")
    recipe = find_recipe("digits", "mlp")
    with tempfile.TemporaryDirectory() as folder:
        trees = [
            train_network(recipe, dataset, seed, pathlib.Path(folder), keep=()).last
            for seed in range(NETWORKS)
        ]
    model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
    image = jax.ShapeDtypeStruct((1, *dataset.train.inputs.shape[1:]), np.float32)
    spec = rebasin.infer_spec(model.apply, trees[0], image)
    metrics_fn = rebasin.classification_metrics(build_apply(model, dataset))
    return Setting(spec, trees, metrics_fn, *jax.device_put((dataset.train, dataset.test)))


def _pair_methods(setting: Setting) -> dict[str, Callable[[Any, Any], rebasin.MatchResult] | None]:
    """Return the rows of the table of pairs: a method with its options, or `None` for no matching."""

    def method(name: str, **options: Any) -> Callable[[Any, Any], rebasin.MatchResult]:
        return lambda params_a, params_b: rebasin.match(setting.spec, params_a, params_b, name, **options)

    learned = {"metrics_fn": setting.metrics_fn, "data": setting.train, "key": KEY}
    return {
        "unaligned": None,
        "weights": method("weights", key=KEY),
        "frank_wolfe": method("frank_wolfe"),
        "frank_wolfe, start=identity": method("frank_wolfe", start="identity"),
        "straight_through": method("straight_through", **learned),
        "sinkhorn": method("sinkhorn", **learned),
        "sinkhorn, start=uniform": method("sinkhorn", start="uniform", **learned),
        "sinkhorn, random, start=uniform": method("sinkhorn", start="uniform", loss="random", **learned),
        "sinkhorn, l2, start=uniform": method("sinkhorn", start="uniform", loss="l2", key=KEY),
    }


def report_pairs(setting: Setting, reporter: Reporter) -> None:
    """Match all pairs by all methods and print a row for each method."""
    sweep = rebasin.build_sweep(setting.metrics_fn)
    pairs = list(zip(setting.trees[::2], setting.trees[1::2], strict=False))
    rows = []
    for title, method in _pair_methods(setting).items():
        values = []
        for a, b in pairs:
            began = time.perf_counter()
            if method is not None:
                b = rebasin.permute(setting.spec, method(a, b).permutation, b)
            seconds = time.perf_counter() - began
            train, test = sweep(a, b, setting.train), sweep(a, b, setting.test)
            errors = (100 * curve.error_barrier.value for curve in (train, test))
            values.append((*errors, train.loss_barrier.value, inner_product(a, b), seconds))
        train_error, test_error, train_loss, inner, seconds = map(np.array, zip(*values, strict=True))
        barriers = [mean_and_interval(train_error, 2), mean_and_interval(test_error, 2)]
        barriers.append(mean_and_interval(train_loss, 4))
        rows.append((title, *barriers, f"{inner.mean():.1f}", f"{np.median(seconds):.1f}"))
        reporter.say(f"{title}: done")
    reporter.table(_PAIR_HEADER, rows)


class _Merged(NamedTuple):
    """What is measured of several networks in one order.

    Attributes:
      cycle_error: share of units that the way around a triangle of networks does not map to themselves.
      objective: sum of ⟨P_i[θ_i], P_j[θ_j]⟩ over pairs.
      train: training accuracy of the average, in percent.
      test: test accuracy of the average, in percent.
      alone: mean test accuracy of the networks, in percent.
      seconds: time of the matching.
    """

    cycle_error: float
    objective: float
    train: float
    test: float
    alone: float
    seconds: float


def report_sets(setting: Setting, reporter: Reporter) -> None:
    """Merge sets of three to five networks and print a row for each size and method."""
    weights = functools.partial(rebasin.weight_matching, key=KEY)
    ways: dict[str, Callable[[Any, Any], UniverseResult]] = {
        "weights to a reference": functools.partial(match_to_reference, key=KEY),
        "merge_many": functools.partial(rebasin.merge_many, key=KEY),
        "universe_matching": rebasin.universe_matching,
    }
    measure = rebasin.build_simplex_sweep(setting.metrics_fn, resolution=1)

    def merge(way: Callable[[Any, Any], UniverseResult], trees: list[Any]) -> _Merged:
        result = way(setting.spec, trees)
        pairs = itertools.permutations(range(len(trees)), 2)
        pairwise = {(i, j): result.pairwise(setting.spec, i, j) for i, j in pairs}
        aligned = result.align(setting.spec, trees)
        train, test = (
            100 * (1 - measure(aligned, split).means["error"]) for split in (setting.train, setting.test)
        )
        cycle = cycle_error(setting.spec, pairwise)
        seconds = result.stats["seconds"]
        return _Merged(cycle, result.objective[-1], train[-1], test[-1], test[:-1].mean(), seconds)

    rows = []
    for count in (3, 4, 5):
        sets = [setting.trees[i * count : (i + 1) * count] for i in range(SETS)]
        errors = [cycle_error(setting.spec, _match_all(setting.spec, trees, weights)) for trees in sets]
        rows.append((str(count), "weights of each pair", f"{np.mean(errors):.3f}", "", "", "", "", ""))
        for title, way in ways.items():
            mean = _Merged(*np.mean([merge(way, trees) for trees in sets], axis=0))
            accuracies = [f"{value:.2f}" for value in (mean.train, mean.test, mean.alone)]
            quality = (f"{mean.cycle_error:.3f}", f"{mean.objective:.1f}", *accuracies)
            rows.append((str(count), title, *quality, f"{mean.seconds:.1f}"))
            reporter.say(f"{count} networks, {title}: done")
    reporter.table(_SET_HEADER, rows)


def _match_all(
    spec: rebasin.PermutationSpec, trees: list[Any], matcher: Callable[..., rebasin.MatchResult]
) -> dict[tuple[int, int], Any]:
    """Match every ordered pair of networks by itself."""
    pairs = itertools.permutations(range(len(trees)), 2)
    return {(i, j): matcher(spec, trees[i], trees[j]).permutation for i, j in pairs}


def main() -> None:
    """Print a table of pairs and a table of sets."""
    reporter = build_reporter()
    setting = build_setting()
    report_pairs(setting, reporter)
    reporter.say("")
    report_sets(setting, reporter)


if __name__ == "__main__":
    run(main)
