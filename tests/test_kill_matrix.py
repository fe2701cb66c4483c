"""Each process is killed at every k-th message of a real run, and its results are those of a run without faults.

The push suite takes a sample, every 12th message, other ones for each process.  All of them, as the
promise says (every 4th message):

    MINRAY_KILL_EVERY=4 python -m pytest tests/test_kill_matrix.py

One run whose driver dies at its 40th message, to look at:    python tests/test_kill_matrix.py 40
"""

import itertools
import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

import minray
from minray import api, options, state, testing
from minray.task_spec import FINISHED

pytestmark = pytest.mark.one_python

EVERY = int(os.environ.get("MINRAY_KILL_EVERY", "12"))
TIMEOUT_S = 120 + 8000 // EVERY
ALONE, KILLS_A_SESSION = 48, 6
PROCESSES_GONE_S = 2.0
MEMORY_GONE_S = 5.0
EXACT = {"checkpoint_every": 3, "max_restarts": -1} if "checkpoint_every" in options.ACTOR else None


@minray.remote
def add(*parts):
    return sum(parts)


@minray.remote
def tree(depth):
    """Nested tasks: 2 ** depth of them."""
    return 1 if not depth else sum(minray.get([tree.remote(depth - 1) for _ in range(2)]))


@minray.remote
def ramp(size):
    return np.arange(size)


@minray.remote
def total(array, times=1):
    return int(array.sum()) * times


@minray.remote
def boxed(x):
    """A value that contains refs: to one that it has put, and to what its own child returns."""
    return [minray.put(np.full(20_000, x)), add.remote(x, 1)]


@minray.remote(max_restarts=-1, max_task_retries=-1)
class Doubler:
    """Without state: a new one is as good."""

    def double(self, x):
        return 2 * x

    def of_large(self, array):
        return int(array[-1])


class Ledger:
    def __init__(self):
        self.entries = []

    def append(self, entry):
        self.entries.append(entry)
        return list(self.entries)


def work():
    """Some 200 messages with everything in them; what it returns depends on nothing but this text."""
    doubler = Doubler.remote()
    calls = [doubler.double.remote(x) for x in range(8)]
    ledger = None if EXACT is None else minray.remote(Ledger).options(**EXACT).remote()
    entries = [ledger.append.remote(x) for x in range(8)] if ledger is not None else []
    chain = add.remote(1)
    for x in range(8):
        chain = add.remote(chain, x)
    layer = [add.remote(x) for x in range(9)]
    while len(layer) > 1:
        layer = [add.remote(*layer[at : at + 3]) for at in range(0, len(layer), 3)]
    nested = tree.remote(3)
    array, own = ramp.remote(50_000), minray.put(np.ones(40_000))
    sums = [total.remote(array, times) for times in range(3)] + [total.remote(own), doubler.of_large.remote(array)]
    boxes = [boxed.remote(x) for x in range(2)]
    results = [minray.get(calls), minray.get(chain), minray.get(layer), minray.get(nested), minray.get(sums)]
    for box in minray.get(boxes):
        inner, sum_of_inner = box
        results.append([int(minray.get(inner)[0]), minray.get(sum_of_inner), minray.get(total.remote(inner))])
    for x in range(12):  # One after the other, so that there are messages with little else going on.
        results.append(minray.get(add.remote(minray.get(doubler.double.remote(x)), 1)))
    if ledger is not None:
        entries += [ledger.append.remote(x) for x in range(8, 12)]
        results.append(minray.get(entries))
    return results


EXPECTED = [
    [2 * x for x in range(8)],
    1 + sum(range(8)),
    [sum(range(9))],
    8,
    [0, 1249975000, 2499950000, 40000, 49999],
    *([x, x + 1, 20_000 * x] for x in range(2)),
    *(2 * x + 1 for x in range(12)),
    *([[list(range(n + 1)) for n in range(12)]] if EXACT is not None else []),
]


@pytest.fixture(scope="module")
def faultless():
    """How many messages and tasks a run has in which nothing happens."""
    with minray.init(num_cpus=2), testing.faults() as faults:
        assert work() == EXPECTED
        return faults.messages, len(state.list_tasks(limit=10_000))


def test_a_run_has_some_two_hundred_messages(faultless):
    assert 150 <= faultless[0] <= 600


def moments(offset):
    """At which messages: until a run has ended before its moment came."""
    return itertools.count(1 + offset % EVERY, EVERY)


def sessions(offset):
    """Moments, a session's at a time.  A session outlives all these deaths, so it can take several, one after the other; that saves
    the greater part of the time.  But the first messages are those with which a session begins, and what it knows it is not told again:
    these moments have a session each."""
    every = moments(offset)
    for moment in every:
        if moment > ALONE:
            yield [moment, *itertools.islice(every, KILLS_A_SESSION - 1)]
        else:
            yield [moment]


@pytest.mark.timeout(TIMEOUT_S)
@pytest.mark.parametrize("role, offset", [("worker", 0), ("gcs", 7), ("zygote", 13), ("value", 3)])
def test_whoever_is_killed_or_lost_whenever_the_results_are_the_same(faultless, role, offset):
    import conftest

    before, last, at_work = conftest.Inventory(), 0, True
    for together in sessions(offset):
        with minray.init(num_cpus=2):
            for rounds, moment in enumerate(together, 1):
                where = f"{role} gone at message {moment}, round {rounds} of its session"
                with testing.faults(must_fire=False) as faults:
                    if role == "worker":
                        faults.kill_worker(at_message=moment)
                    elif role == "value":
                        faults.drop(at_message=moment)
                    else:
                        faults.kill(role, at_message=moment)
                    assert work() == EXPECTED, where
                    check_history(where, rounds * faultless[1])
                    at_work = bool(faults.log)
                if not at_work:
                    break
                last = moment
        conftest.check(before, where)
        if not at_work:
            break
    assert last > 150


def wait_until_quiet():
    """What is made again need not be waited for by anybody."""
    deadline = time.monotonic() + 20
    tasks = api._core.node.lineage.tasks
    while any(task.state < FINISHED for task in list(tasks.values())) and time.monotonic() < deadline:
        minray.wait([minray.put(0)], timeout=0)  # Runs the loop.
        time.sleep(0.002)


def check_history(where, num_tasks):
    """On the GCS's disk is every task that there was to be, and all of them ended well.

    A child of a parent that ran again has a second row if its own end had been forgotten by then."""
    wait_until_quiet()
    tasks = state.list_tasks(limit=10_000)
    assert len({task.task_id for task in tasks}) == num_tasks, where
    assert len(tasks) == len({task.no for task in tasks}) == api._core.node._tasks_made, where
    wrong = [f"{task.name} {task.state}" for task in tasks if task.state != "FINISHED"]
    assert not wrong, f"{where}: {wrong}"


@pytest.mark.timeout(TIMEOUT_S)
def test_whenever_the_driver_is_killed_nothing_is_left_and_it_can_run_again():
    import conftest

    environment = dict(os.environ)
    for moment in moments(19):
        where = f"driver killed at message {moment}"
        before = conftest.Inventory()
        with subprocess.Popen([sys.executable, __file__, str(moment)], stdout=subprocess.PIPE, env=environment) as driver:
            printed, _ = driver.communicate(timeout=60)
        ended_s = time.monotonic()
        if driver.returncode != -signal.SIGKILL:
            break  # It had ended before.
        assert printed == b"", where
        for kind, within_s in (("process", PROCESSES_GONE_S), ("shared memory", MEMORY_GONE_S)):
            while left := [what for one, what in before.leaks() if one == kind]:
                assert time.monotonic() < ended_s + conftest.within(within_s), f"{where}: {left} is left"
                time.sleep(0.01)
    assert (driver.returncode, json.loads(printed)) == (0, EXPECTED) and moment > 150


if __name__ == "__main__":
    minray.init(num_cpus=2)
    with testing.faults(must_fire=False) as planned:
        if sys.argv[1:]:
            planned.kill("driver", at_message=int(sys.argv[1]))
        print(json.dumps(work()))
