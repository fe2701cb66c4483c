"""``ray._raylet``: where Ray's compiled types are, which third parties import for annotations and ``isinstance``."""

from minray.generator import DynamicObjectRefGenerator, ObjectRefGenerator
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
    "ActorClassID", "ActorID", "BaseID", "DynamicObjectRefGenerator", "FunctionID", "JobID", "NodeID", "ObjectID",
    "ObjectRef", "ObjectRefGenerator", "PlacementGroupID", "TaskID", "UniqueID", "WorkerID",
]  # fmt: skip
