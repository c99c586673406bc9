"""What the report says, as data: rows of the first table, sections, and what was not run.

`experiments.report.html` and `experiments.report.markdown` only lay it out.
"""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from experiments.harness.results import Claim
from experiments.report.registry import BINARIES, DATASETS, MODELS, PARTS, Binary, Part, unit_of
from experiments.report.runs import Found, Run

__all__ = [
    "Badge",
    "Block",
    "ClaimRow",
    "Content",
    "Headline",
    "Row",
    "Section",
    "Value",
    "build_content",
    "describe_environment",
    "describe_origin",
    "format_claim",
]

# Digits behind the point, by unit; "%" and "points" are fractions in the file.
_DIGITS = {"%": 1, "points": 1, "nats": 3, "epochs": 1, "levels": 1, "times": 2, "dimensions": 1}

_PARENTHESES = re.compile(r" ?\([^()]*\)")
# The rule behind a statement, which the first table leaves out.
_RULE = re.compile(r": (the 95 %|the mean difference).*")


class Value(NamedTuple):
    """A claim in one run.

    Attributes:
      text: mean and interval with their unit.
      holds: the verdict.
      remark: what the statement says of this run alone, such as the epoch of the highest barrier.
    """

    text: str
    holds: bool
    remark: str


class ClaimRow(NamedTuple):
    """One claim in all runs of a network; a value is `None` where a run does not make it."""

    statement: str
    paper: str
    values: tuple[Value | None, ...]


class Block(NamedTuple):
    """All runs of one binary on one network, beside each other.

    Attributes:
      network: the network in words.
      runs: the runs.
      columns: what to call each run.
      claims: the claims.
      numbers: header and rows of other numbers, where a binary makes no claims.
    """

    network: str
    runs: tuple[Run, ...]
    columns: tuple[str, ...]
    claims: tuple[ClaimRow, ...]
    numbers: tuple[tuple[str, ...], ...]


class Section(NamedTuple):
    """All runs of one binary.

    Attributes:
      name: name of the binary.
      binary: what the registry says of it.
      says: what the paper says, by part.
      blocks: one for each network; empty where nothing was run.
    """

    name: str
    binary: Binary
    says: tuple[tuple[str, str], ...]
    blocks: tuple[Block, ...]


class Badge(NamedTuple):
    """How many of the claims behind a row hold on a network."""

    network: str
    held: int
    total: int

    @property
    def verdict(self) -> str:
        """``holds``, ``in part`` or ``does not hold``."""
        return "holds" if self.held == self.total else "in part" if self.held else "does not hold"


class Headline(NamedTuple):
    """The number that stands in the first table, by one algorithm."""

    algorithm: str
    text: str


class Row(NamedTuple):
    """A row of the first table.

    Attributes:
      part: the figure, or part of a paper.
      headlines: the number of the first network, by each algorithm.
      statement: the claim behind that number.
      badges: the verdict by network.
      note: why nothing was run, or that other networks than the paper's were.
      sections: binaries whose sections have the rest.
    """

    part: Part
    headlines: tuple[Headline, ...]
    statement: str
    badges: tuple[Badge, ...]
    note: str
    sections: tuple[str, ...]

    @property
    def title(self) -> str:
        """Label of the part, with the word that belongs before it."""
        label = self.part.label
        return f"Figure {label}" if label[0].isdigit() else label[:1].upper() + label[1:]


class Content(NamedTuple):
    """The whole report.

    Attributes:
      rows: the first table.
      sections: the rest, in the order of the registry.
      missing: one line for everything that was not run, or not to its end, with the reason.
      environments: each environment, and the folders of the runs that it made.
      seconds: computing time of all runs.
    """

    rows: tuple[Row, ...]
    sections: tuple[Section, ...]
    missing: tuple[str, ...]
    environments: tuple[tuple[str, tuple[str, ...]], ...]
    seconds: float


def build_content(found: Found, failures: Mapping[str, str] = {}) -> Content:
    """Return what the report says of some results.

    Args:
      found: the results.
      failures: why a section of a reproduction failed, by its name.
    """
    rows = tuple(_build_row(part, found) for part in PARTS)
    sections = tuple(
        _build_section(name, binary, found) for name, binary in BINARIES.items() if binary.writes == name
    )
    by_environment: dict[str, list[str]] = {}
    for run in found.runs:
        by_environment.setdefault(describe_environment(run.environment), []).append(run.folder)
    return Content(
        rows,
        sections,
        tuple(_missing(rows, sections, found, failures)),
        tuple((text, tuple(folders)) for text, folders in by_environment.items()),
        sum(run.total_seconds for run in found.runs),
    )


def format_claim(binary: str, claim: Claim) -> str:
    """Return mean, interval and unit of a claim.

    Examples:
      >>> format_claim("loss_landscape", Claim("ridge_vanishes_weights", "", "", 0.005, -0.001, 0.02, True))
      '0.5 % [−0.1, 2.0]'
    """
    unit = unit_of(binary, claim.id)
    scale, digits = (100 if unit in ("%", "points") else 1), _DIGITS.get(unit, 2)
    if math.isnan(claim.measured):
        return "none"
    mean, low, high = (
        f"{scale * x:.{digits}f}".replace("-", "−") for x in (claim.measured, claim.low, claim.high)
    )
    spread = "" if math.isnan(claim.low) or math.isnan(claim.high) else f" [{low}, {high}]"
    return f"{mean} {unit}{spread}"


def describe_environment(environment: Mapping[str, Any]) -> str:
    """Return device and versions in one line; runs that were merged have several of some."""
    names = {"device": "", "platform": "", "python": "Python ", "packages": ""}
    given = {name: environment.get(name) for name in names}
    return "; ".join(names[name] + _text(value) for name, value in given.items() if value is not None)


def describe_origin(run: Run) -> str:
    """Return the computing time of a run by phase, and the commit that made it."""
    spent = ", ".join(f"{phase} {seconds:,.0f} s" for phase, seconds in run.seconds.items())
    commit = run.environment.get("commit")
    return f"{run.total_seconds:,.0f} s ({spent})" + (f", commit {_text(commit)}" if commit else "")


def _text(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return " and ".join(map(_text, value)) if isinstance(value, list) else str(value)


def _network_order(run: Run) -> tuple[Any, ...]:
    """Sort full-size networks of the paper first, then by dataset and model."""
    recipe = run.config["recipe"]
    small = recipe["epochs"] < 150 or recipe["width"] < 64
    model, dataset = run.network
    places = [
        list(names).index(name) if name in names else 99
        for names, name in ((DATASETS, dataset), (MODELS, model))
    ]
    return (small, *places, -recipe["width"], run.described)


def _algorithm_order(run: Run) -> tuple[Any, ...]:
    return (run.algorithm != "best", run.algorithm, run.folder)


def _claims_for(run: Run, evidence: Sequence[str]) -> list[Claim]:
    """Return the claims whose ids begin in one of these ways, in the order of the ways."""
    chosen: dict[str, Claim] = {}
    for begin in evidence:
        chosen |= {claim.id: claim for claim in run.claims if claim.id.startswith(begin)}
    return list(chosen.values())


def _build_row(part: Part, found: Found) -> Row:
    runs = [run for name in part.evidence for run in found.of(name) if _claims_for(run, part.evidence[name])]
    own = [run for run in runs if run.network in part.models]
    runs = sorted(own or runs, key=lambda run: (_network_order(run), _algorithm_order(run)))
    note = ""
    if not runs:
        note = f"not run: no finished results of {', '.join(part.evidence)}"
    elif part.models and not own:
        names = [f"{MODELS[model]} on {DATASETS[data]}" for model, data in part.models]
        note = f"not run on {', '.join(names)}; the same on other networks:"
    held: dict[str, list[bool]] = {}
    names = {run.described: run.short for run in runs}
    for run in runs:
        verdicts = [claim.holds for claim in _claims_for(run, part.evidence[run.binary])]
        held.setdefault(run.described, []).extend(verdicts)
    badges = tuple(Badge(names[network], sum(verdicts), len(verdicts)) for network, verdicts in held.items())
    headlines, statement = _headlines(part, [run for run in runs if run.described == next(iter(held))])
    return Row(part, headlines, statement, badges, note, tuple(part.evidence))


def _headlines(part: Part, runs: Sequence[Run]) -> tuple[tuple[Headline, ...], str]:
    """Return the first claim of the first binary by each algorithm, and what it says."""
    binary = next((name for name in part.evidence if any(run.binary == name for run in runs)), None)
    if binary is None:
        return (), ""
    found = [(run, _claims_for(run, part.evidence[binary])[0]) for run in runs if run.binary == binary]
    statement = _RULE.sub("", _PARENTHESES.sub("", found[0][1].statement))
    return tuple(Headline(run.algorithm, format_claim(binary, claim)) for run, claim in found), statement


def _build_section(name: str, binary: Binary, found: Found) -> Section:
    says = tuple(
        (f"figure {part.label}" if part.label[0].isdigit() else part.label, part.says)
        for part in PARTS
        if name in part.evidence
    )
    by_network: dict[str, list[Run]] = {}
    for run in sorted(found.of(name), key=lambda run: (_network_order(run), _algorithm_order(run))):
        by_network.setdefault(run.described, []).append(run)
    return Section(
        name, binary, says, tuple(_build_block(network, runs) for network, runs in by_network.items())
    )


def _build_block(network: str, runs: Sequence[Run]) -> Block:
    columns = [_column(run) for run in runs]
    if len(set(columns)) < len(columns):
        columns = [f"{column}, {run.folder}" for column, run in zip(columns, runs, strict=True)]
    ids = dict.fromkeys(claim.id for run in runs for claim in run.claims)
    claims = tuple(_claim_row(id, runs) for id in ids)
    return Block(network, tuple(runs), tuple(columns), claims, _method_numbers(runs))


def _column(run: Run) -> str:
    replicates = run.config.get("replicates", 1)
    first = run.config.get("seed", 0)
    return f"{run.algorithm}: {replicates} replicate{'s' * (replicates > 1)}, seeds from {first}"


def _claim_row(id: str, runs: Sequence[Run]) -> ClaimRow:
    claims = [next((claim for claim in run.claims if claim.id == id), None) for run in runs]
    given = [claim for claim in claims if claim is not None]
    statements = dict.fromkeys(claim.statement for claim in given)
    common = next(iter(statements))
    if len(statements) > 1:
        # What differs between runs stands in parentheses, as a rule; it is said beside each value.
        common = " / ".join(dict.fromkeys(_PARENTHESES.sub("", statement) for statement in statements))

    def remark(claim: Claim) -> str:
        return " ".join(_PARENTHESES.findall(claim.statement)).strip() if len(statements) > 1 else ""

    values = tuple(
        None
        if claim is None
        else Value(format_claim(run.binary, claim), claim.holds, remark(claim).strip("() "))
        for run, claim in zip(runs, claims, strict=True)
    )
    return ClaimRow(common, given[0].paper, values)


def _method_numbers(runs: Sequence[Run]) -> tuple[tuple[str, ...], ...]:
    """Return barriers by matching method, where a binary compares methods and makes no claims."""
    if runs[0].binary != "compare_methods" or not runs[0].finished:
        return ()
    rows = [("test error barrier, %", "as it is", "with REPAIR", "distance")]
    for name, found in runs[0].summary["methods"].items():
        repaired = found.get("repaired")
        rows.append(
            (
                name.replace("_", " "),
                _spread(found["plain"]["error_barrier"], 100),
                _spread(repaired["error_barrier"], 100) if repaired else "",
                _spread(found["distance"], 1),
            )
        )
    return tuple(rows)


def _spread(interval: Mapping[str, float | None], scale: float) -> str:
    mean, deviation = interval["mean"], interval["deviation"]
    if mean is None:
        return "none"
    return f"{scale * mean:.1f}" + ("" if deviation is None else f" ± {scale * deviation:.1f}")


def _missing(
    rows: Sequence[Row], sections: Sequence[Section], found: Found, failures: Mapping[str, str]
) -> Iterator[str]:
    """Yield one line for each thing that was not run, or not to its end."""
    yield from (f"{name} failed: {reason}" for name, reason in failures.items())
    yield from (f"damaged: {line}" for line in found.damaged)
    for run in found.runs:
        if not run.finished:
            yield f"{run.folder} is unfinished ({run.binary}); go on with --resume: {run.command}"
    yield from (f"{row.title}: {row.note.rstrip(':')}" for row in rows if row.note)
    named = {name for row in rows for name in row.sections}
    for section in sections:
        if not section.blocks and section.name not in named:
            yield f"{section.name} ({section.binary.title}): not run"
    full = [run for run in found.runs if not _network_order(run)[0] and run.network != ("mlp", "digits")]
    if not full:
        yield (
            "VGG-16 and ResNet-20 at the paper's width and number of epochs: they need an accelerator; "
            "docs/cost.md says for how long"
        )
