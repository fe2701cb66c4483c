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
  new starts until it is positive again, and nobody is handed more.  So nested tasks of any depth run on one CPU.
* An actor is a worker whose lease lasts as long as it lives.
* A lease draws from a *pool*: the node's own, or a bundle of a placement group.  A bundle is a small node in the node:
  what it has was taken out of the node's pool when its group was placed, and is there for that group's shapes alone.
* A worker belongs to the environment of the first task that it is given (most have none, which is one as well), and
  runs tasks of that environment only.  So an environment always begins in a fresh process.
* No queue waits for ever because another one never empties: shapes take *turns* (docs/decisions/0025).  It is the turn
  of a shape whose first task has stood still for a while: what it needs is kept for it, and workers that hold what it
  lacks run dry.  The turn ends when that task is handed over, or when it has lasted as long as the wait before it; then
  the others go on, and the shape is due again when it has stood still for twice as long.
* A task that stands still in get() is helped by what waits in queues, not by more that stand still beside it.  Of a
  shape of which *many* do, little is begun as long as others wait, and in its own queue children come first.
"""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from math import inf
from typing import TYPE_CHECKING, Any

from minray.lineage import Request, Task, Template
from minray.messages import DRIVER, AssignResources, Command, HoldNext, StartWorker, TakeBack
from minray.policy import Policy
from minray.task_spec import ACTOR_METHOD, PENDING_NODE_ASSIGNMENT, UNIT, Placement, Resources

if TYPE_CHECKING:
    from minray.actor_table import Actor

SILENT_S = 0.01
"""A worker that was asked for tasks and is silent for so long executes C code that holds the GIL, or is stopped."""
LOOK_AFTER_S = 0.005
"""From a worker's being held to the look at what it executes: a store in memory needs far less to be seen."""
TAKE_BACK_AFTER_S = 0.005
"""A task waits at most this long behind another while a worker is idle."""
STARVED_S = 5.0
"""Who waits so long for resources that actors hold is told, once."""
PATIENCE_S = 0.1
"""So long a queue stands still before it is its turn: about as long as the work that workers have in hand."""
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
        self.pool: Pool | None = None  # that it holds them of
        self.in_flight: dict[bytes, Task] = {}  # handed over and not finished; in the order of execution
        self.blocked = 0  # requests that a task of its stands still for
        self.taking_back = False  # asked to give tasks back, has not answered, or had none
        self.asked_s = 0.0  # when it was asked for tasks and has not been heard since; 0: it has
        self.held_s = 0.0  # when it was told to start nothing more; 0: it may
        self.forgets = 0  # how many times tasks were given to others without its word
        self.forgotten: dict[bytes, int] = {}  # those tasks, and which time that was, until it has read of it
        self.progressed_s = 0.0  # when it last finished or was given a first task
        self.gpu_ids: tuple[int, ...] = ()
        self.assigned: tuple[Resources, Placement] | None = None  # what it was last told of its resources
        self.known: set[int] = set()  # templates that it has been told
        self.known_functions: set[bytes] = set()
        self.environment = ""  # that it was told to set up, as in TaskOptions
        self.calls: Counter[bytes] = Counter()  # by function: those with max_calls
        self.started_s = 0.0
        self.idle_since = 0.0


class Pool:
    """Resources that can be leased.  Changed by the scheduler alone; `available` has the names of `total`.

    A CPU count may be negative for a while: a worker that was blocked has taken back what it had lent."""

    __slots__ = ("total", "available", "gpus")

    def __init__(self, total: dict[str, int], gpus: dict[int, int]) -> None:
        self.total = total
        self.available = dict(total)
        self.gpus = gpus  # by number: how much of it is free

    def fits(self, shape: Shape) -> bool:
        for name, amount in shape.resources:
            if self.available.get(name, 0) < amount:
                return False
        return not shape.num_gpus or choose_gpus(self.gpus, shape.num_gpus) is not None

    def room_for(self, shape: Shape) -> int:
        return min(self.available.get(name, 0) // amount for name, amount in shape.resources)

    def would_lack(self, first: Shape, shape: Shape) -> bool:
        """Whether `first` would lack something if one more worker of `shape` took its share of it."""
        taken = dict(shape.resources)
        return any(
            name in taken and (name == "GPU" or self.available.get(name, 0) - taken[name] < amount)
            for name, amount in first.resources
        )  # GPUs: what is left may be in pieces.

    def lacks(self, first: Shape, shape: Shape) -> bool:
        """Whether `first` lacks something of which workers of `shape` hold a share."""
        held = dict(shape.resources)
        return any(
            name in held and (self.available.get(name, 0) < amount or (name == "GPU" and not self.fits(first)))
            for name, amount in first.resources
        )


def choose_gpus(free: dict[int, int], amount: int) -> tuple[int, ...] | None:
    """Whole GPUs, or one with that fraction free (the fullest that fits, so that whole ones stay whole)."""
    if amount >= UNIT:
        whole = [gpu for gpu, left in free.items() if left == UNIT]
        count = amount // UNIT
        return tuple(whole[:count]) if len(whole) >= count else None
    fitting = [(left, gpu) for gpu, left in free.items() if left >= amount]
    return (min(fitting)[1],) if fitting else None


class Bundle(Pool):
    """Of a placement group.  Before it is placed, and after its removal, nothing of it is available."""

    __slots__ = ("placed",)

    def __init__(self, total: dict[str, int]) -> None:
        super().__init__(total, {})
        self.available = dict.fromkeys(total, 0)
        self.placed = False

    def fits(self, shape: Shape) -> bool:
        return self.placed and super().fits(shape)


def in_all(bundles: Iterable[Bundle]) -> Counter[str]:
    """What they have together."""
    amounts = Counter[str]()
    for bundle in bundles:
        amounts.update(bundle.total)
    return amounts


class Shape:
    """One set of demands and the queue of tasks that have them.

    A cancelled task stays where it stands, as a gap, and is passed over when its turn comes:
    taking it out would cost the length of the queue.  When more than half of the queue are
    gaps it is made anew, so its memory is bounded, and a queue without tasks is empty.
    """

    def __init__(
        self, resources: Resources, exclusive: bool, pools: tuple[Pool, ...] = (), bound: bool = False,
        placement: Placement = (), environment: str = "", counted: tuple[bytes, int] | None = None,
    ) -> None:  # fmt: skip
        self.resources = resources
        self.exclusive = exclusive  # actor creations: each wants a worker to itself, for good
        self.pools = pools  # where its leases may draw from, the first that fits; empty: nowhere, ever
        self.bound = bound  # to this node: its tasks run here or nowhere
        self.placement = placement  # in a placement group: which
        self.environment = environment
        self.counted = counted  # (function ID, max_calls): after so many of them a worker is replaced
        self.key: tuple[Any, ...] = ()  # under which the scheduler finds it
        self.queue: deque[Task] = deque()
        self.gaps = 0
        self.leased: dict[int, WorkerRecord] = {}
        self.num_gpus = dict(resources).get("GPU", 0)
        self.starved = False  # its owner has been told that it waits for what actors hold
        # Only kept up to date while other queues wait, too:
        self.head = 0  # the number of its first task
        self.since_s = 0.0  # since when that is the first: so long the queue stands still
        self.due_s = 0.0  # from when on it may have the turn

    @property
    def waiting(self) -> int:
        """How many tasks wait."""
        return len(self.queue) - self.gaps

    def oldest_s(self) -> float:
        """When the first that waits was submitted."""
        return next((task.submitted_s for task in self.queue if task.state == PENDING_NODE_ASSIGNMENT), inf)

    def standing_still(self) -> int:
        """How many of its tasks are blocked, each in a process of its own."""
        return sum(1 for worker in self.leased.values() if worker.blocked)

    def put_children_first(self) -> None:
        """What tasks have submitted, the newest first, and then what the driver has: tasks that stand still mostly wait
        for what tasks have submitted."""
        tasks = [task for task in self.queue if task.state == PENDING_NODE_ASSIGNMENT]
        tasks.sort(key=lambda task: 0 if task.client == DRIVER else -task.no)
        self.queue = deque(tasks)
        self.gaps = 0

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


def _divided(free: dict[int, int], bundles: Sequence[Bundle]) -> list[dict[int, int]] | None:
    """Which part of which GPU each bundle would get of what is free, the large ones first; None: not enough."""
    left = dict(free)
    parts: list[dict[int, int]] = [{} for _ in bundles]
    for index in sorted(range(len(bundles)), key=lambda index: -bundles[index].total.get("GPU", 0)):
        amount = bundles[index].total.get("GPU", 0)
        chosen = choose_gpus(left, amount) if amount else ()
        if chosen is None:
            return None
        for gpu in chosen:
            parts[index][gpu] = min(amount, UNIT)
            left[gpu] -= min(amount, UNIT)
    return parts


class Scheduler:
    def __init__(
        self,
        resources: dict[str, int],
        policy: Policy,
        out: list[Command],
        run: Callable[[WorkerRecord, list[Task], float], None],
    ) -> None:
        self.pool = Pool(dict(resources), dict.fromkeys(range(resources.get("GPU", 0) // UNIT), UNIT))
        self.total = self.pool.total
        self.available = self.pool.available
        self.bundles: dict[Bundle, None] = {}  # placed: what they have is not in the pool
        self.policy = policy
        self.shapes: dict[tuple[Any, ...], Shape] = {}
        self.apart = False  # not every worker may run every task: there are environments, or a max_calls
        self.active: dict[Shape, None] = {}  # with tasks in the queue
        self.claims: dict[Shape, None] = {}  # what placement groups wait for; without a queue
        self.first: Shape | None = None  # whose turn it is
        self.turn_ends_s = 0.0
        self.in_debt = False  # a CPU count may be negative
        self.workers: dict[int, WorkerRecord] = {}
        self.idle: dict[int, WorkerRecord] = {}  # the last to go idle is last
        self.starting = 0
        self.workers_for_cpus = max(1, resources.get("CPU", 0) // UNIT)  # one each, and at least one
        self.wake_at: float | None = None  # wants a Ticked event by then
        self.workers_made = 0
        self._out = out
        self._run = run

    @property
    def many(self) -> int:
        """So many processes of one shape are many: there are no more of tasks that ask for no resources, and from so
        many on that stand still in get(), others that wait go first."""
        return max(8, 4 * self.workers_for_cpus)

    # ------------------------------------------------------------ tasks

    def shape_for(
        self, resources: Resources, exclusive: bool, environment: str = "", counted: tuple[bytes, int] | None = None,
        where: tuple[Any, ...] = (), pools: tuple[Pool, ...] | None = None,
    ) -> Shape:  # fmt: skip
        """`where`: its tasks run here or nowhere, drawing from `pools`: in that placement group, or because of the
        node's labels."""
        key = (resources, exclusive, environment, counted, where)
        if key not in self.shapes:
            placement = where if len(where) == 3 else ()
            shape = self.shapes[key] = Shape(
                resources, exclusive, (self.pool,) if pools is None else pools, bool(where), placement, environment,
                counted,
            )  # fmt: skip
            shape.key = key
            self.apart = self.apart or bool(environment or counted)
        return self.shapes[key]

    def feasible(self, shape: Shape) -> bool:
        return any(
            all(pool.total.get(name, 0) >= amount for name, amount in shape.resources) for pool in shape.pools
        )

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
            shapes = list(self.active) if len(self.active) == 1 and not self.claims else self._by_turns(now)
            for shape in shapes:
                if shape.exclusive:
                    self._serve_actors(shape, now)
                else:
                    self._serve(shape, now)
                if not shape.queue:
                    del self.active[shape]
                elif not shape.starved:
                    self.wake_by(now + STARVED_S)  # To see whether what it waits for will ever be free.
        if (self.idle or self.apart) and len(self.idle) < len(self.workers):
            self._take_back(now)

    def _by_turns(self, now: float) -> list[Shape]:
        """In which order to serve queues: as the policy says, but first whose turn it is."""
        waiting = [*self.active, *self.claims]
        for shape in waiting:
            head = shape.queue[0].no if shape.queue else -1
            if shape.head != head:  # It has gone on.
                shape.head, shape.since_s = head, now
                still = shape.standing_still()
                shape.due_s = now + PATIENCE_S * (still if still >= self.many else 1)
                if shape is self.first:
                    self.first = None
        if self.first is not None and (self.first not in waiting or now >= self.turn_ends_s):
            self.first.due_s = self._as_long_again(self.first, now)
            self.first = None
        if self.first is None:
            self._give_turn([shape for shape in waiting if shape.resources and shape.due_s <= now], now)
        if self.first is not None:
            self.wake_by(self.turn_ends_s)
        return sorted(self.policy.order(self.active), key=lambda shape: shape is not self.first)

    def _give_turn(self, due: list[Shape], now: float) -> None:
        """To the one that is due longest, of those that it would help."""
        for shape in sorted(due, key=lambda shape: shape.due_s):
            if not self._waits_for_an_end(shape):
                self.first = shape
                self.turn_ends_s = self._as_long_again(shape, now)
                return
            shape.due_s = self._as_long_again(shape, now)

    def _as_long_again(self, shape: Shape, now: float) -> float:
        """When it will have stood still twice as long as it has now."""
        return now + max(PATIENCE_S, now - shape.since_s)

    def _waits_for_an_end(self, shape: Shape) -> bool:
        """Nothing that others could leave to it would help."""
        pools = [pool for pool in shape.pools if not isinstance(pool, Bundle) or pool.placed]
        return all(self._is_held_for_good(pool, shape) for pool in pools)

    def _before(self, shape: Shape) -> Shape | None:
        """Another one, whose turn it is, and for which this one has to leave something."""
        first = self.first
        if first is None or first is shape:
            return None
        stands_still = first.queue[0].no == first.head if first.queue else first in self.claims
        return first if stands_still else None  # It may have been given something since the turns were looked at.

    def _stands_back(self, shape: Shape, now: float) -> bool:
        """Whether it is given nothing just now, for the sake of others that wait."""
        return self._holds_what_is_lacked(shape) or self._is_too_still(shape, now)

    def _holds_what_is_lacked(self, shape: Shape) -> bool:
        """Its workers run dry then, and what they hold goes to whose turn it is."""
        first = self._before(shape)
        return first is not None and any(pool in shape.pools and pool.lacks(first, shape) for pool in first.pools)

    def _is_too_still(self, shape: Shape, now: float) -> bool:
        """Many of its tasks stand still, and others wait of which not so many do: more of it would not help those."""
        if shape is self.first or now >= shape.due_s or shape.standing_still() < self.many:
            return False
        for other in self.active:
            is_rival = any(pool in shape.pools for pool in other.pools) and not other.starved
            if is_rival and other.standing_still() < self.many:
                self.wake_by(shape.due_s)
                return True
        return False

    def _serve_actors(self, shape: Shape, now: float) -> None:
        while shape.queue and (pool := self._pool_for(shape)) is not None:
            idle = self._idle_for(shape) if self.apart else self.idle
            if not idle:
                self._start_workers(shape.waiting)
                return
            self._run(self._lease(shape, pool, idle), shape.take(1), now)
        if not self.idle and not self.starting and not self.apart:
            self._start_for_prefetched()

    def _start_for_prefetched(self) -> None:
        """An actor has taken a worker for good that others counted on: tasks that were handed to a busy one meanwhile
        would wait behind a long task, with their resources free and nobody to take them back."""
        for worker in self.workers.values():
            if len(worker.in_flight) > 1 and worker.shape is not None and worker.actor is None:
                if self._pool_for(worker.shape) is not None:
                    self.start_worker()
                    return

    def _serve(self, shape: Shape, now: float) -> None:
        if (len(self.active) > 1 or self.claims) and self._stands_back(shape, now):
            return
        waiting = shape.waiting
        new = 0
        while new < waiting and (pool := self._pool_for(shape)) is not None:
            idle = self._idle_for(shape) if self.apart else self.idle
            if not idle:
                wanted = min(waiting - new, self.room_for(shape))
                if wanted > self.starting and shape.standing_still() >= self.many:
                    shape.put_children_first()
                self._start_workers(wanted)
                break
            self._lease(shape, pool, idle)
            new += 1
        # Level the tasks over the workers, the newest first, each up to what it should prefetch.
        workers = [w for w in reversed(shape.leased.values()) if not w.blocked and not w.taking_back]
        if self.in_debt:
            workers = self._without_debt(shape, workers)
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

    def _without_debt(self, shape: Shape, workers: list[WorkerRecord]) -> list[WorkerRecord]:
        """Where more CPUs are in use than there are, workers run dry: they would go on as long as the queue does."""
        self.in_debt = any(pool.available.get("CPU", 0) < 0 for pool in (self.pool, *self.bundles))
        if "CPU" not in dict(shape.resources):
            return workers
        return [w for w in workers if w.pool is not None and w.pool.available.get("CPU", 0) >= 0]

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
            self.wake_by(now)

    def _now_idle(self, worker: WorkerRecord, now: float) -> None:
        worker.idle_since = now
        self.idle[worker.client] = worker
        if len(self.idle) > self.workers_for_cpus:
            self.wake_by(now if self._too_many() > 0 else now + IDLE_WORKER_S)

    def _too_many(self) -> int:
        """How many idle workers must not wait for their end: each environment would keep some otherwise."""
        return len(self.idle) - 2 * self.workers_for_cpus - SPARE_WORKERS if self.apart else 0

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

    def add_resources(self, resources: Resources) -> None:
        pool = self.pool
        for name, amount in resources:
            pool.total[name] = pool.total.get(name, 0) + amount
            pool.available[name] = pool.available.get(name, 0) + amount
        self.workers_for_cpus = max(1, pool.total.get("CPU", 0) // UNIT)
        for gpu in range(len(pool.gpus), pool.total.get("GPU", 0) // UNIT):
            pool.gpus[gpu] = UNIT

    def _pool_for(self, shape: Shape) -> Pool | None:
        """The first pool with its resources free, and with enough beside them for whose turn it is."""
        if not shape.resources and not shape.exclusive and self.room_for(shape) <= 0:
            return None  # Nothing bounds it but this.
        first = self._before(shape) if self.first is not None else None
        for pool in shape.pools:
            if pool.fits(shape) and (first is None or pool not in first.pools or not pool.would_lack(first, shape)):
                return pool
        return None

    def could_lease(self, shape: Shape) -> bool:
        """Whether its resources are free just now."""
        return self._pool_for(shape) is not None

    def room_for(self, shape: Shape) -> int:
        """How many more workers the free resources allow for this shape."""
        if not shape.resources:
            return self.many - len(shape.leased) + shape.standing_still()
        return sum(max(0, pool.room_for(shape)) for pool in shape.pools)

    def _lease(self, shape: Shape, pool: Pool, idle: dict[int, WorkerRecord]) -> WorkerRecord:
        worker = self.policy.pick_worker(idle)
        del self.idle[worker.client]
        worker.shape = shape
        worker.pool = pool
        if not shape.exclusive:
            shape.leased[worker.client] = worker
        for name, amount in shape.resources:
            pool.available[name] -= amount
        if shape.num_gpus:
            worker.gpu_ids = choose_gpus(pool.gpus, shape.num_gpus) or ()
            self._charge_gpus(worker, shape, pool, -1)
        told = (shape.resources, shape.placement)
        if worker.assigned != told or worker.gpu_ids:
            worker.assigned = told
            amounts = {name: amount / UNIT for name, amount in shape.resources}
            self._out.append(
                AssignResources(worker.client, amounts.get("CPU", 0), worker.gpu_ids, amounts, shape.placement)
            )
        return worker

    def _charge_gpus(self, worker: WorkerRecord, shape: Shape, pool: Pool, sign: int) -> None:
        for gpu in worker.gpu_ids:
            pool.gpus[gpu] += sign * min(shape.num_gpus, UNIT)

    def _end_lease(self, worker: WorkerRecord) -> None:
        shape, pool = worker.shape, worker.pool
        if shape is None or pool is None:
            return
        for name, amount in shape.resources:
            if name != "CPU" or not worker.blocked:
                pool.available[name] += amount
        if worker.gpu_ids:
            self._charge_gpus(worker, shape, pool, +1)
            worker.gpu_ids = ()
        shape.leased.pop(worker.client, None)
        worker.shape = worker.pool = None

    def _adjust_cpu(self, worker: WorkerRecord, sign: int) -> None:
        """What a worker in a placement group lends stays in its bundle: others of the group may use it."""
        if worker.shape is not None and worker.pool is not None:
            available = worker.pool.available
            available["CPU"] = available.get("CPU", 0) + sign * dict(worker.shape.resources).get("CPU", 0)

    def block(self, worker: WorkerRecord) -> None:
        """It stands still in get() or wait(): others may use its CPUs."""
        worker.blocked += 1
        if worker.blocked == 1:
            self._adjust_cpu(worker, +1)

    def unblock(self, worker: WorkerRecord) -> None:
        worker.blocked -= 1
        if worker.blocked == 0:
            self._adjust_cpu(worker, -1)
            self.in_debt = True  # Perhaps.

    # ------------------------------------------------------------ bundles of placement groups

    def reserve(self, bundles: Sequence[Bundle]) -> bool:
        """Take all of them out of the node's pool, or none: whether there was enough."""
        gpus = _divided(self.pool.gpus, bundles)
        wanted = in_all(bundles)
        if gpus is None or any(self.available.get(name, 0) < amount for name, amount in wanted.items()):
            return False
        for name, amount in wanted.items():
            self.available[name] -= amount
        for bundle, parts in zip(bundles, gpus):
            bundle.placed = True
            bundle.available = dict(bundle.total)
            bundle.gpus = parts
            for gpu, part in parts.items():
                self.pool.gpus[gpu] -= part
            self.bundles[bundle] = None
        return True

    def could_ever_reserve(self, bundles: Sequence[Bundle]) -> bool:
        """Whether an empty node has all of it."""
        enough = all(self.total.get(name, 0) >= amount for name, amount in in_all(bundles).items())
        return enough and _divided(dict.fromkeys(self.pool.gpus, UNIT), bundles) is not None

    def give_back(self, bundles: Sequence[Bundle]) -> None:
        """Their group is removed: no worker holds anything of them any more."""
        for bundle in bundles:
            if bundle.placed:
                assert bundle.available == bundle.total, "a bundle is given back in part"
                for name, amount in bundle.total.items():
                    self.available[name] += amount
                for gpu, part in bundle.gpus.items():
                    self.pool.gpus[gpu] += part
                bundle.placed = False
                bundle.available = dict.fromkeys(bundle.total, 0)
                bundle.gpus = {}
                del self.bundles[bundle]

    # ------------------------------------------------------------ workers

    def _start_workers(self, wanted: int) -> None:
        for _ in range(wanted - self.starting):
            self.start_worker()

    def start_worker(self) -> WorkerRecord:
        self.workers_made += 1
        self.starting += 1
        worker = self.workers[self.workers_made] = WorkerRecord(self.workers_made)
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

    def wake_by(self, deadline: float) -> None:
        if self.wake_at is None or deadline < self.wake_at:
            self.wake_at = deadline

    def tick(self, now: float) -> list[WorkerRecord]:
        """Workers that have been idle and too many for long enough; look again whether a prefetched task is stuck."""
        self.wake_at = None
        ending = [worker for worker in self.idle.values() if worker.environment == SPENT] if self.apart else []
        surplus = len(self.idle) - self.workers_for_cpus
        too_many = self._too_many()
        for position, worker in enumerate(list(self.idle.values())[: max(0, surplus)]):
            if worker.environment == SPENT:
                continue
            if now >= worker.idle_since + IDLE_WORKER_S or position < too_many:
                ending.append(worker)
            else:
                self.wake_by(worker.idle_since + IDLE_WORKER_S)
                break
        return ending

    def starved(self, now: float) -> list[Task]:
        """Tasks that have waited long for what only actors and placement groups hold, so perhaps for ever: one a shape,
        told once."""
        found = []
        for shape in self.active:
            task = next((task for task in shape.queue if task.state == PENDING_NODE_ASSIGNMENT), None)
            if shape.starved or task is None or now < task.submitted_s + STARVED_S:
                continue
            if all(self._is_held_for_good(pool, shape) for pool in shape.pools):
                shape.starved = True
                found.append(task)
        return found

    def _is_held_for_good(self, pool: Pool, shape: Shape) -> bool:
        """Whether actors, and placement groups, hold so much of it that the shape has to wait for one to end."""
        if isinstance(pool, Bundle) and not pool.placed:
            return False  # It waits for its group, which is told of itself.
        held = Counter[str]()
        for worker in self.workers.values():
            if worker.actor is not None and worker.shape is not None and worker.pool is pool and not worker.blocked:
                held.update(dict(worker.shape.resources))
        if pool is self.pool:
            for bundle in self.bundles:
                held.update(bundle.total)
        return any(pool.total.get(name, 0) - held[name] < amount for name, amount in shape.resources)

    def held(self, now: float) -> list[WorkerRecord]:
        """Hold workers that are silent; return those that have been held long enough to look what they execute.

        (Nobody stands still for the time by which a clock has been set back.)"""
        due = []
        for worker in self.workers.values():
            if worker.held_s:
                if not worker.held_s <= now < worker.held_s + LOOK_AFTER_S:
                    due.append(worker)
                else:
                    self.wake_by(worker.held_s + LOOK_AFTER_S)
            elif worker.asked_s and len(worker.in_flight) > 1:
                if not worker.asked_s <= now < worker.asked_s + SILENT_S:
                    worker.held_s = now
                    self._out.append(HoldNext(worker.client))
                    self.wake_by(now + LOOK_AFTER_S)
                else:
                    self.wake_by(worker.asked_s + SILENT_S)
        return due

    def _take_back(self, now: float) -> None:
        """A worker is idle: fetch unstarted tasks from the one that has most work ahead, half of them.

        Only of those whose tasks an idle worker may run.  If there is none, though their resources are free, one is
        started: it will be idle, and of no environment yet."""
        victim, most = None, 0.0
        helpless = False
        for worker in self.workers.values():
            ahead = len(worker.in_flight) - 1
            if ahead < 1 or worker.taking_back or worker.blocked:
                continue
            shape = worker.shape
            if shape is None or shape.exclusive or shape.queue or self._pool_for(shape) is None:
                continue
            mean_s = next(iter(worker.in_flight.values())).template.mean_s
            wait_s = TAKE_BACK_AFTER_S if mean_s is None else mean_s * ahead
            silent_s = abs(now - worker.progressed_s)
            if silent_s > TAKE_BACK_AFTER_S:
                wait_s = max(wait_s, silent_s)  # Slower than it used to be.
            if wait_s < TAKE_BACK_AFTER_S:
                self.wake_by(now + TAKE_BACK_AFTER_S)
            elif self.apart and not self._idle_for(shape):
                helpless = True
            elif wait_s > most:
                victim, most = worker, wait_s
        if victim is not None:
            victim.taking_back = True
            victim.asked_s = now
            self.wake_by(now + SILENT_S)
            self._out.append(TakeBack(victim.client, len(victim.in_flight) // 2))
        elif helpless and not self.starting:
            self.start_worker()

    # ------------------------------------------------------------ for tests

    def check(self) -> None:
        """Asserts what must hold between events; looks at everything."""
        pools = [self.pool, *self.bundles]
        held = {pool: dict.fromkeys(pool.total, 0) for pool in pools}
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
            pool = worker.pool
            assert pool in held, f"{name} holds resources of a placement group that is not there"
            for resource, amount in shape.resources:
                if resource != "CPU" or not worker.blocked:
                    held[pool][resource] += amount
        for bundle in self.bundles:
            for resource, amount in bundle.total.items():
                held[self.pool][resource] += amount
        for pool in pools:
            for resource, total in pool.total.items():
                free, used = pool.available[resource], held[pool][resource]
                assert free + used == total, f"{resource}: {free} free + {used} held, of {total}"
                assert free >= 0 or resource == "CPU", f"{resource} is given out twice"
        self._check_gpus()
        assert self.starting == sum(1 for worker in self.workers.values() if not worker.pid)
        assert all(client in self.workers for client in self.idle), "an idle worker is gone"
        for shape in self.shapes.values():
            gaps = sum(1 for task in shape.queue if task.state != PENDING_NODE_ASSIGNMENT)
            assert gaps == shape.gaps <= shape.waiting, f"{gaps} gaps among {len(shape.queue)}, not {shape.gaps}"
            assert (shape in self.active) == bool(shape.queue), "a queue is forgotten, or an empty one is not"
            assert all(worker is self.workers.get(client) for client, worker in shape.leased.items())

    def _check_gpus(self) -> None:
        """Of every GPU: what is free in the pool and in bundles, and what workers hold, is the whole."""
        parts = Counter[int]()
        for pool in (self.pool, *self.bundles):
            assert min(pool.gpus.values(), default=0) >= 0, f"a GPU is given out twice: {pool.gpus}"
            parts.update(pool.gpus)
        for worker in self.workers.values():
            for gpu in worker.gpu_ids:
                parts[gpu] += min(worker.shape.num_gpus, UNIT) if worker.shape is not None else 0
        assert all(parts[gpu] == UNIT for gpu in self.pool.gpus), f"GPUs: {dict(parts)}, each should be {UNIT}"
