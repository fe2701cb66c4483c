"""After every test: nothing is left.

A test run has a session root of its own (MINRAY_HOME) and marks its processes with a
variable in their environment, so that what a test leaves behind is found wherever it has
gone, and what other runs on this machine do is not taken for it.

`nothing_is_left` is around every test, and once more around every module.  A session that
a wider fixture holds (see `module_session`) may go on and may start workers meanwhile: what
belongs to it is not counted until the module ends.

Before a session ends, and after each test that has used a wider fixture's, its node is looked at: what must hold
between events (`Node.check`).

    session         a fresh session of two CPUs for one test
    module_session  the same for all tests of a module, where their number makes that worth while
    gate            where a task waits until the test lets it go on
    run_driver      runs a program that uses minray in a process of its own
"""

import gc
import glob
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from pathlib import Path

import pytest

import minray
from minray import api
from minray.driver import Driver

ROOT = Path(__file__).resolve().parent.parent
MARK = f"MINRAY_TEST_RUN={uuid.uuid4().hex}"
GONE_WITHIN_S = 5.0
"""What minray promises for memory and descriptors after shutdown(), and for processes after any end."""
NOT_OURS = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")
"""Processes that the standard library starts once and keeps until the interpreter exits."""


def within(seconds):
    """How long what is promised within `seconds` may take at this moment.

    A promise is about a machine that does little else; one that is N times as busy as it has CPUs gets N times as long.
    """
    with open("/proc/loadavg") as file:
        of_last_minute, _, _, now, _ = file.read().split()
    busy = max(float(of_last_minute), int(now.partition("/")[0]))  # Ready to run, in this moment.
    return seconds * max(1.0, busy / (os.cpu_count() or 1))


def pytest_configure(config):
    config.addinivalue_line("markers", "minray: of minray's own plugin, which these tests do not load; the guide shows it")
    config.addinivalue_line("markers", "notebook: runs a Jupyter notebook, where nbclient is installed")
    config.addinivalue_line("markers", "long: takes minutes; is skipped unless MINRAY_TEST_LONG=1 is in the environment")
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        # Started in the background of a shell: programs that tests start would inherit it, and not feel Ctrl-C.
        signal.signal(signal.SIGINT, signal.default_int_handler)
    home = tempfile.mkdtemp(prefix="minray-tests-")
    os.environ["MINRAY_HOME"] = home
    os.environ.update([MARK.split("=")])
    # A Python that a test starts in another directory finds the same minray.
    path = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(path)
    config.add_cleanup(lambda: shutil.rmtree(home, ignore_errors=True))


def pytest_collection_modifyitems(items):
    if os.environ.get("MINRAY_TEST_LONG") != "1":
        for item in items:
            if item.get_closest_marker("long") is not None:
                item.add_marker(pytest.mark.skip(reason="takes minutes: MINRAY_TEST_LONG=1 runs it"))


@pytest.fixture
def session():
    with minray.init(num_cpus=2) as context:
        yield context


@pytest.fixture(scope="module")
def module_session():
    with minray.init(num_cpus=2) as context:
        yield context


@pytest.fixture
def gate(tmp_path):
    """The path of a pipe: who opens one end of it stands still until somebody opens the other."""
    path = str(tmp_path / "gate")
    os.mkfifo(path)
    return path


@pytest.fixture
def run_driver(tmp_path):
    """Runs a program in a process of its own; returns what it printed, after a check of its exit status."""

    def run(code, *arguments, expect_status=0, timeout_s=90, **options):
        program = tmp_path / "driver.py"
        program.write_text(code)
        ended = subprocess.run(
            [sys.executable, str(program), *arguments],
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
            **options,
        )
        shown = f"--- stdout\n{ended.stdout}\n--- stderr\n{ended.stderr}"
        assert ended.returncode == expect_status, f"the driver ended with status {ended.returncode}\n{shown}"
        return ended

    return run


# ---------------------------------------------------------------- what there is


class Process:
    """An entry of /proc."""

    def __init__(self, pid):
        self.pid = pid
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()
        self.state, self.parent, self.identity = fields[0].decode(), int(fields[1]), (pid, int(fields[19]))
        self.marked = False
        try:
            with open(f"/proc/{pid}/environ", "rb") as file:
                self.marked = MARK.encode() in file.read().split(b"\0")
        except OSError:
            pass  # Another user's, or ended meanwhile.

    def __repr__(self):
        try:
            command = Path(f"/proc/{self.pid}/cmdline").read_text().replace("\0", " ").strip()
        except OSError:
            command = ""
        return f"{self.pid} (parent {self.parent}, {self.state}) {command[:120]}"

    def is_not_ours(self):
        return any(name in repr(self) for name in NOT_OURS)


def our_processes():
    """By (pid, start time): every process that descends from this one or carries the run's mark."""
    everybody = {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                everybody[int(name)] = Process(int(name))
            except (FileNotFoundError, ProcessLookupError):
                pass
    ours = {}
    for process in everybody.values():
        line = []
        while process is not None and not process.marked and process.pid != os.getpid():
            line.append(process)
            process = everybody.get(process.parent)
        if process is not None:
            ours.update((one.identity, one) for one in line)
            ours[process.identity] = process
    return {key: one for key, one in ours.items() if one.pid != os.getpid()}


def descendants(pid, processes):
    found = {pid}
    while True:
        more = {one.pid for one in processes.values() if one.parent in found} - found
        if not more:
            return found
        found |= more


def arenas():
    """The names in shared memory, those of other runs included: `belongs_to_others`."""
    try:
        return {name for name in os.listdir("/dev/shm") if name.startswith("minray")}
    except FileNotFoundError:
        return set()


def belongs_to_others(name, ours):
    """Noted in a session of another run (which may have been killed, and not yet swept), or mapped by its processes."""
    for path in glob.glob(f"{tempfile.gettempdir()}/*/live/*/session.json"):
        if not path.startswith(os.environ["MINRAY_HOME"] + "/"):
            try:
                if f'"{name}"' in Path(path).read_text():
                    return True
            except OSError:
                pass  # It has been filed away meanwhile.
    pids = {one.pid for one in ours.values()} | {os.getpid()}
    for pid in os.listdir("/proc"):
        if pid.isdecimal() and int(pid) not in pids:
            try:
                if f"/dev/shm/{name}" in Path(f"/proc/{pid}/maps").read_text():
                    return True
            except (OSError, UnicodeDecodeError):
                pass
    return False


def live_sessions():
    try:
        return set(os.listdir(os.path.join(os.environ["MINRAY_HOME"], "live")))
    except FileNotFoundError:
        return set()


def descriptors():
    """Open file descriptors with what they are; the number of an inode makes each file distinct."""
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((int(fd), os.readlink(f"/proc/self/fd/{fd}")))
        except OSError:
            pass  # The one that this listing used.
    # The standard library's resource tracker keeps one for the life of the process.
    tracker = sys.modules.get("multiprocessing.resource_tracker")
    kept = getattr(getattr(tracker, "_resource_tracker", None), "_fd", None)
    return {(fd, what) for fd, what in found if fd != kept}


def threads():
    # tqdm keeps one monitor thread for the life of the process.
    return {thread for thread in threading.enumerate() if type(thread).__name__ != "TMonitor"}


class Inventory:
    """What exists now; `leaks` tells what has come since and should have gone."""

    def __init__(self):
        self.core = api._core
        self.processes = our_processes()
        self.arenas = arenas()
        self.sessions = live_sessions()
        self.descriptors = descriptors()
        self.threads = threads()

    def leaks(self):
        """(kind, what) for each thing that is left over."""
        processes = our_processes()
        left = []
        allowed = set()
        if api._core is not None and api._core is not self.core:
            left.append(("session", f"{api._core!r} was not shut down"))
        elif self.core is not None:  # A wider fixture's, in use: it may start workers and connect to them.
            allowed = descendants(self.core.zygote.pid, processes)
        for identity, process in processes.items():
            if identity not in self.processes and process.pid not in allowed and not process.is_not_ours():
                left.append(("process", process))
        for name in arenas() - self.arenas:
            if not belongs_to_others(name, processes):
                left.append(("shared memory", name))
        left += [("live session", name) for name in live_sessions() - self.sessions]
        new = descriptors() - self.descriptors
        if self.core is not None and api._core is self.core:
            new = {(fd, what) for fd, what in new if fd not in self.core.raylet._by_fd}
        # No tolerance: a test that opens a file closes it.
        left += [("file descriptor", f"{fd} {what}") for fd, what in new]
        left += [("thread", thread) for thread in threads() - self.threads]
        return left


TOO_MUCH_TO_CHECK = 20_000
"""Tasks and objects: `Node.check` looks at all of them, which in most tests takes well under a millisecond."""


def check_node(core):
    """What must hold at a node between events must hold whatever a test has done to its session."""
    with core.raylet.lock:
        if len(core.node.lineage.tasks) + len(core.node.objects) <= TOO_MUCH_TO_CHECK:
            core.node.check()


@pytest.fixture(autouse=True, scope="session")
def nodes_are_checked_before_their_sessions_end():
    close = Driver.close

    def check_and_close(core):
        try:
            check_node(core)
        finally:
            close(core)

    Driver.close = check_and_close
    yield
    Driver.close = close


def check(before, where):
    started = time.monotonic()
    left = before.leaks()
    while left and time.monotonic() < started + within(GONE_WITHIN_S) and all(kind != "session" for kind, _ in left):
        gc.collect()  # What a cycle holds is not leaked, only late.
        subprocess._cleanup()  # Popen objects that were dropped before their process ended.
        time.sleep(0.02)
        left = before.leaks()
    if not left:
        return
    if api._core is not before.core:
        minray.shutdown()  # So that the next test starts afresh.
    for kind, what in left:
        if kind == "process" and what.state != "Z":
            try:
                os.kill(what.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
    lines = "\n".join(f"  {kind}: {what}" for kind, what in left)
    pytest.fail(f"{where} left behind:\n{lines}", pytrace=False)


@pytest.fixture(autouse=True, scope="module")
def nothing_is_left_of_the_module():
    before = Inventory()
    yield
    check(before, "the module")


@pytest.fixture(autouse=True)
def nothing_is_left(nothing_is_left_of_the_module):
    before = Inventory()
    yield
    if type(api._core) is Driver:  # A wider fixture's.
        check_node(api._core)
    check(before, "the test")
