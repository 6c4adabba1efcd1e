"""How much memory a program may still take: what the device says, or the system and the limits of its control group."""

import re
from pathlib import Path

import jax

PROC = Path("/proc")
CGROUPS = Path("/sys/fs/cgroup")


def free_memory() -> int | None:
    """Bytes free on each device of this process; None = nobody says.

    The virtual devices of a CPU share its memory.
    """
    devices = jax.local_devices()
    stats = devices[0].memory_stats()
    if stats and "bytes_limit" in stats:
        return stats["bytes_limit"] - stats["bytes_in_use"]
    host = host_memory()
    return None if host is None or devices[0].platform != "cpu" else host // len(devices)


def host_memory(proc: Path = PROC, cgroups: Path = CGROUPS) -> int | None:
    """Bytes that a process may still take: MemAvailable of the system, or less if a control group limits it.

    None where there is no /proc.
    """
    try:
        found = re.search(r"^MemAvailable:\s*(\d+) kB", (proc / "meminfo").read_text(), re.MULTILINE)
        groups = (proc / "self" / "cgroup").read_text().splitlines()
    except OSError:
        return None
    free = [] if found is None else [1024 * int(found[1])]
    for line in groups:
        _, controllers, path = line.split(":", 2)
        if controllers == "":  # version 2
            free += _left(cgroups, path, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            free += _left(
                cgroups / "memory", path, "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"
            )
    return min(free, default=None)


def _left(root: Path, path: str, limit: str, usage: str, cache: str) -> list[int]:
    """What a control group and each one above it leave. Files in the cache count as free: the system drops them."""
    group, left = root / path.strip("/"), []
    for folder in (group, *group.parents):
        if not folder.is_relative_to(root):
            break
        try:
            most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
            dropped = re.search(rf"^{cache} (\d+)", (folder / "memory.stat").read_text(), re.MULTILINE)
        except OSError:  # the root of a tree has no limit; inside a container paths may be those outside
            continue
        if most != "max":
            left.append(max(0, int(most) - used + (int(dropped[1]) if dropped else 0)))
    return left
