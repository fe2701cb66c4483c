"""What two threads of one process may do at once, and what is left when a wait ends early."""

import gc
import os
import threading
import time
import types
import weakref

import pytest
from conftest import check_node

import minray
from minray import api, core_worker, ids
from minray.messages import ActorLookedUp, TemplateDefined


@pytest.mark.parametrize("next_id", ["next_task_id", "next_put_id"])
def test_two_threads_that_begin_at_once_get_two_ids(next_id, monkeypatch):
    context, made = core_worker.TaskContext(ids.root_task_id(b"job"), None), []
    real = core_worker.itertools.count

    def slow_count(start):
        counter = real(start)
        time.sleep(0.05)  # As if another thread were given the GIL here.
        return counter

    monkeypatch.setattr(core_worker, "itertools", types.SimpleNamespace(count=slow_count))
    threads = [threading.Thread(target=lambda: made.append(getattr(context, next_id)())) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(set(made)) == 3


def test_a_thread_that_the_last_task_left_behind_numbers_no_child_twice():
    """The main thread begins another task while that thread is between two steps of numbering."""
    context, made, go, done = core_worker.TaskContext(ids.root_task_id(b"1"), None), [], threading.Event(), threading.Event()
    pack = ids.pack_id

    def left_behind():
        made.append(context.next_task_id())
        numbers = context.numbers
        go.set()
        done.wait()
        made.append(pack(numbers[1], next(numbers[2]), 0))  # What it had read before it lost its turn.
        made.append(context.next_task_id())

    thread = threading.Thread(target=left_behind)
    thread.start()
    go.wait()
    context.task_id = ids.root_task_id(b"2")
    made.append(context.next_task_id())
    done.set()
    thread.join()
    made.append(context.next_task_id())
    assert len(set(made)) == 5 and all(ids.counter_of(one) for one in made)


def test_a_second_execution_of_a_task_gives_its_children_the_same_ids():
    context = core_worker.TaskContext(ids.NIL, None)
    made = []
    for _ in range(2):
        context.task_id = bytes(bytearray(ids.root_task_id(b"1")))  # As it comes in another frame.
        made.append([context.next_task_id(), context.next_put_id(), context.next_task_id()])
    assert made[0] == made[1] and len(set(made[0])) == 3


def test_an_execution_after_attempts_that_raised_has_children_and_puts_of_its_own():
    context, task = core_worker.TaskContext(ids.NIL, None), ids.root_task_id(b"1")
    made = []
    for context.mark in (True, False, -1, -1, -2):
        context.task_id = bytes(bytearray(task))
        made.append((context.next_task_id(), context.next_task_id(), context.next_put_id(), context.next_put_id()))
    assert made[0] == made[1] and made[2] == made[3]
    assert len({*made[0], *made[2], *made[4]}) == 12
    assert all(ids.is_put(one) == (n >= 2) for numbers in made for n, one in enumerate(numbers))


def test_what_a_thread_submits_in_a_worker_without_a_task_is_sent_at_once(session, tmp_path):
    @minray.remote
    def touch(path):
        open(path, "w").close()

    @minray.remote
    class Leaves:
        def behind(self, directory):
            def later():
                time.sleep(0.1)  # The method has returned by then.
                self.refs = [touch.remote(f"{directory}/{n}") for n in range(3)]

            threading.Thread(target=later).start()

    leaves = Leaves.remote()
    minray.get(touch.remote(str(tmp_path / "warm")))
    minray.get(leaves.behind.remote(str(tmp_path)))
    deadline = time.monotonic() + 10
    while len(list(tmp_path.iterdir())) < 4:
        assert time.monotonic() < deadline, f"only {sorted(path.name for path in tmp_path.iterdir())} were run"
        minray.wait([minray.put(0)])  # The driver's loop runs, and nobody speaks to the actor.
        time.sleep(0.005)


def test_a_function_that_two_threads_use_first_is_known_before_either_call(session, monkeypatch):
    core, results = api.core(), []
    real = core.send

    def slow_send(event):
        if isinstance(event, TemplateDefined):
            time.sleep(0.05)
        real(event)

    monkeypatch.setattr(core, "send", slow_send)

    @minray.remote
    def one():
        return 1

    threads = [threading.Thread(target=lambda: results.append(minray.get(one.remote()))) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.02)
    for thread in threads:
        thread.join()
    assert results == [1, 1]


def test_an_actor_that_was_found_too_late_is_not_kept_for_whoever_looked(session):
    @minray.remote
    class Named:
        pass

    actor = Named.options(name="found", namespace="here").remote()
    minray.get(actor.__ray_ready__.remote())
    core = api.core()
    found = core.ask(lambda request_id: ActorLookedUp(core.client, request_id, "here", "found"))
    core.answered_in_vain(found)  # As if get_actor() had been interrupted meanwhile.
    assert list(core.unpinned) == [found[0]]


@pytest.mark.parametrize("where", ["task", "actor with threads", "beside get"])
def test_what_a_task_submits_starts_although_the_task_goes_on(session, where, tmp_path):
    ran = str(tmp_path / "ran")

    @minray.remote(num_cpus=0)
    def note(number):
        open(f"{ran}{number}", "w").close()

    def until_they_ran():
        deadline = time.monotonic() + 60
        while not all(os.path.exists(f"{ran}{number}") for number in range(3)):
            if time.monotonic() > deadline:
                return "they wait for the end of the task that has submitted them"
            time.sleep(0.01)
        return "they ran"

    def burst_then_work():
        time.sleep(0.05)  # Longer than the caretaker waits.
        refs = [note.remote(number) for number in range(3)]
        return until_they_ran(), refs

    def beside_get():
        found = []
        thread = threading.Thread(target=lambda: found.append(burst_then_work()))
        thread.start()
        minray.get(minray.remote(num_cpus=0)(until_they_ran).remote())
        thread.join()
        return found[0]

    @minray.remote(max_concurrency=2)
    class Threaded:
        def burst(self):
            return burst_then_work()

    minray.get([note.remote("before") for _ in range(8)])
    ref = {
        "task": lambda: minray.remote(burst_then_work).remote(),
        "actor with threads": lambda: Threaded.remote().burst.remote(),
        "beside get": lambda: minray.remote(beside_get).remote(),
    }[where]()
    assert minray.get(ref)[0] == "they ran"


def test_an_answer_that_comes_in_the_moment_of_an_interrupt_pins_nothing(session):
    @minray.remote
    def interrupted(refs):
        core = api.core()
        real = core.loop.wait

        def wait(waiter, deadline=None):
            real(waiter, deadline)
            raise KeyboardInterrupt

        core.loop.wait = wait
        try:
            with pytest.raises(KeyboardInterrupt):
                minray.get(refs[0])
        finally:
            core.loop.wait = real

    ref = minray.put(bytes(1 << 20))
    minray.get(interrupted.remote([ref]))
    node, deadline = api.core().node, time.monotonic() + 5
    while any(worker.pins for worker in node.scheduler.workers.values()) and time.monotonic() < deadline:
        minray.wait([ref], timeout=0)
    assert not any(worker.pins for worker in node.scheduler.workers.values())


def test_a_future_ends_with_its_session():
    with minray.init(num_cpus=1):
        future = minray.remote(time.sleep).remote(60).future()
    with pytest.raises(RuntimeError, match="shut down"):
        future.result(timeout=60)


def test_remote_functions_do_not_keep_the_sessions_that_they_were_used_in():
    functions, sessions = [], []
    for _ in range(3):
        functions.append(minray.remote(lambda: 1))
        with minray.init(num_cpus=1):
            minray.get(functions[-1].remote())
            sessions.append(weakref.ref(api.core()))
    gc.collect()
    assert [session() for session in sessions[:2]] == [None, None]


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_an_error_in_the_node_is_told_to_everyone_who_waits(monkeypatch, capfd):
    with minray.init(num_cpus=1):
        core = api.core()
        ref = minray.remote(time.sleep).remote(0.2)
        future = ref.future()

        def handle(event, now):
            raise KeyError("planted")

        monkeypatch.setattr(core.node, "handle", handle)
        with pytest.raises(RuntimeError, match="planted"):
            future.result(timeout=60)
        monkeypatch.undo()
        with pytest.raises(RuntimeError, match=r"planted.*shutdown"):
            minray.get(ref)


def test_wake_is_heard_although_others_wake_at_the_same_time(session):
    raylet = api.core().raylet
    over = threading.Event()

    def hammer():
        while not over.is_set():
            raylet.wake()
            time.sleep(0)

    threads = [threading.Thread(target=hammer) for _ in range(2)]
    for thread in threads:
        thread.start()
    time.sleep(2)
    over.set()
    for thread in threads:
        thread.join()
    deadline = time.monotonic() + 5
    while raylet._awake and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not raylet._awake


def test_what_does_not_add_up_at_the_node_of_a_real_session_fails_the_test_that_ends_it():
    minray.init(num_cpus=1)
    core = api._core
    assert minray.get(minray.remote(len).remote("abc")) == 3
    check_node(core)
    core.node.scheduler.available["CPU"] += 1
    with pytest.raises(AssertionError, match="CPU: 10001 free"):
        minray.shutdown()
    assert not minray.is_initialized()
