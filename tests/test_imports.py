"""Imports point one way, tests take public names, and aligning networks loads jax, numpy and scipy alone."""

import ast
import functools
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]

# Rooms from the top down. A module imports from rooms further down, and from its own.
ROOMS = [
    ["experiments"],
    ["rebasin.__main__"],
    ["rebasin.command"],
    ["rebasin.training"],
    ["rebasin.models"],
    ["rebasin"],  # the public names of all that follows
    ["rebasin.diagnosis"],
    ["rebasin.align"],
    ["rebasin.landscape"],
    ["rebasin.landscape", "rebasin.connectivity"],
    [
        "rebasin.matching",
        "rebasin.barrier",
        "rebasin.repair",
        "rebasin.batchnorm",
        "rebasin.pruning",
        "rebasin.bounds",
        "rebasin.dimensions",
        "rebasin.transport",
        "rebasin.temperature",
    ],
    ["rebasin.masks"],
    ["rebasin.tracing"],
    ["rebasin.inference"],
    ["rebasin.permutation"],
    ["rebasin.batches", "rebasin.compilation"],
    ["rebasin.spec"],
    ["rebasin.explanation"],
    ["rebasin.axis"],
    ["rebasin.arithmetic"],
    ["rebasin.roles"],
    ["rebasin.checkpoints"],
    ["rebasin.trees"],
    ["rebasin.files"],
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


def source_of(module):
    """The file of a module of ours, or `None`."""
    path = ROOT.joinpath(*module.split("."))
    return next((p for p in (path.with_suffix(".py"), path / "__init__.py") if p.exists()), None)


@functools.cache
def public_names(module):
    """The `__all__` of a module of ours, read without importing it; `None` if it has none."""
    for node in ast.parse(source_of(module).read_text()).body:
        if isinstance(node, ast.Assign) and [ast.unparse(t) for t in node.targets] == ["__all__"]:
            return set(ast.literal_eval(node.value))
    return None


def is_public(module, name):
    """Whether ``from module import name`` takes a public name, a package, or a module with an `__all__`."""
    submodule = f"{module}.{name}"
    path = source_of(submodule)
    if path is None:
        return name in (public_names(module) or ())
    return path.name == "__init__.py" or public_names(submodule) is not None


def names_taken(path):
    """Yield module and name of everything of ours that a test imports, or takes from an imported module."""
    tree = ast.parse(path.read_text())
    modules = {}  # local name of an imported module of ours to its full name
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            for alias in node.names:
                yield node.module, alias.name
                if source_of(f"{node.module}.{alias.name}"):
                    modules[alias.asname or alias.name] = f"{node.module}.{alias.name}"
        elif isinstance(node, ast.Import):
            ours = (alias for alias in node.names if alias.name.split(".")[0] in OURS)
            modules |= {alias.asname or alias.name: alias.name for alias in ours}
    for node in ast.walk(tree):
        # module._name, and setattr(module, "_name", …) as monkeypatch has it
        if isinstance(node, ast.Attribute) and node.attr.startswith("_") and not node.attr.startswith("__"):
            if ast.unparse(node.value) in modules:
                yield modules[ast.unparse(node.value)], node.attr
        elif isinstance(node, ast.Call) and len(node.args) > 1 and ast.unparse(node.args[0]) in modules:
            name = node.args[1].value if isinstance(node.args[1], ast.Constant) else None
            if isinstance(name, str) and name.startswith("_"):
                yield modules[ast.unparse(node.args[0])], name


OURS = ("rebasin", "experiments", "benchmarks")


def test_tests_take_public_names_only():
    private = {}
    for path in sorted(ROOT.glob("tests/**/*.py")):
        taken = {f"{m}.{n}" for m, n in names_taken(path) if n.startswith("_") or not is_public(m, n)}
        if taken:
            private[path.relative_to(ROOT).as_posix()] = sorted(taken)
    assert private == {}


def test_importing_the_library_loads_only_jax_numpy_and_scipy():
    """In a fresh interpreter: `import rebasin` and nothing else."""
    assert heavy_modules_after("import rebasin") == "[]"


def test_aligning_networks_loads_only_jax_numpy_and_scipy():
    """In a fresh interpreter: import the library, infer a spec, match, permute and sweep."""
    program = """
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
"""
    assert heavy_modules_after(program) == "[]"


HEAVY = ["tensorflow", "tensorflow_datasets", "orbax", "flax", "optax", "matplotlib", "absl"]
HEAVY += ["rich", "PIL", "ott", "lineax"]


def heavy_modules_after(program):
    """What of `HEAVY` a fresh interpreter has loaded when it has run a program, as text."""
    program += f"\nimport sys\nprint([name for name in {HEAVY} if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT
    )
    return done.stdout.strip()
