"""What things cost in the simulated world, in seconds and bytes a second; and how to find out for this machine.

`Costs()` are figures of one slow core of a two-core machine.  `calibrate` measures: the node's
decisions by running the node itself on made-up events (the simulator runs the same code, so only its price must be
known), and a worker's part by running real no-op tasks.  What one machine cannot show, networks and other disks,
stays as it is here; all can be changed (``minray simulate --costs FILE``).
"""

from __future__ import annotations

import json
import math
import time
from typing import Any, NamedTuple


class Costs(NamedTuple):
    event_s: float = 5.8e-6  # a node takes in an event, whatever it carries, and sends what follows
    submitted_s: float = 2.2e-6  # and each task in it that is submitted,
    given_s: float = 8.6e-6  # given by another node, or to one,
    dispatched_s: float = 0.9e-6  # handed to a worker,
    finished_s: float = 0.9e-6  # or finished
    submit_s: float = 5.3e-6  # a driver's or a task's own part of a submission
    run_s: float = 4.9e-6  # a worker's part of a task that does nothing
    hop_s: float = 100e-6  # a message between processes of a machine
    start_worker_s: float = 0.006
    latency_s: float = 250e-6  # a message between nodes
    bandwidth: float = 1.2e9  # of a node's network, each way
    memory_bandwidth: float = 4.5e9
    disk_bandwidth: float = 5e8
    row_s: float = 6e-6  # the GCS takes in a row
    detect_s: float = 0.02  # from the end of a node to its links' closing at the others


def load(path: str) -> Costs:
    """Costs from a JSON file; what it leaves out is as in `Costs()`.  Raises ValueError for a name that is unknown."""
    with open(path, encoding="utf-8") as file:
        try:
            found: dict[str, Any] = json.load(file)
        except ValueError as error:
            raise ValueError(f"{path} is not JSON, as --calibrate writes it: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"{path} must be a JSON object of names and costs, as --calibrate writes it.")
    unknown = [name for name in found if name not in Costs._fields]
    if unknown:
        raise ValueError(f"{path}: no such cost: {', '.join(unknown)}. There are {', '.join(Costs._fields)}.")
    for name, value in found.items():
        least = 1 if "bandwidth" in name else 0
        if type(value) not in (int, float) or not least <= value < math.inf:
            raise ValueError(f"{path}: {name} must be a number from {least}, got {value!r}")
    return Costs(**{name: float(value) for name, value in found.items()})


def save(costs: Costs, path: str) -> None:
    with open(path, "w", encoding="utf-8") as file:
        json.dump(costs._asdict(), file, indent=2)
        file.write("\n")


def calibrate(num_tasks: int = 20_000) -> Costs:
    """The costs of this machine: takes some seconds, and starts a session of its own.

    CPU time is measured where there is any, so that other work on the machine counts little."""
    hop_s, submit_s, run_s = _process_costs(num_tasks)
    return _node_costs(num_tasks)._replace(hop_s=hop_s, submit_s=submit_s, run_s=run_s)


def _node_costs(num_tasks: int) -> Costs:
    from minray import ids
    from minray.cluster_messages import NodeJoined, TasksGiven
    from minray.cluster_node import ClusterNode
    from minray.messages import (
        DRIVER, FunctionExported, ReferencesChanged, RunTasks, TasksFinished, TasksSubmitted, TemplateDefined,
        WorkerStarted,
    )  # fmt: skip
    from minray.task_spec import OK, TASK, UNIT, TaskOptions, TaskSpec

    options = TaskOptions(TASK, b"f" * 16, "empty", resources=(("CPU", UNIT),))
    prefix, root = ids.children_prefix(bytes(16)), bytes(16)
    specs = [TaskSpec(ids.pack_id(prefix, n + 1, 0), 1) for n in range(num_tasks)]
    batches = [specs[n : n + 500] for n in range(0, num_tasks, 500)]

    def node() -> ClusterNode:
        made = ClusterNode({"CPU": UNIT}, 1 << 20, lambda object_id: "")
        made.handle(FunctionExported(DRIVER, b"f" * 16, b"code", "f", "m", None), 0.0)
        made.handle(TemplateDefined(DRIVER, 1, options), 0.0)
        return made

    clock, here = time.process_time, node()
    made_at = clock()
    for batch in batches:
        here.handle(TasksSubmitted(DRIVER, root, batch), 0.0)
    submitted_s = (clock() - made_at) / num_tasks
    here.start_workers(1)
    dispatched_s = finished_s = 0.0
    start = clock()
    commands = here.handle(WorkerStarted(1, 1), 0.0)
    while commands:
        dispatched_s += clock() - start
        tasks = [task[0] for command in commands if type(command) is RunTasks for task in command.tasks]
        start = clock()
        done = TasksFinished(1, [(task_id, OK, b"N.", 0.0, 1e-5) for task_id in tasks])
        made_s = clock() - start
        start = clock()
        commands = here.handle(done, 0.0)
        here.handle(ReferencesChanged(DRIVER, [], tasks), 0.0)
        finished_s += made_s
    total_s = dispatched_s / num_tasks
    start = clock()
    for _ in range(2000):
        here.handle(ReferencesChanged(DRIVER, [], []), 0.0)
    event_s = (clock() - start) / 2000
    other = node()
    other.handle(NodeJoined(-2, "n2", {"CPU": UNIT}), 0.0)
    other.handle(FunctionExported(-2, b"f" * 16, b"code", "f", "m", None), 0.0)
    other.handle(TemplateDefined(-2, 1, options), 0.0)
    start = clock()
    for batch in batches:
        other.handle(TasksGiven(-2, [(spec, 1, None, 3) for spec in batch], [], {}), 0.0)
    given_s = (clock() - start) / num_tasks
    return Costs(
        event_s=round(event_s + 4e-6, 9), submitted_s=round(submitted_s, 9), given_s=round(given_s, 9),
        dispatched_s=round(total_s / 2, 9), finished_s=round(total_s / 2, 9),
    )  # fmt: skip


def _process_costs(num_tasks: int) -> tuple[float, float, float]:
    """A hop, a submission, and a worker's part of a task, of real processes."""
    import minray

    def used_s() -> float:
        return time.process_time()

    minray.init(num_cpus=1)
    try:
        function = minray.remote(used_s)
        for _ in range(200):
            before_s = minray.get(function.remote())
        refs = [function.remote() for _ in range(num_tasks)]
        run_s = (minray.get(refs)[-1] - before_s) / num_tasks
        start_s = time.thread_time()
        refs = [function.remote() for _ in range(num_tasks)]
        submit_s = (time.thread_time() - start_s) / num_tasks
        minray.get(refs)
        start_s = time.perf_counter()
        for _ in range(500):
            minray.get(function.remote())
        hop_s = (time.perf_counter() - start_s) / 500 / 4  # There and back, each with a wake-up at its end.
    finally:
        minray.shutdown()
    return round(hop_s, 9), round(submit_s, 9), round(run_s, 9)
