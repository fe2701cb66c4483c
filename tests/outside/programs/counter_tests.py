"""A user's unit tests, with a session shared by the module, as Ray's tips for testing show.  Run by `-m pytest`."""

import pytest
import ray


@pytest.fixture(scope="module")
def ray_session():
    context = ray.init(num_cpus=2, include_dashboard=False)
    yield context
    ray.shutdown()


@ray.remote
class Counter:
    def __init__(self):
        self.value = 0

    def add(self, n):
        if n < 0:
            raise ValueError("only up")
        self.value += n
        return self.value


def test_a_counter_counts(ray_session):
    counter = Counter.remote()
    assert ray.get([counter.add.remote(n) for n in (1, 2, 3)]) == [1, 3, 6]


def test_errors_have_their_class(ray_session):
    with pytest.raises(ValueError, match="only up"):
        ray.get(Counter.remote().add.remote(-1))
    with pytest.raises(ray.exceptions.RayTaskError):
        ray.get(Counter.remote().add.remote(-1))


def test_names_can_be_replaced(ray_session, monkeypatch):
    monkeypatch.setattr(ray, "get", lambda ref: "replaced")
    assert ray.get(ray.put(1)) == "replaced"
    monkeypatch.undo()
    assert ray.get(ray.put(1)) == 1


def test_the_context_is_a_mapping(ray_session):
    assert ray_session["node_id"] == ray.nodes()[0]["NodeID"] and ray_session.dashboard_url is None
