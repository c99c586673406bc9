"""Group sizes of every architecture in the zoo; each spec is proved numerically, and a broken one caught."""

import dataclasses
import re

import pytest
from zoo import ZOO, arrays, sort_key
from zoo_table import ARCHITECTURES, row, section

import rebasin
from rebasin.errors import SpecError, VerificationError

LIBRARIES = ("equinox", "haiku")


def build(name):
    """An architecture; skips where its library is not installed."""
    for library in LIBRARIES:
        if name.endswith(library):
            pytest.importorskip(library)
    return ZOO[name].build()


def infer(specimen):
    return rebasin.infer_spec(
        specimen.function, specimen.tree, *specimen.inputs, state_outputs=specimen.state_outputs
    )


@pytest.mark.parametrize("name", ZOO)
def test_group_sizes(name):
    specimen = build(name)
    spec = infer(specimen)
    assert tuple(sorted(spec.group_sizes(specimen.tree).values(), key=sort_key)) == ZOO[name].sizes, str(spec)


def test_table_of_architectures():
    """All columns but the times; `make zoo-table` writes them anew."""
    pytest.importorskip("equinox")
    pytest.importorskip("haiku")
    written = section(ARCHITECTURES.read_text())
    assert [line.split(" | ")[:-1] for line in written] == [
        ["| " + first, *rest] for first, *rest in map(row, ZOO)
    ]


def without(spec, group, path):
    """The spec with a group left out of one leaf; `None` if it is the outer group of another one there."""

    def pinned(axis):
        return axis.rename({name: None if name == group else name for name in axis.groups})

    leaves = tuple((p, tuple(map(pinned, axes)) if p == path else axes) for p, axes in spec.leaves)
    try:
        return dataclasses.replace(spec, leaves=leaves)
    except SpecError:
        return None


def broken_specs(spec):
    """Pairs of a group and the spec that forgets it on the first leaf that carries it."""
    for group in spec.groups:
        path = next(path for path, axes in spec.leaves if any(group in axis.groups for axis in axes))
        broken = without(spec, group, path)
        if broken is not None and group in broken.groups:
            yield group, broken


@pytest.mark.slow
@pytest.mark.parametrize("name", ZOO)
def test_spec_is_sound_and_a_broken_one_is_caught(name):
    specimen = build(name)
    spec = infer(specimen)
    tree, inputs = arrays(specimen.tree), arrays(specimen.inputs)
    rebasin.verify_spec(spec, specimen.function, tree, *inputs, state_outputs=specimen.state_outputs)

    group, broken = next(broken_specs(spec))
    with pytest.raises(VerificationError) as info:
        rebasin.verify_spec(
            broken, specimen.function, tree, *inputs, state_outputs=specimen.state_outputs, trials=1
        )
    assert re.findall(r"^  (.+): outputs change", str(info.value), re.MULTILINE) == [group]
