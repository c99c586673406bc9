"""The book: its code runs and prints what it says, and it builds without a warning."""

import contextlib
import io
import os
import pathlib
import re
import subprocess
import sys

import jax
import pytest

ROOT = pathlib.Path(__file__).parents[1]
NUMBER = re.compile(r"\d+(?:\.\d+)?")


def run_blocks(page):
    """Run the code of a page from top to bottom; yield what each block prints with the output behind it."""
    blocks = re.findall(r"```(python|text)\n(.*?)```", (ROOT / "docs" / page).read_text(), re.DOTALL)
    names = {"__name__": "__main__"}
    for (kind, code), (following, output) in zip(blocks, [*blocks[1:], ("", "")], strict=True):
        if kind == "python":
            printed = io.StringIO()
            # Readers have JAX's own default, which the test suite is stricter than.
            with contextlib.redirect_stdout(printed), jax.numpy_rank_promotion("allow"):
                exec(compile(code, page, "exec"), names)
            if following == "text":
                yield printed.getvalue(), output


@pytest.mark.parametrize("page", ["quickstart.md", "inference.md"])
def test_pages_print_what_they_say(page):
    pairs = list(run_blocks(page))
    assert pairs
    for printed, output in pairs:
        assert printed == output


@pytest.mark.slow
def test_the_tutorial_prints_what_it_says():
    """Processors round differently, so percentages are compared to within 15 points."""
    pairs = list(run_blocks("tutorial.md"))
    assert len(pairs) == 4
    for printed, output in pairs:
        assert NUMBER.sub("#", printed) == NUMBER.sub("#", output)
        both = (map(float, NUMBER.findall(text)) for text in (printed, output))
        assert all(abs(one - other) <= 15 for one, other in zip(*both, strict=True))


@pytest.mark.slow
def test_the_book_builds_without_a_warning(tmp_path):
    command = [sys.executable, "-m", "mkdocs", "build", "--site-dir", str(tmp_path)]
    environment = os.environ | {"NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    pages = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("index.html")}
    assert {".", "methods", "results", "api/matching", "contributing"} <= pages
    # A figure that lives beside its result, and a name of the library.
    assert (tmp_path / "results/digits_mlp/training_trajectories.png").exists()
    assert "weight_matching" in (tmp_path / "api/matching/index.html").read_text()


def test_every_public_name_has_an_entry():
    import rebasin

    entries = "\n".join(page.read_text() for page in (ROOT / "docs/api").glob("*.md"))
    assert {name for name in rebasin.__all__ if not re.search(rf"^::: .*\.{name}$", entries, re.M)} == set()
