"""Types that programs name: `ObjectRef`, and a class for each kind of ID, under Ray's names.

An ID is its 16 bytes (`minray.ids` says what they tell), so each class is a subclass of bytes that adds Ray's
methods.  Where Ray gives an ID as text (the getters of the runtime context, the state API), so does minray.
"""

from __future__ import annotations

import os
from typing import TypeVar

from minray import ids
from minray.object_ref import ObjectRef

Self = TypeVar("Self", bound="BaseID")


class BaseID(bytes):
    """An ID: compares and hashes as its bytes; `hex` is its text.

    >>> TaskID.from_hex("00" * 16).binary() == bytes(16)
    True
    """

    def __new__(cls: type[Self], data: bytes) -> Self:
        if len(data) != ids.ID_BYTES:
            raise ValueError(f"{cls.__name__} is made of {ids.ID_BYTES} bytes, got {len(data)}.")
        return super().__new__(cls, data)

    @classmethod
    def from_hex(cls: type[Self], text: str) -> Self:
        return cls(bytes.fromhex(text))

    @classmethod
    def from_binary(cls: type[Self], data: bytes) -> Self:
        return cls(data)

    @classmethod
    def from_random(cls: type[Self]) -> Self:
        """One that nothing has."""
        return cls(os.urandom(ids.ID_BYTES))

    @classmethod
    def nil(cls: type[Self]) -> Self:
        """The ID of nothing."""
        return cls(ids.NIL)

    @classmethod
    def size(cls) -> int:
        """Bytes of an ID: 16."""
        return ids.ID_BYTES

    def binary(self) -> bytes:
        return bytes(self)

    def is_nil(self) -> bool:
        return self == ids.NIL

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.hex()})"

    __str__ = __repr__


class ActorClassID(BaseID):
    """Of a class of actors."""


class ActorID(BaseID):
    """Of an actor; the ID of the task that made it."""


class FunctionID(BaseID):
    """Of a remote function."""


class JobID(BaseID):
    """Of a driver's run; the ID of the driver as a task."""


class NodeID(BaseID):
    """Of a node."""


class PlacementGroupID(BaseID):
    """Of a placement group."""


class TaskID(BaseID):
    """Of a task; the same bytes as its first result's."""


class UniqueID(BaseID):
    """Of something."""


class WorkerID(BaseID):
    """Of a worker process."""


__all__ = [
    "ActorClassID", "ActorID", "FunctionID", "JobID", "NodeID", "ObjectRef", "PlacementGroupID", "TaskID", "UniqueID",
    "WorkerID",
]  # fmt: skip
