"""Leader and followers: who runs a process's IO loop.

A thread that waits for something runs the loop itself (it *leads*): a synchronous call
then costs no hand-over between threads.  Threads that come while another leads sleep
until they are told that their answer is there, or that it is their turn to lead.  When
nobody has led for some milliseconds a background thread, the *caretaker*, takes over and
blocks in the poll, so that the world is served while the program computes; it steps
back as soon as somebody wants to lead.  When nothing happens nobody wakes up.

Used by the driver (the poll is an epoll over all its children) and by every worker (the
poll is its one socket; there the caretaker is what takes prefetched tasks back, cancels
and flushes while a task computes).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from time import monotonic
from typing import Any

from minray.interrupts import interruptible, raise_deferred, uninterruptible

CARETAKER_AFTER_S = 0.005
"""How long nobody must have led before the caretaker takes over: the price of a busy program is at most that."""
SPIN_S = 0.0001
"""Before it blocks, a reader looks again and again for so long, if the last wait was short: waking a process that
sleeps costs both sides more than the answer takes (sync calls 5,000/s without, 13,000/s with; measured).  An idle
process never spins: its last wait was long."""
WORTH_SPINNING_S = 0.00025
"""A wait that ended by then, waking included, would have been met by spinning."""
HOLD_S = 0.001
"""In a worker a result waits at most this long for company."""
HAND_OVER_S = 0.02
"""How long a thread waits for the caretaker to step back before it lets the caretaker serve it."""
CLOSE_S = 5.0
"""How long `close` waits for the thread that polls: it handles what it has in hand, and sees the end."""
RECHECK_S = 1.0
"""The longest that a thread sleeps without looking again: a bound, not a pace."""


class Waiter:
    """What a thread waits for.  `set` is called by whoever runs the loop."""

    __slots__ = ("done", "answer", "_bell")

    def __init__(self) -> None:
        self.done = False
        self.answer: Any = None
        self._bell: threading.Lock | None = None

    def set(self, answer: Any = None) -> None:
        self.answer = answer
        self.done = True
        self.ring()

    def ring(self) -> None:
        bell = self._bell
        if bell is not None and bell.locked():
            with suppress(RuntimeError):  # Rung twice at once: once is enough.
                bell.release()

    def hang_bell(self) -> None:
        """Before others may ring: the bell is locked unless it was rung, so no ring is lost."""
        if self._bell is None:
            bell = threading.Lock()
            bell.acquire()
            self._bell = bell

    @interruptible
    def sleep(self, timeout_s: float) -> None:
        raise_deferred()
        if not self.done and self._bell is not None:
            self._bell.acquire(timeout=timeout_s)


class Loop:
    def __init__(self, poll: Callable[[float | None, bool], None], wake: Callable[[], None], name: str) -> None:
        self._poll = poll  # (timeout in s or None, is it the caretaker): waits for news and handles it
        self._wake = wake  # makes a poll of the caretaker return
        self._lead = threading.Lock()  # held by the thread that leads
        self._leader = 0  # that thread
        self._followers: deque[Waiter] = deque()
        self._caretaking = False
        self._wanted = 0  # threads that want to lead in the caretaker's place
        self._nudge = threading.Lock()  # the caretaker sleeps on it while others lead
        self._nudge.acquire()
        self._closed = False
        self.glance: Callable[[], object] = lambda: None  # now and then, while others lead
        self._thread = threading.Thread(target=self._take_care, name=name, daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        """No more polling; returns when nobody does any more.  Threads that wait get a RuntimeError."""
        self._closed = True
        self._wake()
        self._nudge_caretaker()
        for follower in list(self._followers):
            follower.ring()
        if self._leader != threading.get_ident():  # Else a signal handler of the program ends the session, in a wait.
            self._lead.acquire(timeout=CLOSE_S)  # For good.
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join(timeout=CLOSE_S)

    def wait(self, waiter: Waiter, deadline: float | None = None) -> bool:
        """Until `waiter` is set; False when the monotonic `deadline` comes first."""
        done = self._wait(waiter, deadline)
        raise_deferred()
        return done

    @uninterruptible  # Between taking the lead and giving it back; `poll` and `sleep` can be interrupted.
    def _wait(self, waiter: Waiter, deadline: float | None) -> bool:
        while not waiter.done:
            timeout = RECHECK_S if deadline is None else deadline - monotonic()
            if timeout <= 0:
                return False
            if self._closed:
                raise RuntimeError("minray was shut down while this thread waited")
            if self._lead.acquire(blocking=False) or self._relieve_caretaker():
                self._leader = threading.get_ident()
                try:
                    # What the caretaker read before it stepped back may have been that this thread's task is
                    # cancelled: a poll would not end for a signal that has come already.
                    raise_deferred()
                    while not waiter.done and not self._closed:
                        timeout = RECHECK_S if deadline is None else deadline - monotonic()
                        if timeout <= 0:
                            return False
                        self._poll(None if deadline is None else timeout, False)
                finally:
                    self._leader = 0
                    self._lead.release()
                    self._pass_on()
            elif self._leader == threading.get_ident():
                raise RuntimeError(
                    "get(), wait() or a large put() in a callback of a future, or in a finalizer or a signal handler "
                    "that comes in the middle of a wait, would wait for ever: they run in the thread that brings the "
                    "answers. Submit tasks there, and get their results elsewhere."
                )
            else:
                waiter.hang_bell()
                self._followers.append(waiter)
                try:
                    waiter.sleep(min(timeout, RECHECK_S))
                finally:  # Also when it is interrupted: the turn to lead must not be passed to nobody.
                    try:
                        self._followers.remove(waiter)
                    except ValueError:  # The one who rang has taken it out: it is this thread's turn,
                        if waiter.done or (deadline is not None and deadline <= monotonic()):
                            self._pass_on()  # which it does not need.
        return True

    def take_lead(self, follower: Waiter) -> bool:
        """For a thread that has a poll of its own, an event loop's: whether it leads now, until `pass_lead`.

        If not, another thread does, and `follower` is rung when it is this one's turn, until `stop_following`."""
        if self._lead.acquire(blocking=False) or self._relieve_caretaker():
            self._leader = threading.get_ident()
            return True
        self._followers.append(follower)
        return False

    def stop_following(self, follower: Waiter) -> None:
        try:
            self._followers.remove(follower)
        except ValueError:  # It is this thread's turn, which it does not take now.
            self._pass_on()

    def pass_lead(self) -> None:
        self._leader = 0
        self._lead.release()
        self._pass_on()

    def _relieve_caretaker(self) -> bool:
        if not self._caretaking or self._leader == threading.get_ident():
            return False
        self._wanted += 1
        try:
            self._wake()
            # Not for long: should another thread have been quicker, this one must be where it can be told.
            return self._lead.acquire(timeout=HAND_OVER_S)
        finally:
            self._wanted -= 1

    def _pass_on(self) -> None:
        """The leader goes: the next follower leads, or in a while the caretaker."""
        while self._followers:
            try:
                follower = self._followers.popleft()
            except IndexError:
                break  # Another thread was quicker.
            if not follower.done:
                follower.ring()
                return
        self._nudge_caretaker()

    def _nudge_caretaker(self) -> None:
        if self._nudge.locked():
            with suppress(RuntimeError):  # Nudged twice at once.
                self._nudge.release()

    def _take_care(self) -> None:
        pause = threading.Event()  # Never set: a sleep that needs no module.
        while not self._closed:
            pause.wait(CARETAKER_AFTER_S)
            if not self._wanted and self._lead.acquire(blocking=False):
                self._caretaking = True
                self._leader = threading.get_ident()
                try:
                    while not self._wanted and not self._closed:
                        self._poll(None, True)
                finally:
                    self._caretaking = False
                    self._leader = 0
                    self._lead.release()
                if self._followers:
                    self._pass_on()
            else:
                self.glance()
            self._nudge.acquire(timeout=RECHECK_S)
