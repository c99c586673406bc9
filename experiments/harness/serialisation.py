"""Typed data as JSON and back; the only code that knows how ``results.json`` spells a dataclass."""

import dataclasses
import functools
import inspect
import math
import types
import typing
from collections.abc import Mapping
from typing import Any

from rebasin.errors import ConfigError

__all__ = ["field_types", "from_json", "to_json"]


def to_json(value: Any) -> Any:
    """Return dataclasses, named tuples and containers as JSON types alone.

    Floats keep seven digits; NaN and infinity, which JSON lacks, become null. Measurements go through this
    and `from_json` before they are summed up, so that a resumed run, which reads some of them from the file,
    ends with the same numbers.

    Examples:
      >>> to_json({30: (1 / 3, math.nan)})
      {'30': [0.3333333, None]}
    """
    if isinstance(value, float):
        return float(f"{value:.7g}") if math.isfinite(value) else None
    if dataclasses.is_dataclass(value):
        return {name: to_json(getattr(value, name)) for name in field_types(type(value))}
    if isinstance(value, Mapping):
        return {str(key): to_json(inner) for key, inner in value.items()}
    names = getattr(value, "_fields", None)
    if isinstance(value, tuple) and names is not None:
        return {name: to_json(inner) for name, inner in zip(names, value, strict=True)}
    if isinstance(value, list | tuple):
        return [to_json(inner) for inner in value]
    return value


def from_json(kind: Any, value: Any, where: str) -> Any:
    """Return a value of a declared type from its JSON form.

    Args:
      kind: a dataclass (with its type arguments where it is generic), a named tuple, a tuple, list or mapping
        of such, an optional, or a plain type.
      value: what `to_json` made of it. Null is read as NaN where a float is declared. A field that is missing
        takes its default.
      where: what to call the value in messages, for example the path of its file.

    Raises:
      ConfigError: naming the first value that does not fit, or a field that is missing or unknown.

    Examples:
      >>> from_json(Mapping[int, tuple[float, ...]], {"30": [0.5, None]}, "file")
      {30: (0.5, nan)}
      >>> from_json(Mapping[int, tuple[float, ...]], {"30": ["half"]}, "file")
      Traceback (most recent call last):
      rebasin.errors.ConfigError: file: 30.0: wanted float, got 'half'
    """
    try:
        return _read(kind, value)
    except _Misfit as problem:
        raise ConfigError(": ".join(filter(None, [where, ".".join(problem.path), problem.text]))) from None


class _Misfit(Exception):
    """A value that does not have its declared type, with the way to it from the outside in."""

    def __init__(self, text: str, *path: str) -> None:
        super().__init__(text)
        self.text, self.path = text, [*path]


def _read(kind: Any, value: Any) -> Any:
    origin, arguments = typing.get_origin(kind) or kind, typing.get_args(kind)
    if origin is Any:
        return value
    if origin in (typing.Union, types.UnionType):
        (inner,) = (argument for argument in arguments if argument is not types.NoneType)
        return None if value is None else _read(inner, value)
    if origin in (float, int, str, bool):
        return _read_plain(origin, value)
    if hasattr(origin, "_fields") or dataclasses.is_dataclass(origin):
        return _read_fields(origin, arguments, value)
    if issubclass(origin, Mapping):
        key_kind, inner = arguments
        entries = _expect(value, dict, "an object").items()
        return {_read_key(key_kind, key): _read_inside(key, inner, entry) for key, entry in entries}
    return origin(_read_entries(origin, arguments, _expect(value, list, "a list")))


def _read_plain(kind: type, value: Any) -> Any:
    if kind is float and value is None:
        return math.nan
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            raise _Misfit("wanted float, got an integer that is too large for one") from None
    # Not isinstance: True is an int as well.
    if type(value) is not kind:
        raise _Misfit(f"wanted {kind.__name__}, got {value!r}")
    return value


def _read_key(kind: type, key: str) -> Any:
    try:
        return kind(key)
    except ValueError:
        raise _Misfit(f"wanted {kind.__name__}, got {key!r}") from None


def _read_entries(origin: Any, arguments: tuple[Any, ...], entries: list[Any]) -> list[Any]:
    same = origin is list or arguments[-1] is ...
    kinds = [arguments[0]] * len(entries) if same else arguments
    if len(kinds) != len(entries):
        raise _Misfit(f"wanted {len(kinds)} entries, got {len(entries)}")
    return [_read_inside(f"{i}", k, entry) for i, (k, entry) in enumerate(zip(kinds, entries, strict=True))]


def _read_fields(origin: Any, arguments: tuple[Any, ...], value: Any) -> Any:
    entries, kinds = _expect(value, dict, "an object"), _resolved_types(origin, arguments)
    for name in entries:
        if name not in kinds:
            raise _Misfit(f"not known; {origin.__name__} has {', '.join(kinds)}", name)
    for name in _required(origin):
        if name not in entries:
            raise _Misfit("missing", name)
    return origin(**{name: _read_inside(name, kinds[name], entry) for name, entry in entries.items()})


def _read_inside(name: str, kind: Any, value: Any) -> Any:
    try:
        return _read(kind, value)
    except _Misfit as problem:
        problem.path.insert(0, name)
        raise


def _expect(value: Any, kind: type, name: str) -> Any:
    if not isinstance(value, kind):
        raise _Misfit(f"wanted {name}, got {value!r}")
    return value


@functools.cache
def _resolved_types(origin: Any, arguments: tuple[Any, ...]) -> dict[str, Any]:
    """Return the type of every field of a generic dataclass with these type arguments."""
    given = dict(zip(getattr(origin, "__parameters__", ()), arguments, strict=True))

    def resolve(kind: Any) -> Any:
        if kind in given:
            return given[kind]
        parameters = getattr(kind, "__parameters__", ())
        return kind[tuple(given[parameter] for parameter in parameters)] if parameters else kind

    return {name: resolve(kind) for name, kind in field_types(origin).items()}


@functools.cache
def field_types(kind: type) -> dict[str, Any]:
    """Return the declared type of every field of a dataclass or named tuple."""
    hints = typing.get_type_hints(kind)
    names = [f.name for f in dataclasses.fields(kind)] if dataclasses.is_dataclass(kind) else kind._fields
    return {name: hints[name] for name in names}


@functools.cache
def _required(kind: Any) -> tuple[str, ...]:
    """Return the fields that have no default."""
    parameters = inspect.signature(kind).parameters
    return tuple(name for name in field_types(kind) if parameters[name].default is inspect.Parameter.empty)
