"""Image classification datasets as whole arrays: the embedded digits, and prepared TensorFlow Datasets.

`load_dataset` returns both splits of a dataset in memory, uint8 as they are stored; `normalise` turns
images into floats on the device, which therefore receives a quarter of the bytes. ``"digits"`` is part of the
package and needs nothing else. Every other name is read from a folder that TensorFlow Datasets (TFDS)
prepared as ArrayRecord, which needs neither TensorFlow nor a network. Nothing here downloads or writes
anything: what is not there is a `DataError` that says what to run.

The digits are the 1,797 test images of *Optical Recognition of Handwritten Digits* by E. Alpaydin and
C. Kaynak (UCI Machine Learning Repository, 1998, https://doi.org/10.24432/C50P49), licensed CC BY 4.0. Their
values are unchanged; only the file format is ours.
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

__all__ = ["DATASETS", "Dataset", "load_dataset", "normalise"]


class _Form(NamedTuple):
    image_shape: tuple[int, int, int]
    num_classes: int


_FORMS = {
    "digits": _Form((8, 8, 1), 10),
    "mnist": _Form((28, 28, 1), 10),
    "cifar10": _Form((32, 32, 3), 10),
    "cifar100": _Form((32, 32, 3), 100),
    "svhn_cropped": _Form((32, 32, 3), 10),
}

# Names that `load_dataset` knows; all but the digits are TFDS names.
DATASETS = tuple(_FORMS)

# An interrupted preparation leaves a folder such as incomplete.ABC123_3.0.1, which this does not match.
_VERSION = re.compile(r"\d+\.\d+\.\d+")

# What reading a prepared folder imports. TFDS itself would import the last two at the first record.
_TFDS_PACKAGES = ("tensorflow_datasets", "array_record", "PIL")


@dataclasses.dataclass(frozen=True, eq=False)
class Dataset:
    """A training and a test split, checked when made.

    Attributes:
      name: the name it was loaded by; a subset keeps it.
      num_classes: labels are 0 to `num_classes` − 1.
      train: examples to train on.
      test: examples held out.

    Raises:
      DataError: a split is empty, or has arrays of another shape or dtype than `Batch` says, or labels out of
        range; all problems are listed.
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
        """Mean pixel of each channel, float32 [c], in units of the stored values.

        Taken over the training split that this dataset holds: a subset has its own.
        """
        return self._moments[0]

    @property
    def std(self) -> np.ndarray:
        """Standard deviation of each channel, float32 [c], over the same pixels as `mean`.

        At least 1, the step between stored values: a channel that varies less is constant but for rounding,
        and is not blown up.
        """
        return self._moments[1]

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray]:
        images = self.train.inputs
        count = images.size // images.shape[-1]
        # Integer sums are exact and need no copy of the images; squares sum to at most 2¹⁶ a pixel.
        mean = images.sum(axis=0, dtype=np.int64).sum(axis=(0, 1)) / count
        variance = np.einsum("nhwc,nhwc->c", images, images, dtype=np.int64) / count - mean**2
        return mean.astype(np.float32), np.sqrt(np.maximum(variance, 1)).astype(np.float32)

    def take(self, *, num_train: int | None = None, num_test: int | None = None) -> "Dataset":
        """A smaller dataset with the same mix of classes; `None` keeps a split whole.

        A subset depends on the labels and the size alone. It takes the first examples of each class in stored
        order, keeps that order, holds every class to within one example of its share, and contains every
        smaller subset.

        Args:
          num_train: examples to keep of the training split.
          num_test: examples to keep of the test split.

        Returns:
          A new dataset, with a `mean` and `std` of its own.

        Raises:
          DataError: a size is below 1 or above that of the split.

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


def load_dataset(name: str, *, data_dir: str | os.PathLike[str] | None = None) -> Dataset:
    """Both splits of a dataset, in memory.

    The digits are split by a fixed rule: sorted by class and then by stored position, every fifth example,
    beginning with the first, is a test example. That is 1,437 for training and 360 for testing, each class
    within one example of its share. Every other dataset has the splits ``train`` and ``test`` of TFDS.

    Args:
      name: one of `DATASETS`.
      data_dir: folder of prepared TFDS datasets; by default the environment variable ``TFDS_DATA_DIR``, else
        ``~/tensorflow_datasets``. The newest version found there is read. The digits ignore it.

    Returns:
      The dataset, examples in stored order.

    Raises:
      DataError: the name is unknown; the dataset is not prepared, or in another format than ArrayRecord;
        files are missing or damaged; a split is empty; an image has another form than the dataset should
        have; packages that read TFDS are not installed.

    Examples:
      >>> dataset = load_dataset("digits")
      >>> dataset.train.inputs.shape, dataset.test.inputs.shape
      ((1437, 8, 8, 1), (360, 8, 8, 1))
    """
    if name not in _FORMS:
        raise DataError(f"unknown dataset {name!r}; known are {', '.join(DATASETS)}")
    if name == "digits":
        train, test = _load_digits()
    else:
        train, test = _load_prepared(name, _data_root(data_dir))
    return Dataset(name, _FORMS[name].num_classes, train, test)


def normalise(images: ArrayLike, mean: ArrayLike, std: ArrayLike) -> jax.Array:
    """Images of mean 0 and standard deviation 1 per channel, (images − mean) / std, on the device.

    Args:
      images: uint8 array [..., h, w, c].
      mean: array [c], in the units of `images`; see `Dataset.mean`.
      std: array [c], likewise.

    Returns:
      A float32 array with the shape of `images`.

    Examples:
      >>> normalise(jnp.array([[[0, 8]]], jnp.uint8), jnp.array([1.0, 4.0]), jnp.array([2.0, 4.0])).tolist()
      [[[-0.5, 1.0]]]
    """
    images = jnp.asarray(images).astype(jnp.float32)  # moved to the device as uint8, converted there
    per_channel = (1,) * (images.ndim - 1) + (-1,)
    mean, std = (jnp.reshape(jnp.asarray(value, jnp.float32), per_channel) for value in (mean, std))
    return (images - mean) / std


def _split_problems(name: str, split: Batch, num_classes: int) -> list[str]:
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
    """The first examples of each class, as many as the first `num` slots of a fixed order of the classes.

    The order is the proportionate schedule of Baruah et al. (Algorithmica 15, 1996) on one processor: of N
    examples, the j-th of a class of size m may take slots ⌊jN/m⌋ to ⌈(j+1)N/m⌉ − 1, and each slot goes to the
    class whose interval ends first. A feasible order exists, and this rule finds it, so that every class has
    within one of tm/N examples in the first t slots. Rounding each t by itself would not give nested subsets.
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
    with np.load(pathlib.Path(__file__).with_name("digits.npz")) as arrays:
        images, labels = arrays["images"], arrays["labels"].astype(np.int32)
    # The stored order is that of collection, so a block of it would hold the hands of few writers.
    is_test = np.zeros(len(labels), bool)
    is_test[np.argsort(labels, kind="stable")[::5]] = True
    return Batch(images[~is_test], labels[~is_test]), Batch(images[is_test], labels[is_test])


def _data_root(data_dir: str | os.PathLike[str] | None) -> pathlib.Path:
    root = data_dir or os.environ.get("TFDS_DATA_DIR") or "~/tensorflow_datasets"
    return pathlib.Path(root).expanduser().absolute()


def _load_prepared(name: str, root: pathlib.Path) -> tuple[Batch, Batch]:
    # The folder is looked at before TFDS is asked: TFDS would start a download, which without a network hangs
    # for minutes, and its errors do not tell a missing dataset from one in another format.
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
    # With a `data_dir`, both `tfds.data_source` and a builder not told otherwise prepare tfrecord files.
    code = (
        "import tensorflow_datasets as tfds; "
        f'tfds.builder("{name}", data_dir={json.dumps(str(root))}, file_format="array_record")'
        ".download_and_prepare()"
    )
    return f"run this once, with TensorFlow installed and a network:\n  python -c {shlex.quote(code)}"


def _check_packages(name: str) -> None:
    for package in _TFDS_PACKAGES:
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise DataError(
                f"cannot import {package}, which reads dataset {name!r} ({error}); run\n"
                '  pip install "rebasin-jax[experiments]"'
            ) from error


def _check_prepared(name: str, builder: Any, folder: pathlib.Path, root: pathlib.Path) -> None:
    """Raises before the seconds that decoding takes, for both splits at once."""
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
    """Decodes a split, shard by shard so that an error can name the file.

    Serial on purpose. Raw records, read a shard at a time and parsed here, take a fifth of the time that TFDS
    takes to decode them one by one (MNIST 3 s against 16 s on two cores), and threads make it slower, because
    most of decoding a small image is Python.
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
    """Returns ``decode(record) -> (image, label)`` for serialised examples with images of one shape."""
    from PIL import Image
    from tensorflow_datasets.proto import tf_example_pb2

    height, width, channels = image_shape
    wanted_size, wanted_mode = (width, height), {1: "L", 3: "RGB"}[channels]

    def decode(record: bytes) -> tuple[np.ndarray, int]:
        # Classes of generated protobuf modules exist only at run time.
        example = tf_example_pb2.Example.FromString(record)  # pyright: ignore[reportAttributeAccessIssue]
        features = example.features.feature
        image = Image.open(io.BytesIO(features["image"].bytes_list.value[0]))
        # Size and mode fix shape and dtype: mode L is uint8 [h, w], mode RGB is uint8 [h, w, 3].
        if image.size != wanted_size:
            raise ValueError(f"got an image of size {image.size}, wanted {wanted_size}")
        if image.mode != wanted_mode:
            raise ValueError(f"got an image of mode {image.mode!r}, wanted {wanted_mode!r}")
        return np.asarray(image).reshape(image_shape), features["label"].int64_list.value[0]

    return decode
