"""Augmentation of image batches, on the device: random crop and horizontal flip."""

import jax
import jax.numpy as jnp

__all__ = ["CROP_PADDING", "crop_and_flip", "random_crop_and_flip"]

# Pixels that are added on each side before cropping. OpenLTH trains on CIFAR with torchvision's
# RandomCrop(32, padding=4).
CROP_PADDING = 4


def crop_and_flip(images: jax.Array, offsets: jax.Array, flips: jax.Array) -> jax.Array:
    """Crop each image out of a zero-padded copy of itself, then mirror it left to right if asked.

    Args:
      images: images [n, h, w, c].
      offsets: row and column of the padded copy where each crop begins, int [n, 2], from 0 to
        2·`CROP_PADDING`.
      flips: whether to mirror each image, bool [n].

    Returns:
      Images with the shape and dtype of `images`.
    """
    _, height, width, _ = images.shape
    padded = jnp.pad(images, ((0, 0), (CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0)))
    rows = offsets[:, :1] + jnp.arange(height)[None]
    columns = jnp.arange(width)[None]
    columns = offsets[:, 1:] + jnp.where(flips[:, None], width - 1 - columns, columns)
    return padded[jnp.arange(len(images))[:, None, None], rows[:, :, None], columns[:, None, :]]


def random_crop_and_flip(images: jax.Array, key: jax.Array) -> jax.Array:
    """Crop and mirror each image of [n, h, w, c] at random, uniformly and independently of the others."""
    offset_key, flip_key = jax.random.split(key)
    offsets = jax.random.randint(offset_key, (len(images), 2), 0, 2 * CROP_PADDING + 1)
    return crop_and_flip(images, offsets, jax.random.bernoulli(flip_key, shape=(len(images),)))
