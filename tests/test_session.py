"""Sessions on disk: made privately, moved when they end, swept when nobody is left who could have done so."""

import json
import os
import subprocess
import sys
import time

import pytest

from minray import session
from minray.object_store import Arena
from minray.session import KEEP_FINISHED, Session, find, finish_session, identify, is_alive, open_root, sweep


@pytest.fixture
def root(tmp_path):
    return str(tmp_path / "minray")


@pytest.fixture
def dead():
    """A process, as `identify` names it, that is no more."""
    process = subprocess.Popen(["sleep", "60"])
    identity = identify(process.pid)
    assert is_alive(identity)
    process.kill()
    process.wait()
    return identity


def names(root, kind):
    return sorted(os.listdir(os.path.join(root, kind)))


def test_a_session_is_private_and_says_who_runs_it(root):
    old = os.umask(0)
    try:
        made = Session.create(root)
    finally:
        os.umask(old)
    assert os.path.dirname(made.path) == os.path.join(root, "live")
    stamp, clock, pid, digits = made.name.split("-")
    assert (len(stamp), len(clock), int(pid), len(digits)) == (8, 6, os.getpid(), 4)
    assert sorted(os.listdir(made.path)) == ["logs", "session.json", "spill"]
    for directory in (root, os.path.dirname(made.path), made.path, made.path + "/logs", made.path + "/spill"):
        assert os.stat(directory).st_mode & 0o777 == 0o700
    assert os.stat(made.path + "/session.json").st_mode & 0o777 == 0o600
    with open(made.path + "/session.json") as file:
        facts = json.load(file)
    assert facts == made.facts
    assert facts["driver"][0] == os.getpid() and facts["uid"] == os.geteuid() and facts["arena"] is None
    assert abs(facts["started_us"] / 1e6 - time.time()) < 60


def test_what_is_noted_later_is_on_disk_at_once(root):
    made = Session.create(root)
    made.note(arena="minray-xyz", zygote=identify(1))
    assert session.read_facts(made.path) == made.facts
    assert made.facts["arena"] == "minray-xyz" and made.facts["zygote"][0] == 1


def test_a_finished_session_keeps_its_records_and_loses_its_arena_and_what_was_spilled(root):
    made = Session.create(root)
    name = "minray-test-" + os.urandom(8).hex()
    made.note(arena=name)
    arena = Arena.create(name, 4096)
    arena.close()
    for file in ("gcs.sqlite", "logs/worker.log", "spill/object"):
        open(os.path.join(made.path, file), "w").close()
    path = made.finish()
    assert path == os.path.join(root, "finished", made.name)
    assert sorted(os.listdir(path)) == ["gcs.sqlite", "logs", "session.json"]
    assert os.listdir(path + "/logs") == ["worker.log"]
    assert names(root, "live") == []
    with pytest.raises(FileNotFoundError):
        Arena.attach(name)
    assert finish_session(made.path, name) == path, "the janitor may come second"
    assert os.path.exists(path + "/gcs.sqlite")


def test_only_the_newest_finished_sessions_are_kept(root):
    finished = [Session.create(root) for _ in range(KEEP_FINISHED + 3)]
    for made in reversed(finished):
        made.finish()
    assert names(root, "finished") == sorted(made.name for made in finished[3:])


def test_the_newest_live_session_is_found_else_the_newest_finished(root):
    assert find(root=root) is None
    first, second, third = [Session.create(root) for _ in range(3)]
    assert find(root=root) == third.path
    finished = third.finish()
    assert find(root=root) == second.path
    assert find(third.name, root) == find(third.name[-9:], root) == finished
    assert find(first.path, root) == first.path
    assert find("no such session", root) is None
    with open(os.path.join(first.path, "gcs.sqlite"), "w"):  # The second is just starting.
        assert find(root=root, with_file="gcs.sqlite") == first.path
    first.finish()
    second.finish()
    assert find(root=root) == finished


def test_sweep_finishes_a_session_only_when_its_driver_and_its_zygote_are_both_dead(root, dead):
    running, orphaned, abandoned = [Session.create(root) for _ in range(3)]
    orphaned.note(driver=dead, zygote=identify(os.getpid()))
    abandoned.note(driver=dead, zygote=dead, arena=root + "/arena")
    Arena.create(root + "/arena", 4096).close()
    assert sweep(root) == [abandoned.name]
    assert names(root, "live") == sorted([running.name, orphaned.name])
    assert names(root, "finished") == [abandoned.name]
    assert not os.path.exists(root + "/arena")
    assert sweep(root) == []


def test_a_driver_that_died_before_it_had_a_zygote_is_swept(root, dead):
    made = Session.create(root)
    made.note(driver=dead)
    assert sweep(root) == [made.name]


def test_a_pid_that_another_process_has_now_is_not_the_driver(root):
    made = Session.create(root)
    made.note(driver=[os.getpid(), made.facts["driver"][1] - 1])
    assert sweep(root) == [made.name]


def test_after_a_reboot_no_session_is_alive(root):
    made = Session.create(root)
    made.note(boot_id="another")
    assert sweep(root) == [made.name]


def test_a_session_of_another_container_is_left_alone(root, dead):
    made = Session.create(root)
    made.note(driver=dead, pid_namespace="pid:[1]")
    assert sweep(root) == []


def test_a_session_in_the_making_is_left_alone_for_a_minute(root):
    open_root(root)
    path = os.path.join(root, "live", "20250131-094502-1-abcd")
    os.mkdir(path)
    open(path + "/session.json", "w").close()
    assert sweep(root) == []
    long_ago = time.time() - 1000
    os.utime(path, (long_ago, long_ago))
    assert sweep(root) == [os.path.basename(path)]


@pytest.mark.skipif(not os.path.exists("/proc/self/stat"), reason="needs /proc")
def test_a_zombie_is_dead():
    pid = os.fork()
    if pid == 0:
        os._exit(0)
    os.waitid(os.P_PID, pid, os.WEXITED | os.WNOWAIT)
    assert os.path.exists(f"/proc/{pid}")
    assert identify(pid) == [pid, 0] and not is_alive(identify(pid))
    os.waitpid(pid, 0)


@pytest.mark.skipif(sys.platform != "linux", reason="process names are told differently")
def test_a_process_name_with_parentheses_and_spaces_is_no_obstacle(tmp_path):
    os.symlink("/bin/sleep", tmp_path / "a) Z (b")
    process = subprocess.Popen([tmp_path / "a) Z (b", "60"])
    identity = identify(process.pid)
    assert is_alive(identity) and identity[1] > 1
    process.kill()
    process.wait()
    assert not is_alive(identity)


def test_a_driver_killed_by_sigkill_is_swept_by_the_next(root):
    code = "import os, signal; from minray.session import Session\n"
    code += f"print(Session.create({root!r}).name, flush=True); os.kill(os.getpid(), signal.SIGKILL)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == -9
    assert sweep(root) == [done.stdout.strip()]


def refuse(root):
    with pytest.raises(PermissionError, match="MINRAY_HOME") as caught:
        Session.create(root)
    return str(caught.value)


def test_a_root_that_is_a_symlink_or_a_file_is_refused(root, tmp_path):
    os.symlink(tmp_path, root)
    assert "is not a directory" in refuse(root)
    os.unlink(root)
    open(root, "w").close()
    assert "is not a directory" in refuse(root)


def test_a_root_that_others_can_write_to_is_refused(root):
    for spoiled in (root, root + "/live"):
        open_root(root)
        os.chmod(spoiled, 0o777)
        assert "its mode is 777" in refuse(root)
        os.chmod(spoiled, 0o700)
    os.chmod(root, 0o755)
    Session.create(root)


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give directories away")
def test_a_root_that_another_user_made_first_is_refused(root):
    os.mkdir(root, 0o700)
    os.chown(root, 12345, -1)
    assert "belongs to user 12345" in refuse(root)


def test_the_root_is_minray_home_or_in_the_temporary_directory(tmp_path, monkeypatch):
    monkeypatch.setenv("MINRAY_HOME", str(tmp_path / "deep" / "home"))
    assert Session.create().path.startswith(str(tmp_path / "deep" / "home" / "live"))
    monkeypatch.delenv("MINRAY_HOME")
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    assert Session.create().path.startswith(str(tmp_path / f"minray-{os.geteuid()}" / "live"))
