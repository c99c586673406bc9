"""The activation sites of each group: their values are compared with values computed by hand."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from zoo import KEY, ZOO, arrays

import rebasin
from rebasin.errors import InferenceError
from rebasin.inference.programs import bind, iter_equations
from rebasin.inference.rule import find_rule, temporary_rules
from rebasin.models import MLP, VGG16, ResNet20, ViT
from rebasin.tracing.evaluate import evaluate
from rebasin.tracing.program import trace_program
from rebasin.tracing.sites import find_layers, find_sites


def hand_out(address, eqn, operands, extra):
    results = bind(eqn, operands)
    return results, results


def site_values(spec, apply_fn, params, x, which="last"):
    """The values at the last site, or at all sites, of each group."""
    program = trace_program(spec, apply_fn, params, x)
    sites = find_sites(program, spec.groups)
    if which == "last":
        sites = {group: found[-1:] for group, found in sites.items()}
    places = {site.address: None for found in sites.values() for site in found}
    run = jax.jit(lambda leaves: evaluate(program.closed, leaves, hand_out, places)[1])
    values = run(jax.tree.leaves((params, x)))
    every = [site for found in sites.values() for site in found]
    assert all(values[site.address][site.output].shape == site.shape for site in every)
    return {group: [values[site.address][site.output] for site in found] for group, found in sites.items()}


def flax_case(model, x):
    tree = arrays(jax.eval_shape(model.init, KEY, x))
    return rebasin.infer_spec(model.apply, tree, x), tree


def intermediates(model, tree, x):
    """Outputs of every submodule, by path."""
    _, state = model.apply(tree, x, capture_intermediates=True, mutable=["intermediates"])
    return {
        path.removesuffix("/__call__/0"): value
        for path, value in rebasin.trees.leaf_table(state["intermediates"]).items()
    }


def same(values, *expected):
    assert len(values) == len(expected)
    for value, wanted in zip(values, expected, strict=True):
        np.testing.assert_allclose(value, wanted, rtol=1e-3, atol=1e-4)


def images(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_sites_of_an_mlp_are_its_activations():
    model, x = MLP((6, 5), 2), images(3, 2, 2, 1)
    spec, tree = flax_case(model, x)
    layers = intermediates(model, tree, x)
    for which in ("last", "all"):
        values = site_values(spec, model.apply, tree, x, which)
        for i in range(2):
            group = spec.table[f"params/Dense_{i}/bias"][0].groups[0]
            same(values[group], nn.relu(layers[f"Dense_{i}"]))


@pytest.mark.slow
def test_sites_of_a_vgg_are_before_pooling_and_flattening():
    model, x = VGG16(1, 2), images(1, 32, 32, 1)
    spec, tree = flax_case(model, x)
    layers = intermediates(model, tree, x)
    values = site_values(spec, model.apply, tree, x)
    names = [f"LayerNorm_{i}" for i in range(13)] + ["Dense_0", "Dense_1"]
    moving = [name for name in names if layers[name].shape[-1] > 1]  # a width of one is no group
    assert len(values) == len(moving) == 13
    for found, name in zip(values.values(), moving, strict=True):
        same(found, nn.relu(layers[name]))


@pytest.mark.slow
def test_a_residual_stream_has_a_site_in_every_block():
    model, x = ResNet20(2, 2), images(1, 8, 8, 1)
    spec, tree = flax_case(model, x)
    layers = intermediates(model, tree, x)
    values = site_values(spec, model.apply, tree, x, "all")
    last = site_values(spec, model.apply, tree, x)
    stem = next(group for group in spec.groups if "conv1/kernel" in group or "norm1" in group)
    outputs = [nn.relu(layers["norm1"]), *(layers[f"blockgroups_0/blocks_{i}"] for i in range(3))]
    same(values[stem], *outputs)
    same(last[stem], outputs[-1])
    # The last group of blocks ends in a mean over positions: its site has all positions still.
    (final,) = [
        found
        for found in last.values()
        if found[0].shape == (1, 2, 2, 8)
        and np.allclose(found[0], layers["blockgroups_2/blocks_2"], atol=1e-3)
    ]
    assert len(final) == 1


def test_sites_of_a_transformer_are_norms_gates_and_attention():
    model, x = ViT(width=8, num_classes=2, depth=1, num_heads=2, patch=2), images(2, 4, 4, 1)
    spec, tree = flax_case(model, x)
    layers = intermediates(model, tree, x)
    values = site_values(spec, model.apply, tree, x)
    by_size = {}
    for group, size in spec.group_sizes(tree).items():
        by_size.setdefault(size, []).append(values[group][0])
    same(by_size[8], layers["norm"])  # the residual stream: the norm before the mean
    same(by_size[16], nn.gelu(layers["up_0"]))
    (heads,) = by_size[2]
    query, value = by_size[2, 4]
    np.testing.assert_array_equal(heads, value)
    np.testing.assert_allclose(query, layers["attention_0/query"] / np.sqrt(4), rtol=1e-5)
    mixed = jnp.einsum(
        "bhqk,bkhd->bhdq",
        jax.nn.softmax(
            jnp.einsum("bqhd,bkhd->bhqk", layers["attention_0/query"], layers["attention_0/key"]) / 2
        ),
        layers["attention_0/value"],
    )
    np.testing.assert_allclose(heads, mixed, rtol=1e-4, atol=1e-5)


def test_site_of_a_recurrent_cell_is_its_state_at_all_steps():
    class Model(nn.Module):
        @nn.compact
        def __call__(self, x):
            states = nn.RNN(nn.LSTMCell(6), name="rnn")(x)
            return nn.Dense(2)(states[:, -1])

    model, x = Model(), images(2, 5, 3)
    spec, tree = flax_case(model, x)
    (found,) = site_values(spec, model.apply, tree, x).values()
    same(found, jnp.swapaxes(intermediates(model, tree, x)["rnn"], 0, 1))  # scanned, so time comes first


def test_stacked_layers_have_sites_in_each_layer():
    def apply(tree, x):
        def layer(h, w):
            return h + jnp.tanh(h @ w["up"]) @ w["down"], None

        return lax.scan(jax.checkpoint(layer), jnp.tanh(x @ tree["in"]), tree["layers"])[0] @ tree["out"]

    rng = np.random.default_rng(0)
    shapes = {"in": (3, 6), "up": (2, 6, 4), "down": (2, 4, 6), "out": (6, 2)}
    leaves = {name: jnp.asarray(rng.normal(size=s), jnp.float32) for name, s in shapes.items()}
    tree = {"in": leaves["in"], "out": leaves["out"], "layers": {k: leaves[k] for k in ("up", "down")}}
    x = images(5, 3)
    spec = rebasin.infer_spec(apply, tree, x)
    stream, hidden, states = [jnp.tanh(x @ leaves["in"])], [], []
    for up, down in zip(leaves["up"], leaves["down"], strict=True):
        hidden.append(jnp.tanh(stream[-1] @ up))
        stream.append(stream[-1] + hidden[-1] @ down)
        states.append(stream[-1])
    values = site_values(spec, apply, tree, x, "all")
    same(values["layers/up"], jnp.stack(hidden))
    same(values["in"], stream[0], jnp.stack(states))
    assert [layer.repeats for layer in find_layers(trace_program(spec, apply, tree, x))] == [1, 1, 1, 1]


def plain(activation, shape=(3, 6)):
    rng = np.random.default_rng(3)
    tree = {"w": jnp.asarray(rng.normal(size=shape), jnp.float32), "v": jnp.asarray(rng.normal(size=(6, 2)))}
    tree = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)
    return tree, lambda tree, x: activation(x @ tree["w"]) @ tree["v"]


@jax.custom_jvp
def softsign(x):
    return x / (1 + jnp.abs(x))


softsign.defjvp(lambda primals, tangents: (softsign(*primals), tangents[0]))


@pytest.mark.parametrize(
    "wrap",
    [
        pytest.param(lambda f: f, id="plain"),
        pytest.param(jax.jit, id="jit"),
        pytest.param(jax.checkpoint, id="remat"),
        pytest.param(lambda f: lambda t, x: jax.vmap(f, in_axes=(None, 0))(t, x[:, None])[:, 0], id="vmap"),
        pytest.param(lambda f: lambda t, x: lax.cond(x[0, 0] > -9, f, f, t, x), id="cond"),
        pytest.param(
            lambda f: lambda t, x: lax.fori_loop(0, 1, lambda i, y: f(t, x), 0 * f(t, x)), id="loop"
        ),
    ],
)
def test_programs_inside_programs(wrap):
    tree, f = plain(softsign)
    x = images(4, 3)
    spec = rebasin.infer_spec(wrap(f), tree, x)
    ((value,),) = site_values(spec, wrap(f), tree, x).values()
    np.testing.assert_allclose(value.reshape(-1, 6)[-4:], softsign(x @ tree["w"]), rtol=1e-5, atol=1e-6)


# For each primitive that holds programs a way to put a function into one.
HOLDERS = {
    "jit": jax.jit,
    "remat2": jax.checkpoint,
    "custom_jvp_call": lambda f: f,  # the activation is one
    "cond": lambda f: lambda t, x: lax.cond(x[0, 0] > -9, f, f, t, x),
    "scan": lambda f: lambda t, x: lax.scan(lambda y, _: (f(t, x), None), 0 * f(t, x), length=1)[0],
    "while": lambda f: (
        lambda t, x: lax.while_loop(lambda c: c[0] < 1, lambda c: (c[0] + 1, f(t, x)), (0, 0 * f(t, x)))[1]
    ),
}


def name_of(primitive, closed):
    """The name of a primitive in a program, which must hold it: JAX has called ``remat2`` otherwise."""
    names = ("remat2", "checkpoint") if primitive == "remat2" else (primitive,)
    (name,) = {eqn.primitive.name for eqn in iter_equations(closed)}.intersection(names)
    return name


@pytest.mark.parametrize("primitive", HOLDERS)
def test_sites_do_not_depend_on_whose_rule_runs_a_program(primitive):
    """Whether an equation holds a program shows in the equation: its rule may have been replaced."""
    tree, f = plain(softsign)
    function, x = HOLDERS[primitive](f), images(4, 3)
    name = name_of(primitive, jax.make_jaxpr(function)(tree, x))
    with temporary_rules():
        replaced = find_rule(name)
        rebasin.register_rule(name)(lambda equation, *inputs: replaced(equation, *inputs))
        spec = rebasin.infer_spec(function, tree, x)
        ((value,),) = site_values(spec, function, tree, x).values()
    np.testing.assert_allclose(value.reshape(-1, 6)[-4:], softsign(x @ tree["w"]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("primitive", HOLDERS)
def test_equation_whose_rule_runs_no_program_is_one_operation(primitive):
    """The rule says that the operation acts on each position; it hides what is inside."""
    tree, f = plain(lambda h: HOLDERS[primitive](lambda t, h: softsign(h))(None, h))
    x = images(4, 3)
    name = name_of(primitive, jax.make_jaxpr(f)(tree, x))
    with temporary_rules():
        rebasin.register_rule(name)(lambda equation, *inputs: inputs[-len(equation.shapes) :])
        spec = rebasin.infer_spec(f, tree, x)
        ((value,),) = site_values(spec, f, tree, x).values()
    np.testing.assert_allclose(value, softsign(x @ tree["w"]), rtol=1e-5, atol=1e-6)


def test_reducer_of_a_window_is_no_call():
    """Both hold a program as ``jaxpr``; only a call's takes the operands of the equation."""

    def apply(tree, x):
        h = jnp.tanh(x @ tree["w"])[:, None, None]
        pooled = lax.reduce_window(h, 1.0, lambda a, b: a * b, (1, 1, 1, 1), (1, 1, 1, 1), "VALID")
        return pooled[:, 0, 0] @ tree["v"]

    tree, _ = plain(None)
    x = images(4, 3)
    same(site_values(rebasin.infer_spec(apply, tree, x), apply, tree, x)["w"], jnp.tanh(x @ tree["w"]))


def test_function_of_several_inputs():
    def apply(tree, x, gate):
        return (jnp.tanh(x @ tree["w"]) * gate[:, None]) @ tree["v"]

    tree, _ = plain(None)
    x, gate = images(4, 3), images(4, seed=1)
    spec = rebasin.infer_spec(apply, tree, x, gate)
    program = trace_program(spec, apply, tree, x, gate)
    (site,) = find_sites(program, ["w"])["w"]
    _, values = evaluate(program.closed, jax.tree.leaves((tree, x, gate)), hand_out, {site.address: None})
    same(values[site.address], jnp.tanh(x @ tree["w"]) * gate[:, None])
    message = r"cannot be traced with input 0 float32\[4, 3\], input 1 float32\[2, 2\]: "
    with pytest.raises(InferenceError, match=message):
        trace_program(spec, apply, tree, x, jnp.ones((2, 2)))


def test_branch_that_is_not_taken_is_silent():
    def apply(tree, x):
        def deep(t, x):
            return jnp.tanh(x @ t["w"]) @ t["v"]

        return lax.cond(x[0, 0] > 0, deep, lambda t, x: x @ t["w"] @ t["v"] * 0, tree, x)

    tree, _ = plain(jnp.tanh)
    x = jnp.abs(images(4, 3))
    spec = rebasin.infer_spec(apply, tree, x)
    nothing = jnp.zeros((4, 6))
    same(site_values(spec, apply, tree, x, "all")["w"], nothing, jnp.tanh(x @ tree["w"]))
    same(site_values(spec, apply, tree, -x, "all")["w"], -x @ tree["w"], nothing)


def test_site_in_a_while_loop_is_read_at_its_last_step():
    def apply(tree, x):
        def step(carry):
            i, y = carry
            return i + 1, y + jnp.tanh((x + i) @ tree["w"]) @ tree["v"]

        return lax.while_loop(lambda carry: carry[0] < 2, step, (0.0, jnp.zeros((4, 2))))[1]

    tree, _ = plain(jnp.tanh)
    x = images(4, 3)
    spec = rebasin.infer_spec(apply, tree, x)
    same(site_values(spec, apply, tree, x)["w"], jnp.tanh((x + 1) @ tree["w"]))
    assert all(layer.in_while for layer in find_layers(trace_program(spec, apply, tree, x)))


def test_statistics_of_norms_and_softmax_are_no_reading():
    """With all sites: pre-norm values and scores, which only statistics reduce, are not among them."""

    def apply(tree, x):
        h = x @ tree["w"]
        h = jnp.exp(h - h.mean(0, keepdims=True))
        h = h / h.sum(0, keepdims=True)
        return h.max(0, keepdims=True) @ tree["v"]

    tree, _ = plain(None)
    x = images(4, 3)
    spec = rebasin.infer_spec(apply, tree, x)
    h = x @ tree["w"]
    same(site_values(spec, apply, tree, x, "all")["w"], jax.nn.softmax(h - h.mean(0, keepdims=True), axis=0))


def test_looked_up_rows_are_sites_of_groups_without_others():
    def embed(tree, tokens):
        return tree["w"][tokens] @ tree["v"]

    def embed_and_norm(tree, tokens):
        return jnp.tanh(tree["w"][tokens]) @ tree["v"]

    tree, _ = plain(None)
    tokens = jnp.array([0, 2, 1, 0])
    for apply, expected in ((embed, tree["w"][tokens]), (embed_and_norm, jnp.tanh(tree["w"][tokens]))):
        spec = rebasin.infer_spec(apply, tree, tokens)
        same(site_values(spec, apply, tree, tokens, "all")["w"], expected)


def test_group_that_lives_in_weights_alone_has_no_site():
    def apply(tree, x):
        return x @ (tree["w"] @ tree["v"])

    tree, _ = plain(None)
    x = images(4, 3)
    spec = rebasin.infer_spec(apply, tree, x)
    assert spec.groups == ("w",)
    assert site_values(spec, apply, tree, x) == {"w": []}


def test_spec_that_allows_too_much_is_refused():
    tree, apply = plain(lambda h: jnp.cumsum(h, axis=1))
    spec = rebasin.PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P0", None)})
    with pytest.raises(
        InferenceError, match=r"allows more than the function does:\n  group 'P0' has to stay"
    ):
        trace_program(spec, apply, tree, images(4, 3))
    tied = {"w": jnp.ones((3, 6)), "v": jnp.ones((6, 6))}
    spec = rebasin.PermutationSpec.from_axes({"w": (None, "P0"), "v": ("P1", None)})
    with pytest.raises(InferenceError, match="groups 'P0' and 'P1' move together"):
        trace_program(spec, lambda t, x: x @ t["w"] @ t["v"], tied, images(4, 3))


def test_hand_written_table_in_place_of_an_inferred_spec():
    model, x = MLP((6, 5), 2), images(3, 2, 2, 1)
    inferred, tree = flax_case(model, x)
    named = {
        "params/Dense_0/kernel": (None, "P0"),
        "params/Dense_0/bias": ("P0",),
        "params/Dense_1/kernel": ("P0", "P1"),
        "params/Dense_1/bias": ("P1",),
        "params/Dense_2/kernel": ("P1", None),
        "params/Dense_2/bias": (None,),
    }
    spec = rebasin.PermutationSpec.from_axes(named)
    assert spec.equivalent(inferred)
    for one, other in zip(
        site_values(spec, model.apply, tree, x).values(),
        site_values(inferred, model.apply, tree, x).values(),
        strict=True,
    ):
        same(one, *other)


SPECIMENS = [
    "group_norm",
    "lstm",
    "fused_projections_split",
    "fused_projections_head_by_head",
    "scan_over_transformer_blocks",
    "vmap_remat_cond_and_custom_derivatives",
    "recurrent_while_loop",
]


@pytest.mark.parametrize(
    "name", [*SPECIMENS, *(pytest.param(n, marks=pytest.mark.slow) for n in ZOO if n not in SPECIMENS)]
)
def test_zoo_has_sites_and_its_outputs_stay(name):
    if name.endswith(("equinox", "haiku")):
        pytest.importorskip(name.rsplit("_", 1)[1])
    specimen = ZOO[name].build()
    tree, inputs = arrays(specimen.tree), arrays(specimen.inputs)
    spec = rebasin.infer_spec(
        specimen.function, specimen.tree, *specimen.inputs, state_outputs=specimen.state_outputs
    )
    program = trace_program(spec, specimen.function, tree, *inputs)
    sites = find_sites(program, spec.groups)
    assert all(sites.values())
    places = {site.address: None for found in sites.values() for site in found}

    @jax.jit
    def both(tree, inputs):
        outputs, _ = evaluate(program.closed, jax.tree.leaves((tree, inputs)), hand_out, places)
        return outputs, jax.tree.leaves(specimen.function(tree, *inputs))

    for got, wanted in zip(*both(tree, inputs), strict=True):
        np.testing.assert_allclose(
            np.asarray(got, np.float64), np.asarray(wanted, np.float64), rtol=1e-3, atol=1e-4
        )
