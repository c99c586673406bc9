"""What `PermutationSpec.explain` says beyond the rows: ties, and the share of units that move."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.axis import Axis
from rebasin.errors import SpecMismatchError
from rebasin.models import ViT

X = jnp.ones((5, 3))


def ties(spec):
    return [line.removeprefix("tied: ") for line in spec.explain().splitlines() if line.startswith("tied: ")]


def test_a_chain_has_no_ties():
    """A group that leads out of one layer and into the next is no tie."""
    table = {
        "Dense_0/kernel": (None, "P0"),
        "Dense_0/bias": ("P0",),
        "Dense_1/kernel": ("P0", "P1"),
        "Dense_1/bias": ("P1",),
        "Dense_2/kernel": ("P1", None),
    }
    assert ties(PermutationSpec.from_axes(table)) == []


def test_layers_with_one_permutation_are_named():
    """Heads of layers 0, 1, 2 and 5 are tied, those of layer 3 are not."""
    table = {f"layers/{i}/heads": ("H", None) for i in (0, 1, 2, 5)}
    table |= {f"layers/{i}/out_{i}": (None, "H") for i in (0, 1)}
    table |= {"layers/3/heads": ("H3", None)}
    assert ties(PermutationSpec.from_axes(table)) == ["H is one permutation in all of layers/{0-2,5}"]


def test_a_residual_stream_and_tied_layers_of_two_names():
    table = {"embed": (None, "R")}
    for i in range(3):
        table |= {f"up_{i}/kernel": ("R", f"P{i}"), f"down_{i}/kernel": (f"P{i}", "R")}
    assert ties(PermutationSpec.from_axes(table)) == [
        "R is one permutation in all of up_{0-2}, down_{0-2}",
    ]


def test_parts_and_axes_of_one_leaf():
    part = Axis.product(("D", 4))
    spec = PermutationSpec.from_axes({"qkv": (None, Axis.concatenate(part, part, part)), "u": ("P", "P")})
    assert ties(spec) == ["D is one permutation of 3 parts of qkv", "P is one permutation of 2 axes of u"]


def test_dimensions_that_are_the_same_in_all_heads():
    """Unless the heads index them; then each head has its own."""
    table = {"q": (None, Axis.product(("H", 2), ("D", 4))), "k": (None, Axis.product(3, ("E", 4)))}
    assert ties(PermutationSpec.from_axes(table)) == [
        "H is the same for all positions of D in q",
        "D is the same for all positions of H in q",
        "E is the same for all positions of the factor of 3 in k",
    ]
    assert ties(PermutationSpec.from_axes({"q": table["q"]}, indexed={"D": ["H"]})) == []


def test_inference_names_the_residual_stream_of_a_transformer_and_nothing_else():
    model = ViT(width=8, num_heads=2, depth=2)
    x = jnp.zeros((2, 4, 4, 1))
    params = jax.eval_shape(model.init, jax.random.key(0), x)
    spec = rebasin.infer_spec(model.apply, params, x)
    stream = spec.table["params/embed/kernel"][3].groups[0]
    (tie,) = ties(spec)
    assert tie.startswith(f"{stream} is one permutation in all of params/")
    assert "params/attention_{0-1}" in tie


def two_attentions(mask):
    """Two layers of attention without projections but those of the heads; `mask` is a mask for each layer."""

    def apply_fn(t, x):
        for i in range(2):
            q, k, v = (jnp.einsum("tc,chd->htd", x, t[f"{name}_{i}"]) for name in "qkv")
            y = jax.nn.softmax(jnp.einsum("htd,hsd->hts", q, k) * mask(t, i)[:, None, None]) @ v
            x = jnp.einsum("htd,hdc->tc", y, t[f"o_{i}"])
        return x

    shapes = {"q": (5, 3, 4), "k": (5, 3, 4), "v": (5, 3, 4), "o": (3, 4, 5)}
    tree = {f"{name}_{i}": jnp.ones(s) for name, s in shapes.items() for i in range(2)}
    return apply_fn, tree


def test_heads_that_a_shared_leaf_ties_are_named():
    apply_fn, tree = two_attentions(lambda t, i: t["mask"])
    spec = rebasin.infer_spec(apply_fn, tree | {"mask": jnp.ones(3)}, jnp.ones((6, 5)))
    group = spec.table["mask"][0].groups[0]
    places = "k_{0-1}, q_{0-1}, v_{0-1}, o_{0-1}"
    (tie,) = [tie for tie in ties(spec) if tie.startswith(f"{group} is")]
    assert sorted(tie.removeprefix(f"{group} is one permutation in all of ").split(", ")) == sorted(
        places.split(", ")
    )


def test_heads_of_layers_with_a_leaf_each_are_not_tied():
    apply_fn, tree = two_attentions(lambda t, i: t[f"mask_{i}"])
    tree = tree | {"mask_0": jnp.ones(3), "mask_1": jnp.ones(3)}
    assert ties(rebasin.infer_spec(apply_fn, tree, jnp.ones((6, 5)))) == []


def test_units_are_counted_on_every_axis_but_those_of_inputs_and_outputs():
    """Kernels [3, 8] and [8, 2]: eight units on each hidden axis; the pinned bias has 8 of 40."""
    spec = rebasin.infer_spec(
        lambda t, x: (jnp.sin(x @ t["w"]) * jnp.cumsum(t["a"])[None] @ t["u"]) @ t["v"],
        {"w": jnp.ones((3, 8)), "a": jnp.ones(8), "u": jnp.ones((8, 6)), "v": jnp.ones((6, 2))},
        jnp.ones((5, 3)),
    )
    shapes = {"w": np.ones((3, 8)), "a": np.ones(8), "u": np.ones((8, 6)), "v": np.ones((6, 2))}
    # The cumulative sum pins 8 units on w, a and u; 6 on u and v move.
    shares = spec.unit_shares(shapes)
    assert (shares.moving, shares.partly, shares.staying) == pytest.approx((12 / 36, 0, 24 / 36))
    assert spec.explain(shapes).splitlines()[0] == "33 % of the units move, 67 % stay put"


def test_units_of_a_product_whose_heads_stay_move_in_part():
    spec = PermutationSpec.from_axes(
        {"q": ("R", Axis.product(2, ("D", 4))), "o": (Axis.product(("H", 2), ("E", 4)), "R")},
        indexed={"E": ["H"]},
    )
    shares = spec.unit_shares({"q": np.ones((16, 8)), "o": np.ones((8, 16))})
    assert (shares.moving, shares.partly, shares.staying) == pytest.approx((40 / 48, 8 / 48, 0))
    assert str(shares) == "83 % of the units move, 17 % in part, 0 % stay put"


def convolution(t, x):
    names = ("NHWC", "HWIO", "NHWC")
    h = jax.lax.conv_general_dilated(x, t["w"], (1, 1), "SAME", dimension_numbers=names)
    return jnp.tanh(h).mean((1, 2)) @ t["v"]


def stacked_layers(t, x):
    def layer(h, w):
        return h + jnp.tanh(h @ w["u"]) @ w["d"], None

    return jax.lax.scan(layer, x @ t["e"], t["layers"])[0] @ t["v"]


def test_windows_of_convolutions_and_stacked_layers_are_no_units():
    tree = {"w": jnp.ones((3, 3, 2, 8)), "v": jnp.ones((8, 2))}
    spec = rebasin.infer_spec(convolution, tree, jnp.ones((2, 5, 5, 2)))
    assert spec.unit_shares(tree) == (1, 0, 0)
    tree = {"e": jnp.ones((3, 6)), "layers": {"u": jnp.ones((4, 6, 5)), "d": jnp.ones((4, 5, 6))}}
    tree["v"] = jnp.ones((6, 2))
    spec = rebasin.infer_spec(stacked_layers, tree, X)
    assert spec.fixed
    assert spec.unit_shares(tree) == (1, 0, 0)


def test_a_network_without_hidden_units_has_no_shares():
    spec = rebasin.infer_spec(lambda t, x: x @ t["w"], {"w": jnp.ones((3, 2))}, jnp.ones((5, 3)))
    assert spec.unit_shares({"w": np.ones((3, 2))}) == (0, 0, 0)


def test_units_of_another_tree_are_refused():
    with pytest.raises(SpecMismatchError, match="w: shape"):
        PermutationSpec.from_axes({"w": ("P", None)}).unit_shares({"w": np.ones(3)})


def test_roles_of_leaves_that_are_no_weights_are_told():
    tree = {"bn.running_mean": np.ones(3), "bn.weight": np.ones(3), "mask": np.ones(3), "step": 3}
    spec = PermutationSpec.from_axes({path: (None,) * np.ndim(leaf) for path, leaf in tree.items()})
    lines = spec.explain(tree, roles={"mask": "constant"}).splitlines()
    first = lines.index("neither matched nor averaged, role statistic:")
    assert lines[first:] == [
        "neither matched nor averaged, role statistic:",
        "  bn.running_mean",
        "neither matched nor averaged, role constant:",
        "  mask",
        "neither matched nor averaged, role counter:",
        "  step",
    ]
    assert "role" not in spec.explain()
