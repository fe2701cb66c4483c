"""The driver's side of the API: a CoreWorker with the node in its own process.

Owns what belongs to a session: the directory, the arena, the zygote, the raylet, and
their orderly end.  A get() of something small that is ready is one look into the node's
table, without a lock (its entries only ever change from pending to ready).
"""

from __future__ import annotations

import os
import socket
import sys
import threading
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from contextlib import ExitStack, suppress
from itertools import compress, count, islice
from operator import attrgetter
from time import monotonic
from typing import TYPE_CHECKING, Any

from minray import clock, exceptions, ids, machine
from minray.core_worker import CoreWorker, TaskContext, ValueLost, raise_stored
from minray.ending import Ending
from minray.interrupts import guard_handlers, interruptible, raise_deferred, unguard_handlers, uninterruptible
from minray.loop import Loop, Waiter
from minray.messages import DRIVER, Event, ObjectsAwaited, ResourcesAdded
from minray.node import Node
from minray.object_ref import ObjectRef
from minray.object_store import Arena, plan_arena
from minray.output import OutputPrinter, print_lines
from minray.policy import Policy
from minray.raylet import Raylet
from minray.reference_counter import References
from minray.serialization import deserialize
from minray.session import FINISHED, Session, finish_session, identify, open_root, sweep
from minray.task_spec import UNIT, TaskSpec
from minray.worker import BLACK_BOX_BYTES, black_box_offset, hold_offset
from minray.zygote import CLOSE_S, ZygoteClient

if TYPE_CHECKING:
    from minray.job_storage import OpenJob

COMMIT_TIMEOUT_S = 30.0
_data_of = attrgetter("data")  # Of an ObjectEntry: None, so false, while it is pending; never empty or 0 later.


class Driver(CoreWorker):
    @uninterruptible
    def __init__(
        self,
        resources: dict[str, float],
        object_store_memory: int | None,
        namespace: str,
        log_to_driver: bool,
        history: int,
        policy: Policy | None,
        version: str,
        warn: Callable[[str], None],
        job: tuple[str, Any] | None = None,
        root: str | None = None,
        default_lifetime: str | None = None,
        search_path: Sequence[str] = (),
        labels: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__()
        self.references = References()
        self._main_thread = threading.main_thread().ident
        self._guard_interrupts()
        self._ending = Ending()
        with ExitStack() as undo:  # Should anything fail here, nothing stays.
            undo.callback(unguard_handlers)
            undo.callback(self._ending.unwatch)
            for name in sweep(root):
                from minray.gcs import close_file

                close_file(os.path.join(open_root(root), FINISHED, name, "gcs.sqlite"))
            self.session = Session.create(root)
            undo.callback(self.session.finish)
            self.namespace = namespace
            self.session_path = self.session.path
            self.default_lifetime = default_lifetime
            self.started_s = clock.now()
            self.version = version
            self.job_id = ids.root_task_id(os.urandom(16))  # A job is a driver's run, and the driver is its root task.
            self._root = TaskContext(self.job_id, None)
            self.job = self._open_job(*job, warn) if job is not None else None
            if self.job is not None:
                undo.callback(self.job.close)
            plan = plan_arena(object_store_memory, machine.total_memory_bytes(), self.session.path)
            if plan.warning:
                warn(plan.warning)
            self.session.note(arena=plan.name)
            self.zygote = ZygoteClient(
                {
                    "driver": os.getpid(),
                    "session": self.session.path,
                    "arena": plan.name,
                    "history": history,
                    "log_to_driver": log_to_driver,
                    "preload": ["numpy"] if "numpy" in sys.modules else [],
                    "namespace": namespace,
                    "default_lifetime": default_lifetime,
                    "search_path": list(search_path),
                    "name_prefix": exceptions.name_prefix,
                    "job_id": self.job_id,
                    "job": self.job.config() if self.job is not None else None,
                    "gpus": _visible_gpus(int(resources.get("GPU", 0))),
                    "environment": {name: os.environ[name] for name in ("OMP_NUM_THREADS",) if name in os.environ},
                },
                on_start=lambda pid: self.session.note(zygote=identify(pid)),
            )
            undo.callback(self.zygote.close)
            self.arena = Arena.create(plan.name, plan.capacity)
            undo.callback(self.arena.close)
            self.arena.back(0, BLACK_BOX_BYTES)
            spill = self.job.directory if self.job is not None else os.path.join(self.session.path, "spill")
            make_node = self.job.make_node if self.job is not None else Node
            self.node = make_node(
                {name: round(amount * UNIT) for name, amount in resources.items()},
                plan.capacity,
                lambda object_id: os.path.join(spill, object_id.hex()),
                policy,
                session_id=self.job_id[:8],
                labels=labels,
            )
            self.node.set_aside(BLACK_BOX_BYTES)
            self._printer = OutputPrinter(self._log_of)
            self._pending_lines: list[tuple[str, str]] = []
            self._printing = False  # lines are pending, or repeated ones are being counted
            self.raylet = Raylet(
                self.node, self.zygote, self._root.task_id, self.references, self.unpinned, self.answered,
                self._print_output, self._running_task, self._hold_next,
            )  # fmt: skip
            undo.callback(self.raylet.close)
            self.interrupts_change = self.raylet.interrupts_change
            self.raylet.flush_each = self.job is not None
            self.loop = Loop(self._poll, self.raylet.wake, "minray-loop")
            self.connect()
            self.raylet.start(self.node.scheduler.workers_for_cpus)
            with self.raylet.lock:
                self.raylet.record(self._first_rows(resources))
            self.loop.start()
            undo.pop_all()

    def _open_job(self, name: str, storage: Any, warn: Callable[[str], None]) -> OpenJob:
        """What only durable jobs need is loaded here."""
        from minray.code_digest import Digester
        from minray.job_storage import open_job

        job = open_job(name, storage, self.version, self.job_id, self.session.path)
        self.digester = Digester()
        if job.troubles:
            others = f" and {len(job.troubles) - 1} more" if len(job.troubles) > 1 else ""
            warn(f"job {name!r}: what is kept cannot all be used, and that is made anew: {job.troubles[0]}{others}")
        if job.known.results:
            warn(f"job {name!r}: {len(job.known.results):,} results of earlier runs are known ({job.storage})")
        return job

    def _end_job(self, job: OpenJob) -> None:
        reused, ran = self.node.describe("reused"), self.node.describe("ran")
        self.raylet.record({"runs": [(self._job_row[5], self._job_row[7], reused, ran)]})
        text = f"minray: job {job.name!r}: reused {reused:,} results, ran {ran:,} tasks"
        self._pending_lines.append(("stderr", text))

    def add_resources(self, resources: dict[str, float]) -> None:
        """The node has so much more from now on."""
        added = {name: round(amount * UNIT) for name, amount in resources.items() if amount}
        self.send(ResourcesAdded(DRIVER, tuple(sorted(added.items()))))
        with self.raylet.lock:
            self.raylet.record({"nodes": [self._node_row(self.node.describe("resources"))]})

    def _node_row(self, resources: dict[str, float]) -> tuple[Any, ...]:
        import json

        labels = json.dumps(self.node.labels)
        return (1, self.node_id, socket.gethostname(), 0, json.dumps(resources), self.arena.capacity, labels)

    def _first_rows(self, resources: dict[str, float]) -> dict[str, list[tuple[Any, ...]]]:
        import json

        self._job_row = [
            1, self.job_id, self.job and self.job.name, " ".join(sys.argv)[:1000] or "python", os.getpid(), 0,
            int(self.started_s * 1e6), None, self.version, sys.version.split()[0], self.namespace,
            json.dumps(resources),
        ]  # fmt: skip
        return {"jobs": [tuple(self._job_row)], "nodes": [self._node_row(resources)]}

    # ------------------------------------------------------------ signals

    def _guard_interrupts(self) -> None:
        if threading.get_ident() == self._main_thread:  # Else the session was started by another thread.
            guard_handlers()

    # ------------------------------------------------------------ output of workers

    def _log_of(self, pid: int) -> str:
        return os.path.join(self.session.path, "logs", f"(pid {pid})")

    def _print_output(self, number: int, pid: int, stream: str, data: bytes, label: str) -> None:
        label = label or (f"worker {number}" if number > 0 else "gcs")
        if data:
            self._pending_lines += self._printer.feed(label, pid, stream, data, monotonic())
        else:
            self._pending_lines += self._printer.close(pid, monotonic())
        self._printing = True

    def _poll(self, timeout: float | None, caretaking: bool) -> None:
        deadline = self._printer.next_deadline() if self._printing else None
        if deadline is not None:
            left = max(0.0, deadline - monotonic())
            timeout = left if timeout is None or left < timeout else timeout
        try:
            self.raylet.poll(timeout, caretaking)
        finally:
            if self.raylet.broken:
                self.end_futures(self.raylet.broken)
        if self.raylet.warnings:
            warnings, self.raylet.warnings = self.raylet.warnings, []
            self._show([("stderr", f"minray: {text}") for text in warnings])
        if self._printing:
            lines, self._pending_lines = self._pending_lines, []
            lines += self._printer.tick(monotonic())
            self._printing = self._printer.next_deadline() is not None
            self._show(lines)

    @interruptible  # A terminal may be stopped, a pipe full.
    def _show(self, lines: list[tuple[str, str]]) -> None:
        print_lines(lines)

    def _running_task(self, number: int) -> bytes | None:
        task_id = bytes(self.arena.write_view(black_box_offset(number), 16))
        return None if task_id in (ids.NIL, b"\0" * 16) else task_id

    def _hold_next(self, number: int, on: bool) -> None:
        holds = self.arena.write_view(hold_offset(number), 1)
        holds[0] = (holds[0] + 1) % 256 if on else 0
        if not on:  # A new worker: what stands there is of one long gone.
            self.arena.write_view(black_box_offset(number), 16)[:] = ids.NIL

    # ------------------------------------------------------------ CoreWorker

    def context(self) -> TaskContext:
        return self._root

    def send(self, event: Event) -> None:
        self.raylet.handle(event)

    send_now = send

    def submit_spec(self, spec: TaskSpec, num_returns: int) -> None:
        self.raylet.submit(spec)

    def get_values(self, refs: Sequence[ObjectRef[Any]], deadline: float | None) -> list[Any]:
        objects = self.node.objects
        if self.raylet.submitted:
            self.raylet.drain()
        values = []
        for ref in refs:
            entry = objects.get(ref)
            data = entry.data if entry is not None else None  # Once: it may be lost while we look.
            if entry is None or data is None:
                self._await(refs, deadline)
                entry = objects[ref]
                data = entry.data
                if data is None:
                    continue  # Another one is an error, and get() was told at once.
            if type(data) is bytes:
                if entry.is_error:
                    raise_stored(deserialize(data))
                values.append(deserialize(data))
            else:
                values.append(self._large_value(ref, deadline))
        if self.raylet.flush_each:
            self.raylet.settle()
        # One that was not ready, without an error in any other, has been lost while others were read.
        return values if len(values) == len(refs) else self.get_values(refs, deadline)

    def _large_value(self, ref: ObjectRef[Any], deadline: float | None) -> Any:
        while True:
            try:
                return self.value_now(ref, None)
            except ValueLost as lost:
                self.tell_lost(lost)
            self._await((ref,), deadline)

    def value_now(self, ref: ObjectRef[Any], answer: Any) -> Any:
        data, is_error = self._fetch(ref)
        raise_deferred()
        value = deserialize(data)
        if is_error:
            raise_stored(value)
        return value

    @uninterruptible  # Between the pin and the view that ends it.
    def _fetch(self, ref: ObjectRef[Any]) -> tuple[bytes | memoryview, int]:
        with self.raylet.lock:
            fetched = self.node.fetch_for_driver(bytes(ref))
        if fetched is None:
            raise ValueLost(bytes(ref), b"", "it was lost a moment ago")  # The node knows; b"" is no place.
        data, size, is_error, object_id = fetched
        return (data if type(data) is bytes else self.view(object_id, data, size)), is_error

    def _await(self, refs: Sequence[ObjectRef[Any]], deadline: float | None) -> None:
        self._guard_interrupts()
        try:
            self.request(
                lambda rid: ObjectsAwaited(DRIVER, rid, refs, len(refs), True, False), deadline  # type: ignore[arg-type]
            )
        except TimeoutError:
            pending = [ref for ref in refs if self.node.objects[ref].data is None]
            if not pending:
                return  # The last one came in this moment.
            first = self.node.objects[pending[0]].task
            what = f" (the first of them from {first.template.options.name}())" if first is not None else ""
            raise exceptions.GetTimeoutError(
                f"get() waited for {len(refs)} object(s); {len(pending)} of them{what} were not ready in time. "
                "Their tasks go on; get() may be called again, minray.cancel() ends them."
            ) from None

    def ready_positions(self, refs: Sequence[ObjectRef[Any]], num_ready: int, deadline: float | None) -> list[int]:
        if self.raylet.submitted:
            self.raylet.drain()
        found = self._look(refs, num_ready)
        if len(found) == num_ready:
            return found
        if deadline is not None and deadline <= monotonic():
            self.loop_once()
        else:
            with suppress(TimeoutError):
                self.request(
                    lambda rid: ObjectsAwaited(DRIVER, rid, refs, num_ready, False, False), deadline  # type: ignore[arg-type]
                )
        return self._look(refs, num_ready)

    def _look(self, refs: Sequence[ObjectRef[Any]], num_ready: int) -> list[int]:
        """All in C, 0.05 µs a ref: draining 1,000 refs one by one looks at half a million."""
        data = map(_data_of, map(self.node.objects.get, refs))
        try:
            return list(islice(compress(count(), data), num_ready))
        except AttributeError:
            raise_freed(next(ref for ref in refs if ref not in self.node.objects))
            raise

    def loop_once(self) -> None:
        """wait(timeout=0): take in what has come, and what comes within half a millisecond."""
        self.loop.wait(Waiter(), monotonic() + 0.0005)

    def future(self, ref: ObjectRef[Any]) -> Future[Any]:
        result = super().future(ref)
        if self.raylet.broken:
            self.end_futures(self.raylet.broken)
        return result

    # ------------------------------------------------------------ the GCS

    def flush_records(self, timeout: float = COMMIT_TIMEOUT_S) -> str:
        """Wait until everything that the node knows is committed; the path of the file."""
        seq = self.raylet.flush_now()
        deadline = monotonic() + timeout
        while not self.raylet.is_committed(seq):
            if monotonic() > deadline:
                why = f": {self.raylet.gcs_error}" if self.raylet.gcs_error else ""
                raise TimeoutError(f"the GCS did not write everything within {timeout:g} s{why}")
            self.loop_once()
        return os.path.join(self.session.path, "gcs.sqlite")

    # ------------------------------------------------------------ the end

    def forget(self) -> None:
        """In a process that the driver has forked: let go of what is the driver's."""
        self.raylet.forget()
        if self.job is not None:
            self.job.close()  # Its lock is not inherited.

    @uninterruptible
    def close(self) -> None:
        """End every process of the session and remove what it used; live arrays stay readable."""
        deadline = monotonic() + CLOSE_S
        self._job_row[5:8:2] = 2 if self._ending.is_bad() else 1, int(clock.now() * 1e6)  # FAILED, SUCCEEDED
        with suppress(Exception):
            self.raylet.flush_now()
            with self.raylet.lock:
                self.raylet.record({"jobs": [tuple(self._job_row)]})
                if self.job is not None:
                    self._end_job(self.job)
        self.loop.close()
        self.end_futures("minray was shut down while this future was waited for")
        self.raylet.close()
        clean = self.zygote.close(self._on_last_notice, deadline)
        if not clean and os.path.exists(os.path.join(self.session.path, "gcs.sqlite-wal")):
            self.raylet.warnings.append(
                "the GCS was ended with its zygote before it had finished its file: the newest rows of the history may "
                "be lost, and with them the newest results of a durable job. Were they stopped, or is the disk slow?"
            )
        print_lines(self._pending_lines + self._printer.close_all(monotonic()))
        print_lines([("stderr", f"minray: {text}") for text in self.raylet.warnings])
        if not clean:
            finish_session(self.session.path, self.arena.name)
        self.arena.close()
        if self.job is not None:
            self.job.close()
        self._ending.unwatch()
        unguard_handlers()

    def _on_last_notice(self, notice: tuple[Any, ...]) -> None:
        if notice[0] == "output":
            self._print_output(*notice[1:])


def _visible_gpus(count: int) -> list[int | str]:
    """What CUDA calls the session's GPUs, if this process was given some; [] if they are numbered from 0."""
    names = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return [int(name) if name.isdecimal() else name for name in names] if 0 < count <= len(names) else []


def raise_freed(ref: bytes) -> None:
    raise ValueError(
        f"ObjectRef {ids.short(ref)} is not of this session: it was made before the last shutdown(), "
        "or by another driver."
    )
