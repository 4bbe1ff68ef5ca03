"""Which cores a process may use: affinity, control groups of both versions, siblings."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pykernels.tune.cores import Usable, cpu_quota, spread, usable


def groups(tmp_path: Path, cgroup: str, mount: str, files: dict[str, str]) -> Path:
    """A /proc/self and a mounted hierarchy; `mount` is the line of mountinfo, MOUNT in it the place."""
    proc, place = tmp_path / "proc", tmp_path / "sys fs"
    proc.mkdir()
    (proc / "cgroup").write_text(cgroup)
    (proc / "mountinfo").write_text(mount.replace("MOUNT", str(place).replace(" ", "\\040")))
    for name, text in files.items():
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text(text)
    return proc


V2 = "31 23 0:28 / /tmp rw - tmpfs tmpfs rw\n41 31 0:38 / MOUNT rw,relatime shared:1 - cgroup2 cgroup2 rw\n"
V1 = "32 31 0:29 / MOUNT rw,relatime - cgroup cgroup rw,cpu,cpuacct\n"


def test_version_2_counts_the_least_of_a_group_and_those_above(tmp_path: Path) -> None:
    files = {"a/b/cpu.max": "max 100000\n", "a/cpu.max": "250000 100000\n", "cpu.max": "400000 100000\n"}
    assert cpu_quota(groups(tmp_path, "0::/a/b\n", V2, files)) == 2.5


def test_version_1_has_quota_and_period(tmp_path: Path) -> None:
    files = {
        "job/cpu.cfs_quota_us": "150000\n",
        "job/cpu.cfs_period_us": "100000\n",
        "cpu.cfs_quota_us": "-1\n",
        "cpu.cfs_period_us": "100000\n",
    }
    assert cpu_quota(groups(tmp_path, "4:memory:/other\n2:cpu,cpuacct:/job\n0::/\n", V1, files)) == 1.5


def test_a_container_sees_its_group_at_the_root_of_the_mount(tmp_path: Path) -> None:
    mount = "32 31 0:29 /docker/12ab MOUNT rw - cgroup cgroup rw,cpu\n"
    files = {"cpu.cfs_quota_us": "300000\n", "cpu.cfs_period_us": "100000\n"}
    assert cpu_quota(groups(tmp_path, "1:cpu:/docker/12ab\n", mount, files)) == 3.0


def test_a_group_outside_the_mount_counts_as_its_root(tmp_path: Path) -> None:
    mount = "41 31 0:38 /kube/pod MOUNT rw - cgroup2 cgroup2 rw\n"
    assert cpu_quota(groups(tmp_path, "0::/elsewhere\n", mount, {"cpu.max": "50000 100000\n"})) == 0.5


@pytest.mark.parametrize("content", ["max 100000", "", "garbage", "0 100000", "100000 0", "-1 100000"])
def test_no_limit_is_none(tmp_path: Path, content: str) -> None:
    assert cpu_quota(groups(tmp_path, "0::/\n", V2, {"cpu.max": content})) is None
    assert cpu_quota(tmp_path / "absent") is None


def test_a_part_of_a_processor_is_no_thread_but_there_is_always_one() -> None:
    cores = (0, 1, 2, 5)
    assert [Usable(cores, quota).count for quota in (None, 0.5, 1.5, 3.0, 64.0)] == [4, 1, 1, 3, 4]
    assert str(Usable(cores, 1.5)) == "1 (affinity 4, cgroup quota 1.5)"


def test_the_affinity_of_the_calling_thread_counts() -> None:
    assert usable().cores == tuple(sorted(os.sched_getaffinity(0)))


def cpus(tmp_path: Path, places: dict[int, tuple[int, int]]) -> Path:
    for core, (package, physical) in places.items():
        folder = tmp_path / f"cpu{core}" / "topology"
        folder.mkdir(parents=True)
        (folder / "physical_package_id").write_text(f"{package}\n")
        (folder / "core_id").write_text(f"{physical}\n")
    return tmp_path


def test_threads_get_physical_cores_of_their_own_while_there_are_enough(tmp_path: Path) -> None:
    # Two sockets of two cores; 4 to 7 are the second logical processors of 0 to 3.
    system = cpus(tmp_path, {core: (core % 4 // 2, core % 2) for core in range(8)})
    assert spread(range(8), 2, 2, system) == [(0, 1), (2, 3)]
    assert spread(range(8), 4, 2, system) == [(0, 4), (1, 5), (2, 6), (3, 7)]  # siblings serve one instance
    assert spread([1, 5, 3, 7], 1, 2, system) == [(1, 3)]
    with pytest.raises(ValueError, match="cores: 3 x 2 threads do not fit on 4"):
        spread([1, 5, 3, 7], 3, 2, system)


def test_without_a_topology_every_processor_is_a_core(tmp_path: Path) -> None:
    assert spread([7, 2, 4], 3, 1, tmp_path) == [(2,), (4,), (7,)]
