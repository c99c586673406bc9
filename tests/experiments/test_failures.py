"""What goes wrong outside of the numbers: files, folders, interrupts, damage, two processes at once."""

import dataclasses
import errno
import importlib
import io
import json
import pathlib
import warnings
from types import SimpleNamespace

import numpy as np
import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console

from experiments import learning_rates, training_trajectories
from experiments.harness import networks
from experiments.harness.console import Reporter
from experiments.harness.experiment import Experiment
from experiments.harness.options import INTERRUPTED
from experiments.harness.record import AlignedEpoch, EpochRecord, Metrics, TrajectoryRecord
from experiments.harness.results import Results, Seconds, open_results, write_csv
from experiments.harness.statistics import ratio
from rebasin.errors import ConfigError
from rebasin.files import explain, write_whole
from rebasin.training.data import load_dataset
from rebasin.training.lock import FolderInUseError, locked
from rebasin.training.recipes import Recipe

ROOT = pathlib.Path(__file__).parents[2]


def call(binary, *arguments):
    with flagsaver.flagsaver():
        flags.FLAGS([binary.__name__, *arguments])
        try:
            binary.main([binary.__name__])
        except SystemExit as stopped:
            return stopped.code
    return 0


TINY = (
    "--preset=demo",
    "--epochs=1",
    "--replicates=1",
    "--methods=weights",
    "--width=4",
    "--num_alphas=3",
    "--record_epochs=0,1",
)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "rows.csv"
    write_csv(path, [{"a": 1}, {"a": 2}])
    assert path.read_bytes() == b"a\r\n1\r\n2\r\n"

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left") as info:
        write_csv(path, [{"a": 3}])
    assert path.read_text().split() == ["a", "1", "2"]
    assert [file.name for file in tmp_path.iterdir()] == ["rows.csv"]
    assert explain(info.value) == (
        f"{path}: No space left on device; free some space there, or choose another folder"
    )


def test_errors_of_the_system_are_one_sentence(tmp_path):
    file = tmp_path / "file"
    file.write_text("mine")
    for folder, message in (
        (file, f"error: {file}: File exists; it is not a folder; choose another name"),
        (file / "x", f"error: {file}/x: Not a directory; a part of its path is not a folder; choose"),
        (tmp_path / ("a" * 300), f"error: {tmp_path}/{'a' * 300}: File name too long; choose a shorter"),
    ):
        assert str(call(training_trajectories, f"--output_dir={folder}", *TINY)).startswith(message)
    assert file.read_text() == "mine"


@pytest.mark.parametrize(
    ("error", "status", "said"),
    [
        (KeyboardInterrupt(), INTERRUPTED, "interrupted\n"),
        (MemoryError(), "error: out of memory; choose a smaller --width, --num_eval or --num_match", ""),
    ],
)
def test_what_stops_a_run_is_one_sentence(tmp_path, monkeypatch, capsys, error, status, said):
    def run(*_, **__):
        raise error

    monkeypatch.setattr(Experiment, "run", run)
    assert call(training_trajectories, f"--output_dir={tmp_path}", *TINY) == status
    assert capsys.readouterr().err == said
    (tmp_path / "results.json").write_text("")
    call(training_trajectories, f"--output_dir={tmp_path}", *TINY)
    if said:
        more = "interrupted. What was measured before is stored: go on with --resume\n"
        assert capsys.readouterr().err == more


def test_an_output_folder_in_use_is_refused(tmp_path):
    with locked(tmp_path):
        message = call(training_trajectories, f"--output_dir={tmp_path}", *TINY)
    assert message.startswith(f"error: {tmp_path} is in use by process ")
    assert not list(tmp_path.iterdir())


def test_a_network_that_another_process_trains_is_waited_for(tmp_path, monkeypatch):
    text, ends = io.StringIO(), [FolderInUseError(tmp_path, "process 7")] * 2
    trained = SimpleNamespace(epochs=(0,), metrics=lambda _: {})

    def train(*_, **__):
        if ends:
            raise ends.pop()
        return trained

    monkeypatch.setattr(networks, "WAIT_SECONDS", 0.0)
    monkeypatch.setattr(networks, "train", train)
    found = networks.train_networks(
        Recipe("digits", "mlp", width=4, epochs=1, warmup_epochs=1),
        load_dataset("digits"),
        (0,),
        runs_dir=tmp_path,
        reporter=Reporter(Console(file=text, width=80)),
        seconds=Seconds(),
    )
    assert found == [trained]
    assert text.getvalue().splitlines()[0] == f"waiting for process 7, which trains {tmp_path}"
    assert text.getvalue().count("waiting") == 1


def test_a_network_that_fits_no_memory_leaves_nothing_behind(tmp_path):
    message = call(training_trajectories, f"--output_dir={tmp_path}", *TINY, "--width=1000000")
    assert message.startswith(
        "error: training a network (mlp) of width 1000000 needs at least 24 TB of memory"
    )
    assert not list(tmp_path.iterdir())


@pytest.fixture
def stored(tmp_path):
    """A copy of the results of two binaries, as typed results without their hash, and its path."""

    def load(name):
        binary, folder = {
            "trajectories": ("training_trajectories", "digits_mlp"),
            "instability": ("sgd_instability", "digits_mlp_instability"),
            "rates": ("learning_rates", "rates_mnist"),
            "methods": ("compare_methods", "methods_digits"),
        }[name]
        experiment = importlib.import_module(f"experiments.{binary}").EXPERIMENT
        path = tmp_path / f"{name}.json"
        experiment.load(ROOT / "results" / folder / "results.json").save(path)
        return experiment, path

    return load


def edited(path, change, *, drop_hash=True):
    content = json.loads(path.read_text())
    change(content)
    if drop_hash:
        del content["sha256"]
    path.write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["trajectories", "instability", "rates", "methods"])
def test_records_that_are_not_those_of_the_config_are_refused(stored, name):
    experiment, path = stored(name)
    whole = path.read_text()
    key = {"trajectories": "epochs", "instability": "spawns"}.get(name, "methods")

    def drop_part(content):
        parts = content["records"][0][key]
        del parts[next(iter(parts)) if isinstance(parts, dict) else 0]

    for change, message in (
        (lambda content: content["records"].append(content["records"][0]), r"records: wanted \d+ at most"),
        (lambda content: content["records"].pop(), r"records: wanted \d+ in a finished run"),
        (
            lambda content: content["records"][0].update(seeds=[8, 9]),
            r"records\.0\.seeds: wanted \[(0, 1|100, 101)\]",
        ),
        (drop_part, r"records\.0: parts are missing"),
    ):
        path.write_text(whole)
        edited(path, change)
        with pytest.raises(ConfigError, match=r"is damaged \(delete it and run again") as info:
            experiment.load(path)
        assert info.match(message)


def test_records_of_other_methods_and_rates_are_refused(stored):
    for name, old, new, message in (
        ("trajectories", '"activations": {"objective"', '"covariance": {"objective"', "methods: wanted"),
        ("rates", '"rate": 0.0004', '"rate": 0.0005', "rate: wanted 0.0004, got 0.0005"),
    ):
        experiment, path = stored(name)
        edited(path, lambda content: None)
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new, 1))
        with pytest.raises(ConfigError, match=message):
            experiment.load(path)


def test_results_of_a_recipe_without_later_fields_are_of_the_same_config(stored, tmp_path):
    experiment, path = stored("rates")
    config = experiment.load(path).config

    def change(content):
        del content["config"]["recipe"]["optimizer"], content["config"]["recipe"]["warmup_steps"]

    edited(path, change)
    path.rename(tmp_path / "results.json")
    assert open_results(tmp_path, experiment.schema, config, resume=False).finished
    other = dataclasses.replace(config, recipe=dataclasses.replace(config.recipe, warmup_steps=10))
    with pytest.raises(ConfigError, match="is of another config; choose another folder:\n  recipe: "):
        open_results(tmp_path, experiment.schema, other, resume=False)


def test_a_number_that_was_changed_is_noticed(stored):
    experiment, path = stored("rates")
    edited(path, lambda content: content["records"][3].update(seeds=[0, 1]), drop_hash=False)
    experiment.load(path)  # the layout may change

    def change(content):
        content["records"][3]["methods"]["weights"]["plain"]["loss_barrier"] += 1e-6

    edited(path, change, drop_hash=False)
    with pytest.raises(ConfigError, match="is damaged: it was changed since it was written; delete it and"):
        experiment.load(path)


@pytest.mark.parametrize(
    "content", [b"", b"\xff\xfe", b"[" * 200_000, b'{"schema_version": ' + b"9" * 5000 + b"}", b"null"]
)
def test_a_file_that_is_no_results_json(tmp_path, content):
    path = tmp_path / "results.json"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match="is damaged, or not a results.json of this program"):
        learning_rates.EXPERIMENT.load(path)


def test_equal_networks_are_judged_and_drawn(tmp_path, stored):
    """Distances of 0 are equal, so that P_t is not closer than P_end, and no number is divided by 0."""
    experiment, path = stored("trajectories")
    config = experiment.load(path).config
    config = type(config)(**{**vars(config), "replicates": 2, "epochs": (0, 1, 30), "match_epochs": (30,)})
    zero = Metrics(0.0, 0.0, 0.0, 0.0)
    template = experiment.load(path).records[0].epochs[-1]

    def epoch(t):
        last = t == 30
        method = AlignedEpoch(
            0.0,
            zero,
            zero,
            {30: zero},
            0.0,
            0.0,
            template.methods["weights"].fixed_points,
            template.methods["weights"].identity if last else None,
            template.path if last else None,
        )
        methods = dict.fromkeys(config.methods, method)
        return EpochRecord(t, template.endpoints, zero, 0.0, methods, template.path if last else None)

    records = [TrajectoryRecord((2 * i, 2 * i + 1), tuple(epoch(t) for t in config.epochs)) for i in range(2)]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        claims = experiment.judge(config, records)
        results = Results(experiment.name, config, records=records, claims=claims)
        results.summary = experiment.summarise(config, records)
        write_csv(tmp_path / "rows.csv", experiment.rows(results))
        experiment.report(results, Reporter())
    closer = next(claim for claim in claims if claim.id == "early_permutations_are_closer")
    assert (closer.measured, closer.holds) == (0.0, False)
    np.testing.assert_array_equal(ratio([1.0, 0.0, 1.0], [2.0, 0.0, 0.0]), [0.5, 1.0, np.inf])


def test_a_folder_takes_the_place_of_no_file(tmp_path):
    (tmp_path / "rows.csv").mkdir()
    with pytest.raises(IsADirectoryError):
        write_whole(tmp_path / "rows.csv", b"")
