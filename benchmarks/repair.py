"""REPAIR and new running statistics between trained networks with BatchNorm.

  python -m benchmarks.repair --output=results/repair
  python -m benchmarks.repair --model=resnet20_batchnorm --replicates=2 --num_test=1000

Pairs of networks of the preset cpu are aligned by each method. They are trained if they are not in
--runs_dir, which takes half an hour or more for three pairs of the default on two CPU cores. The path
between two networks is then measured on test data three times: as it is, with the running statistics of the
nearer network; with new statistics at every α (`rebasin.build_norm_reset`); and with REPAIR at every α
(`rebasin.build_repair`). The last columns tell how much the two corrections change the endpoints: the
largest difference of a logit, over 1,000 test examples and both endpoints, and the largest difference of
error and loss.

--output gets repair.json, with every curve, and the table as repair.txt. Pairs that repair.json holds
already, measured with the same flags, are not measured again.
"""

import json
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags
from jax.tree_util import Partial

import rebasin
from benchmarks.command import define_data_flags, flag_values, run
from benchmarks.problems import find_recipe, shared_runs, train_network
from benchmarks.reports import Reporter, build_reporter, describe_machine, save_report, to_json
from benchmarks.tables import mean_and_deviation
from rebasin.barrier import BarrierCurve
from rebasin.models import build_model
from rebasin.training.data import Dataset, load_dataset, normalise
from rebasin.training.loop import build_apply
from rebasin.training.recipes import Recipe

__all__ = ["MATCHINGS", "UNALIGNED", "VARIANTS", "PairMeasurements", "report"]

UNALIGNED = "none"
MATCHINGS = ("weights", "activations")
VARIANTS = ("as is", "reset", "REPAIR")
_NUM_LOGITS = 1000  # in one batch


class _Measured(NamedTuple):
    """A path on test data.

    Attributes:
      curve: loss and error at all alphas.
      ends: logits at both endpoints, [2, n, classes].
    """

    curve: BarrierCurve
    ends: np.ndarray


class PairMeasurements:
    """What is the same for all pairs: the function, its spec, the data and the compiled measurements.

    Args:
      recipe: how the networks were trained.
      dataset: the data.
      num_alphas: number of points on each path.
      num_test: number of test examples.
      num_train: number of training examples for statistics and activation matching.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, *, num_alphas: int, num_test: int, num_train: int
    ) -> None:
        model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
        chosen = dataset.take(num_train=num_train, num_test=num_test)
        self.images, self.test = jax.device_put((chosen.train.inputs, chosen.test))
        self.num_alphas = num_alphas
        self.apply_fn = build_apply(model, dataset)
        image = jax.ShapeDtypeStruct(self.images[:1].shape, np.uint8)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), jnp.float32(x)), image)
        self.spec = rebasin.infer_spec(self.apply_fn, variables, image)

        def update(params: Any, images: Any) -> Any:
            inputs = normalise(images, dataset.mean, dataset.std)
            return params | model.apply(params, inputs, mutable=["batch_stats"])[1]

        def apply_unchanged(params: Any, images: Any, nothing: Any) -> Any:
            del nothing
            return self.apply_fn(params, images)

        def apply_reset(params: Any, images: Any, with_new_statistics: Any) -> Any:
            del params
            return self.apply_fn(with_new_statistics, images)

        pixels = normalise(self.images[:1], dataset.mean, dataset.std)
        reset = rebasin.build_norm_reset(model.init(jax.random.key(0), pixels), update, self.images)
        self._measure_as_is = self._build_measure(apply_unchanged, Partial(lambda params, alpha: None))
        self._measure_reset = self._build_measure(apply_reset, reset)

    def _build_measure(
        self, apply_fn: Callable[..., Any], prepare: Callable[[Any, Any], Any]
    ) -> Callable[[Any, Any], _Measured]:
        """Return a function that measures a path of ``apply_fn(params, images, prepare(params, alpha))``."""
        sweep = rebasin.build_sweep(
            rebasin.classification_metrics(apply_fn), num_alphas=self.num_alphas, prepare=prepare
        )

        @jax.jit
        def logits(prepare: Any, params: Any, alpha: Any, images: Any) -> Any:
            return apply_fn(params, images, prepare(params, alpha))

        def measure(params_a: Any, params_b: Any) -> _Measured:
            images = self.test.inputs[:_NUM_LOGITS]
            ends = ((params_b, 0.0), (params_a, 1.0))
            computed = [np.asarray(logits(prepare, params, alpha, images)) for params, alpha in ends]
            return _Measured(sweep(params_a, params_b, self.test), np.stack(computed))

        return measure

    def align(self, matching: str, params_a: Any, params_b: Any) -> Any:
        """Return B in the order of A's units, or as it is for `UNALIGNED`."""
        if matching == UNALIGNED:
            return params_b
        if matching == "activations":
            match = rebasin.activation_matching(self.spec, params_a, params_b, self.apply_fn, self.images)
        else:
            match = rebasin.weight_matching(self.spec, params_a, params_b, key=jax.random.key(0))
        return rebasin.permute(self.spec, match.permutation, params_b)

    def measure(self, params_a: Any, params_b: Any) -> dict[str, dict[str, Any]]:
        """Measure the path in every variant, and what each variant changes at the endpoints."""
        repair = rebasin.build_repair(self.spec, params_a, params_b, self.apply_fn, self.images)
        measures = (
            self._measure_as_is,
            self._measure_reset,
            self._build_measure(repair.apply, repair.prepare),
        )
        found = {
            variant: measure(params_a, params_b) for variant, measure in zip(VARIANTS, measures, strict=True)
        }
        return {variant: _describe(measured, found["as is"]) for variant, measured in found.items()}


def _describe(measured: _Measured, as_is: _Measured) -> dict[str, Any]:
    """Return the numbers of one path that are stored; the path as it is tells what the endpoints were."""
    curve, middle = measured.curve, len(measured.curve.alphas) // 2

    def at_ends(values: np.ndarray, others: np.ndarray) -> float:
        return float(np.max(np.abs(values - others)[[0, -1]]))

    return {
        "midpoint_accuracy": 1 - float(curve.error[middle]),
        "error_barrier": curve.error_barrier.value,
        "loss_barrier": curve.loss_barrier.value,
        "end_accuracy": 1 - float(np.mean(curve.error[[0, -1]])),
        "end_logit_difference": float(np.max(np.abs(measured.ends - as_is.ends))),
        "end_error_difference": at_ends(curve.error, as_is.curve.error),
        "end_loss_difference": at_ends(curve.loss, as_is.curve.loss),
        "error": curve.error.tolist(),
        "loss": curve.loss.tolist(),
    }


# By field: the title of its column, what it is multiplied with, and its number of digits.
_COLUMNS: Mapping[str, tuple[str, float, int]] = {
    "midpoint_accuracy": ("midpoint\naccuracy", 100, 1),
    "error_barrier": ("error\nbarrier", 100, 1),
    "loss_barrier": ("loss\nbarrier", 1, 3),
    "end_accuracy": ("accuracy\nat ends", 100, 1),
}
_DIFFERENCES = ("end_logit_difference", "end_error_difference", "end_loss_difference")


def report(pairs: Sequence[Mapping[str, Any]], reporter: Reporter) -> None:
    """Print the table.

    Args:
      pairs: for each pair, ``"methods"`` maps a matching to what `PairMeasurements.measure` found.
      reporter: prints it.
    """
    reporter.say(
        f"\nTest data, mean±standard deviation over {len(pairs)} pairs, accuracy and error in %. The last\n"
        "columns are the largest differences that a variant makes at the ends, over all pairs"
    )
    header = ["\nmatching", "\nvariant", *(name for name, _, _ in _COLUMNS.values())]
    header += ["ends:\nlogit", "\nerror", "\nloss"]
    rows = []
    for matching in pairs[0]["methods"]:
        for variant in VARIANTS:
            records = [pair["methods"][matching][variant] for pair in pairs]
            cells = [
                mean_and_deviation([record[field] for record in records], scale, digits)
                for field, (_, scale, digits) in _COLUMNS.items()
            ]
            cells += [f"{max(record[field] for record in records):.2g}" for field in _DIFFERENCES]
            rows.append([matching if variant == VARIANTS[0] else "", variant, *cells])
    reporter.table(header, rows)


def _read_stored(directory: pathlib.Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the pairs of an earlier run with the same flags and recipe."""
    path = directory / "repair.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    same = all(content.get(key) == to_json(about[key]) for key in ("config", "recipe"))
    return content["pairs"] if same else []


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_string("model", "vgg16_batchnorm", "A model with BatchNorm of the preset cpu.")
    flags.DEFINE_integer("replicates", 3, "Pairs of networks.", lower_bound=1)
    flags.DEFINE_integer("num_alphas", 11, "Points on a path; odd.", lower_bound=3)
    flags.register_validator(
        "num_alphas", lambda n: n % 2 == 1, "wanted an odd number, so that 1/2 is among them"
    )
    flags.DEFINE_integer("num_test", 2000, "Test examples.", lower_bound=1)
    flags.DEFINE_integer(
        "num_train",
        2000,
        "Training examples, not augmented, for statistics and activation matching.",
        lower_bound=2,
    )
    define_data_flags()
    flags.DEFINE_string("output", None, "Folder for repair.json and repair.txt.")


def main() -> None:
    """Train the networks that are missing, and measure all pairs that are not stored yet."""
    options = flags.FLAGS
    reporter = build_reporter()
    runs_dir = shared_runs(options.runs_dir)
    recipe = find_recipe("cpu", options.model)
    config = flag_values(without=("replicates", "runs_dir", "data_dir", "output"))
    about = {"config": config, "recipe": vars(recipe), **describe_machine()}
    output = pathlib.Path(options.output) if options.output else None
    pairs = _read_stored(output, about)[: options.replicates] if output else []
    dataset = load_dataset(recipe.dataset, data_dir=options.data_dir)
    measurements = PairMeasurements(
        recipe,
        dataset,
        num_alphas=options.num_alphas,
        num_test=options.num_test,
        num_train=options.num_train,
    )
    for seeds in [[2 * i, 2 * i + 1] for i in range(len(pairs), options.replicates)]:
        with reporter.stage(f"seeds {seeds[0]} and {seeds[1]}", 3 + len(MATCHINGS)) as advance:
            trees = []
            for seed in seeds:
                trees.append(train_network(recipe, dataset, seed, runs_dir, keep=()).last)
                advance()
            a, b = trees
            found = {}
            for matching in (UNALIGNED, *MATCHINGS):
                found[matching] = measurements.measure(a, measurements.align(matching, a, b))
                advance()
        pairs.append({"seeds": seeds, "methods": found})
        if output:
            content = to_json({**about, "pairs": pairs})
            save_report(output, "repair", content, lambda to: report(pairs, to))
    report(pairs, reporter)


if __name__ == "__main__":
    define_flags()
    run(main)
