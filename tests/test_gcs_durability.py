"""The GCS in a session: killed again and again, out of disk, locked, damaged, and what the node does about it."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from test_gcs import a_small_disk
from test_node import ROOT, T1, T2, T3, T4, T5, VALUE, World, task_id

import minray
from minray import api, check, ids, raylet, session
from minray.exceptions import OutOfDiskError, RaySystemError
from minray.messages import (
    DRIVER, BlockRequested, GcsRecovered, GcsStalled, ObjectPut, ObjectsAwaited, Reply,
    TasksSubmitted, TemplateDefined, WorkerDied,
)  # fmt: skip
from minray.task_spec import ACTOR_CREATION, ACTOR_METHOD, FINISHED, ActorOptions, TaskOptions, TaskSpec

TIMEOUT_S = 30.0
STALL = GcsStalled(DRIVER, "OutOfDiskError", "the GCS cannot write: database or disk is full (/x, where 0 bytes are free).")
PUT = ids.put_id(T1, 1)


# ---------------------------------------------------------------- the node's decision, without a process


def rows_of(world: World) -> dict[str, list[Any]]:
    """By table the first column of the rows that have changed."""
    return {table: [row[0] for row in rows] for table, rows in world.node.take_rows(world.now).items()}


def test_while_the_gcs_cannot_write_a_new_task_becomes_an_error_that_says_so() -> None:
    world = World()
    world.handle(STALL)
    assert world.submit(T1) == []
    error = world.error(T1)
    assert isinstance(error, OutOfDiskError)
    assert "f [task " in str(error) and "was not run" in str(error) and "/x, where 0 bytes are free" in str(error)
    world.handle(GcsRecovered(DRIVER))
    assert world.submit(T2) != [], "it was not taken in when it could be"


def test_what_is_refused_leaves_no_rows_and_no_tasks_that_would_pile_up() -> None:
    world = World()
    world.handle(STALL)
    rows_of(world)
    for number in range(100):
        one = task_id(100 + number)
        world.submit(one)
        world.node.lineage.release(one)
        world.handle(ObjectPut(DRIVER, ids.put_id(one, 1), (VALUE, len(VALUE), ())))
        world.node.lineage.release(ids.put_id(one, 1))
    assert not world.node.lineage.tasks and not world.node.objects
    assert rows_of(world) == {}
    world.handle(GcsRecovered(DRIVER))
    (event,) = world.node.take_rows(world.now)["events"]
    assert event[2] == "gcs_recovered" and "200 tasks and objects were refused" in event[4]


def test_what_runs_goes_on_and_its_children_are_refused() -> None:
    world = World(max_retries=3)
    world.submit(T1)
    world.submit(T2)
    world.handle(STALL)
    world.template(1, 1)
    child = task_id(1, T1)
    world.submit(child, client=1, parent=T1)
    assert isinstance(world.error(child), OutOfDiskError)
    (answer,) = world.handle(ObjectsAwaited(1, 9, [child], 1, True, True))
    assert isinstance(answer, Reply) and answer.answer[0][2], "the worker is not told that it is an error"
    world.finish(1, T1)
    assert world.state(T1) == FINISHED
    # A retry is not new either.
    assert world.state(T2) != FINISHED
    world.handle(WorkerDied(1, "was killed", T2))
    other = world.worker()
    (runner,) = [w.client for w in world.node.scheduler.workers.values() if T2 in w.in_flight]
    assert runner == other
    world.finish(other, T2)
    assert world.state(T2) == FINISHED and not world.node.objects[T2].is_error


def test_a_put_becomes_an_error_and_its_memory_comes_back() -> None:
    world = World()
    (answer,) = world.handle(BlockRequested(DRIVER, 1, PUT, 100_000))
    assert isinstance(answer, Reply) and answer.answer[0] == "block"
    used = world.node.lineage.arena.used
    world.handle(STALL)
    world.handle(ObjectPut(DRIVER, PUT, (answer.answer[1], 100_000, ())))
    assert isinstance(world.error(PUT), OutOfDiskError)
    assert world.node.lineage.arena.used < used


def test_a_task_whose_argument_is_still_to_come_is_refused_once_and_for_all() -> None:
    world = World()
    world.submit(T1)
    world.handle(STALL)
    world.submit(T2, deps=(T1,))
    assert isinstance(world.error(T2), OutOfDiskError)
    world.finish(1, T1)
    assert isinstance(world.error(T2), OutOfDiskError)


def test_calls_of_an_actor_are_refused_and_later_ones_run() -> None:
    world = World()
    world.handle(TemplateDefined(DRIVER, 2, TaskOptions(ACTOR_CREATION, b"f" * 16, "A.__init__", resources=())))
    world.handle(TemplateDefined(DRIVER, 3, TaskOptions(ACTOR_METHOD, b"", "A.m", resources=(), method="m")))
    options = ActorOptions("A", None, "", 0, False)
    alive, unborn = T1, T4

    def submit(one: bytes, template_no: int, **fields: Any) -> None:
        world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(one, template_no, **fields)]))

    submit(alive, 2, actor=options)
    (worker,) = [w.client for w in world.node.scheduler.workers.values() if alive in w.in_flight]
    world.finish(worker, alive)
    world.handle(STALL)
    submit(T2, 3, actor_id=alive)
    assert isinstance(world.error(T2), OutOfDiskError)
    assert world.node.actors.actors[alive].pending == 0
    rows_of(world)
    submit(unborn, 2, actor=options)
    assert "actors" not in rows_of(world)
    world.handle(GcsRecovered(DRIVER))
    # An actor that was refused itself says why, as long as somebody has a handle.
    submit(T5, 3, actor_id=unborn)
    assert isinstance(world.error(T5), OutOfDiskError)
    submit(T3, 3, actor_id=alive)
    world.finish(worker, T3)
    assert world.node.objects[T3].data == VALUE


# ---------------------------------------------------------------- killed, with real processes


def gcs_pid() -> int | None:
    """The zygote's child that has the database open."""
    zygote = api._core.zygote.pid  # type: ignore[union-attr]

    def has_database(pid: str) -> bool:
        with contextlib.suppress(OSError):
            links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
            return any(link.endswith("gcs.sqlite") for link in links)
        return False

    with contextlib.suppress(OSError):
        children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        return next((int(pid) for pid in children if has_database(pid)), None)
    return None


def wait_until(condition: Callable[[], Any], what: str) -> Any:
    """Of other processes' doings there is no event to await."""
    deadline = time.monotonic() + TIMEOUT_S
    while not (found := condition()):
        assert time.monotonic() < deadline, what
        time.sleep(0.005)
    return found


def ask(path: str | Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


@minray.remote
def square(x: int) -> int:
    return x * x


@minray.remote
def fails() -> None:
    raise ValueError("as it should")


@pytest.mark.usefixtures("session")
def test_killed_20_times_the_gcs_loses_no_row_and_writes_none_twice(monkeypatch):
    """Twice together with the zygote.  Everything that was sent is compared with the file."""
    raylet = api._core.raylet
    flushed: dict[str, dict[int, tuple[Any, ...]]] = {"tasks": {}, "workers": {}, "events": {}, "options": {}}
    times: Counter[str] = Counter()
    record = raylet.record

    def noting(rows: dict[str, list[tuple[Any, ...]]]) -> None:
        for table in flushed.keys() & rows.keys():
            flushed[table].update((row[0], row) for row in rows[table])
            times[table] += len(rows[table])
        record(rows)

    raylet.flush_now()  # What comes before is not compared: of that nothing is known here.
    first = raylet.node._tasks_made
    monkeypatch.setattr(raylet, "record", noting)
    chance = random.Random(3)
    for round in range(20):
        refs = [square.remote(x) for x in range(150)] + [fails.remote()]
        time.sleep(chance.choice([0, 0.003, 0.01, 0.05, 0.06]))  # Not for anything: kills shall meet all moments.
        victim = wait_until(gcs_pid, "no GCS came back")
        os.kill(victim, signal.SIGKILL)
        if round in (7, 13):
            os.kill(api._core.zygote.pid, signal.SIGKILL)
        assert minray.get(refs[:-1]) == [x * x for x in range(150)]
        with pytest.raises(ValueError):
            minray.get(refs[-1])
        acked = raylet._gcs_acked
        square.remote(0)
        wait_until(lambda: raylet._gcs_acked > acked or api._core.loop_once(), "it writes no more")  # noqa: B023
    path = api.flush_records()
    for table, rows in flushed.items():
        there = {row[0]: row[:-1] for row in ask(path, f"SELECT * FROM {table}")}
        assert rows and rows.items() <= there.items(), f"rows of {table} are lost, or old"
    assert ask(path, f"SELECT count(*), count(DISTINCT task_id) FROM tasks WHERE no > {first}") == [(20 * 152,) * 2]
    assert times["tasks"] > len(flushed["tasks"]), "no row was ever replaced: then this shows little"
    assert check.check_file(path).faults == []
    assert raylet._gcs_deaths == 0 and ask(path, "SELECT status FROM job_view") == [("RUNNING",)]


WRITING = """
import minray, os, sys
minray.init(num_cpus=1)
f = minray.remote(lambda: None)
for count in range(1, 1000):
    minray.get([f.remote() for _ in range(100)])
    path = minray.api.flush_records()
    core = minray.api._core
    print(path, core.zygote.pid, count * 100, flush=True)
"""


@pytest.mark.parametrize("victims", ["gd", "dg", "gzd", "zgd", "dzg"])
def test_what_was_acknowledged_outlives_all_who_knew_of_it(victims):
    """The GCS, the zygote and the driver are killed within microseconds; the file is ended by who comes after."""
    command = [sys.executable, "-c", WRITING]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as driver:
        path, zygote, count = driver.stdout.readline().split()
        _, started = session.identify(int(zygote))
        children = Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()
        (gcs,) = [pid for pid in children if any(p.endswith("gcs.sqlite") for p in open_files(pid))]
        for _ in range(3):
            path, zygote, count = driver.stdout.readline().split()
        for victim in victims:
            os.kill({"g": int(gcs), "z": int(zygote), "d": driver.pid}[victim], signal.SIGKILL)
        for line in driver.stdout:  # What it had said before it died.
            if line.endswith("\n"):
                path, zygote, count = line.split()
        driver.wait()
    if "z" in victims:
        wait_until(lambda: not session.is_alive([int(zygote), started]), "the zygote does not die")
        with minray.init(num_cpus=1):  # Sweeps.
            pass
    path = path.replace("/live/", "/finished/")
    wait_until(lambda: os.path.exists(path), "the session was not filed away")
    assert ask(path, "SELECT count(*) FROM tasks WHERE finished_us NOT NULL")[0][0] >= int(count)
    assert ask(path, "SELECT status, end_time IS NULL FROM job_view") == [("FAILED", 0)]
    assert not os.path.exists(f"{path}-wal") and check.check_file(path).faults == []


def open_files(pid: str) -> list[str]:
    with contextlib.suppress(OSError):
        return [os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd")]
    return []


def test_with_flush_each_a_result_that_get_has_returned_is_in_the_file(run_driver):
    """The driver is killed right after get(); rows then wait for no 50 ms."""
    code = (
        "import minray, os, signal\n"
        "minray.init(num_cpus=1)\n"
        "f = minray.remote(lambda: None)\n"
        "g = minray.remote(lambda x: x)\n"
        "minray.get(f.remote())\n"
        "core = minray.api._core\n"
        "core.raylet.flush_each = True\n"
        "print(core.session.name)\n"
        "minray.get([f.remote() for _ in range(500)])\n"
        "assert core.future(g.remote(7)).result() == 7\n"
        "print(minray.get(g.remote(8)), flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    name, eight = run_driver(code, expect_status=-signal.SIGKILL).stdout.split()
    path = os.path.join(os.environ["MINRAY_HOME"], "finished", name, "gcs.sqlite")
    wait_until(lambda: os.path.exists(path), "the session was not filed away")
    assert eight == "8"
    assert ask(path, "SELECT count(*) FROM tasks WHERE finished_us NOT NULL") == [(503,)]


# ---------------------------------------------------------------- out of disk


@pytest.fixture
def small_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    with a_small_disk(tmp_path / "small") as directory:
        monkeypatch.setenv("MINRAY_HOME", str(directory / "home"))
        yield directory


@minray.remote
def asks_for_more() -> str:
    try:
        return f"got {minray.get(square.remote(2))}"
    except OutOfDiskError:
        return "refused"


@minray.remote
def waits_for(path: str) -> str:
    while not os.path.exists(path):
        time.sleep(0.01)
    return "done"


@minray.remote
class Tally:
    def __init__(self) -> None:
        self.count = 0

    def add(self) -> int:
        self.count += 1
        return self.count


def until_refused() -> int:
    """Submit one after the other; how many were taken in."""
    deadline = time.monotonic() + TIMEOUT_S
    for count in range(1_000_000):
        try:
            assert minray.get(square.remote(3)) == 9
        except OutOfDiskError:
            return count
        assert time.monotonic() < deadline, "the full disk goes unnoticed"
    raise AssertionError


def takes_work(refusal: type[Exception]) -> bool:
    with contextlib.suppress(refusal):
        return minray.get(square.remote(3)) == 9
    return False


def until_taken_in() -> None:
    wait_until(lambda: takes_work(OutOfDiskError), "space has returned, and nothing is taken in")


def test_a_full_disk_is_a_typed_error_and_heals(small_home, tmp_path, capfd):
    """On a disk of 2 MiB, filled to the last byte; the GCS is killed in the middle of it, too."""
    with minray.init(num_cpus=2, history=1000):
        core, gate = api._core, tmp_path / "gate"
        actor = Tally.remote()
        assert minray.get(actor.add.remote()) == 1
        running = waits_for.remote(str(gate))
        path = api.flush_records()
        assert os.path.dirname(path).startswith(str(small_home))
        ballast = small_home / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        began = time.monotonic()
        taken_in = until_refused()
        assert time.monotonic() - began >= 0.4, "a short stall is no reason to refuse anything"
        with pytest.raises(OutOfDiskError, match=f"(?s)square.* was not run.*{path}, where 0 bytes are free"):
            minray.get(square.remote(1))
        with pytest.raises(OutOfDiskError, match="object .* was not stored"):
            minray.get(minray.put(1))
        with pytest.raises(OutOfDiskError):
            minray.get(minray.put(bytes(200_000)))
        with pytest.raises(OutOfDiskError):
            minray.get(actor.add.remote())
        with pytest.raises(OutOfDiskError):
            minray.get(Tally.remote().add.remote())
        # What is refused costs no memory once nobody has its refs.
        for _ in range(3000):
            square.remote(1)
            minray.put(1)
        with pytest.raises(OutOfDiskError):
            minray.get(square.remote(1))
        assert len(core.node._dirty) < 100 and len(core.node.lineage.tasks) < 100
        assert core.raylet._gcs.backlog_bytes < 1 << 20
        # The GCS is killed, and the next one cannot write either.
        killed = wait_until(gcs_pid, "there is no GCS")
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: gcs_pid() not in (None, killed) or core.loop_once(), "no GCS came back")
        with pytest.raises(OutOfDiskError):
            minray.get(square.remote(1))
        # What runs goes on, and space returns.
        gate.touch()
        assert minray.get(running) == "done"
        ballast.unlink()
        until_taken_in()
        assert minray.get([actor.add.remote(), actor.add.remote()]) == [2, 3], "calls that were refused have run"
        path = api.flush_records()
        # Of more than a thousand the oldest rows are gone by now: the totals have them.
        finished = "SELECT sum(tasks) FROM function_view WHERE state = 'FINISHED' AND func_or_class_name = '{}'"
        assert ask(path, finished.format("square"))[0][0] >= taken_in
        assert ask(path, finished.format("waits_for")) == [(1,)]
        assert ask(path, "SELECT count(*) FROM tasks WHERE error LIKE 'OutOfDisk%'") == [(0,)]
        kinds = [kind for (kind,) in ask(path, "SELECT kind FROM events WHERE kind LIKE 'gcs%' ORDER BY no")]
        assert kinds == ["gcs_stalled", "gcs_recovered"]
    told = capfd.readouterr().err
    assert "the GCS cannot write" in told and "0 bytes are free" in told and "Make room there" in told
    assert "everything is written now" in told


def test_a_session_that_cannot_begin_on_a_full_disk_says_where_room_is_needed(small_home):
    ballast = small_home / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    with pytest.raises(OutOfDiskError, match=f"no room for a session.*{small_home}.*Nothing was started.*MINRAY_HOME"):
        minray.init(num_cpus=1)
    ballast.unlink()
    with minray.init(num_cpus=1):
        assert minray.get(square.remote(3)) == 9


def test_a_session_that_ends_on_a_full_disk_says_so_in_a_line(small_home, capfd):
    with minray.init(num_cpus=1):
        ballast = small_home / "ballast"
        with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
            while True:
                file.write(bytes(4096))
        until_refused()
    told = capfd.readouterr().err
    assert told.count("the GCS ends without having written everything: ") == 1
    assert "0 bytes are free" in told and "Traceback" not in told


def test_a_session_whose_gcs_does_not_come_to_an_end_says_that_rows_are_lost(capfd):
    """It is stopped, as it would be by a disk that hangs."""
    with minray.init(num_cpus=1):
        assert minray.get(square.remote(3)) == 9
        os.kill(wait_until(gcs_pid, "there is no GCS"), signal.SIGSTOP)
        assert minray.get(square.remote(4)) == 16
    told = capfd.readouterr().err
    assert "the GCS is ended without having written everything" in told and "results of a durable job" in told


def test_rows_that_a_stopped_gcs_has_no_room_for_are_told_to_be_lost(capfd):
    with minray.init(num_cpus=1):
        os.kill(wait_until(gcs_pid, "there is no GCS"), signal.SIGSTOP)
        while not api._core.raylet._gcs.backlog_bytes:  # The socket's buffer is what the kernel makes of it.
            minray.get([square.remote(number) for number in range(1000)])
    assert "the GCS has taken nothing for 1.5 s at the end of the session" in capfd.readouterr().err


@contextlib.contextmanager
def writes_fail() -> Iterator[None]:
    """A disk that is full for the GCS alone: whatever it writes to is as large as it may be."""
    import resource

    pid = wait_until(gcs_pid, "there is no GCS")
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (4096, before[1]))
    try:
        yield
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)


@pytest.mark.usefixtures("session")
def test_a_disk_that_takes_nothing_is_told_to_tasks_that_submit_tasks(tmp_path):
    assert minray.get(asks_for_more.remote()) == "got 4"
    gate = str(tmp_path / "gate")

    @minray.remote
    def late(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return minray.get(asks_for_more.remote())

    @minray.remote
    def later(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        try:
            minray.get(minray.put("x" * 200_000))
        except OutOfDiskError as error:
            return str(error)

    refs = [task.options(num_cpus=0).remote(gate) for task in (late, later)]
    api.flush_records()
    with writes_fail():
        until_refused()
        Path(gate).touch()
        with pytest.raises(OutOfDiskError, match="asks_for_more"):
            minray.get(refs[0])
        assert "was not stored" in minray.get(refs[1])
    until_taken_in()
    assert minray.get(asks_for_more.remote()) == "got 4"
    path = api.flush_records()
    assert ask(path, "SELECT state FROM task_view WHERE name LIKE '%late%' ORDER BY 1") == [("FAILED",), ("FINISHED",)]


@pytest.mark.usefixtures("session")
def test_a_short_stall_is_ridden_out():
    """Writes fail for a moment, less than the node's patience."""
    api.flush_records()
    with writes_fail():
        ref = square.remote(5)
        wait_until(lambda: api._core.raylet._gcs_stuck_s or api._core.loop_once(), "the GCS does not say it")
        assert minray.get([ref, square.remote(6)]) == [25, 36]
    path = api.flush_records()
    assert ask(path, "SELECT count(*) FROM tasks WHERE finished_us NOT NULL") == [(2,)]
    wait_until(lambda: api._core.raylet._gcs_stuck_s is None or api._core.loop_once(), "it is still taken for stuck")
    assert ask(path, "SELECT count(*) FROM events WHERE kind = 'gcs_stalled'") == [(0,)]


@pytest.mark.usefixtures("session")
def test_a_file_that_another_program_has_locked_is_an_error_that_says_so():
    path = api.flush_records()
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as other:
        other.execute("BEGIN EXCLUSIVE")
        with pytest.raises(RaySystemError, match="database is locked.* Another program has locked it"):
            deadline = time.monotonic() + TIMEOUT_S
            while time.monotonic() < deadline:
                minray.get(square.remote(2))
        other.execute("ROLLBACK")
    wait_until(lambda: api._core.raylet._gcs_stuck_s is None or api._core.loop_once(), "it is still taken for stuck")
    assert minray.get(square.remote(2)) == 4
    assert check.check_file(api.flush_records()).faults == []


# ---------------------------------------------------------------- damaged


@pytest.mark.parametrize(
    "first_page, words", [(0, "file is not a database"), (2, "database disk image is malformed: .*")]
)
@pytest.mark.usefixtures("session")
def test_a_gcs_that_finds_a_damaged_file_says_so_and_tasks_go_on(first_page, words, capfd):
    path = api.flush_records()
    with contextlib.closing(sqlite3.connect(path)) as database:
        wait_until(lambda: database.execute("PRAGMA wal_checkpoint").fetchone()[0] == 0, "the log stays")
    killed = wait_until(gcs_pid, "there is no GCS")
    with api._core.raylet.lock:  # So that no other takes over before the damage is done.
        os.kill(killed, signal.SIGKILL)
        wait_until(lambda: gcs_pid() is None, "it does not die")
        os.truncate(f"{path}-wal", 0)
        with open(path, "r+b") as file:
            file.seek(first_page * 4096)
            file.write(b"\xaa" * 8192)
    assert minray.get([square.remote(x) for x in range(10)]) == [x * x for x in range(10)]
    with pytest.raises(RuntimeError, match=f"damaged: {words} .*{path}"):
        wait_until(lambda: api._core.loop_once() or api._core.raylet._gcs is None, "it goes on")
        api.flush_records()
    assert minray.get(square.remote(4)) == 16
    assert "minray check" in capfd.readouterr().err


def test_a_gcs_that_is_silent_stops_new_work_before_memory_grows_and_heals(monkeypatch, capfd):
    """Stopped by a signal it neither takes nor refuses anything; what waits for it is bounded."""
    monkeypatch.setattr(raylet, "GCS_BACKLOG_BYTES", 100_000)
    monkeypatch.setattr(raylet, "GCS_SILENCE_S", 0.5)
    with minray.init(num_cpus=2):
        core = api._core
        assert minray.get(square.remote(3)) == 9
        pid = wait_until(gcs_pid, "there is no GCS")
        os.kill(pid, signal.SIGSTOP)
        try:
            taken_in = 0
            with pytest.raises(RaySystemError, match="(?s)square.* was not run.*has not taken what it was sent.*stopped that process"):
                for _ in range(1_000_000):
                    taken_in += len(minray.get([square.remote(3) for _ in range(100)]))
            assert taken_in > 100
            for _ in range(3000):
                square.remote(1)
            with pytest.raises(RaySystemError):
                minray.get(square.remote(1))
            assert core.raylet._gcs.backlog_bytes < 2_000_000 and len(core.node.lineage.tasks) < 100
        finally:
            os.kill(pid, signal.SIGCONT)
        wait_until(lambda: takes_work(RaySystemError), "the GCS goes on, and nothing is taken in")
        path = api.flush_records()
        assert gcs_pid() == pid
        finished = "SELECT sum(tasks) FROM function_view WHERE state = 'FINISHED' AND func_or_class_name = 'square'"
        assert ask(path, finished)[0][0] > taken_in
    told = capfd.readouterr().err
    assert "its process has not taken what it was sent" in told and "everything is written now" in told


def test_a_gcs_that_is_slow_is_not_silent(monkeypatch):
    """It is behind for longer than a silence may last, and acknowledges something now and then."""
    monkeypatch.setattr(raylet, "GCS_BACKLOG_BYTES", 10_000)
    monkeypatch.setattr(raylet, "GCS_SILENCE_S", 0.4)
    with minray.init(num_cpus=2):
        pid = wait_until(gcs_pid, "there is no GCS")
        until = time.monotonic() + 1.5
        while time.monotonic() < until:
            os.kill(pid, signal.SIGSTOP)
            try:
                assert sum(minray.get([square.remote(1) for _ in range(200)])) == 200
                time.sleep(0.05)
            finally:
                os.kill(pid, signal.SIGCONT)
            time.sleep(0.02)
        assert minray.get(square.remote(3)) == 9


class Heavy:
    def __init__(self) -> None:
        self.weight = bytearray(20 << 20)
        self.calls = 0

    def add(self) -> tuple[int, int]:
        self.calls += 1
        return self.calls, os.getpid()


def test_a_checkpoint_larger_than_memory_and_disk_is_told_and_the_log_goes_on(small_home, capfd):
    with minray.init(num_cpus=1, object_store_memory=4 << 20):
        actor = minray.remote(Heavy).options(checkpoint_every=1, max_restarts=-1).remote()
        pid = 0
        for calls in (1, 2, 3):
            count, pid = minray.get(actor.add.remote())
            assert count == calls
        os.kill(pid, signal.SIGKILL)
        count, after = minray.get(actor.add.remote())
        assert count == 4 and after != pid, "made again from its constructor and its log"
    told = capfd.readouterr().err
    assert "could not save its state" in told and "found no room" in told
