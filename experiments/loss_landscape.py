"""Shows the loss between two training trajectories, under permutations from different epochs.

Reproduces appendix I of arXiv 2404.06498 (figures 22, 23). Pairs of networks A and B are trained from
different seeds. Matching finds a permutation P_s at every epoch s of --plane_epochs. For all s and t among
these epochs loss and error are measured on a grid of the plane through A_end, A_t and P_s[B_t], whose
coordinates are true Euclidean distances, and both trajectories, that of B under P_s, are projected onto it.
At the last epoch t, where A_t is A_end, the plane goes through the first recorded network of A instead. The
ridge of a plane is the barrier of the path between A_t and P_s[B_t], which lies in it. The run prints a table
of ridges and the paper's claims with a verdict each.

  python -m experiments.loss_landscape --preset=digits --output_dir=results/digits_mlp_landscape
  python -m experiments.loss_landscape --preset=cpu --model=mlp --replicates=3 --num_eval=2000 --num_alphas=13
    --grid_size=31 --output_dir=results/mnist_mlp_landscape
  python -m experiments.loss_landscape --preset=cpu --model=vgg16 --methods=weights,activations --num_eval=500
    --num_alphas=9 --grid_size=21 --num_grid=250 --output_dir=results/cifar10_vgg16_landscape

Writes results.json, ridges.csv, landscape.png (figure 22), landscape_loss.png and landscape_error.png
(figure 23). Grids are measured for the first pair alone, since only they are drawn; ridges are measured for
all pairs. A finished run of the same options is only drawn anew.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np
from absl import app, flags

import rebasin
from experiments import loss_landscape_figures as figures
from experiments.harness import options
from experiments.harness.experiment import Experiment, Measure, Setup
from experiments.harness.matched_epochs import (
    EpochsConfig,
    Landscape,
    LandscapeRecord,
    MatchedEpochs,
    PlaneRecord,
    Surface,
    Waypoint,
)
from experiments.harness.methods import build_matchers
from experiments.harness.networks import Pair
from experiments.harness.paths import PathMeter, Paths
from experiments.harness.presets import Thresholds
from experiments.harness.record import added, check_names, summarise
from experiments.harness.results import Claim, Schema, claim
from experiments.harness.statistics import Interval
from rebasin.landscape import Plane
from rebasin.permutation import Permutation
from rebasin.training.trajectory import Trajectory

__all__ = ["EXPERIMENT", "LandscapeConfig", "judge", "main"]

options.define_flags(__name__, methods=True, strict=True)
_EPOCHS = flags.DEFINE_list(
    "plane_epochs",
    None,
    "Epochs s of permutations and t of networks, by default 1, 5 and 10 as in the paper; the last epoch is "
    "always among them.",
)
_SIZE = flags.DEFINE_integer("grid_size", 51, "Points along each axis of a grid.", lower_bound=2)
_EXAMPLES = flags.DEFINE_integer(
    "num_grid", 500, "Training examples on which grids are measured.", lower_bound=1
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class LandscapeConfig(EpochsConfig):
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recorded: epochs of the trajectories that are projected, in ascending order.
      grid_size: number of points along each axis of a grid.
      num_grid: number of training examples on which grids are measured.
      thresholds: barriers against which claims are judged.
    """

    recorded: tuple[int, ...]
    grid_size: int
    num_grid: int
    thresholds: Thresholds

    def problems(self) -> list[str]:
        """Return the problems of the base, then those of the fields that are added here."""
        problems = super().problems()
        if list(self.recorded) != sorted({*self.recorded, *self.epochs}):
            problems.append(
                f"recorded: wanted ascending epochs with those of planes, got {list(self.recorded)}"
            )
        elif self.recorded[0] == self.recipe.epochs:
            problems.append("recorded: wanted an epoch before the last one")
        for name, least in (("grid_size", 2), ("num_grid", 1)):
            if getattr(self, name) < least:
                problems.append(f"{name}: wanted at least {least}, got {getattr(self, name)}")
        return problems

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """The recorded epochs."""
        return self.recorded

    @property
    def wanted_parts(self) -> tuple[tuple[int, int], ...]:
        """The epochs s and t of every plane."""
        return tuple((s, t) for s in self.epochs for t in self.epochs)

    def misfits(self, record: LandscapeRecord[float], pair: Pair) -> list[str]:
        """Return the problems that the base finds, and those of methods and surfaces."""
        problems = super().misfits(record, pair)
        for plane in record.planes:
            where = f"planes.{plane.match_epoch}.{plane.epoch}"
            problems += check_names(f"{where}.methods", plane.methods, self.methods)
            if any((own.surface is None) == self.has_surfaces(pair) for own in plane.methods.values()):
                problems.append(f"{where}: wanted a surface in the first pair, and in no other")
        return problems

    def has_surfaces(self, pair: Pair) -> bool:
        """Say whether surfaces of a pair are measured: those of the first pair are."""
        return pair.seeds[0] == self.seed


def _build_measure(setup: Setup[LandscapeConfig]) -> Measure[LandscapeRecord[float]]:
    config = setup.config
    meter = PathMeter(setup.metrics_fn, setup.dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    matchers = build_matchers(setup, config.methods)
    surveyor = _Surveyor(setup)

    def measure(
        pair: Pair, trained: list[Trajectory], begun: LandscapeRecord[float] | None
    ) -> Iterator[LandscapeRecord[float]]:
        record = begun or LandscapeRecord(pair.seeds)
        epochs = MatchedEpochs(setup, matchers, pair, trained)
        missing = [key for key in config.wanted_parts if key not in record.part_keys]
        paths: dict[int, Paths] = {}
        with setup.reporter.stage(f"planes of {pair}", len(missing)) as advance:
            for s, t in missing:
                with setup.seconds.count("barriers"):
                    paths[t] = paths.get(t) or Paths(meter, setup.spec, *epochs.networks(t))
                methods = {}
                for name, permutation in epochs.permutations(s).items():
                    with setup.seconds.count("barriers"):
                        ridge = paths[t].barriers(permutation)
                    surveyed = config.has_surfaces(pair)
                    surface = surveyor.survey(epochs, permutation, t) if surveyed else None
                    methods[name] = Landscape(ridge, surface)
                record = added(record, PlaneRecord(s, t, methods))
                yield record
                advance()

    return measure


class _Surveyor:
    """Measures loss and error in planes."""

    def __init__(self, setup: Setup[LandscapeConfig]) -> None:
        self._setup = setup
        size = min(setup.config.num_grid, len(setup.dataset.train.labels))
        self._data = jax.device_put(setup.dataset.take(num_train=size).train)
        self._sweep = rebasin.build_plane_sweep(setup.metrics_fn)

    def survey(self, epochs: MatchedEpochs, permutation: Permutation, t: int) -> Surface:
        """Measure the plane of an epoch under a permutation, and project both trajectories onto it."""
        config = self._setup.config
        last = config.recipe.epochs
        third = last if t < last else config.recorded[0]
        with self._setup.seconds.count("planes"):
            # A_t and P_s[B_t] lie side by side at the bottom of the picture, and the third network above.
            plane = rebasin.build_plane(
                {
                    f"A of epoch {t}": epochs.networks(t)[0],
                    f"B of epoch {t} under the permutation": epochs.moved(permutation, t),
                    f"A of epoch {third}": epochs.networks(third)[0],
                }
            )
            own = tuple(_waypoint(plane, u, epochs.networks(u)[0]) for u in config.recorded)
            other = tuple(_waypoint(plane, u, epochs.moved(permutation, u)) for u in config.recorded)
            x, y = plane.grid(config.grid_size, around=[(w.x, w.y) for w in (*own, *other)], margin=0.15)
            surface = self._sweep(plane, np.stack(np.meshgrid(x, y), axis=-1), self._data)
        loss, error = (_rows(surface.means[metric]) for metric in ("loss", "error"))
        return Surface(tuple(x.tolist()), tuple(y.tolist()), loss, error, own, other)


def _waypoint(plane: Plane, epoch: int, params: Any) -> Waypoint:
    (x, y), off = plane.project(params)
    return Waypoint(epoch, float(x), float(y), off)


def _rows(values: np.ndarray) -> tuple[tuple[float, ...], ...]:
    """Return a matrix as rows of numbers with five digits, which a picture does not need more of."""
    return tuple(tuple(float(f"{value:.5g}") for value in row) for row in values)


def _summarise(
    config: LandscapeConfig, records: Sequence[LandscapeRecord[float]]
) -> LandscapeRecord[Interval]:
    """Return mean and spread of the ridges over replicates, without surfaces."""
    return summarise([_without_surfaces(record) for record in records])


def _without_surfaces(record: LandscapeRecord[float]) -> LandscapeRecord[float]:
    def bare(plane: PlaneRecord[float]) -> PlaneRecord[float]:
        methods = {name: Landscape(own.ridge) for name, own in plane.methods.items()}
        return dataclasses.replace(plane, methods=methods)

    return dataclasses.replace(record, planes=tuple(bare(plane) for plane in record.planes))


def judge(config: LandscapeConfig, records: Sequence[LandscapeRecord[float]]) -> list[Claim]:
    """Judge the claims of appendix I about ridges, on test errors, by rules that were set before the runs.

    Args:
      config: the config of the run.
      records: the record of each replicate.
    """
    return [found for method in config.methods for found in _judge_method(config, records, method)]


def _judge_method(
    config: LandscapeConfig, records: Sequence[LandscapeRecord[float]], method: str
) -> list[Claim]:
    ridges = [{p.key: p.methods[method].ridge.test_error for p in r.planes} for r in records]
    first, last = config.epochs[0], config.epochs[-1]
    # Networks of the last epoch are not early ones, on which the claim is.
    early = config.epochs[:-1]
    limit = config.thresholds.any_epoch_at_most
    under_last = np.array([[own[last, t] for t in early] for own in ridges])
    drop = np.array([[own[first, t] - own[last, t] for t in early] for own in ridges])
    worst = int(under_last.mean(axis=0).argmax())
    return [
        claim(
            f"ridge_vanishes_{method}",
            f"{method}: under P_end the test error ridge between A_t and P[B_t] is at most {limit:.0%} at "
            f"every epoch t before the last (highest at epoch {early[worst]})",
            "under late permutations the trajectories are connected from early on (figures 22, 23)",
            under_last[:, worst],
            under_last[:, worst].mean() <= limit,
        ),
        claim(
            f"ridge_sinks_with_the_match_epoch_{method}",
            f"{method}: the ridge is higher under P_{first} than under P_end: the 95 % interval of the "
            "difference, averaged over epochs t before the last, is above 0",
            "under early permutations a ridge separates the trajectories (figures 22, 23)",
            drop.mean(axis=1),
        ),
    ]


EXPERIMENT = Experiment(
    schema=Schema("loss_landscape", LandscapeConfig, LandscapeRecord[float], LandscapeRecord[Interval]),
    build_measure=_build_measure,
    summarise=_summarise,
    judge=judge,
    csv="ridges.csv",
    rows=figures.tidy_rows,
    figures={
        "landscape.png": figures.draw_row,
        "landscape_loss.png": figures.draw_losses,
        "landscape_error.png": figures.draw_errors,
    },
    report=figures.report,
)


def build_config() -> LandscapeConfig:
    """Build the config that the flags describe."""
    choice = options.choose()
    epochs = options.choose_epochs_with_last(_EPOCHS.value, (1, 5, 10), choice.last)
    recorded = {*options.choose_epochs(None, choice.preset.epochs, choice.last), *epochs}
    return LandscapeConfig(
        **choice.fields,
        methods=options.chosen_methods(("weights",)),
        epochs=epochs,
        recorded=tuple(sorted(recorded)),
        num_eval=choice.num_eval,
        grid_size=_SIZE.value,
        num_grid=_EXAMPLES.value,
        thresholds=choice.preset.thresholds,
    )


def main(arguments: list[str]) -> None:
    """Run the experiment."""
    options.run_binary(arguments, EXPERIMENT, build_config)


if __name__ == "__main__":
    app.run(main)
