"""Recovery of objects, at the node: what is lost is made again by its task, and that task's arguments by theirs.

A task's record stays as long as something may need it (lineage.py), so a replay is the same task
once more: same ID, same arguments, and one of its retries.  Its children have the same IDs as before:
those that are known are not run again (`_submitted_again`).  That holds only if the task does
what it did before.  A child that is another one under an old ID is a *divergence*: its old value may be
in somebody's hands, so the two are never mixed, and the parent fails, with the reason.

What cannot be made again, and then is an error that says so: what was put (no task returns it), results of
actors' methods (the state that they met has changed), of tasks with max_retries=0 or no retry left, and of
tasks whose lineage was given up (`lineage.MAX_REPLAYABLE`).

Left out: dropping large values on purpose instead of spilling them, where a replay would be cheaper than
the disk.  Nobody can know that it is.
"""

from __future__ import annotations

from collections import deque
from typing import Any

from minray import ids
from minray.exceptions import error_payload
from minray.lineage import GONE, ObjectEntry, Task, Template
from minray.messages import ArgumentLost, ObjectLost, Warn
from minray.node_tasks import NodeTasks
from minray.scheduler import Client
from minray.task_spec import ACTOR_METHOD, FAILED, FINISHED, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT


class NodeRecovery(NodeTasks):
    _wanted: deque[ObjectEntry]  # lost, and to be made again
    _rebuilding: bool

    def handle_object_lost(self, event: ObjectLost, now: float) -> None:
        lost = self._lose(event.object_id, event.data, event.reason, now)
        if event.request_id:
            self._answer(event.client, event.request_id, lost)

    def handle_argument_lost(self, event: ArgumentLost, now: float) -> None:
        worker = self.scheduler.workers[event.client]
        task = worker.in_flight.pop(event.task_id, None)
        self._lose(event.object_id, event.data, event.reason, now)
        if task is not None:
            self._handed_back(task)
        if not worker.in_flight:
            self.scheduler.finished_one(worker, now)

    def _lose(self, object_id: bytes, data: Any, reason: str, now: float) -> bool:
        entry = self.objects.get(object_id)
        if entry is None or (data is not None and entry.data != data):  # It has been freed, or is here again.
            return False
        named = entry.nested
        for inner in named:  # A replay may need what only this value still named.
            self.lineage.hold(inner)
        lost = self.lineage.lose(entry)
        if lost:
            self._event("object_lost", object_id, reason, now)
            self._let_wait_again(entry)
            if entry.refs > 0:
                self._want_again(entry)
        for inner in named:
            self.lineage.release(inner)
        return lost

    def _let_wait_again(self, entry: ObjectEntry) -> None:
        """Whoever has counted the object as ready, and not used it yet.  Losses are rare: this looks at everything."""
        waiting = list(entry.waiters or ())  # On a cluster: those that need it on this node.
        for task in self.lineage.tasks.values():
            if task.state <= PENDING_NODE_ASSIGNMENT and entry.object_id in task.spec.deps and not task.cancelled:
                if task in waiting:
                    continue
                if task.state == PENDING_NODE_ASSIGNMENT and task.spec.actor_id is None:
                    self.scheduler.take_out(task)
                task.state = PENDING_ARGS_AVAIL
                for _ in range(task.spec.deps.count(entry.object_id)):
                    task.missing += 1
                    self.lineage.wait_for(entry, task)
        asking: list[Client] = [self.driver, *self.scheduler.workers.values()]
        for client in asking:
            for request in client.requests.values():
                if entry.object_id in request.object_ids and request not in waiting:
                    request.remaining += 1
                    self.lineage.wait_for(entry, request)

    def _want_again(self, entry: ObjectEntry) -> None:
        """Make it again.  What that needs is wanted in turn: a queue, for chains may be long."""
        self._wanted.append(entry)
        if self._rebuilding:
            return
        self._rebuilding = True
        while self._wanted:
            self._rebuild(self._wanted.popleft())
        self._rebuilding = False

    def _rebuild(self, entry: ObjectEntry) -> None:
        if entry.data is not None:
            return
        object_id = entry.object_id
        task = entry.task
        if task is not None and task.template.options.streaming:
            task.stream.lost[object_id] = None  # A run in hand may be past it.
        is_running = task is not None and task.state < FINISHED
        if task is not None and is_running and not self._is_past(task, object_id):
            return  # It is on its way.
        refusal = self._why_not_again(task)
        if task is None or refusal:
            origin = f"made by {task.template.options.name}(), task {ids.short(task.spec.task_id)}" if task else "put"
            kind = "ObjectReconstructionFailedError" if task else "ObjectLostError"
            message = (
                f"object {ids.short(object_id)} ({origin}) was lost on node {self.label} and cannot be rebuilt: "
                f"{refusal}.\nIts history: minray story {ids.short(object_id)}"
            )
            self._event("object_not_rebuilt", object_id, refusal, self._now)
            error = error_payload(kind, message)
            self.lineage.seal(entry, (error, len(error), ()), GONE, self._now)
            return
        if is_running:  # Its turn comes when this run has ended.
            self._go_on_or_start_over(task)
            return
        task.retries_left -= task.retries_left > 0
        short = ids.short(object_id)
        self._event("task_replayed", task.spec.task_id, f"it is run again, to rebuild object {short}", self._now)
        self._note_attempt(task)
        task.state = PENDING_ARGS_AVAIL
        task.worker = None
        task.cancelled = False
        task.started_s = task.finished_s = 0.0
        task.result_bytes = 0
        self.lineage.hold_arguments_again(task)
        if not task.missing:
            self._task_ready(task)

    def _why_not_again(self, task: Task | None) -> str:
        """'' if a finished task can be replayed."""
        if task is None:
            return "put() leaves no task to replay"
        options = task.template.options
        if options.kind == ACTOR_METHOD:
            return "it is the result of an actor's method, and the actor's state has changed since"
        if not options.max_retries:
            return "its task was submitted with max_retries=0, so it must not run twice"
        if options.streaming and task.state == FAILED:
            return "the generator that yielded it has failed"
        if not task.retries_left:
            return f"its task has used up its max_retries={options.max_retries}"
        if task.state >= FINISHED and (task.spec.deps or task.spec.nested) and task.origins is None:
            return "what its task was given is not kept any more, since too many newer results have a lineage, too"
        return ""

    def _diverged(self, old: Task, template: Template, parent: Task | None) -> None:
        """What a second attempt submits under the ID of `old` is something else."""
        if parent is None or parent.error is not None or parent.state >= FINISHED:
            return  # (A call of an actor that is being replayed has long finished: see node_exact.py.)
        before, now = old.template.options.name, template.options.name
        became = "has other arguments now" if before == now else f"is one of {now}() now"
        name = parent.template.options.name
        parent.error = (
            f"{name}() did something else when it was run again: its child {ids.short(old.spec.task_id)}, a call of "
            f"{before}(), {became}"
        )
        self._event("replay_diverged", parent.spec.task_id, parent.error, self._now)
        self.wire.append(
            Warn(
                f"{parent.error}. What the first one returned may be in use, so the two are not mixed: {name}() fails. "
                "Let it depend on its arguments alone (random numbers: from a seed that it is given), or say "
                "max_retries=0."
            )
        )
