"""Exact recovery, decided by a node without a process: crash after each message of a small workload, and compare.

The processes here are played: an actor's state is the list of calls that it has executed, a call submits a
child and may return a reference to it.  Real ones are in test_exact_actors.py; other orders of
events in simulation.py.
"""

from __future__ import annotations

import pickle
from collections import Counter, deque
from itertools import combinations
from typing import Any

import pytest

from minray import ids, node_exact
from minray.actor_table import MAX_CALLERS, MAX_IN_FLIGHT, Recovery
from minray.messages import (
    DRIVER, ActorKillRequested, BlockRequested, CancelRequested, CheckpointFailed, CheckpointTaken, FunctionExported, KillWorker,
    ObjectLost, ReferencesChanged, RestoreActor, RunTasks, StartWorker, TasksFinished, TasksSubmitted, TemplateDefined,
    Warn, WorkerDied, WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.node_exact import MAX_FRUITLESS
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, ACTOR_METHOD, ALIVE, CANCELLED, DEAD, ERROR, FINISHED, OK, RETRYABLE_ERROR, TASK, UNIT,
    ActorOptions, TaskOptions, TaskSpec,
)  # fmt: skip

F = b"f" * 16
ROOT = ids.root_task_id(b"job")
CHILD, CALLER, CALL, RETRIED, NOTHING, ONCE = 1, 2, 3, 4, 5, 6
TEMPLATES = {
    CHILD: TaskOptions(TASK, F, "child", resources=(("CPU", UNIT),)),
    CALLER: TaskOptions(TASK, F, "caller", resources=(("caller", UNIT),)),
    CALL: TaskOptions(ACTOR_METHOD, b"", "A.call", method="call", max_retries=3),
    RETRIED: TaskOptions(ACTOR_METHOD, b"", "A.retried", method="retried", max_retries=5, retry_exceptions=True),
    ONCE: TaskOptions(ACTOR_METHOD, b"", "A.once", method="once", max_retries=0),
    NOTHING: TaskOptions(TASK, F, "nothing", num_returns=0, resources=(("CPU", UNIT),)),
}
ACTOR = 10


def child_of(parent: bytes, number: int, raised: int = 0) -> bytes:
    return ids.pack_id(ids.children_prefix(parent, raised), number, 0)


class Instance:
    """A worker: what it was told to run, and, if it is the actor's, its state."""

    def __init__(self, client: int) -> None:
        self.client = client
        self.queue: deque[tuple[Any, ...]] = deque()
        self.known: set[int] = set()
        self.templates: dict[int, TaskOptions] = {}
        self.actor_id: bytes | None = None
        self.state: tuple[bytes, ...] = ()
        self.saved = self.number = 0
        self.running: bytes | None = None


class Play:
    def __init__(self, every: int = 2, workers: int = 3, crashes: tuple[int, ...] = (), max_restarts: int = -1) -> None:
        self.node = Node({"CPU": workers * UNIT, "caller": UNIT}, 1 << 20, lambda object_id: "/spill/" + object_id.hex())
        self.every = every
        self.crashes = crashes
        self.messages = 0  # of the actor's worker
        self.workers: dict[int, Instance] = {}
        self.states: dict[bytes, tuple[bytes, ...]] = {}
        self.runs: Counter[bytes] = Counter()  # how often each child ran to its end
        self.warnings: list[str] = []
        self.restored: list[int] = []
        self.now = 1000.0
        self.children = 0
        self.may_fail: dict[bytes, int] = {}
        self.checks = True
        self.handle(FunctionExported(DRIVER, F, b"code", "f", "m", None))
        for number, options in TEMPLATES.items():
            self.handle(TemplateDefined(DRIVER, number, options))
        for command in self.node.start_workers(workers):
            self.carry_out(command)
        creation = TaskOptions(ACTOR_CREATION, F, "A.__init__", max_retries=0, checkpoint_every=every)
        self.handle(TemplateDefined(DRIVER, ACTOR, creation))
        self.actor_id = self.submit(ACTOR, actor=ActorOptions("A", max_restarts=max_restarts))

    # ------------------------------------------------------------ the node and its processes

    def handle(self, event: Any) -> list[Any]:
        self.now += 0.001
        commands = self.node.handle(event, self.now)
        if self.checks:
            self.node.check()
        for command in commands:
            self.carry_out(command)
        return commands

    def carry_out(self, command: Any) -> None:
        if isinstance(command, StartWorker):
            self.workers[command.client] = Instance(command.client)
            self.handle(WorkerStarted(command.client, 100 + command.client))
        elif isinstance(command, Warn):
            self.warnings.append(command.text)
        elif isinstance(command, KillWorker):
            self.die(command.client)
        elif isinstance(command, RestoreActor):
            instance = self.workers[command.client]
            data, _, is_error, object_id = command.checkpoint
            assert data == b"state" and not is_error
            instance.state, instance.number = self.states[object_id], command.number
            self.restored.append(command.number)
        elif isinstance(command, RunTasks):
            self.workers[command.client].queue.extend(command.tasks)

    def submit(self, template: int, client: int = DRIVER, parent: bytes = ROOT, task_id: bytes = b"", **more: Any) -> bytes:
        if not task_id:
            self.children += 1
            task_id = child_of(parent, self.children)
        self.handle(TasksSubmitted(client, parent, [TaskSpec(task_id, template, **more)]))
        return task_id

    def call(self, template: int = CALL, **more: Any) -> bytes:
        return self.submit(template, actor_id=self.actor_id, **more)

    def die(self, client: int, reason: str = "was killed by SIGKILL") -> list[Any]:
        instance = self.workers.pop(client, None)
        return self.handle(WorkerDied(client, reason, instance.running)) if instance is not None else []

    @property
    def actor(self) -> Any:
        return self.node.actors.actors[self.actor_id]

    @property
    def instance(self) -> Instance:
        return self.workers[self.actor.worker.client]

    # ------------------------------------------------------------ what the processes do

    def say(self, instance: Instance, event: Any) -> bool:
        """False: it was the last thing that this process did."""
        self.handle(event)
        if instance.actor_id is not None:
            self.messages += 1
            if self.messages in self.crashes:
                self.die(instance.client)
        return self.workers.get(instance.client) is instance

    def run(self, steps: int = 10_000) -> None:
        for _ in range(steps):
            busy = [instance for instance in self.workers.values() if instance.queue]
            if not busy:
                return
            self.step(busy[0])
        raise AssertionError("it does not come to an end")

    def step(self, instance: Instance) -> None:
        task_id, template_no, _, _, mark = instance.queue.popleft()
        raised = max(0, -mark)
        task = self.node.scheduler.workers[instance.client].in_flight[task_id]
        options = task.template.options
        instance.running = task_id
        alive = True
        status, payload = OK, pickle.dumps(None)
        if options.kind == ACTOR_CREATION:
            instance.actor_id = task_id
        elif options.kind == ACTOR_METHOD:
            alive = self.children_of(instance, task_id, raised)
            instance.state += (task_id,)
            payload = pickle.dumps(len(instance.state))
            if self.may_fail.get(task_id, 0) > instance.state.count(task_id) - 1:
                status, payload = RETRYABLE_ERROR, (pickle.dumps(ValueError("again")), "ValueError: again")
        elif options.name == "caller":
            self.running_caller(instance, task_id)
            return
        else:
            self.runs[task_id] += 1
            payload = pickle.dumps(None) if options.num_returns else []
        if not alive:
            return
        instance.running = None
        if not self.say(instance, TasksFinished(instance.client, [(task_id, status, payload, self.now, self.now)])):
            return
        if options.kind == ACTOR_METHOD:
            self.say(instance, ReferencesChanged(instance.client, [], [child_of(task_id, 1, raised)]))
            instance.saved += 1
            if instance.saved == self.every and self.workers.get(instance.client) is instance:
                self.save(instance)

    def children_of(self, instance: Instance, parent: bytes, raised: int) -> bool:
        """One that returns something, and one that does not, in a frame each."""
        for number, template in ((1, CHILD), (2, NOTHING)):
            self.introduce(instance, template)
            spec = TaskSpec(child_of(parent, number, raised), template)
            if not self.say(instance, TasksSubmitted(instance.client, parent, [spec])):
                return False
        return True

    def introduce(self, instance: Instance, template: int) -> None:
        if template not in instance.known:
            instance.known.add(template)
            self.handle(TemplateDefined(instance.client, template, TEMPLATES[template]))

    def save(self, instance: Instance) -> None:
        instance.saved = 0
        object_id = ids.checkpoint_id(self.actor_id, instance.number + 1)
        instance.number += 1
        self.states[object_id] = instance.state
        self.say(instance, CheckpointTaken(instance.client, object_id, (b"state", 5, ()), True))

    def running_caller(self, instance: Instance, task_id: bytes) -> None:
        """It submits three calls, and waits until the test lets it go on."""
        self.introduce(instance, CALL)
        for number in (1, 2, 3):
            spec = TaskSpec(child_of(task_id, number), CALL, actor_id=self.actor_id)
            self.handle(TasksSubmitted(instance.client, task_id, [spec]))

    # ------------------------------------------------------------ the end

    def result(self, call: bytes) -> Any:
        entry = self.node.objects[call]
        assert entry.data is not None, "it was never answered"
        value = pickle.loads(entry.data)
        if entry.is_error:
            raise value
        return value

    def nothing_is_left(self, *refs: bytes) -> None:
        self.handle(ActorKillRequested(DRIVER, self.actor_id, True))
        for client in list(self.node._leaving):
            self.handle(WorkerDied(client, "exited", None))
        self.run()
        self.handle(ReferencesChanged(DRIVER, [], [self.actor_id, *refs]))
        self.node.check({})
        assert not self.node.objects and not self.node.lineage.tasks and not self.node.actors.actors


def workload(every: int, crashes: tuple[int, ...]) -> Play:
    """Five calls of the driver, and three of a task."""
    play = Play(every, crashes=crashes)
    caller = play.submit(CALLER)
    calls = [play.call() for _ in range(5)]
    play.run()
    host = next(instance for instance in play.workers.values() if instance.running == caller)
    calls += [child_of(caller, number) for number in (1, 2, 3)]
    results = [play.result(call) for call in calls]
    state = play.instance.state
    assert sorted(state) == sorted(calls), "each call once"
    assert [state.index(call) + 1 for call in calls] == results, "what callers were told is what the state says"
    for mine in (calls[:5], calls[5:]):
        assert [call for call in state if call in mine] == mine, "a caller's calls in its order"
    assert set(play.runs.values()) == {1} and len(play.runs) == 16, "children ran once"
    play.handle(TasksFinished(host.client, [(caller, OK, pickle.dumps(None), 1.0, 2.0)]))
    play.handle(ReferencesChanged(host.client, [], calls[5:]))
    play.nothing_is_left(caller, *calls[:5])
    return play


# ---------------------------------------------------------------- crash after each message


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_wherever_the_worker_dies_the_state_is_that_of_the_answered_calls(every: int) -> None:
    messages = workload(every, ()).messages
    assert messages > 30
    for crash in range(1, messages + 1):
        workload(every, (crash,))


@pytest.mark.parametrize("every", [1, 2, 3])
def test_wherever_two_workers_die_the_state_is_that_of_the_answered_calls(every: int) -> None:
    messages = workload(every, ()).messages
    for crashes in combinations(range(1, messages + 20, 3), 2):
        workload(every, crashes)


def test_a_new_instance_starts_from_the_last_checkpoint_and_replays_only_what_came_after() -> None:
    play = Play(every=3)
    calls = [play.call() for _ in range(8)]
    play.run()
    assert len(play.actor.recovery.log) == 2
    play.die(play.instance.client)
    assert play.restored == [2]
    last = play.call()
    assert [task[0] for task in play.instance.queue] == [play.actor_id]
    play.step(play.instance)
    assert [task[0] for task in play.instance.queue] == calls[6:], "new calls wait for the replay"
    play.run()
    assert play.result(last) == 9


def test_without_a_checkpoint_yet_the_constructor_runs_and_all_calls_are_replayed() -> None:
    play = Play(every=100)
    calls = [play.call() for _ in range(4)]
    play.run()
    play.die(play.instance.client)
    play.run()
    assert play.restored == [] and play.instance.state == tuple(calls)


def test_a_log_longer_than_what_a_worker_is_handed_at_once_is_replayed_to_its_end() -> None:
    play = Play(every=10**6)
    play.checks = False  # They look at everything each time.
    calls = [play.call() for _ in range(MAX_IN_FLIGHT + 50)]
    play.run(10**6)
    play.die(play.instance.client)
    play.run(10**6)
    assert play.instance.state == tuple(calls)


def test_a_checkpoint_frees_the_one_before_and_what_the_log_held() -> None:
    play = Play(every=2)
    argument = play.submit(CHILD)
    play.run()
    play.call(deps=(argument,))
    play.run()
    play.handle(ReferencesChanged(DRIVER, [], [argument]))
    assert argument in play.node.objects, "a replay would need it"
    for _ in range(3):
        play.call()
    play.run()
    assert argument not in play.node.objects
    first, second = (ids.checkpoint_id(play.actor_id, number) for number in (1, 2))
    assert first not in play.node.objects and second in play.node.objects
    assert not play.actor.recovery.children and not play.actor.recovery.log


def test_a_checkpoint_in_the_middle_of_a_replay_covers_what_has_been_replayed() -> None:
    play = Play(every=100)
    calls = [play.call() for _ in range(4)]
    play.run()
    play.die(play.instance.client)
    for _ in range(3):
        play.step(play.instance)
    play.save(play.instance)
    assert [task.spec.task_id for task in play.actor.recovery.log] == calls[2:]
    play.run()
    assert play.instance.state == tuple(calls)
    play.die(play.instance.client)
    play.run()
    assert play.instance.state == tuple(calls) and play.restored == [1]
    assert set(play.runs.values()) == {1}, "what the later ones had submitted was kept"


# ---------------------------------------------------------------- calls that come again, or kill


def test_a_retried_caller_gets_the_results_of_the_calls_that_it_made_before() -> None:
    play = Play()
    caller = play.submit(CALLER)
    play.run()
    host = next(instance for instance in play.workers.values() if instance.running == caller)
    play.die(host.client)
    play.run()
    assert play.instance.state == tuple(child_of(caller, number) for number in (1, 2, 3))
    assert [play.result(child_of(caller, number)) for number in (1, 2, 3)] == [1, 2, 3]


def test_a_call_whose_result_is_gone_is_not_executed_again_and_says_so() -> None:
    play = Play()
    call = play.call()
    play.run()
    play.handle(ReferencesChanged(DRIVER, [], [call]))
    assert call not in play.node.objects
    play.call(task_id=call)
    play.run()
    assert play.instance.state == (call,)
    with pytest.raises(Exception, match="executed then.*will not execute it twice"):
        play.result(call)


def test_the_memory_of_executed_calls_is_bounded() -> None:
    recovery = Recovery()
    for number in range(MAX_CALLERS + 10):
        recovery.note_executed(b"%08d" % number + (9).to_bytes(4, "big") + bytes(4))
    assert len(recovery.executed) == MAX_CALLERS and not recovery.has_executed(b"00000009" + b"\0\0\0\t" + bytes(4))
    known = b"%08d" % 5000
    assert recovery.has_executed(known + b"\0\0\0\t" + bytes(4))
    assert not any(recovery.has_executed(known + n.to_bytes(4, "big") + bytes(4)) for n in (0, 8, 10, 1 << 30))


def test_a_call_that_kills_its_worker_each_time_fails_and_the_actor_goes_on_without_it() -> None:
    play = Play()
    before, poison, after = play.call(), play.call(), play.call()
    for _ in range(4):
        while play.instance.running != poison:
            play.instance.queue[0][0] == poison and setattr(play.instance, "running", poison)  # type: ignore[func-returns-value]
            if play.instance.running != poison:
                play.step(play.instance)
        play.die(play.instance.client)
    play.run()
    assert play.instance.state == (before, after)
    with pytest.raises(Exception, match="(?s)SIGKILL while running A.call.*attempt 4 of 4.*goes on without it") as caught:
        play.result(poison)
    assert type(caught.value).__name__ == "WorkerCrashedError"
    assert play.result(after) == 2


def test_only_the_call_that_was_running_loses_a_retry() -> None:
    play = Play()
    ended, running, waiting = (play.call(ONCE) for _ in range(3))
    play.step(play.instance)
    play.instance.queue.clear()  # The first ran to its end, and its answer was lost with the process.
    play.instance.running = running
    play.die(play.instance.client)
    play.run()
    assert play.instance.state == (ended, waiting) and play.result(waiting) == 2
    with pytest.raises(Exception, match="attempt 1 of 1"):
        play.result(running)


def test_what_a_replay_stores_is_freed_at_once() -> None:
    play = Play(every=100)
    call = play.call()
    play.run()
    play.die(play.instance.client)
    play.step(play.instance)
    play.instance.queue.clear()
    worker, used = play.instance.client, play.node.lineage.arena.used
    (reply,) = play.handle(BlockRequested(worker, 1, call, 100_000))
    assert play.node.lineage.arena.used > used
    value = (reply.answer[1], 100_000, ())
    play.handle(TasksFinished(worker, [(call, OK, [value], 1.0, 2.0)]))
    assert play.node.lineage.arena.used == used and play.result(call) == 1


def test_instances_that_die_one_after_the_other_in_a_replay_are_given_up() -> None:
    play = Play(every=100)
    call = play.call()
    play.run()
    for _ in range(MAX_FRUITLESS + 1):
        play.die(play.instance.client)
        play.step(play.instance)  # the constructor
        play.instance.running = call
    assert play.actor.state == ALIVE
    play.die(play.instance.client)
    assert play.actor.state == DEAD and "while A.call() was run again" in play.actor.death
    assert play.result(call) == 1, "it was answered"


def test_an_idle_actor_may_be_killed_as_often_as_you_like() -> None:
    play = Play()
    play.call()
    for _ in range(3 * MAX_FRUITLESS):
        play.run()
        play.handle(ActorKillRequested(DRIVER, play.actor_id, False))
    play.run()
    assert play.actor.state == ALIVE and play.actor.restarts == 3 * MAX_FRUITLESS


def test_max_restarts_counts() -> None:
    play = Play(max_restarts=1)
    call = play.call()
    play.run()
    play.die(play.instance.client)
    play.run()
    assert play.actor.state == ALIVE
    play.die(play.instance.client)
    assert play.actor.state == DEAD and play.result(call) == 1
    play.nothing_is_left(call)


def test_an_attempt_that_raised_is_replayed_with_its_retry() -> None:
    play = Play(every=100)
    flaky = play.call(RETRIED)
    play.may_fail[flaky] = 1
    other = play.call()
    play.run()
    state = play.instance.state
    assert sorted(state) == sorted((flaky, flaky, other)), "what a failed attempt has changed is in the state"
    play.die(play.instance.client)
    play.run()
    assert play.instance.state == state
    play.nothing_is_left(flaky, other)


def test_an_attempt_that_raised_is_replayed_before_its_retry_is_sent() -> None:
    play = Play(every=100)
    flaky = play.call(RETRIED)
    play.may_fail[flaky] = 1
    while not play.actor.recovery.log:
        play.step(play.instance)
    play.die(play.instance.client)
    play.step(play.instance)
    other = play.call()
    assert [task[0] for task in play.instance.queue] == [flaky]
    play.run()
    assert play.instance.state == (flaky, flaky, other) and play.result(flaky) == 2
    play.nothing_is_left(flaky, other)


def calls_that_raise(every: int, crashes: tuple[int, ...]) -> int:
    """How many messages the actor's workers sent."""
    play = Play(every, crashes=crashes)
    first, flaky = play.call(), play.call(RETRIED)
    play.may_fail[flaky] = 2
    play.run()
    assert play.instance.state == (first, flaky, flaky, flaky) and play.result(flaky) == 4
    parents = [(first, 0), (flaky, 0), (flaky, 1), (flaky, 2)]
    assert set(play.runs) == {child_of(call, number, raised) for call, raised in parents for number in (1, 2)}
    assert set(play.runs.values()) == {1}, "none of them ran twice"
    messages = play.messages
    play.nothing_is_left(first, flaky)
    return messages


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_each_attempt_of_a_call_that_raised_has_children_of_its_own_wherever_its_worker_dies(every: int) -> None:
    messages = calls_that_raise(every, ())
    for crashes in combinations(range(1, messages + 8), 2):
        calls_that_raise(every, crashes)


def test_a_checkpoint_forgets_the_numbers_of_the_attempts_that_it_covers() -> None:
    play = Play(every=3)
    flaky = play.call(RETRIED)
    play.may_fail[flaky] = 3
    while play.instance.number == 0:
        play.step(play.instance)
    assert play.actor.recovery.raised == {} and play.actor.recovery.covered == 3
    play.run()
    assert play.actor.recovery.raised == {3: 3}, "the fourth execution, after three that raised"
    play.die(play.instance.client)
    play.run()
    assert play.instance.state == (flaky,) * 4 and set(play.runs.values()) == {1}
    play.nothing_is_left(flaky)


def test_a_call_that_was_cancelled_while_it_waited_is_in_no_state() -> None:
    play = Play()
    waiting = play.submit(CHILD)
    before, cancelled, after = play.call(), play.call(deps=(waiting,)), play.call()
    play.handle(CancelRequested(DRIVER, cancelled, False, False))
    play.run()
    play.die(play.instance.client)
    play.run()
    assert play.instance.state == (before, after)


def test_a_call_that_was_cancelled_in_the_worker_s_hands_is_in_no_state() -> None:
    play = Play(every=100)
    play.run()
    before, cancelled, after = (play.call() for _ in range(3))
    play.handle(CancelRequested(DRIVER, cancelled, False, False))
    play.step(play.instance)
    dropped = play.instance.queue.popleft()
    assert dropped[0] == cancelled
    play.handle(TasksFinished(play.instance.client, [(cancelled, CANCELLED, (b"", "cancelled"), 1.0, 1.0)]))
    play.run()
    play.die(play.instance.client)
    play.run()
    assert play.instance.state == (before, after)


def test_a_call_that_was_in_hand_and_waits_for_a_lost_argument_is_not_overtaken() -> None:
    play = Play(every=100)
    argument = play.submit(CHILD)
    play.run()
    calls = [play.call(deps=(argument,)), play.call()]
    play.handle(ObjectLost(DRIVER, argument, None, "a test dropped it"))
    play.die(play.instance.client)
    calls.append(play.call())
    play.step(play.instance)
    assert not play.instance.queue
    play.run()
    assert play.instance.state == tuple(calls)


def test_an_argument_that_was_lost_is_made_again_before_the_replay_goes_on() -> None:
    play = Play(every=100)
    argument = play.submit(CHILD)
    play.run()
    calls = [play.call(deps=(argument,)), play.call()]
    play.run()
    play.handle(ObjectLost(DRIVER, argument, None, "a test dropped it"))
    play.die(play.instance.client)
    actors = play.instance
    play.step(actors)
    assert not actors.queue, "the first waits, and nobody overtakes it"
    play.run()
    assert play.instance.state == tuple(calls) and play.runs[argument] == 2


def test_what_an_actor_s_state_refers_to_outlives_its_worker() -> None:
    play = Play(every=100)
    call = play.call()
    inner = play.submit(CHILD)
    play.run()
    worker = play.instance.client
    play.handle(ReferencesChanged(worker, [inner], []))  # Its state keeps a ref that it has been given.
    play.handle(ReferencesChanged(DRIVER, [], [inner]))
    play.die(worker)
    assert inner in play.node.objects
    play.step(play.instance)
    play.handle(ReferencesChanged(play.instance.client, [inner], []))
    play.run()
    assert not play.node.objects[inner].is_error and play.instance.state == (call,)
    play.die(play.instance.client)
    play.run()  # This one does not take it.
    assert inner not in play.node.objects


# ---------------------------------------------------------------- states that cannot be saved


def test_a_state_that_cannot_be_saved_costs_the_recovery_and_the_user_is_told() -> None:
    play = Play(every=100)
    argument = play.submit(CHILD)
    play.run()
    calls = [play.call(deps=(argument,)), play.call()]
    play.run()
    checkpoint = ids.checkpoint_id(play.actor_id, 1)
    play.handle(CheckpointFailed(play.instance.client, checkpoint, "A.lock cannot be pickled.\nMore.", True))
    assert play.actor.recovery is None and "A.lock cannot be pickled" in play.warnings[0]
    assert play.node.take_rows(1.0)["actors"][-1][-1] == "A.lock cannot be pickled"
    play.handle(ReferencesChanged(DRIVER, [], [argument]))
    assert argument not in play.node.objects, "nothing is kept for a replay any more"
    later = play.call()
    play.run()
    assert play.result(later) == 3, "it goes on"
    play.die(play.instance.client)
    assert play.actor.state == DEAD and "lost its exact recovery: A.lock cannot be pickled" in play.actor.death
    play.nothing_is_left(*calls, later)


def test_a_state_that_cannot_be_saved_in_the_middle_of_a_replay_is_first_made_whole() -> None:
    play = Play(every=100)
    calls = [play.call() for _ in range(4)]
    play.run()
    play.die(play.instance.client)
    play.step(play.instance)
    play.step(play.instance)
    play.handle(CheckpointFailed(play.instance.client, ids.checkpoint_id(play.actor_id, 1), "no", True))
    play.run()
    assert play.instance.state == tuple(calls) and play.actor.recovery is None
    assert play.result(calls[-1]) == 4
    play.nothing_is_left(*calls)


def test_a_checkpoint_that_finds_no_room_leaves_the_older_one_and_a_longer_log() -> None:
    play = Play(every=2)
    calls = [play.call() for _ in range(3)]
    play.run()
    play.every = 100
    calls += [play.call() for _ in range(2)]
    play.run()
    for _ in range(2):
        play.handle(CheckpointFailed(play.instance.client, ids.checkpoint_id(play.actor_id, 2), "the disk is full", False))
    assert len(play.warnings) == 1 and "the disk is full" in play.warnings[0] and len(play.actor.recovery.log) == 3
    play.die(play.instance.client)
    play.run()
    assert play.restored == [1] and play.instance.state == tuple(calls)


def test_a_log_that_no_checkpoint_shortens_any_more_is_given_up_and_the_user_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(node_exact, "MAX_LOGGED", 3)
    play = Play(every=100)
    calls = [play.call() for _ in range(3)]
    play.run()
    client = play.instance.client
    play.handle(CheckpointFailed(client, ids.checkpoint_id(play.actor_id, 1), "the disk is full", False))
    assert play.actor.recovery is None and "the disk is full" in play.warnings[-1] and "3 calls by now" in play.warnings[-1]
    later = play.call()
    play.run()
    assert play.result(later) == 4, "it goes on"
    play.die(client)
    assert play.actor.state == DEAD
    play.nothing_is_left(*calls, later)


# ---------------------------------------------------------------- replays that do something else


def test_a_replay_that_ends_otherwise_is_told_once() -> None:
    play = Play(every=100)
    calls = [play.call(), play.call()]
    play.run()
    for _ in range(2):
        play.die(play.instance.client)
        play.step(play.instance)
        worker = play.instance.client
        play.instance.queue.clear()
        payload = (pickle.dumps(ValueError()), "ValueError")
        play.handle(TasksFinished(worker, [(call, ERROR, payload, 1.0, 2.0) for call in calls]))
    assert len(play.warnings) == 1 and "did something else" in play.warnings[0] and "checkpoint_every=1" in play.warnings[0]
    assert play.result(calls[0]) == 1, "what it returned at first stays"


def test_a_replayed_call_that_submits_another_child_is_told_and_the_child_is_not_run() -> None:
    play = Play(every=100)
    call = play.call()
    play.run()
    play.die(play.instance.client)
    play.step(play.instance)
    instance = play.instance
    play.introduce(instance, CHILD)
    spec = TaskSpec(child_of(call, 1), CHILD, b"other arguments")
    play.handle(TasksSubmitted(instance.client, call, [spec]))
    assert len(play.warnings) == 1 and "did something else" in play.warnings[0]
    play.run()
    assert play.runs[child_of(call, 1)] == 1


def test_a_replay_that_leaves_ends_the_actor() -> None:
    play = Play(every=100)
    call = play.call()
    play.run()
    play.die(play.instance.client)
    play.step(play.instance)
    play.instance.queue.clear()
    play.handle(TasksFinished(play.instance.client, [(call, ACTOR_EXITED, (b"", "it left"), 1.0, 2.0)]))
    assert play.actor.state == DEAD
    play.nothing_is_left(call)


def test_calls_count_as_finished_though_they_are_replayed() -> None:
    play = Play(every=100)
    call = play.call()
    play.run()
    play.die(play.instance.client)
    play.step(play.instance)
    assert play.node.lineage.tasks[call].state == FINISHED and play.actor.pending == 0
    assert not [row for row in play.node.take_rows(1.0).get("tasks", []) if row[1] == call and row[5] != FINISHED]
