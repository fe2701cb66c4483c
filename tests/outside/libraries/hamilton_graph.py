"""Hamilton runs each node of a graph of functions as a Ray task."""

import ray
from hamilton import ad_hoc_utils, base, driver
from hamilton.plugins import h_ray


def a(x: int) -> int:
    return x + 1


def b(a: int) -> int:
    return a * 2


def c(a: int, b: int) -> int:
    return a + b


ray.init(num_cpus=2)
graph = ad_hoc_utils.create_temporary_module(a, b, c, module_name="graph")
adapter = h_ray.RayGraphAdapter(result_builder=base.DictResult())
result = driver.Driver({"x": 1}, graph, adapter=adapter).execute(["a", "b", "c"])
assert result == {"a": 2, "b": 4, "c": 6}, result
print("hamilton:", result)
