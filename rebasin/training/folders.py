"""Folders that users name."""

import os
import pathlib

from rebasin.errors import ConfigError

__all__ = ["expand_home"]


def expand_home(path: str | os.PathLike[str]) -> pathlib.Path:
    """Return a path with ``~`` and ``~user`` replaced by home folders.

    Raises:
      ConfigError: there is no such home folder.

    Examples:
      >>> expand_home("runs/~a")
      PosixPath('runs/~a')
    """
    try:
        return pathlib.Path(path).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{os.fspath(path)!r}: no such home folder is known; write the path out, or ./{os.fspath(path)} "
            "for a folder of that name"
        ) from error
