"""What is run in the simulated world: a flood of tasks, and the paper's experiments.

Each builds a `World`, runs it, and returns an `Outcome`: the figures to print, and lines to draw.  Programs are
generators (see `Context`), as short as the real ones would be.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from minray.cluster_messages import HEAD
from minray.policy import Policy
from minray.simulator.costs import Costs
from minray.simulator.world import Code, Context, Kind, World
from minray.task_spec import ACTOR_CREATION, ACTOR_METHOD, TASK, UNIT, ActorOptions, TaskOptions

FUNCTION = b"f" * 16
CPU = (("CPU", UNIT),)
BATCH = 500
"""A spawner submits so many tasks at a time, if not told otherwise, and has up to twice as many in the air."""
CHUNK = 2000
"""So many tasks are one call of a spawner: what is done again if its node dies."""

FAULTS = ("kill_node", "join_node", "cut_node", "slow_node")


class Fault(NamedTuple):
    what: str  # of FAULTS
    at_s: float
    argument: float | None


class Line(NamedTuple):
    """To be drawn: y over x."""

    name: str
    points: list[tuple[float, float]]


class Outcome(NamedTuple):
    title: str
    figures: dict[str, Any]
    lines: list[Line]
    axes: tuple[str, str]


class EverythingThroughHead(Policy):
    """One global scheduler: a node keeps no task of its own."""

    def keeps(self, waiting: int, mean_s: float | None, slots: int) -> bool:
        return False


def parse_faults(text: str) -> list[Fault]:
    """``kill_node@5,cut_node:2@8``: what, an argument if it has one, and when.  Raises ValueError."""
    faults = []
    for part in filter(None, text.split(",")):
        what, _, seconds = part.partition("@")
        what, has_argument, argument = what.partition(":")
        try:
            fault = Fault(what, float(seconds), float(argument) if has_argument else None)
        except ValueError:
            fault = None
        if fault is None or what not in FAULTS or not 0 <= fault.at_s < math.inf:
            raise ValueError(
                f"{part!r} is no fault. Write WHAT@SECONDS or WHAT:ARGUMENT@SECONDS, WHAT being {', '.join(FAULTS)}."
            )
        if fault.argument is not None and not _is_argument(what, fault.argument):
            raise ValueError(f"{part!r}: {ARGUMENTS[what]}")
        faults.append(fault)
    return faults


ARGUMENTS = {
    "kill_node": "the argument is the number of a node, from 2: node 1 is the head, which has the driver",
    "join_node": "it takes no argument",
    "cut_node": "the argument is for how many seconds, above 0",
    "slow_node": "the argument is how many times slower it runs, above 0",
}


def _is_argument(what: str, value: float) -> bool:
    if what == "kill_node":
        return value > HEAD and value.is_integer()
    return what != "join_node" and 0 < value < math.inf


def plan(world: World, faults: list[Fault]) -> None:
    for fault in faults:
        if fault.what == "kill_node":
            world.at(fault.at_s, world.kill_node, None if fault.argument is None else int(fault.argument))
        elif fault.what == "join_node":
            world.at(fault.at_s, world.join_node)
        elif fault.what == "cut_node":
            world.at(fault.at_s, world.cut_node, 1.0 if fault.argument is None else fault.argument)
        else:
            world.at(fault.at_s, world.slow_node, 10.0 if fault.argument is None else fault.argument)


# ---------------------------------------------------------------- a flood of tasks


def flood_kinds(task_s: float) -> dict[str, Kind]:
    return {
        "task": Kind(TaskOptions(TASK, FUNCTION, "task", resources=CPU), float(task_s)),
        "Spawner": Kind(TaskOptions(ACTOR_CREATION, FUNCTION, "Spawner.__init__", max_retries=0), 0.0),
        "spawn": Kind(TaskOptions(ACTOR_METHOD, b"", "Spawner.spawn", method="spawn", max_retries=-1), spawn),
    }


def spawn(task: Context) -> Code:
    """Submit so many tasks and wait for them."""
    left, batch = task.args
    older: list[bytes] = []
    while left or older:
        newer = task.submit("task", min(batch, left)) if left else []
        left -= len(newer)
        if older:
            yield task.wait(older)
            task.drop(older)
        older = newer


def flood(num_tasks: int, num_spawners: int, batch: int = BATCH) -> Callable[[Context], Code]:
    """A driver whose tasks are submitted by actors all over the cluster, as each node of the paper's has a driver."""

    def main(driver: Context) -> Code:
        options = ActorOptions("Spawner", max_restarts=-1)
        spawners = [driver.submit("Spawner", actor=None, options=options)[0] for _ in range(num_spawners)]
        yield driver.wait(spawners)
        left = num_tasks
        calls: dict[bytes, bytes] = {}  # to which spawner

        def give(spawner: bytes) -> None:
            nonlocal left
            count = min(left, CHUNK, max(BATCH, math.ceil(left / num_spawners / 2)))
            if count:
                left -= count
                calls[driver.submit("spawn", args=(count, batch), actor=spawner)[0]] = spawner

        for spawner in spawners * 2:
            give(spawner)
        while calls:
            refs = list(calls)
            ready = yield driver.wait(refs, 1)
            done = [ref for ref, is_ready in zip(refs, ready) if is_ready]
            driver.drop(done)
            for ref in done:
                give(calls.pop(ref))

    return main


def run_flood(
    num_nodes: int, cpus: int, num_tasks: int, task_s: float, seed: int, costs: Costs, policy: Callable[[], Policy],
    faults: list[Fault],
) -> Outcome:  # fmt: skip
    world = World(num_nodes, cpus, seed, costs, policy, flood_kinds(task_s))
    plan(world, faults)
    world.run(flood(num_tasks, num_nodes))
    figures = common_figures(world, num_tasks)
    if faults:
        figures["faults"] = [f"{when:.2f} s: {what}" for when, what in world.happened]
        figures["faults"] += [
            f"{fault.at_s:g} s: {fault.what} did not happen: all was done before"
            for fault in faults if fault.at_s > world.now
        ]  # fmt: skip
        figures["recovery_s"], unknown = recovery_times(world)
        if unknown:
            figures["no_recovery_s"] = unknown
    return Outcome(
        f"{num_tasks:,} tasks of {task_s * 1e3:g} ms on {num_nodes} nodes with {cpus} workers each",
        figures, [Line("tasks/s", throughput(world))], ("virtual time (s)", "tasks/s"),
    )  # fmt: skip


def common_figures(world: World, num_tasks: int) -> dict[str, Any]:
    head = world.machines[HEAD]
    rows_lag_s = max(0.0, world.gcs_free_at - world.now)
    return {
        "finished": world.driver_ended_s is not None,
        "tasks": num_tasks,
        "executed": world.num_finished,
        "virtual_s": round(world.now, 6),
        "tasks_per_s": round(num_tasks / max(1e-9, world.now), 1),
        "utilisation": round(world.utilisation(), 4),
        "head_busy": round(head.loop_s / max(1e-9, world.now), 4),
        "bytes_moved": world.bytes_moved,
        "gcs_rows": world.rows,
        "gcs_behind_s": round(rows_lag_s, 3),
        "events": world.num_events,
        "trace": world.trace_hash(),
    }


BIN_S = 0.1
"""A rate is that of so long: recovery takes tenths of a second."""


def throughput(world: World, bin_s: float | None = None) -> list[tuple[float, float]]:
    """Tasks a second over time, in about a hundred steps or of `bin_s`."""
    if bin_s is None:
        bin_s = max(0.1, round(world.now / 100, 1))
    width = max(1, round(bin_s * 10))
    bins: dict[int, int] = {}
    for tenth, count in world.finished_in.items():
        bins[tenth // width] = bins.get(tenth // width, 0) + count
    last = int(world.now * 10) // width
    return [(n * width / 10, bins.get(n, 0) / (width / 10)) for n in range(last)]


def recovery_times(world: World, part: float = 0.95) -> tuple[list[float | None], list[str]]:
    """For each node that was lost: how long until the throughput was back to `part` of what the remaining nodes can
    do; and why that is not known, where it is None."""
    rates = throughput(world, BIN_S)
    found: list[float | None] = []
    unknown: list[str] = []
    deaths = [when for when, what in world.happened if "is killed" in what]
    num_nodes = len(world.machines)
    for number, when in enumerate(deaths):
        before = [rate for at_s, rate in rates if when - 1.0 <= at_s + BIN_S <= when]
        joined = sum(1 for at_s, what in world.happened if at_s <= when and "joins" in what)
        nodes = num_nodes - sum(1 for _, what in world.happened if "joins" in what) + joined - number
        after = [(at_s, rate) for at_s, rate in rates if at_s >= when]
        recovered_s, why = None, ""
        if not before:
            why = f"no rate to come back to: no whole {BIN_S:g} s, of which a rate is taken, had passed"
        elif nodes < 2:
            why = "no node was left"
        elif not after:
            why = f"no rate since: all was done at {world.now:.2f} s, before the next whole {BIN_S:g} s had passed"
        else:
            aim = part * sum(before) / len(before) * (nodes - 1) / nodes
            recovered_s = next((round(max(0.0, at_s - when), 2) for at_s, rate in after if rate >= aim), None)
            why = f"the rate did not come back to {aim:,.0f} tasks/s, to the end at {world.now:.2f} s"
        found.append(recovered_s)
        if recovered_s is None:
            unknown.append(f"killed at {when:.2f} s: {why}")
    return found, unknown


# ---------------------------------------------------------------- Fig 8b: scaling


def run_fig8b(
    seed: int, costs: Costs, policy: Callable[[], Policy], sizes: tuple[int, ...] = (10, 20, 60, 100), cpus: int = 2
) -> Outcome:  # fmt: skip
    """Empty tasks a second, with growing clusters: bottom-up, and with every task through one scheduler."""
    kinds = flood_kinds(0.0)
    lines: list[Line] = []
    figures: dict[str, Any] = {}
    # At first workers are forked and the first tasks come in.  The one scheduler is given no more than it can
    # take in, however many ask it.
    for name, made, start_s, seconds in (
        ("bottom-up", policy, 0.06, 0.06), ("one global scheduler", EverythingThroughHead, 0.5, 0.5),
    ):  # fmt: skip
        points = []
        for num_nodes in sizes:
            world = World(num_nodes, cpus, seed, costs, made, kinds)
            world.run(flood(10**9, num_nodes, BATCH if made is policy else max(5, 2500 // num_nodes)), until_s=start_s)
            before = world.num_finished
            world.go_on(until_s=start_s + seconds)
            rate = (world.num_finished - before) / seconds
            points.append((float(num_nodes), rate))
            figures[f"{name}, {num_nodes} nodes"] = f"{rate:,.0f} tasks/s"
        lines.append(Line(name, points))
    (n1, r1), (n2, r2) = lines[0].points[0], lines[0].points[-1]
    figures["bottom-up, of linear"] = round(r2 / r1 / (n2 / n1), 3)
    (_, g1), (_, g2) = lines[1].points[0], lines[1].points[-1]
    figures["one global scheduler, largest to smallest"] = round(g2 / g1, 3)
    figures["the paper"] = "over 1 M tasks/s on 60 nodes and 1.8 M on 100 (real machines)"
    return Outcome("Fig 8b: empty tasks a second", figures, lines, ("nodes", "tasks/s"))


# ---------------------------------------------------------------- Fig 11a: tasks are made again


def chains(num_chains: int, length: int) -> Callable[[Context], Code]:
    def main(driver: Context) -> Code:
        ends = []
        for _ in range(num_chains):
            ref = driver.submit("step")[0]
            for _ in range(length - 1):
                older, ref = ref, driver.submit("step", deps=(ref,))[0]
                driver.drop([older])
            ends.append(ref)
        yield driver.wait(ends)
        return ends

    return main


def run_fig11a(
    seed: int, costs: Costs, policy: Callable[[], Policy], num_nodes: int = 10, cpus: int = 4, seconds: float = 60.0
) -> Outcome:
    """Chains of 100 ms tasks, while nodes are removed and added back."""
    kinds = {"step": Kind(TaskOptions(TASK, FUNCTION, "step", resources=CPU, max_retries=-1), 0.1)}
    num_chains, length = num_nodes * cpus, int(seconds * 10)
    at = [seconds * part for part in (0.15, 0.25, 0.35, 0.55, 0.6, 0.65)]
    worlds = []
    for faulty in (False, True):
        world = World(num_nodes, cpus, seed, costs, policy, kinds)
        world.computes_values = True
        if faulty:
            leaving = [Fault("kill_node", when, None) for when in at[:3]]
            plan(world, leaving + [Fault("join_node", when, None) for when in at[3:]])
        world.run(chains(num_chains, length))
        worlds.append(world)
    values = [
        [world.machines[HEAD].node.objects[ref].data for ref in world.driver_result or ()] for world in worlds
    ]
    rates = throughput(worlds[1], 1.0)

    def mean(start: float, end: float) -> float:
        found = [rate for when, rate in rates if start <= when < end]
        return sum(found) / max(1, len(found))

    before, fewest, after = mean(2, at[0] - 1), mean(at[2] + 2, at[3] - 1), mean(at[5] + 2, worlds[0].now - 1)
    figures: dict[str, Any] = common_figures(worlds[1], num_chains * length)
    figures |= {
        "without faults_s": round(worlds[0].now, 3),
        "tasks/s before": round(before, 1),
        "tasks/s with 3 nodes fewer": round(fewest, 1),
        "tasks/s when they are back": round(after, 1),
        "recovered": round(after / max(1e-9, before), 3),
        "equal results": values[0] == values[1] and len(values[0]) == num_chains and None not in values[0],
        "faults": [f"{when:.2f} s: {what}" for when, what in worlds[1].happened],
    }
    title = f"Fig 11a: {num_chains} chains of 100 ms tasks on {num_nodes} nodes; 3 are killed, and 3 join later"
    return Outcome(title, figures, [Line("tasks/s", rates)], ("virtual time (s)", "tasks/s"))


# ---------------------------------------------------------------- Fig 11b: actors are made again


def actors_at_work(num_actors: int, num_calls: int, kill_nodes: int) -> Callable[[Context], Code]:
    def main(driver: Context) -> Code:
        world = driver.world
        options = ActorOptions("Counter", max_restarts=-1)
        actors = [driver.submit("Counter", options=options)[0] for _ in range(num_actors)]
        yield driver.wait(actors)
        # Not all have the same number of calls since their last checkpoint.
        calls = [driver.submit("add", num_calls - number % 3, actor=actor) for number, actor in enumerate(actors)]
        refs = [ref for some in calls for ref in some]
        yield driver.wait(refs)
        yield driver.compute(1.0)
        executed = world.executed
        assert executed is not None
        before = dict(executed)
        killed_at = world.now
        for _ in range(kill_nodes):
            world.kill_node()
        again = [driver.submit("add", actor=actor)[0] for actor in actors]
        yield driver.wait(again)
        world.driver_result = None
        repeated = sum(executed[ref] - before[ref] for ref in refs)
        restarts = sum(actor.restarts for actor in world.machines[HEAD].node.actors.actors.values())
        return repeated, restarts, world.now - killed_at

    return main


def run_fig11b(
    seed: int, costs: Costs, policy: Callable[[], Policy], num_nodes: int = 10, num_actors: int = 2000,
    num_calls: int = 25,
) -> Outcome:  # fmt: skip
    """2 of 10 nodes die; how many methods are executed again, with and without checkpoints."""
    figures: dict[str, Any] = {}
    repeated: list[int] = []
    lines = []
    for name, every in (("with checkpoints", 3), ("without", 10**9)):
        kinds = {
            "Counter": Kind(
                TaskOptions(ACTOR_CREATION, FUNCTION, "Counter.__init__", max_retries=0, checkpoint_every=every), 0.0
            ),
            "add": Kind(TaskOptions(ACTOR_METHOD, b"", "Counter.add", method="add", max_retries=-1), 0.01),
        }
        world = World(num_nodes, 4, seed, costs, policy, kinds)
        world.executed = {}
        world.run(actors_at_work(num_actors, num_calls, 2))
        if world.driver_result is None:
            raise RuntimeError("the actors did not come back")
        again, restarts, took_s = world.driver_result
        repeated.append(again)
        figures[f"{name}: actors made again"] = restarts
        figures[f"{name}: methods executed again"] = again
        figures[f"{name}: until all answered again_s"] = round(took_s, 3)
        figures[f"{name}: trace"] = world.trace_hash()
        lines.append(Line(name, throughput(world, 0.1)))
    figures["ratio"] = round(repeated[1] / max(1, repeated[0]), 1)
    figures["the paper"] = "400 of 2000 actors; 500 methods executed again with checkpoints, 10 k without"
    title = f"Fig 11b: {num_actors} actors on {num_nodes} nodes, of which 2 die"
    return Outcome(title, figures, lines, ("virtual time (s)", "methods/s"))


EXPERIMENTS: dict[str, Callable[[int, Costs, Callable[[], Policy]], Outcome]] = {
    "fig8b": run_fig8b, "fig11a": run_fig11a, "fig11b": run_fig11b,
}  # fmt: skip
