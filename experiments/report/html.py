"""The report as one page of HTML that loads nothing but its figures, for screens and for print."""

import html
import re
from collections.abc import Iterable

from experiments.report.content import Block, Content, Row, Section, Value, describe_origin
from experiments.report.images import Images
from experiments.report.registry import PAPERS
from experiments.report.text import INTRODUCTION, INTRODUCTION_TABLE, MARKS, TITLE, minutes

__all__ = ["write_html"]

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #59636e; --line: #d1d9e0; --paper: #fff;
  --good: #116329; --part: #7a4d00; --bad: #a40e26; --goodback: #dafbe1; --partback: #fff3c4;
  --badback: #ffe2e0; --shade: #f6f8fa; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e6e9ed; --soft: #9aa4af; --line: #3a424b; --paper: #14181d; --good: #6fdd8b;
    --part: #f0c75e; --bad: #ff9a92; --goodback: #12331f; --partback: #3b2f0b; --badback: #46181a;
    --shade: #1d232a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 1rem; color: var(--ink); background: var(--paper);
  font: 16px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; } h2 { margin-top: 3rem; font-size: 1.3rem; }
h3 { margin-top: 2rem; font-size: 1.05rem; } sub { line-height: 0; } h1, h2, h3 { text-wrap: balance; }
p, li { max-width: 46rem; } a { color: inherit; } .soft, small, figcaption { color: var(--soft); }
.wide { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .875rem; line-height: 1.4; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top; }
thead th { border-bottom-width: 2px; } tbody th { font-weight: 400; }
.glance tbody th { font-weight: 600; width: 13%; } .glance td:nth-child(2) { width: 27%; }
li small { white-space: nowrap; }
.number { white-space: nowrap; font-variant-numeric: tabular-nums; }
.badge { display: inline-block; margin: 0 .3rem .25rem 0; padding: 0 .45rem; border-radius: .6rem; }
.holds { color: var(--good); background: var(--goodback); }
.in-part { color: var(--part); background: var(--partback); }
.does-not-hold { color: var(--bad); background: var(--badback); }
code { font: .85em/1.4 ui-monospace, monospace; overflow-wrap: anywhere; }
pre { margin: .5rem 0; padding: .6rem; background: var(--shade); white-space: pre-wrap; }
figure { margin: 1rem 0; } img { max-width: 100%; height: auto; background: #fff; border-radius: .3rem; }
@media (max-width: 44rem) {
  .glance thead { display: none; } .glance tr { display: block; padding: .6rem 0;
    border-bottom: 1px solid var(--line); }
  .glance tr > * { display: block; border: 0; padding: .1rem 0; width: auto !important; } }
@media print {
  :root { --ink: #000; --soft: #444; --line: #bbb; --paper: #fff; --good: #116329; --part: #7a4d00;
    --bad: #a40e26; --goodback: #fff; --partback: #fff; --badback: #fff; --shade: #fff; }
  body { max-width: none; padding: 0; font-size: 10pt; } table { font-size: 8pt; }
  .badge, pre { border: 1px solid var(--line); } tr, figure, pre { break-inside: avoid; }
  h2, h3 { break-after: avoid; } .wide { overflow: visible; } }
"""

# Permutations and networks with an index.
_INDEX = re.compile(r"\b([ABP])_(end|[a-z]|\d+)\b")


def write_html(content: Content, images: Images) -> str:
    """Return the whole page.

    Args:
      content: what it says.
      images: where its figures are.
    """
    body = "\n".join(
        [
            f"<h1>{_escape(TITLE)}</h1>",
            *(f"<p>{_code(text)}</p>" for text in INTRODUCTION),
            _glance(content.rows),
            *(_section(section, images) for section in content.sections),
            _missing(content.missing),
            _environments(content),
        ]
    )
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f'<title>{html.escape(TITLE)}</title>\n<link rel="icon" href="data:,">\n'
        f"<style>{_STYLE}</style>\n</head>\n"
        f"<body>\n{body}\n</body>\n</html>\n"
    )


def _escape(text: str) -> str:
    """Return a text as HTML, with indices set low."""
    return _INDEX.sub(r"\1<sub>\2</sub>", html.escape(text))


def _code(text: str) -> str:
    """Escape a text, and set what stands between backticks as code."""
    parts = text.split("`")
    return "".join(f"<code>{html.escape(p)}</code>" if i % 2 else _escape(p) for i, p in enumerate(parts))


def _badge(verdict: str, text: str) -> str:
    mark = MARKS[verdict]
    return f'<span class="badge {verdict.replace(" ", "-")}">{mark} {_escape(text)}</span>'


def _table(header: Iterable[str], rows: Iterable[str], kind: str = "") -> str:
    heads = "".join(f'<th scope="col">{_escape(name)}</th>' for name in header)
    return (
        f'<div class="wide"><table class="{kind}"><thead><tr>{heads}</tr></thead>\n<tbody>\n'
        + "\n".join(rows)
        + "\n</tbody></table></div>"
    )


def _glance(rows: Iterable[Row]) -> str:
    groups: dict[str, list[Row]] = {}
    for row in rows:
        groups.setdefault(row.part.paper, []).append(row)
    tables = [
        f"<h3>{_escape(_paper(paper))}</h3>"
        + _table(
            ("Part", "What the paper says", "Measured on the first network", "Claims that hold, by network"),
            map(_glance_row, found),
            "glance",
        )
        for paper, found in groups.items()
    ]
    return (
        f'<section id="glance"><h2>At a glance</h2><p>{_code(INTRODUCTION_TABLE)}</p>'
        + "".join(tables)
        + ("</section>")
    )


def _paper(number: str) -> str:
    return PAPERS[number][0].upper() + PAPERS[number][1:] + f" (arXiv {number})"


def _glance_row(row: Row) -> str:
    link = f'<a href="#{row.sections[0]}">{_escape(row.title)}</a>' if row.sections else _escape(row.title)
    numbers = "<br>".join(
        f'<span class="number">{_escape(found.text)}</span> <small>{_escape(found.algorithm)}</small>'
        for found in row.headlines
    )
    what = f"<br><small>{_escape(row.statement)}</small>" if row.statement else ""
    badges = "".join(
        _badge(badge.verdict, f"{badge.network}: {badge.held}\u00a0of\u00a0{badge.total}")
        for badge in row.badges
    )
    note = f"<small>{_code(row.note)}</small> " if row.note else ""
    return (
        f'<tr><th scope="row">{link}</th><td>{_escape(row.part.says)}</td><td>{numbers}{what}</td>'
        f"<td>{note}{badges}</td></tr>"
    )


def _section(section: Section, images: Images) -> str:
    says = "".join(
        f"<li>{_escape(text)} <small>({_escape(where)})</small></li>" for where, text in section.says
    )
    blocks = "\n".join(_block(section, block, images) for block in section.blocks)
    return (
        f'<section id="{section.name}"><h2>{_escape(section.binary.title)}</h2>\n'
        f'<p class="soft">{_escape(section.binary.where)}; <code>{section.name}</code>; '
        '<a href="#glance">first table</a></p>\n'
        + (f"<p>The paper:</p><ul>{says}</ul>\n" if says else "")
        + (blocks or "<p>Not run here.</p>")
        + "</section>"
    )


def _block(section: Section, block: Block, images: Images) -> str:
    parts = [f"<h3>{_escape(block.network)}</h3>"]
    if block.claims:
        rows = (
            f'<tr><th scope="row">{_escape(row.statement)}</th><td>{_escape(row.paper)}</td>'
            + "".join(f"<td>{_value(value)}</td>" for value in row.values)
            + "</tr>"
            for row in block.claims
        )
        parts.append(_table(("Claim", "The paper", *block.columns), rows))
    if block.numbers:
        header, *lines = block.numbers
        rows = ("<tr>" + "".join(f"<td>{_escape(cell)}</td>" for cell in line) + "</tr>" for line in lines)
        parts.append(_table(header, rows))
    for column, run in zip(block.columns, block.runs, strict=True):
        unfinished = "" if run.finished else " Unfinished: go on with <code>--resume</code>."
        differs = f" Today's recipe differs in {_escape(', '.join(run.differences))}." * bool(run.differences)
        parts.append(f"<pre><code>{html.escape(run.command)}</code></pre>")
        origin = f'<span class="seconds">{_escape(describe_origin(run))}</span>'
        parts.append(f'<p class="soft">{_escape(column)}. {origin}.{differs}{unfinished}</p>')
        for path in run.images:
            caption = f"{section.binary.figures[path.name]}; {block.network}, algorithm {run.algorithm}"
            parts.append(
                f'<figure><img src="{html.escape(images.source(path))}" alt="{html.escape(caption)}">'
                f"<figcaption>{_escape(caption)}</figcaption></figure>"
            )
    return "\n".join(parts)


def _value(value: Value | None) -> str:
    if value is None:
        return ""
    remark = f"<br><small>{_escape(value.remark)}</small>" if value.remark else ""
    verdict = "holds" if value.holds else "does not hold"
    return f'<span class="number">{_escape(value.text)}</span><br>{_badge(verdict, verdict)}{remark}'


def _missing(lines: Iterable[str]) -> str:
    entries = "".join(f"<li>{_code(line)}</li>" for line in lines)
    return (
        f'<section id="missing"><h2>What was not run</h2><ul>{entries or "<li>Nothing.</li>"}</ul></section>'
    )


def _environments(content: Content) -> str:
    entries = "".join(
        f"<li>{_escape(text)}: {', '.join(f'<code>{html.escape(name)}</code>' for name in folders)}</li>"
        for text, folders in content.environments
    )
    return (
        f'<section id="environment"><h2>Environment</h2><ul>{entries}</ul>'
        f'<p>Computing time of all runs: <span class="seconds">{minutes(content.seconds)}</span>.</p>'
        "</section>"
    )
