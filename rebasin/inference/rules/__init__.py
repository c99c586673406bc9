"""One small function for each family of primitives; importing this package registers them all."""

from rebasin.inference.rules import (
    attention,
    contraction,
    control,
    elementwise,
    gather,
    linalg,
    opaque,
    parallel,
    random,
    reduction,
    shape,
)

__all__ = [
    "attention",
    "contraction",
    "control",
    "elementwise",
    "gather",
    "linalg",
    "opaque",
    "parallel",
    "random",
    "reduction",
    "shape",
]
