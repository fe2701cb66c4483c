"""Runtime environments: what a task, an actor or a job wants around it, checked, merged and made plain data.

A runtime environment goes through three hands:

1. *here*, in the process that submits.  `checked` looks at what the program says, where it says it, and names the
   mistake.  `resolve` merges it into what is inherited (`env_vars` by name, all else by key), and takes snapshots of
   local directories (snapshots.py), so that it is whole: a line of JSON, the same for the same environment.
2. the *node*, for which that line is no more than a key: workers of different keys do not mix (scheduler.py).
3. the *worker*, which sets it up before its first task (worker_environment.py).

Why snapshots, on one machine?  As in Ray, tasks shall see the directory as it was when the job began, however long
they wait and whatever is edited meanwhile; a retry or a replay must not find another program.  They are kept in the
session's directory, by the hash of what they contain, and are removed with it.

Left out, and refused with a sentence: conda, containers, uv, profilers, remote URIs, another Python.
"""

from __future__ import annotations

import json
import os
import re
import types
from collections.abc import Callable, Mapping
from typing import Any

from minray import snapshots
from minray.worker_environment import PICKLED, SETUP_TIMEOUT_S

KNOWN = (
    "config", "env_vars", "excludes", "pip", "py_modules", "worker_process_setup_hook", "working_dir",
)  # fmt: skip
REFUSED = {
    "conda": "minray makes no conda environments; start the driver in the one that you want, or say pip=[...]",
    "container": "workers are forked on this machine and not run in containers; start the driver in the container",
    "image_uri": "workers are forked on this machine and not run in containers; start the driver in the container",
    "uv": "packages are installed with pip; the same list as pip=[...] does it",
    "nsight": "workers are not started under a profiler",
    "_nsight": "workers are not started under a profiler",
    "rocprof_sys": "workers are not started under a profiler",
    "_rocprof_sys": "workers are not started under a profiler",
    "py_executable": "workers are forks of one process and run the driver's Python; start the driver with another",
    "java_jars": "there are no Java workers",
    "mpi": "workers are not started by MPI",
    "_ray_release": "it names internals of Ray",
    "_ray_commit": "it names internals of Ray",
    "_inject_current_ray": "it names internals of Ray",
}


class RuntimeEnvConfig(dict[str, Any]):
    """How a runtime environment is set up.

    Args:
        setup_timeout_seconds: how long installing packages may take, in seconds; -1: as long as it likes.
        eager_install: whether a job's packages are installed by `init` (the default) or by its first task.

    >>> from minray.runtime_env import RuntimeEnvConfig
    >>> RuntimeEnvConfig(setup_timeout_seconds=30)["eager_install"]
    True
    """

    known_fields = frozenset(("setup_timeout_seconds", "eager_install", "log_files"))

    def __init__(
        self, setup_timeout_seconds: int = SETUP_TIMEOUT_S, eager_install: bool = True, log_files: Any = None
    ) -> None:
        super().__init__(setup_timeout_seconds=setup_timeout_seconds, eager_install=eager_install)
        if log_files is not None:
            self["log_files"] = log_files


class RuntimeEnv(dict[str, Any]):
    """A runtime environment, checked when it is made; a plain dict does as well wherever one is taken.

    Args:
        env_vars: environment variables; ``${NAME}`` in a value stands for what NAME was before.
        working_dir: a local directory, or a .zip file: tasks run in a copy of it, which is on their `sys.path`.
        py_modules: packages, modules (paths or the modules themselves), .zip or .whl files that tasks can import.
        excludes: what is left out of those directories, in patterns as in a .gitignore file.
        pip: requirements; or the path of a requirements file; or a dict with "packages" and, if wanted, "pip_check",
            "pip_version", "pip_install_options".
        worker_process_setup_hook: a function, or its "module.name", that is called when all that is done.
        config: a `RuntimeEnvConfig`, or a dict of that kind.

    Raises:
        TypeError: a key that does not exist, with the nearest that does.
        ValueError: a value that cannot be meant; a directory that is not there.
        NotImplementedError: a key of Ray that minray knows of and cannot do.

    >>> from minray.runtime_env import RuntimeEnv
    >>> RuntimeEnv(env_vars={"GREETING": "hello"})
    {'env_vars': {'GREETING': 'hello'}}
    """

    known_fields = frozenset((*KNOWN, *REFUSED))

    def __init__(self, *, _validate: bool = True, **given: Any) -> None:
        fields = {key: value for key, value in given.items() if value is not None}
        super().__init__(checked(fields, "RuntimeEnv") if _validate else fields)

    def to_dict(self) -> dict[str, Any]:
        return dict(self)


# ---------------------------------------------------------------- what a program says, checked


def checked(given: Any, where: str) -> dict[str, Any]:
    """The same with absolute paths, if it can be meant; else the mistake, as TypeError, ValueError, ..."""
    if not isinstance(given, Mapping):
        raise TypeError(
            f"{where}(runtime_env=...) must be a dict or a minray.runtime_env.RuntimeEnv, got {given!r}. "
            'For example: runtime_env={"env_vars": {"NAME": "value"}}'
        )
    result = {}
    for key, value in given.items():
        if value is None:
            continue
        if key in REFUSED:
            raise NotImplementedError(f'runtime_env["{key}"]: {REFUSED[key]}.')
        if key not in _CHECKS:
            from minray.options import nearest

            hint = nearest(str(key), dict.fromkeys(KNOWN)).replace("=?", "?")
            raise TypeError(f"runtime_env has no key {key!r}.{hint}")
        result[key] = _CHECKS[key](value)
    if "excludes" in result and not {"working_dir", "py_modules"} & result.keys():
        raise ValueError(
            'runtime_env["excludes"] says what to leave out of working_dir or py_modules, and neither is given here.'
        )
    return result


def _env_vars(value: Any) -> dict[str, str]:
    if not isinstance(value, Mapping):
        raise TypeError(f'runtime_env["env_vars"] must be a dict of strings, got {value!r}.')
    for name, text in value.items():
        if not isinstance(name, str) or not name or "=" in name or "\0" in name:
            raise TypeError(f'runtime_env["env_vars"]: {name!r} cannot be the name of an environment variable.')
        if not isinstance(text, str):
            raise TypeError(
                f'runtime_env["env_vars"][{name!r}] must be a string, got {text!r}; you may mean {str(text)!r}.'
            )
        if "\0" in text:
            raise ValueError(f'runtime_env["env_vars"][{name!r}] contains a null character.')
    return dict(value)


def _working_dir(value: Any) -> str:
    path = _path(value, "working_dir")
    if not (os.path.isdir(path) or snapshots.is_archive(path)):
        raise ValueError(f'runtime_env["working_dir"] must be a directory or a .zip file, and {path} is neither.')
    return path


def _path(value: Any, key: str) -> str:
    """Absolute, and it is there."""
    if not isinstance(value, (str, os.PathLike)) or not str(value):
        raise TypeError(f'runtime_env["{key}"] must be the path of a local directory or .zip file, got {value!r}.')
    text = os.fspath(value)
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text):
        raise NotImplementedError(
            f'runtime_env["{key}"]: {text!r} is a URI, and minray fetches nothing. Give the path of a local directory '
            "or .zip file."
        )
    path = os.path.abspath(os.path.expanduser(text))
    if not os.path.exists(path):
        raise ValueError(
            f'runtime_env["{key}"]: there is no {path}. Relative paths start at the directory that this process is in, '
            f"now {os.getcwd()}."
        )
    return path


def _py_modules(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)):
        raise TypeError(f'runtime_env["py_modules"] must be a list of modules or paths, got {value!r}.')
    return [_py_module(entry) for entry in value]


def _py_module(entry: Any) -> str:
    if isinstance(entry, types.ModuleType):
        paths = list(getattr(entry, "__path__", ())) or [getattr(entry, "__file__", None)]
        if len(paths) != 1 or not isinstance(paths[0], str) or not os.path.exists(paths[0]):
            raise ValueError(
                f'runtime_env["py_modules"]: {entry.__name__} lies in no single file or directory. Give its path.'
            )
        return os.path.abspath(paths[0])
    path = _path(entry, "py_modules")
    if not (os.path.isdir(path) or path.endswith(".py") or snapshots.is_archive(path)):
        raise ValueError(
            f'runtime_env["py_modules"]: {path} is neither a package (a directory) nor a .py, .zip or .whl file.'
        )
    return path


def _excludes(value: Any) -> list[str]:
    if not isinstance(value, (list, tuple)) or not all(isinstance(pattern, str) for pattern in value):
        raise TypeError(f'runtime_env["excludes"] must be a list of patterns as in .gitignore, got {value!r}.')
    return list(value)


def _pip(value: Any) -> dict[str, Any]:
    result: dict[str, Any] = {"packages": value, "pip_check": False}
    if isinstance(value, Mapping):
        for key in value:
            if key not in ("packages", "pip_check", "pip_version", "pip_install_options"):
                raise TypeError(
                    f'runtime_env["pip"] has no key {key!r}: it knows packages, pip_check, pip_version and '
                    "pip_install_options."
                )
        if "packages" not in value:
            raise ValueError('runtime_env["pip"] is a dict without "packages", the list of requirements.')
        result.update(value)
    packages = result["packages"]
    if isinstance(packages, (str, os.PathLike)):
        result["packages"] = _requirements(_path(packages, "pip"))
    elif isinstance(packages, (list, tuple)) and all(isinstance(line, str) for line in packages):
        result["packages"] = [_absolute(line, os.getcwd()) for line in packages]
    else:
        raise TypeError(
            f'runtime_env["pip"] must be a list of requirements or the path of a requirements file, got {packages!r}.'
        )
    if not isinstance(result["pip_check"], bool):
        raise TypeError(f'runtime_env["pip"]["pip_check"] must be True or False, got {result["pip_check"]!r}.')
    version = result.get("pip_version", "==1")
    if not isinstance(version, str) or not re.match(r"\s*[=<>!~]", version):
        raise ValueError(f'runtime_env["pip"]["pip_version"] must be like "==24.0", got {version!r}.')
    options = result.get("pip_install_options", [])
    if not isinstance(options, (list, tuple)) or not all(isinstance(option, str) for option in options):
        raise TypeError(f'runtime_env["pip"]["pip_install_options"] must be a list of strings, got {options!r}.')
    return result


def _requirements(path: str) -> list[str]:
    try:
        with open(path, encoding="utf-8") as file:
            lines = [line.strip() for line in file]
    except (OSError, UnicodeDecodeError) as error:
        raise ValueError(f'runtime_env["pip"]: the requirements file {path} cannot be read: {error}.') from None
    kept = (re.sub(r"\s+#.*", "", line) for line in lines if line and not line.startswith("#"))
    return [_absolute(line, os.path.dirname(path)) for line in kept]


def _absolute(requirement: str, directory: str) -> str:
    """Of one that is a path, the path from the root: pip runs somewhere else."""
    flag, _, rest = requirement.partition(" ") if requirement.startswith("-") else ("", "", requirement)
    path = os.path.join(directory, rest.strip())
    is_one = rest.strip().startswith((".", os.sep))
    if (is_one or flag in ("-r", "-c", "-e") or os.sep in rest) and os.path.exists(path):
        return f"{flag} {os.path.abspath(path)}".lstrip()
    if is_one:
        raise ValueError(f'runtime_env["pip"]: {requirement!r} is a path, and there is no {os.path.abspath(path)}.')
    return requirement


def _hook(value: Any) -> str:
    if isinstance(value, str) and "." in value:
        return value
    if isinstance(value, Callable):  # type: ignore[arg-type]
        import base64

        from minray.core_worker import serialize_function

        return PICKLED + base64.b64encode(serialize_function(value)).decode()
    raise TypeError(
        'runtime_env["worker_process_setup_hook"] must be a function without arguments, or "module.name", '
        f"got {value!r}."
    )


def _config(value: Any) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise TypeError(f'runtime_env["config"] must be a dict or a RuntimeEnvConfig, got {value!r}.')
    for key in value:
        if key not in RuntimeEnvConfig.known_fields:
            from minray.options import nearest

            hint = nearest(str(key), dict.fromkeys(RuntimeEnvConfig.known_fields)).replace("=?", "?")
            raise TypeError(f'runtime_env["config"] has no key {key!r}.{hint}')
    if value.get("log_files") is not None:
        raise NotImplementedError('runtime_env["config"]["log_files"]: there is no dashboard to show them.')
    timeout = value.get("setup_timeout_seconds", SETUP_TIMEOUT_S)
    if isinstance(timeout, bool) or not isinstance(timeout, (int, float)) or not (timeout > 0 or timeout == -1):
        raise ValueError(
            'runtime_env["config"]["setup_timeout_seconds"] must be a number of seconds, more than 0, or -1 for no '
            f"limit, got {timeout!r}."
        )
    eager = value.get("eager_install", True)
    if not isinstance(eager, bool):
        raise ValueError(f'runtime_env["config"]["eager_install"] must be True or False, got {eager!r}.')
    return {"setup_timeout_seconds": timeout, "eager_install": eager}


_CHECKS: dict[str, Callable[[Any], Any]] = {
    "config": _config,
    "env_vars": _env_vars,
    "excludes": _excludes,
    "pip": _pip,
    "py_modules": _py_modules,
    "worker_process_setup_hook": _hook,
    "working_dir": _working_dir,
}


# ---------------------------------------------------------------- merged, and whole


def resolve(inherited: str, given: Mapping[str, Any], store: str) -> str:
    """What `checked` let pass, merged into the inherited one; as JSON, "" for nothing.

    `store`: where snapshots are kept; what lies there already is one.  Raises ValueError for a directory that is too
    large or cannot be read."""
    env = dict(given)
    excludes = env.pop("excludes", [])
    if "working_dir" in env:
        env["working_dir"] = snapshots.of_directory(env["working_dir"], store, excludes)
    if "py_modules" in env:
        env["py_modules"] = [snapshots.of_module(path, store, excludes) for path in env["py_modules"]]
    if "pip" in env:
        packages = [snapshots.of_requirement(line, store) for line in env["pip"]["packages"]]
        env["pip"] = {**env["pip"], "packages": packages}
    merged = json.loads(inherited) if inherited else {}
    env_vars = {**merged.get("env_vars", {}), **env.get("env_vars", {})}
    merged.update(env)
    if env_vars:
        merged["env_vars"] = env_vars
    merged = {key: value for key, value in merged.items() if value or key == "pip"}
    return json.dumps(merged, sort_keys=True) if merged else ""
