"""The matching methods that an experiment can name, each as a function of two networks."""

from collections.abc import Callable
from typing import Any

import jax
import numpy as np

import rebasin
from rebasin.data import Dataset, normalise
from rebasin.errors import ConfigError
from rebasin.spec import PermutationSpec

__all__ = ["METHODS", "Matcher", "build_matcher", "check_methods"]

# (params_a, params_b) -> the match.
Matcher = Callable[[Any, Any], rebasin.MatchResult]

METHODS = ("weights", "activations")


def check_methods(methods: tuple[str, ...]) -> list[str]:
    """One line for each problem of a list of methods."""
    problems = [
        f"methods: wanted some of {', '.join(METHODS)}, got {m!r}" for m in methods if m not in METHODS
    ]
    if not methods or len(set(methods)) != len(methods):
        problems.append(f"methods: wanted at least one, none twice, got {list(methods)}")
    return problems


def build_matcher(
    method: str, spec: PermutationSpec, model: Any, dataset: Dataset, *, seed: int, num_match: int | None
) -> Matcher:
    """The function behind a method's name.

    Args:
      method: one of `METHODS`. ``"weights"`` is `rebasin.weight_matching`, ``"activations"`` is
        `rebasin.activation_matching` with the paper's choices, on training images without augmentation.
      spec: the symmetries of `model`.
      model: a Flax module.
      dataset: gives the training images and their statistics.
      seed: of the order of groups in weight matching.
      num_match: training images on which activations are compared, a stratified subset; `None` for all.

    Returns:
      ``match(params_a, params_b) -> MatchResult``.

    Raises:
      ConfigError: there is no such method.
    """
    if method == "weights":
        return lambda a, b: rebasin.weight_matching(spec, a, b, key=jax.random.key(seed))
    if method != "activations":
        raise ConfigError(f"no matching method is called {method!r}; there are {', '.join(METHODS)}")
    size = min(num_match or len(dataset.train.labels), len(dataset.train.labels))
    images = jax.device_put(dataset.take(num_train=size).train.images)
    mean, std = np.asarray(dataset.mean), np.asarray(dataset.std)

    # One function for all pairs of networks, so that it is traced once.
    def function(variables: Any, batch: jax.Array) -> jax.Array:
        return model.apply(variables, normalise(batch, mean, std))

    return lambda a, b: rebasin.activation_matching(spec, a, b, function, images)
