"""ObjectRef: the future of a value.

A ref *is* its ID: a subclass of bytes.  Hashing, comparing and looking it up in a table
then run in C, and a million refs take 80 bytes each (half of an object that
has an ID).  What bytes can do and a future should not (iteration, mostly: ``a, b = f.remote()``
without ``num_returns=2``) is refused with a sentence.
"""

from __future__ import annotations

import concurrent.futures
import functools
from collections import deque
from collections.abc import Callable, Generator
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from minray import ids, serialization
from minray.interrupts import uninterruptible

if TYPE_CHECKING:
    from minray.core_worker import CoreWorker
    from minray.types import JobID, TaskID

T = TypeVar("T")

_core: Callable[[], CoreWorker]
_born: deque[bytes] = deque()  # of the core of this process; replaced by `connect`
_dropped: deque[bytes] = deque()
_wake: Callable[[], None] | None = None


def connect(core: Callable[[], CoreWorker], born: deque[bytes], dropped: deque[bytes]) -> None:
    """From now on refs are counted there."""
    global _core, _born, _dropped
    _core, _born, _dropped = core, born, dropped


def rouse_by(wake: Callable[[], None] | None) -> None:
    """A loop goes to sleep: when something is dropped, call `wake`, once.  None: it is awake, and will look itself.

    Without it an actor would outlive its last handle, and memory its last view, until the program
    calls minray again."""
    global _wake
    _wake = wake


def rouse() -> None:
    global _wake
    wake, _wake = _wake, None
    if wake is not None:
        wake()


class ObjectRef(bytes, Generic[T]):
    """A reference to an object that exists, or that a task will make.

    Pass it to a task (which then gets the value), to `minray.get` or `minray.wait`; ``await`` it; put it
    into other objects.  The object lives as long as any process has a ref to it.

    >>> ref = minray.put(3)
    >>> minray.get(ref)
    3
    """

    __slots__ = ()

    def __new__(cls, object_id: bytes) -> ObjectRef[T]:
        """A ref from the 16 bytes of an ID (`binary`): counted like any other.  minray itself uses `new_ref`."""
        if len(object_id) != ids.ID_BYTES:
            raise ValueError(f"an ObjectRef is made of the {ids.ID_BYTES} bytes of an ID, got {len(object_id)}.")
        return restore(bytes(object_id))

    @uninterruptible  # What __del__ raises is lost: Ctrl-C would be.
    def __del__(self) -> None:
        _dropped.append(self)  # Lives again, for as long as it stands there: cheaper than a copy.
        if _wake is not None:
            rouse()

    def __reduce__(self) -> tuple[Any, ...]:
        object_id = bytes(self)  # A note that is a ref would keep alive what it only mentions.
        serialization.note_ref(object_id)
        return (restore, (object_id,))

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return self.__reduce__()

    def __repr__(self) -> str:
        return f"ObjectRef({self.hex()})"

    def __str__(self) -> str:
        return repr(self)

    def __iter__(self) -> Any:
        raise TypeError(
            f"ObjectRef {ids.short(self)} is one future, not several. "
            "Did you mean @minray.remote(num_returns=...), or minray.get() first?"
        )

    def __add__(self, other: Any) -> Any:
        raise TypeError("an ObjectRef is a future, not its value. Did you mean minray.get(ref) + ...?")

    __radd__ = __mul__ = __rmul__ = __mod__ = __rmod__ = __getitem__ = __add__

    def binary(self) -> bytes:
        """The ID as 16 plain bytes."""
        return bytes(self)

    @classmethod
    def nil(cls) -> ObjectRef[Any]:
        return new_ref(ids.NIL)

    @classmethod
    def size(cls) -> int:
        """Bytes of an ID: 16."""
        return ids.ID_BYTES

    def is_nil(self) -> bool:
        return self == ids.NIL

    def task_id(self) -> TaskID:
        """The ID of the task that returns this object, or that put it."""
        from minray.types import TaskID

        return TaskID(ids.task_of(bytes(self)))

    def job_id(self) -> JobID:
        """The ID of the job, which is this session's."""
        from minray.types import JobID

        return JobID(_core().job_id)

    def future(self) -> concurrent.futures.Future[T]:
        """A future of the standard library with the same outcome."""
        return _core().future(self)

    def as_future(self) -> Any:
        """An asyncio future of the running loop.

        Raises RuntimeError where none runs."""
        return _core().asyncio_future(self)

    def __await__(self) -> Generator[Any, None, T]:
        result: T = yield from self.as_future().__await__()
        return result


new_ref: Callable[[bytes], ObjectRef[Any]] = functools.partial(bytes.__new__, ObjectRef)
"""A ref that the node has counted, or will by the message that makes its object.  0.05 µs, in C."""


def restore(object_id: bytes) -> ObjectRef[Any]:
    """A ref that arrived in this process inside something else."""
    _born.append(object_id)
    return new_ref(object_id)
