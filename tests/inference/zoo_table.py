"""The table of architectures in BUILD_NOTES.md; run as a program, it verifies every spec and writes it anew.

make zoo-table
"""

import collections
import functools
import itertools
import pathlib
import re
import time

import jax
import numpy as np
from zoo import ZOO, arrays, sort_key

import rebasin
from rebasin.axis import iter_blocks
from rebasin.trees import leaf_table

BUILD_NOTES = pathlib.Path(__file__).parents[2] / "BUILD_NOTES.md"
BEGIN, END = "<!-- zoo-table begins -->\n", "<!-- zoo-table ends -->\n"
HEAD = ["architecture", "groups", "sizes", "moves", "stays put: reason × axes", "ms"]


def row(name):
    """All columns but the last."""
    specimen = ZOO[name].build()
    spec = _infer(specimen)()
    sizes = sorted(spec.group_sizes(specimen.tree).values(), key=sort_key)
    texts = ["×".join(map(str, size)) if isinstance(size, tuple) else str(size) for size in sizes]
    share = f"{100 * moving_share(spec, specimen.tree):.0f} %"
    reasons = collections.Counter(_short(pin.reason) for pin in spec.pins)
    pins = ", ".join(f"{reason} × {count}" for reason, count in reasons.most_common())
    return [name.replace("_", " "), str(len(sizes)), ", ".join(texts), share, pins]


def moving_share(spec, tree):
    """The part of all numbers in the tree that lie on an axis which moves."""
    shapes = {path: np.shape(leaf) for path, leaf in leaf_table(tree).items()}
    moving = total = 0
    for path, axes in spec.leaves:
        for block in iter_blocks(axes, shapes[path]):
            count = int(np.prod(block.shape))
            total += count
            moving += count * any(label in spec.groups for label in block.labels)
    return moving / total


def _short(reason):
    """A reason without its source line and numbers."""
    reason = re.sub(r" \([^()]*:\d+\)", "", reason)
    kinds = {r"meets an axis of input \d+": "input", r"reaches an axis of output \d+": "output"}
    return next((short for long, short in kinds.items() if re.fullmatch(long, reason)), reason)


def _infer(specimen):
    return functools.partial(
        rebasin.infer_spec,
        specimen.function,
        specimen.tree,
        *specimen.inputs,
        state_outputs=specimen.state_outputs,
    )


def _milliseconds(name):
    """Inference and tracing together, the median of five."""
    infer = _infer(ZOO[name].build())
    times = []
    for _ in range(5):
        began = time.perf_counter()
        infer()
        times.append(time.perf_counter() - began)
    return f"{1000 * np.median(times):.0f}"


def _verify(name):
    specimen = ZOO[name].build()
    tree, inputs = arrays(specimen.tree), arrays(specimen.inputs)
    spec = _infer(specimen)()
    rebasin.verify_spec(spec, specimen.function, tree, *inputs, state_outputs=specimen.state_outputs)
    jax.clear_caches()


def _line(cells):
    return "| " + " | ".join(cells) + " |\n"


def section(text):
    """The rows of the table in a text."""
    return text[text.index(BEGIN) + len(BEGIN) : text.index(END)].strip().splitlines()[2:]


def main():
    """Writes the table."""
    lines = [_line(HEAD), _line(["---"] * len(HEAD))]
    for name in ZOO:
        _verify(name)
        lines.append(_line([*row(name), _milliseconds(name)]))
    text = BUILD_NOTES.read_text()
    begin, end = text.index(BEGIN) + len(BEGIN), text.index(END)
    BUILD_NOTES.write_text(text[:begin] + "".join(itertools.chain(lines)) + text[end:])


if __name__ == "__main__":
    main()
