"""runtime_env: variables for a job, a task and an actor, and modules that travel."""

import os
import tempfile

import ray

directory = tempfile.mkdtemp()
with open(os.path.join(directory, "travelling_module.py"), "w") as file:
    file.write("answer = 42\n")

ray.init(num_cpus=2, runtime_env={"env_vars": {"LEVEL": "job"}})


@ray.remote
def level():
    return os.environ["LEVEL"]


@ray.remote(runtime_env={"env_vars": {"LEVEL": "actor"}})
class Actor:
    def level(self):
        return os.environ["LEVEL"]


@ray.remote(runtime_env={"py_modules": [os.path.join(directory, "travelling_module.py")]})
def answer():
    import travelling_module

    return travelling_module.answer


assert ray.get(level.remote()) == "job"
assert ray.get(level.options(runtime_env={"env_vars": {"LEVEL": "task"}}).remote()) == "task"
assert ray.get(Actor.remote().level.remote()) == "actor"
print("environments: done")
