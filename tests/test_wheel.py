"""The wheel can be imported in an environment with nothing else, and aligns two MLPs there."""

import pathlib
import subprocess
import sys
import zipfile

import pytest

ROOT = pathlib.Path(__file__).parents[1]

PROGRAM = """
import importlib.util
import jax, jax.numpy as jnp
import rebasin

assert importlib.util.find_spec("flax") is None
keys = jax.random.split(jax.random.key(0), 3)
a = {"w": jax.random.normal(keys[0], (3, 16)), "v": jax.random.normal(keys[1], (16, 2))}
apply = lambda t, x: jnp.tanh(x @ t["w"]) @ t["v"]
x = jnp.ones((4, 3))
spec = rebasin.infer_spec(apply, a, x)
b = rebasin.permute(spec, rebasin.random_permutation(spec, a, key=keys[2]), a)
match = rebasin.weight_matching(spec, a, b, key=keys[2])
moved = rebasin.permute(spec, match.permutation, b)
assert all((moved[k] == a[k]).all() for k in a)
print("aligned", rebasin.__file__)
"""


def run(*command, cwd):
    return subprocess.run(command, capture_output=True, text=True, check=True, cwd=cwd).stdout


@pytest.mark.slow
def test_wheel_in_an_empty_environment(tmp_path):
    run(sys.executable, "-m", "pip", "wheel", "--no-deps", "--wheel-dir", tmp_path, ROOT, cwd=tmp_path)
    (wheel,) = tmp_path.glob("rebasin_jax-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = set(file.namelist())
    sources = {str(path.relative_to(ROOT)) for path in ROOT.glob("rebasin/**/*.py")}
    assert sources | {"rebasin/training/digits.npz", "rebasin/py.typed"} == {
        n for n in names if n.startswith("rebasin/")
    }

    run(sys.executable, "-m", "venv", tmp_path / "env", cwd=tmp_path)
    python = tmp_path / "env/bin/python"
    run(python, "-m", "pip", "install", "--quiet", wheel, cwd=tmp_path)
    aligned, path = run(python, "-c", PROGRAM, cwd=tmp_path).split()
    assert aligned == "aligned"
    assert str(tmp_path) in path
