"""Is one permutation for each network enough? Networks aligned with a third one, directly, and all together.

Reproduces section 5.3 and appendix G of arXiv 2404.06498 (figures 3, 14). Networks A, B and C are trained
from different seeds at each of --widths. Barriers are measured between A and B

- unaligned, and unaligned with a softmax temperature fitted on training data at every alpha (Ito et al. 2025,
  arXiv 2510.08023), which changes losses alone;
- direct: B aligned with A;
- indirect: A and B each aligned with C, and of both to C;
- joint: all three aligned together by the algorithms of --joint.

The run prints tables, the width from which on each of these connects A and B, and the paper's claims with a
verdict each.

  python -m experiments.strong_connectivity --preset=digits --num_alphas=13
    --output_dir=results/digits_mlp_strong
  python -m experiments.strong_connectivity --preset=cpu --model=mlp --replicates=3 --num_alphas=13
    --num_eval=2000 --output_dir=results/mnist_mlp_strong
  python -m experiments.strong_connectivity --preset=cpu --model=vgg16 --widths=2,4,8 --replicates=3
    --num_alphas=11 --num_eval=500 --output_dir=results/cifar10_vgg16_strong

Writes results.json, barriers.csv, strong_connectivity.png (figures 3 and 14), joint_alignment.png and
widths.png. Three networks of every width and replicate are trained, and measured before the next are. A
killed run goes on with --resume. A finished run of the same options is only drawn anew.
"""

import dataclasses
import math
import time
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
from absl import app

from experiments import strong_connectivity_figures as figures
from experiments.harness import options
from experiments.harness.connectivity import (
    ConnectivityConfig,
    JointTriplet,
    MatchedTriplet,
    TripletRecord,
    TripletSummary,
    align_jointly,
)
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.methods import Matcher, build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints
from experiments.harness.record import FixedPoints, Metrics, check_names, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import mean_onset, ratio
from rebasin.permutation import Permutation, compiled_permute, compose, fixed_points, invert
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "StrongConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
options.define_connectivity_flags(__name__)

# The goal of the algorithms that align all networks together: at a width at which alignment with a reference
# has a barrier above _FAR times that of direct alignment, at most _NEAR times that.
_FAR, _NEAR = 2.0, 1.2


@dataclasses.dataclass(frozen=True, kw_only=True)
class StrongConfig(ConnectivityConfig):
    """Everything that the results depend on; written into ``results.json``."""

    unit = "triplet"

    @property
    def networks_each(self) -> int:
        """Networks A, B and C."""
        return 3

    def misfits(self, record: TripletRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods."""
        return [*super().misfits(record, pair), *check_names("methods", record.methods, self.methods)]


def _build_measure(setup: Setup[StrongConfig]) -> Measure[TripletRecord[float]]:
    config = setup.config
    meter = PathMeter(
        setup.metrics_fn,
        setup.dataset,
        num_alphas=config.num_alphas,
        num_eval=config.num_eval,
        apply_fn=setup.apply_fn,
    )
    matchers = build_matchers(setup, config.methods)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: TripletRecord[float] | None
    ) -> Iterator[TripletRecord[float]]:
        triplet = _Triplet(pair, trained, setup, meter)
        record = begun
        missing = [name for name in config.joint if begun is None or name not in begun.joint]
        title = f"alignments, width {pair.recipe.width}, {pair}"
        with setup.reporter.stage(title, len(missing) + (begun is None)) as advance:
            if record is None:
                record = triplet.measure_methods(matchers)
                advance()
                yield record
            for name in missing:
                joint = {**record.joint, name: triplet.measure_joint(name)}
                record = dataclasses.replace(record, joint=joint)
                advance()
                yield record

    return measure


class _Triplet:
    """Networks A, B and C, and what alignment makes of them.

    Args:
      pair: the three networks.
      trained: trajectory of each.
      setup: what the experiment measures with.
      meter: measures paths.
    """

    def __init__(
        self, pair: Pair, trained: Sequence[Trajectory], setup: Setup[StrongConfig], meter: PathMeter
    ) -> None:
        self._pair, self._setup, self._meter = pair, setup, meter
        self._trees = [trajectory.last for trajectory in trained]
        with setup.seconds.count("barriers"):
            a, b, _ = self._trees
            self._unaligned, self._tempered = meter.tempered(a, b)
            self._paths = Paths(meter, setup.spec, a, b, self._unaligned)

    def measure_methods(self, matchers: Mapping[str, Matcher]) -> TripletRecord[float]:
        """Measure the networks as they are, and under the permutations of each method."""
        ends = endpoints(self._unaligned)
        return TripletRecord(
            seeds=self._pair.seeds,
            width=self._pair.recipe.width,
            networks=(ends.a, ends.b),
            unaligned=barriers(self._unaligned),
            tempered=barriers(self._tempered),
            methods={name: self._measure_method(match) for name, match in matchers.items()},
            joint={},
        )

    def _measure_method(self, match: Matcher) -> MatchedTriplet[float]:
        (a, b, c), key, spec = self._trees, self._pair.key, self._setup.spec
        with self._setup.seconds.count("matching"):
            direct = match(a, b, key=key).permutation
            to_c = [match(c, tree, key=key).permutation for tree in (a, b)]
        # In the order of A's units, so that it can be compared with the direct one. The barrier is that of
        # both networks in C's order, as strong connectivity implies weak connectivity.
        indirect = compose(spec, to_c[1], invert(spec, to_c[0]))
        with self._setup.seconds.count("barriers"):
            found = fixed_points(direct, indirect)
            return MatchedTriplet(
                direct=self._paths.barriers(direct),
                indirect=self._paths.barriers(indirect),
                to_reference=self._to_reference(to_c),
                fixed_points=FixedPoints(found.total, found.fractions),
                chance=_chance(direct),
            )

    def measure_joint(self, name: str) -> JointTriplet[float]:
        """Measure the networks when one algorithm has aligned all of them together."""
        began = time.perf_counter()
        with self._setup.seconds.count("matching"):
            found = align_jointly(self._setup, name, self._trees, self._pair.key)
        seconds = time.perf_counter() - began
        spec = self._setup.spec
        with self._setup.seconds.count("barriers"):
            return JointTriplet(
                between=self._paths.barriers(found.pairwise(spec, 0, 1)),
                to_reference=self._to_reference([found.pairwise(spec, 2, i) for i in (0, 1)]),
                seconds=seconds,
            )

    def _to_reference(self, permutations: Sequence[Permutation]) -> tuple[Metrics[float], ...]:
        """Measure the paths between C and A, and between C and B, under permutations of A and B."""
        *networks, c = self._trees
        moved = [
            compiled_permute(self._setup.spec, p, t) for p, t in zip(permutations, networks, strict=True)
        ]
        return tuple(barriers(self._meter(c, tree)) for tree in moved)


def _chance(permutation: Permutation) -> float:
    """Return the fraction of units that two permutations drawn at random agree on: one for each array."""
    rows = [np.asarray(row) for row in permutation.values()]
    return sum(row.size // row.shape[-1] for row in rows) / sum(row.size for row in rows)


def _summarise(config: StrongConfig, records: Sequence[TripletRecord[float]]) -> TripletSummary:
    """Return mean and spread at each width, and the width from which on each comparison is connected."""
    widths = tuple(summarise([r for r in records if r.width == width]) for width in config.widths)
    onsets = {
        metric: {
            name: mean_onset(config.widths, _series(config, records, name, metric).tolist(), threshold)
            for name in figures.comparisons(config)
        }
        for metric, threshold in config.thresholds.items()
    }
    return TripletSummary(widths, onsets)


def _series(
    config: StrongConfig, records: Sequence[TripletRecord[float]], name: str, metric: str
) -> np.ndarray:
    """Return the barriers of one comparison between A and B, ``[replicates, widths]``."""
    by_width = [
        [getattr(figures.between(record, name), metric) for record in records if record.width == width]
        for width in config.widths
    ]
    return np.array(by_width).T


def _slopes(config: StrongConfig, series: np.ndarray) -> np.ndarray:
    """Return what each replicate's series gains when the width doubles, by least squares."""
    if len(config.widths) < 2:
        return np.zeros(len(series))
    return np.polyfit(np.log2(config.widths), series.T, 1)[0]


def judge(config: StrongConfig, records: Sequence[TripletRecord[float]]) -> list[Claim]:
    """Judge the claims of section 5.3 and appendix G, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate and width.
    """
    claims = [found for method in config.methods for found in _judge_method(config, records, method)]
    if config.joint:
        claims.append(_judge_joint(config, records))
    tempered = _series(config, records, "tempered", "test_loss")[:, -1]
    claims.append(
        claim(
            "temperature_connects_unaligned_networks",
            f"without a permutation, but with a fitted temperature, the test loss barrier at width "
            f"{config.widths[-1]} is at most {config.loss_at_most:g} nats",
            "not in the paper; wide networks are connected without permutations (arXiv 2510.08023)",
            tempered,
            tempered.mean() <= config.loss_at_most,
        )
    )
    return claims


def _judge_method(config: StrongConfig, records: Sequence[TripletRecord[float]], method: str) -> list[Claim]:
    direct, indirect = (
        _series(config, records, f"{name} {method}", "test_loss") for name in ("direct", "indirect")
    )
    shared = np.array(
        [
            [r.methods[method].fixed_points.total for r in records if r.width == width]
            for width in config.widths
        ]
    ).T
    fewer = claim(
        f"no_more_fixed_points_{method}",
        f"{method}: direct and indirect permutations do not share a larger fraction of fixed points as the "
        "width grows: the change for each doubling of the width is not above 0 with its 95 % interval",
        "increasing width does not make the permutations more similar (appendix G, figure 14 row 5)",
        _slopes(config, shared),
    )
    return [
        claim(
            f"indirect_barrier_falls_{method}",
            f"{method}: the test loss barrier of indirect alignment falls with width: its change for each "
            "doubling of the width is below 0, and so is the 95 % interval",
            "the loss barrier of indirect alignment decreases as width increases (section 5.3, figure 3)",
            _slopes(config, indirect),
            below=True,
        ),
        claim(
            f"indirect_above_direct_{method}",
            f"{method}: averaged over widths, the test loss barrier of indirect alignment is above that of "
            "direct alignment: the 95 % interval of the difference is above 0",
            "much higher barriers than by aligning A and B directly (section 5.3, figure 3)",
            (indirect - direct).mean(axis=1),
        ),
        dataclasses.replace(fewer, holds=not fewer.holds),
    ]


def _judge_joint(config: StrongConfig, records: Sequence[TripletRecord[float]]) -> Claim:
    """Judge how near the joint algorithms come to direct alignment where a reference does not."""
    method = config.methods[0]

    def mean(name: str) -> np.ndarray:
        return _series(config, records, name, "test_loss").mean(axis=0)

    direct, indirect = mean(f"direct {method}"), mean(f"indirect {method}")
    joint = ratio(np.min([mean(name) for name in config.joint], axis=0), direct)
    reference = ratio(indirect, direct)
    # Where the reference connects A and B, a ratio of two numbers near 0 says nothing.
    far = np.flatnonzero((reference > _FAR) & (indirect > config.loss_at_most))
    at = int(far[joint[far].argmin()]) if far.size else None
    where = (
        f" (best at width {config.widths[at]}: {reference[at]:.2f} by the reference)"
        if at is not None
        else ""
    )
    return Claim(
        "joint_alignment_reaches_direct",
        f"{method}: at some width at which indirect alignment has more than {_FAR:g} times the test loss "
        f"barrier of direct alignment, and does not connect A and B, the best of {', '.join(config.joint)} "
        f"has at most {_NEAR:g} times that{where}",
        paper="indirect alignment may fail for want of a better algorithm (section 5.3)",
        measured=float(joint[at]) if at is not None else math.nan,
        low=math.nan,
        high=math.nan,
        holds=at is not None and bool(joint[at] <= _NEAR),
    )


EXPERIMENT = Experiment(
    schema=Schema("strong_connectivity", StrongConfig, TripletRecord[float], TripletSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={
        "strong_connectivity.png": figures.draw_strong,
        "joint_alignment.png": figures.draw_joint,
        "widths.png": figures.draw_onsets,
    },
    report=figures.report,
    keep="measured",
)


def build_config() -> StrongConfig:
    """Build the config that the flags describe."""
    return StrongConfig(**options.chosen_connectivity(options.choose()))


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
