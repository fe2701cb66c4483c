"""Local mode: a whole session inside this process, for unit tests.

The node decides here exactly what it decides in a session of processes (`Node`, unchanged); the stage (stage.py) is
another shell around it, as raylet.py is one.  Here are the two parts of a session that would be processes: a
`LocalDriver`, and `LocalWorker`, which is a `Worker` without a socket: it executes, copies and reports as that does.

All refs in this process are the driver's: it holds them in the node's eyes.  What a worker submits or puts is
therefore handed over to the driver in the same breath (`_hand_over`).

What is not done here: what a process would give a task (a core, an environment, globals and a heap of its own,
a death without ``finally``).  What is not done yet is refused in `_check_options`.
"""

from __future__ import annotations

import asyncio
import ctypes
import functools
import os
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from minray import __version__, api, clock, ids, machine, object_ref
from minray.core_worker import CoreWorker, TaskContext
from minray.driver import Driver
from minray.interrupts import unguard_handlers
from minray.messages import (
    DRIVER, Event, ObjectPut, ObjectsAwaited, ReferencesChanged, TasksFinished, TasksSubmitted, event_from_wire,
)  # fmt: skip
from minray.object_ref import ObjectRef
from minray.object_store import Allocator, Arena
from minray.policy import Policy
from minray.reference_counter import References
from minray.stage import Candidate, Killed, Stage, StageLoop, Strand, Until
from minray.task_spec import ACTOR_EXITED, ACTOR_METHOD, TaskOptions, TaskSpec
from minray.worker import Worker


_total_memory = functools.cache(machine.total_memory_bytes)  # Some ms: more than all the rest of a session's start.


def start(
    given: Mapping[str, Any], resources: Callable[[Mapping[str, Any], int], dict[str, float]], store_bytes: int | None
) -> LocalDriver:
    """A session with the options of `init`, checked there."""
    _no_environment(given.get("runtime_env"))
    memory = given.get("memory") or _total_memory() * 7 // 10
    return LocalDriver(
        resources(given, memory),
        store_bytes or _total_memory() * 3 // 10,
        given.get("namespace") or f"anonymous-{os.urandom(4).hex()}",
        given.get("policy"),
        default_lifetime=given.get("default_lifetime"),
        labels=given.get("labels"),
    )


class LocalPolicy(Policy):
    """A worker is handed one task at a time: none waits behind another, and nothing depends on run times."""

    def prefetch(self, mean_s: float | None) -> int:
        return 1


def _check_options(options: TaskOptions) -> None:
    """What local mode cannot do is refused here."""
    if options.checkpoint_every or options.checkpoint_interval_s:
        raise NotImplementedError(
            f"{options.name}: checkpoints protect an actor from the death of its process, and in local mode it has "
            "none. Use a session of processes for this test: minray.init() without local_mode."
        )
    if options.is_async:
        raise NotImplementedError(
            f"{options.name}: asyncio actors have an event loop of their own, which local mode cannot schedule yet. "
            "Use a session of processes for this test, or plain methods with max_concurrency=..., which are threads."
        )


def _no_environment(given: Mapping[str, Any] | None) -> str:
    if given:
        raise NotImplementedError(
            "runtime_env=...: an environment belongs to a process, and in local mode there is only this one. Set what "
            "the test needs here (os.environ, sys.path), or use a session of processes: minray.init() without "
            "local_mode."
        )
    return ""


class LocalWorker(Worker):
    """Executes as every worker does; what it would write to its socket it says to the stage at once."""

    def __init__(self, stage: Stage, number: int, config: dict[str, Any]) -> None:
        self.stage = stage
        self.since = 0  # when it got something to do
        self.dead = False
        self.strands: dict[Strand, bytes] = {}  # that run its tasks
        self._group_of: dict[bytes, str] = {}  # by task that runs: its concurrency group
        self.limits: dict[str, int] | None = None  # of an actor with threads: how many calls of each group may run
        super().__init__(None, config, number)  # type: ignore[arg-type]

    def _open_channel(self, sock: Any, config: dict[str, Any], number: int) -> None:
        self.references = self.stage.references
        self.unpinned = _Unpins(self.stage.unpinned, number)  # type: ignore[assignment]
        self.arena = self.stage.arena
        self.loop = StageLoop(self.stage)
        self._black_box = memoryview(bytearray(16))
        self._holds = memoryview(bytearray(1))

    def _settle_in(self) -> None:
        self.surroundings = _Surroundings()  # type: ignore[assignment]
        self.interrupts_change = self.stage.interrupts_change

    # ------------------------------------------------------------ the node's words

    def has_work(self) -> bool:
        """Whether a strand of its could begin something now."""
        if self.dead:
            return False
        return bool(self.startable()) if self.queue else self._exiting and not self.strands

    def startable(self) -> list[int]:
        """Where in the queue the tasks stand of which any may be next: of an actor the first of each caller, as their
        order among each other is nobody's promise, if their group has room.  The end of an actor is a step, too."""
        if not self.queue:
            return [0]
        if self.limits is None and self.strands:
            return []
        if self.actor_id is None or (self.limits is None and len(self.queue) < 2):
            return [0]
        record = self.stage.node.scheduler.workers.get(self.client)
        room = dict(self.limits or {})
        for task_id in self.strands.values():
            group = self._group_of.get(task_id)
            if group in room:
                room[group] -= 1
        firsts: dict[Any, int] = {}
        for position, (task_id, template_no, *_) in enumerate(self.queue):
            group = self._templates_known[template_no].concurrency_group
            if room.get(group, 1) > 0:
                task = record.in_flight.get(task_id) if record is not None else None
                firsts.setdefault((getattr(task, "caller", None), group), position)
        return list(firsts.values())

    def environment_of(self, given: Mapping[str, Any] | None) -> str:
        return _no_environment(given)

    def _entitle(self, title: str) -> None: ...

    def _construct(self, cls: Any, options: TaskOptions, args: Any, kwargs: Any) -> None:
        super()._construct(cls, options, args, kwargs)
        if options.concurrency > 1:
            self._concurrent = None  # The stage has the threads.
            self.limits = {"": options.max_concurrency, **dict(options.concurrency_groups)}

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

    def _set_variables(self, num_cpus: float) -> None: ...  # They are the driver's.

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
        task_id, *rest = self.queue[position]
        del self.queue[position]
        # An ID object of its own for each execution, as if it had been read from a socket: see TaskContext.
        task = (bytes(bytearray(task_id)), *rest)
        task_id = self.strands[strand] = task[0]
        options = self._templates_known[task[1]]
        threaded = self.limits is not None and options.kind == ACTOR_METHOD
        self._group_of[task_id] = options.concurrency_group
        ident = threading.get_ident()
        try:
            if threaded:
                context = self._contexts[ident] = TaskContext(task_id, None)
                self._execute(task, context)
                if self._results and self._results[-1][1] == ACTOR_EXITED:
                    last = self._results.pop()  # What else has begun may finish first.
                    self.stage.wait(Until(lambda: len(self.strands) == 1), None)
                    self._results.append(last)
            else:
                self._black_box[:] = task_id
                self._run_one(task, self._context)
            if not self.dead:
                self.flush()
        except Killed:
            pass
        finally:
            self._contexts.pop(ident, None)
            self._group_of.pop(task_id, None)
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

    def _flush(self) -> None:
        """What `Worker` would put into a frame, in that order."""
        messages, self._out = self._out, []
        for message in messages:
            self.send(event_from_wire(self.client, message))
        if self._results:
            self.send(self.take_results())

    def take_results(self) -> TasksFinished:
        results = [self._results.popleft() for _ in range(len(self._results))]
        if self.stage.journal is not None:
            for task_id, status, payload, _, _ in results:
                self.stage.journal.ends(task_id, status, payload)
        return TasksFinished(self.client, results)

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

    def asyncio_future(self, ref: ObjectRef[Any]) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.future(ref))


class LocalDriver(Driver):
    """The driver of a session in this process: it waits at the stage, and there is nothing to end but strands."""

    stage: Stage

    def __init__(
        self,
        resources: dict[str, float],
        store_bytes: int,
        namespace: str,
        policy: Policy | None,
        *,
        seed: bytes | None = None,
        choose: Callable[[list[Candidate]], int] | None = None,
        virtual: bool = False,
        default_lifetime: str | None = None,
        labels: Mapping[str, str] | None = None,
    ) -> None:
        CoreWorker.__init__(self)
        self.default_lifetime = default_lifetime
        self.references = References()
        self._main_thread = threading.main_thread().ident
        self._guard_interrupts()
        self.namespace = namespace
        self.started_s = clock.now()
        self.version = __version__
        self.job = None
        self.job_id = ids.root_task_id(os.urandom(16) if seed is None else seed)
        self._root = TaskContext(self.job_id, None)
        self.session = _NoSession()  # type: ignore[assignment]
        self._resources = resources
        stage = self.stage = Stage(
            self, LocalWorker, LocalArena(store_bytes), resources, policy or LocalPolicy(), choose, virtual,
            labels,
        )
        self.raylet = stage  # type: ignore[assignment]
        self.interrupts_change = stage.interrupts_change
        self.node, self.arena, self.loop = stage.node, stage.arena, StageLoop(stage)
        self.unpinned = _Unpins(stage.unpinned, DRIVER)  # type: ignore[assignment]
        object_ref.connect(stage.core_of_this_thread, self.references.born, self.references.dropped)
        api.set_core_lookup(stage.core_of_this_thread)
        self._time = _Time(stage)
        self._time.install()

    def first_rows(self) -> dict[str, list[tuple[Any, ...]]]:
        return self._first_rows(self._resources)

    def environment_of(self, given: Mapping[str, Any] | None) -> str:
        return _no_environment(given)

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

    def asyncio_future(self, ref: ObjectRef[Any]) -> asyncio.Future[Any]:
        return asyncio.wrap_future(self.future(ref))

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
        try:
            self.stage.close()
        finally:  # Else the next time.sleep() would wait for its turn among strands that are gone.
            self._let_go()
            self.arena.close()
            unguard_handlers()


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
            began = {name: float(int(getattr(time, name)())) for name in ("time", "monotonic", "perf_counter")}
            for name in began:
                self._replace_clock(stage, name, began[name])

    def _replace_clock(self, stage: Stage, name: str, began: float) -> None:
        real, real_ns = getattr(time, name), getattr(time, name + "_ns")

        def seconds() -> float:
            return began + stage._skipped_s if threading.get_ident() in stage.strand_of else real()

        def nanoseconds() -> int:
            return int(seconds() * 1e9) if threading.get_ident() in stage.strand_of else real_ns()

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
