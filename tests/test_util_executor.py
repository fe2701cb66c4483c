"""What CPython's documentation says of concurrent.futures, said of minray's executor."""

import asyncio
import concurrent.futures
import gc
import os
import signal
import threading
import time

import numpy as np
import pytest

import minray
from minray import ids
from minray.util import Executor

pytestmark = pytest.mark.usefixtures("module_session")


def square(x):
    return x * x


def wait_at(path, value=None):
    """Until somebody opens the other end."""
    open(path).close()
    return value


def open_gate(path):
    open(path, "w").close()


@pytest.fixture(scope="module")
def executor(module_session):
    with Executor(max_workers=2) as executor:
        yield executor


def wait_until_running(future):
    pause = threading.Event()
    while not future.running():
        pause.wait(0.005)


# ---------------------------------------------------------------- submit and map


def test_submit_returns_a_future_of_the_result(executor):
    future = executor.submit(square, 3)
    assert isinstance(future, concurrent.futures.Future)
    assert future.result() == 9 and future.done() and not future.running() and future.exception() is None


def test_anything_that_can_be_called_is_a_job(executor):
    factor = 3
    assert executor.submit(lambda x: factor * x, 2).result() == 6
    assert executor.submit(max, 1, 5, key=lambda x: -x).result() == 1
    words = ["a"]
    assert executor.submit(words.count, "a").result() == 1
    words.append("a")  # A bound method has a state, which is sent each time.
    assert executor.submit(words.count, "a").result() == 2


def test_arguments_are_as_they_were_when_the_job_was_submitted(gate):
    with Executor(1) as executor:
        executor.submit(wait_at, gate)
        numbers = [1, 2, 3]
        future = executor.submit(sum, numbers)
        numbers.append(4)
        open_gate(gate)
        assert future.result() == 6


def test_large_arrays_go_both_ways(executor):
    array = np.arange(500_000)
    doubled = executor.submit(lambda a: 2 * a, array).result()
    assert np.array_equal(doubled, 2 * array)


@pytest.mark.parametrize("chunksize", [1, 3, 100])
def test_map_is_like_the_builtin(executor, chunksize):
    assert list(executor.map(pow, range(10), range(10), chunksize=chunksize)) == list(map(pow, range(10), range(10)))
    assert list(executor.map(square, [], chunksize=chunksize)) == []


def test_map_raises_when_it_is_the_turn_of_what_raised(executor):
    results = executor.map(lambda x: 1 / x, [1, 0, 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)


def test_map_with_a_timeout_counts_from_its_call(executor, gate):
    late = executor.map(lambda x: wait_at(gate), [1], timeout=0.05)
    with pytest.raises(concurrent.futures.TimeoutError):
        next(late)
    open_gate(gate)
    assert list(executor.map(square, [1, 2], timeout=60)) == [1, 4]


def test_a_map_that_is_abandoned_cancels_what_has_not_begun(gate, tmp_path):
    with Executor(1) as executor:
        results = executor.map(lambda x: wait_at(gate) if x == 1 else (tmp_path / f"ran{x}").touch(), range(4))
        next(results)
        results.close()
        open_gate(gate)
    assert sorted(path.name for path in tmp_path.glob("ran*")) == ["ran0"]


def test_nonsense_is_refused():
    for wrong in (
        {"max_workers": 0}, {"max_tasks_per_child": 0}, {"max_tasks_per_child": 1.5}, {"max_retries": -2},
        {"max_workers": 3, "actor_options": {"num_cpus": 1}},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            Executor(**wrong)
    with pytest.raises(TypeError):
        Executor(initializer=3)
    with pytest.raises(TypeError, match="max_restart"):
        Executor(actor_options={"max_restart": 3})
    with Executor(1) as executor, pytest.raises(ValueError, match="chunksize"):
        executor.map(square, [1], chunksize=0)


# ---------------------------------------------------------------- errors


class Odd(Exception):
    def __init__(self, number, why):
        super().__init__(number, why)
        self.number = number


def raise_odd():
    raise Odd(7, "odd")


def test_a_future_has_the_exception_itself_and_the_remote_traceback_as_its_cause(executor):
    future = executor.submit(raise_odd)
    error = future.exception()
    assert type(error).__name__ == "Odd" and error.number == 7 and not isinstance(error, minray.exceptions.RayError)
    assert type(error.__cause__).__name__ == "RemoteTraceback" and "in raise_odd" in str(error.__cause__)
    with pytest.raises(Exception, match="odd"):
        future.result()


def test_what_ends_a_process_elsewhere_is_an_exception_of_the_job(executor):
    assert type(executor.submit(exit, 3).exception()) is SystemExit
    assert executor.submit(square, 2).result() == 4


def test_what_cannot_be_sent_is_an_exception_of_the_future(executor):
    error = executor.submit(square, threading.Lock()).exception()
    assert isinstance(error, TypeError) and "cannot be pickled" in str(error)
    error = executor.submit(threading.Lock).exception()  # on the way back
    assert isinstance(error, TypeError) and "cannot be pickled" in str(error)


def test_a_job_whose_process_dies_runs_again(executor, tmp_path):
    def die_once(mark):
        if not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return "alive"

    assert executor.submit(die_once, tmp_path / "died").result() == "alive"


def test_a_job_that_kills_its_process_each_time_breaks_the_executor():
    with Executor(1, max_retries=0) as executor:
        future = executor.submit(os._exit, 3)
        behind = executor.submit(square, 2)
        with pytest.raises(concurrent.futures.BrokenExecutor, match="exit"):
            future.result()
        assert isinstance(behind.exception(), concurrent.futures.BrokenExecutor)
        with pytest.raises(concurrent.futures.BrokenExecutor, match="takes no more jobs"):
            executor.submit(square, 2)


def test_kill_workers_ends_what_runs_and_refuses_what_comes(gate):
    executor = Executor(1)
    future = executor.submit(wait_at, gate)
    waiting = executor.submit(square, 2)
    executor.kill_workers()
    for each in (future, waiting):
        with pytest.raises(concurrent.futures.BrokenExecutor, match="kill_workers"):
            each.result(timeout=60)
    executor.shutdown()


# ---------------------------------------------------------------- cancelling


def test_a_job_that_waits_can_be_cancelled_and_one_that_runs_cannot(gate, tmp_path):
    with Executor(1) as executor:
        running = executor.submit(wait_at, gate)
        waiting = executor.submit((tmp_path / "ran").touch)
        assert running.running() and not waiting.running()
        assert not running.cancel()
        assert waiting.cancel() and waiting.cancelled() and waiting.done()
        with pytest.raises(concurrent.futures.CancelledError):
            waiting.result()
        open_gate(gate)
    assert running.result() is None and not (tmp_path / "ran").exists()


def test_shutdown_may_cancel_what_waits(gate):
    executor = Executor(1)
    running = executor.submit(wait_at, gate, 5)
    waiting = [executor.submit(square, x) for x in range(3)]
    executor.shutdown(wait=False, cancel_futures=True)
    done, _ = concurrent.futures.wait(waiting, timeout=60)
    assert len(done) == 3 and all(future.cancelled() for future in waiting)
    open_gate(gate)
    assert running.result() == 5


# ---------------------------------------------------------------- shutdown


def test_shutdown_waits_for_what_was_submitted_and_refuses_more():
    executor = Executor(2)
    futures = [executor.submit(square, x) for x in range(10)]
    executor.shutdown()
    assert all(future.done() for future in futures)
    with pytest.raises(RuntimeError, match="after shutdown"):
        executor.submit(square, 2)
    executor.shutdown()  # Again does no harm.


def test_shutdown_without_waiting_lets_the_rest_be_done(gate):
    executor = Executor(1)
    futures = [executor.submit(wait_at, gate, 1), executor.submit(os.getpid)]
    executor.shutdown(wait=False)
    assert not futures[0].done()
    open_gate(gate)
    assert futures[0].result() == 1
    wait_until_gone(futures[1].result())  # Though the executor is still there.


def test_an_executor_that_is_dropped_does_what_was_submitted_and_its_processes_end():
    executor = Executor(1)
    pid = executor.submit(os.getpid).result()
    future = executor.submit(square, 4)
    del executor
    gc.collect()
    assert future.result(timeout=60) == 16
    wait_until_gone(pid)


def wait_until_gone(pid):
    deadline = time.monotonic() + 60
    pause = threading.Event()
    while os.path.exists(f"/proc/{pid}"):
        assert time.monotonic() < deadline, f"process {pid} lives"
        pause.wait(0.01)


def test_at_the_end_of_the_interpreter_jobs_are_done_first(run_driver, tmp_path):
    run_driver(
        f"""
import pathlib, time
from minray.util import Executor
def job(x):
    time.sleep(0.05)
    pathlib.Path({str(tmp_path)!r}, f"done{{x}}").touch()
executor = Executor(2)
futures = [executor.submit(job, x) for x in range(6)]
"""
    )
    assert len(list(tmp_path.glob("done*"))) == 6


def test_a_session_that_ends_breaks_its_executors(run_driver):
    ended = run_driver(
        """
import concurrent.futures, time, minray
from minray.util import Executor
minray.init(num_cpus=1)
executor = Executor(1)
futures = [executor.submit(time.sleep, 60) for _ in range(3)]
minray.shutdown()
for future in futures:
    assert isinstance(future.exception(timeout=30), concurrent.futures.BrokenExecutor), future
try:
    executor.submit(print)
except concurrent.futures.BrokenExecutor as error:
    print(error)
assert not minray.is_initialized()
executor.shutdown()
"""
    )
    assert "session" in ended.stdout


# ---------------------------------------------------------------- processes


def test_there_are_as_many_processes_as_asked_for_and_they_are_started_when_needed(tmp_path):
    paths = [str(tmp_path / str(x)) for x in range(3)]
    for path in paths:
        os.mkfifo(path)
    with Executor(3) as executor:  # on two CPUs
        for _ in range(5):
            executor.submit(square, 2).result()
        assert len(executor._pool.workers) == 1
        futures = [executor.submit(wait_at, path) for path in paths]
        assert all(future.running() for future in futures)
        for path in reversed(paths):  # All three run at the same time, or this would not end.
            open_gate(path)


def test_an_initializer_runs_once_in_each_process_before_its_jobs():
    def begin(value):
        os.environ["BEGUN"] = os.environ.get("BEGUN", "") + value

    with Executor(1, initializer=begin, initargs=("x",)) as executor:
        assert [executor.submit(os.getenv, "BEGUN").result() for _ in range(3)] == ["x"] * 3


def test_an_initializer_that_raises_breaks_the_executor():
    with Executor(1, initializer=raise_odd) as executor:
        with pytest.raises(concurrent.futures.BrokenExecutor, match="odd"):
            executor.submit(square, 1).result()


def test_an_initializer_that_kills_its_process_breaks_the_executor_and_is_not_tried_for_ever():
    with Executor(1, initializer=os._exit, initargs=(3,), max_retries=1) as executor:
        with pytest.raises(concurrent.futures.BrokenExecutor, match="3"):
            executor.submit(square, 1).result(timeout=60)


def test_a_process_is_replaced_after_its_number_of_jobs():
    with Executor(1, max_tasks_per_child=2) as executor:
        pids = [executor.submit(os.getpid).result() for _ in range(6)]
    assert pids[0] == pids[1] and pids[2] == pids[3] and pids[4] == pids[5] and len(set(pids)) == 3


def test_a_job_may_have_an_executor_of_its_own(executor):
    def outer():
        with Executor(2) as inner:
            return list(inner.map(square, range(4)))

    assert executor.submit(outer).result() == [0, 1, 4, 9]


def test_what_an_executor_does_in_a_task_is_not_counted_among_its_children():
    @minray.remote
    def child():
        return minray.get_runtime_context().get_task_id()

    @minray.remote
    def parent(jobs):
        with Executor(2) as executor:
            assert list(executor.map(square, range(jobs))) == [x * x for x in range(jobs)]
        return ids.counter_of(bytes.fromhex(minray.get(child.remote())))

    # The order in which jobs are handed out differs from attempt to attempt; the children of a task must not.
    assert minray.get([parent.remote(0), parent.remote(5)]) == [1, 1]


def test_jobs_appear_in_the_tables_under_the_name_of_their_function(executor):
    from minray import state

    executor.submit(raise_odd).exception()
    found = state.list_tasks(filters=[("name", "=", "raise_odd"), ("state", "=", "FAILED")])
    assert found and found[0].error_type == "Odd"


# ---------------------------------------------------------------- together with others


def test_callbacks_may_wait_for_other_tasks_and_are_called_in_order(executor):
    called = []
    future = executor.submit(square, 3)
    task = minray.remote(square)
    future.add_done_callback(lambda f: called.append(minray.get(task.remote(f.result()))))
    future.add_done_callback(lambda f: called.append(executor.submit(square, 5).result()))
    done = threading.Event()
    future.add_done_callback(lambda f: done.set())
    assert done.wait(60) and called == [81, 25]
    future.add_done_callback(called.append)  # It is done: now.
    assert called[-1] is future


def test_a_callback_that_raises_is_logged_and_hinders_nobody(executor, caplog, gate):
    future = executor.submit(wait_at, gate)
    done = threading.Event()
    future.add_done_callback(lambda f: 1 / 0)
    future.add_done_callback(lambda f: done.set())
    open_gate(gate)
    assert done.wait(60)
    assert "exception calling callback" in caplog.text


def test_shutdown_waits_for_callbacks(gate):
    called = []
    executor = Executor(1)
    future = executor.submit(wait_at, gate)
    future.add_done_callback(lambda f: (threading.Event().wait(0.1), called.append(1)))
    open_gate(gate)
    executor.shutdown()
    assert called == [1]


def test_wait_and_as_completed_take_these_futures_and_those_of_refs_together(executor):
    futures = [executor.submit(square, 2), minray.remote(square).remote(3).future()]
    assert sorted(future.result() for future in concurrent.futures.as_completed(futures)) == [4, 9]
    done, rest = concurrent.futures.wait(futures)
    assert len(done) == 2 and not rest


def test_asyncio_runs_in_it(executor):
    async def main():
        loop = asyncio.get_running_loop()
        both = await asyncio.gather(*(loop.run_in_executor(executor, square, x) for x in (2, 3)))
        return both, await asyncio.wrap_future(executor.submit(square, 4))

    assert asyncio.run(main()) == ([4, 9], 16)


def test_many_threads_submit_at_once(executor):
    found = []

    def many(start):
        found.extend(executor.submit(square, start + x).result() for x in range(20))

    threads = [threading.Thread(target=many, args=(100 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(found) == sorted((100 * number + x) ** 2 for number in range(4) for x in range(20))
