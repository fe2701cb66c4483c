"""Objects, at the node: who holds them, who waits for them, and where in memory they may lie.

`lineage` keeps the tables; here are the processes: what each holds, has views of, waits for,
and has been given room for.  When a process ends, all of it comes back from here.
"""

from __future__ import annotations

from typing import Any

from minray import ids
from minray.exceptions import error_payload
from minray.lineage import ObjectEntry, Request
from minray.messages import (
    DRIVER, BlockRefused, BlockRequested, BlocksSpilled, DeleteFile, Fetched, ObjectPut, ObjectsAwaited,
    ReferencesChanged, RequestAbandoned, RoomAbandoned, Unpinned,
)  # fmt: skip
from minray.node_tables import NodeTables
from minray.object_store import partial_path
from minray.scheduler import Client, WorkerRecord


class NodeObjects(NodeTables):
    def handle_object_put(self, event: ObjectPut, now: float) -> None:
        client = self._client(event.client)
        self._grants.pop((event.client, event.object_id), None)
        value, refused = event.value, self._stall is not None and event.object_id not in self.objects
        if refused:
            self.lineage.drop_value(value)
            error = self._stall_error(f"object {ids.short(event.object_id)} was not stored")
            value = (error, len(error), ())
        entry = self.lineage.put(event.object_id, value, now)
        if entry is None:
            self._acquire(client, event.object_id)
        else:
            entry.is_error = refused
            if event.client != DRIVER:
                client.held[event.object_id] = None

    def _stall_error(self, what: str) -> bytes:
        """What came in while the GCS could not write becomes this error."""
        assert self._stall is not None
        self._refused += 1
        return error_payload(
            self._stall.error,
            f"{what}, since it could not be recorded: {self._stall.why} What runs goes on. As soon as the GCS can "
            "write, all that waits is written and new work is taken in, without a restart: submit this again then.",
        )

    def _acquire(self, client: Client, object_id: bytes) -> None:
        """The process holds the object: counted once a process."""
        if client.client == DRIVER:
            self.lineage.hold(object_id)
        elif object_id not in client.held:
            client.held[object_id] = None
            self.lineage.hold(object_id)

    def handle_references_changed(self, event: ReferencesChanged, now: float) -> None:
        client = self._client(event.client)
        for object_id in event.acquired:
            self._acquire(client, object_id)
        release = self.lineage.release
        if event.client == DRIVER:
            for object_id in event.released:
                release(object_id)
        else:
            for object_id in event.released:
                if client.held.pop(object_id, self) is None:
                    release(object_id)

    def _fetch(self, client: Client, object_id: bytes) -> Fetched | None:
        """The value of a ready object for a reader; what lies in the arena is pinned for it."""
        entry = self.objects.get(object_id)
        if entry is None or entry.data is None:
            return None
        if type(entry.data) is not bytes:
            self._pin(client, entry)
        return (entry.data, entry.size, entry.is_error, object_id)

    def fetch_for_driver(self, object_id: bytes) -> Fetched | None:
        """The driver reads the table itself; only memory in the arena has to be pinned, which is done here."""
        return self._fetch(self.driver, object_id)

    def _pin(self, client: Client, entry: ObjectEntry) -> None:
        """It stays as it is until the process has said Unpinned."""
        self.lineage.pin(entry)
        client.pins[entry.object_id] = client.pins.get(entry.object_id, 0) + 1

    def _unpin(self, client: Client, object_id: bytes) -> None:
        count = client.pins[object_id] - 1
        if count:
            client.pins[object_id] = count
        else:
            del client.pins[object_id]
        self.lineage.unpin(object_id)

    def handle_unpinned(self, event: Unpinned, now: float) -> None:
        client = self._client(event.client)
        for object_id in event.object_ids:
            self._unpin(client, object_id)

    # ------------------------------------------------------------ waiting

    def handle_objects_awaited(self, event: ObjectsAwaited, now: float) -> None:
        client = self._client(event.client)
        object_ids, objects = event.object_ids, self.objects
        for object_id in object_ids:
            if object_id not in objects:  # Freed: becomes an entry that says so.
                self._acquire(client, object_id)
        pending = [entry for entry in map(objects.__getitem__, object_ids) if entry.data is None]
        remaining = event.num_ready - (len(object_ids) - len(pending))
        if event.fetch and remaining > 0 and any(objects[object_id].is_error for object_id in object_ids):
            remaining = 0
        request = Request(event.client, event.request_id, object_ids, max(0, remaining), event.fetch, event.blocks)
        if remaining <= 0:
            self._answer(event.client, event.request_id, self._readiness(client, request))
            return
        client.requests[event.request_id] = request
        for entry in pending:
            self.lineage.wait_for(entry, request)
        if event.blocks and isinstance(client, WorkerRecord):
            self.scheduler.block(client)

    def _readiness(self, client: Client, request: Request) -> list[Any] | None:
        """The driver looks into the table itself; a worker is told: values, or which are ready."""
        if client.client == DRIVER:
            return None
        if request.fetch:
            return [self._fetch(client, object_id) for object_id in request.object_ids]
        entries = map(self.objects.get, request.object_ids)
        return [entry is None or entry.data is not None for entry in entries]

    def _request_ready(self, request: Request) -> None:
        client = self._client(request.client)
        self._answer(request.client, request.request_id, self._readiness(client, request))
        self._close_request(client, request.request_id)

    def _close_request(self, client: Client, request_id: int) -> None:
        request = client.requests.pop(request_id, None)
        if request is not None:
            request.remaining = 0
            request.object_ids = []  # They may be refs, and objects not yet ready may keep this request for long.
            if request.blocks and isinstance(client, WorkerRecord):
                self.scheduler.unblock(client)

    def handle_request_abandoned(self, event: RequestAbandoned, now: float) -> None:
        self._close_request(self._client(event.client), event.request_id)

    # ------------------------------------------------------------ memory

    def handle_block_requested(self, event: BlockRequested, now: float) -> None:
        self._give_room(event.client, event.request_id, event.object_id, event.size, may_spill=True)

    def _give_room(self, client: int, request_id: int, object_id: bytes, size: int, may_spill: bool) -> None:
        """A block, else objects to spill first, else a file: the new object is born spilled."""
        grant: tuple[Any, ...]
        block = self.lineage.arena.allocate(size)
        if block is not None:
            grant = ("block", block.offset, block.fresh)
        elif may_spill and (victims := self.lineage.victims(size)):
            grant = ("spill", [(e.object_id, e.data, e.size, self._new_file(e.object_id)) for e in victims])
        else:
            grant = ("file", self._new_file(object_id))
        self._grants[(client, object_id)] = grant
        self._answer(client, request_id, grant)

    def _new_file(self, object_id: bytes) -> str:
        """A path never used before: the file of an earlier attempt may be deleted at any time."""
        self._files_made += 1
        return f"{self._spill_path(object_id)}-{self._files_made}"

    def _revoke(self, client: int, object_id: bytes, now: float) -> None:
        """What was given for that object and will not be used any more comes back."""
        grant = self._grants.pop((client, object_id), None)
        if grant is None:
            return
        files = []
        if grant[0] == "block":
            self.lineage.arena.free(grant[1], backed=not grant[2])
        elif grant[0] == "spill":
            for victim, _, _, path in grant[1]:
                self.lineage.spilled(victim, None, now)
                files.append(path)
        else:
            files.append(grant[1])
        for path in files:
            self._delete_file(path)
            self._delete_file(partial_path(path))

    def handle_room_abandoned(self, event: RoomAbandoned, now: float) -> None:
        self._revoke(event.client, event.object_id, now)

    def handle_blocks_spilled(self, event: BlocksSpilled, now: float) -> None:
        del self._grants[(event.client, event.object_id)]
        failed = False
        for object_id, path in event.spilled:
            failed = failed or not path
            self.lineage.spilled(object_id, path or None, now)
        # Holes that do not touch each other may need more victims; a full disk ends it.
        self._give_room(event.client, event.request_id, event.object_id, event.size, may_spill=not failed)

    def handle_block_refused(self, event: BlockRefused, now: float) -> None:
        """/dev/shm is smaller than it said: what lies beyond that block will not be tried again."""
        del self._grants[(event.client, event.object_id)]
        self.lineage.arena.retire(event.offset)
        self._retired.append(event.offset)
        self._event("store_shrunk", event.object_id, f"no memory behind offset {event.offset} of the arena", now)
        self._give_room(event.client, event.request_id, event.object_id, event.size, may_spill=True)

    def _delete_file(self, path: str) -> None:
        self.wire.append(DeleteFile(path))

    # ------------------------------------------------------------ processes that end

    def _forget_worker(self, worker: WorkerRecord, reason: str, now: float) -> None:
        """What it held and waited for is let go; its memory only when its process has ended."""
        self._leaving[worker.client] = worker
        self._row("workers", self._worker_row(worker, 2, now, reason))
        self.scheduler.worker_gone(worker)
        for request in worker.requests.values():
            request.remaining = 0
        worker.requests.clear()
        self._release_held(worker)

    def _release_memory(self, client: int, now: float) -> None:
        """The process has ended: it neither reads nor writes the arena any more."""
        worker = self._leaving.pop(client, None)
        if worker is None:
            return
        for object_id in [object_id for number, object_id in self._grants if number == client]:
            self._revoke(client, object_id, now)
        self._release_pins(worker)

    def _release_held(self, client: Client) -> None:
        for object_id in list(client.held):
            self.lineage.release(object_id)
        client.held.clear()

    def _release_pins(self, client: Client) -> None:
        for object_id, count in list(client.pins.items()):
            for _ in range(count):
                self.lineage.unpin(object_id)
        client.pins.clear()
