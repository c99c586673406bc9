"""Training and sweeps: images per second next to PyTorch, and sweeps next to bare forward passes.

  python -m benchmarks.throughput --output=throughput.json
  python -m benchmarks.throughput --cases=vgg16:8,resnet20:8 --rounds=3 --nopytorch

*Training*: an epoch of `rebasin.training.loop.build_epoch`, one compiled program, next to a plain PyTorch
loop over the same network with the same weights, whose logits are compared first. Both use batches of 128,
SGD with momentum and weight decay, and no augmentation. Images are random bytes, 28×28×1 for MLPs and
32×32×3 for the others.

*Sweep*: `build_sweep` over --alphas points next to as many calls of one jitted forward pass, and to as many
of PyTorch's, all over the same images in batches of 500.

All times are warm, and the data are in memory. The contestants of a comparison take turns at going first. A
ratio is the median over rounds of the ratio within a round; above 1 ours is faster. PyTorch gets the faster
of its two memory formats, and all cores. The benchmark installs nothing: PyTorch has to be there already, or
--nopytorch leaves it out. The defaults take some minutes on two CPU cores.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import rebasin
from benchmarks.command import run
from benchmarks.reports import Reporter, build_reporter, describe_machine
from benchmarks.timing import alternate, median_ratio
from benchmarks.torch_networks import build_forward, build_network, build_training, import_torch
from rebasin import Batch, classification_metrics
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.loop import TrainingData, build_apply, build_epoch, build_init
from rebasin.training.recipes import Recipe

__all__ = ["CASES", "Case", "check_same", "measure_case", "parse_case"]

CASES = ("mlp:512", "vgg16:8", "vgg16:16", "resnet20:8", "resnet20:16")
_BATCH = 128
_SWEEP_BATCH = 500
_MEAN, _STD = 127.5, 63.75


class Case(NamedTuple):
    """A network of `rebasin.models`."""

    model: str
    width: int

    @property
    def image(self) -> tuple[int, int, int]:
        """Height, width and channels of its images."""
        return (28, 28, 1) if self.model == "mlp" else (32, 32, 3)

    @property
    def statistics(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation by which the pixels of each channel are normalised."""
        channels = self.image[2]
        return np.full(channels, _MEAN, np.float32), np.full(channels, _STD, np.float32)

    def build_apply(self) -> Callable[[Any, Any], jax.Array]:
        """Return ``apply_fn(params, images)``, the logits of uint8 images."""
        return build_apply(build_model(self.model, width=self.width, num_classes=10), self.statistics)

    def draw_variables(self, seed: int = 0) -> Any:
        """Return a freshly initialised network."""
        model = build_model(self.model, width=self.width, num_classes=10)
        return jax.jit(model.init)(jax.random.key(seed), np.zeros((1, *self.image), np.float32))


def parse_case(text: str) -> Case:
    """Read ``"vgg16:8"``.

    Raises:
      ConfigError: it does not name a model that this benchmark knows, or the width is not a positive number.
    """
    model, _, width = text.partition(":")
    if model not in ("mlp", "vgg16", "resnet20") or not width.isdecimal() or int(width) < 1:
        raise ConfigError(f"--cases: wanted model:width, model one of mlp, vgg16, resnet20; got {text!r}")
    return Case(model, int(width))


def measure_case(
    case: Case, *, rounds: int, steps: int, images: int, alphas: int, pytorch: bool
) -> dict[str, Any]:
    """Measure the seconds of all contestants on one network.

    Args:
      case: the network.
      rounds: how often each contestant is timed.
      steps: number of steps of an epoch.
      images: number of images of a sweep; 0 leaves the sweep out.
      alphas: number of points of a sweep.
      pytorch: whether PyTorch takes part.

    Returns:
      ``"training"`` and ``"sweep"`` hold, by contestant, the seconds of each round; ``"examples"`` is the
      number of images of an epoch, ``"case"`` the name of the network.

    Raises:
      ConfigError: PyTorch is wanted and missing, or its network computes something else.
    """
    rng = np.random.default_rng(0)
    n = steps * _BATCH
    split = Batch(
        rng.integers(0, 256, (max(n, images), *case.image), np.uint8),
        rng.integers(0, 10, max(n, images), np.int32),
    )
    training, evaluation = _first(split, n), _first(split, images)
    results: dict[str, Any] = {"case": f"{case.model}:{case.width}", "examples": n}
    if pytorch:
        check_same(case, case.draw_variables(), split[0][:8])
    channels_last = pytorch and _faster_format(case, training)
    results["training"] = alternate(_trainers(case, training, channels_last, pytorch=pytorch), rounds)
    if images:
        sweepers = _sweepers(case, evaluation, alphas, channels_last, pytorch=pytorch)
        results["sweep"] = alternate(sweepers, rounds)
    return results


def _first(split: Batch, count: int) -> Batch:
    """Return the first examples."""
    return jax.tree.map(lambda x: x[:count], split)


def _faster_format(case: Case, data: Batch) -> bool:
    """Return whether PyTorch trains this network faster with channels last."""
    if case.model == "mlp":
        return False
    few = _first(data, 2 * _BATCH)
    seconds = alternate({str(last): _torch_training(case, few, last) for last in (False, True)}, 3)
    return min(seconds["True"]) < min(seconds["False"])


def _torch_training(case: Case, data: Batch, channels_last: bool) -> Callable[[], None]:
    network = build_network(case.model, case.draw_variables(), channels_last=channels_last)
    return build_training(network, *data, batch_size=_BATCH, channels_last=channels_last)


def _trainers(
    case: Case, data: Batch, channels_last: bool, *, pytorch: bool
) -> dict[str, Callable[[], None]]:
    """Return the contestants that train for an epoch."""
    resident = TrainingData(*jax.device_put((data, *case.statistics)))
    dataset = "mnist" if case.model == "mlp" else "cifar10"
    recipe = Recipe(dataset, case.model, width=case.width, epochs=1000, batch_size=_BATCH)
    run_epoch = build_epoch(recipe, 10)
    # Early epochs of the warm-up: training on noise must not diverge while it is timed.
    state = [build_init(recipe, 10)(jax.random.key(0), resident)]

    def ours() -> None:
        state[0], _ = jax.block_until_ready(run_epoch(state[0], 1, jax.random.key(1), resident))

    trainers = {"ours": ours}
    if pytorch:
        trainers["pytorch"] = _torch_training(case, data, channels_last)
    return trainers


def _sweepers(
    case: Case, data: Batch, alphas: int, channels_last: bool, *, pytorch: bool
) -> dict[str, Callable[[], Any]]:
    """Return the contestants that evaluate a path."""
    resident = jax.device_put(data)
    metrics_fn = classification_metrics(case.build_apply())
    a, b = case.draw_variables(0), case.draw_variables(1)
    sweep = rebasin.build_sweep(metrics_fn, num_alphas=alphas, batch_size=_SWEEP_BATCH)
    bare = jax.jit(metrics_fn)
    batches = [
        jax.tree.map(lambda x, start=start: x[start : start + _SWEEP_BATCH], resident)
        for start in range(0, len(data.labels), _SWEEP_BATCH)
    ]

    def forward_passes() -> None:
        for _ in range(alphas):
            jax.block_until_ready([bare(a, batch) for batch in batches])

    sweepers: dict[str, Callable[[], Any]] = {
        "ours": lambda: sweep(a, b, resident),
        "forward passes": forward_passes,
    }
    if pytorch:
        network = build_network(case.model, a, channels_last=channels_last)
        forward = build_forward(network, data[0], batch_size=_SWEEP_BATCH, channels_last=channels_last)
        sweepers["pytorch"] = lambda: [forward() for _ in range(alphas)]
    return sweepers


def check_same(case: Case, variables: Any, images: np.ndarray) -> None:
    """Compare the logits of PyTorch's network with those of ours.

    Raises:
      ConfigError: they differ by more than rounding.
    """
    ours = np.asarray(case.build_apply()(variables, images))
    theirs = build_forward(build_network(case.model, variables), images, batch_size=len(images))()
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not difference < 1e-3:
        raise ConfigError(
            f"{case.model}:{case.width}: PyTorch's network is another: logits differ by {difference:.1g} "
            "of the largest"
        )


def _rows(results: Sequence[Mapping[str, Any]]) -> tuple[list[tuple[str, ...]], ...]:
    """Return the rows of the table of training and of the table of sweeps."""
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


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_list("cases", list(CASES), "Networks as model:width.")
    flags.DEFINE_integer("rounds", 5, "Rounds of each comparison.", lower_bound=1)
    flags.DEFINE_integer("steps", 8, "Steps of an epoch; MLPs take ten times as many.", lower_bound=1)
    flags.DEFINE_integer("images", 500, "Images of a sweep; 0 leaves sweeps out.", lower_bound=0)
    flags.DEFINE_integer("alphas", 25, "Points of a sweep.", lower_bound=2)
    flags.DEFINE_bool("pytorch", True, "Whether to compare with PyTorch.")
    flags.DEFINE_string("output", None, "JSON file for all seconds, versions and load averages.")


def main() -> None:
    """Measure all cases, store the numbers after each, and print the tables."""
    options = flags.FLAGS
    reporter = build_reporter()
    about: dict[str, Any] = {**describe_machine(), "alphas": options.alphas}
    cases = [parse_case(text) for text in options.cases]
    if options.pytorch:
        about["pytorch"] = import_torch().__version__
    results = []
    with reporter.stage("networks", len(cases)) as advance:
        for case in cases:
            results.append(
                measure_case(
                    case,
                    rounds=options.rounds,
                    steps=options.steps * (10 if case.model == "mlp" else 1),
                    images=options.images,
                    alphas=options.alphas,
                    pytorch=options.pytorch,
                )
            )
            if options.output:
                content = json.dumps({**about, "results": results}, indent=1)
                pathlib.Path(options.output).write_text(content + "\n")
            advance()
    _report(results, options.alphas, reporter)


if __name__ == "__main__":
    define_flags()
    run(main)
