"""An actor with coroutine methods: its calls share one event loop, which the main thread runs.

The loop is asyncio's own; only its selector is ours.  Before it waits the selector sends what there is
to send, then it takes the lead (loop.py) and looks at the node's socket together with the
program's descriptors.  So a call costs no hand-over between threads, results of one turn of the
loop leave in one frame, and while a coroutine computes the caretaker serves the world as in any
worker.  The program's code never runs inside the selector: what has arrived is begun in a callback.

Several calls run at a time, so who calls minray is told by a context variable, which asyncio
copies into every task: IDs of children follow from the call that made them, however calls interleave.

Plain methods of such a class run on the loop too, between the awaits of others; so does the
constructor, in which a loop runs already.  A minray.get() in any of them stops them all; it works
(this thread then leads as any other would), and is warned of once.

Left out: uvloop, whose poll is not open; a loop of its own for each concurrency group (a semaphore
does); fairness between calls beyond what asyncio has.
"""

from __future__ import annotations

import asyncio
import contextvars
import inspect
import os
import selectors
import sys
import threading
import traceback
from collections import deque
from collections.abc import Callable, Coroutine
from contextlib import suppress
from time import monotonic
from types import CoroutineType
from typing import Any

from minray import object_ref
from minray.clock import EPOCH
from minray.concurrent_calls import Call, ConcurrentCalls
from minray.core_worker import TaskContext
from minray.loop import SPIN_S, WORTH_SPINNING_S, Waiter
from minray.messages import Event
from minray.task_spec import CANCELLED, OK, TaskOptions
from minray.worker import NONE, ActorExit, Worker

SLICE_S = 0.001
"""So long calls are begun, and results collected, before others have a turn."""
LAST_WORDS_S = 2.0
"""So long coroutines that are cancelled at the actor's end may take to clean up."""

_context: contextvars.ContextVar[TaskContext] = contextvars.ContextVar("minray_call")
_EAGER: dict[str, Any] = {"eager_start": True} if sys.version_info >= (3, 12) else {}
"""A coroutine that never waits then costs no turn of the loop."""

Events = list[tuple[selectors.SelectorKey, int]]


class _Group:
    """The calls of one concurrency group."""

    __slots__ = ("limit", "running", "waiting")

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.running = 0
        self.waiting: deque[Call] = deque()


class _Selector(selectors.DefaultSelector):
    def __init__(self, calls: AsyncCalls) -> None:
        super().__init__()
        self._calls = calls

    def select(self, timeout: float | None = None) -> Events:
        return self._calls.poll(super().select, timeout)


class _Bell(Waiter):
    """Rung when there is something for the loop, by whoever has read it."""

    __slots__ = ("_wake",)

    def __init__(self, wake: Callable[[], None]) -> None:
        super().__init__()
        self._wake = wake

    def set(self, answer: Any = None) -> None:
        self._wake()

    def ring(self) -> None:
        self._wake()


class AsyncCalls(ConcurrentCalls):
    def __init__(self, worker: Worker, options: TaskOptions) -> None:
        self._worker = worker
        limits = (("", options.max_concurrency), *options.concurrency_groups)
        self._groups = {name: _Group(limit) for name, limit in limits}
        self._running: dict[bytes, tuple[Any, ...]] = {}  # by ID: (asyncio's task, and the arguments of _ended)
        self._num_running = 0  # those, and the one that is being begun
        self._leaving: list[asyncio.Future[None]] = []  # of calls that end the actor, when others do not run any more
        self._closed = False  # Calls that arrive now were made after the one that ends the actor.
        self._ending = False  # serve() is over, and the loop runs for last words only
        self._beginning = False  # _begin_calls will run soon
        self._unstepped = False  # a coroutine was begun, and its first step comes when the loop goes on
        self._coroutines: dict[int, bool] = {}  # by template: whether the method is one
        self._warned = False
        self._name = options.name.partition(".")[0]
        self._thread = threading.get_ident()
        self._selector = _Selector(self)
        self._loop = asyncio.SelectorEventLoop(self._selector)
        asyncio.set_event_loop(self._loop)
        self._bell = _Bell(self._wake)
        self._node: selectors.SelectorKey | None = None  # the socket's, while this thread reads it
        # From here on the worker asks and tells us.
        worker._work = self._bell
        worker._idle = True
        worker.context = self._find_context  # type: ignore[method-assign]
        worker.send_soon = self._send_soon  # type: ignore[method-assign]
        worker.get = self._get  # type: ignore[method-assign]
        worker.wait = self._wait  # type: ignore[method-assign]

    # ------------------------------------------------------------ the actor's life

    def construct(self, cls: Any, args: Any, kwargs: Any) -> Any:
        """In the running loop, so that a constructor may make tasks and futures; it may be a coroutine itself."""

        async def make() -> Any:
            if not inspect.iscoroutinefunction(cls.__init__):
                return cls(*args, **kwargs)
            actor = cls.__new__(cls, *args, **kwargs)
            await actor.__init__(*args, **kwargs)
            return actor

        return self._loop.run_until_complete(make())

    def serve(self) -> None:
        """Until the node says that it is over.  Then what still runs is cancelled."""
        while not self._worker._exiting:
            try:
                self._loop.run_forever()
            except BaseException:  # sys.exit() in a callback of the program's
                traceback.print_exc()
        self._closed = self._ending = True
        for task_id in list(self._running):
            self._cancel(task_id)
        try:
            self._loop.run_until_complete(self._end_tasks())
            self._loop.run_until_complete(self._loop.shutdown_asyncgens())
        except BaseException:
            traceback.print_exc()

    async def _end_tasks(self) -> None:
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        if tasks:
            await asyncio.wait(tasks, timeout=LAST_WORDS_S)

    def complete(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        self._loop.run_until_complete(coroutine)

    def close(self) -> None:
        """Nothing is left to be closed after serve(); the loop stays open for the last word."""

    # ------------------------------------------------------------ the selector

    def poll(self, select: Callable[[float | None], Events], timeout: float | None) -> Events:
        """Once each turn of the loop: send, then look who has news."""
        worker, lead = self._worker, self._worker.loop
        if worker._exiting and not self._ending:
            self._loop.stop()
            timeout = 0
        if worker.queue:  # Another thread has read it, or this one in a get().
            self._begin_soon()
            timeout = 0
        worker._take_care()
        if not lead.take_lead(self._bell):
            self._watch_node(False)
            try:
                return select(timeout)
            finally:
                lead.stop_following(self._bell)
        try:
            self._watch_node(True)
            events: Events = []
            if timeout is None or timeout > 0:
                object_ref.rouse_by(self._wake)  # Before the look: what is dropped or submitted from now on rings.
                worker._take_care()
                started = now = monotonic()
                spin_until = started + (SPIN_S if timeout is None else min(timeout, SPIN_S))
                while worker._spin and not events and now < spin_until:
                    events = select(0)
                    now = monotonic()
                if not events:
                    events = select(timeout)
                worker._spin = monotonic() - started < WORTH_SPINNING_S
            else:
                events = select(0)
            for at, (key, _) in enumerate(events):
                if key is self._node:
                    del events[at]
                    worker._receive()
                    break
        finally:
            lead.pass_lead()
        if worker.queue:
            self._begin_soon()
        if worker._exiting and not self._ending:
            self._loop.stop()
        return events

    def _watch_node(self, wanted: bool) -> None:
        if wanted and self._node is None:
            self._node = self._selector.register(self._worker.sock, selectors.EVENT_READ)
        elif not wanted and self._node is not None:
            self._node = None
            self._selector.unregister(self._worker.sock)

    def _wake(self) -> None:
        """In any thread: another turn of the loop."""
        if threading.get_ident() != self._thread or not self._loop.is_running():
            with suppress(RuntimeError):  # It has been closed.
                self._loop.call_soon_threadsafe(_nothing)

    def _send_soon(self, event: Event) -> None:
        if threading.get_ident() == self._thread:
            self._worker.send(event)  # The selector flushes.
        else:
            self._worker.send_now(event)

    # ------------------------------------------------------------ calls begin

    def _begin_soon(self) -> None:
        if not self._beginning:
            self._beginning = True
            self._loop.call_soon(self._begin_calls)

    def _begin_calls(self) -> None:
        self._beginning = self._unstepped = False
        worker, groups, until = self._worker, self._groups, monotonic() + SLICE_S
        queue, templates = worker.queue, worker._templates_known
        for group in groups.values():
            while group.waiting and group.running < group.limit:
                try:
                    call = group.waiting.popleft()
                except IndexError:  # Another thread was told to drop it.
                    break
                if self._must_follow(call):
                    group.waiting.appendleft(call)
                    return
                self._begin(call, group)
                if monotonic() > until:
                    self._begin_soon()
                    return
        while queue:
            try:
                call = queue.popleft()
            except IndexError:
                return
            if self._must_follow(call):
                queue.appendleft(call)
                return
            if self._closed:
                continue
            options = templates[call[1]]
            if options.method == "__ray_terminate__":
                self._closed = True
            group = groups[options.concurrency_group]
            if group.waiting or group.running >= group.limit:
                group.waiting.append(call)
                continue
            self._begin(call, group)
            if monotonic() > until:
                self._begin_soon()
                return

    def _must_follow(self, call: Call) -> bool:
        """A plain method runs at once, and so would overtake the coroutines that wait for their first step."""
        if not self._unstepped:
            return False
        template_no = call[1]
        is_coroutine = self._coroutines.get(template_no)
        if is_coroutine is None:
            options = self._worker._templates_known[template_no]
            method = getattr(self._worker.actor, options.method, None)
            is_coroutine = options.streaming != 0 or inspect.iscoroutinefunction(method)
            self._coroutines[template_no] = is_coroutine
        if not is_coroutine:
            self._begin_soon()
        return not is_coroutine

    def _begin(self, call: Call, group: _Group) -> None:
        worker = self._worker
        task_id, template_no, args, values, mark = call
        options = worker._templates_known[template_no]
        _context.set(TaskContext(task_id, options, mark=mark))
        started_s = EPOCH + monotonic()
        group.running += 1
        self._num_running += 1
        try:
            arguments, keywords = worker._arguments(args, values) if args is not None else ((), {})
            value = worker._function(options)(*arguments, **keywords)
            if options.streaming:
                value = worker._stream_beside_others(task_id, options, value)
            elif type(value) is not CoroutineType:
                status, payload = OK, self._payload(task_id, options, value)
        except BaseException as error:  # noqa: B036  (whatever it raises is its caller's)
            if isinstance(error, ActorExit):
                value = _raise(error)
            else:
                value = None
                status, payload = worker._failure(error, options, task_id)
                error.__traceback__ = None
        if type(value) is CoroutineType:
            finish = self._finish(value, task_id, options, started_s, group)
            task = asyncio.Task(finish, loop=self._loop, **_EAGER)
            if not task.done():
                self._running[task_id] = (task, value, started_s, group)
                self._unstepped = not _EAGER
        else:
            self._ended(task_id, status, payload, started_s, group)

    async def _finish(
        self, value: Coroutine[Any, Any, Any], task_id: bytes, options: TaskOptions, started_s: float, group: _Group
    ) -> None:
        status: int = OK
        payload: Any
        try:
            returned = await value  # Lives until the result is in the list: see Worker._execute.
            payload = self._payload(task_id, options, returned)
        except asyncio.CancelledError:
            status, payload = CANCELLED, (b"", "cancelled")
        except BaseException as error:  # noqa: B036
            if isinstance(error, ActorExit):
                await self._others_end(options.method != "__ray_terminate__")
            status, payload = self._worker._failure(error, options, task_id)
            error.__traceback__ = None
        self._ended(task_id, status, payload, started_s, group)

    def _payload(self, task_id: bytes, options: TaskOptions, value: Any) -> Any:
        """What a call returned -> what the node is told."""
        worker = self._worker
        if value is None and options.num_returns == 1:
            return NONE
        if options.num_returns > 1 and not options.streaming:
            value = worker._parts(options, value)
        return worker._returns(task_id, options, value)

    # ------------------------------------------------------------ calls end

    def _ended(self, task_id: bytes, status: int, payload: Any, started_s: float, group: _Group) -> None:
        worker = self._worker
        if worker._forked:
            os._exit(0)
        self._running.pop(task_id, None)
        if worker._cancelled:
            worker._cancelled.discard(task_id)
        now = monotonic()
        worker._results.append((task_id, status, payload, started_s, EPOCH + now))
        group.running -= 1
        self._num_running -= 1
        if group.waiting:
            self._begin_soon()
        if self._leaving:
            self._look_who_is_left()
        if now - worker._sent_s > SLICE_S:
            worker._flush()
        else:
            object_ref.rouse()  # Should the caretaker be in the poll already, it sends this in a moment.

    async def _others_end(self, drop_waiting: bool) -> None:
        """A call ends the actor: until no other one runs."""
        self._closed = True
        if drop_waiting:
            for group in self._groups.values():
                group.waiting.clear()
        alone = self._loop.create_future()
        self._leaving.append(alone)
        self._look_who_is_left()
        with suppress(asyncio.CancelledError):
            await alone

    def _look_who_is_left(self) -> None:
        others = self._num_running - len(self._leaving)
        if self._leaving and not others and not any(group.waiting for group in self._groups.values()):
            for alone in self._leaving:
                if not alone.done():
                    alone.set_result(None)

    # ------------------------------------------------------------ calls are cancelled

    def drop(self, task_id: bytes) -> bool:
        for group in self._groups.values():
            for call in list(group.waiting):
                if call[0] == task_id:
                    with suppress(ValueError):
                        group.waiting.remove(call)
                        self._loop.call_soon_threadsafe(self._look_who_is_left)
                        return True
        return False

    def interrupt(self, task_id: bytes) -> None:
        with suppress(RuntimeError):
            self._loop.call_soon_threadsafe(self._cancel, task_id)

    def _cancel(self, task_id: bytes) -> None:
        running = self._running.get(task_id)
        if running is None:
            self._worker._cancelled.discard(task_id)  # It has ended,
            if any(call[0] == task_id for call in self._worker.queue):  # or was on its way from one hand to the other.
                self._worker._on_CancelTask(task_id)
        else:
            running[0].cancel()
            running[0].add_done_callback(lambda _: self._never_began(task_id))

    def _never_began(self, task_id: bytes) -> None:
        """One that is cancelled before its first step runs no code, so it could not say that it has ended."""
        if task_id in self._running:
            _, value, started_s, group = self._running[task_id]
            value.close()
            self._ended(task_id, CANCELLED, (b"", "cancelled"), started_s, group)

    # ------------------------------------------------------------ what the program asks

    def _find_context(self) -> TaskContext:
        return _context.get(self._worker._context)

    def _get(self, refs: Any, timeout: float | None) -> Any:
        self._warn("get", "`await ref`, or asyncio.gather(*refs)")
        return type(self._worker).get(self._worker, refs, timeout)

    def _wait(self, refs: Any, num_returns: int, timeout: float | None) -> Any:
        self._warn("wait", "asyncio.wait([ref.as_future(), ...])")
        return type(self._worker).wait(self._worker, refs, num_returns, timeout)

    def _warn(self, what: str, instead: str) -> None:
        if not self._warned and threading.get_ident() == self._thread:
            self._warned = True
            print(
                f"minray: {what}() in the asyncio actor {self._name} blocks its event loop, and with it all other "
                f"calls. Use {instead} to let them go on meanwhile. (This is said once.)",
                file=sys.stderr,
            )


async def _raise(error: BaseException) -> None:
    raise error


def _nothing() -> None: ...
