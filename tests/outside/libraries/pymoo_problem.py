"""pymoo evaluates a generation of an optimisation in parallel, through Ray."""

import numpy as np
from pymoo.algorithms.soo.nonconvex.ga import GA
from pymoo.core.problem import ElementwiseProblem
from pymoo.optimize import minimize
from pymoo.parallelization.ray import RayParallelization


class Sphere(ElementwiseProblem):
    def __init__(self, **more):
        super().__init__(n_var=5, n_obj=1, n_ieq_constr=0, xl=-5, xu=5, **more)

    def _evaluate(self, x, out, *args, **kwargs):
        out["F"] = (x**2).sum()


runner = RayParallelization(job_resources={"num_cpus": 1})
found = minimize(Sphere(elementwise_runner=runner), GA(pop_size=20), termination=("n_gen", 15), seed=1)
alone = minimize(Sphere(), GA(pop_size=20), termination=("n_gen", 15), seed=1)
assert np.array_equal(found.F, alone.F), (found.F, alone.F)
print("pymoo:", found.F)
