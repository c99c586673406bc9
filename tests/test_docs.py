"""The pages of prose: links and names of files lead somewhere, and limits on length hold."""

import pathlib
import re

import pytest

import rebasin

ROOT = pathlib.Path(__file__).parents[1]
PAGES = sorted(
    page for folder in (".", "docs", "benchmarks", "experiments") for page in (ROOT / folder).glob("*.md")
)

# Where a name of a file in a page may begin, beside the folder of the page.
FOLDERS = [ROOT, ROOT / "rebasin"]

# Files that the worked examples of CONTRIBUTING.md make.
EXAMPLES = {"rebasin/matching/best_of.py", "experiments/distances.py", "experiments/distances_figures.py"}


def anchors(page):
    """Return the anchors that a page's headings get where Markdown is rendered."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def page_id(page):
    return page.relative_to(ROOT).as_posix()


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_relative_link_leads_somewhere(page):
    dead = []
    for link in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not target.exists() or (anchor and anchor not in anchors(target)):
            dead.append(link)
    assert dead == []


@pytest.mark.parametrize("page", PAGES, ids=page_id)
def test_every_file_that_is_named_exists(page):
    """Names in backticks with a folder and an ending; the changelog may name what is gone."""
    if page.name == "CHANGELOG.md":
        pytest.skip("it names files of the past")
    names = re.findall(r"`([\w.-]+(?:/[\w.-]+)+\.(?:py|md|json|txt|yml|toml))`", page.read_text())
    missing = [name for name in names if not any((f / name).exists() for f in (page.parent, *FOLDERS))]
    assert set(missing) <= EXAMPLES


def test_every_test_that_is_named_exists():
    tests = "\n".join(path.read_text() for path in (ROOT / "tests").rglob("test_*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text()):
            assert f"def {name}(" in tests, f"{page_id(page)}: {name}"


def test_the_public_names_are_those_of_the_readme():
    text = (ROOT / "README.md").read_text()
    table = text[text.index("All public names:") : text.index("## Matching methods")]
    rows = [line.split("|")[1] for line in table.splitlines() if line.startswith("| `")]
    assert {name for row in rows for name in re.findall(r"`(\w+)`", row)} == set(rebasin.__all__)


def test_build_notes_stay_short():
    assert len((ROOT / "BUILD_NOTES.md").read_text().splitlines()) <= 200


def test_terminal_output_in_the_readme_fits_a_terminal():
    blocks = re.findall(r"```text\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert blocks
    assert max(len(line) for block in blocks for line in block.splitlines()) <= 80
