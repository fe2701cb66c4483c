"""The ``minray`` command: look at a session from outside, while it runs or afterwards.

Owns the words of the command line and how tables look; what they say comes from
`minray.state` and `minray.story`.  Every subcommand reads the GCS file and nothing else,
so it answers even when the driver hangs or is gone.

Exit codes: 0 done, 1 nothing found, 2 wrong usage.  A reader that closes the pipe
(``minray tasks | head -1``) ends the command without a word.

Left out: colours, paging and a curses view.  ``watch -n1 minray status`` does that.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import sqlite3
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from minray import job_storage, schema, state, story
from minray.ids import ID_BYTES
from minray.task_spec import RUNNING

_LISTS: dict[str, tuple[Callable[..., list[state.Row]], str, tuple[str, ...]]] = {
    "tasks": (
        state.list_tasks,
        "the newest tasks",
        ("task_id", "name", "state", "attempt_number", "worker_pid", "start_time_ms", "run_us", "error_type"),
    ),
    "actors": (
        state.list_actors,
        "the newest actors, dead ones too",
        ("actor_id", "class_name", "name", "state", "pid", "num_restarts", "death_cause"),
    ),
    "objects": (
        state.list_objects,
        "the newest objects that were put or are large",
        ("object_id", "object_size", "state", "location", "made_by", "task_id", "task_name"),
    ),
    "workers": (
        state.list_workers,
        "the newest worker processes, dead ones too",
        ("worker_id", "pid", "state", "actor_id", "start_time_ms", "end_time_ms", "exit_detail"),
    ),
    "placement-groups": (
        state.list_placement_groups,
        "the newest placement groups, removed ones too",
        ("placement_group_id", "name", "state", "strategy", "bundles", "start_time_ms", "reason"),
    ),
    "events": (state.list_events, "the newest events", ("time", "kind", "subject", "message")),
}
"""Of each listing: where it comes from, what it is, and the columns that people see."""

_OVER = {"FINISHED", "FAILED", "DEAD"}
"""States of what has ended."""

_CELL = 60
"""Longer cells are cut in tables; ``--json`` has them whole."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    if arguments[:1] == ["microbenchmark"]:  # It has options of its own.
        from minray import microbenchmark

        return int(microbenchmark.main(arguments[1:]) or 0)
    if arguments[:1] == ["simulate"]:
        from minray.simulator import report

        return report.main(arguments[1:])
    options = _parser().parse_args(arguments)
    try:
        code: int = options.run(options)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Python flushes stdout once more at exit: give it something to flush into.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except state.NoSessionError as error:
        print(f"minray: {error}", file=sys.stderr)
        return 1
    except (job_storage.JobInUseError, LookupError, OSError) as error:
        print(f"minray {options.command}: {error}", file=sys.stderr)
        return 1
    except (ValueError, sqlite3.Error) as error:
        hint = ". minray schema tells the tables, views and columns" if str(error).startswith("no such ") else ""
        hint += ". minray check tells what is damaged" if "malformed" in str(error) else ""
        print(f"minray {options.command}: {error}{hint}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="minray", description="Look at a minray session, live or finished.")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    common = argparse.ArgumentParser(add_help=False)
    common.add_argument("--session", help="part of its name, its directory or file; default: the newest")
    common.add_argument("--json", action="store_true", help="print JSON, for programs")

    def add(
        name: str, run: Callable[[argparse.Namespace], int], help: str, *more: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        sentence = help[0].upper() + help[1:] + "."
        added = commands.add_parser(name, help=help, description=sentence, parents=[common, *more])
        added.set_defaults(run=run)
        return added

    add("status", _status, "what the session is and does, in a few lines")
    add("ps", _ps, "the live workers and what each is running")
    for name, (_rows, about, _shown) in _LISTS.items():
        listing = add(name, _list, about)
        listing.add_argument("--limit", type=int, default=100, help="at most so many rows (default: 100)")
        listing.add_argument(
            "--filter", "-f", action="append", default=[], metavar="COLUMN=VALUE",
            help="only rows like this; also != < <= > >=; may be repeated",
        )  # fmt: skip
    keeping = argparse.ArgumentParser(add_help=False)
    keeping.add_argument("--storage", metavar="FILE", help="as given to minray.init(); default: its own place for jobs")
    add("jobs", _jobs, "durable jobs, minray.init(job=...): how the last run ended, and how much is kept", keeping)
    one = add("job", _job, "a durable job: its runs, what a rerun would reuse, and what the last one left", keeping)
    one.add_argument("name", metavar="NAME", help="of the job")
    one.add_argument("--forget", action="store_true", help="delete everything that is kept of it")
    add("summary", _summary, "how many tasks of each function, in which state, and how long they ran")
    telling = add("story", _story, "what happened to a task, an actor, an object or a worker")
    telling.add_argument("id", metavar="ID", help="an ID, its short form (9c1f-12) or a start of it")
    asking = add("sql", _sql, "the answer to a question in SQL (`minray schema` tells the tables)")
    asking.add_argument("query")
    drawing = add("timeline", _timeline, "who ran what when, as a file for https://ui.perfetto.dev")
    drawing.add_argument("-o", "--output", default="timeline.json", metavar="FILE", help="where to write it")
    add("where", _where, "where the session's files are")
    checking = add("check", _check, "whether a file is whole: a session's, or that of a durable job")
    checking.add_argument("file", nargs="?", metavar="SESSION|FILE", help="default: the newest session")
    add("schema", _schema, "what every table and column of the GCS file means")
    commands.add_parser("microbenchmark", help="measure this machine", add_help=False)
    commands.add_parser("simulate", help="run a cluster of many nodes in virtual time", add_help=False)
    return parser


def _list(options: argparse.Namespace) -> int:
    rows, _about, shown = _LISTS[options.command]
    found = rows(options.session, [_filter(text) for text in options.filter], options.limit, detail=True)
    return _print(found, shown, options)


def _jobs(options: argparse.Namespace) -> int:
    paths = [os.path.abspath(options.storage)] if options.storage else job_storage.default_files()
    rows = [state.Row(about) for path in paths for about in job_storage.describe(path)]
    return _print(rows, ("job", "state", "runs", "start_time", "end_time", "results", "size_bytes", "storage"), options)


def _job(options: argparse.Namespace) -> int:
    paths = [os.path.abspath(options.storage)] if options.storage else job_storage.default_files()
    path = next((one for one in paths if job_storage.runs(one, options.name)), None)
    if path is None:
        where = paths[0] if options.storage else "the default place (if it has a storage of its own: --storage FILE)"
        print(f"minray: there is no durable job {options.name!r} in {where}", file=sys.stderr)
        return 1
    if options.forget:
        count = job_storage.forget(path, options.name)
        print(f"forgot {count:,} kept objects of job {options.name!r}: its next run runs everything")
        return 0
    runs = [state.Row(run) for run in job_storage.runs(path, options.name)]
    kept = [state.Row(row) for row in job_storage.kept_by_name(path, options.name)]
    left = _left_of(runs[-1])
    if options.json:
        return _print_json({"storage": path, "runs": runs, "kept": kept, "left": left})
    print(f"job {options.name} in {path}")
    print_table(runs, ("no", "state", "start_time", "end_time", "pid", "known", "reused", "ran", "kept"))
    print(f"\na rerun of an unchanged script reuses these {sum(row.results for row in kept):,} results:")
    if kept:
        print_table(kept, ("name", "results", "size_bytes", "run_us"))
    if left is None:
        print("\nthe history of the last run is not there any more")
    elif left:
        print("\nwhat the last run did not finish:")
        print_table(left, ("name", "state", "tasks", "error_type"))
    return 0


def _left_of(run: state.Row) -> list[state.Row] | None:
    """The tasks of a run that were not FINISHED at its end, or are not yet; None if its session has been removed."""
    if not run.session:
        return None
    query = "SELECT name, state, count(*) tasks, error_type FROM task_view WHERE state != 'FINISHED' GROUP BY 1, 2, 4"
    try:
        with state.reading(os.path.basename(run.session)) as database:
            return [state.Row(zip(("name", "state", "tasks", "error_type"), row)) for row in database.execute(query)]
    except state.NoSessionError:
        return None


def _filter(text: str) -> state.Filter:
    match = re.fullmatch(r"\s*(\w+)\s*(!=|<=|>=|=|<|>)\s*(.*)", text)
    if not match:
        raise ValueError(f"a filter looks like state=FAILED, got {text!r}")
    return match[1], match[2], match[3]


def _status(options: argparse.Namespace) -> int:
    with state.reading(options.session) as database:
        path = database.execute("SELECT file FROM pragma_database_list").fetchone()[0]
        job = database.execute("SELECT * FROM job_view LIMIT 1").fetchone()
        columns = [name for (name,) in database.execute("SELECT name FROM pragma_table_info('job_view')")]
        counts = {
            what: dict(database.execute(query).fetchall())
            for what, query in {
                "tasks": "SELECT state, sum(tasks) FROM function_view GROUP BY 1",
                "actors": "SELECT state, count(*) FROM actor_view GROUP BY 1",
                "workers": "SELECT state, count(*) FROM worker_view GROUP BY 1",
                "objects": "SELECT location, count(*) FROM object_view WHERE end_time_ms IS NULL GROUP BY 1",
            }.items()
        }
        (size_bytes,) = database.execute(
            "SELECT coalesce(sum(size_bytes), 0) FROM objects WHERE freed_us IS NULL"
        ).fetchone()
        (late,) = database.execute("SELECT count(*) FROM events WHERE kind = 'late_result'").fetchone()
    status = {"session": os.path.dirname(path), "job": dict(zip(columns, job)) if job else None, **counts}
    status["object_bytes"] = size_bytes
    status["late_results"] = late
    if options.json:
        return _print_json(status)
    print(f"session  {status['session']}")
    if about := status["job"]:
        until = about["end_time"] or time.time() * 1000
        gone = about["status"] == "RUNNING" and not os.path.exists(f"/proc/{about['driver_pid']}")
        print(
            f"job      {about['status']}{' (but its driver is gone)' if gone else ''}:"
            f" {about['entrypoint']}, pid {about['driver_pid']}, {_seconds(until - about['start_time'])}"
        )
    for what, by_state in counts.items():
        text = ", ".join(f"{count} {name}" for name, count in by_state.items()) or "none"
        if what == "objects" and by_state:
            text += f" ({size_bytes / 1e6:.1f} MB)"
        left = by_state if what == "objects" else by_state.keys() - _OVER
        print(f"{what:8} {text}{', when it ended' if left and about and about['end_time'] else ''}")
    if late:
        print(f"late     {late:,} discarded, of workers that had been given up: minray events -f kind=late_result")
    return 0


def _ps(options: argparse.Namespace) -> int:
    with state.reading(options.session) as database:
        cursor = database.execute(
            "SELECT w.pid, w.worker_id, w.state, a.class_name actor, t.name running, t.task_id,"
            " (strftime('%s', 'now') * 1000 - t.start_time_ms) / 1000 running_s FROM worker_view w"
            " LEFT JOIN actors a ON lower(hex(a.actor_id)) = w.actor_id"
            " LEFT JOIN task_view t ON t.no IN (SELECT no FROM tasks WHERE state = ? AND worker_no = w.no)"
            " WHERE w.is_alive ORDER BY w.no",
            (RUNNING,),
        )
        columns = [column[0] for column in cursor.description]
        rows = [state.Row(zip(columns, values)) for values in cursor]
    return _print(rows, columns, options)


def _summary(options: argparse.Namespace) -> int:
    functions = state.summarize_tasks(options.session)["cluster"]["summary"].values()
    rows = [
        state.Row(
            name=about["func_or_class_name"],
            type=about["type"],
            tasks=sum(about["state_counts"].values()),
            states=", ".join(f"{count} {name}" for name, count in about["state_counts"].items()),
            run_us=about["run_us"],
            longest_us=about["longest_us"],
        )
        for about in functions
    ]
    rows.sort(key=lambda row: -row["run_us"])
    return _print(rows, ("name", "type", "tasks", "states", "run_us", "longest_us"), options)


def _story(options: argparse.Namespace) -> int:
    rows = story.story(options.id, options.session)
    if not rows:
        print(f"minray: nothing in this session has the ID {options.id!r}", file=sys.stderr)
        return 1
    if options.json:
        return _print_json(rows)
    for line in story.tell(rows):
        print(line)
    return 0


def _sql(options: argparse.Namespace) -> int:
    with state.reading(options.session) as database:
        cursor = database.execute(options.query)
        columns = [column[0] for column in cursor.description or ()]
        rows = [state.Row(zip(columns, values)) for values in cursor]
    return _print(rows, columns, options)


def _timeline(options: argparse.Namespace) -> int:
    story.timeline(options.output, options.session)
    print(f"wrote {options.output}: open it in https://ui.perfetto.dev or chrome://tracing")
    return 0


def _where(options: argparse.Namespace) -> int:
    path = state.gcs_file(options.session)
    directory = os.path.dirname(path)
    places = {"session": directory, "gcs": path, "logs": os.path.join(directory, "logs")}
    if options.json:
        return _print_json(places)
    for what, place in places.items():
        print(f"{what:8} {place}")
    return 0


def _check(options: argparse.Namespace) -> int:
    from minray import check

    report = check.check_file(state.gcs_file(options.file or options.session))
    if options.json:
        _print_json(report._asdict())
    elif not report.faults:
        print(f"{report.path} is whole: {report.rows:,} rows match their checksums")
    else:
        print(f"{report.path} is damaged; {report.rows:,} rows match their checksums")
        for fault in report.faults:
            print(f"  {fault}")
        print(report.advice)
    return 1 if report.faults else 0


def _schema(options: argparse.Namespace) -> int:
    for line in schema.documentation():
        print(line)
    return 0


def _print(rows: Sequence[state.Row], columns: Iterable[str], options: argparse.Namespace) -> int:
    """Rows as a table or as JSON; nothing found is exit code 1."""
    if options.json:
        _print_json(rows)
    elif rows:
        print_table(rows, list(columns))
    else:
        print(f"minray {options.command}: nothing found", file=sys.stderr)
    return 0 if rows else 1


def print_table(rows: Sequence[state.Row], columns: Sequence[str]) -> None:
    """Columns as wide as their widest cell, numbers to the right."""
    heads = [_head(name) for name in columns]
    table = [[_cell(name, row[name]) for name in columns] for row in rows]
    widths = [max(map(len, cells)) for cells in zip(heads, *table)]
    right = [all(isinstance(row[name], (int, float, type(None))) for row in rows) for name in columns]
    for cells in (heads, *table):
        padded = (c.rjust(w) if r else c.ljust(w) for c, w, r in zip(cells, widths, right))
        print("  ".join(padded).rstrip())


def _head(name: str) -> str:
    return re.sub(r"(_time)?_(ms|us)$", "", name).upper()


def _cell(name: str, value: Any) -> str:
    if value is None:
        return "-"
    if (name.endswith("_id") or name == "subject") and isinstance(value, (str, bytes)):
        id = value if isinstance(value, str) else value.hex()
        if len(id) == 2 * ID_BYTES:
            return state.short_id(id) or "-"
    if isinstance(value, bytes):
        return value.hex() if len(value) <= 16 else f"<{len(value)} bytes>"
    if name.endswith("time_ms") or name in ("start_time", "end_time"):
        return time.strftime("%H:%M:%S", time.localtime(value / 1000)) + f".{value % 1000:03d}"
    if name in ("run_us", "longest_us"):
        return _seconds(value / 1000)
    text = " ".join(str(value).split())
    return text if len(text) <= _CELL else text[: _CELL - 1] + "…"


def _seconds(milliseconds: float) -> str:
    if milliseconds < 1000:
        return f"{milliseconds:.1f} ms"
    if milliseconds < 120_000:
        return f"{milliseconds / 1000:.1f} s"
    return f"{milliseconds / 60_000:.1f} min"


def _print_json(value: object) -> int:
    print(json.dumps(value, indent=2, default=lambda data: data.hex()))  # Only bytes are unknown to JSON.
    return 0


if __name__ == "__main__":
    sys.exit(main())
