"""Which objects and tasks there are, and what keeps them: the object table and the task table.

Pure: no process, clock or file.  Owns the entries of both tables, reference counts,
pins and the waiting lists that hang on an object.  It does not know workers, queues or
resources; it tells its node what became runnable, which requests were fulfilled, which files
to delete, who has gone and what is wanted again, through the callbacks it is given.

The life of an object: *pending* (its task has not finished), *ready* (inline, in the
arena, or in a file), *freed*; lost, it is pending again.  Three counts keep it:

* ``refs``: processes that hold an ObjectRef to it, tasks not yet finished that need it,
  and live objects that contain it.  At 0 the value can go.
* ``pins``: views into its memory in some process.  While there are any, the memory must
  neither move nor be used again, even when nobody holds a ref any more.
* ``replays``: finished tasks whose replay would need it, and its own parent, while that runs and
  may have to run again.  While there are any, the entry stays, but its memory may go: it can
  be made again in turn.

A task stands in the task table until it has finished and all its returns are gone: that is
the lineage from which a lost object can be made again.  A value that travels in messages
lies in this table and cannot be lost; so only tasks with a large result keep what they were
made of, and of those only the newest `MAX_REPLAYABLE`: lineage would else grow without end
in a loop like ``x = step.remote(x)``.

Left out: weak references and cycles through actors (an object in an actor's state that
holds the actor's own handle keeps both).  Ray has the same limit.
"""

from __future__ import annotations

import pickle
from collections import Counter, deque
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Union

from minray import ids
from minray.exceptions import error_payload
from minray.messages import Value
from minray.object_store import Allocator
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_METHOD, ARENA, FAILED, FINISHED, INLINE, PENDING_ARGS_AVAIL, SPILLED, TASK, TaskOptions,
    TaskSpec,
)  # fmt: skip

if TYPE_CHECKING:
    from minray.cluster_objects import Away
    from minray.scheduler import Shape, WorkerRecord


class Template:
    """`TaskOptions` as the node keeps them: with a number, a queue, and what it has learned."""

    __slots__ = (
        "no", "options", "shape", "mean_s", "max_s", "may_repeat", "may_replay", "num_returns", "num_kept",
        "minds_freeing",
    )  # fmt: skip

    def __init__(self, no: int, options: TaskOptions, shape: Shape) -> None:
        self.no = no  # the node's own number, the same on every wire and in the GCS
        self.options = options
        self.shape = shape  # the queue of all tasks with these resources
        self.mean_s: float | None = None  # moving average of the run time; None: never ran
        self.max_s = 0.0  # decaying maximum of it: what a neighbour may have to wait for
        # With max_retries=0 a task must not run twice because its result was still on its way (an actor dies whole).
        self.may_repeat = options.max_retries != 0 or options.kind == ACTOR_METHOD
        # A call met a state that is not there any more.
        self.may_replay = options.max_retries != 0 and options.kind == TASK
        self.num_returns = options.num_returns
        # How many of its returns are kept for a second attempt of its parent: a reader has no value to keep.
        self.num_kept = options.num_returns if not options.streaming else 1
        self.minds_freeing = options.kind == ACTOR_CREATION or options.streaming != 0  # somebody wants to know of it

    def learn(self, took_s: float) -> None:
        """That a run took so long.  The hot path has the same three lines: see NodeTasks.handle_tasks_finished."""
        mean_s = self.mean_s
        self.mean_s = took_s if mean_s is None else mean_s + 0.1 * (took_s - mean_s)
        self.max_s = took_s if took_s > self.max_s else self.max_s * 0.99 + took_s * 0.01


class Task:
    """An execution of a spec, over all its attempts.  The scheduler alone changes `state` and `worker`."""

    __slots__ = (
        "spec", "template", "no", "parent_no", "client", "state", "attempt", "retries_left", "missing", "worker",
        "live_returns", "last_child", "caller", "cancelled", "error", "result_bytes", "submitted_s", "started_s",
        "finished_s", "dirty", "origins", "children", "stream", "raised",
    )  # fmt: skip

    caller: int | bytes  # of an actor's call: whose calls it stays in order with (see actor_table)
    stream: Stream  # of a generator whose items have refs of their own

    def __init__(self, spec: TaskSpec, template: Template, no: int, parent_no: int, client: int, now: float) -> None:
        self.spec = spec
        self.template = template
        self.no = no  # counts up over the session: the row number in the GCS
        self.parent_no = parent_no
        self.client = client  # the process that submitted it
        self.state = PENDING_ARGS_AVAIL
        self.attempt = 0  # how often it was handed to a worker for good
        self.retries_left = template.options.max_retries
        self.raised = 0  # attempts that raised and were retried: each has children of its own (see ids.py)
        self.missing = 0  # dependencies that are not ready
        self.worker: WorkerRecord | None = None  # that it was last handed to, also once it has ended
        self.live_returns = 0  # entries of its returns that are not freed
        self.last_child = 0  # how many tasks an attempt has submitted: with its ID that tells theirs
        self.cancelled = False
        self.error: str | None = None  # one line, once FAILED; while it runs: why it will fail whatever it returns
        self.origins: tuple[bytes, ...] | None = None  # once finished: what is kept for its replay, if anything is
        self.children: deque[bytes] | None = None  # returns of those it has submitted, kept for its second attempt
        self.result_bytes = 0
        self.submitted_s = now
        self.started_s = 0.0
        self.finished_s = 0.0
        self.dirty = False  # stands in the list of rows to record


class Stream:
    """The items that a generator yields: how many there are, and who has them.  Changed by node_streams.py alone.

    While somebody reads, the stream holds a ref to each item that was not taken, and to the one after the last:
    that is pending, or, at the end, stands for the end, so that who waits for it is told."""

    __slots__ = (
        "num_items", "num_taken", "is_read", "ended", "failed", "attempt", "num_yielded", "room", "lost",
        "gaps", "parent", "kept",
    )  # fmt: skip

    def __init__(self) -> None:
        self.num_items = 0  # known, over all attempts; an error at the end is one of them
        self.num_taken = 0  # by its reader, the first ones
        self.is_read = True  # its reader is there; of a DYNAMIC one that is the task itself, until it has ended
        self.ended = False  # no more will come
        self.failed = False  # the last one is an error
        self.attempt = 0  # of the task: the one that last yielded,
        self.num_yielded = 0  # so many
        self.room: Request | None = None  # the generator pauses; answered, or given up, if nothing remains of it
        self.lost: dict[bytes, None] = {}  # items that the run in hand, or one more, has to make again
        self.gaps: dict[int, None] = {}  # items that a new reader would find freed: made again when it comes to one
        # A second attempt of the task that reads it begins anew; items are kept for that like other children's returns:
        self.parent: Task | None = None  # in its `children`
        self.kept: list[bytes] | None = None  # or here, of an actor with recovery: see node_exact.py

    def held(self) -> list[int]:
        """The items that it holds a ref to."""
        items = range(self.num_taken, self.num_items + 1) if self.is_read else ()
        return [item for item in items if item not in self.gaps]


class Request:
    """A process waits for objects, or for room."""

    __slots__ = ("client", "request_id", "object_ids", "remaining", "fetch", "blocks")

    def __init__(
        self, client: int, request_id: int, object_ids: list[bytes], remaining: int, fetch: bool, blocks: bool
    ) -> None:
        self.client = client
        self.request_id = request_id
        self.object_ids = object_ids
        self.remaining = remaining  # objects that must still become ready; 0: answered or abandoned
        self.fetch = fetch
        self.blocks = blocks


class ObjectEntry:
    __slots__ = (
        "object_id", "data", "size", "is_error", "refs", "pins", "replays", "nested", "waiters", "task", "no", "away",
    )  # fmt: skip

    def __init__(self, object_id: bytes, task: Task | None, refs: int) -> None:
        self.object_id = object_id
        self.data: Any = None  # None: pending; bytes: inline; int: offset in the arena; str: a file
        self.size = 0
        self.is_error: int = False  # True: its task's; GONE: it stands for a value that is lost, or has been freed
        self.refs = refs
        self.pins = 0
        self.replays = 0
        self.nested: tuple[bytes, ...] = ()
        self.waiters: list[Union[Task, Request]] | None = None
        self.task = task  # that returns it; None: put, nothing to replay
        self.no = 0  # row number in the GCS; 0: has no row of its own
        self.away: Away | None = None  # what other nodes have to do with it, on a cluster

    @property
    def is_handle(self) -> bool:
        """It stands for an actor."""
        if self.away is not None and self.away.is_handle:
            return True
        return self.task is not None and self.task.spec.actor is not None and self.task.spec.task_id == self.object_id


READY, FREED, LOST = 1, 2, 3  # of OBJECT_STATES
GONE = 2
MAX_REPLAYABLE = 100_000
"""So many finished tasks keep their lineage for the large results that they have made."""
MAX_CHILDREN = 1_000
"""So many children of a running task, the newest, are remembered for its second attempt."""
CONSTRUCTED = pickle.dumps(None, 5)


def freed_object_error(object_id: bytes) -> bytes:
    return error_payload(
        "ObjectLostError",
        f"object {ids.short(object_id)} has been freed: no process held an ObjectRef to it any more. "
        "The ref was probably kept outside of minray's sight (as text or in a file), or since before the last "
        "shutdown(). Keep the ObjectRef itself alive, and in one session.",
    )


class Lineage:
    def __init__(
        self,
        capacity: int,
        task_ready: Callable[[Task], None],
        request_ready: Callable[[Request], None],
        delete_file: Callable[[str], None],
        handle_dropped: Callable[[bytes], None],
        wanted_again: Callable[[ObjectEntry], None],
    ) -> None:
        self.objects: dict[bytes, ObjectEntry] = {}
        self.tasks: dict[bytes, Task] = {}
        self.arena = Allocator(capacity)
        self.in_arena: dict[bytes, ObjectEntry] = {}  # least recently used first; without those being spilled
        self.spilling: dict[bytes, ObjectEntry] = {}
        self.new_objects: dict[int, tuple[Any, ...]] = {}  # rows to record, by number
        self.object_updates: list[tuple[Any, ...]] = []
        self._freed: list[int] = []
        self.bytes_spilled = 0
        self._objects_made = 0
        self._task_ready = task_ready
        self._request_ready = request_ready
        self._delete_file = delete_file
        self._handle_dropped = handle_dropped
        self._wanted_again = wanted_again
        self.awaited_away: Callable[[ObjectEntry], None]  # set, and used, on a cluster only
        self.away_let_go: Callable[[ObjectEntry], None]
        self.stream_opened: Callable[[Task], None]  # set by the node
        self.reader_gone: Callable[[Task], None]
        self.replayable: dict[bytes, Task] = {}  # the oldest first
        self.promised: dict[bytes, None] = {}  # objects that the node itself will make, of no task

    # ------------------------------------------------------------ making

    def add_task(self, task: Task) -> None:
        """Enter a submitted task and its returns, held by the submitter; count what it waits for."""
        spec = task.spec
        task_id = spec.task_id
        self.tasks[task_id] = task
        num_returns = task.template.num_returns
        if num_returns == 1:
            self.objects[task_id] = ObjectEntry(task_id, task, 1)
            task.live_returns = 1
        else:
            for index in range(num_returns):
                return_id = ids.return_id(task_id, index)
                self.objects[return_id] = ObjectEntry(return_id, task, 1)
            task.live_returns = num_returns
            if task.template.options.streaming:
                self.stream_opened(task)
        if spec.deps or spec.nested:
            self.hold_arguments(task)

    def hold_arguments(self, task: Task) -> None:
        for object_id in task.spec.nested:
            self.hold(object_id)
        for object_id in task.spec.deps:
            self.hold(object_id)
        self.count_missing(task)

    def count_missing(self, task: Task) -> None:
        """How many of its arguments it has to wait for."""
        task.missing = 0
        for object_id in task.spec.deps:
            entry = self.objects[object_id]
            if entry.data is None:
                task.missing += 1
                self.wait_for(entry, task)

    def put(self, object_id: bytes, value: Value, now: float) -> ObjectEntry | None:
        """A new object, held by whoever put it.  None if it is known already (a task's second attempt)."""
        entry = self.objects.get(object_id)
        if entry is not None:
            if entry.data is None:  # Nobody needed it any more, but for a replay.
                self.seal(entry, value, False, now)
            else:
                self.drop_value(value)
            return None
        entry = self.objects[object_id] = ObjectEntry(object_id, None, 1)
        self._fill(entry, value)
        self._record(entry, now)
        return entry

    def promise(self, object_id: bytes) -> None:
        """An object that the node will make, and holds: what a placement group's `ready()` returns.

        If somebody still holds one of that name (of a group that an earlier attempt of its maker made and removed), it
        stays what it is: objects do not change."""
        entry = self.objects.get(object_id)
        if entry is None:
            entry = self.objects[object_id] = ObjectEntry(object_id, None, 0)
            self.promised[object_id] = None
        entry.refs += 1

    def seal(self, entry: ObjectEntry, value: Value, is_error: int, now: float) -> None:
        """The value is there: wake everyone who waits for it."""
        entry.is_error = is_error
        self._fill(entry, value)
        if type(entry.data) is not bytes:
            self._record(entry, now)
        waiters = entry.waiters
        if waiters is not None:
            entry.waiters = None
            for waiter in waiters:
                if type(waiter) is Task:
                    waiter.missing -= 1
                    if not waiter.missing:
                        self._task_ready(waiter)
                elif type(waiter) is Request and waiter.remaining > 0:
                    # get() of many raises the first error at once, without waiting for the rest.
                    waiter.remaining = 0 if is_error and waiter.fetch else waiter.remaining - 1
                    if not waiter.remaining:
                        self._request_ready(waiter)

    def _fill(self, entry: ObjectEntry, value: Value) -> None:
        before = entry.nested  # On a cluster: known while the value was elsewhere.
        entry.data, entry.size, entry.nested = value
        for object_id in entry.nested:
            self.hold(object_id)
        for object_id in before:
            self.release(object_id)
        if type(entry.data) is int:
            self.in_arena[entry.object_id] = entry

    def drop_value(self, value: Value) -> None:
        """A value that came too late: nobody wants it."""
        if type(value[0]) is int:
            self.arena.free(value[0])
        elif type(value[0]) is str:
            self._delete_file(value[0])

    def accept_return(self, task: Task, index: int, value: Value, is_error: bool, now: float) -> None:
        entry = self.objects.get(ids.return_id(task.spec.task_id, index))
        if entry is None or entry.data is not None:
            self.drop_value(value)
            return
        self.seal(entry, value, is_error, now)
        if entry.refs <= 0 and not entry.pins:
            self.free(entry)  # It was kept for a replay, and is too large for that.
        elif type(value[0]) is not bytes and task.template.may_replay and (task.spec.deps or task.spec.nested):
            task.origins = ()

    # ------------------------------------------------------------ keeping

    def wait_for(self, entry: ObjectEntry, waiter: Task | Request) -> None:
        if entry.away is not None:
            self.awaited_away(entry)
        waiters = entry.waiters
        if waiters is None:
            entry.waiters = [waiter]
            return
        if len(waiters) & (len(waiters) - 1) == 0 and len(waiters) > 4:
            # At every doubling: drop requests that were answered or given up, so that polling does not pile up.
            waiters[:] = [w for w in waiters if type(w) is Task or (type(w) is Request and w.remaining > 0)]
        waiters.append(waiter)

    def hold(self, object_id: bytes) -> ObjectEntry:
        """One more reference.  An ID that is not known has been freed: it stands for an ObjectLostError,
        unless its task is still to run (nobody wanted it any more; now its parent's second attempt does)."""
        entry = self.objects.get(object_id)
        if entry is None:
            object_id = bytes(object_id)  # Never a ref itself: the table would keep alive what it counts.
            task = None if ids.is_put(object_id) else self.tasks.get(ids.task_of(object_id))
            if task is not None and ids.index_of(object_id) >= task.template.num_returns:
                task = None  # It is an item that was freed, or its task is another one than its holder believes.
            if task is not None and (task.state < FINISHED or task.spec.actor is not None):
                entry = self.objects[object_id] = ObjectEntry(object_id, task, 0)
                task.live_returns += 1
                if task.state == FINISHED:  # An actor that is still there for its last calls: a handle holds None.
                    entry.data, entry.size = CONSTRUCTED, len(CONSTRUCTED)
                elif task.spec.actor is not None:
                    self._wanted_again(entry)  # By another node, perhaps.
            else:
                entry = self.objects[object_id] = ObjectEntry(object_id, None, 0)
                entry.data, entry.is_error = freed_object_error(object_id), GONE
                entry.size = len(entry.data)
        entry.refs += 1
        if entry.refs == 1 and entry.replays and entry.data is None:
            self._wanted_again(entry)
        return entry

    def keep_child(self, parent: Task, child: Task) -> None:
        """Should the parent run again, it will find this one as it is."""
        kept = parent.children
        if kept is None:
            kept = parent.children = deque()
        for index in range(child.template.num_kept):
            object_id = ids.return_id(child.spec.task_id, index)
            self.objects[object_id].replays += 1
            kept.append(object_id)
        while len(kept) > MAX_CHILDREN:
            self._unkeep(kept.popleft())
        if child.template.options.streaming:
            child.stream.parent = parent

    def keep_item(self, parent: Task, entry: ObjectEntry) -> None:
        """Likewise, of a generator that the parent has submitted."""
        if parent.raised and entry.object_id[:8] != ids.children_prefix(parent.spec.task_id, parent.raised):
            return  # An earlier attempt did, and this one will not look for it.
        if parent.children is not None:
            entry.replays += 1
            parent.children.append(entry.object_id)
            if len(parent.children) > MAX_CHILDREN:
                self._unkeep(parent.children.popleft())

    def forget_child(self, parent: Task, child: Task) -> None:
        for object_id in [one for one in parent.children or () if ids.task_of(one) == child.spec.task_id]:
            if parent.children is not None:
                parent.children.remove(object_id)
                self._unkeep(object_id)

    def forget_children(self, parent: Task) -> None:
        """The parent has ended, or its attempt has by raising: it will not submit them again."""
        kept, parent.children = parent.children, None
        for object_id in kept or ():
            self._unkeep(object_id)

    def _unkeep(self, object_id: bytes) -> None:
        entry = self.objects[object_id]
        entry.replays -= 1
        if entry.refs <= 0 and not entry.pins:
            self.free(entry)

    def release(self, object_id: bytes) -> None:
        """One reference less; free the object, and what only it kept, when that was the last."""
        entry = self.objects.get(object_id)
        if entry is None:
            return  # A ref of an earlier session, or one that outlived its object's error.
        entry.refs -= 1
        if entry.refs <= 0 and not entry.pins:
            self.free(entry)

    def release_arguments(self, task: Task) -> None:
        """The task has ended: what it needed may go, or is kept for its replay."""
        spec = task.spec
        if task.origins is not None:
            self.replayable[spec.task_id] = task
            entries = [self.objects[object_id] for object_id in spec.deps + spec.nested]
            # An actor must not outlive its handles because a task that has ended was given one.
            task.origins = tuple(entry.object_id for entry in entries if not entry.is_handle)
            for object_id in task.origins:
                self.objects[object_id].replays += 1
            if len(self.replayable) > MAX_REPLAYABLE:
                self.forget_lineage(next(iter(self.replayable.values())))
        for object_id in spec.deps:
            self.release(object_id)
        for object_id in spec.nested:
            self.release(object_id)

    def hold_arguments_again(self, task: Task) -> None:
        """The task is to be replayed: what it needs is kept for it as at first, and made again if need be."""
        if task.origins is not None:
            self.hold_arguments(task)
            del self.replayable[task.spec.task_id]
            for object_id in task.origins:
                self.objects[object_id].replays -= 1
            task.origins = None
        else:
            task.missing = 0  # It was given nothing, or it could not be replayed; its result may have been known.

    def is_no_origin(self, entry: ObjectEntry) -> None:
        """It has turned out to be a handle: see `release_arguments`."""
        for task in self.replayable.values():
            if entry.replays and task.origins is not None and entry.object_id in task.origins:
                entry.replays -= task.origins.count(entry.object_id)
                task.origins = tuple(object_id for object_id in task.origins if object_id != entry.object_id)

    def forget_lineage(self, task: Task) -> None:
        """It will not be replayed any more."""
        doomed = deque[ObjectEntry]()
        self._forget_lineage(task, doomed)
        self._free_all(doomed)

    def _forget_lineage(self, task: Task, doomed: deque[ObjectEntry]) -> None:
        if self.replayable.pop(task.spec.task_id, None) is not None:
            origins, task.origins = task.origins, None
            for object_id in origins or ():
                entry = self.objects[object_id]
                entry.replays -= 1
                if entry.refs <= 0 and not entry.pins:
                    doomed.append(entry)

    def pin(self, entry: ObjectEntry) -> None:
        entry.pins += 1
        if entry.object_id in self.in_arena:  # Used: to the young end.
            del self.in_arena[entry.object_id]
            self.in_arena[entry.object_id] = entry

    def unpin(self, object_id: bytes) -> None:
        entry = self.objects[object_id]
        entry.pins -= 1
        if entry.refs <= 0 and not entry.pins:
            self.free(entry)

    def free(self, first: ObjectEntry) -> None:
        task = first.task
        if (
            task is not None and task.state == FINISHED and task.live_returns == 1 and task.origins is None
            and type(first.data) is bytes and not (first.nested or first.replays or first.no)
            and first.away is None and task.spec.actor is None
        ):  # fmt: skip
            # The hot path: the one small result of a task, and nothing hangs on either.  Measured: 0.2 µs of 1.0.
            if self.objects.pop(first.object_id, None) is not None:
                first.data = None
                task.live_returns = 0
                self.tasks.pop(task.spec.task_id, None)
            return
        self._free_all(deque((first,)))

    def _free_all(self, doomed: deque[ObjectEntry]) -> None:
        """A queue, not recursion: chains of nested objects, and of lineage, can be long."""
        while doomed:
            entry = doomed.popleft()
            if entry.replays:
                # What lies in this table stays: then its task need not run again.  But not what contains refs, which
                # may lead back here.
                if type(entry.data) is not bytes or (entry.nested and entry.task is not None):
                    self._let_go(entry, doomed)
                continue
            if self.objects.pop(entry.object_id, None) is None:
                continue
            self._let_go(entry, doomed)
            task = entry.task
            if task is not None:
                task.live_returns -= 1
                if task.template.minds_freeing and self._stands_for_somebody(entry, task):
                    continue
                if not task.live_returns and task.state >= FINISHED:
                    self.tasks.pop(task.spec.task_id, None)
                    if task.origins is not None:
                        self._forget_lineage(task, doomed)

    def _stands_for_somebody(self, entry: ObjectEntry, task: Task) -> bool:
        """An actor, or the reader of a generator: tell the node that it is gone.  True: that was all."""
        if not task.template.options.streaming:
            self._handle_dropped(entry.object_id)
            return True
        if entry.object_id == ids.reader_id(entry.object_id):
            self.reader_gone(task)
        return False

    def _let_go(self, entry: ObjectEntry, doomed: deque[ObjectEntry]) -> None:
        """The value's memory, its row, and the objects that only it kept."""
        data = entry.data
        entry.data = None
        if entry.away is not None:
            self.away_let_go(entry)
        if type(data) is int:
            if self.in_arena.pop(entry.object_id, None) is not None:
                self.arena.free(data)
            else:  # It is being spilled: `spilled` frees it when the writer has done.
                leaving = self.spilling[entry.object_id] = ObjectEntry(entry.object_id, None, 0)
                leaving.data = data
        elif type(data) is str:
            self._delete_file(data)
        if entry.no and self.new_objects.pop(entry.no, None) is None:
            self._freed.append(entry.no)  # One made and freed within a flush window leaves no row.
        entry.no = 0
        nested, entry.nested = entry.nested, ()
        for object_id in nested:
            inner = self.objects.get(object_id)
            if inner is not None:
                inner.refs -= 1
                if inner.refs <= 0 and not inner.pins:
                    doomed.append(inner)

    def lose(self, entry: ObjectEntry) -> bool:
        """The value is gone.  False: there is none, or it is in view in shared memory, which must not be used yet.

        Errors stay: there is nothing to make again."""
        in_view = type(entry.data) is int and (entry.pins or entry.object_id in self.spilling)
        if entry.data is None or entry.is_error or in_view:
            return False
        doomed = deque[ObjectEntry]()
        if entry.no:
            self._note_update(entry, LOST, None, None)
        no, entry.no = entry.no, 0
        self._let_go(entry, doomed)
        entry.no = no
        self._free_all(doomed)
        return True

    def forget_if_unneeded(self, task: Task) -> None:
        """Call when a task has ended: without live returns nothing can need it again (but an actor may live on)."""
        if not task.live_returns and (task.spec.actor is None or task.state == FAILED):
            self.tasks.pop(task.spec.task_id, None)
            if task.origins is not None:
                self.forget_lineage(task)

    # ------------------------------------------------------------ memory

    def victims(self, size: int) -> list[ObjectEntry]:
        """Least recently used objects whose memory would make room for `size` bytes; [] if that cannot be had."""
        chosen: list[ObjectEntry] = []
        gained = 0
        for entry in self.in_arena.values():
            if not entry.pins and entry.object_id not in self.spilling:  # Its first incarnation may still be.
                chosen.append(entry)
                gained += entry.size
                if gained >= size:
                    break
        if gained + self.arena.capacity - self.arena.used < size:
            return []
        for entry in chosen:
            del self.in_arena[entry.object_id]
            self.spilling[entry.object_id] = entry
        return chosen

    def spilled(self, object_id: bytes, path: str | None, now: float) -> None:
        """A victim was written to `path`; None: was not.  It may have been freed or pinned meanwhile."""
        entry = self.spilling.pop(object_id)
        if self.objects.get(object_id) is not entry:  # freed
            self.arena.free(entry.data)
        elif path is not None and not entry.pins:
            self.arena.free(entry.data)
            entry.data = path
            self.bytes_spilled += entry.size
            self._record(entry, now)
            return
        else:
            self.in_arena[object_id] = entry
        if path is not None:
            self._delete_file(path)

    # ------------------------------------------------------------ rows for the GCS

    def _record(self, entry: ObjectEntry, now: float) -> None:
        """Note a row (see schema.py) for an object that is put, or is not inline; later, where it went."""
        data = entry.data
        location = INLINE if type(data) is bytes else ARENA if type(data) is int else SPILLED
        if entry.no:
            self._note_update(entry, READY, location, None)
            return
        self._objects_made += 1
        entry.no = self._objects_made
        task_no = entry.task.no if entry.task is not None else None
        self.new_objects[entry.no] = (
            entry.no, entry.object_id, task_no, READY, entry.size, location, int(now * 1e6), None,
        )  # fmt: skip

    def _note_update(self, entry: ObjectEntry, state: int, location: int | None, freed_us: int | None) -> None:
        self.object_updates.append((state, location, freed_us, entry.no))

    def take_object_rows(self, now: float) -> tuple[list[tuple[Any, ...]], list[tuple[Any, ...]]]:
        """New rows, and (state, location, freed_us, no) updates of older ones, since the last call."""
        new, updates = list(self.new_objects.values()), self.object_updates
        freed_us = int(now * 1e6)
        updates += [(FREED, None, freed_us, no) for no in self._freed]
        self.new_objects, self.object_updates, self._freed = {}, [], []
        return new, updates

    # ------------------------------------------------------------ for tests

    def check(self, refs: Mapping[bytes, int], pins: Mapping[bytes, int], exact: bool) -> None:
        """Asserts what must hold between events.  `refs`, `pins`: what processes and tasks hold; nested objects are
        counted here.  `exact`: nobody else holds any."""
        short, held = ids.short, Counter(refs)
        replays: Counter[bytes] = Counter()
        for task in self.replayable.values():
            assert task.state == FINISHED and self.tasks[task.spec.task_id] is task and task.origins is not None
            for object_id in task.origins:  # Counter.update() takes its time, also for few.
                replays[object_id] += 1
        for task in self.tasks.values():
            assert task.children is None or task.state < FINISHED
            for object_id in task.children or ():
                replays[object_id] += 1
        for entry in self.objects.values():
            for object_id in entry.nested:
                held[object_id] += 1
        for object_id, entry in self.objects.items():
            count, data = held.pop(object_id, 0), entry.data
            assert object_id == entry.object_id and type(object_id) is bytes
            fits = entry.refs == count or (entry.refs > count and not exact)
            assert fits, f"{short(object_id)}: {entry.refs} refs, not {count}"
            assert entry.refs > 0 or entry.pins > 0 or entry.replays, f"{short(object_id)} should have been freed"
            needed, pinned = replays.pop(object_id, 0), pins.get(object_id, 0)
            assert entry.replays == needed, f"{short(object_id)}: {entry.replays} replays would need it, not {needed}"
            assert entry.pins == pinned, f"{short(object_id)}: {entry.pins} pins, not {pinned}"
            if data is None and entry.away is None:
                will_come = (entry.task is not None and entry.task.state < FINISHED) or object_id in self.promised
                waiters = [w for w in entry.waiters or () if type(w) is Task or w.remaining > 0]  # type: ignore[union-attr]
                assert will_come or (entry.refs <= 0 and not waiters), f"{short(object_id)} never comes"
            where = (self.in_arena.get(object_id) is entry) + (self.spilling.get(object_id) is entry)
            assert where == (type(data) is int), f"{short(object_id)} lies at {data!r}, and in {where} tables"
        assert not replays, "replays would miss what they need"
        gone = [ids.short(object_id) for object_id, count in held.items() if count]
        assert not gone, f"held and not there: {gone}"
        assert all(object_id in self.objects for object_id in pins), "memory is in view and may be used again"
        assert all(self.objects.get(object_id) is entry for object_id, entry in self.in_arena.items())
        self.arena.check()
