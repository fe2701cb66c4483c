"""The zygote: a warm, single-threaded process from which workers are forked.

It is started at `init` from a fresh interpreter (forking the driver, with its threads
and its CUDA, is never safe), loads what workers need, and then forks one in a few ms.
It is also

* the parent that reaps them, and tells the driver how each ended (exit status, signal),
* the reader of their stdout and stderr, which goes to logs/ (bounded) and to the driver:
  a driver that computes never holds up a task that prints,
* the janitor: when its lifeline, the socket to the driver, closes (or the driver dies while
  a process that it forked still has that socket), it ends every worker, lets the GCS finish
  its file, removes the shared memory and files the session away.  That is how every session
  ends, also an orderly one: one way to clean up, always exercised.

Workers and the GCS die with their zygote (PR_SET_PDEATHSIG; it never forks from another thread).
What workers leave behind (their own children) becomes the zygote's (PR_SET_CHILD_SUBREAPER)
and is ended with the session.

The top half of this file runs in the driver (`ZygoteClient`), the rest in the zygote.
"""

from __future__ import annotations

import ctypes
import gc
import os
import pickle
import select
import signal
import socket
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from typing import Any

from minray import process_title, session
from minray.output_labels import LabelReader

GCS = -1
"""The GCS process, among the numbers of workers."""
LOG_BYTES = 16 << 20
"""A worker's log file grows to this and no further."""
OUTPUT_BACKLOG = 64
"""Chunks of output kept for a driver that does not read; more are left out there (not in the log)."""
CHUNK_BYTES = 32 * 1024
EXIT_S = 1.5
"""How long the GCS may take to finish its file at the end, below the 2 s after which no process of a killed driver is
left.  It takes 0.05 to 0.15 s in the middle of work, 0.25 s beside eight processes that compute on two CPUs."""
CLOSE_S = 4.0
"""How long the whole end of a session may take, below the 5 s that are promised, until the zygote is killed."""
ROWS_LOST = (
    "The newest rows of the history are lost, and with them the newest results of a durable job. Is it stopped, or its "
    "disk very slow?"
)
GCS_CUT_SHORT = (
    "minray: the GCS is ended without having written everything: it has not come to an end within "
    f"{EXIT_S:g} s. {ROWS_LOST}\n"
).encode()


class ZygoteClient:
    """The driver's side: one message a packet, both ways."""

    def __init__(self, config: dict[str, Any], on_start: Callable[[int], None]) -> None:
        self._config = config  # session directory, arena, what to preload: see `main`
        self._on_start = on_start  # with its pid
        self._deaths_in_silence = 0  # in a row, without a word since the start
        self._backlog: deque[tuple[bytes, socket.socket | None]] = deque()  # asked of a zygote that takes nothing
        self.watch_writable: Callable[[bool], None] = lambda on: None  # set by who calls `send_backlog`
        self.sock: socket.socket
        self._process: subprocess.Popen[bytes]
        self._start()

    def _start(self) -> None:
        _fill_standard_descriptors()
        self.sock, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 1 << 20)
        path, fd = _search_path(), theirs.fileno()
        code = f"import sys; sys.path[:] = {path!r}; from minray.zygote import main; main({fd})"
        environment = dict(os.environ)
        environment.setdefault("OMP_NUM_THREADS", "1")
        environment[session.MARK] = self._config["session"]
        self._process = subprocess.Popen(
            [sys.executable or "python3", "-c", code],
            pass_fds=[fd],
            stdin=subprocess.DEVNULL,
            start_new_session=True,  # Ctrl-C in the terminal is for the driver alone.
            env=environment,
        )
        theirs.close()
        with suppress(OSError):  # It has died already: its EOF tells.
            self.sock.send(pickle.dumps(self._config))
        self.sock.setblocking(False)
        self.pid = self._process.pid
        self._on_start(self.pid)

    def restart(self) -> bool:
        """Start another in the place of one that has died; False if that has been in vain before."""
        self._drop_backlog()
        self.sock.close()
        self._process.kill()
        self._process.wait()
        session.end_processes(self._config["session"])  # Workers die with it; what their tasks have started does not.
        self._deaths_in_silence += 1
        if self._deaths_in_silence > 2:
            return False
        self._start()
        return True

    def start_worker(self, number: int, sock: socket.socket) -> None:
        """With that socket, which is closed here."""
        self._request(("worker", number, _search_path(), _directory()), sock)

    def start_gcs(self, sock: socket.socket) -> None:
        """With that socket, which is closed here."""
        self._request(("gcs", GCS), sock)

    def kill_worker(self, number: int) -> None:
        self._request(("kill", number))

    def _request(self, message: tuple[Any, ...], sock: socket.socket | None = None) -> None:
        """Never waits: what a zygote that is stopped does not take is kept."""
        self._backlog.append((pickle.dumps(message), sock))
        if len(self._backlog) == 1:
            self.send_backlog()
            if self._backlog:
                self.watch_writable(True)

    def send_backlog(self) -> None:
        try:
            while self._backlog:
                data, sock = self._backlog[0]
                socket.send_fds(self.sock, [data], [sock.fileno()] if sock is not None else [])
                self._backlog.popleft()
                if sock is not None:
                    sock.close()
        except BlockingIOError:
            return
        except OSError:  # The zygote has died: its EOF starts another, and what it was asked is asked again.
            self._drop_backlog()
        self.watch_writable(False)

    def _drop_backlog(self) -> None:
        for _, sock in self._backlog:
            if sock is not None:
                sock.close()
        self._backlog.clear()

    def receive(self) -> list[tuple[Any, ...]] | None:
        """Its notices; None when it is dead."""
        notices: list[tuple[Any, ...]] = []
        while len(notices) < 100:
            try:
                data = self.sock.recv(256 * 1024)
            except BlockingIOError:
                break
            except OSError:
                return None
            if not data:
                return notices or None
            notices.append(pickle.loads(data))
            self._deaths_in_silence = 0
        return notices

    def close(
        self, on_notice: Callable[[tuple[Any, ...]], None] = lambda notice: None, deadline: float | None = None
    ) -> bool:
        """Cut the lifeline, and wait until everything is cleaned up; False if it had to be killed: at `deadline`
        (monotonic), or when the GCS has had its time and a little more, if that is later.

        What it still says (the last output of workers) goes to `on_notice`.
        """
        self._drop_backlog()
        if self.sock.fileno() < 0:
            return False  # It could not be started again.
        with suppress(OSError):
            self.sock.shutdown(socket.SHUT_WR)
        now = time.monotonic()
        deadline = max(now + EXIT_S + 0.5, deadline or now + CLOSE_S)
        ended = select.poll()
        ended.register(self.sock, select.POLLIN)
        clean = False
        # Popen.wait(timeout) looks every now and then; the end of the stream comes at once.
        while ended.poll(max(0.0, deadline - time.monotonic()) * 1000):
            notices = self.receive()
            if notices is None:
                with suppress(subprocess.TimeoutExpired):
                    clean = self._process.wait(timeout=0.5) == 0
                break
            for notice in notices:
                on_notice(notice)
        if not clean:  # It is stopped, perhaps; or it was killed, and what tasks have started has nobody else.
            self._process.kill()
            self._process.wait()
            session.end_processes(self._config["session"])
        self.sock.close()
        return clean

    def forget(self) -> None:
        """In a process that the driver has forked: the zygote is the driver's alone."""
        self._drop_backlog()
        self.sock.close()
        self._process.returncode = 0  # Not a child of this process, which must not wait for it.


def _fill_standard_descriptors() -> None:
    """In a driver that was started without some of them (a daemon), our sockets must not get the numbers 0 to 2:
    what its children print would go there.  They stay: closed later, they could be somebody else's by then."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # The lowest number that is free.
            os.set_inheritable(fd, True)


def _search_path() -> list[str]:
    """sys.path; pathlib's paths, which Python ignores there, do not become part of a program."""
    return [entry for entry in sys.path if isinstance(entry, str)]


def _directory() -> str:
    try:
        return os.getcwd()
    except OSError:
        return "/"  # It was deleted.


# ---------------------------------------------------------------- in the zygote


def main(fd: int) -> None:
    sock = socket.socket(fileno=fd)
    sock.set_inheritable(False)
    config = pickle.loads(sock.recv(1 << 20))
    for name in config["preload"]:
        with suppress(Exception):  # A worker that needs it will say what is wrong with it.
            __import__(name)
    import minray.worker  # noqa: F401

    if config["name_prefix"] == "ray":  # In the driver `ray` means minray.
        from minray import as_ray

        as_ray.install()
    process_title.begin()
    process_title.show("zygote")
    gc.collect()
    gc.freeze()  # Children share these pages; a collection would write to each of them.
    zygote = Zygote(sock, config)
    try:
        zygote.run()
    except BaseException:
        sys.excepthook(*sys.exc_info())
        zygote._end_session()  # An error in here may cost the session, and leaves nothing behind either.


class _Child:
    def __init__(self, number: int, pid: int) -> None:
        self.number = number
        self.pid = pid
        self.log_bytes = 0
        self.labels = {"stdout": LabelReader(), "stderr": LabelReader()}


class Zygote:
    def __init__(self, sock: socket.socket, config: dict[str, Any]) -> None:
        self.sock = sock
        self.config = config
        self.children: dict[int, _Child] = {}  # by pid
        self.pipes: dict[int, tuple[_Child, str]] = {}  # read ends of their stdout and stderr
        self.backlog: list[tuple[Any, ...]] = []
        self.poll = select.poll()
        self.gcs_was_killed = False  # and its file is not ended
        self.wake_r = -1  # a byte comes for each ended child
        self.driver_fd = -1  # readable when the driver has ended; -1 where there is no such thing

    def run(self) -> None:
        _prctl(36, 1)  # PR_SET_CHILD_SUBREAPER
        # A signal writes into this pipe, so that poll() wakes for an ended child.
        self.wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        signal.set_wakeup_fd(wake_w, warn_on_full_buffer=False)
        signal.signal(signal.SIGCHLD, lambda *_: None)
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        signal.signal(signal.SIGTERM, signal.SIG_IGN)  # Its lifeline ends it.
        self.poll.register(self.sock, select.POLLIN)
        self.poll.register(self.wake_r, select.POLLIN)
        with suppress(AttributeError, OSError):  # Not on this system.
            self.driver_fd = os.pidfd_open(self.config["driver"])
            self.poll.register(self.driver_fd, select.POLLIN)
        if os.getppid() != self.config["driver"]:
            self._end_session()  # It had died before.
        while True:
            for fd, _ in self.poll.poll(None if not self.backlog else 10):
                if fd == self.sock.fileno():
                    if not self._take_request():
                        self._end_session()
                elif fd == self.driver_fd:
                    asked = select.poll()
                    asked.register(self.sock, select.POLLIN)
                    while asked.poll(0) and self._take_request():
                        pass  # The GCS, perhaps, for which rows are waiting already.
                    self._end_session()
                elif fd == self.wake_r:
                    with suppress(BlockingIOError):
                        os.read(self.wake_r, 4096)
                    self._reap()
                elif fd in self.pipes:  # Reaping may just have closed it.
                    self._take_output(fd)
            self._tell_backlog()

    def _take_request(self) -> bool:
        try:
            data, fds, _, _ = socket.recv_fds(self.sock, 1 << 20, 1)
        except ConnectionResetError:
            return True  # The driver died before it had read everything.  What it asked for last comes, then the end.
        except OSError:
            return False
        if not data:
            return False
        message = pickle.loads(data)
        if message[0] == "worker" and self._lifeline_is_cut():
            os.close(fds[0])  # A session that was ended right after its start.
            return True
        if message[0] == "kill":
            for child in self.children.values():
                if child.number == message[1]:
                    with suppress(ProcessLookupError):
                        os.kill(child.pid, signal.SIGKILL)
            return True
        self._fork(message, fds[0])
        return True

    def _lifeline_is_cut(self) -> bool:
        look = select.poll()
        look.register(self.sock, getattr(select, "POLLRDHUP", select.POLLHUP))
        return bool(look.poll(0))

    def _fork(self, message: tuple[Any, ...], fd: int) -> None:
        number = message[1]
        out_r, out_w = os.pipe2(os.O_CLOEXEC)
        err_r, err_w = os.pipe2(os.O_CLOEXEC)
        try:
            pid = os.fork()
        except OSError as error:
            for end in (fd, out_r, out_w, err_r, err_w):
                os.close(end)
            self._tell(("died", number, f"could not be forked: {error}"))
            return
        if not pid:
            status = 1
            try:
                self._become_child(message, fd, out_w, err_w)
                status = 0
            finally:
                with suppress(BaseException):
                    sys.stdout.flush()
                    sys.stderr.flush()
                os._exit(status)
        os.close(fd)
        os.close(out_w)
        os.close(err_w)
        child = self.children[pid] = _Child(number, pid)
        if number == GCS:
            self.gcs_was_killed = False
        self._log(child, b"")  # Error messages name the file: it is there even if nothing was said.
        for end, stream in ((out_r, "stdout"), (err_r, "stderr")):
            self.pipes[end] = (child, stream)
            self.poll.register(end, select.POLLIN)
        self._tell(("started", number, pid))

    def _become_child(self, message: tuple[Any, ...], fd: int, out_w: int, err_w: int) -> None:
        parent = os.getppid()
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        os.dup2(out_w, 1)
        os.dup2(err_w, 2)
        for end in (out_w, err_w, *self.pipes):
            os.close(end)
        self.sock.close()
        if self.driver_fd >= 0:
            os.close(self.driver_fd)
        sock = socket.socket(fileno=fd)
        try:
            _prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG
            if os.getppid() != parent:
                return  # The zygote died before the line above.
            if message[0] == "gcs":
                process_title.show("gcs")
                from minray import gcs

                path = os.path.join(self.config["session"], "gcs.sqlite")
                gcs.main(sock, path, self.config["history"], self.config["job"])
            else:
                os.setpgid(0, 0)  # So that what a task starts can be ended with it.
                from minray import worker

                worker.main(sock, self.config, number=message[1], path=message[2], directory=message[3])
        except SystemExit:
            raise  # It has said why.
        except BaseException:
            sys.excepthook(*sys.exc_info())
            raise

    # ------------------------------------------------------------ output

    def _take_output(self, fd: int) -> None:
        child, stream = self.pipes[fd]
        data = os.read(fd, CHUNK_BYTES)
        labels = child.labels[stream]
        for label, part in labels.feed(data) if data else labels.close():
            self._pass_on(child, stream, part, label)
        if not data:
            self._close_pipe(fd)

    def _pass_on(self, child: _Child, stream: str, data: bytes, label: str) -> None:
        if child.log_bytes < LOG_BYTES:
            child.log_bytes += len(data)
            ended = child.log_bytes >= LOG_BYTES
            self._log(child, data + b"\n[the log ends here: it has reached its limit]\n" if ended else data)
        if (self.config["log_to_driver"] or child.number == GCS) and len(self.backlog) < OUTPUT_BACKLOG:
            self._tell(("output", child.number, child.pid, stream, data, label))

    def _log(self, child: _Child, data: bytes) -> None:
        name = "gcs.log" if child.number == GCS else f"worker-{child.number}.log"
        with suppress(OSError):  # A full disk must not end the session.
            path = os.path.join(self.config["session"], "logs", name)
            log = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_CLOEXEC, 0o600)
            os.write(log, data)
            os.close(log)

    def _close_pipe(self, fd: int) -> None:
        self.poll.unregister(fd)
        os.close(fd)
        del self.pipes[fd]

    def _tell(self, notice: tuple[Any, ...]) -> None:
        self.backlog.append(notice)
        self._tell_backlog()

    def _tell_backlog(self) -> None:
        while self.backlog:
            try:
                self.sock.send(pickle.dumps(self.backlog[0]), socket.MSG_DONTWAIT)
            except BlockingIOError:
                return
            except OSError:
                self.backlog.clear()  # The driver is gone; the next recv says so.
                return
            del self.backlog[0]

    # ------------------------------------------------------------ ends

    def _reap(self) -> None:
        while True:
            try:
                pid, status = os.waitpid(-1, os.WNOHANG)  # All of them are ours: this process runs nobody else's code.
            except ChildProcessError:
                return
            if not pid:
                return
            child = self.children.pop(pid, None)
            if child is None:
                continue  # A grandchild that became ours.
            if child.number == GCS:
                self.gcs_was_killed = os.WIFSIGNALED(status)
            for fd in [fd for fd, (owner, _) in self.pipes.items() if owner is child]:
                os.set_blocking(fd, False)
                with suppress(BlockingIOError, OSError):  # What it said last.
                    while fd in self.pipes:
                        self._take_output(fd)
                if fd in self.pipes:  # A process that it started still holds the other end.
                    self._close_pipe(fd)
            with suppress(ProcessLookupError, PermissionError):
                if child.number != GCS:
                    os.killpg(pid, signal.SIGKILL)
            self._tell(("output", child.number, child.pid, "", b"", ""))  # Its end.
            self._tell(("died", child.number, describe_exit(status)))

    def _end_session(self) -> None:
        """The driver is gone or wants to be: leave nothing behind but the finished session.  Does not return."""
        self.poll.unregister(self.sock)
        if self.driver_fd >= 0:
            self.poll.unregister(self.driver_fd)
        for child in self.children.values():
            if child.number == GCS:
                continue
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(child.pid, signal.SIGKILL)
            with suppress(ProcessLookupError):
                os.kill(child.pid, signal.SIGKILL)
        deadline = time.monotonic() + EXIT_S
        while True:
            self._reap()
            if self.gcs_was_killed:  # Then another one ends the file as it should be: its lifeline is cut already.
                ours, theirs = socket.socketpair()
                ours.close()
                self._fork(("gcs", GCS), theirs.detach())
            # Grandchildren that left their group; what they have started becomes ours in turn.
            strays = [pid for pid in _children_of(os.getpid()) if pid not in self.children]
            for pid in strays:
                with suppress(ProcessLookupError, PermissionError):
                    os.kill(pid, signal.SIGKILL)
            if not (self.children or strays) or time.monotonic() >= deadline:
                break
            self._await_child(deadline)
        for child in self.children.values():
            if child.number == GCS:
                self._pass_on(child, "stderr", GCS_CUT_SHORT, "")
                with suppress(ProcessLookupError):
                    os.kill(child.pid, signal.SIGKILL)
        session.finish_session(self.config["session"], self.config["arena"])
        room = select.poll()
        room.register(self.sock, select.POLLOUT)
        while self.backlog and room.poll(500):
            self._tell_backlog()
        os._exit(0)

    def _await_child(self, deadline: float) -> None:
        """Until one has ended; meanwhile their output is taken."""
        for fd, _ in self.poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
            if fd == self.wake_r:
                with suppress(BlockingIOError):
                    os.read(fd, 4096)
            elif fd in self.pipes:
                self._take_output(fd)


def describe_exit(status: int) -> str:
    if os.WIFSIGNALED(status):
        number = os.WTERMSIG(status)
        try:
            return f"was killed by {signal.Signals(number).name}"
        except ValueError:
            return f"was killed by signal {number}"
    return f"exited with status {os.waitstatus_to_exitcode(status)}"


def _children_of(pid: int) -> list[int]:
    try:
        with open(f"/proc/{pid}/task/{pid}/children") as file:
            return [int(child) for child in file.read().split()]
    except OSError:
        return []  # Not on Linux.


def _prctl(option: int, value: int) -> None:
    with suppress(AttributeError, OSError):
        ctypes.CDLL(None).prctl(option, value, 0, 0, 0)
