"""Loss and error on segments between networks, on train and test data at once."""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec
from rebasin.training.data import Dataset, Split
from rebasin.training.loop import build_metrics
from rebasin.trees import is_weight, leaf_table

__all__ = [
    "METRICS",
    "Meter",
    "Segments",
    "barriers",
    "endpoints",
    "infer_model_spec",
    "means",
    "network_shapes",
]

METRICS = ("train_loss", "train_error", "test_loss", "test_error")


def network_shapes(model: Any, dataset: Dataset) -> tuple[Any, jax.ShapeDtypeStruct]:
    """The variables of a model as shapes, and an image of a dataset as one."""
    image = jax.ShapeDtypeStruct((1, *dataset.train.images.shape[1:]), np.float32)
    return jax.eval_shape(model.init, jax.random.key(0), image), image


def infer_model_spec(model: Any, dataset: Dataset) -> PermutationSpec:
    """The symmetries of a model on the images of a dataset."""
    return rebasin.infer_spec(model.apply, *network_shapes(model, dataset))


class Meter:
    """Measures segments between networks of one model.

    Train and test examples are evaluated together, in one compiled sweep, and told apart afterwards.

    Args:
      model: a Flax module.
      dataset: the data.
      num_alphas: points on each segment.
      num_eval: examples of each split, `None` for all.
    """

    def __init__(self, model: Any, dataset: Dataset, *, num_alphas: int, num_eval: int | None) -> None:
        train, test = (min(num_eval or len(s.labels), len(s.labels)) for s in (dataset.train, dataset.test))
        chosen = dataset.take(num_train=train, num_test=test)
        both = (np.concatenate(parts) for parts in zip(chosen.train, chosen.test, strict=True))
        self._data = jax.device_put(Split(*both))
        self._num_train = train
        self._sweep = rebasin.build_sweep(
            build_metrics(model, dataset.mean, dataset.std), num_alphas=num_alphas
        )

    def __call__(
        self, params_a: Any, params_b: Any, ends: rebasin.BarrierCurve | None = None
    ) -> rebasin.BarrierCurve:
        """The segment between two networks, with the metrics `METRICS`.

        Args:
          params_a: network A.
          params_b: network B.
          ends: a curve from here between networks that compute the same functions as A and B, whose values
            at both ends are used again.

        Returns:
          A curve of per-example values; those of train and test data differ in number.
        """
        n = self._num_train
        if ends is not None:
            joined = {
                name: np.concatenate(
                    [ends.examples[f"{split}_{name}"] for split in ("train", "test")], axis=1
                )
                for name in ("loss", "error")
            }
            ends = rebasin.BarrierCurve(ends.alphas, joined)
        curve = self._sweep(params_a, params_b, self._data, ends)
        parts = {"train": np.s_[:, :n], "test": np.s_[:, n:]}
        return rebasin.BarrierCurve(
            curve.alphas,
            {f"{s}_{name}": v[part] for s, part in parts.items() for name, v in curve.examples.items()},
        )


class Segments:
    """The segments between two networks under permutations of the second, each measured once.

    All share the ends of the segment without a permutation, as P[B] computes the same function as B.

    Args:
      meter: measures a segment.
      spec: the symmetries.
      params_a: network A.
      params_b: network B.

    Attributes:
      spec: as given.
      unaligned: the segment without a permutation.
    """

    def __init__(self, meter: Meter, spec: PermutationSpec, params_a: Any, params_b: Any) -> None:
        self.spec, self._meter, self._permute = spec, meter, _build_permute(spec)
        self._a, self._b = jax.device_put((params_a, params_b))
        self.unaligned = meter(self._a, self._b)
        self._curves: dict[bytes, rebasin.BarrierCurve] = {}

    def curve(self, permutation: Permutation) -> rebasin.BarrierCurve:
        """The segment from A to P[B]."""
        # Late in training the permutations of many epochs are the same.
        key = b"".join(np.asarray(row, np.int32).tobytes() for row in permutation.values())
        if key not in self._curves:
            moved = self._permute(permutation, self._b)
            self._curves[key] = self._meter(self._a, moved, self.unaligned)
        return self._curves[key]

    def distance(self, permutation: Permutation | None = None) -> float:
        """The Euclidean distance of A and P[B], or A and B, over all weights."""
        moved = self._b if permutation is None else self._permute(permutation, self._b)
        return float(_distance(self._a, moved))


@functools.lru_cache(maxsize=8)
def _build_permute(spec: PermutationSpec) -> Callable[[Permutation, Any], Any]:
    return jax.jit(functools.partial(rebasin.permute, spec))


@jax.jit
def _distance(params_a: Any, params_b: Any) -> jax.Array:
    b = leaf_table(params_b)
    squares = [jnp.sum((a - b[path]) ** 2) for path, a in leaf_table(params_a).items() if is_weight(path, a)]
    return jnp.sqrt(sum(squares))


def barriers(curve: rebasin.BarrierCurve) -> dict[str, float]:
    """The barrier of Eq. 1 in each metric."""
    return {metric: curve.barrier(metric).value for metric in METRICS}


def endpoints(curve: rebasin.BarrierCurve) -> dict[str, dict[str, float]]:
    """Each metric of network A and of network B."""
    return {m: {"a": float(values[-1]), "b": float(values[0])} for m, values in curve.means.items()}


def means(curve: rebasin.BarrierCurve) -> dict[str, list[float]]:
    """Each metric along the segment, from B to A."""
    return {metric: values.tolist() for metric, values in curve.means.items()}
