"""Mutations fit the code, are made in a copy, and what their tests say is read rightly."""

import pathlib

import pytest

from benchmarks import mutate
from benchmarks.mutation.catalogue import check_mutations, mutations_of, read_catalogue
from benchmarks.mutation.laboratory import Laboratory, Outcome
from rebasin.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


def entry(**changes):
    fields = {"file": "rebasin/sums.py", "words": "sign", "old": "a + b", "new": "a - b", "why": "sums"}
    return {**fields, **changes}


@pytest.fixture
def checkout(tmp_path):
    """A checkout with one function and one test of it."""
    root = tmp_path / "checkout"
    for folder in ("rebasin", "experiments", "benchmarks", "tests"):
        (root / folder).mkdir(parents=True)
    (root / "rebasin/__init__.py").touch()
    (root / "rebasin/sums.py").write_text("def add(a, b):\n    return a + b  # sum\n")
    (root / "tests/test_sums.py").write_text(
        "from rebasin.sums import add\n\ndef test_add():\n    assert add(2, 1) == 3\n"
    )
    (root / "pyproject.toml").touch()
    (root / "setup.py").touch()
    return root


def test_every_mutation_can_be_made_and_every_room_has_some():
    mutations = read_catalogue()
    check_mutations(mutations, ROOT)
    assert len(mutations) >= 60
    rooms = {path.parent.relative_to(ROOT).as_posix() for path in ROOT.glob("rebasin/*/*.py")}
    mutated = {"/".join(mutation.file.split("/")[:2]) for mutation in mutations}
    assert rooms - mutated == {"rebasin/tracing"}
    assert all(mutation.why for mutation in mutations)


def test_mutations_that_do_not_fit_are_all_listed(checkout):
    mutations = mutations_of(
        [
            entry(words="absent", old="a * b"),
            entry(words="twice", old="b"),
            entry(words="nothing", new="a + b"),
            entry(words="fine"),
            entry(file="rebasin/gone.py", words="lost"),
            entry(words="untested", tests=["tests/test_sums.py::test_subtract"]),
        ]
    )
    with pytest.raises(ConfigError) as info:
        check_mutations(mutations, checkout)
    assert str(info.value).splitlines() == [
        "mutations do not fit the code:",
        "  rebasin/sums.py: absent: its old text occurs 0 times, wanted once",
        "  rebasin/sums.py: twice: its old text occurs 2 times, wanted once",
        "  rebasin/sums.py: nothing: it changes nothing",
        "  rebasin/gone.py: lost: no such file",
        "  rebasin/sums.py: untested: no test tests/test_sums.py::test_subtract",
    ]


def test_entries_that_cannot_be_read_are_all_listed():
    with pytest.raises(ConfigError) as info:
        mutations_of([entry(), entry(), {"file": "rebasin/sums.py", "test": []}])
    assert str(info.value).splitlines() == [
        "the catalogue of mutations cannot be read:",
        "  mutation 2: there is another one called 'rebasin/sums.py: sign'",
        "  mutation 3: missing ['words', 'old', 'new', 'why'], unknown ['test']",
    ]


def test_a_mutation_is_killed_in_the_copy_and_undone(checkout, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")  # plugins import JAX, which takes seconds
    folder = tmp_path / "laboratory"
    folder.mkdir()
    killed, survivor = mutations_of([entry(), entry(words="comment", old="# sum", new="# mus")])
    laboratory = Laboratory(checkout, folder, timeout=60)
    source = (checkout / "rebasin/sums.py").read_text()
    assert laboratory.run_mutated(killed).killed_by == "tests/test_sums.py::test_add"
    assert (folder / "tree/rebasin/sums.py").read_text() == source
    assert laboratory.run_mutated(survivor).killed_by == ""
    assert laboratory.run_unmutated(killed.tests).killed_by == ""
    assert (checkout / "rebasin/sums.py").read_text() == source
    (nowhere,) = mutations_of([entry(tests=["tests/test_lost.py"])])
    with pytest.raises(ConfigError, match="pytest ended with status 4"):
        laboratory.run_mutated(nowhere)


def test_the_table_keeps_the_rows_of_mutations_that_were_not_made(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(f"# Before\n{mutate.BEGIN}{mutate.END}\n# After\n")
    mutations = mutations_of([entry(), entry(words="a | b"), entry(words="new")])
    outcomes = [Outcome("tests/test_sums.py::test_add[1]", 1.6), Outcome("", 2.0)]
    rows = {m.name: mutate.build_row(m, outcome) for m, outcome in zip(mutations, outcomes, strict=False)}
    mutate.write_table(page, mutations, rows, "Made by hand.")
    assert page.read_text().splitlines() == [
        "# Before",
        mutate.BEGIN.strip(),
        "Made by hand.",
        "",
        "2 of 3 mutations: 1 killed, 1 survived.",
        "",
        "| file | mutation | killed by | seconds |",
        "| --- | --- | --- | --- |",
        "| `rebasin/sums.py` | sign | `test_add` | 2 |",
        "| `rebasin/sums.py` | a \\| b | **survived** | 2 |",
        "",
        "Why those survived:",
        "",
        "- `rebasin/sums.py`, a | b: not explained yet.",
        mutate.END,
        "# After",
    ]
    read = mutate.read_rows(page.read_text())
    assert list(read.values()) == list(rows.values())
    mutate.write_table(page, mutations, read, "Again.")
    assert "1 killed, 1 survived" in page.read_text()


def test_mutations_are_chosen_by_file_or_words():
    mutations = mutations_of([entry(), entry(words="order")])
    assert mutate.choose(mutations, "sums") == mutations
    assert mutate.choose(mutations, "order") == mutations[1:]
    outcomes = {mutations[0].name: "", mutations[1].name: "tests/test_sums.py::test_add"}
    rows = {m.name: mutate.build_row(m, Outcome(outcomes[m.name], 1.0)) for m in mutations}
    assert mutate.choose(mutations, "sums", rows) == mutations[:1]
    with pytest.raises(ConfigError, match="no mutation has 'trees' in its file or words"):
        mutate.choose(mutations, "trees")


def test_every_survivor_is_explained_on_the_page():
    rows = mutate.read_rows(mutate.PAGE.read_text())
    survived = {name for name, row in rows.items() if row[2] == "**survived**"}
    explained = {mutation.name for mutation in read_catalogue() if mutation.survives}
    assert survived == explained
