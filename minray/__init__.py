"""minray: tasks, actors and futures on every core, and a memory of it all in SQLite.

>>> @minray.remote
... def square(x):
...     return x * x
>>> minray.get([square.remote(i) for i in range(4)])
[0, 1, 4, 9]
"""

from minray import exceptions
from minray.actor import ActorClass, ActorHandle, exit_actor, get_actor, method
from minray.api import (
    available_resources,
    cancel,
    cluster_resources,
    get,
    init,
    is_initialized,
    kill,
    nodes,
    put,
    remote,
    shutdown,
    wait,
)
from minray.generator import DynamicObjectRefGenerator, ObjectRefGenerator
from minray.object_ref import ObjectRef
from minray.progress import progress

__version__ = "0.1.0"

ObjectID = ObjectRef
_TYPES = (
    "ActorClassID", "ActorID", "FunctionID", "JobID", "NodeID", "PlacementGroupID", "TaskID", "UniqueID", "WorkerID",
)  # fmt: skip

__all__ = [
    "ActorClass",
    "ActorHandle",
    "DynamicObjectRefGenerator",
    "ObjectID",
    "ObjectRef",
    "ObjectRefGenerator",
    "available_resources",
    "cancel",
    "cluster_resources",
    "exceptions",
    "exit_actor",
    "get",
    "get_actor",
    "get_gpu_ids",
    "get_runtime_context",
    "init",
    "is_initialized",
    "kill",
    "method",
    "nodes",
    "progress",
    "put",
    "remote",
    "shutdown",
    "state",
    "timeline",
    "wait",
]


def __getattr__(name: str) -> object:
    """What is not needed to run a task is imported when it is first asked for."""
    if name in ("get_runtime_context", "get_gpu_ids"):
        from minray import runtime_context

        return getattr(runtime_context, name)
    if name == "timeline":
        from minray.story import timeline

        return timeline
    if name in _TYPES:
        from minray import types

        return getattr(types, name)
    if name in (
        "cluster_utils", "dag", "experimental", "job_config", "runtime_env", "state", "testing", "types", "util",
        "cloudpickle",
    ):  # fmt: skip
        import importlib

        return importlib.import_module("cloudpickle" if name == "cloudpickle" else f"minray.{name}")
    if name in ("air", "data", "rllib", "serve", "train", "tune", "workflow"):
        raise AttributeError(f"minray.{name}: minray is Ray Core's part of Ray; Ray's libraries are out of its scope")
    if name == "cross_language":
        raise AttributeError(f"minray.{name} is not there yet (docs/compatibility.md says what is)")
    raise AttributeError(f"module 'minray' has no attribute {name!r}")
