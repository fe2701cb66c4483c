"""Streams, at the node: the items that a generator yields while it runs, one object each.

A streaming task has two returns and any number of items (ids.py says how they are called):

* its *end*, return 0: ready when the task has ended, and its error if it raised;
* its *reader*, return 1: never looked at.  It is held by the `ObjectRefGenerator` alone, so when that goes, the
  object is freed, and the node knows (as it does of an actor by its last handle);
* items 0, 1, 2, …  The one after the last that is known is always there as a pending object: a reader that waits
  awaits it like any other.  When the generator ends, the error becomes a last item, and the pending one behind it
  is fulfilled, so that who waits sees the end.

The node holds the items until the reader takes them, many at once; from then on the reader holds them.  Without a
reader items are dropped as they come: the task goes on to its end, as in Ray.  A *dynamic* generator has no reader.
Its items are held until it has ended, and then by its result, a list of refs to them.

A second run (a retry, or a replay for a lost item) yields the same items under the same IDs.  What is there stays;
what is lost is made again.  Values are not compared, but their number is: a run that ends with another number is a
divergence (docs/decisions/0015).  A second attempt of the reader's own task reads from the start: items are kept for it
as other children's returns are, and what is gone all the same is made again.

A generator with backpressure asks for room (RoomAwaited) when as many items as its options allow are not taken, and
stands still until it gets the answer.  Its CPU is lent meanwhile: the items may be taken by what waits for a CPU.
If an item that it has yielded is lost meanwhile, its worker is ended, and it begins anew: an attempt, like any replay.

Left out: streams that cross nodes, readers in several processes.
"""

from __future__ import annotations

from typing import Any

from minray import ids
from minray.lineage import CONSTRUCTED, ObjectEntry, Request, Stream, Task
from minray.messages import DRIVER, ItemsRequested, ItemsYielded, KillWorker, RoomAwaited, Warn
from minray.node_recovery import NodeRecovery
from minray.task_spec import DYNAMIC, FINISHED, STREAMING

NOTHING = (CONSTRUCTED, len(CONSTRUCTED), ())
"""The value of what stands behind the last item: None, which nobody reads."""


class NodeStreams(NodeRecovery):
    def _stream_opened(self, task: Task) -> None:
        task.stream = Stream()
        self._hold_item(task, 0)

    def _hold_item(self, task: Task, item: int) -> ObjectEntry:
        """One more ref to it, the stream's; it need not be there yet."""
        item_id = ids.item_id(task.spec.task_id, item)
        entry = self.objects.get(item_id)
        if entry is None:
            entry = self.objects[item_id] = ObjectEntry(item_id, task, 0)
            task.live_returns += 1
        entry.refs += 1
        return entry

    # ------------------------------------------------------------ items come

    def handle_items_yielded(self, event: ItemsYielded, now: float) -> None:
        worker = self.scheduler.workers[event.client]
        task = worker.in_flight.get(event.task_id)
        if task is None:
            for item, value in enumerate(event.values, event.first):
                self._grants.pop((worker.client, ids.item_id(event.task_id, item)), None)
                self.lineage.drop_value(value)
            return
        stream = task.stream
        for item, value in enumerate(event.values, event.first):
            if type(value[0]) is not bytes:
                self._grants.pop((worker.client, ids.item_id(event.task_id, item)), None)
            if item == stream.num_items and stream.is_read and not stream.ended:
                self._add_item(task, stream, value, event.failed)
            else:
                self._take_known_item(task, stream, item, value)
        stream.attempt, stream.num_yielded = task.attempt, event.first + len(event.values)

    def _add_item(self, task: Task, stream: Stream, value: Any, is_error: bool) -> None:
        """The next one for its reader: it fulfils the pending object, and another stands behind it."""
        entry = self.objects[ids.item_id(task.spec.task_id, stream.num_items)]
        stream.num_items += 1
        self._hold_item(task, stream.num_items)
        if stream.parent is not None:
            self.lineage.keep_item(stream.parent, entry)
        if stream.kept is not None:
            entry.refs += 1
            stream.kept.append(entry.object_id)
        self._fill_item(task, entry, value, is_error)

    def _fill_item(self, task: Task, entry: ObjectEntry, value: Any, is_error: bool) -> None:
        task.result_bytes += value[1]
        if type(value[0]) is not bytes and task.template.may_replay and (task.spec.deps or task.spec.nested):
            task.origins = ()  # Its lineage is worth keeping: see `release_arguments`.
        self.lineage.seal(entry, value, is_error, self._now)

    def _take_known_item(self, task: Task, stream: Stream, item: int, value: Any) -> None:
        """It is there already, or is made again because it was lost; or nobody reads it."""
        entry = self.objects.get(ids.item_id(task.spec.task_id, item))
        if item >= stream.num_items and not stream.ended:
            stream.num_items = item + 1
        elif item in stream.gaps:
            del stream.gaps[item]
            entry = self._hold_item(task, item)
        if entry is None or entry.data is not None:
            self.lineage.drop_value(value)
            return
        stream.lost.pop(entry.object_id, None)
        self._fill_item(task, entry, value, False)
        if entry.refs <= 0 and not entry.pins:
            self.lineage.free(entry)

    # ------------------------------------------------------------ the end

    def _is_past(self, task: Task, object_id: bytes) -> bool:
        """Whether its run in hand has yielded that item, and will not do so again."""
        if not task.template.options.streaming or task.stream.attempt != task.attempt:
            return False
        return object_id < ids.item_id(task.spec.task_id, task.stream.num_yielded)

    def _count_items(self, task: Task) -> None:
        """The generator has come to its end: has it yielded as many items as in an earlier run?"""
        stream = task.stream
        yielded = stream.num_yielded if stream.attempt == task.attempt else 0
        known = stream.num_items - stream.failed
        if task.error is not None or yielded == known or (yielded > known and not stream.ended):
            return
        name = task.template.options.name
        counts = f"it yielded {yielded} items, and {known} before"
        task.error = f"{name}() did something else when it was run again: {counts}"
        self._event("replay_diverged", task.spec.task_id, task.error, self._now)
        self.wire.append(
            Warn(
                f"{task.error}. Those that were known stay as they are. Let it depend on its arguments alone (random "
                "numbers: from a seed that it is given), or say max_retries=0."
            )
        )

    def _close_stream(self, task: Task) -> None:
        """It has come to its end.  If an item is lost it begins anew at once: what it needs must not go in between."""
        arguments = task.spec.deps + task.spec.nested if task.stream.lost else ()
        for object_id in arguments:
            self.lineage.hold(object_id)
        self._close(task, FINISHED)
        self._stream_ended(task, None)
        for object_id in arguments:
            self.lineage.release(object_id)

    def _stream_ended(self, task: Task, error: bytes | None) -> None:
        """`error`: what becomes of the items that have not come."""
        stream = task.stream
        lost, stream.lost = stream.lost, {}
        if not stream.ended:
            if error is not None and stream.is_read:
                self._add_item(task, stream, (error, len(error), ()), True)
                stream.failed = True
            stream.ended = True
            if stream.is_read:
                last = self.objects[ids.item_id(task.spec.task_id, stream.num_items)]
                self.lineage.seal(last, NOTHING, False, self._now)
        for object_id in lost:
            entry = self.objects.get(object_id)
            if entry is not None and entry.data is None:
                if object_id == ids.item_id(object_id, stream.num_items):
                    self.lineage.seal(entry, NOTHING, False, self._now)
                elif error is not None:
                    self.lineage.seal(entry, (error, len(error), ()), True, self._now)
                else:  # It was lost after it had come.
                    self._want_again(entry)
        if stream.room is not None and stream.room.remaining:  # It was cancelled while it waited.
            self._close_request(self.scheduler.workers[stream.room.client], stream.room.request_id)
        if task.template.options.streaming == DYNAMIC:
            self._reader_gone(task)

    # ------------------------------------------------------------ items go

    def handle_items_requested(self, event: ItemsRequested, now: float) -> None:
        task = self.lineage.tasks.get(event.task_id)
        if task is None or task.template.options.streaming != STREAMING:
            # Forgotten; or its parent has diverged: under this ID stands another task.
            self._answer(event.client, event.request_id, None)
            return
        stream = task.stream
        there = stream.num_items - event.position
        asked = range(event.position, event.position + max(1, event.limit))
        if stream.gaps and not stream.gaps.keys().isdisjoint(asked):
            self._fill_gaps(task, stream)
        had = self._hand_over(event, task, stream, event.position + min(there, event.limit))
        self._answer(event.client, event.request_id, (there, stream.ended, had))

    def _hand_over(self, event: ItemsRequested, task: Task, stream: Stream, end: int) -> list[bytes]:
        """What the stream has held up to item `end` is the reader's now.

        Returns those that its process held before: it may be letting go of them just now, so they are pinned for it
        until it has read this."""
        had: list[bytes] = []
        if end <= stream.num_taken:
            return had  # An answer that was not read: Ctrl-C came in between.
        if event.client != DRIVER:
            client = self._client(event.client)
            for item in range(stream.num_taken, end):
                item_id = ids.item_id(event.task_id, item)
                if item_id in client.held:
                    had.append(item_id)
                    self._pin(client, self.objects[item_id])
                    self.lineage.release(item_id)
                client.held[item_id] = None
        stream.num_taken = end
        self._go_on_or_start_over(task)
        return had

    def _reader_gone(self, task: Task) -> None:
        stream = task.stream
        if task.template.options.streaming == DYNAMIC and task.state < FINISHED:
            return  # It never had one.
        held = stream.held()
        stream.is_read = False
        stream.gaps.clear()
        for item in held:
            self.lineage.release(ids.item_id(task.spec.task_id, item))
        self._go_on_or_start_over(task)

    def _is_forgettable_stream(self, task: Task, another: bool, returns: list[ObjectEntry | None]) -> bool:
        """See `_is_forgettable`; nobody holds its returns.  Nor an item, but for this very attempt?  Are all there?"""
        parent, task_id = task.stream.parent, task.spec.task_id
        kept = [self.objects[one] for one in (parent.children if parent is not None else None) or ()]
        items = [entry for entry in kept if ids.task_of(entry.object_id) == task_id and entry not in returns]
        unused = [entry for entry in (*returns, *items) if entry is not None and entry.refs <= 0 and not entry.pins]
        if task.live_returns > len(unused):
            return False
        gone = len(items) < task.stream.num_items or any(entry.data is None for entry in items)
        return another or (task.state >= FINISHED and gone)

    def _read_again(self, task: Task) -> None:
        """The second attempt of the task that reads it submits it anew, and begins with the first item."""
        stream = task.stream
        reader_id = ids.reader_id(task.spec.task_id)
        if reader_id not in self.objects:
            entry = self.objects[reader_id] = ObjectEntry(reader_id, task, 0)
            task.live_returns += 1
            if task.state >= FINISHED:
                entry.data, entry.size, _ = NOTHING
        missing = range(stream.num_taken) if stream.is_read else range(stream.num_items + 1)
        stream.is_read = True
        stream.num_taken = 0
        for item in missing:
            item_id = ids.item_id(task.spec.task_id, item)
            if item < stream.num_items and item_id not in self.objects:
                stream.gaps[item] = None
                continue
            entry = self._hold_item(task, item)
            if entry.data is None and item < stream.num_items:
                self._want_again(entry)
            elif entry.data is None and stream.ended:
                self.lineage.seal(entry, NOTHING, False, self._now)

    def _fill_gaps(self, task: Task, stream: Stream) -> None:
        """The reader has come to an item that was freed: all of them are made again, in one run."""
        gaps = list(stream.gaps)
        stream.gaps.clear()
        for entry in [self._hold_item(task, item) for item in gaps]:
            self._want_again(entry)

    # ------------------------------------------------------------ backpressure

    def handle_room_awaited(self, event: RoomAwaited, now: float) -> None:
        worker = self.scheduler.workers[event.client]
        task = worker.in_flight.get(event.task_id)
        if task is None:
            self._answer(event.client, event.request_id, None)
            return
        stream = task.stream
        request = stream.room = Request(event.client, event.request_id, [], 1, False, event.blocks)
        worker.requests[event.request_id] = request
        if event.blocks:
            self.scheduler.block(worker)
        self._go_on_or_start_over(task)

    def _go_on_or_start_over(self, task: Task) -> None:
        """If the generator stands still, and need not any more, it goes on.

        It may stand still for ever when an item that it has yielded is lost: its reader may wait for what needs that
        item, and no other run begins before this one has ended.  So this one is ended."""
        stream = task.stream
        room = stream.room
        if room is None or not room.remaining:
            return
        if not stream.is_read:
            self._answer(room.client, room.request_id, None)
        elif stream.num_yielded - stream.num_taken < task.template.options.backpressure:
            self._answer(room.client, room.request_id, stream.num_taken)
        elif any(self._is_past(task, object_id) for object_id in stream.lost):
            why = "it stands still, and an item that it has yielded is lost"
            self._event("generator_restarted", task.spec.task_id, why, self._now)
            self.wire.append(KillWorker(room.client, only_if_running=task.spec.task_id))
            return
        else:
            return
        stream.room = None
        self._close_request(self.scheduler.workers[room.client], room.request_id)
