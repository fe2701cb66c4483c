"""A small world for the pure node: fake processes, virtual time, and a seed that decides everything else.

A `Machine` is a node with its processes; here it stands alone (`Simulation`), in cluster_simulation.py among others.

`Simulation(seed).run()` lets a driver and its workers do what programs do (tasks with children,
dependencies, objects of all sizes, actors with and without names and recovery, waits with and without a time limit,
cancel, kill) while things go wrong:

* workers die, also an actor's next one soon after the first, or all at once, or do not start; the news of it may overtake
  what they have said, or come twice;
* they stand still (SIGSTOP, or code that holds the GIL), and neither hear nor speak meanwhile;
* messages take random time, some very long, in order for each process;
* objects are lost in any place, files unnoticed; memory or disk fails; checkpoints cannot be written;
* the GCS cannot write, or is not told anything for long; the clock jumps by an hour.

After an event (see seeds.py) `Node.check` looks at all of the node's tables, and the world checks what only it can know:

* P1: every task comes to its end, and the GCS has been told so;
* P2: a value never changes, and all its readers see the same (each execution makes another value, so that a second one
  shows), unless a loss was announced; no task is executed more often than it may be, or by two at once, or again
  when its result is known;
* P3: the state of an actor with recovery is that of the calls that were answered, in order, each once;
* memory that somebody reads is not written, an actor sees each caller's calls in order, the dead are not heard.

A phase with faults is followed by one without; then everything must come to an end, the driver
drops its refs, and nothing may be left.  What a task does follows from the seed and its ID alone, so its
second attempt does the same as its first; but after an exception it does something else.  No set is iterated, so that a seed is a whole report.

Left out: threads of actors; time passes only between events, so a process is never caught in the middle of one.
"""

from __future__ import annotations

import contextlib
import hashlib
import heapq
import itertools
import pickle
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterator
from random import Random
from typing import Any

from minray import actor_table, ids, lineage, node_exact, node_workers
from minray.messages import (
    DRIVER, ActorKillRequested, ArgumentLost, Command, DeleteFile, Event, GcsRecovered, GcsStalled, HoldNext, ItemsRequested, KillWorker, ObjectLost, ObjectPut, PlacementGroupRemoved, PlacementGroupRequested, ReferencesChanged, Reply, RunTasks, StartWorker, TasksFinished, TasksSubmitted,
    Ticked, Warn, WorkerDied, WorkerStarted, event_from_wire,
)  # fmt: skip
from minray.lineage import FREED
from minray.node import Node
from minray.reference_counter import ReferenceCounter, References
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, ACTOR_METHOD, CANCELLED, DEAD, DYNAMIC, ERROR, FAILED, FINISHED, OK, REMOVED, RETRYABLE_ERROR, STREAMING, TASK, UNIT, ActorOptions,
    TaskOptions, TaskSpec,
)  # fmt: skip

CPU, HALF, GPU, LICENSE, ROOM = ("CPU", UNIT), ("CPU", UNIT // 2), ("GPU", UNIT // 2), ("license", UNIT), ("room", UNIT)
FUNCTION = b"f" * 16

PLAIN, TWO, FREE, SMALL, LICENSED, ON_GPU, NOTHING, IMPOSSIBLE, ACTOR, HUNGRY, CALL, LASTING_CALL, NO_ACTOR, EXACT, OWN_WAY, RETRIED_CALL, BUSY = range(17)
STREAMED, PRESSED, LISTED, STREAMED_CALL, IN_ANY, IN_SECOND, IN_GPU, GUEST, EXACT_GUEST = range(17, 26)
GROUPS = [ids.put_id(ids.root_task_id(b"groups"), number) for number in (1, 2)]
BUNDLES = {
    GROUPS[0]: (((CPU,), ()), ((HALF,), ())),
    GROUPS[1]: (((HALF, GPU), ()), ((CPU,), ())),
}
TEMPLATES = [
    TaskOptions(TASK, FUNCTION, "plain", resources=(CPU,)),
    TaskOptions(TASK, FUNCTION, "two", num_returns=2, resources=(CPU,), max_retries=1, runtime_env='{"a": 1}'),
    TaskOptions(TASK, FUNCTION, "free", resources=()),
    TaskOptions(TASK, FUNCTION, "small", resources=(HALF,), max_retries=0, retry_exceptions=True),
    TaskOptions(TASK, FUNCTION, "licensed", resources=(CPU, LICENSE), max_retries=-1, retry_exceptions=True, max_calls=2),
    TaskOptions(TASK, FUNCTION, "on_gpu", resources=(GPU,)),
    TaskOptions(TASK, FUNCTION, "nothing", num_returns=0, resources=(CPU,), runtime_env='{"b": 1}'),
    TaskOptions(TASK, FUNCTION, "impossible", resources=(("CPU", 999 * UNIT),)),
    TaskOptions(ACTOR_CREATION, FUNCTION, "A.__init__", max_retries=0),
    TaskOptions(ACTOR_CREATION, FUNCTION, "B.__init__", resources=(ROOM,), max_retries=0),
    TaskOptions(ACTOR_METHOD, b"", "A.call", method="call", max_retries=0),
    TaskOptions(ACTOR_METHOD, b"", "A.lasting", method="call", max_retries=2),
    TaskOptions(ACTOR_CREATION, FUNCTION, "C.__init__", resources=(("CPU", 999 * UNIT),), max_retries=0),
    TaskOptions(ACTOR_CREATION, FUNCTION, "D.__init__", max_retries=0, checkpoint_every=1),
    TaskOptions(ACTOR_CREATION, FUNCTION, "E.__init__", max_retries=0, checkpoint_every=6, runtime_env='{"a": 1}'),
    TaskOptions(ACTOR_METHOD, b"", "A.retried", method="call", max_retries=3, retry_exceptions=True),
    TaskOptions(ACTOR_CREATION, FUNCTION, "F.__init__", resources=(CPU,), max_retries=0),
    TaskOptions(TASK, FUNCTION, "streamed", num_returns=2, resources=(CPU,), streaming=STREAMING),
    TaskOptions(TASK, FUNCTION, "pressed", num_returns=2, resources=(CPU,), max_retries=1, retry_exceptions=True, streaming=STREAMING, backpressure=2),
    TaskOptions(TASK, FUNCTION, "listed", num_returns=2, resources=(CPU,), streaming=DYNAMIC),
    TaskOptions(ACTOR_METHOD, b"", "A.streamed", method="call", num_returns=2, max_retries=1, streaming=STREAMING),
    TaskOptions(TASK, FUNCTION, "in_any", resources=(HALF,), placement=(GROUPS[0], -1, False)),
    TaskOptions(TASK, FUNCTION, "in_second", resources=(CPU,), placement=(GROUPS[1], 1, True)),
    TaskOptions(TASK, FUNCTION, "in_gpu", resources=(GPU,), max_retries=0, placement=(GROUPS[1], -1, False)),
    TaskOptions(ACTOR_CREATION, FUNCTION, "G.__init__", max_retries=0, placement=(GROUPS[0], 0, False)),
    TaskOptions(ACTOR_CREATION, FUNCTION, "H.__init__", resources=(HALF,), max_retries=0, checkpoint_every=1, placement=(GROUPS[1], -1, False)),
]
NAMES = ("a", "b")
KINDS = (PLAIN, PLAIN, PLAIN, PLAIN, TWO, FREE, SMALL, LICENSED, ON_GPU, NOTHING, IMPOSSIBLE)
GENERATORS = (STREAMED, STREAMED, PRESSED, LISTED)
BLOCKING = (PLAIN, TWO, FREE, SMALL, CALL, LASTING_CALL, RETRIED_CALL, STREAMED, LISTED, IN_ANY, IN_SECOND)
"""Kinds of task that may wait: what they hold is lent meanwhile, so that others can go on."""

NOT_STARTED, SAVED = -1, -2
TIMED_OUT = object()
INTERRUPTED = object()
Body = Generator[tuple[Any, ...], Any, tuple[int, Any]]
Executed = tuple[bytes, int]  # a call of an actor, and how many attempts of it had raised before this one


class Context:
    """A task in a fake process: what its code can do, and the refs and views that its variables hold."""

    def __init__(self, process: Process, task_id: bytes, raised: int = 0) -> None:
        self.process = process
        self.sim = process.sim
        self.task_id = task_id
        self.raised = raised
        digest = hashlib.blake2b(task_id, digest_size=8, key=b"%d" % self.sim.seed).digest()
        # An attempt after one that raised does something else: its children are its own, so it need not be the same.
        self.rng = Random(int.from_bytes(digest, "big") + raised)
        self.prefix = ids.children_prefix(task_id, raised)
        self.children = itertools.count(1)
        self.puts = itertools.count(1)
        self.calls = 0
        self.refs: list[bytes] = []  # of values
        self.own: list[bytes] = []  # those of them that it has made
        # What a method waits for must not need its actor: so it, and what it submits, uses only its own, and calls nobody.
        self.secluded = process.actor_id is not None or task_id in self.sim.secluded
        self.handles: list[bytes] = []  # of actors
        self.readers: list[list[Any]] = []  # of generators: task, how many items were taken, how many are taken at once
        self.num_items = digest[0] % 7  # that it yields, if it does
        self.views: list[tuple[bytes, Any]] = []
        self.depth = self.sim.depth.get(task_id, 0)

    def submit(self, template: int, actor_id: bytes | None = None, actor: ActorOptions | None = None) -> None:
        rng, process = self.rng, self.process
        deps, nested = (), ()
        usable = self.usable()
        if usable and rng.random() < 0.5:
            deps = tuple(rng.sample(usable, min(len(usable), rng.choice((1, 1, 2)))))
        if self.refs and rng.random() < 0.3:
            nested = (rng.choice(self.refs),)
        if self.handles and actor_id is None and rng.random() < 0.4:
            nested += (rng.choice(self.handles),)
        self.calls += actor_id is not None
        task_id = ids.pack_id(self.prefix, next(self.children), 0)
        self.sim.depth[task_id] = self.depth + 1
        if self.secluded and task_id not in self.sim.secluded:
            self.sim.secluded.append(task_id)
        spec = TaskSpec(task_id, template, pickle.dumps(nested), deps, nested, actor_id, actor)
        process.submit(self.task_id, spec)
        for index in range(TEMPLATES[template].num_returns):
            object_id = ids.return_id(task_id, index)
            process.references.adopt(object_id)
            if actor is not None:
                self.handles.append(object_id)
            elif TEMPLATES[template].streaming and (index or TEMPLATES[template].backpressure):
                # Who awaits the end of one that waits for room, and does not read, waits for ever.
                if not index or TEMPLATES[template].streaming == DYNAMIC:
                    process.references.dropped.append(object_id)
                else:
                    self.readers.append([task_id, 0, 1 if TEMPLATES[template].backpressure else 4])
            else:
                self.refs.append(object_id)
                self.own.append(object_id)

    def usable(self) -> list[bytes]:
        return [ref for ref in self.own if ref in self.refs] if self.secluded else self.refs

    def hold(self, object_ids: tuple[bytes, ...]) -> None:
        """Refs that came out of an argument or a value."""
        for object_id in object_ids:
            self.process.references.born.append(object_id)
            (self.handles if object_id in self.sim.actor_ids else self.refs).append(object_id)

    def drop(self, object_id: bytes) -> None:
        (self.handles if object_id in self.handles else self.refs).remove(object_id)
        self.process.references.dropped.append(object_id)

    def read(self, fetched: tuple[Any, int, bool, bytes]) -> Generator[tuple[Any, ...], Any, bool]:
        """Take a value in: its refs are held, its memory is in view.  False: it is an error."""
        while self.is_lost(fetched):
            data, _, _, object_id = fetched
            self.process.unpinned.append(object_id)
            self.process.send("ObjectLost", object_id, data, "its file is gone", 0)
            answer = yield ("await", [object_id], 1, True, None)
            (fetched,) = self.process.fetched([object_id], answer)
        data, _, is_error, object_id = fetched
        self.sim.saw(self.process, object_id, data)
        if is_error:
            return False
        if type(data) is bytes:
            self.hold(pickle.loads(data)[1])
        else:
            self.views.append((object_id, data))
            self.process.look_at(data, +1)
            self.hold(self.sim.contents[object_id])
        return True

    def is_lost(self, fetched: tuple[Any, int, bool, bytes]) -> bool:
        data, _, _, object_id = fetched
        deleted = type(data) is str and data not in self.sim.files and object_id in self.sim.losses
        return deleted or data in self.sim.lost_files

    def with_arguments(self, values: list[Any], args: bytes, template: int) -> Body:
        """A task: its arguments are taken in, then its body runs."""
        unread = iter(values)
        try:
            for item in unread:
                if self.is_lost(item) and self.process.actor_id is None:
                    self.process.unpinned.append(item[3])
                    return NOT_STARTED, (item[3], item[0])
                if not (yield from self.read(item)):
                    return ERROR, (b"error", "argument failed")  # The task does not run.
        finally:  # What else was pinned for it is let go.
            self.process.unpinned += [item[3] for item in unread if type(item[0]) is not bytes]
        self.hold(pickle.loads(args))
        self.sim.begins(self.process, self.task_id, self.raised)
        return (yield from self.body(template))

    def close_view(self) -> None:
        object_id, data = self.views.pop()
        self.process.look_at(data, -1)
        self.process.unpinned.append(object_id)

    def close_reader(self, reader: list[Any]) -> None:
        self.readers.remove(reader)
        self.process.references.dropped.append(ids.reader_id(reader[0]))

    def read_items(self, reader: list[Any], may_block: bool) -> Generator[tuple[Any, ...], Any, None]:
        wanted = self.rng.choice((1, 2, 5))
        while wanted > 0 and reader in self.readers:
            task_id, position, at_once = reader
            at_once = min(at_once, wanted)
            wanted -= 0 if may_block else wanted
            answer = yield ("take", "ItemsRequested", task_id, position, at_once)
            if answer is None:
                self.close_reader(reader)
                return
            there, ended, had = answer
            count = min(there, at_once)
            for item in range(position, position + count):
                item_id = ids.item_id(task_id, item)
                if item_id in had:
                    self.process.unpinned.append(item_id)
                    self.process.references.born.append(item_id)
                else:
                    self.process.references.adopt(item_id)
                self.refs.append(item_id)
                self.own.append(item_id)
            reader[1] += count
            wanted -= count
            if ended and count == there:
                self.close_reader(reader)
                return
            if not count:
                if not may_block:
                    return
                next_id = ids.item_id(task_id, reader[1])
                yield ("await", [next_id], 1, False, None)

    def yield_items(self, limit: int) -> Generator[tuple[Any, ...], Any, None]:
        taken: int | None = 0
        for item in range(self.num_items):
            nested = (self.rng.choice(self.refs),) if self.refs and self.rng.random() < 0.4 else ()
            value = yield from self.store(ids.item_id(self.task_id, item), nested)
            self.process.yielded(self.task_id, item, value)
            if limit and taken is not None and item + 1 - taken >= limit:
                taken = yield ("room", self.task_id)
            yield ("compute", self.rng.choice((0.0001, 0.002, 0.02)))

    def close(self) -> None:
        for reader in list(self.readers):
            self.close_reader(reader)
        while self.views:
            self.close_view()
        for object_id in self.refs + self.handles:
            self.process.references.dropped.append(object_id)
        self.refs, self.handles = [], []

    def store(self, object_id: bytes, nested: tuple[bytes, ...]) -> Generator[tuple[Any, ...], Any, Any]:
        """A `Value`: small ones travel inside the message, others need a block, others' spilling, or a file."""
        rng, sim = self.rng, self.sim
        if rng.random() < 0.6:
            return (pickle.dumps((object_id, nested, sim.stamp())), 10, nested)
        size = rng.choice((70_000, 100_000, 150_000))
        self.process.room_for = object_id
        sim.contents[object_id] = nested
        answer = yield ("ask", "BlockRequested", object_id, size)
        while True:
            if answer[0] == "block":
                if answer[2] and sim.faulty and sim.rng.random() < 0.02:
                    answer = yield ("ask", "BlockRefused", object_id, answer[1], size)
                    continue
                sim.write(answer[1], object_id)
                return (answer[1], size, nested)
            if answer[0] == "file":
                sim.files[answer[1]] = (object_id, sim.stamp())
                return (answer[1], size, nested)
            spilled = []
            for victim, offset, _, path in answer[1]:
                assert sim.memory[offset][0] == victim
                if sim.faulty and sim.rng.random() < 0.1:
                    path = ""
                else:
                    sim.files[path] = sim.memory[offset]
                spilled.append((victim, path))
            answer = yield ("ask", "BlocksSpilled", spilled, object_id, size)

    def put(self) -> Generator[tuple[Any, ...], Any, None]:
        object_id = ids.put_id(ids.putting_id(self.task_id, self.raised), next(self.puts))
        nested = (self.rng.choice(self.refs),) if self.refs and self.rng.random() < 0.4 else ()
        self.process.references.adopt(object_id)
        self.refs.append(object_id)
        self.own.append(object_id)
        value = yield from self.store(object_id, nested)
        self.process.send("ObjectPut", object_id, value)

    # ------------------------------------------------------------ what tasks do

    def body(self, template: int) -> Body:
        options, rng = TEMPLATES[template], self.rng
        in_actor = self.process.actor_id is not None
        yield ("compute", rng.choice((0.0001, 0.0005, 0.003, 0.05)))
        yield from self.steps(rng.choice((0, 0, 1, 3, 5)), template in BLOCKING, not self.secluded)
        if options.streaming:
            yield from self.yield_items(options.backpressure)
        chance = rng.random()
        if options.retry_exceptions and self.sim.rng.random() < 0.3:
            return RETRYABLE_ERROR, (b"error", "it raised")
        if chance < 0.05:
            return ERROR, (b"error", "it raised")
        if in_actor and chance > 0.97 and self.sim.faulty:
            return ACTOR_EXITED, (b"", "exit_actor() was called")
        if options.num_returns == 1 and rng.random() < 0.6:
            return OK, pickle.dumps((self.task_id, (), self.sim.stamp()))
        if options.streaming:
            listed = tuple(ids.item_id(self.task_id, item) for item in range(self.num_items)) if options.streaming == DYNAMIC else ()
            end = pickle.dumps((self.task_id, listed, self.sim.stamp()))
            return OK, [(end, len(end), listed), (b"reader", 6, ())]
        values = []
        for index in range(options.num_returns):
            nested = (rng.choice(self.refs),) if self.refs and rng.random() < 0.5 else ()
            values.append((yield from self.store(ids.return_id(self.task_id, index), nested)))
        if values and chance > 0.93:
            return ERROR, (b"error", "one of the values cannot be pickled")
        return OK, values

    def steps(self, count: int, may_block: bool, may_call: bool) -> Generator[tuple[Any, ...], Any, None]:
        rng, process = self.rng, self.process
        for _ in range(count):
            what = rng.random()
            if what < 0.3 and self.depth < 3:
                for _ in range(rng.choice((1, 1, 2, 5))):
                    self.submit(rng.choice(self.sim.task_kinds))
            elif what < 0.38:
                yield from self.put()
            elif what < 0.44 and may_call and self.depth < 2:
                self.make_actor()
            elif what < 0.46 and may_call:
                yield from self.look_up()
            elif what < 0.68 and may_call and self.handles:
                handle = rng.choice(self.handles)
                kinds = (CALL, CALL, LASTING_CALL, LASTING_CALL, RETRIED_CALL)
                if handle not in self.sim.exact and STREAMED in self.sim.task_kinds:
                    kinds += (STREAMED_CALL,)
                for _ in range(rng.choice((1, 4, 8))):
                    self.submit(rng.choice(kinds), handle)
            elif what < 0.76 and self.readers:
                yield from self.read_items(rng.choice(self.readers), may_block)
            elif what < 0.84 and may_block and (usable := self.usable()):
                yield from self.wait(rng.sample(usable, rng.randint(1, min(3, len(usable)))))
            elif what < 0.91 and self.refs:
                process.send("CancelRequested", rng.choice(self.refs), rng.random() < 0.3, rng.random() < 0.5)
            elif what < 0.93 and self.handles and may_call:
                # Or a constructor that ends its own actor would be run again for ever.
                process.send("ActorKillRequested", rng.choice(self.handles), rng.random() < 0.5 or not self.sim.faulty)
            elif what < 0.94 and self.readers:
                self.close_reader(rng.choice(self.readers))
            elif what < 0.97 and self.refs:
                self.drop(rng.choice(self.refs))
            elif self.views:
                self.close_view()
            if rng.random() < 0.5:
                yield ("compute", rng.choice((0.0001, 0.002, 0.01)))

    def make_actor(self, template: int | None = None) -> None:
        sim, rng = self.sim, self.rng
        template = template or rng.choice(sim.actor_kinds)
        restarts = (2, -1) if TEMPLATES[template].checkpoint_every else (0, 1, 1, -1)
        name = rng.choice(NAMES) if rng.random() < 0.3 else None
        options = ActorOptions("A", name, max_restarts=rng.choice(restarts), detached=rng.random() < 0.1)
        self.submit(template, None, options)
        sim.actor_ids[self.handles[-1]] = options.detached
        if TEMPLATES[template].checkpoint_every:
            sim.exact[self.handles[-1]] = True

    def look_up(self) -> Generator[tuple[Any, ...], Any, None]:
        found = yield ("look", "ActorLookedUp", "", self.rng.choice(NAMES))
        if found is not None:
            self.hold((found[0],))
            self.process.unpinned.append(found[0])

    def wait(self, object_ids: list[bytes]) -> Generator[tuple[Any, ...], Any, None]:
        rng = self.rng
        fetch = rng.random() < 0.6
        num_ready = len(object_ids) if fetch else rng.randint(1, len(object_ids))
        answer = yield ("await", object_ids, num_ready, fetch, rng.choice((None, None, 0.0005, 0.02)))
        if answer is not TIMED_OUT and fetch:
            for fetched in self.process.fetched(object_ids, answer):
                yield from self.read(fetched)


class Process:
    """What the driver and a worker have in common: they count refs, ask, and send in order."""

    def __init__(self, sim: Machine, client: int) -> None:
        self.sim = sim
        self.client = client
        self.references: References = ReferenceCounter()
        self.out: list[tuple[Any, ...]] = []
        self.unpinned: list[bytes] = []
        self.specs: list[Any] = []
        self.parent = b""
        self.results: list[tuple[Any, ...]] = []
        self.looks: Counter[Any] = Counter()
        self.known: list[int] = []
        self.context: Context | None = None
        self.code: Generator[tuple[Any, ...], Any, Any] | None = None
        self.waits_for: tuple[str, int] | None = None
        self.requests = itertools.count(1)
        self.room_for: bytes | None = None
        self.actor_id: bytes | None = None
        self.dead = False
        self.stopped_until = 0.0  # SIGSTOP: executes nothing, and neither hears nor speaks
        self.deaf_until = 0.0  # executes code that holds the GIL: neither hears nor speaks

    def is_stopped(self, then: Callable[..., None], *args: Any) -> bool:
        """If so, it goes on `then`."""
        if self.stopped_until > self.sim.now:
            self.sim.at(self.stopped_until, then, *args)
            return True
        return False

    def is_silent(self, then: Callable[..., None], *args: Any) -> bool:
        if self.deaf_until > self.sim.now:
            self.sim.at(self.deaf_until, then, *args)
            return True
        return self.is_stopped(then, *args)

    def submit(self, parent: bytes, spec: TaskSpec) -> None:
        if spec.template_no not in self.known:
            self.known.append(spec.template_no)
            options = TEMPLATES[spec.template_no]
            if options.function_id:
                self.out.append(("FunctionExported", FUNCTION, b"code", "f", "m", None))
            self.out.append(("TemplateDefined", spec.template_no, tuple(options)))
        if parent != self.parent:
            self.collect()
            self.parent = parent
        self.specs.append(spec.to_wire())

    def send(self, *message: Any) -> None:
        self.collect()
        self.out.append(message)

    def yielded(self, task_id: bytes, item: int, value: Any) -> None:
        """Sent at once, or with what follows."""
        self.collect()
        last = self.out[-1] if self.out else ("",)
        if last[0] == "ItemsYielded" and last[1] == task_id:
            last[3].append(value)
        else:
            self.out.append(("ItemsYielded", task_id, item, [value], False))
        if self.sim.rng.random() < 0.5:
            self.flush()

    def collect(self) -> None:
        if self.specs:
            self.out.append(("TasksSubmitted", self.parent, self.specs))
            self.specs = []

    def look_at(self, data: Any, change: int) -> None:
        self.looks[data] += change

    def flush(self) -> None:
        """One frame, in the order of `Worker.flush`."""
        if self.dead or self.is_silent(self.flush):
            return
        references = self.references
        self.collect()
        messages, self.out = self.out, []
        acquired = references.count_born()
        if acquired:
            messages.insert(0, ("ReferencesChanged", acquired, []))
        if self.results:
            messages.append(("TasksFinished", self.results))
            self.results = []
        released = references.count_dropped(len(references.dropped))
        if released:
            messages.append(("ReferencesChanged", [], released))
        if self.unpinned:
            messages.append(("Unpinned", self.unpinned))
            self.unpinned = []
        if messages:
            self.transmit(messages)

    def transmit(self, messages: list[tuple[Any, ...]]) -> None:
        raise NotImplementedError

    def fetched(self, object_ids: list[bytes], answer: Any) -> list[Any]:
        raise NotImplementedError

    def ended(self, outcome: Any) -> None:
        raise NotImplementedError

    def go_on(self, answer: Any) -> None:
        """Run the code to where it next has to wait."""
        self.waits_for = None
        assert self.code is not None
        try:
            if answer is INTERRUPTED:
                self.code.close()
                raise StopIteration((CANCELLED, (b"", "cancelled")))
            request = self.code.send(answer)
        except StopIteration as stop:
            self.code = None
            self.ended(stop.value)
            return
        number = next(self.requests)
        self.waits_for = (request[0], number)
        if request[0] == "compute":
            lasts = request[1] * self.sim.rng.uniform(0.5, 2)
            self.sim.after(lasts, self.computed, number)
            if self.client != DRIVER and self.sim.rng.random() < 0.1:
                self.deaf_until = self.sim.now + lasts
            if self.results or self.specs or self.out:
                self.sim.after(0.005, self.flush)
            return
        if request[0] == "room":
            self.about_to_wait()
            self.send("RoomAwaited", number, request[1], True)
        elif request[0] == "await":
            _, object_ids, num_ready, fetch, timeout = request
            self.about_to_wait()
            self.send("ObjectsAwaited", number, object_ids, num_ready, fetch, self.client != DRIVER)
            if timeout is not None:
                self.sim.after(timeout, self.time_out, number)
        else:
            self.send(request[1], number, *request[2:])
        self.flush()

    def about_to_wait(self) -> None:
        pass

    def computed(self, number: int) -> None:
        if not self.dead and self.waits_for == ("compute", number) and not self.is_stopped(self.computed, number):
            self.go_on(None)

    def time_out(self, number: int) -> None:
        if not self.dead and self.waits_for == ("await", number) and not self.is_stopped(self.time_out, number):
            self.send("RequestAbandoned", number)
            self.flush()
            self.go_on(TIMED_OUT)

    def on_Reply(self, request_id: int, answer: Any) -> None:
        if self.waits_for is not None and self.waits_for[1] == request_id:
            self.go_on(answer)
        elif type(answer) is list:  # Too late: what was pinned for it is let go.
            self.unpinned += [item[3] for item in answer if type(item) is tuple and type(item[0]) is not bytes]
            self.flush()
        elif type(answer) is tuple and type(answer[0]) is bytes:  # Likewise, an actor.
            self.unpinned.append(answer[0])
            self.flush()


class Driver(Process):
    def __init__(self, sim: Machine) -> None:
        super().__init__(sim, DRIVER)
        self.references = References()
        self.held: Counter[bytes] = Counter()  # what it has told the node

    def transmit(self, messages: list[tuple[Any, ...]]) -> None:
        for message in messages:
            self.sim.handle(event_from_wire(DRIVER, message))

    def on_Reply(self, request_id: int, answer: Any) -> None:
        if self.waits_for is not None and self.waits_for[1] == request_id:
            # From the loop, not from inside the node's answer.
            self.sim.after(0.0, self.answered, request_id, answer)

    def answered(self, request_id: int, answer: Any) -> None:
        if self.waits_for is not None and self.waits_for[1] == request_id:
            self.go_on(answer)

    def fetched(self, object_ids: list[bytes], answer: Any) -> list[Any]:
        objects = self.sim.node.objects
        return [self.sim.node.fetch_for_driver(i) for i in object_ids if objects[i].data is not None]

    def ended(self, outcome: Any) -> None:
        self.flush()

    def main(self) -> Body:
        context, sim = self.context, self.sim
        assert context is not None
        exact = []
        for _ in range(sim.rng.choice((0, 0, 0, 1, 2))):  # Actors with recovery that are called a lot, and die a lot.
            context.make_actor(sim.rng.choice((EXACT, OWN_WAY, OWN_WAY)))
            exact.append(context.handles[-1])
            for _ in range(sim.rng.choice((1, 3, 6))):
                sim.after(sim.rng.uniform(0.02, 0.3), sim.kill_someone, exact[-1])
        for _ in range(sim.rng.choice((4, 8, 16))):
            yield from context.steps(1, True, True)
            for handle in exact:
                for _ in range(sim.rng.choice((0, 2, 5))):
                    context.submit(sim.rng.choice((CALL, LASTING_CALL, LASTING_CALL, RETRIED_CALL)), handle)
            self.flush()
            if exact:
                yield ("compute", 0.02)
        sim.faulty = False
        for reader in list(context.readers):
            context.close_reader(reader)
        self.flush()
        # Everything must resolve now.
        while waiting := self.unresolved():
            yield ("await", waiting, len(waiting), False, None)
        context.close()
        return OK, None

    def unresolved(self) -> list[bytes]:
        assert self.context is not None
        return [i for i in self.context.refs if self.sim.node.objects[i].data is None]


class Worker(Process):
    def __init__(self, sim: Machine, client: int) -> None:
        super().__init__(sim, client)
        self.environment = ""
        self.has_run = False
        self.queue: deque[tuple[Any, ...]] = deque()
        self.running: bytes | None = None  # the black box
        self.holds = self.released = 0  # while they differ it starts nothing: it is to be told what to forget
        self.forgets = 0
        self.numbers: dict[bytes, int] = {}  # of the tasks that it was handed
        self.unheard: dict[bytes, int] = {}  # those of them that it has executed, and of which the node does not know that
        self.exiting = self.over = False
        self.started_s = 0.0
        self.asked_for = sim.starts
        self.is_up = False
        self.inbox: deque[list[Command]] = deque()  # while it stands still
        self.heard_at = self.spoken_at = 0.0
        self.actor_refs: list[bytes] = []
        self.last_call: dict[bytes, int] = {}  # by caller: the number of the last call that ran here
        self.state: list[Executed] = []  # of an actor: the calls that it has executed, in this life and those before
        self.ends: deque[tuple[bytes, tuple[Executed, ...]]] = deque()  # calls not yet answered, and the state after each
        self.restored: tuple[int, Any] | None = None
        self.checkpoints = self.unsaved = 0
        self.saves_after = 0  # so many calls; 0: never

    def transmit(self, messages: list[tuple[Any, ...]]) -> None:
        self.spoken_at = max(self.spoken_at, self.sim.now + self.sim.delay())
        self.sim.at(self.spoken_at, self.sim.hear, self, messages)

    def receive(self, messages: list[Command]) -> None:
        self.inbox.append(messages)
        self.read_inbox()

    def read_inbox(self) -> None:
        while self.inbox and not self.is_silent(self.read_inbox):
            for message in self.inbox.popleft():
                if not self.dead:
                    getattr(self, "on_" + type(message).__name__)(*message[1:])

    def on_DefineFunction(self, function_id: bytes, pickled: bytes) -> None:
        assert function_id == FUNCTION and pickled == b"code"

    def on_DefineTemplate(self, template_no: int, options: TaskOptions) -> None:
        self.sim.template_of[(self.client, template_no)] = TEMPLATES.index(options)

    def on_AssignResources(self, num_cpus: float, gpu_ids: tuple[int, ...], resources: dict[str, float], placement: Any) -> None:
        pass

    def on_SetUpEnvironment(self, environment: str) -> None:
        assert not self.environment and not self.has_run, "an environment does not begin in a fresh process"
        self.environment = environment

    def on_RunTasks(self, tasks: list[tuple[Any, ...]]) -> None:
        self.has_run = True
        for task in tasks:
            options = TEMPLATES[self.sim.template_of[(self.client, task[1])]]
            assert options.kind == ACTOR_METHOD or options.runtime_env == self.environment, "it runs in another environment"
            for item in task[3] or ():
                assert item is not None, "a dependency was handed over before it was ready"
        self.queue.extend(tasks)
        if self.is_blocked() and self.actor_id is None:
            self.on_TakeBack(len(self.queue))
        self.next()

    def is_blocked(self) -> bool:
        return self.waits_for is not None and self.waits_for[0] in ("await", "room")

    def on_TakeBack(self, count: int) -> None:
        taken = []
        while self.queue and len(taken) < count:
            taken.append(self.queue.pop())
        self.give_back(taken[::-1])

    def has_called(self) -> bool:
        return self.running is not None and self.context is not None and self.context.calls > 0

    def give_back(self, tasks: list[tuple[Any, ...]]) -> None:
        self.send("TasksReturned", [task[0] for task in tasks], self.forgets)
        self.flush()

    def on_Forget(self, task_ids: list[bytes]) -> None:
        staying = [task for task in self.queue if task[0] not in task_ids]
        self.queue.clear()
        self.queue.extend(staying)
        self.released += 1
        self.forgets += bool(task_ids)
        self.next()

    def on_CancelTask(self, task_id: bytes) -> None:
        for task in self.queue:
            if task[0] == task_id:
                self.queue.remove(task)
                self.give_back([task])
                return
        if self.running == task_id and self.actor_id is None and self.code is not None and self.waits_for is not None:
            kind, number = self.waits_for
            if kind == "take":  # It reads the answer first: what was handed over must be held.
                if not self.dead:
                    self.sim.after(0.001, self.on_CancelTask, task_id)
                return
            if kind in ("await", "room"):
                self.send("RequestAbandoned", number)
            elif kind == "ask":
                self.send("RequestAbandoned", number)
                self.send("RoomAbandoned", self.room_for)
            self.go_on(INTERRUPTED)

    def on_MarkReconstructed(self) -> None:
        pass

    def on_RestoreActor(self, number: int, checkpoint: Any) -> None:
        self.restored = (number, checkpoint)

    def restore(self, whole: bool, constructor: Body) -> Body:
        """The constructor, unless the state replaces it, and then the state."""
        if self.restored is None:
            return (yield from constructor)
        self.checkpoints, (data, _, is_error, object_id) = self.restored
        assert self.context is not None
        if type(data) is not bytes:
            self.unpinned.append(object_id)
        if self.context.is_lost((data, 0, is_error, object_id)):
            return ERROR, (b"error", "its checkpoint is lost")
        self.sim.saw(self, object_id, data)
        if is_error:
            return ERROR, (b"error", "its checkpoint was lost")
        if whole:
            yield ("compute", 0.001)
        else:
            outcome = yield from constructor
            if outcome[0] != OK:
                return outcome
        state, refs = self.sim.states[object_id]
        self.state = list(state)
        self.references.born += refs
        self.actor_refs += refs
        return OK, pickle.dumps((self.actor_id, ()))

    def save(self) -> Body:
        sim, context = self.sim, self.context
        assert self.actor_id is not None and context is not None
        object_id = ids.checkpoint_id(self.actor_id, self.checkpoints + 1)
        chance = sim.rng.random() if sim.faulty else 1.0
        if chance < 0.1:
            return SAVED, ("CheckpointFailed", object_id, "no room", False)
        if chance < 0.12:
            self.saves_after = 0
            return SAVED, ("CheckpointFailed", object_id, "cannot be saved", True)
        sim.states[object_id] = tuple(self.state), tuple(self.actor_refs)
        value = yield from context.store(object_id, tuple(dict.fromkeys(self.actor_refs)))
        self.checkpoints += 1
        return SAVED, ("CheckpointTaken", object_id, value, self.saves_after == 1)

    def saved(self, message: tuple[Any, ...]) -> None:
        """Behind the results that are in it, in one frame."""
        self.collect()
        if self.results:
            self.out.append(("TasksFinished", self.results))
            self.results = []
        self.out.append(message)
        self.context = None
        self.flush()
        self.sim.after(0.0, self.next)

    def on_ExitWorker(self) -> None:
        self.exiting = True
        if self.code is not None and self.running is None:  # What it saves is of no use any more.
            self.code.close()
            self.code = self.waits_for = None
        self.next()

    def about_to_wait(self) -> None:
        if self.actor_id is None and self.queue:
            self.on_TakeBack(len(self.queue))

    def next(self) -> None:
        if self.code is not None or self.dead or self.is_stopped(self.next):
            return
        if self.holds != self.released:
            self.flush()
            return
        if not self.queue or self.over:
            self.flush()
            if self.exiting or self.over:
                self.sim.die(self, "exited")
            return
        task_id, template_no, args, values, mark = self.queue.popleft()
        template = self.sim.template_of[(self.client, template_no)]
        options = TEMPLATES[template]
        self.running = task_id
        self.started_s = self.sim.now
        context = self.context = Context(self, task_id, raised=max(0, -mark))
        if options.kind == ACTOR_CREATION:
            self.actor_id = task_id
            self.saves_after = options.checkpoint_every
        elif options.kind == ACTOR_METHOD:
            self.sim.call_runs(self, task_id, options.retry_exceptions is True)
        else:
            assert self.actor_id is None, "a plain task was sent to an actor"
        self.code = context.with_arguments(values or [], args, template)
        if options.kind == ACTOR_CREATION and options.checkpoint_every:
            self.code = self.restore(options.checkpoint_every == 1, self.code)
        self.go_on(None)

    def ended(self, outcome: Any) -> None:
        status, payload = outcome
        if status == SAVED:
            self.saved(payload)
            return
        context = self.context
        assert context is not None
        if self.actor_id is not None and context.refs and context.rng.random() < 0.3 and status == OK:
            self.actor_refs.append(context.refs.pop())  # Kept in the actor's state.
        if status == NOT_STARTED:
            self.send("ArgumentLost", self.running, *payload, "its file is gone")
        else:
            self.results.append((self.running, status, payload, self.started_s, self.sim.now))
            self.unheard[self.running] = self.numbers.get(self.running, 0)  # type: ignore[index, arg-type]
        called = self.running is not None and self.actor_id not in (None, self.running)
        if called and status not in (CANCELLED, ACTOR_EXITED):
            self.state.append((self.running, context.raised))  # type: ignore[arg-type]
            self.ends.append((self.running, tuple(self.state)))  # type: ignore[arg-type]
            self.unsaved += 1
        self.running = None
        self.context = None
        self.over = self.over or status == ACTOR_EXITED
        context.close()
        if self.saves_after and self.unsaved >= self.saves_after and not self.over:
            self.unsaved = 0
            self.context = Context(self, self.actor_id or b"")
            self.code = self.save()
            self.go_on(None)
            return
        if not (self.queue and self.queue[0][4] and self.sim.rng.random() < 0.8):
            self.flush()
        self.sim.after(0.0, self.next)

    def fetched(self, object_ids: list[bytes], answer: Any) -> list[Any]:
        assert len(answer) == len(object_ids)
        return [item for item in answer if item is not None]


class Machine:
    """A node with its processes.  The time, the seed and what goes wrong are its world's: `Simulation`, for one alone; the
    `World` of cluster_simulation.py, for several."""

    label = ""  # of the node, in the story
    seed: int
    rng: Random
    now: float
    faulty: bool
    events: int
    check_every: int
    trace: Any
    story: deque[str]
    depth: dict[bytes, int]  # of a task: how many made it, one the other
    secluded: list[bytes]
    actor_ids: dict[bytes, bool]
    exact: dict[bytes, bool]  # actors with recovery, whose methods do not stream
    task_kinds: tuple[int, ...]
    actor_kinds: tuple[int, ...]
    contents: dict[bytes, tuple[bytes, ...]]
    calls: dict[bytes, tuple[Any, int]]  # call -> (caller, its number in the order of submission)
    states: dict[bytes, tuple[tuple[Executed, ...], tuple[bytes, ...]]]  # by checkpoint: calls, and refs
    stamps: Iterator[int]
    node: Node

    def __init__(self) -> None:
        self._tick_at: float | None = None
        self.everyone: dict[int, Worker] = {}  # also the dead
        self.memory: dict[int, tuple[bytes, int]] = {}  # offset -> the object whose bytes lie there, and its value
        self.files: dict[str, tuple[bytes, int]] = {}
        self.lost_files: dict[str, tuple[bytes, int]] = {}
        self.committed: dict[bytes, tuple[Any, Any, bool]] = {}  # entry, data, is it an error
        self.seen: dict[bytes, tuple[Any, Any]] = {}  # entry, and the value that readers have seen
        self.template_of: dict[tuple[int, int], int] = {}
        self.answered: dict[int, list[Executed]] = {}  # by number of an actor with recovery: the calls that the node has heard the end of
        self.tasks: dict[int, Any] = {}  # every Task that the node has made, by number
        self.begun: Counter[int] = Counter()  # by number: how often a process began to execute it
        self.raised: Counter[int] = Counter()  # by number: attempts of which the node has heard that they raised
        self.unheard: Counter[int] = Counter()  # by number: executions that ended, and died with their process
        self.unknown: set[int] = set()  # those of them of which not even the order tells that they had; never iterated
        self.parents: dict[int, tuple[Any, Any]] = {}  # by number: the Task, or the actor with recovery, that submitted it
        self.ended: dict[bytes, tuple[Any, Any, Any]] = {}  # by ID: the Task whose result is known, and those two
        self.over: set[int] = set()  # numbers of tasks that have come to an end, at least once; never iterated
        self.losses: set[bytes] = set()  # objects that were announced as lost; never iterated
        self.rows: dict[tuple[str, int], int] = {}  # what the GCS has last been told: (table, number) -> state
        self.rows_every = self.rng.choice((1, 5, 40, 1000))  # events
        self.gcs_is_stalled = False
        self.late_results = 0  # that came from whoever the node does not listen to
        self.unrecorded: set[int] = set()  # numbers of tasks of which the GCS is not told by this node; never iterated
        self.told_of_starvation = False
        self.starts = 0  # that failed, those that failed together being one
        self.failed_starts = 0  # in a row
        self.processes: dict[int, Worker] = {}
        self.graves: dict[int, Worker] = {}
        self.driver = self.make_driver()

    def make_driver(self) -> Driver:
        return Driver(self)

    # ------------------------------------------------------------ time

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        raise NotImplementedError

    def clock(self) -> float:
        """What the node is told."""
        return self.now

    def after(self, delay: float, what: Callable[..., None], *args: Any) -> None:
        self.at(self.now + delay, what, *args)

    def delay(self) -> float:
        if self.faulty and self.rng.random() < 0.003:
            return 0.3
        return self.rng.choice((0.00005, 0.0001, 0.0003, 0.004))

    def set_alarm(self) -> None:
        wake_at = self.node.wake_at
        if wake_at is not None and wake_at != self._tick_at:
            self._tick_at = wake_at
            self.at(wake_at - self.clock() + self.now, self.tick, wake_at)

    def tick(self, wake_at: float) -> None:
        if self.node.wake_at == wake_at:
            self._tick_at = None
            self.handle(Ticked(executing=tuple((number, self.everyone[number].running) for number in self.node.held)))

    # ------------------------------------------------------------ between the node and the processes

    def hear(self, process: Worker, messages: list[tuple[Any, ...]]) -> None:
        for message in messages:
            event = event_from_wire(process.client, message)
            if type(event) is TasksFinished and process.client in self.node.scheduler.workers:
                self.check_states(process, event.results)
                self.note_finished(process, event.results)
            elif type(event) is TasksFinished:
                self.late_results += len(event.results)
            if process.client in self.graves:
                assert self.node.handle(event, self.clock()) == [], f"the dead are heard: {event}"
                self.check()
            else:
                self.handle(event)

    def handle(self, event: Event) -> None:
        self.events += 1
        before = None
        if type(event) is TasksSubmitted:
            before = self.node._tasks_made
        commands = self.node.handle(event, self.clock())
        if type(event) is ObjectLost or type(event) is ArgumentLost:
            self.committed.pop(event.object_id, None)  # It may be an error now.
            self.seen.pop(event.object_id, None)
            self.losses.add(event.object_id)
        if self.trace is not None:
            shown: Any = event
            if type(event) is TasksSubmitted:
                shown = event._replace(specs=[spec.to_wire() for spec in event.specs])  # type: ignore[misc]
            text = f"{self.now:.6f} {shown} -> {commands}"
            self.trace.update(text.encode())
            self.story.append(self.label + text)
        if before is not None:
            self.note_submitted(event, before)
        if event.client == DRIVER:
            self.note_driver(event)
        self.check()
        self.carry_out(commands)
        if self.events % self.rows_every == 0 and not self.gcs_is_stalled:
            self.take_rows()

    def note_submitted(self, event: Any, before: int) -> None:
        for spec in event.specs:
            task = self.node.lineage.tasks.get(spec.task_id)
            if task is not None and task.no > before:
                self.tasks[task.no] = task
                if self.gcs_is_stalled:
                    self.unrecorded.add(task.no)
                self.note_parent(task, event)
                if spec.actor_id is not None and task.state < FINISHED:  # Else it was executed before, and is not again.
                    self.calls[spec.task_id] = (task.caller, task.no)  # A constructor that runs again is another.

    def note_parent(self, task: Any, event: Any) -> None:
        if event.client != DRIVER:
            actor = self.node.scheduler.workers[event.client].actor
            maker = actor if actor is not None and actor.recovery is not None else None
            parent = self.node.lineage.tasks.get(event.parent_task_id)
            if parent is not None and (parent.state >= FINISHED or not parent.retries_left or parent.no in self.over):
                parent = None
            self.parents[task.no] = (parent, maker)

    def note_finished(self, process: Worker, results: list[Any]) -> None:
        """Before the node hears it: whose result will be known, so that it is not to be executed again."""
        in_flight = self.node.scheduler.workers[process.client].in_flight
        for task_id, status, payload, *_ in results:
            process.unheard.pop(task_id, None)
            task = in_flight.get(task_id)
            if task is not None and task.no and status == RETRYABLE_ERROR and task.retries_left and not task.cancelled:
                self.raised[task.no] += task.error is None
            if task is None or not task.no or status in (RETRYABLE_ERROR, NOT_STARTED):
                continue
            parent, maker = self.parents.get(task.no, (None, None))
            keeps = parent is not None and parent.state < FINISHED and type(payload) is bytes
            keeps = keeps and lineage.MAX_CHILDREN == 1000
            if task.template.options.streaming == STREAMING:
                keeps = maker = None  # What came after its reader had gone is not kept; a second reader may want it.
            if task.template.options.kind == TASK and status == OK and (keeps or maker) and task.error is None:
                self.ended[task_id] = (task, parent, maker)
            self.over.add(task.no)

    def take_rows(self) -> None:
        rows = self.node.take_rows(self.clock())
        for row in rows.get("tasks", ()):
            self.rows["tasks", row[0]] = row[5]
        for row in rows.get("actors", ()):
            self.rows["actors", row[0]] = row[6]
        for row in rows.get("placement_groups", ()):
            self.rows["placement_groups", row[0]] = row[5]
        for row in rows.get("objects", ()):
            self.rows["objects", row[0]] = row[3]
        for state, _, _, no in rows.get("object_updates", ()):
            if ("objects", no) in self.rows:  # Else it has come and gone since the last time.
                self.rows["objects", no] = state

    def note_driver(self, event: Any) -> None:
        held = self.driver.held
        if type(event) is ReferencesChanged:
            held.update(event.acquired)
            held.subtract(event.released)
        elif type(event) is ObjectPut:
            held[event.object_id] += 1
        elif type(event) is TasksSubmitted:
            for spec in event.specs:
                held.update(ids.return_id(spec.task_id, n) for n in range(TEMPLATES[spec.template_no].num_returns))
        elif type(event) is ItemsRequested:
            task = self.node.lineage.tasks.get(event.task_id)
            if task is not None:
                held.update(ids.item_id(event.task_id, n) for n in range(event.position, task.stream.num_taken))
        else:
            return
        self.driver.held = +held

    def carry_out(self, commands: list[Command]) -> None:
        frames: dict[int, list[Command]] = {}
        for command in commands:
            if type(command) is StartWorker:
                self.processes[command.client] = self.everyone[command.client] = Worker(self, command.client)
                self.after(self.rng.uniform(0.001, 0.02), self.started, command.client)
            elif type(command) is HoldNext:
                self.everyone[command.client].holds += 1
            elif type(command) is Warn:
                self.told_of_starvation = self.told_of_starvation or "hold too much" in command.text
            elif type(command) is DeleteFile:
                self.files.pop(command.path, None)
            elif type(command) is KillWorker:
                process = self.processes.get(command.client)
                if process is not None and command.only_if_running in (None, process.running):
                    self.after(0.0, self.die, process, "was killed by SIGKILL")
            elif type(command) is Reply and command.client == DRIVER:
                self.driver.on_Reply(command.request_id, command.answer)
            else:
                if type(command) is RunTasks:
                    self.note_handed(command)
                frames.setdefault(command.client, []).append(command)  # type: ignore[union-attr]
        for client, frame in frames.items():
            process = self.processes.get(client)
            if process is not None:
                process.heard_at = max(process.heard_at, self.now + self.delay())
                self.at(process.heard_at, process.receive, frame)

    def started(self, client: int) -> None:
        process = self.processes.get(client)
        if process is None:
            return
        if self.faulty and self.rng.random() < 0.03:
            self.die(process, "did not start")
        else:
            process.is_up = True
            self.failed_starts = 0
            self.handle(WorkerStarted(client, 10_000 + client))

    def note_handed(self, command: RunTasks) -> None:
        worker = self.node.scheduler.workers.get(command.client)
        for task_id, *_ in command.tasks if worker is not None else ():
            if task_id in worker.in_flight:  # type: ignore[union-attr]
                self.everyone[command.client].numbers[task_id] = worker.in_flight[task_id].no  # type: ignore[union-attr]

    def kill_someone(self, actor_id: bytes | None = None) -> None:
        """Anybody, or the worker of that actor.  Often the next instance of an actor dies soon after the first."""
        if self.faulty and self.processes:
            victims = list(self.processes.values())
            if actor_id is not None:
                victims = [process for process in victims if process.actor_id == actor_id] or victims
            elif self.rng.random() < 0.3:  # So that it calls again what it has called.
                victims = [process for process in victims if process.has_called()] or victims
            elif self.rng.random() < 0.5:  # Actors have the more interesting deaths.
                victims = [process for process in victims if process.actor_id is not None and process.code is not None] or victims
            victim = self.rng.choice(victims)
            self.die(victim, "was killed by SIGKILL")
            if victim.actor_id is not None and self.rng.random() < 0.5:
                self.after(self.rng.uniform(0.01, 0.08), self.kill_someone, victim.actor_id)

    def kill_zygote(self) -> None:
        """All die at once, also who has not started yet.  The news of the idle ones is sent first, as by `Raylet`."""
        if self.faulty:
            workers = self.node.scheduler.workers
            busy = {client for client in self.processes if client in workers and workers[client].in_flight}
            for process in sorted(self.processes.values(), key=lambda process: process.client in busy):
                self.die(process, "was killed with the zygote, its parent")

    def stop_someone(self) -> None:
        if self.faulty and self.processes:
            victim = self.rng.choice(list(self.processes.values()))
            victim.stopped_until = self.now + self.rng.choice((0.005, 0.02, 0.1, 1.0, 10.0))

    def stall_gcs(self) -> None:
        if self.faulty:
            self.gcs_is_stalled = True
            self.handle(GcsStalled(DRIVER, "OutOfDiskError", "the disk is full"))
            self.after(self.rng.uniform(0.01, 0.2), self.heal_gcs)

    def heal_gcs(self) -> None:
        self.gcs_is_stalled = False
        self.handle(GcsRecovered(DRIVER))

    def lose_something(self) -> None:
        """A file goes, which nobody notices before it is read; or an object, and the node is told."""
        if not self.faulty:
            return
        ready = [entry.object_id for entry in self.node.objects.values() if entry.data is not None]
        if self.files and self.rng.random() < 0.6:
            path = self.rng.choice(list(self.files))
            self.lost_files[path] = self.files.pop(path)
        elif ready:
            self.handle(ObjectLost(DRIVER, self.rng.choice(ready), None, "a test dropped it"))

    def die(self, process: Worker, reason: str) -> None:
        if process.dead:
            return
        process.dead = True
        del self.processes[process.client]
        if self.rng.random() < 0.5:  # The news comes behind all that it said, or overtakes some.
            when = max(self.now, process.spoken_at)
        else:
            when = self.now
        self.at(when, self.bury, process, reason)

    def bury(self, process: Worker, reason: str) -> None:
        if not process.is_up and process.asked_for == self.starts:
            self.starts += 1  # Who was asked for before that belongs to the same failure.
            self.failed_starts = (self.failed_starts + 1) % node_workers.START_ATTEMPTS
        self.handle(WorkerDied(process.client, reason, process.running))
        assert self.node._start_failures == self.failed_starts, "workers that did not start are miscounted"
        self.graves[process.client] = process
        self.unheard.update(process.unheard.values())
        if process.running is None:
            self.unknown.update(process.unheard.values())
        if self.faulty and self.rng.random() < 0.1:  # The news may come twice: from the zygote, and from its end.
            self.after(self.rng.uniform(0.0, 0.05), self.handle, WorkerDied(process.client, reason, process.running))

    # ------------------------------------------------------------ what only the world can check

    def write(self, offset: int, object_id: bytes) -> None:
        for process in (self.driver, *self.processes.values()):
            assert not process.looks[offset], f"memory at {offset} is written while process {process.client} reads it"
        self.memory[offset] = (object_id, self.stamp())

    def stamp(self) -> int:
        """What makes a value unlike all others, also those that other executions of the same task return."""
        return next(self.stamps)

    def value_at(self, object_id: bytes, data: Any) -> Any:
        if type(data) is bytes:
            return data
        there, value = self.memory[data] if type(data) is int else self.files[data]
        assert there == object_id, "the memory, or the file, is another object's"
        return value

    def saw(self, process: Process, object_id: bytes, data: Any) -> None:
        """P2: what one reader has seen is what the others see, unless a loss was announced."""
        value = self.value_at(object_id, data)
        entry = self.node.objects.get(object_id)
        known = entry is not None and object_id not in self.losses
        if known and process.client in (DRIVER, *self.node.scheduler.workers):
            first, seen = self.seen.setdefault(object_id, (entry, value))
            assert first is not entry or seen == value, f"{ids.short(object_id)}: two readers have seen different values"

    def check_states(self, process: Worker, results: list[Any]) -> None:
        """P3: after a call, an actor's state is what has been answered before, in that order, each once, and this call."""
        record = self.node.scheduler.workers[process.client]
        if record.actor is None or not record.actor.task.template.options.checkpoint_every:
            return
        answered = self.answered.setdefault(record.actor.no, [])
        for task_id, status, *_ in results:
            if task_id == record.actor.actor_id or status in (CANCELLED, ACTOR_EXITED):
                continue
            call, state = process.ends.popleft()
            assert call == task_id
            if len(state) > len(answered):
                answered.append(state[-1])
                # An actor that has lost its recovery drops no duplicates any more, as any other.
                again = record.actor.recovery is None
                assert again or answered.count(state[-1]) == 1, "a call was executed twice"
            assert list(state) == answered[: len(state)], "an actor's state is not that of the calls that were answered"

    def begins(self, process: Process, task_id: bytes, raised: int) -> None:
        """No task is executed more often than its options allow, nor again when its result is known; and as many of its
        attempts have raised before, as far as the node has heard, as the process believes."""
        assert isinstance(process, Worker)
        record = self.node.scheduler.workers.get(process.client)
        if record is None:
            return  # It is dead or was told to end, and does not know it yet: its actor's calls have failed.
        assert task_id in record.in_flight, f"{ids.short(task_id)} is executed, and others have it"
        task = self.tasks.get(process.numbers.get(task_id, 0))
        if task is None:
            return  # A replay of an actor's log: see check_states.
        assert raised == self.raised[task.no], f"{ids.short(task_id)} numbers its children as after {raised} that raised"
        options = task.template.options
        self.begun[task.no] += 1
        is_exact = record.actor is not None and record.actor.task.template.options.checkpoint_every
        if options.kind != ACTOR_CREATION and options.max_retries >= 0 and not is_exact:
            allowed = 1 + options.max_retries
            if options.kind == TASK and (options.max_retries or task.no in self.unknown):
                allowed += self.unheard[task.no]
            assert self.begun[task.no] <= allowed, f"{options.name} [{ids.short(task_id)}] is executed {self.begun[task.no]} times"
        known, parent, maker = self.ended.get(task_id, (None, None, None))
        if known is not None and known.spec.to_wire()[1:6] == task.spec.to_wire()[1:6] and not self.was_lost(task):
            if maker is not None and maker.recovery is not None:
                # What a call has submitted is held while the call is in its actor's log, or in its hands.
                calls = [*maker.recovery.log, *maker.recovery.again]
                calls += maker.worker.in_flight.values() if maker.worker is not None else ()
                is_held = any(call.no == known.parent_no for call in calls)
                forgotten = self.parents[task.no][1] is not maker or not is_held
            elif maker is not None:
                forgotten = True  # With the actor's recovery went what its calls had submitted.
            else:
                forgotten = parent.state >= FINISHED or parent.no in self.over
            assert forgotten, f"{options.name} [{ids.short(task_id)}] is run again, and its result was known"

    def was_lost(self, task: Any) -> bool:
        if task.template.options.streaming:
            return any(ids.task_of(object_id) == task.spec.task_id for object_id in self.losses)
        return any(ids.return_id(task.spec.task_id, n) in self.losses for n in range(task.template.options.num_returns))

    def call_runs(self, process: Worker, task_id: bytes, is_retried: bool) -> None:
        caller, number = self.calls[task_id]
        if is_retried:
            return
        assert number > process.last_call.get(caller, 0), "calls of one caller ran out of order, or twice"
        process.last_call[caller] = number

    def check(self) -> None:
        if self.events % self.check_every == 0:
            self.node.check(self.driver.held)
        for object_id, entry in self.node.objects.items():
            if entry.data is not None:
                first, data, is_error = self.committed.get(object_id, (None, None, False))
                if first is entry:
                    spilled = type(data) is int and type(entry.data) is str
                    assert (entry.data == data or spilled) and entry.is_error == is_error, "a value has changed"
                self.committed[object_id] = (entry, entry.data, entry.is_error)
            else:  # Not there yet, or lost.
                self.committed.pop(object_id, None)
                self.seen.pop(object_id, None)

    def check_end(self) -> None:
        node = self.node
        self.take_rows()
        assert self.driver.code is None, f"the driver waits for ever: {self.driver.waits_for}"
        node.check({})
        left = [task for task in self.tasks.values() if task.state not in (FINISHED, FAILED)]
        assert not left, f"{len(left)} tasks never ended: {[(t.template.options.name, t.state) for t in left]}"
        assert node.scheduler.available == node.scheduler.total
        for (table, number), state in self.rows.items():
            ends = {"tasks": (FINISHED, FAILED), "actors": (DEAD,), "objects": (FREED,), "placement_groups": (REMOVED,)}[table]
            assert state in ends, f"the GCS believes that {table} {number} is in state {state}"
        unknown = [no for no in self.tasks if ("tasks", no) not in self.rows and no not in self.unrecorded]
        assert not unknown, f"the GCS does not know tasks {unknown}"
        for process in self.processes.values():
            assert process.code is None and not process.queue, f"worker {process.client} is not idle"
        # Objects that an actor's state holds go when it has ended, and it has.
        left_over = [ids.short(i) for i in node.objects if i not in node.groups]
        assert not left_over, f"objects are left: {left_over}"
        assert not node.lineage.tasks and not node.actors.actors and not node.actors.names
        assert all(offset in node._retired for offset in node.lineage.arena.blocks) and not node._grants
        assert not self.files, f"files are left: {list(self.files)}"


LIMITS = (lineage, "MAX_CHILDREN"), (lineage, "MAX_REPLAYABLE"), (actor_table, "MAX_IN_FLIGHT"), (node_exact, "MAX_IN_FLIGHT")


def choose_limits(rng: Random) -> tuple[int, ...]:
    """Limits that real programs hardly reach are reached in some seeds."""
    children, replayable, in_flight = rng.choice((1000, 1000, 2)), rng.choice((100_000, 100_000, 4)), rng.choice((1000, 1000, 2))
    return children, replayable, in_flight, in_flight


@contextlib.contextmanager
def limited(limits: tuple[int, ...]) -> Iterator[None]:
    """They are module constants: what runs after that in this process has its own again."""
    before = [getattr(module, name) for module, name in LIMITS]
    try:
        for (module, name), limit in zip(LIMITS, limits):
            setattr(module, name, limit)
        yield
    finally:
        for (module, name), limit in zip(LIMITS, before):
            setattr(module, name, limit)


class Simulation(Machine):
    """One node alone."""

    def __init__(self, seed: int, keep_trace: bool = False, check_every: int = 1) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.group_rng, self.zygote_rng = Random(f"groups {seed}"), Random(f"zygote {seed}")
        self.now = 1_000_000.0
        self.clock_is_off_s = 0.0  # what the node is told minus that
        self.faulty = True
        self.events = 0
        self.check_every = check_every
        self.trace = hashlib.blake2b(digest_size=16) if keep_trace else None
        self.story = deque(maxlen=4000 if keep_trace else 0)
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ties = itertools.count()
        self.depth, self.secluded, self.actor_ids, self.contents, self.calls, self.states = {}, [], {}, {}, {}, {}
        self.exact, self.task_kinds = {}, KINDS + GENERATORS
        self.stamps = itertools.count(1)
        super().__init__()
        exact = (EXACT, OWN_WAY, OWN_WAY)
        self.actor_kinds = self.rng.choice(((ACTOR, ACTOR, ACTOR, HUNGRY, NO_ACTOR, BUSY, *exact), exact))
        self.limits = choose_limits(self.rng)
        cpus = self.rng.choice((1, 1, 2, 3))
        resources = {"CPU": cpus * UNIT, "license": UNIT, "GPU": self.rng.choice((1, 2)) * UNIT, "room": 99 * UNIT}
        self.node = Node(resources, self.rng.choice((200_000, 300_000, 10_000_000)), lambda i: "/spill/" + i.hex())
        self.driver.context = Context(self.driver, ids.root_task_id(b"%d" % seed))
        self.carry_out(self.node.start_workers(cpus))

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        heapq.heappush(self._heap, (when, next(self._ties), what, args))

    def clock(self) -> float:
        return self.now + self.clock_is_off_s

    def run(self) -> Simulation:
        with limited(self.limits):
            self.run_to_its_end()
        return self

    def run_to_its_end(self) -> None:
        self.driver.code = self.driver.main()
        self.after(0.0, self.driver.go_on, None)
        for _ in range(self.rng.choice((0, 1, 3, 10))):
            self.after(self.rng.uniform(0.02, 0.2), self.kill_someone)
        for _ in range(self.rng.choice((0, 0, 2, 8))):
            self.after(self.rng.uniform(0.02, 0.2), self.lose_something)
        for _ in range(self.rng.choice((0, 0, 1, 5))):
            self.after(self.rng.uniform(0.02, 0.2), self.stop_someone)
        for _ in range(self.rng.choice((0, 0, 0, 2))):
            self.after(self.rng.uniform(0.02, 0.2), self.set_clock)
        for _ in range(self.rng.choice((0, 0, 0, 1))):
            self.after(self.rng.uniform(0.02, 0.2), self.stall_gcs)
        if self.seed % 4 == 1:
            for _ in range(self.zygote_rng.choice((0, 1, 1, 2))):
                self.after(self.zygote_rng.uniform(0.0, 0.2), self.kill_zygote)
        if self.seed % 4 == 3:  # The others are the runs that they were before there were groups.
            for _ in range(self.group_rng.choice((1, 3, 6))):
                self.after(self.group_rng.uniform(0, 0.15), self.use_group)
        self.until_all_is_quiet()
        self.end_who_starves_others()
        # Those that were found by name may hold handles to themselves.
        for actor in list(self.node.actors.actors.values()):
            if actor.options.detached or actor.options.name:
                self.handle(ActorKillRequested(DRIVER, actor.actor_id, True))
        self.until_all_is_quiet()
        self.check_end()
        assert self.node.late_results == self.late_results, "a result of a task that its worker did not have"

    def until_all_is_quiet(self) -> None:
        for _ in range(50_000):
            if not self._heap:
                return
            when, _, what, args = heapq.heappop(self._heap)
            self.now = max(self.now, when)
            what(*args)
            self.set_alarm()
        raise AssertionError("it does not come to an end")

    def set_clock(self) -> None:
        if self.faulty:
            self.clock_is_off_s += self.rng.choice((-3600.0, 3600.0, -1.0, 1.0))
            self._tick_at = None

    def end_who_starves_others(self) -> None:
        """Actors may hold CPUs that others wait for: then the user is told, and ends some."""
        while any(task.state < FINISHED for task in self.tasks.values()):
            actors = [a.actor_id for a in self.node.actors.actors.values() if a.worker is not None]
            holders = [i for i in actors if CPU in self.node.lineage.tasks[i].template.options.resources]
            if not holders:
                return
            assert self.told_of_starvation, "tasks wait for what actors hold, and nobody was told"
            for actor_id in holders:
                self.handle(ActorKillRequested(DRIVER, actor_id, True))
            self.until_all_is_quiet()

    def use_group(self) -> None:
        """The driver asks for a placement group (it may be there, or have been there), uses it, and removes it later."""
        if not self.faulty or self.driver.code is None:
            return
        rng, context = self.group_rng, self.driver.context
        assert context is not None
        group = rng.choice(GROUPS)
        value = pickle.dumps((group, (), self.stamp()))
        strategy = rng.choice(("PACK", "PACK", "PACK", "STRICT_PACK", "STRICT_SPREAD"))
        if rng.random() < 0.9:
            self.handle(PlacementGroupRequested(DRIVER, 0, group, list(BUNDLES[group]), strategy, "", False, value))
        if rng.random() < 0.5:
            context.hold((group,))
        kinds = (IN_ANY, GUEST) if group == GROUPS[0] else (IN_SECOND, IN_GPU, EXACT_GUEST)
        for _ in range(rng.choice((0, 1, 3, 6))):
            template = rng.choice(kinds)
            if TEMPLATES[template].kind == ACTOR_CREATION:
                context.make_actor(template)
            else:
                context.submit(template)
        self.driver.flush()
        self.after(rng.uniform(0.001, 0.3), self.remove_group, group)
        if rng.random() < 0.5:
            self.after(rng.uniform(0.001, 0.1), self.use_group)

    def remove_group(self, group: bytes) -> None:
        self.handle(PlacementGroupRemoved(DRIVER, group))

    def trace_hash(self) -> str:
        assert self.trace is not None
        return self.trace.hexdigest()
