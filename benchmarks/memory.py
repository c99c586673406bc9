"""Memory that matching takes beyond its inputs, in copies of one network.

python -m benchmarks.memory

Each row is a process of its own with both networks (Gaussian weights) in place. Peaks of resident memory are
Linux's (VmHWM), reset before the call. The first call also compiles, and XLA's compiler and programs are not
copies of anything; a warm call, after freed memory went back to the system, shows the data alone.
"""

import ctypes
import gc
import pathlib
import sys
from typing import Any

import jax

import rebasin
from benchmarks.fresh_process import run_fresh
from benchmarks.methods import METHODS, OURS, PEER
from benchmarks.problems import gaussian_problems
from experiments.console import Reporter

__all__ = ["peak_growth", "resident_growth"]

_PROC = pathlib.Path("/proc/self")
MAX_WIDTH = 64


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


def main() -> None:
    """Prints a row for each model."""
    if not (_PROC / "clear_refs").exists():
        sys.exit("error: peaks of memory are read from Linux's /proc, which is not here")
    reporter = Reporter()
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
    main()
