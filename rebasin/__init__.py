"""Alignment of neural networks modulo permutation, in JAX.

Everything here needs jax, numpy and scipy only. What trains networks (`rebasin.training`) and the models of
the experiments (`rebasin.models`) need the extra ``rebasin-jax[experiments]``.
"""

from rebasin.axis import Axis, Factor
from rebasin.barrier import Barrier, BarrierCurve, build_sweep, classification_metrics, sweep
from rebasin.batches import Batch
from rebasin.batchnorm import build_norm_reset
from rebasin.errors import RebasinError
from rebasin.inference.infer import infer_spec, register_rule
from rebasin.inference.verification import verify_spec
from rebasin.landscape import SimplexBarrier, SimplexSurface, build_simplex_sweep, simplex_grid
from rebasin.matching.activations import activation_matching
from rebasin.matching.assignment import maximise_assignment
from rebasin.matching.covariance import apply_metric, covariance_matching
from rebasin.matching.frank_wolfe import FrankWolfeMatching, frank_wolfe_matching
from rebasin.matching.many import (
    UniverseResult,
    cycle_error,
    match_to_reference,
    merge_many,
    universe_matching,
)
from rebasin.matching.partial import partial_weight_matching, widen
from rebasin.matching.registry import METHODS, match
from rebasin.matching.result import MatchResult
from rebasin.matching.sinkhorn import SinkhornMatching, sinkhorn_matching
from rebasin.matching.straight_through import StraightThroughMatching, straight_through_matching
from rebasin.matching.weights import joint_weight_matching, weight_matching, weight_matchings
from rebasin.merging import average
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
from rebasin.repair import Repair, build_repair
from rebasin.spec import PermutationSpec, Pin
from rebasin.trees import interpolate

__version__ = "0.1.0"

__all__ = [
    "Axis",
    "Barrier",
    "BarrierCurve",
    "Batch",
    "Factor",
    "FixedPoints",
    "FrankWolfeMatching",
    "METHODS",
    "MatchResult",
    "Permutation",
    "PermutationSpec",
    "Pin",
    "RebasinError",
    "Repair",
    "SimplexBarrier",
    "SimplexSurface",
    "SinkhornMatching",
    "StraightThroughMatching",
    "UniverseResult",
    "activation_matching",
    "apply_metric",
    "average",
    "build_norm_reset",
    "build_repair",
    "build_simplex_sweep",
    "build_sweep",
    "check_permutation",
    "classification_metrics",
    "compose",
    "covariance_matching",
    "cycle_error",
    "fixed_points",
    "frank_wolfe_matching",
    "identity_permutation",
    "infer_spec",
    "interpolate",
    "invert",
    "joint_weight_matching",
    "load_permutation",
    "match",
    "match_to_reference",
    "maximise_assignment",
    "merge_many",
    "partial_weight_matching",
    "permute",
    "random_permutation",
    "register_rule",
    "save_permutation",
    "simplex_grid",
    "sinkhorn_matching",
    "straight_through_matching",
    "sweep",
    "universe_matching",
    "verify_spec",
    "weight_matching",
    "weight_matchings",
    "widen",
]
