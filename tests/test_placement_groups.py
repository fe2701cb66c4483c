"""Placement groups as a program sees them.  What the node decides about them is in test_node_placement.py."""

from __future__ import annotations

import os
import pickle
import sys
from typing import Any

import cloudpickle
import pytest

import minray
from minray import state
from minray.exceptions import (
    ActorPlacementGroupRemoved, GetTimeoutError, PlacementGroupUnschedulableError, TaskPlacementGroupRemoved,
    TaskUnschedulableError,
)  # fmt: skip
from minray.util import (
    get_current_placement_group, get_placement_group, placement_group, placement_group_table, remove_placement_group,
)  # fmt: skip
from minray.util.placement_group import VALID_PLACEMENT_GROUP_STRATEGIES, PlacementGroup, validate_placement_group
from minray.util.scheduling_strategies import PlacementGroupSchedulingStrategy as InGroup

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def module_session():
    with minray.init(num_cpus=4, num_gpus=2, resources={"license": 2}) as context:
        yield context


@pytest.fixture
def make():
    """`placement_group`, of which nothing is left afterwards."""
    made: list[PlacementGroup] = []

    def request(*args: Any, **kwargs: Any) -> PlacementGroup:
        made.append(placement_group(*args, **kwargs))
        return made[-1]

    yield request
    for group in made:
        remove_placement_group(group)
    assert minray.available_resources() == minray.cluster_resources()


@minray.remote
def where() -> Any:
    return get_current_placement_group()


@minray.remote
def whole_environment() -> Any:
    context = minray.get_runtime_context()
    return (
        context.get_placement_group_id(), context.get_assigned_resources(), minray.get_gpu_ids(),
        os.environ["OMP_NUM_THREADS"], os.environ["CUDA_VISIBLE_DEVICES"],
    )  # fmt: skip


@minray.remote
def parent() -> Any:
    child = where.remote()
    outside = where.options(scheduling_strategy="DEFAULT").remote()
    also_outside = where.options(scheduling_strategy=InGroup(None)).remote()
    return minray.get([child, outside, also_outside])


@minray.remote(num_cpus=0)
def forever(started: Any) -> None:
    minray.get(started.set.remote())
    minray.get(started.never.remote())


@minray.remote(max_concurrency=8)
class Signal:
    def __init__(self) -> None:
        import threading

        self.event = threading.Event()

    def set(self) -> None:
        self.event.set()

    def wait(self) -> bool:
        return self.event.wait(20)

    def never(self) -> None:
        import threading

        threading.Event().wait()


@minray.remote
class Guest:
    def where(self) -> Any:
        return get_current_placement_group()

    def child(self) -> Any:
        return minray.get(where.remote())


def test_a_group_is_ready_when_its_resources_are_reserved(make) -> None:
    group = make([{"CPU": 1, "GPU": 1}, {"CPU": 0.5, "license": 1}], strategy="SPREAD")
    assert minray.get(group.ready(), timeout=10) == group
    assert group.wait(10)
    assert group.bundle_specs == [{"CPU": 1.0, "GPU": 1.0}, {"CPU": 0.5, "license": 1.0}]
    assert group.bundle_count == 2 and not group.is_empty and PlacementGroup.empty().is_empty
    free = minray.available_resources()
    assert (free["CPU"], free["GPU"], free["license"]) == (2.5, 1, 1)
    assert minray.cluster_resources()["CPU"] == 4


def test_ready_can_be_waited_for_with_others_and_be_an_argument(make) -> None:
    groups = [make([{"CPU": 1}]) for _ in range(3)]
    ready, rest = minray.wait([group.ready() for group in groups], num_returns=3, timeout=10)
    assert len(ready) == 3 and not rest

    @minray.remote(num_cpus=0)
    def bundles(group: PlacementGroup) -> Any:
        return group.bundle_specs

    assert minray.get(bundles.remote(groups[0].ready())) == [{"CPU": 1.0}]


def test_a_task_runs_in_its_bundle_with_what_that_has(make) -> None:
    group = make([{"CPU": 1}, {"CPU": 2, "GPU": 1}])
    inside = whole_environment.options(num_cpus=2, num_gpus=1, scheduling_strategy=InGroup(group, 1))
    group_id, resources, gpus, threads, visible = minray.get(inside.remote())
    assert group_id == group.id.hex()
    assert resources == {"CPU": 2.0, "GPU": 1.0}
    assert len(gpus) == 1 and visible == str(gpus[0])
    assert threads == "2"
    outside = minray.get(whole_environment.remote())
    assert outside[:2] == (None, {"CPU": 1.0})


def test_the_old_spelling_is_understood(make) -> None:
    group = make([{"CPU": 1}, {"CPU": 1}])
    for options in ({}, {"placement_group_bundle_index": 1}):
        assert minray.get(where.options(placement_group=group, **options).remote()) == group
    assert minray.get(where.options(placement_group=None).remote()) is None
    assert minray.get(where.options(placement_group="default").remote()) is None
    actor = Guest.options(placement_group=group, placement_group_capture_child_tasks=True).remote()
    assert minray.get([actor.where.remote(), actor.child.remote()]) == [group, group]


def test_children_go_to_the_group_if_its_strategy_says_so_and_they_do_not_say_otherwise(make) -> None:
    group = make([{"CPU": 2}])
    capturing = InGroup(group, placement_group_capture_child_tasks=True)
    assert minray.get(parent.options(scheduling_strategy=capturing).remote()) == [group, None, None]
    assert minray.get(parent.options(scheduling_strategy=InGroup(group)).remote()) == [None, None, None]
    assert minray.get(parent.remote()) == [None, None, None]


def test_grandchildren_are_captured_too(make) -> None:
    group = make([{"CPU": 1}])
    assert minray.get(grandparent.options(scheduling_strategy=InGroup(group, 0, True)).remote()) == [group, None, None]


@minray.remote
def grandparent() -> Any:
    return minray.get(parent.remote())


def test_a_child_that_fits_no_bundle_is_refused(make) -> None:
    group = make([{"CPU": 1}])

    @minray.remote
    def ask_too_much() -> Any:
        return minray.get(where.options(num_cpus=2).remote())

    refused = ask_too_much.options(scheduling_strategy=InGroup(group, placement_group_capture_child_tasks=True)).remote()
    with pytest.raises(TaskUnschedulableError, match="needs 2 CPU and the bundles of .* have .1 CPU."):
        minray.get(refused)


def test_nested_tasks_run_on_the_one_cpu_of_their_group(make) -> None:
    group = make([{"CPU": 1}])

    @minray.remote
    def nest(depth: int) -> int:
        return depth if not depth else minray.get(nest.remote(depth - 1)) + 1

    assert minray.get(nest.options(scheduling_strategy=InGroup(group, 0, True)).remote(4)) == 4


def test_actors_live_in_groups(make) -> None:
    group = make([{"CPU": 1}, {"CPU": 1}])
    actors = [Guest.options(num_cpus=1, scheduling_strategy=InGroup(group, index)).remote() for index in (0, 1)]
    assert minray.get([actor.where.remote() for actor in actors]) == [group, group]
    assert minray.get(actors[0].child.remote()) is None
    assert minray.available_resources()["CPU"] == 2


def test_an_actor_that_restarts_is_in_its_group_again(make) -> None:
    group = make([{"CPU": 1}])
    actor = Guest.options(num_cpus=1, max_restarts=1, max_task_retries=1, scheduling_strategy=InGroup(group)).remote()
    assert minray.get(actor.where.remote()) == group
    minray.kill(actor, no_restart=False)
    assert minray.get(actor.where.remote()) == group


def test_a_group_can_be_pickled_made_and_used_in_tasks_and_actors(make) -> None:
    @minray.remote(num_cpus=0)
    def use(group: PlacementGroup) -> Any:
        found = minray.get(where.options(scheduling_strategy=InGroup(group)).remote())
        return found, group.wait(5)

    @minray.remote(num_cpus=0)
    def make_one() -> PlacementGroup:
        own = placement_group([{"CPU": 1}])
        assert own.wait(10)
        return own

    group = make([{"CPU": 1}])
    assert pickle.loads(pickle.dumps(group)) == group
    assert minray.get(use.remote(group)) == (group, True)
    made = minray.get(make_one.remote())
    assert minray.get(use.remote(made)) == (made, True)
    assert placement_group_table(made)["state"] == "CREATED", "it lives longer than the task that made it"
    remove_placement_group(made)


def test_a_group_waits_for_what_is_in_use(make) -> None:
    first = make([{"CPU": 3}])
    second = make([{"CPU": 2}], name="second")
    assert not second.wait(0.01)
    assert placement_group_table(second)["state"] == "PENDING"
    with pytest.raises(GetTimeoutError):
        minray.get(second.ready(), timeout=0.01)
    task = where.options(scheduling_strategy=InGroup(second)).remote()
    assert minray.wait([task], timeout=0.01) == ([], [task])
    remove_placement_group(first)
    assert second.wait(10) and minray.get(task) == second


def test_removing_a_group_ends_what_runs_in_it(make) -> None:
    started = Signal.remote()
    group = make([{"CPU": 1}])
    inside = InGroup(group)
    task = forever.options(scheduling_strategy=inside).remote(started)
    actor = Guest.options(scheduling_strategy=inside, max_restarts=-1).remote()
    assert minray.get([started.wait.remote(), actor.where.remote()]) == [True, group]
    remove_placement_group(group)
    with pytest.raises(TaskPlacementGroupRemoved, match="which was removed .* It may have run partway"):
        minray.get(task)
    for call in (actor.where.remote(), actor.where.remote()):
        with pytest.raises(ActorPlacementGroupRemoved, match=r"actor Guest .* placement group .*, in which it was, was removed"):
            minray.get(call)
    with pytest.raises(TaskPlacementGroupRemoved, match="It was not run"):
        minray.get(where.options(scheduling_strategy=inside).remote())
    assert placement_group_table(group)["state"] == "REMOVED"
    remove_placement_group(group)  # Once more: nothing is left to remove.


def test_a_task_may_remove_the_group_that_it_runs_in(make) -> None:
    group = make([{"CPU": 1}])

    @minray.remote(max_retries=0)
    def saw() -> None:
        remove_placement_group(get_current_placement_group())
        minray.get(minray.put(1))

    with pytest.raises(TaskPlacementGroupRemoved):
        minray.get(saw.options(scheduling_strategy=InGroup(group)).remote())


def test_who_waits_for_a_group_that_is_removed_is_told(make) -> None:
    first, second = make([{"CPU": 4}]), make([{"CPU": 4}])
    ready = second.ready()
    remove_placement_group(second)
    with pytest.raises(TaskPlacementGroupRemoved, match="was removed .* before it was placed"):
        minray.get(ready)
    assert not second.wait(10) and first.wait(10)


@pytest.mark.parametrize(
    ("bundles", "strategy", "why"),
    [
        ([{"CPU": 1}, {"CPU": 1}], "STRICT_SPREAD", "STRICT_SPREAD wants a node for each of its 2 bundles"),
        ([{"CPU": 5}], "PACK", r"it wants \(5 CPU\), and this node has 4 CPU"),
        ([{"CPU": 3}, {"CPU": 3}], "SPREAD", r"it wants \(3 CPU\) \+ \(3 CPU\)"),
        ([{"unheard of": 1}], "PACK", "unheard of"),
    ],
)
def test_a_group_that_can_never_be_placed_says_so_and_wait_returns_false_at_once(bundles, strategy, why, make) -> None:
    group = make(bundles, strategy)
    assert not group.wait(100)
    with pytest.raises(PlacementGroupUnschedulableError, match=f"can never be placed: .*{why}"):
        minray.get(group.ready())
    about = placement_group_table(group)
    assert about["state"] == "INFEASIBLE" and about["reason"]
    with pytest.raises(TaskUnschedulableError, match="can never be placed"):
        minray.get(where.options(num_cpus=0, placement_group=group).remote())


def test_groups_are_found_by_their_names(make) -> None:
    group = make([{"CPU": 1}], name="mine", lifetime="detached")
    assert get_placement_group("mine") == group and get_placement_group("mine").bundle_specs == [{"CPU": 1.0}]

    @minray.remote(num_cpus=0)
    def find() -> Any:
        return get_placement_group("mine")

    assert minray.get(find.remote()) == group
    with pytest.raises(ValueError, match="the name is taken by placement group 'mine'"):
        placement_group([{"CPU": 1}], name="mine")
    remove_placement_group(group)
    with pytest.raises(ValueError, match="there is no placement group named 'mine'"):
        get_placement_group("mine")
    assert make([{"CPU": 1}], name="mine").wait(10)


def test_the_table_tells_all_about_a_group(make) -> None:
    group = make([{"CPU": 1}, {"CPU": 2}], strategy="PACK", name="table")
    about = placement_group_table(group)
    node_id = minray.get_runtime_context().get_node_id()
    assert about["placement_group_id"] == group.id.hex() and about["name"] == "table" and about["strategy"] == "PACK"
    assert about["bundles"] == {0: {"CPU": 1.0}, 1: {"CPU": 2.0}}
    assert about["bundles_to_node_id"] == {0: node_id, 1: node_id}
    assert placement_group_table()[group.id.hex()] == about
    assert placement_group_table(PlacementGroup(b"\1" * 16)) == {}
    assert get_current_placement_group() is None and minray.get_runtime_context().get_placement_group_id() is None


def test_the_state_api_lists_groups(make) -> None:
    group = make([{"CPU": 1}], name="listed")
    (row,) = state.list_placement_groups(filters=[("name", "=", "listed")])
    assert row.placement_group_id == group.id.hex() and row.state == "CREATED" and row.bundles == [{"CPU": 1.0}]
    remove_placement_group(group)
    row = state.get_placement_group(group.id.hex())
    assert row is not None and row.state == "REMOVED" and row.reason and row.end_time_ms
    assert state.summarize_placement_groups()["cluster"]["summary"]["PACK"]["state_counts"]["REMOVED"] >= 1
    from minray.util.state import list_placement_groups

    assert list_placement_groups is state.list_placement_groups


# ---------------------------------------------------------------- mistakes


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (([],), "at least one bundle"),
        (({"CPU": 1},), "takes a list of bundles"),
        (([{}],), "bundle 0 reserves nothing"),
        (([{"CPU": 1}, {"CPU": 0}],), "bundle 1 reserves nothing"),
        (([{"CPU": -1}],), "amounts are numbers, 0 or more"),
        (([{"CPU": "1"}],), "amounts are numbers, 0 or more"),
        (([{"CPU": True}],), "amounts are numbers, 0 or more"),
        (([{"CPU": float("nan")}],), "amounts are numbers, 0 or more"),
        (([{1: 1}],), "resources have names, got 1"),
        (([["CPU"]],), "bundle 0 must be a dict"),
        (([{"GPU": 1.5}],), "a fraction of a GPU up to 1"),
        (([{"CPU": 1}], "STRICT"), "must be one of PACK, SPREAD, STRICT_PACK, STRICT_SPREAD, got 'STRICT'"),
        (([{"CPU": 1}], "PACK", 5), "name=...\\) must be a string"),
        (([{"CPU": 1}], "PACK", "", "long"), 'must be None or "detached"'),
        (([{"CPU": 1}], "PACK", "", None, "ab"), "goes with STRICT_PACK only"),
        (([{"CPU": 1}], "PACK", "", None, None, [{}, {}]), "a selector for each of the 1 bundles"),
        (([{"CPU": 1}], "PACK", "", None, None, [{"zone": "in("}]), "a label selector"),
    ],
)
def test_what_is_no_group_is_refused_where_it_is_asked_for(arguments, said) -> None:
    before = placement_group_table()
    with pytest.raises(ValueError, match=said):
        placement_group(*arguments)
    assert placement_group_table() == before


def test_validation_is_public() -> None:
    assert validate_placement_group([{"CPU": 1}], "SPREAD") and "STRICT_PACK" in VALID_PLACEMENT_GROUP_STRATEGIES


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"num_cpus": 3}, r"f needs {'CPU': 3.0}, which is more than every bundle of its placement group has: .* not submitted"),
        ({"resources": {"license": 1}}, "more than every bundle"),
        ({"index": 1, "num_cpus": 2}, "more than bundle 1 of its placement group has"),
        ({"index": 2}, "bundle index 2 is wrong. The placement group has 2 bundles: 0 to 1"),
        ({"index": -2}, "bundle index -2 is wrong"),
    ],
)
def test_what_does_not_fit_its_group_is_refused_when_it_is_submitted(options, said, make) -> None:
    group = make([{"CPU": 2}, {"CPU": 1}])
    index = options.pop("index", -1)

    @minray.remote
    def f() -> None: ...

    with pytest.raises(ValueError, match=said):
        f.options(scheduling_strategy=InGroup(group, index), **options).remote()


def test_what_is_said_last_counts(make) -> None:
    one, other = make([{"CPU": 1}, {"CPU": 1}]), make([{"CPU": 1}])
    in_one = where.options(placement_group=one, placement_group_bundle_index=1, num_cpus=0.5)
    assert minray.get(in_one.options(name="again").remote()) == one
    assert minray.get(in_one.options(placement_group_bundle_index=0).remote()) == one
    assert minray.get(in_one.options(placement_group=other).remote()) == other
    assert minray.get(in_one.options(scheduling_strategy=InGroup(other)).remote()) == other
    assert minray.get(in_one.options(scheduling_strategy="DEFAULT").remote()) is None
    assert minray.get(where.options(scheduling_strategy=InGroup(one)).options(placement_group=other).remote()) == other
    with pytest.raises(ValueError, match="bundle index 2 is wrong"):
        in_one.options(placement_group_bundle_index=2)


def test_fractions_are_compared_as_they_are_counted(make) -> None:
    third = 1 / 3
    group = make([{"CPU": third}])
    assert minray.get(where.options(num_cpus=third, placement_group=group).remote()) == group


def test_contradictions_are_refused(make) -> None:
    group = make([{"CPU": 1}])
    with pytest.raises(ValueError, match="both say where to run"):
        where.options(placement_group=group, scheduling_strategy="SPREAD")
    with pytest.raises(ValueError, match=r"placement_group_bundle_index=\.\.\.\) needs placement_group="):
        where.options(placement_group_bundle_index=0)
    with pytest.raises(ValueError, match=r"placement_group_capture_child_tasks=\.\.\.\) needs placement_group="):
        where.options(placement_group_capture_child_tasks=True)
    with pytest.raises(ValueError, match="must be a placement group, or None"):
        where.options(placement_group="mine")
    with pytest.raises(ValueError, match="takes a placement group or None, got 'mine'"):
        InGroup("mine")
    with pytest.raises(TypeError, match="takes a placement group, got 'mine'"):
        remove_placement_group("mine")  # type: ignore[arg-type]


def test_groups_end_with_their_session(run_driver) -> None:
    printed = run_driver(
        "import minray\n"
        "from minray import state\n"
        "with minray.init(num_cpus=1) as context:\n"
        "    group = minray.util.placement_group([{'CPU': 1}], lifetime='detached')\n"
        "    assert group.wait(10)\n"
        "    path = context['session_dir']\n"
        "(row,) = state.list_placement_groups(path.rpartition('/')[2], detail=True)\n"
        "print(row.state, row.reason, row.is_detached)\n"
    )
    assert printed.stdout == "REMOVED ended with its session True\n"


def test_each_group_that_can_never_be_placed_is_told_of(capfd):
    groups = [placement_group([{"CPU": cpus}]) for cpus in (200, 300, 400)]
    assert [group.wait(0) for group in groups] == [False, False, False]
    minray.get(minray.remote(lambda: None).remote())
    told = capfd.readouterr().err
    assert told.count("can never be placed") == 3
