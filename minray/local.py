"""Local mode: a whole session inside this process, for unit tests.

The node decides here exactly what it decides in a session of processes (`Node`, unchanged); this is another shell
around it, as raylet.py is one.  A command is carried out at once, by a call: a worker is a `LocalWorker`, which is
a `Worker` without a socket, and executes, copies and reports as that does.

Every task runs in a thread of its own (a *strand*), for it must be able to stand still in the middle.  But of all strands
and the driver only the one that holds the *baton* runs.  It hands the baton on at these points and nowhere else: it has
submitted something, it waits (``get``, ``wait``, ``time.sleep``), it has ended.  Who is next is `choose`'s to say:
by default whoever has been ready for longest, so a task runs as soon as it is submitted if there are resources for it,
and a program runs the same each time.  explore.py chooses by lot.

Time is real, or virtual: then nobody waits, and when nobody can go on the clock jumps to the next moment at which
somebody can.  If there is no such moment either, it is a deadlock, and the driver is told who waits for what.

All refs in this process are the driver's: it holds them in the node's eyes.  What a worker submits or puts is
therefore handed over to the driver in the same breath (`_hand_over`).

Threads of the program's own may use the API as well: like the driver, whose strands they count as, they have the
baton while they are in here, and lose it to another of their kind while they are elsewhere.

What is not done here: what a process would give a task (a core, an environment, globals and a heap of its own,
a death without ``finally``).  What is not done yet is refused in `_check_options`.
"""

from __future__ import annotations

import atexit
import ctypes
import itertools
import os
import shutil
import sys
import tempfile
import threading
import time
import weakref
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from time import monotonic
from typing import Any, Protocol

from minray import api, clock, ids, machine, object_ref
from minray.core_worker import CoreWorker, TaskContext
from minray.driver import Driver
from minray.interrupts import interruptible, raise_deferred, uninterruptible
from minray.lineage import Task
from minray.loop import Loop, Waiter
from minray.messages import (
    DRIVER, Command, DeleteFile, Event, HoldNext, KillWorker, ObjectPut, ObjectsAwaited, ReferencesChanged, Reply,
    StartWorker, TasksFinished, TasksReturned, TasksSubmitted, Ticked, Unpinned, Warn, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.node_tasks import amounts
from minray.object_ref import ObjectRef
from minray.object_store import Allocator, Arena, write_file
from minray.policy import Policy
from minray.reference_counter import References
from minray.task_spec import (
    ACTOR_METHOD, FINISHED, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, UNIT, TaskOptions, TaskSpec,
)  # fmt: skip
from minray.worker import Worker

ROWS_AT_ONCE = 10_000
"""So many tasks' and objects' rows are kept in memory before they are written to the history, if there is one."""
INTERRUPT_PATIENCE_S = 1.0
"""How long the driver, told to stop waiting by Ctrl-C or a test's time limit, waits for the strand that runs."""
LOOK_S = 0.2
"""How often the driver looks whether a thread of the program's own, for which it waits, is still alive."""
JOIN_S = 5.0
"""How long shutdown() waits for strands to unwind."""


class Deadlock(RuntimeError):
    """Nothing can ever run again, and the driver waits.  The message says who waits for what."""


class Killed(BaseException):
    """Raised in a strand whose worker was killed; no Exception, so that the task's own handlers let it pass."""


class LocalPolicy(Policy):
    """A worker is handed one task at a time: none waits behind another, and nothing depends on run times."""

    def prefetch(self, mean_s: float | None) -> int:
        return 1


def _check_options(options: TaskOptions) -> None:
    """What local mode cannot do is refused here."""
    if options.checkpoint_every or options.checkpoint_interval_s:
        raise NotImplementedError(
            f"{options.name}: checkpoints protect an actor from the death of its process, and in local mode it has none. "
            "Use a session of processes for this test: minray.init() without local_mode."
        )


# ---------------------------------------------------------------- strands


class Strand:
    """A thread that may hold the baton: the driver, one of the program's own, or one that runs tasks.

    Waiting, it stands in `Stage.parked`.  It may go on when its waiter is set, its time has come, or an
    exception is to be raised in it."""

    __slots__ = (
        "core", "name", "is_driver", "bell", "thread", "inside", "waiter", "deadline", "patient", "since", "thrown", "leads",
        "awaits", "job", "worker",
    )  # fmt: skip

    def __init__(self, core: CoreWorker, name: str, is_driver: bool) -> None:
        self.core = core  # whose part of the session its calls are
        self.name = name
        self.is_driver = is_driver
        self.bell = threading.Lock()  # it sleeps on it until it is handed the baton
        self.bell.acquire()
        self.thread: threading.Thread | None = None
        self.inside = True  # in here; False: a thread of the driver, somewhere in its own code
        self.waiter: Waiter | None = None
        self.deadline: float | None = None
        self.patient = False  # goes on only when nobody else can
        self.since = 0  # when it parked
        self.thrown: BaseException | None = None
        self.leads = False  # it has been called only to say who is next
        self.awaits: Sequence[bytes] = ()  # for reports
        self.job: Callable[[], None] | None = None  # of a thread that runs tasks; None: it ends
        self.worker: LocalWorker | None = None

    def may_go_on(self, now: float) -> bool:
        return (
            self.thrown is not None
            or (self.waiter is None and self.deadline is None)
            or (self.waiter is not None and self.waiter.done)
            or (self.deadline is not None and self.deadline <= now)
        )


class LocalWorker(Worker):
    """Executes as every worker does; what it would write to its socket it says to the stage at once."""

    def __init__(self, stage: Stage, number: int, config: dict[str, Any]) -> None:
        self.stage = stage
        self.since = 0  # when it got something to do
        self.dead = False
        self.strands: dict[Strand, bytes] = {}  # that run its tasks
        super().__init__(None, config, number)  # type: ignore[arg-type]

    def _open_channel(self, sock: Any, config: dict[str, Any], number: int) -> None:
        self.references = self.stage.references
        self.unpinned = _Unpins(self.stage.unpinned, number)  # type: ignore[assignment]
        self.arena = self.stage.arena
        self.loop = StageLoop(self.stage)
        self._black_box = memoryview(bytearray(16))
        self._hold = memoryview(bytearray(1))

    def _settle_in(self) -> None:
        self.surroundings = _Surroundings()  # type: ignore[assignment]

    # ------------------------------------------------------------ the node's words

    def has_work(self) -> bool:
        """Whether a strand of its could begin something now."""
        if self.dead:
            return False
        if not self.queue:
            return self._exiting and not self.strands
        limit = 1
        if self._threads is not None and self.actor_options is not None:
            limit = self.actor_options.max_concurrency
        return len(self.strands) < limit

    def startable(self) -> list[int]:
        """Which tasks of the queue may be next: of an actor the first of each caller, as their order among each other
        is nobody's promise."""
        if self.actor_id is None or len(self.queue) < 2:
            return [0]
        record = self.stage.node.scheduler.workers.get(self.client)
        firsts: dict[Any, int] = {}
        for position, (task_id, *_) in enumerate(self.queue):
            task = record.in_flight.get(task_id) if record is not None else None
            firsts.setdefault(getattr(task, "caller", None), position)
        return list(firsts.values())

    def _on_RunTasks(self, tasks: list[tuple[Any, ...]]) -> None:
        if self.dead:
            return
        if not self.has_work():
            self.since = self.stage.moment()
        super()._on_RunTasks(tasks)

    def _on_ExitWorker(self) -> None:
        if not self.has_work():
            self.since = self.stage.moment()
        super()._on_ExitWorker()

    def _on_AssignResources(self, num_cpus: float, gpu_ids: tuple[int, ...], resources: dict[str, float]) -> None:
        self.resources, self.gpu_ids = resources, gpu_ids  # The environment is the driver's.

    def _on_CancelTask(self, task_id: bytes) -> None:
        if any(task[0] == task_id for task in self.queue):
            super()._on_CancelTask(task_id)
            return
        self._cancelled.add(task_id)
        for strand, running in self.strands.items():
            if running == task_id and self.actor is None:
                strand.thrown = KeyboardInterrupt()

    # ------------------------------------------------------------ executing

    def run_next(self, strand: Strand, position: int) -> None:
        """The job of a strand: one task, or the end of an actor."""
        if not self.queue:
            self._end_actor()
            self.dead = True
            self.stage.worker_ended(self, "ended")
            return
        task = self.queue[position]
        del self.queue[position]
        task_id = self.strands[strand] = task[0]
        threaded = self._threads is not None and self._templates_known[task[1]].kind == ACTOR_METHOD
        ident = threading.get_ident()
        try:
            if threaded:
                context = self._contexts[ident] = TaskContext(task_id, None)
                self._execute(task, context)
            else:
                self._black_box[:] = task_id
                self._run_one(task, self._context)
            if not self.dead:
                self.flush()
        except Killed:
            pass
        finally:
            self._contexts.pop(ident, None)
            del self.strands[strand]
            if self.dead and not self.strands:
                self.stage.worker_ended(self, "was killed")

    def die(self) -> None:
        """As if its process had been killed: its strands unwind before anybody else goes on."""
        if self.dead:
            return
        self.dead = True
        self.queue.clear()
        for strand in self.strands:
            strand.thrown = Killed()
        if not self.strands:
            self.stage.worker_ended(self, "was killed")

    def forget(self) -> None:
        """What was in its memory goes."""
        self.actor = None
        self._loaded.clear()
        self._results.clear()
        self._requests.clear()

    def context(self) -> TaskContext:
        return self._contexts.get(threading.get_ident(), self._context)

    # ------------------------------------------------------------ speaking to the node

    def send(self, event: Event) -> None:
        if self.dead:
            raise Killed
        self.stage.handle(event)
        if type(event) is ObjectPut:
            self._hand_over([event.object_id])
        if self.dead:
            raise Killed  # It has killed itself.

    send_now = send

    def _hand_over(self, object_ids: list[bytes]) -> None:
        """What this worker holds by what it said last is held by the driver, where all refs are counted."""
        self.stage.handle(ReferencesChanged(DRIVER, object_ids, []))
        self.stage.handle(ReferencesChanged(self.client, [], object_ids))

    def submit_spec(self, spec: TaskSpec, num_returns: int) -> None:
        self.send(TasksSubmitted(self.client, self.context().task_id, [spec]))
        self._hand_over([ids.return_id(spec.task_id, index) for index in range(num_returns)])
        self.stage.after_submitting(spec)

    def template(self, options: TaskOptions) -> int:
        _check_options(options)
        return super().template(options)

    def _give_back(self, task_ids: list[bytes]) -> None:
        self.stage.handle(TasksReturned(self.client, task_ids, self._forgets))

    def _flush(self) -> None:
        results = [self._results.popleft() for _ in range(len(self._results))]
        if results:
            self.send(TasksFinished(self.client, results))

    def _await(self, refs: Sequence[bytes], num_ready: int, fetch: bool, deadline: float | None) -> Any:
        object_ids = [bytes(ref) for ref in refs]
        self._blocked += 1
        try:
            if self.actor is None and self.queue:
                self._on_TakeBack(len(self.queue))
            with self.stage.awaiting(object_ids):
                return self.request(
                    lambda rid: ObjectsAwaited(self.client, rid, object_ids, num_ready, fetch, True), deadline
                )
        finally:
            self._blocked -= 1

    def deadline_in(self, seconds: float) -> float:
        return self.stage.now() + seconds

    def _spill(self, offset: int, size: int, path: str) -> str:
        return self.stage.spill(offset, path)

    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        result = super().future(ref)
        self.stage.let_others_finish(result)
        return result


class LocalDriver(Driver):
    """The driver of a session in this process: it waits at the stage, and there is nothing to end but strands."""

    stage: Stage

    def __init__(
        self,
        resources: dict[str, float],
        object_store_memory: int | None,
        namespace: str,
        policy: Policy | None,
        version: str,
        *,
        seed: bytes | None = None,
        choose: Callable[[list[Candidate]], int] | None = None,
        virtual: bool = False,
    ) -> None:
        CoreWorker.__init__(self)
        self.references = References()
        self._guard = self._unguarded = None
        self._main_thread = threading.main_thread().ident
        self._guard_interrupts()
        self.namespace = namespace
        self.started_s = clock.now()
        self.version = version
        self.job = None
        self.job_id = ids.root_task_id(os.urandom(16) if seed is None else seed)
        self._root = TaskContext(self.job_id, None)
        self.session = _NoSession()  # type: ignore[assignment]
        capacity = object_store_memory or machine.total_memory_bytes() * 3 // 10
        self._resources = resources
        stage = self.stage = Stage(self, resources, capacity, policy or LocalPolicy(), choose, virtual)
        self.raylet = stage  # type: ignore[assignment]
        self.node, self.arena, self.loop = stage.node, stage.arena, StageLoop(stage)
        self.unpinned = _Unpins(stage.unpinned, DRIVER)  # type: ignore[assignment]
        object_ref.connect(stage.core_of_this_thread, self.references.born, self.references.dropped)
        api.set_core_lookup(stage.core_of_this_thread)
        self._time = _Time(stage)
        self._time.install()

    def first_rows(self) -> dict[str, list[tuple[Any, ...]]]:
        return self._first_rows(self._resources, self.arena.capacity)

    def template(self, options: TaskOptions) -> int:
        _check_options(options)
        return super().template(options)

    def submit_spec(self, spec: TaskSpec, num_returns: int) -> None:
        self.stage.handle(TasksSubmitted(DRIVER, self.job_id, [spec]))
        self.stage.after_submitting(spec)

    def deadline_in(self, seconds: float) -> float:
        return self.stage.now() + seconds

    def _await(self, refs: Sequence[ObjectRef[Any]], deadline: float | None) -> None:
        with self.stage.awaiting(refs):
            super()._await(refs, deadline)

    def ready_positions(self, refs: Sequence[ObjectRef[Any]], num_ready: int, deadline: float | None) -> list[int]:
        found = self._look(refs, num_ready)
        if len(found) < num_ready:
            with self.stage.awaiting(refs), suppress(TimeoutError):
                self.request(lambda rid: ObjectsAwaited(DRIVER, rid, list(refs), num_ready, False, False), deadline)
            found = self._look(refs, num_ready)
        return found

    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        result = CoreWorker.future(self, ref)
        self.stage.let_others_finish(result)
        return result

    def loop_once(self) -> None:
        self.stage.pass_on()

    def _spill(self, offset: int, size: int, path: str) -> str:
        return self.stage.spill(offset, path)

    def flush_records(self, timeout: float = 0.0) -> str:
        return self.stage.history()

    def forget(self) -> None:
        self._let_go()

    def _let_go(self) -> None:
        self._time.remove()
        api.set_core_lookup(None)

    def close(self) -> None:
        """End all strands; arrays that came from `get` stay readable."""
        self.end_futures("minray was shut down while this future was waited for")
        self.stage.close()
        self._let_go()
        self.arena.close()
        self._unguard_interrupts()


class _NoSession:
    """Local mode has no directory."""

    path = ""
    name = "local"


class _Time:
    """`time.sleep` lets others go on, as it does when they are processes; and with virtual time the clocks are virtual.

    Only for those who call them as functions of the module `time`, and only in strands."""

    def __init__(self, stage: Stage) -> None:
        self._originals: dict[str, Any] = {}
        self._replacements: dict[str, Any] = {}
        strand_of, sleep = stage.strand_of, time.sleep

        def sleeping(seconds: float, /) -> None:
            if threading.get_ident() in strand_of and isinstance(seconds, (int, float)) and seconds >= 0:
                stage.sleep(seconds)
            else:
                sleep(seconds)

        self._replacements["sleep"] = sleeping
        if stage.virtual:
            began = {name: getattr(time, name)() for name in ("time", "monotonic", "perf_counter")}
            for name in began:
                self._replace_clock(stage, name, began[name])

    def _replace_clock(self, stage: Stage, name: str, began: float) -> None:
        real, real_ns = getattr(time, name), getattr(time, name + "_ns")

        def seconds() -> float:
            return began + stage._skipped_s if threading.get_ident() in stage.strand_of else real()  # type: ignore[no-any-return]

        def nanoseconds() -> int:
            return int(seconds() * 1e9) if threading.get_ident() in stage.strand_of else real_ns()  # type: ignore[no-any-return]

        self._replacements[name], self._replacements[name + "_ns"] = seconds, nanoseconds

    def install(self) -> None:
        for name, replacement in self._replacements.items():
            self._originals[name] = getattr(time, name)
            setattr(time, name, replacement)

    def remove(self) -> None:
        for name, original in self._originals.items():
            if getattr(time, name) is self._replacements[name]:
                setattr(time, name, original)
        self._originals.clear()


class _Surroundings:
    """A task's process is the driver's: nothing is put back."""

    disturbed = False
    stdout = property(lambda self: sys.stdout)
    stderr = property(lambda self: sys.stderr)

    def restore(self) -> None: ...


class _Unpins:
    """Views that are gone, of one process in the node's eyes: they go to the one list of the stage."""

    def __init__(self, all_of_them: deque[tuple[int, bytes]], client: int) -> None:
        self._all = all_of_them
        self._client = client

    def append(self, object_id: bytes) -> None:
        self._all.append((self._client, object_id))


class LocalArena(Arena):
    """Where large objects lie: a buffer for each, which lives as long as its last view, whatever the node does."""

    __slots__ = ("buffers",)

    def __init__(self, capacity: int) -> None:
        self.name = ""
        self.capacity = capacity
        self.buffers: dict[int, bytearray] = {}

    def back(self, offset: int, size: int) -> None: ...

    def write_view(self, offset: int, size: int) -> memoryview:
        """A new buffer: who still reads the last one at this place keeps it."""
        buffer = self.buffers[offset] = bytearray(size)
        return memoryview(buffer)

    def pinned_view(self, offset: int, size: int, on_release: Callable[[], None]) -> memoryview:
        window = (ctypes.c_ubyte * size).from_buffer(self.buffers[offset])
        weakref.finalize(window, on_release).atexit = False
        return memoryview(window).cast("B").toreadonly()

    def prune(self, allocator: Allocator) -> None:
        for offset in [offset for offset in self.buffers if offset not in allocator.blocks]:
            del self.buffers[offset]

    def close(self) -> None:
        self.buffers.clear()

    def unlink(self) -> None: ...


class StageLoop(Loop):
    """What a `CoreWorker` waits with."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def start(self) -> None: ...

    def close(self) -> None: ...

    def wait(self, waiter: Waiter, deadline: float | None = None) -> bool:
        return self._stage.wait(waiter, deadline)


# ---------------------------------------------------------------- the stage


class Journal(Protocol):
    """Who is told what happens: explore.py prints it."""

    def note(self, strand: Strand, text: str) -> None: ...


Candidate = tuple[int, Strand | None, "LocalWorker | None", int]
"""(since, strand that may go on, or None and: worker that may begin the task at this position of its queue)."""


class Stage:
    """The shell: carries out what the node commands, and says who runs.  For the driver it is also the raylet."""

    flush_each = False
    broken = ""
    warning = ""

    def __init__(
        self,
        driver: LocalDriver,
        resources: dict[str, float],
        capacity: int,
        policy: Policy,
        choose: Callable[[list[Candidate]], int] | None,
        virtual: bool,
    ) -> None:
        self.driver = driver
        self.references = driver.references
        self.lock = threading.RLock()  # the node's tables, which threads of the program's own may come to at any time
        self.submitted: tuple[()] = ()  # nothing waits to be handed to the node, unlike in a raylet
        self.unpinned: deque[tuple[int, bytes]] = deque()
        self.arena = LocalArena(capacity)
        self.directory = ""  # for what does not fit into memory, and for the history: made when it is needed
        self.node = Node(
            {name: round(amount * UNIT) for name, amount in resources.items()},
            capacity,
            self._spill_path,
            policy,
            session_id=driver.job_id[:8],
        )
        self.workers: dict[int, LocalWorker] = {}
        self.parked: list[Strand] = []
        self.resting: list[Strand] = []  # threads that have no job
        self.strand_of: dict[int, Strand] = {}  # by the thread's number
        self.closed = False
        self.virtual = virtual
        self.choose = choose
        self.journal: Journal | None = None
        self.max_steps = sys.maxsize
        self.steps = 0
        self.step_timeout_s: float | None = None
        self._skipped_s = 0.0  # what the clock has jumped, in all
        self._began_s = monotonic()
        self._events: deque[Event] = deque()
        self._handling = False
        self._answers: deque[tuple[Waiter, Any]] = deque()
        self._moments = itertools.count(1)
        self._news = threading.Event()  # a thread of the program's own wants the baton, or has said something
        self._threads_made = 0
        self._frames_written = 0
        self._futures: list[Future[Any]] = []  # asked for, and not done
        self._rows_waiting = 0
        self._doers: dict[type, Callable[[Any], None]] = {
            StartWorker: self._start_worker,
            KillWorker: self._kill_worker,
            Reply: self._reply,
            DeleteFile: self._delete_file,
            Warn: self._warn,
            HoldNext: self._hold_next,
        }
        self.config = {
            "job_id": driver.job_id, "namespace": driver.namespace, "job": None, "gpus": [], "environment": {},
            "session": "",
        }  # fmt: skip
        self.main = self._enter(Strand(driver, "driver", True))
        self.current = self.main
        self.main.inside = False
        for command in self.node.start_workers(int(self.node.scheduler.pool_size)):
            self._do([command])
        self._work_off()

    # ------------------------------------------------------------ time

    def now(self) -> float:
        """Monotonic, in s, and, if time is virtual, only by jumps."""
        return self._began_s + self._skipped_s if self.virtual else monotonic() + self._skipped_s

    def moment(self) -> int:
        return next(self._moments)

    # ------------------------------------------------------------ events and commands

    def handle(self, event: Event) -> None:
        """An event, and all that follows from it at once."""
        self._handle(event)
        self._after()

    @uninterruptible
    def _handle(self, event: Event) -> None:
        with self.lock:
            self._events.append(event)
            self._work_off()

    def drain(self) -> None:
        """What was dropped is known to the node."""
        self._drain()
        self._after()

    @uninterruptible
    def _drain(self) -> None:
        with self.lock:
            self._work_off()

    def _work_off(self) -> None:
        if self._handling:
            return  # Further up on the stack it goes on.
        self._handling = True
        references, node = self.references, self.node
        try:
            while True:
                if references.born:
                    self._do(node.handle(ReferencesChanged(DRIVER, references.count_born(), []), self._time()))
                if self._events:
                    event = self._events.popleft()
                    self._do(node.handle(event, self._time()))
                    self._rows_waiting += 1
                elif self.unpinned:  # What was dropped comes after what was said with it.
                    client, object_id = self.unpinned.popleft()
                    if client == DRIVER or client in node.scheduler.workers:
                        self._do(node.handle(Unpinned(client, [object_id]), self._time()))
                elif references.dropped:
                    released = references.count_dropped(len(references.dropped))
                    self._do(node.handle(ReferencesChanged(DRIVER, [], released), self._time()))
                else:
                    break
        except Exception as error:
            self.broken = f"minray has failed ({type(error).__name__}: {error}), and what it knows may be wrong."
            raise
        finally:
            self._handling = False
        if len(self.arena.buffers) > len(node.lineage.arena.blocks):
            self.arena.prune(node.lineage.arena)
        if self._rows_waiting > ROWS_AT_ONCE:
            self._write_rows()

    def _time(self) -> float:
        return clock.EPOCH + self.now()

    def _after(self) -> None:
        """Those who wait for a future are told with the lock free: they may come back at once."""
        while self._answers:
            try:
                waiter, answer = self._answers.popleft()
            except IndexError:
                break
            waiter.set(answer)
        self._news.set()
        raise_deferred()

    def _do(self, commands: list[Command]) -> None:
        for command in commands:
            do = self._doers.get(type(command))
            if do is not None:
                do(command)
            else:
                worker = self.workers.get(command.client)  # type: ignore[union-attr]
                if worker is not None:
                    getattr(worker, "_on_" + type(command).__name__)(*command[1:])

    def _start_worker(self, command: StartWorker) -> None:
        self.workers[command.client] = LocalWorker(self, command.client, self.config)
        self._events.append(WorkerStarted(command.client, os.getpid()))

    def _kill_worker(self, command: KillWorker) -> None:
        worker = self.workers.get(command.client)
        if worker is not None and command.only_if_running in (None, *worker.strands.values()):
            worker.die()

    def worker_ended(self, worker: LocalWorker, reason: str) -> None:
        self.workers.pop(worker.client, None)
        running = bytes(worker._black_box) if reason == "was killed" else None
        worker.forget()
        if running in (ids.NIL, bytes(16)):
            running = None
        with self.lock:
            self._events.append(WorkerDied(worker.client, reason, running))
            self._work_off()

    def _reply(self, command: Reply) -> None:
        core = self.workers.get(command.client) if command.client else self.driver
        if core is None:
            return
        waiter = core.answered(command.request_id, command.answer)
        if waiter is None:
            core.answered_in_vain(command.answer)
        elif type(waiter) is Waiter:
            waiter.set(command.answer)
        else:
            self._answers.append((waiter, command.answer))

    def _delete_file(self, command: DeleteFile) -> None:
        with suppress(OSError):
            os.unlink(command.path)

    def _warn(self, command: Warn) -> None:
        print(f"minray: {command.text}", file=sys.stderr)

    def _hold_next(self, command: HoldNext) -> None:
        raise AssertionError(f"worker {command.client} answers at once and need not be held")

    # ------------------------------------------------------------ the baton

    def core_of_this_thread(self) -> CoreWorker:
        strand = self.strand_of.get(threading.get_ident())
        return strand.core if strand is not None else self.driver

    def _enter(self, strand: Strand) -> Strand:
        strand.thread = threading.current_thread()
        self.strand_of[threading.get_ident()] = strand
        return strand

    def this_strand(self) -> Strand:
        """Of the calling thread, which holds the baton from now on."""
        strand = self.strand_of.get(threading.get_ident())
        if strand is None or strand.thread is not threading.current_thread():
            if self.virtual:
                raise RuntimeError(
                    f"{threading.current_thread().name} is a thread of the program's own, which minray.testing.explore "
                    "cannot schedule. Let tasks do what it does, or test it with minray.init(local_mode=True)."
                )
            strand = self._enter(Strand(self.driver, f"thread {threading.current_thread().name}", True))
        if strand.is_driver:
            self._claim(strand)
        return strand

    def _claim(self, strand: Strand) -> None:
        """Take the baton from a thread of the driver that does not need it, else wait for it."""
        with self.lock:
            if self.current is strand or (self.current.is_driver and not self.current.inside):
                self.current = strand
                strand.inside = True
                return
            strand.inside = True
            strand.waiter = strand.deadline = None
            strand.since = self.moment()
            self.parked.append(strand)
            self._news.set()
        self._sleep_until_called(strand)

    def wait(self, waiter: Waiter, deadline: float | None) -> bool:
        """Until the waiter is set: others go on meanwhile.  False when the time is over first."""
        if not waiter.done:
            strand = self.this_strand()
            self._park(strand, waiter, deadline)
            raise_deferred()
        return waiter.done

    def pass_on(self) -> None:
        """Others may go on, and then this strand: a point between two steps."""
        self._park(self.this_strand(), None, None)

    def after_submitting(self, spec: TaskSpec) -> None:
        self.pass_on()

    def sleep(self, seconds: float) -> None:
        strand = self.this_strand()
        if self.journal is not None:
            self.journal.note(strand, f"sleeps {seconds:g} s")
        self._park(strand, None, self.now() + seconds)
        raise_deferred()

    def let_others_finish(self, future: Future[Any]) -> None:
        """Whoever asks for a future will wait for it in a way that cannot be seen here: everybody else goes first."""
        if not future.done():
            strand = self.this_strand()
            strand.patient = True
            try:
                self._park(strand, _FutureDone(future), None)
            finally:
                strand.patient = False
            if not (future.done() or self.virtual):
                with self.lock:
                    self._futures.append(future)
                    if len(self._futures) > 1:
                        return
                threading.Thread(target=self._take_care, name="minray-local-caretaker", daemon=True).start()

    def _take_care(self) -> None:
        """A thread that lets others go on while the one that wants a future waits for it, in an event loop say."""
        while True:
            future = self._futures[0]
            try:
                self._park(self.this_strand(), _FutureDone(future), None)
            except Deadlock as error:
                with suppress(InvalidStateError):
                    future.set_exception(error)
            except Killed:
                return
            with self.lock:
                del self._futures[0]
                if not self._futures:
                    return

    class _Awaiting:
        def __init__(self, strand: Strand | None, object_ids: Sequence[bytes]) -> None:
            self.strand, self.object_ids = strand, object_ids

        def __enter__(self) -> None:
            if self.strand is not None:
                self.strand.awaits = self.object_ids

        def __exit__(self, *_: Any) -> None:
            if self.strand is not None:
                self.strand.awaits = ()

    def awaiting(self, object_ids: Sequence[bytes]) -> Stage._Awaiting:
        """Meanwhile this strand waits for these."""
        return self._Awaiting(self.strand_of.get(threading.get_ident()), object_ids)

    def _park(self, strand: Strand, waiter: Waiter | None, deadline: float | None) -> None:
        self._stand_aside(strand, waiter, deadline)
        thrown, strand.thrown = strand.thrown, None
        if thrown is not None:
            raise thrown

    @uninterruptible
    def _stand_aside(self, strand: Strand, waiter: Waiter | None, deadline: float | None) -> None:
        if strand.thrown is not None:
            return  # Killed or cancelled by what it has done itself.
        with self.lock:
            strand.waiter, strand.deadline = waiter, deadline
            strand.since = self.moment()
            self.parked.append(strand)
        try:
            goes_on = self._hand_on(strand)
        except BaseException:
            with self.lock:
                self.parked.remove(strand)
                strand.inside = not strand.is_driver
            raise
        if not goes_on:
            self._sleep_until_called(strand)
        if strand.is_driver:
            self._leave(strand)

    def _leave(self, strand: Strand) -> None:
        """The thread goes back to its own code, and keeps the baton only if no other of its kind waits in here."""
        with self.lock:
            strand.inside = False
            other = next((s for s in self.parked if s.is_driver), None)
            if other is not None:
                self.current = other
                other.leads = True
                other.bell.release()

    def _hand_on(self, giver: Strand | None) -> bool:
        """Find out who is next, and ring, unless it is the giver.  Only whoever holds the baton does this."""
        strand = self._next()
        with self.lock:
            if strand in self.parked:
                self.parked.remove(strand)
            self.current = strand
            self.steps += 1
        if strand is giver:
            return True
        strand.bell.release()
        return False

    def _sleep_until_called(self, strand: Strand) -> None:
        try:
            self._sleep(strand)
            while strand.leads:
                strand.leads = False
                if not self._hand_on(strand):
                    self._sleep(strand)
        except BaseException:
            # Ctrl-C, or a test's time limit.  Two must not run at once, unless the other does not let go.
            strand.waiter = strand.deadline = None
            self._news.set()
            if not strand.bell.acquire(timeout=INTERRUPT_PATIENCE_S):
                with self.lock:
                    if strand in self.parked:
                        self.parked.remove(strand)
                    self.current = strand
                    self.broken = (
                        "the driver was interrupted while a task ran that did not come to an end; this session cannot "
                        "go on. Call minray.shutdown(), and begin again."
                    )
            strand.inside = False
            raise

    @interruptible
    def _sleep(self, strand: Strand) -> None:
        raise_deferred()
        if self.step_timeout_s is None or strand is not self.main:
            strand.bell.acquire()
            return
        while True:
            steps = self.steps
            if strand.bell.acquire(timeout=self.step_timeout_s):
                return
            if steps == self.steps:
                raise TimeoutError(
                    f"a step of {self.current.name} has taken longer than {self.step_timeout_s:g} s: it computes, or "
                    "waits for something that is not minray's (a lock, a socket, input). While it does, nobody else "
                    "can go on here."
                )

    # ------------------------------------------------------------ who is next

    def candidates(self) -> list[Candidate]:
        now = self.now()
        found: list[Candidate] = [
            (strand.since, strand, None, 0)
            for strand in self.parked
            if strand.may_go_on(now)
        ]
        for worker in self.workers.values():
            if worker.has_work():
                if self.choose is None:
                    found.append((worker.since, None, worker, 0))
                else:
                    found += [(worker.since, None, worker, position) for position in worker.startable()]
        return found

    def _next(self) -> Strand:
        while True:
            self._drain()
            dying = next((s for s in self.parked if isinstance(s.thrown, Killed)), None)
            if dying is not None:
                return dying
            found = self.candidates()
            if found:
                if self.steps >= self.max_steps and self.main in self.parked:
                    self.main.thrown = TimeoutError(
                        f"the program has not ended after {self.steps:,} steps, so it is taken to go on for ever. If it "
                        "does end, allow more: max_steps=..."
                    )
                    return self.main
                at = found.index(min(found)) if self.choose is None else self.choose(found)
                _, strand, worker, position = found[at]
                return strand if strand is not None else self._on_stage(worker, position)  # type: ignore[arg-type]
            patient = next((strand for strand in self.parked if strand.patient), None)
            if patient is not None and (not self.virtual or self._next_deadline() is None):
                return patient
            if not self._let_time_pass():
                stuck = next(strand for strand in self.parked if strand.is_driver)
                stuck.thrown = Deadlock(self.report())
                return stuck

    def _next_deadline(self) -> float | None:
        return min((s.deadline for s in self.parked if s.deadline is not None), default=None)

    def _let_time_pass(self) -> bool:
        """Nobody can go on: until when?  False: for ever."""
        deadline, wake_at = self._next_deadline(), self.node.wake_at
        if wake_at is not None:
            wake_at -= clock.EPOCH
            if deadline is None or wake_at <= deadline:
                if deadline is None or self.virtual:
                    # The node has something to look at, which will set nobody going but may end or warn of something.
                    self._skipped_s += max(0.0, wake_at - self.now())
                    self._handle(Ticked())
                    return True
                deadline = wake_at
        if deadline is None:
            others = self.strand_of.values()
            known = {strand.thread for strand in others}
            alive = [t for t in threading.enumerate() if t not in known and not t.daemon]
            alive += [s.thread for s in others if s.is_driver and not s.inside and s.thread and s.thread.is_alive()]
            if self.virtual or not alive:
                return False
            self._news.clear()
            self._news.wait(LOOK_S)
            return True
        left = deadline - self.now()
        if left > 0:
            if self.virtual:
                self._skipped_s += left
            else:
                self._news.clear()
                self._wait_for_news(left)
        if self.node.wake_at is not None and self.node.wake_at <= self._time():
            self._handle(Ticked())
        return True

    @interruptible
    def _wait_for_news(self, seconds: float) -> None:
        raise_deferred()
        self._news.wait(seconds)

    def _on_stage(self, worker: LocalWorker, position: int) -> Strand:
        """A thread that begins that task of the worker when the bell rings."""
        if self.resting:
            strand = self.resting.pop()
        else:
            self._threads_made += 1
            strand = Strand(worker, "", False)
            strand.thread = threading.Thread(
                target=self._live, args=(strand,), name=f"minray-local-{self._threads_made}", daemon=True
            )
            strand.thread.start()
        strand.core = strand.worker = worker
        task_id = worker.queue[position][0] if worker.queue else None
        strand.name = self.name_of(task_id) if task_id is not None else f"the end of {worker.label() or 'a worker'}"
        if self.journal is not None and task_id is not None:
            self.journal.note(strand, "starts")
        strand.job = lambda: worker.run_next(strand, position)
        # From now on it has begun: nobody else gets this task or this place.
        worker.strands[strand] = task_id or ids.NIL
        return strand

    def _live(self, strand: Strand) -> None:
        self.strand_of[threading.get_ident()] = strand
        while True:
            strand.bell.acquire()
            if strand.job is None:
                break
            try:
                strand.job()
            except Killed:
                pass
            except BaseException as error:  # noqa: B036  (an error in minray: the driver must learn of it)
                self.main.thrown = error
            strand.job = None
            strand.thrown = None
            if self.closed:
                break
            self.resting.append(strand)
            try:
                self._hand_on(None)
            except BaseException as error:  # noqa: B036
                self.main.thrown = error
                self.current = self.main
                with suppress(ValueError):
                    self.parked.remove(self.main)
                self.main.bell.release()
        self.strand_of.pop(threading.get_ident(), None)

    # ------------------------------------------------------------ reports

    def name_of(self, object_id: bytes) -> str:
        object_id = bytes(object_id)  # A ref refuses what bytes can do.
        task = self.node.lineage.tasks.get(ids.task_of(object_id))
        short = ids.short(object_id)
        return f"{task.template.options.name} [{short}]" if task is not None else f"object {short}"

    def report(self) -> str:
        """Who waits for what."""
        lines = []
        for strand in self.parked:
            names = [self.name_of(object_id) for object_id in strand.awaits if self._is_pending(object_id)]
            what = ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")
            lines.append(f"  {strand.name} waits for {what or 'something that nobody will do'}")
        begun = {task_id for worker in self.workers.values() for task_id in worker.strands.values()}
        for task in self.node.lineage.tasks.values():
            if task.state < FINISHED and task.spec.task_id not in begun:
                lines.append(f"  {self.name_of(task.spec.task_id)} {self._why_waiting(task)}")
        return "nothing can go on, and the driver waits: this would wait for ever.\n" + "\n".join(lines)

    def _is_pending(self, object_id: bytes) -> bool:
        entry = self.node.objects.get(object_id)
        return entry is not None and entry.data is None

    def _why_waiting(self, task: Task) -> str:
        if task.state == PENDING_ARGS_AVAIL:
            missing = [self.name_of(object_id) for object_id in task.spec.deps if self._is_pending(object_id)]
            return f"has not begun: it needs the result of {', '.join(missing)}"
        actor = self.node.actors.actors.get(task.spec.actor_id or b"")
        if actor is not None:
            worker = self.workers.get(actor.worker.client) if actor.worker is not None else None
            busy = [self.name_of(task_id) for task_id in worker.strands.values()] if worker is not None else []
            name = actor.options.class_name
            return f"has not begun: its actor {name} " + (
                f"executes {', '.join(busy)}" if busy else "has not been constructed"
            )
        if task.state == PENDING_NODE_ASSIGNMENT:
            free = {name: amount for name, amount in self.node.scheduler.available.items() if name != "memory"}
            wants = amounts(task.template.options.resources)
            return f"has not begun: it needs {wants}, and free are {amounts(free.items())}"
        return "has not begun"

    # ------------------------------------------------------------ files

    def _place(self) -> str:
        if not self.directory:
            self.directory = tempfile.mkdtemp(prefix="minray-local-")
            atexit.register(shutil.rmtree, self.directory, ignore_errors=True)
        return self.directory

    def _spill_path(self, object_id: bytes) -> str:
        return os.path.join(self._place(), object_id.hex())

    def spill(self, offset: int, path: str) -> str:
        try:
            write_file(path, memoryview(self.arena.buffers[offset]))
        except OSError:
            return ""
        return path

    def _write_rows(self) -> None:
        """To the history, which is a file as soon as it is long, or somebody asks for it."""
        from minray.gcs import Gcs

        self._rows_waiting = 0
        rows = self.node.take_rows(self._time())
        if not self._frames_written:
            rows = {**self.driver.first_rows(), **rows}
        if rows:
            self._frames_written += 1
            gcs = Gcs(os.path.join(self._place(), "gcs.sqlite"))  # Each time: a connection belongs to its thread.
            gcs.write([(self._frames_written, list(rows.items()))])
            gcs.database.close()

    def history(self) -> str:
        with self.lock:
            self._write_rows()
        return os.path.join(self._place(), "gcs.sqlite")

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        self.closed = True
        for worker in self.workers.values():
            worker.dead = True
        for _ in range(1000):  # A strand that catches everything and goes on is left behind.
            strand = next((s for s in self.parked if s is not self.main), None)
            if strand is None:
                break
            self.parked.remove(strand)
            strand.thrown = Killed()
            strand.bell.release()
            if strand.thread is not None:
                strand.thread.join(JOIN_S)
        for strand in self.resting:
            strand.bell.release()
            if strand.thread is not None:
                strand.thread.join(JOIN_S)
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
            atexit.unregister(shutil.rmtree)


class _FutureDone(Waiter):
    """Done when a future is."""

    __slots__ = ("_of",)

    def __init__(self, future: Future[Any]) -> None:
        self._of = future
        super().__init__()

    @property
    def done(self) -> bool:  # type: ignore[override]
        return self._of.done()

    @done.setter
    def done(self, value: bool) -> None: ...
