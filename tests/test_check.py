"""Damaged files: found by `minray check`, or harmless; never believed."""

from __future__ import annotations

import contextlib
import random
import shutil
import sqlite3
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import minray
from minray import checksum, command, gcs
from minray.check import check_file, fault_of_log
from minray.schema import TABLES

Content = dict[str, list[tuple[Any, ...]]]
BITS = [1 << bit for bit in range(8)]


def rows(seed: int, tables: dict[str, int]) -> list[tuple[str, list[tuple[Any, ...]]]]:
    """Rows of every kind of value, by a seed; of each table so many."""
    chance = random.Random(seed)

    def value(kind: type) -> Any:
        if chance.random() < 0.1:
            return None
        if kind is int:
            return chance.choice([0, 1, -1, chance.randrange(256), chance.randrange(2**31), 1_700_000_000_000_000])
        if kind is str:
            return chance.choice(["", "resize", "größer", '{"CPU": 1.0}', "x" * chance.randrange(6000)])
        return chance.randbytes(chance.choice([0, 16, 16, 300, 9000]))

    return [
        (name, [(seed * 1000 + no, *(value(about.type) for about in list(TABLES[name].columns.values())[1:-1]))
                for no in range(count)])
        for name, count in tables.items()
    ]  # fmt: skip


def content(path: Path) -> Content:
    """Everything that a reader could be given; raises sqlite3.DatabaseError."""
    with contextlib.closing(sqlite3.connect(f"file:{path}?mode=ro", uri=True)) as database:
        found = {table: database.execute(f"SELECT rowid, * FROM {table}").fetchall() for table in TABLES}
        found["schema"] = database.execute("SELECT type, name, sql FROM sqlite_master").fetchall()
        return found


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file that its GCS has ended: rows in all tables, free pages, totals, overflow pages."""
    path = tmp_path_factory.mktemp("whole") / "gcs.sqlite"
    writer = gcs.Gcs(str(path), history=10)
    with contextlib.closing(writer.database):
        for seed in range(4):
            some = {table: 12 if table in ("tasks", "objects", "events") else 3 for table in TABLES}
            del some["task_totals"], some["object_totals"]
            writer.write([(seed, rows(seed, some))])
            writer.write([(seed, [("object_updates", [(2, None, 9, seed * 1000 + 1), (1, 2, None, seed * 1000 + 2)])])])
        writer.prune()
        writer.finish()
    assert content(path)["task_totals"] and content(path)["object_totals"]
    return path


@pytest.fixture(scope="module")
def killed(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Content]]:
    """A file and the log of a GCS that was killed, and all that it ever held."""
    live = tmp_path_factory.mktemp("live") / "gcs.sqlite"
    copy = tmp_path_factory.mktemp("killed") / "gcs.sqlite"
    states = []
    writer = gcs.Gcs(str(live))
    with contextlib.closing(writer.database):
        states.append(content(live))
        for seed in range(6):
            writer.write([(seed, rows(seed, {"tasks": 5, "events": 3, "jobs": 1}))])
            states.append(content(live))
            if seed == 2:
                # The log is used again from its beginning, and is then longer than what is valid of it.
                writer.database.execute("PRAGMA wal_checkpoint(RESTART)")
        for suffix in ("", "-wal"):
            shutil.copy(f"{live}{suffix}", f"{copy}{suffix}")
    return copy, states


@pytest.fixture
def damaged(tmp_path: Path) -> Iterator[Path]:
    yield tmp_path / "gcs.sqlite"


def copied(source: Path, to: Path) -> None:
    for old in to.parent.glob("gcs.sqlite*"):
        old.unlink()
    for suffix in ("", "-wal"):
        with contextlib.suppress(FileNotFoundError):
            shutil.copy(f"{source}{suffix}", f"{to}{suffix}")


def flip(path: Path, chance: random.Random) -> str:
    data = bytearray(path.read_bytes())
    at, mask = chance.randrange(len(data)), chance.choice([*BITS, 255, chance.randrange(1, 256)])
    data[at] ^= mask
    path.write_bytes(data)
    return f"byte {at} ^ {mask}"


def test_a_whole_file_is_found_whole(whole, killed):
    report = check_file(str(whole))
    assert report.faults == []
    assert report.rows == sum(len(found) for table, found in content(whole).items() if table != "schema")
    assert check_file(str(killed[0])).faults == []


def test_200_flipped_bytes_are_found_or_harmless(whole, damaged):
    right, found = content(whole), 0
    for seed in range(200):
        copied(whole, damaged)
        what = flip(damaged, random.Random(seed))
        if check_file(str(damaged)).faults:
            found += 1
        else:
            assert content(damaged) == right, f"seed {seed}: {what} changes what is read, and nobody notices"
    assert found > 100


def test_a_file_that_is_cut_off_is_found(whole, damaged):
    right, size = content(whole), whole.stat().st_size
    chance = random.Random(7)
    for cut in [0, 1, 99, 100, 4095, 4096, size - 4096, size - 1, *(chance.randrange(size) for _ in range(30))]:
        copied(whole, damaged)
        with damaged.open("r+b") as file:
            file.truncate(cut)
        assert check_file(str(damaged)).faults or content(damaged) == right, f"cut to {cut} of {size} bytes"


def free_pages(pages: list[bytes]) -> set[int]:
    """By index: those that a file of SQLite keeps for later, with what they held.  Nothing tells that from today's."""
    found: set[int] = set()
    trunk = int.from_bytes(pages[0][32:36], "big")
    while trunk:
        words = [int.from_bytes(pages[trunk - 1][at : at + 4], "big") for at in range(0, 4096, 4)]
        found.update(number - 1 for number in (trunk, *words[2 : 2 + words[1]]))
        trunk = words[0]
    return found


def test_pages_of_zeros_and_of_another_place_are_found(whole, damaged):
    data = whole.read_bytes()
    chance = random.Random(8)
    right, pages = content(whole), [data[at : at + 4096] for at in range(0, len(data), 4096)]
    free = free_pages(pages)
    in_use = [page for number, page in enumerate(pages) if number not in free]
    for number in range(1, len(pages)):
        for other in (bytes(4096), chance.choice(in_use)):
            copied(whole, damaged)
            damaged.write_bytes(b"".join([*pages[:number], other, *pages[number + 1 :]]))
            assert check_file(str(damaged)).faults or content(damaged) == right, f"page {number}"


def test_a_torn_log_is_found_or_gives_an_earlier_state_of_the_file(killed, damaged):
    """Whatever has happened to it, what is read was once the truth."""
    path, states = killed
    assert content(path) == states[-1]
    wal = Path(f"{path}-wal").read_bytes()
    for seed in range(60):
        copied(path, damaged)
        chance = random.Random(seed)
        if seed % 3:
            what = flip(Path(f"{damaged}-wal"), chance)
        else:
            cut = chance.randrange(len(wal))
            Path(f"{damaged}-wal").write_bytes(wal[:cut])
            what = f"cut to {cut} of {len(wal)} bytes"
        faults = check_file(str(damaged)).faults
        now = content(damaged)
        assert now in states, f"seed {seed}: {what} gives what never was"
        if now != states[-1] and not faults and seed % 3:
            # Only the last transaction may go without a word: that is what a kill in its middle looks like.
            assert now == states[-2], f"seed {seed}: {what} loses transactions, and nobody notices"


def test_what_a_kill_in_the_middle_of_a_commit_leaves_is_no_fault(killed):
    wal = Path(f"{killed[0]}-wal").read_bytes()
    page = 4096 + 24
    salts = wal[16:24]
    last = max(at for at in range(32, len(wal) - page + 1, page) if wal[at + 8 : at + 16] == salts)
    for torn in (wal[: last + 24] + bytes(4096) + wal[last + page :], wal[: last + 100], wal[:32], b""):
        assert fault_of_log(torn) == ""
    assert "byte 32:" in fault_of_log(wal[:40] + b"xxxx" + wal[44:])
    assert "header" in fault_of_log(b"x" + wal[1:])


def test_the_report_names_the_file_the_rows_and_the_way_out(whole, damaged, capsys):
    copied(whole, damaged)
    with contextlib.closing(sqlite3.connect(damaged)) as database, database:
        database.execute("UPDATE tasks SET result_bytes = 999 WHERE no = 3011")
        database.execute("UPDATE objects SET size_bytes = 77")
        database.execute("CREATE TABLE more (x)")
    assert command.main(["check", str(damaged)]) == 1
    told = capsys.readouterr().out
    assert str(damaged) in told and ".recover" in told
    assert "table tasks: 1 row does not match its checksum (rowid 3011)" in told
    objects = [row[0] for row in content(damaged)["objects"]]
    named = ", ".join(map(str, objects[:10]))
    assert len(objects) > 10
    assert f"table objects: {len(objects)} rows do not match their checksums (rowid {named}, …)" in told
    assert "there is an unknown table more" in told
    assert command.main(["check", str(whole)]) == 0
    assert f"{whole} is whole" in capsys.readouterr().out


def test_a_file_of_another_version_and_one_that_is_no_database_are_told(whole, damaged, capsys):
    copied(whole, damaged)
    with contextlib.closing(sqlite3.connect(damaged)) as database:
        database.execute("PRAGMA user_version = 1")
    assert any("its format is version 1" in fault for fault in check_file(str(damaged)).faults)
    damaged.write_text("this is a text, and it is long enough to be taken for a header of a hundred bytes" * 5)
    assert check_file(str(damaged)).faults == ["SQLite cannot read on: file is not a database"]
    assert command.main(["check", str(damaged)]) == 1
    told = capsys.readouterr().out
    assert "may be no file of minray's" in told and "delete" not in told, "it lies among anything"
    (damaged.parent / "session.json").touch()
    assert command.main(["check", str(damaged)]) == 1
    assert f"or delete {damaged.parent}." in capsys.readouterr().out
    assert command.main(["check", str(damaged.parent / "nothing")]) == 1
    assert "no session" in capsys.readouterr().err


def test_the_storage_of_a_durable_job_is_checked_with_its_files(tmp_path):
    storage = tmp_path / "jobs.sqlite"
    with minray.init(num_cpus=1, job="train", storage=str(storage)):
        small, large = minray.remote(lambda: 7), minray.remote(lambda: bytes(300_000))
        assert minray.get([small.remote(), large.remote()])[0] == 7
    report = check_file(str(storage))
    assert report.faults == [] and report.rows >= 2
    with contextlib.closing(sqlite3.connect(storage)) as database, database:
        database.execute("UPDATE results SET data = x'00' WHERE file IS NULL")
    (file,) = (path for path in (tmp_path / "jobs.sqlite.objects" / "train").iterdir() if path.name != "lock")
    with file.open("r+b") as opened:
        opened.write(b"another beginning")
    faults = check_file(str(storage)).faults
    assert any("table results: 1 row does not match" in fault for fault in faults)
    assert any(file.name in fault and "damaged" in fault for fault in faults)
    file.unlink()
    assert any(file.name in fault and "No such file" in fault for fault in check_file(str(storage)).faults)


def test_every_row_that_the_gcs_writes_or_changes_has_its_checksum(whole):
    """That `whole` is found whole says so of the rows in it; each table must have had some."""
    found = content(whole)
    assert all(found[table] for table in TABLES)
    # These were changed in place: the end of the session, and what became of objects.
    assert {row[6] for row in found["jobs"]} & {1, 2} and any(row[8] == 9 for row in found["objects"])


def test_a_checksum_tells_values_apart_that_look_alike():
    alike = [(1,), ("1",), (b"1",), (1.0,), (None,), (0,), ("",), (b"",), (2**40,), (-1,), (1, None), (None, 1)]
    assert len({checksum.row_checksum(row) for row in alike}) == len(alike)


def test_checksums_are_the_same_in_every_process_and_version_of_python():
    """These numbers stand in files: they must never change."""
    assert checksum.row_checksum((1, "resize", b"", None)) == 49196699
    assert checksum.row_checksum((-(2**63), 1.5, "äöü\0", bytes(range(256)))) == 3417323225
    assert checksum.row_checksum(("tasks", "tasks")) == checksum.row_checksum(("task" + "s", "".join("tasks")))
