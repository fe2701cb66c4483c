"""Resume: a search that may be killed at any time, and goes on where it was.

A grid of neural networks is trained on scikit-learn's handwritten digits, five folds each.  The run has a
name (`job=`), so what it has finished is kept.  Try:

    python 05_resume.py --die-after 20      # kills itself, as a machine that goes down would
    python 05_resume.py                     # trains the rest, and only that
    python 05_resume.py                     # trains nothing

Then change a line of `train`, or a number in the grid, and see what is run anew.
"""

import argparse
import itertools
import os
import signal
import warnings

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import StratifiedKFold
from sklearn.neural_network import MLPClassifier

import minray

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--storage", default=None, help="file that keeps the results; default: minray's own")
parser.add_argument("--die-after", type=int, default=0, metavar="N", help="kill -9 the driver after so many results")
parser.add_argument("--epochs", type=int, default=20)

GRID = {"hidden": (8, 16, 32), "rate": (0.003, 0.01)}


@minray.remote
def train(images, digits, fold, hidden, rate, epochs):
    """The accuracy on one fold of a network that was trained on the others."""
    folds = list(StratifiedKFold(5, shuffle=True, random_state=0).split(images, digits))
    training, testing = folds[fold]
    network = MLPClassifier((hidden,), learning_rate_init=rate, max_iter=epochs, random_state=fold)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # It says each time that it could train longer.
        network.fit(images[training], digits[training])
    return float(network.score(images[testing], digits[testing]))


@minray.remote
def mean(*scores):
    return float(np.mean(scores))


if __name__ == "__main__":
    options = parser.parse_args()
    minray.init(job="resume-example", storage=options.storage)
    images, digits = map(minray.put, load_digits(return_X_y=True))  # The same content is the same argument.
    means = {}
    for hidden, rate in itertools.product(*GRID.values()):
        scores = [train.remote(images, digits, fold, hidden, rate, options.epochs) for fold in range(5)]
        means[hidden, rate] = (scores, mean.remote(*scores))
    seen = 0
    for (hidden, rate), (scores, result) in means.items():
        for score in scores:
            minray.get(score)
            seen += 1
            if seen == options.die_after:
                print(f"killed after {seen} results", flush=True)
                os.kill(os.getpid(), signal.SIGKILL)
        print(f"hidden={hidden:2}  rate={rate:<5}  accuracy {minray.get(result):.3f}")
    best = max(means, key=lambda point: minray.get(means[point][1]))
    print(f"the best of {len(means)} is hidden={best[0]}, rate={best[1]}")
    minray.shutdown()
