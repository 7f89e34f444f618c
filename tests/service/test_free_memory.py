"""Free memory as Linux tells it: the machine's own, and the limits of control groups of both versions."""

from pathlib import Path

import pytest

from service.free_memory import free_bytes

MIB = 2**20


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A machine with 1000 MiB available, and no groups."""
    write(tmp_path / "proc/meminfo", "MemTotal: 4096000 kB\nMemFree: 1 kB\nMemAvailable: 1024000 kB\n")
    return tmp_path


def write(path: Path, text: str | int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"{text}\n")


def limit_v2(folder: Path, limit: str | int, usage: int, cache: int) -> None:
    write(folder / "memory.max", limit)
    write(folder / "memory.current", usage)
    write(folder / "memory.stat", f"anon 5\ninactive_file {cache}\nactive_file 7")


def test_without_groups_the_machine_decides(root: Path) -> None:
    assert free_bytes(root) == 1000 * MIB


@pytest.mark.parametrize("group", ["/", "/system.slice/scaledown.service", "/not/mounted/here"])
def test_version_2(root: Path, group: str) -> None:
    write(root / "proc/self/cgroup", f"0::{group}")
    limit_v2(root / "sys/fs/cgroup", 600 * MIB, 200 * MIB, 50 * MIB)
    assert free_bytes(root) == 450 * MIB  # the cache of files is given up before anything is killed


def test_the_tightest_group_above_counts(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/pods/one")
    limit_v2(root / "sys/fs/cgroup/pods/one", "max", 10 * MIB, 0)
    limit_v2(root / "sys/fs/cgroup/pods", 300 * MIB, 100 * MIB, 0)
    limit_v2(root / "sys/fs/cgroup", 900 * MIB, 100 * MIB, 0)
    assert free_bytes(root) == 200 * MIB


@pytest.mark.parametrize(("limit", "free"), [(300 * MIB, 210 * MIB), (0x7FFFFFFFFFFFF000, 1000 * MIB)])
def test_version_1(root: Path, limit: int, free: int) -> None:
    write(root / "proc/self/cgroup", "12:cpu,cpuacct:/docker/ab\n7:memory:/docker/ab\n1:name=systemd:/docker/ab")
    folder = root / "sys/fs/cgroup/memory"
    write(folder / "memory.limit_in_bytes", limit)
    write(folder / "memory.usage_in_bytes", 100 * MIB)
    write(folder / "memory.stat", f"total_inactive_file {10 * MIB}")
    assert free_bytes(root) == free


def test_a_group_that_is_full_leaves_nothing(root: Path) -> None:
    write(root / "proc/self/cgroup", "0::/")
    limit_v2(root / "sys/fs/cgroup", 100 * MIB, 120 * MIB, 0)
    assert free_bytes(root) == 0


def test_this_machine_has_some() -> None:
    assert free_bytes() > MIB
