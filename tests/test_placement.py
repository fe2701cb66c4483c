"""Labels and plans for bundles: pure functions, compared with all there is to compare with."""

from __future__ import annotations

import itertools

import pytest

from minray.placement import ABSENT, EXISTS, IN, NOT_IN, STRATEGIES, Room, in_words, meets, parse_selector, plan

ONE, TWO = (("CPU", 1),), (("CPU", 2),)


@pytest.mark.parametrize(
    ("condition", "of_a", "of_b", "of_none"),
    [
        (("zone", IN, ("a",)), True, False, False),
        (("zone", IN, ("a", "b")), True, True, False),
        (("zone", NOT_IN, ("a",)), False, True, True),
        (("zone", EXISTS, ()), True, True, False),
        (("zone", ABSENT, ()), False, False, True),
    ],
)
def test_a_label_meets_a_condition(condition, of_a, of_b, of_none) -> None:
    found = [meets(labels, (condition,)) for labels in ({"zone": "a"}, {"zone": "b"}, {"other": "a"})]
    assert found == [of_a, of_b, of_none]


def test_all_conditions_must_hold_and_none_always_hold() -> None:
    both = (("zone", IN, ("a",)), ("gpu", ABSENT, ()))
    assert meets({"zone": "a"}, both) and not meets({"zone": "a", "gpu": "h100"}, both) and meets({}, ())
    assert in_words(both) == "zone in (a) and gpu absent"


def test_selectors_are_rays() -> None:
    given = {"a": "x", "b": "!x", "c": "in(x, y)", "d": "!in(x,y)", "e": ""}
    assert parse_selector(given) == (
        ("a", IN, ("x",)), ("b", NOT_IN, ("x",)), ("c", IN, ("x", "y")), ("d", NOT_IN, ("x", "y")), ("e", IN, ("",)),
    )  # fmt: skip


@pytest.mark.parametrize("selector", ["zone=a", {"zone": 1}, {1: "a"}, {"": "a"}, {"zone": "in(a"}, {"zone": "!!a"}])
def test_what_is_no_selector_is_refused(selector) -> None:
    with pytest.raises(ValueError, match="a label selector"):
        parse_selector(selector)


def rooms(*cpus: int) -> dict[int, Room]:
    return {number: Room({"CPU": amount}, {"n": str(number)}) for number, amount in enumerate(cpus, 1)}


def fits(where: list[int], bundles, cpus: tuple[int, ...]) -> bool:
    left = dict(enumerate(cpus, 1))
    for node, (resources, _) in zip(where, bundles):
        left[node] -= dict(resources).get("CPU", 0)
    return min(left.values()) >= 0


def test_every_plan_for_up_to_three_nodes_and_three_bundles_is_right() -> None:
    """All of them: a plan fits, keeps what its strategy promises, and is found whenever one node would do."""
    counted = 0
    for cpus in itertools.chain(*(itertools.product(range(3), repeat=nodes) for nodes in (1, 2, 3))):
        for sizes in itertools.chain(*(itertools.product((ONE, TWO), repeat=count) for count in (1, 2, 3))):
            bundles = [(size, ()) for size in sizes]
            possible = [
                where for where in itertools.product(range(1, len(cpus) + 1), repeat=len(bundles)) if fits(where, bundles, cpus)
            ]
            for strategy in STRATEGIES:
                where = plan(bundles, strategy, rooms(*cpus))
                allowed = possible
                if strategy == "STRICT_PACK":
                    allowed = [one for one in possible if len(set(one)) == 1]
                elif strategy == "STRICT_SPREAD":
                    allowed = [one for one in possible if len(set(one)) == len(one)]
                assert (where is None) == (not allowed), (cpus, sizes, strategy)
                assert where is None or tuple(where) in allowed, (cpus, sizes, strategy, where)
                counted += 1
    assert counted == 4 * 14 * (3 + 9 + 27)


def test_pack_fills_a_node_and_spread_takes_the_emptiest() -> None:
    bundles = [(ONE, ())] * 4
    assert plan(bundles, "PACK", rooms(4, 4)) == [1, 1, 1, 1]
    assert plan(bundles, "SPREAD", rooms(4, 4)) == [1, 2, 1, 2]
    assert plan(bundles, "PACK", rooms(2, 8)) == [1, 1, 2, 2]


def test_a_bundle_goes_where_its_labels_are() -> None:
    second = (("n", IN, ("2",)),)
    assert plan([(ONE, ()), (ONE, second)], "PACK", rooms(4, 4)) == [1, 2]
    assert plan([(ONE, second), (ONE, ())], "STRICT_PACK", rooms(4, 4)) == [2, 2]
    assert plan([(ONE, (("n", IN, ("3",)),))], "PACK", rooms(4, 4)) is None
