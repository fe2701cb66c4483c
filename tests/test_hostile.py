"""Tasks that misbehave: the worker is replaced or put right, the neighbours and the driver do not notice."""

import contextlib
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import conftest
import pytest

import minray
from minray import exceptions


@pytest.fixture
def one_worker():
    """One CPU: what a task does to its worker, the next task would feel."""
    with minray.init(num_cpus=1) as context:
        yield context


@minray.remote
def healthy():
    """Uses what a hostile predecessor may have broken."""
    print("printing works")
    with open("/dev/null") as file:
        assert file.fileno() > 2, "a file took the number of a standard stream"
    subprocess.run(["true"], check=True)
    return os.getpid()


@minray.remote
def do(function):
    return function()


def test_os_exit_0_is_a_crash_like_any_other(one_worker):
    with pytest.raises(exceptions.WorkerCrashedError, match="exited with status 0"):
        minray.get(do.options(max_retries=0).remote(lambda: os._exit(0)), timeout=60)
    assert minray.get(healthy.remote(), timeout=60)


@pytest.mark.parametrize("leave", [lambda: sys.exit(0), lambda: exec("raise KeyboardInterrupt")])
def test_sys_exit_and_keyboard_interrupt_are_the_tasks_own_errors(one_worker, leave):
    before = minray.get(healthy.remote())
    with pytest.raises(exceptions.RayTaskError):
        minray.get(do.remote(leave), timeout=60)
    assert minray.get(healthy.remote(), timeout=60) == before


def test_closing_every_descriptor_from_0_to_20_harms_nobody_else(one_worker):
    def close():
        for fd in range(21):
            with contextlib.suppress(OSError):
                os.close(fd)
        return "closed"

    assert minray.get(do.remote(close), timeout=60) == "closed"
    assert minray.get([healthy.remote() for _ in range(3)], timeout=60)
    assert minray.get(do.remote(lambda: os.closerange(0, 21)), timeout=60) is None
    assert minray.get(healthy.remote(), timeout=60)


def test_a_task_may_redirect_or_close_its_standard_output(one_worker, capfd):
    def redirect():
        sys.stdout = open(os.devnull, "w")
        os.dup2(sys.stdout.fileno(), 1)

    minray.get(do.remote(redirect), timeout=60)
    minray.get(do.remote(lambda: sys.stdout.close()), timeout=60)
    minray.get(do.remote(lambda: print("heard again")), timeout=60)
    minray.shutdown()
    assert "heard again" in capfd.readouterr().out


def test_a_change_of_directory_ends_with_the_task(one_worker, tmp_path):
    there = minray.get(do.remote(os.getcwd))
    assert there == os.getcwd()
    minray.get(do.remote(lambda: os.chdir(tmp_path)))
    assert minray.get(do.remote(os.getcwd)) == there
    with pytest.raises(ZeroDivisionError):
        minray.get(do.remote(lambda: (os.chdir("/"), 1 / 0)))
    assert minray.get(do.remote(os.getcwd)) == there


def test_a_child_that_a_task_forks_ends_where_the_task_ends(one_worker):
    def fork():
        if os.fork() == 0:
            return "from the child"
        os.wait()
        return "from the parent"

    assert minray.get(do.remote(fork), timeout=60) == "from the parent"
    assert minray.get([do.remote(fork) for _ in range(3)], timeout=60) == ["from the parent"] * 3


def test_a_forked_child_that_raises_or_exits_does_not_speak_for_its_parent(one_worker):
    def fork(how):
        if os.fork() == 0:
            if how == "raise":
                raise ValueError("only in the child")
            sys.exit(3)
        os.wait()
        return how

    assert minray.get(do.remote(lambda: fork("raise")), timeout=60) == "raise"
    assert minray.get(do.remote(lambda: fork("exit")), timeout=60) == "exit"


def test_tasks_may_use_multiprocessing_and_subprocesses(one_worker):
    def pool():
        with multiprocessing.get_context("fork").Pool(2) as workers:
            return workers.map(abs, [-1, -2])

    def command():
        return subprocess.run([sys.executable, "-c", "print(6 * 7)"], capture_output=True, text=True).stdout

    assert minray.get(do.remote(pool), timeout=60) == [1, 2]
    assert minray.get(do.remote(command), timeout=60) == "42\n"


def test_threads_that_a_task_leaves_behind_may_use_minray(one_worker):
    def leave():
        def later():
            found.append(minray.get(minray.put(5)))

        found = []
        thread = threading.Thread(target=later)
        thread.start()
        thread.join()
        return found

    assert minray.get(do.remote(leave), timeout=60) == [5]


@pytest.mark.parametrize("hundreds", [1, pytest.param(10, marks=[pytest.mark.long, pytest.mark.timeout(660)])])
def test_a_task_that_prints_100_mb_or_1_gb_is_done_soon_and_the_driver_stays_small(run_driver, hundreds):
    program = f"""
import minray, resource, sys, time

@minray.remote
def shout():
    line = "x" * 99 + "\\n"
    for _ in range({1000 * hundreds}):
        sys.stdout.write(line * 500)
    for _ in range({hundreds}):
        sys.stdout.write("y" * 50_000_000)   # One endless line.
    return "done"

minray.init(num_cpus=1)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
print(minray.get(shout.remote(), timeout={60 * hundreds}), file=sys.stderr)
minray.shutdown()
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
print("grown", grown // 1024, file=sys.stderr)
"""
    ended = run_driver(program, timeout_s=60 * hundreds + 30)
    assert "done" in ended.stderr
    assert len(ended.stdout) < 5_000_000 * hundreds  # A share of what is said in each second.
    assert int(ended.stderr.rpartition("grown")[2]) < 50


@pytest.mark.parametrize("exponent", [3_000_000, pytest.param(15_000_000, marks=pytest.mark.long)])
def test_a_task_that_holds_the_gil_for_seconds_is_never_declared_dead_and_the_others_go_on(session, tmp_path, exponent):
    """One computation in C: that worker neither hears nor speaks, and what it had been handed goes to the other."""

    @minray.remote
    def holds():
        with open(tmp_path / "pids", "a") as file:
            file.write(f"{os.getpid()}\n")
        pow(7, exponent)
        return os.getpid(), time.monotonic()

    @minray.remote
    def double(x):
        return 2 * x

    long = holds.remote()
    assert minray.get([double.remote(x) for x in range(50)]) == [2 * x for x in range(50)]
    others_ended_s = time.monotonic()
    pid, ended_s = minray.get(long)
    assert others_ended_s < ended_s
    assert (tmp_path / "pids").read_text() == f"{pid}\n"  # One attempt.
    assert not {event.kind for event in minray.state.list_events()} & {"worker_died", "task_retried"}


def test_signals_that_a_task_ignores_do_not_stop_the_session_from_ending(one_worker):
    def ignore():
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_IGN)

    minray.get(do.remote(ignore), timeout=60)
    begun = time.monotonic()
    minray.shutdown()
    assert time.monotonic() - begun < conftest.within(3)


def test_a_handler_of_sigint_that_a_task_sets_does_not_break_cancelling_the_next(one_worker, tmp_path):
    minray.get(do.remote(lambda: signal.signal(signal.SIGINT, signal.SIG_IGN) and None), timeout=60)
    path = str(tmp_path / "begun")

    def sleep():
        open(path, "w").close()
        time.sleep(60)

    ref = do.remote(sleep)
    deadline = time.monotonic() + 10
    while not os.path.exists(path) and time.monotonic() < deadline:
        time.sleep(0.001)
    minray.cancel(ref)
    with pytest.raises(exceptions.TaskCancelledError):
        minray.get(ref, timeout=60)


def test_a_task_may_recurse_too_deeply(one_worker):
    def recurse():
        return recurse()

    with pytest.raises(RecursionError):
        minray.get(do.remote(recurse), timeout=60)
    assert minray.get(healthy.remote(), timeout=60)


def test_a_result_of_many_megabytes_of_error_text_is_cut(one_worker):
    def shout():
        raise ValueError("x" * 20_000_000)

    with pytest.raises(ValueError) as caught:
        minray.get(do.remote(shout), timeout=60)
    assert len(str(caught.value)) < 200_000


def test_init_and_shutdown_inside_a_task_say_what_is_the_matter(one_worker):
    with pytest.raises(RuntimeError, match="this is a worker of a session already"):
        minray.get(do.remote(lambda: minray.init()), timeout=60)
    assert minray.get(do.remote(lambda: minray.shutdown()), timeout=60) is None
    assert minray.get(healthy.remote(), timeout=60)


def test_changing_what_the_standard_library_is_made_of_stays_in_that_worker(one_worker):
    assert minray.get(do.remote(lambda: setattr(time, "time", lambda: "noon")), timeout=60) is None
    assert isinstance(time.time(), float)
