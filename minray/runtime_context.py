"""Where am I?  `get_runtime_context()` tells a program which job, node, worker, task and actor it is part of."""

from __future__ import annotations

import os
from typing import Any

from minray import api, ids
from minray.core_worker import CoreWorker
from minray.driver import Driver
from minray.types import ActorID, JobID, NodeID, TaskID, WorkerID


class RuntimeContext:
    """IDs are hex strings, as in Ray; None where there is no such thing."""

    def __init__(self, core: CoreWorker) -> None:
        self._core = core

    def get_job_id(self) -> str:
        return self._core.job_id.hex()

    def get_node_id(self) -> str:
        return self._core.node_id.hex()

    def get_worker_id(self) -> str:
        return ids.pack_id(self._core.job_id[:8], self._core.client, ids.WORKER).hex()

    def get_task_id(self) -> str | None:
        """None in the driver."""
        return None if isinstance(self._core, Driver) else self._core.context().task_id.hex()

    def get_task_name(self) -> str | None:
        task_options = self._core.context().options
        return task_options.name if task_options is not None else None

    def get_task_function_name(self) -> str | None:
        """The name of the function or method itself, whatever ``name=`` the task was given."""
        from minray.worker import Worker

        task_options = self._core.context().options
        if task_options is None or not isinstance(self._core, Worker):
            return None
        return self._core.function_name(task_options)

    def get_actor_id(self) -> str | None:
        actor_id = getattr(self._core, "actor_id", None)
        return actor_id.hex() if actor_id is not None else None

    def get_actor_name(self) -> str | None:
        actor_id = getattr(self._core, "actor_id", None)
        for row in api._query("actors"):
            if row[0] == actor_id:
                return str(row[2] or "")
        return None

    def get_assigned_resources(self) -> dict[str, float]:
        """What the task or actor holds; {} in the driver."""
        return dict(getattr(self._core, "resources", {}))

    def get_accelerator_ids(self) -> dict[str, list[str]]:
        return {"GPU": [str(gpu) for gpu in getattr(self._core, "gpu_ids", ())]}

    def get_node_labels(self) -> dict[str, str]:
        """Those of `init(labels=)`, and "ray.io/node-id"."""
        return dict(api._query("labels"))

    def get_placement_group_id(self) -> str | None:
        """Of the group that the task or actor runs in."""
        placement = self._core.placement
        return placement[0].hex() if placement else None

    def is_canceled(self) -> bool:
        """Whether minray.cancel() was called on the task or call that asks.

        A method of a plain or threaded actor is not interrupted when it is cancelled: this is how it learns of it.

        Raises RuntimeError in the driver, and in an asyncio actor, whose coroutines get an asyncio.CancelledError
        instead."""
        from minray.worker import Worker

        core = self._core
        if not isinstance(core, Worker):
            raise RuntimeError("is_canceled() is for tasks and methods of actors: the driver cannot be cancelled.")
        if core.actor_options is not None and core.actor_options.is_async:
            raise RuntimeError(
                "is_canceled() is not for asyncio actors: a coroutine that is cancelled gets an "
                "asyncio.CancelledError where it awaits."
            )
        return core.context().task_id in core._cancelled

    is_cancelled = is_canceled

    @property
    def runtime_env(self) -> dict[str, Any]:
        """The environment of whoever asks, as a `minray.runtime_env.RuntimeEnv`; in the driver, the job's."""
        import json

        from minray.runtime_env import RuntimeEnv

        return RuntimeEnv(_validate=False, **json.loads(self.get_runtime_env_string()))

    def get_runtime_env_string(self) -> str:
        """The same, as JSON; "{}" if there is none."""
        return self._core.runtime_env or "{}"

    @property
    def job_id(self) -> JobID:
        return JobID(self._core.job_id)

    @property
    def node_id(self) -> NodeID:
        return NodeID(self._core.node_id)

    @property
    def worker_id(self) -> WorkerID:
        return WorkerID.from_hex(self.get_worker_id())

    @property
    def task_id(self) -> TaskID | None:
        task_id = self.get_task_id()
        return None if task_id is None else TaskID.from_hex(task_id)

    @property
    def actor_id(self) -> ActorID | None:
        actor_id = self.get_actor_id()
        return None if actor_id is None else ActorID.from_hex(actor_id)

    @property
    def namespace(self) -> str:
        return self._core.namespace

    @property
    def was_current_actor_reconstructed(self) -> bool:
        """Whether this actor was made again after its worker had died."""
        return bool(getattr(self._core, "reconstructed", False))

    @property
    def current_actor(self) -> Any:
        """A handle to the actor that asks."""
        from minray.actor import handle_of
        from minray.worker import Worker

        core = self._core
        if not isinstance(core, Worker) or core.actor_id is None or core.actor_options is None:
            raise RuntimeError("current_actor: this is not an actor")
        return handle_of(core.actor_id, core.actor_options.interface)

    def get(self) -> dict[str, Any]:
        return {
            "job_id": self.get_job_id(), "node_id": self.get_node_id(), "namespace": self.namespace, "pid": os.getpid(),
        }  # fmt: skip


def get_runtime_context() -> RuntimeContext:
    """The context of whoever calls: driver, task or actor."""
    return RuntimeContext(api.core())


def get_gpu_ids() -> list[int | str]:
    """The GPUs that the calling task or actor may use; [] in the driver."""
    return list(getattr(api.core(), "gpu_ids", ()))
