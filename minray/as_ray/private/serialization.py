"""``ray.util.serialization``: in Ray the place of two functions of `minray.util`."""

from minray.util import deregister_serializer, register_serializer

__all__ = ["deregister_serializer", "register_serializer"]
