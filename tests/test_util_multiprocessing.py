"""The interface of multiprocessing.Pool: what its documentation says, said of minray's."""

import concurrent.futures
import itertools
import multiprocessing
import os
import pickle
import signal
import threading

import pytest
from test_util_executor import open_gate, square, wait_at

import minray
from minray.util.multiprocessing import CHUNKS_PER_PROCESS, JoinableQueue, Pool, TimeoutError, cpu_count

pytestmark = pytest.mark.usefixtures("module_session")


def fail(x):
    raise ValueError(f"no {x}")


@pytest.fixture(scope="module")
def pool(module_session):
    with Pool(2) as pool:
        yield pool


def test_apply_calls_in_another_process_and_waits(pool):
    assert pool.apply(pow, (2, 5)) == 32
    assert pool.apply(lambda a, b=0: a - b, (7,), {"b": 3}) == 4
    assert pool.apply(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="no 3"):
        pool.apply(fail, (3,))


def test_apply_async_returns_a_result_to_wait_for(pool, gate):
    result = pool.apply_async(wait_at, (gate, 5))
    assert not result.ready()
    with pytest.raises(ValueError, match="not ready"):
        result.successful()
    result.wait(0.01)
    with pytest.raises(multiprocessing.TimeoutError):
        result.get(timeout=0.01)
    open_gate(gate)
    assert result.get() == 5 and result.ready() and result.successful()
    assert TimeoutError is multiprocessing.TimeoutError


def test_callbacks_get_the_result_or_the_error(pool):
    got = []
    pool.apply_async(square, (3,), callback=got.append, error_callback=lambda e: got.append("error")).wait()
    pool.apply_async(fail, (3,), callback=lambda x: got.append("value"), error_callback=lambda e: got.append(str(e))).wait()
    pool.map_async(square, range(3), callback=got.append).wait()
    pool.starmap_async(fail, [(1,)], error_callback=lambda e: got.append(type(e))).wait()
    assert got == [9, "no 3", [0, 1, 4], ValueError]


@pytest.mark.parametrize("chunksize", [None, 1, 3, 100])
def test_map_and_starmap_return_lists_in_order(pool, chunksize):
    assert pool.map(square, range(20), chunksize) == [x * x for x in range(20)]
    assert pool.map(square, iter(()), chunksize) == []
    assert pool.starmap(pow, zip(range(5), range(5)), chunksize) == [x**x for x in range(5)]
    assert pool.map_async(square, [1, 2], chunksize).get() == [1, 4]


def test_map_cuts_the_work_into_four_chunks_a_process_or_as_it_is_told(pool):
    chunks = []
    submit = pool._executor.submit_chunk
    pool._executor.submit_chunk = lambda func, chunk: chunks.append(len(chunk)) or submit(func, chunk)
    try:
        pool.map(square, range(80))
        pool.map(square, range(80), chunksize=50)
    finally:
        del pool._executor.submit_chunk
    assert chunks == [10] * 8 + [50, 30]


def test_map_raises_what_a_call_raised_when_all_chunks_have_ended(pool):
    result = pool.map_async(lambda x: 1 // x, [1, 0, 2], chunksize=1)
    with pytest.raises(ZeroDivisionError) as caught:
        result.get()
    assert "in <lambda>" in str(caught.value.__cause__)
    assert result.ready() and not result.successful()


@pytest.mark.parametrize("chunksize", [1, 4])
def test_imap_gives_results_in_order_and_imap_unordered_all_of_them(pool, chunksize):
    assert list(pool.imap(square, range(30), chunksize)) == [x * x for x in range(30)]
    assert sorted(pool.imap_unordered(square, range(30), chunksize)) == [x * x for x in range(30)]
    assert list(pool.imap(square, [])) == []


def test_imap_unordered_does_not_wait_for_the_slow(pool, gate):
    found = pool.imap_unordered(lambda x: wait_at(gate, x) if x == 0 else x, range(4))
    assert {next(found) for _ in range(3)} == {1, 2, 3}
    with pytest.raises(TimeoutError):
        found.next(timeout=0.01)
    open_gate(gate)
    assert found.next() == 0
    for _ in range(2):
        with pytest.raises(StopIteration):
            found.next()


def test_imap_raises_at_the_turn_of_what_raised_and_goes_on(pool):
    found = pool.imap(lambda x: 1 // x, [1, 0, 1])
    assert next(found) == 1
    with pytest.raises(ZeroDivisionError):
        next(found)
    assert next(found) == 1


def test_imap_takes_endless_iterables_and_reads_only_some_way_ahead(gate):
    read, bound, has_read_ahead = [], CHUNKS_PER_PROCESS + 1, threading.Event()

    def numbers():
        for number in itertools.count():
            read.append(number)
            if len(read) == bound:
                has_read_ahead.set()
            yield number

    with Pool(1) as pool:
        found = pool.imap(lambda x: wait_at(gate, x), numbers())
        assert has_read_ahead.wait(20)
        minray.get(minray.remote(square).options(num_cpus=0).remote(1))  # If it read on, it would do so meanwhile.
        assert len(read) == bound  # So many have not ended, and one waits for room.
        open_gate(gate)
        assert next(found) == 0


def test_an_iterable_that_raises_does_so_after_the_results_before_it(pool):
    def numbers():
        yield 2
        raise KeyError("the source")

    found = pool.imap(square, numbers())
    assert next(found) == 4
    with pytest.raises(KeyError, match="the source"):
        next(found)


def test_chunks_of_no_size_are_refused(pool):
    for call in (pool.map, pool.imap, pool.imap_unordered, pool.starmap):
        with pytest.raises(ValueError, match="1\\+"):
            call(square, [(1,)], chunksize=0)


# ---------------------------------------------------------------- life


def test_a_closed_pool_does_what_it_has_and_takes_no_more(gate):
    pool = Pool(1)
    results = [pool.apply_async(wait_at, (gate, 1)), pool.apply_async(square, (3,))]
    rest = pool.imap(square, iter(range(50)))
    with pytest.raises(ValueError, match="still running"):
        pool.join()
    pool.close()
    for refused in (pool.apply_async, pool.map, pool.imap, pool.starmap_async):
        with pytest.raises(ValueError, match="not running"):
            refused(square, [(1,)])
    open_gate(gate)
    pool.join()
    assert all(result.ready() for result in results) and [result.get() for result in results] == [1, 9]
    assert list(rest) == [x * x for x in range(50)]


def test_terminate_ends_what_runs_and_leaving_a_with_block_terminates(gate):
    with Pool(1) as pool:
        running, waiting = pool.apply_async(wait_at, (gate,)), pool.apply_async(square, (1,))
        endless = pool.imap(square, itertools.count())
    pool.join()
    for result in (running, waiting):
        with pytest.raises(concurrent.futures.BrokenExecutor):
            result.get(timeout=60)
    with pytest.raises(concurrent.futures.BrokenExecutor):
        list(endless)
    with pytest.raises(ValueError, match="not running"):
        pool.__enter__()


def test_processes_are_as_many_as_asked_for_each_initialized_and_replaced_in_time(tmp_path):
    def begin(mark):
        os.environ["BEGUN"] = os.environ.get("BEGUN", "") + mark

    with Pool(1, begin, ("x",), maxtasksperchild=2) as pool:
        found = [pool.apply(lambda: (os.getpid(), os.environ["BEGUN"])) for _ in range(4)]
    assert [begun for _, begun in found] == ["x"] * 4
    assert found[0] == found[1] != found[2] == found[3]


def test_a_call_whose_process_dies_is_repeated(tmp_path):
    mark = tmp_path / "died"

    def die_once(x):
        if x == 3 and not mark.exists():
            mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return x

    with Pool(2) as pool:
        assert pool.map(die_once, range(6), chunksize=1) == list(range(6))
    with Pool(1, ray_remote_args={"max_task_retries": 0}) as pool:
        with pytest.raises(concurrent.futures.BrokenExecutor):
            pool.apply(os._exit, (1,))


def test_options_say_what_is_wrong_with_them():
    with pytest.raises(ValueError, match="at least 1"):
        Pool(0)
    with pytest.raises(ValueError, match="3 processes with 1 CPU each"):
        Pool(3, ray_remote_args={"num_cpus": 1})
    with pytest.raises(TypeError, match="num_cpu"):
        Pool(1, ray_remote_args={"num_cpu": 1})
    with pytest.raises(ConnectionError):
        Pool(1, ray_address="10.0.0.1:6379")
    with pytest.warns(UserWarning, match="context"):
        Pool(1, context=multiprocessing.get_context("fork")).terminate()
    with Pool(ray_address="auto") as pool:
        assert pool._processes == cpu_count() == 2
        with pytest.raises(NotImplementedError, match="pickled"):
            pickle.dumps(pool)


def test_a_pool_starts_a_session_if_there_is_none(run_driver):
    ended = run_driver(
        "from minray.util.multiprocessing import Pool\nwith Pool(2) as pool:\n    print(pool.map(lambda x: x + 1, [1, 2]))"
    )
    assert ended.stdout == "[2, 3]\n"


def test_a_joinable_queue_is_joined_when_everything_is_done():
    queue = JoinableQueue()

    @minray.remote
    def work(queue):
        for _ in range(3):
            queue.get()
            queue.task_done()

    for x in range(3):
        queue.put(x)
    joined = threading.Event()
    thread = threading.Thread(target=lambda: (queue.join(), joined.set()))
    thread.start()
    assert not joined.wait(0.05)
    minray.get(work.remote(queue))
    assert joined.wait(60)
    thread.join()
    with pytest.raises(ValueError, match="too many times"):
        queue.task_done()
    queue.close()
