"""The README's Python code runs as a reader would paste it, and prints what the README says."""

import pathlib
import re
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]


def test_library_example_prints_what_it_says():
    text = (ROOT / "README.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    (output,) = re.findall(r"It prints\n\n```text\n(.*?)```", text, re.DOTALL)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    # Processors round differently, so only the words and the order of magnitude are compared.
    numbers = re.compile(r"\d+\.\d+")
    assert numbers.sub("#", done.stdout) == numbers.sub("#", output)
    before, after = (float(n) for n in numbers.findall(done.stdout)[-2:])
    assert after < 0.1 < before


def test_every_file_and_command_named_exists():
    text = (ROOT / "README.md").read_text()
    for path in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / path).exists(), path
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    assert set(re.findall(r"make ([a-z-]+)", text)) <= targets
