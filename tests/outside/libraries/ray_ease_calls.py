"""ray-ease: functions and classes that look local and run on Ray."""

import ray_ease


@ray_ease.parallelize
def square(x):
    return x * x


@ray_ease.parallelize
class Counter:
    def __init__(self, start):
        self.value = start

    def add(self, n):
        self.value += n
        return self.value


ray_ease.init("ray", num_cpus=2)
assert ray_ease.retrieve([square(x) for x in range(6)], ordered=True) == [x * x for x in range(6)]
counter = Counter(10)
assert ray_ease.retrieve([counter.add(1) for _ in range(3)], ordered=True) == [11, 12, 13]
print("ray-ease: done")
