"""Names, namespaces, get_if_exists, detached actors, and passing handles around."""

import ray

ray.init(namespace="colors", num_cpus=2)


@ray.remote
class Counter:
    def __init__(self, start=0):
        self.value = start

    def increment(self):
        self.value += 1
        return self.value


orange = Counter.options(name="orange").remote()
assert ray.get(ray.get_actor("orange").increment.remote()) == 1
purple = Counter.options(name="purple", namespace="other", lifetime="detached").remote(10)
try:
    ray.get_actor("purple")
except ValueError:
    pass
else:
    raise AssertionError("a name of another namespace was found")
assert ray.get(ray.get_actor("purple", namespace="other").increment.remote()) == 11
assert ray.util.list_named_actors() == ["orange"]
assert {"name": "purple", "namespace": "other"} in ray.util.list_named_actors(all_namespaces=True)
again = Counter.options(name="orange", get_if_exists=True).remote(100)
assert again == orange and ray.get(again.increment.remote()) == 2


@ray.remote
def use(handle):
    assert isinstance(handle, ray.actor.ActorHandle)
    return ray.get([handle.increment.remote(), ray.get_actor("orange").increment.remote()])


assert ray.get(use.remote(orange)) == [3, 4]
context = ray.get_runtime_context()
assert context.namespace == "colors"


@ray.remote
class Who:
    def who(self):
        context = ray.get_runtime_context()
        assert context.get_actor_id() == context.current_actor._actor_id.hex()
        assert context.get_node_id() == ray.nodes()[0]["NodeID"]
        return context.get_actor_id(), context.get_actor_name(), context.get_task_name(), context.get_job_id()


who = Who.options(name="who").remote()
actor_id, name, task_name, job_id = ray.get(who.who.remote())
assert (actor_id, name, task_name, job_id) == (who._actor_id.hex(), "who", "Who.who", context.get_job_id())
ray.kill(purple)
print("named actors: done")
