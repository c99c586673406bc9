"""Options of XLA under which loops over batches run faster on the CPU."""

import functools
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import jax

__all__ = ["compiler_options", "known_options"]

# By default YNNPACK, XLA's library for the CPU, computes matrix products, convolutions and sums. The option
# leaves it the products alone, at which it is good. It is slow at sums over channels, which make up the
# backward pass of a norm: operands that are broadcast are first written out in full, which costs more than
# the sum. Its 3×3 convolutions of 32 channels and more reach 95 GFLOP/s, where Eigen's reach 130. Training
# steps of ResNet-20 are 1.2 times faster with the option.
_CPU: Mapping[str, str] = MappingProxyType(
    {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
)


def compiler_options() -> dict[str, str]:
    """Return the compiler options of a function that loops over batches.

    They hold for that function alone, while ``XLA_FLAGS`` would hold for the whole process. A function that
    is compiled with them cannot be called inside another `jax.jit`. Options come and go with the versions of
    XLA; those that the installed one does not know are left out.

    Returns:
      A dict for ``jax.jit(function, compiler_options=…)``; empty where the backend is not the CPU.

    Examples:
      >>> double = jax.jit(lambda x: 2 * x, compiler_options=compiler_options())
      >>> float(double(3.0))
      6.0
    """
    return known_options(_CPU) if jax.default_backend() == "cpu" else {}


def known_options(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return those of some compiler options that the installed XLA knows.

    Args:
      options: compiler options with their values.

    Examples:
      >>> known_options({"xla_cpu_no_such_option": True})
      {}
    """
    return {name: value for name, value in options.items() if _is_known(name, value)}


@functools.cache
def _is_known(name: str, value: Any) -> bool:
    """Return whether XLA accepts an option, by compiling a small program under it."""
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "float32"))
    try:
        program.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
