"""Tasks, at the node: submitted, queued when their arguments are there, handed to workers, finished or failed.

What is queued, and which worker is next, is the scheduler's; what a result wakes is the lineage's.
A retry is a task put back in front of its queue; a task has one end, `_close`.
"""

from __future__ import annotations

import json
from abc import abstractmethod
from collections.abc import Iterable
from typing import Any

from minray import ids
from minray.actor_table import Actor, Recovery
from minray.exceptions import error_payload
from minray.lineage import ObjectEntry, Task, Template
from minray.messages import (
    DRIVER, CancelRequested, CancelTask, DefineFunction, DefineTemplate, FunctionExported, GcsRecovered, GcsStalled,
    KillWorker, MarkReconstructed, RestoreActor, RunTasks, SetUpEnvironment, TasksFinished, TasksReturned,
    TasksSubmitted, TemplateDefined,
)  # fmt: skip
from minray.node_objects import NodeObjects
from minray.same_pickle import says_the_same
from minray.scheduler import Client, Shape, WorkerRecord
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, CANCELLED, FAILED, FINISHED, OK, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT,
    RETRYABLE_ERROR, RUNNING, STREAMING, SUBMITTED_TO_WORKER, UNIT, ActorOptions, TaskOptions, TaskSpec,
)  # fmt: skip

SHORT_TASK_S = 0.001
"""Tasks that stay below this may hold up the result of their predecessor."""


def amounts(resources: Iterable[tuple[str, int]]) -> str:
    """For people: "2 CPU, 17,693,560,012 bytes of memory"."""
    return ", ".join(
        f"{units // UNIT:,} bytes of memory" if name == "memory" else f"{units / UNIT:g} {name}"
        for name, units in resources
    )


class NodeTasks(NodeObjects):
    def is_another(self, old: Task, spec: TaskSpec, template: Template) -> bool:
        """Whether what is submitted under the ID of `old` differs from it."""
        was, before, now = old.spec, old.template.options, template.options
        return (
            (was.deps, was.nested, was.actor_id) != (spec.deps, spec.nested, spec.actor_id)
            or (before.method, before.num_returns) != (now.method, now.num_returns)
            or before.streaming != now.streaming
            or not says_the_same(was.args, spec.args)
            or not self._is_same_function(before.function_id, now.function_id)
        )  # fmt: skip

    def _is_same_function(self, one: bytes, other: bytes) -> bool:
        functions = self.functions
        return one == other or (
            one in functions and other in functions and says_the_same(functions[one][1], functions[other][1])
        )

    # ------------------------------------------------------------ functions and tasks come in

    def handle_function_exported(self, event: FunctionExported, now: float) -> None:
        if event.function_id not in self.functions:
            no = len(self.functions) + 1
            self.functions[event.function_id] = (no, event.pickled)
            self._row("functions", (no, event.function_id, event.name, event.module, event.pickled, event.source))

    def handle_template_defined(self, event: TemplateDefined, now: float) -> None:
        options = TaskOptions(*event.options)
        template = self._template_of.get(options)
        if template is None:
            template = self._template_of[options] = Template(len(self.templates), options, self._shape_of(options))
            self.templates.append(template)
            self._row("options", self._options_row(template))
        self._client(event.client).templates[event.template_no] = template

    def _options_row(self, template: Template) -> tuple[Any, ...]:
        options = template.options
        function_no = self.functions[options.function_id][0] if options.function_id else None
        resources = {name: amount / UNIT for name, amount in options.resources}
        other: dict[str, Any] = {"method": options.method, "max_concurrency": options.max_concurrency}
        if options.runtime_env:
            other["runtime_env"] = json.loads(options.runtime_env)
        if options.max_calls:
            other["max_calls"] = options.max_calls
        if options.streaming:
            other.update(streaming=options.streaming, backpressure=options.backpressure)
        if options.placement:
            other["placement_group"], other["bundle"] = options.placement[0].hex(), options.placement[1]
        return (
            template.no, function_no, options.name, options.kind, options.num_returns, json.dumps(resources),
            options.max_retries, json.dumps(other),
        )  # fmt: skip

    def handle_tasks_submitted(self, event: TasksSubmitted, now: float) -> None:
        client = self._client(event.client)
        parent = self.lineage.tasks.get(event.parent_task_id)
        parent_no = 0
        if parent is not None:
            parent_no = parent.no
            parent.last_child = max(parent.last_child, *(ids.counter_of(spec.task_id) for spec in event.specs))
        held = client.held if event.client != DRIVER else None
        may_come_again = parent is not None and parent.retries_left and parent.state < FINISHED
        templates, tasks, dirty, stalled = client.templates, self.lineage.tasks, self._dirty, self._stall is not None
        specs = event.specs
        recovery = client.actor.recovery if client.actor is not None else None
        if recovery is not None:
            specs = self._without_known_children(recovery, event, client)
        for spec in specs:
            if spec.task_id in tasks or (spec.task_id in self.objects and held is not None):
                if self._submitted_again(spec, client, parent):
                    continue
            self._tasks_made += 1
            task = Task(spec, templates[spec.template_no], self._tasks_made, parent_no, event.client, now)
            task.dirty = True
            if not stalled:
                dirty.append(task)
            self.lineage.add_task(task)
            if held is not None:
                for index in range(task.template.num_returns):
                    held[ids.return_id(spec.task_id, index)] = None
                if may_come_again and spec.actor is None and not stalled:
                    self.lineage.keep_child(parent, task)  # type: ignore[arg-type]
            if stalled:
                self._refuse_unrecorded(task)
            elif spec.actor_id is not None:
                self._call_submitted(task, client)
            elif spec.actor is not None:
                self._actor_submitted(task, ActorOptions(*spec.actor), now)
            elif not task.missing:
                self._task_ready(task)
        if recovery is not None:
            self._keep_children(recovery, event.parent_task_id, specs, templates)

    def handle_gcs_stalled(self, event: GcsStalled, now: float) -> None:
        self._stall = event
        self._refused = 0
        self._event("gcs_stalled", b"", event.why, now)

    def handle_gcs_recovered(self, event: GcsRecovered, now: float) -> None:
        self._stall = None
        self._event("gcs_recovered", b"", f"meanwhile {self._refused:,} tasks and objects were refused", now)

    def _refuse_unrecorded(self, task: Task) -> None:
        """The GCS cannot write: what is taken in now would wait for it in memory, more and more of it.

        For the same reason it gets no row: marked as if it stood in the list of those to record, it never will."""
        assert self._stall is not None
        spec, name = task.spec, task.template.options.name
        task.missing = -1  # What it waits for will not start it.
        actor = self.actors.actors.get(spec.actor_id or b"")
        if actor is not None:
            actor.pending += 1  # Its end counts one down.
        elif spec.actor is not None:
            # Dead in a moment, and only there so that its calls know why: it takes no name, and the session no handle.
            options = ActorOptions(*spec.actor)._replace(name=None, detached=False)
            actor = self.actors.add(task, options, self._now)
        error = self._stall_error(f"{name} [task {ids.short(spec.task_id)}] was not run")
        self._end(task, FAILED, error, f"{self._stall.error}: {self._stall.why}")
        if spec.actor is not None and actor is not None:
            self.actors.dirty.pop(actor.no, None)

    def _submitted_again(self, spec: TaskSpec, client: Client, parent: Task | None) -> bool:
        """The second attempt of a parent submits its children anew, under the same IDs: they run once.

        False: this is another task, and there is nothing to confuse it with."""
        template = client.templates[spec.template_no]
        known = self.lineage.tasks.get(spec.task_id)
        if known is not None:
            another = self.is_another(known, spec, template)
            if parent is not None and self._is_forgettable(known, another):
                if known.state < FINISHED:
                    self._cancel(known, force=False)
                self.lineage.forget_child(parent, known)
                if spec.task_id not in self.lineage.tasks:
                    return False
            if another:
                self._diverged(known, template, parent)
        actor = self.actors.actors.get(spec.task_id) if spec.actor is not None else None
        if actor is not None:
            actor.unwanted = False  # Its handles were the first attempt's.
        if known is not None and known.template.options.streaming == template.options.streaming == STREAMING:
            self._read_again(known)
        for index in range(template.options.num_returns):
            self._acquire(client, ids.return_id(spec.task_id, index))
        return True

    def _is_forgettable(self, known: Task, another: bool) -> bool:
        """Nobody has or will see what became of it, and it is of no use: another, or not there any more."""
        if known.spec.actor is not None or known.state in (SUBMITTED_TO_WORKER, RUNNING):
            return False
        returns = [
            self.objects.get(ids.return_id(known.spec.task_id, index))
            for index in range(known.template.options.num_returns)
        ]
        if any(entry is not None and (entry.refs > 0 or entry.pins) for entry in returns):
            return False
        if known.template.options.streaming:
            return self._is_forgettable_stream(known, another, returns)
        gone = known.state >= FINISHED and any(entry is None or entry.data is None for entry in returns)
        return another or gone

    def _task_ready(self, task: Task) -> None:
        """All that it depends on is there (perhaps as an error: the worker then says whose, without running it)."""
        actor_id = task.spec.actor_id
        if actor_id is not None:
            task.state = PENDING_NODE_ASSIGNMENT
            self._pumps[actor_id] = self.actors.actors[actor_id]
        elif task.template.shape.queue or self.scheduler.feasible(task.template.shape):
            # First, if it is a replay: somebody waits for something that was there.
            (self.scheduler.enqueue_first if task.attempt else self.scheduler.enqueue)(task)
        else:
            self._refuse(task)

    def _arguments_ready(self, task: Task) -> None:
        """What it had to wait for has come."""
        self._mark(task)
        self._task_ready(task)

    def _refuse(self, task: Task) -> None:
        options = task.template.options
        wants, has = amounts(options.resources), amounts(self.scheduler.total.items())
        kind = "ActorUnschedulableError" if options.kind == ACTOR_CREATION else "TaskUnschedulableError"
        message = (
            f"{options.name} needs {wants}, and this node has {has} in all, so it can never run. It was not run. "
            "Ask for less (.options(num_cpus=..., resources=...)), or give minray.init() more (num_cpus, resources)."
        )
        self._fail(task, kind, message)

    # ------------------------------------------------------------ tasks go out

    def _run(self, worker: WorkerRecord, tasks: list[Task], now: float) -> None:
        """Hand tasks to a worker: what it does not know yet first, then all of them in one command."""
        in_flight = worker.in_flight
        if not in_flight:
            worker.progressed_s = now
        batch = []
        for task in tasks:
            template = task.template
            if template.no not in worker.known:
                self._introduce(worker, template)
            spec = task.spec
            values = [self._fetch(worker, object_id) for object_id in spec.deps] if spec.deps else None
            task.state = SUBMITTED_TO_WORKER
            task.worker = worker
            task.attempt += 1
            in_flight[spec.task_id] = task
            mark: int = template.may_repeat and template.mean_s is not None and template.max_s < SHORT_TASK_S
            if task.raised:
                mark = -task.raised
            batch.append((spec.task_id, template.no, spec.args, values, mark))
        if tasks[0].spec.actor is not None:
            actor = self.actors.actors[tasks[0].spec.task_id]
            actor.worker = actor.host = worker
            worker.actor = actor
            self._row("workers", self._worker_row(worker, 1, now, None))
            if actor.restarts:
                self.wire.append(MarkReconstructed(worker.client))
            recovery = actor.recovery
            if recovery is not None and recovery.checkpoint is not None:
                fetched = self._fetch(worker, recovery.checkpoint)
                self.wire.append(RestoreActor(worker.client, recovery.num_checkpoints, fetched))  # type: ignore[arg-type]
        self.wire.append(RunTasks(worker.client, batch))

    def _introduce(self, worker: WorkerRecord, template: Template) -> None:
        options = template.options
        if options.function_id and options.function_id not in worker.known_functions:
            worker.known_functions.add(options.function_id)
            self.wire.append(
                DefineFunction(worker.client, options.function_id, self.functions[options.function_id][1])
            )
        if options.runtime_env and not worker.environment:
            worker.environment = options.runtime_env
            self.wire.append(SetUpEnvironment(worker.client, options.runtime_env))
        worker.known.add(template.no)
        self.wire.append(DefineTemplate(worker.client, template.no, options))

    # ------------------------------------------------------------ results come back

    def handle_tasks_finished(self, event: TasksFinished, now: float) -> None:
        worker = self.scheduler.workers[event.client]
        in_flight, objects, dirty = worker.in_flight, self.objects, self._dirty
        worker.progressed_s = now
        worker.asked_s = 0.0
        worker.taking_back = False
        results = event.results
        actor = worker.actor
        if actor is not None and actor.recovery is not None:
            results = self._note_executed(worker, actor, actor.recovery, results)
        for task_id, status, payload, started_s, finished_s in results:
            task = in_flight.pop(task_id, None)
            if task is None:
                self._late_result(task_id, event.client, "did not have this task any more")
                continue
            task.started_s, task.finished_s = started_s, finished_s
            template = task.template
            took = finished_s - started_s  # From here as Template.learn, which would be a call for each task.
            mean_s = template.mean_s
            template.mean_s = took if mean_s is None else mean_s + 0.1 * (took - mean_s)
            template.max_s = took if took > template.max_s else template.max_s * 0.99 + took * 0.01
            if status == OK and type(payload) is bytes and task.spec.actor is None and task.error is None:
                # The hot path: one small return, one look-up, nobody to ask.
                task.result_bytes = len(payload)
                task.state = FINISHED
                if not task.dirty:
                    task.dirty = True
                    dirty.append(task)
                spec = task.spec
                if spec.deps or spec.nested:
                    self.lineage.release_arguments(task)
                if task.children is not None:
                    self.lineage.forget_children(task)
                entry = objects.get(task_id)
                if entry is not None:
                    if entry.waiters is None and entry.data is None:
                        entry.data, entry.size = payload, len(payload)
                    elif entry.data is None:
                        self.lineage.seal(entry, (payload, len(payload), ()), False, now)
                else:
                    self.lineage.tasks.pop(task_id, None)
                if spec.actor_id is not None:
                    self._call_ended(task)
            else:
                self._finished_otherwise(worker, task, status, payload, now)
        if not in_flight:
            self.scheduler.finished_one(worker, now)
        if actor is not None:
            self._pumps[actor.actor_id] = actor

    def _finished_otherwise(self, worker: WorkerRecord, task: Task, status: int, payload: Any, now: float) -> None:
        options = task.template.options
        if options.streaming and status == OK:
            self._count_items(task)
        if (status != OK or task.error) and self._grants:  # Of several returns some may have been stored already.
            for index in range(options.num_returns):
                self._revoke(worker.client, ids.return_id(task.spec.task_id, index), now)
        if task.error is not None:
            self._fail(task, "ReplayDivergedError", f"{task.error}. It has run to its end; its result was dropped.")
            return
        if status == RETRYABLE_ERROR and task.retries_left and not task.cancelled:
            self._raised(task, payload[1])
            return
        if status == ACTOR_EXITED and worker.actor is not None:
            actor = worker.actor
            self._bury(actor, payload[1], now, begun=0)  # It says so when all that had begun has ended.
            if task is not actor.task:
                self._fail_call(task, actor, may_have_run=True)
            return
        if options.kind == ACTOR_CREATION and status == OK:
            self._constructed(self.actors.actors[task.spec.task_id])
        if status == OK:
            values = [(payload, len(payload), ())] if type(payload) is bytes else payload
            for index, value in enumerate(values):
                task.result_bytes += value[1]
                if type(value[0]) is not bytes:
                    self._grants.pop((worker.client, ids.return_id(task.spec.task_id, index)), None)
                self.lineage.accept_return(task, index, value, False, now)
            if options.streaming:
                self._close_stream(task)
            else:
                self._close(task, FINISHED)
        elif status == CANCELLED:
            self._fail_cancelled(task)
        else:
            self._end(task, FAILED, payload[0], payload[1])

    def _raised(self, task: Task, text: str) -> None:
        """It is retried, with children of its own: those of the attempt that has come to its end may be why it raised.

        (What they still do, they do.  After a crash, of which nobody knows how far the attempt had come, and to rebuild
        what was lost, the number stays as it is, and the children are found again.)"""
        task.retries_left -= task.retries_left > 0
        task.raised += 1
        if task.children is not None:
            self.lineage.forget_children(task)
        self._retried(task, f"raised {text}")
        self._run_again(task)

    def _run_again(self, task: Task) -> None:
        """Back to the front of its queue, or first to where it waits for arguments that were lost meanwhile."""
        task.worker = None
        task.started_s = task.finished_s = 0.0
        if task.spec.deps:
            self.lineage.count_missing(task)
        task.state = PENDING_ARGS_AVAIL if task.missing else PENDING_NODE_ASSIGNMENT
        if task.spec.actor_id is not None:
            actor = self.actors.actors[task.spec.actor_id]
            actor.enqueue_first(task)
            self._pumps[actor.actor_id] = actor
        elif not task.missing:
            self.scheduler.enqueue_first(task)

    def handle_tasks_returned(self, event: TasksReturned, now: float) -> None:
        """Unstarted tasks come back, to the front and without losing an attempt; those that were cancelled end."""
        worker = self.scheduler.workers[event.client]
        worker.asked_s = 0.0
        for task_id in reversed(event.task_ids):
            if event.forgets < worker.forgotten.get(task_id, 0):
                continue  # It had not read yet that others have this one (or it has by now, again).
            task = worker.in_flight.pop(task_id, None)
            if task is not None:
                self._unstarted(worker, task)
        if event.forgets == worker.forgets:
            # With empty hands it is not asked again before it has finished something.
            worker.taking_back = worker.taking_back and not event.task_ids
            worker.forgotten.clear()
        if not worker.in_flight:
            self.scheduler.finished_one(worker, now)
        if worker.actor is not None:
            self._pumps[worker.actor.actor_id] = worker.actor

    def _unstarted(self, worker: WorkerRecord, task: Task) -> None:
        for object_id in task.spec.deps:
            if object_id in worker.pins:
                self._unpin(worker, object_id)
        task.worker = None
        task.started_s = 0.0  # Perhaps it was taken to be running: see take_rows.
        self._handed_back(task)

    def _handed_back(self, task: Task) -> None:
        """A worker had it in hand and does not run it: as if it had never been there.  It ends if it was cancelled."""
        task.attempt -= 1
        if task.cancelled:
            self._fail_cancelled(task)
        else:
            self._run_again(task)

    # ------------------------------------------------------------ ends of tasks

    def _fail(self, task: Task, kind: str, message: str, **attributes: Any) -> None:
        self._end(task, FAILED, error_payload(kind, message, **attributes), f"{kind}: {message.splitlines()[0]}")

    def _fail_cancelled(self, task: Task, kind: str = "TaskCancelledError") -> None:
        name = task.template.options.name
        ran = "It may have run partway." if task.started_s or task.attempt else "It had not started."
        self._fail(
            task, kind, f"{name} [task {ids.short(task.spec.task_id)}] was cancelled. {ran}",
            task_id=task.spec.task_id.hex(),
        )  # fmt: skip

    def _end(self, task: Task, state: int, error: bytes, text: str) -> None:
        """Over without a value: every return is this error."""
        task.error = text
        for index in range(task.template.options.num_returns):
            self.lineage.accept_return(task, index, (error, len(error), ()), True, self._now)
        if task.template.options.streaming:
            task.origins = None  # It is not run again for the items that it had yielded.
        self._close(task, state)
        if task.template.options.streaming:
            self._stream_ended(task, error)
        if task.spec.actor is not None:
            self._creation_failed(task, error, text)

    def _close(self, task: Task, state: int) -> None:
        task.state = state
        task.finished_s = task.finished_s or self._now
        self._mark(task)
        if task.children is not None:
            self.lineage.forget_children(task)
        if task.spec.actor is None:  # An actor's constructor may have to run again.
            self.lineage.release_arguments(task)
        self.lineage.forget_if_unneeded(task)
        if task.spec.actor_id is not None:
            self._call_ended(task)

    def handle_cancel_requested(self, event: CancelRequested, now: float) -> None:
        task = self.lineage.tasks.get(ids.task_of(event.object_id))
        refused = event.force and task is not None and task.spec.actor_id is not None
        if event.request_id:
            self._answer(event.client, event.request_id, not refused)
        if task is None or task.state >= FINISHED or refused:
            return
        if event.recursive and task.attempt:  # One that never ran has none.
            for descendant in reversed(self._descendants(task)):
                if descendant.state < FINISHED:
                    self._cancel(descendant, event.force)
        self._cancel(task, event.force)

    def _descendants(self, task: Task) -> list[Task]:
        """What it has submitted, what that has submitted, and so on.  Their IDs follow from its own; but what attempts
        that raised have submitted is looked for in the whole table."""
        tasks = self.lineage.tasks
        found = [task]
        for parent in found:
            if parent.raised:
                found += [child for child in tasks.values() if child.parent_no == parent.no]
            elif parent.last_child:
                prefix = ids.children_prefix(parent.spec.task_id)
                children = (tasks.get(ids.pack_id(prefix, n, 0)) for n in range(1, parent.last_child + 1))
                found += [child for child in children if child is not None]
        return found[1:]

    def _cancel(self, task: Task, force: bool) -> None:
        if task.spec.actor is not None:
            return  # Actors are ended by kill(), or by their last handle.
        task.cancelled = True
        if task.state == PENDING_ARGS_AVAIL:
            task.missing = -1  # What it waits for will not start it.
            self._let_others_pass(task)
            self._fail_cancelled(task)
        elif task.state == PENDING_NODE_ASSIGNMENT:
            if task.spec.actor_id is None:
                self.scheduler.remove(task)
            self._let_others_pass(task)
            self._fail_cancelled(task)
        elif task.worker is not None:
            if force and task.spec.actor_id is None:  # A call must not take its actor's other callers with it.
                self.wire.append(KillWorker(task.worker.client, only_if_running=task.spec.task_id))
            self.wire.append(CancelTask(task.worker.client, task.spec.task_id))

    # ------------------------------------------------------------ what it needs of the chapters that follow

    @abstractmethod
    def _shape_of(self, options: TaskOptions) -> Shape: ...

    @abstractmethod
    def _diverged(self, old: Task, template: Template, parent: Task | None) -> None: ...

    @abstractmethod
    def _is_forgettable_stream(self, task: Task, another: bool, returns: list[ObjectEntry | None]) -> bool: ...

    @abstractmethod
    def _read_again(self, task: Task) -> None: ...

    @abstractmethod
    def _is_past(self, task: Task, object_id: bytes) -> bool: ...

    @abstractmethod
    def _go_on_or_start_over(self, task: Task) -> None: ...

    @abstractmethod
    def _count_items(self, task: Task) -> None: ...

    @abstractmethod
    def _close_stream(self, task: Task) -> None: ...

    @abstractmethod
    def _stream_ended(self, task: Task, error: bytes | None) -> None: ...

    @abstractmethod
    def _without_known_children(self, recovery: Recovery, event: TasksSubmitted, client: Client) -> list[TaskSpec]: ...

    @abstractmethod
    def _keep_children(
        self, recovery: Recovery, parent_id: bytes, specs: list[TaskSpec], templates: dict[int, Template]
    ) -> None: ...

    @abstractmethod
    def _note_executed(
        self, worker: WorkerRecord, actor: Actor, recovery: Recovery, results: list[Any]
    ) -> list[Any]: ...

    @abstractmethod
    def _actor_submitted(self, task: Task, options: ActorOptions, now: float) -> None: ...

    @abstractmethod
    def _call_submitted(self, task: Task, client: Client) -> None: ...

    @abstractmethod
    def _call_ended(self, task: Task) -> None: ...

    @abstractmethod
    def _let_others_pass(self, task: Task) -> None: ...

    @abstractmethod
    def _constructed(self, actor: Actor) -> None: ...

    @abstractmethod
    def _creation_failed(self, task: Task, error: bytes, text: str) -> None: ...

    @abstractmethod
    def _bury(self, actor: Actor, reason: str, now: float, advice: str = "", begun: int | None = None) -> None: ...

    @abstractmethod
    def _fail_call(self, task: Task, actor: Actor | None, may_have_run: bool) -> None: ...
