"""Checkpoints are read and written as the libraries of their forms do, whole or not at all."""

import functools
import json
import pathlib
import pickle
import zipfile

import chex
import equinox as eqx
import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import orbax.checkpoint
import pytest
from flax import serialization
from safetensors.numpy import load_file, save_file

from rebasin.checkpoints import Name, checkpoint_digest, read_checkpoint, read_names, write_checkpoint
from rebasin.errors import CheckpointError, TreeMismatchError

RNG = np.random.default_rng(0)
TREE = {
    "fc0": {"weight": RNG.normal(size=(4, 3)).astype(np.float32), "bias": np.zeros(4, np.float16)},
    "fc10": {"weight": RNG.normal(size=(2, 4)).astype(ml_dtypes.bfloat16), "bias": np.ones(2, np.float32)},
}
PLAIN = jax.tree.map(lambda leaf: leaf.astype(np.float32), TREE)  # npz knows no bfloat16


def dotted(tree):
    return {f"{layer}.{name}": leaf for layer, leaves in tree.items() for name, leaf in leaves.items()}


def save_npz(path, tree):
    with path.open("wb") as file:
        np.savez(file, **dotted(tree))


def save_sharded(path, tree):
    path.mkdir()
    files = {name: f"part-{i % 2}.safetensors" for i, name in enumerate(dotted(tree))}
    for file in set(files.values()):
        save_file({n: leaf for n, leaf in dotted(tree).items() if files[n] == file}, path / file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": files}))


def save_orbax(path, tree):
    with orbax.checkpoint.PyTreeCheckpointer() as saver:
        saver.save(path, tree)


def load_orbax(path):
    with orbax.checkpoint.PyTreeCheckpointer() as loader:
        return loader.restore(path)


def load_sharded(path):
    index = json.loads((path / "model.safetensors.index.json").read_text())["weight_map"]
    assert {name: file for file in sorted(set(index.values())) for name in load_file(path / file)} == index
    return functools.reduce(lambda a, b: a | b, (load_file(path / file) for file in set(index.values())))


# For each form the tree, the library's way to save it, and its way to load it as a table or tree.
FORMS = {
    "safetensors": (TREE, lambda p, t: save_file(dotted(t), p, metadata={"format": "pt"}), load_file, dotted),
    "sharded": (TREE, save_sharded, load_sharded, dotted),
    "npz": (PLAIN, save_npz, lambda path: dict(np.load(path)), dotted),
    "msgpack": (
        TREE,
        lambda path, tree: path.write_bytes(serialization.msgpack_serialize(tree)),
        lambda path: serialization.msgpack_restore(path.read_bytes()),
        lambda tree: tree,
    ),
    "orbax": (TREE, save_orbax, load_orbax, lambda tree: tree),
}


@pytest.mark.parametrize("form", FORMS)
def test_a_tree_is_read_as_it_was_saved_and_written_back_in_the_same_form(form, tmp_path):
    tree, save, load, layout = FORMS[form]
    save(tmp_path / "a", tree)
    checkpoint = read_checkpoint(tmp_path / "a")
    assert checkpoint.form == ("safetensors" if form == "sharded" else form)
    chex.assert_trees_all_equal(checkpoint.tree, tree)
    chex.assert_trees_all_equal_dtypes(checkpoint.tree, tree)
    # Reversed leaves, whose memory is not in order, as after a permutation.
    changed = jax.tree.map(lambda leaf: leaf[::-1], tree)
    write_checkpoint(tmp_path / "b", changed, checkpoint)
    written = load(tmp_path / "b")
    chex.assert_trees_all_equal(written, layout(changed))
    chex.assert_trees_all_equal_dtypes(written, layout(changed))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_the_text_of_a_safetensors_file_is_kept(tmp_path):
    save_file(dotted(TREE), tmp_path / "a", metadata={"format": "pt", "note": "mine"})
    checkpoint = read_checkpoint(tmp_path / "a")
    write_checkpoint(tmp_path / "b", checkpoint.tree, checkpoint)
    assert read_checkpoint(tmp_path / "b").metadata == {"format": "pt", "note": "mine"}


def test_equinox_needs_a_template_and_keeps_its_module(tmp_path):
    model = eqx.nn.MLP(3, 2, 4, 1, key=jax.random.key(0))
    params, static = eqx.partition(model, eqx.is_array)
    eqx.tree_serialise_leaves(tmp_path / "a.eqx", params)
    with pytest.raises(
        CheckpointError, match="Equinox serialised, without names: give the module as template"
    ):
        read_checkpoint(tmp_path / "a.eqx")
    template = jax.tree.map(jnp.zeros_like, params)
    checkpoint = read_checkpoint(tmp_path / "a.eqx", template=template)
    write_checkpoint(tmp_path / "b.eqx", checkpoint.tree, checkpoint)
    again = eqx.tree_deserialise_leaves(tmp_path / "b.eqx", template)
    x = jnp.arange(3.0)
    chex.assert_trees_all_equal(eqx.combine(again, static)(x), model(x))


def test_a_template_gives_the_containers(tmp_path):
    save_file({f"layers.{i}.w": np.full(2, i, np.float32) for i in range(11)}, tmp_path / "a")
    template = {"layers": [{"w": jax.ShapeDtypeStruct((2,), "float32")} for _ in range(11)]}
    tree = read_checkpoint(tmp_path / "a", template=template).tree
    assert [layer["w"][0] for layer in tree["layers"]] == list(range(11))
    template["layers"][3]["w"] = jax.ShapeDtypeStruct((5,), "float32")
    with pytest.raises(TreeMismatchError, match=r"layers/3/w: shape \(5,\) in the template, \(2,\) in"):
        read_checkpoint(tmp_path / "a", template=template)


def test_names_are_mapped_transposed_and_left_out_and_written_back(tmp_path):
    kernel = RNG.normal(size=(4, 3, 2)).astype(np.float32)  # an order of three axes is not its own inverse
    arrays = {**dotted(TREE), "conv": kernel, "attn.mask": np.tri(3, dtype=np.float32)}
    save_file(arrays, tmp_path / "a")
    names = {
        "fc*.weight": {"path": "params/Dense_*/kernel", "axes": [1, 0]},
        "fc*.bias": "params/Dense_*/bias",
        "conv": {"path": "params/Conv/kernel", "axes": [2, 0, 1]},
        "attn.mask": None,
    }
    (tmp_path / "names.json").write_text(json.dumps(names))
    checkpoint = read_checkpoint(tmp_path / "a", names=read_names(tmp_path / "names.json"))
    expected = {
        "params": {
            f"Dense_{i}": {"kernel": TREE[f"fc{i}"]["weight"].T, "bias": TREE[f"fc{i}"]["bias"]}
            for i in (0, 10)
        }
    }
    expected["params"]["Conv"] = {"kernel": np.moveaxis(kernel, 2, 0)}
    chex.assert_trees_all_equal(checkpoint.tree, expected)
    assert list(checkpoint.rest) == ["attn.mask"]
    write_checkpoint(tmp_path / "b", checkpoint.tree, checkpoint)
    chex.assert_trees_all_equal(load_file(tmp_path / "b"), arrays)


@pytest.mark.parametrize(
    ("names", "problem"),
    [
        ({"fc0.*": Name("a/*")}, r"fc10.weight: no pattern fits"),
        ({"fc*": Name("*"), "*weight": Name("*")}, r"fc0.weight: fits \['fc\*', '\*weight'\]"),
        ({"*": Name("same")}, r"its leaf same is that of fc0.\w+ already"),
        ({"*": Name("*", (1, 0))}, r"fc0.bias: 1 axes, and the map has an order of 2"),
    ],
)
def test_a_map_that_does_not_fit_says_where(names, problem, tmp_path):
    save_file(dotted(TREE), tmp_path / "a")
    with pytest.raises(CheckpointError, match=rf"^the map of names does not fit .*a:\n(.*\n)*.*{problem}"):
        read_checkpoint(tmp_path / "a", names=names)


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        ("[]", "not a map of names: wanted an object, got list"),
        ("{", "not a map of names: Expecting property name"),
        ('{"a": 3}', "'a': wanted a path name, null, or"),
        ('{"a": {"path": "b", "axes": [0, 2]}}', "'a': axes must be an order of the axes 0 to 1"),
        ('{"a.*": "*/*"}', r"'a\.\*': it has 1 times \*, and '\*/\*' another number"),
    ],
)
def test_a_file_that_is_no_map_of_names_says_why(content, problem, tmp_path):
    (tmp_path / "names.json").write_text(content)
    with pytest.raises(CheckpointError, match=f"names.json: .*{problem}"):
        read_names(tmp_path / "names.json")
    with pytest.raises(CheckpointError, match="none.json: No such file"):
        read_names(tmp_path / "none.json")


def test_pickles_are_refused_with_the_way_to_convert_them(tmp_path):
    (tmp_path / "a.pt").write_bytes(pickle.dumps({"w": 1}))
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    for name in ("a", "b"):
        with pytest.raises(CheckpointError, match=rf"{name}.pt is a pickle.*{name}\.safetensors'\)"):
            read_checkpoint(tmp_path / f"{name}.pt")


@pytest.mark.parametrize("form", ["safetensors", "npz", "msgpack"])
def test_a_truncated_file_is_refused(form, tmp_path):
    tree, save, _, _ = FORMS[form]
    save(tmp_path / "a", tree)
    content = (tmp_path / "a").read_bytes()
    (tmp_path / "a").write_bytes(content[: len(content) // 2])
    with pytest.raises(CheckpointError, match=f"a cannot be read as {form}, it may be damaged: ."):
        read_checkpoint(tmp_path / "a")


def test_what_is_no_checkpoint_is_refused(tmp_path):
    (tmp_path / "text").write_text("hello")
    (tmp_path / "empty").write_bytes(b"")
    (tmp_path / "folder").mkdir()
    save_file({"a": np.ones(2), "a.b": np.ones(2)}, tmp_path / "nested")
    np.savez(tmp_path / "half.npz", w=np.ones(2, ml_dtypes.bfloat16))
    for name, problem in {
        "none": "does not exist",
        "text": "is no checkpoint of a known form: safetensors, npz",
        "empty": "is no checkpoint of a known form",
        "folder": "wanted an Orbax folder or one with safetensors",
        "nested": "a.b? (lies below an array|is)",
        "half.npz": "w has no dtype that NumPy knows; npz files lose bfloat16, so use safetensors",
    }.items():
        with pytest.raises(CheckpointError, match=f"{name}.* {problem}" if name != "nested" else "below"):
            read_checkpoint(tmp_path / name)


def test_the_steps_and_files_that_are_there_are_named(tmp_path):
    for step in ("2", "10"):
        save_orbax(tmp_path / "run" / step, PLAIN)
    with pytest.raises(CheckpointError, match=r"holds the steps 2, 10; name one of them, such as .*run/10$"):
        read_checkpoint(tmp_path / "run")
    save_sharded(tmp_path / "parts", TREE)
    (tmp_path / "parts/part-1.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"names files that are not there: part-1\.safetensors"):
        read_checkpoint(tmp_path / "parts")


@pytest.mark.parametrize("form", ["safetensors", "sharded"])
def test_a_checkpoint_is_written_whole_or_not_at_all(form, tmp_path, monkeypatch):
    tree, save, _, _ = FORMS[form]
    save(tmp_path / "a", tree)
    checkpoint = read_checkpoint(tmp_path / "a")

    def full(arrays, path, metadata):
        pathlib.Path(path).write_bytes(b"begun")
        assert not (tmp_path / "b").exists()  # a run that is killed now leaves nothing of that name
        raise OSError(28, "No space left on device", str(path))

    monkeypatch.setattr("safetensors.numpy.save_file", full)
    with pytest.raises(OSError, match="No space left"):
        write_checkpoint(tmp_path / "b", checkpoint.tree, checkpoint)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_nothing_is_overwritten(tmp_path):
    save_file(dotted(TREE), tmp_path / "a")
    checkpoint, before = read_checkpoint(tmp_path / "a"), checkpoint_digest(tmp_path / "a")
    with pytest.raises(CheckpointError, match="a exists already and is not overwritten"):
        write_checkpoint(tmp_path / "a", checkpoint.tree, checkpoint)
    with pytest.raises(CheckpointError, match="there is no folder"):
        write_checkpoint(tmp_path / "no/b", checkpoint.tree, checkpoint)
    with pytest.raises(TreeMismatchError, match="fc0/bias"):
        write_checkpoint(tmp_path / "b", {"fc10": checkpoint.tree["fc10"]}, checkpoint)
    assert checkpoint_digest(tmp_path / "a") == before
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
