"""Every matching method on the same pairs of trained networks, before and after REPAIR.

Each method finds its permutation of network B at the end of training; the segment to A is then measured on
test data, as it is and with the statistics of every layer repaired (arXiv 2211.08403). The first row,
``none``, is the pair as it was trained.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

import rebasin
from experiments.console import Reporter
from experiments.method_figure import draw_methods
from experiments.pairs import train_networks
from experiments.results import Results, open_results, write_csv
from experiments.statistics import Interval, student_interval
from rebasin.data import Dataset, Split, normalise
from rebasin.errors import ConfigError, problem_list
from rebasin.models import build_model
from rebasin.recipes import Recipe
from rebasin.training import classification_metrics

__all__ = ["BASELINE", "Bench", "Config", "run"]

EXPERIMENT = "compare_methods"
BASELINE = "none"

# What is measured of a segment, and how it is told in table and figure.
MEASURES = ("loss_barrier", "error_barrier", "midpoint_loss", "midpoint_error")


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recipe: how networks are trained.
      replicates: independent pairs of networks; pair r has the seeds ``seed + 2r`` and ``seed + 2r + 1``.
      seed: the first of the seeds, and that of the matching.
      methods: names of matching methods.
      num_alphas: points on each segment; odd, so that ½ is among them.
      num_test: test examples on which segments are measured, `None` for all.
      num_match: training examples for methods that need data, `None` for all; without augmentation.
      num_repair: training examples on which REPAIR takes statistics.
      num_steps: gradient steps of the methods that learn a permutation.
    """

    recipe: Recipe
    replicates: int
    seed: int
    methods: tuple[str, ...]
    num_alphas: int
    num_test: int | None
    num_match: int | None
    num_repair: int
    num_steps: int

    def __post_init__(self) -> None:
        problems = []
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if self.num_alphas < 3 or self.num_alphas % 2 == 0:
            problems.append(f"num_alphas: wanted an odd number from 3 on, got {self.num_alphas}")
        if self.num_repair < 2:
            problems.append(f"num_repair: wanted at least 2 examples, got {self.num_repair}")
        unknown = [name for name in self.methods if name not in rebasin.METHODS]
        if unknown or not self.methods:
            known = ", ".join(rebasin.METHODS)
            problems.append(f"methods: wanted names among {known}, got {list(self.methods)}")
        if self.num_steps < 1:
            problems.append(f"num_steps: wanted at least 1, got {self.num_steps}")
        if problems:
            raise ConfigError(problem_list("this experiment cannot work:", problems))

    def to_json(self) -> dict[str, Any]:
        """The config as it stands in ``results.json``."""
        return dataclasses.asdict(self)


def run(
    config: Config,
    dataset: Dataset,
    *,
    output_dir: pathlib.Path,
    runs_dir: pathlib.Path,
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Trains the networks, matches them by every method, measures, and writes results, table and figure.

    Args:
      config: what to do.
      dataset: the data.
      output_dir: gets ``results.json``, ``methods.csv`` and ``compare_methods.png``.
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
    if not results.finished:
        for replicate in range(len(results.curves), config.replicates):
            seeds = (config.seed + 2 * replicate, config.seed + 2 * replicate + 1)
            trained = train_networks(
                config.recipe, dataset, seeds, runs_dir=runs_dir, reporter=reporter, results=results
            )
            bench = Bench(
                config.recipe,
                dataset,
                trained[0].last,
                trained[1].last,
                seed=config.seed,
                num_alphas=config.num_alphas,
                num_test=config.num_test,
                num_match=config.num_match,
                num_steps=config.num_steps,
            )
            record: dict[str, Any] = {"seeds": list(seeds), "methods": {}}
            with reporter.stage(f"match seeds {seeds[0]} and {seeds[1]}", 1 + len(config.methods)) as advance:
                for name in (BASELINE, *config.methods):
                    record["methods"][name] = bench.try_method(name, results, num_repair=config.num_repair)
                    advance()
            results.curves.append(record)
            results.save(output_dir / "results.json")
        results.summary = _summarise(config, results.curves)
        results.save(output_dir / "results.json")
    write_csv(output_dir / "methods.csv", _rows(results.curves))
    draw_methods(results, output_dir / "compare_methods.png")
    _report(results, output_dir, reporter)
    return results


class _Match(NamedTuple):
    """A permutation of B and how it was found."""

    permutation: rebasin.Permutation
    objective: tuple[float, float] | None
    seconds: float


class Bench:
    """One pair of networks, and all that a method may need to match it.

    Args:
      recipe: how they were trained.
      dataset: the data.
      params_a: network A.
      params_b: network B.
      seed: of the matching.
      num_alphas: points on each segment.
      num_test: test examples on which segments are measured, `None` for all.
      num_match: training examples for methods that need data, `None` for all.
      num_steps: gradient steps of the methods that learn a permutation.
    """

    def __init__(
        self,
        recipe: Recipe,
        dataset: Dataset,
        params_a: Any,
        params_b: Any,
        *,
        seed: int,
        num_alphas: int,
        num_test: int | None,
        num_match: int | None,
        num_steps: int = 100,
    ) -> None:
        self.num_steps = num_steps
        self.a, self.b = params_a, params_b
        self._seed, self._num_alphas = seed, num_alphas
        model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)

        def function(params: Any, images: Any) -> Any:
            return model.apply(params, normalise(images, dataset.mean, dataset.std))

        self.function = function
        image = jax.ShapeDtypeStruct((1, *dataset.train.images.shape[1:]), np.uint8)
        self.spec = rebasin.infer_spec(function, params_a, image)
        chosen = dataset.take(
            num_train=min(num_match or len(dataset.train.labels), len(dataset.train.labels)),
            num_test=min(num_test or len(dataset.test.labels), len(dataset.test.labels)),
        )
        self.train, self.test = jax.device_put((chosen.train, chosen.test))
        self.sweep = rebasin.build_sweep(self._metrics, num_alphas=num_alphas)

    def _metrics(self, params: Any, batch: Split) -> dict[str, jax.Array]:
        return classification_metrics(self.function(params, batch.images), batch.labels)

    def _losses(self, params: Any, batch: Split) -> jax.Array:
        return self._metrics(params, batch)["loss"]

    def try_method(self, name: str, results: Results, *, num_repair: int | None) -> dict[str, Any]:
        """Matches by one method and measures the segment that it leaves.

        Args:
          name: the method, or `BASELINE`.
          results: counts the seconds.
          num_repair: training examples on which REPAIR takes statistics; `None` leaves it out.
        """
        began = time.perf_counter()
        found = self._match(name)
        results.add_seconds("matching", time.perf_counter() - began)
        began = time.perf_counter()
        moved = rebasin.permute(self.spec, found.permutation, self.b)
        plain = self.sweep(self.a, moved, self.test)
        record = {
            "objective": found.objective,
            "seconds": found.seconds,
            "distance": _distance(self.a, moved),
            "plain": _measures(plain),
        }
        if num_repair is not None:
            record["repaired"] = _measures(self._repaired(moved, num_repair))
        results.add_seconds("barriers", time.perf_counter() - began)
        return record

    def _match(self, name: str) -> _Match:
        if name == BASELINE:
            return _Match(rebasin.identity_permutation(self.spec, self.a), None, 0.0)
        method = rebasin.METHODS[name]
        takes = (*method.needs, *method.options)
        options: dict[str, Any] = {}
        if "function" in takes:
            options = {"function": self.function, "data": self.train.images}
        elif "loss_fn" in takes:
            options = {"loss_fn": self._losses, "data": self.train, "num_steps": self.num_steps}
        key = jax.random.key(self._seed)
        began = time.perf_counter()
        result = rebasin.match(self.spec, self.a, self.b, name, key=key, **options)
        seconds = time.perf_counter() - began
        return _Match(result.permutation, (float(result.objective[0]), float(result.objective[-1])), seconds)

    def _repaired(self, moved: Any, num_repair: int) -> rebasin.BarrierCurve:
        """The segment with REPAIR at every α."""
        images = self.train.images[:num_repair]
        repair = rebasin.build_repair(self.spec, self.a, moved, self.function, images)

        def metrics(params: Any, batch: Split, correction: Any) -> dict[str, jax.Array]:
            return classification_metrics(repair.apply(params, batch.images, correction), batch.labels)

        sweep = rebasin.build_sweep(metrics, num_alphas=self._num_alphas, prepare=repair.prepare)
        return sweep(self.a, moved, self.test)


def _measures(curve: rebasin.BarrierCurve) -> dict[str, Any]:
    middle = len(curve.alphas) // 2
    return {
        "loss_barrier": curve.loss_barrier.value,
        "error_barrier": curve.error_barrier.value,
        "midpoint_loss": float(curve.loss[middle]),
        "midpoint_error": float(curve.error[middle]),
        "segment_error": curve.error.tolist(),
    }


def _distance(a: Any, b: Any) -> float:
    """‖A − P[B]‖, float64."""
    pairs = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True)
    return float(np.sqrt(sum(np.sum((np.asarray(x, np.float64) - np.asarray(y)) ** 2) for x, y in pairs)))


def _summarise(config: Config, curves: list[dict[str, Any]]) -> dict[str, Any]:
    """Mean, 95 % interval and standard deviation over replicates, for every method."""

    def over_replicates(values: list[float]) -> dict[str, float]:
        return Interval(*student_interval(values))._asdict()

    def of_method(name: str) -> dict[str, Any]:
        records = [curve["methods"][name] for curve in curves]
        summary: dict[str, Any] = {
            key: over_replicates([record[key] for record in records]) for key in ("seconds", "distance")
        }
        if name != BASELINE:
            summary["objective"] = {
                when: over_replicates([record["objective"][i] for record in records])
                for i, when in enumerate(("start", "end"))
            }
        for variant in ("plain", "repaired"):
            summary[variant] = {
                measure: over_replicates([record[variant][measure] for record in records])
                for measure in MEASURES
            }
        return summary

    return {"methods": {name: of_method(name) for name in (BASELINE, *config.methods)}}


def _rows(curves: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Tidy rows: one for each replicate, method, and with or without REPAIR."""
    return [
        {
            "replicate": replicate,
            "method": name,
            "repair": int(variant == "repaired"),
            "seconds": f"{record['seconds']:.4g}",
            "distance": f"{record['distance']:.6g}",
            "objective": "" if record["objective"] is None else f"{record['objective'][-1]:.6g}",
            **{measure: f"{record[variant][measure]:.6g}" for measure in MEASURES},
        }
        for replicate, curve in enumerate(curves)
        for name, record in curve["methods"].items()
        for variant in ("plain", "repaired")
    ]


def _report(results: Results, output_dir: pathlib.Path, reporter: Reporter) -> None:
    """Prints the table of methods and the paths."""
    count = len(results.curves)

    def cell(interval: Mapping[str, float], scale: float, digits: int) -> str:
        text = f"{scale * interval['mean']:.{digits}f}"
        return text if count < 2 else f"{text}±{scale * interval['deviation']:.{digits}f}"

    rows = []
    for name, summary in results.summary["methods"].items():
        objective = f"{summary['objective']['end']['mean']:.4g}" if name != BASELINE else "-"
        plain, repaired = summary["plain"], summary["repaired"]
        rows.append(
            [
                name,
                objective,
                f"{summary['seconds']['mean']:.2g}",
                cell(plain["loss_barrier"], 1, 2),
                cell(plain["error_barrier"], 100, 1),
                cell(repaired["loss_barrier"], 1, 2),
                cell(repaired["error_barrier"], 100, 1),
            ]
        )
    header = ["\nmethod", "own\nobjective", "\nseconds"]
    header += ["loss\nbarrier", "error\nbarrier", "loss,\nREPAIR", "error,\nREPAIR"]
    reporter.say(
        f"\nBarriers on test data, error in %: mean±sd of {count} pair{'s' * (count > 1)} of networks"
    )
    reporter.table(header, rows)
    for name in ("results.json", "methods.csv", "compare_methods.png"):
        reporter.say(str(output_dir / name))
