"""Training: the learning rate, one compiled epoch, and the loop that stores a checkpoint after each."""

import functools
import hashlib
import math
import os
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from rebasin.compilation import compiler_options
from rebasin.errors import ConfigError, NonFiniteError, problem_list
from rebasin.models import build_model
from rebasin.training.augmentation import random_crop_and_flip
from rebasin.training.data import Dataset, Split, normalise
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import RunRecord, Trajectory, describe_leaves, open_run
from rebasin.trees import check_finite, check_same_shapes, leaf_table

__all__ = [
    "EpochMetrics",
    "Progress",
    "Start",
    "TrainState",
    "TrainingData",
    "build_epoch",
    "build_init",
    "build_metrics",
    "classification_metrics",
    "learning_rate",
    "shuffled_batches",
    "train",
]

# Called after each stored epoch with its number, that of the last epoch, and the training metrics.
Progress = Callable[[int, int, Mapping[str, float]], None]


# Work that a killed run loses at most where epochs are not all kept; a save takes 20 ms and more.
_RESUME_SECONDS = 60.0


class TrainState(NamedTuple):
    """What one epoch hands to the next; the learning rate follows from the epoch alone.

    Attributes:
      variables: all collections of the model.
      optimizer: momentum of ``params``.
    """

    variables: Any
    optimizer: optax.OptState


class TrainingData(NamedTuple):
    """A training split on the device: uint8 images [n, h, w, c], int32 labels [n], pixel statistics [c]."""

    images: jax.Array
    labels: jax.Array
    mean: jax.Array
    std: jax.Array


class EpochMetrics(NamedTuple):
    """Means over the batches of one epoch, each before its own step; scalars."""

    loss: jax.Array
    error: jax.Array


class Start(NamedTuple):
    """A tree to train on from, as at the end of `epoch`."""

    variables: Any
    epoch: int


def train(
    recipe: Recipe,
    dataset: Dataset,
    *,
    seed: int,
    directory: str | os.PathLike[str],
    start: Start | None = None,
    keep: Collection[int] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> Trajectory:
    """Trains one network and stores it after every epoch, or after chosen ones.

    Networks of one recipe share one compiled epoch. All that is random in an epoch follows from `seed` and
    the epoch's number, so a run that was killed at any moment and resumed ends, bit for bit, where it would
    have ended (on a GPU, as far as XLA's kernels are deterministic). A finished run of the same recipe and
    seed is returned as it is.

    Args:
      recipe: what to train, and how.
      dataset: the data; training inputs are normalised with its `mean` and `std`, also if the recipe takes a
        subset.
      seed: seed of the initialisation, the data order and the augmentation.
      directory: the run's folder; see `rebasin.training.trajectory`.
      start: a tree to begin from in place of an initialisation. Its momentum is zero and the learning rate
        goes on at its epoch (as in OpenLTH); then `seed` only sets data order and augmentation.
      keep: epochs to keep on disk; `None` keeps all. The last is always kept. Of the others, one a minute is
        stored for a resumed run to begin at, and dropped when the next is. It changes no number, and says
        nothing about a run that is finished already.
      progress: called after every epoch.
      resume: go on with an unfinished run from its last stored epoch.

    Returns:
      The finished trajectory.

    Raises:
      ConfigError: recipe, data and start do not fit each other.
      DataError: the recipe's `num_train` is more than there is.
      TrajectoryError: the folder holds something else, another run, or an unfinished one without `resume`.
      NonFiniteError: the loss or the network is no longer finite; epochs stored before that stay.
    """
    split = dataset.take(num_train=recipe.num_train).train
    _check_fit(recipe, dataset, split)
    data = TrainingData(*jax.device_put((split.images, split.labels, dataset.mean, dataset.std)))
    init_key, data_key = jax.random.split(jax.random.key(seed))
    init, run_epoch = build_init(recipe, dataset.num_classes), build_epoch(recipe, dataset.num_classes)
    template = jax.eval_shape(init, init_key, data)
    if start is not None:
        _check_start(recipe, start, template)
    leaves = describe_leaves(template.variables)
    record = RunRecord(recipe, int(seed), len(split.labels), leaves, _fingerprint(start))
    trajectory = open_run(directory, record, resume=resume)
    if trajectory.complete:
        return trajectory

    if trajectory.epochs:
        first = trajectory.epochs[-1]
        state = _to_device(TrainState(**trajectory.restore(first, template._asdict())))
    else:
        first = trajectory.record.first_epoch
        state = init(init_key, data) if start is None else _fresh_state(recipe, start.variables)
        if keep is None or first in keep:
            trajectory.save(first, state._asdict(), {})
    saved = time.perf_counter()
    for epoch in range(first + 1, recipe.epochs + 1):
        state, metrics = run_epoch(state, epoch, data_key, data)
        metrics = {name: float(value) for name, value in metrics._asdict().items()}
        _check_epoch(trajectory, epoch, state.variables, metrics["loss"])
        wanted = keep is None or epoch in keep or epoch == recipe.epochs
        if wanted or time.perf_counter() - saved >= _RESUME_SECONDS:
            trajectory.save(epoch, state._asdict(), metrics)
            saved = time.perf_counter()
            if keep is not None:
                trajectory.drop(e for e in trajectory.epochs if e not in keep and e != epoch)
        if progress is not None:
            progress(epoch, recipe.epochs, metrics)
    return trajectory


@functools.lru_cache(maxsize=8)
def build_init(recipe: Recipe, num_classes: int) -> Callable[..., TrainState]:
    """Returns a jitted ``init(key, data) -> TrainState``; cached, so equal arguments share it."""
    model = build_model(recipe.model, width=recipe.width, num_classes=num_classes)

    @jax.jit
    def init(key: jax.Array, data: TrainingData) -> TrainState:
        return _fresh_state(recipe, model.init(key, normalise(data.images[:1], data.mean, data.std)))

    return init


@functools.lru_cache(maxsize=8)
def build_epoch(recipe: Recipe, num_classes: int) -> Callable[..., tuple[TrainState, EpochMetrics]]:
    """Returns a jitted ``run_epoch(state, epoch, key, data) -> (state, metrics)``; cached, as `build_init`.

    It trains epoch number `epoch`, from 1 on, and consumes the state it is given. Each step is SGD with
    momentum μ and coupled weight decay λ on every leaf of ``params``: m ← μm + ∇L(w) + λw, then w ← w − ηm.
    Any other collection of the model, such as BatchNorm's running statistics, is what the model made of it
    while it was applied to the batch; the metrics are those of that application.
    """
    model = build_model(recipe.model, width=recipe.width, num_classes=num_classes)
    optimizer = _optimizer(recipe)

    def loss_and_aux(
        weights: Any, statistics: Any, images: jax.Array, labels: jax.Array
    ) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        # What is mutable is what the model has beside its parameters: in most models nothing.
        logits, updated = model.apply(statistics | weights, images, mutable=list(statistics))
        values = classification_metrics(logits, labels)
        return jnp.mean(values["loss"]), (jnp.mean(values["error"]), updated)

    @functools.partial(jax.jit, donate_argnames="state", compiler_options=compiler_options())
    def run_epoch(
        state: TrainState, epoch: jax.Array, key: jax.Array, data: TrainingData
    ) -> tuple[TrainState, EpochMetrics]:
        shuffle_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
        batches = shuffled_batches(shuffle_key, len(data.labels), recipe.batch_size)
        num_steps = len(batches)
        schedule = learning_rate(recipe, num_steps)

        def step(state: TrainState, inputs: tuple[jax.Array, jax.Array]) -> tuple[TrainState, EpochMetrics]:
            index, batch = inputs
            images = data.images[batch]
            if recipe.augment:
                images = random_crop_and_flip(images, jax.random.fold_in(augment_key, index))
            images = normalise(images, data.mean, data.std)
            weights, statistics = _split(state.variables)
            (loss, (error, statistics)), gradient = jax.value_and_grad(loss_and_aux, has_aux=True)(
                weights, statistics, images, data.labels[batch]
            )
            direction, momentum = optimizer.update(gradient, state.optimizer, weights)
            rate = schedule((epoch - 1) * num_steps + index)
            weights = jax.tree.map(lambda w, m: w - rate * m, weights, direction)
            return TrainState(statistics | weights, momentum), EpochMetrics(loss, error)

        # One scan per epoch on every backend: steps called from Python take twice as long for a small MLP.
        state, metrics = jax.lax.scan(step, state, (jnp.arange(num_steps), batches))
        return state, jax.tree.map(jnp.mean, metrics)

    return run_epoch


def build_metrics(
    model: nn.Module, mean: jax.typing.ArrayLike, std: jax.typing.ArrayLike
) -> Callable[[Any, Split], dict[str, jax.Array]]:
    """Returns ``metrics_fn(variables, batch)``, the cross entropy and 0–1 error of each example.

    `batch` is a `Split` of uint8 images [n, h, w, c] and int32 labels [n], on the device; the result has the
    keys ``"loss"`` and ``"error"``, both float32 [n], as `rebasin.build_sweep` wants them.

    Args:
      model: maps ``(variables, images)`` to logits [n, classes].
      mean: pixel mean of the training data, [c].
      std: pixel standard deviation of the training data, [c].
    """

    def metrics_fn(variables: Any, batch: Split) -> dict[str, jax.Array]:
        return classification_metrics(
            model.apply(variables, normalise(batch.images, mean, std)), batch.labels
        )

    return metrics_fn


def learning_rate(recipe: Recipe, num_steps: int) -> optax.Schedule:
    """Learning rate by step: linear from 0 to the peak over the warm-up, then half a cosine to 0.

    With W steps of warm-up among T steps in all, the rate of step t = 0, 1, … is η·t/W before W, and then
    η·(1 + cos(π(t−W)/(T−W)))/2 (arXiv 2404.06498, App. D; that the first step has rate 0 is OpenLTH's).

    Args:
      recipe: gives the peak η, and W and T in epochs.
      num_steps: steps per epoch.

    Returns:
      A function from step, counted over the whole run, to rate.
    """
    warmup_steps = recipe.warmup_epochs * num_steps
    decay_steps = recipe.epochs * num_steps - warmup_steps
    # Optax takes neither phase with a length of zero; the cosine's one step is never reached then.
    decay = optax.cosine_decay_schedule(recipe.peak_learning_rate, max(decay_steps, 1))
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, recipe.peak_learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def shuffled_batches(key: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Indices of the examples of each step of an epoch, int [steps, batch_size].

    Every example comes at most once: those that do not fill a last batch sit this epoch out.
    """
    num_steps = num_examples // batch_size
    order = jax.random.permutation(key, num_examples)
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Momentum SGD but for the rate, which follows from the epoch and not from a step count kept inside.

    So a child that starts at epoch t needs a fresh optimiser state and nothing else.
    """
    return optax.chain(optax.add_decayed_weights(recipe.weight_decay), optax.trace(recipe.momentum))


def classification_metrics(logits: Any, labels: jax.typing.ArrayLike) -> dict[str, jax.Array]:
    """Cross entropy and 0–1 error of each example: ``[n, classes], [n] -> {"loss": [n], "error": [n]}``."""
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
    return {"loss": loss, "error": (jnp.argmax(logits, axis=-1) != labels).astype(jnp.float32)}


def _fresh_state(recipe: Recipe, variables: Any) -> TrainState:
    """State with zero momentum, in buffers of its own: an epoch consumes those it is given."""
    return _to_device(TrainState(variables, _optimizer(recipe).init(_split(variables)[0])))


def _split(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """The collection that is trained, and those that the model updates itself, such as running statistics."""
    rest = dict(variables)
    return {"params": rest.pop("params")}, rest


def _to_device(tree: Any) -> Any:
    return jax.tree.map(jnp.array, tree)


def _fingerprint(start: Start | None) -> dict[str, Any] | None:
    if start is None:
        return None
    digest = hashlib.sha256()
    for name, leaf in leaf_table(start.variables).items():
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return {"epoch": int(start.epoch), "sha256": digest.hexdigest()}


def _check_fit(recipe: Recipe, dataset: Dataset, split: Split) -> None:
    problems, size = [], len(split.labels)
    if dataset.name != recipe.dataset:
        problems.append(f"dataset: recipe says {recipe.dataset!r}, got {dataset.name!r}")
    if recipe.batch_size > size:
        problems.append(f"batch_size: wanted at most the {size} examples, got {recipe.batch_size}")
    if problems:
        raise ConfigError(problem_list("recipe and dataset do not fit:", problems))


def _check_start(recipe: Recipe, start: Start, template: TrainState) -> None:
    if not 0 <= start.epoch < recipe.epochs:
        raise ConfigError(f"start.epoch: wanted at least 0 and less than {recipe.epochs}, got {start.epoch}")
    check_same_shapes(start.variables, template.variables, names=("start.variables", "the recipe's model"))
    check_finite(start.variables, "start.variables")


def _check_epoch(trajectory: Trajectory, epoch: int, variables: Any, loss: float) -> None:
    recipe = trajectory.recipe
    try:
        if not math.isfinite(loss):
            raise NonFiniteError(f"the mean training loss is {loss}")
        check_finite(variables, "the network")
    except NonFiniteError as error:
        raise NonFiniteError(
            f"training of {trajectory.directory} diverged in epoch {epoch} of {recipe.epochs}: {error}\n"
            "  Epochs before it are stored. Try a lower peak_learning_rate (now "
            f"{recipe.peak_learning_rate}) or more warmup_epochs (now {recipe.warmup_epochs})."
        ) from None
