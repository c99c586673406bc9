"""Norm layers of the models: BatchNorm, and the type of a norm that a model takes.

LayerNorm over channels, the default of the models, is Flax's own ``nn.LayerNorm``.
"""

from collections.abc import Callable
from typing import TypeAlias

import flax.linen as nn
import jax

__all__ = ["BatchNorm", "NormFactory"]

# A model calls it without arguments wherever it has a norm. In VGG-16, the class of the norm gives the leaves
# their names.
NormFactory: TypeAlias = Callable[[], nn.Module]

# Flax's name for the collection of running statistics.
_STATISTICS = "batch_stats"


class BatchNorm(nn.BatchNorm):
    """BatchNorm that trains if its running statistics are mutable, and evaluates otherwise.

    ``model.apply(variables, images)`` normalises by the running statistics, so that evaluation is a pure
    function of `variables`. ``model.apply(variables, images, mutable=["batch_stats"])`` normalises by the
    batch, and returns the updated statistics beside the logits.

    Flax's BatchNorm has a second switch, ``use_running_average``. Without it the two cannot contradict each
    other, and a model has the same signature whatever its norm.

    Attributes:
      momentum: weight of the old statistics in the updated ones; 0.9 as in the ResNets of most frameworks.
    """

    momentum: float = 0.9

    def __call__(self, x: jax.Array) -> jax.Array:
        """Normalise, scale and shift each channel of images [n, h, w, c]."""
        return super().__call__(x, use_running_average=not self.is_mutable_collection(_STATISTICS))
