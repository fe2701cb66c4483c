"""What the GCS file, the state API and the `minray` command tell of real sessions: live, ended, killed."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import minray
from minray import ids, state, story

COMMANDS = "status ps tasks actors objects workers events summary where".split()

ASK = """
import contextlib, io, json, sys
from minray import command
answers = []
for line in json.load(sys.stdin):
    text = io.StringIO()
    with contextlib.redirect_stdout(text):
        code = command.main(line)
    answers.append((code, text.getvalue()))
print(json.dumps(answers))
"""


def ask(*lines):
    """Answers of the command, as (exit code, text) by its words, from a process that is no part of the session."""
    words = json.dumps([shlex.split(line) for line in lines])
    ended = subprocess.run([sys.executable, "-c", ASK], input=words, capture_output=True, text=True, timeout=60)
    assert ended.returncode == 0, ended.stderr
    return dict(zip(lines, json.loads(ended.stdout)))


def only(rows):
    (row,) = rows
    return row


def short(ref):
    return ids.short(bytes(ref))


@minray.remote
def add(a, b):
    return a + b


@minray.remote
def read(fifo):
    return Path(fifo).read_text()


@minray.remote(max_retries=1)
def kill_worker():
    os.kill(os.getpid(), 9)


@minray.remote
class Counter:
    def __init__(self):
        self.count = 0

    def up(self):
        self.count += 1
        return self.count

    def die(self):
        os._exit(3)


@pytest.fixture
def fifo(tmp_path):
    """A task that reads it runs until the test writes to it."""
    os.mkfifo(tmp_path / "fifo")
    return tmp_path / "fifo"


def test_a_live_session_tells_what_runs_and_what_waits(module_session, fifo):
    minray.get(add.remote(1, 1))  # A worker is up.
    reading = read.remote(str(fifo))
    adding = add.remote(reading, "!")
    states = {row.task_id: row for row in state.list_tasks()}
    running, waiting = states[reading.hex()], states[adding.hex()]
    assert (running.state, waiting.state) == ("RUNNING", "PENDING_ARGS_AVAIL")
    assert (running.attempt_number, waiting.worker_pid) == (0, None)

    answers = ask(*COMMANDS, "ps --json")
    codes = {words: code for words, (code, _) in answers.items() if code}
    assert codes == {"actors": 1, "events": 1, "objects": 1}, "1: there is nothing of this kind yet"
    worker = only(row for row in json.loads(answers["ps --json"][1]) if row["running"])
    assert (worker["running"], worker["pid"]) == ("read", running.worker_pid)
    assert "job      RUNNING" in answers["status"][1]

    fifo.write_text("done")
    assert minray.get(adding) == "done!"
    ended = {row.task_id: row for row in state.list_tasks(detail=True)}
    assert [ended[ref.hex()].state for ref in (reading, adding)] == ["FINISHED", "FINISHED"]
    assert ended[reading.hex()].worker_pid == running.worker_pid
    assert ended[adding.hex()].parent_task_id == state.list_jobs()[0].job_id
    told = "\n".join(story.tell(story.story(short(adding))))
    assert "was submitted by the driver" in told
    assert f"takes object {short(reading)}, a result of read()" in told


def test_a_story_tells_every_attempt_and_the_log_that_the_error_names_is_there(module_session):
    ref = kill_worker.remote()
    with pytest.raises(minray.exceptions.WorkerCrashedError, match=r"logs/worker-(\d+)\.log") as caught:
        minray.get(ref)
    text = "\n".join(row.text for row in story.story(short(ref)))
    assert "attempt 1 of 2 ended when worker" in text
    assert "was killed by SIGKILL; it is run again" in text
    assert "attempt 2" in text
    assert "WorkerCrashedError" in text
    row = state.get_task(short(ref))
    assert (row.state, row.attempt_number) == ("FAILED", 1)
    assert row.start_time_ms <= row.end_time_ms
    assert row.error_message == f"WorkerCrashedError: {str(caught.value).splitlines()[0]}"
    worker = state.get_worker(row.worker_id)
    logs = Path(state.gcs_file()).parent / "logs"
    assert str(caught.value).count(f"logs/{ids.short(bytes.fromhex(worker.worker_id))}.log") == 1
    assert (logs / f"{ids.short(bytes.fromhex(worker.worker_id))}.log").exists()
    assert worker.exit_detail == "was killed by SIGKILL"
    told = [row.text for row in story.story(ids.short(bytes.fromhex(worker.worker_id)))]
    assert "was given 1 x kill_worker(), now FAILED" in told
    assert told[-1] == "died: was killed by SIGKILL"


def test_actors_keep_their_rows_when_others_come_and_go(module_session):
    first = Counter.remote()
    lasting = Counter.options(name="lasting", max_restarts=1).remote()
    minray.get([first.up.remote(), lasting.up.remote()])
    pid = state.get_actor(first._actor_id.hex()).pid
    dead_id = first._actor_id.hex()
    minray.kill(first)
    del first
    third = Counter.remote()
    with pytest.raises(minray.exceptions.ActorUnavailableError):
        minray.get(lasting.die.remote())
    call = lasting.up.remote()
    minray.get([third.up.remote(), call])

    rows = {row.actor_id: row for row in state.list_actors(detail=True)}
    dead, restarted, young = (rows[key] for key in (dead_id, lasting._actor_id.hex(), third._actor_id.hex()))
    assert (dead.state, dead.pid, restarted.state, young.state) == ("DEAD", pid, "ALIVE", "ALIVE")
    assert "minray.kill()" in dead.death_cause
    assert (restarted.name, restarted.num_restarts) == ("lasting", 1)
    task = state.get_task(call.hex())
    assert (task.actor_id, task.worker_pid) == (restarted.actor_id, restarted.pid)
    host = only(state.list_workers(filters=[("pid", "=", pid)]))
    assert (host.state, host.actor_id) == ("DEAD", dead_id)
    assert any("is made again" in row.text for row in story.story(restarted.actor_id))


@minray.remote(max_concurrency=2)
class Reader:
    def read(self, fifo):
        return Path(fifo).read_text()


def test_every_thread_of_an_actor_is_seen_to_run(module_session, fifo):
    reader = Reader.remote()
    minray.get(reader.__ray_ready__.remote())
    reading = [reader.read.remote(str(fifo)) for _ in range(3)]
    states = [state.get_task(ref.hex()).state for ref in reading]
    assert states == ["RUNNING", "RUNNING", "SUBMITTED_TO_WORKER"]
    while minray.wait(reading, num_returns=3, timeout=0.01)[1]:
        with contextlib.suppress(OSError):  # Nobody has opened it at this moment.
            os.close(os.open(fifo, os.O_WRONLY | os.O_NONBLOCK))  # Whoever has reads its end.


def test_a_story_says_what_waits_while_actors_hold_every_cpu(module_session):
    holders = [Counter.options(num_cpus=1).remote() for _ in range(2)]
    minray.get([holder.up.remote() for holder in holders])
    third, task = Counter.options(num_cpus=1).remote(), add.remote(1, 1)
    call = third.up.remote()
    waiting = only(state.list_actors(filters=[("state", "=", "PENDING_CREATION")])).actor_id
    for id, why in (
        (waiting, "is PENDING_CREATION: waits for resources that others hold (minray ps, minray actors)"),
        (short(task), "is PENDING_NODE_ASSIGNMENT: waits for resources that others hold (minray ps, minray actors)"),
        (short(call), f"is PENDING_NODE_ASSIGNMENT: waits for its actor {state.short_id(waiting)}"),
    ):
        assert story.story(id)[-1].text == why
    for holder in holders:
        minray.kill(holder)
    assert minray.get([call, task], timeout=60) == [1, 2]


def test_an_object_is_listed_where_it_lies_and_then_as_freed(module_session):
    ref = minray.put(bytes(1_000_000))
    id = ref.hex()
    here = state.get_object(id)
    assert (here.state, here.location, here.made_by) == ("READY", "arena", "put")
    before = state.summarize_objects()["cluster"]["total_freed"]
    del ref
    minray.get(add.remote(1, 1))
    gone = state.get_object(id)
    assert (gone.state, gone.location, gone.object_size) == ("FREED", "arena", here.object_size)
    assert state.summarize_objects()["cluster"]["total_freed"] == before + 1


@minray.remote
def look(task_id):
    return state.gcs_file(), state.get_task(task_id)


def test_a_task_may_ask_about_its_own_session(module_session):
    ref = add.remote(1, 2)
    minray.get(ref)
    path = state.gcs_file()  # Everything so far is committed now; inside a task the file is read as it is.
    seen_path, row = minray.get(look.remote(ref.hex()))
    assert seen_path == path
    assert (row.name, row.state) == ("add", "FINISHED")


ENDS = """
import os, sys, minray
@minray.remote
def double(x):
    return 2 * x
minray.init(num_cpus=2, history=500)
for _ in range(5):
    minray.get([double.remote(i) for i in range(1000)])
minray.state.list_tasks()
if sys.argv[1:] == ["killed"]:
    os.kill(os.getpid(), 9)
"""


@pytest.mark.parametrize(("how", "exit_status", "status"), [("", 0, "SUCCEEDED"), ("killed", -9, "FAILED")])
def test_an_ended_session_still_answers_and_its_totals_are_exact(
    run_driver, tmp_path, monkeypatch, how, exit_status, status
):
    monkeypatch.setenv("MINRAY_HOME", str(tmp_path / "home"))
    run_driver(ENDS, *filter(None, [how]), expect_status=exit_status)
    query = "sql --json 'select status, (select count(*) from tasks) kept from job_view'"
    answers = ask(*COMMANDS, "summary --json", "workers --json", f"timeline -o {tmp_path}/timeline.json", query)
    codes = {words: code for words, (code, _) in answers.items() if code}
    assert codes == {"ps": 1, "actors": 1, "objects": 1, "events": 1}, "1: there was nothing of this kind"
    job = only(json.loads(answers[query][1]))
    assert job["status"] == status
    assert 400 <= job["kept"] <= 700, "of 5000 tasks, for a history of 500"
    total = only(json.loads(answers["summary --json"][1]))
    assert (total["name"], total["states"]) == ("double", "5000 FINISHED")
    assert {row["state"] for row in json.loads(answers["workers --json"][1])} == {"DEAD"}
    assert f"{tmp_path}/home/finished/" in answers["where"][1]
    spans = [event for event in json.loads((tmp_path / "timeline.json").read_text()) if event["ph"] == "X"]
    assert len(spans) == job["kept"]
    assert len({event["tid"] for event in spans}) == 2


def test_the_command_starts_quickly_and_runs_as_a_module(tmp_path):
    heavy = "{'asyncio', 'numpy', 'sqlite_utils', 'paramiko', 'tqdm'} & set(sys.modules)"
    code = f"import sys; from minray import command; sys.exit(repr({heavy}) if {heavy} else 0)"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60)
    ended = subprocess.run(
        [sys.executable, "-m", "minray.command", "status"],
        env={**os.environ, "MINRAY_HOME": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert ended.returncode == 1
    assert "A session begins with minray.init()" in ended.stderr
