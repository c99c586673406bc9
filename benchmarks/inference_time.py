"""Seconds that inferring a spec takes beyond tracing, and how they grow with the size of the program.

  python -m benchmarks.inference_time

The table has a row for each of four causal transformers and three ResNets with LayerNorm: number of equations
of the traced program, number of groups of the spec, seconds of tracing, seconds of everything else, and the
latter for each equation. Times are of the processor (all of it is one thread), minima of three runs without
garbage collection: a collection goes through all that the process holds, which takes as long as the inference
of a large network, and falls into either part by chance. It takes half a minute on two CPU cores.
"""

import gc
import time
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

import rebasin
from benchmarks.architectures import GPT, BottleneckResNet
from benchmarks.command import run
from benchmarks.reports import build_reporter

HEADER = ("model", "equations", "groups", "tracing, s", "inference, s", "µs/equation")

CASES = {
    **{
        f"GPT, {depth} layers": (GPT(depth), jax.ShapeDtypeStruct((1, 64), jnp.int32))
        for depth in (6, 12, 24, 48)
    },
    **{
        f"ResNet-{name}": (BottleneckResNet(stages), jax.ShapeDtypeStruct((1, 224, 224, 3), jnp.float32))
        for name, stages in ((50, (3, 4, 6, 3)), (101, (3, 4, 23, 3)), (152, (3, 8, 36, 3)))
    },
}


def count_equations(jaxpr: Any) -> int:
    """Count the equations of a program, and of the programs inside it."""
    inner = (
        value
        for eqn in jaxpr.eqns
        for param in eqn.params.values()
        for value in (param if isinstance(param, list | tuple) else (param,))
        if hasattr(value, "jaxpr") or hasattr(value, "eqns")
    )
    return len(jaxpr.eqns) + sum(count_equations(getattr(value, "jaxpr", value)) for value in inner)


def infer_timed(function: Any, *arguments: Any) -> tuple[Any, rebasin.PermutationSpec, float, float]:
    """Infer a spec; return the jaxpr, the spec, the processor's seconds of tracing and of everything else."""
    traced: list[Any] = []
    make_jaxpr = jax.make_jaxpr

    def timed(inner: Any, **options: Any) -> Any:
        def run(*values: Any) -> Any:
            began = time.thread_time()
            result = make_jaxpr(inner, **options)(*values)
            closed = result[0] if isinstance(result, tuple) else result
            traced.extend((closed, time.thread_time() - began))
            return result

        return run

    with mock.patch.object(jax, "make_jaxpr", timed):
        gc.collect()
        gc.disable()
        try:
            began = time.thread_time()
            spec = rebasin.infer_spec(function, *arguments)
            total = time.thread_time() - began
        finally:
            gc.enable()
    closed, tracing = traced
    return closed, spec, tracing, total - tracing


def main() -> None:
    """Print a row for each model."""
    rows = []
    reporter = build_reporter()
    with reporter.stage("models", len(CASES)) as advance:
        for name, (model, x) in CASES.items():
            shapes = jax.eval_shape(model.init, jax.random.key(0), x)
            runs = [infer_timed(model.apply, shapes, x) for _ in range(3)]
            closed, spec = runs[0][:2]
            tracing, beyond = min(run[2] for run in runs), min(run[3] for run in runs)
            equations = count_equations(closed.jaxpr)
            counts = (str(equations), str(len(spec.groups)))
            rows.append((name, *counts, f"{tracing:.2f}", f"{beyond:.2f}", f"{1e6 * beyond / equations:.0f}"))
            advance()
    reporter.table(HEADER, rows)


if __name__ == "__main__":
    run(main)
