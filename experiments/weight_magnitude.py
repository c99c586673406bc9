"""Weight matching depends on the large weights.

Reproduces appendix H.2 of arXiv 2404.06498 (figures 5 left, 16). Pairs of networks A and B are trained from
different seeds. At each epoch t of --prune_epochs a fraction p of all weights of both networks is pruned,
those of smallest magnitude or as many at random, the pruned networks are matched, and the permutation is
applied to the networks at the end of training, which are not pruned. The run prints a table of barriers by
fraction and the paper's claims with a verdict each.

  python -m experiments.weight_magnitude --preset=digits --output_dir=results/digits_mlp_magnitude
  python -m experiments.weight_magnitude --preset=cpu --model=mlp --num_eval=2000 --num_alphas=13
    --output_dir=results/mnist_mlp_magnitude
  python -m experiments.weight_magnitude --preset=cpu --model=vgg16 --num_eval=500 --num_alphas=9
    --output_dir=results/cifar10_vgg16_magnitude

Writes results.json, barriers.csv and weight_magnitude.png (figures 5 left, 16). The time goes into training
and into sweeps, two for each epoch and fraction. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import weight_magnitude_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matched_epochs import (
    EpochsConfig,
    MagnitudeRecord,
    MatchedEpochs,
    PrunedEpoch,
    PrunedMatch,
)
from experiments.harness.methods import build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints
from experiments.harness.record import added, check_names, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval
from rebasin.errors import ConfigError
from rebasin.masks import apply_mask
from rebasin.pruning import magnitude_mask, random_mask
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "MagnitudeConfig", "harmless_fraction", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
_EPOCHS = flags.DEFINE_list(
    "prune_epochs",
    None,
    "Epochs t whose networks are pruned and matched; by default the preset's match epochs from 1 on. The "
    "last epoch is always among them.",
)
_FRACTIONS = flags.DEFINE_list(
    "fractions",
    ["0", "0.2", "0.4", "0.6", "0.7", "0.8", "0.9", "0.95", "0.98"],
    "Fractions of all weights that are pruned, ascending from 0.",
)

# The fraction on which claims are judged is the largest up to this one.
_HIGH = 0.8

# By how much a test error barrier may rise and count as unaffected.
_MARGIN = 0.02


@dataclasses.dataclass(frozen=True, kw_only=True)
class MagnitudeConfig(EpochsConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      fractions: fractions of all weights that are pruned, in ascending order from 0.
    """

    fractions: tuple[float, ...]

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the field that is added here."""
        problems, given = super().problems(), list(self.fractions)
        if given != sorted(set(given)) or len(given) < 2 or given[0] != 0 or not given[-1] < 1:
            problems.append(f"fractions: wanted ascending fractions below 1, the first 0, got {given}")
        return problems

    @property
    def high(self) -> int:
        """Index of the fraction on which claims are judged, the largest up to four fifths, but never 0."""
        return max(i for i, fraction in enumerate(self.fractions) if fraction <= _HIGH or i == 1)

    def misfits(self, record: MagnitudeRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods and fractions."""
        problems = super().misfits(record, pair)
        for part in record.epochs:
            problems += check_names(f"epochs.{part.epoch}.methods", part.methods, self.methods)
            for name, own in part.methods.items():
                for kind in ("magnitude", "random"):
                    if (found := len(getattr(own, kind))) != len(self.fractions):
                        where = f"epochs.{part.epoch}.methods.{name}.{kind}"
                        problems.append(f"{where}: wanted {len(self.fractions)} fractions, got {found}")
        return problems


def _build_measure(setup: Setup[MagnitudeConfig]) -> Measure[MagnitudeRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: MagnitudeRecord[float] | None
    ) -> Iterator[MagnitudeRecord[float]]:
        epochs = MatchedEpochs(setup, matchers, pair, trained)
        with setup.seconds.count("barriers"):
            paths = Paths(meter, setup.spec, *epochs.networks(config.epochs[-1]))
        record = begun or MagnitudeRecord(pair.seeds, endpoints(paths.unaligned), barriers(paths.unaligned))
        missing = [t for t in config.epochs if t not in record.part_keys]
        steps = len(missing) * 2 * len(config.fractions)
        with setup.reporter.stage(f"pruned networks of {pair}", steps) as advance:
            for t in missing:
                record = added(record, _measure_epoch(setup, pair, epochs, paths, t, advance))
                yield record

    return measure


def _measure_epoch(
    setup: Setup[MagnitudeConfig],
    pair: Pair,
    epochs: MatchedEpochs,
    paths: Paths,
    t: int,
    advance: Callable[[], None],
) -> PrunedEpoch[float]:
    """Prune and match the networks of an epoch, and measure the permutations at the end of training.

    Args:
      setup: what the experiment measures with.
      pair: the pair, which gives the key of random pruning.
      epochs: the networks.
      paths: the paths between the networks of the last epoch.
      t: the epoch.
      advance: called for each pair of pruned networks.
    """
    networks = epochs.networks(t)

    def measure(masks: Sequence[Any]) -> dict[str, Any]:
        pruned = [apply_mask(mask, params) for mask, params in zip(masks, networks, strict=True)]
        found = epochs.match(*pruned)
        with setup.seconds.count("barriers"):
            measured = {name: paths.barriers(permutation) for name, permutation in found.items()}
        advance()
        return measured

    def draw(i: int, side: int, fraction: float) -> Any:
        key = jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(pair.key, t), i), side)
        return random_mask(networks[side], fraction, key=key)

    magnitude, random = [], []
    for i, fraction in enumerate(setup.config.fractions):
        magnitude.append(measure([magnitude_mask(params, fraction) for params in networks]))
        random.append(measure([draw(i, side, fraction) for side in (0, 1)]))
    return PrunedEpoch(
        t,
        {
            name: PrunedMatch(*(tuple(found[name] for found in kind) for kind in (magnitude, random)))
            for name in setup.config.methods
        },
    )


def harmless_fraction(fractions: Sequence[float], barriers: np.ndarray, margin: float) -> np.ndarray:
    """Return the largest fraction up to which pruning raises a barrier by no more than a margin.

    Args:
      fractions: ascending fractions, the first of which is 0.
      barriers: the barrier at each of them, ``[replicates, fractions]``.
      margin: by how much the barrier may exceed that without pruning.

    Examples:
      >>> harmless_fraction([0.0, 0.5, 0.9], np.array([[0.1, 0.1, 0.3], [0.1, 0.4, 0.1]]), 0.02).tolist()
      [0.5, 0.0]
    """
    harms = barriers - barriers[:, :1] > margin
    last = np.where(harms.any(axis=1), harms.argmax(axis=1) - 1, harms.shape[1] - 1)
    return np.asarray(fractions)[last]


def judge(config: MagnitudeConfig, records: Sequence[MagnitudeRecord[float]]) -> list[Claim]:
    """Judge the claims of appendix H.2, on test error barriers, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.
    """
    return [found for method in config.methods for found in _judge_method(config, records, method)]


def _judge_method(
    config: MagnitudeConfig, records: Sequence[MagnitudeRecord[float]], method: str
) -> list[Claim]:
    def errors(kind: str, epoch: int) -> np.ndarray:
        """Return barriers ``[replicates, fractions]`` of one of the epochs, by its index."""
        found = [getattr(record.epochs[epoch].methods[method], kind) for record in records]
        return np.array([[metrics.test_error for metrics in row] for row in found])

    magnitude, random = errors("magnitude", -1), errors("random", -1)
    share = f"{config.fractions[config.high]:.0%}"
    rise = magnitude[:, config.high] - magnitude[:, 0]
    small = claim(
        f"small_weights_do_not_matter_{method}",
        f"{method}: without the {share} of weights of smallest magnitude at the end, the barrier rises by "
        f"less than {_MARGIN:.0%}: the 95 % interval of the rise ends below that",
        "weight matching is unaffected by magnitude pruning (section 6, figure 5 left)",
        rise,
    )
    upper = small.high if len(records) > 1 else small.measured
    reach = [harmless_fraction(config.fractions, errors("magnitude", epoch), _MARGIN) for epoch in (0, -1)]
    return [
        dataclasses.replace(small, holds=bool(upper < _MARGIN)),
        claim(
            f"random_pruning_harms_more_{method}",
            f"{method}: with {share} of weights pruned at random at the end, the barrier is higher than by "
            "magnitude: the 95 % interval of the difference is above 0",
            "weight matching performs worse when weights are pruned at random (section 6, figure 5 left)",
            (random - magnitude)[:, config.high],
        ),
        claim(
            f"more_can_be_pruned_late_{method}",
            f"{method}: the largest fraction of small weights whose pruning raises the barrier by at most "
            f"{_MARGIN:.0%} is larger at the end than at epoch {config.epochs[0]}: the 95 % interval of the "
            f"difference is above 0 (at the end {reach[1].mean():.0%})",
            "a larger fraction can be pruned from later checkpoints (appendix H.2, figure 16)",
            reach[1] - reach[0],
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("weight_magnitude", MagnitudeConfig, MagnitudeRecord[float], MagnitudeRecord[Interval]),
    build_measure=_build_measure,
    summarise=lambda config, records: summarise(records),
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={"weight_magnitude.png": figures.draw_fractions},
    report=figures.report,
)


def build_config() -> MagnitudeConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    try:
        fractions = tuple(float(fraction) for fraction in _FRACTIONS.value)
    except ValueError:
        raise ConfigError(
            f"wanted fractions, such as 0,0.5,0.9, got {','.join(_FRACTIONS.value)!r}"
        ) from None
    early = [t for t in choice.preset.match_epochs if t > 0]
    return MagnitudeConfig(
        **choice.fields,
        methods=options.chosen_methods(("weights",)),
        epochs=options.choose_epochs_with_last(_EPOCHS.value, early, choice.last),
        num_eval=choice.num_eval,
        fractions=fractions,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
