"""Networks that fit neither memory nor disk are refused before anything long begins."""

import shutil
from types import SimpleNamespace

import chex
import numpy as np
import pytest

from rebasin.errors import ConfigError, TrajectoryError
from rebasin.training.data import load_dataset
from rebasin.training.loop import train
from rebasin.training.recipes import Recipe
from rebasin.training.resources import available_memory, check_disk, check_memory
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")


def recipe(width):
    return Recipe("digits", "mlp", width=width, epochs=2, num_train=100, batch_size=50, warmup_epochs=1)


@pytest.mark.parametrize("width", [10**5, 10**9, 10**30])
def test_a_network_that_is_too_wide_is_refused_at_once(tmp_path, width):
    with pytest.raises(ConfigError, match="needs at least .* of memory for weights, momentum and gradients"):
        train(recipe(width), DIGITS, seed=0, directory=tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_memory_needed_and_available_are_said(monkeypatch):
    monkeypatch.setattr("rebasin.training.resources.available_memory", lambda: 3_000_000)
    check_memory(1_000_000, "it")
    with pytest.raises(ConfigError) as info:
        check_memory(1_000_001, "a network (mlp) of width 9")
    assert str(info.value) == (
        "training a network (mlp) of width 9 needs at least 3 MB of memory for weights, momentum and "
        "gradients, and 3 MB are available; choose a smaller width"
    )
    monkeypatch.setattr("rebasin.training.resources.available_memory", lambda: None)
    check_memory(10**18, "it")


def test_available_memory_is_part_of_the_memory():
    available = available_memory()
    assert available is None or 10**7 < available < 10**15


def test_disk_space_needed_and_free_are_said(tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=6_000))
    folder = tmp_path / "to" / "come"
    check_disk(1_000, 3, folder, "the networks")
    check_disk(1_000, 4, folder, "the networks", stored=2_000)
    with pytest.raises(ConfigError) as info:
        check_disk(1_000, 4, folder, "the networks")
    assert str(info.value) == (
        f"storing the networks in {folder} needs up to 8 kB of disk space (4 epochs with their momentum), "
        "and 6 kB are free; keep fewer epochs, or choose another folder or a smaller width"
    )


def test_training_counts_the_epochs_that_it_will_store(tmp_path, monkeypatch):
    def refuse(size, num_epochs, *_):
        raise ConfigError(f"{num_epochs} epochs of {size} bytes")

    monkeypatch.setattr("rebasin.training.loop.check_disk", refuse)
    size = 4 * (64 + 1 + 1 + 1 + 1 + 1 + 10 + 10)  # kernels and biases of 64-1-1-1-10
    for keep, count in ((None, 3), ((), 2)):
        with pytest.raises(ConfigError, match=f"^{count} epochs of {size} bytes$"):
            train(recipe(1), DIGITS, seed=0, directory=tmp_path / "run", keep=keep, resume=True)


def test_a_checkpoint_that_cannot_be_written_is_one_error(finished, copied, capfd):
    resource = pytest.importorskip("resource")
    trajectory, limits = Trajectory(copied), resource.getrlimit(resource.RLIMIT_FSIZE)
    noise = np.random.default_rng(0).normal(size=(8, 10_000))
    resource.setrlimit(resource.RLIMIT_FSIZE, (3_000, limits[1]))
    try:
        with pytest.raises(TrajectoryError) as info:
            trajectory.save(7, {f"leaf_{i}": row for i, row in enumerate(noise)}, {})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert str(info.value) == (
        f"epoch 7 cannot be stored in {copied}: File too large. Epochs before it are stored; mend that and "
        "resume (resume=True, or --resume of an experiment)"
    )
    assert capfd.readouterr().err == ""
    chex.assert_trees_all_equal(Trajectory(copied).last, finished.last)
