"""Generators: results of a task as they come, and parts whose number is not known before."""

import numpy as np
import ray

ray.init(num_cpus=2)


@ray.remote(num_returns="streaming")
def produce(n):
    for i in range(n):
        yield np.full(10, i)


assert [int(ray.get(ref)[0]) for ref in produce.remote(5)] == [0, 1, 2, 3, 4]


@ray.remote
def task_that_yields():
    yield 0
    yield 1
    yield 2


generator = task_that_yields.remote()
assert isinstance(generator, ray.ObjectRefGenerator)
assert [ray.get(ref) for ref in generator] == [0, 1, 2]


@ray.remote(num_returns="streaming")
def fails():
    yield 1
    raise ValueError("midway")


stream = fails.remote()
assert ray.get(next(stream)) == 1
try:
    ray.get(next(stream))
except ValueError:
    pass
else:
    raise AssertionError("the error of a generator was lost")


@ray.remote(num_returns="dynamic")
def split(array, chunk):
    for start in range(0, len(array), chunk):
        yield array[start : start + chunk]


refs = list(ray.get(split.remote(np.ones(100), 30)))
assert [len(ray.get(ref)) for ref in refs] == [30, 30, 30, 10]
print("generators: done")
