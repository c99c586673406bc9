"""The report as Markdown, with links to the figures where they are."""

import os
import pathlib
from collections.abc import Iterable

from experiments.report.content import Block, Content, Row, Section, Value, describe_origin
from experiments.report.registry import PAPERS
from experiments.report.text import INTRODUCTION, INTRODUCTION_TABLE, MARKS, TITLE, minutes

__all__ = ["write_markdown"]

# What would be read as markup in prose and in cells of tables. Backticks are meant.
_SPECIAL = str.maketrans({sign: f"\\{sign}" for sign in "\\|*_<>[]#"})


def write_markdown(content: Content, folder: pathlib.Path) -> str:
    """Return the whole text.

    Args:
      content: what it says.
      folder: the folder in which it will be, from which figures are linked.
    """
    lines = [f"# {TITLE}", "", *(f"{_code(text)}\n" for text in INTRODUCTION), *_glance(content.rows)]
    for section in content.sections:
        lines += _section(section, folder)
    lines += [
        "## What was not run",
        "",
        *(f"- {_code(line)}" for line in content.missing or ("Nothing.",)),
        "",
    ]
    lines += ["## Environment", ""]
    lines += [
        f"- {_plain(text)}: {', '.join(f'`{name}`' for name in folders)}"
        for text, folders in content.environments
    ]
    lines += ["", f"Computing time of all runs: {minutes(content.seconds)}.", ""]
    return "\n".join(lines)


def _plain(text: str) -> str:
    """Escape what Markdown would read as markup."""
    return text.translate(_SPECIAL).replace("\n", " ")


def _code(text: str) -> str:
    """Escape a text, but for what stands between backticks."""
    parts = text.split("`")
    return "".join(f"`{part}`" if i % 2 else _plain(part) for i, part in enumerate(parts))


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> list[str]:
    names = list(header)
    return [
        f"| {' | '.join(names)} |",
        f"| {' | '.join('---' for _ in names)} |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def _glance(rows: Iterable[Row]) -> list[str]:
    lines = ["## At a glance", "", _code(INTRODUCTION_TABLE), ""]
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.part.paper, []).append(row)
    for paper, found in groups.items():
        lines += [f"### {_plain(PAPERS[paper][0].upper() + PAPERS[paper][1:])} (arXiv {paper})", ""]
        header = (
            "part",
            "what the paper says",
            "measured on the first network",
            "claims that hold, by network",
        )
        lines += _table(header, map(_glance_row, found))
    return lines


def _glance_row(row: Row) -> tuple[str, ...]:
    numbers = [f"{_plain(found.text)} ({found.algorithm})" for found in row.headlines]
    badges = [
        f"{MARKS[badge.verdict]} {_plain(badge.network)}: {badge.held} of {badge.total}"
        for badge in row.badges
    ]
    return (
        _plain(row.title),
        _plain(row.part.says),
        "<br>".join(numbers + [_plain(row.statement)] * bool(row.statement)),
        "<br>".join([_code(row.note)] * bool(row.note) + badges),
    )


def _section(section: Section, folder: pathlib.Path) -> list[str]:
    lines = [
        f"## {_plain(section.binary.title)}",
        "",
        f"{_plain(section.binary.where)}; `{section.name}`",
        "",
    ]
    if section.says:
        lines += [
            "The paper:",
            "",
            *(f"- {_plain(text)} ({_plain(where)})" for where, text in section.says),
            "",
        ]
    for block in section.blocks:
        lines += _block(section, block, folder)
    return lines if section.blocks else [*lines, "Not run here.", ""]


def _block(section: Section, block: Block, folder: pathlib.Path) -> list[str]:
    lines = [f"### {_plain(section.name)}: {_plain(block.network)}", ""]
    if block.claims:
        rows = (
            (_plain(row.statement), _plain(row.paper), *(_value(value) for value in row.values))
            for row in block.claims
        )
        lines += _table(("claim", "the paper", *map(_plain, block.columns)), rows)
    if block.numbers:
        header, *rows = block.numbers
        lines += _table(header, rows)
    for column, run in zip(block.columns, block.runs, strict=True):
        lines += ["```sh", run.command, "```", ""]
        lines += [f"{_plain(column)}. {_plain(describe_origin(run))}."]
        if run.differences:
            lines += [f"Today's recipe differs in {_plain(', '.join(run.differences))}."]
        if not run.finished:
            lines += ["Unfinished: go on with `--resume`."]
        lines += [""]
        for path in run.images:
            caption = _plain(f"{section.binary.figures[path.name]}; {block.network}, {run.algorithm}")
            link = pathlib.Path(os.path.relpath(path, folder)).as_posix()
            lines += [f"![{caption}]({link})", ""]
    return lines


def _value(value: Value | None) -> str:
    if value is None:
        return ""
    remark = f", {_plain(value.remark)}" if value.remark else ""
    verdict = "holds" if value.holds else "does not hold"
    return f"{_plain(value.text)}<br>{MARKS[verdict]} {verdict}{remark}"
