"""What a caller gets when something failed elsewhere."""

from __future__ import annotations

import copy
import dataclasses
import pickle
import sys
import threading
from typing import Any

import pytest

import minray
from minray import exceptions
from minray.exceptions import (
    ActorDiedError,
    GetTimeoutError,
    ObjectLostError,
    RayActorError,
    RayError,
    RaySystemError,
    RayTaskError,
    UnserializableException,
    WorkerCrashedError,
    build,
    make_argument_error,
    make_task_error,
)
from minray.serialization import deserialize, note_ref, serialize, to_bytes

CLASSES = [
    kind
    for kind in vars(exceptions).values()
    if isinstance(kind, type) and issubclass(kind, RayError) and kind is not RayTaskError
]


def there_and_back(error: Any) -> Any:
    return deserialize(to_bytes(serialize(error)))


def raised_by(function: Any, *args: Any) -> RayTaskError:
    """The error as the worker makes it."""
    try:
        function(*args)
    except BaseException as error:
        return make_task_error(error, function.__name__, 123)
    raise AssertionError("it did not raise")


def got_from(function: Any, *args: Any) -> Any:
    """The error as ``get`` raises it."""
    return there_and_back(raised_by(function, *args)).as_instanceof_cause()


# --- the classes ------------------------------------------------------------------------

DOCUMENTED_PARENTS = {
    "TaskCancelledError": "RayError",
    "WorkerCrashedError": "RayError",
    "RayActorError": "RayError",
    "ActorDiedError": "RayActorError",
    "ActorUnavailableError": "RayActorError",
    "ActorUnschedulableError": "RayError",
    "TaskUnschedulableError": "RayError",
    "GetTimeoutError": "RayError",
    "ObjectLostError": "RayError",
    "ObjectReconstructionFailedError": "ObjectLostError",
    "OwnerDiedError": "ObjectLostError",
    "ReferenceCountingAssertionError": "ObjectLostError",
    "AsyncioActorExit": "RayError",
    "TaskPlacementGroupRemoved": "RayError",
    "ActorPlacementGroupRemoved": "RayError",
    "UnserializableException": "RayError",
    "RuntimeEnvSetupError": "RayError",
    "ObjectStoreFullError": "RayError",
    "OutOfMemoryError": "RayError",
    "OutOfDiskError": "RayError",
    "NodeDiedError": "RayError",
    "PendingCallsLimitExceeded": "RayError",
    "OufOfBandObjectRefSerializationException": "RayError",
    "RayTaskError": "RayError",
}


@pytest.mark.parametrize("name", DOCUMENTED_PARENTS)
def test_a_class_has_the_parent_that_ray_documents(name):
    assert DOCUMENTED_PARENTS[name] in [base.__name__ for base in getattr(exceptions, name).__mro__[1:]]


def test_a_timeout_is_a_timeout_error_and_an_assertion_an_assertion_error():
    assert issubclass(GetTimeoutError, TimeoutError)
    assert issubclass(exceptions.ReferenceCountingAssertionError, AssertionError)


@pytest.mark.parametrize("kind", CLASSES, ids=lambda kind: kind.__name__)
def test_each_class_is_made_from_a_message_and_travels_with_its_attributes(kind):
    error = build(kind.__name__, "worker 41c7 died", pid=8123)
    assert type(error) is kind
    for same in (error, there_and_back(error), pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(same) is kind
        assert str(same) == "worker 41c7 died" and same.args == ("worker 41c7 died",)
        assert same.pid == 8123
    assert str(kind())  # Without a message it says what it means.


def test_attributes_that_are_not_known_are_none():
    assert RayActorError("x").actor_id is None
    assert ActorDiedError("x", actor_id="ab").actor_id == "ab"
    assert ActorDiedError("x").cause is None
    assert ObjectLostError("x").object_ref_hex is None


def test_an_unknown_class_name_becomes_a_system_error_that_keeps_it():
    for name in ("NoSuchError", "os", "RayTaskError"):
        error = build(name, "what happened")
        assert type(error) is RaySystemError
        assert str(error) == f"{name}: what happened"


# --- a task's error is an instance of its cause's class ---------------------------------


class Plain(Exception):
    pass


class TwoArguments(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class WithProperty(Exception):
    @property
    def doubled(self) -> int:
        return self.args[0] * 2

    @property
    def cause(self) -> str:
        return "the user's own"

    @property
    def traceback_str(self) -> str:
        return "the user's own too"


class Slotted(Exception):
    __slots__ = ("x",)

    def __init__(self, x: int = 7) -> None:
        self.x = x


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    a: int


class OwnNew(Exception):
    def __new__(cls, *, code: int) -> Any:
        return super().__new__(cls, code)

    def __init__(self, *, code: int) -> None:
        super().__init__(code)


class NoSubclasses(Exception):
    def __init_subclass__(cls) -> None:
        raise TypeError("NoSubclasses is final")


class Locked(Exception):
    def __init__(self) -> None:
        super().__init__("locked")
        self.lock = threading.Lock()


class NotRebuilt(Exception):
    def __reduce__(self) -> Any:
        return int, ("not a number",)


class NoException(Exception):
    def __reduce__(self) -> Any:
        return int, ("7",)


class Mean(Exception):
    def __str__(self) -> str:
        raise RuntimeError("no str")

    def __getattr__(self, name: str) -> Any:
        raise RuntimeError("no attributes")


def fail(error: BaseException) -> None:
    raise error


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", 1),
        KeyError("k"),
        ZeroDivisionError(),
        FileNotFoundError(2, "gone", "/x"),
        UnicodeDecodeError("utf-8", b"abc", 0, 1, "bad"),
        ImportError("no", name="m", path="/p"),
        SyntaxError("bad", ("f.py", 1, 2, "text")),
        Plain("a"),
        TwoArguments(3, "x"),
        WithProperty(4),
        Slotted(),
        Frozen(1),
        OwnNew(code=3),
        Mean("a"),
        WorkerCrashedError("died"),
        GetTimeoutError("late"),
    ],
    ids=lambda error: type(error).__name__,
)
def test_it_is_caught_as_what_the_task_raised(error):
    got = got_from(fail, error)
    assert isinstance(got, RayTaskError) and isinstance(got, type(error))
    assert type(got).__name__ == f"RayTaskError({type(error).__name__})"
    assert got.args == error.args
    cause = vars(got)["cause"]
    assert type(cause) is type(error) and cause.args == error.args
    assert str(got).startswith("minray::fail() (pid=123)\n")
    builtin = ("errno", "filename", "start", "reason", "name", "path", "lineno")
    for name in (*builtin, "code", "doubled", "x", "a"):
        if name in dir(error):
            assert getattr(got, name) == getattr(error, name)
    again = there_and_back(got)  # As when a task passes it on as a value.
    assert type(again) is type(got) and str(again) == str(got)


def test_two_errors_of_one_class_share_a_class():
    assert type(got_from(fail, Plain(1))) is type(got_from(fail, Plain(2)))


def test_a_cause_that_is_plain_exception_needs_no_second_class():
    got = got_from(fail, Exception("a"))
    assert type(got) is RayTaskError
    assert got.as_instanceof_cause() is got


def test_a_class_that_cannot_be_subclassed_degrades_and_says_so():
    got = got_from(fail, NoSubclasses("a"))
    assert type(got) is RayTaskError
    assert isinstance(got.cause, NoSubclasses)
    assert "plain RayTaskError, since NoSubclasses cannot be subclassed: NoSubclasses is final" in str(got)


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (Locked(), "Locked.lock cannot be pickled"),
        (NotRebuilt(), "ValueError: invalid literal"),
        (NoException(), "something that is no exception"),
    ],
    ids=lambda case: type(case).__name__,
)
def test_an_exception_that_cannot_travel_degrades_and_says_so(error, reason):
    got = got_from(fail, error)
    assert type(got) is RayTaskError
    assert isinstance(got.cause, UnserializableException)
    assert f"plain RayTaskError, since its {type(error).__name__} could not be pickled" in str(got)
    assert reason in str(got)
    assert "in fail" in str(got)
    assert str(there_and_back(got)) == str(got)


def test_an_exception_whose_class_is_unknown_here_degrades_and_says_so(monkeypatch):
    data = to_bytes(serialize(raised_by(fail, Plain("a"))))
    monkeypatch.delattr(sys.modules[__name__], "Plain")
    got = deserialize(data).as_instanceof_cause()
    assert type(got) is RayTaskError
    assert "could not be rebuilt in this process: AttributeError" in str(got)
    assert "Plain: a" in str(got)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), SystemExit(3), StopIteration(1), GeneratorExit()])
def test_what_python_itself_acts_on_stays_a_plain_task_error(error):
    got = got_from(fail, error)
    assert type(got) is RayTaskError
    assert type(got.cause) is type(error)


def test_an_error_of_a_local_class_is_caught_by_that_class():
    class Local(Exception):
        def __init__(self, a: int, b: int) -> None:
            super().__init__(a + b)

    assert isinstance(got_from(fail, Local(1, 2)), Local)


def test_refs_in_an_exception_are_seen():
    class Ref(bytes):
        def __reduce__(self) -> Any:
            note_ref(self)
            return bytes, (bytes(self),)

    assert serialize(raised_by(fail, ValueError(Ref(b"r" * 16)))).refs == (b"r" * 16,)


def test_it_knows_where_it_happened():
    error = make_task_error(ValueError("x"), "A.f", 7, ip="10.0.0.1", actor_id="ab12", actor_repr="<A>")
    got = there_and_back(error).as_instanceof_cause()
    assert (got.function_name, got.pid, got.ip) == ("A.f", 7, "10.0.0.1")
    assert (got.actor_id, got.actor_repr) == ("ab12", "<A>")
    assert got.proctitle == "minray::A.f"
    assert str(got).splitlines()[0] == "minray::A.f() (pid=7, ip=10.0.0.1, actor_id=ab12, repr=<A>)"


# --- the traceback ----------------------------------------------------------------------


def test_the_traceback_is_the_users_part_only():
    def work() -> None:
        serialize(threading.Lock())  # Fails inside minray.

    text = str(got_from(work))
    assert "in work" in text and "serialize(threading.Lock())" in text
    assert minray.__path__[0] not in text
    assert "Traceback" not in text.partition("direct cause")[0]
    assert "TypeError: value cannot be pickled" in text


def test_causes_contexts_and_notes_are_shown():
    def work() -> None:
        try:
            try:
                fail(KeyError("first"))
            except KeyError as error:
                raise ValueError("second") from error
        except ValueError:
            third = TypeError("third")
            if hasattr(third, "add_note"):
                third.add_note("a note")
            raise third  # noqa: B904

    text = str(got_from(work))
    assert text.index("KeyError: 'first'") < text.index("direct cause") < text.index("ValueError: second")
    assert text.index("ValueError: second") < text.index("another exception") < text.index("TypeError: third")
    assert ("a note" in text) == (sys.version_info >= (3, 11))


@pytest.mark.skipif(sys.version_info < (3, 11), reason="ExceptionGroup came with Python 3.11")
def test_a_group_is_shown_whole_and_caught_in_parts():
    def work() -> None:
        errors = []
        for error in (ValueError("one"), TwoArguments(2, "two")):
            try:
                fail(error)
            except Exception as caught:
                errors.append(caught)
        raise ExceptionGroup("several", errors)  # noqa: F821

    got = got_from(work)
    assert isinstance(got, ExceptionGroup)  # noqa: F821
    assert [type(error) for error in got.exceptions] == [ValueError, TwoArguments]
    values, others = got.split(ValueError)
    assert len(values.exceptions) == len(others.exceptions) == 1
    assert "ValueError: one" in str(got) and "2: two" in str(got) and str(got).count("in fail") == 2


def test_an_error_that_came_through_two_tasks_shows_both():
    def inner() -> None:
        fail(TwoArguments(1, "deep"))

    inner_error = got_from(inner)

    def outer() -> None:
        raise inner_error

    got = got_from(outer)
    assert isinstance(got, TwoArguments) and type(vars(got)["cause"]) is TwoArguments
    lines = str(got).splitlines()
    assert lines[0] == "minray::outer() (pid=123)"
    assert "minray::inner() (pid=123)" in lines
    assert lines[-1].endswith("TwoArguments: 1: deep")
    assert "RayTaskError" not in str(got)


def test_an_error_without_frames_is_shown_by_its_message():
    assert str(make_task_error(ValueError("x"), "f")) == "minray::f()\nValueError: x"


def test_a_huge_message_is_cut_in_the_middle():
    text = str(got_from(fail, ValueError("x" * 10_000_000 + "end")))
    assert len(text) < 60_000
    assert text.endswith("xend") and "characters left out" in text


def test_an_exception_that_cannot_be_shown_is_still_an_error(monkeypatch):
    monkeypatch.setattr("traceback.TracebackException", lambda *_: 1 / 0)
    text = str(raised_by(fail, ValueError(1)))
    assert "ValueError (its traceback cannot be shown: ZeroDivisionError)" in text


def test_endless_recursion_is_told_briefly():
    def down(n: int) -> int:
        return down(n + 1) + 1

    got = got_from(down, 0)
    assert isinstance(got, RecursionError)
    assert "repeated" in str(got) and len(str(got)) < 5000


# --- arguments that failed --------------------------------------------------------------


def test_a_task_whose_argument_failed_names_both_tasks():
    got = there_and_back(make_argument_error(got_from(fail, Plain("a")), "total"))
    assert isinstance(got, Plain) and isinstance(got, RayTaskError)
    first_line = "minray::total() did not run, since one of its arguments could not be computed:\n"
    assert str(got).startswith(first_line)
    assert "\nminray::fail() (pid=123)\n" in str(got)
    assert got.function_name == "total"


def test_of_a_long_chain_the_last_and_the_first_are_told():
    error: Any = WorkerCrashedError("worker 41c7 was killed", pid=5)
    for n in range(100):
        error = make_argument_error(error, f"step{n}")
    assert type(error) is WorkerCrashedError and error.pid == 5
    assert len(str(error)) < 200
    assert str(error).startswith("minray::step99()") and str(error).endswith("\nworker 41c7 was killed")
