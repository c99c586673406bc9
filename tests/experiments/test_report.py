"""The report: every part of the papers, every verdict of committed results, one page that loads nothing."""

import base64
import dataclasses
import html.parser
import json
import math
import pathlib
import re

import pytest

from experiments.harness.results import Claim
from experiments.harness.serialisation import to_json
from experiments.report.content import build_content, format_claim
from experiments.report.html import write_html
from experiments.report.images import Beside, Inline
from experiments.report.markdown import write_markdown
from experiments.report.registry import BINARIES, PARTS, unit_of
from experiments.report.runs import Found, find_runs
from experiments.report.settings import command_of, config_of, experiment_of
from rebasin.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]
RESULTS = sorted(ROOT.glob("results/*/results.json"))


def network(run):
    recipe = run["config"]["recipe"]
    return recipe["model"], recipe["dataset"]


class Nowhere:
    """Stands for the figures where only text is looked at."""

    def source(self, path):
        return f"data:,{path.name}"


@pytest.fixture(scope="module")
def found():
    return find_runs(ROOT / "results")


@pytest.fixture(scope="module")
def content(found):
    return build_content(found)


def test_every_binary_stands_in_the_registry():
    binaries = {path.stem for path in ROOT.glob("experiments/*.py") if "\ndef main(" in path.read_text()}
    assert set(BINARIES) == binaries


def test_every_figure_of_the_paper_is_a_part_and_is_measured():
    figures = [part for part in PARTS if part.label[0].isdigit()]
    assert {int(part.label.split()[0]) for part in figures} == set(range(1, 24))
    assert all(part.evidence for part in figures)
    assert {name for part in PARTS for name in part.evidence} <= set(BINARIES)


@pytest.mark.parametrize("name", [name for name, binary in BINARIES.items() if binary.figures])
def test_the_registry_names_the_figures_that_a_binary_draws(name):
    assert set(BINARIES[name].figures) == set(experiment_of(name).figures)


def test_every_claim_has_a_unit_and_belongs_to_a_part():
    begins = {(name, begin) for part in PARTS for name, ways in part.evidence.items() for begin in ways}
    used = set()
    for path in RESULTS:
        stored = json.loads(path.read_text())
        for claim in stored["claims"]:
            assert unit_of(stored["experiment"], claim["id"])
            fitting = {
                pair for pair in begins if pair[0] == stored["experiment"] and claim["id"].startswith(pair[1])
            }
            used |= fitting
            # The shuffled mask is a control of ours.
            assert fitting or claim["id"].startswith("transported_masks_beat_random_ones"), claim["id"]
    made = {json.loads(path.read_text())["experiment"] for path in RESULTS}
    assert {pair for pair in begins if pair[0] in made} == used


def test_a_claim_without_a_unit_is_an_error():
    with pytest.raises(KeyError, match="no unit for the claim 'who_knows' of loss_landscape"):
        unit_of("loss_landscape", "who_knows")


def test_every_verdict_of_the_first_table_is_that_of_the_files(content):
    rows = {row.part.label: row for row in content.rows}
    assert {int(label.split()[0]) for label in rows if label[0].isdigit()} == set(range(1, 24))
    stored = [json.loads(path.read_text()) for path in RESULTS]
    for part in PARTS:
        runs = [run for run in stored if run["experiment"] in part.evidence]
        own = [run for run in runs if network(run) in part.models]
        verdicts = [
            claim["holds"]
            for run in own or runs
            for claim in run["claims"]
            if claim["id"].startswith(part.evidence[run["experiment"]])
        ]
        badges = rows[part.label].badges
        assert sum(badge.total for badge in badges) == len(verdicts), part.label
        assert sum(badge.held for badge in badges) == sum(verdicts), part.label
        assert bool(verdicts) or rows[part.label].note.startswith(("not run", "not measured"))


def test_every_claim_of_the_files_stands_in_its_section_with_its_verdict(content):
    shown = sorted(
        (section.name, run.folder, value.text, value.holds)
        for section in content.sections
        for block in section.blocks
        for row in block.claims
        for run, value in zip(block.runs, row.values, strict=True)
        if value is not None
    )
    stored = []
    for path in RESULTS:
        run = json.loads(path.read_text())
        for claim in run["claims"]:
            numbers = {k: math.nan if v is None else v for k, v in claim.items()}
            text = format_claim(run["experiment"], Claim(**numbers))
            stored.append((run["experiment"], f"results/{path.parent.name}", text, claim["holds"]))
    assert shown == sorted(stored)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.parent.name)
def test_the_command_of_committed_results_gives_their_config(path):
    stored = json.loads(path.read_text())
    binary = stored["experiment"]
    arguments, differences = command_of(binary, stored["config"])
    built, wanted = (
        to_json(config) for config in (config_of(binary, arguments), experiment_of(binary).load(path).config)
    )
    # These networks were trained by a recipe that has changed since.
    differing = ["recipe.weight_decay"] if path.parent.name == "rates_mnist" else []
    assert differences == differing
    assert differing or built == wanted


class Page(html.parser.HTMLParser):
    """Checks that tags are closed in order, and collects what they refer to."""

    VOID = {"meta", "link", "img", "br"}

    def __init__(self):
        super().__init__()
        self.open, self.sources, self.ids, self.links, self.text = [], [], [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.sources += [given[name] for name in ("src", "srcset", "data") if name in given]
        self.sources += [given["href"]] if tag == "link" else []
        self.links += [given["href"]] if tag == "a" else []
        self.ids += [given["id"]] if "id" in given else []
        assert tag not in ("script", "iframe", "object", "base")
        assert not any(name.startswith("on") for name in given)
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text.append(data)


def parse(page):
    parser = Page()
    parser.feed(page)
    parser.close()
    assert parser.open == []
    return parser


def test_the_page_is_one_file_and_its_links_lead_somewhere(content):
    page = write_html(content, Nowhere())
    parsed = parse(page)
    assert len(parsed.sources) > 20
    assert all(source.startswith("data:") for source in parsed.sources)
    assert not re.search(r"url\(|@import", page)
    assert {link.removeprefix("#") for link in parsed.links} <= set(parsed.ids)
    assert len(parsed.ids) == len(set(parsed.ids))
    # One heading for each row of the first table.
    assert all(row.title in " ".join(parsed.text) for row in content.rows)


def test_text_is_escaped(found):
    nasty = '<script>alert("x")</script> & | `code` [link](http://x)'
    run = next(run for run in found.runs if run.binary == "loss_landscape")
    claims = [dataclasses.replace(claim, statement=nasty, paper=nasty) for claim in run.claims]
    config = {**run.config, "recipe": {**run.config["recipe"], "dataset": "<b>mnist"}}
    changed = dataclasses.replace(run, claims=tuple(claims), config=config, command=nasty)
    content = build_content(Found((changed,), (nasty,)), {"<i>section": nasty})
    parsed = parse(write_html(content, Nowhere()))
    assert nasty in "".join(parsed.text)
    text = write_markdown(content, ROOT)
    outside = re.sub(r"```.*?```|`[^`]*`", "", text, flags=re.DOTALL)
    assert "<script>" not in re.sub(r"\\.", "", outside)
    rows = [line for line in outside.splitlines() if line.startswith("|") and "alert" in line]
    # The first table has four columns, and that of a section with one run has three.
    assert {len(re.findall(r"(?<!\\)\|", line)) for line in rows} == {5, 4}


def test_columns_of_tables_agree_and_figures_exist(content, tmp_path):
    folder = ROOT / "docs" / "report"
    text = write_markdown(content, folder)
    for table in re.findall(r"(?:^\|.*\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}) == 1
    links = re.findall(r"^!\[.*\]\((.*)\)$", text, re.MULTILINE)
    assert len(links) > 20
    assert all((folder / link).resolve().is_file() for link in links)


def test_the_committed_report_is_that_of_the_committed_results(content):
    """If this fails, run `make report`."""
    folder = ROOT / "docs" / "report"
    assert (folder / "report.md").read_text() == write_markdown(content, folder)
    page = write_html(content, Nowhere())
    committed = (folder / "index.html").read_text()
    assert re.sub(r'src="[^"]*"', "", committed) == re.sub(r'src="[^"]*"', "", page)
    sources = parse_beside(committed)
    assert len(sources) == len(set(sources)) == page.count("<img")
    assert {folder / source for source in sources} == set((folder / "figures").iterdir())
    assert sum(path.stat().st_size for path in folder.rglob("*.*")) < 3e6


def parse_beside(page):
    return re.findall(r'<img src="(figures/[^"]*)"', page)


def test_figures_are_small_and_those_of_an_earlier_report_go(tmp_path):
    path = ROOT / "results/methods_digits/compare_methods.png"
    inside = Inline().source(path)
    assert base64.b64decode(inside.removeprefix("data:image/png;base64,"))[:4] == b"\x89PNG"
    (tmp_path / "figures").mkdir()
    (tmp_path / "figures" / "old.png").write_bytes(b"")
    beside = Beside(tmp_path)
    assert beside.source(path) == "figures/methods_digits_compare_methods.png"
    beside.tidy()
    (written,) = (tmp_path / "figures").iterdir()
    assert written.stat().st_size < path.stat().st_size / 2


def test_results_that_are_damaged_or_unfinished_are_named(tmp_path):
    source = ROOT / "results/digits_mlp_landscape/results.json"
    stored = json.loads(source.read_text())
    unfinished = {**stored, "summary": None, "claims": [], "records": stored["records"][:1]}
    del unfinished["sha256"]
    for name, text in {
        "begun": json.dumps(unfinished),
        "changed": source.read_text().replace('"holds": true', '"holds": false'),
        "no_json": "{",
    }.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "results.json").write_text(text)
    found = find_runs(tmp_path)
    content = build_content(found, {"weight_magnitude": "out of memory"})
    missing = "\n".join(content.missing)
    name = tmp_path.name
    assert f"{name}/begun is unfinished" in missing
    assert f"damaged: {name}/changed/results.json is damaged" in missing
    assert f"damaged: {name}/no_json/results.json" in missing
    assert "weight_magnitude failed: out of memory" in missing
    assert str(tmp_path) not in missing
    (row,) = (row for row in content.rows if row.part.label == "22")
    assert (row.badges, row.note) == ((), "not run: no finished results of loss_landscape")


def test_a_folder_without_results_is_an_error(tmp_path):
    with pytest.raises(ConfigError, match="holds no results.json"):
        find_runs(tmp_path)
    with pytest.raises(ConfigError, match="is no folder"):
        find_runs(tmp_path / "nowhere")
