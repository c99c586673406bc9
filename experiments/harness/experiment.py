"""The loop that all experiments share: train pairs of networks, measure them, write and draw the results."""

import dataclasses
import functools
import io
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar, Generic, TypeAlias, TypeVar

import jax

from experiments.harness.algorithms import ALGORITHMS
from experiments.harness.console import Reporter
from experiments.harness.deadline import Deadline, OutOfTime
from experiments.harness.disk import check_resources
from experiments.harness.figures import Target
from experiments.harness.networks import Networks, Pair, dataset_of
from experiments.harness.paths import infer_model_spec, network_shapes
from experiments.harness.record import PairRecord
from experiments.harness.results import (
    WAY_OUT,
    Claim,
    PartialResults,
    Results,
    Schema,
    Seconds,
    count_pairs,
    merged,
    open_results,
    write_csv,
)
from experiments.harness.serialisation import from_json, to_json
from rebasin.barrier import MetricsFn, classification_metrics
from rebasin.errors import ConfigError, problem_list
from rebasin.files import write_whole
from rebasin.models import build_model
from rebasin.spec import PermutationSpec
from rebasin.training.data import Dataset
from rebasin.training.lock import locked
from rebasin.training.loop import build_apply
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

__all__ = ["Config", "Experiment", "Measure", "Setup", "describe_run"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
    """Everything that the results of an experiment depend on; the base of the configs of all experiments.

    Attributes:
      recipe: how networks are trained.
      replicates: number of independent pairs; pair r has the seeds ``seed + 2r`` and ``seed + 2r + 1``, and
        so on for experiments whose pairs have more networks.
      seed: the first of the networks' seeds.
      num_alphas: number of points on each path, both ends included.
      num_match: number of training examples, without augmentation, for matching methods that need data;
        `None` for all.
      algorithm: how weights and activations are matched, a name in `ALGORITHMS`.

    Raises:
      ConfigError: listing every field whose value cannot work.
    """

    # Whether ½ must be among the alphas.
    needs_midpoint: ClassVar[bool] = False

    # What a replicate is called: some experiments measure more than two networks together.
    unit: ClassVar[str] = "pair"

    recipe: Recipe
    replicates: int
    seed: int
    num_alphas: int
    num_match: int | None
    algorithm: str = "best"

    def __post_init__(self) -> None:
        problems = self.problems()
        if problems:
            raise ConfigError(problem_list("this experiment cannot work:", problems))

    def problems(self) -> list[str]:
        """Return one line for each value that cannot work; subclasses add lines for their own fields."""
        problems = []
        if self.replicates < 1:
            problems.append(f"replicates: wanted at least 1, got {self.replicates}")
        if self.needs_midpoint and (self.num_alphas < 3 or self.num_alphas % 2 == 0):
            problems.append(f"num_alphas: wanted an odd number from 3 on, got {self.num_alphas}")
        elif self.num_alphas < 2:
            problems.append(f"num_alphas: wanted at least 2, both ends of the path, got {self.num_alphas}")
        if self.algorithm not in ALGORITHMS:
            problems.append(f"algorithm: wanted one of {', '.join(ALGORITHMS)}, got {self.algorithm!r}")
        return problems

    @property
    def pairs(self) -> list[Pair]:
        """The pairs of networks, in the order of the records."""
        each = self.networks_each
        firsts = range(self.seed, self.seed + each * self.replicates, each)
        return [Pair(self.recipe, tuple(range(first, first + each))) for first in firsts]

    @property
    def networks_each(self) -> int:
        """Number of networks that are measured together in one replicate."""
        return 2

    @property
    def described(self) -> str:
        """Model, width and data of the networks, for titles."""
        return f"{self.recipe.model} ({self.width}) on {self.recipe.dataset}"

    @property
    def width(self) -> str:
        """The width of the networks, in words."""
        return f"width {self.recipe.width}"

    @property
    def wanted_epochs(self) -> tuple[int, ...]:
        """Epochs at which networks are measured."""
        return (self.recipe.epochs,)

    def epochs_of(self, pair: Pair) -> tuple[int, ...]:
        """Return the epochs at which one pair is measured, which may depend on its recipe."""
        return self.wanted_epochs

    @property
    def spawn_epochs(self) -> tuple[int, ...]:
        """Epochs at which children leave each pair."""
        return ()

    @property
    def further_networks(self) -> int:
        """Number of networks of each pair, beside the pair and its children, whose last epoch is stored."""
        return 0

    @property
    def wanted_parts(self) -> tuple[Any, ...]:
        """The key of each part in which a pair is measured, in order; none where it is measured whole."""
        return ()

    def check_network(self, recipe: Recipe, shapes: Any) -> None:
        """Raise `ConfigError` if networks of a recipe cannot be measured, before anything is trained.

        Args:
          recipe: recipe of one of the pairs.
          shapes: shapes of the variables of its networks.
        """

    def is_complete(self, record: PairRecord[float]) -> bool:
        """Say whether a stored record has all its parts."""
        return record.part_keys == self.wanted_parts

    def misfits(self, record: Any, pair: Pair) -> list[str]:
        """Return one line for each way in which a stored record cannot be one of a pair of this config."""
        problems = []
        if record.seeds != pair.seeds:
            problems.append(f"seeds: wanted {list(pair.seeds)}, got {list(record.seeds)}")
        found = record.part_keys
        if found != tuple(key for key in self.wanted_parts if key in found):
            problems.append(
                f"{record.parts[0]}: wanted some of {list(self.wanted_parts)} in order, got {list(found)}"
            )
        return problems


C = TypeVar("C", bound=Config)
R = TypeVar("R", bound=PairRecord[float])
S = TypeVar("S")

# (pair, its trajectories, the record so far or None) -> the record, again after each part that is worth
# storing.
Measure: TypeAlias = Callable[[Pair, list[Trajectory], R | None], Iterator[R]]


@dataclasses.dataclass(frozen=True)
class Setup(Generic[C]):
    """What an experiment measures with.

    A run over several architectures has one setup, and one measure, for each.

    Attributes:
      config: the config of the run.
      dataset: the data.
      model: the Flax module of all networks of one architecture.
      spec: symmetries of the model.
      networks: finds and trains networks.
      seconds: counts computing time.
      reporter: shows progress.
      deadline: ends the measurement between two steps when time is up.
    """

    config: C
    dataset: Dataset
    model: Any
    spec: PermutationSpec
    networks: Networks
    seconds: Seconds
    reporter: Reporter
    deadline: Deadline = dataclasses.field(default_factory=Deadline)

    def for_recipe(self, recipe: Recipe) -> "Setup[C]":
        """Return the same setup for networks of another recipe, such as one of another width."""
        model, dataset = _build_model(recipe, self.dataset), dataset_of(recipe.dataset, self.dataset)
        spec = infer_model_spec(model, dataset)
        return dataclasses.replace(self, dataset=dataset, model=model, spec=spec)

    @functools.cached_property
    def apply_fn(self) -> Callable[[Any, Any], jax.Array]:
        """``apply_fn(params, images) -> logits``, one function for all pairs, so that it is traced once."""
        return build_apply(self.model, self.dataset)

    @functools.cached_property
    def metrics_fn(self) -> MetricsFn:
        """``metrics_fn(params, batch) -> {"loss": [n], "error": [n]}``."""
        return classification_metrics(self.apply_fn)

    @property
    def match_data(self) -> Any:
        """The training examples for matching methods, a stratified subset without augmentation."""
        size = len(self.dataset.train.labels)
        return self.dataset.take(num_train=min(self.config.num_match or size, size)).train


@dataclasses.dataclass(frozen=True, kw_only=True)
class Experiment(Generic[C, R, S]):
    """How pairs of networks are measured, and what is made of the measurements.

    Every function but `build_measure` sees only what ``results.json`` holds.

    Attributes:
      schema: name of the binary, and the types of its config, records and summary.
      build_measure: makes the function that measures a pair.
      summarise: ``(config, records) -> summary``.
      judge: ``(config, records) -> claims``; `None` for an experiment that makes no claims.
      select: ``(config, records) -> (config, records, missing)``: of an unfinished run, a smaller config with
        records that can be summed up, and what is missing; its config is `None` where nothing can be. `None`
        for an experiment of which only finished runs are drawn.
      csv: name of the file of tidy rows.
      rows: makes the tidy rows.
      figures: function that draws each figure, by name of its file.
      report: prints the tables.
      keep: what stays on disk of networks unless the user says otherwise, see `KEEP` of the networks.
    """

    schema: Schema[C, R, S]
    build_measure: Callable[[Setup[C]], Measure[R]]
    summarise: Callable[[C, Sequence[R]], S]
    judge: Callable[[C, Sequence[R]], list[Claim]] | None = None
    select: Callable[[C, Sequence[R]], tuple[C | None, list[R], list[str]]] | None = None
    csv: str
    rows: Callable[[Results[C, R, S]], Iterable[Mapping[str, Any]]]
    figures: Mapping[str, Callable[[Results[C, R, S], Target], None]]
    report: Callable[[Results[C, R, S], Reporter], None]
    keep: str = "all"

    @property
    def name(self) -> str:
        """Name of the binary."""
        return self.schema.experiment

    def load(self, path: pathlib.Path) -> Results[C, R, S]:
        """Read a ``results.json`` of this experiment; raise `ConfigError` for any other or damaged file."""
        results = Results.load(path, self.schema)
        _check_records(path, results)
        return results

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
        deadline: Deadline | None = None,
    ) -> Results[C, R, S]:
        """Train the networks, measure all pairs, and write results, rows and figures.

        A run that is out of time stores and draws what it has, and is left unfinished.

        Args:
          config: what to do.
          dataset: the data.
          output_dir: folder that gets ``results.json``, the CSV and the figures.
          runs_dir: folder in which trained networks are kept, and found again by recipe and seed.
          keep: what stays on disk of the networks trained here; by default what the experiment says.
          resume: whether to go on with an unfinished run, without measuring again what is measured.
          reporter: shows progress and tables.
          deadline: ends the run between two steps when time is up.

        Returns:
          The finished results, or those so far of a run that is out of time. Results of an equal config
          that are finished already are only drawn anew.

        Raises:
          ConfigError: the output folder holds another config, damaged results, or an unfinished run without
            `resume`; or the networks are too large for the memory or the disk.
          FolderInUseError: another process is writing to the output folder.
          OSError: a file cannot be written. What was measured before is stored.
        """
        reporter = reporter or Reporter()
        output_dir.mkdir(parents=True, exist_ok=True)
        with locked(output_dir):
            results = open_results(output_dir, self.schema, config, resume=resume)
            path = output_dir / "results.json"
            reporter.wrap(f"{self.name}: {describe_run(config)}")
            _check_records(path, results)
            if not results.finished:
                folders = {"runs_dir": runs_dir, "output_dir": output_dir, "keep": keep or self.keep}
                deadline = deadline or Deadline()
                shared = {"reporter": reporter, "seconds": results.seconds, "deadline": deadline}
                networks = Networks(dataset, **folders, **shared)
                try:
                    self._measure(dataset, networks, results, reporter, path, deadline)
                except OutOfTime as stop:
                    reporter.wrap(f"stopped: {stop}. What was measured is stored: go on with --resume")
            self.conclude(results, output_dir, reporter)
        return results

    def merge(
        self, paths: Sequence[pathlib.Path], *, output_dir: pathlib.Path, reporter: Reporter | None = None
    ) -> Results[C, R, S]:
        """Combine runs that differ in nothing but their pairs, and write and draw what one run would.

        Args:
          paths: the ``results.json`` of each run; unfinished ones give the pairs that they have.
          output_dir: folder that gets the combined ``results.json``, the CSV and the figures.
          reporter: shows tables.

        Returns:
          The combined results, finished if all pairs are complete.

        Raises:
          ConfigError: there are no files, a file is damaged or of another experiment or config, the pairs are
            not those of one run, or the output folder holds results of another config.
          FolderInUseError: another process is writing to the output folder.
        """
        reporter = reporter or Reporter()
        if not paths:
            raise ConfigError("--merge: wanted the results.json of each run, got no file")
        results = merged(paths, [self.load(path) for path in paths])
        if all(results.config.is_complete(record) for record in results.records):
            self.sum_up(results)
        output_dir.mkdir(parents=True, exist_ok=True)
        with locked(output_dir):
            open_results(output_dir, self.schema, results.config, resume=True)
            reporter.wrap(f"{self.name}: {describe_run(results.config)}")
            results.save(output_dir / "results.json")
            self.conclude(results, output_dir, reporter)
        return results

    def conclude(self, results: Results[C, R, S], output_dir: pathlib.Path, reporter: Reporter) -> None:
        """Draw results and print their tables and claims; of unfinished ones, as far as they go."""
        files = ["results.json"]
        shown = results if results.finished else self.partial(results)
        if shown is not None:
            self.draw(shown, output_dir)
            self.report(shown, reporter)
            files += [self.csv, *self.figures]
        reporter.conclude(shown or results, [output_dir / name for name in files])

    def partial(self, results: Results[C, R, S]) -> PartialResults[C, R, S] | None:
        """Return what is there of an unfinished run, with claims, or `None` if that cannot be drawn."""
        if self.select is None or not results.records:
            return None
        config, records, missing = self.select(results.config, results.records)
        if config is None:
            return None
        shown = PartialResults(
            results.experiment, config, results.environment, results.seconds, records, missing=tuple(missing)
        )
        self.sum_up(shown)
        return shown

    def sum_up(self, results: Results[C, R, S]) -> None:
        """Add summary and claims to results whose records are complete."""
        config, records = results.config, results.records
        results.summary = _as_stored(self.schema.summary, self.summarise(config, records))
        claims = self.judge(config, records) if self.judge else []
        results.claims = [_as_stored(Claim, claim) for claim in claims]

    def draw(self, results: Results[C, R, S], output_dir: pathlib.Path) -> None:
        """Write the tidy rows and the figures of finished results, each file whole or not at all."""
        write_csv(output_dir / self.csv, self.rows(results))
        for name, draw in self.figures.items():
            image = io.BytesIO()
            draw(results, image)
            write_whole(output_dir / name, image.getvalue())

    def _measure(
        self,
        dataset: Dataset,
        networks: Networks,
        results: Results[C, R, S],
        reporter: Reporter,
        path: pathlib.Path,
        deadline: Deadline,
    ) -> None:
        """Add to `results` everything that they lack, and store them after each part."""
        config, records = results.config, results.records
        pairs = config.pairs
        done = [i for i, record in enumerate(records) if config.is_complete(record)]
        left = {i: pair for i, pair in enumerate(pairs) if i not in done}
        for recipe in {_architecture(pair.recipe): pair.recipe for pair in left.values()}.values():
            own_data = dataset_of(recipe.dataset, dataset)
            config.check_network(recipe, network_shapes(_build_model(recipe, dataset), own_data)[0])
        check_resources(
            networks, list(left.values()), config.wanted_epochs, config.spawn_epochs, config.further_networks
        )
        # The first thing that is written says what the folder is of; a run that is refused leaves nothing.
        results.save(path)
        # A killed run may have stored its last measurement and not yet deleted the networks.
        for i in done:
            networks.release(pairs[i])
        model = _build_model(config.recipe, dataset)
        spec = infer_model_spec(model, dataset)
        setup = Setup(config, dataset, model, spec, networks, results.seconds, reporter, deadline)
        measures: dict[tuple[Any, ...], Measure[R]] = {}
        for i, pair in left.items():
            kind = _architecture(pair.recipe)
            if kind not in measures:
                own = setup if kind == _architecture(config.recipe) else setup.for_recipe(pair.recipe)
                measures[kind] = self.build_measure(own)
            trained = networks.parents(pair, config.epochs_of(pair))
            begun = records[i] if i < len(records) else None
            for record in measures[kind](pair, trained, begun):
                records[i : i + 1] = [_as_stored(self.schema.record, record)]
                results.save(path)
            networks.release(pair)
        self.sum_up(results)
        results.save(path)


def describe_run(config: Config) -> str:
    """Say what networks a run is about, and how they are matched.

    Examples:
      >>> recipe = Recipe("mnist", "mlp", width=64, epochs=9, warmup_epochs=1)
      >>> describe_run(Config(recipe=recipe, replicates=2, seed=0, num_alphas=5, num_match=None))
      'mlp (width 64) on mnist, 2 pairs of networks, algorithm best'
    """
    pairs = count_pairs(config.replicates, unit=config.unit)
    return f"{config.described}, {pairs}, algorithm {config.algorithm}"


def _check_records(path: pathlib.Path, results: Results[Any, Any, Any]) -> None:
    """Raise `ConfigError` where the records of a file are not those of its config."""
    config, records = results.config, results.records
    pairs = config.pairs
    problems = [
        f"records.{i}.{problem}"
        for i, (record, pair) in enumerate(zip(records, pairs, strict=False))
        for problem in config.misfits(record, pair)
    ]
    if len(records) > len(pairs):
        problems.append(f"records: wanted {len(pairs)} at most, got {len(records)}")
    begun = [i for i, record in enumerate(records) if not config.is_complete(record)]
    if not problems and begun and results.finished:
        problems.append(f"records.{begun[0]}: parts are missing, and yet the run is finished")
    if results.finished and len(records) < len(pairs):
        problems.append(f"records: wanted {len(pairs)} in a finished run, got {len(records)}")
    if problems:
        raise ConfigError(problem_list(f"{path} is damaged ({WAY_OUT}):", problems))


def _architecture(recipe: Recipe) -> tuple[Any, ...]:
    """Return what networks need to share so that they are measured by one compiled program."""
    return recipe.model, recipe.dataset, recipe.width


def _build_model(recipe: Recipe, dataset: Dataset) -> Any:
    return build_model(recipe.model, width=recipe.width, num_classes=dataset.num_classes)


def _as_stored(kind: Any, value: Any) -> Any:
    """Return a value as it is read back from the file, so that a resumed run ends with the same numbers."""
    return from_json(kind, to_json(value), kind.__name__)
