"""Options of tasks, actors and methods: what may be said, and in which words it is refused.

Ray's names.  An option that minray does not know is refused with the nearest name that
it does; one that it knows of but cannot do is refused with a sentence.  None is ignored.
"""

from __future__ import annotations

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from minray.core_worker import pickle_classes
from minray.task_spec import DYNAMIC, STREAMING, UNIT, Conditions, Placement, Resources

Check = Callable[[Any], bool]


def _is_int(value: Any) -> bool:
    return type(value) is int


def _is_amount(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < float("inf")


_AMOUNT = (_is_amount, "a number, 0 or more")
_RETRIES = (lambda v: _is_int(v) and v >= -1, "an integer: 0 or more, or -1 for no limit")
_TEXT = (lambda v: isinstance(v, str) and bool(v), "a string that is not empty")
_BOOL = (lambda v: isinstance(v, bool), "True or False")
_CLASSES = (
    lambda v: (
        isinstance(v, bool)
        or (isinstance(v, (list, tuple)) and all(isinstance(c, type) and issubclass(c, Exception) for c in v))
    ),
    "True, False or a list of exception classes",
)
_RESOURCES = (
    lambda v: (
        isinstance(v, Mapping)
        and all(isinstance(k, str) and k not in ("CPU", "GPU", "memory") and _is_amount(a) for k, a in v.items())
    ),
    "a dict of names (other than CPU, GPU and memory, which have options of their own) and amounts",
)
_STRATEGY = (
    lambda v: v in ("DEFAULT", "SPREAD") if isinstance(v, str) else hasattr(v, "__minray_where__"),
    '"DEFAULT" or "SPREAD" (on one machine both mean the same), or an object of minray.util.scheduling_strategies',
)
_SELECTOR = (lambda v: isinstance(v, Mapping), "a dict of labels and values, such as {'zone': 'in(a, b)'}")

_GROUPS = (
    lambda v: (
        isinstance(v, Mapping)
        and all(isinstance(k, str) and bool(k) and _is_int(limit) and limit >= 1 for k, limit in v.items())
    ),
    "a dict of names of groups and how many of their calls may run at the same time, 1 or more",
)

_BOTH: dict[str, tuple[Check, str]] = {
    "num_cpus": _AMOUNT,
    "num_gpus": (lambda v: _is_amount(v) and (v <= 1 or v == int(v)), "a fraction up to 1, or a whole number"),
    "memory": _AMOUNT,
    "resources": _RESOURCES,
    "name": _TEXT,
    "scheduling_strategy": _STRATEGY,
    "runtime_env": (lambda v: True, "a runtime environment"),  # It says itself what is wrong with it: see `check`.
    "placement_group": (
        lambda v: v == "default" if isinstance(v, str) else hasattr(v, "bundle_specs"),
        "a placement group, or None",
    ),
    "placement_group_bundle_index": (lambda v: _is_int(v) and v >= -1, "the number of a bundle, or -1 for any"),
    "placement_group_capture_child_tasks": _BOOL,
    "accelerator_type": _TEXT,
    "label_selector": _SELECTOR,
    "fallback_strategy": (
        lambda v: (
            isinstance(v, (list, tuple)) and all(isinstance(d, Mapping) and set(d) <= {"label_selector"} for d in v)
        ),
        'a list of dicts {"label_selector": {...}}, to be tried in order',
    ),
}
TASK: dict[str, tuple[Check, str]] = {
    **_BOTH,
    "num_returns": (
        lambda v: v in ("streaming", "dynamic") or (_is_int(v) and 0 <= v < 1 << 20),
        'an integer, 0 or more, or "streaming" or "dynamic" for a generator',
    ),
    "_generator_backpressure_num_objects": (
        lambda v: _is_int(v) and (v == -1 or v >= 1), "a number of items, 1 or more, or -1 for no limit"
    ),
    "max_retries": _RETRIES,
    "retry_exceptions": _CLASSES,
    "max_calls": (lambda v: _is_int(v) and v >= 0, "an integer, 1 or more, or 0 for no limit"),
}
ACTOR: dict[str, tuple[Check, str]] = {
    **_BOTH,
    "namespace": _TEXT,
    "get_if_exists": _BOOL,
    "lifetime": (lambda v: v in ("detached", "non_detached"), '"detached" or "non_detached"'),
    "max_concurrency": (lambda v: _is_int(v) and v >= 1, "an integer, 1 or more"),
    "concurrency_groups": _GROUPS,
    "max_restarts": _RETRIES,
    "max_task_retries": _RETRIES,
    "max_pending_calls": (lambda v: _is_int(v) and (v == -1 or v >= 1), "an integer, 1 or more, or -1 for no limit"),
    "checkpoint_every": (lambda v: _is_int(v) and v >= 1, "a number of calls, 1 or more"),
    "checkpoint_interval_s": (lambda v: _is_amount(v) and v > 0, "a number of seconds, more than 0"),
}
METHOD: dict[str, tuple[Check, str]] = {
    "num_returns": TASK["num_returns"],
    "_generator_backpressure_num_objects": TASK["_generator_backpressure_num_objects"],
    "name": _TEXT,
    "max_task_retries": _RETRIES,
    "retry_exceptions": _CLASSES,
    "concurrency_group": _TEXT,
}
NOT_YET = {
    "object_store_memory": "a task cannot reserve object store memory; objects are spilled when it is full",
}


def check(
    given: Mapping[str, Any], known: Mapping[str, tuple[Check, str]], where: str, old: Mapping[str, Any] | None = None
) -> dict[str, Any]:
    """The options that are not None, over those that were there before (`old`).

    Raises TypeError for an unknown name, ValueError for a bad value."""
    for name, value in given.items():
        if name not in known:
            if name in NOT_YET and value is None:
                continue
            if name in NOT_YET:
                raise NotImplementedError(f"{where}({name}=...): {NOT_YET[name]}.")
            for kind, others in (("tasks", TASK), ("actors", ACTOR), ("methods of actors", METHOD)):
                if name in others:
                    raise TypeError(f"{where}() has no option {name!r} here: it is one of {kind}.")
            raise TypeError(f"{where}() has no option {name!r}.{nearest(name, known)}")
        accepts, expected = known[name]
        if value is not None and not accepts(value):
            raise ValueError(f"{where}({name}=...) must be {expected}, got {value!r}.")
    chosen = {name: value for name, value in given.items() if value is not None}
    if "runtime_env" in chosen:
        from minray.runtime_env import checked

        chosen["runtime_env"] = checked(chosen["runtime_env"], where)
    if not chosen.keys().isdisjoint(_PLACES):
        _check_places(chosen, where, old or {})
        # Whoever says anew in which group, or on which node, means none of what was said of that before.
        if "scheduling_strategy" in chosen or "placement_group" in chosen:
            old = {name: value for name, value in (old or {}).items() if name not in _PLACES[:4]}
    return {**old, **chosen} if old else chosen


_PLACES = (
    "scheduling_strategy", "placement_group", "placement_group_bundle_index", "placement_group_capture_child_tasks",
    "label_selector", "fallback_strategy",
)  # fmt: skip
A_LITTLE = 0.001
"""Of accelerator_type:X, as in Ray: it only tells which nodes have that kind."""


def _check_places(chosen: Mapping[str, Any], where: str, old: Mapping[str, Any]) -> None:
    """Raises ValueError for options of which one says here, the other there, and for a bundle that is not there."""
    legacy = [name for name in _PLACES[1:4] if name in chosen]
    if legacy and "scheduling_strategy" in chosen:
        raise ValueError(f"{where}(scheduling_strategy=..., {legacy[0]}=...): both say where to run. Leave out one.")
    given = {**old, **chosen}
    group, index, _ = _group_of(chosen if "scheduling_strategy" in chosen or "placement_group" in chosen else given)
    if group is None and any(name in chosen for name in _PLACES[2:4]):
        raise ValueError(f"{where}({legacy[-1]}=...) needs placement_group=..., to which it belongs.")
    count = group.bundle_count if group is not None else 0
    if group is not None and not -1 <= index < count:
        raise ValueError(
            f"{where}(...): bundle index {index} is wrong. The placement group has {count} bundles: 0 to {count - 1}, "
            "or -1 for any of them."
        )
    if "fallback_strategy" in given and "label_selector" not in given:
        raise ValueError(f"{where}(fallback_strategy=...) needs label_selector=..., which is tried first.")
    labels_of(given)  # Raises ValueError for a selector that is none.


def _group_of(given: Mapping[str, Any]) -> tuple[Any, int, bool]:
    """(placement group or None, bundle, whether children go there, too), as the options say it."""
    where = getattr(given.get("scheduling_strategy"), "__minray_where__", None)
    if where is not None:
        group, index, captures, _ = where()
        return group, index, captures
    group = given.get("placement_group")
    if isinstance(group, str):  # "default": Ray's old word for not saying it.
        group = None
    return (
        group, given.get("placement_group_bundle_index", -1), given.get("placement_group_capture_child_tasks", False),
    )  # fmt: skip


def placement_of(given: Mapping[str, Any], resources: Resources, captured: Placement, name: str) -> Placement:
    """In which placement group: as the options say it, else `captured`.  Raises ValueError for what fits no bundle."""
    group, index, captures = _group_of(given)
    if group is None or group.is_empty:
        return captured if "scheduling_strategy" not in given else ()
    bundles = group.bundle_specs if index < 0 else [group.bundle_specs[index]]
    if not any(all(round(bundle.get(kind, 0) * UNIT) >= units for kind, units in resources) for bundle in bundles):
        wanted = {kind: units / UNIT for kind, units in resources}
        which = "every bundle of its placement group" if index < 0 else f"bundle {index} of its placement group"
        raise ValueError(
            f"{name} needs {wanted}, which is more than {which} has: {bundles}. It was not submitted. A task or an "
            "actor must fit into one bundle: ask for less (.options(num_cpus=..., resources=...)), or make larger "
            "bundles."
        )
    return (bytes(group.id), index, captures)


def labels_of(given: Mapping[str, Any]) -> tuple[Conditions, ...]:
    """Of the node: what to try one after the other; () if any node will do.  Raises ValueError."""
    where = getattr(given.get("scheduling_strategy"), "__minray_where__", None)
    wanted: tuple[Conditions, ...] = where()[3] if where is not None else ()
    if "label_selector" not in given:
        return wanted
    from minray.placement import parse_selector

    more = [given["label_selector"], *(other.get("label_selector", {}) for other in given.get("fallback_strategy", ()))]
    return tuple(first + second for second in map(parse_selector, more) for first in wanted or ((),))


def is_exact(given: Mapping[str, Any]) -> bool:
    """Whether these options of an actor ask for exact recovery."""
    return "checkpoint_every" in given or "checkpoint_interval_s" in given


def check_exact(given: Mapping[str, Any], where: str, is_async: bool) -> None:
    """Raises ValueError for options of an actor that exact recovery cannot go with."""
    if not is_exact(given):
        return
    asked = "checkpoint_every" if "checkpoint_every" in given else "checkpoint_interval_s"
    if given.get("max_restarts") == 0:
        raise ValueError(
            f"{where}({asked}=..., max_restarts=0): checkpoints are there to make the actor again after a crash, and "
            "max_restarts=0 forbids that. Leave max_restarts out (then it is -1, without end), or leave out the "
            "checkpoints."
        )
    if given.get("max_concurrency", 1) > 1:
        raise ValueError(
            f"{where}({asked}=..., max_concurrency={given['max_concurrency']}): calls that run at the same time have "
            "no order in which they could be replayed. Leave out one of the two."
        )
    if given.get("concurrency_groups") or is_async:
        why = "concurrency_groups=..." if given.get("concurrency_groups") else "on a class with coroutine methods"
        raise ValueError(
            f"{where}({asked}=...) {why}: calls that run at the same time have no order in which they could be "
            "replayed. Leave out one of the two."
        )


def nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    public = sorted(option for option in known if not option.startswith("_"))
    return f" Did you mean {close[0]}=?" if close else f" It knows: {', '.join(public)}."


def returns_of(function: Any, given: Mapping[str, Any]) -> tuple[int, int, int]:
    """How many objects a call returns, whether its items have refs of their own, and how many may wait to be taken.

    Raises ValueError when they may be no more than so many, and have no refs of their own."""
    asked: Any = given.get("num_returns")
    if asked is None:
        asked = "streaming" if inspect.isgeneratorfunction(function) else 1
    backpressure = max(0, given.get("_generator_backpressure_num_objects", 0))
    if backpressure and asked != "streaming":
        raise ValueError(
            f"_generator_backpressure_num_objects={backpressure} holds back a generator that streams, and this one has "
            f'num_returns={asked!r}. Say num_returns="streaming", or leave it out.'
        )
    streaming = {"streaming": STREAMING, "dynamic": DYNAMIC}.get(asked, 0)
    return (2 if streaming else asked), streaming, backpressure


def resources_of(options: Mapping[str, Any], default_cpus: float) -> Resources:
    amounts = dict(options.get("resources", {}))
    amounts["CPU"] = options.get("num_cpus", default_cpus)
    amounts["GPU"] = options.get("num_gpus", 0)
    amounts["memory"] = options.get("memory", 0)
    if kind := options.get("accelerator_type"):
        amounts.setdefault(f"accelerator_type:{kind}", A_LITTLE)
    return tuple(sorted((name, round(amount * UNIT)) for name, amount in amounts.items() if amount))


def environment_that_counts(given: Mapping[str, Any]) -> tuple[str, ...]:
    """For the digests of durable jobs: the environment that the options ask for, if they do."""
    asked = given.get("runtime_env")
    if not asked:
        return ()
    from minray import api
    from minray.code_digest import without_session

    return (without_session(api.core().environment_of(asked)),)


def retry_exceptions_of(value: Any) -> bool | bytes:
    return value if isinstance(value, bool) else pickle_classes(value)
