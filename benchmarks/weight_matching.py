"""Weight matching against git-re-basin's loop: time, objective and barrier.

  python -m benchmarks.weight_matching --output=results/bench
  python -m benchmarks.weight_matching --models=mlp,vgg16 --max_width=16 --repeats=3 --first_calls=0

Pairs of networks with Gaussian weights and pairs trained by the experiments (those found in --runs_dir; MLPs
on digits are trained here, which takes seconds). Every method gets the same pair with the same key and they
take turns at going first. Warm: a call of each has gone before. First call: in a process of its own, with
networks, backend and spec in place; what remains is compiling and matching. A ratio is that of the medians.
Sweeps of ours solve only groups whose neighbours changed, and do not count the pass in order of depth; the
peer's count the last one, which finds nothing.
Objectives and barriers of all methods are computed by the same code. --output gets weight_matching.json,
with every run, hardware and versions, and the tables as weight_matching.txt.
"""

import dataclasses
import json
import os
import pathlib
import platform
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from benchmarks.comparison import UNALIGNED, Outcome, compare, count_runs, tally
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.problems import MODELS, Problem, find_trained, gaussian_problems, train_digits
from experiments.console import Reporter
from experiments.results import describe_environment
from rebasin.errors import RebasinError

__all__ = ["report", "save"]

WIDTH = 100
WEIGHTS = ("gaussian", "trained")

_MODELS = flags.DEFINE_list("models", list(MODELS), "Architectures.")
_WEIGHTS = flags.DEFINE_list("weights", list(WEIGHTS), "Which weights.")
_MAX_WIDTH = flags.DEFINE_integer(
    "max_width",
    64,
    "Widest VGG-16 and ResNet-20 with Gaussian weights; 256 adds ResNet-20 ×16, which is long.",
)
_REPEATS = flags.DEFINE_integer("repeats", 5, "Pairs with Gaussian weights.", lower_bound=1)
_KEYS = flags.DEFINE_integer("keys", 5, "Seeds of the matching for each trained pair.", lower_bound=1)
_FIRST = flags.DEFINE_integer("first_calls", 3, "First calls of each method that are timed.", lower_bound=0)
_NUM_EVAL = flags.DEFINE_integer("num_eval", 1000, "Test examples for barriers.", lower_bound=1)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir", None, "Folder of trained networks; by default $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for weight_matching.json and weight_matching.txt.")
for _flag, _known in ((_MODELS, MODELS), (_WEIGHTS, WEIGHTS)):
    flags.register_validator(_flag, set(_known).issuperset, f"known: {', '.join(_known)}")


def report(outcomes: Sequence[Outcome], reporter: Reporter) -> None:
    """Prints the tables, and every case in which ours ends lower than the peer."""
    reporter.say(f"\nSeconds, medians over pairs and keys; ratio: {OURS} / {PEER}")
    reporter.table(
        (
            "\nmodel",
            "\nweights",
            f"warm\n{OURS}",
            f"\n{PEER}",
            "\nratio",
            f"first\n{OURS}",
            f"\n{PEER}",
            "\nratio",
            "sweeps",
            "solves",
        ),
        [_time_row(outcome) for outcome in outcomes],
    )
    reporter.say(
        f"\nObjective ⟨A, P[B]⟩; its mean against {PEER}'s; on how many pairs and keys it is higher, equal\n"
        "and lower; barriers on test data, mean ± standard deviation over pairs"
    )
    reporter.table(
        ("model", "weights", "method", "objective", "against", "+/=/-", "loss barrier", "error barrier %"),
        [row for outcome in outcomes for row in _quality_rows(outcome)],
    )
    reporter.say(f"\nEvery case in which {OURS} ends lower than {PEER}:")
    losses = [line for outcome in outcomes for line in _losses(outcome)]
    for line in losses or ["none"]:
        reporter.say(f"  {line}")


def _time_row(outcome: Outcome) -> tuple[str, ...]:
    ours, peer = (outcome.median(method, "seconds") for method in (OURS, PEER))
    counts = [
        "/".join(f"{outcome.median(method, field):.0f}" for method in (OURS, PEER))
        for field in ("sweeps", "solves")
    ]
    first = ["", "", ""]
    if outcome.first[OURS]:
        medians = [sorted(outcome.first[method])[len(outcome.first[method]) // 2] for method in (OURS, PEER)]
        first = [*(f"{seconds:.2f}" for seconds in medians), f"{medians[0] / medians[1]:.2f}"]
    warm = [f"{ours:.3g}", f"{peer:.3g}", f"{ours / peer:.2f}"]
    return outcome.model, outcome.weights, *warm, *first, *counts


def _quality_rows(outcome: Outcome) -> Iterator[tuple[str, ...]]:
    reference, _ = outcome.mean(PEER, "objective") or (0.0, 0.0)
    for i, method in enumerate((UNALIGNED, *METHODS)):
        objective, _ = outcome.mean(method, "objective") or (0.0, 0.0)
        against = counts = ""
        if method not in (UNALIGNED, PEER):
            against = f"{100 * (objective / reference - 1):+.3f} %"
            score = tally(outcome, method)
            counts = f"{score.higher}/{score.equal}/{len(score.lower)}"
        where = (outcome.model, outcome.weights) if i == 0 else ("", "")
        barriers = [
            _spread(outcome.mean(method, "loss_barrier"), 1.0, 4),
            _spread(outcome.mean(method, "error_barrier"), 100.0, 1),
        ]
        yield *where, method, f"{objective:.6g}", against, counts, *barriers


def _spread(values: tuple[float, float] | None, scale: float, digits: int) -> str:
    if values is None:
        return ""
    mean, deviation = (f"{scale * value:.{digits}f}" for value in values)
    return mean if deviation == "nan" else f"{mean} ± {deviation}"


def _losses(outcome: Outcome) -> Iterator[str]:
    for ours, peer in tally(outcome, OURS).lower:
        relative = 100 * (ours.objective / peer.objective - 1)
        yield (
            f"{outcome.model}, {outcome.weights}, {ours.pair}, key {ours.key}: {ours.objective:.7g} against "
            f"{peer.objective:.7g} ({relative:+.4f} %)"
        )


def save(outcomes: Sequence[Outcome], directory: pathlib.Path, about: dict[str, Any]) -> None:
    """Writes ``weight_matching.json`` and ``weight_matching.txt``."""
    directory.mkdir(parents=True, exist_ok=True)
    content = {**about, "outcomes": [dataclasses.asdict(outcome) for outcome in outcomes]}
    (directory / "weight_matching.json").write_text(json.dumps(content, indent=1) + "\n")
    with (directory / "weight_matching.txt").open("w") as file:
        console = Reporter(Console(file=file, width=WIDTH))
        console.say(f"{about['hardware']['processor']}, {about['hardware']['cores']} cores")
        report(outcomes, console)


def _hardware() -> dict[str, Any]:
    """What timings depend on; load averages tell whether something else was running."""
    processor = platform.processor() or platform.machine()
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if cpuinfo.exists():
        names = [
            line.split(":", 1)[1].strip() for line in cpuinfo.read_text().splitlines() if "model name" in line
        ]
        processor = names[0] if names else processor
    return {"processor": processor, "cores": os.cpu_count(), "load_average": os.getloadavg()}


def _problems(reporter: Reporter) -> Iterator[Problem]:
    models, weights = _MODELS.value, _WEIGHTS.value
    if "gaussian" in weights:
        yield from gaussian_problems(models, pairs=_REPEATS.value, max_width=_MAX_WIDTH.value)
    if "trained" in weights:
        default = os.environ.get("REBASIN_RUNS_DIR", "~/.cache/rebasin/runs")
        runs_dir = pathlib.Path(_RUNS_DIR.value or default).expanduser()
        if "mlp" in models:
            train_digits(runs_dir, range(6), reporter)
        yield from find_trained(
            models,
            runs_dir,
            keys=_KEYS.value,
            num_eval=_NUM_EVAL.value,
            data_dir=_DATA_DIR.value,
            say=reporter.say,
        )


def main(argv: list[str]) -> None:
    """Runs the comparison; what the user got wrong is one line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # JAX reports the backends that it looks for
    # Wider than a log's 80 columns, so that the table stays whole.
    reporter = Reporter(Console(width=None if sys.stdout.isatty() else WIDTH, highlight=False))
    config = {flag.name: flag.value for flag in flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])}
    about = {"config": config, "environment": describe_environment(), "hardware": _hardware()}
    outcomes: list[Outcome] = []
    try:
        for problem in _problems(reporter):
            total = count_runs(problem, first_calls=_FIRST.value)
            with reporter.stage(f"{problem.model}, {problem.weights}", total) as advance:
                outcomes.append(compare(problem, first_calls=_FIRST.value, advance=advance))
            if _OUTPUT.value:
                save(outcomes, pathlib.Path(_OUTPUT.value), about)
    except RebasinError as error:
        sys.exit(f"error: {error}")
    report(outcomes, reporter)


if __name__ == "__main__":
    app.run(main)
