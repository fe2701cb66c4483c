"""Tasks that crash or raise, actors that die and are restarted, and what the caller sees of it."""

import os
import signal
import tempfile

import ray
from ray.exceptions import RayActorError, RayTaskError, TaskCancelledError, WorkerCrashedError

ray.init(num_cpus=2)
directory = tempfile.mkdtemp()


def times(name):
    """How often this was called, over all processes."""
    path = os.path.join(directory, name)
    with open(path, "a") as file:
        file.write("x")
    return os.path.getsize(path)


@ray.remote(max_retries=2)
def crash_once():
    if times("crash_once") == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return "survived"


@ray.remote(max_retries=0)
def crash():
    os._exit(1)


@ray.remote(max_retries=3, retry_exceptions=[ConnectionError])
def raise_twice():
    if times("raise_twice") < 3:
        raise ConnectionError("not yet")
    return "third time"


@ray.remote
def raise_value_error():
    raise ValueError("the user's mistake")


assert ray.get(crash_once.remote()) == "survived"
assert ray.get(raise_twice.remote()) == "third time"
try:
    ray.get(crash.remote())
except WorkerCrashedError:
    pass
else:
    raise AssertionError("a crash went unnoticed")

try:
    ray.get(raise_value_error.remote())
except ValueError as error:
    assert isinstance(error, RayTaskError) and isinstance(error.cause, ValueError)
    assert str(error).startswith("ray::raise_value_error() (pid="), str(error)
    assert "ip=" in str(error).splitlines()[0]


@ray.remote(max_restarts=1, max_task_retries=1)
class Actor:
    def __init__(self):
        self.counter = 0

    def increment_and_possibly_fail(self):
        if self.counter == 3 and times("actor") == 1:
            os._exit(0)
        self.counter += 1
        return self.counter

    def reconstructed(self):
        return ray.get_runtime_context().was_current_actor_reconstructed


actor = Actor.remote()
counts = [ray.get(actor.increment_and_possibly_fail.remote()) for _ in range(5)]
assert counts == [1, 2, 3, 1, 2], counts
assert ray.get(actor.reconstructed.remote()) is True
ray.kill(actor)
try:
    ray.get(actor.reconstructed.remote())
except RayActorError:
    pass
else:
    raise AssertionError("a killed actor answered")


@ray.remote
def forever():
    import time

    while True:
        time.sleep(0.01)


ref = forever.remote()
ready, _ = ray.wait([ref], timeout=0.2)
assert not ready
ray.cancel(ref)
try:
    ray.get(ref)
except TaskCancelledError:
    pass
else:
    raise AssertionError("a cancelled task has a result")
print("fault tolerance: done")
