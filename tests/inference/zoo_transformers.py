"""Exhibits of the zoo: attention, transformers and mixtures of experts."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from specimens import IMAGES, SEQUENCES, TOKENS, VECTORS, Specimen, exhibit, linen, shape, shapes

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


@linen(2, (2, 4), (2, 4), inputs=(SEQUENCES,))
def fused_projections_head_by_head(x):
    """``[heads, 3 * dims]`` as in GPT-NeoX and BLOOM: an axis of heads of queries, keys and values."""
    q, k, v = jnp.split(nn.Dense(24)(x).reshape(2, 5, 2, 12), 3, axis=-1)
    return nn.DenseGeneral(3, axis=(-2, -1))(jax.nn.dot_product_attention(q, k, v))


@linen(2, (2, 4), (2, 4), inputs=(SEQUENCES,))
def fused_projections_head_by_head_reshaped(x):
    """The same read as ``[heads, 3, dims]``, as in Megatron."""
    q, k, v = jnp.moveaxis(nn.Dense(24)(x).reshape(2, 5, 2, 3, 4), 3, 0)
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


FLAT_PROJECTIONS = shapes(q=(6, 8), k=(6, 8), v=(6, 8), out=(2, 4, 3))


def flat_rotary_attention(turned):
    """Kernels ``[in, heads * dims]``; of each head the first `turned` dimensions turn, the others pass."""
    angles = np.arange(5)[:, None] / 10.0 ** np.arange(turned // 2)
    cos, sin = (np.asarray(f(angles), np.float32)[None, :, None] for f in (np.cos, np.sin))

    def rotate(x):
        a, b, rest = jnp.split(x, [turned // 2, turned], axis=-1)
        return jnp.concatenate([a * cos - b * sin, a * sin + b * cos, rest], axis=-1)

    def function(tree, x):
        q, k, v = ((x @ tree[name]).reshape(2, 5, 2, 4) for name in "qkv")
        return softmax_attention(rotate(q), rotate(k), v, tree["out"])

    return Specimen(function, FLAT_PROJECTIONS, (SEQUENCES,))


@exhibit(2, (2, 4))
def rotary_attention_on_flat_kernels():
    return flat_rotary_attention(4)


@exhibit(2, (2, 2), (2, 4))
def partial_rotary_attention():
    """As in GPT-J, GPT-NeoX and Phi: dimensions that pass move in each head, heads move whole."""
    return flat_rotary_attention(2)


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


@exhibit(2, 7, (2, 4), (2, 4))
def swin_v2_attention():
    """Cosine attention, a scale for each head, a bias made from offsets, keys whose bias is set to zero."""
    offsets = np.linspace(-1, 1, 9, dtype=np.float32)[:, None]
    which = (np.arange(5)[:, None] - np.arange(5) + 4).astype(
        np.int32
    )  # the offset of each query from each key

    def unit(x):
        return x / jnp.sqrt((x**2).sum(-1, keepdims=True) + 1e-6)

    def function(tree, x):
        fused = x @ tree["qkv"] + tree["bias"].at[8:16].set(0.0)[None, None]
        q, k, v = jnp.moveaxis(fused.reshape(2, 5, 3, 2, 4), 2, 0)
        scale = jnp.exp(jnp.minimum(tree["logit_scale"], np.log(100)))
        table = jax.nn.relu(offsets @ tree["offset_in"]) @ tree["offset_out"]
        scores = jnp.einsum("bqhd,bkhd->bhqk", unit(q), unit(k)) * scale[None]
        weights = jax.nn.softmax(scores + 16 * jax.nn.sigmoid(jnp.moveaxis(table[which], -1, 0))[None])
        return jnp.einsum("bhqk,bkhd->bqhd", weights, v).reshape(2, 5, 8) @ tree["out"]

    tree = shapes(qkv=(6, 24), bias=(24,), logit_scale=(2, 1, 1), out=(8, 3))
    return Specimen(function, tree | shapes(offset_in=(1, 7), offset_out=(7, 2)), (SEQUENCES,))


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


@linen(2, 6, 10, (2, 4), (2, 4), inputs=(TOKENS,))
def short_example(tokens):
    """The example has five tokens and the table nine positions; the rows that are not reached stay."""
    positions = nn.Embed(9, 6)(jnp.arange(9))[: tokens.shape[1]]
    return nn.Dense(7)(Block()(nn.Embed(7, 6)(tokens) + positions[None]))


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
ROUTED = EXPERTS | shapes(bias=(4,))


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
        best, which = lax.top_k(x @ tree["router"] + tree["bias"][None], 2)
        chosen = jax.nn.one_hot(which, 4)
        return run_experts(tree, x, jnp.einsum("bk,bke->be", jax.nn.softmax(best), chosen))

    return Specimen(function, ROUTED, (VECTORS,))


@exhibit((4, 5))
def padded_mixture_of_experts():
    """Where the mask is zero all logits are, and the first experts are chosen: experts keep their order."""

    def function(tree, x, mask):
        logits = (x @ tree["router"] + tree["bias"][None]) * mask[:, None]
        best, which = lax.top_k(logits, 2)
        gates = jnp.einsum("bk,bke->be", jax.nn.softmax(best), jax.nn.one_hot(which, 4))
        return run_experts(tree, x, gates)

    return Specimen(function, ROUTED, (VECTORS, shape(2)))


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
        which = jnp.argmax(x @ tree["router"] + tree["bias"][None], axis=-1)
        hidden = jax.nn.relu(jnp.einsum("bi,bih->bh", x, tree["up"][which]))
        return jnp.einsum("bh,bho->bo", hidden, tree["down"][which])

    return Specimen(function, ROUTED, (VECTORS,))


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
        first = x @ tree["in"] + tree["bias"][None]  # never zero, so that the experts of no token tie
        return lax.scan(layer, first, layers)[0] @ tree["out"]

    stacked = shapes(router=(3, 6, 4), up=(3, 4, 6, 5), down=(3, 4, 5, 6))
    return Specimen(function, stacked | shapes(**{"in": (3, 6), "bias": (6,), "out": (6, 2)}), (VECTORS,))
