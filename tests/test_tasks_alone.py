"""Tasks in sessions of their own: one CPU, GPUs, resources by name, what a worker may keep waiting."""

import gc
import os
import time

import pytest

import minray


@minray.remote
def add(a, b=0):
    return a + b


def wait_for(path):
    """In a task: until the file is there.  Nothing can announce it: it crosses processes."""
    while not os.path.exists(path):
        time.sleep(0.001)


def started(path, count=1, timeout_s=60):
    deadline = time.monotonic() + timeout_s
    while not os.path.exists(path) or os.path.getsize(path) < count:
        assert time.monotonic() < deadline, f"{path}: the task has not started"
        time.sleep(0.001)


def test_tasks_nested_20_deep_run_on_one_cpu():
    @minray.remote
    def nest(depth):
        return 0 if depth == 0 else 1 + minray.get(nest.remote(depth - 1))

    with minray.init(num_cpus=1):
        assert minray.get(nest.remote(20), timeout=60) == 20


def test_fan_out_recursion_runs_on_one_cpu():
    @minray.remote
    def fib(n):
        return n if n < 2 else sum(minray.get([fib.remote(n - 1), fib.remote(n - 2)]))

    with minray.init(num_cpus=1):
        assert minray.get(fib.remote(7), timeout=60) == 13


def test_gpus_are_given_to_tasks_by_number_and_hidden_from_others():
    @minray.remote(num_cpus=0)
    def visible():
        return os.environ["CUDA_VISIBLE_DEVICES"], minray.get_gpu_ids()

    @minray.remote(num_cpus=0, num_gpus=1)
    def hold(begun, go):
        open(begun, "a").write("x")
        wait_for(go)
        return minray.get_gpu_ids()

    with minray.init(num_cpus=2, num_gpus=2):
        assert minray.get(visible.remote()) == ("", [])
        assert minray.get(visible.options(num_gpus=2).remote()) == ("0,1", [0, 1])
        shown, ids = minray.get(visible.options(num_gpus=1).remote())
        assert shown == str(ids[0])
        assert minray.get(visible.remote()) == ("", [])


def test_two_tasks_with_a_gpu_each_have_different_ones(tmp_path):
    @minray.remote(num_gpus=1)
    def hold(begun, go):
        open(begun, "a").write("x")
        wait_for(go)
        return minray.get_gpu_ids()[0]

    begun, go = str(tmp_path / "begun"), tmp_path / "go"
    with minray.init(num_cpus=4, num_gpus=2):
        refs = [hold.remote(begun, str(go)) for _ in range(2)]
        started(begun, 2)
        assert minray.available_resources().get("GPU", 0) == 0
        go.touch()
        assert sorted(minray.get(refs, timeout=60)) == [0, 1]


def test_fractions_of_a_gpu_share_one(tmp_path):
    @minray.remote(num_gpus=0.5)
    def hold(begun, go):
        open(begun, "a").write("x")
        wait_for(go)
        return minray.get_gpu_ids()

    begun, go = str(tmp_path / "begun"), tmp_path / "go"
    with minray.init(num_cpus=4, num_gpus=2):
        refs = [hold.remote(begun, str(go)) for _ in range(2)]
        started(begun, 2)
        go.touch()
        assert minray.get(refs, timeout=60) == [[0], [0]]


def test_gpus_keep_the_numbers_that_the_driver_was_given(monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")

    @minray.remote(num_gpus=2)
    def visible():
        return os.environ["CUDA_VISIBLE_DEVICES"], minray.get_gpu_ids()

    with minray.init(num_cpus=1):
        assert minray.cluster_resources()["GPU"] == 2
        assert minray.get(visible.remote()) == ("3,5", [3, 5])


def test_custom_resources_bound_how_many_run_at_once(tmp_path):
    @minray.remote(resources={"licence": 0.5}, num_cpus=0)
    def hold(begun, go):
        open(begun, "a").write("x")
        wait_for(go)

    begun, go = str(tmp_path / "begun"), tmp_path / "go"
    with minray.init(num_cpus=4, resources={"licence": 1}):
        assert minray.cluster_resources()["licence"] == 1
        refs = [hold.remote(begun, str(go)) for _ in range(3)]
        started(begun, 2)
        assert "licence" not in minray.available_resources()
        assert minray.get(add.remote(1, 1), timeout=60) == 2  # Other work is not held up.
        assert os.path.getsize(begun) == 2
        go.touch()
        minray.get(refs, timeout=60)


@minray.remote
def compute_until(path):
    while path and not os.path.exists(path):
        pass


def test_a_finished_result_is_seen_while_the_next_task_of_that_worker_runs_long(tmp_path):
    go = tmp_path / "go"
    with minray.init(num_cpus=1):
        minray.get([compute_until.remote("") for _ in range(50)])  # Known to be short.
        first, second = compute_until.remote(""), compute_until.remote(str(go))
        minray.get(first, timeout=60)  # Else it would come with the second.
        assert minray.wait([second], timeout=0) == ([], [second])
        go.touch()
        minray.get(second, timeout=60)


def test_a_result_that_waits_for_company_is_sent_though_the_caretaker_sleeps_in_the_poll(tmp_path):
    go = tmp_path / "go"

    @minray.remote
    def long_enough_for_the_caretaker_to_lead():
        time.sleep(0.05)

    with minray.init(num_cpus=1):
        minray.get([compute_until.remote("") for _ in range(50)])  # Known to be short.
        refs = [long_enough_for_the_caretaker_to_lead.remote(), compute_until.remote(""), compute_until.remote(str(go))]
        minray.get(refs[1], timeout=60)
        assert minray.wait(refs[2:], timeout=0) == ([], refs[2:])
        go.touch()
        minray.get(refs, timeout=60)


def test_a_worker_makes_no_cyclic_garbage_either():
    @minray.remote
    def work(fail=False):
        gc.disable()
        if fail:
            raise ValueError("with a traceback, which knows frames, which know it")

    @minray.remote
    def collected():
        found = gc.collect()
        gc.enable()
        return found

    with minray.init(num_cpus=1):
        minray.get([work.remote() for _ in range(10)] + [collected.remote()])
        minray.get([work.remote() for _ in range(300)])
        for _ in range(20):
            with pytest.raises(ValueError):
                minray.get(work.remote(fail=True))
        assert minray.get(collected.remote()) < 20
