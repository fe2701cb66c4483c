"""What a node knows: the fields that all chapters of `Node` share, and how its history is noted.

`Node` is one class in nine chapters, each a file and a base class of the next, from the ground up:

======================  =========================================================
node_tables.py          the data, and notes for the GCS (this file)
node_objects.py         objects, references, waiting, memory
node_tasks.py           functions and tasks: come in, go out, end
node_recovery.py        lost objects are made again
node_streams.py         the items of generators
node_exact.py           an actor's state is made again
node_actors.py          actors and their calls
node_placement.py       placement groups, and tasks that may not run just anywhere
node_workers.py         workers start, die and get stuck
node.py                 `Node`: joins them, and is all that the world sees
======================  =========================================================

Only node_tasks.py looks ahead (calls of actors are tasks, and so is a replay); it lists what it needs of others.
"""

from __future__ import annotations

from abc import ABC
from collections.abc import Callable
from typing import Any

from minray import ids
from minray.actor_table import Actor, ActorTable
from minray.lineage import Lineage, ObjectEntry, Task, Template
from minray.messages import DRIVER, Command, GcsStalled, Reply
from minray.scheduler import Client, Scheduler, WorkerRecord
from minray.task_spec import FINISHED, TaskOptions


MAX_WAITING_EVENTS = 10_000
"""While the GCS cannot write, so many wait for it; of what happens then, the rest is left out of the history."""


class NodeTables(ABC):
    label: str  # of the node, in messages
    session_id: bytes
    wire: list[Command]  # commands of the event in hand
    _now: float  # of the event in hand
    lineage: Lineage
    objects: dict[bytes, ObjectEntry]  # the lineage's
    scheduler: Scheduler
    actors: ActorTable
    driver: Client
    functions: dict[bytes, tuple[int, bytes]]  # number and pickle, by ID
    templates: list[Template]  # by number
    _template_of: dict[TaskOptions, Template]
    _tasks_made: int
    _spill_path: Callable[[bytes], str]
    _files_made: int
    _grants: dict[tuple[int, bytes], tuple[Any, ...]]  # room given for objects not yet there: the answers
    _retired: list[int]  # blocks that are no object's, ever: the shell's own; where the arena has no memory behind it
    _leaving: dict[int, WorkerRecord]  # forgotten, but their processes may still touch the arena
    _pumps: dict[bytes, Actor]  # actors that may have calls to send
    _start_failures: int  # in a row, each of a worker that was started after the one before had failed
    _start_failed_until: int  # the last worker that had been started when the last of these failed
    _events_made: int
    _dirty: list[Task]  # whose rows have changed
    _rows: dict[str, list[tuple[Any, ...]]]  # other rows to record, by table
    _stall: GcsStalled | None  # why nothing new is taken in
    _refused: int  # how much was not, since then
    late_results: int  # of tasks that others had been given, or that had ended: discarded

    def _client(self, client: int) -> Client:
        return self.driver if client == DRIVER else self.scheduler.workers[client]

    def _answer(self, client: int, request_id: int, answer: Any) -> None:
        self.wire.append(Reply(client, request_id, answer))

    def _row(self, table: str, row: tuple[Any, ...]) -> None:
        self._rows.setdefault(table, []).append(row)

    def _event(self, kind: str, subject: bytes, message: str, now: float) -> None:
        if self._stall is not None and len(self._rows.get("events", ())) >= MAX_WAITING_EVENTS:
            return
        self._events_made += 1
        self._row("events", (self._events_made, int(now * 1e6), kind, subject.hex(), message))

    def _late_result(self, task_id: bytes, client: int, why: str) -> None:
        self.late_results += 1
        who = f"worker {client}" if client > 0 else f"node {-client}"
        text = f"{who} {why}; its result was discarded ({self.late_results:,} so far)"
        self._event("late_result", task_id, text, self._now)

    def _mark(self, task: Task) -> None:
        """Its row has changed."""
        if not task.dirty:
            task.dirty = True
            self._dirty.append(task)

    def _retried(self, task: Task, how: str) -> None:
        limit = task.template.options.max_retries
        attempts = f"{task.attempt} of {limit + 1}" if limit >= 0 else str(task.attempt)
        self._note_attempt(task)
        self._event("task_retried", task.spec.task_id, f"attempt {attempts} {how}; it is run again", self._now)

    def _note_attempt(self, task: Task) -> None:
        """The task will run again, and its row tells only of the last attempt: this one becomes part of the history."""
        self._mark(task)
        if task.started_s and task.worker is not None:
            number = task.attempt
            text = f"attempt {number} began to run on {self._where_it_ran(task.worker)}"
            self._event("attempt_started", task.spec.task_id, text, task.started_s)
            if task.state == FINISHED:
                self._event("attempt_finished", task.spec.task_id, f"attempt {number} finished", task.finished_s)

    def _where_it_ran(self, worker: WorkerRecord) -> str:
        return f"worker-{worker.client} (pid {worker.pid})"

    def _where_to_look(self, worker: WorkerRecord, reason: str) -> str:
        """For whoever asks why the worker has ended: a line of an error message."""
        hint = "SIGKILL often means that the machine ran out of memory. " if "SIGKILL" in reason else ""
        return f"{hint}The worker's output is in {self._its_log(worker)}\n"

    def _its_log(self, worker: WorkerRecord) -> str:
        return f"<session>/logs/worker-{worker.client}.log"

    def worker_id(self, client: int) -> bytes:
        return ids.pack_id(self.session_id, client, ids.WORKER)

    def _worker_row(self, worker: WorkerRecord, state: int, now: float, reason: str | None) -> tuple[Any, ...]:
        died_us = int(now * 1e6) if state == 2 else None
        actor_no = worker.actor.no if worker.actor is not None else None
        return (
            worker.client, self.worker_id(worker.client), worker.pid, state, int(worker.started_s * 1e6), died_us,
            reason, actor_no,
        )  # fmt: skip
