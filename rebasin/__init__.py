"""Alignment of neural networks modulo permutation, in JAX.

Everything here needs jax, numpy and scipy only. What trains networks (`rebasin.training`) and the models of
the experiments (`rebasin.models`) need the extra ``rebasin-jax[experiments]``.
"""

from rebasin.align import Aligned, align
from rebasin.arithmetic import average, interpolate
from rebasin.axis import Axis
from rebasin.barrier import build_sweep, classification_metrics, sweep
from rebasin.batches import Batch
from rebasin.batchnorm import build_norm_reset
from rebasin.diagnosis.diagnosis import diagnose
from rebasin.diagnosis.report import Diagnosis
from rebasin.errors import RebasinError
from rebasin.inference.infer import infer_spec
from rebasin.inference.rule import register_rule
from rebasin.inference.verification import verify_spec
from rebasin.landscape import build_plane, build_plane_sweep, build_simplex_sweep
from rebasin.matching.activations import ActivationMatching, activation_matching
from rebasin.matching.all_pairs import all_pairs_matching
from rebasin.matching.covariance import CovarianceMatching, covariance_matching
from rebasin.matching.frank_wolfe import FrankWolfeMatching, frank_wolfe_matching
from rebasin.matching.many import merge_many, universe_matching
from rebasin.matching.partial import partial_weight_matching
from rebasin.matching.registry import METHODS, match
from rebasin.matching.result import MatchResult
from rebasin.matching.sinkhorn import SinkhornMatching, sinkhorn_matching
from rebasin.matching.straight_through import StraightThroughMatching, straight_through_matching
from rebasin.matching.weights import WeightMatching, joint_weight_matching, weight_matching
from rebasin.permutation import (
    compose,
    fixed_points,
    identity_permutation,
    invert,
    load_permutation,
    permute,
    random_permutation,
    save_permutation,
)
from rebasin.repair import build_repair
from rebasin.spec import PermutationSpec
from rebasin.temperature import build_temperature

__version__ = "0.1.0"

__all__ = [
    "METHODS",
    "ActivationMatching",
    "Aligned",
    "Axis",
    "Batch",
    "CovarianceMatching",
    "Diagnosis",
    "FrankWolfeMatching",
    "MatchResult",
    "PermutationSpec",
    "RebasinError",
    "SinkhornMatching",
    "StraightThroughMatching",
    "WeightMatching",
    "activation_matching",
    "align",
    "all_pairs_matching",
    "average",
    "build_norm_reset",
    "build_plane",
    "build_plane_sweep",
    "build_repair",
    "build_simplex_sweep",
    "build_sweep",
    "build_temperature",
    "classification_metrics",
    "compose",
    "covariance_matching",
    "diagnose",
    "fixed_points",
    "frank_wolfe_matching",
    "identity_permutation",
    "infer_spec",
    "interpolate",
    "invert",
    "joint_weight_matching",
    "load_permutation",
    "match",
    "merge_many",
    "partial_weight_matching",
    "permute",
    "random_permutation",
    "register_rule",
    "save_permutation",
    "sinkhorn_matching",
    "straight_through_matching",
    "sweep",
    "universe_matching",
    "verify_spec",
    "weight_matching",
]
