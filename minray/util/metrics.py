"""Counters, gauges and histograms that all processes of a session add to.

    >>> from minray.util import metrics
    >>> done = metrics.Counter("images_done", tag_keys=("kind",))
    >>> @minray.remote
    ... def work(kind):
    ...     done.inc(tags={"kind": kind})
    >>> _ = minray.get([work.remote(kind) for kind in ("png", "jpg", "png")])
    >>> for row in metrics.snapshot(wait_for={"images_done": 3}):
    ...     print(row["name"], row["tags"], row["value"])
    images_done {'kind': 'jpg'} 1.0
    images_done {'kind': 'png'} 2.0

Owns an actor in which the values of a session meet, and in each process what has not been
sent there: it is summed up here and sent every `SEND_EVERY_S` by a thread that is there
only while there is something to send.  So `inc` costs some microseconds, and a process that
is killed takes at most that much time of its sums along.  Values end with the session.

Left out: a metrics port to be scraped, since nothing of minray listens (`prometheus()` makes
the text for whoever wants to serve it); and a place in the GCS file.
"""

from __future__ import annotations

import re
import threading
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from contextlib import suppress
from time import monotonic, sleep
from typing import Any

import minray
from minray import api
from minray.util.apart import Apart

SEND_EVERY_S = 0.1
_ACTOR, _NAMESPACE = "metrics", "minray.util"
_NAME = re.compile(r"[a-zA-Z_:][a-zA-Z0-9_:]*")

_Key = tuple[str, str, tuple[tuple[str, str], ...]]  # type, name, tags
_Change = tuple[float, Any]  # monotonic s of the last one; what it adds up to, or is


class _Values:
    """The actor: one row for each metric and its tags."""

    def __init__(self) -> None:
        self._about: dict[tuple[str, str], str] = {}
        self._rows: dict[_Key, _Change] = {}

    def add(self, changes: dict[_Key, _Change], about: dict[tuple[str, str], str]) -> None:
        self._about.update(about)
        for key, change in changes.items():
            self._rows[key] = _merged(key[0], self._rows.get(key), change)

    def rows(self) -> list[dict[str, Any]]:
        rows = []
        for (kind, name, tags), (_, value) in sorted(self._rows.items(), key=lambda item: item[0][1:]):
            about = self._about.get((kind, name), "")
            rows.append({"name": name, "type": kind, "description": about, "tags": dict(tags), "value": value})
        return rows


def _merged(kind: str, old: _Change | None, new: _Change) -> _Change:
    if old is None:
        return new
    if kind == "gauge":  # The last one set, whoever's message comes first: the clock is the same for all processes.
        return max(old, new, key=lambda change: change[0])
    if kind == "counter":
        return new[0], old[1] + new[1]
    was, more = old[1], new[1]
    if was["boundaries"] != more["boundaries"]:
        return new  # Two histograms under one name: the newer one starts afresh.
    return new[0], {
        "boundaries": was["boundaries"],
        "buckets": [a + b for a, b in zip(was["buckets"], more["buckets"])],
        "count": was["count"] + more["count"],
        "sum": was["sum"] + more["sum"],
    }


class _Outbox:
    """What this process has not sent yet."""

    def __init__(self) -> None:
        self._lock = threading.Lock()  # Who holds it must not wait: `inc` may be called in minray's loop.
        self._sending = threading.Lock()
        self._changes: dict[_Key, _Change] = {}
        self._about: dict[tuple[str, str], str] = {}
        self._session: object = None  # of which the actor is
        self._actor: Any = None
        self._apart: Apart | None = None
        self._thread: threading.Thread | None = None

    def add(self, metric: Metric, tags: tuple[tuple[str, str], ...], value: Any) -> None:
        session = api.core().token
        key = (metric._kind, metric._name, tags)
        with self._lock:
            if session is not self._session:  # The last one has ended, and its values with it.
                self._session, self._actor, self._changes, self._apart = session, None, {}, Apart()
            self._about[key[:2]] = metric._description
            self._changes[key] = _merged(key[0], self._changes.get(key), (monotonic(), value))
            if self._thread is None:
                self._thread = threading.Thread(target=self._send_soon, name="minray-metrics", daemon=True)
                self._thread.start()

    def _send_soon(self) -> None:
        sleep(SEND_EVERY_S)
        with suppress(RuntimeError):  # The session ends.
            self.send()

    def send(self) -> None:
        with self._sending:
            with self._lock:
                if threading.current_thread() is self._thread:
                    self._thread = None  # What comes from now on needs another one.
                changes, self._changes = self._changes, {}
                about, self._about = self._about, {}
                apart = self._apart
            if changes and apart is not None and api._core is not None and api._core.token is self._session:
                with apart():
                    if self._actor is None:
                        self._actor = _values_actor()
                    # Waited for: a worker that has nothing to do sends what another thread submits with its next word.
                    minray.wait([self._actor.add.remote(changes, about)])


_outbox = _Outbox()


def _values_actor() -> Any:
    actor_class = minray.remote(_Values)
    return actor_class.options(
        name=_ACTOR, namespace=_NAMESPACE, get_if_exists=True, lifetime="detached", num_cpus=0
    ).remote()


class Metric:
    """What the three kinds have in common."""

    _kind = ""

    def __init__(self, name: str, description: str = "", tag_keys: Sequence[str] | None = None) -> None:
        if not isinstance(name, str) or not _NAME.fullmatch(name):
            raise ValueError(f"a metric's name is of letters, digits, _ and :, and begins with no digit; got {name!r}.")
        if not isinstance(tag_keys or (), (tuple, list)) or not all(isinstance(key, str) for key in tag_keys or ()):
            raise TypeError(f"tag_keys must be a tuple of strings, got {tag_keys!r}.")
        self._name = name
        self._description = description
        self._tag_keys = tuple(tag_keys or ())
        self._default_tags: dict[str, str] = {}

    def set_default_tags(self, default_tags: Mapping[str, str]) -> Metric:
        """Values of tags for calls that do not give them; returns the metric."""
        self._check_tags(default_tags)
        self._default_tags = dict(default_tags)
        return self

    @property
    def info(self) -> dict[str, Any]:
        """Its name, description, tag_keys and default_tags."""
        return {
            "name": self._name, "description": self._description, "tag_keys": self._tag_keys,
            "default_tags": self._default_tags,
        }  # fmt: skip

    def _check_tags(self, tags: Mapping[str, str]) -> None:
        for key, value in tags.items():
            if key not in self._tag_keys:
                raise ValueError(f"{self._name} has no tag {key!r}; its tag_keys are {self._tag_keys}.")
            if not isinstance(value, str):
                raise TypeError(f"the value of a tag is a string; {key!r} of {self._name} got {value!r}.")

    def _record(self, value: Any, tags: Mapping[str, str] | None) -> None:
        self._check_tags(tags or {})
        values = {**self._default_tags, **(tags or {})}
        missing = [key for key in self._tag_keys if key not in values]
        if missing:
            raise ValueError(f"{self._name} needs a value for its tag {missing[0]!r}: tags={{{missing[0]!r}: ...}}")
        _outbox.add(self, tuple((key, values[key]) for key in self._tag_keys), value)

    def _number(self, value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise TypeError(f"{self._name} takes numbers, got {value!r}.")
        return float(value)


class Counter(Metric):
    """A sum that only grows: ``counter.inc()``."""

    _kind = "counter"

    def inc(self, value: float = 1.0, tags: Mapping[str, str] | None = None) -> None:
        """Add `value`, which is more than 0."""
        if self._number(value) <= 0:
            raise ValueError(f"{self._name} is a Counter, which only grows, not by {value!r}. A Gauge may fall.")
        self._record(float(value), tags)


class Gauge(Metric):
    """A value that may rise and fall; of what several processes set, the last one holds."""

    _kind = "gauge"

    def set(self, value: float | None, tags: Mapping[str, str] | None = None) -> None:
        """It is `value` now; None changes nothing."""
        if value is not None:
            self._record(self._number(value), tags)


class Histogram(Metric):
    """How values are distributed: how many are at most each of the boundaries.

    >>> from minray.util import metrics
    >>> latency = metrics.Histogram("latency_s", boundaries=[0.1, 1])
    >>> for seconds in (0.05, 0.5, 5):
    ...     latency.observe(seconds)
    >>> metrics.snapshot()[0]["value"]
    {'boundaries': [0.1, 1.0], 'buckets': [1, 1, 1], 'count': 3, 'sum': 5.55}
    """

    _kind = "histogram"

    def __init__(
        self,
        name: str,
        description: str = "",
        boundaries: Sequence[float] | None = None,
        tag_keys: Sequence[str] | None = None,
    ) -> None:
        super().__init__(name, description, tag_keys)
        if not boundaries or any(self._number(bound) <= 0 for bound in boundaries):
            raise ValueError(f"{name} needs boundaries=[...], numbers more than 0, got {boundaries!r}.")
        self._boundaries = sorted(float(bound) for bound in boundaries)

    @property
    def info(self) -> dict[str, Any]:
        return {**super().info, "boundaries": self._boundaries}

    def observe(self, value: float, tags: Mapping[str, str] | None = None) -> None:
        """One more value."""
        buckets = [0] * (len(self._boundaries) + 1)  # the last: more than all boundaries
        buckets[bisect_left(self._boundaries, self._number(value))] = 1
        self._record({"boundaries": self._boundaries, "buckets": buckets, "count": 1, "sum": float(value)}, tags)


def snapshot(wait_for: Mapping[str, float] | None = None, timeout_s: float = 10.0) -> list[dict[str, Any]]:
    """The values of the session now: a row for each metric and its tags, by name.

    Other processes are up to 0.1 s behind; this one is not.

    Args:
        wait_for: for tests: wait until these counters, summed over their tags, have come so far;
        timeout_s: but not longer, after which TimeoutError is raised.

    Returns:
        Rows with name, type ("counter", "gauge", "histogram"), description, tags and value.
    """
    deadline = monotonic() + timeout_s
    while True:
        _outbox.send()
        rows: list[dict[str, Any]] = minray.get(_values_actor().rows.remote())
        sums: dict[str, float] = {}
        for row in rows:
            if row["type"] == "counter":
                sums[row["name"]] = sums.get(row["name"], 0) + row["value"]
        late = [name for name, value in (wait_for or {}).items() if sums.get(name, 0) < value]
        if not late:
            return rows
        if monotonic() > deadline:
            raise TimeoutError(f"{late[0]} is {sums.get(late[0], 0):g} after {timeout_s:g} s, not {wait_for}.")
        sleep(SEND_EVERY_S / 4)


def prometheus() -> str:
    """The values of the session now, in the text format of Prometheus."""
    lines = []
    seen = set()
    for row in snapshot():
        name, kind, value = row["name"], row["type"], row["value"]
        name += "_total" if kind == "counter" else ""
        if name not in seen:
            seen.add(name)
            lines += [f"# HELP {name} {row['description']}", f"# TYPE {name} {kind}"]
        if kind != "histogram":
            lines.append(f"{name}{_labels(row['tags'])} {value:g}")
            continue
        below = 0
        for bound, count in zip([*value["boundaries"], float("inf")], value["buckets"]):
            below += count
            le = "+Inf" if bound == float("inf") else f"{bound:g}"
            lines.append(f"{name}_bucket{_labels({**row['tags'], 'le': le})} {below}")
        lines.append(f"{name}_sum{_labels(row['tags'])} {value['sum']:g}")
        lines.append(f"{name}_count{_labels(row['tags'])} {value['count']}")
    return "".join(f"{line}\n" for line in lines)


def _labels(tags: Mapping[str, str]) -> str:
    escaped = {key: value.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n") for key, value in tags.items()}
    return "{" + ",".join(f'{key}="{value}"' for key, value in escaped.items()) + "}" if tags else ""


__all__ = ["Counter", "Gauge", "Histogram", "Metric", "prometheus", "snapshot"]
