"""Local mode does what a session of processes does.

Each function in PROGRAMS is run in both, and what it returns or raises must be the same: the local session
stands in for the other in people's unit tests, and where it differs their tests lie.  What is so in local mode
alone is tested in test_local_mode.py.
"""

import asyncio
import re
import sys
import threading
import time

import numpy as np
import pytest

import minray
from minray import api, exceptions

# ---------------------------------------------------------------- programs


@minray.remote
def add(a, b=1):
    return a + b


@minray.remote
def fail(kind=ValueError, text="broken"):
    raise kind(text)


@minray.remote(num_cpus=2)
def wide():
    return "wide"


@minray.remote
def depth(n):
    return 0 if n == 0 else 1 + minray.get(depth.remote(n - 1))


@minray.remote
class Counter:
    def __init__(self, start=0, failing=False):
        self.n = start
        self.log = []
        if failing:
            raise ValueError("no counter today")

    def add(self, k=1):
        self.n += k
        self.log.append(k)
        return self.n

    def fail(self):
        self.n += 100
        raise KeyError("missing")

    def note(self, item):
        self.log.append(item)

    def get(self):
        return self.n

    def items(self):
        return self.log

    def keep(self, thing):
        self.kept = thing
        return thing

    def leave(self):
        minray.actor.exit_actor()

    def suicide(self):
        minray.kill(minray.get_runtime_context().current_actor, no_restart=False)
        minray.get(add.remote(1))

    @minray.method(num_returns=2)
    def two(self):
        return 1, 2


def values_go_in_and_out():
    return minray.get([add.remote(1), add.remote(1, 2), add.remote(a=3, b=4), add.remote("x", "y")])


def refs_are_resolved_at_the_top_only():
    ref = minray.put(5)
    look = minray.remote(lambda a, b, c: (a, type(b[0]).__name__, minray.get(b[0]), c))
    return minray.get(look.remote(ref, [ref], c=ref))


def arguments_are_copied():
    mine = [1]

    @minray.remote
    def change(theirs):
        theirs.append(2)
        return theirs

    got = minray.get(change.remote(mine))
    return mine, got


def results_are_copied():
    counter = Counter.remote()
    got = minray.get(counter.items.remote())
    got.append("mine")
    return minray.get(counter.items.remote())


def what_was_put_is_a_copy_too():
    thing = {"a": [1]}
    ref = minray.put(thing)
    thing["a"].append(2)
    first, second = minray.get([ref, ref])
    first["a"].append(3)
    return first, second


def captured_values_are_copied_with_the_function():
    seen = []
    note = minray.remote(lambda: (seen.append(1), len(seen))[1])
    return minray.get(note.remote()), seen


def arrays_are_read_only_and_share_no_memory_with_the_original():
    array = np.arange(100_000)
    ref = minray.put(array)
    array[0] = 7
    got = minray.get(ref)
    with pytest.raises(ValueError):
        got[0] = 1
    return int(got[0]), int(minray.get(minray.remote(lambda a: a.sum()).remote(ref)))


def large_arguments_and_results():
    give = minray.remote(lambda a: (a, bytes(200_000)))
    got, blob = minray.get(give.remote(np.ones(50_000)))
    return float(got.sum()), len(blob)


def several_results():
    three = minray.remote(num_returns=3)(lambda: iter("abc"))
    none = minray.remote(num_returns=0)(lambda: None)
    return minray.get(three.remote()), none.remote()


def a_wrong_number_of_results():
    return minray.get(minray.remote(num_returns=2)(lambda: (1, 2, 3)).remote())


def an_error_comes_at_get():
    ref = fail.remote()
    return minray.get(ref)


def an_error_has_its_cause_and_its_traceback():
    try:
        minray.get(fail.remote(ZeroDivisionError, "zero"))
    except ZeroDivisionError as error:
        return type(error.cause), str(error.cause), "in fail" in str(error), error.function_name


def an_error_goes_through_what_depends_on_it():
    return minray.get(add.remote(add.remote(fail.remote()), 2))


def an_error_in_a_nested_task():
    outer = minray.remote(lambda: minray.get(fail.remote(OSError)))
    return minray.get(outer.remote())


def an_exit_is_an_error():
    return minray.get(minray.remote(lambda: sys.exit(3)).remote())


def an_exception_that_cannot_be_pickled():
    @minray.remote
    def odd():
        error = ValueError("odd")
        error.lock = threading.Lock()
        raise error

    return minray.get(odd.remote())


def an_argument_that_cannot_be_pickled():
    return add.remote(threading.Lock())


def a_result_that_cannot_be_pickled():
    return minray.get(minray.remote(lambda: threading.Lock()).remote())


def a_call_with_too_many_arguments():
    return minray.get(add.remote(1, 2, 3))


def exceptions_are_retried_as_often_as_said():
    counter = Counter.remote()

    @minray.remote(max_retries=3, retry_exceptions=[KeyError])
    def flaky(kind):
        if minray.get(counter.add.remote()) % 3:
            raise kind("again")
        return "done"

    first = minray.get(flaky.remote(KeyError))
    tries = minray.get(counter.get.remote())
    with pytest.raises(ValueError):
        minray.get(flaky.remote(ValueError))
    return first, tries, minray.get(counter.get.remote())


def children_of_a_task_that_is_retried_run_again():
    counter = Counter.remote()

    @minray.remote
    def load(counter):
        count = minray.get(counter.add.remote())
        if count == 1:
            raise KeyError("the first time")
        return count

    @minray.remote(retry_exceptions=[KeyError])
    def total(counter):
        return minray.get(load.remote(counter))

    return minray.get(total.remote(counter)), minray.get(counter.get.remote())


def tasks_in_tasks_on_one_cpu():
    return minray.get(depth.remote(6))


def a_task_that_asks_for_more_than_there_is():
    return minray.get(add.options(num_cpus=64).remote(1))


def an_actor_that_asks_for_more_than_there_is():
    actor = Counter.options(resources={"gold": 1}).remote()
    return minray.get(actor.get.remote())


def the_resources_that_a_task_has():
    look = minray.remote(num_cpus=2)(lambda: minray.get_runtime_context().get_assigned_resources())
    return minray.get(look.remote()), minray.cluster_resources()["CPU"]


def wait_keeps_the_order():
    never = add.remote(Counter.remote().get.remote())
    refs = [add.remote(i) for i in range(4)]
    minray.get(refs)
    minray.get(never)
    ready, rest = minray.wait(refs, num_returns=3)
    return [refs.index(r) for r in ready], [refs.index(r) for r in rest]


def wait_and_get_have_timeouts():
    slow = minray.remote(lambda: time.sleep(1.5))
    ref = slow.remote()
    ready, rest = minray.wait([ref], timeout=0.05)
    with pytest.raises(exceptions.GetTimeoutError):
        minray.get(ref, timeout=0.05)
    minray.cancel(ref)
    return len(ready), len(rest)


def wait_refuses_duplicates():
    ref = minray.put(1)
    return minray.wait([ref, ref])


def get_refuses_what_is_no_ref():
    return minray.get([add])


def a_running_task_is_cancelled():
    slow = minray.remote(lambda: time.sleep(60))
    ref = slow.remote()
    minray.wait([ref], timeout=0.1)
    minray.cancel(ref)
    return minray.get(ref)


def a_waiting_task_is_cancelled_and_its_child():
    child = minray.remote(lambda: time.sleep(60))
    parent = minray.remote(lambda: minray.get(child.remote()))
    ref = parent.remote()
    minray.wait([ref], timeout=0.2)
    minray.cancel(ref)
    after = add.remote(ref)
    with pytest.raises(exceptions.RayError) as caught:
        minray.get(after)
    return type(caught.value).__name__


def a_task_is_cancelled_by_force():
    @minray.remote
    def stubborn():
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

    ref = stubborn.remote()
    minray.wait([ref], timeout=0.2)
    minray.cancel(ref, force=True)
    return minray.get(ref)


def what_has_finished_cannot_be_cancelled():
    ref = add.remote(1)
    minray.get(ref)
    minray.cancel(ref)
    return minray.get(ref)


def an_actor_keeps_its_state_and_its_order():
    counter = Counter.remote(10)
    refs = [counter.add.remote(k) for k in range(5)]
    return minray.get(refs), minray.get(counter.items.remote())


def two_actors_are_isolated():
    one, other = Counter.remote(), Counter.remote()
    shared = [1]
    kept = minray.get([one.keep.remote(shared), other.keep.remote(shared)])
    minray.get(one.add.remote(5))
    return kept, minray.get([one.get.remote(), other.get.remote()])


def an_actor_s_error_leaves_it_alive():
    counter = Counter.remote()
    with pytest.raises(KeyError):
        minray.get(counter.fail.remote())
    return minray.get(counter.get.remote())


def a_constructor_that_fails():
    counter = Counter.remote(failing=True)
    return minray.get(counter.get.remote())


def a_constructor_with_wrong_arguments():
    return Counter.remote(1, 2, 3, 4)


def a_method_that_is_not_there():
    return Counter.remote().addd.remote()


def methods_with_several_results():
    first, second = Counter.remote().two.remote()
    return minray.get([second, first])


def calls_wait_for_their_arguments_in_order():
    counter = Counter.remote()
    slow = minray.remote(lambda: time.sleep(0.1) or "slow")
    counter.note.remote(slow.remote())
    counter.note.remote("fast")
    return minray.get(counter.items.remote())


def handles_go_into_tasks_and_actors():
    counter = Counter.remote()
    holder = Counter.remote()
    minray.get(holder.keep.remote([counter]))
    use = minray.remote(lambda handle: minray.get(handle.add.remote(2)))
    minray.get([use.remote(counter) for _ in range(3)])
    return minray.get(counter.get.remote())


def an_actor_makes_an_actor():
    @minray.remote
    class Parent:
        def __init__(self):
            self.child = Counter.remote(3)

        def ask(self):
            return minray.get(self.child.add.remote())

    return minray.get(Parent.remote().ask.remote())


def named_actors():
    counter = Counter.options(name="one").remote(1)
    again = Counter.options(name="one", get_if_exists=True).remote(2)
    with pytest.raises(ValueError):
        Counter.options(name="one").remote()
    found = minray.get(minray.remote(lambda: minray.get(minray.get_actor("one").add.remote())).remote())
    equal = again == counter
    minray.kill(counter)
    with pytest.raises(ValueError):
        minray.get_actor("one")
    return found, equal


def a_named_actor_ends_with_its_last_handle():
    counter = Counter.options(name="short").remote()
    minray.get(counter.get.remote())
    del counter
    until = time.monotonic() + 5
    while time.monotonic() < until:
        try:
            minray.get_actor("short")
        except ValueError:
            return "gone"
        time.sleep(0.01)


def a_killed_actor():
    counter = Counter.remote()
    minray.get(counter.get.remote())
    minray.kill(counter)
    return minray.get(counter.get.remote())


def a_killed_actor_is_made_again():
    counter = Counter.options(max_restarts=1).remote(5)
    minray.get(counter.add.remote())
    minray.kill(counter, no_restart=False)
    first = minray.get(counter.add.remote())
    minray.kill(counter, no_restart=False)
    with pytest.raises(exceptions.ActorDiedError):
        minray.get(counter.add.remote())
    return first


def a_call_in_which_its_actor_dies():
    counter = Counter.options(max_restarts=1).remote()
    with pytest.raises(exceptions.ActorUnavailableError):
        minray.get(counter.suicide.remote())
    return minray.get(counter.add.remote())


def an_actor_that_leaves():
    counter = Counter.remote()
    with pytest.raises(exceptions.ActorDiedError):
        minray.get(counter.leave.remote())
    return minray.get(counter.get.remote())


def an_actor_of_several_threads():
    @minray.remote(max_concurrency=2)
    class Meeting:
        def __init__(self):
            self.here = 0

        def come(self):
            self.here += 1
            while self.here < 2:
                time.sleep(0.01)
            return self.here

    meeting = Meeting.remote()
    return minray.get([meeting.come.remote(), meeting.come.remote()])


def as_many_calls_as_may_be_pending():
    counter = Counter.options(max_pending_calls=2).remote()
    gate = minray.remote(lambda: time.sleep(0.5)).remote()
    counter.note.remote(gate)
    counter.add.remote()
    return counter.add.remote()


def objects_are_freed_with_their_last_ref():
    inner = minray.put(2)
    refs = [minray.put(bytes(100_000)), add.remote(1), minray.put([inner]), inner]
    minray.get(refs)
    node, names = api.core().node, [bytes(ref) for ref in refs]
    blocks, place = node.lineage.arena.blocks, node.objects[names[0]].data
    held = [name in node.objects for name in names], place in blocks
    del refs, inner
    api.core().raylet.drain()
    return held, [name in node.objects for name in names], place in blocks


def a_ref_in_a_result_keeps_its_object():
    outer = minray.remote(lambda: [minray.put("inner"), add.remote(1)])
    refs = minray.get(outer.remote())
    return minray.get(refs)


def generators_stream_their_items():
    stream = minray.remote(num_returns="streaming")(lambda n: (i * i for i in range(n)))
    return [minray.get(ref) for ref in stream.remote(4)]


def groups_of_an_actor_s_threads_do_not_wait_for_each_other():
    @minray.remote(concurrency_groups={"io": 1})
    class Server:
        def __init__(self):
            self.told = False

        def wait(self):
            while not self.told:
                time.sleep(0.01)
            return "told"

        @minray.method(concurrency_group="io")
        def tell(self):
            self.told = True

    server = Server.remote()
    refs = [server.wait.remote(), server.tell.remote()]
    return minray.get(refs)


def futures_and_awaiting():
    async def both():
        return await asyncio.gather(add.remote(1), add.remote(2))

    return add.remote(3).future().result(timeout=20), asyncio.run(both())


def the_context():
    look = minray.remote(
        lambda: (
            minray.get_runtime_context().get_task_name(),
            minray.get_runtime_context().get_actor_id(),
            minray.get_runtime_context().get_task_id() is not None,
        )
    )
    return minray.get(look.options(name="looking").remote()), minray.get_runtime_context().get_task_id()


PROGRAMS = [
    values_go_in_and_out, refs_are_resolved_at_the_top_only, arguments_are_copied, results_are_copied, what_was_put_is_a_copy_too,
    captured_values_are_copied_with_the_function, arrays_are_read_only_and_share_no_memory_with_the_original, large_arguments_and_results,
    several_results, a_wrong_number_of_results, an_error_comes_at_get, an_error_has_its_cause_and_its_traceback,
    an_error_goes_through_what_depends_on_it, an_error_in_a_nested_task, an_exit_is_an_error, an_exception_that_cannot_be_pickled,
    an_argument_that_cannot_be_pickled, a_result_that_cannot_be_pickled, a_call_with_too_many_arguments,
    exceptions_are_retried_as_often_as_said, children_of_a_task_that_is_retried_run_again, tasks_in_tasks_on_one_cpu,
    a_task_that_asks_for_more_than_there_is,
    an_actor_that_asks_for_more_than_there_is, the_resources_that_a_task_has, wait_keeps_the_order, wait_and_get_have_timeouts,
    wait_refuses_duplicates, get_refuses_what_is_no_ref, a_running_task_is_cancelled, a_waiting_task_is_cancelled_and_its_child,
    a_task_is_cancelled_by_force, what_has_finished_cannot_be_cancelled, an_actor_keeps_its_state_and_its_order, two_actors_are_isolated,
    an_actor_s_error_leaves_it_alive, a_constructor_that_fails, a_constructor_with_wrong_arguments, a_method_that_is_not_there,
    methods_with_several_results, calls_wait_for_their_arguments_in_order, handles_go_into_tasks_and_actors, an_actor_makes_an_actor,
    named_actors, a_named_actor_ends_with_its_last_handle, a_killed_actor, a_killed_actor_is_made_again, a_call_in_which_its_actor_dies,
    an_actor_that_leaves, an_actor_of_several_threads, as_many_calls_as_may_be_pending, objects_are_freed_with_their_last_ref,
    a_ref_in_a_result_keeps_its_object, futures_and_awaiting, the_context, generators_stream_their_items,
    groups_of_an_actor_s_threads_do_not_wait_for_each_other,
]  # fmt: skip


def outcome(program):
    """What it returns, or the classes of what it raises and the first line of what that says, without IDs and places."""
    try:
        return "returned", program()
    except Exception as error:
        said = str(error).partition("\n")[0]
        said = re.sub(r"\d[\d,]* bytes of memory|[0-9a-f]{4}-\d+|[0-9a-f]{32}|pid[= ]\d+|0x[0-9a-f]+|worker \d+", "~", said)
        said = said.removesuffix(" It had not started.").removesuffix(" It may have run partway.")  # As load will have it.
        return "raised", [cls.__name__ for cls in type(error).__mro__], said


def locally(program):
    """In a local session, while that of this test stands aside."""
    real = api._core
    api.set_core(None)
    try:
        with minray.init(local_mode=True, num_cpus=2):
            result = outcome(program)
            api._core.raylet.drain()
            api._core.node.check()
            return result
    finally:
        api.set_core(real)
        real.connect()


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda program: program.__name__)
def test_it_comes_out_the_same_in_one_process_and_in_many(program, module_session):
    here = locally(program)
    assert here == outcome(program)
