"""What a training run was: the ``run.json`` beside its checkpoints."""

import dataclasses
import json
import pathlib
from collections.abc import Iterator, Mapping
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, TrajectoryError
from rebasin.recipes import Recipe
from rebasin.trees import leaf_table

__all__ = ["RunRecord", "describe_leaves", "parse_leaf", "read_record", "write_record"]

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
