"""Children of two networks, aligned by the permutation of their parents (arXiv 2404.06498, section 5.1).

The instability analysis of Frankle et al. 2020: children leave their parent at epoch t and train to the end
with data orders of their own. Siblings A¹ and A² are compared as they are, children A¹ and B¹ of different
parents under P_end, which was found for the parents at the end of training.
"""

import dataclasses
import pathlib
import time
from collections.abc import Mapping
from typing import Any

from experiments.console import Reporter
from experiments.instability_figure import draw_instability
from experiments.instability_report import judge, report, summarise_curves, tidy_rows
from experiments.matchers import Matcher, build_matcher, check_methods
from experiments.networks import Networks
from experiments.results import Results, open_results, plain, write_csv
from experiments.segments import METRICS, Meter, Segments, barriers, endpoints, infer_model_spec
from rebasin.data import Dataset
from rebasin.errors import ConfigError, problem_list
from rebasin.models import build_model
from rebasin.permutation import Permutation
from rebasin.recipes import Recipe
from rebasin.trajectory import Trajectory

__all__ = ["Config", "run"]

EXPERIMENT = "sgd_instability"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recipe: how parents and children are trained.
      replicates: independent pairs of parents; pair r has the seeds ``seed + 2r`` and ``seed + 2r + 1``.
      seed: the first of the seeds, and that of the matching.
      methods: names of matching methods, see `experiments.matchers`.
      epochs: epochs at which children leave their parents, all before the last.
      onset_at_most: test error barrier, a fraction, up to which two networks count as linearly connected.
        Frankle et al. call networks stable below 2 %.
      num_alphas: points on each segment.
      num_eval: examples of each split on which segments are measured, `None` for all.
      num_match: training examples on which activations are matched, `None` for all.
    """

    recipe: Recipe
    replicates: int
    seed: int
    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    onset_at_most: float
    num_alphas: int
    num_eval: int | None
    num_match: int | None

    def __post_init__(self) -> None:
        problems = check_methods(self.methods)
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if self.num_alphas < 2:
            problems.append(f"num_alphas: wanted at least 2, both ends of the segment, got {self.num_alphas}")
        if not 0 <= self.onset_at_most < 1:
            problems.append(f"onset_at_most: wanted a fraction, got {self.onset_at_most}")
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs) & set(range(last))) or not self.epochs:
            problems.append(f"epochs: wanted ascending epochs from 0 to {last - 1}, got {list(self.epochs)}")
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
    keep: str = "ends",
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Trains parents and children, measures all segments, and writes results, table and figure.

    Args:
      config: what to do.
      dataset: the data.
      output_dir: gets ``results.json``, ``barriers.csv`` and ``sgd_instability.png``.
      runs_dir: where trained networks are found by recipe and seed.
      keep: what stays on disk of the networks trained here, see `experiments.networks.KEEP`.
      resume: go on with an unfinished run, at the spawn epoch that it had come to.
      reporter: shows progress and tables.

    Returns:
      The finished results. Those of an equal config that are finished already are only drawn anew.

    Raises:
      ConfigError: the output folder holds another config, or an unfinished run without `resume`.
    """
    reporter = reporter or Reporter()
    results = open_results(output_dir, EXPERIMENT, config.to_json(), resume=resume)
    if not results.finished:
        networks = Networks(
            config.recipe,
            dataset,
            runs_dir=runs_dir,
            output_dir=output_dir,
            keep=keep,
            reporter=reporter,
            results=results,
        )
        _measure_all(config, dataset, networks, results, output_dir / "results.json", reporter)
    write_csv(output_dir / "barriers.csv", tidy_rows(results))
    draw_instability(results, output_dir / "sgd_instability.png")
    names = ("results.json", "barriers.csv", "sgd_instability.png")
    report(results, reporter, [output_dir / name for name in names])
    return results


def _measure_all(
    config: Config,
    dataset: Dataset,
    networks: Networks,
    results: Results,
    path: pathlib.Path,
    reporter: Reporter,
) -> None:
    """Fills `results` with all that they lack, replicate by replicate, and stores them after each epoch."""
    model = build_model(config.recipe.model, width=config.recipe.width, num_classes=dataset.num_classes)
    meter = Meter(model, dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    pairs = [(config.seed + 2 * r, config.seed + 2 * r + 1) for r in range(config.replicates)]
    done = [curve["epochs"] == list(config.epochs) for curve in results.curves]
    begin = done.index(False) if False in done else len(done)
    networks.say_disk_use(pairs[begin:], (*config.epochs, config.recipe.epochs), spawned=config.epochs)
    for replicate in range(begin, config.replicates):
        seeds = pairs[replicate]
        pair = networks.parents(seeds, (*config.epochs, config.recipe.epochs))
        spec = infer_model_spec(model, pair[0].last, dataset)
        options = {"seed": config.seed, "num_match": config.num_match}
        matchers = {m: build_matcher(m, spec, model, dataset, **options) for m in config.methods}
        segments = Segments(meter, spec, pair[0].last, pair[1].last)
        family = _Family(pair, segments, matchers, networks, meter, results)
        if replicate == len(results.curves):
            results.curves.append(plain({"seeds": seeds, **family.parents()}))
        record = results.curves[replicate]
        with reporter.stage(f"children of seeds {seeds[0]} and {seeds[1]}", len(config.epochs)) as advance:
            for epoch in config.epochs:
                if epoch not in record["epochs"]:
                    _extend(record, epoch, plain(family.children(epoch)))
                    results.save(path)
                advance()
        networks.release(seeds)
    results.summary = plain(summarise_curves(results.config, results.curves))
    results.claims = judge(results.config, results.curves)
    results.save(path)


class _Family:
    """Two parents and their children."""

    def __init__(
        self,
        pair: list[Trajectory],
        segments: Segments,
        matchers: Mapping[str, Matcher],
        networks: Networks,
        meter: Meter,
        results: Results,
    ) -> None:
        self.pair, self.segments, self.matchers = pair, segments, matchers
        self.networks, self.meter, self.results = networks, meter, results
        self.p_end = self._match(pair[0].last, pair[1].last)

    def _match(self, params_a: Any, params_b: Any) -> Mapping[str, Permutation]:
        began = time.perf_counter()
        found = {name: match(params_a, params_b).permutation for name, match in self.matchers.items()}
        self.results.add_seconds("matching", time.perf_counter() - began)
        return found

    def parents(self) -> dict[str, Any]:
        """What the record of a replicate begins with."""
        began = time.perf_counter()
        record = {
            "epochs": [],
            "parents": {
                "endpoints": endpoints(self.segments.unaligned),
                "unaligned": barriers(self.segments.unaligned),
                **{name: barriers(self.segments.curve(p)) for name, p in self.p_end.items()},
            },
            "siblings": {metric: [] for metric in METRICS},
            "unaligned": {metric: [] for metric in METRICS},
            "children": {name: {metric: [] for metric in METRICS} for name in self.p_end},
            "at_end": {name: {metric: [] for metric in METRICS} for name in self.p_end},
        }
        self.results.add_seconds("barriers", time.perf_counter() - began)
        return record

    def children(self, epoch: int) -> dict[str, Any]:
        """Barriers of the children that part at an epoch, and of the parents under its permutation."""
        tree_a, tree_b = (trajectory[epoch] for trajectory in self.pair)
        a1, a2 = (self.networks.child(self.pair[0], tree_a, epoch, number) for number in (1, 2))
        b1 = self.networks.child(self.pair[1], tree_b, epoch, 1)
        p_t = self._match(tree_a, tree_b)
        began = time.perf_counter()
        between = Segments(self.meter, self.segments.spec, a1, b1)
        measured = {
            "siblings": barriers(self.meter(a1, a2)),
            "unaligned": barriers(between.unaligned),
            "children": {name: barriers(between.curve(p)) for name, p in self.p_end.items()},
            "at_end": {name: barriers(self.segments.curve(p)) for name, p in p_t.items()},
        }
        self.results.add_seconds("barriers", time.perf_counter() - began)
        return measured


def _extend(record: dict[str, Any], epoch: int, measured: Mapping[str, Any]) -> None:
    """Adds an epoch to all series of a record."""

    def append(series: Any, values: Any) -> None:
        for key, value in values.items():
            if isinstance(value, Mapping):
                append(series[key], value)
            else:
                series[key].append(value)

    append(record, measured)
    record["epochs"].append(epoch)
