"""The worked examples of CONTRIBUTING.md work as they are printed there."""

import pathlib
import re
import sys
import types

import jax
import pytest

import rebasin
from rebasin.errors import ConfigError
from rebasin.inference.rule import find_rule, temporary_rules

TEXT = (pathlib.Path(__file__).parents[1] / "CONTRIBUTING.md").read_text()

# What the file already imports to which an example is added.
RULE_IMPORTS = """
from collections.abc import Sequence
from rebasin.inference.axes import pin, unite
from rebasin.inference.rule import Equation, register_rule
from rebasin.inference.values import Dims
"""
TEST_IMPORTS = """
import jax
import jax.numpy as jnp
from helpers import X, build_case, check, random_tree
from jax import lax
from rebasin import verify_spec
import rebasin

def reasons(spec):
    return {(pin.path, pin.axis): pin.reason.partition(": ")[2] for pin in spec.pins}
"""


def example(marker):
    """Return the block of code that holds a marker."""
    (found,) = (code for code in re.findall(r"```py\n(.*?)```", TEXT, re.DOTALL) if marker in code)
    return found


def run(code, **names):
    """Run code and return the names that it defines."""
    exec(code, names)
    return names


def load_module(monkeypatch, name, code):
    """Run code as a module that others can import."""
    module = types.ModuleType(name)
    monkeypatch.setitem(sys.modules, name, module)
    exec(code, module.__dict__)
    return module


def test_the_rule():
    tests = run(TEST_IMPORTS + example("def test_smoothing_over_tokens"))
    names = [name for name in tests if name.startswith("test_")]
    with temporary_rules():
        run(RULE_IMPORTS + example('@register_rule("tridiagonal_solve"'))
        for name in names:
            tests[name]()
    assert find_rule("tridiagonal_solve") is find_rule("pure_callback"), "the example needs another primitive"


def test_the_network_that_needs_the_rule():
    names = run(TEST_IMPORTS + example("def apply_fn(t, x)"))
    spec = rebasin.infer_spec(names["apply_fn"], names["random_tree"](w=(3, 6), v=(6, 2)), names["X"])
    shown = re.search(r"stays put: tridiagonal_solve \(model.py:4\): (.*)\n", TEXT)
    assert shown is not None
    assert names["reasons"](spec)["w", 1] == shown[1]


def test_the_method(monkeypatch):
    method = load_module(monkeypatch, "rebasin.matching.best_of", example("class BestOfMatching"))
    monkeypatch.setitem(rebasin.METHODS, "best_of", method.BestOfMatching)
    tests = run(TEST_IMPORTS + example("def test_more_keys"), best_of_matching=method.best_of_matching)
    tests["test_more_keys_are_never_worse"]()
    case, key = tests["build_case"]("mlp"), jax.random.key(0)
    by_name = rebasin.match(case.spec, case.params_a, case.planted, "best_of", key=key, num_keys=2)
    restored = rebasin.permute(case.spec, by_name.permutation, case.planted)
    assert all(map(jax.numpy.array_equal, jax.tree.leaves(restored), jax.tree.leaves(case.params_a)))
    with pytest.raises(ConfigError, match="num_keys must be at least 1, got 0"):
        method.BestOfMatching(num_keys=0)


@pytest.mark.slow
def test_the_experiment(monkeypatch, tmp_path):
    import experiments.harness.record as record

    monkeypatch.setattr(record, "DistanceRecord", None, raising=False)  # gone again after the test
    exec(example("class DistanceRecord"), record.__dict__)
    load_module(monkeypatch, "experiments.distances", example("class DistanceConfig"))
    run(example("def test_distances_are"))["test_distances_are_those_of_the_networks_on_disk"](tmp_path)
