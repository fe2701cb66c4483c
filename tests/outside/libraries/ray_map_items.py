"""ray-map: a map over items with batches, back-pressure and a limit of time for each."""

from ray_map import RayMap


def square(x):
    if x == 3:
        raise ValueError("three")
    return x * x


mapped = RayMap(square, batch_size=4, max_pending=4)
assert list(mapped.imap(range(10, 30))) == [x * x for x in range(10, 30)]
results = dict(mapped.imap(range(8), safe_exceptions=True, keep_order=False, ret_args=True))
assert isinstance(results.pop(3), Exception)
assert results == {x: x * x for x in range(8) if x != 3}, results
print("ray-map:", results)
