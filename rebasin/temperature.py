"""The softmax temperature of interpolated networks, fitted on data.

Between two networks that are not aligned the logits shrink, so that the loss of the network at α is high even
where its answers are right. Ito et al. 2025 (arXiv 2510.08023) report that wide networks are linearly
connected without any permutation once the temperature of the network at α is set right. This is therefore a
control for every claim that a permutation lowers a loss barrier. The 0–1 error does not depend on the
temperature.

With the inverse temperature β, the logits z and the labels y of n examples, the fit minimises

    Σ [log Σ_k exp(β z_k) − β z_y] + ½ (log β)².

The second term is a standard normal prior on log β, which weighs as much as a few examples. Without it β
would be infinite wherever all examples are classified rightly, as is usual on training data near the ends of
a path, and the loss on other data would then rise with it. The networks at the ends keep the temperature 1:
they are the networks whose barrier is asked for.
"""

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from rebasin.barrier import MetricsFn, classification_metrics
from rebasin.batches import Batch, check_data, inputs_of, num_examples, to_batches
from rebasin.errors import DataError
from rebasin.trees import check_finite

__all__ = ["Temperature", "build_temperature"]

# Bounds of the temperature and of its inverse. With the prior, fits end far inside of them.
_BOUND = 64.0

# Bisections of log β: 40 leave less than float32 can tell.
_BISECTIONS = 40


@dataclasses.dataclass(frozen=True, eq=False)
class Temperature:
    """What `build_temperature` returns: it fits temperatures, and runs a network at one.

    Attributes:
      apply_fn: ``(params, *inputs) -> logits``, the network; the logits have shape ``[n, classes]``.
      data: the examples on which temperatures are fitted, with integer labels.
      batch_size: number of examples that are evaluated at once.
    """

    apply_fn: Callable[..., jax.Array]
    data: Batch
    batch_size: int

    @property
    def prepare(self) -> Callable[[Any, Any], jax.Array]:
        """``prepare(params, alpha) -> temperature`` for the network at `alpha` between the endpoints.

        It is the ``prepare`` that `build_sweep` takes, and that `build_simplex_sweep` takes with weights in
        the place of `alpha`. At the endpoints it returns 1. As a `jax.tree_util.Partial` it holds the data,
        which are arguments of the compiled sweep.
        """
        return Partial(self._prepare, self.data)

    def _prepare(self, data: Batch, params: Any, alpha: Any) -> jax.Array:
        alpha = jnp.asarray(alpha)
        largest = jnp.maximum(alpha, 1 - alpha) if alpha.ndim == 0 else alpha.max()
        return jnp.where(largest == 1, 1.0, self._fit(data, params))

    def _fit(self, data: Batch, params: Any) -> jax.Array:
        n = num_examples(data)
        batches = to_batches(data.inputs, self.batch_size)
        logits = jax.lax.map(lambda x: self.apply_fn(params, *inputs_of(x)), batches)
        logits = logits.reshape(-1, logits.shape[-1])[:n].astype(jnp.float32)
        label_logits = jnp.take_along_axis(logits, jnp.asarray(data.labels)[:, None], axis=-1)[:, 0]

        def slope(log_beta: jax.Array) -> jax.Array:
            """Return the derivative of what is minimised in log β."""
            beta = jnp.exp(log_beta)
            expected = (jax.nn.softmax(beta * logits) * logits).sum(axis=-1)
            return beta * jnp.sum(expected - label_logits) + log_beta

        def halve(_: int, interval: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            low, high = interval
            middle = (low + high) / 2
            rises = slope(middle) > 0
            return jnp.where(rises, low, middle), jnp.where(rises, middle, high)

        limit = jnp.float32(math.log(_BOUND))
        low, high = jax.lax.fori_loop(0, _BISECTIONS, halve, (-limit, limit))
        return jnp.exp(-(low + high) / 2)

    def apply(self, params: Any, *inputs_and_temperature: Any) -> jax.Array:
        """Evaluate the network at a temperature: ``apply(params, *inputs, temperature) -> logits``."""
        *inputs, temperature = inputs_and_temperature
        return self.apply_fn(params, *inputs) / temperature

    @property
    def metrics_fn(self) -> MetricsFn:
        """The metrics of a classifier, and its loss at the temperature, from one evaluation of the network.

        ``metrics_fn(params, batch, temperature) -> {"loss": [n], "error": [n], "tempered_loss": [n]}``.
        """

        def metrics_fn(params: Any, batch: Batch, temperature: jax.Array) -> dict[str, jax.Array]:
            logits = self.apply_fn(params, *inputs_of(batch))
            plain = classification_metrics(lambda *_: logits)(params, batch)
            tempered = classification_metrics(lambda *_: logits / temperature)(params, batch)
            return {**plain, "tempered_loss": tempered["loss"]}

        return metrics_fn


def build_temperature(
    apply_fn: Callable[..., jax.Array], data: Batch, *, batch_size: int = 500
) -> Temperature:
    """Prepare the fit of a softmax temperature for the network at each point of a path.

    Fit and sweep are one compiled program, which serves every pair of networks of one shape.

    Args:
      apply_fn: ``(params, *inputs) -> logits``, the network; the logits have shape ``[n, classes]``.
      data: the examples to fit on, a `rebasin.Batch` with integer labels ``[n]``; training data, as the
        barrier on test data would be too low if the temperature were fitted on them.
      batch_size: number of examples that are evaluated at once.

    Returns:
      A `Temperature`. Its `prepare` goes into `build_sweep` together with ``Temperature.metrics_fn``, or with
      ``classification_metrics(temperature.apply)``.

    Raises:
      DataError: the data are empty, of different lengths, or have no integer labels of shape ``[n]``.
      NonFiniteError: an input is NaN or infinite.
      ConfigError: `batch_size` is below 1.

    Examples:
      >>> from rebasin.barrier import build_sweep
      >>> data = Batch(jnp.eye(2), labels=jnp.array([0, 1]))
      >>> temperature = build_temperature(lambda params, x: x @ params["w"], data)
      >>> sweep = build_sweep(temperature.metrics_fn, num_alphas=3, prepare=temperature.prepare)
      >>> a, b = {"w": 8 * jnp.eye(2)}, {"w": jnp.array([[8.0, 8.0], [0.0, 8.0]])}
      >>> curve = sweep(a, b, data)
      >>> bool(curve.means["tempered_loss"][1] < curve.loss[1])
      True
    """
    check_data(data, batch_size)
    labels = data.labels if isinstance(data, Batch) else None
    if labels is None or jnp.ndim(labels) != 1 or not jnp.issubdtype(jnp.result_type(labels), jnp.integer):
        got = type(data).__name__ if labels is None else f"{jnp.result_type(labels)} {jnp.shape(labels)}"
        raise DataError(f"a temperature is fitted to integer labels of shape [n], got {got}")
    check_finite(data.inputs, "data")
    return Temperature(apply_fn, jax.tree.map(jnp.asarray, data), batch_size)
