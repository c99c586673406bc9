"""The table of docs/architectures.md: what inference finds on every architecture of the zoo.

  make zoo-table

Run as a program, it verifies every spec in float64 and writes the table anew. A test compares the table with
what inference finds today.
"""

import collections
import functools
import itertools
import pathlib
import time

import jax
import numpy as np
from zoo import ZOO, arrays, sort_key

import rebasin
from benchmarks.shares import parameter_share, short_reason

ARCHITECTURES = pathlib.Path(__file__).parents[2] / "docs/architectures.md"
BEGIN, END = "<!-- zoo-table begins -->\n", "<!-- zoo-table ends -->\n"
HEAD = ["architecture", "groups", "sizes", "moves", "units", "stays put: reason × axes", "ms"]


def row(name):
    """Return the cells of an architecture's row, without its time."""
    specimen = ZOO[name].build()
    spec = _infer(specimen)()
    sizes = sorted(spec.group_sizes(specimen.tree).values(), key=sort_key)
    texts = ["×".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in sizes]
    share = f"{100 * parameter_share(spec, specimen.tree):.0f} %"
    units = f"{100 * spec.unit_shares(specimen.tree).moving:.0f} %"
    reasons = collections.Counter(short_reason(pin.reason) for pin in spec.pins)
    pins = ", ".join(f"{reason} × {count}" for reason, count in reasons.most_common())
    return [name.replace("_", " "), str(len(sizes)), ", ".join(texts), share, units, pins]


def _infer(specimen):
    """Return a function that infers the spec of a specimen."""
    return functools.partial(
        rebasin.infer_spec,
        specimen.function,
        specimen.tree,
        *specimen.inputs,
        state_outputs=specimen.state_outputs,
    )


def _milliseconds(name):
    """Return the time of tracing and inference together, the median of five calls."""
    infer = _infer(ZOO[name].build())
    times = []
    for _ in range(5):
        began = time.perf_counter()
        infer()
        times.append(time.perf_counter() - began)
    return f"{1000 * np.median(times):.0f}"


def _verify(name):
    """Verify the spec of an architecture in float64, and free what that compiled."""
    specimen = ZOO[name].build()
    tree, inputs = arrays(specimen.tree), arrays(specimen.inputs)
    spec = _infer(specimen)()
    rebasin.verify_spec(spec, specimen.function, tree, *inputs, state_outputs=specimen.state_outputs)
    jax.clear_caches()


def _line(cells):
    return "| " + " | ".join(cells) + " |\n"


def section(text):
    """Return the rows of the table in a text, without its head."""
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()[2:]


def main():
    """Verify every spec and write the table."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for name in ZOO:
        _verify(name)
        lines.append(_line([*row(name), _milliseconds(name)]))
    text = ARCHITECTURES.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    ARCHITECTURES.write_text(text[:begin] + "".join(itertools.chain(lines)) + text[end:])


if __name__ == "__main__":
    main()
