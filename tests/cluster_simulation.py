"""Several nodes in a world of fake processes, links and disks: simulation.py, once for each node.

The programs and processes are those of simulation.py; a `Host` is its `Machine` with a node among others, and the `World` has the time,
the seed and the links.  To what can fail there it adds: a node is killed with all its processes, a new one joins, a
link is slow, or carries nothing for so long that the head declares the node dead, which goes on working without knowing.

In the end no node may have anything left, and at rest every reference that a node holds at another must be counted there, and the
other way round.
"""

from __future__ import annotations

import hashlib
import heapq
import itertools
from collections import Counter, deque
from collections.abc import Callable
from random import Random
from typing import Any

from simulation import (
    ACTOR, EXACT, HUNGRY, KINDS, NO_ACTOR, OWN_WAY, Context, Driver, Machine, Process, Worker, choose_limits,
    limited,
)  # fmt: skip

from minray import ids
from minray.cluster_messages import (
    HEAD, ActorReleased, FetchFailed, LoadReported, NodeDied, NodeJoined, ObjectArrived, TasksGiven,
)  # fmt: skip
from minray.cluster_node import ROWS_A_NODE, SILENT_NODE_S, ClusterNode
from minray.lineage import GONE
from minray.messages import (
    DRIVER, ActorKillRequested, Command, FetchObject, ObjectLost, ReferencesChanged, TasksFinished, TellNode, Unpinned,
)  # fmt: skip
from minray.task_spec import ACTOR_CREATION, ACTOR_EXITED, CANCELLED, FAILED, FINISHED, OK, UNIT


def shared(name: str) -> Any:
    """An attribute that all hosts have together."""

    def read(host: Host) -> Any:
        return getattr(host.world, name)

    def write(host: Host, value: Any) -> None:
        setattr(host.world, name, value)

    return property(read, write)


class HeadDriver(Driver):
    def unresolved(self) -> list[bytes]:
        """They need not all be in this node's memory at once."""
        assert self.context is not None
        node: Any = self.sim.node
        return [i for i in self.context.refs if not node.is_available(node.objects[i])][:1]


class Host(Machine):
    rng, now, faulty, events, trace, story = (shared(n) for n in ("rng", "now", "faulty", "events", "trace", "story"))
    depth, secluded, actor_ids, contents, calls = (shared(n) for n in ("depth", "secluded", "actor_ids", "contents", "calls"))
    states, stamps, actor_kinds, check_every, seed = (shared(n) for n in ("states", "stamps", "actor_kinds", "check_every", "seed"))
    exact, task_kinds = shared("exact"), shared("task_kinds")

    def __init__(self, world: World, node_no: int, resources: dict[str, int], store_bytes: int, cpus: int) -> None:
        self.world = world
        self.node_no = node_no
        self.label = f"node {node_no}: "
        self.resources = resources
        super().__init__()
        self.node = ClusterNode(
            resources, store_bytes, lambda i: f"/spill-{node_no}/" + i.hex(), label=f"n{node_no}", node_no=node_no
        )
        self.is_over = False
        self.given: dict[bytes, bool] = {}  # tasks, and whether some other node had executed them before
        self.carry_out(self.node.start_workers(cpus))

    def make_driver(self) -> Driver:
        return HeadDriver(self)

    def at(self, when: float, what: Callable[..., None], *args: Any) -> None:
        self.world.at(when, self.unless_over, what, args)

    def unless_over(self, what: Callable[..., None], args: tuple[Any, ...]) -> None:
        if not self.is_over:
            what(*args)
            self.set_alarm()

    def set_alarm(self) -> None:
        wake_at = self.node.wake_at
        if wake_at is not None and wake_at != self._tick_at:
            self._tick_at = wake_at
            is_beat = wake_at == self.node._beat_at  # type: ignore[attr-defined]
            self.world.at(wake_at, self.unless_over, self.tick, (wake_at,), background=is_beat)

    def handle(self, event: Any) -> None:
        before = self.node._tasks_made
        if type(event) is TasksFinished and event.client < 0:
            self.check_states_at_home(event)
            self.check_raised(event)
        if type(event) is ReferencesChanged and event.client in self.node.neighbours and not self.world.losses:  # type: ignore[attr-defined]
            for object_id in event.acquired:
                known = object_id in self.node.objects or ids.task_of(object_id) in self.node.lineage.tasks
                known = known or object_id in self.world.let_go
                assert known, f"{ids.short(object_id)} was freed while its name was on its way"
        super().handle(event)
        if type(event) is TasksGiven:
            self.note_given(event, before)

    def kill_someone(self, actor_id: bytes | None = None) -> None:
        """An actor's worker, on whichever node it is."""
        for host in self.world.hosts.values():
            if actor_id is not None and any(process.actor_id == actor_id for process in host.processes.values()):
                Machine.kill_someone(host, actor_id)
                return
        super().kill_someone(actor_id)

    def begins(self, process: Process, task_id: bytes, raised: int) -> None:
        """How often a task may be executed on several nodes depends on what each of them knew."""
        self.world.executed[task_id] = raised
        record = self.node.scheduler.workers.get(process.client)
        assert record is None or task_id in record.in_flight, f"{ids.short(task_id)} is executed, and others have it"

    def saw(self, process: Process, object_id: bytes, data: Any) -> None:
        if self.world.losses or self.world.deaths:  # What was lost with a node is made again, and is another value.
            self.value_at(object_id, data)
        else:
            super().saw(process, object_id, data)

    def take_rows(self) -> None:
        super().take_rows()
        for (table, number), _ in self.rows.items():
            assert number > (self.node_no - HEAD) * ROWS_A_NODE, f"{table} {number} is another node's"

    def check_states(self, process: Worker, results: list[Any]) -> None:
        actor = self.node.scheduler.workers[process.client].actor
        if actor is None or not self.node._is_guest(actor):  # type: ignore[attr-defined]
            super().check_states(process, results)
        elif actor.task.template.options.checkpoint_every:
            for task_id, status, *_ in results:
                if task_id != actor.actor_id and status not in (CANCELLED, ACTOR_EXITED):
                    call, self.world.ended[task_id] = process.ends.popleft()
                    assert call == task_id

    def check_states_at_home(self, event: TasksFinished) -> None:
        """P3, of an actor that lives on another node: what counts is what its home has heard."""
        neighbour = self.node.neighbours.get(event.client)  # type: ignore[attr-defined]
        for task_id, status, *_ in event.results:
            task = neighbour.in_flight.get(task_id) if neighbour is not None else None
            actor = task.worker.actor if task is not None else None
            if actor is None or actor.recovery is None or task_id == actor.actor_id or task_id not in self.world.ended:
                continue
            if status in (CANCELLED, ACTOR_EXITED):
                continue
            state, answered = self.world.ended[task_id], self.answered.setdefault(actor.no, [])
            if len(state) > len(answered):
                answered.append(state[-1])
                assert answered.count(state[-1]) == 1, "a call was executed twice"
            assert list(state) == answered[: len(state)], "an actor's state is not that of the calls that were answered"

    def check_raised(self, event: TasksFinished) -> None:
        """Whoever gave a task knows how many of its attempts have raised: should it be lost, it runs it again.

        (Not who gives it when it was known where it goes: its parent's second attempt, on another node than the first.  Nor
        who hears of a result that was lost meanwhile, so that the task runs again there, and raises.)"""
        neighbour = self.node.neighbours.get(event.client)  # type: ignore[attr-defined]
        for task_id, status, *_ in event.results:
            task = neighbour.in_flight.get(task_id) if neighbour is not None else None
            if task is None or status != OK or self.world.deaths or self.world.losses or self.given.get(task_id):
                continue
            if task.template.options.kind != ACTOR_CREATION:
                assert task.raised == self.world.executed.get(task_id, 0), f"{ids.short(task_id)}: the giver has {task.raised}"

    def note_given(self, event: TasksGiven, before: int) -> None:
        for spec, *_ in event.tasks:
            task = self.node.lineage.tasks.get(spec.task_id)
            if task is not None and task.no > before:
                self.tasks[task.no] = task
                self.unrecorded.add(task.no)  # Whoever gave it records it.
                self.note_call(task)

    def note_submitted(self, event: Any, before: int) -> None:
        for spec in event.specs:
            task = self.node.lineage.tasks.get(spec.task_id)
            if task is not None and task.no > before:
                self.tasks[task.no] = task
                self.note_call(task)

    def note_call(self, task: Any) -> None:
        """In the order in which they come to the actor's home."""
        if task.spec.actor_id is not None:
            actor = self.node.actors.actors.get(task.spec.actor_id)
            if actor is not None and not self.node._is_guest(actor):  # type: ignore[attr-defined]
                if task.state < FINISHED:  # Else it was executed before, and is not again.
                    self.calls[task.spec.task_id] = ((self.node_no, task.caller), next(self.world.numbers))

    def carry_out(self, commands: list[Command]) -> None:
        rest = []
        for command in commands:
            if type(command) is TellNode:
                self.note_names(command)
                self.world.send(self, -command.client, command.events)
            elif type(command) is FetchObject:
                self.after(self.world.rng.uniform(0.0001, 0.003), self.read_from, command)
            else:
                rest.append(command)
        super().carry_out(rest)

    def note_names(self, command: TellNode) -> None:
        """A call's arguments are held until its result comes, or until its actor's home buries the actor: then the node where
        it lived may hear of the call, and right behind it that the actor is released.  So with what its constructor is given."""
        named = self.world.named
        for event in command.events:
            if type(event) is TasksGiven:
                for spec, *_ in event.tasks:
                    self.given.setdefault(spec.task_id, spec.task_id in self.world.executed)
                    actor_id = spec.actor_id if spec.actor is None else spec.task_id
                    if actor_id is not None:
                        named.setdefault((command.client, actor_id), []).extend(spec.deps + spec.nested)
            elif type(event) is ActorReleased:
                self.world.let_go.update(named.pop((command.client, event.actor_id), ()))

    def read_from(self, command: FetchObject) -> None:
        source = self.world.hosts.get(-command.client)
        fetched = None
        if source is not None and not source.is_over and not self.world.is_cut(self, source):
            fetched = source.node.fetch_for_driver(command.object_id)
            if fetched is not None and type(fetched[0]) is str and fetched[0] not in source.files:
                source.handle(Unpinned(DRIVER, [command.object_id]))
                source.handle(ObjectLost(DRIVER, command.object_id, fetched[0], "its file is gone"))
                source.set_alarm()
                fetched = None
        if fetched is None or type(fetched[0]) is bytes:  # An error by now.
            self.handle(FetchFailed(DRIVER, command.fetch_no, "it is not there"))
            return
        assert source is not None and fetched[1] == command.size
        value = source.value_at(command.object_id, fetched[0])
        self.world.at(self.now + self.world.rng.uniform(0.0001, 0.01), self.has_read, command, source, value)

    def has_read(self, command: FetchObject, source: Host, value: int) -> None:
        if self.is_over:
            if not source.is_over:  # Its connection has broken.
                source.handle(Unpinned(DRIVER, [command.object_id]))
                source.set_alarm()
            return
        if source.is_over or self.world.is_cut(self, source):
            self.handle(FetchFailed(DRIVER, command.fetch_no, "the connection broke"))
            self.set_alarm()
            if not source.is_over:
                source.handle(Unpinned(DRIVER, [command.object_id]))
                source.set_alarm()
            return
        source.handle(Unpinned(DRIVER, [command.object_id]))
        source.set_alarm()
        kind, where, *_ = command.room
        if kind == "block":
            self.write(where, command.object_id)
            self.memory[where] = (command.object_id, value)
        else:
            self.files[where] = (command.object_id, value)
        self.handle(ObjectArrived(DRIVER, command.fetch_no))
        self.set_alarm()

    def check(self) -> None:
        if self.node_no != HEAD and -HEAD not in self.node.neighbours and self.node._beat_at is None:  # type: ignore[attr-defined]
            return  # It was expelled, or has not joined yet.
        if self.events % self.check_every == 0:
            self.node.check(self.driver.held)
        for object_id, entry in self.node.objects.items():
            if entry.data is not None:
                first, data, is_error = self.committed.get(object_id, (None, None, False))
                if first is entry and is_error != GONE:  # Else it may be made again, by another attempt of its maker.
                    same = type(entry.data) is not bytes or entry.data == data  # A large one may come again elsewhere.
                    assert same and entry.is_error == is_error, f"a value has changed: {ids.short(object_id)}"
                self.committed[object_id] = (entry, entry.data, entry.is_error)
            else:
                self.committed.pop(object_id, None)

    def check_end(self) -> None:
        node = self.node
        left = [task for task in self.tasks.values() if task.state not in (FINISHED, FAILED)]
        assert not left, f"{len(left)} tasks never ended: {[(t.template.options.name, t.state) for t in left]}"
        for neighbour in node.neighbours.values():  # type: ignore[attr-defined]
            open_ends = [ids.short(i) for i in neighbour.in_flight], list(neighbour.awaits), neighbour.owed
            assert open_ends == ([], [], 0), f"towards {neighbour.label}: in flight, awaited, owed: {open_ends}"
        assert not node._staying and not node._fetches and not node._makers and not node._questions  # type: ignore[attr-defined]
        super().check_end()


class World:
    def __init__(self, seed: int, keep_trace: bool = False, check_every: int = 1) -> None:
        self.seed = seed
        self.rng = Random(seed)
        self.now = 1000.0
        self.faulty = True
        self.events = 0
        self.check_every = check_every
        self.max_events = 50_000
        self.trace = hashlib.blake2b(digest_size=16) if keep_trace else None
        self.story: deque[str] = deque(maxlen=6000 if keep_trace else 0)
        self._heap: list[tuple[float, int, bool, Callable[..., None], tuple[Any, ...]]] = []
        self._ties = itertools.count()
        self._foreground = 0
        self.numbers = itertools.count(1)
        self.depth: dict[bytes, int] = {}
        self.secluded: list[bytes] = []
        self.actor_ids: dict[bytes, bool] = {}
        self.contents: dict[bytes, tuple[bytes, ...]] = {}
        self.calls: dict[bytes, tuple[bytes, int]] = {}
        self.states: dict[bytes, tuple[tuple[bytes, ...], tuple[bytes, ...]]] = {}
        self.stamps = itertools.count(1)
        self.exact: dict[bytes, bool] = {}
        self.task_kinds = KINDS  # Generators do not run on other nodes yet.
        self.actor_kinds = (ACTOR, ACTOR, ACTOR, HUNGRY, HUNGRY, NO_ACTOR, EXACT, OWN_WAY, OWN_WAY)
        self.ended: dict[bytes, tuple[bytes, ...]] = {}  # by call of a guest: the state after its last execution
        self.executed: dict[bytes, int] = {}  # by task: how many attempts had raised before the last that has begun
        self.hosts: dict[int, Host] = {}
        self.links: dict[tuple[int, int], float] = {}  # when what was sent last arrives
        self.slow: dict[int, float] = {}
        self.cut: dict[int, float] = {}  # node -> until when its link carries nothing
        self.losses = self.deaths = 0
        self.named: dict[tuple[int, bytes], list[bytes]] = {}  # by the node and the actor there: names in its calls
        self.let_go: set[bytes] = set()  # those of actors that were released; never iterated
        self.closed: list[tuple[int, int]] = []
        head = self.add_host(self.rng.choice((1, 1, 2)))
        for _ in range(self.rng.choice((1, 1, 2, 3))):
            self.add_host(self.rng.choice((1, 1, 2)))
        root = ids.root_task_id(b"%d" % seed)
        head.driver.context = Context(head.driver, root)

    def add_host(self, cpus: int, all_resources: bool = False) -> Host:
        node_no = len(self.hosts) + HEAD
        rng = self.rng
        resources = {"CPU": cpus * UNIT}
        if node_no == HEAD or all_resources or rng.random() < 0.5:
            resources["room"] = 99 * UNIT
        if all_resources or rng.random() < 0.5:
            resources["license"] = UNIT
        if all_resources or rng.random() < 0.5:
            resources["GPU"] = rng.choice((1, 2)) * UNIT
        host = self.hosts[node_no] = Host(self, node_no, resources, rng.choice((200_000, 300_000, 10_000_000)), cpus)
        self.slow[node_no] = rng.choice((1, 1, 1, 30))
        if node_no != HEAD:
            head = self.hosts[HEAD]
            host.handle(NodeJoined(-HEAD, "head", head.resources))
            host.set_alarm()
            head.handle(NodeJoined(-node_no, f"n{node_no}", resources))
            head.set_alarm()
        return host

    # ------------------------------------------------------------ time

    def at(self, when: float, what: Callable[..., None], *args: Any, background: bool = False) -> None:
        self._foreground += not background
        heapq.heappush(self._heap, (when, next(self._ties), background, what, args))

    def until_all_is_quiet(self) -> None:
        quiet_since = self.now
        for _ in range(self.max_events):
            if not self._foreground and (not self._heap or self._heap[0][0] > quiet_since + 0.35):
                return  # Some heartbeats later still nothing has happened.
            when, _, background, what, args = heapq.heappop(self._heap)
            self._foreground -= not background
            self.now = max(self.now, when)
            what(*args)
            if self._foreground or not background:
                quiet_since = self.now
        raise AssertionError("it does not come to an end")

    # ------------------------------------------------------------ links

    def send(self, sender: Host, to: int, events: list[Any]) -> None:
        link = (sender.node_no, to)
        if link in self.closed:
            return
        delay = self.rng.choice((0.0001, 0.0003, 0.001)) * max(self.slow[sender.node_no], self.slow[to])
        other = max(sender.node_no, to)
        start = max(self.now, self.cut.get(other, 0.0))
        arrives = self.links[link] = max(self.links.get(link, 0.0), start + delay)
        only_beats = all(type(event) is LoadReported for event in events)
        self.at(arrives, self.deliver, link, events, background=only_beats)

    def deliver(self, link: tuple[int, int], events: list[Any]) -> None:
        sender, to = link
        host = self.hosts[to]
        if link in self.closed or host.is_over:
            return
        for event in events:
            host.handle(event)
        host.set_alarm()
        host = self.hosts[max(link)]
        if to != HEAD and -HEAD not in host.node.neighbours:  # type: ignore[attr-defined]
            self.end(host)  # It was expelled.

    def is_cut(self, one: Host, other: Host) -> bool:
        return any(self.cut.get(host.node_no, 0.0) > self.now for host in (one, other))

    # ------------------------------------------------------------ faults

    def end(self, host: Host) -> None:
        """All its processes, its memory and its links are gone."""
        if host.is_over:
            return
        host.is_over = True
        self.deaths += 1
        self.closed += [(host.node_no, HEAD), (HEAD, host.node_no)]

    def kill_node(self) -> None:
        alive = [host for host in self.hosts.values() if host.node_no != HEAD and not host.is_over]
        if not self.faulty or not alive:
            return
        host = self.rng.choice(alive)
        self.end(host)
        self.at(self.now + self.rng.choice((0.0, 0.001, 0.05)), self.tell_of_death, host)
        if self.rng.random() < 0.5:
            self.at(self.now + self.rng.uniform(0.0, 0.2), self.join)

    def tell_of_death(self, host: Host) -> None:
        self.hosts[HEAD].handle(NodeDied(-host.node_no, "was killed"))
        self.hosts[HEAD].set_alarm()

    def join(self) -> None:
        self.add_host(self.rng.choice((1, 2)))

    def cut_link(self) -> None:
        alive = [host for host in self.hosts.values() if host.node_no != HEAD and not host.is_over]
        if self.faulty and alive:
            host = self.rng.choice(alive)
            self.deaths += 1  # It may be declared dead.
            self.cut[host.node_no] = self.now + self.rng.choice((0.05, 0.5, SILENT_NODE_S * 1.5))
            self.at(self.cut[host.node_no], self.heal)

    def heal(self) -> None:
        pass

    def on_some_host(self, what: str) -> None:
        alive = [host for host in self.hosts.values() if not host.is_over]
        host = self.rng.choice(alive)
        self.losses += what == "lose_something"  # A result that was lost does not hold what it names.
        getattr(host, what)()
        host.set_alarm()

    # ------------------------------------------------------------ a run

    def run(self) -> World:
        with limited(choose_limits(self.rng)):
            self.run_to_its_end()
        return self

    def run_to_its_end(self) -> None:
        rng, head = self.rng, self.hosts[HEAD]
        head.driver.code = head.driver.main()
        head.after(0.0, head.driver.go_on, None)
        for _ in range(rng.choice((0, 1, 3, 8))):
            self.at(self.now + rng.uniform(0.02, 0.2), self.on_some_host, "kill_someone")
        for _ in range(rng.choice((0, 0, 2, 6))):
            self.at(self.now + rng.uniform(0.02, 0.2), self.on_some_host, "lose_something")
        for _ in range(rng.choice((0, 0, 1, 5))):
            self.at(self.now + rng.uniform(0.02, 0.2), self.on_some_host, "stop_someone")
        if self.seed % 4 == 1:  # The others are the runs that they were before.
            for _ in range(rng.choice((1, 1, 2))):
                self.at(self.now + rng.uniform(0.0, 0.3), self.on_some_host, "kill_zygote")
        for _ in range(rng.choice((0, 0, 1, 1, 2))):
            self.at(self.now + rng.uniform(0.02, 0.3), self.kill_node)
        for _ in range(rng.choice((0, 0, 0, 1, 2))):
            self.at(self.now + rng.uniform(0.02, 0.3), self.cut_link)
        if rng.random() < 0.2:
            self.at(self.now + rng.uniform(0.02, 0.3), self.join)
        self.until_all_is_quiet()
        for host in self.hosts.values():
            if host is not head and -host.node_no not in head.node.neighbours:  # type: ignore[attr-defined]
                self.end(host)  # It does not know yet.
        if any(host.is_over for host in self.hosts.values()):  # Perhaps with the only license, say.
            self.add_host(2, all_resources=True)
            self.until_all_is_quiet()
        for host in list(self.hosts.values()):
            if not host.is_over:
                for actor in list(host.node.actors.actors.values()):
                    lasts = actor.options.detached or actor.options.name
                    if lasts and not host.node._is_guest(actor):  # type: ignore[attr-defined]
                        host.handle(ActorKillRequested(DRIVER, actor.actor_id, True))
                        host.set_alarm()
        self.until_all_is_quiet()
        self.check_links()
        for host in self.hosts.values():
            if not host.is_over:
                try:
                    host.check_end()
                except AssertionError as error:
                    raise AssertionError(f"node {host.node_no}: {error}") from error

    def check_links(self) -> None:
        """At rest: what one node holds at another is counted there, and nothing else is."""
        head = self.hosts[HEAD].node
        for host in self.hosts.values():
            if host.is_over or host.node_no == HEAD:
                continue
            node: Any = host.node
            for one, other in ((head, node), (node, head)):
                other_no = -other.node_no
                holds = [i for i, entry in other.objects.items() if entry.away is not None and entry.away.keeper == -one.node_no]
                counted = list(one.neighbours[other_no].held)
                assert Counter(holds) == Counter(counted), (
                    f"node {other.node_no} holds {[ids.short(i) for i in holds]} at node {one.node_no}, "
                    f"which counts {[ids.short(i) for i in counted]}"
                )

    def trace_hash(self) -> str:
        assert self.trace is not None
        return self.trace.hexdigest()


if __name__ == "__main__":
    import sys

    world = World(int(sys.argv[1]), keep_trace=True)
    try:
        world.run()
    finally:
        print(*world.story, sep="\n")
        print(f"{world.events} events")
