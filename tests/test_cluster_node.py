"""The decisions of several nodes together, without a process and without time: what one tells another is delivered at once."""

from __future__ import annotations

import pickle
from collections import deque
from collections.abc import Callable
from typing import Any

import pytest

from minray import ids
from minray.cluster_messages import AttemptRaised, Expelled, FetchFailed, NodeDied, NodeJoined, ObjectArrived, TasksGiven
from minray.cluster_node import HEARTBEAT_S, ROWS_A_NODE, SILENT_NODE_S, ClusterNode
from minray.messages import (
    DRIVER, ActorKillRequested, BlockRequested, CheckpointTaken, Command, FetchObject, FunctionExported, ObjectLost, ObjectPut, ObjectsAwaited,
    ReferencesChanged, Reply, RestoreActor, RunTasks, StartWorker, TasksFinished, TasksSubmitted, TellNode, TemplateDefined, Ticked, Unpinned,
    WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.policy import Policy
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_METHOD, ALIVE, ERROR, FAILED, FINISHED, OK, RETRYABLE_ERROR, TASK, UNIT, ActorOptions, TaskOptions, TaskSpec,
)  # fmt: skip

F = b"f" * 16
ROOT = ids.root_task_id(b"cluster")
CPU, GPU = ("CPU", UNIT), ("GPU", UNIT)
PLAIN, ONCE, ON_GPU, MANY_CPUS, ACTOR, EXACT, CALL, LARGE, FLAKY, TWO = range(1, 11)
TEMPLATES = {
    PLAIN: TaskOptions(TASK, F, "plain", resources=(CPU,)),
    ONCE: TaskOptions(TASK, F, "once", resources=(CPU,), max_retries=0),
    ON_GPU: TaskOptions(TASK, F, "on_gpu", resources=(GPU,)),
    MANY_CPUS: TaskOptions(TASK, F, "many_cpus", resources=(("CPU", 99 * UNIT),)),
    ACTOR: TaskOptions(ACTOR_CREATION, F, "A.__init__", resources=(GPU,), max_retries=0),
    EXACT: TaskOptions(ACTOR_CREATION, F, "E.__init__", resources=(GPU,), max_retries=0, checkpoint_every=2),
    CALL: TaskOptions(ACTOR_METHOD, b"", "A.call", method="call", max_retries=0),
    LARGE: TaskOptions(TASK, F, "large", resources=(CPU,)),
    FLAKY: TaskOptions(TASK, F, "flaky", resources=(CPU,), retry_exceptions=True),
    TWO: TaskOptions(TASK, F, "two", num_returns=2, resources=(CPU,)),
}
SIZE = 100_000


def task_id(number: int, parent: bytes = ROOT) -> bytes:
    return ids.pack_id(ids.children_prefix(parent), number, 0)


T1, T2, T3, T4, T5, T6 = (task_id(number) for number in range(1, 7))
CHILD, PUT = task_id(1, T2), ids.put_id(T2, 1)  # of T2


class Cluster:
    """A head (node 1) and others, each with a CPU a worker; workers do what a test says, or what `work` says."""

    def __init__(self, *resources: dict[str, int], policy: Policy | None = None) -> None:
        self.now = 1000.0
        self.nodes: dict[int, ClusterNode] = {}
        self.said: list[tuple[int, Any]] = []  # every event between nodes, and to whom
        self.commands: list[tuple[int, Command]] = []  # every other command
        self.answers: dict[int, Any] = {}  # of the driver's requests
        self.stored: dict[int, int] = {}  # by node: blocks written
        self.mail: deque[tuple[int, Any]] = deque()
        self.told: set[tuple[int, int]] = set()
        self.is_slow = False  # Copies that nodes fetch do not arrive.
        for amounts in resources:
            self.add(amounts, policy)

    def add(self, amounts: dict[str, int], policy: Policy | None = None) -> int:
        number = max([0, *self.stored]) + 1
        self.stored[number] = 0
        total = {name: amount * UNIT for name, amount in amounts.items()}
        node = self.nodes[number] = ClusterNode(
            total, 1 << 20, lambda object_id: f"/{number}/{object_id.hex()}", policy, f"n{number}", node_no=number
        )
        for command in node.start_workers(amounts["CPU"]):
            self.handle(number, WorkerStarted(command.client, 100 + command.client))
        if number > 1:
            self.handle(number, NodeJoined(-1, "n1", self.nodes[1].scheduler.total))
            self.handle(1, NodeJoined(-number, f"n{number}", total))
        return number

    def handle(self, number: int, event: Any) -> list[Command]:
        """What the node commands; what it tells others has been heard, and answered, too."""
        first = len(self.commands)
        self.mail.append((number, event))
        while self.mail:
            to, heard = self.mail.popleft()
            if to in self.nodes:
                commands = self.nodes[to].handle(heard, self.now)
                if to == 1 or -1 in self.nodes[to].neighbours or self.nodes[to]._beat_at is None:
                    self.nodes[to].check()
                for command in commands:
                    self.carry_out(to, command)
        return [command for at, command in self.commands[first:] if at == number]

    def carry_out(self, number: int, command: Command) -> None:
        if isinstance(command, TellNode):
            for event in command.events:
                self.said.append((-command.client, event))
                self.mail.append((-command.client, event))
        elif isinstance(command, FetchObject):
            if self.is_slow:
                pass
            elif self.nodes[-command.client].fetch_for_driver(command.object_id) is None:
                self.mail.append((number, FetchFailed(DRIVER, command.fetch_no, "it is not there")))
            else:
                self.mail.append((-command.client, Unpinned(DRIVER, [command.object_id])))
                self.mail.append((number, ObjectArrived(DRIVER, command.fetch_no)))
        elif isinstance(command, StartWorker):
            self.mail.append((number, WorkerStarted(command.client, 100 + command.client)))
        elif isinstance(command, Reply) and command.client == DRIVER:
            self.answers[command.request_id] = command.answer
        self.commands.append((number, command))

    # ------------------------------------------------------------ what programs and processes do

    def submit(
        self, template: int, *task_ids: bytes, at: int = 1, client: int = DRIVER, parent: bytes = ROOT, **fields: Any
    ) -> None:
        if (at, client * 100 + template) not in self.told:
            self.told.add((at, client * 100 + template))
            self.handle(at, FunctionExported(client, F, b"code", "f", "m", None))
            self.handle(at, TemplateDefined(client, template, TEMPLATES[template]))
        self.handle(at, TasksSubmitted(client, parent, [TaskSpec(one, template, **fields) for one in task_ids]))

    def hands(self) -> list[tuple[int, int, bytes, str]]:
        """What workers have in hand: node, worker, task, name; in the order in which they got it."""
        return [
            (number, client, one, task.template.options.name)
            for number, node in self.nodes.items()
            for client, worker in node.scheduler.workers.items()
            for one, task in worker.in_flight.items()
        ]

    def where(self, one: bytes) -> int:
        """On which node a worker has it in hand."""
        (number,) = {number for number, _, task, _ in self.hands() if task == one}
        return number

    def holder(self, one: bytes) -> tuple[int, int]:
        """The node and the worker that have it in hand."""
        holders = [(number, client) for number, client, task, _ in self.hands() if task == one]
        assert holders, "nobody has it in hand"
        return holders[0]

    def submit_in(self, parent: bytes, template: int, *children: bytes, **fields: Any) -> None:
        """By the worker that has the parent in hand."""
        number, client = self.holder(parent)
        self.submit(template, *children, at=number, client=client, parent=parent, **fields)

    def put_in(self, parent: bytes, object_id: bytes) -> None:
        number, client = self.holder(parent)
        self.handle(number, ObjectPut(client, object_id, (self.block(number, client, object_id), SIZE, ())))

    def crash(self, one: bytes) -> None:
        """The worker that executes it dies."""
        number, client = self.holder(one)
        self.handle(number, WorkerDied(client, "was killed by SIGKILL", one))

    def finish(self, one: bytes, payload: Any = b"value", status: int = OK, nested: tuple[bytes, ...] = ()) -> None:
        number, client = self.holder(one)
        self.now += 0.01
        if payload == "large":
            payload = [(self.block(number, client, one), SIZE, nested)]
        elif nested:
            payload = [(payload, len(payload), nested)]
        self.handle(number, TasksFinished(client, [(one, status, payload, self.now - 0.01, self.now)]))

    def block(self, number: int, client: int, object_id: bytes) -> Any:
        self.stored[number] += 1
        replies = self.handle(number, BlockRequested(client, 7, object_id, SIZE))
        (kind, where, *_) = next(command.answer for command in replies if isinstance(command, Reply))
        assert kind in ("block", "file")
        return where

    def work(self) -> None:
        """Until nobody has anything in hand: every task returns, the ones named large 100 KB."""
        for _ in range(200):
            if not (hands := self.hands()):
                return
            _, _, one, name = hands[0]
            self.finish(one, "large" if name == "large" else b"value")
        raise AssertionError(f"they do not come to an end: {self.hands()}")

    def get(self, *object_ids: bytes) -> list[Any]:
        """The driver's values; None while one is not there."""
        request = len(self.answers) + 1000
        self.handle(1, ObjectsAwaited(DRIVER, request, list(object_ids), len(object_ids), True, False))
        node = self.nodes[1]
        return [node.objects[one].data for one in object_ids]

    def error(self, object_id: bytes, at: int = 1) -> BaseException:
        entry = self.nodes[at].objects[object_id]
        assert entry.is_error
        error: BaseException = pickle.loads(entry.data)  # type: ignore[arg-type]
        return error

    def kill(self, number: int, reason: str = "was killed") -> None:
        del self.nodes[number]
        self.handle(1, NodeDied(-number, reason))

    def release(self, *object_ids: bytes) -> None:
        self.handle(1, ReferencesChanged(DRIVER, [], list(object_ids)))

    def given(self, to: int) -> list[bytes]:
        return [spec.task_id for at, event in self.said if at == to and isinstance(event, TasksGiven) for spec, *_ in event.tasks]

    def let_all_go(self, *object_ids: bytes) -> None:
        """All work is done, and neither the driver (these) nor any worker holds or reads anything: nothing is left."""
        self.work()
        self.release(*object_ids)
        for number, node in self.nodes.items():
            for client, worker in node.scheduler.workers.items():
                self.handle(number, Unpinned(client, [one for one, count in worker.pins.items() for _ in range(count)]))
                self.handle(number, ReferencesChanged(client, [], list(worker.held)))
        self.nothing_is_left()

    def nothing_is_left(self) -> None:
        for number, node in self.nodes.items():
            assert not node.objects and not node.lineage.tasks and not node.actors.actors, f"node {number} keeps something"
            assert node.scheduler.available == node.scheduler.total
            for neighbour in node.neighbours.values():
                assert not neighbour.held and not neighbour.in_flight and not neighbour.owed and not neighbour.awaits


# ---------------------------------------------------------------- where a task runs


def test_the_head_runs_what_fits_and_gives_the_rest_to_whoever_has_room() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 2}, {"CPU": 1})
    cluster.submit(PLAIN, T1, T2, T3, T4)
    assert sorted(number for number, *_ in cluster.hands()) == [1, 2, 2, 3]
    cluster.work()
    assert cluster.get(T1, T2, T3, T4) == [b"value"] * 4
    cluster.release(T1, T2, T3, T4)
    cluster.nothing_is_left()


def test_a_node_keeps_what_its_own_tasks_submit() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 2})
    cluster.submit(PLAIN, T1, T2)
    parent = T2 if cluster.where(T2) == 2 else T1
    said = len(cluster.said)
    children = [task_id(number, parent) for number in range(1, 4)]
    cluster.submit(PLAIN, *children, at=2, client=1, parent=parent)
    assert len(cluster.said) == said, "bottom-up: nobody else was asked"
    assert {cluster.where(child) for child in children if any(child == one for _, _, one, _ in cluster.hands())} == {2}


class KeepsNothing(Policy):
    def keeps(self, waiting: int, mean_s: float | None, slots: int) -> bool:
        return False


def test_what_a_node_does_not_keep_goes_up_and_its_result_comes_back() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1}, {"CPU": 1}, policy=KeepsNothing())
    cluster.submit(PLAIN, T1, T2, T3)
    parent = next(one for number, _, one, _ in cluster.hands() if number == 2)
    cluster.finish(next(one for number, _, one, _ in cluster.hands() if number == 3))
    child = task_id(1, parent)
    cluster.submit(PLAIN, child, at=2, client=1, parent=parent)
    assert cluster.given(1) == [child] and cluster.where(child) == 3
    cluster.finish(child, b"of the child")
    assert cluster.nodes[2].objects[child].data == b"of the child"


@pytest.mark.parametrize("submitted_at", [1, 2])
def test_what_needs_a_resource_goes_where_it_is(submitted_at: int) -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1}, {"CPU": 1, "GPU": 1})
    if submitted_at == 1:
        cluster.submit(ON_GPU, T1)
        child = T1
    else:
        cluster.submit(PLAIN, T1, T2)
        parent = next(one for number, _, one, _ in cluster.hands() if number == 2)
        child = task_id(1, parent)
        cluster.submit(ON_GPU, child, at=2, client=1, parent=parent)
    assert cluster.where(child) == 3
    cluster.finish(child)
    assert cluster.nodes[submitted_at].objects[child].data == b"value"


def test_what_no_node_can_run_is_an_error_and_was_not_run() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(MANY_CPUS, T1)
    assert "99 CPU" in str(cluster.error(T1))


def test_a_task_goes_where_its_large_argument_lies_unless_others_would_start_it_sooner() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1)  # Keeps the head busy.
    cluster.submit(LARGE, T2)
    place = cluster.where(T2)
    assert place != 1
    cluster.finish(T2, "large")
    cluster.submit(PLAIN, T3, deps=(T2,))
    assert cluster.where(T3) == place
    cluster.submit(PLAIN, T4, deps=(T2,))  # There it would wait: moving 100 KB takes less.
    assert cluster.where(T4) not in (place,)
    assert [type(command) for _, command in cluster.commands].count(FetchObject) == 1


# ---------------------------------------------------------------- where objects lie


def a_large_result_elsewhere() -> Cluster:
    """T2 has made one on node 2; T1 keeps the head's only worker busy."""
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1)
    cluster.submit(LARGE, T2)
    assert cluster.where(T2) == 2
    cluster.finish(T2, "large")
    return cluster


def test_a_large_result_stays_where_it_was_made_until_somebody_reads_it_elsewhere() -> None:
    cluster = a_large_result_elsewhere()
    entry = cluster.nodes[1].objects[T2]
    assert entry.data is None and entry.away is not None and entry.away.places == [2]
    (data,) = cluster.get(T2)
    assert type(data) is int and cluster.nodes[2].objects[T2].data is not None, "now both have it"
    cluster.get(T2)
    assert [type(command) for _, command in cluster.commands].count(FetchObject) == 1
    cluster.finish(T1)
    cluster.release(T1, T2)
    cluster.nothing_is_left()


def test_a_value_that_is_freed_where_it_was_submitted_is_freed_where_it_lies() -> None:
    cluster = a_large_result_elsewhere()
    assert cluster.nodes[2].lineage.arena.blocks
    cluster.release(T2)
    assert T2 not in cluster.nodes[2].objects


def test_a_copy_that_is_dropped_is_read_from_where_another_is() -> None:
    cluster = a_large_result_elsewhere()
    cluster.get(T2)
    cluster.handle(1, ObjectLost(DRIVER, T2, None, "a test dropped it"))
    entry = cluster.nodes[1].objects[T2]
    assert entry.data is None and entry.away is not None and entry.away.places == [2]
    assert type(cluster.get(T2)[0]) is int
    assert T2 not in [one for _, _, one, _ in cluster.hands()], "nothing was run for that"


def test_a_result_that_is_lost_where_it_lies_is_made_again() -> None:
    cluster = a_large_result_elsewhere()
    cluster.handle(2, ObjectLost(DRIVER, T2, None, "a test dropped it"))
    assert cluster.get(T2) == [None]
    assert cluster.where(T2) in (1, 2)
    cluster.work()
    assert type(cluster.get(T2)[0]) is int


# ---------------------------------------------------------------- nodes die


def test_tasks_of_a_node_that_died_run_again_elsewhere_and_lose_an_attempt() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1, T2)
    lost = T1 if cluster.where(T1) == 2 else T2
    before = cluster.nodes[1].lineage.tasks[lost].retries_left
    cluster.kill(2)
    assert cluster.nodes[1].lineage.tasks[lost].retries_left == before - 1
    cluster.work()
    assert cluster.get(T1, T2) == [b"value", b"value"]


def test_a_task_without_retries_fails_with_the_node_that_had_it() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(ONCE, T1, T2)
    lost = T1 if cluster.where(T1) == 2 else T2
    cluster.kill(2, "was unplugged")
    error = cluster.error(lost)
    assert type(error).__name__ == "NodeDiedError" and "node n2 was unplugged" in str(error) and "max_retries" in str(error)


def test_a_chain_of_results_that_was_lost_with_its_node_is_made_again_from_its_lineage() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1)  # Keeps the head busy, so all of the chain is made on node 2.
    cluster.submit(LARGE, T2)
    cluster.finish(T2, "large")
    for one, dep in ((T3, T2), (T4, T3)):
        cluster.submit(LARGE, one, deps=(dep,))
        assert cluster.where(one) == 2
        cluster.finish(one, "large")
    cluster.release(T2, T3)
    cluster.kill(2)
    assert cluster.get(T4) == [None]
    replayed = []
    for _ in range(6):
        hands = [(number, one) for number, _, one, _ in cluster.hands() if one != T1]
        if not hands:
            break
        replayed.append(hands[0][1])
        cluster.finish(hands[0][1], "large")
    assert replayed == [T2, T3, T4], "each once, from the first that is needed"
    assert type(cluster.get(T4)[0]) is int


def test_what_a_worker_had_put_on_a_node_that_died_is_an_error_that_says_so() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(ONCE, T1, T2)
    parent = T1 if cluster.where(T1) == 2 else T2
    put = ids.put_id(parent, 1)
    cluster.handle(2, ObjectPut(1, put, (cluster.block(2, 1, put), SIZE, ())))
    cluster.finish(parent, [(b"names it", 8, (put,))])
    assert cluster.nodes[1].objects[put].away is not None
    cluster.kill(2)
    cluster.work()
    cluster.get(put)
    cluster.work()
    assert type(cluster.error(put)).__name__ in ("ObjectLostError", "ObjectReconstructionFailedError", "OwnerDiedError")


def test_a_put_comes_back_when_the_task_that_told_of_it_runs_again() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1, T2)
    parent = T1 if cluster.where(T1) == 2 else T2
    put = ids.put_id(parent, 1)
    cluster.handle(2, ObjectPut(1, put, (cluster.block(2, 1, put), SIZE, ())))
    cluster.finish(parent, [(b"names it", 8, (put,))])
    cluster.kill(2)
    cluster.finish(T2 if parent == T1 else T1)
    assert cluster.get(put) == [None] and cluster.where(parent) == 1
    cluster.handle(1, ObjectPut(1, put, (cluster.block(1, 1, put), SIZE, ())))
    cluster.finish(parent, [(b"names it", 8, (put,))])
    assert type(cluster.get(put)[0]) is int


def test_a_silent_node_is_declared_dead_at_its_deadline_and_what_it_says_later_is_not_heard() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1, T2)
    lost = T1 if cluster.where(T1) == 2 else T2
    heard_s = cluster.nodes[1].neighbours[-2].heard_s
    ticks = 0
    while -2 in cluster.nodes[1].neighbours:
        cluster.now = cluster.nodes[1].wake_at  # type: ignore[assignment]
        cluster.handle(1, Ticked(DRIVER))
        ticks += 1
        assert ticks < 1000, "a deadline that is never reached"
    assert heard_s + SILENT_NODE_S <= cluster.now <= heard_s + SILENT_NODE_S + 2 * HEARTBEAT_S
    first = len(cluster.said)
    cluster.handle(2, TasksFinished(1, [(lost, OK, b"late", cluster.now - 0.01, cluster.now)]))
    assert (2, Expelled(-1)) in cluster.said[first:]
    assert -1 not in cluster.nodes[2].neighbours, "it ends"
    assert cluster.nodes[1].objects[lost].data is None, "its result does not count"


# ---------------------------------------------------------------- actors


def an_actor(cluster: Cluster, template: int = ACTOR, restarts: int = 1) -> None:
    """T1, on the node that has a GPU."""
    cluster.submit(template, T1, actor=ActorOptions("A", max_restarts=restarts))
    assert cluster.where(T1) != 1
    cluster.finish(T1)
    assert cluster.nodes[1].actors.actors[T1].state == ALIVE


def test_an_actor_lives_where_its_resources_are_and_its_calls_keep_their_order() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster)
    cluster.submit(CALL, T2, T3, T4, actor_id=T1)
    assert [one for number, _, one, _ in cluster.hands() if number == 2] == [T2, T3, T4]
    cluster.work()
    assert cluster.get(T2, T3, T4) == [b"value"] * 3
    cluster.release(T2, T3, T4, T1)
    cluster.work()
    cluster.handle(2, WorkerDied(next(iter(cluster.nodes[2]._leaving), 1), "exited", None))
    assert not cluster.nodes[2].actors.actors and not cluster.nodes[1].actors.actors


def test_an_actor_whose_node_died_lives_again_on_another_and_what_waited_is_executed_there() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster)
    first = next(number for number in (2, 3) if cluster.nodes[number].actors.actors)
    cluster.submit(CALL, T2, actor_id=T1)
    cluster.kill(first)
    other = 5 - first
    assert type(cluster.error(T2)).__name__ == "ActorUnavailableError", "it may have run, and max_task_retries is 0"
    cluster.submit(CALL, T3, T4, actor_id=T1)
    assert cluster.where(T1) == other
    cluster.finish(T1)
    assert [one for number, _, one, _ in cluster.hands() if number == other] == [T3, T4]
    cluster.work()
    assert cluster.get(T3, T4) == [b"value", b"value"]


def test_the_error_of_an_actors_death_elsewhere_names_the_node_and_points_to_no_log_of_the_home() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster)
    cluster.submit(CALL, T2, actor_id=T1)
    ((_, worker, *_),) = cluster.hands()
    cluster.handle(2, WorkerDied(worker, "was killed by SIGKILL", T2))
    said = str(cluster.error(T2))
    assert f"its worker was killed by SIGKILL (worker {worker}, pid {100 + worker}, node n2)" in said
    assert "ran out of memory. The worker's output is in the logs of its node\n" in said and "worker-" not in said


def test_the_history_of_a_task_that_is_replayed_says_on_which_node_it_ran() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    cluster.submit(ON_GPU, T1)
    cluster.finish(T1, "large")
    cluster.kill(2)
    events = cluster.nodes[1].take_rows(cluster.now)["events"]
    assert "attempt 1 began to run on node 2" in [message for *_, message in events]


def test_an_actor_without_restarts_dies_with_its_node() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster, restarts=0)
    cluster.kill(next(number for number in (2, 3) if cluster.nodes[number].actors.actors))
    cluster.submit(CALL, T2, actor_id=T1)
    assert type(cluster.error(T2)).__name__ == "ActorDiedError" and "was lost with node" in str(cluster.error(T2))


def test_an_exact_actor_is_made_again_elsewhere_from_its_checkpoint_and_the_calls_since() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster, EXACT, restarts=-1)
    first = next(number for number in (2, 3) if cluster.nodes[number].actors.actors)
    worker = next(client for client, record in cluster.nodes[first].scheduler.workers.items() if record.actor is not None)
    cluster.submit(CALL, T2, T3, T4, T5, actor_id=T1)
    cluster.finish(T2)
    cluster.finish(T3)
    checkpoint = ids.checkpoint_id(T1, 1)
    block = cluster.block(first, worker, checkpoint)
    cluster.handle(first, CheckpointTaken(worker, checkpoint, (block, SIZE, ()), True))
    recovery = cluster.nodes[1].actors.actors[T1].recovery
    assert recovery is not None and recovery.checkpoint == checkpoint, "it counts: the home has a copy"
    cluster.finish(T4)
    assert [call.spec.task_id for call in recovery.log] == [T4]
    cluster.kill(first)
    other, begins = 5 - first, len(cluster.commands)
    cluster.finish(T1)
    restored = [command for at, command in cluster.commands if at == other and isinstance(command, RestoreActor)]
    assert len(restored) == 1 and restored[0].checkpoint[3] == checkpoint
    sent = [task[0] for at, c in cluster.commands[begins:] if at == other and isinstance(c, RunTasks) for task in c.tasks]
    while len(hands := [one for number, _, one, _ in cluster.hands() if number == other]):
        sent += [one for one in hands if one not in sent]
        cluster.finish(hands[0], b"again")
        now = [one for number, _, one, _ in cluster.hands() if number == other]
        sent += [one for one in now if one not in sent]
    assert [one for one in sent if one != T1] == [T4, T5], "the log, then what it had in hand; nothing that is in the checkpoint"
    assert cluster.get(T2, T3, T4, T5) == [b"value", b"value", b"value", b"again"], "replies are not sent twice"


def a_second_attempt_makes_its_actor_again() -> Cluster:
    """T2 on node 2 has given an actor's making to the head; its worker died before the actor was there; now its next
    attempt has submitted the actor, too."""
    cluster = Cluster({"CPU": 1, "GPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1)  # Keeps the head's CPU busy.
    cluster.submit(PLAIN, T2)
    cluster.submit_in(T2, ACTOR, CHILD, actor=ActorOptions("A", max_restarts=1))
    cluster.crash(T2)
    assert CHILD not in cluster.nodes[2].objects, "with its worker the handle went"
    cluster.submit_in(T2, ACTOR, CHILD, actor=ActorOptions("A", max_restarts=1))
    assert cluster.where(T2) == 2 and cluster.where(CHILD) == 1
    return cluster


def test_an_actor_that_a_second_attempt_found_on_its_way_can_be_killed() -> None:
    cluster = a_second_attempt_makes_its_actor_again()
    cluster.handle(2, ActorKillRequested(cluster.holder(T2)[1], CHILD, True))
    assert CHILD not in [one for _, _, one, _ in cluster.hands()], "its home has heard of it"
    cluster.let_all_go(T1, T2)


def test_an_actor_that_a_second_attempt_found_on_its_way_ends_with_its_last_handle() -> None:
    cluster = a_second_attempt_makes_its_actor_again()
    cluster.finish(CHILD)
    assert cluster.nodes[1].actors.actors[CHILD].state == ALIVE
    cluster.let_all_go(T1, T2)


def test_an_actor_ends_when_one_that_its_makers_next_life_has_made_comes_to_live_on_the_same_node() -> None:
    made, call = task_id(1, T1), task_id(2, T1)
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 3})
    cluster.submit(ACTOR, T1, actor=ActorOptions("Maker", max_restarts=1))
    cluster.submit_in(T1, ACTOR, made, actor=ActorOptions("Made"))
    cluster.submit_in(T1, CALL, call, actor_id=made)
    cluster.finish(made)
    assert cluster.where(call) == 2
    cluster.submit(ACTOR, T2, actor=ActorOptions("Another"))  # So node 3, where nobody lives, is the maker's next home.
    cluster.add({"CPU": 1, "GPU": 1})
    cluster.crash(T1)
    assert cluster.where(T1) == 3 and cluster.where(call) == 2, "that call keeps the actor, though its handle has gone"
    cluster.submit_in(T1, ACTOR, made, actor=ActorOptions("Made"))
    assert cluster.where(made) == 2, "no other node has a GPU left"
    assert call not in [one for _, _, one, _ in cluster.hands()]
    cluster.let_all_go(T1, T2)


def save(cluster: Cluster, number: int, large: bool = True) -> bytes:
    """The actor on node 2 takes a checkpoint."""
    worker = next(client for client, record in cluster.nodes[2].scheduler.workers.items() if record.actor is not None)
    checkpoint = ids.checkpoint_id(T1, number)
    value = (cluster.block(2, worker, checkpoint), SIZE, ()) if large else (b"state", 5, ())
    cluster.handle(2, CheckpointTaken(worker, checkpoint, value, True))
    return checkpoint


def restore(cluster: Cluster) -> RestoreActor:
    """Node 2 dies: what the actor's next instance, on node 3, starts from."""
    cluster.kill(2)
    cluster.finish(T1)
    (command,) = [command for at, command in cluster.commands if at == 3 and isinstance(command, RestoreActor)]
    return command


def test_the_copy_of_a_checkpoint_stays_at_the_actors_home_whatever_else_needs_its_memory() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster, EXACT, restarts=-1)
    checkpoint = save(cluster, 1)
    cluster.add({"CPU": 1, "GPU": 1})
    cluster.submit(PLAIN, T2)  # Keeps the head busy.
    for number in range(10, 22, 2):
        pair = task_id(number), task_id(number + 1)
        cluster.submit(LARGE, *pair)
        for one in pair:
            cluster.finish(one, "large")
        cluster.get(*pair)  # The head fetches copies: more than there is room for.
    copies = [one for one, entry in cluster.nodes[1].objects.items() if type(entry.data) is int]
    assert len(copies) == 10 and checkpoint in copies
    _, _, is_error, restored = restore(cluster).checkpoint
    assert (is_error, restored) == (False, checkpoint)


def test_a_checkpoint_has_its_number_also_if_the_one_before_it_never_arrives() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster, EXACT, restarts=-1)
    cluster.is_slow = True
    save(cluster, 1)
    save(cluster, 2, large=False)  # It travels in the message, and is there first.
    cluster.add({"CPU": 1, "GPU": 1})
    command = restore(cluster)
    assert command.checkpoint[0] == b"state"
    assert command.number == 2, "the next instance counts on from there: no ID is used twice"


# ---------------------------------------------------------------- rows


def test_each_node_records_its_own_under_numbers_of_its_own() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    an_actor(cluster)
    cluster.submit(PLAIN, T2, T3)
    parent = next(one for number, _, one, name in cluster.hands() if number == 2 and name == "plain")
    worker = next(client for number, client, one, _ in cluster.hands() if one == parent)
    cluster.submit(PLAIN, task_id(1, parent), at=2, client=worker, parent=parent)
    cluster.work()
    head, other = (cluster.nodes[number].take_rows(cluster.now) for number in (1, 2))
    assert {row[1] for row in head["tasks"]} == {T1, T2, T3}
    assert [row[1] for row in head["actors"]] == [T1] and "actors" not in other, "an actor's row is its home's"
    assert [row[1] for row in other["tasks"]] == [task_id(1, parent)], "a task's is its giver's"
    for table in ("tasks", "events"):
        assert all(row[0] > ROWS_A_NODE for row in other.get(table, ()))


# ---------------------------------------------------------------- whenever a node dies


def a_program(cluster: Cluster) -> tuple[list[bytes], list[bytes]]:
    """Tasks, a chain of large values, a parent with children, an actor with calls.  The small results, and the large ones."""
    cluster.submit(PLAIN, T1, T2)
    cluster.submit(LARGE, T3)
    cluster.submit(LARGE, T4, deps=(T3,))
    cluster.submit(PLAIN, T5, deps=(T4, T1))
    actor = task_id(10)
    cluster.submit(ACTOR, actor, actor=ActorOptions("A", max_restarts=-1))
    calls = [task_id(number) for number in (11, 12, 13)]
    cluster.submit(CALL, *calls, actor_id=actor)
    return [T1, T2, T5, *calls], [T3, T4]


def step(cluster: Cluster) -> bool:
    """The first task in anybody's hand ends.  False: there is none."""
    hands = cluster.hands()
    if hands:
        _, _, one, name = hands[0]
        cluster.finish(one, "large" if name == "large" else b"value")
    return bool(hands)


@pytest.mark.parametrize("victim", [2, 3])
def test_at_whichever_step_a_node_dies_everything_comes_to_its_end(victim: int) -> None:
    steps = 0
    while True:
        cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 2, "GPU": 1})
        small, large = a_program(cluster)
        going = all(step(cluster) for _ in range(steps))
        cluster.kill(victim)
        cluster.get(*large)
        for _ in range(100):
            if not step(cluster):
                break
        values = cluster.get(*small)
        calls = small[3:]
        for one, value in zip(small, values):
            if value != b"value":
                assert one in calls and type(cluster.error(one)).__name__ == "ActorUnavailableError", f"after {steps} steps"
        assert all(type(value) in (int, str) for value in cluster.get(*large)), f"after {steps} steps"
        if not going:
            break
        steps += 1
    assert steps >= 9


LATE: list[Callable[[Cluster], None]] = [
    lambda cluster: cluster.submit(PLAIN, T6),
    lambda cluster: cluster.release(T1),
    lambda cluster: cluster.handle(1, Ticked(DRIVER)) and None,
]


@pytest.mark.parametrize("late", range(len(LATE)))
def test_a_node_that_was_expelled_says_what_it_likes_and_changes_nothing(late: int) -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    cluster.submit(PLAIN, T1, T2)
    ghost = cluster.nodes[2]
    (lost,) = [one for number, _, one, _ in cluster.hands() if number == 2]
    cluster.kill(2)
    LATE[late](cluster)
    before = {one: task.state for one, task in cluster.nodes[1].lineage.tasks.items()}
    for command in ghost.handle(TasksFinished(1, [(lost, OK, b"late", 0.0, 0.0)]), cluster.now):
        for event in command.events if isinstance(command, TellNode) else ():
            assert [type(answer) for answer in cluster.nodes[1].handle(event, cluster.now)] == [TellNode]
    assert before == {one: task.state for one, task in cluster.nodes[1].lineage.tasks.items()}
    assert all(state != FAILED for state in before.values()) and FINISHED not in before.values()


# ---------------------------------------------------------------- attempts that raised


def marks(cluster: Cluster, number: int, one: bytes) -> list[int]:
    """What workers of that node were told of the task, each time that they were given it (see RunTasks)."""
    commands = [command for at, command in cluster.commands if at == number and isinstance(command, RunTasks)]
    return [task[4] for command in commands for task in command.tasks if task[0] == one]


def raise_on_node_2(cluster: Cluster, *tasks: bytes) -> bytes:
    cluster.submit(FLAKY, *tasks)
    flaky = next(one for number, _, one, _ in cluster.hands() if number == 2)
    cluster.finish(flaky, (b"error", "ValueError: again"), RETRYABLE_ERROR)
    assert marks(cluster, 2, flaky) == [False, -1], "it is retried where it raised"
    return flaky


def test_whoever_gave_a_task_that_raised_runs_it_again_with_the_children_of_its_last_attempt() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    flaky = raise_on_node_2(cluster, T1, T2)
    assert [event for to, event in cluster.said if isinstance(event, AttemptRaised)] == [AttemptRaised(-2, flaky, 1, 2)]
    cluster.kill(2)
    cluster.work()
    assert marks(cluster, 1, flaky) == [-1]
    assert cluster.nodes[1].lineage.tasks[flaky].retries_left == 1, "of three: it raised, and its node died"
    assert cluster.get(T1, T2) == [b"value"] * 2


def test_a_replay_on_another_node_has_the_children_of_the_attempt_that_succeeded() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    flaky = raise_on_node_2(cluster, T1, T2)
    cluster.finish(flaky, "large")
    cluster.work()
    cluster.kill(2)
    cluster.work()
    assert marks(cluster, 1, flaky) == [-1] and cluster.nodes[1].objects[flaky].data == b"value"


def test_a_task_that_has_raised_and_is_given_to_another_node_takes_the_number_with_it() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1})
    flaky = raise_on_node_2(cluster, T1, T2)
    cluster.add({"CPU": 1})
    cluster.kill(2)
    assert cluster.where(flaky) == 3, "the head is busy"
    assert marks(cluster, 3, flaky) == [-1]
    cluster.finish(flaky, (b"error", "ValueError: again"), RETRYABLE_ERROR)
    assert marks(cluster, 3, flaky) == [-1, -2] and cluster.nodes[1].lineage.tasks[flaky].raised == 2
    cluster.work()
    assert cluster.get(T1, T2) == [b"value"] * 2


# ---------------------------------------------------------------- what is lost by name


def a_replay_where_its_value_is_known(made: bytes, large: bool = False) -> Cluster:
    """T2's value names what T2 has made, which is lost with node 2.  T2 runs again on node 3, which has been given that
    value as T3's argument."""
    cluster = Cluster({"CPU": 1}, {"CPU": 2})
    cluster.submit(PLAIN, T1)  # Keeps the head busy.
    cluster.submit(PLAIN, T2)
    if made == PUT:
        cluster.put_in(T2, PUT)
    else:
        cluster.submit_in(T2, LARGE, CHILD)
        cluster.finish(CHILD, "large")
    cluster.finish(T2, "large" if large else b"names it", nested=(made,))
    cluster.add({"CPU": 2, "GPU": 1})
    cluster.submit(ON_GPU, T3, deps=(T2,))
    cluster.kill(2)
    assert cluster.where(T2) == cluster.where(T3) == 3
    return cluster


def test_a_replay_runs_also_where_its_value_is_known_and_the_head_makes_the_child_that_it_keeps_for_others() -> None:
    cluster = a_replay_where_its_value_is_known(CHILD)
    assert cluster.get(CHILD) == [None], "the value that is known is no answer: T2 has to bring back what it names"
    cluster.submit_in(T2, LARGE, CHILD)
    assert cluster.given(1) == [CHILD]
    cluster.work()
    assert type(cluster.get(CHILD)[0]) is int
    cluster.let_all_go(T1, T2, T3)


def test_a_replay_that_fails_where_its_value_is_known_changes_nothing_of_it() -> None:
    cluster = a_replay_where_its_value_is_known(CHILD, large=True)
    for _ in range(3):  # It has run once, and max_retries is 3.
        cluster.crash(T2)
    assert type(cluster.get(T2)[0]) is int
    assert type(cluster.error(CHILD)).__name__ == "ObjectLostError", "but what it names did not come back"
    cluster.let_all_go(T1, T2, T3)


def test_what_a_replay_puts_again_has_its_home_where_that_runs() -> None:
    cluster = a_replay_where_its_value_is_known(PUT)
    cluster.put_in(T2, PUT)  # Node 3 knew it through the head.
    cluster.finish(T2, b"names it", nested=(PUT,))
    assert type(cluster.get(PUT)[0]) is int
    cluster.let_all_go(T1, T2, T3)


def test_a_name_that_two_nodes_have_from_each_other_alone_is_lost() -> None:
    cluster = a_replay_where_its_value_is_known(PUT)
    cluster.finish(T2, b"names it", nested=(PUT,))  # It has not put that again.
    assert cluster.get(PUT) != [None], "each would wait for the other"
    assert type(cluster.error(PUT)).__name__ == "ObjectLostError"
    cluster.let_all_go(T1, T2, T3)


def test_a_name_that_is_freed_and_named_again_by_the_same_message_stays() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 2})
    cluster.submit(PLAIN, T1)
    cluster.submit(TWO, T2)
    cluster.submit(MANY_CPUS, T3, deps=(T2,))  # Is refused as soon as it could run.
    cluster.release(T2)  # So only T3 holds T2's first result.
    cluster.submit_in(T2, PLAIN, CHILD)
    cluster.finish(T2, [(b"names it", 8, (CHILD,)), (b"names it", 8, (CHILD,))])
    cluster.finish(CHILD)
    assert cluster.get(CHILD) == [b"value"]


def test_a_child_that_was_lost_is_made_by_another_attempt_of_its_parent_at_the_head() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 2, "GPU": 1})
    an_actor(cluster)
    a_child_on_node_2(cluster)
    cluster.finish(CHILD)
    cluster.submit(CALL, T3, actor_id=T1)
    cluster.finish(T3, b"names it", nested=(CHILD,))
    cluster.kill(2)
    cluster.finish(T6)
    assert cluster.where(T2) == 1
    cluster.submit_in(T2, PLAIN, CHILD)
    cluster.work()
    assert cluster.get(CHILD) == [b"value"]


def test_a_lost_name_waits_for_a_node_where_its_maker_can_run_again() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1})
    cluster.submit(LARGE, T1)
    cluster.finish(T1, "large")
    cluster.submit(ON_GPU, T2, deps=(T1,))
    cluster.put_in(T2, PUT)
    cluster.finish(T2, b"names it", nested=(PUT,))
    cluster.submit(LARGE, T3, deps=(PUT,))
    assert cluster.where(T3) == 2
    cluster.kill(2)  # And with it the only GPU.
    assert cluster.hands() == [] and cluster.get(PUT) == [None]
    cluster.add({"CPU": 1, "GPU": 1})
    assert cluster.where(T2) == 3
    cluster.put_in(T2, PUT)
    cluster.finish(T2, b"names it", nested=(PUT,))
    cluster.finish(T3, "large")
    cluster.let_all_go(T1, T2, T3)


@pytest.mark.parametrize("payload", ["large", b"small"])
def test_what_has_run_waits_for_a_node_like_the_one_that_died_however_large_its_arguments_are(payload: Any) -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1, "GPU": 1}, {"CPU": 1})
    cluster.submit(LARGE, T1)
    cluster.finish(T1, payload)
    cluster.submit(ON_GPU, T2, deps=(T1,))
    cluster.finish(T2, "large")
    cluster.kill(2)
    assert cluster.get(T2) == [None]
    cluster.add({"CPU": 1, "GPU": 1})
    cluster.finish(T2, "large")
    cluster.let_all_go(T1, T2)


def a_child_on_node_2(cluster: Cluster) -> None:
    cluster.submit(PLAIN, T6)  # Keeps the head busy.
    cluster.submit(LARGE, T2)
    cluster.submit_in(T2, PLAIN, CHILD)
    assert cluster.where(T2) == cluster.where(CHILD) == 2


def run_parent_on_a_node_that_keeps_nothing(cluster: Cluster) -> None:
    """Node 2 dies; T2's next attempt runs on one that gives each child to the head."""
    cluster.add({"CPU": 2}, KeepsNothing())
    cluster.kill(2)
    assert cluster.where(T2) == 3


def test_an_error_that_a_task_returned_is_its_result_when_another_attempt_of_its_parent_submits_it() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 2})
    a_child_on_node_2(cluster)
    cluster.finish(CHILD, (pickle.dumps(ValueError("no")), "ValueError: no"), ERROR)
    cluster.finish(T2, "large", nested=(CHILD,))
    cluster.handle(1, ReferencesChanged(DRIVER, [CHILD], []))  # The driver has read T2's value,
    cluster.get(CHILD)  # and this one.
    run_parent_on_a_node_that_keeps_nothing(cluster)
    cluster.submit_in(T2, PLAIN, CHILD)
    assert cluster.given(1) == [CHILD]
    assert CHILD not in [one for _, _, one, _ in cluster.hands()], "it is not run a second time"
    assert type(cluster.error(CHILD, at=3)) is type(cluster.error(CHILD)) is ValueError
    cluster.let_all_go(T2, T6, CHILD)


def the_lost_child_is_made_again(cluster: Cluster, stood_for_by: str) -> None:
    run_parent_on_a_node_that_keeps_nothing(cluster)
    assert type(cluster.error(CHILD)).__name__ == stood_for_by
    cluster.submit_in(T2, PLAIN, CHILD)
    cluster.finish(CHILD)
    assert cluster.get(CHILD) == [b"value"]


def test_a_child_that_was_lost_with_whoever_told_of_it_is_made_by_another_attempt_of_its_parent() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 2, "GPU": 1})
    an_actor(cluster)
    a_child_on_node_2(cluster)
    cluster.finish(CHILD)
    cluster.submit(CALL, T3, actor_id=T1)
    cluster.finish(T3, b"names it", nested=(CHILD,))  # T2 had given it to the actor.
    the_lost_child_is_made_again(cluster, "ObjectReconstructionFailedError")  # A call is not run again.


def test_a_child_that_was_lost_and_that_nobody_told_of_is_made_by_another_attempt_of_its_parent() -> None:
    cluster = Cluster({"CPU": 1, "GPU": 1}, {"CPU": 2})
    a_child_on_node_2(cluster)
    cluster.finish(CHILD)
    cluster.submit_in(T2, ACTOR, task_id(2, T2), nested=(CHILD,), actor=ActorOptions("A", max_restarts=1))
    cluster.finish(T2, "large")
    the_lost_child_is_made_again(cluster, "ObjectLostError")  # The head knew it as an argument alone.


def test_a_child_that_somebody_asked_for_before_it_was_there_is_made_nevertheless() -> None:
    cluster = Cluster({"CPU": 1}, {"CPU": 1}, policy=KeepsNothing())
    cluster.submit(PLAIN, T1)  # Keeps the head busy.
    cluster.submit(PLAIN, T2)
    cluster.get(CHILD)
    assert "has been freed" in str(cluster.error(CHILD))
    cluster.submit_in(T2, PLAIN, CHILD)
    cluster.work()
    assert cluster.get(CHILD) == [b"value"]
    cluster.let_all_go(T1, T2, CHILD)
