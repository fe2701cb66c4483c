"""The words between a node and the world: events in, commands out.

An event says what has happened and names the process that it happened to (`client`: 0
is the driver, others are workers).  A command says what shall be done.  `Node.handle`
turns the first into the second and does nothing else, so a run is a list of events,
and a test needs no process.

Between processes a frame carries a list of messages; a message is an event (worker to
node) or a command (node to worker) without its client: ``(type name, *fields)``.
Frames are pickles of builtin types only: user data inside them stays opaque bytes,
which the node never unpickles.  A batch is one event: the price of an object an event
is paid once a frame, not once a task.
"""

from __future__ import annotations

from typing import Any, NamedTuple, Union

from minray.task_spec import Conditions, Placement, Resources, TaskOptions, TaskSpec

DRIVER = 0
Ids = list[bytes]

# ---------------------------------------------------------------- events: what has happened


class FunctionExported(NamedTuple):
    client: int
    function_id: bytes
    pickled: bytes
    name: str
    module: str
    source: str | None


class TemplateDefined(NamedTuple):
    """`client` will say `template_no` when it means these options."""

    client: int
    template_no: int
    options: TaskOptions


class TasksSubmitted(NamedTuple):
    client: int
    parent_task_id: bytes
    specs: list[TaskSpec]


class TasksFinished(NamedTuple):
    """Each result: (task_id, status, payload, started_s, finished_s).

    The payload of OK is the pickled value, or a list with a `Value` for each return; of any
    other status it is (pickled error, one line of text)."""

    client: int
    results: list[tuple[bytes, int, Any, float, float]]


class ItemsYielded(NamedTuple):
    """A generator has yielded; it runs on.  `values`: of its items `first`, `first + 1`, …, each a `Value`.

    `failed`: they are errors (the last item of a "dynamic" generator that has raised)."""

    client: int
    task_id: bytes
    first: int
    values: list[Any]
    failed: bool = False


class ItemsRequested(NamedTuple):
    """Whoever reads a generator has taken `position` items and takes up to `limit` more (0: looks what there is).

    Answered at once by (items there are beyond `position`, whether there will be no more); to wait for the next
    one is to await that object."""

    client: int
    request_id: int
    task_id: bytes
    position: int
    limit: int


class RoomAwaited(NamedTuple):
    """A generator pauses while as many of its items were not taken as its options allow.

    Answered, when there are fewer, by how many were taken; None: nobody reads it any more."""

    client: int
    request_id: int
    task_id: bytes
    blocks: bool


class TasksReturned(NamedTuple):
    """Unstarted tasks that a worker gives back: asked to, or because it is about to block, or they were cancelled."""

    client: int
    task_ids: Ids
    forgets: int = 0  # how many Forget commands it had carried out when it said this


class ObjectPut(NamedTuple):
    client: int
    object_id: bytes
    value: tuple[Any, int, tuple[bytes, ...]]  # a `Value`
    digest: bytes = b""  # of what it contains: in durable jobs


class ReferencesChanged(NamedTuple):
    """First acquired and last released in that process."""

    client: int
    acquired: Ids
    released: Ids


class Unpinned(NamedTuple):
    """No view into these objects' memory is left in that process (one entry for each pin)."""

    client: int
    object_ids: Ids


class ObjectsAwaited(NamedTuple):
    """`client` waits until `num_ready` of the objects are ready; `fetch`: and wants their values.

    `blocks`: a task's thread stands still for it, so the worker lends its CPU."""

    client: int
    request_id: int
    object_ids: Ids
    num_ready: int
    fetch: bool
    blocks: bool


class RequestAbandoned(NamedTuple):
    client: int
    request_id: int


class BlockRequested(NamedTuple):
    """Room for a new object.  Answered by ("block", offset, fresh), ("spill", victims) or ("file", path)."""

    client: int
    request_id: int
    object_id: bytes
    size: int


class BlocksSpilled(NamedTuple):
    """The victims of an earlier answer are on disk (`spilled`), or could not be written."""

    client: int
    request_id: int
    spilled: list[tuple[bytes, str]]
    object_id: bytes
    size: int


class BlockRefused(NamedTuple):
    """The operating system has no memory behind that block (ENOSPC): the arena ends there."""

    client: int
    request_id: int
    object_id: bytes
    offset: int
    size: int


class RoomAbandoned(NamedTuple):
    """`client` will not store that object after all: what it was given for it may be used again."""

    client: int
    object_id: bytes


class ObjectLost(NamedTuple):
    """A value cannot be read where it was said to lie (`data`; None: wherever it lies): its file is gone or damaged.

    Answered, if `request_id` is given, by whether it is lost now: not what is not there yet, or in view in shared
    memory."""

    client: int
    object_id: bytes
    data: Any
    reason: str
    request_id: int = 0


class ArgumentLost(NamedTuple):
    """Likewise, and therefore a task has not started: it comes back.  (An actor's call waits in its actor instead: it
    must not be overtaken, and its actor keeps what it holds anyway.)"""

    client: int
    task_id: bytes
    object_id: bytes
    data: Any
    reason: str


class CancelRequested(NamedTuple):
    """Answered, if `request_id` is given, by whether it can be done: a call of an actor is not ended by force."""

    client: int
    object_id: bytes
    force: bool
    recursive: bool
    request_id: int = 0


class ActorKillRequested(NamedTuple):
    client: int
    actor_id: bytes
    no_restart: bool


class CheckpointTaken(NamedTuple):
    """The state of the actor in this worker after all calls that it has answered, none of which is executed now.

    `whole`: the constructor will not be needed any more."""

    client: int
    object_id: bytes
    value: tuple[Any, int, tuple[bytes, ...]]  # a `Value`
    whole: bool


class CheckpointFailed(NamedTuple):
    """`for_good`: the state cannot be saved; else it found no room, and is tried again."""

    client: int
    object_id: bytes
    reason: str
    for_good: bool


class ActorLookedUp(NamedTuple):
    """Answered by None or (actor_id, interface): pinned for `client` until it says Unpinned."""

    client: int
    request_id: int
    namespace: str
    name: str


class CallsCounted(NamedTuple):
    """Answered by how many calls of `client` the actor has not finished."""

    client: int
    request_id: int
    actor_id: bytes


class NodeQueried(NamedTuple):
    """Answered by `Node.describe(what)`: plain data for cluster_resources() and its kind."""

    client: int
    request_id: int
    what: str


class PlacementGroupRequested(NamedTuple):
    """`value`: what its `ready()` is, pickled, once it is placed.

    Answered, if `request_id` is given, by None, or why it was not made: its name is taken."""

    client: int
    request_id: int
    group_id: bytes
    bundles: list[tuple[Resources, Conditions]]  # what each reserves, and on which kind of node
    strategy: str
    name: str
    detached: bool
    value: bytes


class PlacementGroupRemoved(NamedTuple):
    client: int
    group_id: bytes


class ResourcesAdded(NamedTuple):
    """The node has more of these from now on."""

    client: int
    resources: Resources


class WorkerStarted(NamedTuple):
    client: int
    pid: int


class WorkerDied(NamedTuple):
    """`running`: the task that it was executing when it died, or the checkpoint that it was making; None if none."""

    client: int
    reason: str
    running: bytes | None


class GcsStalled(NamedTuple):
    """For a while now the GCS has not been able to write, so new work must not come in: it would pile up.

    `error`: the class of the exception for those who submit some; `why`: a sentence or two, naming the file."""

    client: int
    error: str
    why: str


class GcsRecovered(NamedTuple):
    """All that was waiting has been written (or nothing will ever be)."""

    client: int


class Ticked(NamedTuple):
    """Time has passed: at least to the deadline that the node asked for.

    `executing`: (worker, task) for each worker that the node holds (HoldNext), read just now."""

    client: int = DRIVER  # As all events have one.
    executing: tuple[tuple[int, bytes | None], ...] = ()


Event = Union[
    FunctionExported, TemplateDefined, TasksSubmitted, TasksFinished, TasksReturned, ObjectPut, ReferencesChanged,
    ItemsYielded, ItemsRequested, RoomAwaited,
    Unpinned, ObjectsAwaited, RequestAbandoned, BlockRequested, BlocksSpilled, BlockRefused, RoomAbandoned, ObjectLost,
    ArgumentLost, CancelRequested, ActorKillRequested, CheckpointTaken, CheckpointFailed, ActorLookedUp, CallsCounted,
    NodeQueried, PlacementGroupRequested, PlacementGroupRemoved, ResourcesAdded, WorkerStarted, WorkerDied, GcsStalled,
    GcsRecovered, Ticked,
]  # fmt: skip

FROM_WORKERS = {
    cls.__name__: cls
    for cls in (
        FunctionExported, TemplateDefined, TasksSubmitted, TasksFinished, TasksReturned, ObjectPut, ReferencesChanged,
        ItemsYielded, ItemsRequested, RoomAwaited,
        Unpinned, ObjectsAwaited, RequestAbandoned, BlockRequested, BlocksSpilled, BlockRefused, RoomAbandoned,
        ObjectLost, ArgumentLost, CancelRequested, ActorKillRequested, CheckpointTaken, CheckpointFailed, ActorLookedUp,
        CallsCounted, NodeQueried, PlacementGroupRequested, PlacementGroupRemoved,
    )
}  # fmt: skip
"""The events that a worker may send; all others come from the shell alone."""


def event_from_wire(client: int, message: tuple[Any, ...]) -> Event:
    """Raises KeyError for a message that workers do not send."""
    name, *fields = message
    if name == "TasksSubmitted":
        fields[1] = [TaskSpec(*fields_of_spec) for fields_of_spec in fields[1]]
    return FROM_WORKERS[name](client, *fields)


# ---------------------------------------------------------------- commands: what shall be done


class StartWorker(NamedTuple):
    client: int


class DefineFunction(NamedTuple):
    client: int
    function_id: bytes
    pickled: bytes


class DefineTemplate(NamedTuple):
    client: int
    template_no: int
    options: TaskOptions


class RunTasks(NamedTuple):
    """Each task: (task_id, template_no, args, values of deps or None, mark).

    `mark`: True: tasks of this kind have been so short, and may run again, that their result and that of the
    one before may wait for each other.  A number below 0: so many attempts have raised before this one, so its
    children are others than theirs (one field for both: rare news, which must cost the other tasks nothing)."""

    client: int
    tasks: list[tuple[bytes, int, bytes | None, list[Any] | None, int]]


class AssignResources(NamedTuple):
    """Before the tasks that use them: the worker's CPUs (for OMP_NUM_THREADS), its GPUs, if any, and where they are."""

    client: int
    num_cpus: float
    gpu_ids: tuple[int, ...]
    resources: dict[str, float]
    placement: Placement = ()


class SetUpEnvironment(NamedTuple):
    """From now on the worker runs tasks of this environment only: it is set up before the first one starts."""

    client: int
    runtime_env: str


class MarkReconstructed(NamedTuple):
    """The actor that comes next has lived before."""

    client: int


class RestoreActor(NamedTuple):
    """The actor that comes next starts from this checkpoint, the `number`-th."""

    client: int
    number: int
    checkpoint: Fetched


class TakeBack(NamedTuple):
    """Give back up to `count` tasks that have not started, the last first."""

    client: int
    num_tasks: int


class HoldNext(NamedTuple):
    """It does not answer: count that in shared memory.  It will not start another task before it has read as many
    Forget commands: one follows each time.  (A mark would be taken away by the Forget of an earlier time.)"""

    client: int


class Forget(NamedTuple):
    """Drop these unstarted tasks, others have them; and go on."""

    client: int
    task_ids: Ids


class CancelTask(NamedTuple):
    """Drop it if it has not started; if it runs, raise KeyboardInterrupt in it."""

    client: int
    task_id: bytes


class Reply(NamedTuple):
    client: int
    request_id: int
    answer: Any


class KillWorker(NamedTuple):
    """`only_if_running`: leave the worker alone unless it executes this very task."""

    client: int
    only_if_running: bytes | None = None


class ExitWorker(NamedTuple):
    """Finish what was sent, run atexit handlers, and end."""

    client: int


class Warn(NamedTuple):
    """Tell the user, in the driver's terminal."""

    text: str


class DeleteFile(NamedTuple):
    path: str


class TellNode(NamedTuple):
    """On a cluster: send these to that node, in order; its `handle` is given them one by one."""

    client: int
    events: list[Any]


class FetchObject(NamedTuple):
    """On a cluster: copy the object from that node into the room given: ("block", offset, fresh) or ("file", path)."""

    client: int
    fetch_no: int
    object_id: bytes
    size: int
    room: tuple[Any, ...]


Command = Union[
    StartWorker, DefineFunction, DefineTemplate, RunTasks, AssignResources, SetUpEnvironment, MarkReconstructed,
    RestoreActor, TakeBack, HoldNext, Forget, CancelTask, Reply, KillWorker, ExitWorker, DeleteFile, Warn, TellNode,
    FetchObject,
]  # fmt: skip

# ---------------------------------------------------------------- values

Value = tuple[Any, int, tuple[bytes, ...]]
"""(data, size, nested): where a value is: pickled bytes (inline), an int (its offset in the arena) or a
str (its file); how many bytes; and the IDs of the objects that it contains."""

Fetched = tuple[Any, int, int, bytes]
"""(data, size, is_error, object_id): a value on its way to a reader; memory in the arena is pinned for that reader."""
