"""Training of one network with several masks: one after another, side by side, and as one program.

  python -m benchmarks.masked_training --output=masked_training.json
  python -m benchmarks.masked_training --dataset=mnist --width=512 --batch_size=128 --num_train=5000
    --epochs=1
  taskset -c 0 python -m benchmarks.masked_training

A level of `experiments.mask_transport` trains one network with many masks, with the same batches. The forms:

- one by one: an epoch of `rebasin.training.loop.build_epoch` for each mask, the form of the experiment;
- threads: the same, two masks at a time, each in a thread of its own;
- unrolled: one program with the epochs of all masks in it;
- vmap: one program with an axis over masks, so that products of matrices become batched ones.

Then the same with checkpoints, `rebasin.training.loop.train` one by one and in two threads. All times are
warm. The forms take turns at going first; a ratio is the median over rounds of the ratio within a round,
above 1 where the form is faster than one by one. "Same bits" says whether the networks equal those that were
trained one by one. The time of the processor, of all cores together, hardly depends on what else the machine
does. The defaults are the digits of `experiments`, and take a minute on two CPU cores.
"""

import concurrent.futures
import inspect
import json
import os
import pathlib
import tempfile
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from benchmarks.command import run
from benchmarks.reports import Reporter, build_reporter, describe_machine
from benchmarks.timing import alternate, median_ratio
from rebasin.compilation import compiler_options
from rebasin.masks import apply_mask
from rebasin.pruning import random_mask
from rebasin.training.data import Dataset, load_dataset
from rebasin.training.loop import InitialState, TrainingData, TrainState, build_epoch, build_init, train
from rebasin.training.recipes import Recipe

__all__ = ["FORMS", "STORED_FORMS", "MaskedNetworks", "measure"]

FORMS = ("one by one", "threads", "unrolled", "vmap")
STORED_FORMS = ("stored, one by one", "stored, threads")
_THREADS = 2
_SPARSITY = 0.5


class MaskedNetworks(NamedTuple):
    """One initialisation under several random masks.

    Attributes:
      recipe: how the networks are trained; all its epochs.
      dataset: the data.
      data: the training split on the device.
      masks: the mask of each network.
      states: the state from which each network is trained.
    """

    recipe: Recipe
    dataset: Dataset
    data: TrainingData
    masks: list[Any]
    states: list[TrainState]

    @classmethod
    def draw(cls, recipe: Recipe, dataset: Dataset, num_masks: int) -> "MaskedNetworks":
        """Draw the initialisation and as many masks, each of which keeps half of the kernels' weights."""
        split = dataset.take(num_train=recipe.num_train).train
        data = TrainingData(*jax.device_put((split, dataset.mean, dataset.std)))
        state = build_init(recipe, dataset.num_classes)(jax.random.key(0), data)
        masks = [
            jax.tree.map(jnp.asarray, random_mask(state.variables, _SPARSITY, key=jax.random.key(i)))
            for i in range(num_masks)
        ]
        states = [TrainState(apply_mask(mask, state.variables), state.optimizer) for mask in masks]
        return cls(recipe, dataset, data, masks, states)

    def train(self, form: str) -> list[TrainState]:
        """Train all networks in one of `FORMS` and return them."""
        step = build_epoch(self.recipe, self.dataset.num_classes)
        key, weights = jax.random.key(1), [{"params": mask["params"]} for mask in self.masks]
        epochs = range(1, self.recipe.epochs + 1)

        def train_one(number: int) -> TrainState:
            state = _copied(self.states[number])
            for epoch in epochs:
                state, _ = step(state, epoch, key, self.data, weights[number])
            return jax.block_until_ready(state)

        numbers = range(len(self.masks))
        if form == "one by one":
            return [train_one(number) for number in numbers]
        if form == "threads":
            with concurrent.futures.ThreadPoolExecutor(_THREADS) as pool:
                return list(pool.map(train_one, numbers))
        stacked = form == "vmap"
        states = _stacked(self.states) if stacked else _copied(self.states)
        chosen = _stacked(weights) if stacked else weights
        program = _vmapped if stacked else _unrolled
        for epoch in epochs:
            states = program(self.recipe, self.dataset.num_classes)(states, epoch, key, self.data, chosen)
        states = jax.block_until_ready(states)
        return [jax.tree.map(lambda leaf, n=n: leaf[n], states) for n in numbers] if stacked else states

    def train_stored(self, form: str) -> None:
        """Train all networks in one of `STORED_FORMS`, each in a folder as the experiments do."""
        with tempfile.TemporaryDirectory() as folder:

            def train_one(number: int) -> None:
                train(
                    self.recipe,
                    self.dataset,
                    seed=0,
                    directory=pathlib.Path(folder) / str(number),
                    start=InitialState(self.states[number].variables, 0),
                    mask=self.masks[number],
                    keep=(),
                )

            with concurrent.futures.ThreadPoolExecutor(1 if "one by one" in form else _THREADS) as pool:
                list(pool.map(train_one, range(len(self.masks))))


def _copied(tree: Any) -> Any:
    """Return copies, as an epoch consumes the buffers of its state."""
    return jax.tree.map(jnp.array, tree)


def _stacked(trees: list[Any]) -> Any:
    return jax.tree.map(lambda *leaves: jnp.stack(leaves), *trees)


def _cached(build: Callable[..., Any]) -> Callable[..., Any]:
    """Cache a builder, so that what it builds is compiled once."""
    known: dict[Any, Any] = {}

    def cached(*arguments: Any) -> Any:
        if arguments not in known:
            known[arguments] = build(*arguments)
        return known[arguments]

    return cached


def _bare_epoch(recipe: Recipe, num_classes: int) -> Callable[..., Any]:
    """Return an epoch before `jax.jit`, whose compiler options JAX accepts for a whole program alone."""
    return inspect.unwrap(build_epoch(recipe, num_classes))


@_cached
def _vmapped(recipe: Recipe, num_classes: int) -> Callable[..., Any]:
    step = jax.vmap(_bare_epoch(recipe, num_classes), in_axes=(0, None, None, None, 0))
    return jax.jit(lambda *arguments: step(*arguments)[0], compiler_options=compiler_options())


@_cached
def _unrolled(recipe: Recipe, num_classes: int) -> Callable[..., Any]:
    step = _bare_epoch(recipe, num_classes)

    def steps(states: list[Any], epoch: jax.Array, key: jax.Array, data: TrainingData, masks: Any) -> Any:
        pairs = zip(states, masks, strict=True)
        return [step(state, epoch, key, data, mask)[0] for state, mask in pairs]

    return jax.jit(steps, compiler_options=compiler_options())


def measure(networks: MaskedNetworks, rounds: int) -> dict[str, Any]:
    """Measure the seconds of all forms.

    Args:
      networks: what to train.
      rounds: how often each form is timed.

    Returns:
      ``"seconds"`` holds, by form, the seconds of each round, and ``"processor_seconds"`` those of all cores
      together; ``"same_bits"`` says of each form without checkpoints whether its networks equal those trained
      one by one.
    """
    wanted = jax.tree.leaves(networks.train(FORMS[0]))
    same = {}
    for form in FORMS:
        found = jax.tree.leaves(networks.train(form))
        same[form] = all(np.array_equal(x, y) for x, y in zip(wanted, found, strict=True))
    processor: dict[str, list[float]] = {form: [] for form in (*FORMS, *STORED_FORMS)}

    def contestant(form: str) -> Callable[[], None]:
        def run_form() -> None:
            began = time.process_time()
            networks.train(form) if form in FORMS else networks.train_stored(form)
            processor[form].append(time.process_time() - began)

        return run_form

    seconds = alternate({form: contestant(form) for form in processor}, rounds)
    # The first call of each is not timed.
    processor = {form: values[1:] for form, values in processor.items()}
    return {"seconds": seconds, "processor_seconds": processor, "same_bits": same}


def _report(networks: MaskedNetworks, results: Mapping[str, Any], reporter: Reporter) -> None:
    count, epochs = len(networks.masks), networks.recipe.epochs
    reporter.say(f"\n{count} masks, {epochs} epochs of {len(networks.data.examples.labels)} images")
    seconds, rows = results["seconds"], []
    for form, values in seconds.items():
        base = seconds[FORMS[0] if form in FORMS else STORED_FORMS[0]]
        same = results["same_bits"].get(form)
        rows.append(
            (
                form,
                f"{1000 * float(np.median(values)) / count:.0f}",
                f"{median_ratio(base, values):.2f}",
                f"{1000 * float(np.median(results['processor_seconds'][form])) / count:.0f}",
                "" if same is None else "yes" if same else "no",
            )
        )
    reporter.table(("form", "ms a network", "ratio", "processor ms", "same bits"), rows)


def define_flags() -> None:
    """Define the flags of this benchmark."""
    flags.DEFINE_string("dataset", "digits", "Dataset of the networks.")
    flags.DEFINE_string("data_dir", None, "TFDS folder; by default $TFDS_DATA_DIR.")
    flags.DEFINE_string("model", "mlp", "Model of the networks.")
    flags.DEFINE_integer("width", 128, "Width of the model.", lower_bound=1)
    flags.DEFINE_integer("batch_size", 32, "Batch size.", lower_bound=1)
    flags.DEFINE_integer("num_train", None, "Training examples, by default all.", lower_bound=1)
    flags.DEFINE_integer("epochs", 25, "Epochs of training of a network.", lower_bound=1)
    flags.DEFINE_integer("masks", 7, "Number of masks.", lower_bound=1)
    flags.DEFINE_integer("rounds", 5, "How often each form is timed.", lower_bound=1)
    flags.DEFINE_string("output", None, "JSON file for all seconds, versions and load averages.")


def main() -> None:
    """Measure all forms, and print and store the numbers."""
    options = flags.FLAGS
    reporter = build_reporter()
    recipe = Recipe(
        options.dataset,
        options.model,
        width=options.width,
        epochs=options.epochs,
        batch_size=options.batch_size,
        num_train=options.num_train,
        warmup_epochs=min(5, options.epochs),
    )
    dataset = load_dataset(options.dataset, data_dir=options.data_dir)
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    about = {**describe_machine(), "usable_cores": cores, "masks": options.masks}
    networks = MaskedNetworks.draw(recipe, dataset, options.masks)
    results = measure(networks, options.rounds)
    if options.output:
        content = json.dumps({**about, "recipe": recipe.__dict__, **results}, indent=1)
        pathlib.Path(options.output).write_text(content + "\n")
    reporter.say(f"{options.model} (width {options.width}) on {options.dataset}, usable cores: {cores}")
    _report(networks, results, reporter)


if __name__ == "__main__":
    define_flags()
    run(main)
