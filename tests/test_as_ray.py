"""`import ray` is minray: in a script, in its workers, in the processes that it starts."""

import os
import subprocess
import sys

import pytest

from minray import as_ray


def python(*arguments, env=None, cwd=None, stdin=None):
    return subprocess.run(
        [sys.executable, *arguments], capture_output=True, text=True, timeout=100, cwd=cwd, input=stdin,
        env={**os.environ, **(env or {})},
    )  # fmt: skip


def run(*arguments, **more):
    """What a program prints that runs under as_ray and ends well."""
    done = python("-m", "minray.as_ray", *arguments, **more)
    assert done.returncode == 0, done.stderr
    return done.stdout


def fails(*arguments, **more):
    done = python("-m", "minray.as_ray", *arguments, **more)
    assert done.returncode != 0, done.stdout
    return done.stderr


@pytest.fixture
def script(tmp_path):
    def write(text, name="script.py"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return str(path)

    return write


# ---------------------------------------------------------------- the command


def test_a_script_is_run_as_python_runs_it(script, tmp_path):
    path = script("""
import os, sys
import helper
import ray
print(__name__, sys.argv[1:], sys.path[0] == os.path.dirname(os.path.abspath(__file__)), helper.word)
assert ray.get(ray.put(3)) == 3
""")
    script("word = 'found'", "helper.py")
    assert run(path, "one", "--two=2") == "__main__ ['one', '--two=2'] True found\n"
    assert run("-c", "import sys, ray; print(ray.__name__, sys.argv)", "x") == "ray ['-c', 'x']\n"
    assert run("-", stdin="import ray; print(ray.get(ray.put('stdin')))") == "stdin\n"
    script("import ray; print(__name__, ray.__name__)", "module_to_run.py")
    assert run("-m", "module_to_run", cwd=tmp_path) == "__main__ ray\n"
    assert run("-W", "error", "-c", "import sys, ray; print(sys.warnoptions)") == "['error']\n"


def test_an_uncaught_error_looks_as_without_as_ray_and_so_does_a_status(script):
    path = script("import ray\ndef f():\n    raise ValueError('mine')\nf()\n")
    told = fails(path)
    assert told.startswith("Traceback") and told.endswith("ValueError: mine\n") and "minray" not in told
    assert python("-m", "minray.as_ray", "-c", "import sys, ray; sys.exit(7)").returncode == 7


def test_the_command_says_how_it_is_used():
    assert "python -m minray.as_ray [options of Python] script.py" in run("--help")
    assert "usage:" in python("-m", "minray.as_ray").stdout
    assert "-I and -E make Python ignore PYTHONPATH" in fails("-I", "-c", "pass")


def test_pytest_runs_tests_that_import_ray(script, tmp_path):
    script("""
import ray
@ray.remote
def double(x):
    return 2 * x
def test_double():
    ray.init(num_cpus=1)
    try:
        assert ray.get([double.remote(i) for i in range(3)]) == [0, 2, 4]
    finally:
        ray.shutdown()
""", "test_double.py")
    assert "1 passed" in run("-m", "pytest", "-q", "-p", "no:cacheprovider", str(tmp_path), cwd=tmp_path)


# ---------------------------------------------------------------- install()


def test_install_in_the_program_itself_does_the_same_and_does_it_once():
    program = """
import sys
import minray, minray.as_ray
minray.as_ray.install()
minray.as_ray.install()
import ray
from ray.util import ActorPool
assert sum(isinstance(finder, minray.as_ray.Finder) for finder in sys.meta_path) == 1
assert ray.get is minray.get and ray.exceptions.RayTaskError is minray.exceptions.RayTaskError
assert ActorPool is minray.util.ActorPool and ray is sys.modules["ray"] and ray is not minray
"""
    assert python("-c", program).returncode == 0


def test_uninstall_takes_everything_back():
    program = """
import os, sys
import minray, minray.as_ray
before = list(sys.meta_path), list(sys.path), os.environ.get("PYTHONPATH"), minray.exceptions.name_prefix
for _ in range(2):
    minray.as_ray.install()
    import ray, ray.util.queue
    assert ray.get is minray.get and minray.exceptions.name_prefix == "ray"
    minray.as_ray.uninstall()
    assert before == (list(sys.meta_path), list(sys.path), os.environ.get("PYTHONPATH"), minray.exceptions.name_prefix)
    assert not [name for name in sys.modules if name.partition(".")[0] == "ray"]
    assert ray.util.queue.Queue is minray.util.queue.Queue
try:
    import ray
except ModuleNotFoundError as error:
    print(error)
"""
    for path in ("", os.pathsep.join(["/one", "/two"])):
        done = python("-c", program, env={"PYTHONPATH": path} if path else {})
        assert done.stdout == "No module named 'ray'\n", done.stderr


def test_with_the_real_ray_imported_install_refuses_and_changes_nothing(tmp_path):
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "__init__.py").write_text("__version__ = '2.9.0'\n")
    program = """
import os, sys
import ray
import minray.as_ray
before = list(sys.meta_path), list(sys.path), dict(os.environ)
try:
    minray.as_ray.install()
except RuntimeError as error:
    print(error)
assert (list(sys.meta_path), list(sys.path), dict(os.environ)) == before
"""
    done = python("-c", program, cwd=tmp_path)
    assert "has imported the real Ray (2.9.0) already" in done.stdout and done.returncode == 0, done.stderr


def test_an_installed_ray_is_not_found_before_minray(tmp_path):
    (tmp_path / "site" / "ray").mkdir(parents=True)
    (tmp_path / "site" / "ray" / "__init__.py").write_text("raise AssertionError('the real Ray was imported')\n")
    program = "import ray, importlib.metadata as m; print(ray.__commit__.split()[0], m.version('ray'))"
    path = str(tmp_path / "site")
    assert run("-c", program, env={"PYTHONPATH": path}) == f"minray {as_ray.VERSION}\n"


# ---------------------------------------------------------------- what ray is


def test_the_module_is_named_ray_and_has_a_version():
    program = """
import importlib.metadata, importlib.util
import ray, ray.util.queue
print(ray.__name__, ray.__version__ == importlib.metadata.version("ray"), ray.util.queue.__name__)
assert ray.__version__.split(".")[0] == "2" and ray.__spec__.name == "ray" and ray.__file__.endswith("__init__.py")
assert importlib.util.find_spec("ray") is not None and importlib.util.find_spec("ray.util.queue") is not None
assert "init" in dir(ray) and "ActorPool" in dir(ray.util)
from ray.util import *
assert ActorPool is ray.util.ActorPool
import ray.cloudpickle as pickle
assert pickle.loads(pickle.dumps(lambda x: x + 1))(1) == 2 and issubclass(pickle.CloudPickler, object)
from ray._raylet import ObjectRef
assert isinstance(ray.put(1), ObjectRef) and ObjectRef is ray.ObjectRef is ray.types.ObjectRef
"""
    assert run("-c", program) == "ray True ray.util.queue\n"


def test_a_name_that_is_not_there_is_an_attribute_error_that_says_ray():
    told = fails("-c", "import ray; ray.no_such_name")
    assert "module 'ray' has no attribute 'no_such_name'" in told and told.count("Traceback") == 1


def test_what_a_test_replaces_in_ray_can_be_put_back():
    run("-c", """
from unittest import mock
import pytest
import ray
get = ray.get
with mock.patch("ray.get", return_value="replaced"):
    assert ray.get(1) == "replaced"
assert ray.get is get
with pytest.MonkeyPatch.context() as patch:
    patch.setattr(ray, "get", lambda ref: "replaced")
    patch.setattr("ray.util.state.list_tasks", lambda: ["replaced"])
    assert ray.get(1) == "replaced" and ray.util.state.list_tasks() == ["replaced"]
import minray
assert ray.get is get is minray.get and ray.util.state.list_tasks is minray.state.list_tasks
""")


def test_a_placeholder_can_be_imported_and_not_be_used():
    program = """
from ray.data import Dataset, from_pandas_refs
import ray.data.dataset
assert not isinstance(3, Dataset)
try:
    from_pandas_refs([])
except NotImplementedError as error:
    print(error)
import importlib.util
assert importlib.util.find_spec("ray.tune") is None
"""
    said = run("-c", program, env={"MINRAY_PLACEHOLDERS": "ray.data, ray.air"})
    assert said.startswith("ray.data.from_pandas_refs was called, and minray does not have ray.data")
    assert "MINRAY_PLACEHOLDERS=ray.data" in fails("-c", program)


# ---------------------------------------------------------------- workers and other processes


def test_workers_and_processes_of_theirs_have_the_same_ray():
    print(run("-c", """
import subprocess, sys
import ray
ray.init(num_cpus=1)
LOOK = "import ray; print(ray.__name__, ray.__commit__, ray.get(ray.put(5)))"

@ray.remote
def look():
    import ray.util.queue  # By name, in the worker.
    from ray.exceptions import RayTaskError
    nested = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
    assert nested.returncode == 0, nested.stderr
    return ray, ray.util.queue.Queue, RayTaskError, nested.stdout

there, queue, error, nested = ray.get(look.remote())
assert there is ray and queue is ray.util.queue.Queue and error is ray.exceptions.RayTaskError
mine = subprocess.run([sys.executable, "-c", LOOK], capture_output=True, text=True)
assert nested == mine.stdout == f"ray {ray.__commit__} 5\\n", (nested, mine)
"""))


def test_spawned_processes_have_the_same_ray(script):
    run(script("""
import multiprocessing
import ray

def child(queue):
    import ray
    queue.put((ray.__name__, ray.get(ray.put(1))))

if __name__ == "__main__":
    context = multiprocessing.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=child, args=(queue,))
    process.start()
    assert queue.get(timeout=60) == ("ray", 1)
    process.join()
"""))


def test_the_header_of_a_remote_traceback_is_rays():
    run("-c", """
import os, re
import ray
ray.init(num_cpus=1)

@ray.remote
def f():
    raise ValueError("no")

@ray.remote
def g(x):
    return x

@ray.remote
class A:
    def m(self):
        raise KeyError("k")

@ray.remote
class B:
    def __init__(self):
        raise RuntimeError("constructor")
    def __repr__(self):
        return "the B"
    def m(self):
        pass

def told(ref):
    try:
        ray.get(ref)
    except ray.exceptions.RayError as error:
        return str(error)

a = A.remote()
assert re.match(r"ray::f\\(\\) \\(pid=\\d+, ip=127.0.0.1\\)\\n", told(f.remote())), told(f.remote())
argument = told(g.remote(f.remote()))
assert argument.startswith("ray::g() did not run") and "\\nray::f() (pid=" in argument, argument
actor_id = a._actor_id.hex()
header = rf"ray::A\\.m\\(\\) \\(pid=\\d+, ip=127.0.0.1, actor_id={actor_id}, repr=<__main__\\.A object at 0x[0-9a-f]+>\\)\\n"
assert re.match(header, told(a.m.remote())), told(a.m.remote())
assert "ray::B.__init__() (pid=" in told(B.remote().m.remote()), told(B.remote().m.remote())
""")


# ---------------------------------------------------------------- addresses


def test_addresses_that_mean_a_cluster_are_refused_with_a_sentence():
    program = """
import os
import ray
for address in ("auto", "10.0.0.1:6379", "ray://head:10001"):
    try:
        ray.init(address=address)
    except ConnectionError as error:
        assert repr(address) in str(error), error
    else:
        raise AssertionError(address)
os.environ["RAY_ADDRESS"] = "10.0.0.1:6379"
try:
    ray.init()
except ConnectionError as error:
    assert "RAY_ADDRESS=10.0.0.1:6379 asks for a cluster" in str(error)
try:
    ray.put(1)
except ConnectionError:
    assert not ray.is_initialized()
ray.init("local", num_cpus=1)

@ray.remote
def again():
    return ray.init(address="auto", ignore_reinit_error=True)["node_id"]

node_id = ray.nodes()[0]["NodeID"]
assert ray.get(again.remote()) == ray.init(address="auto", ignore_reinit_error=True)["node_id"] == node_id
try:
    ray.init(address="auto")
except RuntimeError as error:
    assert "ignore_reinit_error" in str(error)
ray.shutdown()
os.environ["RAY_ADDRESS"] = "local"
ray.init(num_cpus=1)
"""
    run("-c", program)
    # It is Ray's variable, and means nothing to a program of minray's own.
    own = python("-c", "import minray; minray.init(num_cpus=1)", env={"RAY_ADDRESS": "10.0.0.1:6379"})
    assert own.returncode == 0, own.stderr
