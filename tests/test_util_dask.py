import os
import time

import numpy as np
import pytest

import minray
from minray import state

dask = pytest.importorskip("dask")

from minray.util.dask import disable_dask_on_ray, enable_dask_on_ray, minray_dask_get, ray_dask_get  # noqa: E402

pytestmark = pytest.mark.usefixtures("module_session")


def inc(x):
    return x + 1


def add(x, y):
    return x + y


def test_a_graph_is_computed_in_the_shape_of_its_keys():
    graph = {"x": 1, "y": (inc, "x"), "z": (add, "y", (inc, "y")), "same": "z", "list": ["x", (inc, "x")]}
    assert minray_dask_get(graph, "z") == 5
    assert minray_dask_get(graph, ["same", ["x", "y"], "z"]) == (5, (1, 2), 5)
    assert minray_dask_get(graph, "list") == [1, 2]
    assert ray_dask_get is minray_dask_get


def test_delayed_calls_run_in_other_processes_under_their_names():
    where = dask.delayed(os.getpid)(dask_key_name="where-am-i")
    assert where.compute(scheduler=minray_dask_get) != os.getpid()
    assert state.list_tasks(filters=[("name", "=", "where-am-i")])[0].state == "FINISHED"


def test_a_result_that_several_need_is_computed_once(tmp_path):
    def mark():
        (tmp_path / str(len(list(tmp_path.iterdir())))).touch()
        return 1

    once = dask.delayed(mark)()
    both = dask.compute(dask.delayed(inc)(once), dask.delayed(add)(once, once), scheduler=minray_dask_get)
    assert both == (2, 2) and len(list(tmp_path.iterdir())) == 1


def test_an_error_is_that_of_the_call():
    broken = dask.delayed(add)(dask.delayed(lambda: 1 / 0)(), 1)
    with pytest.raises(ZeroDivisionError):
        broken.compute(scheduler=minray_dask_get)


def test_options_go_to_the_tasks_and_unknown_ones_are_refused():
    call = dask.delayed(lambda: minray.get_runtime_context().get_assigned_resources())()
    assert call.compute(scheduler=minray_dask_get, ray_remote_args={"num_cpus": 2})["CPU"] == 2
    with pytest.raises(TypeError, match="num_worker"):
        call.compute(scheduler=minray_dask_get, num_worker=3)
    with pytest.raises(TypeError, match="num_cpu"):
        call.compute(scheduler=minray_dask_get, ray_remote_args={"num_cpu": 3})


def test_it_is_dasks_scheduler_while_it_is_enabled():
    with enable_dask_on_ray():
        assert dask.delayed(os.getpid)().compute() != os.getpid()
        assert dask.config.get("dataframe.shuffle.method") == "tasks"
    assert dask.config.get("scheduler", None) is None
    with enable_dask_on_ray(shuffle=None):
        assert dask.config.get("scheduler") is minray_dask_get
        with disable_dask_on_ray():
            assert dask.config.get("scheduler") is None


def test_bags_and_large_intermediate_results():
    import dask.bag

    assert dask.bag.from_sequence(range(100), npartitions=5).map(inc).filter(lambda x: x % 2).sum().compute(
        scheduler=minray_dask_get
    ) == sum(x + 1 for x in range(100) if (x + 1) % 2)
    parts = [dask.delayed(np.full)(100_000, x) for x in range(4)]
    total = dask.delayed(lambda arrays: sum(map(np.sum, arrays)))(parts)
    assert total.compute(scheduler=minray_dask_get) == 600_000


def test_intermediate_results_are_freed_when_they_have_been_read():
    def objects_left(array):
        """How many there are in the end; they go when the driver has heard that they were read."""
        deadline = time.monotonic() + 30
        while (count := minray.api._query("memory")["objects"]) > 10 and time.monotonic() < deadline:
            time.sleep(0.01)
        return count

    node = dask.delayed(np.zeros)(10)
    for _ in range(30):
        node = dask.delayed(add)(node, 1)
    assert dask.delayed(objects_left)(node).compute(scheduler=minray_dask_get) <= 10
