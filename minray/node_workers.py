"""Workers, at the node: they start, they die, and they stand behind a task that does not let go.

What a dead worker held comes back in node_objects.py; here is decided what becomes of the tasks
that it had in hand, and what is done about those that wait in vain.
"""

from __future__ import annotations

from minray import ids
from minray.lineage import Task
from minray.messages import ExitWorker, Forget, ResourcesAdded, Ticked, Warn, WorkerDied, WorkerStarted
from minray.node_placement import NodePlacement
from minray.node_tasks import amounts
from minray.scheduler import SPENT, WorkerRecord

START_ATTEMPTS = 3
"""So many workers in a row that die before they are up, and waiting tasks fail rather than wait for ever."""


class NodeWorkers(NodePlacement):
    def handle_worker_started(self, event: WorkerStarted, now: float) -> None:
        worker = self.scheduler.workers.get(event.client)
        if worker is not None:
            self._start_failures = 0
            worker.started_s = now
            self.scheduler.worker_started(worker, event.pid, now)
            self._row("workers", self._worker_row(worker, 1, now, None))

    def handle_worker_died(self, event: WorkerDied, now: float) -> None:
        """Replace the worker; run what it was running again, or fail it.

        The task that it was executing may have run halfway, so its side effects may already
        have happened: running it again costs one of its retries.  Tasks that it had only been
        handed go back as they were.  Those before it had ended, and their results were lost on the
        way: they go back, too, but not if they must not run twice.
        """
        worker = self.scheduler.workers.get(event.client)
        if worker is None:
            self._release_memory(event.client, now)
            return
        if not worker.pid and worker.client > self._start_failed_until:
            self._start_failures += 1  # One, where several were starting: with their zygote they all die at once.
            self._start_failed_until = self.scheduler.workers_made
        in_flight = list(worker.in_flight.values())
        running = event.running if event.running in worker.in_flight else None
        if running is None and in_flight:
            running = in_flight[0].spec.task_id
        if running is not None:
            task = worker.in_flight[running]
            task.started_s = task.started_s or worker.progressed_s
        self._inherit(worker)
        self._forget_worker(worker, event.reason, now)
        self._release_memory(worker.client, now)
        who = self.worker_id(worker.client)
        self._event("worker_died", who, f"worker {worker.client} (pid {worker.pid}) {event.reason}", now)
        if worker.actor is not None:
            self._actor_worker_died(worker, worker.actor, event.running, event.reason, now)
            return
        had_begun = False
        for task in reversed(in_flight):
            if task.spec.task_id == running or (had_begun and not task.template.may_repeat):
                had_begun = True
                self._attempt_lost(task, worker, event.reason)
            else:
                self._handed_back(task)
        if self._start_failures >= START_ATTEMPTS:
            self._start_failures = 0
            for task in self.scheduler.remove_all():
                self._fail(task, "WorkerCrashedError", f"no worker could be started: {event.reason}. It was not run.")

    def _attempt_lost(self, task: Task, worker: WorkerRecord, reason: str) -> None:
        options, short = task.template.options, ids.short(task.spec.task_id)
        if task.cancelled:
            self._fail_cancelled(task, "TaskCancelledByForceError")
        elif task.retries_left:
            task.retries_left -= task.retries_left > 0
            self._retried(task, f"ended when worker {worker.client} (pid {worker.pid}) {reason}")
            self._run_again(task)
        else:
            self._fail(
                task,
                "WorkerCrashedError",
                f"worker {worker.client} (pid {worker.pid}, node {self.label}) {reason} while running "
                f"{options.name}() [task {short}], attempt {task.attempt} of {options.max_retries + 1}.\n"
                f"The task may have run partway. minray will not run it again.\n{self._where_to_look(worker, reason)}"
                f"To allow more attempts: @minray.remote(max_retries=...).  Its history: minray story {short}",
            )

    def handle_resources_added(self, event: ResourcesAdded, now: float) -> None:
        """What waits for them runs, with the dispatch that follows every event."""
        self.scheduler.add_resources(event.resources)

    def handle_ticked(self, event: Ticked, now: float) -> None:
        for worker in self.scheduler.tick(now):
            spent = worker.environment == SPENT
            why = "it has run a function max_calls times" if spent else "more workers were idle than there are CPUs"
            self._forget_worker(worker, f"was told to end: {why}", now)
            self.wire.append(ExitWorker(worker.client))
        for task in self.scheduler.starved(now):
            self._warn_of_starvation(task, now)
        self._tell_waiting_groups(now)
        for worker in self.scheduler.held(now):
            self._take_unasked(worker, dict(event.executing).get(worker.client))

    def _warn_of_starvation(self, task: Task, now: float) -> None:
        options = task.template.options
        holders = "actors and placement groups" if self.scheduler.bundles else "actors"
        text = (
            f"{options.name} [task {ids.short(task.spec.task_id)}] needs {amounts(options.resources)} and waits: "
            f"{holders} hold too much of the {amounts(self.scheduler.total.items())} of this node. It runs when "
            f"{holders} end; if they shall not, give minray.init() more, or the actors less (num_cpus=0 is enough for "
            "those that mostly wait)."
        )
        self._event("task_starved", task.spec.task_id, text, now)
        self.wire.append(Warn(text))

    def _take_unasked(self, worker: WorkerRecord, executing: bytes | None) -> None:
        """What comes after the task that a held worker executes has not started, and will not: others may have it.

        What comes before may have finished: its result waits in the worker."""
        worker.held_s = worker.asked_s = 0.0
        unstarted: list[bytes] = []
        if executing in worker.in_flight:
            order = list(worker.in_flight)
            unstarted = order[order.index(executing) + 1 :]
        self.wire.append(Forget(worker.client, unstarted))
        if unstarted:
            worker.forgets += 1
            worker.taking_back = True  # It is given none of them again before it has been heard.
            for task_id in reversed(unstarted):
                worker.forgotten[task_id] = worker.forgets
                self._unstarted(worker, worker.in_flight.pop(task_id))
