"""A zoo of small architectures, each with the sizes of its groups, written out by hand.

A keeper builds a `Specimen` from shapes alone: nothing is initialised or compiled. Sizes are sorted by
`sort_key`; an indexed group is a tuple, first the sizes of its index: ``(2, 4)`` are four head dimensions in
each of two heads.
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from jax import lax

from rebasin.trees import map_leaves

KEY = jax.eval_shape(lambda: jax.random.key(0))


def shape(*sizes, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(sizes, dtype)


def shapes(**sizes):
    return {name: shape(*size) for name, size in sizes.items()}


VECTORS = shape(2, 3)
IMAGES = shape(2, 8, 8, 3)
SEQUENCES = shape(2, 5, 6)
TOKENS = shape(2, 5, dtype=jnp.int32)


class Specimen(NamedTuple):
    """Arguments of `infer_spec`, as shapes."""

    function: Callable[..., Any]
    tree: Any
    inputs: tuple[Any, ...]
    state_outputs: Mapping[str, str] | None = None


class Exhibit(NamedTuple):
    """A keeper and what it should show."""

    build: Callable[[], Specimen]
    sizes: tuple[int | tuple[int, ...], ...]


ZOO: dict[str, Exhibit] = {}


def exhibit(*sizes):
    """Decorator that enters a keeper under its name, with the sizes of its groups."""

    def enter(build):
        ZOO[build.__name__] = Exhibit(build, sizes)
        return build

    return enter


def linen(*sizes, inputs, **options):
    """Decorator that enters a function of `nn.compact` layers under its name."""

    def enter(layers):
        class Model(nn.Module):
            @nn.compact
            def __call__(self, *args):
                return layers(*args)

        def build():
            tree = jax.eval_shape(Model().init, KEY, *inputs)
            return Specimen(functools.partial(Model().apply, **options), tree, inputs)

        ZOO[layers.__name__] = Exhibit(build, sizes)
        return layers

    return enter


def sort_key(size):
    """Plain groups first, then indexed ones; both by size."""
    return (1, *size) if isinstance(size, tuple) else (0, size)


def arrays(tree, seed=0):
    """Values for shapes: normal, positive where a name says that it is a variance, and small integers."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        if not jnp.issubdtype(leaf.dtype, jnp.floating):
            return jnp.asarray(rng.integers(0, 2 if leaf.dtype == bool else 5, size=leaf.shape), leaf.dtype)
        values = 0.5 * rng.normal(size=leaf.shape)
        is_variance = path.endswith("var") or "/nu/" in path
        return jnp.asarray(np.abs(values) + 0.1 if is_variance else values, leaf.dtype)

    return map_leaves(fill, tree)


# --- dense layers ------------------------------------------------------------------------------------------


@linen(6, 8, inputs=(VECTORS,))
def mlp(x):
    return nn.Dense(2)(jnp.tanh(nn.Dense(6)(nn.relu(nn.Dense(8)(x)))))


@linen(6, 8, inputs=(VECTORS,))
def layer_norm_and_rms_norm(x):
    x = nn.relu(nn.LayerNorm()(nn.Dense(6)(x)))
    return nn.Dense(2)(nn.gelu(nn.RMSNorm()(nn.Dense(8)(x))))


@linen(6, 8, inputs=(VECTORS,))
def weight_norm(x):
    x = nn.relu(nn.WeightNorm(nn.Dense(6))(x))
    return nn.Dense(2)(nn.relu(nn.WeightNorm(nn.Dense(8))(x)))


@linen(6, inputs=(VECTORS,))
def glu(x):
    return nn.Dense(2)(nn.glu(nn.Dense(12)(x)))


@linen(6, inputs=(VECTORS,))
def swiglu(x):
    return nn.Dense(2, use_bias=False)(nn.silu(nn.Dense(6)(x)) * nn.Dense(6)(x))


@linen(6, (6, 2), inputs=(VECTORS,))
def maxout(x):
    """The largest of two pieces for each of six units: pieces are permuted in each unit by itself."""
    return nn.Dense(2)(nn.Dense(12)(x).reshape(-1, 6, 2).max(-1))


@linen(6, inputs=(VECTORS,))
def dense_layer_used_twice(x):
    twice = nn.Dense(6)
    return nn.Dense(2)(nn.relu(twice(nn.relu(twice(nn.Dense(6)(x))))))


@linen(5, 6, 8, inputs=(IMAGES,))
def mlp_mixer(x):
    """Tokens are places and stay; hidden units of the token and the channel layers move."""
    x = nn.Conv(6, (4, 4), (4, 4))(x).reshape(2, 4, 6)
    tokens = nn.Dense(4)(nn.gelu(nn.Dense(5)(nn.LayerNorm()(x).swapaxes(1, 2)))).swapaxes(1, 2)
    x = x + tokens
    x = x + nn.Dense(6)(nn.gelu(nn.Dense(8)(nn.LayerNorm()(x))))
    return nn.Dense(2)(x.mean(1))


# --- convolutions ------------------------------------------------------------------------------------------


@linen(5, 7, inputs=(IMAGES,))
def convolution_and_flatten(x):
    x = nn.avg_pool(nn.relu(nn.Conv(5, (3, 3))(x)), (4, 4), (4, 4))
    return nn.Dense(2)(nn.relu(nn.Dense(7)(x.reshape(2, -1))))


def vgg(x, *, train):
    for width in (4, 6):
        x = nn.relu(nn.BatchNorm(use_running_average=not train)(nn.Conv(width, (3, 3))(x)))
        x = nn.max_pool(x, (2, 2), (2, 2))
    return nn.Dense(2)(nn.relu(nn.Dense(5)(x.reshape(2, -1))))


@linen(4, 5, 6, inputs=(IMAGES,))
def batch_norm_in_evaluation(x):
    return vgg(x, train=False)


@exhibit(4, 5, 6)
def batch_norm_in_training():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return vgg(x, train=True)

    def function(variables, x):
        return Model().apply(variables, x, mutable=["batch_stats"])

    tree = jax.eval_shape(Model().init, KEY, IMAGES)
    return Specimen(function, tree, (IMAGES,), {"1/batch_stats": "batch_stats"})


@linen(2, 6, (2, 4), inputs=(IMAGES,))
def group_norm(x):
    """Whole norm groups move, and channels in each of them."""
    x = nn.relu(nn.GroupNorm(num_groups=2)(nn.Conv(8, (3, 3))(x)))
    return nn.Dense(2)(nn.relu(nn.Conv(6, (3, 3))(x)).mean((1, 2)))


@linen(4, 6, inputs=(IMAGES,))
def instance_norm(x):
    x = nn.relu(nn.InstanceNorm()(nn.Conv(4, (3, 3))(x)))
    return nn.Dense(2)(nn.relu(nn.InstanceNorm()(nn.Conv(6, (3, 3))(x))).mean((1, 2)))


@linen(4, 8, inputs=(IMAGES,))
def mobilenet_block(x):
    x = nn.Conv(4, (3, 3), (2, 2))(x)
    h = nn.relu6(nn.BatchNorm(use_running_average=True)(nn.Conv(8, (1, 1))(x)))
    h = nn.relu6(nn.Conv(8, (3, 3), feature_group_count=8)(h))
    return nn.Dense(2)((x + nn.Conv(4, (1, 1))(h)).mean((1, 2)))


@linen(4, 12, inputs=(IMAGES,))
def convnext_block(x):
    x = nn.Conv(4, (2, 2), (2, 2))(x)
    h = nn.LayerNorm()(nn.Conv(4, (3, 3), feature_group_count=4)(x))
    h = nn.Dense(4)(nn.gelu(nn.Dense(12)(h)))
    return nn.Dense(2)(nn.LayerNorm()((x + nn.LayerNorm(use_bias=False)(h)).mean((1, 2))))


@linen(2, 4, (2, 3), (2, 4), inputs=(IMAGES,))
def resnext_block(x):
    """Convolution groups move whole; channels before and after move within their group."""
    x = nn.Conv(4, (3, 3))(x)
    h = nn.relu(nn.Conv(6, (1, 1))(x))
    h = nn.relu(nn.Conv(8, (3, 3), feature_group_count=2)(h))
    return nn.Dense(2)((x + nn.Conv(4, (1, 1))(h)).mean((1, 2)))


@linen(4, 5, inputs=(IMAGES,))
def dilated_convolutions(x):
    x = nn.relu(nn.Conv(4, (3, 3), kernel_dilation=2)(x))
    return nn.Dense(2)(nn.relu(nn.Conv(5, (3, 3), (2, 2), padding="VALID")(x)).max((1, 2)))


@linen(4, 4, 5, 6, inputs=(IMAGES,))
def u_net(x):
    skip = nn.relu(nn.Conv(4, (3, 3))(x))
    x = nn.relu(nn.Conv(6, (3, 3))(nn.max_pool(skip, (2, 2), (2, 2))))
    x = nn.ConvTranspose(4, (2, 2), (2, 2))(x)
    x = nn.relu(nn.Conv(5, (3, 3))(jnp.concatenate([skip, x], axis=-1)))
    return nn.Conv(2, (1, 1))(x)


@linen(3, 6, inputs=(IMAGES,))
def squeeze_and_excite(x):
    x = nn.relu(nn.Conv(6, (3, 3))(x))
    gate = nn.sigmoid(nn.Dense(6)(nn.relu(nn.Dense(3)(x.mean((1, 2), keepdims=True)))))
    return nn.Dense(2)((x * gate).mean((1, 2)))


@linen(3, 3, 4, inputs=(IMAGES,))
def densenet(x):
    x = nn.Conv(4, (3, 3))(x)
    for _ in range(2):
        h = nn.relu(nn.BatchNorm(use_running_average=True)(x))
        x = jnp.concatenate([x, nn.Conv(3, (3, 3))(h)], axis=-1)
    return nn.Dense(2)(nn.LayerNorm()(x).mean((1, 2)))


@linen(3, 4, 5, 6, inputs=(IMAGES,))
def inception(x):
    pooled = nn.max_pool(x, (3, 3), (1, 1), "SAME")
    branches = [nn.Conv(3, (1, 1))(x), nn.Conv(4, (3, 3))(x), nn.Conv(5, (1, 1))(pooled)]
    x = nn.relu(jnp.concatenate(branches, axis=-1))
    return nn.Dense(2)(nn.relu(nn.Conv(6, (1, 1))(x)).mean((1, 2)))


@linen(2, (2, 2), (2, 2, 2), (2, 3), inputs=(IMAGES,))
def channel_shuffle(x):
    """Two convolution groups are dealt out to the next two.

    A group of the second convolution has four channels, two from each group of the first, that move as pairs
    and within pairs. Any permutation of the four would do: a known limit, since axes are never merged.
    """
    x = nn.relu(nn.Conv(8, (1, 1))(x))
    x = x.reshape(2, 8, 8, 2, 4).swapaxes(-1, -2).reshape(2, 8, 8, 8)
    x = nn.relu(nn.Conv(6, (3, 3), feature_group_count=2)(x))
    return nn.Dense(2)(x.mean((1, 2)))


# --- recurrent cells ---------------------------------------------------------------------------------------


@linen(6, inputs=(SEQUENCES,))
def lstm(x):
    return nn.Dense(2)(nn.RNN(nn.LSTMCell(6))(x)[:, -1])


@linen(5, 6, inputs=(SEQUENCES,))
def optimized_lstm_and_gru(x):
    x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
    return nn.Dense(2)(nn.RNN(nn.GRUCell(6))(x).mean(1))


@exhibit(6)
def recurrent_while_loop():
    def function(tree, x):
        def step(carry):
            t, h = carry
            now = lax.dynamic_index_in_dim(x, t, axis=1, keepdims=False)
            return t + 1, jnp.tanh(now @ tree["in"] + h @ tree["again"] + tree["bias"][None])

        start = (jnp.int32(0), jnp.broadcast_to(tree["start"][None], (2, 6)))
        return lax.while_loop(lambda carry: carry[0] < 5, step, start)[1] @ tree["out"]

    tree = shapes(**{"in": (6, 6), "again": (6, 6), "bias": (6,), "start": (6,), "out": (6, 2)})
    return Specimen(function, tree, (SEQUENCES,))


# --- attention ---------------------------------------------------------------------------------------------


def softmax_attention(q, k, v, out, bias=None):
    """``[b, t, h, d]`` queries, keys and values; out ``[h, d, o]``."""
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) / np.sqrt(q.shape[-1])
    weights = jax.nn.softmax(scores if bias is None else scores + bias)
    return jnp.einsum("bhqk,bkhd,hdo->bqo", weights, v, out)


def project(x, weight):
    return jnp.einsum("bti,ihd->bthd", x, weight)


PROJECTIONS = shapes(q=(6, 2, 4), k=(6, 2, 4), v=(6, 2, 4), out=(2, 4, 3))


@linen(2, 7, (2, 4), (2, 4), inputs=(SEQUENCES,))
def multi_head_attention(x):
    x = nn.Dense(7)(x)
    x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x))
    return nn.Dense(2)(x)


@linen(2, (2, 4), (2, 4), inputs=(SEQUENCES,))
def causal_attention(x):
    mask = nn.make_causal_mask(jnp.ones((2, 5)))
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x, mask=mask)


@linen(2, (2, 4), (2, 4), inputs=(SEQUENCES,))
def fused_projections_split(x):
    q, k, v = (part.reshape(2, 5, 2, 4) for part in jnp.split(nn.Dense(24)(x), 3, axis=-1))
    return nn.DenseGeneral(3, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v))


@linen(2, (2, 4), (2, 4), inputs=(SEQUENCES,))
def fused_projections_reshaped(x):
    """Read as ``[3, heads, dims]`` and taken apart, so that values have dimensions of their own."""
    q, k, v = jnp.moveaxis(nn.Dense(24)(x).reshape(2, 5, 3, 2, 4), 2, 0)
    return nn.DenseGeneral(3, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v))


@linen(2, (2, 4), inputs=(SEQUENCES,))
def fused_projections_in_one_kernel(x):
    """A kernel of shape ``[3, heads, dims]``: three axes of a leaf, each with one group; a known limit."""
    q, k, v = jnp.moveaxis(nn.DenseGeneral((3, 2, 4))(x), 2, 0)
    return nn.DenseGeneral(3, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v))


@exhibit(2, 4, 4)
def multi_query_attention():
    """One key and value for both heads, so head dimensions are those of all heads."""

    def function(tree, x):
        k, v = x @ tree["k"], x @ tree["v"]
        scores = jnp.einsum("bqhd,bkd->bhqk", project(x, tree["q"]), k)
        return jnp.einsum("bhqk,bkd,hdo->bqo", jax.nn.softmax(scores), v, tree["out"])

    return Specimen(function, PROJECTIONS | shapes(k=(6, 4), v=(6, 4)), (SEQUENCES,))


@exhibit(2, (2, 2), (2, 3), (2, 3))
def grouped_query_attention():
    """Two keys, two queries for each of them; queries move within their key, dimensions too."""

    def function(tree, x):
        q, k, v = (project(x, tree[name]) for name in "qkv")
        return jnp.einsum("bqhd,hdo->bqo", jax.nn.dot_product_attention(q, k, v), tree["out"])

    tree = shapes(q=(6, 4, 3), k=(6, 2, 3), v=(6, 2, 3), out=(4, 3, 2))
    return Specimen(function, tree, (SEQUENCES,))


@exhibit(2, (2, 4))
def rotary_attention():
    """Every pair of dimensions turns at its own frequency, so those of queries and keys stay; heads move."""
    angles = np.arange(5)[:, None] * np.array([1.0, 0.1])
    cos, sin = (np.asarray(f(angles), np.float32)[None, :, None] for f in (np.cos, np.sin))

    def rotate(x):
        a, b = jnp.split(x, 2, axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], axis=-1)

    def function(tree, x):
        q, k, v = (project(x, tree[name]) for name in "qkv")
        return softmax_attention(rotate(q), rotate(k), v, tree["out"])

    return Specimen(function, PROJECTIONS, (SEQUENCES,))


@exhibit(2, (2, 4))
def rotary_attention_with_interleaved_pairs():
    angles = np.arange(5)[:, None] * np.array([1.0, 0.1])
    cos, sin = (np.asarray(f(angles), np.float32)[None, :, None] for f in (np.cos, np.sin))

    def rotate(x):
        a, b = x[..., ::2], x[..., 1::2]
        return jnp.stack([a * cos - b * sin, a * sin + b * cos], axis=-1).reshape(x.shape)

    def function(tree, x):
        q, k, v = (project(x, tree[name]) for name in "qkv")
        return softmax_attention(rotate(q), rotate(k), v, tree["out"])

    return Specimen(function, PROJECTIONS, (SEQUENCES,))


@exhibit(2, (2, 4), (2, 4))
def dot_product_attention_with_bias_for_each_head():
    def function(tree, x):
        q, k, v = (project(x, tree[name]) for name in "qkv")
        mixed = jax.nn.dot_product_attention(q, k, v, bias=tree["bias"][None], is_causal=True)
        return jnp.einsum("bqhd,hdo->bqo", mixed, tree["out"])

    return Specimen(function, PROJECTIONS | shapes(bias=(2, 5, 5)), (SEQUENCES,))


# --- transformers ------------------------------------------------------------------------------------------


class Block(nn.Module):
    """Attention of two heads of four dimensions and ten hidden units, on a residual stream of six."""

    @nn.compact
    def __call__(self, x, mask=None):
        x = x + nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(nn.LayerNorm()(x), mask=mask)
        return x + nn.Dense(6)(nn.gelu(nn.Dense(10)(nn.LayerNorm()(x))))


class Embedding(nn.Module):
    """Tokens in and out by the same table."""

    def setup(self):
        self.table = nn.Embed(7, 6)

    def __call__(self, tokens):
        return self.table(tokens)

    def logits(self, x):
        return self.table.attend(x)


@linen(2, 6, 10, (2, 4), (2, 4), inputs=(IMAGES,))
def vision_transformer(x):
    x = nn.Conv(6, (4, 4), (4, 4))(x).reshape(2, 4, 6)
    (token,) = nn.Embed(1, 6)(jnp.zeros((1, 1), int))  # [1, 6], a learned class token
    x = jnp.concatenate([jnp.broadcast_to(token[None], (2, 1, 6)), x], axis=1)
    x = x + nn.Embed(5, 6)(jnp.arange(5))[None]  # learned positions
    return nn.Dense(2)(nn.LayerNorm()(Block()(x))[:, 0])


@linen(2, 6, 10, (2, 4), (2, 4), inputs=(TOKENS,))
def gpt_with_tied_embeddings(tokens):
    embedding = Embedding()
    x = embedding(tokens) + nn.Embed(5, 6)(jnp.arange(5))[None]
    x = Block()(x, nn.make_causal_mask(tokens))
    return embedding.logits(nn.LayerNorm()(x))


@linen(2, 10, (2, 4), (2, 4), inputs=(TOKENS,))
def sinusoidal_positions(tokens):
    """Each unit of the residual stream gets a fixed sine of a frequency of its own, and so has to stay."""
    rates = np.arange(5)[:, None] * np.array([1.0, 0.1, 0.01])
    positions = np.concatenate([np.sin(rates), np.cos(rates)], axis=1).astype(np.float32)
    return nn.Dense(7)(Block()(nn.Embed(7, 6)(tokens) + positions[None]))


@linen(6, (3, 2), (3, 2, 4), (3, 2, 4), (3, 10), inputs=(SEQUENCES,))
def scan_over_transformer_blocks(x):
    """Heads move in each of three layers by themselves, dimensions in each layer and head."""

    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return Block()(x), None

    layers = nn.scan(Step, variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return nn.Dense(2)(layers()(nn.Dense(6)(x), None)[0])


@linen(6, (3, 8), inputs=(VECTORS,))
def scan_over_residual_layers(x):
    class Step(nn.Module):
        @nn.compact
        def __call__(self, x, _):
            return x + nn.Dense(6)(nn.relu(nn.Dense(8)(x))), None

    layers = nn.scan(nn.remat(Step), variable_axes={"params": 0}, split_rngs={"params": True}, length=3)
    return nn.Dense(2)(layers()(nn.Dense(6)(x), None)[0])


# --- experts -----------------------------------------------------------------------------------------------

EXPERTS = shapes(router=(3, 4), up=(4, 3, 5), down=(4, 5, 2))


def run_experts(tree, x, gates):
    hidden = jax.nn.relu(jnp.einsum("bi,eih->beh", x, tree["up"]))
    return jnp.einsum("be,beh,eho->bo", gates, hidden, tree["down"])


@exhibit(4, (4, 5))
def soft_mixture_of_experts():
    def function(tree, x):
        return run_experts(tree, x, jax.nn.softmax(x @ tree["router"]))

    return Specimen(function, EXPERTS, (VECTORS,))


@exhibit(4, (4, 5))
def top_k_mixture_of_experts():
    """The router names experts by position; the names follow the experts, and all of them move."""

    def function(tree, x):
        best, which = lax.top_k(x @ tree["router"], 2)
        chosen = jax.nn.one_hot(which, 4)
        return run_experts(tree, x, jnp.einsum("bk,bke->be", jax.nn.softmax(best), chosen))

    return Specimen(function, EXPERTS, (VECTORS,))


@exhibit((4, 5))
def mixture_of_experts_with_ties():
    """Values that were clipped may tie, and of equal ones the first is chosen: experts keep their order."""

    def function(tree, x):
        best, which = lax.top_k(jax.nn.relu(x @ tree["router"]), 2)
        return run_experts(tree, x, jnp.einsum("bk,bke->be", best, jax.nn.one_hot(which, 4)))

    return Specimen(function, EXPERTS, (VECTORS,))


@exhibit(4, 5)
def mixture_of_experts_by_gather():
    """Weights of the chosen expert are looked up, so that hidden units are one axis for every expert.

    They could be permuted in each expert by itself: a known limit, since an index may name any expert.
    """

    def function(tree, x):
        which = jnp.argmax(x @ tree["router"], axis=-1)
        hidden = jax.nn.relu(jnp.einsum("bi,bih->bh", x, tree["up"][which]))
        return jnp.einsum("bh,bho->bo", hidden, tree["down"][which])

    return Specimen(function, EXPERTS, (VECTORS,))


@exhibit(6, (3, 4), (3, 4, 5))
def scan_over_layers_of_experts():
    """Experts move in each of three layers by themselves, hidden units in each layer and expert."""

    def function(tree, x):
        def layer(h, weights):
            router, up, down = weights
            best, which = lax.top_k(h @ router, 2)
            gates = jnp.einsum("bk,bke->be", jax.nn.softmax(best), jax.nn.one_hot(which, 4))
            hidden = jax.nn.silu(jnp.einsum("bi,eih->beh", h, up))
            return h + jnp.einsum("be,beh,eho->bo", gates, hidden, down), None

        layers = (tree["router"], tree["up"], tree["down"])
        return lax.scan(layer, x @ tree["in"], layers)[0] @ tree["out"]

    stacked = shapes(router=(3, 6, 4), up=(3, 4, 6, 5), down=(3, 4, 5, 6))
    return Specimen(function, stacked | shapes(**{"in": (3, 6), "out": (6, 2)}), (VECTORS,))


# --- programs and bookkeeping ------------------------------------------------------------------------------


@exhibit(4, 6, (4, 5))
def einsum_with_odd_labels():
    """A hidden layer of 4 × 5 units: rows move, and units in each row.

    All 20 could move at will, as nothing tells rows from columns: a known limit, since axes are never merged.
    """

    def function(tree, x):
        hidden = jnp.einsum("Zi,iqa->aZq", x, tree["in"])
        return jnp.einsum("aZq,qra,ro->oZ", jnp.tanh(hidden), tree["mid"], tree["out"])

    return Specimen(function, shapes(**{"in": (3, 4, 5), "mid": (4, 6, 5), "out": (6, 2)}), (VECTORS,))


@exhibit(6, 8)
def vmap_remat_cond_and_custom_derivatives():
    @jax.custom_vjp
    def activation(x):
        return jnp.maximum(x, 0)

    activation.defvjp(lambda x: (activation(x), x), lambda x, g: (g * (x > 0),))

    def one(tree, x):
        h = jax.checkpoint(lambda w, x: activation(x @ w))(tree["in"], x)
        h = lax.switch(x.argmax(), [jnp.tanh, jax.nn.softplus, lambda h: h], h)
        h = lax.cond(x.sum() > 0, lambda h: h + tree["bias"], lambda h: h, h)
        return jax.nn.silu(h @ tree["mid"]) @ tree["out"]

    def function(tree, x):
        return jax.vmap(one, in_axes=(None, 0))(tree, x)

    tree = shapes(**{"in": (3, 6), "bias": (6,), "mid": (6, 8), "out": (8, 2)})
    return Specimen(function, tree, (VECTORS,))


@exhibit(6)
def weight_used_on_two_axes():
    """An autoencoder whose decoder is its encoder transposed, and a bilinear form on the code."""

    def function(tree, x):
        code = jnp.tanh(x @ tree["w"])
        return code @ tree["w"].T, jnp.einsum("bi,ij,bj->b", code, tree["form"], code)

    return Specimen(function, shapes(w=(3, 6), form=(6, 6)), (VECTORS,))


@exhibit(5, 6)
def unused_integer_boolean_and_empty_leaves():
    def function(tree, x):
        nothing = x @ tree["empty_in"]
        h = jnp.where(tree["mask"][None], x @ tree["in"], 0) * tree["count"]
        h = jnp.tanh(jnp.concatenate([h, nothing], axis=1) @ tree["mid"])
        return h @ tree["out"] * tree["scale"]

    tree = shapes(**{"in": (3, 6), "mid": (6, 5), "out": (5, 2), "empty_in": (3, 0), "unused": (6, 6)})
    extra = {"mask": shape(6, dtype=bool), "count": shape(dtype=jnp.int32), "scale": shape()}
    return Specimen(function, tree | extra, (VECTORS,))


@exhibit(6, 8)
def training_step_with_adam():
    """The whole state goes in and comes out: weights, moments and counts move together."""

    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            return mlp(x)

    optimizer = optax.adamw(1e-2)

    def function(tree, x, y):
        def loss(params):
            return ((Model().apply({"params": params}, x) - y) ** 2).mean()

        updates, state = optimizer.update(jax.grad(loss)(tree["params"]), tree["opt_state"], tree["params"])
        return {"params": optax.apply_updates(tree["params"], updates), "opt_state": state}

    params = jax.eval_shape(Model().init, KEY, VECTORS)["params"]
    tree = {"params": params, "opt_state": jax.eval_shape(optimizer.init, params)}
    return Specimen(function, tree, (VECTORS, shape(2, 2)), {"": ""})


# --- one model in five libraries ---------------------------------------------------------------------------
# A perceptron of six and eight hidden units with LayerNorm, and attention of two heads of four dimensions.

MLP_SIZES = (6, 8)
ATTENTION_SIZES = (2, (2, 4), (2, 4))


@linen(*MLP_SIZES, inputs=(VECTORS,))
def mlp_in_linen(x):
    x = nn.relu(nn.LayerNorm()(nn.Dense(6)(x)))
    return nn.Dense(2)(nn.relu(nn.LayerNorm()(nn.Dense(8)(x))))


@linen(*ATTENTION_SIZES, inputs=(SEQUENCES,))
def attention_in_linen(x):
    return nn.MultiHeadDotProductAttention(num_heads=2, qkv_features=8)(x)


def nnx_specimen(make, x):
    graph, state = nnx.split(nnx.eval_shape(lambda: make(nnx.Rngs(0))))
    return Specimen(lambda state, x: nnx.merge(graph, state)(x), state, (x,))


@exhibit(*MLP_SIZES)
def mlp_in_nnx():
    def make(rngs):
        return nnx.Sequential(
            nnx.Linear(3, 6, rngs=rngs),
            nnx.LayerNorm(6, rngs=rngs),
            nnx.relu,
            nnx.Linear(6, 8, rngs=rngs),
            nnx.LayerNorm(8, rngs=rngs),
            nnx.relu,
            nnx.Linear(8, 2, rngs=rngs),
        )

    return nnx_specimen(make, VECTORS)


@exhibit(*ATTENTION_SIZES)
def attention_in_nnx():
    return nnx_specimen(lambda rngs: nnx.MultiHeadAttention(2, 6, 8, decode=False, rngs=rngs), SEQUENCES)


def equinox_specimen(make, x):
    import equinox as eqx

    is_shape = functools.partial(_is_instance, jax.ShapeDtypeStruct)
    tree, static = eqx.partition(eqx.filter_eval_shape(make, KEY), is_shape)
    return Specimen(lambda tree, x: jax.vmap(eqx.combine(tree, static))(x), tree, (x,))


def _is_instance(kind, x):
    return isinstance(x, kind)


@exhibit(*MLP_SIZES)
def mlp_in_equinox():
    import equinox as eqx

    def make(key):
        keys = jax.random.split(key, 3)
        return eqx.nn.Sequential(
            [
                eqx.nn.Linear(3, 6, key=keys[0]),
                eqx.nn.LayerNorm(6),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Linear(6, 8, key=keys[1]),
                eqx.nn.LayerNorm(8),
                eqx.nn.Lambda(jax.nn.relu),
                eqx.nn.Linear(8, 2, key=keys[2]),
            ]
        )

    return equinox_specimen(make, VECTORS)


@exhibit(*ATTENTION_SIZES)
def attention_in_equinox():
    import equinox as eqx

    class SelfAttention(eqx.Module):
        inner: eqx.nn.MultiheadAttention

        def __call__(self, x):
            return self.inner(x, x, x)

    def make(key):
        return SelfAttention(eqx.nn.MultiheadAttention(2, 6, qk_size=4, vo_size=4, key=key))

    return equinox_specimen(make, SEQUENCES)


def haiku_specimen(forward, x):
    import haiku as hk

    model = hk.without_apply_rng(hk.transform(forward))
    return Specimen(model.apply, jax.eval_shape(model.init, KEY, x), (x,))


@exhibit(*MLP_SIZES)
def mlp_in_haiku():
    import haiku as hk

    def forward(x):
        for width in (6, 8):
            x = jax.nn.relu(hk.LayerNorm(-1, create_scale=True, create_offset=True)(hk.Linear(width)(x)))
        return hk.Linear(2)(x)

    return haiku_specimen(forward, VECTORS)


@exhibit(*ATTENTION_SIZES)
def attention_in_haiku():
    import haiku as hk

    def forward(x):
        init = hk.initializers.VarianceScaling()
        return hk.MultiHeadAttention(2, key_size=4, w_init=init, model_size=3)(x, x, x)

    return haiku_specimen(forward, SEQUENCES)


@exhibit(*MLP_SIZES)
def mlp_in_plain_jax():
    def norm(x, scale, bias):
        x = x - x.mean(-1, keepdims=True)
        return x / jnp.sqrt((x**2).mean(-1, keepdims=True) + 1e-6) * scale[None] + bias[None]

    def function(tree, x):
        for i in range(2):
            x = jax.nn.relu(
                norm(x @ tree[f"w{i}"] + tree[f"b{i}"][None], tree[f"scale{i}"], tree[f"bias{i}"])
            )
        return x @ tree["w2"] + tree["b2"][None]

    hidden = {f"{name}{i}": (width,) for i, width in enumerate((6, 8)) for name in ("b", "scale", "bias")}
    return Specimen(function, shapes(w0=(3, 6), w1=(6, 8), w2=(8, 2), b2=(2,), **hidden), (VECTORS,))


@exhibit(*ATTENTION_SIZES)
def attention_in_plain_jax():
    def function(tree, x):
        q, k, v = (project(x, tree[name]) for name in "qkv")
        return softmax_attention(q, k, v, tree["out"])

    return Specimen(function, PROJECTIONS, (SEQUENCES,))
