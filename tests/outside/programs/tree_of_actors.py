"""Supervisors that own their workers: what a supervisor made ends with it."""

import ray


@ray.remote(num_cpus=0)
class Trainer:
    def __init__(self, hyperparameter, data):
        self.hyperparameter = hyperparameter
        self.data = data

    def fit(self):
        return sum(self.data) * self.hyperparameter


@ray.remote(num_cpus=0)
class Supervisor:
    def __init__(self, hyperparameter, data):
        self.trainers = [Trainer.remote(hyperparameter, part) for part in data]

    def fit(self):
        return ray.get([trainer.fit.remote() for trainer in self.trainers])

    def trainer(self):
        return self.trainers[0]


data = ray.put([[1, 2], [3, 4], [5]])
supervisor1 = Supervisor.remote(1, data)
supervisor2 = Supervisor.remote(2, data)
assert ray.get([supervisor1.fit.remote(), supervisor2.fit.remote()]) == [[3, 7, 5], [6, 14, 10]]

trainer = ray.get(supervisor1.trainer.remote())
assert ray.get(trainer.fit.remote()) == 3
ray.kill(supervisor1)
try:
    ray.get(supervisor1.fit.remote())
except ray.exceptions.RayActorError as error:
    assert isinstance(error, ray.exceptions.ActorDiedError)
else:
    raise AssertionError("a killed actor answered")
print("tree of actors: done")
