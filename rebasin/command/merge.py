"""``rebasin merge``: average checkpoints whose units are in one order."""

import json
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from absl import flags

from rebasin.arithmetic import average, in_common_dtypes
from rebasin.checkpoints import (
    check_absent,
    read_checkpoint,
    read_names,
    write_checkpoint,
)
from rebasin.command.align import describe
from rebasin.command.card import card_path, origin, write_card
from rebasin.command.command import Command
from rebasin.errors import ConfigError
from rebasin.trees import conform

__all__ = ["MERGE"]

_ABOUT = """
Averages networks whose units are in one order: those that rebasin align wrote,
and the network that they were aligned with. The result has the form of the
first. A card, OUTPUT.json, says how it was made.

  rebasin merge --networks a.safetensors,b_aligned.safetensors
    --output merged.safetensors
  rebasin merge --networks a,b --weights ratios.json --output merged

Counters, running statistics and other leaves that are no weights are taken from
the network with the largest weight. Running statistics of a BatchNorm have to
be measured anew (rebasin.build_norm_reset), which this command cannot do.
"""

_FLAGS = flags.FlagValues()
flags.DEFINE_list("networks", None, "Checkpoints, at least two.", flag_values=_FLAGS)
flags.DEFINE_string("output", None, "The new checkpoint; it must not exist yet.", flag_values=_FLAGS)
flags.DEFINE_string(
    "weights",
    None,
    "One number for each network, such as 0.7,0.3, by default equal ones; or a JSON file that maps path "
    'names of leaves or subtrees to such numbers, such as {"": [0.5, 0.5], "layers/*/mlp": [0.3, 0.7]}.',
    flag_values=_FLAGS,
)
flags.DEFINE_string("names", None, "JSON file that maps names, as in rebasin align.", flag_values=_FLAGS)


def _weights(text: str | None) -> Sequence[float] | Mapping[str, Sequence[float]] | None:
    """Return what ``--weights`` says."""
    if text is None:
        return None
    try:
        if not text.endswith(".json"):
            return [float(number) for number in text.split(",")]
        content = json.loads(pathlib.Path(text).read_text())
        return {str(name): [float(number) for number in numbers] for name, numbers in content.items()}
    except (ValueError, TypeError, AttributeError) as error:
        raise ConfigError(
            f"--weights: wanted numbers such as 0.7,0.3 or a JSON file of them by path name, got {text}: "
            f"{error}"
        ) from None


def _average(trees: Sequence[Any], weights: Sequence[float] | Mapping[str, Sequence[float]] | None) -> Any:
    """Average networks in the widest of their precisions, and round once to that of the first."""
    first = trees[0]
    names = [f"network {i}" for i in range(len(trees))]
    conformed = [
        conform(first, tree, names=(names[0], name), dtypes=False)
        for name, tree in zip(names, trees, strict=True)
    ]
    double = any(
        leaf.dtype in (np.float64, np.complex128) for tree in trees for leaf in jax.tree.leaves(tree)
    )
    # Without this JAX takes float64 for float32.
    with jax.enable_x64(double):
        merged = average(in_common_dtypes(conformed, names=names), weights)
        return jax.tree.map(lambda value, leaf: np.asarray(value).astype(leaf.dtype), merged, first)


def _run(values: flags.FlagValues) -> None:
    output = pathlib.Path(values.output)
    for path in (output, card_path(output)):
        check_absent(path)
    if len(values.networks) < 2:
        raise ConfigError(f"--networks: wanted at least two checkpoints, got {len(values.networks)}")
    weights = _weights(values.weights)
    names = read_names(values.names) if values.names else None
    checkpoints = [read_checkpoint(path, names=names) for path in values.networks]
    for i, checkpoint in enumerate(checkpoints):
        print(describe(f"network {i}", checkpoint))
    write_checkpoint(output, _average([c.tree for c in checkpoints], weights), checkpoints[0])
    write_card(output, {"networks": [origin(c) for c in checkpoints], "weights": weights})


MERGE = Command("merge", _ABOUT, _FLAGS, ("networks", "output"), _run)
