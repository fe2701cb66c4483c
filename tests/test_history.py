"""Histories of real runs, with faults, checked from outside (history.py); and that the checker sees what is wrong."""

import copy
import os
import threading
import time

import history
import pytest

import minray
from minray import options, testing

pytestmark = pytest.mark.one_python

EXACT = "checkpoint_every" in options.ACTOR

# ---------------------------------------------------------------- the checker


def written(tmp_path, operations):
    """A history of operations, each (what, subject, input, end, value), one after the other."""
    recorder = history.Recorder(tmp_path / "history")
    for what, subject, input, end, value in operations:
        op = recorder.invoke(what, subject, input, mortal=what == "attempt")
        if end is not None:
            getattr(recorder, end)(op, value)
    return history.read(recorder.path)


A1, A2, B1, B2 = ["a", 1], ["a", 2], ["b", 1], ["b", 2]
TRUE = [
    ("attempt", "t", None, None, None),  # It was killed.
    ("attempt", "t", None, "ok", [7, "x"]),
    ("get", "t", None, "ok", [7, "x"]),
    ("get", "t", None, "ok", [7, "x"]),
    ("append", "l", A1, "ok", [A1]),
    ("append", "l", B1, "unknown", "timeout"),
    ("append", "l", A2, "ok", [A1, B1, A2]),
    ("append", "l", B2, "fail", "not run"),
    ("read", "l", None, "ok", [A1, B1, A2]),
]


def test_what_can_be_true_is_not_complained_of(tmp_path):
    assert history.check(written(tmp_path, TRUE)) == []


@pytest.mark.parametrize(
    "at, planted, says",
    [
        (2, ("get", "t", None, None, None), "has not ended"),
        (3, ("get", "t", None, "ok", [7, "y"]), "has 2 values"),
        (3, ("get", "t", None, "fail", "error"), "value for some and is an error for others"),
        (1, ("attempt", "t", None, "ok", [8, "x"]), "which no attempt had made by then"),
        (1, ("attempt", "t", None, None, None), "which no attempt had made by then"),
        (6, ("append", "l", A2, "ok", [A1, B1, A2, A2]), "is in it twice"),  # A call that ran twice.
        (6, ("append", "l", A2, "ok", [A2]), "does not fit"),  # State that was lost.
        (6, ("append", "l", A2, "ok", [A2]), "forgets what an earlier one had"),
        (6, ("append", "l", A2, "ok", [A1, B1]), "does not end with it"),  # Another call's reply.
        (6, ("append", "l", A2, "ok", [A2, A1, B1]), "out of order"),
        (7, ("append", "l", B2, "ok", [A1, A2, B2]), "does not fit"),  # A fork: not a beginning of one sequence.
        (8, ("read", "l", None, "ok", [A1, B1]), "forgets what an earlier one had"),
        (8, ("read", "l", None, "ok", [A1, B1, A2, ["c", 1]]), "nobody has appended it"),
        (8, ("read", "l", None, "ok", [A1, B1, A2, B2]), "its append failed"),
        (5, ("append", "l", A1, "ok", [A1, A1]), "appended 2 times"),
    ],
)
def test_a_planted_fault_is_found(tmp_path, at, planted, says):
    operations = copy.copy(TRUE)
    operations[at] = planted
    faults = history.check(written(tmp_path, operations))
    assert any(says in fault for fault in faults), faults


def test_an_end_without_a_beginning_and_a_second_end_are_found(tmp_path):
    events = written(tmp_path, TRUE)
    last = events[-1]
    faults = history.check([*events, last, {**last, "op": "nobody's"}])
    assert len(faults) == 2 and "has ended twice" in faults[0] and "was not invoked" in faults[1]


def test_a_value_that_comes_before_it_was_made_is_found(tmp_path):
    operations = [TRUE[2], TRUE[1]]
    assert "no attempt had made by then" in history.check(written(tmp_path, operations))[0]


def test_what_overlaps_may_be_in_either_order(tmp_path):
    recorder = history.Recorder(tmp_path / "history")
    first, second = recorder.invoke("append", "l", A1), recorder.invoke("append", "l", B1)
    recorder.ok(first, [B1, A1])
    recorder.ok(second, [B1])
    assert history.check(history.read(recorder.path)) == []


# ---------------------------------------------------------------- real runs


@minray.remote(max_retries=-1)
def make(recorder, subject, luck, *parts):
    """Returns what nobody else does; with `luck` each attempt something new."""
    op = recorder.invoke("attempt", subject, mortal=True)
    value = [subject, os.urandom(4).hex() if luck else "", [part[0] for part in parts]]
    time.sleep(0.001)
    recorder.ok(op, value)
    return value


@minray.remote(max_retries=-1)
def get_elsewhere(recorder, refs):
    """Another process that gets the same objects."""
    for subject, ref in refs.items():
        op = recorder.invoke("get", subject, mortal=True)
        recorder.ok(op, minray.get(ref))
    return len(refs)


class Ledger:
    def __init__(self):
        self.entries = []

    def append(self, entry):
        self.entries.append(entry)
        return self.entries

    def read(self):
        return self.entries


def use(recorder, thread, ledger, luck):
    """What one thread of the driver does."""
    refs = {}
    for number in range(12):
        subject = f"task {thread}-{number}"
        refs[subject] = make.remote(recorder, subject, luck, *list(refs.values())[-2:])
        if ledger is not None:
            entry = [f"thread {thread}", number]
            op = recorder.invoke("append", "ledger", entry)
            try:
                recorder.ok(op, minray.get(ledger.append.remote(entry), timeout=60))
            except minray.exceptions.RayError as error:
                recorder.unknown(op, error)
    elsewhere = get_elsewhere.remote(recorder, refs)
    for subject, ref in refs.items():
        op = recorder.invoke("get", subject)
        recorder.ok(op, minray.get(ref, timeout=60))
    assert minray.get(elsewhere, timeout=60) == len(refs)


def in_threads(recorder, ledger, luck=True):
    threads = [threading.Thread(target=use, args=(recorder, number, ledger, luck)) for number in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=90)
    if ledger is not None:
        op = recorder.invoke("read", "ledger")
        recorder.ok(op, minray.get(ledger.read.remote(), timeout=60))
    return history.read(recorder.path)


@pytest.mark.parametrize("seed", range(4))
def test_no_history_of_tasks_with_faults_is_impossible(session, tmp_path, seed):
    """Where values are lost, too, tasks must be deterministic: what is made again is not what it was."""
    losing = seed % 2
    with testing.faults(seed=seed) as faults:
        faults.random(rate=0.04, kinds=["kill_worker", "freeze", "kill_gcs", *["drop"] * losing], at_most=12)
        faults.kill("zygote", at_message=100)
        events = in_threads(history.Recorder(tmp_path / "history"), None, luck=not losing)
    assert history.check(events) == []
    attempts = [event for event in events if event.get("what") == "attempt"]
    assert len(attempts) >= 36 and len(faults.log) >= 3


@pytest.mark.skipif(not EXACT, reason="actors have no checkpoint_every yet")
@pytest.mark.parametrize("seed", range(3))
def test_no_history_of_an_actor_with_recovery_is_impossible(session, tmp_path, seed):
    ledger = minray.remote(Ledger).options(checkpoint_every=4, max_restarts=-1).remote()
    with testing.faults(seed=seed) as faults:
        faults.kill_worker(of=ledger, at_message=17, times=4)
        faults.random(rate=0.02, kinds=["kill_worker", "freeze"], at_most=8)
        events = in_threads(history.Recorder(tmp_path / "history"), ledger)
    assert history.check(events) == []
    appended = [event for event in events if event.get("what") == "append"]
    final = events[-1]["value"]
    assert len(appended) == len(final) == 36


def test_an_actor_without_recovery_forgets_and_the_checker_sees_it(session, tmp_path):
    ledger = minray.remote(Ledger).options(max_restarts=-1, max_task_retries=-1).remote()
    with testing.faults() as faults:
        faults.kill_worker(of=ledger, at_message=30)
        events = in_threads(history.Recorder(tmp_path / "history"), ledger)
    assert any("forgets what an earlier one had" in fault for fault in history.check(events))


def test_a_lost_result_of_a_task_with_luck_comes_back_as_another_and_the_checker_sees_it(session, tmp_path):
    """docs/promises.md says so: a replay is as deterministic as its task."""
    recorder = history.Recorder(tmp_path / "history")
    ref = make.remote(recorder, "task", True)
    for _ in range(2):
        recorder.ok(recorder.invoke("get", "task"), minray.get(ref))
        testing.drop(ref)
    assert "task has 2 values" in history.check(history.read(recorder.path))[0]
