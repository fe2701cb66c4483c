"""The state API and stories, on a GCS file written by hand."""

from __future__ import annotations

import json
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from minray import ids, schema, state, story
from minray.gcs import Gcs
from minray.task_spec import (
    ACTOR_CREATION,
    ACTOR_METHOD,
    ALIVE,
    DEAD,
    FAILED,
    FINISHED,
    PENDING_ARGS_AVAIL,
    RUNNING,
    TASK,
)

ROOT = ids.root_task_id(b"test")
PREFIX = ids.children_prefix(ROOT)
T0 = 1_700_000_000_000_000


def task_id(no: int) -> bytes:
    return ids.pack_id(PREFIX, no, 0)


def worker_id(no: int) -> bytes:
    return ids.pack_id(bytes([0xA0 + no]) * 8, no, ids.WORKER)


def task(no: int, name_no: int, task_state: int, **columns: Any) -> tuple[Any, ...]:
    """A task's row: submitted at no ms, started 1 ms later, ended 2 ms after that."""
    row: dict[str, Any] = dict.fromkeys(schema.TABLES["tasks"].columns)
    del row["checksum"]  # The GCS's affair.
    at = T0 + no * 1000
    row |= {"no": no, "task_id": task_id(no), "parent_no": 0, "options_no": name_no, "state": task_state}
    row |= {"attempt": 0, "worker_no": 1, "submitted_us": at}
    if task_state >= RUNNING:
        row["started_us"] = at + 1000
    if task_state >= FINISHED:
        row |= {"finished_us": at + 3000, "result_bytes": 40}
    return tuple((row | columns).values())


@pytest.fixture
def session(tmp_path: Path) -> str:
    """Six tasks, two actors, two workers, two objects: the path of their gcs.sqlite."""
    path = str(tmp_path / "gcs.sqlite")
    gcs = Gcs(path)
    put, result = ids.put_id(ROOT, 1), ids.return_id(task_id(1), 1)
    tables = {
        "jobs": [(1, ROOT, None, "python demo.py", 77, 0, T0, None, "0.1", "3.12", "", '{"CPU": 2}')],
        "nodes": [(1, b"\xee" * 16, "laptop", 0, '{"CPU": 2}', 1 << 30, "{}")],
        "functions": [
            (1, b"f" * 16, "resize", "demo", b"code", None),
            (2, b"c" * 16, "Counter", "demo", b"code", None),
        ],
        "options": [
            (1, 1, "resize", TASK, 1, '{"CPU": 1.0}', 3, "{}"),
            (2, 2, "Counter.__init__", ACTOR_CREATION, 1, "{}", 0, "{}"),
            (3, 2, "Counter.add", ACTOR_METHOD, 1, "{}", 0, "{}"),
        ],
        "workers": [
            (1, worker_id(1), 801, 1, T0, None, None, None),
            (2, worker_id(2), 802, 2, T0, T0 + 90_000, "killed by SIGKILL", 1),
        ],
        "actors": [
            (1, task_id(4), 2, "Counter", "tally", "", ALIVE, 2, 802, 0, 0, 0, T0 + 4000, None, None, None, None),
            (2, task_id(50), 2, "Counter", None, "", DEAD, 2, 9, 0, 0, 1, T0, T0 + 9000, "last handle went", None, None),
        ],
        "objects": [
            (1, put, 0, 1, 5_000_000, 1, T0, None),
            (2, result, 1, 2, 3_000_000, 2, T0, T0 + 1000),
        ],
        "tasks": [
            task(1, 1, FINISHED),
            task(2, 1, FAILED, attempt=1, deps=put + result, error="ValueError: too big: 7"),
            task(3, 1, RUNNING, parent_no=1, submitted_us=T0 + 2500, started_us=T0 + 2700),
            task(4, 2, FINISHED, actor_no=1, worker_no=2),
            task(5, 3, FINISHED, actor_no=1, worker_no=2),
            task(6, 1, PENDING_ARGS_AVAIL, worker_no=None),
        ],
        "events": [(1, T0 + 2500, "TaskRetried", task_id(2).hex(), "its worker was killed by SIGKILL")],
    }
    gcs.write([(1, list(tables.items()))])
    gcs.database.close()
    return path


def test_tasks_are_listed_in_order_with_rays_names(session):
    rows = state.list_tasks(session)
    assert [row.no for row in rows] == [1, 2, 3, 4, 5, 6]
    row = rows[4]
    assert row["task_id"] == task_id(5).hex()
    assert (row.name, row.func_or_class_name, row.type, row.state) == (
        "Counter.add",
        "Counter.add",
        "ACTOR_TASK",
        "FINISHED",
    )
    assert (row.actor_id, row.worker_id, row.worker_pid) == (task_id(4).hex(), worker_id(2).hex(), 802)
    assert (row.job_id, row.parent_task_id, row.node_id) == (ROOT.hex(), ROOT.hex(), "ee" * 16)
    assert rows[2].parent_task_id == task_id(1).hex()
    assert "start_time_ms" not in row


def test_details_come_when_asked_for(session):
    row = state.list_tasks(session, detail=True)[1]
    assert row.required_resources == {"CPU": 1.0}
    times = (row.creation_time_ms, row.start_time_ms, row.end_time_ms)
    assert times == tuple(T0 // 1000 + ms for ms in (2, 3, 5))
    assert (row.run_us, row.error_type, row.error_message) == (2000, "ValueError", "ValueError: too big: 7")


def test_a_limit_keeps_the_newest(session):
    assert [row.no for row in state.list_tasks(session, limit=2)] == [5, 6]


@pytest.mark.parametrize(
    ("filters", "expected"),
    [
        ([("state", "=", "failed")], [2]),
        ([("state", "!=", "FINISHED")], [2, 3, 6]),
        ([("name", "=", "resize"), ("state", "=", "FINISHED")], [1]),
        ([("worker_pid", "=", 802)], [4, 5]),
        ([("worker_pid", "=", "802")], [4, 5]),
        ([("worker_pid", "!=", 801)], [4, 5, 6]),
        ([("run_us", ">=", "2000")], [1, 2, 4, 5]),
        ([("error_type", "=", None)], [1, 3, 4, 5, 6]),
        ([("error_type", "!=", None)], [2]),
        ([("task_id", "=", ids.short(task_id(3)))], [3]),
        ([("actor_id", "!=", task_id(4).hex())], [1, 2, 3, 6]),
        ([("state", "=", "NO_SUCH_STATE")], []),
    ],
)
def test_filters_choose_rows(session, filters, expected):
    assert [row.no for row in state.list_tasks(session, filters=filters)] == expected


@pytest.mark.parametrize(
    ("filters", "text"),
    [
        ([("colour", "=", "red")], "the columns are no, task_id"),
        ([("state", "~", "F")], "the predicates are = !="),
        ([("run_us", "<", None)], "None has no order"),
        (["state=FAILED"], "a filter is a tuple"),
    ],
)
def test_a_filter_that_makes_no_sense_says_what_does(session, filters, text):
    with pytest.raises(ValueError, match=text):
        state.list_tasks(session, filters=filters)


def test_actors_workers_nodes_and_jobs_are_listed(session):
    actors = [(row.name, row.state) for row in state.list_actors(session)]
    assert actors == [("tally", "ALIVE"), (None, "DEAD")]
    assert [row.is_alive for row in state.list_workers(session)] == [True, False]
    assert [row.pid for row in state.list_workers(session, filters=[("is_alive", "=", "True")])] == [801]
    assert [row.pid for row in state.list_workers(session, filters=[("is_alive", "=", False)])] == [802]
    assert state.list_nodes(session)[0].resources_total == {"CPU": 2}
    assert state.list_jobs(session)[0].status == "RUNNING"
    assert [row.kind for row in state.list_events(session)] == ["TaskRetried"]


def test_objects_tell_who_made_them(session):
    put, result = state.list_objects(session)
    assert (put.made_by, put.task_name, put.location, put.state) == ("put", None, "arena", "READY")
    assert (result.made_by, result.task_name, result.location, result.state) == (
        "return",
        "resize",
        "spilled",
        "FREED",
    )


def test_one_thing_is_got_by_its_id_or_short_form(session):
    assert state.get_task(task_id(2).hex(), session).state == "FAILED"
    assert state.get_task(ids.short(task_id(2)), session).error_type == "ValueError"
    assert state.get_task("ffff-99", session) is None
    assert state.get_actor(task_id(50).hex(), session).death_cause == "last handle went"
    assert state.get_worker(worker_id(2).hex()[:6], session).exit_detail == "killed by SIGKILL"
    object_id = ids.put_id(ROOT, 1)
    assert state.get_object(ids.short(object_id), session).object_size == 5_000_000
    assert len(state.get_objects(object_id.hex(), session)) == 1
    assert state.get_node("eeee", session).is_head_node is True
    assert state.get_job(ROOT.hex(), session).entrypoint == "python demo.py"


def test_summaries_count_by_function_class_and_maker(session):
    tasks = state.summarize_tasks(session)["cluster"]
    assert tasks["summary"]["resize"]["state_counts"] == {
        "FAILED": 1,
        "FINISHED": 1,
        "PENDING_ARGS_AVAIL": 1,
        "RUNNING": 1,
    }
    assert tasks["summary"]["resize"]["run_us"] == 4000
    assert (tasks["total_tasks"], tasks["total_actor_tasks"], tasks["total_actor_scheduled"]) == (4, 1, 1)
    actors = state.summarize_actors(session)["cluster"]
    assert actors["summary"]["Counter"]["state_counts"] == {"ALIVE": 1, "DEAD": 1}
    objects = state.summarize_objects(session)["cluster"]
    assert (objects["total_objects"], objects["total_size_mb"], objects["total_freed"]) == (1, 5.0, 1)


def test_a_row_names_its_columns_when_asked_for_another(session):
    with pytest.raises(AttributeError, match="no column 'colour'; it has no, task_id"):
        _ = state.list_tasks(session)[0].colour


def test_no_session_says_where_it_was_looked_for(tmp_path, monkeypatch):
    monkeypatch.setenv("MINRAY_HOME", str(tmp_path / "empty"))
    monkeypatch.delitem(sys.modules, "minray.api", raising=False)
    with pytest.raises(state.NoSessionError, match=r"no session found under .*empty.* minray\.init\(\)"):
        state.list_tasks()
    with pytest.raises(state.NoSessionError, match="no session 'monday'"):
        state.list_tasks("monday")


def test_a_file_that_is_no_gcs_file_is_refused(tmp_path):
    (tmp_path / "gcs.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(state.NoSessionError, match="cannot read"):
        state.list_tasks(str(tmp_path / "gcs.sqlite"))
    (tmp_path / "empty").touch()
    with pytest.raises(state.NoSessionError, match="schema version 0"):
        state.list_tasks(str(tmp_path / "empty"))


def test_the_drivers_own_session_is_flushed_first(session, monkeypatch):
    asked = []
    api = types.ModuleType("minray.api")
    api.flush_records = lambda timeout: asked.append(timeout) or session  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minray.api", api)
    assert len(state.list_tasks(timeout=3)) == 6
    assert asked == [3]


def test_the_story_of_a_task_tells_its_arguments_retries_and_end(session):
    lines = list(story.tell(story.story(ids.short(task_id(2)), session)))
    text = "\n".join(lines)
    assert f"task {ids.short(task_id(2))}: resize() was submitted by the driver, needs 1 CPU" in lines[1]
    assert f"takes object {ids.short(ids.put_id(ROOT, 1))}, put" in text
    assert f"takes object {ids.short(task_id(1))}.1, a result of resize()" in text
    assert "+0.500 ms  its worker was killed by SIGKILL" in text
    assert "+1.000 ms  began to run on worker-1 (pid 801), attempt 2" in text
    assert lines[-1].endswith("+3.000 ms  failed after 2.000 ms: ValueError: too big: 7")


def test_the_story_of_a_parent_counts_its_children_and_objects(session):
    kinds = [row.kind for row in story.story(task_id(1).hex(), session)]
    assert kinds == ["submitted", "started", "object", "children", "taken", "finished"]
    child = story.story(task_id(3).hex(), session)
    assert f"submitted by resize() [{ids.short(task_id(1))}]" in child[0].text
    assert child[-1].text == "is RUNNING"


def test_actors_objects_and_small_results_have_stories_too(session):
    actor = [row.text for row in story.story(task_id(50).hex(), session)]
    assert actor[-1] == "died: last handle went"
    thing = [row.text for row in story.story(f"{ids.short(task_id(1))}.1", session)]
    assert any("3000000 bytes, spilled" in text for text in thing)
    assert any("resize() was submitted" in text for text in thing)
    small = story.story(f"{ids.short(task_id(5))}.1", session)
    assert "Counter.add()" in small[0].text
    assert story.story("ffff-99", session) == []


def test_the_timeline_has_a_row_a_worker_and_arrows_to_children(session, tmp_path):
    events = story.timeline(address=session)
    assert events is not None
    slices = [event for event in events if event["ph"] == "X"]
    assert [event["name"] for event in slices] == ["resize"] * 3 + ["Counter.__init__", "Counter.add"]
    names = [event["args"]["name"] for event in events if event["name"] == "thread_name"]
    assert "Counter (pid 802)" in names
    assert all(event["dur"] >= 0 for event in slices)
    arrows = [event for event in events if event["ph"] in "sf"]
    assert [event["id"] for event in arrows] == [3, 3]
    story.timeline(str(tmp_path / "t.json"), session)
    assert json.loads((tmp_path / "t.json").read_text()) == events


def test_tasks_that_overlap_on_one_worker_get_rows_of_their_own(session):
    slices = [event for event in story.timeline(address=session) or [] if event["ph"] == "X"]
    by_row: dict[int, list[tuple[int, int]]] = {}
    for event in slices:
        by_row.setdefault(event["tid"], []).append((event["ts"], event["ts"] + event["dur"]))
    for spans in by_row.values():
        assert all(end <= begin for (_, end), (begin, _) in zip(spans, spans[1:]))


def test_ray_s_place_for_the_state_api_has_the_same_functions():
    from minray.util import state as in_util

    assert {"list_tasks", "get_actor", "summarize_objects"} <= set(in_util.__all__)
    assert all(getattr(in_util, name) is getattr(state, name) for name in in_util.__all__)
