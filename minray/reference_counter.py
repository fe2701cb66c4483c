"""How many ObjectRefs to each object this process has.

A ref may be born (`object_ref.restore`) and dropped (`ObjectRef.__del__`) in any thread, also inside
the garbage collector while a lock is held.  So both only append to a deque; whoever runs the loop
counts.

A worker tells the node of its first ref to an object and of its last, not of those between
(`ReferenceCounter`).  The driver has the node in its own process, where a count of its own
would be a second table of the same objects (84 bytes each, measured): there each ref counts
(`References`).
"""

from __future__ import annotations

from collections import deque


class References:
    """Every ref is one reference to the node."""

    def __init__(self) -> None:
        self.born: deque[bytes] = deque()  # refs that came from elsewhere: out of an argument or a value
        self.dropped: deque[bytes] = deque()

    def adopt(self, object_id: bytes) -> None:
        """A ref whose object this process makes itself: the message that makes it says so."""

    def count_born(self) -> list[bytes]:
        """IDs to acquire."""
        return [self.born.popleft() for _ in range(len(self.born))]

    def count_dropped(self, limit: int) -> list[bytes]:
        """IDs to release, looking at the first `limit` refs that were dropped.

        Take `limit` (= len(dropped)) before you collect other messages: what was dropped by then
        was used by then, so the release cannot overtake a use."""
        return [self.dropped.popleft() for _ in range(limit)]


class ReferenceCounter(References):
    """All refs of this process to an object are one reference to the node."""

    def __init__(self) -> None:
        super().__init__()
        self._counts: dict[bytes, int] = {}

    def adopt(self, object_id: bytes) -> None:
        self._counts[object_id] = self._counts.get(object_id, 0) + 1

    def count_born(self) -> list[bytes]:
        first, counts = [], self._counts
        while self.born:
            object_id = self.born.popleft()
            count = counts.get(object_id, 0)
            counts[object_id] = count + 1
            if not count:
                first.append(object_id)
        return first

    def count_dropped(self, limit: int) -> list[bytes]:
        last, counts, pop = [], self._counts, self.dropped.popleft
        for _ in range(limit):
            object_id = pop()
            count = counts.pop(object_id, 1)
            if count > 1:
                counts[object_id] = count - 1
            else:
                last.append(bytes(object_id))  # The ID alone: a ref on a wire would be born again.
        return last
