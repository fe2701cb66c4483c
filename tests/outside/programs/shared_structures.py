"""ray.util: a queue, a pool of processes, metrics, states, and a graph that is run later."""

import ray
from ray.dag import InputNode, MultiOutputNode
from ray.util.multiprocessing import Pool
from ray.util.queue import Empty, Queue
from ray.util.state import list_actors, summarize_tasks

ray.init(num_cpus=2)
queue = Queue(maxsize=100)


@ray.remote
def consumer(queue):
    items = []
    while True:
        try:
            items.append(queue.get(block=True, timeout=0.2))
        except Empty:
            return items


[queue.put(i) for i in range(10)]
consumed = ray.get([consumer.remote(queue) for _ in range(2)])
assert sorted(sum(consumed, [])) == list(range(10))


def square(x):
    return x * x


with Pool(processes=2) as pool:
    assert pool.map(square, range(10)) == [x * x for x in range(10)]
    assert sorted(pool.imap_unordered(square, range(5))) == [0, 1, 4, 9, 16]


@ray.remote
def add(a, b):
    return a + b


with InputNode() as value:
    first = add.bind(value, 1)
    graph = MultiOutputNode([add.bind(first, first), add.bind(first, 10)])
assert ray.get(graph.execute(4)) == [10, 15]
assert summarize_tasks()["cluster"]["summary"]["add"]["state_counts"]["FINISHED"] == 3
assert all(actor["state"] in ("ALIVE", "DEAD", "PENDING_CREATION") for actor in list_actors())
print("structures: done")
