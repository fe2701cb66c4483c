"""What a job says about itself, in one object: ``minray.init(job_config=JobConfig(...))``, under Ray's names.

`init` has options of its own for most of it, and those count where both are given.  (A *durable* job, whose results are
kept, is another thing: ``init(job="name")``.)
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

LIFETIMES = ("detached", "non_detached")


class JobConfig:
    """The configuration of a job.

    Args:
        runtime_env: what its tasks and actors run in, see `minray.runtime_env.RuntimeEnv`.
        ray_namespace: where names of actors are looked up.
        default_actor_lifetime: "detached" or "non_detached", for actors that do not say.
        metadata: a dict of your own; minray keeps it here and does nothing with it.
        code_search_path: directories that workers can import from, after the driver's own.
        jvm_options: of Java workers, which there are none of: refused.

    Raises:
        NotImplementedError: for jvm_options.
        ValueError, TypeError: for what cannot be meant.

    >>> import minray
    >>> from minray.job_config import JobConfig
    >>> config = JobConfig(ray_namespace="lab", runtime_env={"env_vars": {"GREETING": "hello"}})
    >>> with minray.init(num_cpus=1, job_config=config):
    ...     minray.get_runtime_context().namespace
    'lab'
    """

    def __init__(
        self,
        jvm_options: Sequence[str] | None = None,
        code_search_path: Sequence[str] | None = None,
        runtime_env: Mapping[str, Any] | None = None,
        _client_job: bool = False,
        metadata: Mapping[str, str] | None = None,
        ray_namespace: str | None = None,
        default_actor_lifetime: str = "non_detached",
        _py_driver_sys_path: Sequence[str] | None = None,
    ) -> None:
        if jvm_options:
            raise NotImplementedError("JobConfig(jvm_options=...): there are no Java workers.")
        if _client_job:
            raise NotImplementedError("JobConfig(_client_job=True): there is no Ray Client.")
        self.jvm_options: list[str] = []
        self.code_search_path = _directories("code_search_path", code_search_path)
        self._py_driver_sys_path = _directories("_py_driver_sys_path", _py_driver_sys_path)
        self.metadata = dict(metadata or {})
        self.set_runtime_env(runtime_env)
        self.set_ray_namespace(ray_namespace)
        self.set_default_actor_lifetime(default_actor_lifetime)

    def set_runtime_env(self, runtime_env: Mapping[str, Any] | None, validate: bool = True) -> None:
        """The environment that the job's tasks and actors inherit; it is always checked."""
        from minray.runtime_env import checked

        self.runtime_env = checked(runtime_env, "JobConfig") if runtime_env is not None else None

    def set_ray_namespace(self, ray_namespace: str | None) -> None:
        """None: a namespace of the session's own."""
        if ray_namespace is not None and (not isinstance(ray_namespace, str) or not ray_namespace):
            raise ValueError(f"JobConfig(ray_namespace=...) must be a string that is not empty, got {ray_namespace!r}.")
        self.ray_namespace = ray_namespace

    def set_metadata(self, key: str, value: str) -> None:
        """Adds to the metadata."""
        self.metadata[key] = value

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        """The lifetime of actors that do not say."""
        if default_actor_lifetime not in LIFETIMES:
            raise ValueError(
                'JobConfig(default_actor_lifetime=...) must be "detached" or "non_detached", '
                f"got {default_actor_lifetime!r}."
            )
        self.default_actor_lifetime = default_actor_lifetime

    def set_py_logging_config(self, logging_config: Any = None) -> None:
        """Raises NotImplementedError: minray sets up no logging."""
        raise NotImplementedError(
            "JobConfig.set_py_logging_config(): minray sets up no logging; a runtime_env with "
            "worker_process_setup_hook does it in each worker."
        )

    @property
    def search_path(self) -> list[str]:
        """What workers' `sys.path` has in addition."""
        return [*self.code_search_path, *self._py_driver_sys_path]

    @classmethod
    def from_json(cls, job_config_json: Mapping[str, Any]) -> JobConfig:
        """Of a dict with the names of the arguments."""
        return cls(**job_config_json)

    def __repr__(self) -> str:
        return f"JobConfig({vars(self)})"


def _directories(name: str, paths: Sequence[str] | None) -> list[str]:
    if paths is not None and (isinstance(paths, str) or not all(isinstance(path, str) for path in paths)):
        raise TypeError(f"JobConfig({name}=...) must be a list of directories, got {paths!r}.")
    for path in paths or ():
        if not os.path.isdir(path):
            raise ValueError(f"JobConfig({name}=...): {path!r} is not a directory that is there.")
    return [os.path.abspath(path) for path in paths or ()]
