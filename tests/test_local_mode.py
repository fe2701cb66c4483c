"""Local mode: what it is for, what only it does, and what it cannot do.

That programs come out the same as in a session of processes is tested in test_local_fidelity.py.
"""

import asyncio
import os
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
import types
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
from test_local_fidelity import Counter, add, depth, wide

import minray
from minray import api
from minray.stage import Deadlock
from minray.worker import Worker


class Asynchronous:
    async def wait(self):
        return 1


@pytest.fixture
def local():
    with minray.init(local_mode=True, num_cpus=2) as context:
        yield context


def test_everything_is_in_this_process_and_leaves_no_thread(local):
    before = set(threading.enumerate())
    assert minray.get(minray.remote(os.getpid).remote()) == os.getpid()
    assert set(threading.enumerate()) != before
    minray.shutdown()
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("minray")]


def test_a_task_runs_as_soon_as_it_is_submitted(local):
    seen = []
    remote = minray.remote(lambda path: open(path, "a").write("x"))
    with tempfile.NamedTemporaryFile() as file:
        for _ in range(3):
            remote.remote(file.name)
            seen.append(os.path.getsize(file.name))
    assert seen == [1, 2, 3]


def test_a_debugger_s_trace_function_sees_the_lines_of_tasks(local):
    def trace(frame, event, argument):
        if frame.f_code.co_name == "traced":
            lines.append(frame.f_lineno)
        return trace

    @minray.remote
    def traced():
        a = 1
        return a

    lines = []
    threading.settrace(trace)
    try:
        assert minray.get(traced.remote()) == 1
    finally:
        threading.settrace(None)
    first = traced._function.__code__.co_firstlineno
    assert {first + 2, first + 3} <= set(lines)


def test_tasks_that_sleep_do_so_at_the_same_time(local):
    sleep = minray.remote(lambda: time.sleep(0.3))
    began = time.monotonic()
    minray.get([sleep.remote(), sleep.remote()])
    assert time.monotonic() - began < 0.55


def test_the_driver_s_sleep_lets_tasks_go_on(local):
    log = []
    ref = minray.remote(lambda: time.sleep(0.05) or "done").remote()
    time.sleep(0.2)
    log.extend(minray.wait([ref], timeout=0)[0])
    assert log == [ref]


def test_actors_that_wait_for_each_other_are_a_deadlock_that_says_who_waits_for_what(local):
    @minray.remote
    class Partner:
        def meet(self, other):
            self.other = other

        def ask(self):
            return minray.get(self.other.ask.remote())

    one, other = Partner.remote(), Partner.remote()
    minray.get([one.meet.remote(other), other.meet.remote(one)])
    with pytest.raises(Deadlock) as caught:
        minray.get(one.ask.remote())
    text = str(caught.value)
    assert "driver waits for Partner.ask" in text
    assert re.search(r"Partner.ask \[[\w-]+\] has not begun: its actor Partner executes Partner.ask", text), text


def test_a_task_that_waits_for_cpus_that_actors_hold_is_a_deadlock_that_says_so(local, capfd):
    actor = Counter.options(num_cpus=2).remote()
    minray.get(actor.get.remote())
    with pytest.raises(Deadlock, match="wide .* has not begun: it needs 2 CPU, and free are 0 CPU"):
        minray.get(wide.remote())
    assert "actors hold too much" in capfd.readouterr().err
    del actor


def test_a_session_goes_on_after_a_deadlock(local):
    actor = Counter.options(num_cpus=2).remote()
    ref = wide.remote()
    with pytest.raises(Deadlock):
        minray.get(ref)
    minray.kill(actor)
    assert minray.get(ref) == "wide"


def test_threads_of_the_program_may_use_the_session(local):
    with ThreadPoolExecutor(3) as pool:
        results = list(pool.map(lambda i: minray.get([add.remote(i), depth.remote(2)]), range(12)))
    assert results == [[i + 1, 2] for i in range(12)]


def test_a_thread_may_set_free_what_the_driver_waits_for(local):
    actor = Counter.options(num_cpus=2).remote()
    ref = wide.remote()
    threading.Timer(0.3, lambda: minray.kill(actor)).start()
    assert minray.get(ref) == "wide"


def test_awaiting_in_an_event_loop_lets_its_other_tasks_run(local):
    async def main():
        ticks = 0

        async def tick():
            nonlocal ticks
            while True:
                await asyncio.sleep(0.02)
                ticks += 1

        ticker = asyncio.ensure_future(tick())
        result = await minray.remote(lambda: time.sleep(0.3) or 5).remote()
        ticker.cancel()
        return result, ticks

    result, ticks = asyncio.run(main())
    assert result == 5 and ticks >= 3


def test_killing_an_actor_lets_its_finally_run_but_not_its_calls(local, tmp_path):
    @minray.remote
    class Holder:
        def hold(self, path):
            try:
                time.sleep(60)
            finally:
                open(path, "w").write("let go")
                minray.get(minray.put(1))
                open(path, "w").write("went on")

    holder = Holder.remote()
    holder.hold.remote(str(tmp_path / "note"))
    minray.kill(holder)
    minray.get(add.remote(1))
    assert (tmp_path / "note").read_text() == "let go"


def test_objects_that_find_no_room_lie_in_files_until_the_end(tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    with minray.init(local_mode=True, object_store_memory=1 << 20):
        refs = [minray.put(np.full(50_000, i)) for i in range(6)]
        assert [int(minray.get(ref)[7]) for ref in refs] == list(range(6))
        assert api._core.node.describe("memory")["spilled"] and os.listdir(tmp_path)
    assert not os.listdir(tmp_path)


def test_arrays_stay_as_they_are_when_their_memory_is_used_again(local):
    kept = minray.get(minray.put(np.full(100_000, 7)))
    for i in range(5):
        minray.get(minray.put(np.full(100_000, i)))
    assert (kept == 7).all()
    minray.shutdown()
    assert (kept == 7).all()


def test_the_state_api_knows_what_has_happened(local):
    from minray import state

    minray.get([add.remote(i) for i in range(3)])
    counter = Counter.remote()
    minray.get(counter.get.remote())
    tasks = state.list_tasks(filters=[("name", "=", "add")])
    assert [task["state"] for task in tasks] == ["FINISHED"] * 3
    assert [actor["state"] for actor in state.list_actors()] == ["ALIVE"]


def test_ctrl_c_ends_a_get_and_the_session_goes_on(local):
    sleeping = minray.remote(lambda: time.sleep(60)).remote()
    timer = threading.Timer(0.3, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    with pytest.raises(KeyboardInterrupt):
        minray.get(sleeping)
    timer.join()
    assert minray.get(add.remote(1)) == 2


def test_a_thread_that_waits_is_told_of_the_end(local):
    told = []

    def wait():
        try:
            minray.get(minray.remote(lambda: time.sleep(60)).remote())
        except RuntimeError as error:
            told.append(str(error))

    thread = threading.Thread(target=wait)
    thread.start()
    while not any(strand.awaits for strand in api._core.stage.parked):
        time.sleep(0.01)
    minray.shutdown()
    thread.join(5)
    assert told == ["minray was shut down while this thread waited"]


def test_a_session_whose_task_cannot_be_interrupted_says_so(local):
    gate = threading.Event()
    sys.modules["test_local_mode_gate"] = types.SimpleNamespace(gate=gate)

    def stuck():
        sys.modules["test_local_mode_gate"].gate.wait(20)

    timer = threading.Timer(0.2, lambda: signal.pthread_kill(threading.main_thread().ident, signal.SIGINT))
    timer.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            minray.get(minray.remote(stuck).remote())
        with pytest.raises(RuntimeError, match="the driver was interrupted while a task ran that did not come to an end"):
            minray.get(add.remote(1))
    finally:
        del sys.modules["test_local_mode_gate"]
        gate.set()
        timer.join()


def test_a_lost_object_is_made_again(local):
    make = minray.remote(lambda: np.arange(50_000))
    ref = make.remote()
    assert minray.get(ref).sum() == minray.get(ref).sum()
    minray.testing.drop(ref)
    assert minray.get(ref)[-1] == 49_999


def test_a_task_is_no_driver(local):
    def begin():
        minray.init()

    with pytest.raises(RuntimeError, match="this is a worker"):
        minray.get(minray.remote(begin).remote())
    minray.get(minray.remote(minray.shutdown).remote())
    assert minray.is_initialized()


def test_what_needs_processes_is_refused(local):
    with pytest.raises(NotImplementedError, match="checkpoints protect an actor from the death of its process"):
        minray.remote(checkpoint_every=5, max_restarts=1)(Counter._class).remote()
    with pytest.raises(RuntimeError, match=r"faults\(\) kills processes"):
        minray.testing.faults().__enter__()
    with pytest.raises(NotImplementedError, match="asyncio actors have an event loop of their own"):
        minray.remote(Asynchronous).remote()
    minray.shutdown()
    with pytest.raises(ValueError, match="keeps no job's results"):
        minray.init(local_mode=True, job="x")


def test_sleep_is_python_s_own_again_after_the_end():
    before = time.sleep
    with minray.init(local_mode=True):
        assert time.sleep is not before
    assert time.sleep is before


def test_a_child_process_is_not_part_of_the_session(local):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if not minray.is_initialized() and api.core is api._core_of_this_process else 1)
    assert os.waitpid(pid, 0)[1] == 0
    assert minray.get(add.remote(1)) == 2


def test_a_program_runs_the_same_way_whatever_the_hash_seed(tmp_path):
    program = tmp_path / "program.py"
    program.write_text(
        "import minray\n"
        "@minray.remote\n"
        "class Log:\n"
        "    def __init__(self): self.lines = []\n"
        "    def note(self, line): self.lines.append(line)\n"
        "    def all(self): return self.lines\n"
        "@minray.remote\n"
        "def work(log, i):\n"
        "    for k in range(3): minray.get(log.note.remote((i, k)))\n"
        "minray.init(local_mode=True, num_cpus=3)\n"
        "log = Log.remote()\n"
        "minray.get([work.remote(log, i) for i in range(4)])\n"
        "print(minray.get(log.all.remote()))\n"
    )
    outputs = {
        subprocess.run(
            [sys.executable, str(program)], env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True
        ).stdout
        for seed in ("1", "2")
    }
    assert len(outputs) == 1 and "(3, 2)" in outputs.pop()


def test_a_local_worker_says_and_does_nothing_more_of_its_own_than_it_must():
    """Executing is `Worker`'s alone: what that learns works here, too."""
    from minray.local import LocalWorker

    own = {name for name in vars(LocalWorker) if name in vars(Worker)}
    assert not own & {"_execute", "_arguments", "_returns", "_parts", "_failure", "_function", "get_values"}


def test_what_belongs_to_a_process_of_its_own_is_refused_in_local_mode():
    with pytest.raises(NotImplementedError, match="runtime_env.*belongs to a process"):
        minray.init(local_mode=True, runtime_env={"env_vars": {"A": "1"}})
    assert not minray.is_initialized()
    with minray.init(local_mode=True):
        task = minray.remote(lambda: None)
        with pytest.raises(NotImplementedError, match="runtime_env.*belongs to a process"):
            task.options(runtime_env={"env_vars": {"A": "1"}}).remote()


def test_placement_groups_and_labels_are_the_nodes_and_so_they_are_there_in_local_mode():
    from minray.util import placement_group, remove_placement_group
    from minray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    with minray.init(local_mode=True, num_cpus=2, labels={"zone": "a"}):
        group = placement_group([{"CPU": 1}])
        minray.get(group.ready())
        inside = minray.remote(lambda: minray.get_runtime_context().get_placement_group_id())
        strategy = PlacementGroupSchedulingStrategy(group)
        assert minray.get(inside.options(scheduling_strategy=strategy).remote()) == group.id.hex()
        assert minray.available_resources()["CPU"] == 1
        remove_placement_group(group)
        assert minray.available_resources()["CPU"] == 2
        assert minray.get(inside.options(label_selector={"zone": "a"}).remote()) is None
        with pytest.raises(minray.exceptions.TaskUnschedulableError):
            minray.get(inside.options(label_selector={"zone": "b"}).remote())


def test_reset_removes_placement_groups():
    from minray.util import placement_group

    with minray.init(local_mode=True, num_cpus=2):
        group = placement_group([{"CPU": 1}], name="kept")
        assert group.wait(10)
        (told,) = minray.testing.reset().placement_groups
        assert "'kept'" in told and minray.available_resources()["CPU"] == 2
