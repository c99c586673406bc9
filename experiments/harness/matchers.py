"""The matching methods that an experiment can name, each as a function of two networks."""

from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

import jax
import numpy as np

import rebasin
from experiments.harness.experiment import Setup
from rebasin.training.data import normalise
from rebasin.training.loop import build_metrics

__all__ = ["PAPER_METHODS", "Matcher", "build_matchers", "check_methods"]

# (params_a, params_b) -> the match.
Matcher: TypeAlias = Callable[[Any, Any], rebasin.MatchResult]

# What arXiv 2404.06498 compares.
PAPER_METHODS = ("weights", "activations")


def check_methods(methods: Sequence[str]) -> list[str]:
    """One line for each problem of a list of methods."""
    known = ", ".join(rebasin.METHODS)
    problems = [f"methods: wanted some of {known}, got {m!r}" for m in methods if m not in rebasin.METHODS]
    if not methods or len(set(methods)) != len(methods):
        problems.append(f"methods: wanted at least one, none twice, got {list(methods)}")
    return problems


def build_matchers(
    setup: Setup[Any], methods: Sequence[str], *, num_steps: int | None = None
) -> dict[str, Matcher]:
    """The functions behind the names of methods, with their default options.

    Args:
      setup: of the experiment. Methods that need data are given the dataset's first `num_match` training
        images, a stratified subset without augmentation; methods that draw at random the config's seed.
      methods: names in `rebasin.METHODS`.
      num_steps: gradient steps of the methods that learn a permutation; `None` for their default.

    Returns:
      ``match(params_a, params_b) -> MatchResult`` for each name.
    """
    config, model, dataset = setup.config, setup.model, setup.dataset
    size = min(config.num_match or len(dataset.train.labels), len(dataset.train.labels))
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
        key = jax.random.key(config.seed)
        return lambda a, b: rebasin.match(setup.spec, a, b, name, key=key, **options)

    return {name: build(name) for name in methods}
