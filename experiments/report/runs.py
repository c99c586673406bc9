"""The results that a report is made of: every ``results.json`` below a folder."""

import dataclasses
import json
import pathlib
from collections.abc import Mapping
from typing import Any

from experiments.harness.results import Claim, Results, Schema
from experiments.report.registry import BINARIES, DATASETS, MODELS
from experiments.report.settings import command_of, program, relative_name
from rebasin.errors import ConfigError

__all__ = ["Found", "Run", "find_runs"]


@dataclasses.dataclass(frozen=True)
class Run:
    """One ``results.json`` and the figures beside it.

    Attributes:
      folder: name of its folder below the root, beginning with the root's own name.
      binary: name of the binary that wrote it.
      config: every option.
      claims: the paper's claims with their verdicts; empty while the run is unfinished.
      environment: versions, device and commit.
      seconds: computing time by phase.
      summary: means and spreads as they stand in the file; `None` while the run is unfinished.
      images: the figures, in the order of the registry.
      command: the command that gives these results, without folders.
      differences: fields of the config that no flag of today sets.
    """

    folder: str
    binary: str
    config: Mapping[str, Any]
    claims: tuple[Claim, ...]
    environment: Mapping[str, Any]
    seconds: Mapping[str, float]
    summary: Any
    images: tuple[pathlib.Path, ...]
    command: str
    differences: tuple[str, ...]

    @property
    def finished(self) -> bool:
        """Whether all replicates are measured."""
        return self.summary is not None

    @property
    def algorithm(self) -> str:
        """How weights and activations are matched; files without the entry are of ``best``."""
        return self.config.get("algorithm", "best")

    @property
    def network(self) -> tuple[str, str]:
        """Model and dataset, as in `experiments.report.registry.Part.models`."""
        recipe = self.config["recipe"]
        return recipe["model"], recipe["dataset"]

    @property
    def described(self) -> str:
        """Model, widths and data in words, such as ``MLP width 128, digits``."""
        recipe = self.config["recipe"]
        widths = self.config.get("widths") or (recipe["width"],)
        width = f"{widths[0]}–{widths[-1]}" if len(widths) > 1 else f"{widths[0]}"
        model, dataset = (
            names.get(recipe[name], recipe[name])
            for names, name in ((MODELS, "model"), (DATASETS, "dataset"))
        )
        images = f" ({recipe['num_train']:,} images)" if recipe["num_train"] else ""
        return f"{model} width {width}, {dataset}{images}"

    @property
    def short(self) -> str:
        """The network in a few words, such as ``MLP w128, digits``."""
        return self.described.replace(" width ", " w").split(" (")[0]

    @property
    def total_seconds(self) -> float:
        """Computing time over all phases."""
        return sum(self.seconds.values())


@dataclasses.dataclass(frozen=True)
class Found:
    """What lies below a folder of results.

    Attributes:
      runs: all runs that can be read, by folder.
      damaged: one line for each file that cannot be.
    """

    runs: tuple[Run, ...]
    damaged: tuple[str, ...]

    def of(self, binary: str) -> list[Run]:
        """Return the runs whose results are those of a binary."""
        return [run for run in self.runs if run.binary == binary]


def find_runs(root: pathlib.Path) -> Found:
    """Read every ``results.json`` in a folder and in the folders in it.

    Raises:
      ConfigError: there is no such folder, or it holds no results.
    """
    if not root.is_dir():
        raise ConfigError(f"{root} is no folder; name one with results of experiments")
    runs, damaged = [], []
    for path in sorted({*root.glob("results.json"), *root.glob("*/results.json")}):
        try:
            runs.append(_read(path, root))
        except ConfigError as error:
            damaged.append(str(error).replace(str(path), f"{relative_name(path, root)}"))
    if not runs and not damaged:
        raise ConfigError(f"{root} holds no results.json of an experiment")
    return Found(tuple(runs), tuple(damaged))


def _read(path: pathlib.Path, root: pathlib.Path) -> Run:
    try:
        binary = json.loads(path.read_bytes())["experiment"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ConfigError(f"{path} is no results.json of this program") from error
    if BINARIES.get(binary) is None:
        raise ConfigError(f"{path} is of the experiment {binary!r}, which is not known")
    schema: Schema[dict[str, Any], Any, Any] = Schema(binary, dict[str, Any], Any, Any)  # type: ignore[arg-type]
    results = Results.load(path, schema)
    names = [name for name in BINARIES[binary].figures if (path.parent / name).is_file()]
    arguments, differences = command_of(binary, results.config)
    folder = relative_name(path.parent, root)
    return Run(
        folder=folder,
        binary=binary,
        config=results.config,
        claims=tuple(results.claims),
        environment=results.environment,
        seconds=results.seconds,
        summary=results.summary,
        images=tuple(path.parent / name for name in names),
        command=program(binary, [*arguments, f"--output_dir={folder}"]),
        differences=tuple(differences),
    )
