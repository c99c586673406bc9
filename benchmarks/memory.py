"""Memory that matching and passes over data take beyond their inputs.

  python -m benchmarks.memory
  python -m benchmarks.memory --tables=passes --examples=1000,16000 --width=4

The first table is of weight matching, in copies of one network; the second of everything that streams a split
of the data, by the size of the split, on a VGG-16 with BatchNorm and random images of CIFAR-10's shape.

Each row, or size of split, is a process of its own with networks (Gaussian weights) and data in place. Peaks
of resident memory are Linux's (VmHWM) above the level before the call, so that what was there, the split
among it, does not count; a copy of it would. The first call also compiles, and XLA's compiler and programs
are not copies of anything; a warm call, after freed memory went back to the system, shows the data alone.
"""

import ctypes
import gc
import json
import pathlib
import sys
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

import rebasin
from benchmarks.fresh_process import run_fresh
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.problems import gaussian_problems
from experiments.harness.console import Reporter
from rebasin.models import build_model

__all__ = ["PASSES", "pass_growth", "peak_growth", "resident_growth"]

TABLES = ("matching", "passes")

_TABLES = flags.DEFINE_list("tables", list(TABLES), "Which tables.")
_EXAMPLES = flags.DEFINE_list("examples", ["1000", "4000", "16000"], "Sizes of the split.")
_WIDTH = flags.DEFINE_integer("width", 8, "Width of the VGG-16 of the passes.", lower_bound=1)
_BATCH = flags.DEFINE_integer("batch_size", 250, "Examples that a pass evaluates at once.", lower_bound=1)
_OUTPUT = flags.DEFINE_string("output", None, "Folder for memory.json, the numbers of the second table.")
flags.register_validator(_TABLES, set(TABLES).issuperset, f"known: {', '.join(TABLES)}")

_PROC = pathlib.Path("/proc/self")
MAX_WIDTH = 64
_IMAGE = (32, 32, 3)


def peak_growth(method: str, spec: rebasin.PermutationSpec, a: Any, b: Any) -> tuple[int, int]:
    """Bytes by which resident memory peaks above its level before a first call, and before a warm one."""
    a, b = jax.block_until_ready(jax.device_put((a, b)))
    key = jax.random.key(0)
    call = lambda: METHODS[method](spec, a, b, key=key)  # noqa: E731
    return resident_growth(call), resident_growth(call)


def resident_growth(call: Any) -> int:
    """Bytes by which this process' resident memory peaks during a call above its level before."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # freed memory that is still resident would hide what the call takes
    (_PROC / "clear_refs").write_text("5")  # the peak is now the present level
    before = _status("VmRSS")
    result = call()
    peak = _status("VmHWM")
    del result
    return peak - before


def _status(field: str) -> int:
    lines = (_PROC / "status").read_text().splitlines()
    (line,) = (line for line in lines if line.startswith(f"{field}:"))
    return 1024 * int(line.split()[1])


class _Setting(NamedTuple):
    """What a pass over data needs."""

    spec: rebasin.PermutationSpec
    a: Any
    b: Any
    function: Callable[[Any, Any], Any]
    update: Callable[[Any, Any], Any]
    images: jax.Array
    batch_size: int


def pass_growth(name: str, num_examples: int, width: int, batch_size: int) -> tuple[int, int, int]:
    """Bytes of a split, and those by which memory peaks in a first pass over it and in a warm one."""
    model = build_model("vgg16_batchnorm", width=width, num_classes=10)

    def function(tree: Any, images: jax.Array) -> Any:
        return model.apply(tree, images)

    def update(tree: Any, images: jax.Array) -> Any:
        return tree | model.apply(tree, images, mutable=["batch_stats"])[1]

    image = jax.ShapeDtypeStruct((1, *_IMAGE), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    spec = rebasin.infer_spec(function, shapes, image)
    rng = np.random.default_rng(0)
    # All positive, as variances are.
    a, b = (
        jax.tree.map(lambda x: jnp.asarray(0.1 * abs(rng.normal(size=x.shape)) + 0.01, x.dtype), shapes)
        for _ in range(2)
    )
    images = jnp.asarray(rng.normal(size=(num_examples, *_IMAGE)).astype(np.float32))
    a, b, images = jax.block_until_ready((a, b, images))
    setting = _Setting(spec, a, b, function, update, images, batch_size)
    call = PASSES[name](setting)
    return images.nbytes, resident_growth(call), resident_growth(call)


@jax.jit
def _call(prepare: Callable[[Any, Any], Any], tree: Any, alpha: Any) -> Any:
    """As a sweep calls what prepares a network: compiled, with the data as arguments."""
    return prepare(tree, alpha)


def _activations(x: _Setting) -> Callable[[], Any]:
    return lambda: rebasin.activation_matching(
        x.spec, x.a, x.b, x.function, x.images, batch_size=x.batch_size
    )


def _covariance(x: _Setting) -> Callable[[], Any]:
    return lambda: rebasin.covariance_matching(
        x.spec, x.a, x.b, x.function, x.images, key=jax.random.key(0), batch_size=x.batch_size
    )


def _repair(x: _Setting) -> Callable[[], Any]:
    """Statistics of both ends in the first call, of the middle in each."""
    built: list[Callable[..., Any]] = []

    def call() -> Any:
        if not built:
            repair = rebasin.build_repair(x.spec, x.a, x.b, x.function, x.images, batch_size=x.batch_size)
            built.append(repair.prepare)
        return jax.block_until_ready(_call(built[0], rebasin.interpolate(x.a, x.b, 0.5), 0.5))

    return call


def _norm_reset(x: _Setting) -> Callable[[], Any]:
    built: list[Callable[..., Any]] = []

    def call() -> Any:
        if not built:
            built.append(rebasin.build_norm_reset(x.update, x.images, batch_size=x.batch_size))
        return jax.block_until_ready(_call(built[0], x.a, 0.5))

    return call


# Everything of the library that streams a split, by what the table calls it.
PASSES: Mapping[str, Callable[[_Setting], Callable[[], Any]]] = {
    "activation matching": _activations,
    "covariance matching": _covariance,
    "REPAIR": _repair,
    "norm reset": _norm_reset,
}


def main(argv: list[str]) -> None:
    """Prints the tables."""
    if len(argv) > 1:
        raise app.UsageError(f"unknown arguments {argv[1:]}")
    if not (_PROC / "clear_refs").exists():
        sys.exit("error: peaks of memory are read from Linux's /proc, which is not here")
    reporter = Reporter()
    if "matching" in _TABLES.value:
        _report_matching(reporter)
    if "passes" in _TABLES.value:
        _report_passes(reporter)


def _report_passes(reporter: Reporter) -> None:
    """A row for each pass: peaks by the size of the split."""
    sizes = [int(text) for text in _EXAMPLES.value]
    found = {name: dict(_measure_passes(name, sizes, reporter)) for name in PASSES}
    data = {n: next(iter(found.values()))[n]["data"] for n in sizes}
    reporter.say(
        "\nPeak of resident memory, in MiB, above its level with networks and split in place, by the number\n"
        f"of examples of the split, which itself takes {', '.join(_mib(data[n]) for n in sizes)} MiB"
    )
    header = ["\npass", *(f"first\n{n:,}" for n in sizes), *(f"warm\n{n:,}" for n in sizes)]
    rows = [
        [name, *(_mib(of[n][call]) for call in ("first", "warm") for n in sizes)]
        for name, of in found.items()
    ]
    reporter.table(header, rows)
    if _OUTPUT.value:
        directory = pathlib.Path(_OUTPUT.value)
        directory.mkdir(parents=True, exist_ok=True)
        about = {"width": _WIDTH.value, "batch_size": _BATCH.value}
        text = json.dumps({**about, "bytes": found}, indent=1)
        (directory / "memory.json").write_text(text + "\n")


def _measure_passes(name: str, sizes: list[int], reporter: Reporter) -> Iterator[tuple[int, dict[str, int]]]:
    for n in sizes:
        numbers = run_fresh("benchmarks.memory:pass_growth", name, n, _WIDTH.value, _BATCH.value)
        yield n, dict(zip(("data", "first", "warm"), numbers, strict=True))
        reporter.say(f"{name}, {n:,} examples: done")


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _report_matching(reporter: Reporter) -> None:
    """A row for each model and method."""
    rows = []
    for problem in gaussian_problems(("mlp", "vgg16", "resnet20"), pairs=1, max_width=MAX_WIDTH):
        trees = jax.device_get(problem.pairs[0].load())
        network = sum(leaf.nbytes for leaf in jax.tree.leaves(trees[0]))
        for method in (OURS, PEER):
            first, warm = run_fresh("benchmarks.memory:peak_growth", method, problem.spec, *trees)
            rows.append(
                (
                    problem.model,
                    method,
                    f"{network / 2**20:.1f}",
                    f"{first / 2**20:.0f}",
                    f"{warm / 2**20:.1f}",
                    f"{warm / network:.1f}",
                )
            )
            reporter.say(f"{problem.model}, {method}: done")
    reporter.say(
        "\nPeak of resident memory above its level before the call; the network itself for comparison"
    )
    reporter.table(("model", "method", "network MiB", "first call MiB", "warm MiB", "warm, copies"), rows)


if __name__ == "__main__":
    app.run(main)
