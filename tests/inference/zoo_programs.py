"""Exhibits of the zoo: programs inside programs, odd leaves, training, and one model in five libraries."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax import lax
from specimens import KEY, SEQUENCES, VECTORS, Specimen, exhibit, linen, shape, shapes
from zoo_layers import mlp
from zoo_transformers import PROJECTIONS, project, softmax_attention

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


@exhibit(6)
def batch_norm_in_training_in_haiku():
    """Its averages are corrected for the first steps, written at every step, and never read."""
    import haiku as hk

    def forward(x):
        norm = hk.BatchNorm(create_scale=True, create_offset=True, decay_rate=0.9)
        return hk.Linear(2)(jax.nn.relu(norm(hk.Linear(6)(x), is_training=True)))

    model = hk.without_apply_rng(hk.transform_with_state(forward))
    params, state = jax.eval_shape(model.init, KEY, VECTORS)
    tree = {"params": params, "state": state}
    return Specimen(
        lambda tree, x: model.apply(tree["params"], tree["state"], x), tree, (VECTORS,), {"1": "state"}
    )


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
