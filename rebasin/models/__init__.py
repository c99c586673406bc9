"""Networks of the experiments, in Flax linen: float images [n, h, w, c] to logits [n, num_classes].

``model.apply(variables, images)`` evaluates a model. It is a pure function of all `variables`, which include
running statistics where the norm is BatchNorm. ``model.apply(variables, images, mutable=["batch_stats"])``
trains: it also returns the updated running statistics, which are empty in models without BatchNorm. No model
has dropout.

The models know nothing of alignment. The rest of `rebasin` knows them only by the names of their leaves.
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

# The models by name, as functions of width and number of classes.
MODELS: Mapping[str, Callable[[int, int], nn.Module]] = {
    "mlp": lambda width, num_classes: MLP((width, width, width), num_classes),
    "mlp_1": lambda width, num_classes: MLP((width,), num_classes),
    "mlp_2": lambda width, num_classes: MLP((width, width), num_classes),
    "resnet20": ResNet20,
    "resnet20_batchnorm": partial(ResNet20, norm=BatchNorm),
    "vgg16": VGG16,
    "vgg16_batchnorm": partial(VGG16, norm=BatchNorm),
    "vit": ViT,
}


def build_model(name: str, *, width: int, num_classes: int) -> nn.Module:
    """Build the model of a given name and width.

    Args:
      name: ``"mlp"``, ``"resnet20"``, ``"vgg16"`` or ``"vit"``; ``"resnet20_batchnorm"`` and
        ``"vgg16_batchnorm"`` have BatchNorm in place of LayerNorm; ``"mlp_1"`` and ``"mlp_2"`` have one and
        two hidden layers in place of three.
      width: number of units of each hidden layer of an MLP, number of units of the residual
        stream of a transformer, or number of channels of the first layer of a convolutional network.
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
