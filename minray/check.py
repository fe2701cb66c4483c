"""Is a file of minray's whole?  ``minray check``: what is damaged, what that costs, and what can be done.

Owns how a session's GCS file, and the storage of durable jobs, are examined:

1. their form, by SQLite's own ``integrity_check`` (pages, trees, indexes, free space);
2. the tables and views that they should have;
3. every row against its checksum (see `minray.checksum`);
4. the write-ahead log that a killed GCS has left.  SQLite replays it up to the first frame that is not
   as it was written, and says nothing of those behind it;
5. of a storage, the files of large results.

Reads only, so it may be asked of a live session too.

What nothing can find: a log whose end is missing in whole transactions (a power cut may take the last
ones, see `minray.gcs`), and damage to the very last transaction in a log, which looks like a kill in
the middle of writing it; and rows that were true once, with their checksums, in place of today's: a free
page, which keeps what it held, copied over the one page of its small table.
"""

from __future__ import annotations

import contextlib
import os
import sqlite3
import struct
from collections.abc import Iterator
from typing import NamedTuple
from urllib.parse import quote

from minray.checksum import row_checksum
from minray.schema import SCHEMA_VERSION, SQL_FILE, STORAGE_TABLES, STORAGE_VERSION

MOST_NAMED = 10
"""So many rows of a table, or faults of SQLite's, are named; the others are counted."""


class Report(NamedTuple):
    path: str
    rows: int
    """How many match their checksum."""
    faults: list[str]
    """Nothing is wrong if this is empty."""
    advice: str


def check_file(path: str) -> Report:
    """Raises OSError if there is no such file, or it cannot be read."""
    with open(path, "rb"):
        pass
    faults: list[str] = []
    rows, is_storage = 0, False
    database = sqlite3.connect(f"file:{quote(os.path.abspath(path))}?mode=ro", uri=True, timeout=30)
    # Text that is no text any more fails its checksum, and nothing else.
    database.text_factory = lambda data: data.decode(errors="surrogateescape")
    with contextlib.closing(database):
        try:
            is_storage = _is_storage(database)
            faults += _faults_of_form(database)
            faults += _faults_of_schema(database, is_storage)
            for table in _tables(database):
                matching, fault = _check_rows(database, table)
                rows += matching
                faults += fault
            if is_storage:
                faults += _faults_of_files(database, path)
        except (sqlite3.DatabaseError, UnicodeError) as error:  # Its messages quote what it finds.
            text = f"SQLite cannot read on: {error}"
            faults += [text] if text not in faults else []
    faults += _faults_of_log(path)
    return Report(path, rows, faults, _advice(path, is_storage) if faults else "")


def _is_storage(database: sqlite3.Connection) -> bool:
    from minray.job_storage import APPLICATION_ID

    (application,) = database.execute("PRAGMA application_id").fetchone()
    return bool(application == APPLICATION_ID)


def _faults_of_form(database: sqlite3.Connection) -> list[str]:
    found = [text for (text,) in database.execute("PRAGMA integrity_check") if text != "ok"]
    more = [f"SQLite finds {len(found) - MOST_NAMED} more faults"] if len(found) > MOST_NAMED else []
    return [f"SQLite: {' '.join(text.split())}" for text in found[:MOST_NAMED]] + more


def _faults_of_schema(database: sqlite3.Connection, is_storage: bool) -> list[str]:
    from minray.job_storage import create_sql

    wanted = STORAGE_VERSION if is_storage else SCHEMA_VERSION
    (version,) = database.execute("PRAGMA user_version").fetchone()
    if version != wanted:
        return [f"its format is version {version}, and this minray knows version {wanted}"]
    query = "SELECT type, name, sql FROM sqlite_master"
    with contextlib.closing(sqlite3.connect(":memory:")) as new:
        new.executescript(create_sql(STORAGE_TABLES) if is_storage else SQL_FILE.read_text())
        right = {(kind, name): sql for kind, name, sql in new.execute(query)}
    there = {(kind, name): sql for kind, name, sql in database.execute(query)}
    return [
        f"{kind} {name} is not as minray made it" if (kind, name) in right else f"there is an unknown {kind} {name}"
        for kind, name in sorted(right.keys() | there.keys())
        if right.get((kind, name)) != there.get((kind, name))
    ]


def _tables(database: sqlite3.Connection) -> Iterator[str]:
    for (table,) in database.execute("SELECT name FROM sqlite_master WHERE type = 'table'").fetchall():
        columns = [name for (name,) in database.execute("SELECT name FROM pragma_table_info(?)", (table,))]
        if columns and columns[-1] == "checksum":
            yield table


def _check_rows(database: sqlite3.Connection, table: str) -> tuple[int, list[str]]:
    """How many rows are whole, and which are not."""
    good, bad, faults = 0, [], []
    quoted = table.replace('"', '""')
    try:
        for rowid, *row, checksum in database.execute(f'SELECT rowid, * FROM "{quoted}"'):
            if row_checksum(tuple(row)) == checksum:
                good += 1
            else:
                bad.append(rowid)
    except (sqlite3.DatabaseError, UnicodeError) as error:
        faults.append(f"table {table}: SQLite cannot read behind {good + len(bad)} rows: {error}")
    if bad:
        named = ", ".join(map(str, bad[:MOST_NAMED])) + (", …" if len(bad) > MOST_NAMED else "")
        are = "row does not match its checksum" if len(bad) == 1 else "rows do not match their checksums"
        faults.append(f"table {table}: {len(bad)} {are} (rowid {named})")
    return good, faults


def _faults_of_files(database: sqlite3.Connection, path: str) -> list[str]:
    from minray.job_storage import objects_directory
    from minray.object_store import map_file

    faults = []
    query = "SELECT j.name, r.file FROM results r JOIN jobs j ON j.no = r.job_no WHERE r.file IS NOT NULL"
    for job, file in database.execute(query):
        try:
            map_file(os.path.join(objects_directory(path, job), file), lambda: None)
        except (OSError, ValueError) as error:
            faults.append(f"job {job}: the file {file!r} of a result: {getattr(error, 'strerror', None) or error}")
    return faults


# ---------------------------------------------------------------- the write-ahead log


def _faults_of_log(path: str) -> list[str]:
    seen = set()
    for _ in range(2):  # A live GCS may begin it anew while it is read: then the second look finds something else.
        try:
            with open(f"{path}-wal", "rb") as file:
                seen.add(fault_of_log(file.read()))
        except FileNotFoundError:
            return []
    return [fault for fault in seen if fault and len(seen) == 1]


def fault_of_log(data: bytes) -> str:
    """What is wrong with SQLite's write-ahead log; '' if all that was committed in it will be replayed.

    The format is at https://www.sqlite.org/walformat.html: a header of 32 bytes, and frames of 24 bytes and
    a page each.  The salts (bytes 16 to 24 of the header, 8 to 16 of a frame) tell frames of the last round.  A
    bad frame with none behind it is what a kill in the middle of a commit leaves.
    """
    if len(data) <= 32:
        return ""
    magic, page_bytes = struct.unpack_from(">I4xI", data)
    salts, sums = data[16:24], struct.unpack_from(">2I", data, 24)
    order = ">" if magic & 1 else "<"
    if magic & ~1 != 0x377F0682 or _log_checksum(data[:24], (0, 0), order) != sums or not page_bytes:
        return f"the header of its write-ahead log is damaged: nothing of the log's {len(data):,} bytes is replayed"
    running: tuple[int, int] = sums
    bad = None
    for at in range(32, len(data) - 24 - page_bytes + 1, 24 + page_bytes):
        of_this_round = data[at + 8 : at + 16] == salts
        if bad is None:
            running = _log_checksum(data[at : at + 8], running, order)
            running = _log_checksum(data[at + 24 : at + 24 + page_bytes], running, order)
            if not of_this_round or struct.unpack_from(">2I", data, at + 16) != running:
                bad = at
        elif of_this_round:
            return f"its write-ahead log is damaged at byte {bad:,}: nothing of what was written after that is replayed"
    return ""


def _log_checksum(data: bytes, sums: tuple[int, int], order: str) -> tuple[int, int]:
    first, second = sums
    words = struct.unpack(f"{order}{len(data) // 4}I", data)
    for even, odd in zip(words[::2], words[1::2]):
        first = (first + even + second) & 0xFFFFFFFF
        second = (second + odd + first) & 0xFFFFFFFF
    return first, second


# ---------------------------------------------------------------- what to do


def _advice(path: str, is_storage: bool) -> str:
    if is_storage:
        return (
            "What is named above is not used: a run of the job makes those results anew, and keeps them. Where SQLite "
            f"itself cannot read: salvage what it can while no job runs (sqlite3 {path} .recover | sqlite3 NEW), or "
            f"delete the file and {path}.objects; then all is run anew."
        )
    directory = os.path.dirname(os.path.abspath(path))
    if not os.path.isfile(os.path.join(directory, "session.json")):  # It may be anything, among anything.
        return (
            "It lies in no session's directory, and may be no file of minray's. If it is one, salvage what can be "
            f"read: sqlite3 {path} .recover | sqlite3 NEW"
        )
    return (
        "This is the history of one session, and no result depends on it: what is named above is lost to `minray "
        "tasks` and its kind, and to nothing else. Look at the rest; or salvage what can be read "
        f"(sqlite3 {path} .recover | sqlite3 NEW); or delete {directory}."
    )
