"""A worker sets up the runtime environment of its tasks: once, before the first, in its own process.

The process is a fresh fork and will run tasks of this environment only, so nothing has to be put back.  What is
expensive (packages) is made once for all workers, in virtualenvs.py; directories have been copied by whoever submitted
(snapshots.py).  What is done here takes less than a millisecond, so this module imports nothing that is not loaded.

Order: packages first, for they can fail; then modules and the working directory, in front of the driver's own path;
then variables; the hook last, for which all that is there.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import time
from collections.abc import Callable, Mapping
from typing import Any

from minray.exceptions import RuntimeEnvSetupError

SETUP_TIMEOUT_S = 600
PICKLED = "pickled:"
"""A hook that begins so is a function, in base64; any other is the name of one."""


def store_in(session_path: str) -> str:
    """Where a session keeps its snapshots."""
    return os.path.join(session_path, "runtime_env")


def install_packages(env: Mapping[str, Any], session_path: str) -> tuple[str, int] | None:
    """As `virtualenvs.prepared`; None if it wants no packages."""
    pip = env.get("pip")
    if not pip or not pip["packages"]:
        return None
    from minray import virtualenvs  # Only who needs it pays for it: each environment's worker is a new process.

    seconds: float = env.get("config", {}).get("setup_timeout_seconds", SETUP_TIMEOUT_S)
    return virtualenvs.prepared(pip, session_path, store_in(session_path), None if seconds == -1 else seconds)


def set_up(env: Mapping[str, Any], session_path: str) -> None:
    """Make this process what `env` says.  Raises RuntimeEnvSetupError, saying why not."""
    installed = install_packages(env, session_path)
    if installed is not None:
        _use_packages(*installed)
    for path in (*env.get("py_modules", ()), *filter(None, [env.get("working_dir")])):
        if not os.path.exists(path):
            raise RuntimeEnvSetupError(f"{path} is gone: something has removed it from the session's directory")
    front = [os.path.dirname(path) for path in env.get("py_modules", ())]
    if "working_dir" in env:
        os.chdir(env["working_dir"])
        front.insert(0, env["working_dir"])
    variables = {name: _expanded(value) for name, value in env.get("env_vars", {}).items()}
    os.environ.update(variables)
    front += [entry for entry in variables.get("PYTHONPATH", "").split(os.pathsep) if entry]
    sys.path[:0] = dict.fromkeys(front)
    if "TZ" in variables:
        time.tzset()
    importlib.invalidate_caches()
    hook = env.get("worker_process_setup_hook")
    if hook:
        from minray.util.apart import Apart

        try:
            with Apart()():  # What it submits is no child of the task that comes next, and is not numbered as one.
                _function(hook)()
        except Exception as error:
            raise RuntimeEnvSetupError(f"worker_process_setup_hook raised {type(error).__name__}: {error}") from error


def _function(hook: str) -> Callable[[], Any]:
    if hook.startswith(PICKLED):
        import base64

        from minray.serialization import deserialize

        return deserialize(base64.b64decode(hook[len(PICKLED) :]))  # type: ignore[no-any-return]
    module, _, name = hook.rpartition(".")
    return getattr(importlib.import_module(module), name)  # type: ignore[no-any-return]


def _expanded(value: str) -> str:
    """``${NAME}`` is what NAME was before; empty, if it was not there."""
    return re.sub(r"\$\{(\w+)\}", lambda found: os.environ.get(found[1], ""), value)


def _use_packages(path: str, kept_by: int) -> None:
    """`kept_by` stays open as long as this process lives: nobody removes the environment under it."""
    import site

    from minray import virtualenvs

    packages = virtualenvs.site_packages(path)
    _refuse_another_version(packages)
    before = sys.path[:]
    del sys.path[:]
    site.addsitedir(packages)  # Its .pth files, too: an editable project is one.
    added = [entry for entry in sys.path if entry not in before]
    position = next((n for n, entry in enumerate(before) if virtualenvs.is_for_packages(entry)), len(before))
    sys.path[:] = before[:position] + added + before[position:]
    binaries = os.path.join(path, "bin")
    os.environ["VIRTUAL_ENV"] = path
    os.environ["PATH"] = os.pathsep.join(filter(None, (binaries, os.environ.get("PATH"))))
    sys.executable = os.path.join(binaries, "python")  # For what a task starts: it finds the same packages.


def _refuse_another_version(packages: str) -> None:
    """A module that is loaded stays loaded: what minray needs itself has no other version for some tasks."""
    for entry in os.listdir(packages):
        name = entry.partition(".")[0]
        loaded = sys.modules.get(name)
        if loaded is None or not (entry == name or entry.endswith((".py", ".so"))):
            continue
        where = getattr(loaded, "__file__", None) or ""
        if not where.startswith(packages) and name not in ("pip", "setuptools", "pkg_resources", "_distutils_hack"):
            version = getattr(loaded, "__version__", "")
            raise RuntimeEnvSetupError(
                f"it installs another version of {name}, and workers are forked from a process that has loaded "
                f"{name} {version} already (from {os.path.dirname(where)}). Install that version where the driver "
                f"runs, or leave {name} out of pip=[...]"
            )
