"""Image classification datasets as whole arrays: the embedded digits, and prepared TensorFlow Datasets.

`load_dataset` returns both splits of a dataset in memory, with images in uint8 as they are stored.
`normalise` turns images into floats on the device, so that only a quarter of the bytes are moved there.

The dataset ``"digits"`` is part of the package. All others are read from a folder that TensorFlow Datasets
(TFDS) prepared in the ArrayRecord format; reading it needs neither TensorFlow nor a network connection.
Nothing here downloads or writes anything. A missing dataset is a `DataError` that says which command
prepares it.

The digits are the 1,797 test images of *Optical Recognition of Handwritten Digits* by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), licensed CC BY 4.0. Their
values are unchanged; the file format is our own.
"""

import dataclasses
import functools
import importlib
import io
import json
import os
import pathlib
import re
import shlex
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from rebasin.batches import Batch
from rebasin.errors import DataError, problem_list
from rebasin.training.folders import expand_home

__all__ = ["DATASETS", "Dataset", "load_dataset", "normalise"]


class _Form(NamedTuple):
    """What the examples of a dataset look like.

    Attributes:
      image_shape: height, width and channels of an image.
      num_classes: number of classes.
    """

    image_shape: tuple[int, int, int]
    num_classes: int


_FORMS = {
    "digits": _Form((8, 8, 1), 10),
    "mnist": _Form((28, 28, 1), 10),
    "cifar10": _Form((32, 32, 3), 10),
    "cifar100": _Form((32, 32, 3), 100),
    "svhn_cropped": _Form((32, 32, 3), 10),
}

# The names that `load_dataset` knows. All but the digits are names of TFDS.
DATASETS = tuple(_FORMS)

# The name of a prepared version's folder. An interrupted preparation leaves a folder such as
# incomplete.ABC123_3.0.1, which must not match.
_VERSION = re.compile(r"\d+\.\d+\.\d+")

# The name of a dataset with smaller images.
_SHRUNK = re.compile(r"(.+)_(\d+)x\2")

# The packages that reading a prepared folder needs. TFDS itself imports the last two only when it reads the
# first record, so they are checked beforehand.
_TFDS_PACKAGES = ("tensorflow_datasets", "array_record", "PIL")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split of labelled images, checked on construction.

    Both splits are batches of NumPy arrays: images as inputs, uint8 [n, h, w, c], and labels, int32 [n].

    Attributes:
      name: the name that the dataset was loaded by; a subset keeps it.
      num_classes: number of classes; labels are 0 to `num_classes` − 1.
      train: examples to train on.
      test: examples held out from training.

    Raises:
      DataError: a split is empty, has arrays of another shape or dtype, or has labels out of range. All
        problems are listed.
    """

    name: str
    num_classes: int
    train: Batch
    test: Batch

    def __post_init__(self):
        problems = [*_split_problems("train", self.train, self.num_classes)]
        problems += _split_problems("test", self.test, self.num_classes)
        if not problems and self.train.inputs.shape[1:] != self.test.inputs.shape[1:]:
            got, wanted = self.test.inputs.shape[1:], self.train.inputs.shape[1:]
            problems.append(f"test images: got shape {got}, wanted that of the train images, {wanted}")
        if problems:
            raise DataError(problem_list(f"dataset {self.name!r} is not usable:", problems))

    @property
    def mean(self) -> np.ndarray:
        """The mean pixel of each channel, float32 [c], in units of the stored values.

        It is the mean over the training split of this dataset, so a subset has a mean of its own.
        """
        return self._moments[0]

    @property
    def std(self) -> np.ndarray:
        """The standard deviation of each channel, float32 [c], over the same pixels as `mean`.

        It is at least 1, the step between stored values. A channel that varies less is constant up to
        rounding, and dividing by its true deviation would only amplify noise.
        """
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean and standard deviation of each channel."""
        images = self.train.inputs
        count = images.size // images.shape[-1]
        # Integer sums are exact and, unlike floats, need no copy of the images. A square is less than 2¹⁶, so
        # that int64 is wide enough for any dataset that fits in memory.
        mean = images.sum(axis=0, dtype=np.int64).sum(axis=(0, 1)) / count
        variance = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64) / count - mean**2
        return mean.astype(np.float32), np.sqrt(np.maximum(variance, 1)).astype(np.float32)

    def take(self, *, num_train: int | None = None, num_test: int | None = None) -> "Dataset":
        """Return a smaller dataset with the same proportions of classes.

        A subset depends on the labels and the size only. It consists of the first examples of each class, in
        stored order. The size of every class is within one example of its exact share. A larger subset
        contains every smaller one.

        Args:
          num_train: number of training examples to keep; `None` keeps all.
          num_test: number of test examples to keep; `None` keeps all.

        Returns:
          A new dataset, with a `mean` and `std` of its own.

        Raises:
          DataError: a size is below 1 or above the size of the split.

        Examples:
          >>> dataset = load_dataset("digits").take(num_train=100)
          >>> np.bincount(dataset.train.labels).tolist(), len(dataset.test.labels)
          ([10, 10, 10, 10, 10, 10, 10, 10, 10, 10], 360)
        """
        wanted = {"train": num_train, "test": num_test}
        problems = []
        for split, num in wanted.items():
            size = len(getattr(self, split).labels)
            if num is not None and not 1 <= num <= size:
                problems.append(f"num_{split}: got {num}, wanted 1 to {size}")
        if problems:
            raise DataError(problem_list(f"no such subset of dataset {self.name!r}:", problems))
        return dataclasses.replace(
            self,
            **{split: _take(getattr(self, split), num) for split, num in wanted.items() if num is not None},
        )

    def shrink(self, side: int) -> "Dataset":
        """Return the dataset with smaller, square images, each pixel of which is the mean over an area.

        Images whose pixels are not bytes over their whole range, as those of the digits, are stretched to it
        first, so that rounding to bytes costs little.

        Args:
          side: height and width of the new images, in pixels.

        Returns:
          A new dataset called ``"<name>_<side>x<side>"``, which `load_dataset` knows too.

        Raises:
          DataError: the images are not larger than that.

        Examples:
          >>> small = load_dataset("digits").shrink(4)
          >>> small.name, small.train.inputs.shape
          ('digits_4x4', (1437, 4, 4, 1))
        """
        height, width, _ = self.train.inputs.shape[1:]
        if not 1 <= side < min(height, width):
            raise DataError(
                f"dataset {self.name!r} has images of {height} × {width} pixels, which cannot be shrunk to "
                f"{side} × {side}"
            )
        rows, columns = (_area_means(size, side) for size in (height, width))
        stretch = 255 / max(int(self.train.inputs.max()), 1)

        def shrunk(split: Batch) -> Batch:
            means = np.einsum(
                "ih,nhwc,jw->nijc", rows, split.inputs.astype(np.float32), columns, optimize=True
            )
            pixels = np.clip(np.rint(stretch * means), 0, 255).astype(np.uint8)
            return Batch(pixels, split.labels)

        name = f"{self.name}_{side}x{side}"
        return dataclasses.replace(self, name=name, train=shrunk(self.train), test=shrunk(self.test))

    def named(self, name: str) -> "Dataset":
        """Return the dataset of a recipe: this one, or this one with smaller images, by its name.

        Raises:
          DataError: the name is that of no such dataset.

        Examples:
          >>> load_dataset("digits").named("digits_4x4").name
          'digits_4x4'
        """
        base, side = _split_name(name)
        if base != self.name:
            raise DataError(f"wanted dataset {self.name!r}, or its images shrunk, got {name!r}")
        return self if side is None else self.shrink(side)


def load_dataset(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Load both splits of a dataset into memory.

    The digits are split by a fixed rule: they are sorted by class and then by stored position, and every
    fifth example, beginning with the first, is a test example. This gives 1,437 training and 360 test
    examples, with every class within one example of its share. All other datasets have the splits ``train``
    and ``test`` of TFDS.

    Args:
      name: one of `DATASETS`; ``"digits_4x4"`` are the digits as images of 4 × 4 pixels, see
        `Dataset.shrink`, and so on.
      data_dir: folder of prepared TFDS datasets, of which the newest version is read. The default is the
        environment variable ``TFDS_DATA_DIR`` or else ``~/tensorflow_datasets``. Ignored for the digits.

    Returns:
      The dataset, with examples in stored order.

    Raises:
      DataError: the name is unknown; the dataset is not prepared, or in another format than ArrayRecord;
        files are missing or damaged; a split is empty; an image has an unexpected size or mode; or the
        packages that read TFDS are not installed.

    Examples:
      >>> dataset = load_dataset("digits")
      >>> dataset.train.inputs.shape, dataset.test.inputs.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    base, side = _split_name(name)
    if side is not None and base in _FORMS:
        return load_dataset(base, data_dir=data_dir).shrink(side)
    if name not in _FORMS:
        raise DataError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    if name == "digits":
        train, test = _load_digits()
    else:
        train, test = _load_prepared(name, _data_root(data_dir))
    return Dataset(name, _FORMS[name].num_classes, train, test)


def normalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Normalise images to (images − mean) / std per channel, on the device.

    Args:
      images: uint8 array [..., h, w, c].
      mean: mean pixel of each channel, [c], in the units of `images`; see `Dataset.mean`.
      std: standard deviation of each channel, [c], in the same units.

    Returns:
      A float32 array with the shape of `images`.

    Examples:
      >>> normalise(jnp.array([[[0, 8]]], jnp.uint8), jnp.array([1.0, 4.0]), jnp.array([2.0, 4.0])).tolist()
      [[[-0.5, 1.0]]]
    """
    # Converted after the move to the device, so that one byte per value is moved instead of four.
    images = jnp.asarray(images).astype(jnp.float32)
    per_channel = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.reshape(jnp.asarray(value, jnp.float32), per_channel) for value in (mean, std))
    return (images - mean) / std


def _split_name(name: str) -> tuple[str, int | None]:
    """Return the name of a dataset without the side of its images, and that side."""
    found = _SHRUNK.fullmatch(name)
    return (found[1], int(found[2])) if found else (name, None)


def _area_means(size: int, side: int) -> np.ndarray:
    """Return the matrix ``[side, size]`` that averages pixels over `side` equal intervals."""
    edges = np.arange(side + 1) * size / side
    pixels = np.arange(size)
    overlap = np.minimum(edges[1:, None], pixels + 1) - np.maximum(edges[:-1, None], pixels)
    return (np.maximum(overlap, 0) * side / size).astype(np.float32)


def _split_problems(name: str, split: Batch, num_classes: int) -> list[str]:
    """Return one line for each problem of a split."""
    images, labels = split
    problems = []
    if images.dtype != np.uint8 or images.ndim != 4:
        problems.append(f"{name} images: got {images.dtype} {list(images.shape)}, wanted uint8 [n, h, w, c]")
    if labels.dtype != np.int32 or labels.shape != images.shape[:1]:
        problems.append(
            f"{name} labels: got {labels.dtype} {list(labels.shape)}, wanted int32 {list(images.shape[:1])}"
        )
    elif not labels.size:
        problems.append(f"{name}: got 0 examples, wanted at least 1")
    elif not 0 <= labels.min() <= labels.max() < num_classes:
        problems.append(f"{name} labels: got {labels.min()} to {labels.max()}, wanted 0 to {num_classes - 1}")
    return problems


def _take(split: Batch, num: int) -> Batch:
    """Keep `num` examples of a split: the first ones of each class.

    How many each class gets follows from a fixed sequence of N slots, one for each of the N examples of the
    split. Every slot belongs to a class, and a class gets as many examples as it has among the first `num`
    slots. Larger subsets therefore contain smaller ones, which rounding the share of each class for every
    `num` separately would not ensure.

    The sequence is the proportionate schedule of Baruah et al. (Algorithmica 15, 1996) on one processor. The
    j-th example of a class of size m may take slots ⌊jN/m⌋ to ⌈(j+1)N/m⌉ − 1, and each slot goes to the class
    whose interval ends first. Every example then finds a slot in its interval, so that the first t slots hold
    every class to within one of its exact share, tm/N.
    """
    classes, sizes = np.unique(split.labels, return_counts=True)
    total = len(split.labels)
    taken = np.zeros_like(sizes)
    for slot in range(num):
        opens = taken * total // sizes
        closes = -(-(taken + 1) * total // sizes)
        taken[np.argmin(np.where(opens <= slot, closes, total + 1))] += 1
    by_class = [np.flatnonzero(split.labels == label)[:n] for label, n in zip(classes, taken, strict=True)]
    kept = np.sort(np.concatenate(by_class))
    return Batch(split.inputs[kept], split.labels[kept])


def _load_digits() -> tuple[Batch, Batch]:
    """Read the embedded digits, and split them into training and test examples."""
    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(np.int32)
    # Digits are stored in the order of collection. A contiguous block would be the writing of a few people,
    # so test examples are taken from everywhere.
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    return Batch(images[~is_test], labels[~is_test]), Batch(images[is_test], labels[is_test])


def _data_root(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    """Return the folder of prepared datasets."""
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return expand_home(root).absolute()


def _load_prepared(name: str, root: pathlib.Path) -> tuple[Batch, Batch]:
    """Read both splits of the newest prepared version of a dataset below `root`."""
    # The folder is checked before TFDS is asked. For a missing dataset TFDS would start a download, which
    # hangs for minutes without a network, and its errors do not tell a missing dataset from another format.
    folder = _newest_version(name, root)
    _check_packages(name)
    import tensorflow_datasets as tfds

    try:
        builder = tfds.builder_from_directory(folder)
    except Exception as error:  # the parsers of its two JSON files raise a dozen types
        raise DataError(f"cannot read the description of {name!r} in {folder}: {error}") from error
    _check_prepared(name, builder, folder, root)
    return _read_split(name, builder, "train"), _read_split(name, builder, "test")


def _newest_version(name: str, root: pathlib.Path) -> pathlib.Path:
    """Return the folder of the newest prepared version of a dataset, or raise and say how to prepare it."""
    versions = [
        path
        for path in (root / name).glob("*")
        if _VERSION.fullmatch(path.name) and (path / "dataset_info.json").is_file()
    ]
    if not versions:
        raise DataError(
            f"dataset {name!r} is not prepared: no {root / name}/<version>/dataset_info.json; "
            f"point TFDS_DATA_DIR (or data_dir) to the folder that holds it, or {_how_to_prepare(name, root)}"
        )
    return max(versions, key=lambda path: [int(number) for number in path.name.split(".")])


def _how_to_prepare(name: str, root: pathlib.Path) -> str:
    """Return an instruction that prepares a dataset in the ArrayRecord format."""
    # Given a `data_dir`, a TFDS builder and `tfds.data_source` prepare tfrecord files unless told otherwise.
    code = (
        "import tensorflow_datasets as tfds; "
        f'tfds.builder("{name}", data_dir={json.dumps(str(root))}, file_format="array_record")'
        ".download_and_prepare()"
    )
    return f"run this once, with TensorFlow installed and a network:\n  python -c {shlex.quote(code)}"


def _check_packages(name: str) -> None:
    """Raise `DataError` unless the packages that read TFDS can be imported."""
    for package in _TFDS_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise DataError(
                f"cannot import {package}, which reads dataset {name!r} ({error}); run\n"
                '  pip install "rebasin-jax[experiments]"'
            ) from error


def _check_prepared(name: str, builder: Any, folder: pathlib.Path, root: pathlib.Path) -> None:
    """Raise `DataError` for another format, or for an empty split or missing files of either split.

    This takes no time, whereas decoding the first split takes seconds.
    """
    file_format = builder.info.file_format.value
    if file_format != "array_record":
        raise DataError(
            f"dataset {name!r} in {folder} is prepared as {file_format}, wanted array_record; "
            f"move that folder away and {_how_to_prepare(name, root)}"
        )
    splits = builder.info.splits
    problems = []
    for split in ("train", "test"):
        if split not in splits or not splits[split].num_examples:
            problems.append(f"{split}: got 0 examples, wanted at least 1")
        else:
            missing = (path for path in splits[split].filepaths if not path.exists())
            problems += [f"{split}: no file {path.name}" for path in missing]
    if problems:
        raise DataError(problem_list(f"dataset {name!r} in {folder} is not complete:", problems))


def _read_split(name: str, builder: Any, split: str) -> Batch:
    """Decode a split, shard by shard, so that an error can name the damaged file.

    Records are read a shard at a time and parsed here, in one thread. This takes a fifth of the time that
    TFDS takes to decode them one by one (MNIST: 3 s instead of 16 s on two cores). Threads would make it
    slower, because most of decoding a small image is Python.
    """
    import tensorflow_datasets as tfds

    info = builder.info.splits[split]
    source = builder.as_data_source(split, deserialize_method=tfds.decode.DeserializeMethod.RAW_BYTES)
    images = np.empty((info.num_examples, *_FORMS[name].image_shape), np.uint8)
    labels = np.empty(info.num_examples, np.int32)
    decode = _build_decoder(_FORMS[name].image_shape)
    start = 0
    for path, length in zip(info.filepaths, info.shard_lengths, strict=True):
        try:
            records = source.__getitems__(range(start, start + length))
        except Exception as error:  # ArrayRecord raises RuntimeError, but promises nothing
            raise DataError(f"cannot read {path}: {error}") from error
        for number, record in enumerate(records):
            try:
                images[start + number], labels[start + number] = decode(record)
            except Exception as error:  # protobuf and Pillow raise a dozen types
                raise DataError(f"cannot use record {number} of {path}: {error}") from error
        start += length
    return Batch(images, labels)


def _build_decoder(image_shape: tuple[int, int, int]) -> Callable[[bytes], tuple[np.ndarray, int]]:
    """Build ``decode(record) -> (image, label)`` for serialised examples with images of one shape."""
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    height, width, channels = image_shape
    wanted_size, wanted_mode = (width, height), {1: "L", 3: "RGB"}[channels]

    def decode(record: bytes) -> tuple[np.ndarray, int]:
        # Type checkers do not see the classes of generated protobuf modules, which exist at run time only.
        example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
        features = example.features.feature
        image = Image.open(io.BytesIO(features["image"].bytes_list.value[0]))
        # Size and mode determine shape and dtype: mode L is uint8 [h, w], and mode RGB is uint8 [h, w, 3].
        if image.size != wanted_size:
            raise ValueError(f"got an image of size {image.size}, wanted {wanted_size}")
        if image.mode != wanted_mode:
            raise ValueError(f"got an image of mode {image.mode!r}, wanted {wanted_mode!r}")
        return np.asarray(image).reshape(image_shape), features["label"].int64_list.value[0]

    return decode
