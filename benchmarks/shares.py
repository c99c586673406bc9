"""What both tables of docs/architectures.md have: the share of numbers that move, and reasons in short."""

import re
from typing import Any

import numpy as np

import rebasin
from rebasin.axis import iter_blocks
from rebasin.trees import leaf_table

__all__ = ["parameter_share", "short_reason"]


def parameter_share(spec: rebasin.PermutationSpec, tree: Any) -> float:
    """Return the share of all numbers in a tree that lie on an axis which some group permutes."""
    moving = total = 0
    for path, leaf in leaf_table(tree).items():
        for block in iter_blocks(spec.table[path], np.shape(leaf)):
            count = int(np.prod(block.shape))
            total += count
            moving += count * any(label in spec.groups for label in block.labels)
    return moving / max(total, 1)


def short_reason(reason: str) -> str:
    """Return the reason of a pin without its source line and numbers.

    Examples:
      >>> short_reason("slice (model.py:12): one position in 2")
      'slice: one position in 2'
      >>> short_reason("meets an axis of input 3")
      'input'
    """
    reason = re.sub(r" \([^()]*:\d+\)", "", reason)
    kinds = {r"meets an axis of input \d+": "input", r"reaches an axis of output \d+": "output"}
    return next((short for long, short in kinds.items() if re.fullmatch(long, reason)), reason)
