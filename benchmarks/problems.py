"""Pairs of networks to match: Gaussian weights, and networks trained by the experiments.

This is also the only place where benchmarks meet the recipes, the trained networks and the metrics of the
experiments.
"""

import pathlib
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from benchmarks.architectures import WIDTHS, build_architecture, draw_network
from benchmarks.reports import Reporter
from experiments.harness.networks import run_directory, shared_runs
from experiments.harness.presets import choose_preset
from rebasin.barrier import BarrierCurve
from rebasin.models import build_model
from rebasin.training.data import Dataset, load_dataset
from rebasin.training.loop import build_apply, train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

__all__ = [
    "MODELS",
    "Pair",
    "Problem",
    "find_recipe",
    "find_trained",
    "gaussian_problems",
    "train_digits",
    "train_network",
    "shared_runs",
]

MODELS = ("mlp", "vgg16", "resnet20")

# Trained networks that the comparison wants, in its order, and the preset that trains them.
_WANTED = {
    ("digits", "mlp"): "digits",
    ("mnist", "mlp"): "cpu",
    ("cifar10", "vgg16"): "cpu",
    ("cifar10", "resnet20"): "cpu",
}

_NAMES = {"mlp": "MLP 3×{}", "vgg16": "VGG-16 w{}", "resnet20": "ResNet-20 w{}"}


class Pair(NamedTuple):
    """Two networks.

    Attributes:
      name: which networks they are.
      load: reads or draws both.
    """

    name: str
    load: Callable[[], tuple[Any, Any]]


class Problem(NamedTuple):
    """Pairs of networks of one architecture.

    Attributes:
      model: architecture and width.
      weights: where the weights come from.
      spec: the symmetries.
      parameters: number of weights of one network.
      pairs: the pairs, independent of each other.
      keys: how many seeds of the matching each pair gets, all different.
      build_sweep: makes the function from two networks to the curve between them on test data; `None` where
        there is no task.
    """

    model: str
    weights: str
    spec: rebasin.PermutationSpec
    parameters: int
    pairs: tuple[Pair, ...]
    keys: int
    build_sweep: Callable[[], Callable[[Any, Any], BarrierCurve]] | None


def gaussian_problems(models: Sequence[str], *, pairs: int, max_width: int) -> Iterator[Problem]:
    """Yield a problem of independent standard normal weights for each model and width.

    Args:
      models: names of `MODELS`.
      pairs: number of pairs of each problem; every pair is matched once.
      max_width: largest width of a VGG-16 or a ResNet-20.
    """
    for model in models:
        for width in WIDTHS[model]:
            if model != "mlp" and width > max_width:
                continue
            spec, shapes = build_architecture(f"{model}:{width}").trace()

            def load(pair: int, shapes: Any = shapes) -> tuple[Any, Any]:
                return draw_network(shapes, 2 * pair), draw_network(shapes, 2 * pair + 1)

            yield Problem(
                model=_NAMES[model].format(width),
                weights="Gaussian",
                spec=spec,
                parameters=_count(shapes),
                pairs=tuple(
                    Pair(f"draws {2 * i}, {2 * i + 1}", lambda i=i, load=load: load(i)) for i in range(pairs)
                ),
                keys=1,
                build_sweep=None,
            )


def find_recipe(preset: str, model: str) -> Recipe:
    """Return the recipe by which a preset of the experiments trains a model."""
    return choose_preset(preset, model).build_recipe("trajectory")


def train_network(
    recipe: Recipe, dataset: Dataset, seed: int, runs_dir: pathlib.Path, **options: Any
) -> Trajectory:
    """Train one network, unless it is there, in the folder where the experiments look for it.

    Args:
      recipe: how to train.
      dataset: the data.
      seed: seed of the initialisation and of the order of the data.
      runs_dir: where the experiments keep networks.
      **options: further options of `rebasin.training.loop.train`.
    """
    directory = run_directory(runs_dir, recipe, seed)
    return train(recipe, dataset, seed=seed, directory=directory, resume=True, **options)


def train_digits(runs_dir: pathlib.Path, seeds: Sequence[int], reporter: Reporter) -> None:
    """Train the MLPs of the preset digits, which takes seconds, unless they are there."""
    recipe = find_recipe("digits", "mlp")
    missing = [seed for seed in seeds if not _is_trained(run_directory(runs_dir, recipe, seed))]
    with reporter.stage("train MLPs on digits", len(missing)) as advance:
        for seed in missing:
            train_network(recipe, load_dataset("digits"), seed, runs_dir)
            advance()


def _is_trained(directory: pathlib.Path) -> bool:
    return (directory / "run.json").exists() and Trajectory(directory).complete


def find_trained(
    models: Sequence[str],
    runs_dir: pathlib.Path,
    *,
    keys: int,
    num_eval: int,
    data_dir: str | None,
    say: Callable[[str], None],
) -> Iterator[Problem]:
    """Yield a problem for every recipe of finished networks in a folder, in pairs of neighbouring seeds.

    Args:
      models: names of the architectures that count.
      runs_dir: where the experiments keep networks.
      keys: number of seeds of the matching for each pair, all different.
      num_eval: number of test examples on which barriers are measured; 0 leaves barriers out.
      data_dir: TFDS folder.
      say: gets a line for everything that is left out, with the command that trains it.
    """
    runs: defaultdict[Recipe, list[Trajectory]] = defaultdict(list)
    for path in sorted(runs_dir.glob("*/seed_*/run.json")):
        trajectory = Trajectory(path.parent)
        if not trajectory.complete:
            say(f"left out, unfinished: {path.parent}")
        elif trajectory.recipe.model in models:
            runs[trajectory.recipe].append(trajectory)
    paired = {recipe: found for recipe, found in runs.items() if len(found) > 1}
    there = {(recipe.dataset, recipe.model) for recipe in paired}
    for (dataset, model), preset in _WANTED.items():
        if model in models and (dataset, model) not in there:
            say(
                f"left out, no pair of {model} on {dataset} in {runs_dir}; to train three:\n"
                f"  python -m experiments.training_trajectories --preset={preset} --model={model} "
                f"--runs_dir={runs_dir} --output_dir=results/{dataset}_{model}"
            )
    for recipe in sorted(paired, key=_order):
        yield _trained_problem(recipe, paired[recipe], keys=keys, num_eval=num_eval, data_dir=data_dir)


def _order(recipe: Recipe) -> tuple[Any, ...]:
    which, known = (recipe.dataset, recipe.model), list(_WANTED)
    return known.index(which) if which in known else len(known), which, recipe.width, recipe.epochs


def _trained_problem(
    recipe: Recipe, found: list[Trajectory], *, keys: int, num_eval: int, data_dir: str | None
) -> Problem:
    found = sorted(found, key=lambda trajectory: trajectory.seed)
    dataset = load_dataset(recipe.dataset, data_dir=data_dir)
    model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
    image = jax.ShapeDtypeStruct((1, *dataset.test.inputs.shape[1:]), jnp.float32)

    def build_sweep() -> Callable[[Any, Any], BarrierCurve]:
        measure = rebasin.build_sweep(rebasin.classification_metrics(build_apply(model, dataset)))
        data = jax.device_put(dataset.take(num_test=min(num_eval, len(dataset.test.labels))).test)
        return lambda params_a, params_b: measure(params_a, params_b, data)

    return Problem(
        model=_NAMES[recipe.model].format(recipe.width),
        weights=f"{recipe.dataset} e{recipe.epochs}",
        spec=rebasin.infer_spec(model.apply, found[0].last, image),
        parameters=_count(found[0].last),
        pairs=tuple(
            Pair(f"seeds {a.seed}, {b.seed}", lambda a=a, b=b: (a.last, b.last))
            for a, b in zip(found[::2], found[1::2], strict=False)
        ),
        keys=keys,
        build_sweep=build_sweep if num_eval else None,
    )


def _count(tree: Any) -> int:
    return sum(int(np.prod(leaf.shape)) for leaf in jax.tree.leaves(tree))
