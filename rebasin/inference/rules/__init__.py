"""One small function for each family of primitives; importing this package registers them all."""

from rebasin.inference.rules import contraction, control, elementwise, gather, random, reduction, shape

__all__ = ["contraction", "control", "elementwise", "gather", "random", "reduction", "shape"]
