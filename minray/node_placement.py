"""Placement groups, at the node: asked for, waiting, placed, removed; and which tasks may run here at all.

A group takes its bundles out of the node's resources when there is enough for all of them, and keeps them until it is
removed.  What its tasks draw from is then a bundle instead of the node (`scheduler.Bundle`), so shapes, leases, lent
CPUs and GPUs work in a group as they do outside: nothing else knows of groups.

::

    PENDING --all bundles fit--> CREATED --removed--> REMOVED
       '--no empty node would have them--> INFEASIBLE --removed--'

A group's ID names an object as well, which is what `PlacementGroup.ready()` returns: pending until the group is placed,
an error if it never will be.  So waiting for a group is waiting for an object, and costs no task.

Groups wait as tasks do: in the order of their requests, and one that does not fit holds up only those that ask for
the same.  Considered: resources of synthetic names ("CPU_group_0_4ab1"), as Ray shows them; then every reader of a
demand (OMP_NUM_THREADS, GPUs, lending, cluster_resources) must know how to take such a name apart.
"""

from __future__ import annotations

import json
from collections import Counter
from functools import partial
from typing import Any

from minray import ids
from minray.actor_table import Actor
from minray.exceptions import error_payload
from minray.lineage import Task
from minray.messages import KillWorker, PlacementGroupRemoved, PlacementGroupRequested, Warn
from minray.node_actors import NodeActors
from minray.node_tasks import amounts
from minray.placement import NODE_ID, Room, in_words, meets, plan
from minray.scheduler import STARVED_S, Bundle, Shape, WorkerRecord, in_all
from minray.task_spec import (
    ACTOR_CREATION, CREATED, INFEASIBLE, PENDING, PLACEMENT_GROUP_STATES, REMOVED, UNIT, Resources, TaskOptions,
)  # fmt: skip

MAX_REMOVED = 1_000
"""So many removed groups, the newest, are remembered, so that who comes late is told what became of them."""


class Group:
    def __init__(self, event: PlacementGroupRequested, no: int, creator: bytes | None, now: float) -> None:
        self.group_id = event.group_id
        self.no = no  # row number in the GCS
        self.wants = tuple((tuple(resources), tuple(conditions)) for resources, conditions in event.bundles)
        self.bundles = tuple(Bundle(dict(resources)) for resources, _ in self.wants)
        self.strategy = event.strategy
        self.name = event.name
        self.detached = event.detached
        self.creator = creator  # the detached actor with which it ends
        self.value = event.value  # of its object, once it is placed
        self.state = PENDING
        self.shapes: list[Shape] = []  # of its tasks: they draw from its bundles
        self.claim: Shape | None = None  # while it waits: all that it wants
        self.reason = ""  # why it was removed, or never can be placed
        self.told = False  # its owner knows that it waits for what may never be free
        self.requested_s = now
        self.placed_s = 0.0
        self.removed_s = 0.0

    def __str__(self) -> str:
        name = f"{self.name!r} " if self.name else ""
        return f"placement group {name}[{ids.short(self.group_id)}]"

    @property
    def demand(self) -> str:
        """For people: "(1 CPU) + (2 CPU, 1 GPU)"."""
        return " + ".join(f"({amounts(resources)})" for resources, _ in self.wants)

    def row(self) -> tuple[Any, ...]:
        """Its row in the GCS (see schema.py)."""
        bundles = [{name: units / UNIT for name, units in resources} for resources, _ in self.wants]
        return (
            self.no, self.group_id, self.name or None, self.strategy, json.dumps(bundles), self.state,
            int(self.detached), int(self.requested_s * 1e6), int(self.placed_s * 1e6) or None,
            int(self.removed_s * 1e6) or None, self.reason or None,
        )  # fmt: skip


class NodePlacement(NodeActors):
    labels: dict[str, str]  # of this node
    groups: dict[bytes, Group]  # all, and the removed ones that are remembered
    _group_names: dict[str, Group]  # of those that are not removed
    _waiting: dict[Any, dict[bytes, Group]]  # PENDING groups, in order, by what they want; none is empty
    _removed: dict[bytes, Group]  # the oldest first
    _groups_made: int
    _dirty_groups: dict[int, Group]  # rows to record, by number

    # ------------------------------------------------------------ groups come, and wait

    def handle_placement_group_requested(self, event: PlacementGroupRequested, now: float) -> None:
        known = self.groups.get(event.group_id)
        if known is not None and known.state != REMOVED:
            refused = None  # The second attempt of whoever asked for it: it has it.
        elif event.name in self._group_names:
            refused = f"the name is taken by {self._group_names[event.name]}"
        else:
            refused = None
            self._new_group(event, known, now)
        if event.request_id:
            self._answer(event.client, event.request_id, refused)

    def _new_group(self, event: PlacementGroupRequested, known: Group | None, now: float) -> None:
        creator = self._client(event.client).actor
        self._groups_made += 1
        fate_shared = creator is not None and creator.options.detached and not event.detached
        group = Group(event, self._groups_made, creator.actor_id if creator and fate_shared else None, now)
        if known is not None:  # Made and removed by an earlier attempt.
            del self._removed[group.group_id]
            self.lineage.release(group.group_id)
            group.shapes = known.shapes
        self.groups[group.group_id] = group
        if group.name:
            self._group_names[group.name] = group
        self.lineage.promise(group.group_id)
        if self._stall is not None:
            group.no = 0  # As a task that is refused gets no row, since rows cannot be written.
            error = self._stall_error(f"{group} was not made")
            self._give_up_group(group, f"{self._stall.error}: {self._stall.why}", error)
        elif (why := self._why_never_placed(group)):
            self._event("placement_group_infeasible", group.group_id, f"it can never be placed: {why}", now)
            text = (
                f"{group} can never be placed: {why}. It reserves nothing; its ready() raises, its wait() returns "
                "False, and its tasks and actors fail."
            )
            self._give_up_group(group, why, error_payload("PlacementGroupUnschedulableError", text))
            self.wire.append(Warn(text))
        else:
            self._note_group(group)
            for shape in group.shapes:
                shape.pools = self._pools_of(group, shape.placement[1])  # type: ignore[misc]
                self.scheduler.shapes[shape.key] = shape
            group.claim = Shape(tuple(in_all(group.bundles).items()), True, (self.scheduler.pool,))
            self._waiting.setdefault(group.wants, {})[group.group_id] = group

    def _why_never_placed(self, group: Group) -> str:
        scheduler = self.scheduler
        if group.strategy == "STRICT_SPREAD" and len(group.bundles) > 1:
            return f"STRICT_SPREAD wants a node for each of its {len(group.bundles)} bundles, and there is one node"
        for index, (_, conditions) in enumerate(group.wants):
            if not meets(self.labels, conditions):
                has = self._labels_in_words()
                return f"bundle {index} wants a node with {in_words(conditions)}, and this one has {has}"
        rooms = {1: Room(scheduler.total, self.labels)}
        if plan(group.wants, group.strategy, rooms) is None or not scheduler.could_ever_reserve(group.bundles):
            return f"it wants {group.demand}, and this node has {amounts(scheduler.total.items())} in all"
        return ""

    def _labels_in_words(self) -> str:
        own = ", ".join(f"{label}={value}" for label, value in self.labels.items() if label != NODE_ID)
        return f"the labels {own}" if own else "no labels of its own"

    def _place_groups(self, now: float) -> None:
        """Called before tasks are given what is free; and groups have their turns among queues."""
        self.scheduler.claims.clear()
        for wants, groups in list(self._waiting.items()):
            while groups:
                group = next(iter(groups.values()))
                if not self.scheduler.reserve(group.bundles):
                    self.scheduler.claims[group.claim] = None  # type: ignore[index]
                    if not group.told:
                        self.scheduler.wake_by(group.requested_s + STARVED_S)
                    break
                del groups[group.group_id]
                group.state = CREATED
                group.placed_s = now
                self._note_group(group)
                self._fulfil(group, group.value, is_error=False)
            if not groups:
                del self._waiting[wants]

    def _note_group(self, group: Group) -> None:
        """Its row has changed."""
        if group.no:
            self._dirty_groups[group.no] = group

    def _fulfil(self, group: Group, value: bytes, is_error: bool) -> None:
        """What `ready()` promised."""
        if group.group_id in self.lineage.promised:
            del self.lineage.promised[group.group_id]
            self.lineage.seal(self.objects[group.group_id], (value, len(value), ()), is_error, self._now)

    def _tell_waiting_groups(self, now: float) -> None:
        for groups in self._waiting.values():
            for group in groups.values():
                if group.told:
                    continue
                if now - group.requested_s < STARVED_S:
                    self.scheduler.wake_by(group.requested_s + STARVED_S)
                    break
                group.told = True
                text = (
                    f"{group} wants {group.demand} and waits: of the {amounts(self.scheduler.total.items())} of this "
                    "node too much is held by tasks, actors and other placement groups. It is placed when enough of "
                    "them end (minray.util.remove_placement_group, minray.kill)."
                )
                self._event("placement_group_starved", group.group_id, text, now)
                self.wire.append(Warn(text))

    # ------------------------------------------------------------ groups go

    def handle_placement_group_removed(self, event: PlacementGroupRemoved, now: float) -> None:
        group = self.groups.get(event.group_id)
        if group is not None and group.state != REMOVED:
            self._remove_group(group, "remove_placement_group() was called on it", now)

    def _remove_group(self, group: Group, why: str, now: float) -> None:
        """Its tasks and actors end, then its resources are the node's again."""
        if group.state == PENDING:
            waiting = self._waiting[group.wants]
            del waiting[group.group_id]
            if not waiting:
                del self._waiting[group.wants]
            self.scheduler.claims.pop(group.claim, None)  # type: ignore[arg-type]
        was = group.state
        group.state, group.reason, group.removed_s = REMOVED, why, now
        self._note_group(group)
        if self._group_names.get(group.name) is group:
            del self._group_names[group.name]
        scheduler = self.scheduler
        ended: Counter[str] = Counter()
        for shape in group.shapes:
            shape.pools = ()  # What becomes ready from now on is refused.
            scheduler.shapes.pop(shape.key, None)
        for shape in group.shapes:
            scheduler.active.pop(shape, None)
            for task in shape.take(shape.waiting):
                ended["actor" if shape.exclusive else "task"] += 1
                self._fail_removed(task, group, "It was not run.")
        for worker in list(scheduler.workers.values()):
            if worker.shape in group.shapes:
                if worker.actor is not None:
                    ended["actor"] += 1
                else:
                    ended["task"] += len(worker.in_flight)
                self._end_in_group(worker, group, now)
        scheduler.give_back(group.bundles)
        if was == PENDING:
            text = f"{group} was removed ({why}) before it was placed."
            self._fulfil(group, error_payload("TaskPlacementGroupRemoved", text), is_error=True)
        if ended:
            what = " and ".join(f"{count} {kind}{'s' * (count > 1)}" for kind, count in ended.items())
            self._event("placement_group_removed", group.group_id, f"{why}: {what} ended with it", now)
        self._removed[group.group_id] = group
        if len(self._removed) > MAX_REMOVED:
            oldest = next(iter(self._removed))
            del self._removed[oldest], self.groups[oldest]
            self.lineage.release(oldest)

    def _give_up_group(self, group: Group, why: str, error: bytes) -> None:
        """It will never be placed."""
        group.state, group.reason = INFEASIBLE, why
        self._note_group(group)
        for shape in group.shapes:
            shape.pools = ()
        self._fulfil(group, error, is_error=True)

    def _end_in_group(self, worker: WorkerRecord, group: Group, now: float) -> None:
        """What runs there is ended at once, as by kill()."""
        self.wire.append(KillWorker(worker.client))
        actor = worker.actor
        if actor is not None:
            text = (
                f"{actor} is dead: {group}, in which it was, was removed ({group.reason}). What it was executing may "
                "have run partway. minray will not run it again."
            )
            error = error_payload("ActorPlacementGroupRemoved", text)
            actor.cause = (error, f"ActorPlacementGroupRemoved: {text}")
            self._bury(actor, f"{group} was removed", now)
            return
        tasks = list(worker.in_flight.values())
        worker.in_flight.clear()
        self._forget_worker(worker, f"was ended: {group} was removed", now)
        for position, task in enumerate(tasks):
            ran = "It was not run." if position else "It may have run partway. minray will not run it again."
            self._fail_removed(task, group, ran)

    def _fail_removed(self, task: Task, group: Group | None, ran: str) -> None:
        options = task.template.options
        short = ids.short(options.placement[0]) if options.placement else ""
        gone = f"placement group [{short}], which is not there: it was removed, or is of another session"
        if group is not None:
            gone = f"{group}, which was removed ({group.reason})"
        kind = "ActorPlacementGroupRemoved" if options.kind == ACTOR_CREATION else "TaskPlacementGroupRemoved"
        text = f"{options.name} [task {ids.short(task.spec.task_id)}] belongs to {gone}. {ran}"
        self._fail(task, kind, text)

    def _bury(self, actor: Actor, reason: str, now: float, advice: str = "", begun: int | None = None) -> None:
        super()._bury(actor, reason, now, advice, begun)
        if actor.options.detached:
            for group in [group for group in self.groups.values() if group.creator == actor.actor_id]:
                if group.state != REMOVED:
                    self._remove_group(group, f"its creator, {actor.options.class_name}, has died", now)

    # ------------------------------------------------------------ tasks that may not run just anywhere

    def _shape_of(self, options: TaskOptions) -> Shape:
        exclusive = options.kind == ACTOR_CREATION
        counted = (options.function_id, options.max_calls) if options.max_calls else None
        shape_for = partial(self.scheduler.shape_for, options.resources, exclusive, options.runtime_env, counted)
        if not options.placement and not options.labels:
            return shape_for()
        here = not options.labels or any(meets(self.labels, conditions) for conditions in options.labels)
        if not here:
            return Shape(options.resources, exclusive, (), bound=True)
        if not options.placement:
            return shape_for(("here",))
        group = self.groups.get(options.placement[0])
        if group is None:
            return Shape(options.resources, exclusive, (), bound=True)
        is_over = group.state in (REMOVED, INFEASIBLE)
        pools = () if is_over else self._pools_of(group, options.placement[1])
        shape = shape_for(options.placement, pools)
        if shape not in group.shapes:
            group.shapes.append(shape)
        return shape

    def _pools_of(self, group: Group, index: int) -> tuple[Bundle, ...]:
        return group.bundles if index == -1 else group.bundles[index : index + 1] if index >= 0 else ()

    def _refuse(self, task: Task) -> None:
        options = task.template.options
        group = self.groups.get(options.placement[0]) if options.placement else None
        if options.placement and (group is None or group.state == REMOVED):
            self._fail_removed(task, group, "It was not run.")
        elif why := self._why_not_here(options, group):
            kind = "ActorUnschedulableError" if options.kind == ACTOR_CREATION else "TaskUnschedulableError"
            self._fail(task, kind, f"{options.name} {why}, so it can never run. It was not run.")
        else:
            super()._refuse(task)

    def _why_not_here(self, options: TaskOptions, group: Group | None) -> str:
        if options.labels and not any(meets(self.labels, conditions) for conditions in options.labels):
            wanted = ", or else ".join(map(in_words, options.labels))
            node = f"this one, {self.labels[NODE_ID]}, has {self._labels_in_words()}"
            return f"wants a node with {wanted}, and {node}"
        if group is None or not options.placement:
            return ""
        if group.state == INFEASIBLE:
            return f"is to run in {group}, which can never be placed: {group.reason}"
        index, last = options.placement[1], len(group.bundles) - 1
        if not -1 <= index <= last:
            return f"is to run in bundle {index} of {group}, which has bundles 0 to {last}"
        where = f"bundle {index} of {group} has" if index >= 0 else f"the bundles of {group} have"
        has = group.demand if index < 0 else amounts(group.wants[index][0])
        return f"needs {amounts(options.resources)} and {where} {has}: a task must fit into one bundle"

    # ------------------------------------------------------------ what others may know

    def describe_groups(self) -> list[dict[str, Any]]:
        return [
            {
                "id": group.group_id, "name": group.name, "strategy": group.strategy,
                "state": PLACEMENT_GROUP_STATES[group.state], "bundles": [_plain(wants) for wants, _ in group.wants],
                "requested_s": group.requested_s, "placed_s": group.placed_s, "reason": group.reason,
            }
            for group in self.groups.values()
        ]  # fmt: skip

    def _check_groups(self, refs: Counter[bytes]) -> None:
        waiting = {group_id for groups in self._waiting.values() for group_id in groups}
        placed: set[Bundle] = set()
        for group in self.groups.values():
            refs[group.group_id] += 1
            is_placed = [bundle.placed for bundle in group.bundles]
            assert is_placed == [group.state == CREATED] * len(is_placed), f"{group} is placed in part: {is_placed}"
            assert (group.state == PENDING) == (group.group_id in waiting), f"{group} does not wait, or for nothing"
            promised = group.group_id in self.lineage.promised
            assert group.state == PENDING or not promised, f"{group} is not to be waited for any more"
            assert (group.state == REMOVED) == (group.group_id in self._removed)
            placed.update(group.bundles if group.state == CREATED else ())
            for shape in group.shapes:
                lives = group.state in (PENDING, CREATED)
                assert not shape.pools or lives, f"tasks may start in {group}, which is gone"
                assert lives or not shape.queue and not shape.leased, f"tasks wait for {group}, which is gone"
        assert placed == set(self.scheduler.bundles), "resources are reserved for no group"
        assert all(groups for groups in self._waiting.values())


def _plain(resources: Resources) -> dict[str, float]:
    return {name: units / UNIT for name, units in resources}
