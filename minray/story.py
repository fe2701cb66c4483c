"""What happened, in order of time: the story of one task, and the timeline of a session.

Owns `story` (everything the GCS file knows about one task, object, actor, group or worker), `tell` (the
same as lines of text) and `timeline` (Chrome's trace format, for chrome://tracing or
https://ui.perfetto.dev).

Reads the file through `minray.state`; ``address`` means what it means there.

Left out: a row for each state a task went through.  Recording them would double what is
written, and the three times of a task's row, with the events, tell the same.
"""

from __future__ import annotations

import json
import sqlite3
import time
from collections.abc import Iterator, Sequence
from typing import Any

from minray import ids
from minray.state import Row, find, reading, short_id


def story(id: str, address: str | None = None, timeout: float = 30) -> list[Row]:
    """What happened to a task (or an object's task, or an actor, or a worker), in order of time.

    Rows have ``time_us`` (None for what has no time of its own), ``kind`` and ``text``;
    `tell` makes lines of them.  Empty if no row has this ID.
    """
    with reading(address, timeout) as database:
        # An actor first: its creation is a task of the same ID.
        if about := find(database, "actor_view", "actor_id", id):
            rows = _story_of_actor(database, about)
        elif about := find(database, "task_view", "task_id", id):
            rows = _story_of_task(database, about)
        elif about := find(database, "object_view", "object_id", id):
            rows = list(_story_of_object(about))
            if maker := find(database, "task_view", "task_id", about["task_id"]):
                rows += _story_of_task(database, maker)
            else:  # The driver has put it.
                rows += _events(database, about["object_id"])
        elif about := find(database, "placement_group_view", "placement_group_id", id):
            rows = list(_story_of_group(about)) + _events(database, about["placement_group_id"])
        elif about := find(database, "worker_view", "worker_id", id):
            rows = list(_story_of_worker(database, about))
        elif "." in id:  # A small result has no row of its own; its task has.
            return story(id.partition(".")[0], address, timeout)
        else:
            return []
    # Stable: what has no time (arguments, children) stays behind what came before it.
    latest, keyed = 0, []
    for row in rows:
        latest = row["time_us"] or latest
        keyed.append((latest, row))
    return [row for _, row in sorted(keyed, key=lambda pair: pair[0])]


def tell(rows: Sequence[Row]) -> Iterator[str]:
    """A story as lines of text, with times counted from its beginning."""
    times = [row["time_us"] for row in rows if row["time_us"] is not None]
    if times:
        second, fraction = divmod(times[0], 1_000_000)
        yield time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(second)) + f".{fraction:06d}"
    for row in rows:
        at = "" if row["time_us"] is None else f"+{(row['time_us'] - times[0]) / 1000:.3f} ms"
        yield f"{at:>14}  {row['text']}"


def timeline(
    filename: str | None = None, address: str | None = None, timeout: float = 30
) -> list[dict[str, Any]] | None:
    """The session's tasks as Chrome trace events: one row a worker, arrows from parent to child.

    Writes them to ``filename`` as JSON, or returns them if that is None.  A worker that
    runs several tasks at once (an actor with threads) gets a row for each.

    >>> from minray import story
    >>> story.timeline("timeline.json")  # doctest: +SKIP
    """
    with reading(address, timeout) as database:
        events = list(_trace(database))
    if filename is None:
        return events
    with open(filename, "w") as file:
        json.dump(events, file)
    return None


def _trace(database: sqlite3.Connection) -> Iterator[dict[str, Any]]:
    (end_us,) = database.execute(
        "SELECT max(coalesce(max(started_us), 0), coalesce(max(finished_us), 0)) FROM tasks"
    ).fetchone()
    host = database.execute("SELECT host FROM nodes").fetchone() or ("this machine",)
    yield {"ph": "M", "name": "process_name", "pid": 1, "args": {"name": f"minray on {host[0]}"}}
    labels = {
        no: f"{class_name or 'worker'} (pid {pid})"
        for no, pid, class_name in database.execute(
            "SELECT w.no, w.pid, a.class_name FROM workers w LEFT JOIN actors a ON a.no = w.actor_no"
        )
    }
    lanes: dict[int, list[int]] = {}  # Of each worker: when the last task of each of its rows ended.
    placed: dict[int, tuple[int, int, int]] = {}  # Of each task: its row, start and end.
    tasks = database.execute(
        "SELECT t.no, t.parent_no, t.worker_no, t.submitted_us, t.started_us, t.finished_us, v.name, v.state,"
        " v.task_id FROM tasks t JOIN task_view v ON v.no = t.no WHERE t.started_us IS NOT NULL"
        " ORDER BY t.started_us, t.no"
    )
    for no, parent_no, worker_no, submitted_us, started_us, finished_us, name, state, task_id in tasks:
        ends = lanes.setdefault(worker_no or 0, [])
        lane = next((i for i, end in enumerate(ends) if end <= started_us), len(ends))
        row = (worker_no or 0) * 1000 + lane
        if lane == len(ends):
            ends.append(0)
            label = labels.get(worker_no, "worker")
            yield {"ph": "M", "name": "thread_name", "pid": 1, "tid": row, "args": {"name": label}}
        until = ends[lane] = finished_us or end_us  # One that still runs ends where the file ends.
        placed[no] = row, started_us, until
        where = {"pid": 1, "tid": row, "cat": "task"}
        about = {"task_id": short_id(task_id), "state": state, "waited_us": started_us - submitted_us}
        yield {**where, "ph": "X", "name": name, "ts": started_us, "dur": until - started_us, "args": about}
        if parent_no in placed:  # A parent starts before its child, so it has been met.
            parent_row, begin, end = placed[parent_no]
            arrow = {"pid": 1, "cat": "submit", "name": "submit", "id": no}
            at = min(max(submitted_us, begin), end)
            yield {**arrow, "ph": "s", "tid": parent_row, "ts": at}
            yield {**arrow, "ph": "f", "bp": "e", "tid": row, "ts": started_us}


def _entry(time_us: int | None, kind: str, text: str) -> Row:
    return Row(time_us=time_us, kind=kind, text=text)


_WAITS_FOR_RESOURCES = ": waits for resources that others hold (minray ps, minray actors)"


def _story_of_task(database: sqlite3.Connection, about: Row) -> list[Row]:
    no = about["no"]
    parent_no, deps, submitted_us, started_us, finished_us = database.execute(
        "SELECT parent_no, deps, submitted_us, started_us, finished_us FROM tasks WHERE no = ?", (no,)
    ).fetchone()
    parent = database.execute("SELECT name, task_id FROM task_view WHERE no = ?", (parent_no,)).fetchone()
    by = f"{parent[0]}() [{short_id(parent[1])}]" if parent else "a task" if parent_no else "the driver"
    needs = ", ".join(f"{amount:g} {name}" for name, amount in (about["required_resources"] or {}).items())
    text = f"task {short_id(about['task_id'])}: {about['name']}() was submitted by {by}"
    rows = [_entry(submitted_us, "submitted", text + (f", needs {needs}" if needs else ""))]
    for i in range(0, len(deps or b""), ids.ID_BYTES):
        object_id = deps[i : i + ids.ID_BYTES]
        maker = database.execute(
            "SELECT o.name FROM tasks t JOIN options o ON o.no = t.options_no WHERE t.task_id = ?",
            (ids.task_of(object_id),),
        ).fetchone()
        origin = "put" if ids.is_put(object_id) else f"a result of {maker[0]}()" if maker else "a result"
        rows.append(_entry(None, "argument", f"takes object {ids.short(object_id)}, {origin}"))
    rows += _events(database, about["task_id"], with_objects=True)
    if about["actor_id"]:  # What befell its actor meanwhile.
        until = finished_us or time.time_ns() // 1000
        rows += [row for row in _events(database, about["actor_id"]) if submitted_us <= row["time_us"] <= until]
    if started_us:
        attempt = f", attempt {about['attempt_number'] + 1}" if about["attempt_number"] else ""
        worker = about["worker_id"]
        where = f"{short_id(worker)} (pid {about['worker_pid']})" if worker else "a worker"
        if about["actor_id"]:
            where += f", actor {short_id(about['actor_id'])}"
        rows.append(_entry(started_us, "started", f"began to run on {where}{attempt}"))
    for object_id, size, location, state in database.execute(
        "SELECT object_id, object_size, location, state FROM object_view WHERE no IN"
        " (SELECT no FROM objects WHERE task_no = ? LIMIT 10)",
        (no,),
    ):
        text = f"made object {short_id(object_id)}: {size} bytes, {location}, {state}"
        rows.append(_entry(None, "object", text))
    for name, state, count in database.execute(
        "SELECT name, state, count(*) FROM task_view WHERE no IN (SELECT no FROM tasks WHERE parent_no = ?)"
        " GROUP BY 1, 2",
        (no,),
    ):
        rows.append(_entry(None, "children", f"submitted {count} x {name}(), now {state}"))
    for name, state, count in database.execute(
        "SELECT name, state, count(*) FROM task_view WHERE no IN (SELECT no FROM tasks WHERE instr(deps, ?))"
        " GROUP BY 1, 2",
        (bytes.fromhex(about["task_id"])[:12],),  # What it returned or put, whichever that is.
    ):
        rows.append(_entry(None, "taken", f"what it made is waited for by {count} x {name}(), now {state}"))
    if finished_us:
        ran = f" after {about['run_us'] / 1000:.3f} ms" if about["run_us"] is not None else ""
        made = f", {about['result_bytes']} bytes of results" if about["result_bytes"] is not None else ""
        failed = about["state"] == "FAILED"
        text = f"failed{ran}: {about['error_message']}" if failed else f"finished{ran}{made}"
        if not failed and not started_us:
            text += ", not run: an earlier run of the job had finished it"
        rows.append(_entry(finished_us, about["state"].lower(), text))
    else:
        waits = ""
        if about["state"] == "PENDING_NODE_ASSIGNMENT":
            of_an_actor = about["type"] == "ACTOR_TASK"
            waits = f": waits for its actor {short_id(about['actor_id'])}" if of_an_actor else _WAITS_FOR_RESOURCES
        rows.append(_entry(None, "state", f"is {about['state']}{waits}"))
    return rows


def _story_of_actor(database: sqlite3.Connection, about: Row) -> list[Row]:
    name = f" {about['name']!r}" if about["name"] else ""
    created = f"actor {short_id(about['actor_id'])}: {about['class_name']}{name} was asked for"
    rows = [_entry(about["start_time_ms"] * 1000, "created", created)]
    rows += _events(database, about["actor_id"])
    queued = False  # Its constructor is, so it has no process yet.
    for method, state, count in database.execute(
        "SELECT name, state, count(*) FROM task_view WHERE no IN (SELECT no FROM tasks WHERE actor_no = ?)"
        " GROUP BY 1, 2",
        (about["no"],),
    ):
        rows.append(_entry(None, "calls", f"{count} x {method}(), now {state}"))
        queued |= method.endswith(".__init__") and state == "PENDING_NODE_ASSIGNMENT"
    if about["end_time_ms"]:
        rows.append(_entry(about["end_time_ms"] * 1000, "dead", f"died: {about['death_cause']}"))
    else:
        at = f" (pid {about['pid']})" if about["pid"] else _WAITS_FOR_RESOURCES if queued else ""
        rows.append(_entry(None, "state", f"is {about['state']}{at}"))
    return rows


def _story_of_worker(database: sqlite3.Connection, about: Row) -> Iterator[Row]:
    text = f"{short_id(about['worker_id'])} started, pid {about['pid']}"
    if about["actor_id"]:
        text += f", for actor {short_id(about['actor_id'])}"
    yield _entry(about["start_time_ms"] * 1000, "started", text)
    for name, state, count in database.execute(
        "SELECT name, state, count(*) FROM task_view WHERE no IN (SELECT no FROM tasks WHERE worker_no = ?)"
        " GROUP BY 1, 2",
        (about["no"],),
    ):
        yield _entry(None, "tasks", f"was given {count} x {name}(), now {state}")
    yield from (row for row in _events(database, about["worker_id"]) if row["kind"] != "worker_died")
    if about["end_time_ms"]:
        yield _entry(about["end_time_ms"] * 1000, "dead", f"died: {about['exit_detail']}")


def _story_of_object(about: Row) -> Iterator[Row]:
    at = about["creation_time_ms"]
    text = f"object {short_id(about['object_id'])}: {about['object_size']} bytes, {about['location']}"
    yield _entry(at and at * 1000, "object", text)
    if about["end_time_ms"]:
        yield _entry(about["end_time_ms"] * 1000, "freed", f"is {about['state']}: nothing needs it any more")


def _story_of_group(about: Row) -> Iterator[Row]:
    name = f"{about['name']!r} " if about["name"] else ""
    text = f"placement group {name}{short_id(about['placement_group_id'])}: {about['strategy']} of {about['bundles']}"
    yield _entry(about["start_time_ms"] * 1000, "placement_group", text)
    if about["placed_time_ms"]:
        yield _entry(about["placed_time_ms"] * 1000, "placed", "was placed: what its bundles ask for is reserved")


_OF_OBJECTS = {
    "object_lost": "object {id} was lost: {message}",
    "object_not_rebuilt": "object {id} cannot be made again: {message}",
}
"""Events whose subject is an object, in the story of the task that made it."""


def _events(database: sqlite3.Connection, subject: str, with_objects: bool = False) -> list[Row]:
    """`with_objects`: those of what the task `subject` returned or put, too."""
    query = "SELECT time_us, kind, message, subject FROM events WHERE "
    if with_objects:
        found = database.execute(query + "substr(subject, 1, 24) = ? ORDER BY no", (subject[:24],))
    else:
        found = database.execute(query + "subject = ? ORDER BY no", (subject,))
    return [
        _entry(at, kind, _OF_OBJECTS.get(kind, "{message}").format(id=short_id(about), message=message))
        for at, kind, message, about in found
    ]
