"""Whoever is killed, in whatever combination and order: soon nothing is left (P5), and the next init sweeps (P8).

The driver runs in a process of its own, with everything that could be left behind: tasks that run, an actor, a
stopped worker, a process that a task has started and that has left its group, shared memory, spilled files, a GCS that
is writing.
"""

import contextlib
import itertools
import json
import os
import signal
import sqlite3
import subprocess
import sys
import time

import conftest
import pytest

import minray
from minray import testing
from minray.session import read_facts

PROCESSES_GONE_S = 2.0
MEMORY_GONE_S = 5.0

BUSY = """\
import json, os, subprocess, sys, time
import minray

@minray.remote
def busy(path):
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    with open(path + ".part", "w") as file:
        json.dump([os.getpid(), left.pid], file)
    os.rename(path + ".part", path)
    time.sleep(600)

@minray.remote
class Holder:
    def pid(self):
        return os.getpid()

minray.init(num_cpus=3, object_store_memory=2 << 20)
holder = Holder.remote()
pids = [minray.get(holder.pid.remote())]
kept = [minray.put(bytes(700_000)) for _ in range(5)]  # More than there is room for.
ref = busy.remote(sys.argv[1])
faults = minray.testing.faults()
faults.__enter__()
while not os.path.exists(sys.argv[1]):
    time.sleep(0.01)
faults.freeze(of=holder, at_message=None)
core = minray.api._core
minray.api.flush_records()
children = f"/proc/{core.zygote.pid}/task/{core.zygote.pid}/children"
print(json.dumps([core.session.path, os.getpid(), core.zygote.pid, open(children).read().split()]), flush=True)
spin = minray.remote(lambda: None)
while True:  # The GCS has something to write.
    minray.get([spin.remote() for _ in range(20)])
"""


def gcs_of(children):
    def has_database(pid):
        with contextlib.suppress(OSError):
            return any(os.readlink(f"/proc/{pid}/fd/{fd}").endswith("gcs.sqlite") for fd in os.listdir(f"/proc/{pid}/fd"))

    return next(filter(has_database, children))


def wait_until(condition, timeout_s, what):
    """Of other processes' doings there is no event to await."""
    started = time.monotonic()
    while not condition():
        assert time.monotonic() < started + conftest.within(timeout_s), what()
        time.sleep(0.01)


def is_alive(pid):
    try:
        return conftest.Process(pid).state not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


VICTIMS = [
    order
    for count in (1, 2, 3)
    for order in itertools.permutations(("driver", "zygote", "gcs"), count)
    if "driver" in order
]


@pytest.mark.parametrize("victims", VICTIMS, ids="-".join)
def test_whoever_dies_with_the_driver_nothing_stays(tmp_path, victims):
    path = tmp_path / "pids"
    command = [sys.executable, "-c", BUSY, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as driver:
        session_dir, pid, zygote, children = json.loads(driver.stdout.readline())
        children = list(map(int, children))
        pids = {"driver": pid, "zygote": zygote, "gcs": gcs_of(children)}
        started = json.loads(path.read_text())
        ours = [zygote, *children]
        arena = read_facts(session_dir)["arena"]
        assert all(map(is_alive, [*ours, *started])) and os.listdir(os.path.join(session_dir, "spill"))
        assert arena in conftest.arenas()
        for victim in victims:
            os.kill(pids[victim], signal.SIGKILL)
        wait_until(
            lambda: not any(map(is_alive, ours)), PROCESSES_GONE_S,
            lambda: f"{[conftest.Process(one) for one in ours if is_alive(one)]} live on",
        )  # fmt: skip
        driver.wait(timeout=60)
    if "zygote" in victims:  # Nobody is left to clean up, so the next driver does.
        with minray.init(num_cpus=1):
            assert minray.get(minray.remote(lambda: 1).remote()) == 1
    wait_until(lambda: not any(map(is_alive, started)), PROCESSES_GONE_S, lambda: "what the task has started lives on")
    wait_until(lambda: arena not in conftest.arenas(), MEMORY_GONE_S, lambda: f"{arena} is left in shared memory")
    wait_until(lambda: not os.path.exists(session_dir), MEMORY_GONE_S, lambda: "the session was not filed away")
    finished = session_dir.replace("/live/", "/finished/")
    assert not os.path.exists(os.path.join(finished, "spill"))
    with contextlib.closing(sqlite3.connect(os.path.join(finished, "gcs.sqlite"))) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        assert database.execute("SELECT count(*) FROM tasks").fetchone()[0] >= 3


def test_a_driver_that_is_killed_while_its_gcs_stands_still_leaves_nothing_either(tmp_path):
    path = tmp_path / "pids"
    command = [sys.executable, "-c", BUSY, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stdin=subprocess.DEVNULL, text=True) as driver:
        session_dir, pid, zygote, children = json.loads(driver.stdout.readline())
        children = list(map(int, children))
        ours = [zygote, *children, *json.loads(path.read_text())]
        os.kill(gcs_of(children), signal.SIGSTOP)
        os.kill(pid, signal.SIGKILL)
        wait_until(
            lambda: not any(map(is_alive, ours)), PROCESSES_GONE_S,
            lambda: f"{[conftest.Process(one) for one in ours if is_alive(one)]} live on",
        )  # fmt: skip
        driver.wait(timeout=60)
    assert not os.path.exists(session_dir)  # It was filed away, with what had been committed.
    log = os.path.join(session_dir.replace("/live/", "/finished/"), "logs", "gcs.log")
    with open(log) as file:
        assert "the GCS is ended without having written everything" in file.read()


@pytest.mark.parametrize("stopped", [("zygote",), ("zygote", "gcs"), ("gcs",)], ids="-".join)
def test_shutdown_waits_for_nobody_who_stands_still_for_longer_than_is_promised(tmp_path, capfd, stopped):
    @minray.remote
    def starts(path):
        path.write_text(str(subprocess.Popen(["sleep", "600"], start_new_session=True).pid))

    path = tmp_path / "pid"
    minray.init(num_cpus=1)
    minray.get(starts.remote(path))
    minray.api.flush_records()  # So that the GCS has its file.
    zygote = minray.api._core.zygote.pid
    with open(f"/proc/{zygote}/task/{zygote}/children") as file:
        children = list(map(int, file.read().split()))
    session_dir = minray.api._core.session.path
    for victim in stopped:
        os.kill(zygote if victim == "zygote" else gcs_of(children), signal.SIGSTOP)
    began = time.monotonic()
    minray.shutdown()
    took_s = time.monotonic() - began
    assert took_s < conftest.within(MEMORY_GONE_S)
    assert not is_alive(zygote) and not os.path.exists(session_dir)
    assert ("newest rows of the history" in capfd.readouterr().err) == ("gcs" in stopped)
    wait_until(
        lambda: not any(map(is_alive, [*children, int(path.read_text())])), max(0.1, MEMORY_GONE_S - took_s),
        lambda: "processes live on",
    )  # fmt: skip


@pytest.mark.parametrize("victims", [("gcs",), ("zygote",), ("gcs", "zygote"), ("zygote", "gcs")], ids="-".join)
def test_whoever_dies_while_the_driver_lives_the_session_goes_on_and_ends_clean(tmp_path, victims):
    """What is left is looked for by conftest.py; the task's process, which has left its group, here."""

    @minray.remote
    def starts(path):
        left = subprocess.Popen(["sleep", "600"], start_new_session=True)
        with open(path, "a") as file:
            file.write(f"{left.pid}\n")
        return left.pid

    @minray.remote
    def add(x):
        return x + 1

    path = tmp_path / "pids"
    with minray.init(num_cpus=2):
        minray.get(starts.remote(path))
        with testing.faults() as faults:
            for victim in victims:
                faults.kill(victim, at_message=10)
            ref = minray.put(0)
            for _ in range(30):
                ref = add.remote(ref)
            assert minray.get(ref) == 30
        assert [fired.subject for fired in faults.log] == [f"the {victim}" for victim in victims]
        assert len(minray.state.list_tasks()) == 31
        if "zygote" in victims:
            wait_until(lambda: not is_alive(int(path.read_text())), 5, lambda: "what the task has started lives on")
    assert not is_alive(int(path.read_text()))


def test_a_zygote_that_dies_costs_a_task_one_attempt_however_many_workers_it_had(tmp_path):
    """The idle workers have died with it as well, and must not be given the task before that is known."""

    @minray.remote(max_retries=1)
    def second_time(path):
        with open(path, "a") as file:
            file.write("x")
        while path.read_text() == "x":
            time.sleep(0.005)
        return "done"

    path = tmp_path / "attempts"
    with minray.init(num_cpus=4), testing.faults() as faults:
        ref = second_time.remote(path)
        wait_until(lambda: path.exists() and path.read_text(), 20, lambda: "it has not started")
        wait_until(lambda: all(w.pid for w in minray.api._core.node.scheduler.workers.values()), 20, lambda: "no workers")
        faults.kill("zygote", at_message=None)
        assert minray.get(ref) == "done"
    assert path.read_text() == "xx"
