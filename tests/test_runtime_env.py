"""Runtime environments: what a program may say, what tasks find, and who shares a process with whom.

No test here needs a network: what pip installs are wheels that the tests write themselves.
"""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
import zipfile
from pathlib import Path

import pytest
from conftest import within

import minray
from minray import api, snapshots
from minray.exceptions import RuntimeEnvSetupError
from minray.job_config import JobConfig
from minray.runtime_env import RuntimeEnv, RuntimeEnvConfig, checked
from minray.session import identify, is_alive


@minray.remote
def variable(name):
    return os.environ.get(name)


@minray.remote
def pid():
    return os.getpid()


@minray.remote
def environment():
    return minray.get_runtime_context().runtime_env


@minray.remote
def imported(module, name):
    import importlib

    return getattr(importlib.import_module(module), name)


@minray.remote
class Host:
    def variable(self, name):
        return os.environ.get(name)

    def child(self, name):
        return minray.get(variable.remote(name))

    def pid(self):
        return os.getpid()


def variables(**env_vars):
    return {"env_vars": env_vars}


def write(path: Path, text: str = "") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


# ---------------------------------------------------------------- what a program may say


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ("env", TypeError, r"must be a dict or a minray.runtime_env.RuntimeEnv, got 'env'"),
        ({"env_var": {}}, TypeError, r"no key 'env_var'. Did you mean env_vars\?"),
        ({"env_vars": ["A=b"]}, TypeError, r"env_vars.*must be a dict of strings, got \['A=b'\]"),
        ({"env_vars": {"A": 1}}, TypeError, r"env_vars.*'A'\] must be a string, got 1; you may mean '1'"),
        ({"env_vars": {"A=": "1"}}, TypeError, r"'A=' cannot be the name of an environment variable"),
        ({"working_dir": "/no/such"}, ValueError, r"working_dir.*there is no /no/such.*now /"),
        ({"working_dir": __file__}, ValueError, r"must be a directory or a .zip file, and /.*test_runtime_env.py is"),
        ({"working_dir": 7}, TypeError, r"working_dir.*must be the path of a local directory or .zip file, got 7"),
        ({"working_dir": "s3://bucket/a.zip"}, NotImplementedError, r"'s3://bucket/a.zip' is a URI.*local directory"),
        ({"py_modules": "module"}, TypeError, r"py_modules.*must be a list of modules or paths, got 'module'"),
        ({"py_modules": ["https://h/a.zip"]}, NotImplementedError, r"py_modules.*is a URI"),
        ({"py_modules": ["/etc/passwd"]}, ValueError, r"neither a package \(a directory\) nor a .py, .zip or .whl"),
        ({"py_modules": [sys]}, ValueError, r"sys lies in no single file or directory"),
        ({"excludes": ["*.csv"]}, ValueError, r"excludes.*working_dir or py_modules, and neither is given"),
        ({"excludes": "*.csv", "working_dir": "/"}, TypeError, r"excludes.*must be a list of patterns"),
        ({"pip": 1}, TypeError, r"pip.*must be a list of requirements or the path of a requirements file, got 1"),
        ({"pip": "/no/requirements.txt"}, ValueError, r"pip.*there is no /no/requirements.txt"),
        ({"pip": ["./no_such"]}, ValueError, r"'./no_such' is a path, and there is no /.*/no_such"),
        ({"pip": {"package": []}}, TypeError, r"pip.*no key 'package'"),
        ({"pip": {"pip_check": True}}, ValueError, r'pip.*a dict without "packages"'),
        ({"pip": {"packages": [], "pip_check": 1}}, TypeError, r"pip_check.*must be True or False, got 1"),
        ({"pip": {"packages": [], "pip_version": "24"}}, ValueError, r'pip_version.*must be like "==24.0", got \'24\''),
        ({"pip": {"packages": [], "pip_install_options": "-v"}}, TypeError, r"pip_install_options.*list of strings"),
        ({"conda": "base"}, NotImplementedError, r"conda.*minray makes no conda environments"),
        ({"container": {}}, NotImplementedError, r"container.*forked on this machine"),
        ({"image_uri": "a"}, NotImplementedError, r"image_uri.*forked on this machine"),
        ({"uv": ["a"]}, NotImplementedError, r"uv.*installed with pip"),
        ({"nsight": "default"}, NotImplementedError, r"nsight.*profiler"),
        ({"py_executable": "python3"}, NotImplementedError, r"py_executable.*the driver's Python"),
        ({"worker_process_setup_hook": "hook"}, TypeError, r'a function without arguments, or "module.name"'),
        ({"config": 1}, TypeError, r"config.*must be a dict or a RuntimeEnvConfig, got 1"),
        ({"config": {"setup_timeout": 1}}, TypeError, r"no key 'setup_timeout'. Did you mean setup_timeout_seconds\?"),
        ({"config": {"setup_timeout_seconds": 0}}, ValueError, r"more than 0, or -1 for no limit, got 0"),
        ({"config": {"eager_install": 1}}, ValueError, r"eager_install.*True or False, got 1"),
        ({"config": {"log_files": ["a"]}}, NotImplementedError, r"log_files.*no dashboard"),
    ],
)
def test_what_cannot_be_meant_is_refused_where_it_is_said_with_the_mistake_and_the_fix(given, error, message):
    with pytest.raises(error, match=message):
        variable.options(runtime_env=given)
    with pytest.raises(error, match=message):
        minray.init(runtime_env=given)
    assert not minray.is_initialized()
    if isinstance(given, dict):
        with pytest.raises(error, match=message):
            RuntimeEnv(**given)


def test_a_runtime_env_is_a_dict_of_what_was_given(tmp_path):
    env = RuntimeEnv(env_vars={"A": "a"}, working_dir=str(tmp_path), pip=None)
    assert env == {"env_vars": {"A": "a"}, "working_dir": str(tmp_path)} and env.to_dict() == dict(env)
    assert RuntimeEnvConfig() == {"setup_timeout_seconds": 600, "eager_install": True}
    assert {"pip", "conda"} <= RuntimeEnv.known_fields


def test_requirements_files_are_read_and_paths_in_them_start_where_they_lie(tmp_path, monkeypatch):
    write(tmp_path / "project" / "setup.py")
    write(tmp_path / "requirements.txt", "# ours\n\nrequests>=2  # comment\n./project\n-e ./project\n")
    monkeypatch.chdir("/")
    lines = ["requests>=2", f"{tmp_path}/project", f"-e {tmp_path}/project"]
    assert checked({"pip": str(tmp_path / "requirements.txt")}, "f")["pip"] == {"packages": lines, "pip_check": False}
    assert checked({"pip": ["a/b @ git+x", "six"]}, "f")["pip"]["packages"] == ["a/b @ git+x", "six"]


# ---------------------------------------------------------------- snapshots


@pytest.mark.parametrize(
    ("patterns", "left"),
    [
        (["*.csv"], ["a.py", "data/b.bin", "data/deep/a.py", "logs/l.txt"]),
        (["/a.py"], ["data/b.bin", "data/deep/a.py", "data/x.csv", "logs/l.txt", "x.csv"]),
        (["a.py"], ["data/b.bin", "data/x.csv", "logs/l.txt", "x.csv"]),
        (["data/"], ["a.py", "logs/l.txt", "x.csv"]),
        (["data"], ["a.py", "logs/l.txt", "x.csv"]),
        (["data/*.csv"], ["a.py", "data/b.bin", "data/deep/a.py", "logs/l.txt", "x.csv"]),
        (["**/deep"], ["a.py", "data/b.bin", "data/x.csv", "logs/l.txt", "x.csv"]),
        (["data/**"], ["a.py", "logs/l.txt", "x.csv"]),
        (["*.csv", "!/x.csv"], ["a.py", "data/b.bin", "data/deep/a.py", "logs/l.txt", "x.csv"]),
        (["[lx]*", "?.py"], ["data/b.bin"]),
        (["# a comment", "", "./logs/"], ["a.py", "data/b.bin", "data/deep/a.py", "data/x.csv", "x.csv"]),
    ],
)
def test_excludes_are_patterns_as_in_a_gitignore_file(tmp_path, patterns, left):
    source = tmp_path / "source"
    for name in ("a.py", "x.csv", "data/b.bin", "data/x.csv", "data/deep/a.py", "logs/l.txt", ".git/config"):
        write(source / name, name)
    assert contents(snapshots.of_directory(str(source), str(tmp_path / "store"), patterns)) == left


def contents(directory: str) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in Path(directory).rglob("*") if path.is_file())


def test_ignore_files_hold_for_the_directory_they_lie_in_unless_the_user_says_otherwise(tmp_path, monkeypatch):
    source = tmp_path / "source"
    write(source / ".gitignore", "*.log\n")
    write(source / "sub" / ".rayignore", "/secret\n")
    for name in ("a.log", "secret", "sub/secret", "sub/b.log", "sub/c"):
        write(source / name, name)
    store = str(tmp_path / "store")
    kept = [".gitignore", "secret", "sub/.rayignore", "sub/c"]
    assert contents(snapshots.of_directory(str(source), store, [])) == kept
    monkeypatch.setenv(snapshots.IGNORE_SWITCH, "1")
    assert contents(snapshots.of_directory(str(source), store, [])) == sorted([*kept, "a.log", "sub/b.log"])


def test_a_snapshot_is_named_after_what_it_contains_and_taken_once(tmp_path):
    source, store = tmp_path / "source", str(tmp_path / "store")
    write(source / "a", "1")
    first = snapshots.of_directory(str(source), store, [])
    assert snapshots.of_directory(str(source), store, []) == first
    assert snapshots.of_directory(first, store, []) == first, "it is one already"
    write(source / "a", "2")
    second = snapshots.of_directory(str(source), store, [])
    assert second != first and Path(first, "a").read_text() == "1" and Path(second, "a").read_text() == "2"
    assert sorted(os.listdir(store)) == sorted(map(os.path.basename, (first, second)))


def test_links_are_followed_and_one_into_itself_ends(tmp_path):
    source = tmp_path / "source"
    write(tmp_path / "elsewhere" / "b", "b")
    write(source / "a", "a")
    (source / "loop").symlink_to(source)
    (source / "linked").symlink_to(tmp_path / "elsewhere")
    (source / "gone").symlink_to(tmp_path / "nothing")
    assert contents(snapshots.of_directory(str(source), str(tmp_path / "store"), [])) == ["a", "linked/b"]


def test_a_directory_that_is_too_large_is_refused_with_what_makes_it_so(tmp_path, monkeypatch):
    monkeypatch.setattr(snapshots, "MAX_BYTES", 1 << 20)
    write(tmp_path / "source" / "data" / "a", "x" * (2 << 20))
    with pytest.raises(ValueError, match=r"source holds 2 MiB or more \(data 2 MiB\), and at most 1 .*\"excludes\": \[\"data\""):
        snapshots.of_directory(str(tmp_path / "source"), str(tmp_path / "store"), [])


def test_an_archive_that_is_none_is_refused(tmp_path):
    write(tmp_path / "a.zip", "no zip")
    with pytest.raises(ValueError, match=r"a.zip cannot be unpacked: File is not a zip file"):
        snapshots.of_directory(str(tmp_path / "a.zip"), str(tmp_path / "store"), [])
    assert os.listdir(tmp_path / "store") == []


# ---------------------------------------------------------------- variables, and who inherits them


def test_variables_are_there_in_tasks_in_actors_and_in_their_children_and_nowhere_else(session):
    env = variables(GREETING="hello")
    assert minray.get(variable.options(runtime_env=env).remote("GREETING")) == "hello"
    host = Host.options(runtime_env=env).remote()
    assert minray.get([host.variable.remote("GREETING"), host.child.remote("GREETING")]) == ["hello", "hello"]
    assert minray.get(variable.remote("GREETING")) is None and "GREETING" not in os.environ


def test_a_value_may_refer_to_what_was_there_before(session, monkeypatch):
    env = variables(PATH="/first:${PATH}", NO_SUCH_VARIABLE="${NO_SUCH_VARIABLE}:/last")
    path, other = minray.get([variable.options(runtime_env=env).remote(name) for name in ("PATH", "NO_SUCH_VARIABLE")])
    assert path == "/first:" + os.environ["PATH"] and other == ":/last"


def test_variables_are_merged_with_the_jobs_and_the_parents_and_all_else_is_replaced(tmp_path):
    write(tmp_path / "one" / "who.txt", "one")
    two = write(tmp_path / "two" / "who.txt", "two")

    @minray.remote
    def parent():
        own = Path("who.txt").read_text(), os.environ["A"], os.environ["B"]
        return own, minray.get([child.remote(), child.options(runtime_env={"working_dir": str(two.parent)}).remote()])

    @minray.remote(runtime_env=variables(B="child", C="c"))
    def child():
        return Path("who.txt").read_text(), *map(os.environ.get, "ABC")

    with minray.init(num_cpus=2, runtime_env={"working_dir": str(tmp_path / "one"), **variables(A="job", B="job")}):
        own, (inherited, other) = minray.get(parent.options(runtime_env=variables(A="parent")).remote())
        assert own == ("one", "parent", "job") and inherited == ("one", "parent", "child", "c")
        assert other == ("two", "parent", "job", None), "options(runtime_env=) takes the place of the decorator's"
        assert minray.get_runtime_context().runtime_env["env_vars"] == {"A": "job", "B": "job"}


def test_the_context_tells_the_environment_and_it_can_be_passed_on(session):
    assert minray.get(environment.remote()) == {} and minray.get_runtime_context().get_runtime_env_string() == "{}"
    env = minray.get(environment.options(runtime_env=variables(A="a")).remote())
    assert env == variables(A="a") and isinstance(env, RuntimeEnv)
    assert minray.get(environment.options(runtime_env=env).remote()) == env


# ---------------------------------------------------------------- directories and modules


def test_a_working_directory_is_a_copy_that_tasks_run_in_and_import_from(session, tmp_path):
    write(tmp_path / "module_of_wd.py", "WHO = 1")
    data = write(tmp_path / "data.txt", "before")

    @minray.remote(runtime_env={"working_dir": str(tmp_path), "excludes": ["*.bin"]})
    def look():
        import module_of_wd

        found = Path("data.txt").read_text(), module_of_wd.WHO, os.getcwd(), os.listdir()
        os.chdir("/")  # Put back for the next one.
        return found

    write(tmp_path / "large.bin")
    content, who, directory, listed = minray.get(look.remote())
    assert (content, who) == ("before", 1) and sorted(set(listed) - {"__pycache__"}) == ["data.txt", "module_of_wd.py"]
    assert directory.startswith(session["session_dir"])
    data.write_text("after")
    assert minray.get(look.remote())[::2] == ("before", directory), "the copy was taken with the first call"
    minray.shutdown()
    assert not os.path.exists(directory)


def test_each_environment_has_its_own_version_of_a_module(session, tmp_path):
    for version in (1, 2):
        write(tmp_path / str(version) / "versioned" / "__init__.py", f"VERSION = {version}")
    tasks = [
        imported.options(runtime_env={"py_modules": [str(tmp_path / str(version) / "versioned")]}).remote("versioned", "VERSION")
        for version in (1, 2, 1, 2)
    ]
    assert minray.get(tasks) == [1, 2, 1, 2]
    with pytest.raises(ModuleNotFoundError):
        minray.get(imported.remote("versioned", "VERSION"))


def test_modules_may_be_a_file_an_archive_a_wheel_or_the_module_itself(session, tmp_path, monkeypatch):
    write(tmp_path / "lonely_module.py", "WHO = 'file'")
    write(tmp_path / "itself" / "module_itself" / "__init__.py", "WHO = 'itself'")
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        archive.writestr("zipped_package/__init__.py", "WHO = 'zip'")
    monkeypatch.syspath_prepend(str(tmp_path / "itself"))
    import module_itself

    modules = [tmp_path / "lonely_module.py", tmp_path / "a.zip", a_wheel(tmp_path, "wheeled", "WHO = 'wheel'"), module_itself]
    task = imported.options(runtime_env={"py_modules": modules})
    names = ("lonely_module", "zipped_package", "wheeled", "module_itself")
    assert minray.get([task.remote(name, "WHO") for name in names]) == ["file", "zip", "wheel", "itself"]


def test_a_zip_file_is_a_working_directory_with_or_without_a_directory_in_it(session, tmp_path):
    for name, inside in (("flat.zip", ""), ("deep.zip", "project/")):
        with zipfile.ZipFile(tmp_path / name, "w") as archive:
            archive.writestr(f"{inside}who.txt", name)
            archive.writestr(f"{inside}more.txt", "")

    @minray.remote
    def who():
        return Path("who.txt").read_text()

    for name in ("flat.zip", "deep.zip"):
        assert minray.get(who.options(runtime_env={"working_dir": tmp_path / name}).remote()) == name


def test_a_snapshot_that_has_gone_fails_the_task_with_its_name(session, tmp_path):
    write(tmp_path / "wd" / "a")

    @minray.remote(runtime_env={"working_dir": str(tmp_path / "wd")}, max_calls=1)
    def where():
        return os.getcwd()

    directory = minray.get(where.remote())
    shutil.rmtree(directory)
    with pytest.raises(RuntimeEnvSetupError, match=rf"environment of where .*{directory} is gone: something has removed"):
        minray.get(where.remote())


# ---------------------------------------------------------------- the hook


def test_a_hook_is_called_once_in_each_process_when_all_else_is_there(session, tmp_path):
    write(tmp_path / "hooked.py", "import os\ndef hook():\n    os.environ['HOOKED'] = os.environ['A'] + '!'\n")

    def count():
        os.environ["HOOKED"] = os.environ.get("HOOKED", "") + "x"

    for hook, expected in (("hooked.hook", "a!"), (count, "x")):
        env = {"worker_process_setup_hook": hook, "working_dir": str(tmp_path), **variables(A="a")}
        assert minray.get([variable.options(runtime_env=env).remote("HOOKED") for _ in range(3)]) == [expected] * 3


def test_a_hook_may_use_minray_itself(session):
    def hook():
        os.environ["SEEN"] = str(minray.get([variable.remote("A"), minray.put(2)]))

    @minray.remote
    def parent():
        return os.environ["SEEN"], minray.get([variable.remote("A"), pid.remote(), minray.put(3)])[::2]

    assert minray.get(parent.options(runtime_env={"worker_process_setup_hook": hook, **variables(A="a")}).remote()) == (
        "[None, 2]", ["a", 3],
    )  # fmt: skip


def test_a_hook_that_raises_fails_the_tasks_and_says_what_it_raised(session):
    def hook():
        raise LookupError("no such database")

    task = pid.options(runtime_env={"worker_process_setup_hook": hook})
    with pytest.raises(RuntimeEnvSetupError, match=r"worker_process_setup_hook raised LookupError: no such database"):
        minray.get(task.remote())
    actor = Host.options(runtime_env={"worker_process_setup_hook": hook}, max_restarts=-1).remote()
    for _ in range(2):
        with pytest.raises(RuntimeEnvSetupError, match=r"environment of Host.__init__ .*no such database"):
            minray.get(actor.pid.remote())


# ---------------------------------------------------------------- packages


def a_wheel(directory: Path, name: str, code: str, requires: str = "") -> Path:
    path = directory / f"{name}-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        info = f"{name}-1.0.dist-info"
        wheel.writestr(f"{name}.py", code)
        requirement = f"Requires-Dist: {requires}\n" if requires else ""
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n{requirement}")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    return path


def offline(*packages, **more):
    """An index would be asked for nothing."""
    return {"pip": {"packages": list(map(str, packages)), "pip_install_options": ["--no-index"], **more}}


@pytest.fixture
def environments():
    """Where they are kept, between sessions."""
    return Path(os.environ["MINRAY_HOME"], "environments")


def test_packages_are_installed_once_for_all_workers_and_sessions_and_seen_by_nobody_else(tmp_path, environments):
    env = offline(a_wheel(tmp_path, "packaged", "WHO = 'pip'"), pip_check=False)

    @minray.remote(num_cpus=1, runtime_env=env)
    def who():
        import packaged

        time.sleep(0.3)  # So that both workers have to set it up.
        child = subprocess.run([sys.executable, "-c", "import packaged, numpy; print(packaged.WHO)"], capture_output=True)
        return os.getpid(), packaged.WHO, packaged.__file__, child.stdout.decode().strip()

    before = set(os.listdir(environments)) if environments.exists() else set()
    with minray.init(num_cpus=2):
        found = minray.get([who.remote() for _ in range(4)])
        assert len({pid for pid, *_ in found}) == 2 and {row[1:2] + row[3:] for row in found} == {("pip", "pip")}
        with pytest.raises(ModuleNotFoundError):
            minray.get(imported.remote("packaged", "WHO"))
    made = sorted(set(os.listdir(environments)) - before)
    assert [name.partition(".")[2] for name in made] == ["", "lock", "log"], made
    started = time.monotonic()
    with minray.init(num_cpus=1, runtime_env=env):
        assert minray.get(who.remote())[2] == found[0][2]
    assert time.monotonic() - started < 5, "it was installed already"


def test_what_pip_cannot_do_is_told_to_each_task_with_its_last_lines_and_not_tried_again(session, environments):
    env = offline("no_such_package_of_minray")
    tasks = [pid.options(runtime_env=env).remote() for _ in range(4)]
    for task in tasks:
        with pytest.raises(RuntimeEnvSetupError) as caught:
            minray.get(task)
        said = str(caught.value)
        assert "the runtime environment of pid [task" in said and "failed with status 1" in said
        assert "No matching distribution found for no_such_package_of_minray" in said and "It was not run" in said
    log = Path(said.partition("all of it: ")[2].partition(")")[0])
    tried = log.stat().st_mtime_ns
    actor = Host.options(runtime_env=env, max_restarts=-1).remote()
    with pytest.raises(RuntimeEnvSetupError, match="No matching distribution"):
        minray.get(actor.pid.remote())
    assert log.stat().st_mtime_ns == tried
    assert minray.get(pid.remote())


def test_processes_that_want_the_same_packages_at_once_share_what_one_of_them_installs(tmp_path, monkeypatch):
    from concurrent.futures import ThreadPoolExecutor

    from minray import virtualenvs

    made = []

    def make(path, *_):
        made.append(path)
        os.makedirs(path)
        time.sleep(0.2)
        Path(path, virtualenvs.COMPLETE).write_text("")

    monkeypatch.setattr(virtualenvs, "_make", make)
    session, store = str(tmp_path / "live" / "session"), str(tmp_path / "store")
    with ThreadPoolExecutor(8) as threads:  # Each call has a lock of its own, as a process has.
        found = list(threads.map(lambda _: virtualenvs.prepared({"packages": ["x"]}, session, store, 20), range(8)))
    assert {path for path, _ in found} == set(made) and len(made) == 1
    with pytest.raises(RuntimeEnvSetupError, match="another process has been installing the same packages for more than 0.1 s"):
        os.unlink(Path(made[0], virtualenvs.COMPLETE))
        virtualenvs.prepared({"packages": ["x"]}, session, store, 0.1)
    for _, lock in found:
        os.close(lock)


def test_a_task_whose_environment_fails_lets_its_arguments_go(session):
    large = minray.put(bytes(1_000_000))
    with pytest.raises(RuntimeEnvSetupError):
        minray.get(variable.options(runtime_env=offline("no_such_package_of_minray")).remote(large))
    used = minray.api._query("memory")["used"]
    del large
    deadline = time.monotonic() + 10
    while minray.api._query("memory")["used"] > used - 1_000_000:
        assert time.monotonic() < deadline, minray.api._query("memory")
        time.sleep(0.01)


def test_a_jobs_packages_are_installed_by_init_which_says_what_went_wrong(tmp_path):
    with pytest.raises(RuntimeEnvSetupError, match="No matching distribution found for no_such_package"):
        minray.init(num_cpus=1, runtime_env=offline("no_such_package"))
    assert not minray.is_initialized()
    later = {**offline("no_such_package"), "config": {"eager_install": False}}
    with minray.init(num_cpus=1, runtime_env=later), pytest.raises(RuntimeEnvSetupError, match="No matching"):
        minray.get(pid.remote())


def test_an_installation_ends_with_its_time(session):
    env = {**offline("no_such_package_either"), "config": {"setup_timeout_seconds": 0.01}}
    with pytest.raises(RuntimeEnvSetupError, match=r"had not ended when 0.01 s were over .*setup_timeout_seconds"):
        minray.get(pid.options(runtime_env=env).remote())


SLOW = """
import os, time, zipfile

def build_wheel(directory, *_):
    if not os.path.exists(NOTE):
        with open(NOTE + ".new", "w") as file:
            print(os.getpid(), os.getppid(), os.getpgid(0), file=file)
        os.rename(NOTE + ".new", NOTE)
        time.sleep(600)
    with zipfile.ZipFile(os.path.join(directory, "slow-1-py3-none-any.whl"), "w") as wheel:
        wheel.writestr("slow_one.py", "HERE = True")
        wheel.writestr("slow-1.dist-info/METADATA", "Metadata-Version: 2.1\\nName: slow\\nVersion: 1\\n")
        wheel.writestr("slow-1.dist-info/WHEEL", "Wheel-Version: 1.0\\nRoot-Is-Purelib: true\\nTag: py3-none-any\\n")
        wheel.writestr("slow-1.dist-info/RECORD", "")
    return "slow-1-py3-none-any.whl"
"""


def slow_to_build(tmp_path):
    """A project whose first build takes ten minutes; and where it writes its own pid, that of pip, and their group."""
    project, note = tmp_path / "slow", tmp_path / "pids"
    project.mkdir()
    backend = '[build-system]\nrequires = []\nbuild-backend = "backend"\nbackend-path = ["."]\n'
    (project / "pyproject.toml").write_text(backend + '[project]\nname = "slow"\nversion = "1"\n')
    (project / "backend.py").write_text(f"NOTE = {str(note)!r}\n{SLOW}")
    return str(project), note


def pids_in(note):
    deadline = time.monotonic() + within(60)
    while not note.exists():
        assert time.monotonic() < deadline, "pip does not build it"
        time.sleep(0.01)
    return [int(number) for number in note.read_text().split()]


def await_the_end_of(pids):
    deadline = time.monotonic() + within(2)
    while alive := [number for number in pids if is_alive(identify(number))]:
        assert time.monotonic() < deadline, f"{alive} of {pids} live on"
        time.sleep(0.01)


def test_pip_and_its_builds_end_with_their_worker_and_the_next_one_makes_the_environment_anew(tmp_path):
    project, note = slow_to_build(tmp_path)
    with minray.init(num_cpus=1):
        ref = imported.options(runtime_env=offline(project)).remote("slow_one", "HERE")
        pids = pids_in(note)
        (worker,) = {row[1] for row in minray.api._query("workers") if row[2]}
        os.kill(worker, signal.SIGKILL)
        await_the_end_of([worker, *pids])
        assert minray.get(ref, timeout=within(60)) is True


def test_pip_and_its_builds_end_with_the_driver_that_installs_for_its_job(tmp_path):
    project, note = slow_to_build(tmp_path)
    code = f"import minray; minray.init(num_cpus=1, runtime_env={offline(project)!r})"
    with subprocess.Popen([sys.executable, "-c", code]) as driver:
        pids = pids_in(note)
        driver.kill()
    await_the_end_of(pids)


def test_another_version_of_what_minray_needs_itself_is_refused(session, tmp_path):
    env = offline(a_wheel(tmp_path, "cloudpickle", ""), a_wheel(tmp_path, "other", ""))
    env["pip"]["pip_install_options"].append("--ignore-installed")
    with pytest.raises(RuntimeEnvSetupError, match=r"another version of cloudpickle, .*has loaded cloudpickle \d"):
        minray.get(pid.options(runtime_env=env).remote())


def test_only_the_newest_environments_are_kept_and_those_in_use(tmp_path, monkeypatch):
    from minray import virtualenvs

    def make(path, *_):
        os.makedirs(path)
        Path(path, virtualenvs.COMPLETE).write_text("")

    monkeypatch.setattr(virtualenvs, "KEEP", 2)
    monkeypatch.setattr(virtualenvs, "_make", make)
    session, store = str(tmp_path / "live" / "session"), str(tmp_path / "store")
    used, lock = virtualenvs.prepared({"packages": ["used"]}, session, store, 5)
    for name in "abc":
        path, other = virtualenvs.prepared({"packages": [name]}, session, store, 5)
        os.close(other)
        os.utime(path, (1, ord(name)))
    assert sorted(p.name for p in (tmp_path / "environments").iterdir() if p.is_dir()) == sorted(
        map(os.path.basename, (used, path))
    )
    os.close(lock)


# ---------------------------------------------------------------- who shares a process with whom


def test_workers_are_reused_by_tasks_of_the_same_environment_and_by_no_others():
    with minray.init(num_cpus=1):
        plain, red, blue = pid, *(pid.options(runtime_env=variables(COLOUR=colour)) for colour in ("red", "blue"))
        order = [plain, red, blue, red, plain, blue, plain, red, blue]
        pids = [minray.get(task.remote()) for task in order]
        assert len(set(pids)) == 3 and len(set(zip(map(id, order), pids))) == 3, pids


def test_many_environments_do_not_pile_up_processes():
    with minray.init(num_cpus=1):
        for number in range(12):
            assert minray.get(variable.options(runtime_env=variables(N=str(number))).remote("N")) == str(number)
        assert len(minray.api.core().node.describe("workers")) <= 5


def test_a_child_inherits_only_from_the_environment_that_its_worker_has_by_then(session):
    """A worker may know a function before it has an environment; the children are those of the task all the same."""
    @minray.remote
    def outer():
        return minray.get(variable.remote("A"))

    assert minray.get([outer.remote(), outer.options(runtime_env=variables(A="1")).remote(), outer.remote()]) == [None, "1", None]


def test_an_environments_own_thread_count_is_left_alone(session):
    env = variables(OMP_NUM_THREADS="7", CUDA_VISIBLE_DEVICES="x")
    for cpus in (1, 2, 1):
        task = variable.options(runtime_env=env, num_cpus=cpus)
        assert minray.get([task.remote("OMP_NUM_THREADS"), task.remote("CUDA_VISIBLE_DEVICES")]) == ["7", "x"]


def test_an_actor_that_restarts_does_so_in_its_environment(session):
    actor = Host.options(runtime_env=variables(A="a"), max_restarts=1).remote()
    os.kill(minray.get(actor.pid.remote()), 9)
    deadline = time.monotonic() + 20
    while True:
        try:
            assert minray.get(actor.variable.remote("A")) == "a"
            break
        except minray.exceptions.ActorUnavailableError:
            assert time.monotonic() < deadline


# ---------------------------------------------------------------- max_calls


def test_a_worker_is_replaced_after_max_calls_of_a_function(session):
    @minray.remote(max_calls=2)
    def which():
        return os.getpid()

    pids = [minray.get(which.remote()) for _ in range(6)]
    assert len(set(pids)) == 3 and max(map(pids.count, pids)) == 2, pids
    assert len(set(minray.get([which.remote() for _ in range(6)]))) >= 3


def test_the_replaced_worker_ends_in_order_with_its_atexit_handlers(session, tmp_path):
    @minray.remote(max_calls=1)
    def register(path):
        import atexit

        atexit.register(Path(path).write_text, "bye")

    @minray.remote
    def wait_for(path):
        while not os.path.exists(path):
            time.sleep(0.01)
        return Path(path).read_text()

    minray.get(register.remote(str(tmp_path / "said")))
    assert minray.get(wait_for.remote(str(tmp_path / "said")), timeout=20) == "bye"


def test_tasks_with_a_gpu_are_in_a_process_of_their_own_unless_they_say_otherwise():
    with minray.init(num_cpus=1, num_gpus=1):
        task = pid.options(num_gpus=1)
        assert len({minray.get(task.remote()) for _ in range(3)}) == 3
        lasting = pid.options(num_gpus=1, max_calls=0)
        assert len({minray.get(lasting.remote()) for _ in range(3)}) == 1
    with pytest.raises(ValueError, match=r"max_calls=...\) must be an integer, 1 or more, or 0"):
        pid.options(max_calls=-1)


# ---------------------------------------------------------------- jobs


def test_a_job_config_says_what_init_does_not(tmp_path):
    write(tmp_path / "code" / "found_by_path.py", "WHO = 'path'")
    config = JobConfig(
        code_search_path=[str(tmp_path / "code")], runtime_env=variables(A="job"), ray_namespace="lab",
        default_actor_lifetime="detached", metadata={"owner": "us"},
    )  # fmt: skip
    config.set_metadata("room", "7")
    assert config.metadata == {"owner": "us", "room": "7"}
    with minray.init(num_cpus=2, job_config=config):
        assert minray.get([variable.remote("A"), imported.remote("found_by_path", "WHO")]) == ["job", "path"]
        assert minray.get_runtime_context().namespace == "lab"
        Host.options(name="kept").remote()
        assert minray.get(minray.get_actor("kept", namespace="lab").variable.remote("A")) == "job"

        @minray.remote
        def makes():
            Host.options(name="by_task").remote()

        minray.get(makes.remote())
        assert minray.get(minray.get_actor("by_task").pid.remote())
    with minray.init(num_cpus=1, job_config=config, namespace="own", runtime_env=variables(A="own")):
        assert minray.get(variable.remote("A")) == "own" and minray.get_runtime_context().namespace == "own"
    with minray.init(num_cpus=1, job_config={"ray_namespace": "dict"}):
        assert minray.get_runtime_context().namespace == "dict"


@pytest.mark.parametrize(
    ("given", "error", "message"),
    [
        ({"jvm_options": ["-Xmx1g"]}, NotImplementedError, "jvm_options.*no Java workers"),
        ({"_client_job": True}, NotImplementedError, "no Ray Client"),
        ({"code_search_path": ["/no/such"]}, ValueError, "'/no/such' is not a directory"),
        ({"code_search_path": "/tmp"}, TypeError, "must be a list of directories"),
        ({"ray_namespace": ""}, ValueError, "a string that is not empty"),
        ({"default_actor_lifetime": "long"}, ValueError, "\"detached\" or \"non_detached\", got 'long'"),
        ({"runtime_env": {"conda": "a"}}, NotImplementedError, "conda"),
    ],
)
def test_a_job_config_refuses_what_has_no_meaning(given, error, message):
    with pytest.raises(error, match=message):
        JobConfig(**given)


def test_init_takes_a_job_config_and_nothing_like_it():
    with pytest.raises(TypeError, match=r"job_config=...\) must be a minray.job_config.JobConfig, got 7"):
        minray.init(job_config=7)
    assert not minray.is_initialized()


def test_a_session_may_be_kept_elsewhere(tmp_path):
    with minray.init(num_cpus=1, _temp_dir=str(tmp_path / "here")) as context:
        assert context["session_dir"].startswith(str(tmp_path / "here" / "live"))
        assert minray.get(pid.remote())
    assert len(os.listdir(tmp_path / "here" / "finished")) == 1
    with pytest.raises(ValueError, match="_temp_dir"):
        minray.init(_temp_dir=7)


def test_a_durable_job_runs_a_task_again_when_its_environment_has_changed(tmp_path):
    data = write(tmp_path / "wd" / "data.txt", "one")

    @minray.remote(runtime_env={"working_dir": str(tmp_path / "wd")})
    def read():
        return Path("data.txt").read_text(), os.getpid()

    def run():
        with minray.init(num_cpus=1, job="reader", storage=tmp_path / "job.sqlite"):
            return minray.get(minray.remote(**read._options)(read._function).remote())

    first = run()
    assert run() == first, "its result was kept"
    data.write_text("two")
    assert run()[0] == "two"


def test_a_durable_job_runs_a_task_again_when_the_environment_of_one_that_it_calls_has_changed(tmp_path):
    def run(level):
        child = minray.remote(runtime_env={"env_vars": {"LEVEL": level}})(lambda: os.environ["LEVEL"])
        keeper = Host.options(runtime_env={"env_vars": {"LEVEL": level}})
        calls_it = minray.remote(lambda: minray.get(child.remote()))
        makes_it = minray.remote(lambda: minray.get(keeper.remote().variable.remote("LEVEL")))
        is_given_it = minray.remote(lambda function: minray.get(function.remote()))
        with minray.init(num_cpus=2, job="levels", storage=tmp_path / "job.sqlite"):
            found = minray.get([calls_it.remote(), makes_it.remote(), is_given_it.remote(child)])
            return found, api.core().node.describe("ran")

    assert run("1")[0] == ["1", "1", "1"]
    assert run("1") == (["1", "1", "1"], 0)
    assert run("2")[0] == ["2", "2", "2"]


def test_a_task_of_another_environment_comes_to_its_turn_while_the_first_ones_queue_is_never_empty():
    with minray.init(num_cpus=1):
        busy, other = (minray.remote(runtime_env=variables(A=name))(time.sleep) for name in "ab")
        pending = [busy.remote(0.002) for _ in range(6)]
        late = other.remote(0)
        deadline = time.monotonic() + 60
        while not minray.wait([late], timeout=0)[0]:
            assert time.monotonic() < deadline, "it starves"
            _, pending = minray.wait(pending)
            pending.append(busy.remote(0.002))


@minray.remote
def noted(path):
    return os.environ.get("PP"), len(sys.path), os.getcwd()


def test_what_a_failed_set_up_has_changed_is_put_back_before_the_next_try(tmp_path):
    def fails_once():
        os.environ["LEFT"] = "over"
        sys.path.append("/left/over")
        os.chdir("/")
        if not os.path.exists(tmp_path / "tried"):
            (tmp_path / "tried").touch()
            raise OSError("first")

    env = {"env_vars": {"PP": "/x:${PP}"}, "worker_process_setup_hook": fails_once}
    with minray.init(num_cpus=1):
        task = noted.options(runtime_env=env)
        with pytest.raises(RuntimeEnvSetupError, match="OSError: first"):
            minray.get(task.remote(""))
        assert minray.get(task.remote(""))[0] == "/x:"


def test_a_task_whose_environment_is_being_set_up_can_be_cancelled(tmp_path):
    def hook():
        (tmp_path / "begun").touch()
        time.sleep(600)

    with minray.init(num_cpus=1):
        ref = variable.options(runtime_env={"worker_process_setup_hook": hook}).remote("A")
        deadline = time.monotonic() + 60
        while not (tmp_path / "begun").exists():
            assert time.monotonic() < deadline
            time.sleep(0.005)
        minray.cancel(ref)
        with pytest.raises(minray.exceptions.TaskCancelledError):
            minray.get(ref, timeout=60)


# ---------------------------------------------------------------- what a worker may do


def test_tasks_and_actors_may_start_pools_of_processes(session):
    def square_all(numbers):
        import multiprocessing
        from concurrent.futures import ProcessPoolExecutor

        context = multiprocessing.get_context("fork")
        with context.Pool(2) as pool:
            first = pool.map(abs, numbers)
        with ProcessPoolExecutor(2, mp_context=context) as executor:
            return first, list(executor.map(abs, numbers)), subprocess.check_output(["echo", "hi"]).decode()

    @minray.remote
    class Squares:
        def of(self, numbers):
            return square_all(numbers)

    task = minray.remote(square_all)
    actor = Squares.remote()
    expected = ([1, 2, 3], [1, 2, 3], "hi\n")
    assert minray.get([task.remote([-1, -2, -3]), actor.of.remote([-1, -2, -3])], timeout=60) == [expected] * 2
    assert minray.get(pid.remote())


def test_the_drivers_directory_and_path_are_the_workers(run_driver, tmp_path):
    write(tmp_path / "beside_the_driver.py", "WHO = 'beside'")
    program = """
        import os, minray

        @minray.remote
        def look():
            import beside_the_driver

            return beside_the_driver.WHO, os.getcwd()

        minray.init(num_cpus=1)
        print(minray.get(look.remote()) == ("beside", os.getcwd()))
        """
    assert run_driver(textwrap.dedent(program), cwd="/").stdout == "True\n"
