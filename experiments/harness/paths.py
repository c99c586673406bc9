"""Loss and error on paths between networks, on training and test data at once."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import rebasin
from experiments.harness.record import METRICS, Endpoints, Metrics, PathCurves
from rebasin.arithmetic import distance
from rebasin.barrier import BarrierCurve
from rebasin.permutation import Permutation, compiled_permute
from rebasin.spec import PermutationSpec
from rebasin.training.data import Dataset

__all__ = [
    "PathMeter",
    "Paths",
    "barriers",
    "endpoints",
    "infer_model_spec",
    "network_shapes",
    "path_curves",
]


def network_shapes(model: Any, dataset: Dataset) -> tuple[Any, jax.ShapeDtypeStruct]:
    """Return the shapes of a model's variables and of one image of a dataset."""
    image = jax.ShapeDtypeStruct((1, *dataset.train.inputs.shape[1:]), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image), image


def infer_model_spec(model: Any, dataset: Dataset) -> PermutationSpec:
    """Infer the symmetries of a model on the images of a dataset."""
    return rebasin.infer_spec(model.apply, *network_shapes(model, dataset))


class PathMeter:
    """Measures paths between networks of one model.

    Training and test examples are evaluated together, in one compiled sweep, and told apart afterwards.

    Args:
      metrics_fn: ``(params, batch) -> {"loss": [n], "error": [n]}``.
      dataset: the data to measure on.
      num_alphas: number of points on each path.
      num_eval: number of examples of each split, `None` for all.
      apply_fn: ``(params, images) -> logits``, where `tempered` is called.
    """

    def __init__(
        self,
        metrics_fn: Any,
        dataset: Dataset,
        *,
        num_alphas: int,
        num_eval: int | None,
        apply_fn: Callable[..., jax.Array] | None = None,
    ) -> None:
        train, test = (min(num_eval or len(s.labels), len(s.labels)) for s in (dataset.train, dataset.test))
        chosen = dataset.take(num_train=train, num_test=test)
        both = jax.tree.map(lambda *parts: np.concatenate(parts), chosen.train, chosen.test)
        self._data = jax.device_put(both)
        self._num_train = train
        self._sweep = rebasin.build_sweep(metrics_fn, num_alphas=num_alphas)
        if apply_fn is not None:
            # On the training examples on which paths are measured too.
            temperature = rebasin.build_temperature(apply_fn, chosen.train)
            self._tempered_sweep = rebasin.build_sweep(
                temperature.metrics_fn, num_alphas=num_alphas, prepare=temperature.prepare
            )

    def tempered(self, params_a: Any, params_b: Any) -> tuple[BarrierCurve, BarrierCurve]:
        """Measure the path between two networks, as it is and with a temperature fitted at every alpha.

        Returns:
          Two curves in all `METRICS`, of which the errors are the same.
        """
        curve = self._tempered_sweep(params_a, params_b, self._data)
        plain, tempered = (
            BarrierCurve(curve.alphas, {"loss": curve.examples[loss], "error": curve.examples["error"]})
            for loss in ("loss", "tempered_loss")
        )
        return self._split(plain), self._split(tempered)

    def __call__(self, params_a: Any, params_b: Any, ends: BarrierCurve | None = None) -> BarrierCurve:
        """Measure the path between two networks in all `METRICS`.

        Args:
          params_a: network A.
          params_b: network B.
          ends: a curve of this meter between networks that compute the same functions as A and B. Its values
            at both ends are used again.

        Returns:
          A curve of per-example values; those of training and test data differ in number.
        """
        if ends is not None:
            joined = {
                name: np.concatenate(
                    [ends.examples[f"{split}_{name}"] for split in ("train", "test")], axis=1
                )
                for name in ("loss", "error")
            }
            ends = BarrierCurve(ends.alphas, joined)
        return self._split(self._sweep(params_a, params_b, self._data, ends))

    def _split(self, curve: BarrierCurve) -> BarrierCurve:
        """Tell training from test examples."""
        n = self._num_train
        parts = {"train": np.s_[:, :n], "test": np.s_[:, n:]}
        return BarrierCurve(
            curve.alphas,
            {f"{s}_{name}": v[part] for s, part in parts.items() for name, v in curve.examples.items()},
        )


class Paths:
    """The paths between network A and network B under permutations of B, each measured once.

    P[B] computes the same function as B, so that all paths share the ends of the path between A and B.

    Args:
      meter: measures a path.
      spec: the symmetries of the networks.
      params_a: network A.
      params_b: network B.
      unaligned: the path between A and B, where it was measured before.

    Attributes:
      unaligned: the path between A and B.
    """

    def __init__(
        self,
        meter: PathMeter,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        unaligned: BarrierCurve | None = None,
    ) -> None:
        self._meter, self._spec = meter, spec
        self._params_a, self._params_b = jax.device_put((params_a, params_b))
        self.unaligned = meter(self._params_a, self._params_b) if unaligned is None else unaligned
        self._curves: dict[bytes, BarrierCurve] = {}
        self._barriers: dict[bytes, Metrics[float]] = {}

    def curve(self, permutation: Permutation) -> BarrierCurve:
        """Return the path between A and P[B]."""
        key = _key(permutation)
        if key not in self._curves:
            self._curves[key] = self._meter(self._params_a, self._moved(permutation), self.unaligned)
        return self._curves[key]

    def barriers(self, permutation: Permutation) -> Metrics[float]:
        """Return the barriers of the path between A and P[B]."""
        key = _key(permutation)
        if key not in self._barriers:
            self._barriers[key] = barriers(self.curve(permutation))
        return self._barriers[key]

    def remember(self, permutation: Permutation, measured: Metrics[float]) -> None:
        """Take over the barriers of the path between A and P[B], which were measured before."""
        self._barriers[_key(permutation)] = measured

    def distance(self, permutation: Permutation | None = None) -> float:
        """Return the Euclidean distance of A and P[B], or of A and B, over all weights."""
        return distance(self._params_a, self._moved(permutation))

    def _moved(self, permutation: Permutation | None) -> Any:
        if permutation is None:
            return self._params_b
        return compiled_permute(self._spec, permutation, self._params_b)


def _key(permutation: Permutation) -> bytes:
    """Return the same for equal permutations, such as those of many epochs late in training."""
    return b"".join(np.asarray(row, np.int32).tobytes() for row in permutation.values())


def barriers(curve: BarrierCurve) -> Metrics[float]:
    """Return the barrier of Eq. 1 in each metric."""
    return Metrics(**{metric: curve.barrier(metric).value for metric in METRICS})


def endpoints(curve: BarrierCurve) -> Endpoints[float]:
    """Return each metric of network A and of network B."""
    means = curve.means
    a, b = ({metric: float(means[metric][i]) for metric in METRICS} for i in (-1, 0))
    return Endpoints(Metrics(**a), Metrics(**b))


def path_curves(curve: BarrierCurve) -> PathCurves[float]:
    """Return each metric along the path, from B to A."""
    return PathCurves(**{metric: tuple(curve.means[metric].tolist()) for metric in METRICS})
