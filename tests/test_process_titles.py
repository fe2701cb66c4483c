"""What `ps` shows of minray's processes."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import minray
from minray import exceptions

pytestmark = pytest.mark.skipif(not sys.platform.startswith("linux"), reason="titles are Linux's")


def title_of(pid):
    """(comm, command line)"""
    return Path(f"/proc/{pid}/comm").read_text().rstrip("\n"), Path(f"/proc/{pid}/cmdline").read_text().rstrip("\0")


def await_title(pid, expected):
    """A process takes its title on in its own time; the kernel tells nobody when."""
    deadline = time.monotonic() + 20
    while title_of(pid) != (expected[:15], expected):
        assert time.monotonic() < deadline, f"{pid} is called {title_of(pid)}, not {expected}"
        time.sleep(0.005)


@minray.remote
def until_it_exists(path, pid_path):
    Path(pid_path + ".tmp").write_text(str(os.getpid()))
    os.rename(pid_path + ".tmp", pid_path)
    while not os.path.exists(path):
        time.sleep(0.005)


@minray.remote
class Painter:
    def __init__(self, wait_s=0.0):
        time.sleep(wait_s)

    def pid(self):
        return os.getpid()

    def nap(self):
        time.sleep(0.15)


def pid_in(path):
    while not path.exists():
        time.sleep(0.005)
    return int(path.read_text())


def test_a_worker_is_called_after_what_it_runs_and_idle_otherwise(session, tmp_path):
    for name, task in (("until_it_exists", until_it_exists), ("chosen", until_it_exists.options(name="chosen"))):
        go, pid_path = tmp_path / f"{name}.go", tmp_path / f"{name}.pid"
        ref = task.remote(str(go), str(pid_path))
        pid = pid_in(pid_path)
        await_title(pid, f"minray::{name}")
        go.touch()
        minray.get(ref)
        await_title(pid, "minray::IDLE")


def test_one_long_task_after_another_has_its_title(tmp_path):
    """They are handed over together, so the worker is never idle in between."""
    with minray.init(num_cpus=1):
        names = ("first", "second", "third")
        refs = [
            until_it_exists.options(name=name).remote(str(tmp_path / f"{name}.go"), str(tmp_path / f"{name}.pid"))
            for name in names
        ]
        for name in names:
            await_title(pid_in(tmp_path / f"{name}.pid"), f"minray::{name}")
            (tmp_path / f"{name}.go").touch()
        minray.get(refs)


def test_a_task_that_waits_for_another_is_called_by_its_name_as_well(session, tmp_path):
    @minray.remote
    def waits(path, pid_path, other):
        Path(pid_path + ".tmp").write_text(str(os.getpid()))
        os.rename(pid_path + ".tmp", pid_path)
        minray.get(until_it_exists.remote(path, other))

    ref = waits.remote(str(tmp_path / "go"), str(tmp_path / "pid"), str(tmp_path / "other"))
    await_title(pid_in(tmp_path / "pid"), "minray::waits")
    (tmp_path / "go").touch()
    minray.get(ref)


@pytest.mark.parametrize("wait_s", [0.0, 0.2])
def test_an_actors_process_is_called_after_its_class_for_as_long_as_it_lives(session, wait_s):
    painter = Painter.remote(wait_s)
    pid = minray.get(painter.pid.remote())
    for _ in range(2):
        assert title_of(pid) == ("minray::Painter", "minray::Painter")
        minray.get(painter.nap.remote())


def test_the_zygote_and_the_gcs_are_called_what_they_are(session):
    zygote = minray.api.core().zygote.pid
    await_title(zygote, "minray::zygote")
    minray.get(minray.remote(lambda: None).remote())  # The GCS is forked before any worker.
    await_title(Path(f"/proc/{zygote}/task/{zygote}/children").read_text().split()[0], "minray::gcs")
    shown = subprocess.check_output(["ps", "-o", "args=", "-p", str(zygote)], text=True) if has_ps() else "minray::zygote"
    assert shown.strip() == "minray::zygote"


def has_ps():
    return any(os.access(os.path.join(directory, "ps"), os.X_OK) for directory in os.environ["PATH"].split(os.pathsep))


def test_a_prefix_of_ones_own(monkeypatch):
    monkeypatch.setattr(exceptions, "name_prefix", "ray")
    with minray.init(num_cpus=1):
        painter = Painter.remote()  # Kept: without a handle it would end.
        assert title_of(minray.get(painter.pid.remote()))[1] == "ray::Painter"


@pytest.mark.parametrize("name", ["", "ü" * 3000, "a\nb\0c", "\udcff", "x" * 100_000])
def test_any_name_is_cut_to_size_and_harms_nobody(name):
    code = (
        "import os, sys; from minray import process_title as t; t.begin(); t.show(eval(sys.argv[1]));"
        "print(len(sys.argv), ascii(open('/proc/self/comm').read()), len(open('/proc/self/cmdline', 'rb').read()) > 20)"
    )
    short = ascii(name) if len(name) < 2000 else f"{name[0]!r} * {len(name)}"
    out = subprocess.run([sys.executable, "-c", code, short], capture_output=True, text=True, check=True).stdout
    assert out.startswith("2 'minray::") and out.endswith("True\n"), out


def test_where_the_kernel_does_not_let_it_titles_stay_as_they_are(monkeypatch):
    code = (
        "from minray import process_title as t\n"
        "def refuse(*args, **more): raise OSError('no')\n"
        "t.open = refuse\n"
        "t.begin(); assert t._arguments is None; t.show('x')\n"
        "print(open('/proc/self/cmdline').read().count('refuse') > 0)"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "True\n"


def test_short_tasks_cost_no_title(session):
    """They end before anybody looks: their worker is never called after them."""
    @minray.remote
    def short():
        return Path("/proc/self/comm").read_text()

    seen = [title for _ in range(20) for title in minray.get([short.remote() for _ in range(20)])]
    assert seen.count("minray::IDLE\n") > 380, "a few may have stood still, on a machine that has other things to do"


def test_a_killed_actor_leaves_no_title_behind(session):
    painter = Painter.options(max_restarts=1, max_task_retries=1).remote()
    os.kill(minray.get(painter.pid.remote()), signal.SIGKILL)
    assert title_of(minray.get(painter.pid.remote()))[1] == "minray::Painter"
