"""Roles of leaves: which leaves of a tree are weights, and what the others are.

Only weights are matched and averaged. A running variance of 400 beside weights of 0.1 would decide a matching
by itself, and the average of two optimisers' moments means nothing.
"""

import re
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias, get_args

import jax
import jax.numpy as jnp

from rebasin.errors import ConfigError, TreeMismatchError, problem_list
from rebasin.trees import is_below, leaf_table, longest_name, path_name

__all__ = ["Role", "RoleNames", "check_roles", "check_weight_dtypes", "leaf_roles", "weight_leaves"]

Role: TypeAlias = Literal["weight", "statistic", "counter", "optimiser state", "key", "constant"]

# Roles that a user states, by the path name of a leaf or subtree; pairs, unlike a dictionary, have a hash.
RoleNames: TypeAlias = Mapping[str, Role] | tuple[tuple[str, Role], ...] | None

# Classes of containers that tell the role of all that they hold, by package and name. They are recognised by
# name, so that neither package has to be installed. A subclass has the role of the first class that is known.
_CONTAINERS: Mapping[tuple[str, str], Role] = {
    ("flax", "Param"): "weight",
    ("flax", "BatchStat"): "statistic",
    ("flax", "RngKey"): "key",
    ("flax", "RngCount"): "counter",
    ("flax", "OptState"): "optimiser state",
    ("flax", "OptArray"): "optimiser state",
    ("flax", "OptVariable"): "optimiser state",
    ("flax", "Cache"): "constant",
    ("flax", "Intermediate"): "constant",
    ("flax", "Perturbation"): "constant",
    ("equinox", "State"): "statistic",
}

# Names of components of a path. Those of PyTorch stand between dots, all others between slashes.
_COLLECTIONS: Mapping[str, Role] = {
    "opt_state": "optimiser state",
    "optimizer": "optimiser state",
    "optimizer_state": "optimiser state",
    "optimiser_state": "optimiser state",
    "batch_stats": "statistic",
    "cache": "constant",
    "intermediates": "constant",
    "perturbations": "constant",
    "params": "weight",
}
_LAST_NAMES: Mapping[str, Role] = {
    "exp_avg": "optimiser state",
    "exp_avg_sq": "optimiser state",
    "momentum_buffer": "optimiser state",
    "running_mean": "statistic",
    "running_var": "statistic",
    "moving_mean": "statistic",
    "moving_var": "statistic",
    "moving_variance": "statistic",
    "num_batches_tracked": "counter",
}


def leaf_roles(tree: Any, roles: RoleNames = None) -> dict[str, Role]:
    """Return the role of each leaf of a tree, by path name.

    What is stated in `roles` comes first. Then the types of keys count; the variable types of Flax NNX and
    the ``State`` of Equinox; collections of Flax such as ``batch_stats``; and usual names, such as PyTorch's
    ``running_mean``, the ``average`` of Haiku's ``mean_ema``, and ``mean`` beside ``var`` outside of
    ``params``. What then has no role is a weight if it is floating or complex; a counter if it is one
    integer; a weight, though one that must be dequantised, if it is an array of integers of at most 8 bits;
    and a constant otherwise. Integers are counters, never statistics.

    Args:
      tree: a tree of arrays or of their shapes.
      roles: the roles of leaves that are known better, by the path name of a leaf or of a subtree, in which
        ``*`` stands for any text; of the names that fit a leaf the longest decides.

    Raises:
      ConfigError: `roles` names an unknown role, or fits no leaf.

    Examples:
      >>> tree = {"w": jnp.ones(2), "bn": {"mean": jnp.ones(2), "var": jnp.ones(2)}, "mask": jnp.ones(2)}
      >>> leaf_roles(tree, {"mask": "constant"})
      {'bn/mean': 'statistic', 'bn/var': 'statistic', 'mask': 'constant', 'w': 'weight'}
    """
    stated = dict(check_roles(roles))
    table, containers = leaf_table(tree), _roles_of_containers(tree)
    unused = [name for name in stated if not any(is_below(path, name) for path in table)]
    if unused:
        problems = (f"{name!r} names no leaf" for name in unused)
        raise ConfigError(
            problem_list(f"roles do not fit the tree, whose leaves are {list(table)}:", problems)
        )
    found: dict[str, Role] = {}
    for path, leaf in table.items():
        name = longest_name(path, stated)
        found[path] = stated[name] if name is not None else _inferred(path, leaf, table, containers)
    return found


def weight_leaves(tree: Any, roles: RoleNames = None) -> frozenset[str]:
    """Return the path names of the leaves that are weights: those that are matched and averaged.

    Args:
      tree: a tree of arrays or of their shapes.
      roles: as in `leaf_roles`.

    Raises:
      ConfigError: as `leaf_roles`.

    Examples:
      >>> tree = {"params": {"w": jnp.ones(2)}, "batch_stats": {"mean": jnp.ones(2)}, "step": 3}
      >>> sorted(weight_leaves(tree)), sorted(weight_leaves(tree, {"batch_stats": "weight"}))
      (['params/w'], ['batch_stats/mean', 'params/w'])
    """
    return frozenset(path for path, role in leaf_roles(tree, roles).items() if role == "weight")


def check_roles(roles: RoleNames) -> tuple[tuple[str, Role], ...]:
    """Return stated roles as pairs, which have a hash.

    Raises:
      ConfigError: a role is unknown.

    Examples:
      >>> check_roles({"mask": "constant"})
      (('mask', 'constant'),)
    """
    stated = dict(roles or ())
    problems = [
        f"{name!r} has the role {role!r}" for name, role in stated.items() if role not in get_args(Role)
    ]
    if problems:
        known = ", ".join(map(repr, get_args(Role)))
        raise ConfigError(problem_list(f"roles cannot work; the roles are {known}:", problems))
    return tuple(stated.items())


def check_weight_dtypes(tree: Any, weights: frozenset[str], name: str) -> None:
    """Raise `TreeMismatchError` for a weight that holds integers, as quantised weights do.

    Their scales lie in other leaves, by a rule that only the user knows. So neither their products nor their
    averages mean anything.

    Args:
      tree: a tree of arrays or of their shapes.
      weights: the leaves that are weights.
      name: what the message calls the tree.
    """
    problems = [
        f"{path}: {jnp.result_type(leaf)}"
        for path, leaf in leaf_table(tree).items()
        if path in weights and not jnp.issubdtype(jnp.result_type(leaf), jnp.inexact)
    ]
    if problems:
        headline = (
            f"{name} holds weights that are integers; dequantise them first, or say that they are none "
            f"(roles={{{problems[0].rpartition(':')[0]!r}: 'constant'}}):"
        )
        raise TreeMismatchError(problem_list(headline, problems))


def _roles_of_containers(tree: Any) -> dict[str, Role]:
    """Return the roles of the leaves that lie in a container whose class tells it."""
    nodes = jax.tree_util.tree_leaves_with_path(tree, is_leaf=lambda node: _container_role(node) is not None)
    found = {}
    for prefix, node in nodes:
        role = _container_role(node)
        if role is not None:
            for path, _ in jax.tree_util.tree_leaves_with_path(node):
                found[path_name((*prefix, *path))] = role
    return found


def _container_role(node: Any) -> Role | None:
    for cls in type(node).__mro__:
        role = _CONTAINERS.get((cls.__module__.partition(".")[0], cls.__name__))
        if role is not None:
            return role
    return None


def _inferred(path: str, leaf: Any, table: Mapping[str, Any], containers: Mapping[str, Role]) -> Role:
    """Return the role of a leaf about which the user says nothing."""
    dtype = jnp.result_type(leaf)
    names = re.split(r"[/.]", path.removesuffix("/value"))
    if jnp.issubdtype(dtype, jax.dtypes.prng_key) or _is_raw_key(names, leaf):
        return "key"
    role = containers.get(path) or _role_of_names(names, path, table)
    if role == "statistic" and not jnp.issubdtype(dtype, jnp.inexact):
        return "counter"
    if role not in ("weight", None) or jnp.issubdtype(dtype, jnp.inexact):
        return role or "weight"
    if jnp.issubdtype(dtype, jnp.integer):
        if jnp.ndim(leaf) == 0:
            return "counter"
        # `itemsize` of an integer of 2 or 4 bits is 1.
        return "weight" if dtype.itemsize == 1 else "constant"
    return "constant"


def _is_raw_key(names: list[str], leaf: Any) -> bool:
    """Tell whether a leaf is a key in the form of two unsigned numbers."""
    is_pair = jnp.result_type(leaf) == jnp.uint32 and jnp.shape(leaf)[-1:] == (2,)
    return is_pair and any(name in ("rng", "rngs", "key", "keys", "prng_key") for name in names)


def _role_of_names(names: list[str], path: str, table: Mapping[str, Any]) -> Role | None:
    """Return the role that the components of a path name tell, if they do."""
    if names[-1] in _LAST_NAMES:
        return _LAST_NAMES[names[-1]]
    for collection, role in _COLLECTIONS.items():  # an optimiser's state holds a tree of parameters
        if collection in names:
            return role
    is_average = any(name.endswith("_ema") for name in names) and names[-1] in (
        "average",
        "hidden",
        "counter",
    )
    is_spectral = names[-2:] in (["spectral_norm", "u0"], ["spectral_norm", "sigma"])
    if is_average or is_spectral:
        return "statistic"
    sibling = {"mean": "var", "var": "mean"}.get(names[-1])
    if sibling is not None:
        stem, last, end = re.split(r"(mean|var)(?=(?:/value)?$)", path)
        other = table.get(stem + sibling + end)
        if other is not None and jnp.shape(other) == jnp.shape(table[path]):
            return "statistic"
    return None
