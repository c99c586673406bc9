"""A training run on disk: one Orbax checkpoint per epoch, and a description of the run in ``run.json``.

The folder of a run holds ``run.json``, which `RunRecord` reads and writes, and one folder per stored epoch,
named by its number. `open_run` begins or reopens a run in order to train it; `Trajectory` reads its epochs.
"""

import contextlib
import dataclasses
import hashlib
import json
import logging
import math
import operator
import os
import pathlib
import re
import sys
import time
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

from rebasin.errors import TrajectoryError, problem_list
from rebasin.training.folders import expand_home
from rebasin.training.lock import LOCK_FILE
from rebasin.training.recipes import Recipe, recipe_fields
from rebasin.trees import leaf_table

__all__ = [
    "RunRecord",
    "Trajectory",
    "describe_leaves",
    "find_finished",
    "make_run_folder",
    "open_run",
    "tree_bytes",
]

# Versions of the format of ``run.json``: that of most runs, and that of runs with a mask, which a program
# that knows no masks would take for runs without. Increase them when old versions cannot read new files.
_SCHEMA_VERSION, _MASKED_VERSION = 1, 2

_RUN_FILE = "run.json"

# ``run.json`` while it is written, before it is renamed.
_PARTIAL_RUN_FILE = "run.json.partial"

# The packages whose versions ``run.json`` names: those that decide what the stored numbers are.
_PACKAGES = ("jax", "flax", "optax", "orbax-checkpoint")

# Variables and optimiser state are two subtrees of one Orbax item. Two items would make a save take half as
# long again, because of threads and event loops rather than bytes; and one item is no disadvantage, since
# Orbax reads one subtree without the bytes of the other.
_ITEM = "state"

# The name of the leaves' checksums among the metrics of an epoch on disk.
_CHECKSUMS = "crc32"
# The name under which the epoch and the digest of the run stand there: exchanged folders are found out.
_ORIGIN = "origin"


# How long after the first leaf that cannot be written the others are awaited.
_LATE_SECONDS = 0.5


@dataclasses.dataclass(frozen=True)
class RunRecord:
    """Everything that determines the numbers of a run, as stored in its ``run.json``.

    Attributes:
      recipe: the recipe.
      seed: seed of the initialisation, the data order and the augmentation.
      num_examples: size of the training split after the recipe's `num_train`.
      leaves: dtype and shape of every leaf of the network, as ``"float32[64, 128]"``, by path name.
      start: epoch and fingerprint of the variables that the run started from; `None` for a run with a random
        initialisation of its own.
      mask: `rebasin.masks.mask_digest` of the mask of the weights that are trained; `None` for all weights.
    """

    recipe: Recipe
    seed: int
    num_examples: int
    leaves: Mapping[str, str]
    start: Mapping[str, Any] | None = None
    mask: str | None = None

    @property
    def first_epoch(self) -> int:
        """The epoch of the tree that the run starts from."""
        return 0 if self.start is None else self.start["epoch"]

    @property
    def digest(self) -> str:
        """A hash of recipe, seed, start and mask of the run, which is stored with every epoch."""
        fields = self._fields()
        del fields["leaves"]
        text = json.dumps(fields, sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()[:16]

    def _fields(self) -> dict[str, Any]:
        """Return all fields, without the mask where there is none, as runs were stored before masks."""
        fields = {**dataclasses.asdict(self), "recipe": recipe_fields(self.recipe)}
        if self.mask is None:
            del fields["mask"]
        return fields

    def differences(self, wanted: "RunRecord") -> list[str]:
        """Return one line for each field in which this stored record differs from the one wanted."""
        ours, theirs = (dict(_flatten("", dataclasses.asdict(record))) for record in (self, wanted))
        return [
            f"{name}: stored {ours.get(name)!r}, wanted {theirs.get(name)!r}"
            for name in {**ours, **theirs}
            if ours.get(name) != theirs.get(name)
        ]

    def write(self, directory: pathlib.Path) -> None:
        """Write ``run.json`` and rename it into place, so that no reader finds half a file."""
        content = {
            "schema_version": _SCHEMA_VERSION if self.mask is None else _MASKED_VERSION,
            **self._fields(),
            "versions": {name: metadata.version(name) for name in _PACKAGES},
        }
        partial = directory / _PARTIAL_RUN_FILE
        partial.write_text(json.dumps(content, indent=2) + "\n")
        partial.replace(directory / _RUN_FILE)

    @classmethod
    def read(cls, directory: pathlib.Path) -> "RunRecord":
        """Read ``run.json``; raise `TrajectoryError` where it is missing or cannot be understood."""
        path = directory / _RUN_FILE
        if not path.is_file():
            raise TrajectoryError(f"{directory} is not a trajectory: it has no {_RUN_FILE}")
        try:
            content = json.loads(path.read_text())
            if content["schema_version"] not in (_SCHEMA_VERSION, _MASKED_VERSION):
                raise TrajectoryError(
                    f"{path} has schema_version {content['schema_version']}, and this version of rebasin "
                    f"reads {_SCHEMA_VERSION} and {_MASKED_VERSION}"
                )
            masked = content["schema_version"] == _MASKED_VERSION
            content["mask"] = operator.concat("", content["mask"]) if masked else None
            fields = {field.name: content[field.name] for field in dataclasses.fields(cls)}
            traverse_util.unflatten_dict(_parse_leaves(content["leaves"]), sep="/")
            if content["start"] is not None:
                operator.index(content["start"]["epoch"])
            operator.index(content["seed"])
            return cls(**{**fields, "recipe": Recipe(**content["recipe"])})
        # A file that is no JSON, no text, or has a number of too many digits gives a ValueError.
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError, AssertionError) as error:
            if isinstance(error, TrajectoryError):
                raise
            raise TrajectoryError(
                f"{path} is damaged or was not written by this version of rebasin"
            ) from error


class Trajectory:
    """The networks of one training run by epoch, read from disk when asked for.

    Epoch 0 is the initialisation. Stored epochs may be sparse; iteration yields them in order.

    Args:
      directory: folder that `rebasin.training.train` wrote.

    Attributes:
      directory: that folder, as an absolute path.
      record: everything that determines the run, from its ``run.json``.

    Raises:
      TrajectoryError: the folder is not a trajectory, or its ``run.json`` cannot be read.
    """

    def __init__(self, directory: str | os.PathLike[str]):
        self.directory = _resolve(directory)
        self.record = RunRecord.read(self.directory)
        # Saving is synchronous. The 20 to 30 ms of a small network are processor time, which a background
        # thread would only take from the next epoch; and no epoch should be reported before it is on disk.
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
        """The stored epochs, in order."""
        return tuple(sorted(self._manager.all_steps()))

    @property
    def complete(self) -> bool:
        """Whether the run has reached the last epoch of its recipe."""
        return self.record.recipe.epochs in self.epochs

    @property
    def recipe(self) -> Recipe:
        """The recipe of the run."""
        return self.record.recipe

    @property
    def seed(self) -> int:
        """The seed of the run."""
        return self.record.seed

    @property
    def last(self) -> Any:
        """The tree of the last stored epoch."""
        return self[max(self.epochs, default=self.record.first_epoch)]

    def __iter__(self) -> Iterator[int]:
        return iter(self.epochs)

    def __len__(self) -> int:
        return len(self.epochs)

    def __contains__(self, epoch: object) -> bool:
        return epoch in self.epochs

    def __getitem__(self, epoch: int) -> Any:
        """Read the tree of one epoch: nested dicts of NumPy arrays, structured as Flax variables.

        Raises:
          TrajectoryError: the epoch is not stored, does not fit ``run.json``, or is damaged.
        """
        wanted = _parse_leaves(self.record.leaves)
        return self.restore(epoch, {"variables": traverse_util.unflatten_dict(wanted, sep="/")})["variables"]

    def metrics(self, epoch: int) -> dict[str, float]:
        """Read the training metrics of an epoch; the tree that the run started from has none."""
        self._check_stored(epoch)
        with self._reading(epoch):
            stored = self._metadata(epoch)
            return {name: value for name, value in stored.items() if name not in (_CHECKSUMS, _ORIGIN)}

    def save(self, epoch: int, state: Mapping[str, Any], metrics: Mapping[str, float]) -> None:
        """Store the state of one epoch, as one transaction: a killed process leaves all of it or none.

        Args:
          epoch: the epoch, later than all stored ones.
          state: the subtree ``"variables"``, and all else that a resumed run needs.
          metrics: training metrics of the epoch.

        Raises:
          TrajectoryError: the epoch cannot be written, for example because the disk is full.
        """
        state = jax.device_get(dict(state))
        arguments = ocp.args.Composite(**{_ITEM: ocp.args.PyTreeSave(state)})
        origin = {"epoch": epoch, "run": self.record.digest}
        notes = {**metrics, _CHECKSUMS: _checksums(state), _ORIGIN: origin}
        try:
            with _quiet(), _without_late_tracebacks():
                self._manager.save(epoch, args=arguments, custom_metadata=notes)
        # What fails comes from the system as OSError, and from TensorStore as ValueError or RuntimeError.
        except Exception as error:
            raise TrajectoryError(
                f"epoch {epoch} cannot be stored in {self.directory}: {_reason(error)}. Epochs before it are "
                "stored; mend that and resume (resume=True, or --resume of an experiment)"
            ) from error

    def drop(self, epochs: Iterable[int]) -> None:
        """Delete stored epochs to free their disk space, and ignore epochs that are not stored.

        Args:
          epochs: what to delete. The last stored epoch must stay, as it tells how far the run has come.

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
        """Read some subtrees of an epoch's state, after comparing what is stored with what is wanted.

        Args:
          epoch: a stored epoch.
          wanted: subtrees of the state by name. Their leaves are anything with a shape and a dtype.

        Returns:
          A tree like `wanted`, of NumPy arrays.

        Raises:
          TrajectoryError: the epoch is not stored, was saved for another epoch or run, has other leaves,
            shapes or dtypes, or is damaged.
        """
        self._check_stored(epoch)
        self._check_leaves(epoch, wanted)
        self._check_origin(epoch)
        target = dict(wanted)
        as_numpy = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), target)
        arguments = ocp.args.PyTreeRestore(item=target, restore_args=as_numpy, partial_restore=True)
        with self._reading(epoch):
            tree = self._manager.restore(epoch, args=ocp.args.Composite(**{_ITEM: arguments}))[_ITEM]
            _compare_checksums(tree, self._metadata(epoch).get(_CHECKSUMS))
        return tree

    def _check_stored(self, epoch: int) -> None:
        """Raise `TrajectoryError` unless an epoch is stored."""
        if epoch not in self:
            stored = _ranges(self.epochs) or "none"
            raise TrajectoryError(f"epoch {epoch} of {self.directory} is not stored; stored epochs: {stored}")

    def _check_origin(self, epoch: int) -> None:
        """Raise `TrajectoryError` if a checkpoint was saved for another epoch or by another run.

        Checkpoints of earlier versions do not say where they come from, and are accepted unchecked.
        """
        with self._reading(epoch):
            origin = self._metadata(epoch).get(_ORIGIN)
        expected = {"epoch": epoch, "run": self.record.digest}
        if origin is not None and dict(origin) != expected:
            other = f"epoch {origin['epoch']}" if origin["epoch"] != epoch else "another run"
            raise TrajectoryError(
                f"the checkpoint in {self.directory / str(epoch)} was saved for {other}; folders of epochs "
                "must not be moved or copied between runs"
            )

    def _check_leaves(self, epoch: int, wanted: Mapping[str, Any]) -> None:
        """Raise `TrajectoryError` unless the stored leaves are there with the shapes and dtypes wanted."""
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

    def _metadata(self, epoch: int) -> dict[str, Any]:
        """Read the metrics of an epoch and the checksums of its leaves."""
        return dict(self._manager.metadata(epoch).custom_metadata or {})

    @contextlib.contextmanager
    def _reading(self, epoch: int) -> Iterator[None]:
        """Turn whatever is raised on a damaged checkpoint into one error that names the checkpoint."""
        try:
            with _quiet():
                yield
        except Exception as error:
            raise TrajectoryError(
                f"the checkpoint in {self.directory / str(epoch)} is damaged or incomplete. Other epochs can "
                f"still be read; to make this one anew, delete the folders of epoch {epoch} and later, and "
                "train with resume=True"
            ) from error


def find_finished(directory: str | os.PathLike[str], record: RunRecord) -> Trajectory | None:
    """Return the finished run of a record if the folder holds it, else `None`; change nothing.

    Raises:
      TrajectoryError: the folder has a name in which checkpoints cannot be read again.
    """
    directory = _resolve(directory)
    try:
        trajectory = Trajectory(directory)
    except TrajectoryError:
        return None
    return trajectory if trajectory.complete and not trajectory.record.differences(record) else None


def make_run_folder(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Make the folder of a run unless it is there, and return its absolute path.

    Raises:
      TrajectoryError: the folder has a name in which checkpoints cannot be read again.
    """
    folder = _resolve(directory)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def open_run(directory: pathlib.Path, record: RunRecord, *, resume: bool) -> Trajectory:
    """Open the folder of a run in order to train it, and begin the run if the folder is new or empty.

    Args:
      directory: the run's folder, made by `make_run_folder` and locked by the caller.
      record: the run that the folder should hold.
      resume: whether an unfinished run may be continued.

    Returns:
      The trajectory. It has no epochs if the run is new, some if the run is continued, and is complete if
      there is nothing left to train.

    Raises:
      TrajectoryError: the folder holds something else, another run, or an unfinished one without `resume`.
        Nothing in the folder is changed then.
    """
    # A process that is killed before the run has begun leaves a folder with nothing else in it.
    if all(path.name in (_PARTIAL_RUN_FILE, LOCK_FILE) for path in directory.iterdir()):
        record.write(directory)
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


# What Orbax and TensorStore take for a pattern, an escape or a protocol: checkpoints are written below such a
# path, or somewhere else, and cannot be read again.
_UNREADABLE = ("[", "]", "\\", "**", "gs:", "s3:")


def _resolve(directory: str | os.PathLike[str]) -> pathlib.Path:
    """Return the folder of a run as an absolute path without ``..``, with ``~`` for the home folder.

    Raises:
      TrajectoryError: checkpoints below this path could not be read again.
    """
    if not os.fspath(directory):
        raise TrajectoryError("the folder of a run has an empty name")
    path = expand_home(directory).resolve()
    found = [part for part in _UNREADABLE if part in str(path)]
    if found:
        raise TrajectoryError(
            f"{path}: checkpoints below a folder with {' and '.join(map(repr, found))} in its path cannot be "
            "read again; choose another folder"
        )
    return path


def describe_leaves(tree: Any) -> dict[str, str]:
    """Describe every leaf of a tree by its dtype and shape, by path name.

    Examples:
      >>> describe_leaves({"bias": np.zeros(3, np.float32)})
      {'bias': 'float32[3]'}
    """
    return {name: f"{np.dtype(leaf.dtype).name}{list(leaf.shape)}" for name, leaf in leaf_table(tree).items()}


def tree_bytes(tree: Any) -> int:
    """Return the size of all leaves of a tree in bytes.

    Examples:
      >>> tree_bytes({"bias": np.zeros(3, np.float32)})
      12
    """
    return sum(math.prod(leaf.shape) * np.dtype(leaf.dtype).itemsize for leaf in jax.tree.leaves(tree))


def _parse_leaves(leaves: Mapping[str, str]) -> dict[str, jax.ShapeDtypeStruct]:
    """Read dtype and shape of every leaf from the descriptions by `describe_leaves`."""
    parsed = {}
    for name, text in leaves.items():
        dtype, _, shape = text.partition("[")
        parsed[name] = jax.ShapeDtypeStruct(tuple(json.loads("[" + shape)), jnp.dtype(dtype))
    return parsed


def _flatten(prefix: str, value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the values of nested mappings with dotted names, for example ``("recipe.width", 128)``."""
    if isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _flatten(f"{prefix}.{key}" if prefix else key, inner)
    else:
        yield prefix, value


def _ranges(epochs: tuple[int, ...]) -> str:
    """Write sorted epochs as ranges: ``"0-5, 8"``."""
    runs: list[list[int]] = []
    for epoch in epochs:
        if runs and epoch == runs[-1][-1] + 1:
            runs[-1].append(epoch)
        else:
            runs.append([epoch])
    return ", ".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _check_bytes(path: pathlib.Path, subtrees: tuple[str, ...]) -> None:
    """Read the bytes that Orbax will read, and raise where some are missing.

    Orbax reads all leaves at once. When one fails, it closes the event loop to which the others report, and
    each of them prints a traceback of its own. Failing here first avoids that. It takes less than 1 ms for a
    small network.
    """
    base = {"driver": "file", "path": f"{path}/"}
    store = tensorstore.KvStore.open({"driver": "ocdbt", "base": base}).result()
    prefixes = tuple(f"{name}.".encode() for name in subtrees)
    # The headers of the other subtrees are read too, as Orbax needs them all to know the shape of any leaf.
    keys = [key for key in store.list().result() if key.startswith(prefixes) or key.endswith(b"/.zarray")]
    if not keys:
        # TensorStore takes a missing manifest for a store that is still to be filled.
        raise FileNotFoundError(f"no manifest in {path}")
    for key, read in [(key, store.read(key)) for key in keys]:
        if not read.result().value:  # where the file with the bytes is gone, TensorStore returns none
            raise FileNotFoundError(f"no bytes of {key.decode()} in {path}")


def _checksums(tree: Any) -> dict[str, int]:
    """Return the CRC-32 of the bytes of every leaf, by path name."""
    return {name: zlib.crc32(np.asarray(leaf).tobytes()) for name, leaf in leaf_table(tree).items()}


def _compare_checksums(tree: Any, stored: Mapping[str, int] | None) -> None:
    """Raise where a leaf differs from what was saved, since Orbax does not notice every change of a file.

    Checkpoints of earlier versions have no checksums. They are accepted unchecked.
    """
    if stored is not None:
        changed = [name for name, value in _checksums(tree).items() if stored[name] != value]
        if changed:
            raise ValueError(f"not as saved: {', '.join(changed)}")


def _reason(error: BaseException) -> str:
    """Return what the system says about an error of TensorStore or Orbax, or else the error's own text."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    # TensorStore puts the number of the system's error into its text.
    found = re.search(r"os_error_code='(\d+)'", str(error))
    if found:
        return os.strerror(int(found.group(1)))
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


@contextlib.contextmanager
def _without_late_tracebacks() -> Iterator[None]:
    """Silence the leaves that fail after the first one while a checkpoint is written.

    When a leaf cannot be written, Orbax raises its error and closes the event loop to which the others
    report. Each of them then raises in a thread of TensorStore, where nobody can catch it, and Python prints
    its traceback.
    """
    hook = sys.unraisablehook
    sys.unraisablehook = lambda _: None
    try:
        yield
    except Exception:
        time.sleep(_LATE_SECONDS)
        raise
    finally:
        sys.unraisablehook = hook


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Silence Orbax: it warns at every save, and prints the traceback of each thread that fails.

    What fails is raised as well.
    """
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        logger.setLevel(level)
