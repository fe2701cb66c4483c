"""`Executor`: the interface of `concurrent.futures`, on processes of minray.

    executor (the face) -> pool: a queue of jobs, and processes -> actors, each with one job at a time

Each process is an actor of its own.  A job is handed to a process that has nothing to do,
so a future that waits can be cancelled, one that runs is really running, and a long job
keeps no other waiting behind it.  The price is one round trip a job.

The end of a job is an event of minray's loop: there the future gets its result and the
process its next job, and no thread has to wake up for that.  Callbacks of futures may do
what the loop must not (wait, compute), so they are called in a thread, which is there only
while there are callbacks (`_Callbacks`).

The pool does not know its executor, nor do futures know the pool: an executor that is
dropped without a word ends when its jobs are done, since the processes, which are actors,
end with their last handle.

A job's arguments are put into the object store when it is submitted: they are as they were
then, and may be spilled if many wait.  A function is put once, and known to a process
from its first call on.

When a process dies the job is run again, `max_retries` times, in its successor.  After that
the executor is broken, as CPython's is after the first death: jobs fail, new ones are refused.

Left out: tasks instead of actors (there would be no initializer, no limit to the number of
processes but the CPUs, and no way to tell a task that runs from one that was handed out).
"""

from __future__ import annotations

import atexit
import concurrent.futures
import logging
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, Future, InvalidStateError
from contextlib import suppress
from functools import partial
from itertools import islice
from queue import Empty, SimpleQueue
from time import monotonic
from types import FunctionType
from typing import Any, NamedTuple

import minray
from minray import ObjectRef, api
from minray.core_worker import name_of
from minray.exceptions import (
    LocalRayletDiedError, NodeDiedError, RayActorError, RayTaskError, UnserializableException, WorkerCrashedError,
)  # fmt: skip
from minray.interrupts import raise_deferred, uninterruptible
from minray.util.apart import Apart

KEPT_FUNCTIONS = 128
"""So many functions are kept in the object store, and known to each process, before all are forgotten."""

LINGER_S = 0.2
"""A thread that calls callbacks waits so long for more."""


class RemoteTraceback(Exception):
    """The traceback of a job in its process: what the exception of a future is raised from."""


class InitializerError(Exception):
    """The initializer of a process raised."""


class Process:
    """An actor that runs jobs.

    The initializer is run by its first job, not by its constructor: should it kill the process, that is one of the
    job's attempts, and there is an end to them."""

    def __init__(self, initializer: Callable[..., Any] | None = None, initargs: tuple[Any, ...] = ()) -> None:
        self._functions: dict[bytes, Callable[..., Any]] = {}
        self._initialize = partial(initializer, *initargs) if initializer is not None else None

    def run(self, job: tuple[Any, Any, dict[str, Any], bool]) -> Any:
        if self._initialize is not None:
            try:
                self._initialize()
            except BaseException as error:
                raise InitializerError(f"the initializer of a process raised {error!r}") from error
            self._initialize = None
        function, args, kwargs, each = job
        if type(function) is ObjectRef:
            function = self._function(function)
        if each:
            return [function(*its) for its in args]
        return function(*args, **kwargs)

    def _function(self, ref: ObjectRef[Any]) -> Callable[..., Any]:
        key = bytes(ref)
        known = self._functions.get(key)
        if known is None:
            if len(self._functions) >= KEPT_FUNCTIONS:
                self._functions.clear()
            known = self._functions[key] = minray.get(ref)
        return known


class _Callbacks:
    """Calls what was added to futures, in the order in which they ended, in a thread that comes and goes."""

    def __init__(self) -> None:
        self._ended: SimpleQueue[tuple[Callable[[Any], Any], Future[Any]] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def put(self, callback: Callable[[Any], Any], future: Future[Any]) -> None:
        with self._lock:
            self._ended.put((callback, future))
            if self._thread is None:
                self._thread = threading.Thread(target=self._call, name="minray-callbacks", daemon=True)
                self._thread.start()

    def _call(self) -> None:
        while True:
            try:
                ended = self._ended.get(timeout=LINGER_S)
            except Empty:
                ended = None
            if ended is None:
                with self._lock:
                    if self._ended.empty():
                        self._thread = None
                        return
                continue
            callback, future = ended
            try:
                callback(future)
            except Exception:
                logging.getLogger("concurrent.futures").exception("exception calling callback for %r", future)
            del ended, callback, future  # Nobody shall keep a result while nothing happens.

    def join(self) -> None:
        """Wait until all that were put have been called, unless this is one of them."""
        with self._lock:
            thread = self._thread
            self._ended.put(None)
        if thread is not None and thread is not threading.current_thread():
            thread.join()


class _Future(Future[Any]):
    """A future whose callbacks may do what minray's loop must not."""

    def __init__(self, callbacks: _Callbacks) -> None:
        super().__init__()
        self._callbacks = callbacks

    def add_done_callback(self, fn: Callable[[Future[Any]], Any]) -> None:
        if self.done():
            super().add_done_callback(fn)  # Here and now, says the standard library.
        else:
            callbacks = self._callbacks
            super().add_done_callback(lambda future: callbacks.put(fn, future))


class _Job(NamedTuple):
    future: _Future
    payload: ObjectRef[Any]
    name: str  # under which it appears in the tables


class _Worker:
    """A process, as the pool knows it."""

    def __init__(self, handle: Any, jobs_left: int | None) -> None:
        self.handle = handle
        self.jobs_left = jobs_left  # until it is replaced; None: it never is
        self._named: dict[str, Any] = {}

    def run(self, job: _Job) -> Future[Any]:
        method = self._named.get(job.name)
        if method is None:
            method = self._named[job.name] = self.handle.run.options(name=job.name)
        future: Future[Any] = method.remote(job.payload).future()
        return future


class _Pool:
    """What an executor is made of.

    What stands below `lock` is read and changed under it.  Minray's loop takes it, too: who holds it must not wait."""

    def __init__(
        self, size: int, max_tasks: int | None, options: Mapping[str, Any], make: tuple[ObjectRef[Any], ...]
    ) -> None:
        self.size = size
        self.max_tasks = max_tasks
        self.make = make  # arguments of the processes' constructor
        self.process_class = minray.remote(Process).options(**options)
        self.session = api.core().token  # Without it a late job would start a session of its own.
        self.apart = Apart()
        self.callbacks = _Callbacks()
        self.functions: dict[Any, ObjectRef[Any]] = {}
        self.lock = threading.RLock()  # The end of a job may come while it is handed out.
        self.over = threading.Condition(self.lock)  # nothing runs or waits
        self.queue: deque[_Job] = deque()
        self.running: dict[Future[Any], _Worker] = {}
        self.idle: list[_Worker] = []
        self.workers: set[_Worker] = set()
        self.closed = False  # no more jobs
        self.broken = ""  # why

    # ------------------------------------------------------------ jobs come

    def check(self) -> None:
        if self.broken:
            raise BrokenExecutor(f"{self.broken}\nThe executor takes no more jobs; make a new one.")
        if self.closed:
            raise RuntimeError("cannot schedule new futures after shutdown")
        if self._is_orphan():
            raise BrokenExecutor("the session in which this executor was made has ended. Make a new one.")

    def _is_orphan(self) -> bool:
        return api._core is None or api._core.token is not self.session

    def submit(self, function: Any, args: Any, kwargs: dict[str, Any], each: bool) -> Future[Any]:
        self.check()
        future = _Future(self.callbacks)
        try:
            with self.apart():
                payload = self._pack(function, args, kwargs, each)
        except TypeError as error:  # It cannot be pickled.  As with all that goes wrong, the future says so.
            future.set_exception(error)
            return future
        with self.lock:
            self.check()
            self.queue.append(_Job(future, payload, name_of(function).rpartition("<locals>.")[2]))
            self._hand_out()
        raise_deferred()
        return future

    def _pack(self, function: Any, args: Any, kwargs: dict[str, Any], each: bool) -> ObjectRef[Any]:
        if type(function) is FunctionType:  # Others have a state, which may change between two calls.
            ref = self.functions.get(function)
            if ref is None:
                if len(self.functions) >= KEPT_FUNCTIONS:
                    self.functions.clear()
                ref = self.functions[function] = minray.put(function)
            function = ref
        return minray.put((function, args, kwargs, each))

    @uninterruptible  # A job must not be in neither place.
    def _hand_out(self) -> None:
        while self.queue and (self.idle or len(self.workers) < self.size):
            job = self.queue.popleft()
            if job.future.set_running_or_notify_cancel():
                try:
                    with self.apart():
                        worker = self.idle.pop() if self.idle else self._start()
                        self.running[job.future] = worker
                        worker.run(job).add_done_callback(partial(self._ended, job.future))
                except Exception as error:  # The session ends in this moment.
                    self._give_up(f"a job could not be handed out: {error}", error, job.future)
        if self.queue or self.running:
            _unfinished.add(self)
            return
        _unfinished.discard(self)
        self.over.notify_all()
        if self.closed:
            self.idle.clear()
            self.workers.clear()  # With their last handles the processes end.
            self.functions.clear()

    def _start(self) -> _Worker:
        worker = _Worker(self.process_class.remote(*self.make), self.max_tasks)
        self.workers.add(worker)
        return worker

    # ------------------------------------------------------------ results go

    @uninterruptible
    def _ended(self, future: Future[Any], end: Future[Any]) -> None:
        """In minray's loop."""
        error = end.exception()
        with self.lock:
            worker = self.running.pop(future, None)
            if worker is None:
                return  # It was given up meanwhile.
            if self._is_orphan():
                self._give_up("the session has ended.", error, future)
            elif _is_fatal(error):
                self._give_up(str(error), error, future)
            else:
                if error is None:
                    future.set_result(end.result())
                else:
                    future.set_exception(_original(error))
                self._release(worker)
            self._hand_out()

    def _release(self, worker: _Worker) -> None:
        if worker.jobs_left is not None:
            worker.jobs_left -= 1
        if worker.jobs_left == 0:
            self.workers.discard(worker)  # Its last handle goes, and with it the process.
        else:
            self.idle.append(worker)

    # ------------------------------------------------------------ the end

    def shutdown(self, cancel: bool) -> None:
        with self.lock:
            self.closed = True
            for job in self.queue if cancel else ():
                if job.future.cancel():
                    job.future.set_running_or_notify_cancel()  # Now concurrent.futures.wait() knows it, too.
            if cancel:
                self.queue.clear()
            self._hand_out()

    @uninterruptible
    def kill(self, why: str) -> None:
        with self.lock:
            self._give_up(why, None)
            self._hand_out()

    def _give_up(self, why: str, cause: BaseException | None, *more: Future[Any]) -> None:
        """Break: end the processes, and fail what is in their hands or waits for them."""
        self.broken = why
        futures, workers = [*more, *self.running, *(job.future for job in self.queue)], list(self.workers)
        self.queue.clear()
        self.running.clear()
        self.idle.clear()
        self.workers.clear()
        if not self._is_orphan():
            for worker in workers:
                minray.kill(worker.handle)
        for future in futures:
            error = BrokenExecutor(why)
            error.__cause__ = cause
            with suppress(InvalidStateError):  # It was cancelled.
                future.set_exception(error)

    def join(self) -> None:
        """Wait until all jobs are done and their callbacks called."""
        with self.lock:
            while self.queue or self.running:
                self.over.wait()
        self.callbacks.join()


_DEATHS = (RayActorError, WorkerCrashedError, LocalRayletDiedError, NodeDiedError)


def _is_fatal(error: BaseException | None) -> bool:
    """Whether it is the executor's end, and not only the job's."""
    if isinstance(error, RayTaskError):
        return isinstance(vars(error)["cause"], InitializerError)
    return isinstance(error, _DEATHS)


def _original(error: BaseException) -> BaseException:
    """What the job raised, as it raised it; its traceback goes along as its cause."""
    if not isinstance(error, RayTaskError):
        return error
    cause: BaseException = vars(error)["cause"]
    if isinstance(cause, UnserializableException):
        return error
    cause.__cause__ = RemoteTraceback(f"\n{error}")
    return cause


class Executor(concurrent.futures.Executor):
    """An executor whose jobs run in processes of minray, with any function and any arguments that tasks may have.

    Args:
        max_workers: processes at most; they are started when they are needed.  Default: the session's CPUs.
        initializer, initargs: called in each process before its first job.  If it raises, the executor is broken.
        max_tasks_per_child: a process is replaced after so many jobs; None: never.
        max_retries: how often a job is run again whose process died; 0 as in CPython; -1: without end.
        actor_options: of the processes, which are actors: ``{"num_cpus": 1}``, …  They hold no CPU by default.

    Raises:
        ValueError: options that make no sense, or more processes than their resources allow at a time.

    >>> with minray.util.Executor(max_workers=2) as executor:
    ...     list(executor.map(pow, [2, 3, 4], [10, 10, 10]))
    [1024, 59049, 1048576]
    """

    def __init__(
        self,
        max_workers: int | None = None,
        *,
        initializer: Callable[..., Any] | None = None,
        initargs: Iterable[Any] = (),
        max_tasks_per_child: int | None = None,
        max_retries: int = 3,
        actor_options: Mapping[str, Any] | None = None,
    ) -> None:
        if max_workers is None:
            max_workers = max(1, int(minray.cluster_resources().get("CPU", 0)))
        if max_workers <= 0:
            raise ValueError("max_workers must be greater than 0")
        if initializer is not None and not callable(initializer):
            raise TypeError("initializer must be a callable")
        if max_tasks_per_child is not None and (type(max_tasks_per_child) is not int or max_tasks_per_child < 1):
            raise ValueError(f"max_tasks_per_child must be an integer, 1 or more, or None, got {max_tasks_per_child!r}")
        options = {"max_restarts": -1, "max_task_retries": max_retries, **(actor_options or {})}
        _check_room(max_workers, options)
        make = () if initializer is None else (minray.put(initializer), minray.put(tuple(initargs)))
        self._max_workers = max_workers  # CPython's name for it, which programs look at.
        self._pool = _Pool(max_workers, max_tasks_per_child, options, make)

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future[Any]:
        """Run ``fn(*args, **kwargs)`` in a process; a future of its result.

        Raises RuntimeError after `shutdown`, BrokenExecutor when processes have died too often."""
        return self._pool.submit(fn, args, kwargs, False)

    def map(
        self, fn: Callable[..., Any], *iterables: Iterable[Any], timeout: float | None = None, chunksize: int = 1
    ) -> Iterator[Any]:
        """Like the builtin `map`, but the calls run at the same time; results come in order.

        Args:
            timeout: seconds from now after which a result that is not there is a TimeoutError.
            chunksize: so many calls are one job.

        The iterables are read to their end at once."""
        if chunksize < 1:
            raise ValueError("chunksize must be >= 1.")
        deadline = None if timeout is None else monotonic() + timeout
        calls = zip(*iterables)
        chunks = iter(lambda: tuple(islice(calls, chunksize)), ())
        futures = deque(self.submit_chunk(fn, chunk) for chunk in chunks)
        return _results(futures, deadline)

    def submit_chunk(self, fn: Callable[..., Any], chunk: Iterable[Iterable[Any]]) -> Future[list[Any]]:
        """One job that calls `fn` for each tuple of arguments in `chunk`; a future of the list of results."""
        return self._pool.submit(fn, chunk, {}, True)

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        """Take no more jobs, and end the processes when those that were taken are done.

        Args:
            wait: return only then.
            cancel_futures: cancel what has not begun.
        """
        self._pool.shutdown(cancel_futures)
        if wait:
            self._pool.join()

    def is_usable(self) -> bool:
        """Whether `submit` would take a job."""
        try:
            self._pool.check()
        except RuntimeError:  # BrokenExecutor is one.
            return False
        return True

    def kill_workers(self) -> None:
        """End the processes at once: what has not finished fails with BrokenExecutor, and no more jobs are taken."""
        self._pool.kill("kill_workers() was called.")


def _results(futures: deque[Future[list[Any]]], deadline: float | None) -> Iterator[Any]:
    try:
        while futures:
            left = None if deadline is None else deadline - monotonic()
            # Popped before it is yielded: nothing shall keep a result that the caller has let go.
            values = futures[0].result(left)
            futures.popleft()
            values.reverse()
            while values:
                yield values.pop()
    finally:
        for future in futures:
            future.cancel()


def _check_room(count: int, options: Mapping[str, Any]) -> None:
    """Processes that cannot all live at the same time would wait for each other for ever."""
    asked = {"CPU": options.get("num_cpus"), "GPU": options.get("num_gpus"), "memory": options.get("memory")}
    asked.update(options.get("resources") or {})
    there = minray.cluster_resources() if any(asked.values()) else {}
    for name, amount in asked.items():
        if amount and amount * count > there.get(name, 0):
            raise ValueError(
                f"{count} processes with {amount:g} {name} each need {amount * count:g} at a time, and the session has "
                f"{there.get(name, 0):g}. Ask for fewer processes, or for less in actor_options."
            )


_unfinished: weakref.WeakSet[_Pool] = weakref.WeakSet()


@atexit.register
def _finish_all() -> None:
    """What was submitted is done before the interpreter exits, as with CPython's executors.

    Runs before minray ends the session, whose own exit function was registered earlier."""
    for pool in list(_unfinished):
        pool.shutdown(cancel=False)
        pool.join()
