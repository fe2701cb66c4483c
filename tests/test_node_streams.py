"""The node's part in generators, without a process; what is told in tests/transcripts is not said again here."""

from __future__ import annotations

from typing import Any

import pytest
from test_node import T1, VALUE, World, task_id

from minray import ids
from minray.lineage import MAX_CHILDREN
from minray.messages import (
    DRIVER, CancelRequested, CancelTask, Command, ItemsRequested, ItemsYielded, KillWorker, ObjectLost, ObjectPut, ReferencesChanged, Reply, RequestAbandoned, RoomAwaited,
    RunTasks, TasksSubmitted, TemplateDefined, WorkerDied,
)  # fmt: skip
from minray.task_spec import CANCELLED, DYNAMIC, FAILED, FINISHED, STREAMING, TaskSpec

ENDS = [(VALUE, len(VALUE), ()), (VALUE, len(VALUE), ())]
LARGE = 100_000


def inline(number: int) -> tuple[bytes, int, tuple[bytes, ...]]:
    return (b"%d" % number, len(b"%d" % number), ())


def streaming_world(workers: int = 1, **options: Any) -> World:
    return World(workers=workers, cpus=workers, **{"num_returns": 2, "streaming": STREAMING, **options})


def yields(world: World, worker: int, one: bytes, first: int, *values: Any) -> list[Command]:
    return world.handle(ItemsYielded(worker, one, first, [inline(v) if type(v) is int else v for v in values]))


def take(world: World, one: bytes, position: int, limit: int = 100, client: int = DRIVER) -> Any:
    (*_, reply) = world.handle(ItemsRequested(client, 7, one, position, limit))
    assert isinstance(reply, Reply)
    return reply.answer


def runs_on(world: World, one: bytes) -> int:
    worker = world.node.lineage.tasks[one].worker
    assert worker is not None
    return worker.client


def drop(world: World, *object_ids: bytes, client: int = DRIVER) -> list[Command]:
    return world.handle(ReferencesChanged(client, [], list(object_ids)))


def test_an_answer_that_was_not_read_is_given_again() -> None:
    world = streaming_world()
    world.submit(T1)
    yields(world, 1, T1, 0, 10, 11)
    assert take(world, T1, 0, limit=1) == (2, False, [])
    assert take(world, T1, 0, limit=1) == (2, False, [])  # Ctrl-C came before it had counted the first.
    assert take(world, T1, 1) == (1, False, [])
    assert world.node.lineage.tasks[T1].stream.num_taken == 2


def test_to_look_takes_nothing() -> None:
    world = streaming_world()
    world.submit(T1)
    yields(world, 1, T1, 0, 10)
    assert take(world, T1, 0, limit=0) == (1, False, [])
    assert world.node.lineage.tasks[T1].stream.num_taken == 0


def test_a_stream_that_is_forgotten_is_no_empty_stream() -> None:
    world = streaming_world()
    assert take(world, T1, 0) is None


def test_an_item_that_is_lost_while_its_generator_runs_on_is_made_by_another_run() -> None:
    world = streaming_world()
    world.submit(T1)
    first = ids.item_id(T1, 0)
    yields(world, 1, T1, 0, ("/spill/one", LARGE, ()), 11)
    assert take(world, T1, 0) == (2, False, [])
    assert not [c for c in world.handle(ObjectLost(DRIVER, first, "/spill/one", "gone")) if isinstance(c, RunTasks)]
    commands = world.finish(1, T1, payload=ENDS)
    assert [c for c in commands if isinstance(c, RunTasks)], "its end shows that it will not yield that item any more"
    yields(world, 1, T1, 0, ("/spill/two", LARGE, ()), 12)
    world.finish(1, T1, payload=ENDS)
    assert world.node.objects[first].data == "/spill/two"
    assert world.node.objects[ids.item_id(T1, 1)].data == b"11", "what was there stays"
    assert world.state(T1) == FINISHED


def test_what_a_generator_was_given_is_there_for_its_next_run_even_if_nobody_else_holds_it() -> None:
    world, given = streaming_world(), ids.put_id(T1, 1)
    world.handle(ObjectPut(DRIVER, given, ("/spill/given", LARGE, ()), b""))
    world.submit(T1, deps=(given,))
    drop(world, given)
    first = ids.item_id(T1, 0)
    yields(world, 1, T1, 0, ("/spill/one", LARGE, ()))
    take(world, T1, 0)
    world.handle(ObjectLost(DRIVER, first, "/spill/one", "gone"))
    (run,) = [c for c in world.finish(1, T1, payload=ENDS) if isinstance(c, RunTasks)]
    assert run.tasks[0][3] == [("/spill/given", LARGE, False, given)]


@pytest.mark.parametrize("lost_first", [True, False])
def test_a_generator_that_stands_still_begins_anew_when_an_item_is_lost(lost_first: bool) -> None:
    # What its reader waits for may need the item: it would take no other one, and the generator would never go on.
    world = streaming_world(workers=2, backpressure=1, max_retries=1)
    world.submit(T1)
    one, two = (2, 1) if runs_on(world, T1) == 2 else (1, 2)
    first = ids.item_id(T1, 0)
    yields(world, one, T1, 0, ("/spill/one", LARGE, ()))
    take(world, T1, 0)
    yields(world, one, T1, 1, 11)
    waits, loss = RoomAwaited(one, 5, T1, True), ObjectLost(DRIVER, first, "/spill/one", "gone")
    for event in (loss, waits) if lost_first else (waits, loss):
        commands = world.handle(event)
    assert [c for c in commands if isinstance(c, KillWorker)] == [KillWorker(one, only_if_running=T1)]
    world.handle(WorkerDied(one, "was killed by SIGKILL", T1))
    assert runs_on(world, T1) == two
    yields(world, two, T1, 0, ("/spill/two", LARGE, ()), 12)
    assert world.node.objects[first].data == "/spill/two"
    assert world.node.objects[ids.item_id(T1, 1)].data == b"11", "what was there stays"
    assert KillWorker not in map(type, world.handle(RoomAwaited(two, 6, T1, True))), "it was made again"


def test_an_item_that_its_generator_may_not_make_again_is_an_error_at_once() -> None:
    world = streaming_world(backpressure=1, max_retries=0)
    world.submit(T1)
    first = ids.item_id(T1, 0)
    yields(world, 1, T1, 0, ("/spill/one", LARGE, ()))
    assert world.handle(RoomAwaited(1, 5, T1, True)) == []
    assert KillWorker not in map(type, world.handle(ObjectLost(DRIVER, first, "/spill/one", "gone")))
    assert "max_retries=0" in str(world.error(first))
    assert take(world, T1, 0) == (1, False, [])  # It goes on when its reader has taken the error.
    assert not world.node.scheduler.workers[1].requests


def test_items_of_a_generator_that_failed_are_not_made_again() -> None:
    world = streaming_world()
    world.submit(T1)
    first = ids.item_id(T1, 0)
    yields(world, 1, T1, 0, ("/spill/one", LARGE, ()))
    take(world, T1, 0)
    world.handle(CancelRequested(DRIVER, T1, False, False))
    world.finish(1, T1, CANCELLED, (b"", "cancelled"))
    assert world.state(T1) == FAILED
    world.handle(ObjectLost(DRIVER, first, "/spill/one", "gone"))
    assert "the generator that yielded it has failed" in str(world.error(first))


def test_a_generator_that_is_cancelled_while_it_waits_for_room_takes_its_cpu_back() -> None:
    world = streaming_world(backpressure=1)
    world.submit(T1)
    yields(world, 1, T1, 0, 10)
    assert world.handle(RoomAwaited(1, 5, T1, True)) == []
    assert world.node.scheduler.workers[1].blocked == 1
    assert world.handle(CancelRequested(DRIVER, T1, False, False)) == [CancelTask(1, T1)]
    world.handle(RequestAbandoned(1, 5))
    world.finish(1, T1, CANCELLED, (b"", "cancelled"))
    assert world.node.scheduler.workers[1].blocked == 0
    there, ended, _ = take(world, T1, 0)
    assert (there, ended) == (2, True)  # The item, and the error.


def test_a_coroutine_that_is_cancelled_while_it_waits_for_room_leaves_no_request() -> None:
    world = streaming_world(backpressure=1)
    world.submit(T1)
    yields(world, 1, T1, 0, 10)
    world.handle(RoomAwaited(1, 5, T1, False))
    world.finish(1, T1, CANCELLED, (b"", "cancelled"))
    assert not world.node.scheduler.workers[1].requests


def test_items_of_a_dynamic_generator_are_held_until_its_result_holds_them() -> None:
    world = streaming_world(streaming=DYNAMIC)
    world.submit(T1)
    drop(world, ids.reader_id(T1))
    yields(world, 1, T1, 0, 10, 11)
    items = tuple(ids.item_id(T1, item) for item in (0, 1))
    world.finish(1, T1, payload=[(b"list", 4, items), ENDS[1]])
    assert [world.node.objects[item].refs for item in items] == [1, 1]
    assert ids.item_id(T1, 2) not in world.node.objects
    drop(world, T1)
    assert not world.node.objects and not world.node.lineage.tasks


def test_the_result_of_a_dynamic_generator_that_nobody_wants_goes_with_its_items() -> None:
    world = streaming_world(streaming=DYNAMIC)
    world.submit(T1)
    drop(world, ids.reader_id(T1), T1)
    yields(world, 1, T1, 0, 10)
    world.finish(1, T1, payload=[(b"list", 4, (ids.item_id(T1, 0),)), ENDS[1]])
    assert not world.node.objects and not world.node.lineage.tasks


# ---------------------------------------------------------------- readers that are tasks


def nested(num_items: int) -> tuple[World, bytes]:
    """A parent on worker 2 (the last to go idle) has submitted a generator, which worker 1 has run."""
    world = World(workers=2, cpus=2)
    world.submit(T1)
    child = task_id(1, T1)
    resubmit(world, child)
    yields(world, runs_on(world, child), child, 0, *range(num_items))
    return world, child


def resubmit(world: World, child: bytes) -> list[Command]:
    parent = runs_on(world, T1)
    world.handle(TemplateDefined(parent, 2, world.node.templates[0].options._replace(num_returns=2, streaming=STREAMING)))
    return world.handle(TasksSubmitted(parent, T1, [TaskSpec(child, 2)]))


@pytest.mark.parametrize("num_items", [3, MAX_CHILDREN + 50])
def test_the_second_attempt_of_a_reader_begins_with_the_first_item(num_items: int) -> None:
    world, child = nested(num_items)
    parent, producer = runs_on(world, T1), runs_on(world, child)
    assert take(world, child, 0, num_items, client=parent)[0] == num_items
    drop(world, *(ids.item_id(child, item) for item in range(num_items)), client=parent)
    world.finish(producer, child, payload=ENDS)
    world.handle(WorkerDied(parent, "was killed by SIGKILL", T1))
    resubmit(world, child)
    assert world.node.lineage.tasks[child].stream.num_taken == 0
    again = runs_on(world, T1)
    if num_items > MAX_CHILDREN:  # More than are kept: it runs again, because the reader needs what is gone.
        assert world.state(child) < FINISHED
    else:
        assert take(world, child, 0, num_items, client=again) == (num_items, True, [])
        assert [world.node.objects[ids.item_id(child, item)].data for item in range(3)] == [b"0", b"1", b"2"]


def test_a_reader_that_held_an_item_before_keeps_it_until_it_has_read_the_answer() -> None:
    world, child = nested(1)
    reader, item = runs_on(world, T1), ids.item_id(child, 0)
    world.handle(ReferencesChanged(reader, [item], []))  # Out of some value.
    assert take(world, child, 0, client=reader) == (1, False, [item])
    drop(world, item, client=reader)
    assert world.node.objects[item].pins == 1
