"""Actors that live on another node than the one that keeps their record.

An actor has one *home*, whose table has its record, its queues and its log: the node where it was submitted, or the
head, to which those go that a node could not bring back (with restarts, a name, or detached) or has no room for.  The
head chooses where an actor lives.  There it is a *guest*: a worker, and the calls on their way to it.  The home does
not know more of that worker than if it were one of its own (`Seat`), and decides all the rest: what becomes of calls
when it dies, and where the actor is made again, from which checkpoint and which logged calls (node_actors.py,
node_exact.py).

All calls go through the home, whoever makes them: that keeps each caller's order, also over a restart elsewhere.  A
checkpoint counts when its value has been copied to the home; until then it could be lost with the node.

Left out: calls that go straight to the node where the actor lives.  They would save a message, and would
need numbers from each caller to keep the order when the actor moves.  And, for actors with exact recovery that live
on another node than their home: knowing which tasks a logged call has submitted, so that a replay does not run those
again.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minray import ids
from minray.actor_table import Actor, Recovery
from minray.cluster_messages import ActorLost, ActorReleased, ActorSaved, Answered
from minray.cluster_objects import OF_CHECKPOINT, OF_RESULT, Away, Neighbour
from minray.cluster_tasks import GivenTasks
from minray.lineage import CONSTRUCTED, ObjectEntry, Request, Task, Template
from minray.messages import (
    ActorKillRequested, ActorLookedUp, CallsCounted, CheckpointFailed, CheckpointTaken, ExitWorker, KillWorker,
    NodeQueried, TasksFinished, TasksSubmitted, Unpinned,
)  # fmt: skip
from minray.policy import Site
from minray.scheduler import Client, Shape, WorkerRecord
from minray.task_spec import (
    DEAD, ERROR, FAILED, FINISHED, OK, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, RETRYABLE_ERROR,
    SUBMITTED_TO_WORKER, ActorOptions, TaskSpec,
)  # fmt: skip


class Seat(WorkerRecord):
    """The worker of one actor on another node, as its home sees it.  `client` is the node's."""

    def __init__(self, neighbour: Neighbour, shape: Shape, actor: Actor) -> None:
        super().__init__(neighbour.client)
        self.shape = shape
        self.actor = actor


class DistributedActors(GivenTasks):
    _replays: dict[bytes, Task]  # of calls of guests; their records stand nowhere else
    _unsafe: dict[ObjectEntry, tuple[Actor, WorkerRecord | None, int, bool]]  # checkpoints on their way here: of which
    # actor, where it sits, how many calls they cover (see Recovery.covered), and is the constructor not needed any more
    _questions: dict[int, tuple[int, int]]  # passed on, by number: who asked, and the number it gave
    _questions_made: int

    # ------------------------------------------------------------ where an actor shall live

    def _actor_submitted(self, task: Task, options: ActorOptions, now: float) -> None:
        shape = task.template.shape
        if self.up and task.client >= 0 and not shape.bound:
            stays = not (options.name or options.detached or options.max_restarts) and self.scheduler.could_lease(shape)
            if not stays:
                self._handle_will_come(self.objects[task.spec.task_id], self.up)
                self._give(self.neighbours[self.up], [task])
                return
        super()._actor_submitted(task, options, now)

    def _place_actors(self) -> None:
        """The head: each new actor goes to where the fewest live, among the nodes that have what it needs."""
        for shape in [shape for shape in self.scheduler.active if shape.exclusive]:
            staying: list[Task] = []
            for task in shape.take(shape.waiting):
                site = self._site_for_actor(shape, len(staying))
                if site is None or site.node_no == self.node_no:
                    staying.append(task)
                else:
                    self._seat(self.neighbours[-site.node_no], task)
            for task in staying:
                if self._lacks_something(task):
                    self._stay(task)
                else:
                    shape.queue.append(task)
            if not shape.queue:
                self.scheduler.active.pop(shape, None)

    def _site_for_actor(self, shape: Shape, staying: int) -> Site | None:
        sites = []
        if self.scheduler.could_lease(shape):
            here = staying + sum(1 for worker in self.scheduler.workers.values() if worker.actor is not None)
            sites.append(Site(self.node_no, here, None, self._slots(shape), 0))
        for neighbour in self._feasible_nodes(shape):
            total, reserved = neighbour.total, neighbour.reserved
            if all(total[name] - reserved.get(name, 0) >= amount for name, amount in shape.resources):
                slots = self._slots(shape, neighbour.total)
                sites.append(Site(-neighbour.client, neighbour.actors, None, slots, 0))
        return self.scheduler.policy.place_actor(sites) if sites else None

    def _seat(self, neighbour: Neighbour, task: Task) -> None:
        actor = self.actors.actors[task.spec.task_id]
        seat = Seat(neighbour, task.template.shape, actor)
        neighbour.actors += 1
        for name, amount in task.template.shape.resources:
            neighbour.reserved[name] = neighbour.reserved.get(name, 0) + amount
        recovery = actor.recovery
        number, checkpoint = (recovery.num_checkpoints, recovery.checkpoint) if recovery is not None else (0, None)
        self._give(neighbour, [task], (bool(actor.restarts), number, checkpoint))
        task.worker = actor.worker = actor.host = seat
        seat.in_flight[task.spec.task_id] = task

    def _leave_seat(self, seat: Seat, in_hand: Iterable[bytes]) -> None:
        neighbour = self.neighbours.get(seat.client)
        if neighbour is not None and seat.shape is not None:
            for task_id in in_hand:
                neighbour.in_flight.pop(task_id, None)
            neighbour.actors -= 1
            for name, amount in seat.shape.resources:
                neighbour.reserved[name] -= amount
            seat.shape = None

    # ------------------------------------------------------------ calls

    def _enqueue_call(self, task: Task) -> None:
        home = self._home_of(task.spec.actor_id or b"", task.client)
        if home:
            self._give(self.neighbours[home], [task])
        else:
            super()._enqueue_call(task)

    def _home_of(self, actor_id: bytes, asking: int) -> int:
        """The neighbour on the way to the actor's home; 0 if that is here, or nobody knows."""
        actor = self.actors.actors.get(actor_id)
        if actor is not None:
            return self.up if self._is_guest(actor) and asking != self.up else 0
        entry = self.objects.get(actor_id)
        keeper = entry.away.keeper if entry is not None and entry.away is not None else 0
        return keeper if keeper != asking else 0

    def _is_guest(self, actor: Actor) -> bool:
        """The head has its record."""
        return self.up != 0 and actor.task.client == self.up

    def _which(self, worker: WorkerRecord) -> str:
        return "" if type(worker) is Seat else super()._which(worker)  # Whoever told of its end has said where it was.

    def _its_log(self, worker: WorkerRecord) -> str:
        return "the logs of its node" if type(worker) is Seat else super()._its_log(worker)

    def _where_it_ran(self, worker: WorkerRecord) -> str:
        return f"node {-worker.client}" if worker.client < 0 else super()._where_it_ran(worker)

    def _call_lost(self, task: Task, neighbour: Neighbour, reason: str) -> None:
        """Its actor's home was the node that died: the actor died with it."""
        self._fail(
            task, "ActorDiedError",
            f"actor [{ids.short(task.spec.actor_id or b'')}] was lost with node {neighbour.label}, which {reason}.\n"
            f"This call of {task.template.options.name}() may have run partway. minray will not run it again.\n"
            "To let an actor live again on another node: @minray.remote(max_restarts=...)",
            actor_id=(task.spec.actor_id or b"").hex(),
        )  # fmt: skip

    # ------------------------------------------------------------ at the home

    def _order_of_call(self, task: Task) -> tuple[Any, bool]:
        actor = self.actors.actors.get(task.spec.actor_id or b"")
        if actor is not None and actor.recovery is not None:  # All its calls stay in one order, that of the log.
            return b"", task.spec.task_id in actor.recovery.replaying
        return (self.node_no, task.caller) if type(task.caller) is int else task.caller, False

    def _count_missing(self, copy: Task) -> None:
        """Of a logged call: where the actor lives now its arguments are fetched, so they must only be anywhere."""
        actor = self.actors.actors.get(copy.spec.actor_id or b"")
        if actor is None or type(actor.worker) is not Seat:
            super()._count_missing(copy)
            return
        copy.missing = 0
        for entry in self._needed_by(copy):
            if not self.is_available(entry):
                copy.missing += 1
                self.lineage.wait_for(entry, copy)

    def _log_result(self, worker: WorkerRecord, result: Any) -> bool:
        """Whether the result goes on to the caller."""
        actor = worker.actor
        if actor is None or actor.recovery is None:
            return True
        return bool(self._note_executed(worker, actor, actor.recovery, [result]))

    def _bury(self, actor: Actor, reason: str, now: float, advice: str = "", begun: int | None = None) -> None:
        if self._is_guest(actor):
            self._end_guest(actor, reason)
            self._tell_lost(actor, reason, None, exited=True)
            return
        seat = actor.worker if type(actor.worker) is Seat else None
        in_hand = list(seat.in_flight) if seat is not None else []
        super()._bury(actor, reason, now, advice, begun)
        if seat is not None:
            self._leave_seat(seat, in_hand)
            if seat.client in self.neighbours:
                self._tell(seat.client, ActorReleased(self.me, actor.actor_id))

    def handle_actor_lost(self, event: ActorLost, now: float) -> None:
        actor = self.actors.actors.get(event.actor_id)
        seat = actor.worker if actor is not None else None
        if actor is None or type(seat) is not Seat or seat.client != event.client:
            return
        self._leave_seat(seat, seat.in_flight)
        if event.exited:
            at_once = actor.task.template.options.concurrency
            # The first was the one that ended it.
            self._bury(actor, event.reason, now, begun=1 if at_once == 1 else None)
        else:
            self._actor_worker_died(seat, actor, event.running, event.reason, now)

    def _seats_lost(self, neighbour: Neighbour, reason: str, now: float) -> None:
        for actor in list(self.actors.actors.values()):
            seat = actor.worker
            if type(seat) is Seat and seat.client == neighbour.client:
                for task_id in seat.in_flight:
                    neighbour.in_flight.pop(task_id, None)
                self._actor_worker_died(seat, actor, None, f"was lost with node {neighbour.label}, which {reason}", now)

    def handle_actor_saved(self, event: ActorSaved, now: float) -> None:
        actor = self.actors.actors.get(event.actor_id)
        recovery = actor.recovery if actor is not None else None
        seat = actor.worker if actor is not None else None
        is_its = type(seat) is Seat and seat.client == event.client
        if event.checkpoint is None:
            if actor is not None and recovery is not None and is_its:
                self._not_saved(actor, recovery, event.failure, event.for_good)
            return
        object_id, data, size, _, nested = event.checkpoint
        if actor is None or recovery is None or not is_its or object_id in self.objects:
            self._give_reference_back(event.client, object_id)
            return
        for inner in nested:
            self._know(inner, event.client)
        entry = self.objects[object_id] = ObjectEntry(object_id, None, 1)
        entry.away = Away(event.client, [])
        self._unsafe[entry] = (actor, seat, recovery.covered + recovery.applied, event.whole)
        if type(data) is bytes:
            self.lineage.seal(entry, (data, size, nested), False, now)
            self._is_safe(entry)
            return
        entry.away.places = list(data)
        self._now_lies_elsewhere(entry, size, nested)
        self.lineage.wait_for(entry, Request(0, OF_CHECKPOINT, [object_id], 1, True, False))

    def _request_ready(self, request: Request) -> None:
        if request.request_id == OF_CHECKPOINT:
            entry = self.objects.get(request.object_ids[0])
            if entry is not None:
                self._is_safe(entry)
        else:
            super()._request_ready(request)

    def _is_safe(self, entry: ObjectEntry) -> None:
        """The checkpoint's value is here (or an error: it was lost on the way)."""
        if entry not in self._unsafe:
            return  # A newer one was safe before.
        actor, seat, covers, whole = self._unsafe[entry]
        older = list(self._unsafe)
        for other in older[: older.index(entry)]:
            if self._unsafe[other][0] is actor:
                del self._unsafe[other]
                self.lineage.release(other.object_id)
        del self._unsafe[entry]
        recovery = actor.recovery
        if recovery is None or actor.worker is not seat or entry.is_error:  # Another instance has begun without it.
            self.lineage.release(entry.object_id)
            return
        # A number, and not the last call: one that raised and was retried is in the log twice.
        self._now_starts_from(actor, recovery, entry.object_id, whole, covers - recovery.covered)

    # ------------------------------------------------------------ where a guest lives

    def _take_guest(self, task: Task, extra: Any) -> None:
        """An actor comes to live here.

        The record of its making stands only with the actor: under its ID this node may have one of its own, if it
        was submitted here.  It may even live here already, made by its maker's former life: of which the maker's home
        does not know, when it lets the next one make it again.  Then that one has ended."""
        own = self.actors.actors.get(task.spec.task_id)
        if own is not None and own.state != DEAD:
            self._bury(own, "its maker has been restarted on another node, and has made it again", self._now)
        has_lived, number, checkpoint = extra
        options = ActorOptions(*task.spec.actor or ())._replace(name=None, detached=False, max_restarts=0)
        actor = self.actors.add(task, options, self._now)
        assert actor is not None
        actor.restarts = int(has_lived)
        recovery = actor.recovery
        if recovery is not None:
            recovery.is_guests = True
        if recovery is not None and checkpoint is not None:
            recovery.num_checkpoints = number
            recovery.checkpoint = checkpoint
            self._know(checkpoint, task.client)
            entry = self.lineage.hold(checkpoint)
            if entry.data is None:
                task.missing += 1
                self.lineage.wait_for(entry, task)
        if not task.missing:
            self._task_ready(task)

    def _take_replay(self, task: Task) -> None:
        actor = self.actors.actors.get(task.spec.actor_id or b"")
        if actor is None:
            self.lineage.release_arguments(task)  # It has ended here; the home will hear of it.
            return
        self._replays[task.spec.task_id] = task
        task.caller = b""
        task.state = PENDING_ARGS_AVAIL if task.missing else PENDING_NODE_ASSIGNMENT
        actor.enqueue(task)
        self._pumps[actor.actor_id] = actor

    def _constructed(self, actor: Actor) -> None:
        super()._constructed(actor)
        if self._is_guest(actor):
            if actor.recovery is not None and actor.recovery.checkpoint is not None:
                checkpoint, actor.recovery.checkpoint = actor.recovery.checkpoint, None
                self.lineage.release(checkpoint)
            self._tell_home(actor.task, OK, [(CONSTRUCTED, len(CONSTRUCTED), ())])

    def _creation_failed(self, task: Task, error: bytes, text: str) -> None:
        actor = self.actors.actors.get(task.spec.task_id)
        if self._is_guests(task):
            self._tell_home(task, ERROR, (error, text))
            if actor is not None:
                self._end_guest(actor, text)
        else:
            super()._creation_failed(task, error, text)

    def _tell_home(self, task: Task, status: int, payload: Any) -> None:
        if self.up in self.neighbours:
            result = (task.spec.task_id, status, payload, task.started_s, task.finished_s)
            self._tell(self.up, TasksFinished(self.me, [result]))

    def _tell_lost(self, actor: Actor, reason: str, running: bytes | None, exited: bool) -> None:
        if self.up in self.neighbours:
            self._tell(self.up, ActorLost(self.me, actor.actor_id, reason, running, exited))

    def _note_executed(self, worker: WorkerRecord, actor: Actor, recovery: Recovery, results: list[Any]) -> list[Any]:
        if not self._is_guest(actor):
            return super()._note_executed(worker, actor, recovery, results)
        new = []
        for result in results:
            task = self._replays.pop(result[0], None)
            if task is None:
                new.append(result)
                continue
            worker.in_flight.pop(result[0], None)
            self._drop_result(worker, task, result[1], result[2])
            self.lineage.release_arguments(task)
            self._tell_home(task, result[1], b"" if result[1] == OK else result[2])
        return new

    def _finished_otherwise(self, worker: WorkerRecord, task: Task, status: int, payload: Any, now: float) -> None:
        actor = worker.actor
        if status == RETRYABLE_ERROR and task.retries_left and actor is not None and actor.recovery is not None:
            if self._is_guest(actor) and task is not actor.task and not task.cancelled:
                # It raised, and the state that it left is part of the log: the home sends it again.
                self._drop_result(worker, task, status, payload)
                self._forget_call(task)
                result = (task.spec.task_id, status, payload, task.started_s, task.finished_s)
                self._reports.append((Request(self.up, OF_RESULT, [], 0, False, False), task, result))
                return
        super()._finished_otherwise(worker, task, status, payload, now)

    def _without_known_children(self, recovery: Recovery, event: TasksSubmitted, client: Client) -> list[TaskSpec]:
        if client.actor is not None and self._is_guest(client.actor):
            return event.specs
        return super()._without_known_children(recovery, event, client)

    def _keep_children(
        self, recovery: Recovery, parent_id: bytes, specs: list[TaskSpec], templates: dict[int, Template]
    ) -> None:
        if not recovery.is_guests:
            super()._keep_children(recovery, parent_id, specs, templates)

    def _inherit(self, worker: WorkerRecord) -> None:
        if worker.actor is not None and not self._is_guest(worker.actor):
            super()._inherit(worker)

    def handle_checkpoint_taken(self, event: CheckpointTaken, now: float) -> None:
        actor = self.scheduler.workers[event.client].actor
        if actor is None or not self._is_guest(actor) or self.up not in self.neighbours:
            super().handle_checkpoint_taken(event, now)
            return
        self._grants.pop((event.client, event.object_id), None)
        home = self.neighbours[self.up]
        entry = self.lineage.put(event.object_id, event.value, now)
        if entry is None:  # An earlier instance has made it here.
            self._acquire(home, event.object_id)
            entry = self.objects[event.object_id]
        else:
            home.held[event.object_id] = None
        self._tell(self.up, ActorSaved(self.me, actor.actor_id, self._report(entry), event.whole, "", False))

    def handle_checkpoint_failed(self, event: CheckpointFailed, now: float) -> None:
        actor = self.scheduler.workers[event.client].actor
        if actor is None or not self._is_guest(actor) or self.up not in self.neighbours:
            super().handle_checkpoint_failed(event, now)
            return
        self._revoke(event.client, event.object_id, now)
        self._tell(self.up, ActorSaved(self.me, actor.actor_id, None, False, event.reason, event.for_good))

    def _actor_worker_died(
        self, worker: WorkerRecord, actor: Actor, running: bytes | None, reason: str, now: float
    ) -> None:
        if not self._is_guest(actor):
            super()._actor_worker_died(worker, actor, running, reason, now)
            return
        self._end_guest(actor, reason)
        who = f"worker {worker.client}, pid {worker.pid}, node {self.label}"
        self._tell_lost(actor, f"{reason} ({who})", running, False)

    def _end_guest(self, actor: Actor, reason: str) -> None:
        """Its home decides what becomes of it, and of its calls: here nothing is left of them."""
        worker, creation = actor.worker, actor.task
        calls = actor.waiting()
        if worker is not None:
            calls += list(worker.in_flight.values())
            worker.in_flight.clear()
            if worker.client in self.scheduler.workers:
                self._forget_worker(worker, f"was told to end: {reason}", self._now)
                self.wire.append(ExitWorker(worker.client))
        actor.queues.clear()
        self.actors.forget(actor)
        self._pumps.pop(actor.actor_id, None)
        for task in calls:
            if task is not creation:
                self._forget_call(task)
        if creation.state == PENDING_NODE_ASSIGNMENT:
            self.scheduler.remove(creation)
        creation.missing = -1
        creation.state = FAILED
        self._staying.pop(creation.spec.task_id, None)
        self._release_constructor_arguments(actor)
        if actor.recovery is not None and actor.recovery.checkpoint is not None:
            self.lineage.release(actor.recovery.checkpoint)
            actor.recovery.checkpoint = None

    def _forget_call(self, task: Task) -> None:
        """The home has it, and will send it to the next instance."""
        home, task_id = self.neighbours[self.up], task.spec.task_id
        task.missing = -1
        self._staying.pop(task_id, None)
        if self._replays.pop(task_id, None) is not None:
            self.lineage.release_arguments(task)
            return
        request = home.awaits.pop((OF_RESULT, task_id), None)
        if request is not None:
            request.remaining = 0
        home.owed -= 1
        returns = [ids.return_id(task_id, index) for index in range(task.template.options.num_returns)]
        if self._came_back.pop(task_id, None) is not None:  # It was submitted here: it waits for the home's answer.
            task.state = SUBMITTED_TO_WORKER
            task.worker = home
            home.in_flight[task_id] = task
        else:
            task.state = FAILED
            if task.children is not None:
                self.lineage.forget_children(task)
            self.lineage.release_arguments(task)
            for object_id in returns:
                entry = self.objects.get(object_id)
                if entry is not None and entry.task is task:
                    if entry.refs > (object_id in home.held):  # Somebody here waits for it, too.
                        entry.away = Away(self.up, [])
                        self._take_reference(self.up, object_id)
                        if entry.waiters:
                            self._ask(entry)
                    entry.task = None
                    task.live_returns -= 1
            self.lineage.forget_if_unneeded(task)
        for object_id in returns:
            if home.held.pop(object_id, self) is None:
                self.lineage.release(object_id)

    def handle_actor_released(self, event: ActorReleased, now: float) -> None:
        actor = self.actors.actors.get(event.actor_id)
        if actor is not None and self._is_guest(actor):
            self._end_guest(actor, "its home has released it")

    # ------------------------------------------------------------ questions and orders that the home answers

    def handle_actor_kill_requested(self, event: ActorKillRequested, now: float) -> None:
        home = self._home_of(event.actor_id, event.client)
        actor = self.actors.actors.get(event.actor_id)
        if home:
            self._tell(home, ActorKillRequested(self.me, event.actor_id, event.no_restart))
        elif actor is not None and type(actor.worker) is Seat:
            self._tell(actor.worker.client, ActorKillRequested(self.me, event.actor_id, False))
            if event.no_restart or not actor.restarts_left:
                self._bury(actor, "minray.kill() was called on it", now)
        elif actor is not None and self._is_guest(actor):
            if actor.worker is not None:
                self.wire.append(KillWorker(actor.worker.client))
        else:
            super().handle_actor_kill_requested(event, now)

    def _handle_dropped(self, actor_id: bytes) -> None:
        actor, task = self.actors.actors.get(actor_id), self.lineage.tasks.get(actor_id)
        if actor is not None and not self._is_guest(actor):
            super()._handle_dropped(actor_id)
        elif task is not None and task.state >= FINISHED:  # Its home is another node, which has answered.
            self.lineage.tasks.pop(actor_id)

    # ------------------------------------------------------------ questions that the head answers

    def _pass_on(self, event: Any, client: int) -> None:
        self._questions_made += 1
        self._questions[self._questions_made] = (event.client, event.request_id)
        self._tell(client, event._replace(client=self.me, request_id=self._questions_made))

    def _answer(self, client: int, request_id: int, answer: Any) -> None:
        if client >= 0:
            super()._answer(client, request_id, answer)
        else:
            self._tell(client, Answered(self.me, request_id, answer))

    def handle_answered(self, event: Answered, now: float) -> None:
        client, request_id = self._questions.pop(event.request_id)
        is_there = client in self.neighbours or client in self.scheduler.workers
        if type(event.answer) is tuple:  # Of an actor that was looked up: it is pinned for us.
            actor_id = event.answer[0]
            self._know(actor_id, event.client)
            if is_there:
                self._pin(self._client(client), self.objects[actor_id])
            self._tell(event.client, Unpinned(self.me, [actor_id]))
        if is_there:
            self._answer(client, request_id, event.answer)

    def handle_actor_looked_up(self, event: ActorLookedUp, now: float) -> None:
        if self.up:
            self._pass_on(event, self.up)
        else:
            super().handle_actor_looked_up(event, now)

    def handle_node_queried(self, event: NodeQueried, now: float) -> None:
        if self.up:
            self._pass_on(event, self.up)
        else:
            super().handle_node_queried(event, now)

    def handle_calls_counted(self, event: CallsCounted, now: float) -> None:
        home = self._home_of(event.actor_id, event.client)
        if home:
            self._pass_on(event, home)
        else:
            super().handle_calls_counted(event, now)
