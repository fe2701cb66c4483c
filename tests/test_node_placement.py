"""Placement groups at the node, without a process.  How a group's life goes is told in transcripts/placement_groups.txt."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
from test_node import F, ROOT, T1, T2, T3, VALUE, World, to_run

from minray import ids, node_placement
from minray.messages import (
    DRIVER, ActorKillRequested, AssignResources, Command, FunctionExported, GcsRecovered, GcsStalled, KillWorker, ObjectLost, ObjectsAwaited,
    PlacementGroupRemoved, PlacementGroupRequested, ReferencesChanged, Reply, RequestAbandoned, TasksSubmitted, Ticked, Warn,
    WorkerDied,
)  # fmt: skip
from minray.node import Node
from minray.placement import IN, NODE_ID
from minray.scheduler import STARVED_S
from minray.task_spec import (
    ACTOR_CREATION, CREATED, DEAD, FAILED, INFEASIBLE, PENDING, PENDING_NODE_ASSIGNMENT, REMOVED, RUNNING,
    SUBMITTED_TO_WORKER, UNIT, ActorOptions, TaskSpec,
)  # fmt: skip

P, Q, R = (ids.put_id(ROOT, number) for number in (1, 2, 3))
A = ids.pack_id(ids.children_prefix(ROOT), 50, 0)


class Groups(World):
    """The driver's template 1 is a plain task of 1 CPU; others are made as tests need them."""

    def __init__(self, cpus: float = 2, workers: int = 1, labels: Any = None, **more: float) -> None:
        amounts = {"CPU": cpus, **more}
        resources = {name: round(amount * UNIT) for name, amount in amounts.items()}
        self.node = Node(resources, 1 << 20, lambda object_id: "/spill/" + object_id.hex(), labels=labels)
        self.now = 1000.0
        for _ in range(workers):
            self.worker()
        self.handle(FunctionExported(DRIVER, F, b"code", "f", "m", None))
        self.template(DRIVER, 1)
        self.numbers = itertools.count(2)

    def request(self, group: bytes, *bundles: dict[str, float], strategy: str = "PACK", **more: Any) -> list[Command]:
        wants = [(tuple(sorted((name, round(x * UNIT)) for name, x in bundle.items())), ()) for bundle in bundles]
        fields = {"request_id": 0, "name": "", "detached": False, "value": VALUE, "client": DRIVER, **more}
        client, request_id = fields.pop("client"), fields.pop("request_id")
        return self.handle(
            PlacementGroupRequested(client, request_id, group, fields.pop("bundles", wants), strategy, **fields)
        )

    def remove(self, group: bytes) -> list[Command]:
        return self.handle(PlacementGroupRemoved(DRIVER, group))

    def options(self, **options: Any) -> int:
        number = next(self.numbers)
        self.template(DRIVER, number, **options)
        return number

    def run(self, task_id: bytes, number: int, actor: ActorOptions | None = None) -> list[Command]:
        return self.handle(TasksSubmitted(DRIVER, ROOT, [TaskSpec(task_id, number, actor=actor)]))

    def group_state(self, group: bytes) -> int:
        return self.node.groups[group].state

    def available(self, name: str = "CPU") -> float:
        return self.node.scheduler.available[name] / UNIT


def cpus(amount: float) -> Any:
    return (("CPU", round(amount * UNIT)),) if amount else ()


# ---------------------------------------------------------------- placing


def test_a_group_that_fits_is_placed_at_once_and_its_resources_are_nobody_elses() -> None:
    world = Groups(cpus=4, GPU=1)
    assert world.request(P, {"CPU": 1}, {"CPU": 1.5, "GPU": 1}) == []
    assert world.group_state(P) == CREATED
    assert (world.available(), world.available("GPU")) == (1.5, 0)
    assert world.node.objects[P].data == VALUE
    assert world.node.describe("resources")["CPU"] == 4
    world.remove(P)
    assert (world.group_state(P), world.available(), world.available("GPU")) == (REMOVED, 4, 1)


@pytest.mark.parametrize("strategy", ["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"])
@pytest.mark.parametrize("bundles", list(itertools.chain(*(itertools.product((0.5, 1, 2), repeat=n) for n in (1, 2, 3)))))
@pytest.mark.parametrize("busy", [0, 1])
def test_of_every_small_group_it_is_known_at_once_whether_it_is_placed_waits_or_never_will(strategy, bundles, busy) -> None:
    world = Groups(cpus=2)
    if busy:
        world.submit(T1)
    world.request(P, *({"CPU": amount} for amount in bundles), strategy=strategy)
    impossible = sum(bundles) > 2 or (strategy == "STRICT_SPREAD" and len(bundles) > 1)
    expected = INFEASIBLE if impossible else CREATED if sum(bundles) <= 2 - busy else PENDING
    assert world.group_state(P) == expected
    assert world.available() == 2 - busy - (sum(bundles) if expected == CREATED else 0)
    if busy:
        world.finish(1, T1)
        assert world.group_state(P) == (INFEASIBLE if impossible else CREATED)
    world.remove(P)
    assert world.available() == 2


def test_a_group_waits_until_there_is_enough_for_all_of_it() -> None:
    world = Groups(cpus=2, workers=2)
    world.submit(T1, T2)
    world.request(P, {"CPU": 1}, {"CPU": 1})
    world.handle(ObjectsAwaited(DRIVER, 7, [P], 1, True, False))
    workers = world.node.scheduler.workers
    world.finish(next(number for number, worker in workers.items() if T1 in worker.in_flight), T1)
    assert world.group_state(P) == PENDING, "half of it is not enough, and is not kept either"
    assert world.available() == 1
    (last,) = [worker.client for worker in workers.values() if worker.in_flight]
    assert world.finish(last, T2) == [Reply(DRIVER, 7, None)]
    assert world.group_state(P) == CREATED


def test_one_that_waits_holds_up_only_those_that_want_the_same() -> None:
    world = Groups(cpus=3)
    world.submit(T1)
    world.request(P, {"CPU": 3})
    world.request(Q, {"CPU": 3})
    world.request(R, {"CPU": 2})
    assert [world.group_state(group) for group in (P, Q, R)] == [PENDING, PENDING, CREATED]
    world.remove(R)
    world.finish(1, T1)
    assert [world.group_state(group) for group in (P, Q)] == [CREATED, PENDING]
    world.remove(P)
    assert world.group_state(Q) == CREATED


def test_a_group_comes_before_the_tasks_that_wait_with_it() -> None:
    world = Groups(cpus=2)
    two = world.options(resources=cpus(2))
    world.submit(T1)
    world.run(T2, two)
    world.request(P, {"CPU": 2})
    world.finish(1, T1)
    assert world.group_state(P) == CREATED and world.state(T2) == PENDING_NODE_ASSIGNMENT
    assert to_run(world.remove(P)) == [(1, [T2])]


def test_a_group_is_placed_though_a_queue_never_empties() -> None:
    world = Groups(cpus=2, workers=2)
    tasks = [ids.pack_id(ids.children_prefix(ROOT), 100 + number, 0) for number in range(400)]
    submitted = iter(tasks)
    world.submit(*itertools.islice(submitted, 10))
    world.request(P, {"CPU": 2})
    asked_s = world.now
    while world.group_state(P) == PENDING and world.now < asked_s + 2:
        world.now += 0.01
        for number, worker in world.node.scheduler.workers.items():
            if worker.in_flight:
                world.finish(number, next(iter(worker.in_flight)))
                world.submit(next(submitted))
    assert world.group_state(P) == CREATED, "it has its turn as queues have"
    assert to_run(world.remove(P)), "and then the others go on"
    assert not world.node.scheduler.claims


def test_who_waits_long_for_a_group_is_told_once() -> None:
    world = Groups(cpus=1)
    world.submit(T1)
    world.request(P, {"CPU": 1})
    assert world.node.wake_at == pytest.approx(world.now + STARVED_S)
    world.now += STARVED_S
    (warning,) = [c for c in world.handle(Ticked()) if isinstance(c, Warn)]
    assert "wants (1 CPU) and waits" in warning.text
    world.now += STARVED_S
    assert not [c for c in world.handle(Ticked()) if isinstance(c, Warn)]


def test_who_waits_for_what_a_group_holds_is_told() -> None:
    world = Groups(cpus=1)
    world.request(P, {"CPU": 1})
    world.submit(T1)
    world.now += STARVED_S
    (warning,) = [c for c in world.handle(Ticked()) if isinstance(c, Warn)]
    assert "actors and placement groups hold too much" in warning.text


def test_gpus_of_a_group_are_certain_ones() -> None:
    world = Groups(cpus=4, GPU=3, workers=3)
    world.request(P, {"GPU": 0.5}, {"GPU": 2})
    half = world.options(resources=(("GPU", UNIT // 2),), placement=(P, -1, False))
    whole = world.options(resources=(("GPU", UNIT),), placement=(P, 1, False))
    rest = world.options(resources=(("GPU", UNIT // 2),))
    commands = [*world.run(T1, half), *world.run(T2, whole), *world.run(T3, rest)]
    told = [c.gpu_ids for c in commands if isinstance(c, AssignResources)]
    assert told == [(2,), (0,), (2,)], "the fraction is of a GPU that nobody has whole"


def test_fractions_that_no_gpus_can_be_cut_into_are_infeasible() -> None:
    world = Groups(cpus=1, GPU=2)
    world.request(P, {"GPU": 0.6}, {"GPU": 0.6}, {"GPU": 0.6})
    assert world.group_state(P) == INFEASIBLE


# ---------------------------------------------------------------- running in a group


def test_a_task_takes_its_resources_from_a_bundle_and_gives_them_back_to_it() -> None:
    world = Groups(cpus=4, workers=2)
    world.request(P, {"CPU": 1}, {"CPU": 2})
    second = world.options(resources=cpus(2), placement=(P, 1, False))
    commands = world.run(T1, second)
    assert commands[0] == AssignResources(2, 2.0, (), {"CPU": 2.0}, (P, 1, False))
    assert [bundle.available["CPU"] // UNIT for bundle in world.node.groups[P].bundles] == [1, 0]
    assert world.available() == 1
    world.finish(2, T1)
    assert [bundle.available["CPU"] // UNIT for bundle in world.node.groups[P].bundles] == [1, 2]


def test_any_bundle_will_do_when_none_is_named() -> None:
    world = Groups(cpus=4, workers=4)
    world.request(P, {"CPU": 1}, {"CPU": 1})
    anywhere = world.options(resources=cpus(1), placement=(P, -1, False), max_retries=0)
    ran = [to_run(world.run(one, anywhere)) for one in (T1, T2, T3)]
    assert len(ran[0]) == len(ran[1]) == 1 and ran[0][0][0] != ran[1][0][0]
    held = [w for w in world.node.scheduler.workers.values() if w.in_flight]
    assert len(held) == 2, "a third worker has nothing to lease"


def test_what_a_blocked_worker_lends_stays_in_its_bundle() -> None:
    world = Groups(cpus=2, workers=1)
    world.request(P, {"CPU": 1})
    inside = world.options(resources=cpus(1), placement=(P, 0, True))
    world.run(T1, inside)
    world.handle(ObjectsAwaited(1, 1, [T1], 1, True, True))
    assert world.available() == 1 and world.node.groups[P].bundles[0].available == {"CPU": UNIT}
    world.handle(RequestAbandoned(1, 1))
    assert world.node.groups[P].bundles[0].available == {"CPU": 0}


def test_a_task_of_a_group_waits_for_it_even_if_it_needs_nothing() -> None:
    world = Groups(cpus=1)
    world.submit(T1)
    world.request(P, {"CPU": 1})
    nothing = world.options(resources=(), placement=(P, -1, False))
    world.run(T2, nothing)
    assert world.state(T2) == PENDING_NODE_ASSIGNMENT
    assert to_run(world.finish(1, T1)) == [(1, [T2])]


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"resources": cpus(2), "placement": (P, -1, False)}, r"needs 2 CPU and the bundles of .* have \(1 CPU\) \+ \(1 CPU\)"),
        ({"resources": cpus(2), "placement": (P, 1, False)}, "bundle 1 of placement group .* has 1 CPU: a task must fit into one"),
        ({"resources": cpus(1), "placement": (P, 2, False)}, "bundle 2 of .*, which has bundles 0 to 1"),
        ({"resources": (("x", UNIT),), "placement": (P, 0, False)}, "needs 1 x"),
        ({"resources": cpus(1), "placement": (Q, 0, False)}, "which can never be placed: it wants"),
        ({"resources": cpus(1), "labels": ((("zone", IN, ("b",)),),)}, r"wants a node with zone in \(b\), and this one, .* zone=a"),
        ({"resources": cpus(1), "placement": (P, 0, False), "labels": ((("zone", IN, ("b",)),),)}, "wants a node with zone"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("kind", ["task", "actor"])
def test_what_can_never_run_fails_and_says_why(options, said, kind) -> None:
    world = Groups(cpus=4, labels={"zone": "a"})
    world.request(P, {"CPU": 1}, {"CPU": 1})
    world.request(Q, {"CPU": 99})
    actor = ActorOptions("A") if kind == "actor" else None
    number = world.options(**options, **({"kind": ACTOR_CREATION, "max_retries": 0} if actor else {}))
    world.run(T1, number, actor)
    error = world.error(T1)
    assert type(error).__name__ == ("ActorUnschedulableError" if actor else "TaskUnschedulableError")
    with pytest.raises(type(error), match=said):
        raise error


def test_labels_are_tried_one_after_the_other() -> None:
    world = Groups(cpus=1, labels={"zone": "a"})
    number = world.options(labels=((("zone", IN, ("b",)),), (("zone", IN, ("a",)),)))
    assert to_run(world.run(T1, number)) == [(1, [T1])]


def test_a_node_has_its_id_as_a_label() -> None:
    world = Groups(labels={"zone": "a"})
    assert world.node.describe("labels") == {"zone": "a", NODE_ID: ids.pack_id(b"\0" * 8, 0, ids.NODE).hex()}


# ---------------------------------------------------------------- removing


def test_removing_a_group_ends_what_runs_in_it_and_what_waits_for_it() -> None:
    world = Groups(cpus=3, workers=2)
    world.request(P, {"CPU": 1})
    inside = world.options(resources=cpus(1), placement=(P, 0, False), max_retries=5)
    world.run(T1, inside)
    world.run(T2, inside)
    lonely = world.options(kind=ACTOR_CREATION, resources=(), placement=(P, 0, False), max_retries=0)
    world.run(A, lonely, ActorOptions("A", max_restarts=-1))
    commands = world.remove(P)
    assert [type(c) for c in commands].count(KillWorker) == 2
    errors = [world.error(T1), world.error(T2)]
    assert [type(error).__name__ for error in errors] == ["TaskPlacementGroupRemoved"] * 2
    assert "may have run partway" in str(errors[0]) and "was not run" in str(errors[1])
    assert world.node.actors.actors[A].state == DEAD
    assert type(world.error(A)).__name__ == "ActorPlacementGroupRemoved"
    assert world.available() == 3 and world.state(T1) == FAILED
    for worker in (1, 2):
        world.handle(WorkerDied(worker, "was killed by SIGKILL", None))


def test_a_group_that_is_removed_while_it_waits_is_an_error_for_who_waits_for_it() -> None:
    world = Groups(cpus=1)
    world.submit(T1)
    world.request(P, {"CPU": 1})
    world.handle(ObjectsAwaited(DRIVER, 3, [P], 1, True, False))
    inside = world.options(placement=(P, 0, False))
    world.run(T2, inside)
    assert world.remove(P) == [Reply(DRIVER, 3, None)]
    assert type(world.error(P)).__name__ == type(world.error(T2)).__name__ == "TaskPlacementGroupRemoved"
    assert world.remove(P) == []


def test_a_task_that_comes_when_its_group_is_gone_fails_and_so_does_a_replay() -> None:
    world = Groups(cpus=2)
    world.request(P, {"CPU": 1})
    inside = world.options(resources=cpus(1), placement=(P, 0, False))
    world.run(T1, inside)
    world.finish(1, T1)
    world.remove(P)
    world.run(T2, inside)
    assert type(world.error(T2)).__name__ == "TaskPlacementGroupRemoved"
    world.handle(ObjectLost(DRIVER, T1, None, "a test dropped it"))
    assert "which was removed" in str(world.error(T1)), "its value was to be made again in that group"


def test_a_retry_finds_its_group_as_it_is() -> None:
    """The second attempt of a task that has made a group asks for it again, under the same ID."""
    world = Groups(cpus=3, workers=2)
    world.submit(T1)
    own = ids.put_id(T1, 1)
    world.request(own, {"CPU": 1}, client=2)
    world.handle(WorkerDied(2, "was killed by SIGKILL", T1))
    assert world.state(T1) in (SUBMITTED_TO_WORKER, RUNNING), "it runs again"
    world.request(own, {"CPU": 1}, client=1)
    assert world.group_state(own) == CREATED and world.available() == 1
    world.remove(own)
    world.request(own, {"CPU": 1}, client=1)
    assert world.group_state(own) == CREATED and world.available() == 1


def test_a_name_belongs_to_one_group_until_it_is_removed() -> None:
    world = Groups()
    assert world.request(P, {"CPU": 1}, name="x", request_id=4) == [Reply(DRIVER, 4, None)]
    (refused,) = world.request(Q, {"CPU": 1}, name="x", request_id=5)
    assert isinstance(refused, Reply) and "taken by placement group 'x'" in refused.answer
    assert Q not in world.node.groups
    world.remove(P)
    assert world.request(Q, {"CPU": 1}, name="x", request_id=6) == [Reply(DRIVER, 6, None)]


def test_what_a_detached_actor_has_made_ends_with_it_unless_it_is_detached_too() -> None:
    world = Groups(cpus=4)
    creation = world.options(kind=ACTOR_CREATION, resources=(), max_retries=0)
    world.run(A, creation, ActorOptions("A", "a", detached=True))
    world.finish(1, A)
    world.request(P, {"CPU": 1}, client=1)
    world.request(Q, {"CPU": 1}, client=1, detached=True)
    world.handle(ActorKillRequested(DRIVER, A, True))
    assert [world.group_state(group) for group in (P, Q)] == [REMOVED, CREATED]


def test_of_removed_groups_the_newest_are_remembered(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_placement, "MAX_REMOVED", 2)
    world = Groups()
    for number in range(1, 5):
        world.request(ids.put_id(ROOT, number), {"CPU": 1})
        world.remove(ids.put_id(ROOT, number))
    assert list(world.node.groups) == [ids.put_id(ROOT, number) for number in (3, 4)]
    assert list(world.node.objects) == list(world.node.groups)
    inside = world.options(placement=(P, 0, False))
    world.run(T1, inside)
    assert "which is not there: it was removed, or is of another session" in str(world.error(T1))


def test_while_the_gcs_cannot_write_no_group_is_made() -> None:
    world = Groups()
    world.handle(GcsStalled(DRIVER, "OutOfDiskError", "the disk is full"))
    world.request(P, {"CPU": 1})
    assert type(world.error(P)).__name__ == "OutOfDiskError" and world.available() == 2
    world.handle(GcsRecovered(DRIVER))
    world.remove(P)
    assert "placement_groups" not in world.node.take_rows(world.now)


def test_the_gcs_is_told_of_a_group_in_one_row() -> None:
    world = Groups()
    world.request(P, {"CPU": 1}, name="x")
    (row,) = world.node.take_rows(world.now)["placement_groups"]
    assert row[:7] == (1, P, "x", "PACK", '[{"CPU": 1.0}]', CREATED, 0) and row[8] and not row[9]
    world.remove(P)
    (row,) = world.node.take_rows(world.now)["placement_groups"]
    assert row[5] == REMOVED and row[10] == "remove_placement_group() was called on it"


def test_a_worker_that_dies_in_a_group_leaves_its_resources_to_the_group() -> None:
    world = Groups(cpus=2, workers=2)
    world.request(P, {"CPU": 1})
    inside = world.options(resources=cpus(1), placement=(P, 0, False))
    (ran,) = to_run(world.run(T1, inside))
    again = world.handle(WorkerDied(ran[0], "was killed by SIGKILL", T1))
    assert [tasks for _, tasks in to_run(again)] == [[T1]]
    assert world.available() == 1


def test_nothing_of_a_group_is_left_when_it_is_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_placement, "MAX_REMOVED", 0)
    world = Groups(cpus=2)
    before = len(world.node.scheduler.shapes)
    for number in range(1, 20):
        group = ids.put_id(ROOT, number)
        world.request(group, {"CPU": 1})
        inside = world.options(placement=(group, 0, False))
        one = ids.pack_id(ids.children_prefix(ROOT), 100 + number, 0)
        (ran,) = to_run(world.run(one, inside))
        world.finish(ran[0], one)
        world.handle(ReferencesChanged(DRIVER, [], [one]))
        world.remove(group)
    assert len(world.node.scheduler.shapes) == before and not world.node.groups and not world.node.objects
    assert world.available() == 2 and not world.node.scheduler.bundles
