"""Whose output it is: the name of the task or actor, sent along with what it prints.

What a worker prints goes through a pipe to the zygote, results go to the driver by another
way.  When the driver sees a line, the worker has often begun with something else, so the
driver cannot tell whose line it is (tried: a third of the lines of short tasks had the wrong
name).  The worker knows.  So `LabelledFile`, below its sys.stdout and sys.stderr, writes
the name in between whenever it has changed since it wrote last, and `LabelReader` in the zygote
takes it out again.  A task that prints nothing pays nothing.

What C code and child processes write to the same descriptors has the name that was
announced last there.  Left out: a file for each task (a million tasks, a million files).
"""

from __future__ import annotations

import io
import os
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer

START, END = b"\x1eminray:", b"\x1f"
NAME_BYTES = 100
_LABEL = re.compile(re.escape(START) + b"([^\x1e\x1f]{0,%d})" % NAME_BYTES + END)
_LABEL_BYTES = len(START) + NAME_BYTES + len(END)


class LabelledFile(io.FileIO):
    def __init__(self, fd: int, label: Callable[[], str | None]) -> None:
        super().__init__(fd, "wb", closefd=False)
        self._label = label  # of what writes now; None: nothing that has a name
        self._announced: str | None = None

    def write(self, data: ReadableBuffer, /) -> int:
        label = self._label()
        if label is not None and label != self._announced:
            self._announced = label
            os.write(self.fileno(), START + label.encode("utf-8", "replace")[:NAME_BYTES] + END)
        return super().write(data)


class LabelReader:
    """Cuts one stream of a worker into (label, data); the label is "" until there is one."""

    def __init__(self) -> None:
        self.label = ""
        self._rest = b""  # what may be the beginning of a label

    def feed(self, data: bytes) -> list[tuple[str, bytes]]:
        data = self._rest + data
        self._rest = b""
        if START[:1] not in data:
            return [(self.label, data)]
        begun = data.rfind(START[:1])
        if len(data) - begun < _LABEL_BYTES and END not in data[begun:]:
            if START.startswith(data[begun : begun + len(START)]):
                data, self._rest = data[:begun], data[begun:]
        texts = _LABEL.split(data)  # Text, label, text, label, ..., text.
        parts = [(self.label, texts[0])]
        for name, text in zip(texts[1::2], texts[2::2]):
            self.label = name.decode("utf-8", "replace")
            parts.append((self.label, text))
        return [part for part in parts if part[1]]

    def close(self) -> list[tuple[str, bytes]]:
        """What was held back and turned out to be no label."""
        rest, self._rest = self._rest, b""
        return [(self.label, rest)] if rest else []
