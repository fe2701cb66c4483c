"""Leader, followers, caretaker: what may come between two lines of them."""

import threading

import pytest

from minray.loop import Loop, Waiter


class LateSleeper(Waiter):
    """Between its entry among the followers and its sleep others may do anything."""

    __slots__ = ("entered", "go_on")

    def __init__(self):
        super().__init__()
        self.entered, self.go_on = threading.Event(), threading.Event()

    def sleep(self, timeout_s):
        self.entered.set()
        self.go_on.wait()
        super().sleep(timeout_s)


def test_a_turn_to_lead_that_comes_before_the_sleep_is_not_slept_through(monkeypatch):
    monkeypatch.setattr("minray.loop.RECHECK_S", 60.0)
    news, first, second = threading.Event(), Waiter(), LateSleeper()

    def poll(timeout_s, caretaking):
        news.wait(timeout_s)
        (second if first.done else first).set()

    loop = Loop(poll, lambda: None, "not started")
    threads = [threading.Thread(target=loop.wait, args=(waiter,), daemon=True) for waiter in (first, second)]
    for thread in threads:
        thread.start()
        while not loop._lead.locked():
            pass
    second.entered.wait()
    news.set()
    threads[0].join()  # It has rung for the second, which does not sleep yet.
    second.go_on.set()
    threads[1].join(timeout=60)
    assert second.done


def test_who_waits_while_it_leads_is_told_instead_of_waiting_for_ever():
    outer = Waiter()

    def poll(timeout_s, caretaking):
        with pytest.raises(RuntimeError, match="callback of a future"):
            loop.wait(Waiter())
        outer.set()

    loop = Loop(poll, lambda: None, "not started")
    assert loop.wait(outer)
