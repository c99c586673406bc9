"""What every public model is built into: a function with its weights and inputs."""

import importlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

__all__ = ["Specimen", "draw", "draw_indices", "import_optional"]


class Specimen(NamedTuple):
    """A model as a function, with weights and inputs.

    Attributes:
      function: the model, called as ``function(params, *inputs)``.
      params: the tree of weights.
      inputs: example inputs, from which the spec is inferred.
      others: inputs of another length; `None` where the model takes one length only.
      state_outputs: the outputs that are the next values of leaves, as in `rebasin.infer_spec`.
    """

    function: Callable[..., Any]
    params: Any
    inputs: tuple[Any, ...]
    others: tuple[Any, ...] | None = None
    state_outputs: Mapping[str, str] = {}


def import_optional(name: str) -> Any:
    """Import and return a module of a package that only the extra ``public-models`` installs."""
    return importlib.import_module(name)


def draw(*shape: int) -> jax.Array:
    """Draw an array of normal values in JAX's default precision, the same for the same shape."""
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), float)


def draw_indices(low: int, high: int, *shape: int, seed: int = 0) -> jax.Array:
    """Draw an array of whole numbers from `low` up to, but not including, `high`."""
    return jnp.asarray(np.random.default_rng((*shape, seed)).integers(low, high, shape, dtype=np.int32))
