"""Found in PYTHONPATH by a process that was started under minray.as_ray: puts minray in its own place."""

import sys
from os.path import dirname

__minray_stub__ = True

try:
    import minray.as_ray
except ModuleNotFoundError:  # minray is not installed; it was run out of its directory, which is this one's.
    sys.path.append(dirname(dirname(dirname(dirname(dirname(__file__))))))
    import minray.as_ray

minray.as_ray.module("ray")
