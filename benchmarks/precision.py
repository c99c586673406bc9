"""Training and evaluating in bfloat16: what it saves, and what it does to test errors and barriers.

  python -m benchmarks.precision --output=precision.json
  python -m benchmarks.precision --dataset=cifar10 --model=vgg16 --width=16 --epochs=20 --pairs=3

Trains pairs of networks from different seeds twice, with the same initialisations and batches. In float32
everything is float32, the form of the experiments. In bfloat16 the model computes in bfloat16, forwards and
backwards, from weights that stay float32, and logits, loss and optimiser are float32. Every network is
measured in both precisions: test error, and test error and loss barrier of the pair as trained and under
the permutation of weight matching. A difference of the two precisions is one over pairs, with its 95 %
interval; seconds are those of an epoch after the first, and the precisions take turns.
"""

import contextlib
import dataclasses
import json
import pathlib
import time
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rebasin
from benchmarks.command import run
from benchmarks.reports import Reporter, build_reporter, describe_machine, mean_and_interval
from benchmarks.timing import median_ratio
from rebasin import classification_metrics
from rebasin.models import MODELS, build_model
from rebasin.training import build_recipe
from rebasin.training.data import Dataset, load_dataset
from rebasin.training.loop import TrainingData, build_apply, build_epoch, build_init
from rebasin.training.recipes import Recipe

__all__ = ["MEASURES", "PRECISIONS", "HalfPrecision", "half_precision_model", "measure"]

PRECISIONS = ("float32", "bfloat16")
MEASURES = ("test error", "error barrier", "aligned", "loss, aligned")


@dataclasses.dataclass(frozen=True)
class HalfPrecision:
    """A Flax module whose weights and inputs are rounded to bfloat16 when it is applied.

    Attributes:
      module: the module in float32.
    """

    module: Any

    def init(self, *arguments: Any, **keywords: Any) -> Any:
        """Initialise the module in float32."""
        return self.module.init(*arguments, **keywords)

    def apply(self, variables: Any, inputs: Any, **keywords: Any) -> Any:
        """Apply the module in bfloat16; its outputs are float32."""
        outputs = self.module.apply(_cast(variables, jnp.bfloat16), _cast(inputs, jnp.bfloat16), **keywords)
        return _cast(outputs, jnp.float32)


def _cast(tree: Any, dtype: Any) -> Any:
    def cast_leaf(leaf: Any) -> Any:
        return leaf.astype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf

    return jax.tree.map(cast_leaf, tree)


@contextlib.contextmanager
def half_precision_model(name: str) -> Iterator[str]:
    """Register the bfloat16 form of a model while a ``with`` statement lasts, and return its name."""
    models, half = cast(MutableMapping[str, Any], MODELS), f"{name}_bfloat16"
    models[half] = lambda width, num_classes: HalfPrecision(MODELS[name](width, num_classes))
    try:
        yield half
    finally:
        del models[half]


def _train_pair(
    recipes: Mapping[str, Recipe], dataset: Dataset, seeds: Sequence[int], seconds: dict[str, list[float]]
) -> dict[str, list[Any]]:
    """Train a pair in every precision, epoch by epoch in turn, and add the seconds of an epoch."""
    classes = dataset.num_classes
    split = dataset.take(num_train=recipes["float32"].num_train).train
    data = TrainingData(*jax.device_put((split, dataset.mean, dataset.std)))
    networks: dict[str, list[Any]] = {name: [] for name in recipes}
    for seed in seeds:
        init_key, order_key = jax.random.split(jax.random.key(seed))
        states = {name: build_init(recipe, classes)(init_key, data) for name, recipe in recipes.items()}
        for epoch in range(1, recipes["float32"].epochs + 1):
            for name in list(recipes)[:: 1 if epoch % 2 else -1]:
                began = time.perf_counter()
                step = build_epoch(recipes[name], classes)
                states[name], _ = jax.block_until_ready(step(states[name], epoch, order_key, data))
                if epoch > 1:
                    seconds[name].append(time.perf_counter() - began)
        for name, state in states.items():
            networks[name].append(state.variables)
    return networks


def measure(
    recipe: Recipe, dataset: Dataset, seeds: Sequence[int], *, num_eval: int | None, num_alphas: int = 11
) -> dict[str, Any]:
    """Train and measure pairs in every precision.

    Args:
      recipe: how the networks are trained; its model is the float32 one.
      dataset: the data.
      seeds: seed of the first network of each pair; the second has the next one.
      num_eval: number of test examples on which paths are measured, `None` for all.
      num_alphas: points of a path.

    Returns:
      ``"values"`` maps ``"TRAINED IN, MEASURED IN"`` to the lists over pairs of each of `MEASURES`,
      fractions and nats; ``"seconds"`` maps each precision to the seconds of all epochs but the first.
    """
    models = {
        "float32": build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes),
    }
    models["bfloat16"] = cast(Any, HalfPrecision(models["float32"]))
    test = jax.device_put(dataset.take(num_test=num_eval).test if num_eval else dataset.test)
    seconds: dict[str, list[float]] = {name: [] for name in PRECISIONS}
    values: dict[str, dict[str, list[float]]] = {}
    sweeps = {
        name: rebasin.build_sweep(classification_metrics(build_apply(model, dataset)), num_alphas=num_alphas)
        for name, model in models.items()
    }
    spec = None
    with half_precision_model(recipe.model) as half:
        recipes = {"float32": recipe, "bfloat16": dataclasses.replace(recipe, model=half)}
        for seed in seeds:
            trained = _train_pair(recipes, dataset, (seed, seed + 1), seconds)
            for name, (params_a, params_b) in trained.items():
                if spec is None:
                    apply_fn = build_apply(models["float32"], dataset)
                    spec = rebasin.infer_spec(apply_fn, params_a, dataset.test.inputs[:2])
                found = rebasin.weight_matching(spec, params_a, params_b, key=jax.random.key(seed))
                moved = rebasin.permute(spec, found.permutation, params_b)
                for measured, sweep in sweeps.items():
                    plain, aligned = sweep(params_a, params_b, test), sweep(params_a, moved, test)
                    numbers = (
                        plain.means["error"][[0, -1]].mean(),
                        plain.error_barrier.value,
                        aligned.error_barrier.value,
                        aligned.loss_barrier.value,
                    )
                    row = values.setdefault(f"{name}, {measured}", {m: [] for m in MEASURES})
                    for what, number in zip(MEASURES, numbers, strict=True):
                        row[what].append(float(number))
    return {"values": values, "seconds": seconds}


def _report(results: Mapping[str, Any], reporter: Reporter) -> None:
    values = results["values"]
    scale = dict.fromkeys(MEASURES, 100) | {MEASURES[-1]: 1}
    rows = [
        [name, *(mean_and_interval(scale[m] * np.array(row[m]), 2) for m in MEASURES)]
        for name, row in values.items()
    ]
    base = values["float32, float32"]
    for name, row in list(values.items())[1:]:
        differences = (scale[m] * (np.array(row[m]) - np.array(base[m])) for m in MEASURES)
        rows.append([f"{name}: difference", *(mean_and_interval(d, 2) for d in differences)])
    reporter.table(("trained, measured in", *MEASURES), rows)
    ratio = median_ratio(results["seconds"]["float32"], results["seconds"]["bfloat16"])
    reporter.say(
        f"errors in %, loss in nats; an epoch in bfloat16 is {ratio:.2f} times as fast as in float32"
    )


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_string("dataset", "digits", "Dataset of the networks.")
    flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")
    flags.DEFINE_string("model", "mlp", "Model of the networks.")
    flags.DEFINE_integer("width", 128, "Width of the model.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Batch size.", lower_bound=1)
    flags.DEFINE_integer("num_train", None, "Training examples, by default all.", lower_bound=1)
    flags.DEFINE_integer("num_eval", None, "Test examples, by default all.", lower_bound=1)
    flags.DEFINE_integer("epochs", 30, "Epochs of training of a network.", lower_bound=2)
    flags.DEFINE_integer("pairs", 5, "Number of pairs.", lower_bound=1)
    flags.DEFINE_integer("seed", 200, "Seed of the first network.", lower_bound=0)
    flags.DEFINE_string("output", None, "JSON file for all numbers, versions and load averages.")


def main() -> None:
    """Measure both precisions, and print and store the numbers."""
    options, reporter = flags.FLAGS, build_reporter()
    recipe = build_recipe(
        "trajectory",
        dataset=options.dataset,
        model=options.model,
        width=options.width,
        epochs=options.epochs,
        batch_size=options.batch_size,
        num_train=options.num_train,
        warmup_epochs=min(5, options.epochs),
    )
    seeds = range(options.seed, options.seed + 2 * options.pairs, 2)
    dataset = load_dataset(options.dataset, data_dir=options.data_dir)
    results = measure(recipe, dataset, seeds, num_eval=options.num_eval)
    if options.output:
        content = {**describe_machine(), "recipe": recipe.__dict__, **results}
        pathlib.Path(options.output).write_text(json.dumps(content, indent=1) + "\n")
    reporter.say(f"{options.model} (width {options.width}) on {options.dataset}, {options.pairs} pairs")
    _report(results, reporter)


if __name__ == "__main__":
    define_flags()
    run(main)
