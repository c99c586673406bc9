"""Files that are written whole or not at all, and what went wrong with a file as one sentence."""

import contextlib
import errno
import os
import pathlib

__all__ = ["explain", "write_whole"]

# What to do about an error of the system; for all others its own text must do.
_FULL = "free some space there, or choose another folder"
_ADVICE = {
    errno.ENOSPC: _FULL,
    errno.EDQUOT: _FULL,
    errno.EFBIG: _FULL,
    errno.EACCES: "choose a folder that you may write to",
    errno.EPERM: "choose a folder that you may write to",
    errno.EROFS: "choose a folder that you may write to",
    errno.EEXIST: "it is not a folder; choose another name",
    errno.ENOTDIR: "a part of its path is not a folder; choose another name",
    errno.EISDIR: "it is a folder where a file should be; move it away",
    errno.ENAMETOOLONG: "choose a shorter name",
    errno.ELOOP: "it is a link to itself; delete it",
    errno.EMFILE: "raise the limit of open files (ulimit -n)",
}


def write_whole(path: pathlib.Path, content: bytes) -> None:
    """Write a file beside its place and rename it, so that at any moment there is the old or the new one.

    Args:
      path: the file; its folder must exist.
      content: all of its bytes.
    """
    partial = path.with_name(f"{path.name}.partial")
    try:
        with partial.open("wb") as file:
            file.write(content)
            file.flush()
            # Without this a crash of the machine could leave the new name on a file without content.
            os.fsync(file.fileno())
        partial.replace(path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            partial.unlink()
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


def explain(error: OSError) -> str:
    """Return one sentence about an error of the system: the file, what is wrong, and what to do.

    Examples:
      >>> explain(OSError(errno.ENOSPC, "No space left on device", "out/results.json"))
      'out/results.json: No space left on device; free some space there, or choose another folder'
    """
    where = f"{os.fspath(error.filename)}: " if error.filename is not None else ""
    advice = _ADVICE.get(error.errno or 0)
    return f"{where}{error.strerror or error}" + (f"; {advice}" if advice else "")
