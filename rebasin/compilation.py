"""Options under which XLA compiles long loops for the CPU."""

import functools
from collections.abc import Mapping
from types import MappingProxyType

import jax

__all__ = ["compiler_options"]

# YNNPACK, XLA's library of CPU kernels, takes matrix products, convolutions and sums. It is good at products.
# For a sum over channels, of which the backward pass of a norm is made, it has broadcast operands written out
# in full, which costs more than the sum; and its 3×3 convolutions of 32 channels and more reach 95 GFLOP/s
# where those of Eigen reach 130. Steps of ResNet-20 are 1.2 times faster without these two.
_CPU: Mapping[str, str] = MappingProxyType(
    {"xla_cpu_experimental_ynn_fusion_type": "LIBRARY_FUSION_TYPE_DOT"}
)


def compiler_options() -> dict[str, str]:
    """Options for ``jax.jit(f, compiler_options=…)`` where `f` loops over batches; empty but on the CPU.

    They are asked for one function and leave the rest of the process alone, as ``XLA_FLAGS`` would not. Such
    a function cannot be called inside another `jax.jit`. Options that the installed XLA does not know, which
    come and go with its versions, are left out.
    """
    return dict(_known_options()) if jax.default_backend() == "cpu" else {}


@functools.cache
def _known_options() -> tuple[tuple[str, str], ...]:
    return tuple((name, value) for name, value in _CPU.items() if _is_known(name, value))


def _is_known(name: str, value: str) -> bool:
    """Whether XLA compiles a small program under this option."""
    program = jax.jit(lambda x: x + 1).lower(jax.ShapeDtypeStruct((), "float32"))
    try:
        program.compile(compiler_options={name: value})
    except jax.errors.JaxRuntimeError:
        return False
    return True
