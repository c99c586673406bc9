"""What ``--algorithm`` chooses: how the paper's two matching methods search for a permutation."""

from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

__all__ = ["ALGORITHMS", "PAPER_ALGORITHM", "algorithm_options"]

# arXiv 2404.06498, appendix A. Activations are then compared on all training data, see `options.choose`.
PAPER_ALGORITHM = "paper"

# Options of single methods, by algorithm and method, in place of the methods' defaults. What they mean, and
# what is equal in result to the letter of the paper, is in docs/fidelity.md.
ALGORITHMS: Mapping[str, Mapping[str, Mapping[str, Any]]] = MappingProxyType(
    {
        PAPER_ALGORITHM: {
            "weights": {"start": "identity", "restarts": 0},
            "activations": {"sites": "last", "similarity": "inner"},
        },
        "best": {},
    }
)


def algorithm_options(algorithm: str, method: str) -> Mapping[str, Any]:
    """Return the options with which an algorithm calls a matching method.

    Examples:
      >>> algorithm_options("paper", "weights"), algorithm_options("best", "weights")
      ({'start': 'identity', 'restarts': 0}, {})
    """
    return ALGORITHMS[algorithm].get(method, {})
