import jax
import numpy as np

from rebasin.training.augmentation import CROP_PADDING, crop_and_flip, random_crop_and_flip


def test_crop_and_flip_equals_slicing_one_image_at_a_time():
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (20, 6, 5, 3), dtype=np.uint8)
    offsets, flips = rng.integers(0, 2 * CROP_PADDING + 1, (20, 2)), rng.random(20) < 0.5
    offsets[:2] = 0, 2 * CROP_PADDING  # both ends of the range

    moved = crop_and_flip(images, offsets, flips)

    assert moved.dtype == np.uint8
    for image, (top, left), flip, got in zip(images, offsets, flips, moved, strict=True):
        padded = np.pad(image, ((CROP_PADDING, CROP_PADDING), (CROP_PADDING, CROP_PADDING), (0, 0)))
        wanted = padded[top : top + 6, left : left + 5]
        np.testing.assert_array_equal(got, wanted[:, ::-1] if flip else wanted)


def test_every_offset_and_both_sides_are_drawn_equally_often():
    # Each image has one bright pixel, off its centre, which shows where the image was moved.
    images = np.zeros((9000, 20, 21, 1), np.uint8)
    images[:, 10, 6] = 1
    _, rows, columns, _ = np.nonzero(random_crop_and_flip(images, jax.random.key(0)))
    assert len(rows) == 9000
    # The pixel moves to rows 10 ± 4 and to columns 6 ± 4, or 14 ± 4 if mirrored. Both reach column 10.
    row_means = [0] * 6 + [1000] * 9
    column_means = [0] * 2 + [500] * 8 + [1000] + [500] * 8
    # The tolerance is five standard deviations of at most 30. One offset too many or too few would exceed it.
    np.testing.assert_allclose(np.bincount(rows), row_means, atol=150)
    np.testing.assert_allclose(np.bincount(columns), column_means, atol=150)


def test_same_key_same_images():
    images = np.random.default_rng(0).integers(0, 256, (4, 8, 8, 1), dtype=np.uint8)
    once, again = (random_crop_and_flip(images, jax.random.key(1)) for _ in range(2))
    np.testing.assert_array_equal(once, again)
    assert not np.array_equal(once, random_crop_and_flip(images, jax.random.key(2)))
