"""A node's decisions, all of them: events in, commands out.

`Node` joins the three pure parts: `lineage` (what exists and what keeps it),
`scheduler` (who runs what), `actor_table` (who lives).  It has one method for the world,
`handle`, and a `handle_<event>` for each word of messages.py, in the chapters node_objects.py to
node_workers.py (node_tables.py has their table of contents).  No clock, socket, thread,
random number or file is touched here; time comes in as an argument, in seconds.

The contract with the shell (raylet.py, or a simulator):

1. Events are handed in one at a time, in the order in which they came from each process.
2. The commands of one `handle` are carried out in order, before the next event of the
   process they are for.
3. A RunTasks is delivered once or its worker is reported dead.  What a worker says after its
   death was reported, or after it was told to end, is ignored here (the fence: what it ran has
   been given to others).
4. When `wake_at` is set, a Ticked comes at that time or soon after; for workers in `held` (HoldNext was
   carried out at once) it says what they execute.
5. `take_rows` is called now and then; its rows reach the GCS in order.
6. A WorkerDied comes for every worker, also for one that was told to end: until then its process may
   read and write shared memory, which is not used again before.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import islice
from typing import Any, get_args

from minray import ids
from minray.actor_table import ActorTable
from minray.lineage import Lineage, ObjectEntry, Task
from minray.messages import (
    DRIVER, Command, Event, FunctionExported, NodeQueried, ObjectPut, ReferencesChanged, TasksFinished, TemplateDefined,
    Unpinned, WorkerDied,
)  # fmt: skip
from minray.node_workers import NodeWorkers
from minray.placement import NODE_ID
from minray.policy import Policy
from minray.scheduler import Client, Scheduler, WorkerRecord
from minray.task_spec import (
    DEAD, FINISHED, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, RUNNING, SUBMITTED_TO_WORKER, UNIT, TaskSpec,
)  # fmt: skip

CHANGES_NO_QUEUE = frozenset((ReferencesChanged, Unpinned, ObjectPut, FunctionExported, TemplateDefined))
"""After these nothing can run that could not run before (unless an actor's calls were touched)."""


def named(task: Task) -> str:
    return f"{task.template.options.name} [{ids.short(task.spec.task_id)}]"


class Node(NodeWorkers):
    def __init__(
        self,
        resources: dict[str, int],
        store_bytes: int,
        spill_path: Callable[[bytes], str],
        policy: Policy | None = None,
        label: str = "head",
        session_id: bytes = b"\0" * 8,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.label = label
        self.session_id = session_id
        self.wire = []
        self._now = 0.0
        self.lineage = Lineage(
            store_bytes, self._arguments_ready, self._request_ready, self._delete_file, self._handle_dropped,
            self._want_again,
        )  # fmt: skip
        self.lineage.stream_opened = self._stream_opened
        self.lineage.reader_gone = self._reader_gone
        self.objects = self.lineage.objects
        self.scheduler = Scheduler(resources, policy or Policy(), self.wire, self._run)
        self.actors = ActorTable()
        self.driver = Client(DRIVER)
        self.functions = {}
        self.templates = []
        self._template_of = {}
        self._tasks_made = 0
        self._spill_path = spill_path
        self._files_made = 0
        self._grants = {}
        self._retired = []
        self._leaving = {}
        self._pumps = {}
        self._start_failures = 0
        self._start_failed_until = 0
        self._events_made = 0
        self.labels = {**(labels or {}), NODE_ID: ids.pack_id(session_id, 0, ids.NODE).hex()}
        self.groups = {}
        self._group_names = {}
        self._waiting = {}
        self._removed = {}
        self._groups_made = 0
        self._dirty_groups = {}
        self._wanted = deque()
        self._rebuilding = False
        self._dirty = []
        self._rows = {}
        self._stall = None
        self._refused = 0
        self.late_results = 0
        self._handlers: dict[type, Callable[[Any, float], None]] = {
            event: getattr(self, "handle_" + re.sub("(?<=.)([A-Z])", r"_\1", event.__name__).lower())
            for event in get_args(Event)
        }

    def handle(self, event: Event, now: float) -> list[Command]:
        """What has happened -> what shall be done.  `now`: seconds since the epoch."""
        self._now = now
        if event.client and event.client not in self.scheduler.workers and type(event) is not WorkerDied:
            self._fence(event, now)
            return []  # The fence.
        self._handlers[type(event)](event, now)
        if self._waiting:
            self._place_groups(now)
        if self._pumps:
            self._send_calls(now)
            self.scheduler.dispatch(now)
        elif type(event) not in CHANGES_NO_QUEUE:
            self.scheduler.dispatch(now)
        commands = self.wire[:]
        self.wire.clear()
        return commands

    def _fence(self, event: Event, now: float) -> None:
        """Nothing counts that comes from the dead, or from whoever was told to end: others have its tasks by now."""
        if type(event) is TasksFinished:
            for task_id, *_ in event.results:
                self._late_result(task_id, event.client, "had been given up")

    @property
    def wake_at(self) -> float | None:
        return self.scheduler.wake_at

    @property
    def held(self) -> list[int]:
        return [worker.client for worker in self.scheduler.workers.values() if worker.held_s]

    def start_workers(self, count: int) -> list[Command]:
        for _ in range(count):
            self.scheduler.start_worker()
        commands = self.wire[:]
        self.wire.clear()
        return commands

    def set_aside(self, size_bytes: int) -> None:
        """The first block of the memory is the shell's own."""
        block = self.lineage.arena.allocate(size_bytes)
        assert block is not None and not block.offset, "something else was there before"
        self._retired.append(block.offset)

    def could_start(self, spec: TaskSpec) -> bool:
        """Whether somebody may be idle who would run this at once.  A hint, read without the lock."""
        if spec.actor_id is None:
            template = self.driver.templates.get(spec.template_no) if self.scheduler.apart else None
            return self.scheduler.may_start(template.shape if template is not None else None)
        actor = self.actors.actors.get(spec.actor_id)
        return actor is not None and not actor.pending

    # ------------------------------------------------------------ what others may know

    def handle_node_queried(self, event: NodeQueried, now: float) -> None:
        self._answer(event.client, event.request_id, self.describe(event.what))

    def describe(self, what: str) -> Any:
        """Plain data about "resources", "available", "labels", "placement_groups", "workers", "actors" or "memory"."""
        scheduler, lineage = self.scheduler, self.lineage
        if what == "resources":
            return {name: amount / UNIT for name, amount in scheduler.total.items()}
        if what == "available":
            return {name: max(0, amount) / UNIT for name, amount in scheduler.available.items()}
        if what == "labels":
            return self.labels
        if what == "placement_groups":
            return self.describe_groups()
        if what == "workers":
            return [(w.client, w.pid, len(w.in_flight), w.blocked) for w in scheduler.workers.values()]
        if what == "actors":
            return [
                (a.actor_id, a.options.class_name, a.options.name, a.options.namespace, a.state, a.options.detached)
                for a in self.actors.actors.values()
            ]
        if what == "memory":
            return {
                "capacity": lineage.arena.capacity, "used": lineage.arena.used, "spilled": lineage.bytes_spilled,
                "objects": len(lineage.objects), "tasks": len(lineage.tasks),
            }  # fmt: skip
        raise ValueError(f"describe() does not know {what!r}")

    def take_rows(self, now: float) -> dict[str, list[tuple[Any, ...]]]:
        """Everything that changed since the last call, one row a thing however often it changed."""
        for worker in self.scheduler.workers.values():
            running = 1 if worker.actor is None else worker.actor.task.template.options.concurrency
            for task in islice(worker.in_flight.values(), running):
                if task.state == SUBMITTED_TO_WORKER:
                    task.state = RUNNING
                    task.started_s = task.started_s or max(worker.progressed_s, task.submitted_s)
                    self._mark(task)
        rows, self._rows = self._rows, {}
        if self._dirty:
            rows["tasks"] = [self._task_row(task) for task in self._dirty]
            self._dirty.clear()
        if self.actors.dirty:
            rows["actors"] = [actor.row() for actor in self.actors.dirty.values()]
            self.actors.dirty.clear()
        if self._dirty_groups:
            rows["placement_groups"] = [group.row() for group in self._dirty_groups.values()]
            self._dirty_groups.clear()
        new, updates = self.lineage.take_object_rows(now)
        if new:
            rows["objects"] = new
        if updates:
            rows["object_updates"] = updates
        return rows

    def _task_row(self, task: Task) -> tuple[Any, ...]:
        task.dirty = False
        spec, worker = task.spec, task.worker
        actor_no = None
        if spec.actor_id is not None or spec.actor is not None:
            actor = worker.actor if worker is not None else self.actors.actors.get(spec.actor_id or spec.task_id)
            actor_no = actor.no if actor is not None else None
        return (
            task.no, spec.task_id, task.parent_no, task.template.no, actor_no, task.state, max(0, task.attempt - 1),
            worker.client if worker is not None else None, int(task.submitted_s * 1e6),
            int(task.started_s * 1e6) or None, int(task.finished_s * 1e6) or None, spec.args,
            b"".join(spec.deps) or None, task.result_bytes, task.error,
        )  # fmt: skip

    # ------------------------------------------------------------ for tests

    def _other_nodes(self) -> Sequence[WorkerRecord]:
        return ()

    def _needed_by(self, task: Task) -> list[ObjectEntry]:
        return [self.objects[object_id] for object_id in task.spec.deps]

    def _missing(self, entries: Iterable[ObjectEntry]) -> tuple[int, int]:
        """How many of them a task has to wait for: at least, and at most."""
        count = sum(entry.data is None for entry in entries)
        return count, count

    def check(self, driver_refs: Mapping[bytes, int] | None = None) -> None:
        """Asserts what must hold between events; looks at everything.

        `driver_refs`: how often the driver holds which objects, to compare with what is counted for it."""
        scheduler, lineage = self.scheduler, self.lineage
        scheduler.check()
        refs: Counter[bytes] = Counter(driver_refs or ())
        pins: Counter[bytes] = Counter(self.driver.pins)
        for client in [*scheduler.workers.values(), *self._leaving.values(), *self._other_nodes()]:
            refs.update(client.held.keys())
            pins.update(client.pins)
        self._check_groups(refs)
        places: Counter[int] = Counter()  # by task number: in how many queues and hands it is
        for shape in scheduler.shapes.values():
            places.update(task.no for task in shape.queue if task.state == PENDING_NODE_ASSIGNMENT)
        for actor in self.actors.actors.values():
            for caller, queue in actor.queues.items():
                assert queue and all(task.caller == caller for task in queue)
                places.update(task.no for task in queue if task.state < FINISHED)
            if actor.recovery is not None:
                recovery = actor.recovery
                refs.update(recovery.held())
                places.update(task.no for task in recovery.again if task.state < FINISHED)
                assert 0 <= recovery.applied <= recovery.sent <= len(recovery.log)
                assert actor.state == DEAD or len(recovery.replaying) == recovery.sent - recovery.applied
            if actor.holds_arguments:
                refs.update(actor.task.spec.deps + actor.task.spec.nested)
            if actor.options.detached and actor.state != DEAD:
                refs[actor.actor_id] += 1
        for worker in [*scheduler.workers.values(), *self._other_nodes()]:
            for task in worker.in_flight.values():
                places[task.no] += 1
                assert task.worker is not None and task.worker.client == worker.client, "in two hands"
                assert task.state in (SUBMITTED_TO_WORKER, RUNNING), "in hand, not running"
        returns: Counter[int] = Counter(entry.task.no for entry in lineage.objects.values() if entry.task is not None)
        for task in lineage.tasks.values():
            live = task.state < FINISHED
            if task.template.options.streaming:
                refs.update(ids.item_id(task.spec.task_id, item) for item in task.stream.held())
            created = self.actors.actors.get(task.spec.task_id) if task.spec.actor is not None else None
            if created is None or created.task is not task:
                if live:
                    for object_id in (*task.spec.deps, *task.spec.nested):
                        refs[object_id] += 1
                in_queue = 0 if task.state == PENDING_ARGS_AVAIL and task.spec.actor_id is None else int(live)
                stands_in = places[task.no]
                assert stands_in == in_queue, f"{named(task)}, state {task.state}, stands in {stands_in} places"
                assert live or task.live_returns, f"{named(task)} has ended and is kept for nothing"
            if task.state == PENDING_ARGS_AVAIL:
                fewest, most = self._missing(self._needed_by(task))
                assert fewest <= task.missing <= most > 0, f"{named(task)} waits for {task.missing} objects, not {most}"
            found = returns[task.no]
            assert task.live_returns == found, f"{named(task)} has {task.live_returns} live returns, not {found}"
        lineage.check(refs, pins, exact=driver_refs is not None)
        blocks = {grant[1] for grant in self._grants.values() if grant[0] == "block"}
        blocks.update(entry.data for entry in lineage.in_arena.values())
        blocks.update(entry.data for entry in lineage.spilling.values())
        lost = [offset for offset in lineage.arena.blocks if offset not in blocks and offset not in self._retired]
        assert not lost and blocks <= lineage.arena.blocks.keys(), f"memory at {lost} is lost, or was given out twice"
        being_spilled = [v[0] for grant in self._grants.values() if grant[0] == "spill" for v in grant[1]]
        assert sorted(being_spilled) == sorted(lineage.spilling), "objects stay half spilled"
        asking: list[Client] = [self.driver, *scheduler.workers.values()]
        for asker in asking:
            for request in asker.requests.values():
                pending = sum(1 for object_id in request.object_ids if lineage.objects[object_id].data is None)
                pending += not request.object_ids  # A generator waits for room.
                assert 0 < request.remaining <= pending, f"request {request.request_id} should have been answered"
            if isinstance(asker, WorkerRecord):
                assert asker.blocked == sum(request.blocks for request in asker.requests.values())
