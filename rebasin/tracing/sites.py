"""The places of a program that matter: the values that carry a group, and the layers.

*Carriers.* A value carries a group if one of its axes, or a part of one, is the group's. It is a carrier if

1. it depends on the batch;
2. it was computed there: by a contraction or an operation on each position, as opposed to a value that was
   only moved, joined, cut, selected from or pooled (its carriers are those it was made of), or that comes
   from pooled values alone;
3. a contraction reads it, directly or after moving, flattening, selecting or pooling: the next layer's, or
   that of attention. A statistic that is combined with the value again, as those of norms and of a softmax
   are, does not count as reading.

A row of a table looked up by the batch, such as an embedding, carries a group that has no other carrier; and
a group that nothing reads as in 3 is carried by its last value. Carriers stand in the order of the program.
The last one is thus the group's value after its last nonlinearity, before pooling or flattening: the ReLU
before a max pool, the last norm of a transformer before its mean, the product of a gated unit, attention's
output for heads and for the dimensions of values. A value inside a `scan` carries at all steps; inside a
``while`` loop, at the last one; in a branch, where that is taken, and is zero elsewhere.

*Layers.* A layer is a contraction of a value that depends on the batch with a weight: a value that does not.
A contraction behind a choice of platform, or with a derivative of its own, is one layer as a whole.
"""

from collections.abc import Sequence

from rebasin.tracing.layers import Layer
from rebasin.tracing.program import Program
from rebasin.tracing.walk import Carrier, walk

__all__ = ["Carrier", "Layer", "find_carriers", "find_layers"]


def find_carriers(program: Program, groups: Sequence[str]) -> dict[str, tuple[Carrier, ...]]:
    """The carriers of each group, as the module's docstring defines them; none for a group without."""
    found_in = walk(program)
    found: dict[str, tuple[Carrier, ...]] = {}
    for group in groups:
        computed = [at for at, candidate in found_in.candidates.items() if group in candidate.computed]
        read = [at for at in computed if group in found_in.candidates[at].read]
        chosen = [at for at in read if not found_in.candidates[at].looked_up] or read or computed[-1:]
        found[group] = tuple(Carrier(*at, found_in.candidates[at].axes) for at in chosen)
    return found


def find_layers(program: Program) -> tuple[Layer, ...]:
    """The layers in the order of the program."""
    return tuple(walk(program).layers.values())
