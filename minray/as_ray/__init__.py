"""Programs that ``import ray`` run on minray, unchanged.

    python -m minray.as_ray script.py args…      python -m minray.as_ray -m pytest …      (also -c)

or, at the top of a program or a conftest.py, before anything imports ray:

    import minray.as_ray
    minray.as_ray.install()

Owns the mapping from Ray's module names to minray's.  A finder in `sys.meta_path` answers for ``ray`` and
all below it.  ``ray.X`` is a module object of its own, named so, that passes what it is asked for on to
``minray.X``: so functions, classes and exceptions are the same objects under both names, ``isinstance``
holds across them, and pickles, which name things by where they are defined, load with or without this.
Where Ray has something elsewhere, a table says so; what public programs import out of Ray's
inner modules (``ray._private``, ``ray._raylet``) is in `minray.as_ray.private`, as far as it means anything here.

Other processes.  Workers know by their session's configuration.  For what a program starts itself
(``subprocess``, ``multiprocessing``, the second Python of the command above) there is the directory path/, which
`install` puts into PYTHONPATH: it holds a package named ray, three lines that call `install`, and the
metadata that answers ``importlib.metadata.version("ray")``.

A process has one Ray.  Where the real one has been imported already, `install` refuses: half of a
program's objects would be of each.

Left out: Ray's libraries (`OUTSIDE`), which would need the real Ray below them.  A program that imports one and
never calls it may ask for a placeholder (placeholder.py).
"""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.util
import logging
import os
import sys
from collections.abc import Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

import minray
from minray import exceptions
from minray.as_ray import placeholder
from minray.as_ray.private.logging_config import LoggingConfig

VERSION = "2.60.0"
"""The version of Ray whose documentation minray follows, and that ``ray.__version__`` gives."""

PATH = os.path.join(os.path.dirname(os.path.abspath(__file__)), "path")
"""The directory with the package named ray, for the import path of other processes."""

PUBLIC = (
    "actor", "cluster_utils", "dag", "exceptions", "experimental", "job_config", "remote_function", "runtime_context",
    "runtime_env", "types", "util",
)  # fmt: skip
"""Modules of Ray that have their name in minray, too."""

ELSEWHERE = {
    "ray": "minray",
    "ray.cloudpickle": "cloudpickle",
    "ray._raylet": "minray.as_ray.private.raylet",
    "ray._private": "minray.as_ray.private",
    "ray.worker": "minray.as_ray.private.worker",
    "ray.internal": "minray.as_ray.private",
    "ray.util.annotations": "minray.as_ray.private.annotations",
    "ray.util.check_serialize": "minray.as_ray.private.check_serialize",
    "ray.util.debug": "minray.as_ray.private.debug",
    "ray.util.serialization": "minray.as_ray.private.serialization",
}
"""Modules whose place differs; what is below them is below that place."""

OWN = {
    "__version__": VERSION, "__commit__": f"minray {minray.__version__}", "logger": logging.getLogger("ray"),
    "LoggingConfig": LoggingConfig,
}  # fmt: skip
"""What the module ``ray`` has of its own."""

_LIBRARY = "is one of Ray's libraries; minray is Ray Core alone, and what uses it needs the real Ray"
OUTSIDE = {
    **dict.fromkeys(("air", "data", "llm", "ml", "rllib", "serve", "train", "tune", "workflow"), _LIBRARY),
    "autoscaler": "starts and stops machines; a minray session is one machine",
    "client_builder": "connects to a cluster that runs elsewhere; a minray session is made by its own driver",
    "cross_language": "calls Java and C++; minray is Python alone",
    "dashboard": "is a web server; see `minray status`, `minray tasks`, ray.util.state",
    "job_submission": "speaks to a cluster's job server; a minray session is made by its own driver",
    "util.accelerators": "names kinds of accelerators; declare resources={'A100': 1} in init() instead",
    "util.client": "connects to a cluster that runs elsewhere; a minray session is made by its own driver",
    "util.iter": "is not part of minray (Ray has deprecated it); use generators and ray.util.ActorPool",
    "util.spark": "starts Ray on a Spark cluster; a minray session is one machine",
}
"""What minray does not have, and why.  Importing it is a ModuleNotFoundError that says so."""


def install() -> None:
    """From now on ``import ray`` gives minray: in this process, in its workers and in processes that it starts.

    Again it does nothing.

    Raises:
        RuntimeError: the real Ray has been imported already.

    >>> import minray.as_ray
    >>> minray.as_ray.install()  # doctest: +SKIP
    """
    if any(isinstance(finder, Finder) for finder in sys.meta_path):
        return
    there = sys.modules.get("ray")
    if there is not None and not _is_stub(there):
        version = getattr(there, "__version__", "of no version")
        raise RuntimeError(
            f"minray.as_ray.install(): this process has imported the real Ray ({version}) already, and its objects and "
            "minray's do not mix. Nothing was changed. Call install() before the first `import ray`, or run the "
            "program with: python -m minray.as_ray"
        )
    sys.meta_path.insert(0, Finder())
    if PATH not in sys.path:
        sys.path.insert(min(1, len(sys.path)), PATH)  # Behind the program's own directory, as PYTHONPATH is.
    os.environ["PYTHONPATH"] = search_path(os.environ.get("PYTHONPATH"))
    exceptions.name_prefix = "ray"


def uninstall() -> None:
    """Take back what `install` did, in this process and for those that it starts from now on.

    What the program has imported stays usable; ``import ray`` gives the real Ray again, if there is one.
    """
    sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, Finder)]
    for name in [name for name in sys.modules if name == "ray" or name.startswith("ray.")]:
        if isinstance(sys.modules[name], (RayModule, placeholder.Placeholder)):
            del sys.modules[name]
    sys.path[:] = [entry for entry in sys.path if entry != PATH]
    left = search_path(os.environ.get("PYTHONPATH")).removeprefix(PATH).removeprefix(os.pathsep)
    os.environ.pop("PYTHONPATH", None)
    if left:
        os.environ["PYTHONPATH"] = left
    exceptions.name_prefix = "minray"


def search_path(given: str | None) -> str:
    """A PYTHONPATH like the one given, by which other processes find ray here."""
    entries = [entry for entry in (given or "").split(os.pathsep) if entry and entry != PATH]
    return os.pathsep.join([PATH, *entries])


def module(name: str) -> ModuleType:
    """The module `name` ("ray", "ray.util", …); how a pickle that holds it gets it."""
    install()
    if name == "ray" and _is_stub(sys.modules.get(name)):
        del sys.modules[name]
    return importlib.import_module(name)


def _is_stub(there: object) -> bool:
    """Whether this is path/ray, which is being imported and puts us in its place."""
    return getattr(there, "__minray_stub__", False) is True


def minray_name(name: str) -> str | None:
    """Where minray has what Ray calls `name`; None where it has nothing of the kind.

    >>> minray_name("ray.util.queue"), minray_name("ray.util.annotations"), minray_name("ray.tune")
    ('minray.util.queue', 'minray.as_ray.private.annotations', None)
    """
    place, below = name, ""
    while place not in ELSEWHERE:
        place, _, last = place.rpartition(".")
        below = f".{last}{below}"
    if place == "ray" and below and below[1:].partition(".")[0] not in PUBLIC:
        return None
    target = ELSEWHERE[place] + below
    try:
        return target if importlib.util.find_spec(target) is not None else None
    except ImportError:
        return None


def why_not(name: str) -> str | None:
    """Why minray has no module that Ray calls `name`, if that is on purpose."""
    parts = name.split(".")[1:]
    reasons = (OUTSIDE.get(".".join(parts[:length])) for length in (1, 2))
    return next((f"ray.{'.'.join(parts)} {reason}." for reason in reasons if reason), None)


class Finder(importlib.abc.MetaPathFinder):
    """Answers for ``ray`` and everything below it."""

    def find_spec(
        self, name: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "ray" and not name.startswith("ray."):
            return None
        real = minray_name(name)
        if real is not None:
            found = importlib.import_module(real)
            spec = ModuleSpec(name, Loader(found), is_package=hasattr(found, "__path__"))
            if name == "ray":
                spec.origin = os.path.join(PATH, "ray", "__init__.py")
                spec.has_location = True
            return spec
        if placeholder.is_wanted(name):
            return ModuleSpec(name, Loader(placeholder.Placeholder(name)), is_package=True)
        reason = why_not(name)
        # A look by importlib.util.find_spec is answered with None: transformers and others ask so what is there.
        if reason is not None and sys._getframe(2).f_code.co_name == "_find_and_load_unlocked":
            # Without name=: "from ray import tune" would swallow it.
            raise ModuleNotFoundError(
                f"{reason} If the program imports it and never calls it: {placeholder.VARIABLE}={name}"
            )
        return None


class Loader(importlib.abc.Loader):
    def __init__(self, target: ModuleType) -> None:
        self._target = target

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        if isinstance(self._target, placeholder.Placeholder):
            return self._target
        return RayModule(spec.name, self._target, OWN if spec.name == "ray" else {})

    def exec_module(self, module: ModuleType) -> None:
        pass


class RayModule(ModuleType):
    """A module under Ray's name: what it is asked for it gets from the one under minray's.

    What a test sets in it (``monkeypatch.setattr(ray, "get", ...)``) stays in it, and can be taken out again.
    """

    def __init__(self, name: str, target: ModuleType, own: Mapping[str, Any]) -> None:
        super().__init__(name, target.__doc__)
        vars(self).update(own, _minray_module=target)

    def __getattr__(self, name: str) -> Any:
        try:
            target = vars(self)["_minray_module"]
        except KeyError:
            raise AttributeError(name) from None
        if name == "__all__":
            return getattr(target, "__all__", [name for name in dir(target) if not name.startswith("_")])
        try:
            found = getattr(target, name)
        except AttributeError:
            if name.startswith("__"):
                raise
            return self._submodule(name)
        if type(found) is ModuleType and minray_name(f"{self.__name__}.{name}"):
            return self._submodule(name)  # ray.util, say: asked for before it was imported.
        return found

    def _submodule(self, name: str) -> Any:
        below = f"{self.__name__}.{name}"
        if minray_name(below):
            return importlib.import_module(below)
        reason = why_not(below) or "minray has nothing of that name (docs/compatibility.md says what it has)."
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}: {reason}") from None

    def __setattr__(self, name: str, value: Any) -> None:
        # The import system binds a submodule in its parent; here not over a function of that name (placement_group).
        if not isinstance(value, RayModule) or isinstance(getattr(self, name, value), ModuleType):
            super().__setattr__(name, value)

    def __dir__(self) -> list[str]:
        return sorted({*vars(self), *dir(vars(self)["_minray_module"])})

    def __reduce__(self) -> Any:
        return (module, (self.__name__,))
