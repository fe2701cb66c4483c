"""Whether a driver ended well stands in its job's row."""

from __future__ import annotations

import contextlib
import os
import sqlite3
import sys

import pytest

import minray
from minray import ending
from minray.session import find

START = "import minray, sys\nminray.init(num_cpus=1)\n"


def status() -> str:
    """Of the job that has ended last."""
    path = os.path.join(find() or "", "gcs.sqlite")
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        ((found,),) = database.execute("SELECT status FROM job_view").fetchall()
    return str(found)


@pytest.mark.parametrize(
    "end, exit_status, expected",
    [
        ("", 0, "SUCCEEDED"),
        ("sys.exit()", 0, "SUCCEEDED"),
        ("sys.exit(0)", 0, "SUCCEEDED"),
        ("sys.exit(3)", 3, "FAILED"),
        ("sys.exit('no')", 1, "FAILED"),
        ("1 / 0", 1, "FAILED"),
        ("raise KeyboardInterrupt", -2, "FAILED"),
        ("try: sys.exit(3)\nexcept SystemExit as e: assert e.code == 3", 0, "SUCCEEDED"),
        ("try: 1 / 0\nexcept ZeroDivisionError: pass", 0, "SUCCEEDED"),
        ("try: 1 / 0\nfinally: minray.shutdown()", 1, "FAILED"),
        ("try: sys.exit(0)\nfinally: minray.shutdown()", 0, "SUCCEEDED"),
        ("minray.shutdown()\nsys.exit(3)", 3, "SUCCEEDED"),  # The job had ended well.
        ("minray.shutdown()\nminray.init(num_cpus=1)\nsys.exit(3)", 3, "FAILED"),
    ],
)
def test_a_driver_that_ends_by_an_error_has_failed(run_driver, end, exit_status, expected):
    run_driver(START + end, expect_status=exit_status)
    assert status() == expected


def test_a_with_block_that_an_error_leaves_has_failed():
    with pytest.raises(KeyError), minray.init(num_cpus=1):
        raise KeyError
    assert status() == "FAILED"
    with minray.init(num_cpus=1):
        pass
    assert status() == "SUCCEEDED"


def test_sys_exit_is_what_it_was_when_nobody_watches_any_more(monkeypatch):
    before = sys.exit
    watching = ending.Ending()
    with pytest.raises(SystemExit) as caught:
        sys.exit(7)
    assert caught.value.code == 7 and sys.exit is not before
    assert not watching.is_bad()  # It was caught.
    watching.unwatch()
    assert sys.exit is before
    # What somebody else has put in its place stays.
    watching = ending.Ending()
    monkeypatch.setattr(sys, "exit", print)
    watching.unwatch()
    assert sys.exit is print
