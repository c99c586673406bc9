"""The methods that are compared, with one signature: ``(spec, a, b, key=key) -> Found``."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax

import rebasin
from benchmarks.git_rebasin import git_rebasin_matching

__all__ = ["METHODS", "OURS", "PEER", "Found", "first_call"]


class Found(NamedTuple):
    """What a method found.

    Attributes:
      permutation: index array for each group.
      sweeps: passes over all groups.
      solves: linear assignments.
    """

    permutation: Mapping[str, Any]
    sweeps: int
    solves: int


def _peer(*args: Any, **options: Any) -> Found:
    return Found(*git_rebasin_matching(*args, **options))


def _ours(*args: Any, **options: Any) -> Found:
    match = rebasin.weight_matching(*args, **options)
    return Found(match.permutation, match.num_iterations, match.stats["assignments"])


PEER = "git-re-basin"
OURS = "rebasin"  # with its defaults

METHODS: Mapping[str, Callable[..., Found]] = {
    PEER: _peer,
    "rebasin, identity": functools.partial(_ours, start="identity"),
    OURS: _ours,
}


def first_call(method: str, spec: rebasin.PermutationSpec, a: Any, b: Any, seed: int) -> float:
    """Seconds of a method's first call in this process, the networks being on the device.

    Imports, the start of the backend and the spec do not count: whatever the method, a program has them once.
    """
    a, b, key = jax.block_until_ready((*jax.device_put((a, b)), jax.random.key(seed)))
    began = time.perf_counter()
    METHODS[method](spec, a, b, key=key)
    return time.perf_counter() - began
