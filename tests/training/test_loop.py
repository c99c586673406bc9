import dataclasses
import math

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from rebasin import models
from rebasin.barrier import classification_metrics
from rebasin.batches import Batch
from rebasin.errors import ConfigError, DataError, NonFiniteError, TreeMismatchError
from rebasin.models import BatchNorm, build_model
from rebasin.training import loop
from rebasin.training.data import load_dataset, normalise
from rebasin.training.loop import (
    InitialState,
    TrainingData,
    build_apply,
    build_epoch,
    build_init,
    learning_rate,
    shuffled_batches,
    train,
)
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

DIGITS = load_dataset("digits")
MODEL = build_model("mlp", width=8, num_classes=10)
METRICS = classification_metrics(build_apply(MODEL, DIGITS))

# An epoch has three steps of 64 examples and leaves out eight. The decay is large enough to have an effect.
RECIPE = Recipe(
    "digits",
    "mlp",
    width=8,
    epochs=3,
    num_train=200,
    batch_size=64,
    warmup_epochs=1,
    weight_decay=0.1,
)


@pytest.fixture(scope="module")
def trajectory(tmp_path_factory):
    return train(RECIPE, DIGITS, seed=0, directory=tmp_path_factory.mktemp("run") / "seed_0")


def training_data(recipe):
    split = DIGITS.take(num_train=recipe.num_train).train
    return TrainingData(*jax.device_put((split, DIGITS.mean, DIGITS.std)))


def rate_by_hand(recipe, num_steps, step):
    warmup, total = recipe.warmup_epochs * num_steps, recipe.epochs * num_steps
    if step < warmup:
        return recipe.peak_learning_rate * step / warmup
    return recipe.peak_learning_rate * (1 + math.cos(math.pi * (step - warmup) / (total - warmup))) / 2


@pytest.mark.parametrize("warmup", [0, 1, 5, 7])
def test_learning_rate_equals_its_closed_form(warmup):
    recipe = dataclasses.replace(RECIPE, epochs=7, warmup_epochs=warmup)
    schedule = learning_rate(recipe, num_steps=11)
    rates = np.array([schedule(step) for step in range(77)])
    # Near π the cosine is flat, so that the error of float32 against float64 is tiny.
    np.testing.assert_allclose(rates, [rate_by_hand(recipe, 11, step) for step in range(77)], atol=1e-8)


def test_a_warm_up_of_steps():
    recipe = dataclasses.replace(RECIPE, epochs=7, warmup_epochs=0, warmup_steps=10)
    schedule = learning_rate(recipe, num_steps=11)
    by_hand = [
        0.1 * t / 10 if t < 10 else 0.1 * (1 + math.cos(math.pi * (t - 10) / 67)) / 2 for t in range(77)
    ]
    np.testing.assert_allclose([schedule(step) for step in range(77)], by_hand, atol=1e-8)
    longer = learning_rate(dataclasses.replace(recipe, warmup_epochs=1), num_steps=11)
    assert longer(20) == pytest.approx(0.1 * 20 / 21)


def test_learning_rate_at_its_corners():
    recipe = Recipe("digits", "mlp", width=8, epochs=30, warmup_epochs=5)
    schedule = learning_rate(recipe, num_steps=11)
    assert schedule(0) == 0.0
    assert schedule(54) == pytest.approx(0.1 * 54 / 55)
    assert schedule(55) == pytest.approx(0.1)
    assert schedule(55 + 275 // 2) == pytest.approx(0.05, rel=0.02)
    # The last step is one step before the rate is zero: 0.1 · sin²(π / 550).
    assert schedule(329) == pytest.approx(0.1 * math.sin(math.pi / 550) ** 2, rel=1e-2)


def test_batches_hold_every_example_at_most_once_and_differ():
    batches = np.array([shuffled_batches(jax.random.key(seed), 200, 64) for seed in range(5)])
    assert batches.shape == (5, 3, 64)
    assert all(len(np.unique(epoch)) == 192 for epoch in batches)
    assert batches.min() >= 0
    assert batches.max() < 200
    assert len({epoch.tobytes() for epoch in batches}) == 5
    assert len({frozenset(epoch.flat) for epoch in batches}) == 5  # another eight are left out each time


def test_an_epoch_equals_its_steps_by_hand():
    data, key, epoch = training_data(RECIPE), jax.random.key(7), 2
    state = build_init(RECIPE, 10)(jax.random.key(1), data)
    gradient_fn = jax.jit(jax.grad(lambda w, batch: jnp.mean(METRICS(w, batch)["loss"])))
    weights = jax.device_get(state.variables)
    momentum = jax.tree.map(np.zeros_like, weights)
    shuffle_key, _ = jax.random.split(jax.random.fold_in(key, epoch))
    losses = []
    for index, batch in enumerate(shuffled_batches(shuffle_key, 200, 64)):
        batch = Batch(data.examples.inputs[batch], data.examples.labels[batch])
        losses.append(METRICS(weights, batch)["loss"].mean())
        gradient = jax.device_get(gradient_fn(weights, batch))
        rate = rate_by_hand(RECIPE, 3, 3 + index)  # the second epoch of three steps
        momentum = jax.tree.map(lambda m, g, w: 0.9 * m + g + 0.1 * w, momentum, gradient, weights)
        weights = jax.tree.map(lambda w, m, rate=rate: w - rate * m, weights, momentum)

    state, metrics = build_epoch(RECIPE, 10)(state, epoch, key, data)

    # Both sum the same float32 terms in another order, over three steps.
    chex.assert_trees_all_close(state.variables, weights, atol=1e-6)
    assert metrics.loss == pytest.approx(np.mean(losses), rel=1e-5)


def test_an_epoch_of_adam_equals_its_steps_by_hand():
    recipe = dataclasses.replace(RECIPE, optimizer="adam", peak_learning_rate=0.01)
    data, key, epoch = training_data(recipe), jax.random.key(7), 2
    state = build_init(recipe, 10)(jax.random.key(1), data)
    gradient_fn = jax.jit(jax.grad(lambda w, batch: jnp.mean(METRICS(w, batch)["loss"])))
    weights = jax.device_get(state.variables)
    first = second = jax.tree.map(np.zeros_like, weights)
    shuffle_key, _ = jax.random.split(jax.random.fold_in(key, epoch))
    for index, batch in enumerate(shuffled_batches(shuffle_key, 200, 64)):
        batch = Batch(data.examples.inputs[batch], data.examples.labels[batch])
        gradient = jax.device_get(gradient_fn(weights, batch))
        gradient = jax.tree.map(lambda g, w: g + 0.1 * w, gradient, weights)
        first = jax.tree.map(lambda m, g: 0.9 * m + 0.1 * g, first, gradient)
        second = jax.tree.map(lambda v, g: 0.999 * v + 0.001 * g * g, second, gradient)
        rate, t = rate_by_hand(recipe, 3, 3 + index), index + 1
        weights = jax.tree.map(
            lambda w, m, v, rate=rate, t=t: (
                w - rate * (m / (1 - 0.9**t)) / (np.sqrt(v / (1 - 0.999**t)) + 1e-8)
            ),
            weights,
            first,
            second,
        )

    state, _ = build_epoch(recipe, 10)(state, epoch, key, data)

    # Gradients near zero are divided by their own size, which magnifies their rounding.
    chex.assert_trees_all_close(state.variables, weights, atol=1e-4)


def test_a_subset_is_normalised_with_the_statistics_of_the_whole_dataset(trajectory):
    """The first stored epoch is the one that starts from these statistics, and from no others."""
    init_key, data_key = jax.random.split(jax.random.key(trajectory.seed))
    subset = DIGITS.take(num_train=RECIPE.num_train)
    assert not np.allclose(subset.mean, DIGITS.mean, rtol=1e-3)

    def first_epoch(statistics):
        data = TrainingData(*jax.device_put((subset.train, statistics.mean, statistics.std)))
        state = build_init(RECIPE, 10)(init_key, data)
        return build_epoch(RECIPE, 10)(state, 1, data_key, data)[0].variables

    chex.assert_trees_all_equal(trajectory[1], jax.device_get(first_epoch(DIGITS)))
    own = jax.device_get(first_epoch(subset))["params"]["Dense_0"]["kernel"]
    assert not np.array_equal(trajectory[1]["params"]["Dense_0"]["kernel"], own)


def test_augmentation_reaches_the_batches():
    plain, augmented = RECIPE, dataclasses.replace(RECIPE, augment=True)
    data = training_data(plain)
    ends = [
        build_epoch(recipe, 10)(build_init(plain, 10)(jax.random.key(1), data), 2, jax.random.key(7), data)
        for recipe in (plain, augmented)
    ]
    assert ends[0][1].loss != ends[1][1].loss


def test_metrics_are_per_example():
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    batch = Batch(DIGITS.test.inputs[:5], DIGITS.test.labels[:5])
    values = METRICS(variables, batch)
    inputs = (batch.inputs.astype(np.float32) - DIGITS.mean) / DIGITS.std
    logits = np.asarray(MODEL.apply(variables, inputs), np.float64)
    log_likelihood = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    np.testing.assert_allclose(values["loss"], -log_likelihood[np.arange(5), batch.labels], rtol=1e-5)
    np.testing.assert_array_equal(values["error"], (logits.argmax(axis=1) != batch.labels).astype(np.float32))
    assert values["error"].dtype == np.float32


def test_apply_normalises_and_is_traced_once_for_equal_models_and_statistics():
    variables = MODEL.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
    images = DIGITS.test.inputs[:5]
    trace = chex.assert_max_traces(n=1)(lambda apply_fn, variables, images: apply_fn(variables, images))
    compiled = jax.jit(trace, static_argnums=0)
    expected = MODEL.apply(variables, (images.astype(np.float32) - DIGITS.mean) / DIGITS.std)
    equal_model = build_model("mlp", width=8, num_classes=10)
    for apply_fn in (build_apply(MODEL, DIGITS), build_apply(equal_model, (DIGITS.mean, DIGITS.std))):
        np.testing.assert_allclose(compiled(apply_fn, variables, images), expected, rtol=1e-5, atol=1e-5)
    assert build_apply(MODEL, DIGITS) != build_apply(MODEL, (DIGITS.mean, 2 * DIGITS.std))


def test_same_seed_same_bits_and_other_seeds_differ(trajectory, tmp_path, monkeypatch):
    traces = []
    monkeypatch.setattr(loop, "learning_rate", lambda *args: traces.append(args) or learning_rate(*args))
    again = train(RECIPE, DIGITS, seed=0, directory=tmp_path / "again")
    other = train(RECIPE, DIGITS, seed=1, directory=tmp_path / "other")
    for epoch in range(4):
        chex.assert_trees_all_equal(again[epoch], trajectory[epoch])
        kernels = [run[epoch]["params"]["Dense_0"]["kernel"] for run in (trajectory, other)]
        assert not np.array_equal(*kernels)
    assert again.metrics(3) == trajectory.metrics(3)
    # Three networks share one program. It was traced for the first of them only, before `traces` began.
    assert build_epoch(dataclasses.replace(RECIPE), 10) is build_epoch(RECIPE, 10)
    assert traces == []


def test_progress_and_metrics_tell_the_same(tmp_path):
    calls = []
    trajectory = train(RECIPE, DIGITS, seed=2, directory=tmp_path, progress=lambda *call: calls.append(call))
    assert calls == [(epoch, 3, trajectory.metrics(epoch)) for epoch in (1, 2, 3)]
    assert trajectory.metrics(0) == {}
    assert set(trajectory.metrics(1)) == {"loss", "error"}
    assert trajectory.metrics(3)["loss"] < trajectory.metrics(1)["loss"]


@pytest.mark.slow
def test_digits_are_learned_in_a_few_epochs(tmp_path):
    recipe = Recipe("digits", "mlp", width=64, epochs=8, warmup_epochs=1)
    trajectory = train(recipe, DIGITS, seed=0, directory=tmp_path)
    metrics_fn = classification_metrics(build_apply(build_model("mlp", width=64, num_classes=10), DIGITS))
    error = metrics_fn(trajectory.last, DIGITS.test)["error"].mean()
    assert error < 0.06
    assert trajectory.metrics(8)["error"] < 0.06


def test_without_momentum_a_child_of_the_same_seed_is_its_parent(tmp_path):
    # Without momentum a child starts in the same state as its parent, so that it ends there too if the data
    # order and the learning rate continue where those of the parent were.
    recipe = dataclasses.replace(RECIPE, momentum=0.0)
    parent = train(recipe, DIGITS, seed=0, directory=tmp_path / "parent")
    child = train(recipe, DIGITS, seed=0, directory=tmp_path / "child", start=InitialState(parent[1], 1))
    assert child.epochs == (1, 2, 3)
    for epoch in child:
        chex.assert_trees_all_equal(child[epoch], parent[epoch])


def test_children_of_other_seeds_part_and_leave_their_start_alone(trajectory, tmp_path):
    start = jax.tree.map(jnp.array, trajectory[1])
    children = [
        train(RECIPE, DIGITS, seed=seed, directory=tmp_path / str(seed), start=InitialState(start, 1))
        for seed in (5, 6)
    ]
    chex.assert_trees_all_equal(start, trajectory[1])
    chex.assert_trees_all_equal(*(child[1] for child in children), start)
    kernels = [child.last["params"]["Dense_0"]["kernel"] for child in children]
    assert not np.array_equal(*kernels)


def test_divergence_says_when_and_keeps_what_was_stored(tmp_path):
    recipe = dataclasses.replace(RECIPE, peak_learning_rate=1e20, warmup_epochs=1)
    with pytest.raises(NonFiniteError) as info:
        train(recipe, DIGITS, seed=0, directory=tmp_path)
    assert str(info.value).splitlines() == [
        f"training of {tmp_path} diverged in epoch 1 of 3: the mean training loss is nan",
        "  Epochs before it are stored. Try a lower peak_learning_rate (now 1e+20) or more warmup_epochs "
        "(now 1).",
    ]
    assert Trajectory(tmp_path).epochs == (0,)
    with pytest.raises(NonFiniteError):
        train(recipe, DIGITS, seed=0, directory=tmp_path, resume=True)


def test_recipe_and_dataset_must_fit(tmp_path):
    with pytest.raises(ConfigError) as info:
        train(
            dataclasses.replace(RECIPE, dataset="mnist", batch_size=201),
            DIGITS,
            seed=0,
            directory=tmp_path / "run",
        )
    assert str(info.value).splitlines() == [
        "recipe and dataset do not fit:",
        "  dataset: recipe says 'mnist', got 'digits'",
        "  batch_size: wanted at most the 200 examples, got 201",
    ]
    with pytest.raises(DataError, match="num_train: got 1438, wanted 1 to 1437"):
        train(dataclasses.replace(RECIPE, num_train=1438), DIGITS, seed=0, directory=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_start_must_fit(trajectory, tmp_path):
    with pytest.raises(ConfigError) as info:
        train(RECIPE, DIGITS, seed=0, directory=tmp_path, start=InitialState(trajectory[3], 3))
    assert str(info.value) == "start.epoch: wanted at least 0 and less than 3, got 3"

    smaller = {"params": {name: trajectory[1]["params"][name] for name in ("Dense_0", "Dense_1", "Dense_2")}}
    with pytest.raises(TreeMismatchError) as info:
        train(RECIPE, DIGITS, seed=0, directory=tmp_path, start=InitialState(smaller, 1))
    assert str(info.value).splitlines() == [
        "start.variables and the recipe's model differ:",
        "  params/Dense_3/bias: only in the recipe's model",
        "  params/Dense_3/kernel: only in the recipe's model",
    ]

    broken = jax.tree.map(lambda leaf: leaf * np.float32("nan"), trajectory[1])
    with pytest.raises(NonFiniteError, match="start.variables is not finite"):
        train(RECIPE, DIGITS, seed=0, directory=tmp_path, start=InitialState(broken, 1))


class Normed(nn.Module):
    """One hidden layer with BatchNorm: the smallest network that has running statistics."""

    @nn.compact
    def __call__(self, images):
        x = nn.Dense(8)(images.reshape(len(images), -1))
        return nn.Dense(10)(nn.relu(BatchNorm()(x)))


NORMED = dataclasses.replace(RECIPE, model="normed")


@pytest.fixture
def normed(monkeypatch):
    """The model above, registered under a name."""
    monkeypatch.setitem(models.MODELS, "normed", lambda width, num_classes: Normed())
    return Normed()


def test_running_statistics_are_carried_and_nothing_else_touches_them(normed):
    data, key, epoch = training_data(NORMED), jax.random.key(7), 2
    state = build_init(NORMED, 10)(jax.random.key(1), data)
    assert jax.tree.structure(state.optimizer[1].trace) == jax.tree.structure(
        {"params": state.variables["params"]}
    )
    variables = jax.device_get(state.variables)
    np.testing.assert_array_equal(variables["batch_stats"]["BatchNorm_0"]["var"], 1)

    @jax.jit
    def loss_and_statistics(weights, statistics, batch):
        images = normalise(data.examples.inputs[batch], data.mean, data.std)
        trained = {"params": weights, "batch_stats": statistics}
        logits, updated = normed.apply(trained, images, mutable=["batch_stats"])
        likelihood = jax.nn.log_softmax(logits)[jnp.arange(len(batch)), data.examples.labels[batch]]
        return -jnp.mean(likelihood), updated["batch_stats"]

    weights, statistics = variables["params"], variables["batch_stats"]
    momentum = jax.tree.map(np.zeros_like, weights)
    shuffle_key, _ = jax.random.split(jax.random.fold_in(key, epoch))
    for index, batch in enumerate(shuffled_batches(shuffle_key, 200, 64)):
        gradient, statistics = jax.grad(loss_and_statistics, has_aux=True)(weights, statistics, batch)
        rate = rate_by_hand(NORMED, 3, 3 + index)
        momentum = jax.tree.map(lambda m, g, w: 0.9 * m + g + 0.1 * w, momentum, gradient, weights)
        weights = jax.tree.map(lambda w, m, rate=rate: w - rate * m, weights, momentum)

    state, _ = build_epoch(NORMED, 10)(state, epoch, key, data)
    assert not np.allclose(statistics["BatchNorm_0"]["mean"], 0, atol=1e-3)
    expected = {"params": weights, "batch_stats": statistics}
    # Both sum the same float32 terms in another order, over three steps.
    chex.assert_trees_all_close(state.variables, expected, rtol=1e-4, atol=1e-5)


def test_running_statistics_are_stored_resumed_and_inherited(normed, tmp_path):
    recipe = dataclasses.replace(NORMED, momentum=0.0)  # a child of the same seed is then its parent
    whole = train(recipe, DIGITS, seed=0, directory=tmp_path / "whole")

    def kill(epoch, *_):
        if epoch == 1:
            raise KeyboardInterrupt

    for progress in (kill, None):
        try:
            train(recipe, DIGITS, seed=0, directory=tmp_path / "killed", progress=progress, resume=True)
        except KeyboardInterrupt:
            assert Trajectory(tmp_path / "killed").epochs == (0, 1)
    child = train(recipe, DIGITS, seed=0, directory=tmp_path / "child", start=InitialState(whole[1], 1))
    statistics = [whole[epoch]["batch_stats"]["BatchNorm_0"]["mean"] for epoch in whole]
    assert all(not np.array_equal(*pair) for pair in zip(statistics, statistics[1:], strict=False))
    for other in (Trajectory(tmp_path / "killed"), child):
        chex.assert_trees_all_equal(other.last, whole.last)

    # Evaluation treats each example by itself, whereas training would normalise by the batch.
    metrics_fn = classification_metrics(build_apply(normed, DIGITS))
    together = metrics_fn(whole.last, DIGITS.test)["loss"][:3]
    alone = [metrics_fn(whole.last, Batch(*(x[i : i + 1] for x in DIGITS.test)))["loss"][0] for i in range(3)]
    np.testing.assert_allclose(together, alone, rtol=1e-5)

    lacking = {"params": whole[1]["params"]}
    with pytest.raises(TreeMismatchError, match="batch_stats/BatchNorm_0/mean: only in the recipe's model"):
        train(recipe, DIGITS, seed=0, directory=tmp_path / "other", start=InitialState(lacking, 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["resnet20_batchnorm", "vgg16_batchnorm"])
def test_convolutional_networks_with_batch_norm_learn(name, tmp_path):
    recipe = Recipe("digits", name, width=4, epochs=4, warmup_epochs=1, batch_size=32)
    trajectory = train(recipe, DIGITS, seed=0, directory=tmp_path)
    metrics_fn = classification_metrics(build_apply(build_model(name, width=4, num_classes=10), DIGITS))
    assert metrics_fn(trajectory.last, DIGITS.test)["error"].mean() < 0.3
