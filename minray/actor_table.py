"""Actors: their lives, their names, and the order of their calls.

Pure.  Owns the actor records.  Which worker an actor lives in is the scheduler's affair;
what a call needs and returns is the lineage's.

Calls are delivered in the order in which each caller submitted them: every caller has a
queue of its own, whose head waits for its arguments and holds up only that caller.  A
caller is the driver, an actor, or one task: not the process that ran it, for the next task
in that process may be the one that the head waits for.

::

    PENDING_CREATION --constructor returned--> ALIVE --kill, exit, last handle gone--> DEAD
           |                                    |  ^
           '---constructor raised---> DEAD      |  |  worker died, max_restarts left
                                                v  |
                                             RESTARTING  (the constructor runs again)

A name belongs to the first live actor that was submitted with it.  Considered: reserving it
before the submission; then whoever reserves and dies leaves a name that nobody has.

What an actor with exact recovery needs beyond this is its `Recovery`; what is done with it stands in
node_exact.py.
"""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterator
from typing import Any

from minray import ids
from minray.lineage import Task
from minray.scheduler import WorkerRecord
from minray.task_spec import ALIVE, DEAD, DEPENDENCIES_UNREADY, FINISHED, PENDING_CREATION, ActorOptions

MAX_IN_FLIGHT = 1000
"""Calls handed to an actor's worker that do not run yet; the rest wait here."""
MAX_CALLERS = 10_000
"""Of so many callers, those that called last, an actor with recovery knows which of their calls it has executed."""


class Recovery:
    """What makes an actor's state again after its worker's death: the last checkpoint, and the calls since.

    Plain data, changed by node_exact.py alone.  Between the instance's birth and the moment when it has
    executed the whole log, no new call is sent to it: ``applied <= sent <= len(log)``."""

    def __init__(self) -> None:
        self.checkpoint: bytes | None = None  # the object that is the state before the log; held
        self.num_checkpoints = 0  # the number of that one; they count over all instances
        self.covered = 0  # so many calls, over all instances, were in the log and are in a checkpoint
        self.log: list[Task] = []  # calls executed since, in the order of execution; their arguments are held
        self.raised: dict[int, int] = {}  # by number (`covered`, and its place in the log): of a logged execution that
        # others which raised came before, how many: a replay submits the same children
        self.applied = 0  # so many of the log's first this instance has executed
        self.sent = 0  # so many were handed to it
        self.replaying: dict[bytes, Task] = {}  # those in its hands: copies, whose results are dropped
        self.next: Task | None = None  # the copy that waits for a lost argument
        self.again: deque[Task] = deque()  # behind the log, before all queues: calls that the last instance had in hand
        self.children: dict[bytes, dict[bytes, list[bytes]]] = {}  # by call in the log or in hand: what it has
        # submitted, and the returns of that, which are held: so a replay does not run them a second time
        self.inherited: list[bytes] = []  # what dead instances held: held until the log has been replayed
        self.executed: dict[bytes, bytearray] = {}  # by caller's prefix: a bit for each of its calls that was executed
        self.fruitless = 0  # deaths in a row that nothing came of but a replay
        self.diverged = False  # a replay has done something else, and the user knows
        self.warned = False  # a checkpoint found no room, and the user knows
        self.is_guests = False  # on a cluster: the actor's home is another node, which has its log

    def note_executed(self, call_id: bytes) -> None:
        byte, bit = divmod(ids.counter_of(call_id), 8)
        executed = self.executed
        bits = executed.pop(call_id[:8], None)
        if bits is None:
            bits = bytearray()
            if len(executed) >= MAX_CALLERS:
                del executed[next(iter(executed))]
        executed[call_id[:8]] = bits  # The last that called is last.
        if byte >= len(bits):
            bits.extend(bytes(byte + 1 - len(bits)))
        bits[byte] |= 1 << bit

    def has_executed(self, call_id: bytes) -> bool:
        byte, bit = divmod(ids.counter_of(call_id), 8)
        bits = self.executed.get(call_id[:8], b"")
        return byte < len(bits) and bool(bits[byte] >> bit & 1)

    def held(self) -> Iterator[bytes]:
        """All that it holds refs to, one entry a ref."""
        if self.checkpoint is not None:
            yield self.checkpoint
        for call in self.log:
            yield from call.spec.deps
            yield from call.spec.nested
        for children in self.children.values():
            for returns in children.values():
                yield from returns
        yield from self.inherited


class Actor:
    def __init__(self, actor_id: bytes, no: int, task: Task, options: ActorOptions, now: float) -> None:
        self.actor_id = actor_id  # the ID of its creation task, whose return object stands for its handles
        self.no = no
        self.task = task  # the creation: run again for a restart
        self.options = options
        self.state = PENDING_CREATION
        self.worker: WorkerRecord | None = None
        self.host: WorkerRecord | None = None  # the worker, also after its end: for the record
        self.queues: dict[int | bytes, deque[Task]] = {}  # by caller; none is empty
        self.pending = 0  # calls submitted and not finished
        self.restarts = 0
        self.restarts_left = options.max_restarts  # -1: without end
        self.holds_arguments = True  # of the constructor: while it may have to run again
        self.unwanted = False  # its last handle has gone: ends when its calls are done
        self.death = ""  # why, in one line, once DEAD
        self.advice = ""  # what could be done about that
        self.cause: tuple[bytes, str] | None = None  # an error to raise instead (pickled, and in one line)
        self.created_s = now
        self.died_s = 0.0
        asked = task.template.options
        self.recovery = Recovery() if asked.checkpoint_every or asked.checkpoint_interval_s else None
        # So many calls run beside the one that every actor can run.  With groups all are handed out: one group that
        # is full must not hold up the calls of another.
        self.beside = sys.maxsize if asked.concurrency_groups else asked.concurrency - 1
        self.unrecoverable = ""  # why it has lost its recovery

    def __str__(self) -> str:
        return f"actor {self.options.class_name} [{ids.short(self.actor_id)}]"

    def enqueue(self, task: Task) -> None:
        queue = self.queues.get(task.caller)
        if queue is None:
            queue = self.queues[task.caller] = deque()
        queue.append(task)

    def enqueue_first(self, task: Task) -> None:
        """Back to the front: it was submitted before the rest."""
        if self.recovery is not None:
            # In the order of all callers: what it did when it ran first may depend on what ran before it.
            self.recovery.again.appendleft(task)
            return
        self.queues.setdefault(task.caller, deque()).appendleft(task)

    def waiting(self) -> list[Task]:
        """The calls in its queues.  One that was cancelled stays there until its turn comes, but does not count."""
        again = self.recovery.again if self.recovery is not None else ()
        return [task for queue in (again, *self.queues.values()) for task in queue if task.state < FINISHED]

    def take_ready(self) -> list[Task]:
        """The calls that may be sent now, in order: of each caller up to the first whose arguments are missing."""
        worker = self.worker
        if self.state != ALIVE or worker is None:
            return []
        room = MAX_IN_FLIGHT + self.beside - len(worker.in_flight)
        batch: list[Task] = []
        for caller in list(self.queues):
            if room <= 0:
                break
            queue = self.queues[caller]
            while queue and room > 0:
                task = queue[0]
                if task.state < FINISHED:  # Else it was cancelled.
                    if task.missing:
                        break
                    batch.append(task)
                    room -= 1
                queue.popleft()
            if not queue:
                del self.queues[caller]
            elif not room:
                self.queues[caller] = self.queues.pop(caller)  # Last next time: it must not starve the others.
        return batch

    def begun(self, calls: list[Task], running: bytes | None) -> int:
        """How many of the calls in hand may have begun when the worker died executing `running`.

        Calls run one after the other.  Those behind the running one had not begun; those before it
        had ended, and their answers were lost on the way.  Where several run at the same time, all may have begun."""
        if running is not None and self.task.template.options.concurrency == 1:
            for index, task in enumerate(calls):
                if task.spec.task_id == running:
                    return index + 1
        return len(calls)

    def row(self) -> tuple[Any, ...]:
        """Its row in the GCS (see schema.py)."""
        worker = self.host
        state = DEPENDENCIES_UNREADY if self.state == PENDING_CREATION and self.task.missing > 0 else self.state
        return (
            self.no, self.actor_id, self.task.template.no, self.options.class_name, self.options.name,
            self.options.namespace, state, worker.client if worker else None, worker.pid if worker else None,
            self.restarts, self.options.max_restarts, int(self.options.detached), int(self.created_s * 1e6),
            int(self.died_s * 1e6) or None, self.death or None,
            self.recovery.num_checkpoints if self.recovery is not None else None, self.unrecoverable or None,
        )  # fmt: skip


class ActorTable:
    def __init__(self) -> None:
        self.actors: dict[bytes, Actor] = {}
        self.names: dict[tuple[str, str], bytes] = {}  # (namespace, name) of live actors
        self.dirty: dict[int, Actor] = {}  # rows to record, by number: an ID may come again, of a caller's next attempt
        self._made = 0

    def add(self, task: Task, options: ActorOptions, now: float) -> Actor | None:
        """A new actor; None if its name is taken."""
        actor_id = task.spec.task_id
        if options.name is not None:
            key = (options.namespace, options.name)
            if key in self.names:
                return None
            self.names[key] = actor_id
        self._made += 1
        actor = self.actors[actor_id] = Actor(actor_id, self._made, task, options, now)
        self.dirty[actor.no] = actor
        return actor

    def find(self, namespace: str, name: str) -> Actor | None:
        """The live actor of that name."""
        actor_id = self.names.get((namespace, name))
        return self.actors[actor_id] if actor_id is not None else None

    def free_name(self, actor: Actor) -> None:
        name = actor.options.name
        if name is not None and self.names.get((actor.options.namespace, name)) == actor.actor_id:
            del self.names[(actor.options.namespace, name)]

    def bury(self, actor: Actor, death: str, advice: str, now: float) -> None:
        actor.state = DEAD
        actor.worker = None
        actor.death = death
        actor.advice = advice
        actor.died_s = now
        self.free_name(actor)
        self.dirty[actor.no] = actor

    def forget(self, actor: Actor) -> None:
        """Nobody has a handle any more, and it is dead."""
        self.actors.pop(actor.actor_id, None)
