"""Sinkhorn re-basin: permutations learned through soft ones (Peña et al. 2023, arXiv 2212.12042).

Each group has a real matrix X, from which Sinkhorn's algorithm makes the doubly stochastic matrix S(X) =
argmax ⟨X, S⟩ + entropy(S), of the form diag(u) exp(X) diag(v). A loss of the network so moved is minimised in
X by gradient descent (`rebasin.matching.sinkhorn`).
"""

import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, RebasinError
from rebasin.matching.learned import (
    LossFn,
    Search,
    check_loss,
    check_step,
    import_optax,
    iter_batches,
    mean_loss,
)
from rebasin.matching.method import check_at_least, check_networks
from rebasin.matching.result import MatchResult
from rebasin.matching.soft import harden, soft_permute, soften, uniform_soft
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, check_permutation, compiled_permute, identity_permutation
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, interpolate, is_weight, leaf_table

__all__ = ["Loss", "Start", "import_solver", "sinkhorn_matching", "sinkhorn_plan", "sinkhorn_plans"]


# OTT's own implicit gradients end in NaN, and an exception from the device, for plans near a permutation
# (0.6.0, costs of unit variance at ε = 0.1): the system is singular there. This ridge makes it solvable; in
# directions that it damps, S∘(f1ᵀ + 1gᵀ) has next to no influence.
_RIDGE = 1e-6


def import_solver() -> None:
    """Imports OTT, whose import warns of one of its own dependencies.

    Raises:
      RebasinError: it is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt announces that it is no longer kept
            import ott.solvers.linear.sinkhorn  # noqa: F401
    except ImportError as error:
        raise RebasinError(
            "sinkhorn_matching needs ott-jax, which is not installed: pip install 'rebasin-jax[sinkhorn]'"
        ) from error


@jax.custom_vjp
def sinkhorn_plan(x: jax.Array) -> jax.Array:
    """The doubly stochastic matrices S(X) of a stack, ``[k, n, n]``, with implicit gradients.

    By OTT's Sinkhorn in log space, to an error of 1e-4 of the mass in the marginals or 1,000 iterations.

    Raises:
      RebasinError: OTT is not installed.
    """
    import_solver()
    from ott.geometry import geometry
    from ott.problems.linear import linear_problem
    from ott.solvers.linear import sinkhorn

    solver = sinkhorn.Sinkhorn(threshold=1e-4, max_iterations=1000)

    def plan(x: jax.Array) -> jax.Array:
        problem = linear_problem.LinearProblem(geometry.Geometry(cost_matrix=-x, epsilon=1.0))
        return solver(problem).matrix * len(x)

    # OTT broadcasts ranks, which a strict caller may have forbidden.
    with jax.numpy_rank_promotion("allow"):
        return jax.vmap(plan)(x)


def _plan_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    plan = sinkhorn_plan(x)
    return plan, plan


def _plan_backward(plan: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    """The module's formula; g is eliminated, and the shift that leaves f1ᵀ + 1gᵀ as it is, filled up."""
    rows, columns = plan.sum(axis=2), plan.sum(axis=1)
    h = plan * cotangent
    right, below = h.sum(axis=2), h.sum(axis=1)
    multiply = functools.partial(jnp.einsum, precision="highest")
    n = plan.shape[-1]
    schur = -multiply("kij,kj,klj->kil", plan, 1 / columns, plan)
    schur += (rows[:, :, None] + _RIDGE) * jnp.eye(n)[None] + 1 / n
    f = jnp.linalg.solve(schur, (right - multiply("kij,kj->ki", plan, below / columns))[..., None])[..., 0]
    g = (below - multiply("kij,ki->kj", plan, f)) / columns
    return (h - plan * (f[:, :, None] + g[:, None, :]),)


sinkhorn_plan.defvjp(_plan_forward, _plan_backward)


def sinkhorn_plans(x: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """S(X) of every group; matrices of one size go through one solver, which is compiled once for them."""
    sizes: dict[int, list[str]] = {}
    for group, matrices in x.items():
        sizes.setdefault(matrices.shape[-1], []).append(group)
    plans: dict[str, jax.Array] = {}
    for n, groups in sizes.items():
        stacks = [x[group].reshape(-1, n, n) for group in groups]
        solved = jnp.ones_like(jnp.concatenate(stacks)) if n == 1 else sinkhorn_plan(jnp.concatenate(stacks))
        ends = np.cumsum([len(stack) for stack in stacks])[:-1]
        for group, part in zip(groups, jnp.split(solved, ends), strict=True):
            plans[group] = part.reshape(x[group].shape)
    return plans


Loss = Literal["l2", "midpoint", "random"]


Start = Literal["weights", "identity", "uniform"]


# Where the loss on the segment is measured for the objective of "random": the midpoint rule with five cells.
_RANDOM_ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


def sinkhorn_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    loss_fn: LossFn | None = None,
    data: Any = None,
    *,
    key: jax.Array,
    loss: Loss = "midpoint",
    start: Start | Permutation = "weights",
    num_steps: int = 100,
    learning_rate: float = 0.1,
    batch_size: int = 500,
    predicate: LeafPredicate = is_weight,
) -> MatchResult:
    """Finds a permutation of B by gradient descent over doubly stochastic matrices.

    The objective is minus the loss of the hard permutation, argmax ⟨X, P⟩ of each group, over all of `data`:

    - ``"l2"``: ‖A − P[B]‖² over all weights; needs no data.
    - ``"midpoint"``: ℓ(½A + ½P[B]).
    - ``"random"``: ℓ(αA + (1−α)P[B]), in each step at an α drawn uniformly from [0, 1], in the objective the
      mean over α = 0.1, 0.3, 0.5, 0.7, 0.9.

    Steps use shuffled batches and Adam. Of all hard permutations met, the best in the objective is returned.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      loss_fn: ``(params, batch) -> [n]``, one loss for each example, differentiable in `params`; not for
        ``loss="l2"``.
      data: tree of arrays ``[n, …]`` with one common n; not for ``loss="l2"``.
      key: PRNG key for batches, α, and the weight matching at the start.
      loss: what is minimised, as above.
      start: ``"weights"`` (the result of weight matching), ``"identity"``, a permutation, or ``"uniform"``
        (X = 0; the result is at least as good as the identity). Half of every unit's mass starts where the
        permutation puts it.
      num_steps: gradient steps, at least 1.
      learning_rate: of Adam on X, whose unit is that of the entropy: a difference of 1 is a factor of e in S.
      batch_size: examples for each step, and at once in an evaluation.
      predicate: ``(path, leaf) -> bool``, the leaves that are measured and averaged.

    Returns:
      The match. ``objective`` is the best so far, at the start and after each step. ``converged`` says
      whether the last step left the hard permutation as it was. ``stats`` has the loss of every step's soft
      network (``soft_losses``) and hard permutation (``losses``), the ``evaluations`` of the latter,
      ``start``, ``loss`` and ``seconds``.

    Raises:
      RebasinError: OTT or Optax is not installed.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      NonFiniteError: a weight, or a loss on the segment, is NaN or infinite.
      DataError: the data are empty or of different lengths, or `loss_fn` returns something else than [n].
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option has a value that cannot work, or `loss_fn` or `data` is missing.
    """
    began = time.perf_counter()
    import_solver()
    optax = import_optax("sinkhorn_matching")
    check_at_least(1, num_steps=num_steps)
    check_networks(spec, {"params_a": params_a, "params_b": params_b}, predicate)
    if loss not in get_args(Loss):
        raise ConfigError(f"unknown loss {loss!r}; known: 'l2', 'midpoint', 'random'")
    if loss == "l2":
        loss_fn, data = None, None
    elif loss_fn is None or data is None:
        raise ConfigError(f"loss={loss!r} needs loss_fn and data; only loss='l2' does without")
    else:
        check_loss(loss_fn, params_a, data, batch_size, user="sinkhorn_matching")
    start_key, batch_key, alpha_key = jax.random.split(key, 3)
    hard_loss = _build_hard_loss(spec, params_a, params_b, loss_fn, data, loss, batch_size, predicate)
    permutation, x = _start(spec, params_a, params_b, start, start_key, predicate)
    search = Search(hard_loss, permutation)
    optimizer = optax.adam(learning_rate)
    state = optimizer.init(x)
    batches = itertools.repeat(None) if data is None else iter_batches(batch_key, data, batch_size)
    soft_losses = []
    for step, batch in zip(range(num_steps), batches, strict=False):
        alpha = jax.random.uniform(jax.random.fold_in(alpha_key, step)) if loss == "random" else 0.5
        soft_loss, gradient = _loss_and_gradient(
            x, params_a, params_b, batch, alpha, spec=spec, loss_fn=loss_fn, predicate=predicate
        )
        check_step(step, gradient, soft_loss)
        soft_losses.append(float(soft_loss))
        updates, state = optimizer.update(gradient, state)
        x = optax.apply_updates(x, updates)
        search.offer(harden(spec, x))
    stats = {
        "start": start if isinstance(start, str) else "given",
        "loss": loss,
        "soft_losses": np.array(soft_losses),
        "seconds": time.perf_counter() - began,
    }
    return search.result(stats)


@functools.partial(jax.jit, static_argnames=("spec", "loss_fn", "predicate"))
def _loss_and_gradient(
    x: dict[str, jax.Array],
    params_a: Any,
    params_b: Any,
    batch: Any,
    alpha: Any,
    *,
    spec: PermutationSpec,
    loss_fn: LossFn | None,
    predicate: LeafPredicate,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The soft loss and its gradient in X; without a `loss_fn` it is the squared distance."""

    def soft_loss(x: dict[str, jax.Array]) -> jax.Array:
        moved = soft_permute(spec, sinkhorn_plans(x), params_b)
        if loss_fn is None:
            return _squared_distance(params_a, moved, predicate)
        return loss_fn(interpolate(params_a, moved, alpha, predicate=predicate), batch).mean()

    return jax.value_and_grad(soft_loss)(x)


def _squared_distance(params_a: Any, params_b: Any, predicate: LeafPredicate) -> Any:
    a, b = leaf_table(params_a), leaf_table(params_b)
    return sum(((a[path] - b[path]) ** 2).sum() for path in a if predicate(path, a[path]))


def _build_hard_loss(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    loss_fn: LossFn | None,
    data: Any,
    loss: Loss,
    batch_size: int,
    predicate: LeafPredicate,
) -> Callable[[Permutation], float]:
    """The loss of a permutation over all data."""
    if loss_fn is None:
        reference = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params_a)

        def hard_loss(permutation: Permutation) -> float:
            moved = jax.tree.map(np.asarray, compiled_permute(spec, permutation, params_b))
            return float(_squared_distance(reference, moved, predicate))

        return hard_loss
    alphas = _RANDOM_ALPHAS if loss == "random" else (0.5,)

    def hard_loss(permutation: Permutation) -> float:
        moved = compiled_permute(spec, permutation, params_b)
        points = [interpolate(params_a, moved, alpha, predicate=predicate) for alpha in alphas]
        losses = [float(mean_loss(p, data, loss_fn=loss_fn, batch_size=batch_size)) for p in points]
        return sum(losses) / len(losses)

    return hard_loss


def _start(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    start: Start | Permutation,
    key: jax.Array,
    predicate: LeafPredicate,
) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
    """The permutation to start from, and matrices X that give its places half of the mass."""
    permutation = identity_permutation(spec, params_a)
    if isinstance(start, Mapping):
        check_permutation(spec, params_a, start)
        permutation = {group: np.asarray(row, np.int32) for group, row in start.items()}
    elif start == "weights":
        permutation = weight_matching(spec, params_a, params_b, key=key, predicate=predicate).permutation
    elif start not in get_args(Start):
        raise ConfigError(
            f"unknown start {start!r}; known: 'weights', 'identity', 'uniform', or a permutation"
        )
    uniform = uniform_soft(spec, params_a)
    matrices = (
        uniform if isinstance(start, str) and start == "uniform" else soften(spec, permutation, params_a)
    )
    x = {}
    for group, matrix in matrices.items():
        n = matrix.shape[-1]
        # exp(log(n−1)) against n−1 others. Where all entries are equal it makes no difference.
        x[group] = jnp.asarray(math.log(max(n - 1, 1)) * matrix, jnp.float32)
    return permutation, x
