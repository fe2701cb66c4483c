"""The benchmark's machinery: rows run on every backend, figures are put together honestly.

Rows for Ray and minray are one code, so a `ray` of thirty lines that does everything at once, in this
process, shows that each of them works, whether or not Ray is installed.
"""

from __future__ import annotations

import json
import os
import select
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from minray import microbenchmark
from minray.microbenchmark import PARTS, ROWS, Figure, Results, Stopwatch, main, median, number

pytestmark = pytest.mark.one_python

TOY_RAY = """
class Ref:
    def __init__(self, value): self.value = value

class Call:
    def __init__(self, function): self.function = function
    def remote(self, *args): return Ref(self.function(*args))

class Handle:
    def __init__(self, instance): self.instance = instance
    def __getattr__(self, name): return Call(getattr(self.instance, name))

class ActorClass:
    def __init__(self, cls): self.cls = cls
    def options(self, **options): return self
    def remote(self, *args): return Handle(self.cls(*args))

class Stream(Call):
    def remote(self, *args): return map(Ref, self.function(*args))

def remote(thing=None, num_returns=1):
    if num_returns == "streaming": return Stream
    return ActorClass(thing) if isinstance(thing, type) else Call(thing)
def init(num_cpus, include_dashboard):
    import sys
    assert "minray" not in sys.modules, "another library's memory is not Ray's"
    print("init says hello on standard output")
def shutdown(): pass
def put(value): return Ref(value)  # No copy: rows of gigabytes take no time.
def get(refs): return [ref.value for ref in refs] if isinstance(refs, list) else refs.value
def wait(refs): return refs[:1], refs[1:]

import sys, types
class Group:
    def ready(self): return Ref(self)
util = sys.modules["ray.util"] = types.ModuleType("ray.util")
util.placement_group = lambda bundles: Group()
util.remove_placement_group = lambda group: None
"""


def run(tmp_path: Path, *arguments: str) -> tuple[int, dict[str, dict[str, Any]]]:
    """Exit status, and what --json says of each figure."""
    file = tmp_path / "figures.json"
    status = main([*arguments, "--rounds", "1", "--seconds", "0.01", "--cpus", "2", "--json", str(file)])
    report = json.loads(file.read_text())
    assert report["machine"]["cpus"] == 2
    return status, {figure["name"]: figure for figure in report["rows"]}


def test_every_row_of_ray_runs_with_a_toy_in_its_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "ray.py").write_text(TOY_RAY)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, figures = run(tmp_path, "--backends", "ray")
    failures = {name: figure["backends"]["ray"]["failure"] for name, figure in figures.items()}
    assert [name for name, failure in failures.items() if failure] == []
    assert status == 0
    assert len(figures) == sum(len(row.figures) for row in ROWS.values() if "ray" in row.on and not row.long)
    for name, figure in figures.items():
        samples = figure["backends"]["ray"]["samples"]
        assert len(samples) == 1 and samples[0] > -10, name
    assert "init says hello" not in capsys.readouterr().out


def test_minray_itself_is_measured(tmp_path: Path) -> None:
    status, figures = run(
        tmp_path, "--backends", "minray", "--rows", "tasks sync", "--rows", "init to first result"
    )
    assert [figure["backends"]["minray"]["failure"] for figure in figures.values()] == [None] * len(figures)
    assert status == 0


def test_where_the_time_of_a_task_goes_is_measured_inside_minray(tmp_path: Path) -> None:
    status, figures = run(tmp_path, "--backends", "minray,pool", "--rows", "inside one async task*")
    assert status == 0
    assert list(figures) == [f"inside one async task, {part}" for part in PARTS.values()]
    for part, figure in zip(PARTS, figures.values(), strict=True):
        assert list(figure["backends"]) == ["minray"]
        # In so short a round there may be none of what is left over, in ticks of 10 ms, or is done every 50 ms.
        if part not in ("worker_io", "rows", "gcs", "rest"):
            assert 0 < figure["backends"]["minray"]["median"] < 1000, part


def test_a_moment_counts_for_the_innermost_part_only() -> None:
    watch = Stopwatch()

    def burn(seconds: float) -> None:
        until = time.thread_time() + seconds
        while time.thread_time() < until:
            pass

    def outer() -> None:
        burn(0.01)
        with pytest.raises(ZeroDivisionError):
            watch.run("inner", lambda: (burn(0.02), 1 / 0))
        burn(0.01)

    began = time.thread_time()
    watch.run("outer", outer)
    took_s, spent = time.thread_time() - began, watch.spent()
    assert spent["outer"] >= 0.02 and spent["inner"] >= 0.02
    assert sum(spent.values()) <= took_s


def test_what_a_backend_leaves_running_has_ended_before_the_next_one_starts(tmp_path: Path) -> None:
    stays, other = (
        subprocess.Popen(["sleep", "60"], start_new_session=True, env={**os.environ, "MINRAY_HOME": str(home)})
        for home in (tmp_path, tmp_path / "other")
    )
    ends = subprocess.Popen(
        [sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={**os.environ, "MINRAY_HOME": str(tmp_path)}
    )
    try:
        assert microbenchmark.family(set(), str(tmp_path)) == sorted((stays.pid, ends.pid))
        ends.communicate(b"\n")
        microbenchmark.end_what_is_left(str(tmp_path), patience_s=0.05)
        assert stays.wait() == -9
        assert other.poll() is None
    finally:
        for process in (stays, other, ends):
            process.kill()
            process.wait()


def test_a_benchmark_that_is_ended_ends_what_it_has_started_and_shows_its_samples(tmp_path: Path) -> None:
    started = tmp_path / "started"
    os.mkfifo(started)
    toy = f"""
def put(value):
    import os, subprocess, time
    daemon = subprocess.Popen(["sleep", "60"], start_new_session=True, env=dict())  # Nothing in it says whose it is.
    with open({str(started)!r}, "w") as told:
        told.write(f"{{daemon.pid}} {{os.environ['MINRAY_HOME']}}")
    time.sleep(60)
"""
    (tmp_path / "ray.py").write_text(TOY_RAY + toy)
    path = os.pathsep.join(filter(None, [str(tmp_path), os.environ.get("PYTHONPATH")]))
    benchmark = subprocess.Popen(
        [sys.executable, "-m", "minray.microbenchmark", "--quick", "--backends", "ray", "--rows", "*tasks sync"]
        + ["--rows", "single client put calls"],
        env={**os.environ, "PYTHONPATH": path},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    pid, directory = started.read_text().split()
    daemon = os.pidfd_open(int(pid))
    benchmark.terminate()
    out, err = benchmark.communicate()
    assert benchmark.returncode == 130
    assert "single client tasks sync" in out and "Interrupted" in err
    assert select.select([daemon], [], [], 0)[0], "it still runs"
    os.close(daemon)
    assert not os.path.exists(directory)


def test_the_floors_and_the_pool_are_measured_beside_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    status, figures = run(tmp_path, "--backends", "pool,socketpair", "--rows", "single client tasks sync")
    assert status == 0
    [(name, figure)] = figures.items()
    assert list(figure["backends"]) == ["pool", "socketpair"]
    assert figure["backends"]["socketpair"]["median"] > figure["backends"]["pool"]["median"] > 0
    assert name in capsys.readouterr().out


def test_a_row_that_fails_is_shown_with_its_reason(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    toy = TOY_RAY + "\ndef put(value): raise MemoryError('no more room')\n"
    (tmp_path / "ray.py").write_text(toy)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, figures = run(tmp_path, "--backends", "ray", "--rows", "*get calls", "--rows", "*tasks sync")
    assert status == 1
    assert figures["single client get calls"]["backends"]["ray"]["failure"] == "MemoryError: no more room"
    assert figures["single client tasks sync"]["backends"]["ray"]["median"] > 0
    assert "failed on ray: single client get calls: MemoryError: no more room" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("init", "reason"),
    [
        ("raise OSError('no port')", "OSError: no port"),
        ("__import__('time').sleep(60)", "no answer within 1 s"),
    ],
)
def test_a_backend_that_does_not_start_fails_its_rows_and_not_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, init: str, reason: str
) -> None:
    (tmp_path / "ray.py").write_text(f"def init(**options): {init}\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    status, figures = run(tmp_path, "--backends", "ray", "--rows", "*put calls", "--timeout", "1")
    assert status == 1
    for figure in figures.values():
        assert reason in figure["backends"]["ray"]["failure"]


def test_factors_say_how_many_times_as_good_minray_is() -> None:
    results, rate, delay = Results(["minray", "pool"]), Figure("r", "calls/s", 50), Figure("d", "ms")
    results.samples = {("r", "minray"): [90, 100, 500], ("r", "pool"): [50], ("d", "minray"): [2.0]}
    assert results.median(rate, "minray") == 100
    assert results.factor(rate, results.median(rate, "pool")) == 2
    assert results.factor(delay, 10.0) == 5
    assert results.factor(delay, None) is None
    assert results.factor(delay, -1.0) is None  # Memory may shrink: no factor of that.


def test_backends_take_turns_and_long_rows_run_once() -> None:
    order: list[tuple[str, str]] = []

    def measured(backend: str, rows: list[str]) -> dict[str, Any]:
        order.append((backend, ROWS[rows[0]].group))
        return {name: [1.0] * len(ROWS[name].figures) for name in rows}

    results = Results(["minray", "pool"])
    microbenchmark.take_turns(results, ["tasks_sync", "million_tasks"], 2, measured)
    long = [("minray", "endurance"), ("pool", "endurance")]
    assert order == [("minray", "tasks"), ("pool", "tasks"), *long, ("pool", "tasks"), ("minray", "tasks")]
    assert results.samples["single client tasks sync", "pool"] == [1.0, 1.0]


def test_rows_are_chosen_by_any_part_of_their_names() -> None:
    assert "million_tasks" not in microbenchmark.select([], long=False)
    assert microbenchmark.select([], long=True) == list(ROWS)
    assert microbenchmark.select(["1,000,000*"], long=False) == ["million_tasks"]
    assert microbenchmark.select(["PUT Calls"], long=False) == ["put_calls", "multi_client_put_calls"]


def test_names_are_unique_and_groups_do_not_mix_long_and_short_rows() -> None:
    names = [figure.name for row in ROWS.values() for figure in row.figures]
    assert len(set(names)) == len(names)
    assert len({(row.group, row.long) for row in ROWS.values()}) == len({row.group for row in ROWS.values()})


def test_the_list_names_rows_and_backends(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--list", "--long"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert "single client tasks sync [tasks/s] on minray, pool, ray, socketpair" in listed
    assert len(listed) == sum(len(row.figures) for row in ROWS.values())


def test_what_is_not_there_is_said_in_a_sentence(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["--rows", "no such row"]) == 2
    assert "--list" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        main(["--backends", "dask"])
    assert "unknown backend dask" in capsys.readouterr().err
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(SystemExit, match="2"):
        main(["--plot", "x.png"])
    assert "pip install matplotlib" in capsys.readouterr().err


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    program = """if True:
        import sys
        from minray.microbenchmark import Results
        results = Results(["minray", "pool"])
        results.add("minray", {"tasks_sync": [100.0], "tasks_async": [200.0]})
        results.add("pool", {"tasks_sync": [50.0], "tasks_async": "TypeError: no"})
        results.plot(["tasks_sync", "tasks_async", "put_calls"], sys.argv[1])
    """  # Elsewhere: Matplotlib keeps its font files open.
    subprocess.run([sys.executable, "-c", program, str(tmp_path / "picture.png")], check=True)
    assert (tmp_path / "picture.png").read_bytes().startswith(b"\x89PNG")


def test_this_process_finds_itself_and_its_memory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MINRAY_HOME", str(tmp_path))
    pids = microbenchmark.session_pids()
    assert os.getpid() in pids
    assert microbenchmark.pss_mb(pids) > 1
    assert microbenchmark.cpu_time(os.getpid()) > 0
    (tmp_path / "gcs.sqlite").write_bytes(b"x" * 2_000_000)
    assert microbenchmark.tree_mb(str(tmp_path)) == 2


def test_numbers_are_short_and_medians_of_even_counts_lie_between() -> None:
    assert [number(value) for value in (None, 0.01234, 5.1, 21_230.4)] == ["-", "0.0123", "5.1", "21,230"]
    assert median([4, 1, 2, 3]) == 2.5
