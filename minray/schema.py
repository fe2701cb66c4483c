"""The GCS's tables: what every one and every column means, and the SQL made from it.

Owns the only list of tables, columns and views.  `python -m minray.schema` builds them
with sqlite-utils and writes ``schema.sql``, which is committed, so that a session needs
no sqlite-utils to start (a test checks that file and list agree); ``minray schema``
prints the list for people.

Knows nothing of sockets or of when rows are written: see `minray.gcs`.

How the tables are laid out, and why:

* Rows are written 100,000 and more a second, so tables hold integers: a state is an
  index into the tuples of `minray.task_spec`, a row points to another by its ``no``, a
  time is in microseconds since the epoch, an ID is a BLOB of 16 bytes.  There is no
  secondary index: each would cost as much as the row, and a search of the 100,000 rows
  that are kept takes some 10 ms.
* Every table has a *view* that unfolds this for people and for `minray.state`: names
  for states, hex for IDs, and the column names of Ray's state API.  Query views unless
  you count microseconds: ``minray sql "select name, state from task_view"``.
* ``no`` numbers rows in the order in which the node met them; the node chooses it.
* What calls of one function share stands once, in ``options`` and ``functions``.
* The last column of every table is a checksum of the others (see `minray.checksum`): SQLite
  does not notice a flipped byte in a row.  ``minray check`` compares them.

Left out: foreign keys (they cost a lookup a row; rows of one batch come in any order)
and STRICT tables (SQLite before 3.37 cannot read them).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from minray.task_spec import ACTOR_STATES, LOCATIONS, OBJECT_STATES, PLACEMENT_GROUP_STATES, TASK_STATES, WORKER_STATES

SCHEMA_VERSION = 3
"""Stands in the file as ``PRAGMA user_version``; raise it when a table changes."""

STORAGE_VERSION = 1
"""Likewise in the storage of durable jobs."""

SQL_FILE = Path(__file__).with_name("schema.sql")

JOB_STATES = ("RUNNING", "SUCCEEDED", "FAILED")
"""FAILED: the driver went away without `shutdown()`, or its program failed (see `minray.ending`)."""
NODE_STATES = ("ALIVE", "DEAD")
TASK_TYPES = ("NORMAL_TASK", "ACTOR_CREATION_TASK", "ACTOR_TASK")


class Column(NamedTuple):
    type: type
    """int, str or bytes: INTEGER, TEXT or BLOB."""
    meaning: str


class Table(NamedTuple):
    meaning: str
    columns: dict[str, Column]
    key: str | tuple[str, str] = "no"


class View(NamedTuple):
    meaning: str
    select: str
    details: tuple[str, ...] = ()
    """Columns that `minray.state` shows only when asked for details."""


def _columns(**columns: tuple[type, str]) -> dict[str, Column]:
    return {name: Column(*column) for name, column in columns.items()}


TABLES: dict[str, Table] = {
    "tasks": Table(
        "One row a task: its spec, which is the lineage, and what became of it.  The newest 100,000 stay.",
        _columns(
            no=(int, "Number of the task in this job, in the order of submission."),
            task_id=(bytes, "ID of the task and of its first result."),
            parent_no=(int, "The task that submitted this one; 0 or NULL is the driver."),
            options_no=(int, "How the function was called: the row in options."),
            actor_no=(int, "The actor that runs it, or that it creates; NULL for a plain task."),
            state=(int, "Index into TASK_STATES."),
            attempt=(int, "How often it was started before: 0 at first, 1 after one retry."),
            worker_no=(int, "The worker that it was last given to; NULL until then."),
            submitted_us=(int, "When the node took it in."),
            started_us=(int, "When the last attempt began to run; NULL if none did (or an earlier run of its job)."),
            finished_us=(int, "When it finished or failed; NULL until then."),
            args=(bytes, "Its pickled arguments, for replay; NULL if there are none."),
            deps=(bytes, "IDs of the objects that it waits for and is given, 16 bytes each, joined."),
            result_bytes=(int, "Size of all its results together."),
            error=(str, "One line, 'Class: text', if it failed."),
        ),
    ),
    "options": Table(
        "One row for each distinct way of calling a function: its name, resources and retries.",
        _columns(
            no=(int, "What tasks.options_no points to."),
            function_no=(int, "The function, or the class of an actor."),
            name=(str, "The task's name: the function's, 'Class.method', or what options(name=...) said."),
            kind=(int, "0 a plain task, 1 the creation of an actor, 2 a method of an actor."),
            num_returns=(int, "How many results a call returns."),
            resources=(str, 'What it needs while it runs, as a JSON object: {"CPU": 1.0}.'),
            max_retries=(int, "How often it may be started again after a crash; -1 is for ever."),
            other=(str, "Options that have no column of their own, as a JSON object."),
        ),
    ),
    "functions": Table(
        "One row for each remote function or actor class: code that workers load by its ID.",
        _columns(
            no=(int, "What options.function_no points to."),
            function_id=(bytes, "Hash of the pickled code."),
            name=(str, "Its qualified name."),
            module=(str, "The module that it was defined in."),
            pickled=(bytes, "The code, by cloudpickle.  Nothing but a worker unpickles it."),
            source=(str, "Its source text, if it could be found."),
        ),
    ),
    "actors": Table(
        "One row an actor, dead ones too.",
        _columns(
            no=(int, "What tasks.actor_no points to."),
            actor_id=(bytes, "ID of the actor."),
            options_no=(int, "The options of its creation."),
            class_name=(str, "Name of its class."),
            name=(str, "The name that get_actor() finds it by; NULL if it has none."),
            namespace=(str, "The namespace of that name."),
            state=(int, "Index into ACTOR_STATES."),
            worker_no=(int, "The worker that hosts it; NULL before its creation."),
            pid=(int, "The process that hosts it."),
            restarts=(int, "How often it was restarted."),
            max_restarts=(int, "How often it may be restarted; -1 is for ever."),
            detached=(int, '1 if lifetime="detached" was asked for.'),
            created_us=(int, "When it was asked for."),
            died_us=(int, "When it died for good; NULL while it lives."),
            death_cause=(str, "Why it died, in one line."),
            checkpoints=(int, "How often its state was saved; NULL if it did not ask for exact recovery."),
            unrecoverable=(str, "Why it has lost its exact recovery, in one line; NULL otherwise."),
        ),
    ),
    "workers": Table(
        "One row a worker process, dead ones too.",
        _columns(
            no=(int, "What tasks.worker_no points to."),
            worker_id=(bytes, "ID of the worker."),
            pid=(int, "Its process."),
            state=(int, "Index into WORKER_STATES."),
            started_us=(int, "When it was forked."),
            died_us=(int, "When it ended; NULL while it lives."),
            exit_reason=(str, "How it ended: exit code, signal, or who ended it."),
            actor_no=(int, "The actor that it hosts; NULL if it runs plain tasks."),
        ),
    ),
    "objects": Table(
        "One row for each object that was put, or that is too large for a message (small results are in "
        "tasks).  All that live stay, and the newest 100,000 freed.",
        _columns(
            no=(int, "Number of the object in this job."),
            object_id=(bytes, "ID of the object: its task's, with an index."),
            task_no=(int, "The task that returned or put it; 0 or NULL is the driver."),
            state=(int, "Index into OBJECT_STATES."),
            size_bytes=(int, "Its size when flat."),
            location=(int, "Index into LOCATIONS: in messages, in shared memory, or on disk."),
            created_us=(int, "When it was sealed."),
            freed_us=(int, "When nothing could need it any more; NULL until then."),
        ),
    ),
    "jobs": Table(
        "One row a job, which is the whole run of one driver.",
        _columns(
            no=(int, "1: a session on one machine has one job."),
            job_id=(bytes, "ID of the job, which is its driver's task ID: the parent of what the driver submits."),
            name=(str, "Name of the job; NULL if it has none."),
            entrypoint=(str, "How the driver was started: its command line."),
            driver_pid=(int, "The driver's process."),
            state=(int, "Index into JOB_STATES; FAILED if its program failed, or went away without shutdown()."),
            started_us=(int, "When init() was called."),
            finished_us=(int, "When shutdown() was called, or the driver was found gone."),
            minray_version=(str, "Version of minray."),
            python_version=(str, "Version of Python."),
            namespace=(str, "The job's namespace for named actors."),
            resources=(str, "What the session had at its start, as a JSON object."),
        ),
    ),
    "nodes": Table(
        "One row a node, which is one machine's scheduler, object store and workers.",
        _columns(
            no=(int, "1: the head node."),
            node_id=(bytes, "ID of the node."),
            host=(str, "Name of its host."),
            state=(int, "Index into NODE_STATES."),
            resources=(str, "What it has in all, as a JSON object."),
            object_store_bytes=(int, "Capacity of its object store."),
            labels=(str, "Its labels, as a JSON object."),
        ),
    ),
    "events": Table(
        "What happened that no other row tells: retries, crashes, losses.  The newest 100,000 stay.",
        _columns(
            no=(int, "Order of the events."),
            time_us=(int, "When it happened."),
            kind=(str, "The event's name, such as worker_died."),
            subject=(str, "Hex ID of the task, actor, object or worker that it is about; '' if none."),
            message=(str, "What happened, in one line."),
        ),
    ),
    "task_totals": Table(
        "What is left of finished tasks whose rows were deleted, so that summaries stay exact.",
        _columns(
            options_no=(int, "How the function was called."),
            state=(int, "FINISHED or FAILED, as an index into TASK_STATES."),
            tasks=(int, "How many rows were deleted."),
            run_us=(int, "Their run times, added up."),
            longest_us=(int, "The longest of their run times."),
        ),
        key=("options_no", "state"),
    ),
    "object_totals": Table(
        "What is left of freed objects whose rows were deleted.",
        _columns(
            location=(int, "Where they were last, as an index into LOCATIONS."),
            state=(int, "FREED or LOST, as an index into OBJECT_STATES."),
            objects=(int, "How many rows were deleted."),
            size_bytes=(int, "Their sizes, added up."),
        ),
        key=("location", "state"),
    ),
    "placement_groups": Table(
        "One row a placement group.  All that live stay, and the newest 100,000 removed.",
        _columns(
            no=(int, "Number of the group in this job."),
            group_id=(bytes, "ID of the group, and of the object that its ready() returns."),
            name=(str, "The name that get_placement_group() finds it by; NULL if it has none."),
            strategy=(str, "PACK, SPREAD, STRICT_PACK or STRICT_SPREAD."),
            bundles=(str, 'What it reserves, as a JSON array: [{"CPU": 1.0}].'),
            state=(int, "Index into PLACEMENT_GROUP_STATES."),
            detached=(int, '1 if lifetime="detached" was asked for.'),
            requested_us=(int, "When it was asked for."),
            placed_us=(int, "When its resources were reserved; NULL if they were not."),
            removed_us=(int, "When it was removed; NULL while it lives."),
            reason=(str, "Why it was removed, or can never be placed, in one line."),
        ),
    ),
}

for _table in TABLES.values():
    _table.columns["checksum"] = Column(int, "Of all columns before: see checksum.py.  The GCS computes it.")

STORAGE_TABLES: dict[str, Table] = {
    "jobs": Table(
        "One row for each durable job: `minray.init(job=name, storage=this_file)`.",
        _columns(
            no=(int, "What runs.job_no and results.job_no point to."),
            name=(str, "Name of the job."),
            created_us=(int, "When its first run began."),
        ),
    ),
    "runs": Table(
        "One row for each run of a job's script.",
        _columns(
            no=(int, "Number of the run in this file."),
            job_no=(int, "The job."),
            root_id=(bytes, "ID of the driver's task in that run; in its session it is the job's ID."),
            state=(int, "Index into JOB_STATES; FAILED if its driver was killed, or its program failed."),
            pid=(int, "The driver's process."),
            host=(str, "Name of the driver's host."),
            session=(str, "Directory of its session while it ran."),
            entrypoint=(str, "The driver's command line."),
            minray_version=(str, "Version of minray."),
            python_version=(str, "Version of Python."),
            started_us=(int, "When init() was called."),
            finished_us=(int, "When it ended; NULL until then."),
            known=(int, "How many results of earlier runs it found."),
            reused=(int, "How many of them it used instead of running a task; NULL if it was killed."),
            ran=(int, "How many tasks it ran; NULL if it was killed."),
        ),
    ),
    "results": Table(
        "One row for each object that is kept: what tasks returned, and what was put and is contained in that.",
        _columns(
            object_id=(bytes, "Its ID in the run that made it; of one that was put, a hash of what it contains."),
            place=(bytes, "Where in the program its task stands; see node_durable.py."),
            version=(bytes, "Hash of its task's code and of what that was given; NULL if it was put."),
            data=(bytes, "The pickled value, if it is small."),
            file=(str, "Else the name of its file in <storage>.objects/<job>."),
            size_bytes=(int, "Its size when flat."),
            nested=(bytes, "The objects that it contains: pairs of the ID that it has for one, and its object_id."),
            name=(str, "The task's name."),
            num_returns=(int, "How many objects its task returned."),
            started_us=(int, "When its task began to run."),
            finished_us=(int, "When its task finished."),
            actor=(bytes, "Of an actor's call, and of a checkpoint: the actor, as the object_id of its creation."),
            after=(bytes, "The call that the actor executed before this one, or last before the checkpoint."),
            job_no=(int, "The job."),
            run_no=(int, "The run that made it."),
            checksum=(int, "Of all columns before: see checksum.py.  A row that does not match it is not used."),
        ),
        key="object_id",
    ),
}
"""The storage of durable jobs: a file of its own (job_storage.py), of which nothing is ever deleted to save room."""


def _name(column: str, names: Sequence[str]) -> str:
    return f"CASE {column} " + " ".join(f"WHEN {i} THEN '{name}'" for i, name in enumerate(names)) + " END"


def _hex(column: str) -> str:
    return f"nullif(lower(hex({column})), '')"


# One job and one node a file, so far: these become joins when a file serves a cluster.
_JOB = f"(SELECT {_hex('job_id')} FROM jobs LIMIT 1)"
_NODE = f"(SELECT {_hex('node_id')} FROM nodes LIMIT 1)"
_FUNCTION = "CASE o.kind WHEN 0 THEN coalesce(f.name, o.name) ELSE o.name END"

VIEWS: dict[str, View] = {
    "task_view": View(
        "Tasks, with the column names of Ray's state API.  error_type is the exception's class.",
        f"""SELECT t.no, {_hex("t.task_id")} task_id, t.attempt attempt_number, o.name,
  {_name("t.state", TASK_STATES)} state, {_JOB} job_id, {_hex("a.actor_id")} actor_id,
  {_name("o.kind", TASK_TYPES)} type, {_FUNCTION} func_or_class_name,
  coalesce({_hex("p.task_id")}, {_JOB}) parent_task_id, {_NODE} node_id,
  {_hex("w.worker_id")} worker_id, w.pid worker_pid,
  CASE WHEN instr(t.error, ':') THEN substr(t.error, 1, instr(t.error, ':') - 1) ELSE t.error END error_type,
  o.resources required_resources, t.submitted_us / 1000 creation_time_ms, t.started_us / 1000 start_time_ms,
  t.finished_us / 1000 end_time_ms, t.finished_us - t.started_us run_us, t.error error_message,
  t.result_bytes, o.max_retries, f.module
FROM tasks t LEFT JOIN options o ON o.no = t.options_no LEFT JOIN functions f ON f.no = o.function_no
  LEFT JOIN actors a ON a.no = t.actor_no LEFT JOIN workers w ON w.no = t.worker_no
  LEFT JOIN tasks p ON p.no = t.parent_no""",
        (
            *("required_resources", "creation_time_ms", "start_time_ms", "end_time_ms", "run_us"),
            *("error_message", "result_bytes", "max_retries", "module"),
        ),
    ),
    "actor_view": View(
        "Actors, with the column names of Ray's state API.",
        f"""SELECT a.no, {_hex("a.actor_id")} actor_id, a.class_name, {_name("a.state", ACTOR_STATES)} state,
  {_JOB} job_id, a.name, {_NODE} node_id, a.pid, a.namespace ray_namespace, a.restarts num_restarts,
  a.max_restarts, a.detached is_detached, a.death_cause, o.resources required_resources,
  {_hex("w.worker_id")} worker_id, a.created_us / 1000 start_time_ms, a.died_us / 1000 end_time_ms,
  a.checkpoints, a.unrecoverable
FROM actors a LEFT JOIN options o ON o.no = a.options_no LEFT JOIN workers w ON w.no = a.worker_no""",
        (
            *("num_restarts", "max_restarts", "is_detached", "death_cause", "required_resources"),
            *("worker_id", "start_time_ms", "end_time_ms", "checkpoints", "unrecoverable"),
        ),
    ),
    "worker_view": View(
        "Worker processes, with the column names of Ray's state API.",
        f"""SELECT w.no, {_hex("w.worker_id")} worker_id, w.state != {WORKER_STATES.index("DEAD")} is_alive,
  'WORKER' worker_type, {_name("w.state", WORKER_STATES)} state, {_NODE} node_id,
  (SELECT host FROM nodes LIMIT 1) ip, w.pid, {_hex("a.actor_id")} actor_id, w.exit_reason exit_detail,
  w.started_us / 1000 start_time_ms, w.died_us / 1000 end_time_ms
FROM workers w LEFT JOIN actors a ON a.no = w.actor_no""",
        ("exit_detail", "start_time_ms", "end_time_ms"),
    ),
    "object_view": View(
        "Objects that were put, or are too large for a message.",
        f"""SELECT b.no, {_hex("b.object_id")} object_id, b.size_bytes object_size,
  {_name("b.state", OBJECT_STATES)} state, {_name("b.location", LOCATIONS)} location,
  CASE WHEN hex(substr(b.object_id, 13, 1)) >= '80' THEN 'put' ELSE 'return' END made_by,
  coalesce({_hex("t.task_id")}, {_JOB}) task_id, o.name task_name, {_JOB} job_id,
  b.created_us / 1000 creation_time_ms, b.freed_us / 1000 end_time_ms
FROM objects b LEFT JOIN tasks t ON t.no = b.task_no LEFT JOIN options o ON o.no = t.options_no""",
        ("creation_time_ms", "end_time_ms"),
    ),
    "placement_group_view": View(
        "Placement groups, with the column names of Ray's state API.",
        f"""SELECT no, {_hex("group_id")} placement_group_id, name, {_JOB} creator_job_id,
  {_name("state", PLACEMENT_GROUP_STATES)} state, strategy, bundles, detached is_detached, reason,
  requested_us / 1000 start_time_ms, placed_us / 1000 placed_time_ms, removed_us / 1000 end_time_ms
FROM placement_groups""",
        ("is_detached", "reason", "start_time_ms", "placed_time_ms", "end_time_ms"),
    ),
    "job_view": View(
        "Jobs, with the column names of Ray's state API.",
        f"""SELECT no, {_hex("job_id")} job_id, 'DRIVER' type, name, {_name("state", JOB_STATES)} status,
  entrypoint, driver_pid, started_us / 1000 start_time, finished_us / 1000 end_time, namespace,
  minray_version, python_version, resources FROM jobs""",
        ("namespace", "minray_version", "python_version", "resources"),
    ),
    "node_view": View(
        "Nodes, with the column names of Ray's state API.",
        f"""SELECT no, {_hex("node_id")} node_id, host node_ip, no = 1 is_head_node,
  {_name("state", NODE_STATES)} state, host node_name, resources resources_total,
  object_store_bytes, labels FROM nodes""",
    ),
    "event_view": View(
        "Events, with times to read.",
        "SELECT no, strftime('%Y-%m-%d %H:%M:%f', time_us / 1e6, 'unixepoch', 'localtime') time, kind,"
        " subject, message, time_us FROM events",
    ),
    "function_view": View(
        "Exact totals by function and state, deleted rows included: how many tasks, and how long they ran.",
        f"""SELECT {_FUNCTION} func_or_class_name, {_name("o.kind", TASK_TYPES)} type,
  {_name("c.state", TASK_STATES)} state, sum(c.tasks) tasks,
  coalesce(sum(c.run_us), 0) run_us, max(c.longest_us) longest_us
FROM (SELECT options_no, state, count(*) tasks, sum(finished_us - started_us) run_us,
    max(finished_us - started_us) longest_us FROM tasks GROUP BY 1, 2
  UNION ALL SELECT options_no, state, tasks, run_us, longest_us FROM task_totals) c
  LEFT JOIN options o ON o.no = c.options_no LEFT JOIN functions f ON f.no = o.function_no
GROUP BY 1, 2, 3""",
    ),
}


def build() -> str:
    """The SQL that makes the tables and views, by sqlite-utils."""
    import sqlite_utils

    database = sqlite_utils.Database(memory=True)
    for name, table in TABLES.items():
        columns = {column: about.type for column, about in table.columns.items()}
        database[name].create(columns, pk=table.key)  # type: ignore[union-attr]
    for name, view in VIEWS.items():
        database.create_view(name, view.select)
    query = "SELECT sql FROM sqlite_master WHERE sql IS NOT NULL ORDER BY rowid"
    statements = database.execute(query).fetchall()
    database.close()
    return (
        "-- Made by `python -m minray.schema` from minray/schema.py; do not edit.\n"
        + "".join(f"{sql};\n" for (sql,) in statements)
        + f"PRAGMA user_version = {SCHEMA_VERSION};\n"
    )


def _columns_of(table: Table) -> Iterator[str]:
    width = max(map(len, table.columns))
    for column, about in table.columns.items():
        kind = {int: "INTEGER", str: "TEXT", bytes: "BLOB"}[about.type]
        yield f"  {column:{width}}  {kind:7}  {about.meaning}"
    yield ""


def documentation() -> Iterator[str]:
    """The lines that ``minray schema`` prints."""
    for name, table in TABLES.items():
        yield f"table {name}: {table.meaning}"
        yield from _columns_of(table)
    for name, view in VIEWS.items():
        yield f"view {name}: {view.meaning}"
    yield ""
    for name, table in STORAGE_TABLES.items():
        yield f"storage of durable jobs, table {name}: {table.meaning}"
        yield from _columns_of(table)
    for name, names in {
        "TASK_STATES": TASK_STATES,
        "ACTOR_STATES": ACTOR_STATES,
        "PLACEMENT_GROUP_STATES": PLACEMENT_GROUP_STATES,
        "WORKER_STATES": WORKER_STATES,
        "OBJECT_STATES": OBJECT_STATES,
        "LOCATIONS": LOCATIONS,
        "JOB_STATES": JOB_STATES,
        "NODE_STATES": NODE_STATES,
    }.items():
        yield f"{name}: " + ", ".join(f"{i} {text}" for i, text in enumerate(names))


if __name__ == "__main__":
    SQL_FILE.write_text(build())
