"""Widths needed and exponents by hand, the rules of the claims, and a run whose numbers are those on disk."""

import csv
import dataclasses
import io
import math

import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment
from small_experiment import reporter

from experiments.harness.networks import run_directory
from experiments.harness.record import Metrics
from experiments.harness.statistics import mean_onset
from experiments.harness.transport import NeededWidth, ScalingRecord
from experiments.width_scaling import EXPERIMENT, ScalingConfig, judge
from experiments.width_scaling_figures import bounds_of
from rebasin.bounds import width_bound
from rebasin.dimensions import effective_dimension
from rebasin.errors import ConfigError
from rebasin.training.data import load_dataset, normalise
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
RECIPE = build_recipe(
    "optimal_transport", dataset="digits", model="mlp_1", width=4, epochs=1, batch_size=32, num_train=200
)


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 2,
        "seed": 0,
        "num_alphas": 3,
        "num_match": None,
        "widths": (4, 16, 64),
        "sides": (2, 4, 8),
        "depths": (1, 2),
        "channels": 1,
        "tolerances": (0.3, 0.1),
        "num_eval": 60,
    }
    return ScalingConfig(**(fields | changes))


def made_up(config, barrier):
    """Records whose test loss barrier is ``barrier(inputs, depth, width, replicate)``."""

    def record(pair):
        inputs, depth, width = config.place(pair)
        loss = barrier(inputs, depth, width, pair.seeds[0] // 2)
        metrics = Metrics(loss, loss, loss, loss)
        return ScalingRecord(pair.seeds, inputs, depth, width, metrics, metrics, (0.5,), (2.0,))

    return [record(pair) for pair in config.pairs]


# So close together that onsets are exact to a few percent.
WIDTHS = tuple(sorted({round(w) for w in np.geomspace(2, 6000, 80)}))


def law(inputs, depth, width, replicate):
    """A barrier of ε at a width of 3 (1 + r/10) d^0.4 2^(depth − 1) ε^-0.8."""
    return (3 * (1 + replicate / 10) * inputs**0.4 * 2 ** (depth - 1) / width) ** (1 / 0.8)


def test_pairs_are_of_all_images_depths_and_widths():
    config = small_config()
    places = [config.place(pair) for pair in config.pairs]
    kinds = [(4, 1), (16, 1), (64, 1), (64, 2)]
    assert places == [(*kind, w) for kind in kinds for w in (4, 16, 64) for _ in range(2)]
    names = {(config.place(pair)[:2]): (pair.recipe.dataset, pair.recipe.model) for pair in config.pairs}
    assert names == {
        (4, 1): ("digits_2x2", "mlp_1"),
        (16, 1): ("digits_4x4", "mlp_1"),
        (64, 1): ("digits", "mlp_1"),
        (64, 2): ("digits", "mlp_2"),
    }


def test_exponents_and_growth_are_those_of_a_law():
    config = small_config(widths=WIDTHS)
    records = made_up(config, law)
    summary = EXPERIMENT.summarise(config, records)
    assert summary.exponents.dimension.mean == pytest.approx(0.4, abs=0.02)
    assert summary.exponents.tolerance.mean == pytest.approx(0.8, abs=0.02)
    needed = {(n.inputs, n.depth, n.tolerance): n for n in summary.needed}
    width = 3 * 16**0.4 * 0.1**-0.8
    assert needed[16, 1, 0.1].onset.replicates == pytest.approx([width, 1.1 * width], rel=0.03)
    claims = {claim.id: claim for claim in judge(config, records)}
    assert claims["depth_multiplies_the_width"].measured == pytest.approx(2, rel=0.02)
    assert all(claim.holds for claim in claims.values())


def test_claims_fail_where_more_width_is_needed_than_stated():
    config = small_config(widths=WIDTHS, tolerances=(0.4, 0.2))

    def steep(inputs, depth, width, replicate):
        """A barrier of ε at a width of d ε^-1.5, or 10 times as wide at a depth of 2."""
        return ((1 + replicate / 100) * inputs * 10 ** (depth - 1) / width) ** (1 / 1.5)

    holds = {claim.id: claim.holds for claim in judge(config, made_up(config, steep))}
    assert holds == {
        "wide_two_layer_networks_connect": True,
        "width_grows_no_faster_with_dimension": False,
        "width_grows_no_faster_with_tolerance": False,
        "depth_multiplies_the_width": True,
    }
    never = {claim.id: claim.holds for claim in judge(config, made_up(config, lambda *_: 1.0))}
    assert never == {"wide_two_layer_networks_connect": False, "depth_multiplies_the_width": False}


def test_bounds_are_those_where_networks_begin_to_be_connected():
    onset = mean_onset((8, 16), [[0.5, 0.1]], 0.3)
    needed = NeededWidth(inputs=9, depth=2, tolerance=0.3, onset=onset, distance=0.5, dimension=2.7)
    found = bounds_of(needed)
    assert found.isotropic == width_bound(9, epsilon=0.5, depth=2)
    assert found.low == width_bound(9, epsilon=0.5, depth=2, low=3)
    assert bounds_of(dataclasses.replace(needed, distance=math.nan)) is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sides": (8, 4)}, r"sides: wanted ascending numbers from 1 on, got \[8, 4\]"),
        ({"widths": ()}, r"widths: wanted ascending numbers from 1 on, got \[\]"),
        ({"depths": (2, 3)}, r"depths: wanted 1 and then some of 2, 3, got \[2, 3\]"),
        ({"tolerances": (0.1, 0.2)}, r"tolerances: wanted descending numbers, got \[0.1, 0.2\]"),
        ({"tolerances": (0.0,)}, r"tolerances: wanted numbers above 0, got \[0.0\]"),
        ({"recipe": dataclasses.replace(RECIPE, model="vit")}, "model: wanted mlp, got 'vit'"),
    ],
)
def test_messages(changes, message):
    with pytest.raises(ConfigError, match=message):
        small_config(**changes)


def test_images_of_another_size_are_refused_before_training(tmp_path):
    config = small_config(sides=(2, 4), depths=(1,), widths=(4,))
    with pytest.raises(
        ConfigError, match="sides: wanted that of the images of digits last, of 64 inputs, got 4"
    ):
        EXPERIMENT.run(
            config, DIGITS, output_dir=tmp_path / "out", runs_dir=tmp_path / "runs", reporter=reporter()
        )
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_numbers_are_those_of_the_networks_on_disk(tmp_path):
    config, text = small_config(sides=(4, 8), widths=(4, 8)), io.StringIO()
    folders = {"output_dir": tmp_path / "out", "runs_dir": tmp_path / "runs"}
    results = EXPERIMENT.run(config, DIGITS, **folders, reporter=reporter(text))
    assert [(r.inputs, r.depth, r.width) for r in results.records] == [config.place(p) for p in config.pairs]
    record, pair = results.records[-1], config.pairs[-1]
    a, b = (Trajectory(run_directory(tmp_path / "runs", pair.recipe, seed)).last for seed in pair.seeds)
    (w, c), (v, _), (other, _) = (
        [np.asarray(tree["params"][name][leaf], float) for leaf in ("kernel", "bias")]
        for tree, name in ((a, "Dense_0"), (a, "Dense_1"), (b, "Dense_0"))
    )
    images = np.asarray(normalise(DIGITS.train.inputs, DIGITS.mean, DIGITS.std), float).reshape(1437, -1)
    done = images @ w
    deeper = np.maximum(done + c, 0) @ v
    assert record.dimensions == pytest.approx(
        [effective_dimension(y.T @ y) for y in (done, deeper)], rel=1e-4
    )
    costs = ((done[:, :, None] - (images @ other)[:, None]) ** 2).mean(axis=0)
    best = costs[linear_sum_assignment(costs)].mean()
    assert record.distances[0] == pytest.approx(math.sqrt(best / (done**2).mean()), rel=1e-4)
    assert len(record.distances) == 2
    assert record.aligned.test_loss <= record.unaligned.test_loss + 0.2
    with (tmp_path / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(results.records) * 4
    for name in EXPERIMENT.figures:
        assert (tmp_path / "out" / name).stat().st_size > 10_000
    lines = [line for line in text.getvalue().splitlines() if not line.startswith(("/", "disk:"))]
    assert [line for line in lines if len(line) > 80] == []
