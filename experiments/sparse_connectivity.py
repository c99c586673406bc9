"""The permutation of two dense networks aligns their lottery tickets, at every level of pruning.

Reproduces the first half of section 5.2 and appendix F of arXiv 2404.06498 (figures 2 left, 11, 12). Pairs of
networks A and B are trained from different seeds. Iterative magnitude pruning prunes a fifth of the remaining
weights of each, returns them to epoch --rewind_epoch and trains them again, --levels times. At every level i
barriers are measured between A⁽ⁱ⁾ and

- control: B⁽ⁱ⁾ as it is;
- gold standard: P[B⁽ⁱ⁾], where P is the permutation from the dense networks;
- sparse: P⁽ⁱ⁾[B⁽ⁱ⁾], where P⁽ⁱ⁾ is found on the sparse networks themselves;
- transported: P[B] with the mask of A⁽ⁱ⁾, not trained again;
- previous work: P⁽ⁱ⁾[B] with the mask of A⁽ⁱ⁾, not trained again;
- baseline: B pruned in one shot.

The run prints a table and the paper's claims with a verdict each.

  python -m experiments.sparse_connectivity --preset=digits --output_dir=results/digits_mlp_sparse
  python -m experiments.sparse_connectivity --preset=cpu --model=mlp --replicates=3 --levels=12
    --output_dir=results/mnist_mlp_sparse

Writes results.json, barriers.csv, sparse_connectivity.png (figures 2 left, 11) and interpolated_sparsity.png
(figure 12). Training dominates: two networks for each replicate and level. Results are stored level by level,
and so are the pruned networks. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app

from experiments import sparse_connectivity_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.methods import PAPER_METHODS, Matcher, build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints
from experiments.harness.presets import Thresholds
from experiments.harness.pruning import (
    MaskedPath,
    PruningConfig,
    SparseAligned,
    SparseLevel,
    SparseRecord,
)
from experiments.harness.record import added, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval
from rebasin.masks import apply_mask, join_masks, sparsity_report
from rebasin.permutation import Permutation, compiled_permute
from rebasin.pruning import level_sparsity, magnitude_mask, prunable_leaves
from rebasin.training.imp import Level
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "SparseConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
options.define_pruning_flags(__name__)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SparseConfig(PruningConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      thresholds: barriers against which claims are judged.
    """

    thresholds: Thresholds


def _build_measure(setup: Setup[SparseConfig]) -> Measure[SparseRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: SparseRecord[float] | None
    ) -> Iterator[SparseRecord[float]]:
        record = begun or SparseRecord(pair.seeds)
        known = record.part_keys
        tickets = _Tickets(trained, setup, meter, matchers)
        with setup.reporter.stage(f"levels of {pair}", 2 * config.levels) as advance:
            for a, b in tickets.levels(advance):
                if a.level not in known:
                    record = added(record, tickets.measure_level(a, b))
                    yield record

    return measure


class _Tickets:
    """Two dense networks and what pruning makes of them.

    Args:
      trained: trajectories of both dense networks.
      setup: what the experiment measures with.
      meter: measures paths.
      matchers: function of each matching method.
    """

    def __init__(
        self,
        trained: Sequence[Trajectory],
        setup: Setup[SparseConfig],
        meter: PathMeter,
        matchers: Mapping[str, Matcher],
    ) -> None:
        self._trained, self._setup, self._meter, self._matchers = trained, setup, meter, matchers
        params_a, self._dense_b = (trajectory.last for trajectory in trained)
        self._leaves = prunable_leaves(params_a)
        self._dense = self._match(params_a, self._dense_b)

    def _match(self, params_a: Any, params_b: Any) -> dict[str, Permutation]:
        with self._setup.seconds.count("matching"):
            return {name: match(params_a, params_b).permutation for name, match in self._matchers.items()}

    def levels(self, advance: Callable[[], None]) -> Iterator[tuple[Level, Level]]:
        """Yield every level of A and of B; `advance` is called for each sparse network."""
        config = self._setup.config
        both = (
            self._setup.networks.levels(
                trajectory,
                config.levels,
                rewind_epoch=config.rewind_epoch,
                rewind=config.rewind_kind,
                advance=advance,
            )
            for trajectory in self._trained
        )
        yield from zip(*both, strict=True)

    def measure_level(self, a: Level, b: Level) -> SparseLevel[float]:
        """Measure the networks of one level."""
        params_a, params_b = a.trajectory.last, b.trajectory.last
        sparse = self._match(params_a, params_b) if a.level else self._dense
        with self._setup.seconds.count("barriers"):
            paths = Paths(self._meter, self._setup.spec, params_a, params_b)
            one_shot = magnitude_mask(self._dense_b, level_sparsity(a.level))
            return SparseLevel(
                level=a.level,
                density=self._density(a.mask),
                endpoints=endpoints(paths.unaligned),
                control=barriers(paths.unaligned),
                baseline=self._to_masked(params_a, self._dense_b, one_shot),
                between_control=self._density(join_masks(a.mask, b.mask)),
                methods={
                    name: self._measure_method(
                        params_a, a.mask, b.mask, paths, self._dense[name], sparse[name]
                    )
                    for name in self._matchers
                },
            )

    def _measure_method(
        self,
        params_a: Any,
        mask_a: Any,
        mask_b: Any,
        paths: Paths,
        dense: Permutation,
        sparse: Permutation,
    ) -> SparseAligned[float]:
        """Measure what the permutations of one method, of dense and of sparse networks, make of a level."""

        def moved(permutation: Permutation, tree: Any) -> Any:
            return compiled_permute(self._setup.spec, permutation, tree)

        def between(permutation: Permutation) -> float:
            return self._density(join_masks(mask_a, moved(permutation, mask_b)))

        return SparseAligned(
            gold_standard=barriers(paths.curve(dense)),
            sparse=barriers(paths.curve(sparse)),
            transported=self._to_masked(params_a, moved(dense, self._dense_b), mask_a),
            previous_work=self._to_masked(params_a, moved(sparse, self._dense_b), mask_a),
            between_gold_standard=between(dense),
            between_sparse=between(sparse),
        )

    def _to_masked(self, params_a: Any, params_b: Any, mask: Any) -> MaskedPath[float]:
        """Measure the path between a network and another one that a mask prunes."""
        curve = self._meter(params_a, apply_mask(mask, params_b))
        return MaskedPath(barriers(curve), endpoints(curve).b)

    def _density(self, mask: Any) -> float:
        return sparsity_report(mask, self._leaves).total.density


def judge(config: SparseConfig, records: Sequence[SparseRecord[float]]) -> list[Claim]:
    """Judge the claims of section 5.2 about barriers, on test errors, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.
    """
    return [found for method in config.methods for found in _judge_method(config, records, method)]


def _judge_method(config: SparseConfig, records: Sequence[SparseRecord[float]], method: str) -> list[Claim]:
    limit = config.thresholds.any_epoch_at_most
    control, gold, sparse = (
        np.array([[pick(level).test_error for level in record.levels] for record in records])
        for pick in (
            lambda level: level.control,
            lambda level: level.methods[method].gold_standard,
            lambda level: level.methods[method].sparse,
        )
    )
    # The worst level of the mean, rather than the mean of each replicate's worst, which chance would raise.
    worst, high = int(gold.mean(axis=0).argmax()), (config.levels + 1) // 2
    when = f"averaged over levels {high} to {config.levels}"
    return [
        claim(
            f"dense_permutation_aligns_every_level_{method}",
            f"{method}: under the dense permutation the test error barrier is at most {limit:.0%} at every "
            f"level (highest at level {worst})",
            "essentially linearly connected at every level (section 5.2, figures 2 left, 11)",
            gold[:, worst],
            gold[:, worst].mean() <= limit,
        ),
        claim(
            f"dense_beats_sparse_permutation_{method}",
            f"{method}: the barrier under the permutation from the sparse networks is higher than under that "
            f"from the dense ones: the 95 % interval of the difference, {when}, is above 0",
            "lower barriers than by matching the sparse networks (section 5.2, figure 2 left)",
            (sparse - gold)[:, high:].mean(axis=1),
        ),
        claim(
            f"dense_permutation_helps_sparse_networks_{method}",
            f"{method}: the barrier without a permutation is higher than under that from the dense networks: "
            f"the 95 % interval of the difference, {when}, is above 0",
            "the control has high barriers at every level (appendix F, figure 11)",
            (control - gold)[:, high:].mean(axis=1),
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("sparse_connectivity", SparseConfig, SparseRecord[float], SparseRecord[Interval]),
    build_measure=_build_measure,
    summarise=lambda config, records: summarise(records),
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={
        "sparse_connectivity.png": figures.draw_levels,
        "interpolated_sparsity.png": figures.draw_between,
    },
    report=figures.report,
)


def build_config() -> SparseConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    return SparseConfig(
        **choice.fields,
        methods=options.chosen_methods(PAPER_METHODS),
        **options.chosen_pruning(),
        num_eval=choice.num_eval,
        thresholds=choice.preset.thresholds,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
