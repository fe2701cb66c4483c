"""Generators as tasks, where a test needs a session of its own: memory, CPUs, several sessions."""

import gc
import os
import time

import pytest
from test_generators import LARGE, arrays, count_to, parts, wait_for

import minray
from minray import exceptions


def until(condition, timeout_s=20):
    """What another process does: its driver can only look."""
    deadline = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < deadline, "it never came true"
        minray.wait([minray.put(None)])  # Lets the node hear what there is.
        time.sleep(0.002)


def memory():
    gc.collect()
    return minray.api._query("memory")


@minray.remote(_generator_backpressure_num_objects=2)
def counted(path, n):
    for i in range(n):
        with open(path, "a") as file:
            file.write("x")
        yield i


def test_a_generator_of_an_earlier_session_is_told():
    with minray.init(num_cpus=1):
        generator = count_to.remote(1)
    with minray.init(num_cpus=1), pytest.raises(ValueError, match="not of this session"):
        next(generator)


def test_a_durable_job_refuses_streams(tmp_path):
    with minray.init(num_cpus=1, job="stream", storage=tmp_path / "jobs.sqlite"):
        with pytest.raises(NotImplementedError, match="durable job"):
            count_to.remote(1)
        assert minray.get(count_to.options(num_returns=1 + 1).remote(2)) == [0, 1]


def test_the_reader_may_need_the_cpu_of_the_generator(tmp_path):
    @minray.remote
    def double(x):
        return 2 * x

    with minray.init(num_cpus=1):
        doubles = [minray.get(double.remote(ref)) for ref in counted.remote(str(tmp_path / "made"), 5)]
    assert doubles == [0, 2, 4, 6, 8]


def test_a_generator_in_the_queue_is_cancelled(tmp_path):
    with minray.init(num_cpus=1):
        blocker = counted.options(_generator_backpressure_num_objects=None).remote(str(tmp_path / "a"), 1)

        @minray.remote
        def busy():
            wait_for(str(tmp_path / "gate"))

        ref = busy.remote()
        generator = count_to.remote(3)
        minray.cancel(generator)
        (last,) = generator
        with pytest.raises(exceptions.TaskCancelledError):
            minray.get(last)
        (tmp_path / "gate").touch()
        minray.get(ref)
        assert len(list(blocker)) == 1


def test_a_generator_waits_for_its_reader(session, tmp_path):
    path = str(tmp_path / "made")
    generator = counted.remote(path, 6)
    until(lambda: os.path.exists(path) and os.path.getsize(path) == 2)
    until(lambda: minray.available_resources().get("CPU") == 2)  # It stands still, and has lent its CPU.
    for read in range(6):
        assert minray.get(next(generator)) == read
        assert os.path.getsize(path) <= read + 3
    assert list(generator) == []


def test_items_that_nobody_reads_are_freed_with_the_generator(session):
    used = memory()["used"]
    generator = arrays.remote(5)
    end = generator.completed()
    minray.get(end)
    first = next(generator)
    assert memory()["used"] >= used + 5 * LARGE
    del generator
    until(lambda: memory()["used"] < used + 2 * LARGE)
    assert minray.get(first)[0] == 0


def test_items_that_were_read_leave_nothing(session):
    for _ in count_to.remote(10):
        pass
    before = memory()
    for _ in count_to.remote(5000):
        pass
    after = memory()
    assert after["objects"] <= before["objects"] + 10
    assert after["tasks"] <= before["tasks"] + 2


def test_a_generator_that_waits_for_room_is_cancelled(session, tmp_path):
    path = str(tmp_path / "made")
    generator = counted.remote(path, 100)
    until(lambda: minray.available_resources().get("CPU") == 2 and os.path.exists(path) and os.path.getsize(path) == 2)
    minray.cancel(generator)
    with pytest.raises(exceptions.TaskCancelledError):
        minray.get(generator.completed(), timeout=20)
    assert os.path.getsize(path) == 2


def test_a_dynamic_generator_that_nobody_wants_leaves_nothing(session):
    used = memory()
    minray.get(parts.remote(2))
    parts.remote(3)
    until(lambda: memory()["used"] <= used["used"] and memory()["objects"] <= used["objects"] + 1)


def test_a_generator_whose_reader_has_gone_goes_on(session, tmp_path):
    path = str(tmp_path / "made")
    generator = counted.remote(path, 6)
    end = generator.completed()
    next(generator)
    del generator
    minray.get(end, timeout=20)
    assert os.path.getsize(path) == 6
