"""Submitting in nobody's name: `Apart`.

In a worker, what a thread submits or puts is numbered as a child of the task that runs
there, in program order; should the task run again, its children get the same numbers, and
that is how those are found that need not run again.  What helpers do in the background
(hand out the next job, send sums) has no such order: it must not count.  Nor must it be
cancelled with a task that happens to run.

So it is done under an ID of its own.  In the tables it appears as submitted by the driver.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from minray import api, ids
from minray.core_worker import TaskContext


class Apart:
    """For one session; may be used by many threads at once."""

    def __init__(self) -> None:
        # Of a worker: which task a thread works for, if not for that of the main thread.  The driver has one task.
        self._contexts: dict[int, Any] | None = getattr(api.core(), "_contexts", None)
        self._context = TaskContext(ids.root_task_id(os.urandom(16)), None)

    @contextmanager
    def __call__(self) -> Iterator[None]:
        contexts, thread = self._contexts, threading.get_ident()
        if contexts is None:
            yield
            return
        before = contexts.get(thread)
        contexts[thread] = self._context
        try:
            yield
        finally:
            if before is None:
                del contexts[thread]
            else:
                contexts[thread] = before
