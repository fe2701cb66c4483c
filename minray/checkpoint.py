"""An actor's state becomes a value, and an actor again: what its worker does for exact recovery.

Owns what "state" means and when it is saved.  A class says it itself with ``save_checkpoint(self)`` and
``load_checkpoint(self, state)``; then the constructor runs again, with its arguments, before the state
is loaded.  Otherwise it is what pickle and copy make of the instance (``__reduce_ex__``, ``__getstate__``,
``__setstate__``, ``__slots__``), and the constructor does not run again.  The class itself is left out:
the worker has it, and pickling its code each time would cost more than most states.

Knows nothing of logs and replays (node_exact.py) or of where the bytes go (worker.py).

Left out: saving only what has changed.  Python does not tell; a class that knows can save a reference to what
has not (an ObjectRef to a large array is 16 bytes of state).
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from time import monotonic
from typing import Any

from minray.exceptions import CheckpointError
from minray.serialization import PROTOCOL, Serialized, deserialize, in_words, serialize, substituted
from minray.task_spec import TaskOptions

SAVE, LOAD = "save_checkpoint", "load_checkpoint"
MAX_CALLS = 100_000
MAX_BYTES = 64 << 20
"""However seldom an actor asks to be saved: after so many calls, or so many bytes of their arguments, it is.  The node
keeps in memory all that came since the last checkpoint, and to replay 100,000 calls takes more than a second."""

_actor_class: Any = None  # of the actor in this process, in place of which the state says `_make` or `_call`


def _make(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return _actor_class.__new__(_actor_class, *args, **kwargs)


def _call(*args: Any) -> Any:
    return _actor_class(*args)


def _without_class(instance: Any) -> Any:
    """Its own reduction, with a word in place of the class."""
    reduced = instance.__reduce_ex__(PROTOCOL)
    if type(reduced) is not tuple:
        return reduced
    function, args, *rest = reduced
    if function is copyreg.__newobj__ and args[0] is _actor_class:  # type: ignore[attr-defined]
        return (_make, (args[1:], {}), *rest)
    if function is copyreg.__newobj_ex__ and args[0] is _actor_class:  # type: ignore[attr-defined]
        return (_make, (args[1], args[2]), *rest)
    if function is _actor_class:
        return (_call, args, *rest)
    return reduced


def check_class(cls: type, where: str) -> None:
    """Raises TypeError for one that says how to save and not how to load, or the reverse."""
    for one, other in ((SAVE, LOAD), (LOAD, SAVE)):
        if callable(getattr(cls, one, None)) and not callable(getattr(cls, other, None)):
            raise TypeError(
                f"{where}: {cls.__name__} defines {one}() and not {other}(). Define both, or neither: "
                "then its state is what pickle makes of it."
            )


class Checkpoints:
    """When the state of this process's actor is saved, and how."""

    def __init__(self, cls: Any, options: TaskOptions) -> None:
        global _actor_class
        _actor_class = self._cls = cls
        self.name = cls.__name__
        self.own_way = callable(getattr(cls, SAVE, None))
        self._every = options.checkpoint_every
        self._interval_s = options.checkpoint_interval_s
        self._calls = self._bytes = 0  # since the last one: how many, and of their arguments
        self._saved_s = monotonic()
        self.number = 0  # of the last one

    def is_due(self, args: bytes | None) -> bool:
        """A call with these arguments has ended: is it time?  Asked once a call."""
        self._calls += 1
        if args is not None:
            self._bytes += len(args)
        if self._calls == self._every or self._calls >= MAX_CALLS or self._bytes >= MAX_BYTES:
            return True
        return bool(self._interval_s) and monotonic() - self._saved_s >= self._interval_s

    def restart(self) -> None:
        """It was saved, or could not be: the next is due as long after this one."""
        self._calls = self._bytes = 0
        self._saved_s = monotonic()

    def capture(self, actor: Any) -> Serialized:
        """Raises CheckpointError, naming what cannot be pickled."""
        name = self.name
        try:
            if self.own_way:
                state = actor.save_checkpoint()
                return serialize(state, f"{name}.save_checkpoint()")
            with substituted(self._cls, _without_class):
                return serialize(actor, name)
        except Exception as error:
            raise CheckpointError(f"the state of actor {name} cannot be saved: {_said(error)}") from error

    def restore(self, construct: Callable[[], Any], data: bytes | memoryview) -> Any:
        """The actor, as it was; its arrays are its own, to write to.

        Raises CheckpointError, or what the constructor raises."""
        actor: Any = construct() if self.own_way else None
        try:
            state = deserialize(bytearray(data), writable=True)
            if not self.own_way:
                return state
            actor.load_checkpoint(state)
        except Exception as error:
            raise CheckpointError(
                f"the state of actor {self.name} cannot be made from its checkpoint {self.number}: {_said(error)}"
            ) from error
        return actor


def _said(error: BaseException) -> str:
    """What serialize() says of a part that cannot be pickled is said as it is."""
    text = in_words(error)
    return text.removeprefix("TypeError: ") if type(error) is TypeError and "cannot be pickled" in text else text
