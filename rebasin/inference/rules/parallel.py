"""Programs that run on the shards of a device mesh, and what they exchange."""

import math
from collections.abc import Sequence
from typing import Any

from rebasin.inference.axes import Node, factor, pin, pinned, product
from rebasin.inference.rule import Equation, reads_abstract_values, register_rule
from rebasin.inference.values import Dims, Value

_SHARDS = "the shards of a device mesh stand in order"


@register_rule("shard_map")
def shard_map(equation: Equation, *inputs: Value) -> Sequence[Dims]:
    """Run the program on one shard, as all shards do; an axis that is sharded is (shards, positions in one).

    The shards of an axis stay in order and the positions in them are permuted alike. On a mesh of one device
    nothing is sharded, and the program runs as if it were called.
    """
    params = equation.params
    why = equation.because(_SHARDS)
    shards = [
        Value(
            (_one_shard(node, count, why) for node, count in zip(x, counts, strict=True)),
            x.context,
            x.constant,
            tie_free=x.tie_free,
        )
        for x, counts in zip(inputs, _shard_counts(params["in_specs"], inputs, params), strict=True)
    ]
    results = equation.run(params["jaxpr"], shards)
    counts_of = _shard_counts(params["out_specs"], results, params)
    return [
        Value((_all_shards(node, n, why) for node, n in zip(x, counts, strict=True)), x.context)
        for x, counts in zip(results, counts_of, strict=True)
    ]


def _shard_counts(specs: Any, values: Sequence[Dims], params: dict[str, Any]) -> list[list[int]]:
    """Return for each axis of each value into how many shards its spec cuts it."""
    counts = []
    for spec, value in zip(specs, values, strict=True):
        names = [(name,) if isinstance(name, str) else tuple(name or ()) for name in spec]
        cuts = [math.prod(params["mesh"].shape[name] for name in axis) for axis in names]
        counts.append([*cuts, *[1] * (len(value) - len(cuts))])
    return counts


def _one_shard(node: Node, count: int, why: str) -> Node:
    """Return the axis of one of `count` equal shards of an axis, and pin their order."""
    if count == 1:
        return node
    shards, positions = factor(node, [count, node.size // count], why)
    pin(shards, why)
    return positions


def _all_shards(node: Node, count: int, why: str) -> Node:
    """Return the axis that `count` shards make together, one after the other."""
    return product([pinned(count, why), node])


@register_rule("psum", "psum_invariant", "unreduced_psum", "pmax", "pmin")
@register_rule("ppermute", "pbroadcast", effect="moves")
def exchange(equation: Equation, *inputs: Dims) -> Sequence[Dims]:
    """Keep the axes of ``out[i] = Σ x[i]`` over devices, or of a value that another device sends."""
    positional = [axis for axis in equation.params.get("axes", ()) if isinstance(axis, int)]
    return [tuple(node for i, node in enumerate(x) if i not in positional) for x in inputs]


@register_rule("all_gather", "all_gather_invariant", "all_gather_reduced", effect="moves")
def all_gather(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Join the shards of all devices along one axis, or stack them along a new one; their order is pinned."""
    params, dims = equation.params, list(x)
    axis, why = params["all_gather_dimension"], equation.because(_SHARDS)
    if params["tiled"]:
        dims[axis] = _all_shards(dims[axis], params["axis_size"], why)
    else:
        dims.insert(axis, pinned(params["axis_size"], why))
    return [tuple(dims)]


@register_rule("reduce_scatter", "unreduced_reduce_scatter", effect="moves")
def reduce_scatter(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Sum over devices and leave to each of them one shard of an axis, or one position of it."""
    params, dims = equation.params, list(x)
    axis, why = params["scatter_dimension"], equation.because(_SHARDS)
    positions = _one_shard(dims[axis], params["axis_size"], why)
    dims[axis : axis + 1] = [positions] if params["tiled"] else []
    return [tuple(dims)]


@register_rule("all_to_all", effect="moves")
def all_to_all(equation: Equation, x: Dims) -> Sequence[Dims]:
    """Send each device one shard of an axis, and join what comes back along another one."""
    (shape,) = equation.shapes
    split_axis, concat_axis = equation.params["split_axis"], equation.params["concat_axis"]
    why, dims = equation.because(_SHARDS), list(x)
    if split_axis == concat_axis:
        names = equation.params["axis_name"]
        pin(dims[split_axis], equation.because(f"shards along {names} are exchanged along one axis"))
        return [tuple(dims)]
    count = x[split_axis].size // shape[split_axis]
    dims[split_axis] = _one_shard(dims[split_axis], count, why)
    dims[concat_axis] = _all_shards(dims[concat_axis], count, why)
    return [tuple(dims)]


@register_rule("axis_index")
def axis_index(equation: Equation) -> Sequence[Dims]:
    """Return a scalar, the number of the device along an axis of the mesh."""
    return [()]


@register_rule(
    *("pvary", "preduced", "reduced_vary_cast_p", "vary_unreduced_cast_p"),
    *("layout_constraint", "reshard", "stage"),
    effect="moves",
)
@reads_abstract_values
def annotate(equation: Equation, x: Value) -> Sequence[Dims]:
    """Return the operand, of which only the type or the place in memory is another one."""
    return [x]
