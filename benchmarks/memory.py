"""Memory that matching and passes over data take beyond their inputs.

  python -m benchmarks.memory
  python -m benchmarks.memory --tables=passes --examples=1000,16000 --width=4

The first table is about weight matching, in copies of one network. The second is about everything that
streams a split of the data, by the size of the split, on a VGG-16 with BatchNorm and random images of
CIFAR-10's shape. Both together take some minutes on two CPU cores. Linux only.

Every row of the first table and every number of examples of the second is measured in a process of its own,
in which networks (Gaussian weights) and data are in place. A peak is Linux's largest resident memory (VmHWM)
minus the memory before the call. So memory that was in use before, such as the split, does not count, but a
copy of it would. The first call also compiles; XLA's compiler and programs take memory too, which says
nothing about copies. A warm call, after freed memory was returned to the system, shows the memory of data
alone.
"""

import ctypes
import functools
import gc
import json
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

import rebasin
from benchmarks.command import run
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.problems import gaussian_problems
from benchmarks.processes import run_fresh
from benchmarks.reports import Reporter, build_reporter
from rebasin.errors import ConfigError
from rebasin.models import build_model

__all__ = ["PASSES", "pass_growth", "peak_growth", "resident_growth"]

TABLES = ("matching", "passes")

_PROC = pathlib.Path("/proc/self")
MAX_WIDTH = 64
_IMAGE = (32, 32, 3)


def peak_growth(method: str, spec: rebasin.PermutationSpec, params_a: Any, params_b: Any) -> tuple[int, int]:
    """Return by how many bytes resident memory peaks in a first call of a method, and in a warm one."""
    a, b = jax.block_until_ready(jax.device_put((params_a, params_b)))
    key = jax.random.key(0)

    def call() -> Any:
        return METHODS[method](spec, a, b, key=key)

    return resident_growth(call), resident_growth(call)


def resident_growth(call: Callable[[], Any]) -> int:
    """Return by how many bytes this process's resident memory peaks during a call above its level before."""
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
    """What a pass over data needs.

    Attributes:
      spec: the symmetries.
      params_a: tree of A.
      params_b: tree of B.
      apply_fn: ``(params, images)`` to logits.
      update: ``(params, images)`` to the tree with new running statistics.
      images: the data, [n, h, w, c].
      batch_size: number of examples that are evaluated at once.
    """

    spec: rebasin.PermutationSpec
    params_a: Any
    params_b: Any
    apply_fn: Callable[[Any, Any], Any]
    update: Callable[[Any, Any], Any]
    images: jax.Array
    batch_size: int


def pass_growth(name: str, num_examples: int, width: int, batch_size: int) -> tuple[int, int, int]:
    """Return the bytes of a split, and by how many memory peaks in a first pass over it and in a warm one."""
    model = build_model("vgg16_batchnorm", width=width, num_classes=10)

    def apply_fn(params: Any, images: jax.Array) -> Any:
        return model.apply(params, images)

    def update(params: Any, images: jax.Array) -> Any:
        return params | model.apply(params, images, mutable=["batch_stats"])[1]

    image = jax.ShapeDtypeStruct((1, *_IMAGE), np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    spec = rebasin.infer_spec(apply_fn, shapes, image)
    rng = np.random.default_rng(0)
    # All leaves are positive, since variances have to be.
    a, b = (
        jax.tree.map(lambda x: jnp.asarray(0.1 * abs(rng.normal(size=x.shape)) + 0.01, x.dtype), shapes)
        for _ in range(2)
    )
    images = jnp.asarray(rng.normal(size=(num_examples, *_IMAGE)).astype(np.float32))
    a, b, images = jax.block_until_ready((a, b, images))
    call = PASSES[name](_Setting(spec, a, b, apply_fn, update, images, batch_size))
    return images.nbytes, resident_growth(call), resident_growth(call)


@jax.jit
def _call(prepare: Callable[[Any, Any], Any], params: Any, alpha: Any) -> Any:
    """Call a function that prepares a network as a sweep does: compiled, with the data as arguments."""
    return prepare(params, alpha)


def _activations(x: _Setting) -> Callable[[], Any]:
    return lambda: rebasin.activation_matching(
        x.spec, x.params_a, x.params_b, x.apply_fn, x.images, batch_size=x.batch_size
    )


def _covariance(x: _Setting) -> Callable[[], Any]:
    return lambda: rebasin.covariance_matching(
        x.spec, x.params_a, x.params_b, x.apply_fn, x.images, key=jax.random.key(0), batch_size=x.batch_size
    )


def _repair(x: _Setting) -> Callable[[], Any]:
    """Return a call that measures the statistics of the midpoint, and at first those of both endpoints."""

    @functools.cache
    def prepare() -> Callable[..., Any]:
        repair = rebasin.build_repair(
            x.spec, x.params_a, x.params_b, x.apply_fn, x.images, batch_size=x.batch_size
        )
        return repair.prepare

    return lambda: jax.block_until_ready(
        _call(prepare(), rebasin.interpolate(x.params_a, x.params_b, 0.5), 0.5)
    )


def _norm_reset(x: _Setting) -> Callable[[], Any]:
    """Return a call that measures the running statistics of A."""

    @functools.cache
    def reset() -> Callable[..., Any]:
        return rebasin.build_norm_reset(x.params_a, x.update, x.images, batch_size=x.batch_size)

    return lambda: jax.block_until_ready(_call(reset(), x.params_a, 0.5))


# Everything of the library that streams a split, under the names of the table.
PASSES: Mapping[str, Callable[[_Setting], Callable[[], Any]]] = {
    "activation matching": _activations,
    "covariance matching": _covariance,
    "REPAIR": _repair,
    "norm reset": _norm_reset,
}


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_list("tables", list(TABLES), "Which tables.")
    flags.register_validator("tables", set(TABLES).issuperset, f"known: {', '.join(TABLES)}")
    flags.DEFINE_list("examples", ["1000", "4000", "16000"], "Sizes of the split.")
    flags.DEFINE_integer("width", 8, "Width of the VGG-16 of the passes.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 250, "Examples that a pass evaluates at once.", lower_bound=1)
    flags.DEFINE_string("output", None, "Folder for memory.json, the numbers of the second table.")


def main() -> None:
    """Measure and print the tables."""
    options = flags.FLAGS
    if not (_PROC / "clear_refs").exists():
        raise ConfigError("peaks of memory are read from Linux's /proc, which is not here")
    reporter = build_reporter()
    if "matching" in options.tables:
        _report_matching(reporter)
    if "passes" in options.tables:
        sizes = [int(text) for text in options.examples]
        about = {"width": options.width, "batch_size": options.batch_size}
        found = {name: dict(_measure_passes(name, sizes, reporter, **about)) for name in PASSES}
        _report_passes(found, reporter)
        if options.output:
            directory = pathlib.Path(options.output)
            directory.mkdir(parents=True, exist_ok=True)
            (directory / "memory.json").write_text(json.dumps({**about, "bytes": found}, indent=1) + "\n")


def _measure_passes(
    name: str, sizes: list[int], reporter: Reporter, *, width: int, batch_size: int
) -> Iterator[tuple[int, dict[str, int]]]:
    """Yield for each size of the split the bytes of the data, of a first pass and of a warm one."""
    for n in sizes:
        numbers = run_fresh("benchmarks.memory:pass_growth", name, n, width, batch_size)
        yield n, dict(zip(("data", "first", "warm"), numbers, strict=True))
        reporter.say(f"{name}, {n:,} examples: done")


def _report_passes(found: Mapping[str, Mapping[int, Mapping[str, int]]], reporter: Reporter) -> None:
    """Print a row for each pass, with its peaks by the size of the split."""
    data = {n: numbers["data"] for n, numbers in next(iter(found.values())).items()}
    reporter.say(
        "\nPeak of resident memory, in MiB, above its level with networks and split in place, by the number\n"
        f"of examples of the split, which itself takes {', '.join(map(_mib, data.values()))} MiB"
    )
    header = ["\npass", *(f"first\n{n:,}" for n in data), *(f"warm\n{n:,}" for n in data)]
    rows = [
        [name, *(_mib(of[n][call]) for call in ("first", "warm") for n in data)] for name, of in found.items()
    ]
    reporter.table(header, rows)


def _mib(count: int) -> str:
    return f"{count / 2**20:.1f}"


def _report_matching(reporter: Reporter) -> None:
    """Measure weight matching and print a row for each model and method."""
    rows = []
    for problem in gaussian_problems(("mlp", "vgg16", "resnet20"), pairs=1, max_width=MAX_WIDTH):
        trees = jax.device_get(problem.pairs[0].load())
        network = sum(leaf.nbytes for leaf in jax.tree.leaves(trees[0]))
        for method in (OURS, PEER):
            first, warm = run_fresh("benchmarks.memory:peak_growth", method, problem.spec, *trees)
            sizes = (_mib(network), f"{first / 2**20:.0f}", _mib(warm), f"{warm / network:.1f}")
            rows.append((problem.model, method, *sizes))
            reporter.say(f"{problem.model}, {method}: done")
    reporter.say(
        "\nPeak of resident memory above its level before the call; the network itself for comparison"
    )
    reporter.table(("model", "method", "network MiB", "first call MiB", "warm MiB", "warm, copies"), rows)


if __name__ == "__main__":
    define_flags()
    run(main)
