"""What a session did and does, read from its GCS file: Ray's state API.

Owns the questions (`list_tasks`, `get_actor`, `summarize_tasks`, ...; what happened in
order of time is `minray.story`'s).  Every function opens
the SQLite file read-only and closes it again: nothing is asked of the node, so the
answers are the same for a live session, a finished one, and one that was killed.

``address`` says which session: None (or "auto") is this driver's own if there is one,
else the newest on this machine; anything else is a session's name or a part of it, its
directory, or the path of a ``gcs.sqlite``.  In the driver's own session what the node
has decided is first written out (bounded by ``timeout`` seconds), so a task that
`minray.get` has returned is listed as FINISHED; inside a task, the file may be 0.05 s behind.

Rows are dicts whose keys are also attributes: ``row["state"]`` or ``row.state``.  IDs are
hex strings; where an ID is asked for, its short form or a start of its hex will do.
Times are in milliseconds since the epoch (``_ms``), durations in microseconds (``_us``).

Left out of Ray's: list_runtime_envs and list_cluster_events (`list_events` has the
latter's place), and ``raise_on_missing_output``: accepted, nothing is ever missing
silently: lists say in their docs what they keep, summaries count everything.
"""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import sys
from collections.abc import Iterator, Sequence
from typing import Any

from minray import ids
from minray.schema import SCHEMA_VERSION, VIEWS

Filter = tuple[str, str, Any]

_PREDICATES = ("=", "!=", "<", "<=", ">", ">=")
_BOOLEANS = ("is_alive", "is_detached", "is_head_node")
_JSON = ("required_resources", "resources", "resources_total", "bundles", "labels")


class NoSessionError(LookupError):
    """There is no session to read, or its file is not a GCS file of this version."""


class Row(dict[str, Any]):
    """One row of an answer: a dict whose keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"this row has no column {name!r}; it has {', '.join(self)}") from None


def list_tasks(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The newest tasks that pass all ``filters``, the oldest of them first.

    A filter is ``(column, predicate, value)`` with a predicate of ``= != < <= > >=``;
    text is compared without regard to case.  All unfinished tasks and the newest 100,000
    finished ones can be listed.

    Raises `NoSessionError`, and ValueError for a filter that makes no sense.

    >>> from minray import state
    >>> state.list_tasks(filters=[("state", "=", "FAILED")])  # doctest: +SKIP
    [{'no': 7, 'task_id': '9c1f...', 'name': 'resize', 'state': 'FAILED', ...}]
    """
    return _list("task_view", address, filters, limit, timeout, detail)


def list_actors(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The newest actors, dead ones too; see `list_tasks`."""
    return _list("actor_view", address, filters, limit, timeout, detail)


def list_objects(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The newest objects that were put or are too large for a message; see `list_tasks`."""
    return _list("object_view", address, filters, limit, timeout, detail)


def list_workers(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The newest worker processes, dead ones too; see `list_tasks`."""
    return _list("worker_view", address, filters, limit, timeout, detail)


def list_nodes(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The nodes; see `list_tasks`."""
    return _list("node_view", address, filters, limit, timeout, detail)


def list_placement_groups(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The newest placement groups, removed ones too; see `list_tasks`."""
    return _list("placement_group_view", address, filters, limit, timeout, detail)


def list_jobs(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
    raise_on_missing_output: bool = True,
) -> list[Row]:
    """The jobs of the session; see `list_tasks`."""
    return _list("job_view", address, filters, limit, timeout, detail)


def list_events(
    address: str | None = None,
    filters: Sequence[Filter] | None = None,
    limit: int = 100,
    timeout: float = 30,
    detail: bool = False,
) -> list[Row]:
    """The newest events: retries, crashes, losses and the like; see `list_tasks`."""
    return _list("event_view", address, filters, limit, timeout, detail)


def get_task(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one task, by its ID (or short form); None if no row has it."""
    return _get("task_view", "task_id", id, address, timeout)


def get_actor(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one actor, by its ID (or short form); None if no row has it."""
    return _get("actor_view", "actor_id", id, address, timeout)


def get_object(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one object, by its ID (or short form); None if no row has it."""
    return _get("object_view", "object_id", id, address, timeout)


def get_objects(id: str, address: str | None = None, timeout: float = 30) -> list[Row]:
    """`get_object` in Ray's form: a list."""
    return _list("object_view", address, [("object_id", "=", id)], 100, timeout, detail=True)


def get_worker(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one worker, by its ID or a start of it; None if no row has it."""
    return _get("worker_view", "worker_id", id, address, timeout)


def get_node(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one node, by its ID or a start of it; None if no row has it."""
    return _get("node_view", "node_id", id, address, timeout)


def get_placement_group(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one placement group, by its ID (or short form); None if no row has it."""
    return _get("placement_group_view", "placement_group_id", id, address, timeout)


def get_job(id: str, address: str | None = None, timeout: float = 30) -> Row | None:
    """All about one job, by its ID or a start of it; None if no row has it."""
    return _get("job_view", "job_id", id, address, timeout)


def summarize_tasks(address: str | None = None, timeout: float = 30) -> dict[str, Any]:
    """Counts of tasks by function and state.  Exact: deleted rows are counted too.

    ``["cluster"]["summary"]`` maps a function's name to its ``type``, ``state_counts``, and
    (ours) ``run_us`` in all and ``longest_us`` of its ended tasks.

    >>> from minray import state
    >>> state.summarize_tasks()["cluster"]["summary"]["resize"]["state_counts"]  # doctest: +SKIP
    {'FAILED': 1, 'FINISHED': 999}
    """
    functions: dict[str, dict[str, Any]] = {}
    totals = {"NORMAL_TASK": 0, "ACTOR_TASK": 0, "ACTOR_CREATION_TASK": 0}
    with reading(address, timeout) as database:
        for name, kind, state, tasks, run_us, longest_us in database.execute("SELECT * FROM function_view"):
            about = functions.setdefault(
                name,
                {"func_or_class_name": name, "type": kind, "state_counts": {}, "run_us": 0, "longest_us": 0},
            )
            counts = about["state_counts"]
            counts[state] = counts.get(state, 0) + tasks
            about["run_us"] += run_us
            about["longest_us"] = max(about["longest_us"], longest_us or 0)
            if kind in totals:
                totals[kind] += tasks
    return _summary(
        functions,
        "func_name",
        total_tasks=totals["NORMAL_TASK"],
        total_actor_tasks=totals["ACTOR_TASK"],
        total_actor_scheduled=totals["ACTOR_CREATION_TASK"],
    )


def summarize_actors(address: str | None = None, timeout: float = 30) -> dict[str, Any]:
    """Counts of actors by class and state, in the form of `summarize_tasks`."""
    classes: dict[str, dict[str, Any]] = {}
    with reading(address, timeout) as database:
        for name, state, actors in database.execute(
            "SELECT class_name, state, count(*) FROM actor_view GROUP BY 1, 2 ORDER BY min(no)"
        ):
            about = classes.setdefault(name, {"class_name": name, "state_counts": {}})
            about["state_counts"][state] = actors
    total = sum(sum(about["state_counts"].values()) for about in classes.values())
    return _summary(classes, "class", total_actors=total)


def summarize_placement_groups(address: str | None = None, timeout: float = 30) -> dict[str, Any]:
    """Counts of placement groups by strategy and state, in the form of `summarize_tasks`."""
    strategies: dict[str, dict[str, Any]] = {}
    with reading(address, timeout) as database:
        for strategy, state, groups in database.execute(
            "SELECT strategy, state, count(*) FROM placement_group_view GROUP BY 1, 2 ORDER BY min(no)"
        ):
            about = strategies.setdefault(strategy, {"strategy": strategy, "state_counts": {}})
            about["state_counts"][state] = groups
    total = sum(sum(about["state_counts"].values()) for about in strategies.values())
    return _summary(strategies, "strategy", total_placement_groups=total)


def summarize_objects(address: str | None = None, timeout: float = 30) -> dict[str, Any]:
    """Live objects by the task that made them: how many, how large, and where they are.

    Objects freed are counted in ``total_freed``, those whose rows were deleted too; not those that were
    freed before they were written down (within 0.05 s).
    """
    makers: dict[str, dict[str, Any]] = {}
    with reading(address, timeout) as database:
        for made_by, task, location, state, objects, size_bytes in database.execute(
            "SELECT made_by, coalesce(task_name, 'driver'), location, state, count(*),"
            " coalesce(sum(object_size), 0) FROM object_view WHERE state NOT IN ('FREED', 'LOST')"
            " GROUP BY 1, 2, 3, 4 ORDER BY min(no)"
        ):
            about = makers.setdefault(
                f"{made_by} by {task}",
                {"total_objects": 0, "total_size_mb": 0.0, "state_counts": {}, "location_counts": {}},
            )
            about["total_objects"] += objects
            about["total_size_mb"] += size_bytes / 1e6
            for counts, key in ((about["state_counts"], state), (about["location_counts"], location)):
                counts[key] = counts.get(key, 0) + objects
        (freed,) = database.execute(
            "SELECT (SELECT count(*) FROM objects WHERE freed_us IS NOT NULL)"
            " + (SELECT coalesce(sum(objects), 0) FROM object_totals)"
        ).fetchone()
    return _summary(
        makers,
        "callsite",
        total_objects=sum(about["total_objects"] for about in makers.values()),
        total_size_mb=sum(about["total_size_mb"] for about in makers.values()),
        total_freed=freed,
    )


@contextlib.contextmanager
def reading(address: str | None = None, timeout: float = 30) -> Iterator[sqlite3.Connection]:
    """A read-only connection to a session's GCS file; it has a function ``short_id(hex or blob)``."""
    path = gcs_file(address, timeout)
    try:
        database = sqlite3.connect(f"file:{_quoted(path)}?mode=ro", uri=True, timeout=timeout)
    except sqlite3.OperationalError as error:
        raise NoSessionError(f"cannot open {path}: {error}") from error
    try:
        try:
            (version,) = database.execute("PRAGMA user_version").fetchone()
        except sqlite3.DatabaseError as error:
            raise NoSessionError(f"cannot read {path}: {error}") from error
        if version != SCHEMA_VERSION:
            raise NoSessionError(
                f"{path} has schema version {version}, this minray reads version {SCHEMA_VERSION}."
                " Any SQLite tool can still read it."
            )
        database.create_function("short_id", 1, short_id, deterministic=True)
        database.create_function("id_matches", 2, _matches, deterministic=True)
        yield database
    finally:
        database.close()


def gcs_file(address: str | None = None, timeout: float = 30) -> str:
    """The path of the GCS file that ``address`` means; see the top of this module."""
    if address in (None, "auto"):
        # A program that never imported the API has no session of its own.
        api = sys.modules.get("minray.api")
        own: str | None = api.flush_records(timeout) if api else None
        if own:
            return own
    elif os.path.isfile(str(address)):
        return str(address)
    from minray import session

    directory = session.find(None if address == "auto" else address, with_file="gcs.sqlite")
    path = os.path.join(directory or "", "gcs.sqlite")
    if directory is None or not os.path.isfile(path):
        wanted = "no session" if address in (None, "auto") else f"no session {address!r}"
        raise NoSessionError(
            f"{wanted} found under {session.default_root()}. A session begins with minray.init();"
            " the newest finished ones are kept there too."
        )
    return path


def _list(
    view: str,
    address: str | None,
    filters: Sequence[Filter] | None,
    limit: int,
    timeout: float,
    detail: bool,
) -> list[Row]:
    with reading(address, timeout) as database:
        return _select(database, view, filters or (), limit, detail)


def _get(view: str, column: str, id: str, address: str | None, timeout: float) -> Row | None:
    with reading(address, timeout) as database:
        return find(database, view, column, id)


def find(database: sqlite3.Connection, view: str, column: str, id: str) -> Row | None:
    """The newest row of a view whose ID column matches, with all its details."""
    rows = _select(database, view, [(column, "=", id)], 1, detail=True)
    return rows[0] if rows else None


def _columns(database: sqlite3.Connection, view: str) -> list[str]:
    return [name for (name,) in database.execute("SELECT name FROM pragma_table_info(?)", (view,))]


def _select(
    database: sqlite3.Connection, view: str, filters: Sequence[Filter], limit: int, detail: bool
) -> list[Row]:
    columns = _columns(database, view)
    conditions, values = ["1"], []
    for one in filters:
        condition, value = _condition(columns, one)
        conditions.append(condition)
        values.append(value)
    shown = [name for name in columns if detail or name not in VIEWS[view].details]
    cursor = database.execute(
        f"SELECT {', '.join(shown)} FROM {view} WHERE {' AND '.join(conditions)} ORDER BY no DESC LIMIT ?",
        (*values, limit),
    )
    return [_row(shown, values) for values in reversed(cursor.fetchall())]


def _row(columns: list[str], values: tuple[Any, ...]) -> Row:
    row = Row(zip(columns, values))
    for name in _BOOLEANS:
        if name in row:
            row[name] = bool(row[name])
    for name in _JSON:
        if row.get(name):
            row[name] = json.loads(row[name])
    return row


def _condition(columns: list[str], one: Filter) -> tuple[str, Any]:
    try:
        column, predicate, value = one
    except (TypeError, ValueError):
        raise ValueError(f'a filter is a tuple like ("state", "=", "FAILED"), got {one!r}') from None
    if column not in columns:
        raise ValueError(f"cannot filter by {column!r}: the columns are {', '.join(columns)}")
    if predicate not in _PREDICATES:
        raise ValueError(f"cannot filter with {predicate!r}: the predicates are {' '.join(_PREDICATES)}")
    if value is None:
        if predicate not in ("=", "!="):
            raise ValueError(f"None has no order: filter {column!r} with = or !=, not {predicate}")
        return f"{column} IS {'NOT ' if predicate == '!=' else ''}?", None
    if column in _BOOLEANS:
        value = int(str(value).lower() in ("true", "1", "yes"))
    if column.endswith("_id") and predicate in ("=", "!="):
        return f"{'NOT ' if predicate == '!=' else ''}coalesce(id_matches(?, {column}), 0)", str(value)
    if predicate in ("=", "!="):
        is_it = "IS" if predicate == "=" else "IS NOT"
        return f"CAST({column} AS TEXT) {is_it} CAST(? AS TEXT) COLLATE NOCASE", value
    if isinstance(value, str):
        with contextlib.suppress(ValueError):  # From the command line numbers come as text.
            value = float(value)
    return f"{column} {predicate} ?", value


def short_id(id: str | bytes | None) -> str | None:
    """The form for people of an ID in hex or in bytes."""
    if not id:
        return None
    return ids.short(bytes.fromhex(id) if isinstance(id, str) else id)


def _matches(text: str, hex_id: str | None) -> bool:
    # The first two tests spare most rows the cost of the third.
    if hex_id is None or text[:4].lower() not in (hex_id[:4], "work", "node"):
        return False
    return text.lower() == hex_id or ids.matches(text, bytes.fromhex(hex_id))


def _quoted(path: str) -> str:
    from urllib.parse import quote

    return quote(os.path.abspath(path))


def _summary(summary: dict[str, Any], by: str, **totals: float) -> dict[str, Any]:
    """Ray's form: one entry for the whole cluster."""
    return {"cluster": {"summary": summary, "summary_by": by, **totals}}
