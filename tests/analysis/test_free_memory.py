"""The memory that is free: of the system, and what control groups of both versions leave."""

import pytest

from jaxlm.analysis import free_memory
from jaxlm.analysis.free_memory import host_memory

MEMINFO = "MemTotal: 100 kB\nMemAvailable:    2000 kB\n"


@pytest.fixture
def system(tmp_path):
    """Writes files of /proc and /sys/fs/cgroup, and returns host_memory of them."""

    def write(groups, files):
        (tmp_path / "proc" / "self").mkdir(parents=True)
        (tmp_path / "proc" / "meminfo").write_text(MEMINFO)
        (tmp_path / "proc" / "self" / "cgroup").write_text(groups)
        for name, text in files.items():
            path = tmp_path / "cgroup" / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
        return host_memory(tmp_path / "proc", tmp_path / "cgroup")

    return write


def version2(folder, limit, used, cached):
    names = {"memory.max": limit, "memory.current": used, "memory.stat": f"anon 5\ninactive_file {cached}\n"}
    return {f"{folder}/{name}": str(text) for name, text in names.items()}


def test_without_a_limit_it_is_what_the_system_has(system):
    assert system("0::/a\n", version2("a", "max", 500, 3)) == 2_048_000


def test_the_tightest_group_counts_and_cached_files_are_free(system):
    files = version2("a/b", 1_000_000, 400_000, 100_000) | version2("a", 800_000, 600_000, 0)
    assert system("0::/a/b\n", files) == 200_000


def test_a_group_of_version_1(system):
    files = {
        "memory/a/memory.limit_in_bytes": "500000\n",
        "memory/a/memory.usage_in_bytes": "600000\n",
        "memory/a/memory.stat": "total_inactive_file 250000\n",
    }
    assert system("3:cpuset:/x\n9:memory:/a\n", files) == 150_000


def test_inside_a_container_paths_may_be_those_outside(system):
    files = version2(".", 900_000, 100_000, 0)
    assert system("0::/docker/1234\n", files) == 800_000


def test_without_proc_nobody_says(tmp_path):
    assert host_memory(tmp_path) is None


def test_virtual_devices_share_the_memory_and_a_gpu_says_its_own(monkeypatch):
    class Device:
        def __init__(self, platform, stats=None):
            self.platform, self.memory_stats = platform, lambda: stats

    monkeypatch.setattr(free_memory, "host_memory", lambda: 800)
    for devices, free in (
        ([Device("cpu")] * 8, 100),
        ([Device("gpu", {"bytes_limit": 70, "bytes_in_use": 20})], 50),
        ([Device("gpu")], None),
    ):
        monkeypatch.setattr(free_memory.jax, "local_devices", lambda devices=devices: devices)
        assert free_memory.free_memory() == free
