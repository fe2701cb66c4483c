"""Objects that several nodes know: who counts whose references, where values lie, and how they get to a reader.

**One home, and one reference a link.**  An object is counted where its task was submitted, or where it was put.  A
node that learns of it from another one (in the arguments of a task, in a result, in a value) makes an entry of its
own, with its own counts, and holds *one* reference at the node it was told by, its *keeper*, as a process does at its
node: taken when the entry is made, given back when it is freed.  So counts form a tree along the links, and no node
counts for nodes that it does not know.  It is free of races because a link keeps the order: what names an object is
followed by whatever ends the protection of that name only after the receiver's own reference has been taken: a task's
arguments are held until its result has come, and a result that names objects is held until its receiver lets it go.

**Values.**  Small ones travel in messages.  A large one stays where it was made, and its keeper's chain knows the
`places` that have a copy; a reader's node is told them and fetches the value from one.  A copy can be dropped without
being written to disk.  A value is *available* if it is here or anywhere; only readers need it here.

**Losses.**  A place that fails is struck off, and the keeper asked again.  If the keeper's node dies, *whoever told
us of the object makes it again*: its entry counts as one more result of the task whose result named it
(`entry.task`), and that task is replayed like any other (node_recovery.py).  Its children have the same IDs, wherever
it runs now, so the same names come back with a new keeper.  A name that does not come back is an error that says so.
For that a replay has to run to its end, also where its own result is known; what it puts again has its home where it
runs; and a child that only the head knows is given to the head, which knows whether anybody has it.

Left out: reporting copies of copies (only the keeper is told), so a value that many nodes read is mostly fetched from
the nodes that its keeper knows; and moving an object's home.
"""

from __future__ import annotations

from typing import Any

from minray import ids
from minray.cluster_messages import (
    CopiesChanged, FetchFailed, HandlesNamed, ObjectArrived, ObjectsReported, Places, Report,
)  # fmt: skip
from minray.exceptions import error_payload
from minray.lineage import GONE, ObjectEntry, Request, Task
from minray.messages import Event, FetchObject, ObjectLost, ObjectPut, ObjectsAwaited, ReferencesChanged, TellNode
from minray.node import Node
from minray.object_store import partial_path
from minray.scheduler import WorkerRecord
from minray.task_spec import FINISHED, PENDING_ARGS_AVAIL, PENDING_NODE_ASSIGNMENT

OF_RESULT, OF_OBJECT = 1, 2
"""What a neighbour waits for: `Request.request_id`."""
OF_CHECKPOINT = -3
"""And what this node itself waits for, as if it were its driver."""


class Away:
    """What other nodes have to do with an object."""

    __slots__ = ("keeper", "asked", "places", "fetch_no", "is_handle")

    def __init__(self, keeper: int, places: list[int]) -> None:
        self.keeper = keeper  # the neighbour that counts one reference of ours; 0: none does
        self.asked = False  # it will report the object when it is ready
        self.places = places  # other nodes that have a copy, as far as we know
        self.fetch_no = 0  # of the copy that is on its way here; 0: none is
        self.is_handle = False  # the keeper says that it stands for an actor


class Neighbour(WorkerRecord):
    """Another node.  `in_flight`: the tasks that it was given; `held`: objects of ours that it knows."""

    def __init__(self, client: int, label: str, total: dict[str, int]) -> None:
        super().__init__(client)
        self.label = label
        self.total = total
        self.outbox: list[Event | Any] = []
        self.awaits: dict[tuple[int, bytes], Request] = {}  # what it will be told, by kind and object
        self.owed = 0  # how many of its tasks we have not finished
        self.heard_s = 0.0
        self.own_tasks = 0  # that it has besides those that we gave it, when it last said so
        self.actors = 0  # that we have placed there
        self.reserved: dict[str, int] = {}  # what they hold of its resources


class SharedObjects(Node):
    node_no: int
    neighbours: dict[int, Neighbour]
    _outgoing: dict[int, Neighbour]  # with messages to send
    _available: list[ObjectEntry]  # that tasks and neighbours may be waiting for
    _reports: list[tuple[Request, Task | None, Any]]  # to be sent: what of, by which task, or the result itself
    _named: list[ObjectEntry]  # by a message in hand: those that nobody holds in the end are freed again
    _unnamed: list[bytes]  # by values that were lost with the event in hand
    _fetches: dict[int, tuple[ObjectEntry, int, tuple[Any, ...]]]  # by number: what, from where, into which room
    _fetches_made: int
    _runs_first: dict[bytes, Request]  # by a task that was given, and whose result is known here: its giver's request
    _staying: dict[bytes, Task]  # tasks that will run here, once what they need has been fetched

    # ------------------------------------------------------------ what is said

    @property
    def me(self) -> int:
        """As which client the neighbours know this node."""
        return -self.node_no

    def _tell(self, client: int, event: Any) -> None:
        neighbour = self.neighbours[client]
        neighbour.outbox.append(event)
        self._outgoing[client] = neighbour

    def _take_reference(self, client: int, object_id: bytes) -> None:
        outbox = self.neighbours[client].outbox
        last = outbox[-1] if outbox else None
        if type(last) is ReferencesChanged and not last.released:
            last.acquired.append(object_id)
        else:
            self._tell(client, ReferencesChanged(self.me, [object_id], []))

    def _give_reference_back(self, client: int, object_id: bytes) -> None:
        outbox = self.neighbours[client].outbox
        last = outbox[-1] if outbox else None
        if type(last) is ReferencesChanged:
            last.released.append(object_id)
        else:
            self._tell(client, ReferencesChanged(self.me, [], [object_id]))

    def _post(self) -> None:
        for client, neighbour in self._outgoing.items():
            self.wire.append(TellNode(client, neighbour.outbox))
            neighbour.outbox = []
        self._outgoing.clear()

    # ------------------------------------------------------------ entries

    def is_available(self, entry: ObjectEntry) -> bool:
        return entry.data is not None or (entry.away is not None and bool(entry.away.places))

    def _is_foreign(self, entry: ObjectEntry) -> bool:
        """Its own task is not here."""
        object_id, task = entry.object_id, entry.task
        return task is None or ids.is_put(object_id) or task.spec.task_id != ids.task_of(object_id)

    def _is_orphan(self, entry: ObjectEntry) -> bool:
        """Its keeper has died, and its value with it."""
        if entry.away is None or entry.away.keeper:
            return False
        return not self.is_available(entry) and self._is_foreign(entry)

    def _know(self, object_id: bytes, client: int, told_by: Task | None = None) -> None:
        """A neighbour has named the object: if it is new here, the neighbour keeps it for us.

        `told_by`: in the result of which task."""
        entry = self.objects.get(object_id)
        if entry is None:
            task = None if ids.is_put(object_id) else self.lineage.tasks.get(ids.task_of(object_id))
            if task is not None:  # Its own task is here: `Lineage.hold` makes the entry.
                if task.spec.actor is not None and type(task.worker) is Neighbour:
                    # An actor that we gave to its home; our handles had gone before it was there.
                    entry = self.objects[object_id] = ObjectEntry(object_id, task, 0)
                    task.live_returns += 1
                    self._handle_will_come(entry, task.worker.client)
                    self._named.append(entry)
                return
            entry = self.objects[object_id] = ObjectEntry(object_id, told_by, 0)
            if told_by is not None:
                told_by.live_returns += 1
            self._named.append(entry)
        elif self._waits_for_orphans(entry):
            self._yield_to(entry, told_by)
        elif not self._is_orphan(entry) or object_id in self.neighbours[client].held:
            return  # (Two nodes that keep it for each other would wait for each other for ever.)
        elif entry.task is None and told_by is not None:
            entry.task = told_by
            told_by.live_returns += 1
        entry.away = Away(client, [])
        self._take_reference(client, object_id)
        if entry.waiters or entry.refs > 0:
            self._ask(entry)

    def _handle_will_come(self, entry: ObjectEntry, home: int) -> None:
        """The actor's home holds it for us already, and says when it is there, with the result of its creation."""
        entry.away = Away(home, [])
        entry.away.asked = True

    def _waits_for_orphans(self, entry: ObjectEntry) -> bool:
        """Its task was given to us by a node that died with what the task needs; another node has made the object."""
        task = entry.task
        if entry.data is not None or task is None or task.state != PENDING_ARGS_AVAIL or self._is_foreign(entry):
            return False
        return task.spec.actor_id is None and any(self._is_orphan(self.objects[dep]) for dep in task.spec.deps)

    def _yield_to(self, entry: ObjectEntry, told_by: Task | None) -> None:
        task = entry.task
        assert task is not None
        entry.task = told_by
        if told_by is not None:
            told_by.live_returns += 1
        task.live_returns -= 1
        if not task.live_returns:
            task.missing = -1
            self._close(task, FINISHED)

    def _let_go_away(self, entry: ObjectEntry) -> None:
        """Nobody here needs its value any more; or it is lost."""
        away = entry.away
        assert away is not None
        away.fetch_no = 0
        is_coming = entry.task is not None and entry.task.spec.actor is not None and entry.task.state < FINISHED
        if entry.replays and (is_coming or self._is_foreign(entry)):  # A replay may ask for it.
            away.places, away.asked = [], is_coming
            return
        entry.away = None
        if away.keeper and not is_coming:  # What is owed must not be freed: an actor's home gets its handle back later.
            self._give_reference_back(away.keeper, entry.object_id)

    def handle_object_put(self, event: ObjectPut, now: float) -> None:
        """A second attempt puts again here what was put elsewhere: its home is here from now on."""
        super().handle_object_put(event, now)
        entry = self.objects[event.object_id]
        if entry.away is not None and entry.away.keeper:
            self._give_reference_back(entry.away.keeper, entry.object_id)
            entry.away = None

    # ------------------------------------------------------------ waiting

    def _awaited_away(self, entry: ObjectEntry) -> None:
        """Somebody begins to wait for an object that is not here."""
        if not self.is_available(entry):
            self._ask(entry)
        else:
            self._available.append(entry)

    def _ask(self, entry: ObjectEntry) -> None:
        away = entry.away
        if away is not None and away.keeper and not away.asked:
            away.asked = True
            self._tell(away.keeper, ObjectsAwaited(self.me, 0, [entry.object_id], 1, True, False))

    def _needs_it_here(self, waiter: Task | Request) -> bool:
        """Or is it enough that the object is available?"""
        raise NotImplementedError

    def _wake(self, entry: ObjectEntry) -> None:
        """The object is available elsewhere: what need not read it here goes on, for the rest it is fetched."""
        if entry.data is not None or not self.is_available(entry):
            return
        waiters, entry.waiters = entry.waiters or [], None
        staying: list[Task | Request] = []
        for waiter in waiters:
            if self._needs_it_here(waiter):
                staying.append(waiter)
            elif isinstance(waiter, Task):
                waiter.missing -= 1
                if not waiter.missing:
                    self._arguments_ready(waiter)
            elif waiter.remaining > 0:
                waiter.remaining -= 1
                if not waiter.remaining:
                    self._request_ready(waiter)
        if staying:
            entry.waiters = staying + (entry.waiters or [])
        if entry.away is not None and entry.away.places and any(map(self._needs_it_here, entry.waiters or ())):
            self._fetch_copy(entry)

    def handle_objects_awaited(self, event: ObjectsAwaited, now: float) -> None:
        if event.client >= 0:
            super().handle_objects_awaited(event, now)
            return
        neighbour = self.neighbours[event.client]
        for object_id in event.object_ids:
            if object_id not in self.objects:  # Freed: becomes an entry that says so.
                self._acquire(neighbour, object_id)
            self._owe(neighbour, OF_OBJECT, [object_id], None)

    def _owe(
        self, neighbour: Neighbour, kind: int, object_ids: list[bytes], task: Task | None, runs_first: bool = False
    ) -> None:
        """It will be told when they are ready anywhere.

        `runs_first`: not before the task has run, also if they are: it does so to bring back what they name."""
        pending = [e for e in map(self.objects.__getitem__, object_ids) if not self.is_available(e)]
        request = Request(neighbour.client, kind, object_ids, len(pending) + runs_first, False, False)
        for entry in pending:
            self.lineage.wait_for(entry, request)
        if task is not None and runs_first:
            self._runs_first[task.spec.task_id] = request
        if request.remaining:
            neighbour.awaits[kind, object_ids[0]] = request
        else:
            self._reports.append((request, task, None))

    def _request_ready(self, request: Request) -> None:
        if request.client >= 0:
            super()._request_ready(request)
            return
        neighbour = self.neighbours[request.client]
        neighbour.awaits.pop((request.request_id, request.object_ids[0]), None)
        self._reports.append((request, self.lineage.tasks.get(ids.task_of(request.object_ids[0])), None))

    def _describe_value(self, entry: ObjectEntry) -> tuple[Any, int, tuple[bytes, ...]]:
        if type(entry.data) is bytes:
            return (entry.data, entry.size, entry.nested)
        places: Places = (self.node_no,) if entry.data is not None else ()
        if entry.away is not None:
            places += tuple(place for place in entry.away.places if place != self.node_no)
        return (places, entry.size, entry.nested)

    def _report(self, entry: ObjectEntry) -> Report:
        data, size, nested = self._describe_value(entry)
        return (entry.object_id, data, size, entry.is_error, nested)

    def _send_report(self, neighbour: Neighbour, object_id: bytes) -> None:
        entry = self.objects.get(object_id)
        if entry is None:
            return  # The neighbour has let it go meanwhile.
        if not self.is_available(entry):  # Lost between its coming and now.
            self._owe(neighbour, OF_OBJECT, [object_id], None)
            return
        last = neighbour.outbox[-1] if neighbour.outbox else None
        if type(last) is ObjectsReported:
            last.reports.append(self._report(entry))
        else:
            self._tell(neighbour.client, ObjectsReported(self.me, [self._report(entry)]))

    def handle_objects_reported(self, event: ObjectsReported, now: float) -> None:
        for report in event.reports:
            self._take_report(event.client, report)

    def _take_report(self, client: int, report: Report) -> None:
        object_id, data, size, is_error, nested = report
        entry = self.objects.get(object_id)
        away = entry.away if entry is not None else None
        if entry is None or away is None or away.keeper != client:
            return  # It has been freed here meanwhile, or has come another way.
        away.asked = False
        if entry.data is not None:
            return
        for inner in nested:
            self._know(inner, client, entry.task)
        if type(data) is bytes:
            self.lineage.seal(entry, (data, size, nested), is_error, self._now)
        else:
            away.places = [place for place in data if place != self.node_no]
            self._now_lies_elsewhere(entry, size, nested)
            if not away.places and entry.waiters:
                self._ask(entry)

    def _now_lies_elsewhere(self, entry: ObjectEntry, size: int, nested: tuple[bytes, ...]) -> None:
        before = entry.nested
        entry.size, entry.nested, entry.is_error = size, nested, False
        for inner in nested:
            self.lineage.hold(inner)
        for inner in before:
            self.lineage.release(inner)
        self._available.append(entry)

    def _is_nowhere(self, entry: ObjectEntry) -> None:
        """Its value was elsewhere, and is lost: so are the names in it.  Who had counted it as ready waits again."""
        self._unnamed += entry.nested  # Released later: a replay may need what only this value still named.
        entry.nested = ()
        self._let_wait_again(entry)

    # ------------------------------------------------------------ copies

    def _fetch_copy(self, entry: ObjectEntry) -> None:
        away = entry.away
        assert away is not None
        if away.fetch_no:
            return
        source = away.places[-1]  # The newest copy: so a value that many read spreads.
        room = self._room_for_copy(entry)
        self._fetches_made += 1
        away.fetch_no = self._fetches_made
        self._fetches[away.fetch_no] = (entry, source, room)
        self._grants[-away.fetch_no, entry.object_id] = room
        self.wire.append(FetchObject(-source, away.fetch_no, entry.object_id, entry.size, room))

    def _room_for_copy(self, entry: ObjectEntry) -> tuple[Any, ...]:
        self._make_room(entry.size)
        block = self.lineage.arena.allocate(entry.size)
        return ("block", block.offset, block.fresh) if block is not None else ("file", self._new_file(entry.object_id))

    def _make_room(self, size: int) -> None:
        """Drop the least recently used values that others have, too: they need not be written to disk.

        Only what a keeper keeps for us: at the root of its references a value stays, be it in a file.  (Two nodes that
        each trusted in the other's copy would lose it.)  And not those that somebody here waits to read: they would be
        fetched again at once.  Nor an actor's checkpoint: it counts because a copy of it is here."""
        arena = self.lineage.arena
        wanted: dict[bytes, None] = {}
        for entry in list(self.lineage.in_arena.values()):
            if arena.largest_hole >= size:
                return
            away = entry.away
            if away is None or not away.keeper or not away.places:
                continue
            if entry.pins or entry.object_id in self.lineage.spilling:
                continue
            wanted = wanted or self._wanted_here()
            if entry.object_id not in wanted:
                self._drop_copy(entry)

    def _wanted_here(self) -> dict[bytes, None]:
        wanted: dict[bytes, None] = {}
        for task in self.lineage.tasks.values():
            if task.state <= PENDING_NODE_ASSIGNMENT:
                wanted.update(dict.fromkeys(task.spec.deps))
        for client in (self.driver, *self.scheduler.workers.values()):
            for request in client.requests.values():
                wanted.update(dict.fromkeys(request.object_ids))
        for actor in self.actors.actors.values():
            if actor.recovery is not None and actor.recovery.checkpoint is not None:
                wanted[actor.recovery.checkpoint] = None
        return wanted

    def _drop_copy(self, entry: ObjectEntry) -> None:
        """Its value is not here any more; others have it, or it will come again."""
        away = entry.away
        assert away is not None
        data, entry.data = entry.data, None
        if type(data) is int:
            del self.lineage.in_arena[entry.object_id]
            self.lineage.arena.free(data)
        elif type(data) is str:
            self._delete_file(data)
        if away.keeper:
            self._tell(away.keeper, CopiesChanged(self.me, [], [entry.object_id]))

    def _give_room(self, client: int, request_id: int, object_id: bytes, size: int, may_spill: bool) -> None:
        if self.neighbours and self.lineage.arena.largest_hole < size:
            self._make_room(size)
        super()._give_room(client, request_id, object_id, size, may_spill)

    def _release_room(self, room: tuple[Any, ...]) -> None:
        if room[0] == "block":
            self.lineage.arena.free(room[1], backed=not room[2])
        else:
            self._delete_file(room[1])
            self._delete_file(partial_path(room[1]))

    def handle_object_arrived(self, event: ObjectArrived, now: float) -> None:
        entry, source, room = self._fetches.pop(event.fetch_no)
        del self._grants[-event.fetch_no, entry.object_id]
        away = entry.away
        if away is None or away.fetch_no != event.fetch_no:
            self._release_room(room)  # It was freed meanwhile.
            return
        away.fetch_no = 0
        if entry.data is not None:
            self._release_room(room)  # It was made here meanwhile.
            return
        self.lineage.seal(entry, (room[1], entry.size, entry.nested), False, now)
        if away.keeper:
            self._tell(away.keeper, CopiesChanged(self.me, [entry.object_id], []))

    def handle_fetch_failed(self, event: FetchFailed, now: float) -> None:
        entry, source, room = self._fetches.pop(event.fetch_no)
        del self._grants[-event.fetch_no, entry.object_id]
        self._release_room(room)
        away = entry.away
        if away is None or away.fetch_no != event.fetch_no:
            return
        away.fetch_no = 0
        self._strike_off(entry, source, event.reason)

    def _strike_off(self, entry: ObjectEntry, place: int, reason: str) -> None:
        """That node has no copy, or is not there any more."""
        away = entry.away
        assert away is not None
        if place in away.places:
            away.places.remove(place)
        if self.is_available(entry):
            if entry.data is None:
                self._available.append(entry)
        elif away.keeper:
            if -place != away.keeper:
                self._tell(away.keeper, ObjectLost(self.me, entry.object_id, place, reason))
            self._is_nowhere(entry)
            if entry.waiters:
                self._ask(entry)
        else:
            self._is_nowhere(entry)
            if entry.refs > 0:
                self._want_again(entry)

    def handle_references_changed(self, event: ReferencesChanged, now: float) -> None:
        super().handle_references_changed(event, now)
        if event.client < 0:
            known = filter(None, map(self.objects.get, event.acquired))
            handles = [entry.object_id for entry in known if entry.is_handle]
            if handles:
                self._tell(event.client, HandlesNamed(self.me, handles))
            awaits = self.neighbours[event.client].awaits
            for object_id in event.released:
                self._no_copy_at(object_id, -event.client)
                if (OF_OBJECT, object_id) in awaits:  # It does not wait any more.
                    awaits.pop((OF_OBJECT, object_id)).remaining = 0

    def handle_handles_named(self, event: HandlesNamed, now: float) -> None:
        for actor_id in event.actor_ids:
            entry = self.objects.get(actor_id)
            if entry is None or entry.away is None or entry.away.keeper != event.client:
                continue
            entry.away.is_handle = True
            if entry.replays:
                self.lineage.is_no_origin(entry)
                self._named.append(entry)
            for neighbour in self.neighbours.values():
                if actor_id in neighbour.held:
                    self._tell(neighbour.client, HandlesNamed(self.me, [actor_id]))

    def handle_copies_changed(self, event: CopiesChanged, now: float) -> None:
        place = -event.client
        for object_id in event.made:
            entry = self.objects.get(object_id)
            if entry is not None and type(entry.data) is not bytes:
                if entry.away is None:
                    entry.away = Away(0, [])
                if place not in entry.away.places:
                    entry.away.places.append(place)
        for object_id in event.dropped:
            self._no_copy_at(object_id, place)

    def _no_copy_at(self, object_id: bytes, place: int) -> None:
        entry = self.objects.get(object_id)
        if entry is not None and entry.away is not None and place in entry.away.places:
            if entry.away.keeper != -place:
                self._strike_off(entry, place, "was dropped")

    # ------------------------------------------------------------ losses

    def handle_object_lost(self, event: ObjectLost, now: float) -> None:
        if event.client >= 0:
            super().handle_object_lost(event, now)
            return
        entry = self.objects.get(event.object_id)
        if entry is not None and entry.away is not None and event.data in entry.away.places:
            self._strike_off(entry, event.data, event.reason)

    def _lose(self, object_id: bytes, data: Any, reason: str, now: float) -> bool:
        entry = self.objects.get(object_id)
        away = entry.away if entry is not None else None
        if entry is None or away is None or not (away.keeper or away.places):
            return super()._lose(object_id, data, reason, now)
        in_view = type(entry.data) is int and (entry.pins or object_id in self.lineage.spilling)
        if entry.data is None or in_view or entry.is_error or (data is not None and data != entry.data):
            return False
        self._event("object_lost", object_id, reason, now)
        self._drop_copy(entry)
        if away.places:
            self._let_wait_again(entry)
        else:
            self._is_nowhere(entry)
        return True

    def _let_wait_again(self, entry: ObjectEntry) -> None:
        super()._let_wait_again(entry)
        for neighbour in self.neighbours.values():
            for request in neighbour.awaits.values():
                if entry.object_id in request.object_ids and request not in (entry.waiters or ()):
                    request.remaining += 1
                    self.lineage.wait_for(entry, request)

    def _rebuild(self, entry: ObjectEntry) -> None:
        task = entry.task
        if task is not None and task.spec.actor is not None and type(task.worker) is Neighbour and entry.away is None:
            self._handle_will_come(entry, task.worker.client)  # A second attempt of its maker has asked for it.
        away = entry.away
        if away is not None and (away.keeper or away.places):
            if entry.waiters and not away.places:
                self._ask(entry)
            return
        if self._is_orphan(entry) and entry.task is None:
            short = ids.short(entry.object_id)
            message = (
                f"object {short} was lost with the node that it was on, and cannot be rebuilt: no task is known here "
                f"whose replay would make it.\nIts history: minray story {ids.short(ids.task_of(entry.object_id))}"
            )
            error = error_payload("ObjectLostError", message)
            self._event("object_not_rebuilt", entry.object_id, "no task is known whose replay would make it", self._now)
            self.lineage.seal(entry, (error, len(error), ()), GONE, self._now)
            return
        super()._rebuild(entry)
