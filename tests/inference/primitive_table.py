"""The table of docs/primitives.md: how inference treats every primitive that importing jax defines.

  make primitive-table

Run as a program, it writes the table anew. A test compares the page with the rules of today.
"""

import pathlib
import subprocess
import sys

import rebasin.inference.rules  # noqa: F401  # registers every rule
from rebasin.inference.rule import find_effect, find_rule, registered_primitives
from rebasin.inference.rules.opaque import INTERNAL, PINNED_ON_PURPOSE

PAGE = pathlib.Path(__file__).parents[2] / "docs/primitives.md"
BEGIN, END = "<!-- primitive-table begins -->\n", "<!-- primitive-table ends -->\n"

# Read in a process of its own, since other libraries define primitives too.
_LIST = """
import gc
import jax
from jax.extend import core
print(*sorted({x.name for x in gc.get_objects() if isinstance(x, core.Primitive)}), sep="\\n")
"""


def primitives_of_jax():
    """Return the names of all primitives that exist once jax is imported."""
    run = subprocess.run([sys.executable, "-c", _LIST], capture_output=True, text=True, check=True)
    return run.stdout.split()


def kind(primitive):
    """Return "rule", "pinned on purpose" or "internal"; `None` if the primitive is in no list."""
    if primitive in PINNED_ON_PURPOSE:
        return "pinned on purpose"
    if primitive in INTERNAL:
        return "internal"
    return None if find_rule(primitive) is None else "rule"


def table():
    """Return the lines of the table; primitives with the same text share a row.

    It lists what older and newer releases of JAX have as well, so the page does not depend on the release.
    """
    texts = {"rule": _describe, "pinned on purpose": PINNED_ON_PURPOSE.get, "internal": INTERNAL.get}
    rows = {}
    for name in sorted([*registered_primitives(), *INTERNAL]):
        known = kind(name)
        rows.setdefault((known, texts[known](name)), []).append(f"`{name}`")
    lines = ["| primitives | kind | what it does, or why not |", "| --- | --- | --- |"]
    order = {name: i for i, name in enumerate(texts)}
    for (known, text), names in sorted(rows.items(), key=lambda item: (order[item[0][0]], item[1])):
        lines.append(f"| {', '.join(names)} | {known} | {text} |")
    return lines


def _describe(primitive):
    """Return the effect of a rule and the first line of its docstring."""
    rule = find_rule(primitive)
    summary = (rule.__doc__ or "").partition("\n")[0].replace("``", "`").replace("|", "\\|")
    return f"{find_effect(primitive)}: {summary}"


def section(text):
    """Return the lines of the table in a text."""
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()


def main():
    """Write the table."""
    text = PAGE.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    lines = "".join(f"{line}\n" for line in table())
    PAGE.write_text(text[:begin] + lines + text[end:])


if __name__ == "__main__":
    main()
