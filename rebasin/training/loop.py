"""Training: the learning rate, one compiled epoch, and the loop that stores a checkpoint after each epoch."""

import dataclasses
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
from jax.typing import ArrayLike

from rebasin.batches import Batch
from rebasin.compilation import compiler_options
from rebasin.errors import ConfigError, NonFiniteError, problem_list
from rebasin.masks import apply_mask, check_mask, mask_digest
from rebasin.models import build_model
from rebasin.training.augmentation import random_crop_and_flip
from rebasin.training.data import Dataset, normalise
from rebasin.training.lock import locked
from rebasin.training.recipes import Recipe
from rebasin.training.resources import check_disk, check_memory
from rebasin.training.trajectory import (
    RunRecord,
    Trajectory,
    describe_leaves,
    find_finished,
    make_run_folder,
    open_run,
    tree_bytes,
)
from rebasin.trees import check_finite, check_same_shapes, leaf_table

__all__ = [
    "RESUME_SECONDS",
    "EpochMetrics",
    "InitialState",
    "NormalisedModel",
    "Progress",
    "TrainState",
    "TrainingData",
    "build_apply",
    "build_epoch",
    "build_init",
    "learning_rate",
    "shuffled_batches",
    "train",
]

# Called after each epoch with its number, the number of the last epoch, and the training metrics.
Progress = Callable[[int, int, Mapping[str, float]], None]

# Where not all epochs are kept, one is stored for resuming after this many seconds, so that a killed run
# loses about a minute of work. Saving takes 20 ms or more; doing it after every epoch would slow short ones.
RESUME_SECONDS = 60.0


class TrainState(NamedTuple):
    """What one epoch hands to the next. The learning rate is not part of it: it follows from the epoch.

    Attributes:
      variables: all collections of the model.
      optimizer: state of the optimiser, which holds the momentum of ``params``.
    """

    variables: Any
    optimizer: optax.OptState


class TrainingData(NamedTuple):
    """A training split on the device, with the statistics that normalise its images.

    Attributes:
      examples: uint8 images [n, h, w, c] as inputs, and int32 labels [n].
      mean: mean pixel of each channel, [c], in units of the stored values.
      std: standard deviation of each channel, [c].
    """

    examples: Batch
    mean: jax.Array
    std: jax.Array


class EpochMetrics(NamedTuple):
    """Training metrics of an epoch, scalars.

    Each is the mean over the batches of the epoch. A batch is measured before the step that it makes.

    Attributes:
      loss: cross entropy in nats, without weight decay.
      error: 0–1 error.
    """

    loss: jax.Array
    error: jax.Array


class InitialState(NamedTuple):
    """Variables from which a run starts in place of a random initialisation.

    Attributes:
      variables: all collections of the model, as they are at the end of `epoch`.
      epoch: the number of epochs that the variables count as trained for.
    """

    variables: Any
    epoch: int


def train(
    recipe: Recipe,
    dataset: Dataset,
    *,
    seed: int,
    directory: str | os.PathLike[str],
    start: InitialState | None = None,
    mask: Any = None,
    keep: Collection[int] | None = None,
    progress: Progress | None = None,
    resume: bool = False,
) -> Trajectory:
    """Train one network and store it after every epoch, or after chosen ones.

    Networks of one recipe share one compiled epoch. All randomness of an epoch follows from `seed` and the
    epoch's number. A run that was killed at any moment and resumed therefore ends, bit for bit, where the
    uninterrupted run ends (on a GPU, as far as XLA's kernels are deterministic). A finished run of the same
    recipe and seed is returned as it is.

    Args:
      recipe: what to train, and how.
      dataset: the data. Inputs are normalised with its `mean` and `std`, even if the recipe trains on a
        subset.
      seed: seed of the initialisation, the data order and the augmentation.
      directory: the run's folder; see `rebasin.training.trajectory`.
      start: variables to start from in place of a random initialisation. Their momentum is zero, and the
        learning rate continues at their epoch (as in OpenLTH). `seed` then sets data order and augmentation
        only.
      mask: a mask (`rebasin.masks`) of the weights that are trained, `None` for all. The others are zero from
        the start to the end, in every bit. ``run.json`` holds a hash of the mask.
      keep: epochs to keep on disk; `None` keeps all. The last epoch is always kept. About once a minute
        another epoch is stored for resuming and deleted again when the next is stored. Affects disk use
        only; ignored for finished runs.
      progress: function called after every epoch. If it raises, the epoch is stored first.
      resume: continue an unfinished run from its last stored epoch.

    Returns:
      The finished trajectory.

    Raises:
      ConfigError: recipe, data and start do not fit each other, or the network is too large for the memory or
        the disk.
      DataError: the recipe's `num_train` exceeds the size of the training split.
      TreeMismatchError: `start` or the mask does not fit the model.
      TrajectoryError: the folder holds something else, another run, or an unfinished one without `resume`.
      FolderInUseError: another process trains in the folder.
      NonFiniteError: the loss or a weight is no longer finite; epochs stored before stay on disk.
    """
    split = dataset.take(num_train=recipe.num_train).train
    _check_fit(recipe, dataset, split)
    data = TrainingData(*jax.device_put((split, dataset.mean, dataset.std)))
    init_key, data_key = jax.random.split(jax.random.key(seed))
    init = build_init(recipe, dataset.num_classes)
    template = _template(recipe, init, init_key, data)
    if start is not None:
        _check_start(recipe, start, template)
    leaves = describe_leaves(template.variables)
    mask = None if mask is None else _checked_mask(mask, template)
    digest = None if mask is None else mask_digest(mask)
    record = RunRecord(recipe, int(seed), len(split.labels), leaves, _fingerprint(start), digest)
    # A finished run is only read, perhaps from a folder in which nothing may be written.
    finished = find_finished(directory, record)
    if finished is not None:
        return finished
    size = tree_bytes(template.variables)
    what = f"a network ({recipe.model}) of width {recipe.width}"
    check_memory(size, what)
    folder = make_run_folder(directory)
    with locked(folder):
        trajectory = open_run(folder, record, resume=resume)
        if trajectory.complete:  # since another process has trained it meanwhile
            return trajectory
        first = max(trajectory.epochs, default=record.first_epoch - 1)
        # Of chosen epochs alone, the one at which training would go on is there too while the next is stored.
        wanted = recipe.epochs - first if keep is None else sum(epoch > first for epoch in keep) + 2
        check_disk(size, wanted, folder, what)
        if trajectory.epochs:
            state = _to_device(TrainState(**trajectory.restore(first, template._asdict())))
        else:
            first = record.first_epoch
            state = init(init_key, data) if start is None else _fresh_state(recipe, start.variables)
            state = state if mask is None else TrainState(apply_mask(mask, state.variables), state.optimizer)
            if keep is None or first in keep:
                trajectory.save(first, state._asdict(), {})
        run_epoch = build_epoch(recipe, dataset.num_classes)
        masks = () if mask is None else (_to_device(_split_collections(mask)[0]),)
        _train_epochs(
            trajectory,
            state,
            lambda state, epoch: run_epoch(state, epoch, data_key, data, *masks),
            first=first,
            keep=keep,
            progress=progress,
        )
    return trajectory


def _train_epochs(
    trajectory: Trajectory,
    state: TrainState,
    run_epoch: Callable[[TrainState, int], tuple[TrainState, EpochMetrics]],
    *,
    first: int,
    keep: Collection[int] | None,
    progress: Progress | None,
) -> None:
    """Train from the end of epoch `first` to the last epoch, and store epochs on the way."""
    last = trajectory.recipe.epochs
    saved = time.perf_counter()
    for epoch in range(first + 1, last + 1):
        state, metrics = run_epoch(state, epoch)
        metrics = {name: float(value) for name, value in metrics._asdict().items()}
        _check_epoch(trajectory, epoch, state.variables, metrics["loss"])
        wanted = keep is None or epoch in keep or epoch == last
        if wanted or time.perf_counter() - saved >= RESUME_SECONDS:
            trajectory.save(epoch, state._asdict(), metrics)
            saved = time.perf_counter()
            if keep is not None:
                trajectory.drop(e for e in trajectory.epochs if e not in keep and e != epoch)
        if progress is None:
            continue
        try:
            progress(epoch, last, metrics)
        except BaseException:  # a time limit or Ctrl-C: a run that goes on begins here
            if epoch not in trajectory.epochs:
                trajectory.save(epoch, state._asdict(), metrics)
            raise


@functools.lru_cache(maxsize=8)
def build_init(recipe: Recipe, num_classes: int) -> Callable[..., TrainState]:
    """Build a jitted ``init(key, data) -> TrainState`` that initialises a network.

    Results are cached: equal arguments give the same function, which is then compiled once.

    Args:
      recipe: gives the model.
      num_classes: number of logits.
    """
    model = build_model(recipe.model, width=recipe.width, num_classes=num_classes)

    @jax.jit
    def init(key: jax.Array, data: TrainingData) -> TrainState:
        images = normalise(data.examples.inputs[:1], data.mean, data.std)
        return _fresh_state(recipe, model.init(key, images))

    return init


@functools.lru_cache(maxsize=8)
def build_epoch(recipe: Recipe, num_classes: int) -> Callable[..., tuple[TrainState, EpochMetrics]]:
    """Build a jitted ``run_epoch(state, epoch, key, data, mask=None) -> (state, metrics)``.

    It trains epoch number `epoch`, counted from 1, and consumes the state it is given. Each step is SGD with
    momentum μ and coupled weight decay λ on every leaf of ``params``: m ← μm + ∇L(w) + λw, then w ← w − ηm.
    With Adam, w moves by η times Adam's direction for the gradient ∇L(w) + λw.
    Other collections of the model, such as BatchNorm's running statistics, are updated by the model itself
    when it is applied to the batch. A mask of ``params`` takes the gradient from pruned weights. Where they
    are zero and have no momentum, they stay zero in every bit.

    Results are cached: equal arguments give the same function, which is then compiled once.

    Args:
      recipe: what to train, and how.
      num_classes: number of logits.
    """
    model = build_model(recipe.model, width=recipe.width, num_classes=num_classes)
    optimizer = _optimizer(recipe)
    loss_and_gradient = jax.value_and_grad(functools.partial(_training_loss, model), has_aux=True)

    @functools.partial(jax.jit, donate_argnames="state", compiler_options=compiler_options())
    def run_epoch(
        state: TrainState, epoch: jax.Array, key: jax.Array, data: TrainingData, mask: Any = None
    ) -> tuple[TrainState, EpochMetrics]:
        shuffle_key, augment_key = jax.random.split(jax.random.fold_in(key, epoch))
        batches = shuffled_batches(shuffle_key, len(data.examples.labels), recipe.batch_size)
        num_steps = len(batches)
        schedule = learning_rate(recipe, num_steps)

        def step(state: TrainState, inputs: tuple[jax.Array, jax.Array]) -> tuple[TrainState, EpochMetrics]:
            index, chosen = inputs
            images = data.examples.inputs[chosen]
            if recipe.augment:
                images = random_crop_and_flip(images, jax.random.fold_in(augment_key, index))
            batch = Batch(normalise(images, data.mean, data.std), data.examples.labels[chosen])
            weights, statistics = _split_collections(state.variables)
            (loss, (error, statistics)), gradient = loss_and_gradient(weights, statistics, batch)
            if mask is not None:  # decided while tracing: it costs nothing without a mask
                gradient = apply_mask(mask, gradient)
            direction, momentum = optimizer.update(gradient, state.optimizer, weights)
            rate = schedule((epoch - 1) * num_steps + index)
            weights = jax.tree.map(lambda w, m: w - rate * m, weights, direction)
            return TrainState(statistics | weights, momentum), EpochMetrics(loss, error)

        # One scan per epoch on every backend: steps called from Python take twice as long for a small MLP.
        state, metrics = jax.lax.scan(step, state, (jnp.arange(num_steps), batches))
        return state, jax.tree.map(jnp.mean, metrics)

    return run_epoch


def _training_loss(
    model: nn.Module, weights: Any, statistics: Any, batch: Batch
) -> tuple[jax.Array, tuple[jax.Array, Any]]:
    """Return the mean loss of a batch, and beside it the mean error and the updated statistics.

    Args:
      model: maps variables and images to logits.
      weights: the trained collection, ``{"params": …}``.
      statistics: all other collections; most models have none.
      batch: normalised images [n, h, w, c] and labels [n].
    """
    logits, updated = model.apply(statistics | weights, batch.inputs, mutable=list(statistics))
    loss = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    error = (jnp.argmax(logits, axis=-1) != batch.labels).astype(jnp.float32)
    return jnp.mean(loss), (jnp.mean(error), updated)


@dataclasses.dataclass(frozen=True)
class NormalisedModel:
    """A network as a function of stored images: ``apply_fn(variables, images) -> logits``.

    Instances with equal models and statistics are equal and hash equally. A function that is compiled for one
    of them is therefore not compiled again for another.

    Attributes:
      model: Flax module that maps ``(variables, normalised images)`` to logits.
      mean: pixel mean of each channel, in units of the stored values.
      std: pixel standard deviation of each channel.
    """

    model: nn.Module
    mean: tuple[float, ...]
    std: tuple[float, ...]

    def __call__(self, variables: Any, images: ArrayLike) -> jax.Array:
        """Return the logits, [n, classes], of uint8 images [n, h, w, c]."""
        return self.model.apply(variables, normalise(images, self.mean, self.std))  # pyright: ignore


def build_apply(model: nn.Module, statistics: Dataset | tuple[ArrayLike, ArrayLike]) -> NormalisedModel:
    """Build the function that normalises stored images on the device and applies a model to them.

    Args:
      model: Flax module that maps ``(variables, normalised images)`` to logits. Its attributes must be
        hashable: tuples rather than lists.
      statistics: the dataset whose `mean` and `std` normalise the images, or the pair ``(mean, std)`` itself,
        arrays [c].

    Returns:
      ``apply_fn(variables, images)``, which maps uint8 images [n, h, w, c] to logits [n, classes].

    Examples:
      >>> from rebasin.training.data import load_dataset
      >>> digits = load_dataset("digits")
      >>> model = build_model("mlp", width=8, num_classes=10)
      >>> apply_fn = build_apply(model, digits)
      >>> variables = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)))
      >>> apply_fn(variables, digits.test.inputs[:3]).shape
      (3, 10)
      >>> apply_fn == build_apply(model, (digits.mean, digits.std))
      True
    """
    moments = (statistics.mean, statistics.std) if isinstance(statistics, Dataset) else statistics
    # Python floats are hashable, and hold float32 values exactly.
    mean, std = (tuple(np.asarray(values, np.float32).tolist()) for values in moments)
    return NormalisedModel(model, mean, std)


def learning_rate(recipe: Recipe, num_steps: int) -> optax.Schedule:
    """Return the learning rate by step: a linear warm-up from 0 to the peak, then half a cosine down to 0.

    With W steps of warm-up among T steps in all, the rate of step t = 0, 1, … is η·t/W before W, and
    η·(1 + cos(π(t−W)/(T−W)))/2 from then on (arXiv 2404.06498, App. D). The rate of 0 at the first step is
    taken from OpenLTH.

    Args:
      recipe: gives the peak rate η, T in epochs, and W in epochs and steps.
      num_steps: number of steps per epoch.

    Returns:
      A function from the step, counted over the whole run, to its rate.
    """
    warmup_steps = recipe.warmup_epochs * num_steps + recipe.warmup_steps
    decay_steps = recipe.epochs * num_steps - warmup_steps
    # Optax raises for a phase of length zero. A run that is all warm-up never reaches the cosine's one step.
    decay = optax.cosine_decay_schedule(recipe.peak_learning_rate, max(decay_steps, 1))
    if not warmup_steps:
        return decay
    warmup = optax.linear_schedule(0.0, recipe.peak_learning_rate, warmup_steps)
    return optax.join_schedules([warmup, decay], [warmup_steps])


def shuffled_batches(key: jax.Array, num_examples: int, batch_size: int) -> jax.Array:
    """Draw the examples of each step of an epoch, as indices int [steps, batch_size].

    Every example is drawn at most once. The examples left over for a last, short batch are left out.
    """
    num_steps = num_examples // batch_size
    order = jax.random.permutation(key, num_examples)
    return order[: num_steps * batch_size].reshape(num_steps, batch_size)


def _optimizer(recipe: Recipe) -> optax.GradientTransformation:
    """Return SGD with momentum, or Adam, with coupled weight decay, but without the learning rate.

    The rate follows from the epoch rather than from a step count in the optimiser's state. A child that
    starts at epoch t therefore needs a fresh optimiser state and nothing else.
    """
    adam = recipe.optimizer == "adam"
    steps = optax.scale_by_adam(b1=recipe.momentum) if adam else optax.trace(recipe.momentum)
    return optax.chain(optax.add_decayed_weights(recipe.weight_decay), steps)


def _fresh_state(recipe: Recipe, variables: Any) -> TrainState:
    """Return a state whose momentum, and moments of Adam, are zero.

    It gets copies of the variables, because an epoch consumes the buffers of the state it is given.
    """
    return _to_device(TrainState(variables, _optimizer(recipe).init(_split_collections(variables)[0])))


def _split_collections(variables: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split variables into the trained collection and those the model updates, such as running statistics."""
    rest = dict(variables)
    return {"params": rest.pop("params")}, rest


def _to_device(tree: Any) -> Any:
    """Copy every leaf to the device."""
    return jax.tree.map(jnp.array, tree)


def _fingerprint(start: InitialState | None) -> dict[str, Any] | None:
    """Return what ``run.json`` records of an initial state: its epoch and a hash of its variables."""
    if start is None:
        return None
    digest = hashlib.sha256()
    for name, leaf in leaf_table(start.variables).items():
        digest.update(name.encode() + np.asarray(leaf).tobytes())
    return {"epoch": int(start.epoch), "sha256": digest.hexdigest()}


def _check_fit(recipe: Recipe, dataset: Dataset, split: Batch) -> None:
    """Raise `ConfigError` unless the recipe can train on this split of this dataset."""
    problems, size = [], len(split.labels)
    if dataset.name != recipe.dataset:
        problems.append(f"dataset: recipe says {recipe.dataset!r}, got {dataset.name!r}")
    if recipe.batch_size > size:
        problems.append(f"batch_size: wanted at most the {size} examples, got {recipe.batch_size}")
    if problems:
        raise ConfigError(problem_list("recipe and dataset do not fit:", problems))


def _template(
    recipe: Recipe, init: Callable[..., TrainState], key: jax.Array, data: TrainingData
) -> TrainState:
    """Return the shapes and dtypes of a state."""
    try:
        return jax.eval_shape(init, key, data)
    except OverflowError:
        raise ConfigError(f"width: no network of width {recipe.width} fits any memory") from None


def _check_start(recipe: Recipe, start: InitialState, template: TrainState) -> None:
    """Raise unless an initial state has finite variables of the model and an epoch before the last."""
    if not 0 <= start.epoch < recipe.epochs:
        raise ConfigError(f"start.epoch: wanted at least 0 and less than {recipe.epochs}, got {start.epoch}")
    check_same_shapes(start.variables, template.variables, names=("start.variables", "the recipe's model"))
    check_finite(start.variables, "start.variables")


def _checked_mask(mask: Any, template: TrainState) -> Any:
    """Return a mask in the containers of the model; raise unless it fits and prunes trained leaves alone."""
    mask = check_mask(mask, template.variables, name="the recipe's model")
    rest = leaf_table(_split_collections(mask)[1]).items()
    if wrong := [f"{path}: not trained, and yet pruned" for path, leaf in rest if not np.all(leaf)]:
        raise ConfigError(problem_list("the mask cannot work:", wrong))
    return mask


def _check_epoch(trajectory: Trajectory, epoch: int, variables: Any, loss: float) -> None:
    """Raise `NonFiniteError`, with advice, where the loss or the variables of an epoch are not finite."""
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
