"""XGBoost-Ray trains on actors that hold a shard of the data each."""

import numpy as np
import ray
import xgboost
from xgboost_ray import RayDMatrix, RayParams, predict, train

assert xgboost.__version__.startswith("1."), "XGBoost-Ray does not work with later versions"
ray.init(num_cpus=4)
random = np.random.default_rng(0)
x = random.normal(size=(400, 4)).astype(np.float32)
y = (x[:, 0] + x[:, 1] > 0).astype(np.float32)
result = {}
booster = train(
    {"objective": "binary:logistic", "eval_metric": ["logloss", "error"]},
    RayDMatrix(x, y),
    evals=[(RayDMatrix(x, y), "train")],
    evals_result=result,
    num_boost_round=10,
    ray_params=RayParams(num_actors=2, cpus_per_actor=1),
)
assert result["train"]["error"][-1] < 0.02, result
predicted = predict(booster, RayDMatrix(x), ray_params=RayParams(num_actors=2))
assert ((predicted > 0.5) == y).mean() > 0.95
print("xgboost-ray:", result["train"]["error"][-1])
