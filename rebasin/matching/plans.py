"""Sinkhorn's algorithm as a differentiable map from real matrices to doubly stochastic ones.

S(X) = argmax ⟨X, S⟩ + entropy(S), of the form diag(u) exp(X) diag(v). The algorithm is OTT's. Gradients are
implicit: they come from the equations that S fulfils, not from the iterations. With G = ∂ℓ/∂S and H = S∘G,

    ∂ℓ/∂X = H − S∘(f1ᵀ + 1gᵀ),  where  [diag(S1) S; Sᵀ diag(Sᵀ1)] [f; g] = [H1; Hᵀ1].
"""

import functools
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import RebasinError

__all__ = ["import_solver", "sinkhorn_plan", "sinkhorn_plans"]

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
