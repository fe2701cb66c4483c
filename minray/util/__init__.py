"""Ray's `util`, as far as it is here: why a value cannot be pickled, and classes pickled in a way of their own.

>>> from minray.util import inspect_serializability
>>> inspect_serializability([1, 2], name="numbers")
numbers can be serialized.
(True, set())
"""

from minray.serialization import deregister_serializer, inspect_serializability, register_serializer

_NOT_YET = (
    "ActorPool", "accelerators", "actor_pool", "check_serialize", "client", "collective", "dask", "get_placement_group",
    "iter", "joblib", "list_named_actors", "metrics", "multiprocessing", "placement_group", "placement_group_table",
    "queue", "remove_placement_group", "scheduling_strategies", "tpu",
)  # fmt: skip


def __getattr__(name: str) -> object:
    if name in _NOT_YET:
        raise AttributeError(f"minray.util.{name} is not there yet (docs/compatibility.md says what is)")
    raise AttributeError(f"module 'minray.util' has no attribute {name!r}")


__all__ = ["deregister_serializer", "inspect_serializability", "register_serializer"]
