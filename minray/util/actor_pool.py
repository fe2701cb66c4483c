"""`ActorPool`: work spread over actors that the caller made.

Owns who is idle, which calls are on their way, and what waits for an actor; nothing of it
is known to the node, to which these are calls like any other.

An actor is busy until the pool has seen its call end, and the pool looks only while
somebody waits for a result: no thread of its own, no callbacks.  Whoever waits for a
result in order hands out work to *every* actor that becomes free meanwhile, so that one
slow call does not keep the others idle.

Left out: a pool that restarts its actors; that is their own option (`max_restarts`).
"""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Iterable, Iterator
from time import monotonic
from typing import Any

import minray
from minray import ActorHandle, ObjectRef

Work = Callable[[ActorHandle, Any], "ObjectRef[Any]"]


class ActorPool:
    """A pool of actors; each is given one call at a time.

    >>> @minray.remote
    ... class Doubler:
    ...     def double(self, x):
    ...         return 2 * x
    >>> pool = minray.util.ActorPool([Doubler.remote(), Doubler.remote()])
    >>> list(pool.map(lambda actor, x: actor.double.remote(x), [1, 2, 3, 4]))
    [2, 4, 6, 8]
    """

    def __init__(self, actors: Iterable[ActorHandle]) -> None:
        self._idle: deque[ActorHandle] = deque(actors)
        self._busy: dict[ObjectRef[Any], ActorHandle] = {}  # by the call, which has not ended as far as is known
        self._waiting: deque[tuple[int, Work, Any]] = deque()  # for an actor
        # Results to hand out, oldest first; None: it waits.  Ordered: a dict finds its first item the slower, the more
        # were taken from it.
        self._unread: OrderedDict[int, ObjectRef[Any] | None] = OrderedDict()
        self._submitted = 0

    # ------------------------------------------------------------ one at a time

    def submit(self, fn: Work, value: Any) -> None:
        """Call ``fn(actor, value)``, which returns a ref, with the first actor that is free."""
        self._waiting.append((self._submitted, fn, value))
        self._unread[self._submitted] = None
        self._submitted += 1
        self._hand_out()

    def has_next(self) -> bool:
        """Whether there are results that were not handed out."""
        return bool(self._unread)

    def get_next(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """The oldest result that was not handed out; waits for it.

        Args:
            timeout: seconds to wait at most; None: without end.
            ignore_if_timedout: should time be over, drop this result, so that the next call goes on with the next.

        Raises:
            StopIteration: everything was handed out.
            TimeoutError: the result was not there in time.  The call goes on.
        """
        return self._next(self._first_if_ready, timeout, ignore_if_timedout)

    def get_next_unordered(self, timeout: float | None = None, ignore_if_timedout: bool = False) -> Any:
        """Any result that is there; waits for one.  Arguments and errors as those of `get_next`.

        >>> @minray.remote
        ... class Sleeper:
        ...     def nap(self, seconds):
        ...         import time
        ...         time.sleep(seconds)
        ...         return seconds
        >>> pool = minray.util.ActorPool([Sleeper.remote(), Sleeper.remote()])
        >>> for seconds in (1.0, 0.0):
        ...     pool.submit(lambda actor, x: actor.nap.remote(x), seconds)
        >>> pool.get_next_unordered(), pool.get_next_unordered()
        (0.0, 1.0)
        """
        return self._next(self._any_if_ready, timeout, ignore_if_timedout)

    # ------------------------------------------------------------ many

    def map(self, fn: Work, values: Iterable[Any]) -> Iterator[Any]:
        """Submit `fn` for all values; an iterator over their results, in order.

        Results of earlier `submit`s that were not handed out are dropped.
        """
        self._submit_all(fn, values)
        return self._drain(self.get_next)

    def map_unordered(self, fn: Work, values: Iterable[Any]) -> Iterator[Any]:
        """As `map`, but the results come in the order in which they are ready."""
        self._submit_all(fn, values)
        return self._drain(self.get_next_unordered)

    def _submit_all(self, fn: Work, values: Iterable[Any]) -> None:
        self._unread.clear()
        self._waiting.clear()
        for value in values:
            self.submit(fn, value)

    def _drain(self, next_result: Callable[[], Any]) -> Iterator[Any]:
        while self.has_next():
            yield next_result()

    # ------------------------------------------------------------ the actors

    def has_free(self) -> bool:
        """Whether an actor is idle and nothing waits for one."""
        return bool(self._idle) and not self._waiting

    def pop_idle(self) -> ActorHandle | None:
        """Take an idle actor out of the pool; None if there is none."""
        return self._idle.popleft() if self.has_free() else None

    def push(self, actor: ActorHandle) -> None:
        """Add an actor.  Raises ValueError if it is in the pool already."""
        if actor in self._idle or actor in self._busy.values():
            raise ValueError(f"{actor!r} is in the pool already.")
        self._idle.append(actor)
        self._hand_out()

    # ------------------------------------------------------------ inside

    def _hand_out(self) -> None:
        while self._idle and self._waiting:
            index, fn, value = self._waiting.popleft()
            actor = self._idle.popleft()
            try:
                ref = fn(actor, value)
                if not isinstance(ref, ObjectRef) or ref in self._busy:
                    raise TypeError(
                        f"the function given to an ActorPool must return the ObjectRef of a new call, got {ref!r}. "
                        "Did you mean lambda actor, value: actor.method.remote(value)?"
                    )
            except BaseException:  # Nothing was submitted: nobody shall wait for it.
                self._idle.appendleft(actor)
                self._unread.pop(index, None)
                raise
            self._busy[ref] = actor
            if index in self._unread:
                self._unread[index] = ref

    def _next(self, find: Callable[[], int | None], timeout: float | None, drop: bool) -> Any:
        if not self._unread:
            raise StopIteration("the pool has no results left; submit() more work first.")
        deadline = None if timeout is None else monotonic() + timeout
        index = find()
        while index is None:
            if not self._see_ends(None if deadline is None else max(0.0, deadline - monotonic())):
                if drop:
                    self._drop(next(iter(self._unread)))
                raise TimeoutError(f"no result within {timeout:g} s. The call goes on.")
            index = find()
        ref = self._unread.pop(index)
        return minray.get(ref)

    def _first_if_ready(self) -> int | None:
        index, ref = next(iter(self._unread.items()))
        return index if ref is not None and ref not in self._busy else None

    def _any_if_ready(self) -> int | None:
        for index, ref in self._unread.items():
            if ref is None:
                break  # It waits for an actor, and so do all that came after it.
            if ref not in self._busy:
                return index
        return None

    def _see_ends(self, timeout: float | None) -> bool:
        """Wait for the end of a call; whoever has ended gets new work.  False: none did in time."""
        calls = list(self._busy)
        if not calls:
            raise RuntimeError("work waits in the pool, which has no actors. Add one: pool.push(actor)")
        ready, _ = minray.wait(calls, timeout=timeout)
        if ready:
            more, _ = minray.wait(calls, num_returns=len(calls), timeout=0)
            for ref in more:
                self._idle.append(self._busy.pop(ref))
            self._hand_out()
        return bool(ready)

    def _drop(self, index: int) -> None:
        del self._unread[index]
        self._waiting = deque(item for item in self._waiting if item[0] != index)
