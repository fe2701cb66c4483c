"""``ray._private.utils``: what this machine has."""

from __future__ import annotations

from minray import machine


def get_system_memory() -> int:
    """Bytes of memory that this process may use: the machine's, or its cgroup's."""
    return machine.total_memory_bytes()


def get_num_cpus() -> int:
    return int(machine.cpu_count())


__all__ = ["get_num_cpus", "get_system_memory"]
