"""The card beside a checkpoint that a command writes: how it was made, as JSON."""

import json
import pathlib
from collections.abc import Mapping
from typing import Any

import jax

import rebasin
from rebasin.checkpoints import Checkpoint, checkpoint_digest
from rebasin.files import write_whole

__all__ = ["card_path", "origin", "write_card"]


def card_path(output: pathlib.Path) -> pathlib.Path:
    """Return where the card of a checkpoint lies: beside it, with ``.json`` at the end of its name."""
    return output.with_name(f"{output.name}.json")


def origin(checkpoint: Checkpoint) -> dict[str, str]:
    """Return what a card says of a checkpoint that was read."""
    digest = checkpoint_digest(checkpoint.path)
    return {"path": str(checkpoint.path), "form": checkpoint.form, "sha256": digest}


def write_card(output: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Write the card of a checkpoint and say where both are.

    It is written last: where a card is, everything else is too.
    """
    card = {"made_by": f"rebasin {rebasin.__version__}, jax {jax.__version__}", **content}
    write_whole(card_path(output), f"{json.dumps(card, indent=2)}\n".encode())
    print(f"written: {output}, with its card {card_path(output)}")
