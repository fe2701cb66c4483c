"""The storage of durable jobs: bad paths and files are refused with a sentence, and what is damaged is not believed."""

from __future__ import annotations

import contextlib
import json
import os
import random
import sqlite3
import subprocess
import sys

import pytest

import minray
from minray import job_storage
from minray.command import main
from minray.gcs import Gcs
from minray.job_storage import file_system_of, open_job

ROOT = b"r" * 16


def opened(path, name="job"):
    return open_job(name, path, "0", ROOT)


@contextlib.contextmanager
def written(path, rows, name="job"):
    """A run that has kept these rows."""
    job = opened(path, name)
    gcs = Gcs(f"{path}.gcs", job=job.config())
    try:
        gcs.write([(1, [("results", rows)])])
        gcs.finish()
        yield job
    finally:
        gcs.database.close()
        gcs.job.close()
        job.close()
        os.unlink(f"{path}.gcs")


def row(number, data=b"data", nested=b"", version=b"v" * 16, num_returns=1):
    object_id = number.to_bytes(12, "big") + b"\0\0\0\0"
    place = number.to_bytes(16, "big")
    return (object_id, place, version, data, None, len(data), nested, f"task{number}", num_returns, 1, 2, None, None)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize("name", ["", " ", "../up", "a/b", ".hidden", "x" * 101, "ends.", "n\0l", "new\nline", 3, b"b"])
def test_a_job_needs_a_name_that_can_name_a_directory(name, tmp_path):
    with pytest.raises(ValueError, match=r"init\(job=...\) must be a name"):
        minray.init(job=name, storage=tmp_path / "jobs.sqlite")
    assert not minray.is_initialized() and not os.listdir(tmp_path)


@pytest.mark.parametrize("name", ["a", "train", "Train 2.1_b-c", "7"])
def test_ordinary_names_are_taken(name):
    assert job_storage.check_name(name) == name


def test_a_storage_without_a_job_is_refused(tmp_path):
    with pytest.raises(ValueError, match="needs init"):
        minray.init(storage=tmp_path / "jobs.sqlite")


def test_a_directory_is_refused(tmp_path):
    with pytest.raises(IsADirectoryError, match="Name a file in it"):
        opened(tmp_path)


def test_a_parent_that_does_not_exist_is_not_made(tmp_path):
    with pytest.raises(FileNotFoundError, match="does not exist, and minray does not make it"):
        opened(tmp_path / "no" / "jobs.sqlite")
    assert not os.listdir(tmp_path)


@pytest.mark.parametrize("path", ["", 7, "jobs\0.sqlite"])
def test_what_is_no_path_is_refused(path):
    with pytest.raises(ValueError, match="must be the path of a file"):
        opened(path)


def test_a_file_that_is_no_database_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "notes.txt"
    path.write_text("these are my notes, and not a database\n" * 100)
    before = path.read_bytes()
    with pytest.raises(ValueError, match="file is not a database"):
        opened(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["notes.txt"]


def test_another_database_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "mine.sqlite"
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("CREATE TABLE mine (x)")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="not a storage of durable jobs"):
        opened(path)
    assert path.read_bytes() == before


def test_another_versions_file_is_refused_and_left_as_it_was(tmp_path):
    path = tmp_path / "jobs.sqlite"
    opened(path).close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.execute("PRAGMA user_version = 99")
        database.execute("PRAGMA journal_mode = DELETE")
    before = path.read_bytes()
    with pytest.raises(ValueError, match="written by another version of minray .its format is 99"):
        opened(path)
    assert path.read_bytes() == before


def test_a_file_that_others_can_write_is_refused(tmp_path):
    path = tmp_path / "jobs.sqlite"
    path.touch()
    path.chmod(0o666)
    with pytest.raises(PermissionError, match="only you may be able to write it"):
        opened(path)


def test_a_directory_of_results_that_others_can_write_is_refused(tmp_path):
    path = tmp_path / "jobs.sqlite"
    opened(path).close()
    os.chmod(f"{path}.objects", 0o777)
    with pytest.raises(PermissionError, match="not a directory that only you can write to"):
        opened(path)


@pytest.mark.parametrize("name", ["jobs.sqlite.objects", "jobs.sqlite.objects/job"])
def test_a_file_in_the_place_of_the_directory_of_results_is_refused(name, tmp_path):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_text("mine")
    with pytest.raises(FileExistsError, match=f"is no directory.*Nothing was started.*{name}"):
        opened(tmp_path / "jobs.sqlite")
    assert (tmp_path / name).read_text() == "mine"


def test_a_pipe_is_refused(tmp_path):
    path = tmp_path / "pipe"
    os.mkfifo(path, 0o600)
    with pytest.raises(ValueError, match="not an ordinary file"):
        opened(path)


READ_ONLY = """
import sys
from minray.job_storage import open_job
open_job("job", sys.argv[1], "0", b"r" * 16)
"""


@pytest.mark.parametrize("there", [False, True], ids=["new", "old"])
def test_a_read_only_place_is_refused(there, tmp_path):
    """On a read-only mount: to root no mode is one."""
    place = tmp_path / "place"
    place.mkdir()
    if there:
        opened(place / "jobs.sqlite").close()
    code = (
        f"mount --bind {place} {place} && mount -o remount,bind,ro {place} &&"
        f' exec {sys.executable} -c "$0" {place}/jobs.sqlite'
    )
    ended = subprocess.run(
        ["unshare", "--mount", "sh", "-c", code, READ_ONLY], capture_output=True, text=True, timeout=60
    )
    if "unshare" in ended.stderr or "mount:" in ended.stderr:
        pytest.skip(f"a read-only mount needs root: {ended.stderr.strip()}")
    assert ended.returncode == 1
    last = ended.stderr.strip().splitlines()[-1]
    assert "Error" in last and "Nothing was started" in last and "writ" in last, ended.stderr


def test_the_file_system_of_a_path_is_that_of_the_mount_above_it():
    text = (
        "1 0 8:1 / / rw,relatime shared:1 - ext4 /dev/sda1 rw\n"
        "2 1 0:5 / /home rw - nfs4 server:/home rw\n"
        "3 2 0:6 / /home/ann\\040b rw - tmpfs tmpfs rw\n"
        "4 1 0:7 / /over rw - nfs a:/ rw\n"
        "5 4 0:8 / /over rw - xfs b rw\n"
    )
    paths = {"/": "ext4", "/tmp": "ext4", "/home": "nfs4", "/home/x/y": "nfs4", "/homes": "ext4", "/over/x": "xfs"}
    for path, kind in {**paths, "/home/ann b/x": "tmpfs"}.items():
        assert file_system_of(path, text) == kind, path
    assert file_system_of("/", "") == ""


def test_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(job_storage, "file_system_of", lambda path, mounts: "nfs4")
    with pytest.raises(ValueError, match="network file system .nfs4.*Keep it on a local disk"):
        opened(tmp_path / "jobs.sqlite")
    assert not os.listdir(tmp_path)


# ---------------------------------------------------------------- what is believed


def test_what_was_kept_is_known(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with written(path, [row(1), row(2)]):
        pass
    job = opened(path)
    assert sorted(kept.task_id for kept in job.known.results.values()) == [row(1)[0], row(2)[0]]
    assert not job.troubles
    job.close()


def test_a_result_whose_other_returns_are_missing_is_not_known(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with written(path, [row(1, num_returns=2)]):
        pass
    job = opened(path)
    assert not job.known.results
    job.close()


def test_of_two_results_at_one_place_the_newer_is_known_and_the_older_deleted(tmp_path):
    path = tmp_path / "jobs.sqlite"
    new = list(row(2))
    new[1] = row(1)[1]
    with written(path, [row(1), tuple(new)]):
        pass
    job = opened(path)
    assert [kept.task_id for kept in job.known.results.values()] == [row(2)[0]]
    job.close()
    with contextlib.closing(sqlite3.connect(path)) as database:
        assert database.execute("SELECT count(*) FROM results").fetchone() == (1,)


def at_the_place_of(number, new):
    """A result of another run at the place of an older one."""
    return (new[0], row(number)[1], *new[2:])


def damage(path, *numbers):
    with contextlib.closing(sqlite3.connect(path)) as database:
        for number in numbers:
            database.execute("UPDATE results SET data = 'dat@' WHERE object_id = ?", (row(number)[0],))
        database.commit()


def test_what_is_damaged_and_was_replaced_is_not_told(tmp_path):
    path = tmp_path / "jobs.sqlite"
    gone = row(3)[:3] + (None, "gone.obj") + row(3)[5:]
    refers = row(4, nested=row(99)[0] * 2)  # To what is not there.
    new = [at_the_place_of(old, row(10 + old)) for old in (1, 3, 4)]
    with written(path, [row(1), row(2), gone, refers, *new]):
        damage(path, 1, 2)
    job = opened(path)
    assert job.troubles == ["task2(): its row does not match its checksum"]
    assert {kept.task_id for kept in job.known.results.values()} == {row(number)[0] for number in (11, 13, 14)}
    job.close()
    job = opened(path)  # What was damaged is deleted.
    assert not job.troubles
    job.close()


def test_what_is_damaged_and_is_newer_than_what_it_replaced_is_told(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with written(path, [row(1), at_the_place_of(1, row(2))]):
        damage(path, 2)
    job = opened(path)
    assert job.troubles == ["task2(): its row does not match its checksum"]
    job.close()


def test_long_chains_of_objects_in_objects_are_walked(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with written(path, [row(n, nested=row(n - 1)[0] + row(n - 1)[0] if n else b"") for n in range(5000)]):
        pass
    job = opened(path)
    assert len(job.known.results) == 5000
    job.close()


def test_flipped_bytes_are_never_served(tmp_path):
    """Wherever a bit flips: the row is as it was, or not there, or the file is refused."""
    path = tmp_path / "jobs.sqlite"
    chance = random.Random(1)
    originals = {number: chance.randbytes(chance.randrange(1, 2000)) for number in range(60)}
    with written(path, [row(number, data) for number, data in originals.items()]):
        pass
    whole = path.read_bytes()
    served = refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        damaged[chance.randrange(len(whole))] ^= 1 << chance.randrange(8)
        path.write_bytes(damaged)
        for end in ("-wal", "-shm"):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(f"{path}{end}")
        try:
            job = opened(path)
        except (ValueError, PermissionError):
            refused += 1
            continue
        for place, kept in job.known.results.items():
            number = int.from_bytes(place, "big")
            assert [value.data for value in kept.values] == [originals[number]]
            assert kept.version == b"v" * 16 and kept.task_id == row(number)[0]
        served += len(job.known.results)
        job.close()
    assert refused < 100 and served > 100 * 60 * 0.9, "most of it is still there"


def test_a_file_that_was_cut_off_is_refused_or_read_as_it_was(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with written(path, [row(number, b"x" * 1000) for number in range(60)]):
        pass
    whole = path.read_bytes()
    for size in range(0, len(whole), len(whole) // 20):
        path.write_bytes(whole[:size])
        with contextlib.suppress(ValueError, PermissionError):
            job = opened(path)
            assert all(kept.values[0].data == b"x" * 1000 for kept in job.known.results.values())
            job.close()


# ---------------------------------------------------------------- for people


@pytest.fixture
def kept(tmp_path):
    path = tmp_path / "jobs.sqlite"
    with written(path, [row(1), row(2)], "train"):
        pass
    return str(path)


def test_jobs_are_listed_with_what_is_kept(kept, capsys):
    assert main(["jobs", "--storage", kept]) == 0
    heads, line = capsys.readouterr().out.splitlines()
    assert heads.split()[:3] == ["JOB", "STATE", "RUNS"]
    assert line.split()[:3] == ["train", "FAILED", "1"] and line.split()[5] == "2"


def test_a_job_tells_its_runs_and_what_a_rerun_would_reuse(kept, capsys):
    assert main(["job", "train", "--storage", kept]) == 0
    told = capsys.readouterr().out
    assert "reuses these 2 results" in told and "task1" in told
    assert "the history of the last run is not there any more" in told


def test_a_job_that_is_forgotten_is_gone(kept, capsys):
    assert main(["job", "train", "--storage", kept, "--forget"]) == 0
    assert "forgot 2 kept objects" in capsys.readouterr().out
    assert main(["job", "train", "--storage", kept]) == 1
    assert "no durable job 'train'" in capsys.readouterr().err
    assert main(["jobs", "--storage", kept]) == 1


def test_a_job_that_is_running_is_not_forgotten(tmp_path, capsys):
    """Asked from another process: a process has all its own locks."""
    path = str(tmp_path / "jobs.sqlite")
    job = opened(path)
    try:
        ask = [sys.executable, "-m", "minray.command", "job", "job", "--storage", path]
        shown = subprocess.run(ask, capture_output=True, text=True, timeout=60)
        assert "RUNNING" in shown.stdout
        refused = subprocess.run([*ask, "--forget"], capture_output=True, text=True, timeout=60)
        assert refused.returncode == 1 and "is being run by another driver" in refused.stderr
    finally:
        job.close()


def test_a_storage_that_is_not_there_is_said_to_be_so(tmp_path, capsys):
    assert main(["jobs", "--storage", str(tmp_path / "none.sqlite")]) == 1
    assert "there is no storage" in capsys.readouterr().err


def test_what_the_last_run_left_is_told(tmp_path, capsys, run_driver):
    code = """
import os, sys, minray
minray.init(num_cpus=1, job="left", storage=sys.argv[1])
@minray.remote
def fails(): raise ValueError("no")
@minray.remote
def never(): pass
@minray.remote(num_cpus=1)
def holds():
    import time
    time.sleep(600)
ref = fails.remote()
minray.wait([ref])
held = holds.remote()
waits = never.remote()
minray.api.flush_records()
os.kill(os.getpid(), 9)
"""
    path = str(tmp_path / "jobs.sqlite")
    run_driver(code, path, expect_status=-9)
    os.close(job_storage._take_job(job_storage.objects_directory(path, "left"), "left"))  # Its GCS has ended.
    assert main(["job", "left", "--storage", path, "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["runs"][0]["state"] == "FAILED"
    left = {row["name"]: (row["state"], row["error_type"]) for row in told["left"]}
    assert left["fails"] == ("FAILED", "ValueError")
    assert left["holds"][0] in ("RUNNING", "SUBMITTED_TO_WORKER")
    assert left["never"][0] in ("PENDING_NODE_ASSIGNMENT", "SUBMITTED_TO_WORKER"), "it may have been handed ahead"
