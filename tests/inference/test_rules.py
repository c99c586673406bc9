"""One small function for each rule, with its symmetry worked out by hand and verified in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import X, check, random_tree
from jax import lax

from rebasin import Axis, PermutationSpec, infer_spec, verify_spec

IMAGES = jnp.asarray(np.random.default_rng(0).normal(size=(2, 4, 4, 3)), jnp.float32)
TOKENS = jnp.asarray([[0, 3, 1, 1], [4, 2, 2, 0]])


def reasons(spec):
    return {(pin.path, pin.axis): pin.reason.partition(": ")[2] for pin in spec.pins}


# --- gather and scatter -------------------------------------------------------------------------------------


def test_embedding_and_its_transpose_as_output():
    def function(t, tokens):
        return jnp.tanh(jnp.take(t["e"], tokens, axis=0)) @ t["e"].T

    spec = check(function, random_tree(e=(5, 6)), TOKENS, e=(None, "P"))
    assert reasons(spec)["e", 0] == "positions are looked up by index"


def test_rows_picked_by_constant_and_by_computed_indices():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        return h[jnp.array([3, 1])] @ t["v"] + h[x.sum().astype(int) % 5] @ t["v"][None]

    check(function, random_tree(w=(3, 6), v=(6, 2)), X, w=(None, "P"), v=("P", None))


def test_units_picked_by_index_stay():
    def function(t, x):
        return jnp.tanh(x @ t["w"])[:, jnp.array([2, 0, 3])] @ t["v"]

    check(function, random_tree(w=(3, 6), v=(3, 2)), X, w=(None, None), v=(None, None))


def test_take_along_axis_moves_with_what_it_is_batched_over():
    def function(t, x, tokens):
        logits = jnp.einsum("bi,ihv->bhv", x, t["w"])  # five values in each of 6 heads, one of them picked
        picked = jnp.take_along_axis(logits, jnp.round(t["which"]).astype(int)[None] % 5, axis=2)
        return jnp.einsum("bhk,ho->bo", picked, t["v"])

    check(
        function,
        random_tree(w=(3, 6, 5), which=(6, 1), v=(6, 2)),
        X,
        TOKENS,
        w=(None, "H", None),
        which=("H", None),
        v=("H", None),
    )


def test_table_for_each_head_looked_up_under_vmap():
    def function(t, tokens):
        heads = jax.vmap(lambda e: e[tokens])(t["e"])  # [H, b, t, d]
        return jnp.einsum("hbtd,hdo->bto", jnp.tanh(heads), t["v"])

    table = {"e": ("H", None, "D"), "v": ("H", "D", None)}
    check(function, random_tree(e=(3, 5, 4), v=(3, 4, 2)), TOKENS, **table, indexed={"D": ["H"]})


@pytest.mark.parametrize("method", ["add", "multiply", "min", "max"])
def test_scatter_keeps_the_rows_and_moves_the_units(method):
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        h = getattr(h.at[jnp.array([3, 1, 3])], method)(t["u"])
        return h @ t["v"]

    check(function, random_tree(w=(3, 6), u=(3, 6), v=(6, 2)), X, w=(None, "P"), u=(None, "P"), v=("P", None))


def test_overwriting_at_a_computed_place_pins_what_is_written_in_part():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        start = (x[0, 0] > 0).astype(int)
        return h.at[:, start + jnp.arange(2)].set(t["u"]) @ t["v"] + h.at[0].set(0.0) @ t["v"]

    params = random_tree(w=(3, 6), u=(5, 2), v=(6, 2))
    spec = check(function, params, X, w=(None, None), u=(None, None), v=(None, None))
    assert reasons(spec)["v", 0] == "positions are written by index"


def test_updates_move_with_their_indices_where_their_order_does_not_count():
    def function(t, x):
        places = jnp.round(t["places"]).astype(int) % 5
        return x.at[places].add(t["updates"])

    table = {"places": ("P",), "updates": ("P", None)}
    check(function, random_tree(places=(6,), updates=(6, 3)), X, **table)
    overwriting = infer_spec(
        lambda t, x: x.at[jnp.round(t["places"]).astype(int) % 5].set(t["updates"]),
        random_tree(places=(6,), updates=(6, 3)),
        X,
    )
    assert reasons(overwriting)["places", 0] == "later updates overwrite earlier ones"


# --- order --------------------------------------------------------------------------------------------------


def test_sorted_values_are_symmetric_but_argsort_is_not():
    def function(t, x):
        return jnp.sort(x @ t["w"], axis=1) @ t["v"], jnp.argsort(x @ t["u"], axis=1)

    check(
        function, random_tree(w=(3, 6), v=(6, 2), u=(3, 6)), X, w=(None, "P"), v=(None, None), u=(None, None)
    )


def test_sort_of_several_operands():
    def function(t, x):
        keys, values = lax.sort((x @ t["w"] + t["s"][None], jnp.tanh(x @ t["u"])), dimension=1, num_keys=1)
        rounded, carried = lax.sort((jnp.round(x @ t["c"]), x @ t["d"]), dimension=1, num_keys=1)
        both = lax.sort((x @ t["a"], x @ t["b"]), dimension=1, num_keys=2)
        return keys + values, rounded + carried, both

    params = random_tree(w=(3, 6), s=(6,), u=(3, 6), a=(3, 7), b=(3, 7), c=(3, 5), d=(3, 5))
    free = {"w": (None, "W"), "s": ("W",), "u": (None, "W"), "a": (None, "P"), "b": (None, "P")}
    spec = check(function, params, X, **free, c=(None, None), d=(None, None))
    assert reasons(spec)["c", 1] == "equal keys are sorted by position"


def test_positions_of_the_best_are_followed_to_what_they_look_up():
    def function(t, x):
        best, which = lax.top_k(jax.nn.softmax(x @ t["router"] + t["bias"][None]), 2)
        code = jax.nn.one_hot(which, 4)  # compared with a count
        found = t["table"][which]  # looked up
        own = jnp.take_along_axis(x @ t["own"], which, axis=1)
        mask = jnp.zeros((5, 4)).at[jnp.arange(5)[:, None], which].set(best)  # written
        return jnp.einsum("bke,ed->bkd", code, t["coded"]), found, own, mask @ t["masked"]

    params = random_tree(router=(3, 4), bias=(4,), table=(4, 2), own=(3, 4), coded=(4, 2), masked=(4, 2))
    experts = {"bias": ("E",), "table": ("E", None), "coded": ("E", None), "masked": ("E", None)}
    check(function, params, X, router=(None, "E"), own=(None, "E"), **experts)


@pytest.mark.parametrize("logits", [jax.nn.relu, jnp.round, lambda x: x.astype(jnp.bfloat16)])
def test_experts_that_may_tie_stay(logits):
    def function(t, x):
        return t["table"][jnp.argmax(logits(x @ t["router"]), axis=1)]

    spec = check(
        function, random_tree(router=(3, 4), table=(4, 2)), X, router=(None, None), table=(None, None)
    )
    assert reasons(spec)["router", 1] == "of equal values the first along it is chosen"


def test_a_repeated_value_ties_with_itself():
    def function(t, x):
        same = jnp.broadcast_to((x @ t["w"])[:, :1], (5, 4))
        return t["table"][jnp.argmax(same, axis=1)]

    spec = infer_spec(function, random_tree(w=(3, 6), table=(4, 2)), X)
    assert spec.table["table"] == (Axis.whole(None),) * 2


def test_positions_that_are_computed_with_stay():
    def function(t, x):
        which = jnp.argmax(x @ t["router"] + t["bias"], axis=1)
        return t["table"][3 - which], t["other"][which]

    params = random_tree(router=(3, 4), bias=(1, 4), table=(4, 2), other=(4, 2))
    pins = dict.fromkeys(params, (None, None))
    spec = check(function, params, X, **pins)
    assert reasons(spec)["other", 0] == "positions along it are computed with"


def test_a_position_after_another_is_not_that_position():
    def function(t, x):
        return t["table"][jnp.argmax(x @ t["router"] + t["bias"], axis=1) + 1]

    params = random_tree(router=(3, 4), bias=(1, 4), table=(4, 2))
    spec = check(function, params, X, **dict.fromkeys(params, (None, None)))
    assert reasons(spec)["table", 0] == "positions are looked up by index"


def test_branches_have_one_order_of_units():
    def function(t, x):
        h = lax.cond(x.sum() > 0, lambda: jnp.tanh(x @ t["one"]), lambda: jnp.tanh(x @ t["other"]))
        return h @ t["v"]

    check(
        function,
        random_tree(one=(3, 6), other=(3, 6), v=(6, 2)),
        X,
        one=(None, "P"),
        other=(None, "P"),
        v=("P", None),
    )


def test_positions_that_are_an_output_or_carried_by_a_loop_stay():
    def function(t, x):
        which = jnp.argmax(x @ t["router"] + t["bias"], axis=1)
        again = jnp.argmax(x @ t["again"] + t["bias"], axis=1)
        carried = lax.fori_loop(0, 2, lambda _, w: w[::-1], again)
        return which, t["table"][carried]

    params = random_tree(router=(3, 4), again=(3, 4), bias=(1, 4), table=(4, 2))
    check(function, params, X, **dict.fromkeys(params, (None, None)))


def test_top_k_moves_along_other_axes():
    def function(t, x):
        values, places = lax.top_k(jnp.einsum("bi,ihk->bhk", x, t["w"]) + t["b"], 2)
        return jnp.einsum("bhk,bhk,hko->bo", values, places.astype(jnp.float32), t["v"])

    params = random_tree(w=(3, 6, 4), b=(1, 6, 4), v=(6, 2, 2))
    heads = {"w": (None, "H", None), "b": (None, "H", None), "v": ("H", None, None)}
    spec = check(function, params, X, **heads)
    assert reasons(spec)["w", 2] == "positions along it are computed with"


# --- random numbers -----------------------------------------------------------------------------------------


def test_dropout_pins_and_suggests_the_deterministic_mode():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        return (h * jax.random.bernoulli(jax.random.key(0), 0.5, h.shape)) @ t["v"]

    spec = check(function, random_tree(w=(3, 6), v=(6, 2)), X, w=(None, None), v=(None, None))
    assert reasons(spec)["v", 0] == "random numbers differ by position; use the model's deterministic mode"


@pytest.mark.parametrize("key", [jax.random.key(0), jax.random.PRNGKey(0)], ids=["typed", "raw"])
def test_keys_among_the_inputs_and_noise_that_units_share(key):
    def function(t, x, key):
        first, second = jax.random.split(jax.random.fold_in(key, 3))
        noise = jax.random.normal(first, (5, 1)) + jax.random.gamma(second, 2.0, (5, 1))
        return (jnp.tanh(x @ t["w"]) * noise) @ t["v"]

    spec = infer_spec(function, random_tree(w=(3, 6), v=(6, 2)), X, key)
    assert spec.equivalent(PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)}))


# --- shapes -------------------------------------------------------------------------------------------------


def test_interleaved_halves():
    def function(t, x):
        h = x @ t["w"]
        return (jnp.tanh(h[:, ::2]) * h[:, 1::2]) @ t["v"]

    check(function, random_tree(w=(3, 12), v=(6, 2)), X, w=(None, Axis.product(("P", 6), 2)), v=("P", None))


def test_strides_that_do_not_cover_the_axis_pin_it():
    def function(t, x):
        return (x @ t["w"])[:, 1:6:2] @ t["v"]

    check(function, random_tree(w=(3, 7), v=(3, 2)), X, w=(None, None), v=(None, None))


def test_stack_and_unstack():
    def function(t, x):
        h = jnp.stack([jnp.tanh(x @ t["a"]), x @ t["b"]], axis=1)
        gate, value = jnp.unstack(h * 2, axis=1)
        return (gate * value) @ t["v"] + h.mean(1) @ t["v"]

    check(function, random_tree(a=(3, 6), b=(3, 6), v=(6, 2)), X, a=(None, "P"), b=(None, "P"), v=("P", None))


def test_tile_repeats_the_axis():
    def function(t, x):
        return jnp.tanh(jnp.tile(x @ t["w"], (1, 2)) + t["b"][None]) @ t["v"]

    axis = Axis.product(("R", 2), ("P", 6))  # the copies of one unit differ by their biases alone
    params = random_tree(w=(3, 6), b=(12,), v=(12, 2))
    check(function, params, X, w=(None, "P"), b=(axis,), v=(axis, None), indexed={"R": ["P"]})


def test_roll_of_a_long_axis_pins_it_without_deep_recursion():
    def function(t, x):
        h = x @ t["w"]
        return (h + jnp.roll(h, 1, axis=1)) @ t["v"]

    spec = infer_spec(function, random_tree(w=(3, 3000), v=(3000, 2)), X)
    assert spec.groups == ()


def test_bits_read_as_another_type():
    def function(t, x):
        h = x @ t["w"]
        same = lax.bitcast_convert_type(lax.bitcast_convert_type(h, jnp.int32) ^ 0, h.dtype)
        bytes_ = lax.bitcast_convert_type(h, jnp.uint8).astype(jnp.float32)
        return same @ t["v"] + jnp.einsum("bhk,ho->bo", bytes_, t["v"])

    params = random_tree(w=(3, 6), v=(6, 2))
    spec = infer_spec(function, params, X)
    assert spec.equivalent(PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)}))


# --- convolutions and windows -------------------------------------------------------------------------------


def conv(x, kernel, strides=(1, 1), padding="VALID", **options):
    numbers = ("NHWC", "HWIO", "NHWC")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers, **options)


@pytest.mark.parametrize(("stride", "rows"), [(1, "P"), (2, None)])
def test_positions_pass_a_pointwise_convolution_that_does_not_stride(stride, rows):
    """Rows that one product makes and another one reads."""

    def function(t, x):
        made = jnp.einsum("bi,ipc->bpc", x, t["w"])[:, :, None]
        return jnp.einsum("bpqc,pco->bo", conv(made, t["k"], (stride, 1)), t["v"])

    params = random_tree(w=(3, 4, 6), k=(1, 1, 6, 5), v=(4 // stride, 5, 2))
    spec = infer_spec(function, params, X)
    verify_spec(spec, function, params, X)
    axes = dict(spec.leaves)
    moving = {group: "P" for group in (*axes["w"][1].groups, *axes["v"][0].groups) if group not in spec.fixed}
    assert list(moving.values()) == [rows] * bool(rows)


def test_patches_keep_channels_as_a_factor():
    def function(t, x):
        h = conv(x, t["k"])
        h = lax.conv_general_dilated_patches(
            h, (2, 2), (2, 2), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC")
        )
        return h.mean((1, 2)) @ t["v"]

    check(
        function,
        random_tree(k=(1, 1, 3, 6), v=(24, 2)),
        IMAGES,
        k=(None, None, None, "C"),
        v=(Axis.product(("C", 6), 4), None),
    )


def test_gradient_of_a_pooled_function_keeps_channels():
    """Max pooling differentiates to `select_and_scatter_add`."""

    def function(t, x):
        def inner(x):
            h = conv(x, t["k"])
            pooled = lax.reduce_window(h, -jnp.inf, lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
            return (jnp.tanh(pooled).mean((1, 2)) @ t["v"]).sum()

        return jax.grad(inner)(x)

    check(function, random_tree(k=(1, 1, 3, 6), v=(6,)), IMAGES, k=(None, None, None, "C"), v=("C",))


def test_windows_of_ones_own_reduction():
    def function(t, x):
        h = conv(x, t["k"])
        h = lax.reduce_window(h, 1.0, lambda a, b: a * b, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        return h.sum((1, 2)) @ t["v"]

    params = random_tree(k=(1, 1, 3, 6), v=(6, 2))
    check(function, params, IMAGES, k=(None, None, None, "C"), v=("C", None))


def test_rows_routed_to_experts_in_runs():
    """The contracted and the free axis of a ragged product move, in each expert by themselves."""

    def function(t, x):
        h = jnp.tanh(lax.ragged_dot(x, t["up"], jnp.array([2, 0, 3])))
        return lax.ragged_dot(h, t["down"], jnp.array([2, 0, 3]))

    spec = infer_spec(function, random_tree(up=(3, 3, 6), down=(3, 6, 2)), X)
    wanted = {"up": (None, None, "P"), "down": (None, "P", None)}
    assert spec.equivalent(PermutationSpec.from_axes(wanted))


# --- programs inside programs -------------------------------------------------------------------------------


def test_composite_and_debug_print_do_not_pin():
    def function(t, x):
        h = lax.composite(jnp.tanh, "my.tanh")(x @ t["w"])
        jax.debug.print("{}", h)
        return lax.stop_gradient(h) @ t["v"]

    spec = infer_spec(function, random_tree(w=(3, 6), v=(6, 2)), X)
    assert spec.equivalent(PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)}))


# --- position-dependent axes, which cannot be outer groups -----------------------------------------------

# Operations after which the positions along axis 1 have met.
MIXERS = {
    "gather": lambda h: h[:, jnp.array([1, 2, 0])],
    "take_along_axis": lambda h: jnp.take_along_axis(
        h, jnp.array([1, 2, 0])[None, :, None] + 0 * h.astype(int), 1
    ),
    "sort": lambda h: jnp.sort(h, axis=1),
    "top_k": lambda h: jnp.moveaxis(lax.top_k(jnp.moveaxis(h, 1, 2), 3)[0], 2, 1),
    "argsort": lambda h: jnp.argsort(h, axis=1) * 1.0,
    "argmax": lambda h: (jnp.argmax(h, axis=1)[:, None] == jnp.arange(3)[None, :, None]) * 1.0,
    "cumsum": lambda h: jnp.cumsum(h, axis=1),
    "rev": lambda h: h[:, ::-1],
    "roll": lambda h: jnp.roll(h, 1, axis=1),
    "dynamic slice": lambda h: lax.dynamic_slice(
        jnp.pad(h, ((0, 0), (1, 1), (0, 0))), (0, 1 + (h[0, 0, 0] > 0), 0), h.shape
    ),
    "dynamic update": lambda h: lax.dynamic_update_slice(h, h[:, 2:], (0, 0, 0)),
    "scatter": lambda h: h.at[:, jnp.array([2, 0, 1])].add(h),
    "shifted slices": lambda h: jnp.concatenate([h[:, 1:], h[:, :1]], axis=1),
    "shifted pad": lambda h: jnp.pad(h[:, 1:], ((0, 0), (0, 1), (0, 0))),
    "scan": lambda h: jnp.swapaxes(
        lax.scan(lambda c, u: (c + u, c), 0 * h[:, 0], jnp.swapaxes(h, 0, 1))[1], 0, 1
    ),
    "stack": lambda h: jnp.stack([h[:, 2], h[:, 0], h[:, 1]], axis=1),
    "unstack": lambda h: jnp.stack(jnp.unstack(h, axis=1)[::-1], axis=1),
    "max": lambda h: jnp.broadcast_to(h.max(1, keepdims=True), h.shape),
    "matrix of heads": lambda h: jnp.einsum("bhd,hg->bgd", h, jnp.arange(9.0).reshape(3, 3)),
    "gram": lambda h: jnp.einsum("bhd,bgd,bge->bhe", h, h, h),
    "window": lambda h: lax.reduce_window(h, -jnp.inf, lax.max, (1, 3, 1), (1, 1, 1), "SAME"),
    "convolution": lambda h: lax.conv_general_dilated(
        h, jnp.ones((3, 4, 4)), (1,), "SAME", dimension_numbers=("NWC", "WIO", "NWC")
    ),
}


@pytest.mark.parametrize("name", MIXERS)
def test_dimensions_of_heads_that_meet_are_permuted_alike(name):
    """Alone, four dimensions would move in each of three heads by themselves; here heads see each other."""

    def function(t, x):
        h = jnp.tanh(jnp.einsum("bi,ihd->bhd", x, t["w"]) + t["b"])
        return jnp.einsum("bhd,hdo->bo", jnp.tanh(h + MIXERS[name](h)), t["v"])

    params = random_tree(w=(3, 3, 4), b=(1, 3, 4), v=(3, 4, 2))
    spec = infer_spec(function, params, X)
    dimensions = dict(spec.leaves)["w"][2].groups
    assert not spec.outer_groups.keys() & set(dimensions)
    verify_spec(spec, function, params, X)


def test_steps_that_meet_through_the_carry_are_no_outer_group():
    """A step returns what the step before it computed; no equation reads that value in between."""

    def function(t, x):
        def step(before, w):
            return jnp.tanh(x @ w), before

        _, hidden = lax.scan(step, jnp.zeros((5, 4), x.dtype), t["w"])
        return jnp.einsum("lbd,ldo->bo", hidden, t["v"])

    check(function, random_tree(w=(3, 3, 4), v=(3, 4, 2)), X, w=(None, None, "D"), v=(None, "D", None))
