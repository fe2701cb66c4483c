"""The node in a world of fake processes: see simulation.py.  `python tests/test_simulation.py 7` replays seed 7."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from simulation import Simulation

from minray import lineage, node, scheduler

SEEDS = int(os.environ.get("MINRAY_SEEDS", "1000"))


@pytest.mark.timeout(60 + SEEDS)
@pytest.mark.parametrize("part", range(4))
def test_whatever_fails_every_task_ends_and_nothing_is_left(part: int) -> None:
    for seed in range(part * SEEDS // 4, (part + 1) * SEEDS // 4):
        try:
            Simulation(seed).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\nreplay it: python tests/test_simulation.py {seed}") from error


def test_a_seed_is_the_same_run_under_every_hash_seed() -> None:
    code = "import simulation; print(*[simulation.Simulation(s, keep_trace=True).run().trace_hash() for s in range(20, 30)])"
    traces = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        environment["PYTHONPATH"] = os.pathsep.join((os.path.dirname(__file__), str(Path(__file__).parents[1])))
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        traces.append(done.stdout.split())
    assert traces[0] == traces[1]
    assert len(set(traces[0])) == 10


# ---------------------------------------------------------------- can it find bugs?  Ten planted ones, each found.


def changed(module: Any, function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """The function, compiled anew with a line of it changed."""
    import inspect
    import textwrap

    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__qualname__}"
    names: dict[str, Any] = {}
    exec(compile("from __future__ import annotations\n" + source.replace(old, new), function.__qualname__, "exec"), vars(module), names)
    return names[function.__name__]  # type: ignore[no-any-return]


PLANTED = {
    "the fence is dropped": (node, node.Node, "handle", "return []  # The fence.", "pass"),
    "a lent CPU is given back twice": (scheduler, scheduler.Scheduler, "_end_lease", 'name != "CPU" or not worker.blocked', "True"),
    "a blocked worker keeps its CPU": (scheduler, scheduler.Scheduler, "block", "self._adjust_cpu(worker, +1)", "pass"),
    "a dead worker's refs are kept": (node, node.Node, "_forget_worker", "self.lineage.release(object_id)", "pass"),
    "a dead worker's tasks are forgotten": (node, node.Node, "handle_worker_died", "self._run_again(task)", "pass"),
    "refs in arguments are not held": (lineage, lineage.Lineage, "_hold_arguments", "in task.spec.nested", "in ()"),
    "memory in view is used again": (lineage, lineage.Lineage, "release", "entry.refs <= 0 and not entry.pins", "entry.refs <= 0"),
    "calls go back in the wrong order": (node, node.Node, "_actor_worker_died", "reversed(list(enumerate(calls)))", "list(enumerate(calls))"),
    "a cancelled task keeps its place": (scheduler, scheduler.Shape, "remove", "self.gaps += 1", "pass"),
    "the second attempt's child is lost": (lineage, lineage.Lineage, "hold", "task.state < FINISHED", "False"),
}


@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, owner, name, old, new = PLANTED[bug]
    monkeypatch.setattr(owner, name, changed(module, getattr(owner, name), old, new))
    for seed in range(400):
        try:
            Simulation(seed).run()
        except Exception:
            return
    pytest.fail("400 seeds ran as if nothing were wrong")


if __name__ == "__main__":
    simulation = Simulation(int(sys.argv[1]), keep_trace=True)
    try:
        simulation.run()
    finally:
        print(*simulation.story, sep="\n")
        print(f"{simulation.events} events, {len(simulation.tasks)} tasks, trace {simulation.trace_hash()}")
