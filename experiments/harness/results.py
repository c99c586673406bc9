"""``results.json``: what every experiment writes, and the only thing that its figures are drawn from."""

import contextlib
import csv
import dataclasses
import hashlib
import io
import json
import pathlib
import platform
import subprocess
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any, Generic, TypeVar

import jax
import numpy as np

import rebasin
from experiments.harness.serialisation import from_json, to_json
from experiments.harness.statistics import student_interval
from rebasin.errors import ConfigError, problem_list
from rebasin.files import write_whole
from rebasin.training.recipes import Recipe

__all__ = [
    "WAY_OUT",
    "Claim",
    "PartialResults",
    "Results",
    "Schema",
    "Seconds",
    "claim",
    "count_pairs",
    "describe_environment",
    "describe_mean",
    "join_environments",
    "merged",
    "open_results",
    "write_csv",
]

SCHEMA_VERSION = 2
# The name of the hash of all other entries of the file.
_DIGEST = "sha256"
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "orbax-checkpoint")

# What to do about a file that cannot be used.
WAY_OUT = (
    "delete it and run again (networks that are trained already are found again), or choose another folder"
)

C = TypeVar("C")
R = TypeVar("R")
S = TypeVar("S")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of the paper against what was measured.

    Attributes:
      id: short name of the claim.
      statement: what should hold here, with the threshold.
      paper: what the paper reports, and where.
      measured: mean over replicates, in the unit of the statement.
      low: lower end of the 95 % interval of the mean (Student's t over independent pairs of networks).
      high: upper end of that interval.
      holds: the verdict, by the rule in `statement`.
    """

    id: str
    statement: str
    paper: str
    measured: float
    low: float
    high: float
    holds: bool


def claim(
    id: str, statement: str, paper: str, values: np.ndarray, holds: bool | None = None, *, below: bool = False
) -> Claim:
    """Judge a claim about the mean of one number for each replicate.

    Args:
      id: short name of the claim.
      statement: what should hold, with the rule.
      paper: what the paper reports.
      values: the number of each replicate, ``[replicates]``.
      holds: the verdict; by default whether the 95 % interval of the mean lies above 0.
      below: whether the interval should lie below 0 instead.
    """
    interval = student_interval(values)
    if holds is None:
        # One replicate has no interval; its sign alone decides then.
        low, high = interval[1:3] if len(values) > 1 else (interval.mean, interval.mean)
        holds = high < 0 if below else low > 0
    return Claim(id, statement, paper, interval.mean, interval.low, interval.high, bool(holds))


class Seconds(dict[str, float]):
    """Computing time by phase (training, matching, barriers), in seconds, summed over replicates."""

    def add(self, phase: str, seconds: float) -> None:
        """Count seconds towards a phase."""
        self[phase] = self.get(phase, 0.0) + seconds

    @contextlib.contextmanager
    def count(self, phase: str) -> Iterator[None]:
        """Count the time that the body of a ``with`` statement takes towards a phase."""
        began = time.perf_counter()
        yield
        self.add(phase, time.perf_counter() - began)


@dataclasses.dataclass(frozen=True)
class Schema(Generic[C, R, S]):
    """What the ``results.json`` of one experiment holds.

    Attributes:
      experiment: name of the binary.
      config: type of the config.
      record: type of the record of one pair, for example ``TrajectoryRecord[float]``.
      summary: type of the summary over pairs, for example ``TrajectoryRecord[Interval]``.
    """

    experiment: str
    config: type[C]
    record: type[R]
    summary: type[S]


@dataclasses.dataclass
class Results(Generic[C, R, S]):
    """The content of a ``results.json``.

    Attributes:
      experiment: name of the binary.
      config: every option, after the preset filled it in.
      environment: versions, device and commit.
      seconds: computing time by phase.
      records: what was measured, one record for each pair of networks; the last may still lack parts.
      summary: means and spreads over replicates; `None` while the run is unfinished.
      claims: the paper's claims; empty while the run is unfinished.
    """

    experiment: str
    config: C
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: Seconds = dataclasses.field(default_factory=Seconds)
    records: list[R] = dataclasses.field(default_factory=list)
    summary: S | None = None
    claims: list[Claim] = dataclasses.field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all replicates are measured and summed up."""
        return self.summary is not None

    def require_summary(self) -> S:
        """Return the summary of a finished run; raise `ConfigError` for an unfinished one."""
        if self.summary is None:
            raise ConfigError(f"this run of {self.experiment} is unfinished and has no summary")
        return self.summary

    def save(self, path: pathlib.Path) -> None:
        """Write the file in one step, so that a killed run leaves the last complete one."""
        content = {"schema_version": SCHEMA_VERSION, **to_json(self)}
        content["seconds"] = {phase: round(seconds, 2) for phase, seconds in self.seconds.items()}
        content[_DIGEST] = _digest(content)
        write_whole(path, f"{_layout(content)}\n".encode())

    @classmethod
    def load(cls, path: pathlib.Path, schema: Schema[C, R, S]) -> "Results[C, R, S]":
        """Read a file that `save` wrote.

        Args:
          path: the file.
          schema: what it should hold.

        Raises:
          ConfigError: the file is of another program, version or experiment, or a field does not fit.
        """
        content = _read_content(path, schema.experiment)
        kinds = {
            "experiment": str,
            "config": schema.config,
            "environment": dict[str, Any],
            "seconds": dict[str, float],
            "records": list[schema.record],
            "summary": schema.summary | None,
            "claims": list[Claim],
        }
        fields = {name: from_json(kind, content[name], f"{path}: {name}") for name, kind in kinds.items()}
        # Last, as the checks above say where the damage is. Early files of this version have no hash.
        if content.pop(_DIGEST, None) not in (None, _digest(content)):
            raise ConfigError(f"{path} is damaged: it was changed since it was written; {WAY_OUT}")
        return cls(**{**fields, "seconds": Seconds(fields["seconds"])})


@dataclasses.dataclass
class PartialResults(Results[C, R, S]):
    """What is there of an unfinished run, as results of a smaller config that can be drawn.

    Attributes:
      missing: what is missing, one line for each thing.
    """

    missing: tuple[str, ...] = ()


def count_pairs(replicates: int, what: str = "networks", *, unit: str = "pair") -> str:
    """Say how many pairs there are, for example ``"3 pairs of networks"``."""
    return f"{replicates} {unit}{'s' * (replicates > 1)} of {what}"


def describe_mean(replicates: int, what: str = "networks", *, unit: str = "pair") -> str:
    """Say what a table shows, for example ``"mean±sd of 3 pairs of networks"``; one pair has no spread."""
    return "mean±sd of " * (replicates > 1) + count_pairs(replicates, what, unit=unit)


def open_results(
    directory: pathlib.Path, schema: Schema[C, R, S], config: C, *, resume: bool
) -> Results[C, R, S]:
    """Find or begin the results of a run in its output folder.

    Args:
      directory: the output folder.
      schema: what the results of the experiment hold.
      config: every option that the results depend on.
      resume: whether to go on with an unfinished run.

    Returns:
      New, unfinished (only if `resume`) or finished results. New ones are not on disk yet.

    Raises:
      ConfigError: the folder holds results of another experiment or config, or unfinished ones without
        `resume`; nothing in it is changed then.
    """
    path = directory / "results.json"
    if not path.exists():
        return Results(schema.experiment, config, describe_environment())
    # Compared as text, since the file of a config that lacks a field of today cannot be read as one of today.
    found, wanted = _read_content(path, schema.experiment)["config"], to_json(config)
    if not isinstance(found, dict):
        raise ConfigError(f"{path} is damaged: config is no object; {WAY_OUT}")
    found = {**_defaults(schema.config), **found}
    if isinstance(found.get("recipe"), dict):
        found["recipe"] = {**_defaults(Recipe), **found["recipe"]}
    differences = [
        f"{name}: {found.get(name)!r} there, {wanted.get(name)!r} wanted"
        for name in {**found, **wanted}
        if found.get(name) != wanted.get(name)
    ]
    if differences:
        raise ConfigError(problem_list(f"{path} is of another config; choose another folder:", differences))
    results = Results.load(path, schema)
    if not results.finished and not resume:
        raise ConfigError(
            f"{path} is of an unfinished run ({len(results.records)} replicates done); "
            "pass --resume to go on with it"
        )
    return results


def _defaults(kind: type[Any]) -> dict[str, Any]:
    """Return the options that a file may lack since they are newer than it, and what they were then."""
    fields = dataclasses.fields(kind)
    return {f.name: to_json(f.default) for f in fields if f.default is not dataclasses.MISSING}


def write_csv(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write tidy rows, all with the same keys, as one file that is replaced whole."""
    rows, text = list(rows), io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]))
    writer.writeheader()
    writer.writerows(rows)
    write_whole(path, text.getvalue().encode())


def describe_environment() -> dict[str, Any]:
    """Return versions, device and commit, as they stand in ``results.json``."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {"rebasin": rebasin.__version__, **{name: metadata.version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "device": f"{jax.device_count()} × {device.platform} {device.device_kind}",
        "commit": _commit(),
    }


def join_environments(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the environments of several runs as one; where they differ, a list has each value once.

    Examples:
      >>> join_environments([{"python": "3.12", "commit": "a"}, {"python": "3.12", "commit": "b"}])
      {'python': '3.12', 'commit': ['a', 'b']}
    """
    joined = {}
    for name in environments[0]:
        values = [environment.get(name) for environment in environments]
        different = [value for i, value in enumerate(values) if value not in values[:i]]
        joined[name] = different if len(different) > 1 else different[0]
    return joined


def merged(paths: Sequence[pathlib.Path], parts: Sequence[Results[Any, Any, Any]]) -> Results[Any, Any, Any]:
    """Return the pairs of several runs as those of one, without summary and claims."""
    first = to_json(parts[0].config)
    problems = []
    for path, part in zip(paths, parts, strict=True):
        found = to_json(part.config)
        problems += [
            f"{path}: {name}: {found[name]!r}, {wanted!r} in the first"
            for name, wanted in first.items()
            if found[name] != wanted and name not in ("seed", "replicates")
        ]
    if problems:
        raise ConfigError(problem_list("runs of different configs cannot be merged:", problems))
    parts = sorted(parts, key=lambda part: part.config.seed)
    records = [record for part in parts for record in part.records]
    config = dataclasses.replace(parts[0].config, replicates=1)
    each = len(config.pairs)  # records of one replicate
    config = dataclasses.replace(config, replicates=max(1, -(-len(records) // each)))
    seeds, wanted = [record.seeds for record in records], [pair.seeds for pair in config.pairs]
    if seeds != wanted:
        raise ConfigError(
            "these pairs are not those of one run: wanted the seeds "
            f"{', '.join(map(str, wanted))}, got {', '.join(map(str, seeds)) or 'none'}"
        )
    results = Results(parts[0].experiment, config, join_environments([p.environment for p in parts]))
    results.records = records
    for part in parts:
        for phase, seconds in part.seconds.items():
            results.seconds.add(phase, seconds)
    return results


def _commit() -> str | None:
    """Return the checkout's commit, with ``+changes`` where files differ; `None` outside a checkout."""
    folder = str(pathlib.Path(__file__).parent)
    command = ["git", "-C", folder, "describe", "--always", "--abbrev=12", "--dirty=+changes"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _digest(content: Mapping[str, Any]) -> str:
    """Return a hash of the entries of a file but its own, whatever their layout."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


def _read_content(path: pathlib.Path, experiment: str) -> dict[str, Any]:
    """Read a file of this version and experiment, its fields still as JSON."""
    try:
        content = json.loads(path.read_bytes())
        version = content["schema_version"]
    # A number of too many digits and bytes that are no text are ValueErrors.
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        problem = "; ".join(str(error).splitlines()) if isinstance(error, ValueError) else "other entries"
        raise ConfigError(
            f"{path} is damaged, or not a results.json of this program ({problem}); {WAY_OUT}"
        ) from error
    if version != SCHEMA_VERSION:
        raise ConfigError(f"{path} has schema_version {version}, this program reads {SCHEMA_VERSION}")
    missing = [field.name for field in dataclasses.fields(Results) if field.name not in content]
    if missing:
        raise ConfigError(problem_list(f"{path} is incomplete:", [f"{name}: missing" for name in missing]))
    if content["experiment"] != experiment:
        raise ConfigError(
            f"{path} is of the experiment {content['experiment']!r}, not {experiment!r}; "
            "choose another folder"
        )
    return content


def _layout(value: Any, indent: str = "") -> str:
    """Format JSON with one line for each object or list that holds plain values alone."""
    inner = value.values() if isinstance(value, dict) else value
    if not isinstance(value, dict | list) or not any(isinstance(entry, dict | list) for entry in inner):
        return json.dumps(value)
    deeper = f"{indent} "
    if isinstance(value, dict):
        lines = [f"{deeper}{json.dumps(key)}: {_layout(entry, deeper)}" for key, entry in value.items()]
    else:
        lines = [f"{deeper}{_layout(entry, deeper)}" for entry in value]
    start, end = "{}" if isinstance(value, dict) else "[]"
    return f"{start}\n" + ",\n".join(lines) + f"\n{indent}{end}"
