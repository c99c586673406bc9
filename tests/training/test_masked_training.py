"""Training with a mask: pruned weights stay zero in every bit, and other runs do not change."""

import dataclasses
import json

import chex
import flax.linen as nn
import jax
import numpy as np
import pytest

from rebasin import models
from rebasin.errors import ConfigError, TrajectoryError, TreeMismatchError
from rebasin.masks import apply_mask, full_mask, mask_digest
from rebasin.models import BatchNorm
from rebasin.pruning import magnitude_mask
from rebasin.training.data import load_dataset
from rebasin.training.loop import InitialState, TrainingData, build_epoch, build_init, train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")

# The decay is large enough to have an effect.
RECIPE = Recipe(
    "digits", "mlp", width=8, epochs=3, num_train=200, batch_size=64, warmup_epochs=1, weight_decay=0.1
)


@pytest.fixture(scope="module")
def dense(tmp_path_factory):
    return train(RECIPE, DIGITS, seed=0, directory=tmp_path_factory.mktemp("run") / "dense")


@pytest.fixture(scope="module")
def mask(dense):
    return magnitude_mask(dense.last, 0.8)


@pytest.fixture(scope="module")
def masked(dense, mask, tmp_path_factory):
    """The dense network rewound to epoch 1 and trained with its mask."""
    directory = tmp_path_factory.mktemp("run") / "masked"
    return train(RECIPE, DIGITS, seed=0, directory=directory, start=InitialState(dense[1], 1), mask=mask)


def test_pruned_weights_are_zero_in_every_bit_and_others_are_trained(dense, masked, mask):
    chex.assert_trees_all_equal(masked[1], apply_mask(mask, dense[1]))
    for epoch in masked:
        state = masked.restore(epoch, {"variables": dense[1], "optimizer": momentum_like(dense)})
        trees = {"variables": state["variables"], "momentum": {"params": state["optimizer"][1]["trace"]}}
        for tree in (trees["variables"], trees["momentum"]["params"]):
            for kept, leaf in zip(jax.tree.leaves(mask), jax.tree.leaves(tree), strict=True):
                assert leaf[~kept].tobytes() == bytes(leaf[~kept].nbytes)  # not even a minus before a zero
    leaves = zip(*map(jax.tree.leaves, (mask, masked[1], masked[3])), strict=True)
    moved = np.concatenate([(first != last)[kept] for kept, first, last in leaves])
    assert moved.mean() > 0.9


def momentum_like(trajectory):
    """The stored optimiser state of an MLP: nothing for the decay, and the momentum."""
    return [None, {"trace": trajectory[1]}]


def test_a_masked_step_is_a_step_of_the_masked_gradient(dense, mask):
    """Without decay and momentum the first step moves what stays as the dense step from there moves it."""
    recipe = dataclasses.replace(RECIPE, weight_decay=0.0, momentum=0.0, batch_size=200)
    data = TrainingData(*jax.device_put((DIGITS.take(num_train=200).train, DIGITS.mean, DIGITS.std)))
    run_epoch, key = build_epoch(recipe, 10), jax.random.key(7)

    def state():
        fresh = build_init(recipe, 10)(jax.random.key(0), data)
        return fresh._replace(variables=apply_mask(mask, dense[1]))

    after = run_epoch(state(), 2, key, data)[0].variables
    masked = run_epoch(state(), 2, key, data, {"params": mask["params"]})[0].variables
    # Two programs may sum in another order.
    chex.assert_trees_all_close(masked, apply_mask(mask, after), atol=1e-6)
    assert not np.allclose(after["params"]["Dense_0"]["kernel"], masked["params"]["Dense_0"]["kernel"])


def test_a_mask_that_keeps_all_trains_as_no_mask(dense, tmp_path):
    whole = train(RECIPE, DIGITS, seed=0, directory=tmp_path, mask=full_mask(dense.last))
    # Two programs may sum in another order.
    chex.assert_trees_all_close(whole.last, dense.last, atol=1e-5)


def test_without_a_mask_the_program_and_the_record_are_those_of_before(dense):
    content = json.loads((dense.directory / "run.json").read_text())
    assert content["schema_version"] == 1
    assert "mask" not in content
    # The hash of a run of an earlier version, with which its epochs are stored.
    record = dataclasses.replace(dense.record, recipe=Recipe("digits", "mlp", width=8, epochs=6), seed=3)
    assert record.digest == "3ddb51cd702241f4"
    data = TrainingData(*jax.device_put((DIGITS.take(num_train=200).train, DIGITS.mean, DIGITS.std)))
    state = jax.eval_shape(build_init(RECIPE, 10), jax.random.key(0), data)
    epoch = build_epoch(RECIPE, 10)
    without, absent = (
        epoch.lower(state, 1, jax.random.key(0), data, *masks).as_text() for masks in ((), (None,))
    )
    masks = {"params": full_mask(dense.last)["params"]}
    chosen = epoch.lower(state, 1, jax.random.key(0), data, masks).as_text()
    assert without == absent
    assert chosen.count("stablehlo.select") > without.count("stablehlo.select")


def test_the_record_holds_the_mask(masked, mask, dense, tmp_path):
    content = json.loads((masked.directory / "run.json").read_text())
    assert content["schema_version"] == 2
    assert content["mask"] == mask_digest(mask) == Trajectory(masked.directory).record.mask
    options = {"seed": 0, "directory": masked.directory, "start": InitialState(dense[1], 1)}
    assert train(RECIPE, DIGITS, **options, mask=mask).directory == masked.directory
    other = magnitude_mask(dense.last, 0.5)
    for given, digest in ((None, None), (other, mask_digest(other))):
        with pytest.raises(TrajectoryError) as info:
            train(RECIPE, DIGITS, **options, mask=given)
        assert str(info.value).splitlines() == [
            f"{masked.directory} holds another run:",
            f"  mask: stored {mask_digest(mask)!r}, wanted {digest!r}",
        ]


def test_a_damaged_record_of_a_mask(masked, tmp_path):
    content = json.loads((masked.directory / "run.json").read_text())
    for value in (None, 3, [1]):
        (tmp_path / "run.json").write_text(json.dumps(content | {"mask": value}))
        with pytest.raises(TrajectoryError, match="run.json is damaged"):
            Trajectory(tmp_path)


def test_a_killed_run_resumes_to_the_same_bits(dense, masked, mask, tmp_path):
    def kill(epoch, *_):
        if epoch == 2:
            raise KeyboardInterrupt

    options = {"seed": 0, "directory": tmp_path, "start": InitialState(dense[1], 1), "mask": mask}
    with pytest.raises(KeyboardInterrupt):
        train(RECIPE, DIGITS, **options, progress=kill)
    assert Trajectory(tmp_path).epochs == (1, 2)
    resumed = train(RECIPE, DIGITS, **options, resume=True)
    for epoch in masked:
        chex.assert_trees_all_equal(resumed[epoch], masked[epoch])


class Normed(nn.Module):
    """One hidden layer with BatchNorm."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(8)(images.reshape(len(images), -1))
        return nn.Dense(10)(nn.relu(BatchNorm()(x)))


@pytest.mark.slow
def test_statistics_are_not_pruned(monkeypatch, tmp_path):
    monkeypatch.setitem(models.MODELS, "normed", lambda width, num_classes: Normed())
    recipe = dataclasses.replace(RECIPE, model="normed", epochs=1)
    data = TrainingData(*jax.device_put((DIGITS.take(num_train=200).train, DIGITS.mean, DIGITS.std)))
    variables = build_init(recipe, 10)(jax.random.key(0), data).variables
    mask = magnitude_mask(variables, 0.5)
    trained = train(recipe, DIGITS, seed=0, directory=tmp_path / "run", mask=mask)
    assert not np.asarray(trained.last["params"]["Dense_0"]["kernel"])[
        ~mask["params"]["Dense_0"]["kernel"]
    ].any()
    assert trained.last["batch_stats"]["BatchNorm_0"]["mean"].any()

    mask["batch_stats"]["BatchNorm_0"]["mean"][3] = False
    with pytest.raises(ConfigError) as info:
        train(recipe, DIGITS, seed=0, directory=tmp_path / "other", mask=mask)
    assert str(info.value).splitlines() == [
        "the mask cannot work:",
        "  batch_stats/BatchNorm_0/mean: not trained, and yet pruned",
    ]


def test_a_mask_that_does_not_fit(mask, tmp_path):
    lacking = {"params": {name: mask["params"][name] for name in ("Dense_0", "Dense_1", "Dense_2")}}
    with pytest.raises(TreeMismatchError) as info:
        train(RECIPE, DIGITS, seed=0, directory=tmp_path / "run", mask=lacking)
    assert str(info.value).splitlines() == [
        "the recipe's model and mask differ:",
        "  params/Dense_3/bias: only in the recipe's model",
        "  params/Dense_3/kernel: only in the recipe's model",
    ]
    assert not (tmp_path / "run").exists()
