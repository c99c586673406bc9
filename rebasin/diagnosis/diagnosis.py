"""Diagnose why the path between two networks has a barrier, in one call."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from rebasin.align import as_function, check_same_static
from rebasin.barrier import classification_metrics
from rebasin.batches import Batch, batch_shapes, check_data, inputs_of, num_examples, to_batches
from rebasin.diagnosis.measurement import Pair, measure
from rebasin.diagnosis.report import Diagnosis
from rebasin.errors import ConfigError, DataError, InferenceError
from rebasin.inference.infer import infer_spec
from rebasin.inference.verification import verify_spec
from rebasin.matching.method import Method, check_networks
from rebasin.matching.registry import as_method
from rebasin.permutation import Permutation, check_permutation, compiled_permute
from rebasin.roles import RoleNames
from rebasin.spec import PermutationSpec
from rebasin.trees import check_finite, conform, join_static, split_static

__all__ = ["diagnose"]

# Number of examples from which symmetries are inferred.
_FEW = 8


def diagnose(
    apply_fn: Callable[..., Any],
    params_a: Any,
    params_b: Any,
    data: Any,
    permutation: Permutation | None = None,
    *,
    method: str | Method = "weights",
    spec: PermutationSpec | None = None,
    verify: bool = True,
    key: jax.Array | None = None,
    batch_size: int = 500,
    roles: RoleNames = None,
) -> Diagnosis:
    """Measure why the path between two networks has a barrier, and say what to try.

    Causes are told apart by removing them one at a time and measuring the midpoint again: the permutation of
    each group is replaced by the one that activation matching finds; the blocks that share a group get
    permutations of their own; layers are scaled alike; REPAIR is applied; a softmax temperature is fitted.
    Where nothing stands out the report says so.

    Args:
      apply_fn: ``apply_fn(params, *inputs) -> logits``, of shape ``[n, classes]``; a function, or a Linen
        module or Haiku transform, as for `rebasin.align`. Of other outputs loss and error are not measured.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      data: a `Batch` whose labels are integers ``[n]``, or its inputs alone; then the classes that A and B
        predict together (the average of their probabilities) stand in for labels, so that an error is a
        disagreement with both. A few hundred examples tell; all of them are held on the device.
      permutation: the permutation of B to look into; by default `method` finds one. For the networks as they
        are, pass ``identity_permutation(spec, params_b)``.
      method: the matching method that finds the permutation, by name or as a value. It must not need
        `metrics_fn`.
      spec: the symmetries, if they are known; by default they are inferred from the first examples.
      verify: check the symmetries with random weights before they are used.
      key: PRNG key of a method that draws at random; by default ``jax.random.key(0)``.
      batch_size: number of examples that are evaluated at once.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find.

    Returns:
      The diagnosis. ``str(diagnosis)`` is the report, ``diagnosis.findings`` what stands out.

    Raises:
      ConfigError: an option cannot work, or no method has that name.
      DataError: the data are empty or of different lengths, or labels are not integers of shape ``[n]``.
      InferenceError: the function cannot be traced with these inputs, or a group has no activations.
      NonFiniteError: a weight or an input is NaN or infinite.
      PermutationError: the permutation does not fit the spec.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      VerificationError: the spec changes the function.

    Examples:
      >>> apply_fn = lambda params, x: jax.nn.relu(x @ params["w"]) @ params["v"]
      >>> a = {"w": jnp.eye(3), "v": 9 * jnp.eye(3)}
      >>> b = {"w": jnp.eye(3)[:, ::-1], "v": 9 * jnp.eye(3)[::-1]}
      >>> data = Batch(jnp.eye(3), labels=jnp.arange(3))
      >>> diagnosis = diagnose(apply_fn, a, b, data)
      >>> diagnosis.findings, diagnosis.midpoint.before.error > diagnosis.midpoint.permuted.error
      ((), True)
    """
    apply_fn = as_function(apply_fn)
    (params_a, static), (params_b, static_b) = split_static(params_a), split_static(params_b)
    if jax.tree.leaves(static) or jax.tree.leaves(static_b):
        check_same_static(static, static_b)
        network = apply_fn
        apply_fn = lambda params, *rest: network(join_static(params, static), *rest)  # noqa: E731
    method = as_method(method, **({} if roles is None else {"roles": roles}))
    if permutation is None and "metrics_fn" in method.needs:
        raise ConfigError(
            f"a diagnosis has no loss for the method {method.name!r}: find a permutation by rebasin.align "
            "and pass permutation="
        )
    check_data(data, batch_size)
    inputs = jax.tree.map(jnp.asarray, inputs_of(data))
    check_finite(inputs, "data")
    params_b = conform(params_a, params_b)
    few = jax.tree.map(lambda x: x[:_FEW], inputs)
    spec = infer_spec(apply_fn, params_a, *few) if spec is None else spec
    networks = {"params_a": params_a, "params_b": params_b}
    params_a, params_b = check_networks(spec, networks, roles).trees
    if permutation is not None:
        check_permutation(spec, params_b, permutation)
    labels = data.labels if isinstance(data, Batch) else None
    num_classes = _check_outputs(apply_fn, params_a, inputs, labels)
    if verify:
        verify_spec(spec, apply_fn, params_a, *few)
    if permutation is None:
        key = jax.random.key(0) if key is None else key
        permutation = method.match(
            spec, params_a, params_b, key=key, apply_fn=apply_fn, data=inputs
        ).permutation
    batch = None
    if num_classes is not None:
        agreed = labels is None
        classes = _agreed_classes(apply_fn, params_a, params_b, inputs, batch_size) if agreed else labels
        batch = Batch(inputs, jnp.asarray(classes))
    moved = compiled_permute(spec, permutation, params_b)
    pair = Pair(spec, apply_fn, params_a, params_b, moved, permutation, inputs, batch, batch_size, roles)
    layers, groups, streams, midpoint = measure(pair)
    count = num_examples(inputs)
    return Diagnosis(layers, groups, streams, midpoint, count, num_classes, labels is not None)


def _check_outputs(apply_fn: Callable[..., Any], params: Any, inputs: Any, labels: Any) -> int | None:
    """Return the number of classes; `None` where there are no labels, and the outputs are no logits.

    Raises:
      DataError: there are labels, but they or the outputs are not those of a classifier.
    """
    count = min(num_examples(inputs), _FEW)
    shapes = batch_shapes(inputs, count)
    try:
        outputs = jax.eval_shape(apply_fn, params, *shapes)
    except Exception as error:  # whatever the function raises
        raise InferenceError(f"the function cannot be evaluated on these inputs: {error}") from error
    leaves = jax.tree.leaves(outputs)
    logits = leaves[0] if leaves == [outputs] else None
    if labels is not None:
        # It says what is wrong with labels or logits.
        batch = Batch(shapes, batch_shapes(jnp.asarray(labels), count))
        jax.eval_shape(classification_metrics(apply_fn), params, batch)
        low, high = int(jnp.min(labels)), int(jnp.max(labels))
        if low < 0 or high >= outputs.shape[1]:
            raise DataError(
                f"labels must be 0 to {outputs.shape[1] - 1}, as there are logits, got {low} to {high}"
            )
    if logits is None or len(logits.shape) != 2 or not jnp.issubdtype(logits.dtype, jnp.floating):
        return None
    return logits.shape[1]


def _agreed_classes(
    apply_fn: Callable[..., Any], params_a: Any, params_b: Any, inputs: Any, batch_size: int
) -> jax.Array:
    """Return the classes that two networks predict together, by the mean of their probabilities."""

    def of_batch(a: Any, b: Any, batch: Any) -> jax.Array:
        return jnp.argmax(sum(jax.nn.softmax(apply_fn(params, *batch)) for params in (a, b)), axis=-1)

    @jax.jit
    def of_all(a: Any, b: Any, inputs: Any) -> jax.Array:
        batches = to_batches(inputs, batch_size)
        return jax.lax.map(lambda batch: of_batch(a, b, batch), batches).reshape(-1)

    return of_all(params_a, params_b, inputs)[: num_examples(inputs)]
