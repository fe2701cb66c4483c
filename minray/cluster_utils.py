"""`Cluster`: Ray's several nodes on one machine, for tests; here their resources are one node's.

Owns the sum.  A minray session has one node; what `add_node` adds are resources of it, before the session
starts or after.  So a program that wants "4 nodes of 2 CPUs" gets 8 CPUs: what runs at the same time is the
same, where it runs is not.  What only several nodes can show is refused: a running node cannot be taken away.
(`minray.testing` kills workers, actors and the GCS; `minray simulate` has as many nodes as you like.)

The address names a Cluster of this process and nothing else; nothing listens there.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from typing import Any

from minray import api

_clusters: dict[str, Cluster] = {}
_made = 0


class Node:
    """Resources that were added to a `Cluster`; the node that they are part of is the session's one."""

    def __init__(self, cluster: Cluster, head: bool, given: Mapping[str, Any]) -> None:
        self.cluster = cluster
        self.head = head
        self.given = given  # options of init() for this part
        self.alive = True
        self.node_ip_address = "127.0.0.1"

    @property
    def node_id(self) -> str:
        """The ID of the session's node, the same for all.  Known as soon as the session has started."""
        if not api.is_initialized():
            raise RuntimeError("node_id: there is no node yet. Call minray.init(address=cluster.address) first.")
        return api.core().node_id.hex()

    unique_id = node_id

    @property
    def address(self) -> str:
        return self.cluster.address

    gcs_address = address

    def is_head(self) -> bool:
        return self.head

    def __repr__(self) -> str:
        amounts = ", ".join(f"{name}={value!r}" for name, value in self.given.items())
        return f"Node({amounts}, {'alive' if self.alive else 'removed'})"


class Cluster:
    """Several nodes' resources, for one session.

    Args:
        initialize_head: add a first node, the head.
        connect: start the session at once.
        head_node_args: options of that node: num_cpus (default 1), num_gpus, resources, object_store_memory.
        shutdown_at_exit: has no effect; a session ends with its driver in any case.

    >>> cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 2})
    >>> node = cluster.add_node(num_cpus=2, resources={"disk": 1})
    >>> context = minray.init(address=cluster.address)
    >>> minray.cluster_resources()["CPU"], minray.cluster_resources()["disk"]
    (4.0, 1.0)
    >>> cluster.shutdown()
    """

    def __init__(
        self,
        initialize_head: bool = False,
        connect: bool = False,
        head_node_args: Mapping[str, Any] | None = None,
        shutdown_at_exit: bool = True,
    ) -> None:
        global _made
        for option, given in (("head_node_args", head_node_args), ("connect", connect)):
            if given and not initialize_head:
                raise ValueError(f"Cluster({option}=...) is about the head node, so it needs initialize_head=True.")
        self.head_node: Node | None = None
        self.worker_nodes: list[Node] = []
        self.connected = False
        _made += 1
        self.address = f"127.0.0.1:{_made}"
        _clusters[self.address] = self
        if initialize_head:
            self.add_node(**(head_node_args or {}))
        if connect:
            self.connect()

    @property
    def gcs_address(self) -> str:
        return self.address

    def list_all_nodes(self) -> list[Node]:
        return [node for node in (self.head_node, *self.worker_nodes) if node is not None]

    def add_node(self, wait: bool = True, **node_args: Any) -> Node:
        """Add a node's resources; those of a running session grow at once.

        Args:
            wait: has no effect, as they are there on return.
            node_args: num_cpus (default 1), num_gpus, resources, object_store_memory (before the session
                starts alone), and what `minray.init` accepts without effect.

        Raises:
            NotImplementedError: what a part of one node cannot have of its own.
        """
        own = {name: node_args.pop(name, None) for name in ("num_cpus", "num_gpus", "resources", "object_store_memory")}
        own["num_cpus"] = 1 if own["num_cpus"] is None else own["num_cpus"]
        if node_args.get("labels"):
            raise NotImplementedError(
                "add_node(labels=...): the nodes of a Cluster are one node here, which cannot have labels of each. "
                "Give the node a resource of its own instead: add_node(resources={'name': 1})."
            )
        node_args = {name: value for name, value in node_args.items() if name not in _OF_RAYS_PROCESSES}
        api._check_init_options(node_args)
        node = Node(self, self.head_node is None, own)
        if self.is_running():
            if own["object_store_memory"]:
                raise NotImplementedError(
                    "add_node(object_store_memory=...): the session is running, and its object store cannot grow. "
                    "Add the node before minray.init(), or leave this out. Nothing was added."
                )
            api.add_resources(api._resources({"num_gpus": 0, **_given(own)}, memory=0))
        if self.head_node is None:
            self.head_node = node
        else:
            self.worker_nodes.append(node)
        return node

    def remove_node(self, node: Node, allow_graceful: bool = True) -> None:
        """Take a node's resources back, before the session starts.

        Raises:
            NotImplementedError: the session is running, and its one node with it.
        """
        if node not in self.list_all_nodes():
            raise ValueError(f"remove_node(): {node!r} is no node of this Cluster, or was removed already.")
        if self.is_running():
            raise NotImplementedError(
                "remove_node(): the nodes of a Cluster are one node here, so none can fail alone while the session "
                "runs. Nothing was removed. To see a program survive failures: minray.testing kills workers, actors "
                "and the GCS; minray simulate kills nodes."
            )
        node.alive = False
        if node is self.head_node:
            self.head_node = None
        else:
            self.worker_nodes.remove(node)

    def wait_for_nodes(self, timeout: float = 30) -> None:
        """Returns at once: what was added is there."""

    def connect(self, namespace: str | None = None) -> Any:
        """Start the session: ``minray.init(address=cluster.address)``."""
        return api.init(address=self.address, namespace=namespace)

    def is_running(self) -> bool:
        """Whether this process's session was made of this Cluster and has not ended."""
        return self.connected and api.is_initialized()

    def shutdown(self) -> None:
        """End the session, if it was made of this Cluster, and forget the nodes."""
        if self.is_running():
            api.shutdown()
        for node in self.list_all_nodes():
            node.alive = False
        self.head_node, self.worker_nodes, self.connected = None, [], False
        _clusters.pop(self.address, None)

    def options(self) -> dict[str, Any]:
        """The options of `minray.init` for all nodes together."""
        total: dict[str, Any] = {"num_cpus": 0, "num_gpus": 0, "resources": {}}
        for node in self.list_all_nodes():
            for name, value in _given(node.given).items():
                if isinstance(value, Mapping):
                    for kind, amount in value.items():
                        total[name][kind] = total[name].get(kind, 0) + amount
                else:
                    total[name] = total.get(name, 0) + value
        return total


_OF_RAYS_PROCESSES = (
    "dashboard_agent_listen_port", "gcs_server_port", "metrics_export_port", "min_worker_port", "max_worker_port",
    "node_ip_address", "node_name", "object_manager_port", "raylet_port", "redis_port", "temp_dir",
)  # fmt: skip
"""Ports and names of Ray's processes, which minray does not have."""


def _given(options: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in options.items() if value is not None}


def find(address: Any) -> Cluster:
    """The Cluster of this process with that address; for "auto" the newest."""
    cluster = None
    with contextlib.suppress(StopIteration):
        cluster = next(reversed(_clusters.values())) if address == "auto" else _clusters.get(address)
    if cluster is None:
        what = "there is no cluster to connect to"
        if isinstance(address, str) and address.startswith("ray://"):
            what = "Ray Client's addresses mean a cluster that runs elsewhere; minray has none"
        raise ConnectionError(f"init(address={address!r}): {what}. Leave address out to start a session here.")
    return cluster


__all__ = ["Cluster"]
