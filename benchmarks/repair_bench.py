"""What is measured between two networks with BatchNorm: each matching, as it is and corrected."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

import rebasin
from benchmarks.timing import mean_and_deviation
from experiments.harness.console import Reporter
from rebasin.models import build_model
from rebasin.training.data import Dataset, Split, normalise
from rebasin.training.loop import classification_metrics
from rebasin.training.recipes import Recipe

__all__ = ["Bench", "METHODS", "UNALIGNED", "VARIANTS", "report"]

UNALIGNED = "none"
METHODS = ("weights", "activations")
VARIANTS = ("as is", "reset", "REPAIR")
_NUM_LOGITS = 1000  # in one batch


class _Measured(NamedTuple):
    """A segment on test data: its curve, and the logits at both ends."""

    curve: rebasin.BarrierCurve
    ends: np.ndarray


class Bench:
    """What is the same for all pairs: the function, its spec, the data and the compiled measurements.

    Args:
      recipe: of the networks.
      dataset: the data.
      num_alphas: points on each segment.
      num_test: test examples.
      num_train: training examples for statistics and activation matching.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, *, num_alphas: int, num_test: int, num_train: int
    ) -> None:
        model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
        chosen = dataset.take(num_train=num_train, num_test=num_test)
        self.images, self.test = jax.device_put((chosen.train.images, chosen.test))
        self.num_alphas = num_alphas

        def function(tree: Any, images: Any) -> Any:
            return model.apply(tree, normalise(images, dataset.mean, dataset.std))

        def update(tree: Any, images: Any) -> Any:
            inputs = normalise(images, dataset.mean, dataset.std)
            return tree | model.apply(tree, inputs, mutable=["batch_stats"])[1]

        def plain_logits(tree: Any, images: Any, extra: Any = None) -> Any:
            del extra
            return function(tree, images)

        def with_statistics(tree: Any, images: Any, reset: Any) -> Any:
            del tree
            return function(reset, images)

        self.function = function
        image = jax.ShapeDtypeStruct((1, *dataset.test.images.shape[1:]), np.uint8)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), jnp.float32(x)), image)
        self.spec = rebasin.infer_spec(function, variables, image)
        reset = rebasin.build_norm_reset(update, self.images)
        self._as_is = self._build_measure(plain_logits, Partial(lambda tree, alpha: None))
        self._reset = self._build_measure(with_statistics, reset)

    def _build_measure(
        self, apply: Callable[..., Any], prepare: Callable[[Any, Any], Any]
    ) -> Callable[[Any, Any], _Measured]:
        """A function that measures a segment with ``apply(tree, images, prepare(tree, alpha))``."""

        def metrics(tree: Any, batch: Split, extra: Any) -> Mapping[str, jax.Array]:
            return classification_metrics(apply(tree, batch.images, extra), batch.labels)

        sweep = rebasin.build_sweep(metrics, num_alphas=self.num_alphas, prepare=prepare)

        @jax.jit
        def logits(prepare: Any, tree: Any, alpha: Any, images: Any) -> Any:
            return apply(tree, images, prepare(tree, alpha))

        def measure(a: Any, b: Any) -> _Measured:
            images = self.test.images[:_NUM_LOGITS]
            ends = [np.asarray(logits(prepare, tree, alpha, images)) for tree, alpha in ((b, 0.0), (a, 1.0))]
            return _Measured(sweep(a, b, self.test), np.stack(ends))

        return measure

    def align(self, method: str, a: Any, b: Any) -> Any:
        """B in the order of A's units; as it is for `UNALIGNED`."""
        if method == UNALIGNED:
            return b
        needs: dict[str, Any] = {"activations": {"function": self.function, "data": self.images}}
        match = rebasin.match(self.spec, a, b, method, key=jax.random.key(0), **needs.get(method, {}))
        return rebasin.permute(self.spec, match.permutation, b)

    def measure(self, a: Any, b: Any) -> dict[str, dict[str, Any]]:
        """The segment in every variant, and what each changes at the ends."""
        repair = rebasin.build_repair(self.spec, a, b, self.function, self.images)
        repaired = self._build_measure(repair.apply, repair.prepare)
        measures = (self._as_is, self._reset, repaired)
        found = {variant: measure(a, b) for variant, measure in zip(VARIANTS, measures, strict=True)}
        return {variant: _describe(measured, found["as is"]) for variant, measured in found.items()}


def _describe(measured: _Measured, as_is: _Measured) -> dict[str, Any]:
    curve, middle = measured.curve, len(measured.curve.alphas) // 2

    def at_ends(values: np.ndarray, others: np.ndarray) -> float:
        return float(np.max(np.abs(values - others)[[0, -1]]))

    return {
        "midpoint_accuracy": 1 - float(curve.error[middle]),
        "error_barrier": curve.error_barrier.value,
        "loss_barrier": curve.loss_barrier.value,
        "end_accuracy": 1 - float(np.mean(curve.error[[0, -1]])),
        "end_logit_difference": float(np.max(np.abs(measured.ends - as_is.ends))),
        "end_error_difference": at_ends(curve.error, as_is.curve.error),
        "end_loss_difference": at_ends(curve.loss, as_is.curve.loss),
        "error": curve.error.tolist(),
        "loss": curve.loss.tolist(),
    }


_COLUMNS: Mapping[str, tuple[str, float, int]] = {
    "midpoint_accuracy": ("midpoint\naccuracy", 100, 1),
    "error_barrier": ("error\nbarrier", 100, 1),
    "loss_barrier": ("loss\nbarrier", 1, 3),
    "end_accuracy": ("accuracy\nat ends", 100, 1),
}
_DIFFERENCES = ("end_logit_difference", "end_error_difference", "end_loss_difference")


def report(pairs: Sequence[Mapping[str, Any]], reporter: Reporter) -> None:
    """Prints the table."""
    reporter.say(
        f"\nTest data, mean±standard deviation over {len(pairs)} pairs, accuracy and error in %. The last\n"
        "columns are the largest differences that a variant makes at the ends, over all pairs"
    )
    header = ["\nmatching", "\nvariant", *(name for name, _, _ in _COLUMNS.values())]
    header += ["ends:\nlogit", "\nerror", "\nloss"]
    rows = []
    for method in pairs[0]["methods"]:
        for variant in VARIANTS:
            records = [pair["methods"][method][variant] for pair in pairs]
            cells = [
                mean_and_deviation([record[field] for record in records], scale, digits)
                for field, (_, scale, digits) in _COLUMNS.items()
            ]
            cells += [f"{max(record[field] for record in records):.2g}" for field in _DIFFERENCES]
            rows.append([method if variant == VARIANTS[0] else "", variant, *cells])
    reporter.table(header, rows)
