"""A node of a cluster: a `Node` with neighbours.

One class on top of `Node`, in four chapters, from the ground up:

=====================  ===========================================================
cluster_objects.py     references, places of values, copies, what is lost with a node
cluster_tasks.py       tasks given to neighbours and taken from them
cluster_actors.py      actors that live on another node than their record
cluster_node.py        nodes join, report, fall silent and die (this file)
=====================  ===========================================================

A cluster is a star: the head (node 1, with the driver) knows all nodes, the others know the head.  Nothing here depends
on there being two levels, but for `up`.  On one machine `Node` alone runs: nothing of this costs it anything.

The contract with the shell goes on (see node.py):

7.  A TellNode is delivered in order and once, or NodeDied comes for that neighbour at both ends, and nothing after it.
8.  Each FetchObject is answered by ObjectArrived or FetchFailed, also when the source dies.  A shell that is asked
    for an object takes it with `fetch_for_driver` and says Unpinned (client 0) when it has sent it.
9.  The number of a node is never used again: one that comes back joins anew.
10. After Expelled, or the death of the head, the shell ends the workers and leaves.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, get_args

from minray import ids
from minray.cluster_actors import DistributedActors
from minray.cluster_messages import (
    HEAD, Expelled, FetchFailed, FromNode, LoadReported, NodeDied, NodeJoined, ObjectArrived,
)  # fmt: skip
from minray.cluster_objects import OF_OBJECT, Neighbour
from minray.lineage import ObjectEntry, Request, Task
from minray.messages import Command, KillWorker, TellNode, Ticked, Warn, WorkerDied
from minray.node import CHANGES_NO_QUEUE
from minray.node_tasks import amounts
from minray.policy import Policy
from minray.scheduler import Client, WorkerRecord
from minray.task_spec import UNIT

HEARTBEAT_S = 0.1
SILENT_NODE_S = 3.0
"""A node that says nothing for so long is declared dead, and is not heard any more if it was not."""

ROWS_A_NODE = 1 << 40
"""Rows of node n are numbered from n times this, so that all nodes can write into one GCS."""


class ClusterNode(DistributedActors):
    def __init__(
        self,
        resources: dict[str, int],
        store_bytes: int,
        spill_path: Callable[[bytes], str],
        policy: Policy | None = None,
        label: str = "head",
        session_id: bytes = b"\0" * 8,
        node_no: int = HEAD,
    ) -> None:
        super().__init__(resources, store_bytes, spill_path, policy, label, session_id)
        self.node_no = node_no
        self.up = 0 if node_no == HEAD else -HEAD
        self.neighbours = {}
        self.lineage.awaited_away = self._awaited_away
        self.lineage.away_let_go = self._let_go_away
        self._outgoing = {}
        self._available = []
        self._reports = []
        self._named = []
        self._unnamed = []
        self._fetches = {}
        self._fetches_made = 0
        self._staying = {}
        self._hungry = {}
        self._handed_up = []
        self._makers = {}
        self._came_back = {}
        self._replays = {}
        self._unsafe = {}
        self._forsaken = []
        self._runs_first = {}
        self._questions = {}
        self._questions_made = 0
        self._beat_at: float | None = None
        first = (node_no - HEAD) * ROWS_A_NODE
        self._tasks_made = self._events_made = self.actors._made = self.lineage._objects_made = first
        for event in (*get_args(FromNode), NodeJoined, NodeDied, ObjectArrived, FetchFailed):
            name = re.sub("(?<=.)([A-Z])", r"_\1", event.__name__).lower()
            self._handlers[event] = getattr(self, "handle_" + name)

    def handle(self, event: Any, now: float) -> list[Command]:
        """What has happened -> what shall be done.  `now`: seconds since the epoch."""
        self._now = now
        client = event.client
        if client < 0 and type(event) is not NodeJoined:
            neighbour = self.neighbours.get(client)
            if neighbour is None:  # The fence.
                self._fence(event, now)
                is_news = type(event) is NodeDied or type(event) is Expelled
                return [] if is_news else [TellNode(client, [Expelled(self.me)])]
            neighbour.heard_s = now
        elif client > 0 and client not in self.scheduler.workers and type(event) is not WorkerDied:
            self._fence(event, now)
            return []  # The fence.
        self._handlers[type(event)](event, now)
        self._settle()
        if self._pumps:
            self._send_calls(now)
        if self.scheduler.active or type(event) not in CHANGES_NO_QUEUE:
            if not self.up and self.neighbours:
                self._place_actors()
            if self.scheduler.active and self._hungry:
                self._share(only_idle=True)
            self.scheduler.dispatch(now)
            if self.scheduler.active and self._hungry:
                self._share(only_idle=False)
        self._settle()
        self._post()
        commands = self.wire[:]
        self.wire.clear()
        return commands

    def _settle(self) -> None:
        """What was found out while the event was handled, and had to wait until the tables were consistent."""
        while True:
            if self._available:
                available, self._available = self._available, []
                for entry in available:
                    self._wake(entry)
            elif self._forsaken:
                self._settle_orphans()
            elif self._handed_up:
                tasks, self._handed_up = self._handed_up, []
                self._give(self.neighbours[self.up], tasks)
            elif self._reports:
                reports, self._reports = self._reports, []
                for request, task, result in reports:
                    self._send(request, task, result)
            elif self._unnamed:
                names, self._unnamed = self._unnamed, []
                for object_id in names:
                    self.lineage.release(object_id)
            elif self._named:
                named, self._named = self._named, []
                for entry in named:
                    unheld = entry.refs <= 0 and not entry.pins and not entry.replays
                    if unheld and self.objects.get(entry.object_id) is entry:
                        self.lineage.free(entry)
            else:
                return

    def _send(self, request: Request, task: Task | None, result: Any) -> None:
        neighbour = self.neighbours.get(request.client)
        if neighbour is None:
            return
        if result is not None:
            self._tell_result(neighbour, result)
            return
        if request.request_id == OF_OBJECT:
            self._send_report(neighbour, request.object_ids[0])
        else:
            self._send_result(neighbour, request, task)

    def _client(self, client: int) -> Client:
        return self.neighbours[client] if client < 0 else super()._client(client)

    # ------------------------------------------------------------ nodes

    def handle_node_joined(self, event: NodeJoined, now: float) -> None:
        neighbour = self.neighbours[event.client] = Neighbour(event.client, event.label, dict(event.resources))
        neighbour.heard_s = now
        if not self.up:
            self._hungry[event.client] = neighbour
        if self._beat_at is None:
            self._beat_at = now + HEARTBEAT_S
        self._event("node_joined", b"", f"node {event.label} joined", now)

    def handle_node_died(self, event: NodeDied, now: float) -> None:
        self._node_gone(event.client, event.reason, now)

    def handle_expelled(self, event: Expelled, now: float) -> None:
        self._node_gone(event.client, "has declared this node dead", now)

    def _node_gone(self, client: int, reason: str, now: float) -> None:
        """A node has died: its tasks run again elsewhere, its actors live again, its objects are made again."""
        neighbour = self.neighbours.pop(client)
        self._outgoing.pop(client, None)
        self._hungry.pop(client, None)
        if client == self.up:
            # Without the head there is nobody to work for.
            for worker in self.scheduler.workers.values():
                self.wire.append(KillWorker(worker.client))
            self._beat_at = None
            return
        self._event("node_died", b"", f"node {neighbour.label} {reason}", now)
        struck_off = self._strike_off_node(neighbour)
        self._references_lost(neighbour)
        self._seats_lost(neighbour, reason, now)
        tasks = list(neighbour.in_flight.values())
        neighbour.in_flight.clear()
        for task in reversed(tasks):
            if task.spec.actor_id is not None:
                self._call_lost(task, neighbour, reason)
            else:
                self._task_lost(task, neighbour, reason)
        self._objects_lost(neighbour, struck_off, tasks, reason)

    def handle_load_reported(self, event: LoadReported, now: float) -> None:
        neighbour = self.neighbours[event.client]
        neighbour.own_tasks = event.own_tasks
        if not self.up:
            self._hungry[event.client] = neighbour

    @property
    def wake_at(self) -> float | None:
        soonest = self.scheduler.wake_at
        if self._beat_at is not None and (soonest is None or self._beat_at < soonest):
            return self._beat_at
        return soonest

    def handle_ticked(self, event: Ticked, now: float) -> None:
        super().handle_ticked(event, now)
        if self._beat_at is None or now < self._beat_at:
            return
        self._beat_at = now + HEARTBEAT_S
        if self.up:
            self._tell(self.up, LoadReported(self.me, self._own_tasks()))
            return
        for client, neighbour in list(self.neighbours.items()):
            if now >= neighbour.heard_s + SILENT_NODE_S:
                self._node_gone(client, f"was silent for {now - neighbour.heard_s:.1f} s", now)

    def _own_tasks(self) -> int:
        """How many tasks it has that nobody gave it."""
        waiting = sum(shape.waiting for shape in self.scheduler.active)
        in_hand = sum(len(worker.in_flight) for worker in self.scheduler.workers.values())
        return max(0, waiting + in_hand - sum(neighbour.owed for neighbour in self.neighbours.values()))

    def _warn_of_starvation(self, task: Task, now: float) -> None:
        shape = task.template.shape
        if self.scheduler.feasible(shape):
            if not self._feasible_nodes(shape):
                super()._warn_of_starvation(task, now)
        elif not self._feasible_nodes(shape):
            text = (
                f"{task.template.options.name} [task {ids.short(task.spec.task_id)}] needs {amounts(shape.resources)}, "
                "which no node has any more. It runs when a node that has it joins."
            )
            self._event("task_starved", task.spec.task_id, text, now)
            self.wire.append(Warn(text))

    def take_rows(self, now: float) -> dict[str, list[tuple[Any, ...]]]:
        """As of one node, without what others record: an actor's row is its home's, a task's its giver's."""
        if self.up:
            for actor in list(self.actors.dirty.values()):
                if self._is_guest(actor):
                    del self.actors.dirty[actor.no]
        return super().take_rows(now)

    def describe(self, what: str) -> Any:
        """As of one node; "resources" are those of all, and "nodes" tells them apart."""
        if what == "resources":
            total: dict[str, int] = dict(self.scheduler.total)
            for neighbour in self.neighbours.values():
                for name, amount in neighbour.total.items():
                    total[name] = total.get(name, 0) + amount
            return {name: amount / UNIT for name, amount in total.items()}
        return super().describe(what)

    # ------------------------------------------------------------ for tests

    def check(self, driver_refs: Mapping[bytes, int] | None = None) -> None:
        if driver_refs is not None:
            refs: Counter[bytes] = Counter(driver_refs)
            for task in self._replays.values():
                refs.update(task.spec.deps + task.spec.nested)
            refs.update(entry.object_id for entry in self._unsafe)
            driver_refs = refs
        super().check(driver_refs)

    def _other_nodes(self) -> Sequence[WorkerRecord]:
        return list(self.neighbours.values())

    def _missing(self, entries: Iterable[ObjectEntry]) -> tuple[int, int]:
        """Some need them here, others anywhere."""
        entries = list(entries)
        return sum(not self.is_available(entry) for entry in entries), super()._missing(entries)[1]
