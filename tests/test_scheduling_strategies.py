"""Where tasks and actors run: node affinity, labels, accelerators.  On one machine: here, or not at all."""

from __future__ import annotations

import sys
from typing import Any

import cloudpickle
import pytest

import minray
from minray import options
from minray.exceptions import ActorUnschedulableError, TaskUnschedulableError
from minray.placement import NODE_ID
from minray.util.scheduling_strategies import (
    DoesNotExist, Exists, In, NodeAffinitySchedulingStrategy, NodeLabelSchedulingStrategy, NotIn,
    PlacementGroupSchedulingStrategy,
)  # fmt: skip

cloudpickle.register_pickle_by_value(sys.modules[__name__])


@pytest.fixture(scope="module", autouse=True)
def module_session():
    labels = {"zone": "a", "disk": "ssd"}
    with minray.init(num_cpus=2, labels=labels, resources={"accelerator_type:A100": 1}) as context:
        yield context


@minray.remote
def f() -> str:
    return "ran"


@minray.remote
class A:
    def f(self) -> str:
        return "ran"


def runs(**given: Any) -> bool:
    try:
        return bool(minray.get(f.options(**given).remote()) == "ran")
    except TaskUnschedulableError:
        return False


def test_a_node_tells_its_labels() -> None:
    node_id = minray.get_runtime_context().get_node_id()
    labels = {"zone": "a", "disk": "ssd", NODE_ID: node_id}
    assert minray.get_runtime_context().get_node_labels() == labels
    assert minray.nodes()[0]["Labels"] == labels
    assert minray.state.list_nodes()[0].labels == labels

    @minray.remote
    def asked() -> Any:
        return minray.get_runtime_context().get_node_labels()

    assert minray.get(asked.remote()) == labels


@pytest.mark.parametrize(
    ("selector", "expected"),
    [
        ({"zone": "a"}, True), ({"zone": "b"}, False), ({"zone": "!b"}, True), ({"zone": "!a"}, False),
        ({"zone": "in(a, b)"}, True), ({"zone": "!in(a, b)"}, False), ({"disk": "ssd", "zone": "b"}, False),
        ({"nowhere": "x"}, False), ({"nowhere": "!x"}, True), ({}, True),
    ],
)  # fmt: skip
def test_a_label_selector_is_met_or_refused(selector, expected) -> None:
    assert runs(label_selector=selector) == expected


def test_a_fallback_strategy_is_tried_in_order() -> None:
    other = [{"label_selector": {"zone": "c"}}, {"label_selector": {"zone": "a"}}]
    assert runs(label_selector={"zone": "b"}, fallback_strategy=other)
    assert not runs(label_selector={"zone": "b"}, fallback_strategy=other[:1])


@pytest.mark.parametrize(
    ("hard", "soft", "expected"),
    [
        ({"zone": In("a", "b")}, None, True), ({"zone": NotIn("a")}, None, False), ({"disk": Exists()}, None, True),
        ({"gpu": Exists()}, None, False), ({"gpu": DoesNotExist()}, None, True), ({"disk": DoesNotExist()}, None, False),
        ({"disk": Exists()}, {"zone": In("z")}, True), ({}, {"zone": In("z")}, True),
    ],
)  # fmt: skip
def test_node_labels_are_hard_or_soft(hard, soft, expected) -> None:
    assert runs(scheduling_strategy=NodeLabelSchedulingStrategy(hard, soft=soft)) == expected


def test_node_affinity_finds_this_node_and_no_other() -> None:
    here = minray.get_runtime_context().get_node_id()
    assert runs(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
    assert runs(scheduling_strategy=NodeAffinitySchedulingStrategy("ab" * 16, soft=True))
    with pytest.raises(TaskUnschedulableError, match=f"f wants a node with {NODE_ID} in .abab.* and this one, {here}, has"):
        minray.get(f.options(scheduling_strategy=NodeAffinitySchedulingStrategy("ab" * 16, soft=False)).remote())


def test_actors_have_wishes_too() -> None:
    assert minray.get(A.options(label_selector={"zone": "a"}).remote().f.remote()) == "ran"
    with pytest.raises(ActorUnschedulableError, match=r"wants a node with zone in \(b\)"):
        minray.get(A.options(label_selector={"zone": "b"}).remote().f.remote())


def test_an_accelerator_type_is_a_resource_of_that_name() -> None:
    assert runs(accelerator_type="A100")
    with pytest.raises(TaskUnschedulableError, match="needs 1 CPU, 0.001 accelerator_type:H100"):
        minray.get(f.options(accelerator_type="H100").remote())


def test_what_has_a_wish_shares_the_resources_with_all_others() -> None:
    group = minray.util.placement_group([{"CPU": 2}])
    waits = f.options(label_selector={"zone": "a"}).remote()
    assert minray.wait([waits], timeout=0.01)[0] == []
    minray.util.remove_placement_group(group)
    assert minray.get(waits) == "ran"


@pytest.mark.parametrize("strategy", ["DEFAULT", "SPREAD"])
def test_spread_and_default_are_the_same_on_one_machine(strategy) -> None:
    assert runs(scheduling_strategy=strategy)


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"scheduling_strategy": "PACK"}, "must be \"DEFAULT\" or \"SPREAD\""),
        ({"scheduling_strategy": 5}, "or an object of minray.util.scheduling_strategies, got 5"),
        ({"label_selector": "zone=a"}, "a dict of labels and values"),
        ({"label_selector": {"zone": 1}}, "a label selector's values are"),
        ({"fallback_strategy": [{"label_selector": {"zone": "a"}}]}, "needs label_selector="),
        ({"label_selector": {}, "fallback_strategy": [{"num_cpus": 1}]}, "a list of dicts"),
        ({"placement_group_bundle_index": "0"}, "the number of a bundle"),
        ({"accelerator_type": ""}, "a string that is not empty"),
    ],
)  # fmt: skip
def test_what_is_no_wish_is_refused(given, said) -> None:
    with pytest.raises(ValueError, match=said):
        f.options(**given)


@pytest.mark.parametrize(
    ("make", "error", "said"),
    [
        (lambda: NodeAffinitySchedulingStrategy(5, False), ValueError, "a node's ID in hex, got 5"),  # type: ignore[arg-type]
        (lambda: NodeAffinitySchedulingStrategy("ab", 1), ValueError, "is True or False, got 1"),  # type: ignore[arg-type]
        (lambda: NodeAffinitySchedulingStrategy("ab", True, True), NotImplementedError, "Leave them out"),
        (lambda: NodeLabelSchedulingStrategy({}), ValueError, "at least one label"),
        (lambda: NodeLabelSchedulingStrategy({"zone": "a"}), ValueError, "values are In"),
        (lambda: NodeLabelSchedulingStrategy("zone"), ValueError, "is a dict such as"),  # type: ignore[arg-type]
        (lambda: In(), ValueError, "takes the values"),
        (lambda: NotIn(1), ValueError, "takes strings"),  # type: ignore[arg-type]
        (lambda: PlacementGroupSchedulingStrategy(None, "0"), ValueError, "is an integer, got '0'"),  # type: ignore[arg-type]
    ],
)  # fmt: skip
def test_strategies_check_what_they_are_given(make, error, said) -> None:
    with pytest.raises(error, match=said):
        make()


@pytest.mark.parametrize("labels", ["zone", {"zone": 1}, {1: "a"}, {"ray.io/node-id": "x"}])
def test_labels_that_are_none_are_refused(labels) -> None:
    with pytest.raises(ValueError, match=r"init\(labels="):
        minray.init(labels=labels)


def test_a_wish_costs_nothing_to_those_that_have_none() -> None:
    assert options.labels_of({}) == () and options.placement_of({}, (), (), "f") == ()
