"""EconML fits the folds of a double machine learning estimate as Ray tasks."""

import numpy as np
import ray
from econml.dml import LinearDML
from sklearn.linear_model import LassoCV

random = np.random.default_rng(0)
X, W = random.normal(size=(400, 2)), random.normal(size=(400, 3))
T = W[:, 0] + random.normal(size=400)
Y = (1 + X[:, 0]) * T + W[:, 0] + random.normal(size=400) * 0.1

ray.init(num_cpus=2)


def effects(**more):
    estimate = LinearDML(model_y=LassoCV(), model_t=LassoCV(), cv=3, random_state=1, **more)
    return estimate.fit(Y, T, X=X, W=W).effect(X[:5])


with_ray = effects(use_ray=True, ray_remote_func_options={"num_cpus": 1})
assert np.allclose(with_ray, effects()), with_ray
print("econml:", with_ray.round(3))
