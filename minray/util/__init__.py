"""Ray's `util`: what is built on the public interface alone, each in a small module, loaded when it is asked for.

    ActorPool          actor_pool.py       work spread over actors of yours
    Executor           executor.py         a `concurrent.futures.Executor`; the processes under the next two
    multiprocessing    multiprocessing.py  `multiprocessing.Pool`
    joblib             joblib/             a backend of joblib, and so of scikit-learn
    dask               dask.py             a scheduler of Dask
    queue              queue.py            a queue that tasks and actors share
    as_completed       completion.py       results in the order in which they come; also map_unordered
    metrics            metrics.py          counters, gauges, histograms
    collective         collective.py       allreduce and its kin between processes
    tqdm               tqdm.py             progress bars in tasks, drawn in the driver
    state              state.py            `minray.state` under Ray's name
    placement_group    placement_group.py  resources reserved together
    scheduling_strategies                  objects for the option of that name

>>> from minray.util import inspect_serializability
>>> inspect_serializability([1, 2], name="numbers")
numbers can be serialized.
(True, set())
"""

from __future__ import annotations

import importlib
from typing import Any

from minray.serialization import deregister_serializer, inspect_serializability, register_serializer

_WHERE = {
    "ActorPool": "actor_pool", "Executor": "executor", "as_completed": "completion", "map_unordered": "completion",
    "get_current_placement_group": "placement_group", "get_placement_group": "placement_group",
    "placement_group": "placement_group", "placement_group_table": "placement_group",
    "remove_placement_group": "placement_group",
}  # fmt: skip
_MODULES = (
    "actor_pool", "collective", "completion", "dask", "executor", "joblib", "metrics", "multiprocessing", "queue",
    "scheduling_strategies", "state", "tqdm",
)  # fmt: skip
_NOT_YET = ("accelerators", "client", "tpu")


def __getattr__(name: str) -> Any:
    if name in _WHERE:
        return getattr(importlib.import_module(f"minray.util.{_WHERE[name]}"), name)
    if name in _MODULES:
        return importlib.import_module(f"minray.util.{name}")
    if name in _NOT_YET:
        raise AttributeError(f"minray.util.{name} is not there yet (docs/compatibility.md says what is)")
    raise AttributeError(f"module 'minray.util' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*__all__, *_MODULES})


def check_serialize(value: Any) -> None:
    """Raise a TypeError that names what keeps `value` from being sent to a task, if anything does.

    >>> minray.util.check_serialize({"name": "fine"})
    """
    from minray.serialization import serialize

    serialize(value)


def get_node_ip_address() -> str:
    """The address of the machine that this process runs on, as the session knows it: 127.0.0.1, for it has one."""
    return "127.0.0.1"


def list_named_actors(all_namespaces: bool = False) -> list[Any]:
    """The names of all live actors that have one.

    Args:
        all_namespaces: of every namespace, as ``{"name": …, "namespace": …}``; otherwise the names in this job's.

    >>> @minray.remote
    ... class Counter:
    ...     pass
    >>> counter = Counter.options(name="counter").remote()
    >>> minray.util.list_named_actors()
    ['counter']
    """
    from minray import api
    from minray.task_spec import DEAD

    namespace = api.core().namespace
    found = [(name, space) for _, _, name, space, state, _ in api._query("actors") if name and state != DEAD]
    if all_namespaces:
        return [{"name": name, "namespace": space} for name, space in found]
    return [name for name, space in found if space == namespace]


__all__ = [
    "ActorPool", "Executor", "as_completed", "check_serialize", "deregister_serializer", "get_current_placement_group",
    "get_node_ip_address", "get_placement_group", "inspect_serializability", "list_named_actors", "map_unordered",
    "placement_group", "placement_group_table", "register_serializer", "remove_placement_group",
]  # fmt: skip
