"""Every matching method on pairs of trained digits networks, and several of them merged into one.

python -m benchmarks.digits_methods
"""

import functools
import itertools
import tempfile
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np

import rebasin
from experiments.harness.presets import PRESETS
from experiments.harness.statistics import student_interval
from rebasin.models import build_model
from rebasin.training.data import Split, load_dataset
from rebasin.training.loop import build_metrics, train

NETWORKS = 15  # seven pairs; three disjoint sets of each size
SETS = 3
KEY = jax.random.key(0)


class Setting(NamedTuple):
    """Trained networks and what measures them."""

    spec: rebasin.PermutationSpec
    trees: list[Any]
    metrics_fn: Callable[[Any, Any], dict[str, jax.Array]]
    train: Split
    test: Split


def main() -> None:
    """Prints a table of pairs and a table of sets."""
    setting = build_setting()
    print_pairs(setting)
    print_sets(setting)


def build_setting() -> Setting:
    """Trains the networks of the digits preset, seeds 0 and up."""
    dataset = load_dataset("digits")
    recipe = PRESETS["digits"]["mlp"].build_recipe("trajectory")
    trees = []
    for seed in range(NETWORKS):
        with tempfile.TemporaryDirectory() as folder:
            trees.append(train(recipe, dataset, seed=seed, directory=f"{folder}/run").last)
    model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
    image = jax.ShapeDtypeStruct((1, *dataset.train.images.shape[1:]), np.float32)
    spec = rebasin.infer_spec(model.apply, trees[0], image)
    metrics_fn = build_metrics(model, dataset.mean, dataset.std)
    return Setting(spec, trees, metrics_fn, *jax.device_put((dataset.train, dataset.test)))


def print_pairs(setting: Setting) -> None:
    """Barriers, mean over independent pairs ± half of the 95 % interval, errors in percent."""

    def loss_fn(params: Any, batch: Any) -> jax.Array:
        return setting.metrics_fn(params, batch)["loss"]

    learned = {"loss_fn": loss_fn, "data": setting.train, "key": KEY}
    rows: dict[str, tuple[str, dict[str, Any]] | None] = {
        "unaligned": None,
        "weights": ("weights", {"key": KEY}),
        "frank_wolfe": ("frank_wolfe", {}),
        "frank_wolfe, start=identity": ("frank_wolfe", {"start": "identity"}),
        "straight_through": ("straight_through", learned),
        "sinkhorn": ("sinkhorn", learned),
        "sinkhorn, start=uniform": ("sinkhorn", {**learned, "start": "uniform"}),
        "sinkhorn, random, start=uniform": ("sinkhorn", {**learned, "start": "uniform", "loss": "random"}),
        "sinkhorn, l2, start=uniform": ("sinkhorn", {"key": KEY, "start": "uniform", "loss": "l2"}),
    }
    sweep = rebasin.build_sweep(setting.metrics_fn)
    print(
        f"{'method':>32} {'train error':>13} {'test error':>13} {'train loss':>17} {'⟨A,P[B]⟩':>9} {'s':>5}"
    )
    for title, row in rows.items():
        values = []
        for a, b in zip(setting.trees[::2], setting.trees[1::2], strict=False):
            began = time.perf_counter()
            if row is not None:
                name, options = row
                match = rebasin.match(setting.spec, a, b, name, **options)
                b = rebasin.permute(setting.spec, match.permutation, b)
            seconds = time.perf_counter() - began
            train_curve, test_curve = sweep(a, b, setting.train), sweep(a, b, setting.test)
            errors = (100 * curve.error_barrier.value for curve in (train_curve, test_curve))
            values.append((*errors, train_curve.loss_barrier.value, inner_product(a, b), seconds))
        train_error, test_error, train_loss, inner, seconds = map(np.array, zip(*values, strict=True))
        barriers = f"{spread(train_error, 2):>13} {spread(test_error, 2):>13} {spread(train_loss, 4):>17}"
        print(f"{title:>32} {barriers} {inner.mean():9.1f} {np.median(seconds):5.1f}", flush=True)


def print_sets(setting: Setting) -> None:
    """Merged networks of three to five: means over the sets, with their accuracy in percent."""
    weights = functools.partial(rebasin.weight_matching, key=KEY)
    ways: dict[str, Callable[[Any, Any], rebasin.UniverseResult]] = {
        "weights to a reference": functools.partial(rebasin.match_to_reference, matcher=weights),
        "merge_many": functools.partial(rebasin.merge_many, key=KEY),
        "universe_matching": rebasin.universe_matching,
    }
    measure = rebasin.build_simplex_sweep(setting.metrics_fn, resolution=1)
    print(
        f"\n{'networks':>8} {'method':>24} {'cycle error':>11} {'Σ⟨P_i[θ_i],P_j[θ_j]⟩':>20} "
        f"{'merged train':>12} {'merged test':>11} {'their mean':>10} {'s':>5}"
    )
    for count in (3, 4, 5):
        sets = [setting.trees[i * count : (i + 1) * count] for i in range(SETS)]
        pairs = list(itertools.permutations(range(count), 2))
        errors = [
            rebasin.cycle_error(
                setting.spec,
                {(i, j): weights(setting.spec, trees[i], trees[j]).permutation for i, j in pairs},
            )
            for trees in sets
        ]
        print(f"{count:8} {'weights of each pair':>24} {np.mean(errors):11.3f}")
        for title, way in ways.items():
            rows = []
            for trees in sets:
                result = way(setting.spec, trees)
                pairwise = {(i, j): result.pairwise(setting.spec, i, j) for i, j in pairs}
                aligned = result.align(setting.spec, trees)
                accuracies = [1 - measure(aligned, split).means["error"] for split in setting[3:]]
                rows.append(
                    (
                        rebasin.cycle_error(setting.spec, pairwise),
                        result.objective[-1],
                        *(100 * accuracy[-1] for accuracy in accuracies),
                        100 * accuracies[1][:-1].mean(),
                        result.stats["seconds"],
                    )
                )
            cycle, objective, train, test, alone, seconds = np.mean(rows, axis=0)
            print(
                f"{count:8} {title:>24} {cycle:11.3f} {objective:20.1f} {train:12.2f} {test:11.2f} "
                f"{alone:10.2f} {seconds:5.1f}",
                flush=True,
            )


def inner_product(a: Any, b: Any) -> float:
    """⟨A, B⟩ over all leaves, in float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return sum(float(np.sum(np.asarray(x, np.float64) * np.asarray(y))) for x, y in pairs)


def spread(values: np.ndarray, digits: int) -> str:
    """Mean ± half of the 95 % interval."""
    interval = student_interval(values)
    return f"{interval.mean:.{digits}f} ± {interval.high - interval.mean:.{digits}f}"


if __name__ == "__main__":
    main()
