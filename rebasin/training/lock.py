"""A folder that one process at a time may write to.

The lock is ``flock`` on a file in the folder. The kernel releases it when the process that holds it ends in
any way, so that no lock is ever left behind by a dead process. The file names the holder, for the message.
"""

import contextlib
import os
import pathlib
import socket
import sys
import time
import warnings
from collections.abc import Iterator

from rebasin.errors import RebasinError

try:
    import fcntl
except ImportError:  # Windows has no flock
    fcntl = None

__all__ = ["LOCK_FILE", "FolderInUseError", "locked"]

# The name of the file in a folder that is in use. It is deleted when the lock is released; a process that is
# killed leaves it behind, unlocked.
LOCK_FILE = "in_use.lock"


class FolderInUseError(RebasinError):
    """Another process is writing to a folder.

    Attributes:
      directory: the folder.
      holder: one line about the process, as it says itself.
    """

    def __init__(self, directory: pathlib.Path, holder: str) -> None:
        super().__init__(
            f"{directory} is in use by {holder}; wait until that ends, or stop it, or choose another folder"
        )
        self.directory, self.holder = directory, holder


@contextlib.contextmanager
def locked(directory: pathlib.Path) -> Iterator[None]:
    """Hold the lock of an existing folder for the body of a ``with`` statement.

    On one host no two processes ever hold the lock of a folder, nor do two threads of a process. On NFS the
    same is true between hosts as long as the server keeps locks, as NFS 4 always does; with the mount option
    ``nolock`` or ``local_lock`` it is true on each host by itself. Where the file system has no locks at all,
    a warning says so, and nothing is locked.

    Args:
      directory: the folder.

    Raises:
      FolderInUseError: another process holds the lock; the message names it.
      OSError: the lock's file cannot be made, for example because the folder is read-only.
    """
    path = directory / LOCK_FILE
    file = _acquire(path)
    try:
        yield
    finally:
        # Deleted while still locked: whoever opened the file meanwhile sees that it is no longer at its path.
        with contextlib.suppress(OSError):
            path.unlink()
        os.close(file)


def _acquire(path: pathlib.Path) -> int:
    """Open the lock's file, lock it and write the holder to it; return the descriptor."""
    while True:
        file = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            if not _lock(file, path):
                holder = os.pread(file, 1000, 0).decode(errors="replace").strip()
                raise FolderInUseError(path.parent, holder or "another process")
            if _is_at(file, path):
                os.ftruncate(file, 0)
                os.pwrite(file, _describe_process().encode(), 0)
                return file
        except BaseException:
            os.close(file)
            raise
        # The last holder deleted the file between our opening and our locking it.
        os.close(file)


def _lock(file: int, path: pathlib.Path) -> bool:
    """Lock an open file; return `False` if somebody else holds the lock."""
    if fcntl is None:
        warnings.warn(f"{path.parent} is not locked: this system has no file locks", stacklevel=5)
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        warnings.warn(
            f"{path.parent} is not locked, since its file system has no locks ({error.strerror}); let no two "
            "processes use it at once",
            stacklevel=5,
        )
    return True


def _is_at(file: int, path: pathlib.Path) -> bool:
    """Say whether an open file is still the one at a path."""
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _describe_process() -> str:
    """Return one line about this process."""
    program = pathlib.Path(sys.argv[0] or "python").name
    started = time.strftime("%Y-%m-%d %H:%M:%S")
    return f"process {os.getpid()} on {socket.gethostname()} ({program}, since {started})\n"
