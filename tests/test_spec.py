import dataclasses

import jax
import numpy as np
import pytest

from rebasin.axis import Axis, Factor
from rebasin.errors import SpecError, SpecMismatchError
from rebasin.spec import PermutationSpec, Pin

MLP = PermutationSpec.from_axes(
    {
        "Dense_0/kernel": (None, "P0"),
        "Dense_0/bias": ("P0",),
        "Dense_1/kernel": ("P0", "P1"),
        "Dense_1/bias": ("P1",),
        "Dense_2/kernel": ("P1", None),
        "Dense_2/bias": (None,),
    }
)


def mlp_tree(*widths):
    return {
        f"Dense_{i}": {"kernel": np.zeros((m, n)), "bias": np.zeros(n)}
        for i, (m, n) in enumerate(zip(widths, widths[1:], strict=False))
    }


def test_group_sizes_in_order_and_for_shapes_alone():
    tree = mlp_tree(3, 8, 5, 2)
    assert MLP.group_sizes(tree) == {"P0": 8, "P1": 5}
    assert MLP.group_sizes(jax.eval_shape(lambda: jax.tree.map(jax.numpy.asarray, tree))) == {
        "P0": 8,
        "P1": 5,
    }


def test_one_spec_serves_every_width():
    assert MLP.group_sizes(mlp_tree(7, 16, 9, 2)) == {"P0": 16, "P1": 9}


def test_every_mismatch_is_listed():
    tree = mlp_tree(3, 8, 5, 2)
    tree["Dense_1"] = {"kernel": np.zeros((6, 5)), "bias": np.zeros((5, 1))}
    tree["Dense_3"] = {"kernel": tree.pop("Dense_2")["kernel"]}
    with pytest.raises(SpecMismatchError) as info:
        MLP.group_sizes(tree, name="params_b")
    assert str(info.value).splitlines() == [
        "the spec does not fit params_b:",
        "  Dense_1/kernel axis 0: size 6, but group 'P0' has size 8 from Dense_0/kernel axis 1",
        "  Dense_1/bias: shape (5, 1), but the spec has 1 axes",
        "  Dense_2/kernel: no such leaf, but the spec says (P1, -)",
        "  Dense_2/bias: no such leaf, but the spec says (-)",
        "  Dense_3/kernel: shape (5, 2), not in the spec",
    ]


@pytest.mark.parametrize("size", [7, 9])
def test_a_group_has_one_size_and_the_first_counts(size):
    tree = mlp_tree(3, 8, 5, 2)
    tree["Dense_0"]["bias"] = np.zeros(size)
    with pytest.raises(
        SpecMismatchError, match=f"Dense_0/bias axis 0: size {size}, but group 'P0' has size 8"
    ):
        MLP.group_sizes(tree)


def test_sizes_of_segments_and_factors():
    axis = Axis.concatenate(Axis.product(4, ("P0", 8)), Axis.product(3), Axis.product(("P1", 5)))
    spec = PermutationSpec.from_axes({"w": (axis,), "v": ("P0", "P1")})
    assert spec.group_sizes({"w": np.zeros(40), "v": np.zeros((8, 5))}) == {"P0": 8, "P1": 5}
    with pytest.raises(
        SpecMismatchError, match=r"w axis 0: size 39, but the spec's 4\*P0:8 \+ 3 \+ P1:5 makes 40"
    ):
        spec.group_sizes({"w": np.zeros(39), "v": np.zeros((8, 5))})


def test_sizes_of_a_concatenation_inside_a_product():
    axis = Axis.product(("heads", 3), Axis.concatenate(Axis.product(2), Axis.product(("passed", 4))))
    spec = PermutationSpec.from_axes({"q": (None, axis)}, indexed={"passed": ["heads"]})
    assert spec.group_sizes({"q": np.zeros((5, 18))}) == {"heads": 3, "passed": (3, 4)}
    with pytest.raises(SpecMismatchError) as info:
        spec.group_sizes({"q": np.zeros((5, 24))})
    assert str(info.value).splitlines()[1:] == [
        "  q axis 1: size 24, but the spec's heads:3*(2 + passed:4) makes 18"
    ]


def test_indexed_groups_have_shapes():
    spec = PermutationSpec.from_axes(
        {"query": (None, "heads", "inner"), "stack": ("layer", None, "hidden")},
        indexed={"inner": ["heads"], "hidden": ["layer"]},
        fixed=["layer"],
    )
    tree = {"query": np.zeros((6, 4, 3)), "stack": np.zeros((12, 6, 7))}
    assert spec.group_sizes(tree) == {"heads": 4, "inner": (4, 3), "hidden": (12, 7)}
    assert spec.groups == ("heads", "inner", "hidden")


def test_an_axis_named_twice():
    groups = {"P0": [("w", 1), ("w", 1)], "P1": [("w", 1), ("w", 2), ("u", 0)]}
    with pytest.raises(SpecError) as info:
        PermutationSpec.from_groups(groups, {"w": np.zeros((3, 8))})
    assert str(info.value).splitlines() == [
        "the groups do not make a spec:",
        "  w axis 1: named by group 'P0' and by 'P0'",
        "  w axis 1: named by group 'P0' and by 'P1'",
        "  group 'P1': w has 2 axes, no axis 2",
        "  group 'P1': no leaf 'u' in the tree",
    ]


def test_a_spec_that_contradicts_itself():
    unsized = Axis(((Factor(None, "P0"), Factor(3, None)),))
    whole = Axis.whole("P0")
    with pytest.raises(SpecError) as info:
        PermutationSpec((("w", (unsized,)), ("w", (whole,)), ("v", (Axis(()),))), indexed=(("P0", ("P0",)),))
    assert str(info.value).splitlines() == [
        "the spec contradicts itself:",
        "  w axis 0: P0:None*3 has several parts, so each needs its size",
        "  w: named twice",
        "  v axis 0: no segments, or an empty one",
        "  group 'P0': is an outer group of itself",
    ]


def test_a_concatenation_inside_a_product_has_one_form():
    """Other forms would be unequal axes with the same meaning."""
    one, two = Axis.product(("B", 2)), Axis.concatenate(Axis.product(("A", 2)), Axis.product(3))
    factor = Factor(2, "H")
    with pytest.raises(SpecError) as info:
        PermutationSpec.from_axes(
            {"w": (Axis(((factor, one),)), Axis(((factor, two, factor),)), Axis(((two,),)))}
        )
    assert str(info.value).splitlines() == [
        "the spec contradicts itself:",
        "  w axis 0: (B) inside a product needs two segments or more, none of them empty",
        "  w axis 1: (A:2 + 3) must be the last of several factors; Axis.product distributes it",
        "  w axis 2: (A:2 + 3) must be the last of several factors; Axis.product distributes it",
    ]


def test_an_indexed_group_needs_its_index_in_every_segment():
    part = Axis.concatenate(Axis.product(("heads", 2), ("inner", 3)), Axis.product(("inner", 3)))
    PermutationSpec.from_axes({"w": (Axis.product(("layer", 4), part),)}, indexed={"inner": ["layer"]})
    with pytest.raises(SpecError, match=r"w: carries 'inner', but not its outer groups \['heads'\]"):
        PermutationSpec.from_axes({"w": (Axis.product(("layer", 4), part),)}, indexed={"inner": ["heads"]})


def test_an_indexed_group_needs_its_index_in_every_leaf():
    with pytest.raises(
        SpecError,
        match=r"v: carries 'inner', but not its outer groups \['heads'\] exactly once",
    ):
        PermutationSpec.from_axes({"w": ("heads", "inner"), "v": ("inner",)}, indexed={"inner": ["heads"]})


def test_outer_groups_name_their_own_outer_groups_first():
    axes = {"w": ("layer", "heads", "inner")}
    PermutationSpec.from_axes(axes, indexed={"heads": ["layer"], "inner": ["layer", "heads"]})
    message = r"group 'inner': outer groups must name \['layer'\] before 'heads', which they index"
    for outers in (["heads", "layer"], ["heads"]):
        with pytest.raises(SpecError, match=message):
            PermutationSpec.from_axes(axes, indexed={"heads": ["layer"], "inner": outers})


def test_equivalent_ignores_names_and_order_of_leaves_but_nothing_else():
    renamed = PermutationSpec(
        tuple(
            (path, tuple(axis.rename({"P0": "a", "P1": "b"}) for axis in axes))
            for path, axes in reversed(MLP.leaves)
        )
    )
    assert renamed != MLP
    assert renamed.equivalent(MLP)
    for path in ("Dense_0/bias", "Dense_1/kernel"):
        table = MLP.table
        other = PermutationSpec.from_axes(table | {path: tuple(Axis.whole(None) for _ in table[path])})
        assert not other.equivalent(MLP)
    tied = PermutationSpec(
        tuple(
            (path, tuple(axis.rename({"P0": "a", "P1": "a"}) for axis in axes)) for path, axes in MLP.leaves
        )
    )
    assert not tied.equivalent(MLP)


def test_hashable_static_and_compared_without_reasons():
    reasons = dataclasses.replace(MLP, pins=(Pin("Dense_2/bias", 0, "output"),))
    assert reasons == MLP
    assert hash(reasons) == hash(MLP)
    assert reasons.digest == MLP.digest
    sizes = jax.jit(lambda spec, x: x * spec.group_sizes({"b": x})["P0"], static_argnums=0)
    assert sizes(PermutationSpec.from_axes({"b": ("P0",)}), np.ones(3)).tolist() == [3, 3, 3]


def test_the_digest_tells_groups_that_move_from_those_that_do_not():
    table, indexed = {"w": ("heads", "inner")}, {"inner": ["heads"]}
    moving, fixed = (
        PermutationSpec.from_axes(table, indexed=indexed, fixed=names) for names in ((), ["heads"])
    )
    assert moving.digest != fixed.digest


def test_json_round_trip(tmp_path):
    spec = PermutationSpec.from_axes(
        {"a/'w'": ("heads", Axis.product(4, ("inner", 3))), "b": (), "c": (Axis.whole(None),)},
        indexed={"inner": ["heads"]},
    )
    spec = dataclasses.replace(spec, pins=(Pin("c", 0, "because"),))
    spec.save(tmp_path / "spec.json")
    loaded = PermutationSpec.load(tmp_path / "spec.json")
    assert loaded == spec
    assert loaded.pins == spec.pins
    assert loaded.digest == spec.digest


def test_json_of_a_concatenation_inside_a_product():
    axis = Axis.product(("H", 3), Axis.concatenate(Axis.product(2), Axis.product(("P", 4), 2)))
    spec = PermutationSpec.from_axes({"w": (None, axis)}, indexed={"P": ["H"]})
    loaded = PermutationSpec.from_json(spec.to_json())
    assert loaded == spec
    assert loaded.digest == spec.digest
    assert spec.to_json().splitlines()[:2] == [
        '{"format": "rebasin.spec", "version": 2, "leaves": [',
        '["w", [[[[null, null]]], [[[3, "H"], [[[2, null]], [[4, "P"], [2, null]]]]]]]',
    ]


def test_json_of_version_1_is_still_read_and_written():
    """The text that version 0.1 wrote; a saved permutation names its spec by the hash of this text."""
    text = (
        '{"format": "rebasin.spec", "version": 1, "leaves": [\n'
        '["w", [[[[null, null]]], [[[2, "H"], [3, "D"]], [[4, null]]]]]\n'
        '], "indexed": [["D", ["H"]]], "fixed": [], "pins": []}\n'
    )
    spec = PermutationSpec.from_json(text)
    axis = Axis.concatenate(Axis.product(("H", 2), ("D", 3)), Axis.product(4))
    assert spec == PermutationSpec.from_axes({"w": (None, axis)}, indexed={"D": ["H"]})
    assert spec.to_json() == text


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"format": "rebasin.spec", "version": 2}', '{"format": 1, "version": 1}']
)
def test_text_that_is_no_spec(tmp_path, text):
    path = tmp_path / "spec.json"
    path.write_text(text)
    with pytest.raises(
        SpecError, match=r"spec\.json: (not a saved spec|wanted format rebasin\.spec version 1)"
    ):
        PermutationSpec.load(path)


def test_printed_form():
    assert str(MLP).splitlines()[:3] == [
        "2 groups, 6 leaves",
        "  Dense_0/kernel: -, P0",
        "  Dense_0/bias: P0",
    ]
    assert MLP.explain().splitlines()[:4] == [
        "P0 moves",
        "  Dense_0/kernel axis 1: P0",
        "  Dense_0/bias axis 0: P0",
        "  Dense_1/kernel axis 0: P0",
    ]
    pins = [
        Pin("Dense_0/kernel", 0, "input"),
        Pin("Dense_2/bias", 0, "output"),
        Pin("v", 1, "f (a.py:1): this primitive has no rule"),
    ]
    assert dataclasses.replace(MLP, pins=tuple(pins)).explain().splitlines()[-7:] == [
        "stays put: input",
        "  Dense_0/kernel axis 0",
        "stays put: output",
        "  Dense_2/bias axis 0",
        "stays put: f (a.py:1): this primitive has no rule",
        "  v axis 1",
        "the primitive f has no rule, which pins 1 axis of 1 leaf; register_rule adds one",
    ]
