"""Generators as tasks: items that come one by one, errors in the middle, backpressure, second runs."""

import asyncio
import gc
import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import minray
from minray import DynamicObjectRefGenerator, ObjectRef, ObjectRefGenerator, exceptions

LARGE = 100_000
"""Bytes: more than travel in a message."""


@minray.remote
def count_to(n):
    yield from range(n)
    return "the end"


@minray.remote
def arrays(n):
    for i in range(n):
        yield np.full(LARGE, i, np.uint8)


@minray.remote
def fails_after(n):
    yield from range(n)
    raise ValueError(f"after {n}")


@minray.remote
class Source:
    def __init__(self):
        self.calls = 0

    def count_to(self, n):
        self.calls += 1
        for i in range(n):
            yield self.calls, i

    def number_of_calls(self):
        return self.calls


def wait_for(path, timeout_s=20):
    """Nothing can announce it: it crosses processes."""
    deadline = time.monotonic() + timeout_s
    while not os.path.exists(path):
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.001)


# ---------------------------------------------------------------- reading


def test_a_generator_function_returns_its_items_one_by_one(module_session):
    generator = count_to.remote(3)
    assert isinstance(generator, ObjectRefGenerator)
    ref = next(generator)
    assert type(ref) is ObjectRef
    assert minray.get(ref) == 0
    assert minray.get(list(generator)) == [1, 2]


def test_items_come_while_the_task_runs(module_session, tmp_path):
    gate = str(tmp_path / "gate")

    @minray.remote
    def halves():
        yield "first"
        wait_for(gate)
        yield "second"

    generator = halves.remote()
    assert minray.get(next(generator), timeout=20) == "first"
    assert not generator.next_ready()
    assert minray.wait([generator], timeout=0) == ([], [generator])
    (tmp_path / "gate").touch()
    assert minray.wait([generator], timeout=20) == ([generator], [])
    assert generator.next_ready()
    assert minray.get(next(generator)) == "second"


def test_num_returns_streaming_may_be_said(module_session):
    @minray.remote(num_returns="streaming")
    def iterate(n):
        return iter(range(n))

    assert minray.get(list(iterate.remote(3))) == [0, 1, 2]
    assert minray.get(list(count_to.options(num_returns="streaming").remote(2))) == [0, 1]


def test_a_number_of_returns_makes_plain_refs(module_session):
    assert minray.get(count_to.options(num_returns=3).remote(3)) == [0, 1, 2]


def test_an_empty_generator_ends_at_once(module_session):
    generator = count_to.remote(0)
    assert list(generator) == []
    assert generator.is_finished()


def test_a_generator_can_be_read_once(module_session):
    generator = count_to.remote(2)
    assert len(list(generator)) == 2
    assert list(generator) == []
    with pytest.raises(StopIteration):
        next(generator)
    assert not generator.next_ready()


def test_completed_is_ready_when_the_task_has_ended(module_session):
    generator = count_to.remote(2)
    assert minray.get(generator.completed()) == "the end"
    assert not generator.is_finished()  # Its items were not read.
    assert minray.get(list(generator)) == [0, 1]
    assert generator.is_finished()
    assert generator.task_id() == generator.completed().task_id()


def test_more_items_than_are_taken_at_once_keep_their_order(module_session):
    assert minray.get(list(count_to.remote(1234))) == list(range(1234))


def test_an_item_may_be_an_exception_or_a_ref(module_session):
    @minray.remote
    def strange():
        yield ValueError("a value")
        yield [minray.put(np.arange(LARGE))]

    error, (inner,) = minray.get(list(strange.remote()))
    assert isinstance(error, ValueError)
    assert minray.get(inner)[-1] == LARGE - 1


def test_items_are_arguments_of_other_tasks(module_session):
    @minray.remote
    def total(*parts):
        return sum(int(part.sum()) for part in parts)

    assert minray.get(total.remote(*arrays.remote(4))) == LARGE * 6


def test_tasks_read_generators_too(module_session):
    @minray.remote
    def read(n):
        return [minray.get(ref) for ref in count_to.remote(n)]

    assert minray.get(read.remote(250)) == list(range(250))


def test_a_task_may_return_what_it_has_read(module_session):
    @minray.remote
    def read(n):
        return list(arrays.remote(n))

    assert [int(minray.get(ref)[0]) for ref in minray.get(read.remote(3))] == [0, 1, 2]


def test_wait_takes_generators_beside_refs(module_session, tmp_path):
    gate = str(tmp_path / "gate")

    @minray.remote
    def late():
        wait_for(gate)
        yield 1

    never, there, ref = late.remote(), count_to.remote(1), minray.put(1)
    ready, rest = minray.wait([never, there, ref], num_returns=2, timeout=20)
    assert (ready, rest) == ([there, ref], [never])
    next(there)
    assert minray.wait([there], timeout=20) == ([there], [])  # It has ended: next() does not wait.
    (tmp_path / "gate").touch()
    assert minray.wait([never], timeout=20) == ([never], [])


# ---------------------------------------------------------------- asyncio


def test_async_for_awaits_items(module_session):
    async def read():
        return [await ref async for ref in count_to.remote(5)]

    assert asyncio.run(read()) == [0, 1, 2, 3, 4]


def test_several_generators_are_read_side_by_side(module_session, tmp_path):
    @minray.remote(num_cpus=0.5)
    def in_turn(mine, other, n):
        for i in range(n):
            wait_for(f"{mine}-{i}")
            yield i

    async def read(generator, opens):
        found = []
        async for ref in generator:
            found.append(await ref)
            (tmp_path / f"{opens}-{found[-1] + 1}").touch()
            (tmp_path / f"{opens}-{found[-1]}").touch()
        return found

    async def both():
        (tmp_path / "a-0").touch()
        a, b = str(tmp_path / "a"), str(tmp_path / "b")
        one, two = in_turn.remote(a, b, 3), in_turn.remote(b, a, 3)
        return await asyncio.wait_for(asyncio.gather(read(one, "b"), read(two, "a")), 30)

    (tmp_path / "a-1").touch()
    (tmp_path / "a-2").touch()
    assert asyncio.run(both()) == [[0, 1, 2], [0, 1, 2]]


# ---------------------------------------------------------------- errors


def test_what_came_before_an_error_stays(module_session):
    generator = fails_after.remote(2)
    first, second, third = generator
    assert minray.get([first, second]) == [0, 1]
    with pytest.raises(ValueError, match="after 2"):
        minray.get(third)
    with pytest.raises(ValueError, match="after 2"):
        minray.get(generator.completed())
    assert list(generator) == []


def test_an_item_that_cannot_be_pickled_is_named(module_session):
    @minray.remote
    def unpicklable():
        yield 1
        yield threading.Lock()

    one, bad = unpicklable.remote()
    assert minray.get(one) == 1
    with pytest.raises(TypeError, match=r"item 1 of .*unpicklable\(\)"):
        minray.get(bad)


def test_a_function_that_returns_no_generator_is_told(module_session):
    @minray.remote(num_returns="streaming")
    def returns_a_list():
        return [1, 2]

    (ref,) = returns_a_list.remote()
    with pytest.raises(ValueError, match=r'num_returns="streaming" and returned one list, not a generator'):
        minray.get(ref)


def test_an_argument_that_failed_fails_the_generator(module_session):
    (ref,) = count_to.remote(fails_after.options(num_returns=1).remote(0))
    with pytest.raises(exceptions.RayTaskError):
        minray.get(ref)


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda g: minray.get(g), TypeError, r"Did you mean get\(next\(gen\)\)"),
        (lambda g: minray.wait(g), TypeError, r"Did you mean wait\(\[gen\]\)"),
        (lambda g: minray.put(g), TypeError, "only the process that called the task can read it"),
        (lambda g: pickle.dumps(g), TypeError, "Pass its items"),
        (lambda g: count_to.remote(g), TypeError, "only the process that called the task can read it"),
        (lambda g: g.send(1), NotImplementedError, "runs in another process"),
        (lambda g: g.throw(ValueError), NotImplementedError, "runs in another process"),
        (lambda g: g.close(), NotImplementedError, r"minray\.cancel\(gen\)"),
        (lambda g: count_to.options(_generator_backpressure_num_objects=0), ValueError, "1 or more"),
        (lambda g: count_to.options(num_returns=2, _generator_backpressure_num_objects=1), ValueError, "num_returns=2"),
        (lambda g: count_to.options(num_returns="stream"), ValueError, '"streaming" or "dynamic"'),
    ],
)
def test_misuse_is_explained(module_session, call, error, says):
    with pytest.raises(error, match=says):
        call(count_to.remote(1))


def test_an_async_generator_function_is_no_task():
    async def ticks():
        yield 1

    with pytest.raises(TypeError, match="async generator function"):
        minray.remote(ticks)


def test_an_actor_with_exact_recovery_refuses_streams(module_session):
    source = Source.options(checkpoint_every=1).remote()
    with pytest.raises(NotImplementedError, match="exact recovery"):
        source.count_to.remote(1)
    assert minray.get(source.number_of_calls.remote()) == 0


# ---------------------------------------------------------------- actors


def test_a_method_streams(module_session):
    source = Source.remote()
    assert minray.get(list(source.count_to.remote(2))) == [(1, 0), (1, 1)]
    assert minray.get(list(source.count_to.remote(1))) == [(2, 0)]


def test_methods_of_a_threaded_actor_stream_at_the_same_time(module_session):
    @minray.remote(max_concurrency=2)
    class Pair:
        @minray.method(_generator_backpressure_num_objects=1)
        def numbers(self, n):
            yield from range(n)

    pair = Pair.remote()
    one, two = pair.numbers.remote(3), pair.numbers.remote(3)
    found = [(minray.get(next(one)), minray.get(next(two))) for _ in range(3)]
    assert found == [(0, 0), (1, 1), (2, 2)]


def test_a_killed_actor_ends_its_stream_with_an_error(module_session):
    @minray.remote
    class Endless:
        def numbers(self):
            i = 0
            while True:
                yield i
                i += 1
                time.sleep(0.001)

    actor = Endless.remote()
    generator = actor.numbers.remote()
    assert minray.get(next(generator)) == 0
    minray.kill(actor)
    *_, last = generator
    with pytest.raises(exceptions.ActorDiedError):
        minray.get(last)


# ---------------------------------------------------------------- cancelling


def test_a_generator_is_cancelled(module_session, tmp_path):
    @minray.remote
    def endless():
        try:
            yield 1
            wait_for(str(tmp_path / "never"), timeout_s=60)
        finally:
            (tmp_path / "cleaned").touch()

    generator = endless.remote()
    assert minray.get(next(generator)) == 1
    minray.cancel(generator)
    (last,) = generator
    with pytest.raises(exceptions.TaskCancelledError):
        minray.get(last)
    assert (tmp_path / "cleaned").exists()


# ---------------------------------------------------------------- second runs


@minray.remote(max_retries=1)
def dies_once(marker, n):
    for i in range(n):
        yield i, os.getpid()
        if i == n // 2 and not os.path.exists(marker):
            open(marker, "w").close()
            time.sleep(0.05)  # The items before are on their way: those that have come must stay.
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_generator_that_kills_its_worker_runs_again(module_session, tmp_path):
    refs = list(dies_once.remote(str(tmp_path / "marker"), 6))
    numbers, pids = zip(*minray.get(refs), strict=True)
    assert numbers == (0, 1, 2, 3, 4, 5)
    assert pids[0] != pids[-1]  # The first value of an item is its value.


def test_a_generator_that_may_not_run_again_ends_with_the_reason(module_session, tmp_path):
    *items, last = dies_once.options(max_retries=0).remote(str(tmp_path / "marker"), 6)
    assert [value for value, _ in minray.get(items)] == list(range(len(items)))
    with pytest.raises(exceptions.WorkerCrashedError):
        minray.get(last)


def test_retry_exceptions_run_a_generator_again(module_session, tmp_path):
    @minray.remote(retry_exceptions=[OSError])
    def unsteady(marker):
        yield 1
        if not os.path.exists(marker):
            open(marker, "w").close()
            raise OSError("the first time")
        yield 2

    assert minray.get(list(unsteady.remote(str(tmp_path / "marker")))) == [1, 2]


def test_a_run_with_fewer_items_is_told(module_session, tmp_path, capfd):
    @minray.remote
    def shrinking(marker):
        yield 1
        if not os.path.exists(marker):
            yield 2
            wait_for(marker)
            os.kill(os.getpid(), signal.SIGKILL)

    marker = str(tmp_path / "marker")
    generator = shrinking.remote(marker)
    first, second = next(generator), next(generator)
    open(marker, "w").close()
    (last,) = generator
    assert minray.get([first, second]) == [1, 2]
    with pytest.raises(exceptions.ReplayDivergedError, match="it yielded 1 items, and 2 before"):
        minray.get(last)


def test_a_lost_item_is_made_again(module_session):
    import minray.testing

    refs = list(arrays.remote(4))
    minray.get(refs)
    gc.collect()
    minray.testing.drop(refs[2])
    assert minray.get(refs[2])[0] == 2
    assert [int(minray.get(ref)[0]) for ref in refs] == [0, 1, 2, 3]


def test_a_lost_item_is_made_again_also_when_its_generator_waits_for_its_reader(module_session):
    import minray.testing

    generator = arrays.options(_generator_backpressure_num_objects=1).remote(4)
    refs = [next(generator)]
    minray.wait([refs[0]])
    minray.testing.drop(refs[0])
    assert minray.get(refs[0])[0] == 0  # It takes no other one before it has this.
    refs += generator
    assert [int(minray.get(ref)[0]) for ref in refs] == [0, 1, 2, 3]


def test_the_second_attempt_of_a_reader_reads_from_the_start(module_session, tmp_path):
    @minray.remote(max_retries=1)
    def read(marker):
        found = []
        for ref in count_to.remote(5):
            found.append(minray.get(ref))
            if len(found) == 3 and not os.path.exists(marker):
                open(marker, "w").close()
                os.kill(os.getpid(), signal.SIGKILL)
        return found

    assert minray.get(read.remote(str(tmp_path / "marker"))) == [0, 1, 2, 3, 4]


# ---------------------------------------------------------------- dynamic


@minray.remote(num_returns="dynamic")
def parts(n, fails=False):
    for i in range(n):
        yield np.full(LARGE, i, np.uint8)
    if fails:
        raise ValueError("after all")


def test_dynamic_returns_one_ref_to_a_list_of_refs(module_session):
    ref = parts.remote(3)
    assert type(ref) is ObjectRef
    found = minray.get(ref)
    assert isinstance(found, DynamicObjectRefGenerator)
    assert len(found) == 3
    for _ in range(2):  # It can be read again.
        assert [int(minray.get(one)[0]) for one in found] == [0, 1, 2]
    assert type(found[1]) is ObjectRef


def test_the_list_of_a_dynamic_generator_can_be_passed_on(module_session):
    @minray.remote
    def total(refs):
        return sum(int(minray.get(one)[0]) for one in refs)

    assert minray.get(total.remote(parts.remote(4))) == 6
    assert minray.get(total.remote(minray.get(parts.remote(3)))) == 3


def test_the_last_ref_of_a_dynamic_generator_that_raised_raises(module_session):
    first, last = minray.get(parts.remote(1, fails=True))
    assert minray.get(first)[0] == 0
    with pytest.raises(ValueError, match="after all"):
        minray.get(last)


def test_methods_are_dynamic_too(module_session):
    @minray.remote
    class Maker:
        @minray.method(num_returns="dynamic")
        def make(self, n):
            yield from range(n)

    maker = Maker.remote()
    assert [minray.get(one) for one in minray.get(maker.make.remote(3))] == [0, 1, 2]


# ---------------------------------------------------------------- asyncio actors


@minray.remote
class Ticker:
    def __init__(self):
        self.go = asyncio.Event()
        self.cleaned = False

    async def ticks(self, n):
        for i in range(n):
            await asyncio.sleep(0)
            yield i

    async def waits(self):
        try:
            yield "ready"
            await self.go.wait()
            yield "gone"
        finally:
            self.cleaned = True

    def plain(self, n):
        yield from range(n)

    @minray.method(_generator_backpressure_num_objects=2)
    async def held_back(self, n):
        for i in range(n):
            self.made = i + 1
            yield i

    async def raises(self):
        yield 1
        raise ValueError("async")

    @minray.method(num_returns="dynamic")
    async def listed(self, n):
        for i in range(n):
            yield i

    async def start(self):
        self.go.set()

    async def facts(self):
        return getattr(self, "made", 0), self.cleaned


def test_async_generators_of_an_actor_stream(module_session):
    ticker = Ticker.remote()
    assert minray.get(list(ticker.ticks.remote(3))) == [0, 1, 2]
    assert minray.get(list(ticker.plain.remote(3))) == [0, 1, 2]
    assert [minray.get(ref) for ref in minray.get(ticker.listed.remote(3))] == [0, 1, 2]


def test_other_calls_run_while_an_async_generator_waits(module_session):
    ticker = Ticker.remote()
    generator = ticker.waits.remote()
    assert minray.get(next(generator), timeout=20) == "ready"
    minray.get(ticker.start.remote(), timeout=20)
    assert minray.get(next(generator), timeout=20) == "gone"
    assert list(generator) == []


def test_other_calls_run_while_an_async_generator_has_no_room(module_session):
    ticker = Ticker.remote()
    generator = ticker.held_back.remote(5)
    assert minray.get(next(generator), timeout=20) == 0
    made, _ = minray.get(ticker.facts.remote(), timeout=20)
    assert made <= 3
    assert minray.get(list(generator)) == [1, 2, 3, 4]


def test_an_async_generator_that_raises_ends_with_the_error(module_session):
    ticker = Ticker.remote()
    one, error = ticker.raises.remote()
    assert minray.get(one) == 1
    with pytest.raises(ValueError, match="async"):
        minray.get(error)


def test_an_async_generator_is_cancelled(module_session):
    ticker = Ticker.remote()
    generator = ticker.waits.remote()
    assert minray.get(next(generator), timeout=20) == "ready"
    minray.cancel(generator)
    (last,) = generator
    with pytest.raises(exceptions.TaskCancelledError):
        minray.get(last)
    assert minray.get(ticker.facts.remote())[1]  # It has cleaned up.
