"""Definitions of connectivity on several networks: matrices by hand, resuming, what is counted, claims."""

import csv
import dataclasses
import io
import itertools
import math

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments import transitivity as binary
from experiments.harness.connectivity import DefinitionRecord, NetworksRecord
from experiments.harness.networks import run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.record import METRICS, Metrics
from experiments.transitivity import EXPERIMENT, TransitivityConfig, judge
from rebasin.barrier import classification_metrics
from rebasin.connectivity import entezari_barriers, strong_barriers, weak_barriers
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply
from rebasin.training.recipes import build_recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
RECIPE = build_recipe(
    "trajectory",
    dataset="digits",
    model="mlp",
    width=12,
    epochs=2,
    batch_size=32,
    num_train=400,
    warmup_epochs=1,
)
NETWORKS = 3
PAIRS = list(itertools.combinations(range(NETWORKS), 2))


def small_config(**changes):
    fields = {
        "recipe": RECIPE,
        "replicates": 1,
        "seed": 0,
        "methods": ("weights",),
        "widths": (12,),
        "joint": ("merge_many",),
        "joint_steps": 1,
        "connected_at_most": 0.02,
        "loss_at_most": 0.1,
        "num_alphas": 5,
        "num_eval": 200,
        "num_match": 100,
        "num_networks": NETWORKS,
    }
    return TransitivityConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("transitivity"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


@pytest.fixture(scope="module")
def by_hand(finished):
    """The networks on disk and the library's matrices of them, with permutations found anew."""
    trees = [Trajectory(run_directory(finished[1] / "runs", RECIPE, seed)).last for seed in range(NETWORKS)]
    model = build_model("mlp", width=12, num_classes=10)
    spec = rebasin.infer_spec(model.apply, trees[0], np.zeros((1, 8, 8, 1), np.float32))
    apply_fn = build_apply(model, DIGITS)
    meter = PathMeter(classification_metrics(apply_fn), DIGITS, num_alphas=5, num_eval=200, apply_fn=apply_fn)
    key = jax.random.key(0)

    def match(x, y):
        return rebasin.weight_matching(spec, x, y, key=key).permutation

    identity = rebasin.identity_permutation(spec, trees[0])
    pairwise = {(i, j): match(trees[i], trees[j]) for i, j in PAIRS}
    strong = {
        "unaligned": [identity] * NETWORKS,
        "reference weights": [identity, *(match(trees[0], tree) for tree in trees[1:])],
        "merge_many": rebasin.merge_many(spec, trees, key=key).permutations,
    }
    towards_all = [
        match(rebasin.average([t for j, t in enumerate(trees) if j != i]), trees[i]) for i in range(NETWORKS)
    ]
    return (
        trees,
        spec,
        {
            "weak weights": weak_barriers(spec, trees, pairwise, meter),
            "entezari": entezari_barriers(spec, trees, towards_all, meter),
            **{name: strong_barriers(spec, trees, found, meter) for name, found in strong.items()},
        },
        strong["merge_many"],
        apply_fn,
    )


def test_matrices_are_those_by_hand(finished, by_hand):
    (record,) = finished[0].records
    for name, matrices in by_hand[2].items():
        cells = itertools.product(range(NETWORKS), repeat=2) if name == "entezari" else PAIRS
        stored = record.definitions[name].cells
        for (i, j), cell in zip(cells, stored, strict=True):
            for metric in METRICS:
                # An example between two classes may change sides where sums are ordered otherwise.
                expected = pytest.approx(matrices[metric][i, j], abs=0.0051)
                assert getattr(cell, metric) == expected, (name, i, j, metric)


def test_simultaneous_is_the_worst_over_training(finished):
    """So it is never below the barrier at the end, which is the weak one."""
    (record,) = finished[0].records
    weak, whole = (record.definitions[f"{name} weights"].cells for name in ("weak", "simultaneous"))
    for at_end, worst in zip(weak, whole, strict=True):
        for metric in METRICS:
            assert getattr(worst, metric) >= getattr(at_end, metric) - 1e-6


def test_averages_and_simplex_are_plain_evaluations(finished, by_hand):
    trees, spec, _, permutations, apply_fn = by_hand
    moved = [rebasin.permute(spec, p, tree) for p, tree in zip(permutations, trees, strict=True)]
    images, labels = DIGITS.test.inputs[:200], DIGITS.test.labels[:200]

    def error(params):
        return float(np.mean(np.argmax(apply_fn(params, images), -1) != labels))

    (record,) = finished[0].records
    found = record.definitions["merge_many"]
    for count, average in enumerate(found.averages, 1):
        expected = error(rebasin.average(moved[:count]))
        assert average.test_error == pytest.approx(expected, abs=0.0051)
    corners = {weights.index(1): at for at, weights in enumerate(found.simplex.weights) if 1 in weights}
    assert sorted(corners) == [0, 1, 2]
    for corner, at in corners.items():
        assert found.simplex.error[at] == pytest.approx(error(moved[corner]), abs=0.0051)
    assert found.cycle_error is None
    assert 0 <= record.definitions["weak weights"].cycle_error <= 1


@pytest.mark.slow
def test_a_run_killed_at_a_definition_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    folders = {"output_dir": tmp_path / "out", "runs_dir": finished[1] / "runs"}
    measured, measure = [], binary.strong_barriers

    def killed(*arguments):
        measured.append(arguments)
        if len(measured) == 3:
            raise KeyboardInterrupt
        return measure(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(binary, "strong_barriers", killed)
        with pytest.raises(KeyboardInterrupt):
            EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter())
    (begun,) = EXPERIMENT.load(tmp_path / "out/results.json").records
    assert list(begun.definitions) == ["unaligned", "tempered", "weak weights", "simultaneous weights"]
    resumed = EXPERIMENT.run(small_config(), DIGITS, **folders, resume=True, reporter=reporter())
    assert resumed.records == finished[0].records


def test_results_csv_and_tables(finished):
    results, folder, text = finished
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("width", "seed", "definition", "what", "metric")
    found = {tuple(row[key] for key in keys): float(row["value"]) for row in rows}
    symmetric, strong = 6, 3
    barriers = symmetric * len(PAIRS) + NETWORKS**2
    assert len(found) == len(rows) == (barriers + strong * NETWORKS) * len(METRICS) + 1
    cell = results.records[0].definitions["merge_many"].cells[1]
    assert found["12", "0", "merge_many", "barrier 0 2", "test_loss"] == pytest.approx(
        cell.test_loss, rel=1e-5
    )
    for name in EXPERIMENT.figures:
        assert (folder / "out" / name).stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:", "networks:"))]
    assert max(map(len, lines)) <= 80
    for word in ("1 set of 3 networks", "width 12", "chains", "all joined"):
        assert word in text
    assert "…" not in text


def made_up(seed, weak, joint, averages):
    """A record of test errors alone, all pairs in order."""

    def metrics(value):
        return Metrics(math.nan, math.nan, math.nan, value)

    definitions = {
        "weak weights": DefinitionRecord(tuple(map(metrics, weak)), 0.1),
        "merge_many": DefinitionRecord(tuple(map(metrics, joint)), None, tuple(map(metrics, averages))),
    }
    return NetworksRecord((seed, seed + 1, seed + 2), 12, definitions)


def test_claims_follow_their_rules():
    config = small_config(replicates=2)
    near, far = (0.01, 0.01, 0.01), (0.01, 0.5, 0.01)
    good = [made_up(seed, near, near, (0.1, 0.1, 0.11)) for seed in (0, 3)]
    assert [claim.holds for claim in judge(config, good)] == [True] * 3
    poor = [made_up(seed, far, far, (0.1, 0.3, 0.3)) for seed in (0, 3)]
    claims = judge(config, poor)
    assert [claim.holds for claim in claims] == [False] * 3
    # A ~ B and B ~ C, with B in the middle, is the only chain, and it is broken.
    assert claims[0].measured == 1
    mixed = judge(config, [good[0], poor[1]])[0]
    assert mixed.measured == pytest.approx(0.5)
    assert mixed.low < 0.5 < mixed.high
    assert "(of 4;" in mixed.statement
    apart = judge(config, [made_up(seed, (0.5, 0.5, 0.5), far, (0.1, 0.3, 0.3)) for seed in (0, 3)])[0]
    assert math.isnan(apart.measured)
    assert not apart.holds


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(widths=(), num_networks=2)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  widths: wanted ascending widths from 1 on, got []",
        "  num_networks: wanted at least 3, got 2",
    ]


def test_a_record_of_another_width_is_a_misfit(finished):
    (record,) = finished[0].records
    config = small_config(widths=(8, 12))
    assert config.misfits(dataclasses.replace(record, width=9), config.pairs[1]) == [
        "width: wanted 12, got 9"
    ]
