"""Where a task or an actor shall run: objects for the option ``scheduling_strategy=``.

Each says by `__minray_where__` what the option means: (placement group or None, bundle, whether children go there
too, conditions on the node's labels to try in order: see placement.py).  What the strings "DEFAULT" and "SPREAD" mean
is the same on one machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from minray.placement import ABSENT, EXISTS, IN, NODE_ID, NOT_IN
from minray.task_spec import Conditions

Where = tuple[Any, int, bool, tuple[Conditions, ...]]


class PlacementGroupSchedulingStrategy:
    """In a placement group.

    Args:
        placement_group: the group; None for outside of all groups, also where children are captured.
        placement_group_bundle_index: the bundle; -1 for any that has room.
        placement_group_capture_child_tasks: whether what the task submits goes to the group as well, unless that says
            where it goes.

    >>> from minray.util.scheduling_strategies import PlacementGroupSchedulingStrategy
    >>> group = minray.util.placement_group([{"CPU": 1}])
    >>> @minray.remote(scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0))
    ... def where():
    ...     return minray.util.get_current_placement_group()
    >>> minray.get(where.remote()) == group
    True
    >>> minray.util.remove_placement_group(group)
    """

    def __init__(
        self,
        placement_group: Any,
        placement_group_bundle_index: int = -1,
        placement_group_capture_child_tasks: bool | None = None,
    ) -> None:
        if placement_group == "default":  # Ray's old word for it.
            placement_group = None
        if placement_group is not None and not hasattr(placement_group, "bundle_specs"):
            raise ValueError(
                f"PlacementGroupSchedulingStrategy() takes a placement group or None, got {placement_group!r}."
            )
        if type(placement_group_bundle_index) is not int:
            raise ValueError(f"placement_group_bundle_index is an integer, got {placement_group_bundle_index!r}.")
        self.placement_group = placement_group
        self.placement_group_bundle_index = placement_group_bundle_index
        self.placement_group_capture_child_tasks = placement_group_capture_child_tasks

    def __minray_where__(self) -> Where:
        group = self.placement_group
        group = None if group is not None and group.is_empty else group
        return group, self.placement_group_bundle_index, bool(self.placement_group_capture_child_tasks), ()


class NodeAffinitySchedulingStrategy:
    """On the node with this ID (hex); with `soft` on another if that one is not there.

    >>> from minray.util.scheduling_strategies import NodeAffinitySchedulingStrategy
    >>> here = minray.get_runtime_context().get_node_id()
    >>> @minray.remote(scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=False))
    ... def f():
    ...     return 1
    >>> minray.get(f.remote())
    1
    """

    def __init__(
        self, node_id: str, soft: bool, _spill_on_unavailable: bool = False, _fail_on_unavailable: bool = False
    ) -> None:
        if not isinstance(node_id, str):
            raise ValueError(f"NodeAffinitySchedulingStrategy(node_id=...) is a node's ID in hex, got {node_id!r}.")
        if not isinstance(soft, bool):
            raise ValueError(f"NodeAffinitySchedulingStrategy(soft=...) is True or False, got {soft!r}.")
        if _spill_on_unavailable or _fail_on_unavailable:
            raise NotImplementedError(
                "NodeAffinitySchedulingStrategy(_spill_on_unavailable=..., _fail_on_unavailable=...): with one node a "
                "task waits until what it needs is free. Leave them out."
            )
        self.node_id = node_id
        self.soft = soft

    def __minray_where__(self) -> Where:
        this: Conditions = ((NODE_ID, IN, (self.node_id,)),)
        return None, -1, False, (this, ()) if self.soft else (this,)


class _Operator:
    operator = ""

    def __init__(self, *values: str) -> None:
        if self.operator in (IN, NOT_IN) and not values:
            raise ValueError(f"{type(self).__name__}() takes the values that a label is compared with.")
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"{type(self).__name__}() takes strings, got {values!r}.")
        self.values = list(values)


class In(_Operator):
    """The label has one of these values."""

    operator = IN


class NotIn(_Operator):
    """The label has none of these values (perhaps there is no such label)."""

    operator = NOT_IN


class Exists(_Operator):
    """The node has such a label."""

    operator = EXISTS

    def __init__(self) -> None:
        super().__init__()


class DoesNotExist(_Operator):
    """The node has no such label."""

    operator = ABSENT

    def __init__(self) -> None:
        super().__init__()


class NodeLabelSchedulingStrategy:
    """On a node whose labels are as `hard` says, and as `soft` says if there is one such.

    >>> from minray.util.scheduling_strategies import DoesNotExist, NodeLabelSchedulingStrategy
    >>> @minray.remote(scheduling_strategy=NodeLabelSchedulingStrategy({"reserved": DoesNotExist()}))
    ... def f():
    ...     return 1
    >>> minray.get(f.remote())
    1
    """

    def __init__(self, hard: Mapping[str, Any], *, soft: Mapping[str, Any] | None = None) -> None:
        self.hard = _conditions("hard", hard)
        self.soft = _conditions("soft", soft or {})
        if not self.hard and not self.soft:
            raise ValueError("NodeLabelSchedulingStrategy() takes at least one label, in hard= or soft=.")

    def __minray_where__(self) -> Where:
        return None, -1, False, (self.hard + self.soft, self.hard) if self.soft else (self.hard,)


def _conditions(what: str, labels: Mapping[str, Any]) -> Conditions:
    if not isinstance(labels, Mapping):
        raise ValueError(
            f"NodeLabelSchedulingStrategy({what}=...) is a dict such as {{'zone': In('a')}}, got {labels!r}."
        )
    for label, operator in labels.items():
        if not isinstance(label, str) or not isinstance(operator, _Operator):
            raise ValueError(
                f"NodeLabelSchedulingStrategy({what}={{{label!r}: {operator!r}}}): values are In(...), NotIn(...), "
                "Exists() or DoesNotExist()."
            )
    return tuple((label, operator.operator, tuple(operator.values)) for label, operator in labels.items())


SchedulingStrategyT = Any
"""Anything that the option takes: None, a string, or one of these."""

__all__ = [
    "DoesNotExist", "Exists", "In", "NodeAffinitySchedulingStrategy", "NodeLabelSchedulingStrategy", "NotIn",
    "PlacementGroupSchedulingStrategy",
]  # fmt: skip
