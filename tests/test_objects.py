"""Objects end to end: put, get, sharing, counting, spilling, and what happens when there is no room."""

import asyncio
import copy
import gc
import os
import pickle
import signal
import subprocess
import sys
import time
import tracemalloc

import conftest
import numpy as np
import pytest

import minray
from minray import api, exceptions, ids
from minray.object_ref import ObjectRef

MB = 1 << 20


def memory():
    """What the node says: it first takes in what this process has dropped."""
    return api._query("memory")


def until(condition, within_s=60.0):
    """Serve the loop until the condition holds: what workers have said has to arrive."""
    deadline = time.monotonic() + within_s
    while not condition():
        assert time.monotonic() < deadline, f"not within {within_s} s; {memory()}"
        memory()
        time.sleep(0.001)


def node():
    return api.core().node


@pytest.fixture(scope="module")
def module_session():
    """One for all: ten megabytes, so that what does not fit is near."""
    with minray.init(num_cpus=2, object_store_memory=10 * MB) as context:
        yield context


@pytest.fixture
def session(module_session):
    """When the test has ended no object, no memory and no file of it is left."""
    before = memory()
    yield module_session
    gc.collect()
    until(lambda: {**memory(), "spilled": 0} == {**before, "spilled": 0})
    assert not node()._grants and not node().driver.pins and not node().lineage.spilling
    assert os.listdir(os.path.join(module_session["session_dir"], "spill")) == []


def array(size=MB, fill=1):
    return np.full(size, fill, np.uint8)


@minray.remote
def same(value):
    return value


@minray.remote
def total(values):
    return int(values.sum())


@minray.remote
class Keeper:
    def keep(self, value):
        self.value = value

    def show(self):
        return self.value

    def look(self, index):
        return int(self.value[index])

    def fetch(self):
        self.fetched = minray.get(self.value)

    def drop(self):
        self.value = self.fetched = None

    def pid(self):
        return os.getpid()


# ---------------------------------------------------------------- values


VALUES = {
    "none": None,
    "int": 7,
    "huge int": 1 << 10_000,
    "text": "naïve ☃",
    "bytes": b"x" * 100_000,
    "empty array": np.empty((0, 3)),
    "scalar array": np.array(5),
    "fortran array": np.asfortranarray(np.arange(60_000).reshape(200, 300)),
    "strided array": np.arange(200_000)[::2],
    "object array": np.array([{"a": 1}, None], dtype=object),
    "structured array": np.zeros(10_000, dtype=[("a", "i4"), ("b", "f8")]),
    "nested": {"a": [1, (2, {3})], "b": np.arange(50_000)},
    "exception": ValueError("two", "arguments"),
    "class": int,
}


@pytest.mark.parametrize("value", VALUES.values(), ids=VALUES.keys())
def test_what_is_put_comes_back_here_and_through_a_task(session, value):
    ref = minray.put(value)
    for got in (minray.get(ref), minray.get(same.remote(ref)), minray.get(same.remote(value))):
        assert type(got) is type(value)
        assert repr(got) == repr(value)


@pytest.mark.parametrize("size", [65_536 - 300, 65_535, 65_536, 65_537, 65_536 + 300])
def test_nothing_changes_at_the_size_where_objects_move_to_shared_memory(session, size):
    data = os.urandom(size)
    assert minray.get(minray.put(data)) == data == minray.get(same.remote(data))
    assert bytes(minray.get(minray.put(bytearray(data)))) == data


def test_a_ref_itself_cannot_be_put(session):
    with pytest.raises(TypeError, match="put\\(\\[ref\\]\\)"):
        minray.put(minray.put(1))


def test_an_array_is_read_only_and_the_same_memory_in_two_processes(session):
    ref = minray.put(array())
    keeper = Keeper.remote()
    minray.get(keeper.keep.remote(ref))
    mine = minray.get(ref)
    assert not mine.flags.writeable
    with pytest.raises(ValueError):
        mine[0] = 2
    entry = node().objects[ref]
    block = api.core().arena.write_view(entry.data, entry.size)
    block[entry.size - 1] = 77  # Nobody but a test may do this.
    assert mine[-1] == 77 and minray.get(keeper.look.remote(-1)) == 77
    del mine, ref, entry, block, keeper


def test_getting_twice_makes_two_views_of_one_block(session):
    ref = minray.put(array())
    one, two = minray.get([ref, ref])
    assert np.shares_memory(one, two)


# ---------------------------------------------------------------- pins


def test_memory_is_not_used_again_while_the_driver_sees_it_and_is_afterwards(session):
    ref = minray.put(array(6 * MB, 1))
    seen = minray.get(ref)
    part = seen[MB : 2 * MB]
    del ref, seen
    used = memory()["used"]
    assert used > 6 * MB  # A view of a view still keeps the block.
    other = minray.put(array(6 * MB, 2))  # No room: born in a file.
    assert part.min() == part.max() == 1
    assert memory()["used"] == used
    del part
    until(lambda: memory()["used"] < MB)
    assert minray.get(other)[0] == 2


def test_memory_is_not_used_again_while_an_actor_sees_it(session):
    keeper = Keeper.remote()
    minray.get(keeper.keep.remote(minray.put(array(6 * MB, 1))))
    used = memory()["used"]
    others = [minray.put(array(6 * MB, number)) for number in (2, 3)]
    assert minray.get(keeper.look.remote(-1)) == 1 and memory()["used"] == used
    minray.get(keeper.drop.remote())
    until(lambda: memory()["used"] < MB)
    del others, keeper


def test_what_a_killed_actor_saw_is_free_again(session):
    keeper = Keeper.remote()
    minray.get(keeper.keep.remote(minray.put(array(6 * MB))))
    assert memory()["used"] > 6 * MB
    os.kill(minray.get(keeper.pid.remote()), signal.SIGKILL)
    until(lambda: memory()["used"] < MB)
    del keeper


def test_arrays_stay_readable_after_shutdown(run_driver):
    run_driver("""
import minray, numpy as np
MB = 1 << 20
with minray.init(num_cpus=1, object_store_memory=10 * MB):
    in_arena = minray.get(minray.put(np.full(6 * MB, 3, np.uint8)))
    in_file = minray.get(minray.put(np.full(20 * MB, 4, np.uint8)))
assert in_arena.sum() == 18 * MB and in_file.sum() == 80 * MB
with minray.init(num_cpus=1):
    assert minray.get(minray.put(in_arena)).sum() == 18 * MB
""")


def test_arguments_that_were_not_read_because_another_one_failed_are_not_pinned(session):
    @minray.remote
    def fails():
        raise KeyError("no")

    big, bad = minray.put(array()), fails.remote()
    with pytest.raises(KeyError):
        minray.get(same.options(num_returns=1).remote(bad))

    @minray.remote
    def take(*values):
        pass

    with pytest.raises(KeyError):
        minray.get(take.remote(bad, big, big))
    until(lambda: not node().objects[big].pins)


def test_a_get_in_a_task_that_ends_with_an_error_pins_nothing(session):
    @minray.remote
    def fails():
        raise KeyError("no")

    @minray.remote
    def gets(refs):
        try:
            minray.get(refs)
        except KeyError:
            return "caught"

    big = minray.put(array())
    assert minray.get(gets.remote([big, fails.remote(), big])) == "caught"
    until(lambda: not node().objects[big].pins)


def test_an_object_that_cannot_be_unpickled_is_an_error_and_pins_nothing(session):
    class Breaks:
        def __init__(self, data):
            self.data = data

        def __setstate__(self, state):
            raise RuntimeError("not here")

    ref = minray.put(Breaks(array()))
    with pytest.raises(RuntimeError, match="not here"):
        minray.get(ref)
    with pytest.raises(RuntimeError, match="not here"):
        minray.get(same.remote(ref))
    gc.collect()
    until(lambda: not node().objects[ref].pins)


# ---------------------------------------------------------------- refs in objects


def test_refs_inside_objects_keep_what_they_refer_to(session):
    inner = minray.put(array())
    outer = minray.put({"deep": [inner]})
    del inner
    (found,) = minray.get(outer)["deep"]
    del outer
    assert minray.get(total.remote(found)) == MB
    until(lambda: len(node().objects) == 1)


def test_a_task_returns_refs_to_what_it_put_and_to_its_children(session):
    @minray.remote
    def make():
        return [minray.put(array()), total.remote(array())]

    made = make.remote()
    one, two = minray.get(made)
    del made
    assert minray.get(two) == MB and minray.get(one).sum() == MB
    del one, two


def test_a_result_that_waits_with_a_ref_inside_is_not_overtaken_by_its_release(session):
    """The task sleeps, so that the caretaker is at work when it ends."""

    @minray.remote
    def make():
        time.sleep(0.01)
        return [minray.put(array())]

    for outer in [make.remote() for _ in range(20)]:
        (inner,) = minray.get(outer)
        assert minray.get(inner)[0] == 1
    del outer, inner


def test_refs_kept_in_an_actor_keep_their_objects_until_it_drops_them(session):
    keeper = Keeper.remote()
    ref = minray.put(array())
    minray.get(keeper.keep.remote([ref]))
    del ref
    assert memory()["used"] > MB
    (back,) = minray.get(keeper.show.remote())
    assert minray.get(back)[0] == 1
    del back
    minray.get(keeper.drop.remote())
    until(lambda: memory()["used"] < MB)
    del keeper


@pytest.mark.parametrize("end", ["kill -9", "minray.kill", "its handle goes"])
def test_refs_kept_in_an_actor_go_with_it(session, end):
    keeper = Keeper.remote()
    minray.get(keeper.keep.remote([minray.put(array())]))
    assert memory()["used"] > MB
    if end == "kill -9":
        os.kill(minray.get(keeper.pid.remote()), signal.SIGKILL)
    elif end == "minray.kill":
        minray.kill(keeper)
    del keeper
    until(lambda: memory()["used"] < MB)


def test_refs_that_a_killed_worker_held_are_released(session):
    @minray.remote(max_retries=0)
    def dies(refs):
        kept = [minray.put(array()), *refs]
        os.kill(os.getpid(), signal.SIGKILL)
        return kept

    with pytest.raises(exceptions.WorkerCrashedError):
        minray.get(dies.remote([minray.put(array())]))


def test_nested_arguments_are_freed_when_the_task_has_ended_although_its_result_lives(session):
    big = minray.put(array())

    @minray.remote
    def count(refs):
        return len(refs)

    result = count.remote([big])
    assert minray.get(result) == 1
    del big
    until(lambda: memory()["used"] < MB)
    assert minray.get(result) == 1


def test_a_timed_out_wait_keeps_nothing_alive(session):
    keeper = Keeper.remote()

    @minray.remote
    def sleeps():
        time.sleep(0.5)

    never, big = sleeps.remote(), minray.put(array())
    assert minray.wait([never, big], num_returns=2, timeout=0.01)[1] == [never]
    del big
    until(lambda: memory()["used"] < MB)
    minray.get(never)
    del keeper, never


# ---------------------------------------------------------------- counting


def test_copies_of_a_ref_count(session):
    ref = minray.put(1)
    copies = [copy.copy(ref), copy.deepcopy([ref])[0], pickle.loads(pickle.dumps(ref)), ObjectRef(ref.binary())]
    del ref
    while copies:
        assert minray.get(copies.pop()) == 1


def test_a_ref_kept_as_text_only_is_an_error_that_says_so(session):
    text = minray.put(1).hex()
    memory()
    with pytest.raises(exceptions.ObjectLostError, match="as text or in a file"):
        minray.get(ObjectRef(bytes.fromhex(text)))


def test_a_ref_of_an_earlier_session_is_an_error_here_and_in_a_task(run_driver):
    run_driver("""
import gc, minray
from minray import api
with minray.init(num_cpus=1):
    old = minray.put(1)
with minray.init(num_cpus=1):
    gc.disable()  # What was counted is free without it.
    same = minray.remote(lambda value: value)
    for use in (lambda: minray.get(old), lambda: minray.get(old), lambda: minray.get(same.remote(old))):
        try:
            use()
        except minray.exceptions.ObjectLostError:
            pass
        else:
            raise AssertionError
    objects = api.core().node.objects
    assert all(type(key) is bytes for key in objects)
    del old, use
    api._query("memory")
    assert not objects, objects
""")


def test_the_tables_know_ids_and_never_refs(session):
    """A ref that stands in a table keeps itself alive."""
    keeper = Keeper.remote()
    ref = minray.put([minray.put(array())])
    minray.get(keeper.keep.remote([ref]))
    refs = [same.remote(ref), same.remote([ref]), minray.put([ref])]
    minray.wait(refs, num_returns=3)
    lineage = node().lineage
    for table in (lineage.objects, lineage.tasks, lineage.in_arena, node().driver.pins):
        assert all(type(key) is bytes for key in table)
    for entry in lineage.objects.values():
        assert type(entry.object_id) is bytes and all(type(inner) is bytes for inner in entry.nested)
    for task in lineage.tasks.values():
        assert all(type(object_id) is bytes for object_id in (*task.spec.deps, *task.spec.nested))
    del keeper, entry, task, table, lineage


def test_what_a_ref_can_do(session):
    ref, other = minray.put(5), minray.put(5)
    assert ref != other and len({ref, other, copy.copy(ref)}) == 2 and {ref: 1}[copy.copy(ref)] == 1
    assert ref.hex() in repr(ref) == str(ref) == f"{ref}" and bytes.fromhex(ref.hex()) == ref.binary()
    assert type(ref.binary()) is bytes and ObjectRef.size() == len(ref.binary()) == 16
    assert ObjectRef.nil().is_nil() and not ref.is_nil()
    assert ref.task_id() == ids.task_of(ref.binary())
    assert ref  # A future is there, whatever its value.
    assert ref.future().result(5) == 5
    assert ObjectRef[int] is not None
    with pytest.raises(ValueError, match="16 bytes"):
        ObjectRef(b"short")


def test_a_ref_is_not_taken_for_its_value(session):
    ref = minray.put(5)
    mistakes = [
        lambda: ref + 1, lambda: 1 + ref, lambda: ref * 2, lambda: 2 * ref, lambda: ref[0], lambda: ref[:4],
        lambda: ref % 2, lambda: [*ref], lambda: list(ref), lambda: sum([ref, ref]), lambda: ref - 1, lambda: ref > 3,
        lambda: ref(), lambda: dict([ref]),
    ]  # fmt: skip
    for mistake in mistakes:
        with pytest.raises(TypeError):
            mistake()


def test_refs_can_be_awaited_here_and_in_a_task(session):
    async def both(one, two):
        return await asyncio.gather(one, two)

    @minray.remote
    def waits(refs):
        async def all_of():
            return [part.sum() for part in await asyncio.gather(*refs)]

        return asyncio.run(all_of())

    refs = [minray.put(array()), same.remote(array())]
    assert [part.sum() for part in asyncio.run(both(*refs))] == [MB, MB]
    assert minray.get(waits.remote(refs)) == [MB, MB]
    gc.collect()


def test_a_ref_that_fails_fails_when_awaited(session):
    @minray.remote
    def fails():
        raise KeyError("no")

    async def wait(ref):
        return await ref

    with pytest.raises(KeyError):
        asyncio.run(wait(fails.remote()))
    gc.collect()


def test_what_is_dropped_while_the_program_computes_is_freed_without_another_call(session):
    big, seen = minray.put(array()), minray.get(minray.put(array()))
    used = node().lineage.arena.used
    deadline = time.monotonic() + 5
    time.sleep(0.02)  # By now the caretaker sleeps.
    del big
    while node().lineage.arena.used > used - MB and time.monotonic() < deadline:
        time.sleep(0.001)
    del seen
    while node().lineage.arena.used > used - 2 * MB and time.monotonic() < deadline:
        time.sleep(0.001)
    assert node().lineage.arena.used <= used - 2 * MB


def test_what_a_long_task_drops_is_freed_while_it_goes_on(session):
    @minray.remote
    def long(refs, gate):
        kept = [minray.get(refs[0]), minray.put(array())]
        time.sleep(0.02)
        del kept[:]
        deadline = time.monotonic() + 5
        while not os.path.exists(gate):
            assert time.monotonic() < deadline
            time.sleep(0.001)

    gate = os.path.join(session["session_dir"], "gate")
    ref = minray.put(array())
    done = long.remote([ref], gate)
    until(lambda: node().objects[ref].pins)
    until(lambda: not node().objects[ref].pins and memory()["used"] < 2 * MB)
    open(gate, "w").close()
    minray.get(done)


# ---------------------------------------------------------------- spilling


def test_what_does_not_fit_is_spilled_least_recently_used_first_and_comes_back(session):
    refs = [minray.put(array(2 * MB, number)) for number in range(4)]
    assert minray.get(refs[0])[0] == 0  # Used.
    refs += [minray.put(array(2 * MB, number)) for number in range(4, 7)]
    assert memory()["spilled"] > 0
    kinds = [type(node().objects[ref].data) for ref in refs]
    assert kinds[0] is int and kinds[1] is str
    assert [minray.get(ref)[-1] for ref in refs] == list(range(7))
    assert minray.get([total.remote(ref) for ref in refs]) == [2 * MB * number for number in range(7)]


def test_workers_spill_for_what_they_put_and_return(session):
    @minray.remote
    def put(number):
        return [minray.put(array(2 * MB, number))]

    @minray.remote
    def give(number):
        return array(2 * MB, number)

    puts = [put.remote(number) for number in range(8)]
    given = [give.remote(number) for number in range(8)]
    assert [minray.get(ref)[0] for ref in given] == list(range(8))
    assert [minray.get(minray.get(ref)[0])[0] for ref in puts] == list(range(8))
    assert memory()["spilled"] > 0
    del puts, given


def test_an_object_that_finds_all_memory_pinned_goes_to_a_file(session):
    pinned = minray.get([minray.put(array(3 * MB, number)) for number in range(3)])
    ref = minray.put(array(3 * MB, 9))
    assert type(node().objects[ref].data) is str
    assert minray.get(total.remote(ref)) == 27 * MB
    assert [part[0] for part in pinned] == [0, 1, 2]


def test_an_object_larger_than_the_store_works_as_argument_and_result(session):
    large = array(30 * MB, 2)
    assert minray.get(total.remote(large)) == 60 * MB
    ref = same.remote(large)
    assert minray.get(ref).sum() == 60 * MB


@pytest.mark.long
@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", [8 << 30, 64 << 20], ids=["in memory", "in files"])
def test_bytes_of_more_than_2_gib_are_arguments_and_results(store):
    """More than 31 bits can count.  It takes some 10 GiB of memory."""
    with open("/proc/meminfo") as file:
        free = {line.split(":")[0]: int(line.split()[1]) << 10 for line in file}["MemAvailable"]
    if free < 14 << 30:
        pytest.skip(f"{free >> 30} GiB of memory are free, and it may take 14")
    large = b"begin" + bytes(2 << 30) + b"end"
    with minray.init(num_cpus=1, object_store_memory=store):

        @minray.remote
        def ends(value):
            return len(value), value[:5], value[-3:]

        @minray.remote
        def make(end):
            return b"begin" + bytes(2 << 30) + end

        assert minray.get(ends.remote(large)) == (len(large), b"begin", b"end")
        ref = make.remote(b"END")
        assert minray.get(ends.remote(ref)) == (len(large), b"begin", b"END")
        del large
        value = minray.get(ref)
        assert (len(value), value[:5], value[-3:]) == ((2 << 30) + 8, b"begin", b"END")


def test_two_processes_spill_and_read_at_once(session):
    @minray.remote
    def churn(seed):
        refs = {number: minray.put(array(MB, number)) for number in range(seed, seed + 12)}
        for _ in range(3):
            for number, ref in refs.items():
                assert minray.get(ref).max() == minray.get(ref).min() == number
            refs = {number: minray.put(minray.get(ref)) for number, ref in refs.items()}
        return True

    assert minray.get([churn.remote(0), churn.remote(100)], timeout=60) == [True, True]


def test_an_object_that_is_read_while_it_is_spilled_stays_where_it_is(session, monkeypatch):
    refs = [minray.put(array(4 * MB, number)) for number in (1, 2)]
    seen = []
    core = api.core()
    spill = type(core)._spill

    def get_in_between(self, offset, size, path):
        seen.append(minray.get(refs[0]))
        return spill(self, offset, size, path)

    monkeypatch.setattr(type(core), "_spill", get_in_between)
    third = minray.put(array(4 * MB, 3))
    assert seen and type(node().objects[refs[0]].data) is int
    assert [minray.get(ref)[0] for ref in (*refs, third)] == [1, 2, 3]
    seen.clear()


def test_an_object_that_is_freed_while_it_is_spilled_leaves_nothing(session, monkeypatch):
    refs = [minray.put(array(4 * MB, number)) for number in (1, 2)]
    core = api.core()
    spill = type(core)._spill

    def drop_in_between(self, offset, size, path):
        refs.clear()
        memory()
        return spill(self, offset, size, path)

    monkeypatch.setattr(type(core), "_spill", drop_in_between)
    assert minray.get(minray.put(array(4 * MB, 3)))[0] == 3


def test_ctrl_c_while_an_object_is_written_gives_its_room_back(session, monkeypatch):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("minray.core_worker.write_flat", interrupted)
    with pytest.raises(KeyboardInterrupt):
        minray.put(array())
    monkeypatch.undo()
    refs = [minray.put(array(4 * MB)) for _ in range(2)]
    monkeypatch.setattr("minray.core_worker.object_store.write_file", interrupted)
    with pytest.raises(KeyboardInterrupt):
        minray.put(array(4 * MB))
    assert not node().lineage.spilling and len(refs) == 2


@pytest.mark.parametrize("where", ["write_flat", "object_store.write_file"])
def test_a_worker_killed_while_it_stores_an_object_leaves_nothing_behind(session, where):
    """In a block, or (the store being full) in the middle of spilling."""
    refs = [minray.put(array(4 * MB)) for _ in range(2)] if "file" in where else []

    @minray.remote(max_retries=0)
    def dies():
        from minray import core_worker

        def die(path, *_):
            if "file" in where:
                open(path + ".partial", "wb").close()
            os.kill(os.getpid(), signal.SIGKILL)

        if "file" in where:
            core_worker.object_store.write_file = die
        else:
            core_worker.write_flat = die
        minray.put(array(4 * MB))

    with pytest.raises(exceptions.WorkerCrashedError):
        minray.get(dies.remote())
    assert not node().lineage.spilling and not node()._grants
    assert minray.get([total.remote(ref) for ref in refs]) == [4 * MB] * len(refs)


def test_several_returns_of_which_one_cannot_be_pickled_give_their_memory_back(session):
    @minray.remote(num_returns=2)
    def half():
        import threading

        return array(), threading.Lock()

    for ref in half.remote():
        with pytest.raises(TypeError, match="lock"):
            minray.get(ref)
    assert memory()["used"] < MB
    del ref


# ---------------------------------------------------------------- no room at all


FULL_DISK = """
import os, sys, time, numpy as np, minray
minray.init(num_cpus=1, object_store_memory=10 << 20)

@minray.remote
def make():
    return np.ones(20 << 20, np.uint8)

@minray.remote
def put():
    return [minray.put(np.ones(20 << 20, np.uint8))]

def refused(action):
    try:
        action()
    except minray.exceptions.ObjectStoreFullError as error:
        print("refused:", str(error).splitlines()[-1])
    else:
        print("taken")

refused(lambda: minray.put(np.ones(20 << 20, np.uint8)))
refused(lambda: minray.get(make.remote(), timeout=60))
refused(lambda: minray.get(put.remote(), timeout=60))
refused(lambda: minray.get(make.remote(np.ones(20 << 20, np.uint8)), timeout=60))
refs = []
try:
    while True:
        refs.append(minray.put(np.full(3 << 20, len(refs), np.uint8)))
except minray.exceptions.ObjectStoreFullError:
    print("after", len(refs))
print(all(int(minray.get(ref)[0]) == number for number, ref in enumerate(refs)))
refs.clear()
print(minray.get(minray.put(np.ones(3 << 20, np.uint8))).sum() == 3 << 20)
print(minray.get(minray.remote(lambda: "alive").remote()))
"""


def on_a_tiny_disk(directory, size, program, command="{mount} && exec {python} -c {program}", **environment):
    """Run the program in a mount namespace of its own, with a small tmpfs; skips where that is not allowed."""
    import shlex

    unshare = ["unshare", "--mount"] + ([] if os.geteuid() == 0 else ["--map-root-user"])
    mount = f"mount -t tmpfs -o size={size},mode=1777 tmpfs {shlex.quote(str(directory))}"
    if subprocess.run([*unshare, "sh", "-c", mount], capture_output=True).returncode:
        pytest.skip("this machine does not allow mounting")
    line = command.format(mount=mount, python=shlex.quote(sys.executable), program=shlex.quote(program))
    ended = subprocess.run(
        [*unshare, "sh", "-c", line], capture_output=True, text=True, timeout=60, env={**os.environ, **environment}
    )
    assert ended.returncode == 0, f"status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
    return ended.stdout.splitlines(), ended.stderr


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_when_the_disk_is_full_too_an_error_says_so_and_what_is_there_stays(tmp_path):
    lines, _ = on_a_tiny_disk(tmp_path, "12m", FULL_DISK, MINRAY_HOME=str(tmp_path / "home"))
    assert [line.partition(":")[0] for line in lines[:4]] == ["refused"] * 4, lines
    assert lines[4].startswith("after ") and int(lines[4].split()[1]) >= 3
    assert lines[5:] == ["True", "True", "alive"]


TINY_SHM = """
import numpy as np, minray
minray.init(num_cpus=1, object_store_memory=OBJECT_STORE)
@minray.remote
def make(number):
    return np.full(3 << 20, number, np.uint8)
refs = [make.remote(n) for n in range(10)] + [minray.put(np.full(3 << 20, n, np.uint8)) for n in range(10, 20)]
print([int(minray.get(ref).max()) for ref in refs] == list(range(20)))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_a_container_with_a_tiny_dev_shm_works_with_a_warning(tmp_path):
    program = TINY_SHM.replace("OBJECT_STORE", str(40 * MB))
    lines, warning = on_a_tiny_disk("/dev/shm", "1m", program, MINRAY_HOME=str(tmp_path / "home"))
    assert lines == ["True"] and "/dev/shm has" in warning


SHM_FILLS_UP = """
import os
import numpy as np, minray
minray.init(num_cpus=1, object_store_memory=30 << 20)
fd = os.open("/dev/shm/of-others", os.O_CREAT | os.O_RDWR)
free = os.statvfs("/dev/shm").f_bavail * 4096
os.posix_fallocate(fd, 0, free - (7 << 20))
""" + TINY_SHM.split("\n", 3)[3]


@pytest.mark.skipif(sys.platform != "linux", reason="needs mount namespaces")
def test_when_others_fill_dev_shm_during_the_session_objects_are_spilled_and_nothing_dies(tmp_path):
    program = SHM_FILLS_UP + "print(minray.api.core().node.lineage.arena.capacity < 10 << 20)"
    lines, _ = on_a_tiny_disk("/dev/shm", "300m", program, MINRAY_HOME=str(tmp_path / "home"))
    assert lines == ["True", "True"]


# ---------------------------------------------------------------- many


def test_a_small_object_takes_at_most_400_bytes(session):
    count = 30_000
    minray.get([minray.put(number) for number in range(100)])
    api.flush_records()
    gc.collect()
    tracemalloc.start()
    refs = [minray.put(number) for number in range(count)]
    api.flush_records()  # Rows for the GCS are on their way no more.
    size, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert size / count <= 400, f"{size / count:.0f} bytes a ref"
    del refs


def test_the_rows_of_what_is_put_leave_without_another_call(session):
    """Nobody else has anything to say meanwhile: a driver that puts, and then computes, is heard all the same."""
    core = api._core

    def wait_until(condition):
        started = time.monotonic()
        while not condition():
            assert time.monotonic() < started + conftest.within(5), "rows wait"
            time.sleep(0.01)

    wait_until(lambda: all(worker.pid for worker in core.node.scheduler.workers.values()))
    refs = []
    for _ in range(3):
        wait_until(lambda: core.raylet._flush_at is None)
        time.sleep(0.1)  # The caretaker sleeps by now, until there is news.
        refs.append(minray.put(1))
        wait_until(lambda: not core.node.lineage.new_objects)


def test_objects_put_and_dropped_one_by_one_do_not_grow_memory(session):
    def some(count):
        for number in range(count):
            minray.put(number)
        memory()

    some(2000)
    api.flush_records()
    gc.collect()
    tracemalloc.start()
    some(500)
    before, _ = tracemalloc.get_traced_memory()
    some(10_000)
    api.flush_records()
    after, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert after - before < 200_000, f"{after - before} bytes more"
    assert memory()["objects"] == 0


def test_large_puts_in_a_loop_stay_in_the_same_memory(session):
    value = array(8 * MB)
    blocks = set()
    for _ in range(20):
        ref = minray.put(value)
        blocks.add(node().objects[ref].data)
    assert len(blocks) <= 2 and node().lineage.arena.touched < 20 * MB
    del ref
