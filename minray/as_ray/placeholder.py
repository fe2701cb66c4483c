"""Modules that can be imported and not be used: for programs that import one of Ray's libraries and never call it.

    MINRAY_PLACEHOLDERS=ray.data python -m minray.as_ray program.py

Every name of such a module is a class of its own: it may stand in an annotation, in ``isinstance`` and
among bases, and what calls it gets a sentence.  Nothing is a placeholder unless it is asked for: a program
that looks whether ray.data is there must hear that it is not.
"""

from __future__ import annotations

import os
from types import ModuleType
from typing import Any

VARIABLE = "MINRAY_PLACEHOLDERS"


def is_wanted(name: str) -> bool:
    """Whether the environment asks for a placeholder for this module, or for one above it."""
    asked = [one.strip() for one in os.environ.get(VARIABLE, "").split(",")]
    return any(name == one or name.startswith(f"{one}.") for one in asked if one)


class Placeholder(ModuleType):
    def __init__(self, name: str) -> None:
        super().__init__(name, f"A placeholder for {name}, which minray does not have.")
        self.__path__: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)

        def refuse(cls: type, *args: Any, **kwargs: Any) -> Any:
            raise NotImplementedError(
                f"{self.__name__}.{name} was called, and minray does not have {self.__name__}: it is a placeholder, "
                f"since {VARIABLE} asks for one. This part of the program needs the real Ray."
            )

        made = type(name, (), {"__new__": refuse, "__module__": self.__name__})
        setattr(self, name, made)
        return made
