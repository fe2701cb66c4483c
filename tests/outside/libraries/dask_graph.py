"""Dask's collections, computed by ray.util.dask."""

import dask
import dask.array as da
import numpy as np
import ray
from ray.util.dask import disable_dask_on_ray, enable_dask_on_ray, ray_dask_get

ray.init(num_cpus=2)
array = da.arange(10_000, chunks=1_000)
assert (array**2).sum().compute(scheduler=ray_dask_get) == (np.arange(10_000) ** 2).sum()
enable_dask_on_ray()
assert dask.config.get("scheduler") is ray_dask_get
assert float(da.ones((100, 100), chunks=(50, 50)).dot(da.ones((100, 100), chunks=(50, 50))).sum().compute()) == 1e6
disable_dask_on_ray()
print("dask: done")
