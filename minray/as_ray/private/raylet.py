"""``ray._raylet``: where Ray's compiled types are, which third parties import for annotations and ``isinstance``."""

from minray.object_ref import ObjectRef
from minray.types import (
    ActorClassID,
    ActorID,
    BaseID,
    FunctionID,
    JobID,
    NodeID,
    PlacementGroupID,
    TaskID,
    UniqueID,
    WorkerID,
)

ObjectID = ObjectRef

__all__ = [
    "ActorClassID", "ActorID", "BaseID", "FunctionID", "JobID", "NodeID", "ObjectID", "ObjectRef", "PlacementGroupID",
    "TaskID", "UniqueID", "WorkerID",
]  # fmt: skip
