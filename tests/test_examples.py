"""The examples are run as a reader would run them, on inputs small enough for a test.

Each is a program of its own, so each runs in a process of its own, with a session
directory of its own; what is checked is what it printed and how it ended.
"""

import contextlib
import os
import re
import sqlite3
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_python

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = ROOT / "examples"


@pytest.fixture
def run_example(tmp_path):
    """Runs one example; returns what it printed, after a check of its exit status."""

    def run(name, *arguments, expect_status=0, timeout_s=60):
        search_path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
        ended = subprocess.run(
            [sys.executable, str(EXAMPLES / name), *arguments],
            cwd=tmp_path,
            env={**os.environ, "MINRAY_HOME": str(tmp_path / "home"), "PYTHONPATH": search_path},
            capture_output=True,
            text=True,
            stdin=subprocess.DEVNULL,
            timeout=timeout_s,
        )
        shown = f"--- stdout\n{ended.stdout}\n--- stderr\n{ended.stderr}"
        assert ended.returncode == expect_status, f"{name} ended with status {ended.returncode}\n{shown}"
        assert "Exception ignored" not in ended.stderr, shown
        return ended.stderr if expect_status else ended.stdout

    return run


def test_word_count_agrees_with_a_plain_loop(run_example):
    printed = run_example("01_word_count.py", "--files=40", "--files-per-task=7")
    assert "40 files of" in printed
    assert "6 tasks took" in printed
    assert "their counts agree" in printed


def test_external_sort_spills_and_verifies(run_example):
    printed = run_example("02_external_sort.py", "--megabytes=24", "--store-megabytes=8", "--parts=6")
    assert "sorted 240,000 records" in printed
    assert "verified" in printed
    spilled = re.search(r"(\d+) MB of it were spilled", printed)
    # All of 24 MB is alive between the stages, and 8 of it at most can be in memory.
    assert spilled is not None and int(spilled[1]) >= 16, printed


def test_external_sort_of_what_fits_does_not_spill(run_example):
    printed = run_example("02_external_sort.py", "--megabytes=4", "--store-megabytes=32", "--parts=3")
    assert "0 MB of it were spilled" in printed
    assert "verified" in printed


def test_parameter_server_learns_the_digits(run_example):
    pytest.importorskip("sklearn")
    printed = run_example("03_parameter_server.py", "--steps=500")
    final = re.search(r"^accuracy ([\d.]+)%", printed, re.MULTILINE)
    assert final is not None and float(final[1]) >= 90, printed


def test_evolution_strategies_solve_cartpole(run_example):
    pytest.importorskip("gymnasium")
    printed = run_example("04_evolution_strategies.py", "--noise-megabytes=1")
    final = re.search(r"^mean score ([\d.]+) over 100 new episodes", printed, re.MULTILINE)
    assert final is not None and float(final[1]) >= 475, printed


def test_evolution_strategies_say_when_they_give_up(run_example):
    pytest.importorskip("gymnasium")
    printed = run_example(
        "04_evolution_strategies.py", "--generations=1", "--directions=2", "--noise-megabytes=1"
    )
    assert "not solved after 1 generations" in printed


def test_the_demo_shows_every_example_a_summary_and_a_picture(run_example, tmp_path):
    for needed in ("sklearn", "gymnasium", "matplotlib"):
        pytest.importorskip(needed)
    printed = run_example("demo.py", "--tiny", timeout_s=100)
    for headline in ("01_word_count", "02_external_sort", "03_parameter_server", "04_evolution_strategies"):
        assert f"=== examples/{headline}.py" in printed
    summary = printed.split("What the GCS has recorded")[1]
    for function in ("count_words", "split", "merge", "ParameterServer.apply", "Player.compare"):
        assert re.search(rf"\b{re.escape(function)}\b", summary), function
    assert (tmp_path / "demo-timeline.png").read_bytes().startswith(b"\x89PNG")


def test_a_task_that_raises_shows_its_own_lines_and_the_cause(run_example):
    error = run_example("failing_on_purpose/01_task_raises.py", expect_status=1)
    assert "could not convert string to float: '0,55'" in error
    assert "the direct cause of" in error
    assert "LookupError: the price list has no usable price for 'pear'" in error
    assert "return float(PRICES[fruit])" in error


def test_a_worker_that_is_killed_is_named_with_its_signal(run_example):
    error = run_example("failing_on_purpose/02_worker_is_killed.py", expect_status=1)
    assert "WorkerCrashedError" in error
    assert "SIGKILL" in error
    assert "attempt 2 of 2" in error


def test_an_argument_that_cannot_be_pickled_is_named_by_its_path(run_example):
    error = run_example("failing_on_purpose/03_argument_cannot_be_pickled.py", expect_status=1)
    assert "TypeError" in error
    assert ".lock" in error


def test_an_actor_whose_constructor_fails_says_why(run_example):
    error = run_example("failing_on_purpose/04_actor_constructor_fails.py", expect_status=1)
    assert "ActorDiedError" in error
    assert "No such file or directory: '/sys/no/such/sensor'" in error


def test_every_example_is_tested_here_and_says_what_it_shows():
    here = Path(__file__).read_text(encoding="utf-8")
    programs = sorted(EXAMPLES.rglob("*.py"))
    assert len(programs) >= 9
    for program in programs:
        assert f'{program.name}"' in here, f"no test runs {program}"
        assert program.read_text(encoding="utf-8").startswith('"""'), f"{program} has no docstring"


def test_a_killed_search_goes_on_where_it_was(run_example, tmp_path):
    arguments = ("--epochs=2", f"--storage={tmp_path / 'search.sqlite'}")
    run_example("05_resume.py", *arguments, "--die-after=7", expect_status=-9)
    printed = run_example("05_resume.py", *arguments)
    assert "the best of 6 is" in printed
    assert run_example("05_resume.py", *arguments) == printed
    with contextlib.closing(sqlite3.connect(tmp_path / "search.sqlite")) as storage:
        runs = storage.execute("SELECT known, reused, ran FROM runs ORDER BY no").fetchall()
    assert runs[0] == (0, None, None), "killed"
    assert runs[1][0] >= 7 and runs[1][1] + runs[1][2] == 36
    assert runs[2] == (36, 36, 0)
