"""Options of tasks, actors and methods: what may be said, and in which words it is refused.

Ray's names.  An option that minray does not know is refused with the nearest name that
it does; one that it knows of but cannot do is refused with a sentence.  None is ignored.
"""

from __future__ import annotations

import difflib
from collections.abc import Callable, Mapping
from typing import Any

from minray.core_worker import pickle_classes
from minray.task_spec import UNIT, Resources

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
_STRATEGY = (lambda v: v in ("DEFAULT", "SPREAD"), '"DEFAULT" or "SPREAD" (on one machine both mean the same)')

_BOTH: dict[str, tuple[Check, str]] = {
    "num_cpus": _AMOUNT,
    "num_gpus": (lambda v: _is_amount(v) and (v <= 1 or v == int(v)), "a fraction up to 1, or a whole number"),
    "memory": _AMOUNT,
    "resources": _RESOURCES,
    "name": _TEXT,
    "scheduling_strategy": _STRATEGY,
    "runtime_env": (lambda v: True, "a runtime environment"),  # It says itself what is wrong with it: see `check`.
}
TASK: dict[str, tuple[Check, str]] = {
    **_BOTH,
    "num_returns": (lambda v: _is_int(v) and 0 <= v < 1 << 20, "an integer, 0 or more"),
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
    "max_restarts": _RETRIES,
    "max_task_retries": _RETRIES,
    "max_pending_calls": (lambda v: _is_int(v) and (v == -1 or v >= 1), "an integer, 1 or more, or -1 for no limit"),
    "checkpoint_every": (lambda v: _is_int(v) and v >= 1, "a number of calls, 1 or more"),
    "checkpoint_interval_s": (lambda v: _is_amount(v) and v > 0, "a number of seconds, more than 0"),
}
METHOD: dict[str, tuple[Check, str]] = {
    "num_returns": TASK["num_returns"],
    "name": _TEXT,
    "max_task_retries": _RETRIES,
    "retry_exceptions": _CLASSES,
}
NOT_YET = {
    "placement_group": "placement groups are not supported yet",
    "placement_group_bundle_index": "placement groups are not supported yet",
    "concurrency_groups": "concurrency groups are not supported yet; max_concurrency gives an actor threads",
    "concurrency_group": "concurrency groups are not supported yet; max_concurrency gives an actor threads",
    "accelerator_type": "accelerators have no types here; declare resources={'A100': 1} in init() instead",
    "label_selector": "nodes have no labels yet; declare resources in init() instead",
    "fallback_strategy": "nodes have no labels yet; declare resources in init() instead",
    "_generator_backpressure_num_objects": "streaming generators are not supported yet",
    "object_store_memory": "a task cannot reserve object store memory; objects are spilled when it is full",
}


def check(given: Mapping[str, Any], known: Mapping[str, tuple[Check, str]], where: str) -> dict[str, Any]:
    """The options that are not None.  Raises TypeError for an unknown name, ValueError for a bad value."""
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
        if name == "num_returns" and value in ("streaming", "dynamic"):
            raise NotImplementedError(
                f'{where}(num_returns="{value}"): generators that stream are not supported yet. '
                "With num_returns=n a generator's n values become n ObjectRefs, when it has ended."
            )
        accepts, expected = known[name]
        if value is not None and not accepts(value):
            raise ValueError(f"{where}({name}=...) must be {expected}, got {value!r}.")
    kept = {name: value for name, value in given.items() if value is not None}
    if "runtime_env" in kept:
        from minray.runtime_env import checked

        kept["runtime_env"] = checked(kept["runtime_env"], where)
    return kept


def is_exact(given: Mapping[str, Any]) -> bool:
    """Whether these options of an actor ask for exact recovery."""
    return "checkpoint_every" in given or "checkpoint_interval_s" in given


def check_exact(given: Mapping[str, Any], where: str) -> None:
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


def nearest(name: str, known: Mapping[str, Any]) -> str:
    close = difflib.get_close_matches(name, known, 1, 0.5)
    return f" Did you mean {close[0]}=?" if close else f" It knows: {', '.join(sorted(known))}."


def resources_of(options: Mapping[str, Any], default_cpus: float) -> Resources:
    amounts = dict(options.get("resources", {}))
    amounts["CPU"] = options.get("num_cpus", default_cpus)
    amounts["GPU"] = options.get("num_gpus", 0)
    amounts["memory"] = options.get("memory", 0)
    return tuple(sorted((name, round(amount * UNIT)) for name, amount in amounts.items() if amount))


def retry_exceptions_of(value: Any) -> bool | bytes:
    return value if isinstance(value, bool) else pickle_classes(value)
