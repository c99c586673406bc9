"""Planted permutations are found again exactly, on every kind of network and for every seed.

`python -m benchmarks.planted_recovery` prints the same cases as a table, git-re-basin's loop beside them.
"""

import jax
import pytest

import rebasin
from benchmarks.planted_recovery import PLANTED, is_recovered, plant

SEEDS = 20
FAST = 3


def seeds():
    """All seeds, of which the first few are not slow."""
    return [pytest.param(s, marks=() if s < FAST else pytest.mark.slow) for s in range(SEEDS)]


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("seed", seeds())
def test_planted_permutation_is_recovered_exactly(name, seed):
    spec, a, b = plant(PLANTED[name], seed)
    assert not is_recovered(spec, a, b, rebasin.identity_permutation(spec, a))  # there is something to find
    match = rebasin.weight_matching(spec, a, b, key=jax.random.key(seed))
    assert is_recovered(spec, a, b, match.permutation)
    assert match.converged


def test_the_cases_are_those_that_the_table_names():
    """Indexed groups, shared streams and chains are all there, so that a case does not fall out unseen."""
    specs = {name: architecture.trace()[0] for name, architecture in PLANTED.items()}
    assert {name: len(spec.groups) for name, spec in specs.items()} == {
        "MLP 8-64×4-4": 4,
        "residual MLP, 4 blocks": 5,
        "residual MLP, 8 blocks": 9,
        "ResNet-20 width 8": 12,
        "VGG-16 width 8": 15,
        "ViT width 32": 9,
    }
    assert [name for name, spec in specs.items() if spec.indexed] == ["ViT width 32"]
