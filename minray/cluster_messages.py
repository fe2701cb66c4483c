"""The words between nodes, and between a node of a cluster and its shell.

A node is to the head what a worker is to its node: it is given tasks, says what came of them, holds references
that are counted once, and is fenced off when it is declared dead.  So most words are those of messages.py, with the
other node as their `client`: a node's number, negative (the head is node 1, so it is client -1 of every other
node).  Here stands what a worker has no word for.

All messages of a link arrive in order and once, or the link is closed for good (TCP; the simulator's links do the
same). That is what makes the counting of references free of races: see cluster_objects.py.

`Places` are numbers of nodes that have a copy of a value.  In a value on its way between nodes they stand where the
data would be: large values are not sent along, whoever needs one fetches it from where it lies (`FetchObject`).
"""

from __future__ import annotations

from typing import Any, NamedTuple, Union

from minray.messages import (
    ActorKillRequested, ActorLookedUp, CallsCounted, CancelRequested, FunctionExported, Ids, NodeQueried,
    ObjectLost, ObjectsAwaited, ReferencesChanged, TasksFinished, TemplateDefined, Unpinned,
)  # fmt: skip
from minray.task_spec import TaskSpec

HEAD = 1
"""The number of the node that the driver's node is."""

Places = tuple[int, ...]

Report = tuple[bytes, Any, int, int, tuple[bytes, ...]]
"""(object_id, data, size, is_error, nested): what a node says of an object: bytes, or the places where it lies."""

# ---------------------------------------------------------------- events: from another node


class TasksGiven(NamedTuple):
    """Run these, or have them run.  Each task: (spec, number of its template on this link, extra, retries left).

    `extra`: of a call: (whose calls it stays in order with, whether it is a replay, whose result is dropped); of an
    actor's creation: (whether it has lived before, the number and the ID of the checkpoint that it starts from).
    `values`: of arguments that the receiver may not know yet, so that it need not ask.
    `raised`: of tasks that have raised, and are retried: how often they have."""

    client: int
    tasks: list[tuple[TaskSpec, int, Any, int]]
    values: list[Report]
    raised: dict[bytes, int]


class AttemptRaised(NamedTuple):
    """A task that the receiver gave is retried where it is, for it has raised (`raised` times by now).

    Should the sender die, the receiver is the one that runs it again: with the children of its last attempt, and with
    the retries that it has left."""

    client: int
    task_id: bytes
    raised: int
    retries_left: int


class ObjectsReported(NamedTuple):
    """The answer to ObjectsAwaited: each object, when it is ready anywhere."""

    client: int
    reports: list[Report]


class HandlesNamed(NamedTuple):
    """Among the objects that the receiver has taken a reference to, these are handles of actors."""

    client: int
    actor_ids: Ids


class CopiesChanged(NamedTuple):
    """The sender has fetched these objects, or has dropped its copy of those."""

    client: int
    made: Ids
    dropped: Ids


class ActorLost(NamedTuple):
    """The worker of an actor that lives at the sender has ended (`running`: executing this); or the actor itself has
    (`exited`).  What it had in hand has not been answered, and will not be."""

    client: int
    actor_id: bytes
    reason: str
    running: bytes | None
    exited: bool


class ActorSaved(NamedTuple):
    """An actor that lives at the sender has a checkpoint, after all calls answered so far; or (`failure`) could not be
    saved: for the time being, or `for_good`.  The receiver holds the object, and says when it does not need it."""

    client: int
    actor_id: bytes
    checkpoint: Report | None
    whole: bool
    failure: str
    for_good: bool


class ActorReleased(NamedTuple):
    """The actor's home is done with this instance: it ends, and is forgotten."""

    client: int
    actor_id: bytes


class LoadReported(NamedTuple):
    """Every HEARTBEAT_S: the sender lives, and has so many tasks of its own that wait or run."""

    client: int
    own_tasks: int


class Answered(NamedTuple):
    """The answer to a question that was passed on to the head."""

    client: int
    request_id: int
    answer: Any


class Expelled(NamedTuple):
    """The head has declared the receiver dead: nothing that it says is heard any more.  It ends; a new node may
    join."""

    client: int


# ---------------------------------------------------------------- events: from the shell


class NodeJoined(NamedTuple):
    """Another node is there, under a number never used before."""

    client: int
    label: str
    resources: dict[str, int]


class NodeDied(NamedTuple):
    """Its link is closed."""

    client: int
    reason: str


class ObjectArrived(NamedTuple):
    """What FetchObject asked for lies in the room that it was given."""

    client: int  # 0
    fetch_no: int


class FetchFailed(NamedTuple):
    client: int  # 0
    fetch_no: int
    reason: str


FromNode = Union[
    TasksGiven, AttemptRaised, ObjectsReported, HandlesNamed, CopiesChanged, ActorLost, ActorSaved, ActorReleased,
    LoadReported, Answered, Expelled, TasksFinished, FunctionExported, TemplateDefined, ReferencesChanged,
    ObjectsAwaited, ObjectLost, Unpinned, CancelRequested, ActorKillRequested, ActorLookedUp, CallsCounted, NodeQueried,
]  # fmt: skip
"""What a node may say to another; all else comes from the shell or from workers."""
