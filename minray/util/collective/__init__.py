"""Collective communication between tasks and actors: allreduce, broadcast, barrier, send and recv, and their kin.

    member (rank 0) --array--> object store <--array-- member (rank 1)
              \\--- ref ---> Rendezvous <--- ref ---/

Each member puts its array into the object store and brings the ref to the group's
rendezvous, an actor; there it waits, in a thread of the actor, until everybody's ref is
there, and then reads the others' arrays where they lie, without a copy.  A large allreduce
has two rounds: in the first each member makes a part of the result out of all arrays, in
the second the parts are put together, so that nobody reads or adds everything.

Arrays are NumPy's (or tensors of torch on the CPU, whose memory NumPy can see), and are
changed in place, as in Ray.  All members get the same bits: they add in the order of ranks.

A member is a process: an actor, the driver, or a worker for the length of one task.  When
one does not come within `gloo_timeout`, the others get a TimeoutError that names it.

Left out: GPUs (NCCL and `*_multigpu`).
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Sequence
from typing import Any

import numpy as np

import minray
from minray import ObjectRef, api
from minray.runtime_context import get_runtime_context
from minray.util.collective.types import Backend, ReduceOp

TIMEOUT_MS = 30_000
TWO_ROUNDS_FROM_BYTES = 256 << 10
"""From this size on it pays to share the work of a reduction."""
_REDUCE = {ReduceOp.SUM: np.add, ReduceOp.PRODUCT: np.multiply, ReduceOp.MIN: np.minimum, ReduceOp.MAX: np.maximum}


class Rendezvous:
    """The actor of a group: where refs are exchanged.  Each member that waits has a thread of it."""

    def __init__(self, size: int) -> None:
        self._size = size
        self._changed = threading.Condition()
        self._rounds: dict[Any, dict[int, Any]] = {}  # what the members brought, by (generation, number, what)
        self._left: dict[Any, int] = {}  # who has not taken it yet
        self._mail: dict[Any, deque[Any]] = {}  # by (generation, from, to)
        self._joining: dict[int, object] = {}
        self._generation = 0

    def join(self, rank: int, size: int, timeout_s: float) -> int:
        """Wait until all ranks have joined; the number of the group that they are, so that no other is heard."""
        if size != self._size:
            raise ValueError(f"rank {rank} joins a group of {size}, and others have made it one of {self._size}.")
        me = object()
        with self._changed:
            self._joining[rank] = me  # In the place of one that joined before, and has died.
            generation = self._generation
            if len(self._joining) == size:
                self._generation += 1
                self._joining = {}
                self._rounds.clear()
                self._left.clear()
                self._mail.clear()
                self._changed.notify_all()
                return self._generation
            if self._changed.wait_for(lambda: self._generation > generation, timeout_s):
                return generation + 1
            missing = [other for other in range(size) if other not in self._joining]
            if self._joining.get(rank) is me:
                del self._joining[rank]
            raise TimeoutError(f"the group was not there within {timeout_s:g} s: rank {_listed(missing)} did not join.")

    def exchange(self, key: tuple[int, int], what: str, rank: int, brought: Any, timeout_s: float) -> list[Any]:
        """What every rank brought, in order of ranks; waits for all."""
        with self._changed:
            there = self._rounds.setdefault(key, {})
            there[rank] = what, brought
            if len(there) == self._size:
                self._left[key] = self._size
                self._changed.notify_all()
            elif not self._changed.wait_for(lambda: len(there) == self._size, timeout_s):
                missing = [other for other in range(self._size) if other not in there]
                raise TimeoutError(f"{what} did not end within {timeout_s:g} s: rank {_listed(missing)} did not come.")
            self._left[key] -= 1
            if not self._left[key]:
                del self._left[key], self._rounds[key]
        for other, (their_what, _) in sorted(there.items()):
            if their_what != what:
                raise ValueError(f"rank {rank} calls {what} where rank {other} calls {their_what}.")
        return [there[other][1] for other in range(self._size)]

    def post(self, key: tuple[int, int, int], brought: Any) -> None:
        with self._changed:
            self._mail.setdefault(key, deque()).append(brought)
            self._changed.notify_all()

    def receive(self, key: tuple[int, int, int], timeout_s: float) -> Any:
        with self._changed:
            if not self._changed.wait_for(lambda: self._mail.get(key), timeout_s):
                raise TimeoutError(f"recv got nothing from rank {key[1]} within {timeout_s:g} s.")
            return self._mail[key].popleft()


def _listed(ranks: Sequence[int]) -> str:
    return ", ".join(map(str, ranks)) or "?"


class _Group:
    """A group, as one member knows it."""

    def __init__(self, name: str, size: int, rank: int, timeout_s: float) -> None:
        self.name = name
        self.size = size
        self.rank = rank
        self.timeout_s = timeout_s
        actor_class: Any = minray.remote(Rendezvous)
        self.rendezvous = actor_class.options(
            name=f"collective {name}", namespace="minray.util", get_if_exists=True, max_concurrency=2 * size + 4
        ).remote(size)
        self.generation: int = _unwrapped(self.rendezvous.join.remote(rank, size, timeout_s))
        self.rounds = 0

    def exchange(self, what: str, array: np.ndarray[Any, Any] | None) -> list[Any]:
        """The arrays of all ranks; None for who brought none."""
        self.rounds += 1
        brought = None if array is None else [minray.put(array)]
        key = (self.generation, self.rounds)
        refs = _unwrapped(self.rendezvous.exchange.remote(key, what, self.rank, brought, self.timeout_s))
        return [None if ref is None else minray.get(ref[0]) for ref in refs]


def _unwrapped(ref: ObjectRef[Any]) -> Any:
    """The value; an error of the rendezvous without its traceback, which tells nobody anything."""
    try:
        return minray.get(ref)
    except (TimeoutError, ValueError) as error:
        cause = vars(error).get("cause", error)
        raise cause from None


_groups: dict[tuple[object, str], _Group] = {}
_lock = threading.Lock()


def _member() -> object:
    """Who is a member: the actor, the driver of this session, or this task; the next one in this process is another."""
    core = api.core()
    context = get_runtime_context()
    return core.token, context.get_actor_id() or context.get_task_id()


def _group(name: str) -> _Group:
    group = _groups.get((_member(), name))
    if group is None:
        raise RuntimeError(
            f"this process is not in the collective group {name!r}. "
            "Call init_collective_group(world_size, rank) in it, or create_collective_group(actors, ...) in the driver."
        )
    return group


# ---------------------------------------------------------------- groups


def init_collective_group(
    world_size: int, rank: int, backend: str = Backend.SHM, group_name: str = "default", gloo_timeout: int = TIMEOUT_MS
) -> None:
    """Become member `rank` of a group; waits until all members have called it.

    Args:
        world_size: the number of members.
        rank: which one this is, 0 to world_size - 1.
        backend: "gloo" and "shm" mean shared memory; "nccl" is refused.
        group_name: any name; a process may be in several groups.
        gloo_timeout: milliseconds to wait for other members, now and in each operation.

    Raises:
        TimeoutError: not all members came in time.

    >>> @minray.remote
    ... class Member:
    ...     def total(self, rank):
    ...         import numpy as np
    ...         from minray.util import collective
    ...         collective.init_collective_group(2, rank)
    ...         array = np.full(3, rank + 1)
    ...         collective.allreduce(array)
    ...         return array.tolist()
    >>> members = [Member.remote() for _ in range(2)]
    >>> minray.get([member.total.remote(rank) for rank, member in enumerate(members)])
    [[3, 3, 3], [3, 3, 3]]
    """
    _check_backend(backend)
    if type(world_size) is not int or world_size < 1:
        raise ValueError(f"world_size must be an integer, 1 or more, got {world_size!r}.")
    if type(rank) is not int or not 0 <= rank < world_size:
        raise ValueError(f"rank must be an integer from 0 to world_size - 1 ({world_size - 1}), got {rank!r}.")
    if not isinstance(group_name, str) or not group_name:
        raise ValueError(f"group_name must be a string that is not empty, got {group_name!r}.")
    member = _member()
    if (member, group_name) in _groups:
        raise RuntimeError(f"this process is in the collective group {group_name!r} already.")
    group = _Group(group_name, world_size, rank, gloo_timeout / 1000)
    with _lock:
        for other in [key for key in _groups if key[0] != member]:
            del _groups[other]  # Of a task that this worker ran before, or of another session.
        _groups[member, group_name] = group


def create_collective_group(
    actors: Sequence[Any],
    world_size: int,
    ranks: Sequence[int],
    backend: str = Backend.SHM,
    group_name: str = "default",
    gloo_timeout: int = TIMEOUT_MS,
) -> None:
    """Make actors a group, from outside; returns when all are in it.  Arguments as `init_collective_group`."""
    _check_backend(backend)
    if len(actors) != len(ranks) or len(actors) != world_size or sorted(ranks) != list(range(world_size)):
        raise ValueError(
            f"a group of {world_size} needs as many actors and the ranks 0 to {world_size - 1}, each once; "
            f"got {len(actors)} actors and the ranks {list(ranks)}."
        )

    def join(actor: Any, *given: Any) -> None:
        init_collective_group(*given)

    minray.get(
        [
            actor.__ray_call__.remote(join, world_size, rank, backend, group_name, gloo_timeout)
            for actor, rank in zip(actors, ranks)
        ]
    )


def destroy_collective_group(group_name: str = "default") -> None:
    """Leave the group; a name that this process does not know is let pass."""
    with _lock:
        _groups.pop((_member(), group_name), None)


def is_group_initialized(group_name: str = "default") -> bool:
    """Whether this process is in the group."""
    return (_member(), group_name) in _groups


def get_rank(group_name: str = "default") -> int:
    """This process's rank; -1 if it is not in the group."""
    return _group(group_name).rank if is_group_initialized(group_name) else -1


def get_collective_group_size(group_name: str = "default") -> int:
    """The number of members; -1 if this process is not one."""
    return _group(group_name).size if is_group_initialized(group_name) else -1


def _check_backend(backend: Any) -> None:
    name = str(getattr(backend, "value", backend)).lower()
    if name == Backend.NCCL:
        raise NotImplementedError('backend="nccl": arrays on GPUs are not supported; "gloo" means shared memory here.')
    if name not in (Backend.GLOO, Backend.TORCH_GLOO, Backend.SHM):
        raise ValueError(f'backend must be "gloo" or "shm", got {backend!r}.')


# ---------------------------------------------------------------- operations


def barrier(group_name: str = "default") -> None:
    """Wait until all members are here."""
    _group(group_name).exchange("barrier", None)


def allreduce(tensor: Any, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Make each member's `tensor` the sum (or what `op` says) of all."""
    group, array = _group(group_name), _writable(tensor, "allreduce")
    if array.nbytes < TWO_ROUNDS_FROM_BYTES or group.size == 1:
        array[...] = _reduced(group.exchange(f"allreduce({op.name})", array), op, array)
        return
    arrays = group.exchange(f"allreduce({op.name})", array)
    theirs = [_like(other, array, rank).reshape(-1) for rank, other in enumerate(arrays)]
    edges = [array.size * rank // group.size for rank in range(group.size + 1)]
    begin, end = edges[group.rank], edges[group.rank + 1]
    part = _reduced([other[begin:end] for other in theirs], op, theirs[0][begin:end])
    del arrays, theirs
    array[...] = np.concatenate(group.exchange("allreduce, second round", part)).reshape(array.shape)


def reduce(tensor: Any, dst_rank: int = 0, group_name: str = "default", op: ReduceOp = ReduceOp.SUM) -> None:
    """Make the `tensor` of `dst_rank` the sum (or what `op` says) of all; the others keep theirs."""
    group = _group(group_name)
    _check_rank(dst_rank, group)
    array = _writable(tensor, "reduce") if group.rank == dst_rank else _array(tensor, "reduce")
    arrays = group.exchange(f"reduce({op.name}) to {dst_rank}", array)
    if group.rank == dst_rank:
        array[...] = _reduced(arrays, op, array)


def broadcast(tensor: Any, src_rank: int = 0, group_name: str = "default") -> None:
    """Make each member's `tensor` that of `src_rank`."""
    group = _group(group_name)
    _check_rank(src_rank, group)
    is_source = group.rank == src_rank
    array = _array(tensor, "broadcast") if is_source else _writable(tensor, "broadcast")
    arrays = group.exchange(f"broadcast from {src_rank}", array if is_source else None)
    if not is_source:
        array[...] = _like(arrays[src_rank], array, src_rank)


def allgather(tensor_list: Sequence[Any], tensor: Any, group_name: str = "default") -> None:
    """Make ``tensor_list[i]`` the `tensor` of rank i, in each member."""
    group = _group(group_name)
    targets = _of_all(tensor_list, group, "allgather")
    for rank, other in enumerate(group.exchange("allgather", _array(tensor, "allgather"))):
        targets[rank][...] = _like(other, targets[rank], rank)


def reducescatter(
    tensor: Any, tensor_list: Sequence[Any], group_name: str = "default", op: ReduceOp = ReduceOp.SUM
) -> None:
    """Make the `tensor` of rank i the sum (or what `op` says) of everybody's ``tensor_list[i]``."""
    group, array = _group(group_name), _writable(tensor, "reducescatter")
    sources = np.stack(_of_all(tensor_list, group, "reducescatter", written=False))
    theirs = group.exchange(f"reducescatter({op.name})", sources)
    array[...] = _reduced([other[group.rank] for other in theirs], op, array)


def send(tensor: Any, dst_rank: int, group_name: str = "default") -> None:
    """Send `tensor` to a member, who calls `recv`; returns when it is on its way."""
    group = _group(group_name)
    _check_peer(dst_rank, group, "send")
    key = (group.generation, group.rank, dst_rank)
    minray.get(group.rendezvous.post.remote(key, [minray.put(_array(tensor, "send"))]))


def recv(tensor: Any, src_rank: int, group_name: str = "default") -> None:
    """Make `tensor` the next one that `src_rank` sends here."""
    group, array = _group(group_name), _writable(tensor, "recv")
    _check_peer(src_rank, group, "recv")
    key = (group.generation, src_rank, group.rank)
    (ref,) = _unwrapped(group.rendezvous.receive.remote(key, group.timeout_s))
    array[...] = _like(minray.get(ref), array, src_rank)


# ---------------------------------------------------------------- arrays


def _array(tensor: Any, what: str) -> np.ndarray[Any, Any]:
    if hasattr(tensor, "detach") and hasattr(tensor, "numpy"):
        tensor = tensor.detach().numpy()  # torch: the same memory
    if not isinstance(tensor, np.ndarray):
        raise TypeError(f"{what}() takes a NumPy array, or a tensor of torch on the CPU, got {type(tensor).__name__}.")
    return tensor


def _writable(tensor: Any, what: str) -> np.ndarray[Any, Any]:
    array = _array(tensor, what)
    if not array.flags.writeable:
        raise ValueError(f"{what}() changes its array, and this one is read-only, as get()'s are. Take a copy().")
    return array


def _of_all(tensors: Sequence[Any], group: _Group, what: str, written: bool = True) -> list[np.ndarray[Any, Any]]:
    if not isinstance(tensors, (list, tuple)) or len(tensors) != group.size:
        raise ValueError(f"{what}() takes a list with an array for each of the {group.size} ranks.")
    return [(_writable if written else _array)(tensor, what) for tensor in tensors]


def _like(other: np.ndarray[Any, Any], mine: np.ndarray[Any, Any], rank: int) -> np.ndarray[Any, Any]:
    if other.shape != mine.shape or other.dtype != mine.dtype:
        raise ValueError(
            f"the array of rank {rank} has shape {other.shape} and dtype {other.dtype}, "
            f"the one here {mine.shape} and {mine.dtype}."
        )
    return other


def _reduced(
    arrays: Sequence[np.ndarray[Any, Any]], op: ReduceOp, mine: np.ndarray[Any, Any]
) -> np.ndarray[Any, Any]:
    total: np.ndarray[Any, Any] = np.array(_like(arrays[0], mine, 0))
    for rank, other in enumerate(arrays[1:], 1):
        _REDUCE[op](total, _like(other, mine, rank), out=total)
    return total


def _check_rank(rank: Any, group: _Group) -> None:
    if type(rank) is not int or not 0 <= rank < group.size:
        raise ValueError(f"there is no rank {rank!r} in the group {group.name!r} of {group.size}.")


def _check_peer(rank: Any, group: _Group, what: str) -> None:
    _check_rank(rank, group)
    if rank == group.rank:
        raise ValueError(f"{what}() is for another rank; {rank} is this one.")


__all__ = [
    "Backend", "ReduceOp", "allgather", "allreduce", "barrier", "broadcast", "create_collective_group",
    "destroy_collective_group", "get_collective_group_size", "get_rank", "init_collective_group",
    "is_group_initialized", "recv", "reduce", "reducescatter", "send",
]  # fmt: skip
