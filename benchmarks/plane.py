"""A grid of a plane through three networks against as many bare evaluations.

  python -m benchmarks.plane

`rebasin.build_plane_sweep` mixes three networks at every point of a grid and evaluates the mixture, all in
one compiled program. The bare evaluation is a compiled function of one network and the same data, called once
for each point; it is timed on some points and multiplied. Networks are random: the time does not depend on
what they have learned. A ratio of 1 means that mixing and collecting are free, and one below 1 that they cost
less than calling a compiled function does. On the CPU processor time is measured, in which other work on the
machine does not count.
"""

import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

import rebasin
from benchmarks.command import define_data_flags, run
from benchmarks.reports import build_reporter
from benchmarks.timing import median_ratio
from rebasin.batches import to_batches
from rebasin.models import build_model
from rebasin.training.data import load_dataset
from rebasin.training.loop import build_apply

__all__ = ["LIMIT", "compare"]

# The ratio that the grid should not exceed.
LIMIT = 1.2

# Dataset, model, width and points along each axis of the grid.
_CASES = (("digits", "mlp", 128, 51), ("mnist", "mlp", 512, 21), ("cifar10", "vgg16", 8, 11))


def compare(
    dataset: Any, model_name: str, width: int, size: int, *, examples: int, sample: int, rounds: int
) -> tuple[float, float]:
    """Time a grid and as many bare evaluations, one after the other in every round.

    Args:
      dataset: the data.
      model_name: name of the model.
      width: width of the model.
      size: points along each axis of the grid.
      examples: number of training examples on which networks are evaluated.
      sample: number of bare evaluations that are timed in each round.
      rounds: number of rounds.

    Returns:
      Seconds of the grid, the median of the rounds, and the median ratio to the bare evaluations.
    """
    model = build_model(model_name, width=width, num_classes=dataset.num_classes)
    metrics_fn = rebasin.classification_metrics(build_apply(model, dataset))
    data = jax.device_put(dataset.take(num_train=examples).train)
    image = np.zeros((1, *data.inputs.shape[1:]), np.float32)
    init = jax.jit(model.init)
    plane = rebasin.build_plane({f"network {i}": init(jax.random.key(i), image) for i in range(3)})
    grid = np.stack(np.meshgrid(*plane.grid(size)), axis=-1)
    sweep = rebasin.build_plane_sweep(metrics_fn)
    params = plane.anchors["network 0"]

    @jax.jit
    def evaluate(params: Any, batches: Any) -> Any:
        return jax.lax.map(lambda batch: metrics_fn(params, batch), batches)

    batches = jax.jit(lambda data: to_batches(data, 500))(data)

    def bare() -> None:
        for _ in range(sample):
            jax.device_get(evaluate(params, batches))

    clock = time.process_time if jax.default_backend() == "cpu" else time.perf_counter

    def timed(run: Callable[[], Any]) -> float:
        began = clock()
        run()
        return clock() - began

    def whole() -> Any:
        return sweep(plane, grid, data)

    for compiles in (whole, bare):
        compiles()
    seconds = [(timed(whole), timed(bare) * size * size / sample) for _ in range(rounds)]
    grids, bares = zip(*seconds, strict=True)
    return float(np.median(grids)), median_ratio(grids, bares)


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_list("datasets", [case[0] for case in _CASES], "The networks of which datasets are timed.")
    flags.DEFINE_integer("examples", 500, "Training examples for each evaluation.", lower_bound=1)
    flags.DEFINE_integer("sample", 121, "Bare evaluations that are timed in each round.", lower_bound=1)
    flags.DEFINE_integer("rounds", 3, "Rounds; the ratio is the median over them.", lower_bound=1)
    define_data_flags()


def main() -> None:
    """Time all cases and print their table."""
    options, reporter = flags.FLAGS, build_reporter()
    rows = []
    for name, model, width, size in (case for case in _CASES if case[0] in options.datasets):
        sizes = {"examples": options.examples, "sample": options.sample, "rounds": options.rounds}
        dataset = load_dataset(name, data_dir=options.data_dir)
        seconds, ratio = compare(dataset, model, width, size, **sizes)
        verdict = "yes" if ratio <= LIMIT else "no"
        rows.append([f"{model} {width}, {name}", f"{size}×{size}", f"{seconds:.1f}", f"{ratio:.3f}", verdict])
    reporter.table(["network", "grid", "seconds", "grid/bare", f"at most {LIMIT}"], rows)


if __name__ == "__main__":
    define_flags()
    run(main)
