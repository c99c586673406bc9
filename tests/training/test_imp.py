"""Iterative magnitude pruning: levels by hand, both rewindings, resuming, and what cannot work."""

import shutil

import chex
import jax
import numpy as np
import pytest

from rebasin.errors import ConfigError, TrajectoryError
from rebasin.masks import apply_mask, load_mask, sparsity_report
from rebasin.pruning import level_sparsity, magnitude_mask, prunable_leaves
from rebasin.training.data import load_dataset
from rebasin.training.imp import prune_iteratively
from rebasin.training.loop import InitialState, train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
RECIPE = Recipe("digits", "mlp", width=8, epochs=3, num_train=200, batch_size=64, warmup_epochs=1)
SIZE = 64 * 8 + 8 * 8 + 8 * 8 + 8 * 10
REWINDS = ("weights", "learning_rate")


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    return train(RECIPE, DIGITS, seed=0, directory=tmp_path_factory.mktemp("run") / "dense")


@pytest.fixture(scope="module")
def sequences(parent, tmp_path_factory):
    """Three levels by each rewinding, uninterrupted."""
    folder = tmp_path_factory.mktemp("imp")
    options = {"levels": 3, "rewind_epoch": 1}
    return {
        rewind: list(prune_iteratively(parent, DIGITS, directory=folder / rewind, rewind=rewind, **options))
        for rewind in REWINDS
    }


@pytest.mark.parametrize("rewind", REWINDS)
def test_levels_are_those_by_hand(rewind, parent, sequences, tmp_path):
    levels = sequences[rewind]
    assert [level.level for level in levels] == [0, 1, 2, 3]
    assert levels[0].trajectory is parent
    leaves = prunable_leaves(parent.last)
    kept = [sparsity_report(level.mask, leaves).total.kept for level in levels]
    assert kept == [SIZE * 4**i // 5**i for i in range(4)]

    mask = magnitude_mask(levels[1].trajectory.last, level_sparsity(2), within=levels[1].mask)
    chex.assert_trees_all_equal(levels[2].mask, mask)
    start = parent[1] if rewind == "weights" else levels[1].trajectory.last
    by_hand = train(RECIPE, DIGITS, seed=0, directory=tmp_path, start=InitialState(start, 1), mask=mask)
    chex.assert_trees_all_equal(by_hand[1], apply_mask(mask, start))
    chex.assert_trees_all_equal(levels[2].trajectory.last, by_hand.last)
    for level in levels[1:]:
        assert level.trajectory.epochs == (3,)
        stored = load_mask(level.trajectory.directory.with_suffix(".npz"), parent.last)
        chex.assert_trees_all_equal(stored, level.mask)
        zeros = jax.tree.map(lambda mask, leaf: leaf[~mask], level.mask, level.trajectory.last)
        assert all(values.tobytes() == bytes(values.nbytes) for values in jax.tree.leaves(zeros))


@pytest.mark.parametrize("rewind", REWINDS)
def test_resumed_is_uninterrupted(rewind, parent, sequences, tmp_path):
    options = {"directory": tmp_path, "levels": 3, "rewind_epoch": 1, "rewind": rewind, "keep": None}
    seen = []

    def kill(level, epoch, last, metrics):
        seen.append((level, epoch, last))
        if (level, epoch) == (2, 2):
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        list(prune_iteratively(parent, DIGITS, **options, progress=kill))
    assert seen == [(1, 2, 3), (1, 3, 3), (2, 2, 3)]
    assert Trajectory(tmp_path / "level_02").epochs == (1, 2)
    with pytest.raises(TrajectoryError, match="level_02 holds an unfinished run"):
        list(prune_iteratively(parent, DIGITS, **options))
    seen.clear()
    resumed = list(
        prune_iteratively(
            parent, DIGITS, **options, resume=True, progress=lambda *args: seen.append(args[:3])
        )
    )
    assert seen == [(2, 3, 3), (3, 2, 3), (3, 3, 3)]
    for level, whole in zip(resumed, sequences[rewind], strict=True):
        chex.assert_trees_all_equal(level.mask, whole.mask)
        chex.assert_trees_all_equal(level.trajectory.last, whole.trajectory.last)

    # A mask that was lost with its file is written again, and finished levels are only read.
    (tmp_path / "level_01.npz").unlink()
    again = list(prune_iteratively(parent, DIGITS, **options))
    chex.assert_trees_all_equal(again[3].trajectory.last, resumed[3].trajectory.last)
    chex.assert_trees_all_equal(load_mask(tmp_path / "level_01.npz", parent.last), resumed[1].mask)


def test_the_two_rewindings_differ(sequences):
    first, second = (sequences[rewind] for rewind in REWINDS)
    chex.assert_trees_all_equal(first[1].mask, second[1].mask)
    kernels = [s[1].trajectory.last["params"]["Dense_1"]["kernel"] for s in (first, second)]
    assert not np.array_equal(*kernels)


def test_levels_of_other_leaves_or_fractions_are_another_run(parent, sequences):
    directory = sequences["weights"][1].trajectory.directory.parent
    for change in ({"fraction": 0.5}, {"leaves": ["params/Dense_0/kernel"]}):
        with pytest.raises(TrajectoryError) as info:
            list(prune_iteratively(parent, DIGITS, directory=directory, levels=1, rewind_epoch=1, **change))
        assert "level_01 holds another run:\n  mask: stored" in str(info.value)


def test_what_cannot_work_is_said_before_anything_is_trained(parent, tmp_path):
    sparse = Trajectory(shutil.copytree(parent.directory, tmp_path / "sparse"))
    sparse.drop((1,))
    folder = shutil.copytree(parent.directory, tmp_path / "unfinished")
    shutil.rmtree(folder / "3")
    unfinished = Trajectory(folder)
    for network, change, kind, message in (
        (parent, {"rewind_epoch": 3}, ConfigError, "rewind_epoch: wanted at least 0 and less than 3, got 3"),
        (
            parent,
            {"rewind_epoch": -1},
            ConfigError,
            "rewind_epoch: wanted at least 0 and less than 3, got -1",
        ),
        (parent, {"rewind": "no"}, ConfigError, "rewind: wanted one of weights, learning_rate, got 'no'"),
        (parent, {"levels": -1}, ConfigError, "levels: wanted at least 0, got -1"),
        (parent, {"fraction": 1.0}, ConfigError, "fraction: wanted at least 0 and less than 1, got 1.0"),
        (parent, {"leaves": ["x"]}, ConfigError, "leaves do not fit the tree:\n  no leaf 'x'"),
        (
            parent,
            {"levels": 24},
            ConfigError,
            "sparsity: 0.995278 keeps 3 of the 720 weights of 4 leaves; wanted at least one weight per leaf",
        ),
        (
            sparse,
            {},
            TrajectoryError,
            f"epoch 1 of {sparse.directory} is not stored; stored epochs: 0, 2-3",
        ),
        (
            unfinished,
            {},
            TrajectoryError,
            f"{unfinished.directory} is not finished: its last epoch, 3, is not stored",
        ),
    ):
        with pytest.raises(kind) as info:
            prune_iteratively(
                network, DIGITS, **{"directory": tmp_path / "imp", "levels": 2, "rewind_epoch": 1, **change}
            )
        assert str(info.value) == message
    assert not (tmp_path / "imp").exists()
    # The learning rate returns to an epoch whose weights nobody needs.
    options = {"levels": 2, "rewind_epoch": 1, "rewind": "learning_rate"}
    assert next(prune_iteratively(sparse, DIGITS, directory=tmp_path / "imp", **options)).level == 0
