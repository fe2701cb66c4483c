"""Actors in real processes: what a program sees of them.

What can be decided without a process is in test_actor_table.py.  Most tests here share one
session: an actor has a process of its own anyway.
"""

from __future__ import annotations

import gc
import os
import select
import signal
import sys
import threading
import weakref
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import minray
from minray.actor import ActorClassInheritanceException
from minray.exceptions import (
    ActorDiedError, ActorUnavailableError, ActorUnschedulableError, GetTimeoutError, PendingCallsLimitExceeded,
    RayActorError, RayTaskError, TaskCancelledError,
)  # fmt: skip

pytestmark = pytest.mark.usefixtures("module_session")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Else each actor would import pytest: 0.1 s.


class Gate:
    """Somebody waits; `open` returns when somebody does, and lets that one go."""

    def __init__(self, path: Path) -> None:
        self.path = str(path)
        os.mkfifo(self.path)

    def wait(self) -> None:
        with open(self.path) as fifo:
            fifo.read()

    def open(self) -> None:
        open(self.path, "w").close()

    def __reduce__(self) -> Any:
        return (_same_gate, (self.path,))


def _same_gate(path: str) -> Gate:
    gate = Gate.__new__(Gate)
    gate.path = path
    return gate


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    return Gate(tmp_path / "gate")


def has_ended(pid: int, within_s: float = 5.0) -> bool:
    """Waits for the end of a process that need not be a child."""
    try:
        fd = os.pidfd_open(pid)
    except ProcessLookupError:
        return True
    try:
        return bool(select.select([fd], [], [], within_s)[0])
    finally:
        os.close(fd)


class PlainCounter:
    kind = "counter"

    def __init__(self, start: int = 0) -> None:
        self.n = start

    def add(self, amount: int = 1) -> int:
        self.n += amount
        return self.n

    def pid(self) -> int:
        return os.getpid()

    def wait_at(self, gate: Gate) -> int:
        gate.wait()
        return self.n

    def fail(self) -> None:
        raise ValueError("no")

    def crash(self, how: int = signal.SIGKILL) -> None:
        os.kill(os.getpid(), how)

    def crash_once(self, path: str) -> str:
        if not os.path.exists(path):
            open(path, "w").close()
            self.crash()
        return "done"

    def leave(self) -> None:
        minray.exit_actor()

    def was_reconstructed(self) -> bool:
        return minray.get_runtime_context().was_current_actor_reconstructed

    def me(self) -> Any:
        return minray.get_runtime_context().current_actor


Counter = minray.remote(PlainCounter)


# ---------------------------------------------------------------- making and calling


def test_an_actor_keeps_its_state_between_calls() -> None:
    counter = Counter.remote(10)
    assert minray.get([counter.add.remote(n) for n in (1, 2, 3)]) == [11, 13, 16]
    assert minray.get(counter.pid.remote()) not in (os.getpid(), minray.get(Counter.remote().pid.remote()))


def test_a_class_with_options_in_the_decorator_is_an_actor_class() -> None:
    @minray.remote(num_cpus=0, max_restarts=1, max_concurrency=2)
    class Local:
        """What it is for."""

        def hello(self) -> str:
            return "hello"

    assert Local.__name__ == "Local" and Local.__doc__ == "What it is for."
    assert minray.get(Local.remote().hello.remote()) == "hello"
    assert minray.get(Local._remote(args=(), num_cpus=1).hello.remote()) == "hello"


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"max_restart": 1}, "Did you mean max_restarts=?"),
        ({"max_restarts": -2}, "max_restarts"),
        ({"max_concurrency": 0}, "1 or more"),
        ({"lifetime": "forever"}, '"detached"'),
        ({"max_pending_calls": 0}, "-1 for no limit"),
        ({"name": ""}, "not empty"),
        ({"num_returns": 2}, "num_returns"),
        ({"concurrency_groups": {"io": 0}}, "1 or more"),
        ({"concurrency_groups": ["io"]}, "a dict"),
    ],
)
def test_an_option_that_cannot_be_is_refused_with_its_name(given: dict[str, Any], error: str) -> None:
    with pytest.raises((TypeError, ValueError, NotImplementedError), match=error.replace("?", r"\?")):
        Counter.options(**given)


def test_the_class_and_its_methods_are_not_called_directly() -> None:
    with pytest.raises(TypeError, match=r"PlainCounter\.remote\("):
        Counter()
    with pytest.raises(TypeError, match=r"handle\.add\.remote\("):
        Counter.remote().add()


def test_arguments_that_the_constructor_cannot_take_are_refused_at_once() -> None:
    with pytest.raises(TypeError, match=r"PlainCounter\.remote\(\): got an unexpected keyword argument 'stop'"):
        Counter.remote(stop=3)

    @minray.remote
    class OfNew:
        def __new__(cls, value: int) -> Any:
            made = super().__new__(cls)
            made.value = value
            return made

        def get(self) -> int:
            return self.value

    assert minray.get(OfNew.remote(3).get.remote()) == 3
    with pytest.raises(TypeError, match="missing a required argument: 'value'"):
        OfNew.remote()


def test_an_unknown_method_is_an_attribute_error_with_the_nearest_name() -> None:
    with pytest.raises(AttributeError, match=r"has no method 'ad'\. Did you mean add\.remote\(\)\?"):
        _ = Counter.remote().ad
    assert "add" in dir(Counter.remote())


def test_every_kind_of_method_can_be_called() -> None:
    class Base:
        def name(self) -> str:
            return "base"

        def who(self) -> str:
            return self.name()

    @minray.remote
    class Heir(Base):
        def name(self) -> str:
            return "heir of " + super().name()

        @classmethod
        def of_class(cls, x: int) -> Any:
            return cls.__name__, x

        @staticmethod
        def of_nobody(x: int) -> int:
            return x

        @property
        def size(self) -> int:
            return 7

        def read_size(self) -> int:
            return self.size

        def __call__(self, x: int) -> int:
            return 2 * x

        @minray.method(num_returns=2)
        def both(self) -> Any:
            return 1, 2

        @minray.method(num_returns=0)
        def none(self) -> None: ...

        def generate(self) -> Any:
            yield from "abc"

        # Named like what dicts, bytes and remote functions have.
        def items(self) -> str:
            return "items"

        def hex(self) -> str:
            return "hex"

        def options(self) -> str:
            return "options"

        def remote(self) -> str:
            return "remote"

    a = Heir.remote()
    assert minray.get(a.who.remote()) == "heir of base"
    assert minray.get(a.of_class.remote(1)) == ("Heir", 1)
    assert minray.get(a.of_nobody.remote(2)) == 2
    assert minray.get(a.read_size.remote()) == 7
    assert minray.get(a.__call__.remote(4)) == 8
    assert minray.get(a.both.remote()) == [1, 2]
    assert a.none.remote() is None
    assert minray.get(a.generate.options(num_returns=3).remote()) == ["a", "b", "c"]
    assert minray.get([a.items.remote(), a.hex.remote(), a.options.remote(), a.remote.remote()]) == [
        "items", "hex", "options", "remote",
    ]  # fmt: skip
    with pytest.raises(AttributeError):
        _ = a.size  # A property has no call to send.


def test_an_actor_class_is_not_inherited_from() -> None:
    with pytest.raises(ActorClassInheritanceException, match="Keep the plain class"):

        class Heir(Counter):  # type: ignore[misc, valid-type]
            pass


def test_every_actor_has_the_methods_of_ray() -> None:
    counter = Counter.remote(5)
    assert minray.get(counter.__ray_ready__.remote()) is True
    assert minray.get(counter.__ray_call__.remote(lambda self, x: self.n + x, 2)) == 7
    pid = minray.get(counter.pid.remote())
    last, end, late = counter.add.remote(), counter.__ray_terminate__.remote(), counter.add.remote()
    assert minray.get(last) == 6
    for ref in (end, late):
        with pytest.raises(ActorDiedError, match="__ray_terminate__"):
            minray.get(ref)
    assert has_ended(pid)


def test_an_actor_says_its_last_word_when_it_ends_in_order(tmp_path: Path) -> None:
    @minray.remote
    class Last:
        def __init__(self, path: str) -> None:
            import atexit

            self.path = path
            atexit.register(lambda: open(path + ".atexit", "w").close())

        def __ray_shutdown__(self) -> None:
            open(self.path, "w").close()

        def pid(self) -> int:
            return os.getpid()

    last = Last.remote(str(tmp_path / "word"))
    pid = minray.get(last.pid.remote())
    del last
    assert has_ended(pid)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["word", "word.atexit"]


# ---------------------------------------------------------------- order


@minray.remote
class Log:
    def __init__(self) -> None:
        self.lines: list[Any] = []

    def write(self, line: Any) -> None:
        self.lines.append(line)

    def read(self) -> list[Any]:
        return self.lines


@minray.remote
def after(gate: Gate, value: Any) -> Any:
    gate.wait()
    return value


def test_calls_run_in_the_order_of_their_caller_even_when_an_early_one_waits_for_its_argument(gate: Gate) -> None:
    log = Log.remote()
    refs = [log.write.remote(0), log.write.remote(after.remote(gate, 1)), log.write.remote(2)]
    minray.get(refs[0])
    assert minray.wait(refs[1:], timeout=0.05) == ([], refs[1:])
    gate.open()
    assert minray.get(log.read.remote()) == [0, 1, 2]


def test_a_caller_that_waits_does_not_hold_up_the_others(gate: Gate) -> None:
    log = Log.remote()

    @minray.remote
    def write(log: Any, lines: list[int]) -> None:
        minray.get([log.write.remote(line) for line in lines])

    log.write.remote(after.remote(gate, "late"))
    minray.get(write.remote(log, [1, 2]))
    gate.open()
    assert minray.get(log.read.remote()) == [1, 2, "late"]


def test_each_of_several_callers_sees_its_own_order() -> None:
    log = Log.remote()

    @minray.remote
    def write(log: Any, who: int) -> None:
        minray.get([log.write.remote((who, n)) for n in range(50)])

    minray.get([write.remote(log, who) for who in range(2)])
    lines = minray.get(log.read.remote())
    assert len(lines) == 100
    for who in range(2):
        assert [n for w, n in lines if w == who] == list(range(50))


def test_five_thousand_calls_at_once_are_all_answered_in_order() -> None:
    counter = Counter.remote()
    assert minray.get([counter.add.remote() for _ in range(5000)]) == list(range(1, 5001))


# ---------------------------------------------------------------- handles


def test_a_handle_works_wherever_it_is_passed() -> None:
    @minray.remote
    class Keeper:
        def __init__(self, inner: Any) -> None:
            self.inner = inner["handle"]

        def add(self) -> int:
            return minray.get(self.inner.add.remote())

        def give(self) -> Any:
            return self.inner

    @minray.remote
    def use(handles: list[Any]) -> int:
        return minray.get(handles[0].add.remote())

    counter = Counter.remote()
    assert minray.get(use.remote([counter])) == 1
    keeper = Keeper.remote({"handle": counter})
    assert minray.get(keeper.add.remote()) == 2
    again = minray.get(keeper.give.remote())
    assert again == counter and hash(again) == hash(counter) and repr(again) == repr(counter)
    assert minray.get(again.add.remote()) == 3
    stored = minray.put([counter])
    pid = minray.get(counter.pid.remote())
    del counter, again, keeper
    (inside,) = minray.get(stored)
    assert minray.get(inside.add.remote()) == 4  # The object kept it alive.
    del inside, stored
    assert has_ended(pid)


def test_looking_at_a_method_makes_no_cycle_that_keeps_the_actor() -> None:
    gc.disable()
    try:
        counter = Counter.remote()
        pid = minray.get(counter.pid.remote())
        method = counter.add
        assert minray.get([method.remote(), counter.add.remote()]) == [1, 2]
        gone = weakref.ref(counter)
        del counter
        assert gone() is not None and minray.get(method.remote()) == 3  # A method keeps its actor.
        del method
        assert gone() is None
        assert has_ended(pid)
    finally:
        gc.enable()


def test_methods_are_introduced_to_the_node_once() -> None:
    counter, other = Counter.remote(), Counter.remote()
    minray.get([counter.add.remote(), other.add.remote()])
    known = len(minray.api.core()._templates)
    minray.get([counter.add.remote(), other.add.remote(), Counter.remote().add.remote()])
    assert len(minray.api.core()._templates) == known


# ---------------------------------------------------------------- ends


def test_an_actor_ends_when_its_last_handle_goes_though_the_driver_only_computes() -> None:
    counter = Counter.remote()
    other = minray.get(counter.me.remote())
    pid = minray.get(counter.pid.remote())
    del counter
    assert minray.get(other.add.remote()) == 1
    del other
    assert has_ended(pid)  # Nothing else wakes the loop.


def test_queued_calls_finish_before_an_actor_without_handles_ends(gate: Gate) -> None:
    counter = Counter.remote()
    pid = minray.get(counter.pid.remote())
    waiting = counter.wait_at.remote(gate)
    last = counter.add.remote()
    del counter
    gate.open()
    assert minray.get([waiting, last]) == [0, 1]
    assert has_ended(pid)


def test_an_actor_that_nobody_kept_still_runs_its_constructor(tmp_path: Path) -> None:
    @minray.remote
    class Effect:
        def __init__(self, gate: Gate) -> None:
            gate.wait()

    gate = Gate(tmp_path / "effect")
    Effect.remote(gate)
    gate.open()


def test_an_actor_held_by_a_worker_ends_with_that_worker() -> None:
    @minray.remote
    class Parent:
        def __init__(self) -> None:
            self.child = Counter.remote()

        def pids(self) -> Any:
            return os.getpid(), minray.get(self.child.pid.remote())

    parent = Parent.remote()
    mine, childs = minray.get(parent.pids.remote())
    os.kill(mine, signal.SIGKILL)
    assert has_ended(childs)


def test_kill_ends_the_process_and_fails_every_call_at_once(gate: Gate) -> None:
    counter = Counter.remote()
    pid = minray.get(counter.pid.remote())
    running, queued = counter.wait_at.remote(gate), counter.add.remote()
    minray.kill(counter)
    for ref in (running, queued, counter.add.remote()):
        with pytest.raises(ActorDiedError, match=r"PlainCounter.*is dead: minray\.kill\(\) was called on it") as caught:
            minray.get(ref, timeout=60)
        assert caught.value.actor_id == counter._actor_id.hex()
    assert "was not run" in str(caught.value)
    assert has_ended(pid)
    minray.kill(counter)  # Twice does nothing.
    with pytest.raises(ValueError, match="takes an actor's handle"):
        minray.kill("counter")  # type: ignore[arg-type]


def test_kill_without_no_restart_makes_the_actor_anew() -> None:
    counter = Counter.options(max_restarts=1).remote()
    pid = minray.get(counter.pid.remote())
    assert minray.get(counter.add.remote()) == 1
    minray.kill(counter, no_restart=False)
    assert has_ended(pid)
    assert minray.get(counter.add.options(max_task_retries=-1).remote()) == 1
    minray.kill(counter, no_restart=False)  # No restart is left.
    with pytest.raises(ActorDiedError):
        minray.get(counter.add.remote())


def test_kill_reaches_an_actor_in_its_constructor(gate: Gate) -> None:
    @minray.remote(max_restarts=-1)
    class Slow:
        def __init__(self, gate: Gate, path: str) -> None:
            with open(path, "w") as file:
                file.write(str(os.getpid()))
            gate.wait()

        def hello(self) -> None: ...

    path = gate.path + ".pid"
    slow = Slow.remote(gate, path)
    call = slow.hello.remote()
    while not os.path.exists(path) or not Path(path).read_text():
        minray.wait([call], timeout=0.01)
    minray.kill(slow)
    with pytest.raises(ActorDiedError, match="kill"):
        minray.get(call, timeout=60)
    assert has_ended(int(Path(path).read_text()))


def test_kill_reaches_an_actor_that_waits_for_its_arguments(gate: Gate) -> None:
    argument = after.remote(gate, 3)
    counter = Counter.options(name="pending").remote(argument)
    call = counter.add.remote()
    minray.kill(counter)
    with pytest.raises(ActorDiedError, match="was not run"):
        minray.get(call, timeout=60)
    gate.open()
    assert minray.get(argument) == 3  # Its waiters are told; a dead actor is not one of them.
    with pytest.raises(ValueError):
        minray.get_actor("pending")


def test_exit_actor_fails_that_call_and_the_later_ones() -> None:
    counter = Counter.options(max_restarts=3).remote()
    pid = minray.get(counter.pid.remote())
    refs = [counter.add.remote(), counter.leave.remote(), counter.add.remote()]
    assert minray.get(refs[0]) == 1
    for ref in refs[1:]:
        with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
            minray.get(ref)
    assert has_ended(pid)  # On purpose: not made anew.
    with pytest.raises(TypeError, match="this is not an actor"):
        minray.actor.exit_actor()


def test_exit_actor_in_the_constructor_ends_it_too() -> None:
    @minray.remote
    class Shy:
        def __init__(self) -> None:
            minray.exit_actor()

        def hello(self) -> None: ...

    with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
        minray.get(Shy.remote().hello.remote(), timeout=60)


# ---------------------------------------------------------------- errors


def test_an_error_of_a_method_is_of_its_class_and_shows_where_and_in_whom() -> None:
    class Named(PlainCounter):
        def __repr__(self) -> str:
            return f"Named(n={self.n})"

    named = minray.remote(Named).remote(3)
    with pytest.raises(ValueError, match="no") as caught:
        minray.get(named.fail.remote())
    assert isinstance(caught.value, RayTaskError)
    text = str(caught.value)
    assert text.startswith("minray::Named.fail() (pid=") and "repr=Named(n=3)" in text
    assert f"actor_id={named._actor_id.hex()}" in text and 'raise ValueError("no")' in text
    assert minray.get(named.add.remote()) == 4  # An error does not end it.


def test_a_constructor_that_raises_fails_every_call_with_its_traceback() -> None:
    @minray.remote(max_restarts=5)
    class Broken:
        def __init__(self, x: int) -> None:
            self.y = 1 / x

        def hello(self) -> None: ...

    broken = Broken.remote(0)
    for _ in range(2):
        with pytest.raises(ActorDiedError) as caught:
            minray.get(broken.hello.remote(), timeout=60)
        text = str(caught.value)
        assert "actor Broken" in text and "its constructor failed" in text and "No call was run" in text
        assert "self.y = 1 / x" in text and "ZeroDivisionError: division by zero" in text
        assert caught.value.actor_init_failed and caught.value.actor_id == broken._actor_id.hex()


def test_a_constructor_whose_argument_failed_says_so() -> None:
    @minray.remote
    def fail() -> None:
        raise KeyError("lost")

    with pytest.raises(ActorDiedError, match="one of its arguments could not be computed"):
        minray.get(Counter.remote(fail.remote()).add.remote(), timeout=60)


def test_a_call_whose_argument_failed_does_not_run_and_the_next_does() -> None:
    @minray.remote
    def fail() -> None:
        raise KeyError("lost")

    counter = Counter.remote()
    bad, good = counter.add.remote(fail.remote()), counter.add.remote()
    with pytest.raises(KeyError):
        minray.get(bad)
    assert minray.get(good) == 1


def test_constructor_arguments_may_be_refs_and_large() -> None:
    @minray.remote
    class Holder:
        def __init__(self, small: int, large: Any, inline: Any) -> None:
            self.total = small + large.sum() + inline.sum()

        def get(self) -> float:
            return float(self.total)

    large = np.ones(200_000)
    assert minray.get(Holder.remote(minray.put(1), minray.put(large), inline=large).get.remote()) == 400_001


def test_what_can_never_run_is_said_at_once() -> None:
    with pytest.raises(ActorUnschedulableError, match="needs 99 CPU"):
        minray.get(Counter.options(num_cpus=99, name="too big").remote().add.remote(), timeout=60)
    with pytest.raises(ValueError):
        minray.get_actor("too big")


# ---------------------------------------------------------------- crashes


def test_an_actor_that_is_killed_dies_naming_the_signal_and_the_reason() -> None:
    counter = Counter.remote()
    crashing, queued = counter.crash.remote(), counter.add.remote()
    with pytest.raises(ActorDiedError, match=r"was killed by SIGKILL while running PlainCounter\.crash\(\)") as caught:
        minray.get(crashing)
    assert "may have run partway" in str(caught.value) and "max_restarts" in str(caught.value)
    with pytest.raises(ActorDiedError, match="SIGKILL") as caught:
        minray.get(queued)
    assert "was not run" in str(caught.value)
    assert isinstance(caught.value, RayActorError)
    with pytest.raises(ActorDiedError, match="SIGSEGV"):
        minray.get(Counter.remote().crash.remote(signal.SIGSEGV))


def test_a_restarted_actor_begins_anew_and_calls_that_had_not_begun_go_to_it() -> None:
    counter = Counter.options(max_restarts=1).remote(5)
    assert minray.get(counter.add.remote()) == 6
    assert minray.get(counter.was_reconstructed.remote()) is False
    crashing, queued = counter.crash.remote(), counter.add.remote()
    with pytest.raises(ActorUnavailableError, match="may have run partway.*being restarted") as caught:
        minray.get(crashing)
    assert "SIGKILL" in str(caught.value) and "max_task_retries" in str(caught.value)
    assert minray.get(queued) == 6  # 5, and not 6, to which 1 is added.
    assert minray.get(counter.was_reconstructed.remote()) is True
    with pytest.raises(ActorDiedError, match="max_restarts=1"):
        minray.get(counter.crash.remote())


def test_a_call_with_retries_is_repeated_by_the_restarted_actor(tmp_path: Path) -> None:
    counter = Counter.options(max_restarts=1, max_task_retries=1).remote()
    before, crashing, behind = (
        counter.add.remote(), counter.crash_once.remote(str(tmp_path / "crashed")), counter.add.remote(),
    )  # fmt: skip
    assert minray.get([before, crashing, behind], timeout=60)[1:] == ["done", 1]


def test_a_method_that_raises_is_repeated_if_that_was_asked_for() -> None:
    @minray.remote
    class Flaky:
        tries = 0

        @minray.method(max_task_retries=2, retry_exceptions=[ConnectionError])
        def fetch(self) -> int:
            self.tries += 1
            if self.tries < 3:
                raise ConnectionError
            return self.tries

        @minray.method(max_task_retries=2, retry_exceptions=[ConnectionError])
        def other(self) -> None:
            self.tries += 1
            raise KeyError

        def count(self) -> int:
            return self.tries

    flaky = Flaky.remote()
    assert minray.get(flaky.fetch.remote()) == 3
    with pytest.raises(KeyError):
        minray.get(flaky.other.remote())
    assert minray.get(flaky.count.remote()) == 4


def test_a_constructor_that_crashes_is_tried_as_often_as_restarts_allow(tmp_path: Path) -> None:
    @minray.remote(max_restarts=1)
    class Crashing:
        def __init__(self, path: str) -> None:
            with open(path, "a") as file:
                file.write("x")
            if len(Path(path).read_text()) < 2 or "always" in path:
                os.kill(os.getpid(), signal.SIGKILL)

        def hello(self) -> str:
            return "hello"

    assert minray.get(Crashing.remote(str(tmp_path / "once")).hello.remote(), timeout=60) == "hello"
    with pytest.raises(ActorDiedError, match=r"SIGKILL while running Crashing\.__init__"):
        minray.get(Crashing.remote(str(tmp_path / "always")).hello.remote(), timeout=60)
    assert (tmp_path / "always").read_text() == "xx"


def test_a_constructor_argument_is_there_for_the_restart_though_nobody_else_has_it() -> None:
    @minray.remote(max_restarts=1)
    class Holder:
        def __init__(self, array: Any) -> None:
            self.total = float(array.sum())

        def crash(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def get(self) -> float:
            return self.total

    holder = Holder.remote(minray.put(np.ones(100_000)))
    assert minray.get(holder.get.remote()) == 100_000
    holder.crash.remote()
    assert minray.get(holder.get.options(max_task_retries=1).remote()) == 100_000


# ---------------------------------------------------------------- names


def test_a_named_actor_is_found_by_its_name_from_everywhere_and_the_name_is_free_again_after_its_death() -> None:
    counter = Counter.options(name="one").remote()
    assert minray.get_actor("one") == counter

    @minray.remote
    def use(name: str) -> int:
        return minray.get(minray.get_actor(name).add.remote())

    assert minray.get(use.remote("one")) == 1
    with pytest.raises(ValueError, match="'one' is taken.*get_if_exists"):
        Counter.options(name="one").remote()
    with pytest.raises(ValueError, match="no live actor named 'one' in namespace 'other'"):
        minray.get_actor("one", namespace="other")
    minray.kill(counter)
    with pytest.raises(ValueError):
        minray.get_actor("one")
    assert minray.get(Counter.options(name="one").remote(7).add.remote()) == 8
    with pytest.raises(ValueError, match="no live actor"):
        minray.get_actor("one")  # That one's last handle has gone.


def test_looking_an_actor_up_does_not_keep_it() -> None:
    counter = Counter.options(name="looked up").remote()
    pid = minray.get(counter.pid.remote())
    for _ in range(3):
        minray.get_actor("looked up")
    again = minray.get_actor("looked up")
    del counter, again
    assert has_ended(pid)


def test_one_name_may_be_in_each_namespace() -> None:
    here = Counter.options(name="same").remote(0)
    there = Counter.options(name="same", namespace="there").remote(10)
    assert minray.get(minray.get_actor("same").add.remote()) == 1
    assert minray.get(minray.get_actor("same", namespace="there").add.remote()) == 11
    assert here != there


def test_get_if_exists_makes_one_actor_however_many_ask_at_once() -> None:
    @minray.remote(num_cpus=0)
    def join(gate_handle: Any) -> Any:
        counter = Counter.options(name="shared", get_if_exists=True).remote()
        minray.get(counter.add.remote())
        return [counter]

    keep = [minray.get(ref)[0] for ref in [join.remote(None) for _ in range(6)]]
    assert len(set(keep)) == 1
    assert minray.get(keep[0].add.remote()) == 7
    assert Counter.options(name="shared", get_if_exists=True).remote() == keep[0]
    with pytest.raises(ValueError, match="needs name="):
        Counter.options(get_if_exists=True).remote()


def test_a_name_stays_with_an_actor_that_is_restarted(tmp_path: Path) -> None:
    counter = Counter.options(name="phoenix", max_restarts=1, max_task_retries=1).remote()
    minray.get(counter.crash_once.remote(str(tmp_path / "crashed")))
    assert minray.get(minray.get_actor("phoenix").was_reconstructed.remote())


def test_a_detached_actor_outlives_its_handles() -> None:
    @minray.remote
    def make() -> None:
        Counter.options(name="detached", lifetime="detached").remote(41)

    minray.get(make.remote())
    gc.collect()
    counter = minray.get_actor("detached")
    assert minray.get(counter.add.remote()) == 42
    pid = minray.get(counter.pid.remote())
    del counter
    minray.kill(minray.get_actor("detached"))
    assert has_ended(pid)


# ---------------------------------------------------------------- concurrency


@minray.remote(max_concurrency=3)
class Threads:
    def __init__(self) -> None:
        self.barrier = threading.Barrier(3)

    def meet(self) -> int:
        self.barrier.wait(timeout=60)
        return threading.get_ident()

    def nested(self, x: int) -> int:
        return int(minray.get(double.remote(x)))

    def wait_at(self, gate: Gate) -> None:
        gate.wait()

    def pass_both(self, begun: Gate, gate: Gate) -> str:
        begun.wait()
        gate.wait()
        return "passed"

    def leave(self) -> None:
        minray.exit_actor()

    def pid(self) -> int:
        return os.getpid()


@minray.remote
def double(x: int) -> int:
    return 2 * x


def test_methods_of_an_actor_with_threads_run_at_the_same_time_and_may_wait() -> None:
    threads = Threads.remote()
    assert len(set(minray.get([threads.meet.remote() for _ in range(3)]))) == 3
    assert minray.get([threads.nested.remote(x) for x in range(20)]) == [2 * x for x in range(20)]


@pytest.mark.parametrize("how", ["leave", "__ray_terminate__"])
def test_an_actor_with_threads_that_leaves_lets_those_finish_that_have_begun(gate: Gate, tmp_path: Path, how: str) -> None:
    threads, begun = Threads.options(max_concurrency=2).remote(), Gate(tmp_path / "begun")
    pid = minray.get(threads.pid.remote())
    waiting = threads.pass_both.remote(begun, gate)
    begun.open()
    leaving = getattr(threads, how).remote()
    later = threads.pid.remote()
    assert minray.wait([leaving], timeout=0.1) == ([], [leaving])
    gate.open()
    assert minray.get(waiting) == "passed"
    with pytest.raises(ActorDiedError):
        minray.get(leaving)
    with pytest.raises(ActorDiedError, match="was not run"):
        minray.get(later)
    assert has_ended(pid)


def test_an_actor_with_threads_is_killed_though_one_of_them_stands_still(gate: Gate) -> None:
    threads = Threads.remote()
    pid = minray.get(threads.pid.remote())
    waiting = threads.wait_at.remote(gate)
    minray.kill(threads)
    with pytest.raises(ActorDiedError, match="may have run partway"):
        minray.get(waiting)
    assert has_ended(pid)


def test_a_queued_call_can_be_cancelled_and_a_running_one_goes_on(gate: Gate, tmp_path: Path) -> None:
    counter, begun = Counter.remote(), Gate(tmp_path / "begun")

    def pass_both(self: Any) -> int:
        begun.wait()
        gate.wait()
        return int(self.n)

    running = counter.__ray_call__.remote(pass_both)
    queued, later = counter.add.remote(100), counter.add.remote(1)
    begun.open()
    minray.cancel(queued)
    minray.cancel(running)
    with pytest.raises(TaskCancelledError):
        minray.get(queued, timeout=60)
    gate.open()
    assert minray.get([running, later]) == [0, 1]


def test_a_call_is_not_cancelled_by_force(gate: Gate) -> None:
    counter = Counter.remote()
    call = counter.wait_at.remote(gate)
    with pytest.raises(ValueError, match=r"would end the actor.*minray\.kill"):
        minray.cancel(call, force=True)

    @minray.remote
    def force(refs: list[Any]) -> str:
        try:
            minray.cancel(refs[0], force=True)
        except ValueError:
            return "refused"
        return "done"

    assert minray.get(force.remote([call])) == "refused"
    gate.open()
    assert minray.get(call) == 0


def test_an_actor_takes_no_more_pending_calls_than_it_allows(gate: Gate) -> None:
    counter = Counter.options(max_pending_calls=2).remote()
    assert minray.get([counter.add.remote(), counter.add.remote()]) == [1, 2]
    first, second = counter.wait_at.remote(gate), counter.add.remote()
    with pytest.raises(PendingCallsLimitExceeded, match=r"add\(\) was not submitted.*max_pending_calls=2"):
        counter.add.remote()
    gate.open()
    assert minray.get([first, second]) == [2, 3]
    assert minray.get(counter.add.remote()) == 4

    @minray.remote
    def overdo(counter: Any, gate: Gate) -> str:
        waiting = [counter.wait_at.remote(gate), counter.add.remote()]
        try:
            counter.add.remote()
        except PendingCallsLimitExceeded:
            gate.open()
            return f"refused after {minray.get(waiting)}"
        return "accepted"

    assert minray.get(overdo.remote(counter, gate), timeout=60) == "refused after [4, 5]"


# ---------------------------------------------------------------- among themselves


def test_actors_make_actors_and_call_each_other() -> None:
    @minray.remote
    class Player:
        def __init__(self) -> None:
            self.other: Any = None

        def meet(self, other: Any) -> None:
            self.other = other

        def make(self) -> Any:
            return Player.remote()

        def ping(self, n: int) -> int:
            return n if n == 0 else 1 + minray.get(self.other.pong.remote(n - 1))

        def pong(self, n: int) -> int:
            return n

    one = Player.remote()
    two = minray.get(one.make.remote())
    minray.get([one.meet.remote(two), two.meet.remote(one)])
    assert minray.get(one.ping.remote(3)) == 3
    assert minray.get(two.ping.remote(5)) == 5


def test_current_actor_is_a_handle_like_any_other() -> None:
    counter = Counter.options(max_task_retries=3, max_pending_calls=9).remote()
    me = minray.get(counter.me.remote())
    assert me == counter
    assert me._minray_interface.max_task_retries == 3 and me._minray_interface.max_pending_calls == 9
    with pytest.raises(RuntimeError, match="not an actor"):
        _ = minray.get_runtime_context().current_actor


def test_an_actor_holds_its_resources_while_it_lives() -> None:
    def free_cpus() -> float:
        return float(minray.available_resources().get("CPU", 0))

    assert free_cpus() == 2
    counter = Counter.options(num_cpus=1.5).remote()
    minray.get(counter.add.remote())
    assert free_cpus() == 0.5
    second = Counter.options(num_cpus=1).remote()
    call = second.add.remote()
    with pytest.raises(GetTimeoutError):
        minray.get(call, timeout=0.05)
    minray.kill(counter)
    assert minray.get(call, timeout=60) == 1
    assert free_cpus() == 1
    minray.kill(second)
    assert free_cpus() == 2


def test_an_actor_that_waits_lends_its_cpus() -> None:
    @minray.remote(num_cpus=2)
    class Boss:
        def work(self) -> int:
            return int(minray.get(double.options(num_cpus=2).remote(21)))

    boss = Boss.remote()
    assert minray.get(boss.work.remote(), timeout=60) == 42


def test_a_hundred_actors_live_in_one_session() -> None:
    counters = [Counter.remote(n) for n in range(100)]
    assert minray.get([counter.add.remote() for counter in counters]) == list(range(1, 101))
    pids = minray.get([counter.pid.remote() for counter in counters])
    assert len(set(pids)) == 100
    del counters
    assert all(has_ended(pid) for pid in pids)
    node = minray.api.core().node
    assert not node.actors.names and len(node.actors.actors) < 10 and len(node.lineage.tasks) < 10
