"""REPAIR and new norm statistics between trained networks with BatchNorm.

  python -m benchmarks.repair --output=results/repair
  python -m benchmarks.repair --model=resnet20_batchnorm --replicates=2 --num_test=1000

Pairs of networks of the preset cpu, trained where they are not in --runs_dir (half an hour and more for three
pairs of the default), are aligned by each method. Each segment is then measured on test data three times: as
it is, with the running statistics of the nearer network; with new statistics at every α
(`rebasin.build_norm_reset`); with REPAIR at every α (`rebasin.build_repair`). What either changes at the ends
is told as the largest difference of a logit, over 1,000 test examples and both ends, and the largest one of
error and loss. --output gets repair.json, with every curve, and the table as repair.txt; pairs that it holds
already, measured with the same flags, are not measured again.
"""

import functools
import json
import os
import pathlib
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags, logging
from jax.tree_util import Partial
from rich.console import Console

import rebasin
from experiments.console import Reporter
from experiments.pairs import run_directory
from experiments.presets import choose_preset
from experiments.results import describe_environment, plain
from rebasin.data import Dataset, Split, load_dataset, normalise
from rebasin.errors import RebasinError
from rebasin.models import build_model
from rebasin.recipes import Recipe
from rebasin.training import classification_metrics, train

UNALIGNED = "none"
METHODS = ("weights", "activations")
VARIANTS = ("as is", "reset", "REPAIR")
# Flags that say nothing of a pair.
_ELSEWHERE = frozenset({"replicates", "runs_dir", "data_dir", "output"})
_NUM_LOGITS = 1000  # in one batch
_WIDTH = 100

_MODEL = flags.DEFINE_string("model", "vgg16_batchnorm", "A model with BatchNorm of the preset cpu.")
_REPLICATES = flags.DEFINE_integer("replicates", 3, "Pairs of networks.", lower_bound=1)
_ALPHAS = flags.DEFINE_integer("num_alphas", 11, "Points on a segment; odd.", lower_bound=3)
_NUM_TEST = flags.DEFINE_integer("num_test", 2000, "Test examples.", lower_bound=1)
_NUM_TRAIN = flags.DEFINE_integer(
    "num_train",
    2000,
    "Training examples, not augmented, for statistics and activation matching.",
    lower_bound=2,
)
_RUNS_DIR = flags.DEFINE_string(
    "runs_dir", None, "Folder of trained networks; by default $REBASIN_RUNS_DIR or ~/.cache/rebasin/runs."
)
_DATA_DIR = flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")
_OUTPUT = flags.DEFINE_string("output", None, "Folder for repair.json and repair.txt.")
flags.register_validator(_ALPHAS, lambda n: n % 2 == 1, "wanted an odd number, so that 1/2 is among them")


class _Measured(NamedTuple):
    """A segment on test data: its curve, and the logits at both ends."""

    curve: rebasin.BarrierCurve
    ends: np.ndarray


class Bench:
    """What is the same for all pairs: the function, its spec, the data and the compiled measurements.

    Args:
      recipe: of the networks.
      dataset: the data.
      num_alphas: points on each segment.
      num_test: test examples.
      num_train: training examples for statistics and activation matching.
    """

    def __init__(
        self, recipe: Recipe, dataset: Dataset, *, num_alphas: int, num_test: int, num_train: int
    ) -> None:
        model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
        chosen = dataset.take(num_train=num_train, num_test=num_test)
        self.images, self.test = jax.device_put((chosen.train.images, chosen.test))
        self.num_alphas = num_alphas

        def function(tree: Any, images: Any) -> Any:
            return model.apply(tree, normalise(images, dataset.mean, dataset.std))

        def update(tree: Any, images: Any) -> Any:
            inputs = normalise(images, dataset.mean, dataset.std)
            return tree | model.apply(tree, inputs, mutable=["batch_stats"])[1]

        def plain_logits(tree: Any, images: Any, extra: Any = None) -> Any:
            del extra
            return function(tree, images)

        def with_statistics(tree: Any, images: Any, reset: Any) -> Any:
            del tree
            return function(reset, images)

        self.function = function
        image = jax.ShapeDtypeStruct((1, *dataset.test.images.shape[1:]), np.uint8)
        variables = jax.eval_shape(lambda x: model.init(jax.random.key(0), jnp.float32(x)), image)
        self.spec = rebasin.infer_spec(function, variables, image)
        reset = rebasin.build_norm_reset(update, self.images)
        self._as_is = self._build_measure(plain_logits, Partial(lambda tree, alpha: None))
        self._reset = self._build_measure(with_statistics, reset)

    def _build_measure(
        self, apply: Callable[..., Any], prepare: Callable[[Any, Any], Any]
    ) -> Callable[[Any, Any], _Measured]:
        """A function that measures a segment with ``apply(tree, images, prepare(tree, alpha))``."""

        def metrics(tree: Any, batch: Split, extra: Any) -> Mapping[str, jax.Array]:
            return classification_metrics(apply(tree, batch.images, extra), batch.labels)

        sweep = rebasin.build_sweep(metrics, num_alphas=self.num_alphas, prepare=prepare)

        @jax.jit
        def logits(prepare: Any, tree: Any, alpha: Any, images: Any) -> Any:
            return apply(tree, images, prepare(tree, alpha))

        def measure(a: Any, b: Any) -> _Measured:
            images = self.test.images[:_NUM_LOGITS]
            ends = [np.asarray(logits(prepare, tree, alpha, images)) for tree, alpha in ((b, 0.0), (a, 1.0))]
            return _Measured(sweep(a, b, self.test), np.stack(ends))

        return measure

    def align(self, method: str, a: Any, b: Any) -> Any:
        """B in the order of A's units; as it is for `UNALIGNED`."""
        if method == UNALIGNED:
            return b
        needs: dict[str, Any] = {"activations": {"function": self.function, "data": self.images}}
        match = rebasin.match(self.spec, a, b, method, key=jax.random.key(0), **needs.get(method, {}))
        return rebasin.permute(self.spec, match.permutation, b)

    def measure(self, a: Any, b: Any) -> dict[str, dict[str, Any]]:
        """The segment in every variant, and what each changes at the ends."""
        repair = rebasin.build_repair(self.spec, a, b, self.function, self.images)
        repaired = self._build_measure(repair.apply, repair.prepare)
        measures = (self._as_is, self._reset, repaired)
        found = {variant: measure(a, b) for variant, measure in zip(VARIANTS, measures, strict=True)}
        return {variant: _describe(measured, found["as is"]) for variant, measured in found.items()}


def _describe(measured: _Measured, as_is: _Measured) -> dict[str, Any]:
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


_COLUMNS: Mapping[str, tuple[str, float, int]] = {
    "midpoint_accuracy": ("midpoint\naccuracy", 100, 1),
    "error_barrier": ("error\nbarrier", 100, 1),
    "loss_barrier": ("loss\nbarrier", 1, 3),
    "end_accuracy": ("accuracy\nat ends", 100, 1),
}
_DIFFERENCES = ("end_logit_difference", "end_error_difference", "end_loss_difference")


def report(pairs: Sequence[Mapping[str, Any]], reporter: Reporter) -> None:
    """Prints the table."""
    reporter.say(
        f"\nTest data, mean±standard deviation over {len(pairs)} pairs, accuracy and error in %. The last\n"
        "columns are the largest differences that a variant makes at the ends, over all pairs"
    )
    header = ["\nmatching", "\nvariant", *(name for name, _, _ in _COLUMNS.values())]
    header += ["ends:\nlogit", "\nerror", "\nloss"]
    rows = []
    for method in pairs[0]["methods"]:
        for variant in VARIANTS:
            records = [pair["methods"][method][variant] for pair in pairs]
            cells = [
                _spread([record[field] for record in records], scale, digits)
                for field, (_, scale, digits) in _COLUMNS.items()
            ]
            cells += [f"{max(record[field] for record in records):.2g}" for field in _DIFFERENCES]
            rows.append([method if variant == VARIANTS[0] else "", variant, *cells])
    reporter.table(header, rows)


def _spread(values: Sequence[float], scale: float, digits: int) -> str:
    text = f"{scale * np.mean(values):.{digits}f}"
    return text if len(values) < 2 else f"{text}±{scale * np.std(values, ddof=1):.{digits}f}"


def _stored(directory: pathlib.Path, about: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The pairs of an earlier run with the same flags and recipe."""
    path = directory / "repair.json"
    content = json.loads(path.read_text()) if path.exists() else {}
    same = all(content.get(key) == plain(about[key]) for key in ("config", "recipe"))
    return content["pairs"] if same else []


def _save(directory: pathlib.Path, about: Mapping[str, Any], pairs: Sequence[Mapping[str, Any]]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "repair.json").write_text(json.dumps(plain({**about, "pairs": pairs}), indent=1) + "\n")
    with (directory / "repair.txt").open("w") as file:
        report(pairs, Reporter(Console(file=file, width=_WIDTH)))


def main(argv: list[str]) -> None:
    """Trains what is missing and measures; what the user got wrong is one line on stderr."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    logging.set_verbosity(logging.WARNING)  # JAX reports the backends that it looks for
    reporter = Reporter(Console(width=None if sys.stdout.isatty() else _WIDTH, highlight=False))
    default = os.environ.get("REBASIN_RUNS_DIR", "~/.cache/rebasin/runs")
    runs_dir = pathlib.Path(_RUNS_DIR.value or default).expanduser()
    given = flags.FLAGS.get_key_flags_for_module(sys.modules[__name__])
    try:
        recipe = choose_preset("cpu", _MODEL.value).build_recipe("trajectory")
        about = {
            "config": {flag.name: flag.value for flag in given if flag.name not in _ELSEWHERE},
            "recipe": vars(recipe),
            "environment": describe_environment(),
        }
        output = pathlib.Path(_OUTPUT.value) if _OUTPUT.value else None
        pairs = _stored(output, about)[: _REPLICATES.value] if output else []
        dataset = load_dataset(recipe.dataset, data_dir=_DATA_DIR.value)
        bench = Bench(
            recipe,
            dataset,
            num_alphas=_ALPHAS.value,
            num_test=_NUM_TEST.value,
            num_train=_NUM_TRAIN.value,
        )
        trained = functools.partial(train, recipe, dataset, keep=(), resume=True)
        for seeds in [[2 * i, 2 * i + 1] for i in range(len(pairs), _REPLICATES.value)]:
            with reporter.stage(f"seeds {seeds[0]} and {seeds[1]}", 3 + len(METHODS)) as advance:
                trees = []
                for seed in seeds:
                    trees.append(trained(seed=seed, directory=run_directory(runs_dir, recipe, seed)).last)
                    advance()
                a, b = trees
                found = {}
                for method in (UNALIGNED, *METHODS):
                    found[method] = bench.measure(a, bench.align(method, a, b))
                    advance()
            pairs.append({"seeds": seeds, "methods": found})
            if output:
                _save(output, about, pairs)
    except RebasinError as error:
        sys.exit(f"error: {error}")
    report(pairs, reporter)


if __name__ == "__main__":
    app.run(main)
