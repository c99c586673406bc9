"""Imports point one way, and aligning networks loads nothing but jax, numpy and scipy."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Rooms from the top down. A module imports from rooms further down, and from its own.
ROOMS = [
    ["experiments"],
    ["rebasin.training"],
    ["rebasin.models"],
    ["rebasin"],  # the public names of all that follows
    ["rebasin.align"],
    ["rebasin.landscape"],
    ["rebasin.matching", "rebasin.barrier", "rebasin.merging", "rebasin.repair", "rebasin.batchnorm"],
    ["rebasin.tracing"],
    ["rebasin.inference"],
    ["rebasin.permutation"],
    ["rebasin.batches", "rebasin.compilation"],
    ["rebasin.spec"],
    ["rebasin.axis"],
    ["rebasin.trees"],
    ["rebasin.errors"],
]

LEVELS = {name: level for level, room in enumerate(ROOMS) for name in room}


def module_name(path):
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level_of(module):
    """The level of the most specific room that a module lies in."""
    parts = module.split(".")
    names = [".".join(parts[:n]) for n in range(len(parts), 0, -1)]
    room = next(name for name in names if name in LEVELS)
    assert room != "rebasin" or module == "rebasin", f"{module} lies in no room: give it a line in ROOMS"
    return LEVELS[room]


def imports_of(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module


SOURCES = sorted([*ROOT.glob("rebasin/**/*.py"), *ROOT.glob("experiments/**/*.py")])


@pytest.mark.parametrize("path", SOURCES, ids=module_name)
def test_no_import_points_up(path):
    ours = [name for name in imports_of(path) if name.split(".")[0] in ("rebasin", "experiments")]
    up = [name for name in ours if level_of(name) < level_of(module_name(path))]
    assert up == []


def test_models_know_nothing_of_alignment():
    for path in ROOT.glob("rebasin/models/*.py"):
        ours = {name for name in imports_of(path) if name.startswith("rebasin") and ".models" not in name}
        assert ours <= {"rebasin.errors"}


def test_aligning_networks_loads_only_jax_numpy_and_scipy():
    """In a fresh interpreter: import the library, infer a spec, match, permute and sweep."""
    program = """
import sys
import jax, jax.numpy as jnp
import rebasin

def apply(t, x):
    return jnp.tanh(x @ t["w"]) @ t["v"]

key = jax.random.key(0)
a = {"w": jax.random.normal(key, (3, 8)), "v": jnp.ones((8, 2))}
x = jnp.ones((4, 3))
spec = rebasin.infer_spec(apply, a, x)
b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=key), a)
match = rebasin.match(spec, a, b, key=key)
rebasin.universe_matching(spec, [a, b])
rebasin.sweep(a, rebasin.permute(spec, match.permutation, b), x, lambda t, x: {"loss": apply(t, x).sum(1)})
rebasin.verify_spec(spec, apply, a, x)
heavy = ["tensorflow", "tensorflow_datasets", "orbax", "flax", "optax", "matplotlib", "absl"]
heavy += ["rich", "PIL", "ott", "lineax"]
print([name for name in heavy if name in sys.modules])
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    assert done.stdout.strip() == "[]"
