"""cancel() on calls of actors, is_canceled(), and what force does: as a program sees it.

Tasks that are cancelled in a queue, while they run, and with their children: see test_tasks.py.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import pytest

import minray
from minray.exceptions import TaskCancelledError, WorkerCrashedError

pytestmark = pytest.mark.usefixtures("module_session")
cloudpickle.register_pickle_by_value(sys.modules[__name__])

SOON_S = 20.0
"""Nothing here takes so long, on a busy machine either."""


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + SOON_S
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, f"{paths} did not come"
        time.sleep(0.002)


def get(refs: Any) -> Any:
    return minray.get(refs, timeout=SOON_S)


def assert_cancelled(ref: Any, match: str = "was cancelled") -> None:
    with pytest.raises(TaskCancelledError, match=match):
        get(ref)


@minray.remote
class Coroutines:
    """Coroutines that touch a file when they have begun, and another one when they end."""

    async def nothing(self) -> str:
        return "nothing"

    async def sleep(self, begun: Path, ended: Path | None = None) -> None:
        begun.touch()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            if ended is not None:
                ended.touch()
            raise

    async def hold_fast(self, begun: Path) -> str:
        begun.touch()
        try:
            await asyncio.sleep(600)
        except asyncio.CancelledError:
            await asyncio.sleep(0)
            return "put away my tools"
        return "slept"

    async def wait_for_ref(self, begun: Path, refs: list[Any]) -> Any:
        begun.touch()
        return await refs[0]

    async def child(self, child_begun: Path, other: Any) -> Any:
        return await other.sleep.remote(child_begun)

    async def child_task(self, child_begun: Path, ended: Path) -> Any:
        return await sleeping_task.remote(child_begun, ended)

    async def asks(self) -> bool:
        return minray.get_runtime_context().is_canceled()


class Plain:
    def nothing(self) -> str:
        return "nothing"

    def until_cancelled(self, begun: Path) -> str:
        begun.touch()
        deadline = time.monotonic() + SOON_S
        while not minray.get_runtime_context().is_canceled():
            assert time.monotonic() < deadline
            time.sleep(0.001)
        return "stopped where I was told to"

    def until(self, begun: Path, go: Path) -> bool:
        begun.touch()
        wait_for(go)
        return minray.get_runtime_context().is_canceled()

    def touch(self, path: Path) -> None:
        path.touch()


Actor = minray.remote(Plain)


@minray.remote
def sleeping_task(begun: Path, ended: Path) -> None:
    try:
        begun.touch()
        time.sleep(600)
    except KeyboardInterrupt:
        ended.touch()
        raise


# ---------------------------------------------------------------- asyncio actors


def test_a_coroutine_that_runs_is_cancelled_where_it_awaits_and_others_go_on(tmp_path: Path) -> None:
    actor = Coroutines.remote()
    begun, other, ended = tmp_path / "begun", tmp_path / "other", tmp_path / "ended"
    ref, goes_on = actor.sleep.remote(begun, ended), actor.hold_fast.remote(other)
    wait_for(begun, other)
    minray.cancel(ref)
    assert_cancelled(ref, "may have run partway")
    assert ended.exists()
    assert minray.wait([goes_on], timeout=0)[0] == []
    minray.cancel(goes_on)
    assert get(goes_on) == "put away my tools"
    assert get(actor.nothing.remote()) == "nothing"


def test_a_coroutine_that_awaits_a_ref_is_cancelled(tmp_path: Path) -> None:
    actor, never = Coroutines.remote(), Coroutines.remote()
    pending = never.sleep.remote(tmp_path / "never")
    ref = actor.wait_for_ref.remote(tmp_path / "begun", [pending])
    wait_for(tmp_path / "begun", tmp_path / "never")
    minray.cancel(ref)
    assert_cancelled(ref)
    assert minray.wait([pending], timeout=0)[0] == []
    minray.cancel(pending)
    assert_cancelled(pending)


def test_a_call_that_waits_for_its_turn_in_an_asyncio_actor_never_runs(tmp_path: Path) -> None:
    actor = Coroutines.options(max_concurrency=1).remote()
    begun, queued = tmp_path / "begun", tmp_path / "queued"
    first, second, third = actor.sleep.remote(begun), actor.sleep.remote(queued), actor.nothing.remote()
    wait_for(begun)
    minray.cancel(second)
    assert_cancelled(second, "had not started")
    minray.cancel(first)
    assert_cancelled(first)
    assert get(third) == "nothing"
    assert not queued.exists()


def test_calls_are_cancelled_at_any_moment_and_the_actor_stays_whole(tmp_path: Path) -> None:
    actor = Coroutines.options(max_concurrency=5).remote()
    for n in range(60):
        refs = [actor.nothing.remote(), actor.sleep.remote(tmp_path / str(n)), actor.nothing.remote()]
        if n % 3 == 0:
            wait_for(tmp_path / str(n))
        for ref in refs:
            minray.cancel(ref)
        assert_cancelled(refs[1])
        for ref in (refs[0], refs[2]):
            try:
                assert get(ref) == "nothing"
            except TaskCancelledError:
                pass
    assert get([actor.nothing.remote() for _ in range(10)]) == ["nothing"] * 10


@pytest.mark.parametrize("recursive", [True, False])
def test_children_of_a_coroutine_are_cancelled_only_if_recursive(tmp_path: Path, recursive: bool) -> None:
    actor, other = Coroutines.remote(), Coroutines.remote()
    call, task, ended = tmp_path / "call", tmp_path / "task", tmp_path / "ended"
    refs = [actor.child.remote(call, other), actor.child_task.remote(task, ended)]
    wait_for(call, task)
    for ref in refs:
        minray.cancel(ref, recursive=recursive)
        assert_cancelled(ref)
    if recursive:
        wait_for(ended)
        return
    time.sleep(0.05)
    assert not ended.exists()


def test_a_cancelled_call_is_not_retried(tmp_path: Path) -> None:
    actor = Coroutines.options(max_restarts=1, max_task_retries=5).remote()
    begun = tmp_path / "begun"
    ref = actor.sleep.remote(begun)
    wait_for(begun)
    begun.unlink()
    minray.cancel(ref)
    assert_cancelled(ref)
    assert get(actor.nothing.remote()) == "nothing"
    assert not begun.exists()


# ---------------------------------------------------------------- plain and threaded actors


@pytest.mark.parametrize("threads", [1, 2])
def test_a_plain_method_is_not_interrupted_but_may_ask(tmp_path: Path, threads: int) -> None:
    actor = Actor.options(max_concurrency=threads).remote()
    ref = actor.until_cancelled.remote(tmp_path / "begun")
    wait_for(tmp_path / "begun")
    if threads == 2:
        go = tmp_path / "go"
        beside = actor.until.remote(tmp_path / "beside", go)
        wait_for(tmp_path / "beside")
    minray.cancel(ref)
    assert get(ref) == "stopped where I was told to"
    if threads == 2:
        go.touch()
        assert get(beside) is False


def test_a_call_that_waits_for_a_thread_is_cancelled_at_once_and_never_runs(tmp_path: Path) -> None:
    actor, go, touched = Actor.options(max_concurrency=2).remote(), tmp_path / "go", tmp_path / "touched"
    busy = [actor.until.remote(tmp_path / str(n), go) for n in range(2)]
    queued, later = actor.touch.remote(touched), actor.nothing.remote()
    wait_for(tmp_path / "0", tmp_path / "1")
    minray.cancel(queued)
    assert_cancelled(queued, "had not started")
    go.touch()
    assert get([*busy, later]) == [False, False, "nothing"]
    assert not touched.exists()


def test_groups_of_threads_are_cancelled_likewise(tmp_path: Path) -> None:
    actor = Actor.options(concurrency_groups={"one": 1}).remote()
    go, touched = tmp_path / "go", tmp_path / "touched"
    busy = actor.until.options(concurrency_group="one").remote(tmp_path / "begun", go)
    queued = actor.touch.options(concurrency_group="one").remote(touched)
    wait_for(tmp_path / "begun")
    minray.cancel(queued)
    assert_cancelled(queued)
    assert get(actor.nothing.remote()) == "nothing"
    go.touch()
    assert get(busy) is False
    assert not touched.exists()


def test_cancelling_a_call_that_has_ended_does_nothing(tmp_path: Path) -> None:
    for actor in (Actor.remote(), Actor.options(max_concurrency=2).remote(), Coroutines.remote()):
        ref = actor.nothing.remote()
        assert get(ref) == "nothing"
        minray.cancel(ref)
        assert get([ref, actor.nothing.remote()]) == ["nothing", "nothing"]


def test_no_actor_is_ended_by_force(tmp_path: Path) -> None:
    coroutines, threads = Coroutines.remote(), Actor.options(max_concurrency=2).remote()
    for number, method in enumerate((coroutines.sleep, threads.until_cancelled)):
        begun = tmp_path / str(number)
        ref = method.remote(begun)
        wait_for(begun)
        with pytest.raises(ValueError, match=r"would end the actor.*minray\.kill"):
            minray.cancel(ref, force=True)
        minray.cancel(ref)


# ---------------------------------------------------------------- tasks


def test_a_task_may_ask_whether_it_was_cancelled(tmp_path: Path) -> None:
    @minray.remote
    def asks(begun: Path) -> tuple[bool, bool]:
        before = minray.get_runtime_context().is_canceled()
        try:
            begun.touch()
            time.sleep(600)
        except KeyboardInterrupt:
            pass
        return before, minray.get_runtime_context().is_cancelled()

    ref = asks.remote(tmp_path / "begun")
    wait_for(tmp_path / "begun")
    minray.cancel(ref)
    assert get(ref) == (False, True)


def test_is_canceled_is_neither_for_the_driver_nor_for_coroutines() -> None:
    with pytest.raises(RuntimeError, match="the driver cannot be cancelled"):
        minray.get_runtime_context().is_canceled()
    with pytest.raises(RuntimeError, match=r"asyncio\.CancelledError"):
        get(Coroutines.remote().asks.remote())


def test_what_waits_in_get_or_wait_is_woken(tmp_path: Path) -> None:
    """At the very moment when it begins to wait, too: then another thread of the worker may read the news."""

    @minray.remote(num_cpus=0)
    def waits(begun: Path, refs: list[Any], how: str) -> None:
        begun.touch()
        minray.get(refs) if how == "get" else minray.wait(refs)

    actor = Coroutines.remote()
    pending = actor.sleep.remote(tmp_path / "pending")
    for number in range(40):
        begun = tmp_path / str(number)
        ref = waits.remote(begun, [pending], "wait" if number % 2 else "get")
        wait_for(begun)
        minray.cancel(ref)
        assert_cancelled(ref)


def test_force_kills_the_worker_and_the_error_says_so_in_both_ways(tmp_path: Path) -> None:
    @minray.remote(max_retries=5)
    def stubborn(begun: Path) -> None:
        begun.touch()
        while True:
            try:
                time.sleep(600)
            except KeyboardInterrupt:
                pass

    for expected in (TaskCancelledError, WorkerCrashedError):
        begun = tmp_path / expected.__name__
        ref = stubborn.remote(begun)
        wait_for(begun)
        minray.cancel(ref, force=True)
        with pytest.raises(expected, match="was cancelled"):
            get(ref)


def test_force_spares_the_actors_that_a_task_has_called(tmp_path: Path) -> None:
    actor = Coroutines.remote()

    @minray.remote
    def parent(actor: Any, begun: Path) -> None:
        minray.get(actor.sleep.remote(begun))

    ref = parent.remote(actor, tmp_path / "begun")
    wait_for(tmp_path / "begun")
    minray.cancel(ref, force=True)
    with pytest.raises(TaskCancelledError):
        get(ref)
    assert get(actor.nothing.remote()) == "nothing"


def test_a_thread_that_waits_for_a_cancelled_task_is_told(tmp_path: Path) -> None:
    ended = tmp_path / "ended"
    ref = sleeping_task.remote(tmp_path / "begun", ended)
    errors: list[BaseException] = []

    def wait() -> None:
        try:
            get(ref)
        except TaskCancelledError as error:
            errors.append(error)

    thread = threading.Thread(target=wait)
    thread.start()
    wait_for(tmp_path / "begun")
    minray.cancel(ref)
    thread.join(SOON_S)
    assert len(errors) == 1 and ended.exists()
