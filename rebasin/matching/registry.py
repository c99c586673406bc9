"""Matching methods by name."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from rebasin.errors import ConfigError
from rebasin.matching.activations import ActivationMatching
from rebasin.matching.covariance import CovarianceMatching
from rebasin.matching.frank_wolfe import FrankWolfeMatching
from rebasin.matching.method import Method, build_method
from rebasin.matching.progress import ProgressFn
from rebasin.matching.result import MatchResult
from rebasin.matching.sinkhorn import SinkhornMatching
from rebasin.matching.straight_through import StraightThroughMatching
from rebasin.matching.weights import WeightMatching
from rebasin.spec import PermutationSpec

__all__ = ["METHODS", "as_method", "match"]

# Adding a method takes one line here; tests/matching/test_every_method.py then runs for it as well.
METHODS: dict[str, type[Method]] = {
    method.name: method
    for method in (
        WeightMatching,
        ActivationMatching,
        CovarianceMatching,
        FrankWolfeMatching,
        StraightThroughMatching,
        SinkhornMatching,
    )
}


def as_method(method: Method | str, **options: Any) -> Method:
    """Return a method as a value: the one given, or the one of that name with these options.

    Raises:
      ConfigError: no method has that name, an option is unknown to it or cannot work, or options come beside
        a method that holds its own.

    Examples:
      >>> as_method("weights", restarts=3) == WeightMatching(restarts=3)
      True
    """
    if isinstance(method, Method):
        if options:
            raise ConfigError(f"{method} holds its options; got {', '.join(options)} beside it")
        return method
    if method not in METHODS:
        raise ConfigError(f"no matching method is called {method!r}; there are {', '.join(METHODS)}")
    return build_method(METHODS[method], options)


def match(
    spec: PermutationSpec,
    params_a: Any,
    params_b: Any,
    method: Method | str = "weights",
    *,
    key: jax.Array | None = None,
    apply_fn: Callable[..., Any] | None = None,
    metrics_fn: Callable[..., Mapping[str, jax.Array]] | None = None,
    data: Any = None,
    progress: ProgressFn | None = None,
    **options: Any,
) -> MatchResult:
    """Find a permutation of B that aligns it with A, by any method.

    Args:
      spec: the symmetries of the networks.
      params_a: tree of A, which stays.
      params_b: tree of B, with the leaves, shapes and dtypes of A.
      method: a method that holds its options, or the name of one in `METHODS`.
      key: as in `Method.match`; ignored by a method that draws nothing at random.
      apply_fn: as in `Method.match`.
      metrics_fn: as in `Method.match`.
      data: as in `Method.match`.
      progress: as in `Method.match`.
      **options: options of the method of that name.

    Returns:
      What the method returns.

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
    chosen = as_method(method, **options)
    return chosen.match(
        spec,
        params_a,
        params_b,
        key=key,
        apply_fn=apply_fn,
        metrics_fn=metrics_fn,
        data=data,
        progress=progress,
    )
