"""The flag of binaries whose matching methods can be chosen; the others do not know it."""

from absl import flags

import rebasin

__all__ = ["METHODS"]

METHODS = flags.DEFINE_list(
    "methods",
    None,
    f"Matching methods, in the order of the figures, among {', '.join(rebasin.METHODS)}; by default weights "
    "and activations, in compare_methods all.",
)
