"""minray.testing.explore finds the order in which a program fails, shows it, and repeats it."""

import os
import re
import subprocess
import sys
import threading
import time
import types

import pytest

import minray
from minray.testing import ExplorationFailed, explore


@minray.remote
class Account:
    def __init__(self, balance=0):
        self.balance = balance

    def get(self):
        return self.balance

    def set(self, balance):
        self.balance = balance

    def add(self, amount):
        self.balance += amount


@minray.remote
def deposit_carelessly(account):
    balance = minray.get(account.get.remote())
    minray.get(account.set.remote(balance + 10))


@minray.remote
def deposit(account):
    minray.get(account.add.remote(10))


def two_deposits(how):
    account = Account.remote()
    minray.get([how.remote(account), how.remote(account)])
    assert minray.get(account.get.remote()) == 20


def failing(test, **options):
    with pytest.raises(ExplorationFailed) as caught:
        explore(test, **options)
    return caught.value


def test_a_lost_update_is_found_and_its_schedule_is_shown():
    found = failing(lambda: two_deposits(deposit_carelessly))
    assert isinstance(found.__cause__, AssertionError) and not isinstance(found.__cause__, ExplorationFailed)
    text = str(found)
    assert f"MINRAY_EXPLORE_SEED={found.seed}" in text and f"seeds=[{found.seed}]" in text
    # Both have read 0 before one of them has written.
    reads = [line for line in found.schedule if "Account.get#" in line and "returns 0" in line]
    assert len(reads) == 2
    assert "submits deposit_carelessly#1(Account#1)" in text
    assert re.search(r"calls Account.set#\d\(10\)", text)


def test_an_error_that_cannot_be_shown_is_found_like_any_other():
    class Mute(Exception):
        def __str__(self):
            raise RuntimeError("no")

    def program():
        raise Mute

    with pytest.raises(ExplorationFailed, match="Mute: its message cannot be shown"):
        explore(program, seeds=[0])


def test_some_orders_are_right_and_a_right_program_is_right_in_all():
    outcomes = set()
    for seed in range(20):
        try:
            explore(lambda: two_deposits(deposit_carelessly), seeds=[seed])
            outcomes.add("right")
        except ExplorationFailed:
            outcomes.add("wrong")
    assert outcomes == {"right", "wrong"}
    tried = explore(lambda: two_deposits(deposit), seeds=range(50))
    assert tried.seeds == 50 and tried.schedules > 25 and tried.steps > 500


def test_a_seed_repeats_the_schedule_exactly():
    found = failing(lambda: two_deposits(deposit_carelessly))
    again = failing(lambda: two_deposits(deposit_carelessly), seeds=[found.seed])
    assert again.schedule == found.schedule and again.seed == found.seed


def test_a_seed_repeats_the_schedule_in_another_process_with_another_hash_seed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        f"import sys; sys.path.insert(0, {os.path.dirname(__file__)!r})\n"
        "import test_explore as t\n"
        "for seed in (3, 4, 5, 6):\n"
        "    try:\n"
        "        t.explore(lambda: t.two_deposits(t.deposit_carelessly), seeds=[seed])\n"
        "    except t.ExplorationFailed as failed:\n"
        "        print('\\n'.join(failed.schedule))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, str(program)], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "77")
    }
    assert len(outputs) == 1 and "deposit_carelessly#1" in outputs.pop()


def test_the_environment_chooses_the_seed(monkeypatch):
    monkeypatch.setenv("MINRAY_EXPLORE_SEED", "12")
    assert explore(lambda: minray.get(minray.put(1))).seeds == 1
    monkeypatch.setenv("MINRAY_EXPLORE_SEED", "twelve")
    with pytest.raises(ValueError, match="MINRAY_EXPLORE_SEED must be a whole number, got 'twelve'"):
        explore(lambda: None)


def test_calls_of_one_caller_stay_in_order_and_those_of_two_do_not():
    @minray.remote
    class Log:
        def __init__(self):
            self.lines = []

        def note(self, line):
            self.lines.append(line)

        def all(self):
            return self.lines

    @minray.remote
    def write(log, who):
        minray.get([log.note.remote((who, i)) for i in range(3)])

    orders = set()

    def test():
        log = Log.remote()
        minray.get([write.remote(log, who) for who in "ab"])
        lines = minray.get(log.all.remote())
        assert [i for who, i in lines if who == "a"] == [i for who, i in lines if who == "b"] == [0, 1, 2]
        orders.add("".join(who for who, _ in lines))

    explore(test, seeds=range(60))
    assert len(orders) > 5


def test_a_deadlock_of_some_orders_is_found_and_told():
    @minray.remote
    class Room:
        def enter(self, other):
            return minray.get(other.answer.remote()) if other is not None else "alone"

        def answer(self):
            return "here"

    def test():
        left, right = Room.remote(), Room.remote()
        minray.get([left.enter.remote(right), right.enter.remote(left)])

    found = failing(test)
    assert "Deadlock: nothing can go on" in str(found)
    assert re.search(r"Room.answer#\d has not begun: its actor Room executes Room.enter#\d", str(found))


def test_time_is_virtual():
    def test():
        began, clock = time.monotonic(), time.time()
        slow = minray.remote(lambda: time.sleep(3600)).remote()
        with pytest.raises(minray.exceptions.GetTimeoutError):
            minray.get(slow, timeout=60)
        assert 60 <= time.monotonic() - began < 61 and 60 <= time.time() - clock < 61
        assert minray.wait([slow], timeout=0)[0] == []
        assert minray.get(slow, timeout=4000) is None
        assert 3600 <= time.monotonic() - began < 3601

    began = time.monotonic()
    explore(test, seeds=range(5))
    assert time.monotonic() - began < 60


def test_who_waits_with_a_time_limit_polls_without_waiting():
    @minray.remote
    class Flag:
        def __init__(self):
            self.up = False

        def raise_it(self):
            self.up = True

        def is_up(self):
            return self.up

    @minray.remote
    def later(flag):
        time.sleep(5)
        minray.get(flag.raise_it.remote())

    def test():
        flag = Flag.remote()
        done = later.remote(flag)
        while not minray.get(flag.is_up.remote()):
            time.sleep(1)
        minray.get(done)

    explore(test, seeds=range(10))


def test_a_program_without_an_end_is_stopped():
    def test():
        while True:
            minray.get(minray.remote(lambda: 1).remote())

    found = failing(test, seeds=[1], max_steps=300)
    assert "has not ended after 300 steps" in str(found)
    assert "lines before)" in str(found) and len(found.schedule) > 200


def test_a_step_that_does_not_end_is_told():
    gate = threading.Event()
    @minray.remote
    def stuck():
        sys.modules["test_explore_held"].gate.wait()

    sys.modules["test_explore_held"] = types.SimpleNamespace(gate=gate)
    try:
        timer = threading.Timer(1.5, gate.set)
        timer.start()
        found = failing(lambda: minray.get(stuck.remote()), seeds=[1], step_timeout_s=0.3)
        assert "a step of stuck#1 has taken longer than 0.3 s" in str(found)
    finally:
        gate.set()
        timer.join()
        del sys.modules["test_explore_held"]


def test_threads_of_the_program_are_refused():
    errors = []

    def test():
        def use():
            try:
                minray.get(minray.remote(lambda: 1).remote())
            except RuntimeError as error:
                errors.append(str(error))

        thread = threading.Thread(target=use)
        thread.start()
        thread.join()

    explore(test, seeds=[1])
    assert "which minray.testing.explore cannot schedule" in errors[0]


def test_random_numbers_of_a_program_are_repeated_with_the_seed():
    import random

    seen = []

    def test():
        seen.append((random.random(), minray.get(minray.remote(lambda: random.random()).remote())))

    before = random.getstate()
    explore(test, seeds=[5, 6, 5])
    assert seen[0] == seen[2] != seen[1]
    assert random.getstate() == before


def test_values_are_shown_without_running_their_code():
    class Loud:
        def __init__(self):
            self.x = 1

        def __setstate__(self, state):
            raise RuntimeError("somebody has unpickled me")

        def __repr__(self):
            return "LOUD"

    take = minray.remote(num_cpus=0)(lambda *args, **kwargs: 1)

    def test():
        ref = minray.put(7)
        refs = [take.options(name="take").remote(1, "x", ref, key=[ref]), take.options(name="take").remote(Loud())]
        minray.wait(refs, num_returns=2)
        raise AssertionError("shown")

    text = str(failing(test, seeds=[1]))
    assert "take#1(1, 'x', put 1, key=[put 1])" in text
    assert "take#2(" in text and "LOUD" not in text


def test_what_is_no_test_or_no_seed_is_refused(session):
    with pytest.raises(RuntimeError, match="there is one already"):
        explore(lambda: None)
    with pytest.raises(TypeError, match="explore\\(\\) takes a function that uses minray"):
        explore(3)
    minray.shutdown()
    with pytest.raises(ValueError, match="whole numbers, at least one"):
        explore(lambda: None, seeds=[])
    with pytest.raises(ValueError, match="whole numbers"):
        explore(lambda: None, seeds=["a"])


def test_the_next_run_and_the_program_after_it_start_afresh():
    names = []

    def test():
        with pytest.raises(ValueError):
            minray.get_actor("kept")
        names.append(Account.options(name="kept", lifetime="detached").remote())

    explore(test, seeds=range(5))
    assert len(names) == 5 and not minray.is_initialized()
