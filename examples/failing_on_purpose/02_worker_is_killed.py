"""A worker is killed while it runs a task, as the kernel does when memory runs out.

Look at: minray runs the task again, in another worker, because it may be lucky the next
time; `max_retries=1` allows that once.  Then the driver gets an error that names the
task, the signal, the number of attempts, and where the worker's output is.
"""

import os
import signal

import minray


@minray.remote(max_retries=1)
def die(name):
    print(f"{name}: running in pid {os.getpid()}, and about to be killed")
    os.kill(os.getpid(), signal.SIGKILL)


minray.get(die.remote("unlucky"))
