"""What all experiments share: a config, the loop over pairs of networks, and the files of a finished run."""

import dataclasses
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

from experiments.harness.console import Reporter
from experiments.harness.figures import Target
from experiments.harness.networks import Networks
from experiments.harness.pairs import Pair
from experiments.harness.paths import infer_model_spec
from experiments.harness.results import Claim, Results, open_results, plain, write_csv
from rebasin.errors import ConfigError, problem_list
from rebasin.models import build_model
from rebasin.spec import PermutationSpec
from rebasin.training.data import Dataset
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

__all__ = ["Config", "Experiment", "Measure", "Setup"]

# (pair, its trajectories, the record so far or None) -> the record, again after each part worth storing.
Measure: TypeAlias = Callable[[Pair, list[Trajectory], dict[str, Any] | None], Iterator[dict[str, Any]]]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that the results of an experiment depend on; written into ``results.json``.

    Attributes:
      recipe: how networks are trained.
      replicates: independent pairs of networks; pair r has the seeds ``seed + 2r`` and ``seed + 2r + 1``.
      seed: the first of the seeds, and that of the matching.
      num_alphas: points on each segment, both ends included.
      num_match: training examples, without augmentation, for methods that need data; `None` for all.

    Raises:
      ConfigError: listing every field whose value cannot work.
    """

    # Whether ½ must be among the alphas.
    needs_midpoint: ClassVar[bool] = False

    recipe: Recipe
    replicates: int
    seed: int
    num_alphas: int
    num_match: int | None

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(problem_list("this experiment cannot work:", problems))

    def problems(self) -> list[str]:
        """One line for each value that cannot work; experiments add those of their own fields."""
        problems = []
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if self.needs_midpoint and (self.num_alphas < 3 or self.num_alphas % 2 == 0):
            problems.append(f"num_alphas: wanted an odd number from 3 on, got {self.num_alphas}")
        elif self.num_alphas < 2:
            problems.append(f"num_alphas: wanted at least 2, both ends of the segment, got {self.num_alphas}")
        return problems

    def to_json(self) -> dict[str, Any]:
        """The config as it stands in ``results.json``."""
        return dataclasses.asdict(self)

    @property
    def pairs(self) -> list[Pair]:
        """The networks behind each entry of the curves."""
        seeds = range(self.seed, self.seed + 2 * self.replicates, 2)
        return [Pair(self.recipe, (seed, seed + 1)) for seed in seeds]

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """Epochs at which networks are measured."""
        return (self.recipe.epochs,)

    @property
    def spawn_epochs(self) -> tuple[int, ...]:
        """Epochs at which three children part from each pair."""
        return ()

    def is_complete(self, record: Mapping[str, Any]) -> bool:
        """Whether a stored record, which `pairs` may leave in parts, has all of them."""
        return True


C = TypeVar("C", bound=Config)


@dataclasses.dataclass(frozen=True)
class Setup(Generic[C]):
    """What an experiment measures with."""

    config: C
    dataset: Dataset
    model: Any
    spec: PermutationSpec
    networks: Networks
    results: Results
    reporter: Reporter


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Generic[C]):
    """How pairs of networks are measured, and what is made of it.

    All but `build_measure` see what ``results.json`` holds and nothing else.

    Attributes:
      name: of the binary, and in ``results.json``.
      build_measure: makes the function that measures a pair.
      summarise: ``(config, curves) -> summary``.
      judge: ``(config, curves) -> claims``; without it there are none.
      csv: name of the file of tidy rows.
      rows: the tidy rows.
      figures: what draws each figure, by name of file.
      report: prints the tables.
      keep: what stays on disk of networks where nothing else is said, see `networks.KEEP`.
    """

    name: str
    build_measure: Callable[[Setup[C]], Measure]
    summarise: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], dict[str, Any]]
    judge: Callable[[Mapping[str, Any], Sequence[Mapping[str, Any]]], list[Claim]] | None = None
    csv: str
    rows: Callable[[Results], Iterable[Mapping[str, Any]]]
    figures: Mapping[str, Callable[[Results, Target], None]]
    report: Callable[[Results, Reporter], None]
    keep: str = "all"

    def run(
        self,
        config: C,
        dataset: Dataset,
        *,
        output_dir: pathlib.Path,
        runs_dir: pathlib.Path,
        keep: str | None = None,
        resume: bool = False,
        reporter: Reporter | None = None,
    ) -> Results:
        """Trains the networks, measures all pairs, and writes results, rows and figures.

        Args:
          config: what to do.
          dataset: the data.
          output_dir: gets ``results.json``, the CSV and the figures.
          runs_dir: where trained networks are kept, and found again by recipe and seed.
          keep: what stays on disk of the networks trained here; by default what the experiment says.
          resume: go on with an unfinished run; what is measured is not measured again.
          reporter: shows progress and tables.

        Returns:
          The finished results. Those of an equal config that are finished already are only drawn anew.

        Raises:
          ConfigError: the output folder holds another config, or an unfinished run without `resume`.
        """
        reporter = reporter or Reporter()
        results = open_results(output_dir, self.name, config.to_json(), resume=resume)
        paths = [output_dir / name for name in ("results.json", self.csv, *self.figures)]
        if not results.finished:
            networks = Networks(
                dataset,
                runs_dir=runs_dir,
                output_dir=output_dir,
                keep=keep or self.keep,
                reporter=reporter,
                results=results,
            )
            self._measure(config, dataset, networks, results, reporter, paths[0])
        write_csv(paths[1], self.rows(results))
        for path, draw in zip(paths[2:], self.figures.values(), strict=True):
            draw(results, path)
        self.report(results, reporter)
        reporter.conclude(results, paths)
        return results

    def _measure(
        self,
        config: C,
        dataset: Dataset,
        networks: Networks,
        results: Results,
        reporter: Reporter,
        path: pathlib.Path,
    ) -> None:
        """Fills `results` with all that they lack, storing them after each part."""
        recipe, pairs = config.recipe, config.pairs
        done = sum(config.is_complete(record) for record in results.curves)
        networks.say_disk_use(pairs[done:], config.wanted_epochs, config.spawn_epochs)
        # A killed run may have stored its last measurement and not yet dropped the networks.
        for pair in pairs[:done]:
            networks.release(pair)
        model = build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)
        spec = infer_model_spec(model, dataset)
        measure = self.build_measure(Setup(config, dataset, model, spec, networks, results, reporter))
        for i, pair in enumerate(pairs[done:], start=done):
            trained = networks.parents(pair, config.wanted_epochs)
            begun = results.curves[i] if i < len(results.curves) else None
            for record in measure(pair, trained, begun):
                # What is summed up is what the file holds, so that a resumed run ends with the same numbers.
                results.curves[i:] = [plain({"seeds": pair.seeds, **record})]
                results.save(path)
            networks.release(pair)
        results.summary = plain(self.summarise(results.config, results.curves))
        results.claims = self.judge(results.config, results.curves) if self.judge else []
        results.save(path)
