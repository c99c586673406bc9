"""The command aligns, inspects and merges checkpoints, and says what is wrong in one sentence."""

import json
import sys

import chex
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

import rebasin
from rebasin.command.main import main

MODEL = """
import flax.linen as nn
import jax.numpy as jnp

def apply(params, x):
    for layer in (params["fc0"], params["fc1"]):
        x = jnp.maximum(x @ layer["weight"] + layer["bias"][None], 0)
    return x @ params["fc2"]["weight"]

class Dense(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Dense(8)(x))
        return nn.Dense(3)(x)

flax_model = Dense()
number = 3
"""
SHAPES = {
    "fc0.weight": (5, 8),
    "fc0.bias": (8,),
    "fc1.weight": (8, 6),
    "fc1.bias": (6,),
    "fc2.weight": (6, 3),
}
INPUTS = "--inputs=float32[4,5]"


@pytest.fixture(scope="module")
def networks():
    """A network, another one with its units in another order, and the data that both see."""
    rng = np.random.default_rng(1)
    a = {name: rng.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}
    p, q = rng.permutation(8), rng.permutation(6)
    b = {
        "fc0.weight": a["fc0.weight"][:, p],
        "fc0.bias": a["fc0.bias"][p],
        "fc1.weight": a["fc1.weight"][np.ix_(p, q)],
        "fc1.bias": a["fc1.bias"][q],
        "fc2.weight": a["fc2.weight"][q],
    }
    return a, b


@pytest.fixture
def home(networks, tmp_path, monkeypatch):
    """A folder with a model and both networks, as the current one."""
    (tmp_path / "some_model.py").write_text(MODEL)
    for name, arrays in zip("ab", networks, strict=True):
        save_file({k: np.ascontiguousarray(v) for k, v in arrays.items()}, tmp_path / f"{name}.safetensors")
    monkeypatch.chdir(tmp_path)
    yield tmp_path
    sys.modules.pop("some_model", None)
    sys.path[:] = [path for path in sys.path if path != str(tmp_path)]


def align(*more, a="a.safetensors", b="b.safetensors", output="out.safetensors", model="some_model:apply"):
    return main(["align", f"--model={model}", INPUTS, f"--a={a}", f"--b={b}", f"--output={output}", *more])


def test_align_undoes_a_planted_permutation_and_says_how(home, networks, capsys):
    a = networks[0]
    x = np.random.default_rng(2).normal(size=(40, 5)).astype(np.float32)
    hidden = np.maximum(x @ a["fc0.weight"] + a["fc0.bias"][None], 0)
    hidden = np.maximum(hidden @ a["fc1.weight"] + a["fc1.bias"][None], 0)
    np.savez("data.npz", inputs=x, labels=(hidden @ a["fc2.weight"]).argmax(axis=1))
    assert align("--data=data.npz", "--permutation=p.json") == 0
    chex.assert_trees_all_equal(load_file("out.safetensors"), networks[0])
    text = capsys.readouterr().out
    assert "symmetries: 2 groups, verified" in text
    assert max(map(len, text.splitlines())) <= 200
    card = json.loads((home / "out.safetensors.json").read_text())
    assert card["barriers"]["after"] == {"loss": 0.0, "error": 0.0}
    assert card["barriers"]["before"]["loss"] > 0.1
    assert card["groups"] == {"fc0/weight": [8], "fc1/weight": [6]}
    assert card["objective"][-1] == pytest.approx(sum(np.sum(x**2) for x in a.values()), rel=1e-5)

    def apply_fn(params, x):
        sys.path.insert(0, str(home))
        import some_model  # pyright: ignore

        return some_model.apply(params, x)

    tree = {"fc0": {}, "fc1": {}, "fc2": {}}
    for name, array in networks[1].items():
        layer, kind = name.split(".")
        tree[layer][kind] = array
    spec = rebasin.infer_spec(apply_fn, tree, jnp.ones((4, 5)))
    assert card["spec_digest"] == spec.digest
    permuted = rebasin.permute(spec, rebasin.load_permutation("p.json", spec), tree)
    chex.assert_trees_all_equal(permuted["fc1"]["weight"], networks[0]["fc1.weight"])


def test_align_keeps_the_dtype_of_b(home, networks):
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in networks[1].items()}
    save_file({name: np.ascontiguousarray(x) for name, x in half.items()}, "half.safetensors")
    assert align(b="half.safetensors") == 0
    expected = {name: array.astype(ml_dtypes.bfloat16) for name, array in networks[0].items()}
    chex.assert_trees_all_equal(load_file("out.safetensors"), expected)


def test_a_flax_model_reads_the_checkpoint_of_another_library(home, networks):
    """Names and axes of PyTorch, mapped to those of Flax; the output keeps the former."""
    rng = np.random.default_rng(3)
    shapes = {"l.0.weight": (8, 5), "l.0.bias": (8,), "l.1.weight": (3, 8), "l.1.bias": (3,)}
    a = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    p = rng.permutation(8)
    b = {**a, "l.0.weight": a["l.0.weight"][p], "l.0.bias": a["l.0.bias"][p]}
    b["l.1.weight"] = np.ascontiguousarray(a["l.1.weight"][:, p])
    save_file(a, "torch_a")
    save_file(b, "torch_b")
    names = {
        "l.*.weight": {"path": "params/Dense_*/kernel", "axes": [1, 0]},
        "l.*.bias": "params/Dense_*/bias",
    }
    (home / "names.json").write_text(json.dumps(names))
    assert align("--names=names.json", a="torch_a", b="torch_b", model="some_model:flax_model") == 0
    chex.assert_trees_all_equal(load_file("out.safetensors"), a)


def test_inspect_prints_the_symmetries(home, capsys):
    command = ["inspect", "--model=some_model:apply", INPUTS, "--checkpoint=a.safetensors"]
    assert main(command) == 0
    text = capsys.readouterr().out
    assert "fc0/weight" in text
    assert "100 % of the units move" in text
    assert main([*command, "--json"]) == 0
    spec = rebasin.PermutationSpec.from_json(capsys.readouterr().out)
    assert spec.groups == ("fc0/weight", "fc1/weight")


def test_merge_averages_in_the_widest_precision_and_rounds_once(home, networks):
    a, b = networks
    half = {name: array.astype(ml_dtypes.bfloat16) for name, array in b.items()}
    save_file({name: np.ascontiguousarray(x) for name, x in half.items()}, "half.safetensors")
    assert main(["merge", "--networks=a.safetensors,half.safetensors", "--weights=3,1", "--output=m"]) == 0
    expected = {
        name: (0.75 * a[name].astype(np.float64) + 0.25 * half[name].astype(np.float64)) for name in a
    }
    chex.assert_trees_all_close(load_file("m"), expected, rtol=1e-6, atol=1e-7)
    assert main(["merge", "--networks=half.safetensors,a.safetensors", "--weights=1,3", "--output=h"]) == 0
    rounded = {name: array.astype(np.float32).astype(ml_dtypes.bfloat16) for name, array in expected.items()}
    chex.assert_trees_all_equal(load_file("h"), rounded)
    (home / "w.json").write_text('{"": [1, 0], "fc1": [0, 1]}')
    command = "merge --networks=a.safetensors,b.safetensors --weights=w.json --output=n"
    assert main(command.split()) == 0
    chex.assert_trees_all_equal(load_file("n"), {n: (b if n.startswith("fc1") else a)[n] for n in a})
    assert json.loads((home / "m.json").read_text())["weights"] == [3.0, 1.0]


def test_merge_averages_float64_in_float64(home, networks):
    """Beside a network in float32 too; JAX would round to float32."""
    double = {name: array.astype(np.float64) + np.pi * 1e-9 for name, array in networks[0].items()}
    save_file(double, "double.safetensors")
    assert main(["merge", "--networks=double.safetensors,b.safetensors", "--output=m"]) == 0
    expected = {name: (double[name] + array) / 2 for name, array in networks[1].items()}
    chex.assert_trees_all_close(load_file("m"), expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"a": "none"}, "none does not exist"),
        ({"output": "b.safetensors"}, "b.safetensors exists already and is not overwritten"),
        ({"output": "no/out"}, "no/out cannot be written: there is no folder no"),
        ({"model": "some_model"}, "--model: wanted package.module:name, got 'some_model'"),
        ({"model": "nowhere:f"}, "--model: there is no module nowhere, neither installed nor in "),
        ({"model": "some_model:f"}, "--model: some_model has nothing called 'f'"),
        ({"model": "some_model:number"}, "--model: some_model:number is a int and cannot be called"),
        ({"b": "short.safetensors"}, "fc1/bias: only in params_a"),
        ({"b": "wide.safetensors"}, "fc0/bias: shape (8,) in params_a, (9,) in params_b"),
        ({"extra": "--data=none.npz"}, "none.npz cannot be read: No such file"),
        ({"extra": "--method=straight_through"}, "minimises a loss: pass data="),
    ],
)
def test_what_is_wrong_is_one_message_and_nothing_is_written(home, networks, capsys, change, message):
    a = networks[0]
    save_file({name: x for name, x in a.items() if name != "fc1.bias"}, "short.safetensors")
    save_file({**a, "fc0.bias": np.zeros(9, np.float32)}, "wide.safetensors")
    files = sorted(path.name for path in home.iterdir())
    extra = [change["extra"]] if "extra" in change else []
    assert align(*extra, **{name: value for name, value in change.items() if name != "extra"}) == 1
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert message in error
    assert "Traceback" not in error
    assert sorted(path.name for path in home.iterdir() if path.name != "__pycache__") == files


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "error: there is no command 'fly'"),
        (["align", "--fly"], "Unknown command line flag 'fly'"),
        (["align", "--method=magic"], "value should be one of <weights|"),
    ],
)
def test_a_wrong_command_line_has_status_2(arguments, message, capsys):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_a_command_without_what_it_needs_says_what(capsys):
    assert main(["align", "--a=x"]) == 1
    assert (
        "error: rebasin align needs --model, --b, --output, --inputs; see --help" in capsys.readouterr().err
    )
    assert main(["merge", "--networks=x", "--output=y"]) == 1
    assert "--networks: wanted at least two checkpoints, got 1" in capsys.readouterr().err
    assert main(["align", "--model=m:f", "--a=a", "--b=b", "--output=c", "--inputs=float99[3]"]) == 1


@pytest.mark.parametrize(
    "command", [[], ["--help"], ["align", "--help"], ["inspect", "-h"], ["merge", "--help"]]
)
def test_help_fits_a_terminal(command, capsys):
    assert main(command) == (0 if command else 2)
    assert max(map(len, capsys.readouterr().out.splitlines())) <= 80


def test_random_inputs_repeat():
    from rebasin.command.arguments import make_inputs

    first, second = make_inputs(["float32[3,2]", "int32[50]<7"]), make_inputs(["float32[3,2]", "int32[50]<7"])
    chex.assert_trees_all_equal(first, second)
    assert set(np.asarray(first[1])) == set(range(7))
    assert jax.dtypes.issubdtype(first[0].dtype, np.floating)
