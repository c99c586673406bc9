"""Align one network with another in a single call."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.arithmetic import in_common_dtypes
from rebasin.barrier import classification_metrics
from rebasin.batches import Batch
from rebasin.errors import ConfigError, TreeMismatchError, problem_list
from rebasin.inference.infer import infer_spec
from rebasin.inference.verification import verify_spec
from rebasin.matching.method import Method
from rebasin.matching.progress import ProgressFn
from rebasin.matching.registry import as_method
from rebasin.matching.result import MatchResult
from rebasin.permutation import compiled_permute
from rebasin.roles import Role, RoleNames, check_roles
from rebasin.spec import PermutationSpec
from rebasin.trees import conform, is_below, join_static, leaf_table, path_name, split_static

__all__ = ["Aligned", "align", "as_function"]


class Aligned(NamedTuple):
    """A network in the order of units of another.

    Attributes:
      params: tree of B with its units permuted, in the dtypes of B; it computes the same function as B. Its
        containers are those of A, or its own where `align` was told which leaves are shared.
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
    roles: RoleNames = None,
    shared: Sequence[str] | None = None,
    progress: ProgressFn | None = None,
) -> Aligned:
    """Permute the units of network B so that they correspond to those of network A.

    Infers the symmetries of the network from `apply_fn`, verifies them in float64, finds a permutation, and
    applies it to B. A and B may differ in floating dtypes: they are matched in the wider of the two.

    Every library has its line:

    ==================== ===============================================================================
    plain JAX            ``align(apply_fn, params_a, params_b, x)``
    Flax Linen           ``align(model, variables_a, variables_b, x)``
    Flax NNX             ``align(lambda model, x: model(x), model_a, model_b, x)``
    Equinox              ``align(lambda model, x: jax.vmap(model)(x), model_a, model_b, x)``
    Haiku                ``align(transformed, params_a, params_b, x)``
    ==================== ===============================================================================

    Args:
      apply_fn: ``apply_fn(params, *inputs)``, any JAX function, or a Linen module or Haiku transform, whose
        ``apply`` is called. Close over arguments that are not arrays (`functools.partial`).
      params_a: tree of A, which stays. A module that is a tree will do; its leaves that are no arrays, such
        as activation functions, must be those of B.
      params_b: tree of B, with the leaves and shapes of A.
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
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find, for a method given by its name.
      shared: path names of the leaves or subtrees that the networks have in common, where they have heads of
        their own: other numbers of classes, or other vocabularies. In a name ``*`` stands for any text. The
        other leaves of B must have the path names and numbers of axes of A's. They do not count; where they
        carry units of the trunk they move with them. Where a method evaluates B, it gets A's heads.
      progress: called with a `rebasin.matching.progress.MatchProgress` after each iteration of the method,
        and at its end.

    Returns:
      The permuted tree of B, the permutation, the spec and the match.

    Raises:
      ConfigError: no method has that name, or something that is needed is missing.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes that are not floating, in other leaves
        than `shared` allows, or in leaves that are no arrays.
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
    apply_fn = as_function(apply_fn)
    (params_a, static), (params_b, static_b) = split_static(params_a), split_static(params_b)
    if jax.tree.leaves(static) or jax.tree.leaves(static_b):
        _check_same_static(static, static_b)
        arrays_only = align(
            lambda params, *rest: apply_fn(join_static(params, static), *rest),
            params_a,
            params_b,
            *inputs,
            method=method,
            spec=spec,
            verify=verify,
            key=key,
            data=data,
            metrics_fn=metrics_fn and (lambda params, *rest: metrics_fn(join_static(params, static), *rest)),
            roles=roles,
            shared=shared,
            progress=progress,
        )
        return arrays_only._replace(params=join_static(arrays_only.params, static_b))
    chosen = as_method(method, **({} if roles is None else {"roles": roles}))
    own_b = params_b
    if shared is None:
        params_b = own_b = conform(params_a, params_b, dtypes=False)
    else:
        params_b = _with_heads_of(params_a, params_b, shared)
        heads: dict[str, Role] = {p: "constant" for p in leaf_table(params_a) if not _is_shared(p, shared)}
        chosen = dataclasses.replace(chosen, roles={**dict(check_roles(chosen.roles)), **heads})
    wide_a, wide_b = in_common_dtypes((params_a, params_b), names=("params_a", "params_b"))
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
        spec, wide_a, wide_b, key=key, apply_fn=apply_fn, metrics_fn=metrics_fn, data=data, progress=progress
    )
    return Aligned(compiled_permute(spec, match.permutation, own_b), match.permutation, spec, match)


def as_function(model: Any) -> Callable[..., Any]:
    """Return ``apply_fn(params, *inputs)`` of a model: its ``apply``, or the function itself.

    Args:
      model: a function, a Flax Linen module, or what `haiku.transform` returns, which gets no random key.

    Examples:
      >>> as_function(abs) is abs
      True
    """
    if type(model).__name__ == "Transformed" and type(model).__module__.startswith("haiku"):
        return lambda params, *inputs: model.apply(params, None, *inputs)
    return getattr(model, "apply", model)


def _check_same_static(static_a: Any, static_b: Any) -> None:
    """Raise unless the leaves of two modules that are no arrays are the same."""
    a, b = (dict(jax.tree_util.tree_leaves_with_path(static)) for static in (static_a, static_b))
    problems = [
        f"{path_name(path)}: {a.get(path, 'an array')} in params_a, {b.get(path, 'an array')} in params_b"
        for path in dict.fromkeys([*a, *b])
        if path not in a or path not in b or a[path] is not b[path] and a[path] != b[path]
    ]
    if problems:
        raise TreeMismatchError(problem_list("leaves that are no arrays differ:", problems))


def _is_shared(path: str, shared: Sequence[str]) -> bool:
    return any(is_below(path, name) for name in shared)


def _with_heads_of(params_a: Any, params_b: Any, shared: Sequence[str]) -> Any:
    """Return B's shared leaves in a tree of A, after checking that `shared` fits both networks.

    Raises:
      ConfigError: a name in `shared` fits no leaf of A.
      TreeMismatchError: shared leaves differ in more than floating dtypes, or a leaf that is not shared is in
        one network alone or has another number of axes.
    """
    a, b = leaf_table(params_a), leaf_table(params_b)
    unknown = [
        f"{name!r} names no leaf of params_a" for name in shared if not any(is_below(p, name) for p in a)
    ]
    if unknown:
        raise ConfigError(problem_list(f"shared does not fit params_a, whose leaves are {list(a)}:", unknown))
    problems = [
        f"{path}: {np.ndim(a[path])} axes in params_a, {np.ndim(b[path])} in params_b"
        for path in a
        if path in b and np.ndim(a[path]) != np.ndim(b[path])
    ]
    problems += [f"{path}: only in params_a" for path in a if path not in b]
    problems += [f"{path}: only in params_b" for path in b if path not in a]
    if problems:
        headline = "heads that are not shared must have the same leaves and numbers of axes in both networks:"
        raise TreeMismatchError(problem_list(headline, problems))
    return conform(params_a, {p: b[p] if _is_shared(p, shared) else a[p] for p in a}, dtypes=False)
