"""The clock that does not jump."""

from __future__ import annotations

import time
from typing import Any

import pytest

import minray
from minray import clock


def test_it_tells_the_time() -> None:
    assert abs(clock.now() - time.time()) < 60


@pytest.mark.parametrize("jump_s", [3600, -3600, 10 * 365 * 86400, -10 * 365 * 86400])
def test_a_wall_clock_that_jumps_changes_nothing(session: Any, monkeypatch: pytest.MonkeyPatch, jump_s: int) -> None:
    @minray.remote
    def work(x: int) -> int:
        return x + 1

    assert minray.get(work.remote(1), timeout=60) == 2
    true_time = time.time
    monkeypatch.setattr(time, "time", lambda: true_time() + jump_s)
    # A task behind a long one is fetched by the idle worker, which takes a deadline of the node's.
    started = time.monotonic()
    assert minray.get([work.remote(i) for i in range(200)], timeout=60) == list(range(1, 201))
    with pytest.raises(minray.exceptions.GetTimeoutError):
        minray.get(minray.remote(num_cpus=2)(time.sleep).remote(0.3), timeout=0.05)
    assert time.monotonic() - started < 60  # Not an hour.
