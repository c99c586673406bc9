"""Specs of the project's models against git-re-basin's published tables, written out by hand."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import rebasin
from rebasin import PermutationSpec
from rebasin.errors import VerificationError
from rebasin.models import build_model


def vgg16_table():
    """``vgg16_permutation_spec`` of git-re-basin: a group for each convolution and hidden Dense layer."""
    table = {"Conv_0/kernel": (None, None, None, "P_Conv_0")}
    table |= {f"Conv_{i}/kernel": (None, None, f"P_Conv_{i - 1}", f"P_Conv_{i}") for i in range(1, 13)}
    for i in range(13):
        for leaf in (f"Conv_{i}/bias", f"LayerNorm_{i}/scale", f"LayerNorm_{i}/bias"):
            table[leaf] = (f"P_Conv_{i}",)
    return table | {
        "Dense_0/kernel": ("P_Conv_12", "P_Dense_0"),
        "Dense_0/bias": ("P_Dense_0",),
        "Dense_1/kernel": ("P_Dense_0", "P_Dense_1"),
        "Dense_1/bias": ("P_Dense_1",),
        "Dense_2/kernel": ("P_Dense_1", None),
        "Dense_2/bias": (None,),
    }


def resnet20_table():
    """``resnet20_permutation_spec`` of git-re-basin: a group for each stage and one inside each block."""
    table = {"conv1/kernel": (None, None, None, "P_bg0"), "norm1/scale": ("P_bg0",), "norm1/bias": ("P_bg0",)}
    for stage in range(3):
        for block in range(3):
            name, inner, out = (
                f"blockgroups_{stage}/blocks_{block}",
                f"P_{stage}_{block}_inner",
                f"P_bg{stage}",
            )
            into = f"P_bg{stage - 1}" if stage > 0 and block == 0 else out
            table |= {
                f"{name}/conv1/kernel": (None, None, into, inner),
                f"{name}/norm1/scale": (inner,),
                f"{name}/norm1/bias": (inner,),
                f"{name}/conv2/kernel": (None, None, inner, out),
                f"{name}/norm2/scale": (out,),
                f"{name}/norm2/bias": (out,),
            }
            if into != out:
                table |= {
                    f"{name}/shortcut/layers_0/kernel": (None, None, into, out),
                    f"{name}/shortcut/layers_1/scale": (out,),
                    f"{name}/shortcut/layers_1/bias": (out,),
                }
    return table | {"dense/kernel": ("P_bg2", None), "dense/bias": (None,)}


def mlp_table():
    """Three hidden layers."""
    sides = [None, "P_0", "P_1", "P_2", None]
    return {f"Dense_{i}/kernel": (sides[i], sides[i + 1]) for i in range(4)} | {
        f"Dense_{i}/bias": (sides[i + 1],) for i in range(4)
    }


# Each table with its number of groups and the width of the tests.
TABLES = {"mlp": (mlp_table, 3, 32), "vgg16": (vgg16_table, 15, 4), "resnet20": (resnet20_table, 12, 4)}


def axes_of(name):
    """A model's table by the paths of `variables`."""
    table = TABLES[name.removesuffix("_batchnorm")][0]()
    axes = {f"params/{path}": row for path, row in table.items()}
    if name.endswith("_batchnorm"):
        axes = {path.replace("LayerNorm", "BatchNorm"): row for path, row in axes.items()}
        scales = {path: row for path, row in axes.items() if path.endswith("/scale")}
        for path, row in scales.items():  # statistics move with the channels that they are of
            norm = path.removeprefix("params/").removesuffix("/scale")
            axes |= {f"batch_stats/{norm}/{leaf}": row for leaf in ("mean", "var")}
    return axes


@functools.cache
def setup(name, *, width=None):
    """Model, variables and images, at a width that keeps the test short.

    The variables are constant, since `verify_spec` draws them anew; initialising them compiles for seconds.
    """
    model = build_model(name, width=width or TABLES[name.removesuffix("_batchnorm")][2], num_classes=10)
    images = jax.random.normal(jax.random.key(1), (2, 32, 32, 3))
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    return model, jax.tree.map(lambda leaf: jnp.full(leaf.shape, 0.1, leaf.dtype), shapes), images


@pytest.mark.parametrize("name", TABLES)
def test_spec_is_git_re_basins_table(name):
    _, num_groups, _ = TABLES[name]
    model, variables, images = setup(name)
    spec = rebasin.infer_spec(model.apply, variables, images)
    assert spec.equivalent(PermutationSpec.from_axes(axes_of(name)))
    assert len(spec.groups) == num_groups
    spec.group_sizes(variables)


@pytest.mark.parametrize("name", ["vgg16", "resnet20", "vgg16_batchnorm", "resnet20_batchnorm"])
def test_spec_at_full_width_from_shapes_alone_in_a_second(name):
    model = build_model(name, width=64, num_classes=10)
    image = jax.ShapeDtypeStruct((1, 32, 32, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    spec = rebasin.infer_spec(model.apply, shapes, image)
    assert spec.equivalent(PermutationSpec.from_axes(axes_of(name)))
    largest = {"vgg16": 512, "resnet20": 256}[name.removesuffix("_batchnorm")]
    assert max(spec.group_sizes(shapes).values()) == largest


def test_vgg_on_larger_images_flattens_positions():
    model = build_model("vgg16", width=4, num_classes=10)
    image = jax.ShapeDtypeStruct((1, 64, 64, 3), jnp.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), image)
    spec = rebasin.infer_spec(model.apply, shapes, image)
    assert str(spec.table["params/Dense_0/kernel"][0]) == "4*params/Conv_12/kernel:32"


@pytest.mark.parametrize(
    "name",
    [
        *TABLES,
        *(pytest.param(f"{name}_batchnorm", marks=pytest.mark.slow) for name in ("vgg16", "resnet20")),
    ],
)
def test_permuting_keeps_the_outputs_to_float64_rounding(name):
    model, variables, images = setup(name)
    spec = rebasin.infer_spec(model.apply, variables, images)
    rebasin.verify_spec(spec, model.apply, variables, images, trials=1)


@pytest.mark.parametrize(
    ("name", "path", "group"),
    [
        ("mlp", "params/Dense_1/bias", "P_1"),
        ("vgg16", "params/LayerNorm_7/scale", "P_Conv_7"),
        ("vgg16", "params/Conv_3/bias", "P_Conv_3"),
        ("resnet20", "params/blockgroups_1/blocks_0/shortcut/layers_1/bias", "P_bg1"),
        ("resnet20", "params/blockgroups_2/blocks_1/norm1/scale", "P_2_1_inner"),
        pytest.param("vgg16_batchnorm", "batch_stats/BatchNorm_7/mean", "P_Conv_7", marks=pytest.mark.slow),
    ],
)
def test_a_table_with_one_axis_left_out_is_caught_and_names_the_group(name, path, group):
    model, variables, images = setup(name)
    table = axes_of(name) | {path: (None,)}
    with pytest.raises(VerificationError, match=rf"\n  {group}: outputs change by") as info:
        rebasin.verify_spec(PermutationSpec.from_axes(table), model.apply, variables, images, trials=1)
    assert len(re.findall("outputs change", str(info.value))) == 1


def gaussian(variables, seed):
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(size=leaf.shape), jnp.float32), variables)


def recovered(name, width, seed):
    """Whether weight matching undoes a random permutation of Gaussian weights exactly."""
    model, variables, images = setup(name, width=width)
    spec = rebasin.infer_spec(model.apply, variables, images)
    a = gaussian(variables, seed)
    b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=jax.random.key(seed)), a)
    match = rebasin.weight_matching(spec, a, b, key=jax.random.key(seed))
    moved = rebasin.permute(spec, match.permutation, b)
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(moved), strict=True))


@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
def test_planted_permutation_is_recovered_exactly(name):
    assert recovered(name, 8, seed=0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20", "vgg16"])
@pytest.mark.parametrize("width", [16, 64])
def test_planted_permutation_is_recovered_exactly_at_every_seed(name, width):
    seeds = range(20 if width < 64 else 5)
    assert [seed for seed in seeds if not recovered(name, width, seed)] == []
