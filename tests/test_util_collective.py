import numpy as np
import pytest

import minray
from minray.util import collective
from minray.util.collective import ReduceOp
from minray.util.collective.types import Backend

pytestmark = pytest.mark.usefixtures("module_session")
SIZE = 3


@minray.remote
class Member:
    def run(self, work, *args):
        return work(*args)


@pytest.fixture(scope="module")
def members(module_session):
    actors = [Member.remote() for _ in range(SIZE)]
    collective.create_collective_group(actors, SIZE, list(range(SIZE)), backend="gloo")
    return actors


def in_all(members, work, *args):
    """What `work` returns in each member."""
    return minray.get([member.run.remote(work, *args) for member in members])


def test_members_know_their_rank_and_others_are_none(members):
    def who():
        return collective.get_rank(), collective.get_collective_group_size(), collective.is_group_initialized()

    assert in_all(members, who) == [(rank, SIZE, True) for rank in range(SIZE)]
    assert who() == (-1, -1, False)
    with pytest.raises(RuntimeError, match="not in the collective group 'default'"):
        collective.barrier()


@pytest.mark.parametrize(
    "op, expected", [(ReduceOp.SUM, 6), (ReduceOp.PRODUCT, 6), (ReduceOp.MIN, 1), (ReduceOp.MAX, 3)]
)
def test_allreduce_makes_one_of_all(members, op, expected):
    def work(op):
        array = np.full((2, 2), collective.get_rank() + 1.0)
        collective.allreduce(array, op=op)
        return array

    for array in in_all(members, work, op):
        assert np.array_equal(array, np.full((2, 2), expected))


@pytest.mark.parametrize("shape", [(100_003,), (7, 20_000)])
def test_a_large_allreduce_in_two_rounds_gives_all_the_same_bits(members, shape):
    def work(shape):
        array = np.random.default_rng(collective.get_rank()).random(shape)
        assert array.nbytes > collective.TWO_ROUNDS_FROM_BYTES
        collective.allreduce(array)
        return array

    found = in_all(members, work, shape)
    expected = sum(np.random.default_rng(rank).random(shape) for rank in range(SIZE))
    assert all(np.array_equal(array, found[0]) for array in found) and np.allclose(found[0], expected)


def test_reduce_changes_only_the_destination(members):
    def work():
        array = np.array([collective.get_rank() + 1])
        collective.reduce(array, dst_rank=1)
        return array.tolist()

    assert in_all(members, work) == [[1], [6], [3]]


def test_broadcast_gives_all_the_array_of_the_source(members):
    def work():
        array = np.full(2, collective.get_rank())
        collective.broadcast(array, src_rank=2)
        return array.tolist()

    assert in_all(members, work) == [[2, 2]] * SIZE


def test_allgather_gives_all_the_arrays_of_all(members):
    def work():
        targets = [np.zeros(2) for _ in range(SIZE)]
        collective.allgather(targets, np.full(2, collective.get_rank(), dtype=float))
        return np.stack(targets).tolist()

    assert in_all(members, work) == [[[0, 0], [1, 1], [2, 2]]] * SIZE


def test_reducescatter_gives_each_its_part_of_the_sum(members):
    def work():
        rank = collective.get_rank()
        array = np.zeros(1)
        collective.reducescatter(array, [np.array([10.0 * rank + part]) for part in range(SIZE)])
        return float(array[0])

    assert in_all(members, work) == [30 + 3 * part for part in range(SIZE)]


def test_send_and_recv_keep_their_order(members):
    def work():
        rank = collective.get_rank()
        array = np.zeros(1)
        if rank == 0:
            for value in (1.0, 2.0):
                collective.send(np.array([value]), dst_rank=1)
        if rank == 1:
            received = []
            for _ in range(2):
                collective.recv(array, src_rank=0)
                received.append(float(array[0]))
            return received

    assert in_all(members, work) == [None, [1.0, 2.0], None]


def test_nobody_passes_a_barrier_before_all_have_come(members, tmp_path):
    def work(path):
        (path / str(collective.get_rank())).touch()
        collective.barrier()
        return len(list(path.iterdir()))

    assert in_all(members, work, tmp_path) == [SIZE] * SIZE


def test_what_does_not_fit_together_is_an_error_in_all_members_and_the_group_goes_on(members):
    def other_shapes():
        with pytest.raises(ValueError, match="shape"):
            collective.allreduce(np.zeros(collective.get_rank() + 1))

    def other_operations():
        rank = collective.get_rank()
        with pytest.raises(ValueError, match="barrier"):
            collective.barrier() if rank == 0 else collective.allreduce(np.zeros(1))

    def mistakes():
        frozen = np.zeros(1)
        frozen.flags.writeable = False
        for call, error in (
            (lambda: collective.allreduce(frozen), ValueError),
            (lambda: collective.allreduce([1, 2]), TypeError),
            (lambda: collective.broadcast(np.zeros(1), src_rank=SIZE), ValueError),
            (lambda: collective.allgather([np.zeros(1)], np.zeros(1)), ValueError),
            (lambda: collective.send(np.zeros(1), collective.get_rank()), ValueError),
            (lambda: collective.init_collective_group(SIZE, 0), RuntimeError),
        ):
            with pytest.raises(error):
                call()

    in_all(members, other_shapes)
    in_all(members, other_operations)
    in_all(members, mistakes)
    in_all(members, collective.barrier)


def test_a_member_that_does_not_come_is_named():
    actors = [Member.remote() for _ in range(2)]
    collective.create_collective_group(actors, 2, [0, 1], group_name="late", gloo_timeout=1000)

    def alone():
        with pytest.raises(TimeoutError, match="barrier .* rank 1 did not come"):
            collective.barrier("late")
        array = np.zeros(1)
        with pytest.raises(TimeoutError, match="from rank 1"):
            collective.recv(array, 1, "late")

    minray.get(actors[0].run.remote(alone))
    with pytest.raises(TimeoutError, match="rank 1 did not join"):
        collective.init_collective_group(2, 0, group_name="nobody", gloo_timeout=1000)


def test_a_group_is_left_and_made_again_by_tasks_too():
    @minray.remote(num_cpus=0)
    def member(rank):
        collective.init_collective_group(2, rank, group_name="tasks")
        assert len(collective._groups) == 1  # That of the task before, in this worker, is forgotten.
        array = np.array([rank])
        collective.allreduce(array, "tasks")
        if rank == 0:
            collective.destroy_collective_group("tasks")
            assert not collective.is_group_initialized("tasks")
            collective.destroy_collective_group("tasks")
        return int(array[0])

    for _ in range(3):  # Each time in the same workers, which were members of the last one.
        assert minray.get([member.remote(rank) for rank in range(2)]) == [1, 1]


def test_groups_that_make_no_sense_are_refused():
    for call, error in (
        (lambda: collective.init_collective_group(0, 0), ValueError),
        (lambda: collective.init_collective_group(2, 2), ValueError),
        (lambda: collective.init_collective_group(2, 0, group_name=""), ValueError),
        (lambda: collective.init_collective_group(2, 0, backend="mpi"), ValueError),
        (lambda: collective.init_collective_group(2, 0, backend=Backend.NCCL), NotImplementedError),
        (lambda: collective.create_collective_group([1, 2], 2, [0, 0]), ValueError),
    ):
        with pytest.raises(error):
            call()
