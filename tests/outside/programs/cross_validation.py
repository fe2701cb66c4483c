"""Cross-validation with actors: each keeps its data and is asked again and again."""

import numpy as np
import ray

rng = np.random.default_rng(1)
x = rng.normal(size=(300, 5))
y = x @ np.arange(5) + rng.normal(size=300) * 0.1


@ray.remote
class Fold:
    def __init__(self, x, y, fold, folds):
        test = np.arange(len(y)) % folds == fold
        self.train, self.test = (x[~test], y[~test]), (x[test], y[test])

    def score(self, alpha):
        x, y = self.train
        weights = np.linalg.solve(x.T @ x + alpha * np.eye(x.shape[1]), x.T @ y)
        return float(np.mean((self.test[0] @ weights - self.test[1]) ** 2))


x_ref, y_ref = ray.put(x), ray.put(y)
folds = [Fold.remote(x_ref, y_ref, k, 4) for k in range(4)]
alphas = [0.01, 1.0, 1_000.0]
scores = {alpha: [fold.score.remote(alpha) for fold in folds] for alpha in alphas}
means = {alpha: np.mean(ray.get(refs)) for alpha, refs in scores.items()}
assert min(means, key=means.get) == 0.01 and max(means, key=means.get) == 1_000.0, means
print("cross-validation:", {alpha: round(mean, 3) for alpha, mean in means.items()})
