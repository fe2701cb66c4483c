"""The object table, without a process: counts, pins, spilling; then the node's part in handing out memory."""

import itertools

import pytest

from minray import ids, messages
from minray.lineage import Lineage, Request, Task, Template
from minray.messages import (
    BlockRefused, BlockRequested, BlocksSpilled, DeleteFile, ObjectPut, ObjectsAwaited, ReferencesChanged, Reply,
    RequestAbandoned, RoomAbandoned, RunTasks, TasksFinished, TasksSubmitted, TemplateDefined, Unpinned, WorkerDied,
    WorkerStarted,
)  # fmt: skip
from minray.node import Node
from minray.object_ref import new_ref
from minray.object_store import partial_path
from minray.scheduler import Shape
from minray.task_spec import ERROR, OK, TASK, UNIT, TaskOptions, TaskSpec

ROOT = ids.root_task_id(b"tests")
KB = 1024


def put_id(number):
    return ids.put_id(ROOT, number)


class Store:
    """A lineage whose callbacks only take notes."""

    def __init__(self, capacity=64 * KB):
        self.ready, self.answered, self.deleted, self.handles, self.wanted = [], [], [], [], []
        self.lineage = Lineage(
            capacity, self.ready.append, self.answered.append, self.deleted.append, self.handles.append,
            self.wanted.append,
        )  # fmt: skip
        self.objects = self.lineage.objects

    def put(self, number, size=KB, nested=(), inline=False):
        data = b"." * size if inline else self.lineage.arena.allocate(size).offset
        return self.lineage.put(put_id(number), (data, size, nested), 0.0)

    def task(self, number, deps=(), nested=(), num_returns=1):
        options = TaskOptions(TASK, b"", "f", num_returns=num_returns)
        spec = TaskSpec(ids.pack_id(ids.children_prefix(ROOT), number, 0), 0, None, deps, nested)
        task = Task(spec, Template(0, options, Shape((), False)), number, 0, 0, 0.0)
        self.lineage.add_task(task)
        return task

    def check(self):
        lineage = self.lineage
        lineage.arena.check()
        for table in (lineage.in_arena, lineage.spilling):
            for object_id, entry in table.items():
                assert type(entry.data) is int and entry.object_id == object_id
        offsets = [e.data for e in [*lineage.in_arena.values(), *lineage.spilling.values()]]
        assert sorted(offsets) == sorted(lineage.arena.blocks), "each block belongs to one object"
        for object_id, entry in self.objects.items():
            assert type(object_id) is bytes, "a ref as a key would keep itself alive"
            assert entry.refs > 0 or entry.pins > 0 or entry.replays, "nothing keeps this entry"
            if type(entry.data) is int:
                assert lineage.in_arena.get(object_id) is entry or lineage.spilling.get(object_id) is entry

    def is_empty(self):
        return not self.objects and not self.lineage.tasks and not self.lineage.arena.blocks


@pytest.fixture
def store():
    store = Store()
    yield store
    store.check()


# ---------------------------------------------------------------- counts


def test_a_put_object_goes_with_its_last_reference(store):
    entry = store.put(1)
    store.lineage.hold(put_id(1))
    store.lineage.release(put_id(1))
    assert store.objects[put_id(1)] is entry
    store.lineage.release(put_id(1))
    assert store.is_empty()


def test_memory_stays_while_it_is_pinned_even_without_references(store):
    entry = store.put(1)
    store.lineage.pin(entry)
    store.lineage.pin(entry)
    store.lineage.release(put_id(1))
    store.lineage.unpin(put_id(1))
    assert store.lineage.arena.blocks
    store.lineage.unpin(put_id(1))
    assert store.is_empty()


def test_a_reference_that_comes_while_only_a_pin_keeps_the_object_keeps_it_again(store):
    entry = store.put(1)
    store.lineage.pin(entry)
    store.lineage.release(put_id(1))
    assert store.lineage.hold(put_id(1)) is entry and not entry.is_error
    store.lineage.unpin(put_id(1))
    assert store.objects[put_id(1)] is entry
    store.lineage.release(put_id(1))
    assert store.is_empty()


def test_what_an_object_contains_lives_as_long_as_the_object(store):
    store.put(1)
    store.put(2, nested=(put_id(1),))
    store.put(3, nested=(put_id(2),))
    store.lineage.release(put_id(1))
    store.lineage.release(put_id(2))
    assert len(store.objects) == 3
    store.lineage.release(put_id(3))
    assert store.is_empty()


def test_a_chain_of_a_hundred_thousand_nested_objects_is_freed_without_recursion(store):
    store.put(1, inline=True, size=1)
    for number in range(2, 100_000):
        store.put(number, inline=True, size=1, nested=(put_id(number - 1),))
        store.lineage.release(put_id(number - 1))
    store.lineage.release(put_id(99_999))
    assert store.is_empty()


def test_a_ring_of_objects_is_not_possible_but_sharing_is(store):
    store.put(1)
    for number in (2, 3):
        store.put(number, nested=(put_id(1),))
    store.lineage.release(put_id(1))
    store.lineage.release(put_id(2))
    assert put_id(1) in store.objects
    store.lineage.release(put_id(3))
    assert store.is_empty()


def test_an_unknown_object_stands_for_the_error_that_it_was_freed(store):
    entry = store.lineage.hold(new_ref(put_id(7)))
    assert entry.is_error and type(entry.object_id) is bytes
    assert [type(key) for key in store.objects] == [bytes]
    store.lineage.release(put_id(7))
    store.lineage.release(put_id(7))  # One too many is nobody's.
    assert store.is_empty()


def test_arguments_are_held_until_the_task_has_ended(store):
    store.put(1)
    store.put(2)
    task = store.task(1, deps=(put_id(1),), nested=(put_id(2),))
    store.lineage.release(put_id(1))
    store.lineage.release(put_id(2))
    assert len(store.objects) == 3
    store.lineage.release_arguments(task)
    assert list(store.objects) == [task.spec.task_id]


def test_a_task_stays_in_the_table_until_all_its_returns_are_freed(store):
    task = store.task(1, num_returns=2)
    returns = [ids.return_id(task.spec.task_id, index) for index in range(2)]
    for index in range(2):
        store.lineage.accept_return(task, index, (b"v", 1, ()), False, 0.0)
    task.state = 4  # FINISHED
    store.lineage.release(returns[0])
    assert store.lineage.tasks
    store.lineage.release(returns[1])
    assert store.is_empty()


def test_a_return_that_nobody_wants_any_more_gives_its_memory_back_at_once(store):
    task = store.task(1)
    store.lineage.release(task.spec.task_id)
    offset = store.lineage.arena.allocate(KB).offset
    store.lineage.accept_return(task, 0, (offset, KB, ()), False, 0.0)
    assert not store.lineage.arena.blocks
    store.lineage.accept_return(task, 0, ("/spill/x", KB, ()), False, 0.0)
    assert store.deleted == ["/spill/x"]


def test_a_second_attempt_that_puts_the_same_object_changes_nothing(store):
    entry = store.put(1)
    offset = store.lineage.arena.allocate(KB).offset
    assert store.lineage.put(put_id(1), (offset, KB, ()), 0.0) is None
    assert store.objects[put_id(1)] is entry and list(store.lineage.arena.blocks) == [entry.data]


def test_a_task_becomes_ready_with_the_last_of_its_arguments_also_if_one_comes_twice(store):
    first, second = store.task(1), store.task(2)
    both = store.task(3, deps=(first.spec.task_id, second.spec.task_id, first.spec.task_id))
    assert both.missing == 3
    store.lineage.accept_return(first, 0, (b"v", 1, ()), False, 0.0)
    assert both.missing == 1 and not store.ready
    store.lineage.accept_return(second, 0, (b"v", 1, ()), False, 0.0)
    assert store.ready == [both]


def test_requests_given_up_do_not_pile_up_at_an_object_that_never_comes(store):
    entry = store.objects[store.task(1).spec.task_id]
    for number in range(1000):
        request = Request(0, number, [entry.object_id], 1, False, False)
        store.lineage.wait_for(entry, request)
        request.remaining = 0
    assert len(entry.waiters) < 20


def test_an_object_that_is_made_and_freed_between_two_flushes_leaves_no_row(store):
    store.put(1)
    store.put(2)
    store.lineage.release(put_id(1))
    new, updates = store.lineage.take_object_rows(0.0)
    assert [row[1] for row in new] == [put_id(2)] and not updates
    store.lineage.release(put_id(2))
    assert store.lineage.take_object_rows(1.0) == ([], [(2, None, 1_000_000, new[0][0])])


# ---------------------------------------------------------------- memory


def test_the_least_recently_used_objects_are_spilled_first_and_only_as_many_as_needed(store):
    entries = [store.put(number, size=16 * KB) for number in range(1, 5)]
    store.lineage.pin(entries[0])
    store.lineage.unpin(put_id(1))  # Used just now.
    assert store.lineage.victims(20 * KB) == entries[1:3]


def test_pinned_objects_are_never_chosen(store):
    entries = [store.put(number, size=16 * KB) for number in range(1, 5)]
    for entry in entries[:3]:
        store.lineage.pin(entry)
    assert store.lineage.victims(32 * KB) == []
    assert store.lineage.victims(16 * KB) == entries[3:]


def test_an_object_is_the_victim_of_one_writer_at_a_time(store):
    entries = [store.put(number, size=32 * KB) for number in (1, 2)]
    assert store.lineage.victims(32 * KB) == entries[:1]
    assert store.lineage.victims(32 * KB) == entries[1:]
    assert store.lineage.victims(32 * KB) == []


class History:
    """One object through steps of holding, releasing, pinning, unpinning, and spilling that works or fails."""

    def __init__(self):
        self.store = Store()
        self.lineage = self.store.lineage
        self.entry = self.store.put(1)
        self.refs, self.pins, self.spilling, self.files = 1, 0, False, set()

    def hold(self):
        if self.refs or self.pins:
            self.lineage.hold(put_id(1))
            self.refs += 1
            return True

    def release(self):
        if self.refs:
            self.lineage.release(put_id(1))
            self.refs -= 1
            return True

    def pin(self):
        if self.refs:
            self.lineage.pin(self.entry)
            self.pins += 1
            return True

    def unpin(self):
        if self.pins:
            self.lineage.unpin(put_id(1))
            self.pins -= 1
            return True

    def choose(self):
        self.spilling = self.spilling or self.lineage.victims(64 * KB) == [self.entry]
        return self.spilling

    def spill(self):
        return self._end("/spill/1")

    def fail(self):
        return self._end(None)

    def _end(self, path):
        if self.spilling:
            self.files.add(path)
            self.lineage.spilled(put_id(1), path, 0.0)
            self.spilling = False
            return True

    def check(self):
        self.store.check()
        assert (put_id(1) in self.store.objects) == bool(self.refs or self.pins)
        if self.pins:
            assert type(self.entry.data) is str or self.entry.data in self.lineage.arena.blocks

    def finish(self):
        while self.release() or self.unpin() or self.fail():
            pass
        assert self.store.is_empty() and self.files - {None} <= set(self.store.deleted)


STEPS = (History.hold, History.release, History.pin, History.unpin, History.choose, History.spill, History.fail)


def test_every_history_of_one_object_that_is_used_and_spilled_ends_with_nothing_left():
    """Exhaustive: all orders of six steps that are possible."""
    histories = [()]
    for _ in range(6):
        longer = []
        for history in histories:
            for step in STEPS:
                one = History()
                if all([earlier(one) for earlier in history]) and step(one):
                    one.check()
                    one.finish()
                    longer.append((*history, step))
        histories = longer
    assert len(histories) > 1000


def test_an_object_freed_and_mentioned_again_while_it_is_spilled_does_not_confuse_the_two(store):
    store.put(1)
    (victim,) = store.lineage.victims(64 * KB)
    store.lineage.release(put_id(1))
    error = store.lineage.hold(put_id(1))  # An ID kept as text: it stands for the error now.
    store.lineage.spilled(put_id(1), "/spill/1", 0.0)
    assert error.is_error and type(error.data) is bytes
    assert store.deleted == ["/spill/1"] and not store.lineage.arena.blocks


# ---------------------------------------------------------------- the node hands out memory


class Cluster:
    """A node of two workers, and the answers to what they ask."""

    def __init__(self, capacity=64 * KB):
        self.node = Node({"CPU": 2 * UNIT}, capacity, lambda object_id: f"/spill/{ids.short(object_id)}")
        self.lineage, self.arena = self.node.lineage, self.node.lineage.arena
        self.node.start_workers(2)
        self.requests = itertools.count(1)
        self.deleted = []
        for number in (1, 2):
            self.do(WorkerStarted(number, 1000 + number))

    def do(self, event):
        commands = self.node.handle(event, 1.0)
        self.deleted += [command.path for command in commands if type(command) is DeleteFile]
        return commands

    def ask(self, event):
        """The answer to an event whose request_id is a running number."""
        request_id = next(self.requests)
        replies = [c for c in self.do(event(request_id)) if type(c) is Reply and c.request_id == request_id]
        return replies[0].answer if replies else None

    def room(self, client, number, size=32 * KB):
        return self.ask(lambda request_id: BlockRequested(client, request_id, put_id(number), size))

    def put(self, client, number, size=32 * KB):
        kind, offset, _ = self.room(client, number, size)
        assert kind == "block"
        self.do(ObjectPut(client, put_id(number), (offset, size, ())))

    def check(self):
        self.arena.check()
        lineage = self.lineage
        known = [e.data for e in [*lineage.in_arena.values(), *lineage.spilling.values()]]
        known += [grant[1] for grant in self.node._grants.values() if grant[0] == "block"]
        assert sorted(known) == sorted(self.arena.blocks)


@pytest.fixture
def cluster():
    cluster = Cluster()
    yield cluster
    cluster.check()


def test_blocks_that_a_dead_worker_was_writing_come_back(cluster):
    assert cluster.room(1, 1)[0] == "block"
    cluster.do(WorkerDied(1, "was killed", None))
    assert not cluster.arena.blocks and not cluster.node._grants


def test_victims_of_a_dead_spiller_return_to_the_arena(cluster):
    cluster.put(2, 1)
    cluster.put(2, 2)
    kind, plan = cluster.room(1, 3)
    assert kind == "spill" and cluster.lineage.spilling
    cluster.do(WorkerDied(1, "was killed", None))
    assert not cluster.lineage.spilling and len(cluster.lineage.in_arena) == 2
    assert cluster.deleted == [plan[0][3], partial_path(plan[0][3])]  # Whichever it had come to.
    assert cluster.room(2, 3)[0] == "spill"  # Somebody else may.


def test_the_file_of_a_dead_writer_is_removed(cluster):
    kind, path = cluster.room(1, 1, size=100 * KB)
    assert kind == "file"
    cluster.do(WorkerDied(1, "was killed", None))
    assert cluster.deleted == [path, partial_path(path)]


def test_memory_of_a_worker_that_was_told_to_end_is_not_used_until_it_has(cluster):
    """It may be in the middle of a write when the word reaches it."""
    cluster.put(2, 1)
    cluster.ask(lambda request_id: ObjectsAwaited(1, request_id, [put_id(1)], 1, True, False))
    cluster.room(1, 2)
    cluster.do(ReferencesChanged(2, [], [put_id(1)]))
    worker = cluster.node.scheduler.workers[1]
    cluster.node._forget_worker(worker, "was told to end", 1.0)
    assert len(cluster.arena.blocks) == 2
    cluster.do(WorkerDied(1, "ended", None))
    assert not cluster.arena.blocks


def test_room_that_is_not_wanted_any_more_comes_back(cluster):
    cluster.room(0, 1)
    cluster.do(RoomAbandoned(0, put_id(1)))
    cluster.put(0, 2)
    cluster.put(0, 3)
    assert cluster.room(0, 4)[0] == "spill"
    cluster.do(RoomAbandoned(0, put_id(4)))
    assert not cluster.lineage.spilling
    cluster.do(RoomAbandoned(0, put_id(4)))  # Again, or too late: nothing.
    assert len(cluster.arena.blocks) == 2


def test_spilling_makes_room_and_goes_on_until_a_hole_is_large_enough(cluster):
    for number in range(1, 5):
        cluster.put(0, number, size=16 * KB)
    cluster.ask(lambda request_id: ObjectsAwaited(1, request_id, [put_id(2)], 1, True, False))  # Pinned.
    kind, plan = cluster.room(0, 9)
    answers = 0
    while kind == "spill":
        done = [(victim, path) for victim, _, _, path in plan]
        kind, plan, *_ = cluster.ask(lambda request_id: BlocksSpilled(0, request_id, done, put_id(9), 32 * KB))  # noqa: B023
        answers += 1
    assert kind == "block" and answers == 2  # The first holes did not touch.


def test_a_disk_that_is_full_ends_the_spilling_and_the_victims_stay(cluster):
    cluster.put(0, 1)
    cluster.put(0, 2)
    _, plan = cluster.room(0, 3)
    failed = [(plan[0][0], "")]
    kind, _ = cluster.ask(lambda request_id: BlocksSpilled(0, request_id, failed, put_id(3), 32 * KB))
    assert kind == "file" and len(cluster.lineage.in_arena) == 2
    cluster.do(RoomAbandoned(0, put_id(3)))


def test_no_two_files_have_the_same_name(cluster):
    paths = [cluster.room(1, 1, size=100 * KB)[1]]
    cluster.do(RoomAbandoned(1, put_id(1)))
    paths.append(cluster.room(2, 1, size=100 * KB)[1])
    assert len(set(paths)) == 2


def test_an_arena_with_no_memory_behind_it_ends_there_instead_of_being_tried_for_ever(cluster):
    cluster.put(0, 1, size=16 * KB)
    kind, offset, fresh = cluster.room(0, 2)
    assert (kind, fresh) == ("block", True)
    answer = cluster.ask(lambda request_id: BlockRefused(0, request_id, put_id(2), offset, 32 * KB))
    assert answer[0] == "file" and cluster.arena.capacity == offset
    cluster.arena.check()
    kind, plan = cluster.room(0, 3, size=16 * KB)
    assert kind == "spill" and plan[0][0] == put_id(1)
    cluster.do(RoomAbandoned(0, put_id(3)))
    cluster.do(RoomAbandoned(0, put_id(2)))


def test_several_returns_of_which_one_failed_leave_no_memory_behind(cluster):
    options = TaskOptions(TASK, b"", "f", num_returns=2)
    spec = TaskSpec(ids.pack_id(ids.children_prefix(ROOT), 1, 0), 1)
    cluster.do(TemplateDefined(0, 1, options))
    (run,) = [c for c in cluster.do(TasksSubmitted(0, ROOT, [spec])) if type(c) is RunTasks]
    kind, *_ = cluster.ask(lambda request_id: BlockRequested(run.client, request_id, spec.task_id, KB))
    assert kind == "block"
    cluster.do(TasksFinished(run.client, [(spec.task_id, ERROR, (b"error", "text"), 1.0, 2.0)]))
    assert not cluster.arena.blocks


def test_a_finished_task_leaves_nothing_when_its_result_and_arguments_have_gone(cluster):
    cluster.do(TemplateDefined(0, 1, TaskOptions(TASK, b"", "f")))
    cluster.put(0, 1)
    spec = TaskSpec(ids.pack_id(ids.children_prefix(ROOT), 1, 0), 1, None, (put_id(1),))
    (run,) = [c for c in cluster.do(TasksSubmitted(0, ROOT, [spec])) if type(c) is RunTasks]
    cluster.do(ReferencesChanged(0, [], [put_id(1)]))
    cluster.do(Unpinned(run.client, [put_id(1)]))
    assert put_id(1) in cluster.node.objects
    cluster.do(TasksFinished(run.client, [(spec.task_id, OK, b"v", 1.0, 2.0)]))
    assert put_id(1) not in cluster.node.objects
    cluster.do(ReferencesChanged(0, [], [spec.task_id]))
    assert not cluster.node.objects and not cluster.lineage.tasks and not cluster.arena.blocks


def test_a_request_that_was_answered_or_given_up_holds_no_refs(cluster):
    """It may hang on an object that does not come for a long time."""
    cluster.do(TemplateDefined(0, 1, TaskOptions(TASK, b"", "f", resources=(("CPU", UNIT),))))
    spec = TaskSpec(ids.pack_id(ids.children_prefix(ROOT), 1, 0), 1)
    cluster.do(TasksSubmitted(0, ROOT, [spec]))
    cluster.ask(lambda request_id: ObjectsAwaited(0, request_id, [spec.task_id], 1, False, False))
    request = cluster.node.objects[spec.task_id].waiters[0]
    cluster.do(RequestAbandoned(0, request.request_id))
    assert request.object_ids == []


def test_every_event_of_a_worker_can_be_read_from_a_wire():
    assert messages.event_from_wire(3, ("RoomAbandoned", b"x")) == RoomAbandoned(3, b"x")
