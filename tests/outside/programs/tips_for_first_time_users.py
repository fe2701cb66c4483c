"""The tips: delay ray.get(), make tasks large enough, put large arguments once, process results as they come."""

import time

import numpy as np
import ray

ray.init(num_cpus=4)


@ray.remote
def do_some_work(x):
    time.sleep(0.2)
    return x


ray.get([do_some_work.remote(0) for _ in range(4)])  # Workers take their time to start, on a busy machine.
start = time.time()
results = ray.get([do_some_work.remote(x) for x in range(4)])
assert results == [0, 1, 2, 3]
assert time.time() - start < 0.75, "four sleeps on four CPUs were not at the same time"


def tiny_work(x):
    return x * 2


@ray.remote
def mega_work(start, end):
    return [tiny_work(x) for x in range(start, end)]


results = [value for part in ray.get([mega_work.remote(i * 100, (i + 1) * 100) for i in range(10)]) for value in part]
assert results == [2 * x for x in range(1000)]


@ray.remote
def no_work(a):
    return a.shape


a_id = ray.put(np.zeros((1000, 500)))
assert ray.get([no_work.remote(a_id) for _ in range(10)]) == [(1000, 500)] * 10


@ray.remote
def sleep_for(x):
    time.sleep(x / 20)
    return x


def process_incremental(total, result):
    return total + result


result_ids = [sleep_for.remote(x) for x in (3, 1, 2)]
total, order = 0, []
while result_ids:
    done_id, result_ids = ray.wait(result_ids)
    order.append(ray.get(done_id[0]))
    total = process_incremental(total, order[-1])
assert total == 6 and order == [1, 2, 3], order
print("tips: done")
