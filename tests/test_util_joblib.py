import os
import threading

import numpy as np
import pytest

import minray
from minray import state

joblib = pytest.importorskip("joblib")

from minray.util.joblib import register_minray, register_ray  # noqa: E402

pytestmark = pytest.mark.usefixtures("module_session")
register_minray()
register_ray()
delayed, Parallel = joblib.delayed, joblib.Parallel


def square(x):
    return x * x


@pytest.fixture(scope="module")
def minray_backend(module_session):
    with joblib.parallel_backend("minray"):
        yield joblib.parallel.get_active_backend()[0]


@pytest.fixture
def backend(minray_backend):
    """One for most tests: its processes have loaded joblib."""
    with joblib.parallel_backend(minray_backend):
        yield


def test_a_loop_runs_in_other_processes_and_its_results_come_in_order(backend):
    assert Parallel()(delayed(square)(x) for x in range(50)) == [x * x for x in range(50)]
    pids = Parallel(n_jobs=2)(delayed(os.getpid)() for _ in range(8))
    assert os.getpid() not in pids and len(set(pids)) <= 2


def test_n_jobs_counts_from_the_sessions_cpus(backend):
    assert joblib.effective_n_jobs(-1) == 2 and joblib.effective_n_jobs(-2) == 1 and joblib.effective_n_jobs(3) == 3
    with pytest.raises(ValueError, match="n_jobs == 0"):
        Parallel(n_jobs=0)([delayed(square)(1)])
    assert Parallel(n_jobs=1)([delayed(os.getpid)()]) == [os.getpid()]


def test_the_processes_stay_from_loop_to_loop():
    with joblib.parallel_backend("minray", n_jobs=2):
        first = set(Parallel()(delayed(os.getpid)() for _ in range(8)))
        second = set(Parallel()(delayed(os.getpid)() for _ in range(8)))
    assert first & second


def test_results_may_be_taken_as_they_come(backend):
    found = Parallel(n_jobs=2, return_as="generator")(delayed(square)(x) for x in range(5))
    assert list(found) == [0, 1, 4, 9, 16]
    found = Parallel(n_jobs=2, return_as="generator_unordered")(delayed(square)(x) for x in range(5))
    assert sorted(found) == [0, 1, 4, 9, 16]


def test_short_calls_travel_in_batches():
    with joblib.parallel_backend("minray", n_jobs=2):
        Parallel()(delayed(square)(x) for x in range(3000))
    batches = state.list_tasks(filters=[("name", "=", "BatchedCalls")], limit=10_000)
    assert 0 < len(batches) < 1500


def test_an_error_ends_the_loop_and_the_backend_goes_on(backend):
    with pytest.raises(ZeroDivisionError):
        Parallel(n_jobs=2)(delayed(lambda x: 1 / x)(x) for x in (1, 0, 2))
    assert Parallel(n_jobs=2)(delayed(square)(x) for x in range(3)) == [0, 1, 4]


def test_a_large_array_is_stored_once_for_all_calls_of_a_loop(backend, monkeypatch):
    array = np.arange(500_000, dtype=np.float64)

    put, stored = minray.put, []
    monkeypatch.setattr(minray, "put", lambda value: stored.append(type(value)) or put(value))

    def look(array, number, again=None):
        return float(array[number]), array.flags.writeable, again is not None

    found = Parallel(n_jobs=2, batch_size=1)(delayed(look)(array, number, again=array) for number in range(6))
    assert found == [(number, False, True) for number in range(6)]
    assert stored.count(np.ndarray) == 1
    array[0] = 7  # In the next loop it is as it is then.
    assert Parallel(n_jobs=2)(delayed(look)(array, 0) for _ in range(2))[0][0] == 7


def test_a_loop_in_a_loop_runs_in_threads_there(backend):
    def inner(x):
        return Parallel(n_jobs=2)(delayed(lambda y: (x * y, threading.get_ident(), os.getpid()))(y) for y in range(3))

    found = Parallel(n_jobs=2)(delayed(inner)(x) for x in range(3))
    assert [[value for value, _, _ in row] for row in found] == [[x * y for y in range(3)] for x in range(3)]
    assert all(len({pid for _, _, pid in row}) == 1 and row[0][2] != os.getpid() for row in found)


def test_options_of_the_processes_are_checked():
    with joblib.parallel_backend("minray", n_jobs=3, num_cpus=1), pytest.raises(ValueError, match="3 processes"):
        Parallel()(delayed(square)(x) for x in range(3))
    with joblib.parallel_backend("minray", n_jobs=2, num_cpu=1), pytest.raises(TypeError, match="num_cpus"):
        Parallel()(delayed(square)(x) for x in range(3))


def test_processes_have_as_many_threads_for_arithmetic_as_they_are_told():
    pytest.importorskip("threadpoolctl")

    def threads():
        import threadpoolctl

        np.ones((2, 2)) @ np.ones((2, 2))
        return os.environ["OMP_NUM_THREADS"], {pool["num_threads"] for pool in threadpoolctl.threadpool_info()}

    for count in (1, 3):  # One of them is not what the library would have by itself.
        with joblib.parallel_config("minray", n_jobs=2, inner_max_num_threads=count):
            assert Parallel()(delayed(threads)() for _ in range(2)) == [(str(count), {count})] * 2


def test_rays_names_are_there():
    with joblib.parallel_backend("ray", n_jobs=2):
        assert os.getpid() not in Parallel()(delayed(os.getpid)() for _ in range(4))
    from minray.util.joblib.backend import MinrayBackend
    from minray.util.joblib.ray_backend import RayBackend

    assert RayBackend is MinrayBackend and minray.util.joblib.register_ray is register_ray


def test_scikit_learn_searches_a_grid(backend):
    pytest.importorskip("sklearn")
    from sklearn.datasets import make_classification
    from sklearn.linear_model import LogisticRegression
    from sklearn.model_selection import GridSearchCV

    X, y = make_classification(120, 5, random_state=0)
    grid = {"C": [0.01, 1.0]}
    search = GridSearchCV(LogisticRegression(), grid, cv=2, n_jobs=-1).fit(X, y)
    with joblib.parallel_backend("sequential"):
        alone = GridSearchCV(LogisticRegression(), grid, cv=2).fit(X, y)
    assert search.best_params_ == alone.best_params_
    assert np.array_equal(search.cv_results_["mean_test_score"], alone.cv_results_["mean_test_score"])
    ran = state.list_tasks(filters=[("name", "=", "BatchedCalls")], limit=1)
    assert ran and ran[0].state == "FINISHED"
