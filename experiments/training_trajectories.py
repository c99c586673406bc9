"""One permutation aligns two whole training trajectories.

Reproduces section 5.1 and appendices E and H.1 of arXiv 2404.06498 (figures 1 left, 4, 7, 8, 9, 10, 15, 21).
Pairs of networks A and B are trained from different seeds. Weight and activation matching find a permutation
P_t of B_t at every recorded epoch t. Each P_s of chosen epochs s is applied to B_t at every recorded epoch t,
and the loss and error barriers of the path to A_t are measured; P_end is the permutation from the last epoch.
P_t is also measured at its own epoch and at the last one. The run prints a table by epoch for each method and
the paper's claims with a verdict each.

  python -m experiments.training_trajectories --preset=demo --output_dir=results/demo
  python -m experiments.training_trajectories --preset=digits --seed=100 --output_dir=results/digits_mlp
  python -m experiments.training_trajectories --preset=digits --model=vit --output_dir=results/digits_vit
  python -m experiments.training_trajectories --preset=cpu --model=mlp --num_eval=2000
    --output_dir=results/mnist_mlp
  python -m experiments.training_trajectories --preset=cpu --model=vgg16 --output_dir=results/cifar10_vgg16
  python -m experiments.training_trajectories --merge a/results.json b/results.json
    --output_dir=results/merged

On two CPU cores the demo takes a minute, digits 3 minutes, and with the networks already trained MNIST 42
minutes and VGG-16 6. --preset=paper is the recipe of the paper, for an accelerator.

Expected on digits: without a permutation a test error barrier of 79 % at the end; under P_end 0.4 % at the
end and at most 3 % at any epoch; P_1 leaves 28 % (weights) and 8 % (activations) at the end. All ten claims
hold.

Writes results.json, barriers.csv, training_trajectories.png (figures 1, 4, 8), fixed_permutations.png (7,
8, 10) and permutations.png (distances and fixed points). The time goes into sweeps: at most one for each
method, epoch s of --match_epochs and epoch t of --record_epochs, and two more for each method and t. A
finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from absl import app, flags

from experiments import training_trajectories_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Config, Experiment
from experiments.harness.methods import PAPER_METHODS, check_methods
from experiments.harness.networks import Pair
from experiments.harness.presets import Thresholds
from experiments.harness.record import (
    EpochRecord,
    Metrics,
    TrajectoryRecord,
    check_names,
    summarise,
)
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval, ratio
from experiments.training_trajectories_measure import TrajectoryMeasure

__all__ = ["EXPERIMENT", "TrajectoryConfig", "early_epochs", "judge", "main", "select"]

options.define_flags(__name__, methods=True, strict=True, time_limit=True, merge=True)
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

    def is_complete(self, record: TrajectoryRecord[float]) -> bool:
        """Say whether a record has all epochs, and at each of them all permutations."""
        return super().is_complete(record) and all(
            list(own.under) == list(self.match_epochs)
            for epoch in record.epochs
            for own in epoch.methods.values()
        )

    def misfits(self, record: TrajectoryRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods and match epochs."""
        problems = super().misfits(record, pair)
        for epoch in record.epochs:
            problems += check_names(f"epochs.{epoch.epoch}.methods", epoch.methods, self.methods)
            for name, aligned in epoch.methods.items():
                where = f"epochs.{epoch.epoch}.methods.{name}.under"
                if self.recipe.epochs not in aligned.under or not set(aligned.under) <= set(
                    self.match_epochs
                ):
                    wanted = f"some of {list(self.match_epochs)} with the last"
                    problems.append(f"{where}: wanted {wanted}, got {list(aligned.under)}")
        return problems


def select(
    config: TrajectoryConfig, records: Sequence[TrajectoryRecord[float]]
) -> tuple[TrajectoryConfig | None, list[TrajectoryRecord[float]], list[str]]:
    """Return what all pairs of an unfinished run have in common, and say what is missing.

    Pairs that are complete stand alone if there are any. Else it is the epochs whose essentials are measured
    of all pairs that were begun, and the permutations that are measured of all of them.

    Args:
      config: the config of the run.
      records: the records so far.

    Returns:
      A config of those pairs and epochs, `None` if there is nothing; their records; and one line for each
      thing that is missing.
    """
    missing = [f"{pair}: not begun" for pair in config.pairs[len(records) :]]
    complete = [record for record in records if config.is_complete(record)]
    for record in records:
        missing += _describe_missing(config, record, left_out=bool(complete))
    chosen = complete or [record for record in records if record.epochs]
    shared = set(config.epochs).intersection(*(record.part_keys for record in chosen))
    if not chosen or config.epochs[-1] not in shared:
        return None, [], missing
    epochs = tuple(t for t in config.epochs if t in shared)
    smaller = dataclasses.replace(
        config,
        replicates=len(chosen),
        epochs=epochs,
        match_epochs=tuple(s for s in config.match_epochs if s in epochs),
    )
    return smaller, [_in_common(record, chosen, epochs) for record in chosen], missing


def _describe_missing(
    config: TrajectoryConfig, record: TrajectoryRecord[float], *, left_out: bool
) -> list[str]:
    """Say what is missing of a pair."""
    if config.is_complete(record):
        return []
    pair, found = Pair(config.recipe, (record.seeds[0], record.seeds[1])), record.part_keys
    lacking = [str(t) for t in config.epochs if t not in found]
    lines = [f"{pair}: epochs {', '.join(lacking)}"] if lacking else []
    wanted = len(config.epochs) * len(config.match_epochs)
    own = [min((list(own.under) for own in part.methods.values()), key=len) for part in record.epochs]
    lines.append(f"{pair}: {wanted - sum(map(len, own))} of {wanted} permutations of an epoch at an epoch")
    return [f"{line}; the pair is left out" * left_out or line for line in lines]


def _in_common(
    record: TrajectoryRecord[float], others: Sequence[TrajectoryRecord[float]], epochs: Sequence[int]
) -> TrajectoryRecord[float]:
    """Return those epochs of a record, and of each method the permutations, that all others have too."""
    parts = [{part.epoch: part for part in other.epochs} for other in others]
    chosen = []
    for part in (part for part in record.epochs if part.epoch in epochs):
        methods = {}
        for name, own in part.methods.items():
            shared = set(own.under).intersection(*(p[part.epoch].methods[name].under for p in parts))
            methods[name] = dataclasses.replace(
                own, under={s: own.under[s] for s in own.under if s in shared}
            )
        chosen.append(dataclasses.replace(part, methods=methods))
    return dataclasses.replace(record, epochs=tuple(chosen))


def early_epochs(epochs: Sequence[int]) -> list[int]:
    """Return the indices in `epochs` at which training is early.

    Early is from epoch 1 to a tenth of the last epoch, and at least the first recorded epoch from 1 on, but
    never the last.

    Examples:
      >>> early_epochs([0, 1, 2, 3, 5, 30]), early_epochs([0, 2, 4]), early_epochs([0, 4])
      ([1, 2, 3], [1], [])
    """
    trained = [i for i, epoch in enumerate(epochs[:-1]) if epoch >= 1]
    return [i for i in trained if 10 * epochs[i] <= epochs[-1]] or trained[:1]


def judge(config: TrajectoryConfig, records: Sequence[TrajectoryRecord[float]]) -> list[Claim]:
    """Judge all claims, which are about test error barriers, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.

    Returns:
      One claim for the networks without a permutation, those of each method, and, where both are there, one
      that compares weight with activation matching. Without early epochs there are no claims about them.
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
    if not early_epochs(config.epochs):
        return claims
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
    claims = [
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
    ]
    if not early:
        return claims
    return [
        *claims,
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
    build_measure=TrajectoryMeasure,
    summarise=lambda config, records: summarise(records),
    judge=judge,
    select=select,
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
