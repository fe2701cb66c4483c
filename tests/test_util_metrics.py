import threading

import pytest

import minray
from minray import ids
from minray.util import metrics


@pytest.fixture(autouse=True)
def own_session(session):
    """Values belong to a session."""


def values():
    return {(row["name"], *row["tags"].values()): row["value"] for row in metrics.snapshot()}


def test_counters_of_all_processes_add_up_by_their_tags():
    done = metrics.Counter("done", "what is done", tag_keys=("kind",))

    @minray.remote
    def work(kind):
        done.inc(2, tags={"kind": kind})

    minray.get([work.remote(kind) for kind in ("a", "b", "a")])
    done.inc(tags={"kind": "a"})
    rows = metrics.snapshot(wait_for={"done": 7})
    assert rows == [
        {"name": "done", "type": "counter", "description": "what is done", "tags": {"kind": "a"}, "value": 5.0},
        {"name": "done", "type": "counter", "description": "what is done", "tags": {"kind": "b"}, "value": 2.0},
    ]


def test_of_a_gauge_the_last_value_holds():
    level = metrics.Gauge("level")
    level.set(3)
    level.set(1.5)
    level.set(None)
    assert values() == {("level",): 1.5}
    level.set(-2)
    assert values() == {("level",): -2}


def test_a_gauge_that_was_set_earlier_and_arrives_later_changes_nothing():
    old, new = (1.0, 10.0), (2.0, 20.0)
    assert metrics._merged("gauge", new, old) == metrics._merged("gauge", old, new) == new


def test_a_histogram_counts_what_is_at_most_each_boundary():
    sizes = metrics.Histogram("sizes", boundaries=[10, 1], tag_keys=("node",))
    for size in (0.5, 1, 2, 100):
        sizes.observe(size, tags={"node": "n"})
    expected = {"boundaries": [1.0, 10.0], "buckets": [2, 1, 1], "count": 4, "sum": 103.5}
    assert values() == {("sizes", "n"): expected}
    assert sizes.info["boundaries"] == [1.0, 10.0]
    metrics.snapshot()
    sizes.observe(5, tags={"node": "n"})
    assert values()["sizes", "n"]["buckets"] == [2, 2, 1]


def test_default_tags_stand_in_for_those_that_are_not_given():
    calls = metrics.Counter("calls", tag_keys=("user", "how")).set_default_tags({"user": "ann"})
    calls.inc(tags={"how": "fast"})
    calls.inc(tags={"how": "fast", "user": "bob"})
    assert values() == {("calls", "ann", "fast"): 1.0, ("calls", "bob", "fast"): 1.0}
    assert calls.info == {"name": "calls", "description": "", "tag_keys": ("user", "how"), "default_tags": {"user": "ann"}}


def test_mistakes_are_refused_where_they_are_made():
    counter = metrics.Counter("c", tag_keys=("a",))
    for call, error in (
        (lambda: metrics.Counter(""), ValueError),
        (lambda: metrics.Gauge("1st"), ValueError),
        (lambda: metrics.Counter("c", tag_keys="a"), TypeError),
        (lambda: metrics.Histogram("h"), ValueError),
        (lambda: metrics.Histogram("h", boundaries=[0, 1]), ValueError),
        (lambda: counter.inc(0, tags={"a": "x"}), ValueError),
        (lambda: counter.inc("1", tags={"a": "x"}), TypeError),
        (lambda: counter.inc(), ValueError),
        (lambda: counter.inc(tags={"b": "x"}), ValueError),
        (lambda: counter.inc(tags={"a": 1}), TypeError),
        (lambda: counter.set_default_tags({"b": "x"}), ValueError),
    ):
        with pytest.raises(error):
            call()
    assert metrics.snapshot() == []


def test_a_value_is_seen_from_other_processes_without_a_word_more():
    metrics.Counter("seen").inc()

    @minray.remote
    def look():
        return metrics.snapshot(wait_for={"seen": 1})

    assert minray.get(look.remote())[0]["value"] == 1
    with pytest.raises(TimeoutError, match="seen is 1"):
        metrics.snapshot(wait_for={"seen": 2}, timeout_s=0.05)


def test_counting_in_a_callback_of_a_future_does_not_block_the_loop():
    counted = metrics.Counter("counted")
    ended = threading.Event()
    future = minray.remote(lambda: None).remote().future()
    future.add_done_callback(lambda _: (counted.inc(), ended.set()))
    assert ended.wait(30)
    metrics.snapshot(wait_for={"counted": 1})


def test_what_is_sent_is_no_child_of_the_task_that_counts():
    counter = metrics.Counter("n")

    @minray.remote
    def child():
        return minray.get_runtime_context().get_task_id()

    @minray.remote
    def parent(count):
        if count:
            counter.inc()
            metrics._outbox.send()
        return ids.counter_of(bytes.fromhex(minray.get(child.remote())))

    # Were it one, a second attempt of the task would take its result for that of the first child.
    assert minray.get([parent.remote(False), parent.remote(True)]) == [1, 1]


def test_values_in_the_text_format_of_prometheus():
    metrics.Counter("hits", "pages read", tag_keys=("page",)).inc(3, tags={"page": 'a"b'})
    metrics.Gauge("level").set(0.5)
    metrics.Histogram("t_s", boundaries=[1]).observe(2)
    assert metrics.prometheus() == (
        '# HELP hits_total pages read\n# TYPE hits_total counter\nhits_total{page="a\\"b"} 3\n'
        "# HELP level \n# TYPE level gauge\nlevel 0.5\n"
        '# HELP t_s \n# TYPE t_s histogram\nt_s_bucket{le="1"} 0\nt_s_bucket{le="+Inf"} 1\nt_s_sum 2\nt_s_count 1\n'
    )


def test_the_next_session_begins_with_nothing():
    metrics.Counter("old").inc()
    minray.shutdown()
    with minray.init(num_cpus=1):
        metrics.Counter("new").inc()
        assert values() == {("new",): 1.0}
    minray.init(num_cpus=2)
