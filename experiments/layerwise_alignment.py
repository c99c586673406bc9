"""Weight matching aligns lower layers earlier in training.

Reproduces appendix H.3 of arXiv 2404.06498 (figures 5 right, 17, 18) and the fixed points of figure 21. Pairs
of networks A and B are trained from different seeds. At every epoch t of --rewind_epochs some layers of both
networks are rewound to epoch t, while the others stay as they are at the end; the partly rewound networks are
matched, and the permutation is applied to the networks at the end of training. For every split k,

- bottom-up rewinds the first k layers: k = 0 is P_end and all layers are P_t;
- top-down rewinds all but the first k layers;
- put-in rewinds layer k alone (k = 0: none);
- leave-out rewinds all layers but layer k (k = 0: all).

A layer is a group of the spec, in order of depth: the order in which the network uses the leaves that carry
it. Each leaf belongs to the deepest of its groups. So a kernel belongs to the units that it computes, the
kernel of the output to the last hidden layer, and both kernels of a residual block to the inner group of the
block, as the residual stream is older. --partial=permutations takes the groups of rewound layers from P_t and
all others from P_end instead, without matching anew.

  python -m experiments.layerwise_alignment --preset=digits --output_dir=results/digits_mlp_layerwise
  python -m experiments.layerwise_alignment --preset=cpu --model=mlp --num_eval=2000 --num_alphas=13
    --output_dir=results/mnist_mlp_layerwise
  python -m experiments.layerwise_alignment --preset=cpu --model=vgg16 --num_eval=500 --num_alphas=9
    --output_dir=results/cifar10_vgg16_layerwise

Writes results.json, barriers.csv, layerwise_loss.png (figures 5 right, 17), layerwise_error.png (figure 18)
and fixed_points.png (figure 21). The time goes into sweeps, at most four for each epoch and layer. A finished
run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from absl import app, flags

import rebasin
from experiments import layerwise_alignment_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matched_epochs import (
    EpochsConfig,
    LayerwiseEnd,
    LayerwiseRecord,
    MatchedEpochs,
    RewoundEpoch,
    RewoundMatch,
)
from experiments.harness.methods import build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths, barriers, endpoints
from experiments.harness.record import FixedPoints, added, check_names, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval, onset
from rebasin.permutation import Permutation
from rebasin.spec import PermutationSpec
from rebasin.training.trajectory import Trajectory
from rebasin.trees import conform, map_leaves

__all__ = [
    "EXPERIMENT",
    "PARTIAL",
    "VARIANTS",
    "LayerwiseConfig",
    "judge",
    "main",
    "rewind_layers",
    "rewound",
]

# Which layers, from 1 on, are rewound at a split k of `count` layers.
VARIANTS: Mapping[str, Callable[[int, int], set[int]]] = {
    "bottom_up": lambda k, count: set(range(1, k + 1)),
    "top_down": lambda k, count: set(range(k + 1, count + 1)),
    "put_in": lambda k, count: {k} - {0},
    "leave_out": lambda k, count: set(range(1, count + 1)) - {k},
}

# What is partly that of an epoch t.
PARTIAL = ("networks", "permutations")

options.define_flags(__name__, methods=True, strict=True)
_EPOCHS = flags.DEFINE_list(
    "rewind_epochs",
    None,
    "Epochs t to which layers are rewound; by default the preset's match epochs. The last epoch is always "
    "among them.",
)
_PARTIAL = flags.DEFINE_enum(
    "partial",
    "networks",
    PARTIAL,
    "What is put together: networks, whose layers are rewound before they are matched, or permutations, "
    "whose groups are those of P_t or of P_end.",
)

# By how much a test error barrier may lie outside of those of P_end and P_t, or above that of P_end, and
# count as equal.
_MARGIN = 0.02

# The fraction of all permutations of a pair that must lie between P_end and P_t.
_MOST = 0.9


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerwiseConfig(EpochsConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      partial: what is partly that of an epoch t, a name in `PARTIAL`.
    """

    partial: str

    def problems(self) -> list[str]:
        """Return the problems of the base, then that of the field that is added here."""
        problems = super().problems()
        if self.partial not in PARTIAL:
            problems.append(f"partial: wanted one of {', '.join(PARTIAL)}, got {self.partial!r}")
        return problems

    def misfits(self, record: LayerwiseRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods, variants and splits."""
        problems = super().misfits(record, pair) + check_names("end", record.end, self.methods)
        splits = len(record.layers) + 1
        for part in record.epochs:
            where = f"epochs.{part.epoch}.methods"
            problems += check_names(where, part.methods, self.methods)
            for name, own in part.methods.items():
                problems += check_names(f"{where}.{name}.variants", own.variants, VARIANTS)
                problems += [
                    f"{where}.{name}.variants.{variant}: wanted {splits} splits, got {len(found)}"
                    for variant, found in own.variants.items()
                    if len(found) != splits
                ]
        return problems


def rewind_layers(spec: PermutationSpec, end: Any, early: Any, layers: Collection[int]) -> Any:
    """Return a network some of whose layers are those of another epoch.

    Args:
      spec: the symmetries of the network. Its groups, in their order, are the layers from 1 on, and a leaf
        belongs to the deepest of its groups, or to the last layer if it has none.
      end: the network at the end of training.
      early: the network at the other epoch.
      layers: the layers that are taken from `early`.
    """
    depth = {group: layer for layer, group in enumerate(spec.groups, 1)}
    layer_of = {
        path: max((depth[g] for axis in axes for g in axis.groups if g in depth), default=len(depth))
        for path, axes in spec.leaves
    }
    return map_leaves(
        lambda path, last, other: other if layer_of[path] in layers else last, end, conform(end, early)
    )


def rewound(variant: str, k: int, count: int) -> frozenset[int]:
    """Return the layers, from 1 on, that a variant rewinds at a split.

    Args:
      variant: a name in `VARIANTS`.
      k: the split, from 0 to `count`.
      count: number of layers.

    Examples:
      >>> [sorted(rewound(variant, 1, 3)) for variant in VARIANTS]
      [[1], [2, 3], [1], [2, 3]]
    """
    return frozenset(VARIANTS[variant](k, count))


def _build_measure(setup: Setup[LayerwiseConfig]) -> Measure[LayerwiseRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: LayerwiseRecord[float] | None
    ) -> Iterator[LayerwiseRecord[float]]:
        layers = _Layers(setup, meter, MatchedEpochs(setup, matchers, pair, trained))
        record = begun or layers.measure_end(pair)
        missing = [t for t in config.epochs if t not in record.part_keys]
        steps = len(missing) * len(VARIANTS) * (len(record.layers) + 1)
        with setup.reporter.stage(f"permutations of {pair}", steps) as advance:
            for t in missing:
                record = added(record, layers.measure_epoch(t, advance))
                yield record

    return measure


class _Layers:
    """Two networks that are partly rewound.

    Args:
      setup: what the experiment measures with.
      meter: measures paths.
      epochs: the networks and their permutations by epoch.
    """

    def __init__(self, setup: Setup[LayerwiseConfig], meter: PathMeter, epochs: MatchedEpochs) -> None:
        self._setup, self._epochs, self._last = setup, epochs, setup.config.epochs[-1]
        self._count = len(setup.spec.groups)
        with setup.seconds.count("barriers"):
            self._paths = Paths(meter, setup.spec, *epochs.networks(self._last))
        self._end = epochs.permutations(self._last)

    def measure_end(self, pair: Pair) -> LayerwiseRecord[float]:
        """Measure the last epoch."""
        with self._setup.seconds.count("barriers"):
            end = {
                name: LayerwiseEnd(self._paths.barriers(p_end), _agreement(rebasin.fixed_points(p_end)))
                for name, p_end in self._end.items()
            }
        unaligned = self._paths.unaligned
        groups = self._setup.spec.groups
        return LayerwiseRecord(pair.seeds, groups, endpoints(unaligned), barriers(unaligned), end)

    def measure_epoch(self, t: int, advance: Callable[[], None]) -> RewoundEpoch[float]:
        """Measure the permutations of networks that are partly rewound to an epoch.

        Args:
          t: the epoch.
          advance: called for each variant and split.
        """
        found: dict[str, dict[str, list[Any]]] = {
            name: {variant: [] for variant in VARIANTS} for name in self._end
        }
        for variant in VARIANTS:
            for k in range(self._count + 1):
                permutations = self._partial(t, rewound(variant, k, self._count))
                with self._setup.seconds.count("barriers"):
                    for name, permutation in permutations.items():
                        found[name][variant].append(self._paths.barriers(permutation))
                advance()
        return RewoundEpoch(
            t,
            {
                name: RewoundMatch(
                    alone=self._paths.barriers(p_t),
                    fixed_points=_agreement(rebasin.fixed_points(p_t, self._end[name])),
                    variants={variant: tuple(series) for variant, series in found[name].items()},
                )
                for name, p_t in self._epochs.permutations(t).items()
            },
        )

    def _partial(self, t: int, layers: Collection[int]) -> dict[str, Permutation]:
        """Return the permutation of each method while some layers are those of epoch t."""
        if not layers or t == self._last:
            return self._end
        p_t = self._epochs.permutations(t)
        if self._setup.config.partial == "permutations":
            groups = {group for i, group in enumerate(self._setup.spec.groups, 1) if i in layers}
            return {
                name: {group: (p_t[name] if group in groups else p_end)[group] for group in p_end}
                for name, p_end in self._end.items()
            }
        if len(layers) == self._count:
            return p_t
        both = zip(self._epochs.networks(self._last), self._epochs.networks(t), strict=True)
        return self._epochs.match(*(rewind_layers(self._setup.spec, *pair, layers) for pair in both))


def _agreement(points: Any) -> FixedPoints[float]:
    return FixedPoints(points.total, points.fractions)


def judge(config: LayerwiseConfig, records: Sequence[LayerwiseRecord[float]]) -> list[Claim]:
    """Judge the claims of appendix H.3, on test error barriers, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.
    """
    return [found for method in config.methods for found in _judge_method(config, records, method)]


def _judge_method(
    config: LayerwiseConfig, records: Sequence[LayerwiseRecord[float]], method: str
) -> list[Claim]:
    def series(variant: str) -> np.ndarray:
        """Return the barriers of a variant, ``[replicates, epochs, splits]``."""
        own = [[epoch.methods[method].variants[variant] for epoch in record.epochs] for record in records]
        return np.array([[[m.test_error for m in row] for row in epochs] for epochs in own])

    by_variant = {variant: series(variant) for variant in VARIANTS}
    alone, end = by_variant["bottom_up"][:, :, -1], by_variant["bottom_up"][:, :, :1]
    low, high = np.minimum(alone[..., None], end) - _MARGIN, np.maximum(alone[..., None], end) + _MARGIN
    # Of the last epoch all permutations are P_end.
    inside = [((low <= x) & (x <= high))[:, :-1].mean(axis=(1, 2)) for x in by_variant.values()]
    share = np.mean(inside, axis=0)
    count = len(records[0].layers)
    half = count // 2
    bottom, top = by_variant["bottom_up"], by_variant["top_down"]
    reached = [
        [onset(config.epochs, row, _MARGIN) for row in (bottom[:, :, k] - end[..., 0]).tolist()]
        for k in (half, -1)
    ]
    points = [
        [list(epoch.methods[method].fixed_points.groups.values()) for epoch in record.epochs[:-1]]
        for record in records
    ]
    deeper = [np.mean(np.array(own)[:, :half]) - np.mean(np.array(own)[:, half:]) for own in points]
    return [
        claim(
            f"between_end_and_early_{method}",
            f"{method}: at least {_MOST:.0%} of all partial permutations have a barrier between those of "
            f"P_end and P_t, or at most {_MARGIN:.0%} outside",
            "bounded by P_t and P_end at all rewind times (appendix H.3)",
            share,
            share.mean() >= _MOST,
        ),
        claim(
            f"lower_layers_align_earlier_{method}",
            f"{method}: bottom-up, the barrier stays within {_MARGIN:.0%} of that of P_end from an earlier "
            f"epoch on with the lowest {half} of {count} layers rewound than with all: the 95 % interval of "
            "the difference in epochs is above 0",
            "the time at which bottom-up reaches P_end increases with k (appendix H.3, figure 17 left)",
            np.subtract(reached[1], reached[0]),
        ),
        claim(
            f"input_layers_matter_more_{method}",
            f"{method}: rewinding the lowest {half} of {count} layers raises the barrier more "
            "than rewinding the others: the 95 % interval of the difference, averaged over epochs t before "
            "the last, is above 0",
            "rewinding output layers raises it less than rewinding input layers (appendix H.3)",
            (bottom - top)[:, :-1, half].mean(axis=1),
        ),
        claim(
            f"lower_layers_have_more_fixed_points_{method}",
            f"{method}: P_t agrees with P_end on more units in the lowest {half} of {count} layers than in "
            "the others: the 95 % interval of the difference of fractions, averaged over epochs t before the "
            "last, is above 0",
            "lower layers have more fixed points at earlier t (figure 21 bottom)",
            np.array(deeper),
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("layerwise_alignment", LayerwiseConfig, LayerwiseRecord[float], LayerwiseRecord[Interval]),
    build_measure=_build_measure,
    summarise=lambda config, records: summarise(records),
    judge=judge,
    csv="barriers.csv",
    rows=figures.tidy_rows,
    figures={
        "layerwise_loss.png": figures.draw_losses,
        "layerwise_error.png": figures.draw_errors,
        "fixed_points.png": figures.draw_fixed_points,
    },
    report=figures.report,
)


def build_config() -> LayerwiseConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    return LayerwiseConfig(
        **choice.fields,
        methods=options.chosen_methods(("weights",)),
        epochs=options.choose_epochs_with_last(_EPOCHS.value, choice.preset.match_epochs, choice.last),
        num_eval=choice.num_eval,
        partial=_PARTIAL.value,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
