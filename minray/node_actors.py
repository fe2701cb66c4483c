"""Actors, at the node: a creation is a task whose worker stays; calls are tasks that go to that worker, in order.

The table with its queues is actor_table.py; what makes an actor's state again is node_exact.py.  An
actor has one end, `_bury`, whatever brings it: kill(), its last handle, exit_actor(), a constructor that
raised, a worker that died too often.
"""

from __future__ import annotations

from minray import ids
from minray.actor_table import Actor
from minray.lineage import Task
from minray.messages import ActorKillRequested, ActorLookedUp, CallsCounted, ExitWorker, KillWorker
from minray.node_exact import NodeExact
from minray.scheduler import Client, WorkerRecord
from minray.task_spec import ALIVE, DEAD, FAILED, FINISHED, PENDING_NODE_ASSIGNMENT, RESTARTING, ActorOptions


class NodeActors(NodeExact):
    def _actor_submitted(self, task: Task, options: ActorOptions, now: float) -> None:
        actor = self.actors.add(task, options, now)
        if actor is None:
            # Two at once; whoever submitted this one looks the name up next, and finds the other.
            task.missing = -1
            self._fail(
                task, "ActorDiedError",
                f"the name {options.name!r} was taken by another actor. The constructor was not run.",
                actor_id=task.spec.task_id.hex(),
            )  # fmt: skip
            return
        if options.detached:
            self.lineage.hold(actor.actor_id)  # As if the session itself had a handle.
        if not task.missing:
            self._task_ready(task)

    def _constructed(self, actor: Actor) -> None:
        actor.state = ALIVE
        self.actors.dirty[actor.no] = actor
        self._pumps[actor.actor_id] = actor
        if not actor.restarts_left:
            self._release_constructor_arguments(actor)
        if actor.recovery is not None and not actor.recovery.log:
            self._caught_up(actor, actor.recovery)

    def _release_constructor_arguments(self, actor: Actor) -> None:
        """It will not be constructed again."""
        if actor.holds_arguments:
            actor.holds_arguments = False
            self.lineage.release_arguments(actor.task)

    def _creation_failed(self, task: Task, error: bytes, text: str) -> None:
        """Whatever kept the constructor from returning: every call fails with it, too."""
        actor = self.actors.actors.get(task.spec.task_id)
        if actor is None:
            self.lineage.release_arguments(task)
        elif actor.state != DEAD:
            actor.cause = (error, text)
            what = "it could not be made again" if actor.restarts else "its constructor failed"
            self._bury(actor, f"{what}: {text}", self._now)

    # ------------------------------------------------------------ calls

    def _call_submitted(self, task: Task, client: Client) -> None:
        in_actor = isinstance(client, WorkerRecord) and client.actor is not None
        task.caller = client.client if in_actor else task.spec.task_id[:8]  # Its siblings have that in common.
        self._enqueue_call(task)

    def _enqueue_call(self, task: Task) -> None:
        actor_id = task.spec.actor_id or b""
        actor = self.actors.actors.get(actor_id)
        if actor is not None:
            actor.pending += 1
        if actor is None or actor.state == DEAD:
            self._fail_call(task, actor, may_have_run=False)
            return
        if actor.recovery is not None and actor.recovery.has_executed(task.spec.task_id):
            task.missing = -1
            self._fail(
                task, "ObjectLostError",
                f"this call of {task.template.options.name}() was submitted by an earlier attempt of its caller, and "
                "was executed then: it is in the actor's state, and minray will not execute it twice. Its result has "
                "been freed meanwhile. Let the caller keep the ObjectRef, or hold what it needs in the actor.",
            )  # fmt: skip
            return
        actor.enqueue(task)
        if not task.missing:
            task.state = PENDING_NODE_ASSIGNMENT
        self._pumps[actor_id] = actor

    def _let_others_pass(self, task: Task) -> None:
        """It was perhaps the first in its actor's queue, and held up others."""
        actor = self.actors.actors.get(task.spec.actor_id or b"")
        if actor is not None:
            self._pumps[actor.actor_id] = actor

    def _send_calls(self, now: float) -> None:
        while self._pumps:
            _, actor = self._pumps.popitem()
            recovery = actor.recovery
            batch = actor.take_ready() if recovery is None else self._take_in_order(actor, recovery)
            if batch and actor.worker is not None:
                self._run(actor.worker, batch, now)
            elif actor.unwanted and not actor.pending and actor.state == ALIVE:
                self._bury(actor, "its last handle has gone", now)

    def _call_ended(self, task: Task) -> None:
        actor = self.actors.actors.get(task.spec.actor_id or b"")
        if actor is not None:
            actor.pending -= 1
            if not actor.pending and actor.unwanted:
                self._pumps[actor.actor_id] = actor

    def _fail_call(self, task: Task, actor: Actor | None, may_have_run: bool) -> None:
        task.missing = -1  # What it may still wait for will not start it.
        if actor is not None and actor.cause is not None:
            self._end(task, FAILED, *actor.cause)
            return
        name, short = task.template.options.name, ids.short(task.spec.actor_id or task.spec.task_id)
        unknown = f"actor [{short}] is not there: it has ended, or is of another session."
        death = actor.death if actor is not None else unknown
        ran = "may have run partway" if may_have_run else "was not run"
        lines = [death, f"This call of {name}() {ran}. minray will not run it again."]
        if actor is not None and actor.advice:
            lines.append(actor.advice)
        lines.append(f"Its history: minray story {short}")
        self._fail(task, "ActorDiedError", "\n".join(lines), actor_id=(task.spec.actor_id or task.spec.task_id).hex())

    def handle_calls_counted(self, event: CallsCounted, now: float) -> None:
        actor = self.actors.actors.get(event.actor_id)
        count = 0
        if actor is not None:
            in_hand = actor.worker.in_flight.values() if actor.worker is not None else ()
            count = sum(task.client == event.client for task in actor.waiting())
            count += sum(task.client == event.client for task in in_hand if task is not actor.task)
        self._answer(event.client, event.request_id, count)

    def handle_actor_looked_up(self, event: ActorLookedUp, now: float) -> None:
        actor = self.actors.find(event.namespace, event.name)
        if actor is None:
            self._answer(event.client, event.request_id, None)
            return
        # The asker has a handle when it has read this; until it says so, the actor is kept for it.
        self._pin(self._client(event.client), self.objects[actor.actor_id])
        self._answer(event.client, event.request_id, (actor.actor_id, actor.task.template.options.interface))

    # ------------------------------------------------------------ ends of actors

    def _handle_dropped(self, actor_id: bytes) -> None:
        """No process, task or object holds a handle any more: the actor ends when its calls are done."""
        actor = self.actors.actors.get(actor_id)
        if actor is None or actor.state == DEAD:
            self.actors.actors.pop(actor_id, None)
            self.lineage.tasks.pop(actor_id, None)
            return
        actor.unwanted = True
        self.actors.free_name(actor)  # Who asked for it now would get a handle to an actor about to end.
        self._pumps[actor_id] = actor

    def handle_actor_kill_requested(self, event: ActorKillRequested, now: float) -> None:
        actor = self.actors.actors.get(event.actor_id)
        if actor is None or actor.state == DEAD:
            return
        if actor.worker is not None:
            self.wire.append(KillWorker(actor.worker.client))
        if event.no_restart or not actor.restarts_left:
            self._bury(actor, "minray.kill() was called on it", now)
        elif actor.state == ALIVE:
            actor.state = RESTARTING  # Calls from now on are for the next instance.

    def _which(self, worker: WorkerRecord) -> str:
        return f" {worker.client} (pid {worker.pid}, node {self.label})"

    def _actor_worker_died(
        self, worker: WorkerRecord, actor: Actor, running: bytes | None, reason: str, now: float
    ) -> None:
        """Make the actor again, or bury it.

        Calls that had not begun go to the new instance.  Those that may have run cost a retry, or fail."""
        recovery = actor.recovery
        given_up = self._gives_up(actor, recovery, worker, running) if recovery is not None else ""
        calls = list(worker.in_flight.values())
        begun = actor.begun(calls, running)
        why = f"its worker{self._which(worker)} {reason}"
        if begun and calls[begun - 1].spec.task_id == running:
            why += f" while running {calls[begun - 1].template.options.name}()"
        elif running is not None and ids.is_put(running):
            why += " while saving its checkpoint"
        if actor.unrecoverable:
            why += f". It had lost its exact recovery: {actor.unrecoverable}"
        hint = self._where_to_look(worker, reason)
        if given_up:
            self._bury(actor, why + given_up, now, hint.rstrip(), begun)
            return
        if not actor.restarts_left:
            allowed = actor.restarts
            spent = f"It had been restarted as often as max_restarts={allowed} allows. " if allowed else ""
            advice = "" if actor.unrecoverable else f"{spent}To let it restart: @minray.remote(max_restarts=...)"
            self._bury(actor, why, now, (hint + advice).rstrip(), begun)
            return
        actor.worker = None
        actor.state = RESTARTING
        for position, task in reversed(list(enumerate(calls))):
            if task is actor.task:
                continue
            if position >= begun:
                self._handed_back(task)
            elif task.cancelled:
                self._fail_cancelled(task)
            elif recovery is not None and task.spec.task_id != running:
                # It had ended without an answer, and is no part of the state that is made again.
                self._run_again(task)
            else:
                self._call_interrupted(task, actor, why, hint)
        if actor.unwanted and not actor.pending:
            self._bury(actor, why, now)
            return
        actor.restarts_left -= actor.restarts_left > 0
        actor.restarts += 1
        self.actors.dirty[actor.no] = actor
        made_of = ""
        if recovery is not None:
            start = f"checkpoint {recovery.num_checkpoints}" if recovery.checkpoint is not None else "its constructor"
            made_of = f", from {start} and {len(recovery.log):,} logged calls"
        self._event("actor_restarted", actor.actor_id, f"{actor.options.class_name} is made again{made_of}: {why}", now)
        self._mark(actor.task)
        self._run_again(actor.task)

    def _call_interrupted(self, task: Task, actor: Actor, why: str, hint: str) -> None:
        """It may have run partway in an actor that is made again."""
        call = f"This call of {task.template.options.name}() [task {ids.short(task.spec.task_id)}]"
        if task.retries_left:
            task.retries_left -= task.retries_left > 0
            self._retried(task, f"ended when {why}")
            self._run_again(task)
        elif actor.recovery is not None:
            self._fail(
                task, "WorkerCrashedError",
                f"{actor}: {why}, attempt {task.attempt} of {task.template.options.max_retries + 1}.\n{call} may have "
                "run partway; it is not in the state that the actor is given again, and minray will not repeat it. The "
                f"actor goes on without it.\n{hint}To allow more attempts: @minray.remote(max_task_retries=...)",
            )  # fmt: skip
        else:
            self._fail(
                task, "ActorUnavailableError",
                f"{actor}: {why}.\n{call} may have run partway. The actor is being restarted; minray will not repeat "
                f"this call.\n{hint}To let calls be repeated: @minray.remote(max_restarts=..., max_task_retries=...)",
                actor_id=actor.actor_id.hex(),
            )  # fmt: skip

    def _bury(self, actor: Actor, reason: str, now: float, advice: str = "", begun: int | None = None) -> None:
        """The actor is dead for good: its worker ends, and its calls fail.

        `begun`: so many of those that its worker had in hand may have run; None: all."""
        worker, creation = actor.worker, actor.task
        is_replaying = actor.recovery is not None and bool(actor.recovery.replaying)
        if actor.recovery is not None:
            self._end_recovery(actor, actor.recovery)
        self.actors.bury(actor, f"{actor} is dead: {reason}.", advice, now)
        self._event("actor_died", actor.actor_id, actor.death, now)
        in_hand: list[Task] = []
        if worker is not None:
            in_hand = list(worker.in_flight.values())
            worker.in_flight.clear()
            if worker.client in self.scheduler.workers:
                self._forget_worker(worker, f"was told to end: {reason}", now)
                # A call that is being replayed may wait, and would be answered by nobody.
                self.wire.append(KillWorker(worker.client) if is_replaying else ExitWorker(worker.client))
        waiting = actor.waiting()
        actor.queues.clear()
        if begun is None:
            begun = len(in_hand)
        for task in waiting:
            task.missing = -1  # The end of one may be what another waits for.
        for position, task in enumerate(in_hand + waiting):
            if task is not creation:
                earlier = position >= len(in_hand) and task.attempt > 0
                self._fail_call(task, actor, may_have_run=position < begun or earlier)
        if creation.state < FINISHED:
            if creation.state == PENDING_NODE_ASSIGNMENT:
                self.scheduler.remove(creation)
            self._fail_call(creation, actor, may_have_run=creation in in_hand)
        self._release_constructor_arguments(actor)
        if actor.options.detached:
            self.lineage.release(actor.actor_id)
        if actor.unwanted:
            self.actors.forget(actor)
            self.lineage.tasks.pop(actor.actor_id, None)
