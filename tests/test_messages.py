"""The words between a node and the world."""

from __future__ import annotations

import pickle
from typing import get_args

import pytest

from minray import messages
from minray.messages import DRIVER, FROM_WORKERS, TasksSubmitted, event_from_wire
from minray.node import Node
from minray.task_spec import TaskSpec

SHELLS_OWN = {"ResourcesAdded", "WorkerStarted", "WorkerDied", "GcsStalled", "GcsRecovered", "Ticked"}


def test_every_event_names_the_process_that_it_happened_to() -> None:
    for event in get_args(messages.Event):
        assert event._fields[0] == "client", event.__name__


def test_every_command_but_two_is_for_a_process() -> None:
    assert [c.__name__ for c in get_args(messages.Command) if c._fields[0] != "client"] == ["DeleteFile", "Warn"]


def test_workers_may_say_all_but_what_only_the_shell_can_know() -> None:
    assert {event.__name__ for event in get_args(messages.Event)} - SHELLS_OWN == set(FROM_WORKERS)


def test_the_node_understands_every_event() -> None:
    node = Node({}, 0, lambda object_id: "")
    assert set(node._handlers) == set(get_args(messages.Event))
    for event in get_args(messages.Event):
        words = "".join("_" + c.lower() if c.isupper() else c for c in event.__name__)
        assert hasattr(node, "handle" + words), event.__name__


@pytest.mark.parametrize("name", sorted(SHELLS_OWN | {"Reply", "nonsense"}))
def test_a_worker_cannot_say_what_is_not_its_to_say(name: str) -> None:
    with pytest.raises(KeyError):
        event_from_wire(5, (name, 1, 2))


def test_an_event_is_signed_by_the_connection_that_it_came_over() -> None:
    assert event_from_wire(5, ("ReferencesChanged", [b"a"], [])) == messages.ReferencesChanged(5, [b"a"], [])


def test_specs_are_plain_tuples_on_the_wire() -> None:
    spec = TaskSpec(b"t" * 16, 1, b"args")
    frame = pickle.loads(pickle.dumps(("TasksSubmitted", b"p" * 16, [spec.to_wire()])))
    event = event_from_wire(7, frame)
    assert isinstance(event, TasksSubmitted) and event.client == 7 != DRIVER
    assert [s.to_wire() for s in event.specs] == [spec.to_wire()]
