import subprocess
import sys
import threading

import pytest

import minray
from minray import util
from minray.util.tqdm import safe_print, tqdm


def test_minray_does_not_load_what_nobody_asked_for():
    program = "import minray.util, sys; print([m for m in sys.modules if m.startswith('minray.util.')])"
    shown = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout
    assert shown == "[]\n"


def test_every_name_is_there_and_what_is_not_is_refused_with_a_sentence():
    for name in (*util.__all__, *util._MODULES):
        if name != "dask":  # It needs what need not be installed.
            assert getattr(util, name) is not None
    with pytest.raises(AttributeError, match="not there yet"):
        _ = util.tpu
    with pytest.raises(AttributeError, match="no attribute"):
        _ = util.nothing


def test_check_serialize_names_the_culprit():
    util.check_serialize({"a": [1, 2]})
    with pytest.raises(TypeError, match="lock"):
        util.check_serialize({"a": threading.Lock()})


def test_the_namespaces_of_named_actors_are_told_apart(session):
    @minray.remote
    class Actor:
        pass

    here = Actor.options(name="here").remote()
    there = Actor.options(name="there", namespace="other").remote()
    nameless = Actor.remote()
    assert util.list_named_actors() == ["here"]
    listed = sorted(util.list_named_actors(all_namespaces=True), key=lambda row: row["name"])
    assert [row["name"] for row in listed] == ["here", "there"] and listed[1]["namespace"] == "other"
    del here, there, nameless


def test_a_bar_in_a_worker_is_lines_under_the_name_of_its_task(run_driver):
    ended = run_driver(
        """
import minray
from minray.util.tqdm import tqdm, safe_print
@minray.remote
def train():
    for epoch in tqdm(range(3), desc="epoch", flush_interval_s=0):
        safe_print("in epoch", epoch)
    bar = tqdm(total=10, unit="step")
    bar.update(4)
    bar.set_description("steps")
    bar.close()
    bar.close()
minray.get(train.remote())
"""
    )
    lines = [line.partition(") ")[2] for line in ended.stdout.splitlines() if line.startswith("(train pid=")]
    shown = [line for line in lines if line.startswith("epoch:")]
    assert ["1/3" in shown[0], "3/3" in shown[-1]] == [True, True] and "in epoch 2" in lines
    assert sum(line.startswith("steps:") and "4/10" in line for line in lines) == 1


def test_a_bar_in_the_driver_is_tqdms(capsys):
    with tqdm([1, 2], desc="here") as bar:
        assert list(bar) == [1, 2] and bar.n == 2 and bar.total == 2
        bar.refresh()
    safe_print("said")
    shown = capsys.readouterr()
    assert "here: 100%" in shown.err and "said" in shown.out
    with pytest.raises(TypeError, match="no iterable"):
        next(iter(tqdm(total=3)))


def test_rays_old_homes_lead_here():
    from minray.experimental import tqdm_ray
    from minray.experimental.state.api import list_actors

    assert tqdm_ray.tqdm is tqdm and list_actors is minray.state.list_actors
