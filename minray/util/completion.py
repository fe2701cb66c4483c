"""Results in the order in which they come: `as_completed` and `map_unordered`.

Loops around `minray.wait`, as a program would write them.  Their one trick: each turn takes
all that is ready (up to `chunk_size`), because to wait for one of n refs looks at all n.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import minray
from minray import ObjectRef


def as_completed(
    refs: Sequence[ObjectRef[Any]], *, chunk_size: int = 10, yield_obj_refs: bool = False
) -> Iterator[Any]:
    """The values of `refs`, each as soon as it is ready.

    Args:
        refs: ObjectRefs, each once.
        chunk_size: how many are taken at a time if so many are ready.
        yield_obj_refs: give the refs, whose values are then ready, instead of the values.

    Raises what `minray.get` raises, when it is the turn of a task that failed.

    >>> @minray.remote
    ... def nap(seconds):
    ...     import time
    ...     time.sleep(seconds)
    ...     return seconds
    >>> list(minray.util.as_completed([nap.remote(0.5), nap.remote(0.0)]))
    [0.0, 0.5]
    """
    _check(chunk_size, "chunk_size")
    pending = list(refs)
    while pending:
        ready, pending = _ready(pending, chunk_size)
        yield from _of(ready, yield_obj_refs)


def map_unordered(
    fn: Any, items: Iterable[Any], *, backpressure_size: int | None = 100, chunk_size: int = 10,
    yield_obj_refs: bool = False,
) -> Iterator[Any]:  # fmt: skip
    """The values of ``fn.remote(item)`` for all items, each as soon as it is ready.

    Args:
        fn: a remote function, or a method of an actor.
        items: read as far as there is room, so they may be endless.
        backpressure_size: how many tasks may be unfinished or unread; None: no limit, all items are read first.
        chunk_size, yield_obj_refs: see `as_completed`.

    >>> @minray.remote
    ... def square(x):
    ...     return x * x
    >>> sorted(minray.util.map_unordered(square, range(5)))
    [0, 1, 4, 9, 16]
    """
    _check(chunk_size, "chunk_size")
    if backpressure_size is not None:
        _check(backpressure_size, "backpressure_size")
    source = iter(items)
    pending: list[ObjectRef[Any]] = []
    exhausted = False
    while pending or not exhausted:
        while not exhausted and (backpressure_size is None or len(pending) < backpressure_size):
            try:
                pending.append(fn.remote(next(source)))
            except StopIteration:
                exhausted = True
        if pending:
            ready, pending = _ready(pending, chunk_size)
            yield from _of(ready, yield_obj_refs)


def _check(count: int, name: str) -> None:
    if type(count) is not int or count < 1:
        raise ValueError(f"{name} must be an integer, 1 or more, got {count!r}.")


def _ready(pending: list[ObjectRef[Any]], at_most: int) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
    minray.wait(pending)
    return minray.wait(pending, num_returns=min(at_most, len(pending)), timeout=0)


def _of(ready: list[ObjectRef[Any]], yield_obj_refs: bool) -> Iterator[Any]:
    while ready:
        ref = ready.pop(0)
        yield ref if yield_obj_refs else minray.get(ref)
