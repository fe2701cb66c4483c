"""Resources, queues, leases: no objects, no processes."""

from __future__ import annotations

from typing import Any

import pytest

from minray.lineage import Task, Template
from minray.messages import AssignResources, StartWorker, TakeBack
from minray.policy import Policy
from minray.scheduler import IDLE_WORKER_S, TAKE_BACK_AFTER_S, Scheduler, WorkerRecord
from minray.task_spec import FAILED, SUBMITTED_TO_WORKER, UNIT, TaskOptions, TaskSpec


class Bench:
    """A scheduler and the least that it needs around it."""

    def __init__(self, workers: int = 1, **resources: float) -> None:
        self.out: list[Any] = []
        self.ran: list[tuple[int, list[int]]] = []  # (worker, its new tasks)
        amounts = {name: round(amount * UNIT) for name, amount in (resources or {"CPU": 1}).items()}
        self.scheduler = Scheduler(amounts, Policy(), self.out, self.run)
        self.templates: dict[Any, Template] = {}
        self.made = 0
        for _ in range(workers):
            self.start()

    def run(self, worker: WorkerRecord, tasks: list[Task], now: float) -> None:
        worker.progressed_s = now if not worker.in_flight else worker.progressed_s
        for task in tasks:
            task.state, task.worker = SUBMITTED_TO_WORKER, worker
            worker.in_flight[task.spec.task_id] = task
        self.ran.append((worker.client, [task.no for task in tasks]))

    def start(self) -> WorkerRecord:
        worker = self.scheduler.start_worker()
        self.scheduler.worker_started(worker, 1, 0.0)
        return worker

    def task(self, exclusive: bool = False, mean_s: float | None = None, **resources: float) -> Task:
        wants = tuple(sorted((name, round(amount * UNIT)) for name, amount in (resources or {"CPU": 1}).items() if amount))
        key = (wants, exclusive)
        if key not in self.templates:
            shape = self.scheduler.shape_for(wants, exclusive)
            self.templates[key] = Template(0, TaskOptions(0, b"", "f", resources=wants), shape)
        self.templates[key].mean_s = mean_s
        self.made += 1
        return Task(TaskSpec(b"%d" % self.made, 0), self.templates[key], self.made, 0, 0, 0.0)

    def submit(self, *tasks: Task, now: float = 0.0) -> list[tuple[int, list[int]]]:
        for task in tasks:
            self.scheduler.enqueue(task)
        return self.dispatch(now)

    def finish(self, task: Task, now: float = 0.0) -> list[tuple[int, list[int]]]:
        worker = task.worker
        assert worker is not None
        del worker.in_flight[task.spec.task_id]
        if not worker.in_flight:
            self.scheduler.finished_one(worker, now)
        return self.dispatch(now)

    def dispatch(self, now: float = 0.0) -> list[tuple[int, list[int]]]:
        self.ran.clear()
        self.out.clear()
        self.scheduler.dispatch(now)
        self.scheduler.check()
        return self.ran[:]


def test_a_task_goes_to_an_idle_worker_and_its_resources_come_back_when_it_ends() -> None:
    bench = Bench(CPU=2)
    task = bench.task()
    assert bench.submit(task) == [(1, [1])]
    assert bench.out == [AssignResources(1, 1.0, (), {"CPU": 1.0})]
    assert bench.scheduler.available == {"CPU": UNIT}
    assert bench.finish(task) == []
    assert bench.scheduler.available == {"CPU": 2 * UNIT} and list(bench.scheduler.idle) == [1]


def test_tasks_are_levelled_over_the_workers() -> None:
    bench = Bench(workers=2, CPU=2)
    assert bench.submit(*(bench.task() for _ in range(4))) == [(1, [1, 2]), (2, [3, 4])]


def test_a_worker_is_handed_no_more_than_the_policy_says() -> None:
    bench = Bench(CPU=1)
    assert bench.submit(*(bench.task(mean_s=0.02) for _ in range(10))) == [(1, [1, 2, 3, 4])]


def test_a_worker_is_started_when_resources_are_free_and_nobody_is_idle() -> None:
    bench = Bench(workers=0, CPU=2)
    assert bench.submit(*(bench.task() for _ in range(5))) == []
    assert bench.out == [StartWorker(1), StartWorker(2)]
    assert bench.dispatch() == [] and bench.out == [], "those that are starting are not started again"


def test_a_task_that_cannot_run_yet_does_not_hold_up_one_that_can() -> None:
    bench = Bench(workers=2, CPU=2, license=1)
    first, second = bench.task(license=1), bench.task(license=1)
    bench.submit(first)
    bench.submit(second)
    assert bench.submit(bench.task(CPU=1)) == [(1, [3])]


def test_a_blocked_worker_lends_its_cpu_and_nothing_else() -> None:
    bench = Bench(workers=2, CPU=1, license=1)
    parent = bench.task(CPU=1, license=1)
    bench.submit(parent)
    assert bench.submit(bench.task()) == []
    assert parent.worker is not None
    bench.scheduler.block(parent.worker)
    assert bench.scheduler.available == {"CPU": UNIT, "license": 0}
    assert bench.dispatch() == [(1, [2])]


def test_it_takes_its_cpu_again_at_once_and_nothing_new_starts_until_the_debt_is_paid() -> None:
    bench = Bench(workers=2, CPU=1)
    parent, child, later = bench.task(), bench.task(mean_s=1.0), bench.task(CPU=0.5)
    bench.submit(parent)
    assert parent.worker is not None
    bench.scheduler.block(parent.worker)
    bench.submit(child)
    bench.scheduler.unblock(parent.worker)
    assert bench.scheduler.available == {"CPU": -UNIT}
    assert bench.submit(later) == []
    assert bench.finish(child) == []
    assert bench.finish(parent) == [(2, [3])]


def test_two_waits_of_one_worker_lend_one_cpu() -> None:
    bench = Bench(CPU=1)
    task = bench.task()
    bench.submit(task)
    assert task.worker is not None
    for _ in range(2):
        bench.scheduler.block(task.worker)
    assert bench.scheduler.available == {"CPU": UNIT}
    for _ in range(2):
        bench.scheduler.unblock(task.worker)
    assert bench.scheduler.available == {"CPU": 0}


def test_a_worker_that_dies_blocked_has_nothing_left_to_give_back() -> None:
    bench = Bench(CPU=1)
    task = bench.task()
    bench.submit(task)
    assert task.worker is not None
    bench.scheduler.block(task.worker)
    bench.scheduler.worker_gone(task.worker)
    bench.scheduler.check()
    assert bench.scheduler.available == {"CPU": UNIT}


def test_an_actor_has_a_worker_of_its_own() -> None:
    bench = Bench(CPU=1)
    assert bench.submit(bench.task(exclusive=True, CPU=0), bench.task(exclusive=True, CPU=0)) == [(1, [1])]
    assert bench.out[-1] == StartWorker(2)


def test_tasks_without_demands_are_bounded_all_the_same() -> None:
    bench = Bench(workers=0, CPU=1)
    bench.submit(*(bench.task(CPU=0) for _ in range(100)))
    assert len(bench.out) == 8


@pytest.mark.parametrize(("wants", "given"), [((0.5, 0.5, 0.5), [(0,), (0,), (1,)]), ((0.5, 1), [(0,), (1,)]), ((2,), [(0, 1)])])
def test_whole_gpus_stay_whole(wants: tuple[float, ...], given: list[tuple[int, ...]]) -> None:
    bench = Bench(workers=4, GPU=2)
    tasks = [bench.task(exclusive=True, GPU=amount) for amount in wants]
    for task, gpus in zip(tasks, given):
        bench.scheduler.enqueue(task)
        bench.scheduler.dispatch(0.0)
        assert task.worker is not None and task.worker.gpu_ids == gpus


def test_a_gpu_in_halves_is_not_a_whole_one() -> None:
    bench = Bench(workers=4, GPU=2)
    for amount in (0.7, 0.7):
        bench.scheduler.enqueue(bench.task(exclusive=True, GPU=amount))
        bench.scheduler.dispatch(0.0)
    assert bench.scheduler.available["GPU"] == round(0.6 * UNIT)
    big = bench.task(exclusive=True, GPU=0.6)
    bench.scheduler.enqueue(big)
    bench.scheduler.dispatch(0.0)
    assert big.worker is None, "0.3 are left of each, and no task is given pieces of two"


def test_an_idle_worker_takes_half_of_what_waits_behind_a_long_task() -> None:
    bench = Bench(CPU=2)
    tasks = [bench.task() for _ in range(4)]
    bench.submit(*tasks)
    bench.scheduler.start_worker()
    bench.scheduler.worker_started(bench.scheduler.workers[2], 1, 0.0)
    bench.dispatch()
    assert bench.out == [TakeBack(1, 2)]
    bench.dispatch()
    assert bench.out == [], "it is asked once"


def test_short_tasks_are_left_where_they_are_until_they_turn_out_to_be_long() -> None:
    bench = Bench(CPU=2)
    bench.submit(*(bench.task(mean_s=0.0001) for _ in range(4)))
    bench.start()
    bench.dispatch(now=0.001)
    assert bench.out == [] and bench.scheduler.wake_at == pytest.approx(0.001 + TAKE_BACK_AFTER_S)
    assert bench.scheduler.tick(0.02) == []
    bench.dispatch(now=0.02)
    assert bench.out == [TakeBack(1, 2)]


def test_workers_beyond_the_cpus_end_after_a_while_the_longest_idle_first() -> None:
    bench = Bench(workers=3, CPU=1)
    assert bench.scheduler.wake_at == IDLE_WORKER_S
    assert bench.scheduler.tick(IDLE_WORKER_S / 2) == [] and bench.scheduler.wake_at == IDLE_WORKER_S
    assert [worker.client for worker in bench.scheduler.tick(IDLE_WORKER_S)] == [1, 2]


def test_cancelled_tasks_are_passed_over() -> None:
    bench = Bench(CPU=1)
    tasks = [bench.task(mean_s=1.0) for _ in range(10)]
    bench.submit(*tasks)
    assert len(bench.scheduler.workers[1].in_flight) == 2
    for number in (2, 5, 9):
        bench.scheduler.remove(tasks[number])
        tasks[number].state = FAILED
        bench.scheduler.check()
    ran = []
    for task in tasks:
        if task.state != FAILED:
            ran += [number for _, numbers in bench.finish(task) for number in numbers]
    assert ran == [4, 5, 7, 8, 9]
    assert not bench.scheduler.active


def test_a_queue_of_cancelled_tasks_is_empty() -> None:
    bench = Bench(CPU=1)
    tasks = [bench.task(mean_s=1.0) for _ in range(6)]
    bench.submit(*tasks)
    for task in tasks[2:]:
        bench.scheduler.remove(task)
        task.state = FAILED
    assert not bench.scheduler.active and not tasks[0].template.shape.queue
    assert bench.dispatch() == []


def test_cancelling_is_as_cheap_in_a_long_queue_as_in_a_short_one() -> None:
    bench = Bench(workers=0, CPU=1)
    tasks = [bench.task() for _ in range(20_000)]
    bench.submit(*tasks)
    queue = tasks[0].template.shape.queue
    rebuilt = 0
    for task in reversed(tasks):
        length = len(queue)
        bench.scheduler.remove(task)
        task.state = FAILED
        rebuilt += length if len(queue) < length else 0
    assert rebuilt < 4 * len(tasks), "all the copying together is linear"


def test_a_task_that_was_handed_to_a_busy_worker_gets_one_of_its_own_when_an_actor_took_the_one_it_counted_on() -> None:
    bench = Bench(1, CPU=2)
    busy, behind, actor = bench.task(), bench.task(), bench.task(exclusive=True, CPU=0)
    bench.submit(busy)
    assert bench.submit(actor) == []
    assert [type(command) for command in bench.out[-1:]] == [StartWorker]
    assert bench.submit(behind) == [(1, [2])]  # A worker is on its way, so none is started for this one.
    started = bench.scheduler.workers[2]
    bench.scheduler.worker_started(started, 1, 0.0)
    assert bench.dispatch(0.0) == [(2, [3])]
    assert bench.out[-1:] == [StartWorker(3)]
    bench.scheduler.worker_started(bench.scheduler.workers[3], 1, TAKE_BACK_AFTER_S)
    bench.dispatch(TAKE_BACK_AFTER_S)
    assert bench.out[-1:] == [TakeBack(1, 1)]
