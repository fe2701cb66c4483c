"""``ray._private.test_utils``: two things that tests of libraries borrow from Ray's own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import minray


def wait_for_condition(
    condition_predictor: Callable[..., bool], timeout: float = 10, retry_interval_ms: float = 100, **kwargs: Any
) -> None:
    """Ask again and again until the answer is true; a RuntimeError if it is not within `timeout` seconds."""
    deadline = time.monotonic() + timeout
    while not condition_predictor(**kwargs):
        if time.monotonic() > deadline:
            raise RuntimeError(f"the condition was not met within {timeout:g} s.")
        time.sleep(retry_interval_ms / 1000)


class _Signal:
    """An event that tasks wait for: ``signal.wait.remote()`` is ready once ``signal.send.remote()`` was called."""

    def __init__(self) -> None:
        self._event = threading.Event()
        self._waiting = 0

    def send(self, clear: bool = False) -> None:
        self._event.set()
        if clear:
            self._event.clear()

    def wait(self, should_wait: bool = True) -> None:
        if should_wait:
            self._waiting += 1
            self._event.wait()
            self._waiting -= 1

    def cur_num_waiters(self) -> int:
        return self._waiting


SignalActor = minray.remote(num_cpus=0, max_concurrency=1000)(_Signal)

__all__ = ["SignalActor", "wait_for_condition"]
