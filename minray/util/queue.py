"""A first-in, first-out queue that the driver, tasks and actors share: `Queue`.

Owns an actor that keeps the items, and how one waits at it.  The items themselves lie in
the object store: the actor keeps refs, so an array goes from who puts it to who gets it
without a copy, and the actor needs none of the classes of what passes through it.

Waiting is done in the actor, by threads: a call that cannot go on sleeps on a condition
until it can, or until its time is over.  So nobody polls, and who has waited longest goes
first.  A call that waits takes a thread of the actor (`max_concurrency`, 1,000; threads are
started when they are needed).  If all but one of them wait, the next call that would have
to wait is sent home and asks again in a moment: the last thread is kept for those who can
make the others go on.

A call that is abandoned (Ctrl-C, a cancelled coroutine) says so: it does not take an item
that nobody would see.  One whose process is killed while it waits does.

Considered and left out: futures that the actor keeps and fulfils, without threads.  They
need something in the core that a call can be answered by later.
"""

from __future__ import annotations

import itertools
import os
import queue
import threading
from collections import deque
from collections.abc import Callable, Iterable, Mapping
from time import monotonic, sleep
from typing import Any

import minray
from minray import ObjectRef

THREADS = 1000
ASK_AGAIN_S = 0.05
"""Between two questions of a call that found no thread to wait in."""
REMEMBERED = 1000
"""So many abandoned calls are remembered; one that is over already would be for ever."""


class Empty(queue.Empty):
    """There are not so many items; or none came in time."""


class Full(queue.Full):
    """There is not so much room; or none came in time."""


class QueueActor:
    """Keeps refs to the items.  Methods that wait return None when they were sent home."""

    def __init__(self, maxsize: int, threads: int) -> None:
        self._maxsize = maxsize
        self._items: deque[Any] = deque()
        self._unfinished = 0  # got, and not reported by task_done()
        self._lock = threading.Lock()
        self._came = threading.Condition(self._lock)
        self._went = threading.Condition(self._lock)
        self._all_done = threading.Condition(self._lock)
        # Who waits there, the first to come first: threads that are woken together run in any order.
        self._line: dict[threading.Condition, deque[bytes]] = {self._came: deque(), self._went: deque()}
        self._may_wait = threads - 1
        self._abandoned: dict[bytes, None] = {}

    def put(self, refs: list[Any], timeout: float | None, ticket: bytes) -> bool | None:
        with self._lock:
            there = self._wait(self._went, lambda: self._has_room_for(len(refs)), timeout, ticket)
            if there:
                self._items.extend(refs)
                self._unfinished += len(refs)
                self._came.notify(len(refs))
            if self._line[self._went] and self._has_room_for(1):
                self._went.notify_all()  # The next in line may have looked already, when it was not its turn.
            return there

    def get(self, count: int, timeout: float | None, ticket: bytes) -> list[Any] | bool | None:
        with self._lock:
            there = self._wait(self._came, lambda: len(self._items) >= count, timeout, ticket)
            taken = [self._items.popleft() for _ in range(count)] if there else []
            if there:
                self._went.notify(count)
            if self._line[self._came] and self._items:
                self._came.notify_all()  # As in put().
            return taken if there else there

    def put_back(self, refs: list[Any]) -> None:
        with self._lock:
            self._items.extendleft(reversed(refs))
            self._came.notify(len(refs))

    def wait_until_done(self, what: None, timeout: float | None, ticket: bytes) -> bool | None:
        with self._lock:
            return self._wait(self._all_done, lambda: not self._unfinished, timeout, ticket)

    def task_done(self) -> None:
        with self._lock:
            if not self._unfinished:
                raise ValueError("task_done() called too many times")
            self._unfinished -= 1
            if not self._unfinished:
                self._all_done.notify_all()

    def abandon(self, ticket: bytes) -> None:
        with self._lock:
            self._abandoned[ticket] = None
            if len(self._abandoned) > REMEMBERED:
                del self._abandoned[next(iter(self._abandoned))]
            for condition in (self._came, self._went, self._all_done):
                condition.notify_all()

    def qsize(self) -> int:
        return len(self._items)

    def _has_room_for(self, count: int) -> bool:
        return self._maxsize <= 0 or len(self._items) + count <= self._maxsize

    def _wait(
        self, condition: threading.Condition, is_so: Callable[[], bool], timeout: float | None, ticket: bytes
    ) -> bool | None:
        if is_so():
            return True
        if timeout is not None and timeout <= 0:
            return False
        if not self._may_wait:
            return None
        self._may_wait -= 1
        line = self._line.get(condition)  # None: all may go at once
        if line is not None:
            line.append(ticket)

        def may_go() -> bool:
            return ticket in self._abandoned or (is_so() and (line is None or line[0] == ticket))

        try:
            condition.wait_for(may_go, timeout)
        finally:
            self._may_wait += 1
            if line is not None:
                line.remove(ticket)
        if ticket in self._abandoned:
            del self._abandoned[ticket]
            return False
        return is_so()


class Queue:
    """A queue that may be passed to tasks and actors; methods as those of `queue.Queue` and `asyncio.Queue`.

    Args:
        maxsize: items it holds at most; 0: no limit.
        actor_options: options of the actor that keeps the items: ``{"num_cpus": 1, "name": "inbox"}``.

    The actor lives as long as a Queue that refers to it, anywhere, or until `shutdown`.

    >>> from minray.util.queue import Queue
    >>> queue = Queue(maxsize=10)
    >>> @minray.remote
    ... def produce(queue):
    ...     for i in range(3):
    ...         queue.put(i)
    >>> ref = produce.remote(queue)
    >>> [queue.get() for _ in range(3)]
    [0, 1, 2]
    """

    def __init__(self, maxsize: int = 0, actor_options: Mapping[str, Any] | None = None) -> None:
        options = {"max_concurrency": THREADS, **(actor_options or {})}
        self.maxsize = maxsize
        self.actor = minray.remote(QueueActor).options(**options).remote(maxsize, options["max_concurrency"])

    def __len__(self) -> int:
        return self.qsize()

    def qsize(self) -> int:
        """The number of items."""
        size: int = minray.get(self.actor.qsize.remote())
        return size

    size = qsize

    def empty(self) -> bool:
        """Whether there are no items."""
        return self.qsize() == 0

    def full(self) -> bool:
        """Whether there is no room; never without a maxsize."""
        return 0 < self.maxsize <= self.qsize()

    # ------------------------------------------------------------ putting

    def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """Add an item; if there is no room, wait for it, at most `timeout` seconds.  Raises Full."""
        _of_put(self._ask(self.actor.put, [_stored(item)], _patience(block, timeout)))

    async def put_async(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
        """As `put`, in a coroutine."""
        _of_put(await self._ask_async(self.actor.put, [_stored(item)], _patience(block, timeout)))

    def put_nowait(self, item: Any) -> None:
        """As ``put(item, block=False)``."""
        self.put(item, block=False)

    def put_nowait_batch(self, items: Iterable[Any]) -> None:
        """Add all items, or raise Full and add none."""
        if not isinstance(items, Iterable):
            raise TypeError(f"put_nowait_batch() takes an iterable of items, got {items!r}.")
        refs = [_stored(item) for item in items]
        if not self._ask(self.actor.put, refs, 0):
            raise Full(f"there is no room for {len(refs)} items; the queue holds {self.maxsize}. None was added.")

    # ------------------------------------------------------------ getting

    def get(self, block: bool = True, timeout: float | None = None) -> Any:
        """Take the oldest item; if there is none, wait for one, at most `timeout` seconds.  Raises Empty."""
        (ref,) = _of_get(self._ask(self.actor.get, 1, _patience(block, timeout)))
        return minray.get(ref)[0]

    async def get_async(self, block: bool = True, timeout: float | None = None) -> Any:
        """As `get`, in a coroutine."""
        (ref,) = _of_get(await self._ask_async(self.actor.get, 1, _patience(block, timeout)))
        return (await ref)[0]

    def get_nowait(self) -> Any:
        """As ``get(block=False)``."""
        return self.get(block=False)

    def get_nowait_batch(self, num_items: int) -> list[Any]:
        """Take so many items, or raise Empty and take none."""
        if type(num_items) is not int:
            raise TypeError(f"get_nowait_batch() takes a number of items, got {num_items!r}.")
        if num_items < 0:
            raise ValueError(f"get_nowait_batch() takes a number of items, 0 or more, got {num_items}.")
        refs = self._ask(self.actor.get, num_items, 0)
        if refs is False:
            raise Empty(f"there are not {num_items} items in the queue. None was taken.")
        return [item for (item,) in minray.get(refs)]

    def shutdown(self, force: bool = False, grace_period_s: float = 5) -> None:
        """End the actor, and with it the queue; calls that wait at it fail with ActorDiedError.

        Args:
            force: at once; otherwise it is asked to end,
            grace_period_s: and ended if it does not within so many seconds.
        """
        if not force:
            minray.wait([self.actor.__ray_terminate__.remote()], timeout=grace_period_s)
        minray.kill(self.actor)

    # ------------------------------------------------------------ waiting at the actor

    def _ask(self, method: Any, what: Any, patience: float | None) -> Any:
        for left in _attempts(patience):
            ticket = os.urandom(8)
            ref = method.remote(what, left, ticket)
            try:
                answer = minray.get(ref)
            except BaseException as error:
                self._abandon(error, ref, ticket)
                raise
            if answer is not None:
                return answer
            sleep(ASK_AGAIN_S)

    async def _ask_async(self, method: Any, what: Any, patience: float | None) -> Any:
        import asyncio

        for left in _attempts(patience):
            ticket = os.urandom(8)
            ref = method.remote(what, left, ticket)
            try:
                answer = await ref
            except BaseException as error:
                self._abandon(error, ref, ticket)
                raise
            if answer is not None:
                return answer
            await asyncio.sleep(ASK_AGAIN_S)

    def _abandon(self, error: BaseException, ref: ObjectRef[Any], ticket: bytes) -> None:
        """Nobody waits for this call any more.  What it may have taken meanwhile is put back."""
        if isinstance(error, Exception):
            return  # It has ended.
        actor = self.actor

        def put_back(call: Any) -> None:
            if call.exception() is None and isinstance(call.result(), list):
                actor.put_back.remote(call.result())

        actor.abandon.remote(ticket)
        ref.future().add_done_callback(put_back)

    def __repr__(self) -> str:
        return f"Queue(maxsize={self.maxsize}, {self.actor!r})"


def _stored(item: Any) -> ObjectRef[Any]:
    return minray.put((item,))  # In a tuple, since an item may be a ref.


def _patience(block: bool, timeout: float | None) -> float | None:
    if not block:
        return 0
    if timeout is not None and timeout < 0:
        raise ValueError(f"timeout must be a number of seconds, 0 or more, or None, got {timeout!r}.")
    return timeout


def _attempts(patience: float | None) -> Iterable[float | None]:
    """How long each attempt may take, the last one nothing."""
    if patience is None:
        return itertools.repeat(None)
    deadline = monotonic() + patience
    return itertools.chain([patience], iter(lambda: max(0.0, deadline - monotonic()), None))


def _of_put(was_put: bool) -> None:
    if not was_put:
        raise Full("there was no room in the queue.")


def _of_get(refs: Any) -> Any:
    if refs is False:
        raise Empty("there was no item in the queue.")
    return refs


__all__ = ["Empty", "Full", "Queue"]
