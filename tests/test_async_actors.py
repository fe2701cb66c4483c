"""Actors with coroutine methods, and concurrency groups: what a program sees of them.

What calls wait for is a gate in the actor itself: `pass_gate` waits at it, `open_gate` opens it.
"""

from __future__ import annotations

import asyncio
import functools
import os
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import minray
from minray import ids
from minray.exceptions import ActorDiedError, ActorUnavailableError, RayTaskError, TaskCancelledError

pytestmark = pytest.mark.usefixtures("module_session")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SOON_S = 20.0
"""Nothing here takes so long, on a busy machine either."""


@minray.remote
def add(a: int, b: int) -> int:
    return a + b


@minray.remote
def fails() -> None:
    raise KeyError("no such key")


class Base:
    def __init__(self) -> None:
        self.gate = asyncio.Event()
        self.inside: list[Any] = []
        self.most = 0

    async def pass_gate(self, name: Any = None) -> Any:
        self.inside.append(name)
        self.most = max(self.most, len(self.inside))
        try:
            await self.gate.wait()
        finally:
            self.inside.remove(name)
        return name

    def open_gate(self) -> None:
        self.gate.set()

    def who_is_inside(self) -> list[Any]:
        return list(self.inside)

    async def wait_until_inside(self, count: int) -> list[Any]:
        while len(self.inside) < count:
            await asyncio.sleep(0.001)
        return list(self.inside)

    def most_at_once(self) -> int:
        return self.most

    async def pid(self) -> int:
        return os.getpid()


Gates = minray.remote(Base)


def get(refs: Any) -> Any:
    return minray.get(refs, timeout=SOON_S)


# ---------------------------------------------------------------- calls


def test_coroutine_methods_run_at_the_same_time_in_one_thread() -> None:
    class Meeting(Base):
        async def meet(self) -> int:
            self.most += 1
            if self.most == 100:
                self.gate.set()
            await self.gate.wait()
            return threading.get_ident()

    meeting = minray.remote(Meeting).remote()
    assert len(set(get([meeting.meet.remote() for _ in range(100)]))) == 1


def test_plain_methods_run_between_the_awaits_of_coroutines() -> None:
    actor = Gates.remote()
    waiting = actor.pass_gate.remote("a")
    assert get(actor.who_is_inside.remote()) == ["a"]
    actor.open_gate.remote()
    assert get(waiting) == "a"


def test_calls_of_one_caller_begin_in_the_order_of_submission() -> None:
    class Order:
        def __init__(self) -> None:
            self.seen: list[int] = []

        async def plain_or_not(self, n: int) -> None:
            self.seen.append(n)
            await asyncio.sleep(0)

        def plain(self, n: int) -> None:
            self.seen.append(n)

        def all(self) -> list[int]:
            return self.seen

    order = minray.remote(Order).remote()
    for n in range(300):
        (order.plain if n % 3 else order.plain_or_not).remote(n)
    assert get(order.all.remote()) == list(range(300))


def test_so_many_calls_run_at_the_same_time_as_are_allowed_and_a_thousand_without_a_word() -> None:
    class Crowd(Base):
        async def pass_together(self, count: int) -> None:
            self.most += 1
            if self.most == count:
                self.gate.set()
            await self.gate.wait()

    crowd = minray.remote(Crowd)
    wide = crowd.remote()
    get([wide.pass_together.remote(1000) for _ in range(1000)])
    too_many = crowd.remote()
    refs = [too_many.pass_together.remote(1001) for _ in range(1001)]
    assert minray.wait(refs, timeout=0.3)[0] == []
    minray.cancel(refs[0])
    get(refs[1:])
    wider = crowd.options(max_concurrency=2500).remote()
    get([wider.pass_together.remote(2500) for _ in range(2500)])


def test_a_narrow_actor_never_runs_more_than_it_allows() -> None:
    class Narrow(Base):
        async def work(self) -> None:
            self.inside.append(None)
            self.most = max(self.most, len(self.inside))
            await asyncio.sleep(0.001)
            self.inside.pop()

    narrow = minray.remote(Narrow).options(max_concurrency=3).remote()
    get([narrow.work.remote() for _ in range(50)])
    assert get(narrow.most_at_once.remote()) == 3


def test_the_loop_runs_in_the_constructor_and_a_constructor_may_be_a_coroutine() -> None:
    class Plain:
        def __init__(self) -> None:
            self.loop = asyncio.get_running_loop()
            self.task = asyncio.create_task(self.count())

        async def count(self) -> int:
            await asyncio.sleep(0)
            return 7

        async def result(self) -> bool:
            return asyncio.get_running_loop() is self.loop and await self.task == 7

    class Coroutine:
        async def __init__(self, x: int) -> None:  # type: ignore[misc]
            self.x = await add.remote(x, 1)

        def get_x(self) -> int:
            return self.x

    assert get(minray.remote(Plain).remote().result.remote()) is True
    assert get(minray.remote(Coroutine).remote(2).get_x.remote()) == 3


def test_a_constructor_that_raises_is_told_as_ever() -> None:
    class Broken(Base):
        def __init__(self) -> None:
            raise ValueError("no such disk")

    with pytest.raises(ActorDiedError, match="no such disk"):
        get(minray.remote(Broken).remote().pid.remote())


def test_errors_results_and_several_returns_come_home() -> None:
    class Various:
        async def fail(self) -> None:
            await asyncio.sleep(0)
            raise ValueError("no")

        def fail_plainly(self) -> None:
            raise ValueError("plainly no")

        @minray.method(num_returns=2)
        async def two(self) -> tuple[int, int]:
            return 1, 2

        async def large(self) -> bytes:
            return bytes(1 << 20)

        async def unpicklable(self) -> Any:
            return threading.Lock()

        async def leaves_python(self) -> None:
            sys.exit(3)

        async def inner_is_cancelled(self) -> None:
            task = asyncio.create_task(asyncio.sleep(60))
            task.cancel()
            await task

    various = minray.remote(Various).remote()
    for method, text in ((various.fail, "no"), (various.fail_plainly, "plainly no")):
        with pytest.raises(ValueError, match=text) as caught:
            get(method.remote())
        assert isinstance(caught.value, RayTaskError) and "IndexError" not in str(caught.value)
    one, two = various.two.remote()
    assert get([one, two]) == [1, 2]
    assert get(various.large.remote()) == bytes(1 << 20)
    with pytest.raises(TypeError, match="lock"):
        get(various.unpicklable.remote())
    with pytest.raises(RayTaskError, match="SystemExit: 3"):
        get(various.leaves_python.remote())
    with pytest.raises(TaskCancelledError):
        get(various.inner_is_cancelled.remote())
    assert get(various.two.options(num_returns=1).remote()) == (1, 2)


def test_built_in_methods_work_and_what_they_call_may_be_a_coroutine() -> None:
    actor = Gates.remote()
    assert get(actor.__ray_ready__.remote()) is True

    async def look(self: Any, x: int) -> list[Any]:
        await asyncio.sleep(0)
        return [x, *self.inside]

    assert get(actor.__ray_call__.remote(look, 1)) == [1]
    assert get(actor.__ray_call__.remote(lambda self: self.most)) == 0


def test_what_makes_an_asyncio_actor_may_be_inherited_static_or_wrapped() -> None:
    def traced(function: Any) -> Any:
        @functools.wraps(function)
        def call(*args: Any) -> Any:
            return function(*args)

        return call

    class Wrapped:
        @traced
        async def loop(self) -> bool:
            return asyncio.get_running_loop().is_running()

    class Static:
        @staticmethod
        async def loop() -> bool:
            return asyncio.get_running_loop().is_running()

    class Heir(Static): ...

    for cls in (Wrapped, Static, Heir):
        assert get(minray.remote(cls).remote().loop.remote()) is True


def test_a_result_does_not_wait_for_what_computes_next(tmp_path: Path) -> None:
    class Busy:
        async def quick(self) -> float:
            return time.time()

        def long(self, until: str) -> bool:
            deadline = time.monotonic() + SOON_S
            while not os.path.exists(until) and time.monotonic() < deadline:
                time.sleep(0.001)
            return time.monotonic() < deadline

    busy, seen = minray.remote(Busy).remote(), tmp_path / "seen"
    quick, long = busy.quick.remote(), busy.long.remote(str(seen))
    get(quick)
    seen.touch()
    assert get(long)


# ---------------------------------------------------------------- what coroutines do with refs


def test_refs_are_awaited_gathered_and_waited_for() -> None:
    class Consumer:
        async def all_ways(self) -> list[Any]:
            found: list[Any] = [await add.remote(1, 1)]
            found.append(await asyncio.gather(*[add.remote(n, n) for n in range(20)]))
            done, pending = await asyncio.wait([add.remote(2, 2).as_future(), add.remote(3, 3).as_future()])
            found.append(sorted(future.result() for future in done))
            found.append(sorted([await future for future in asyncio.as_completed([add.remote(n, 1) for n in (1, 2)])]))
            found.append(await asyncio.wait_for(add.remote(5, 5), SOON_S))
            found.append(await minray.put("put"))
            return found

        async def failing(self) -> str:
            try:
                await fails.remote()
            except KeyError as error:
                return str(error.args[0] if error.args else error)
            return "nothing"

        async def too_late(self, gate: Any) -> str:
            try:
                await asyncio.wait_for(gate.pass_gate.remote(), 0.01)
            except asyncio.TimeoutError:
                return "too late"
            return "in time"

    consumer, gate = minray.remote(Consumer).remote(), Gates.remote()
    expected = [2, [2 * n for n in range(20)], [4, 6], [2, 3], 10, "put"]
    assert get(consumer.all_ways.remote()) == expected
    assert "no such key" in get(consumer.failing.remote())
    assert get(consumer.too_late.remote(gate)) == "too late"
    get(gate.open_gate.remote())


def test_actors_call_each_other_and_themselves_without_standing_still() -> None:
    class Peer:
        def __init__(self) -> None:
            self.other: Any = None

        def meet(self, other: Any) -> None:
            self.other = other

        async def bounce(self, n: int) -> int:
            return 0 if n == 0 else 1 + await self.other.bounce.remote(n - 1)

        async def to_myself(self, n: int) -> int:
            me = minray.get_runtime_context().current_actor
            return 0 if n == 0 else 1 + await me.to_myself.remote(n - 1)

    one, two = minray.remote(Peer).remote(), minray.remote(Peer).remote()
    get([one.meet.remote(two), two.meet.remote(one)])
    assert get(one.bounce.remote(20)) == 20
    assert get(one.to_myself.remote(20)) == 20


def test_get_in_a_coroutine_works_and_is_warned_of_once(capfd: pytest.CaptureFixture[str]) -> None:
    class Blocking:
        async def block(self) -> int:
            minray.wait([add.remote(0, 0)])
            return int(minray.get(add.remote(1, 2)))

        async def in_a_thread(self) -> int:
            return int(await asyncio.to_thread(lambda: minray.get(add.remote(2, 2))))

    blocking = minray.remote(Blocking).remote()
    assert get([blocking.in_a_thread.remote() for _ in range(3)]) == [4, 4, 4]
    assert get([blocking.block.remote() for _ in range(3)]) == [3, 3, 3]
    minray.kill(blocking)
    told = ""
    deadline = time.monotonic() + SOON_S
    while "blocks its event loop" not in told and time.monotonic() < deadline:
        told += capfd.readouterr().err
    assert told.count("blocks its event loop") == 1 and "asyncio actor Blocking" in told


def test_threads_of_an_actor_get_while_its_loop_goes_on() -> None:
    class Mixed(Base):
        async def get_in_thread(self) -> int:
            loop = asyncio.get_running_loop()
            me = minray.get_runtime_context().current_actor
            with ThreadPoolExecutor(4) as threads:
                refs = [me.pass_gate.remote(n) for n in range(4)]
                waiting = [loop.run_in_executor(threads, minray.get, ref) for ref in refs]
                while len(self.inside) < 4:
                    await asyncio.sleep(0)
                self.gate.set()
                return sum(await asyncio.gather(*waiting))

    assert get(minray.remote(Mixed).remote().get_in_thread.remote()) == 6


def test_each_call_has_a_context_of_its_own_however_they_interleave() -> None:
    class Contexts:
        async def look(self) -> tuple[Any, ...]:
            context = minray.get_runtime_context()
            before = context.get_task_id()
            ref = add.remote(1, 1)
            await ref
            await asyncio.sleep(0.001)
            in_thread = await asyncio.to_thread(lambda: minray.get_runtime_context().get_task_id())
            in_task = await asyncio.create_task(self.inner())
            after = minray.get_runtime_context().get_task_id()
            return before, after, in_thread, in_task, ref.hex(), add.remote(2, 2).hex(), context.get_task_name()

        async def inner(self) -> Any:
            return minray.get_runtime_context().get_task_id()

    contexts = minray.remote(Contexts).remote()
    refs = [contexts.look.remote() for _ in range(10)]
    for ref, (before, after, in_thread, in_task, first, second, name) in zip(refs, get(refs), strict=True):
        assert before == after == in_thread == in_task == ref.hex()
        assert name == "Contexts.look"
        prefix = ids.children_prefix(bytes.fromhex(before))
        assert [first, second] == [ids.pack_id(prefix, n, 0).hex() for n in (1, 2)]


def test_await_without_a_loop_says_so() -> None:
    ref = add.remote(1, 1)

    async def waits() -> Any:
        return await ref

    coroutine = waits()
    with pytest.raises(RuntimeError, match=r"need a running event loop of asyncio.*minray\.get"):
        coroutine.send(None)
    with pytest.raises(RuntimeError, match="running event loop"):
        ref.as_future()


# ---------------------------------------------------------------- concurrency groups


class Grouped(Base):
    @minray.method(concurrency_group="io")
    async def read(self, name: Any) -> Any:
        return await self.pass_gate(name)

    @minray.method(concurrency_group="compute")
    async def work(self, name: Any) -> Any:
        return await self.pass_gate(name)


def test_each_concurrency_group_runs_as_many_as_it_allows_in_order() -> None:
    actor = minray.remote(concurrency_groups={"io": 2, "compute": 1})(Grouped).remote()
    refs = [actor.read.remote(f"io{n}") for n in range(5)] + [actor.work.remote(f"compute{n}") for n in range(3)]
    refs.append(actor.pass_gate.options(concurrency_group="io").remote("io5"))
    assert get(actor.wait_until_inside.remote(3)) == ["io0", "io1", "compute0"]
    get(actor.open_gate.remote())
    assert get(refs) == ["io0", "io1", "io2", "io3", "io4", "compute0", "compute1", "compute2", "io5"]


def test_a_full_group_holds_up_no_other() -> None:
    actor = minray.remote(concurrency_groups={"io": 1})(Base).remote()
    full = [actor.pass_gate.options(concurrency_group="io").remote(n) for n in range(1500)]
    assert get(actor.wait_until_inside.remote(1)) == [0]
    get(actor.open_gate.remote())
    assert get(full) == list(range(1500))


def test_groups_of_an_actor_with_plain_methods_are_threads() -> None:
    class Plain:
        def __init__(self) -> None:
            self.met = threading.Barrier(2)
            self.open = threading.Event()
            self.alone = threading.Lock()

        @minray.method(concurrency_group="io")
        def meet(self) -> str:
            self.met.wait(SOON_S)
            return threading.current_thread().name

        def wait(self) -> bool:
            with self.alone:
                return self.open.wait(SOON_S)

        def alone_in_default(self) -> bool:
            return self.alone.locked()

        @minray.method(concurrency_group="one")
        def let_go(self) -> None:
            self.open.set()

    plain = minray.remote(Plain).options(concurrency_groups={"io": 2, "one": 1}).remote()
    waiting, behind = plain.wait.remote(), plain.alone_in_default.remote()
    assert all(name.startswith("minray-actor-io") for name in get([plain.meet.remote() for _ in range(2)]))
    assert minray.wait([behind], timeout=0.05)[0] == []
    plain.let_go.remote()
    assert get([waiting, behind]) == [True, False]


def test_a_group_that_there_is_not_is_refused_with_those_that_there_are() -> None:
    with pytest.raises(ValueError, match=r"Grouped\.read\(\).*'io'.*does not have\. It has 'compute'\."):
        minray.remote(concurrency_groups={"compute": 1})(Grouped).remote()
    with pytest.raises(ValueError, match=r"It has none\."):
        minray.remote(Grouped).remote()
    actor = Gates.options(concurrency_groups={"io": 1}).remote()
    with pytest.raises(ValueError, match=r"pass_gate\(\).*'oi'.*It has 'io'\."):
        actor.pass_gate.options(concurrency_group="oi")
    with pytest.raises(TypeError, match="concurrency_group"):
        add.options(concurrency_group="io")


def test_calls_at_the_same_time_do_not_go_with_exact_recovery() -> None:
    with pytest.raises(ValueError, match="on a class with coroutine methods.*no order"):
        minray.remote(checkpoint_every=1)(Base)

    class Plain: ...

    with pytest.raises(ValueError, match=r"concurrency_groups=\.\.\..*no order"):
        minray.remote(checkpoint_every=1, concurrency_groups={"io": 1})(Plain)


# ---------------------------------------------------------------- the end


@pytest.mark.parametrize("how", ["exit in a coroutine", "exit in a plain method", "__ray_terminate__"])
def test_an_actor_that_exits_lets_those_finish_that_have_begun(how: str, tmp_path: Path) -> None:
    class Leaves(Base):
        async def leave(self) -> None:
            minray.exit_actor()

        def leave_plainly(self) -> None:
            minray.exit_actor()

        async def nothing(self) -> None: ...

        def __ray_shutdown__(self) -> None:
            (tmp_path / "last word").touch()

    actor = minray.remote(Leaves).options(max_concurrency=3, concurrency_groups={"io": 1}).remote()
    begun = actor.pass_gate.remote("a")
    io = actor.pass_gate.options(concurrency_group="io")
    second, waiting = io.remote("b"), io.remote("c")
    assert get(actor.wait_until_inside.remote(2)) == ["a", "b"]
    end = {"exit in a coroutine": "leave", "exit in a plain method": "leave_plainly"}.get(how, how)
    leaving = getattr(actor, end).remote()
    assert minray.wait([leaving], timeout=0.05)[0] == []
    later = actor.nothing.remote()
    minray.cancel(begun)
    minray.cancel(second)
    for ref in (begun, second):
        with pytest.raises(TaskCancelledError):
            get(ref)
    if how == "__ray_terminate__":
        minray.cancel(waiting)
        with pytest.raises(TaskCancelledError):
            get(waiting)
    else:
        with pytest.raises(ActorDiedError, match="was not run"):
            get(waiting)
    with pytest.raises(ActorDiedError):
        get(leaving)
    with pytest.raises(ActorDiedError, match="was not run"):
        get(later)
    deadline = time.monotonic() + SOON_S
    while not (tmp_path / "last word").exists():
        assert time.monotonic() < deadline


def test_what_has_begun_returns_before_the_actor_exits() -> None:
    class Leaves:
        async def slow(self) -> str:
            await asyncio.sleep(0.05)
            return "done"

        async def leave(self) -> None:
            minray.exit_actor()

    actor = minray.remote(Leaves).remote()
    slow, leaving = actor.slow.remote(), actor.leave.remote()
    assert get(slow) == "done"
    with pytest.raises(ActorDiedError, match=r"exit_actor\(\)"):
        get(leaving)


def test_background_tasks_are_cancelled_at_the_end_of_their_actor(tmp_path: Path) -> None:
    class Background:
        def __init__(self) -> None:
            self.task = asyncio.create_task(self.forever())

        async def forever(self) -> None:
            try:
                await asyncio.sleep(600)
            finally:
                (tmp_path / "cleaned").touch()

        async def nothing(self) -> None: ...

        async def __ray_shutdown__(self) -> None:
            await asyncio.sleep(0)
            (tmp_path / "last word").touch()

    actor = minray.remote(Background).remote()
    get(actor.nothing.remote())
    del actor
    deadline = time.monotonic() + SOON_S
    while not (tmp_path / "last word").exists():
        assert time.monotonic() < deadline
    assert (tmp_path / "cleaned").exists()


def test_kill_and_crashes_tell_that_calls_may_have_run(tmp_path: Path) -> None:
    class Crashes(Base):
        async def crash(self) -> None:
            os._exit(1)

        async def crash_once(self, path: str) -> str:
            if not os.path.exists(path):
                open(path, "w").close()
                os._exit(1)
            return "done"

        def was_reconstructed(self) -> bool:
            return minray.get_runtime_context().was_current_actor_reconstructed

    actor = minray.remote(Crashes).remote()
    waiting = actor.pass_gate.remote()
    get(actor.wait_until_inside.remote(1))
    minray.kill(actor)
    with pytest.raises(ActorDiedError, match="may have run partway"):
        get(waiting)
    actor = minray.remote(Crashes).options(max_restarts=1).remote()
    waiting, crash = actor.pass_gate.remote(), actor.crash.remote()
    for ref in (waiting, crash):
        with pytest.raises(ActorUnavailableError, match="may have run"):
            get(ref)
    assert get(actor.was_reconstructed.remote()) is True
    actor = minray.remote(Crashes).options(max_restarts=1, max_task_retries=1).remote()
    waiting, crash = actor.pass_gate.remote("a"), actor.crash_once.remote(str(tmp_path / "crashed"))
    assert get(crash) == "done"
    get(actor.open_gate.remote())
    assert get(waiting) == "a"


def test_exit_in_a_callback_of_the_loop_does_not_end_the_actor() -> None:
    class Callback(Base):
        async def exit_soon(self) -> None:
            asyncio.get_running_loop().call_soon(sys.exit, 3)
            await asyncio.sleep(0.01)

        async def stop(self) -> None:
            asyncio.get_running_loop().stop()
            await asyncio.sleep(0)

    callback = minray.remote(Callback).remote()
    assert get([callback.exit_soon.remote(), callback.stop.remote()]) == [None, None]
    assert get(callback.who_is_inside.remote()) == []
