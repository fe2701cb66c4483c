"""What workers print, as the driver shows it: whose line it is, once, and not too much.

Owns the way from a worker's bytes to lines in the driver's terminal or notebook:

* a prefix that tells who speaks: ``(resize pid=8123) 12 images done``;
* one line for many: the same line from several processes within five seconds is shown
  once, at once; what was held back follows as one line, ``… [repeated 3x by 3 workers]``.
  A process that repeats itself is not held back: a loop's output is the user's own;
* a limit for each worker, so that a task printing a gigabyte does not take the driver
  with it: after a generous burst its lines are left out until the next second, and one
  line says how many, and in which file all of them are.

`OutputPrinter` is pure: bytes and the time come in, lines come out.  It does not know of
pipes, files or terminals; the worker's log file, which is complete, is written elsewhere.
`print_lines` is its small shell.  The caller asks `next_deadline` when to `tick` again.

A line ends at its newline; an unfinished one is kept until then, or until `close`.  Of a
line rewritten with carriage returns (a progress bar) the last state counts.

Left out: treating lines that differ in their numbers as the same, as Ray does: "part 3
done" and "part 4 done" are two facts.  Also colours, and guessing a log level.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from itertools import islice

Line = tuple[str, str]
"""("stdout" or "stderr", text without its newline)"""

REPEAT_WINDOW_S = 5.0
LINES_PER_S, BYTES_PER_S = 500, 250_000
BURST_S = 10.0
"""A worker may print this many seconds' worth at once, after it has been calm for as long."""
MUTE_S = 1.0
LONGEST_LINE_BYTES = 65_536
"""An unfinished line longer than this is shown in pieces, so memory stays bounded."""


@dataclass(slots=True)
class _Worker:
    """One process's output so far.  `partial` values hold no newline; a stream in `cut` has none."""

    label: str
    calm_since: float
    """The limit as one number: the instant since which the allowance has been growing."""
    partial: dict[str, bytes] = field(default_factory=dict)
    muted_until: float = 0.0  # 0: not muted
    cut: set[str] = field(default_factory=set)
    """Streams in the middle of a line whose beginning was left out (and counted)."""
    left_out_lines: int = 0
    left_out_bytes: int = 0


@dataclass(slots=True)
class _Repeated:
    """A line that was shown at `since`, and what came of it afterwards."""

    since: float
    first_pid: int
    label: str = ""
    pid: int = 0
    count: int = 0
    pids: set[int] = field(default_factory=set)  # only counted, never iterated


class OutputPrinter:
    """Turns what workers write into the lines that the driver shows.

    >>> printer = OutputPrinter(log_of=lambda pid: f"logs/{pid}.log")
    >>> printer.feed("f", 12, "stdout", b"one\\ntw", now=0.0)
    [('stdout', '(f pid=12) one')]
    >>> printer.close(12, now=0.1)
    [('stdout', '(f pid=12) tw')]
    """

    def __init__(self, log_of: Callable[[int], str], deduplicate: bool = True) -> None:
        self._log_of = log_of
        self._deduplicate = deduplicate
        self._workers: dict[int, _Worker] = {}
        self._repeated: dict[Line, _Repeated] = {}  # in the order of `since`

    def feed(self, worker_label: str, pid: int, stream: str, data: bytes, now: float) -> list[Line]:
        """Take bytes that a worker wrote; return the lines to show now."""
        worker = self._workers.get(pid)
        if worker is None:
            worker = self._workers[pid] = _Worker(worker_label, now - BURST_S)
        lines = self.tick(now)
        if worker.muted_until:  # The cheap path of a flood: count, do not decode.
            self._leave_out(worker, stream, data)
            return lines
        worker.label = worker_label
        if stream in worker.cut:
            _, newline, data = data.partition(b"\n")
            if not newline:
                return lines
            worker.cut.discard(stream)
        *whole, rest = (worker.partial.pop(stream, b"") + data).split(b"\n")
        for index, line in enumerate(whole):
            if not self._may_show(worker, len(line) + 1, now):
                self._leave_out(worker, stream, b"\n".join([*whole[index:], rest]))
                return lines
            lines += self._show(worker, pid, stream, line, now)
        if b"\r" in rest:  # Keep the last state only; a final \r may be half of \r\n.
            rest = rest.rstrip(b"\r").rpartition(b"\r")[2] + b"\r" * rest.endswith(b"\r")
        if len(rest) <= LONGEST_LINE_BYTES:
            worker.partial[stream] = rest
        elif self._may_show(worker, len(rest), now):
            lines += self._show(worker, pid, stream, rest, now)
        else:
            self._leave_out(worker, stream, rest)
        return lines

    def tick(self, now: float) -> list[Line]:
        """What has become due: summaries of repeated lines, notes about lines left out."""
        lines: list[Line] = []
        while self._repeated:
            key, entry = next(iter(self._repeated.items()))
            if now < entry.since + REPEAT_WINDOW_S:
                break
            del self._repeated[key]
            lines += self._summary(key, entry)
        for pid, worker in self._workers.items():
            if worker.muted_until and now >= worker.muted_until:
                lines += self._note(worker, pid)
        return lines

    def next_deadline(self) -> float | None:
        """When `tick` will have something to say, if nothing comes in before; None: never."""
        due = [worker.muted_until for worker in self._workers.values() if worker.muted_until]
        due += islice((entry.since + REPEAT_WINDOW_S for entry in self._repeated.values() if entry.count), 1)
        return min(due, default=None)

    def close(self, pid: int, now: float) -> list[Line]:
        """A worker has ended: show its unfinished lines, and forget it."""
        lines = self.tick(now)
        worker = self._workers.pop(pid, None)
        if worker is not None:
            for stream, rest in worker.partial.items():
                lines += self._show(worker, pid, stream, rest, now) if rest else []
            lines += self._note(worker, pid)
        return lines

    def close_all(self, now: float) -> list[Line]:
        """The session ends: show all that was held back."""
        lines = [line for pid in list(self._workers) for line in self.close(pid, now)]
        for key, entry in self._repeated.items():
            lines += self._summary(key, entry)
        self._repeated.clear()
        return lines

    def _may_show(self, worker: _Worker, size_bytes: int, now: float) -> bool:
        """Charge one line against the worker's allowance; mute the worker if that is used up."""
        cost_s = max(1 / LINES_PER_S, size_bytes / BYTES_PER_S)
        start = max(worker.calm_since, now - BURST_S)
        if start + min(cost_s, BURST_S) > now:
            worker.muted_until = now + MUTE_S
            return False
        worker.calm_since = min(start + cost_s, now)
        return True

    def _leave_out(self, worker: _Worker, stream: str, data: bytes) -> None:
        """Count what is not shown.  A line counts when its first byte is left out."""
        unfinished = not data.endswith(b"\n")
        worker.left_out_lines += data.count(b"\n") + unfinished - (stream in worker.cut)
        worker.left_out_bytes += len(data) + len(worker.partial.pop(stream, b""))
        (worker.cut.add if unfinished else worker.cut.discard)(stream)

    def _note(self, worker: _Worker, pid: int) -> list[Line]:
        count, size = worker.left_out_lines, worker.left_out_bytes
        worker.muted_until, worker.left_out_lines, worker.left_out_bytes = 0.0, 0, 0
        if not size:
            return []
        many = f"{count:,} {'line' if count == 1 else 'lines'} ({_size(size)}) left out"
        limit = f"more than {LINES_PER_S} lines or {_size(BYTES_PER_S)} a second"
        where = f"all output is in {self._log_of(pid)}"
        return [("stderr", f"({worker.label} pid={pid}) [{many}: {limit}; {where}]")]

    def _show(self, worker: _Worker, pid: int, stream: str, line: bytes, now: float) -> list[Line]:
        text = line.rstrip(b"\r").rpartition(b"\r")[2].decode("utf-8", "replace")
        shown = (stream, f"({worker.label} pid={pid}) {text}")
        if not self._deduplicate or not text.strip():
            return [shown]
        entry = self._repeated.get((stream, text))
        if entry is None:
            self._repeated[stream, text] = _Repeated(now, pid)
            return [shown]
        if pid == entry.first_pid and not entry.count:
            return [shown]
        entry.label, entry.pid = worker.label, pid
        entry.count += 1
        entry.pids.add(pid)
        return []

    def _summary(self, key: Line, entry: _Repeated) -> list[Line]:
        stream, text = key
        if not entry.count:
            return []
        line = f"({entry.label} pid={entry.pid}) {text}"
        if entry.count > 1:  # One that was held back is simply shown late: it says all there is to say.
            many = len(entry.pids)
            line += f" [repeated {entry.count}x by {many} {'worker' if many == 1 else 'workers'}]"
        return [(stream, line)]


def print_lines(lines: Iterable[Line]) -> None:
    """Write lines to the driver's `sys.stdout` and `sys.stderr`, as they are at this moment.

    They are looked up at each call because pytest and notebooks replace them.  Nothing is
    raised: a driver whose terminal has gone, or cannot spell a character, works on.
    """
    texts: dict[str, list[str]] = {}
    for stream, text in lines:
        texts.setdefault(stream, []).append(text)
    for stream, parts in texts.items():
        target = sys.stderr if stream == "stderr" else sys.stdout
        text = "\n".join(parts) + "\n"
        try:
            try:
                target.write(text)
            except UnicodeEncodeError:
                encoding = getattr(target, "encoding", None) or "ascii"
                target.write(text.encode(encoding, "backslashreplace").decode(encoding))
            target.flush()
        except (AttributeError, OSError, ValueError):  # None under pythonw; a broken pipe; closed.
            pass


def _size(size_bytes: int) -> str:
    size, units = float(size_bytes), ["bytes", "kB", "MB", "GB"]
    while size >= 1000 and len(units) > 1:
        size, units = size / 1000, units[1:]
    return f"{size:.{0 if units[0] == 'bytes' or size >= 10 else 1}f} {units[0]}"
