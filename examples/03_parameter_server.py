"""Parameter server: actors that train one neural network together, without waiting for each other.

The server is an actor that owns the weights.  Every worker is an actor that owns a share of
the data (scikit-learn's 1,797 handwritten digits) and computes gradients.  The driver only
passes refs along: a gradient goes from a worker to the server and new weights go back, and
neither stops here.  As in the first parameter servers nobody waits for the slowest, so a
gradient may be a few steps old when it is applied; the network learns all the same.
"""

import argparse
import time

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split

import minray

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--workers", type=int, default=2)
parser.add_argument("--steps", type=int, default=1500, help="gradients to apply")
parser.add_argument("--batch", type=int, default=64, help="digits a gradient is computed from")


def initial_weights(hidden=64, seed=7):
    random = np.random.default_rng(seed)
    w1 = random.normal(0, np.sqrt(2 / 64), (64, hidden))
    w2 = random.normal(0, np.sqrt(2 / hidden), (hidden, 10))
    return [w1, np.zeros(hidden), w2, np.zeros(10)]


def forward(weights, images):
    """Two layers: the hidden activations, and the probability of each digit."""
    w1, b1, w2, b2 = weights
    hidden = np.maximum(images @ w1 + b1, 0)
    scores = np.exp(hidden @ w2 + b2 - np.max(hidden @ w2 + b2, axis=1, keepdims=True))
    return hidden, scores / scores.sum(axis=1, keepdims=True)


def gradient(weights, images, digits):
    """Of the mean cross-entropy, by hand."""
    hidden, error = forward(weights, images)
    error[np.arange(len(digits)), digits] -= 1
    error /= len(digits)
    back = (error @ weights[2].T) * (hidden > 0)
    return [images.T @ back, back.sum(axis=0), hidden.T @ error, error.sum(axis=0)]


def accuracy(weights, images, digits):
    return np.mean(forward(weights, images)[1].argmax(axis=1) == digits)


@minray.remote
class ParameterServer:
    def __init__(self, rate=0.1, momentum=0.9):
        self.rate, self.momentum = rate, momentum
        self.weights = initial_weights()
        self.velocity = [np.zeros_like(array) for array in self.weights]

    def apply(self, gradients):
        """One step along the gradients; returns the new weights."""
        for weight, velocity, slope in zip(self.weights, self.velocity, gradients):
            velocity *= self.momentum
            velocity -= self.rate * slope
            weight += velocity
        return self.weights

    def current(self):
        return self.weights


@minray.remote
class Worker:
    def __init__(self, images, digits, batch, seed):
        self.images, self.digits, self.batch = images, digits, batch
        self.random = np.random.default_rng(seed)

    def compute(self, weights):
        chosen = self.random.integers(len(self.digits), size=self.batch)
        return gradient(weights, self.images[chosen], self.digits[chosen])


def main(options):
    images, digits = load_digits(return_X_y=True)
    images, test_images, digits, test_digits = train_test_split(images / 16, digits, random_state=0)

    server = ParameterServer.remote()
    workers = [
        Worker.remote(images[i :: options.workers], digits[i :: options.workers], options.batch, seed=i)
        for i in range(options.workers)
    ]
    started = time.perf_counter()
    computing = {worker.compute.remote(server.current.remote()): worker for worker in workers}
    for step in range(1, options.steps + 1):
        [finished], _ = minray.wait(list(computing))
        worker = computing.pop(finished)
        weights = server.apply.remote(finished)
        computing[worker.compute.remote(weights)] = worker
        if step % max(1, options.steps // 5) == 0:
            correct = accuracy(minray.get(weights), test_images, test_digits)
            print(f"  after {step:5,} gradients: accuracy {correct:.1%}")
    elapsed = time.perf_counter() - started

    final = accuracy(minray.get(server.current.remote()), test_images, test_digits)
    print(f"{options.steps:,} gradients from {options.workers} workers in {elapsed:.1f} s")
    print(f"accuracy {final:.1%} on {len(test_digits)} digits that were not trained on")


if __name__ == "__main__":
    options = parser.parse_args()
    with minray.init():
        main(options)
