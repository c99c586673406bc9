"""Training and sweeps: images per second against PyTorch, and sweeps against bare forward passes.

  python -m benchmarks.throughput --output=throughput.json
  python -m benchmarks.throughput --cases=vgg16:8,resnet20:8 --rounds=3 --nopytorch

Training: an epoch of `rebasin.training.loop.build_epoch`, one compiled program, against a plain PyTorch loop
over the same network with the same weights (logits are compared first), batch 128, SGD with momentum and
weight decay, no augmentation. Images are random bytes, 28×28×1 for MLPs and 32×32×3 else. Sweep:
`build_sweep` over --alphas points against as many calls of one jitted forward pass, and against as many of
PyTorch's, all over the same images in batches of 500. Everything is warm and data are in memory. The
contestants of a comparison take turns at going first, and a ratio is the median over rounds of the ratio
within a round; above 1 ours is the faster. PyTorch has the faster of its two memory formats, and all cores.
The benchmark installs nothing: PyTorch has to be there.
"""

import json
import os
import pathlib
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags, logging

from benchmarks.contest import CASES, measure_case, median_ratio, parse_case
from benchmarks.torch_networks import import_torch
from experiments.harness.console import Reporter
from experiments.harness.results import describe_environment
from rebasin.errors import RebasinError

_CASES = flags.DEFINE_list("cases", list(CASES), "Networks as model:width.")
_ROUNDS = flags.DEFINE_integer("rounds", 5, "Rounds of each comparison.", lower_bound=1)
_STEPS = flags.DEFINE_integer("steps", 8, "Steps of an epoch; MLPs take ten times as many.", lower_bound=1)
_IMAGES = flags.DEFINE_integer("images", 500, "Images of a sweep; 0 leaves sweeps out.", lower_bound=0)
_ALPHAS = flags.DEFINE_integer("alphas", 25, "Points of a sweep.", lower_bound=2)
_PYTORCH = flags.DEFINE_bool("pytorch", True, "Whether to compare with PyTorch.")
_OUTPUT = flags.DEFINE_string("output", None, "JSON file for all seconds, versions and load averages.")


def _rows(results: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, ...]], ...]:
    """Rows of the two tables."""
    training, sweeps = [], []
    for result in results:
        seconds = result["training"]
        rates = [f"{result['examples'] / np.median(values):,.0f}" for values in seconds.values()]
        if "pytorch" in seconds:
            rates.append(f"{median_ratio(seconds['pytorch'], seconds['ours']):.2f}")
        training.append((result["case"], *rates))
        if "sweep" in result:
            seconds = result["sweep"]
            times = [f"{np.median(values):.2f}" for values in seconds.values()]
            ratios = [f"{median_ratio(v, seconds['ours']):.2f}" for k, v in seconds.items() if k != "ours"]
            sweeps.append((result["case"], *times, *ratios))
    return training, sweeps


def _report(results: Sequence[Mapping[str, Any]], alphas: int, reporter: Reporter) -> None:
    training, sweeps = _rows(results)
    pytorch = "pytorch" in results[0]["training"]
    reporter.say("\nTraining, images/s; the ratio is ours to PyTorch")
    reporter.table(("network", "ours", *(("PyTorch", "ratio") if pytorch else ())), training)
    if sweeps:
        reporter.say(f"\nSeconds of a sweep of {alphas} points; ratios of the others' seconds to ours")
        names = ("forward", "PyTorch") if pytorch else ("forward",)
        reporter.table(("network", "ours", *names, *(f"{name}/ours" for name in names)), sweeps)


def main(argv: list[str]) -> None:
    """Measures and reports; what the user got wrong is one line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)
    reporter = Reporter()
    about = {"environment": describe_environment(), "load_average": os.getloadavg(), "alphas": _ALPHAS.value}
    results = []
    try:
        cases = [parse_case(text) for text in _CASES.value]
        if _PYTORCH.value:
            about["pytorch"] = import_torch().__version__
        with reporter.stage("networks", len(cases)) as advance:
            for case in cases:
                results.append(
                    measure_case(
                        case,
                        rounds=_ROUNDS.value,
                        steps=_STEPS.value * (10 if case.model == "mlp" else 1),
                        images=_IMAGES.value,
                        alphas=_ALPHAS.value,
                        pytorch=_PYTORCH.value,
                    )
                )
                if _OUTPUT.value:
                    content = json.dumps({**about, "results": results}, indent=1)
                    pathlib.Path(_OUTPUT.value).write_text(content + "\n")
                advance()
    except RebasinError as error:
        sys.exit(f"error: {error}")
    _report(results, _ALPHAS.value, reporter)


if __name__ == "__main__":
    app.run(main)
