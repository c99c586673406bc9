"""The weight matchings that are compared, all called as ``(spec, params_a, params_b, key=key) -> Found``."""

import functools
import time
from collections.abc import Callable, Mapping
from typing import Any

import jax

import rebasin
from benchmarks.git_rebasin import Found, git_rebasin_matching

__all__ = ["METHODS", "OURS", "PEER", "first_call"]


def _ours(*args: Any, **options: Any) -> Found:
    match = rebasin.weight_matching(*args, **options)
    return Found(match.permutation, match.num_iterations, match.stats["assignments"])


PEER = "git-re-basin"
OURS = "rebasin"  # with its defaults

METHODS: Mapping[str, Callable[..., Found]] = {
    PEER: git_rebasin_matching,
    "rebasin, identity": functools.partial(_ours, start="identity"),
    OURS: _ours,
}


def first_call(method: str, spec: rebasin.PermutationSpec, params_a: Any, params_b: Any, seed: int) -> float:
    """Return the seconds of a method's first call in this process, the networks being on the device.

    Imports, the start of the backend and the spec do not count: whatever the method, a program has them once.
    """
    a, b, key = jax.block_until_ready((*jax.device_put((params_a, params_b)), jax.random.key(seed)))
    began = time.perf_counter()
    METHODS[method](spec, a, b, key=key)
    return time.perf_counter() - began
