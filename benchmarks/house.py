"""Size of the code, and how much of it one call of the library enters.

  python -m benchmarks.house
  python -m benchmarks.house --checkout=/path/to/an/older/checkout --checkout=.

The first table has the number of Python files, of lines and of functions (methods and functions inside
functions included) of each room. The second has the number of files and functions of `rebasin` that one call
of `weight_matching`, `activation_matching` and `infer_spec` enters, on an MLP 64-128-128-128-10 with random
weights: for the first call in a process, which also traces and compiles, and for a second call. With several
checkouts, a cell has their numbers in the order in which they are given.

It takes less than a minute for each checkout, and the counts do not depend on the hardware.
"""

import ast
import pathlib
import sys
import threading
from collections.abc import Callable, Sequence
from types import FrameType
from typing import Any, NamedTuple

import jax
import numpy as np
from absl import flags

import rebasin
from benchmarks.architectures import Architecture, draw_network
from benchmarks.command import run
from benchmarks.processes import run_fresh
from benchmarks.tables import markdown_table
from rebasin.models import MLP

__all__ = ["CALLS", "ROOMS", "Size", "count_entered", "enter_call", "measure_room"]

ROOMS = (
    "rebasin",
    "rebasin/matching",
    "rebasin/inference",
    "rebasin/tracing",
    "rebasin/training",
    "experiments",
    "tests",
)
CALLS = ("weight_matching", "activation_matching", "infer_spec")

_EXAMPLES = 256


class Size(NamedTuple):
    """How large a folder is.

    Attributes:
      files: number of Python files, in folders inside it too.
      lines: number of their lines.
      functions: number of functions that they define, those inside classes and functions included.
    """

    files: int
    lines: int
    functions: int


def measure_room(folder: pathlib.Path) -> Size:
    """Count the files, lines and functions of a folder; all are 0 if there is no such folder."""
    sources = [path.read_text() for path in sorted(folder.rglob("*.py"))]
    functions = sum(
        isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        for source in sources
        for node in ast.walk(ast.parse(source))
    )
    return Size(len(sources), sum(len(source.splitlines()) for source in sources), functions)


def count_entered(call: Callable[[], Any], folder: pathlib.Path) -> tuple[int, int]:
    """Count the distinct files and functions of a folder that a call enters, in threads that it starts too.

    Lambdas count as functions; modules, classes and comprehensions do not.
    """
    inside = f"{folder}/"
    entered: set[tuple[str, int, str]] = set()

    def record(frame: FrameType, event: str, _: Any) -> None:
        code = frame.f_code
        named = not code.co_name.startswith("<") or code.co_name == "<lambda>"
        # A class body has a frame as well, but no flag CO_OPTIMIZED.
        if event == "call" and named and code.co_flags & 1 and code.co_filename.startswith(inside):
            entered.add((code.co_filename, code.co_firstlineno, code.co_name))

    threading.setprofile(record)
    sys.setprofile(record)
    try:
        call()
    finally:
        sys.setprofile(None)
        threading.setprofile(None)  # pyright: ignore[reportArgumentType]
    return len({path for path, _, _ in entered}), len(entered)


def enter_call(name: str) -> tuple[int, int, int, int]:
    """Return how many files and functions the first call of a function of the library enters, and a second.

    This runs in a process of its own, in which only the networks, their spec and the data are in place. The
    call takes positional arguments alone, which all versions of the library understand.
    """
    architecture = Architecture(MLP((128,) * 3, 10), (1, 8, 8, 1))
    model = architecture.model
    image = jax.ShapeDtypeStruct(architecture.input_shape, np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    a, b = draw_network(shapes, 0), draw_network(shapes, 1)
    if name == "infer_spec":

        def call() -> Any:
            return rebasin.infer_spec(model.apply, a, image)

    else:
        spec, _ = architecture.trace()
        images = np.random.default_rng(0).normal(size=(_EXAMPLES, 8, 8, 1)).astype(np.float32)

        def call() -> Any:
            if name == "weight_matching":
                return rebasin.weight_matching(spec, a, b, key=jax.random.key(0))
            return rebasin.activation_matching(spec, a, b, model.apply, images)

    folder = pathlib.Path(str(rebasin.__file__)).parent
    return (*count_entered(call, folder), *count_entered(call, folder))


def _join(values: Sequence[int]) -> str:
    return " → ".join(f"{value:,}" for value in values)


def main() -> None:
    """Measure the checkouts and print both tables."""
    checkouts = [pathlib.Path(text) for text in flags.FLAGS.checkout]
    entered = {
        name: [run_fresh("benchmarks.house:enter_call", name, checkout=checkout) for checkout in checkouts]
        for name in CALLS
    }
    rooms = {room: [measure_room(checkout / room) for checkout in checkouts] for room in ROOMS}
    print(
        markdown_table(
            ("room", "files", "lines", "functions"),
            [(f"{room}/", *map(_join, zip(*sizes, strict=True))) for room, sizes in rooms.items()],
        )
    )
    header = ("one call of", "files", "functions", "files, second call", "functions, second call")
    rows = [(f"`{name}`", *map(_join, zip(*counts, strict=True))) for name, counts in entered.items()]
    print(f"\n{markdown_table(header, rows)}")


def define_flags() -> None:
    """Define the flags of this benchmark."""
    here = str(pathlib.Path(__file__).parents[1])
    flags.DEFINE_multi_string("checkout", [here], "Folder of a checkout of this repository; may be repeated.")


if __name__ == "__main__":
    define_flags()
    run(main)
