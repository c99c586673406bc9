"""The comparison of two versions of the library, on a tiny problem against itself."""

import pathlib

import jax.numpy as jnp
import pytest

from benchmarks.against_version import PROBLEMS, Comparison, Matching, compare
from benchmarks.architectures import build_architecture
from rebasin.errors import ConfigError

ROOT = pathlib.Path(__file__).parents[2]


def matchings(*seconds, objective=1.0, digest="a"):
    return [Matching(value, objective, digest) for value in seconds]


def test_a_row_has_paired_ratios_and_counts_equal_permutations():
    comparison = Comparison(
        "mlp:512",
        {"old": matchings(4.0, 1.0, 2.0), "new": matchings(1.0, 8.0, 1.0)},
        {
            "old": matchings(1.0, 10.0, 10.0, objective=-2.0),
            "new": [*matchings(2.0, 20.0, objective=-1.5), *matchings(30.0, objective=-2.0, digest="b")],
        },
    )
    # Objectives are a quarter of their size higher in two of three rounds.
    assert comparison.row() == ("mlp:512", "2", "1", "0.50", "10", "20", "2.00", "+16.6667", "2/3")


@pytest.mark.slow
def test_a_version_is_like_itself():
    found = compare("mlp:8", {"old": ROOT, "new": None}, first_calls=2, rounds=2)
    assert {name: len(calls) for name, calls in found.first_calls.items()} == {"old": 2, "new": 2}
    assert [call.digest for call in found.warm["old"]] == [call.digest for call in found.warm["new"]]
    assert found.row()[-2:] == ("+0.0000", "2/2")
    # A first call compiles, which a warm one does not.
    assert min(call.seconds for call in found.first_calls["new"]) > max(c.seconds for c in found.warm["new"])


def test_problems_are_those_of_make_bench_and_a_transformer():
    assert PROBLEMS == (
        "mlp:512",
        "vgg16:8",
        "vgg16:16",
        "vgg16:64",
        "resnet20:16",
        "resnet20:64",
        "gpt:256",
    )
    assert build_architecture("gpt:256").input_dtype == jnp.int32
    spec, _ = build_architecture("gpt:32").trace()
    assert len(spec.groups) > 4


@pytest.mark.parametrize("name", ["lstm:8", "vgg16", "vgg16:0", "vgg16:x"])
def test_unknown_problems_are_refused(name):
    with pytest.raises(ConfigError, match="wanted model:width, model one of mlp, vgg16, resnet20, gpt"):
        build_architecture(name)
