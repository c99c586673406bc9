"""Models have the leaves they should, and their outputs do not depend on how convolutions are computed."""

import math
import subprocess
import sys

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from rebasin.errors import ConfigError
from rebasin.models import MLP, VGG16, BatchNorm, ResNet20, build_model, resnet, vgg

MLP_LEAVES = {
    "Dense_0/kernel": (192, 5),
    "Dense_0/bias": (5,),
    "Dense_1/kernel": (5, 6),
    "Dense_1/bias": (6,),
    "Dense_2/kernel": (6, 7),
    "Dense_2/bias": (7,),
    "Dense_3/kernel": (7, 10),
    "Dense_3/bias": (10,),
}

VGG_LEAVES = {
    "Conv_0/kernel": (3, 3, 3, 2),
    "Conv_0/bias": (2,),
    "Conv_1/kernel": (3, 3, 2, 2),
    "Conv_1/bias": (2,),
    "Conv_2/kernel": (3, 3, 2, 4),
    "Conv_2/bias": (4,),
    "Conv_3/kernel": (3, 3, 4, 4),
    "Conv_3/bias": (4,),
    "Conv_4/kernel": (3, 3, 4, 8),
    "Conv_4/bias": (8,),
    "Conv_5/kernel": (3, 3, 8, 8),
    "Conv_5/bias": (8,),
    "Conv_6/kernel": (3, 3, 8, 8),
    "Conv_6/bias": (8,),
    "Conv_7/kernel": (3, 3, 8, 16),
    "Conv_7/bias": (16,),
    "Conv_8/kernel": (3, 3, 16, 16),
    "Conv_8/bias": (16,),
    "Conv_9/kernel": (3, 3, 16, 16),
    "Conv_9/bias": (16,),
    "Conv_10/kernel": (3, 3, 16, 16),
    "Conv_10/bias": (16,),
    "Conv_11/kernel": (3, 3, 16, 16),
    "Conv_11/bias": (16,),
    "Conv_12/kernel": (3, 3, 16, 16),
    "Conv_12/bias": (16,),
    "LayerNorm_0/scale": (2,),
    "LayerNorm_0/bias": (2,),
    "LayerNorm_1/scale": (2,),
    "LayerNorm_1/bias": (2,),
    "LayerNorm_2/scale": (4,),
    "LayerNorm_2/bias": (4,),
    "LayerNorm_3/scale": (4,),
    "LayerNorm_3/bias": (4,),
    "LayerNorm_4/scale": (8,),
    "LayerNorm_4/bias": (8,),
    "LayerNorm_5/scale": (8,),
    "LayerNorm_5/bias": (8,),
    "LayerNorm_6/scale": (8,),
    "LayerNorm_6/bias": (8,),
    "LayerNorm_7/scale": (16,),
    "LayerNorm_7/bias": (16,),
    "LayerNorm_8/scale": (16,),
    "LayerNorm_8/bias": (16,),
    "LayerNorm_9/scale": (16,),
    "LayerNorm_9/bias": (16,),
    "LayerNorm_10/scale": (16,),
    "LayerNorm_10/bias": (16,),
    "LayerNorm_11/scale": (16,),
    "LayerNorm_11/bias": (16,),
    "LayerNorm_12/scale": (16,),
    "LayerNorm_12/bias": (16,),
    "Dense_0/kernel": (16, 16),
    "Dense_0/bias": (16,),
    "Dense_1/kernel": (16, 16),
    "Dense_1/bias": (16,),
    "Dense_2/kernel": (16, 10),
    "Dense_2/bias": (10,),
}

RESNET_LEAVES = {
    "conv1/kernel": (3, 3, 3, 2),
    "norm1/scale": (2,),
    "norm1/bias": (2,),
    "blockgroups_0/blocks_0/conv1/kernel": (3, 3, 2, 2),
    "blockgroups_0/blocks_0/norm1/scale": (2,),
    "blockgroups_0/blocks_0/norm1/bias": (2,),
    "blockgroups_0/blocks_0/conv2/kernel": (3, 3, 2, 2),
    "blockgroups_0/blocks_0/norm2/scale": (2,),
    "blockgroups_0/blocks_0/norm2/bias": (2,),
    "blockgroups_0/blocks_1/conv1/kernel": (3, 3, 2, 2),
    "blockgroups_0/blocks_1/norm1/scale": (2,),
    "blockgroups_0/blocks_1/norm1/bias": (2,),
    "blockgroups_0/blocks_1/conv2/kernel": (3, 3, 2, 2),
    "blockgroups_0/blocks_1/norm2/scale": (2,),
    "blockgroups_0/blocks_1/norm2/bias": (2,),
    "blockgroups_0/blocks_2/conv1/kernel": (3, 3, 2, 2),
    "blockgroups_0/blocks_2/norm1/scale": (2,),
    "blockgroups_0/blocks_2/norm1/bias": (2,),
    "blockgroups_0/blocks_2/conv2/kernel": (3, 3, 2, 2),
    "blockgroups_0/blocks_2/norm2/scale": (2,),
    "blockgroups_0/blocks_2/norm2/bias": (2,),
    "blockgroups_1/blocks_0/conv1/kernel": (3, 3, 2, 4),
    "blockgroups_1/blocks_0/norm1/scale": (4,),
    "blockgroups_1/blocks_0/norm1/bias": (4,),
    "blockgroups_1/blocks_0/conv2/kernel": (3, 3, 4, 4),
    "blockgroups_1/blocks_0/norm2/scale": (4,),
    "blockgroups_1/blocks_0/norm2/bias": (4,),
    "blockgroups_1/blocks_0/shortcut/layers_0/kernel": (1, 1, 2, 4),
    "blockgroups_1/blocks_0/shortcut/layers_1/scale": (4,),
    "blockgroups_1/blocks_0/shortcut/layers_1/bias": (4,),
    "blockgroups_1/blocks_1/conv1/kernel": (3, 3, 4, 4),
    "blockgroups_1/blocks_1/norm1/scale": (4,),
    "blockgroups_1/blocks_1/norm1/bias": (4,),
    "blockgroups_1/blocks_1/conv2/kernel": (3, 3, 4, 4),
    "blockgroups_1/blocks_1/norm2/scale": (4,),
    "blockgroups_1/blocks_1/norm2/bias": (4,),
    "blockgroups_1/blocks_2/conv1/kernel": (3, 3, 4, 4),
    "blockgroups_1/blocks_2/norm1/scale": (4,),
    "blockgroups_1/blocks_2/norm1/bias": (4,),
    "blockgroups_1/blocks_2/conv2/kernel": (3, 3, 4, 4),
    "blockgroups_1/blocks_2/norm2/scale": (4,),
    "blockgroups_1/blocks_2/norm2/bias": (4,),
    "blockgroups_2/blocks_0/conv1/kernel": (3, 3, 4, 8),
    "blockgroups_2/blocks_0/norm1/scale": (8,),
    "blockgroups_2/blocks_0/norm1/bias": (8,),
    "blockgroups_2/blocks_0/conv2/kernel": (3, 3, 8, 8),
    "blockgroups_2/blocks_0/norm2/scale": (8,),
    "blockgroups_2/blocks_0/norm2/bias": (8,),
    "blockgroups_2/blocks_0/shortcut/layers_0/kernel": (1, 1, 4, 8),
    "blockgroups_2/blocks_0/shortcut/layers_1/scale": (8,),
    "blockgroups_2/blocks_0/shortcut/layers_1/bias": (8,),
    "blockgroups_2/blocks_1/conv1/kernel": (3, 3, 8, 8),
    "blockgroups_2/blocks_1/norm1/scale": (8,),
    "blockgroups_2/blocks_1/norm1/bias": (8,),
    "blockgroups_2/blocks_1/conv2/kernel": (3, 3, 8, 8),
    "blockgroups_2/blocks_1/norm2/scale": (8,),
    "blockgroups_2/blocks_1/norm2/bias": (8,),
    "blockgroups_2/blocks_2/conv1/kernel": (3, 3, 8, 8),
    "blockgroups_2/blocks_2/norm1/scale": (8,),
    "blockgroups_2/blocks_2/norm1/bias": (8,),
    "blockgroups_2/blocks_2/conv2/kernel": (3, 3, 8, 8),
    "blockgroups_2/blocks_2/norm2/scale": (8,),
    "blockgroups_2/blocks_2/norm2/bias": (8,),
    "dense/kernel": (8, 10),
    "dense/bias": (10,),
}


def leaf_shapes(model, image):
    """The shapes of all parameters by name, found without computing anything."""
    shapes = collection_shapes(model, image)
    assert list(shapes) == ["params"]
    return shapes["params"]


def collection_shapes(model, image):
    variables = jax.eval_shape(model.init, jax.random.key(0), jax.ShapeDtypeStruct((1, *image), jnp.float32))
    return {
        collection: {
            jax.tree_util.keystr(path, simple=True, separator="/"): leaf.shape
            for path, leaf in jax.tree_util.tree_leaves_with_path(tree)
        }
        for collection, tree in variables.items()
    }


@pytest.mark.parametrize(
    ("model", "image", "expected"),
    [
        (MLP((5, 6, 7)), (8, 8, 3), MLP_LEAVES),
        (VGG16(width=2), (32, 32, 3), VGG_LEAVES),
        (ResNet20(width=2), (32, 32, 3), RESNET_LEAVES),
    ],
    ids=["mlp", "vgg16", "resnet20"],
)
def test_names_and_shapes_of_leaves(model, image, expected):
    assert leaf_shapes(model, image) == expected


@pytest.mark.parametrize(
    ("name", "layer_norm"), [("vgg16_batchnorm", VGG_LEAVES), ("resnet20_batchnorm", RESNET_LEAVES)]
)
def test_batch_norm_stands_where_layer_norm_stood_and_adds_its_statistics(name, layer_norm):
    shapes = collection_shapes(build_model(name, width=2, num_classes=10), (32, 32, 3))
    expected = {path.replace("LayerNorm", "BatchNorm"): shape for path, shape in layer_norm.items()}
    scales = {path: shape for path, shape in expected.items() if path.endswith("/scale")}
    statistics = {path.replace("scale", leaf): n for path, n in scales.items() for leaf in ("mean", "var")}
    assert shapes == {"params": expected, "batch_stats": statistics}


def test_batch_norm_trains_where_its_statistics_may_change():
    norm, images = BatchNorm(), 3 + 2 * jax.random.normal(jax.random.key(0), (4, 2, 2, 3))
    statistics = {"mean": jnp.array([1.0, 2.0, 3.0]), "var": jnp.array([4.0, 9.0, 16.0])}
    variables = {"params": {"scale": jnp.array([1.0, 2.0, -1.0]), "bias": jnp.arange(3.0)}}
    variables["batch_stats"] = statistics
    x = np.asarray(images, np.float64)
    mean, var = x.mean((0, 1, 2)), x.var((0, 1, 2))

    evaluated = norm.apply(variables, images)  # by the running statistics, and nothing else comes back
    expected = (x - [1, 2, 3]) / np.sqrt(np.array([4, 9, 16]) + 1e-5) * [1, 2, -1] + np.arange(3)
    np.testing.assert_allclose(evaluated, expected, rtol=1e-4, atol=1e-5)

    trained, updated = norm.apply(variables, images, mutable=["batch_stats"])
    expected = (x - mean) / np.sqrt(var + 1e-5) * [1, 2, -1] + np.arange(3)
    np.testing.assert_allclose(trained, expected, rtol=1e-4, atol=1e-4)
    new = updated["batch_stats"]
    np.testing.assert_allclose(new["mean"], 0.9 * np.array([1, 2, 3]) + 0.1 * mean, rtol=1e-5)
    np.testing.assert_allclose(new["var"], 0.9 * np.array([4, 9, 16]) + 0.1 * var, rtol=1e-4)


@pytest.mark.parametrize(
    ("model", "image", "expected"),
    [
        # 784·512 + 512 = 401,920; twice 512·512 + 512 = 262,656; 512·10 + 10 = 5,130.
        (MLP(), (28, 28, 1), 932_362),
        # Convolutions 9·in·out + out: 1,792 + 36,928 + 73,856 + 147,584 + 295,168 + 2·590,080 + 1,180,160
        # + 5·2,359,808 = 14,714,688. Norms 2·(2·64 + 2·128 + 3·256 + 6·512) = 8,448.
        # Dense 2·(512·512 + 512) + 512·10 + 10 = 530,442.
        (VGG16(), (32, 32, 3), 15_253_578),
        # Convolutions 9·in·out: 1,728 + 6·36,864 + (73,728 + 5·147,456) + (294,912 + 5·589,824) = 4,277,952.
        # Shortcuts 64·128 + 128·256 = 40,960. Norms 2·7·(64 + 128 + 256) = 6,272. Dense 256·10 + 10 = 2,570.
        (ResNet20(), (32, 32, 3), 4_327_754),
    ],
    ids=["mlp", "vgg16", "resnet20"],
)
def test_number_of_parameters_at_full_width(model, image, expected):
    assert sum(math.prod(shape) for shape in leaf_shapes(model, image).values()) == expected


@pytest.mark.parametrize("name", ["vgg16", "resnet20"])
def test_logits_do_not_depend_on_how_convolutions_are_computed(name, monkeypatch):
    model = build_model(name, width=2, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 32, 32, 3))
    variables = randomised(model, images)
    fast = jax.jit(model.apply)(variables, images)
    assert np.ptp(fast) > 0.1
    plain = lax.conv_general_dilated
    monkeypatch.setattr(vgg, "conv_general_dilated", plain)
    monkeypatch.setattr(resnet, "conv_general_dilated", plain)
    slow = jax.jit(lambda v, x: model.apply(v, x))(variables, images)
    # Rounding errors grow through some twenty layers, each of which normalises.
    chex.assert_trees_all_close(fast, slow, rtol=1e-3, atol=1e-4)


def randomised(model, images):
    """Variables with random leaves: zero biases and unit scales would hide a leaf that is not used."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), images)
    leaves, structure = jax.tree.flatten(shapes)
    rng = np.random.default_rng(0)
    scales = [math.sqrt(2 / math.prod(leaf.shape[:-1])) if leaf.ndim > 1 else 1.0 for leaf in leaves]
    arrays = [
        jnp.asarray(scale * rng.normal(size=leaf.shape), jnp.float32)
        for scale, leaf in zip(scales, leaves, strict=True)
    ]
    return jax.tree.unflatten(structure, arrays)


def test_vgg_pads_small_images_on_all_sides():
    images = jax.random.normal(jax.random.key(0), (2, 27, 40, 1))
    padded = vgg.pad_to(images, 32)
    assert padded.shape == (2, 32, 40, 1)
    np.testing.assert_array_equal(padded[:, 2:29], images)
    np.testing.assert_array_equal(padded[:, :2], 0)
    np.testing.assert_array_equal(padded[:, 29:], 0)


def test_vgg_takes_images_of_the_size_of_mnist():
    model = VGG16(width=1, num_classes=3)
    images = jax.random.normal(jax.random.key(0), (2, 28, 28, 1))
    logits = jax.jit(model.apply)(randomised(model, images), images)
    assert logits.shape == (2, 3)
    assert np.ptp(logits) > 0.01


@pytest.mark.parametrize(("extent", "flat"), [(32, 16), (64, 4 * 16)])
def test_vgg_flattens_what_five_pools_leave(extent, flat):
    assert leaf_shapes(VGG16(width=2), (extent, extent, 3))["Dense_0/kernel"] == (flat, 16)


def test_models_load_nothing_that_trains():
    code = (
        "import sys, rebasin.models; "
        "sys.exit(bool({'optax', 'orbax', 'tensorflow_datasets', 'rebasin.training'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("mlp", MLP((6, 6, 6), num_classes=4)),
        ("mlp_1", MLP((6,), num_classes=4)),
        ("mlp_2", MLP((6, 6), num_classes=4)),
        ("vgg16", VGG16(width=6, num_classes=4)),
        ("resnet20", ResNet20(width=6, num_classes=4)),
        ("vgg16_batchnorm", VGG16(width=6, num_classes=4, norm=BatchNorm)),
        ("resnet20_batchnorm", ResNet20(width=6, num_classes=4, norm=BatchNorm)),
    ],
)
def test_build_model(name, expected):
    assert build_model(name, width=6, num_classes=4) == expected


def test_an_unknown_model_is_an_error():
    with pytest.raises(ConfigError) as info:
        build_model("vgg11", width=6, num_classes=4)
    assert str(info.value) == (
        "no model is called 'vgg11'; "
        "the models are mlp, mlp_1, mlp_2, resnet20, resnet20_batchnorm, vgg16, vgg16_batchnorm, vit"
    )


@pytest.mark.parametrize("extent", [(4, 6), (5, 7)])
def test_max_pool_of_vgg_equals_that_of_flax(extent):
    x = jax.random.normal(jax.random.key(0), (2, *extent, 3))  # no two pixels are equal

    def weighted(pool):
        return lambda x: jnp.sum(jnp.sin(pool(x)))

    def flax_pool(x):
        return nn.max_pool(x, (2, 2), strides=(2, 2))

    np.testing.assert_array_equal(vgg.max_pool(x), flax_pool(x))
    ours, plain = (jax.grad(weighted(pool))(x) for pool in (vgg.max_pool, flax_pool))
    np.testing.assert_array_equal(ours, plain)
