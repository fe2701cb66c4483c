"""Packages for a runtime environment: one virtual environment for each set of requirements, made once.

Owns `<root>/environments/`, next to the sessions, because an installation takes seconds and a program is run again
and again::

    <key>/          the virtual environment; usable once `.complete` is in it
    <key>.lock      locked by whoever makes it (exclusively) or uses it (shared); files stay, they are empty
    <key>.log       what pip said last

The key is a hash of the requirements, the Python and the packages that it starts from.  The newest ten are kept, and
any that is in use.

Each is made with the driver's packages in view, so what is installed already is not installed again.  A worker does not
start the environment's Python: it is a fork of the zygote that puts the environment's packages on its path
(worker_environment.py).

The lock is held by the kernel for a file that pip inherits: should its worker be killed, nobody touches
the half-made environment before pip has ended as well; then it is made anew.  pip ends with whoever installs, however
that one ends, and so do the builds that it has started: a guard (`_GUARD`) is the first of their process group.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from typing import Any

from minray.exceptions import RuntimeEnvSetupError

KEEP = 10
COMPLETE = ".complete"
FAILURE_KEPT_S = 30
"""Others that want the same meanwhile are told the same, and do not try again."""
LAST_LINES = 12
"""So many of pip's go into the error."""
_GUARD = """
import os, signal, sys
def end(*_):
    os.killpg(0, signal.SIGKILL)
signal.signal(signal.SIGTERM, end)
try:
    import ctypes
    ctypes.CDLL(None).prctl(1, signal.SIGTERM, 0, 0, 0)  # PR_SET_PDEATHSIG
except (ImportError, AttributeError, OSError):
    pass  # Not Linux.
if os.getppid() != int(sys.argv[1]):
    end()  # It has died before the line above.
_, status = os.waitpid(os.spawnv(os.P_NOWAIT, sys.argv[2], sys.argv[2:]), 0)
code = os.waitstatus_to_exitcode(status)
os._exit(code if code >= 0 else 128 - code)
"""
"""Runs a command, and kills it and its process group when the thread that wants it ends: that one waits for it.

A program of its own, because nothing but exec is safe between a fork and an exec where other threads are."""


def prepared(pip: Mapping[str, Any], session_path: str, store: str, timeout_s: float | None) -> tuple[str, int]:
    """The environment with these packages: its path, and a descriptor that keeps it until it is closed.

    Raises RuntimeEnvSetupError with pip's last lines; within `FAILURE_KEPT_S` the same again without a new attempt."""
    root = os.path.join(os.path.dirname(os.path.dirname(session_path)), "environments")
    os.makedirs(root, mode=0o700, exist_ok=True)
    path = os.path.join(root, _key(pip, store))
    failure = os.path.join(store, os.path.basename(path) + ".failed")
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        while not _is_used(path, lock):
            if not _is_locked(lock, fcntl.LOCK_EX):  # Somebody makes it, or removes it.
                _wait_a_little(deadline, timeout_s)
            elif not os.path.exists(os.path.join(path, COMPLETE)):
                _raise_known(failure)
                try:
                    _make(path, pip, lock, deadline, timeout_s)
                except RuntimeEnvSetupError as error:
                    _note(failure, str(error))
                    raise
                _prune(root, path)
        with suppress(OSError):
            os.utime(path)  # Used now: the newest are kept.
        return path, lock
    except BaseException:
        os.close(lock)
        raise


def _key(pip: Mapping[str, Any], store: str) -> str:
    # Without the session's path: a snapshot's name tells its contents.
    facts = json.dumps(pip, sort_keys=True).replace(store, "")
    return hashlib.blake2b(f"{facts}\0{sys.version}\0{sys.prefix}\0{_parents()}".encode(), digest_size=10).hexdigest()


def _parents() -> list[str]:
    """Where the driver's own packages lie."""
    return [entry for entry in sys.path if is_for_packages(entry)]


def is_for_packages(entry: str) -> bool:
    return os.path.basename(entry.rstrip(os.sep)) in ("site-packages", "dist-packages")


def site_packages(path: str) -> str:
    return os.path.join(path, "lib", f"python{sys.version_info[0]}.{sys.version_info[1]}", "site-packages")


def _is_used(path: str, lock: int) -> bool:
    """Whether it is complete, and stays so as long as the lock is held, shared with others."""
    complete = os.path.join(path, COMPLETE)
    return os.path.exists(complete) and _is_locked(lock, fcntl.LOCK_SH) and os.path.exists(complete)


def _is_locked(lock: int, kind: int) -> bool:
    """Lock it if that can be done now; else let go of it: two that keep a shared lock would wait for each other."""
    try:
        fcntl.flock(lock, kind | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_UN)
        return False
    return True


def _wait_a_little(deadline: float | None, timeout_s: float | None) -> None:
    if deadline is not None and time.monotonic() > deadline:
        raise RuntimeEnvSetupError(
            f"another process has been installing the same packages for more than {timeout_s:g} s"
        )
    time.sleep(0.05)


def _raise_known(failure: str) -> None:
    with suppress(OSError):
        if time.time() - os.stat(failure).st_mtime < FAILURE_KEPT_S:
            with open(failure, encoding="utf-8") as file:
                raise RuntimeEnvSetupError(file.read())


def _note(failure: str, text: str) -> None:
    with suppress(OSError):
        os.makedirs(os.path.dirname(failure), mode=0o700, exist_ok=True)
        with open(failure, "w", encoding="utf-8") as file:
            file.write(text)


def _make(path: str, pip: Mapping[str, Any], lock: int, deadline: float | None, timeout_s: float | None) -> None:
    import venv

    shutil.rmtree(path, ignore_errors=True)
    python = os.path.join(path, "bin", "python")
    packages: Sequence[str] = pip["packages"]
    try:
        venv.EnvBuilder(system_site_packages=True, symlinks=True, with_pip=False).create(path)
        with open(os.path.join(site_packages(path), "_minray_parents.pth"), "w", encoding="utf-8") as file:
            file.write("\n".join(_parents()) + "\n")
        requirements = os.path.join(path, "requirements.txt")
        with open(requirements, "w", encoding="utf-8") as file:
            file.write("\n".join(packages) + "\n")
    except OSError as error:
        raise RuntimeEnvSetupError(f"the virtual environment {path} could not be made: {error}") from None

    def run(what: str, *arguments: str) -> None:
        _run(what, [python, "-m", *arguments], path + ".log", lock, deadline, timeout_s)

    version = pip.get("pip_version", "")
    if version or not any(os.path.isdir(os.path.join(entry, "pip")) for entry in _parents()):
        run("python -m ensurepip", "ensurepip", "--upgrade", "--default-pip")
    quiet = ("--disable-pip-version-check", "--no-input")
    if version:
        run(f"installing pip{version}", "pip", "install", *quiet, f"pip{version}")
    options = pip.get("pip_install_options", ())
    run(f"pip install {' '.join(packages)}", "pip", "install", *quiet, *options, "-r", requirements)
    if pip.get("pip_check"):
        run("pip check", "pip", "check")
    with open(os.path.join(path, COMPLETE), "w"):
        pass


def _run(
    what: str, command: list[str], log: str, lock: int, deadline: float | None, timeout_s: float | None
) -> None:
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONHOME", "PYTHONPATH")}
    with open(log, "wb") as file:
        process = subprocess.Popen(
            [command[0], "-I", "-S", "-c", _GUARD, str(os.getpid()), *command], stdin=subprocess.DEVNULL, stdout=file,
            stderr=subprocess.STDOUT, pass_fds=[lock], cwd=os.path.dirname(log), env=environment,
            start_new_session=True,
        )  # fmt: skip
        try:
            status = process.wait(None if deadline is None else max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            raise RuntimeEnvSetupError(
                f"{what} had not ended when {timeout_s:g} s were over (config={{'setup_timeout_seconds': ...}} "
                f"allows more).{_last_lines(log)}"
            ) from None
        finally:
            if process.poll() is None:  # Its builds have the same process group.
                with suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
    if status:
        raise RuntimeEnvSetupError(f"{what} failed with status {status}.{_last_lines(log)}")


def _last_lines(log: str) -> str:
    with open(log, encoding="utf-8", errors="replace") as file:
        lines = [line.rstrip() for line in file if line.strip()]
    shown = "\n".join("  " + re.sub(r"\x1b\[[0-9;]*m", "", line)[:300] for line in lines[-LAST_LINES:])
    return f"\nThe last that it said (all of it: {log}):\n{shown}" if shown else ""


def _prune(root: str, newest: str) -> None:
    """Only the newest stay, and those in use."""
    paths = [entry.path for entry in os.scandir(root) if entry.is_dir() and entry.path != newest]
    for path in sorted(paths, key=lambda one: os.stat(one).st_mtime, reverse=True)[KEEP - 1 :]:
        lock = os.open(path + ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            with suppress(BlockingIOError):
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(path, ignore_errors=True)
                with suppress(OSError):
                    os.unlink(path + ".log")
        finally:
            os.close(lock)
