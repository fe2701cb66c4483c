"""vectorbt computes an indicator for many parameters, one Ray task each."""

import numpy as np
import pandas as pd
import ray
import vectorbt

ray.init(num_cpus=2)
price = pd.Series(np.random.default_rng(0).normal(size=300).cumsum() + 100)
factory = vectorbt.IndicatorFactory(class_name="Scaled", input_names=["price"], param_names=["by"], output_names=["out"])
indicator = factory.from_apply_func(lambda price, by: price * by)
with_ray = indicator.run(price, [1, 2, 3], use_ray=True).out
pd.testing.assert_frame_equal(with_ray, indicator.run(price, [1, 2, 3]).out)
print("vectorbt:", with_ray.shape)
