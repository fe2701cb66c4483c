"""Modin: pandas' interface over partitions that are Ray objects."""

import os

os.environ["MODIN_ENGINE"] = "ray"
os.environ["MODIN_CPUS"] = "2"

import modin.config
import modin.pandas as pd
import numpy as np
import pandas

random = np.random.default_rng(0)
columns = {"a": np.arange(20_000), "b": np.arange(20_000) % 7, "c": random.random(20_000)}
ours, theirs = pd.DataFrame(columns), pandas.DataFrame(columns)
assert modin.config.Engine.get() == "Ray"


def same(mine, expected):
    pandas.testing.assert_frame_equal(mine._to_pandas(), expected)


same(ours.groupby("b").sum(), theirs.groupby("b").sum())
same(ours.describe(), theirs.describe())
same(ours.sort_values("c").head(50), theirs.sort_values("c").head(50))
same(ours.merge(ours.head(100), on="b"), theirs.merge(theirs.head(100), on="b"))
same(ours.assign(d=ours["a"] * 2)[["d"]], theirs.assign(d=theirs["a"] * 2)[["d"]])
assert ours.apply(lambda row: row["a"] + row["b"], axis=1).sum() == (theirs["a"] + theirs["b"]).sum()
print("modin:", ours.shape)
