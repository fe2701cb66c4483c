"""What this process may use of the machine: processors and memory.

Owns the answers to "how many CPUs" and "how much memory", as a scheduler needs them:
what *this process* was granted, not what the hardware has.  A container with two CPUs'
worth of quota on a 64-core host is a two-CPU machine; so is a process pinned by
`taskset`.  A quota of 1.5 CPUs counts as 2: idle fractions are cheaper than starved tasks.

It does not know what the numbers are for: the share of memory that becomes the object
store is object_store.py's choice.

Control groups nest, and a limit may stand on any level, so the smallest one from the
process's own group up to the root holds.  Inside a container, /proc/self/cgroup may name
the host's path, which is not there: the walk up then ends at the mount, which is the
container's own group.  Both generations (v1: one tree a controller; v2: one tree) are
read, since machines in transition mount both.

Every function takes the directory that stands for `/`, so tests build machines out of
files.  Left out: ulimits (they bind one process, the session has several), cpusets (the
affinity mask already shows them), and how much memory is free at the moment.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

SLASH = Path("/")


def cpu_count(root: Path = SLASH) -> int:
    """CPUs this process may keep busy: its affinity mask, capped by its cgroup quota; at least 1."""
    if hasattr(os, "sched_getaffinity"):
        count = len(os.sched_getaffinity(0))
    else:
        count = os.cpu_count() or 1
    for group in _groups(root, "cpu"):
        quota = _words(group / "cpu.max")  # v2: "150000 100000", or "max 100000"
        if not quota:
            quota = _words(group / "cpu.cfs_quota_us") + _words(group / "cpu.cfs_period_us")  # v1: -1 is none
        if len(quota) == 2 and all(word.isdigit() for word in quota) and int(quota[1]) > 0:
            count = min(count, math.ceil(int(quota[0]) / int(quota[1])))
    return max(1, count)


def total_memory_bytes(root: Path = SLASH) -> int:
    """Memory this process may use together with its container: physical, capped by its cgroup limits."""
    total = _meminfo(root).get("MemTotal") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return min([total, *_memory_limits(root)])


def _memory_limits(root: Path) -> Iterator[int]:
    for group in _groups(root, "memory"):
        limit = _words(group / "memory.max") or _words(group / "memory.limit_in_bytes")
        if limit and limit[0].isdigit():  # not "max"; v1's "none" is a number near 2**63, harmless in a min()
            yield int(limit[0])


def _groups(root: Path, controller: str) -> Iterator[Path]:
    """The directories of this process's control groups, innermost first, for one controller."""
    mounts = root / "sys/fs/cgroup"
    for line in _read(root / "proc/self/cgroup").splitlines():
        _, controllers, path = line.split(":", 2)
        if not controllers:
            bases = [mounts, mounts / "unified"]
        elif controller in controllers.split(","):
            bases = [mounts / controller, mounts / controllers]
        else:
            continue
        for base in bases:
            if base.is_dir():
                inner = base / path.strip("/")
                while inner != base:
                    yield inner
                    inner = inner.parent
                yield base
                break


def _meminfo(root: Path) -> dict[str, int]:
    """/proc/meminfo in bytes; empty where there is none."""
    rows = (line.split() for line in _read(root / "proc/meminfo").splitlines())
    return {row[0].rstrip(":"): int(row[1]) * 1024 for row in rows if len(row) > 1}


def _words(path: Path) -> list[str]:
    return _read(path).split()


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:  # Not there, or not ours to read: no limit that we could know of.
        return ""
