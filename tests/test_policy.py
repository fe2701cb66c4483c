"""The default policy."""

from __future__ import annotations

from minray.lineage import Task, Template
from minray.policy import MAX_PREFETCH, UNKNOWN_PREFETCH, Policy
from minray.scheduler import Shape, WorkerRecord
from minray.task_spec import PENDING_NODE_ASSIGNMENT, TASK, UNIT, TaskOptions, TaskSpec


def test_whoever_asks_for_more_is_served_first() -> None:
    small, large, special = (
        Shape(resources, False, ())
        for resources in ((("CPU", UNIT),), (("CPU", 4 * UNIT),), (("CPU", UNIT), ("license", UNIT)))
    )
    assert Policy().order([small, large, special]) == [special, large, small]


def test_equal_shapes_keep_their_order() -> None:
    first, second = Shape((("CPU", UNIT),), False), Shape((("GPU", UNIT),), False)
    assert Policy().order([first, second]) == [first, second]


def test_of_those_that_ask_for_the_same_the_one_whose_task_has_waited_longest_is_served_first() -> None:
    shapes = [Shape((("CPU", UNIT),), False) for _ in range(3)]
    template = Template(0, TaskOptions(TASK, b"", "f"), shapes[0])
    for number, (shape, when) in enumerate(zip(shapes, (3.0, 1.0, 2.0))):
        task = Task(TaskSpec(bytes(15) + bytes([number]), 0), template, number, 0, 0, when)
        task.state = PENDING_NODE_ASSIGNMENT
        shape.queue.append(task)
    assert Policy().order(shapes) == [shapes[1], shapes[2], shapes[0]]


def test_the_worker_that_went_idle_last_is_the_warmest() -> None:
    idle = {number: WorkerRecord(number) for number in (4, 9, 2)}
    assert Policy().pick_worker(idle).client == 2


def test_a_worker_has_a_tenth_of_a_second_of_work_in_hand() -> None:
    prefetch = Policy().prefetch
    assert prefetch(None) == UNKNOWN_PREFETCH
    assert prefetch(0.0) == MAX_PREFETCH
    assert 90 <= prefetch(0.001) <= 100
    assert prefetch(0.02) == 4
    assert prefetch(3600.0) == 2, "with one more in hand it never waits for the node"
