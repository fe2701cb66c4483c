"""Tasks that run on other nodes: given to a neighbour, and given by one.

Giving is the same in both directions: up, when this node lacks the resources or its queue is too long (*bottom-up*:
what can stay stays), and down, when the head hands out what waits.  The giver keeps its record, in flight at the
neighbour as if that were a worker; the receiver has a record of its own, which owes the giver the result (`_owe`),
and may give it to a neighbour in turn.  So a retry is decided where the attempt failed: a worker's death, or an
exception, by the node that ran it, a node's death by whoever gave it the task (and was told of exceptions: the number
of a task's children depends on them, see ids.py).

The head gives a node only so much that it stays busy until more can come (`Policy.node_depth`); the rest waits here,
where a death costs it nothing and where any node that has room can have it.  Tasks with arguments that lie elsewhere
go at once to the node where they will start soonest: queue length times mean task time, and bytes to move by
bandwidth (`Policy.place`).

Left out: taking back what a slow node has been given; `node_depth` bounds what that can cost.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from minray import ids
from minray.cluster_messages import AttemptRaised, TasksGiven
from minray.cluster_objects import OF_RESULT, Away, Neighbour, SharedObjects
from minray.lineage import GONE, ObjectEntry, Request, Task, Template
from minray.messages import (
    CancelRequested, FunctionExported, TasksFinished, TasksSubmitted, TemplateDefined,
)  # fmt: skip
from minray.policy import Site
from minray.scheduler import Shape, WorkerRecord
from minray.task_spec import (
    ACTOR_CREATION, CANCELLED, ERROR, FAILED, FINISHED, OK, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT,
    RETRYABLE_ERROR, SUBMITTED_TO_WORKER, UNIT, ActorOptions, TaskSpec,
)  # fmt: skip


class GivenTasks(SharedObjects):
    up: int  # the neighbour that is the head; 0: this is the head
    _hungry: dict[int, Neighbour]  # that may have room for tasks
    _handed_up: list[Task]  # by the event in hand
    _came_back: dict[bytes, Task]  # calls that we gave to the home of an actor that lives here
    _makers: dict[bytes, list[Orphan]]  # by a task that runs again: what it may bring back
    _forsaken: list[Orphan]  # what no task will bring back any more

    # ------------------------------------------------------------ where a task shall run

    def _needs_it_here(self, waiter: Task | Request) -> bool:
        if isinstance(waiter, Request):
            return waiter.client >= 0
        if waiter.spec.actor_id is not None:
            actor = self.actors.actors.get(waiter.spec.actor_id)
            return actor is not None and actor.worker is not None and actor.worker.client >= 0
        if waiter.spec.task_id in self._staying:
            return True
        return bool(self.up) and self.scheduler.feasible(waiter.template.shape)

    def _task_ready(self, task: Task) -> None:
        """Its arguments are available: here, or on other nodes."""
        spec, shape = task.spec, task.template.shape
        if not self.neighbours or spec.actor_id is not None or shape.bound:
            super()._task_ready(task)
        elif self.up:
            feasible = self.scheduler.feasible(shape)
            if task.client < 0:
                super()._task_ready(task)
            elif feasible and self.scheduler.policy.keeps(shape.waiting, task.template.mean_s, self._slots(shape)):
                super()._task_ready(task)
            else:
                self._handed_up.append(task)
        elif spec.deps and spec.actor is None and spec.task_id not in self._staying and self._has_large_arguments(task):
            self._place(task)
        elif self.scheduler.feasible(shape) or self._feasible_nodes(shape):
            (self.scheduler.enqueue_first if task.attempt else self.scheduler.enqueue)(task)
        else:
            self._refuse(task)

    def _refuse(self, task: Task) -> None:
        """No node has what it needs.  What has run before waits for a node like the one that died."""
        if task.attempt and not self.up and not task.template.shape.bound:
            self.scheduler.enqueue_first(task)
        else:
            super()._refuse(task)

    def _has_large_arguments(self, task: Task) -> bool:
        return any(type(self.objects[object_id].data) is not bytes for object_id in task.spec.deps)

    def _slots(self, shape: Shape, total: dict[str, int] | None = None) -> int:
        """How many tasks of this shape can run at once."""
        total = self.scheduler.total if total is None else total
        if not shape.resources:
            return 4 * max(1, total.get("CPU", 0) // UNIT)
        return min(total.get(name, 0) // amount for name, amount in shape.resources)

    def _feasible_nodes(self, shape: Shape) -> list[Neighbour]:
        if shape.bound:
            return []
        return [n for n in self.neighbours.values() if n.client != self.up and self._slots(shape, n.total)]

    def _place(self, task: Task) -> None:
        """Some of what it needs lies on other nodes."""
        shape, mean_s = task.template.shape, task.template.mean_s
        entries = [self.objects[object_id] for object_id in task.spec.deps]
        sites = []
        if self.scheduler.feasible(shape):
            waiting = shape.waiting + sum(len(w.in_flight) for w in shape.leased.values())
            missing = sum(entry.size for entry in entries if entry.data is None)
            sites.append(Site(self.node_no, waiting, mean_s, self._slots(shape), missing))
        for neighbour in self._feasible_nodes(shape):
            waiting = len(neighbour.in_flight) + neighbour.own_tasks
            node_no = -neighbour.client
            missing = sum(e.size for e in entries if type(e.data) is not bytes and not self._is_at(e, node_no))
            sites.append(Site(node_no, waiting, mean_s, self._slots(shape, neighbour.total), missing))
        if not sites:
            self._refuse(task)
            return
        site = self.scheduler.policy.place(sites)
        if site.node_no != self.node_no:
            self._give(self.neighbours[-site.node_no], [task])
            return
        self._stay(task)
        if not task.missing:
            self._task_ready(task)

    def _stay(self, task: Task) -> None:
        """It will run here, once all that it needs is here."""
        self._staying[task.spec.task_id] = task
        task.state = PENDING_ARGS_AVAIL
        self.lineage.count_missing(task)
        checkpoint = self._checkpoint_for(task)
        if checkpoint is not None and checkpoint.data is None:
            task.missing += 1
            self.lineage.wait_for(checkpoint, task)

    def _needed_by(self, task: Task) -> list[ObjectEntry]:
        checkpoint = self._checkpoint_for(task)
        return super()._needed_by(task) + ([checkpoint] if checkpoint is not None else [])

    def _checkpoint_for(self, creation: Task) -> ObjectEntry | None:
        """What the actor that it makes again starts from."""
        actor = self.actors.actors.get(creation.spec.task_id) if creation.spec.actor is not None else None
        recovery = actor.recovery if actor is not None else None
        if recovery is None or recovery.checkpoint is None:
            return None
        return self.objects[recovery.checkpoint]

    def _lacks_something(self, task: Task) -> bool:
        """What it needs is not here any more, or lies elsewhere."""
        if not task.spec.deps and task.spec.actor is None:
            return False
        return any(entry.data is None for entry in self._needed_by(task))

    def _is_at(self, entry: ObjectEntry, node_no: int) -> bool:
        return entry.away is not None and node_no in entry.away.places

    def _share(self, only_idle: bool) -> None:
        """Hand out what waits here to the nodes that have room.

        `only_idle`: what cannot run here at once, to where it can; before tasks are queued behind others here."""
        scheduler, policy = self.scheduler, self.scheduler.policy
        for shape in list(scheduler.active):
            count = shape.waiting
            if only_idle:
                count -= max(0, scheduler.room_for(shape)) if scheduler.feasible(shape) else 0
            if shape.exclusive or shape.bound or count <= 0:
                continue
            mean_s = shape.queue[0].template.mean_s
            sites = []
            for neighbour in list(self._hungry.values()):
                slots = self._slots(shape, neighbour.total)
                waiting = len(neighbour.in_flight) + neighbour.own_tasks
                room = (slots if only_idle else policy.node_depth(slots, mean_s)) - waiting if slots else 0
                if room > 0:
                    sites.append((Site(-neighbour.client, waiting, mean_s, slots, 0), room))
                elif not only_idle and len(scheduler.active) == 1:
                    del self._hungry[neighbour.client]
            if not sites:
                continue
            for node_no, part in policy.share(sites, count):
                tasks = shape.take(part)
                if self._staying:
                    staying = [task for task in tasks if task.spec.task_id in self._staying]
                    shape.queue.extendleft(reversed(staying))
                    tasks = [task for task in tasks if task.spec.task_id not in self._staying]
                if tasks:
                    self._give(self.neighbours[-node_no], tasks)
            if not shape.queue:
                del scheduler.active[shape]

    # ------------------------------------------------------------ giving

    def _give(self, neighbour: Neighbour, tasks: Iterable[Task], extra: Any = None) -> None:
        """From now on they are in flight there; what they still wait for will not start them here."""
        batch = []
        values: dict[bytes, None] = {}
        raised: dict[bytes, int] = {}
        for task in tasks:
            template, spec = task.template, task.spec
            if template.no not in neighbour.known:
                self._introduce_to(neighbour, template)
            for object_id in spec.deps:
                if object_id not in neighbour.held:
                    values[object_id] = None
            task.missing = -1 if task.missing else 0
            task.state = SUBMITTED_TO_WORKER
            task.worker = neighbour
            task.attempt += 1
            neighbour.in_flight[spec.task_id] = task
            if self._staying:
                self._staying.pop(spec.task_id, None)
            if spec.actor_id is not None:
                extra = self._order_of_call(task)
            if task.raised:
                raised[spec.task_id] = task.raised
            batch.append((spec, template.no, extra, task.retries_left))
        reports = [
            self._report(entry) for entry in map(self.objects.__getitem__, values)
            if self.is_available(entry) and (entry.away is None or entry.away.keeper != neighbour.client)
        ]  # fmt: skip
        last = neighbour.outbox[-1] if neighbour.outbox else None
        if type(last) is TasksGiven:
            last.tasks.extend(batch)
            last.values.extend(reports)
            last.raised.update(raised)
        else:
            self._tell(neighbour.client, TasksGiven(self.me, batch, reports, raised))

    def _introduce_to(self, neighbour: Neighbour, template: Template) -> None:
        options = template.options
        if options.function_id and options.function_id not in neighbour.known_functions:
            neighbour.known_functions.add(options.function_id)
            _, pickled = self.functions[options.function_id]
            self._tell(
                neighbour.client, FunctionExported(self.me, options.function_id, pickled, options.name, "", None)
            )
        neighbour.known.add(template.no)
        self._tell(neighbour.client, TemplateDefined(self.me, template.no, options))

    def _run(self, worker: WorkerRecord, tasks: list[Task], now: float) -> None:
        """To a worker, or to the node where the actor lives."""
        if worker.client < 0:
            neighbour = self.neighbours[worker.client]
            self._give(neighbour, tasks)
            for task in tasks:
                task.worker = worker
                worker.in_flight[task.spec.task_id] = task
            return
        if self.neighbours or self._staying or self._makers:
            for position, task in enumerate(tasks):
                if self._staying:
                    self._staying.pop(task.spec.task_id, None)
                if self._lacks_something(task):
                    self._fetch_first(tasks[position:])
                    tasks = tasks[:position]
                    break
        if tasks:
            super()._run(worker, tasks, now)
        elif not worker.in_flight:
            self.scheduler.finished_one(worker, now)

    def _fetch_first(self, tasks: list[Task]) -> None:
        """Back to where they came from: the first of them needs what is not here any more, or not yet."""
        for task in reversed(tasks):
            if task.spec.actor is not None:
                task.worker = None
                self._stay(task)
                continue
            if task.spec.actor_id is None:
                self._staying[task.spec.task_id] = task
            self._run_again(task)

    # ------------------------------------------------------------ given

    def handle_tasks_given(self, event: TasksGiven, now: float) -> None:
        client = event.client
        neighbour = self.neighbours[client]
        named = [object_id for spec, *_ in event.tasks for object_id in spec.deps + spec.nested]
        for object_id in named:
            self._know(object_id, client)
            self.lineage.hold(object_id)  # The end of one task, refused at once, must not take it from the next.
        for report in event.values:
            self._take_report(client, report)
        for spec, template_no, extra, retries_left in event.tasks:
            template, raised = neighbour.templates[template_no], event.raised.get(spec.task_id, 0)
            self._take_task(neighbour, spec, template, extra, retries_left, raised, now)
        for object_id in named:
            self.lineage.release(object_id)

    def _take_task(
        self,
        neighbour: Neighbour,
        spec: TaskSpec,
        template: Template,
        extra: Any,
        retries_left: int,
        raised: int,
        now: float,
    ) -> None:
        options = template.options
        returns = [ids.return_id(spec.task_id, index) for index in range(options.num_returns)]
        if self.up and (spec.actor is not None or (spec.actor_id is not None and extra[1])):
            detached = self._new_task(neighbour, spec, template, retries_left, raised, now)
            self.lineage.hold_arguments(detached)
            if spec.actor is not None:
                self._take_guest(detached, extra)
            else:
                self._take_replay(detached)
            return
        neighbour.owed += 1
        task = self.lineage.tasks.get(spec.task_id)
        if task is not None and task.worker is neighbour and spec.task_id in neighbour.in_flight:
            self._take_back(neighbour, task, returns, extra, retries_left, raised)
            return
        if task is not None or (returns and self._is_known(returns[0], neighbour.client)):
            # The second attempt of its parent, on another node: it runs once.
            if spec.task_id in self.actors.actors:
                self.actors.actors[spec.task_id].unwanted = False  # Its handles were the first attempt's.
            for object_id in returns:
                self._acquire(neighbour, object_id)
            if returns:
                self._owe(neighbour, OF_RESULT, returns, task)
            else:
                request = Request(neighbour.client, OF_RESULT, [spec.task_id], 0, False, False)
                self._reports.append((request, task, None))
            return
        task = self._new_task(neighbour, spec, template, retries_left, raised, now)
        known = [entry for entry in map(self.objects.pop, returns, [None] * len(returns)) if entry is not None]
        self.lineage.add_task(task)
        self._take_over(known)
        for object_id in returns:
            neighbour.held[object_id] = None
        if returns:
            self._owe(neighbour, OF_RESULT, returns, task, runs_first=any(map(self.is_available, known)))
        if spec.actor_id is not None:
            task.caller = extra[0]
            self._enqueue_call(task)
        elif spec.actor is not None:
            self._actor_submitted(task, ActorOptions(*spec.actor), now)
        elif not task.missing:
            self._task_ready(task)

    def _new_task(
        self, neighbour: Neighbour, spec: TaskSpec, template: Template, retries_left: int, raised: int, now: float
    ) -> Task:
        self._tasks_made += 1
        task = Task(spec, template, self._tasks_made, 0, neighbour.client, now)
        task.dirty = True  # For good: whoever gave it records it.
        task.retries_left = retries_left
        task.raised = raised
        return task

    def _take_guest(self, task: Task, extra: Any) -> None:
        raise NotImplementedError

    def _take_replay(self, task: Task) -> None:
        raise NotImplementedError

    def _order_of_call(self, task: Task) -> tuple[Any, bool]:
        raise NotImplementedError

    def _log_result(self, worker: WorkerRecord, result: Any) -> bool:
        raise NotImplementedError

    def _take_back(
        self, neighbour: Neighbour, task: Task, returns: list[bytes], extra: Any, retries_left: int, raised: int
    ) -> None:
        """We gave it to this neighbour, which gives it to us: it runs here, and both want its result."""
        del neighbour.in_flight[task.spec.task_id]
        task.client = neighbour.client
        task.retries_left = retries_left
        task.raised = raised
        task.attempt -= 1
        for object_id in returns:
            self.lineage.hold(object_id)
            neighbour.held[object_id] = None
        if returns:
            self._owe(neighbour, OF_RESULT, returns, task)
        self.lineage.count_missing(task)
        task.worker = None
        task.state = PENDING_ARGS_AVAIL
        if task.spec.actor_id is not None:
            task.caller = extra[0]
            self._came_back[task.spec.task_id] = task
            self._enqueue_call(task)
        elif not task.missing:
            self._task_ready(task)

    def _is_known(self, object_id: bytes, giver: int) -> bool:
        """Another node keeps it, or it has come.  (What the giver itself keeps for us it wants made here.)"""
        entry = self.objects.get(object_id)
        if entry is None or entry.is_error == GONE or self._is_orphan(entry):
            return False
        return entry.away is None or entry.away.keeper != giver

    def _take_over(self, known: list[ObjectEntry]) -> None:
        """These objects were known here, and kept elsewhere or lost; now their own task has come."""
        for entry in known:
            new = self.objects[entry.object_id]
            self.objects[entry.object_id] = entry
            entry.refs += new.refs
            entry.replays += new.replays
            entry.waiters = (entry.waiters or []) + (new.waiters or []) or None
            former, entry.task = entry.task, new.task
            if former is not None:
                former.live_returns -= 1
                self._forget_if_done(former)
            if entry.is_error == GONE:
                entry.data, entry.is_error = None, False
            away, entry.away = entry.away, None
            if away is not None and away.keeper:
                self._give_reference_back(away.keeper, entry.object_id)
            if new.data is not None and entry.data is None:  # Refused at once.
                self.lineage.seal(entry, (new.data, new.size, new.nested), new.is_error, self._now)

    def _forget_if_done(self, task: Task) -> None:
        if task.state >= FINISHED:
            self.lineage.forget_if_unneeded(task)

    def handle_tasks_submitted(self, event: TasksSubmitted, now: float) -> None:
        """A second attempt may submit what was lost (with another node, say), or is known here in part: of its several
        results one that somebody was told of.  From now on their home is here.

        Or what the head keeps for us, and has not got: it may have been lost with a node that the head knew.  Then the
        head has to make it again; it is given the task, and runs it if it has none of that ID."""
        client = self._client(event.client)
        templates, recovery = client.templates, client.actor.recovery if client.actor is not None else None
        logged = recovery.children.get(event.parent_task_id, {}) if recovery is not None else {}
        replaced, kept_above = [], []
        for spec in event.specs:
            num_returns = templates[spec.template_no].options.num_returns
            returns = [ids.return_id(spec.task_id, index) for index in range(num_returns)]
            known = [self.objects[object_id] for object_id in returns if object_id in self.objects]
            if not known or spec.task_id in self.lineage.tasks or spec.task_id in logged:
                continue
            is_call = spec.actor is not None or spec.actor_id is not None
            is_kept_above = not is_call and any(map(self._is_kept_above, known))
            is_lost = any(self._is_orphan(entry) or (entry.is_error == GONE and not is_call) for entry in known)
            if is_kept_above or is_lost or spec.task_id not in self.objects:
                replaced += known
                for entry in known:
                    del self.objects[entry.object_id]
            if is_kept_above:
                kept_above.append(spec.task_id)
        super().handle_tasks_submitted(event, now)
        self._take_over(replaced)
        for task_id in kept_above:
            task = self.lineage.tasks.get(task_id)
            if task is not None and task.state < SUBMITTED_TO_WORKER and task not in self._handed_up:
                if task.state == PENDING_NODE_ASSIGNMENT:
                    self.scheduler.remove(task)
                self._handed_up.append(task)

    def _is_kept_above(self, entry: ObjectEntry) -> bool:
        keeper = entry.away.keeper if entry.away is not None else 0
        return self.up != 0 and keeper == self.up and not self.is_available(entry)

    # ------------------------------------------------------------ results

    def _send_result(self, neighbour: Neighbour, request: Request, task: Task | None) -> None:
        """A task that the neighbour gave has ended.  What is small and names nothing need not be kept for it."""
        entries = [self.objects[object_id] for object_id in request.object_ids if object_id in self.objects]
        lost = [entry.object_id for entry in entries if not self.is_available(entry)]
        if lost:  # Between its coming and now.
            self._owe(neighbour, OF_RESULT, request.object_ids, task)
            return
        neighbour.owed -= 1
        task_id = ids.task_of(request.object_ids[0])
        started_s, finished_s = (task.started_s, task.finished_s) if task is not None else (0.0, 0.0)
        failed = next((entry for entry in entries if entry.is_error), None)
        result: tuple[bytes, int, Any, float, float]
        if failed is not None:
            text = task.error if task is not None and task.error else "it failed"
            # A call that was never begun is not in its actor's log.
            never_begun = task is not None and task.spec.actor_id is not None and not task.started_s
            result = (task_id, CANCELLED if never_begun else ERROR, (failed.data, text), started_s, finished_s)
        elif task is not None and task.state == FAILED and (not entries or task.spec.actor is not None):
            # It returns nothing, or a handle to an actor that died.  (What is known of others is so in spite of that.)
            result = (task_id, ERROR, (b"", task.error or ""), started_s, finished_s)
        else:
            values = [self._describe_value(entry) for entry in entries]
            result = (task_id, OK, values, started_s, finished_s)
        self._tell_result(neighbour, result)
        for entry in entries:
            is_handle = entry.task is not None and entry.task.spec.actor is not None
            if result[1] != OK or (type(entry.data) is bytes and not entry.nested and not is_handle):
                if neighbour.held.pop(entry.object_id, self) is None:
                    self.lineage.release(entry.object_id)

    def _tell_result(self, neighbour: Neighbour, result: Any) -> None:
        last = neighbour.outbox[-1] if neighbour.outbox else None
        if type(last) is TasksFinished:
            last.results.append(result)
        else:
            self._tell(neighbour.client, TasksFinished(self.me, [result]))

    def handle_tasks_finished(self, event: TasksFinished, now: float) -> None:
        if event.client >= 0:
            super().handle_tasks_finished(event, now)
            if self._makers or self._runs_first:
                for task_id, *_ in event.results:
                    ended = self.lineage.tasks.get(task_id)
                    if ended is None or ended.state >= FINISHED:
                        self._has_ended(task_id)
            return
        neighbour = self.neighbours[event.client]
        neighbour.progressed_s = now
        if not self.up:
            self._hungry[event.client] = neighbour
        for task_id, status, payload, started_s, finished_s in event.results:
            task = neighbour.in_flight.pop(task_id, None)
            if task is None:
                self._late_result(task_id, event.client, "did not have this task any more")
                self._refuse_values(event.client, task_id, status, payload)
                continue
            seat = task.worker
            if seat is not None and seat is not neighbour:
                is_replay = seat.actor is not None and not self._log_result(seat, (task_id, status, payload))
                seat.in_flight.pop(task_id, None)
                if seat.actor is not None:
                    self._pumps[seat.actor.actor_id] = seat.actor
                if is_replay:
                    continue
            task.started_s, task.finished_s = started_s, finished_s
            if status == OK:
                if started_s:
                    task.template.learn(finished_s - started_s)
                if task.template.options.kind == ACTOR_CREATION:
                    actor = self.actors.actors.get(task_id)
                    if actor is not None and actor.task is task:
                        self._constructed(actor)
                    else:  # Its home is there.
                        self.lineage.release_arguments(task)
                for index, value in enumerate(payload):
                    self._take_return(event.client, task, index, value)
                self._close(task, FINISHED)
                if task.spec.actor is not None and not task.live_returns and not self._is_home_of(task):
                    self.lineage.tasks.pop(task_id, None)  # Its handles went before it was there.
            elif status == RETRYABLE_ERROR and task.retries_left and not task.cancelled:
                self._raised(task, payload[1])
            else:
                self._end(task, FAILED, payload[0], payload[1])

    def _raised(self, task: Task, text: str) -> None:
        super()._raised(task, text)
        self._tell_giver(task)

    def _tell_giver(self, task: Task) -> None:
        if task.client in self.neighbours:
            self._tell(task.client, AttemptRaised(self.me, task.spec.task_id, task.raised, task.retries_left))

    def handle_attempt_raised(self, event: AttemptRaised, now: float) -> None:
        task = self.neighbours[event.client].in_flight.get(event.task_id)
        if task is not None:
            task.raised, task.retries_left = event.raised, event.retries_left
            if task.children is not None:
                self.lineage.forget_children(task)
            self._tell_giver(task)

    def _take_return(self, client: int, task: Task, index: int, value: tuple[Any, int, tuple[bytes, ...]]) -> None:
        data, size, nested = value
        object_id = ids.return_id(task.spec.task_id, index)
        entry = self.objects.get(object_id)
        is_small, is_handle = type(data) is bytes, task.spec.actor is not None
        task.result_bytes += size
        if entry is None or self.is_available(entry):
            for inner in nested:  # It may bring back what was lost.
                if inner in self.objects:
                    self._know(inner, client, task)
            is_unwanted_handle = is_handle and entry is None and not self._is_home_of(task)
            if is_unwanted_handle or (not is_handle and (nested or not is_small)):
                self._give_reference_back(client, object_id)
            return
        for inner in nested:
            self._know(inner, client, task)
        if (nested or not is_small) and task.template.may_replay and (task.spec.deps or task.spec.nested):
            task.origins = ()
        if is_small:
            self.lineage.seal(entry, value, False, self._now)
            if nested and not is_handle:
                self._give_reference_back(client, object_id)
        else:
            if entry.away is not None and entry.away.keeper:
                self._give_reference_back(entry.away.keeper, object_id)
            entry.away = Away(client, list(data))
            self._now_lies_elsewhere(entry, size, nested)
            if entry.refs <= 0 and not entry.pins:
                self.lineage.free(entry)  # It was kept for a replay, and is too large for that.

    def _refuse_values(self, client: int, task_id: bytes, status: int, payload: Any) -> None:
        """Nobody waits for that task any more (its actor was buried here): what the neighbour keeps for it may go."""
        if status == OK:
            for index, (data, _, nested) in enumerate(payload):
                if type(data) is not bytes or nested:
                    self._give_reference_back(client, ids.return_id(task_id, index))

    def _close(self, task: Task, state: int) -> None:
        if self._is_guests(task):
            task.state = state
            return
        self._came_back.pop(task.spec.task_id, None)
        self._staying.pop(task.spec.task_id, None)
        super()._close(task, state)
        if self._makers or self._runs_first:
            self._has_ended(task.spec.task_id)
        if task.client < 0 and not task.template.options.num_returns:
            self._reports.append((Request(task.client, OF_RESULT, [task.spec.task_id], 0, False, False), task, None))

    def _is_home_of(self, creation: Task) -> bool:
        """This node has the record of the actor that the task makes."""
        actor = self.actors.actors.get(creation.spec.task_id)
        return actor is not None and actor.task is creation

    def _is_guests(self, task: Task) -> bool:
        """The making of an actor that has its home elsewhere: the home has the record of that."""
        return self.up != 0 and task.client == self.up and task.spec.actor is not None

    # ------------------------------------------------------------ cancelling

    def _cancel(self, task: Task, force: bool) -> None:
        if task.state == SUBMITTED_TO_WORKER and task.worker is not None and task.worker.client < 0:
            task.cancelled = True
            self._tell(task.worker.client, CancelRequested(self.me, task.spec.task_id, force, True))
        else:
            self._staying.pop(task.spec.task_id, None)
            super()._cancel(task, force)

    def handle_cancel_requested(self, event: CancelRequested, now: float) -> None:
        task_id = ids.task_of(event.object_id)
        entry = self.objects.get(event.object_id)
        if task_id in self.lineage.tasks or entry is None or entry.away is None or not entry.away.keeper:
            super().handle_cancel_requested(event, now)
            return
        self._tell(entry.away.keeper, CancelRequested(self.me, event.object_id, event.force, event.recursive))
        if event.request_id:
            self._answer(event.client, event.request_id, True)

    # ------------------------------------------------------------ the death of a node

    def _task_lost(self, task: Task, neighbour: Neighbour, reason: str) -> None:
        """It may have run there, halfway or to its end: running it again costs one of its retries."""
        options, short = task.template.options, ids.short(task.spec.task_id)
        if task.cancelled:
            self._fail_cancelled(task)
        elif task.retries_left:
            task.retries_left -= task.retries_left > 0
            self._retried(task, f"ended when node {neighbour.label} {reason}")
            self._run_again(task)
        else:
            self._fail(
                task, "NodeDiedError",
                f"node {neighbour.label} {reason} while it had {options.name}() [task {short}] in hand, attempt "
                f"{task.attempt} of {options.max_retries + 1}.\n"
                "The task may have run partway. minray will not run it again.\n"
                f"To allow more attempts: @minray.remote(max_retries=...).  Its history: minray story {short}",
            )  # fmt: skip

    def _references_lost(self, neighbour: Neighbour) -> None:
        """What it held, and what it waited for."""
        for request in neighbour.awaits.values():
            request.remaining = 0
        neighbour.awaits.clear()
        self._release_held(neighbour)
        self._release_pins(neighbour)

    def _strike_off_node(self, neighbour: Neighbour) -> list[tuple[ObjectEntry, bool, bool]]:
        """All that it kept for us or had a copy of: each with whether it kept it, and whether it was available."""
        node_no, found = -neighbour.client, []
        for entry in self.objects.values():
            away = entry.away
            if away is not None and (away.keeper == neighbour.client or node_no in away.places):
                found.append((entry, away.keeper == neighbour.client, self.is_available(entry)))
                if node_no in away.places:
                    away.places.remove(node_no)
                if away.keeper == neighbour.client:
                    away.keeper, away.asked = 0, False
        return found

    def _objects_lost(
        self, neighbour: Neighbour, struck_off: list[tuple[ObjectEntry, bool, bool]], retried: list[Task], reason: str
    ) -> None:
        """Made again by replays, or by the tasks that run again anyway."""
        orphans: dict[ObjectEntry, None] = {}
        lost = []
        for entry, was_kept, was_available in struck_off:
            away = entry.away
            if away is None or self.objects.get(entry.object_id) is not entry or self.is_available(entry):
                continue
            if was_available:
                self._is_nowhere(entry)
                self._event("object_lost", entry.object_id, f"node {neighbour.label} {reason}", self._now)
            if away.keeper:
                if entry.waiters:
                    self._ask(entry)
                continue
            if was_kept and self._is_foreign(entry):
                orphans[entry] = None
            lost.append(entry)
        runnable = [task.spec for task in retried if task.state < FINISHED and not task.missing]
        for entry in lost:
            if entry.refs <= 0 or entry.data is not None:
                continue
            if entry in orphans and entry.task is None and not ids.is_checkpoint(entry.object_id):
                # What was given its name is none of its makers.
                named = entry.object_id
                makers = [spec.task_id for spec in runnable if named not in spec.deps and named not in spec.nested]
                self._may_come_back(entry, makers)
            else:
                self._want_again(entry)

    def _may_come_back(self, entry: ObjectEntry, makers: list[bytes]) -> None:
        """Any of these tasks may bring back what was lost with its keeper; when all have ended, it is known."""
        if any(orphan.entry is entry for task_id in makers for orphan in self._makers.get(task_id, ())):
            return
        orphan = Orphan(entry, len(makers))
        for task_id in makers:
            self._makers.setdefault(task_id, []).append(orphan)
        if not makers:
            self._forsaken.append(orphan)

    def _rebuild(self, entry: ObjectEntry) -> None:
        super()._rebuild(entry)
        task = entry.task
        if task is not None and self._is_orphan(entry):
            self._may_come_back(entry, [task.spec.task_id] if task.state < FINISHED else [])

    def _has_ended(self, task_id: bytes) -> None:
        request = self._runs_first.pop(task_id, None)
        if request is not None and request.remaining > 0:
            request.remaining -= 1
            if not request.remaining:
                self._request_ready(request)
        for orphan in self._makers.pop(task_id, ()):
            orphan.makers -= 1
            if not orphan.makers:
                self._forsaken.append(orphan)

    def _settle_orphans(self) -> None:
        """Everything that could have made them again has ended: what is not there by now does not come."""
        forsaken, self._forsaken = self._forsaken, []
        for orphan in forsaken:
            entry = orphan.entry
            if self.objects.get(entry.object_id) is entry and self._is_orphan(entry):
                task, entry.task = entry.task, None
                if task is not None:
                    task.live_returns -= 1
                    self._forget_if_done(task)
                self._rebuild(entry)


class Orphan:
    """An object whose keeper has died, until one of the tasks that may bring it back has, or all have ended."""

    def __init__(self, entry: ObjectEntry, makers: int) -> None:
        self.entry = entry
        self.makers = makers
