"""What a matching method is: a frozen value that holds its options and finds a permutation of one network."""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from rebasin.errors import ConfigError, SpecMismatchError, problem_list
from rebasin.matching.progress import ProgressFn, Reporter, report_end
from rebasin.matching.result import MatchResult
from rebasin.roles import RoleNames, check_roles, check_weight_dtypes, weight_leaves
from rebasin.spec import PermutationSpec
from rebasin.trees import check_finite, conform

__all__ = [
    "Method",
    "Networks",
    "build_method",
    "check_at_least",
    "check_networks",
    "check_spec_and_key",
    "check_start",
    "comparable_weights",
]


M = TypeVar("M", bound="Method")


@dataclasses.dataclass(frozen=True, kw_only=True, repr=False)
class Method:
    """A matching method together with its options.

    Every method is a subclass in a file of its own, and a frozen dataclass whose fields are its options: so
    options have one place, and a method can be printed, compared and hashed. A subclass defines `_match`, and
    checks its options in ``__post_init__``, after the call of this one's.

    Attributes:
      name: the name under which `rebasin.match`, `rebasin.align` and the experiments know the method.
      objective: what the method maximises, for the reader.
      roles: roles of leaves that `rebasin.roles.leaf_roles` would not find, by the path name of a leaf or
        subtree, in which ``*`` stands for any text: ``{"*/mask": "constant"}`` leaves masks out.
    """

    name: ClassVar[str]
    objective: ClassVar[str]

    roles: RoleNames = ()

    def __post_init__(self) -> None:
        """Check the roles; a subclass that checks more calls this first."""
        object.__setattr__(self, "roles", check_roles(self.roles))  # pairs, unlike a dictionary, have a hash

    @property
    def needs(self) -> tuple[str, ...]:
        """The arguments of `match` that this method cannot do without, beside the spec and the networks."""
        return ()

    def match(
        self,
        spec: PermutationSpec,
        params_a: Any,
        params_b: Any,
        *,
        key: jax.Array | None = None,
        apply_fn: Callable[..., Any] | None = None,
        metrics_fn: Callable[..., Mapping[str, jax.Array]] | None = None,
        data: Any = None,
        progress: ProgressFn | None = None,
    ) -> MatchResult:
        """Find a permutation of B that aligns it with A.

        Arguments that the method does not need are ignored, so that all methods can be called alike.

        Args:
          spec: the symmetries of the networks.
          params_a: tree of A, which stays.
          params_b: tree of B, with the leaves, shapes and dtypes of A.
          key: PRNG key of a method that draws at random.
          apply_fn: ``(params, *inputs) -> outputs``, the function that `spec` was made for.
          metrics_fn: ``(params, batch) -> {"loss": [n], …}``, one value for each example.
          data: a `rebasin.Batch` of arrays ``[n, …]``, or its inputs alone where no labels are needed.
          progress: called with a `MatchProgress` after each iteration and at the end, for a long match. It is
            called on the host, changes nothing, and ends the match by raising an error.

        Returns:
          The match, never worse than its start in the method's own objective.

        Raises:
          ConfigError: an argument that the method needs is missing, `spec` is no spec, or `key` no key.
          RebasinError: whatever the method raises; its function's documentation lists it.
        """
        given = {"key": key, "apply_fn": apply_fn, "metrics_fn": metrics_fn, "data": data}
        missing = [f"{name}: missing" for name in self.needs if given[name] is None]
        if missing:
            raise ConfigError(
                problem_list(f"the method {self.name!r} needs {', '.join(self.needs)}:", missing)
            )
        needed = {name: given[name] for name in self.needs}
        check_spec_and_key(spec, needed.get("key"))
        report = Reporter(self.name, progress)
        return report_end(self.name, progress, self._match(spec, params_a, params_b, report, **needed))

    def __repr__(self) -> str:
        """Return the method with those options that are not the default, functions by their name."""
        options = [
            f"{field.name}={_show(getattr(self, field.name))}"
            for field in dataclasses.fields(self)
            if _show(getattr(self, field.name)) != _show(field.default)
        ]
        return f"{type(self).__name__}({', '.join(options)})"

    def _match(
        self, spec: PermutationSpec, params_a: Any, params_b: Any, report: Reporter, **needed: Any
    ) -> MatchResult:
        """Find the permutation, and report iterations; `needed` holds the arguments that `needs` names."""
        raise NotImplementedError


def _show(value: Any) -> str:
    return getattr(value, "__name__", None) or repr(value)


def build_method(method: type[M], options: Mapping[str, Any]) -> M:
    """Make a method from its options.

    Args:
      method: the class of the method.
      options: fields of that class.

    Raises:
      ConfigError: an option is unknown to the method, or has a value that cannot work.
    """
    known = [field.name for field in dataclasses.fields(method)]
    unknown = [f"{name}: not known" for name in options if name not in known]
    if unknown:
        takes = ", ".join(known) or "no options"
        raise ConfigError(problem_list(f"the method {method.name!r} takes {takes}:", unknown))
    return method(**options)


class Networks(NamedTuple):
    """Networks that were checked, in the containers of the first.

    Attributes:
      trees: the tree of each network.
      weights: path names of the leaves that are weights.
    """

    trees: tuple[Any, ...]
    weights: frozenset[str]


def check_networks(
    spec: PermutationSpec, trees: Mapping[str, Any], roles: RoleNames = None, *, by_weights: bool = True
) -> Networks:
    """Check networks that are to be matched, before anything is computed, and put them into one structure.

    Args:
      spec: the symmetries.
      trees: the tree of each network, by the name that messages call it.
      roles: roles of leaves that would not be found.
      by_weights: whether weights are compared, so that integers cannot be weights, and some weight must move.

    Raises:
      TreeMismatchError: a network differs from the first in leaves, shapes or dtypes, or a weight holds
        integers.
      SpecMismatchError: a network does not fit the spec, or no leaf that the spec moves is a weight.
      NonFiniteError: a weight is NaN or infinite.
      ConfigError: `roles` do not fit the tree.
    """
    (first, reference), *rest = trees.items()
    conformed = (reference, *(conform(reference, tree, names=(first, name)) for name, tree in rest))
    spec.group_sizes(reference, name=first)  # and so it fits the others
    if by_weights:
        weights = comparable_weights(spec, reference, roles, first)
    else:
        weights = weight_leaves(reference, roles)
    for name, tree in zip(trees, conformed, strict=True):
        check_finite(tree, name, leaves=weights)
    return Networks(conformed, weights)


def comparable_weights(spec: PermutationSpec, tree: Any, roles: RoleNames, name: str) -> frozenset[str]:
    """Return the path names of a network's weights, after checking that a matching can compare them.

    If no leaf that the spec moves were a weight, every permutation would have the same objective, and a
    result would look like one that was found.

    Args:
      spec: the symmetries.
      tree: the tree of the network.
      roles: roles of leaves that would not be found.
      name: what messages call the tree.

    Raises:
      SpecMismatchError: the spec moves leaves, and none of them is a weight.
      TreeMismatchError: a weight holds integers.
      ConfigError: `roles` do not fit the tree.
    """
    weights = weight_leaves(tree, roles)
    moving = [path for path, axes in spec.leaves if any(axis.groups for axis in axes)]
    if spec.groups and weights.isdisjoint(moving):
        raise SpecMismatchError(
            f"none of the leaves that the spec moves is a weight: {', '.join(moving)}; roles= says which are"
        )
    check_weight_dtypes(tree, weights, name)
    return weights


def check_start(start: Any, names: Sequence[str]) -> None:
    """Raise `ConfigError` unless a start is one of some names, or a permutation."""
    if not isinstance(start, Mapping) and not (isinstance(start, str) and start in names):
        known = ", ".join(map(repr, names))
        raise ConfigError(f"unknown start {start!r}; known: {known}, or a permutation")


def check_spec_and_key(spec: Any, key: Any) -> None:
    """Raise `ConfigError` unless the arguments are a spec and a PRNG key, or `None` in place of a key."""
    if not isinstance(spec, PermutationSpec):
        raise ConfigError(f"spec must be a PermutationSpec, got a {type(spec).__name__}")
    is_typed = isinstance(key, jax.Array) and jnp.issubdtype(key.dtype, jax.dtypes.prng_key)
    is_raw = getattr(key, "dtype", None) == np.uint32 and np.ndim(key) == 1
    if key is not None and not (is_typed and key.shape == ()) and not is_raw:
        raise ConfigError(f"key must be a PRNG key, such as jax.random.key(0), got {key!r}")


def check_at_least(least: float, **options: float) -> None:
    """Raise `ConfigError` for the first option whose value is below `least`."""
    for name, value in options.items():
        if not isinstance(value, int | float | np.number) or not value >= least:
            raise ConfigError(f"{name} must be at least {least}, got {value}")
