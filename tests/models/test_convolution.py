"""The convolution equals XLA's own: values, gradients, transformations, and the forms it leaves to XLA."""

from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jax import lax

from rebasin.models import conv_general_dilated, convolution, cpu_convolution

CHANNELS_LAST = ("NHWC", "HWIO", "NHWC")

# Values are sums of at most 9 × 5 products, or 4 × 8 × 8 for the gradient of a kernel, of numbers of order 1.
# Summing in another order changes them by about √200 ε, which is 2e-6 in float32 and 3e-15 in float64, and
# sometimes by several times that.
TOLERANCE = {"float32": {"rtol": 1e-5, "atol": 2e-5}, "float64": {"rtol": 1e-12, "atol": 1e-12}}

# By name: image, kernel, stride and padding. Together they take every path of both gradients.
FORMS = {
    "fast form throughout": ((8, 8), (3, 3), 1, "SAME"),
    "as many pixels as the kernel": ((3, 3), (3, 3), 1, "SAME"),
    "fewer pixels than the kernel": ((2, 2), (3, 3), 1, "SAME"),
    "one pixel": ((1, 1), (3, 3), 1, "SAME"),
    "output smaller than the kernel": ((4, 4), (3, 3), 1, "VALID"),
    "odd extents": ((5, 7), (3, 3), 1, "SAME"),
    "strided": ((8, 8), (3, 3), 2, "SAME"),
    "strided, last column unseen": ((8, 6), (3, 3), 2, "VALID"),
    "strided, fewer pixels": ((2, 2), (3, 3), 2, "SAME"),
    "shortcut": ((8, 8), (1, 1), 2, "SAME"),
    "pointwise, padded": ((2, 2), (1, 1), 1, ((1, 1), (0, 2))),
    "flat kernel": ((4, 5), (1, 3), 1, "SAME"),
    "lower padding": ((4, 4), (2, 2), 1, "SAME_LOWER"),
    "lopsided padding": ((5, 5), (3, 3), 1, ((2, 0), (0, 1))),
    "wide padding, larger output": ((3, 3), (2, 2), 1, ((1, 1), (1, 1))),
    "padding beyond the kernel": ((4, 4), (2, 2), 1, ((3, 0), (0, 0))),
    "unequal strides": ((6, 5), (3, 2), (1, 2), ((1, 1), (1, 0))),
}


def operands(image, kernel, *, examples=4, channels=(5, 4), dtype="float32", seed=0):
    rng = np.random.default_rng(seed)
    images = rng.normal(size=(examples, *image, channels[0])).astype(dtype)
    kernels = rng.normal(size=(*kernel, *channels)).astype(dtype)
    return jnp.asarray(images), jnp.asarray(kernels)


def pair(value):
    return (value, value) if isinstance(value, int) else value


def values_and_gradients(convolve, images, kernels, stride, padding):
    """The output and both gradients, for a fixed cotangent without equal entries."""
    options = {"window_strides": pair(stride), "padding": padding, "dimension_numbers": CHANNELS_LAST}
    out, pullback = jax.vjp(partial(convolve, **options), images, kernels)
    return out, *pullback(cotangent_like(out))


def cotangent_like(out):
    return jnp.cos(jnp.arange(out.size, dtype=out.dtype)).reshape(out.shape)


def assert_equal_to_plain(images, kernels, stride, padding):
    @jax.jit
    def both(images, kernels):
        convolutions = conv_general_dilated, lax.conv_general_dilated
        return [values_and_gradients(f, images, kernels, stride, padding) for f in convolutions]

    ours, plain = both(images, kernels)
    chex.assert_trees_all_equal_shapes_and_dtypes(ours, plain)
    chex.assert_trees_all_close(ours, plain, **TOLERANCE[images.dtype.name])


@pytest.mark.parametrize("form", FORMS)
def test_values_and_gradients_equal_the_plain_convolution_in_float64(form):
    image, kernel, stride, padding = FORMS[form]
    with jax.enable_x64(True):
        assert_equal_to_plain(*operands(image, kernel, dtype="float64"), stride, padding)


@pytest.mark.parametrize("image", [(5, 6), (3, 12)])
@pytest.mark.parametrize("channels", [(3, 8), (16, 8), (12, 11)])
def test_blocks_of_pixels_and_parts_of_the_batch_equal_the_plain_convolution(image, channels):
    kernel, padding = ((3, 3), "SAME") if image != (3, 12) else ((2, 4), ((1, 0), (0, 3)))
    with jax.enable_x64(True):
        images, kernels = operands(image, kernel, examples=12, channels=channels, dtype="float64")
        assert_equal_to_plain(images, kernels, 1, padding)


@pytest.mark.parametrize(
    ("channels", "width", "expected"),
    [(3 * 8, 32, 4), (3 * 8, 6, 2), (8 * 8, 32, 2), (8 * 8, 7, 1), (8 * 16, 16, 2), (16 * 16, 32, 1)],
)
def test_pixels_are_taken_together_between_few_channels(channels, width, expected):
    assert cpu_convolution.pixels_in_block(channels, width) == expected


@pytest.mark.parametrize(
    ("n", "num_bytes", "expected"),
    [(128, 2**10, 64), (128, 2**15, 32), (128, 2**16, 16), (128, 2**24, 4), (127, 2**10, 127), (6, 2**10, 6)],
)
def test_a_part_of_the_batch_divides_it_and_fits_the_cache(n, num_bytes, expected):
    assert cpu_convolution.part_of_batch(n, num_bytes) == expected


extents = st.integers(1, 6)
zeros = st.tuples(st.integers(0, 3), st.integers(0, 3))


@settings(max_examples=8)
@given(
    image=st.tuples(extents, extents),
    kernel=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    stride=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    padding=st.one_of(st.sampled_from(["SAME", "VALID"]), st.tuples(zeros, zeros)),
    examples=st.integers(1, 4),
    channels=st.tuples(st.integers(1, 5), st.integers(1, 5)),
)
def test_any_window_equals_the_plain_convolution_in_float32(
    image, kernel, stride, padding, examples, channels
):
    images, kernels = operands(image, kernel, examples=examples, channels=channels)
    assert_equal_to_plain(images, kernels, stride, padding)


@pytest.mark.parametrize("form", ["fewer pixels than the kernel", "fast form throughout", "strided"])
def test_each_platform_branch_equals_the_plain_convolution_in_float32(form):
    # Compiled code takes only the CPU's branch on a CPU, so each branch is called directly.
    image, kernel, stride, padding = FORMS[form]
    images, kernels = operands(image, kernel)
    numeric = tuple(lax.padtype_to_pads(image, kernel, pair(stride), padding))
    window = cpu_convolution.Window(pair(stride), numeric, None)

    @jax.jit
    def branches(images, kernels):
        out, *gradients = values_and_gradients(lax.conv_general_dilated, images, kernels, stride, padding)
        forward = [f(images, kernels, window) for f in (cpu_convolution.convolve, cpu_convolution.plain)]
        pullbacks = cpu_convolution.gradients, convolution.plain_gradients
        backward = [f(images, kernels, cotangent_like(out), window) for f in pullbacks]
        return out, gradients, forward, backward

    out, gradients, forward, backward = branches(images, kernels)
    chex.assert_trees_all_close(forward, [out, out], **TOLERANCE["float32"])
    chex.assert_trees_all_close(backward, [tuple(gradients)] * 2, **TOLERANCE["float32"])


@pytest.mark.parametrize("platform", ["cpu", "cuda", "tpu"])
def test_one_trace_lowers_for_every_platform(platform):
    # 2×2 images are computed by matrix products on the CPU, and by XLA's convolution elsewhere.
    images, kernels = operands((2, 2), (3, 3))
    convolve = jax.jit(
        lambda x, k: conv_general_dilated(x, k, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST)
    )
    text = jax.export.export(convolve, platforms=[platform])(images, kernels).mlir_module()
    assert ("stablehlo.convolution" in text) == (platform != "cpu")


def test_a_scan_over_training_steps_equals_steps_of_the_plain_convolution():
    images, kernels = operands((4, 4), (3, 3), examples=6)
    batches = images.reshape(3, 2, *images.shape[1:])

    def loss(kernels, batch, convolve):
        out = convolve(batch, kernels, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST)
        return jnp.mean(jnp.tanh(out) ** 2)

    def step(kernels, batch):
        value, gradient = jax.value_and_grad(loss)(kernels, batch, conv_general_dilated)
        return kernels - gradient, value

    ours, losses = jax.jit(partial(lax.scan, step))(kernels, batches)
    for batch, expected in zip(batches, losses, strict=True):
        value, gradient = jax.value_and_grad(loss)(kernels, batch, lax.conv_general_dilated)
        np.testing.assert_allclose(value, expected, rtol=1e-5)
        kernels = kernels - gradient
    chex.assert_trees_all_close(ours, kernels, **TOLERANCE["float32"])


@pytest.mark.parametrize("image", [(2, 2), (4, 4)])
@pytest.mark.parametrize("axes", [(0, 0), (None, 0)])
def test_vmap_equals_a_loop(image, axes):
    trees = [operands(image, (3, 3), examples=2, seed=seed) for seed in range(2)]
    images, kernels = (jnp.stack(leaves) for leaves in zip(*trees, strict=True))
    ours, plain = (
        partial(values_and_gradients, convolve, stride=1, padding="SAME")
        for convolve in (conv_general_dilated, lax.conv_general_dilated)
    )
    images = images if axes[0] == 0 else images[0]
    actual = jax.jit(jax.vmap(ours, in_axes=axes))(images, kernels)
    looped = [plain(images[i] if axes[0] == 0 else images, kernels[i]) for i in range(2)]
    expected = tuple(jnp.stack(leaves) for leaves in zip(*looped, strict=True))
    chex.assert_trees_all_close(actual, expected, **TOLERANCE["float32"])


@pytest.mark.parametrize("image", [(2, 2), (4, 4)])
def test_hessian_vector_products_equal_those_of_the_plain_convolution(image):
    images, kernels = operands(image, (3, 3), examples=2)

    def product(convolve):
        def loss(kernels):
            out = convolve(images, kernels, (1, 1), "SAME", dimension_numbers=CHANNELS_LAST)
            return jnp.mean(jnp.tanh(out))

        return jax.jit(lambda k: jax.jvp(jax.grad(loss), (k,), (jnp.cos(k),))[1])(kernels)

    ours, plain = product(conv_general_dilated), product(lax.conv_general_dilated)
    chex.assert_trees_all_close(ours, plain, **TOLERANCE["float32"])


OTHER_FORMS = {
    "grouped": ((2, 4, 4, 6), (3, 3, 2, 6), {"feature_group_count": 3}),
    "batch groups": ((2, 4, 4, 3), (3, 3, 3, 4), {"batch_group_count": 2}),
    "dilated kernel": ((2, 6, 6, 3), (3, 3, 3, 4), {"rhs_dilation": (2, 2)}),
    "dilated image": ((2, 4, 4, 3), (3, 3, 3, 4), {"lhs_dilation": (2, 2), "padding": ((1, 1), (1, 1))}),
    "cropping": ((2, 6, 6, 3), (3, 3, 3, 4), {"padding": ((-1, 0), (0, -1))}),
    "channels first": ((2, 3, 4, 4), (4, 3, 3, 3), {"dimension_numbers": ("NCHW", "OIHW", "NCHW")}),
    "default layout": ((2, 3, 4, 4), (4, 3, 3, 3), {"dimension_numbers": None}),
    "one dimension": (
        (2, 6, 3),
        (3, 3, 4),
        {"dimension_numbers": ("NWC", "WIO", "NWC"), "window_strides": (1,)},
    ),
    "no output": ((2, 2, 2, 3), (3, 3, 3, 4), {"padding": "VALID"}),
    "no examples": ((0, 4, 4, 3), (3, 3, 3, 4), {}),
    "half precision": ((2, 2, 2, 3), (3, 3, 3, 4), {"dtype": "bfloat16"}),
    "integers": ((2, 2, 2, 3), (3, 3, 3, 4), {"dtype": "int32"}),
    "another output type": (
        (2, 2, 2, 3),
        (3, 3, 3, 4),
        {"dtype": "float16", "preferred_element_type": jnp.float32},
    ),
}


@pytest.mark.parametrize("form", OTHER_FORMS)
def test_other_forms_are_the_plain_convolution(form, monkeypatch):
    def refuse(*args):
        raise AssertionError("took the fast path")

    monkeypatch.setattr(convolution, "fast_convolution", refuse)
    image_shape, kernel_shape, options = OTHER_FORMS[form]
    options = {
        "window_strides": (1, 1),
        "padding": "SAME",
        "dimension_numbers": CHANNELS_LAST,
        **options,
    }
    dtype = options.pop("dtype", "float32")
    images = (jnp.arange(np.prod(image_shape)) % 7).reshape(image_shape).astype(dtype)
    kernels = (jnp.arange(np.prod(kernel_shape)) % 5).reshape(kernel_shape).astype(dtype)
    actual = conv_general_dilated(images, kernels, **options)
    expected = lax.conv_general_dilated(images, kernels, **options)
    chex.assert_trees_all_equal_shapes_and_dtypes(actual, expected)
    chex.assert_trees_all_equal(actual, expected)


def test_precision_reaches_every_product():
    images, kernels = operands((2, 2), (3, 3))
    convolve = partial(
        conv_general_dilated,
        window_strides=(1, 1),
        padding="SAME",
        dimension_numbers=CHANNELS_LAST,
        precision="highest",
    )

    def both(images, kernels):
        out, pullback = jax.vjp(convolve, images, kernels)
        return pullback(out)

    text = jax.jit(both).lower(images, kernels).as_text()
    products = [
        line for line in text.splitlines() if "dot_general" in line or "stablehlo.convolution" in line
    ]
    assert products
    assert all("HIGHEST" in line for line in products)


def test_forward_mode_is_refused():
    images, kernels = operands((2, 2), (3, 3))
    convolve = partial(
        conv_general_dilated, window_strides=(1, 1), padding="SAME", dimension_numbers=CHANNELS_LAST
    )
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(convolve, (images, kernels), (images, kernels))


def test_operands_that_do_not_fit_get_the_plain_error():
    images, kernels = operands((4, 4), (3, 3))
    options = {"window_strides": (1, 1), "padding": "SAME", "dimension_numbers": CHANNELS_LAST}
    with pytest.raises(ValueError) as plain:  # noqa: PT011
        lax.conv_general_dilated(images[..., 1:], kernels, **options)
    with pytest.raises(ValueError) as ours:  # noqa: PT011
        conv_general_dilated(images[..., 1:], kernels, **options)
    assert str(ours.value) == str(plain.value)
