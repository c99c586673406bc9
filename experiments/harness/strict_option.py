"""The flag of binaries that make claims; the others do not know it."""

from absl import flags

__all__ = ["STRICT"]

STRICT = flags.DEFINE_bool("strict", False, "Exit with status 1 if a claim does not hold.")
