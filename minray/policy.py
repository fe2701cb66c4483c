"""Placement policy: the choices that reasonable people make differently.

The scheduler knows what is possible (resources, idle workers, queues); the policy says
which of the possible things comes first.  On one node it is asked when queues are served, so once for many
tasks if there are many, and may be slow and clear.  Between nodes it is asked of single ones, too: `place_actor` of
each actor, `place` of each task whose arguments may have to be moved, and `keeps` of each that a node other than
the head has of its own, so that one should be quick.  Write your own, pass it to ``minray.init(policy=...)``, and
compare with ``minray timeline``.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from minray.scheduler import Shape, WorkerRecord

PREFETCH_S = 0.1
"""How much work a worker should have in hand, so that it rides over a driver that holds the GIL (p99 33 ms)."""
MAX_PREFETCH = 1000
UNKNOWN_PREFETCH = 4
NODE_PREFETCH_S = 0.25
"""How much work a node should have in hand: it gets more when its results come back, a network's latency later."""
UNKNOWN_TASK_S = 0.001
BANDWIDTH = 1e9  # bytes a second between nodes
KEEP_S = 1.0
"""A node keeps its own tasks as long as they would wait there no longer than this; the rest go to the head."""


class Site(NamedTuple):
    """A node where a task could run."""

    node_no: int
    waiting: int  # tasks that it has and that have not finished
    mean_s: float | None  # how long tasks of this kind took; None: nobody knows yet
    slots: int  # so many of them can run there at once
    missing_bytes: int  # arguments that would have to be moved there


class Policy:
    """The default: serve queues in turn, reuse the warmest worker, prefetch 100 ms of work; between nodes, keep what
    can run here soon, and give the rest to whoever would start it first."""

    def order(self, shapes: Iterable[Shape]) -> list[Shape]:
        """In which order to serve queues that are not empty: those that ask for more first, because small ones find
        room beside them; of those that ask for the same, the one with the oldest task.  Whatever it says, none waits
        for ever: see the scheduler's turns."""

        def place(shape: Shape) -> tuple[float, ...]:
            return (-len(shape.resources), -sum(amount for _, amount in shape.resources), shape.oldest_s())

        return sorted(shapes, key=place)

    def pick_worker(self, idle: dict[int, WorkerRecord]) -> WorkerRecord:
        """The last one that went idle: its caches, its modules and its code are warm."""
        return idle[next(reversed(idle))]

    def prefetch(self, mean_s: float | None) -> int:
        """How many tasks a worker may hold, with the one that runs, when they take `mean_s` each."""
        if mean_s is None:
            return UNKNOWN_PREFETCH
        return max(2, min(MAX_PREFETCH, int(PREFETCH_S / (mean_s + 1e-6))))

    # ------------------------------------------------------------ between nodes

    def keeps(self, waiting: int, mean_s: float | None, slots: int) -> bool:
        """Whether a node keeps one more task of its own, or hands it up to the head."""
        return waiting * (UNKNOWN_TASK_S if mean_s is None else mean_s) <= KEEP_S * slots

    def place(self, sites: list[Site]) -> Site:
        """Of a task whose arguments lie on several nodes: where it is likely to start first."""
        return min(sites, key=self.estimated_wait_s)

    def place_actor(self, sites: list[Site]) -> Site:
        """`waiting`: how many actors live there.  The fewest for its size."""
        return min(sites, key=lambda site: site.waiting / site.slots)

    def estimated_wait_s(self, site: Site) -> float:
        mean_s = UNKNOWN_TASK_S if site.mean_s is None else site.mean_s
        return max(0, site.waiting + 1 - site.slots) * mean_s / site.slots + site.missing_bytes / BANDWIDTH

    def node_depth(self, slots: int, mean_s: float | None) -> int:
        """How many tasks a node may have in hand before the rest wait at the head."""
        if mean_s is None:
            return UNKNOWN_PREFETCH * slots
        return slots * max(2, min(MAX_PREFETCH, int(NODE_PREFETCH_S / (mean_s + 1e-6))))

    def share(self, sites: list[tuple[Site, int]], count: int) -> list[tuple[int, int]]:
        """Divide `count` tasks that can run anywhere: (node_no, how many).  With each site: how many it has room for.

        The least loaded get most: all are filled to the same level of tasks a slot."""
        shares = []
        level = (count + sum(site.waiting for site, _ in sites)) / max(1, sum(site.slots for site, _ in sites))
        for site, room in sorted(sites, key=lambda pair: pair[0].waiting / pair[0].slots):
            part = min(count, room, max(1, round(level * site.slots) - site.waiting))
            if part > 0:
                shares.append((site.node_no, part))
                count -= part
        return shares
