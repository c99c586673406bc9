"""Norm layers of the models: LayerNorm over channels, which is Flax's own, and BatchNorm."""

from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax

__all__ = ["BatchNorm", "NormFactory"]

# Called without arguments wherever a model wants a norm; its class names the leaves.
NormFactory: TypeAlias = Callable[[], nn.Module]

_STATISTICS = "batch_stats"


class BatchNorm(nn.BatchNorm):
    """BatchNorm that trains where its running statistics may change, and otherwise evaluates.

    ``model.apply(variables, images)`` normalises by the running statistics, so that evaluation is a pure
    function of `variables`; ``model.apply(variables, images, mutable=["batch_stats"])`` normalises by the
    batch and returns the updated statistics beside the logits. One switch instead of two (Flax has another,
    ``use_running_average``) leaves no way to set them against each other, and gives a model the same
    signature whatever its norm.

    Attributes:
      momentum: share of the old statistics in the new, 0.9 as in the ResNets of most frameworks.
    """

    momentum: float = 0.9

    def __call__(self, x: jax.Array) -> jax.Array:
        """Images [n, h, w, c] with each channel normalised, scaled and shifted."""
        return super().__call__(x, use_running_average=not self.is_mutable_collection(_STATISTICS))
