"""Flax models of diffusers."""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from benchmarks.public_zoo.specimen import Specimen, draw, import_optional

__all__ = ["BUILDERS"]

_DIFFUSION = {
    "sample_size": 8,
    "block_out_channels": (32, 64),
    "layers_per_block": 1,
    "down_block_types": ("CrossAttnDownBlock2D", "DownBlock2D"),
    "attention_head_dim": 2,
    "cross_attention_dim": 16,
    "dtype": jnp.dtype("float64"),
}


def _latents(side: int, length: int) -> tuple[jax.Array, ...]:
    """Return a noisy image, its time, and the states of a text."""
    return draw(2, 4, side, side), jnp.array([3, 17]), draw(2, length, 16)


def _diffusion_unet(**options: Any) -> Specimen:
    module = import_optional("diffusers.models.unets.unet_2d_condition_flax")
    network = module.FlaxUNet2DConditionModel(
        **_DIFFUSION, up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"), **options
    )
    params = jax.jit(network.init_weights)(jax.random.PRNGKey(0))

    def function(params: Any, *inputs: Any) -> Any:
        return network.apply({"params": params}, *inputs).sample

    return Specimen(function, params, _latents(8, 5), _latents(12, 7))


def _diffusion_control() -> Specimen:
    module = import_optional("diffusers.models.controlnets.controlnet_flax")
    network = module.FlaxControlNetModel(**_DIFFUSION, conditioning_embedding_out_channels=(4, 6, 8, 12))
    params = jax.jit(network.init_weights)(jax.random.PRNGKey(0))

    def function(params: Any, *inputs: Any) -> Any:
        outputs = network.apply({"params": params}, *inputs)
        return outputs.down_block_res_samples, outputs.mid_block_res_sample

    inputs, others = (
        (*_latents(side, length), draw(2, 3, 8 * side, 8 * side)) for side, length in ((8, 5), (12, 7))
    )
    return Specimen(function, params, inputs, others)


def _diffusion_autoencoder() -> Specimen:
    module = import_optional("diffusers.models.vae_flax")
    network = module.FlaxAutoencoderKL(
        block_out_channels=(8, 16),
        down_block_types=("DownEncoderBlock2D",) * 2,
        up_block_types=("UpDecoderBlock2D",) * 2,
        norm_num_groups=4,
        sample_size=8,
        dtype=jnp.dtype("float64"),
    )
    params = jax.jit(network.init_weights)(jax.random.PRNGKey(0))

    def function(params: Any, image: Any) -> Any:
        return network.apply({"params": params}, image).sample

    return Specimen(function, params, (draw(2, 3, 8, 8),), (draw(2, 3, 12, 12),))


BUILDERS: dict[str, Callable[[], Specimen]] = {
    "UNet of Stable Diffusion 1": _diffusion_unet,
    "UNet of Stable Diffusion 2": partial(_diffusion_unet, use_linear_projection=True, split_head_dim=True),
    "ControlNet": _diffusion_control,
    "autoencoder (KL)": _diffusion_autoencoder,
}
