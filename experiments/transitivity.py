"""Definitions of connectivity modulo permutation on several networks at once, and whether it is transitive.

Measures the definitions of section 4 and appendices B and C of arXiv 2404.06498 on --num_networks networks of
each of --widths, which are trained from different seeds. A definition says which networks share a
permutation, and has one matrix of barriers:

- unaligned, and tempered: unaligned with a softmax temperature fitted at every alpha (arXiv 2510.08023);
- weak (definition 4.1): every pair has a permutation of its own;
- simultaneous (4.3): that permutation, at several epochs of training; the highest barrier counts;
- reference, and the algorithms of --joint (strong, 4.2): every network has one permutation for all pairs;
- entezari (B.1): every network has one permutation for all others as they are.

From the matrices follow the fraction of triplets with A ~ B and B ~ C and not A ~ C (appendix C), and the
sets of networks that are connected weakly and strongly. The average of the first 1, 2, … networks and the
simplex of the first three are measured under every strong definition.

  python -m experiments.transitivity --preset=digits --widths=16,32,64,128,256 --num_alphas=13
    --output_dir=results/digits_mlp_transitivity

Writes results.json, barriers.csv, transitivity.png and simplex.png. A run is stored definition by definition;
a killed one goes on with --resume. A finished run of the same options is only drawn anew.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

import rebasin
from experiments import transitivity_figures as figures
from experiments.harness import options
from experiments.harness.connectivity import (
    ConnectivityConfig,
    DefinitionRecord,
    NetworksRecord,
    NetworksSummary,
    Simplex,
    TransitivityShare,
    align_jointly,
)
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.methods import Matcher, build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, endpoints
from experiments.harness.record import METRICS, Metrics, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import student_interval
from rebasin.connectivity import (
    align_to_all,
    entezari_barriers,
    simultaneous_barriers,
    strong_barriers,
    strong_transitivity,
    transitivity,
    weak_barriers,
)
from rebasin.matching.many import cycle_error
from rebasin.permutation import Permutation, compiled_permute, identity_permutation
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "TransitivityConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
options.define_connectivity_flags(__name__)
_NETWORKS = flags.DEFINE_integer(
    "num_networks", 4, "Networks of each replicate that are compared with each other.", lower_bound=3
)

# Fraction of the chains A ~ B ~ C that may be broken where connectivity counts as transitive.
_BROKEN_AT_MOST = 0.05

# Steps along an edge of the simplex.
_RESOLUTION = 8


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransitivityConfig(ConnectivityConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      num_networks: number of networks k of each replicate.
    """

    unit = "set"

    num_networks: int

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the field that is added here."""
        problems = super().problems()
        if self.num_networks < 3:
            problems.append(f"num_networks: wanted at least 3, got {self.num_networks}")
        return problems

    @property
    def networks_each(self) -> int:
        """The `num_networks`."""
        return self.num_networks

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """Four epochs at which simultaneous connectivity is measured, the last one among them."""
        last = self.recipe.epochs
        return tuple(sorted({max(1, round(last * share)) for share in (0.1, 0.3, 0.6, 1)}))

    @property
    def wanted_parts(self) -> tuple[str, ...]:
        """The definitions."""
        matched = [
            f"{name} {method}" for method in self.methods for name in ("weak", "simultaneous", "reference")
        ]
        return ("unaligned", "tempered", *matched, *self.joint, "entezari")


def _build_measure(setup: Setup[TransitivityConfig]) -> Measure[NetworksRecord[float]]:
    config = setup.config
    meter = PathMeter(
        setup.metrics_fn,
        setup.dataset,
        num_alphas=config.num_alphas,
        num_eval=config.num_eval,
        apply_fn=setup.apply_fn,
    )
    matchers = build_matchers(setup, config.methods)
    # Averages are measured two at once, as the two ends of a path without points between them.
    ends = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=2, num_eval=config.num_eval)
    simplex_sweep = rebasin.build_simplex_sweep(setup.metrics_fn, resolution=_RESOLUTION)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: NetworksRecord[float] | None
    ) -> Iterator[NetworksRecord[float]]:
        record = begun or NetworksRecord(pair.seeds, pair.recipe.width, {})
        networks = _NetworkSet(pair, trained, setup, meter, ends, matchers, simplex_sweep)
        missing = [name for name in config.wanted_parts if name not in record.definitions]
        with setup.reporter.stage(f"definitions, width {pair.recipe.width}, {pair}", len(missing)) as advance:
            for name in missing:
                definitions = {**record.definitions, name: networks.measure(name)}
                record = dataclasses.replace(record, definitions=definitions)
                advance()
                yield record

    return measure


class _NetworkSet:
    """Several networks, and what each definition makes of them.

    Args:
      pair: the networks.
      trained: trajectory of each.
      setup: what the experiment measures with.
      meter: measures paths.
      ends: measures the ends of a path alone.
      matchers: function of each matching method.
      simplex_sweep: measures averages of three networks.
    """

    def __init__(
        self,
        pair: Pair,
        trained: Sequence[Trajectory],
        setup: Setup[TransitivityConfig],
        meter: PathMeter,
        ends: PathMeter,
        matchers: Mapping[str, Matcher],
        simplex_sweep: Callable[..., Any],
    ) -> None:
        self._key, self._trained, self._setup, self._meter = pair.key, trained, setup, meter
        self._ends, self._matchers, self._simplex_sweep = ends, matchers, simplex_sweep
        self._trees = jax.device_put([trajectory.last for trajectory in trained])
        self._pairwise: dict[str, dict[tuple[int, int], Permutation]] = {}

    def measure(self, name: str) -> DefinitionRecord[float]:
        """Measure one definition."""
        what, _, method = name.partition(" ")
        spec, trees, meter = self._setup.spec, self._trees, self._meter
        if what in ("weak", "simultaneous"):
            return self._measure_pairs(method, simultaneous=what == "simultaneous")
        if what == "entezari":
            with self._setup.seconds.count("matching"):
                found = align_to_all(spec, trees, key=self._key)
            with self._setup.seconds.count("barriers"):
                return DefinitionRecord(_cells(entezari_barriers(spec, trees, found, meter), ordered=True))
        with self._setup.seconds.count("matching"):
            permutations = self._strong_permutations(what, method)
        with self._setup.seconds.count("barriers"):
            path = (lambda a, b: meter.tempered(a, b)[1]) if what == "tempered" else meter
            cells = _cells(strong_barriers(spec, trees, permutations, path))
            if what == "tempered":
                return DefinitionRecord(cells)
            moved = [compiled_permute(spec, p, tree) for p, tree in zip(permutations, trees, strict=True)]
            return DefinitionRecord(cells, None, self._averages(moved), self._simplex(moved))

    def _strong_permutations(self, what: str, method: str) -> Sequence[Permutation]:
        """Return one permutation for each network."""
        first, *rest = self._trees
        identity = identity_permutation(self._setup.spec, first)
        if what == "reference":
            match = self._matchers[method]
            return [identity, *(match(first, tree, key=self._key).permutation for tree in rest)]
        if what in ("unaligned", "tempered"):
            return [identity for _ in self._trees]
        return align_jointly(self._setup, what, self._trees, self._key).permutations

    def _measure_pairs(self, method: str, *, simultaneous: bool) -> DefinitionRecord[float]:
        """Measure the definitions under which every pair has a permutation of its own."""
        spec = self._setup.spec
        if method not in self._pairwise:
            with self._setup.seconds.count("matching"):
                match, trees = self._matchers[method], self._trees
                self._pairwise[method] = {
                    (i, j): match(trees[i], trees[j], key=self._key).permutation
                    for i, j in itertools.combinations(range(len(trees)), 2)
                }
        pairwise = self._pairwise[method]
        with self._setup.seconds.count("barriers"):
            if not simultaneous:
                cells = _cells(weak_barriers(spec, self._trees, pairwise, self._meter))
                return DefinitionRecord(cells, cycle_error(spec, pairwise))
            epochs = self._setup.config.wanted_epochs
            sequences = [[trajectory[t] for t in epochs] for trajectory in self._trained]
            found = simultaneous_barriers(spec, sequences, pairwise, self._meter)
            return DefinitionRecord(_cells({metric: x.max(axis=0) for metric, x in found.items()}))

    def _averages(self, moved: Sequence[Any]) -> tuple[Metrics[float], ...]:
        """Measure the averages of the first 1, 2, … networks."""
        merged = [rebasin.average(moved[: count + 1]) for count in range(len(moved))]
        pairs = [(merged[i], merged[min(i + 1, len(merged) - 1)]) for i in range(0, len(merged), 2)]
        ends = [endpoints(self._ends(a, b)) for a, b in pairs]
        return tuple(metrics for end in ends for metrics in (end.a, end.b))[: len(merged)]

    def _simplex(self, moved: Sequence[Any]) -> Simplex[float]:
        test = self._setup.dataset.test
        chosen = jax.tree.map(lambda x: x[: self._setup.config.num_eval], test)
        surface = self._simplex_sweep(moved[:3], jax.device_put(chosen))
        means = surface.means
        return Simplex(
            # As they are stored, so that the weights of two records are the same.
            tuple(tuple(round(float(w), 6) for w in point) for point in surface.weights),
            tuple(means["loss"].tolist()),
            tuple(means["error"].tolist()),
        )


def _cells(matrices: Mapping[str, np.ndarray], *, ordered: bool = False) -> tuple[Metrics[float], ...]:
    """Return the barriers of the pairs (i, j) with i < j, or of all (i, j)."""
    count = len(matrices["test_loss"])
    pairs = itertools.product(range(count), repeat=2) if ordered else itertools.combinations(range(count), 2)
    return tuple(Metrics(**{metric: float(matrices[metric][pair]) for metric in METRICS}) for pair in pairs)


def _matrix(config: TransitivityConfig, found: DefinitionRecord[float], metric: str) -> np.ndarray:
    """Return the symmetric matrix of barriers between pairs in one metric."""
    matrix = np.zeros((config.num_networks, config.num_networks))
    for (i, j), cell in zip(itertools.combinations(range(len(matrix)), 2), found.cells, strict=True):
        matrix[i, j] = matrix[j, i] = getattr(cell, metric)
    return matrix


def _summarise(config: TransitivityConfig, records: Sequence[NetworksRecord[float]]) -> NetworksSummary:
    """Return mean and spread at each width, and how often connectivity is not transitive."""
    by_width = [[r for r in records if r.width == width] for width in config.widths]
    shares = {
        metric: {
            name: tuple(_share(config, own, name, metric, threshold) for own in by_width)
            for name in figures.symmetric(config)
        }
        for metric, threshold in config.thresholds.items()
    }
    return NetworksSummary(tuple(map(summarise, by_width)), shares)


def _share(
    config: TransitivityConfig,
    records: Sequence[NetworksRecord[float]],
    name: str,
    metric: str,
    threshold: float,
) -> TransitivityShare:
    """Count over the replicates of one width what is transitive under one definition."""
    matrices = [_matrix(config, record.definitions[name], metric) for record in records]
    # A pair is connected weakly if there is a permutation, whatever method finds it.
    weak = [
        np.min([_matrix(config, r.definitions[f"weak {m}"], metric) for m in config.methods], axis=0)
        for r in records
    ]
    counts = [transitivity(matrix, threshold) for matrix in matrices]
    sets = [strong_transitivity(w, m, threshold) for w, m in zip(weak, matrices, strict=True)]
    sizes = range(2, config.num_networks + 1)
    return TransitivityShare(
        student_interval([count.broken / count.triplets for count in counts]),
        sum(count.chains for count in counts),
        sum(count.broken for count in counts),
        {size: sum(found[size][0] for found in sets) for size in sizes},
        {size: sum(found[size][1] for found in sets) for size in sizes},
    )


def judge(config: TransitivityConfig, records: Sequence[NetworksRecord[float]]) -> list[Claim]:
    """Judge what appendix C asks, at the largest width, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate and width.
    """
    widest = [record for record in records if record.width == config.widths[-1]]
    limit, width = config.connected_at_most, config.widths[-1]
    weak = f"weak {config.methods[0]}"
    counts = [transitivity(_matrix(config, r.definitions[weak], "test_error"), limit) for r in widest]
    chains = sum(count.chains for count in counts)
    # Of the replicates that have chains at all; those of one replicate share networks.
    fractions = np.array([c.broken / c.chains for c in counts if c.chains] or [math.nan])
    strong = config.joint or (f"reference {config.methods[0]}",)

    def highest(name: str) -> np.ndarray:
        """Return the highest barrier of each replicate."""
        cells = [record.definitions[name].cells for record in widest]
        return np.array([max(cell.test_error for cell in found) for found in cells])

    best = min(strong, key=lambda name: highest(name).mean())
    singles, merged = (
        np.array([record.definitions[best].averages[at].test_error for record in widest]) for at in (0, -1)
    )
    return [
        claim(
            "weak_connectivity_is_transitive",
            f"{config.methods[0]}: at width {width}, at most {_BROKEN_AT_MOST:.0%} of the triplets with A ~ "
            f"B and B ~ C (barriers of at most {limit:.1%} of test error) lack A ~ C "
            f"(of {chains}; mean over {config.unit}s)",
            "whether it is transitive is left open (appendix C)",
            fractions,
            bool(fractions.mean() <= _BROKEN_AT_MOST),
        ),
        claim(
            "all_networks_are_strongly_connected",
            f"at width {width}, {best} connects all {config.num_networks} networks with each other: the "
            f"highest test error barrier of all pairs is at most {limit:.1%} on average",
            "conjectured for networks of great width (section 5.3)",
            highest(best),
            highest(best).mean() <= limit,
        ),
        claim(
            "average_is_as_good_as_one",
            f"at width {width}, the average of all networks under {best} has a test error of at most "
            f"{limit:.1%} above that of one network",
            "merging needs one permutation for all pairs (section 4)",
            merged - singles,
            (merged - singles).mean() <= limit,
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("transitivity", TransitivityConfig, NetworksRecord[float], NetworksSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={"transitivity.png": figures.draw_transitivity, "simplex.png": figures.draw_simplices},
    report=figures.report,
    keep="measured",
)


def build_config() -> TransitivityConfig:
    """Build the config that the flags describe."""
    fields = options.chosen_connectivity(options.choose())
    return TransitivityConfig(**fields, num_networks=_NETWORKS.value)


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
