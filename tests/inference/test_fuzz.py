"""Random networks: permuting by the inferred spec must not change what they compute.

A network is a list of random steps over a pool of values: nested, shared, reshaped, concatenated, residual.
The same code runs with NumPy in float64 and is traced with JAX.
"""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from jax import lax

import rebasin

BATCH, CHANNELS, LONGEST = 2, 4, 7  # networks are inferred with a batch of 2
# fmt: off
STEPS = [
    "dense", "dense", "dense", "bias", "scale", "tanh", "split_axis", "merge_axes", "swap_axes",
    "concatenate", "halve", "add", "multiply", "norm", "mean", "attend", "tied", "running", "reverse",
    "stack_scan", "sort", "head_bias", "maxout", "gram", "repeat", "route", "pick",
    "take_apart", "take_apart_each", "attend_by_head", "turn_part", "patch", "fourier", "short_read",
    "short_read", "shared_ones", "shared_ones", "shared_zeros", "mask", "mask", "unmask", "identity", "drop",
]
# fmt: on


class Network:
    """A random function of a tree of weights and one input; a list of random numbers decides its steps."""

    def __init__(self, choices):
        self.choices = choices
        self.shapes = {}  # filled in by the first run

    def __call__(self, weights, x):
        """Runs in the library of `x`, NumPy or jax.numpy; without weights, only shapes count."""
        self.xp = jnp if isinstance(x, jax.Array) else np
        self.weights, self.count, self.numbers = weights, 0, iter(self.choices)
        self.pool = [x]
        self.length, self.shared = x.shape[0], {}
        self.is_token = (abs(x).sum(1) > 0).astype(x.dtype)  # false for padding, which is zero
        for name in [STEPS[n % len(STEPS)] for n in self._take(self._next() % 9 + 3)]:
            value = self.pool[-1 - self._next() % min(3, len(self.pool))]
            result = getattr(self, name)(value)
            if result is not None and result.size <= 4096:
                self.pool.append(result)
        return self.dense(self.pool[-1].reshape(self.length, -1), 3)

    def _next(self):
        return next(self.numbers, 1)

    def _take(self, n):
        return [self._next() for _ in range(n)]

    def weight(self, *shape):
        name = f"w{self.count}"
        self.count += 1
        if self.weights is None:
            self.shapes[name] = shape
            return np.ones(shape)
        return self.weights[name]

    def other(self, test):
        found = [value for value in self.pool if test(value)]
        return found[self._next() % len(found)] if found else None

    def dense(self, x, width=None):
        return self.xp.tanh(x @ self.weight(x.shape[-1], width or self._next() % 5 + 2))

    def bias(self, x):
        return x + self.weight(x.shape[-1])[(None,) * (x.ndim - 1)]

    def scale(self, x):
        return x * self.weight(*x.shape[1:])[None]

    def head_bias(self, x):
        """A weight on the last but one axis alone."""
        return x + self.weight(x.shape[-2])[..., None][(None,) * (x.ndim - 2)] if x.ndim > 2 else None

    def tanh(self, x):
        return self.xp.tanh(x)

    def split_axis(self, x):
        n = x.shape[-1]
        divisor = next((d for d in (2, 3, 5) if n % d == 0 and n > d), None)
        if divisor is None or x.ndim > 4:
            return None
        shape = (divisor, n // divisor) if self._next() % 2 else (n // divisor, divisor)
        return x.reshape(*x.shape[:-1], *shape)

    def take_apart(self, x):
        """Reshapes a value and takes parts of it out; all of it may be used later."""
        n = x.shape[-1]
        copies = next((d for d in (2, 3, 5) if n % d == 0 and n > d), None)
        if copies is None or x.ndim > 3:
            return None
        parts = self.xp.moveaxis(x.reshape(*x.shape[:-1], copies, -1), -2, 1)
        if self._next() % 2:
            self.pool.append(parts)
        if self._next() % 2 and copies > 2:
            return parts[:, :-1].sum(1) * parts[:, -1]
        return parts[:, 0] * self.xp.tanh(parts[:, -1])

    def take_apart_each(self, x):
        """Takes parts out of every position of the slowest factor, such as gate and value of each unit."""
        n = x.shape[-1]
        units = next((d for d in (2, 3, 5) if n % d == 0 and n > d), None)
        if units is None or x.ndim > 3:
            return None
        parts = x.reshape(*x.shape[:-1], units, -1)
        first = self._next() % (n // units)
        if self._next() % 2:
            self.pool.append(parts)
        product = parts[..., : first + 1] * self.xp.tanh(parts[..., -1:])
        return product if self._next() % 2 else product.reshape(*x.shape[:-1], -1)

    def turn_part(self, x):
        """Scales some positions behind every position of the slowest factor, each by a number of its own."""
        n = x.shape[-1]
        heads = next((d for d in (2, 3, 5) if n % d == 0 and n > d), 1)
        z = x.reshape(*x.shape[:-1], heads, -1)
        count = self._next() % z.shape[-1] + 1
        turned = z[..., :count] * self.xp.arange(1.0, count + 1).reshape((1,) * (z.ndim - 1) + (-1,)) / count
        z = self.xp.concatenate([turned, z[..., count:]], axis=-1)
        return z if self._next() % 2 and x.ndim < 4 else z.reshape(x.shape)

    def attend_by_head(self, x):
        """A fused projection ``[heads, 2·dims + values]`` of queries, keys and values, read in two ways."""
        heads, dims = self._next() % 2 + 2, self._next() % 3 + 1
        fused = x @ self.weight(x.shape[-1], heads * 3 * dims)
        if self._next() % 2:
            fused = fused.reshape(*x.shape[:-1], heads, 3, dims)
            q, k, v = (fused[..., i, :] for i in range(3))
        else:
            q, k, v = self.xp.split(fused.reshape(*x.shape[:-1], heads, -1), 3, axis=-1)
        if self._next() % 2:
            q, k = self.turn_part(q), self.turn_part(k)
            q, k = q.reshape(v.shape), k.reshape(v.shape)
        says = self.xp.tanh((q * k).sum(-1, keepdims=True))
        return says * v if self._next() % 2 and x.ndim < 4 else (says * v).reshape(*x.shape[:-1], -1)

    def merge_axes(self, x):
        return x.reshape(*x.shape[:-2], -1) if x.ndim > 2 else None

    def swap_axes(self, x):
        return self.xp.swapaxes(x, 1, x.ndim - 1) if x.ndim > 2 else None

    def concatenate(self, x):
        y = self.other(lambda v: v.shape[:-1] == x.shape[:-1])
        return self.xp.concatenate([x, y], axis=-1)

    def halve(self, x):
        half = x.shape[-1] // 2
        return x[..., :half] * x[..., half : 2 * half] if half else None

    def maxout(self, x):
        return x.reshape(*x.shape[:-1], -1, 2).max(axis=-1) if x.shape[-1] % 2 == 0 else None

    def add(self, x):
        return x + self.other(lambda v: v.shape == x.shape)

    def multiply(self, x):
        return x * self.other(lambda v: v.shape == x.shape)

    def norm(self, x):
        centred = x - x.mean(-1, keepdims=True)
        return centred / self.xp.sqrt((centred**2).mean(-1, keepdims=True) + 0.1)

    def mean(self, x):
        return x.mean(axis=1 + self._next() % (x.ndim - 1)) if x.ndim > 2 else None

    def gram(self, x):
        """The product of every position with every other."""
        return self.xp.einsum("nab,ncb->nac", x, x) / 4 if x.ndim == 3 else None

    def attend(self, x):
        """Attention whose last but one axis is the head or the position, by chance."""
        if x.ndim != 3:
            return None
        q, k, v = (x @ self.weight(x.shape[-1], 3) for _ in range(3))
        pattern = ("nhd,nhe->nde", "nhd,nkd->nhk")[self._next() % 2]
        scores = self.xp.exp(self.xp.tanh(self.xp.einsum(pattern, q, k)))
        scores = scores / scores.sum(-1, keepdims=True)
        return self.xp.einsum("nde,nhe->nhd" if pattern.endswith("nde") else "nhk,nkd->nhd", scores, v)

    def tied(self, x):
        w = self.weight(x.shape[-1], x.shape[-1] + 1)
        return self.xp.tanh(x @ w) @ w.T

    def running(self, x):
        return self.xp.cumsum(x, axis=1 + self._next() % (x.ndim - 1)) / 4

    def reverse(self, x):
        return self.xp.flip(x, axis=1 + self._next() % (x.ndim - 1))

    def sort(self, x):
        return self.xp.sort(x, axis=1 + self._next() % (x.ndim - 1))

    def repeat(self, x):
        return self.xp.broadcast_to(x[:, None], (x.shape[0], 2, *x.shape[1:])) if x.ndim < 4 else None

    def route(self, x):
        """The two best experts of three, chosen by one-hot codes and weighted by their logits."""
        logits, experts = x @ self.weight(x.shape[-1], 3), self.weight(3, x.shape[-1], 2)
        order = self.xp.argsort(-logits, axis=-1, stable=True)[..., :2]
        gates = (order[..., None] == self.xp.arange(3).reshape((1,) * x.ndim + (3,))).sum(-2)
        return self.xp.einsum("...c,...e,eck->...k", x, gates * self.xp.tanh(logits), experts)

    def pick(self, x):
        """A weight looked up at the place of the largest value; several values may be the largest."""
        x = (x, self.xp.tanh(x), self.xp.maximum(x, 0), self.xp.round(x))[self._next() % 4]
        axis = 1 + self._next() % (x.ndim - 1)
        return self.weight(x.shape[axis], 3)[x.argmax(axis)]

    def patch(self, x):
        """Looks up, adds to or overwrites a range, a stride or a list of units."""
        n = x.shape[-1]
        start, stride = self._next() % n, self._next() % 2 + 1
        stop = start + 1 + self._next() % (n - start)
        places = [range(start, stop), range(start % stride, n, stride), [*range(start, n), *range(start)]]
        index = np.array(places[self._next() % 3])
        if self._next() % 3 == 0:
            return x[..., index]
        new, adds = self.dense(x, len(index)), self._next() % 2
        if self.xp is jnp:
            if np.array_equal(index, np.arange(start, stop)):
                origin = (0,) * (x.ndim - 1) + (start,)
                return lax.dynamic_update_slice(x, new + adds * x[..., start:stop], origin)
            return x.at[..., index].add(new) if adds else x.at[..., index].set(new)
        changed = x.copy()
        changed[..., index] = new + adds * x[..., index]
        return changed

    def fourier(self, x):
        axis = 1 + self._next() % (x.ndim - 1)
        return self.xp.fft.fft(x, axis=axis).real / math.sqrt(x.shape[axis])

    def constant(self, make, *shape):
        """A constant array, one for all steps that ask for the same."""
        key = (make, shape)
        if key not in self.shared:
            self.shared[key] = getattr(self.xp, make)(*((shape,) if make != "eye" else shape))
        return self.shared[key]

    def short_read(self, x):
        """A table of which inputs of more examples read more rows."""
        rows = self.weight(LONGEST, x.shape[-1])
        rows = (rows, self.xp.tanh(rows), rows * self.weight(x.shape[-1])[None])[self._next() % 3]
        rows = rows[: self.length] if self._next() % 2 else self.xp.split(rows, [self.length])[0]
        return x + rows.reshape(self.length, *(1,) * (x.ndim - 2), -1)

    def drop(self, x):
        """A part of the positions; the others are read by later steps only, if at all."""
        n = self._next() % x.shape[-1] + 1
        return x[..., :n] if self._next() % 2 else x[..., -n:]

    def shared_ones(self, x):
        ones = self.constant("ones", 2, x.shape[-1])[self._next() % 2]
        return x * ones[(None,) * (x.ndim - 1)]

    def shared_zeros(self, x):
        """A recurrent layer over the examples; all such layers start from the same zeros."""
        width = self._next() % 3 + 2
        w, u = self.weight(x.shape[-1], width), self.weight(width, width)
        state = self.constant("zeros", *x.shape[1:-1], width)
        if self.xp is jnp:
            return lax.scan(lambda h, row: (jnp.tanh(row @ w + h @ u),) * 2, state, x)[1]
        rows = []
        for row in x:
            state = np.tanh(row @ w + state @ u)
            rows.append(state)
        return np.stack(rows)

    def identity(self, x):
        return x @ self.constant("eye", x.shape[-1])

    def mask(self, x):
        return x * self.is_token.reshape(-1, *(1,) * (x.ndim - 1))

    def unmask(self, x):
        """A mask that adds a number so large that it leaves nothing else."""
        return self.xp.tanh(x) + ((1 - self.is_token) * -1e30).reshape(-1, *(1,) * (x.ndim - 1))

    def stack_scan(self, x):
        """A loop over stacked layers with a residual stream and inner widths."""
        up, down = self.weight(3, x.shape[-1], 4), self.weight(3, 4, x.shape[-1])
        if self.xp is jnp:
            return lax.scan(lambda h, w: (h + jnp.tanh(h @ w[0]) @ w[1], None), x, (up, down))[0]
        for u, d in zip(up, down, strict=True):
            x = x + np.tanh(x @ u) @ d
        return x


def draw_weights(shapes, rng):
    return {name: rng.normal(size=shape) / math.sqrt(max(shape[0], 1)) for name, shape in shapes.items()}


def permuted(spec, permutation, weights):
    """Permute float64 weights by permuting their positions; the library would make them float32."""
    positions = {name: np.arange(w.size, dtype=np.int32).reshape(w.shape) for name, w in weights.items()}
    moved = jax.device_get(rebasin.permute(spec, permutation, positions))
    return {name: w.ravel()[moved[name]] for name, w in weights.items()}


def check_network(choices):
    """Raise if permuting by the inferred spec changes the network; return the spec."""
    network = Network(choices)
    x = np.random.default_rng(0).normal(size=(BATCH, CHANNELS))
    network(None, x)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in network.shapes.items()}
    spec = rebasin.infer_spec(network, shapes, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    rng = np.random.default_rng(1)
    weights = draw_weights(network.shapes, rng)
    identity = rebasin.identity_permutation(spec, shapes)
    shuffled = {group: rng.permuted(row, axis=-1) for group, row in identity.items()}
    permutations = (shuffled, *(identity | {group: row} for group, row in shuffled.items()))
    moved = [permuted(spec, permutation, weights) for permutation in permutations]
    for inputs in (x, *other_inputs()):
        before = network(weights, inputs)
        assert np.isfinite(before).all()
        for others in moved:
            np.testing.assert_allclose(network(others, inputs), before, rtol=1e-9, atol=1e-9)
    return spec


def other_inputs():
    """Inputs of other lengths and values than those that specs are inferred with: padding, equal rows."""
    rng = np.random.default_rng(2)
    padded, longest = rng.normal(size=(5, CHANNELS)), rng.normal(size=(LONGEST, CHANNELS)) * 3
    padded[[1, 4]] = 0.0
    return padded, longest, np.ones((3, CHANNELS)), np.zeros((1, CHANNELS))


networks = st.lists(st.integers(0, 10**4), min_size=8, max_size=60)


@given(networks)
@settings(max_examples=100, suppress_health_check=[HealthCheck.too_slow])
def test_a_hundred_small_networks_are_sound(choices):
    check_network(choices)


@pytest.mark.slow
def test_thousands_of_networks_are_sound():
    """Seeds are fixed, and what they exercise is counted."""
    groups = indexed = structured = unread = 0
    for seed in range(10_000):
        spec = check_network(np.random.default_rng(seed).integers(0, 10**4, size=60).tolist())
        groups += len(spec.groups)
        indexed += len(spec.indexed)
        structured += sum(
            not axis.is_whole for axis in itertools.chain.from_iterable(a for _, a in spec.leaves)
        )
        unread += sum(pin.reason.startswith("nothing reads") for pin in spec.pins)
    assert groups > 5000
    assert indexed > 1000
    assert structured > 1000
    assert unread > 1000


class PlainNetwork(Network):
    """A network of values [n, c] only, so that every symmetry permutes whole axes of leaves."""

    steps = ("dense", "dense", "bias", "scale", "add", "multiply", "norm", "tied", "square")

    def __call__(self, weights, x):
        self.xp = jnp if isinstance(x, jax.Array) else np
        self.weights, self.count, self.numbers = weights, 0, iter(self.choices)
        self.pool = [x]
        for n in self._take(self._next() % 3 + 1):
            self.pool.append(getattr(self, self.steps[n % len(self.steps)])(self.pool[-1]))
        return self.xp.tanh(self.pool[-1] @ self.weight(self.pool[-1].shape[-1], 2))

    def dense(self, x, width=None):
        return self.xp.tanh(x @ self.weight(x.shape[-1], width or self._next() % 2 + 2))

    def square(self, x):
        w = self.weight(x.shape[-1], x.shape[-1])
        return self.xp.tanh(x @ w) @ w


def symmetric_swaps(network, weights, x):
    """Find every transposition that preserves the function: its two positions and the axes it acts on."""
    before = network(weights, x)
    axes = [(name, axis) for name, w in weights.items() for axis in range(w.ndim)]
    found = set()
    for size in {weights[name].shape[axis] for name, axis in axes}:
        alike = [(name, axis) for name, axis in axes if weights[name].shape[axis] == size]
        for i, j in itertools.combinations(range(size), 2):
            order = np.arange(size)
            order[[i, j]] = j, i
            for n in range(1, len(alike) + 1):
                for subset in itertools.combinations(alike, n):
                    moved = dict(weights)
                    for name, axis in subset:
                        moved[name] = np.take(moved[name], order, axis=axis)
                    if np.allclose(network(moved, x), before, rtol=1e-9, atol=1e-9):
                        found.add((i, j, subset))
    return found


@given(st.lists(st.integers(0, 10**4), min_size=6, max_size=12))
@settings(max_examples=40, suppress_health_check=[HealthCheck.too_slow])
def test_no_swap_of_two_units_is_missing(choices):
    """Brute force over all transpositions of whole axes finds those of the spec, and no others.

    A swap may act on several groups at once, so those of the spec are the swaps of every set of groups of
    equal size.
    """
    network = PlainNetwork(choices)
    x = np.random.default_rng(0).normal(size=(BATCH, CHANNELS))
    network(None, x)
    shapes = {name: jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in network.shapes.items()}
    if sum(len(shape) for shape in network.shapes.values()) > 9:
        return  # 2⁹ subsets for each pair are enough
    spec = rebasin.infer_spec(network, shapes, jax.ShapeDtypeStruct(x.shape, jnp.float32))
    weights = draw_weights(network.shapes, np.random.default_rng(1))
    expected = set()
    sizes = spec.group_sizes(shapes)
    for n in range(1, len(sizes) + 1):
        for groups in itertools.combinations(sizes, n):
            if len({sizes[group] for group in groups}) == 1:
                moved = tuple(
                    (name, axis)
                    for name, w in weights.items()
                    for axis in range(w.ndim)
                    if set(spec.table[name][axis].groups) & set(groups)
                )
                expected |= {(i, j, moved) for i, j in itertools.combinations(range(sizes[groups[0]]), 2)}
    assert symmetric_swaps(network, weights, x) == expected
