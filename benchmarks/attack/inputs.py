"""Malformed inputs of the library's public functions, generated from tables of what can be wrong."""

import itertools
import json
import pathlib
import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

import rebasin
from benchmarks.attack.outcomes import Trial, attempt
from benchmarks.attack.processes import Reference

__all__ = ["input_trials"]


class _Case(NamedTuple):
    """One call with a malformed argument; `must_refuse` says that no result of it can be right."""

    name: str
    call: Callable[[], Any]
    must_refuse: bool = True


_RNG = np.random.default_rng(0)
_X = _RNG.normal(size=(10, 4)).astype(np.float32)
_KEY = jax.random.key(0)


def _network() -> dict[str, Any]:
    return {
        "d0": {"kernel": _RNG.normal(size=(4, 6)).astype("f"), "bias": _RNG.normal(size=6).astype("f")},
        "d1": {"kernel": _RNG.normal(size=(6, 3)).astype("f")},
    }


_A, _B = _network(), _network()
_AXES = {"d0/kernel": (None, "P0"), "d0/bias": ("P0",), "d1/kernel": ("P0", None)}
_SPEC = rebasin.PermutationSpec.from_axes(_AXES)
_GOOD = {"P0": np.array([2, 0, 1, 5, 4, 3])}


def _apply(tree: Any, x: Any) -> jax.Array:
    return jax.nn.relu(x @ tree["d0"]["kernel"] + tree["d0"]["bias"]) @ tree["d1"]["kernel"]


def _metrics(tree: Any, batch: Any) -> dict[str, jax.Array]:
    return {"loss": jnp.sum(_apply(tree, batch) ** 2, axis=-1)}


def _with_bias(value: Any) -> dict[str, Any]:
    return {**_A, "d0": {"kernel": _A["d0"]["kernel"], "bias": value}}


# What is wrong with a tree. Those of the first table fit no other tree and no spec.
_TREES: dict[str, Any] = {
    "a missing leaf": {**_A, "d0": {"kernel": _A["d0"]["kernel"]}},
    "a kernel that is too wide": {**_A, "d0": {**_A["d0"], "kernel": np.zeros((4, 7), "f")}},
    "a leaf that is None": _with_bias(None),
    "a leaf that is text": _with_bias("bias"),
    "a leaf of objects": _with_bias(np.array([None] * 6, object)),
    "a leaf of text": _with_bias(np.array(["a"] * 6)),
    "a leaf of dates": _with_bias(np.zeros(6, "datetime64[s]")),
    "a leaf of records": _with_bias(np.zeros(6, [("a", "f4")])),
    "a leaf without axes": _with_bias(np.float32(0)),
    "a leaf of too many axes": _with_bias(np.zeros((6, 1), "f")),
    "an empty leaf": _with_bias(np.zeros(0, "f")),
    "a leaf that is a function": _with_bias(len),
    "no leaves": {},
    "None": None,
    "a number": 3.0,
    "text": "tree",
    "a list of leaves": [1.0, 2.0],
}
_NO_NUMBERS = ("a leaf of objects", "a leaf of text", "a leaf of dates", "a leaf of records")
# These hold no numbers that can be matched, though all else fits.
_NUMBERS: dict[str, Any] = {
    "NaN": _with_bias(np.full(6, np.nan, "f")),
    "infinity": _with_bias(np.full(6, np.inf, "f")),
}
# The right answer to these may be a result.
_ODD: dict[str, Any] = {
    "an additional leaf": {**_A, "d2": {"bias": np.zeros(3, "f")}},
    "a leaf that is a list": _with_bias([0.0] * 6),
    "a leaf in float64": _with_bias(np.zeros(6)),
    "a leaf in float16": _with_bias(np.zeros(6, np.float16)),
    "a leaf of integers": _with_bias(np.zeros(6, np.int32)),
    "a leaf of booleans": _with_bias(np.zeros(6, bool)),
    "a complex leaf": _with_bias(np.zeros(6, np.complex64)),
    "zeros": jax.tree.map(np.zeros_like, _A),
    "numbers of 1e30": jax.tree.map(lambda leaf: leaf * np.float32(1e30), _A),
}

# Functions of two trees.
_PAIRS: dict[str, Callable[[Any, Any], Any]] = {
    "weight_matching": lambda a, b: rebasin.weight_matching(_SPEC, a, b, key=_KEY),
    "joint_weight_matching": lambda a, b: rebasin.joint_weight_matching(_SPEC, [a], [b], key=_KEY),
    "activation_matching": lambda a, b: rebasin.activation_matching(_SPEC, a, b, _apply, _X),
    "covariance_matching": lambda a, b: rebasin.covariance_matching(_SPEC, a, b, _apply, _X, key=_KEY),
    "frank_wolfe_matching": lambda a, b: rebasin.frank_wolfe_matching(_SPEC, a, b),
    "partial_weight_matching": lambda a, b: rebasin.partial_weight_matching(_SPEC, a, b, key=_KEY),
    "straight_through_matching": lambda a, b: rebasin.straight_through_matching(
        _SPEC, a, b, _metrics, _X, key=_KEY, num_steps=2
    ),
    "sinkhorn_matching": lambda a, b: rebasin.sinkhorn_matching(
        _SPEC, a, b, key=_KEY, loss="l2", num_steps=2
    ),
    "merge_many": lambda a, b: rebasin.merge_many(_SPEC, [a, b], key=_KEY),
    "universe_matching": lambda a, b: rebasin.universe_matching(_SPEC, [a, b]),
    "match": lambda a, b: rebasin.match(_SPEC, a, b, key=_KEY),
    "align": lambda a, b: rebasin.align(_apply, a, b, _X, spec=_SPEC, verify=False, key=_KEY),
    "build_repair": lambda a, b: rebasin.build_repair(_SPEC, a, b, _apply, _X),
    "sweep": lambda a, b: rebasin.sweep(a, b, _X, _metrics, num_alphas=3),
    "build_simplex_sweep": lambda a, b: rebasin.build_simplex_sweep(_metrics, resolution=2)([a, b], _X),
    "interpolate": lambda a, b: rebasin.interpolate(a, b, 0.5),
    "average": lambda a, b: rebasin.average([a, b]),
}
_MATCHERS = tuple(itertools.takewhile(lambda name: name != "build_repair", _PAIRS))

# Functions of one tree and the spec.
_SINGLE: dict[str, Callable[[Any], Any]] = {
    "permute": lambda tree: rebasin.permute(_SPEC, _GOOD, tree),
    "identity_permutation": lambda tree: rebasin.identity_permutation(_SPEC, tree),
    "random_permutation": lambda tree: rebasin.random_permutation(_SPEC, tree, key=_KEY),
    "verify_spec": lambda tree: rebasin.verify_spec(_SPEC, _apply, tree, _X),
    "group_sizes": lambda tree: _SPEC.group_sizes(tree),
}

_PERMUTATIONS: dict[str, Any] = {
    "a number twice": {"P0": np.array([0, 0, 1, 2, 3, 4])},
    "five numbers": {"P0": np.arange(5)},
    "seven numbers": {"P0": np.arange(7)},
    "a negative number": {"P0": np.array([-1, 0, 1, 2, 3, 4])},
    "a number out of range": {"P0": np.arange(1, 7)},
    "fractions": {"P0": np.arange(6) + 0.5},
    "booleans": {"P0": np.zeros(6, bool)},
    "no group": {},
    "an unknown group": {"P0": np.arange(6), "Q": np.arange(3)},
    "two axes": {"P0": np.arange(6)[None]},
    "None in place of numbers": {"P0": None},
    "text": {"P0": "abcdef"},
    "objects": {"P0": np.array([0, 1, 2, 3, 4, None], object)},
    "a ragged list": {"P0": [[1], [2, 3]]},
    "an array in place of groups": np.arange(6),
    "None": None,
    "a list": [np.arange(6)],
}
_OF_PERMUTATION: dict[str, Callable[[Any], Any]] = {
    "permute": lambda p: rebasin.permute(_SPEC, p, _A),
    "compose": lambda p: rebasin.compose(_SPEC, p, _GOOD),
    "compose, as the second": lambda p: rebasin.compose(_SPEC, _GOOD, p),
    "invert": lambda p: rebasin.invert(_SPEC, p),
    "fixed_points": lambda p: rebasin.fixed_points(p, _GOOD),
    "weight_matching(start=)": lambda p: rebasin.weight_matching(_SPEC, _A, _B, key=_KEY, start=p),
    "frank_wolfe_matching(start=)": lambda p: rebasin.frank_wolfe_matching(_SPEC, _A, _B, start=p),
    "save_permutation": lambda p: rebasin.save_permutation("/dev/null", _SPEC, p),
}

_DATA: dict[str, Any] = {
    "no examples": _X[:0],
    "a scalar": np.float32(1),
    "None": None,
    "examples that are too narrow": _X[:, :3],
    "parts of other lengths": (_X, _X[:3]),
    "text": "data",
    "objects": np.array([None] * 10, object),
}
_OF_DATA: dict[str, Callable[[Any], Any]] = {
    "sweep": lambda data: rebasin.sweep(_A, _B, data, _metrics, num_alphas=3),
    "activation_matching": lambda data: rebasin.activation_matching(_SPEC, _A, _B, _apply, data),
    "covariance_matching": lambda data: rebasin.covariance_matching(_SPEC, _A, _B, _apply, data, key=_KEY),
    "straight_through_matching": lambda data: rebasin.straight_through_matching(
        _SPEC, _A, _B, _metrics, data, key=_KEY, num_steps=2
    ),
    "build_repair": lambda data: rebasin.build_repair(_SPEC, _A, _B, _apply, data),
    "build_simplex_sweep": lambda data: rebasin.build_simplex_sweep(_metrics, resolution=2)([_A, _B], data),
}

_NUMBER_OPTIONS = (0, -1, 2.5, float("nan"), "3", None)
_OF_NUMBER: dict[str, Callable[[Any], Any]] = {
    "build_sweep(num_alphas=)": lambda n: rebasin.build_sweep(_metrics, num_alphas=n)(_A, _B, _X),
    "build_sweep(batch_size=)": lambda n: rebasin.sweep(_A, _B, _X, _metrics, num_alphas=3, batch_size=n),
    "WeightMatching(restarts=)": lambda n: rebasin.WeightMatching(restarts=n),
    "WeightMatching(max_iterations=)": lambda n: rebasin.WeightMatching(max_iterations=n),
    "ActivationMatching(batch_size=)": lambda n: rebasin.ActivationMatching(batch_size=n),
    "CovarianceMatching(batch_size=)": lambda n: rebasin.CovarianceMatching(batch_size=n),
    "FrankWolfeMatching(max_iterations=)": lambda n: rebasin.FrankWolfeMatching(max_iterations=n),
    "SinkhornMatching(num_steps=)": lambda n: rebasin.SinkhornMatching(num_steps=n),
    "StraightThroughMatching(num_steps=)": lambda n: rebasin.StraightThroughMatching(num_steps=n),
    "build_simplex_sweep(resolution=)": lambda n: rebasin.build_simplex_sweep(_metrics, resolution=n)(
        [_A, _B], _X
    ),
}

_from_axes = rebasin.PermutationSpec.from_axes
_SINGLE_CALLS: dict[str, Callable[[], Any]] = {
    "from_axes: axes that are text": lambda: _from_axes({"a": "P0"}),
    "from_axes: axes that are None": lambda: _from_axes({"a": None}),  # pyright: ignore
    "from_axes: an axis that is a number": lambda: _from_axes({"a": (None, 0)}),  # pyright: ignore
    "from_axes: a path that is a number": lambda: _from_axes({3: ("P0",)}),  # pyright: ignore
    "from_axes: a list": lambda: _from_axes([("a", ("P0",))]),  # pyright: ignore
    "from_axes: None": lambda: _from_axes(None),  # pyright: ignore
    "match: an unknown method": lambda: rebasin.match(_SPEC, _A, _B, "magic", key=_KEY),
    "match: an unknown option": lambda: rebasin.match(_SPEC, _A, _B, key=_KEY, magic=1),
    "match: no key": lambda: rebasin.match(_SPEC, _A, _B),
    "weight_matching: a key that is a number": lambda: rebasin.weight_matching(_SPEC, _A, _B, key=0),  # pyright: ignore
    "weight_matching: a key that is None": lambda: rebasin.weight_matching(_SPEC, _A, _B, key=None),  # pyright: ignore
    "weight_matching: a spec that is None": lambda: rebasin.weight_matching(None, _A, _B, key=_KEY),  # pyright: ignore
    "weight_matching: a spec that is text": lambda: rebasin.weight_matching("P0", _A, _B, key=_KEY),  # pyright: ignore
    "weight_matching: weights of no leaf": lambda: rebasin.weight_matching(
        _SPEC, _A, _B, key=_KEY, leaf_weights={"nothing": 1}
    ),
    "weight_matching: a weight of NaN": lambda: rebasin.weight_matching(
        _SPEC, _A, _B, key=_KEY, leaf_weights={"d0/kernel": float("nan")}
    ),
    "joint_weight_matching: no trees": lambda: rebasin.joint_weight_matching(_SPEC, [], [], key=_KEY),
    "joint_weight_matching: one and two": lambda: rebasin.joint_weight_matching(
        _SPEC, [_A], [_B, _B], key=_KEY
    ),
    "merge_many: no trees": lambda: rebasin.merge_many(_SPEC, [], key=_KEY),
    "average: no trees": lambda: rebasin.average([]),
    "average: too few weights": lambda: rebasin.average([_A, _B], [1.0]),
    "average: a weight of NaN": lambda: rebasin.average([_A, _B], [1.0, float("nan")]),
    "average: weights that sum to 0": lambda: rebasin.average([_A, _B], [1.0, -1.0]),
    "sweep: a mean in place of examples": lambda: rebasin.sweep(
        _A, _B, _X, lambda p, x: {"loss": jnp.mean(_apply(p, x))}, num_alphas=3
    ),
    "sweep: metrics of two axes": lambda: rebasin.sweep(
        _A, _B, _X, lambda p, x: {"loss": _apply(p, x)}, num_alphas=3
    ),
    "sweep: metrics without names": lambda: rebasin.sweep(
        _A,
        _B,
        _X,
        lambda p, x: jnp.sum(_apply(p, x), -1),  # pyright: ignore
        num_alphas=3,
    ),
    "infer_spec: no function": lambda: rebasin.infer_spec(3, _A, _X),  # pyright: ignore
    "verify_spec: a spec that changes the function": lambda: rebasin.verify_spec(
        _from_axes({**_AXES, "d0/bias": (None,)}), _apply, _A, _X
    ),
    "build_norm_reset: nothing to replace": lambda: rebasin.build_norm_reset(_A, lambda p, x: p, _X),
    "load_permutation: no file": lambda: rebasin.load_permutation("/nonexistent/file", _SPEC),
    "PermutationSpec.load: no file": lambda: rebasin.PermutationSpec.load("/nonexistent/file"),
}

# Entries of a saved permutation, and of a saved spec, that cannot be right.
_FILES: dict[str, Callable[[dict[str, Any]], Any]] = {
    "another version": lambda content: content.update(version=99),
    "another format": lambda content: content.update(format="pickle"),
    "groups that are a list": lambda content: content.update(groups=[[0, 1]]),
    "no groups": lambda content: content.update(groups={}),
    "a number twice": lambda content: content.update(groups={"P0": [0] * 6}),
    "a negative number": lambda content: content.update(groups={"P0": [-1, 0, 1, 2, 3, 4]}),
    "fractions": lambda content: content.update(groups={"P0": [0.5, 1.7, 2, 3, 4, 5]}),
    "text": lambda content: content.update(groups={"P0": list("012345")}),
    "null": lambda content: content.update(groups=None),
    "leaves that are null": lambda content: content.update(leaves=None),
    "a leaf of three parts": lambda content: content.update(leaves=[["x", [], 3]]),
    "leaves that are text": lambda content: content.update(leaves="ab"),
    "pins that are null": lambda content: content.update(pins=None),
    "a huge size": lambda content: content.update(leaves=[["x", [[[[10**400, "P0"]]]]]]),
}
_CONTENTS: dict[str, bytes] = {
    "nothing": b"",
    "null": b"null",
    "a list": b"[1]",
    "no text": b"\xff\xfe\x00",
    "deep nesting": b"[" * 200_000,
    "a number of 5000 digits": b'{"version": ' + b"9" * 5000 + b"}",
    "a pickle": b"\x80\x04\x95\x0b\x00\x00\x00",
    "an archive": b"PK\x03\x04" + b"x" * 100,
}


def _cases(folder: pathlib.Path) -> Iterator[_Case]:
    """Yield every case."""
    for name, call in _PAIRS.items():
        for wrong, tree in {**_TREES, **_NUMBERS, **_ODD}.items():
            must = wrong in _TREES or (wrong in _NUMBERS and name in _MATCHERS)
            yield _Case(f"{name}: A is {wrong}", lambda call=call, tree=tree: call(tree, _B), must)
            yield _Case(f"{name}: B is {wrong}", lambda call=call, tree=tree: call(_A, tree), must)
    for name, call in _SINGLE.items():
        for wrong, tree in _TREES.items():
            # Functions that need sizes alone may take leaves of any type.
            must = name in ("permute", "verify_spec") or wrong not in _NO_NUMBERS
            yield _Case(f"{name}: a tree with {wrong}", lambda call=call, tree=tree: call(tree), must)
    for name, call in _OF_PERMUTATION.items():
        for wrong, permutation in _PERMUTATIONS.items():
            # Without a tree the sizes of groups are not known.
            unknown = {"fixed_points": ["an unknown group"]}
            unknown |= dict.fromkeys(("invert", "save_permutation"), ["five numbers", "seven numbers"])
            must = wrong not in unknown.get(name, ())
            yield _Case(f"{name}: {wrong}", lambda call=call, p=permutation: call(p), must)
    for name, call in _OF_DATA.items():
        for wrong, data in _DATA.items():
            yield _Case(f"{name}: data that are {wrong}", lambda call=call, data=data: call(data))
    for name, call in _OF_NUMBER.items():
        for number in _NUMBER_OPTIONS:
            must = not (name == "WeightMatching(restarts=)" and number == 0)
            yield _Case(f"{name}: {number!r}", lambda call=call, number=number: call(number), must)
    for name, call in _SINGLE_CALLS.items():
        yield _Case(name, call)
    yield from _file_cases(folder)


def _file_cases(folder: pathlib.Path) -> Iterator[_Case]:
    """Yield the cases of saved permutations and specs."""
    folder.mkdir(parents=True, exist_ok=True)
    rebasin.save_permutation(folder / "permutation.json", _SPEC, _GOOD)
    _SPEC.save(folder / "spec.json")
    readers = {
        "permutation": lambda path: rebasin.load_permutation(path, _SPEC),
        "spec": lambda path: rebasin.PermutationSpec.load(path).group_sizes(_A),
    }
    for kind, read in readers.items():
        content = (folder / f"{kind}.json").read_bytes()
        damaged = {"half of it": content[: len(content) // 2], **_CONTENTS}
        for wrong, edit in _FILES.items():
            table = json.loads(content)
            before = set(table)
            edit(table)
            if set(table) == before:  # an entry that files of this kind have
                damaged[wrong] = json.dumps(table).encode()
        for i, (wrong, data) in enumerate(damaged.items()):
            path = folder / f"{kind}_{i}.json"
            path.write_bytes(data)
            yield _Case(f"a saved {kind}: {wrong}", lambda read=read, path=path: read(path))


def input_trials(reference: Reference, num: int, rng: random.Random) -> Iterator[Trial]:
    """Try `num` cases, drawn without replacement from all."""
    cases = list(_cases(reference.folder / "inputs"))
    for case in rng.sample(cases, min(num, len(cases))):
        yield attempt(case.name, case.call, lambda _, case=case: not case.must_refuse)
