"""`JobConfig`: what a driver says of its whole run, in one object for ``init(job_config=...)``.

Owns the translation into options of `init`.  Left out: what concerns Java and C++ workers, and a lifetime for all
actors: both are refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class JobConfig:
    """Options of a job, under Ray's names.

    Args:
        runtime_env: as ``init(runtime_env=...)``.
        ray_namespace: as ``init(namespace=...)``.
        metadata: text about the job by name, for programs that read it back from this object; minray does not look
            at it.
        default_actor_lifetime: "non_detached"; "detached" is a NotImplementedError: say so at each actor.

    >>> with minray.init(job_config=minray.job_config.JobConfig(ray_namespace="lab")):
    ...     minray.get_runtime_context().namespace
    'lab'
    """

    def __init__(
        self,
        jvm_options: Any = None,
        code_search_path: Any = None,
        runtime_env: Mapping[str, Any] | None = None,
        _client_job: bool = False,
        metadata: Mapping[str, str] | None = None,
        ray_namespace: str | None = None,
        default_actor_lifetime: str = "non_detached",
        **more: Any,
    ) -> None:
        if jvm_options or code_search_path:
            raise NotImplementedError("JobConfig(jvm_options=, code_search_path=): minray runs Python alone.")
        if more:
            raise TypeError(f"JobConfig() has no option {', '.join(map(repr, more))}.")
        self.metadata: dict[str, str] = dict(metadata or {})
        self.set_runtime_env(runtime_env)
        self.set_ray_namespace(ray_namespace)
        self.set_default_actor_lifetime(default_actor_lifetime)

    def set_metadata(self, key: str, value: str) -> None:
        self.metadata[key] = value

    def set_ray_namespace(self, ray_namespace: str | None) -> None:
        self.ray_namespace = ray_namespace

    def set_runtime_env(self, runtime_env: Mapping[str, Any] | None, validate: bool = False) -> None:
        self.runtime_env = runtime_env

    def set_default_actor_lifetime(self, default_actor_lifetime: str) -> None:
        if default_actor_lifetime == "detached":
            raise NotImplementedError(
                'JobConfig(default_actor_lifetime="detached"): say lifetime="detached" at each actor that shall '
                "outlive its handles."
            )
        if default_actor_lifetime != "non_detached":
            raise ValueError(
                f'default_actor_lifetime must be "non_detached" or "detached", got {default_actor_lifetime!r}.'
            )

    @classmethod
    def from_json(cls, config: Mapping[str, Any]) -> JobConfig:
        """From the fields' names and values."""
        return cls(**config)

    def options(self) -> dict[str, Any]:
        """The options of `init` that say the same."""
        return {"namespace": self.ray_namespace, "runtime_env": self.runtime_env}


def options_of(job_config: Any) -> dict[str, Any]:
    """What ``init(job_config=...)`` was given, as options of `init`."""
    if isinstance(job_config, Mapping):
        job_config = JobConfig.from_json(job_config)
    if not isinstance(job_config, JobConfig):
        raise TypeError(f"init(job_config=...) must be a minray.job_config.JobConfig or a dict, got {job_config!r}.")
    return {name: value for name, value in job_config.options().items() if value}
