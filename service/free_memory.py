"""How much memory this process may still take: what the machine has left, and what its control groups allow.

A container's limit is the kernel's control group, not the machine's memory: who passes it is killed without a word.
"""

import os
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

V1_UNLIMITED = 1 << 60  # a version 1 group without a limit says a number near 2^63


def free_bytes(root: Path = Path("/")) -> int:
    """Bytes that can be taken without swapping or being killed. `root` is where /proc and /sys are."""
    return max(0, min([_machine_free(root), *_groups_free(root)]))


def _machine_free(root: Path) -> int:
    """Memory the kernel could give away now, the cache of files included, as that is given up first."""
    for line in _text(root / "proc/meminfo").splitlines():
        name, _, value = line.partition(":")
        if name == "MemAvailable":
            return int(value.split()[0]) * 1024
    return os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def _groups_free(root: Path) -> Iterator[int]:
    """What is left under the limit of each control group that this process is in, its ancestors included."""
    mount = root / "sys/fs/cgroup"
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            files = (mount, "memory.max", "memory.current", "inactive_file")
        elif "memory" in controllers.split(","):
            files = (mount / "memory", "memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
        else:
            continue
        # In a container the path may be the host's name of the group; its files are then at the mount itself.
        group = PurePosixPath(path.lstrip("/"))
        for folder in (group, *group.parents):
            yield from _group_free(files[0] / folder, *files[1:])


def _group_free(folder: Path, limit_name: str, usage_name: str, cache_name: str) -> Iterator[int]:
    limit, usage = _text(folder / limit_name).strip(), _text(folder / usage_name).strip()
    if not (limit.isdecimal() and usage.isdecimal()) or int(limit) >= V1_UNLIMITED:
        return  # no such group, or "max"
    counts = dict(line.split(maxsplit=1) for line in _text(folder / "memory.stat").splitlines())
    yield int(limit) - int(usage) + int(counts.get(cache_name, 0))


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii")
    except OSError:
        return ""
