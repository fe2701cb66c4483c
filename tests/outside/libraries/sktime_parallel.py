"""sktime runs its loops through `parallelize`, which has a backend for Ray."""

from sktime.utils.parallel import parallelize


def square(x, meta):
    return x * x + meta["offset"]


result = parallelize(
    square, range(8), meta={"offset": 1}, backend="ray", backend_params={"ray_remote_args": {"num_cpus": 1}}
)
assert result == [x * x + 1 for x in range(8)], result
print("sktime:", result)
