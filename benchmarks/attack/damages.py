"""Damaged copies of ``results.json`` and of the folders of trained networks."""

import importlib
import json
import pathlib
import random
import shutil
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np

from benchmarks.attack.outcomes import Trial, attempt
from benchmarks.attack.processes import BINARIES, Reference
from experiments.harness.results import open_results
from experiments.harness.serialisation import to_json
from rebasin.errors import RebasinError
from rebasin.training.data import load_dataset
from rebasin.training.loop import train
from rebasin.training.recipes import Recipe
from rebasin.training.trajectory import Trajectory

__all__ = ["network_damages", "results_damages"]

# What damages a file, whatever is in it: (content, rng) -> content.
_Bytes = Callable[[bytes, random.Random], bytes]


def _flip(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    changed[rng.randrange(len(changed))] ^= 1 << rng.randrange(8)
    return bytes(changed)


def _cut_out(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + content[start + rng.randint(1, 64) :]


def _blank(content: bytes, rng: random.Random) -> bytes:
    start, length = rng.randrange(len(content)), rng.randint(1, 512)
    return (content[:start] + bytes(length) + content[start + length :])[: len(content)]


def _garble(content: bytes, rng: random.Random) -> bytes:
    start = rng.randrange(len(content))
    return content[:start] + rng.randbytes(rng.randint(1, 32)) + content[start:]


def _lines(change: Callable[[list[bytes], int, int], object]) -> _Bytes:
    def damage(content: bytes, rng: random.Random) -> bytes:
        lines = content.splitlines(keepends=True)
        change(lines, rng.randrange(len(lines)), rng.randrange(len(lines)))
        return b"".join(lines)

    return damage


def _swap(lines: list[bytes], i: int, j: int) -> None:
    lines[i], lines[j] = lines[j], lines[i]


_ANY_FILE: dict[str, _Bytes] = {
    "truncated": lambda content, rng: content[: rng.randrange(len(content))],
    "one bit flipped": _flip,
    "bytes cut out": _cut_out,
    "bytes zeroed": _blank,
    "bytes put in": _garble,
}

_TEXT: dict[str, _Bytes] = {
    **_ANY_FILE,
    "line deleted": _lines(lambda lines, i, j: lines.pop(i)),
    "line doubled": _lines(lambda lines, i, j: lines.insert(i, lines[i])),
    "lines exchanged": _lines(_swap),
}

_OTHER_VALUES = (None, True, -1, 1.5, 10**400, "text", [], {}, [[[]]], {"a": 1})


def _replace_value(content: bytes, rng: random.Random) -> bytes:
    """Put a value of another type in the place of one that is chosen at random."""
    tree = json.loads(content)
    places = list(_places(tree))
    container, key = rng.choice(places)
    container[key] = rng.choice([value for value in _OTHER_VALUES if value != container[key]])
    return json.dumps(tree).encode()


def _places(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield every container and key of a JSON tree."""
    for key in list(tree) if isinstance(tree, dict) else range(len(tree)):
        yield tree, key
        if isinstance(tree[key], dict | list):
            yield from _places(tree[key])


def _rename_key(content: bytes, rng: random.Random) -> bytes:
    """Rename a key that is chosen at random."""
    tree = json.loads(content)
    container, key = rng.choice([(c, k) for c, k in _places(tree) if isinstance(c, dict)])
    container[f"{key}x"] = container.pop(key)
    return json.dumps(tree).encode()


def _edit_records(change: Callable[[list[Any]], Any]) -> _Bytes:
    """Change the records as a person might who merges files by hand, who also drops the hash."""

    def damage(content: bytes, rng: random.Random) -> bytes:
        tree = json.loads(content)
        del tree["sha256"]
        change(tree["records"])
        return json.dumps(tree).encode()

    return damage


def _drop_part(records: list[Any]) -> None:
    """Delete the first part of the first record."""
    for name in ("epochs", "spawns", "methods"):
        parts = records[0].get(name)
        if parts:
            del parts[next(iter(parts)) if isinstance(parts, dict) else 0]


def _double_part(records: list[Any]) -> None:
    """Double the first part of the first record, or rename it where parts have names."""
    for name in ("epochs", "spawns", "methods"):
        parts = records[0].get(name)
        if isinstance(parts, list):
            parts.insert(0, parts[0])
        elif parts:
            parts["another"] = parts.pop(next(iter(parts)))


_RECORDS: dict[str, _Bytes] = {
    "record doubled": _edit_records(lambda records: records.append(records[0])),
    "record missing": _edit_records(lambda records: records.pop()),
    "record of other seeds": _edit_records(lambda records: records[0].update(seeds=[8, 9])),
    "part missing": _edit_records(_drop_part),
    "part doubled": _edit_records(_double_part),
}

_WHOLE: dict[str, _Bytes] = {
    "empty": lambda content, rng: b"",
    "zeros": lambda content, rng: bytes(len(content)),
    "deeply nested": lambda content, rng: b"[" * 200_000,
    "a number of 5000 digits": lambda content, rng: b'{"schema_version": ' + b"9" * 5000 + b"}",
    "null": lambda content, rng: b"null",
    "a list": lambda content, rng: b"[1, 2]",
}


def results_damages(reference: Reference, num: int, rng: random.Random) -> Iterator[Trial]:
    """Damage finished results of every binary, and open them as the binary does."""
    kinds = {
        **_TEXT,
        "value of another type": _replace_value,
        "key renamed": _rename_key,
        **_RECORDS,
        **_WHOLE,
    }
    folder = reference.folder / "results"
    for i in range(num):
        binary = list(BINARIES)[i % len(BINARIES)]
        kind = list(kinds)[(i // len(BINARIES)) % len(kinds)]
        reference.results(binary)
        intact = reference.folder / "reference" / binary / "False" / "results.json"
        experiment = importlib.import_module(f"experiments.{binary}").EXPERIMENT
        wanted = experiment.load(intact)
        path = folder / str(i) / "results.json"
        path.parent.mkdir(parents=True)
        path.write_bytes(kinds[kind](intact.read_bytes(), rng))

        def read(experiment: Any = experiment, path: pathlib.Path = path, config: Any = wanted.config) -> Any:
            open_results(path.parent, experiment.schema, config, resume=True)
            return to_json(experiment.load(path))

        yield attempt(f"{binary}: {kind}", read, lambda found, wanted=wanted: found == to_json(wanted))


def network_damages(reference: Reference, num: int, rng: random.Random) -> Iterator[Trial]:
    """Damage the folder of a trained network and read all of its epochs."""
    recipe = Recipe("digits", "mlp", width=8, epochs=3, num_train=256, batch_size=64, warmup_epochs=1)
    base, digits = reference.folder / "networks", load_dataset("digits")
    finished = train(recipe, digits, seed=0, directory=base / "finished")
    other = train(recipe, digits, seed=1, directory=base / "other")
    truth = {epoch: finished[epoch] for epoch in finished}
    kinds = [*_ANY_FILE, "file deleted", "epoch exchanged", "epoch of another seed", "epoch deleted"]
    kinds += ["run.json: value of another type", "run.json: key renamed"]
    for i in range(num):
        kind, directory = kinds[i % len(kinds)], base / str(i)
        shutil.copytree(finished.directory, directory)
        name = f"{kind}: {_damage_network(directory, other.directory, kind, rng)}"

        def read(directory: pathlib.Path = directory) -> list[str]:
            return _wrong_epochs(directory, truth)

        yield attempt(name, read, lambda wrong: wrong == [])
        shutil.rmtree(directory)


def _damage_network(directory: pathlib.Path, other: pathlib.Path, kind: str, rng: random.Random) -> str:
    """Damage the folder of a network; return where."""
    if kind.startswith("run.json"):
        path = directory / "run.json"
        change = _replace_value if "value" in kind else _rename_key
        path.write_bytes(change(path.read_bytes(), rng))
        return "run.json"
    epoch = str(rng.randrange(4))
    if kind == "epoch exchanged":
        (directory / "0").rename(directory / "x")
        (directory / "2").rename(directory / "0")
        (directory / "x").rename(directory / "2")
        return "0 and 2"
    if kind.startswith("epoch"):
        shutil.rmtree(directory / epoch)
        if kind == "epoch of another seed":
            shutil.copytree(other / epoch, directory / epoch)
        return epoch
    files = sorted(path for path in directory.rglob("*") if path.is_file() and path.stat().st_size)
    path = rng.choice(files)
    if kind == "file deleted":
        path.unlink()
    else:
        path.write_bytes(_ANY_FILE[kind](path.read_bytes(), rng))
    return str(path.relative_to(directory))


def _wrong_epochs(directory: pathlib.Path, truth: dict[int, Any]) -> list[str]:
    """Read every epoch; return those that were read and differ from what was saved."""
    trajectory = Trajectory(directory)
    wrong, refused = [], None
    for epoch in truth:
        try:
            found = trajectory[epoch]
        except RebasinError as error:
            refused = error
            continue
        if not all(map(np.array_equal, jax.tree.leaves(found), jax.tree.leaves(truth[epoch]))):
            wrong.append(f"epoch {epoch}")
    if refused is not None and not wrong:
        raise refused
    return wrong
