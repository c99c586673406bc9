"""Numeric verification: a sound spec passes, every broken one is caught and named."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.errors import SpecMismatchError, VerificationError

X = jnp.asarray(np.random.default_rng(0).normal(size=(5, 3)), jnp.float32)
TREE = {
    "Dense_0": {"kernel": jnp.ones((3, 8)), "bias": jnp.zeros(8)},
    "Norm_0": {"scale": jnp.ones(8)},
    "Dense_1": {"kernel": jnp.ones((8, 6)), "bias": jnp.zeros(6)},
    "Dense_2": {"kernel": jnp.ones((6, 2))},
}
TABLE = {
    "Dense_0/kernel": (None, "P0"),
    "Dense_0/bias": ("P0",),
    "Norm_0/scale": ("P0",),
    "Dense_1/kernel": ("P0", "P1"),
    "Dense_1/bias": ("P1",),
    "Dense_2/kernel": ("P1", None),
}


def apply(tree, x):
    h = (
        jnp.tanh(x @ tree["Dense_0"]["kernel"] + tree["Dense_0"]["bias"][None])
        * tree["Norm_0"]["scale"][None]
    )
    return jnp.tanh(h @ tree["Dense_1"]["kernel"] + tree["Dense_1"]["bias"][None]) @ tree["Dense_2"]["kernel"]


def test_a_sound_spec_passes_and_needs_no_randomness_in_the_leaves():
    rebasin.verify_spec(PermutationSpec.from_axes(TABLE), apply, TREE, X)


@pytest.mark.parametrize("path", list(TABLE))
def test_every_axis_left_out_is_caught_and_names_its_group(path):
    """Each axis in turn; the leaves are constant or zero, which would hide all of them without the redraw."""
    for i, group in enumerate(TABLE[path]):
        if group is None:
            continue
        broken = [None if j == i else g for j, g in enumerate(TABLE[path])]
        with pytest.raises(VerificationError) as info:
            rebasin.verify_spec(PermutationSpec.from_axes(TABLE | {path: broken}), apply, TREE, X)
        named = [line.split(":")[0].strip() for line in str(info.value).splitlines()[1:]]
        assert named == [group]


def test_the_message_tells_group_size_and_leaves():
    spec = PermutationSpec.from_axes(TABLE | {"Dense_0/bias": (None,)})
    message = r"P0: outputs change by \d\.\de-0\d relative to .* \(tolerance 2e-11\); it moves Dense_0/kernel"
    with pytest.raises(VerificationError, match=message):
        rebasin.verify_spec(spec, apply, TREE, X)


def test_inputs_that_must_not_move():
    with pytest.raises(VerificationError, match="P_in"):
        rebasin.verify_spec(
            PermutationSpec.from_axes(TABLE | {"Dense_0/kernel": ("P_in", "P0")}), apply, TREE, X
        )


def test_leaves_that_cannot_be_negative_stay_positive():
    spec = PermutationSpec.from_axes({"w": (None, "P"), "variance": ("P",), "v": ("P", None)})
    tree = {"w": jnp.ones((3, 8)), "variance": jnp.ones(8), "v": jnp.ones((8, 2))}
    rebasin.verify_spec(spec, lambda t, x: x @ t["w"] / jnp.sqrt(t["variance"])[None] @ t["v"], tree, X)


def test_outputs_that_are_not_finite_prove_nothing():
    spec = PermutationSpec.from_axes({"w": (None, "P")})
    with pytest.raises(VerificationError, match="the outputs are not finite for random weights"):
        rebasin.verify_spec(
            spec, lambda t, x: jnp.log(-jnp.abs(x @ t["w"])).sum(1), {"w": jnp.ones((3, 4))}, X
        )


def test_tolerance_follows_the_narrowest_type_in_the_program():
    """A model that computes in bfloat16 is not accused of its rounding."""
    spec = PermutationSpec.from_axes({"w": (None, "P"), "v": ("P", None)})
    tree = {"w": jnp.ones((3, 64)), "v": jnp.ones((64, 2))}

    @jax.jit
    def half(t, x):
        return (x @ t["w"]).astype(jnp.bfloat16).astype(jnp.float32) @ t["v"].astype(jnp.bfloat16).astype(
            jnp.float32
        )

    rebasin.verify_spec(spec, half, tree, X)


def test_another_tree_is_refused():
    with pytest.raises(SpecMismatchError, match="the spec does not fit params"):
        rebasin.verify_spec(PermutationSpec.from_axes(TABLE), apply, TREE | {"extra": jnp.ones(1)}, X)
    assert not jax.config.jax_enable_x64


def test_a_function_that_insists_on_its_types_is_run_in_them():
    """A loop whose carry starts as float32 cannot be traced with wider weights."""
    spec = PermutationSpec.from_axes({"w": (None, "P"), "u": ("P", "P"), "v": ("P", None)})
    rng = np.random.default_rng(1)
    tree = {
        name: jnp.asarray(rng.normal(size=s) / 3, jnp.float32)
        for name, s in zip("wuv", [(3, 8), (8, 8), (8, 2)], strict=True)
    }

    def recur(t, x):
        start = jnp.zeros((5, 8), jnp.float32)
        return jax.lax.fori_loop(0, 3, lambda _, h: jnp.tanh(x @ t["w"] + h @ t["u"]), start) @ t["v"]

    rebasin.verify_spec(spec, recur, tree, X)
    broken = PermutationSpec.from_axes({"w": (None, "P"), "u": ("P", None), "v": ("P", None)})
    with pytest.raises(VerificationError, match=r"P: outputs change by .* \(tolerance 1e-02\)"):
        rebasin.verify_spec(broken, recur, tree, X)
