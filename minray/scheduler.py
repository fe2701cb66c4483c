"""Which worker runs which task, and when: resources, queues by shape, leases, prefetch, take-back.

Pure.  Owns the workers' records, the resources and the queues of runnable tasks.  It does
not know objects or arguments: a task comes here once its dependencies are ready.

* A *shape* is one set of demands ({CPU: 1}, say) with one queue.  A task that cannot run
  blocks only tasks of its own shape, and no queue is ever scanned.
* A worker *leases* the resources of a shape and then runs tasks of that shape one after the
  other; it goes idle, and the lease ends, when it has none left.
* A leased worker is handed more tasks than the one it runs (policy.prefetch), so that it
  never waits for the node; `taken back` they are when another worker has nothing to do.
* A worker that blocks in get() lends its CPUs: the node may start another worker on them.
  When it goes on it takes them again at once, even if that makes the count negative: nothing
  new starts until it is positive again.  So nested tasks of any depth run on one CPU.
* An actor is a worker whose lease lasts as long as it lives.
* A worker belongs to the environment of the first task that it is given (most have none, which is one as well), and
  runs tasks of that environment only.  So an environment always begins in a fresh process.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from minray.lineage import Request, Task, Template
from minray.messages import AssignResources, Command, HoldNext, StartWorker, TakeBack
from minray.policy import Policy
from minray.task_spec import ACTOR_METHOD, PENDING_NODE_ASSIGNMENT, UNIT, Resources

if TYPE_CHECKING:
    from minray.actor_table import Actor

SILENT_S = 0.01
"""A worker that was asked for tasks and is silent for so long executes C code that holds the GIL, or is stopped."""
LOOK_AFTER_S = 0.005
"""From the mark that holds a worker to the look at what it executes: a store in memory needs far less to be seen."""
TAKE_BACK_AFTER_S = 0.005
"""A task waits at most this long behind another while a worker is idle."""
STARVED_S = 5.0
"""Who waits so long for resources that actors hold is told, once."""
IDLE_WORKER_S = 2.0
"""Workers beyond the number of CPUs end after so long without work."""
SPARE_WORKERS = 2
"""With several environments in use, so many more than twice the CPUs may be idle; the next one ends the oldest."""
SPENT = "spent"
"""The environment of a worker that has run a function max_calls times: no task has this one, and it ends."""


class Client:
    """A process that talks to the node: the driver or a worker."""

    actor: Actor | None = None  # that lives in it

    def __init__(self, client: int) -> None:
        self.client = client
        self.templates: dict[int, Template] = {}  # by the process's own numbers
        self.held: dict[bytes, None] = {}  # objects it holds refs to
        self.pins: dict[bytes, int] = {}  # objects it has views of
        self.requests: dict[int, Request] = {}  # not yet answered


class WorkerRecord(Client):
    def __init__(self, client: int) -> None:
        super().__init__(client)
        self.pid = 0  # 0: starting
        self.shape: Shape | None = None  # whose resources it holds; None: idle
        self.in_flight: dict[bytes, Task] = {}  # handed over and not finished; in the order of execution
        self.blocked = 0  # requests that a task of its stands still for
        self.taking_back = False  # asked to give tasks back, has not answered, or had none
        self.asked_s = 0.0  # when it was asked for tasks and has not been heard since; 0: it has
        self.held_s = 0.0  # when it was marked to start nothing more; 0: it is not
        self.forgets = 0  # how many times tasks were given to others without its word
        self.forgotten: dict[bytes, int] = {}  # those tasks, and which time that was, until it has read of it
        self.progressed_s = 0.0  # when it last finished or was given a first task
        self.gpu_ids: tuple[int, ...] = ()
        self.assigned: Resources | None = None  # what it was last told of its resources
        self.known: set[int] = set()  # templates that it has been told
        self.known_functions: set[bytes] = set()
        self.environment = ""  # that it was told to set up, as in TaskOptions
        self.calls: Counter[bytes] = Counter()  # by function: those with max_calls
        self.started_s = 0.0
        self.idle_since = 0.0


class Shape:
    """One set of demands and the queue of tasks that have them.

    A cancelled task stays where it stands, as a gap, and is passed over when its turn comes:
    taking it out would cost the length of the queue.  When more than half of the queue are
    gaps it is made anew, so its memory is bounded, and a queue without tasks is empty.
    """

    def __init__(
        self, resources: Resources, exclusive: bool, environment: str = "", counted: tuple[bytes, int] | None = None
    ) -> None:
        self.resources = resources
        self.exclusive = exclusive  # actor creations: each wants a worker to itself, for good
        self.environment = environment
        self.counted = counted  # (function ID, max_calls): after so many of them a worker is replaced
        self.queue: deque[Task] = deque()
        self.gaps = 0
        self.leased: dict[int, WorkerRecord] = {}
        self.num_gpus = dict(resources).get("GPU", 0)
        self.starved = False  # its owner has been told that it waits for what actors hold

    @property
    def waiting(self) -> int:
        """How many tasks wait."""
        return len(self.queue) - self.gaps

    def take(self, count: int) -> list[Task]:
        """The first `count` tasks; there must be so many."""
        popleft = self.queue.popleft
        if not self.gaps:
            return [popleft() for _ in range(count)]
        tasks: list[Task] = []
        while len(tasks) < count:
            task = popleft()
            if task.state == PENDING_NODE_ASSIGNMENT:
                tasks.append(task)
            else:
                self.gaps -= 1
        self.close_gaps(None)
        return tasks

    def remove(self, task: Task) -> None:
        """A task of the queue, which the caller ends at once."""
        self.gaps += 1
        self.close_gaps(task)

    def close_gaps(self, leaving: Task | None) -> None:
        if self.gaps * 2 > len(self.queue):
            staying = [task for task in self.queue if task.state == PENDING_NODE_ASSIGNMENT and task is not leaving]
            self.queue.clear()
            self.queue.extend(staying)
            self.gaps = 0


class Scheduler:
    def __init__(
        self,
        resources: dict[str, int],
        policy: Policy,
        out: list[Command],
        run: Callable[[WorkerRecord, list[Task], float], None],
    ) -> None:
        self.total = dict(resources)
        self.available = dict(resources)
        self.policy = policy
        self.shapes: dict[tuple[Any, ...], Shape] = {}
        self.apart = False  # not every worker may run every task: there are environments, or a max_calls
        self.active: dict[Shape, None] = {}  # with tasks in the queue
        self.workers: dict[int, WorkerRecord] = {}
        self.idle: dict[int, WorkerRecord] = {}  # the last to go idle is last
        self.starting = 0
        self.pool_size = max(1, resources.get("CPU", 0) // UNIT)
        self.wake_at: float | None = None  # wants a Ticked event by then
        self._gpu_free = [UNIT] * (resources.get("GPU", 0) // UNIT)
        self._workers_made = 0
        self._out = out
        self._run = run

    # ------------------------------------------------------------ tasks

    def shape_for(
        self, resources: Resources, exclusive: bool, environment: str = "", counted: tuple[bytes, int] | None = None
    ) -> Shape:
        key = (resources, exclusive, environment, counted)
        if key not in self.shapes:
            self.shapes[key] = Shape(*key)
            self.apart = self.apart or bool(environment or counted)
        return self.shapes[key]

    def feasible(self, shape: Shape) -> bool:
        return all(self.total.get(name, 0) >= amount for name, amount in shape.resources)

    def enqueue(self, task: Task) -> None:
        task.state = PENDING_NODE_ASSIGNMENT
        shape = task.template.shape
        shape.queue.append(task)
        self.active[shape] = None

    def enqueue_first(self, task: Task) -> None:
        """Back to the front: it was submitted before the rest."""
        task.state = PENDING_NODE_ASSIGNMENT
        task.worker = None
        task.started_s = task.finished_s = 0.0
        shape = task.template.shape
        shape.queue.appendleft(task)
        self.active[shape] = None

    def remove(self, task: Task) -> None:
        """Out of the queue; the caller ends the task at once."""
        shape = task.template.shape
        shape.remove(task)
        if not shape.queue:
            self.active.pop(shape, None)

    def take_out(self, task: Task) -> None:
        """Out of the queue, and it will come back: so it leaves no gap.  Looks through the queue."""
        shape = task.template.shape
        shape.queue.remove(task)
        shape.close_gaps(None)
        if not shape.queue:
            self.active.pop(shape, None)

    def remove_all(self) -> list[Task]:
        """Everything that waits; the caller ends it all."""
        tasks = [task for shape in self.active for task in shape.take(shape.waiting)]
        self.active.clear()
        return tasks

    def dispatch(self, now: float) -> None:
        if self.active:
            shapes = list(self.active) if len(self.active) == 1 else self.policy.order(self.active)
            for shape in shapes:
                if shape.exclusive:
                    self._serve_actors(shape, now)
                else:
                    self._serve(shape, now)
                if not shape.queue:
                    del self.active[shape]
                elif not shape.starved:
                    self._wake_by(now + STARVED_S)  # To see whether what it waits for will ever be free.
        if self.idle and len(self.idle) < len(self.workers):
            self._take_back(now)

    def _serve_actors(self, shape: Shape, now: float) -> None:
        while shape.queue and self._fits(shape):
            idle = self._idle_for(shape) if self.apart else self.idle
            if not idle:
                self._start_workers(shape.waiting)
                return
            self._run(self._lease(shape, idle), shape.take(1), now)
        if not self.idle and not self.starting:
            self._start_for_prefetched()

    def _start_for_prefetched(self) -> None:
        """An actor has taken a worker for good that others counted on: tasks that were handed to a busy one meanwhile
        would wait behind a long task, with their resources free and nobody to take them back."""
        for worker in self.workers.values():
            if len(worker.in_flight) > 1 and worker.shape is not None and worker.actor is None:
                if self._fits(worker.shape):
                    self.start_worker()
                    return

    def _serve(self, shape: Shape, now: float) -> None:
        waiting = shape.waiting
        new = 0
        while new < waiting and self._fits(shape):
            idle = self._idle_for(shape) if self.apart else self.idle
            if not idle:
                self._start_workers(min(waiting - new, self.room_for(shape)))
                break
            self._lease(shape, idle)
            new += 1
        # Level the tasks over the workers, the newest first, each up to what it should prefetch.
        workers = [w for w in reversed(shape.leased.values()) if not w.blocked and not w.taking_back]
        if not workers:
            return
        level = -(-(waiting + sum(len(w.in_flight) for w in workers)) // len(workers))
        depth = min(level, self.policy.prefetch(shape.queue[0].template.mean_s))
        if shape.counted is not None:
            depth = 1  # Calls are counted as they are handed over.
        for worker in workers:
            count = min(depth - len(worker.in_flight), waiting)
            if count > 0:
                waiting -= count
                self._run(worker, shape.take(count), now)
            elif not worker.in_flight:
                self.finished_one(worker, now)  # Levelling had none left for it.

    def finished_one(self, worker: WorkerRecord, now: float) -> None:
        """The worker has no task left: its lease ends."""
        if worker.actor is None and worker.shape is not None:
            if worker.shape.counted is not None:
                self._count_call(worker, *worker.shape.counted, now)
            self._end_lease(worker)
            worker.taking_back = False  # Its answer to come holds nothing of what it is given from now on.
            self._now_idle(worker, now)

    def _count_call(self, worker: WorkerRecord, function_id: bytes, max_calls: int, now: float) -> None:
        worker.calls[function_id] += 1
        if worker.calls[function_id] >= max_calls:
            worker.environment = SPENT
            self._wake_by(now)

    def _now_idle(self, worker: WorkerRecord, now: float) -> None:
        worker.idle_since = now
        self.idle[worker.client] = worker
        if len(self.idle) > self.pool_size:
            self._wake_by(now if self._too_many() > 0 else now + IDLE_WORKER_S)

    def _too_many(self) -> int:
        """How many idle workers must not wait for their end: each environment would keep some otherwise."""
        return len(self.idle) - 2 * self.pool_size - SPARE_WORKERS if self.apart else 0

    def may_start(self, shape: Shape | None) -> bool:
        """Whether somebody idle could run its tasks.  A hint, for another thread."""
        if not self.apart or shape is None:
            return bool(self.idle)
        return any(not w.environment or w.environment == shape.environment for w in list(self.idle.values()))

    def _idle_for(self, shape: Shape) -> dict[int, WorkerRecord]:
        """Those of the idle that its tasks may be given to: of its environment, or else of none so far."""
        environment = shape.environment
        own = {number: worker for number, worker in self.idle.items() if worker.environment == environment}
        if not environment:
            return own
        return own or {n: worker for n, worker in self.idle.items() if not worker.environment and not worker.known}

    # ------------------------------------------------------------ resources

    def _fits(self, shape: Shape) -> bool:
        for name, amount in shape.resources:
            if self.available.get(name, 0) < amount:
                return False
        if not shape.resources:  # Nothing bounds it but this.
            return shape.exclusive or self.room_for(shape) > 0
        return not shape.num_gpus or self._choose_gpus(shape.num_gpus) is not None

    def could_lease(self, shape: Shape) -> bool:
        """Whether its resources are free just now."""
        return self._fits(shape)

    def room_for(self, shape: Shape) -> int:
        """How many more workers the free resources allow for this shape."""
        if not shape.resources:
            return max(8, 4 * self.pool_size) - sum(1 for w in shape.leased.values() if not w.blocked)
        return min(self.available.get(name, 0) // amount for name, amount in shape.resources)

    def _choose_gpus(self, amount: int) -> tuple[int, ...] | None:
        """Whole GPUs, or one with that fraction free (the fullest that fits, so that whole ones stay whole)."""
        if amount >= UNIT:
            free = [gpu for gpu, left in enumerate(self._gpu_free) if left == UNIT]
            count = amount // UNIT
            return tuple(free[:count]) if len(free) >= count else None
        fitting = [(left, gpu) for gpu, left in enumerate(self._gpu_free) if left >= amount]
        return (min(fitting)[1],) if fitting else None

    def _lease(self, shape: Shape, idle: dict[int, WorkerRecord]) -> WorkerRecord:
        worker = self.policy.pick_worker(idle)
        del self.idle[worker.client]
        worker.shape = shape
        if not shape.exclusive:
            shape.leased[worker.client] = worker
        for name, amount in shape.resources:
            self.available[name] -= amount
        if shape.num_gpus:
            worker.gpu_ids = self._choose_gpus(shape.num_gpus) or ()
            self._charge_gpus(worker, shape, -1)
        if worker.assigned != shape.resources or worker.gpu_ids:
            worker.assigned = shape.resources
            amounts = {name: amount / UNIT for name, amount in shape.resources}
            self._out.append(AssignResources(worker.client, amounts.get("CPU", 0), worker.gpu_ids, amounts))
        return worker

    def _charge_gpus(self, worker: WorkerRecord, shape: Shape, sign: int) -> None:
        for gpu in worker.gpu_ids:
            self._gpu_free[gpu] += sign * min(shape.num_gpus, UNIT)

    def _end_lease(self, worker: WorkerRecord) -> None:
        shape = worker.shape
        if shape is None:
            return
        for name, amount in shape.resources:
            if name != "CPU" or not worker.blocked:
                self.available[name] += amount
        if worker.gpu_ids:
            self._charge_gpus(worker, shape, +1)
            worker.gpu_ids = ()
        shape.leased.pop(worker.client, None)
        worker.shape = None

    def _adjust_cpu(self, worker: WorkerRecord, sign: int) -> None:
        if worker.shape is not None:
            self.available["CPU"] = self.available.get("CPU", 0) + sign * dict(worker.shape.resources).get("CPU", 0)

    def block(self, worker: WorkerRecord) -> None:
        """It stands still in get() or wait(): others may use its CPUs."""
        worker.blocked += 1
        if worker.blocked == 1:
            self._adjust_cpu(worker, +1)

    def unblock(self, worker: WorkerRecord) -> None:
        worker.blocked -= 1
        if worker.blocked == 0:
            self._adjust_cpu(worker, -1)

    # ------------------------------------------------------------ workers

    def _start_workers(self, wanted: int) -> None:
        for _ in range(wanted - self.starting):
            self.start_worker()

    def start_worker(self) -> WorkerRecord:
        self._workers_made += 1
        self.starting += 1
        worker = self.workers[self._workers_made] = WorkerRecord(self._workers_made)
        self._out.append(StartWorker(worker.client))
        return worker

    def worker_started(self, worker: WorkerRecord, pid: int, now: float) -> None:
        worker.pid = pid
        self.starting -= 1
        self._now_idle(worker, now)

    def worker_gone(self, worker: WorkerRecord) -> None:
        """Dead or told to end: it holds nothing any more."""
        if self.workers.pop(worker.client, None) is None:
            return
        if not worker.pid:
            self.starting -= 1
        self.idle.pop(worker.client, None)
        self._end_lease(worker)

    def _wake_by(self, deadline: float) -> None:
        if self.wake_at is None or deadline < self.wake_at:
            self.wake_at = deadline

    def tick(self, now: float) -> list[WorkerRecord]:
        """Workers that have been idle and too many for long enough; look again whether a prefetched task is stuck."""
        self.wake_at = None
        ending = [worker for worker in self.idle.values() if worker.environment == SPENT] if self.apart else []
        surplus = len(self.idle) - self.pool_size
        too_many = self._too_many()
        for position, worker in enumerate(list(self.idle.values())[: max(0, surplus)]):
            if worker.environment == SPENT:
                continue
            if now >= worker.idle_since + IDLE_WORKER_S or position < too_many:
                ending.append(worker)
            else:
                self._wake_by(worker.idle_since + IDLE_WORKER_S)
                break
        return ending

    def starved(self, now: float) -> list[Task]:
        """Tasks that have waited long for what only actors hold, so perhaps for ever: one a shape, told once."""
        found = []
        for shape in self.active:
            task = next((task for task in shape.queue if task.state == PENDING_NODE_ASSIGNMENT), None)
            if shape.starved or task is None or now < task.submitted_s + STARVED_S:
                continue
            held_by_actors = Counter[str]()
            for worker in self.workers.values():
                if worker.actor is not None and worker.shape is not None and not worker.blocked:
                    held_by_actors.update(dict(worker.shape.resources))
            if any(self.total.get(name, 0) - held_by_actors[name] < amount for name, amount in shape.resources):
                shape.starved = True
                found.append(task)
        return found

    def held(self, now: float) -> list[WorkerRecord]:
        """Hold workers that are silent; return those that have been held long enough to look what they execute."""
        due = []
        for worker in self.workers.values():
            if worker.held_s:
                if now >= worker.held_s + LOOK_AFTER_S:
                    due.append(worker)
                else:
                    self._wake_by(worker.held_s + LOOK_AFTER_S)
            elif worker.asked_s and len(worker.in_flight) > 1:
                if now >= worker.asked_s + SILENT_S:
                    worker.held_s = now
                    self._out.append(HoldNext(worker.client))
                    self._wake_by(now + LOOK_AFTER_S)
                else:
                    self._wake_by(worker.asked_s + SILENT_S)
        return due

    def _take_back(self, now: float) -> None:
        """A worker is idle: fetch unstarted tasks from the one that has most work ahead, half of them."""
        victim, most = None, 0.0
        for worker in self.workers.values():
            ahead = len(worker.in_flight) - 1
            if ahead < 1 or worker.taking_back or worker.blocked:
                continue
            shape = worker.shape
            if shape is None or shape.exclusive or shape.queue or not self._fits(shape):
                continue
            mean_s = next(iter(worker.in_flight.values())).template.mean_s
            wait_s = TAKE_BACK_AFTER_S if mean_s is None else mean_s * ahead
            if now - worker.progressed_s > TAKE_BACK_AFTER_S:
                wait_s = max(wait_s, now - worker.progressed_s)  # Slower than it used to be.
            if wait_s < TAKE_BACK_AFTER_S:
                self._wake_by(now + TAKE_BACK_AFTER_S)
            elif wait_s > most:
                victim, most = worker, wait_s
        if victim is not None:
            victim.taking_back = True
            victim.asked_s = now
            self._wake_by(now + SILENT_S)
            self._out.append(TakeBack(victim.client, len(victim.in_flight) // 2))

    # ------------------------------------------------------------ for tests

    def check(self) -> None:
        """Asserts what must hold between events; looks at everything."""
        held = dict.fromkeys(self.total, 0)
        gpu_free = [UNIT] * len(self._gpu_free)
        for worker in self.workers.values():
            shape, name = worker.shape, f"worker {worker.client}"
            if shape is None:
                assert not worker.in_flight and worker.actor is None, f"{name} works without a lease"
                assert (worker.client in self.idle) == bool(worker.pid), f"{name} is up and not idle, or the reverse"
                continue
            assert worker.client not in self.idle, f"{name} is idle and holds resources"
            assert worker.in_flight or worker.actor is not None, f"{name} holds resources and has nothing to do"
            assert (worker.client in shape.leased) != shape.exclusive, f"{name} is not where its lease is"
            assert worker.environment == shape.environment, f"{name} is of another environment than its lease"
            for options in (task.template.options for task in worker.in_flight.values()):
                of_its_own = options.kind == ACTOR_METHOD or options.runtime_env == worker.environment
                assert of_its_own, f"{name} runs {options.name}, which is of another environment"
            assert worker.blocked >= 0, f"{name} is blocked {worker.blocked} times"
            for resource, amount in shape.resources:
                if resource != "CPU" or not worker.blocked:
                    held[resource] += amount
            for gpu in worker.gpu_ids:
                gpu_free[gpu] -= min(shape.num_gpus, UNIT)
        for resource, total in self.total.items():
            free = self.available[resource]
            assert free + held[resource] == total, f"{resource}: {free} free + {held[resource]} held, of {total}"
            assert free >= 0 or resource == "CPU", f"{resource} is given out twice"
        assert gpu_free == self._gpu_free and min(gpu_free, default=0) >= 0, f"GPUs: {self._gpu_free}, not {gpu_free}"
        assert self.starting == sum(1 for worker in self.workers.values() if not worker.pid)
        assert all(client in self.workers for client in self.idle), "an idle worker is gone"
        for shape in self.shapes.values():
            gaps = sum(1 for task in shape.queue if task.state != PENDING_NODE_ASSIGNMENT)
            assert gaps == shape.gaps <= shape.waiting, f"{gaps} gaps among {len(shape.queue)}, not {shape.gaps}"
            assert (shape in self.active) == bool(shape.queue), "a queue is forgotten, or an empty one is not"
            assert all(worker is self.workers.get(client) for client, worker in shape.leased.items())
