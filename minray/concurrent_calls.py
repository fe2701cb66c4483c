"""An actor's calls beside each other: what threads and coroutines have in common, and the threads.

A call belongs to a concurrency group: one of those that the class was given by name, or the
default one, "".  Each group runs so many calls at the same time as it allows; the others wait in
the order in which they came.  Groups do not wait for each other.

However an actor ends by itself, what has begun may finish.  exit_actor() drops the calls that
have not begun; `__ray_terminate__` lets those run that came before it.  The last word, that the actor has
exited, is said when no other call runs, so the node may say of all that are left that they were not run.

A part of the worker, and as familiar with it as the worker's own methods.  Owns neither the queue in which
calls arrive (worker.py) nor an event loop (async_actor.py).  Left out: a pool of our own;
concurrent.futures starts threads only when they are needed, which is what matters here.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
from collections.abc import Coroutine
from time import monotonic
from typing import TYPE_CHECKING, Any

from minray import object_ref
from minray.core_worker import TaskContext
from minray.loop import HOLD_S
from minray.task_spec import TaskOptions

if TYPE_CHECKING:
    from minray.worker import Worker

Call = tuple[Any, ...]
"""A task as RunTasks brings it."""


class ConcurrentCalls(ABC):
    """Runs the calls of one actor once it has been constructed."""

    def take(self, call: Call) -> None:
        """The next that has arrived; where the main thread itself serves the queue nobody says so."""
        raise NotImplementedError

    @abstractmethod
    def drop(self, task_id: bytes) -> bool:
        """Whether it was taken, has not begun, and never will now.  In any thread."""

    @abstractmethod
    def interrupt(self, task_id: bytes) -> None:
        """It was cancelled and runs, or has just ended.  In any thread."""

    def complete(self, coroutine: Coroutine[Any, Any, Any]) -> None:
        """Run the actor's last word, where coroutines can be run."""
        coroutine.close()

    @abstractmethod
    def close(self) -> None:
        """The actor has ended."""


class ThreadedCalls(ConcurrentCalls):
    def __init__(self, worker: Worker, options: TaskOptions) -> None:
        # Not at the top: a driver that is started by a thread which outlives the main thread could not import it.
        from concurrent.futures import ThreadPoolExecutor

        self._worker = worker
        self._pools = {
            name: ThreadPoolExecutor(limit, thread_name_prefix=f"minray-actor-{name}" if name else "minray-actor")
            for name, limit in (("", options.max_concurrency), *options.concurrency_groups)
        }
        self._waiting: dict[bytes, Call] = {}  # Taken and not begun.  Who pops a call, a thread or drop(), has it.
        self._running = 0
        self._leaving = 0  # so many of the running only wait for the others
        self._changed = threading.Condition()  # with its lock both are changed
        self._closed = False  # Calls that arrive now were made after the one that ends the actor.

    def take(self, call: Call) -> None:
        if self._closed:
            return
        options = self._worker._templates_known[call[1]]
        self._closed = options.method == "__ray_terminate__"
        self._waiting[call[0]] = call
        self._pools[options.concurrency_group].submit(self._run, call[0])

    def _run(self, task_id: bytes) -> None:
        worker = self._worker
        with self._changed:
            call = self._waiting.pop(task_id, None)
            if call is None:
                return
            self._running += 1
        context = worker._contexts[threading.get_ident()] = TaskContext(task_id, None)
        worker._execute(call, context)
        if self._waiting and monotonic() - worker._sent_s < HOLD_S:
            object_ref.rouse()  # The main thread sends it with the next ones, in a moment.
        else:
            worker.flush()
        with self._changed:
            self._running -= 1
            if self._leaving:
                self._changed.notify_all()

    def drop(self, task_id: bytes) -> bool:
        dropped = self._waiting.pop(task_id, None) is not None
        if dropped and self._leaving:
            with self._changed:
                self._changed.notify_all()
        return dropped

    def interrupt(self, task_id: bytes) -> None:
        """A thread cannot be interrupted: its code may ask is_canceled()."""

    def leave(self, drop_waiting: bool) -> None:
        """A call ends the actor: return when no other one runs."""
        self._closed = True
        if drop_waiting:
            self._waiting.clear()
        with self._changed:
            self._leaving += 1
            self._changed.notify_all()
            self._changed.wait_for(lambda: self._running == self._leaving and not self._waiting)

    def close(self) -> None:
        self._closed = True
        self._waiting.clear()
        for pool in self._pools.values():
            pool.shutdown(wait=False, cancel_futures=True)
