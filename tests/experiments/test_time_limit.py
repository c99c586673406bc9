"""What matters is measured first and stored at once; a run that is stopped or killed loses nothing."""

import dataclasses
import io

import pytest
from absl import flags
from absl.testing import flagsaver
from rich.console import Console
from small_experiment import reporter, small_config

from experiments import paper_pair
from experiments.harness.console import Reporter
from experiments.harness.deadline import Deadline, OutOfTime
from experiments.harness.networks import run_directory
from experiments.harness.results import PartialResults, Results
from experiments.training_trajectories import EXPERIMENT, early_epochs, select
from rebasin.errors import ConfigError
from rebasin.training.data import load_dataset
from rebasin.training.trajectory import Trajectory

# Figures take most of the time of a run on small networks.
UNDRAWN = dataclasses.replace(EXPERIMENT, figures={})
CONFIG = small_config(replicates=1, methods=("weights",), match_epochs=(0, 1, 4))


class Clock:
    """A clock that runs only when told to."""

    now = 0.0

    def __call__(self):
        return self.now


class Steps(Deadline):
    """Runs out of time after a number of steps."""

    def __init__(self, number):
        super().__init__()
        self.left, self.asked = number, []

    def require(self, kind):
        self.asked.append(kind)
        self.left -= 1
        if self.left < 0:
            raise OutOfTime(f"no time for {kind}")


def run(folder, experiment=UNDRAWN, config=CONFIG, **options):
    arguments = {"output_dir": folder, "runs_dir": folder / "runs", "keep": "none", "reporter": reporter()}
    return experiment.run(config, load_dataset("digits"), **(arguments | options))


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """Results of a run that nothing stopped, the steps that it asked time for, and its networks."""
    deadline, folder = Steps(1_000), tmp_path_factory.mktemp("whole")
    results = run(folder, deadline=deadline, keep="all")
    return results, deadline.asked, {"runs_dir": folder / "runs", "keep": "all"}


def stored(folder):
    return EXPERIMENT.load(folder / "results.json")


def under(record):
    return {epoch.epoch: list(epoch.methods["weights"].under) for epoch in record.epochs}


def test_a_step_is_made_only_if_it_may_end_in_time():
    clock = Clock()
    deadline = Deadline(100.0, clock=clock)
    assert deadline.estimate("train") == 10.0  # nothing is known: a tenth of the limit
    with deadline.step("train"):
        clock.now += 8.0  # compiles
    assert deadline.estimate("train") == pytest.approx(9.6)
    for seconds in (1.0, 2.0):
        with deadline.step("train"):
            clock.now += seconds
    assert deadline.estimate("train") == pytest.approx(2.4)
    assert deadline.estimate("match") == 24.0  # three times the longest step of any kind
    clock.now = 92.5  # five seconds are kept for the end
    deadline.require("train")
    clock.now = 92.7
    with pytest.raises(OutOfTime, match=r"^after 93 of 100 s there is no time for train$"):
        deadline.require("train")
    clock.now = 1e9
    Deadline(None, clock=clock).require("train")


def test_what_matters_comes_first(whole, tmp_path):
    """Essentials of all epochs, the last one first; then the permutations of all epochs at all epochs."""
    results, asked, networks = whole
    training = [kind for kind in asked if "training" in kind]
    assert asked[: len(training)] == training
    rest = asked[len(training) :]
    assert rest[:4] == ["the essentials of another epoch"] * 4
    assert set(rest[4:]) == {"reading another epoch", "the permutation of another epoch"}
    assert under(results.records[0]) == dict.fromkeys((0, 1, 2, 4), [0, 1, 4])
    found = run(tmp_path, deadline=Steps(3), **networks)
    # Of the epochs of which P_t is wanted everywhere, it is there at its own epoch at once.
    assert under(found.records[0]) == {0: [0, 4], 1: [1, 4], 4: [4]}


@pytest.mark.parametrize("number", [pytest.param(5, marks=pytest.mark.slow), 8])
def test_a_run_out_of_time_and_resumed_ends_with_the_same_numbers(whole, tmp_path, number):
    results, asked, _ = whole
    runs, finished = 0, None
    while finished is None or not finished.finished:
        finished = run(tmp_path, resume=True, deadline=Steps(number))
        runs += 1
        assert runs < 60
    assert runs >= len(asked) / number
    assert (finished.records, finished.summary, finished.claims) == (
        results.records,
        results.summary,
        results.claims,
    )


class Killed(BaseException):
    pass


@pytest.mark.parametrize("after", [*(pytest.param(n, marks=pytest.mark.slow) for n in range(1, 6)), 6])
def test_a_run_killed_while_it_stores_ends_with_the_same_numbers(whole, tmp_path, monkeypatch, after):
    results, _, networks = whole
    save, saved = Results.save, []

    def killed_save(self, path):
        if len(saved) == after:
            raise Killed
        saved.append(path)
        save(self, path)

    monkeypatch.setattr(Results, "save", killed_save)
    with pytest.raises(Killed):
        run(tmp_path, **networks)
    monkeypatch.setattr(Results, "save", save)
    # The first save says what the folder is of; every other one has a part more.
    begun = stored(tmp_path).records
    assert sum(len(record.epochs) for record in begun) == min(after - 1, 4)
    assert run(tmp_path, resume=True, **networks).records == results.records


def test_a_run_out_of_time_draws_what_it_has_and_says_what_is_missing(whole, tmp_path):
    results, _, networks = whole
    text = io.StringIO()
    options = {"reporter": Reporter(Console(file=text, width=80)), "deadline": Steps(3), **networks}
    found = run(tmp_path, EXPERIMENT, **options)
    assert not found.finished
    assert {path.name for path in tmp_path.glob("*.*")} == {
        "results.json",
        EXPERIMENT.csv,
        *EXPERIMENT.figures,
    }
    said = " ".join(text.getvalue().split())
    assert "stopped: no time for the essentials of another epoch. What was measured is stored: go on" in said
    assert "missing, as the run is unfinished (go on with --resume)" in said
    assert "seeds 0 and 1: epochs 2 " in said
    assert "seeds 0 and 1: 7 of 12 permutations of an epoch at an epoch" in said
    shown = EXPERIMENT.partial(found)
    assert isinstance(shown, PartialResults)
    assert (shown.config.epochs, shown.config.match_epochs) == ((0, 1, 4), (0, 1, 4))
    # A claim is about what is measured, and equal to that of the whole run where nothing of it is missing.
    claims = {claim.id: claim for claim in results.claims}
    assert {claim.id for claim in shown.claims} == set(claims)
    for name in ("unaligned_barrier", "early_permutations_fail_weights"):
        assert next(claim for claim in shown.claims if claim.id == name) == claims[name]


def test_what_pairs_have_in_common(whole):
    """Made of one record: a complete pair stands alone; else what all begun pairs have."""
    (record,) = whole[0].records
    config = dataclasses.replace(CONFIG, replicates=3)

    def pair(number, epochs, sources=(0, 1, 4)):
        parts = [
            dataclasses.replace(
                part,
                methods={
                    name: dataclasses.replace(own, under={s: own.under[s] for s in sources})
                    for name, own in part.methods.items()
                },
            )
            for part in record.epochs
            if part.epoch in epochs
        ]
        return dataclasses.replace(record, seeds=(2 * number, 2 * number + 1), epochs=tuple(parts))

    every = (0, 1, 2, 4)
    smaller, records, missing = select(config, [pair(0, every), pair(1, (1, 4))])
    assert (smaller.replicates, smaller.epochs, records) == (1, every, [pair(0, every)])
    assert missing == [
        "seeds 4 and 5: not begun",
        "seeds 2 and 3: epochs 0, 2; the pair is left out",
        "seeds 2 and 3: 6 of 12 permutations of an epoch at an epoch; the pair is left out",
    ]
    begun = [pair(0, every, (1, 4)), pair(1, (1, 2, 4), (4,))]
    smaller, records, _ = select(config, begun)
    assert (smaller.replicates, smaller.epochs, smaller.match_epochs) == (2, (1, 2, 4), (1, 4))
    assert [under(r) for r in records] == [dict.fromkeys((1, 2, 4), [4])] * 2
    assert EXPERIMENT.summarise(smaller, records).epochs[0].epoch == 1
    for nothing in ([], [pair(0, ())], [pair(0, (1, 2))]):
        assert select(config, nothing)[:2] == (None, [])


def test_without_early_epochs_there_are_no_claims_about_them(whole):
    (record,) = whole[0].records
    config = dataclasses.replace(CONFIG, epochs=(0, 4), match_epochs=(0, 4))
    chosen = dataclasses.replace(record, epochs=(record.epochs[0], record.epochs[3]))
    assert early_epochs(config.epochs) == []
    assert [claim.id for claim in EXPERIMENT.judge(config, [chosen])] == [
        "unaligned_barrier",
        "one_permutation_aligns_every_epoch_weights",
        "one_permutation_aligns_the_end_weights",
    ]


@pytest.fixture(scope="module")
def apart(whole, tmp_path_factory):
    """Two pairs measured in one run, and the results of a run of each of them."""
    folder, networks = tmp_path_factory.mktemp("apart"), whole[2]
    run(folder / "both", config=dataclasses.replace(CONFIG, replicates=2), **networks)
    run(folder / "second", config=dataclasses.replace(CONFIG, seed=2), **networks)
    first = networks["runs_dir"].parent
    return {
        "first": first / "results.json",
        **{name: folder / name / "results.json" for name in ("both", "second")},
    }


def test_merged_pairs_equal_one_run_of_all_pairs(apart, tmp_path):
    merged = UNDRAWN.merge([apart["second"], apart["first"]], output_dir=tmp_path, reporter=reporter())
    both = EXPERIMENT.load(apart["both"])
    assert merged.finished
    for name in ("config", "records", "summary", "claims", "environment"):
        assert getattr(merged, name) == getattr(both, name)
    assert stored(tmp_path).records == merged.records
    assert (tmp_path / EXPERIMENT.csv).is_file()
    # The same pairs again are no error, as a merge is cheap to repeat.
    UNDRAWN.merge([apart["first"], apart["second"]], output_dir=tmp_path, reporter=reporter())
    with pytest.raises(ConfigError, match="results.json is of another config; choose another folder"):
        UNDRAWN.merge([apart["first"]], output_dir=tmp_path, reporter=reporter())


def test_unfinished_pairs_are_merged_as_far_as_they_go(apart, tmp_path):
    second = EXPERIMENT.load(apart["second"])
    record = dataclasses.replace(second.records[0], epochs=second.records[0].epochs[1:])
    path = tmp_path / "begun.json"
    dataclasses.replace(second, records=[record], summary=None, claims=[]).save(path)
    text = io.StringIO()
    found = UNDRAWN.merge([apart["first"], path], output_dir=tmp_path / "out", reporter=reporter(text))
    assert not found.finished
    assert found.records == [EXPERIMENT.load(apart["first"]).records[0], record]
    assert "seeds 2 and 3: epochs 0; the pair is left out" in " ".join(text.getvalue().split())
    # The stored file is an unfinished run of both pairs, which --resume goes on with.
    assert stored(tmp_path / "out").records == found.records


def test_pairs_that_are_not_those_of_one_run_are_not_merged(apart, tmp_path):
    other = EXPERIMENT.load(apart["second"])
    path = tmp_path / "other.json"
    for change, message in (
        (
            {"algorithm": "paper"},
            r"cannot be merged:\n  .*other.json: algorithm: 'paper', 'best' in the first$",
        ),
        ({"seed": 6}, r"not those of one run: wanted the seeds \(0, 1\), \(2, 3\), got \(0, 1\), \(6, 7\)$"),
        ({"seed": 0}, r"wanted the seeds \(0, 1\), \(2, 3\), got \(0, 1\), \(0, 1\)$"),
    ):
        config = dataclasses.replace(other.config, **change)
        records = [dataclasses.replace(other.records[0], seeds=config.pairs[0].seeds)]
        dataclasses.replace(other, config=config, records=records).save(path)
        with pytest.raises(ConfigError, match=message):
            EXPERIMENT.merge([apart["first"], path], output_dir=tmp_path / "out", reporter=reporter())
    with pytest.raises(ConfigError, match="--merge: wanted the results.json of each run, got no file"):
        EXPERIMENT.merge([], output_dir=tmp_path / "out", reporter=reporter())
    assert not (tmp_path / "out").exists()


def test_measured_epochs_stay_for_other_runs(tmp_path):
    config = dataclasses.replace(CONFIG, epochs=(1, 4), match_epochs=(4,))
    runs = tmp_path / "runs"
    run(tmp_path / "first", config=config, runs_dir=runs, keep="measured")
    trained = [Trajectory(run_directory(runs, config.recipe, seed)) for seed in (0, 1)]
    assert [trajectory.epochs for trajectory in trained] == [(1, 4)] * 2
    other = dataclasses.replace(config, algorithm="paper")
    deadline = Steps(1_000)
    run(tmp_path / "second", config=other, runs_dir=runs, keep="measured", deadline=deadline)
    assert not [kind for kind in deadline.asked if "training" in kind]


def test_the_pair_of_the_paper_stops_and_goes_on(tmp_path, monkeypatch, capsys):
    """The binary itself, tiny: a second is less than its first steps take, and --resume finishes the pair."""
    monkeypatch.setattr(EXPERIMENT.__class__, "draw", lambda *_: None)
    tiny = ("--preset=digits", "--width=4", "--epochs=2", "--methods=weights", "--num_alphas=3", "--seed=4")

    def call(*arguments):
        with flagsaver.flagsaver():
            flags.FLAGS(["paper_pair", f"--output_dir={tmp_path}", *tiny, *arguments])
            paper_pair.main(["paper_pair"])
        return stored(tmp_path)

    assert not call("--time_limit=1").finished
    assert "stopped: after" in capsys.readouterr().out
    found = call("--resume", "--time_limit=600")
    assert found.finished
    assert [record.seeds for record in found.records] == [(4, 5)]
    assert (tmp_path / "results.json").stat().st_size < 2_000_000
