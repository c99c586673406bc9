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

import os
import pathlib
import platform
import sys
from collections.abc import Iterator
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from benchmarks.comparison import Outcome, compare, count_runs
from benchmarks.problems import MODELS, Problem, find_trained, gaussian_problems, train_digits
from benchmarks.tables import WIDTH, report, save
from experiments.harness.console import Reporter
from experiments.harness.networks import shared_runs
from experiments.harness.results import describe_environment
from rebasin.errors import RebasinError

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
_NUM_EVAL = flags.DEFINE_integer(
    "num_eval",
    1000,
    "Test examples for barriers, which take most of the time; 0 leaves them out.",
    lower_bound=0,
)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir", None, "Folder of trained networks; by default $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for weight_matching.json and weight_matching.txt.")
for _flag, _known in ((_MODELS, MODELS), (_WEIGHTS, WEIGHTS)):
    flags.register_validator(_flag, set(_known).issuperset, f"known: {', '.join(_known)}")


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
        runs_dir = shared_runs(_RUNS_DIR.value)
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
    given = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    config = {flag.name: flag.value for flag in given if not flag.name.endswith(("dir", "output"))}
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
    if not outcomes:
        sys.exit("error: nothing to compare")
    report(outcomes, reporter)


if __name__ == "__main__":
    app.run(main)
