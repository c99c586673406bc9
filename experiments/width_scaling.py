"""How wide must networks be for weight matching to connect them? Measured over inputs, widths and depths.

Follows arXiv 2310.19103, sections 4 and 5. Two-layer networks of width of order √d/ε with d inputs are
connected with probability 1 − ε; networks of k hidden layers need widths that grow with k. Pairs of networks
with one hidden layer are trained on images that are shrunk to each side in --sides, which makes d pixels of
them, and at each of --widths; pairs with each number of hidden layers in --depths are trained on the largest
of these images. The width that is needed is that from which on the test loss barrier (Eq. 1) after weight
matching stays at or below a tolerance ε, one of --tolerances, linear in log(1 + width) between widths.

The run prints the widths needed, by number of inputs and by depth, the exponents of d and of 1/ε that fit
them, the bounds of `rebasin.bounds` beside them, and the paper's claims with a verdict each. The tolerance of
the bounds is the Wasserstein-2 distance of the first layers where networks begin to be connected, in the
metric of the data and relative to the norm of neurons in it.

  python -m experiments.width_scaling --preset=digits --output_dir=results/digits_mlp_width_scaling
  python -m experiments.width_scaling --preset=cpu --model=mlp --num_train=20000 --epochs=10
    --num_eval=2000 --num_alphas=13 --output_dir=results/mnist_mlp_width_scaling

Writes results.json, barriers.csv, width_scaling.png and width_bounds.png. Two networks are trained for each
replicate, size of images, depth and width. A finished run of the same options is only drawn anew.
"""

import collections
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

from experiments import width_scaling_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Config, Experiment, Measure, Setup
from experiments.harness.methods import build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers
from experiments.harness.record import summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import mean_onset, onset, student_interval
from experiments.harness.transport import Exponents, NeededWidth, ScalingRecord, ScalingSummary
from rebasin.dimensions import effective_dimension, layer_neurons
from rebasin.errors import ConfigError
from rebasin.permutation import compiled_permute
from rebasin.training.data import normalise
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory
from rebasin.transport import transport_neurons

__all__ = ["EXPERIMENT", "ScalingConfig", "build_config", "judge", "main"]

options.define_flags(__name__, strict=True)
options.define_widths_flag(__name__)
_SIDES = flags.DEFINE_list(
    "sides", None, "Sides of the images in pixels, ascending; by default some up to the dataset's own."
)
_DEPTHS = flags.DEFINE_list("depths", ["1", "2", "3"], "Numbers of hidden layers, ascending from 1 on.")
_TOLERANCES = flags.DEFINE_list(
    "tolerances", ["0.3", "0.2", "0.1"], "Test loss barriers, in nats, up to which networks are connected."
)

# Pairs for each kind and width.
_PAIRS = 4

# The models by number of hidden layers.
_MODELS = {1: "mlp_1", 2: "mlp_2", 3: "mlp"}

# Sides and widths by dataset; the last side is that of the dataset's own images.
_DEFAULT_SIDES = {"digits": (3, 5, 8), "mnist": (4, 7, 14, 28)}
_DEFAULT_WIDTHS = {"digits": (4, 16, 64), "mnist": (4, 16, 64, 256, 1024)}


class _Kind(NamedTuple):
    """What networks of one onset have in common: side of the images and number of hidden layers."""

    side: int
    depth: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class ScalingConfig(Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      widths: widths of the networks in ascending order, each in place of the recipe's.
      sides: sides of the images in ascending order, of which the last is that of the dataset.
      depths: numbers of hidden layers in ascending order, the first of them 1.
      channels: number of channels of an image.
      tolerances: test loss barriers in nats, descending, up to which two networks count as connected.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
    """

    widths: tuple[int, ...]
    sides: tuple[int, ...]
    depths: tuple[int, ...]
    channels: int
    tolerances: tuple[float, ...]
    num_eval: int | None

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = super().problems()
        if self.recipe.model != _MODELS[1]:
            problems.append(f"model: wanted mlp, got {self.recipe.model!r}")
        for name in ("widths", "sides"):
            given = getattr(self, name)
            if not given or list(given) != sorted(set(given)) or given[0] < 1:
                problems.append(f"{name}: wanted ascending numbers from 1 on, got {list(given)}")
        if (
            not self.depths
            or self.depths[0] != 1
            or list(self.depths) != sorted(set(self.depths) & set(_MODELS))
        ):
            problems.append(f"depths: wanted 1 and then some of 2, 3, got {list(self.depths)}")
        if not self.tolerances or list(self.tolerances) != sorted(set(self.tolerances), reverse=True):
            problems.append(f"tolerances: wanted descending numbers, got {list(self.tolerances)}")
        elif self.tolerances[-1] <= 0:
            problems.append(f"tolerances: wanted numbers above 0, got {list(self.tolerances)}")
        return problems

    @property
    def width(self) -> str:
        """The widths of the networks, in words."""
        return f"widths {self.widths[0]} to {self.widths[-1]}"

    @property
    def kinds(self) -> list[_Kind]:
        """Two-layer networks on images of each size, then deeper ones on the largest images."""
        return [
            *(_Kind(side, 1) for side in self.sides),
            *(_Kind(self.sides[-1], depth) for depth in self.depths if depth > 1),
        ]

    @property
    def pairs(self) -> list[Pair]:
        """One pair for each kind, width and replicate, all replicates of a width in a row."""
        replicates = super().pairs
        recipes = [
            dataclasses.replace(
                self.recipe, model=_MODELS[kind.depth], dataset=self._images(kind.side), width=w
            )
            for kind in self.kinds
            for w in self.widths
        ]
        return [pair._replace(recipe=recipe) for recipe in recipes for pair in replicates]

    def _images(self, side: int) -> str:
        """Return the name of the dataset with images of a size."""
        name = self.recipe.dataset
        return name if side == self.sides[-1] else f"{name}_{side}x{side}"

    def inputs(self, side: int) -> int:
        """Return the number of inputs of networks on images of a size."""
        return side * side * self.channels

    def place(self, pair: Pair) -> tuple[int, int, int]:
        """Return inputs, depth and width of a pair."""
        depth = next(depth for depth, model in _MODELS.items() if model == pair.recipe.model)
        side = next(side for side in self.sides if self._images(side) == pair.recipe.dataset)
        return self.inputs(side), depth, pair.recipe.width

    def check_network(self, recipe: Recipe, shapes: Any) -> None:
        """Raise `ConfigError` if images do not have the size that a recipe says."""
        wanted, *_ = self.place(Pair(recipe, ()))
        found = shapes["params"]["Dense_0"]["kernel"].shape[0]
        if found != wanted:
            raise ConfigError(
                f"sides: wanted that of the images of {self.recipe.dataset} last, of {found} inputs, got "
                f"{self.sides[-1]}"
            )

    def misfits(self, record: Any, pair: Pair) -> list[str]:
        """Return the problems that the base finds, and that of inputs, depth and width."""
        problems = super().misfits(record, pair)
        found, wanted = (record.inputs, record.depth, record.width), self.place(pair)
        if found != wanted:
            problems.append(f"inputs, depth, width: wanted {list(wanted)}, got {list(found)}")
        return problems


def _build_measure(setup: Setup[ScalingConfig]) -> Measure[ScalingRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    match = build_matchers(setup, ("weights",))["weights"]
    pixels = normalise(setup.match_data.inputs, setup.dataset.mean, setup.dataset.std)
    images = np.asarray(pixels, np.float64).reshape(len(pixels), -1)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: ScalingRecord[float] | None
    ) -> Iterator[ScalingRecord[float]]:
        del begun  # a pair is measured whole
        a, b = (trajectory.last for trajectory in trained)
        with setup.seconds.count("matching"):
            permutation = match(a, b, key=pair.key).permutation
        inputs, depth, width = config.place(pair)
        layers = [_layer(tree, depth) for tree in (a, compiled_permute(setup.spec, permutation, b))]
        moments = _moments(a, images, depth)
        with setup.seconds.count("barriers"):
            paths = Paths(meter, setup.spec, a, b)
            yield ScalingRecord(
                seeds=pair.seeds,
                inputs=inputs,
                depth=depth,
                width=width,
                unaligned=barriers(paths.unaligned),
                aligned=paths.barriers(permutation),
                distances=tuple(_relative_distance(*each) for each in zip(*layers, moments, strict=True)),
                dimensions=tuple(
                    effective_dimension(w @ moment @ w.T)
                    for w, moment in zip(layers[0], moments, strict=True)
                ),
            )

    return measure


def _layer(params: Any, depth: int) -> list[np.ndarray]:
    """Return the weights that lead into each hidden layer of an MLP, ``[units, inputs]``."""
    return [layer_neurons(params["params"][f"Dense_{i}"]["kernel"], 1) for i in range(depth)]


def _moments(params: Any, entering: np.ndarray, depth: int) -> list[np.ndarray]:
    """Return the second moment of what enters each hidden layer of an MLP, ``[inputs, inputs]``."""
    moments = []
    for i, weight in enumerate(_layer(params, depth)):
        moments.append(entering.T @ entering / len(entering))
        bias = np.asarray(params["params"][f"Dense_{i}"]["bias"], np.float64)
        entering = np.maximum(entering @ weight.T + bias, 0)
    return moments


def _relative_distance(neurons_a: np.ndarray, neurons_b: np.ndarray, moment: np.ndarray) -> float:
    """Return the Wasserstein-2 distance of two layers in a metric over the norm of A's neurons in it."""
    norm = math.sqrt(np.trace(neurons_a @ moment @ neurons_a.T) / len(neurons_a))
    return transport_neurons(neurons_a, neurons_b, second_moment=moment).distance / norm


def _grouped(
    config: ScalingConfig, records: Sequence[ScalingRecord[float]]
) -> dict[_Kind, list[list[ScalingRecord[float]]]]:
    """Return the records of each kind, a list for each width."""
    found = collections.defaultdict(list)
    for record in records:
        found[record.inputs, record.depth, record.width].append(record)
    return {
        kind: [found[config.inputs(kind.side), kind.depth, width] for width in config.widths]
        for kind in config.kinds
    }


def _series(by_width: Sequence[Sequence[ScalingRecord[float]]]) -> list[list[float]]:
    """Return the test loss barriers of one kind, a series over widths for each replicate."""
    return np.array([[r.aligned.test_loss for r in own] for own in by_width]).T.tolist()


def _summarise(config: ScalingConfig, records: Sequence[ScalingRecord[float]]) -> ScalingSummary:
    """Return mean and spread of every number, the widths needed, and the law that fits them."""
    grouped = _grouped(config, records)
    needed = []
    for kind, by_width in grouped.items():
        for tolerance in config.tolerances:
            found = mean_onset(config.widths, _series(by_width), tolerance)
            least = found.mean_curve * (1 - 1e-9)
            at = [own for w, own in zip(config.widths, by_width, strict=True) if w >= least]
            needed.append(
                NeededWidth(
                    inputs=config.inputs(kind.side),
                    depth=kind.depth,
                    tolerance=tolerance,
                    onset=found,
                    distance=float(np.mean([r.distances[0] for r in at[0]])) if at else math.nan,
                    dimension=float(np.mean([r.dimensions[0] for r in at[0]])) if at else math.nan,
                )
            )
    exponents = _exponents(config, records)
    return ScalingSummary(
        tuple(summarise(own) for by_width in grouped.values() for own in by_width),
        tuple(needed),
        None if exponents is None else Exponents(*(student_interval(values) for values in exponents.T)),
    )


def _exponents(config: ScalingConfig, records: Sequence[ScalingRecord[float]]) -> np.ndarray | None:
    """Fit log width = c + a log d − b log ε to the widths that two-layer networks of each replicate need.

    Widths beyond those measured, on either side, are left out.

    Returns:
      The exponents a and b, ``[replicates, 2]``; `None` where a replicate's widths do not determine them.
    """
    grouped = _grouped(config, records)
    fits = []
    for replicate in range(config.replicates):
        points = []
        for kind in (kind for kind in config.kinds if kind.depth == 1):
            series = _series(grouped[kind])[replicate]
            for tolerance in config.tolerances:
                width = onset(config.widths, series, tolerance)
                if config.widths[0] < width < math.inf:
                    logs = map(math.log, (config.inputs(kind.side), 1 / tolerance, width))
                    points.append((1.0, *logs))
        table = np.array(points).reshape(-1, 4)
        if np.linalg.matrix_rank(table[:, :3]) < 3:
            return None
        fits.append(np.linalg.lstsq(table[:, :3], table[:, 3], rcond=None)[0][1:])
    return np.array(fits)


def judge(config: ScalingConfig, records: Sequence[ScalingRecord[float]]) -> list[Claim]:
    """Judge the paper's statements about widths, by rules that were set before the runs.

    A statement that a width suffices holds unless more width is needed, so that a slower growth than stated
    is no contradiction.

    Args:
      config: the config of the run.
      records: the record of each replicate, kind and width.
    """
    grouped, strict = _grouped(config, records), config.tolerances[-1]
    two_layer = [grouped[kind] for kind in config.kinds if kind.depth == 1]
    widest = np.mean([[r.aligned.test_loss for r in by_width[-1]] for by_width in two_layer], axis=0)
    claims = [
        claim(
            "wide_two_layer_networks_connect",
            f"two-layer networks of width {config.widths[-1]} have a test loss barrier of at most {strict:g} "
            "nats after weight matching, averaged over the numbers of inputs",
            "two wide enough two-layer networks are linearly connected (section 4)",
            widest,
            widest.mean() <= strict,
        )
    ]
    exponents = _exponents(config, records)
    if exponents is not None:
        for column, (name, what, most) in enumerate(
            (("dimension", "number of inputs", 0.5), ("tolerance", "inverse tolerance", 1.0))
        ):
            interval = student_interval(exponents[:, column])
            low = interval.low if len(exponents) > 1 else interval.mean
            claims.append(
                claim(
                    f"width_grows_no_faster_with_{name}",
                    f"the width that two-layer networks need grows with the {what} by an exponent whose 95 % "
                    f"interval does not lie above {most:g}",
                    f"a width of order √d/ε is enough: an exponent of {most:g} (section 4)",
                    exponents[:, column],
                    low <= most,
                )
            )
    deep = [grouped[kind] for kind in config.kinds if kind.side == config.sides[-1]]
    if len(deep) > 1:
        growth = _growth(config, deep)
        claims.append(
            claim(
                "depth_multiplies_the_width",
                "each further hidden layer multiplies the width that is needed by at most d = "
                f"{config.inputs(config.sides[-1])}, at a tolerance of {config.tolerances[0]:g} nats",
                "a width that grows as O(d^k) with the number k of hidden layers (section 5)",
                growth,
                bool(np.isfinite(growth).all()) and growth.mean() <= config.inputs(config.sides[-1]),
            )
        )
    return claims


def _growth(config: ScalingConfig, deep: Sequence[Sequence[Sequence[ScalingRecord[float]]]]) -> np.ndarray:
    """Return the factor by which a hidden layer multiplies the width that each replicate needs."""
    found = np.array(
        [[onset(config.widths, s, config.tolerances[0]) for s in _series(by_width)] for by_width in deep]
    )
    layers = config.depths[-1] - config.depths[0]
    with np.errstate(invalid="ignore"):  # a width that is never enough
        return (found[-1] / found[0]) ** (1 / layers)


EXPERIMENT = Experiment(
    schema=Schema("width_scaling", ScalingConfig, ScalingRecord[float], ScalingSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={"width_scaling.png": figures.draw_scaling, "width_bounds.png": figures.draw_bounds},
    report=figures.report,
    keep="measured",
)


def _numbers(name: str, given: Sequence[str], kind: type[Any]) -> tuple[Any, ...]:
    try:
        return tuple(kind(text) for text in given)
    except ValueError:
        raise ConfigError(f"wanted numbers for {name}, got {','.join(given)!r}") from None


def build_config() -> ScalingConfig:
    """Build the config that the flags describe."""
    choice = options.choose("optimal_transport", replicates=options.chosen_pairs(_PAIRS))
    recipe = choice.fields["recipe"]
    if recipe.model == "mlp":
        recipe = dataclasses.replace(recipe, model=_MODELS[1])
    sides = _DEFAULT_SIDES.get(recipe.dataset, (8, 16, 32))
    if _SIDES.value is not None:
        sides = _numbers("sides", _SIDES.value, int)
    widths = _DEFAULT_WIDTHS.get(recipe.dataset, _DEFAULT_WIDTHS["mnist"])
    widths = options.chosen_widths(tuple(w for w in widths if w < recipe.width) + (recipe.width,))
    return ScalingConfig(
        **{**choice.fields, "recipe": dataclasses.replace(recipe, width=widths[0]) if widths else recipe},
        widths=widths,
        sides=sides,
        depths=_numbers("depths", _DEPTHS.value, int),
        channels=1 if recipe.dataset in _DEFAULT_SIDES else 3,
        tolerances=_numbers("tolerances", _TOLERANCES.value, float),
        num_eval=choice.num_eval,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
