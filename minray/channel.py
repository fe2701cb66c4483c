"""Frames on a stream socket: a 4-byte little-endian length, then a pickle.

A `Channel` is the node's end of a connection to a child.  It never blocks: what the
kernel does not take is kept, and sent when there is room again.  (A worker's own end
blocks; see worker.py.)
"""

from __future__ import annotations

import pickle
import socket
import struct
from collections import deque
from collections.abc import Callable
from typing import Any

RECEIVE_BYTES = 256 * 1024
pack_length = struct.Struct("<I").pack
unpack_length = struct.Struct("<I").unpack_from


def frame(message: Any) -> bytes:
    data = pickle.dumps(message, 5)
    return pack_length(len(data)) + data


class FrameReader:
    """Cuts a stream of bytes into the messages that it is made of."""

    def __init__(self) -> None:
        self._rest = bytearray()  # of a frame that has begun
        self._need = 4  # bytes that the rest must have before it is worth looking at

    def feed(self, data: bytes | bytearray) -> list[Any]:
        if self._rest:
            self._rest += data  # Grows in place: a frame of many reads is copied once.
            if len(self._rest) < self._need:
                return []
            data = self._rest
        messages = []
        start, end = 0, len(data)
        view = memoryview(data)
        self._need = 4
        while end - start >= 4:
            size = unpack_length(data, start)[0]
            if start + 4 + size > end:
                self._need = 4 + size
                break
            messages.append(pickle.loads(view[start + 4 : start + 4 + size]))
            start += 4 + size
        self._rest = bytearray(view[start:])
        return messages


class Channel:
    def __init__(self, sock: socket.socket, watch_writable: Callable[[Channel, bool], None]) -> None:
        sock.setblocking(False)
        self.sock = sock
        self.fd = sock.fileno()
        self.backlog: deque[memoryview] = deque()
        self.backlog_bytes = 0
        self.closed = False
        self._watch_writable = watch_writable
        self._reader = FrameReader()

    def send(self, data: bytes) -> None:
        """Send one or more frames, or keep them; a peer that is gone is noticed by `receive`."""
        if self.closed:
            return
        sent = 0
        if not self.backlog:
            try:
                sent = self.sock.send(data)
            except BlockingIOError:
                pass
            except OSError:
                return  # It died; its EOF tells.
            if sent == len(data):
                return
            self._watch_writable(self, True)
        self.backlog.append(memoryview(data)[sent:])
        self.backlog_bytes += len(data) - sent

    def send_backlog(self) -> None:
        try:
            while self.backlog:
                chunk = self.backlog[0]
                sent = self.sock.send(chunk)
                self.backlog_bytes -= sent
                if sent < len(chunk):
                    self.backlog[0] = chunk[sent:]
                    return
                self.backlog.popleft()
        except BlockingIOError:
            return
        except OSError:
            self.backlog.clear()
            self.backlog_bytes = 0
        self._watch_writable(self, False)

    def receive(self) -> list[Any] | None:
        """What has come; [] if there is nothing more to read; None at the end of the stream."""
        while True:
            try:
                data = self.sock.recv(RECEIVE_BYTES)
            except BlockingIOError:
                return []
            except OSError:
                return None
            if not data:
                return None
            if frames := self._reader.feed(data):
                return frames

    def close(self) -> None:
        self.closed = True
        self.backlog.clear()
        self.sock.close()
