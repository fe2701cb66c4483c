"""Where a placement group's bundles, and tasks with wishes, may go: labels, and a plan for bundles.

Pure, and for any number of nodes; one machine asks with one.  Knows no workers, queues or groups: the group's life
is node_placement.py's, the resources that are taken out of a node are the scheduler's.

A *condition* is (label, operator, values); several together must all hold, a sequence of such sets is tried in order.
All of Ray's ways to name a node come down to that: NodeAffinitySchedulingStrategy asks for the label `NODE_ID`,
its `soft` and a `fallback_strategy` add a set to try next.

Left out: the best packing.  PACK and SPREAD are best effort in Ray, too; here bundles are put one by one, the largest
first, and never moved again.  So with several nodes a plan may be missed that a search would find.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from minray.task_spec import Conditions, Resources

STRATEGIES = ("PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD")
NODE_ID = "ray.io/node-id"
"""The label that every node has."""
IN, NOT_IN, EXISTS, ABSENT = OPERATORS = ("in", "not in", "exists", "absent")


def meets(labels: Mapping[str, str], conditions: Conditions) -> bool:
    """Whether a node with these labels is one of those that are asked for.

    >>> meets({"zone": "a"}, (("zone", "in", ("a", "b")), ("gpu", "absent", ())))
    True
    """
    for label, operator, values in conditions:
        has = label in labels
        holds = {
            IN: has and labels[label] in values,
            NOT_IN: not has or labels[label] not in values,
            EXISTS: has,
            ABSENT: not has,
        }[operator]
        if not holds:
            return False
    return True


def in_words(conditions: Conditions) -> str:
    """For people: "zone in (a, b) and gpu absent"."""
    return " and ".join(
        f"{label} {operator} ({', '.join(values)})" if values else f"{label} {operator}"
        for label, operator, values in conditions
    )


_SELECTOR = re.compile(r"(?P<no>!?)(?:in\((?P<several>.*)\)|(?P<one>[^!()]*))")


def parse_selector(selector: Mapping[str, str]) -> Conditions:
    """Ray's label selectors: "a", "!a", "in(a, b)", "!in(a, b)" by label.  Raises ValueError.

    >>> parse_selector({"zone": "in(a, b)", "gpu": "!h100"})
    (('zone', 'in', ('a', 'b')), ('gpu', 'not in', ('h100',)))
    """
    if not isinstance(selector, Mapping):
        raise ValueError(f"a label selector is a dict such as {{'zone': 'in(a, b)'}}, got {selector!r}.")
    conditions = []
    for label, text in selector.items():
        found = _SELECTOR.fullmatch(text) if isinstance(text, str) and isinstance(label, str) else None
        if found is None or not label:
            raise ValueError(
                f"a label selector's values are 'a', '!a', 'in(a, b)' or '!in(a, b)', got {{{label!r}: {text!r}}}."
            )
        several = found["several"]
        values = [found["one"]] if several is None else [value.strip() for value in several.split(",")]
        conditions.append((label, NOT_IN if found["no"] else IN, tuple(values)))
    return tuple(conditions)


class Room(NamedTuple):
    """What a node has, or has free, and what it is like."""

    amounts: Mapping[str, int]
    labels: Mapping[str, str]


def plan(
    bundles: Sequence[tuple[Resources, Conditions]], strategy: str, rooms: Mapping[int, Room]
) -> list[int] | None:
    """The node for each bundle, or None if they cannot be put so.

    PACK takes the nodes that it has begun to fill first, SPREAD those with the fewest of the bundles; the STRICT
    ones allow nothing but one node for all, or one for each.
    """
    if strategy == "STRICT_PACK":
        for node, room in rooms.items():
            if _one_by_one(bundles, "PACK", {node: room}):
                return [node] * len(bundles)
        return None
    return _one_by_one(bundles, strategy, rooms)


def _one_by_one(
    bundles: Sequence[tuple[Resources, Conditions]], strategy: str, rooms: Mapping[int, Room]
) -> list[int] | None:
    left = {node: dict(room.amounts) for node, room in rooms.items()}
    count = dict.fromkeys(rooms, 0)
    where = [0] * len(bundles)
    sign = -1 if strategy == "PACK" else 1
    for index in sorted(range(len(bundles)), key=lambda index: -_size(bundles[index][0])):
        resources, conditions = bundles[index]
        able = [
            node
            for node, room in rooms.items()
            if meets(room.labels, conditions)
            and all(left[node].get(name, 0) >= amount for name, amount in resources)
            and not (strategy == "STRICT_SPREAD" and count[node])
        ]
        if not able:
            return None
        where[index] = node = min(able, key=lambda node: sign * count[node])
        count[node] += 1
        for name, amount in resources:
            left[node][name] -= amount
    return where


def _size(resources: Iterable[tuple[str, int]]) -> int:
    return sum(amount for name, amount in resources if name != "memory")
