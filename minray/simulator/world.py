"""A cluster in virtual time: many nodes, each the very `ClusterNode` that runs for real, and everything else made up.

A `World` has the clock, the network and the GCS; a `Machine` is a node with its shell's work: it takes in one event
after the other, each for its price (costs.py), starts `SimWorker`s and delivers what the node tells them.  A worker
runs `Body`s: a number of seconds, or a generator that computes, submits and waits like a task's code.  A seed decides
all that is random, and no set is iterated, so a run is its arguments: `trace_hash` tells two apart.

What is modelled: a node's loop is one thread, and its queue grows when it cannot keep up; processes of a machine
are a hop apart, nodes a latency, and a node's network carries so many bytes a second; workers take tasks one after the
other and answer at once, or, while tasks are short, a few at a time; memory and disk have bandwidths; the GCS takes
rows one after the other, and nobody waits for it.

What is not: cores.  A machine is assumed to have one for each worker and one for its node.  And the loss of single
messages: a link is TCP, so it delivers in order or breaks (``cut_node``: it carries nothing for a while).
"""

from __future__ import annotations

import hashlib
import heapq
import pickle
from collections import deque
from collections.abc import Callable, Generator
from random import Random
from typing import Any, NamedTuple, Union

from minray import ids
from minray.cluster_messages import HEAD, FetchFailed, NodeDied, NodeJoined, ObjectArrived, TasksGiven
from minray.cluster_node import ClusterNode
from minray.messages import (
    DRIVER, BlockRequested, BlocksSpilled, CheckpointTaken, Command, ExitWorker, FetchObject, Forget, FunctionExported,
    KillWorker, ObjectsAwaited, ReferencesChanged, Reply, RunTasks, StartWorker, TakeBack, TasksFinished,
    TasksReturned, TasksSubmitted, TellNode, TemplateDefined, Ticked, Unpinned, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.policy import Policy
from minray.simulator.costs import Costs
from minray.task_spec import ACTOR_CREATION, OK, UNIT, ActorOptions, TaskOptions, TaskSpec

Code = Generator[tuple[Any, ...], Any, Any]
Body = Union[float, Callable[["Context"], Code]]
"""What a task does: compute for so many seconds, or run this."""

INLINE_BYTES = 64 * 1024
GROUP_S = 0.001
"""A worker's short tasks are simulated, and answered, this much together."""
ROWS_EVERY_S = 0.05


class Kind(NamedTuple):
    """A function: what its tasks do, need and return."""

    options: TaskOptions
    body: Body
    result_bytes: int = 0


class Context:
    """A running task, or the driver: what its code can say.  Code yields what it has to wait for::

        refs = task.submit("empty", 100)
        yield task.wait(refs)
        yield task.compute(0.01)
        task.drop(refs)
    """

    def __init__(self, world: World, task_id: bytes, args: Any, values: list[Any]) -> None:
        self.world = world
        self.task_id = task_id
        self.args = args
        self.values = values
        self.outbox: list[tuple[str, Any]] = []
        self._prefix = ids.children_prefix(task_id)
        self._children = 0

    def submit(
        self, kind: str, count: int = 1, args: Any = None, deps: tuple[bytes, ...] = (), actor: bytes | None = None,
        options: ActorOptions | None = None,
    ) -> list[bytes]:  # fmt: skip
        """So many tasks of that kind; their refs."""
        number = self.world.kind_numbers[kind]
        pickled = None if args is None else pickle.dumps(args)
        first = self._children + 1
        self._children += count
        prefix, pack = self._prefix, ids.pack_id
        refs = [pack(prefix, n, 0) for n in range(first, first + count)]
        specs = [TaskSpec(ref, number, pickled, deps, (), actor, options) for ref in refs]
        self.outbox.append(("submit", specs))
        return refs

    def drop(self, refs: list[bytes]) -> None:
        self.outbox.append(("drop", refs))

    @staticmethod
    def wait(refs: list[bytes], num_ready: int | None = None) -> tuple[Any, ...]:
        return ("wait", refs, len(refs) if num_ready is None else num_ready)

    @staticmethod
    def compute(seconds: float) -> tuple[Any, ...]:
        return ("compute", seconds)


class Process:
    """A process that runs code: it submits, waits and computes.  The driver is one; workers are."""

    def __init__(self, machine: Machine, client: int) -> None:
        self.machine = machine
        self.world = machine.world
        self.client = client
        self.alive = True
        self.code: Code | None = None
        self.context: Context | None = None
        self.known: dict[int, None] = {}
        self.requests = 0
        self.waits_for: int | None = None
        self.awaited: list[bytes] = []
        self.spoken_at = 0.0

    def say(self, when: float, events: list[Any]) -> None:
        """To its node, in order."""
        self.spoken_at = max(self.spoken_at, when + self.world.costs.hop_s)
        self.world.at(self.spoken_at, self.machine.take, events)

    def advance(self, now: float, answer: Any) -> None:
        """Run the code to where it next has to wait.  `now`: when it goes on."""
        code, context = self.code, self.context
        assert code is not None and context is not None
        self.waits_for = None
        try:
            request = code.send(answer)
        except StopIteration as stop:
            self.code = None
            self.ended(self.flush(now), stop.value)
            return
        now = self.flush(now)
        if request[0] == "compute":
            self.machine.busy_s += request[1] if self.client else 0.0
            self.world.at(now + request[1], self.computed)
            return
        _, refs, num_ready = request
        self.requests += 1
        self.waits_for = self.requests
        self.awaited = refs
        self.about_to_wait(now)
        blocks = self.client != DRIVER
        self.say(now, [ObjectsAwaited(self.client, self.requests, list(refs), num_ready, False, blocks)])

    def flush(self, now: float) -> float:
        """Say what the code has submitted and dropped; returns when it has been said."""
        context = self.context
        assert context is not None
        events: list[Any] = []
        for what, things in context.outbox:
            if what == "submit":
                number = things[0].template_no
                if number not in self.known:
                    self.known[number] = None
                    options = self.world.kinds[number].options
                    if options.function_id:
                        events.append(FunctionExported(self.client, options.function_id, b"", options.name, "", None))
                    events.append(TemplateDefined(self.client, number, options))
                now += self.world.costs.submit_s * len(things)
                events.append(TasksSubmitted(self.client, context.task_id, things))
            else:
                events.append(ReferencesChanged(self.client, [], things))
        context.outbox.clear()
        if events:
            self.say(now, events)
        return now

    def computed(self) -> None:
        if self.alive and self.code is not None:
            self.advance(self.world.now, None)

    def replied(self, request_id: int, answer: Any) -> None:
        if self.alive and self.waits_for == request_id:
            self.advance(self.world.now, self.which_are_ready(answer))

    def which_are_ready(self, answer: Any) -> Any:
        return answer

    def about_to_wait(self, now: float) -> None:
        pass

    def ended(self, now: float, result: Any) -> None:
        raise NotImplementedError


class DriverProcess(Process):
    def which_are_ready(self, answer: Any) -> Any:
        """The driver looks into the table itself, as the real one does."""
        objects = self.machine.node.objects
        return [objects[ref].data is not None for ref in self.awaited]

    def ended(self, now: float, result: Any) -> None:
        self.world.driver_result = result
        self.world.driver_ended_s = now


class SimWorker(Process):
    def __init__(self, machine: Machine, client: int) -> None:
        super().__init__(machine, client)
        self.queue: deque[tuple[Any, ...]] = deque()
        self.running: bytes | None = None
        self.is_running = False
        self.forgets = 0
        self.templates: dict[int, Kind] = {}  # by the node's numbers
        self.task: tuple[Any, ...] | None = None
        self.started_s = 0.0
        self.exiting = False
        self.actor_id: bytes | None = None
        self.saves_after = 0  # so many calls; 0: never
        self.calls_since = 0
        self.checkpoints = 0
        self.storing: tuple[float, Any] | None = None

    # ------------------------------------------------------------ what the node says

    def hear(self, command: Any) -> None:
        if not self.alive:
            return
        kind = type(command)
        if kind is RunTasks:
            self.queue.extend(command.tasks)
            if self.waits_for is not None and self.actor_id is None:
                self.give_back(self.world.now, len(self.queue))
            elif not self.is_running:
                self.next(self.world.now)
        elif kind is Reply:
            if self.storing is not None:
                self.got_room(command.answer)
            else:
                self.replied(command.request_id, command.answer)
        elif kind is TakeBack:
            self.give_back(self.world.now, command.num_tasks)
        elif type(command).__name__ == "RestoreActor":
            self.checkpoints = command.number
        elif kind is Forget:
            forgotten = dict.fromkeys(command.task_ids)
            self.queue = deque(task for task in self.queue if task[0] not in forgotten)
            self.forgets += bool(forgotten)
        elif kind is ExitWorker:
            self.exiting = True
            if not self.is_running:
                self.machine.end_worker(self, "exited")

    def give_back(self, now: float, count: int) -> None:
        taken = [self.queue.pop() for _ in range(min(count, len(self.queue)))][::-1]
        self.say(now, [TasksReturned(self.client, [task[0] for task in taken], self.forgets)])

    def about_to_wait(self, now: float) -> None:
        if self.queue and self.actor_id is None:
            self.give_back(now, len(self.queue))

    # ------------------------------------------------------------ running tasks

    def next(self, now: float) -> None:
        """Run what is there: short tasks as a group, others one by one."""
        world, machine = self.world, self.machine
        run_s, trace = world.costs.run_s, world.executed
        group: list[Any] = []
        end = now
        while self.queue:
            task_id, template_no, args, values, _ = self.queue[0]
            kind = self.templates[template_no]
            body = kind.body
            if type(body) is not float or kind.result_bytes > INLINE_BYTES:
                if not group:
                    self.queue.popleft()
                    self.begin(end + run_s, task_id, kind, args, values)
                    return
                break
            took = body * machine.slowness
            if group and end + took + run_s > now + GROUP_S:
                break
            self.queue.popleft()
            start = end + run_s
            end = start + took
            if trace is not None:
                trace[task_id] = trace.get(task_id, 0) + 1
            value = world.value_of(task_id, values) if world.computes_values else world.none
            group.append((task_id, OK, value, start, end))
            if kind.options.kind == ACTOR_CREATION:
                self.actor_id = task_id
                self.saves_after = kind.options.checkpoint_every
        if group:
            self.running = group[-1][0]
            self.is_running = True
            machine.busy_s += end - now
            world.at(end, self.group_ended, group)
        else:
            self.running = None
            self.is_running = False
            if self.exiting:
                machine.end_worker(self, "exited")

    def group_ended(self, group: list[Any]) -> None:
        if not self.alive:
            return
        now = self.world.now
        self.say(now, [TasksFinished(self.client, group)])
        self.world.count_finished(len(group))
        self.executed_calls(now, len(group), self.actor_id is not None and group[0][0] != self.actor_id)

    def executed_calls(self, now: float, count: int, are_calls: bool) -> None:
        if are_calls:
            self.calls_since += count
            every = self.saves_after
            if every and self.calls_since >= every:
                self.calls_since = 0
                self.checkpoints += 1
                assert self.actor_id is not None
                object_id = ids.checkpoint_id(self.actor_id, self.checkpoints)
                now += self.world.checkpoint_s
                state = (b"state", self.world.checkpoint_bytes, ())
                self.say(now, [CheckpointTaken(self.client, object_id, state, True)])
        self.next(now)

    def begin(self, now: float, task_id: bytes, kind: Kind, args: bytes | None, values: Any) -> None:
        self.running = task_id
        self.is_running = True
        self.task = (task_id, kind)
        self.started_s = now
        trace = self.world.executed
        if trace is not None:
            trace[task_id] = trace.get(task_id, 0) + 1
        body = kind.body
        if type(body) is float:
            self.machine.busy_s += body
            self.world.at(now + body * self.machine.slowness, self.has_value)
            return
        assert callable(body)
        context = self.context = Context(self.world, task_id, pickle.loads(args) if args else None, values or [])
        self.code = body(context)
        self.advance(now, None)

    def ended(self, now: float, result: Any) -> None:
        self.world.at(now, self.has_value)

    def has_value(self) -> None:
        """Small values go into the message; large ones need room first."""
        if not self.alive or self.task is None:
            return
        task_id, kind = self.task
        if kind.result_bytes <= INLINE_BYTES:
            self.finish(self.world.now, (self.world.none, kind.result_bytes, ()))
            return
        self.requests += 1
        self.storing = (self.world.now, None)
        self.say(self.world.now, [BlockRequested(self.client, self.requests, task_id, kind.result_bytes)])

    def got_room(self, answer: Any) -> None:
        assert self.task is not None
        task_id, kind = self.task
        now, costs, size = self.world.now, self.world.costs, kind.result_bytes
        if answer[0] == "spill":
            now += sum(victim[2] for victim in answer[1]) / costs.disk_bandwidth
            spilled = [(victim[0], victim[3]) for victim in answer[1]]
            self.requests += 1
            self.say(now, [BlocksSpilled(self.client, self.requests, spilled, task_id, size)])
            return
        self.storing = None
        bandwidth = costs.memory_bandwidth if answer[0] == "block" else costs.disk_bandwidth
        self.finish(now + size / bandwidth, (answer[1], size, ()))

    def finish(self, now: float, value: Any) -> None:
        assert self.task is not None
        task_id, kind = self.task
        self.task = self.context = None
        payload: Any = value[0] if type(value[0]) is bytes else [value]
        self.say(now, [TasksFinished(self.client, [(task_id, OK, payload, self.started_s, now)])])
        self.world.count_finished(1)
        self.world.at(now, self.go_on, task_id)

    def go_on(self, task_id: bytes) -> None:
        if self.alive:
            self.executed_calls(self.world.now, 1, self.actor_id is not None and task_id != self.actor_id)


class Machine:
    """A node, its workers and its shell."""

    def __init__(self, world: World, node_no: int, cpus: int, store_bytes: int, policy: Policy) -> None:
        self.world = world
        self.node_no = node_no
        self.cpus = cpus
        self.resources = {"CPU": cpus * UNIT, f"node-{node_no}": 1000 * UNIT}
        self.label = "head" if node_no == HEAD else f"n{node_no}"
        self.node = ClusterNode(
            self.resources, store_bytes, lambda object_id: f"/spill/{object_id.hex()}", policy, self.label,
            node_no=node_no,
        )
        self.processes: dict[int, Process] = {}
        self.alive = True
        self.since_s = world.now
        self.until_s: float | None = None  # when it was killed
        self.busy_until = 0.0  # the node's loop
        self.loop_s = 0.0  # how long that was busy in all
        self.busy_s = 0.0  # the same of all workers
        self.slowness = 1.0
        self.link_free_at = 0.0  # what its network sends
        self.cut_until = 0.0
        self._tick_at: float | None = None

    def start(self, now: float) -> None:
        self.carry_out(self.node.start_workers(self.cpus), now)
        self.world.at(now + ROWS_EVERY_S, self.record)

    # ------------------------------------------------------------ the node's loop

    def take(self, events: list[Any]) -> None:
        """One event after the other, each for its price."""
        if not self.alive:
            return
        world = self.world
        costs, node = world.costs, self.node
        start = max(world.now, self.busy_until)
        for event in events:
            kind = type(event)
            cost = costs.event_s
            if kind is TasksSubmitted:
                cost += costs.submitted_s * len(event.specs)
            elif kind is TasksFinished:
                cost += costs.finished_s * len(event.results)
            elif kind is TasksGiven:
                cost += costs.given_s * len(event.tasks)
            if world.trace is not None:
                world.note(self.node_no, start, event)
            commands = node.handle(event, start)
            world.num_events += 1
            for command in commands:
                if type(command) is RunTasks:
                    cost += costs.dispatched_s * len(command.tasks)
                elif type(command) is TellNode:
                    for told in command.events:
                        if type(told) is TasksGiven:
                            cost += costs.given_s * len(told.tasks)
            start += cost
            self.loop_s += cost
            if commands:
                self.carry_out(commands, start)
        self.busy_until = start
        self.set_alarm()

    def set_alarm(self) -> None:
        wake_at = self.node.wake_at
        if wake_at is not None and wake_at != self._tick_at:
            self._tick_at = wake_at
            self.world.at(max(self.world.now, wake_at), self.tick, wake_at)

    def tick(self, wake_at: float) -> None:
        if self.alive and self.node.wake_at == wake_at:
            self._tick_at = None
            executing = tuple((client, self.processes[client].running) for client in self.node.held)  # type: ignore[attr-defined]
            self.take([Ticked(executing=executing)])

    def carry_out(self, commands: list[Command], when: float) -> None:
        world, hop_s = self.world, self.world.costs.hop_s
        for command in commands:
            kind = type(command)
            if kind is TellNode:
                world.send(self, -command.client, command.events, when)  # type: ignore[union-attr]
            elif kind is FetchObject:
                world.at(when, self.fetch, command)
            elif kind is StartWorker:
                client = command.client  # type: ignore[union-attr]
                self.processes[client] = SimWorker(self, client)
                world.at(when + world.costs.start_worker_s, self.take, [WorkerStarted(client, client)])
            elif kind is KillWorker:
                process = self.processes.get(command.client)  # type: ignore[union-attr]
                if process is not None:
                    world.at(when, self.end_worker, process, "was killed by SIGKILL")
            else:
                process = self.processes.get(getattr(command, "client", -1))
                if isinstance(process, SimWorker):
                    if kind.__name__ == "DefineTemplate":
                        process.templates[command.template_no] = world.kind_of[command.options]  # type: ignore[union-attr]
                    else:
                        world.at(when + hop_s, process.hear, command)
                elif process is not None and kind is Reply:
                    world.at(when, process.replied, command.request_id, command.answer)  # type: ignore[union-attr]

    def end_worker(self, process: Process, reason: str) -> None:
        if process.alive:
            process.alive = False
            del self.processes[process.client]
            running = process.running if isinstance(process, SimWorker) else None
            when = max(self.world.now, process.spoken_at)
            self.world.at(when, self.take, [WorkerDied(process.client, reason, running)])

    # ------------------------------------------------------------ copies

    def fetch(self, command: FetchObject) -> None:
        """Take the object from where it lies: the source's network sends one after the other."""
        world = self.world
        source = world.machines.get(-command.client)
        fetched = None
        if source is not None and source.alive and source.cut_until <= world.now:
            fetched = source.node.fetch_for_driver(command.object_id)
        if source is None or fetched is None or type(fetched[0]) is bytes:
            self.take([FetchFailed(DRIVER, command.fetch_no, "is not there")])
            return
        source.link_free_at = max(source.link_free_at, world.now) + command.size / world.costs.bandwidth
        world.bytes_moved += command.size
        world.at(source.link_free_at + world.costs.latency_s, self.fetched, command, source)

    def fetched(self, command: FetchObject, source: Machine) -> None:
        if source.alive:
            source.take([Unpinned(DRIVER, [command.object_id])])
        if source.alive and source.cut_until <= self.world.now:
            self.take([ObjectArrived(DRIVER, command.fetch_no)])
        else:
            self.take([FetchFailed(DRIVER, command.fetch_no, "the connection broke")])

    # ------------------------------------------------------------ the GCS

    def record(self) -> None:
        """What has changed goes to the GCS, which takes one row after the other."""
        world = self.world
        if not self.alive:
            return
        rows = sum(map(len, self.node.take_rows(world.now).values()))
        world.rows += rows
        world.gcs_free_at = max(world.gcs_free_at, world.now) + rows * world.costs.row_s
        world.at(world.now + ROWS_EVERY_S, self.record)


class World:
    def __init__(
        self, num_nodes: int, cpus: int, seed: int, costs: Costs, policy: Callable[[], Policy], kinds: dict[str, Kind],
        store_bytes: int = 1 << 30, keep_trace: bool = True,
    ) -> None:  # fmt: skip
        self.rng = Random(seed)
        self.costs = costs
        self.policy = policy
        self.cpus = cpus
        self.store_bytes = store_bytes
        self.now = 0.0
        self.num_events = 0
        self.trace = hashlib.blake2b(digest_size=16) if keep_trace else None
        self._heap: list[tuple[float, int, Callable[..., None], tuple[Any, ...]]] = []
        self._ties = 0
        self.kinds: list[Kind] = list(kinds.values())
        self.kind_numbers = {name: number for number, name in enumerate(kinds)}
        self.kind_of = {kind.options: kind for kind in self.kinds}
        self.none = pickle.dumps(None)
        self.computes_values = False
        self.executed: dict[bytes, int] | None = None
        self.checkpoint_bytes = 100
        self.checkpoint_s = 0.0001
        self.finished_in: dict[int, int] = {}  # tasks, by tenth of a second
        self.num_finished = 0
        self.bytes_moved = 0
        self.rows = 0
        self.gcs_free_at = 0.0
        self.driver_result: Any = None
        self.driver_ended_s: float | None = None
        self.happened: list[tuple[float, str]] = []  # faults, for the report
        self._links: dict[tuple[int, int], float] = {}
        self._nodes_made = 0
        self.machines: dict[int, Machine] = {}
        for _ in range(num_nodes):
            self.add_node()
        self.root = ids.root_task_id(b"%d" % seed)

    # ------------------------------------------------------------ time

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        self._ties += 1
        heapq.heappush(self._heap, (when, self._ties, what, args))

    def run(self, main: Callable[[Context], Code], until_s: float = 1e9) -> None:
        """The driver runs `main`, until it ends (or the time is up)."""
        head = self.machines[HEAD]
        driver = head.processes[DRIVER] = DriverProcess(head, DRIVER)
        driver.context = Context(self, self.root, None, [])
        driver.code = main(driver.context)
        self.at(self.now, driver.advance, self.now, None)
        self.go_on(until_s)

    def go_on(self, until_s: float = 1e9) -> None:
        heap, pop = self._heap, heapq.heappop
        while heap and self.driver_ended_s is None and heap[0][0] < until_s:
            when, _, what, args = pop(heap)
            self.now = when
            what(*args)

    def note(self, node_no: int, when: float, event: Any) -> None:
        assert self.trace is not None
        things = event[-1] if len(event) > 1 else 0
        size = len(things) if isinstance(things, list) else 0
        self.trace.update(b"%d %.9f %s %d %d;" % (node_no, when, type(event).__name__.encode(), event.client, size))

    def count_finished(self, count: int) -> None:
        tenth = int(self.now * 10)
        self.finished_in[tenth] = self.finished_in.get(tenth, 0) + count
        self.num_finished += count

    def value_of(self, task_id: bytes, values: list[Any] | None) -> bytes:
        """A value that depends on everything that it was made of: so wrong inputs show in the end."""
        digest = hashlib.blake2b(task_id, digest_size=8)
        for value in values or ():
            digest.update(value[0])
        return pickle.dumps(digest.digest())

    # ------------------------------------------------------------ nodes and links

    def add_node(self) -> Machine:
        self._nodes_made += 1
        node_no = self._nodes_made
        machine = self.machines[node_no] = Machine(self, node_no, self.cpus, self.store_bytes, self.policy())
        machine.start(self.now)
        if node_no != HEAD:
            head = self.machines[HEAD]
            self.at(self.now, machine.take, [NodeJoined(-HEAD, "head", head.resources)])
            self.at(self.now, head.take, [NodeJoined(-node_no, machine.label, machine.resources)])
        return machine

    def send(self, sender: Machine, to: int, events: list[Any], when: float) -> None:
        link = (sender.node_no, to)
        machine = self.machines[to]
        start = max(when, sender.cut_until, machine.cut_until)
        arrives = max(self._links.get(link, 0.0), start + self.costs.latency_s * self.rng.uniform(0.8, 1.2))
        self._links[link] = arrives
        self.at(arrives, machine.take, events)

    def kill_node(self, node_no: int | None = None) -> None:
        """This one, or one that chance chooses (never the head)."""
        alive = [m for m in self.machines.values() if m.alive and m.node_no != HEAD]
        if node_no is not None:
            alive = [m for m in alive if m.node_no == node_no]
        if not alive:
            which = "but the head" if node_no is None else f"n{node_no}"
            self.happened.append((self.now, f"kill_node did not happen: there is no node {which}"))
            return
        machine = self.rng.choice(alive)
        machine.alive = False
        machine.until_s = self.now
        for process in machine.processes.values():
            process.alive = False
        self.happened.append((self.now, f"node {machine.label} is killed"))
        died = [NodeDied(-machine.node_no, "was killed")]
        self.at(self.now + self.costs.detect_s, self.machines[HEAD].take, died)

    def join_node(self) -> None:
        machine = self.add_node()
        self.happened.append((self.now, f"node {machine.label} joins"))

    def cut_node(self, seconds: float) -> None:
        """Its link carries nothing for so long; if that is too long it is declared dead, and told so afterwards."""
        alive = [m for m in self.machines.values() if m.alive and m.node_no != HEAD]
        if not alive:
            self.happened.append((self.now, "cut_node did not happen: there is no node but the head"))
        else:
            machine = self.rng.choice(alive)
            machine.cut_until = self.now + seconds
            self.happened.append((self.now, f"node {machine.label} is cut off for {seconds:g} s"))

    def slow_node(self, factor: float) -> None:
        alive = [m for m in self.machines.values() if m.alive and m.node_no != HEAD]
        if not alive:
            self.happened.append((self.now, "slow_node did not happen: there is no node but the head"))
        else:
            machine = self.rng.choice(alive)
            machine.slowness = factor
            self.happened.append((self.now, f"node {machine.label} runs {factor:g} times slower"))

    # ------------------------------------------------------------ what came of it

    def utilisation(self) -> float:
        """The part of all workers' time, while their machines lived, in which they ran tasks."""
        machines = self.machines.values()
        lived_s = sum(m.cpus * ((self.now if m.until_s is None else m.until_s) - m.since_s) for m in machines)
        return sum(m.busy_s for m in machines) / max(1e-9, lived_s)

    def trace_hash(self) -> str:
        return self.trace.hexdigest() if self.trace is not None else ""
