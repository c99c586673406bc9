"""Relates effective dimensions and dependence of neurons to the barriers that matching leaves.

Follows arXiv 2310.19103, sections 5 and 6. Networks need to be the wider, the higher the dimension is in
which their neurons are matched. Pairs of networks are trained with that paper's recipe at each learning rate,
at each of --widths, for each number of epochs in --lengths, and with each of --variants: without momentum,
with weight decay, and with Adam. Of each pair these are measured:

- the effective dimension (Σλ)² / Σλ² of the matrix that governs each method, for each layer of A;
- the Wasserstein-2 distance between the first layers, in the Euclidean metric and in that of the data,
  divided by the root mean square norm of A's neurons in the same metric;
- a permutation test of whether the first layers' neurons are independent, as the theory assumes, whose
  statistic is the mean of cos² over pairs of neurons within a network;
- the path that each method leaves, on test data, and A with one layer at a time halfway to P[B].

The run prints tables, the rank correlation of effective dimension and loss over each family of settings and
over layers, and the paper's claims with a verdict each.

  python -m experiments.optimal_transport --preset=digits --output_dir=results/transport_digits
  python -m experiments.optimal_transport --preset=cpu --model=mlp --epochs=6 --num_alphas=13
    --num_eval=2000 --num_match=2000 --output_dir=results/transport_mnist
  python -m experiments.optimal_transport --preset=cpu --model=resnet20 --epochs=8 --rates=0.01,0.03,0.1
    --widths= --lengths= --variants= --replicates=2 --num_alphas=5 --output_dir=results/transport_cifar10

Writes results.json, transport.csv, optimal_transport.png and correlations.png. Networks at the learning
rates are those of `learning_rates`, and are found there if --runs_dir is the same. A finished run is only
drawn anew.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags
from scipy import stats

import rebasin
from experiments import optimal_transport_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.methods import MethodComparison
from experiments.harness.networks import Pair
from experiments.harness.record import summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval, student_interval
from experiments.harness.transport import Correlation, Dimensions, SettingRecord, SettingsSummary
from experiments.learning_rates import METHODS, OPTIONS, PAPER_PAIRS, RatesConfig, chosen_rates
from rebasin.dimensions import layer_neurons, network_dimensions
from rebasin.errors import ConfigError
from rebasin.training.data import normalise
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory
from rebasin.transport import dependence_test, transport_neurons
from rebasin.trees import leaf_table, map_leaves

__all__ = ["EXPERIMENT", "VARIANTS", "TransportConfig", "build_config", "judge", "main"]

# What changes in the recipe beside the learning rate. Adam needs a lower rate than SGD.
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 5e-4},
    "adam": {"optimizer": "adam", "peak_learning_rate": 1e-3},
}

options.define_flags(__name__, strict=True)
options.define_widths_flag(__name__)
flags.declare_key_flag("rates")
_LENGTHS = flags.DEFINE_list(
    "lengths",
    None,
    "Numbers of epochs of training, beside the recipe's; by default a tenth and a third of it.",
)
_VARIANTS = flags.DEFINE_list(
    "variants", list(VARIANTS), f"Other ways of training, among {', '.join(VARIANTS)}; empty for none."
)

# The models whose first layer is read here.
_MODELS = ("mlp", "vgg16", "resnet20")

# Examples from whose patches the metric of the first convolution is taken.
_PATCH_IMAGES = 250

# Range over layers at the lowest and at the highest rate, read off the paper's plot.
_PAPER = {
    "weights": "about 250 to 310 falling to 190 to 220",
    "covariance": "about 1.5 to 3 rising to 3.5 to 9",
    "activations": "about 1.5 to 3 rising to 3.5 to 9",
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportConfig(RatesConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      widths: widths in ascending order, each in place of the recipe's; may be empty.
      lengths: numbers of epochs in ascending order, each in place of the recipe's; may be empty.
      variants: names in `VARIANTS`; may be empty.
    """

    widths: tuple[int, ...] = ()
    lengths: tuple[int, ...] = ()
    variants: tuple[str, ...] = tuple(VARIANTS)

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = super().problems()
        if self.recipe.model not in _MODELS:
            problems.append(f"model: wanted one of {', '.join(_MODELS)}, got {self.recipe.model!r}")
        for name in ("widths", "lengths"):
            given = getattr(self, name)
            if list(given) != sorted(set(given)) or (given and given[0] < 1):
                problems.append(f"{name}: wanted ascending numbers from 1 on, got {list(given)}")
        if not set(self.variants) <= set(VARIANTS) or len(set(self.variants)) != len(self.variants):
            problems.append(
                f"variants: wanted some of {', '.join(VARIANTS)}, none twice, got {list(self.variants)}"
            )
        return problems

    @property
    def families(self) -> dict[str, dict[str, Recipe]]:
        """The recipe of each setting, by name, in families that differ in one thing.

        The recipe itself belongs to all families but that of the rates, which may have it too. It has one
        name in all of them.
        """
        changes = {
            "rates": {f"{rate:g}": {"peak_learning_rate": rate} for rate in self.rates},
            "widths": {f"width {width}": {"width": width} for width in self.widths},
            "lengths": {
                f"{epochs} epoch{'s' * (epochs > 1)}": {
                    "epochs": epochs,
                    "warmup_epochs": min(self.recipe.warmup_epochs, epochs),
                }
                for epochs in self.lengths
            },
            "optimizers": {name: VARIANTS[name] for name in self.variants},
        }
        names: dict[Recipe, str] = {}
        families = {}
        for family, settings in changes.items():
            recipes = {name: dataclasses.replace(self.recipe, **change) for name, change in settings.items()}
            if family != "rates" and recipes:
                recipes["the recipe"] = self.recipe
            families[family] = {names.setdefault(recipe, name): recipe for name, recipe in recipes.items()}
        return families

    @property
    def settings(self) -> dict[str, Recipe]:
        """The recipe of each setting, by name: the learning rates in ascending order, then the others."""
        return {name: recipe for family in self.families.values() for name, recipe in family.items()}

    @property
    def pairs(self) -> list[Pair]:
        """One pair for each setting and replicate, all replicates of a setting in a row.

        So the training of each setting is compiled once.
        """
        seeds = dict.fromkeys(pair.seeds for pair in super().pairs)
        return [Pair(recipe, pair) for recipe in self.settings.values() for pair in seeds]

    def epochs_of(self, pair: Pair) -> tuple[int, ...]:
        """Return the last epoch of the pair's own recipe."""
        return (pair.recipe.epochs,)

    def misfits(self, record: Any, pair: Pair) -> list[str]:
        """Return the problems that the base finds, and that of the setting."""
        problems = super(RatesConfig, self).misfits(record, pair)
        wanted = self.setting_of(pair)
        if record.setting != wanted:
            problems.append(f"setting: wanted {wanted!r}, got {record.setting!r}")
        return problems

    def setting_of(self, pair: Pair) -> str:
        """Return the name of a pair's setting."""
        return next(name for name, recipe in self.settings.items() if recipe == pair.recipe)


def _build_measure(setup: Setup[TransportConfig]) -> Measure[SettingRecord[float]]:
    networks: dict[str, tuple[Any, Any]] = {}
    comparison = MethodComparison(
        setup,
        METHODS,
        num_test=setup.config.num_test,
        options=OPTIONS,
        observe=lambda name, params_a, moved: networks.update({name: (params_a, moved)}),
    )
    layer_losses = _LayerLosses(setup)
    statistics = setup.dataset.mean, setup.dataset.std
    images = np.asarray(normalise(setup.match_data.inputs, *statistics))

    def begin(pair: Pair, trained: Sequence[Trajectory]) -> SettingRecord[float]:
        params_a = trained[0].last
        found = network_dimensions(setup.spec, params_a, setup.apply_fn, setup.match_data)
        kernel, *_ = found
        kernels = [np.asarray(leaf_table(trajectory.last)[kernel]) for trajectory in trained]
        first_a, first_b = (layer_neurons(leaf, leaf.ndim - 1) for leaf in kernels)
        entering = _patches(images[:_PATCH_IMAGES], kernels[0].shape) if kernels[0].ndim == 4 else images
        entering = np.asarray(entering, np.float64).reshape(-1, first_a.shape[1])
        moment = entering.T @ entering / len(entering)
        dependence = dependence_test([first_a, first_b])
        return SettingRecord(
            seeds=pair.seeds,
            setting=setup.config.setting_of(pair),
            layers=tuple(Dimensions(leaf, *dimensions) for leaf, dimensions in found.items()),
            distance=transport_neurons(first_a, first_b).distance / _norm(first_a, np.eye(len(moment))),
            covariance_distance=transport_neurons(first_a, first_b, second_moment=moment).distance
            / _norm(first_a, moment),
            dependence=dependence.z_score,
            p_value=dependence.p_value,
            methods={},
            layer_losses={},
        )

    def measure(
        pair: Pair, trained: list[Trajectory], begun: SettingRecord[float] | None
    ) -> Iterator[SettingRecord[float]]:
        record = begun or begin(pair, trained)
        leaves = [layer.leaf for layer in record.layers]
        for methods in comparison.measure(trained, pair, f"{record.setting}, {pair}", record.methods):
            with setup.seconds.count("barriers"):
                new = {name: layer_losses.measure(*both, leaves) for name, both in networks.items()}
            networks.clear()
            record = dataclasses.replace(record, methods=methods, layer_losses={**record.layer_losses, **new})
            yield record

    return measure


class _LayerLosses:
    """Measures network A with one layer at a time halfway between A and P[B].

    Args:
      setup: what the experiment measures with.
    """

    def __init__(self, setup: Setup[TransportConfig]) -> None:
        size = len(setup.dataset.test.labels)
        self._test = setup.dataset.take(num_test=min(setup.config.num_test or size, size)).test
        self._sweep = rebasin.build_sweep(setup.metrics_fn, num_alphas=3)

    def measure(self, params_a: Any, moved: Any, leaves: Sequence[str]) -> tuple[float, ...]:
        """Return the test loss for the layer of each of these weights; a layer has all leaves beside it."""
        table = leaf_table(moved)

        def loss(leaf: str) -> float:
            layer = leaf.rpartition("/")[0]
            hybrid = map_leaves(lambda p, x: table[p] if p.rpartition("/")[0] == layer else x, params_a)
            return float(self._sweep(params_a, hybrid, self._test).loss[1])

        return tuple(map(loss, leaves))


def _patches(images: np.ndarray, kernel: tuple[int, ...]) -> np.ndarray:
    """Return what enters a convolution with stride 1 at every position, ``[positions, height, width, c]``."""
    sides = [((n - 1) // 2, n // 2) for n in kernel[:2]]
    padded = np.pad(images, ((0, 0), *sides, (0, 0)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, kernel[:2], axis=(1, 2))
    return np.moveaxis(windows, 3, 5).reshape(-1, *kernel[:3])


def _norm(neurons: np.ndarray, moment: np.ndarray) -> float:
    """Return the root mean square norm of neurons in the metric of a second moment."""
    return float(np.sqrt(np.einsum("nd,de,ne->n", neurons, moment, neurons, optimize=True).mean()))


def _summarise(config: TransportConfig, records: Sequence[SettingRecord[float]]) -> SettingsSummary:
    """Return mean and spread in each setting, and the correlations over families of settings."""
    settings = {name: [r for r in records if r.setting == name] for name in config.settings}
    correlations: dict[str, dict[str, Correlation]] = {}
    for family, members in config.families.items():
        if family != "optimizers" and len(members) > 2:
            own = [settings[name] for name in members]
            correlations[family] = {method: _correlation(own, method) for method in METHODS}
    if len(records[0].layers) > 2:
        own = list(settings.values())
        correlations["layers"] = {method: Correlation(_over_layers(own, method), None) for method in METHODS}
    trained = [settings[name] for family in ("rates", "optimizers") for name in config.families[family]]
    dependence = None
    if len(trained) > 2:
        found = [_losses(trained, "weights", measure) for measure in ("midpoint_loss", "loss_barrier")]
        scores = np.array([[record.dependence for record in own] for own in trained])
        dependence = Correlation(*(_over_settings(scores, losses) for losses in found))
    return SettingsSummary(tuple(summarise(own) for own in settings.values()), correlations, dependence)


def _mean_dimensions(settings: Sequence[Sequence[SettingRecord[float]]], method: str) -> np.ndarray:
    """Return the mean dimension of the layers of each pair, ``[settings, replicates]``."""
    return np.array([[np.mean([getattr(x, method) for x in r.layers]) for r in own] for own in settings])


def _losses(settings: Sequence[Sequence[SettingRecord[float]]], method: str, measure: str) -> np.ndarray:
    """Return what a method leaves of each pair, ``[settings, replicates]``."""
    return np.array([[getattr(r.methods[method].plain, measure) for r in own] for own in settings])


def _correlation(settings: Sequence[Sequence[SettingRecord[float]]], method: str) -> Correlation:
    """Correlate the effective dimension with what a method leaves, over settings."""
    dimensions = _mean_dimensions(settings, method)
    found = [_losses(settings, method, measure) for measure in ("midpoint_loss", "loss_barrier")]
    return Correlation(*(_over_settings(dimensions, losses) for losses in found))


def _over_settings(x: np.ndarray, y: np.ndarray) -> Interval:
    """Return the rank correlation over settings, ``[settings, replicates]`` each, with its interval."""
    return student_interval([_rank_correlation(*pair) for pair in zip(x.T, y.T, strict=True)])


def _over_layers(settings: Sequence[Sequence[SettingRecord[float]]], method: str) -> Interval:
    """Correlate the effective dimension of layers with the loss of A with one layer halfway to P[B].

    Layers are ranked within a network, and the correlations averaged over settings.
    """
    each = [
        [_rank_correlation([getattr(x, method) for x in r.layers], r.layer_losses[method]) for r in own]
        for own in settings
    ]
    return student_interval(np.mean(each, axis=0))


def _rank_correlation(x: Any, y: Any) -> float:
    """Return Spearman's rank correlation, 0 where all values of a series are equal."""
    if np.ptp(x) == 0 or np.ptp(y) == 0:
        return 0.0
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def judge(config: TransportConfig, records: Sequence[SettingRecord[float]]) -> list[Claim]:
    """Judge how dimensions change with the rate and go with losses, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate and setting.
    """
    claims, names = [], list(config.families["rates"])
    by_rate = [[r for r in records if r.setting == name] for name in names]
    for method in METHODS:
        means = _mean_dimensions(by_rate, method)
        sign, change = (-1, "falls") if method == "weights" else (1, "rises")
        claims.append(
            claim(
                f"dimension_{change}_with_the_rate_{method}",
                f"the effective dimension that governs matching by {method}, averaged over layers, "
                f"{change} from the lowest rate to the highest: the 95 % interval of the change excludes 0",
                f"{_PAPER[method]} (read off the plot)",
                sign * (means[-1] - means[0]),
            )
        )
        if len(names) > 2:
            losses = _losses(by_rate, method, "midpoint_loss")
            claims.append(
                claim(
                    f"dimension_goes_with_loss_{method}",
                    f"{method}: over the rates, the rank correlation of the effective dimension with the "
                    "midpoint's test loss is above 0, and so is its 95 % interval over pairs",
                    "the dimension correlates with linear connectivity (section 6)",
                    np.array([_rank_correlation(*pair) for pair in zip(means.T, losses.T, strict=True)]),
                )
            )
    low = by_rate[: (len(names) + 1) // 2]
    for better, worse in (("covariance", "weights"), ("activations", "covariance")):
        gaps = _losses(low, worse, "loss_barrier") - _losses(low, better, "loss_barrier")
        claims.append(
            claim(
                f"{better}_better_than_{worse}_by_barrier",
                f"at learning rates up to {names[len(low) - 1]}, the test loss barrier (Eq. 1) is lower "
                f"after {better} than after {worse} matching: the mean difference is above 0, and so is its "
                "95 % interval",
                "this order by the midpoint's test loss (section 6), which learning_rates judges",
                gaps.mean(axis=0),
            )
        )
    for name in config.families["optimizers"]:
        scores = np.array([record.dependence for record in records if record.setting == name])
        interval = student_interval(scores)
        # One pair has no interval; a score within ±1.96 is then taken for chance.
        low, high = interval[1:3] if len(scores) > 1 else (interval.mean - 1.96, interval.mean + 1.96)
        short, way = (name, name) if name in VARIANTS else ("momentum", "SGD with momentum")
        claims.append(
            claim(
                f"independent_neurons_{short.replace(' ', '_')}",
                f"{way}: the first layers' neurons cannot be told from independent ones: the 95 % interval "
                "of the test's z-score has 0 in it",
                "assumed (section 4); what optimisers do to it is an open question",
                scores,
                low <= 0 <= high,
            )
        )
    return claims


def _tidy_rows(results: Any) -> Iterator[dict[str, Any]]:
    """Yield one row for each setting, pair, layer and method."""
    for record in results.records:
        for layer, dimensions in enumerate(record.layers):
            for method in METHODS:
                path = record.methods[method].plain
                yield {
                    "setting": record.setting,
                    "seed": record.seeds[0],
                    "layer": layer,
                    "leaf": dimensions.leaf,
                    "method": method,
                    "dimension": f"{getattr(dimensions, method):.6g}",
                    "layer_loss": f"{record.layer_losses[method][layer]:.6g}",
                    "midpoint_loss": f"{path.midpoint_loss:.6g}",
                    "loss_barrier": f"{path.loss_barrier:.6g}",
                    "error_barrier": f"{path.error_barrier:.6g}",
                    "distance": f"{record.distance:.6g}",
                    "covariance_distance": f"{record.covariance_distance:.6g}",
                    "dependence": f"{record.dependence:.6g}",
                    "p_value": f"{record.p_value:.6g}",
                }


EXPERIMENT = Experiment(
    schema=Schema("optimal_transport", TransportConfig, SettingRecord[float], SettingsSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="transport.csv",
    rows=_tidy_rows,
    figures={
        "optimal_transport.png": figures.draw_dimensions,
        "correlations.png": figures.draw_correlations,
    },
    report=figures.report,
    keep="measured",
)


def build_config() -> TransportConfig:
    """Build the config that the flags describe."""
    choice = options.choose("optimal_transport", replicates=options.chosen_pairs(PAPER_PAIRS))
    recipe = choice.fields["recipe"]
    given = _LENGTHS.value
    try:
        lengths = None if given is None else tuple(map(int, given))
    except ValueError:
        raise ConfigError(f"wanted lengths, such as 1,3, got {','.join(given or ())!r}") from None
    if lengths is None:
        lengths = tuple(sorted({max(1, recipe.epochs // share) for share in (10, 3)} - {recipe.epochs}))
    widths = tuple(width for width in (recipe.width // 4, recipe.width // 2) if width)
    return TransportConfig(
        **choice.fields,
        rates=chosen_rates(),
        num_test=choice.num_eval,
        widths=options.chosen_widths(widths),
        lengths=lengths,
        variants=tuple(_VARIANTS.value),
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
