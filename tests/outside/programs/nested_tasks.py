"""A task that submits tasks: quicksort, and the anti-pattern of waiting in the order of submission."""

import random

import ray


@ray.remote
def quick_sort_distributed(collection):
    if len(collection) <= 200:
        return sorted(collection)
    pivot = collection.pop()
    greater = [element for element in collection if element > pivot]
    lesser = [element for element in collection if element <= pivot]
    lesser = quick_sort_distributed.remote(lesser)
    greater = quick_sort_distributed.remote(greater)
    return [*ray.get(lesser), pivot, *ray.get(greater)]


ray.init(num_cpus=1)  # A parent that waits lends its CPU to its children.
unsorted = [random.randrange(1_000_000) for _ in range(4_000)]
assert ray.get(quick_sort_distributed.remote(unsorted)) == sorted(unsorted)


@ray.remote
def echo(i):
    return i


refs = [echo.remote(i) for i in range(10)]
seen, unfinished = [], refs
while unfinished:
    finished, unfinished = ray.wait(unfinished, num_returns=1)
    seen.append(ray.get(finished[0]))
assert sorted(seen) == list(range(10))


@ray.remote
def make_refs():
    return [echo.remote(i) for i in range(3)]


nested = ray.get(make_refs.remote())
assert all(isinstance(ref, ray.ObjectRef) for ref in nested) and ray.get(nested) == [0, 1, 2]
try:
    ray.get([nested])
except (TypeError, ValueError) as error:
    assert "list" in str(error), error
else:
    raise AssertionError("a list of lists of refs was got")
print("nested tasks: done")
