"""The node of a durable job: what an earlier run has finished is finished at once, and what finishes is kept.

Pure, like the rest of `Node`.  It is a chapter of its own that ordinary sessions do not load: every event goes
through `Node` as it always does, and here is added what comes before (is the result known?) and after (a row to
keep).  It asks nothing of a disk: what the storage knew at `init` is handed in (`Known`), and what shall be kept
leaves as rows of the table "results".

**When is it the same task?**  Each task has

* a *place*, which tells where in the program it stands: its parent's place (and how many of that one's attempts had
  raised before), its name and arguments, the places of what its arguments refer to, and its number among siblings
  that agree in all that.  So two calls of a random function stay two, and a line inserted elsewhere moves nothing;
* a *version*: the digest of its code, and the *origins* of what its arguments refer to.  The origin of an object is
  its ID in the run that made it.  So code that has changed runs anew, and so does whatever depends on what was made
  anew, for it may be another value.

A result is used again when both agree.  Its place was its alone in that run, and is its task's alone in this
one; so no result stands for two tasks, not even through what other results were computed from.

**What is kept**: results of plain tasks that succeeded, when all that they submitted has ended, too.  Not
kept are results that hold actors' handles, or that depend on what is not kept; and not those of a task that called an
actor which outlives it, of its parent, and so on up to the one that made the actor: skipped, they would leave it
without these calls.  Objects that a kept result refers to are kept with it, and come back under the IDs that it has
for them: no two runs share IDs (docs/decisions/0014).

Large objects of a durable job are born as files in its storage, not in the arena, so keeping them costs nothing more;
the ones that nothing keeps are deleted as spilled ones are.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

from minray import ids
from minray.actor_table import Actor
from minray.lineage import Task
from minray.messages import DRIVER, CheckpointTaken, ObjectPut, TasksFinished, TasksSubmitted, Warn
from minray.node import Node
from minray.scheduler import Client, WorkerRecord
from minray.task_spec import ACTOR_EXITED, CANCELLED, DEAD, FINISHED, OK, TASK, TaskOptions, TaskSpec

ROOT = b"root"
"""The driver's place."""


class KeptObject(NamedTuple):
    """A value in the storage."""

    place: bytes
    data: bytes | str  # pickled, or the path of its file
    size: int
    nested: tuple[tuple[bytes, bytes], ...]  # the objects that it contains: (ID in this value, origin)


class KeptResult(NamedTuple):
    place: bytes
    version: bytes
    task_id: bytes  # in the run that ran it: the origin of what it returned
    values: list[KeptObject]


class Known(NamedTuple):
    """What the storage knows of a job."""

    results: dict[bytes, KeptResult]  # by place
    objects: dict[bytes, KeptObject]  # that others refer to, and checkpoints; by origin
    calls: dict[bytes, KeptResult]  # of actors: by the origin of the call before, or of the actor
    checkpoints: dict[bytes, tuple[bytes, bytes]]  # by the origin of the last call in it: its own, and its actor's


class CallChain:
    """An actor's calls that are kept, in the one order in which they were executed: each is found by the one before."""

    __slots__ = ("last", "dormant", "broken", "origins", "file")

    def __init__(self, origin: bytes, dormant: bool) -> None:
        self.last = origin  # of the last call, at first of the actor itself
        self.dormant = dormant  # no call had to be executed so far: there is no process
        self.broken = False  # a call could not be kept, so none after it is
        self.origins: dict[bytes, bytes] = {}  # of the calls since the last checkpoint, by task ID
        self.file = ""  # of the last checkpoint, if it is large


class Standing:
    """What a task, or an object that was put, is to the job."""

    __slots__ = ("place", "version", "origin", "lasting", "parent", "barred", "ended", "told", "open", "rows")

    def __init__(self, place: bytes, version: bytes, origin: bytes, lasting: bool, parent: bytes) -> None:
        self.place = place
        self.version = version
        self.origin = origin
        self.lasting = lasting  # a later run may find it again
        self.parent = parent  # task ID
        self.barred = False  # its result must not be kept
        self.ended = False
        self.told = False  # its parent knows that it, and all that it submitted, has ended
        self.open = 0  # tasks that it has submitted and that have not ended, or have such themselves
        self.rows: list[tuple[Any, ...]] | None = None  # to be kept when nothing is open


class DurableNode(Node):
    def __init__(self, known: Known, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.reused = 0  # tasks that were not run
        self.ran = 0
        self._known = known
        self._standings: dict[bytes, Standing] = {}  # by the ID of a task, of a put, or of an object that came back
        self._swept = 1000  # how many of them there may be before those of no use are dropped
        self._siblings: dict[bytes, tuple[tuple[int, int], Counter[bytes]]] = {}  # by parent: which execution of it,
        # and how often that has submitted what
        self._chains: dict[bytes, CallChain] = {}  # of actors whose calls are kept
        self._woken: list[bytes] = []  # of the event in hand: actors that must live now
        self._recalled: dict[bytes, KeptResult] = {}  # of the event in hand, by task
        self._stored: set[bytes] = set(known.objects)  # origins of puts that have a row
        self._files = {
            value.data
            for values in (
                *(result.values for result in known.results.values()),
                *(call.values for call in known.calls.values()),
                known.objects.values(),
            )
            for value in values
            if type(value.data) is str
        }
        """Of objects that are kept: not to be deleted when nobody holds them."""

    def describe(self, what: str) -> Any:
        """Also how many tasks were "reused", and how many "ran"."""
        if what == "reused":
            return self.reused
        if what == "ran":
            return self.ran
        return super().describe(what)

    # ------------------------------------------------------------ what is what

    def _standing_of(self, object_id: bytes) -> Standing:
        found = self._standings.get(object_id)
        if found is not None:
            return found
        task = self._standings.get(ids.task_of(object_id))
        if task is None:  # An error, or an object that was freed: nothing that could be found again.
            return Standing(object_id, b"", object_id, False, b"")
        index = object_id[12:]
        return Standing(task.place + index, task.version, task.origin[:12] + index, task.lasting, task.parent)

    def _judge(
        self, spec: TaskSpec, parent_id: bytes, raised: int, siblings: Counter[bytes], options: TaskOptions
    ) -> Standing:
        parent = self._standings.get(parent_id)
        place = parent.place if parent else ROOT
        if raised:  # Other tasks than those of the attempts that raised: both may be there, and stand for themselves.
            place = _hash(b"raised", place, b"%d" % raised)
        deps = spec.deps if spec.args != b"" else spec.deps[:-1]  # The last one is the arguments, as an object.
        made_of = [self._standing_of(object_id) for object_id in (*deps, *spec.nested)]
        if spec.actor_id is not None:
            made_of.append(self._standing_of(spec.actor_id))
        what, code = spec.digest[:16], spec.digest[16:]
        alike = _hash(place, what, *(one.place for one in made_of))
        siblings[alike] += 1
        place = _hash(alike, b"%d" % siblings[alike])
        version = _hash(code, *(one.origin for one in made_of))
        exact = options.checkpoint_every or options.checkpoint_interval_s
        lasting = bool(spec.digest) and (spec.actor is None or bool(exact))
        return Standing(place, version, spec.task_id, lasting and all(one.lasting for one in made_of), parent_id)

    def _siblings_of(self, parent_id: bytes, client: int) -> Counter[bytes]:
        """A parent that runs again counts again; an actor's call, in another worker."""
        parent = self.lineage.tasks.get(parent_id)
        execution = (parent.attempt if parent is not None else 0, client)
        found = self._siblings.get(parent_id)
        if found is None or found[0] != execution:
            found = self._siblings[parent_id] = (execution, Counter())
        return found[1]

    def _raised_before(self, parent_id: bytes, client: int) -> int:
        """How many attempts of the parent had raised before the one that submits now."""
        worker = self.scheduler.workers.get(client)
        # Of an actor's call that is replayed: not as often as the call itself, perhaps.
        executed = worker.in_flight.get(parent_id) if worker is not None else None
        parent = executed or self.lineage.tasks.get(parent_id)
        return parent.raised if parent is not None else 0

    def _sweep(self) -> None:
        if len(self._standings) > self._swept:
            tasks, objects, actors = self.lineage.tasks, self.objects, self.actors.actors
            self._chains = {key: chain for key, chain in self._chains.items() if key in actors}
            logged = {call_id for chain in self._chains.values() for call_id in chain.origins}
            self._standings = {
                key: one
                for key, one in self._standings.items()
                if key in tasks or key in objects or key in logged or one.open or not (one.ended or ids.is_put(key))
            }
            self._siblings = {
                key: one for key, one in self._siblings.items() if key in tasks or key in logged or one[0][1] == DRIVER
            }
            self._swept = 1000 + 2 * len(self._standings)

    def handle_object_put(self, event: ObjectPut, now: float) -> None:
        value = event.value
        if event.digest and self._stall is None:
            made_of = [self._standing_of(object_id) for object_id in value[2]]
            # By content, so that it is the same in every run and whoever puts it.
            origin = _hash(b"put", event.digest, *(one.origin for one in made_of))
            place = _hash(b"put", event.digest, *(one.place for one in made_of))
            lasting = all(one.lasting for one in made_of)
            self._standings[event.object_id] = Standing(place, b"", origin, lasting, b"")
        super().handle_object_put(event, now)

    # ------------------------------------------------------------ what is known is not run

    def handle_tasks_submitted(self, event: TasksSubmitted, now: float) -> None:
        parent_id, tasks = event.parent_task_id, self.lineage.tasks
        siblings = self._siblings_of(parent_id, event.client)
        raised = self._raised_before(parent_id, event.client)
        templates = self._client(event.client).templates
        judged: list[tuple[bytes, Task | None, Standing]] = []
        for spec in event.specs:
            standing = self._judge(spec, parent_id, raised, siblings, templates[spec.template_no].options)
            if event.client != DRIVER and parent_id not in self._standings:
                standing.lasting = False  # Nobody knows any more whose child it is.
            before = tasks.get(spec.task_id)
            judged.append((spec.task_id, before, standing))
            if before is None:
                self._standings[spec.task_id] = standing  # The next in this batch may depend on it.
            if spec.actor_id is not None or (spec.actor is not None and spec.actor[3]):  # detached
                self._bar(parent_id, spec.actor_id)
            if before is None and (event.client == DRIVER or spec.task_id not in self.objects):
                kept = self._find(spec, standing)
                if kept is not None:
                    standing.origin = kept.task_id
                    self._recalled[spec.task_id] = kept
        super().handle_tasks_submitted(event, now)
        for task_id, before, standing in judged:
            task = tasks.get(task_id)
            kept = self._recalled.pop(task_id, None)
            if task is before or task is None:
                if before is None:
                    del self._standings[task_id]
                continue  # It was submitted again, by a parent's second attempt, and is as it was.
            self._enter(task_id, standing)
            if task.state >= FINISHED:
                self._ended(task)  # It was refused.
            elif kept is not None:
                self._finish_known(task, kept, now)
        while self._woken:
            self._wake(self._woken.pop())
        self._sweep()

    def _find(self, spec: TaskSpec, standing: Standing) -> KeptResult | None:
        """The kept result of a task, which no other task will be given."""
        if spec.actor_id is not None:
            return self._find_call(spec, standing)
        kept = self._known.results.get(standing.place) if standing.lasting else None
        if kept is None or kept.version != standing.version:
            return None
        return self._known.results.pop(standing.place)

    def _enter(self, task_id: bytes, standing: Standing) -> None:
        self._standings[task_id] = standing
        parent = self._standings.get(standing.parent)
        if parent is not None:
            parent.open += 1

    def _task_ready(self, task: Task) -> None:
        if task.spec.task_id not in self._recalled:
            super()._task_ready(task)

    def _finish_known(self, task: Task, kept: KeptResult, now: float) -> None:
        task.missing = -1  # What it would have to wait for will not start it.
        self.reused += 1
        for index, value in enumerate(kept.values):
            for object_id, origin in value.nested:
                self._bring_back(object_id, origin, now)
            nested = tuple(object_id for object_id, _ in value.nested)
            task.result_bytes += value.size
            self.lineage.accept_return(task, index, (value.data, value.size, nested), False, now)
            for object_id in nested:
                self.lineage.release(object_id)
            if type(value.data) is str and task.template.options.kind == TASK:
                task.origins = ()  # Should the file be damaged, it is run.
        if task.spec.actor_id is not None:
            self._note_call(task, kept)
        self._close(task, FINISHED)
        if task.spec.actor is not None:
            self._chains[task.spec.task_id] = CallChain(kept.task_id, dormant=True)

    def _bring_back(self, object_id: bytes, origin: bytes, now: float) -> None:
        """An object that a kept value contains, with those that it contains itself; held once for the caller."""
        path = [(object_id, origin, iter(self._known.objects[origin].nested))]
        while path:
            outer_id, outer_origin, rest = path[-1]
            inner = next(rest, None) if outer_id not in self.objects else None
            if inner is not None:
                path.append((*inner, iter(self._known.objects[inner[1]].nested)))
                continue
            path.pop()
            value = self._known.objects[outer_origin]
            nested = tuple(inner_id for inner_id, _ in value.nested)
            if outer_id in self.objects:
                self.lineage.hold(outer_id)
                continue
            self._standings[outer_id] = Standing(value.place, b"", outer_origin, True, b"")
            self._standings[outer_id].ended = True
            self.lineage.put(outer_id, (value.data, value.size, nested), now)
            for inner_id in nested:
                self.lineage.release(inner_id)

    def _why_not_again(self, task: Task | None) -> str:
        if task is not None and not task.attempt and task.origins is not None:
            return ""  # It was not run in this session: its result was known, and cannot be read.
        return super()._why_not_again(task)

    def _lose(self, object_id: bytes, data: Any, reason: str, now: float) -> bool:
        entry = self.objects.get(object_id)
        path = entry.data if entry is not None else None
        kept = type(path) is str and path in self._files
        if type(path) is str:
            self._files.discard(path)
        lost = super()._lose(object_id, data, reason, now)
        if kept and not lost:
            self._files.add(str(path))
        elif kept and entry is not None:
            name = f"{entry.task.template.options.name}()" if entry.task is not None else "put()"
            if entry.task is not None:
                self._standing_of(entry.task.spec.task_id).origin = entry.task.spec.task_id
            self.wire.append(Warn(f"a kept result of {name} cannot be used: {reason}. It is made anew if that can be."))
        return lost

    # ------------------------------------------------------------ actors whose calls are known

    def _find_call(self, spec: TaskSpec, standing: Standing) -> KeptResult | None:
        """An actor's calls are known as long as they come in the order of the earlier run; at the first that is
        not, the actor is made, with the state after those that were."""
        actor_id = spec.actor_id or b""
        actor, chain = self.actors.actors.get(actor_id), self._chains.get(actor_id)
        if actor is None or actor.state == DEAD or actor.recovery is None or chain is None or not chain.dormant:
            return None
        if actor.recovery.has_executed(spec.task_id):
            return None
        kept = self._known.calls.get(chain.last) if standing.lasting else None
        if kept is None or (kept.place, kept.version) != (standing.place, standing.version):
            chain.dormant = False
            self._woken.append(actor_id)
            return None
        del self._known.calls[chain.last]
        chain.last = kept.task_id
        return kept

    def _call_submitted(self, task: Task, client: Client) -> None:
        actor = self.actors.actors.get(task.spec.actor_id or b"")
        if actor is None or task.spec.task_id not in self._recalled:
            super()._call_submitted(task, client)
            return
        task.caller = task.spec.task_id[:8]
        actor.pending += 1

    def _note_call(self, task: Task, kept: KeptResult) -> None:
        """The log of a dormant actor: what is to be executed when it must live, beyond the kept checkpoint."""
        actor = self.actors.actors[task.spec.actor_id or b""]
        recovery, chain = actor.recovery, self._chains[actor.actor_id]
        assert recovery is not None
        self._hold_all(task.spec.deps + task.spec.nested)
        recovery.log.append(task)
        recovery.note_executed(task.spec.task_id)
        chain.origins[task.spec.task_id] = kept.task_id
        origin, actor_origin = self._known.checkpoints.get(kept.task_id, (b"", b""))
        if actor_origin and actor_origin == self._standing_of(actor.actor_id).origin:
            recovery.num_checkpoints = 1
            recovery.checkpoint = ids.checkpoint_id(actor.actor_id, recovery.num_checkpoints)
            self._bring_back(recovery.checkpoint, origin, self._now)
            data = self.objects[recovery.checkpoint].data
            chain.file = data if type(data) is str else ""
            covered, recovery.log = recovery.log, []
            chain.origins.clear()
            for call in covered:
                self._release_all(call.spec.deps + call.spec.nested)

    def _wake(self, actor_id: bytes) -> None:
        """Its process starts from the kept checkpoint, or its constructor, and executes the log."""
        actor = self.actors.actors.get(actor_id)
        if actor is not None and actor.state != DEAD:
            actor.task.missing = 0
            self._run_again(actor.task)

    def _handle_dropped(self, actor_id: bytes) -> None:
        super()._handle_dropped(actor_id)
        actor, chain = self.actors.actors.get(actor_id), self._chains.get(actor_id)
        if actor is not None and chain is not None and chain.dormant and not actor.pending:
            self._bury(actor, "its last handle has gone", self._now)

    def _note_order(self, worker: WorkerRecord, task: Task, status: int) -> tuple[bytes, bytes] | None:
        """An actor's call was executed: (its actor's origin, that of the call before it), if it may be kept."""
        actor = worker.actor
        chain = self._chains.get(task.spec.actor_id or b"")
        if actor is None or actor.recovery is None or chain is None or status in (CANCELLED, ACTOR_EXITED):
            return None
        call_id = task.spec.task_id
        chain.origins[call_id] = call_id
        after, chain.last = chain.last, call_id
        chain.broken = chain.broken or status != OK or not self._standings[call_id].lasting
        return None if chain.broken else (self._standing_of(actor.actor_id).origin, after)

    def handle_checkpoint_taken(self, event: CheckpointTaken, now: float) -> None:
        actor = self.scheduler.workers[event.client].actor
        chain = self._chains.get(actor.actor_id) if actor is not None else None
        if actor is not None and actor.recovery is not None and chain is not None and actor.recovery.applied:
            last = actor.recovery.log[actor.recovery.applied - 1].spec.task_id
            if not chain.broken and self._can_keep([event.value]):
                self._keep_checkpoint(actor, chain, chain.origins[last], event.value)
            for call in actor.recovery.log[: actor.recovery.applied]:
                chain.origins.pop(call.spec.task_id, None)
        super().handle_checkpoint_taken(event, now)

    def _keep_checkpoint(self, actor: Actor, chain: CallChain, after: bytes, value: Any) -> None:
        """One row an actor: a new checkpoint takes the place of the one before."""
        origin = self._standing_of(actor.actor_id).origin
        about = (f"checkpoint of {actor.options.class_name}", 1, None, None)
        rows: list[tuple[Any, ...]] = []
        self._keep_nested(value[2], rows)
        rows.append(self._kept_row(_hash(b"checkpoint", origin), b"", None, value, about, (origin, after)))
        self._files.discard(chain.file)
        chain.file = value[0] if type(value[0]) is str else ""
        self._emit(rows)

    # ------------------------------------------------------------ what finishes is kept

    def handle_tasks_finished(self, event: TasksFinished, now: float) -> None:
        worker = self.scheduler.workers[event.client]
        replaying = worker.actor.recovery.replaying if worker.actor and worker.actor.recovery else {}
        tasks = []
        for task_id, status, payload, started_s, finished_s in event.results:
            task = worker.in_flight.get(task_id)
            if task is not None and task_id not in replaying:
                tasks.append(task)
                order = self._note_order(worker, task, status) if task.spec.actor_id is not None else None
                if status == OK and task.error is None and (order or task.spec.actor_id is None):
                    self._prepare(task, payload, started_s, finished_s, order)
        super().handle_tasks_finished(event, now)
        for task in tasks:
            if task.state >= FINISHED:  # The hot path in node_tasks.py does not call `_close`.
                self._ended(task)

    def _constructed(self, actor: Actor) -> None:
        standing = self._standing_of(actor.actor_id)
        if standing.lasting and actor.recovery is not None and actor.actor_id not in self._chains:
            self._chains[actor.actor_id] = CallChain(standing.origin, dormant=False)
        super()._constructed(actor)

    def _close(self, task: Task, state: int) -> None:
        super()._close(task, state)
        self._ended(task)

    def _prepare(
        self, task: Task, payload: Any, started_s: float, finished_s: float, order: tuple[bytes, bytes] | None
    ) -> None:
        """Before anything is let go: what is to be kept of a result, if it is kept."""
        standing = self._standings[task.spec.task_id]
        if standing.origin != task.spec.task_id:
            return  # An actor that was known, and must live now.
        standing.ended, standing.rows = False, None
        values = [(payload, len(payload), ())] if type(payload) is bytes else payload
        if not standing.lasting or standing.barred or not self._can_keep(values):
            return
        options = task.template.options
        rows: list[tuple[Any, ...]] = []
        about = (options.name, options.num_returns, int(started_s * 1e6), int(finished_s * 1e6))
        for index, value in enumerate(values or [(b"", 0, ())]):  # num_returns=0 leaves a row, too.
            return_id = ids.return_id(task.spec.task_id, index)
            rows.append(self._kept_row(return_id, standing.place, standing.version, value, about, order))
            self._keep_nested(value[2], rows)
        standing.rows = rows

    def _can_keep(self, values: Iterable[Any]) -> bool:
        return all(type(value[0]) is not int for value in values) and all(
            self._standing_of(object_id).lasting for value in values for object_id in value[2]
        )

    def _kept_row(
        self,
        object_id: bytes,
        place: bytes,
        version: bytes | None,
        value: Any,
        about: tuple[Any, ...],
        order: tuple[bytes, bytes] | None = None,
    ) -> tuple[Any, ...]:
        data, size, nested = value
        file = None
        if type(data) is str:
            self._files.add(data)
            data, file = None, data
        pairs = b"".join(inner + self._standing_of(inner).origin for inner in nested)
        return (object_id, place, version, data, file, size, pairs, *about, *(order or (None, None)))

    def _keep_nested(self, nested: Iterable[bytes], rows: list[tuple[Any, ...]]) -> None:
        """Objects that were put have no result to be kept with: they are kept with the first that contains them."""
        pending = list(nested)
        while pending:
            object_id = pending.pop()
            entry, standing = self.objects.get(object_id), self._standing_of(object_id)
            if entry is None or not ids.is_put(object_id) or standing.origin in self._stored:
                continue
            if entry.data is None or entry.is_error:
                continue
            value = (entry.data, entry.size, entry.nested)
            rows.append(self._kept_row(standing.origin, standing.place, None, value, ("put()", 1, None, None)))
            pending += entry.nested

    def _bar(self, task_id: bytes, actor_id: bytes | None) -> None:
        """A task called an actor, or made a detached one: those that the actor outlives must run again in each run."""
        actor = self._standings.get(actor_id) if actor_id is not None else None
        maker = actor.parent if actor is not None else b""
        while task_id != maker:
            standing = self._standings.get(task_id)
            if standing is None:
                return
            standing.barred = True
            task_id = standing.parent

    def _ended(self, task: Task) -> None:
        """Keep it when nothing that it has submitted is still under way, and see whether its parent waited for that."""
        standing = self._standings.get(task.spec.task_id)
        if standing is None or standing.ended:
            return
        if task.attempt and task.spec.actor is None:
            self.ran += 1
        standing.ended = True
        while standing is not None and standing.ended and not standing.open:
            if standing.rows and not standing.barred:
                self._emit(standing.rows)
            standing.rows = None
            if standing.told:
                break  # It was run again, to rebuild what was lost.
            standing.told = True
            standing = self._standings.get(standing.parent)
            if standing is not None:
                standing.open -= 1

    def _emit(self, rows: list[tuple[Any, ...]]) -> None:
        for row in rows:
            if row[2] is None and row[11] is None:  # It was put: once is enough.
                if row[0] in self._stored:
                    continue
                self._stored.add(row[0])
            self._row("results", row)

    # ------------------------------------------------------------ files

    def _give_room(self, client: int, request_id: int, object_id: bytes, size: int, may_spill: bool) -> None:
        grant = ("file", self._new_file(object_id))
        self._grants[(client, object_id)] = grant
        self._answer(client, request_id, grant)

    def _delete_file(self, path: str) -> None:
        if path not in self._files:
            super()._delete_file(path)


def _hash(*parts: bytes) -> bytes:
    """Of parts whose number and lengths follow from the first ones."""
    return hashlib.blake2b(b"\0".join((b"%d" % len(part)) + b":" + part for part in parts), digest_size=16).digest()
