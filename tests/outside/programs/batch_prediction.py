"""A model in the object store, batches through tasks, then through an ActorPool."""

import numpy as np
import ray
from ray.util import ActorPool


class Model:
    def __init__(self):
        self.weights = np.ones(500_000)

    def predict(self, batch):
        return batch.sum(axis=1) * self.weights[0]


@ray.remote
def make_prediction(model, batch):
    assert not model.weights.flags.writeable  # One copy in shared memory, for all.
    return model.predict(batch)


@ray.remote
class BatchPredictor:
    def __init__(self, model):
        self.model = model

    def predict(self, batch):
        return self.model.predict(batch)


batches = [np.full((10, 3), i) for i in range(8)]
model_ref = ray.put(Model())
result_refs = [make_prediction.remote(model_ref, batch) for batch in batches]
results = ray.get(result_refs)
assert [int(result[0]) for result in results] == [3 * i for i in range(8)]

pool = ActorPool([BatchPredictor.remote(model_ref) for _ in range(2)])
for batch in batches:
    pool.submit(lambda actor, batch: actor.predict.remote(batch), batch)
results = []
while pool.has_next():
    results.append(int(pool.get_next()[0]))
assert results == [3 * i for i in range(8)]
assert sorted(int(r[0]) for r in pool.map_unordered(lambda a, b: a.predict.remote(b), batches)) == results
print("batch prediction: done")
