"""A parameter server, synchronous and asynchronous: workers compute gradients, an actor applies them."""

import numpy as np
import ray

ray.init(num_cpus=4)
rng = np.random.default_rng(0)
X = rng.normal(size=(600, 4))
TRUE = np.array([1.0, -2.0, 3.0, 0.5])
Y = X @ TRUE


@ray.remote
class ParameterServer:
    def __init__(self, lr):
        self.weights = np.zeros(4)
        self.lr = lr

    def apply_gradients(self, *gradients):
        self.weights = self.weights - self.lr * np.mean(gradients, axis=0)
        return self.weights

    def get_weights(self):
        return self.weights


@ray.remote
class DataWorker:
    def __init__(self, x, y):
        self.x, self.y = x, y

    def compute_gradients(self, weights):
        assert not weights.flags.writeable or weights.size == 4
        return 2 * self.x.T @ (self.x @ weights - self.y) / len(self.y)


num_workers = 3
workers = [DataWorker.remote(X[i::num_workers], Y[i::num_workers]) for i in range(num_workers)]

# Synchronous: each step waits for all gradients.
ps = ParameterServer.remote(0.1)
current_weights = ps.get_weights.remote()
for _ in range(60):
    gradients = [worker.compute_gradients.remote(current_weights) for worker in workers]
    current_weights = ps.apply_gradients.remote(*gradients)
assert np.allclose(ray.get(current_weights), TRUE, atol=1e-2)

# Asynchronous: whoever is ready gets the weights as they are now.
ps = ParameterServer.remote(0.05)
current_weights = ps.get_weights.remote()
gradients = {worker.compute_gradients.remote(current_weights): worker for worker in workers}
for _ in range(200):
    ready_gradient_list, _ = ray.wait(list(gradients))
    ready_gradient_id = ready_gradient_list[0]
    worker = gradients.pop(ready_gradient_id)
    current_weights = ps.apply_gradients.remote(*[ready_gradient_id])
    gradients[worker.compute_gradients.remote(current_weights)] = worker
assert np.allclose(ray.get(current_weights), TRUE, atol=5e-2)
print("weights:", ray.get(ps.get_weights.remote()).round(2))
