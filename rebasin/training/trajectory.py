"""A training run on disk: one Orbax checkpoint per epoch, and what the run was, in ``run.json``."""

import contextlib
import dataclasses
import json
import logging
import os
import pathlib
import zlib
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tensorstore
from flax import traverse_util

from rebasin.errors import ConfigError, TrajectoryError, problem_list
from rebasin.training.recipes import Recipe
from rebasin.trees import leaf_table

__all__ = [
    "RunRecord",
    "Trajectory",
    "describe_leaves",
    "open_run",
    "parse_leaf",
    "read_record",
    "write_record",
]


SCHEMA_VERSION = 1


RUN_FILE = "run.json"


PARTIAL_RUN_FILE = "run.json.partial"


_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """What fixes every bit of a run, as stored in its ``run.json``.

    Attributes:
      recipe: the recipe.
      seed: seed of initialisation, data order and augmentation.
      num_examples: size of the training split after the recipe's `num_train`.
      leaves: shape and dtype of every leaf of a tree of the run, as ``"float32[64, 128]"``, by path name.
      start: epoch and fingerprint of the tree that the run began from; None if it has its own initialisation.
    """

    recipe: Recipe
    seed: int
    num_examples: int
    leaves: Mapping[str, str]
    start: Mapping[str, Any] | None = None

    @property
    def first_epoch(self) -> int:
        """Epoch of the tree that the run begins from."""
        return 0 if self.start is None else self.start["epoch"]

    def differences(self, wanted: "RunRecord") -> list[str]:
        """One line for each field in which this record, a stored one, is not the one wanted."""
        ours, theirs = (dict(_flatten("", dataclasses.asdict(record))) for record in (self, wanted))
        return [
            f"{name}: stored {ours.get(name)!r}, wanted {theirs.get(name)!r}"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]


def describe_leaves(tree: Any) -> dict[str, str]:
    """Dtype and shape of every leaf, by path name.

    Examples:
      >>> describe_leaves({"bias": np.zeros(3, np.float32)})
      {'bias': 'float32[3]'}
    """
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaf_table(tree).items()}


def write_record(directory: pathlib.Path, record: RunRecord) -> None:
    """Writes ``run.json`` in one step, so that it is never seen half written."""
    content = {
        "schema_version": SCHEMA_VERSION,
        **dataclasses.asdict(record),
        "versions": {name: metadata.version(name) for name in _PACKAGES},
    }
    partial = directory / PARTIAL_RUN_FILE
    partial.write_text(json.dumps(content, indent=2) + "\n")
    partial.replace(directory / RUN_FILE)


def read_record(directory: pathlib.Path) -> RunRecord:
    """Reads ``run.json``; raises `TrajectoryError` if it is not there or cannot be understood."""
    path = directory / RUN_FILE
    if not path.is_file():
        raise TrajectoryError(f"{directory} is not a trajectory: it has no {RUN_FILE}")
    try:
        content = json.loads(path.read_text())
        if content["schema_version"] != SCHEMA_VERSION:
            raise TrajectoryError(
                f"{path} has schema_version {content['schema_version']}, and this version of rebasin reads "
                f"{SCHEMA_VERSION}"
            )
        fields = {field.name: content[field.name] for field in dataclasses.fields(RunRecord)}
        return RunRecord(**{**fields, "recipe": Recipe(**content["recipe"])})
    except (json.JSONDecodeError, UnicodeDecodeError, KeyError, TypeError, ConfigError) as error:
        raise TrajectoryError(f"{path} is damaged or was not written by this version of rebasin") from error


def parse_leaf(text: str) -> jax.ShapeDtypeStruct:
    """Inverse of `describe_leaves`, for one leaf."""
    dtype, _, shape = text.partition("[")
    return jax.ShapeDtypeStruct(tuple(json.loads("[" + shape)), jnp.dtype(dtype))


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Pairs of dotted name and value, for example ``("recipe.width", 128)``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


# Variables and optimiser state are two subtrees of one Orbax item: a second item adds half to the time of a
# save (threads and event loops, not bytes), and Orbax reads one subtree without the bytes of the other.
_ITEM = "state"


# Name, among an epoch's metrics on disk, of the checksums of its leaves.
_CHECKSUMS = "crc32"


class Trajectory:
    """The networks of one training run by epoch, read from disk when asked for.

    Epoch 0 is the initialisation; stored epochs may be sparse. Iteration yields the stored epochs in order.

    Args:
      directory: folder that `rebasin.training.loop.train` wrote.

    Attributes:
      directory: that folder.
      record: all that fixes the run, from its ``run.json``.

    Raises:
      TrajectoryError: the folder is not a trajectory, or its ``run.json`` cannot be read.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = pathlib.Path(directory).absolute()
        self.record = read_record(self.directory)
        # Saving is synchronous: the 20 to 30 ms of a small network are processor time, which a background
        # thread would only take from the next epoch, and no epoch is reported before it is safe.
        options = ocp.CheckpointManagerOptions(
            create=False, enable_async_checkpointing=False, lightweight_initialize=True
        )
        with _quiet():
            self._manager = ocp.CheckpointManager(
                self.directory,
                options=options,
                item_handlers={_ITEM: ocp.PyTreeCheckpointHandler(use_ocdbt=True)},
            )

    def __repr__(self) -> str:
        return (
            f"Trajectory({str(self.directory)!r}, epochs={_ranges(self.epochs)!r}, complete={self.complete})"
        )

    @property
    def epochs(self) -> tuple[int, ...]:
        """Stored epochs, in order."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def complete(self) -> bool:
        """Whether the run has reached the last epoch of its recipe."""
        return self.record.recipe.epochs in self.epochs

    @property
    def recipe(self) -> Recipe:
        """Recipe of the run."""
        return self.record.recipe

    @property
    def seed(self) -> int:
        """Seed of the run."""
        return self.record.seed

    @property
    def last(self) -> Any:
        """Tree of the last stored epoch."""
        return self[max(self.epochs, default=self.record.first_epoch)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.epochs)

    def __len__(self) -> int:
        return len(self.epochs)

    def __contains__(self, epoch: object) -> bool:
        return epoch in self.epochs

    def __getitem__(self, epoch: int) -> Any:
        """Tree of one epoch: nested dicts, as Flax variables, of NumPy arrays.

        Raises:
          TrajectoryError: the epoch is not stored, does not fit ``run.json``, or is damaged.
        """
        wanted = {name: parse_leaf(text) for name, text in self.record.leaves.items()}
        return self.restore(epoch, {"variables": traverse_util.unflatten_dict(wanted, sep="/")})["variables"]

    def metrics(self, epoch: int) -> dict[str, float]:
        """Training metrics of the epoch that ended in this tree; empty for the tree that began the run."""
        self._check_stored(epoch)
        with self._reading(epoch):
            return {name: value for name, value in self._metadata(epoch).items() if name != _CHECKSUMS}

    def save(self, epoch: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Commits the state of one epoch to disk; what is read later is this epoch whole, or not at all.

        Args:
          epoch: the epoch, later than all stored ones.
          state: the subtree ``"variables"``, and all else that a resumed run needs.
          metrics: training metrics of the epoch.
        """
        state = jax.device_get(dict(state))
        arguments = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(state)})
        with _quiet():
            self._manager.save(
                epoch, args=arguments, custom_metadata={**metrics, _CHECKSUMS: _checksums(state)}
            )

    def drop(self, epochs: Iterable[int]) -> None:
        """Deletes stored epochs, to free their disk space; those that are not stored are passed over.

        Args:
          epochs: what to delete; not the last stored epoch, which says how far the run is.

        Raises:
          TrajectoryError: the last stored epoch is among them. Nothing is deleted then.
        """
        wanted = set(epochs)
        doomed = [epoch for epoch in self.epochs if epoch in wanted]
        if doomed and doomed[-1] == self.epochs[-1]:
            raise TrajectoryError(
                f"epoch {doomed[-1]} is the last stored of {self.directory}: without it the run would be "
                "unfinished; delete the folder to drop it whole"
            )
        with _quiet():
            for epoch in doomed:
                self._manager.delete(epoch)

    def restore(self, epoch: int, wanted: Mapping[str, Any]) -> Any:
        """Reads those subtrees of an epoch's state that `wanted` has, after comparing what is stored with it.

        Args:
          epoch: a stored epoch.
          wanted: subtrees of the state by name, with anything that has a shape and a dtype as leaves.

        Returns:
          A tree like `wanted`, of NumPy arrays.

        Raises:
          TrajectoryError: the epoch is not stored, has other leaves, shapes or dtypes, or is damaged.
        """
        self._check_stored(epoch)
        with self._reading(epoch):
            _check_bytes(self.directory / str(epoch) / _ITEM, tuple(wanted))
            stored = self._manager.item_metadata(epoch)[_ITEM].tree
            stored = describe_leaves({name: stored[name] for name in wanted})
        expected = describe_leaves(wanted)
        problems = [
            f"{name}: {stored.get(name, 'nothing')} stored, {expected.get(name, 'nothing')} wanted"
            for name in {**expected, **stored}
            if stored.get(name) != expected.get(name)
        ]
        if problems:
            raise TrajectoryError(
                problem_list(f"epoch {epoch} of {self.directory} is not the tree wanted:", problems)
            )
        target = dict(wanted)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True)
        with self._reading(epoch):
            tree = self._manager.restore(epoch, args=ocp.args.Composite(**{_ITEM: arguments}))[_ITEM]
            _compare_checksums(tree, self._metadata(epoch).get(_CHECKSUMS))
        return tree

    def _metadata(self, epoch: int) -> dict[str, Any]:
        """Metrics of an epoch and checksums of its leaves."""
        return dict(self._manager.metadata(epoch).custom_metadata or {})

    def _check_stored(self, epoch: int) -> None:
        if epoch not in self:
            stored = _ranges(self.epochs) or "none"
            raise TrajectoryError(f"epoch {epoch} of {self.directory} is not stored; stored epochs: {stored}")

    @contextlib.contextmanager
    def _reading(self, epoch: int) -> Iterator[None]:
        """Turns whatever Orbax raises on a damaged checkpoint into one error with an address."""
        try:
            with _quiet():
                yield
        except Exception as error:
            raise TrajectoryError(
                f"the checkpoint in {self.directory / str(epoch)} is damaged or incomplete. Other epochs can "
                f"still be read; to make this one anew, delete the folders of epoch {epoch} and later, and "
                "train with resume=True"
            ) from error


def open_run(directory: str | os.PathLike[str], record: RunRecord, *, resume: bool) -> Trajectory:
    """The trajectory of a run that is to be trained, begun if the folder is new or empty.

    Args:
      directory: the run's folder.
      record: the run that the folder should hold.
      resume: whether to go on with an unfinished run.

    Returns:
      A trajectory: without epochs if it is new, unfinished if `resume`, or complete.

    Raises:
      TrajectoryError: the folder holds something else, another run, or an unfinished one without `resume`.
        Nothing in the folder is changed then.
    """
    directory = pathlib.Path(directory).absolute()
    directory.mkdir(parents=True, exist_ok=True)
    # A process killed while it began the run leaves nothing but the partial file, if that.
    if all(path.name == PARTIAL_RUN_FILE for path in directory.iterdir()):
        write_record(directory, record)
        return Trajectory(directory)

    trajectory = Trajectory(directory)
    problems = trajectory.record.differences(record)
    if problems:
        raise TrajectoryError(problem_list(f"{directory} holds another run:", problems))
    if not trajectory.complete and not resume:
        stored = _ranges(trajectory.epochs) or "none"
        raise TrajectoryError(
            f"{directory} holds an unfinished run (stored epochs: {stored}; wanted up to "
            f"{record.recipe.epochs}); pass resume=True to go on with it, or choose another folder"
        )
    return trajectory


def _check_bytes(path: pathlib.Path, subtrees: tuple[str, ...]) -> None:
    """Reads the bytes that Orbax will read, so that what is missing shows here first.

    Orbax opens all leaves at once and, when one fails, closes the event loop that the others report to: each
    of them would then print a traceback of its own. This takes less than 1 ms for a small network.
    """
    base = {"driver": "file", "path": f"{path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    prefixes = tuple(f"{name}.".encode() for name in subtrees)
    # Headers of the other subtrees too: Orbax reads those of all leaves for the shapes of any.
    keys = [key for key in store.list().result() if key.startswith(prefixes) or key.endswith(b"/.zarray")]
    if not keys:
        raise FileNotFoundError(
            f"no manifest in {path}"
        )  # TensorStore takes that for a store yet to be filled
    for key, read in [(key, store.read(key)) for key in keys]:
        if not read.result().value:  # where the file with the bytes is gone, TensorStore returns none
            raise FileNotFoundError(f"no bytes of {key.decode()} in {path}")


def _checksums(tree: Any) -> dict[str, int]:
    """CRC-32 of the bytes of every leaf, by path name."""
    return {name: zlib.crc32(np.asarray(leaf).tobytes()) for name, leaf in leaf_table(tree).items()}


def _compare_checksums(tree: Any, stored: Mapping[str, int] | None) -> None:
    """Fails where a leaf is not what was saved: Orbax does not notice every change of a file.

    Checkpoints of earlier versions have no checksums, and pass.
    """
    if stored is not None:
        changed = [name for name, value in _checksums(tree).items() if stored[name] != value]
        if changed:
            raise ValueError(f"not as saved: {', '.join(changed)}")


def _ranges(epochs: tuple[int, ...]) -> str:
    """Sorted epochs in short: ``"0-5, 8"``."""
    runs: list[list[int]] = []
    for epoch in epochs:
        if runs and epoch == runs[-1][-1] + 1:
            runs[-1].append(epoch)
        else:
            runs.append([epoch])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keeps Orbax from warning, at every save, that it had only one process to merge."""
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(max(level, logging.ERROR))
    try:
        yield
    finally:
        logger.setLevel(level)
