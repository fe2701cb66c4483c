"""Frames over a socket, as the node reads them."""

from __future__ import annotations

import socket
from collections.abc import Iterator

import pytest

from minray import channel
from minray.channel import Channel, frame


@pytest.fixture
def ends() -> Iterator[tuple[Channel, socket.socket]]:
    ours, theirs = socket.socketpair()
    end = Channel(ours, lambda channel, on: None)
    yield end, theirs
    end.close()
    theirs.close()


def test_a_dead_peers_last_frame_is_read_however_many_reads_that_takes(
    ends: tuple[Channel, socket.socket], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(channel, "RECEIVE_BYTES", 1000)
    ours, theirs = ends
    last_words = [("TasksFinished", b"x" * 2500)]
    theirs.sendall(frame(last_words))
    theirs.close()
    assert ours.receive() == [last_words]
    assert ours.receive() is None


def test_no_frame_is_taken_for_nothing_to_read(ends: tuple[Channel, socket.socket]) -> None:
    ours, theirs = ends
    data = frame([("Unpinned", [b"x" * 16])])
    theirs.sendall(data[:3])
    assert ours.receive() == []
    theirs.sendall(data[3:])
    assert ours.receive() == [[("Unpinned", [b"x" * 16])]]
    assert ours.receive() == []
