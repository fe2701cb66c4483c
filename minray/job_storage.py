"""The storage of durable jobs: one SQLite file, and beside it a directory with the large results.

::

    train.sqlite              tables jobs, runs and results (`schema.STORAGE_TABLES`); several jobs may share it
    train.sqlite.objects/
        resnet/               one directory a job
            lock              who runs the job: see below
            <object>-<n>      a large object, as `object_store.write_file` writes them

Owns the file's form, its locks, and what is believed of it.  Three parts, used by three processes:

* `open_job`: the driver, at `init`.  Takes the lock, waits until the GCS of a killed run has written its last
  rows, reads what is whole into a `Known`, and sweeps out what is not.  Then it closes the file for good.
* `JobWriter`: the GCS, which writes rows of kept results in the same transaction as its own.
* `describe` and `forget`: the ``minray jobs`` and ``minray job`` commands.

**Nothing is believed without a checksum.**  A row whose checksum is wrong, a file that is gone or cut off, a result
whose inner objects are not all there: dropped, told, and run anew.  Files are large, so their bytes are checked when
they are mapped; but those of objects inside other results at once, since these alone could not be made again.

**Locks** are POSIX record locks on the file ``lock``: byte 0 is the driver's, byte 1 its GCS's.  They go with their
process however it ends, are not inherited by what it forks, and so are never stale.  For the same reason the file is
opened once in a driver: closing a second descriptor would drop the lock.

Network file systems are refused: SQLite's WAL needs memory that all its users share, and their locks have lied.

Left out: copies and replicas (copy the file and its directory while no job runs), and a bound on its size: results
that a job needs are no history.  ``minray job NAME --forget`` is the way to shrink it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import os
import re
import socket
import sqlite3
import stat
import struct
import sys
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

from minray import ids, object_store
from minray.checksum import row_checksum
from minray.node_durable import DurableNode, KeptObject, KeptResult, Known
from minray.schema import JOB_STATES, STORAGE_TABLES, STORAGE_VERSION, Table
from minray.session import default_root, open_root

APPLICATION_ID = 0x6D726A62  # "mrjb": stands in the file, where `file` and we look for it.
OVER_THE_NETWORK = ("nfs", "nfs4", "cifs", "smb3", "smbfs", "afs", "fuse.sshfs")
GCS_END_S = 30.0
"""How long the GCS of a run whose driver was killed may take to write what it had been sent."""
_DRIVER, _GCS = 0, 1
"""Bytes of the lock file."""
_RUNNING, _SUCCEEDED, _FAILED = range(len(JOB_STATES))
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 ._-]{0,99}")


class JobInUseError(RuntimeError):
    """Another driver runs the job of this name."""


class OpenJob(NamedTuple):
    """A job that this process runs."""

    name: str
    storage: str
    no: int
    run_no: int
    known: Known
    troubles: list[str]  # what was found damaged, for people
    lock: int  # file descriptor

    @property
    def directory(self) -> str:
        return objects_directory(self.storage, self.name)

    def config(self) -> dict[str, Any]:
        """What its GCS must know."""
        return {"path": self.storage, "directory": self.directory, "job_no": self.no, "run_no": self.run_no}

    def make_node(self, *args: Any, **kwargs: Any) -> DurableNode:
        return DurableNode(self.known, *args, **kwargs)

    def close(self) -> None:
        os.close(self.lock)


# ---------------------------------------------------------------- names and paths


def check_name(job: Any) -> str:
    """Raises ValueError for what could not name a directory everywhere."""
    if not isinstance(job, str) or not _NAME.fullmatch(job) or job.endswith((" ", ".")):
        raise ValueError(
            "init(job=...) must be a name of 1 to 100 letters, digits, spaces, dots, dashes and underscores that "
            f"begins with a letter or digit, got {job!r}. Runs of one script share it; it names a directory of results."
        )
    return job


def storage_path(job: str, storage: Any) -> str:
    """Where a job is kept: as told, else in the directory ``jobs`` of the root of sessions.

    Raises OSError and ValueError, saying what is wrong with it."""
    if storage is None:
        directory = os.path.join(open_root(), "jobs")
        with contextlib.suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        path = os.path.join(directory, f"{job}.sqlite")
    elif isinstance(storage, (str, os.PathLike)) and os.fspath(storage) and "\0" not in os.fsdecode(storage):
        path = os.path.abspath(os.fsdecode(storage))
    else:
        raise ValueError(f"init(storage=...) must be the path of a file, got {storage!r}.")
    _check_path(path)
    return path


def default_files() -> list[str]:
    directory = os.path.join(os.path.abspath(default_root()), "jobs")
    with contextlib.suppress(FileNotFoundError):
        return sorted(os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(".sqlite"))
    return []


def objects_directory(storage: str, job: str) -> str:
    return os.path.join(f"{storage}.objects", job)


def _check_path(path: str) -> None:
    parent = os.path.dirname(path)
    if os.path.isdir(path):
        raise IsADirectoryError(
            f"init(storage={path!r}): this is a directory, and the storage of a job is one file. Nothing was started. "
            f"Name a file in it, such as {os.path.join(path, 'jobs.sqlite')!r}."
        )
    if not os.path.isdir(parent):
        raise FileNotFoundError(
            f"init(storage={path!r}): the directory {parent!r} does not exist, and minray does not make it: the name "
            "may be mistyped. Nothing was started. Make it first, or leave storage out: then minray chooses the place."
        )
    with contextlib.suppress(OSError), open("/proc/self/mountinfo") as file:
        kind = file_system_of(os.path.realpath(parent), file.read())
        if kind in OVER_THE_NETWORK:
            raise ValueError(
                f"init(storage={path!r}): it would lie on a network file system ({kind}), where locks are not "
                "reliable and SQLite may lose what it wrote. Nothing was started. Keep it on a local disk of this "
                "machine, and copy the file and its .objects directory afterwards if others shall have it."
            )


def file_system_of(path: str, mountinfo: str) -> str:
    """The type of the file system that a path lies on, by the text of /proc/self/mountinfo; "" if it does not say.

    >>> text = "36 35 98:0 / / rw - ext4 /dev/sda rw\\n37 36 0:31 / /home rw - nfs4 server:/home rw\\n"
    >>> file_system_of("/home/ann/job.sqlite", text), file_system_of("/homes", text)
    ('nfs4', 'ext4')
    """
    best, kind = -1, ""
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        point = left.split(" ")[4].encode().decode("unicode_escape")  # A space in it is written \040.
        if (path + "/").startswith(point.rstrip("/") + "/") and len(point) >= best:  # The last one mounted is on top.
            best, kind = len(point), right.split(" ")[0]
    return kind


# ---------------------------------------------------------------- the file


def create_sql(tables: dict[str, Table], prefix: str = "") -> str:
    """SQL that makes tables as they are described."""
    kinds = {int: "INTEGER", str: "TEXT", bytes: "BLOB"}
    statements = []
    for name, table in tables.items():
        columns = [
            f"{column} {kinds[about.type]}{' PRIMARY KEY' if column == table.key else ''}"
            for column, about in table.columns.items()
        ]
        statements.append(f"CREATE TABLE IF NOT EXISTS {prefix}{name} ({', '.join(columns)});\n")
    return "".join(statements)


def _open(path: str, create: bool) -> sqlite3.Connection:
    """Raises ValueError, PermissionError or another OSError saying what is wrong with the file."""
    if create:
        try:
            os.close(os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise type(error)(
                error.errno,
                f"the storage of a durable job must be a file that can be written ({error.strerror}). Nothing was "
                "started. Choose another init(storage=...)",
                path,
            ) from None
    found = os.stat(path)
    if not stat.S_ISREG(found.st_mode):
        raise ValueError(f"init(storage={path!r}): this is not an ordinary file. Nothing was started.")
    if found.st_uid != os.geteuid() or found.st_mode & 0o022:
        raise PermissionError(
            f"the storage {path} belongs to user {found.st_uid} with mode {found.st_mode & 0o7777:o}; results are "
            "unpickled from it, so only you may be able to write it. It was not read. Choose another one, or change "
            "its owner and mode."
        )
    database = sqlite3.connect(path, isolation_level=None, timeout=10.0)
    try:
        (application,) = database.execute("PRAGMA application_id").fetchone()
        (version,) = database.execute("PRAGMA user_version").fetchone()
        (tables,) = database.execute("SELECT count(*) FROM sqlite_master").fetchone()
        if application != APPLICATION_ID and (tables or version or application):
            raise ValueError(
                f"{path} is an SQLite database, but not a storage of durable jobs. It was not changed. Choose another "
                "file."
            )
        if application and version != STORAGE_VERSION:
            raise ValueError(
                f"the storage {path} was written by another version of minray (its format is {version}, this is "
                f"{STORAGE_VERSION}). It was not changed. Use that version, or another file, and run everything anew."
            )
        if create:
            database.execute("PRAGMA journal_mode=WAL")
            if not application:
                database.executescript(
                    f"BEGIN IMMEDIATE;\n{create_sql(STORAGE_TABLES)}PRAGMA application_id = {APPLICATION_ID};\n"
                    f"PRAGMA user_version = {STORAGE_VERSION};\nCOMMIT;"
                )
        return database
    except sqlite3.OperationalError as error:
        database.close()
        raise PermissionError(
            f"the storage {path} cannot be used: {error}. Nothing was started. It must be a file on a disk with room "
            "that you can write to, in a directory that you can write to."
        ) from None
    except sqlite3.DatabaseError as error:
        database.close()
        raise ValueError(
            f"the storage {path} cannot be read: {error}. It was not changed. If it is a storage of durable jobs, it "
            "is damaged: `sqlite3 FILE .recover` salvages what can be; or choose another file, and all is run anew."
        ) from None
    except BaseException:
        database.close()
        raise


# ---------------------------------------------------------------- locks


def _lock(descriptor: int, byte: int) -> bool:
    try:
        fcntl.lockf(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB, 1, byte)
    except (BlockingIOError, PermissionError):
        return False
    return True


def _holder(descriptor: int, byte: int) -> int | None:
    """The pid of the process that has locked it (0 if it is of another PID namespace); None if nobody has."""
    query = struct.pack("hhqqi4x", fcntl.F_WRLCK, os.SEEK_SET, byte, 1, 0)
    kind, _, _, _, pid = struct.unpack("hhqqi4x", fcntl.fcntl(descriptor, fcntl.F_GETLK, query))
    return None if kind == fcntl.F_UNLCK else max(pid, 0)


def _take_job(directory: str, name: str) -> int:
    """The descriptor that holds the driver's lock.  Raises JobInUseError."""
    for made in (os.path.dirname(directory), directory):
        try:
            os.makedirs(made, 0o700, exist_ok=True)
        except FileExistsError:
            raise FileExistsError(
                errno.EEXIST,
                "this is no directory, and the results of a durable job lie in one of that name, beside the storage. "
                "Nothing was started. Move it away, or choose another init(storage=...)",
                made,
            ) from None
    for made in (os.path.dirname(directory), directory):
        found = os.lstat(made)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid() or found.st_mode & 0o022:
            raise PermissionError(
                f"{made} is not a directory that only you can write to; results are unpickled from it. It was not read."
            )
    flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC
    low = os.open(os.path.join(directory, "lock"), flags, 0o600)
    descriptor = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, object_store.HIGH_FD)
    os.close(low)  # Before there is a lock that this would drop.
    if not _lock(descriptor, _DRIVER):
        facts = _read_facts(descriptor)
        os.close(descriptor)
        raise JobInUseError(
            f"the job {name!r} is being run by another driver: pid {facts.get('pid', '?')} on "
            f"{facts.get('host', '?')}, since {facts.get('since', '?')} ({facts.get('entrypoint', '?')}). Nothing was "
            "started. Wait for it or end it, or give this run another job name."
        )
    try:
        deadline = time.monotonic() + GCS_END_S
        while (writing := _holder(descriptor, _GCS)) is not None:
            if time.monotonic() > deadline:
                raise JobInUseError(
                    f"the last run of the job {name!r} has ended, but its GCS (pid {writing}) has been writing results "
                    f"for {GCS_END_S:g} s. Nothing was started. Is the disk full? Try again when it has ended."
                )
            time.sleep(0.005)
        facts = {
            "pid": os.getpid(), "host": socket.gethostname(), "since": time.strftime("%Y-%m-%d %H:%M:%S"),
            "entrypoint": _entrypoint(),
        }  # fmt: skip
        text = json.dumps(facts).encode()
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, text, 0)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _read_facts(descriptor: int) -> dict[str, Any]:
    try:
        facts = json.loads(os.pread(descriptor, 10_000, 0))
    except ValueError:  # Being written.
        return {}
    return facts if isinstance(facts, dict) else {}


def _entrypoint() -> str:
    return " ".join(sys.argv)[:1000] or "python"


# ---------------------------------------------------------------- the driver, at init


def open_job(job: Any, storage: Any, version: str, root_id: bytes, session: str = "") -> OpenJob:
    """Takes the job, and reads what is known of it.

    Raises ValueError, OSError (bad names, paths, files) and JobInUseError, each with what to do."""
    name = check_name(job)
    path = storage_path(name, storage)
    with contextlib.closing(_open(path, create=True)) as database:
        directory = objects_directory(path, name)
        lock = _take_job(directory, name)
        try:
            database.execute("BEGIN IMMEDIATE")
            now_us = int(time.time() * 1e6)
            found = database.execute("SELECT no FROM jobs WHERE name = ?", (name,)).fetchone()
            made = "INSERT INTO jobs (name, created_us) VALUES (?, ?)"
            job_no = found[0] if found else int(database.execute(made, (name, now_us)).lastrowid or 0)
            _end_open_runs(database, job_no)
            known, troubles = _read(database, job_no, directory)
            row = (
                job_no, root_id, _RUNNING, os.getpid(), socket.gethostname(), session, _entrypoint(), version,
                sys.version.split()[0], now_us, len(known.results),
            )  # fmt: skip
            cursor = database.execute(
                "INSERT INTO runs (job_no, root_id, state, pid, host, session, entrypoint, minray_version, "
                "python_version, started_us, known) VALUES (?,?,?,?,?,?,?,?,?,?,?)",
                row,
            )
            database.execute("COMMIT")
        except sqlite3.DatabaseError as error:
            os.close(lock)
            raise ValueError(
                f"the storage {path} cannot be read: {error}. If it is damaged, `sqlite3 FILE .recover` salvages what "
                "can be; or choose another file, and all is run anew."
            ) from None
        except BaseException:
            os.close(lock)
            raise
        return OpenJob(name, path, job_no, int(cursor.lastrowid or 0), known, troubles, lock)


def _end_open_runs(database: sqlite3.Connection, job_no: int) -> None:
    """Runs whose driver and GCS were killed together: nobody else has closed their row."""
    database.execute(
        "UPDATE runs SET state = ?, finished_us = coalesce((SELECT max(finished_us) FROM results r WHERE r.run_no = "
        "runs.no), started_us) WHERE job_no = ? AND state = ?",
        (_FAILED, job_no, _RUNNING),
    )


class _Row(NamedTuple):
    """What a row of results says of its object."""

    version: bytes | None
    num_returns: int
    name: str
    actor: bytes | None
    after: bytes | None
    no: int


_READ = (
    "SELECT object_id, place, version, data, file, size_bytes, nested, name, num_returns, started_us, finished_us,"
    " actor, after, job_no, run_no, checksum, rowid FROM results WHERE job_no = ? ORDER BY rowid DESC"
)


def _read(database: sqlite3.Connection, job_no: int, directory: str) -> tuple[Known, list[str]]:
    """What can be used again; all other rows, and files of no row, are deleted."""
    objects: dict[bytes, KeptObject] = {}
    rows: dict[bytes, _Row] = {}  # by object, the newest first
    faults: list[tuple[int, bytes, str]] = []  # rowid, place, and what is wrong
    doomed: list[int] = []
    for row in database.execute(_READ, (job_no,)):
        object_id, place, version, data, file, size, nested, name, num_returns, _, _, actor, after = row[:13]
        fault = "" if row_checksum(row[:15]) == row[15] else "its row does not match its checksum"
        path = os.path.join(directory, file) if file and not fault else ""
        if path:
            fault = _fault_of(path, size)
            if actor and not fault and not _is_sound(path):
                fault = f"its file {path} is damaged"
        if fault or object_id in objects:
            doomed.append(row[16])
            if fault:
                faults.append((row[16], place, f"{name}(): {fault}"))
            continue
        pairs = tuple((nested[at : at + 16], nested[at + 16 : at + 32]) for at in range(0, len(nested), 32))
        objects[object_id] = KeptObject(place, path or data, size, pairs)
        rows[object_id] = _Row(version, num_returns, name, actor, after, row[16])
    whole = _whole(objects)
    faults += [
        (row.no, objects[object_id].place, f"{row.name}(): an object that its result refers to was not kept")
        for object_id, row in rows.items()
        if object_id not in whole
    ]
    known = _join(objects, rows, whole)
    used = {ids.return_id(kept.task_id, index) for kept in _all(known) for index in range(max(1, len(kept.values)))}
    doomed += [row.no for object_id, row in rows.items() if object_id not in used and object_id not in known.objects]
    database.executemany("DELETE FROM results WHERE rowid = ?", [(no,) for no in doomed])
    files = {value.data for kept in _all(known) for value in kept.values}
    files |= {value.data for value in known.objects.values()}
    for entry in os.scandir(directory):
        if entry.name != "lock" and entry.path not in files:
            os.unlink(entry.path)
    return known, _not_replaced(faults, known, rows)


def _not_replaced(faults: list[tuple[int, bytes, str]], known: Known, rows: dict[bytes, _Row]) -> list[str]:
    """Of what is damaged, what is missing now.  A newer result at its place (of the run that found the damage, or of
    other code) has replaced the rest: nobody would have asked for it."""
    newest = {kept.place: rows[ids.return_id(kept.task_id, 0)].no for kept in _all(known)}
    return [text for no, place, text in faults if no > newest.get(place, 0)]


def _all(known: Known) -> Iterator[KeptResult]:
    yield from known.results.values()
    yield from known.calls.values()


def _join(objects: dict[bytes, KeptObject], rows: dict[bytes, _Row], whole: set[bytes]) -> Known:
    """Objects to results: the newest of each place; and to chains of calls, from the actors that are among these."""
    results: dict[bytes, KeptResult] = {}
    later: dict[bytes, KeptResult] = {}  # calls, by the one before
    saved: dict[bytes, tuple[bytes, bytes]] = {}  # by actor: the last call in its checkpoint, and that
    for object_id, row in rows.items():
        if row.version is None:
            if row.actor is not None and row.after is not None and object_id in whole:
                saved[row.actor] = (row.after, object_id)
            continue
        parts = [ids.return_id(object_id, index) for index in range(row.num_returns)]
        if object_id[12:] == b"\0\0\0\0" and whole.issuperset(parts or [object_id]):
            place = objects[object_id].place
            kept = KeptResult(place, row.version, object_id, [objects[part] for part in parts])
            if row.after is not None:
                later.setdefault(row.after, kept)
            else:
                results.setdefault(place, kept)
    calls: dict[bytes, KeptResult] = {}
    checkpoints: dict[bytes, tuple[bytes, bytes]] = {}
    for origin in [kept.task_id for kept in results.values()]:
        last_saved, checkpoint = saved.get(origin, (b"", b""))
        before = origin
        while before in later:
            call = calls[before] = later[before]
            before = call.task_id
            if before == last_saved:
                checkpoints[before] = (checkpoint, origin)
    known = Known(results, {}, calls, checkpoints)
    pending = [origin for kept in _all(known) for value in kept.values for _, origin in value.nested]
    pending += [checkpoint for checkpoint, _ in checkpoints.values()]
    while pending:
        object_id = pending.pop()
        if object_id not in known.objects:
            known.objects[object_id] = objects[object_id]
            pending += [origin for _, origin in objects[object_id].nested]
    return known


def _fault_of(path: str, size: int) -> str:
    try:
        found = os.stat(path).st_size
    except OSError as error:
        return f"its file {path} cannot be found ({error.strerror})"
    return "" if found == object_store.file_size(size) else f"its file {path} is cut off: it has {found:,} bytes"


def _whole(objects: dict[bytes, KeptObject]) -> set[bytes]:
    """The objects all of whose inner objects are there.  A stack, not recursion: chains of refs can be long."""
    verdicts: dict[bytes, bool] = {}
    for first in objects:
        stack = [first]
        while stack:
            object_id = stack[-1]
            if object_id in verdicts:
                stack.pop()
                continue
            inner = [origin for _, origin in objects[object_id].nested]
            unknown = [origin for origin in inner if origin in objects and origin not in verdicts]
            if unknown:
                stack += unknown
                continue
            sound = (verdicts.get(origin, False) and _is_sound(objects[origin].data) for origin in inner)
            verdicts[object_id] = all(sound)
            stack.pop()
    return {object_id for object_id, whole in verdicts.items() if whole}


def _is_sound(data: bytes | str) -> bool:
    """Whether the bytes of what could not be made again alone are what they were."""
    if type(data) is str:
        try:
            object_store.map_file(data, lambda: None)
        except OSError:
            return False
    return True


# ---------------------------------------------------------------- the GCS


class JobWriter:
    """Writes kept results into a storage that is attached to the GCS's own connection."""

    TABLES = ("results", "runs")

    def __init__(self, database: sqlite3.Connection, config: dict[str, Any]) -> None:
        self.database = database
        self.job_no: int = config["job_no"]
        self.run_no: int = config["run_no"]
        self._directory: str = config["directory"]
        self._lock = os.open(os.path.join(self._directory, "lock"), os.O_RDWR | os.O_NOFOLLOW | os.O_CLOEXEC)
        fcntl.lockf(self._lock, fcntl.LOCK_EX, 1, _GCS)  # One that was killed has let go of it.
        database.execute("ATTACH DATABASE ? AS job", (config["path"],))
        database.execute("PRAGMA job.journal_mode=WAL")
        database.execute("PRAGMA job.synchronous=NORMAL")
        database.execute(  # We may take over from one that took its zygote's death for the driver's.
            "UPDATE job.runs SET state = ?, finished_us = NULL WHERE no = ? AND state = ?",
            (_RUNNING, self.run_no, _FAILED),
        )

    def write(self, table: str, rows: list[tuple[Any, ...]]) -> None:
        """Call it inside a transaction.  Sending a row twice does no harm."""
        if table == "runs":  # How the run ended: (state, finished_us, reused, ran)
            self.database.executemany(
                "UPDATE job.runs SET state = ?, finished_us = ?, reused = ?, ran = ? WHERE no = ?",
                [(*row, self.run_no) for row in rows],
            )
            return
        self.database.executemany(
            f"INSERT OR REPLACE INTO job.results VALUES ({','.join('?' * 16)})",
            [self._with_checksum(row) for row in rows],
        )

    def _with_checksum(self, row: tuple[Any, ...]) -> tuple[Any, ...]:
        object_id, place, version, data, file, *rest = row
        file = os.path.basename(file) if file is not None else None
        whole = (object_id, place, version, data, file, *rest, self.job_no, self.run_no)
        return (*whole, row_checksum(whole))

    def finish(self) -> None:
        """The driver is gone: if it did not say how its run ended, it was killed.  Call it inside a transaction."""
        self.database.execute(
            "UPDATE job.runs SET state = ?, finished_us = ? WHERE no = ? AND state = ?",
            (_FAILED, int(time.time() * 1e6), self.run_no, _RUNNING),
        )

    def close(self) -> None:
        os.close(self._lock)


# ---------------------------------------------------------------- for people


def describe(path: str) -> list[dict[str, Any]]:
    """The jobs of a storage, with their last run.  Raises as `_open`, and FileNotFoundError."""
    with _reading(path) as database:
        jobs = database.execute(
            "SELECT j.no, j.name, count(r.no) FROM jobs j LEFT JOIN runs r ON r.job_no = j.no GROUP BY j.no ORDER BY "
            "j.name"
        ).fetchall()
        return [
            {"job": name, **_last_run(database, no, path, name), "runs": count, **_kept(database, no, path)}
            for no, name, count in jobs
        ]


def runs(path: str, job: str) -> list[dict[str, Any]]:
    """Every run of a job, the newest last; [] if there is no such job."""
    with _reading(path) as database:
        cursor = database.execute(
            "SELECT r.no, r.state, r.started_us / 1000 start_time, r.finished_us / 1000 end_time, r.pid, r.host, "
            "r.known, r.reused, r.ran, (SELECT count(DISTINCT substr(object_id, 1, 12)) FROM results k WHERE k.run_no "
            "= r.no AND k.version IS NOT NULL) kept, r.entrypoint, r.session FROM runs r JOIN jobs j ON j.no = r.job_no"
            " WHERE j.name = ? ORDER BY r.no",
            (job,),
        )
        names = [column[0] for column in cursor.description]
        found = [dict(zip(names, row)) for row in cursor]
    for run in found:
        run["state"] = JOB_STATES[run["state"]]
    if found:
        found[-1]["state"] = _state_now(path, job, found[-1]["state"])
    return found


def kept_by_name(path: str, job: str) -> list[dict[str, Any]]:
    """Of each function: how many results are kept, their size, and how long they took to make."""
    with _reading(path) as database:
        cursor = database.execute(
            "SELECT k.name, count(DISTINCT substr(object_id, 1, 12)) results, sum(size_bytes) size_bytes, "
            "sum(finished_us - k.started_us) / max(1, num_returns) run_us FROM results k JOIN jobs j ON j.no = "
            "k.job_no WHERE j.name = ? GROUP BY 1 ORDER BY 4 DESC",
            (job,),
        )
        names = [column[0] for column in cursor.description]
        return [dict(zip(names, row)) for row in cursor]


def forget(path: str, job: str) -> int:
    """Drops a job with all that is kept of it; how many results these were.  Raises JobInUseError and LookupError."""
    if job not in [one["job"] for one in describe(path)]:
        raise LookupError(f"{path} holds no job {job!r}")
    directory = objects_directory(path, job)
    with contextlib.closing(_open(path, create=True)) as database:
        lock = _take_job(directory, job)
        try:
            database.execute("BEGIN IMMEDIATE")
            (no,) = database.execute("SELECT no FROM jobs WHERE name = ?", (job,)).fetchone()
            count = database.execute("DELETE FROM results WHERE job_no = ?", (no,)).rowcount
            database.execute("DELETE FROM runs WHERE job_no = ?", (no,))
            database.execute("DELETE FROM jobs WHERE no = ?", (no,))
            database.execute("COMMIT")
            database.execute("VACUUM")
            for entry in os.scandir(directory):
                if entry.name != "lock":  # Who waits for it now must not find another one.
                    os.unlink(entry.path)
        finally:
            os.close(lock)
    return count


@contextlib.contextmanager
def _reading(path: str) -> Iterator[sqlite3.Connection]:
    if not os.path.exists(path):
        raise FileNotFoundError(f"there is no storage {path}")
    with contextlib.closing(_open(path, create=False)) as database:
        yield database


def _state_now(path: str, job: str, state: str) -> str:
    """Whether a run that did not end is under way is what its lock says."""
    if state != "RUNNING":
        return state
    try:
        descriptor = os.open(os.path.join(objects_directory(path, job), "lock"), os.O_RDWR | os.O_CLOEXEC)
    except OSError:
        return "FAILED"
    try:
        return "FAILED" if _holder(descriptor, _DRIVER) is None else "RUNNING"
    finally:
        os.close(descriptor)


def _last_run(database: sqlite3.Connection, job_no: int, path: str, name: str) -> dict[str, Any]:
    row = database.execute(
        "SELECT state, started_us / 1000, finished_us / 1000 FROM runs WHERE job_no = ? ORDER BY no DESC LIMIT 1",
        (job_no,),
    ).fetchone()
    if row is None:
        return {"state": None, "start_time": None, "end_time": None}
    return {"state": _state_now(path, name, JOB_STATES[row[0]]), "start_time": row[1], "end_time": row[2]}


def _kept(database: sqlite3.Connection, job_no: int, path: str) -> dict[str, Any]:
    results, size_bytes = database.execute(
        "SELECT count(DISTINCT substr(object_id, 1, 12)), coalesce(sum(size_bytes), 0) FROM results WHERE job_no = ?",
        (job_no,),
    ).fetchone()
    return {"results": results, "size_bytes": size_bytes, "storage": path}
