"""Exact recovery of actors, at the node: the last checkpoint, then the calls since, in the order in which they ran.

An actor asks for it (``checkpoint_every``, ``checkpoint_interval_s``); the others pay nothing.  The worker saves
the state and says so behind the results that are in it; the node keeps that object, and the `log` of
the calls answered since (actor_table.Recovery).  When the worker dies, a new one gets::

    the checkpoint, or the constructor's arguments if there is none yet
    the log: copies of the calls; what they return is dropped, for it has been given to their callers
    the calls that the old one had in hand: not answered, so not in the log
    what waits in the queues

What makes a replay harmless: what a logged call has submitted is held until a checkpoint covers the call, so
that, submitted again under the same ID, it is there and is not run twice; arguments are held likewise; and
what the dead instance held is held until the new one has caught up.

A call that a caller's second attempt submits again is not executed a second time: its result is there,
or is an error that says so (`Recovery.executed`).

The log is bounded: by the user's options, or else by checkpoint.MAX_CALLS and MAX_BYTES.  A checkpoint that finds no
room makes it longer, up to MAX_LOGGED; then the actor goes on without recovery, and the user is told.

Left out: executing other callers' calls out of order while the first waits for a lost argument: what a call
does may depend on all before it.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable
from typing import Any

from minray import ids
from minray.actor_table import MAX_IN_FLIGHT, Actor, Recovery
from minray.lineage import Task, Template
from minray.messages import CheckpointFailed, CheckpointTaken, TasksSubmitted, Warn
from minray.node_streams import NodeStreams
from minray.scheduler import Client, WorkerRecord
from minray.task_spec import ACTOR_EXITED, ALIVE, CANCELLED, FINISHED, OK, RETRYABLE_ERROR, TaskSpec

MAX_FRUITLESS = 10
"""An instance after the other dies before it has executed one new call: then the actor is given up."""
MAX_LOGGED = 300_000
"""A log that no checkpoint has shortened for so many calls is given up."""
NOBODY = -1
"""In place of a client: nobody waits for what a replay returns."""


class NodeExact(NodeStreams):
    # ------------------------------------------------------------ the log

    def _note_executed(self, worker: WorkerRecord, actor: Actor, recovery: Recovery, results: list[Any]) -> list[Any]:
        """Results that go on to their callers, now that the log has them; those of replays do not."""
        new = []
        for result in results:
            task_id, status, payload = result[:3]
            if recovery.replaying.pop(task_id, None) is not None:
                task = worker.in_flight.pop(task_id)
                self._check_replay(actor, recovery, status)
                recovery.applied += 1
                self._drop_result(worker, task, status, payload)
                if status == ACTOR_EXITED:
                    self._bury(actor, payload[1], self._now)
                elif recovery.applied == len(recovery.log):
                    self._caught_up(actor, recovery)
                continue
            new.append(result)
            called = worker.in_flight.get(task_id)
            # A call is cancelled before it begins or not at all.
            if called is not None and called is not actor.task and status not in (CANCELLED, ACTOR_EXITED):
                self._hold_all(called.spec.deps + called.spec.nested)
                if called.raised:
                    recovery.raised[recovery.covered + len(recovery.log)] = called.raised
                recovery.log.append(called)
                recovery.applied += 1
                recovery.sent += 1
                recovery.fruitless = 0
                recovery.note_executed(task_id)
        return new

    def _hold_all(self, object_ids: Iterable[bytes]) -> None:
        for object_id in object_ids:
            self.lineage.hold(object_id)

    def _release_all(self, object_ids: Iterable[bytes]) -> None:
        for object_id in object_ids:
            self.lineage.release(object_id)

    def _drop_result(self, worker: WorkerRecord, task: Task, status: int, payload: Any) -> None:
        for index in range(task.template.options.num_returns):
            return_id = ids.return_id(task.spec.task_id, index)
            if status == OK and type(payload) is not bytes:
                self._grants.pop((worker.client, return_id), None)
                self.lineage.drop_value(payload[index])
            else:
                self._revoke(worker.client, return_id, self._now)

    def _caught_up(self, actor: Actor, recovery: Recovery) -> None:
        """The new instance is where the old one was, and holds by now what its state refers to."""
        inherited, recovery.inherited = recovery.inherited, []
        self._release_all(inherited)
        if actor.unrecoverable:
            self._end_recovery(actor, recovery)
            actor.recovery = None

    # ------------------------------------------------------------ what calls submit

    def _without_known_children(self, recovery: Recovery, event: TasksSubmitted, client: Client) -> list[TaskSpec]:
        """Without what a replay submits again and of which there is no record to find it by: it returned nothing."""
        children = recovery.children.get(event.parent_task_id)
        if children is None:
            return event.specs
        tasks = self.lineage.tasks
        for spec in event.specs:
            known = tasks.get(spec.task_id)
            if known is not None and event.parent_task_id in recovery.replaying:
                if self.is_another(known, spec, client.templates[spec.template_no]) and client.actor is not None:
                    self._replay_diverged(client.actor, recovery, f"a call of {known.template.options.name}() changed")
        return [spec for spec in event.specs if spec.task_id not in children or spec.task_id in tasks]

    def _keep_children(
        self, recovery: Recovery, parent_id: bytes, specs: list[TaskSpec], templates: dict[int, Template]
    ) -> None:
        children = recovery.children.setdefault(parent_id, {})
        for spec in specs:
            if spec.task_id not in children:
                template = templates[spec.template_no]
                returns = [ids.return_id(spec.task_id, index) for index in range(template.num_kept)]
                children[spec.task_id] = returns
                self._hold_all(returns)
                child = self.lineage.tasks.get(spec.task_id)
                if child is not None and template.options.streaming:
                    child.stream.kept = returns

    def _forget_children_of(self, recovery: Recovery, call_id: bytes) -> None:
        for child_id, returns in recovery.children.pop(call_id, {}).items():
            self._keep_no_more_items(child_id)
            self._release_all(returns)

    def _keep_no_more_items(self, child_id: bytes) -> None:
        child = self.lineage.tasks.get(child_id)
        if child is not None and child.template.options.streaming:
            child.stream.kept = None

    # ------------------------------------------------------------ checkpoints

    def handle_checkpoint_taken(self, event: CheckpointTaken, now: float) -> None:
        worker = self.scheduler.workers[event.client]
        actor = worker.actor
        self._grants.pop((event.client, event.object_id), None)
        if actor is None or actor.recovery is None or actor.unrecoverable:
            self.lineage.drop_value(event.value)
            return
        self.lineage.put(event.object_id, event.value, now)
        self._now_starts_from(actor, actor.recovery, event.object_id, event.whole, actor.recovery.applied)

    def _now_starts_from(
        self, actor: Actor, recovery: Recovery, checkpoint: bytes, whole: bool, num_covered: int
    ) -> None:
        """The checkpoint is there, and held: what it covers of the log need not be executed again."""
        older, recovery.checkpoint = recovery.checkpoint, checkpoint
        if older is not None:
            self.lineage.release(older)
        recovery.num_checkpoints = ids.checkpoint_number(checkpoint)  # Those before it may have come to nothing.
        recovery.fruitless = 0
        recovery.warned = False
        recovery.covered += num_covered
        if recovery.raised:
            recovery.raised = {number: n for number, n in recovery.raised.items() if number >= recovery.covered}
        covered = recovery.log[:num_covered]
        del recovery.log[:num_covered]
        recovery.sent -= num_covered
        recovery.applied -= num_covered
        staying = {call.spec.task_id for call in recovery.log}
        if not whole:
            staying.add(actor.actor_id)
        for call_id in list(recovery.children):
            parent = self.lineage.tasks.get(call_id)
            running = parent is not None and parent.state < FINISHED
            if call_id not in staying and not running:
                self._forget_children_of(recovery, call_id)
        for call in covered:
            self._release_all(call.spec.deps + call.spec.nested)
        if not recovery.log:
            self._caught_up(actor, recovery)
        self.actors.dirty[actor.no] = actor

    def handle_checkpoint_failed(self, event: CheckpointFailed, now: float) -> None:
        self._revoke(event.client, event.object_id, now)
        actor = self.scheduler.workers[event.client].actor
        if actor is not None and actor.recovery is not None:
            self._not_saved(actor, actor.recovery, event.reason, event.for_good)

    def _not_saved(self, actor: Actor, recovery: Recovery, reason: str, for_good: bool) -> None:
        now = self._now
        if not for_good and len(recovery.log) >= MAX_LOGGED:
            for_good = True
            reason = f"{reason}\nIt would have to be made from {len(recovery.log):,} calls by now"
        if not for_good:
            if not recovery.warned:
                recovery.warned = True
                self._event("checkpoint_failed", actor.actor_id, reason.splitlines()[0], now)
                self.wire.append(
                    Warn(
                        f"{actor} could not save its state: {reason}\nThe checkpoint before, and the calls since, "
                        f"are kept ({len(recovery.log):,} by now); it is tried again after the next calls."
                    )
                )
            return
        actor.unrecoverable = reason.splitlines()[0].rstrip(".")
        actor.restarts_left = 0  # A constructor alone would silently make another state than was asked for.
        self._event("checkpoint_failed", actor.actor_id, actor.unrecoverable, now)
        self.wire.append(
            Warn(
                f"{actor} has no exact recovery any more. CheckpointError: {reason}\nThe actor goes on; should "
                "its worker die, it will not be made again."
            )
        )
        if recovery.applied == len(recovery.log):
            self._caught_up(actor, recovery)
        self.actors.dirty[actor.no] = actor

    def _end_recovery(self, actor: Actor, recovery: Recovery) -> None:
        """It will not be made again: nothing is kept for that."""
        self._stop_replay(recovery, actor.worker)
        held = list(recovery.held())
        for children in recovery.children.values():
            for child_id in children:
                self._keep_no_more_items(child_id)
        recovery.checkpoint = None
        recovery.log, recovery.children, recovery.inherited, recovery.raised = [], {}, [], {}
        recovery.applied = recovery.sent = 0
        self._release_all(held)
        while recovery.again:
            task = recovery.again.pop()
            actor.queues.setdefault(task.caller, deque()).appendleft(task)

    # ------------------------------------------------------------ the replay

    def _stop_replay(self, recovery: Recovery, worker: WorkerRecord | None) -> None:
        """The instance is gone, or will be: what it was executing of the log is executed by the next."""
        for call_id in recovery.replaying:
            if worker is not None:
                worker.in_flight.pop(call_id, None)
        recovery.replaying.clear()
        if recovery.next is not None:
            recovery.next.missing = -1  # What it waits for will not start it.
            recovery.next = None
        recovery.applied = recovery.sent = 0

    def _take_in_order(self, actor: Actor, recovery: Recovery) -> list[Task]:
        """The calls that may be sent now: of the log, else those that were in hand, else new ones."""
        worker = actor.worker
        if actor.state != ALIVE or worker is None:
            return []
        if recovery.applied < len(recovery.log):
            return self._take_logged(worker, recovery)
        batch: list[Task] = []
        again = recovery.again
        while again:
            if again[0].state < FINISHED:  # Else it was cancelled.
                if again[0].missing:
                    return batch
                batch.append(again[0])
            again.popleft()
        return batch or actor.take_ready()

    def _take_logged(self, worker: WorkerRecord, recovery: Recovery) -> list[Task]:
        batch: list[Task] = []
        room = MAX_IN_FLIGHT - len(worker.in_flight)
        while recovery.sent < len(recovery.log) and len(batch) < room:
            raised = recovery.raised.get(recovery.covered + recovery.sent, 0)
            copy = recovery.next or self._copy_of(recovery.log[recovery.sent], raised)
            if copy.spec.task_id in recovery.replaying:
                break  # Its first attempt, which raised and was retried, is on its way: one after the other.
            recovery.next = copy
            if copy.spec.deps and not copy.missing:
                self._count_missing(copy)
            if copy.missing:
                break
            recovery.next = None
            recovery.replaying[copy.spec.task_id] = copy
            recovery.sent += 1
            batch.append(copy)
        return batch

    def _count_missing(self, copy: Task) -> None:
        self.lineage.count_missing(copy)

    def _copy_of(self, call: Task, raised: int) -> Task:
        """The call itself has ended, its row is written, and its result is in use: none of that is touched again."""
        copy = Task(call.spec, call.template, 0, 0, NOBODY, self._now)
        copy.caller = call.caller
        copy.raised = raised  # A call that was retried is in the log more than once.
        copy.retries_left = 0
        copy.error = "it is a replay: its result is dropped"
        copy.dirty = True  # So it is never entered into the list of rows to record.
        return copy

    def _check_replay(self, actor: Actor, recovery: Recovery, status: int) -> None:
        call = recovery.log[recovery.applied]
        if status != RETRYABLE_ERROR and (status == OK) != (call.state == FINISHED) and call.state >= FINISHED:
            how = ("raised", "returned") if status == OK else ("returned", "raised")
            self._replay_diverged(actor, recovery, f"the first time it {how[0]}, now it {how[1]}", call)

    def _replay_diverged(self, actor: Actor, recovery: Recovery, how: str, call: Task | None = None) -> None:
        """Its state may not be what it was: the user is told, once."""
        if recovery.diverged:
            return
        recovery.diverged = True
        name = "a method"
        if call is not None:
            name = f"{call.template.options.name}() [task {ids.short(call.spec.task_id)}]"
        text = f"{actor}: {name} did something else when it was run again after a crash ({how})"
        self._event("replay_diverged", actor.actor_id, text, self._now)
        self.wire.append(
            Warn(
                f"{text}. So the actor's state may differ from what its callers have seen. Let its methods depend on "
                "its state and their arguments alone, or save the state after each call: checkpoint_every=1."
            )
        )

    # ------------------------------------------------------------ the death of an instance

    def _inherit(self, worker: WorkerRecord) -> None:
        """Before what it held is let go: the next instance may find its state in need of that."""
        actor = worker.actor
        if actor is not None and actor.recovery is not None:
            actor.recovery.inherited += worker.held
            worker.held.clear()

    def _gives_up(self, actor: Actor, recovery: Recovery, worker: WorkerRecord, running: bytes | None) -> str:
        """Why it is not made once more, or ''; the replay ends here.  Of a new call the retries are counted instead."""
        replayed = recovery.replaying.get(running) if running is not None else None
        was_busy = bool(worker.in_flight) or recovery.applied < len(recovery.log)
        self._stop_replay(recovery, worker)
        if running in worker.in_flight and running != actor.actor_id:
            return ""
        recovery.fruitless = recovery.fruitless + 1 if was_busy else 0
        if recovery.fruitless <= MAX_FRUITLESS:
            return ""
        where = ", this one while it was idle"
        if replayed is not None:
            where = f", this one while {replayed.template.options.name}() was run again"
        elif running == actor.actor_id:
            where = ", this one while its state was made again"
        elif running is not None and ids.is_put(running):
            where = ""  # It stands before this.
        return f"; {recovery.fruitless} workers in a row ended before they had executed a new call{where}"
