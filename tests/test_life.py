"""The life of a session: how it starts, where it works, and how it ends, whoever ends it.

What must be gone after each of these is checked by conftest.py around every test; drivers
that are killed or interrupted run in processes of their own.
"""

import contextlib
import errno
import gc
import json
import multiprocessing
import os
import pty
import re
import select
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import conftest
import pytest

import minray
from minray import api, command, exceptions, interrupts, state
from minray.messages import DRIVER, ActorKillRequested
from minray.schema import JOB_STATES
from minray.session import find, read_facts


@minray.remote
def square(x):
    return x * x


@minray.remote
def worker_pid():
    return os.getpid()


def is_alive(pid):
    try:
        return conftest.Process(pid).state not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def wait_until(condition, timeout_s=60):
    """Of other processes' doings there is no event to await."""
    started = time.monotonic()
    while not (value := condition()):
        assert time.monotonic() < started + conftest.within(timeout_s), "it did not come true in time"
        time.sleep(0.005)
    return value


def zygote_children():
    pid = api._core.zygote.pid
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def gcs_pid():
    """The zygote's child that has the database open."""

    def has_database(pid):
        with contextlib.suppress(OSError):
            links = (os.readlink(f"/proc/{pid}/fd/{fd}") for fd in os.listdir(f"/proc/{pid}/fd"))
            return any(link.endswith("gcs.sqlite") for link in links)

    return next(filter(has_database, zygote_children()), None)


# ---------------------------------------------------------------- starting and ending


def test_the_first_call_starts_a_session():
    assert not minray.is_initialized()
    assert minray.get(square.remote(3)) == 9
    assert minray.is_initialized()
    minray.shutdown()
    assert not minray.is_initialized()


def test_a_session_is_a_context_manager_and_a_mapping():
    with minray.init(num_cpus=2) as context:
        assert context["address"] == "local" and len(context["node_id"]) == 32
        assert read_facts(context["session_dir"])["driver"][0] == os.getpid()
        assert minray.cluster_resources()["CPU"] == 2
    assert not minray.is_initialized()


@pytest.mark.one_python
def test_fifty_sessions_in_one_process_leave_nothing():
    started = sum(os.times()[:4])  # CPU time of this process and its children: other load on the machine is none.
    for number in range(50):
        minray.init(num_cpus=1)
        if number % 5 == 0:
            assert minray.get(square.remote(number)) == number**2
        minray.shutdown()
        minray.shutdown()  # A second one does nothing.
    seconds = sum(os.times()[:4]) - started
    assert seconds < 50, f"50 sessions took {seconds:.1f} s of CPU time; 10 to 20 are usual"


def test_init_twice_says_what_to_do_and_changes_nothing(session):
    with pytest.raises(RuntimeError, match=r"a session is running in this process.*ignore_reinit_error=True"):
        minray.init(num_cpus=1)
    again = minray.init(num_cpus=1, ignore_reinit_error=True)
    assert again["session_dir"] == session["session_dir"]
    assert minray.cluster_resources()["CPU"] == 2


def test_an_unknown_option_is_refused_with_the_nearest_one():
    with pytest.raises(TypeError, match=r"init\(\) has no option 'num_cpu'.*num_cpus"):
        minray.init(num_cpu=2)
    with pytest.raises(ValueError, match=r"init\(num_cpus=...\) must be a number, 0 or more, got -1"):
        minray.init(num_cpus=-1)
    assert not minray.is_initialized()


def test_an_address_of_a_cluster_is_refused():
    with pytest.raises(ConnectionError, match="no cluster to connect to"):
        minray.init("head:6379")


def test_options_of_ray_without_a_meaning_here_are_accepted(capfd):
    minray.init("local", num_cpus=1, include_dashboard=False, logging_level="INFO", _system_config={"a": 1})
    minray.shutdown()
    assert "init(_system_config=...) has no effect" in capfd.readouterr().err


@pytest.mark.parametrize("number, told", [(errno.ENOSPC, exceptions.OutOfDiskError), (errno.EIO, OSError)])
def test_an_init_that_fails_leaves_nothing(monkeypatch, number, told):
    def fail(self, offset, size):
        raise OSError(number, "that failed")

    before = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr("minray.object_store.Arena.back", fail)
    with pytest.raises(told, match="that failed"):
        minray.init(num_cpus=1)
    assert not minray.is_initialized() and signal.getsignal(signal.SIGINT) is before


def test_a_zygote_that_cannot_start_is_an_error_and_not_a_hang(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/bin/false")
    minray.init(num_cpus=1)
    try:
        with pytest.raises(RuntimeError, match="zygote.*dies each time"):
            minray.get(square.remote(1))
    finally:
        minray.shutdown()


def test_the_search_path_may_hold_what_is_no_string(monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, Path("/nowhere")])
    with minray.init(num_cpus=1):
        assert minray.get(square.remote(2)) == 4


def test_a_ref_of_an_earlier_session_is_refused_by_name():
    with minray.init(num_cpus=1):
        old = square.remote(1)
        minray.get(old)
    with minray.init(num_cpus=1):
        with pytest.raises(minray.exceptions.ObjectLostError, match=r"since before the last shutdown\(\)"):
            minray.get(old)


def test_arrays_outlive_their_session():
    np = pytest.importorskip("numpy")
    with minray.init(num_cpus=1):
        array = minray.get(minray.put(np.arange(100_000)))
    assert array.sum() == 4999950000


def test_a_thread_that_waits_during_shutdown_is_told():
    never = minray.remote(lambda: time.sleep(600))
    minray.init(num_cpus=1)
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(minray.get, never.remote()) for _ in range(3)]
        wait_until(lambda: len(api._core._requests) == 3)
        minray.shutdown()
        for one in waiting:
            with pytest.raises(RuntimeError, match="shut down while this thread waited"):
                one.result(timeout=60)


# ---------------------------------------------------------------- where drivers come from

TWO_TASKS = """\
import minray

@minray.remote
def square(x):
    return x * x

class Local:
    pass

print(minray.get([square.remote(3), minray.remote(lambda: Local.__name__).remote()]))
"""
PRINTED = "[9, 'Local']\n"


def test_a_script_needs_no_main_guard(run_driver):
    assert run_driver(TWO_TASKS).stdout == PRINTED


@pytest.mark.parametrize("how", ["-c", "stdin"])
def test_a_program_may_come_from_the_command_line_or_stdin(how):
    command = [sys.executable, "-c", TWO_TASKS] if how == "-c" else [sys.executable]
    ended = subprocess.run(command, input=TWO_TASKS, capture_output=True, text=True, timeout=60)
    assert (ended.stdout, ended.stderr, ended.returncode) == (PRINTED, "", 0)


def test_the_repl_on_a_terminal_works_and_greets_with_one_line():
    master, slave = pty.openpty()
    environment = {**os.environ, "PYTHON_BASIC_REPL": "1", "TERM": "dumb"}
    repl = subprocess.Popen(
        [sys.executable, "-q"], stdin=slave, stdout=slave, stderr=slave, start_new_session=True, env=environment
    )
    os.close(slave)
    program = (
        b"import minray; _ = minray.init(num_cpus=1)\n"
        b"@minray.remote\ndef half(x):\n    return x / 2\n\n"
        b"print('result', minray.get(half.remote(5)))\nexit()\n"
    )
    os.write(master, program)
    shown = b""
    with contextlib.suppress(OSError):  # EIO: the terminal's other end is closed.
        while select.select([master], [], [], 20)[0] and (data := os.read(master, 4096)):
            shown += data
    os.close(master)
    assert repl.wait(timeout=60) == 0, shown
    assert b"result 2.5" in shown
    greetings = [line for line in shown.splitlines() if line.lstrip(b"> ").startswith(b"minray ")]
    assert len(greetings) == 1 and b"1 CPUs" in greetings[0], shown


NOTEBOOK = """\
import nbclient, nbformat
cells = [
    "import minray, os, signal, threading, time\\nminray.init(num_cpus=1)\\n"
    "@minray.remote\\ndef f(x):\\n    print('f prints')\\n    return x + 1",
    "minray.get(f.remote(1))",
    "ref = minray.remote(lambda: time.sleep(600)).remote()\\n"
    "threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()\\n"
    "try:\\n    minray.get(ref)\\nexcept KeyboardInterrupt:\\n    print('interrupted')\\n"
    "minray.cancel(ref, force=True)\\nminray.get(f.remote(2))",
    "minray.shutdown()",
]
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
nbclient.NotebookClient(notebook, timeout=60, kernel_name="python3").execute()
for cell in notebook.cells:
    for output in cell.outputs:
        print(output.get("text", "") or output["data"]["text/plain"])
"""


@pytest.mark.notebook
def test_a_notebook_works_prints_and_can_be_interrupted(run_driver, tmp_path):
    for needed in ("nbclient", "nbformat", "ipykernel"):
        pytest.importorskip(needed)
    shown = run_driver(NOTEBOOK, timeout_s=90, cwd=tmp_path).stdout.splitlines()
    assert [line for line in shown if line in ("2", "interrupted", "3")] == ["2", "interrupted", "3"], shown
    assert [line for line in shown if line.startswith("(f pid=") and line.endswith(") f prints")], shown


class Point:
    def __init__(self, x):
        self.x = x


def shifted(point):
    return Point(point.x + 1)


def test_functions_and_classes_of_a_test_module_travel(session):
    point = minray.get(minray.remote(shifted).remote(Point(1)))
    assert type(point) is Point and point.x == 2


def test_workers_have_the_drivers_directory_and_search_path(tmp_path, monkeypatch):
    (tmp_path / "beside_the_driver.py").write_text("answer = 42")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    @minray.remote
    def look():
        import beside_the_driver

        return beside_the_driver.answer, os.getcwd()

    with minray.init(num_cpus=1):
        assert minray.get(look.remote()) == (42, str(tmp_path))


# ---------------------------------------------------------------- threads


def test_a_thread_can_start_use_and_end_a_session():
    def life():
        with minray.init(num_cpus=1):
            return minray.get(square.remote(5))

    with ThreadPoolExecutor(1) as pool:
        assert pool.submit(life).result(timeout=60) == 25


def test_a_thread_that_outlives_the_main_thread_can_start_a_session(run_driver):
    program = """if True:
        import threading
        import minray

        def work(main=threading.current_thread()):
            main.join()
            print(minray.get(minray.remote(lambda: 6).remote()))

        threading.Thread(target=work).start()
    """
    assert run_driver(program).stdout == "6\n"


WITHOUT = """\
import os, subprocess, sys
import minray
for fd in sys.argv[1]:
    os.close(int(fd))
double = minray.remote(lambda x: print("said") or 2 * x)
assert minray.get([double.remote(i) for i in range(20)])[-1] == 38
subprocess.run(["echo", "of no interest to anybody"])
assert minray.get(double.remote(4)) == 8
minray.shutdown()
open("well", "w").close()
"""


@pytest.mark.parametrize("closed", ["012", "0", "1", "2"])
def test_a_driver_without_standard_descriptors_works(run_driver, tmp_path, monkeypatch, closed):
    monkeypatch.chdir(tmp_path)
    with contextlib.suppress(AssertionError):  # The interpreter itself may complain at its end.
        run_driver(WITHOUT, closed)
    assert Path("well").exists()


def test_threads_that_start_at_once_share_one_session():
    barrier = threading.Barrier(4)

    def use(x):
        barrier.wait()
        return minray.get(square.remote(x)), api._core.session.name

    with ThreadPoolExecutor(4) as pool:
        results = list(pool.map(use, range(4)))
    assert [value for value, _ in results] == [0, 1, 4, 9]
    assert len({name for _, name in results}) == 1
    minray.shutdown()


def test_many_threads_submit_and_get_at_once(session):
    def use(x):
        return sum(minray.get([square.remote(x) for _ in range(20)]))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(use, range(40))) == [20 * x * x for x in range(40)]


# ---------------------------------------------------------------- several drivers, forks


def test_two_drivers_at_once_do_not_meet(session, run_driver):
    other = run_driver(TWO_TASKS)
    assert other.stdout == PRINTED and other.stderr == ""
    assert minray.get(square.remote(4)) == 16
    assert os.path.isdir(session["session_dir"])  # The other's sweep has left it alone.


def test_init_in_a_worker_says_that_there_is_a_session(session):
    @minray.remote
    def nested(**options):
        context = minray.init(**options)
        minray.shutdown()  # The session is the driver's to end.
        return context["session_dir"], minray.get(square.remote(2))

    with pytest.raises(RuntimeError, match="this is a worker of a session already"):
        minray.get(nested.remote())
    assert minray.get(nested.remote(ignore_reinit_error=True)) == (session["session_dir"], 4)


def test_a_child_that_the_driver_forks_is_not_part_of_the_session(session):
    receive, send = multiprocessing.Pipe(duplex=False)
    pid = os.fork()
    if not pid:
        status = 1
        with contextlib.suppress(BaseException):
            send.send((minray.is_initialized(), minray.get(square.remote(6)), api._core.session.name))
            minray.shutdown()
            status = 0
        os._exit(status)
    send.close()
    was_initialized, value, name = receive.recv()
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    receive.close()
    assert not was_initialized and value == 36
    assert name != os.path.basename(session["session_dir"])
    assert minray.get(square.remote(7)) == 49


@pytest.mark.filterwarnings("ignore:.*use of fork:DeprecationWarning")
def test_a_forked_child_that_lives_on_does_not_hold_the_session_up():
    minray.init(num_cpus=1)
    minray.get(square.remote(1))
    done = multiprocessing.get_context("fork").Event()
    child = multiprocessing.get_context("fork").Process(target=done.wait)
    child.start()
    started = time.monotonic()
    minray.shutdown()
    assert time.monotonic() - started < conftest.within(1.5)
    done.set()
    child.join(timeout=60)
    assert child.exitcode == 0


# ---------------------------------------------------------------- Ctrl-C

INTERRUPTED = """\
import os, sys, time
import minray

@minray.remote
def pid():
    return os.getpid()

@minray.remote
def wait_for(path):
    while not os.path.exists(path):
        time.sleep(0.01)
    return "done"

minray.init(num_cpus=1)
before = minray.get(pid.remote())
ref = wait_for.remote(sys.argv[1])
print("waiting", flush=True)
try:
    minray.get(ref)
except KeyboardInterrupt:
    print("interrupted", flush=True)
open(sys.argv[1], "w").close()
print(minray.get(ref), minray.get(pid.remote()) == before)
"""


@contextlib.contextmanager
def driver(code, *arguments):
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        yield process
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


def test_ctrl_c_interrupts_get_and_neither_the_workers_nor_the_session(tmp_path):
    with driver(INTERRUPTED, str(tmp_path / "go")) as process:
        assert process.stdout.readline() == "waiting\n"
        assert process.stderr is not None
        time.sleep(0.1)  # Until it blocks: earlier is right too, but it is the wait that is to be interrupted.
        os.killpg(process.pid, signal.SIGINT)  # As a terminal does: to everybody in the foreground.
        output, errors = process.communicate(timeout=60)
    assert (output, errors, process.returncode) == ("interrupted\ndone True\n", "", 0)


def test_ctrl_c_at_any_moment_leaves_the_session_whole(session):
    """Signals from another thread, at moments that nobody has chosen; the tables must stay right."""
    main = threading.main_thread().ident
    deadline = time.monotonic() + 60
    stop = threading.Event()

    def disturb():
        while not stop.wait(0.003) and time.monotonic() < deadline:
            signal.pthread_kill(main, signal.SIGINT)

    def work():
        while True:
            minray.get([square.remote(x) for x in range(30)])
            minray.get(minray.put(b"x" * 100_000))

    def handler(number, frame):
        """The test itself is not made to bear it: only what it tests is interrupted."""
        here = sys._getframe()
        while here is not None and here.f_code is not work.__code__:
            here = here.f_back
        if here is not None:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handler)
    disturber = threading.Thread(target=disturb)
    disturber.start()
    try:
        for _ in range(200):
            with pytest.raises(KeyboardInterrupt):
                work()
    finally:
        stop.set()
        disturber.join()
        interrupts.raise_deferred()
        signal.signal(signal.SIGINT, signal.default_int_handler)
    assert minray.get([square.remote(x) for x in range(50)]) == [x * x for x in range(50)]
    with ThreadPoolExecutor(2) as pool:  # And those who wait in other threads are served.
        assert list(pool.map(lambda x: minray.get(square.remote(x)), range(20))) == [x * x for x in range(20)]


def test_a_ctrl_c_that_had_to_wait_is_raised_in_the_main_thread_only():
    interrupts._deferred.append(lambda: pytest.fail("raised in another thread"))
    try:
        with ThreadPoolExecutor(1) as pool:
            pool.submit(interrupts.raise_deferred).result()
        assert len(interrupts._deferred) == 1
    finally:
        interrupts._deferred.clear()


def test_ctrl_c_is_guarded_too_where_a_handler_was_set_after_init(session):
    def own(number, frame):
        raise ZeroDivisionError

    old = signal.signal(signal.SIGINT, own)
    try:
        assert minray.get(square.remote(2)) == 4
        assert signal.getsignal(signal.SIGINT) is not own
        with pytest.raises(ZeroDivisionError):
            signal.raise_signal(signal.SIGINT)
    finally:
        signal.signal(signal.SIGINT, old)


def test_handlers_that_a_program_sets_and_puts_back_are_the_old_ones_after_shutdown():
    def own(number, frame):
        pass

    before = signal.getsignal(signal.SIGINT)
    with minray.init(num_cpus=1):
        guarded = signal.signal(signal.SIGINT, own)
        assert minray.get(square.remote(2)) == 4
        signal.signal(signal.SIGINT, guarded)
        assert minray.get(square.remote(3)) == 9
    assert signal.getsignal(signal.SIGINT) is before


def test_what_another_handler_raises_waits_for_the_tables_like_ctrl_c(session):
    def give_up(number, frame):
        raise TimeoutError("the alarm")

    old = signal.signal(signal.SIGALRM, give_up)
    try:
        minray.get(square.remote(2))

        @interrupts.uninterruptible
        def change_tables():
            signal.raise_signal(signal.SIGALRM)
            return "whole"

        assert change_tables() == "whole"
        with pytest.raises(TimeoutError, match="the alarm"):
            minray.get(square.remote(3))
        assert minray.get(square.remote(4)) == 16
    finally:
        signal.signal(signal.SIGALRM, old)


def test_a_signal_handler_may_end_the_session_in_the_middle_of_a_get(session, monkeypatch):
    monkeypatch.setattr("minray.loop.CLOSE_S", 600.0)  # Nobody waits for the thread that the handler runs in.
    old = signal.signal(signal.SIGTERM, lambda number, frame: minray.shutdown())
    pid = os.getpid()

    @minray.remote
    def end_the_driver():
        os.kill(pid, signal.SIGTERM)
        time.sleep(600)

    try:
        with pytest.raises(RuntimeError, match="minray was shut down while this thread waited"):
            minray.get(end_the_driver.remote())
        assert not minray.is_initialized()
    finally:
        signal.signal(signal.SIGTERM, old)


def speak_in_the_middle_of(a_change, record):
    """What a finalizer may do that the garbage collector calls while a lock of minray's is held."""
    with a_change:
        ref, put = square.remote(3), minray.put(4)
        refs = [ref, put, square.remote(put), record.remote("one"), record.remote("two")]
        with pytest.raises(RuntimeError, match="in a finalizer"):
            minray.get(ref)
    return minray.get(refs)


def test_what_a_finalizer_says_in_the_middle_of_a_change_follows_it_in_order(session):
    @minray.remote
    class Log:
        def __init__(self):
            self.said = []

        def say(self, word):
            self.said.append(word)
            return list(self.said)

    assert speak_in_the_middle_of(api.core().raylet.lock, Log.remote().say) == [9, 4, 16, ["one"], ["one", "two"]]

    @minray.remote
    def in_a_worker(log):
        return speak_in_the_middle_of(api.core()._out_lock, log.say)

    assert minray.get(in_a_worker.remote(Log.remote())) == [9, 4, 16, ["one"], ["one", "two"]]


def test_finalizers_that_the_garbage_collector_calls_anywhere_may_submit(session):
    class Closing:
        def __init__(self):
            self.me = self

        def __del__(self):
            done.append(square.remote(5))

    done = []
    threshold = gc.get_threshold()
    gc.set_threshold(40)
    try:
        for number in range(50):
            for _ in range(10):
                Closing()
            assert minray.get([square.remote(i) for i in range(number)]) == [i * i for i in range(number)]
    finally:
        gc.set_threshold(*threshold)
    gc.collect()
    assert minray.get(done) == [25] * 500


def test_after_shutdown_the_handler_of_ctrl_c_is_the_old_one():
    before = signal.getsignal(signal.SIGINT)
    with minray.init(num_cpus=1):
        assert signal.getsignal(signal.SIGINT) is not before
    assert signal.getsignal(signal.SIGINT) is before


# ---------------------------------------------------------------- how drivers end

DYING = """\
import json, multiprocessing, os, subprocess, sys, time
import minray

@minray.remote
def busy():
    # Of its own: one in its process group, one that has left it.
    plain = subprocess.Popen(["sleep", "600"])
    left = subprocess.Popen(["sleep", "600"], start_new_session=True)
    print(json.dumps([os.getpid(), plain.pid, left.pid]), file=open(sys_path, "w"), flush=True)
    time.sleep(600)

sys_path = sys.argv[1]
minray.init(num_cpus=2)
minray.get(minray.remote(lambda: None).remote())
ref = busy.remote()
big = minray.put(bytes(1_000_000))
while not os.path.exists(sys_path) or not open(sys_path).read().endswith("\\n"):
    time.sleep(0.01)
core = minray.api._core
END
"""


def facts_of_a_driver(process, path, session_dir):
    wait_until(lambda: path.exists() and path.read_text().endswith("\n"))
    facts = read_facts(session_dir)
    return [facts["zygote"][0], *json.loads(path.read_text())], facts["arena"]


def live_session_of(pid):
    for name in conftest.live_sessions():
        path = os.path.join(os.environ["MINRAY_HOME"], "live", name)
        if (read_facts(path) or {"driver": [0]})["driver"][0] == pid:
            return path
    return None


def check_filed(name, state):
    path = os.path.join(os.environ["MINRAY_HOME"], "finished", name)
    assert os.path.isdir(path) and not os.path.exists(os.path.join(path, "spill"))
    with contextlib.closing(sqlite3.connect(f"file:{path}/gcs.sqlite?mode=ro", uri=True)) as database:
        assert database.execute("PRAGMA integrity_check").fetchone() == ("ok",)
        ((job_state, finished_us),) = database.execute("SELECT state, finished_us FROM jobs")
        # The first task; the second may be too young to have been written.
        assert database.execute("SELECT count(*) FROM tasks").fetchone()[0] >= 1
    assert finished_us is not None
    assert JOB_STATES[job_state] == state


@pytest.mark.parametrize("with_child", [False, True], ids=["alone", "with a forked child that lives on"])
def test_a_driver_killed_by_sigkill_leaves_nothing(tmp_path, with_child):
    end = "print('ready', flush=True)\ntime.sleep(600)"
    if with_child:
        end = (
            "child = multiprocessing.get_context('fork').Process(target=time.sleep, args=(600,))\n"
            "child.start()\nprint('ready', child.pid, flush=True)\ntime.sleep(600)"
        )
    path = tmp_path / "pids"
    with driver(DYING.replace("END", end), str(path)) as process:
        ready = process.stdout.readline().split()
        assert ready[:1] == ["ready"], process.stderr.read()
        session_dir = live_session_of(process.pid)
        pids, arena = facts_of_a_driver(process, path, session_dir)
        assert all(map(is_alive, pids)) and arena in conftest.arenas()
        process.kill()
        wait_until(lambda: not any(map(is_alive, pids)), timeout_s=2.0)
        wait_until(lambda: arena not in conftest.arenas(), timeout_s=3.0)
        wait_until(lambda: not os.path.exists(session_dir))
        if with_child:
            assert is_alive(int(ready[1]))  # It is the driver's, not minray's.
            os.kill(int(ready[1]), signal.SIGKILL)
    check_filed(os.path.basename(session_dir), "FAILED")


@pytest.mark.parametrize(
    "end, status, job_state",
    [
        ("raise KeyError('the end')", 1, "FAILED"),
        ("sys.exit(3)", 3, "FAILED"),
        ("os._exit(4)", 4, "FAILED"),
        ("os.kill(os.getpid(), 15)", -15, "FAILED"),
    ],
)
def test_however_a_driver_ends_nothing_is_left(tmp_path, end, status, job_state):
    path = tmp_path / "pids"
    code = DYING.replace("END", "print(core.session.path, flush=True)\n" + end)
    with driver(code, str(path)) as process:
        session_dir = process.stdout.readline().strip()
        assert session_dir, process.stderr.read()
        assert process.wait(timeout=60) == status
        wait_until(lambda: not os.path.exists(session_dir), timeout_s=3)
        pids = json.loads(path.read_text())
        wait_until(lambda: not any(map(is_alive, pids)), timeout_s=2)
        errors = process.stderr.read()
        assert ("KeyError: 'the end'" in errors) == (status == 1), errors
        assert "Exception ignored" not in errors
    check_filed(os.path.basename(session_dir), job_state)


def test_what_was_recorded_before_sudden_death_is_kept(run_driver, tmp_path):
    """10,000 tasks are on their way to the GCS when the driver ends without a word."""
    ended = run_driver(
        "import minray, os\n"
        "minray.init(num_cpus=2)\n"
        "f = minray.remote(lambda: None)\n"
        "minray.get([f.remote() for _ in range(10_000)])\n"
        "minray.api._core.raylet.flush_now()\n"
        "while minray.api._core.raylet._gcs.backlog: minray.api._core.loop_once()\n"
        "print(minray.api._core.session.name, flush=True)\n"
        "os._exit(0)\n"
    )
    name = ended.stdout.strip()
    path = os.path.join(os.environ["MINRAY_HOME"], "finished", name, "gcs.sqlite")
    wait_until(lambda: os.path.exists(path))
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        assert database.execute("SELECT count(*) FROM tasks WHERE finished_us IS NOT NULL").fetchone() == (10_000,)


# ---------------------------------------------------------------- the session goes on


def test_the_session_goes_on_when_the_zygote_is_killed(session, tmp_path):
    @minray.remote
    def slow(started, go):
        Path(started).touch()
        while not os.path.exists(go):
            time.sleep(0.005)
        return os.getpid()

    old = minray.get(worker_pid.remote())
    zygote = api._core.zygote.pid
    children = wait_until(lambda: gcs_pid() and zygote_children())
    ref = slow.remote(str(tmp_path / "started"), str(tmp_path / "go"))
    wait_until((tmp_path / "started").exists)
    os.kill(zygote, signal.SIGKILL)
    wait_until(lambda: not any(map(is_alive, children)))
    (tmp_path / "go").touch()
    assert minray.get(ref, timeout=60) != old
    assert api._core.zygote.pid != zygote
    assert read_facts(session["session_dir"])["zygote"][0] == api._core.zygote.pid
    with contextlib.closing(sqlite3.connect(api.flush_records())) as database:
        # Neither the job nor the new workers ended with the old zygote.
        assert database.execute("SELECT finished_us FROM jobs").fetchall() == [(None,)]
        assert database.execute("SELECT count(*) FROM workers WHERE died_us IS NULL").fetchone()[0] >= 1
        assert database.execute("SELECT count(*) FROM tasks WHERE finished_us IS NOT NULL").fetchone() == (2,)


@pytest.mark.parametrize("goes_on", [True, False], ids=["goes on", "is killed"])
def test_a_zygote_that_stands_still_holds_nobody(session, goes_on):
    """More is asked of it than the kernel takes for it, and then more actors than there are workers."""

    @minray.remote
    class Adder:
        def add(self, x):
            return x + 1

    assert minray.get(square.remote(2)) == 4
    zygote, nobody = api._core.zygote, 1 << 20
    os.kill(zygote.pid, signal.SIGSTOP)
    with api._core.raylet.lock:
        for _ in range(10_000):
            zygote.kill_worker(nobody)
    assert minray.get(square.remote(3)) == 9
    actors = [Adder.remote() for _ in range(6)]
    refs = [actor.add.remote(1) for actor in actors]
    started = time.monotonic()
    with pytest.raises(minray.exceptions.GetTimeoutError):
        minray.get(refs, timeout=0.1)
    assert time.monotonic() - started < conftest.within(1.0)
    os.kill(zygote.pid, signal.SIGCONT if goes_on else signal.SIGKILL)
    assert minray.get(refs, timeout=60) == [2] * 6


def test_the_session_goes_on_when_the_gcs_is_killed(session):
    assert minray.get(square.remote(2)) == 4
    api.flush_records()
    killed = gcs_pid()
    os.kill(killed, signal.SIGKILL)
    refs = [square.remote(x) for x in range(100)]
    assert minray.get(refs) == [x * x for x in range(100)]
    started = time.monotonic()
    path = api.flush_records()
    assert time.monotonic() - started < conftest.within(1.0)  # P6
    assert gcs_pid() not in (None, killed)
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM tasks WHERE finished_us IS NOT NULL").fetchone() == (101,)
        assert database.execute("SELECT finished_us FROM jobs").fetchall() == [(None,)]


def test_a_killed_idle_worker_is_replaced(session):
    pid = minray.get(worker_pid.remote())
    os.kill(pid, signal.SIGKILL)
    assert minray.get(square.remote(3), timeout=60) == 9


# ---------------------------------------------------------------- output


def test_what_workers_print_appears_with_their_names(run_driver):
    ended = run_driver(
        "import minray, sys\n"
        "@minray.remote\n"
        "def speak():\n"
        "    print('to stdout')\n"
        "    print('to stderr', file=sys.stderr)\n"
        "@minray.remote\n"
        "class Parrot:\n"
        "    def say(self):\n"
        "        print('an actor')\n"
        "minray.init(num_cpus=1)\n"
        "minray.get(speak.remote())\n"
        "parrot = Parrot.remote()\n"
        "minray.get(parrot.say.remote())\n"
        "minray.shutdown()\n"  # At once: what was printed before is not lost.
    )
    assert len(ended.stdout.splitlines()) == 2 and len(ended.stderr.splitlines()) == 1, (ended.stdout, ended.stderr)
    assert "to stdout" in ended.stdout.splitlines()[0] and ended.stdout.startswith("(speak pid=")
    assert "(Parrot pid=" in ended.stdout and ") an actor" in ended.stdout
    assert ended.stderr.startswith("(speak pid=") and ended.stderr.endswith(") to stderr\n")


def test_output_has_the_name_of_its_task_however_late_it_is_shown(capfd):
    def speak(number):
        print("speaks", number)

    def shout(number):
        print("shouts", number)

    both = [minray.remote(speak), minray.remote(shout)]
    with minray.init(num_cpus=1):
        minray.get([task.remote(number) for number in range(30) for task in both])
    lines = capfd.readouterr().out.splitlines()
    assert len(lines) == 60
    assert all(line.startswith(("(speak pid=", "(shout pid=")) for line in lines)
    assert not [line for line in lines if ("(speak" in line) != ("speaks" in line)]


def test_an_unfinished_line_is_shown_when_its_worker_has_ended(capfd):
    @minray.remote(max_retries=0)
    def ends():
        print("half a line", end="", flush=True)
        os._exit(3)

    with minray.init(num_cpus=1):
        with pytest.raises(exceptions.WorkerCrashedError):
            minray.get(ends.remote())
        # What it said comes before the news of its death, and both in one round of the node's loop.
        minray.get(minray.remote(lambda: None).remote())
        assert re.search(r"^\(ends pid=\d+\) half a line$", capfd.readouterr().out, re.MULTILINE)


def test_output_is_not_shown_again_by_the_next_session(capfd):
    speak = minray.remote(lambda: print("once"))
    for _ in range(2):
        with minray.init(num_cpus=1):
            minray.get(speak.remote())
    assert capfd.readouterr().out.count("once") == 2


def test_output_can_be_kept_from_the_driver_and_is_in_the_log(capfd):
    with minray.init(num_cpus=1, log_to_driver=False) as context:
        minray.get(minray.remote(lambda: print("quiet")).remote())
    logs = Path(find(os.path.basename(context["session_dir"]))) / "logs"
    assert "quiet" in "".join(log.read_text() for log in logs.iterdir())
    assert "quiet" not in capfd.readouterr().out


# ---------------------------------------------------------------- the check itself


def test_the_check_after_each_test_finds_what_is_left():
    before = conftest.Inventory()
    process = subprocess.Popen(["sleep", "600"])
    file = open("/dev/null")
    stop = threading.Event()
    thread = threading.Thread(target=stop.wait)
    thread.start()
    name = Path("/dev/shm/minray-left-behind")
    name.touch()
    directory = Path(os.environ["MINRAY_HOME"]) / "live" / "left-behind"
    directory.mkdir(parents=True)
    try:
        kinds = sorted(kind for kind, _ in before.leaks())
        assert kinds == ["file descriptor", "live session", "process", "shared memory", "thread"]
    finally:
        directory.rmdir()
        name.unlink()
        stop.set()
        thread.join()
        file.close()
        process.kill()
        process.wait()
    assert before.leaks() == []


@pytest.mark.parametrize(
    ("option", "words"),
    [
        ({"object_store_memory": 10}, "at least"),
        ({"namespace": 5}, "string"),
        ({"log_to_driver": 3}, "True or False"),
        ({"policy": 3}, "Policy"),
    ],
)
def test_an_option_of_the_wrong_kind_is_refused_before_anything_starts(option: dict, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        minray.init(**option)
    assert not minray.is_initialized()


def test_an_answer_of_an_actor_that_was_given_up_is_discarded_and_counted(session, tmp_path, capsys):
    """The actor is killed when the answer has been sent, and not yet been read."""

    @minray.remote
    class Reader:
        def read(self, path):
            with open(path) as file:
                return file.read()

    os.mkfifo(tmp_path / "fifo")
    reader = Reader.remote()
    answer = reader.read.remote(str(tmp_path / "fifo"))
    raylet = api.core().raylet
    with open(tmp_path / "fifo", "w") as fifo:  # It opens when the method has opened it, too.
        with raylet.lock:  # From here on the node hears nobody.
            fifo.write("an answer")
            fifo.close()
            (worker,) = [worker for worker in raylet.node.scheduler.workers.values() if worker.actor is not None]
            sent = select.poll()
            sent.register(raylet._channels[worker.client].fd, select.POLLIN)
            assert sent.poll(1000 * conftest.within(60)), "it has sent nothing"
            raylet._handle(ActorKillRequested(DRIVER, worker.actor.actor_id, True))
    with pytest.raises(exceptions.ActorDiedError):
        minray.get(answer, timeout=60)
    (event,) = wait_until(lambda: state.list_events(filters=[("kind", "=", "late_result")]))
    assert event.subject == answer.hex()
    assert event.message == f"worker {worker.client} had been given up; its result was discarded (1 so far)"
    assert command.main(["status"]) == 0
    assert "late     1 discarded" in capsys.readouterr().out
