"""What inference finds on public models, and whether that is verified: a table of docs/architectures.md.

  make public-models
  python -m benchmarks.public_models --list
  python -m benchmarks.public_models --only=BERT --only=jraph

The models of `benchmarks.public_zoo` are built with small sizes and random weights. Each is measured in a
fresh process with a time limit, so one that fails or takes too long becomes a row with its error. The whole
table takes about ten minutes on two CPU cores and is written into the page; with ``--only`` the rows are
printed alone. The packages are pinned in the extra ``public-models``.

Two shares are measured. *Parameters* is the share of all numbers in the tree that lie on an axis which some
group permutes. *Units* is the share of positions that some group can take elsewhere, over all axes of all
leaves, without those that are no hidden units in any network of the kind (`INTERFACE`): axes that are shared
with inputs or outputs, rows that are looked up by index, windows of convolutions, layers that are scanned in
order, leaves that are not used, and axes of length 1. Where an axis is a product, such as heads × dimensions,
each factor counts for an equal part of its positions, so pinned heads show even if the dimensions move.
"""

import collections
import pathlib
import re
import statistics
import sys
import time
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import rebasin
from benchmarks.command import run
from benchmarks.processes import run_fresh
from benchmarks.public_zoo import PACKAGES, Specimen
from benchmarks.shares import parameter_share, short_reason
from rebasin.axis import iter_blocks
from rebasin.errors import ConfigError, VerificationError
from rebasin.trees import leaf_table

__all__ = [
    "BEGIN",
    "END",
    "Row",
    "measure",
    "measure_all",
    "measure_public",
    "select",
    "unit_share",
    "write_between_markers",
    "write_table",
]

PAGE = pathlib.Path(__file__).parents[1] / "docs/architectures.md"
BEGIN, END = "<!-- public-models begins -->\n", "<!-- public-models ends -->\n"
HEADER = (
    "model",
    "package",
    "groups",
    "units",
    "parameters",
    "reasons to stay × axes",
    "s",
    "verified",
)

# Reasons, without source lines, for which an axis has no hidden units.
INTERFACE = (
    r"input",
    r"output",
    r"the function does not use this leaf",
    r".*: positions are looked up by index",
    r".*: neighbouring positions of a convolution",
    r".*: windows of neighbouring positions",
    r".*: the axis is scanned over in order",
)

# Letters of an error message that a cell of the table shows; the whole message goes to stderr.
_CELL = 90


class Row(NamedTuple):
    """What is measured of a model.

    Attributes:
      groups: number of groups that move.
      inner: number of inner groups among them.
      units: share of hidden units that move, see the module's docstring.
      parameters: share of numbers that lie on an axis that moves.
      reasons: why other axes than those of `INTERFACE` stay put, with the number of axes.
      seconds: time of tracing and inference together, the median of three calls.
      problem: the error of verification; empty if the spec is verified.
      is_any_length: whether it was also verified on inputs of another length.
    """

    groups: int
    inner: int
    units: float
    parameters: float
    reasons: dict[str, int]
    seconds: float
    problem: str
    is_any_length: bool


def unit_share(spec: rebasin.PermutationSpec, tree: Any) -> float:
    """Return the share of hidden units that move; the module's docstring says what counts as one."""
    missed = {(pin.path, pin.axis) for pin in spec.pins if not _is_interface(pin.reason)}
    moving = total = 0.0
    for path, leaf in leaf_table(tree).items():
        for i, (axis, size) in enumerate(zip(spec.table[path], np.shape(leaf), strict=True)):
            for block in iter_blocks((axis,), (size,)):
                factors = [label for label, n in zip(block.labels, block.shape, strict=True) if n > 1]
                moves = sum(label in spec.groups for label in factors)
                # Factors that belong to the interface count for nothing.
                counted = len(factors) if (path, i) in missed else moves
                if counted:
                    count = int(np.prod(block.shape))
                    moving += count * moves / counted
                    total += count
    return moving / total if total else 0.0


def _is_interface(reason: str) -> bool:
    return any(re.fullmatch(pattern, short_reason(reason)) for pattern in INTERFACE)


def measure(specimen: Specimen) -> Row:
    """Infer and verify the spec of a model, and return its row."""
    function, params, states = specimen.function, specimen.params, specimen.state_outputs
    seconds = []
    for _ in range(3):
        began = time.perf_counter()
        spec = rebasin.infer_spec(function, params, *specimen.inputs, state_outputs=states)
        seconds.append(time.perf_counter() - began)
    problem = ""
    lengths = {"": specimen.inputs, "at another length, ": specimen.others}
    for where, inputs in lengths.items():
        if inputs is not None and not problem:
            try:
                rebasin.verify_spec(spec, function, params, *inputs, state_outputs=states)
            except VerificationError as error:
                problem = f"{where}{error}"
    pins = [pin.reason for pin in spec.pins if not _is_interface(pin.reason)]
    return Row(
        groups=len(spec.groups),
        inner=sum(group in spec.groups for group, _ in spec.indexed),
        units=unit_share(spec, params),
        parameters=parameter_share(spec, params),
        reasons=dict(collections.Counter(map(short_reason, pins)).most_common()),
        seconds=statistics.median(seconds),
        problem=problem,
        is_any_length=specimen.others is not None,
    )


def measure_public(package: str, name: str) -> Row:
    """Build and measure a public model, in this process."""
    # Modules with a dtype of their own compute in float64 then, so specs are verified to the last digits.
    jax.config.update("jax_enable_x64", True)
    # Nearly all of the time is compiling, and each program runs a few times only.
    jax.config.update("jax_disable_most_optimizations", True)
    return measure(PACKAGES[package][name]())


def measure_all(
    models: Iterable[tuple[str, str]], limit: float, function: str = "benchmarks.public_models:measure_public"
) -> dict[tuple[str, str], Row | str]:
    """Measure models in fresh processes.

    Args:
      models: package and name of each model.
      limit: seconds that a model may take.
      function: module and name of the function that measures a model, given its package and name.

    Returns:
      The row of each model, or the error that it ended with.
    """
    rows: dict[tuple[str, str], Row | str] = {}
    for package, name in models:
        try:
            rows[package, name] = run_fresh(function, package, name, limit=limit)
        except (RuntimeError, TimeoutError) as error:
            rows[package, name] = str(error).strip()
        row = rows[package, name]
        problem = row if isinstance(row, str) else row.problem
        print(f"{package}: {name}: {problem or 'verified'}", file=sys.stderr, flush=True)
    return rows


def write_table(rows: dict[tuple[str, str], Row | str]) -> str:
    """Write the rows as a table in Markdown."""
    cells = [[name, package, *_cells(row)] for (package, name), row in rows.items()]
    return "\n".join(f"| {' | '.join(line)} |" for line in [HEADER, ["---"] * len(HEADER), *cells])


def _cells(row: Row | str) -> list[str]:
    """Write a row without its first two cells."""
    if isinstance(row, str):  # the last line of a traceback names the error
        return ["", "", "", "", "", f"failed: {_shorten(row.splitlines()[-1])}"]
    reasons = ", ".join(f"{reason} × {count}" for reason, count in row.reasons.items())
    verified = "yes" if row.is_any_length else "yes, one length"
    verified = verified if row.groups else "nothing to verify"
    return [
        f"{row.groups}, {row.inner} inner" if row.inner else f"{row.groups}",
        _percent(row.units),
        _percent(row.parameters),
        reasons,
        f"{row.seconds:.2f}",
        f"no: {_shorten(row.problem)}" if row.problem else verified,
    ]


def _percent(share: float) -> str:
    """Write a share in per cent; only what is complete is written as 100 %."""
    return "100 %" if share == 1 else f"{min(100 * share, 99.9):.1f} %"


def _shorten(message: str) -> str:
    """Write a message in one line of at most `_CELL` letters that may stand in a table."""
    line = " ".join(message.split()).replace("|", "/")
    return line if len(line) <= _CELL else f"{line[: _CELL - 1]}…"


def write_between_markers(page: pathlib.Path, text: str) -> None:
    """Replace what stands between the two markers of a page."""
    old = page.read_text()
    begin, end = old.index(BEGIN) + len(BEGIN), old.index(END)
    page.write_text(f"{old[:begin]}{text}\n{old[end:]}")


def select(only: Sequence[str]) -> list[tuple[str, str]]:
    """Return package and name of the models that are named, by their own name or by their package.

    Args:
      only: names; none selects every model.

    Raises:
      ConfigError: a name belongs to no model and no package.
    """
    models = [(package, name) for package, builders in PACKAGES.items() for name in builders]
    known = {name for pair in models for name in pair}
    unknown = [name for name in only if name not in known]
    if unknown:
        raise ConfigError(f"no models or packages {unknown}; --list prints all")
    return [pair for pair in models if not only or any(name in pair for name in only)]


def _define_flags() -> None:
    flags.DEFINE_multi_string("only", [], "Name of a model or a package; may be repeated. The page stays.")
    flags.DEFINE_bool("list", False, "Print packages and names of the models, and measure nothing.")
    flags.DEFINE_float("limit", 900.0, "Seconds that a model may take.", lower_bound=1.0)


def main() -> None:
    """Measure the models, and write the table into the page unless `--only` names some."""
    models = select(flags.FLAGS.only)
    if flags.FLAGS.list:
        print("\n".join(f"{package}: {name}" for package, name in models))
        return
    table = write_table(measure_all(models, flags.FLAGS.limit))
    print(table)
    if not flags.FLAGS.only:
        write_between_markers(PAGE, table)


if __name__ == "__main__":
    _define_flags()
    run(main)
