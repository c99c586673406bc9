"""All experiments in one command, and one report of them.

Runs the experiments of both papers at a preset, in an order in which each finds the networks that earlier
ones trained, and writes OUTPUT_DIR/report/index.html (one file that needs no other) and report.md: a row for
each figure of the paper, and for each experiment the paper's claims, what was measured by both algorithms,
verdicts, figures, commands and seconds. The same command again goes on where it was stopped or killed. A
section that fails does not stop the others, and is named in the report.

  python -m experiments.reproduce --preset=digits --output_dir=reproduction
  python -m experiments.reproduce --preset=demo --output_dir=reproduction_demo
  python -m experiments.reproduce --preset=digits --only=training_trajectories,loss_landscape
    --output_dir=reproduction
  python -m experiments.reproduce --preset=paper --plan
  python -m experiments.reproduce --results=results --figures=beside --output_dir=docs

--plan prints what would be trained, how long it takes and how much disk it needs, and runs nothing. --results
makes the report of results that are there, and runs nothing either. Every flag of an experiment may be
given, such as --replicates=2 or --methods=weights: it is passed to all sections that have it. What a section
prints is in OUTPUT_DIR/<section>/log.txt.

Exit status is 1 if a section failed, else 0, whatever the claims say.
"""

import pathlib
import sys
from collections.abc import Sequence

from absl import app, flags, logging

from experiments.harness import options
from experiments.harness.console import Reporter
from experiments.harness.experiment import Config
from experiments.report.content import build_content
from experiments.report.cost import Cost, count_costs, makespan
from experiments.report.html import write_html
from experiments.report.images import Beside, Inline
from experiments.report.markdown import write_markdown
from experiments.report.plans import PLANS, SEED, Section
from experiments.report.registry import BINARIES
from experiments.report.runner import prepare, run_tasks
from experiments.report.runs import find_runs
from experiments.report.settings import config_of, experiment_of, flags_of, load_binaries
from experiments.report.text import minutes
from rebasin.errors import ConfigError, RebasinError
from rebasin.files import explain, write_whole
from rebasin.training.folders import expand_home
from rebasin.training.lock import locked

__all__ = ["main", "plan", "write_report"]

_PLAN = flags.DEFINE_bool(
    "plan", False, "Print networks, hours and disk space of every section; run nothing."
)
_RESULTS = flags.DEFINE_string(
    "results", None, "Make the report of the results in this folder and in the folders in it; run nothing."
)
_ONLY = flags.DEFINE_list("only", None, "Names of the sections to run; by default all of the preset.")
_FIGURES = flags.DEFINE_enum(
    "figures",
    "inline",
    ["inline", "beside"],
    "Where the figures of index.html are: inside of it, or small ones in a folder beside it.",
)

_OWN = ("plan", "results", "only", "figures")
# Flags that have a meaning of their own here, and are not passed on as they are.
_SHARED = ("preset", "output_dir", "runs_dir", "data_dir", "seed")
# Flags of experiments that make no sense for many of them.
_REFUSED = ("resume", "merge", "time_limit", "strict")

_EXPERIMENTS = tuple(name for name, binary in BINARIES.items() if binary.writes)
# Their flags may be given, and flags are read before anything is run.
load_binaries(_EXPERIMENTS)
for _name in _SHARED:
    flags.declare_key_flag(_name)


def plan(preset: str, sections: Sequence[Section], forwarded: Sequence[str], reporter: Reporter) -> None:
    """Print what the sections of a plan train, store and cost.

    Args:
      preset: name of the preset.
      sections: its sections.
      forwarded: flags that are given to all of them that have them.
      reporter: prints.

    Raises:
      ConfigError: the config of a section cannot work.
    """
    arguments = [_arguments(preset, section, forwarded) for section in sections]
    configs = [_config(section, given) for section, given in zip(sections, arguments, strict=True)]
    keep = [_kept(preset, section, given) for section, given in zip(sections, arguments, strict=True)]
    costs = count_costs(sections, configs, keep)
    measured = all(section.seconds for section in sections) and not forwarded
    reporter.wrap(
        f"preset {preset}: {len(sections)} sections. A network of an earlier section is found, not trained "
        "again. Hours are those of one H100-class GPU, from measured rates of training, sweeps and weight "
        "matching; writing networks to disk is not counted."
    )
    header = ["section", "networks", "epochs", "evaluations", "GB", "hours"]
    rows = [
        [section.name, *_cells(cost), *([minutes(section.seconds or 0)] if measured else [])]
        for section, cost in zip(sections, costs, strict=True)
    ]
    total = _total(costs)
    last = ["total", *_cells(total)]
    if measured:
        header.append("2 cores")
        last.append(minutes(sum(section.seconds or 0 for section in sections)))
    reporter.say("")
    reporter.table(header, [*rows, last])
    reporter.say("")
    reporter.wrap(
        f"in all {total.hours:.1f} hours on one GPU, {makespan(costs, 8):.1f} on eight, if replicates of a "
        f"section run beside each other, and {total.gigabytes:,.0f} GB of disk"
    )


def _config(section: Section, arguments: Sequence[str]) -> Config:
    try:
        return config_of(section.binary, arguments)
    except ConfigError as error:
        raise ConfigError(f"{section.name}: {error}") from error


def _cells(cost: Cost) -> list[str]:
    hours = "unknown" if cost.hours is None else f"{cost.hours:.1f}"
    return [f"{cost.networks:,}", f"{cost.epochs:,}", f"{cost.points:,}", f"{cost.gigabytes:,.1f}", hours]


def _total(costs: Sequence[Cost]) -> Cost:
    return Cost(
        sum(cost.networks for cost in costs),
        sum(cost.epochs for cost in costs),
        sum(cost.matches for cost in costs),
        sum(cost.points for cost in costs),
        sum(cost.gigabytes for cost in costs),
        sum(cost.hours or 0.0 for cost in costs),
        1,
    )


def _kept(preset: str, section: Section, arguments: Sequence[str]) -> str:
    """Return what a section keeps of its networks."""
    given = [flag.partition("=")[2] for flag in arguments if flag.startswith("--keep_checkpoints=")]
    return (given or ["ends" if preset == "paper" else experiment_of(section.binary).keep])[-1]


def _arguments(preset: str, section: Section, forwarded: Sequence[str]) -> list[str]:
    """Return the flags of a section but for its folders; those that are given come last, and count."""
    own = [f"--seed={SEED}"] if preset in ("demo", "digits") else []
    names = flags_of(section.binary)
    given = [flag for flag in forwarded if flag[2:].partition("=")[0] in names]
    return [f"--preset={preset}", *own, *section.flags, *given]


def write_report(
    results: pathlib.Path, folder: pathlib.Path, *, inline: bool, failures: dict[str, str] | None = None
) -> list[pathlib.Path]:
    """Write the report of results that are there.

    Args:
      results: folder with a folder for each run.
      folder: folder of the report.
      inline: whether figures are inside of the page.
      failures: why sections failed, by name.

    Returns:
      The files.

    Raises:
      ConfigError: there are no results.
    """
    content = build_content(find_runs(results), failures or {})
    folder.mkdir(parents=True, exist_ok=True)
    beside = Beside(folder)
    page = write_html(content, Inline() if inline else beside)
    paths = [folder / "index.html", folder / "report.md"]
    for path, text in zip(paths, (page, write_markdown(content, folder)), strict=True):
        write_whole(path, text.encode())
    beside.tidy()
    return paths


def _forwarded(sections: Sequence[Section]) -> list[str]:
    """Return the flags that are given and belong to sections, as they would be written.

    Raises:
      app.UsageError: no section has such a flag, or it makes no sense for many sections.
    """
    known = {name for section in sections for name in flags_of(section.binary)}
    every = {name for binary in _EXPERIMENTS for name in flags_of(binary)}
    given = [name for name in sorted(every) if flags.FLAGS[name].present and name not in _SHARED]
    wrong = [name for name in given if name in _REFUSED or name not in known]
    if wrong:
        raise app.UsageError(f"no section of a reproduction takes --{', --'.join(wrong)}")
    passed = [*given, *(["seed"] if flags.FLAGS["seed"].present else [])]
    return [f"--{name}={flags.FLAGS[name].serialize().partition('=')[2]}" for name in passed]


def _chosen(preset: str) -> tuple[Section, ...]:
    """Return the sections of a preset that were asked for."""
    sections = PLANS[preset]
    if _ONLY.value is None:
        return sections
    names = [section.name for section in sections]
    unknown = [name for name in _ONLY.value if name not in names]
    if unknown or not _ONLY.value:
        raise ConfigError(
            f"--only: preset {preset!r} has no section {', '.join(map(repr, unknown)) or 'of no name'}; "
            f"it has {', '.join(names)}"
        )
    return tuple(section for section in sections if section.name in _ONLY.value)


def _reproduce(reporter: Reporter) -> dict[str, str]:
    """Do what the flags say, and return why sections failed."""
    preset = str(flags.FLAGS["preset"].value)
    if _RESULTS.value is not None:
        folder = _output_dir() / "report"
        for path in write_report(expand_home(_RESULTS.value), folder, inline=_FIGURES.value == "inline"):
            reporter.say(str(path))
        return {}
    sections = _chosen(preset)
    forwarded = _forwarded(sections)
    if _PLAN.value:
        plan(preset, sections, forwarded, reporter)
        return {}
    folder = _output_dir()
    runs = expand_home(flags.FLAGS["runs_dir"].value) if flags.FLAGS["runs_dir"].value else folder / "runs"
    data = [f"--data_dir={flags.FLAGS['data_dir'].value}"] if flags.FLAGS["data_dir"].value else []

    def arguments(section: Section) -> list[str]:
        given = _arguments(preset, section, forwarded)
        return [*given, *data, f"--runs_dir={runs}", f"--output_dir={folder / section.name}"]

    tasks = prepare(sections, arguments)
    folder.mkdir(parents=True, exist_ok=True)
    with locked(folder):
        failures = run_tasks(tasks, reporter)
        for path in write_report(
            folder, folder / "report", inline=_FIGURES.value == "inline", failures=failures
        ):
            reporter.say(str(path))
    return failures


def _output_dir() -> pathlib.Path:
    if not flags.FLAGS["output_dir"].value:
        raise ConfigError("--output_dir is empty; name a folder for the results and the report")
    return expand_home(flags.FLAGS["output_dir"].value)


def main(arguments: list[str]) -> None:
    """Run all experiments, or make a report, or print a plan."""
    if len(arguments) > 1:
        raise app.UsageError(f"unknown arguments {arguments[1:]}")
    if not flags.FLAGS["verbosity"].present:
        logging.set_verbosity(logging.WARNING)
    try:
        failures = _reproduce(Reporter())
    except RebasinError as error:
        sys.exit(f"error: {error}")
    except OSError as error:
        sys.exit(f"error: {explain(error)}")
    except KeyboardInterrupt:
        print("interrupted; the same command goes on", file=sys.stderr)
        sys.exit(options.INTERRUPTED)
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    app.run(main)
