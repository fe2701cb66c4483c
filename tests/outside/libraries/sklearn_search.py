"""scikit-learn's grid search, through joblib's backend for Ray."""

import joblib
import numpy as np
import ray
from ray.util.joblib import register_ray
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV

random = np.random.default_rng(0)
x = random.normal(size=(200, 4))
y = x @ np.arange(4) + random.normal(size=200) * 0.1
ray.init(num_cpus=2)
register_ray()
with joblib.parallel_backend("ray"):
    search = GridSearchCV(Ridge(), {"alpha": [0.01, 1.0, 1_000.0]}, cv=4).fit(x, y)
assert search.best_params_["alpha"] in (0.01, 1.0)
print("scikit-learn:", search.best_params_)
