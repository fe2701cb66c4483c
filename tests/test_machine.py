"""Machines built out of files: what a process was granted, in both generations of control groups."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from minray import machine

GIB = 2**30


def build(root: Path, **files: str) -> Path:
    """A machine with 16 GiB, and these files (``__`` stands for ``/``)."""
    meminfo = f"MemTotal: {16 * 2**20} kB\nMemFree: 1 kB\nMemAvailable: {8 * 2**20} kB\nHugePages_Total: 0\n"
    for name, text in {"proc__meminfo": meminfo, **files}.items():
        path = root / name.replace("__", "/")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def eight_cpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(8)), raising=False)


def test_without_control_groups_affinity_and_meminfo_decide(tmp_path: Path) -> None:
    root = build(tmp_path)
    assert machine.cpu_count(root) == 8
    assert machine.total_memory_bytes(root) == 16 * GIB


def test_without_affinity_the_number_of_cpus_decides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert machine.cpu_count(build(tmp_path)) == 1


@pytest.mark.parametrize(
    ("quota", "cpus"),
    [("max 100000", 8), ("150000 100000", 2), ("1000 100000", 1), ("9900000 100000", 8), ("", 8), ("5", 8)],
)
def test_a_quota_of_version_two_rounds_up(tmp_path: Path, quota: str, cpus: int) -> None:
    root = build(tmp_path, proc__self__cgroup="0::/\n", **{"sys__fs__cgroup__cpu.max": quota})
    assert machine.cpu_count(root) == cpus


def test_a_quota_of_version_one_counts_and_minus_one_means_none(tmp_path: Path) -> None:
    files = {
        "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_period_us": "100000\n",
        "proc__self__cgroup": "3:cpu,cpuacct:/docker/f00\n",
    }
    quota = "sys__fs__cgroup__cpu,cpuacct__cpu.cfs_quota_us"
    assert machine.cpu_count(build(tmp_path, **files, **{quota: "300000\n"})) == 3
    assert machine.cpu_count(build(tmp_path, **files, **{quota: "-1\n"})) == 8


def test_the_smallest_limit_on_the_way_up_holds(tmp_path: Path) -> None:
    root = build(
        tmp_path,
        proc__self__cgroup="0::/outer/inner\n",
        **{
            "sys__fs__cgroup__outer__inner__memory.max": "max\n",
            "sys__fs__cgroup__outer__memory.max": f"{4 * GIB}\n",
            "sys__fs__cgroup__outer__cpu.max": "200000 100000\n",
        },
    )
    assert machine.cpu_count(root) == 2
    assert machine.total_memory_bytes(root) == 4 * GIB


def test_a_container_that_sees_the_hosts_path_finds_its_own_limit_at_the_mount(tmp_path: Path) -> None:
    root = build(
        tmp_path,
        proc__self__cgroup="4:memory:/docker/not-visible-here\n0::/\n",
        **{
            "sys__fs__cgroup__memory__memory.limit_in_bytes": f"{2 * GIB}\n",
        },
    )
    assert machine.total_memory_bytes(root) == 2 * GIB


def test_version_ones_huge_number_means_no_limit(tmp_path: Path) -> None:
    root = build(
        tmp_path,
        proc__self__cgroup="4:memory:/\n",
        **{"sys__fs__cgroup__memory__memory.limit_in_bytes": "9223372036854771712\n"},
    )
    assert machine.total_memory_bytes(root) == 16 * GIB


def test_this_machine_has_some_of_each() -> None:
    assert machine.cpu_count() >= 1
    assert machine.total_memory_bytes() > 0
