"""An actor whose constructor raises: the actor never lives.

Look at: creating it does not fail, since `.remote()` returns before the constructor runs.
The first call's result brings the error: the actor is dead, and the reason is the
constructor's own exception with its traceback.
"""

import minray


@minray.remote
class Thermometer:
    def __init__(self, path):
        self.file = open(path)

    def read(self):
        return float(self.file.read())


thermometer = Thermometer.remote("/sys/no/such/sensor")
print("the constructor has been sent off; this line is still reached")
print(minray.get(thermometer.read.remote()))
