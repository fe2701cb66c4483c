"""Placement groups: resources reserved together, before the tasks and actors that will use them are there.

Thin: a group is asked for and removed by an event each (messages.py), and everything about it is decided by the node
(node_placement.py).  A `PlacementGroup` is its ID and its bundles, so it can be pickled anywhere; nothing is counted:
a group lives until it is removed, or its session ends.

In Ray `util.placement_group` is a function, and a module when it is imported from.  So this module can be called:
whether Python has bound the name to it or to its function makes no difference.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any

from minray import api, ids
from minray.exceptions import GetTimeoutError, PlacementGroupUnschedulableError, TaskPlacementGroupRemoved
from minray.messages import PlacementGroupRemoved, PlacementGroupRequested
from minray.object_ref import ObjectRef, restore
from minray.placement import NODE_ID, STRATEGIES, parse_selector
from minray.serialization import serialize, to_bytes
from minray.task_spec import UNIT, Resources
from minray.types import PlacementGroupID

VALID_PLACEMENT_GROUP_STRATEGIES = set(STRATEGIES)


class PlacementGroup:
    """A reservation of resources, in bundles.

    >>> group = minray.util.placement_group([{"CPU": 1}, {"CPU": 1}])
    >>> group.wait(10), group.bundle_specs
    (True, [{'CPU': 1.0}, {'CPU': 1.0}])
    >>> minray.util.remove_placement_group(group)
    """

    __slots__ = ("_id", "bundle_specs")

    def __init__(self, id: bytes, bundle_specs: Sequence[Mapping[str, float]] = ()) -> None:
        self._id = id
        self.bundle_specs: list[dict[str, float]] = [dict(bundle) for bundle in bundle_specs]
        """What each bundle reserves."""

    @property
    def id(self) -> PlacementGroupID:
        """16 bytes."""
        return PlacementGroupID(self._id)

    @staticmethod
    def empty() -> PlacementGroup:
        """A group that stands for being in none."""
        return PlacementGroup(ids.NIL)

    @property
    def is_empty(self) -> bool:
        return self._id == ids.NIL

    @property
    def bundle_count(self) -> int:
        return len(self.bundle_specs)

    def ready(self) -> ObjectRef[PlacementGroup]:
        """An `ObjectRef` that is ready when the group is placed; its value is the group.

        `get` raises `PlacementGroupUnschedulableError` if it never will be, TaskPlacementGroupRemoved if it was removed
        before.  No task runs for it.
        """
        return restore(self._id)

    def wait(self, timeout_seconds: float = 30) -> bool:
        """Whether the group is placed within so many seconds; at once False if it never will be."""
        try:
            api.core().get(self.ready(), timeout_seconds)
        except (GetTimeoutError, PlacementGroupUnschedulableError, TaskPlacementGroupRemoved):
            return False
        return True

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PlacementGroup) and other._id == self._id

    def __hash__(self) -> int:
        return hash(self._id)

    def __repr__(self) -> str:
        return f"PlacementGroup({self._id.hex()}, {self.bundle_specs})"

    def __minray_counts__(self) -> Any:
        return (self.bundle_specs,)  # For code_digest.py: where a task runs changes no result.

    def __reduce__(self) -> Any:
        return (PlacementGroup, (self._id, self.bundle_specs))


def placement_group(
    bundles: Sequence[Mapping[str, float]],
    strategy: str = "PACK",
    name: str = "",
    lifetime: str | None = None,
    _soft_target_node_id: str | None = None,
    bundle_label_selector: Sequence[Mapping[str, str]] | None = None,
) -> PlacementGroup:
    """Reserve resources, all of them or none; returns at once, see `PlacementGroup.ready`.

    Args:
        bundles: what each bundle reserves, by the name of the resource: {"CPU": 2, "GPU": 1}.  A task or an actor
            of the group must fit into one of them.
        strategy: "PACK", "SPREAD", "STRICT_PACK", or "STRICT_SPREAD", which wants a node for each bundle: on
            one machine that is for one bundle only.
        name: for `get_placement_group`.
        lifetime: None, or "detached"; both end with the session, but what a detached actor has made ends with that
            actor unless it is detached, too.
        _soft_target_node_id: a hint that is always followed, as there is one node.
        bundle_label_selector: for each bundle the labels of its node; one for all of them, if it is the only one.

    Raises:
        ValueError: the bundles or the strategy make no sense, or the name is taken.

    >>> group = minray.util.placement_group([{"CPU": 1}], strategy="STRICT_PACK")
    >>> minray.get(group.ready()) == group
    True
    >>> minray.util.remove_placement_group(group)
    """
    validate_placement_group(bundles, strategy, lifetime, _soft_target_node_id, bundle_label_selector)
    if not isinstance(name, str):
        raise ValueError(f"placement_group(name=...) must be a string, got {name!r}.")
    selectors = list(bundle_label_selector or ({},))
    if len(selectors) == 1:
        selectors *= len(bundles)
    core = api.core()
    specs = [{kind: float(amount) for kind, amount in bundle.items() if amount} for bundle in bundles]
    group = PlacementGroup(core.context().next_put_id(), specs)
    wants = [(_resources(spec), parse_selector(selector)) for spec, selector in zip(specs, selectors)]
    value = to_bytes(serialize(group))

    def request(request_id: int) -> PlacementGroupRequested:
        detached = lifetime == "detached"
        return PlacementGroupRequested(core.client, request_id, group._id, wants, strategy, name, detached, value)

    if not name:
        core.send_now(request(0))
    elif refused := core.ask(request):
        raise ValueError(
            f"placement_group(name={name!r}): {refused}. It was not made. minray.util.get_placement_group() finds that "
            "one; remove_placement_group() frees the name."
        )
    return group


def validate_placement_group(
    bundles: Any,
    strategy: Any = "PACK",
    lifetime: Any = None,
    _soft_target_node_id: Any = None,
    bundle_label_selector: Any = None,
) -> bool:
    """True, or a ValueError that says what is wrong with these arguments of `placement_group`."""
    if strategy not in STRATEGIES:
        raise ValueError(f"placement_group(strategy=...) must be one of {', '.join(STRATEGIES)}, got {strategy!r}.")
    if lifetime not in (None, "detached"):
        raise ValueError(f'placement_group(lifetime=...) must be None or "detached", got {lifetime!r}.')
    if not isinstance(bundles, (list, tuple)):
        raise ValueError(f"placement_group() takes a list of bundles such as [{{'CPU': 1}}], got {bundles!r}.")
    if not bundles:
        raise ValueError("placement_group() takes at least one bundle, got none.")
    for index, bundle in enumerate(bundles):
        _check_bundle(index, bundle)
    if _soft_target_node_id is not None:
        if strategy != "STRICT_PACK":
            raise ValueError(f"placement_group(_soft_target_node_id=...) goes with STRICT_PACK only, got {strategy!r}.")
        if not isinstance(_soft_target_node_id, str):
            raise ValueError(
                f"placement_group(_soft_target_node_id=...) is a node's hex ID, got {_soft_target_node_id!r}."
            )
    if bundle_label_selector is not None:
        if len(bundle_label_selector) not in (1, len(bundles)):
            raise ValueError(
                f"placement_group(bundle_label_selector=...) has a selector for each of the {len(bundles)} bundles, or "
                f"one for all, got {len(bundle_label_selector)}."
            )
        for selector in bundle_label_selector:
            parse_selector(selector)
    return True


def _check_bundle(index: int, bundle: Any) -> None:
    where = f"placement_group(): bundle {index}"
    if not isinstance(bundle, Mapping):
        raise ValueError(f"{where} must be a dict of resources and amounts such as {{'CPU': 1}}, got {bundle!r}.")
    for name, amount in bundle.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"{where}: resources have names, got {name!r}.")
        is_number = isinstance(amount, (int, float)) and not isinstance(amount, bool)
        if not is_number or not 0 <= amount < float("inf"):
            raise ValueError(f"{where}: amounts are numbers, 0 or more, got {{{name!r}: {amount!r}}}.")
        if name == "GPU" and amount > 1 and amount != int(amount):
            raise ValueError(f"{where}: a fraction of a GPU up to 1, or a whole number of them, got {amount!r}.")
    if not any(round(amount * UNIT) for amount in bundle.values()):
        raise ValueError(f"{where} reserves nothing: {bundle!r}. Leave it out, or say what it shall reserve.")


def _resources(bundle: Mapping[str, float]) -> Resources:
    return tuple(sorted((name, round(amount * UNIT)) for name, amount in bundle.items() if round(amount * UNIT)))


def remove_placement_group(placement_group: PlacementGroup) -> None:
    """Give the group's resources back.  Its tasks and actors end at once: who waits for them gets
    TaskPlacementGroupRemoved and ActorPlacementGroupRemoved.  Of a group that is removed already nothing is left to
    remove."""
    core = api.core()
    core.send_now(PlacementGroupRemoved(core.client, _checked("remove_placement_group", placement_group)._id))


def get_placement_group(placement_group_name: str) -> PlacementGroup:
    """The group of that name; ValueError if there is none (any more)."""
    if not isinstance(placement_group_name, str) or not placement_group_name:
        raise ValueError(f"get_placement_group() takes a name, got {placement_group_name!r}.")
    for row in api._query("placement_groups"):
        if row["name"] == placement_group_name and row["state"] != "REMOVED":
            return PlacementGroup(row["id"], row["bundles"])
    raise ValueError(
        f"there is no placement group named {placement_group_name!r}. Names are given with "
        "minray.util.placement_group(..., name=...) and are free again when the group is removed."
    )


def placement_group_table(placement_group: PlacementGroup | None = None) -> dict[str, Any]:
    """What there is to know about a group, or (by hex ID) about all, removed ones too: name, bundles, strategy, state
    (PENDING, CREATED, REMOVED, INFEASIBLE), bundles_to_node_id, stats, and why it was removed or is infeasible.  {} for
    a group that is not known (any more): of removed ones the newest 1,000 are."""
    found = {row["id"].hex(): _table_row(row) for row in api._query("placement_groups")}
    if placement_group is None:
        return found
    return found.get(_checked("placement_group_table", placement_group)._id.hex(), {})


def _table_row(row: Mapping[str, Any]) -> dict[str, Any]:
    node = api._query("labels")[NODE_ID] if row["state"] == "CREATED" else None
    took = row["placed_s"] - row["requested_s"] if row["placed_s"] else 0.0
    return {
        "placement_group_id": row["id"].hex(),
        "name": row["name"],
        "bundles": dict(enumerate(row["bundles"])),
        "bundles_to_node_id": dict.fromkeys(range(len(row["bundles"])), node),
        "strategy": row["strategy"],
        "state": row["state"],
        "stats": {"end_to_end_creation_latency_ms": 1000 * took, "scheduling_state": row["state"]},
        "reason": row["reason"],
    }


def get_current_placement_group() -> PlacementGroup | None:
    """The group that the calling task or actor runs in; None in the driver, and outside of groups."""
    placement = api.core().placement
    if not placement:
        return None
    for row in api._query("placement_groups"):
        if row["id"] == placement[0]:
            return PlacementGroup(row["id"], row["bundles"])
    return None


def _checked(what: str, placement_group: Any) -> PlacementGroup:
    if not isinstance(placement_group, PlacementGroup):
        raise TypeError(f"{what}() takes a placement group, got {placement_group!r}.")
    return placement_group


class _Callable(ModuleType):
    def __call__(self, *args: Any, **kwargs: Any) -> PlacementGroup:
        return placement_group(*args, **kwargs)

    def __reduce__(self) -> Any:  # A task may use it by its global name.
        return (importlib.import_module, (self.__name__,))


sys.modules[__name__].__class__ = _Callable

__all__ = [
    "VALID_PLACEMENT_GROUP_STRATEGIES", "PlacementGroup", "get_current_placement_group", "get_placement_group",
    "placement_group", "placement_group_table", "remove_placement_group", "validate_placement_group",
]  # fmt: skip
