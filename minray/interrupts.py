"""Ctrl-C and cancellation must not tear the node's tables.

A signal handler runs between any two bytecodes of the main thread, which may be in the
middle of changing shared state.  The handlers here look at the stack they interrupt: if
one of the functions marked `@uninterruptible` is on it, the exception is raised when that
function has returned (whoever calls such functions ends with `raise_deferred`).  So the
hot path pays nothing.

Such a function may wait for something in a function of its own that is marked
`@interruptible`: an exception may be raised there, and has to be, for a system call that is
interrupted by a handler that returns goes on waiting.  It starts with `raise_deferred`, so
that it does not wait for ever after an exception that was put off a moment before.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable
from types import CodeType, FrameType
from typing import Any, TypeVar

F = TypeVar("F", bound=Callable[..., Any])

_codes: set[CodeType] = set()
_waits: set[CodeType] = set()
_deferred: list[Callable[[], None]] = []


def uninterruptible(function: F) -> F:
    _codes.add(function.__code__)
    return function


uninterruptible(weakref.finalize.__call__)  # What a finalizer raises is lost, and it is not called again.


def interruptible(function: F) -> F:
    _waits.add(function.__code__)
    return function


def interrupt(frame: FrameType | None, act: Callable[[], None]) -> None:
    """Call `act` (which raises) now, or as soon as the interrupted code is out of harm's way."""
    while frame is not None and frame.f_code not in _waits:
        if frame.f_code in _codes:
            _deferred.append(act)
            return
        frame = frame.f_back
    act()


def raise_deferred() -> None:
    """In the main thread: only there are signals handled, and only there are their exceptions expected."""
    while _deferred and threading.current_thread() is threading.main_thread():
        _deferred.pop(0)()
