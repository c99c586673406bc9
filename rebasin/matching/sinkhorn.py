"""Sinkhorn re-basin: permutations learned through doubly stochastic matrices.

The method is that of Peña et al. 2023 (arXiv 2212.12042). Each group has a real matrix X. Sinkhorn's
algorithm makes of it the doubly stochastic matrix S(X) = argmax ⟨X, S⟩ + entropy(S), which has the form
diag(u) exp(X) diag(v). A loss of the network that is moved by these matrices is minimised in X by gradient
descent, and the permutation of each group is argmax ⟨X, P⟩.

The algorithm is that of OTT. Its gradients are implicit: they come from the equations that S fulfils, not
from the iterations. With G = ∂ℓ/∂S and H = S∘G,

    ∂ℓ/∂X = H − S∘(f1ᵀ + 1gᵀ),  where  [diag(S1) S; Sᵀ diag(Sᵀ1)] [f; g] = [H1; Hᵀ1].
"""

import dataclasses
import functools
import itertools
import math
import time
import warnings
from collections.abc import Callable, Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.arithmetic import distance, interpolate, wide_dtype
from rebasin.barrier import MetricsFn
from rebasin.batches import check_counts
from rebasin.errors import ConfigError, RebasinError
from rebasin.matching.learned import (
    LossHistory,
    check_metrics,
    check_step,
    import_optax,
    iter_batches,
    mean_loss,
)
from rebasin.matching.method import Method, build_method, check_networks, check_start
from rebasin.matching.progress import ProgressFn, Reporter
from rebasin.matching.result import MatchResult
from rebasin.matching.soft import SoftPermutation, harden, soft_permute, soften, uniform_soft
from rebasin.matching.weights import weight_matching
from rebasin.permutation import Permutation, check_permutation, compiled_permute, identity_permutation
from rebasin.roles import RoleNames, weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.trees import leaf_table, real_parts

__all__ = [
    "SinkhornLoss",
    "SinkhornMatching",
    "SinkhornStart",
    "import_solver",
    "plan_gradient",
    "sinkhorn_matching",
    "sinkhorn_plan",
    "sinkhorn_plans",
]

SinkhornLoss: TypeAlias = Literal["l2", "midpoint", "random"]
SinkhornStart: TypeAlias = Literal["weights", "identity", "uniform"]

# Near a permutation the system of the implicit gradient is singular. There OTT's own implicit gradients are
# NaN, with an exception from the device (0.6.0, costs of unit variance at ε = 0.1). This ridge makes the
# system solvable; in the directions that it damps, S∘(f1ᵀ + 1gᵀ) has next to no influence.
_RIDGE = 1e-6

# The alphas at which the objective of loss="random" is evaluated: the midpoint rule with five cells.
_RANDOM_ALPHAS = (0.1, 0.3, 0.5, 0.7, 0.9)


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class SinkhornMatching(Method):
    """Sinkhorn re-basin with its options.

    The objective is minus the loss of a hard permutation, argmax ⟨X, P⟩ of each group, over all of the data.
    The steps use shuffled batches and Adam. The result is the permutation with the best objective of all that
    were reached.

    A value whose `start` is a permutation can be neither hashed nor compared, since it holds arrays.

    Attributes:
      loss: the loss to minimise. ``"midpoint"`` is ℓ(½A + ½P[B]). ``"random"`` is ℓ(αA + (1−α)P[B]), at an α
        that each step draws uniformly from [0, 1]; the objective is then the mean over α = 0.1, 0.3, 0.5, 0.7
        and 0.9. ``"l2"`` is ‖A − P[B]‖² over the leaves that count, which needs no data.
      start: ``"weights"`` (the result of weight matching), ``"identity"``, a permutation, or ``"uniform"``
        (X = 0; the result is at least as good as the identity). Half of every unit's mass starts where the
        permutation puts the unit.
      num_steps: number of gradient steps, at least 1.
      learning_rate: learning rate of Adam on X. An entry of X that is larger by 1 has e times the weight in
        exp(X).
      batch_size: number of examples of a gradient step, and number of examples evaluated at once.
      roles: as in `Method`; weights are measured and averaged.

    Raises:
      ConfigError: an option has a value that cannot work.
    """

    name = "sinkhorn"
    objective = "−ℓ(½A + ½P[B]), or as the option `loss` says"

    loss: SinkhornLoss = "midpoint"
    start: SinkhornStart | Permutation = "weights"
    num_steps: int = 100
    learning_rate: float = 0.1
    batch_size: int = 500

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.loss not in get_args(SinkhornLoss):
            raise ConfigError(f"unknown loss {self.loss!r}; known: 'l2', 'midpoint', 'random'")
        check_start(self.start, get_args(SinkhornStart))
        check_counts(1, num_steps=self.num_steps, batch_size=self.batch_size)

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments of `match` that this method cannot do without: with ``loss="l2"`` only the key."""
        return ("key",) if self.loss == "l2" else ("metrics_fn", "data", "key")

    def _match(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        report: Reporter,
        *,
        key: jax.Array,
        metrics_fn: MetricsFn | None = None,
        data: Any = None,
    ) -> MatchResult:
        began = time.perf_counter()
        user = "sinkhorn_matching"
        import_solver()
        optax = import_optax(user)
        networks = {"params_a": params_a, "params_b": params_b}
        params_a, params_b = check_networks(spec, networks, self.roles).trees
        if metrics_fn is not None:
            check_metrics(metrics_fn, params_a, data, self.batch_size)
        start_key, batch_key, alpha_key = jax.random.split(key, 3)
        hard_loss = self._build_hard_loss(spec, params_a, params_b, metrics_fn, data)
        permutation, x = self.starting_point(spec, params_a, params_b, start_key)
        history = LossHistory.begin(permutation, hard_loss)
        optimizer = optax.adam(self.learning_rate)
        state = optimizer.init(x)
        batches = itertools.repeat(None) if data is None else iter_batches(batch_key, data, self.batch_size)
        statics = {"spec": spec, "metrics_fn": metrics_fn, "roles": self.roles}
        soft_losses = []
        report("step", 0, self.num_steps, history.objective)
        for step, batch in zip(range(self.num_steps), batches, strict=False):
            is_random = self.loss == "random"
            alpha = jax.random.uniform(jax.random.fold_in(alpha_key, step)) if is_random else 0.5
            soft_loss, gradient = _soft_loss_and_gradient(x, params_a, params_b, batch, alpha, **statics)
            check_step(step, gradient, soft_loss)
            soft_losses.append(float(soft_loss))
            updates, state = optimizer.update(gradient, state)
            x = optax.apply_updates(x, updates)
            history = history.after_step(harden(spec, x), hard_loss)
            report("step", step + 1, self.num_steps, history.objective)
        stats = {
            "start": self.start if isinstance(self.start, str) else "given",
            "loss": self.loss,
            "soft_losses": np.array(soft_losses),
            "seconds": time.perf_counter() - began,
        }
        return history.result(stats)

    def starting_point(
        self, spec: PermutationSpec, params_a: Any, params_b: Any, key: jax.Array
    ) -> tuple[dict[str, np.ndarray], dict[str, jax.Array]]:
        """Return the permutation to start from, and the matrix X of each group to start from.

        Raises:
          PermutationError: `start` is a permutation that does not fit.
        """
        permutation = identity_permutation(spec, params_a)
        if isinstance(self.start, Mapping):
            check_permutation(spec, params_a, self.start)
            permutation = {group: np.asarray(row, np.int32) for group, row in self.start.items()}
        elif self.start == "weights":
            match = weight_matching(spec, params_a, params_b, key=key, roles=self.roles)
            permutation = match.permutation
        is_uniform = isinstance(self.start, str) and self.start == "uniform"
        soft = uniform_soft(spec, params_a) if is_uniform else soften(spec, permutation, params_a)
        return permutation, {group: _half_mass(matrices) for group, matrices in soft.items()}

    def _build_hard_loss(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        metrics_fn: MetricsFn | None,
        data: Any,
    ) -> Callable[[Permutation], float]:
        """Build the function from a permutation to its loss over all data."""
        alphas = _RANDOM_ALPHAS if self.loss == "random" else (0.5,)

        weights = weight_leaves(params_a, self.roles)

        def hard_loss(permutation: Permutation) -> float:
            moved = compiled_permute(spec, permutation, params_b)
            if metrics_fn is None:
                return distance(params_a, moved, leaves=weights) ** 2
            points = [interpolate(params_a, moved, alpha, roles=self.roles) for alpha in alphas]
            evaluate = functools.partial(mean_loss, metrics_fn=metrics_fn, batch_size=self.batch_size)
            return sum(float(evaluate(point, data)) for point in points) / len(points)

        return hard_loss


def sinkhorn_matching(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    metrics_fn: MetricsFn | None = None,
    data: Any = None,
    *,
    key: jax.Array,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find a permutation of B by gradient descent over doubly stochastic matrices.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      metrics_fn: ``(params, batch) -> {"loss": [n], …}``, one loss for each example, differentiable in
        `params`; ignored with ``loss="l2"``.
      data: a `Batch`, or whatever tree of arrays ``[n, …]`` `metrics_fn` takes as its batch; ignored with
        ``loss="l2"``.
      key: PRNG key for the shuffled batches, for α, and for the weight matching at the start.
      progress: called at the start, after each step and at the end, as in `Method.match`.
      **options: fields of `SinkhornMatching`, which documents them.

    Returns:
      The match. ``objective`` is the best so far, at the start and after each step. ``converged`` says
      whether the last step left the hard permutation unchanged. ``stats`` holds the loss of the soft network
      at each step (``soft_losses``), the loss of each hard permutation (``losses``) and the number of times
      that it was computed (``evaluations``), ``start``, ``loss`` and ``seconds``.

    Raises:
      RebasinError: OTT or Optax is not installed.
      SpecMismatchError: a tree does not fit the spec.
      TreeMismatchError: A and B differ in leaves, shapes or dtypes.
      NonFiniteError: a weight, a loss on the path, or a gradient is NaN or infinite.
      DataError: the data are empty or of different lengths, or `metrics_fn` does not return one loss for each
        example.
      PermutationError: `start` is a permutation that does not fit.
      ConfigError: an option has a value that cannot work, or `metrics_fn` or `data` is missing.
    """
    method = build_method(SinkhornMatching, options)
    if method.loss != "l2" and (metrics_fn is None or data is None):
        raise ConfigError(f"loss={method.loss!r} needs metrics_fn and data; only loss='l2' does without")
    return method.match(
        spec, params_a, params_b, key=key, metrics_fn=metrics_fn, data=data, progress=progress
    )


def _half_mass(matrices: np.ndarray) -> jax.Array:
    """Return X such that S(X) leaves half of every unit's mass where a permutation matrix puts the unit.

    An entry of log(n−1) stands against n−1 entries of zero, whose exponentials have the same sum. Of a matrix
    whose entries are all equal, S(X) is uniform again.
    """
    return jnp.asarray(math.log(max(matrices.shape[-1] - 1, 1)) * matrices, jnp.float32)


@functools.partial(jax.jit, static_argnames=("spec", "metrics_fn", "roles"))
def _soft_loss_and_gradient(
    x: SoftPermutation,
    params_a: Any,
    params_b: Any,
    batch: Any,
    alpha: Any,
    *,
    spec: PermutationSpec,
    metrics_fn: MetricsFn | None,
    roles: RoleNames,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Return the loss of the soft network and its gradient in X.

    Without `metrics_fn`, the loss is the squared distance from A.
    """

    def soft_loss(x: SoftPermutation) -> jax.Array:
        moved = soft_permute(spec, sinkhorn_plans(x), params_b)
        if metrics_fn is not None:
            return metrics_fn(interpolate(params_a, moved, alpha, roles=roles), batch)["loss"].mean()
        # `rebasin.arithmetic.distance` is computed on the host in float64, and so it cannot be
        # differentiated.
        a, b = leaf_table(params_a), leaf_table(moved)
        weights = weight_leaves(params_a, roles)
        pairs = ((a[path], b[path]) for path in a if path in weights)
        differences = (real_parts(jnp.asarray(x, wide_dtype(x)) - y) for x, y in pairs)
        return sum(((difference**2).sum() for difference in differences), jnp.zeros(()))

    return jax.value_and_grad(soft_loss)(x)


def import_solver() -> None:
    """Import OTT, and silence the warning that this import raises about one of OTT's dependencies.

    Raises:
      RebasinError: OTT is not installed.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # jaxopt is no longer maintained
            import ott.solvers.linear.sinkhorn  # noqa: F401
    except ImportError as error:
        raise RebasinError(
            "sinkhorn_matching needs ott-jax, which is not installed: pip install 'rebasin-jax[sinkhorn]'"
        ) from error


@jax.custom_vjp
def sinkhorn_plan(x: jax.Array) -> jax.Array:
    """Compute the doubly stochastic matrices S(X) of a stack of matrices, with implicit gradients.

    OTT's Sinkhorn in log space runs until the marginals are wrong by at most 1e-4 of the mass, or for 1,000
    iterations.

    Args:
      x: stack of real matrices, ``[k, n, n]``.

    Returns:
      The stack of doubly stochastic matrices, ``[k, n, n]``.

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

    # OTT broadcasts arrays of different rank, which the caller may have forbidden.
    with jax.numpy_rank_promotion("allow"):
        return jax.vmap(plan)(x)


def plan_gradient(plan: jax.Array, cotangent: jax.Array) -> jax.Array:
    """Compute ∂ℓ/∂X from S(X) and ∂ℓ/∂S, by the formula in the module's docstring.

    The unknown g is eliminated from the linear system. What remains is still singular, since f + c and g − c
    give the same f1ᵀ + 1gᵀ for every c; the term 1/n fixes the mean of f.

    Args:
      plan: the matrices S(X), ``[k, n, n]``.
      cotangent: ∂ℓ/∂S, ``[k, n, n]``.
    """
    rows, columns = plan.sum(axis=2), plan.sum(axis=1)
    h = plan * cotangent
    row_sums, column_sums = h.sum(axis=2), h.sum(axis=1)
    multiply = functools.partial(jnp.einsum, precision="highest")
    n = plan.shape[-1]
    schur = -multiply("kij,kj,klj->kil", plan, 1 / columns, plan)
    schur += (rows[:, :, None] + _RIDGE) * jnp.eye(n)[None] + 1 / n
    target = row_sums - multiply("kij,kj->ki", plan, column_sums / columns)
    f = jnp.linalg.solve(schur, target[..., None])[..., 0]
    g = (column_sums - multiply("kij,ki->kj", plan, f)) / columns
    return h - plan * (f[:, :, None] + g[:, None, :])


def _plan_forward(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    plan = sinkhorn_plan(x)
    return plan, plan


def _plan_backward(plan: jax.Array, cotangent: jax.Array) -> tuple[jax.Array]:
    return (plan_gradient(plan, cotangent),)


sinkhorn_plan.defvjp(_plan_forward, _plan_backward)


def sinkhorn_plans(x: SoftPermutation) -> dict[str, jax.Array]:
    """Compute S(X) of every group.

    Matrices of equal size are solved as one stack, so that the solver is compiled once for each size.

    Args:
      x: real matrices of each group, ``[…, n, n]``.
    """
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
