"""Networks aligned directly, through a third one and together: barriers by hand, resuming, and claims."""

import csv
import dataclasses
import io
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import reporter

import rebasin
from experiments import strong_connectivity
from experiments.harness import connectivity
from experiments.harness.connectivity import MatchedTriplet, TripletRecord
from experiments.harness.networks import run_directory
from experiments.harness.paths import PathMeter, barriers
from experiments.harness.record import METRICS, FixedPoints, Metrics
from experiments.strong_connectivity import EXPERIMENT, StrongConfig, judge
from rebasin.barrier import classification_metrics
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
    }
    return StrongConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("strong"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


def test_barriers_are_those_by_hand(finished):
    """From the networks on disk, with both networks moved and a whole sweep each."""
    results, folder, _ = finished
    trees = [Trajectory(run_directory(folder / "runs", RECIPE, seed)).last for seed in range(3)]
    a, b, c = trees
    model = build_model("mlp", width=12, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a, np.zeros((1, 8, 8, 1), np.float32))
    apply_fn = build_apply(model, DIGITS)
    meter = PathMeter(classification_metrics(apply_fn), DIGITS, num_alphas=5, num_eval=200, apply_fn=apply_fn)
    key = jax.random.key(0)

    def match(x, y):
        return rebasin.weight_matching(spec, x, y, key=key).permutation

    in_c = [rebasin.permute(spec, match(c, tree), tree) for tree in (a, b)]
    merged = rebasin.merge_many(spec, trees, key=key).align(spec, trees)
    (record,) = results.records
    own, joint = record.methods["weights"], record.joint["merge_many"]
    for pair, stored in (
        ((a, b), record.unaligned),
        ((a, rebasin.permute(spec, match(a, b), b)), own.direct),
        (in_c, own.indirect),
        ((in_c[0], c), own.to_reference[0]),
        ((in_c[1], c), own.to_reference[1]),
        (merged[:2], joint.between),
        ((merged[0], merged[2]), joint.to_reference[0]),
    ):
        for metric, value in vars(barriers(meter(*pair))).items():
            # An example at the edge between two classes may change sides where sums are ordered otherwise.
            assert getattr(stored, metric) == pytest.approx(value, abs=0.0051), metric
    plain, tempered = meter.tempered(a, b)
    assert barriers(tempered).test_loss == pytest.approx(record.tempered.test_loss, abs=1e-5)
    assert record.tempered.test_error == record.unaligned.test_error
    assert barriers(plain).test_loss == pytest.approx(record.unaligned.test_loss, abs=1e-5)
    assert 0 <= own.fixed_points.total < 1
    assert own.chance == pytest.approx(1 / 12)


@pytest.mark.slow
def test_a_run_killed_at_a_width_ends_with_the_same_numbers(finished, tmp_path, monkeypatch):
    config = small_config(widths=(8, 12), joint=("merge_many", "all_pairs"))
    folders = {"output_dir": tmp_path / "out", "runs_dir": finished[1] / "runs"}
    calls, align = [], connectivity.align_jointly

    def killed(*arguments):
        calls.append(arguments[1])
        if len(calls) == 4:  # the second algorithm at the second width
            raise KeyboardInterrupt
        return align(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(strong_connectivity, "align_jointly", killed)
        with pytest.raises(KeyboardInterrupt):
            EXPERIMENT.run(config, DIGITS, **folders, reporter=reporter())
    begun = EXPERIMENT.load(tmp_path / "out/results.json").records
    assert [(r.width, list(r.joint)) for r in begun] == [
        (8, ["merge_many", "all_pairs"]),
        (12, ["merge_many"]),
    ]
    resumed = EXPERIMENT.run(config, DIGITS, **folders, resume=True, reporter=reporter())
    whole = EXPERIMENT.run(
        config, DIGITS, output_dir=tmp_path / "whole", runs_dir=folders["runs_dir"], reporter=reporter()
    )

    def timeless(records):
        return [
            dataclasses.replace(r, joint={n: dataclasses.replace(j, seconds=0.0) for n, j in r.joint.items()})
            for r in records
        ]

    assert timeless(resumed.records) == timeless(whole.records)


def test_results_csv_and_tables(finished):
    results, folder, text = finished
    with (folder / "out/barriers.csv").open() as file:
        rows = list(csv.DictReader(file))
    keys = ("width", "seed", "comparison", "metric")
    found = {tuple(row[key] for key in keys): float(row["value"]) for row in rows}
    # Two paths without, four with a method, and three of an algorithm; then what is no barrier.
    assert len(found) == len(rows) == (2 + 4 + 3) * len(METRICS) + 2 + 1
    record = results.records[0]
    indirect = record.methods["weights"].indirect.train_loss
    assert found["12", "0", "indirect weights", "train_loss"] == pytest.approx(indirect, rel=1e-5)
    for name in EXPERIMENT.figures:
        assert (folder / "out" / name).stat().st_size > 10_000
    lines = [line for line in text.splitlines() if not line.startswith(("/", "disk:", "networks:"))]
    assert max(map(len, lines)) <= 80
    for word in ("1 triplet of networks", "via C", "temp.", "connected [range of replicates]"):
        assert word in text
    assert "…" not in text


def made_up(width, direct, indirect, joint, shared):
    """A record of test loss barriers; all else is NaN."""

    def metrics(value):
        return Metrics(math.nan, math.nan, value, math.nan)

    matched = MatchedTriplet(metrics(direct), metrics(indirect), (), FixedPoints(shared, {}), 0.1)
    between = SimpleNamespace(between=metrics(joint))
    return TripletRecord(
        (0, 1, 2),
        width,
        (),
        metrics(2.0),
        metrics(1.6 / width),
        {"weights": matched},
        {"merge_many": between},
    )


def test_claims_follow_their_rules():
    config = SimpleNamespace(
        widths=(8, 16, 32), methods=("weights",), joint=("merge_many",), loss_at_most=0.1
    )
    good = [
        made_up(*values)
        for i in (0, 0.01, 0.02)
        for values in ((8, 0.5, 2 + i, 0.9, 0.3), (16, 0.3, 1 + i, 0.3, 0.2), (32, 0.1, 0.3, 0.2, 0.1 + i))
    ]
    claims = {claim.id: claim for claim in judge(config, good)}
    assert [claim.holds for claim in claims.values()] == [True] * 5
    falls = claims["indirect_barrier_falls_weights"]
    assert falls.measured == pytest.approx((0.3 - 2.01) / 2)
    assert claims["joint_alignment_reaches_direct"].measured == pytest.approx(1.0)
    assert "best at width 16" in claims["joint_alignment_reaches_direct"].statement

    poor = [
        made_up(*values)
        for i in (0, 0.01, 0.02)
        for values in ((8, 0.5, 0.2 + i, 3.0, 0.1), (16, 0.3, 0.3, 3.0, 0.2 + i), (17, 0.1, 0.25, 3.0, 0.5))
    ]
    config.widths, config.loss_at_most = (8, 16, 17), 0.05
    assert [claim.holds for claim in judge(config, poor)] == [False] * 5


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(widths=(12, 8), joint=("magic",), joint_steps=0, connected_at_most=1.5, loss_at_most=-1)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  widths: wanted ascending widths from 1 on, got [12, 8]",
        "  joint: wanted some of merge_many, universe, all_pairs, none twice, got ['magic']",
        "  joint_steps: wanted at least 1, got 0",
        "  connected_at_most: wanted a fraction, got 1.5",
        "  loss_at_most: wanted at least 0, got -1",
    ]
