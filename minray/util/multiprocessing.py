"""`multiprocessing.Pool` on processes of minray, and `JoinableQueue`.

A face of `Executor`: the pool is an executor, an `AsyncResult` is the futures of its
chunks.  What is here is the standard library's interface: chunks, callbacks that get a
value or an error, iterators that have a `next(timeout)`.

Functions may be lambdas and closures, arguments anything that tasks take, and no main
guard is needed.  What a call raises is raised as itself, with the remote traceback as its cause.
"""

from __future__ import annotations

import multiprocessing as standard
import threading
import warnings
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future
from itertools import islice
from time import monotonic
from typing import Any

import minray
from minray.util.executor import Executor
from minray.util.queue import Queue

TimeoutError = standard.TimeoutError
CHUNKS_PER_PROCESS = 4
"""So many chunks for each process make up for calls that do not take equally long."""


def cpu_count() -> int:
    """The session's CPUs."""
    return int(minray.cluster_resources().get("CPU", 0))


class AsyncResult:
    """What the `_async` methods of a `Pool` return."""

    def __init__(
        self,
        futures: list[Future[Any]],
        combine: Callable[[list[Any]], Any],
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> None:
        self._futures = futures
        self._combine = combine
        self._callbacks = callback, error_callback
        self._value: Any = None
        self._error: BaseException | None = None  # the first that came
        self._is_ready = threading.Event()
        self._unfinished = len(futures)
        self._lock = threading.Lock()
        if not futures:
            self._end()
        for future in list(futures):
            future.add_done_callback(self._one_more)

    def _one_more(self, future: Future[Any]) -> None:
        with self._lock:
            if self._error is None:
                self._error = future.exception()
            self._unfinished -= 1
            last = self._unfinished == 0
        if last:
            self._end()

    def _end(self) -> None:
        if self._error is None:
            self._value = self._combine([future.result() for future in self._futures])
        self._futures = []
        callback, error_callback = self._callbacks
        try:
            if self._error is None and callback is not None:
                callback(self._value)
            elif self._error is not None and error_callback is not None:
                error_callback(self._error)
        finally:
            self._is_ready.set()

    def get(self, timeout: float | None = None) -> Any:
        """The result; waits for it.  Raises TimeoutError (multiprocessing's), or what the call raised."""
        self.wait(timeout)
        if not self.ready():
            raise TimeoutError(f"the result was not there within {timeout:g} s. The call goes on.")
        if self._error is not None:
            raise self._error
        return self._value

    def wait(self, timeout: float | None = None) -> None:
        """Wait until the call has ended, or `timeout` seconds are over."""
        self._is_ready.wait(timeout)

    def ready(self) -> bool:
        """Whether the call has ended."""
        return self._is_ready.is_set()

    def successful(self) -> bool:
        """Whether it ended without an exception.  Raises ValueError if it has not ended."""
        if not self.ready():
            raise ValueError(f"{self!r} is not ready")
        return self._error is None


class IMapIterator:
    """What `Pool.imap` and `Pool.imap_unordered` return.

    A thread reads the iterable and submits, as far ahead as `ahead` chunks: it may be long, or wait for something."""

    def __init__(self, submit: Callable[[Any], Future[list[Any]]], chunks: Iterator[Any], ahead: int, ordered: bool):
        self._ordered = ordered
        self._changed = threading.Condition()
        self._ready: deque[Future[list[Any]]] = deque()  # to be handed out, in order
        self._late: dict[int, Future[list[Any]]] = {}  # ordered: ended, and an earlier one has not
        self._next_chunk = 0  # ordered: the next to become ready
        self._unfinished = 0  # read, and not ready
        self._all_read = False
        self._failure: BaseException | None = None  # of the iterable; raised after all else
        self._values: deque[Any] = deque()  # of the chunk that is being handed out
        self._room = threading.Semaphore(ahead)
        self._thread = threading.Thread(target=self._feed, args=(submit, chunks), name="minray-imap", daemon=True)
        self._thread.start()

    def _feed(self, submit: Callable[[Any], Future[list[Any]]], chunks: Iterator[Any]) -> None:
        try:
            for number, chunk in enumerate(chunks):
                self._room.acquire()
                future = submit(chunk)
                with self._changed:
                    self._unfinished += 1
                future.add_done_callback(lambda ended, number=number: self._ended(number, ended))  # type: ignore[misc]
        except BaseException as error:  # Of the iterable, or the pool is broken.
            self._failure = error
        with self._changed:
            self._all_read = True
            self._changed.notify_all()

    def _ended(self, number: int, future: Future[list[Any]]) -> None:
        self._room.release()
        with self._changed:
            if self._ordered:
                self._late[number] = future
                while self._next_chunk in self._late:
                    self._ready.append(self._late.pop(self._next_chunk))
                    self._next_chunk += 1
                    self._unfinished -= 1
            else:
                self._ready.append(future)
                self._unfinished -= 1
            self._changed.notify_all()

    def wait_until_read(self) -> None:
        self._thread.join()

    def __iter__(self) -> IMapIterator:
        return self

    def next(self, timeout: float | None = None) -> Any:
        """The next result.  Raises StopIteration at the end, TimeoutError, or what the call raised."""
        if not self._values:
            deadline = None if timeout is None else monotonic() + timeout
            with self._changed:
                while not self._ready:
                    if self._all_read and not self._unfinished:
                        failure, self._failure = self._failure, None
                        raise failure or StopIteration
                    left = None if deadline is None else deadline - monotonic()
                    if left is not None and left <= 0:
                        raise TimeoutError(f"no result within {timeout:g} s. The calls go on.")
                    self._changed.wait(left)
                future = self._ready.popleft()
            self._values.extend(future.result())
        return self._values.popleft()

    __next__ = next


class Pool:
    """A pool of processes with the interface of `multiprocessing.Pool`.

    Args:
        processes: how many; default: the session's CPUs.
        initializer, initargs: called in each process before its first call.
        maxtasksperchild: a process is replaced after so many calls (chunks, with `map`).
        context: has no effect, and a warning says so: processes are forked by minray.
        ray_address: of the session, if there is none yet; None or "local" starts one.
        ray_remote_args: options of the processes, which are actors: ``{"num_cpus": 1, "resources": {"disk": 1}}``.

    A call whose process dies is run again, three times (``ray_remote_args={"max_task_retries": 0}``: never).

    >>> from minray.util.multiprocessing import Pool
    >>> with Pool(2) as pool:
    ...     pool.map(lambda x: x * x, range(5))
    [0, 1, 4, 9, 16]
    """

    def __init__(
        self,
        processes: int | None = None,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        maxtasksperchild: int | None = None,
        context: Any = None,
        ray_address: str | None = None,
        ray_remote_args: Mapping[str, Any] | None = None,
    ) -> None:
        if context is not None:
            warnings.warn("Pool(context=...) has no effect: its processes are forked by minray.", stacklevel=2)
        if ray_address == "auto" and minray.is_initialized():
            ray_address = None
        minray.init(ray_address, ignore_reinit_error=True)
        if processes is not None and processes < 1:
            raise ValueError("Number of processes must be at least 1")
        self._executor = Executor(
            processes,
            initializer=initializer,
            initargs=initargs,
            max_tasks_per_child=maxtasksperchild,
            actor_options=ray_remote_args,
        )
        self._processes = processes or self._executor._max_workers
        self._is_closed = False
        self._iterators: list[IMapIterator] = []  # that may still submit

    # ------------------------------------------------------------ one call

    def apply(self, func: Callable[..., Any], args: Iterable[Any] = (), kwds: Mapping[str, Any] | None = None) -> Any:
        """``func(*args, **kwds)`` in one of the processes; waits for the result."""
        return self.apply_async(func, args, kwds).get()

    def apply_async(
        self,
        func: Callable[..., Any],
        args: Iterable[Any] = (),
        kwds: Mapping[str, Any] | None = None,
        callback: Callable[[Any], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `apply`, without waiting; `callback` gets the result, `error_callback` what the call raised."""
        self._check_open()
        future = self._executor.submit(func, *args, **(kwds or {}))
        return AsyncResult([future], lambda values: values[0], callback, error_callback)

    # ------------------------------------------------------------ many calls

    def map(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int | None = None) -> list[Any]:
        """The list of ``func(x)`` for each x of the iterable; `chunksize` calls travel together."""
        result: list[Any] = self.map_async(func, iterable, chunksize).get()
        return result

    def map_async(
        self,
        func: Callable[[Any], Any],
        iterable: Iterable[Any],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `map`, without waiting."""
        return self._map([(x,) for x in iterable], func, chunksize, callback, error_callback)

    def starmap(
        self, func: Callable[..., Any], iterable: Iterable[Iterable[Any]], chunksize: int | None = None
    ) -> list[Any]:
        """As `map`, with several arguments a call: ``func(*its)``."""
        result: list[Any] = self.starmap_async(func, iterable, chunksize).get()
        return result

    def starmap_async(
        self,
        func: Callable[..., Any],
        iterable: Iterable[Iterable[Any]],
        chunksize: int | None = None,
        callback: Callable[[list[Any]], Any] | None = None,
        error_callback: Callable[[BaseException], Any] | None = None,
    ) -> AsyncResult:
        """As `starmap`, without waiting."""
        return self._map([tuple(its) for its in iterable], func, chunksize, callback, error_callback)

    def _map(self, calls: list[tuple[Any, ...]], func: Any, chunksize: int | None, *callbacks: Any) -> AsyncResult:
        self._check_open()
        if chunksize is None:
            chunksize = max(1, -(-len(calls) // (self._processes * CHUNKS_PER_PROCESS)))
        futures = [self._executor.submit_chunk(func, chunk) for chunk in _chunks(calls, chunksize)]
        return AsyncResult(futures, lambda chunks: [value for chunk in chunks for value in chunk], *callbacks)

    def imap(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """As `map`, for long iterables: an iterator over the results, each as soon as it is its turn."""
        return self._imap(func, iterable, chunksize, ordered=True)

    def imap_unordered(self, func: Callable[[Any], Any], iterable: Iterable[Any], chunksize: int = 1) -> IMapIterator:
        """As `imap`, with the results in the order in which they are ready."""
        return self._imap(func, iterable, chunksize, ordered=False)

    def _imap(self, func: Any, iterable: Iterable[Any], chunksize: int, ordered: bool) -> IMapIterator:
        self._check_open()
        calls = ((x,) for x in iterable)
        executor = self._executor
        iterator = IMapIterator(
            lambda chunk: executor.submit_chunk(func, chunk),
            _chunks(calls, chunksize),
            self._processes * CHUNKS_PER_PROCESS,
            ordered,
        )
        self._iterators = [other for other in self._iterators if other._thread.is_alive()] + [iterator]
        return iterator

    # ------------------------------------------------------------ the end

    def close(self) -> None:
        """Take no more calls; the processes end when those that were taken are done."""
        self._is_closed = True

    def terminate(self) -> None:
        """End the processes at once.  What has not finished fails with BrokenExecutor."""
        self.close()
        self._executor.kill_workers()

    def join(self) -> None:
        """Wait until the processes have nothing more to do.  Raises ValueError before `close` or `terminate`."""
        if not self._is_closed:
            raise ValueError("Pool is still running")
        for iterator in self._iterators:
            iterator.wait_until_read()
        self._executor.shutdown()

    def __enter__(self) -> Pool:
        self._check_open()
        return self

    def __exit__(self, *exc: Any) -> None:
        self.terminate()

    def __reduce__(self) -> Any:
        raise NotImplementedError("pool objects cannot be passed between processes or pickled")

    def _check_open(self) -> None:
        if self._is_closed:
            raise ValueError("Pool not running")


def _chunks(calls: Iterable[tuple[Any, ...]], size: int) -> Iterator[tuple[tuple[Any, ...], ...]]:
    if size < 1:
        raise ValueError(f"Chunksize must be 1+, not {size}")
    source = iter(calls)
    return iter(lambda: tuple(islice(source, size)), ())


class JoinableQueue(Queue):
    """A `minray.util.queue.Queue` that counts what was taken and not reported as done.

    >>> from minray.util.multiprocessing import JoinableQueue
    >>> queue = JoinableQueue()
    >>> queue.put("work")
    >>> queue.get()
    'work'
    >>> queue.task_done()
    >>> queue.join()
    """

    def task_done(self) -> None:
        """What one `get` has taken is done.  Raises ValueError if it is said more often than items were put."""
        minray.get(self.actor.task_done.remote())

    def join(self) -> None:
        """Wait until everything that was put has been taken, and reported as done."""
        self._ask(self.actor.wait_until_done, None, None)

    def close(self) -> None:
        """End the queue."""
        self.shutdown()


__all__ = ["AsyncResult", "IMapIterator", "JoinableQueue", "Pool", "TimeoutError", "cpu_count"]
