"""Matching methods by name."""

import dataclasses
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import jax

from rebasin.errors import ConfigError, problem_list
from rebasin.matching.activations import ActivationMatching, activation_matching
from rebasin.matching.covariance import CovarianceMatching, covariance_matching
from rebasin.matching.frank_wolfe import frank_wolfe_matching
from rebasin.matching.result import MatchResult
from rebasin.matching.sinkhorn import sinkhorn_matching
from rebasin.matching.straight_through import straight_through_matching
from rebasin.matching.weights import weight_matching
from rebasin.spec import PermutationSpec

__all__ = ["METHODS", "Method", "match"]

_NETWORKS = ("spec", "params_a", "params_b")


class Method(NamedTuple):
    """A matching method.

    Attributes:
      function: ``(spec, params_a, params_b, …) -> MatchResult``; its signature says what else it takes.
      objective: what it maximises.
      fields: the dataclass of its options, if there is one.
    """

    function: Callable[..., MatchResult]
    objective: str
    fields: Any = None

    @property
    def needs(self) -> tuple[str, ...]:
        """Arguments without a default, besides spec and networks."""
        parameters = inspect.signature(self.function).parameters.values()
        parameters = [p for p in parameters if p.kind is not p.VAR_KEYWORD and p.name not in _NETWORKS]
        return tuple(p.name for p in parameters if p.default is p.empty)

    @property
    def options(self) -> tuple[str, ...]:
        """Arguments with a default."""
        parameters = inspect.signature(self.function).parameters.values()
        fields = () if self.fields is None else tuple(field.name for field in dataclasses.fields(self.fields))
        return (*(p.name for p in parameters if p.default is not p.empty), *fields)


# To add a method is to add a line here; tests/matching/test_every_method.py then runs for it as well.
METHODS: dict[str, Method] = {
    "weights": Method(weight_matching, "⟨A, P[B]⟩"),
    "activations": Method(activation_matching, ActivationMatching.objective, ActivationMatching),
    "covariance": Method(covariance_matching, CovarianceMatching.objective, CovarianceMatching),
    "frank_wolfe": Method(frank_wolfe_matching, "⟨A, P[B]⟩"),
    "straight_through": Method(straight_through_matching, "−ℓ(½A + ½P[B])"),
    "sinkhorn": Method(sinkhorn_matching, "−ℓ(½A + ½P[B]), or by its option `loss`"),
}


def match(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    method: str = "weights",
    *,
    key: jax.Array | None = None,
    **options: Any,
) -> MatchResult:
    """Finds a permutation of B that aligns it with A, by the method of that name.

    Args:
      spec: the symmetries.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      method: a name in `METHODS`.
      key: PRNG key; a method that draws nothing at random does without, and ignores it.
      **options: what else the method needs or takes, by name; its function documents them.

    Returns:
      What the method's function returns.

    Raises:
      ConfigError: no method has that name, or an argument is missing or not known to the method.
      RebasinError: whatever the method raises.

    Examples:
      >>> import numpy as np
      >>> spec = PermutationSpec.from_axes({"w": (None, "P0")})
      >>> a, b = {"w": np.array([[1.0, 2.0, 3.0]])}, {"w": np.array([[3.0, 1.0, 2.0]])}
      >>> match(spec, a, b, "frank_wolfe").permutation["P0"].tolist()
      [1, 2, 0]
    """
    if method not in METHODS:
        raise ConfigError(f"no matching method is called {method!r}; there are {', '.join(METHODS)}")
    chosen = METHODS[method]
    if key is not None and "key" in (*chosen.needs, *chosen.options):
        options["key"] = key
    problems = [f"{name}: missing" for name in chosen.needs if name not in options]
    problems += [f"{name}: not known" for name in options if name not in (*chosen.needs, *chosen.options)]
    if problems:
        takes = f"it needs {', '.join(chosen.needs) or 'nothing else'}; it takes {', '.join(chosen.options)}"
        raise ConfigError(problem_list(f"method {method!r} cannot be called like this ({takes}):", problems))
    return chosen.function(spec, params_a, params_b, **options)
