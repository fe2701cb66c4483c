"""Placement groups: resources reserved together, and tasks and actors inside."""

import ray
from ray.util.placement_group import placement_group, placement_group_table, remove_placement_group
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy, PlacementGroupSchedulingStrategy

ray.init(num_cpus=2)
pg = placement_group([{"CPU": 1}, {"CPU": 1}], strategy="PACK")
ray.get(pg.ready(), timeout=10)
assert placement_group_table(pg)["state"] == "CREATED"


@ray.remote(num_cpus=1)
class Actor:
    def ready(self):
        return ray.util.get_current_placement_group() is not None


actor = Actor.options(scheduling_strategy=PlacementGroupSchedulingStrategy(placement_group=pg)).remote()
assert ray.get(actor.ready.remote(), timeout=10)
remove_placement_group(pg)


@ray.remote
def f():
    return ray.get_runtime_context().get_node_id()


node_id = ray.get_runtime_context().get_node_id()
affinity = NodeAffinitySchedulingStrategy(node_id=node_id, soft=False)
assert ray.get(f.options(scheduling_strategy=affinity).remote()) == node_id
assert ray.get(f.options(scheduling_strategy="SPREAD").remote()) == node_id
print("placement: done")
