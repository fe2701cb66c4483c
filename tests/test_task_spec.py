"""What a task is, as data."""

from __future__ import annotations

import pickle

from minray import task_spec
from minray.task_spec import ActorOptions, TaskOptions, TaskSpec


def test_a_spec_survives_the_wire() -> None:
    spec = TaskSpec(b"t" * 16, 3, b"args", (b"d" * 16,), (b"n" * 16,), b"a" * 16, ActorOptions("Counter", name="c"))
    arrived = TaskSpec(*pickle.loads(pickle.dumps(spec.to_wire())))
    assert arrived.to_wire() == spec.to_wire()


def test_a_spec_without_arguments_says_so() -> None:
    spec = TaskSpec(b"t" * 16, 1)
    assert spec.args is None and spec.deps == () == spec.nested and spec.actor is None and spec.actor_id is None


def test_states_have_the_numbers_of_their_names() -> None:
    for names in (task_spec.TASK_STATES, task_spec.ACTOR_STATES):
        assert [getattr(task_spec, name) for name in names] == list(range(len(names)))


def test_a_task_has_ended_from_finished_on() -> None:
    over = [name for name in task_spec.TASK_STATES if getattr(task_spec, name) >= task_spec.FINISHED]
    assert over == ["FINISHED", "FAILED"]


def test_equal_options_are_one_template() -> None:
    one, other = (TaskOptions(0, b"f" * 16, "f", resources=(("CPU", task_spec.UNIT),)) for _ in range(2))
    assert one == other and hash(one) == hash(other) and one != other._replace(max_retries=0)


def test_fractions_of_a_resource_add_up() -> None:
    assert sum(round(0.1 * task_spec.UNIT) for _ in range(10)) == task_spec.UNIT
