"""A permutation carries the lottery tickets of one network to another.

Reproduces the second half of section 5.2 and appendix F of arXiv 2404.06498 (figures 2 right, 13). Pairs of
networks A and B are trained from different seeds, and iterative magnitude pruning finds masks of both, level
by level. At every level i network B is rewound to epoch --rewind_epoch, pruned and trained again with

- gold standard: its own mask;
- transported: the mask of A⁽ⁱ⁾ on P[B], where P is the permutation from the dense networks;
- previous work: the mask of A⁽ⁱ⁾ on P⁽ⁱ⁾[B], where P⁽ⁱ⁾ is found on the sparse networks of the level;
- baseline: a mask of one-shot pruning;
- control: the mask of A⁽ⁱ⁾ as it is;
- random: the mask of A⁽ⁱ⁾ with its entries shuffled within every leaf.

With --rewind=learning_rate the weights stay as they are at the end, and only the learning rate is rewound.
The run prints a table of test errors and the paper's claims with a verdict each. A network is matching while
its test error exceeds that of the dense networks by at most --matching_margin.

  python -m experiments.mask_transport --preset=digits --levels=22 --matching_margin=0.02
    --output_dir=results/digits_mlp_transport
  python -m experiments.mask_transport --preset=digits --rewind=learning_rate
    --output_dir=results/digits_mlp_transport_rate

Digits need more levels than the default before masks differ, and have so few test images that a margin of
half a point is crossed by chance; docs/fidelity.md has a trial. The default of 15 levels takes 160 s of a
processor's time.

Writes results.json, accuracies.csv and mask_transport.png (figures 2 right, 13). Training dominates: two
networks for each replicate and level, then three and two for each method. Results are stored level by level,
and so are the networks. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

from experiments import mask_transport_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.methods import PAPER_METHODS, build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, endpoints
from experiments.harness.pruning import PruningConfig, TransportedMask, TransportLevel, TransportRecord
from experiments.harness.record import Metrics, added, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval
from rebasin.masks import shuffle_mask, sparsity_report
from rebasin.permutation import Permutation, compiled_permute
from rebasin.pruning import level_sparsity, magnitude_mask, prunable_leaves
from rebasin.training.imp import Level
from rebasin.training.loop import InitialState
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "TransportConfig", "judge", "last_matching", "main"]

options.define_flags(__name__, methods=True, strict=True, merge=True)
options.define_pruning_flags(__name__)
_MARGIN = flags.DEFINE_float(
    "matching_margin",
    0.005,
    "Test error, a fraction, by which a pruned network may exceed the dense ones and is matching.",
    lower_bound=0,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportConfig(PruningConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      matching_margin: test error, a fraction, by which a pruned network may exceed the dense ones and is
        matching.
    """

    matching_margin: float

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the field that is added here."""
        problems = super().problems()
        if not 0 <= self.matching_margin < 1:
            problems.append(f"matching_margin: wanted a fraction, got {self.matching_margin}")
        return problems

    @property
    def num_masks(self) -> int:
        """Number of masks at each level with which B is trained beside its own."""
        return 3 + 2 * len(self.methods)

    @property
    def further_networks(self) -> int:
        """The sparse networks of both parents, and B with each mask."""
        return self.levels * (2 + self.num_masks)


def _build_measure(setup: Setup[TransportConfig]) -> Measure[TransportRecord[float]]:
    config = setup.config
    # Networks are measured alone: the path is that from the network to itself.
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=2, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def match(params_a: Any, params_b: Any, key: jax.Array) -> dict[str, Permutation]:
        with setup.seconds.count("matching"):
            return {name: find(params_a, params_b, key=key).permutation for name, find in matchers.items()}

    def evaluate(params: Any) -> Metrics[float]:
        with setup.seconds.count("evaluation"):
            return endpoints(meter(params, params)).a

    def measure(
        pair: Pair, trained: list[Trajectory], begun: TransportRecord[float] | None
    ) -> Iterator[TransportRecord[float]]:
        record = begun or TransportRecord(pair.seeds)
        masks = _Masks(trained[1], setup, evaluate)
        dense = match(trained[0].last, trained[1].last, pair.key)
        with setup.reporter.stage(f"networks of {pair}", config.further_networks) as advance:
            both = (
                setup.networks.levels(
                    trajectory,
                    config.levels,
                    rewind_epoch=config.rewind_epoch,
                    rewind=config.rewind_kind,
                    advance=advance,
                )
                for trajectory in trained
            )
            for a, b in zip(*both, strict=True):
                if a.level in record.part_keys:
                    for _ in range(config.num_masks if a.level else 0):
                        advance()
                    continue
                sparse = match(a.trajectory.last, b.trajectory.last, pair.key) if a.level else dense
                record = added(record, masks.measure_level(a, b, dense, sparse, advance))
                yield record

    return measure


class _Masks:
    """Network B under the masks of a level.

    Args:
      trained: trajectory of the dense network B.
      setup: what the experiment measures with.
      evaluate: returns the metrics of a network.
    """

    def __init__(
        self,
        trained: Trajectory,
        setup: Setup[TransportConfig],
        evaluate: Callable[[Any], Metrics[float]],
    ) -> None:
        config = setup.config
        self._trained, self._setup, self._evaluate = trained, setup, evaluate
        self._dense = trained.last
        self._leaves = prunable_leaves(self._dense)
        self._rewound = trained[config.rewind_epoch] if config.rewind == "weights" else self._dense
        self._kind = f"{config.rewind}_{config.rewind_epoch}"

    def measure_level(
        self,
        a: Level,
        b: Level,
        dense: dict[str, Permutation],
        sparse: dict[str, Permutation],
        advance: Callable[[], None],
    ) -> TransportLevel[float]:
        """Train B with every mask of a level and measure it.

        Args:
          a: level of network A.
          b: level of network B.
          dense: permutation of each method from the dense networks.
          sparse: permutation of each method from the sparse networks.
          advance: called for each network that is trained.
        """
        own = self._evaluate(b.trajectory.last)

        def trained_with(mask: Any, name: str, permutation: Permutation | None = None) -> Metrics[float]:
            if not a.level:  # nothing is pruned, and so nothing trained
                return own
            metrics = self._train(mask, f"{self._kind}_level_{a.level:02d}_{name}", permutation)
            advance()
            return metrics

        key = jax.random.fold_in(jax.random.key(self._trained.seed), a.level)
        return TransportLevel(
            level=a.level,
            density=sparsity_report(a.mask, self._leaves).total.density,
            ticket_a=self._evaluate(a.trajectory.last),
            gold_standard=own,
            control=trained_with(a.mask, "control"),
            baseline=trained_with(magnitude_mask(self._dense, level_sparsity(a.level)), "baseline"),
            random=trained_with(shuffle_mask(a.mask, key=key), "random"),
            methods={
                name: TransportedMask(
                    transported=trained_with(a.mask, f"transported_{name}", dense[name]),
                    previous_work=trained_with(a.mask, f"previous_work_{name}", sparse[name]),
                )
                for name in dense
            },
        )

    def _train(self, mask: Any, name: str, permutation: Permutation | None) -> Metrics[float]:
        """Return the metrics of P[B], rewound and trained with a mask."""
        start = self._rewound
        if permutation is not None:
            start = compiled_permute(self._setup.spec, permutation, start)
        rewound = InitialState(start, self._setup.config.rewind_epoch)
        return self._evaluate(self._setup.networks.retrained(self._trained, rewound, mask, name))


def judge(config: TransportConfig, records: Sequence[TransportRecord[float]]) -> list[Claim]:
    """Judge the claims of section 5.2 about masks, on test errors, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.
    """
    return [found for method in config.methods for found in _judge_method(config, records, method)]


def last_matching(excess: np.ndarray, margin: float) -> np.ndarray:
    """Return the last level up to which every level is matching, for each replicate.

    Args:
      excess: test error above that of the dense networks by level, ``[replicates, levels]``; level 0 counts
        as matching.
      margin: the most excess with which a network is matching.

    Examples:
      >>> last_matching(np.array([[0.0, 0.0, 0.1, 0.0], [0.0, 0.0, 0.0, 0.0]]), 0.05).tolist()
      [1, 3]
    """
    fails = excess[:, 1:] > margin
    return np.where(fails.any(axis=1), fails.argmax(axis=1), fails.shape[1])


def _judge_method(
    config: TransportConfig, records: Sequence[TransportRecord[float]], method: str
) -> list[Claim]:
    transported, previous, baseline, control, random = (
        np.array([[pick(level).test_error for level in record.levels] for record in records])
        for pick in (
            lambda level: level.methods[method].transported,
            lambda level: level.methods[method].previous_work,
            lambda level: level.baseline,
            lambda level: level.control,
            lambda level: level.random,
        )
    )
    # The network that is pruned is B, but the mean of both is the steadier measure of the dense ones.
    dense = np.array(
        [(r.levels[0].ticket_a.test_error + r.levels[0].gold_standard.test_error) / 2 for r in records]
    )[:, None]
    margin, high = config.matching_margin, (config.levels + 1) // 2
    reached, one_shot = (last_matching(errors - dense, margin) for errors in (transported, baseline))
    when = f"averaged over levels {high} to {config.levels}"
    return [
        claim(
            f"transported_masks_match_longer_than_one_shot_{method}",
            f"{method}: P[B] with the mask of A stays within {margin:.1%} of the dense test error for more "
            "levels than B pruned in one shot: the 95 % interval of the difference is above 0 (transported: "
            f"{reached.mean():.1f} of {config.levels} levels)",
            "to level 12, 6.8 % of the weights, and further than one-shot pruning (section 5.2, figure 2)",
            (reached - one_shot).astype(float),
        ),
        claim(
            f"transported_masks_beat_unpermuted_ones_{method}",
            f"{method}: B with the mask of A as it is has a higher test error than P[B] with it: the 95 % "
            f"interval of the difference, {when}, is above 0",
            "the unpermuted mask is matching at no level (section 5.2)",
            (control - transported)[:, high:].mean(axis=1),
        ),
        claim(
            f"transported_masks_beat_random_ones_{method}",
            f"{method}: B with the mask of A shuffled within every leaf has a higher test error than P[B] "
            f"with the mask: the 95 % interval of the difference, {when}, is above 0",
            "not in the paper",
            (random - transported)[:, high:].mean(axis=1),
        ),
        claim(
            f"dense_permutation_carries_masks_better_{method}",
            f"{method}: P⁽ⁱ⁾[B] with the mask of A has a higher test error than P[B]: the 95 % interval of "
            f"the difference, {when}, is above 0",
            "previous work against the dense permutation (appendix F, step 5b)",
            (previous - transported)[:, high:].mean(axis=1),
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("mask_transport", TransportConfig, TransportRecord[float], TransportRecord[Interval]),
    build_measure=_build_measure,
    summarise=lambda config, records: summarise(records),
    judge=judge,
    csv="accuracies.csv",
    rows=figures.tidy_rows,
    figures={"mask_transport.png": figures.draw_transport},
    report=figures.report,
)


def build_config() -> TransportConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    return TransportConfig(
        **choice.fields,
        methods=options.chosen_methods(PAPER_METHODS),
        **options.chosen_pruning(),
        num_eval=choice.num_eval,
        matching_margin=_MARGIN.value,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
