"""Exact recovery of actors in real processes: kill -9, and the state is as if nothing had happened.

What can be decided without a process is in test_actor_recovery.py.
"""

from __future__ import annotations

import copy
import os
import pickle
import random
import signal
import sys
import textwrap
import threading
import time
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

import minray
from minray import checkpoint
from minray.exceptions import ActorDiedError, CheckpointError, WorkerCrashedError
from minray.serialization import deserialize, to_bytes
from minray.task_spec import ACTOR_CREATION, TaskOptions

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # Else each actor would import pytest: 0.1 s.
live = pytest.mark.usefixtures("module_session")


@minray.remote
def double(x: int) -> int:
    return 2 * x


@minray.remote
def note(path: str) -> None:
    with open(path, "a") as file:
        file.write("x")


class Ledger:
    """Its state depends on every call, and on their order."""

    def __init__(self) -> None:
        self.seen: list[Any] = []
        self.total = 1
        self.table = np.zeros(20_000)  # Too large for a message.

    def add(self, x: int, kill: str = "") -> int:
        if kill and not os.path.exists(kill):
            open(kill, "w").close()
            os.kill(os.getpid(), signal.SIGKILL)
        self.seen.append(x)
        self.total = (self.total * 31 + x) % 1_000_003
        self.table[x % 20_000] += 1
        return self.total

    def add_doubled(self, x: int) -> int:
        return self.add(minray.get(double.remote(x)))

    def pid(self) -> int:
        return os.getpid()

    def state(self) -> tuple[list[Any], int, float]:
        return self.seen, self.total, float(self.table.sum())


def kill(actor: Any) -> None:
    """And wait until the process has gone."""
    pid = minray.get(actor.pid.remote())
    os.kill(pid, signal.SIGKILL)
    while os.path.exists(f"/proc/{pid}"):
        minray.wait([double.remote(1)])


def fault_free(calls: list[int]) -> list[int]:
    ledger = Ledger()
    return [ledger.add(x) for x in calls]


# ---------------------------------------------------------------- the state


@live
@pytest.mark.parametrize("every", [1, 7, 1000])
def test_200_calls_of_two_callers_and_killed_workers_give_the_state_of_a_run_without_faults(every: int, tmp_path: Path) -> None:
    chosen = random.Random(every).sample(range(100), 4)

    @minray.remote
    def caller(actor: Any, first: int, kills: list[int]) -> list[int]:
        refs = [actor.add.remote(x, str(tmp_path / f"{x}") if x - first in kills else "") for x in range(first, first + 100)]
        return minray.get(refs)  # type: ignore[no-any-return]

    ledger = minray.remote(checkpoint_every=every)(Ledger).remote()
    one, other = caller.remote(ledger, 0, chosen[:2]), caller.remote(ledger, 1000, chosen[2:])
    answers = dict(zip([*range(100), *range(1000, 1100)], minray.get(one) + minray.get(other), strict=True))
    seen, total, calls = minray.get(ledger.state.remote())
    assert sorted(seen) == sorted(answers), "each call once"
    assert [x for x in seen if x < 1000] == list(range(100)) and [x for x in seen if x >= 1000] == list(range(1000, 1100))
    assert [answers[x] for x in seen] == fault_free(seen) and total == answers[seen[-1]] and calls == 200
    assert len(list(tmp_path.iterdir())) == 4, "it was killed as often as it was to be"


@live
def test_an_actor_killed_from_outside_at_any_moment_has_lost_nothing() -> None:
    ledger = minray.remote(checkpoint_every=10)(Ledger).remote()
    refs: list[Any] = []
    for start in range(0, 200, 50):
        refs += [ledger.add.remote(x) for x in range(start, start + 50)]
        minray.wait(refs[start + 20 : start + 21])
        kill(ledger)
    assert minray.get(refs) == fault_free(list(range(200)))
    assert minray.get(ledger.state.remote())[0] == list(range(200))


@live
def test_what_a_call_has_submitted_is_not_run_a_second_time(tmp_path: Path) -> None:
    @minray.remote(checkpoint_every=100)
    class Parent:
        def __init__(self) -> None:
            self.helper = Helper.remote()
            self.answers: list[int] = []

        def work(self, path: str) -> int:
            note.options(num_returns=0).remote(path + "-no-return")
            minray.get(note.remote(path))
            self.answers.append(minray.get(self.helper.count.remote()))
            return self.answers[-1]

        def all(self) -> list[int]:
            return self.answers

        def pid(self) -> int:
            return os.getpid()

    @minray.remote
    class Helper:
        n = 0

        def count(self) -> int:
            self.n += 1
            return self.n

    parent, path = Parent.remote(), str(tmp_path / "notes")
    assert minray.get([parent.work.remote(path) for _ in range(3)]) == [1, 2, 3]
    kill(parent)
    assert minray.get(parent.all.remote()) == [1, 2, 3]
    assert minray.get(parent.work.remote(path)) == 4
    assert (tmp_path / "notes").read_text() == "xxxx"
    del parent


@live
def test_a_class_may_say_itself_what_its_state_is() -> None:
    @minray.remote(checkpoint_every=2)
    class Model:
        def __init__(self, name: str) -> None:
            self.name = name
            self.lock = threading.Lock()
            self.step = 0
            self.made = os.getpid()

        def save_checkpoint(self) -> Any:
            return {"step": self.step, "weights": np.full(10_000, self.step)}

        def load_checkpoint(self, state: Any) -> None:
            self.step = state["step"]
            state["weights"] += 1  # They are its own to write to.

        def train(self) -> tuple[str, int]:
            with self.lock:
                self.step += 1
            return self.name, self.step

        def is_at_home(self) -> bool:
            return self.made == os.getpid()

        def pid(self) -> int:
            return os.getpid()

    model = Model.remote("m")
    assert minray.get([model.train.remote() for _ in range(5)])[-1] == ("m", 5)
    kill(model)
    assert minray.get(model.train.remote()) == ("m", 6)
    assert minray.get(model.is_at_home.remote()), "the constructor has run again"


@live
def test_refs_and_handles_in_the_state_are_kept() -> None:
    @minray.remote(checkpoint_every=2)
    class Keeper:
        def keep(self, refs: list[Any]) -> None:
            self.refs = [*refs, minray.put("its own")]

        def read(self) -> Any:
            return minray.get(self.refs)

        def pid(self) -> int:
            return os.getpid()

    keeper = Keeper.remote()
    minray.get(keeper.keep.remote([minray.put(np.arange(20_000)), double.remote(21)]))
    for _ in range(3):
        kill(keeper)
        array, doubled, own = minray.get(keeper.read.remote())
        assert array[-1] == 19_999 and doubled == 42 and own == "its own"


@live
def test_a_checkpoint_by_time_is_taken_after_a_call_when_the_last_is_so_old(tmp_path: Path) -> None:
    actor = minray.remote(checkpoint_interval_s=0.001)(Ledger).remote()
    minray.get(actor.add.remote(1))
    deadline = time.monotonic() + 20
    taken = 0
    while not taken and time.monotonic() < deadline:
        minray.get(actor.add.remote(1))
        recovery = driver_node().actors.actors[actor._actor_id].recovery
        taken = recovery.num_checkpoints
    assert taken, "none was taken"


def driver_node() -> Any:
    return minray.api.core().node  # type: ignore[attr-defined]


@live
def test_a_call_that_kills_its_worker_each_time_fails_and_the_actor_lives_on() -> None:
    @minray.remote(checkpoint_every=3)
    class Fragile(Ledger):
        def die(self) -> None:
            self.seen.append("partway")
            os.kill(os.getpid(), signal.SIGKILL)

    actor = Fragile.remote()
    minray.get([actor.add.remote(x) for x in range(4)])
    with pytest.raises(WorkerCrashedError, match=r"(?s)SIGKILL while running .*die\(\), attempt 4 of 4.*goes on without it"):
        minray.get(actor.die.remote())
    with pytest.raises(WorkerCrashedError, match="attempt 1 of 1"):
        minray.get(actor.die.options(max_task_retries=0).remote())
    assert minray.get(actor.state.remote())[0] == [0, 1, 2, 3]


@live
def test_a_state_whose_saving_kills_the_worker_is_told_as_that() -> None:
    class Deadly:
        def save_checkpoint(self) -> None:
            os.kill(os.getpid(), signal.SIGKILL)

        def load_checkpoint(self, state: None) -> None: ...

        def call(self) -> int:
            return 1

    actor = minray.remote(checkpoint_every=1)(Deadly).remote()
    with pytest.raises(ActorDiedError) as caught:
        minray.get(actor.call.remote())
    assert "SIGKILL while saving its checkpoint; 11 workers in a row ended before they had executed a new call" in str(caught.value)
    assert "idle" not in str(caught.value)
    events = minray.state.list_events(filters=[("kind", "=", "actor_restarted")])
    assert any("Deadly is made again" in event["message"] and "saving its checkpoint" in event["message"] for event in events)


@live
def test_kill_without_no_restart_makes_it_again_and_exit_ends_it() -> None:
    @minray.remote(checkpoint_every=3)
    class Leaver(Ledger):
        def leave(self) -> None:
            minray.exit_actor()

        def was_made_again(self) -> bool:
            return minray.get_runtime_context().was_current_actor_reconstructed

    actor = Leaver.remote()
    minray.get([actor.add.remote(x) for x in range(4)])
    assert not minray.get(actor.was_made_again.remote())
    minray.kill(actor, no_restart=False)
    assert minray.get(actor.was_made_again.remote())
    assert minray.get(actor.state.remote())[0] == [0, 1, 2, 3]
    with pytest.raises(ActorDiedError, match="exit_actor"):
        minray.get(actor.leave.remote())


# ---------------------------------------------------------------- states that cannot be saved


def test_a_state_that_cannot_be_pickled_is_told_and_the_actor_goes_on_without_recovery(run_driver: Any) -> None:
    done = run_driver(
        textwrap.dedent(
            """
            import os, signal, threading, minray
            from minray.exceptions import ActorDiedError

            @minray.remote(checkpoint_every=2)
            class Locked:
                def __init__(self):
                    self.parts = {"lock": threading.Lock()}
                    self.n = 0
                def add(self):
                    self.n += 1
                    return self.n
                def pid(self):
                    return os.getpid()

            minray.init(num_cpus=1)
            actor = Locked.remote()
            print(minray.get([actor.add.remote() for _ in range(5)]))
            os.kill(minray.get(actor.pid.remote()), signal.SIGKILL)
            try:
                minray.get(actor.add.remote())
            except ActorDiedError as error:
                print(error)
            from minray import state
            (row,) = state.list_actors(detail=True)
            print("row:", row["unrecoverable"])
            minray.shutdown()
            """
        )
    )
    assert "[1, 2, 3, 4, 5]" in done.stdout
    assert "had lost its exact recovery" in done.stdout and "Locked.parts['lock'] cannot be pickled" in done.stdout
    assert "row: the state of actor Locked cannot be saved: Locked.parts['lock']" in done.stdout
    assert "CheckpointError" in done.stderr and "Locked.parts['lock'] cannot be pickled" in done.stderr
    assert "no exact recovery any more" in done.stderr


@live
def test_a_state_that_cannot_be_made_from_its_checkpoint_ends_the_actor_and_says_why() -> None:
    @minray.remote(checkpoint_every=1)
    class Forgetful:
        def __init__(self) -> None:
            self.weights = 1

        def __setstate__(self, state: Any) -> None:
            raise KeyError("weights")

        def pid(self) -> int:
            return os.getpid()

    actor = Forgetful.remote()
    minray.get(actor.pid.remote())
    kill(actor)
    with pytest.raises(ActorDiedError, match="(?s)could not be made again.*checkpoint 2.*KeyError: 'weights'"):
        minray.get(actor.pid.remote())


# ---------------------------------------------------------------- what may be asked for


def test_options_that_do_not_go_together_are_refused() -> None:
    with pytest.raises(ValueError, match="max_restarts=0 forbids that"):
        minray.remote(checkpoint_every=5, max_restarts=0)(Ledger)
    with pytest.raises(ValueError, match="no order in which they could be replayed"):
        minray.remote(checkpoint_interval_s=5, max_concurrency=2)(Ledger)
    with pytest.raises(ValueError, match="max_restarts=0 forbids that"):
        minray.remote(max_restarts=0)(Ledger).options(checkpoint_every=5)
    for wrong in (0, -1, 1.5, True):
        with pytest.raises(ValueError, match="a number of calls, 1 or more"):
            minray.remote(checkpoint_every=wrong)(Ledger)
    for wrong in (0, -1, "1"):
        with pytest.raises(ValueError, match="a number of seconds, more than 0"):
            minray.remote(checkpoint_interval_s=wrong)(Ledger)


def test_a_class_that_says_how_to_save_and_not_how_to_load_is_refused() -> None:
    class Half:
        def save_checkpoint(self) -> int:
            return 1

    with pytest.raises(TypeError, match=r"Half defines save_checkpoint\(\) and not load_checkpoint\(\)"):
        minray.remote(checkpoint_every=5)(Half)
    minray.remote(Half)  # Without recovery these are methods like others.


# ---------------------------------------------------------------- what state is


def restored(actor: Any) -> Any:
    """As in another process: only the bytes go over."""
    options = TaskOptions(ACTOR_CREATION, b"", "A.__init__", checkpoint_every=1)
    data = to_bytes(checkpoint.Checkpoints(type(actor), options).capture(actor))
    return checkpoint.Checkpoints(type(actor), options).restore(lambda: pytest.fail("its constructor ran"), data), data


class Slotted:
    __slots__ = ("one", "two")

    def __init__(self) -> None:
        self.one, self.two = 1, [2]


class Listed(list):  # type: ignore[type-arg]
    def __init__(self) -> None:
        super().__init__([1, 2])
        self.name = "x"


class WithArguments:
    def __new__(cls, size: int, *, kind: str = "") -> WithArguments:
        made = super().__new__(cls)
        made.made_of = (size, kind)  # type: ignore[attr-defined]
        return made

    def __getnewargs_ex__(self) -> Any:
        return (7,), {"kind": "k"}


class Reduced:
    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return (Reduced, (self.number,))


class Selective:
    def __init__(self) -> None:
        self.kept, self.lock = 1, threading.Lock()

    def __getstate__(self) -> Any:
        return {"kept": self.kept}

    def __setstate__(self, state: Any) -> None:
        self.__dict__.update(state, lock="made anew")


@pytest.mark.parametrize("made", [Slotted(), Listed(), WithArguments(7, kind="k"), Reduced(5), Selective()])
def test_state_is_what_copy_makes_of_an_instance(made: Any) -> None:
    again, data = restored(made)
    assert type(again) is type(made) and b"def " not in data and type(made).__name__.encode() not in data

    def shown(thing: Any) -> Any:
        slots = {name: getattr(thing, name) for name in getattr(type(thing), "__slots__", ())}
        return slots, getattr(thing, "__dict__", None), list(thing) if isinstance(thing, list) else None

    assert shown(again) == shown(copy.copy(made))


def test_a_state_that_refers_to_itself_comes_back_as_one_thing() -> None:
    class Knot:
        def __init__(self) -> None:
            self.me = self
            self.method = self.touch
            self.others = [self, {"me": self}]

        def touch(self) -> Any:
            return self

    again, _ = restored(Knot())
    assert again.me is again and again.method() is again and again.others[1]["me"] is again


def test_arrays_of_a_restored_state_may_be_written_to_whatever_their_size() -> None:
    class Arrays:
        def __init__(self) -> None:
            self.small, self.large = np.zeros(4), np.zeros(50_000)

    again, _ = restored(Arrays())
    again.small += 1
    again.large += 1
    assert again.large.sum() == 50_000


def test_an_instance_that_is_no_state_is_pickled_with_its_class_as_ever() -> None:
    made = Reduced(3)
    restored(made)
    assert deserialize(to_bytes(minray.serialization.serialize(made))).number == 3
    assert b"_call" not in pickle.dumps(made)


def test_what_cannot_be_saved_is_named() -> None:
    class Deep:
        def __init__(self) -> None:
            self.model = {"hooks": [threading.Lock()]}

    class Raising:
        def save_checkpoint(self) -> Any:
            raise OSError("no file")

        def load_checkpoint(self, state: Any) -> None: ...

    with pytest.raises(CheckpointError, match=r"Deep.model\['hooks'\]\[0\] cannot be pickled"):
        restored(Deep())
    with pytest.raises(CheckpointError, match="the state of actor Raising cannot be saved: OSError: no file"):
        restored(Raising())


# ---------------------------------------------------------------- logs are bounded


def options(**asked: Any) -> TaskOptions:
    return TaskOptions(ACTOR_CREATION, b"f" * 16, "A.__init__", **asked)


@pytest.mark.parametrize(
    "asked, sizes, saved_after",
    [
        ({"checkpoint_every": 1_000_000}, [10] * 7, [5]),
        ({"checkpoint_interval_s": 3600.0}, [None] * 11, [5, 10]),
        ({"checkpoint_every": 1_000_000}, [400, 400, 400, 10, 10], [3]),
        ({"checkpoint_every": 2}, [10] * 4, [2, 4]),
    ],
    ids=["calls", "by time", "bytes", "what was asked for"],
)
def test_however_seldom_an_actor_asks_it_is_saved_before_its_log_is_too_long(
    asked: Any, sizes: list[Any], saved_after: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "MAX_CALLS", 5)
    monkeypatch.setattr(checkpoint, "MAX_BYTES", 1000)
    checkpoints, saved = checkpoint.Checkpoints(Ledger, options(**asked)), []
    for number, size in enumerate(sizes, 1):
        if checkpoints.is_due(None if size is None else bytes(size)):
            saved.append(number)
            checkpoints.restart()
    assert saved == saved_after
