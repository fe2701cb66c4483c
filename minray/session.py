"""Sessions on disk: one private directory for each run of a driver, and what happens to it afterwards.

::

    <root>/                       $MINRAY_HOME, else <tempdir>/minray-<uid>
        live/<session>/           20250131-094502-8123-3fa1: when, the driver's pid, four random digits
            session.json          who runs it: see `Session.facts`
            gcs.sqlite            the GCS's file
            logs/  spill/  runtime_env/
        finished/<session>/       the same without the last two; the newest 10 are kept to be looked at
        environments/  jobs/      what outlives sessions: see virtualenvs.py and job_storage.py

A session is moved from live to finished by its driver; or by its zygote if the driver was killed; or, if
both were, by the next driver's `sweep`.  All three do the same (`finish_session`), and may do it at once: the
move is one rename, and each step before it can be done twice.

Whether a process lives is asked by pid *and* start time (pids are used again) *and* boot ID (so are both,
after a reboot).  A session that was started in another PID namespace (by a container that shares our
temporary directory, say) cannot be judged and is left alone.  A lock file was considered instead: a driver
that closes the file descriptors it does not know, as daemons do, would lose its session to the next sweep.

Temporary directories are everybody's, so nothing below the root is trusted before its owner and mode are
known.  This module knows of no SQLite and no sockets, and of shared memory only its name.
"""

from __future__ import annotations

import json
import os
import signal
import stat
import time
from contextlib import suppress
from typing import Any

KEEP_FINISHED = 10
LIVE, FINISHED = "live", "finished"
MARK = "MINRAY_SESSION"
"""In the environment of a zygote, and of all that comes from it: the path of its live session."""

BEING_MADE_S = 60
"""A live directory without a readable session.json is younger than this while its driver is making it."""


class Session:
    """A live session, in its driver.

    >>> session = Session.create()
    >>> session.note(arena="minray-9fc0a1")
    >>> kept = session.finish()
    """

    __slots__ = ("facts", "path")

    def __init__(self, path: str, facts: dict[str, Any]) -> None:
        self.path = path
        self.facts = facts
        """What session.json holds: ``driver`` and, once noted, ``zygote`` (each as by `identify`),
        ``boot_id``, ``pid_namespace``, ``uid``, ``started_us``, and ``arena`` (the name of an
        `object_store.Arena`, or None)."""

    @property
    def name(self) -> str:
        return os.path.basename(self.path)

    @classmethod
    def create(cls, root: str | None = None) -> Session:
        """Makes the directory, in less than a millisecond.  Raises PermissionError as `open_root`."""
        root = open_root(root)
        now = time.time()
        stamp = time.strftime("%Y%m%d-%H%M%S", time.localtime(now))
        path = os.path.join(root, LIVE, f"{stamp}-{os.getpid()}-{os.urandom(2).hex()}")
        for directory in (path, os.path.join(path, "logs"), os.path.join(path, "spill")):
            os.mkdir(directory, 0o700)
        session = cls(path, {"started_us": int(now * 1e6), "uid": os.geteuid(), **_here(), "arena": None})
        session.note(driver=identify(os.getpid()))
        return session

    def note(self, **facts: Any) -> None:
        """Adds to session.json: ``zygote=identify(pid)``, or ``arena=name``, noted before it is made."""
        self.facts.update(facts)
        partial = os.path.join(self.path, ".session.json")
        fd = os.open(partial, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            with open(fd, "w") as file:
                json.dump(self.facts, file, indent=1)
        except OSError as error:  # A full disk does not say which.
            raise OSError(error.errno, error.strerror, partial) from None
        os.replace(partial, os.path.join(self.path, "session.json"))

    def finish(self) -> str:
        """As `finish_session`: once nobody writes here any more."""
        return finish_session(self.path, self.facts["arena"])


def open_root(root: str | None = None) -> str:
    """The root's path, made if need be.  Raises PermissionError if others could write there."""
    root = os.path.abspath(root or default_root())
    os.makedirs(os.path.dirname(root), exist_ok=True)
    for directory in (root, os.path.join(root, LIVE), os.path.join(root, FINISHED)):
        with suppress(FileExistsError):
            os.mkdir(directory, 0o700)
        found = os.lstat(directory)
        if not stat.S_ISDIR(found.st_mode):
            fault = "is not a directory"
        elif found.st_uid != os.geteuid():
            fault = f"belongs to user {found.st_uid}, not to user {os.geteuid()}"
        elif found.st_mode & 0o022:
            fault = f"can be written by others (its mode is {found.st_mode & 0o7777:o})"
        else:
            continue
        raise PermissionError(
            f"{directory} {fault}, so minray does not keep its session there. "
            "Set MINRAY_HOME to a directory that only you can write to."
        )
    return root


def default_root() -> str:
    home = os.environ.get("MINRAY_HOME")
    return home or os.path.join(os.environ.get("TMPDIR") or "/tmp", f"minray-{os.geteuid()}")


def finish_session(path: str, arena: str | None) -> str:
    """Removes the arena's name and what was spilled, and moves the session to finished; returns its new path.

    May be called by several processes, and again.  The GCS must have closed its file: SQLite removes its
    journal by path.
    """
    if arena is not None:
        from minray.object_store import unlink_arena

        unlink_arena(arena)
    _remove(os.path.join(path, "spill"))
    _remove(os.path.join(path, "runtime_env"))
    root = os.path.dirname(os.path.dirname(path))
    finished = os.path.join(root, FINISHED, os.path.basename(path))
    with suppress(FileNotFoundError):  # Another process was first.
        os.rename(path, finished)
    for old in _newest_first(os.path.join(root, FINISHED))[KEEP_FINISHED:]:
        _remove(old)
    return finished


def _remove(directory: str) -> None:
    try:
        os.rmdir(directory)
    except FileNotFoundError:
        return
    except OSError:
        import shutil  # Takes longer to load than all the rest of an ordinary end.

        shutil.rmtree(directory, ignore_errors=True)


def end_processes(path: str) -> None:
    """Kills what a session's zygote has left that was itself killed: such processes have the session's path in their
    environment, wherever they have gone.  (What a task has started with another environment is not found.)"""
    mark = f"{MARK}={path}".encode()
    with suppress(FileNotFoundError):  # No /proc.
        for name in os.listdir("/proc"):
            if name.isdecimal() and int(name) != os.getpid():
                with suppress(OSError):  # Another user's, or ended meanwhile.
                    with open(f"/proc/{name}/environ", "rb") as file:
                        if mark in file.read().split(b"\0"):
                            os.kill(int(name), signal.SIGKILL)


def sweep(root: str | None = None) -> list[str]:
    """Finishes the live sessions whose driver and zygote are both dead; returns the names of those."""
    root = open_root(root)
    here = _here()
    swept = []
    for path in _newest_first(os.path.join(root, LIVE)):
        facts = read_facts(path)
        if facts is None:
            with suppress(FileNotFoundError):
                if abs(time.time() - os.stat(path).st_mtime) > BEING_MADE_S:
                    swept.append(os.path.basename(finish_session(path, None)))
        elif not _may_live(facts, here):
            if facts["boot_id"] == here["boot_id"]:
                end_processes(path)
            swept.append(os.path.basename(finish_session(path, facts["arena"])))
    return swept


def find(text: str | None = None, root: str | None = None, with_file: str = "") -> str | None:
    """The path of the newest live session, else of the newest finished one, or None.

    With ``text``: of those whose name contains it, or the directory itself whose path it is.
    With ``with_file``: of those that have this file; one that is just starting has little.
    """
    if text and os.path.isfile(os.path.join(text, "session.json")):
        return os.path.abspath(text)
    root = os.path.abspath(root or default_root())
    for kind in (LIVE, FINISHED):
        for path in _newest_first(os.path.join(root, kind)):
            named = not text or text in os.path.basename(path)
            if named and os.path.exists(os.path.join(path, with_file)):
                return path
    return None


def read_facts(path: str) -> dict[str, Any] | None:
    """What a session's session.json says (see `Session.facts`), or None if it cannot be read."""
    try:
        with open(os.path.join(path, "session.json")) as file:
            facts = json.load(file)
    except (OSError, ValueError):
        return None
    return facts if isinstance(facts, dict) and {"driver", "boot_id", "arena"} <= facts.keys() else None


def identify(pid: int) -> list[int]:
    """A process, so that no later one is taken for it: its pid, and when it started (0 if it is dead)."""
    return [pid, _started(pid)]


def is_alive(process: list[int]) -> bool:
    """Whether the process that `identify` named still runs.  A zombie does not."""
    pid, started = process
    return started > 0 and _started(pid) == started


def _started(pid: int) -> int:
    """When the process started, in clock ticks since the boot; 0 if it has ended; 1 without a /proc."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            fields = file.read().rpartition(b")")[2].split()  # The name in parentheses may contain anything.
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/stat"):
            return 0
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return 0
        return 1
    return 0 if fields[0] in b"ZX" else int(fields[19])


def _here() -> dict[str, str]:
    """What process IDs and start times are relative to."""
    here = {"boot_id": "", "pid_namespace": ""}
    with suppress(OSError), open("/proc/sys/kernel/random/boot_id") as file:
        here["boot_id"] = file.read().strip()
    with suppress(OSError):
        here["pid_namespace"] = os.readlink("/proc/self/ns/pid")
    return here


def _may_live(facts: dict[str, Any], here: dict[str, str]) -> bool:
    if facts["boot_id"] != here["boot_id"]:
        return False
    if facts["pid_namespace"] != here["pid_namespace"]:
        return True
    return is_alive(facts["driver"]) or is_alive(facts.get("zygote") or [0, 0])


def _newest_first(directory: str) -> list[str]:
    """The sessions in a directory.  By the time noted in them: names are no finer than a second."""
    try:
        paths = [os.path.join(directory, name) for name in os.listdir(directory)]
    except FileNotFoundError:
        return []
    ages = {path: ((read_facts(path) or {}).get("started_us", 0), path) for path in paths}
    return sorted(paths, key=ages.__getitem__, reverse=True)
