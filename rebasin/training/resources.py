"""The memory and the disk space that training needs, against what is there."""

import pathlib
import shutil

import jax

from rebasin.errors import ConfigError

__all__ = ["available_memory", "check_disk", "check_memory", "format_bytes"]

# Weights, momentum and gradients are in memory at once. Activations and a copy for the checkpoint come on
# top.
_COPIES_IN_MEMORY = 3

# An epoch on disk holds weights and momentum.
_COPIES_ON_DISK = 2

# Limit and use of memory of a container, in versions 2 and 1 of Linux control groups.
_CONTROL_GROUPS = (
    ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory.current"),
    ("/sys/fs/cgroup/memory/memory.limit_in_bytes", "/sys/fs/cgroup/memory/memory.usage_in_bytes"),
)


def check_memory(size: int, what: str) -> None:
    """Raise `ConfigError` if a network is too large to be trained in the memory that is available.

    Args:
      size: size of the network's variables, in bytes.
      what: what to call the network in the message.
    """
    needed, available = _COPIES_IN_MEMORY * size, available_memory()
    if available is not None and needed > available:
        raise ConfigError(
            f"training {what} needs at least {format_bytes(needed)} of memory for weights, momentum and "
            f"gradients, and {format_bytes(available)} are available; choose a smaller width"
        )


def check_disk(size: int, num_epochs: int, directory: pathlib.Path, what: str, *, stored: int = 0) -> None:
    """Raise `ConfigError` if epochs that are to be stored do not fit on the disk.

    Args:
      size: size of the network's variables, in bytes.
      num_epochs: number of epochs that will be on disk at once.
      directory: where they will be stored; it need not exist yet.
      what: what to call the networks in the message.
      stored: number of bytes of them that are on disk already.
    """
    there = next(folder for folder in (directory, *directory.parents) if folder.exists())
    needed, free = _COPIES_ON_DISK * size * num_epochs - stored, shutil.disk_usage(there).free
    if needed > free:
        raise ConfigError(
            f"storing {what} in {directory} needs up to {format_bytes(needed)} of disk space ({num_epochs} "
            f"epochs with their momentum), and {format_bytes(free)} are free; keep fewer epochs, or choose "
            "another folder or a smaller width"
        )


def available_memory() -> int | None:
    """Return the bytes of memory that can still be had on the default device; `None` where that is not known.

    For the CPU that is what Linux says is available, swap included, or what the limit of a container leaves.
    """
    device = jax.devices()[0]
    if device.platform != "cpu":
        stats = device.memory_stats() or {}
        return stats["bytes_limit"] - stats.get("bytes_in_use", 0) if "bytes_limit" in stats else None
    try:
        lines = pathlib.Path("/proc/meminfo").read_text().splitlines()
    except OSError:  # not Linux
        return None
    table = {line.split(":")[0]: int(line.split()[1]) * 1024 for line in lines}
    return min([table["MemAvailable"] + table.get("SwapFree", 0), *_left_in_container()])


def _left_in_container() -> list[int]:
    """Return what the memory limit of this container leaves, or nothing where there is no limit."""
    left = []
    for names in _CONTROL_GROUPS:
        try:
            limit, used = (int(pathlib.Path(name).read_text()) for name in names)
        except (OSError, ValueError):  # no such control group, or the limit is "max"
            continue
        # Files that are cached count as used; half of the limit is a cautious guess of what they give back.
        left.append(max(limit - used, limit // 2))
    return left


def format_bytes(count: float) -> str:
    """Write a number of bytes with three digits and its unit.

    Examples:
      >>> format_bytes(999), format_bytes(61_000_000)
      ('999 B', '61 MB')
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB" if count < 999.5 else f"{count:.0f} TB"
