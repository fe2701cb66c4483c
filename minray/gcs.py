"""The GCS: a process that writes what the node decides into a SQLite file.

It runs beside the driver, on the other end of a socketpair, because SQLite inside a
busy driver starves: sqlite3 drops and retakes the GIL at every row.  It is one thread
and one loop: read what is queued, commit it as one transaction, acknowledge.

Frames are a 4-byte little-endian length and a pickle of builtin types.

    node -> GCS   (seq, [(table, rows), ...])    rows are whole rows: the newest wins; or, for
                                                 "object_updates", what changed of an object
    GCS -> node   ("ack", seq)                   everything up to seq is committed
                  ("error", seq, kind, message)  see below; an ack follows if it passes

Its contract with the node:

1. A row replaces the row with the same ``no``, so sending one twice does no harm.
2. An acknowledged row outlives this process (WAL; a power cut may take the last ones).
3. "disk_full", "disk_io", "locked": the batch is kept and tried again until it is
   committed; the text says which file, and how much space there is.  Nothing more is read
   meanwhile, so after a moment the node takes in no new work.
   "damaged": the file makes no sense any more.  "invalid": the node sent what the schema does not
   know, a bug.  After these two the GCS ends; another one would not fare better.
4. Who takes over a file from a GCS that was killed looks for damage first, for at most
   `CHECK_S`: longer would keep it from being back within a second.  That finds damage to the
   form of some 200 MB; ``minray check`` finds the rest.
5. End of file means that the driver is gone: an open job is marked FAILED, and the file
   is left as one plain file without a WAL (unless the disk is full: then the WAL stays beside it).

History is bounded: of finished tasks, freed objects and events the newest ``history``
rows are kept (80 % of them right after a pruning, one group of rows more right before),
totals of the rest in ``task_totals`` and ``object_totals``.  So a million tasks grow
neither file nor memory: from the first 100,000 on, deleted rows' pages are used again.

Knows no task, actor or policy: a state is a number here.  User data (arguments,
functions) passes through as bytes and is never unpickled.

Figures (medians of differences, variants interleaved in one run; a row costs about
3 µs on a 2-core machine whose speed varies by a factor of two): 50 rows a statement
instead of executemany saves 0.4 µs, no garbage collection 0.15; the row's checksum costs 0.7.  Left out: 16 KiB
pages save 0.2, but every small commit then writes 16 KiB; marshal is no faster than
pickle; totals kept in Python cost twice what SQLite's GROUP BY does.
"""

from __future__ import annotations

import contextlib
import gc
import io
import os
import pickle
import select
import signal
import socket
import sqlite3
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import chain
from marshal import dumps
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from zlib import crc32

from minray import clock
from minray.channel import frame, unpack_length
from minray.checksum import row_checksum
from minray.schema import JOB_STATES, SQL_FILE, TABLES
from minray.task_spec import DEAD, FINISHED, OBJECT_STATES, REMOVED, WORKER_STATES

if TYPE_CHECKING:
    from minray.job_storage import JobWriter

T = TypeVar("T")
Frame = tuple[int, list[tuple[str, list[tuple[Any, ...]]]]]

HISTORY = 100_000
"""How many finished tasks, freed objects and events are kept, of each."""

GROUP_ROWS = 5_000
"""At most so many rows go into one transaction: some 15 ms, which bounds the wait for an acknowledgement."""

RETRY_S = 0.1

CHECK_S = 0.3
"""How long the look at a file that is taken over may last."""

ROWS_A_STATEMENT = 50
"""More would pass the 999 parameters that SQLite before 3.32 allows, at 15 columns a row."""


def _insert(table: str, rows: int) -> str:
    row = f"({','.join('?' * len(TABLES[table].columns))})"
    return f"INSERT OR REPLACE INTO {table} VALUES {','.join([row] * rows)}"


def _update(table: str, **new: str) -> str:
    """SQL that gives columns new values, and the row its new checksum."""
    *columns, _checksum = TABLES[table].columns
    new["checksum"] = f"row_checksum({', '.join(new.get(column, column) for column in columns)})"
    return f"UPDATE {table} SET {', '.join(f'{column} = {value}' for column, value in new.items())}"


_UPDATES = {
    "object_updates": (
        "objects",
        _update("objects", state="?1", location="coalesce(?2, location)", freed_us="coalesce(?3, freed_us)")
        + " WHERE no = ?4",
    )
}
"""What may stand in a frame in place of a table: the table that it changes, and how.

The node forgets an object when it is freed, so it could not send the whole row again."""

_WRITE_ONE = {table: _insert(table, 1) for table in TABLES} | {name: sql for name, (_, sql) in _UPDATES.items()}
_WRITE_MANY = {table: _insert(table, ROWS_A_STATEMENT) for table in TABLES}

OF_A_JOB = ("results", "runs")
"""Tables of a durable job's storage, which is another file: see job_storage.py."""

_TRANSIENT = {
    "database or disk is full": "disk_full",
    "disk I/O error": "disk_io",
    "unable to open database file": "disk_io",
    "database is locked": "locked",
}
"""What SQLite says when trying again may help (Python 3.10 has no error codes yet)."""
FULL_BYTES = 64 << 10
"""With less space than that an error of the disk is most likely that it is full: where its own index of the write-ahead
log does not fit any more, SQLite speaks of IO."""
_MALFORMED = "database disk image is malformed"
_DAMAGED = (_MALFORMED, "file is not a database")


class Capped(NamedTuple):
    """A table whose finished rows are deleted, the oldest first, when they are too many."""

    table: str
    done: str
    """SQL: the row will not change any more."""
    totals: str
    """SQL that adds rows with `no <= ?` to the totals before they go; '' if nobody needs them."""


_TASK_DONE = f"state >= {FINISHED}"
_OBJECT_DONE = f"state >= {OBJECT_STATES.index('FREED')}"
CAPPED = (
    Capped(
        "tasks",
        _TASK_DONE,
        f"""INSERT INTO task_totals SELECT options_no, state, count(*),
        coalesce(sum(finished_us - started_us), 0), coalesce(max(finished_us - started_us), 0), NULL
        FROM tasks WHERE no <= ? AND {_TASK_DONE} GROUP BY 1, 2
        ON CONFLICT DO UPDATE SET tasks = tasks + excluded.tasks, run_us = run_us + excluded.run_us,
        longest_us = max(longest_us, excluded.longest_us)""",
    ),
    Capped(
        "objects",
        _OBJECT_DONE,
        f"""INSERT INTO object_totals SELECT coalesce(location, 0), state, count(*),
        coalesce(sum(size_bytes), 0), NULL FROM objects WHERE no <= ? AND {_OBJECT_DONE} GROUP BY 1, 2
        ON CONFLICT DO UPDATE SET objects = objects + excluded.objects,
        size_bytes = size_bytes + excluded.size_bytes""",
    ),
    Capped("placement_groups", f"state = {REMOVED}", ""),
    Capped("events", "1", ""),
)


class Gcs:
    """The open file: the only connection that writes to it."""

    def __init__(self, path: str, history: int = HISTORY, job: dict[str, Any] | None = None) -> None:
        self.history = history
        self.job: JobWriter | None = None
        self.written = dict.fromkeys(TABLES, 0)
        """Rows committed to each table since it was last pruned."""
        # No thread but ours, and we say BEGIN ourselves.
        self.database = sqlite3.connect(path, isolation_level=None, timeout=1.0)
        self.database.create_function("row_checksum", -1, lambda *row: row_checksum(row), deterministic=True)
        for setting in ("journal_mode=WAL", "synchronous=NORMAL", "secure_delete=OFF"):
            self.database.execute(f"PRAGMA {setting}")
        self.database.execute("PRAGMA journal_size_limit=8000000")
        (version,) = self.database.execute("PRAGMA user_version").fetchone()
        if not version:
            self.database.executescript(f"BEGIN;\n{SQL_FILE.read_text()}COMMIT;")
        else:  # We take over from a GCS that was killed, or that took its zygote's death for the driver's.
            self._look_for_damage()
            self.database.execute(
                _update("jobs", state="?1", finished_us="NULL") + " WHERE state = ?2",
                (JOB_STATES.index("RUNNING"), JOB_STATES.index("FAILED")),
            )

        if job is not None:
            from minray.job_storage import JobWriter

            self.job = JobWriter(self.database, job)

    def _look_for_damage(self) -> None:
        """Raises sqlite3.DatabaseError for a file in whose form an error is found within CHECK_S."""
        deadline = clock.now() + CHECK_S
        self.database.set_progress_handler(lambda: clock.now() > deadline, 10_000)
        try:
            (found,) = self.database.execute("PRAGMA quick_check(1)").fetchone()
        except sqlite3.OperationalError as error:
            if str(error) != "interrupted":
                raise
            found = "ok"  # So far.
        finally:
            self.database.set_progress_handler(None, 0)
        if found != "ok":
            raise sqlite3.DatabaseError(f"{_MALFORMED}: {' '.join(found.split())}")

    def write(self, frames: list[Frame]) -> None:
        """Commit all rows of these frames, or none."""
        try:
            self._write(frames)
        except UnicodeEncodeError:  # Half a surrogate pair, in the message of a user's exception perhaps: no UTF-8.
            self._write(
                [
                    (seq, [(table, [tuple(map(_encodable, row)) for row in rows]) for table, rows in tables])
                    for seq, tables in frames
                ]
            )

    def _write(self, frames: list[Frame]) -> None:
        with self._transaction() as database:
            for _seq, tables in frames:
                for table, rows in tables:
                    if table in OF_A_JOB:
                        assert self.job is not None, f"rows of {table} came, and this is no durable job"
                        self.job.write(table, rows)
                        continue
                    whole = 0
                    if table in TABLES:
                        rows = [(*row, crc32(dumps(row, 2))) for row in rows]  # `row_checksum`, without its call.
                        # The hot path: beside executemany for all rows this saves a tenth of the time.
                        whole = len(rows) - len(rows) % ROWS_A_STATEMENT
                    for i in range(0, whole, ROWS_A_STATEMENT):
                        values = list(chain.from_iterable(rows[i : i + ROWS_A_STATEMENT]))
                        database.execute(_WRITE_MANY[table], values)
                    database.executemany(_WRITE_ONE[table], rows[whole:])
        for _seq, tables in frames:
            for table, rows in tables:
                if table in OF_A_JOB:
                    continue
                changed = table if table in TABLES else _UPDATES[table][0]
                self.written[changed] += len(rows)

    def prune(self) -> None:
        """Delete the oldest finished rows of tables that have grown by a fifth of ``history``.

        The fifth is a compromise: finding the boundary walks over all rows that stay.
        """
        slack = self.history // 5
        for table, done, totals in CAPPED:
            if self.written[table] < slack:
                continue
            oldest_kept = f"SELECT no FROM {table} WHERE {done} ORDER BY no DESC LIMIT 1 OFFSET ?"
            boundary = self.database.execute(oldest_kept, (self.history - slack,)).fetchone()
            if boundary:
                with self._transaction() as database:
                    if totals:
                        database.execute(totals, boundary)
                        database.execute(_update(f"{table[:-1]}_totals"))
                    database.execute(f"DELETE FROM {table} WHERE no <= ? AND {done}", boundary)
            self.written[table] = 0

    def finish(self) -> None:
        """Mark a job that nobody ended, and what ends with it; leave one plain file behind.

        Tasks and objects stay as they stood: that tells what the session was doing.
        """
        now_us, why = int(clock.now() * 1e6), "ended with its session"
        with self._transaction() as database:
            if self.job is not None:
                self.job.finish()
            database.execute(
                _update("jobs", state="?1", finished_us="?2") + " WHERE finished_us IS NULL",
                (JOB_STATES.index("FAILED"), now_us),
            )
            for table, reason, dead, died_us in (
                ("workers", "exit_reason", WORKER_STATES.index("DEAD"), "died_us"),
                ("actors", "death_cause", DEAD, "died_us"),
                ("placement_groups", "reason", REMOVED, "removed_us"),
            ):
                database.execute(
                    _update(table, state="?1", **{died_us: "?2", reason: "?3"}) + f" WHERE {died_us} IS NULL",
                    (dead, now_us, why),
                )
        self.database.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        with contextlib.suppress(sqlite3.OperationalError):  # Somebody is reading: an empty WAL stays.
            self.database.execute("PRAGMA journal_mode=DELETE")

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[sqlite3.Connection]:
        self.database.execute("BEGIN IMMEDIATE")
        try:
            yield self.database
            self.database.execute("COMMIT")
        except BaseException:
            if self.database.in_transaction:  # A full disk makes SQLite roll back by itself.
                self.database.execute("ROLLBACK")
            raise


def _encodable(value: Any) -> Any:
    return value.encode(errors="backslashreplace").decode() if type(value) is str else value


class _BuiltinsUnpickler(pickle.Unpickler):
    """Records are tuples of builtin types: no name is ever looked up, so no code can be."""

    def find_class(self, module: str, name: str) -> Any:
        raise pickle.UnpicklingError(f"a record names {module}.{name}; only builtin types may be recorded")


def send(sock: socket.socket, message: object) -> None:
    sock.sendall(frame(message))


def receive(sock: socket.socket) -> Any:
    """The next message; EOFError when the other side is gone, even in the middle of one."""
    (size,) = unpack_length(_receive_exactly(sock, 4))
    return _BuiltinsUnpickler(io.BytesIO(_receive_exactly(sock, size))).load()


def _receive_exactly(sock: socket.socket, size: int) -> bytearray:
    buffer = bytearray(size)
    view = memoryview(buffer)
    while view:
        count = sock.recv_into(view)
        if not count:
            raise EOFError
        view = view[count:]
    return buffer


def _count_rows(frame: Frame) -> int:
    return sum(len(rows) for _table, rows in frame[1])


def serve(sock: socket.socket, gcs: Gcs, paths: Sequence[str] = ()) -> None:
    """Write what arrives until the node closes its end."""
    ready = select.poll()
    ready.register(sock, select.POLLIN)
    with contextlib.suppress(EOFError, ConnectionError):
        while True:
            frames = [receive(sock)]
            rows = _count_rows(frames[0])
            # The driver's end comes after all that it sent: these are written, and the next receive() meets EOF.
            # If it left answers unread, its end is a ConnectionResetError here, once.
            with contextlib.suppress(EOFError, ConnectionError):
                while rows < GROUP_ROWS and ready.poll(0):
                    frames.append(receive(sock))
                    rows += _count_rows(frames[-1])
            seq = frames[-1][0]
            _insist(partial(gcs.write, frames), sock, seq, paths)
            _answer(sock, ("ack", seq))
            # After the acknowledgement, so that nobody waits for it.
            _insist(gcs.prune, sock, seq, paths)
    gcs.finish()


def _answer(sock: socket.socket, message: object) -> None:
    with contextlib.suppress(ConnectionError):  # The node is gone; what it has sent is written all the same.
        send(sock, message)


def _insist(step: Callable[[], T], sock: socket.socket, seq: int, paths: Sequence[str]) -> T:
    """Do `step`, again and again while SQLite says what may pass (`_TRANSIENT`); the node is told once.

    `paths`: the files, one of which cannot be written."""
    hung_up = select.poll()
    hung_up.register(sock, 0)  # Without POLLIN: what is queued does not count as news.
    told = ""
    is_last = False
    while True:
        try:
            done = step()
            if told:
                _answer(sock, ("ack", seq))
            return done
        except Exception as error:
            kind = _TRANSIENT.get(str(error)) or ("damaged" if str(error).startswith(_DAMAGED) else "invalid")
            if kind != told:
                where = f" ({' or '.join(paths)})"
                if kind in _TRANSIENT.values():
                    where, free = _scarcest(paths)
                    if kind == "disk_io" and free < FULL_BYTES:
                        kind = "disk_full"
                _answer(sock, ("error", seq, kind, f"{error}{where}"))
                told = kind
            if kind in ("damaged", "invalid") or is_last:
                raise  # It would fail for ever; or the driver is gone and there is no space: what is committed stays.
            # When the driver has gone, once more: it may have made room, and have gone within this moment.
            is_last = bool(hung_up.poll(RETRY_S * 1000))


def _scarcest(paths: Sequence[str]) -> tuple[str, int]:
    """The file that has the least space, for messages: " (<path>, where 4,096 bytes are free)"; and that number."""
    free: list[tuple[int, str]] = []
    for path in paths:
        with contextlib.suppress(OSError):
            about = os.statvfs(os.path.dirname(path))
            free.append((about.f_bavail * about.f_frsize, path))
    if not free:
        return "", FULL_BYTES
    return f" ({min(free)[1]}, where {min(free)[0]:,} bytes are free)", min(free)[0]


def close_file(path: str) -> None:
    """What the GCS does at its end, for a file whose GCS was killed together with everybody who could start another."""
    with contextlib.suppress(sqlite3.Error):  # Damaged, or no space: it stays as it is.
        if os.path.exists(path):
            gcs = Gcs(path)
            with contextlib.closing(gcs.database):
                gcs.finish()


def main(sock: socket.socket, path: str, history: int = HISTORY, job: dict[str, Any] | None = None) -> None:
    """The body of the GCS process; returns when the driver is gone; exits with 1 if the file cannot be written then.

    Meant for a process of its own: it changes the umask, signals and garbage collection.
    """
    os.umask(0o077)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the driver, whose end we see anyway.
    gc.disable()  # Rows hold no cycles, and looking for some costs 0.15 µs a row.
    paths = [path] if job is None else [path, job["path"]]
    try:
        gcs = _insist(partial(Gcs, path, history, job), sock, 0, paths)
        with contextlib.closing(gcs.database):
            serve(sock, gcs, paths)
    except sqlite3.OperationalError as error:
        if str(error) not in _TRANSIENT:
            raise
        # The driver is gone: nobody is left to wait, or to make room.
        left = f"{error}{_scarcest(paths)[0]}. What was committed before is there, some of it in its -wal file."
        print(f"minray: the GCS ends without having written everything: {left}", file=sys.stderr)
        sys.exit(1)
