"""Zoos that are written in Equinox: equimo for images, pdequinox for fields, flowjax for densities."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.public_zoo.specimen import Specimen, draw, import_optional

__all__ = ["EQUIMO", "FLOWJAX", "PDEQUINOX"]


def _equinox(model: Any, call: Callable[..., Any], inputs: tuple[Any, ...], others: Any = None) -> Specimen:
    """Take the floating arrays of an Equinox module as its weights; `call` gets the module and the inputs."""
    eqx = import_optional("equinox")
    params, rest = eqx.partition(model, eqx.is_inexact_array)
    params = jax.tree.map(_widen, params)  # some modules ask for float32, which inputs may not have

    def function(params: Any, *inputs: Any) -> Any:
        return call(eqx.combine(params, rest), *inputs)

    return Specimen(function, params, inputs, others)


def _widen(leaf: jax.Array) -> jax.Array:
    """Convert a floating array to JAX's default precision, real or complex."""
    return leaf.astype(complex if jnp.iscomplexobj(leaf) else float)


def _equimo(name: str, sides: Sequence[int], *args: Any, **options: Any) -> Specimen:
    """Build a model of equimo that takes images of some sides; the second side is another length."""
    model = getattr(import_optional("equimo.models"), name)(
        *args, num_classes=5, key=jax.random.key(0), **options
    )

    def call(model: Any, images: Any) -> Any:
        return jax.vmap(lambda image: model(image, jax.random.key(0), inference=True))(images)

    inputs, *rest = ((draw(2, 3, side, side),) for side in sides)
    return _equinox(model, call, inputs, rest[0] if rest else None)


def _iformer() -> Specimen:
    """Build an IFormer with two stages of convolutions and two of attention."""
    block = {"kernel_size": 7, "expand_ratio": 2.0}
    attention = {"num_heads": 1, "head_dim_reduce_ratio": 2, "attn_ratio": 1.0, "ffn_ratio": 2.0}
    iformer = import_optional("equimo.models.iformer")
    base, variant = iformer._IFORMER_REGISTRY["iformer_t"]
    kwargs = [block, block, block, attention, block, attention]
    sizes = {"dims": [8, 12, 16, 16, 16, 24], "depths": [1] * 6, "module_kwargs": kwargs}
    return _equimo("IFormer", (64, 96), **(base | variant | sizes))


def _pdequinox(name: str, dimensions: int, sides: Sequence[int], **options: Any) -> Specimen:
    """Build an emulator of pdequinox with two channels of state."""
    arch = import_optional("pdequinox.arch")
    model = getattr(arch, name)(dimensions, 2, 2, key=jax.random.key(0), **options)
    inputs, *rest = ((draw(2, 2, *[side] * dimensions),) for side in sides)
    return _equinox(model, lambda model, x: jax.vmap(model)(x), inputs, rest[0] if rest else None)


def _flowjax(name: str, **options: Any) -> Specimen:
    """Build the log density of a normalizing flow of five variables."""
    base = import_optional("flowjax.distributions").Normal(jnp.zeros(5))
    flow = getattr(import_optional("flowjax.flows"), name)(
        jax.random.key(0), base_dist=base, flow_layers=2, **options
    )
    return _equinox(flow, lambda flow, x: flow.log_prob(x), (draw(4, 5),), (draw(7, 5),))


EQUIMO: dict[str, Callable[[], Specimen]] = {
    "VisionTransformer": partial(_equimo, "VisionTransformer", (16,), 16, 3, 24, 8, 3, [2]),
    "VisionTransformer, DINOv3": partial(
        _equimo,
        "VisionTransformer",
        (16,),
        *(16, 3, 24, 8, 3, [2]),
        reg_tokens=2,
        use_global_pos_embed=False,
        use_local_pos_embed=True,
        init_values=1e-2,
    ),
    "ConvNeXt": partial(_equimo, "ConvNeXt", (32, 64), 3, depths=[1, 1, 1, 1], dims=[8, 12, 16, 20]),
    "IFormer": _iformer,
    "LowFormer": partial(
        _equimo,
        "LowFormer",
        (64, 128),
        3,
        widths=[8, 16, 16, 32, 32],
        depths=[1, 1, 1, 1, 1],
        att_strides=[2, 2, 2, 2, 1],
        block_types=["conv", "conv", "conv", "attention", "attention"],
        attention_type="softmax",
    ),
    "ReduceFormer": partial(
        _equimo,
        "ReduceFormer",
        (64, 128),
        3,
        widths=[8, 16, 16, 32, 32],
        depths=[1, 1, 1, 1, 1],
        block_types=["conv", "conv", "conv", "attention", "attention"],
        head_dim=8,
    ),
    "MLLA": partial(_equimo, "Mlla", (32,), 32, 3, dim=12, depths=[1, 1, 2], num_heads=[1, 2, 3]),
    "VSSD": partial(
        _equimo, "Vssd", (64,), 64, 3, dim=16, d_state=6, depths=[1, 1, 1, 1], num_heads=[2, 2, 4, 4]
    ),
    "MobileNetV3": partial(
        _equimo,
        "MobileNetv3",
        (32, 48),
        3,
        [(8, 8, 3, 2, True, "relu"), (12, 20, 3, 2, False, "relu"), (12, 24, 5, 1, True, "hard_swish")],
        last_channels=28,
    ),
}

PDEQUINOX: dict[str, Callable[[], Specimen]] = {
    "ClassicFNO": partial(
        _pdequinox, "ClassicFNO", 1, (24, 32), hidden_channels=8, num_modes=5, num_blocks=2
    ),
    "ClassicFNO in two dimensions": partial(
        _pdequinox, "ClassicFNO", 2, (12, 16), hidden_channels=8, num_modes=3, num_blocks=2
    ),
    "ClassicResNet": partial(
        _pdequinox, "ClassicResNet", 2, (12, 16), hidden_channels=8, num_blocks=2, use_norm=True
    ),
    "ClassicUNet": partial(_pdequinox, "ClassicUNet", 2, (16, 24), hidden_channels=8, num_levels=2),
    "ModernUNet": partial(
        _pdequinox, "ModernUNet", 2, (16, 24), hidden_channels=8, num_levels=2, use_norm=True
    ),
    "DilatedResNet": partial(_pdequinox, "DilatedResNet", 1, (32, 48), hidden_channels=8, num_blocks=2),
}

FLOWJAX: dict[str, Callable[[], Specimen]] = {
    "masked autoregressive flow": partial(_flowjax, "masked_autoregressive_flow", nn_width=20, nn_depth=2),
    "coupling flow": partial(_flowjax, "coupling_flow", nn_width=12),
    "block neural autoregressive flow": partial(_flowjax, "block_neural_autoregressive_flow", nn_block_dim=4),
}
