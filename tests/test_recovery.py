"""Lost objects are made again: the node alone, then real processes."""

from __future__ import annotations

import os
import pickle
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy
import pytest

import minray
from minray import ids, lineage, story
from minray.exceptions import ObjectLostError, ObjectReconstructionFailedError, ReplayDivergedError
from minray.messages import (
    DRIVER, ArgumentLost, CancelRequested, CancelTask, Command, ItemsYielded, ObjectLost, ObjectPut, ObjectsAwaited, ReferencesChanged, Reply, RunTasks, TasksFinished,
    TasksReturned, TasksSubmitted, TemplateDefined, Unpinned, Warn, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.task_spec import (
    CANCELLED, ERROR, FINISHED, OK, PENDING_ARGS_AVAIL, RETRYABLE_ERROR, STREAMING, TASK, UNIT, TaskOptions, TaskSpec,
)  # fmt: skip

ROOT = ids.root_task_id(b"tests")
PREFIX = ids.children_prefix(ROOT)
KB = 1024
ONCE, OFTEN = range(2)


def task_id(number: int, prefix: bytes = PREFIX) -> bytes:
    return ids.pack_id(prefix, number, 0)


class World:
    """A node with one worker that does what the test says, and its own bookkeeping of who holds what."""

    def __init__(self) -> None:
        self.node = Node({"CPU": UNIT}, 1 << 20, lambda object_id: "/spill/" + object_id.hex())
        self.handle(TemplateDefined(DRIVER, OFTEN, TaskOptions(TASK, b"", "often", resources=(("CPU", UNIT),))))
        self.handle(
            TemplateDefined(DRIVER, ONCE, TaskOptions(TASK, b"", "once", resources=(("CPU", UNIT),), max_retries=0))
        )
        self.node.start_workers(1)
        self.handle(WorkerStarted(1, 1001))
        self.ran: list[bytes] = []
        self.to_run: list[tuple[bytes, list[Any]]] = []
        self.commands: list[Command] = []

    def handle(self, event: Any) -> list[Command]:
        commands = self.node.handle(event, 100.0)
        if len(self.node.objects) < 100:  # It looks at everything.
            self.node.check()
        return commands

    def submit(self, number: int, deps: tuple[bytes, ...] = (), nested: tuple[bytes, ...] = (), template: int = OFTEN) -> bytes:
        self.commands += self.handle(
            TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(number), template, None, deps, nested)])
        )
        self.run_all()
        return task_id(number)

    def run(self, commands: list[Command], worker: int = 1) -> None:
        """The worker runs everything; each result is large."""
        for command in commands:
            if isinstance(command, RunTasks):
                self.to_run += [(task[0], task[3] or []) for task in command.tasks]
        if self.to_run:
            running, values = self.to_run.pop(0)
            if any(is_error for _, _, is_error, _ in values):
                commands = self.handle(TasksFinished(worker, [(running, ERROR, (b"error", "argument"), 99.0, 100.0)]))
            else:
                self.ran.append(running)
                commands = self.finish(running, worker)
            commands += self.handle(Unpinned(worker, [value[3] for value in values if type(value[0]) is int]))
            self.commands += commands

    def run_all(self) -> None:
        while self.commands or self.to_run:
            commands, self.commands = self.commands, []
            self.run(commands)

    def finish(self, running: bytes, worker: int = 1, nested: tuple[bytes, ...] = ()) -> list[Command]:
        offset = self.node.lineage.arena.allocate(KB)
        assert offset is not None
        return self.handle(TasksFinished(worker, [(running, OK, [(offset.offset, KB, nested)], 99.0, 100.0)]))

    def release(self, *object_ids: bytes) -> None:
        self.handle(ReferencesChanged(DRIVER, [], list(object_ids)))

    def lose(self, object_id: bytes) -> None:
        self.ran.clear()
        self.commands += self.handle(ObjectLost(DRIVER, object_id, None, "a test dropped it"))
        self.run_all()

    def error(self, object_id: bytes) -> Any:
        entry = self.node.objects[object_id]
        assert entry.is_error
        return pickle.loads(entry.data)

    def events(self, kind: str) -> list[str]:
        return [row[4] for row in self.node.take_rows(100.0).get("events", []) if row[2] == kind]


@pytest.fixture
def world() -> Iterator[World]:
    world = World()
    yield world
    for worker in world.node.scheduler.workers.values():
        world.handle(ReferencesChanged(worker.client, [], list(worker.held)))
    world.release(*[object_id for object_id, entry in world.node.objects.items() if entry.refs])
    assert not world.node.objects and not world.node.lineage.tasks and not world.node.lineage.replayable


def test_a_lost_object_is_made_again_by_its_task(world: World) -> None:
    made = world.submit(1)
    world.lose(made)
    assert world.ran == [made]
    assert type(world.node.objects[made].data) is int
    assert world.node.lineage.tasks[made].retries_left == 2
    assert len(world.events("object_lost")) == 1


def test_what_a_lost_object_was_made_of_is_made_again_first_however_long_the_chain(world: World) -> None:
    chain = [world.submit(1)]
    for number in range(2, 2000):
        chain.append(world.submit(number, (chain[-1],)))
        world.release(chain[-2])
    assert sum(entry.data is not None for entry in world.node.objects.values()) == 1, "only the last has a value"
    assert len(world.node.lineage.arena.blocks) == 1
    world.lose(chain[-1])
    assert world.ran == chain
    assert len(world.node.lineage.arena.blocks) == 1, "what was made again on the way is gone again"


def test_what_only_the_lost_value_still_named_is_there_for_the_replay(world: World) -> None:
    """A task returns the ref that it was given; whoever had put the object lets it go; the result is lost."""
    given, spec = ids.put_id(ROOT, 1), TaskSpec(task_id(1), OFTEN, None, (ids.put_id(ROOT, 1),))
    offset = world.node.lineage.arena.allocate(KB)
    assert offset is not None
    world.handle(ObjectPut(DRIVER, given, (offset.offset, KB, ())))
    world.handle(TasksSubmitted(DRIVER, ROOT, [spec]))
    world.finish(task_id(1), nested=(given,))
    world.handle(Unpinned(1, [given]))
    world.release(given)
    (run,) = world.handle(ObjectLost(DRIVER, task_id(1), None, "a test dropped it"))
    assert isinstance(run, RunTasks) and run.tasks[0][3] == [(offset.offset, KB, False, given)]
    world.finish(task_id(1), nested=(given,))
    world.handle(Unpinned(1, [given]))


def test_lineage_goes_with_the_last_result_that_could_need_it(world: World) -> None:
    first = world.submit(1)
    second = world.submit(2, (first,))
    world.release(first)
    assert first in world.node.objects and world.node.objects[first].data is None
    world.release(second)
    assert not world.node.objects and not world.node.lineage.tasks


def test_a_small_result_keeps_no_lineage(world: World) -> None:
    first = world.submit(1)
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(2), OFTEN, None, (first,), ())]))
    world.handle(TasksFinished(1, [(task_id(2), OK, b"small", 99.0, 100.0)]))
    world.handle(Unpinned(1, [first]))
    world.release(first)
    assert first not in world.node.objects


def test_only_the_newest_results_have_a_lineage(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MAX_REPLAYABLE", 2)
    chain = [world.submit(1)]
    for number in range(2, 6):
        chain.append(world.submit(number, (chain[-1],)))
        world.release(chain[-2])
    assert list(world.node.lineage.replayable) == chain[-2:]
    world.lose(chain[-1])
    assert world.ran == [], "it would need what is not known any more"
    (reason,) = world.events("object_not_rebuilt")
    assert "lineage" in reason
    assert world.node.objects[chain[-1]].is_error


@pytest.mark.parametrize("number_of_losses", [3, 4])
def test_a_replay_costs_a_retry(world: World, number_of_losses: int) -> None:
    made = world.submit(1)
    for _ in range(number_of_losses):
        world.lose(made)
    if number_of_losses == 3:
        assert world.ran == [made]
    else:
        assert "max_retries=3" in str(world.error(made))


def test_what_cannot_be_made_again_is_an_error_that_says_why(world: World) -> None:
    once = world.submit(1, template=ONCE)
    world.lose(once)
    assert world.ran == [] and "max_retries=0" in str(world.error(once))
    put = ids.put_id(ROOT, 1)
    block = world.node.lineage.arena.allocate(KB)
    assert block is not None
    world.handle(ObjectPut(DRIVER, put, (block.offset, KB, ())))
    world.lose(put)
    assert isinstance(world.error(put), ObjectLostError)
    assert "put() leaves no task to replay" in str(world.error(put))


def test_a_task_whose_argument_was_put_and_is_gone_fails_its_result_with_that(world: World) -> None:
    put = ids.put_id(ROOT, 1)
    block = world.node.lineage.arena.allocate(KB)
    assert block is not None
    world.handle(ObjectPut(DRIVER, put, (block.offset, KB, ())))
    made = world.submit(1, (put,))
    world.release(put)
    world.ran.clear()
    (run,) = world.handle(ObjectLost(DRIVER, made, None, "a test dropped it"))
    assert isinstance(run, RunTasks)
    assert run.tasks[0][3][0][2], "the worker is given the error in place of the argument"  # type: ignore[index]
    world.commands.append(run)
    world.run_all()
    assert world.ran == [] and world.node.objects[made].is_error


def test_waiters_of_an_object_that_is_lost_before_they_use_it_wait_on(world: World) -> None:
    first, second = world.submit(1), task_id(2)
    world.node.templates[0].mean_s = 100.0  # So at most two are handed to a worker.
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(second, OFTEN), TaskSpec(task_id(4), OFTEN)]))
    assert world.handle(ObjectsAwaited(DRIVER, 7, [first, second], 2, True, False)) == []
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(3), OFTEN, None, (first,), ())]))  # Queued behind it.
    world.handle(ObjectLost(DRIVER, first, None, "a test dropped it"))
    assert world.node.lineage.tasks[task_id(3)].state == PENDING_ARGS_AVAIL
    commands = world.finish(second)
    assert Reply(DRIVER, 7, None) not in commands, "one of the two is not there any more"
    again = next(command for command in commands if isinstance(command, RunTasks))
    assert [task[0] for task in again.tasks] == [first]
    commands = world.finish(task_id(4)) + world.finish(first)
    assert Reply(DRIVER, 7, None) in commands
    world.commands += commands
    world.run_all()
    assert world.node.lineage.tasks[task_id(3)].state == FINISHED


def test_a_task_that_finds_its_argument_gone_comes_back_without_losing_an_attempt(world: World) -> None:
    first = world.submit(1)
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(2), OFTEN, None, (first,), ())]))
    where = world.node.objects[first].data
    world.handle(Unpinned(1, [first]))
    commands = world.handle(ArgumentLost(1, task_id(2), first, where, "its file is gone"))
    assert [task[0] for c in commands if isinstance(c, RunTasks) for task in c.tasks] == [first]
    task = world.node.lineage.tasks[task_id(2)]
    assert (task.state, task.attempt, task.retries_left) == (PENDING_ARGS_AVAIL, 0, 3)
    world.commands += world.finish(first)
    world.run_all()
    assert task.state == FINISHED and task.attempt == 1


def test_news_of_a_loss_that_is_mended_already_changes_nothing(world: World) -> None:
    made = world.submit(1)
    world.ran.clear()
    assert world.handle(ObjectLost(DRIVER, made, "/spill/where/it/was/before", "its file is gone", 9)) == [Reply(DRIVER, 9, False)]
    assert world.ran == []


# ---------------------------------------------------------------- replays that do something else


def parent_runs_again(
    world: World, *, change: bytes, first: bytes = b"arguments", held: bool = True
) -> list[Command]:
    """A task submits a child and dies; the second attempt submits that child with other arguments."""
    parent = task_id(1)
    child = task_id(1, ids.children_prefix(parent))
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(parent, OFTEN)]))
    world.handle(TemplateDefined(1, 0, TaskOptions(TASK, b"", "child", resources=(("CPU", UNIT),))))
    deps = () if held else (task_id(2),)  # It waits for another one.
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(object_id, OFTEN) for object_id in deps]))
    world.handle(TasksSubmitted(1, parent, [TaskSpec(child, 0, first, deps)]))
    world.handle(ObjectsAwaited(1, 1, [child], 1, True, True))  # It waits; a second worker starts.
    world.handle(TasksReturned(1, [child, task_id(2)]))
    world.handle(WorkerStarted(2, 1002))
    if held:
        world.handle(ReferencesChanged(DRIVER, [child], []))
        world.handle(TasksFinished(2, [(child, OK, b"value", 99.0, 100.0)]))
    world.handle(WorkerDied(1, "was killed by SIGKILL", parent))
    world.handle(TemplateDefined(2, 0, TaskOptions(TASK, b"", "child", resources=(("CPU", UNIT),))))
    return world.handle(TasksSubmitted(2, parent, [TaskSpec(child, 0, change)]))


def test_children_of_a_second_attempt_that_have_finished_are_not_run_again(world: World) -> None:
    commands = parent_runs_again(world, change=b"arguments")
    assert not [command for command in commands if isinstance(command, (RunTasks, Warn))]
    world.handle(TasksFinished(2, [(task_id(1), OK, b"done", 99.0, 100.0)]))
    assert world.node.objects[task_id(1)].data == b"done"


def test_a_second_attempt_may_pickle_the_same_to_other_bytes(world: World) -> None:
    once, twice = pickle.dumps(["abc", "".join("abc")], 5), pickle.dumps(["abc", "abc"], 5)
    assert once != twice
    commands = parent_runs_again(world, first=once, change=twice)
    assert not [command for command in commands if isinstance(command, (RunTasks, Warn))]
    world.handle(TasksFinished(2, [(task_id(1), OK, b"done", 99.0, 100.0)]))
    assert world.node.objects[task_id(1)].data == b"done"


def test_a_second_attempt_that_submits_something_else_fails_and_the_user_is_told(world: World) -> None:
    commands = parent_runs_again(world, change=b"other arguments")
    (warning,) = [command for command in commands if isinstance(command, Warn)]
    assert "often() did something else when it was run again" in warning.text
    assert len(world.events("replay_diverged")) == 1
    world.handle(TasksFinished(2, [(task_id(1), OK, b"mixed", 99.0, 100.0)]))
    assert isinstance(world.error(task_id(1)), ReplayDivergedError)
    child = task_id(1, ids.children_prefix(task_id(1)))
    assert world.node.objects[child].data == b"value", "what others have does not change"


def test_a_child_that_nobody_has_and_that_has_not_run_is_replaced_by_what_the_second_attempt_submits(world: World) -> None:
    commands = parent_runs_again(world, change=b"other arguments", held=False)
    assert not [command for command in commands if isinstance(command, Warn)]
    child = task_id(1, ids.children_prefix(task_id(1)))
    assert world.node.lineage.tasks[child].spec.args == b"other arguments"
    world.handle(TasksFinished(2, [(child, OK, b"other value", 99.0, 100.0), (task_id(1), OK, b"done", 99.0, 100.0)]))
    world.handle(TasksFinished(2, [(task_id(2), OK, b"done", 99.0, 100.0)]))
    assert world.node.objects[child].data == b"other value"
    assert world.node.objects[task_id(1)].data == b"done"


def test_children_that_have_finished_are_not_run_again_though_nobody_held_their_results(world: World) -> None:
    """The parent had taken the value and let the ref go when it died."""
    parent_runs_again(world, change=b"arguments", held=False)
    child = task_id(1, ids.children_prefix(task_id(1)))
    world.handle(TasksFinished(2, [(task_id(2), OK, b"done", 99.0, 100.0)]))
    world.handle(TasksFinished(2, [(child, OK, b"value", 99.0, 100.0)]))
    world.handle(ReferencesChanged(2, [], [child]))
    assert world.node.objects[child].data == b"value"
    world.handle(WorkerDied(2, "was killed by SIGKILL", task_id(1)))
    world.handle(WorkerStarted(3, 1003))
    world.handle(TemplateDefined(3, 0, TaskOptions(TASK, b"", "child", resources=(("CPU", UNIT),))))
    assert world.handle(TasksSubmitted(3, task_id(1), [TaskSpec(child, 0, b"arguments")])) == []
    assert world.handle(ObjectsAwaited(3, 1, [child], 1, True, True)) == [Reply(3, 1, [(b"value", 5, False, child)])]
    world.handle(ReferencesChanged(3, [], [child]))
    world.handle(TasksFinished(3, [(task_id(1), OK, b"done", 99.0, 100.0)]))
    assert child not in world.node.objects, "its parent has ended"


def test_a_child_whose_large_result_nobody_held_is_run_again(world: World) -> None:
    parent_runs_again(world, change=b"arguments", held=False)
    child = task_id(1, ids.children_prefix(task_id(1)))
    world.handle(TasksFinished(2, [(task_id(2), OK, b"done", 99.0, 100.0)]))
    world.finish(child, 2)
    world.handle(ReferencesChanged(2, [], [child]))
    assert not world.node.lineage.arena.blocks
    world.handle(WorkerDied(2, "was killed by SIGKILL", task_id(1)))
    world.handle(WorkerStarted(3, 1003))
    world.handle(TemplateDefined(3, 0, TaskOptions(TASK, b"", "child", resources=(("CPU", UNIT),))))
    commands = world.handle(TasksSubmitted(3, task_id(1), [TaskSpec(child, 0, b"arguments")]))
    assert [task[0] for command in commands if isinstance(command, RunTasks) for task in command.tasks] == [child]
    world.handle(TasksFinished(3, [(child, OK, b"value", 99.0, 100.0), (task_id(1), OK, b"done", 99.0, 100.0)]))


def test_only_the_newest_children_of_a_running_task_are_kept(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lineage, "MAX_CHILDREN", 3)
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(1), OFTEN)]))
    world.handle(TemplateDefined(1, 0, TaskOptions(TASK, b"", "child", resources=(("CPU", UNIT),))))
    children = [task_id(number, ids.children_prefix(task_id(1))) for number in range(1, 8)]
    for child in children:
        world.handle(TasksSubmitted(1, task_id(1), [TaskSpec(child, 0)]))
        world.handle(TasksFinished(1, [(child, OK, b"value", 99.0, 100.0)]))
        world.handle(ReferencesChanged(1, [], [child]))
    assert list(world.node.objects) == [task_id(1), *children[-3:]]
    world.handle(TasksFinished(1, [(task_id(1), OK, b"done", 99.0, 100.0)]))
    assert list(world.node.objects) == [task_id(1)]


# ---------------------------------------------------------------- attempts that raised


def child_of(parent: bytes, number: int, raised: int = 0) -> bytes:
    return task_id(number, ids.children_prefix(parent, raised))


def handed(commands: list[Command]) -> list[tuple[bytes, int]]:
    return [(task[0], task[4]) for command in commands if isinstance(command, RunTasks) for task in command.tasks]


class Parent:
    """A task that submits children, waits for them, raises and dies, as the test says."""

    def __init__(self, world: World) -> None:
        self.world = world
        self.client = 1
        world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(1), OFTEN)]))

    def submits(self, child: bytes, args: bytes | None = None, template: TaskOptions | None = None) -> list[tuple[bytes, int]]:
        options = TaskOptions(TASK, b"", "child", resources=(("CPU", UNIT),))
        self.world.handle(TemplateDefined(self.client, 0, template or options))
        commands = self.world.handle(TasksSubmitted(self.client, task_id(1), [TaskSpec(child, 0, args)]))
        return handed(commands)

    def child_ends(self, child: bytes, status: int = OK, payload: Any = b"value") -> None:
        self.world.handle(TasksFinished(self.client, [(child, status, payload, 99.0, 100.0)]))
        self.world.handle(ReferencesChanged(self.client, [], [child]))

    def raises(self) -> list[tuple[bytes, int]]:
        result = (task_id(1), RETRYABLE_ERROR, (b"error", "ValueError: again"), 99.0, 100.0)
        return handed(self.world.handle(TasksFinished(self.client, [result])))

    def crashes(self) -> list[tuple[bytes, int]]:
        self.world.handle(WorkerDied(self.client, "was killed by SIGKILL", task_id(1)))
        self.client += 1
        return handed(self.world.handle(WorkerStarted(self.client, 1000 + self.client)))


def test_an_attempt_after_one_that_raised_runs_its_children_again(world: World) -> None:
    parent = Parent(world)
    assert parent.submits(child_of(task_id(1), 1)) == [(child_of(task_id(1), 1), False)]
    parent.child_ends(child_of(task_id(1), 1), ERROR, (b"error", "it could not be reached"))
    assert parent.raises() == [(task_id(1), -1)]
    assert child_of(task_id(1), 1) not in world.node.objects, "nobody will ask for the first one again"
    again = child_of(task_id(1), 1, 1)
    assert parent.submits(again, b"other arguments, perhaps") == [(again, False)]
    parent.child_ends(again)
    world.handle(TasksFinished(1, [(task_id(1), OK, b"done", 99.0, 100.0)]))
    assert world.node.objects[task_id(1)].data == b"done"
    assert world.events("replay_diverged") == []


def test_an_attempt_after_a_crash_finds_the_children_of_the_one_that_crashed(world: World) -> None:
    """Whether or not another had raised before."""
    parent = Parent(world)
    for raised in (0, 1):
        child = child_of(task_id(1), 1, raised)
        assert [one for one, _ in parent.submits(child)] == [child]
        parent.child_ends(child)
        assert parent.crashes() == [(task_id(1), -raised)]
        assert parent.submits(child) == [], "it had finished"
        assert world.node.objects[child].data == b"value"
        world.handle(ReferencesChanged(parent.client, [], [child]))
        if not raised:
            assert parent.raises() == [(task_id(1), -1)]
    world.handle(TasksFinished(parent.client, [(task_id(1), OK, b"done", 99.0, 100.0)]))
    assert list(world.node.objects) == [task_id(1)]


def test_a_replay_for_a_lost_result_finds_the_children_of_the_attempt_that_succeeded(world: World) -> None:
    parent = Parent(world)
    assert parent.raises() == [(task_id(1), -1)]
    child = child_of(task_id(1), 1, 1)
    parent.submits(child)
    parent.child_ends(child)
    world.handle(ReferencesChanged(DRIVER, [child], []))  # It is in the result, say.
    world.finish(task_id(1))
    assert handed(world.handle(ObjectLost(DRIVER, task_id(1), None, "a test dropped it"))) == [(task_id(1), -1)]
    assert parent.submits(child) == []
    assert parent.raises() == [(task_id(1), -2)], "a replay that raises is an attempt like any other"
    world.finish(task_id(1))


def test_what_an_attempt_that_raised_has_submitted_is_cancelled_with_its_task(world: World) -> None:
    world.node.scheduler.add_resources((("CPU", UNIT),))
    parent = Parent(world)
    first, second = child_of(task_id(1), 1), child_of(task_id(1), 1, 1)
    parent.submits(first)
    parent.raises()
    parent.submits(second)
    world.handle(WorkerStarted(2, 1002))
    commands = world.handle(CancelRequested(DRIVER, task_id(1), False, True))
    for child in (first, second):
        told = any(isinstance(command, CancelTask) and command.task_id == child for command in commands)
        assert told or world.node.lineage.tasks[child].cancelled
    for worker in list(world.node.scheduler.workers.values()):
        ended = [(one, CANCELLED, (b"", "cancelled"), 99.0, 100.0) for one in worker.in_flight]
        world.handle(TasksFinished(worker.client, ended))


def test_the_generator_of_an_attempt_that_raised_keeps_no_items_for_the_next(world: World) -> None:
    parent = Parent(world)
    stream = TaskOptions(TASK, b"", "stream", num_returns=2, resources=(("CPU", UNIT),), streaming=STREAMING)
    old = child_of(task_id(1), 1)
    parent.submits(old, template=stream)
    parent.raises()
    parent.submits(child_of(task_id(1), 1, 1))  # So there is something that is kept for this attempt.
    world.handle(ItemsYielded(1, old, 0, [(b"item", 4, ())]))
    kept = world.node.lineage.tasks[task_id(1)].children
    assert kept is not None and list(kept) == [child_of(task_id(1), 1, 1)]
    for one in (old, child_of(task_id(1), 1, 1), task_id(1)):
        world.handle(TasksFinished(1, [(one, ERROR, (b"error", "ValueError: it ends"), 99.0, 100.0)]))


def test_a_late_result_of_a_worker_that_was_given_up_is_discarded_and_counted(world: World) -> None:
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id(1), OFTEN)]))
    world.handle(WorkerDied(1, "was killed by SIGKILL", task_id(1)))
    world.handle(WorkerStarted(2, 1002))
    assert world.handle(TasksFinished(1, [(task_id(1), OK, b"late", 99.0, 100.0)])) == []
    assert world.node.objects[task_id(1)].data is None
    assert world.events("late_result") == ["worker 1 had been given up; its result was discarded (1 so far)"]
    again = [(task_id(1), OK, b"late", 99.0, 100.0), (task_id(2), ERROR, (b"error", "late"), 99.0, 100.0)]
    assert world.handle(TasksFinished(1, again)) == [] and world.node.late_results == 3
    world.handle(TasksFinished(2, [(task_id(1), OK, b"value", 99.0, 100.0)]))
    assert world.node.objects[task_id(1)].data == b"value"


# ---------------------------------------------------------------- real processes


@minray.remote
def array(value: int, note: str) -> Any:
    with open(note, "a") as file:
        file.write(f"array {value}\n")
    return numpy.full(100_000, value)


@minray.remote
def doubled(array: Any, note: str) -> Any:
    with open(note, "a") as file:
        file.write("doubled\n")
    return array * 2


@minray.remote
def total(array: Any) -> int:
    return int(array.sum())


def spill(refs: list[Any]) -> list[str]:
    """Fill the store until the objects lie on disk; their files."""
    directory = os.path.join(minray.api.core().session.path, "spill")  # type: ignore[attr-defined]
    minray.wait(refs, num_returns=len(refs), timeout=60)
    held = []
    while True:
        names = {name.partition("-")[0]: name for name in os.listdir(directory)}
        if all(ref.hex() in names for ref in refs):
            return [os.path.join(directory, names[ref.hex()]) for ref in refs]
        held.append(minray.put(numpy.zeros(50_000)))


def damage(path: str) -> None:
    with open(path, "r+b") as file:
        file.seek(1000)
        file.write(b"not what was there")


def replace(path: str) -> None:
    os.unlink(path)
    os.mkdir(path)


@pytest.mark.parametrize(
    "fault", [os.unlink, damage, lambda path: os.truncate(path, 5000), replace], ids=["gone", "damaged", "cut", "replaced"]
)
@pytest.mark.parametrize("reader", ["driver", "task", "worker", "future", "actor"])
def test_a_spilled_object_whose_file_is_bad_is_made_again_for_every_reader(fault: Any, reader: str, tmp_path: Path) -> None:
    note = str(tmp_path / "note")

    @minray.remote
    def get_inside(refs: list[Any]) -> int:
        return int(minray.get(refs[0]).sum())

    @minray.remote
    class Reader:
        def total(self, array: Any) -> int:
            return int(array.sum())

    with minray.init(num_cpus=1, object_store_memory=4 << 20):
        first = array.remote(1, note)
        second = doubled.remote(first, note)
        minray.wait([second])
        for path in spill([first, second]):
            fault(path)
        if reader == "driver":
            assert int(minray.get(second, timeout=60).sum()) == 200_000
        elif reader == "task":
            assert minray.get(total.remote(second), timeout=60) == 200_000
        elif reader == "worker":
            assert minray.get(get_inside.remote([second]), timeout=60) == 200_000
        elif reader == "actor":
            actor = Reader.remote()
            assert minray.get(actor.total.remote(second), timeout=60) == 200_000
            del actor
        else:
            assert int(second.future().result(timeout=60).sum()) == 200_000
        assert Path(note).read_text().split("\n")[:-1] == ["array 1", "doubled", "array 1", "doubled"]


def test_a_put_object_whose_file_is_gone_is_an_error_that_says_so() -> None:
    with minray.init(num_cpus=1, object_store_memory=4 << 20):
        ref = minray.put(numpy.ones(100_000))
        (path,) = spill([ref])
        os.unlink(path)
        with pytest.raises(ObjectLostError, match=r"put\(\) leaves no task to replay") as error:
            minray.get(ref, timeout=60)
        history = story.tell(story.story(str(error.value).split()[-1]))
        assert "cannot be made again: put() leaves no task to replay" in "\n".join(history)


def test_a_task_that_must_not_run_twice_is_not_replayed(tmp_path: Path) -> None:
    note = str(tmp_path / "note")
    with minray.init(num_cpus=1, object_store_memory=4 << 20):
        ref = array.options(max_retries=0).remote(1, note)
        (path,) = spill([ref])
        os.unlink(path)
        with pytest.raises(ObjectReconstructionFailedError, match="max_retries=0"):
            minray.get(ref, timeout=60)
    assert Path(note).read_text() == "array 1\n"


def test_a_parent_that_does_something_else_the_second_time_fails(tmp_path: Path) -> None:
    @minray.remote
    def child(value: float) -> float:
        return value

    @minray.remote
    class Keeper:
        def __init__(self) -> None:
            self.refs: list[Any] = []

        def keep(self, refs: list[Any]) -> None:
            self.refs += refs

    @minray.remote(max_retries=1)
    def parent(keeper: Any) -> None:
        second = (tmp_path / "ran").exists()
        ref = child.remote(2.0 if second else 1.0)
        minray.get(ref)
        minray.get(keeper.keep.remote([ref]))
        if not second:
            (tmp_path / "ran").touch()
            os.kill(os.getpid(), 9)

    with minray.init(num_cpus=2):
        keeper = Keeper.remote()
        with pytest.raises(ReplayDivergedError, match="did something else when it was run again"):
            minray.get(parent.remote(keeper), timeout=60)
        del keeper
