"""The raylet: a node's hands.  It does what the node decides.

Owns the sockets, the epoll, the clock and the lock; decides nothing.  It reads frames,
turns them into events, hands them to the pure `Node`, and carries its commands out.

One lock guards the node's tables and all sending.  Whoever runs the loop (loop.py)
polls without it and handles news under it; other threads submit under it, briefly.
ObjectRefs that are dropped and tasks that are submitted in a burst do not even take it:
they go to deques that the next holder drains.  Nor does code that interrupts its holder (a
`__del__` that the garbage collector calls, a signal handler): what it says waits until the
tables are whole again.

Rows for the GCS are collected for some ms and sent in one frame; a frame is kept until
the GCS has acknowledged it, and sent again if the GCS had to be started anew.

Considered: a process of its own for the raylet (two more context switches a call), asyncio
(5-10 µs a callback), a selector object instead of epoll's own calls (2 µs an event).
"""

from __future__ import annotations

import functools
import os
import select
import socket
import threading
from collections import deque
from collections.abc import Callable, Iterable
from contextlib import suppress
from time import monotonic
from typing import Any

from minray import clock, object_ref
from minray.channel import Channel, frame
from minray.loop import SPIN_S, WORTH_SPINNING_S, Waiter
from minray.interrupts import interruptible, raise_deferred, uninterruptible
from minray.messages import (
    DRIVER, Command, DefineTemplate, DeleteFile, Event, GcsRecovered, GcsStalled, HoldNext, KillWorker,
    ReferencesChanged, Reply, StartWorker, TasksSubmitted, Ticked, Unpinned, Warn, WorkerDied, WorkerStarted,
    event_from_wire,
)  # fmt: skip
from minray.node import Node
from minray.reference_counter import References
from minray.task_spec import TaskSpec
from minray.zygote import EXIT_S, ROWS_LOST, ZygoteClient

FLUSH_S = 0.05
"""Rows wait at most this long before they go to the GCS."""
BURST = 64
BURST_S = 0.0005
"""Submissions that follow each other closer than this are handed to the node together, up to BURST of them."""
ROUSE_S = 0.05
"""A sleeping loop is woken for what the program drops at most this often: in a loop of put() each object is dropped,
and waking for all of them took a sixth of its speed (measured)."""
GCS_BACKLOG_BYTES = 8 << 20
"""While the GCS is that far behind, changes are merged in the tables instead of being sent."""
GCS_PATIENCE_S = 0.5
"""After it has not been able to write for so long, new work is refused."""
GCS_TRIES_AGAIN = {
    "disk_full": ("OutOfDiskError", "Make room there."),
    "disk_io": ("OutOfDiskError", "Is that disk in order?"),
    "locked": ("RaySystemError", "Another program has locked it: end that."),
    "silent": ("RaySystemError", "Has somebody stopped that process, or does its disk hang?"),
}
"""Of the errors that gcs.py tells, and its silence, those that may pass: what new work becomes, what can be done."""
GCS_SILENCE_S = 5.0
"""A GCS that is GCS_BACKLOG_BYTES behind and acknowledges nothing for so long cannot write, whatever the reason."""
GCS_ATTEMPTS = 5
"""A GCS process that dies more often without writing anything is not started again."""
DEATH_NOTICE_S = 1.0
"""How long the zygote may take to say how a worker ended whose socket has closed."""


class Raylet:
    def __init__(
        self,
        node: Node,
        zygote: ZygoteClient,
        root_task_id: bytes,
        references: References,
        unpinned: deque[bytes],
        answered: Callable[[int, Any], Any],
        on_output: Callable[[int, int, str, bytes, str], None],
        running_task: Callable[[int], bytes | None],
        hold_next: Callable[[int, bool], None],
    ) -> None:
        self.node = node
        self.lock = threading.RLock()  # never taken again by its holder: it only knows who that is
        self.interrupts_change: Callable[[], bool] = self.lock._is_owned  # type: ignore[attr-defined]
        self.submitted: deque[TaskSpec | Event] = deque()  # by the driver, not yet handed to the node
        self._between = 0  # events among them: see `handle`
        self._references = references
        self._unpinned = unpinned  # objects of which the driver has no view any more
        self._root_task_id = root_task_id
        self._answered = answered  # (request_id, answer) -> waiter to set, or None
        self._answers: deque[tuple[Waiter, Any]] = deque()  # waiters to set when the lock is free
        self._on_output = on_output  # (worker, pid, stream, data, label); no data: it has ended
        self._running_task = running_task  # which task a worker executes, from shared memory
        self._hold_next = hold_next  # count there that a worker shall not start another, or (False) that it is new
        self._zygote = zygote
        self._channels: dict[int, Channel] = {}  # by worker number
        self._dying: dict[int, Channel] = {}  # of workers that are being killed although the node counts on them
        self._by_fd: dict[int, tuple[str, int]] = {}
        self._closing: dict[int, float] = {}  # workers whose socket has closed: give up on the zygote's word then
        self._wake_r, self._wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._awake = False  # a byte is in the wake pipe
        self._epoll = select.epoll()
        self._epoll.register(self._wake_r, select.EPOLLIN)
        self._spin = False  # the last poll waited so little that spinning would have met it
        self._roused_s = 0.0  # when a ref or view that was dropped last woke the loop
        self._drained_s = 0.0  # when submissions were last handed over
        self._flush_at: float | None = None
        self._gcs: Channel | None = None
        self._gcs_seq = 0
        self._gcs_acked = 0
        self._gcs_frames: deque[tuple[int, bytes]] = deque()  # sent and not acknowledged
        self._gcs_deaths = 0  # since it last acknowledged something
        self._gcs_stuck_s: float | None = None  # since when it has not been able to write all that it was sent
        self._gcs_stalled = False  # and the node knows
        self._gcs_fault = ""  # what it said last that was no acknowledgement (see gcs.py), or "silent"
        self.gcs_error = ""
        self.flush_each = False  # rows leave before anybody learns what has happened: a killed driver loses none
        self.warnings: list[str] = []  # for the user; who shows them takes them
        self.closed = False
        self.broken = ""  # why nothing can be run any more
        self._epoll.register(zygote.sock.fileno(), select.EPOLLIN)
        zygote.watch_writable = functools.partial(self._watch_writable, zygote)
        self._outgoing: dict[int, list[tuple[Any, ...]]] = {}  # messages of the commands in hand, by worker
        self._doers: dict[type, Callable[[Any], None]] = {
            StartWorker: self._start_worker,
            HoldNext: lambda command: self._hold_next(command.client, True),
            Reply: self._reply,
            KillWorker: self._kill_worker,
            DeleteFile: self._delete_file,
            Warn: self._warn,
        }

    # ------------------------------------------------------------ events in

    def submit(self, spec: TaskSpec) -> None:
        """What an idle worker waits for is handed on at once; when all are busy, those of a burst go together."""
        self.submitted.append(spec)
        if (
            self.node.could_start(spec)
            or len(self.submitted) >= BURST
            or monotonic() - self._drained_s > BURST_S
        ):
            self.drain()
        elif not self._awake:
            self.wake()  # Should this thread go away and compute, the caretaker finds the rest.

    def drain(self) -> None:
        """Hand to the node what the driver has submitted and dropped."""
        if self.interrupts_change():
            self.wake()
            return
        self._drain()
        self._after()

    @uninterruptible
    def _drain(self) -> None:
        with self.lock:
            self._drain_locked(clock.now())

    def handle(self, event: Event) -> None:
        """An event of the driver's own, after everything that it submitted before."""
        if self.interrupts_change():
            self._between += 1
            self.submitted.append(event)
            self.wake()
            return
        self._handle(event)
        self._after()

    @uninterruptible
    def _handle(self, event: Event) -> None:
        with self.lock:
            now = clock.now()
            if self.submitted or self._references.born or self._references.dropped or self._unpinned:
                self._drain_locked(now)
            rows_waited = self._flush_at is not None
            self._do(self.node.handle(event, now))
            if not rows_waited:
                self.wake()  # Who polls already sleeps perhaps until there is news, and must send the rows of this.

    def _after(self) -> None:
        """With the lock free: wake who was answered, and let a Ctrl-C that had to wait be felt."""
        if self.flush_each and self._answers:
            self.settle()  # Another thread may have answered just now, and be flushing.
        while self._answers:
            try:
                waiter, answer = self._answers.popleft()
            except IndexError:
                break  # Another thread was quicker.
            waiter.set(answer)
        raise_deferred()

    def _drain_locked(self, now: float) -> None:
        references = self._references
        droppable = len(references.dropped)  # Before the rest is looked at: see ReferenceCounter.
        node = self.node
        if references.born:
            acquired = references.count_born()
            if acquired:
                self._do(node.handle(ReferencesChanged(DRIVER, acquired, []), now))
        submitted = self.submitted
        if submitted:
            specs: list[Any] = [submitted.popleft() for _ in range(len(submitted))]
            if self._between:
                self._handle_in_order(specs, now)
            else:
                self._do(node.handle(TasksSubmitted(DRIVER, self._root_task_id, specs), now))
        if self._unpinned:
            object_ids = [self._unpinned.popleft() for _ in range(len(self._unpinned))]
            self._do(node.handle(Unpinned(DRIVER, object_ids), now))
        if droppable:
            released = references.count_dropped(droppable)
            if released:
                self._do(node.handle(ReferencesChanged(DRIVER, [], released), now))
        self._drained_s = monotonic()

    def _handle_in_order(self, said: list[TaskSpec | Event], now: float) -> None:
        """With events of the driver's own among the tasks."""
        for item in said:
            if isinstance(item, TaskSpec):
                self._do(self.node.handle(TasksSubmitted(DRIVER, self._root_task_id, [item]), now))
            else:
                self._between -= 1
                self._do(self.node.handle(item, now))

    # ------------------------------------------------------------ the loop

    def wake(self) -> None:
        """Make the poll of another thread return."""
        if not self._awake:
            self._awake = True
            with suppress(OSError):  # Full (it wakes anyway) or closed.
                os.write(self._wake_w, b"w")

    def _rouse(self) -> None:
        self._roused_s = monotonic()
        self.wake()

    def poll(self, timeout: float | None, caretaking: bool) -> None:
        """Wait for news, at most `timeout` seconds, and handle it."""
        if self.broken and not caretaking:
            raise RuntimeError(self.broken)
        if self.submitted or self._references.dropped:
            self.drain()
        ready: list[tuple[int, int]] = []
        started = now = monotonic()
        while self._spin and not caretaking and not ready and now - started < SPIN_S:
            ready = self._epoll.poll(0)
            now = monotonic()
        if not ready:
            ready = self._await_news(self._until_deadline(timeout))
            self._spin = monotonic() - started < WORTH_SPINNING_S
        if self.closed:
            return
        try:
            self._take_in(ready)
        except Exception as error:
            self.broken = (
                f"minray has failed ({type(error).__name__}: {error}), and what it knows may be wrong. What was waited "
                "for may have run. Call minray.shutdown(), and begin again. This is an error in minray, or in a policy "
                "of your own: the traceback says where."
            )
            raise
        self._after()

    @interruptible
    def _await_news(self, timeout: float | None) -> list[tuple[int, int]]:
        raise_deferred()
        rest = self._roused_s + ROUSE_S - monotonic()
        if rest > 0:
            timeout = rest if timeout is None else min(timeout, rest)
        else:
            object_ref.rouse_by(self._rouse)
        try:
            if rest <= 0 and (self._references.dropped or self._unpinned):  # Just before: nobody was roused.
                timeout = 0
            return self._epoll.poll(timeout)
        except (OSError, ValueError):
            if self.closed:  # A signal handler of the program has ended the session.
                return []
            raise
        finally:
            object_ref.rouse_by(None)

    def _until_deadline(self, timeout: float | None) -> float | None:
        deadline = self._flush_at
        wake_at = self.node.wake_at
        if wake_at is not None:
            wake_at -= clock.EPOCH
            deadline = wake_at if deadline is None or wake_at < deadline else deadline
        if self._gcs_stuck_s is not None and not self._gcs_stalled:
            until = self._gcs_stuck_s + self._gcs_patience_s
            deadline = until if deadline is None or until < deadline else deadline
        for until in self._closing.values():
            deadline = until if deadline is None or until < deadline else deadline
        if deadline is None:
            return timeout
        left = max(0.0, deadline - monotonic())
        return left if timeout is None or left < timeout else timeout

    @uninterruptible
    def _take_in(self, ready: list[tuple[int, int]]) -> None:
        with self.lock:
            if self.closed:
                return
            now = clock.now()
            for fd, mask in ready:
                kind, number = self._by_fd.get(fd, ("", 0))
                if kind == "worker":
                    self._take_from_worker(number, mask, now)
                elif fd == self._wake_r:
                    with suppress(BlockingIOError):
                        os.read(self._wake_r, 4096)
                    self._awake = False  # When the byte has gone: or another's goes with it, and wake() is never heard.
                elif kind == "gcs":
                    self._take_from_gcs(mask)
                elif fd == self._zygote.sock.fileno():
                    self._take_from_zygote(mask, now)
            if self.submitted or self._references.born or self._references.dropped or self._unpinned:
                self._drain_locked(now)
            wake_at = self.node.wake_at
            if wake_at is not None and wake_at <= now:
                executing = tuple((number, self._running_task(number)) for number in self.node.held)
                self._do(self.node.handle(Ticked(executing=executing), now))
            if self._closing:
                self._give_up_on_silent_deaths(now)
            if self._gcs_stuck_s is not None:
                self._mind_the_gcs(now)
            if self._flush_at is not None and (self.flush_each or monotonic() >= self._flush_at):
                self._flush(now)
                if self.flush_each:
                    self._push()

    def _take_from_worker(self, number: int, mask: int, now: float) -> None:
        channel = self._channels.get(number)
        if channel is None:
            return
        if mask & select.EPOLLOUT:
            channel.send_backlog()
            if mask == select.EPOLLOUT:
                return
        frames = channel.receive()
        if frames is None:
            self._close_channel(number)
            self._closing[number] = monotonic() + DEATH_NOTICE_S
            return
        self._hear(number, frames, now)

    def _hear(self, number: int, frames: list[Any], now: float) -> None:
        for messages in frames:
            for message in messages:
                self._do(self.node.handle(event_from_wire(number, message), now))

    def _take_from_zygote(self, mask: int, now: float) -> None:
        if mask & select.EPOLLOUT:
            self._zygote.send_backlog()
        notices = self._zygote.receive()
        if notices is None:
            self._zygote_died(now)
            return
        for notice in notices:
            kind, number = notice[0], notice[1]
            if kind == "output":
                self._on_output(number, *notice[2:])
            elif kind == "started":
                self._do(self.node.handle(WorkerStarted(number, notice[2]), now))
            elif kind == "died" and number < 0:
                self._gcs_died(now)
            elif kind == "died":
                self._worker_died(number, notice[2], now)

    def _worker_died(self, number: int, reason: str, now: float) -> None:
        self._closing.pop(number, None)
        if number in self._dying:
            self._channels[number] = self._dying.pop(number)
        channel = self._channels.get(number)
        if channel is not None:  # What it sent before it died still counts.
            while frames := channel.receive():
                self._hear(number, frames, now)
        self._close_channel(number)
        self._do(self.node.handle(WorkerDied(number, reason, self._running_task(number)), now))

    def _give_up_on_silent_deaths(self, now: float) -> None:
        for number in [n for n, until in self._closing.items() if until <= monotonic()]:
            self._worker_died(number, "closed its connection (how it ended is not known)", now)

    def _zygote_died(self, now: float) -> None:
        """Its workers die with it.  Start another, and what was lost is run again."""
        self._epoll.unregister(self._zygote.sock.fileno())
        if not self._zygote.restart():
            self.broken = (
                "minray cannot run anything: its zygote, from which workers are forked, dies each time that it is "
                "started. What it said is in the driver's stderr. No task that is waited for has run since. "
                "Call minray.shutdown(), mend what it complains about, and begin again."
            )
            return
        self._epoll.register(self._zygote.sock.fileno(), select.EPOLLIN)
        workers = self.node.scheduler.workers
        # The idle ones first: else the node would give them what the others had in hand, and that lost more attempts.
        gone = {**self._channels, **self._dying}
        for number in sorted(gone, key=lambda number: number in workers and bool(workers[number].in_flight)):
            self._worker_died(number, "was killed with the zygote, its parent", now)
        self._gcs_died(now)

    def _close_channel(self, number: int) -> None:
        channel = self._channels.pop(number, None)
        if channel is not None:
            self._by_fd.pop(channel.fd, None)
            with suppress(OSError, ValueError):
                self._epoll.unregister(channel.fd)
            channel.close()

    # ------------------------------------------------------------ commands out

    def start(self, num_workers: int) -> None:
        with self.lock:
            self._start_gcs()
            self._do(self.node.start_workers(num_workers))

    def _do(self, commands: Iterable[Command]) -> None:
        """Carry out; what goes to one worker goes in one frame."""
        if self._flush_at is None:
            self._flush_at = monotonic() + FLUSH_S
        if not commands:
            return
        outgoing = self._outgoing
        for command in commands:
            do = self._doers.get(type(command))
            if do is not None and not (type(command) is Reply and command.client):
                do(command)
                continue
            client = command.client  # type: ignore[union-attr]
            messages = outgoing.get(client)
            if messages is None:
                messages = outgoing[client] = []
            fields = tuple(command[1:])
            if type(command) is DefineTemplate:
                fields = (command.template_no, tuple(command.options))
            messages.append((type(command).__name__, *fields))
        if self.flush_each and any(message[0] == "Reply" for messages in outgoing.values() for message in messages):
            self._flush(clock.now())  # A task that gets a value may kill the driver, too.
            self._push()
        for client, messages in outgoing.items():
            channel = self._channels.get(client)
            if channel is not None:
                channel.send(frame(messages))
        outgoing.clear()

    def _start_worker(self, command: StartWorker) -> None:
        self._hold_next(command.client, False)
        ours, theirs = socket.socketpair()
        channel = self._channels[command.client] = Channel(ours, self._watch_writable)
        self._by_fd[channel.fd] = ("worker", command.client)
        self._epoll.register(channel.fd, select.EPOLLIN)
        self._zygote.start_worker(command.client, theirs)

    def _reply(self, command: Reply) -> None:
        waiter = self._answered(command.request_id, command.answer)
        if waiter is not None:
            self._answers.append((waiter, command.answer))

    def _kill_worker(self, command: KillWorker) -> None:
        if command.only_if_running is None or self._running_task(command.client) == command.only_if_running:
            channel = self._channels.get(command.client)
            if command.only_if_running is not None and channel is not None:
                # The node does not know that it dies.  Should its task end in this very moment, it must not be
                # given another one, an actor perhaps: what it says is heard when it is dead, and it is told nothing.
                self._dying[command.client] = self._channels.pop(command.client)
                with suppress(OSError, ValueError):
                    self._epoll.unregister(channel.fd)
            self._zygote.kill_worker(command.client)

    def _warn(self, command: Warn) -> None:
        self.warnings.append(command.text)

    def _delete_file(self, command: DeleteFile) -> None:
        with suppress(OSError):
            os.unlink(command.path)

    def _watch_writable(self, channel: Channel | ZygoteClient, on: bool) -> None:
        with suppress(OSError, ValueError):
            self._epoll.modify(channel.sock.fileno(), select.EPOLLIN | (select.EPOLLOUT if on else 0))

    # ------------------------------------------------------------ the GCS

    def _start_gcs(self) -> None:
        ours, theirs = socket.socketpair()
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        self._gcs = Channel(ours, self._watch_writable)
        self._by_fd[self._gcs.fd] = ("gcs", 0)
        self._epoll.register(self._gcs.fd, select.EPOLLIN)
        self._zygote.start_gcs(theirs)
        for _, data in self._gcs_frames:
            self._gcs.send(data)

    def _gcs_died(self, now: float) -> None:
        """Start another, which gets what was not acknowledged; but not for ever if that is what kills it."""
        if self._gcs is None:
            return
        self._by_fd.pop(self._gcs.fd, None)
        with suppress(OSError, ValueError):
            self._epoll.unregister(self._gcs.fd)
        self._gcs.close()
        self._gcs = None
        self._gcs_deaths += 1
        if self._gcs_fault == "damaged":
            self._give_up_gcs(f"the GCS's file is damaged: {self.gcs_error}", now)
        elif self._gcs_deaths <= GCS_ATTEMPTS:
            self._start_gcs()
        else:
            why = self.gcs_error or "see logs/gcs.log"
            self._give_up_gcs(f"the GCS process died {self._gcs_deaths} times in a row ({why})", now)

    def _give_up_gcs(self, why: str, now: float) -> None:
        self._gcs_frames.clear()
        self.gcs_error = why
        self.warnings.append(
            f"{why}. Tasks go on; their history is not written any more. `minray check` tells what the file still "
            "holds, and what can be done."
        )
        if self._gcs_stalled:
            self._do(self.node.handle(GcsRecovered(DRIVER), now))
        self._gcs_stuck_s, self._gcs_stalled = None, False

    def _mind_the_gcs(self, now: float) -> None:
        """It has said that it cannot write.  Is it time to take in nothing new, or has it written everything?"""
        if not self._gcs_fault:
            if not self._gcs_frames:
                self._flush(now)
            if self._gcs_frames:
                return
            if self._gcs_stalled:
                self.warnings.append("everything is written now, and new work is taken in again")
                self._do(self.node.handle(GcsRecovered(DRIVER), now))
            self._gcs_stuck_s, self._gcs_stalled = None, False
        elif (
            self._gcs_fault in GCS_TRIES_AGAIN
            and not self._gcs_stalled
            and monotonic() >= (self._gcs_stuck_s or 0.0) + self._gcs_patience_s
        ):
            self._gcs_stalled = True
            error, advice = GCS_TRIES_AGAIN[self._gcs_fault]
            why = f"the GCS cannot write: {self.gcs_error}. {advice}"
            until = f"Until it can, new tasks and objects become errors ({error}); what runs goes on."
            self.warnings.append(f"{why} {until}")
            self._do(self.node.handle(GcsStalled(DRIVER, error, why), now))

    @property
    def _gcs_patience_s(self) -> float:
        return GCS_SILENCE_S if self._gcs_fault == "silent" else GCS_PATIENCE_S

    def _take_from_gcs(self, mask: int) -> None:
        if self._gcs is None:
            return
        if mask & select.EPOLLOUT:
            self._gcs.send_backlog()
        if mask & ~select.EPOLLOUT:
            messages = self._gcs.receive()
            if messages is None:  # The zygote tells why, and then it is started again.
                with suppress(OSError, ValueError):
                    self._epoll.unregister(self._gcs.fd)
                return
            for message in messages:
                if message[0] == "ack":
                    self._gcs_acked = max(self._gcs_acked, message[1])
                    if self._gcs_fault == "silent" and not self._gcs_stalled:
                        self._gcs_stuck_s = None  # It is slow, no more.
                    self.gcs_error, self._gcs_fault, self._gcs_deaths = "", "", 0
                    while self._gcs_frames and self._gcs_frames[0][0] <= message[1]:
                        self._gcs_frames.popleft()
                else:
                    _, _, self._gcs_fault, self.gcs_error = message
                    if self._gcs_fault in GCS_TRIES_AGAIN and self._gcs_stuck_s is None:
                        self._gcs_stuck_s = monotonic()

    def _flush(self, now: float) -> None:
        """Send what has changed to the GCS; again in FLUSH_S if it is too far behind to take it."""
        if self._gcs is not None and self._gcs.backlog_bytes > GCS_BACKLOG_BYTES:
            self._flush_at = monotonic() + FLUSH_S
            if not self._gcs_fault and not self._gcs_stalled:
                self._gcs_stuck_s, self._gcs_fault = monotonic(), "silent"
                self.gcs_error = f"for {GCS_SILENCE_S:g} s its process has not taken what it was sent"
            return
        self._flush_at = None
        self.record(self.node.take_rows(now))

    def _push(self) -> None:
        """Wait until the kernel has what was sent: then it outlives this process.

        But not for long: a GCS that cannot write takes nothing either."""
        deadline = monotonic() + GCS_PATIENCE_S
        while self._gcs is not None and self._gcs.backlog and not self._gcs_fault and monotonic() < deadline:
            writable = select.poll()
            writable.register(self._gcs.fd, select.POLLOUT)
            writable.poll(100)
            self._gcs.send_backlog()

    def settle(self) -> None:
        """Return when what was handled so far has also been flushed, if each is (see `flush_each`)."""
        with self.lock:
            pass

    def record(self, rows: dict[str, list[tuple[Any, ...]]]) -> None:
        if rows and self._gcs is not None:
            self._gcs_seq += 1
            data = frame((self._gcs_seq, list(rows.items())))
            self._gcs_frames.append((self._gcs_seq, data))
            self._gcs.send(data)

    def flush_now(self) -> int:
        """Send all rows there are; the number that the GCS will acknowledge."""
        self.drain()
        with self.lock:
            self._flush_at = None
            self.record(self.node.take_rows(clock.now()))
            return self._gcs_seq

    def is_committed(self, seq: int) -> bool:
        """Raises RuntimeError when it never will be."""
        if self._gcs is None and not self.closed:
            raise RuntimeError(self.gcs_error)
        return self._gcs_acked >= seq

    # ------------------------------------------------------------ the end

    def forget(self) -> None:
        """In a process that the driver has forked: the connections are the driver's alone."""
        self.closed = True
        object_ref.rouse_by(None)
        self._close_descriptors()
        self._zygote.forget()

    def _close_descriptors(self) -> None:
        if self._gcs is not None:
            self._gcs.close()
        for channel in (*self._channels.values(), *self._dying.values()):
            channel.close()
        self._channels.clear()
        self._dying.clear()
        self._epoll.close()
        os.close(self._wake_r)
        os.close(self._wake_w)

    def close(self) -> None:
        """Close every connection: the GCS writes the rest and ends, the zygote ends everything else."""
        with self.lock:
            self.closed = True
            if self._gcs is not None:
                self._gcs.sock.setblocking(True)
                self._gcs.sock.settimeout(EXIT_S)
                with suppress(OSError):
                    while self._gcs.backlog:
                        try:
                            self._gcs.sock.sendall(self._gcs.backlog.popleft())
                        except TimeoutError:
                            self.warnings.append(
                                f"the GCS has taken nothing for {EXIT_S:g} s at the end of the session. {ROWS_LOST}"
                            )
                            break
                    # Not only closed: a process that the driver has forked may have it, too.
                    self._gcs.sock.shutdown(socket.SHUT_WR)
            self._close_descriptors()
