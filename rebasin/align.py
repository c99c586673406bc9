"""Align one network with another in a single call."""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.barrier import classification_metrics
from rebasin.batches import Batch
from rebasin.errors import ConfigError
from rebasin.inference.infer import infer_spec
from rebasin.inference.verification import verify_spec
from rebasin.matching.method import Method
from rebasin.matching.progress import ProgressFn
from rebasin.matching.registry import as_method
from rebasin.matching.result import MatchResult
from rebasin.permutation import compiled_permute
from rebasin.spec import PermutationSpec
from rebasin.trees import check_same_shapes

__all__ = ["Aligned", "align"]


class Aligned(NamedTuple):
    """A network in the order of units of another.

    Attributes:
      params: tree of B with its units permuted; it computes the same function as B.
      permutation: int32 array for each group of `spec`, in the gather convention ``new[i] = old[p[i]]``.
      spec: the symmetries of the network.
      match: how the permutation was found, with the history of the method's objective.
    """

    params: Any
    permutation: dict[str, np.ndarray]
    spec: PermutationSpec
    match: MatchResult


def align(
    apply_fn: Callable[..., Any],
    params_a: Any,
    params_b: Any,
    *inputs: Any,
    method: str | Method = "weights",
    spec: PermutationSpec | None = None,
    verify: bool = True,
    key: jax.Array | None = None,
    data: Any = None,
    metrics_fn: Callable[..., Mapping[str, jax.Array]] | None = None,
    progress: ProgressFn | None = None,
) -> Aligned:
    """Permute the units of network B so that they correspond to those of network A.

    Infers the symmetries of the network from `apply_fn`, verifies them in float64, finds a permutation, and
    applies it to B.

    Args:
      apply_fn: ``apply_fn(params, *inputs)``, any JAX function, for example a Flax model's ``apply``. Close
        over arguments that are not arrays (`functools.partial`).
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      *inputs: example inputs, from which the symmetries are inferred. They may be left out where `spec` is
        given and `verify` is false.
      method: a matching method by name (`METHODS`), or as a value that holds its options, such as
        ``WeightMatching(restarts=3)``.
      spec: the symmetries, if they are known; by default they are inferred.
      verify: check the symmetries with random weights and random permutations before they are used.
      key: PRNG key of a method that draws at random; by default ``jax.random.key(0)``, so that equal calls
        give equal results.
      data: examples for a method that needs them, a `Batch` or inputs alone; by default `inputs`.
      metrics_fn: for a method that minimises a loss; by default `classification_metrics` of `apply_fn`, for
        which `data` must be a `Batch` with labels.
      progress: called with a `rebasin.matching.progress.MatchProgress` after each iteration of the method,
        and at its end.

    Returns:
      The permuted tree of B, the permutation, the spec and the match.

    Raises:
      ConfigError: no method has that name, or something that is needed is missing.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      InferenceError: the function cannot be traced with these inputs.
      VerificationError: the spec changes the function.
      RebasinError: whatever the method raises.

    Examples:
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"]) @ params["v"]
      >>> a = {"w": np.array([[1.0, 2.0, 3.0]]), "v": np.array([[1.0], [0.0], [2.0]])}
      >>> b = {"w": np.array([[3.0, 1.0, 2.0]]), "v": np.array([[2.0], [1.0], [0.0]])}
      >>> aligned = align(apply_fn, a, b, np.ones((4, 1)))
      >>> aligned.params["w"].tolist(), aligned.permutation["w"].tolist()
      ([[1.0, 2.0, 3.0]], [1, 2, 0])
    """
    chosen = as_method(method)
    check_same_shapes(params_a, params_b)
    if not inputs and (spec is None or verify):
        task = "infer the symmetries" if spec is None else "verify the spec (verify=False leaves that out)"
        raise ConfigError(f"align needs example inputs to {task}, got none")
    if "data" in chosen.needs and data is None:
        data = inputs
    if "metrics_fn" in chosen.needs and metrics_fn is None:
        if not isinstance(data, Batch) or data.labels is None:
            raise ConfigError(
                f"the method {chosen.name!r} minimises a loss: pass data=Batch(inputs, labels) for the cross "
                "entropy, or metrics_fn"
            )
        metrics_fn = classification_metrics(apply_fn)
    if spec is None:
        spec = infer_spec(apply_fn, params_a, *inputs)
    if verify:
        verify_spec(spec, apply_fn, params_a, *inputs)
    key = jax.random.key(0) if key is None else key
    match = chosen.match(
        spec,
        params_a,
        params_b,
        key=key,
        apply_fn=apply_fn,
        metrics_fn=metrics_fn,
        data=data,
        progress=progress,
    )
    return Aligned(compiled_permute(spec, match.permutation, params_b), match.permutation, spec, match)
