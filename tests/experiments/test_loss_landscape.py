"""Planes through trajectories: what is measured against networks on disk, what is written, and the claims."""

import csv
import io
import math
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from small_experiment import TINY, reporter

import rebasin
from experiments.harness.matched_epochs import Landscape, LandscapeRecord, PlaneRecord
from experiments.harness.networks import run_directory
from experiments.harness.paths import PathMeter
from experiments.harness.presets import Thresholds
from experiments.harness.record import METRICS, Metrics
from experiments.loss_landscape import EXPERIMENT, LandscapeConfig, judge
from rebasin.arithmetic import average, distance
from rebasin.barrier import classification_metrics
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")


def small_config(**changes):
    fields = {
        "recipe": TINY,
        "replicates": 2,
        "seed": 0,
        "methods": ("weights",),
        "epochs": (1, 3),
        "recorded": (0, 1, 3),
        "grid_size": 4,
        "num_grid": 50,
        "num_alphas": 5,
        "num_eval": 200,
        "num_match": 100,
        "thresholds": Thresholds(unaligned_above=0.4, any_epoch_at_most=0.1, end_at_most=0.03),
    }
    return LandscapeConfig(**(fields | changes))


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One finished run, its folder, and what it printed."""
    folder, text = tmp_path_factory.mktemp("landscape"), io.StringIO()
    folders = {"output_dir": folder / "out", "runs_dir": folder / "runs"}
    results = EXPERIMENT.run(small_config(), DIGITS, **folders, reporter=reporter(text))
    return results, folder, text.getvalue()


@pytest.mark.slow
def test_planes_and_ridges_are_those_of_the_networks_on_disk(finished):
    results, folder, _ = finished
    a, b = (Trajectory(run_directory(folder / "runs", TINY, seed)) for seed in (0, 1))
    model = build_model("mlp", width=TINY.width, num_classes=10)
    spec = rebasin.infer_spec(model.apply, a.last, np.zeros((1, 8, 8, 1), np.float32))
    first = rebasin.weight_matching(spec, a[1], b[1], key=jax.random.key(0)).permutation
    metrics_fn = classification_metrics(build_apply(model, DIGITS))
    planes = {plane.key: plane.methods["weights"] for plane in results.records[0].planes}
    assert list(planes) == [(1, 1), (1, 3), (3, 1), (3, 3)]

    meter = PathMeter(metrics_fn, DIGITS, num_alphas=5, num_eval=200)
    for t in (1, 3):
        curve = meter(a[t], rebasin.permute(spec, first, b[t]))
        for metric in METRICS:
            measured = getattr(planes[1, t].ridge, metric)
            assert measured == pytest.approx(curve.barrier(metric).value, abs=0.0051)

    for t, third in ((1, 3), (3, 0)):
        surface = planes[1, t].surface
        anchors = [a[t], rebasin.permute(spec, first, b[t]), a[third]]
        ways = {"a": {w.epoch: w for w in surface.path_a}, "b": {w.epoch: w for w in surface.path_b}}
        assert list(ways["a"]) == list(ways["b"]) == [0, 1, 3]
        at = [(w.x, w.y) for w in (ways["a"][t], ways["b"][t], ways["a"][third])]
        for i, j in ((0, 1), (0, 2), (1, 2)):
            assert math.dist(at[i], at[j]) == pytest.approx(distance(anchors[i], anchors[j]), rel=1e-5)
        # A network off the plane: its distances to the anchors follow from its projection.
        far = rebasin.permute(spec, first, b[0])
        way = ways["b"][0]
        for place, anchor in zip(at, anchors, strict=True):
            apart = math.hypot(math.dist(place, (way.x, way.y)), way.distance)
            assert apart == pytest.approx(distance(far, anchor), rel=1e-4)
        assert len(surface.loss) == len(surface.loss[0]) == len(surface.error) == 4

    # A point of the grid by hand: weights of the anchors from its coordinates.
    surface, data = planes[1, 1].surface, DIGITS.take(num_train=50).train
    anchors = [a[1], rebasin.permute(spec, first, b[1]), a[3]]
    ends = {w.epoch: w for w in surface.path_a}
    corners = [
        (0, 0, 1),
        (next(w.x for w in surface.path_b if w.epoch == 1), 0, 1),
        (ends[3].x, ends[3].y, 1),
    ]
    inside = 0
    for i, y in enumerate(surface.y):
        for j, x in enumerate(surface.x):
            shares = np.linalg.solve(np.array(corners).T, [x, y, 1])
            if (shares >= 0).all():
                inside += 1
                expected = metrics_fn(average(anchors, shares), data)
                assert surface.loss[i][j] == pytest.approx(float(expected["loss"].mean()), rel=1e-3)
                assert surface.error[i][j] == pytest.approx(float(expected["error"].mean()), abs=1e-6)
    assert inside


@pytest.mark.slow
def test_results_csv_and_figures(finished):
    results, folder, text = finished
    # Only what is drawn has a surface, and a summary is of numbers.
    has = [[own.surface is not None for p in r.planes for own in p.methods.values()] for r in results.records]
    assert has == [[True] * 4, [False] * 4]
    assert results.require_summary().planes[0].methods["weights"].surface is None
    with (folder / "out/ridges.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 4 * len(METRICS)
    row = next(r for r in rows if r["replicate"] == "1" and r["match_epoch"] == "3" and r["epoch"] == "1")
    assert float(row["ridge"]) == pytest.approx(
        results.records[1].planes[2].methods["weights"].ridge.train_loss, rel=1e-5
    )
    for name in ("landscape.png", "landscape_loss.png", "landscape_error.png"):
        assert (folder / "out" / name).stat().st_size > 10_000
    assert max(len(line) for line in text.splitlines() if not line.startswith(("/", "disk:"))) <= 80
    assert EXPERIMENT.load(folder / "out/results.json").records == results.records


def made_up(first, last):
    """A record of test error ridges: under P_1 and under P_3, at epoch 1; all else is 0."""

    def plane(s, t, value):
        return PlaneRecord(s, t, {"weights": Landscape(Metrics(0.0, 0.0, 0.0, value))})

    return LandscapeRecord((0, 1), (plane(1, 1, first), plane(1, 3, 0), plane(3, 1, last), plane(3, 3, 0)))


def test_claims_follow_their_rules():
    config = SimpleNamespace(
        epochs=(1, 3), methods=("weights",), thresholds=SimpleNamespace(any_epoch_at_most=0.1)
    )
    good = judge(config, [made_up(0.4 + x, 0.05) for x in (0, 0.01, 0.02)])
    assert [c.holds for c in good] == [True, True]
    assert good[1].measured == pytest.approx(0.36)
    poor = judge(config, [made_up(0.2, 0.2 + x) for x in (-0.01, 0, 0.01)])
    assert [c.holds for c in poor] == [False, False]


def test_every_problem_of_a_config_is_listed():
    with pytest.raises(ConfigError) as info:
        small_config(epochs=(1, 2), recorded=(0, 1, 3), grid_size=1, num_grid=0)
    assert str(info.value).splitlines() == [
        "this experiment cannot work:",
        "  epochs: wanted the recipe's last, 3, at the end, got 2",
        "  recorded: wanted ascending epochs with those of planes, got [0, 1, 3]",
        "  grid_size: wanted at least 2, got 1",
        "  num_grid: wanted at least 1, got 0",
    ]
