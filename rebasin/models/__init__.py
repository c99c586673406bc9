"""Networks of the experiments, in Flax linen: float images [n, h, w, c] to logits [n, num_classes].

``model.apply(variables, images)`` evaluates: a pure function of all `variables`, running statistics among
them where the norm is BatchNorm. With ``mutable=["batch_stats"]`` it trains: it also returns the statistics
that the batch leaves behind, none in a model without. No model has dropout. They know nothing of alignment:
`rebasin` meets them through the names of their leaves.
"""

from collections.abc import Callable, Mapping
from functools import partial

import flax.linen as nn

from rebasin.errors import ConfigError
from rebasin.models.convolution import conv_general_dilated
from rebasin.models.mlp import MLP
from rebasin.models.norms import BatchNorm
from rebasin.models.resnet import ResNet20
from rebasin.models.vgg import VGG16
from rebasin.models.vit import ViT

__all__ = ["MLP", "MODELS", "BatchNorm", "ResNet20", "VGG16", "ViT", "build_model", "conv_general_dilated"]

MODELS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "mlp": lambda width, num_classes: MLP((width, width, width), num_classes),
    "resnet20": ResNet20,
    "resnet20_batchnorm": partial(ResNet20, norm=BatchNorm),
    "vgg16": VGG16,
    "vgg16_batchnorm": partial(VGG16, norm=BatchNorm),
    "vit": ViT,
}


def build_model(name: str, *, width: int, num_classes: int) -> nn.Module:
    """The model of that name.

    Args:
      name: ``"mlp"``, ``"resnet20"``, ``"vgg16"`` or ``"vit"``; ``"resnet20_batchnorm"`` and
        ``"vgg16_batchnorm"`` have BatchNorm in place of LayerNorm.
      width: units of each of the three hidden layers of an MLP, of the residual stream of a transformer,
        channels of the first layer of the others.
      num_classes: number of logits.

    Returns:
      A Flax module that maps images [n, h, w, c] to logits [n, num_classes].

    Raises:
      ConfigError: no model has that name.

    Examples:
      >>> build_model("mlp", width=128, num_classes=10).features
      (128, 128, 128)
    """
    if name not in MODELS:
        raise ConfigError(f"no model is called {name!r}; the models are {', '.join(sorted(MODELS))}")
    return MODELS[name](width, num_classes)
