"""One permutation for two whole training trajectories (arXiv 2404.06498, section 5.1, appendices E and H.1).

Networks A_t and B_t are trained from different seeds. The permutation P_s, found at epoch s, is applied to
B_t and the segment to A_t is measured, for chosen epochs s and all recorded epochs t; s = end is the paper's
P_end. P_t is also measured at its own epoch t and at the end of training.
"""

import dataclasses
import pathlib
from typing import Any

from experiments.console import Reporter
from experiments.matchers import build_matcher, check_methods
from experiments.networks import Networks
from experiments.pair_analysis import PairAnalysis
from experiments.presets import Thresholds
from experiments.results import Results, open_results, plain, write_csv
from experiments.segments import Meter, infer_model_spec
from experiments.trajectory_claims import judge
from experiments.trajectory_figures import draw_fixed_permutations, draw_permutations, draw_trajectories
from experiments.trajectory_report import report, summarise_curves, tidy_rows
from rebasin.data import Dataset
from rebasin.errors import ConfigError, problem_list
from rebasin.models import build_model
from rebasin.recipes import Recipe

__all__ = ["Config", "run"]

EXPERIMENT = "training_trajectories"


@dataclasses.dataclass(frozen=True)
class Config:
    """Everything that the results depend on; written into ``results.json``.

    Attributes:
      recipe: how networks are trained.
      replicates: independent pairs of networks; pair r has the seeds ``seed + 2r`` and ``seed + 2r + 1``.
      seed: the first of the seeds, and that of the matching.
      methods: names of matching methods, see `experiments.matchers`.
      epochs: recorded epochs t; the last must be the recipe's.
      match_epochs: recorded epochs s whose permutations are applied at every t; with the last.
      num_alphas: points on each segment.
      num_eval: examples of each split on which segments are measured, `None` for all.
      num_match: training examples on which activations are matched, `None` for all.
      thresholds: for the claims.
    """

    recipe: Recipe
    replicates: int
    seed: int
    methods: tuple[str, ...]
    epochs: tuple[int, ...]
    match_epochs: tuple[int, ...]
    num_alphas: int
    num_eval: int | None
    num_match: int | None
    thresholds: Thresholds

    def __post_init__(self) -> None:
        problems = check_methods(self.methods)
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if self.num_alphas < 2:
            problems.append(f"num_alphas: wanted at least 2, both ends of the segment, got {self.num_alphas}")
        last = self.recipe.epochs
        if list(self.epochs) != sorted(set(self.epochs)) or not self.epochs or self.epochs[0] < 0:
            problems.append(f"epochs: wanted ascending epochs from 0 on, got {list(self.epochs)}")
        elif self.epochs[-1] != last:
            problems.append(f"epochs: wanted the recipe's last, {last}, at the end, got {self.epochs[-1]}")
        if list(self.match_epochs) != sorted(set(self.match_epochs) & set(self.epochs) | {last}):
            problems.append(
                f"match_epochs: wanted ascending ones of epochs, with the last, got {list(self.match_epochs)}"
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
    keep: str = "all",
    resume: bool = False,
    reporter: Reporter | None = None,
) -> Results:
    """Trains the networks, measures all segments, and writes results, table and figures.

    Args:
      config: what to do.
      dataset: the data.
      output_dir: gets ``results.json``, ``barriers.csv`` and three figures.
      runs_dir: where trained networks are kept, and found again by recipe and seed.
      keep: what stays on disk of the networks trained here, see `experiments.networks.KEEP`.
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
    figures = {
        "training_trajectories.png": draw_trajectories,
        "fixed_permutations.png": draw_fixed_permutations,
        "permutations.png": draw_permutations,
    }
    for name, draw in figures.items():
        draw(results, output_dir / name)
    report(results, reporter, [output_dir / name for name in ("results.json", "barriers.csv", *figures)])
    return results


def _measure_all(
    config: Config,
    dataset: Dataset,
    networks: Networks,
    results: Results,
    path: pathlib.Path,
    reporter: Reporter,
) -> None:
    """Fills `results` with all replicates that it lacks, their summary and the claims."""
    model = build_model(config.recipe.model, width=config.recipe.width, num_classes=dataset.num_classes)
    meter = Meter(model, dataset, num_alphas=config.num_alphas, num_eval=config.num_eval)
    pairs = [(config.seed + 2 * r, config.seed + 2 * r + 1) for r in range(config.replicates)]
    networks.say_disk_use(pairs[len(results.curves) :], config.epochs)
    spec, matchers = None, {}
    for seeds in pairs[len(results.curves) :]:
        pair = networks.parents(seeds, config.epochs)
        if spec is None:
            spec = infer_model_spec(model, pair[0].last, dataset)
            options = {"seed": config.seed, "num_match": config.num_match}
            matchers = {m: build_matcher(m, spec, model, dataset, **options) for m in config.methods}
        analysis = PairAnalysis(config.epochs, config.match_epochs, spec, matchers, meter, results)
        record = analysis.measure(pair, reporter, f"measure seeds {seeds[0]} and {seeds[1]}")
        results.curves.append(plain({"seeds": list(seeds), **record}))
        results.save(path)
        networks.release(seeds)
    results.summary = plain(summarise_curves(results.config, results.curves))
    results.claims = judge(results.config, results.curves)
    results.save(path)
