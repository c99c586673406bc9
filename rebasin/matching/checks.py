"""What every matching method asks of its networks before it starts."""

from collections.abc import Mapping
from typing import Any

from rebasin.errors import ConfigError
from rebasin.spec import PermutationSpec
from rebasin.trees import LeafPredicate, check_finite, check_same_shapes, leaf_table

__all__ = ["check_at_least", "check_networks"]


def check_networks(spec: PermutationSpec, trees: Mapping[str, Any], predicate: LeafPredicate) -> None:
    """Checks networks that are to be matched.

    Args:
      spec: the symmetries.
      trees: what each network is called in messages, and its tree.
      predicate: the leaves that count, and must be finite.

    Raises:
      TreeMismatchError: one differs from the first in leaves, shapes or dtypes.
      SpecMismatchError: one does not fit the spec.
      NonFiniteError: a weight is NaN or infinite.
    """
    (first, reference), *rest = trees.items()
    for name, tree in rest:
        check_same_shapes(reference, tree, names=(first, name))
    for name, tree in trees.items():
        spec.group_sizes(tree, name=name)
        check_finite({p: leaf for p, leaf in leaf_table(tree).items() if predicate(p, leaf)}, name)


def check_at_least(least: float, **options: float) -> None:
    """Raises `ConfigError` for the first option below `least`."""
    for name, value in options.items():
        if not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
