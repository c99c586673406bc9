"""``rebasin align``: permute the units of one checkpoint so that they match those of another."""

import pathlib
import sys
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from absl import flags

from rebasin.align import Aligned, align
from rebasin.barrier import build_sweep, classification_metrics
from rebasin.batches import Batch
from rebasin.checkpoints import (
    Checkpoint,
    check_absent,
    read_checkpoint,
    read_names,
    write_checkpoint,
)
from rebasin.command.arguments import load_data, load_function, load_object, make_inputs
from rebasin.command.card import card_path, origin, write_card
from rebasin.command.command import Command
from rebasin.matching.progress import MatchProgress
from rebasin.matching.registry import METHODS
from rebasin.permutation import fixed_points, save_permutation

__all__ = ["ALIGN", "define_model_flags", "describe", "read_model_flags"]

_ABOUT = """
Permutes the units of network B so that they match those of network A. The
permuted network computes the same function as B, and can be averaged with A.

  rebasin align --model my_package.models:apply --inputs 'float32[8,784]'
    --a a.safetensors --b b.safetensors --output b_aligned.safetensors

The symmetries of the model are inferred from the function and verified, then B
is matched with A and written in its own form: safetensors (one file or several
with an index), npz, Flax msgpack, Orbax or Equinox. A card, OUTPUT.json, says
how it was made. With --data, barriers before and after are measured.
"""

_FLAGS = flags.FlagValues()


def define_model_flags(values: flags.FlagValues, *, inputs: bool = True) -> None:
    """Define the flags that say what the model is and how its checkpoints are read.

    Args:
      values: where to define them.
      inputs: whether the command needs example inputs, which it does unless it has data.
    """
    flags.DEFINE_string(
        "model",
        None,
        "package.module:name of a function apply(params, *inputs), or of an object with such an apply, as a "
        "Flax module. Modules are looked for in the current folder too.",
        flag_values=values,
    )
    if inputs:
        flags.DEFINE_multi_string(
            "inputs",
            [],
            "An example input: a dtype with a shape, such as 'float32[8,784]' or 'int32[2,16]<50257' (random "
            "integers below the limit), or a .npy file. Given once for each input of the model.",
            flag_values=values,
        )
    flags.DEFINE_string(
        "names",
        None,
        "JSON file that maps names in the checkpoints to path names of the model, such as "
        '{"fc*.weight": {"path": "params/Dense_*/kernel", "axes": [1, 0]}}; null leaves an array out of the '
        "model.",
        flag_values=values,
    )
    flags.DEFINE_string(
        "template",
        None,
        "package.module:name of a tree with the containers that the model takes, or of a function that "
        "returns one; needed for lists and for Equinox.",
        flag_values=values,
    )


define_model_flags(_FLAGS)
flags.DEFINE_string("a", None, "Checkpoint of network A, which stays.", flag_values=_FLAGS)
flags.DEFINE_string("b", None, "Checkpoint of network B, which is permuted.", flag_values=_FLAGS)
flags.DEFINE_string("output", None, "The new checkpoint; it must not exist yet.", flag_values=_FLAGS)
flags.DEFINE_enum("method", "weights", list(METHODS), "The matching method.", flag_values=_FLAGS)
flags.DEFINE_string(
    "data",
    None,
    ".npz file with the arrays inputs and labels: for methods that need data, and to measure barriers.",
    flag_values=_FLAGS,
)
flags.DEFINE_list(
    "shared",
    None,
    "Leaves or subtrees that the networks have in common, where their heads differ.",
    flag_values=_FLAGS,
)
flags.DEFINE_string("permutation", None, "JSON file that gets the permutation too.", flag_values=_FLAGS)
flags.DEFINE_integer("seed", 0, "Seed of methods that draw at random.", flag_values=_FLAGS)


def read_model_flags(values: flags.FlagValues) -> tuple[Any, tuple[Any, ...], Any, Any]:
    """Return the function, the example inputs, the map of names and the template that the flags give."""
    template = None
    if values.template:
        template = load_object(values.template, flag="template")
        # Modules of Equinox can be called too, but they are trees: functions have no leaves.
        template = template() if jax.tree.leaves(template) == [template] and callable(template) else template
    names = read_names(values.names) if values.names else None
    inputs = make_inputs(values.inputs) if "inputs" in values else ()
    return load_function(values.model, flag="model"), inputs, names, template


def describe(label: str, checkpoint: Checkpoint) -> str:
    """Return one line about a checkpoint."""
    leaves = len(checkpoint.stored)
    left = f", {len(checkpoint.rest)} arrays left out" if checkpoint.rest else ""
    size = _count(checkpoint.num_parameters)
    return (
        f"{label}: {checkpoint.path} ({checkpoint.form}), {leaves} leaves, {size} parameters in "
        f"{' and '.join(checkpoint.dtypes)}{left}"
    )


def _count(number: int) -> str:
    for size, unit in ((1e9, " billion"), (1e6, " million"), (1e3, " thousand")):
        if number >= size:
            return f"{number / size:.3g}{unit}"
    return str(number)


def _run(values: flags.FlagValues) -> None:
    output = pathlib.Path(values.output)
    for path in (output, card_path(output), *([values.permutation] if values.permutation else [])):
        check_absent(path)
    apply_fn, inputs, names, template = read_model_flags(values)
    data = load_data(values.data) if values.data else None
    a = read_checkpoint(values.a, names=names, template=template)
    b = read_checkpoint(values.b, names=names, template=template)
    print(describe("A", a))
    print(describe("B", b), flush=True)
    began = time.perf_counter()
    aligned = align(
        apply_fn,
        a.tree,
        b.tree,
        *inputs,
        method=values.method,
        key=jax.random.key(values.seed),
        data=data,
        shared=values.shared,
        progress=_show if sys.stderr.isatty() else None,
    )
    seconds = time.perf_counter() - began
    spec, match = aligned.spec, aligned.match
    card = {**_card(values, a, b, aligned), "seconds": round(seconds, 2)}
    print(f"symmetries: {len(spec.groups)} groups, verified; {spec.unit_shares(b.tree)}")
    ending = "" if match.converged else ", not converged"
    print(
        f"matching by {values.method}: objective {match.objective[0]:.6g} to {match.objective[-1]:.6g}, "
        f"{match.num_iterations} iterations{ending}; {card['units_moved']:.1%} of the units get another "
        f"place; {seconds:.1f} s in all"
    )
    if data is not None and data.labels is not None:
        card["barriers"] = _measure(apply_fn, a.tree, b.tree, aligned.params, data)
    write_checkpoint(output, aligned.params, b)
    if values.permutation:
        save_permutation(values.permutation, spec, match.permutation)
    write_card(output, card)


def _measure(
    apply_fn: Callable[..., Any], params_a: Any, params_b: Any, moved: Any, data: Batch
) -> dict[str, dict[str, float]]:
    """Print and return the loss and error barriers between A and B before and after alignment."""
    sweep = build_sweep(classification_metrics(apply_fn))
    barriers = {}
    for name, tree in (("before", params_b), ("after", moved)):
        curve = sweep(params_a, tree, data)
        loss, error = float(curve.loss_barrier.value), float(curve.error_barrier.value)
        barriers[name] = {"loss": round(loss, 6), "error": round(error, 6)}
        print(f"barrier {name}: error {error:.2%}, loss {loss:.4g} nats")
    return barriers


def _card(values: flags.FlagValues, a: Checkpoint, b: Checkpoint, aligned: Aligned) -> dict[str, Any]:
    """Return how an aligned checkpoint was made."""
    spec, match = aligned.spec, aligned.match
    return {
        "method": values.method,
        "seed": values.seed,
        "model": values.model,
        "inputs": values.inputs,
        "a": origin(a),
        "b": origin(b),
        "spec_digest": spec.digest,
        "groups": {group: list(np.shape(row)) for group, row in match.permutation.items()},
        "units_moved": round(1 - fixed_points(match.permutation).total, 6),
        "objective": [round(float(value), 6) for value in match.objective],
        "converged": bool(match.converged),
    }


def _show(progress: MatchProgress) -> None:
    """Show how far the matching is on one line of a terminal, which is empty at the end."""
    of = "" if progress.limit is None else f" of at most {progress.limit}"
    value = "" if progress.objective is None else f", objective {progress.objective:.6g}"
    text = "" if progress.done else f"{progress.stage}: iteration {progress.iteration}{of}{value}"
    print(f"\r{text:<78}", end="\r" if progress.done else "", file=sys.stderr, flush=True)


ALIGN = Command("align", _ABOUT, _FLAGS, ("model", "a", "b", "output", "inputs"), _run)
