"""Several nodes in a world of fake processes, links and disks: see cluster_simulation.py.

`python tests/cluster_simulation.py 7` replays seed 7; MINRAY_CLUSTER_SEEDS=10000 runs more of them."""

from __future__ import annotations

import inspect
import os
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cluster_simulation import World

from minray import cluster_actors, cluster_node, cluster_objects, cluster_tasks

SEEDS = int(os.environ.get("MINRAY_CLUSTER_SEEDS", "1000"))


@pytest.mark.timeout(120 + SEEDS)
@pytest.mark.parametrize("part", range(2))
def test_whatever_fails_on_several_nodes_every_task_ends_and_nothing_is_left(part: int) -> None:
    for seed in range(part * SEEDS // 2, (part + 1) * SEEDS // 2):
        try:
            World(seed, check_every=3).run()
        except Exception as error:
            raise AssertionError(f"seed {seed}: {error}\nreplay it: python tests/cluster_simulation.py {seed}") from error


def test_a_seed_is_the_same_run_under_every_hash_seed() -> None:
    code = (
        "import cluster_simulation as c; print(*[c.World(s, keep_trace=True, check_every=50).run().trace_hash() for s in range(20, 28)])"
    )
    traces = []
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        environment["PYTHONPATH"] = os.pathsep.join((os.path.dirname(__file__), str(Path(__file__).parents[1])))
        done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
        traces.append(done.stdout.split())
    assert traces[0] == traces[1]
    assert len(set(traces[0])) == 8


def changed(module: Any, function: Callable[..., Any], old: str, new: str) -> Callable[..., Any]:
    """The function, compiled anew with a line of it changed."""
    source = textwrap.dedent(inspect.getsource(function))
    assert source.count(old) == 1, f"{old!r} stands {source.count(old)} times in {function.__qualname__}"
    names: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(old, new)
    exec(compile(code, function.__qualname__, "exec"), vars(module), names)
    return names[function.__name__]  # type: ignore[no-any-return]


PLANTED = {
    "a reference is taken and never given back": (
        cluster_objects, cluster_objects.SharedObjects, "_let_go_away",
        "self._give_reference_back(away.keeper, entry.object_id)", "pass",
    ),
    "a dead node's references are kept": (
        cluster_tasks, cluster_tasks.GivenTasks, "_references_lost", "self._release_held(neighbour)", "pass",
    ),
    "a dead node's tasks are forgotten": (
        cluster_node, cluster_node.ClusterNode, "_node_gone", "self._task_lost(task, neighbour, reason)", "pass",
    ),
    "a result that names objects is let go at once": (
        cluster_tasks, cluster_tasks.GivenTasks, "_send_result", "type(entry.data) is bytes and not entry.nested", "type(entry.data) is bytes",
    ),
    "a copy that does not come is not asked for again": (
        cluster_objects, cluster_objects.SharedObjects, "handle_fetch_failed", "self._strike_off(entry, source, event.reason)", "pass",
    ),
    "calls of an actor elsewhere are not logged": (
        cluster_actors, cluster_actors.DistributedActors, "_log_result",
        "return bool(self._note_executed(worker, actor, actor.recovery, [result]))", "return True",
    ),
    "a replay's result goes to the caller": (
        cluster_actors, cluster_actors.DistributedActors, "_order_of_call",
        "task.spec.task_id in actor.recovery.replaying", "False",
    ),
    "calls of a guest that died stay where it was": (
        cluster_actors, cluster_actors.DistributedActors, "_end_guest", "self._forget_call(task)", "pass",
    ),
    "what comes back keeps its dead keeper": (
        cluster_tasks, cluster_tasks.GivenTasks, "_strike_off_node", "away.keeper, away.asked = 0, False", "pass",
    ),
    "a task comes back to its giver and is waited for twice": (
        cluster_tasks, cluster_tasks.GivenTasks, "_take_back", "del neighbour.in_flight[task.spec.task_id]", "pass",
    ),
}  # fmt: skip


@pytest.mark.one_python
@pytest.mark.timeout(300)
@pytest.mark.parametrize("bug", PLANTED)
def test_a_planted_bug_is_found(bug: str, monkeypatch: pytest.MonkeyPatch) -> None:
    module, owner, name, old, new = PLANTED[bug]
    monkeypatch.setattr(owner, name, changed(module, getattr(owner, name), old, new))
    for seed in range(2000):
        try:
            world = World(seed, check_every=20)
            world.max_events = 20_000
            world.run()
        except Exception:
            return
    pytest.fail("2000 seeds ran as if nothing were wrong")
