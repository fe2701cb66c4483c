"""``ray._private.worker`` (once ``ray.worker``): the public functions again, and what is asked of `global_worker`."""

from __future__ import annotations

from typing import Any

from minray import api
from minray.actor import get_actor
from minray.api import Context as BaseContext
from minray.api import cancel, get, init, is_initialized, kill, put, remote, shutdown, wait
from minray.runtime_context import get_gpu_ids
from minray.types import JobID, NodeID, WorkerID

SCRIPT_MODE, WORKER_MODE, LOCAL_MODE = 0, 1, 2


class GlobalWorker:
    """This process's part of the session, in the words that are asked of Ray's."""

    @property
    def connected(self) -> bool:
        return api.is_initialized()

    @property
    def mode(self) -> int | None:
        """SCRIPT_MODE in the driver, WORKER_MODE in a worker, None without a session."""
        if not api.is_initialized():
            return None
        return WORKER_MODE if api.core().client else SCRIPT_MODE

    @property
    def namespace(self) -> str:
        return api.core().namespace

    @property
    def current_job_id(self) -> JobID:
        return JobID(api.core().job_id)

    @property
    def current_node_id(self) -> NodeID:
        return NodeID(api.core().node_id)

    @property
    def worker_id(self) -> bytes:
        from minray.runtime_context import get_runtime_context

        return WorkerID.from_hex(get_runtime_context().get_worker_id())

    @property
    def node_ip_address(self) -> str:
        return "127.0.0.1"

    def check_connected(self) -> None:
        if not api.is_initialized():
            raise RuntimeError("there is no session. Call ray.init() first.")

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"global_worker.{name} is inner to Ray; minray has nothing of the kind.")


global_worker = GlobalWorker()

__all__ = [
    "LOCAL_MODE", "SCRIPT_MODE", "BaseContext", "WORKER_MODE", "cancel", "get", "get_actor", "get_gpu_ids",
    "global_worker", "init", "is_initialized", "kill", "put", "remote", "shutdown", "wait",
]  # fmt: skip
