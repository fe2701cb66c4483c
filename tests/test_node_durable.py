"""The node of a durable job, without a process: what an earlier run has finished is not run again.

`Job` plays runs of one job: each has a fresh node, and what the last one kept goes through a real
storage file, as the GCS would write it and the next driver reads it.
"""

from __future__ import annotations

import contextlib
import os
import random
from collections.abc import Iterator
from typing import Any

import pytest

from minray import ids, job_storage, object_store
from minray.gcs import Gcs
from minray.messages import (
    DRIVER, ActorKillRequested, BlockRequested, CheckpointTaken, Command, DeleteFile, Event, FunctionExported, ObjectLost, ObjectPut,
    ReferencesChanged, Reply, RestoreActor, RunTasks, StartWorker, TasksFinished, TasksSubmitted, TemplateDefined, Warn, WorkerDied,
    WorkerStarted,
)  # fmt: skip
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_METHOD, ERROR, FINISHED, OK, RETRYABLE_ERROR, TASK, UNIT, ActorOptions, TaskOptions,
    TaskSpec,
)  # fmt: skip

PLAIN = TaskOptions(TASK, b"f" * 16, "f", resources=(("CPU", UNIT),))
TEMPLATES = {
    1: PLAIN,
    2: PLAIN._replace(num_returns=2),
    3: PLAIN._replace(max_retries=0),
    4: TaskOptions(ACTOR_CREATION, b"f" * 16, "A.__init__", max_retries=0),
    5: TaskOptions(ACTOR_METHOD, b"", "A.m", method="m"),
    6: PLAIN._replace(retry_exceptions=True),
    7: TaskOptions(ACTOR_CREATION, b"f" * 16, "E.__init__", max_retries=0, checkpoint_every=2),
}


def digest(what: Any, code: Any = 1) -> bytes:
    return job_storage_hash(what) + job_storage_hash(code)


def job_storage_hash(thing: Any) -> bytes:
    import hashlib

    return hashlib.blake2b(repr(thing).encode(), digest_size=16).digest()


class Run:
    """One run: a node, its driver, and workers that do what the test says."""

    def __init__(self, path: str, number: int) -> None:
        self.root = ids.root_task_id(b"run %d" % number)
        self.open = job_storage.open_job("job", path, "0", self.root)
        self.node = self.open.make_node(
            {"CPU": 4 * UNIT}, 1 << 20, lambda object_id: os.path.join(self.open.directory, object_id.hex())
        )
        self.database = Gcs(path + ".gcs", job=self.open.config())
        self.now = 1000.0
        self.commands: list[Command] = []
        self.children: dict[bytes, int] = {}
        for command in self.node.start_workers(4):
            self.handle(WorkerStarted(command.client, 100 + command.client))  # type: ignore[union-attr]
        self.handle(FunctionExported(DRIVER, b"f" * 16, b"code", "f", "m", None))
        for client in (DRIVER, *self.node.scheduler.workers):
            for template_no, options in TEMPLATES.items():
                self.handle(TemplateDefined(client, template_no, options))

    def handle(self, event: Event) -> list[Command]:
        commands = self.node.handle(event, self.now)
        self.commands += commands
        for command in commands:
            if isinstance(command, DeleteFile):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(command.path)
        self.node.check()
        return commands

    def worker_of(self, task_id: bytes) -> int:
        worker = self.node.lineage.tasks[task_id].worker
        assert worker is not None
        return worker.client

    def submit(self, what: Any, parent: bytes = b"", code: Any = 1, template: int = 1, **fields: Any) -> bytes:
        """Submit one task; its ID."""
        parent = parent or self.root
        client = DRIVER if parent == self.root else self.worker_of(parent)
        self.children[parent] = self.children.get(parent, 0) + 1
        known = self.node.lineage.tasks.get(parent)
        prefix = ids.children_prefix(parent, known.raised if known is not None else 0)
        task_id = ids.pack_id(prefix, self.children[parent], 0)
        spec = TaskSpec(task_id, template, b"args", digest=digest(what, code), **fields)
        self.handle(TasksSubmitted(client, parent, [spec]))
        return task_id

    def is_done(self, task_id: bytes) -> bool:
        task = self.node.lineage.tasks.get(task_id)
        return task is None or task.state == FINISHED

    def finish(self, task_id: bytes, value: Any = b"v", nested: tuple[bytes, ...] = (), status: int = OK) -> None:
        payload: Any = value
        if status != OK:
            payload = (b"error", "Error: text")
        elif nested or type(value) is str:
            payload = [(value, len(value) if type(value) is bytes else 100_000, nested)]
        result = (task_id, status, payload, self.now, self.now + 0.01)
        self.handle(TasksFinished(self.worker_of(task_id), [result]))

    def dies(self, task_id: bytes) -> None:
        """Its worker; another one takes its place."""
        for command in self.handle(WorkerDied(self.worker_of(task_id), "was killed by SIGKILL", task_id)):
            if isinstance(command, StartWorker):
                self.handle(WorkerStarted(command.client, 100 + command.client))
                for template_no, options in TEMPLATES.items():
                    self.handle(TemplateDefined(command.client, template_no, options))
        self.children.pop(task_id, None)

    def write(self, task_id: bytes, size: int = 100_000) -> str:
        """A task's worker writes a large result; the path of its file."""
        commands = self.handle(BlockRequested(self.worker_of(task_id), 1, task_id, size))
        ((kind, path),) = [command.answer for command in commands if isinstance(command, Reply)]
        assert kind == "file"
        object_store.write_file(path, b"x" * size)
        return str(path)

    def put(self, what: Any, nested: tuple[bytes, ...] = (), parent: bytes = b"") -> bytes:
        client = self.worker_of(parent) if parent else DRIVER
        parent = parent or self.root
        self.children[parent] = self.children.get(parent, 0) + 1
        object_id = ids.put_id(parent, self.children[parent])
        self.handle(ObjectPut(client, object_id, (repr(what).encode(), 8, nested), job_storage_hash(what)))
        return object_id

    def value(self, object_id: bytes) -> Any:
        return self.node.objects[object_id].data

    def sent(self) -> list[bytes]:
        return [task[0] for command in self.commands if isinstance(command, RunTasks) for task in command.tasks]

    def end(self) -> None:
        """The driver is gone, whatever it was doing; the GCS writes what it has been sent."""
        rows = self.node.take_rows(self.now)
        self.database.write([(1, [("results", rows.get("results", []))])])
        self.database.finish()
        self.close()

    def close(self) -> None:
        self.database.database.close()
        if self.database.job is not None:
            self.database.job.close()
        self.open.close()


class Job:
    def __init__(self, path: str) -> None:
        self.path = path
        self.runs = 0

    @contextlib.contextmanager
    def run(self) -> Iterator[Run]:
        self.runs += 1
        run = Run(self.path, self.runs)
        try:
            yield run
        except BaseException:
            run.close()
            raise
        run.end()


@pytest.fixture
def job(tmp_path: Any) -> Job:
    return Job(str(tmp_path / "job.sqlite"))


def finish_one(job: Job, *whats: Any, value: Any = b"v", **options: Any) -> None:
    """An earlier run that has finished these."""
    with job.run() as run:
        for what in whats:
            run.finish(run.submit(what, **options), value)


# ---------------------------------------------------------------- which task it is


def test_a_task_that_has_finished_is_not_run_again(job: Job) -> None:
    finish_one(job, "f(1)")
    with job.run() as run:
        task = run.submit("f(1)")
        assert run.is_done(task) and run.value(task) == b"v" and not run.sent()
        assert (run.node.describe("reused"), run.node.describe("ran")) == (1, 0)


def test_a_task_that_was_still_running_is_run_again(job: Job) -> None:
    with job.run() as run:
        run.submit("f(1)")
    with job.run() as run:
        assert [run.submit("f(1)")] == run.sent()


def test_other_arguments_and_other_code_are_run(job: Job) -> None:
    finish_one(job, "f(1)")
    with job.run() as run:
        assert [run.submit("f(2)"), run.submit("f(1)", code=2)] == run.sent()


def test_two_calls_that_are_alike_stay_two(job: Job) -> None:
    with job.run() as run:
        first, second = run.submit("draw()"), run.submit("draw()")
        run.finish(second, b"two")
        run.finish(first, b"one")
    with job.run() as run:
        first, second, third = (run.submit("draw()") for _ in range(3))
        assert (run.value(first), run.value(second)) == (b"one", b"two")
        assert run.sent() == [third]


def test_a_line_that_is_inserted_moves_nothing(job: Job) -> None:
    with job.run() as run:
        first = run.submit("f(1)")
        run.finish(first)
        run.finish(run.submit("g(_)", deps=(first,)), b"w")
    with job.run() as run:
        new = run.submit("f(0)")
        second = run.submit("g(_)", deps=(new,))
        first = run.submit("f(1)")
        last = run.submit("g(_)", deps=(first,))
        assert run.is_done(first) and run.value(last) == b"w"
        run.finish(new)
        assert run.sent() == [new, second]


def test_tasks_of_one_batch_know_each_other(job: Job) -> None:
    for number in range(2):
        with job.run() as run:
            first, second = (ids.pack_id(ids.children_prefix(run.root), n, 0) for n in (1, 2))
            specs = [TaskSpec(first, 1, digest=digest("f()")), TaskSpec(second, 1, b"a", (first,), digest=digest("g(_)"))]
            run.handle(TasksSubmitted(DRIVER, run.root, specs))
            for task in (first, second):
                if not number:
                    run.finish(task)
                assert run.is_done(task)


def test_what_depends_on_what_was_made_anew_is_made_anew(job: Job) -> None:
    with job.run() as run:
        first = run.submit("load()")
        run.finish(first)
        run.finish(run.submit("train(_)", deps=(first,)))
        run.finish(run.submit("other()"))
    with job.run() as run:
        first = run.submit("load()", code=2)
        second = run.submit("train(_)", deps=(first,))
        assert run.is_done(run.submit("other()"))
        run.finish(first)
        assert run.sent() == [first, second]


def test_a_result_that_was_made_anew_takes_the_place_of_the_old(job: Job) -> None:
    finish_one(job, "f(1)", value=b"old")
    finish_one(job, "f(1)", value=b"new", code=2)
    with job.run() as run:
        assert run.value(run.submit("f(1)", code=2)) == b"new"
    with job.run() as run:
        assert not run.is_done(run.submit("f(1)"))


def test_a_result_with_two_returns_comes_back_with_both(job: Job) -> None:
    with job.run() as run:
        task = run.submit("f()", template=2)
        run.handle(TasksFinished(run.worker_of(task), [(task, OK, [(b"a", 1, ()), (b"b", 1, ())], 1.0, 2.0)]))
    with job.run() as run:
        task = run.submit("f()", template=2)
        assert (run.value(task), run.value(ids.return_id(task, 1))) == (b"a", b"b")


def test_errors_are_not_kept(job: Job) -> None:
    with job.run() as run:
        run.finish(run.submit("f(1)"), status=ERROR)
    with job.run() as run:
        assert [run.submit("f(1)")] == run.sent()


def test_a_call_without_a_digest_is_run_each_time(job: Job) -> None:
    for _ in range(2):
        with job.run() as run:
            task = ids.pack_id(ids.children_prefix(run.root), 1, 0)
            run.handle(TasksSubmitted(DRIVER, run.root, [TaskSpec(task, 1, b"args")]))
            dependent = ids.pack_id(ids.children_prefix(run.root), 2, 0)
            spec = TaskSpec(dependent, 1, b"args", (task,), digest=digest("g(_)"))
            run.handle(TasksSubmitted(DRIVER, run.root, [spec]))
            run.finish(task)
            assert run.sent() == [task, dependent]
            run.finish(dependent)


# ---------------------------------------------------------------- children


def test_children_that_finished_are_not_run_again_though_their_parent_is(job: Job) -> None:
    with job.run() as run:
        parent = run.submit("parent()")
        run.finish(run.submit("child(1)", parent), b"one")
        run.submit("child(2)", parent)
    with job.run() as run:
        parent = run.submit("parent()", code=2)  # Changed code moves its children nowhere.
        assert run.value(run.submit("child(1)", parent)) == b"one"
        second = run.submit("child(2)", parent)
        assert run.sent() == [parent, second]


def test_children_of_two_parents_that_are_alike_stay_two(job: Job) -> None:
    with job.run() as run:
        for name in (b"one", b"two"):
            parent = run.submit("parent()")
            run.finish(run.submit("draw()", parent), name)
    with job.run() as run:
        first, second = run.submit("parent()"), run.submit("parent()")
        assert run.value(run.submit("draw()", second)) == b"two"
        assert run.value(run.submit("draw()", first)) == b"one"


def test_a_parent_that_runs_again_counts_its_children_again(job: Job) -> None:
    with job.run() as run:
        parent = run.submit("parent()", template=6)
        child = run.submit("draw()", parent)
        run.finish(child, run.write(child))
        run.handle(ReferencesChanged(run.worker_of(parent), [], [child]))
        run.dies(parent)
        assert run.submit("draw()", parent) == child
        assert run.sent() == [parent, child, parent, child], "a large one that was dropped is run again"
        run.finish(parent)
        assert not [row for row in run.node._rows["results"] if row[0] == parent], "what it submitted is under way"
        run.finish(child, run.write(child))
    with job.run() as run:
        assert len(run.open.known.results) == 2, "one place, one result"
        assert run.is_done(run.submit("parent()", template=6))


def test_children_of_an_attempt_that_raised_and_of_the_next_are_two(job: Job) -> None:
    """Each is kept, and found again by the attempt that submits it in the next run."""
    with job.run() as run:
        parent = run.submit("parent()", template=6)
        drawn = []
        for value in (b"first", b"second"):
            drawn.append(run.submit("draw()", parent))
            run.finish(drawn[-1], value)
            run.finish(parent, status=RETRYABLE_ERROR)
            run.children.clear()
        assert run.sent().count(parent) == 3 and len(set(drawn)) == 2
    with job.run() as run:
        assert len(run.open.known.results) == 2
        parent = run.submit("parent()", template=6)
        for value in (b"first", b"second"):
            assert run.value(run.submit("draw()", parent)) == value
            run.finish(parent, status=RETRYABLE_ERROR)
            run.children.clear()
        third = run.submit("draw()", parent)
        assert third in run.sent(), "no result stands for two tasks"


def test_a_parent_is_kept_only_when_what_it_submitted_has_ended(job: Job) -> None:
    with job.run() as run:
        parent = run.submit("parent()")
        child = run.submit("child()", parent)
        grandchild = run.submit("grandchild()", child)
        run.finish(parent)
        run.finish(child)
        assert not run.node._rows.get("results")
    with job.run() as run:
        parent = run.submit("parent()")
        assert not run.is_done(parent)
        child = run.submit("child()", parent)
        grandchild = run.submit("grandchild()", child)
        for task in (parent, child, grandchild):
            run.finish(task)
    with job.run() as run:
        assert run.is_done(run.submit("parent()"))


# ---------------------------------------------------------------- refs in values


def test_objects_in_a_result_come_back_with_it(job: Job) -> None:
    for _ in range(3):
        with job.run() as run:
            parent = run.submit("parent()")
            if job.runs == 1:
                child = run.submit("child()", parent)
                run.finish(child, b"c")
                worker = run.worker_of(parent)
                run.finish(parent, b"[ref]", nested=(child,))
                run.handle(ReferencesChanged(worker, [], [child]))
            (child,) = run.node.objects[parent].nested
            assert run.value(child) == b"c"
            user = run.submit("use(_)", deps=(child,))
            if job.runs == 1:
                run.finish(user)
            assert run.is_done(user), "it has been given the same object"
            run.handle(ReferencesChanged(DRIVER, [], [parent, user]))
            assert not run.node.objects


def test_objects_in_objects_in_results_of_several_runs_come_back(job: Job) -> None:
    """The second run makes the parent anew, around a child that it knew by another ID."""
    for number in range(4):
        with job.run() as run:
            parent = run.submit("parent()")
            if number < 2:
                child = run.submit("child()", parent)
                if not number:
                    grandchild = run.submit("grandchild()", child)
                    run.finish(grandchild, b"g")
                    run.finish(child, b"[g]", nested=(grandchild,))
                else:
                    run.finish(parent, b"[c]", nested=(child,))
            if number:
                (child,) = run.node.objects[parent].nested
            (grandchild,) = run.node.objects[child].nested
            assert (run.value(child), run.value(grandchild)) == (b"[g]", b"g")
            assert not number or [parent][: number == 1] == run.sent()


def test_what_was_put_comes_back_in_results_that_contain_it(job: Job) -> None:
    for number in range(2):
        with job.run() as run:
            shared = run.put("data")
            task = run.submit("wrap([_])", nested=(shared,))
            if not number:
                inner = run.put("more", nested=(shared,), parent=task)
                run.finish(task, b"[p]", nested=(inner,))
            (inner,) = run.node.objects[task].nested
            assert run.value(inner) == b"'more'"
            assert [run.value(one) for one in run.node.objects[inner].nested] == [b"'data'"]


def test_another_content_that_is_put_is_another_argument(job: Job) -> None:
    for number, content in enumerate(("data", "data", "other")):
        with job.run() as run:
            task = run.submit("use(_)", deps=(run.put(content),))
            assert run.is_done(task) == (number == 1)
            if number != 1:
                run.finish(task)


def test_a_result_whose_inner_object_never_came_is_made_anew(job: Job) -> None:
    with job.run() as run:
        parent = run.submit("parent()")
        child = run.submit("child()", parent)
        run.finish(parent, b"[c]", nested=(child,))
        run.finish(child, status=ERROR)
    with job.run() as run:
        assert not run.is_done(run.submit("parent()"))


def test_arguments_that_are_an_object_of_their_own_count_by_their_digest(job: Job) -> None:
    for number in range(2):
        with job.run() as run:
            client = DRIVER
            carrier = ids.put_id(run.root, 1)
            run.handle(ObjectPut(client, carrier, (b"large", 5, ())))
            task = ids.pack_id(ids.children_prefix(run.root), 1, 0)
            spec = TaskSpec(task, 1, b"", (carrier,), digest=digest("f(large)"))
            run.handle(TasksSubmitted(client, run.root, [spec]))
            assert run.is_done(task) == bool(number)
            if not number:
                run.finish(task)


# ---------------------------------------------------------------- actors


def actor(run: Run, parent: bytes = b"", detached: bool = False) -> bytes:
    made = run.submit("A()", parent, template=4, actor=ActorOptions("A", "a" if detached else None, "", detached))
    run.finish(made)
    return made


def test_a_task_that_called_an_actor_which_outlives_it_runs_again_and_so_does_its_parent(job: Job) -> None:
    with job.run() as run:
        one = actor(run)
        parent = run.submit("parent()")
        caller = run.submit("caller()", parent)
        run.finish(run.submit("a.m()", caller, template=5, actor_id=one))
        run.finish(run.submit("bystander()", parent))
        run.finish(caller)
        run.finish(parent)
    with job.run() as run:
        parent = run.submit("parent()")
        assert not run.is_done(parent)
        assert not run.is_done(run.submit("caller()", parent))
        assert run.is_done(run.submit("bystander()", parent))


def test_a_task_that_made_the_actor_itself_is_kept(job: Job) -> None:
    with job.run() as run:
        parent = run.submit("parent()")
        one = actor(run, parent)
        run.finish(run.submit("a.m()", parent, template=5, actor_id=one))
        run.finish(parent)
    with job.run() as run:
        assert run.is_done(run.submit("parent()"))


def test_a_task_that_made_a_detached_actor_runs_again(job: Job) -> None:
    with job.run() as run:
        parent = run.submit("parent()")
        one = actor(run, parent, detached=True)
        run.finish(parent)
        run.handle(ActorKillRequested(DRIVER, one, True))
    with job.run() as run:
        assert not run.is_done(run.submit("parent()"))


def test_results_that_hold_a_handle_or_come_from_an_actor_are_not_kept(job: Job) -> None:
    for _ in range(2):
        with job.run() as run:
            one = actor(run)
            call = run.submit("a.m()", template=5, actor_id=one)
            run.finish(call)
            user = run.submit("use(_)", deps=(call,))
            wrapper = run.submit("wrap()")
            assert {call, user, wrapper} <= set(run.sent())
            run.finish(user)
            run.finish(wrapper, b"[handle]", nested=(one,))


def exact(run: Run, known: bool, code: Any = 1) -> bytes:
    """An actor with exact recovery."""
    made = run.submit("E()", code=code, template=7, actor=ActorOptions("E", None, "", False, -1))
    if not known:
        run.finish(made)
    return made


def call(run: Run, one: bytes, what: str, parent: bytes = b"", **fields: Any) -> bytes:
    return run.submit(what, parent, template=5, actor_id=one, **fields)


def save(run: Run, one: bytes, number: int, state: bytes, nested: tuple[bytes, ...] = ()) -> None:
    value = (state, len(state), nested)
    run.handle(CheckpointTaken(run.worker_of(one), ids.checkpoint_id(one, number), value, True))


def replayed(run: Run, one: bytes, *calls: bytes) -> None:
    """The actor's worker comes up, and executes its log again."""
    run.finish(one)
    for made in calls:
        worker = run.node.actors.actors[one].worker
        assert worker is not None
        run.handle(TasksFinished(worker.client, [(made, OK, b"again", run.now, run.now)]))


def test_an_actors_calls_are_known_in_their_order_and_it_is_made_at_the_first_new_one(job: Job) -> None:
    with job.run() as run:
        one = exact(run, known=False)
        for number in range(5):
            run.finish(call(run, one, f"m({number})"), b"%d" % number)
            if number in (1, 3):
                save(run, one, number, b"state %d" % number)
    with job.run() as run:
        one = exact(run, known=True)
        calls = [call(run, one, f"m({number})") for number in range(5)]
        assert [run.value(made) for made in calls] == [b"0", b"1", b"2", b"3", b"4"] and not run.sent()
        new = call(run, one, "m(5)")
        (restored,) = [command for command in run.commands if isinstance(command, RestoreActor)]
        assert restored.checkpoint[0] == b"state 3"
        replayed(run, one, calls[4])
        assert run.sent() == [one, calls[4], new] and run.value(calls[4]) == b"4"
        run.finish(new, b"5")
    with job.run() as run:
        one = exact(run, known=True)
        assert all(run.is_done(call(run, one, f"m({number})")) for number in range(6)) and not run.sent()


def test_a_call_out_of_order_ends_what_is_known_and_starts_from_a_checkpoint_before_it(job: Job) -> None:
    with job.run() as run:
        one = exact(run, known=False)
        for number in range(4):
            run.finish(call(run, one, f"m({number})"), b"%d" % number)
            if number == 3:
                save(run, one, 1, b"state 3")
    with job.run() as run:
        one = exact(run, known=True)
        first = call(run, one, "m(0)")
        other, second = call(run, one, "m(2)"), call(run, one, "m(1)")
        assert not [command for command in run.commands if isinstance(command, RestoreActor)], "that one knows too much"
        replayed(run, one, first)
        assert run.sent() == [one, first, other, second]
        run.finish(other, b"new")
        run.finish(second, b"new")
    with job.run() as run:
        one = exact(run, known=True)
        values = [run.value(call(run, one, f"m({number})")) for number in (0, 2, 1)]
        assert values == [b"0", b"new", b"new"]
        assert not run.is_done(call(run, one, "m(3)")), "it came after others than these"


@pytest.mark.parametrize("how", ["raised", "depends on what is not kept", "made an actor wait that outlives it"])
def test_after_a_call_that_cannot_be_kept_none_is(job: Job, how: str) -> None:
    for number in range(2):
        with job.run() as run:
            one, plain = exact(run, known=bool(number)), actor(run)
            unkept = call(run, plain, "a.m()")
            run.finish(unkept)
            first = call(run, one, "m(1)")
            if not number:
                run.finish(first)
            assert run.is_done(first)
            deps = (unkept,) if how.startswith("depends") else ()
            second = call(run, one, "m(2)", deps=deps)
            if number:
                replayed(run, one, first)
            if how.startswith("made"):
                run.finish(call(run, plain, "a.m()", second))
            run.finish(second, status=ERROR if how == "raised" else OK)
            third = call(run, one, "m(3)")
            assert not run.is_done(third)
            run.finish(third)


def test_code_that_has_changed_makes_another_actor(job: Job) -> None:
    for code in (1, 2):
        with job.run() as run:
            one = exact(run, known=False, code=code)
            made = call(run, one, "m(1)")
            run.finish(made)


def test_a_call_that_is_given_something_made_anew_is_another(job: Job) -> None:
    for code in (1, 2):
        with job.run() as run:
            one = exact(run, known=code > 1)
            source = run.submit("source()", code=code)
            run.finish(source)
            made = call(run, one, "m(_)", deps=(source,))
            if code > 1:
                assert not run.is_done(made)
                run.finish(one)
            run.finish(made)


def test_a_dormant_actor_ends_with_its_last_handle_and_when_it_is_killed(job: Job) -> None:
    for number in range(3):
        with job.run() as run:
            one = exact(run, known=number > 0)
            made = call(run, one, "m(1)")
            if not number:
                run.finish(made)
            if number == 1:
                run.handle(ReferencesChanged(DRIVER, [], [made, one]))
                assert not run.node.actors.actors and not run.node.objects
            elif number == 2:
                run.handle(ActorKillRequested(DRIVER, one, True))
                assert run.node.objects[call(run, one, "m(1)")].is_error
            assert number == 0 or not run.sent()


def test_results_that_depend_on_known_calls_are_known_too(job: Job) -> None:
    for number in range(2):
        with job.run() as run:
            one = exact(run, known=bool(number))
            made = call(run, one, "m(1)")
            if not number:
                run.finish(made)
            user = run.submit("use(_)", deps=(made,))
            if not number:
                run.finish(user)
            assert run.is_done(user)


def test_what_a_state_refers_to_comes_back_with_its_checkpoint(job: Job) -> None:
    for number in range(2):
        with job.run() as run:
            one = exact(run, known=bool(number))
            made = call(run, one, "m(1)")
            if not number:
                inner = run.put("data", parent=made)
                run.finish(made)
                save(run, one, 1, b"[_]", (inner,))
            else:
                call(run, one, "m(2)")
                (restored,) = [command for command in run.commands if isinstance(command, RestoreActor)]
                (inner,) = run.node.objects[restored.checkpoint[3]].nested
            assert run.value(inner) == b"'data'"


# ---------------------------------------------------------------- files


def test_a_large_result_is_born_where_it_is_kept_and_stays_when_nobody_holds_it(job: Job) -> None:
    with job.run() as run:
        task = run.submit("big()")
        path = run.write(task)
        run.finish(task, path)
        run.handle(ReferencesChanged(DRIVER, [], [task]))
        assert os.path.exists(path)
    with job.run() as run:
        task = run.submit("big()")
        assert run.value(task) == path
        run.handle(ReferencesChanged(DRIVER, [], [task]))
        assert os.path.exists(path)


def test_a_large_object_that_nothing_keeps_is_deleted_when_nobody_holds_it(job: Job) -> None:
    with job.run() as run:
        object_id = ids.put_id(run.root, 1)
        commands = run.handle(BlockRequested(DRIVER, 1, object_id, 100_000))
        ((_, path),) = [command.answer for command in commands if isinstance(command, Reply)]
        object_store.write_file(path, b"x" * 100_000)
        run.handle(ObjectPut(DRIVER, object_id, (path, 100_000, ()), job_storage_hash("x")))
        run.handle(ReferencesChanged(DRIVER, [], [object_id]))
        assert not os.path.exists(path)


def test_files_that_no_row_names_are_swept_out_by_the_next_run(job: Job) -> None:
    with job.run() as run:
        left = run.write(run.submit("big()"))
    with job.run() as run:
        assert not os.path.exists(left)


@pytest.mark.parametrize("template", [1, 3], ids=["ordinary", "max_retries=0"])
def test_a_kept_file_that_cannot_be_read_is_made_anew(job: Job, template: int) -> None:
    with job.run() as run:
        source = run.submit("source()")
        run.finish(source)
        task = run.submit("big(_)", deps=(source,), template=template)
        run.finish(task, run.write(task))
    with job.run() as run:
        source = run.submit("source()")
        task = run.submit("big(_)", deps=(source,), template=template)
        old = run.value(task)
        commands = run.handle(ObjectLost(DRIVER, task, old, "its file is damaged"))
        assert any(isinstance(command, Warn) and "f()" in command.text for command in commands)
        assert run.sent() == [task] and not os.path.exists(old)
        run.finish(task, run.write(task))
        later = run.submit("later(_)", deps=(task,))
        run.finish(later)
    with job.run() as run:
        source = run.submit("source()")
        task = run.submit("big(_)", deps=(source,), template=template)
        assert run.is_done(task) and run.is_done(run.submit("later(_)", deps=(task,)))


def test_a_small_result_that_was_known_and_is_dropped_is_made_anew(job: Job) -> None:
    finish_one(job, "f(1)", value=b"old")
    with job.run() as run:
        task = run.submit("f(1)")
        run.handle(ObjectLost(DRIVER, task, b"old", "it was dropped"))
        assert run.sent() == [task]
        run.finish(task, b"new")
        assert run.value(task) == b"new"


@pytest.mark.parametrize("harm", ["gone", "cut", "flipped"])
def test_a_damaged_file_of_an_inner_object_is_found_before_it_is_relied_on(job: Job, harm: str) -> None:
    with job.run() as run:
        parent = run.submit("parent()")
        child = run.submit("big()", parent)
        path = run.write(child)
        run.finish(child, path)
        run.finish(parent, b"[c]", nested=(child,))
    with open(path, "r+b") as file:
        if harm == "cut":
            file.truncate(1000)
        file.seek(500)
        file.write(b"y")
    if harm == "gone":
        os.unlink(path)
    with job.run() as run:
        assert run.open.troubles
        assert [run.submit("parent()")] == run.sent()


# ---------------------------------------------------------------- any program


class Program:
    """A random script, the same in each run but for what was edited; every task's value is a fresh name."""

    def __init__(self, seed: int) -> None:
        self.seed = seed
        self.codes = {name: 1 for name in "abcd"}
        self.origins: dict[bytes, Any] = {}  # by value: what it was computed by and from
        self.values_made = 0

    def play(self, run: Run, steps: int) -> None:
        """As far as `steps` events go."""
        chance = random.Random(self.seed)
        fate = random.Random(f"{self.seed} {steps}")
        script = [self._call(chance, depth=0) for _ in range(8)]
        open_: dict[bytes, dict[str, Any]] = {}
        made: list[tuple[bytes, Any]] = []  # what the driver has submitted
        while steps:
            steps -= 1
            if script and (not open_ or fate.random() < 0.5):
                self._submit(run, script.pop(0), b"", made, open_)
            elif open_:
                running = [one for one in open_ if one in run.node.lineage.tasks and run.node.lineage.tasks[one].worker]
                if not running:
                    break
                task = fate.choice(running)
                state = open_[task]
                if state["children"]:
                    self._submit(run, state["children"].pop(0), task, state["made"], open_)
                elif fate.random() < 0.1:
                    run.handle(WorkerDied(run.worker_of(task), "SIGKILL", task))
                    for command in run.node.start_workers(1):
                        run.handle(WorkerStarted(command.client, 100 + command.client))  # type: ignore[union-attr]
                        for template_no, options in TEMPLATES.items():
                            run.handle(TemplateDefined(command.client, template_no, options))
                    return  # Its attempts are another test's; here it is the end of the run.
                else:
                    self._finish(run, task, open_)
            else:
                break
        self._check(run)

    def _call(self, chance: random.Random, depth: int) -> dict[str, Any]:
        children = [self._call(chance, depth + 1) for _ in range(chance.choice((0, 0, 1, 2)))] if depth < 2 else []
        return {
            "name": chance.choice("abcd"), "arg": chance.randrange(2), "children": children,
            "deps": [chance.random() for _ in range(chance.choice((0, 0, 1, 2)))], "returns_refs": chance.random() < 0.4,
        }  # fmt: skip

    def _submit(self, run: Run, call: dict[str, Any], parent: bytes, made: list[Any], open_: dict[bytes, Any]) -> None:
        deps = tuple(made[int(where * len(made))][0] for where in call["deps"]) if made else ()
        code = (call["name"], self.codes[call["name"]])
        task = run.submit((call["name"], call["arg"]), parent, code=code, deps=deps)
        made.append((task, call))
        self.calls[task] = (code, call["arg"], deps)
        if not run.is_done(task):
            open_[task] = {"children": list(call["children"]), "made": [], "call": call}

    def _finish(self, run: Run, task: bytes, open_: dict[bytes, Any]) -> None:
        state = open_.pop(task)
        self.values_made += 1
        value = b"value %d" % self.values_made
        code, arg, deps = self.calls[task]
        self.origins[value] = (code, arg, tuple(run.value(one) for one in deps))
        nested = tuple(one for one, _ in state["made"]) if state["call"]["returns_refs"] else ()
        run.finish(task, value, nested)

    calls: dict[bytes, Any]

    def _check(self, run: Run) -> None:
        """Each value was computed by this code from these values, and stands for one task only."""
        seen = set()
        for task, (code, arg, deps) in self.calls.items():
            entry = run.node.objects.get(task)
            if entry is None or entry.data is None or entry.is_error:
                continue
            inputs = tuple(run.value(one) for one in deps)
            assert self.origins[entry.data] == (code, arg, inputs), "a result of something else was used"
            assert entry.data not in seen, "one result stands for two tasks"
            seen.add(entry.data)
            for inner in entry.nested:
                assert not run.node.objects[inner].is_error, "a result came back without what it contains"


@pytest.mark.parametrize("block", range(4))
def test_no_program_ever_gets_a_result_of_something_else(block: int, tmp_path: Any) -> None:
    reused = 0
    for seed in range(block * 10, block * 10 + 10):
        job, program = Job(str(tmp_path / f"{seed}.sqlite")), Program(seed)
        edits = random.Random(seed)
        for _ in range(5):
            with job.run() as run:
                program.calls = {}
                program.play(run, edits.randrange(5, 60))
                reused += run.node.describe("reused")
            if edits.random() < 0.4:
                program.codes[edits.choice("abcd")] += 1
    assert reused > 50, "it did something"
