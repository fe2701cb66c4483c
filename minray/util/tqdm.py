"""Progress bars in tasks and actors: `tqdm`, with the interface that tqdm's bars have in Ray.

In the driver it is a bar of tqdm.  A worker has no terminal, and its output travels by
lines to the driver; there a bar is a line every `flush_interval_s` seconds, and a last
one at the end, under the name of the task like all that it prints:

    (train pid=4711) epoch:  40%|####      | 4/10 [00:08<00:12,  2.00s/it]

So bars of many workers, and what else they print, stay readable side by side and in the
logs.  Left out: bars of workers that move in the driver's terminal; `minray.progress` has
one over tasks.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sized
from time import monotonic
from typing import Any

from minray import api

FLUSH_INTERVAL_S = 2.0


class tqdm:
    """A bar over `iterable`, or one that `update` moves.

    Args:
        iterable: what is gone through.
        desc: what stands in front.
        total: of how many; default: the iterable's length, if it has one.
        unit: of what.
        position: on which line of the terminal, in the driver.
        flush_interval_s: in a worker, so many seconds lie between two lines.

    >>> from minray.util.tqdm import tqdm
    >>> [epoch for epoch in tqdm(range(3), desc="epoch")]  # in a task in the same way
    [0, 1, 2]
    """

    def __init__(
        self,
        iterable: Iterable[Any] | None = None,
        desc: str | None = None,
        total: int | None = None,
        unit: str | None = None,
        position: int | None = None,
        flush_interval_s: float = FLUSH_INTERVAL_S,
    ) -> None:
        from tqdm.auto import tqdm as real_tqdm

        if total is None and isinstance(iterable, Sized):
            total = len(iterable)
        self._iterable = iterable
        self._format = real_tqdm.format_meter
        self._interval_s = flush_interval_s
        self._bar: Any = None
        self.desc, self.total, self.unit, self.n = desc or "", total, unit or "it", 0
        self._started_s = self._shown_s = monotonic()
        self._closed = False
        if api._core is None or not api._core.client:
            self._bar = real_tqdm(total=total, desc=desc, unit=self.unit, position=position)

    def __iter__(self) -> Iterator[Any]:
        if self._iterable is None:
            raise TypeError("this bar has no iterable to go through: tqdm(iterable), or update() it.")
        try:
            for item in self._iterable:
                yield item
                self.update(1)
        finally:
            self.close()

    def update(self, n: int = 1) -> None:
        """Move on by `n`."""
        self.n += n
        if self._bar is not None:
            self._bar.update(n)
        elif monotonic() - self._shown_s >= self._interval_s:
            self.refresh()

    def set_description(self, desc: str) -> None:
        """Change what stands in front."""
        self.desc = desc
        if self._bar is not None:
            self._bar.set_description(desc)

    def refresh(self) -> None:
        """Show it now."""
        if self._bar is not None:
            self._bar.refresh()
            return
        self._shown_s = monotonic()
        elapsed_s = self._shown_s - self._started_s
        prefix = f"{self.desc}: " if self.desc else ""
        print(self._format(self.n, self.total, elapsed_s, ncols=80, ascii=True, unit=self.unit, prefix=prefix))

    def close(self) -> None:
        """The end: show it a last time.  Again it does nothing."""
        if self._closed:
            return
        self._closed = True
        if self._bar is not None:
            self._bar.close()
        elif self.n:
            self.refresh()

    def __enter__(self) -> tqdm:
        return self

    def __exit__(self, *exc: Any) -> None:
        self.close()


def safe_print(*args: Any, **kwargs: Any) -> None:
    """As `print`, without tearing a bar of this process apart."""
    if api._core is not None and api._core.client:
        print(*args, **kwargs)
        return
    from tqdm.auto import tqdm as real_tqdm

    with real_tqdm.external_write_mode(file=kwargs.get("file", sys.stdout)):
        print(*args, **kwargs)


__all__ = ["safe_print", "tqdm"]
