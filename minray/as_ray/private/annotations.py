"""``ray.util.annotations``: decorators that mark how stable an interface is, which libraries put on their own.

They change nothing of what they decorate.
"""

from __future__ import annotations

from typing import Any


def _mark(*args: Any, **kwargs: Any) -> Any:
    """``@Mark`` and ``@Mark(options)`` alike: the thing itself."""
    if len(args) == 1 and not kwargs and callable(args[0]):
        return args[0]
    return lambda thing: thing


PublicAPI = DeveloperAPI = Deprecated = _mark


class RayDeprecationWarning(DeprecationWarning):
    """Something of Ray's will go."""


__all__ = ["Deprecated", "DeveloperAPI", "PublicAPI", "RayDeprecationWarning"]
