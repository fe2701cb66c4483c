"""Faults on purpose: kill, freeze, slow, lose and fill, in a test of your own program.

>>> @minray.remote
... def double(x):
...     return 2 * x
>>> with minray.testing.faults() as faults:
...     faults.kill_worker(of=double)  # at the first message that hands it a call of double
...     minray.get(double.remote(21))
42

A fault is planned for the n-th *message*: one event or command (messages.py) between the node and a worker, whatever
frame it travels in.  A message to a worker that is killed at it is never read; a message from one is still heard.
Either way the process has ended before the node does anything else, so the same plan gives the same fault.
A plan that nothing has come of is an error at the end of the block: no test passes because its fault came too late.

Owns the plans, and a stand-in for the node's `handle` through which every message passes while a block is open;
without one nothing here is called, and nothing tests a flag.  Everything is done to real processes by real signals.
Works in the driver, on the session that runs when the block begins.

Left out: messages that are lost, doubled or reordered.  Between processes of one machine that does not happen.

Two more tools of tests are to be found under this name: `explore` (explore.py) and `reset` (reset.py).
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import signal
import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from random import Random
from time import monotonic
from typing import TYPE_CHECKING, Any, NamedTuple

from minray import api, clock, ids
from minray.actor import ActorClass, ActorHandle
from minray.core_worker import name_of
from minray.interrupts import uninterruptible
from minray.messages import (
    DRIVER, FROM_WORKERS, BlockRequested, Command, Event, HoldNext, KillWorker, ObjectLost, Reply, RoomAbandoned,
    StartWorker, WorkerDied,
)  # fmt: skip
from minray.object_ref import ObjectRef
from minray.explore import Exploration, ExplorationFailed, explore
from minray.remote_function import RemoteFunction
from minray.reset import Leftovers, reset
from minray.stage import Deadlock
from minray.zygote import GCS

if TYPE_CHECKING:
    from minray.driver import Driver
    from minray.lineage import ObjectEntry
    from minray.scheduler import WorkerRecord

__all__ = [
    "Deadlock", "Exploration", "ExplorationFailed", "Faults", "FaultsNotFired", "Fired", "Leftovers", "drop", "explore",
    "faults", "fill_store", "reset",
]  # fmt: skip

ROLES = ("gcs", "zygote", "driver")
KINDS = ("kill_worker", "freeze", "drop", "kill_gcs", "kill_zygote")
"""What `Faults.random` may choose from."""
DROPPED = "it was dropped by minray.testing"
DEATH_S = 5.0
"""How long a killed process may take to end."""

_FROM_WORKERS = frozenset(FROM_WORKERS.values())
_NO_MESSAGES = (StartWorker, HoldNext, KillWorker)  # Commands that are carried out without a word to the worker.


class FaultsNotFired(AssertionError):
    """The block has ended, and a fault that was planned in it has not happened."""


class Fired(NamedTuple):
    """A fault that has happened."""

    time_s: float
    """Since the beginning of the block."""
    message: int
    """How many messages the node and its workers had exchanged in the block, this one included."""
    fault: str
    """What was done, such as "killed" or "froze for 1 s"."""
    subject: str
    """To whom: "worker 2", "zygote", "object 9c1f-12"."""
    pid: int
    """Of that process; 0 if it is not known (the GCS) or there is none (an object)."""


Matcher = Callable[["WorkerRecord"], bool]


class _Plan:
    """`fire(client)` is called at the `at_message`-th message of workers that `counts` holds for; then counting begins
    anew, to the next of `gaps`, `times` times in all.  While it answers False it is called again at each message."""

    def __init__(
        self, text: str, gaps: Iterator[int], times: int, required: int, counts: Matcher, fire: Callable[[int], bool]
    ) -> None:
        self.text = text
        self.gaps = gaps
        self.at_message = next(gaps)
        self.times = times
        self.required = required  # Fewer are an error.
        self.counts = counts
        self.fire = fire
        self.seen = 0
        self.fired = 0

    def message(self, worker: WorkerRecord) -> None:
        if self.fired < self.times and self.counts(worker):
            self.seen += 1
            if self.seen >= self.at_message and self.fire(worker.client):
                self.fired += 1
                self.seen = 0
                self.at_message = next(self.gaps)


class Faults:
    """The faults of one block.  Made by `faults`.

    `of` says whose worker is meant: an ObjectRef (the worker that has its task in hand), a remote function or actor
    class (any worker that has a call of it in hand, or is such an actor), an actor's handle, a pid, or None (any).
    `at_message` counts the messages of these workers from when the plan is made; None means now.
    """

    def __init__(self, seed: int, must_fire: bool) -> None:
        core = api.core()
        if core.client:
            raise RuntimeError("minray.testing.faults() works in the driver; this is a worker.")
        if not hasattr(core, "zygote"):
            raise RuntimeError(
                "minray.testing.faults() kills processes, and a session in local mode has none. Use minray.init() "
                "without local_mode for this test. minray.kill() and minray.cancel() work here, too."
            )
        self._core: Driver = core  # type: ignore[assignment]
        self._raylet = self._core.raylet  # Its lock guards all that follows.
        self._node = self._core.node
        self._decide: Callable[[Event, float], list[Command]] = partial(type(self._node).handle, self._node)
        self._random = Random(seed)
        self._must_fire = must_fire
        self._plans: list[_Plan] = []
        self._began_s = monotonic()
        self._slow: list[tuple[Matcher, float]] = []
        self._from: dict[int, deque[Event]] = {}  # messages on their slow way, by worker
        self._to: dict[int, deque[Command]] = {}
        self._frozen: dict[int, int] = {}  # pid by worker
        self._killed: set[int] = set()
        self._aside: list[Command] = []  # commands that follow from a fault, and not from the event in hand
        self._due: list[tuple[float, int, Callable[[], None]]] = []  # a heap: when, tie-breaker, what
        self._order = itertools.count()
        self._news = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="minray-faults", daemon=True)
        self.messages = 0
        """How many the node and its workers have exchanged since the beginning of the block."""
        self.log: list[Fired] = []
        """What has happened, in order."""

    # ------------------------------------------------------------ plans

    def kill_worker(self, of: Any = None, *, at_message: int | None = 1, times: int = 1) -> None:
        """Kill a worker (SIGKILL) at its n-th message, by default the next; `times`: and again after as many more."""
        self._plan(f"kill the worker of {_name(of)}", of, at_message, times, self._kill_worker)

    def kill(self, role: str, *, at_message: int | None = 1, times: int = 1) -> None:
        """Kill the "gcs", the "zygote" or the "driver" (this process) at the n-th message of any worker."""
        if role not in ROLES:
            raise ValueError(f"kill() takes one of {', '.join(ROLES)}, got {role!r}. For workers: kill_worker(of=...)")
        if at_message is not None:
            self._plan(f"kill the {role}", None, at_message, times, lambda client: self._kill_role(role))
        else:
            self._now(lambda: self._kill_role(role))

    def freeze(
        self, of: Any = None, seconds: float | None = None, *, at_message: int | None = 1, times: int = 1
    ) -> None:
        """Stop a worker (SIGSTOP) and let it go on after so many seconds, at the latest at the end of the block."""
        _check_seconds("seconds", 0 if seconds is None else seconds, from_zero=True)
        self._check_begun()  # Also for now: it is the block that lets it go on.
        self._plan(
            f"freeze the worker of {_name(of)}", of, at_message, times, lambda client: self._freeze(client, seconds)
        )

    def slow(self, of: Any = None, delay_s: float = 0.01) -> None:
        """From now on each message to and from such workers takes so much longer, in order."""
        _check_seconds("delay_s", delay_s, from_zero=False)
        counts = self._plan(
            f"slow the worker of {_name(of)}", of, 1, 1, lambda client: self._fired(f"slowed by {delay_s:g} s", client)
        )
        self._slow.append((counts, delay_s))

    def drop(self, ref: ObjectRef[Any] | None = None, *, at_message: int = 1, times: int = 1) -> None:
        """Lose an object's value at the n-th message of any worker: None: of one, by the seed, that can be made again.

        Should there be nothing to lose then, as soon as there is.  For now and here: `minray.testing.drop`."""
        if ref is not None and type(ref) is not ObjectRef:
            raise TypeError(f"drop() takes an ObjectRef or None, got {ref!r}")
        what = "an object" if ref is None else f"object {ids.short(ref)}"
        object_id = None if ref is None else bytes(ref)
        draw = Random(self._random.random())
        self._plan(f"drop {what}", None, at_message, times, lambda client: self._drop(object_id, draw.random()))

    def random(
        self, rate: float = 0.01, kinds: Sequence[str] = ("kill_worker", "freeze", "drop"), *, at_most: int = 1000
    ) -> None:
        """At each message, with that probability, one of these faults: the seed says at which, and what.

        Which message that is, and so what comes of it, is the machine's timing: a seed repeats the schedule,
        not the run.  A frozen worker goes on after up to 0.1 s.  Tasks must allow for it: a killed worker costs the
        task that it runs one of its max_retries, and so does the loss of a value that has to be made again."""
        is_rate = type(rate) in (int, float) and 0 < rate <= 1
        if not is_rate or isinstance(kinds, str) or not kinds or set(kinds) - set(KINDS):
            raise ValueError(
                f"random() takes a rate above 0 and up to 1, got {rate!r}; and a list of {', '.join(KINDS)}, "
                f"got {kinds!r}."
            )
        if type(at_most) is not int or at_most < 1:
            raise ValueError(f"at_most=... is an integer from 1, got {at_most!r}")
        draw_gap, draw_kind = Random(self._random.random()), Random(self._random.random())

        def gaps() -> Iterator[int]:
            while True:
                gap = 1
                while draw_gap.random() >= rate:
                    gap += 1
                yield gap

        def fire(client: int) -> bool:
            kind, amount = draw_kind.choice(kinds), draw_kind.random()
            if kind == "kill_worker":
                return self._kill_worker(client)
            if kind == "freeze":
                return self._freeze(client, amount / 10)
            if kind == "drop":
                return self._drop(None, amount)
            return self._kill_role(kind[len("kill_") :])

        self._add(_Plan(f"random faults ({rate:g} a message)", gaps(), at_most, 1, self._matcher(None), fire))

    def _plan(self, text: str, of: Any, at_message: int | None, times: int, fire: Callable[[int], bool]) -> Matcher:
        counts = self._matcher(of)
        if at_message is not None and (type(at_message) is not int or at_message < 1):
            raise ValueError(f"at_message=... is an integer from 1, or None for now; got {at_message!r}")
        if type(times) is not int or times < 1:
            raise ValueError(f"times=... is an integer from 1, got {times!r}")
        if at_message is not None:
            self._add(_Plan(text, itertools.repeat(at_message), times, times, counts, fire))
        elif not self._now(lambda: any(fire(client) for client in self._clients(counts))):
            raise LookupError(
                f"{text}, now: there is no such worker at this moment (its task waits, or has finished). Nothing was "
                "done. With at_message=1 it happens as soon as there is one."
            )
        return counts

    def _check_begun(self) -> None:
        if not self._thread.ident:
            raise RuntimeError(
                "What is planned happens within the block, and this one has not begun: write "
                "`with minray.testing.faults() as faults:`, and plan it there."
            )

    def _add(self, plan: _Plan) -> None:
        self._check_begun()
        self._now(lambda: self._plans.append(plan))

    def _clients(self, counts: Matcher) -> list[int]:
        return [worker.client for worker in self._node.scheduler.workers.values() if worker.pid and counts(worker)]

    def _now(self, act: Callable[[], Any]) -> Any:
        """Between two messages, and after everything that the driver has submitted."""
        self._raylet.drain()
        done = self._alone(act)
        self._raylet._after()
        return done

    @uninterruptible
    def _alone(self, act: Callable[[], Any]) -> Any:
        with self._raylet.lock:
            if self._closed or self._raylet.closed:
                raise RuntimeError("This block of testing.faults(), or its session, has ended: nothing was done.")
            return act()

    def _matcher(self, of: Any) -> Matcher:
        if of is None:
            return lambda worker: True
        if type(of) is int:
            return lambda worker: worker.pid == of
        if isinstance(of, ActorHandle):
            return lambda worker: worker.actor is not None and worker.actor.actor_id == of._minray_id
        if type(of) is ObjectRef and not ids.is_put(bytes(of)):
            task_id = ids.task_of(bytes(of))
            return lambda worker: task_id in worker.in_flight
        if isinstance(of, RemoteFunction):
            function_id = self._core.export(of._function)
            return lambda worker: any(
                task.template.options.function_id == function_id for task in worker.in_flight.values()
            )
        if isinstance(of, ActorClass):
            class_id = self._core.export(of._class)
            return lambda worker: (
                worker.actor is not None and worker.actor.task.template.options.function_id == class_id
            )
        raise TypeError(
            "of=... takes what a worker runs: the ObjectRef of a task, a remote function or actor class, an actor's "
            f"handle, a pid, or None for any; got {of!r}."
        )

    # ------------------------------------------------------------ the block

    def __enter__(self) -> Faults:
        if "handle" in vars(self._node):
            raise RuntimeError("A block of minray.testing.faults() is open already: plan all faults in one.")
        self._began_s = monotonic()
        self._alone(lambda: vars(self._node).update(handle=self._handle))
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: Any) -> None:
        self._close()
        self._news.set()
        self._thread.join()
        self._raylet._after()
        unfired = [plan for plan in self._plans if plan.fired < plan.required]
        if unfired and self._must_fire and kind is None:
            lines = "\n".join(
                f"  {plan.text}: {plan.fired} of {plan.required} times, then {plan.seen} of {plan.at_message} messages"
                for plan in unfired
            )
            raise FaultsNotFired(
                f"faults that were planned have not happened:\n{lines}\n"
                "So this run has not tested them. Plan them for an earlier message (faults.messages tells how many "
                "there were), get() what must happen before the block ends, or say faults(must_fire=False)."
            )

    @uninterruptible
    def _close(self) -> None:
        """All that waits goes its way, and all that stands still goes on."""
        with self._raylet.lock:
            self._closed = True
            del vars(self._node)["handle"]
            for client in list(self._frozen):
                self._thaw(client)
            if not self._raylet.closed:
                for client in self._from:
                    self._raylet._do(self._arrive(client, len(self._from[client])))
                for client in self._to:
                    self._raylet._do(list(self._to[client]))
                self._raylet.wake()

    def _handle(self, event: Event, now: float) -> list[Command]:
        """In the place of the node's: every message passes here, with the raylet's lock held."""
        client = event.client
        worker = self._node.scheduler.workers.get(client)
        if worker is not None and type(event) in _FROM_WORKERS:
            self._message(worker)
            if self._is_slow(worker, self._from):
                self._from.setdefault(client, deque()).append(event)
                self._later(self._delay(worker), lambda: self._raylet._do(self._arrive(client, 1)))
                return self._outgoing([])
            before, self._aside = self._aside, []
            return self._outgoing(before + self._decide(event, now))
        late = self._arrive(client, len(self._from.get(client, ()))) if type(event) is WorkerDied else []
        return late + self._outgoing(self._decide(event, now))

    def _arrive(self, client: int, count: int) -> list[Command]:
        """Messages of a worker have come the slow way: at the latest before the news of its death."""
        commands: list[Command] = []
        line = self._from.get(client, deque())
        for _ in range(min(count, len(line))):
            commands += self._outgoing(self._decide(line.popleft(), clock.now()))
        return commands

    def _outgoing(self, commands: list[Command]) -> list[Command]:
        """Those to be carried out now: what slow workers get comes later, and faults add commands of theirs."""
        if self._closed:
            return commands
        passed: list[Command] = []
        left = deque(commands)
        while left or self._aside:
            if not left:
                left.extend(self._aside)
                self._aside.clear()
            command = left.popleft()
            client = getattr(command, "client", DRIVER)
            worker = self._node.scheduler.workers.get(client)
            if worker is None or isinstance(command, _NO_MESSAGES):
                passed.append(command)
                continue
            self._message(worker)
            if self._is_slow(worker, self._to):
                self._to.setdefault(client, deque()).append(command)
                self._later(self._delay(worker), partial(self._leave, client))
            else:
                passed.append(command)
        return passed

    def _leave(self, client: int) -> None:
        line = self._to.get(client)
        if line:
            self._raylet._do([line.popleft()])

    def _message(self, worker: WorkerRecord) -> None:
        if worker.client in self._killed:
            return  # It has ended, which the node is about to learn.
        self.messages += 1
        for plan in self._plans:
            plan.message(worker)

    def _is_slow(self, worker: WorkerRecord, lines: dict[int, deque[Any]]) -> bool:
        """Also: its messages must not overtake those that are on their way."""
        return bool(self._slow and (self._delay(worker) or lines.get(worker.client)))

    def _delay(self, worker: WorkerRecord) -> float:
        return sum(delay_s for counts, delay_s in self._slow if counts(worker))

    # ------------------------------------------------------------ what happens later

    def _later(self, delay_s: float, act: Callable[[], None]) -> None:
        heapq.heappush(self._due, (monotonic() + delay_s, next(self._order), act))
        self._news.set()

    def _run(self) -> None:
        """The thread of what happens later."""
        while not self._closed:
            self._news.clear()
            rest = None
            with self._raylet.lock:
                while self._due and not (self._closed or self._raylet.closed):
                    rest = self._due[0][0] - monotonic()
                    if rest > 0:
                        break
                    rest = None
                    heapq.heappop(self._due)[2]()
                    self._raylet.wake()  # Who polls looks anew until when it may sleep.
            self._raylet._after()
            if not self._closed:
                self._news.wait(rest)

    # ------------------------------------------------------------ faults

    def _kill_worker(self, client: int) -> bool:
        self._fired("killed", client)
        self._killed.add(client)
        _kill_and_wait(self._node.scheduler.workers[client].pid)
        return True

    def _kill_role(self, role: str) -> bool:
        pid = {"gcs": 0, "zygote": self._core.zygote.pid, "driver": os.getpid()}[role]
        self._note(Fired(monotonic() - self._began_s, self.messages, "killed", f"the {role}", pid), b"")
        if role == "gcs":
            self._core.zygote.kill_worker(GCS)  # It alone knows the process.
        else:
            _kill_and_wait(pid)
        return True

    def _freeze(self, client: int, seconds: float | None) -> bool:
        if client in self._frozen:
            return False
        pid = self._frozen[client] = self._node.scheduler.workers[client].pid
        self._fired("froze" if seconds is None else f"froze for {seconds:g} s", client)
        with suppress(ProcessLookupError):
            os.kill(pid, signal.SIGSTOP)
        if seconds is not None:
            self._later(seconds, partial(self._thaw, client))
        return True

    def _thaw(self, client: int) -> None:
        pid = self._frozen.pop(client, None)
        worker = self._node.scheduler.workers.get(client)
        if pid is not None and worker is not None and worker.pid == pid:  # Else the pid may be another's by now.
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGCONT)

    def _drop(self, object_id: bytes | None, amount: float) -> bool:
        if object_id is None:
            candidates = [entry.object_id for entry in self._node.objects.values() if self._can_come_again(entry)]
            if not candidates:
                return False
            object_id = candidates[int(amount * len(candidates))]
        commands = self._decide(ObjectLost(DRIVER, object_id, None, DROPPED, -1), clock.now())
        lost = Reply(DRIVER, -1, True) in commands
        self._aside += [command for command in commands if type(command) is not Reply or command.request_id != -1]
        if lost:
            subject = f"object {ids.short(object_id)}"
            self._note(Fired(monotonic() - self._began_s, self.messages, "dropped", subject, 0), object_id)
        return lost

    def _can_come_again(self, entry: ObjectEntry) -> bool:
        return (
            entry.data is not None
            and entry.refs > 0
            and not (type(entry.data) is int and entry.pins)
            and entry.task is not None
            and entry.task.spec.actor is None
            and not self._node._why_not_again(entry.task)
        )

    def _fired(self, fault: str, client: int) -> bool:
        worker = self._node.scheduler.workers[client]
        running = self._raylet._running_task(client)
        if running not in worker.in_flight:
            running = next(iter(worker.in_flight), None)
        fired = Fired(monotonic() - self._began_s, self.messages, fault, f"worker {client}", worker.pid)
        self._note(fired, running or self._node.worker_id(client))
        return True

    def _note(self, fired: Fired, about: bytes) -> None:
        """In the log, and in the session's history."""
        self.log.append(fired)
        text = f"minray.testing {fired.fault} {fired.subject}" + (f" (pid {fired.pid})" if fired.pid else "")
        self._node._event("fault_injected", about, text, clock.now())


def _name(of: Any) -> str:
    if of is None:
        return "any task"
    if isinstance(of, RemoteFunction):
        return f"{name_of(of._function)}()"
    if isinstance(of, ActorClass):
        return f"actor {name_of(of._class)}"
    return f"task {ids.short(of)}" if type(of) is ObjectRef else str(of)


def _check_seconds(name: str, value: Any, from_zero: bool) -> None:
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")
    if not is_number or not (value or from_zero):
        raise ValueError(f"{name}=... is a number of seconds{'' if from_zero else ' above 0'}, got {value!r}")


def _kill_and_wait(pid: int) -> None:
    """SIGKILL; returns when the process has ended: what it does after that no plan can tell."""
    with suppress(ProcessLookupError):
        pidfd = os.pidfd_open(pid) if hasattr(os, "pidfd_open") else -1
        os.kill(pid, signal.SIGKILL)
        if pidfd >= 0:
            ended = select.poll()
            ended.register(pidfd, select.POLLIN)
            ended.poll(DEATH_S * 1000)
            os.close(pidfd)


# ---------------------------------------------------------------- public functions


def faults(seed: int = 0, *, must_fire: bool = True) -> Faults:
    """A block in which faults happen: see `Faults` for which, and this module's beginning for when.

    Args:
        seed: for everything that is drawn by lot.
        must_fire: raise FaultsNotFired at the end of the block if a planned fault has not happened.

    Raises:
        TypeError: if the seed is not an int: such a schedule could not be repeated.

    >>> @minray.remote
    ... class Sum:
    ...     def __init__(self):
    ...         self.total = 0
    ...     def add(self, x):
    ...         self.total += x
    ...         return self.total
    >>> total = Sum.options(max_restarts=1, max_task_retries=1).remote()
    >>> minray.get(total.add.remote(1))
    1
    >>> with minray.testing.faults() as faults:
    ...     faults.kill_worker(of=total)
    ...     minray.get(total.add.remote(10))  # restarted: its constructor ran again
    10
    >>> [fired.fault for fired in faults.log]
    ['killed']
    """
    if not isinstance(seed, int) or isinstance(seed, bool):
        raise TypeError(
            f"faults(seed=...) takes an int, got {seed!r}. The same number repeats the schedule, so that a failure can "
            "be looked at; leave it out for 0. For another schedule in each run pass random.getrandbits(32), and print "
            "it."
        )
    return Faults(seed, must_fire)


def drop(ref: ObjectRef[Any]) -> None:
    """Lose the value of an object, wherever it lies: minray makes it again, or says why it cannot.

    Raises:
        LookupError: there is nothing to lose: it is not ready yet, or an array from get() still shows its memory.

    >>> ref = minray.remote(lambda: "made").remote()
    >>> minray.get(ref)
    'made'
    >>> minray.testing.drop(ref)
    >>> minray.get(ref)  # made again, by its task
    'made'
    """
    if type(ref) is not ObjectRef:
        raise TypeError(f"drop() takes an ObjectRef, got {ref!r}")
    core = api.core()
    if not core.ask(lambda rid: ObjectLost(core.client, bytes(ref), None, DROPPED, rid)):
        raise LookupError(
            f"object {ids.short(ref)} cannot be lost now: it is not ready yet, or an array that came from get() still "
            "shows its memory (del it first). Nothing was done."
        )


@contextmanager
def fill_store(leave_bytes: int = 0) -> Iterator[int]:
    """The object store has no more than `leave_bytes` free, until the block ends; yields how many were taken.

    What is put meanwhile finds no room in shared memory: it goes to disk, or older objects do.  Nothing of the
    machine's memory is used up.

    >>> with minray.testing.fill_store(leave_bytes=100_000) as taken:
    ...     ref = minray.put(bytes(1_000_000))  # lies in a file
    >>> len(minray.get(ref)), taken > 0
    (1000000, True)
    """
    if type(leave_bytes) is not int or leave_bytes < 0:
        raise ValueError(f"fill_store() leaves an integer of bytes from 0, got {leave_bytes!r}")
    core: Driver = api.core()  # type: ignore[assignment]
    if core.client:
        raise RuntimeError("minray.testing.fill_store() works in the driver; this is a worker.")
    arena = core.node.lineage.arena
    taken: list[bytes] = []
    used_before = arena.used
    try:
        while (size := min(arena.largest_hole, arena.capacity - arena.used - leave_bytes)) > 0:
            taken.append(core.context().next_put_id())
            if core.ask(lambda rid: BlockRequested(core.client, rid, taken[-1], size))[0] != "block":
                core.send(RoomAbandoned(core.client, taken.pop()))  # Somebody else was quicker: look again.
        yield arena.used - used_before
    finally:
        if not core.raylet.closed:
            for object_id in taken:
                core.send(RoomAbandoned(core.client, object_id))
