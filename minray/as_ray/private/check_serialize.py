"""``ray.util.check_serialize``: in Ray a module, whose one function is `minray.util.inspect_serializability`."""

from minray.util import inspect_serializability

__all__ = ["inspect_serializability"]
