"""Seconds that inferring a spec takes beyond tracing, and how they grow with the size of the program.

python -m benchmarks.inference_time
"""

import time
from typing import Any
from unittest import mock

import flax.linen as nn
import jax
import jax.numpy as jnp

import rebasin


class GPT(nn.Module):
    """Embedding tied to the output, learned positions, causal attention, MLPs."""

    depth: int
    width: int = 1024
    heads: int = 16

    @nn.compact
    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits [n, t, vocabulary]."""
        embed = nn.Embed(50_257, self.width)
        length = tokens.shape[1]
        x = embed(tokens) + self.param("positions", nn.initializers.normal(), (length, self.width))[None]
        mask = nn.make_causal_mask(tokens)
        for _ in range(self.depth):
            y = nn.LayerNorm()(x)
            x = x + nn.MultiHeadDotProductAttention(self.heads)(y, y, mask=mask)
            y = nn.LayerNorm()(x)
            x = x + nn.Dense(self.width)(nn.gelu(nn.Dense(4 * self.width)(y)))
        return embed.attend(nn.LayerNorm()(x))


class BottleneckResNet(nn.Module):
    """ResNet-50 to -152 with LayerNorm."""

    stages: tuple[int, ...]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Logits [n, 1000] of images [n, h, w, c]."""
        x = nn.relu(nn.LayerNorm()(nn.Conv(64, (7, 7), strides=2, use_bias=False)(x)))
        x = nn.max_pool(x, (3, 3), (2, 2), "SAME")
        for stage, depth in enumerate(self.stages):
            for block in range(depth):
                stride, width = 2 if block == 0 and stage > 0 else 1, 64 * 2**stage
                y = nn.relu(nn.LayerNorm()(nn.Conv(width, (1, 1), use_bias=False)(x)))
                y = nn.relu(nn.LayerNorm()(nn.Conv(width, (3, 3), strides=stride, use_bias=False)(y)))
                y = nn.LayerNorm()(nn.Conv(4 * width, (1, 1), use_bias=False)(y))
                if block == 0:
                    x = nn.LayerNorm()(nn.Conv(4 * width, (1, 1), strides=stride, use_bias=False)(x))
                x = nn.relu(x + y)
        return nn.Dense(1000)(x.mean((1, 2)))


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
    """Equations of a program, those of the programs inside it included."""
    inner = (
        value
        for eqn in jaxpr.eqns
        for param in eqn.params.values()
        for value in (param if isinstance(param, list | tuple) else (param,))
        if hasattr(value, "jaxpr") or hasattr(value, "eqns")
    )
    return len(jaxpr.eqns) + sum(count_equations(getattr(value, "jaxpr", value)) for value in inner)


def infer_timed(function: Any, *arguments: Any) -> tuple[Any, rebasin.PermutationSpec, float, float]:
    """The jaxpr, the spec, and the seconds spent in tracing and in all else of one and the same call."""
    traced: list[Any] = []
    make_jaxpr = jax.make_jaxpr

    def timed(inner: Any, **options: Any) -> Any:
        def run(*values: Any) -> Any:
            began = time.perf_counter()
            result = make_jaxpr(inner, **options)(*values)
            closed = result[0] if isinstance(result, tuple) else result
            traced.extend((closed, time.perf_counter() - began))
            return result

        return run

    with mock.patch.object(jax, "make_jaxpr", timed):
        began = time.perf_counter()
        spec = rebasin.infer_spec(function, *arguments)
        total = time.perf_counter() - began
    closed, tracing = traced
    return closed, spec, tracing, total - tracing


def main() -> None:
    """Prints a row for each model; minima of three runs."""
    print(f"{'model':>15} equations groups tracing/s inference/s µs/equation")
    for name, (model, x) in CASES.items():
        shapes = jax.eval_shape(model.init, jax.random.key(0), x)
        runs = [infer_timed(model.apply, shapes, x) for _ in range(3)]
        closed, spec = runs[0][:2]
        tracing, beyond = min(run[2] for run in runs), min(run[3] for run in runs)
        equations = count_equations(closed.jaxpr)
        print(
            f"{name:>15} {equations:>9} {len(spec.groups):>6} {tracing:>9.2f} {beyond:>11.2f} "
            f"{1e6 * beyond / equations:>11.0f}"
        )


if __name__ == "__main__":
    main()
