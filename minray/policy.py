"""Placement policy: the choices that reasonable people make differently.

The scheduler knows what is possible (resources, idle workers, queues); the policy says
which of the possible things comes first.  It is asked once for a batch, never for a
task, so it may be slow and clear.  Write your own, pass it to
``minray.init(policy=...)``, and compare with ``minray timeline``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from minray.scheduler import Shape, WorkerRecord

PREFETCH_S = 0.1
"""How much work a worker should have in hand, so that it rides over a driver that holds the GIL (p99 33 ms)."""
MAX_PREFETCH = 1000
UNKNOWN_PREFETCH = 4


class Policy:
    """The default: serve queues in turn, reuse the warmest worker, prefetch 100 ms of work."""

    def order(self, shapes: Iterable[Shape]) -> list[Shape]:
        """In which order to serve queues that are not empty: those that ask for more first, so that
        many small tasks do not starve a large one."""
        return sorted(shapes, key=lambda shape: (-len(shape.resources), -sum(amount for _, amount in shape.resources)))

    def pick_worker(self, idle: dict[int, WorkerRecord]) -> WorkerRecord:
        """The last one that went idle: its caches, its modules and its code are warm."""
        return idle[next(reversed(idle))]

    def prefetch(self, mean_s: float | None) -> int:
        """How many tasks a worker may hold, with the one that runs, when they take `mean_s` each."""
        if mean_s is None:
            return UNKNOWN_PREFETCH
        return max(2, min(MAX_PREFETCH, int(PREFETCH_S / (mean_s + 1e-6))))
