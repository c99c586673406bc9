"""What the values of flags stand for: a function by its name, inputs by their shapes, data from files."""

import importlib
import os
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from rebasin.align import as_function
from rebasin.batches import Batch
from rebasin.errors import ConfigError, DataError

__all__ = ["load_data", "load_function", "load_object", "make_inputs"]

_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<shape>[\d, ]*)\](<(?P<limit>\d+))?")


def load_object(name: str, *, flag: str) -> Any:
    """Return what ``package.module:name`` names; modules are also looked for in the current folder.

    Args:
      name: the module and the name in it, which may have dots.
      flag: the flag that messages name.

    Raises:
      ConfigError: there is no such module, or nothing of that name in it.
    """
    module, colon, attribute = name.partition(":")
    if not (module and colon and attribute):
        raise ConfigError(f"--{flag}: wanted package.module:name, got {name!r}")
    if os.getcwd() not in sys.path:  # a console script does not look there, `python -m` does
        sys.path.insert(0, os.getcwd())
    try:
        found = importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            raise ConfigError(f"--{flag}: {module} imports {error.name}, which is not installed") from error
        raise ConfigError(
            f"--{flag}: there is no module {module}, neither installed nor in {os.getcwd()}"
        ) from None
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise ConfigError(f"--{flag}: {found.__name__} has nothing called {part!r}")
        found = getattr(found, part)
    return found


def load_function(name: str, *, flag: str) -> Callable[..., Any]:
    """Return the function ``apply_fn(params, *inputs)`` that ``package.module:name`` names.

    A Flax module or a Haiku transform stands for its ``apply``.

    Raises:
      ConfigError: the name leads to nothing, or to something that cannot be called.
    """
    found = load_object(name, flag=flag)
    function = as_function(found)
    if not callable(function):
        raise ConfigError(f"--{flag}: {name} is a {type(found).__name__} and cannot be called")
    return function


def make_inputs(texts: Sequence[str], *, seed: int = 0) -> tuple[Any, ...]:
    """Return example inputs: arrays from files, or random ones of a shape.

    Args:
      texts: for each input the path of a ``.npy`` file, or a dtype with a shape, such as
        ``float32[8,28,28,1]`` (normally distributed) or ``int32[2,16]<50257`` (integers from 0 to below the
        limit, which is 2 where none is given).
      seed: seed of random inputs.

    Raises:
      ConfigError: a text is neither.
      DataError: a file cannot be read.

    Examples:
      >>> [x.shape for x in make_inputs(["float32[8,4]", "int32[2,16]<100"])]
      [(8, 4), (2, 16)]
    """
    keys = jax.random.split(jax.random.key(seed), max(1, len(texts)))
    return tuple(_make_input(text, key) for text, key in zip(texts, keys, strict=False))


def _make_input(text: str, key: jax.Array) -> Any:
    if text.endswith(".npy"):
        return _load(text)
    found = _ARRAY.fullmatch(text.strip())
    try:
        if found is None:
            raise TypeError
        dtype = jax.numpy.dtype(found["dtype"])
        shape = tuple(int(size) for size in found["shape"].split(",") if size.strip())
    except (TypeError, ValueError):
        raise ConfigError(
            "--inputs: wanted a .npy file, or a dtype and shape such as float32[8,784] or int32[2,16]<50257, "
            f"got {text!r}"
        ) from None
    if jax.numpy.issubdtype(dtype, jax.numpy.floating):
        return jax.random.normal(key, shape, dtype)
    if not jax.numpy.issubdtype(dtype, jax.numpy.integer):
        raise ConfigError(f"--inputs: {text!r} is neither floating nor integer; give a .npy file instead")
    return jax.random.randint(key, shape, 0, int(found["limit"] or 2), dtype)


def load_data(path: str) -> Batch:
    """Return the data of an ``.npz`` file with the arrays ``inputs`` and, if there are, ``labels``.

    Several inputs of a network are ``inputs_0``, ``inputs_1`` and so on.

    Raises:
      DataError: the file is missing, or lacks these arrays.
    """
    content = _load(path)
    if not isinstance(content, np.lib.npyio.NpzFile):
        raise DataError(f"{path}: wanted an .npz file with the arrays inputs and labels")
    with content as file:
        names = set(file.files)
        several = sorted((n for n in names if re.fullmatch(r"inputs_\d+", n)), key=lambda n: int(n[7:]))
        if ("inputs" in names) == bool(several) or not names <= {"inputs", "labels", *several}:
            raise DataError(f"{path}: wanted the arrays inputs and labels, got {', '.join(sorted(names))}")
        inputs = tuple(file[name] for name in several) if several else file["inputs"]
        return Batch(inputs, file["labels"] if "labels" in names else None)


def _load(path: str) -> Any:
    try:
        return np.load(pathlib.Path(path), allow_pickle=False)
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror or error}") from None
    except ValueError as error:
        raise DataError(f"{path} cannot be read: {error}") from None
