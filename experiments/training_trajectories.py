"""One permutation aligns two whole training trajectories.

Reproduces section 5.1 and appendices E and H.1 of arXiv 2404.06498 (figures 1 left, 4, 7, 8, 9, 10, 15, 21).
Pairs of networks A and B are trained from different seeds. Weight and activation matching find a permutation
P_t of B_t at every recorded epoch t. Each P_s of chosen epochs s is applied to B_t at every recorded epoch t,
and the loss and error barriers of the path to A_t are measured; P_end is the permutation from the last epoch.
P_t is also measured at its own epoch and at the last one. The run prints a table by epoch for each method and
the paper's claims with a verdict each.

  python -m experiments.training_trajectories --preset=demo --output_dir=results/demo
  python -m experiments.training_trajectories --preset=digits --output_dir=results/digits_mlp
  python -m experiments.training_trajectories --preset=digits --model=vit --output_dir=results/digits_vit
  python -m experiments.training_trajectories --preset=cpu --model=mlp --num_eval=2000
    --output_dir=results/mnist_mlp
  python -m experiments.training_trajectories --preset=cpu --model=vgg16 --num_alphas=9 --num_eval=500
    --output_dir=results/cifar10_vgg16

On two CPU cores the demo takes a minute, digits 3 minutes, and with the networks already trained MNIST 42
minutes and VGG-16 6. --preset=paper is the recipe of the paper, for an accelerator.

Expected on digits: without a permutation a test error barrier of 74 % at the end; under P_end 0.3 % at the
end and at most 2 % at any epoch; P_1 leaves 30 % (weights) and 7 % (activations) at the end. All ten claims
hold.

Writes results.json, barriers.csv, training_trajectories.png (figures 1, 4, 8), fixed_permutations.png (7,
8, 10) and permutations.png (distances and fixed points). The time goes into sweeps: at most one for each
method, epoch s of --match_epochs and epoch t of --record_epochs, and two more for each method and t. A
finished run of the same options is only drawn anew.
"""

import dataclasses
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, NamedTuple

import numpy as np
from absl import app, flags

import rebasin
from experiments import training_trajectories_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Config, Experiment, Setup
from experiments.harness.methods import PAPER_METHODS, Matcher, build_matchers, check_methods
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints, path_curves
from experiments.harness.presets import Thresholds
from experiments.harness.record import (
    AlignedEpoch,
    EpochRecord,
    FixedPoints,
    Metrics,
    TrajectoryRecord,
    added,
    check_names,
    summarise,
)
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval, ratio
from rebasin import permutation
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "TrajectoryConfig", "early_epochs", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
_RECORD = flags.DEFINE_list(
    "record_epochs", None, "Epochs t to compare, for example 0,1,2,5,10; by default the preset's."
)
_MATCH = flags.DEFINE_list(
    "match_epochs",
    None,
    "Epochs s, among those recorded, whose permutations are applied at every t; by default the preset's. The "
    "last epoch is always among them.",
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrajectoryConfig(Config):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      methods: names of matching methods.
      epochs: recorded epochs t in ascending order; the last must be the recipe's last epoch.
      match_epochs: recorded epochs s whose permutations are applied at every t; the last epoch is among them.
      num_eval: number of examples of each split on which paths are measured, `None` for all.
      thresholds: barriers against which claims are judged.
    """

    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    match_epochs: tuple[int, ...]
    num_eval: int | None
    thresholds: Thresholds

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = [*super().problems(), *check_methods(self.methods)]
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs)) or not self.epochs or self.epochs[0] < 0:
            problems.append(f"epochs: wanted ascending epochs from 0 on, got {list(self.epochs)}")
        elif self.epochs[-1] != last:
            problems.append(f"epochs: wanted the recipe's last, {last}, at the end, got {self.epochs[-1]}")
        if list(self.match_epochs) != sorted(set(self.match_epochs) & set(self.epochs) | {last}):
            problems.append(
                f"match_epochs: wanted ascending ones of epochs, with the last, got {list(self.match_epochs)}"
            )
        return problems

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The recorded epochs."""
        return self.epochs

    @property
    def wanted_parts(self) -> tuple[int, ...]:
        """The recorded epochs."""
        return self.epochs

    def misfits(self, record: TrajectoryRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods and match epochs."""
        problems = super().misfits(record, pair)
        for epoch in record.epochs:
            problems += check_names(f"epochs.{epoch.epoch}.methods", epoch.methods, self.methods)
            for name, aligned in epoch.methods.items():
                where = f"epochs.{epoch.epoch}.methods.{name}.under"
                problems += check_names(where, aligned.under, self.match_epochs)
        return problems


class _Epoch(NamedTuple):
    """One epoch of a pair: its networks, the match of each method, and the seconds that matching took."""

    params_a: Any
    params_b: Any
    matches: Mapping[str, rebasin.MatchResult]
    seconds: float


def _match_epoch(trained: Sequence[Trajectory], matchers: Mapping[str, Matcher], epoch: int) -> _Epoch:
    """Read both networks of an epoch and match them by every method."""
    params_a, params_b = (trajectory[epoch] for trajectory in trained)
    began = time.perf_counter()
    matches = {name: match(params_a, params_b) for name, match in matchers.items()}
    return _Epoch(params_a, params_b, matches, time.perf_counter() - began)


class _TrajectoryMeasure:
    """Measures a pair of trajectories, epoch by epoch.

    Every checkpoint is read once. A thread reads and matches ahead of the sweeps, first the epochs whose
    permutations are wanted at all other epochs, and the networks of an epoch are let go once it is measured.
    """

    def __init__(self, setup: Setup[TrajectoryConfig]) -> None:
        config = setup.config
        self._setup, self._config = setup, config
        self._last = config.epochs[-1]
        self._matchers = build_matchers(setup, config.methods)
        self._meter = PathMeter(
            setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval
        )

    def __call__(
        self, pair: Pair, trained: list[Trajectory], begun: TrajectoryRecord[float] | None
    ) -> Iterator[TrajectoryRecord[float]]:
        """Yield the record of a pair after each epoch that `begun` lacks."""
        record = begun or TrajectoryRecord(pair.seeds)
        matched = [self._last, *(s for s in self._config.match_epochs if s != self._last)]
        order = [*matched, *(t for t in self._config.epochs if t not in matched)]
        missing = [t for t in order if t not in [part.epoch for part in record.epochs]]
        reporter = self._setup.reporter
        with ThreadPoolExecutor(1) as pool, reporter.stage(f"measure {pair}", len(missing)) as advance:
            futures = {
                t: pool.submit(_match_epoch, trained, self._matchers, t)
                for t in order
                if t in missing or t in matched
            }
            try:
                sources = {s: futures[s].result().matches for s in self._config.match_epochs}
                end = self._paths(futures[self._last].result())
                for t in [*(s for s in matched if s not in missing), *missing]:
                    epoch = self._take(futures, t)
                    if t in missing:
                        record = added(record, self._measure_epoch(epoch, t, sources, end))
                        yield record
                        advance()
            finally:
                pool.shutdown(cancel_futures=True)

    def _take(self, futures: dict[int, Future[_Epoch]], epoch: int) -> _Epoch:
        """Return an epoch that nothing else refers to from now on."""
        found = futures.pop(epoch).result()
        self._setup.seconds.add("matching", found.seconds)
        return found

    def _paths(self, epoch: _Epoch) -> Paths:
        return Paths(self._meter, self._setup.spec, epoch.params_a, epoch.params_b)

    def _measure_epoch(
        self, epoch: _Epoch, t: int, sources: Mapping[int, Mapping[str, rebasin.MatchResult]], end: Paths
    ) -> EpochRecord[float]:
        """Measure everything that is recorded of epoch t.

        Args:
          epoch: networks and matches of the epoch.
          t: number of the epoch.
          sources: matches of the match epochs, by epoch and method.
          end: paths of the last epoch.
        """
        with self._setup.seconds.count("barriers"):
            at_end = t == self._last
            here = end if at_end else self._paths(epoch)
            return EpochRecord(
                epoch=t,
                endpoints=endpoints(here.unaligned),
                unaligned=barriers(here.unaligned),
                distance=here.distance(),
                methods={
                    name: self._measure_method(
                        match, {s: matches[name] for s, matches in sources.items()}, here, end
                    )
                    for name, match in epoch.matches.items()
                },
                path=path_curves(here.unaligned) if at_end else None,
            )

    def _measure_method(
        self,
        match: rebasin.MatchResult,
        sources: Mapping[int, rebasin.MatchResult],
        here: Paths,
        end: Paths,
    ) -> AlignedEpoch[float]:
        """Measure what one method makes of an epoch: its own match, and those of the match epochs."""
        p_t, p_end = match.permutation, sources[self._last].permutation
        return AlignedEpoch(
            objective=float(match.objective[-1]),
            same_epoch=barriers(here.curve(p_t)),
            at_end=barriers(end.curve(p_t)),
            under={s: barriers(here.curve(source.permutation)) for s, source in sources.items()},
            distance_same_epoch=here.distance(p_t),
            distance_end=here.distance(p_end),
            fixed_points=_agreement(rebasin.fixed_points(p_t, p_end)),
            identity=_agreement(rebasin.fixed_points(p_end)) if here is end else None,
            path=path_curves(here.curve(p_end)) if here is end else None,
        )


def _agreement(points: permutation.FixedPoints) -> FixedPoints[float]:
    return FixedPoints(points.total, points.fractions)


def early_epochs(epochs: Sequence[int]) -> list[int]:
    """Return the indices in `epochs` at which training is early.

    Early is from epoch 1 to a tenth of the last epoch, and at least the first recorded epoch from 1 on.

    Examples:
      >>> early_epochs([0, 1, 2, 3, 5, 30]), early_epochs([0, 2, 4])
      ([1, 2, 3], [1])
    """
    trained = [i for i, epoch in enumerate(epochs) if epoch >= 1]
    return [i for i in trained if 10 * epochs[i] <= epochs[-1]] or trained[:1]


def judge(config: TrajectoryConfig, records: Sequence[TrajectoryRecord[float]]) -> list[Claim]:
    """Judge all claims, which are about test error barriers, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.

    Returns:
      One claim for the networks without a permutation, those of each method, and, where both are there, one
      that compares weight with activation matching.
    """
    limit = config.thresholds.unaligned_above
    unaligned = _test_errors(records, lambda epoch: epoch.unaligned)[:, -1]
    claims = [
        claim(
            "unaligned_barrier",
            f"without a permutation, the test error barrier at the end is above {limit:.0%}",
            "around 70 % (section 5.1, VGG-16 on CIFAR-10)",
            unaligned,
            unaligned.mean() > limit,
        )
    ]
    for method in config.methods:
        claims += _judge_method(config, records, method)
    if "weights" in config.methods:
        claims += _judge_distances(config, records)
    if {"weights", "activations"} <= set(config.methods):
        claims.append(_judge_activations(config, records))
    return claims


def _test_errors(
    records: Sequence[TrajectoryRecord[float]], pick: Callable[[EpochRecord[float]], Metrics[float]]
) -> np.ndarray:
    """Return the test error barriers that `pick` chooses, ``[replicates, epochs]``."""
    return np.array([[pick(epoch).test_error for epoch in record.epochs] for record in records])


def _judge_method(
    config: TrajectoryConfig, records: Sequence[TrajectoryRecord[float]], method: str
) -> list[Claim]:
    """Judge the claims of section 5.1 for one matching method."""
    epochs, limits = config.epochs, config.thresholds
    early = early_epochs(epochs)
    under_end = _test_errors(records, lambda epoch: epoch.methods[method].under[epochs[-1]])
    at_end = _test_errors(records, lambda epoch: epoch.methods[method].at_end)
    # The worst epoch of the mean, rather than the mean of each replicate's worst, which chance would raise.
    worst = int(under_end.mean(axis=0).argmax())
    limit, limit_end = limits.any_epoch_at_most, limits.end_at_most
    return [
        claim(
            f"one_permutation_aligns_every_epoch_{method}",
            f"{method}: under P_end the test error barrier is at most {limit:.0%} at every epoch (highest at "
            f"epoch {epochs[worst]})",
            "3 to 8 % at any time (section 5.1; at most 9 % in the plots)",
            under_end[:, worst],
            under_end[:, worst].mean() <= limit,
        ),
        claim(
            f"one_permutation_aligns_the_end_{method}",
            f"{method}: under P_end it is at most {limit_end:.0%} at the end",
            "6 % (read off figure 4)",
            under_end[:, -1],
            under_end[:, -1].mean() <= limit_end,
        ),
        claim(
            f"early_permutations_fail_{method}",
            f"{method}: P_t from epoch {epochs[early[0]]} is worse at the end than P_end: the 95 % interval "
            "of the difference of test error barriers is above 0",
            "from epoch 3 a train error barrier of .89 is left, from 150 .08 (figure 8, weights)",
            at_end[:, early[0]] - at_end[:, -1],
        ),
    ]


def _judge_distances(config: TrajectoryConfig, records: Sequence[TrajectoryRecord[float]]) -> list[Claim]:
    """Judge the claims of appendix H.1 about weight matching, which minimises the distance."""
    early, when = early_epochs(config.epochs), _describe_early(config)
    own = [[epoch.methods["weights"] for epoch in record.epochs] for record in records]
    near = np.array([[epoch.distance_same_epoch for epoch in epochs] for epochs in own])
    far = np.array([[epoch.distance_end for epoch in epochs] for epochs in own])
    in_place = _test_errors(records, lambda epoch: epoch.methods["weights"].same_epoch)
    under_end = _test_errors(records, lambda epoch: epoch.methods["weights"].under[config.epochs[-1]])
    return [
        claim(
            "early_permutations_are_closer",
            "weights: P_t[B_t] is closer to A_t in Euclidean distance than P_end[B_t] is: the 95 % interval "
            f"of the relative difference, averaged over {when}, is below 0",
            "P_t aligns weights more closely than P_end early in training (appendix H.1)",
            ratio(near, far)[:, early].mean(axis=1) - 1,
            below=True,
        ),
        claim(
            "early_permutations_are_worse_in_place",
            "weights: and yet the test error barrier at t is higher under P_t than under P_end: the 95 % "
            f"interval of the difference, averaged over {when}, is above 0",
            "early in training weight matching fails where P_end aligns (figure 4, appendix H.1)",
            (in_place - under_end)[:, early].mean(axis=1),
        ),
    ]


def _judge_activations(config: TrajectoryConfig, records: Sequence[TrajectoryRecord[float]]) -> Claim:
    """Judge the claim of appendix E that activation matching succeeds earlier than weight matching."""
    weights, activations = (
        _test_errors(records, lambda epoch, method=method: epoch.methods[method].at_end)
        for method in ("weights", "activations")
    )
    return claim(
        "activations_succeed_earlier",
        f"applied at the end, P_t from {_describe_early(config)} leaves a lower test error barrier by "
        "activation matching than by weight matching: the 95 % interval of the difference is above 0",
        "activation matching finds such a permutation earlier in training (appendix E, figures 7 and 8)",
        (weights - activations)[:, early_epochs(config.epochs)].mean(axis=1),
    )


def _describe_early(config: TrajectoryConfig) -> str:
    """Name the early epochs, for example ``"epochs 1 to 3"``."""
    early = [config.epochs[i] for i in early_epochs(config.epochs)]
    return f"epoch {early[0]}" if len(early) == 1 else f"epochs {early[0]} to {early[-1]}"


EXPERIMENT = Experiment(
    schema=Schema(
        "training_trajectories", TrajectoryConfig, TrajectoryRecord[float], TrajectoryRecord[Interval]
    ),
    build_measure=_TrajectoryMeasure,
    summarise=lambda config, records: summarise(records),
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={
        "training_trajectories.png": figures.draw_trajectories,
        "fixed_permutations.png": figures.draw_fixed_permutations,
        "permutations.png": figures.draw_permutations,
    },
    report=figures.report,
)


def build_config() -> TrajectoryConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    epochs = options.choose_epochs(_RECORD.value, choice.preset.epochs, choice.last)
    if _RECORD.value is None:
        epochs = (*epochs, choice.last)
    matched = set(options.choose_epochs(_MATCH.value, choice.preset.match_epochs, choice.last))
    if _MATCH.value is None:
        matched &= set(epochs)
    return TrajectoryConfig(
        **choice.fields,
        methods=options.chosen_methods(PAPER_METHODS),
        epochs=epochs,
        match_epochs=tuple(sorted(matched | {choice.last})),
        num_eval=choice.num_eval,
        thresholds=choice.preset.thresholds,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
