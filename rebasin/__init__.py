"""Alignment of neural networks modulo permutation, in JAX.

Everything here needs jax, numpy and scipy only. Training, data, models and trajectories on disk live in
modules of their own (`rebasin.training`, `rebasin.data`, `rebasin.models`, `rebasin.trajectory`) and need the
extra ``rebasin-jax[experiments]``.
"""

from rebasin.assignment import maximise_assignment
from rebasin.axis import Axis, Factor
from rebasin.barrier import Barrier, BarrierCurve, build_sweep, sweep
from rebasin.errors import RebasinError
from rebasin.inference import infer_spec, register_rule
from rebasin.matching.activations import activation_matching
from rebasin.matching.covariance import apply_metric, covariance_matching
from rebasin.matching.result import MatchResult
from rebasin.matching.weights import weight_matching
from rebasin.permutation import (
    FixedPoints,
    Permutation,
    check_permutation,
    compose,
    fixed_points,
    identity_permutation,
    invert,
    load_permutation,
    permute,
    random_permutation,
    save_permutation,
)
from rebasin.repair import Repair, build_norm_reset, build_repair
from rebasin.spec import PermutationSpec, Pin
from rebasin.trees import interpolate
from rebasin.verification import verify_spec

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "Barrier",
    "BarrierCurve",
    "Factor",
    "FixedPoints",
    "MatchResult",
    "Permutation",
    "PermutationSpec",
    "Pin",
    "RebasinError",
    "Repair",
    "activation_matching",
    "apply_metric",
    "build_norm_reset",
    "build_repair",
    "build_sweep",
    "check_permutation",
    "compose",
    "covariance_matching",
    "fixed_points",
    "identity_permutation",
    "infer_spec",
    "interpolate",
    "invert",
    "load_permutation",
    "maximise_assignment",
    "permute",
    "random_permutation",
    "register_rule",
    "save_permutation",
    "sweep",
    "verify_spec",
    "weight_matching",
]
