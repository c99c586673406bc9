"""REPAIR and new norm statistics between trained networks with BatchNorm.

  python -m benchmarks.repair --output=results/repair
  python -m benchmarks.repair --model=resnet20_batchnorm --replicates=2 --num_test=1000

Pairs of networks of the preset cpu, trained where they are not in --runs_dir (half an hour and more for three
pairs of the default), are aligned by each method. Each segment is then measured on test data three times: as
it is, with the running statistics of the nearer network; with new statistics at every α
(`rebasin.build_norm_reset`); with REPAIR at every α (`rebasin.build_repair`). What either changes at the ends
is told as the largest difference of a logit, over 1,000 test examples and both ends, and the largest one of
error and loss. --output gets repair.json, with every curve, and the table as repair.txt; pairs that it holds
already, measured with the same flags, are not measured again.
"""

import functools
import json
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from absl import app, flags, logging
from rich.console import Console

from benchmarks.repair_bench import METHODS, UNALIGNED, Bench, report
from experiments.harness.console import Reporter
from experiments.harness.networks import run_directory, shared_runs
from experiments.harness.presets import choose_preset
from experiments.harness.results import describe_environment
from experiments.harness.serialisation import to_json
from rebasin.errors import RebasinError
from rebasin.training.data import load_dataset
from rebasin.training.loop import train

# Flags that say nothing of a pair.
_ELSEWHERE = frozenset({"replicates", "runs_dir", "data_dir", "output"})
_WIDTH = 100

_MODEL = flags.DEFINE_string("model", "vgg16_batchnorm", "A model with BatchNorm of the preset cpu.")
_REPLICATES = flags.DEFINE_integer("replicates", 3, "Pairs of networks.", lower_bound=1)
_ALPHAS = flags.DEFINE_integer("num_alphas", 11, "Points on a segment; odd.", lower_bound=3)
_NUM_TEST = flags.DEFINE_integer("num_test", 2000, "Test examples.", lower_bound=1)
_NUM_TRAIN = flags.DEFINE_integer(
    "num_train",
    2000,
    "Training examples, not augmented, for statistics and activation matching.",
    lower_bound=2,
)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir", None, "Folder of trained networks; by default $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for repair.json and repair.txt.")
flags.register_validator(_ALPHAS, lambda n: n % 2 == 1, "wanted an odd number, so that 1/2 is among them")


def _stored(directory: pathlib.Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of an earlier run with the same flags and recipe."""
    path = directory / "repair.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    same = all(content.get(key) == to_json(about[key]) for key in ("config", "recipe"))
    return content["pairs"] if same else []


def _save(directory: pathlib.Path, about: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "repair.json").write_text(json.dumps(to_json({**about, "pairs": pairs}), indent=1) + "\n")
    with (directory / "repair.txt").open("w") as file:
        report(pairs, Reporter(Console(file=file, width=_WIDTH)))


def main(argv: list[str]) -> None:
    """Trains what is missing and measures; what the user got wrong is one line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # JAX reports the backends that it looks for
    reporter = Reporter(Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False))
    runs_dir = shared_runs(_RUNS_DIR.value)
    given = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    try:
        recipe = choose_preset("cpu", _MODEL.value).build_recipe("trajectory")
        about = {
            "config": {flag.name: flag.value for flag in given if flag.name not in _ELSEWHERE},
            "recipe": vars(recipe),
            "environment": describe_environment(),
        }
        output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
        pairs = _stored(output, about)[: _REPLICATES.value] if output else []
        dataset = load_dataset(recipe.dataset, data_dir=_DATA_DIR.value)
        bench = Bench(
            recipe,
            dataset,
            num_alphas=_ALPHAS.value,
            num_test=_NUM_TEST.value,
            num_train=_NUM_TRAIN.value,
        )
        trained = functools.partial(train, recipe, dataset, keep=(), resume=True)
        for seeds in [[2 * i, 2 * i + 1] for i in range(len(pairs), _REPLICATES.value)]:
            with reporter.stage(f"seeds {seeds[0]} and {seeds[1]}", 3 + len(METHODS)) as advance:
                trees = []
                for seed in seeds:
                    trees.append(trained(seed=seed, directory=run_directory(runs_dir, recipe, seed)).last)
                    advance()
                a, b = trees
                found = {}
                for method in (UNALIGNED, *METHODS):
                    found[method] = bench.measure(a, bench.align(method, a, b))
                    advance()
            pairs.append({"seeds": seeds, "methods": found})
            if output:
                _save(output, about, pairs)
    except RebasinError as error:
        sys.exit(f"error: {error}")
    report(pairs, reporter)


if __name__ == "__main__":
    app.run(main)
