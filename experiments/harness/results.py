"""``results.json``: what every experiment writes, and the only thing that figures are drawn from."""

import csv
import dataclasses
import json
import math
import pathlib
import platform
import subprocess
from collections.abc import Iterable, Mapping
from importlib import metadata
from typing import Any

import jax
import numpy as np

import rebasin
from experiments.harness.statistics import student_interval
from rebasin.errors import ConfigError, problem_list

__all__ = [
    "Claim",
    "Results",
    "claim",
    "count_pairs",
    "describe_mean",
    "describe_environment",
    "open_results",
    "plain",
    "write_csv",
]

SCHEMA_VERSION = 1
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "scipy", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class Claim:
    """One statement of the paper against what was measured.

    Attributes:
      id: short name.
      statement: what should hold here, with the threshold.
      paper: what the paper reports, and where.
      measured: mean over replicates, in the unit of the statement.
      low: lower end of its 95 % interval (Student's t over independent pairs of networks).
      high: upper end.
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
    """A claim about the mean of one number for each replicate.

    Args:
      id: short name.
      statement: what should hold, with the rule.
      paper: what the paper reports.
      values: ``[replicates]``.
      holds: the verdict; by default whether the 95 % interval lies above 0.
      below: the interval should lie below 0 instead.
    """
    interval = student_interval(values)
    if holds is None:
        # One replicate has no interval; its sign alone decides then.
        low, high = interval[1:3] if len(values) > 1 else (interval.mean, interval.mean)
        holds = high < 0 if below else low > 0
    return Claim(id, statement, paper, interval.mean, interval.low, interval.high, bool(holds))


@dataclasses.dataclass
class Results:
    """The content of a ``results.json``.

    Attributes:
      experiment: name of the binary.
      config: every option, after the preset filled it in.
      environment: versions, device and commit.
      seconds: computing time by phase, summed over replicates.
      curves: raw measurements, one entry for each replicate.
      summary: means and spreads over replicates; empty while the run is unfinished.
      claims: the paper's claims; empty while the run is unfinished.
    """

    experiment: str
    config: dict[str, Any]
    environment: dict[str, Any] = dataclasses.field(default_factory=dict)
    seconds: dict[str, float] = dataclasses.field(default_factory=dict)
    curves: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    summary: dict[str, Any] = dataclasses.field(default_factory=dict)
    claims: list[Claim] = dataclasses.field(default_factory=list)

    @property
    def finished(self) -> bool:
        """Whether all replicates are in and summed up."""
        return bool(self.summary)

    def add_seconds(self, phase: str, seconds: float) -> None:
        """Counts computing time towards a phase."""
        self.seconds[phase] = round(self.seconds.get(phase, 0.0) + seconds, 2)

    def save(self, path: pathlib.Path) -> None:
        """Writes the file in one step, so that a killed run leaves the last complete one."""
        content = {"schema_version": SCHEMA_VERSION, **dataclasses.asdict(self)}
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(plain(content), indent=1) + "\n")
        partial.replace(path)

    @classmethod
    def load(cls, path: pathlib.Path) -> "Results":
        """Reads a file that `save` wrote; raises `ConfigError` for any other."""
        try:
            content = json.loads(path.read_text())
            version = content.pop("schema_version")
            if version != SCHEMA_VERSION:
                raise ConfigError(f"{path} has schema_version {version}, this program reads {SCHEMA_VERSION}")
            claims = [Claim(**claim) for claim in content.pop("claims")]
            return cls(**content, claims=claims)
        except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
            raise ConfigError(f"{path} is not a results.json of this program: {error!r}") from error


def count_pairs(results: Results, what: str = "networks") -> str:
    """For example ``"3 pairs of networks"``."""
    count = results.config["replicates"]
    return f"{count} pair{'s' * (count > 1)} of {what}"


def describe_mean(results: Results, what: str = "networks") -> str:
    """For example ``"mean±sd of 3 pairs of networks"``; a single pair has no spread."""
    pairs = count_pairs(results, what)
    return pairs if results.config["replicates"] == 1 else f"mean±sd of {pairs}"


def open_results(
    directory: pathlib.Path, experiment: str, config: Mapping[str, Any], *, resume: bool
) -> Results:
    """Finds or begins the results of a run in its output folder.

    Args:
      directory: the output folder, made if needed.
      experiment: name of the binary.
      config: every option that the results depend on.
      resume: go on with an unfinished run.

    Returns:
      New, unfinished (only if `resume`) or finished results.

    Raises:
      ConfigError: the folder holds results of another experiment or config, or unfinished ones without
        `resume`; nothing in it is changed then.
    """
    path = directory / "results.json"
    wanted = plain(dict(config))
    if not path.exists():
        directory.mkdir(parents=True, exist_ok=True)
        results = Results(experiment, wanted, describe_environment())
        results.save(path)
        return results
    results = Results.load(path)
    if results.experiment != experiment:
        raise ConfigError(
            f"{path} is of the experiment {results.experiment!r}, not {experiment!r}; choose another folder"
        )
    differences = [
        f"{name}: {results.config.get(name)!r} there, {wanted.get(name)!r} wanted"
        for name in {**results.config, **wanted}
        if results.config.get(name) != wanted.get(name)
    ]
    if differences:
        raise ConfigError(problem_list(f"{path} is of another config; choose another folder:", differences))
    if not results.finished and not resume:
        raise ConfigError(
            f"{path} is of an unfinished run ({len(results.curves)} replicates done); "
            "pass --resume to go on with it"
        )
    return results


def write_csv(path: pathlib.Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Writes tidy rows, all with the same keys."""
    rows = list(rows)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def plain(value: Any) -> Any:
    """JSON types alone: tuples as lists, NaN as null, floats to seven digits.

    Measurements go through this before they are summed up, so that a resumed run, which reads some of them
    from the file, ends with the same numbers.
    """
    if isinstance(value, Mapping):
        return {str(key): plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [plain(inner) for inner in value]
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    return value


def describe_environment() -> dict[str, Any]:
    """Versions, device and commit, as they stand in ``results.json``."""
    device = jax.devices()[0]
    return {
        "python": platform.python_version(),
        "packages": {"rebasin": rebasin.__version__, **{name: metadata.version(name) for name in _PACKAGES}},
        "platform": platform.platform(),
        "device": f"{jax.device_count()} × {device.platform} {device.device_kind}",
        "commit": _commit(),
    }


def _commit() -> str | None:
    """The checkout's commit, with ``+changes`` where files differ from it; `None` outside a checkout."""
    command = [
        "git",
        "-C",
        str(pathlib.Path(__file__).parent),
        "describe",
        "--always",
        "--abbrev=12",
        "--dirty=+changes",
    ]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
