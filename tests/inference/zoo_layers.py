"""Exhibits of the zoo: dense layers, convolutions and recurrent cells."""

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from specimens import IMAGES, KEY, SEQUENCES, VECTORS, Specimen, exhibit, linen, shape, shapes

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


@linen(6, inputs=(VECTORS,))
def interleaved_gate(x):
    """Gate and value of each of six units stand beside each other, and move as a pair."""
    pairs = nn.Dense(12)(x).reshape(-1, 6, 2)
    return nn.Dense(2)(nn.silu(pairs[..., 0]) * pairs[..., 1])


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


@exhibit(5, 6)
def fourier_operator():
    """A layer of a Fourier operator on 8 points: the modes of a transform stay, channels move."""

    def layer(h, re, im, skip):
        modes = jnp.einsum("bcw,cow->bow", jnp.fft.rfft(h)[..., :3], re + 1j * im)
        return jnp.tanh(jnp.fft.irfft(modes, 8) + jnp.einsum("bcn,co->bon", h, skip))

    def function(tree, x):
        h = jnp.einsum("bcn,co->bon", x, tree["lift"])
        h = layer(h, tree["re"], tree["im"], tree["skip"])
        return jnp.einsum("bcn,co->bon", h, tree["out"])

    tree = shapes(lift=(3, 5), re=(5, 6, 3), im=(5, 6, 3), skip=(5, 6), out=(6, 2))
    return Specimen(function, tree, (shape(2, 3, 8),))


# --- recurrent cells ---------------------------------------------------------------------------------------


@linen(6, inputs=(SEQUENCES,))
def lstm(x):
    return nn.Dense(2)(nn.RNN(nn.LSTMCell(6))(x)[:, -1])


@linen(5, 6, inputs=(SEQUENCES,))
def optimized_lstm_and_gru(x):
    x = nn.RNN(nn.OptimizedLSTMCell(5))(x)
    return nn.Dense(2)(nn.RNN(nn.GRUCell(6))(x).mean(1))


@exhibit(6, 6)
def recurrent_layers_with_one_zero_state():
    """Both layers start from the same zeros, which say nothing about the units of either."""

    def function(tree, x):
        state = jnp.zeros((2, 6))
        h = jnp.swapaxes(x, 0, 1)
        for i in range(2):

            def step(h, x, i=i):
                h = jnp.tanh(x @ tree[f"w{i}"] + h @ tree[f"u{i}"])
                return h, h

            h = lax.scan(step, state, h)[1]
        return h[-1] @ tree["out"]

    return Specimen(function, shapes(w0=(6, 6), u0=(6, 6), w1=(6, 6), u1=(6, 6), out=(6, 2)), (SEQUENCES,))


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
