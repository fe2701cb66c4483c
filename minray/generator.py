"""Generators as tasks: the two ends of a stream of items.

`ObjectRefGenerator` is what the caller of a generator function gets at once: an iterator of ObjectRefs, one for
each value that the task yields.  `Producer` is the other end, in the worker: it makes an object of each value, and
stands still when the caller has asked for backpressure and is behind.  What lies between them, and what becomes of
it in failures, is the node's (node_streams.py).

The reader takes many items with one question, up to `TAKEN_AT_ONCE`, so that reading costs little; with backpressure
it takes one at a time, because what it has taken counts as consumed.

Left out, as in Ray: `send`, `throw` and `close` (the task runs ahead of its reader: there is no yield that
waits for what they bring), and passing a generator on (its items can be passed, and are).
"""

from __future__ import annotations

import concurrent.futures
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, NoReturn

from minray import ids, serialization
from minray.interrupts import uninterruptible
from minray.messages import ItemsRequested, ObjectsAwaited, RoomAbandoned, RoomAwaited
from minray.object_ref import ObjectRef, restore
from minray.serialization import serialize
from minray.task_spec import DYNAMIC, TaskOptions

if TYPE_CHECKING:
    from minray.core_worker import CoreWorker
    from minray.worker import Worker

TAKEN_AT_ONCE = 100


class ObjectRefGenerator:
    """An iterator of ObjectRefs: the items that a generator task yields, each as soon as it is there.

    A generator function's `.remote()` returns one at once, and so does any with num_returns="streaming".  ``next(gen)``
    waits for the next item and returns its ref; ``async for`` awaits it; `minray.wait` takes generators beside refs.
    The task runs ahead of its reader unless _generator_backpressure_num_objects=n holds it back.

    When the task raises, what it had yielded stays; the ref after that raises the error at `get`, and then the
    iteration ends.  It can be read once: a second loop over it finds nothing left.  If it is dropped, items that were
    not read are freed; the task goes on to its end (`minray.cancel(gen)` ends it).  Not for several threads at once.

    >>> @minray.remote
    ... def squares(n):
    ...     for i in range(n):
    ...         yield i * i
    >>> [minray.get(ref) for ref in squares.remote(4)]
    [0, 1, 4, 9]
    """

    def __init__(self, core: CoreWorker, end: ObjectRef[Any], reader: ObjectRef[Any], at_once: int) -> None:
        self._core = core
        self._end = end
        self._reader = reader  # for the node: as long as it is held, somebody reads
        self._task_id = bytes(end)
        self._at_once = at_once
        self._refs: deque[ObjectRef[Any]] = deque()  # taken, and not yet returned
        self._position = 0  # so many were taken
        self._over = False  # there are no more to take

    # ------------------------------------------------------------ reading

    def __iter__(self) -> ObjectRefGenerator:
        return self

    def __next__(self) -> ObjectRef[Any]:
        """The ref of the next item; waits until it is there.

        Raises:
            StopIteration: there are no more.
        """
        refs = self._refs
        while not refs:
            if self._over or not self._take():
                raise StopIteration
            if not refs and not self._over:
                self._core.ready_positions((self._next_id(),), 1, None)  # type: ignore[arg-type]
        return refs.popleft()

    def __aiter__(self) -> ObjectRefGenerator:
        return self

    async def __anext__(self) -> ObjectRef[Any]:
        """Like `next`, without standing in the event loop's way.

        Raises:
            StopAsyncIteration: there are no more.
        """
        import asyncio  # Late, here and below: it takes longer than all of minray, and whoever awaits has it.

        refs = self._refs
        while not refs:
            if self._over or not self._take():
                raise StopAsyncIteration
            if not refs and not self._over:
                await asyncio.wrap_future(self._next_to_come())
        return refs.popleft()

    def next_ready(self) -> bool:
        """Whether `next` would return a ref now, without waiting; False also when there are no more."""
        if not self._refs and not self._over:
            return self._look()[0] > 0
        return bool(self._refs)

    def is_finished(self) -> bool:
        """Whether the task has ended and all items were read, so that `next` would raise StopIteration."""
        if not self._refs and not self._over:
            there, ended = self._look()
            self._over = ended and not there
        return self._over and not self._refs

    def completed(self) -> ObjectRef[Any]:
        """A ref that is ready when the task has ended: what it returned (None, mostly); `get` raises its error."""
        return self._end

    def task_id(self) -> bytes:
        """The ID of the task that yields the items."""
        return self._task_id

    def _next_to_come(self) -> concurrent.futures.Future[Any]:
        core, next_id = self._core, self._next_id()
        return core.answer_to(lambda rid: ObjectsAwaited(core.client, rid, [next_id], 1, False, False))

    def awaited(self) -> bytes:
        """For wait(): the object that is ready when the next item is there, or the end."""
        if not self._refs and self._core.client:
            self._look()  # If this is a second attempt, what the first has freed is made again.
        return self._next_id()

    def _next_id(self) -> bytes:
        return self._refs[0] if self._refs else ids.item_id(self._task_id, self._position)

    def _look(self) -> tuple[int, bool]:
        """How many items can be taken, and whether there will be no more."""
        answer = self._ask(0)
        return (1, False) if answer is None else answer[:2]

    @uninterruptible  # What was handed over must be held.
    def _take(self) -> bool:
        """Take what there is.  False: there is nothing, and will be nothing."""
        answer = self._ask(self._at_once)
        if answer is None:
            self._refs.append(self._end)  # The session knows nothing of the task any more: that ref says so.
            self._over = True
            return True
        there, ended, had = answer
        count = min(there, self._at_once)
        for item in range(self._position, self._position + count):
            self._refs.append(self._core.taken_over(ids.item_id(self._task_id, item), had))
        self._position += count
        self._over = ended and count == there
        return bool(count) or not ended

    def _ask(self, limit: int) -> Any:
        from minray import api  # Not above: it stands on core_worker.py, which knows this class.

        core, task_id, position = self._core, self._task_id, self._position
        if api._core is not core:
            raise ValueError(
                f"this generator [task {ids.short(task_id)}] is not of this session: it was made before the last "
                "shutdown()."
            )
        return core.ask(lambda rid: ItemsRequested(core.client, rid, task_id, position, limit))

    # ------------------------------------------------------------ what cannot be done

    def send(self, value: Any) -> NoReturn:
        self._refuse("send")

    def throw(self, *error: Any) -> NoReturn:
        self._refuse("throw")

    def close(self) -> NoReturn:
        self._refuse("close")

    def _refuse(self, what: str) -> NoReturn:
        raise NotImplementedError(
            f"{what}() cannot reach a generator that runs in another process, ahead of its reader. "
            "To end its task: minray.cancel(gen). To talk with it: an actor."
        )

    def __reduce__(self) -> NoReturn:
        raise TypeError(
            f"{self!r} cannot be pickled: only the process that called the task can read it. "
            "Pass its items, which are ObjectRefs (list(gen) for all of them), or pass a list of refs: "
            'num_returns="dynamic".'
        )

    def __repr__(self) -> str:
        return f"ObjectRefGenerator({self._task_id.hex()})"


class DynamicObjectRefGenerator:
    """The value of a task with num_returns="dynamic": refs to all that its generator has yielded.

    It can be iterated again and again, has a length, and can be passed on.  If the generator raised, the last of the
    refs raises its error.

    >>> @minray.remote(num_returns="dynamic")
    ... def parts(n):
    ...     for i in range(n):
    ...         yield i
    >>> [minray.get(ref) for ref in minray.get(parts.remote(3))]
    [0, 1, 2]
    """

    def __init__(self, refs: list[ObjectRef[Any]]) -> None:
        self._refs = refs

    def __iter__(self) -> Iterator[ObjectRef[Any]]:
        return iter(self._refs)

    def __len__(self) -> int:
        return len(self._refs)

    def __getitem__(self, index: int) -> ObjectRef[Any]:
        return self._refs[index]

    def __repr__(self) -> str:
        return f"DynamicObjectRefGenerator({len(self)} refs)"

    def __reduce__(self) -> Any:
        return _pickled([bytes(ref) for ref in self._refs])


class _Yielded:
    """Becomes a `DynamicObjectRefGenerator` on its way: in the worker nobody needs the refs."""

    def __init__(self, task_id: bytes, count: int) -> None:
        self._ids = [ids.item_id(task_id, item) for item in range(count)]

    def __reduce__(self) -> Any:
        return _pickled(self._ids)


def _pickled(object_ids: list[bytes]) -> Any:
    for object_id in object_ids:
        serialization.note_ref(object_id)
    return _unpickled, (b"".join(object_ids),)


def _unpickled(joined: bytes) -> DynamicObjectRefGenerator:
    starts = range(0, len(joined), ids.ID_BYTES)
    return DynamicObjectRefGenerator([restore(joined[start : start + ids.ID_BYTES]) for start in starts])


# ---------------------------------------------------------------- calling one


def made_of(core: CoreWorker, refs: list[ObjectRef[Any]], streaming: int, backpressure: int) -> Any:
    """What a call with num_returns="streaming" or "dynamic" returns, of the refs to its end and its reader."""
    end, reader = refs
    if streaming == DYNAMIC:
        return end
    return ObjectRefGenerator(core, end, reader, 1 if backpressure else TAKEN_AT_ONCE)


def refuse_in_jobs(core: CoreWorker, name: str) -> None:
    if core.digester is not None:
        raise NotImplementedError(
            f"{name}() is a generator whose items would have refs of their own, and this is a durable job: it keeps "
            "the result of a task when it has ended, and cannot keep items yet. The task was not submitted. Return a "
            "list, say num_returns=n, or leave out init(job=...)."
        )


# ---------------------------------------------------------------- being one


class Producer:
    """Sends what a generator yields, in a worker.  `put` each value; `await_room` whenever `is_full`."""

    def __init__(self, worker: Worker, task_id: bytes, options: TaskOptions) -> None:
        self._worker = worker
        self.task_id = task_id
        self._options = options
        self._limit = options.backpressure
        self._taken = 0  # by the reader, as far as is known
        self.count = 0  # items sent

    def put(self, value: Any) -> None:
        """Make the next item of it.  Raises TypeError when it cannot be pickled, ObjectStoreFullError without room."""
        worker, item_id = self._worker, ids.item_id(self.task_id, self.count)
        serialized = serialize(value, f"item {self.count} of {self._options.name}()")
        try:
            stored = worker.store(item_id, serialized)
        except BaseException:
            worker.send(RoomAbandoned(worker.client, item_id))
            raise
        worker.send_item(self.task_id, self.count, stored, False)
        self.count += 1

    def put_error(self, error: bytes) -> None:
        """The last item: `get` will raise it."""
        self._worker.send_item(self.task_id, self.count, (error, len(error), ()), True)
        self.count += 1

    @property
    def is_full(self) -> bool:
        return 0 < self._limit <= self.count - self._taken

    def await_room(self) -> None:
        """Stand still until the reader has taken enough, or has gone."""
        worker, task_id = self._worker, self.task_id
        self._go_on(worker.stand_still(lambda rid, blocks: RoomAwaited(worker.client, rid, task_id, blocks)))

    def _go_on(self, taken: int | None) -> None:
        if taken is None:
            self._limit = 0
        else:
            self._taken = taken

    def run(self, generator: Any) -> Any:
        """Send all that it yields; return what it returns."""
        try:
            while True:
                try:
                    value = next(generator)
                except StopIteration as end:
                    return end.value
                self.put(value)
                del value
                if self.is_full:
                    self.await_room()
        finally:
            close = getattr(generator, "close", None)
            if close is not None:
                close()

    async def run_beside_others(self, generator: Any) -> Any:
        """The same on an event loop, which others have a turn of; also for an asynchronous generator."""
        import asyncio

        worker, task_id = self._worker, self.task_id
        is_async = hasattr(generator, "__anext__")
        try:
            while True:
                try:
                    value = await generator.__anext__() if is_async else next(generator)
                except StopIteration as end:
                    return end.value
                except StopAsyncIteration:
                    return None
                self.put(value)
                del value
                if self.is_full:
                    self._go_on(
                        await asyncio.wrap_future(
                            worker.answer_to(lambda rid: RoomAwaited(worker.client, rid, task_id, False))
                        )
                    )
                elif not is_async:
                    await asyncio.sleep(0)
        finally:
            if is_async:
                await generator.aclose()
            elif hasattr(generator, "close"):
                generator.close()

    def result(self) -> Any:
        """Of a "dynamic" one: the refs to all that was sent."""
        return _Yielded(self.task_id, self.count)


__all__ = ["DynamicObjectRefGenerator", "ObjectRefGenerator", "Producer"]
