"""Ctrl-C, cancellation and the program's own signal handlers must not tear the node's tables.

A signal handler runs between any two bytecodes of the main thread, which may be in the
middle of changing shared state, and it may raise, or call minray.  The handlers here look at
the stack they interrupt: if one of the functions marked `@uninterruptible` is on it, they act
when that function has returned (whoever calls such functions ends with `raise_deferred`).
So the hot path pays nothing.

Such a function may wait for something in a function of its own that is marked
`@interruptible`: an exception may be raised there, and has to be, for a system call that is
interrupted by a handler that returns goes on waiting.  It starts with `raise_deferred`, so
that it does not wait for ever after an exception that was put off a moment before.
"""

from __future__ import annotations

import signal
import threading
import weakref
from _signal import getsignal  # type: ignore[import-not-found]  # signal's own makes an enum of it: 10 times slower
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
    """Call `act` (which may raise) now, or as soon as the interrupted code is out of harm's way."""
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


GUARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGALRM, signal.SIGUSR1, signal.SIGUSR2)
"""Signals for which programs have handlers: to stop, to end in good order, to give up after a time."""


class _Guard:
    """A signal handler around the program's own."""

    __slots__ = ("handler",)

    def __init__(self, handler: Callable[[int, FrameType | None], Any]) -> None:
        self.handler = handler

    def __call__(self, number: int, at: FrameType | None) -> None:
        interrupt(at, lambda: self.handler(number, at))


def guard_handlers() -> None:
    """Put a guard around each handler that has none.  In the main thread.

    Called again before each wait of the driver: programs set handlers when they like, a notebook for each cell.
    """
    for number in GUARDED:
        handler = getsignal(number)
        if callable(handler) and type(handler) is not _Guard:
            signal.signal(number, _Guard(handler))


def unguard_handlers() -> None:
    """Leave the program its handlers as they were.  One that it puts back later still has its guard, and works."""
    if threading.current_thread() is threading.main_thread():
        for number in GUARDED:
            handler = getsignal(number)
            if type(handler) is _Guard:
                signal.signal(number, handler.handler)
