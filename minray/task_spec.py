"""What a task is, as data: its options, its spec, and the names of its states.

A *spec* describes a task and never changes: which function, which arguments, whose
child it is.  It is the lineage: with it the task can be run again.  What all calls of
one function share (name, resources, retries) stands once, in `TaskOptions`; a spec
points to it, and on the wire it is a small number.

Nothing here knows of queues, workers or time.
"""

from __future__ import annotations

from typing import NamedTuple, Union

TASK_STATES = (
    "PENDING_ARGS_AVAIL",
    "PENDING_NODE_ASSIGNMENT",
    "SUBMITTED_TO_WORKER",
    "RUNNING",
    "FINISHED",
    "FAILED",
)
PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT, SUBMITTED_TO_WORKER, RUNNING, FINISHED, FAILED = range(6)

ACTOR_STATES = ("DEPENDENCIES_UNREADY", "PENDING_CREATION", "ALIVE", "RESTARTING", "DEAD")
DEPENDENCIES_UNREADY, PENDING_CREATION, ALIVE, RESTARTING, DEAD = range(5)

PLACEMENT_GROUP_STATES = ("PENDING", "CREATED", "REMOVED", "INFEASIBLE")
PENDING, CREATED, REMOVED, INFEASIBLE = range(4)

WORKER_STATES = ("STARTING", "ALIVE", "DEAD")
OBJECT_STATES = ("PENDING", "READY", "FREED", "LOST")
LOCATIONS = ("inline", "arena", "spilled")

TASK, ACTOR_CREATION, ACTOR_METHOD = range(3)
"""Kinds of task: a function's, a class's constructor, a method's."""

UNIT = 10_000
"""Resources are counted in integer ten-thousandths, so that fractions add up exactly."""

INLINE, ARENA, SPILLED = range(3)
"""Where an object lies: in the node's table, in shared memory, in a file."""

OK, ERROR, RETRYABLE_ERROR, CANCELLED, ACTOR_EXITED = range(5)
"""How a task ended, in the worker's words.  A retryable error is one that `retry_exceptions` names."""

STREAMING, DYNAMIC = 1, 2
"""How a generator's values come: one by one as it yields them, or as one list of refs when it has ended."""

Resources = tuple[tuple[str, int], ...]
"""Sorted (name, ten-thousandths) pairs: a task's demand, and the key of its queue."""


Placement = Union[tuple[()], tuple[bytes, int, bool]]
"""In which placement group: its ID, the bundle (-1: any of them), and whether children go there, too.  (): in none."""

Conditions = tuple[tuple[str, str, tuple[str, ...]], ...]
"""What a node's labels must be, all of it: (label, one of placement.OPERATORS, values)."""


class TaskOptions(NamedTuple):
    """What all calls of one function (with the same options) share.  Plain data: it travels and is stored."""

    kind: int  # TASK, ACTOR_CREATION or ACTOR_METHOD
    function_id: bytes  # of the pickled function or class
    name: str  # for people; the function's qualified name unless given
    method: str = ""  # of an actor's class
    num_returns: int = 1
    resources: Resources = ()
    max_retries: int = 3  # -1: without end
    retry_exceptions: bytes | bool = False  # True, or a pickled tuple of exception classes
    max_concurrency: int = 1  # calls of an actor that run at the same time: those of no group
    interface: bytes = b""  # of an actor: the pickled `actor.Interface` that a handle to it needs
    checkpoint_every: int = 0  # calls of an actor; 0: not by number
    checkpoint_interval_s: float = 0.0  # 0: not by time
    streaming: int = 0  # STREAMING or DYNAMIC for a generator whose values have refs of their own (see node_streams.py)
    backpressure: int = 0  # so many items that nobody has taken, and the generator pauses; 0: it never does
    is_async: bool = False  # of an actor: its class has coroutine methods
    concurrency_groups: tuple[tuple[str, int], ...] = ()  # of an actor: names, and how many calls of each may run
    concurrency_group: str = ""  # of a method; "": none
    runtime_env: str = ""  # JSON, as `runtime_env.resolve` makes it; "": none, the process as it is forked
    max_calls: int = 0  # so many calls of this function, and the worker is replaced; 0: never
    placement: Placement = ()
    labels: tuple[Conditions, ...] = ()  # of the node, what to try one after the other; (): any node will do

    @property
    def concurrency(self) -> int:
        """How many calls of this actor may run at the same time, over all groups."""
        return self.max_concurrency + sum(limit for _, limit in self.concurrency_groups)


class ActorOptions(NamedTuple):
    """What a node must know of an actor beyond its creation task."""

    class_name: str
    name: str | None = None
    namespace: str = ""
    detached: bool = False
    max_restarts: int = 0  # -1: without end


class TaskSpec:
    """The description of one task.  Immutable once submitted."""

    __slots__ = ("task_id", "template_no", "args", "deps", "nested", "actor_id", "actor", "digest")

    def __init__(
        self,
        task_id: bytes,
        template_no: int,
        args: bytes | None = None,
        deps: tuple[bytes, ...] = (),
        nested: tuple[bytes, ...] = (),
        actor_id: bytes | None = None,
        actor: ActorOptions | None = None,
        digest: bytes = b"",
    ) -> None:
        self.task_id = task_id
        self.template_no = template_no  # of the TaskOptions, as the submitting process numbers them
        self.args = args  # pickled (args, kwargs); None: no arguments; b"": they are the last dep
        self.deps = deps  # objects to resolve before the task starts
        self.nested = nested  # objects that the arguments contain: kept alive, passed as refs
        self.actor_id = actor_id  # of the actor whose method this is
        self.actor = actor  # for an actor's creation
        self.digest = digest  # of its name and arguments, and of its code: in durable jobs (see code_digest.Digester)

    def to_wire(self) -> tuple[object, ...]:
        return (
            self.task_id, self.template_no, self.args, self.deps, self.nested, self.actor_id, self.actor, self.digest,
        )  # fmt: skip

    def __repr__(self) -> str:
        return f"TaskSpec{self.to_wire()}"
