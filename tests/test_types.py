"""IDs under Ray's names: bytes with Ray's methods."""

import pickle

import pytest

import minray
from minray import types


@pytest.mark.parametrize("kind", [getattr(types, name) for name in types.__all__ if name != "ObjectRef"])
def test_an_id_goes_to_text_and_bytes_and_back(kind):
    one = kind.from_random()
    assert kind.from_hex(one.hex()) == one == kind(one.binary()) == kind.from_binary(bytes(one))
    assert type(one.binary()) is bytes and len(one.binary()) == kind.size() == 16
    assert {one: 1}[kind(one.binary())] == 1
    assert repr(one) == str(one) == f"{kind.__name__}({one.hex()})"
    assert not one.is_nil() and kind.nil().is_nil() and kind.nil().hex() == "ff" * 16
    again = pickle.loads(pickle.dumps(one))
    assert again == one and type(again) is kind


def test_an_id_of_another_length_is_refused():
    with pytest.raises(ValueError, match="TaskID is made of 16 bytes, got 3"):
        minray.TaskID(b"abc")


def test_refs_handles_and_the_context_give_ids_of_their_kinds():
    with minray.init(num_cpus=1):

        @minray.remote
        class Where:
            def where(self):
                context = minray.get_runtime_context()
                return context.job_id, context.node_id, context.worker_id, context.task_id, context.actor_id

        context = minray.get_runtime_context()
        where = Where.remote()
        ref = where.where.remote()
        job_id, node_id, worker_id, task_id, actor_id = minray.get(ref)
        assert (type(job_id), type(node_id), type(worker_id)) == (minray.JobID, minray.NodeID, minray.WorkerID)
        assert job_id == ref.job_id() == context.job_id and job_id.hex() == context.get_job_id()
        assert node_id == context.node_id and worker_id.hex() != context.get_worker_id()
        assert task_id == ref.task_id() and type(task_id) is type(ref.task_id()) is minray.TaskID
        assert actor_id == where._actor_id == where._ray_actor_id and type(where._actor_id) is minray.ActorID
        assert context.task_id is None and context.actor_id is None


def test_a_functions_name_is_told_whatever_the_task_is_called():
    with minray.init(num_cpus=1):

        @minray.remote(name="another name")
        def plain():
            context = minray.get_runtime_context()
            return context.get_task_name(), context.get_task_function_name()

        @minray.remote
        class Actor:
            def method(self):
                return minray.get_runtime_context().get_task_function_name()

        name, function_name = minray.get(plain.remote())
        assert name == "another name" and function_name.endswith("<locals>.plain")
        assert minray.get(Actor.remote().method.remote()).endswith("Actor.method")
        assert minray.get_runtime_context().get_task_function_name() is None
