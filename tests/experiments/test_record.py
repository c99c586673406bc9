"""The schema of results.json: records become JSON and come back, and whatever does not fit is named."""

import dataclasses
import json
import math
import pathlib

import pytest

from experiments import (
    compare_methods,
    layerwise_alignment,
    learning_rates,
    loss_landscape,
    mask_transport,
    mask_transport_widths,
    optimal_transport,
    sgd_instability,
    sparse_connectivity,
    stability_interventions,
    training_trajectories,
    weight_magnitude,
    width_scaling,
)
from experiments.harness.record import (
    AlignedEpoch,
    Endpoints,
    EpochRecord,
    FixedPoints,
    MethodsRecord,
    Metrics,
    PathCurves,
    RateRecord,
    TrajectoryRecord,
    added,
    summarise,
)
from experiments.harness.results import Results, Schema, Seconds
from experiments.harness.serialisation import from_json, to_json
from experiments.harness.statistics import Interval
from rebasin.errors import ConfigError

RESULTS = pathlib.Path(__file__).parents[2] / "results"
EXPERIMENTS = {
    binary.EXPERIMENT.name: binary.EXPERIMENT
    for binary in (
        training_trajectories,
        sgd_instability,
        sparse_connectivity,
        mask_transport,
        mask_transport_widths,
        compare_methods,
        learning_rates,
        optimal_transport,
        width_scaling,
        loss_landscape,
        weight_magnitude,
        layerwise_alignment,
        stability_interventions,
    )
}


def metrics(scale):
    return Metrics(scale / 3, 0.25, math.nan, 1.0)


def small_record(scale=1.0, epochs=(4, 1)):
    record = TrajectoryRecord((0, 1))
    for t in epochs:
        last = t == 4
        path = PathCurves((1.0, scale), (0.5, 0.5), (1.0, 2.0), (0.0, 1.0)) if last else None
        own = AlignedEpoch(
            objective=scale,
            same_epoch=metrics(scale),
            at_end=metrics(scale),
            under={1: metrics(scale), 4: metrics(1.0)},
            distance_same_epoch=1.0,
            distance_end=2.0,
            fixed_points=FixedPoints(0.5, {"P0": 0.5}),
            identity=FixedPoints(0.0, {"P0": 0.0}) if last else None,
            path=path,
        )
        ends = Endpoints(metrics(1.0), metrics(2.0))
        record = added(record, EpochRecord(t, ends, metrics(scale), 3.0, {"weights": own}, path))
    return record


def test_records_and_summaries_come_back_from_json():
    record = from_json(TrajectoryRecord[float], to_json(small_record()), "")
    # Floats have lost all but seven digits, once and for all.
    assert record.epochs[0].unaligned.train_loss == 0.3333333
    for kind, value in (
        (TrajectoryRecord[float], record),
        (TrajectoryRecord[Interval], summarise([record, record])),
    ):
        stored = to_json(value)
        assert json.loads(json.dumps(stored)) == stored
        assert to_json(from_json(kind, stored, "")) == stored
    assert list(record.epochs[0].methods["weights"].under) == [1, 4]
    assert [part.epoch for part in record.epochs] == [1, 4]
    assert math.isnan(record.epochs[0].unaligned.test_loss)


def test_a_summary_has_the_structure_of_its_records():
    summary = summarise([small_record(1.0), small_record(3.0)])
    assert summary.seeds == (0, 1, 0, 1)
    first, last = summary.epochs
    assert (first.epoch, last.epoch) == (1, 4)
    assert first.methods["weights"].objective.mean == 2.0
    assert last.path.train_loss[1].mean == 2.0
    assert first.path is None
    assert first.methods["weights"].under[4].train_error == Interval(0.25, 0.25, 0.25, 0.0)
    # What is not measured stays as it is, and must be the same in all.
    rates = [RateRecord((0, 1), rate, {}) for rate in (0.1, 0.1, 0.2)]
    assert summarise(rates[:2]).rate == 0.1
    with pytest.raises(ConfigError, match=r"RateRecord\.rate differs between records: \[0\.1, 0\.1, 0\.2\]"):
        summarise(rates)
    with pytest.raises(ConfigError, match=r"different numbers of parts: \[2, 1\]"):
        summarise([small_record(), small_record(epochs=(4,))])


def test_a_record_without_parts_is_not_added_to():
    with pytest.raises(TypeError, match="MethodsRecord has no parts in an order"):
        added(MethodsRecord((0, 1), {}), None)


def broken(change):
    content = to_json(small_record())
    change(content["epochs"][1])
    return content


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda e: e["unaligned"].update(test_error="x"), "unaligned.test_error: wanted float, got 'x'"),
        (lambda e: e["unaligned"].pop("test_error"), "unaligned.test_error: missing"),
        (lambda e: e.update(epoch=1.5), "epoch: wanted int, got 1.5"),
        (lambda e: e.update(epoch=True), "epoch: wanted int, got True"),
        (lambda e: e.update(methods=[]), "methods: wanted an object, got []"),
        (lambda e: e["path"].update(test_loss=3.0), "path.test_loss: wanted a list, got 3.0"),
        (
            lambda e: e["methods"]["weights"]["under"].update(end={}),
            "methods.weights.under: wanted int, got 'end'",
        ),
        (
            lambda e: e["endpoints"].update(c=1),
            "endpoints.c: not known; Endpoints has a, b",
        ),
    ],
)
def test_whatever_does_not_fit_is_named(change, message):
    with pytest.raises(ConfigError) as info:
        from_json(TrajectoryRecord[float], broken(change), "out/results.json: records.0")
    assert str(info.value) == f"out/results.json: records.0: epochs.1.{message}"


@dataclasses.dataclass(frozen=True)
class Small:
    epochs: int
    pair: tuple[int, int] = (0, 1)


def test_fields_with_defaults_may_be_missing():
    assert from_json(Small, {"epochs": 3}, "") == Small(3)
    with pytest.raises(ConfigError, match="file: pair: wanted 2 entries, got 1"):
        from_json(Small, {"epochs": 3, "pair": [1]}, "file")


def test_results_are_replaced_whole(tmp_path):
    """Whoever reads the file while it is saved finds the last complete one; a killed save leaves it."""
    path = tmp_path / "results.json"
    results = Results("training_trajectories", config=None)
    results.save(path)
    complete = path.read_text()
    with path.open() as reader:
        dataclasses.replace(results, seconds=Seconds({"training": 1.0})).save(path)
        assert reader.read() == complete
    assert json.loads(path.read_text())["seconds"] == {"training": 1.0}
    assert list(tmp_path.iterdir()) == [path]


def test_files_of_other_versions_and_programs_are_refused(tmp_path):
    schema, path = (
        Schema("test", Small, TrajectoryRecord[float], TrajectoryRecord[Interval]),
        tmp_path / "r.json",
    )
    results = Results(
        "test", Small(3), records=[from_json(TrajectoryRecord[float], to_json(small_record()), "")]
    )
    results.save(path)
    assert to_json(Results.load(path, schema)) == to_json(results)
    content = json.loads(path.read_text())
    for change, message in (
        ({"schema_version": 1}, f"{path} has schema_version 1, this program reads 2"),
        (
            {"experiment": "another"},
            f"{path} is of the experiment 'another', not 'test'; choose another folder",
        ),
        ({"config": {"epochs": None}}, f"{path}: config: epochs: wanted int, got None"),
        ({"claims": [{}]}, f"{path}: claims: 0.id: missing"),
    ):
        path.write_text(json.dumps(content | change))
        with pytest.raises(ConfigError) as info:
            Results.load(path, schema)
        assert str(info.value) == message
    path.write_text(json.dumps({"schema_version": 2}))
    with pytest.raises(ConfigError, match=r"is incomplete:\n  experiment: missing\n  config: missing"):
        Results.load(path, schema)
    path.write_text("[]")
    with pytest.raises(ConfigError, match="is damaged, or not a results.json of this program"):
        Results.load(path, schema)


def test_committed_results_have_the_schema_and_the_claims_follow_from_them():
    paths = sorted(RESULTS.glob("*/results.json"))
    paths = [path for path in paths if path.parent.name not in ("demo", "weight_matching", "repair")]
    assert paths
    for path in paths:
        experiment = EXPERIMENTS[json.loads(path.read_text())["experiment"]]
        results = experiment.load(path)
        assert results.finished
        assert all(results.config.is_complete(record) for record in results.records)
        assert len(results.records) == len(results.config.pairs)
        judged = experiment.judge(results.config, results.records) if experiment.judge else []
        for ours, stored in zip(judged, results.claims, strict=True):
            assert (ours.id, ours.statement, ours.holds) == (stored.id, stored.statement, stored.holds)
            assert ours.measured == pytest.approx(stored.measured, rel=1e-5, nan_ok=True)
