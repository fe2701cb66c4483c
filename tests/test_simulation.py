"""The node in a world of fake processes: see simulation.py.  `python tests/test_simulation.py 7` replays seed 7.

MINRAY_SEEDS says how many seeds the suite runs: 10,000 in .ci/run, 100,000 (an hour or less on two cores) before a release.
Whether this finds bugs is shown by those of tests/planted/, a patch each: see planted.py.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import seeds
from simulation import Simulation

SEEDS = int(os.environ.get("MINRAY_SEEDS", "1000"))
HERE = Path(__file__).parent


@pytest.mark.timeout(120 + SEEDS // 5)
def test_whatever_fails_every_task_ends_and_nothing_is_left() -> None:
    workers = len(os.sched_getaffinity(0))
    searches = [seeds.start(range(first, SEEDS, workers), str(HERE.parent)) for first in range(workers)]
    try:
        found = [seeds.outcome(search) for search in searches]
    finally:
        for search in searches:
            search.kill()
            search.wait()
    failed = sorted((one["seed"], one["said"]) for one in found if one["seed"] is not None)
    assert not failed, f"seed {failed[0][0]}: {failed[0][1]}\nreplay it: python tests/test_simulation.py {failed[0][0]}"
    assert sum(one["ran"] for one in found) == SEEDS


def test_a_seed_is_the_same_run_under_every_hash_seed() -> None:
    code = "import simulation; print(*[simulation.Simulation(s, keep_trace=True).run().trace_hash() for s in range(20, 30)])"
    traces = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        environment["PYTHONPATH"] = os.pathsep.join((str(HERE), str(HERE.parent)))
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        traces.append(done.stdout.split())
    assert traces[0] == traces[1]
    assert len(set(traces[0])) == 10


# ---------------------------------------------------------------- can it find bugs?


@pytest.mark.one_python
@pytest.mark.parametrize("bug", planted.names())
def test_a_planted_bug_is_found(bug: str) -> None:
    found = planted.search(bug)
    assert found["seed"] is not None, f"{found['ran']} seeds ran as if nothing were wrong"


def test_there_are_at_least_ten_planted_bugs() -> None:
    assert len(planted.names()) >= 10


HUNK = "A bug.\n\n--- a/minray/a.py\n+++ b/minray/a.py\n@@ -1,2 +1,2 @@\n one\n-two\n+three\n"


def test_a_patch_is_applied_where_its_context_is(tmp_path: Path) -> None:
    (tmp_path / "minray").mkdir()
    (tmp_path / "minray/a.py").write_text("zero\none\ntwo\n")
    prose, hunks = planted.parse(HUNK)
    planted.apply(hunks, tmp_path)
    assert prose == "A bug."
    assert (tmp_path / "minray/a.py").read_text() == "zero\none\nthree\n"


@pytest.mark.parametrize("source", ["one\n", "one\nTwo\n", "one\ntwo\none\ntwo\n", "one\n two\n"])
def test_a_patch_whose_source_has_changed_is_refused(source: str, tmp_path: Path) -> None:
    (tmp_path / "minray").mkdir()
    (tmp_path / "minray/a.py").write_text(source)
    with pytest.raises(planted.DoesNotApply, match=r"a\.py"):
        planted.apply(planted.parse(HUNK)[1], tmp_path)
    assert (tmp_path / "minray/a.py").read_text() == source


if __name__ == "__main__":
    simulation = Simulation(int(sys.argv[1]), keep_trace=True, check_every=seeds.check_every(int(sys.argv[1])))
    try:
        simulation.run()
    finally:
        print(*simulation.story, sep="\n")
        print(f"{simulation.events} events, {len(simulation.tasks)} tasks, trace {simulation.trace_hash()}")
