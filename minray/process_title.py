"""What `ps` and `top` show of minray's processes: `minray::resize` while a task runs, `minray::IDLE` otherwise.

Two places of the kernel's tell what a process is: its *comm* (15 bytes: top, ps -c) and its command line (ps -f, htop),
which is the memory where its arguments lay when it was started.  Both are files here, `/proc/self/comm` and
`/proc/self/mem`, so a mistake is an OSError and never a crash; any error, or another system than Linux, means that
titles stay as they are.

The zygote looks up where its arguments lie (`begin`), and whatever is forked from it has them at the same place.
That costs 30 µs a title, so a short task gets none: see `Worker._mind_title`.
"""

from __future__ import annotations

import os
from contextlib import suppress

from minray import exceptions

IDLE = "IDLE"

_arguments: tuple[int, int] | None = None  # where they begin, and how many bytes there are


def begin() -> None:
    """Find the command line of this process.  A few hundred µs, once for all that is forked from it."""
    global _arguments
    _arguments = None
    with suppress(OSError, ValueError, IndexError):
        with open("/proc/self/stat", "rb") as stat:
            fields = stat.read().rpartition(b")")[2].split()
        start, end = int(fields[45]), int(fields[46])  # arg_start and arg_end: 48 and 49, counted from 1 and the pid
        with open("/proc/self/cmdline", "rb") as file:
            shown = file.read()
        with open("/proc/self/mem", "rb", buffering=0) as memory:
            memory.seek(start)
            if end - start == len(shown) and memory.read(len(shown)) == shown:
                _arguments = start, len(shown)


def show(name: str) -> None:
    """From now on this process is called `minray::<name>` (`ray::<name>` under as_ray), as far as there is room."""
    title = "".join(c if c.isprintable() else "?" for c in f"{exceptions.name_prefix}::{name}")
    with suppress(OSError):
        with open("/proc/self/comm", "wb", buffering=0) as comm:  # The main thread's, whichever thread this is.
            comm.write(_cut(title, 15))
    if _arguments is not None:
        start, room = _arguments
        with suppress(OSError):
            memory = os.open("/proc/self/mem", os.O_WRONLY | os.O_CLOEXEC)  # Anew: a fork's is another one's memory.
            try:
                os.pwrite(memory, _cut(title, room - 1).ljust(room, b"\0"), start)
            finally:
                os.close(memory)


def _cut(title: str, size_bytes: int) -> bytes:
    """Not in the middle of a character."""
    return title.encode("utf-8", "replace")[:size_bytes].decode("utf-8", "ignore").encode()
