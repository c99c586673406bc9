"""Checkpoints of any origin: a tree from a file or folder, and a changed tree back in the same form.

The form is recognised by content, not by name: safetensors (also in several files with an index), NumPy's
``.npz``, Flax's msgpack, Orbax, and the leaves that Equinox serialises. The library of a form is loaded when
a checkpoint of that form is. Pickles are refused, since reading one runs whatever code it holds.
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import importlib
import json
import pathlib
import re
import shutil
import zipfile
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from rebasin.errors import CheckpointError, RebasinError, problem_list
from rebasin.trees import conform, leaf_table

__all__ = [
    "Checkpoint",
    "Name",
    "check_absent",
    "checkpoint_digest",
    "read_checkpoint",
    "read_names",
    "write_checkpoint",
]


class Name(NamedTuple):
    """Where an array of a checkpoint belongs in the tree of a model.

    Attributes:
      path: path name of the leaf, in which every ``*`` stands for the text of the pattern's ``*`` in the same
        place; `None` for an array that the model does not have.
      axes: order of the stored axes in the leaf, as in `numpy.transpose`; `None` to leave them as they are. A
        PyTorch ``Linear`` stores ``[outputs, inputs]``, a Flax ``Dense`` ``[inputs, outputs]``: ``(1, 0)``.
    """

    path: str | None
    axes: tuple[int, ...] | None = None


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """A tree from disk, with what it takes to write another one in the same form.

    Attributes:
      tree: the leaves, in the containers of the template, or as nested dictionaries.
      path: the file or folder.
      form: ``"safetensors"``, ``"npz"``, ``"msgpack"``, ``"orbax"`` or ``"equinox"``.
      stored: for each leaf of `tree`, by path name, its name in the checkpoint and the order of its axes.
      rest: arrays of the checkpoint that the model does not have; they are written back as they are.
      metadata: text that the file holds beside its arrays.
      files: for safetensors in several files, the file of each array.
    """

    tree: Any
    path: pathlib.Path
    form: str
    stored: Mapping[str, Name]
    rest: Mapping[str, np.ndarray]
    metadata: Mapping[str, str] = dataclasses.field(default_factory=dict)
    files: Mapping[str, str] = dataclasses.field(default_factory=dict)

    @property
    def dtypes(self) -> tuple[str, ...]:
        """The dtypes of the leaves, each once."""
        return tuple(sorted({str(leaf.dtype) for leaf in leaf_table(self.tree).values()}))

    @property
    def num_parameters(self) -> int:
        """The number of entries of all leaves."""
        return sum(int(np.size(leaf)) for leaf in leaf_table(self.tree).values())


class _Content(NamedTuple):
    """What a file or folder holds: arrays by name, and the rest of `Checkpoint`."""

    arrays: dict[str, Any]
    metadata: Mapping[str, str] = {}
    files: Mapping[str, str] = {}


def read_names(path: str | pathlib.Path) -> dict[str, Name]:
    """Read a map from names in a checkpoint to path names of a model, from a JSON file.

    Its keys are names or patterns, in which ``*`` stands for any text. Its values are path names, or
    ``{"path": …, "axes": […]}``, or ``null`` for arrays that the model does not have; see `Name`.

    Raises:
      CheckpointError: the file is missing or holds something else.

    Examples:
      >>> import tempfile
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     text = '{"fc*.weight": {"path": "params/Dense_*/kernel", "axes": [1, 0]}, "step": null}'
      ...     _ = pathlib.Path(folder, "names.json").write_text(text)
      ...     read_names(f"{folder}/names.json")["fc*.weight"]
      Name(path='params/Dense_*/kernel', axes=(1, 0))
    """
    try:
        content = json.loads(pathlib.Path(path).read_text())
        if not isinstance(content, dict):
            raise TypeError(f"wanted an object, got {type(content).__name__}")
        return {pattern: _parse_name(pattern, value) for pattern, value in content.items()}
    except OSError as error:
        raise CheckpointError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path}: not a map of names: {error}") from None


def _parse_name(pattern: str, value: Any) -> Name:
    fields = value if isinstance(value, dict) else {"path": value}
    path, axes = fields.get("path"), fields.get("axes")
    if not set(fields) <= {"path", "axes"} or not (path is None or isinstance(path, str)):
        raise TypeError(f'{pattern!r}: wanted a path name, null, or {{"path": …, "axes": […]}}, got {value}')
    if axes is not None and sorted(axes) != list(range(len(axes))):
        raise TypeError(f"{pattern!r}: axes must be an order of the axes 0 to {len(axes) - 1}, got {axes}")
    if path is not None and path.count("*") not in (0, pattern.count("*")):
        raise TypeError(f"{pattern!r}: it has {pattern.count('*')} times *, and {path!r} another number")
    return Name(path, None if axes is None else tuple(axes))


def read_checkpoint(
    path: str | pathlib.Path, *, names: Mapping[str, Name] | None = None, template: Any = None
) -> Checkpoint:
    """Read a checkpoint of any form that this module knows.

    Args:
      path: a file or folder. Of an Orbax `CheckpointManager` name the folder of one step.
      names: where each array belongs, by name or pattern (`read_names`). By default a name is its own path
        name, with ``.`` for ``/`` where no name contains a ``/``.
      template: a tree with the containers that the model expects, such as lists or an Equinox module; its
        leaves may be `jax.ShapeDtypeStruct`. By default nested dictionaries. What Equinox serialised cannot
        be read without one.

    Returns:
      The checkpoint; its leaves are NumPy arrays in the dtypes of the file.

    Raises:
      CheckpointError: the path is missing, of an unknown form, a pickle, damaged, or its names do not fit.
      TreeMismatchError: leaves or shapes differ from those of the template.
    """
    path = pathlib.Path(path)
    form = _recognise(path)
    read = _FORMS[form].read
    try:
        content = read(path, template)
    except RebasinError:
        raise
    except ImportError as error:
        raise CheckpointError(
            f"{path} is of the form {form}, which needs the package {error.name}: "
            "pip install 'rebasin-jax[checkpoints]'"
        ) from error
    except Exception as error:  # whatever the library of the form raises at damaged files
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise CheckpointError(f"{path} cannot be read as {form}, it may be damaged: {reason[0]}") from error
    if not content.arrays:
        raise CheckpointError(f"{path} holds no arrays")
    if names is None:
        dotted = not any("/" in name for name in content.arrays)
        found = {name: Name(name.replace(".", "/") if dotted else name) for name in content.arrays}
    else:
        found = _apply_names(path, content.arrays, names)
    leaves, stored, rest = {}, {}, {}
    for name, array in content.arrays.items():
        leaf, axes = found[name]
        if leaf is None:
            rest[name] = array
            continue
        leaves[leaf] = array if axes is None else np.transpose(array, axes)
        stored[leaf] = Name(name, axes)
    tree = _nest(leaves, path)
    if template is not None:
        tree = conform(template, tree, names=("the template", str(path)), dtypes=False)
    return Checkpoint(tree, path, form, stored, rest, content.metadata, content.files)


def write_checkpoint(path: str | pathlib.Path, tree: Any, like: Checkpoint) -> None:
    """Write a tree in the form of a checkpoint: its names, axes and order of arrays, metadata and files.

    It is written beside its place and renamed at the end, so that there is a whole one or none.

    Args:
      path: a file or folder that does not exist yet.
      tree: a tree with the leaves of ``like.tree``, in any containers.
      like: the checkpoint whose form is kept. Arrays that its model does not have are written as they are.

    Raises:
      CheckpointError: `path` exists, its folder does not, or it cannot be written.
      TreeMismatchError: `tree` has other leaves or shapes than ``like.tree``.
    """
    path = pathlib.Path(path)
    check_absent(path)
    tree = conform(like.tree, tree, names=(str(like.path), "the tree"), dtypes=False)
    arrays = dict(like.rest)
    for leaf, value in leaf_table(tree).items():
        name, axes = like.stored[leaf]
        assert name is not None
        array = np.asarray(value)
        arrays[name] = array if axes is None else np.transpose(array, np.argsort(axes))
    partial = path.with_name(f"{path.name}.partial")
    try:
        _FORMS[like.form].write(partial, arrays, tree, like)
        partial.rename(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            shutil.rmtree(partial) if partial.is_dir() else partial.unlink()
        if isinstance(error, RebasinError | OSError | KeyboardInterrupt):
            raise
        raise CheckpointError(f"{path} cannot be written as {like.form}: {error}") from error


def check_absent(path: str | pathlib.Path) -> None:
    """Check that a file or folder can be made: it does not exist, and its folder does.

    Raises:
      CheckpointError: it exists, or its folder does not.
    """
    path = pathlib.Path(path)
    if path.exists():
        raise CheckpointError(f"{path} exists already and is not overwritten; name another output")
    if not path.parent.is_dir():
        raise CheckpointError(f"{path} cannot be written: there is no folder {path.parent}")


def checkpoint_digest(path: str | pathlib.Path) -> str:
    """Return the SHA-256 of a file, or of all files of a folder with their names, as hexadecimal digits."""
    path, digest = pathlib.Path(path), hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        if path.is_dir():
            digest.update(file.relative_to(path).as_posix().encode())
        with file.open("rb") as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
    return digest.hexdigest()


def _recognise(path: pathlib.Path) -> str:
    """Return the form of a file or folder."""
    if not path.exists():
        raise CheckpointError(f"{path} does not exist")
    if path.is_dir():
        return _recognise_folder(path)
    if path.name.endswith(".safetensors.index.json"):
        return "safetensors"
    with path.open("rb") as file:
        head = file.read(16)
    if head[:4] == b"PK\x03\x04":
        with contextlib.suppress(zipfile.BadZipFile), zipfile.ZipFile(path) as archive:
            if any(name.endswith("data.pkl") for name in archive.namelist()):
                raise CheckpointError(_refuse_pickle(path))
        return "npz"
    if head[8:9] == b"{":
        return "safetensors"
    if head[:6] == b"\x93NUMPY":
        return "equinox"
    if head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05"):
        raise CheckpointError(_refuse_pickle(path))
    if head[:1] and (0x80 <= head[0] <= 0x8F or head[0] in (0xDE, 0xDF)):
        return "msgpack"
    raise CheckpointError(
        f"{path} is no checkpoint of a known form: safetensors, npz, Flax msgpack, Orbax or Equinox"
    )


def _recognise_folder(path: pathlib.Path) -> str:
    steps = [p.name for p in path.iterdir() if p.name.isdigit() and _orbax_item(p) is not None]
    if steps and not (path / "_METADATA").is_file():
        steps = sorted(steps, key=int)
        raise CheckpointError(
            f"{path} holds the steps {', '.join(steps)}; name one of them, such as {path / steps[-1]}"
        )
    if _orbax_item(path) is not None:
        return "orbax"
    if list(path.glob("*.safetensors.index.json")) or len(list(path.glob("*.safetensors"))) == 1:
        return "safetensors"
    raise CheckpointError(
        f"{path} is no checkpoint: wanted an Orbax folder or one with safetensors and their index"
    )


def _refuse_pickle(path: pathlib.Path) -> str:
    return (
        f"{path} is a pickle, as PyTorch writes it, and reading one runs the code in it. Convert it where "
        'PyTorch is installed: python -c "import torch, safetensors.torch as s; '
        f"s.save_file({{k: v.contiguous() for k, v in torch.load('{path}', weights_only=True).items()}}, "
        f"'{path.with_suffix('.safetensors')}')\""
    )


def _apply_names(path: pathlib.Path, arrays: Mapping[str, Any], names: Mapping[str, Name]) -> dict[str, Name]:
    """Return the path name of every array, or raise unless exactly one pattern fits each."""
    found, problems = {}, []
    for name, array in arrays.items():
        fitting = [pattern for pattern in names if fnmatch.fnmatchcase(name, _literal(pattern))]
        exact = [pattern for pattern in fitting if pattern == name]
        if len(exact or fitting) != 1:
            problems.append(f"{name}: {'no pattern fits' if not fitting else f'fits {fitting}'}")
            continue
        (pattern,) = exact or fitting
        wanted = names[pattern]
        if wanted.axes is not None and len(wanted.axes) != np.ndim(array):
            problems.append(f"{name}: {np.ndim(array)} axes, and the map has an order of {len(wanted.axes)}")
            continue
        found[name] = Name(_fill(pattern, name, wanted.path), wanted.axes)
    taken: dict[str, str] = {}
    for name, (leaf, _) in found.items():
        if leaf is not None and taken.setdefault(leaf, name) != name:
            problems.append(f"{name}: its leaf {leaf} is that of {taken[leaf]} already")
    if problems:
        raise CheckpointError(problem_list(f"the map of names does not fit {path}:", problems))
    return found


def _literal(pattern: str) -> str:
    """Return a pattern of fnmatch in which ``*`` alone is special."""
    return re.sub(r"[?\[]", r"[\g<0>]", pattern)


def _fill(pattern: str, name: str, path: str | None) -> str | None:
    """Return a path name with the texts of the pattern's stars in the places of its own."""
    if path is None or "*" not in path:
        return path
    match = re.fullmatch("(.*?)".join(map(re.escape, pattern.split("*"))), name)
    assert match is not None
    texts = iter(match.groups())
    return re.sub(r"\*", lambda _: next(texts), path)


def _nest(leaves: Mapping[str, Any], path: pathlib.Path) -> dict[str, Any]:
    """Return nested dictionaries of arrays by path name."""
    tree: dict[str, Any] = {}
    for name, array in leaves.items():
        *parents, last = name.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
            if not isinstance(node, dict):
                break
        if not isinstance(node, dict) or last in node:
            raise CheckpointError(
                f"{path}: {name} lies below an array, or has arrays below it; give the leaves other path "
                "names by a map of names"
            )
        node[last] = array
    return tree


def _read_safetensors(path: pathlib.Path, template: Any) -> _Content:
    del template
    importlib.import_module("ml_dtypes")  # bfloat16 of NumPy
    safe_open = importlib.import_module("safetensors").safe_open
    index = _index_of(path)
    where = {}
    if index is not None:
        where = json.loads(index.read_text())["weight_map"]
        folder, files = index.parent, sorted(set(where.values()))
        if missing := [file for file in files if not (folder / file).is_file()]:
            raise CheckpointError(f"{index} names files that are not there: {', '.join(missing)}")
    else:
        file = path if path.is_file() else next(path.glob("*.safetensors"))
        folder, files = file.parent, [file.name]
    arrays, metadata = {}, {}
    for file in files:
        with safe_open(folder / file, framework="numpy") as stored:
            metadata |= stored.metadata() or {}
            for name in stored.keys():  # noqa: SIM118, since it is no dictionary
                try:
                    arrays[name] = stored.get_tensor(name)
                except AttributeError:
                    dtype = stored.get_slice(name).get_dtype()
                    raise CheckpointError(
                        f"{folder / file}: {name} has the dtype {dtype}, which NumPy does not have"
                    ) from None
    if lacking := [name for name in where if name not in arrays]:
        raise CheckpointError(f"{index} names arrays that no file holds: {', '.join(lacking)}")
    return _Content(arrays, metadata, where)


def _index_of(path: pathlib.Path) -> pathlib.Path | None:
    """Return the index file of safetensors in several files, `None` for a single one."""
    if path.is_dir():
        return next(iter(sorted(path.glob("*.safetensors.index.json"))), None)
    return path if path.name.endswith(".index.json") else None


def _write_safetensors(path: pathlib.Path, arrays: dict[str, Any], tree: Any, like: Checkpoint) -> None:
    del tree
    save_file = importlib.import_module("safetensors.numpy").save_file
    # The format stores bytes in order, whatever the strides of an array say.
    arrays = {name: np.ascontiguousarray(array) for name, array in arrays.items()}
    metadata = dict(like.metadata) or None
    if not like.files and not like.path.is_dir():
        save_file(arrays, path, metadata=metadata)
        return
    path.mkdir()
    for file in sorted(set(like.files.values())) or ["model.safetensors"]:
        part = {name: array for name, array in arrays.items() if like.files.get(name, file) == file}
        save_file(part, path / file, metadata=metadata)
    if like.files:
        size = sum(array.nbytes for array in arrays.values())
        index = {"metadata": {"total_size": size}, "weight_map": dict(like.files)}
        (path / (_index_of(like.path) or like.path).name).write_text(json.dumps(index, indent=2) + "\n")


def _read_npz(path: pathlib.Path, template: Any) -> _Content:
    del template
    with path.open("rb") as stream, np.load(stream, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    if raw := [name for name, array in arrays.items() if array.dtype.kind == "V"]:
        raise CheckpointError(
            f"{path}: {raw[0]} has no dtype that NumPy knows; npz files lose bfloat16, so use safetensors"
        )
    return _Content(arrays)


def _write_npz(path: pathlib.Path, arrays: dict[str, Any], tree: Any, like: Checkpoint) -> None:
    del tree, like
    with path.open("wb") as file:
        np.savez(file, **arrays)


def _read_msgpack(path: pathlib.Path, template: Any) -> _Content:
    del template
    restored = importlib.import_module("flax.serialization").msgpack_restore(path.read_bytes())
    return _Content(leaf_table(restored))


def _write_msgpack(path: pathlib.Path, arrays: dict[str, Any], tree: Any, like: Checkpoint) -> None:
    del tree
    content = _nest(arrays, like.path)
    path.write_bytes(importlib.import_module("flax.serialization").msgpack_serialize(content))


def _orbax_item(path: pathlib.Path) -> pathlib.Path | None:
    """Return the folder of the one tree in an Orbax checkpoint, `None` where there is none."""
    if (path / "_METADATA").is_file():
        return path
    items = [p for p in path.iterdir() if p.is_dir() and (p / "_METADATA").is_file()] if path.is_dir() else []
    if len(items) > 1:
        names = ", ".join(sorted(p.name for p in items))
        raise CheckpointError(f"{path} holds several trees, {names}; name one, such as {items[0]}")
    return items[0] if items else None


def _read_orbax(path: pathlib.Path, template: Any) -> _Content:
    del template
    checkpoint = importlib.import_module("orbax.checkpoint")
    item = _orbax_item(path)
    assert item is not None
    with checkpoint.PyTreeCheckpointer() as reader:
        metadata = reader.metadata(item.absolute()).item_metadata
        as_numpy = jax.tree.map(lambda _: checkpoint.RestoreArgs(restore_type=np.ndarray), metadata.tree)
        return _Content(leaf_table(reader.restore(item.absolute(), restore_args=as_numpy)))


def _write_orbax(path: pathlib.Path, arrays: dict[str, Any], tree: Any, like: Checkpoint) -> None:
    del tree
    checkpoint = importlib.import_module("orbax.checkpoint")
    with checkpoint.PyTreeCheckpointer() as writer:
        writer.save(path.absolute(), _nest(arrays, like.path))


def _read_equinox(path: pathlib.Path, template: Any) -> _Content:
    if template is None:
        raise CheckpointError(
            f"{path} holds leaves that Equinox serialised, without names: give the module as template"
        )
    read = importlib.import_module("equinox").tree_deserialise_leaves(path, template)
    return _Content({name: np.asarray(leaf) for name, leaf in leaf_table(read).items()})


def _write_equinox(path: pathlib.Path, arrays: dict[str, Any], tree: Any, like: Checkpoint) -> None:
    del arrays, like
    importlib.import_module("equinox").tree_serialise_leaves(path, tree)


class _Form(NamedTuple):
    read: Callable[[pathlib.Path, Any], _Content]
    write: Callable[[pathlib.Path, dict[str, Any], Any, Checkpoint], None]


_FORMS = {
    "safetensors": _Form(_read_safetensors, _write_safetensors),
    "npz": _Form(_read_npz, _write_npz),
    "msgpack": _Form(_read_msgpack, _write_msgpack),
    "orbax": _Form(_read_orbax, _write_orbax),
    "equinox": _Form(_read_equinox, _write_equinox),
}
