"""The object store: where blocks go, memory that is still looked at, and space that runs out."""

import errno
import gc
import os
import random
import subprocess
import sys
import threading
import time
from multiprocessing import shared_memory

import numpy
import pytest

from minray import object_store
from minray.object_store import (
    ALIGNMENT,
    RELEASE_GIL_FROM,
    Allocator,
    Arena,
    copy_into,
    DamagedFileError,
    map_file,
    plan_arena,
    unlink_arena,
    write_file,
)

MIB = 1 << 20
linux = pytest.mark.skipif(sys.platform != "linux", reason="looks at /proc or /dev/shm")


def new_name():
    return "minray-test-" + os.urandom(8).hex()


@pytest.fixture(params=["segment", "file"])
def arena(request, tmp_path):
    arena = Arena.create(new_name() if request.param == "segment" else str(tmp_path / "arena"), MIB)
    yield arena
    arena.close()
    arena.unlink()


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MiB."""
    mount = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", tmp_path]
    if sys.platform != "linux" or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("needs to be allowed to mount")
    yield str(tmp_path)
    subprocess.run(["umount", "--lazy", tmp_path], check=True)


def run_python(code):
    """Runs a program that may make an arena called `name`; returns what it printed, stderr included."""
    name = new_name()
    code = f"name = {name!r}\nimport os\nfrom minray.object_store import *\n{code}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    unlink_arena(name)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


# The allocator


def test_blocks_are_aligned_and_the_smallest_hole_that_fits_is_taken():
    allocator = Allocator(10_000)
    offsets = [allocator.allocate(size).offset for size in (1000, 10, 500, 10)]
    assert offsets == [0, 1024, 1088, 1600]
    allocator.free(0)
    allocator.free(1088)
    assert allocator.allocate(400).offset == 1088
    allocator.check()


def test_memory_used_before_is_preferred_to_a_hole_that_fits_better():
    allocator = Allocator(2048)
    allocator.allocate(1024)
    allocator.allocate(512)
    allocator.free(0)
    assert allocator.allocate(448) == (0, False), "the cold hole of 512 bytes would fit better"


def test_a_block_is_fresh_until_its_memory_has_been_used():
    allocator = Allocator(4096)
    assert allocator.allocate(1024) == (0, True)
    allocator.free(0)
    assert allocator.allocate(1024) == (0, False)
    allocator.free(0)
    assert allocator.allocate(1025) == (0, True)


def test_a_block_whose_backing_failed_is_fresh_again_and_so_is_all_above_it():
    allocator = Allocator(4096)
    for offset in (0, 1024, 2048):
        assert allocator.allocate(1024) == (offset, True)
    allocator.free(1024, backed=False)
    allocator.free(2048)
    assert allocator.allocate(1024) == (1024, True)
    assert allocator.allocate(1024) == (2048, True)


def test_where_there_is_no_memory_the_arena_ends_and_what_is_below_goes_on():
    allocator = Allocator(64 * ALIGNMENT)
    below = allocator.allocate(8 * ALIGNMENT).offset
    refused = allocator.allocate(16 * ALIGNMENT)
    assert refused.fresh
    allocator.retire(refused.offset)
    allocator.check()
    assert allocator.capacity == allocator.used == 8 * ALIGNMENT
    assert allocator.allocate(1) is None
    allocator.free(below)
    assert allocator.allocate(8 * ALIGNMENT) == (0, False)


def test_a_block_without_memory_below_others_is_never_given_out_again():
    allocator = Allocator(64 * ALIGNMENT)
    refused, other = allocator.allocate(8 * ALIGNMENT), allocator.allocate(8 * ALIGNMENT)
    allocator.retire(refused.offset)
    allocator.check()
    assert allocator.capacity == 64 * ALIGNMENT
    offsets = []
    while block := allocator.allocate(8 * ALIGNMENT):
        assert block.fresh
        offsets.append(block.offset)
    assert refused.offset not in offsets and len(offsets) == 6 and other.offset not in offsets
    allocator.check()


@pytest.mark.parametrize("seed", range(20))
def test_refusals_in_any_order_keep_the_allocator_whole_and_come_to_an_end(seed):
    rng = random.Random(seed)
    allocator, mine = Allocator(256 * ALIGNMENT), []
    for _ in range(300):
        if mine and rng.random() < 0.4:
            allocator.free(mine.pop(rng.randrange(len(mine))))
        elif block := allocator.allocate(rng.randrange(1, 32 * ALIGNMENT)):
            if block.fresh and rng.random() < 0.3:
                allocator.retire(block.offset)
            else:
                mine.append(block.offset)
        allocator.check()
        assert set(mine) <= set(allocator.blocks)


def test_a_full_allocator_returns_none_and_neighbouring_holes_merge():
    allocator = Allocator(4 * ALIGNMENT + 63)
    assert [allocator.allocate(1).offset for _ in range(4)] == [0, 64, 128, 192]
    assert allocator.allocate(1) is None
    assert allocator.largest_hole == 0
    for offset in (0, 128, 64, 192):
        allocator.free(offset)
        allocator.check()
    assert allocator.largest_hole == allocator.capacity == 256
    assert Allocator(63).allocate(1) is None


def test_freeing_twice_is_an_error_of_the_program():
    allocator = Allocator(4096)
    allocator.allocate(1)
    allocator.free(0)
    with pytest.raises(AssertionError, match="no block starts at 0"):
        allocator.free(0)


@pytest.mark.parametrize("seed", range(20))
def test_any_sequence_of_calls_keeps_the_invariants(seed):
    """Against a model that knows, for every 64 bytes, whether a writer has backed them."""
    rng = random.Random(seed)
    allocator = Allocator(rng.choice([1000, 10_000, 100_000]))
    backed = bytearray(allocator.capacity // ALIGNMENT)
    live = {}  # offset -> (size, fresh)
    for _ in range(600):
        if live and rng.random() < 0.5:
            offset = rng.choice(list(live))
            size, fresh = live.pop(offset)
            units = slice(offset // ALIGNMENT, -(-(offset + size) // ALIGNMENT))
            if fresh and rng.random() < 0.2:
                allocator.free(offset, backed=False)
            else:
                backed[units] = b"\1" * len(backed[units])
                allocator.free(offset)
        else:
            size = int(rng.expovariate(10 / allocator.capacity)) + 1
            largest = allocator.largest_hole
            block = allocator.allocate(size)
            assert (block is None) == (size > largest)
            if block is not None:
                if not block.fresh:
                    assert all(backed[block.offset // ALIGNMENT : (block.offset + size) // ALIGNMENT])
                assert allocator.blocks[block.offset] >= size
                live[block.offset] = (size, block.fresh)
        allocator.check()
        assert allocator.blocks.keys() == live.keys()
    for offset in live:
        allocator.free(offset)
    allocator.check()
    assert allocator.used == 0 and allocator.largest_hole == allocator.capacity


def test_a_job_that_puts_and_frees_stays_in_the_same_memory():
    allocator = Allocator(1 << 30)
    for _ in range(100):
        blocks = [allocator.allocate(size) for size in (5 * MIB, 3 * MIB, 7 * MIB)]
        for block in blocks:
            allocator.free(block.offset)
    assert allocator.touched == 15 * MIB


# The arena


def test_what_one_process_writes_another_reads(arena):
    other = Arena.attach(arena.name)
    arena.back(64, 100)
    arena.write_view(64, 100)[:] = b"x" * 100
    assert bytes(other.pinned_view(64, 100, lambda: None)) == b"x" * 100
    assert other.capacity == arena.capacity == MIB
    other.close()


@pytest.mark.parametrize("arena", ["segment"], indirect=True)
def test_a_segment_is_one_that_multiprocessing_can_open(arena):
    arena.write_view(0, 5)[:] = b"hello"
    reading = (
        "from multiprocessing import resource_tracker, shared_memory; resource_tracker.register = print; "
    )
    reading += f"segment = shared_memory.SharedMemory({arena.name!r}); print(bytes(segment.buf[:5]))"
    assert "b'hello'" in subprocess.check_output([sys.executable, "-c", reading], text=True)


def test_a_pinned_view_is_read_only_and_tells_when_the_last_array_made_from_it_has_gone(arena):
    released = []
    arena.write_view(128, 800)[:] = numpy.arange(100.0).data.cast("B")
    view = arena.pinned_view(128, 800, lambda: released.append(True))
    assert view.readonly and view.format == "B" and len(view) == 800
    array = numpy.frombuffer(view[80:], dtype=float)
    part = array[::2].reshape(5, 9)
    assert not array.flags.writeable
    assert part[0, 1] == 12.0
    del view, array
    gc.collect()
    assert not released
    del part
    assert released == [True]


@pytest.mark.parametrize(
    "offset, size", [(0, 1), (MIB - 1, 1), (0, MIB), (64, MIB - 64), (MIB - 64, 33), (4096, 65537)]
)
def test_a_pinned_view_shows_exactly_its_block(arena, offset, size):
    content = random.Random(offset + size).randbytes(size)
    arena.write_view(offset, size)[:] = content
    assert bytes(arena.pinned_view(offset, size, lambda: None)) == content


def test_a_view_outside_the_arena_is_an_error_of_the_program(arena):
    for offset, size in ((-1, 5), (0, 0), (0, MIB + 1), (MIB, 1)):
        for ask in (arena.back, arena.write_view, lambda *block: arena.pinned_view(*block, print)):
            with pytest.raises(AssertionError):
                ask(offset, size)


def test_arrays_can_be_read_after_the_arena_was_closed_and_removed(arena):
    released = []
    arena.write_view(0, 800)[:] = numpy.arange(100.0).data.cast("B")
    array = numpy.frombuffer(arena.pinned_view(0, 800, lambda: released.append(True)), dtype=float)
    writing = arena.write_view(4096, 10)
    arena.close()
    arena.unlink()
    arena.close()
    arena.unlink()
    writing[:] = b"0123456789"
    assert array.sum() == 4950.0
    assert not released
    del array
    assert released
    with pytest.raises(ValueError, match="is closed"):
        arena.write_view(0, 1)


@linux
def test_the_mapping_and_the_file_descriptors_go_with_the_last_view(arena):
    def open_files():
        return sum(
            arena.name in os.readlink(f"/proc/self/fd/{fd}")
            for fd in os.listdir("/proc/self/fd")
            if alive(fd)
        )

    def alive(fd):
        return os.path.lexists(f"/proc/self/fd/{fd}")

    def mapped():
        with open("/proc/self/maps") as maps:
            return arena.name in maps.read()

    view = arena.pinned_view(0, 100, lambda: None)
    arena.close()
    assert mapped()
    del view
    assert not mapped() and not open_files()


@linux
def test_the_descriptor_that_backing_extends_is_not_one_of_the_low_ones(arena):
    assert arena._fd >= object_store.HIGH_FD
    assert not os.get_inheritable(arena._fd)


def test_a_name_that_is_taken_is_not_used(arena):
    with pytest.raises(FileExistsError):
        Arena.create(arena.name, MIB)
    Arena.attach(arena.name).close()


def test_a_missing_arena_is_a_file_not_found_error(tmp_path):
    for name in (new_name(), str(tmp_path / "arena")):
        with pytest.raises(FileNotFoundError):
            Arena.attach(name)
        unlink_arena(name)


@linux
@pytest.mark.parametrize("spoil", ["mode", "owner"])
def test_memory_that_others_can_reach_or_own_is_refused(arena, spoil):
    path = arena.name if arena.name.startswith("/") else "/dev/shm/" + arena.name
    assert os.stat(path).st_mode & 0o777 == 0o600
    if spoil == "mode":
        os.chmod(path, 0o640)
    elif os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        pytest.skip("only root can give files away")
    fds = len(os.listdir("/proc/self/fd"))
    with pytest.raises(PermissionError, match="belongs to user"):
        Arena.attach(arena.name)
    assert len(os.listdir("/proc/self/fd")) == fds


def test_an_arena_in_a_file_is_not_reached_through_a_symlink(tmp_path):
    arena = Arena.create(str(tmp_path / "arena"), MIB)
    os.symlink(arena.name, tmp_path / "link")
    with pytest.raises(OSError) as caught:
        Arena.attach(str(tmp_path / "link"))
    assert caught.value.errno == errno.ELOOP
    arena.close()


def test_forked_children_use_the_inherited_arena_and_close_only_their_own(arena):
    arena.write_view(0, 6)[:] = b"parent"
    for child in range(3):
        pid = os.fork()
        if pid == 0:
            view = arena.pinned_view(0, 6, lambda: None)
            arena.back(4096 * child, 10)
            arena.write_view(4096 * (child + 1), 7)[:] = b"child %d" % child
            arena.close()
            os._exit(0 if bytes(view) == b"parent" else 1)
        assert os.waitpid(pid, 0)[1] == 0
    assert bytes(arena.write_view(8192, 7)) == b"child 1"
    arena.back(0, MIB)
    again = Arena.attach(arena.name)
    assert bytes(again.pinned_view(12288, 7, lambda: None)) == b"child 2"
    again.close()


def test_memory_that_is_not_there_is_enospc_and_not_a_sigbus(small_disk):
    arena = Arena.create(small_disk + "/arena", 8 * MIB)
    arena.back(0, MIB // 2)
    arena.write_view(0, MIB // 2)[:] = bytes(MIB // 2)
    with pytest.raises(OSError, match="no memory for 1,048,576 bytes") as caught:
        arena.back(MIB // 2, MIB)
    assert caught.value.errno == errno.ENOSPC
    arena.back(MIB // 2, MIB // 4)
    arena.write_view(MIB // 2, MIB // 4)[:] = bytes(MIB // 4)
    arena.close()


@linux
def test_a_program_that_ends_with_live_views_is_silent_and_leaves_no_tracker_and_no_name():
    printed = run_python("""
import numpy, sys
arena = Arena.create(name, 1 << 20)
view = arena.pinned_view(0, 1000, lambda: print("released at exit"))
array = numpy.frombuffer(arena.pinned_view(4096, 800, lambda: print("released at exit")))
write_file(f"/tmp/{name}", b"x" * 5000)
restored = numpy.frombuffer(map_file(f"/tmp/{name}", lambda: print("released at exit")), dtype="u1")
os.unlink(f"/tmp/{name}")
cycle = [array]; cycle.append(cycle)
arena.unlink()
if len(sys.argv) == 1: arena.close()
print(os.path.exists("/dev/shm/" + name), array.sum(), restored.sum())
from multiprocessing.resource_tracker import _resource_tracker as tracker
print(tracker._fd, tracker._pid, open("/proc/thread-self/children").read())
""")
    assert printed == f"False 0.0 {5000 * ord('x')}\nNone None \n"


@linux
def test_an_arena_that_nobody_closed_is_silent_at_exit_too():
    assert run_python("arena = Arena.create(name, 1 << 20); view = arena.write_view(0, 5)") == ""


def test_other_shared_memory_of_the_program_is_tracked_as_before():
    tracked = shared_memory.resource_tracker
    arena = Arena.create(new_name(), MIB)
    arena.unlink()
    arena.close()
    assert shared_memory.resource_tracker is tracked
    with pytest.raises(FileExistsError):
        name = new_name()
        arena = Arena.create(name, MIB)
        try:
            Arena.create(name, MIB)
        finally:
            arena.close()
            arena.unlink()
    assert shared_memory.resource_tracker is tracked


def test_importing_the_module_imports_neither_numpy_nor_multiprocessing():
    code = (
        "import sys, minray.object_store; print({'numpy', 'multiprocessing', 'secrets'} & sys.modules.keys())"
    )
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "set()\n"


def test_attaching_does_not_import_multiprocessing(arena):
    code = f"import sys; from minray.object_store import Arena; Arena.attach({arena.name!r}).close(); "
    code += "print('multiprocessing' in sys.modules)"
    assert subprocess.check_output([sys.executable, "-c", code], text=True) == "False\n"


# How large, and where


GIB = 1 << 30


def with_free(monkeypatch, **free):
    """As if each directory had so many bytes free."""

    class Found:
        f_frsize = 4096

        def __init__(self, path):
            self.f_bavail = free[os.path.basename(path)] // 4096

    monkeypatch.setattr(os, "statvfs", Found)


def test_the_arena_takes_three_tenths_of_the_memory_or_what_was_asked_for(monkeypatch):
    with_free(monkeypatch, shm=8 * GIB)
    name, capacity, warning = plan_arena(None, 10 * GIB, "/session", "/shm")
    assert 0 <= capacity - 3 * GIB < 4096 and capacity % 4096 == 0 and warning is None
    assert name.startswith("minray-") and plan_arena(None, GIB, "/session", "/shm").name != name
    assert plan_arena(100 * MIB, GIB, "/session", "/shm")[1:] == (100 * MIB, None)


def test_the_arena_is_no_larger_than_shared_memory_and_says_so_only_if_more_was_asked_for(monkeypatch):
    with_free(monkeypatch, shm=GIB)
    assert plan_arena(None, 10 * GIB, "/session", "/shm")[1:] == (GIB, None)
    _, capacity, warning = plan_arena(2 * GIB, 10 * GIB, "/session", "/shm")
    assert capacity == GIB and "object_store_memory=2,147,483,648" in warning


def test_where_shared_memory_is_tiny_the_arena_is_a_file(monkeypatch):
    with_free(monkeypatch, shm=64 * MIB, session=50 * GIB)
    name, capacity, warning = plan_arena(None, 10 * GIB, "/session", "/shm")
    assert name == "/session/arena" and capacity >= 3 * GIB
    assert "67,108,864 bytes free" in warning and "--shm-size" in warning
    assert plan_arena(32 * MIB, 10 * GIB, "/session", "/shm")[1:] == (32 * MIB, None), "what fits goes there"
    with_free(monkeypatch, shm=64 * MIB, session=GIB)
    assert plan_arena(None, 10 * GIB, "/session", "/shm").capacity == GIB // 2, "the disk is left half empty"


def test_where_the_disk_has_even_less_the_arena_is_what_shared_memory_has(monkeypatch):
    with_free(monkeypatch, shm=64 * MIB, session=2 * MIB)
    name, capacity, warning = plan_arena(None, 10 * GIB, "/session", "/shm")
    assert name.startswith("minray-") and capacity == 64 * MIB and "67,108,864 bytes free" in warning


def test_where_neither_has_room_it_is_said_before_anything_is_made(monkeypatch):
    with_free(monkeypatch, shm=4096, session=100_000)
    with pytest.raises(OSError, match="4,096 bytes free.*/session") as caught:
        plan_arena(None, 10 * GIB, "/session", "/shm")
    assert caught.value.errno == errno.ENOSPC


@linux
def test_a_machine_without_shared_memory_gets_a_file(tmp_path):
    name, capacity, warning = plan_arena(None, GIB, str(tmp_path), str(tmp_path / "missing"))
    assert name == str(tmp_path / "arena") and "has 0 bytes free" in warning
    arena = Arena.create(name, capacity)
    arena.close()


# Copying


@pytest.mark.parametrize("size", [1, 1000, RELEASE_GIL_FROM - 1, RELEASE_GIL_FROM, RELEASE_GIL_FROM + 12_345])
@pytest.mark.parametrize("kind", [bytes, bytearray, lambda data: memoryview(data)[:]])
def test_copies_of_any_size_and_source_are_exact(size, kind):
    data = random.Random(size).randbytes(size)
    room = bytearray(size + 2)
    copy_into(memoryview(room)[1:-1], kind(data))
    assert room == b"\0" + data + b"\0"


def test_a_copy_that_does_not_fit_or_may_not_be_made_is_refused():
    for size in (10, RELEASE_GIL_FROM):
        with pytest.raises(ValueError, match="do not fill"):
            copy_into(memoryview(bytearray(size)), bytes(size - 1))
        with pytest.raises((AssertionError, TypeError)):
            copy_into(memoryview(bytes(size)), bytes(size))
    strided = memoryview(bytearray(2 * RELEASE_GIL_FROM))[::2]
    with pytest.raises(BufferError):
        copy_into(strided, bytes(RELEASE_GIL_FROM))


def test_a_large_copy_lets_other_threads_run():
    source = bytes(8 * RELEASE_GIL_FROM)
    target = memoryview(bytearray(len(source)))
    old = sys.getswitchinterval()
    sys.setswitchinterval(100)  # Nobody takes the GIL from a thread that does not let go of it.
    try:
        ran = []
        go = threading.Event()
        thread = threading.Thread(target=lambda: (go.wait(), ran.append(time.perf_counter())))
        thread.start()
        go.set()  # The thread wants the GIL from here on; only the copy gives it away.
        copy_into(target, source)
        end = time.perf_counter()
        thread.join()
    finally:
        sys.setswitchinterval(old)
    assert ran[0] < end


# Spilling


def test_a_file_is_restored_without_a_copy_and_may_be_removed_meanwhile(tmp_path):
    released = []
    path = str(tmp_path / "spilled")
    assert write_file(path, b"abc", bytearray(b"def"), memoryview(b"x" * MIB)) == MIB + 6
    assert os.stat(path).st_mode & 0o777 == 0o600
    view = map_file(path, lambda: released.append(True))
    assert view.readonly and view.format == "B"
    array = numpy.frombuffer(view, dtype="u1")
    os.unlink(path)
    del view
    assert bytes(array[:7]) == b"abcdefx" and len(array) == MIB + 6
    assert not released
    del array
    assert released == [True]
    assert os.listdir(tmp_path) == []


@linux
def test_a_thousand_restored_files_take_no_file_descriptors(tmp_path):
    path = str(tmp_path / "spilled")
    write_file(path, b"x" * 5000)
    fds = len(os.listdir("/proc/self/fd"))
    views = [map_file(path, lambda: None) for _ in range(1000)]
    assert len(os.listdir("/proc/self/fd")) == fds
    with open("/proc/self/maps") as maps:
        assert path in maps.read()
    del views
    with open("/proc/self/maps") as maps:
        assert path not in maps.read()


def test_a_full_disk_is_enospc_and_leaves_no_half_a_file(small_disk):
    write_file(small_disk + "/fits", bytes(MIB // 2))
    with pytest.raises(OSError, match="cannot write 1,048,577 bytes") as caught:
        write_file(small_disk + "/does_not", bytes(1), bytes(MIB))
    assert caught.value.errno == errno.ENOSPC and caught.value.filename == small_disk + "/does_not"
    assert os.listdir(small_disk) == ["fits"]
    write_file(small_disk + "/does", bytes(MIB // 4))


def test_a_spilled_file_that_is_missing_or_empty_is_an_error(tmp_path):
    with pytest.raises(FileNotFoundError):
        map_file(str(tmp_path / "missing"), lambda: None)
    (tmp_path / "empty").touch()
    with pytest.raises(DamagedFileError, match="cut off: it has 0 bytes"):
        map_file(str(tmp_path / "empty"), lambda: None)


def test_a_file_with_any_byte_changed_or_cut_off_is_not_restored(tmp_path):
    path, released = tmp_path / "spilled", []
    write_file(str(path), b"what was spilled")
    whole = path.read_bytes()
    assert bytes(map_file(str(path), lambda: None)) == b"what was spilled"
    wrong = [whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :] for at in range(len(whole))]
    wrong += [whole[:size] for size in range(len(whole))] + [whole + b"\0"]
    for contents in wrong:
        path.write_bytes(contents)
        with pytest.raises(DamagedFileError, match=str(path)):
            map_file(str(path), lambda: released.append(True))
    assert not released, "the caller was told of the failure already"


def test_what_an_interrupted_write_left_behind_is_written_over(tmp_path):
    (tmp_path / "spilled.partial").write_bytes(b"half of what was to be")
    write_file(str(tmp_path / "spilled"), b"whole")
    assert bytes(map_file(str(tmp_path / "spilled"), lambda: None)) == b"whole"
    assert os.listdir(tmp_path) == ["spilled"]
