"""Which cause `rebasin.diagnose` names where the cause is known: failures planted between trained networks.

  python -m benchmarks.planted_failures

Pairs of small networks are trained on the digits and aligned, and one failure is planted in each. An instance
counts if it does damage; pairs that stay as they are count false alarms. The table is a confusion matrix: its
rows are what was planted, its last column is what the diagnosis names first. It takes a quarter of an hour on
two busy CPU cores.

What is planted:

- *group*: the permutation of one group is replaced by a random one.
- *scale*: a layer of B is multiplied by 4 to 64, or divided, and the layer that reads it by the inverse, so
  that B computes the same function.
- *stream*: A and B begin with the same weights, but each of B's residual blocks has the units of the stream
  in an order of its own; both are trained from there. No single permutation can then serve all blocks.
- *variance*: networks with BatchNorm, averaged with their running statistics and without REPAIR.
"""

import collections
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from benchmarks.command import run
from benchmarks.reports import build_reporter
from rebasin.batches import Batch
from rebasin.training.data import load_dataset

__all__ = [
    "SEEDS",
    "Planted",
    "Verdict",
    "confusion",
    "judge",
    "load_digits",
    "plant_all",
    "plant_group",
    "plant_scale",
    "plant_stream",
    "train_pair",
]

HEADER = ("planted", "instances", "right", "among all named", "named first")

SEEDS = range(10)

# Steps of SGD with momentum; the errors on test data are 1 to 3 % then.
STEPS, BATCH, RATE = 600, 64, 0.1

# Damage that a planted failure must do: error at the midpoint above the mean error of A and B.
DAMAGE = 0.06

# The same of a pair that is connected, in which a failure is planted.
CONNECTED = 0.03

_EPSILON = 1e-5  # under the square roots of norms


class Planted(NamedTuple):
    """A pair of networks with a failure.

    Attributes:
      name: the architecture, its width and the seeds.
      cause: what was planted, ``"none"`` for nothing.
      where: the group or layers at fault; empty where it is the whole network.
      apply_fn: the function of the networks.
      params_a: tree of A.
      params_b: tree of B.
      permutation: the permutation to diagnose; `None` for the one that weight matching finds.
    """

    name: str
    cause: str
    where: tuple[str, ...]
    apply_fn: Callable[..., Any]
    params_a: Any
    params_b: Any
    permutation: Any


class Model(NamedTuple):
    """An architecture as functions: one that draws weights, one that evaluates, one that trains.

    Attributes:
      draw: ``(key, width) -> params``.
      apply_fn: ``(params, x) -> logits``.
      train_fn: ``(params, x) -> (logits, statistics)``, by the statistics of the batch where there are any.
    """

    draw: Callable[..., Any]
    apply_fn: Callable[..., Any]
    train_fn: Callable[..., Any]


@functools.cache
def load_digits() -> tuple[Batch, Batch]:
    """Return training and test images of the digits, as vectors of 64 numbers from 0 to 1."""
    data = load_dataset("digits")

    def scaled(batch: Batch) -> Batch:
        inputs = np.reshape(batch.inputs, (-1, 64)) / 16
        return Batch(jnp.asarray(inputs, jnp.float32), jnp.asarray(batch.labels))

    return scaled(data.train), scaled(data.test)


def _dense(key: jax.Array, inputs: int, outputs: int) -> dict[str, jax.Array]:
    kernel = jax.random.normal(key, (inputs, outputs)) * np.sqrt(2 / inputs)
    return {"kernel": kernel, "bias": jnp.zeros(outputs)}


def _affine(layer: Any, x: jax.Array) -> jax.Array:
    return jnp.dot(x, layer["kernel"]) + layer["bias"][None]


def _draw_mlp(key: jax.Array, width: int, depth: int = 3) -> Any:
    sizes = (64, *[width] * depth, 10)
    keys = jax.random.split(key, len(sizes))
    return {f"dense_{i}": _dense(keys[i], *sizes[i : i + 2]) for i in range(depth + 1)}


def _apply_mlp(params: Any, x: jax.Array) -> jax.Array:
    *hidden, last = (params[f"dense_{i}"] for i in range(len(params)))
    for layer in hidden:
        x = jax.nn.relu(_affine(layer, x))
    return _affine(last, x)


def _draw_batchnorm(key: jax.Array, width: int) -> Any:
    params, stats = _draw_mlp(key, width), {}
    for i in range(len(params) - 1):
        params[f"norm_{i}"] = {"scale": jnp.ones(width), "bias": jnp.zeros(width)}
        stats[f"norm_{i}"] = {"mean": jnp.zeros(width), "var": jnp.ones(width)}
    return {"params": params, "batch_stats": stats}


def _run_batchnorm(tree: Any, x: jax.Array, *, measure: bool) -> tuple[jax.Array, Any]:
    """Evaluate with running statistics, or with those of the batch, which are returned."""
    params, stats = tree["params"], dict(tree["batch_stats"])
    for i in range(len(stats)):
        x, norm = _affine(params[f"dense_{i}"], x), params[f"norm_{i}"]
        if measure:
            stats[f"norm_{i}"] = {"mean": x.mean(axis=0), "var": x.var(axis=0)}
        mean, var = stats[f"norm_{i}"]["mean"], stats[f"norm_{i}"]["var"]
        x = (x - mean[None]) / jnp.sqrt(var + _EPSILON)[None] * norm["scale"][None] + norm["bias"][None]
        x = jax.nn.relu(x)
    return _affine(params[f"dense_{len(stats)}"], x), stats


def _apply_batchnorm(tree: Any, x: jax.Array) -> jax.Array:
    return _run_batchnorm(tree, x, measure=False)[0]


def _draw_residual(key: jax.Array, width: int, blocks: int = 3) -> Any:
    keys = jax.random.split(key, 2 * blocks + 2)
    params: dict[str, Any] = {"stem": _dense(keys[0], 64, width), "top": _dense(keys[1], width, 10)}
    for i in range(blocks):
        into, out = (_dense(k, width, width) for k in keys[2 * i + 2 : 2 * i + 4])
        params[f"block_{i}"] = {"in": into, "out": out}
    return params


def _normalise(x: jax.Array) -> jax.Array:
    centred = x - x.mean(axis=-1, keepdims=True)
    return centred / jnp.sqrt(jnp.mean(centred**2, axis=-1, keepdims=True) + _EPSILON)


def _apply_residual(params: Any, x: jax.Array) -> jax.Array:
    x = _affine(params["stem"], x)
    for i in range(len(params) - 2):
        block = params[f"block_{i}"]
        x = x + _affine(block["out"], jax.nn.relu(_affine(block["in"], _normalise(x))))
    return _affine(params["top"], _normalise(x))


def _plain(draw: Callable[..., Any], apply_fn: Callable[..., Any]) -> Model:
    return Model(draw, apply_fn, _Plain(apply_fn))


class _Plain(NamedTuple):
    """A network without statistics as a function that trains."""

    apply_fn: Callable[..., Any]

    def __call__(self, params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
        return self.apply_fn(params, x), {}


MODELS = {
    "mlp": _plain(_draw_mlp, _apply_mlp),
    "residual": _plain(_draw_residual, _apply_residual),
    "batchnorm": Model(_draw_batchnorm, _apply_batchnorm, functools.partial(_run_batchnorm, measure=True)),
}


@functools.partial(jax.jit, static_argnums=0)
def _train(train_fn: Callable[..., Any], params: Any, key: jax.Array, data: Batch) -> Any:
    """Train by SGD with momentum, a cosine schedule and a short warm-up."""

    def loss(params: Any, batch: Batch) -> jax.Array:
        logits, _ = train_fn(params, batch.inputs)
        return -jnp.mean(jnp.take_along_axis(jax.nn.log_softmax(logits), batch.labels[:, None], axis=-1))

    def step(state: tuple[Any, Any], i: jax.Array) -> tuple[tuple[Any, Any], None]:
        params, momentum = state
        rows = jax.random.randint(jax.random.fold_in(key, i), (BATCH,), 0, len(data.labels))
        gradient = jax.grad(loss)(params, jax.tree.map(lambda x: x[rows], data))
        rate = RATE * jnp.minimum(1, (i + 1) / 20) * (1 + jnp.cos(jnp.pi * i / STEPS)) / 2
        momentum = jax.tree.map(lambda m, g, p: 0.9 * m + g + 1e-4 * p, momentum, gradient, params)
        return (jax.tree.map(lambda p, m: p - rate * m, params, momentum), momentum), None

    start = params, jax.tree.map(jnp.zeros_like, params)
    (params, _), _ = jax.lax.scan(step, start, jnp.arange(STEPS))
    return params


def _trained(model: str, params: Any, seed: int) -> Any:
    data = load_digits()[0]
    train_fn = MODELS[model].train_fn
    params = _train(train_fn, params, jax.random.key(1000 + seed), data)
    if stats := train_fn(params, data.inputs)[1]:
        params = {**params, "batch_stats": stats}
    return jax.device_get(params)


@functools.cache
def train_network(model: str, width: int, seed: int) -> Any:
    """Train one network on the digits from its own random weights."""
    return _trained(model, MODELS[model].draw(jax.random.key(seed), width), seed)


@functools.cache
def train_pair(model: str, width: int, seed: int) -> tuple[Planted, rebasin.PermutationSpec]:
    """Train and align two networks of seeds 2·seed and 2·seed + 1; B comes back as it is."""
    a, b = (train_network(model, width, 2 * seed + i) for i in (0, 1))
    apply_fn = MODELS[model].apply_fn
    aligned = rebasin.align(apply_fn, a, b, load_digits()[0].inputs[:2], verify=False)
    return Planted(
        f"{model} {width} seed {seed}", "none", (), apply_fn, a, b, aligned.permutation
    ), aligned.spec


def plant_group(pair: Planted, spec: rebasin.PermutationSpec, seed: int) -> Planted | None:
    """Replace the permutation of one group by a random one; `None` where that does no damage."""
    random = np.random.default_rng(seed)
    for group in random.permutation(spec.groups).tolist():
        rows = random.permutation(len(pair.permutation[group]))
        planted = pair._replace(cause="group", where=(group,), permutation={**pair.permutation, group: rows})
        if damage(planted, spec) >= DAMAGE:
            return planted
    return None


def plant_scale(pair: Planted, spec: rebasin.PermutationSpec, seed: int) -> Planted | None:
    """Multiply a layer of B and divide the layer that reads it, which behind a ReLU leaves its function.

    The factor is 4, 16 or 64, the first that does damage; `None` where none does.
    """
    random = np.random.default_rng(seed)
    down = bool(random.integers(2))
    number = int(random.integers(len(pair.params_b) - (2 if "block_0" in pair.params_b else 1)))
    for factor in (4, 16, 64):
        planted = _scaled(pair, number, np.float32(1 / factor if down else factor))
        if damage(planted, spec) >= DAMAGE:
            return planted
    return None


def _scaled(pair: Planted, number: int, factor: np.float32) -> Planted:
    params = dict(pair.params_b)
    if "block_0" in params:
        name = f"block_{number}"
        into, out = params[name]["in"], params[name]["out"]
        into, out = _times(into, factor), {**out, "kernel": out["kernel"] / factor}
        params[name], where = {"in": into, "out": out}, (f"{name}/in/kernel", f"{name}/out/kernel")
    else:
        names = f"dense_{number}", f"dense_{number + 1}"
        layer, reader = (params[name] for name in names)
        params[names[0]], params[names[1]] = (
            _times(layer, factor),
            {**reader, "kernel": reader["kernel"] / factor},
        )
        where = tuple(f"{name}/kernel" for name in names)
    return pair._replace(cause="scale", where=where, params_b=params)


def _times(layer: Any, factor: np.float32) -> Any:
    return jax.tree.map(lambda x: x * factor, layer)


def damage(pair: Planted, spec: rebasin.PermutationSpec) -> float:
    """Return the error at the midpoint less the mean error of A and B, on test data."""
    moved = rebasin.permute(spec, pair.permutation, pair.params_b)
    return float(_damage(pair.apply_fn, pair.params_a, moved, load_digits()[1]))


@functools.partial(jax.jit, static_argnums=0)
def _damage(apply_fn: Callable[..., Any], params_a: Any, moved: Any, data: Batch) -> jax.Array:
    def error(params: Any) -> jax.Array:
        return jnp.mean(jnp.argmax(apply_fn(params, data.inputs), axis=-1) != data.labels)

    return error(rebasin.interpolate(params_a, moved, 0.5)) - (error(params_a) + error(moved)) / 2


def plant_stream(width: int, seed: int, *, conflict: bool = True) -> tuple[Planted, rebasin.PermutationSpec]:
    """Train two residual networks from weights that differ by the order of the stream in each block.

    Args:
      width: units of the stream.
      seed: seed of the weights and of the orders.
      conflict: whether every block of B has an order of its own; otherwise both begin with the same weights.
    """
    model = MODELS["residual"]
    a = model.draw(jax.random.key(500 + seed), width, 4)
    # With a small stem the stream consists of what the blocks write, and their conflict does damage.
    a["stem"] = jax.tree.map(lambda x: x / 5, a["stem"])
    random = np.random.default_rng(seed)
    b = dict(a)
    for name in (f"block_{i}" for i in range(4) if conflict):
        order, into, out = random.permutation(width), a[name]["in"], a[name]["out"]
        b[name] = {
            "in": {**into, "kernel": into["kernel"][order]},
            "out": {**out, "kernel": out["kernel"][:, order]},
        }
    a, b = (_trained("residual", params, 100 + 2 * seed + i) for i, params in enumerate((a, b)))
    cause, where = ("stream", ("stem/kernel",)) if conflict else ("none", ())
    aligned = rebasin.align(model.apply_fn, a, b, load_digits()[0].inputs[:2], verify=False)
    name = f"residual {width} from one beginning, seed {seed}"
    return Planted(name, cause, where, model.apply_fn, a, b, aligned.permutation), aligned.spec


def plant_all(seeds: Sequence[int]) -> Iterator[Planted]:
    """Yield every planted failure that does damage, and every pair without one."""
    for seed in seeds:
        for model, width in (("mlp", 48), ("mlp", 64), ("residual", 64), ("residual", 96)):
            pair, spec = train_pair(model, width, seed)
            if damage(pair, spec) > CONNECTED:
                continue
            yield pair
            yield from (p for p in (plant_group(pair, spec, seed), plant_scale(pair, spec, seed)) if p)
        for width in (32, 48, 64):
            planted, spec = plant_stream(width, seed)
            if damage(planted, spec) >= DAMAGE:
                yield planted
        yield plant_stream(48, seed, conflict=False)[0]
        for width in (64, 128):
            pair, spec = train_pair("batchnorm", width, seed)
            if damage(pair, spec) >= DAMAGE:
                yield pair._replace(cause="variance")


class Verdict(NamedTuple):
    """What was planted, and what the diagnosis said.

    Attributes:
      planted: the pair.
      causes: the causes that were named, the first first; none where nothing stands out.
      right: whether the first names the cause that was planted, and one of its places.
    """

    planted: Planted
    causes: tuple[str, ...]
    right: bool


def judge(planted: Planted) -> Verdict:
    """Diagnose a pair on test data and compare with what was planted."""
    diagnosis = rebasin.diagnose(
        planted.apply_fn,
        planted.params_a,
        planted.params_b,
        load_digits()[1],
        planted.permutation,
        verify=False,
    )
    causes = tuple(finding.cause for finding in diagnosis.findings)
    if planted.cause == "none":
        return Verdict(planted, causes, not causes)
    right = causes[:1] == (planted.cause,)
    if right and planted.where:
        right = not set(planted.where).isdisjoint(diagnosis.findings[0].where)
    return Verdict(planted, causes, right)


def confusion(verdicts: Sequence[Verdict]) -> list[tuple[str, ...]]:
    """Return a row for each cause that was planted, with what was named first in its instances."""
    rows = []
    for cause in ("none", "group", "scale", "stream", "variance"):
        own = [v for v in verdicts if v.planted.cause == cause]
        first = collections.Counter(v.causes[0] if v.causes else "nothing" for v in own)
        named = ", ".join(f"{name} {count}" for name, count in first.most_common())
        among = sum(not v.causes if cause == "none" else cause in v.causes for v in own)
        rows.append((cause, str(len(own)), str(sum(v.right for v in own)), str(among), named))
    return rows


def main() -> None:
    """Diagnose all instances of ten seeds, and print the confusion matrix and the misses."""
    reporter = build_reporter()
    verdicts = []
    with reporter.stage("seeds", len(SEEDS)) as advance:
        for seed in SEEDS:
            verdicts += [judge(planted) for planted in plant_all([seed])]
            advance()
    for verdict in (v for v in verdicts if not v.right):
        reporter.say(f"{verdict.planted.cause} in {verdict.planted.name}: {verdict.causes or 'nothing'}")
    reporter.table(HEADER, confusion(verdicts))


if __name__ == "__main__":
    run(main)
