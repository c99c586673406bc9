"""The matching methods that an experiment can name, each as a function of two networks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

import rebasin
from rebasin.data import Dataset, normalise
from rebasin.spec import PermutationSpec
from rebasin.training import build_metrics

__all__ = ["Matcher", "build_matchers", "check_methods"]

# (params_a, params_b) -> the match.
Matcher: TypeAlias = Callable[[Any, Any], rebasin.MatchResult]


def check_methods(methods: Sequence[str]) -> list[str]:
    """One line for each problem of a list of methods."""
    known = ", ".join(rebasin.METHODS)
    problems = [f"methods: wanted some of {known}, got {m!r}" for m in methods if m not in rebasin.METHODS]
    if not methods or len(set(methods)) != len(methods):
        problems.append(f"methods: wanted at least one, none twice, got {list(methods)}")
    return problems


def build_matchers(
    methods: Sequence[str],
    spec: PermutationSpec,
    model: Any,
    dataset: Dataset,
    *,
    seed: int,
    num_match: int | None,
    num_steps: int | None = None,
) -> dict[str, Matcher]:
    """The functions behind the names of methods, with their default options.

    Args:
      methods: names in `rebasin.METHODS`.
      spec: the symmetries of `model`.
      model: a Flax module.
      dataset: its training images, without augmentation, are what methods that need data are given.
      seed: of the methods that draw at random.
      num_match: training examples, a stratified subset; `None` for all.
      num_steps: gradient steps of the methods that learn a permutation; `None` for their default.

    Returns:
      ``match(params_a, params_b) -> MatchResult`` for each name.
    """
    size = min(num_match or len(dataset.train.labels), len(dataset.train.labels))
    examples = jax.device_put(dataset.take(num_train=size).train)
    mean, std = np.asarray(dataset.mean), np.asarray(dataset.std)
    metrics = build_metrics(model, mean, std)

    # One function for all pairs of networks, so that it is traced once.
    def function(variables: Any, batch: jax.Array) -> jax.Array:
        return model.apply(variables, normalise(batch, mean, std))

    def loss_fn(variables: Any, batch: Any) -> jax.Array:
        return metrics(variables, batch)["loss"]

    def build(name: str) -> Matcher:
        method = rebasin.METHODS[name]
        takes = (*method.needs, *method.options)
        options: dict[str, Any] = {}
        if "function" in takes:
            options = {"function": function, "data": examples.images}
        elif "loss_fn" in takes:
            options = {"loss_fn": loss_fn, "data": examples}
            if num_steps is not None:
                options["num_steps"] = num_steps
        key = jax.random.key(seed)
        return lambda a, b: rebasin.match(spec, a, b, name, key=key, **options)

    return {name: build(name) for name in methods}
