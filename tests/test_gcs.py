"""The GCS process, by a socketpair: what is acknowledged is in the file, history is bounded."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import socket
import sqlite3
import stat
import struct
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from minray import gcs
from minray.task_spec import FAILED, FINISHED, LOCATIONS, OBJECT_STATES, RUNNING

TIMEOUT_S = 20.0


class GcsProcess:
    """A forked GCS and the node's end of its socket."""

    def __init__(self, path: Path, history: int = 1000) -> None:
        self.path = path
        self.sock, theirs = socket.socketpair()
        self.sock.settimeout(TIMEOUT_S)
        self.pid = os.fork()
        if not self.pid:
            code = 1
            with contextlib.suppress(BaseException):
                self.sock.close()
                os.dup2(os.open(os.devnull, os.O_WRONLY), 2)
                gcs.main(theirs, str(path), history)
                code = 0
            os._exit(code)
        theirs.close()
        self.seq = 0

    def write(self, **tables: list[tuple[Any, ...]]) -> None:
        """Send one frame and wait until it is acknowledged."""
        self.seq += 1
        gcs.send(self.sock, (self.seq, list(tables.items())))
        while gcs.receive(self.sock) != ("ack", self.seq):
            pass

    def end(self) -> int:
        """Go away as a driver does; returns the exit code."""
        self.sock.close()
        return self.wait()

    def wait(self) -> int:
        pid, self.pid = self.pid, 0
        return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., GcsProcess]]:
    started: list[GcsProcess] = []

    def start(path: Path = tmp_path / "gcs.sqlite", **options: Any) -> GcsProcess:
        started.append(GcsProcess(path, **options))
        return started[-1]

    yield start
    for process in started:
        process.sock.close()
        if process.pid:
            os.kill(process.pid, signal.SIGKILL)
            process.wait()


def task(no: int, state: int = FINISHED, options_no: int = 1, run_us: int = 10) -> tuple[Any, ...]:
    id = b"prefix00" + struct.pack(">II", no, 0)
    finished = 1000 + run_us if state >= FINISHED else None
    return (no, id, 0, options_no, None, state, 0, 1, 900, 1000, finished, b"args", None, 5, None)


def ask(path: Path, query: str) -> list[Any]:
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        return database.execute(query).fetchall()


def job(finished_us: int | None = None) -> tuple[Any, ...]:
    state = 0 if finished_us is None else 1
    return (1, b"j" * 16, None, "x.py", 1, state, 5, finished_us, "0", "3", "", "{}")


def test_an_acknowledged_row_can_be_read_while_the_session_runs(start, tmp_path):
    start().write(tasks=[task(1, RUNNING)], options=[(1, 1, "f", 0, 1, "{}", 3, "{}")])
    assert ask(tmp_path / "gcs.sqlite", "SELECT no, name, state FROM task_view") == [(1, "f", "RUNNING")]


def test_an_update_changes_an_object_that_was_written_before_and_nothing_else_of_it(start, tmp_path):
    process = start()
    arena, spilled, freed = LOCATIONS.index("arena"), LOCATIONS.index("spilled"), OBJECT_STATES.index("FREED")
    process.write(objects=[(no, b"o" * 16, 1, 1, 10, arena, 5, None) for no in (1, 2, 3)])
    process.write(object_updates=[(1, spilled, None, 1), (freed, None, 9, 2), (freed, None, 9, 99)])
    process.write(objects=[(4, b"o" * 16, 1, 1, 10, arena, 5, None)], object_updates=[(freed, None, 9, 4)])
    rows = ask(tmp_path / "gcs.sqlite", "SELECT no, state, size_bytes, location, created_us, freed_us FROM objects")
    assert rows == [
        (1, 1, 10, spilled, 5, None),
        (2, freed, 10, arena, 5, 9),
        (3, 1, 10, arena, 5, None),
        (4, freed, 10, arena, 5, 9),
    ]


def test_objects_that_are_freed_one_by_one_are_pruned_too(start, tmp_path):
    process, freed = start(history=1000), OBJECT_STATES.index("FREED")
    for first in range(1, 10_001, 500):
        process.write(objects=[(no, b"o" * 16, 1, 1, 10, 1, 5, None) for no in range(first, first + 500)])
        process.write(object_updates=[(freed, None, 9, no) for no in range(first, first + 500)])
    process.end()
    path = tmp_path / "gcs.sqlite"
    ((left,),), ((deleted, size),) = (
        ask(path, "SELECT count(*) FROM objects"),
        ask(path, "SELECT objects, size_bytes FROM object_totals"),
    )
    assert left <= 1200
    assert (left + deleted, size) == (10_000, 10 * deleted)


def test_a_later_row_replaces_the_earlier_one(start, tmp_path):
    process = start()
    process.write(tasks=[task(1, RUNNING)])
    process.write(tasks=[task(1, FINISHED), task(2, RUNNING), task(2, FAILED)])
    assert ask(tmp_path / "gcs.sqlite", "SELECT no, state FROM tasks") == [(1, FINISHED), (2, FAILED)]


@pytest.mark.parametrize("rows", [1, 49, 50, 51, 1049])
def test_a_batch_of_any_size_is_written_whole_and_in_order(start, tmp_path, rows):
    start(history=100_000).write(tasks=[task(no) for no in range(rows)] + [task(rows - 1, FAILED)])
    query = "SELECT count(*), max(no), sum(length(task_id)), sum(state) FROM tasks"
    assert ask(tmp_path / "gcs.sqlite", query) == [(rows, rows - 1, 16 * rows, FINISHED * rows + 1)]


def test_frames_that_queue_up_are_committed_together_and_acknowledged_by_the_last(start):
    process = start()
    os.kill(process.pid, signal.SIGSTOP)
    for seq in range(1, 11):
        gcs.send(process.sock, (seq, [("tasks", [task(seq)])]))
    os.kill(process.pid, signal.SIGCONT)
    acks = []
    while not acks or acks[-1] < 10:
        acks.append(gcs.receive(process.sock)[1])
    assert len(acks) < 10
    assert acks == sorted(acks)


def test_a_killed_gcs_loses_nothing_that_it_acknowledged_and_can_be_replaced(start, tmp_path):
    process = start()
    process.write(tasks=[task(no) for no in range(100)])
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert ask(tmp_path / "gcs.sqlite", "SELECT count(*) FROM tasks") == [(100,)], "unreadable after a kill"
    start().write(tasks=[task(100)])
    assert ask(tmp_path / "gcs.sqlite", "SELECT count(*) FROM tasks") == [(101,)]


def test_the_end_of_the_driver_leaves_one_private_file_and_marks_its_job_failed(start, tmp_path):
    process = start()
    process.write(
        jobs=[job()],
        workers=[(1, b"w" * 16, 77, 1, 5, None, None, None), (2, b"w" * 16, 78, 2, 5, 6, "was killed", None)],
        actors=[(1, b"a" * 16, 1, "A", None, "", 2, 1, 77, 0, 0, 0, 5, None, None, None, None)],
    )
    assert process.end() == 0
    assert os.listdir(tmp_path) == ["gcs.sqlite"]
    assert stat.S_IMODE(os.stat(tmp_path / "gcs.sqlite").st_mode) == 0o600
    ((status, end_time),) = ask(tmp_path / "gcs.sqlite", "SELECT status, end_time FROM job_view")
    assert status == "FAILED"
    assert end_time > 0
    assert ask(tmp_path / "gcs.sqlite", "SELECT state, exit_detail FROM worker_view ORDER BY no") == [
        ("DEAD", "ended with its session"),
        ("DEAD", "was killed"),
    ]
    assert ask(tmp_path / "gcs.sqlite", "SELECT state FROM actor_view") == [("DEAD",)]


def test_a_job_goes_on_when_its_gcs_was_cut_off_and_another_takes_over(start, tmp_path):
    process = start()
    process.write(jobs=[job()])
    process.end()
    start().write(tasks=[task(1)])
    assert ask(tmp_path / "gcs.sqlite", "SELECT status, end_time FROM job_view") == [("RUNNING", None)]


def test_a_job_that_said_its_end_keeps_it(start, tmp_path):
    process = start()
    process.write(jobs=[job(finished_us=7)])
    process.end()
    assert ask(tmp_path / "gcs.sqlite", "SELECT status FROM job_view") == [("SUCCEEDED",)]


def test_what_was_sent_right_before_the_end_is_written_and_half_a_frame_is_dropped(start, tmp_path):
    process = start()
    gcs.send(process.sock, (1, [("tasks", [task(1)])]))
    process.sock.sendall(struct.pack("<I", 1000) + b"half")
    assert process.end() == 0
    assert ask(tmp_path / "gcs.sqlite", "SELECT no FROM tasks") == [(1,)]


def test_all_that_a_dead_driver_had_sent_is_written(start, tmp_path, monkeypatch):
    monkeypatch.setattr(gcs, "GROUP_ROWS", 4)  # Of many acknowledgements only the first might find a reader.
    process = start()
    os.kill(process.pid, signal.SIGSTOP)
    for seq in range(1, 41):
        gcs.send(process.sock, (seq, [("tasks", [task(seq)])]))
    process.sock.close()
    os.kill(process.pid, signal.SIGCONT)
    assert process.wait() == 0
    assert ask(tmp_path / "gcs.sqlite", "SELECT count(*) FROM tasks") == [(40,)]


def test_an_answer_that_the_driver_left_unread_costs_none_of_what_it_sent(tmp_path):
    """The kernel then says ECONNRESET, where a driver that has read everything is an end of file."""
    ours, theirs = socket.socketpair()
    gcs.send(theirs, ("ack", 0))
    gcs.send(ours, (1, [("tasks", [task(1)])]))
    ours.close()
    file = gcs.Gcs(str(tmp_path / "gcs.sqlite"))
    with theirs, contextlib.closing(file.database):
        gcs.serve(theirs, file)
    assert ask(tmp_path / "gcs.sqlite", "SELECT no FROM tasks") == [(1,)]


def test_history_is_bounded_and_totals_stay_exact(start, tmp_path):
    process = start(history=1000)
    process.write(tasks=[task(0, RUNNING)], options=[(1, 1, "f", 0, 1, "{}", 3, "{}")])
    for first in range(1, 10_001, 500):
        state = FAILED if first == 1 else FINISHED
        process.write(
            tasks=[task(no, state, run_us=no) for no in range(first, first + 500)],
            events=[(no, no, "Kind", "", "text") for no in range(first, first + 500)],
            objects=[(no, b"o" * 16, 1, 2, 10, 1, 1, 2) for no in range(first, first + 500)],
        )
    process.end()
    path = tmp_path / "gcs.sqlite"
    assert ask(path, "SELECT state, tasks, run_us, longest_us FROM function_view ORDER BY 1") == [
        ("FAILED", 500, sum(range(1, 501)), 500),
        ("FINISHED", 9500, sum(range(501, 10_001)), 10_000),
        ("RUNNING", 1, 0, None),
    ]
    assert ask(path, "SELECT count(*), max(no), sum(state = 3) FROM tasks") == [(801, 10_000, 1)]
    for table in ("events", "objects"):
        assert ask(path, f"SELECT count(*), max(no) FROM {table}") == [(800, 10_000)]
    assert ask(path, "SELECT state, objects, size_bytes FROM object_totals") == [(2, 9200, 92_000)]


def test_the_file_stops_growing_when_the_history_is_full(start, tmp_path):
    process, path = start(history=2000), tmp_path / "gcs.sqlite"
    pages: list[int] = []
    for first in range(0, 80_000, 500):
        process.write(tasks=[task(no) for no in range(first, first + 500)])
        pages += ask(path, "PRAGMA page_count")[0]
    assert max(pages[20:]) <= max(pages[:20]) + 2  # Freed pages fit the next rows to a page or two.
    assert Path(f"{path}-wal").stat().st_size < 8_000_000


@pytest.mark.parametrize("rows", [[(1, 2)], [(1, 2)] * 50], ids=["one", "many"])
def test_a_row_that_the_schema_does_not_know_is_refused(start, rows):
    process = start()
    gcs.send(process.sock, (1, [("tasks", rows)]))
    answer = gcs.receive(process.sock)
    assert answer[:3] == ("error", 1, "invalid")
    assert "bindings" in answer[3]
    assert process.wait() == 1


def test_text_that_is_no_unicode_is_written_as_python_would_show_it(start, tmp_path):
    process = start()
    process.write(events=[(1, 5, "kind", "", "größer"), (2, 5, "kind", "", "half \ud800 a pair")])
    assert ask(tmp_path / "gcs.sqlite", "SELECT message FROM events") == [("größer",), ("half \\ud800 a pair",)]


def test_nothing_but_builtin_types_is_unpickled(start):
    ours, theirs = socket.socketpair()
    gcs.send(ours, (1, [("tasks", [(os.getcwd,)])]))
    with pytest.raises(pickle.UnpicklingError, match="getcwd"):
        gcs.receive(theirs)
    ours.close()
    theirs.close()


def test_ctrl_c_does_not_end_it(start):
    process = start()
    process.write(tasks=[task(1)])
    os.kill(process.pid, signal.SIGINT)
    process.write(tasks=[task(2)])
    assert process.end() == 0


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    with a_small_disk(tmp_path / "small") as directory:
        yield directory


@contextlib.contextmanager
def a_small_disk(directory: Path) -> Iterator[Path]:
    """A tmpfs of 2 MiB; needs root."""
    directory.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "minray-test", str(directory)]
    mounted = subprocess.run(mount, capture_output=True)
    if mounted.returncode:
        pytest.skip("cannot mount a tmpfs here")
    yield directory
    subprocess.run(["umount", "-l", directory], check=True)


def test_a_full_disk_is_told_and_nothing_is_lost_when_space_returns(start, small_disk):
    path = small_disk / "gcs.sqlite"
    process = start(path, history=100_000)
    process.write(tasks=[task(0)])
    ballast = small_disk / "ballast"
    with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
        while True:
            file.write(bytes(4096))
    sent, answer = 0, ("ack", 0)
    while answer[0] == "ack":
        sent += 1
        gcs.send(process.sock, (sent, [("tasks", [task(no) for no in range(sent * 100, sent * 100 + 100)])]))
        answer = gcs.receive(process.sock)
    assert answer[:3] in (("error", sent, "disk_full"), ("error", sent, "disk_io"))
    ballast.unlink()
    assert gcs.receive(process.sock) == ("ack", sent)
    assert process.end() == 0
    assert ask(path, "SELECT count(*) FROM tasks") == [(1 + sent * 100,)]


def test_a_driver_that_goes_away_while_the_disk_is_full_ends_the_gcs(start, small_disk, capfd):
    process = start(small_disk / "gcs.sqlite")
    process.write(tasks=[task(0)])
    blob = bytes(4_000_000)
    gcs.send(process.sock, (2, [("functions", [(1, b"f" * 16, "f", "m", blob, None)])]))
    assert gcs.receive(process.sock)[:3] == ("error", 2, "disk_full")
    assert process.end() == 1
    assert "ends without having written everything: database or disk is full" in capfd.readouterr().err
    assert ask(small_disk / "gcs.sqlite", "SELECT count(*) FROM tasks") == [(1,)]


@pytest.mark.parametrize("failures, written", [(1, True), (2, False)])
def test_a_disk_on_which_there_was_room_before_the_driver_went_is_tried_once_more(failures: int, written: bool) -> None:
    attempts = []

    def step() -> str:
        attempts.append(1)
        if len(attempts) <= failures:
            raise sqlite3.OperationalError("disk I/O error")
        return "written"

    ours, drivers = socket.socketpair()
    drivers.close()
    with ours, contextlib.nullcontext() if written else pytest.raises(sqlite3.OperationalError, match="disk I/O error"):
        assert gcs._insist(step, ours, 1, ["/nowhere"]) == "written"
    assert len(attempts) == 2
