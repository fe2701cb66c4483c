"""easy-ray-threads: a function over a list; what fails is told for each item."""

from easy_ray_threads import Processor


def invert(x):
    return 1 / x


results = Processor().process([1, 2, 0, 4], invert)
assert sorted(result for result in results if isinstance(result, float)) == [0.25, 0.5, 1.0]
(failed,) = [result for result in results if isinstance(result, dict)]
assert failed["item"] == 0 and "division by zero" in failed["error"], failed
print("easy-ray-threads:", failed["error"].splitlines()[-1])
