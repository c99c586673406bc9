import hashlib
import io
import json
import os
import pathlib
import shlex
import shutil
import socket
import subprocess
import sys

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
import tensorflow_datasets as tfds
from hypothesis import given
from PIL import Image

import rebasin.training.data
from rebasin.batches import Batch
from rebasin.errors import DataError
from rebasin.training.data import DATASETS, Dataset, load_dataset, normalise

MNIST_SHAPE = (28, 28, 1)


@pytest.fixture(autouse=True)
def _no_network(monkeypatch):
    def connect(*_):
        raise AssertionError("reading a dataset must not touch the network")

    monkeypatch.setattr(socket.socket, "connect", connect)


def png(pixels):
    """PNG bytes of a uint8 image [h, w, 1] or [h, w, 3]."""
    buffer = io.BytesIO()
    Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(buffer, "PNG")
    return buffer.getvalue()


def random_split(num, shape, seed):
    rng = np.random.default_rng(seed)
    images = rng.integers(0, 256, (num, *shape), dtype=np.uint8)
    images[:, 0, 0, 0] = np.arange(num)  # TFDS shuffles what it writes: this tells which image is which
    return Batch(images, rng.integers(0, 10, num, dtype=np.int32))


def write_prepared(root, name, splits, *, version="3.0.1"):
    """Write pairs (PNG bytes, label) as TFDS would, in two ArrayRecord shards per split."""
    tfds.disable_progress_bar()

    class Writer(tfds.core.GeneratorBasedBuilder, skip_registration=True):
        VERSION = tfds.core.Version(version)

        def _info(self):
            # TFDS stores PNG bytes as they are. Only encoding an array would need TensorFlow.
            image = tfds.features.Image(shape=(None, None, 3 if name == "cifar10" else 1))
            label = tfds.features.ClassLabel(num_classes=10)
            features = tfds.features.FeaturesDict({"image": image, "label": label})
            return tfds.core.DatasetInfo(builder=self, features=features)

        def _split_generators(self, dl_manager):
            return {split: self._generate_examples(examples) for split, examples in splits.items()}

        def _generate_examples(self, examples):
            for key, (image, label) in enumerate(examples):
                yield key, {"image": io.BytesIO(image), "label": int(label)}

    Writer.name = name
    builder = Writer(data_dir=root, file_format="array_record")
    builder.download_and_prepare(download_config=tfds.download.DownloadConfig(num_shards=2))
    return pathlib.Path(builder.data_path)


def encoded(split):
    return [(png(image), label) for image, label in zip(*split, strict=True)]


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The folder of a small prepared MNIST, and the splits that were written to it."""
    root = tmp_path_factory.mktemp("tfds")
    written = {"train": random_split(11, MNIST_SHAPE, seed=0), "test": random_split(5, MNIST_SHAPE, seed=1)}
    write_prepared(root, "mnist", {split: encoded(examples) for split, examples in written.items()})
    return root, written


@pytest.fixture
def folder(prepared, tmp_path):
    """The version folder of a copy of the small MNIST, below `tmp_path`, which a test may damage."""
    shutil.copytree(prepared[0], tmp_path, dirs_exist_ok=True)
    return tmp_path / "mnist/3.0.1"


def edit_info(folder, edit):
    path = folder / "dataset_info.json"
    info = json.loads(path.read_text())
    edit(info)
    path.write_text(json.dumps(info))


def error_of(name, data_dir):
    with pytest.raises(DataError) as info:
        load_dataset(name, data_dir=data_dir)
    return str(info.value)


def prepare_command(name, root):
    return (
        "run this once, with TensorFlow installed and a network:\n"
        f"  python -c 'import tensorflow_datasets as tfds; "
        f'tfds.builder("{name}", data_dir="{root}", file_format="array_record").download_and_prepare()\''
    )


# Digits.


def test_digits_are_the_published_images():
    with np.load(pathlib.Path(rebasin.training.data.__file__).with_name("digits.npz")) as arrays:
        images, labels = arrays["images"], arrays["labels"]
    assert (images.dtype, images.shape, images.min(), images.max()) == (np.uint8, (1797, 8, 8, 1), 0, 16)
    assert images.sum() == 561718
    # The counts per class that the UCI documentation of the test part states.
    assert np.bincount(labels).tolist() == [178, 182, 177, 183, 181, 182, 181, 179, 174, 180]
    # Hashes of the CSV file that scikit-learn ships, an independent copy of the UCI file.
    assert hashlib.sha256(images.tobytes()).hexdigest() == (
        "8f26b2bd9d135c256808f68f14fdabddde6d9c7f869ae419704b051f0f14b3b3"
    )
    assert hashlib.sha256(labels.astype(np.uint8).tobytes()).hexdigest() == (
        "8ba4f891220f5e4c9c819638d1602d74b83618f167043c6da52a2a247841ddf0"
    )


def test_digits_split_is_fixed_and_stratified():
    digits = load_dataset("digits")
    assert (digits.name, digits.num_classes) == ("digits", 10)
    assert digits.train.inputs.shape == (1437, 8, 8, 1)
    assert digits.test.inputs.shape == (360, 8, 8, 1)
    assert digits.train.labels.dtype == digits.test.labels.dtype == np.int32
    assert np.bincount(digits.test.labels).tolist() == [36, 36, 36, 36, 37, 36, 36, 36, 35, 36]
    assert hashlib.sha256(digits.test.inputs.tobytes()).hexdigest() == (
        "3c05733c55d710109b9a1878ea98f552bb9d33485cd2bddb57cbade1c3c55d6d"
    )


def test_digits_splits_are_disjoint_and_complete():
    digits = load_dataset("digits")
    with np.load(pathlib.Path(rebasin.training.data.__file__).with_name("digits.npz")) as arrays:
        whole = zip(arrays["images"], arrays["labels"], strict=True)
        expected = sorted((image.tobytes(), int(label)) for image, label in whole)
    halves = [*zip(*digits.train, strict=True), *zip(*digits.test, strict=True)]
    assert sorted((image.tobytes(), int(label)) for image, label in halves) == expected


def test_digits_load_neither_tfds_nor_pillow():
    code = (
        "import sys; from rebasin.training.data import load_dataset; load_dataset('digits'); "
        "sys.exit(bool({'tensorflow_datasets', 'array_record', 'PIL'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# Prepared datasets.


def test_prepared_dataset_is_read_back_pixel_for_pixel(prepared):
    root, written = prepared
    dataset = load_dataset("mnist", data_dir=root)
    for split, (images, labels) in written.items():
        got = getattr(dataset, split)
        assert (got.inputs.dtype, got.labels.dtype) == (np.uint8, np.int32)
        keys = got.inputs[:, 0, 0, 0]
        np.testing.assert_array_equal(np.sort(keys), np.arange(len(labels)))
        np.testing.assert_array_equal(got.inputs, images[keys])
        np.testing.assert_array_equal(got.labels, labels[keys])


def test_colour_images_keep_their_channels(tmp_path):
    written = {"train": random_split(3, (32, 32, 3), seed=2), "test": random_split(2, (32, 32, 3), seed=3)}
    write_prepared(tmp_path, "cifar10", {split: encoded(examples) for split, examples in written.items()})
    got = load_dataset("cifar10", data_dir=tmp_path).train
    np.testing.assert_array_equal(got.inputs, written["train"].inputs[got.inputs[:, 0, 0, 0]])


def test_order_is_that_of_tfds(prepared):
    source = tfds.builder_from_directory(prepared[0] / "mnist/3.0.1").as_data_source("train")
    got = load_dataset("mnist", data_dir=prepared[0]).train
    np.testing.assert_array_equal(got.inputs, [example["image"] for example in source])
    np.testing.assert_array_equal(got.labels, [example["label"] for example in source])


def test_data_dir_comes_before_the_environment_and_that_before_the_home(prepared, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("TFDS_DATA_DIR", str(prepared[0]))
    assert len(load_dataset("mnist").train.labels) == 11
    elsewhere = tmp_path / "elsewhere"
    assert error_of("mnist", elsewhere).startswith(f"dataset 'mnist' is not prepared: no {elsewhere}/mnist/")
    monkeypatch.delenv("TFDS_DATA_DIR")
    home = tmp_path / "tensorflow_datasets"
    assert error_of("mnist", None).startswith(f"dataset 'mnist' is not prepared: no {home}/mnist/")


def test_newest_version_is_read(tmp_path):
    for version, label in {"3.0.9": 1, "3.0.10": 2, "3.0.2": 3}.items():
        examples = [(png(np.zeros(MNIST_SHAPE, np.uint8)), label)] * 2
        splits = {"train": examples, "test": examples}
        written = write_prepared(tmp_path, "mnist", splits, version=version)
    shutil.copytree(written, tmp_path / "mnist/incomplete.ABC123_4.0.0")  # what a killed preparation leaves
    (tmp_path / "mnist/5.0.0").mkdir()
    assert load_dataset("mnist", data_dir=tmp_path).train.labels.tolist() == [2, 2]


# Errors of prepared datasets.


def test_unknown_dataset():
    assert error_of("imagenet", None) == (
        "unknown dataset 'imagenet'; known are digits, mnist, cifar10, cifar100, svhn_cropped"
    )


@pytest.mark.parametrize("name", [name for name in DATASETS if name != "digits"])
def test_dataset_that_is_not_prepared(name, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tensorflow_datasets", None)  # the folder is looked at first
    assert error_of(name, tmp_path) == (
        f"dataset '{name}' is not prepared: no {tmp_path}/{name}/<version>/dataset_info.json; "
        "point TFDS_DATA_DIR (or data_dir) to the folder that holds it, or " + prepare_command(name, tmp_path)
    )


def test_printed_command_prepares_array_records_in_that_folder(tmp_path, monkeypatch):
    root = tmp_path / "it's a folder"
    program, flag, code = shlex.split(error_of("mnist", root).splitlines()[-1])
    prepared = []
    monkeypatch.setattr(
        tfds.core.DatasetBuilder, "download_and_prepare", lambda builder: prepared.append(builder)
    )
    exec(code, {})
    assert (program, flag) == ("python", "-c")
    assert [builder.info.file_format.value for builder in prepared] == ["array_record"]
    assert pathlib.Path(prepared[0].data_path).parent == root / "mnist"


@pytest.mark.parametrize("package", ["tensorflow_datasets", "array_record", "PIL"])
def test_missing_package(package, prepared, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    assert error_of("mnist", prepared[0]) == (
        f"cannot import {package}, which reads dataset 'mnist' "
        f"(import of {package} halted; None in sys.modules); run\n"
        '  pip install "rebasin-jax[experiments]"'
    )


def test_other_file_format(folder, tmp_path):
    edit_info(folder, lambda info: info.update(fileFormat="tfrecord"))
    assert error_of("mnist", tmp_path) == (
        f"dataset 'mnist' in {folder} is prepared as tfrecord, wanted array_record; "
        "move that folder away and " + prepare_command("mnist", tmp_path)
    )


def test_description_without_a_format_is_an_old_tfrecord(folder, tmp_path):
    edit_info(folder, lambda info: info.pop("fileFormat"))
    assert f"dataset 'mnist' in {folder} is prepared as tfrecord, wanted" in error_of("mnist", tmp_path)


@pytest.mark.parametrize("file", ["dataset_info.json", "features.json"])
def test_damaged_description(file, folder, tmp_path):
    (folder / file).write_text("{")
    assert error_of("mnist", tmp_path).startswith(f"cannot read the description of 'mnist' in {folder}: ")


def test_empty_split_and_missing_files_are_listed_together(folder, tmp_path):
    edit_info(folder, lambda info: info["splits"][1].update(shardLengths=["0"]))
    for shard in range(2):
        (folder / f"mnist-train.array_record-0000{shard}-of-00002").unlink()
    assert error_of("mnist", tmp_path).splitlines() == [
        f"dataset 'mnist' in {folder} is not complete:",
        "  train: no file mnist-train.array_record-00000-of-00002",
        "  train: no file mnist-train.array_record-00001-of-00002",
        "  test: got 0 examples, wanted at least 1",
    ]


def test_absent_split(folder, tmp_path):
    edit_info(folder, lambda info: info["splits"].pop(0))
    assert error_of("mnist", tmp_path).splitlines()[1:] == ["  train: got 0 examples, wanted at least 1"]


@pytest.mark.parametrize("size", [0, 70_000])
def test_truncated_shard_is_named(size, folder, tmp_path):
    shard = folder / "mnist-train.array_record-00001-of-00002"
    os.truncate(shard, size)
    assert error_of("mnist", tmp_path).startswith(f"cannot read {shard}: ")


BLACK = np.zeros((28, 28, 3), np.uint8)


@pytest.mark.parametrize(
    ("image", "problem"),
    [
        pytest.param(png(BLACK[:, :14, :1]), "got an image of size (14, 28), wanted (28, 28)", id="size"),
        pytest.param(png(BLACK), "got an image of mode 'RGB', wanted 'L'", id="mode"),
        pytest.param(png(BLACK[..., :1])[:50], "image file is truncated", id="truncated"),
        pytest.param(b"no image", "cannot identify image file", id="no image"),
    ],
)
def test_unusable_image_is_named(image, problem, tmp_path):
    folder = write_prepared(tmp_path, "mnist", dict.fromkeys(["train", "test"], [(image, 0)] * 2))
    shard = folder / "mnist-train.array_record-00000-of-00002"
    assert error_of("mnist", tmp_path).startswith(f"cannot use record 0 of {shard}: {problem}")


# Datasets.


def toy_dataset(labels, num_classes=10):
    """A dataset of one-pixel images, whose pixel is the number of the example."""
    labels = np.asarray(labels, np.int32)
    split = Batch(np.arange(len(labels), dtype=np.uint8).reshape(-1, 1, 1, 1), labels)
    return Dataset("toy", num_classes, split, split)


def test_every_problem_of_a_dataset_is_listed():
    images, labels = np.zeros((5, 8, 8, 1), np.uint8), np.arange(5, dtype=np.int32)
    with pytest.raises(DataError) as info:
        Dataset("toy", 4, Batch(images[..., 0] / 2, labels), Batch(images, labels[1:].astype(np.int64)))
    assert str(info.value).splitlines() == [
        "dataset 'toy' is not usable:",
        "  train images: got float64 [5, 8, 8], wanted uint8 [n, h, w, c]",
        "  train labels: got 0 to 4, wanted 0 to 3",
        "  test labels: got int64 [4], wanted int32 [5]",
    ]
    with pytest.raises(DataError) as info:
        Dataset("toy", 5, Batch(images, labels), Batch(images[:0], labels[:0]))
    assert str(info.value).splitlines()[1:] == ["  test: got 0 examples, wanted at least 1"]
    with pytest.raises(DataError) as info:
        Dataset("toy", 5, Batch(images, labels), Batch(images[:, 1:], labels))
    assert str(info.value).splitlines()[1:] == [
        "  test images: got shape (7, 8, 1), wanted that of the train images, (8, 8, 1)"
    ]


def test_mean_and_std_are_those_of_the_training_split():
    train = random_split(50, (6, 5, 3), seed=4)
    dataset = Dataset("toy", 10, train, random_split(9, (6, 5, 3), seed=5))
    assert dataset.mean.dtype == dataset.std.dtype == np.float32
    # The result is rounded once to float32, by at most half a unit in the last of 24 bits.
    np.testing.assert_allclose(dataset.mean, train.inputs.mean(axis=(0, 1, 2)), rtol=2**-24)
    np.testing.assert_allclose(dataset.std, train.inputs.std(axis=(0, 1, 2)), rtol=2**-24)
    subset = dataset.take(num_train=7)
    np.testing.assert_allclose(subset.mean, subset.train.inputs.mean(axis=(0, 1, 2)), rtol=2**-24)


def test_normalise_standardises_each_channel():
    images = random_split(400, (6, 5, 3), seed=6).inputs // np.array([1, 2, 8], np.uint8)
    dataset = Dataset("toy", 1, *[Batch(images, np.zeros(400, np.int32))] * 2)
    got = jax.jit(normalise)(images, dataset.mean, dataset.std)
    assert (got.dtype, got.shape) == (np.float32, images.shape)
    got = np.asarray(got, np.float64)
    # The sums are float64, so that only the rounding of float32 values of size 1 remains.
    np.testing.assert_allclose(np.mean(got, axis=(0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(np.std(got, axis=(0, 1, 2)), 1, atol=1e-6)
    one_image = normalise(images[0], dataset.mean, dataset.std)
    np.testing.assert_allclose(one_image, got[0], rtol=1e-6)  # jit may divide by multiplying


def test_constant_channel_is_normalised_to_zero():
    images = np.full((3, 2, 2, 1), 7, np.uint8)
    dataset = Dataset("toy", 1, *[Batch(images, np.zeros(3, np.int32))] * 2)
    assert dataset.std.tolist() == [1.0]
    np.testing.assert_array_equal(normalise(images, dataset.mean, dataset.std), 0.0)


@given(sizes=st.lists(st.integers(0, 25), min_size=1, max_size=9).filter(any), data=st.data())
def test_take_is_stratified_nested_and_in_stored_order(sizes, data):
    labels = data.draw(st.permutations(np.repeat(np.arange(len(sizes)), sizes).tolist()))
    dataset = toy_dataset(labels)
    total = len(labels)
    less = data.draw(st.integers(1, total), label="less")
    more = data.draw(st.integers(less, total), label="more")
    kept = {num: dataset.take(num_train=num).train for num in (less, more)}
    for num, (images, got) in kept.items():
        examples = images.ravel()
        assert len(examples) == num
        assert np.all(np.diff(examples.astype(int)) > 0)
        np.testing.assert_array_equal(got, np.asarray(labels)[examples])
        # |count − num · size / total| < 1, in integers.
        counts = np.bincount(got, minlength=len(sizes))
        assert np.all(np.abs(counts * total - num * np.asarray(sizes)) < total)
    assert set(kept[less].inputs.ravel()) <= set(kept[more].inputs.ravel())


def test_take_keeps_the_first_examples_of_each_class():
    dataset = toy_dataset([0, 0, 2, 0, 1, 1, 0, 0, 1, 2, 0, 2])
    assert dataset.take(num_train=4).train.inputs.ravel().tolist() == [0, 1, 2, 4]


def test_take_of_everything_and_of_nothing_named_changes_nothing():
    dataset = toy_dataset([0, 1, 1])
    assert dataset.take().test is dataset.test
    np.testing.assert_array_equal(dataset.take(num_test=3).test.inputs, dataset.test.inputs)


def test_take_of_a_size_that_does_not_exist():
    with pytest.raises(DataError) as info:
        toy_dataset([0, 1, 1]).take(num_train=0, num_test=4)
    assert str(info.value).splitlines() == [
        "no such subset of dataset 'toy':",
        "  num_train: got 0, wanted 1 to 3",
        "  num_test: got 4, wanted 1 to 3",
    ]


# The real datasets, where they are prepared. TFDS shuffles them when it prepares them, so the tests look at
# facts that do not depend on the order.


def real_dataset(name):
    root = os.environ.get("TFDS_DATA_DIR", "")
    if not root or not (pathlib.Path(root) / name).is_dir():
        pytest.skip(f"no {name} in TFDS_DATA_DIR")
    return load_dataset(name)


def test_real_mnist():
    mnist = real_dataset("mnist")
    assert mnist.train.inputs.shape == (60_000, 28, 28, 1)
    assert mnist.test.inputs.shape == (10_000, 28, 28, 1)
    train_counts = [5923, 6742, 5958, 6131, 5842, 5421, 5918, 6265, 5851, 5949]
    test_counts = [980, 1135, 1032, 1010, 982, 892, 958, 1028, 974, 1009]
    assert np.bincount(mnist.train.labels).tolist() == train_counts
    assert np.bincount(mnist.test.labels).tolist() == test_counts
    # The constants that are commonly used to normalise MNIST, to the digits that are usually quoted.
    np.testing.assert_allclose(mnist.mean / 255, [0.1307], atol=5e-5)
    np.testing.assert_allclose(mnist.std / 255, [0.3081], atol=5e-5)
    subset = mnist.take(num_train=2000, num_test=1000)
    shares = np.array(train_counts) / 60_000 * 2000
    assert np.all(np.abs(np.bincount(subset.train.labels) - shares) < 1)


@pytest.mark.slow
def test_real_cifar10():
    cifar10 = real_dataset("cifar10")
    assert cifar10.train.inputs.shape == (50_000, 32, 32, 3)
    assert cifar10.test.inputs.shape == (10_000, 32, 32, 3)
    assert np.bincount(cifar10.train.labels).tolist() == [5000] * 10
    assert np.bincount(cifar10.test.labels).tolist() == [1000] * 10
    np.testing.assert_allclose(cifar10.mean / 255, [0.4914, 0.4822, 0.4465], atol=1e-4)
    np.testing.assert_allclose(cifar10.std / 255, [0.2470, 0.2435, 0.2616], atol=1e-4)


def test_shrunk_images_are_means_over_areas():
    dataset = load_dataset("digits")
    small = load_dataset("digits_4x4")
    means = dataset.test.inputs.reshape(360, 4, 2, 4, 2, 1).mean(axis=(2, 4)) * (255 / 16)
    assert np.abs(small.test.inputs - means).max() <= 0.5 + 1e-3
    np.testing.assert_array_equal(small.test.labels, dataset.test.labels)
    # Three pixels of 8/3: the second has a third of pixel 2, pixels 3 and 4, and a third of pixel 5.
    third = np.zeros((3, 8))
    third[0, :3], third[1, 2:6], third[2, 5:] = (1, 1, 2 / 3), (1 / 3, 1, 1, 1 / 3), (2 / 3, 1, 1)
    means = np.einsum("ih,nhwc,jw->nijc", third * 3 / 8, dataset.train.inputs, third * 3 / 8) * (255 / 16)
    uneven = dataset.named("digits_3x3")
    assert uneven.name == "digits_3x3"
    assert np.abs(uneven.train.inputs - means).max() <= 0.5 + 1e-3
    assert dataset.named("digits") is dataset


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda: load_dataset("digits_8x8"),
            "dataset 'digits' has images of 8 × 8 pixels, which cannot be shrunk to 8 × 8",
        ),
        (
            lambda: load_dataset("digits").named("mnist_4x4"),
            "wanted dataset 'digits', or its images shrunk, got 'mnist_4x4'",
        ),
        (
            lambda: load_dataset("numbers_4x4"),
            "unknown dataset 'numbers_4x4'; known are digits, mnist, cifar10, cifar100, svhn_cropped",
        ),
    ],
)
def test_images_that_cannot_be_shrunk(call, message):
    with pytest.raises(DataError) as info:
        call()
    assert str(info.value) == message
