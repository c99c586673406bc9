"""The networks of `rebasin.models` in PyTorch, with the weights of a Flax tree, and plain loops to run them.

PyTorch is imported when it is first needed: nothing else in the project uses it.
"""

import importlib
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from rebasin.errors import ConfigError
from rebasin.trees import leaf_table

__all__ = ["build_forward", "build_network", "build_training", "import_torch"]

_VGG_PLAN = (1, 1, "M", 2, 2, "M", 4, 4, 4, "M", 8, 8, 8, "M", 8, 8, 8, "M")
_EPSILON = 1e-6  # Flax's, in its norms


def import_torch() -> Any:
    """Import PyTorch and return it.

    Raises:
      ConfigError: it is not installed.
    """
    try:
        return importlib.import_module("torch")
    except ModuleNotFoundError as error:
        raise ConfigError(
            "PyTorch is not installed, which this benchmark compares with: install its CPU build (torch) in "
            "the environment of the benchmark, or pass --nopytorch"
        ) from error


def build_network(model: str, variables: Any, *, channels_last: bool = True) -> Any:
    """Return the `torch.nn.Module` of a Flax network of `rebasin.models`, with its weights.

    The module maps images [n, c, h, w] to logits. Its widths follow from the leaves.

    Args:
      model: ``"mlp"``, ``"vgg16"`` or ``"resnet20"``.
      variables: the Flax tree.
      channels_last: whether images and kernels have channels last in memory.
    """
    torch = import_torch()
    leaves = {name.removeprefix("params/"): np.array(leaf) for name, leaf in leaf_table(variables).items()}
    network = {"mlp": _mlp, "vgg16": _vgg, "resnet20": _resnet}[model](torch, leaves)
    return network.to(memory_format=torch.channels_last) if channels_last else network


def _mlp(torch: Any, leaves: Mapping[str, np.ndarray]) -> Any:
    nn, depth = torch.nn, sum(name.endswith("kernel") for name in leaves)
    layers: list[Any] = [nn.Flatten()]
    for i in range(depth):
        layers += [_dense(torch, leaves, f"Dense_{i}"), nn.ReLU()]
    return nn.Sequential(*layers[:-1])


def _vgg(torch: Any, leaves: Mapping[str, np.ndarray]) -> Any:
    nn, norm = torch.nn, _norm_class(torch)
    layers: list[Any] = []
    convolutions = 0
    for step in _VGG_PLAN:
        if step == "M":
            layers.append(nn.MaxPool2d(2))
        else:
            layers.append(_convolution(torch, leaves, f"Conv_{convolutions}", padding=1))
            layers += [norm(leaves, f"LayerNorm_{convolutions}"), nn.ReLU()]
            convolutions += 1
    layers.append(nn.Flatten())  # of 1×1 pixels, hence the same in both layouts
    for i in range(2):
        layers += [_dense(torch, leaves, f"Dense_{i}"), nn.ReLU()]
    return nn.Sequential(*layers, _dense(torch, leaves, "Dense_2"))


def _resnet(torch: Any, leaves: Mapping[str, np.ndarray]) -> Any:
    nn, norm = torch.nn, _norm_class(torch)

    class Block(nn.Module):
        def __init__(self, name: str, stride: int) -> None:
            super().__init__()
            # Flax's "SAME" pads a strided convolution of an even image after the last pixel only.
            self.pad = nn.ZeroPad2d((0, 1, 0, 1)) if stride > 1 else nn.Identity()
            padding = 0 if stride > 1 else 1
            self.conv1 = _convolution(torch, leaves, f"{name}/conv1", padding=padding, stride=stride)
            self.norm1 = norm(leaves, f"{name}/norm1")
            self.conv2 = _convolution(torch, leaves, f"{name}/conv2", padding=1)
            self.norm2 = norm(leaves, f"{name}/norm2")
            self.shortcut = nn.Identity()
            if stride > 1:
                projection = _convolution(torch, leaves, f"{name}/shortcut/layers_0", stride=stride)
                self.shortcut = nn.Sequential(projection, norm(leaves, f"{name}/shortcut/layers_1"))

        def forward(self, x: Any) -> Any:
            y = torch.relu(self.norm1(self.conv1(self.pad(x))))
            return torch.relu(self.norm2(self.conv2(y)) + self.shortcut(x))

    layers: list[Any] = [_convolution(torch, leaves, "conv1", padding=1), norm(leaves, "norm1"), nn.ReLU()]
    for group in range(3):
        for block in range(3):
            stride = 2 if group > 0 and block == 0 else 1
            layers.append(Block(f"blockgroups_{group}/blocks_{block}", stride))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), _dense(torch, leaves, "dense"))


def _norm_class(torch: Any) -> Any:
    """Return the class of a LayerNorm over the channels of images [n, c, h, w]."""

    class LayerNorm(torch.nn.Module):
        def __init__(self, leaves: Mapping[str, np.ndarray], name: str) -> None:
            super().__init__()
            scale = torch.from_numpy(leaves[f"{name}/scale"])
            self.norm = torch.nn.LayerNorm(len(scale), eps=_EPSILON)
            self.norm.weight = torch.nn.Parameter(scale)
            self.norm.bias = torch.nn.Parameter(torch.from_numpy(leaves[f"{name}/bias"]))

        def forward(self, x: Any) -> Any:
            return self.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    return LayerNorm


def _convolution(
    torch: Any, leaves: Mapping[str, np.ndarray], name: str, *, padding: int = 0, stride: int = 1
) -> Any:
    kernel, bias = leaves[f"{name}/kernel"], leaves.get(f"{name}/bias")
    height, _, channels, outputs = kernel.shape
    layer = torch.nn.Conv2d(channels, outputs, height, stride, padding, bias=bias is not None)
    layer.weight = torch.nn.Parameter(torch.from_numpy(kernel.transpose(3, 2, 0, 1).copy()))
    if bias is not None:
        layer.bias = torch.nn.Parameter(torch.from_numpy(bias))
    return layer


def _dense(torch: Any, leaves: Mapping[str, np.ndarray], name: str) -> Any:
    kernel = leaves[f"{name}/kernel"]
    layer = torch.nn.Linear(*kernel.shape)
    layer.weight = torch.nn.Parameter(torch.from_numpy(kernel.T.copy()))
    layer.bias = torch.nn.Parameter(torch.from_numpy(leaves[f"{name}/bias"]))
    return layer


def build_training(
    network: Any, images: np.ndarray, labels: np.ndarray, *, batch_size: int, channels_last: bool = True
) -> Callable[[], None]:
    """Return a function that trains for an epoch of shuffled uint8 images [n, h, w, c].

    It uses SGD with momentum and coupled weight decay. Pixels become ``(x - 127.5) / 63.75``.
    """
    torch = import_torch()
    optimizer = torch.optim.SGD(network.parameters(), lr=1e-3, momentum=0.9, weight_decay=1e-4)
    inputs, targets = torch.from_numpy(images), torch.from_numpy(labels.astype(np.int64))

    def run_epoch() -> None:
        for batch in torch.randperm(len(targets)).split(batch_size):
            optimizer.zero_grad()
            logits = network(_pixels(torch, inputs[batch], channels_last))
            torch.nn.functional.cross_entropy(logits, targets[batch]).backward()
            optimizer.step()

    return run_epoch


def build_forward(
    network: Any, images: np.ndarray, *, batch_size: int, channels_last: bool = True
) -> Callable[[], Any]:
    """Return a function that computes the logits of all uint8 images [n, h, w, c]."""
    torch = import_torch()
    inputs = torch.from_numpy(images)

    def forward() -> Any:
        with torch.inference_mode():
            parts = [network(_pixels(torch, part, channels_last)) for part in inputs.split(batch_size)]
            return torch.cat(parts).numpy()

    return forward


def _pixels(torch: Any, images: Any, channels_last: bool) -> Any:
    """Turn uint8 images [n, h, w, c] into normalised float32 images [n, c, h, w]."""
    layout = torch.channels_last if channels_last else torch.contiguous_format
    return ((images.float() - 127.5) / 63.75).permute(0, 3, 1, 2).contiguous(memory_format=layout)
