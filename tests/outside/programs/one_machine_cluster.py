"""Ray's Cluster for tests: resources of several nodes on one machine."""

import ray
from ray.cluster_utils import Cluster

cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
cluster.add_node(num_cpus=1, resources={"special": 1})
ray.init(address=cluster.address)
assert ray.cluster_resources()["CPU"] == 2


@ray.remote(resources={"special": 1})
def where():
    return ray.get_runtime_context().get_node_id()


assert ray.get(where.remote()) in {node["NodeID"] for node in ray.nodes() if node["Alive"]}
node_ip = ray.util.get_node_ip_address()
assert ray.nodes()[0]["NodeManagerAddress"] == node_ip
assert ray.get(where.options(resources={f"node:{node_ip}": 0.001}).remote()) == ray.nodes()[0]["NodeID"]
late = cluster.add_node(num_cpus=2, resources={"late": 1})
cluster.wait_for_nodes()
assert ray.cluster_resources()["CPU"] == 4
assert ray.get(where.options(resources={"late": 1}).remote()) == late.node_id
ray.shutdown()
cluster.shutdown()
print("cluster: done")
