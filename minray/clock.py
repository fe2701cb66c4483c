"""The time that minray goes by: seconds since the epoch, which never jump.

Deadlines and run times must not depend on somebody setting the clock (or NTP mending it), and
times in the history should be such as people read.  So the wall clock is read once, when
this module is imported, and from then on only the monotonic clock moves: a session that
outlives a change of the clock goes on in the time in which it began.  Processes forked from one
zygote share that beginning; the driver's is some ms of rounding apart, no more.

(A task can replace `time.time`; these names are taken before it can.)
"""

from __future__ import annotations

from time import monotonic, time

EPOCH = time() - monotonic()
"""What turns monotonic time into time since the epoch, in s."""


def now() -> float:
    return EPOCH + monotonic()
