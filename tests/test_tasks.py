"""Tasks: options, arguments, results, nesting, waiting, cancelling, resources."""

import asyncio
import concurrent.futures
import gc
import os
import time

import numpy as np
import pytest

import minray
from minray import exceptions


@minray.remote
def echo(*args, **kwargs):
    return (args, kwargs) if kwargs else args


@minray.remote
def add(a, b=0):
    return a + b


@minray.remote
def type_names(*args):
    return [type(arg).__name__ for arg in args]


def wait_for(path):
    """In a task: until the file is there.  Nothing can announce it: it crosses processes."""
    while not os.path.exists(path):
        time.sleep(0.001)


@minray.remote
def say_and_wait(started, go, value=None):
    with open(started, "a") as file:
        file.write("x")
    wait_for(go)
    return value


@pytest.fixture
def gate(tmp_path):
    """(started, go): files by which a task says that it runs, and is told to end."""
    started, go = str(tmp_path / "started"), tmp_path / "go"
    yield started, go
    go.touch()


def started(path, count=1, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not os.path.exists(path) or os.path.getsize(path) < count:
        assert time.monotonic() < deadline, f"{path}: the task has not started"
        time.sleep(0.001)


# ---------------------------------------------------------------- decorating and options


def test_a_decorated_function_runs_elsewhere(module_session):
    @minray.remote
    def where():
        return os.getpid()

    assert minray.get(where.remote()) != os.getpid()


def test_the_decorator_takes_options_and_keeps_name_and_docstring():
    @minray.remote(num_cpus=1, max_retries=0, name="other")
    def documented():
        """Says what it does."""

    assert documented.__name__ == "documented"
    assert documented.__doc__ == "Says what it does."


def test_calling_a_remote_function_directly_says_how_it_is_called():
    with pytest.raises(TypeError, match=r"add\.remote\(\.\.\.\)"):
        add(1)


@pytest.mark.parametrize("wrong", [(3,), (), (add,)])
def test_what_cannot_be_remote_is_refused(wrong):
    with pytest.raises(TypeError, match="remote"):
        minray.remote(*wrong)


def test_an_async_function_is_refused_as_a_task():
    async def coroutine():
        pass

    with pytest.raises(TypeError, match=r"coroutine\(\) is a coroutine function.*asyncio\.run"):
        minray.remote(coroutine)


@pytest.mark.parametrize(
    "given, error, message",
    [
        ({"num_cpu": 1}, TypeError, r"remote\(\) has no option 'num_cpu'. Did you mean num_cpus=\?"),
        ({"zzz": 1}, TypeError, r"has no option .zzz.. It knows: accelerator_type, "),
        ({"num_cpus": -1}, ValueError, r"num_cpus=\.\.\.\) must be a number, 0 or more, got -1"),
        ({"num_cpus": "2"}, ValueError, r"num_cpus.*got '2'"),
        ({"num_cpus": True}, ValueError, r"num_cpus.*got True"),
        ({"num_cpus": float("nan")}, ValueError, r"num_cpus.*got nan"),
        ({"num_cpus": float("inf")}, ValueError, r"num_cpus.*got inf"),
        ({"num_gpus": 1.5}, ValueError, r"num_gpus.*a fraction up to 1, or a whole number, got 1.5"),
        ({"memory": -5}, ValueError, r"memory.*got -5"),
        ({"resources": {"CPU": 1}}, ValueError, r"resources.*other than CPU, GPU and memory"),
        ({"resources": {"x": -1}}, ValueError, r"resources.*amounts"),
        ({"resources": ["x"]}, ValueError, r"resources.*dict"),
        ({"num_returns": -1}, ValueError, r"num_returns.*an integer, 0 or more.*got -1"),
        ({"num_returns": 1.5}, ValueError, r"num_returns.*got 1.5"),
        ({"max_retries": -2}, ValueError, r"max_retries.*0 or more, or -1 for no limit, got -2"),
        ({"retry_exceptions": [int]}, ValueError, r"retry_exceptions.*a list of exception classes"),
        ({"retry_exceptions": ValueError}, ValueError, r"retry_exceptions.*a list of exception classes"),
        ({"name": ""}, ValueError, r"name.*a string that is not empty"),
        ({"scheduling_strategy": "RANDOM"}, ValueError, r'"DEFAULT" or "SPREAD"'),
        ({"num_returns": "stream"}, ValueError, r'num_returns.*"streaming" or "dynamic" for a generator, got'),
        ({"runtime_env": {"conda": "base"}}, NotImplementedError, r"runtime_env.*conda"),
        ({"placement_group": 1}, ValueError, r"must be a placement group, or None, got 1"),
        ({"max_restarts": 1}, TypeError, r"max_restarts.*actors"),
    ],
)
def test_an_option_that_is_wrong_is_refused_with_its_name_and_what_it_may_be(given, error, message):
    with pytest.raises(error, match=message):
        minray.remote(**given)(lambda: None)
    with pytest.raises(error, match=message.replace("remote", "options")):
        add.options(**given)


def test_an_option_that_is_none_is_as_if_it_were_not_given(module_session):
    assert minray.get(add.options(num_cpus=None, num_gpus=None, resources=None, name=None).remote(1, 2)) == 3


def test_options_make_another_function_and_leave_the_first_as_it_was(module_session):
    two = echo.options(num_returns=2)
    assert minray.get(two.remote(1, 2)) == [1, 2]
    assert minray.get(echo.remote(1, 2)) == (1, 2)


def test_the_legacy_underscore_remote_takes_arguments_and_options(module_session):
    assert minray.get(echo._remote(args=[1, 2], kwargs=None, num_returns=2)) == [1, 2]
    assert minray.get(add._remote([1], {"b": 3})) == 4


def test_the_name_option_is_what_the_task_is_called(module_session):
    @minray.remote
    def my_name():
        return minray.get_runtime_context().get_task_name()

    assert minray.get(my_name.remote()).endswith("my_name")
    assert minray.get(my_name.options(name="Rumpelstiltskin").remote()) == "Rumpelstiltskin"


# ---------------------------------------------------------------- arguments


def test_positional_and_keyword_arguments_arrive(module_session):
    assert minray.get(echo.remote(1, "two", three=[3])) == ((1, "two"), {"three": [3]})


def test_a_list_as_the_only_argument_is_not_taken_for_the_packing(module_session):
    assert minray.get(echo.remote([1], {"a": 2})) == ([1], {"a": 2})
    assert minray.get(echo.remote([])) == ([],)


def test_refs_at_top_level_are_resolved_and_nested_ones_stay_refs(module_session):
    ref = minray.put(7)
    assert minray.get(type_names.remote(ref, [ref], {"k": ref}, (ref,))) == ["int", "list", "dict", "tuple"]
    assert minray.get(echo.remote(ref, key=add.remote(ref, b=ref))) == ((7,), {"key": 14})


def test_nested_refs_can_be_got_by_the_task_after_the_driver_dropped_them(module_session):
    @minray.remote
    def total(refs):
        return sum(minray.get(refs))

    assert minray.get(total.remote([minray.put(1), add.remote(2, 3)])) == 6


def test_the_same_ref_twice_is_the_same_value_twice(module_session):
    ref = add.remote(1, 1)
    assert minray.get(add.remote(ref, ref)) == 4


def test_a_chain_of_tasks_each_waiting_for_the_one_before(module_session):
    ref = 0
    for _ in range(200):
        ref = add.remote(ref, 1)
    assert minray.get(ref) == 200


def test_arguments_larger_than_a_message_arrive_whole(module_session):
    text, blob = "ä" * 100_000, os.urandom(300_000)
    assert minray.get(echo.remote(text, blob, key=blob)) == ((text, blob), {"key": blob})


def test_a_large_argument_beside_refs_and_keywords(module_session):
    blob = b"x" * 100_000
    assert minray.get(echo.remote(minray.put(1), blob, last=minray.put(2))) == ((1, blob), {"last": 2})


def test_a_large_argument_can_contain_refs(module_session):
    @minray.remote
    def inner(pair):
        return len(pair[0]) + minray.get(pair[1])

    assert minray.get(inner.remote([b"x" * 100_000, minray.put(5)])) == 100_005


def test_a_large_array_arrives_read_only_without_a_copy(module_session):
    @minray.remote
    def look(array):
        return array.flags.writeable, array.flags.owndata, float(array.sum())

    array = np.ones(100_000)
    assert minray.get(look.remote(array)) == (False, False, 100_000.0)
    assert minray.get(look.remote(minray.put(array))) == (False, False, 100_000.0)


def test_a_large_array_from_a_task_is_read_only_and_outlives_its_ref(module_session):
    @minray.remote
    def make():
        return np.arange(100_000)

    array = minray.get(make.remote())
    with pytest.raises(ValueError, match="read-only"):
        array[0] = 1
    junk = [minray.put(np.zeros(100_000)) for _ in range(5)]
    assert array[-1] == 99_999
    del junk


def test_functions_lambdas_classes_and_closures_travel(module_session):
    @minray.remote
    def call(function, *args):
        return function(*args)

    class Local:
        value = 3

    offset = 10
    assert minray.get(call.remote(lambda x: x + offset, 1)) == 11
    assert minray.get(call.remote(lambda cls: cls().value, Local)) == 3


def test_a_remote_function_can_be_an_argument_and_refer_to_itself(module_session):
    @minray.remote
    def countdown(n):
        return n if n == 0 else minray.get(countdown.remote(n - 1))

    @minray.remote
    def apply(function, x):
        return minray.get(function.remote(x))

    assert minray.get(apply.remote(countdown, 3)) == 0


def test_arguments_are_those_of_the_moment_of_the_call(module_session):
    values = [1]
    ref = echo.remote(values)
    values.append(2)
    assert minray.get(ref) == ([1],)


# ---------------------------------------------------------------- results


def test_num_returns_0_returns_nothing_and_still_runs(module_session, tmp_path):
    @minray.remote(num_returns=0)
    def touch(path):
        open(path, "w").close()
        return "ignored"

    assert touch.remote(str(tmp_path / "ran")) is None
    started_by = time.monotonic() + 10
    while not (tmp_path / "ran").exists():
        assert time.monotonic() < started_by
        time.sleep(0.001)


def test_several_returns_are_refs_of_their_own(module_session):
    a, b, c = echo.options(num_returns=3).remote(1, "b", None)
    assert minray.get([c, b, a]) == [None, "b", 1]


def test_one_of_several_returns_can_be_dropped_and_the_others_stay(module_session):
    a, b = echo.options(num_returns=2).remote(np.zeros(100_000), np.ones(100_000))
    del a
    gc.collect()
    assert minray.get(b).sum() == 100_000


def test_a_generator_gives_the_values_of_several_returns(module_session):
    @minray.remote(num_returns=3)
    def generate():
        for i in range(3):
            yield i * np.ones(20_000)

    assert [array[0] for array in minray.get(generate.remote())] == [0, 1, 2]


@pytest.mark.parametrize("value, got", [((1,), "returned 1 val"), ((1, 2, 3), "returned 3 val"), (5, "one int")])
def test_the_wrong_number_of_returns_is_an_error_of_each(module_session, value, got):
    @minray.remote(num_returns=2)
    def wrong():
        return value

    for ref in wrong.remote():
        with pytest.raises(ValueError, match=rf"has num_returns=2 and .*{got}"):
            minray.get(ref)


def test_an_error_is_the_value_of_all_returns(module_session):
    @minray.remote(num_returns=2)
    def fail():
        raise KeyError("k")

    for ref in fail.remote():
        with pytest.raises(KeyError):
            minray.get(ref)


@pytest.mark.parametrize("value", [None, True, -1, 1 << 70, 1.5, "", "text", b"", b"x" * 70_000, (), [], {}, ...])
def test_builtin_values_come_back_as_they_were(module_session, value):
    (back,) = minray.get(echo.remote(value))
    assert back == value and type(back) is type(value)


def test_an_exception_that_is_returned_is_a_value(module_session):
    (back,) = minray.get(echo.remote(ValueError("just a value")))
    assert isinstance(back, ValueError)


def test_a_task_can_return_refs_which_stay_alive(module_session):
    @minray.remote
    def make():
        return [minray.put(np.ones(20_000)), add.remote(1, 2)]

    array, number = minray.get(make.remote())
    gc.collect()
    assert minray.get(number) == 3
    assert minray.get(array).sum() == 20_000


# ---------------------------------------------------------------- nesting


def test_a_task_that_waits_for_children_lends_its_cpu(module_session):
    @minray.remote
    def parent():
        refs = [add.remote(i, 1) for i in range(10)]
        ready, rest = minray.wait(refs, num_returns=10, timeout=60)
        return len(ready), len(rest)

    assert minray.get([parent.remote() for _ in range(6)], timeout=60) == [(10, 0)] * 6


def test_children_that_a_task_does_not_wait_for_run_all_the_same(module_session):
    @minray.remote
    def leave():
        return [add.remote(i, i) for i in range(5)]

    assert minray.get(minray.get(leave.remote())) == [0, 2, 4, 6, 8]


# ---------------------------------------------------------------- get, wait


def test_get_of_a_list_keeps_its_order_and_takes_a_ref_twice(module_session):
    refs = [add.remote(i, 0) for i in range(20)]
    assert minray.get(refs) == list(range(20))
    assert minray.get([refs[3], refs[3]]) == [3, 3]
    assert minray.get([]) == []


@pytest.mark.parametrize("wrong, hint", [(add, "add.remote"), (3, "no get"), ({1}, "list"), ([1], "list with")])
def test_get_of_something_else_says_what_to_do(module_session, wrong, hint):
    with pytest.raises(TypeError, match=hint):
        minray.get(wrong)


def test_get_with_a_timeout_says_how_many_are_missing_and_can_be_called_again(module_session, gate):
    begun, go = gate
    refs = [minray.put(1), say_and_wait.remote(begun, str(go), "late")]
    with pytest.raises(exceptions.GetTimeoutError, match=r"2 object\(s\); 1 of them .*say_and_wait") as caught:
        minray.get(refs, timeout=0.01)
    assert isinstance(caught.value, TimeoutError)
    go.touch()
    assert minray.get(refs, timeout=60) == [1, "late"]


def test_get_with_timeout_0_of_what_is_ready_gives_it(module_session):
    assert minray.get(minray.put(3), timeout=0) == 3

    @minray.remote
    def inside():
        ref = add.remote(1, 1)
        minray.wait([ref])
        return minray.get(ref, timeout=0)

    assert minray.get(inside.remote(), timeout=60) == 2


def test_get_with_a_timeout_inside_a_task(module_session, gate):
    begun, go = gate

    @minray.remote
    def impatient(refs):
        try:
            minray.get(refs, timeout=0.01)
        except TimeoutError as error:
            return str(error)

    assert "1 of them were not ready" in minray.get(impatient.remote([say_and_wait.remote(begun, str(go))]))


def test_get_of_many_raises_the_first_error_without_waiting_for_the_rest(module_session, gate):
    @minray.remote
    def fail():
        raise ValueError("early")

    begun, go = gate
    with pytest.raises(ValueError, match="early"):
        minray.get([say_and_wait.remote(begun, str(go)), fail.remote()], timeout=60)


def test_wait_returns_ready_and_rest_in_the_order_given(module_session, gate):
    begun, go = gate
    late = say_and_wait.remote(begun, str(go))
    early = [add.remote(i) for i in range(3)]
    ready, rest = minray.wait([late, *early], num_returns=3, timeout=60)
    assert (ready, rest) == (early, [late])


def test_wait_returns_no_more_than_num_returns_though_more_are_ready(module_session):
    refs = [minray.put(i) for i in range(4)]
    ready, rest = minray.wait(refs, num_returns=2)
    assert (ready, rest) == (refs[:2], refs[2:])
    assert minray.wait(refs) == (refs[:1], refs[1:])


def test_wait_with_a_timeout_returns_what_there_is(module_session, gate):
    begun, go = gate
    late, early = say_and_wait.remote(begun, str(go)), minray.put(1)
    assert minray.wait([late, early], num_returns=2, timeout=0.01) == ([early], [late])
    assert minray.wait([late], timeout=0) == ([], [late])


def test_wait_counts_a_failed_task_as_ready(module_session):
    @minray.remote
    def fail():
        raise ValueError

    ref = fail.remote()
    assert minray.wait([ref], timeout=60) == ([ref], [])


def test_wait_refuses_what_makes_no_sense(module_session):
    ref = minray.put(1)
    with pytest.raises(ValueError, match="each ObjectRef once"):
        minray.wait([ref, ref])
    with pytest.raises(ValueError, match="between 1 and the number of refs"):
        minray.wait([ref], num_returns=2)
    with pytest.raises(ValueError, match="between 1"):
        minray.wait([ref], num_returns=0)
    with pytest.raises(TypeError, match=r"Did you mean wait\(\[ref\]\)\?"):
        minray.wait(ref)
    with pytest.raises(TypeError, match="list of ObjectRefs"):
        minray.wait([1])
    assert minray.wait([]) == ([], [])


def test_results_can_be_taken_as_they_complete(module_session):
    rest, seen = [add.remote(i) for i in range(30)], []
    while rest:
        (ready,), rest = minray.wait(rest)
        seen.append(minray.get(ready))
    assert sorted(seen) == list(range(30))


# ---------------------------------------------------------------- futures and asyncio


def test_a_ref_can_be_awaited_in_the_driver_and_in_a_task(module_session):
    async def both():
        return await asyncio.gather(add.remote(1, 1), add.remote(2, 2), *[minray.put(3)])

    @minray.remote
    def inside():
        return asyncio.run(both())

    assert asyncio.run(both()) == [2, 4, 3]
    assert minray.get(inside.remote(), timeout=60) == [2, 4, 3]


def test_awaiting_a_failed_task_raises(module_session):
    @minray.remote
    def fail():
        raise KeyError("k")

    async def main():
        with pytest.raises(KeyError):
            await fail.remote()

    asyncio.run(main())


def test_giving_up_on_an_awaited_ref_leaves_the_task_alone(module_session, gate):
    begun, go = gate
    ref = say_and_wait.remote(begun, str(go), "done")

    async def main():
        with pytest.raises(asyncio.TimeoutError):
            await asyncio.wait_for(ref.as_future(), 0.01)

    asyncio.run(main())
    go.touch()
    assert minray.get(ref, timeout=60) == "done"


def test_futures_of_the_standard_library_complete(module_session):
    refs = [add.remote(i) for i in range(10)]
    done = concurrent.futures.as_completed([ref.future() for ref in refs], timeout=60)
    assert sorted(future.result() for future in done) == list(range(10))


def test_a_future_of_a_large_array_works_in_a_task_too(module_session):
    @minray.remote
    def inside():
        return float(minray.put(np.ones(50_000)).future().result(timeout=60).sum())

    assert minray.get(inside.remote(), timeout=60) == 50_000


# ---------------------------------------------------------------- cancelling


def test_a_queued_task_that_is_cancelled_never_runs(module_session, gate, tmp_path):
    begun, go = gate
    running = [say_and_wait.remote(begun, str(go)) for _ in range(2)]
    started(begun, 2)
    touched = str(tmp_path / "touched")
    queued = [say_and_wait.remote(touched, str(go)) for _ in range(20)]
    for ref in reversed(queued):
        minray.cancel(ref)
    for ref in queued:
        with pytest.raises(exceptions.TaskCancelledError, match="say_and_wait"):
            minray.get(ref, timeout=60)
    go.touch()
    minray.get(running, timeout=60)
    assert minray.get(add.remote(1, 1), timeout=60) == 2
    assert not os.path.exists(touched)


@pytest.mark.parametrize("how", ["sleep", "python loop", "get", "generator"])
def test_a_running_task_is_cancelled_by_a_keyboard_interrupt(module_session, tmp_path, how):
    begun, cleaned = str(tmp_path / "begun"), str(tmp_path / "cleaned")
    go = tmp_path / "go"

    @minray.remote(num_returns=2 if how == "generator" else 1)
    def run():
        def body():
            try:
                open(begun, "w").write("x")
                if how == "sleep":
                    time.sleep(60)
                elif how == "get":
                    minray.get(sleeper.remote())
                while True:
                    pass
            finally:
                open(cleaned, "w").close()

        if how != "generator":
            return body()
        return (body() for _ in range(2))

    @minray.remote
    def sleeper():
        wait_for(go)  # It may be submitted after its parent was cancelled, and then goes on.

    ref = run.remote()
    ref = ref[0] if how == "generator" else ref
    started(begun)
    minray.cancel(ref)
    go.touch()
    with pytest.raises(exceptions.TaskCancelledError, match="may have run partway"):
        minray.get(ref, timeout=60)
    assert os.path.exists(cleaned)
    assert minray.get([add.remote(i) for i in range(10)], timeout=60) == list(range(10))


def test_a_task_that_waits_for_an_argument_can_be_cancelled(module_session, gate):
    begun, go = gate
    waits = add.remote(say_and_wait.remote(begun, str(go), 1), 1)
    minray.cancel(waits)
    with pytest.raises(exceptions.TaskCancelledError, match="had not started"):
        minray.get(waits, timeout=60)
    go.touch()
    assert minray.get(add.remote(1, 2), timeout=60) == 3


def test_what_depends_on_a_cancelled_task_fails_with_it(module_session, gate):
    begun, go = gate
    first = say_and_wait.remote(begun, str(go), 1)
    second = add.remote(first, 1)
    started(begun)
    minray.cancel(first)
    with pytest.raises(exceptions.TaskCancelledError, match=r"add\(\) did not run"):
        minray.get(second, timeout=60)


def test_force_ends_a_task_that_will_not_be_interrupted_and_it_is_not_retried(module_session, tmp_path):
    begun = str(tmp_path / "begun")

    @minray.remote
    def stubborn():
        open(begun, "a").write("x")
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

    ref = stubborn.remote()
    started(begun)
    minray.cancel(ref, force=True)
    with pytest.raises(exceptions.TaskCancelledError):
        minray.get(ref, timeout=60)
    assert minray.get(add.remote(1, 1), timeout=60) == 2
    assert os.path.getsize(begun) == 1


@pytest.mark.parametrize("recursive", [True, False])
def test_cancelling_cancels_the_children_only_if_recursive(module_session, tmp_path, recursive):
    begun, go = str(tmp_path / "begun"), str(tmp_path / "go")

    @minray.remote
    def child():
        open(begun, "a").write("x")
        wait_for(go)
        return "survived"

    @minray.remote
    def parent(box):
        ref = child.remote()
        minray.get(box.keep.remote([ref]))
        return minray.get(ref)

    @minray.remote
    class Box:
        def keep(self, refs):
            self.refs = refs

        def give(self):
            return self.refs

    box = Box.remote()
    ref = parent.remote(box)
    started(begun)
    (child_ref,) = minray.get(box.give.remote(), timeout=60)
    minray.cancel(ref, recursive=recursive)
    with pytest.raises(exceptions.TaskCancelledError):
        minray.get(ref, timeout=60)
    if recursive:
        with pytest.raises(exceptions.TaskCancelledError):
            minray.get(child_ref, timeout=60)
    open(go, "w").close()
    if not recursive:
        assert minray.get(child_ref, timeout=60) == "survived"


def test_cancelling_what_has_finished_does_nothing(module_session):
    ref = add.remote(1, 1)
    assert minray.get(ref) == 2
    for force in (False, True):
        minray.cancel(ref, force=force)
    assert minray.get(ref) == 2
    minray.cancel(minray.put(3))


def test_a_task_may_catch_its_cancellation_and_return(module_session, tmp_path):
    begun = str(tmp_path / "begun")

    @minray.remote
    def careful():
        try:
            open(begun, "w").write("x")
            time.sleep(60)
        except KeyboardInterrupt:
            return "put away my tools"

    ref = careful.remote()
    started(begun)
    minray.cancel(ref)
    assert minray.get(ref, timeout=60) == "put away my tools"


def test_cancel_takes_refs_only(module_session):
    with pytest.raises(TypeError, match="takes the ObjectRef"):
        minray.cancel(3)


def test_cancelling_at_any_moment_leaves_the_session_whole(module_session):
    refs = [add.remote(i) for i in range(300)]
    for ref in refs[::3]:
        minray.cancel(ref)
    for number, ref in enumerate(refs):
        try:
            assert minray.get(ref, timeout=60) == number
        except exceptions.TaskCancelledError:
            assert number % 3 == 0
    assert minray.get(add.remote(1, 1), timeout=60) == 2


# ---------------------------------------------------------------- resources


def test_what_can_never_run_fails_at_once_and_says_what_there_is(module_session):
    with pytest.raises(exceptions.TaskUnschedulableError) as caught:
        minray.get(add.options(num_cpus=64, resources={"tpu": 1}).remote(1), timeout=60)
    text = str(caught.value)
    assert "needs 64 CPU, 1 tpu" in text and "2 CPU" in text and "never run" in text and "minray.init()" in text
    assert "bytes of memory in all" in text


def test_tiny_fractions_add_up_exactly(module_session):
    assert minray.get([add.options(num_cpus=0.1).remote(i) for i in range(30)], timeout=60) == list(range(30))
    assert minray.get(add.options(num_cpus=2).remote(1, 1), timeout=60) == 2


def test_a_task_knows_what_it_was_assigned(module_session):
    @minray.remote(num_cpus=2, memory=1000)
    def mine():
        return minray.get_runtime_context().get_assigned_resources(), os.environ["OMP_NUM_THREADS"]

    assert minray.get(mine.remote()) == ({"CPU": 2.0, "memory": 1000.0}, "2")


# ---------------------------------------------------------------- fairness of a worker's queue


def test_tasks_handed_to_a_worker_behind_a_long_one_are_taken_back(module_session, gate):
    begun, go = gate
    late = say_and_wait.remote(begun, str(go))
    quick = [add.remote(i) for i in range(40)]
    assert minray.get(quick, timeout=60) == list(range(40))
    assert minray.wait([late], timeout=0) == ([], [late])


def test_even_behind_a_long_one_that_holds_the_gil_and_each_runs_once(module_session, tmp_path):
    runs = tmp_path / "runs"

    @minray.remote(max_retries=0)
    def maybe_hold(number, hold=False):
        with open(runs, "a") as file:
            file.write(f"{number}\n")
        if hold:
            return 7**4_000_000 > 0  # One C call: no other thread of that process runs meanwhile.
        return number

    minray.get([maybe_hold.remote(-1) for _ in range(20)])  # Known to be short: prefetched deeply.
    late = maybe_hold.remote(1000, True)
    quick = [maybe_hold.remote(number) for number in range(40)]
    assert minray.get(quick, timeout=60) == list(range(40))
    assert minray.wait([late], timeout=0) == ([], [late]), "the long one was over: the test has shown nothing"
    assert minray.get(late, timeout=60)
    assert minray.get([maybe_hold.remote(number) for number in range(40, 60)]) == list(range(40, 60))
    assert sorted(map(int, runs.read_text().split()))[20:] == [*range(60), 1000]


def test_a_task_leaves_no_garbage_for_the_cycle_collector(module_session):
    @minray.remote
    def collect():
        return gc.collect()

    @minray.remote
    def pid():
        return os.getpid()

    minray.get([add.remote(i) for i in range(10)])
    gc.collect()
    gc.disable()
    try:
        minray.get([add.remote(i) for i in range(1000)])
        for i in range(100):
            minray.get(add.remote(i))
            minray.wait([add.remote(i, b=i)])
        assert gc.collect() < 20
    finally:
        gc.enable()
