"""What a program sees when a task fails: classes, tracebacks, retries, crashes."""

import os
import pickle
import signal
import threading
import time

import numpy as np
import pytest

import minray
from minray import exceptions


class UserError(Exception):
    """Of a module that workers can import, or not: these tests run either way."""

    def __init__(self, code, reason):
        super().__init__(f"{reason} (code {code})")
        self.code = code
        self.reason = reason


@minray.remote
def fail_with(error):
    raise error


@minray.remote
def echo(value):
    return value


def outcome(ref, timeout=60):
    """The exception that get() raises."""
    with pytest.raises(Exception) as caught:
        minray.get(ref, timeout=timeout)
    return caught.value


# ---------------------------------------------------------------- classes


def test_a_tasks_error_is_of_the_users_class_and_a_ray_task_error(module_session):
    error = outcome(fail_with.remote(ValueError("bad value")))
    assert isinstance(error, ValueError)
    assert isinstance(error, exceptions.RayTaskError)
    assert isinstance(error, exceptions.RayError)
    assert isinstance(error.cause, ValueError) and error.cause.args == ("bad value",)
    assert error.function_name == "fail_with"


def test_a_class_of_the_drivers_own_can_be_caught(module_session):
    class Mine(RuntimeError):
        pass

    @minray.remote
    def fail():
        raise Mine("x")

    with pytest.raises(Mine):
        minray.get(fail.remote())


def test_an_exception_whose_constructor_takes_two_arguments_comes_home_whole(module_session):
    @minray.remote
    def fail():
        raise UserError(17, reason="no paper")

    error = outcome(fail.remote())
    assert isinstance(error, UserError)
    assert (error.code, error.reason) == (17, "no paper")


@pytest.mark.parametrize(
    "make",
    [
        lambda: FileNotFoundError(2, "No such file", "/nowhere"),
        lambda: UnicodeDecodeError("utf-8", b"\xff", 0, 1, "invalid"),
        lambda: KeyError("k"),
        lambda: StopIteration(3),
        lambda: ZeroDivisionError(),
        lambda: ImportError("no module", name="m"),
    ],
)
def test_builtin_exceptions_come_home(module_session, make):
    error = outcome(fail_with.remote(make()))
    assert isinstance(error.cause, type(make()))
    assert error.cause.args == make().args


def test_an_exception_that_cannot_be_pickled_costs_its_class_but_not_its_traceback(module_session):
    @minray.remote
    def fail():
        error = RuntimeError("holds a lock")
        error.lock = threading.Lock()
        raise error

    error = outcome(fail.remote())
    assert type(error) is exceptions.RayTaskError
    assert isinstance(error.cause, exceptions.UnserializableException)
    assert "RuntimeError: holds a lock" in str(error) and "plain RayTaskError" in str(error)


def test_an_exception_whose_str_raises_is_still_an_error_of_its_task(module_session):
    @minray.remote
    def fail():
        class Mute(Exception):
            def __str__(self):
                raise RuntimeError("I do not talk")

        raise Mute

    assert "Mute" in str(outcome(fail.remote()))
    assert minray.get(echo.remote(1)) == 1


def test_system_exit_and_keyboard_interrupt_are_errors_that_do_not_end_the_driver(module_session):
    @minray.remote
    def leave(kind):
        raise kind

    for kind in (SystemExit(3), KeyboardInterrupt(), GeneratorExit()):
        error = outcome(leave.remote(kind))
        assert type(error) is exceptions.RayTaskError
        assert type(error.cause) is type(kind)


def test_an_error_can_be_pickled_and_passed_on(module_session):
    error = pickle.loads(pickle.dumps(outcome(fail_with.remote(ValueError("v")))))
    assert isinstance(error, ValueError) and isinstance(error, exceptions.RayTaskError)
    back = minray.get(echo.remote(error))
    assert isinstance(back, ValueError)


def test_getting_an_error_twice_raises_it_twice_without_growing(module_session):
    ref = fail_with.remote(ValueError("v"))
    first, second = outcome(ref), outcome(ref)
    assert first is not second and str(first) == str(second)


# ---------------------------------------------------------------- tracebacks


def test_the_traceback_has_the_users_frames_and_none_of_minrays(module_session):
    def inner(x):
        return 1 / x

    @minray.remote
    def outer(x):
        return inner(x)

    text = str(outcome(outer.remote(0)))
    assert text.startswith("minray::test_the_traceback_has") or text.startswith("minray::outer() (pid=")
    assert "in outer" in text and "in inner" in text and "return 1 / x" in text
    assert f"{os.sep}minray{os.sep}worker.py" not in text
    assert text.rstrip().endswith("ZeroDivisionError: division by zero")


def test_the_header_tells_function_and_process(module_session):
    @minray.remote
    def pid():
        return os.getpid()

    pids = {minray.get(pid.remote()) for _ in range(10)}
    error = outcome(fail_with.remote(ValueError("v")))
    assert f"minray::fail_with() (pid={error.pid}" in str(error)
    assert error.pid not in (None, os.getpid()) and isinstance(pids, set)


def test_the_chain_of_causes_is_told(module_session):
    @minray.remote
    def chain():
        try:
            {}["missing"]
        except KeyError as error:
            raise ValueError("could not look up") from error

    text = str(outcome(chain.remote()))
    assert "KeyError: 'missing'" in text
    assert "The above exception was the direct cause of the following exception" in text
    assert text.index("KeyError") < text.index("could not look up")


def test_an_error_in_a_child_comes_through_its_parent_with_both_tracebacks(module_session):
    @minray.remote
    def child():
        raise LookupError("deep down")

    @minray.remote
    def parent():
        return minray.get(child.remote())

    error = outcome(parent.remote())
    assert isinstance(error, LookupError)
    text = str(error)
    assert "child() (pid=" in text and "parent() (pid=" in text and text.count("deep down") >= 1


def test_a_failed_argument_fails_its_task_and_names_who_failed(module_session):
    @minray.remote
    def first():
        raise ValueError("the root of it")

    @minray.remote
    def then(x):
        return x

    error = outcome(then.remote(then.remote(then.remote(first.remote()))))
    assert isinstance(error, ValueError)
    text = str(error)
    assert "then() did not run, since one of its arguments could not be computed" in text
    assert "first() (pid=" in text and "the root of it" in text


def test_a_failed_argument_beside_a_large_one_leaves_no_memory_pinned(module_session):
    @minray.remote
    def both(a, b):
        return 1

    def used():
        return minray.api.core().node.lineage.arena.used

    before = used()
    bad = fail_with.remote(ValueError("v"))
    for _ in range(3):
        assert isinstance(outcome(both.remote(bad, np.ones(100_000))), ValueError)
    del bad
    deadline = time.monotonic() + 5
    while used() > before:
        assert time.monotonic() < deadline, f"{used() - before} bytes are still held"
        minray.get(echo.remote(1))


def test_an_exception_raised_by_get_of_a_crash_inside_a_task_names_both(module_session):
    @minray.remote(max_retries=0)
    def crash():
        os._exit(3)

    @minray.remote
    def parent():
        minray.get(crash.remote())

    error = outcome(parent.remote())
    assert isinstance(error, exceptions.WorkerCrashedError) and isinstance(error, exceptions.RayTaskError)
    assert "exited with status 3" in str(error)


# ---------------------------------------------------------------- what cannot be pickled


def test_an_argument_that_cannot_be_pickled_is_named_by_its_path(module_session, tmp_path):
    class Holder:
        def __init__(self, inside):
            self.inside = inside

    with open(tmp_path / "file", "w") as file:
        for value, path in [
            (threading.Lock(), r"args\[0\]"),
            ([1, {"k": threading.Lock()}], r"args\[0\]\[1\]\['k'\]"),
            (Holder(Holder(threading.Lock())), r"args\[0\]\.inside\.inside"),
            (file, r"args\[0\]"),
            ((i for i in range(3)), r"args\[0\]"),
        ]:
            with pytest.raises(TypeError, match=path):
                echo.remote(value)
    with pytest.raises(TypeError, match=r"kwargs\['value'\]|value"):
        echo.remote(value=threading.Lock())
    assert minray.get(echo.remote(1)) == 1


def test_a_function_that_cannot_be_pickled_is_named_with_what_it_holds(module_session):
    lock = threading.Lock()

    @minray.remote
    def guarded():
        with lock:
            return 1

    with pytest.raises(TypeError, match="guarded.*lock"):
        guarded.remote()


def test_a_result_that_cannot_be_pickled_is_an_error_of_the_task_that_names_the_path(module_session):
    @minray.remote
    def make():
        return {"fine": 1, "not": [threading.Lock()]}

    error = outcome(make.remote())
    assert isinstance(error, TypeError)
    assert "make()['not'][0]" in str(error)
    assert minray.get(echo.remote(1)) == 1


def test_one_of_several_results_that_cannot_be_pickled_is_named(module_session):
    @minray.remote(num_returns=2)
    def make():
        return np.ones(100_000), threading.Lock()

    for ref in make.remote():
        assert "make()[1]" in str(outcome(ref))


def test_a_generator_as_the_one_result_is_refused_with_words(module_session):
    @minray.remote(num_returns=1)
    def generate():
        yield 1

    error = outcome(generate.remote())
    assert isinstance(error, TypeError) and "generator" in str(error)


def test_a_reduce_that_raises_is_an_error_of_the_call_or_of_the_task(module_session):
    class Angry:
        def __reduce__(self):
            raise RuntimeError("do not touch me")

    with pytest.raises(TypeError, match="do not touch me"):
        echo.remote(Angry())

    @minray.remote
    def make():
        return Angry()

    assert "do not touch me" in str(outcome(make.remote()))


def test_a_value_that_cannot_be_unpickled_by_the_worker_is_an_error_of_the_task(module_session):
    @minray.remote
    def take(value):
        return value

    error = outcome(take.remote(Bomb()))
    assert "tick tick" in str(error)
    assert minray.get(echo.remote(1)) == 1


def _explode(pid):
    if os.getpid() != pid:
        raise RuntimeError("tick tick")
    return None


class Bomb:
    def __reduce__(self):
        return (_explode, (os.getpid(),))


def test_values_that_contain_themselves_travel(module_session):
    loop = []
    loop.append(loop)
    back = minray.get(echo.remote(loop))
    assert back[0] is back


# ---------------------------------------------------------------- retries of exceptions


@pytest.fixture
def counter(tmp_path):
    """A file to which each attempt adds a byte."""
    path = tmp_path / "attempts"
    path.touch()
    return path


@minray.remote
def fail_until(path, attempts, kind=ValueError):
    with open(path, "ab") as file:
        file.write(b"x")
        count = file.tell()
    if count < attempts:
        raise kind(f"attempt {count}")
    return count


def test_exceptions_are_not_retried_unless_asked(module_session, counter):
    assert isinstance(outcome(fail_until.remote(str(counter), 2)), ValueError)
    assert counter.stat().st_size == 1


@pytest.mark.parametrize("which", [True, [ValueError], (KeyError, ValueError), [Exception]])
def test_exceptions_that_are_named_are_retried(module_session, counter, which):
    ref = fail_until.options(retry_exceptions=which).remote(str(counter), 3)
    assert minray.get(ref, timeout=60) == 3


def test_other_exceptions_than_those_named_are_not_retried(module_session, counter):
    ref = fail_until.options(retry_exceptions=[KeyError]).remote(str(counter), 3)
    assert isinstance(outcome(ref), ValueError)
    assert counter.stat().st_size == 1


def test_retries_end_with_the_last_error(module_session, counter):
    ref = fail_until.options(retry_exceptions=True, max_retries=2).remote(str(counter), 100)
    assert "attempt 3" in str(outcome(ref))
    assert counter.stat().st_size == 3


def test_retries_without_limit_go_on_beyond_the_default(module_session, counter):
    ref = fail_until.options(retry_exceptions=True, max_retries=-1).remote(str(counter), 8)
    assert minray.get(ref, timeout=60) == 8


def test_a_class_of_the_drivers_own_can_be_retried(module_session, counter):
    class Flaky(Exception):
        pass

    ref = fail_until.options(retry_exceptions=[Flaky]).remote(str(counter), 3, Flaky)
    assert minray.get(ref, timeout=60) == 3


@minray.remote
def load(path, value):
    """Fails when it runs for the first time; says how often it has run."""
    with open(path, "ab") as file:
        file.write(b"x")
        count = file.tell()
    if count == 1:
        raise ConnectionError("it could not be reached")
    return value, count


@pytest.mark.parametrize("as_argument", [False, True])
def test_a_task_that_is_retried_for_what_its_child_raised_runs_the_child_again(module_session, counter, as_argument):
    @minray.remote(retry_exceptions=[ConnectionError])
    def total(path):
        value = minray.put(20) if as_argument else 20
        value, count = minray.get(load.remote(path, value))
        return minray.get(minray.put(value + count))

    assert minray.get(total.remote(str(counter)), timeout=60) == 22
    assert counter.stat().st_size == 2


def test_children_that_have_finished_run_again_after_an_exception_and_not_after_a_crash(module_session, tmp_path):
    @minray.remote
    def note(path, number):
        with open(path, "a") as file:
            file.write(f"child after {number}\n")
        return number

    @minray.remote(max_retries=5, retry_exceptions=[ConnectionError])
    def parent(path):
        with open(path, "a") as file:
            file.write("parent\n")
        with open(path) as file:
            attempt = file.read().count("parent")
        seen = minray.get(note.remote(path, "its beginning"))  # The same at each attempt: not to be told apart.
        if attempt in (1, 4):
            os.kill(os.getpid(), signal.SIGKILL)
        if attempt in (2, 3):
            raise ConnectionError(f"attempt {attempt}")
        return seen, attempt

    path = tmp_path / "story"
    assert minray.get(parent.remote(str(path)), timeout=60) == ("its beginning", 5)
    child = "child after its beginning"
    # Attempt 2 finds the child of 1, which crashed; 3 and 4 come after exceptions; 5 finds that of 4, which crashed.
    assert path.read_text().splitlines() == ["parent", child, "parent", "parent", child, "parent", child, "parent"]


@pytest.mark.parametrize("kind", ["threads", "async"])
def test_a_method_that_is_retried_for_what_its_child_raised_runs_the_child_again(module_session, counter, kind):
    class Plain:
        @minray.method(max_task_retries=3, retry_exceptions=[ConnectionError])
        def total(self, path):
            return minray.get(load.remote(path, 20))

    class Async:
        @minray.method(max_task_retries=3, retry_exceptions=[ConnectionError])
        async def total(self, path):
            return await load.remote(path, 20)

    actor = minray.remote(max_concurrency=2)(Async if kind == "async" else Plain).remote()
    assert minray.get(actor.total.remote(str(counter)), timeout=60) == (20, 2)


def test_an_exact_actor_is_made_again_from_the_children_of_each_attempt(module_session, tmp_path):
    @minray.remote(max_restarts=-1, checkpoint_every=1000)
    class Sums:
        def __init__(self):
            self.seen = []

        @minray.method(max_task_retries=3, retry_exceptions=[ConnectionError])
        def add(self, path):
            self.seen.append("attempt")
            self.seen.append(minray.get(load.remote(path, 20)))
            return self.seen

        def show(self):
            return self.seen, os.getpid()

    actor = Sums.remote()
    path = tmp_path / "runs"
    expected = ["attempt", "attempt", (20, 2)]
    assert minray.get(actor.add.remote(str(path)), timeout=60) == expected
    seen, pid = minray.get(actor.show.remote())
    os.kill(pid, signal.SIGKILL)
    again, other_pid = minray.get(actor.show.remote(), timeout=60)
    assert again == seen == expected and other_pid != pid
    assert path.stat().st_size == 2, "the replay ran neither of them again"


# ---------------------------------------------------------------- crashes


@minray.remote
def die_until(path, attempts, how="exit"):
    with open(path, "ab") as file:
        file.write(b"x")
        count = file.tell()
    if count < attempts:
        if how == "exit":
            os._exit(7)
        os.kill(os.getpid(), how)
        time.sleep(10)
    return count


def test_a_task_that_kills_its_worker_runs_again(module_session, counter):
    assert minray.get(die_until.remote(str(counter), 3), timeout=60) == 3


@pytest.mark.parametrize("how, words", [("exit", "exited with status 7"), (signal.SIGKILL, "killed by SIGKILL")])
def test_a_task_that_always_kills_its_worker_fails_naming_how_and_which_attempt(module_session, counter, how, words):
    error = outcome(die_until.options(max_retries=1).remote(str(counter), 100, how))
    assert isinstance(error, exceptions.WorkerCrashedError)
    text = str(error)
    assert words in text and "die_until()" in text and "attempt 2 of 2" in text
    assert "may have run partway" in text and "max_retries" in text and "minray story" in text
    assert counter.stat().st_size == 2


def test_max_retries_0_runs_once(module_session, counter):
    assert "attempt 1 of 1" in str(outcome(die_until.options(max_retries=0).remote(str(counter), 100)))
    assert counter.stat().st_size == 1


def test_a_segfault_is_named(module_session):
    @minray.remote(max_retries=0)
    def crash():
        os.kill(os.getpid(), signal.SIGSEGV)

    assert "SIGSEGV" in str(outcome(crash.remote()))


@pytest.mark.parametrize("retries", [0, 3])
def test_a_poison_task_among_good_neighbours_harms_only_itself(module_session, tmp_path, retries):
    ran = tmp_path / "ran"
    ran.mkdir()

    @minray.remote(max_retries=retries)
    def work(number, poison=False):
        with open(ran / str(number), "ab") as file:
            file.write(b"x")
        if poison:
            os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(10)
        return number

    minray.get([work.remote(1000 + i) for i in range(40)])  # Known to be short: sent many at once.
    refs = [work.remote(number, poison=number == 50) for number in range(101)]
    for number, ref in enumerate(refs):
        if number == 50:
            assert isinstance(outcome(ref), exceptions.WorkerCrashedError)
        else:
            assert minray.get(ref, timeout=60) == number
    runs = [(ran / str(number)).stat().st_size for number in range(101)]
    assert runs[50] == retries + 1
    again = [number for number, count in enumerate(runs) if count > 1 and number != 50]
    if not retries:
        assert not again, "max_retries=0 means at most once"
    # Execution is at least once: results that had waited for company were lost with the process.
    assert max(count for number, count in enumerate(runs) if number != 50) <= retries + 2


def test_a_worker_killed_from_outside_while_idle_is_replaced(module_session):
    @minray.remote
    def pid():
        return os.getpid()

    for _ in range(2):
        os.kill(minray.get(pid.remote(), timeout=60), signal.SIGKILL)
    assert minray.get([echo.remote(i) for i in range(20)], timeout=60) == list(range(20))
