"""What the book adds to the pages of this folder: pages and figures that live elsewhere in the repository.

A page such as ``experiments/README.md`` is read where it is written, and is a chapter of the book too. Its
links are those of the repository. Here they are led to the chapters, and figures are copied beside them. A
link to a file that is no chapter keeps its text alone.
"""

import pathlib
import posixpath
import re
from collections.abc import Mapping
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = pathlib.Path(__file__).parents[1]

# The chapter that a file of the repository becomes.
CHAPTERS: Mapping[str, str] = {
    "BUILD_NOTES.md": "notes.md",
    "CHANGELOG.md": "changelog.md",
    "CONTRIBUTING.md": "contributing.md",
    "README.md": "overview.md",
    "benchmarks/RESULTS.md": "timings.md",
    "docs/report/report.md": "reproduction.md",
    "experiments/README.md": "results.md",
}

_LINK = re.compile(r"(!?)\[((?:[^\]\[]|\[[^\]]*\])*)\]\((?!https?:|#|mailto:)([^)\s]+)\)")


def on_files(files: Files, config: Any) -> Files:
    """Add the chapters and the figures of all results."""
    for source, chapter in CHAPTERS.items():
        if files.get_file_from_path(chapter) is None:
            files.append(_generated(config, chapter, (ROOT / source).read_text()))
    for figure in sorted((ROOT / "results").rglob("*.png")):
        name = figure.relative_to(ROOT).as_posix()
        files.append(_generated(config, name, figure.read_bytes()))
    return files


def on_page_markdown(markdown: str, *, page: Any, **_: Any) -> str:
    """Lead the links of a page, which are those of the repository, to chapters and figures."""
    chapter = page.file.src_uri
    here = next((source for source, name in CHAPTERS.items() if name == chapter), f"docs/{chapter}")
    return _LINK.sub(lambda link: _led(link, posixpath.dirname(here), chapter), markdown)


def _led(link: re.Match[str], folder: str, chapter: str) -> str:
    """Return one link as it has to be in the book."""
    mark, text, target = link.groups()
    path, _, anchor = target.partition("#")
    wanted = posixpath.normpath(posixpath.join(folder, path))
    if wanted in CHAPTERS:
        wanted = CHAPTERS[wanted]
    elif wanted.startswith("docs/"):
        wanted = wanted.removeprefix("docs/")
    elif not (wanted.startswith("results/") and wanted.endswith(".png")):
        return text
    relative = posixpath.relpath(wanted, posixpath.dirname(chapter) or ".")
    return f"{mark}[{text}]({relative}{'#' + anchor if anchor else ''})"


def _generated(config: Any, name: str, content: str | bytes) -> File:
    return File.generated(config, name, content=content)
