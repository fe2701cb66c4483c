"""Ray's Cluster on one machine: what its nodes have is one node's."""

import pytest

import minray
from minray import state
from minray.cluster_utils import Cluster


@pytest.fixture
def cluster():
    made = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    yield made
    made.shutdown()
    assert not minray.is_initialized()


def test_the_session_has_what_all_nodes_have(cluster):
    one = cluster.add_node(num_cpus=2, num_gpus=1, resources={"disk": 1}, object_store_memory=32 << 20)
    other = cluster.add_node(resources={"disk": 2, "tape": 1}, object_store_memory=32 << 20)
    cluster.wait_for_nodes()
    with pytest.raises(RuntimeError, match="there is no node yet"):
        one.node_id  # noqa: B018
    context = minray.init(address=cluster.address)
    resources = minray.cluster_resources()
    assert {name: resources[name] for name in ("CPU", "GPU", "disk", "tape")} == {"CPU": 4, "GPU": 1, "disk": 3, "tape": 1}
    assert context["node_id"] == one.node_id == other.unique_id == cluster.head_node.node_id
    assert [node.is_head() for node in cluster.list_all_nodes()] == [True, False, False]
    assert len(minray.nodes()) == 1 and minray.nodes()[0]["alive"]
    assert list(minray.nodes()[0]["Labels"]) == ["ray.io/node-id"]


def test_a_running_session_grows_and_what_waits_runs(cluster):
    cluster.connect(namespace="cluster")
    assert minray.get_runtime_context().namespace == "cluster"

    @minray.remote(num_cpus=1)
    class Holder:
        def ready(self):
            return True

    @minray.remote
    def f():
        return minray.get_gpu_ids()

    holder = Holder.remote()
    assert minray.get(holder.ready.remote())
    waits = f.remote()
    assert minray.wait([waits], timeout=0.05) == ([], [waits])
    late = cluster.add_node(num_cpus=2, num_gpus=2, resources={"late": 1})
    assert minray.get(waits) == [] and late.alive
    assert len(minray.get(f.options(num_gpus=2, resources={"late": 1}).remote())) == 2
    assert minray.cluster_resources()["CPU"] == 3 and minray.available_resources()["late"] == 1
    assert state.list_nodes()[0]["resources_total"]["GPU"] == 2
    with pytest.raises(NotImplementedError, match="its object store cannot grow"):
        cluster.add_node(object_store_memory=1 << 20)
    assert len(cluster.list_all_nodes()) == 2


def test_a_node_can_be_removed_before_and_not_while_the_session_runs(cluster):
    node = cluster.add_node(num_cpus=7)
    cluster.remove_node(node)
    assert not node.alive and cluster.worker_nodes == []
    with pytest.raises(ValueError, match="was removed already"):
        cluster.remove_node(node)
    staying = cluster.add_node(num_cpus=1)
    minray.init(address="auto")
    assert minray.cluster_resources()["CPU"] == 2
    with pytest.raises(NotImplementedError, match="none can fail alone.*Nothing was removed"):
        cluster.remove_node(staying)


def test_what_a_part_of_one_node_cannot_have_is_refused(cluster):
    with pytest.raises(NotImplementedError, match="cannot have labels of each"):
        cluster.add_node(labels={"zone": "a"})
    with pytest.raises(TypeError, match="no option 'num_cpu'"):
        cluster.add_node(num_cpu=1)
    cluster.add_node(dashboard_host="x", object_manager_port=1)  # Nothing to act on.
    with pytest.raises(ValueError, match="the nodes of a Cluster say what they have"):
        minray.init(address=cluster.address, num_cpus=3)
    with pytest.raises(ValueError, match="needs initialize_head=True"):
        Cluster(connect=True)
    with pytest.raises(ValueError, match="needs initialize_head=True"):
        Cluster(head_node_args={"num_cpus": 1})


def test_a_cluster_that_was_shut_down_is_not_found_and_another_session_is_not_its_own(cluster):
    minray.init(num_cpus=1)
    try:
        assert not cluster.is_running()
        cluster.shutdown()
        assert minray.is_initialized()
    finally:
        minray.shutdown()
    with pytest.raises(ConnectionError, match="there is no cluster to connect to"):
        minray.init(address=cluster.address)
    with pytest.raises(ConnectionError, match="Ray Client"):
        minray.init(address="ray://head:10001")


def test_connect_starts_the_session_at_once_and_it_can_be_started_again():
    cluster = Cluster(initialize_head=True, connect=True, head_node_args={"num_cpus": 2})
    assert minray.cluster_resources()["CPU"] == 2 and cluster.is_running()
    minray.shutdown()
    assert not cluster.is_running()
    cluster.add_node(num_cpus=1)
    minray.init(address=cluster.gcs_address)
    assert minray.cluster_resources()["CPU"] == 3
    cluster.shutdown()
