"""Which worker may run which task, when there are environments or a max_calls: the node's decisions, without a process."""

from __future__ import annotations

from typing import Any

import pytest

from minray import ids
from minray.messages import (
    DRIVER, Command, Event, ExitWorker, FunctionExported, RunTasks, SetUpEnvironment, StartWorker, TakeBack, TasksFinished,
    TasksReturned, TasksSubmitted, TemplateDefined, Ticked, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.scheduler import IDLE_WORKER_S, SPARE_WORKERS
from minray.task_spec import OK, TASK, UNIT, TaskOptions, TaskSpec

F = b"f" * 16
ROOT = ids.root_task_id(b"job")
RED, BLUE = '{"env_vars": {"A": "red"}}', '{"env_vars": {"A": "blue"}}'
PLAIN_NO, RED_NO, BLUE_NO, TWICE_NO = range(1, 5)


class World:
    """A node whose workers start when they are asked for, and say what they are told to."""

    def __init__(self, workers: int, cpus: int, environments: bool = True) -> None:
        self.node = Node({"CPU": cpus * UNIT}, 1 << 20, lambda object_id: "/spill/" + object_id.hex())
        self.now = 1000.0
        self.made = 0
        self.set_up: dict[int, str] = {}
        self.ended: list[int] = []
        self.asked: list[int] = []  # to give tasks back
        self.handed(self.node.start_workers(workers))
        self.handle(FunctionExported(DRIVER, F, b"code", "f", "m", None))
        plain = TaskOptions(TASK, F, "f", resources=(("CPU", UNIT),))
        kinds = [plain]
        if environments:
            kinds += [plain._replace(runtime_env=RED), plain._replace(runtime_env=BLUE), plain._replace(max_calls=2)]
        for number, options in enumerate(kinds, PLAIN_NO):
            self.handle(TemplateDefined(DRIVER, number, options))

    def handle(self, event: Event) -> list[Command]:
        commands = self.node.handle(event, self.now)
        self.node.check()
        for command in commands:
            if isinstance(command, SetUpEnvironment):
                assert command.client not in self.set_up
                self.set_up[command.client] = command.runtime_env
            elif isinstance(command, ExitWorker):
                self.ended.append(command.client)
            elif isinstance(command, TakeBack):
                self.asked.append(command.client)
        return commands

    def submit(self, *numbers: int) -> list[tuple[int, bytes]]:
        """(worker, task) for what is handed over at once, with the workers that start for it."""
        specs = []
        for number in numbers:
            self.made += 1
            specs.append(TaskSpec(ids.pack_id(ids.children_prefix(ROOT), self.made, 0), number))
        return self.handed(self.handle(TasksSubmitted(DRIVER, ROOT, specs)))

    def task(self) -> bytes:
        """The one that was submitted last."""
        return ids.pack_id(ids.children_prefix(ROOT), self.made, 0)

    def flight(self, worker: int) -> list[bytes]:
        return list(self.node.scheduler.workers[worker].in_flight)

    def handed(self, commands: list[Command]) -> list[tuple[int, bytes]]:
        found = [(c.client, task[0]) for c in commands if isinstance(c, RunTasks) for task in c.tasks]
        for command in commands:
            if isinstance(command, StartWorker):
                found += self.handed(self.handle(WorkerStarted(command.client, 100 + command.client)))
        return found

    def finish(self, worker: int, *tasks: bytes) -> list[tuple[int, bytes]]:
        results: list[Any] = [(task, OK, b"\x80\x05N.", self.now, self.now + 0.01) for task in tasks]
        return self.handed(self.handle(TasksFinished(worker, results)))

    def run(self, number: int) -> int:
        """One task from its submission to its end; by whom."""
        ((worker, task),) = self.submit(number)
        self.finish(worker, task)
        return worker

    def tick(self) -> None:
        self.handle(Ticked())

    @property
    def idle(self) -> list[int]:
        return list(self.node.scheduler.idle)


def test_a_worker_that_has_run_something_never_takes_on_an_environment() -> None:
    world = World(workers=1, cpus=1)
    assert world.run(PLAIN_NO) == 1
    assert world.run(RED_NO) == 2 and world.set_up == {2: RED}
    assert [world.run(number) for number in (PLAIN_NO, RED_NO, PLAIN_NO)] == [1, 2, 1]


def test_a_fresh_worker_takes_on_any_environment_but_one_that_is_set_up_is_preferred() -> None:
    world = World(workers=2, cpus=2)
    assert world.run(RED_NO) == 2
    assert world.run(RED_NO) == 2, "worker 1 is fresh still"
    assert world.run(BLUE_NO) == 1 and world.set_up == {2: RED, 1: BLUE}


def test_tasks_of_one_environment_are_prefetched_and_taken_back_as_others_are() -> None:
    world = World(workers=2, cpus=2)
    handed = world.submit(*[RED_NO] * 4)
    assert sorted(worker for worker, _ in handed) == [1, 1, 2, 2] and world.set_up == {1: RED, 2: RED}
    second = [task for worker, task in handed if worker == 2]
    assert world.handed(world.handle(TasksReturned(2, second[1:]))) == [(2, second[1])]


@pytest.mark.parametrize("other", [PLAIN_NO, BLUE_NO])
def test_a_worker_is_not_asked_for_tasks_that_no_idle_one_may_run_another_is_started(other: int) -> None:
    world = World(workers=2, cpus=2)
    ((red, long),) = world.submit(RED_NO)
    ((idle, short),) = world.submit(other)
    assert world.submit(RED_NO) == [(red, behind := world.task())], "both CPUs are in use"
    assert world.finish(idle, short) == []
    assert world.idle == [idle, 3] and world.asked == [red], "worker 3 was started, and then somebody could take it"
    assert world.handed(world.handle(TasksReturned(red, [behind]))) == [(3, behind)]
    assert world.finish(3, behind) == world.finish(red, long) == []
    assert len(world.node.scheduler.workers) == 3 and world.asked == [red]


def test_tasks_behind_a_long_one_are_taken_back_for_one_of_their_own_rather_than_for_a_new_one() -> None:
    world = World(workers=3, cpus=3)
    ((red, _),) = world.submit(RED_NO)
    ((blue, _),) = world.submit(BLUE_NO)
    ((idle, short),) = world.submit(BLUE_NO)
    world.submit(RED_NO)
    ((_, behind),) = world.submit(BLUE_NO)
    holder = next(w.client for w in world.node.scheduler.workers.values() if behind in w.in_flight)
    world.finish(idle if holder == blue else blue, short if holder == blue else next(iter(world.flight(blue))))
    assert world.asked == [holder] and len(world.node.scheduler.workers) == 3, "not the red one, and nobody is started"
    assert red != holder


def test_when_the_worker_whose_calls_are_spent_was_the_only_idle_one_another_is_started() -> None:
    world = World(workers=2, cpus=2)
    ((busy, _),) = world.submit(PLAIN_NO)
    assert world.run(TWICE_NO) != busy
    ((other, last),) = world.submit(TWICE_NO)
    world.submit(PLAIN_NO)
    world.finish(other, last)
    assert world.idle == [other, 3] and world.asked == [busy]


def test_more_idle_workers_than_a_few_end_at_once_the_oldest_first() -> None:
    world = World(workers=1, cpus=1)
    limit = 2 * 1 + SPARE_WORKERS
    for number in range(10):
        options = TaskOptions(TASK, F, "f", resources=(("CPU", UNIT),), runtime_env=f'{{"n": {number}}}')
        world.handle(TemplateDefined(DRIVER, 100 + number, options))
        world.run(100 + number)
        world.tick()
        assert len(world.idle) <= limit
    assert world.ended == [1, 2, 3, 4, 5, 6] and world.idle == [7, 8, 9, 10]
    world.now += IDLE_WORKER_S
    world.tick()
    assert world.idle == [10], "as many as there are CPUs stay"


def test_without_environments_workers_end_as_ever() -> None:
    world = World(workers=8, cpus=1, environments=False)
    world.tick()
    assert len(world.idle) == 8 and not world.ended
    world.now += IDLE_WORKER_S
    world.tick()
    assert len(world.idle) == 1


def test_a_function_with_max_calls_is_handed_over_one_call_at_a_time_and_ends_its_worker() -> None:
    world = World(workers=1, cpus=1)
    (first,) = world.submit(*[TWICE_NO] * 3)
    assert first[0] == 1
    (second,) = world.finish(*first)
    assert second[0] == 1
    (third,) = world.finish(*second)
    assert third[0] == 2 and not world.ended
    world.tick()
    assert world.ended == [1]
    world.handle(WorkerDied(1, "exited with status 0", None))
    assert world.finish(*third) == [] and world.idle == [2]


def test_calls_are_counted_over_other_work_in_between() -> None:
    world = World(workers=1, cpus=1)
    assert [world.run(number) for number in (TWICE_NO, PLAIN_NO, TWICE_NO)] == [1, 1, 1]
    assert world.run(PLAIN_NO) == 2, "worker 1 has had its two calls"


def test_an_environment_whose_worker_dies_is_set_up_in_another_one() -> None:
    world = World(workers=1, cpus=1)
    ((worker, task),) = world.submit(RED_NO)
    assert world.handed(world.handle(WorkerDied(worker, "was killed by SIGKILL", task))) == [(2, task)]
    assert world.set_up == {1: RED, 2: RED}
