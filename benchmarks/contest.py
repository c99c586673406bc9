"""Training and sweeps in turns: ours, bare forward passes, and PyTorch's."""

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from benchmarks.timing import rotated
from benchmarks.torch_networks import build_forward, build_network, build_training
from rebasin import build_sweep
from rebasin.barrier import classification_metrics
from rebasin.batches import Batch
from rebasin.errors import ConfigError
from rebasin.models import build_model
from rebasin.training.loop import TrainingData, build_apply, build_epoch, build_init
from rebasin.training.recipes import Recipe

__all__ = ["CASES", "Case", "check_same", "compare", "measure_case", "median_ratio", "parse_case"]

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


def parse_case(text: str) -> Case:
    """Reads ``"vgg16:8"``.

    Raises:
      ConfigError: it does not name a model that this benchmark knows, or the width is not a positive number.
    """
    model, _, width = text.partition(":")
    if model not in ("mlp", "vgg16", "resnet20") or not width.isdecimal() or int(width) < 1:
        raise ConfigError(f"--cases: wanted model:width, model one of mlp, vgg16, resnet20; got {text!r}")
    return Case(model, int(width))


def compare(contestants: Mapping[str, Callable[[], Any]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each contestant in each round, after one call of each that does not count.

    They take turns at going first.
    """
    for run in contestants.values():
        run()
    seconds: dict[str, list[float]] = {name: [] for name in contestants}
    for turn in range(rounds):
        for name in rotated(contestants, turn):
            began = time.perf_counter()
            contestants[name]()
            seconds[name].append(time.perf_counter() - began)
    return seconds


def median_ratio(numerator: Sequence[float], denominator: Sequence[float]) -> float:
    """Median over rounds of the ratio within a round."""
    return float(np.median(np.divide(numerator, denominator)))


def measure_case(
    case: Case, *, rounds: int, steps: int, images: int, alphas: int, pytorch: bool
) -> dict[str, Any]:
    """Seconds of all contestants on one network.

    Args:
      case: the network.
      rounds: how often each contestant is timed.
      steps: of an epoch.
      images: of a sweep; 0 for none.
      alphas: points of a sweep.
      pytorch: whether PyTorch takes part.

    Returns:
      ``"training"`` and ``"sweep"``: by contestant, the seconds of each round; and ``"examples"``, the images
      of an epoch.

    Raises:
      ConfigError: PyTorch is wanted and missing, or its network computes something else.
    """
    rng = np.random.default_rng(0)
    n = steps * _BATCH
    split = Batch(
        rng.integers(0, 256, (max(n, images), *case.image), np.uint8),
        rng.integers(0, 10, max(n, images), np.int32),
    )
    training = Batch(split.inputs[:n], split.labels[:n])
    evaluation = Batch(split.inputs[:images], split.labels[:images])
    results: dict[str, Any] = {"case": f"{case.model}:{case.width}", "examples": n}
    if pytorch:
        check_same(case, _variables(case), split.inputs[:8])
    channels_last = pytorch and _faster_format(case, training)
    results["training"] = compare(_trainers(case, training, channels_last, pytorch=pytorch), rounds)
    if images:
        sweepers = _sweepers(case, evaluation, alphas, channels_last, pytorch=pytorch)
        results["sweep"] = compare(sweepers, rounds)
    return results


def _statistics(case: Case) -> tuple[np.ndarray, np.ndarray]:
    channels = case.image[2]
    return np.full(channels, _MEAN, np.float32), np.full(channels, _STD, np.float32)


def _recipe(case: Case) -> Recipe:
    dataset = "mnist" if case.model == "mlp" else "cifar10"
    return Recipe(dataset, case.model, width=case.width, epochs=1000, batch_size=_BATCH)


def _variables(case: Case, seed: int = 0) -> Any:
    model = build_model(case.model, width=case.width, num_classes=10)
    return jax.jit(model.init)(jax.random.key(seed), np.zeros((1, *case.image), np.float32))


def _faster_format(case: Case, data: Batch) -> bool:
    """Whether PyTorch trains this network faster with channels last."""
    if case.model == "mlp":
        return False
    few = Batch(data.inputs[: 2 * _BATCH], data.labels[: 2 * _BATCH])
    seconds = compare({str(last): _torch_training(case, few, last) for last in (False, True)}, 3)
    return min(seconds["True"]) < min(seconds["False"])


def _torch_training(case: Case, data: Batch, channels_last: bool) -> Callable[[], None]:
    network = build_network(case.model, _variables(case), channels_last=channels_last)
    return build_training(network, data.inputs, data.labels, batch_size=_BATCH, channels_last=channels_last)


def _trainers(
    case: Case, data: Batch, channels_last: bool, *, pytorch: bool
) -> dict[str, Callable[[], None]]:
    resident = TrainingData(*jax.device_put((data, *_statistics(case))))
    recipe = _recipe(case)
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
    resident = jax.device_put(data)
    model = build_model(case.model, width=case.width, num_classes=10)
    metrics_fn = classification_metrics(build_apply(model, _statistics(case)))
    a, b = _variables(case, 0), _variables(case, 1)
    sweep = build_sweep(metrics_fn, num_alphas=alphas, batch_size=_SWEEP_BATCH)
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
        forward = build_forward(network, data.inputs, batch_size=_SWEEP_BATCH, channels_last=channels_last)
        sweepers["pytorch"] = lambda: [forward() for _ in range(alphas)]
    return sweepers


def check_same(case: Case, variables: Any, images: np.ndarray) -> None:
    """Compares the logits of PyTorch's network with those of ours.

    Raises:
      ConfigError: they differ by more than rounding.
    """
    model = build_model(case.model, width=case.width, num_classes=10)
    ours = np.asarray(build_apply(model, _statistics(case))(variables, images))
    theirs = build_forward(build_network(case.model, variables), images, batch_size=len(images))()
    difference = np.abs(ours - theirs).max() / np.abs(ours).max()
    if not difference < 1e-3:
        raise ConfigError(
            f"{case.model}:{case.width}: PyTorch's network is another: logits differ by {difference:.1g} "
            "of the largest"
        )
