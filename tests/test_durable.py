"""Durable jobs with real processes: the driver is killed, and the same script goes on where it was."""

from __future__ import annotations

import contextlib
import os
import pickle
import signal
import sqlite3
import subprocess
import sys
import time

import numpy as np
import pytest
from test_gcs import a_small_disk

import minray
from minray import job_storage, state, story
from minray.channel import Channel
from minray.exceptions import ObjectStoreFullError, OutOfDiskError

SCRIPT = """
import os, random, signal, sys, time
import numpy as np
import minray

HERE = sys.argv[1]
DIE_AFTER = int(sys.argv[2])
minray.init(num_cpus=2, job="script", storage=os.path.join(HERE, "jobs.sqlite"))

def ran(what):
    "A side effect that outlives everything: one line for each time that a task ran."
    with open(os.path.join(HERE, "ran.log"), "a") as file:
        file.write(what + "\\n")

gets = 0
def get(refs):
    global gets
    value = minray.get(refs)
    gets += 1
    if gets == DIE_AFTER:
        os.kill(os.getpid(), signal.SIGKILL)
    return value

@minray.remote
def load(n):
    ran(f"load {n}")
    return np.arange(n, dtype=float)

@minray.remote
def draw():
    ran("draw")
    return random.random()

@minray.remote
def scale(array, by):
    ran(f"scale {by}")
    return array * by  # CHANGED

@minray.remote
def leaf(n):
    ran(f"leaf {n}")
    return n * n

@minray.remote
def tree(n):
    ran(f"tree {n}")
    return sum(minray.get([leaf.remote(10 * n + i) for i in range(4)]))

@minray.remote
def leaves(n):
    ran(f"leaves {n}")
    return [leaf.remote(100 + i) for i in range(n)]

@minray.remote
def total(*parts):
    ran("total")
    return float(sum(np.sum(part) for part in parts))

# INSERTED
big = load.remote(20_000)
small = load.remote(10)
print(get(small).sum())
draws = [draw.remote() for _ in range(3)]
print(get(draws))
scaled = [scale.remote(big, by) for by in (1, 2, 3)]
print([get(one).sum() for one in scaled])
print([get(tree.remote(n)) for n in range(3)])
print(get(get(leaves.remote(3))))
print(get(total.remote(*scaled, minray.put(np.ones(10_000)))))
"""
GETS = 12
TASKS = 2 + 3 + 3 + 3 * (1 + 4) + 1 + 3 + 1


class Script:
    def __init__(self, directory):
        self.directory = directory
        self.source = SCRIPT
        self.storage = str(directory / "jobs.sqlite")

    def run(self, die_after=0, expect_status=None):
        path = self.directory / "script.py"
        path.write_text(self.source)
        ended = subprocess.run(
            [sys.executable, "-u", str(path), str(self.directory), str(die_after)],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=60,
        )  # fmt: skip
        expected = (-signal.SIGKILL if die_after else 0) if expect_status is None else expect_status
        assert ended.returncode == expected, f"status {ended.returncode}\n{ended.stdout}\n{ended.stderr}"
        return ended

    def ran(self):
        """What has run since the last look."""
        log = self.directory / "ran.log"
        lines = log.read_text().splitlines() if log.exists() else []
        log.unlink(missing_ok=True)
        return lines

    def edit(self, old, new):
        assert old in self.source
        self.source = self.source.replace(old, new)


@pytest.fixture
def script(tmp_path):
    return Script(tmp_path)


# ---------------------------------------------------------------- kill, and run again


def test_a_killed_script_returns_what_it_had_finished_and_runs_the_rest(script):
    printed, ran = [], []
    for die_after in range(1, GETS + 1, 3):
        printed.append(script.run(die_after).stdout)
        ran.append(script.ran())
    last = script.run()
    ran.append(script.ran())
    for earlier in printed:
        assert last.stdout.startswith(earlier), "the same random numbers, too"
    runs = [line for lines in ran for line in lines]
    assert len(set(runs)) == TASKS - 2, "everything ran (draw three times)"
    assert len(runs) < TASKS + 4 * len(ran), "and only what was in flight when it died ran again"
    assert "results of earlier runs are known" in last.stderr and "reused" in last.stderr
    again = script.run()
    assert script.ran() == [], "now all has finished"
    assert again.stdout == last.stdout
    assert "ran 0 tasks" in again.stderr


def test_a_result_that_get_has_returned_is_never_run_again(script):
    """The line before the last that it prints before it dies has been returned: whatever it took to make it is known."""
    script.run(die_after=4)  # The first scale() has been returned; with it, load(20_000), load(10) and the draws.
    first = script.ran()
    assert {"load 20000", "load 10", "draw", "scale 1"} <= set(first)
    script.run()
    second = script.ran()
    assert not {"load 20000", "load 10", "draw", "scale 1"} & set(second), second
    assert "total" in second


def test_a_changed_function_reruns_itself_and_what_depends_on_it(script):
    before = script.run().stdout.splitlines()
    assert len(script.ran()) == TASKS
    script.edit("return array * by  # CHANGED", "return array * by + 1")
    after = script.run().stdout.splitlines()
    assert sorted(script.ran()) == ["scale 1", "scale 2", "scale 3", "total"]
    assert [line for line in before if line not in after] == [before[2], before[5]]


def test_a_changed_argument_reruns_that_call_and_what_depends_on_it(script):
    script.run()
    script.ran()
    script.edit("(1, 2, 3)", "(1, 2, 4)")
    script.run()
    assert sorted(script.ran()) == ["scale 4", "total"]


def test_inserted_calls_and_moved_lines_rerun_nothing_else(script):
    before = script.run().stdout
    script.ran()
    script.edit("# INSERTED", "print('new', get(leaf.remote(7)), get(load.remote(3)).sum())\n\n\n")
    after = script.run()
    assert sorted(script.ran()) == ["leaf 7", "load 3"]
    assert after.stdout.split("\n", 1)[1] == before
    assert f"reused {TASKS - 15} results, ran 2 tasks" in after.stderr, "a known parent's children are not asked for"


def test_what_a_task_gets_has_left_for_the_storage_before(tmp_path, monkeypatch):
    """As what the driver gets: whoever has seen a result can rely on it."""
    happened = []

    def record(rows):
        happened.extend(row[7] for row in rows.get("results", ()))
        usual_record(rows)

    def send(channel, data):
        happened.extend(["reply"] * bytes(data).count(b"Reply"))
        usual_send(channel, data)

    @minray.remote
    def child():
        return 7

    @minray.remote
    def parent():
        return minray.get(child.remote())

    with minray.init(num_cpus=2, job="order", storage=tmp_path / "jobs.sqlite"):
        raylet = minray.api.core().raylet
        usual_record, usual_send = raylet.record, Channel.send
        monkeypatch.setattr(raylet, "record", record)
        monkeypatch.setattr(Channel, "send", send)
        assert minray.get(parent.remote()) == 7
        names = [one.rpartition(".")[2] for one in happened]
        assert names.index("child") < names.index("reply"), names


def test_a_parent_that_was_killed_finds_its_children_finished(tmp_path, run_driver):
    code = """
import os, signal, sys, time, minray
HERE = sys.argv[1]
with open(os.path.join(HERE, "pid"), "w") as file:
    file.write(str(os.getpid()))
minray.init(num_cpus=2, job="parent", storage=os.path.join(HERE, "jobs.sqlite"))

@minray.remote
def child(n):
    open(os.path.join(HERE, f"child-{n}-{os.urandom(4).hex()}"), "w").close()
    return n

@minray.remote
def parent():
    values = minray.get([child.remote(n) for n in range(5)])
    if not os.path.exists(os.path.join(HERE, "killed")):
        open(os.path.join(HERE, "killed"), "w").close()
        with open(os.path.join(HERE, "pid")) as file:
            os.kill(int(file.read()), signal.SIGKILL)
        time.sleep(60)
    return values

print(minray.get(parent.remote()))
"""
    run_driver(code, str(tmp_path), expect_status=-signal.SIGKILL)
    assert len(list(tmp_path.glob("child-*"))) == 5
    assert run_driver(code, str(tmp_path)).stdout == "[0, 1, 2, 3, 4]\n"
    assert len(list(tmp_path.glob("child-*"))) == 5, "none of them ran again"


# ---------------------------------------------------------------- in this process


@contextlib.contextmanager
def job(tmp_path, name="job", **options):
    with minray.init(num_cpus=2, job=name, storage=tmp_path / "jobs.sqlite", **options):
        yield


def calls_of(log):
    lines = log.read_text().splitlines() if log.exists() else []
    log.unlink(missing_ok=True)
    return lines


def note(log, what):
    with open(log, "a") as file:
        file.write(f"{what}\n")


def test_large_results_come_back_as_they_were_and_can_be_arguments(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    def make(n):
        note(log, "make")
        return {"x": np.arange(n), "text": "t" * 100_000}

    @minray.remote
    def use(value, k):
        note(log, "use")
        return int(value["x"].sum()) + k

    for k in range(3):
        with job(tmp_path):
            ref = make.remote(50_000)
            value = minray.get(ref)
            assert (value["x"] == np.arange(50_000)).all() and len(value["text"]) == 100_000
            assert minray.get(use.remote(ref, k)) == sum(range(50_000)) + k
            del value
        assert calls_of(log) == (["make", "use"] if not k else ["use"])


def test_several_returns_and_refs_in_values_come_back(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    def inner(n):
        note(log, "inner")
        return np.full(20_000, n)

    @minray.remote(num_returns=2)
    def outer():
        note(log, "outer")
        return [inner.remote(1), minray.put("small")], {"large": minray.put(np.zeros(20_000))}

    for number in range(3):
        with job(tmp_path):
            one, other = minray.get(list(outer.remote()))
            assert minray.get(one[0])[0] == 1 and minray.get(one[1]) == "small"
            assert minray.get(other["large"]).shape == (20_000,)
            del one, other
        assert len(calls_of(log)) == (0 if number else 2)


def test_a_task_that_raised_is_run_again(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    def fails():
        note(log, "fails")
        raise ValueError("no")

    for _ in range(2):
        with job(tmp_path), pytest.raises(ValueError, match="no"):
            minray.get(fails.remote())
        assert calls_of(log) == ["fails"]


def test_arguments_are_compared_by_value_and_what_was_put_by_content(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    def use(a, b, c=None):
        note(log, "use")
        return 1

    def play(last):
        with job(tmp_path):
            array = minray.put(np.arange(30_000))
            minray.get([use.remote({"x", "y", "z"}, array, c=[array]), use.remote(np.ones(20_000), last)])
        return len(calls_of(log))

    assert [play(1), play(1), play(2)] == [2, 0, 1]


def test_a_task_with_an_actor_in_it_behaves_as_without_a_job(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    class Counter:
        def __init__(self):
            self.n = 0

        def add(self, k):
            self.n += k
            return self.n

    @minray.remote
    def adds(counter):
        note(log, "adds")
        return minray.get(counter.add.remote(10))

    for _ in range(2):
        with job(tmp_path):
            counter = Counter.remote()
            assert minray.get([counter.add.remote(1), adds.remote(counter)]) == [1, 11]
            assert minray.get(counter.add.remote(1)) == 12
        assert calls_of(log) == ["adds"]


# ---------------------------------------------------------------- actors with exact recovery


ACTOR_SCRIPT = """
import os, signal, sys
import minray

HERE, DIE_AFTER, LAST = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
minray.init(num_cpus=2, job="actor", storage=os.path.join(HERE, "jobs.sqlite"))

def ran(what):
    with open(os.path.join(HERE, "ran.log"), "a") as file:
        file.write(what + "\\n")

@minray.remote
def child(n):
    ran(f"child {n}")
    return n

@minray.remote(checkpoint_every=EVERY)
class Journal:
    def __init__(self, start):
        ran("init")
        self.entries = [start]
    def add(self, n):
        ran(f"add {n}")
        self.entries.append(minray.get(child.remote(n)))
        return list(self.entries)  # CHANGED

journal = Journal.remote(0)
for n in range(1, LAST + 1):
    print(minray.get(journal.add.remote(n)))
    if n == DIE_AFTER:
        os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.parametrize("every", [1, 2, 3, 100])
def test_an_actor_goes_on_where_its_calls_were_and_is_not_made_before(every, tmp_path, run_driver):
    code = ACTOR_SCRIPT.replace("EVERY", str(every))
    log = tmp_path / "ran.log"

    def play(die_after, last, status=0):
        ended = run_driver(code, str(tmp_path), str(die_after), str(last), expect_status=status)
        return ended.stdout, calls_of(log)

    printed, ran = play(5, 10, -signal.SIGKILL)
    assert ran == ["init", *(line for n in range(1, 6) for line in (f"add {n}", f"child {n}"))]
    again, ran = play(0, 5)
    assert again.startswith(printed) and ran == [], "no call was new: no process, no constructor"
    longer, ran = play(0, 8)
    assert longer == "".join(f"{list(range(n + 1))}\n" for n in range(1, 9))
    replayed = [f"add {n}" for n in range(5 - 5 % every + 1, 6)]
    new = [line for n in range(6, 9) for line in (f"add {n}", f"child {n}")]
    started = ["init"] if every > 5 else []
    if every == 1 and "add 5" in ran:
        replayed = ["add 5"]  # The checkpoint after it was under way when the driver was killed.
    assert ran == [*started, *replayed, *new], "from the last checkpoint, the calls since, and then the new ones"
    assert play(0, 8) == (longer, [])


def test_a_changed_class_or_order_runs_an_actors_calls_anew(tmp_path, run_driver):
    code = ACTOR_SCRIPT.replace("EVERY", "2")
    log = tmp_path / "ran.log"
    arguments = (str(tmp_path), "0", "4")
    run_driver(code, *arguments)
    calls_of(log)
    other = code.replace("range(1, LAST + 1)", "(1, 2, 3, 9, 4)")
    assert run_driver(other, *arguments).stdout.endswith("[0, 1, 2, 3, 9, 4]\n")
    ran = calls_of(log)
    assert ran[-3:] == ["add 9", "child 9", "add 4"], "on a state that has exactly what was the same"
    # The checkpoint after the fourth call, if it was still taken, knows too much.
    assert ran[:-3] in (["init", "add 1", "add 2", "add 3"], ["add 3"]), ran
    assert run_driver(other, *arguments).stdout and calls_of(log) == []
    changed = other.replace("return list(self.entries)  # CHANGED", "return self.entries[::-1]")
    assert run_driver(changed, *arguments).stdout.endswith("[4, 9, 3, 2, 1, 0]\n")
    ran = calls_of(log)
    assert ran[0] == "init" and ran.count("add 1") == 1
    assert not [line for line in ran if line.startswith("child")], "its children have not changed"


def test_large_states_and_results_of_actors_come_back(tmp_path):
    log = tmp_path / "log"

    @minray.remote(checkpoint_every=1)
    class Table:
        def __init__(self):
            note(log, "init")
            self.rows = np.zeros(50_000)

        def add(self, n):
            note(log, "add")
            self.rows = self.rows + n
            return self.rows

    for number in range(3):
        with job(tmp_path):
            table = Table.remote()
            for n in range(3 + number):
                array = minray.get(table.add.remote(n))
                assert array[17] == sum(range(n + 1))
                del array
            del table
        ran = calls_of(log)
        assert ran == ["init", "add", "add", "add"] if not number else ran in (["add"], ["add", "add"]), ran
        # (The checkpoint after the last call may have been under way when the run ended.)
    with job(tmp_path):
        pass  # What was in use when the last run ended has been swept out.
    kept = [path for path in (tmp_path / "jobs.sqlite.objects/job").iterdir() if path.name != "lock"]
    assert len(kept) == 5 + 1, "a result each, and the last checkpoint"


def test_an_actor_that_nobody_needs_is_not_made(tmp_path):
    log = tmp_path / "log"

    @minray.remote(checkpoint_every=1)
    class Counter:
        def __init__(self):
            note(log, "init")
            self.n = 0

        def add(self, n):
            self.n += n
            return self.n

    for number in range(2):
        with job(tmp_path):
            counter = Counter.options(name="counter").remote()
            assert minray.get([counter.add.remote(n) for n in range(5)]) == [0, 1, 3, 6, 10]
            assert minray.get_actor("counter")._actor_id == counter._actor_id
            minray.kill(counter)
            with pytest.raises(minray.exceptions.ActorDiedError):
                minray.get(counter.add.remote(1))
        assert calls_of(log) == ([] if number else ["init"])


# ---------------------------------------------------------------- damage


def test_a_damaged_row_is_told_and_run_anew(tmp_path, capfd):
    log = tmp_path / "log"

    @minray.remote
    def make(n):
        note(log, f"make {n}")
        return n

    with job(tmp_path):
        assert minray.get([make.remote(n) for n in range(3)]) == [0, 1, 2]
    calls_of(log)
    with contextlib.closing(sqlite3.connect(tmp_path / "jobs.sqlite")) as database:
        one, nine = pickle.dumps(1, 5), pickle.dumps(9, 5)
        assert database.execute("UPDATE results SET data = ? WHERE data = ?", (nine, one)).rowcount == 1
        database.commit()
    capfd.readouterr()
    with job(tmp_path):
        assert minray.get([make.remote(n) for n in range(3)]) == [0, 1, 2]
    assert len(calls_of(log)) == 1
    assert "does not match its checksum" in capfd.readouterr().err


def test_a_damaged_file_is_told_and_run_anew(tmp_path, capfd):
    log = tmp_path / "log"

    @minray.remote
    def make(n):
        note(log, f"make {n}")
        return np.full(20_000, n)

    with job(tmp_path):
        minray.get([make.remote(n) for n in range(3)])
    calls_of(log)
    gone, cut, flipped = sorted(path for path in (tmp_path / "jobs.sqlite.objects/job").iterdir() if path.name != "lock")
    gone.unlink()
    os.truncate(cut, 1000)
    with open(flipped, "r+b") as file:
        file.seek(80_000)
        file.write(b"\xff")
    capfd.readouterr()
    with job(tmp_path):
        arrays = minray.get([make.remote(n) for n in range(3)])
        assert [array[12_000] for array in arrays] == [0, 1, 2]
        del arrays
    assert len(calls_of(log)) == 3
    said = capfd.readouterr().err
    assert "what is kept cannot all be used" in said and "a kept result of" in said
    with job(tmp_path):
        minray.get([make.remote(n) for n in range(3)])
    assert calls_of(log) == []
    assert "cannot all be used" not in capfd.readouterr().err  # It was replaced: nothing was made anew.


def test_two_jobs_share_a_storage_and_know_nothing_of_each_other(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    def work():
        note(log, "work")

    for name in ("one", "two", "one"):
        with job(tmp_path, name):
            minray.get(work.remote())
    assert calls_of(log) == ["work", "work"]
    assert [about["job"] for about in job_storage.describe(str(tmp_path / "jobs.sqlite"))] == ["one", "two"]


def test_a_killed_gcs_loses_nothing_that_was_kept(tmp_path):
    log = tmp_path / "log"

    @minray.remote
    def work(n):
        note(log, "work")
        return n

    for number in range(2):
        with job(tmp_path):
            for n in range(5):
                minray.get([work.remote(10 * n + i) for i in range(10)])
                if not number:
                    minray.api.flush_records()
                    (pid,) = gcs_pids(minray.api._core)
                    os.kill(pid, signal.SIGKILL)
        assert len(calls_of(log)) == (0 if number else 50)


def gcs_pids(core):
    """The children of the zygote that hold the storage open."""
    pids = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with contextlib.suppress(OSError):
                parent = int(open(f"/proc/{name}/stat").read().rpartition(")")[2].split()[1])
                if parent == core.zygote.pid and any(
                    os.readlink(f"/proc/{name}/fd/{fd}").endswith("gcs.sqlite") for fd in os.listdir(f"/proc/{name}/fd")
                ):
                    pids.append(int(name))
    return pids


# ---------------------------------------------------------------- who may run it


HOLDER = """
import sys, time, minray
minray.init(num_cpus=1, job="held", storage=sys.argv[1])
print("up", flush=True)
sys.stdin.read()
"""


def test_a_second_driver_of_the_same_job_is_refused_with_who_holds_it(tmp_path):
    storage = str(tmp_path / "jobs.sqlite")
    holder = subprocess.Popen(
        [sys.executable, "-c", HOLDER, storage], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    try:
        assert holder.stdout.readline() == b"up\n"
        with pytest.raises(job_storage.JobInUseError, match=rf"pid {holder.pid} on .*since \d{{4}}-"):
            minray.init(job="held", storage=storage)
        assert not minray.is_initialized()
        with minray.init(num_cpus=1, job="another", storage=storage):
            pass
        assert [about["state"] for about in job_storage.describe(storage)] == ["SUCCEEDED", "RUNNING"]
        holder.kill()
        holder.wait()
        with minray.init(num_cpus=1, job="held", storage=storage):
            pass
        assert [run["state"] for run in job_storage.runs(storage, "held")] == ["FAILED", "SUCCEEDED"]
    finally:
        holder.kill()
        holder.communicate()


@pytest.mark.parametrize(
    "size, refusal, words",
    [
        (10, OutOfDiskError, "make.* was not run.*jobs.sqlite, where 0 bytes are free.*Make room there"),
        (200_000, ObjectStoreFullError, "found no room.*jobs.sqlite.objects"),
    ],
    ids=["rows", "files"],
)
def test_a_full_disk_under_the_storage_is_a_typed_error_and_heals(size, refusal, words, tmp_path):
    """The session's own directory has room: what is full is the disk of the job's results, of 2 MiB."""
    ran = tmp_path / "ran.log"

    @minray.remote
    def make(n):
        with open(ran, "a") as file:
            file.write(f"{n}\n")
        return np.full(size, n % 256, np.uint8)

    with a_small_disk(tmp_path / "small") as disk:
        storage = disk / "jobs.sqlite"
        with minray.init(num_cpus=2, job="full", storage=str(storage)):
            first = [int(minray.get(make.remote(n))[0]) for n in range(3)]
            ballast = disk / "ballast"
            with contextlib.suppress(OSError), ballast.open("wb", buffering=0) as file:
                while True:
                    file.write(bytes(4096))
            deadline = time.monotonic() + 30
            with pytest.raises(refusal, match=f"(?s){words}"):
                for n in range(3, 100_000):
                    minray.get(make.remote(n))
                    assert time.monotonic() < deadline, "the full disk goes unnoticed"
            ballast.unlink()
            deadline = time.monotonic() + 30
            healed = False
            while not healed:
                assert time.monotonic() < deadline, "space has returned, and nothing is taken in"
                with contextlib.suppress(OutOfDiskError, ObjectStoreFullError):
                    healed = int(minray.get(make.remote(7))[0]) == 7
        ran.unlink()
        with minray.init(num_cpus=2, job="full", storage=str(storage)):  # What was answered before is there.
            assert [int(minray.get(make.remote(n))[0]) for n in range(3)] == first == [0, 1, 2]
        assert not ran.exists() or not {"0", "1", "2"} & set(ran.read_text().split())


def test_what_a_driver_forks_does_not_hold_its_job(tmp_path):
    """A lock that children inherit would outlive the driver."""
    code = HOLDER.replace(
        'print("up"', 'import os\nif os.fork() == 0:\n    time.sleep(600)\nprint("up"'
    )
    storage = str(tmp_path / "jobs.sqlite")
    holder = subprocess.Popen(
        [sys.executable, "-c", code, storage], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL, start_new_session=True,
    )  # fmt: skip
    try:
        assert holder.stdout.readline() == b"up\n"
        holder.kill()
        holder.wait()
        with minray.init(num_cpus=1, job="held", storage=storage):
            pass
    finally:
        os.killpg(holder.pid, signal.SIGKILL)
        holder.stdin.close()
        holder.stdout.close()


def test_a_session_without_a_job_of_that_name_is_not_taken_for_it(tmp_path, session):
    with pytest.raises(RuntimeError, match="not of that job"):
        minray.init(job="job", storage=tmp_path / "jobs.sqlite", ignore_reinit_error=True)


def test_the_story_of_a_task_says_that_an_earlier_run_had_finished_it(tmp_path):
    @minray.remote
    def work():
        return 1

    for known in (False, True):
        with job(tmp_path):
            ref = work.remote()
            minray.get(ref)
            told = "\n".join(story.tell(story.story(ref.hex())))
            assert ("an earlier run of the job had finished it" in told) == known


def test_the_name_of_the_job_stands_in_the_sessions_history(tmp_path):
    with job(tmp_path, "named"):
        (row,) = state.list_jobs()
        assert row.name == "named"


def test_the_default_storage_lies_where_sessions_are_kept():
    name = f"default-{os.getpid()}-{time.time_ns()}"
    with minray.init(num_cpus=1, job=name):
        pass
    path = os.path.join(os.environ["MINRAY_HOME"], "jobs", f"{name}.sqlite")
    assert path in job_storage.default_files()
    assert [about["job"] for about in job_storage.describe(path)] == [name]
