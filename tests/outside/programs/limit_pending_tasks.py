"""ray.wait() holds the number of tasks in flight down; resources hold down how many run at once."""

import ray

ray.init(num_cpus=2, resources={"slot": 2})


@ray.remote
class Gauge:
    def __init__(self):
        self.now = self.most = 0

    def enter(self):
        self.now += 1
        self.most = max(self.most, self.now)

    def leave(self):
        self.now -= 1

    def peak(self):
        return self.most


@ray.remote(num_cpus=0)
def work(gauge, i):
    ray.get(gauge.enter.remote())
    ray.get(gauge.leave.remote())
    return i


gauge = Gauge.remote()
MAX_NUM_PENDING_TASKS = 3
result_refs, results = [], []
for i in range(20):
    if len(result_refs) >= MAX_NUM_PENDING_TASKS:
        ready_refs, result_refs = ray.wait(result_refs, num_returns=1)
        results += ray.get(ready_refs)
    result_refs.append(work.remote(gauge, i))
results += ray.get(result_refs)
assert sorted(results) == list(range(20))
assert ray.get(gauge.peak.remote()) <= MAX_NUM_PENDING_TASKS

slotted = Gauge.remote()
ray.get([work.options(resources={"slot": 1}).remote(slotted, i) for i in range(20)])
assert ray.get(slotted.peak.remote()) <= 2

# Back-pressure at an actor: more than max_pending_calls is an exception.
limited = Gauge.options(max_pending_calls=2).remote()
blocked = limited.__ray_call__.remote(lambda self: __import__("time").sleep(0.3))
refused = 0
for _ in range(5):
    try:
        limited.enter.remote()
    except ray.exceptions.PendingCallsLimitExceeded:
        refused += 1
assert refused >= 3, refused
ray.get(blocked)
print("limits: done")
