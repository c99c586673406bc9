"""A spec holds for inputs of other lengths and values than those that it was inferred with."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import X, random_tree
from jax import lax

from rebasin import Axis, PermutationSpec, infer_spec, verify_spec

# Rows of zeros as of padding, equal rows, and other numbers than `X`.
OTHERS = [X.at[1:3].set(0.0), jnp.ones_like(X), -3.0 * X]

UNREAD = "nothing reads these positions for inputs of this size"
TIES = "of equal values the first along it is chosen"


def check(function, params, example, others, **expected):
    """Infer with the example, compare with the table expected, and verify with the other inputs."""
    spec = infer_spec(function, params, *example)
    wanted = PermutationSpec.from_axes(expected)
    assert spec.equivalent(wanted), f"inferred:\n{spec}\nwanted:\n{wanted}"
    for inputs in (example, *others):
        verify_spec(spec, function, params, *inputs)
    return spec


def reasons(spec):
    return {pin.reason.rpartition(": ")[2] for pin in spec.pins}


# --- positions that nothing reads ---------------------------------------------------------------------------

READS = {
    "slice": lambda table, n: table[:n],
    "slice of a cast": lambda table, n: (table * 1.0)[None, :n][0],
    "slice of a product": lambda table, n: jnp.tanh(table @ jnp.diag(jnp.arange(6.0)) + table)[:n],
    "split": lambda table, n: jnp.split(table, [n])[0],
    "unused slice": lambda table, n: (jnp.tanh(table[n:]), table[:n])[1],
    "reshape and slice": lambda table, n: table.reshape(5, 2, 6)[: n // 2].reshape(n, 6),
    "gather": lambda table, n: table[np.arange(n)],
    "dynamic slice": lambda table, n: lax.dynamic_slice(table, (0, 0), (n, 6)),
    "take": lambda table, n: jnp.take(table, jnp.arange(n), axis=0),
    "scan": lambda table, n: lax.scan(lambda c, row: (c, jnp.tanh(row)), 0.0, table[:n])[1],
    "overwritten": lambda table, n: lax.dynamic_update_slice(table, jnp.zeros((10 - n, 6)), (n, 0))[:n],
    "inside jit": lambda table, n: jax.jit(lambda t: t[:n])(table),
    "unstack": lambda table, n: jnp.stack(jnp.unstack(table)[:n]),
}


@pytest.mark.parametrize("name", READS)
def test_rows_of_a_table_that_a_short_example_does_not_reach_stay(name):
    def function(t, tokens):
        h = t["embed"][tokens] + READS[name](t["table"], len(tokens))
        return jnp.tanh(h @ t["up"]) @ t["down"]

    params = random_tree(embed=(7, 6), table=(10, 6), up=(6, 5), down=(5, 2))
    axes = {"embed": (None, "R"), "table": (None, "R"), "up": ("R", "P"), "down": ("P", None)}
    if name == "slice of a product":  # the matrix tells the columns apart
        axes |= {"embed": (None, None), "table": (None, None), "up": (None, "P")}
    check(function, params, [jnp.arange(4)], [[jnp.arange(n) % 7] for n in (2, 8, 10)], **axes)


def test_unread_rows_say_why_they_stay():
    def function(t, tokens):
        return t["embed"][tokens] + t["table"][: len(tokens)]

    spec = infer_spec(function, random_tree(embed=(7, 6), table=(10, 6)), jnp.arange(4))
    assert [pin.reason for pin in spec.pins if (pin.path, pin.axis) == ("table", 0)][-1] == UNREAD


def test_unread_columns_of_a_projection_stay():
    """Of three parts two are read."""

    def function(t, x):
        q, k, _ = jnp.split(x @ t["w"], 3, axis=1)
        return jnp.tanh(q * k) @ t["v"]

    axis = Axis.concatenate(Axis.product(("P", 4)), Axis.product(("P", 4)), Axis.product(4))
    check(function, random_tree(w=(3, 12), v=(4, 2)), [X], [], w=(None, axis), v=("P", None))


def test_what_is_computed_in_vain_ties_nothing():
    def function(t, x):
        h = jnp.tanh(x @ t["w"])
        jnp.cumsum(h, axis=1) @ t["unused"]
        return h @ t["v"]

    params = random_tree(w=(3, 6), unused=(6, 2), v=(6, 2))
    axes = {"w": (None, "P"), "unused": (None, None), "v": ("P", None)}
    spec = check(function, params, [X], [[o] for o in OTHERS], **axes)
    assert "the function does not use this leaf" in reasons(spec)


def test_positions_that_only_become_the_next_state_are_read():
    def function(t, x):
        return x, {"mean": 0.9 * t["mean"]}

    params = random_tree(mean=(6,))
    spec = infer_spec(function, params, X, state_outputs={"1": ""})
    assert spec.equivalent(PermutationSpec.from_axes({"mean": ("P",)}))


# --- one constant in several places -------------------------------------------------------------------------

ONES = np.ones((2, 6), np.float32)
MASKS = {
    "closed over": lambda x: (ONES[0], ONES[1]),
    "one array": lambda x: (ONES[0],) * 2,
    "made inside": lambda x: tuple(jnp.ones((2, 6))),
    "full": lambda x: (jnp.full(6, 2.0),) * 2,
    "indexed": lambda x: (jnp.asarray(ONES)[0], jnp.asarray(ONES)[1]),
    "reshaped": lambda x: tuple(jnp.ones(12).reshape(2, 6)),
    "zeros like": lambda x: (1.0 - jnp.zeros_like(x, shape=(6,)),) * 2,
    "computed": lambda x: (jnp.exp(jnp.zeros(6)) * 3.0,) * 2,
    "scanned": lambda x: tuple(lax.scan(lambda c, m: (c, m * 2.0), 0.0, jnp.ones((2, 6)))[1]),
    "from data": lambda x: (jnp.broadcast_to(x.sum(), (6,)),) * 2,
    "through jit": lambda x: jax.jit(lambda m: (m, m))(jnp.ones(6)),
    "padded": lambda x: (jnp.pad(jnp.ones(4), 1, constant_values=1.0),) * 2,
}


@pytest.mark.parametrize("name", MASKS)
def test_a_constant_that_two_layers_share_does_not_tie_them(name):
    def function(t, x):
        first, second = MASKS[name](x)
        h = jnp.tanh(x @ t["a"]) * first[None]
        return (jnp.tanh(h @ t["b"]) * second[None]) @ t["c"]

    params = random_tree(a=(3, 6), b=(6, 6), c=(6, 2))
    if name == "padded":  # the padding is the same number, but that is not looked at
        spec = infer_spec(function, params, X)
        assert sorted(spec.group_sizes(params).values()) == [4, 4]
        return
    check(function, params, [X], [[o] for o in OTHERS], a=(None, "P"), b=("P", "Q"), c=("Q", None))


@pytest.mark.parametrize("loop", ["scan", "fori", "while"])
def test_recurrent_layers_that_start_from_the_same_zeros_are_not_tied(loop):
    def layer(state, xs, w, u):
        def step(h, x):
            h = jnp.tanh(x @ w + h @ u)
            return h, h

        if loop == "scan":
            return lax.scan(step, state, xs)[1]
        if loop == "fori":
            last = lax.fori_loop(0, 5, lambda i, h: step(h, xs[i])[0], state)
        else:
            last = lax.while_loop(
                lambda c: c[0] < 5, lambda c: (c[0] + 1, step(c[1], xs[c[0]])[0]), (0, state)
            )[1]
        return jnp.broadcast_to(last[None], (5, 6))

    def function(t, xs):
        zeros = jnp.zeros(6)
        h = layer(zeros, xs, t["w1"], t["u1"])
        return layer(zeros, h, t["w2"], t["u2"]) @ t["v"]

    params = random_tree(w1=(3, 6), u1=(6, 6), w2=(6, 6), u2=(6, 6), v=(6, 2))
    axes = {"w1": (None, "P"), "u1": ("P", "P"), "w2": ("P", "Q"), "u2": ("Q", "Q"), "v": ("Q", None)}
    check(function, params, [X], [[o] for o in OTHERS], **axes)


def test_a_mask_that_a_loop_hands_on_does_not_tie_the_layers_of_its_body():
    def function(t, x):
        def step(_, carry):
            h, mask = carry
            up = jnp.tanh(h @ t["up"]) * mask
            return h + (jnp.tanh(up @ t["mid"]) * mask) @ t["down"], mask

        return lax.fori_loop(0, 3, step, (x @ t["w"], jnp.ones((5, 6))))[0] @ t["v"]

    params = random_tree(w=(3, 4), up=(4, 6), mid=(6, 6), down=(6, 4), v=(4, 2))
    axes = {"w": (None, "R"), "up": ("R", "P"), "mid": ("P", "Q"), "down": ("Q", "R"), "v": ("R", None)}
    check(function, params, [X], [[o] for o in OTHERS], **axes)


def test_a_mask_over_heads_does_not_tie_the_heads_of_two_layers():
    def attend(t, i, x, mask):
        q, k, v = (jnp.einsum("bi,ihd->bhd", x, t[f"{name}{i}"]) for name in "qkv")
        scores = jnp.where(mask, jnp.einsum("bhd,chd->hbc", q, k), -1e9)
        return jnp.einsum("hbc,chd,hdo->bo", jax.nn.softmax(scores), v, t[f"o{i}"])

    def function(t, x):
        mask = jnp.broadcast_to(jnp.tril(jnp.ones((5, 5), bool))[None], (2, 5, 5))
        return attend(t, 1, x + attend(t, 0, x, mask), mask)

    shapes = {f"{n}{i}": (3, 2, 4) for n in "qkv" for i in range(2)} | {f"o{i}": (2, 4, 3) for i in range(2)}
    spec = infer_spec(function, random_tree(**shapes), X)
    sizes = spec.group_sizes(random_tree(**shapes))
    assert sorted(map(str, sizes.values())) == ["(2, 4)"] * 4 + ["2"] * 2
    verify_spec(spec, function, random_tree(**shapes), OTHERS[0])


def test_a_count_that_two_routers_share_does_not_tie_their_experts():
    def function(t, x):
        experts = jnp.arange(4)
        for i in range(2):
            which = jnp.argmax(x @ t[f"r{i}"] + t[f"b{i}"], axis=1)
            x = x + jnp.einsum("be,bi,eio->bo", (which[:, None] == experts[None]) * 1.0, x, t[f"w{i}"])
        return x

    shapes = {f"{n}{i}": s for i in range(2) for n, s in {"r": (3, 4), "b": (1, 4), "w": (4, 3, 3)}.items()}
    axes = {f"r{i}": (None, f"E{i}") for i in range(2)} | {f"b{i}": (None, f"E{i}") for i in range(2)}
    axes |= {f"w{i}": (f"E{i}", None, None) for i in range(2)}
    check(function, random_tree(**shapes), [X], [[o] for o in OTHERS], **axes)


def test_a_constant_that_changes_in_a_loop_is_none():
    """The carry starts as zeros, and varies by unit from the second step on."""

    def function(t, x):
        h = lax.fori_loop(0, 3, lambda _, h: jnp.tanh(h + x @ t["w"]), jnp.zeros((5, 6)))
        return (h * jnp.tanh(h @ t["u"])) @ t["v"] + h @ t["v"]

    params = random_tree(w=(3, 6), u=(6, 6), v=(6, 2))
    check(function, params, [X], [[o] for o in OTHERS], w=(None, "P"), u=("P", "P"), v=("P", None))


def test_written_zeros_are_no_constant():
    def function(t, x):
        h = jnp.zeros((5, 6)).at[jnp.array([1, 3])].set(jnp.tanh(x[:2] @ t["w"]))
        return (jnp.tanh(h @ t["u"]) * h) @ t["v"]

    params = random_tree(w=(3, 6), u=(6, 6), v=(6, 2))
    check(function, params, [X], [[o] for o in OTHERS], w=(None, "P"), u=("P", "P"), v=("P", None))


@pytest.mark.parametrize("eye", [lambda: jnp.eye(6), lambda: np.eye(6, dtype=np.float32) * 2])
def test_an_identity_matrix_ties_what_it_multiplies_to_itself(eye):
    def function(t, x):
        matrix = eye()
        h = jnp.tanh(x @ t["a"]) @ matrix
        return (jnp.tanh(h @ t["b"]) @ matrix) @ t["c"]

    params = random_tree(a=(3, 6), b=(6, 6), c=(6, 2))
    check(function, params, [X], [[o] for o in OTHERS], a=(None, "P"), b=("P", "Q"), c=("Q", None))


def test_units_with_equal_rows_of_a_mask_move_among_themselves():
    """MADE: a unit of degree d sees the inputs up to d; here three units have degree 1 and two degree 2."""
    degrees, inputs = np.array([1, 1, 1, 2, 2]), np.array([1, 2, 3])
    into = jnp.asarray(inputs[:, None] <= degrees[None], jnp.float32)
    out = jnp.asarray(degrees[:, None] < inputs[None], jnp.float32)

    def function(t, x):
        return jnp.tanh(x @ (t["w"] * into) + t["b"][None]) @ (t["v"] * out)

    axis = Axis.concatenate(Axis.product(("P", 3)), Axis.product(("Q", 2)))
    params = random_tree(w=(3, 5), b=(5,), v=(5, 3))
    check(function, params, [X], [[o] for o in OTHERS], w=(None, axis), b=(axis,), v=(axis, None))


# --- ties that data make ------------------------------------------------------------------------------------


def routed(t, logits, x):
    best, which = lax.top_k(logits, 2)
    gates = jnp.einsum("bk,bke->be", jax.nn.softmax(best), jax.nn.one_hot(which, 4))
    return jnp.einsum("be,bi,eio->bo", gates, x, t["experts"]) + gates @ t["bias"]


ROUTER = {"r": (3, 4), "b": (1, 4), "experts": (4, 3, 2), "bias": (4, 2), "mix": (3, 3)}
HIDDEN = {"h": (3, 5), "hb": (1, 5), "hr": (5, 4)}


def hidden(t, x):
    return x @ t["h"] + t["hb"]


def at(m, value):
    """Return a number for each row: the value where the mask m is zero, else 0."""
    return ((1.0 - m) * value)[:, None]


TIED = {
    "no bias": lambda t, x, m: x @ t["r"],
    "masked": lambda t, x, m: (x @ t["r"] + t["b"]) * m[:, None],
    "masked by comparison": lambda t, x, m: (x @ t["r"] + t["b"]) * (m > 0)[:, None],
    "divided": lambda t, x, m: (x @ t["r"] + t["b"]) / jnp.exp(at(m, 1e9)),
    "far away": lambda t, x, m: x @ t["r"] + t["b"] + at(m, -1e9),
    "where": lambda t, x, m: jnp.where(m[:, None] > 0, x @ t["r"] + t["b"], -1e9),
    "minimum": lambda t, x, m: jnp.minimum(x @ t["r"] + t["b"], at(1 - m, 100.0)),
    "clipped": lambda t, x, m: jnp.clip(x @ t["r"] + t["b"], -m[:, None], m[:, None]),
    "sign": lambda t, x, m: jnp.sign(x @ t["r"] + t["b"]),
    "rounded in two steps": lambda t, x, m: (y := x @ t["r"] + t["b"]) + lax.stop_gradient(jnp.round(y) - y),
    "integers": lambda t, x, m: (x @ t["r"] + t["b"]).astype(int).astype(jnp.float32),
    "few digits": lambda t, x, m: (
        x.astype(jnp.bfloat16) @ t["r"].astype(jnp.bfloat16) + t["b"].astype(jnp.bfloat16)
    ).astype(jnp.float32),
    "one-hot": lambda t, x, m: (x @ t["r"] + t["b"]) * jax.nn.one_hot(m.astype(int), 4),
    "masked before": lambda t, x, m: (hidden(t, x) * m[:, None]) @ t["hr"],
    "dead units": lambda t, x, m: jax.nn.relu(hidden(t, x)) @ t["hr"],
    "power": lambda t, x, m: jnp.exp(x @ t["r"] + t["b"]) ** m[:, None],
    "overwritten": lambda t, x, m: (x @ t["r"] + t["b"]).at[m.astype(int)].set(0.0),
    "logarithm of a mask": lambda t, x, m: x @ t["r"] + t["b"] + jnp.log(m)[:, None],
    "in a loop": lambda t, x, m: lax.fori_loop(0, 2, lambda _, h: h * m[:, None], hidden(t, x)) @ t["hr"],
}


@pytest.mark.parametrize("name", TIED)
def test_experts_stay_where_data_can_make_their_logits_tie(name):
    def function(t, x, m):
        return routed(t, TIED[name](t, x, m), x)

    params = random_tree(**ROUTER, **HIDDEN)
    example = X, jnp.ones(5)
    spec = infer_spec(function, params, *example)
    assert spec.table["experts"] == (Axis.whole(None),) * 3
    assert {TIES, "positions along it are computed with"} & reasons(spec)


FREE = {
    "bias": lambda t, x, m: x @ t["r"] + t["b"],
    "hidden": lambda t, x, m: hidden(t, x) @ t["hr"],
    "tanh": lambda t, x, m: jnp.tanh(hidden(t, x)) @ t["hr"],
    "softmax": lambda t, x, m: jax.nn.softmax(x @ t["r"] + t["b"]),
    "sigmoid": lambda t, x, m: jax.nn.sigmoid(x @ t["r"] + t["b"]),
    "temperature": lambda t, x, m: (x @ t["r"] + t["b"]) * jnp.exp(t["b"][:, :1]) / 0.7,
    "masked before the bias": lambda t, x, m: (hidden(t, x) * m[:, None]) @ t["hr"] + t["b"],
    "dead units and a bias": lambda t, x, m: jax.nn.relu(hidden(t, x)) @ t["hr"] + t["b"],
    "residual": lambda t, x, m: (hidden(t, x) + jnp.tanh(hidden(t, x)) @ t["hr"] @ t["hr"].T) @ t["hr"],
    "norm": lambda t, x, m: (
        ((h := hidden(t, x)) * lax.rsqrt((h**2).mean(-1, keepdims=True) + 1e-6) * t["hb"]) @ t["hr"]
    ),
    "masked a little": lambda t, x, m: x @ t["r"] + t["b"] + jnp.tanh(at(m, 5.0)),
    "loop": lambda t, x, m: (
        lax.fori_loop(0, 2, lambda _, h: h + jnp.tanh(h) @ t["hr"] @ t["hr"].T, hidden(t, x)) @ t["hr"]
    ),
}


@pytest.mark.parametrize("name", FREE)
def test_experts_move_where_their_logits_differ_for_every_input(name):
    def function(t, x, m):
        return routed(t, FREE[name](t, x, m), x)

    params = random_tree(**ROUTER, **HIDDEN)
    spec = infer_spec(function, params, X, jnp.ones(5))
    assert spec.table["experts"][0].groups
    for x in (X, *OTHERS):
        for m in (jnp.ones(5), jnp.array([1.0, 0.0, 1.0, 0.0, 0.5])):
            verify_spec(spec, function, params, x, m, trials=1)
