"""One permutation for two whole training trajectories (arXiv 2404.06498, section 5.1, figures 1, 4 and 8).

Networks A_t and B_t are trained from different seeds. At each recorded epoch t the segment between them is
measured without a permutation, under P_end found at the end of training, and under P_t found at that very
epoch; P_t is also applied to the networks at the end of training.
"""

import dataclasses
import pathlib
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

import rebasin
from experiments.console import Reporter
from experiments.figures import draw_trajectories
from experiments.pairs import train_networks
from experiments.presets import Thresholds
from experiments.results import Claim, Results, open_results, write_csv
from experiments.statistics import Interval, student_interval
from rebasin.data import Dataset, Split
from rebasin.errors import ConfigError, problem_list
from rebasin.models import build_model
from rebasin.recipes import Recipe
from rebasin.spec import PermutationSpec
from rebasin.training import build_metrics
from rebasin.trajectory import Trajectory

__all__ = ["ALIGNMENTS", "Config", "run"]

EXPERIMENT = "training_trajectories"

# Key of each alignment in `curves` and `summary`, and what it means.
ALIGNMENTS = {
    "unaligned": "A_t and B_t as they are",
    "end": "A_t and P_end[B_t], P_end from the last epoch",
    "same_epoch": "A_t and P_t[B_t], P_t from that very epoch",
    "at_end": "A_end and P_t[B_end]",
}

METRICS = ("train_loss", "train_error", "test_loss", "test_error")

Measure = Callable[[Any, Any], dict[str, rebasin.BarrierCurve]]


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recipe: how networks are trained.
      replicates: independent pairs of networks; pair r has the seeds ``seed + 2r`` and ``seed + 2r + 1``.
      seed: the first of the seeds, and that of the matching.
      epochs: recorded epochs; the last must be the recipe's.
      num_alphas: points on each segment.
      num_eval: examples of each split on which segments are measured, `None` for all.
      thresholds: for the claims.
    """

    recipe: Recipe
    replicates: int
    seed: int
    epochs: tuple[int, ...]
    num_alphas: int
    num_eval: int | None
    thresholds: Thresholds

    def __post_init__(self) -> None:
        problems = []
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if self.num_alphas < 2:
            problems.append(f"num_alphas: wanted at least 2, both ends of the segment, got {self.num_alphas}")
        if list(self.epochs) != sorted(set(self.epochs)) or not self.epochs or self.epochs[0] < 0:
            problems.append(f"epochs: wanted ascending epochs from 0 on, got {list(self.epochs)}")
        elif self.epochs[-1] != self.recipe.epochs:
            problems.append(
                f"epochs: wanted the recipe's last, {self.recipe.epochs}, at the end, got {self.epochs[-1]}"
            )
        if problems:
            raise ConfigError(problem_list("this experiment cannot work:", problems))

    def to_json(self) -> dict[str, Any]:
        """The config as it stands in ``results.json``."""
        return {**dataclasses.asdict(self), "thresholds": self.thresholds._asdict()}


def run(
    config: Config,
    dataset: Dataset,
    *,
    output_dir: pathlib.Path,
    runs_dir: pathlib.Path,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Trains the networks, measures all segments, and writes results, table and figure.

    Args:
      config: what to do.
      dataset: the data.
      output_dir: gets ``results.json``, ``barriers.csv`` and ``training_trajectories.png``.
      runs_dir: where trained networks are kept, and found again by recipe and seed.
      resume: go on with an unfinished run; what is finished is kept either way.
      reporter: shows progress and tables.

    Returns:
      The finished results. Those of an equal config that are finished already are only drawn anew.

    Raises:
      ConfigError: the output folder holds another config, or an unfinished run without `resume`.
    """
    reporter = reporter or Reporter()
    results = open_results(output_dir, EXPERIMENT, config.to_json(), resume=resume)
    path = output_dir / "results.json"
    if not results.finished:
        model = build_model(config.recipe.model, width=config.recipe.width, num_classes=dataset.num_classes)
        measure = _build_measure(config, dataset, model)
        for replicate in range(len(results.curves), config.replicates):
            seeds = (config.seed + 2 * replicate, config.seed + 2 * replicate + 1)
            pair = train_networks(
                config.recipe, dataset, seeds, runs_dir=runs_dir, reporter=reporter, results=results
            )
            spec = _infer(model, pair[0].last, dataset)
            results.curves.append(_measure_pair(config, spec, pair, seeds, measure, reporter, results))
            results.save(path)
        results.summary = _summarise(config, results.curves)
        results.claims = _judge(config, results.curves)
        results.save(path)
    write_csv(output_dir / "barriers.csv", _rows(results.curves))
    draw_trajectories(results, output_dir / "training_trajectories.png")
    _report(results, output_dir, reporter)
    return results


def _infer(model: Any, variables: Any, dataset: Dataset) -> PermutationSpec:
    image = jax.ShapeDtypeStruct((1, *dataset.train.images.shape[1:]), np.float32)
    return rebasin.infer_spec(model.apply, variables, image)


def _build_measure(config: Config, dataset: Dataset, model: Any) -> Measure:
    """A function from two networks to their curves on the train and the test examples.

    One sweep covers both: the examples are evaluated together and told apart afterwards.
    """
    sizes = {
        "num_train": min(config.num_eval or len(dataset.train.labels), len(dataset.train.labels)),
        "num_test": min(config.num_eval or len(dataset.test.labels), len(dataset.test.labels)),
    }
    chosen = dataset.take(**sizes)
    data = jax.device_put(
        Split(*(np.concatenate([train, test]) for train, test in zip(chosen.train, chosen.test, strict=True)))
    )
    sweep = rebasin.build_sweep(build_metrics(model, dataset.mean, dataset.std), num_alphas=config.num_alphas)
    n = sizes["num_train"]

    def measure(params_a: Any, params_b: Any) -> dict[str, rebasin.BarrierCurve]:
        curve = sweep(params_a, params_b, data)
        parts = {"train": np.s_[:, :n], "test": np.s_[:, n:]}
        return {
            split: curve._replace(examples={name: values[part] for name, values in curve.examples.items()})
            for split, part in parts.items()
        }

    return measure


def _measure_pair(
    config: Config,
    spec: PermutationSpec,
    pair: list[Trajectory],
    seeds: tuple[int, int],
    measure: Measure,
    reporter: Reporter,
    results: Results,
) -> dict[str, Any]:
    """All measurements on one pair of trajectories, epoch by epoch."""
    first, second = pair
    end_a, end_b = first.last, second.last

    def match(a: Any, b: Any) -> rebasin.MatchResult:
        began = time.perf_counter()
        found = rebasin.weight_matching(spec, a, b, key=jax.random.key(config.seed))
        results.add_seconds("matching", time.perf_counter() - began)
        return found

    end = match(end_a, end_b)
    record: dict[str, Any] = {
        "seeds": list(seeds),
        "epochs": list(config.epochs),
        "endpoints": {metric: {"a": [], "b": []} for metric in METRICS},
        "barriers": {name: {metric: [] for metric in METRICS} for name in ALIGNMENTS},
        "fixed_points": [],
    }
    under_end = measure(end_a, rebasin.permute(spec, end.permutation, end_b))
    with reporter.stage(f"measure seeds {seeds[0]} and {seeds[1]}", len(config.epochs)) as advance:
        for epoch in config.epochs:
            a, b = first[epoch], second[epoch]
            own = end if epoch == config.epochs[-1] else match(a, b)
            began = time.perf_counter()
            curves = {
                "unaligned": measure(a, b),
                "end": measure(a, rebasin.permute(spec, end.permutation, b)),
            }
            # Late in training P_t often is P_end, and the same segments need not be measured again.
            if rebasin.fixed_points(own.permutation, end.permutation).total == 1.0:
                curves |= {"same_epoch": curves["end"], "at_end": under_end}
            else:
                curves["same_epoch"] = measure(a, rebasin.permute(spec, own.permutation, b))
                curves["at_end"] = measure(end_a, rebasin.permute(spec, own.permutation, end_b))
            results.add_seconds("barriers", time.perf_counter() - began)
            _enter(record, curves)
            record["fixed_points"].append(rebasin.fixed_points(own.permutation, end.permutation).total)
            if epoch == config.epochs[-1]:
                record["segments_at_end"] = {name: _segments(curves[name]) for name in ("unaligned", "end")}
            advance()
    return record


def _enter(record: dict[str, Any], curves: Mapping[str, Mapping[str, rebasin.BarrierCurve]]) -> None:
    """Adds one epoch's barriers and endpoints."""
    for name, by_split in curves.items():
        for split, curve in by_split.items():
            for metric in ("loss", "error"):
                record["barriers"][name][f"{split}_{metric}"].append(curve.barrier(metric).value)
    for split, curve in curves["unaligned"].items():
        for metric, means in curve.means.items():
            record["endpoints"][f"{split}_{metric}"]["a"].append(float(means[-1]))
            record["endpoints"][f"{split}_{metric}"]["b"].append(float(means[0]))


def _segments(by_split: Mapping[str, rebasin.BarrierCurve]) -> dict[str, list[float]]:
    """Means along the segment, from B to A."""
    return {
        f"{split}_{metric}": values.tolist()
        for split, curve in by_split.items()
        for metric, values in curve.means.items()
    }


def _summarise(config: Config, curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and standard deviation over replicates, for every epoch."""

    def over_replicates(series: Callable[[dict[str, Any]], list[float]]) -> dict[str, list[float]]:
        columns = zip(*(series(curve) for curve in curves), strict=True)
        intervals = [student_interval(column) for column in columns]
        return {name: [getattr(interval, name) for interval in intervals] for name in Interval._fields}

    return {
        "epochs": list(config.epochs),
        "endpoints": {
            metric: {side: over_replicates(lambda c, m=metric, s=side: c["endpoints"][m][s]) for side in "ab"}
            for metric in METRICS
        },
        "barriers": {
            name: {
                metric: over_replicates(lambda c, n=name, m=metric: c["barriers"][n][m]) for metric in METRICS
            }
            for name in ALIGNMENTS
        },
        "fixed_points": over_replicates(lambda c: c["fixed_points"]),
    }


def _judge(config: Config, curves: list[dict[str, Any]]) -> list[Claim]:
    """The paper's claims, by rules on test data that were set before the runs."""
    limits = config.thresholds

    def barriers(name: str) -> np.ndarray:
        return np.array([curve["barriers"][name]["test_error"] for curve in curves])  # [replicates, epochs]

    # The worst epoch of the mean, rather than the mean of each replicate's worst, which chance would raise.
    worst = int(barriers("end").mean(axis=0).argmax())
    early = next((i for i, epoch in enumerate(config.epochs) if epoch >= 1), 0)
    gap = barriers("at_end")[:, early] - barriers("at_end")[:, -1]

    unaligned = student_interval(barriers("unaligned")[:, -1])
    everywhere = student_interval(barriers("end")[:, worst])
    at_end = student_interval(barriers("end")[:, -1])
    early_worse = student_interval(gap)
    return [
        _claim(
            "unaligned_barrier",
            f"without a permutation, the test error barrier at the end is above {limits.unaligned_above:.0%}",
            "around 70 % (section 5.1, VGG-16 on CIFAR-10)",
            unaligned,
            unaligned.mean > limits.unaligned_above,
        ),
        _claim(
            "one_permutation_aligns_every_epoch",
            f"under P_end it is at most {limits.any_epoch_at_most:.0%} at every epoch "
            f"(highest at epoch {config.epochs[worst]})",
            "3 to 8 % at any time (section 5.1; at most 9 % in the plots)",
            everywhere,
            everywhere.mean <= limits.any_epoch_at_most,
        ),
        _claim(
            "one_permutation_aligns_the_end",
            f"under P_end it is at most {limits.end_at_most:.0%} at the end",
            "6 % (read off figure 4)",
            at_end,
            at_end.mean <= limits.end_at_most,
        ),
        _claim(
            "early_permutations_fail",
            f"P_t from epoch {config.epochs[early]} is worse at the end than P_end: the 95 % interval of the "
            "difference is above 0",
            "from epoch 3 a train error barrier of .89 is left, from 150 .08 (figure 8)",
            early_worse,
            # One replicate has no interval; its sign alone decides then.
            early_worse.low > 0 if len(curves) > 1 else early_worse.mean > 0,
        ),
    ]


def _claim(id: str, statement: str, paper: str, interval: Interval, holds: bool) -> Claim:
    return Claim(id, statement, paper, interval.mean, interval.low, interval.high, bool(holds))


def _rows(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tidy rows: one for each replicate, epoch, alignment and metric."""
    return [
        {
            "replicate": replicate,
            "epoch": epoch,
            "alignment": name,
            "metric": metric,
            "barrier": f"{barrier:.6g}",
            "endpoint_a": f"{curve['endpoints'][metric]['a'][end if name == 'at_end' else i]:.6g}",
            "endpoint_b": f"{curve['endpoints'][metric]['b'][end if name == 'at_end' else i]:.6g}",
        }
        for replicate, curve in enumerate(curves)
        for end in [len(curve["epochs"]) - 1]
        for name, by_metric in curve["barriers"].items()
        for metric, barriers in by_metric.items()
        for i, (epoch, barrier) in enumerate(zip(curve["epochs"], barriers, strict=True))
    ]


def _report(results: Results, output_dir: pathlib.Path, reporter: Reporter) -> None:
    """Prints the table of epochs, the claims and the paths."""
    summary, replicates = results.summary, len(results.curves)

    def cell(series: Mapping[str, list[float]], i: int, *, percent: bool) -> str:
        scale, digits = (100, 1) if percent else (1, 2)
        spread = series["deviation"][i]
        text = f"{scale * series['mean'][i]:.{digits}f}"
        # JSON has no NaN: a single replicate's spread is None when it was read back.
        if spread is None or spread != spread:
            return text
        # At most eight characters a cell, so that the table fits 80 columns.
        spread *= scale
        return f"{text}±{spread:.{digits if spread < 9.95 else 0}f}".replace(
            "±0.", "±." if not percent else "±0."
        )

    rows = []
    for i, epoch in enumerate(summary["epochs"]):
        ends = [100 * summary["endpoints"]["test_error"][side]["mean"][i] for side in "ab"]
        barriers = summary["barriers"]
        rows.append(
            [
                str(epoch),
                "{:.1f}/{:.1f}".format(*ends),
                *(
                    cell(barriers[n]["test_loss"], i, percent=False)
                    for n in ("unaligned", "end", "same_epoch")
                ),
                *(cell(barriers[n]["test_error"], i, percent=True) for n in ALIGNMENTS),
            ]
        )
    losses, errors = ["none", "P_end", "P_t"], ["none", "P_end", "P_t", "P_t@end"]
    header = ["\nepoch", "test err\nA/B", *(f"loss\n{n}" for n in losses), *(f"error\n{n}" for n in errors)]
    title = (
        f"Test error of A and B (%), then loss and error (%) barriers: mean±sd of {replicates} "
        f"pair{'s' if replicates > 1 else ''}"
    )
    reporter.say("\n" + title)
    reporter.table(header, rows)
    reporter.say("none: as trained; P_end: permutation from the last epoch; P_t: from that epoch;")
    reporter.say("P_t@end: P_t applied at the last epoch\n")
    reporter.claims(results.claims)
    spent = ", ".join(f"{phase} {seconds:.0f} s" for phase, seconds in results.seconds.items())
    reporter.say(f"\ncomputing time: {spent}")
    for name in ("results.json", "barriers.csv", "training_trajectories.png"):
        reporter.say(str(output_dir / name))
