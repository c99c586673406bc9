"""A lottery ticket of one network trained from another network's beginning, over widths.

Goes one step beyond section 5.2 of arXiv 2404.06498. Adnan et al. (arXiv 2505.05143) report that a mask that
is carried to a new initialisation trains nearly as well as the ticket of that initialisation, and the better
the wider the networks are. Pairs of networks A and B are trained at each width, and iterative magnitude
pruning finds masks of both, level by level. At every level network B is taken at epoch --rewind_epoch (0 is
the initialisation itself), pruned, and trained *in a new data order* with

- its own mask;
- the mask of A on P[B], where P is the permutation from the dense networks at their end;
- the mask of A as it is.

The first line of mask_transport is trained in the order in which its mask was found. Here all three are as
far from it, so that nothing but the mask tells them apart, and the permutation comes from a run of B whose
batches the sparse network never sees again in that order. The *gap* is the test error of P[B] with the mask
of A above that of B with its own. The run prints a table of gaps and the claims with a verdict each.

  python -m experiments.mask_transport_widths --preset=digits --output_dir=results/digits_mlp_widths
  python -m experiments.mask_transport_widths --preset=digits --rewind_epoch=0
    --output_dir=results/digits_mlp_widths_initialisation

The first takes 11 minutes of a processor's time.

Writes results.json, widths.csv and mask_transport_widths.png. Training dominates: two networks for each
replicate and width, and four for each level of those and one for each method. Results are stored level by
level, and so are the networks. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import app

from experiments import mask_transport_widths_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.methods import build_matchers
from experiments.harness.networks import Pair, child_seed
from experiments.harness.paths import PathMeter, endpoints
from experiments.harness.pruning import PruningConfig, WidthLevel, WidthRecord, WidthsSummary
from experiments.harness.record import Metrics, added, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.widths import OverWidths
from rebasin.masks import sparsity_report
from rebasin.permutation import Permutation, compiled_permute
from rebasin.pruning import prunable_leaves
from rebasin.training.imp import Level
from rebasin.training.loop import InitialState
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "TransportWidthsConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True, merge=True)
options.define_pruning_flags(__name__, rewind=False)
options.define_widths_flag(__name__)

# The widths of a run by default, as fractions of that of the recipe.
_DEFAULT_WIDTHS = (1 / 8, 1 / 4, 1 / 2, 1, 2)

# The matching method of the paper's figure 2.
_METHODS = ("weights",)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TransportWidthsConfig(OverWidths, PruningConfig):
    """Everything that the results depend on; written into ``results.json``."""

    @property
    def further_networks(self) -> int:
        """The sparse networks of both parents, and B with each mask in a new data order."""
        return self.levels * (4 + len(self.methods))


def _build_measure(setup: Setup[TransportWidthsConfig]) -> Measure[WidthRecord[float]]:
    config, tools = setup.config, _Tools(setup)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: WidthRecord[float] | None
    ) -> Iterator[WidthRecord[float]]:
        width = pair.recipe.width
        record = begun or WidthRecord(pair.seeds, width)
        permutations = tools.match(trained, pair)
        title = f"networks of width {width}, {pair}"
        with setup.reporter.stage(title, config.further_networks) as advance:
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
                    for _ in range(2 + len(config.methods) if a.level else 0):
                        advance()
                    continue
                level = tools.measure_level(trained[1], a, b, permutations, advance)
                record = added(record, level)
                yield record

    return measure


class _Tools:
    """What pairs of one width are measured with.

    Args:
      setup: the setup for networks of this width.
    """

    def __init__(self, setup: Setup[TransportWidthsConfig]) -> None:
        config = setup.config
        self._setup = setup
        # Networks are measured alone: the path is that from the network to itself.
        self._meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=2, num_eval=config.num_eval)
        self._matchers = build_matchers(setup, config.methods)

    def match(self, trained: Sequence[Trajectory], pair: Pair) -> dict[str, Permutation]:
        """Return the permutation of each method from the dense networks at their end."""
        params_a, params_b = (trajectory.last for trajectory in trained)
        with self._setup.seconds.count("matching"):
            return {
                name: find(params_a, params_b, key=pair.key).permutation
                for name, find in self._matchers.items()
            }

    def measure_level(
        self,
        trained: Trajectory,
        a: Level,
        b: Level,
        permutations: dict[str, Permutation],
        advance: Callable[[], None],
    ) -> WidthLevel[float]:
        """Train B in a new data order with every mask of a level, and measure it.

        Args:
          trained: trajectory of the dense network B.
          a: level of network A.
          b: level of network B.
          permutations: permutation of each method from the dense networks.
          advance: called for each network that is trained.
        """
        config, networks = self._setup.config, self._setup.networks
        epoch = config.rewind_epoch
        dense = None if a.level else self._evaluate(trained.last)

        def train(mask: Any, name: str, permutation: Permutation | None = None) -> Metrics[float]:
            if dense is not None:  # nothing is pruned, and so nothing trained
                return dense
            start = trained[epoch]
            if permutation is not None:
                start = compiled_permute(self._setup.spec, permutation, start)
            folder = f"{config.rewind}_{epoch}_level_{a.level:02d}_{name}_new_order"
            seed = child_seed(trained.seed, epoch, 1)
            network = networks.retrained(trained, InitialState(start, epoch), mask, folder, seed=seed)
            advance()
            return self._evaluate(network)

        return WidthLevel(
            level=a.level,
            density=sparsity_report(a.mask, prunable_leaves(trained.last)).total.density,
            own=train(b.mask, "own"),
            unpermuted=train(a.mask, "control"),
            methods={name: train(a.mask, f"transported_{name}", p) for name, p in permutations.items()},
        )

    def _evaluate(self, params: Any) -> Metrics[float]:
        with self._setup.seconds.count("evaluation"):
            return endpoints(self._meter(params, params)).a


def _summarise(config: TransportWidthsConfig, records: Sequence[WidthRecord[float]]) -> WidthsSummary:
    """Return mean, 95 % interval and standard deviation over replicates at each width."""
    return WidthsSummary(
        tuple(summarise([record for record in records if record.width == width]) for width in config.widths)
    )


def judge(config: TransportWidthsConfig, records: Sequence[WidthRecord[float]]) -> list[Claim]:
    """Judge what Adnan et al. report of test errors, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate and width.
    """
    high = (config.levels + 1) // 2
    when = f"averaged over levels {high} to {config.levels}"
    widths = [[record for record in records if record.width == width] for width in config.widths]

    def errors(method: str | None) -> np.ndarray:
        """Return test errors above those of B's own mask, averaged over levels, ``[widths, replicates]``."""
        return np.array(
            [
                [
                    np.mean(
                        [
                            (level.methods[method] if method else level.unpermuted).test_error
                            - level.own.test_error
                            for level in record.levels[high:]
                        ]
                    )
                    for record in some
                ]
                for some in widths
            ]
        )

    unpermuted, claims = errors(None), []
    for method in config.methods:
        gap = errors(method)
        if len(widths) > 1:
            claims.append(
                claim(
                    f"gap_shrinks_with_width_{method}",
                    f"{method}: the gap, {when}, shrinks with width: the 95 % interval of its slope by "
                    f"doublings of the width is below 0 (mean gaps in %: {_listed(gap.mean(axis=1))})",
                    "the gap to the network's own ticket shrinks with width (arXiv 2505.05143)",
                    np.polyfit(np.log2(config.widths), gap, 1)[0],
                    below=True,
                )
            )
        claims.append(
            claim(
                f"transported_masks_beat_unpermuted_ones_{method}",
                f"{method}: B with the mask of A as it is has a higher test error than P[B] with it: the "
                f"95 % interval of the difference, {when} and over widths, is above 0",
                "permuted masks train better than others at every width (arXiv 2505.05143)",
                (unpermuted - gap).mean(axis=0),
            )
        )
    return claims


def _listed(values: np.ndarray) -> str:
    return ", ".join(f"{100 * value:.1f}" for value in values)


EXPERIMENT = Experiment(
    schema=Schema("mask_transport_widths", TransportWidthsConfig, WidthRecord[float], WidthsSummary),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="widths.csv",
    rows=figures.tidy_rows,
    figures={"mask_transport_widths.png": figures.draw_widths},
    report=figures.report,
)


def build_config() -> TransportWidthsConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    width = choice.fields["recipe"].width
    widths = tuple(sorted({max(1, round(width * fraction)) for fraction in _DEFAULT_WIDTHS}))
    return TransportWidthsConfig(
        **choice.fields,
        methods=options.chosen_methods(_METHODS),
        **options.chosen_pruning(rewind=False),
        num_eval=choice.num_eval,
        widths=options.chosen_widths(widths),
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
