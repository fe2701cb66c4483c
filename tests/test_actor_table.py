"""What becomes of actors and their calls, decided by a node without a process in sight."""

from __future__ import annotations

import itertools
import pickle
from typing import Any

import pytest

from minray import ids
from minray.actor_table import MAX_IN_FLIGHT
from minray.messages import (
    DRIVER, ActorKillRequested, ActorLookedUp, CallsCounted, CancelRequested, ExitWorker, FunctionExported,
    KillWorker, MarkReconstructed, ReferencesChanged, Reply, RunTasks, StartWorker, TasksFinished, TasksSubmitted,
    TemplateDefined, Unpinned, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, ACTOR_METHOD, ALIVE, DEAD, ERROR, FAILED, FINISHED, OK, PENDING_CREATION, RESTARTING,
    SUBMITTED_TO_WORKER, TASK, UNIT, ActorOptions, TaskOptions, TaskSpec,
)  # fmt: skip

NOTHING = pickle.dumps(None)
CLASS = b"c" * 16


class World:
    """A node and the processes around it, which do what the test says."""

    def __init__(self, cpus: int = 2) -> None:
        self.node = Node({"CPU": cpus * UNIT}, 1 << 20, lambda object_id: "")
        self.commands: list[Any] = []
        self.counts: dict[int, Any] = {}
        self.templates: dict[tuple[int, Any], int] = {}
        self.now = itertools.count(1)
        self.handle(FunctionExported(DRIVER, CLASS, b"", "A", "", None))

    def handle(self, event: Any) -> list[Any]:
        commands = self.node.handle(event, float(next(self.now)))
        self.commands += commands
        for command in commands:
            if isinstance(command, StartWorker):
                commands = commands + self.handle(WorkerStarted(command.client, 1000 + command.client))
        return commands

    def submit(self, options: TaskOptions, client: int = DRIVER, deps: Any = (), **more: Any) -> bytes:
        template_no = self.templates.setdefault((client, options), len(self.templates) + 1)
        self.handle(TemplateDefined(client, template_no, options))
        counter = self.counts.setdefault(client, itertools.count(1))
        task_id = ids.pack_id(b"parent%02d" % client, next(counter), 0)
        spec = TaskSpec(task_id, template_no, None if not deps else b"x", deps, (), **more)
        self.handle(TasksSubmitted(client, ids.NIL, [spec]))
        return task_id

    def actor(
        self, client: int = DRIVER, deps: Any = (), cpus: int = 0, threads: int = 1, interface: bytes = b"", **more: Any
    ) -> bytes:
        resources = (("CPU", cpus * UNIT),) if cpus else ()
        options = TaskOptions(
            ACTOR_CREATION, CLASS, "A.__init__", resources=resources, max_retries=0, max_concurrency=threads,
            interface=interface,
        )  # fmt: skip
        return self.submit(options, client, deps, actor=ActorOptions("A", **more))

    def call(self, actor_id: bytes, client: int = DRIVER, deps: Any = (), retries: int = 0, method: str = "f") -> bytes:
        options = TaskOptions(ACTOR_METHOD, b"", f"A.{method}", method=method, max_retries=retries)
        return self.submit(options, client, deps, actor_id=actor_id)

    def pending_object(self) -> bytes:
        """The object of a task that runs for as long as the test likes."""
        return self.submit(TaskOptions(TASK, CLASS, "slow", resources=(("CPU", UNIT),)))

    def finish(self, task_id: bytes, status: int = OK, payload: Any = NOTHING) -> list[Any]:
        worker = self.node.lineage.tasks[task_id].worker
        assert worker is not None
        return self.handle(TasksFinished(worker.client, [(task_id, status, payload, 1.0, 2.0)]))

    def alive(self, **given: Any) -> tuple[bytes, int]:
        """An actor whose constructor has returned, and its worker."""
        actor_id = self.actor(**given)
        self.finish(actor_id)
        worker = self.of(actor_id).worker
        assert worker is not None and self.of(actor_id).state == ALIVE
        return actor_id, worker.client

    def die(self, worker: int, running: bytes | None = None) -> list[Any]:
        return self.handle(WorkerDied(worker, "was killed by SIGKILL", running))

    def drop(self, *object_ids: bytes, client: int = DRIVER) -> list[Any]:
        return self.handle(ReferencesChanged(client, [], list(object_ids)))

    def of(self, actor_id: bytes) -> Any:
        return self.node.actors.actors[actor_id]

    def ran(self, worker: int) -> list[bytes]:
        """What that worker was handed, in order."""
        return [
            task[0] for c in self.commands if isinstance(c, RunTasks) and c.client == worker for task in c.tasks
        ]  # fmt: skip

    def error(self, object_id: bytes) -> Any:
        entry = self.node.objects[object_id]
        assert entry.is_error, "there is no error"
        return pickle.loads(entry.data)

    def look_up(self, name: str, client: int = DRIVER) -> Any:
        (reply,) = [c for c in self.handle(ActorLookedUp(client, 7, "", name)) if isinstance(c, Reply)]
        return reply.answer


@pytest.fixture
def world() -> World:
    return World()


def kinds(commands: list[Any]) -> list[type]:
    return [type(command) for command in commands]


# ---------------------------------------------------------------- order


def test_a_caller_s_calls_wait_for_its_first_and_another_s_do_not(world: World) -> None:
    actor_id, worker = world.alive()
    slow = world.pending_object()
    early, late = world.call(actor_id, deps=(slow,)), world.call(actor_id)
    other = world.call(actor_id, client=worker)
    assert world.ran(worker) == [actor_id, other]
    world.finish(slow)
    assert world.ran(worker) == [actor_id, other, early, late]


def test_calls_wait_for_the_constructor(world: World) -> None:
    actor_id = world.actor()
    call = world.call(actor_id)
    worker = world.of(actor_id).worker.client
    assert world.ran(worker) == [actor_id]
    world.finish(actor_id)
    assert world.ran(worker) == [actor_id, call]


def test_a_caller_with_many_calls_does_not_starve_the_others(world: World) -> None:
    actor_id, worker = world.alive()
    many = [world.call(actor_id) for _ in range(MAX_IN_FLIGHT + 2)]
    one = world.call(actor_id, client=worker)
    assert len(world.ran(worker)) == 1 + MAX_IN_FLIGHT
    world.finish(many[0])
    world.finish(many[1])
    world.finish(many[2])
    assert one in world.ran(worker)


def test_cancelling_the_head_of_a_queue_lets_the_next_go(world: World) -> None:
    actor_id, worker = world.alive()
    slow = world.pending_object()
    head, next_call = world.call(actor_id, deps=(slow,)), world.call(actor_id)
    world.handle(CancelRequested(DRIVER, head, False, True))
    assert type(world.error(head)).__name__ == "TaskCancelledError"
    assert world.ran(worker) == [actor_id, next_call]
    world.finish(slow)
    assert world.ran(worker) == [actor_id, next_call]


# ---------------------------------------------------------------- ends


def test_an_actor_whose_last_handle_goes_ends_when_its_calls_are_done(world: World) -> None:
    actor_id, worker = world.alive()
    call = world.call(actor_id)
    assert world.drop(actor_id) == []
    commands = world.finish(call)
    assert [c for c in commands if isinstance(c, ExitWorker)] == [ExitWorker(worker)]
    assert actor_id not in world.node.actors.actors and actor_id not in world.node.lineage.tasks


def test_an_unwanted_actor_is_constructed_and_then_ends(world: World) -> None:
    actor_id = world.actor()
    world.drop(actor_id)
    assert world.of(actor_id).state == PENDING_CREATION
    assert ExitWorker in kinds(world.finish(actor_id))


def test_an_unwanted_actor_without_calls_is_not_made_anew(world: World) -> None:
    actor_id, worker = world.alive(max_restarts=-1)
    call = world.call(actor_id)
    world.drop(actor_id)
    assert RunTasks not in kinds(world.die(worker, call))
    assert actor_id not in world.node.actors.actors


def test_a_call_to_a_dead_actor_fails_at_once_and_its_argument_does_not_wake_it(world: World) -> None:
    actor_id, worker = world.alive()
    slow = world.pending_object()
    world.handle(ActorKillRequested(DRIVER, actor_id, True))
    call = world.call(actor_id, deps=(slow,))
    assert "was not run" in str(world.error(call))
    world.drop(actor_id)
    assert RunTasks not in kinds(world.finish(slow))
    assert world.ran(worker) == [actor_id]


def test_a_call_through_a_handle_of_another_session_fails_at_once(world: World) -> None:
    call = world.call(b"elsewhere-123456")
    assert type(world.error(call)).__name__ == "ActorDiedError"
    assert "of another session" in str(world.error(call)) and "was not run" in str(world.error(call))


def test_killing_an_actor_that_waits_for_an_argument_ends_its_creation_for_good(world: World) -> None:
    slow = world.pending_object()
    actor_id = world.actor(deps=(slow,), max_restarts=3)
    call = world.call(actor_id)
    world.handle(ActorKillRequested(DRIVER, actor_id, True))
    assert world.of(actor_id).state == DEAD and world.of(actor_id).task.state == FAILED
    assert "kill()" in str(world.error(call))
    world.drop(actor_id)
    assert RunTasks not in kinds(world.finish(slow))


def test_killing_an_actor_that_waits_for_resources_takes_it_out_of_the_queue(world: World) -> None:
    world.alive(cpus=2)
    actor_id = world.actor(cpus=1)
    world.handle(ActorKillRequested(DRIVER, actor_id, True))
    assert not world.node.lineage.tasks[actor_id].template.shape.queue
    assert world.of(actor_id).state == DEAD


def test_killing_an_actor_in_its_constructor_ends_creation_and_process(world: World) -> None:
    actor_id = world.actor(max_restarts=3)
    worker = world.of(actor_id).worker.client
    commands = world.handle(ActorKillRequested(DRIVER, actor_id, True))
    assert KillWorker(worker) in commands
    assert world.of(actor_id).task.state == FAILED and "may have run partway" in str(world.error(actor_id))
    world.die(worker)
    assert world.of(actor_id).restarts == 0


def test_kill_that_allows_a_restart_only_kills_the_process(world: World) -> None:
    actor_id, worker = world.alive(max_restarts=1)
    assert world.handle(ActorKillRequested(DRIVER, actor_id, False)) == [KillWorker(worker)]
    world.die(worker)
    assert world.of(actor_id).state == RESTARTING
    world.finish(actor_id)
    world.handle(ActorKillRequested(DRIVER, actor_id, False))
    assert world.of(actor_id).state == DEAD


def test_what_comes_from_an_actor_after_it_ended_itself_is_fenced_off(world: World) -> None:
    actor_id, worker = world.alive(max_restarts=-1)
    first, last, later = (world.call(actor_id) for _ in range(3))
    results = [
        (first, OK, NOTHING, 1.0, 1.0), (last, ACTOR_EXITED, (b"", "it called exit_actor()"), 1.0, 1.0),
        (later, OK, NOTHING, 1.0, 1.0),
    ]  # fmt: skip
    assert ExitWorker(worker) in world.handle(TasksFinished(worker, results))
    assert "exit_actor()" in str(world.error(last))
    assert "was not run" in str(world.error(later))
    assert world.of(actor_id).pending == 0
    assert world.handle(ReferencesChanged(worker, [], [first])) == []


def test_a_constructor_that_raises_gives_its_error_to_every_call(world: World) -> None:
    actor_id = world.actor(max_restarts=5, name="a")
    before = world.call(actor_id)
    error = pickle.dumps(ValueError("the constructor's"))
    assert ExitWorker in kinds(world.finish(actor_id, ERROR, (error, "ValueError: the constructor's")))
    after = world.call(actor_id)
    assert [str(world.error(call)) for call in (before, after)] == ["the constructor's"] * 2
    assert world.look_up("a") is None


def test_an_actor_that_can_never_run_is_dead_at_once(world: World) -> None:
    actor_id = world.actor(cpus=9, name="a")
    assert type(world.error(world.call(actor_id))).__name__ == "ActorUnschedulableError"
    assert world.of(actor_id).state == DEAD and world.look_up("a") is None


def test_cancelling_reaches_calls_and_leaves_creations_alone(world: World) -> None:
    slow = world.pending_object()
    actor_id = world.actor(deps=(slow,))
    world.handle(CancelRequested(DRIVER, actor_id, True, True))
    assert world.of(actor_id).state == PENDING_CREATION and not world.node.lineage.tasks[actor_id].cancelled
    alive, worker = world.alive()
    call = world.call(alive)
    assert KillWorker not in kinds(world.handle(CancelRequested(DRIVER, call, True, True)))


# ---------------------------------------------------------------- restarts


def test_after_a_crash_begun_calls_fail_and_the_others_go_to_the_new_instance_in_order(world: World) -> None:
    actor_id, worker = world.alive(max_restarts=1)
    ended, running, third, fourth = (world.call(actor_id) for _ in range(4))
    world.die(worker, running)
    for call in (ended, running):
        assert type(world.error(call)).__name__ == "ActorUnavailableError"
        assert "may have run partway" in str(world.error(call))
    commands = world.finish(actor_id)
    second = world.of(actor_id).worker.client
    assert second != worker and world.ran(second) == [actor_id, third, fourth]
    assert [world.node.lineage.tasks[call].attempt for call in (third, fourth)] == [1, 1]
    assert RunTasks in kinds(commands)


def test_calls_with_retries_are_repeated_before_those_that_had_not_begun(world: World) -> None:
    actor_id, worker = world.alive(max_restarts=1)
    calls = [world.call(actor_id, retries=retries) for retries in (1, 0, 1, 0)]
    world.die(worker, calls[2])
    world.finish(actor_id)
    assert world.ran(world.of(actor_id).worker.client) == [actor_id, calls[0], calls[2], calls[3]]
    assert world.node.lineage.tasks[calls[2]].retries_left == 0


@pytest.mark.parametrize(("threads", "known"), [(3, True), (1, False)])
def test_where_it_is_not_known_which_calls_had_begun_all_may_have(threads: int, known: bool, world: World) -> None:
    actor_id, worker = world.alive(max_restarts=1, threads=threads)
    calls = [world.call(actor_id) for _ in range(3)]
    world.die(worker, calls[0] if known else None)
    assert {type(world.error(call)).__name__ for call in calls} == {"ActorUnavailableError"}


def test_a_new_instance_is_told_that_it_is_not_the_first(world: World) -> None:
    actor_id, worker = world.alive(max_restarts=1)
    assert MarkReconstructed not in kinds(world.commands)
    world.die(worker)
    second = world.of(actor_id).worker.client
    assert MarkReconstructed(second) in world.commands


def test_without_restarts_left_every_call_says_whether_it_may_have_run(world: World) -> None:
    actor_id, worker = world.alive()
    running, queued = world.call(actor_id, method="work"), world.call(actor_id)
    world.die(worker, running)
    late = world.call(actor_id)
    assert "was killed by SIGKILL while running A.work()" in str(world.error(running))
    assert "may have run partway" in str(world.error(running))
    for call in (queued, late):
        assert "was not run" in str(world.error(call)) and "SIGKILL" in str(world.error(call))
        assert world.error(call).actor_id == actor_id.hex()


def test_constructor_arguments_are_kept_exactly_as_long_as_a_restart_may_need_them(world: World) -> None:
    argument = world.pending_object()
    world.finish(argument)
    once, worker = world.alive(deps=(argument,), max_restarts=1)
    world.alive(deps=(argument,))
    world.drop(argument)
    assert argument in world.node.objects
    world.die(worker)
    assert argument in world.node.objects
    world.finish(once)
    assert argument not in world.node.objects


# ---------------------------------------------------------------- names


def test_of_two_actors_of_one_name_the_first_to_be_submitted_has_it(world: World) -> None:
    first = world.actor(name="a", interface=b"how")
    second = world.actor(name="a")
    assert world.look_up("a") == (first, b"how")
    assert second not in world.node.actors.actors
    assert "taken by another actor" in str(world.error(second))
    world.drop(second)
    assert second not in world.node.lineage.tasks


def test_whoever_has_looked_an_actor_up_has_it_until_he_says_otherwise(world: World) -> None:
    actor_id, worker = world.alive(name="a")
    assert world.look_up("a") is not None
    world.drop(actor_id)
    assert world.of(actor_id).state == ALIVE
    assert ExitWorker(worker) in world.handle(Unpinned(DRIVER, [actor_id]))


def test_an_asker_that_dies_lets_go_of_what_it_looked_up(world: World) -> None:
    _, asker = world.alive(max_restarts=0)
    actor_id, worker = world.alive(name="a")
    assert world.look_up("a", client=asker) is not None
    world.drop(actor_id)
    assert ExitWorker(worker) in world.die(asker)


def test_a_name_is_free_as_soon_as_nobody_has_a_handle(world: World) -> None:
    actor_id, _ = world.alive(name="a")
    world.call(actor_id)
    world.drop(actor_id)
    assert world.look_up("a") is None
    new = world.actor(name="a")
    assert world.look_up("a")[0] == new


def test_a_name_stays_taken_while_the_actor_is_restarted(world: World) -> None:
    actor_id, worker = world.alive(name="a", max_restarts=1)
    world.die(worker)
    assert world.look_up("a")[0] == actor_id


# ---------------------------------------------------------------- the rest


def test_a_caller_learns_how_many_of_its_own_calls_are_pending(world: World) -> None:
    actor_id, worker = world.alive()
    slow = world.pending_object()
    running = world.call(actor_id)
    world.call(actor_id, deps=(slow,))
    world.call(actor_id, client=worker)

    def pending(client: int) -> Any:
        (reply,) = [c for c in world.handle(CallsCounted(client, 1, actor_id)) if isinstance(c, Reply)]
        return reply.answer

    assert (pending(DRIVER), pending(worker)) == (2, 1)
    world.finish(running)
    assert pending(DRIVER) == 1


def test_a_dead_actor_s_row_still_says_where_it_lived(world: World) -> None:
    actor_id, worker = world.alive()
    world.handle(ActorKillRequested(DRIVER, actor_id, True))
    (row,) = world.node.take_rows(9.0)["actors"]
    assert row[7:9] == (worker, 1000 + worker) and "minray.kill()" in row[14]


def test_actors_are_numbered_once(world: World) -> None:
    numbers = []
    for _ in range(3):
        actor_id, _ = world.alive()
        numbers.append(world.of(actor_id).no)
        world.drop(actor_id)
    assert numbers == [1, 2, 3]


def test_of_an_actor_with_groups_all_calls_are_handed_out_and_of_one_with_threads_so_many_more() -> None:
    world = World()
    actor_id, worker = world.alive(threads=5)
    for _ in range(MAX_IN_FLIGHT + 10):
        world.call(actor_id)
    assert len(world.ran(worker)) == 1 + MAX_IN_FLIGHT + 4
    options = TaskOptions(
        ACTOR_CREATION, CLASS, "B.__init__", max_retries=0, concurrency_groups=(("io", 1),), is_async=True
    )
    grouped = world.submit(options, actor=ActorOptions("B"))
    world.finish(grouped)
    last = [world.call(grouped) for _ in range(MAX_IN_FLIGHT + 10)][-1]
    assert world.node.lineage.tasks[last].state == SUBMITTED_TO_WORKER


def test_calls_that_run_at_the_same_time_are_answered_in_any_order_and_all_may_have_run_when_the_worker_dies() -> None:
    world = World()
    actor_id, worker = world.alive(threads=3)
    calls = [world.call(actor_id) for _ in range(4)]
    world.finish(calls[2])
    world.handle(WorkerDied(worker, "was killed by SIGKILL", calls[0]))
    assert world.node.lineage.tasks[calls[2]].state == FINISHED
    for call in (calls[0], calls[1], calls[3]):
        assert "may have run partway" in str(world.error(call))
