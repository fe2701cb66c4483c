"""The pytest plugin (minray_pytest.py), run by a pytest of its own in a process of its own.

Each of those runs costs a second or more, so one run answers several questions.
"""

import re
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minray
from minray.testing import reset

pytest_plugins = ["pytester"]

PROGRAM = """
import minray, pytest

@minray.remote
def add(a, b=1):
    return a + b

@minray.remote
class Counter:
    def __init__(self):
        self.n = 0
    def add(self):
        self.n += 1
        return self.n
"""


@pytest.fixture
def run(pytester, monkeypatch):
    """Runs these tests with the plugin; `outcomes`: by test, and the text of the run."""
    monkeypatch.delenv("PYTEST_ADDOPTS", raising=False)
    monkeypatch.setenv("PYTEST_DISABLE_PLUGIN_AUTOLOAD", "1")

    def run(code, *arguments, ini="", program=PROGRAM):
        pytester.makeini(f"[pytest]\n{ini}")
        pytester.makepyfile(test_it=program + code)
        result = pytester.runpytest_subprocess("-p", "minray_pytest", "-v", "--strict-markers", *arguments, timeout=100)
        text = result.stdout.str()
        outcomes = dict(re.findall(r"^test_it.py::(\S+) (\w+)", text, re.MULTILINE))
        errors = set(re.findall(r"^test_it.py::(\S+) ERROR", text, re.MULTILINE))
        return outcomes, errors, text

    return run


def test_tests_share_a_session_that_is_reset_between_them(run):
    outcomes, errors, text = run(
        """
import time
kept, sessions = [], set()

def test_one(minray_session):
    sessions.add(minray_session["session_dir"])
    assert minray.cluster_resources()["CPU"] == 3
    counter = Counter.options(name="counter", lifetime="detached").remote()
    assert minray.get([counter.add.remote(), add.remote(1)]) == [1, 2]
    kept.append(minray.remote(lambda: time.sleep(60)).remote())
    kept.append(minray.put("kept"))

def test_two(minray_session):
    sessions.add(minray_session["session_dir"])
    assert len(sessions) == 1
    with pytest.raises(ValueError):
        minray.get_actor("counter")
    with pytest.raises(minray.exceptions.TaskCancelledError):
        minray.get(kept[0])
    assert minray.available_resources()["CPU"] == 3
    assert minray.get(add.remote(2)) == 3

def test_three_without_a_session():
    assert not minray.is_initialized()
    tried = minray.testing.explore(lambda: minray.get(add.remote(1)), seeds=[1, 2])
    assert tried.seeds == 2
    with minray.init(local_mode=True):
        assert minray.get(add.remote(1)) == 2

def test_four(minray_session):
    sessions.add(minray_session["session_dir"])
    assert len(sessions) == 1 and minray.get(add.remote(2)) == 3

@pytest.mark.minray(num_cpus=5, resources={"gold": 2})
def test_five_asks_for_another(minray_session):
    sessions.add(minray_session["session_dir"])
    assert len(sessions) == 2 and minray.cluster_resources()["gold"] == 2

def test_six_shuts_it_down(minray_session):
    minray.shutdown()

def test_seven_gets_another(minray_session):
    assert minray.get(add.remote(3)) == 4
""",
        ini="minray_num_cpus = 3",
    )
    assert set(outcomes.values()) == {"PASSED"} and len(outcomes) == 7 and not errors, text
    warning = re.search(r"MinrayLeakWarning: test_it.py::test_one has left behind in the session: (.*)", text)
    assert warning, text
    assert "1 actor (Counter named counter)" in warning[1] and "1 task (<lambda>())" in warning[1]
    assert "put()" in warning[1]
    assert "test_two has left" not in text, "what has been told is not told of again"


def test_a_fresh_and_a_local_session_and_the_command_line(run):
    outcomes, errors, text = run(
        """
import os

def test_fresh(minray_fresh):
    assert minray.cluster_resources()["CPU"] == 4
    assert minray.get(minray.remote(os.getpid).remote()) != os.getpid()

def test_local(minray_local):
    assert minray.cluster_resources()["CPU"] == 4
    assert minray.get(minray.remote(os.getpid).remote()) == os.getpid()

@pytest.mark.minray(num_gpus=2)
def test_local_with_options(minray_local):
    assert minray.cluster_resources()["GPU"] == 2

def test_none():
    assert not minray.is_initialized()

def test_two_at_once(minray_fresh, minray_session):
    pass

@pytest.mark.minray(4)
def test_a_marker_without_a_name(minray_local):
    pass
""",
        "--minray-num-cpus=4",
    )
    passed = {name for name, what in outcomes.items() if what == "PASSED"}
    assert passed == {"test_fresh", "test_local", "test_local_with_options", "test_none"}, text
    assert errors == {"test_two_at_once", "test_a_marker_without_a_name"}
    assert "takes options by name" in text


def test_the_marker_finds_whatever_is_left(run):
    outcomes, errors, text = run(
        """
import subprocess, sys
kept = []

@pytest.mark.minray_leaks
def test_clean(minray_session):
    counter = Counter.remote()
    assert minray.get([counter.add.remote(), add.remote(1)]) == [1, 2]

@pytest.mark.minray_leaks
def test_actor(minray_session):
    kept.append(Counter.remote())

@pytest.mark.minray_leaks
def test_memory_and_file(minray_session):
    kept.append(minray.put(bytes(100_000)))
    kept.append(open("/dev/null"))

@pytest.mark.minray_leaks
def test_process():
    kept.append(subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE))

@pytest.mark.minray_leaks
def test_session():
    minray.init(num_cpus=1)

@pytest.mark.minray_leaks
def test_local_session():
    minray.init(local_mode=True)

@pytest.mark.minray_leaks
def test_a_session_that_ends():
    with minray.init(num_cpus=1):
        assert minray.get(add.remote(1)) == 2

def test_last():
    assert not minray.is_initialized()
    kept[-1].communicate()
"""
    )
    assert errors == {"test_actor", "test_memory_and_file", "test_process", "test_session", "test_local_session"}, text
    assert outcomes["test_last"] == "PASSED"
    assert re.search(r"in the session: 1 actor \(Counter\)", text)
    assert re.search(r"file descriptor \d+: /dev/null", text) and re.search(r"100,\d+ bytes of shared memory", text)
    assert re.search(r"process \d+: .*input\(\)", text)
    assert "a session that was not shut down" in text


def test_what_is_left_can_be_an_error_for_all_tests_or_for_none(run):
    code = "\nkept = []\ndef test_it(minray_session):\n    kept.append(minray.put(1))\n"
    _, errors, text = run(code, ini="minray_leaks = error")
    assert errors == {"test_it"} and "has left behind in the session: 1 object (put())" in text
    outcomes, errors, text = run(code, ini="minray_leaks = ignore")
    assert outcomes == {"test_it": "PASSED"} and not errors and "left behind" not in text


def test_a_run_that_does_not_use_it_does_not_import_minray(run):
    outcomes, _, text = run(
        "def test_it():\n    import sys\n    assert not any(name.partition('.')[0] == 'minray' for name in sys.modules)\n",
        program="",
    )
    assert outcomes == {"test_it": "PASSED"}, text


def test_it_installs_with_the_package():
    setup = (Path(minray.__file__).parent.parent / "setup.py").read_text()
    assert '"pytest11": ["minray_pytest=minray_pytest"]' in setup and 'py_modules=["minray_pytest"]' in setup


def test_several_runs_at_once_do_not_meet(run, pytester):
    """What pytest-xdist does: processes with one plugin each."""
    pytester.makepyfile(test_it=PROGRAM + "\n@pytest.mark.minray_leaks\ndef test_it(minray_session):\n"
                        "    counter = Counter.options(name='same').remote()\n"
                        "    assert minray.get([counter.add.remote() for _ in range(5)]) == [1, 2, 3, 4, 5]\n")  # fmt: skip
    command = [sys.executable, "-m", "pytest", "-p", "minray_pytest", "-q", "test_it.py"]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, cwd=pytester.path) for _ in range(2)]
    for one in runs:
        text, _ = one.communicate(timeout=100)
        assert one.returncode == 0, text


# ---------------------------------------------------------------- reset


@minray.remote
class Sleeper:
    def sleep(self):
        time.sleep(60)


def test_a_reset_ends_what_runs_and_what_waits(session):
    @minray.remote
    def stubborn():
        while True:
            try:
                time.sleep(60)
            except KeyboardInterrupt:
                pass

    sleeper = Sleeper.options(max_restarts=-1).remote()
    refs = [sleeper.sleep.remote(), stubborn.remote(), stubborn.remote(), minray.remote(lambda ref: ref).remote(sleeper.sleep.remote())]
    minray.wait(refs, timeout=0.3)
    left = reset()
    assert left.actors == ["Sleeper"] and len(left.tasks) == 5, left
    ready, _ = minray.wait(refs, num_returns=4, timeout=10)
    assert len(ready) == 4
    assert minray.get(minray.remote(lambda: 1).remote()) == 1
    del refs, ready, sleeper
    assert not reset().actors


def test_a_reset_of_a_session_in_local_mode():
    with minray.init(local_mode=True, num_cpus=1):
        sleeper = Sleeper.options(name="it").remote()
        refs = [sleeper.sleep.remote(), minray.remote(lambda: time.sleep(60)).remote()]
        left = reset()
        assert left.actors == ["Sleeper named it"] and len(left.tasks) == 2
        assert minray.get(minray.remote(lambda: 1).remote()) == 1
        del refs


def test_a_reset_costs_next_to_nothing(session):
    add = minray.remote(lambda: 1)
    minray.get(add.remote())
    began = time.process_time()
    for _ in range(100):
        assert not reset()
    assert time.process_time() - began < 1.0, "of 100 tests"


def test_only_a_driver_can_reset(session):
    with pytest.raises(RuntimeError, match=r"reset\(\) works in the driver of a session"):
        minray.get(minray.remote(lambda: minray.testing.reset()).remote())
    minray.shutdown()
    with pytest.raises(RuntimeError, match=r"reset\(\) works in the driver of a session"):
        reset()
