"""The stage: who runs, in local mode, and how what the node commands is done there.

Every task runs in a thread of its own (a *strand*), for it must be able to stand still in the middle.  But of all
strands and the driver only the one that holds the *baton* runs.  It hands the baton on at these points and nowhere
else: it has submitted something, it waits (``get``, ``wait``, ``time.sleep``), it has ended.  Who is next is
`choose`'s to say: by default whoever has been ready for longest, so a task runs as soon as it is submitted if there are
resources for it, and a program runs the same each time.  explore.py chooses by lot.

Time is real, or virtual: then nobody waits, and when nobody can go on the clock jumps to the next moment at which
somebody can.  If there is no such moment either, it is a deadlock, and the driver is told who waits for what.

Threads of the program's own may use the API as well.  Like the driver's first thread, whose kind they are, they have
the baton while they are in here, and lose it to another of their kind while they are elsewhere.  When one leaves while
others of them wait, one of those *leads*: it says who is next until it is its own turn.

The stage is a shell around the node, as a raylet is one: it carries commands out, at once and by a call, and decides
nothing that the node decides.  It does not know how a task is executed: that is local.py's.
"""

from __future__ import annotations

import atexit
import itertools
import os
import shutil
import sys
import tempfile
import threading
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import contextmanager, suppress
from time import monotonic
from typing import TYPE_CHECKING, Any, Protocol

from minray import clock, ids
from minray.interrupts import interruptible, raise_deferred, uninterruptible
from minray.lineage import Task
from minray.loop import Loop, Waiter
from minray.messages import (
    DRIVER, Command, DeleteFile, Event, HoldNext, KillWorker, ReferencesChanged, Reply, StartWorker, Ticked, Unpinned,
    Warn, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.node_tasks import amounts
from minray.object_store import write_file
from minray.policy import Policy
from minray.task_spec import FINISHED, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, UNIT, TaskOptions, TaskSpec

if TYPE_CHECKING:
    from minray.core_worker import CoreWorker
    from minray.local import LocalArena, LocalDriver, LocalWorker

ROWS_AT_ONCE = 10_000
"""After so many events what is new goes to the history's file."""
INTERRUPT_PATIENCE_S = 1.0
"""How long the driver, told to stop waiting by Ctrl-C or a test's time limit, waits for the strand that runs."""
LOOK_S = 0.2
"""How often the driver looks whether a thread of the program's own, for which it waits, is still alive."""
OVERSLEPT_S = 1e-6
"""Who sleeps in virtual time wakes so much later: not a rounding error too early."""
SHUT_DOWN = "minray was shut down while this thread waited"
JOIN_S = 5.0
"""How long shutdown() waits for a strand to unwind."""


class Deadlock(RuntimeError):
    """Nothing can ever run again, and the driver waits.  The message says who waits for what."""


class Endless(RuntimeError):
    """The program, or a step of it, does not come to an end within the limits that `explore` was given."""


class Killed(BaseException):
    """Raised in a strand whose worker was killed; no Exception, so that the task's own handlers let it pass."""


class Strand:
    """A thread that may hold the baton: the driver, one of the program's own, or one that runs tasks.

    Waiting, it stands in `Stage.parked`.  It may go on when its waiter is set, its time has come, or an
    exception is to be raised in it."""

    __slots__ = (
        "core", "name", "is_driver", "bell", "thread", "inside", "waiter", "deadline", "patient", "since", "thrown",
        "leads", "awaits", "job", "worker",
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


class StageLoop(Loop):
    """What a `CoreWorker` waits with."""

    def __init__(self, stage: Stage) -> None:
        self._stage = stage

    def start(self) -> None: ...

    def close(self) -> None: ...

    def wait(self, waiter: Waiter, deadline: float | None = None) -> bool:
        return self._stage.wait(waiter, deadline)


class Journal(Protocol):
    """Who is told what happens: explore.py prints it."""

    def turn(self, strand: Strand) -> None:
        """It has the baton now; all that is noted from now on it does."""

    def note(self, text: str) -> None: ...

    def submits(self, spec: TaskSpec, options: TaskOptions) -> None: ...

    def waits(self, object_ids: Sequence[bytes]) -> None: ...

    def ends(self, task_id: bytes, status: int, payload: Any) -> None: ...

    def name_of(self, object_id: bytes) -> str: ...


Candidate = tuple[int, Strand | None, "LocalWorker | None", int]
"""(since, strand that may go on, or None and: worker that may begin the task at this position of its queue)."""


class Stage:
    """The shell: carries out what the node commands, and says who runs.  For the driver it is also the raylet."""

    flush_each = False
    broken = ""
    warnings: list[str] = []

    def __init__(
        self,
        driver: LocalDriver,
        make_worker: Callable[[Stage, int, dict[str, Any]], LocalWorker],
        arena: LocalArena,
        resources: dict[str, float],
        policy: Policy,
        choose: Callable[[list[Candidate]], int] | None,
        virtual: bool,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        self.driver = driver
        self._make_worker = make_worker
        self.references = driver.references
        self.lock = threading.RLock()  # the node's tables, which threads of the program's own may come to at any time
        self.interrupts_change: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        self.submitted: tuple[()] = ()  # nothing waits to be handed to the node, unlike in a raylet
        self.unpinned: deque[tuple[int, bytes]] = deque()
        self.arena = arena
        self.directory = ""  # for what does not fit into memory, and for the history: made when it is needed
        self.node = Node(
            {name: round(amount * UNIT) for name, amount in resources.items()},
            arena.capacity,
            self._spill_path,
            policy,
            session_id=driver.job_id[:8],
            labels=labels,
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
        self._began_s = float(int(monotonic()))  # Round: what is added in seconds is found again by subtraction.
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
        self.config: dict[str, Any] = {
            "job_id": driver.job_id, "namespace": driver.namespace, "job": None, "gpus": [], "environment": {},
            "session": "", "default_lifetime": driver.default_lifetime,
        }  # fmt: skip
        self.main = self._enter(Strand(driver, "driver", True))
        self.current = self.main
        self.main.inside = False
        for command in self.node.start_workers(int(self.node.scheduler.workers_for_cpus)):
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
                if self.unpinned:
                    client, object_id = self.unpinned.popleft()
                    if client == DRIVER or client in node.scheduler.workers:
                        self._do(node.handle(Unpinned(client, [object_id]), self._time()))
                elif references.dropped and not self._events and not self._take_results():
                    released = references.count_dropped(len(references.dropped))
                    self._do(node.handle(ReferencesChanged(DRIVER, [], released), self._time()))
                elif self._events:
                    self._do(node.handle(self._events.popleft(), self._time()))
                    self._rows_waiting += 1
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

    def _take_results(self) -> bool:
        """Results that a strand is about to report come first: they may hold what its task has let go of."""
        for worker in self.workers.values():
            if worker._results and not worker.dead:
                self._events.append(worker.take_results())
        return bool(self._events)

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
                if worker is not None and not worker.dead:
                    getattr(worker, "_on_" + type(command).__name__)(*command[1:])

    def _start_worker(self, command: StartWorker) -> None:
        self.workers[command.client] = self._make_worker(self, command.client, self.config)
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
            if self.broken:
                raise RuntimeError(self.broken)
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
        if self.journal is not None:
            self.journal.submits(spec, self.node.lineage.tasks[spec.task_id].template.options)
        self.pass_on()

    def sleep(self, seconds: float) -> None:
        strand = self.this_strand()
        if self.journal is not None:
            self.journal.note(f"sleeps {seconds:g} s")
        self._park(strand, None, self.now() + seconds)
        raise_deferred()

    def let_others_finish(self, future: Future[Any]) -> None:
        """Whoever asks for a future will wait for it in a way that cannot be seen here: everybody else goes first."""
        if not future.done():
            strand = self.this_strand()
            strand.patient = True
            try:
                self._park(strand, Until(future.done), None)
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
                self._park(self.this_strand(), Until(future.done), None)
            except Deadlock as error:
                with suppress(InvalidStateError):
                    future.set_exception(error)
            except RuntimeError:
                return  # The session has ended.
            with self.lock:
                del self._futures[0]
                if not self._futures:
                    return

    @contextmanager
    def awaiting(self, object_ids: Sequence[bytes]) -> Iterator[None]:
        """Meanwhile this strand waits for these."""
        strand = self.strand_of.get(threading.get_ident())
        if strand is None:
            yield
            return
        strand.awaits = object_ids
        if self.journal is not None:
            self.journal.waits(object_ids)
        try:
            yield
        finally:
            strand.awaits = ()

    def _park(self, strand: Strand, waiter: Waiter | None, deadline: float | None) -> None:
        self._stand_aside(strand, waiter, deadline)
        thrown, strand.thrown = strand.thrown, None
        if thrown is not None:
            raise thrown

    @uninterruptible
    def _stand_aside(self, strand: Strand, waiter: Waiter | None, deadline: float | None) -> None:
        if strand.thrown is not None:
            return  # Killed or cancelled by what it has done itself.
        if self.closed:
            strand.thrown = RuntimeError(SHUT_DOWN) if strand.is_driver else Killed()
            return
        with self.lock:
            strand.waiter, strand.deadline = waiter, deadline
            strand.since = self.moment()
            self.parked.append(strand)
        try:
            goes_on = self._hand_on(strand)
        except BaseException:
            with self.lock:
                if strand in self.parked:
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
            if self.journal is not None:
                self.journal.turn(strand)
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
                raise Endless(
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
                found += [(worker.since, None, worker, position) for position in worker.startable()]
        return found

    def _next(self) -> Strand:
        while True:
            if self.closed:
                raise RuntimeError(SHUT_DOWN)
            self._drain()
            dying = next((s for s in self.parked if isinstance(s.thrown, Killed)), None)
            if dying is not None:
                return dying
            found = self.candidates()
            if found:
                if self.steps >= self.max_steps and self.main in self.parked:
                    self.main.thrown = Endless(
                        f"the program has not ended after {self.steps:,} steps, so it is taken to go on for ever. If "
                        "it does end, allow more: max_steps=..."
                    )
                    return self.main
                at = self._longest_ready(found) if self.choose is None else self.choose(found)
                _, strand, worker, position = found[at]
                return strand if strand is not None else self._on_stage(worker, position)  # type: ignore[arg-type]
            patient = next((strand for strand in self.parked if strand.patient), None)
            if patient is not None and (not self.virtual or self._next_deadline() is None):
                return patient
            if not self._let_time_pass():
                stuck = self.main if self.main in self.parked else next(s for s in self.parked if s.is_driver)
                stuck.thrown = Deadlock(self.report())
                return stuck

    @staticmethod
    def _longest_ready(found: list[Candidate]) -> int:
        return min(range(len(found)), key=lambda at: found[at][0])

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
                self._skipped_s += left + OVERSLEPT_S
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
        strand.name = self.name_of(task_id) if task_id is not None else f"end of {worker.label() or 'a worker'}"
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
                break  # close() waits for this thread, and rings the next itself.
            self.resting.append(strand)
            try:
                self._hand_on(None)
            except BaseException as error:  # noqa: B036
                if self.closed:
                    break
                self.main.thrown = error
                self.current = self.main
                with suppress(ValueError):
                    self.parked.remove(self.main)
                self.main.bell.release()
        self.strand_of.pop(threading.get_ident(), None)

    # ------------------------------------------------------------ reports

    def name_of(self, object_id: bytes) -> str:
        if self.journal is not None:
            return self.journal.name_of(object_id)
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
        self._news.set()  # Somebody may be waiting for time to pass.
        for worker in self.workers.values():
            worker.dead = True
        for _ in range(1000):  # A strand that catches everything and goes on is left behind.
            strand = next((s for s in self.parked if s is not self.main), None)
            if strand is None:
                break
            self.parked.remove(strand)
            strand.thrown = RuntimeError(SHUT_DOWN) if strand.is_driver else Killed()
            with self.lock:
                has_rung, strand.leads = strand.leads, False  # This thread has just passed it the lead, in `_leave`.
            if not has_rung:
                strand.bell.release()
            if strand.thread is not None and not strand.is_driver:
                strand.thread.join(JOIN_S)
        for strand in self.resting:
            strand.bell.release()
            if strand.thread is not None:
                strand.thread.join(JOIN_S)
        if self.directory:
            shutil.rmtree(self.directory, ignore_errors=True)
            atexit.unregister(shutil.rmtree)


class Until(Waiter):
    """Done when something holds."""

    __slots__ = ("_holds",)

    def __init__(self, holds: Callable[[], bool]) -> None:
        self._holds = holds
        super().__init__()

    @property
    def done(self) -> bool:
        return self._holds()

    @done.setter
    def done(self, value: bool) -> None: ...
