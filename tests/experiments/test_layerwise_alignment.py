"""Networks that are partly rewound: which leaves, the ends of each variant, numbers by hand, and claims."""

import csv
import dataclasses
import io
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import TINY, reporter

import rebasin
from experiments.harness.matched_epochs import LayerwiseRecord, RewoundEpoch, RewoundMatch
from experiments.harness.networks import run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.record import METRICS, FixedPoints, Metrics
from experiments.layerwise_alignment import (
    EXPERIMENT,
    VARIANTS,
    LayerwiseConfig,
    judge,
    rewind_layers,
    rewound,
)
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply
from rebasin.training.trajectory import Trajectory
from rebasin.trees import leaf_table

DIGITS = load_dataset("digits")
LAYERS = ["params/Dense_0/kernel", "params/Dense_1/kernel", "params/Dense_2/kernel"]


def small_config(**changes):
    fields = {
        "recipe": TINY,
        "replicates": 1,
        "seed": 0,
        "methods": ("weights",),
        "epochs": (1, 3),
        "partial": "networks",
        "num_alphas": 3,
        "num_eval": 200,
        "num_match": 100,
    }
    return LayerwiseConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run of each kind on the same networks, their folder, and what the first printed."""
    folder, text = tmp_path_factory.mktemp("layerwise"), io.StringIO()
    undrawn = dataclasses.replace(EXPERIMENT, figures={})
    results = {
        partial: experiment.run(
            small_config(partial=partial),
            DIGITS,
            output_dir=folder / partial,
            runs_dir=folder / "runs",
            reporter=reporter(text if partial == "networks" else None),
        )
        for partial, experiment in (("networks", EXPERIMENT), ("permutations", undrawn))
    }
    return results, folder, text.getvalue()


def names_rewound(model_name, layers):
    """The leaves of a model that are rewound with some layers, by path name."""
    model = build_model(model_name, width=2, num_classes=3)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    spec = rebasin.infer_spec(model.apply, shapes, image)
    end, early = (jax.tree.map(lambda x, v=v: np.full(x.shape, v), shapes) for v in (0, 1))
    mixed = leaf_table(rewind_layers(spec, end, early, layers))
    return {path.removeprefix("params/") for path, leaf in mixed.items() if np.all(leaf == 1)}, mixed


def test_layers_of_a_chain():
    def dense(i):
        return {f"Dense_{i}/{leaf}" for leaf in ("kernel", "bias")}

    assert names_rewound("mlp", {1})[0] == dense(0)
    assert names_rewound("mlp", {2})[0] == dense(1)
    # What follows the last hidden layer goes with it.
    assert names_rewound("mlp", {3})[0] == dense(2) | dense(3)


@pytest.mark.slow
def test_layers_of_a_residual_network():
    """The stream is the first layer; the kernels on both sides of a block's inner units go with these."""
    stem, _ = names_rewound("resnet20", {1})
    assert "conv1/kernel" in stem
    assert not any("conv" in name and "blocks" in name for name in stem)
    block, _ = names_rewound("resnet20", {3})
    kernels = {name for name in block if name.endswith("kernel")}
    assert kernels == {f"blockgroups_0/blocks_1/conv{i}/kernel" for i in (1, 2)}
    every, mixed = names_rewound("resnet20", set(range(1, 13)))
    assert len(every) == len(mixed)
    assert not names_rewound("resnet20", set())[0]


def test_each_variant_has_its_own_ends():
    everything = {1, 2, 3, 4}
    for variant, first, last in (
        ("bottom_up", set(), everything),
        ("top_down", everything, set()),
        ("put_in", set(), {4}),
        ("leave_out", everything, {1, 2, 3}),
    ):
        assert rewound(variant, 0, 4) == first
        assert rewound(variant, 4, 4) == last
    for k in range(5):
        assert rewound("bottom_up", k, 4) | rewound("top_down", k, 4) == everything
        assert rewound("put_in", k, 4) | rewound("leave_out", k, 4) == everything


@pytest.mark.parametrize("partial", ["networks", "permutations"])
def test_the_ends_are_the_permutations_of_whole_networks(finished, partial):
    record = finished[0][partial].records[0]
    p_end = record.end["weights"].aligned
    own = record.epochs[0].methods["weights"]
    assert own.alone.test_loss != p_end.test_loss
    v = own.variants
    assert {variant: len(series) for variant, series in v.items()} == dict.fromkeys(VARIANTS, 4)
    assert v["bottom_up"][0] == v["top_down"][3] == v["put_in"][0] == p_end
    assert v["bottom_up"][3] == v["top_down"][0] == v["leave_out"][0] == own.alone
    assert v["put_in"][1] == v["bottom_up"][1]
    assert v["put_in"][3] == v["top_down"][2]
    assert v["leave_out"][1] == v["top_down"][1]
    assert v["leave_out"][3] == v["bottom_up"][2]
    last = record.epochs[1].methods["weights"]
    assert {m for series in last.variants.values() for m in series} == {p_end}
    assert last.fixed_points.total == 1


def test_numbers_are_those_of_the_networks_on_disk(finished):
    results, folder, _ = finished
    a, b = (Trajectory(run_directory(folder / "runs", TINY, seed)) for seed in (0, 1))
    model = build_model("mlp", width=TINY.width, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    meter = PathMeter(classification_metrics(build_apply(model, DIGITS)), DIGITS, num_alphas=3, num_eval=200)

    def match(params_a, params_b):
        return rebasin.weight_matching(spec, params_a, params_b, key=jax.random.key(0)).permutation

    def hybrid(trajectory):  # the second layer is that of epoch 1
        params = dict(trajectory.last["params"], Dense_1=trajectory[1]["params"]["Dense_1"])
        return {"params": params}

    p_1, p_end = match(a[1], b[1]), match(a.last, b.last)
    found = {
        "networks": match(hybrid(a), hybrid(b)),
        "permutations": p_end | {"params/Dense_1/kernel": p_1["params/Dense_1/kernel"]},
    }
    for partial, permutation in found.items():
        curve = meter(a.last, rebasin.permute(spec, permutation, b.last))
        record = results[partial].records[0]
        for metric in METRICS:
            stored = getattr(record.epochs[0].methods["weights"].variants["put_in"][2], metric)
            assert stored == pytest.approx(curve.barrier(metric).value, abs=0.0051)
    agreement = record.epochs[0].methods["weights"].fixed_points
    points = rebasin.fixed_points(p_1, p_end)
    assert agreement.total == pytest.approx(points.total, abs=1e-6)
    assert list(agreement.groups) == list(record.layers) == LAYERS
    assert agreement.groups[LAYERS[0]] == pytest.approx(points.fractions[LAYERS[0]], abs=1e-6)
    identity = record.end["weights"].identity
    assert identity.total == pytest.approx(rebasin.fixed_points(p_end).total, abs=1e-6)


def test_csv_figures_and_table(finished):
    results, folder, text = finished
    with (folder / "networks/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * 4 * len(METRICS)
    keys = ("epoch", "variant", "k", "metric")
    found = {tuple(row[key] for key in keys): row for row in rows}
    own = results["networks"].records[0].epochs[0].methods["weights"]
    barrier = float(found["1", "leave_out", "2", "test_loss"]["barrier"])
    assert barrier == pytest.approx(own.variants["leave_out"][2].test_loss, rel=1e-5)
    for name in ("layerwise_loss.png", "layerwise_error.png", "fixed_points.png"):
        assert (folder / "networks" / name).stat().st_size > 10_000
    assert max(len(line) for line in text.splitlines() if not line.startswith(("/", "disk:"))) <= 80


def made_up(bottom_up, top_down, points, put_in):
    """A record of test error barriers at epochs 1 and 2, for two layers; at 3 all are .1."""

    def row(values):
        return tuple(Metrics(0.0, 0.0, 0.0, value) for value in values)

    def epoch(t, i):
        variants = {"bottom_up": bottom_up[i], "top_down": top_down, "put_in": put_in, "leave_out": put_in}
        fixed = FixedPoints(0.0, {"P0": points[0], "P1": points[1]})
        own = RewoundMatch(None, fixed, {name: row(values) for name, values in variants.items()})
        return RewoundEpoch(t, {"weights": own})

    end = RewoundMatch(
        None, FixedPoints(1.0, {"P0": 1.0, "P1": 1.0}), dict.fromkeys(VARIANTS, row([0.1] * 3))
    )
    parts = (epoch(1, 0), epoch(2, 1), RewoundEpoch(3, {"weights": end}))
    return LayerwiseRecord((0, 1), ("P0", "P1"), None, None, {}, parts)


def test_claims_follow_their_rules():
    config = SimpleNamespace(epochs=(1, 2, 3), methods=("weights",))
    # With one layer rewound P_end is reached at epoch 2, with both at epoch 3.
    good = [
        made_up([(0.1, 0.3 + x, 0.5), (0.1, 0.1, 0.4)], (0.4, 0.12, 0.1), (0.5 + x, 0.2), (0.1, 0.2, 0.3))
        for x in (0.0, 0.01, 0.02)
    ]
    claims = {claim.id: claim for claim in judge(config, good)}
    assert all(claim.holds for claim in claims.values())
    assert claims["between_end_and_early_weights"].measured == 1
    assert claims["lower_layers_have_more_fixed_points_weights"].measured == pytest.approx(0.31)
    assert claims["input_layers_matter_more_weights"].measured == pytest.approx(0.085)
    poor = [
        made_up([(0.1, 0.3, 0.1), (0.1, 0.3, 0.1)], (0.1, 0.4 + x, 0.1), (0.2, 0.2 + x), (0.1, 0.2, 0.3))
        for x in (0.0, 0.01, 0.02)
    ]
    assert not any(claim.holds for claim in judge(config, poor))


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(epochs=(3, 1), partial="halves")
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  epochs: wanted two or more ascending epochs from 0 on, got [3, 1]",
        "  partial: wanted one of networks, permutations, got 'halves'",
    ]
