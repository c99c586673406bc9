"""Relates effective dimensions and dependence of neurons to the barriers that matching leaves.

Follows arXiv 2310.19103, sections 5 and 6, on an MLP. Networks need to be the wider, the higher the dimension
is in which their neurons are matched. Pairs of networks are trained with that paper's recipe at each learning
rate, and at the recipe's own rate without momentum, with weight decay, and with Adam. Of each pair these are
measured:

- the effective dimension (Σλ)² / Σλ² of the matrix that governs each method, for each hidden layer of A;
- the Wasserstein-2 distance between the first layers, in the Euclidean metric and in that of the data,
  divided by the root mean square norm of A's neurons in the same metric;
- a permutation test of whether the first layers' neurons are independent, as the theory assumes;
- the path that each method leaves, on test data.

The run prints tables and the paper's claims with a verdict each.

  python -m experiments.optimal_transport --preset=digits --output_dir=results/transport_digits
  python -m experiments.optimal_transport --preset=cpu --model=mlp --epochs=10 --num_alphas=13
    --output_dir=results/transport_mnist

Writes results.json, transport.csv and optimal_transport.png. Networks at the learning rates are those of
`learning_rates`, and are found there if --runs_dir is the same. A finished run is only drawn anew.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import matplotlib as mpl
import numpy as np
from absl import app, flags
from matplotlib.figure import Figure
from scipy import stats

from experiments.harness import options
from experiments.harness.console import Reporter, cell
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.figures import RC, Style, Target, draw_band, entitle, share_legend
from experiments.harness.methods import MethodComparison
from experiments.harness.networks import Pair
from experiments.harness.record import Dimensions, SettingRecord, SettingsSummary, summarise
from experiments.harness.results import Claim, Results, Schema, claim, describe_mean
from experiments.learning_rates import METHODS, OPTIONS, PAPER_PAIRS, RatesConfig, chosen_rates
from rebasin.training.data import normalise
from rebasin.training.trajectory import Trajectory
from rebasin.transport import dependence_test, effective_dimensions, transport_neurons

__all__ = ["EXPERIMENT", "TransportConfig", "build_config", "judge", "main"]

options.define_flags(__name__, strict=True)
flags.declare_key_flag("rates")

# What changes in the recipe beside the learning rate. Adam needs a lower rate than SGD.
_VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "no momentum": {"momentum": 0.0},
    "weight decay": {"weight_decay": 5e-4},
    "adam": {"optimizer": "adam", "peak_learning_rate": 1e-3},
}

_STYLES = {
    "weights": Style("weights", "#0072B2", marker="o"),
    "covariance": Style("covariance", "#D55E00", (0, (5, 2)), marker="s"),
    "activations": Style("activations", "#009E73", (0, (5, 1, 1, 1)), marker="^"),
}

# Range over layers at the lowest and at the highest rate, read off the paper's plot.
_PAPER = {
    "weights": "about 250 to 310 falling to 190 to 220",
    "covariance": "about 1.5 to 3 rising to 3.5 to 9",
    "activations": "about 1.5 to 3 rising to 3.5 to 9",
}

_Finished = Results["TransportConfig", SettingRecord[float], SettingsSummary]


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportConfig(RatesConfig):
    """Everything that the results depend on; written into ``results.json``."""

    def problems(self) -> list[str]:
        """Return the problems of the base, and that of a model whose layers are not read here."""
        problems = super().problems()
        if self.recipe.model != "mlp":
            problems.append(f"model: wanted mlp, got {self.recipe.model!r}")
        return problems

    @property
    def settings(self) -> dict[str, Any]:
        """The recipe of each setting, by name: the learning rates in ascending order, then the variants."""
        rates = {f"{rate:g}": {"peak_learning_rate": rate} for rate in self.rates}
        return {name: dataclasses.replace(self.recipe, **c) for name, c in {**rates, **_VARIANTS}.items()}

    @property
    def pairs(self) -> list[Pair]:
        """One pair for each setting and replicate, all replicates of a setting in a row.

        So the training of each setting is compiled once.
        """
        seeds = dict.fromkeys(pair.seeds for pair in super().pairs)
        return [Pair(recipe, pair) for recipe in self.settings.values() for pair in seeds]

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
    comparison = MethodComparison(setup, METHODS, num_test=setup.config.num_test, options=OPTIONS)
    statistics = setup.dataset.mean, setup.dataset.std
    images = np.asarray(normalise(setup.match_data.inputs, *statistics), np.float64)
    inputs = images.reshape(len(images), -1)

    def begin(pair: Pair, trained: Sequence[Trajectory]) -> SettingRecord[float]:
        params_a, first_a, first_b = trained[0].last, *(_neurons(t.last, 0) for t in trained)
        moment = inputs.T @ inputs / len(inputs)
        dependence = dependence_test([first_a, first_b])
        return SettingRecord(
            seeds=pair.seeds,
            setting=setup.config.setting_of(pair),
            layers=_dimensions(params_a, inputs),
            distance=transport_neurons(first_a, first_b).distance / _norm(first_a, np.eye(len(moment))),
            covariance_distance=transport_neurons(first_a, first_b, second_moment=moment).distance
            / _norm(first_a, moment),
            dependence=dependence.z_score,
            p_value=dependence.p_value,
            methods={},
        )

    def measure(
        pair: Pair, trained: list[Trajectory], begun: SettingRecord[float] | None
    ) -> Iterator[SettingRecord[float]]:
        record = begun or begin(pair, trained)
        for methods in comparison.measure(trained, pair, f"{record.setting}, {pair}", record.methods):
            yield dataclasses.replace(record, methods=methods)

    return measure


def _neurons(params: Any, layer: int) -> np.ndarray:
    """Return the weights that lead into the units of a layer, ``[units, inputs]``."""
    return np.asarray(params["params"][f"Dense_{layer}"]["kernel"], np.float64).T


def _norm(neurons: np.ndarray, moment: np.ndarray) -> float:
    """Return the root mean square norm of neurons in the metric of a second moment."""
    return float(np.sqrt(np.einsum("nd,de,ne->n", neurons, moment, neurons, optimize=True).mean()))


def _dimensions(params: Any, inputs: np.ndarray) -> tuple[Dimensions[float], ...]:
    """Return the effective dimensions of each hidden layer; the output layer is not matched."""
    found = []
    for layer in range(len(params["params"]) - 1):
        neurons, bias = _neurons(params, layer), np.asarray(params["params"][f"Dense_{layer}"]["bias"])
        outputs = np.maximum(inputs @ neurons.T + bias, 0)
        found.append(Dimensions(*effective_dimensions(neurons, inputs, outputs)))
        inputs = outputs
    return tuple(found)


def _summarise(config: TransportConfig, records: Sequence[SettingRecord[float]]) -> SettingsSummary:
    """Return mean, 95 % interval and standard deviation over replicates in each setting."""
    settings = (summarise([r for r in records if r.setting == name]) for name in config.settings)
    return SettingsSummary(tuple(settings))


def judge(config: TransportConfig, records: Sequence[SettingRecord[float]]) -> list[Claim]:
    """Judge how dimensions change with the rate and go with losses, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate and setting.
    """
    claims, names = [], [f"{rate:g}" for rate in config.rates]
    by_rate = [[r for r in records if r.setting == name] for name in names]
    for method in METHODS:
        means = np.array(
            [[np.mean([getattr(x, method) for x in r.layers]) for r in records] for records in by_rate]
        )
        sign, change = (-1, "falls") if method == "weights" else (1, "rises")
        claims.append(
            claim(
                f"dimension_{change}_with_the_rate_{method}",
                f"the effective dimension that governs matching by {method}, averaged over hidden layers, "
                f"{change} from the lowest rate to the highest: the 95 % interval of the change excludes 0",
                f"{_PAPER[method]} (read off the plot)",
                sign * (means[-1] - means[0]),
            )
        )
        if len(names) > 2:
            losses = [[r.methods[method].plain.midpoint_loss for r in records] for records in by_rate]
            pairs = zip(means.T, np.transpose(losses), strict=True)
            claims.append(
                claim(
                    f"dimension_goes_with_loss_{method}",
                    f"{method}: over the rates, the rank correlation of the effective dimension with the "
                    "midpoint's test loss is above 0, and so is its 95 % interval over pairs",
                    "the dimension correlates with linear connectivity (section 6)",
                    np.array([_rank_correlation(*pair) for pair in pairs]),
                )
            )
    return claims


def _rank_correlation(x: np.ndarray, y: np.ndarray) -> float:
    """Return Spearman's rank correlation."""
    found: Any = stats.spearmanr(x, y)
    return float(found.statistic)


def _tidy_rows(results: _Finished) -> Iterator[dict[str, Any]]:
    """Yield one row for each setting, pair, hidden layer and method."""
    for record in results.records:
        for layer, dimensions in enumerate(record.layers):
            for method in METHODS:
                path = record.methods[method].plain
                yield {
                    "setting": record.setting,
                    "seed": record.seeds[0],
                    "layer": layer,
                    "method": method,
                    "dimension": f"{getattr(dimensions, method):.6g}",
                    "midpoint_loss": f"{path.midpoint_loss:.6g}",
                    "error_barrier": f"{path.error_barrier:.6g}",
                    "distance": f"{record.distance:.6g}",
                    "covariance_distance": f"{record.covariance_distance:.6g}",
                    "dependence": f"{record.dependence:.6g}",
                    "p_value": f"{record.p_value:.6g}",
                }


def _layer_mean(record: SettingRecord[Any], method: str) -> float:
    """Return the mean over hidden layers of the mean dimension."""
    return float(np.mean([getattr(layer, method).mean for layer in record.layers]))


def _report(results: _Finished, reporter: Reporter) -> None:
    """Print one table of dimensions and losses, and one of distances and dependence."""
    settings = results.require_summary().settings
    short = {"weights": "weights", "covariance": "cov.", "activations": "act."}
    rows = [
        [
            record.setting,
            *(f"{_layer_mean(record, name):.1f}" for name in METHODS),
            *(cell(record.methods[name].plain.midpoint_loss, percent=False) for name in METHODS),
        ]
        for record in settings
    ]
    reporter.say(f"\n{describe_mean(results.config.replicates)} in each setting")
    columns = [f"{what}\n{short[name]}" for what in ("dim.", "loss ½") for name in METHODS]
    reporter.table(["\nrate", *columns], rows)
    reporter.say("dim.: effective dimension, mean of hidden layers; loss ½: at the midpoint, test\n")
    rows = [
        [
            record.setting,
            *(cell(x, percent=False) for x in (record.distance, record.covariance_distance)),
            cell(record.dependence, percent=False),
            cell(record.methods["weights"].plain.error_barrier, percent=True),
        ]
        for record in settings
    ]
    reporter.table(["\nrate", "\nW₂", "\nW₂ in Σ", "\ndependence z", "error\nweights"], rows)
    reporter.say("first layers; z above 0: neurons of one network are more alike than those of two")


def _draw(results: _Finished, target: Target) -> None:
    """Draw effective dimension by learning rate, and loss at the midpoint by effective dimension."""
    settings = results.require_summary().settings
    rates = [float(record.setting) for record in settings if record.setting not in _VARIANTS]
    with mpl.rc_context(RC):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained")
        left, right = figure.subplots(1, 2)
        for name, style in _STYLES.items():
            for layer in range(len(settings[0].layers)):
                series = [getattr(record.layers[layer], name) for record in settings[: len(rates)]]
                draw_band(left, rates, series, style)
            for records, marker in ((settings[: len(rates)], style.marker), (settings[len(rates) :], "x")):
                right.scatter(
                    [_layer_mean(record, name) for record in records],
                    [record.methods[name].plain.midpoint_loss.mean for record in records],
                    color=style.colour,
                    marker=marker,
                    s=18,
                )
        left.set(xscale="log", yscale="log", xlabel="peak learning rate", ylabel="effective dimension")
        right.set(xscale="log", xlabel="effective dimension, mean of layers")
        right.set_ylabel("test loss at the midpoint (nats)")
        right.set_ylim(bottom=0)
        for axis in (left.yaxis, right.xaxis):  # the labels of a logarithmic axis would overlap
            limits = axis.get_view_interval()
            ticks = [n for n in (1, 2, 5, 10, 20, 50, 100, 200, 500) if limits[0] <= n <= limits[1]]
            axis.set_ticks(ticks, labels=[str(n) for n in ticks])
            axis.set_ticks([], minor=True)
        for axes in (left, right):
            axes.grid(alpha=0.25, linewidth=0.5)
        note = f"one line for each hidden layer; ×: {', '.join(_VARIANTS)}"
        entitle(figure, results, "networks", note)
        share_legend(figure, [left])
        figure.savefig(target, metadata={"Software": None})


EXPERIMENT = Experiment(
    schema=Schema("optimal_transport", TransportConfig, SettingRecord[float], SettingsSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="transport.csv",
    rows=_tidy_rows,
    figures={"optimal_transport.png": _draw},
    report=_report,
)


def build_config() -> TransportConfig:
    """Build the config that the flags describe."""
    choice = options.choose("optimal_transport", replicates=PAPER_PAIRS)
    return TransportConfig(**choice.fields, rates=chosen_rates(), num_test=choice.num_eval)


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
