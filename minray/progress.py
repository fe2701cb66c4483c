"""`minray.progress(refs)`: a tqdm bar over results that are on their way.

Owns the loop that waits and draws, nothing else: it uses the public `wait` and `get`, as
a user's own would.  tqdm is imported at the first call, so `import minray` does not pay
for it; `tqdm.auto` chooses between a terminal's bar and a notebook's.

Each turn waits for *all* that is pending, but at most a tenth of a second.  Waiting for
one at a time would be quadratic in the number of refs; this way a bar over 100,000 tasks
costs a few per cent of one core.  Ten pictures a second is also what tqdm draws.

Considered and left out: yielding results as they come (`wait` is made for that, and reads
better than a second meaning of the same function), and ending at the first error (the
bar says how far the tasks are, `get` says how they went).
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

TURN_S = 0.1


def progress(refs: Iterable[Any], desc: str | None = None, **tqdm_options: Any) -> list[Any]:
    """Show a progress bar until all `refs` are ready; return their values, in order.

    Args:
        refs: ObjectRefs, in a list or any other iterable (a generator that submits tasks
            is run to its end first).
        desc: what stands in front of the bar.
        tqdm_options: passed on to `tqdm.auto.tqdm` (``unit="images"``, ``leave=False``, …).

    Raises what `minray.get(refs)` raises, after all of them are ready or have failed.

        values = minray.progress([resize.remote(path) for path in paths], desc="resize", unit="images")
    """
    from tqdm.auto import tqdm

    import minray

    if isinstance(refs, minray.ObjectRef):
        raise TypeError(
            "progress() takes a list of ObjectRefs, got a single one. Did you mean progress([ref])?"
        )
    refs = list(refs)
    pending = list(dict.fromkeys(refs))  # wait() refuses duplicates; get() does not.
    with tqdm(**{"total": len(pending), "desc": desc, "unit": "task", **tqdm_options}) as bar:
        while pending:
            ready, pending = minray.wait(pending, num_returns=len(pending), timeout=TURN_S)
            bar.update(len(ready))
            bar.refresh()  # The elapsed time moves on even where no task has ended.
    values: list[Any] = minray.get(refs)
    return values
