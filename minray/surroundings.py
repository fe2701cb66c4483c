"""What a task may change in its worker's process although the next one relies on it: it is put back.

Owns the working directory, descriptors 0 to 2 with `sys.stdout` and `sys.stderr`, and the
handler of SIGINT (by which tasks are cancelled).  Looking at all of them after each task
would cost some microseconds; instead the few functions that change them note that they were
called, and only then everything is set as it was.

Left out: the environment, modules and signals other than SIGINT, which Ray leaves as a task left them as
well, and descriptors that C code closes.  An actor's process is its own: there nothing is put back.
"""

from __future__ import annotations

import fcntl
import functools
import os
import signal
import sys
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import Any

OWN_FDS_FROM = 200
"""The numbers of minray's own descriptors in a worker: a task that closes low ones does not meet them."""


class Surroundings:
    def __init__(self, on_interrupt: Callable[[int, FrameType | None], None]) -> None:
        self.disturbed = False
        self.stdout, self.stderr = sys.stdout, sys.stderr
        self._on_interrupt = on_interrupt
        try:
            self._directory = os.getcwd()
        except OSError:
            self._directory = "/"  # It was deleted.
        self._copies = [fcntl.fcntl(fd, fcntl.F_DUPFD_CLOEXEC, OWN_FDS_FROM) for fd in range(3)]
        self._chdir, self._dup2, self._signal = os.chdir, os.dup2, signal.signal

    def watch(self) -> None:
        """What is there now will be put back; from now on changes are noted.  Call it in the main thread."""
        self.stdout, self.stderr = sys.stdout, sys.stderr
        self._signal(signal.SIGINT, self._on_interrupt)
        for stream in (self.stdout, self.stderr):
            stream.close = stream.flush  # type: ignore[method-assign]
        self._note(os, "chdir", lambda *_: True)
        self._note(os, "fchdir", lambda *_: True)
        self._note(os, "close", lambda fd: fd <= 2)
        self._note(os, "closerange", lambda low, high: low <= 2)
        self._note(os, "dup2", lambda fd, fd2, *_: fd2 <= 2)
        self._note(signal, "signal", lambda number, handler: number == signal.SIGINT)

    def stay_here(self) -> None:
        """The directory that this process is in now is the one to go back to."""
        with suppress(OSError):
            self._directory = os.getcwd()
        self.disturbed = False

    def _note(self, module: Any, name: str, disturbs: Callable[..., bool]) -> None:
        original = getattr(module, name)

        def noting(*args: Any, **named: Any) -> Any:
            with suppress(TypeError):  # Wrong arguments: the original says so.
                if named or disturbs(*args):
                    self.disturbed = True
            return original(*args, **named)

        setattr(module, name, functools.wraps(original)(noting))

    def restore(self) -> None:
        self.disturbed = False
        with suppress(OSError):
            self._chdir(self._directory)
        for stream in (sys.stdout, sys.stderr):
            with suppress(Exception):  # A task's own stream may be closed, or be no stream at all.
                stream.flush()
        for fd, copy in enumerate(self._copies):
            self._dup2(copy, fd)
        sys.stdout, sys.stderr = self.stdout, self.stderr
        self._signal(signal.SIGINT, self._on_interrupt)
