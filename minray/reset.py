"""Between two tests of one session: end what the first has left, and say what it was.

Everything is done by the events that the public API sends (kill, cancel), and nothing is started anew, so a session
is as good as new in milliseconds.  What stays as it was: the worker processes of tasks, with the modules they have
imported, functions that are known, and the history.
"""

from __future__ import annotations

import gc
from time import monotonic
from typing import TYPE_CHECKING, NamedTuple
from weakref import WeakKeyDictionary

from minray import api, ids
from minray.messages import ActorKillRequested, CancelRequested, PlacementGroupRemoved
from minray.task_spec import DEAD, FINISHED, REMOVED

if TYPE_CHECKING:
    from minray.driver import Driver
    from minray.lineage import ObjectEntry, Task

GENTLE_S = 0.1
"""So long a task may take to end when it is cancelled; then its worker is killed."""

_told: WeakKeyDictionary[Driver, set[bytes]] = WeakKeyDictionary()  # objects that outlived an earlier reset


class Leftovers(NamedTuple):
    """What was left; empty lists: nothing."""

    actors: list[str]
    """Live actors, which were killed."""
    tasks: list[str]
    """Tasks and calls that had not finished, which were cancelled."""
    placement_groups: list[str]
    """Placement groups, which were removed."""
    objects: list[str]
    """Objects to which somebody still has a ref: they live on, and are not told of again."""

    def __bool__(self) -> bool:
        return bool(self.actors or self.tasks or self.placement_groups or self.objects)

    def __str__(self) -> str:
        parts = []
        for kind, names in zip(("actor", "task", "placement group", "object"), self):
            if names:
                more = f" and {len(names) - 5} more" if len(names) > 5 else ""
                parts.append(f"{len(names)} {kind}{'s' * (len(names) > 1)} ({', '.join(names[:5])}{more})")
        return ", ".join(parts) or "nothing"


def reset(timeout_s: float = 10.0) -> Leftovers:
    """Make the session as it was when it began: kill all actors, cancel all tasks, remove all placement groups,
    and tell what there was.

    Args:
        timeout_s: how long tasks may take to end.

    Raises:
        RuntimeError: this is a worker, or there is no session.
        TimeoutError: something has not ended in time.

    >>> class Counter:
    ...     pass
    >>> kept = minray.remote(Counter).options(name="kept").remote()
    >>> print(minray.testing.reset().actors)
    ['Counter named kept']
    """
    if not api.is_initialized() or api.core().client:
        raise RuntimeError("minray.testing.reset() works in the driver of a session, and this is none.")
    core: Driver = api.core()  # type: ignore[assignment]
    core.raylet.drain()
    deadline = monotonic() + timeout_s
    with core.raylet.lock:
        actors = {a.actor_id: _actor(core, a.actor_id) for a in core.node.actors.actors.values() if a.state != DEAD}
        tasks = [_task(task) for task in _unfinished(core)]
        groups = {group.group_id: str(group) for group in core.node.groups.values() if group.state != REMOVED}
    for group_id in groups:
        core.send(PlacementGroupRemoved(core.client, group_id))
    for actor_id in actors:
        core.send(ActorKillRequested(core.client, actor_id, True))
    _cancel(core, False)
    gentle = monotonic() + GENTLE_S
    while True:
        with core.raylet.lock:
            running = [_task(task) for task in _unfinished(core)]
        if not running:
            break
        if monotonic() > deadline:
            raise TimeoutError(f"{', '.join(running)} did not end within {timeout_s:g} s")
        if gentle and monotonic() > gentle:
            gentle = 0.0
            _cancel(core, True)
        core.loop_once()
    if core.node.objects:
        gc.collect()  # What a cycle holds is not left over, only late.
        core.raylet.drain()
    with core.raylet.lock:
        told = _told.setdefault(core, set())
        objects = [_object(core, entry) for entry in core.node.objects.values() if entry.object_id not in told]
        _told[core] = set(core.node.objects)
    return Leftovers(list(actors.values()), tasks, list(groups.values()), objects)


def _unfinished(core: Driver) -> list[Task]:
    return [t for t in core.node.lineage.tasks.values() if t.state < FINISHED and t.spec.actor is None]


def _cancel(core: Driver, force: bool) -> None:
    with core.raylet.lock:
        task_ids = [task.spec.task_id for task in _unfinished(core)]
    for task_id in task_ids:
        core.send(CancelRequested(core.client, task_id, force, True))


def _actor(core: Driver, actor_id: bytes) -> str:
    options = core.node.actors.actors[actor_id].options
    return options.class_name + (f" named {options.name}" if options.name else "")


def _task(task: Task) -> str:
    return f"{task.template.options.name}()"


def _object(core: Driver, entry: ObjectEntry) -> str:
    holders = [f"worker {w.client}" for w in core.node.scheduler.workers.values() if entry.object_id in w.held]
    made_by = "put()" if ids.is_put(entry.object_id) else "a result"
    if entry.is_handle:
        made_by = "a handle"
    if entry.task is not None:
        made_by += f" of {entry.task.template.options.name}()"
    return made_by + (f", held by {', '.join(holders)}" if holders else "")
