"""The node's decisions, without a process: an event goes in, commands come out."""

from __future__ import annotations

import pickle
from typing import Any

import pytest

from minray import ids
from minray.messages import (
    DRIVER, ActorKillRequested, AssignResources, BlockRequested, CancelRequested, CancelTask, Command, DefineFunction, DefineTemplate,
    Event, ExitWorker, Forget, FunctionExported, GcsStalled, HoldNext, KillWorker, NodeQueried, ObjectPut, ObjectsAwaited, ReferencesChanged, Reply,
    RequestAbandoned, RunTasks, StartWorker, TakeBack, TasksFinished, TasksReturned, TasksSubmitted, TemplateDefined,
    Ticked, Unpinned, Warn, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.node_workers import START_ATTEMPTS
from minray.scheduler import SILENT_S, STARVED_S
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_METHOD, CANCELLED, DEAD, ERROR, FAILED, FINISHED, OK, PENDING_ARGS_AVAIL,
    PENDING_NODE_ASSIGNMENT, RETRYABLE_ERROR, TASK, UNIT,
    ActorOptions, TaskOptions, TaskSpec,
)  # fmt: skip

F = b"f" * 16
PLAIN = TaskOptions(TASK, F, "f", resources=(("CPU", UNIT),))
ROOT = ids.root_task_id(b"job")
VALUE = b"\x80\x05N."


def task_id(number: int, parent: bytes = ROOT) -> bytes:
    return ids.pack_id(ids.children_prefix(parent), number, 0)


T1, T2, T3, T4, T5 = (task_id(number) for number in range(1, 6))


class World:
    """A node, its driver, and workers that do what the test says."""

    def __init__(self, workers: int = 1, cpus: int = 1, **options: Any) -> None:
        self.node = Node({"CPU": cpus * UNIT}, 1 << 20, lambda object_id: "/spill/" + object_id.hex())
        self.now = 1000.0
        for _ in range(workers):
            self.worker()
        self.handle(FunctionExported(DRIVER, F, b"code", "f", "m", None))
        self.template(DRIVER, 1, **options)

    def worker(self) -> int:
        (started,) = self.node.start_workers(1)
        assert isinstance(started, StartWorker)
        self.handle(WorkerStarted(started.client, 100 + started.client))
        return started.client

    def template(self, client: int, number: int, **options: Any) -> None:
        self.handle(TemplateDefined(client, number, PLAIN._replace(**options)))

    def handle(self, event: Event) -> list[Command]:
        commands = self.node.handle(event, self.now)
        self.node.check()
        return commands

    def submit(self, *task_ids: bytes, client: int = DRIVER, parent: bytes = ROOT, **fields: Any) -> list[Command]:
        specs = [TaskSpec(one, 1, **fields) for one in task_ids]
        return self.handle(TasksSubmitted(client, parent, specs))

    def finish(self, worker: int, one: bytes, status: int = OK, payload: Any = VALUE) -> list[Command]:
        return self.handle(TasksFinished(worker, [(one, status, payload, self.now, self.now + 0.01)]))

    def state(self, one: bytes) -> int:
        return self.node.lineage.tasks[one].state

    def error(self, object_id: bytes) -> BaseException:
        entry = self.node.objects[object_id]
        assert entry.is_error
        error: BaseException = pickle.loads(entry.data)
        return error


def runs(worker: int, *task_ids: bytes, values: Any = None, hold: bool = False) -> RunTasks:
    return RunTasks(worker, [(one, 0, None, values, hold) for one in task_ids])


def to_run(commands: list[Command]) -> list[tuple[int, list[bytes]]]:
    return [(c.client, [task[0] for task in c.tasks]) for c in commands if isinstance(c, RunTasks)]


# ---------------------------------------------------------------- a task's way


def test_a_worker_is_told_what_it_does_not_know_and_then_what_to_run() -> None:
    world = World()
    assert world.submit(T1) == [
        AssignResources(1, 1.0, (), {"CPU": 1.0}),
        DefineFunction(1, F, b"code"),
        DefineTemplate(1, 0, PLAIN),
        runs(1, T1),
    ]
    assert world.finish(1, T1) == []
    assert world.submit(T2) == [runs(1, T2)], "it knows by now"


def test_a_result_is_there_for_the_driver_to_read() -> None:
    world = World()
    world.submit(T1)
    world.finish(1, T1)
    entry = world.node.objects[T1]
    assert (entry.data, entry.size, entry.is_error) == (VALUE, len(VALUE), False)
    assert world.state(T1) == FINISHED


def test_results_of_short_tasks_may_wait_for_each_other() -> None:
    world = World()
    world.submit(T1)
    world.handle(TasksFinished(1, [(T1, OK, VALUE, 1000.0, 1000.0001)]))
    assert world.submit(T2) == [runs(1, T2, hold=True)]


def test_a_task_with_two_returns_fills_two_objects() -> None:
    world = World(num_returns=2)
    world.submit(T1)
    second = ids.return_id(T1, 1)
    world.finish(1, T1, payload=[(b"a", 1, ()), (b"b", 1, ())])
    assert (world.node.objects[T1].data, world.node.objects[second].data) == (b"a", b"b")


def test_a_task_that_returns_nothing_is_forgotten_when_it_has_ended() -> None:
    world = World(num_returns=0)
    world.submit(T1)
    world.finish(1, T1, payload=[])
    assert not world.node.lineage.tasks and not world.node.objects


def test_a_task_waits_for_its_arguments_and_gets_their_values() -> None:
    world = World()
    world.submit(T1)
    assert world.submit(T2, deps=(T1,)) == []
    assert world.state(T2) == PENDING_ARGS_AVAIL
    assert to_run(world.finish(1, T1)) == [(1, [T2])]
    assert world.node.lineage.tasks[T2].missing == 0


def test_the_same_argument_twice_is_waited_for_twice() -> None:
    world = World()
    world.submit(T1)
    world.submit(T2, deps=(T1, T1))
    assert world.finish(1, T1) == [runs(1, T2, values=[(VALUE, len(VALUE), False, T1)] * 2)]


def test_an_argument_that_failed_goes_to_the_worker_who_names_it() -> None:
    world = World()
    world.submit(T1)
    world.submit(T2, deps=(T1,))
    assert world.finish(1, T1, ERROR, (b"error", "it raised")) == [runs(1, T2, values=[(b"error", 5, True, T1)])]


def test_a_task_that_asks_for_more_than_there_is_fails_at_once_and_says_so() -> None:
    world = World(resources=(("CPU", 5 * UNIT),))
    assert world.submit(T1) == []
    assert "needs 5 CPU, and this node has 1 CPU" in str(world.error(T1))


# ---------------------------------------------------------------- death and retries


def test_a_task_that_kills_its_worker_runs_again_then_fails() -> None:
    world = World(workers=2, max_retries=1)
    assert to_run(world.submit(T1)) == [(2, [T1])]
    assert to_run(world.handle(WorkerDied(2, "was killed by SIGKILL", T1))) == [(1, [T1])]
    assert world.handle(WorkerDied(1, "was killed by SIGKILL", T1)) == []
    text = str(world.error(T1))
    assert "worker 1 (pid 101, node head) was killed by SIGKILL while running f()" in text
    assert "attempt 2 of 2" in text and "may have run partway" in text and "max_retries" in text


def test_tasks_that_had_only_been_handed_over_lose_no_attempt_and_keep_their_order() -> None:
    world = World(max_retries=0)
    world.submit(T1, T2, T3)
    assert world.handle(WorkerDied(1, "was killed by SIGKILL", T1)) == [StartWorker(2)]
    assert world.state(T1) == FAILED
    assert to_run(world.handle(WorkerStarted(2, 102))) == [(2, [T2, T3])]
    assert world.node.lineage.tasks[T2].attempt == 1


def test_a_task_that_must_not_run_twice_is_not_run_again_when_its_result_was_lost_on_the_way() -> None:
    world = World(max_retries=0)
    world.submit(T1, T2, T3)
    commands = world.handle(WorkerDied(1, "was killed with the zygote, its parent", T2))  # T1 had ended.
    assert to_run(commands + world.handle(WorkerStarted(2, 102))) == [(2, [T3])]
    for one in (T1, T2):
        assert "may have run partway" in str(world.error(one))


def test_retries_without_end_do_not_end() -> None:
    world = World(max_retries=-1)
    world.submit(T1)
    for worker in range(1, 9):
        world.handle(WorkerDied(worker, "was killed by SIGKILL", T1))
        world.handle(WorkerStarted(worker + 1, 1))
    assert world.state(T1) not in (FINISHED, FAILED) and world.node.lineage.tasks[T1].attempt == 9


def test_a_retryable_error_is_retried_and_the_last_one_is_the_result() -> None:
    world = World(max_retries=1)
    world.submit(T1)
    again = world.finish(1, T1, RETRYABLE_ERROR, (b"first", "raised"))[-1]
    assert again == RunTasks(1, [(T1, 0, None, None, -1)]), "it hears that it has raised once"
    assert world.finish(1, T1, RETRYABLE_ERROR, (b"second", "raised")) == []
    assert world.node.objects[T1].data == b"second"


def test_the_dead_are_not_heard() -> None:
    world = World(workers=2, cpus=2)
    world.submit(T1)
    world.handle(WorkerDied(2, "was killed by SIGKILL", T1))
    before = world.node.lineage.tasks[T1].worker
    for event in (
        TasksFinished(2, [(T1, OK, b"late", 1.0, 2.0)]),
        TasksReturned(2, [T1]),
        TasksSubmitted(2, T1, [TaskSpec(T2, 1)]),
        ReferencesChanged(2, [T1], [T1]),
        ObjectsAwaited(2, 1, [T1], 1, True, True),
        BlockRequested(2, 2, T1, 100_000),
        ObjectPut(2, ids.put_id(T1, 1), (b"x", 1, ())),
        Unpinned(2, [T1]),
        CancelRequested(2, T1, True, True),
        WorkerStarted(2, 5),
        WorkerDied(2, "again", T1),
    ):
        assert world.handle(event) == [], event
    assert world.node.objects[T1].data is None and before is not None and before.client == 1


def test_workers_that_cannot_start_fail_what_waits_rather_than_let_it_wait_for_ever() -> None:
    world = World(workers=0)
    commands = world.submit(T1)
    for _ in range(START_ATTEMPTS):
        assert [type(c) for c in commands] == [StartWorker]
        commands = world.handle(WorkerDied(commands[0].client, "exited with code 1", None))  # type: ignore[union-attr]
    assert commands == []
    assert "no worker could be started: exited with code 1. It was not run." in str(world.error(T1))


def test_workers_that_die_together_while_they_start_are_one_failure() -> None:
    """A zygote that is killed takes all with it that it had been asked for."""
    world = World(workers=0, cpus=5)
    tasks = [task_id(number) for number in range(1, 6)]
    for task in tasks:
        world.submit(task)
    for attempt in range(1, START_ATTEMPTS + 1):
        starting = [worker.client for worker in world.node.scheduler.workers.values()]
        assert len(starting) == 5
        assert not any(world.node.objects[task].data for task in tasks), f"they failed at attempt {attempt}"
        for client in starting:
            world.handle(WorkerDied(client, "was killed with the zygote, its parent", None))
    assert all("no worker could be started" in str(world.error(task)) for task in tasks)


def test_a_childs_result_survives_its_parents_first_attempt() -> None:
    """The first attempt dies and its refs with it; the second submits the same child and waits for it."""
    world = World(workers=3, cpus=3)
    world.submit(T1)
    child = task_id(1, T1)
    world.template(3, 1)
    assert to_run(world.submit(child, client=3, parent=T1)) == [(2, [child])]
    assert to_run(world.handle(WorkerDied(3, "was killed by SIGKILL", T1))) == [(1, [T1])]
    assert not world.node.objects[child].refs, "it is only kept for the second attempt"
    world.template(1, 1)
    assert world.submit(child, client=1, parent=T1) == [], "it runs already, and is not run twice"
    world.handle(ObjectsAwaited(1, 1, [child], 1, True, True))
    assert Reply(1, 1, [(VALUE, len(VALUE), False, child)]) in world.finish(2, child)


@pytest.mark.parametrize("constructed_first", [True, False])
def test_an_actor_outlives_its_makers_first_attempt_if_the_second_comes_in_time(constructed_first: bool) -> None:
    world = World(workers=3, cpus=3)
    world.submit(T1)
    actor_id, call = task_id(1, T1), task_id(2, T1)
    creation = PLAIN._replace(kind=ACTOR_CREATION, resources=(), max_retries=0)
    method = PLAIN._replace(kind=ACTOR_METHOD, function_id=b"", method="m", resources=())
    made = [TaskSpec(actor_id, 2, actor=ActorOptions("A")), TaskSpec(call, 3, actor_id=actor_id)]
    for worker in (1, 3):
        world.handle(TemplateDefined(worker, 2, creation))
        world.handle(TemplateDefined(worker, 3, method))
    assert to_run(world.handle(TasksSubmitted(3, T1, made))) == [(2, [actor_id])]
    if constructed_first:
        assert to_run(world.finish(2, actor_id)) == [(2, [call])]
    world.handle(WorkerDied(3, "was killed by SIGKILL", T1))
    if not constructed_first:
        assert to_run(world.finish(2, actor_id)) == [(2, [call])]
    assert world.node.actors.actors[actor_id].unwanted, "its handle is gone; it ends when its call has"
    assert to_run(world.handle(TasksSubmitted(1, T1, made))) == []
    assert world.finish(2, call) == [], "it is wanted again"
    assert ExitWorker(2) in world.handle(ReferencesChanged(1, [], [actor_id]))
    world.handle(ReferencesChanged(1, [], [call]))
    assert not world.node.actors.actors
    assert list(world.node.lineage.tasks) == [T1, call], "what became of the call is kept for a third attempt"
    world.finish(1, T1)
    assert list(world.node.lineage.tasks) == [T1]


# ---------------------------------------------------------------- cancel


def test_a_task_that_waits_for_its_arguments_is_cancelled_at_once() -> None:
    world = World()
    world.submit(T1)
    world.submit(T2, deps=(T1,))
    assert world.handle(CancelRequested(DRIVER, T2, False, True)) == []
    assert "It had not started" in str(world.error(T2))
    assert world.finish(1, T1) == [], "its argument comes, and it does not run"


def test_the_only_queued_task_is_cancelled_while_others_run() -> None:
    world = World()
    world.submit(*(task_id(number) for number in range(1, 6)))
    assert world.state(T5) == PENDING_NODE_ASSIGNMENT
    assert world.handle(CancelRequested(DRIVER, T5, False, True)) == []
    assert "It had not started" in str(world.error(T5))


def test_a_running_task_is_cancelled_by_its_worker() -> None:
    world = World()
    world.submit(T1)
    assert world.handle(CancelRequested(DRIVER, T1, False, True)) == [CancelTask(1, T1)]
    world.finish(1, T1, CANCELLED, (b"", "cancelled"))
    assert "may have run partway" in str(world.error(T1))


def test_force_kills_the_worker_only_while_it_runs_that_task() -> None:
    world = World()
    world.submit(T1)
    assert world.handle(CancelRequested(DRIVER, T1, True, True)) == [KillWorker(1, T1), CancelTask(1, T1)]
    world.handle(WorkerDied(1, "was killed by SIGKILL", T1))
    assert world.state(T1) == FAILED, "no retry was asked for"


def test_a_cancelled_task_that_its_dead_worker_had_not_begun_is_not_run_elsewhere() -> None:
    world = World(workers=2)
    world.submit(T1, T2)
    assert world.handle(CancelRequested(DRIVER, T2, False, True)) == [CancelTask(2, T2)]
    assert to_run(world.handle(WorkerDied(2, "was killed by SIGKILL", T1))) == [(1, [T1])]
    assert "was cancelled" in str(world.error(T2))


def test_a_cancelled_task_that_is_given_back_is_not_run_elsewhere() -> None:
    world = World()
    world.submit(T1, T2)
    world.handle(CancelRequested(DRIVER, T2, False, True))
    assert world.handle(TasksReturned(1, [T2])) == []
    assert "It had not started" in str(world.error(T2))


def silent_worker(set_back_s: float = 0.0) -> World:
    """Worker 1 has executed T1 and executes T3; T2 and T4 had been handed to it, and T4 was given to worker 2 unasked."""
    world = World(cpus=2)
    world.submit(T1, T2, T3, T4)
    world.finish(1, T1)
    world.handle(CancelRequested(DRIVER, T2, False, True))
    started = world.handle(WorkerStarted(2, 102))
    assert TakeBack(1, 1) in started
    world.now += 2 * SILENT_S - set_back_s
    assert world.handle(Ticked()) == [HoldNext(1)]
    world.now += 2 * SILENT_S - set_back_s
    commands = world.handle(Ticked(executing=((1, T3),)))
    assert Forget(1, [T4]) in commands
    assert to_run(commands) == [(2, [T4])]
    return world


def test_a_clock_that_is_set_back_makes_nobody_wait_for_that_time() -> None:
    world = silent_worker(set_back_s=3600.0)
    assert world.node.lineage.tasks[T4].worker is world.node.scheduler.workers[2]


def test_a_worker_that_could_not_be_asked_is_not_given_the_same_tasks_again_before_it_is_heard() -> None:
    world = World(cpus=2)
    world.submit(T1, T2, T3, T4)
    world.finish(1, T1)
    world.handle(WorkerStarted(2, 102))
    world.now += 2 * SILENT_S
    assert world.handle(Ticked()) == [HoldNext(1)]
    assert to_run(world.handle(TasksReturned(1, [T4]))) == [(2, [T4])]  # That was on its way when it fell silent.
    world.handle(ObjectsAwaited(2, 1, [T3], 1, False, True))  # So worker 1 is the only one that could have more.
    world.now += 2 * SILENT_S
    commands = world.handle(Ticked(executing=((1, T2),)))
    assert Forget(1, [T3]) in commands and to_run(commands) == []
    assert to_run(world.handle(WorkerStarted(3, 103))) == [(3, [T3])]


def test_what_a_worker_gives_back_before_it_has_read_that_others_have_it_is_not_believed() -> None:
    world = silent_worker()
    world.finish(1, T3)
    assert to_run(world.handle(WorkerDied(2, "was killed by SIGKILL", T4))) == [(1, [T4])]
    assert world.handle(TasksReturned(1, [T4], 0)) == []  # It means what it had in hand before.
    assert world.node.lineage.tasks[T4].worker is world.node.scheduler.workers[1]


def test_what_a_worker_gave_back_before_it_fell_silent_and_nobody_else_has_comes_back() -> None:
    world = silent_worker()
    world.handle(TasksReturned(1, [T2], 0))  # It was on its way when T4 was given to the other.
    assert "It had not started" in str(world.error(T2))


def test_cancelling_a_parent_cancels_its_children_and_theirs() -> None:
    world = World(workers=3, cpus=3)
    world.submit(T1)
    for worker in (1, 2, 3):
        world.template(worker, 1)
    child = task_id(3, T1)  # Two numbers before it were never submitted.
    grandchild = task_id(1, child)
    world.submit(child, client=3, parent=T1)
    world.submit(grandchild, client=2, parent=child)
    assert world.handle(CancelRequested(DRIVER, T1, False, False)) == [CancelTask(3, T1)]
    assert world.handle(CancelRequested(DRIVER, T1, False, True)) == [
        CancelTask(1, grandchild), CancelTask(2, child), CancelTask(3, T1),
    ]  # fmt: skip


def test_cancelling_what_has_ended_or_was_never_there_does_nothing() -> None:
    world = World()
    world.submit(T1)
    world.finish(1, T1)
    assert world.handle(CancelRequested(DRIVER, T1, True, True)) == []
    assert world.handle(CancelRequested(DRIVER, T5, True, True)) == []
    assert world.node.objects[T1].data == VALUE


# ---------------------------------------------------------------- waiting


def test_a_worker_that_waits_lends_its_cpu_until_it_is_answered() -> None:
    world = World()
    world.submit(T1)
    world.template(1, 1)
    child = task_id(1, T1)
    world.submit(child, client=1, parent=T1)
    assert world.handle(ObjectsAwaited(1, 7, [child], 1, True, True)) == [], "the child is still in its hands"
    assert world.handle(TasksReturned(1, [child])) == [StartWorker(2)]
    assert to_run(world.handle(WorkerStarted(2, 102))) == [(2, [child])]
    assert world.finish(2, child) == [Reply(1, 7, [(VALUE, len(VALUE), False, child)])]
    assert world.node.scheduler.available == {"CPU": 0}


def test_what_is_ready_is_answered_at_once() -> None:
    world = World()
    world.submit(T1)
    world.finish(1, T1)
    assert world.handle(ObjectsAwaited(DRIVER, 3, [T1], 1, True, False)) == [Reply(DRIVER, 3, None)]


def test_get_of_many_is_answered_by_the_first_error_and_wait_is_not() -> None:
    world = World()
    world.submit(T1, T2)
    world.handle(ObjectsAwaited(DRIVER, 1, [T1, T2], 2, True, False))
    world.handle(ObjectsAwaited(DRIVER, 2, [T1, T2], 2, False, False))
    assert world.finish(1, T1, ERROR, (b"error", "raised")) == [Reply(DRIVER, 1, None)]
    assert world.finish(1, T2) == [Reply(DRIVER, 2, None)]


def test_a_worker_is_told_which_objects_are_ready() -> None:
    world = World(workers=2, cpus=2)
    world.submit(T1, T2)
    world.handle(ReferencesChanged(2, [T1, T2], []))
    world.handle(ObjectsAwaited(2, 1, [T1, T2], 1, False, True))
    assert Reply(2, 1, [True, False]) in world.finish(1, T1)


def test_a_request_that_was_given_up_is_not_answered_and_its_cpu_is_taken_again() -> None:
    world = World(workers=2, cpus=2)
    world.submit(T1)
    world.submit(T2)
    world.handle(ReferencesChanged(1, [T1], []))
    world.handle(ObjectsAwaited(1, 1, [T1], 1, False, True))
    assert world.node.scheduler.available == {"CPU": UNIT}
    world.handle(RequestAbandoned(1, 1))
    assert world.node.scheduler.available == {"CPU": 0}
    assert not [c for c in world.finish(2, T1) if isinstance(c, Reply)]


def test_a_freed_object_is_an_error_to_whoever_asks_for_it() -> None:
    world = World()
    world.submit(T1)
    world.finish(1, T1)
    world.handle(ReferencesChanged(DRIVER, [], [T1]))
    assert not world.node.objects
    world.handle(ObjectsAwaited(DRIVER, 1, [T1], 1, True, False))
    assert "has been freed" in str(world.error(T1))


# ---------------------------------------------------------------- taking back


def test_tasks_come_back_to_the_front_of_the_queue() -> None:
    world = World()
    world.submit(*(task_id(number) for number in range(1, 7)))
    world.worker()
    world.node.scheduler.total["CPU"] += UNIT
    world.node.scheduler.available["CPU"] += UNIT
    assert to_run(world.handle(NodeQueried(DRIVER, 1, "available"))) == [(2, [T5, task_id(6)])]


def test_a_worker_with_empty_hands_is_not_asked_again_before_it_has_finished_something() -> None:
    world = World(workers=1, cpus=2)
    world.submit(T1, T2)
    started = world.node.start_workers(1)[0]
    assert isinstance(started, StartWorker)
    asked = [c for c in world.handle(WorkerStarted(started.client, 1)) if isinstance(c, TakeBack)]
    assert len(asked) == 1
    assert world.handle(TasksReturned(1, [])) == []
    world.now += 1
    assert world.handle(Ticked()) == []
    world.finish(1, T1)
    assert not world.node.scheduler.workers[1].taking_back


def test_surplus_workers_are_told_to_end() -> None:
    world = World(workers=2)
    assert world.node.wake_at == 1002.0
    world.now = 1002.0
    assert world.handle(Ticked()) == [ExitWorker(1)]
    assert world.node.wake_at is None


# ---------------------------------------------------------------- what keeps what


def test_arguments_live_until_the_task_has_ended() -> None:
    world = World()
    put = ids.put_id(ROOT, 1)
    world.handle(ObjectPut(DRIVER, put, (b"big", 3, ())))
    world.submit(T1, deps=(put,), nested=(put,))
    world.handle(ReferencesChanged(DRIVER, [], [put]))
    assert world.node.objects[put].refs == 2
    world.finish(1, T1)
    assert put not in world.node.objects


def test_an_object_lives_as_long_as_one_that_contains_it() -> None:
    world = World()
    inner, outer = ids.put_id(ROOT, 1), ids.put_id(ROOT, 2)
    world.handle(ObjectPut(DRIVER, inner, (b"inner", 5, ())))
    world.handle(ObjectPut(DRIVER, outer, (b"outer", 5, (inner,))))
    world.handle(ReferencesChanged(DRIVER, [], [inner]))
    assert inner in world.node.objects
    world.handle(ReferencesChanged(DRIVER, [], [outer]))
    assert not world.node.objects


def test_a_chain_of_a_hundred_thousand_objects_is_freed_without_recursion() -> None:
    world = World()
    before: tuple[bytes, ...] = ()
    for number in range(1, 100_001):
        object_id = ids.put_id(ROOT, number)
        world.node.handle(ObjectPut(DRIVER, object_id, (b"x", 1, before)), 0.0)
        if before:
            world.node.handle(ReferencesChanged(DRIVER, [], list(before)), 0.0)
        before = (object_id,)
    world.node.handle(ReferencesChanged(DRIVER, [], list(before)), 0.0)
    assert not world.node.objects


def test_a_task_whose_results_nobody_wants_any_more_still_runs() -> None:
    world = World()
    world.submit(T1)
    world.handle(ReferencesChanged(DRIVER, [], [T1]))
    assert T1 in world.node.lineage.tasks and T1 not in world.node.objects
    world.finish(1, T1)
    assert not world.node.lineage.tasks


def test_a_dead_worker_holds_nothing() -> None:
    world = World(workers=2, cpus=2)
    world.submit(T1)
    world.template(2, 1)
    world.handle(ObjectPut(2, ids.put_id(T1, 1), (b"x", 1, ())))
    world.handle(WorkerDied(2, "was killed by SIGKILL", T1))
    assert ids.put_id(T1, 1) not in world.node.objects


# ---------------------------------------------------------------- rows and questions


def test_a_task_that_changed_often_has_one_row() -> None:
    world = World()
    world.submit(T1)
    world.finish(1, T1)
    rows = world.node.take_rows(world.now)["tasks"]
    assert len(rows) == 1 and rows[0][1] == T1 and rows[0][5] == FINISHED
    assert "tasks" not in world.node.take_rows(world.now)


def test_the_node_describes_itself_in_plain_data() -> None:
    world = World(cpus=2)
    world.submit(T1)
    for what in ("resources", "available", "workers", "actors", "memory"):
        (reply,) = world.handle(NodeQueried(DRIVER, 1, what))
        assert isinstance(reply, Reply) and pickle.loads(pickle.dumps(reply.answer)) == reply.answer
    assert world.node.describe("available") == {"CPU": 1.0}
    with pytest.raises(ValueError, match="weather"):
        world.node.describe("weather")


def make_actor(world: World, actor_id: bytes, client: int = DRIVER, parent: bytes = ROOT, **options: Any) -> list[Command]:
    world.template(client, 2, kind=ACTOR_CREATION, max_retries=0, resources=(), checkpoint_every=5)
    spec = TaskSpec(actor_id, 2, actor=ActorOptions("A", **options))
    return world.handle(TasksSubmitted(client, parent, [spec]))


def test_an_actor_that_was_refused_for_want_of_space_is_an_error_to_whoever_has_its_handle() -> None:
    world = World()
    world.handle(GcsStalled(DRIVER, "OutOfDiskError", "the disk is full"))
    make_actor(world, T1, name="a", detached=True)
    assert "the disk is full" in str(world.error(T1))
    assert world.node.actors.find("", "a") is None
    assert "actors" not in world.node.take_rows(world.now)


def test_the_last_row_of_an_actor_is_not_lost_when_another_is_refused_under_its_id() -> None:
    world = World()
    world.submit(T1)
    child = task_id(1, T1)
    make_actor(world, child, 1, T1)
    world.node.take_rows(world.now)
    world.handle(WorkerStarted(2, 102))
    world.handle(ActorKillRequested(DRIVER, child, True))
    world.handle(ReferencesChanged(1, [], [child]))
    world.handle(GcsStalled(DRIVER, "OutOfDiskError", "the disk is full"))
    make_actor(world, child, 1, T1)  # As its parent's second attempt does.
    (row,) = world.node.take_rows(world.now)["actors"]
    assert (row[0], row[1], row[6]) == (1, child, DEAD)


def test_an_actor_that_nobody_wants_any_more_is_killed_while_its_state_is_made_again() -> None:
    world = World()
    world.template(DRIVER, 3, kind=ACTOR_METHOD, function_id=b"", method="call", resources=())
    make_actor(world, T1, max_restarts=-1)
    world.finish(1, T1)
    world.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(T2, 3, actor_id=T1)]))
    world.finish(1, T2)
    world.handle(WorkerDied(1, "was killed by SIGKILL", None))
    world.handle(WorkerStarted(2, 102))
    assert to_run(world.finish(2, T1)) == [(2, [T2])]
    # The call may wait for something: it would be answered by nobody.
    assert world.handle(ReferencesChanged(DRIVER, [], [T1, T2])) == [KillWorker(2)]


def test_who_waits_for_what_actors_hold_is_told_once() -> None:
    node = Node({"CPU": 10_000}, 1 << 20, lambda object_id: "/spill")
    node.handle(TemplateDefined(0, 1, TaskOptions(ACTOR_CREATION, b"", "A.__init__", resources=(("CPU", 10_000),))), 0.0)
    node.handle(TemplateDefined(0, 2, TaskOptions(TASK, b"", "f", resources=(("CPU", 10_000),))), 0.0)
    node.start_workers(1)
    node.handle(WorkerStarted(1, 100), 0.0)
    root = ids.root_task_id(b"job")
    prefix = ids.children_prefix(root)
    creation = TaskSpec(ids.pack_id(prefix, 1, 0), 1, actor=ActorOptions("A"))
    call = TaskSpec(ids.pack_id(prefix, 2, 0), 2)
    node.handle(TasksSubmitted(0, root, [creation, call]), 0.0)
    assert node.wake_at is not None and node.wake_at <= STARVED_S
    assert not [c for c in node.handle(Ticked(), STARVED_S - 1) if isinstance(c, Warn)]
    (warning,) = [c for c in node.handle(Ticked(), STARVED_S) if isinstance(c, Warn)]
    assert "f [task" in warning.text and "1 CPU" in warning.text
    assert not [c for c in node.handle(Ticked(), 3 * STARVED_S) if isinstance(c, Warn)]
