"""The `minray` command, on the same hand-written session as the state API's tests."""

from __future__ import annotations

import contextlib
import json
import os
import sqlite3
import subprocess
import sys
import types
from pathlib import Path

import pytest
from test_state import ROOT, T0, ids, session, task_id  # noqa: F401 - session is a fixture

from minray import command


@pytest.fixture
def run(session, capsys):  # noqa: F811
    """Run a subcommand on the session; returns (exit code, stdout, stderr)."""

    def run(name: str, *arguments: str) -> tuple[int, str, str]:
        code = command.main([name, "--session", session, *arguments])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return run


def test_tasks_are_a_table_for_people_and_json_for_programs(run):
    code, out, _ = run("tasks")
    head, first, *_rest = out.splitlines()
    assert code == 0
    assert head.split() == "TASK_ID NAME STATE ATTEMPT_NUMBER WORKER_PID START RUN ERROR_TYPE".split()
    assert first.split()[:3] == [ids.short(task_id(1)), "resize", "FINISHED"]
    code, out, _ = run("tasks", "--json", "--limit", "1")
    assert [row["task_id"] for row in json.loads(out)] == [task_id(6).hex()]


def test_filters_are_words_and_nothing_found_is_exit_code_1(run):
    code, out, _ = run("tasks", "--filter", "state=FAILED", "-f", "run_us>1000")
    assert code == 0
    assert len(out.splitlines()) == 2
    code, out, err = run("tasks", "--filter", "name=nobody")
    assert (code, out, err) == (1, "", "minray tasks: nothing found\n")


def test_wrong_usage_is_exit_code_2_and_says_what_is_right(run):
    code, _, err = run("tasks", "--filter", "state")
    assert code == 2
    assert "looks like state=FAILED" in err
    assert run("tasks", "--filter", "colour=red")[0] == 2
    with pytest.raises(SystemExit) as caught:
        command.main(["no-such-command"])
    assert caught.value.code == 2


@pytest.mark.parametrize("name", "actors objects workers events summary status ps where".split())
def test_every_view_prints_text_and_json(run, name):
    code, out, err = run(name)
    assert (code, err) == (0, "")
    assert out
    code, out, _ = run(name, "--json")
    assert code == 0
    assert json.loads(out)


def test_status_says_what_there_is(run, session):  # noqa: F811
    _, out, _ = run("status")
    assert f"session  {os.path.dirname(session)}" in out
    assert "python demo.py, pid 77" in out
    assert "1 RUNNING" in out
    assert "objects  1 arena (5.0 MB)" in out
    assert "late" not in out, "there is nothing to say"


def test_status_counts_the_results_that_came_too_late(run, session):  # noqa: F811
    with contextlib.closing(sqlite3.connect(session)) as database, database:
        for no in range(101, 104):
            event = (no, T0 + no, "late_result", task_id(2).hex(), "worker 2 had been given up")
            database.execute("INSERT INTO events (no, time_us, kind, subject, message) VALUES (?, ?, ?, ?, ?)", event)
    assert "late     3 discarded, of workers that had been given up" in run("status")[1]
    assert json.loads(run("status", "--json")[1])["late_results"] == 3


def test_ps_shows_what_a_live_worker_runs(run):
    _, out, _ = run("ps", "--json")
    (row,) = json.loads(out)
    assert (row["pid"], row["running"], row["task_id"]) == (801, "resize", task_id(3).hex())


def test_sql_reads_but_does_not_write(run):
    code, out, _ = run("sql", "select state, count(*) n from task_view group by 1 order by 2 desc limit 1")
    assert (code, out.split()) == (0, ["STATE", "N", "FINISHED", "3"])
    code, out, _ = run("sql", "--json", "select task_id from tasks where no = 1")
    assert json.loads(out) == [{"task_id": task_id(1).hex()}]
    code, _, err = run("sql", "delete from tasks")
    assert code == 2
    assert "readonly" in err
    code, _, err = run("sql", "select nonsense")
    assert code == 2 and "no such column: nonsense. minray schema tells" in err


def test_a_story_is_told_or_nothing_is_found(run):
    code, out, _ = run("story", ids.short(task_id(2)))
    assert code == 0
    assert "failed after 2.000 ms: ValueError" in out
    code, _, err = run("story", "ffff-99")
    assert code == 1
    assert "'ffff-99'" in err


def test_a_timeline_is_written(run, tmp_path):
    code, out, _ = run("timeline", "-o", str(tmp_path / "t.json"))
    assert code == 0
    assert "t.json" in out
    assert json.loads((tmp_path / "t.json").read_text())


def test_the_schema_is_explained(run):
    assert "parent_no" in run("schema")[1]


def test_the_microbenchmark_gets_its_own_options(monkeypatch):
    module = types.ModuleType("minray.microbenchmark")
    module.main = lambda argv: 3 if argv == ["--json", "x"] else 0  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "minray.microbenchmark", module)
    import minray

    monkeypatch.setattr(minray, "microbenchmark", module, raising=False)
    assert command.main(["microbenchmark", "--json", "x"]) == 3


def test_no_session_is_exit_code_1(tmp_path, capsys):
    assert command.main(["status", "--session", str(tmp_path / "none")]) == 1
    assert "no session" in capsys.readouterr().err


def test_a_closed_pipe_ends_the_command_quietly(session):  # noqa: F811
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run(
        [sys.executable, "-m", "minray.command", "tasks", "--session", session],
        stdout=writer,
        stderr=subprocess.PIPE,
        cwd=Path(command.__file__).parents[1],
    )
    os.close(writer)
    assert (done.returncode, done.stderr) == (0, b"")


def test_the_root_of_the_ids_is_the_job(run):
    assert json.loads(run("status", "--json")[1])["job"]["job_id"] == ROOT.hex()
