"""What becomes of values on their way, and what is said of those that cannot go."""

from __future__ import annotations

import collections
import copyreg
import dataclasses
import decimal
import enum
import functools
import gc
import importlib.util
import io
import os
import pickle
import socket
import subprocess
import sys
import threading
import types
import weakref
from pathlib import Path
from typing import Any

import cloudpickle
import numpy as np
import pytest

from minray import serialization
from minray.serialization import (
    ALIGNMENT,
    INLINE_LIMIT,
    Serialized,
    deserialize,
    flat_chunks,
    inspect_serializability,
    note_ref,
    serialize,
    to_bytes,
    worker_can_import,
    write_flat,
)

ROOT = Path(__file__).parent.parent


def there_and_back(value: Any) -> Any:
    return deserialize(to_bytes(serialize(value)))


def in_a_fresh_process(script: str, data: bytes, **options: Any) -> str:
    """What `script` prints, in an interpreter that knows minray and nothing of this test."""
    command = [sys.executable, "-c", "import sys; data = sys.stdin.buffer.read()\n" + script]
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, input=data, capture_output=True, env=environment, cwd="/", **options)
    assert done.returncode == 0, done.stderr.decode()
    return done.stdout.decode().strip()


class Holder:
    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)


# --- values -----------------------------------------------------------------------------

VALUES = [
    None,
    True,
    0,
    -(2**70),
    1.5,
    1j,
    "",
    "naïve \ud800",
    b"",
    b"abc",
    bytearray(b"abc"),
    (),
    [],
    {},
    set(),
    frozenset({1}),
    (1, "a", None),
    [1, [2, [3]]],
    {"a": 1, 2: "b", (1, 2): [3]},
    list(range(1000)),
    "x" * (INLINE_LIMIT + 1),
    b"x" * (INLINE_LIMIT + 1),
    bytearray(b"x" * (INLINE_LIMIT + 1)),
    decimal.Decimal("1.1"),
    collections.OrderedDict(a=1),
    collections.deque([1, 2]),
    range(3),
    slice(1, 2),
    ...,
    NotImplemented,
    int,
    type(None),
    len,
    collections.namedtuple,
]


@pytest.mark.parametrize("value", VALUES, ids=lambda value: f"{type(value).__name__}-{str(value)[:10]!a}")
def test_a_value_comes_back_as_it_was(value):
    result = there_and_back(value)
    assert result == value
    assert type(result) is type(value)


def test_the_size_is_that_of_the_flat_form():
    for value in [*VALUES, np.zeros(10), [np.zeros(100), np.ones(3, "u1"), np.zeros(0)]]:
        serialized = serialize(value)
        assert serialized.size == len(to_bytes(serialized)) == sum(map(len, flat_chunks(serialized)))


def test_a_value_without_buffers_is_flat_as_its_pickle():
    serialized = serialize({"a": (1, 2)})
    assert to_bytes(serialized) is serialized.data
    assert pickle.loads(serialized.data) == {"a": (1, 2)}


def test_large_bytes_are_not_copied_before_they_are_written():
    value = b"x" * 1_000_000
    serialized = serialize(value)
    assert len(serialized.data) < 200
    assert serialized.buffers[0].obj is value


def test_a_shared_object_stays_shared():
    inner = [1]
    first, second = there_and_back((inner, inner))
    assert first is second


def test_a_value_that_contains_itself_comes_back_so():
    value: list[Any] = [1]
    value.append(value)
    result = there_and_back(value)
    assert result[1] is result


def test_serializing_leaves_no_cyclic_garbage():
    def local() -> int:
        return len(VALUES)

    serialize(local)
    gc.collect()
    gc.disable()
    try:
        for value in (1, (1, 2), {"a": [1]}, np.zeros(10), Holder(x=1), ValueError("a")):
            there_and_back(value)
        assert gc.collect() == 0
    finally:
        gc.enable()


# --- arrays -----------------------------------------------------------------------------


def arena(serialized: Serialized) -> memoryview:
    block = bytearray(b"\xff" * (serialized.size + 100))
    write_flat(serialized, memoryview(block)[: serialized.size])
    assert block[serialized.size :] == b"\xff" * 100
    return memoryview(block)


@pytest.mark.parametrize(
    "array",
    [
        np.arange(1000.0),
        np.zeros(0),
        np.zeros((3, 0, 2)),
        np.float32(3),
        np.array(7),
        np.asfortranarray(np.arange(12).reshape(3, 4)),
        np.arange(100).reshape(10, 10)[:, ::3],
        np.arange(10)[::-1],
        np.array([{"a": 1}, None], dtype=object),
        np.zeros(3, dtype=[("a", "i4"), ("b", "f8")]),
        np.array(["a", "bc"]),
    ],
    ids=lambda array: f"{array.dtype}-{array.shape}",
)
def test_an_array_comes_back_as_it_was(array):
    for block in (to_bytes(serialize(array)), arena(serialize(array))):
        result = deserialize(block)
        assert result.dtype == array.dtype and result.shape == array.shape
        assert np.array_equal(result, array)


def test_an_array_from_shared_memory_is_a_read_only_window_on_it():
    block = arena(serialize({"a": np.arange(1000), "b": np.ones(7, "u1")}))
    result = deserialize(block)
    whole = np.frombuffer(block, "u1")
    for array in result.values():
        assert not array.flags.writeable
        assert np.shares_memory(array, whole)
        assert (array.ctypes.data - whole.ctypes.data) % ALIGNMENT == 0
    with pytest.raises(ValueError, match="read-only"):
        result["a"][0] = 1
    with pytest.raises(ValueError, match="WRITEABLE"):
        result["a"].flags.writeable = True


def test_small_arrays_are_read_only_too():
    assert not there_and_back(np.arange(3)).flags.writeable


def test_an_array_keeps_its_block_alive_and_lets_it_go():
    class Block(bytearray):  # A bytearray proper takes no weak references.
        pass

    serialized = serialize([np.arange(1000), 1])
    block = Block(serialized.size)
    write_flat(serialized, memoryview(block))
    gone = weakref.ref(block)
    result = deserialize(memoryview(block))
    del block
    array = result[0][500:]
    del result
    assert gone() is not None
    assert array.sum() == sum(range(500, 1000))
    del array
    assert gone() is None


def test_a_block_of_another_format_is_refused():
    with pytest.raises(pickle.UnpicklingError, match="0x42"):
        deserialize(b"BINARY")


def test_importing_serialization_does_not_import_numpy():
    script = "import minray.serialization, minray.exceptions\nprint('numpy' in sys.modules)"
    assert in_a_fresh_process(script, b"") == "False"


# --- ObjectRefs -------------------------------------------------------------------------


class Ref(bytes):
    __slots__ = ()

    def __reduce__(self) -> Any:
        note_ref(self)
        return Ref, (bytes(self),)


def test_refs_inside_a_value_are_noted_once_each_in_order():
    first, second = Ref(b"1" * 16), Ref(b"2" * 16)
    serialized = serialize({"x": [second, first], "y": (Ref(second), second)})
    assert serialized.refs == (second, first)
    assert type(serialized.refs[0]) is Ref
    assert serialize(first).refs == (first,)
    assert serialize([1]).refs == ()
    assert there_and_back([first]) == [first]


def test_a_ref_pickled_elsewhere_is_nobodys():
    pickle.dumps(Ref(b"1" * 16))
    assert serialize([1, [2]]).refs == ()


def test_a_pickling_inside_a_pickling_notes_its_own_refs():
    inner_refs = []

    class Stored:
        def __reduce__(self) -> Any:
            inner_refs.append(serialize([Ref(b"i" * 16)]).refs)
            return int, ()

    assert serialize([Ref(b"a" * 16), Stored(), Ref(b"b" * 16)]).refs == (b"a" * 16, b"b" * 16)
    assert inner_refs == [(b"i" * 16,)]


def test_refs_are_noted_by_thread():
    both_inside = threading.Barrier(2)
    found = {}

    class Slow:
        def __reduce__(self) -> Any:
            both_inside.wait(10)
            return int, ()

    def run(name: bytes) -> None:
        found[name] = serialize([Slow(), Ref(name)]).refs

    threads = [threading.Thread(target=run, args=(name,)) for name in (b"1" * 16, b"2" * 16)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {b"1" * 16: (b"1" * 16,), b"2" * 16: (b"2" * 16,)}


def test_a_failed_pickling_forgets_its_refs():
    with pytest.raises(TypeError):
        serialize([Ref(b"1" * 16), threading.Lock()])
    note_ref(b"2" * 16)
    assert serialize([1, [2]]).refs == ()


# --- by name or by value ----------------------------------------------------------------


def test_what_can_be_imported_goes_by_name():
    for thing in (collections.Counter, functools.reduce, np.mean, np.ndarray, Path.exists, Serialized):
        assert len(serialize(thing).data) < 120
        assert there_and_back(thing) is thing


def test_local_things_go_by_value():
    base = 10

    @dataclasses.dataclass
    class Point:
        x: int
        y: int = 2

    class Colour(enum.Enum):
        RED = 1

    def add(n: int, *, more: int = 1) -> int:
        return n + base + more

    script = (
        "from minray.serialization import deserialize\n"
        "add, square, point, colour, bound = deserialize(data)\n"
        "print(add(1), square(3), point, colour, bound())"
    )
    things = (add, lambda n: n * n, Point(1), Colour.RED, Point(5).__repr__)
    printed = in_a_fresh_process(script, to_bytes(serialize(things)))
    assert printed == "12 9 Point(x=1, y=2) Colour.RED Point(x=5, y=2)"


def test_things_of_main_go_by_value(tmp_path):
    script = tmp_path / "program.py"
    script.write_text(
        "import sys, collections\n"
        "from minray.serialization import serialize, to_bytes\n"
        "class Point(collections.namedtuple('Point', 'x y')):\n"
        "    def norm(self): return scale(self.x + self.y)\n"
        "def scale(n): return FACTOR * n\n"
        "FACTOR = 2\n"
        "class MyError(Exception):\n"
        "    def __init__(self, a, b): super().__init__(f'{a}:{b}'); self.a = a\n"
        "sys.stdout.buffer.write(to_bytes(serialize([Point(1, 2), scale, Point, MyError(1, 2)])))\n"
    )
    environment = {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, script], capture_output=True, check=True, env=environment)
    read = (
        "from minray.serialization import deserialize\n"
        "point, scale, Point, error = deserialize(data)\n"
        "print(point.norm(), scale(4), type(point) is Point, repr(error), error.a)"
    )
    assert in_a_fresh_process(read, done.stdout) == "6 8 True MyError('1:2') 1"


def test_a_module_that_workers_cannot_import_goes_by_value(tmp_path):
    path = tmp_path / "unreachable_module.py"
    path.write_text(
        "class Thing:\n"
        "    class Part: pass\n"
        "    size = 3\n"
        "def double(n): return Thing.size * n\n"
    )
    spec = importlib.util.spec_from_file_location("unreachable_module", path)
    module = importlib.util.module_from_spec(spec)
    sys.modules["unreachable_module"] = module  # As pytest --import-mode=importlib does.
    try:
        spec.loader.exec_module(module)
        assert not worker_can_import("unreachable_module")
        script = (
            "from minray.serialization import deserialize\n"
            "thing, double, part, module = deserialize(data)\n"
            "print(thing.size, double(2), part.__name__, module.double(3))"
        )
        values = [module.Thing(), module.double, module.Thing.Part, module]
        assert in_a_fresh_process(script, to_bytes(serialize(values))) == "3 6 Part 9"
        assert type(there_and_back(module.Thing())) is module.Thing
    finally:
        del sys.modules["unreachable_module"]


def test_a_module_hidden_behind_another_of_its_name_goes_by_value(tmp_path, monkeypatch):
    for folder in ("seen", "hidden"):
        (tmp_path / folder).mkdir()
        (tmp_path / folder / "twin_module.py").write_text(f"WHO = {folder!r}\ndef who(): return WHO\n")
    monkeypatch.syspath_prepend(tmp_path / "seen")
    spec = importlib.util.spec_from_file_location("twin_module", tmp_path / "hidden" / "twin_module.py")
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "twin_module", module)
    spec.loader.exec_module(module)
    assert not worker_can_import("twin_module")
    data = to_bytes(serialize(module.who))
    monkeypatch.delitem(sys.modules, "twin_module")
    assert deserialize(data)() == "hidden"


def test_modules_on_the_path_are_importable_packages_and_all(tmp_path, monkeypatch):
    package = tmp_path / "some_package" / "inner"
    package.mkdir(parents=True)
    (package / "leaf.py").write_text("def f(): return 1\n")  # A namespace package: no __init__.py.
    monkeypatch.syspath_prepend(tmp_path)
    leaf = importlib.import_module("some_package.inner.leaf")
    assert worker_can_import("some_package.inner.leaf")
    assert there_and_back(leaf.f) is leaf.f
    for name in ("os", "posixpath", "collections.abc", "sys", "numpy.linalg", "cloudpickle.cloudpickle"):
        assert worker_can_import(name), name


def test_a_module_that_the_user_registered_goes_by_value(tmp_path, monkeypatch):
    (tmp_path / "registered_module.py").write_text("def f(): return 'by value'\n")
    monkeypatch.syspath_prepend(tmp_path)
    module = importlib.import_module("registered_module")
    cloudpickle.register_pickle_by_value(module)
    try:
        script = "from minray.serialization import deserialize\nprint(deserialize(data)())"
        assert in_a_fresh_process(script, to_bytes(serialize(module.f))) == "by value"
    finally:
        cloudpickle.unregister_pickle_by_value(module)


def test_a_submodule_that_its_parent_makes_is_importable():
    made = types.ModuleType("numpy.made_by_its_parent")
    sys.modules[made.__name__] = made
    try:
        assert worker_can_import(made.__name__)
    finally:
        del sys.modules[made.__name__]


# --- registered serializers -------------------------------------------------------------


def test_a_registered_serializer_is_used_until_it_is_deregistered():
    class Connection:
        def __init__(self, address: str) -> None:
            self.address, self.lock = address, threading.Lock()

    serialization.register_serializer(Connection, serializer=lambda c: c.address, deserializer=Connection)
    assert there_and_back([Connection("db:1")])[0].address == "db:1"
    serialization.deregister_serializer(Connection)
    serialization.deregister_serializer(Connection)
    with pytest.raises(TypeError, match="lock"):
        serialize([Connection("db:1")])


def test_deregistering_gives_a_type_its_own_way_back():
    serialization.register_serializer(types.MappingProxyType, serializer=dict, deserializer=dict)
    assert type(there_and_back(types.MappingProxyType({1: 2}))) is dict
    serialization.deregister_serializer(types.MappingProxyType)
    assert type(there_and_back(types.MappingProxyType({1: 2}))) is types.MappingProxyType


def test_copyreg_is_honoured_whenever_it_is_called(monkeypatch):
    class Odd:
        lock = threading.Lock()

    monkeypatch.setitem(copyreg.dispatch_table, Odd, lambda odd: (int, ("7",)))
    assert there_and_back(Odd()) == 7


# --- exceptions as values ---------------------------------------------------------------


class TwoArguments(Exception):
    def __init__(self, code: int, text: str) -> None:
        super().__init__(f"{code}: {text}")
        self.code = code


class Garbled(Exception):
    def __init__(self, name: str, hint: str = "none") -> None:
        super().__init__(f"{name} ({hint})")


class KeywordOnly(OSError):
    def __init__(self, *, path: str) -> None:
        super().__init__(2, "no such thing", path)


@dataclasses.dataclass(frozen=True)
class Frozen(Exception):
    a: int
    b: int = 2


class OwnWay(Exception):
    def __init__(self, a: int, b: int) -> None:
        self.a, self.b = a, b

    def __reduce__(self) -> Any:
        return OwnWay, (self.a, self.b * 10)


@pytest.mark.parametrize(
    "error",
    [
        ValueError("a", 1),
        FileNotFoundError(2, "gone", "/x"),
        UnicodeDecodeError("utf-8", b"abc", 0, 1, "bad"),
        TwoArguments(3, "x"),
        Garbled("a", "b"),
        KeywordOnly(path="/p"),
        Frozen(1, 5),
        KeyboardInterrupt(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_an_exception_comes_back_with_class_args_and_attributes(error):
    result = there_and_back([error])[0]
    assert type(result) is type(error)
    assert result.args == error.args and str(result) == str(error)
    assert vars(result) == vars(error)
    assert getattr(result, "filename", None) == getattr(error, "filename", None)


def test_an_exception_that_holds_itself_and_one_with_its_own_reduce():
    error = TwoArguments(1, "x")
    error.me = error  # type: ignore[attr-defined]
    result = there_and_back(error)
    assert result.me is result
    assert there_and_back(OwnWay(1, 2)).b == 20


# --- what cannot be pickled -------------------------------------------------------------


class Raising:
    def __reduce__(self) -> Any:
        raise RuntimeError("not today")


class Endless:
    def __reduce__(self) -> Any:
        return Endless, (Endless(),)


class StateRaises:
    def __getstate__(self) -> Any:
        raise KeyError("state")


class BadRepr:
    def __init__(self) -> None:
        self.lock = threading.Lock()

    def __repr__(self) -> str:
        raise RuntimeError("no repr")


def function_with(thing: Any) -> Any:
    def inner() -> Any:
        return thing

    return inner


def with_default(lock: Any = threading.Lock()) -> None:  # noqa: B008
    """Goes by name unless copied."""


LOCK = threading.Lock()


def uses_a_global() -> Any:
    return LOCK


def by_value(function: Any) -> Any:
    copy = types.FunctionType(function.__code__, function.__globals__, "f", function.__defaults__)
    copy.__module__ = "__main__"
    copy.__qualname__ = "f"
    return copy


def deep(levels: int, end: Any) -> Any:
    for _ in range(levels):
        end = [end]
    return end


def class_with_a_lock() -> Any:
    class Local:
        guard = threading.Lock()

    return Local


CASES = {
    "a lock": (lambda: threading.Lock(), "v"),
    "in a list": (lambda: [1, 2, threading.Lock()], "v[2]"),
    "in a dict": (lambda: {"a": 1, "b": {3: threading.Lock()}}, "v['b'][3]"),
    "as a key": (lambda: {threading.Lock(): 1}, "v.<key <lock>>"),
    "in an attribute": (lambda: Holder(x=Holder(lock=threading.Lock())), "v.x.lock"),
    "in a set": (lambda: {threading.Lock()}, "v.<member 0>"),
    "in a deque": (lambda: collections.deque([1, threading.Lock()]), "v[1]"),
    "in an ordered dict": (lambda: collections.OrderedDict(a=threading.Lock()), "v['a']"),
    "in a default dict": (lambda: collections.defaultdict(list, a=threading.Lock()), "v['a']"),
    "a generator": (lambda: [(n for n in "abc")], "v[0]"),
    "a socket": (socket.socket, "v"),
    "a file to write": (lambda: open(os.devnull, "w"), "v"),
    "a raw file": (lambda: io.FileIO("/dev/null"), "v"),
    "a closure": (lambda: function_with(threading.Lock()), "v.<closure>.thing"),
    "deep in a closure": (lambda: [function_with(Holder(a=[threading.Lock()]))], "v[0].<closure>.thing.a[0]"),
    "a global": (lambda: by_value(uses_a_global), "v.<globals>.LOCK"),
    "a default": (lambda: by_value(with_default), "v.__defaults__[0]"),
    "a partial": (lambda: functools.partial(print, 1, lock=threading.Lock()), "v.keywords['lock']"),
    "a bound method": (lambda: BadRepr().__init__, "v.__self__.lock"),
    "a local class": (class_with_a_lock, "v.guard"),
    "an instance of one": (lambda: class_with_a_lock()(), "v.__class__.guard"),
    "an exception": (lambda: ValueError("a", threading.Lock()), "v.args[1]"),
    "an exception's attribute": (lambda: Raising and _error_with(threading.Lock()), "v.lock"),
    "a raising reduce": (lambda: {"a": Raising()}, "v['a']"),
    "a raising getstate": (lambda: [StateRaises()], "v[0]"),
    "a raising repr": (lambda: [BadRepr()], "v[0].lock"),
    "a weak reference": (lambda: [weakref.ref(LOCK.__class__)], "v[0]"),
    # Not of a memoryview: Python before 3.12.7 crashes when such a pair is cyclic garbage (gh-77894).
    "a strided buffer": (lambda: [pickle.PickleBuffer(np.arange(4)[::2])], "v[0]"),
    "an object array": (lambda: np.array([1, threading.Lock()], dtype=object), "v.<state>[4][1]"),
}


def _error_with(lock: Any) -> Exception:
    error = TwoArguments(1, "a")
    error.lock = lock  # type: ignore[attr-defined]
    return error


@pytest.mark.parametrize("name", CASES)
def test_the_error_names_the_path_to_the_culprit(name):
    make, path = CASES[name]
    value = make()
    with pytest.raises(TypeError) as caught:
        serialize(value, "v")
    if hasattr(value, "close"):
        value.close()
    assert str(caught.value).startswith(f"{path} cannot be pickled: it is a"), str(caught.value)
    assert caught.value.__cause__ is not None


def test_arguments_are_named_one_by_one():
    what = r"^args\[0\]\.x\.lock cannot be pickled: it is a _thread\.lock \(cannot pickle '_thread\.lock'"
    with pytest.raises(TypeError, match=what):
        serialize(((Holder(x=Holder(lock=threading.Lock())),), {}), "args, kwargs")
    with pytest.raises(TypeError, match=r"^kwargs\['connection'\]"):
        serialize(((1,), {"connection": threading.Lock()}), "args, kwargs")


def test_an_error_of_the_users_own_is_told_with_its_type():
    with pytest.raises(TypeError, match="RuntimeError: not today") as caught:
        serialize(Raising())
    assert isinstance(caught.value.__cause__, RuntimeError)


def test_an_iterator_gets_its_own_advice():
    with pytest.raises(TypeError, match="list"):
        serialize(n for n in [1])


def test_a_cycle_does_not_hide_the_culprit():
    a, b = Holder(), Holder()
    a.b, b.a, b.items, b.lock = b, a, [a, b], threading.Lock()
    with pytest.raises(TypeError, match=r"^v\.b\.lock "):
        serialize(a, "v")


def test_what_is_nested_too_deeply_says_so():
    with pytest.raises(TypeError, match="nested too deeply"):
        serialize(deep(100_000, 1), "args[0]")
    with pytest.raises(TypeError, match="nested too deeply"):
        serialize(Endless())


def test_a_culprit_at_the_end_of_a_deep_path_is_found():
    what = r"^v\[0\]\[0\].* \.\.\. .*\[0\] cannot be pickled: it is a _thread.lock"
    with pytest.raises(TypeError, match=what):
        serialize(deep(300, threading.Lock()), "v")


def test_keyboard_interrupt_passes_through():
    class Interrupted:
        def __reduce__(self) -> Any:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        serialize([Interrupted()])


def test_inspect_prints_a_tree_of_all_culprits():
    value = {"a": Holder(lock=LOCK, gen=(n for n in "ab")), "b": function_with(threading.Lock()), "c": 1}
    out = io.StringIO()
    fine, failures = inspect_serializability(value, name="config", print_file=out)
    assert not fine
    names = {failure.name for failure in failures}
    assert names == {"config['a'].lock", "config['a'].gen", "config['b'].<closure>.thing"}
    by_name = {failure.name: failure for failure in failures}
    assert by_name["config['a'].lock"].obj is LOCK
    assert by_name["config['a'].lock"].parent is value["a"]
    assert out.getvalue().splitlines() == [
        "config cannot be serialized:",
        "config",
        "  ['a']",
        "    .lock: a _thread.lock (cannot pickle '_thread.lock' object)",
        "    .gen: a generator (cannot pickle 'generator' object)",
        "  ['b']",
        "    .<closure>.thing: a _thread.lock (cannot pickle '_thread.lock' object)",
    ]


def test_inspect_stops_at_the_depth_asked_for():
    value = [[Holder(lock=LOCK)]]
    _, failures = inspect_serializability(value, name="v", depth=1, print_file=io.StringIO())
    assert [(failure.name, failure.obj) for failure in failures] == [("v[0]", value[0])]


def test_inspect_says_that_all_is_well(capsys):
    assert inspect_serializability([1, function_with(2)], name="v") == (True, set())
    assert capsys.readouterr().out == "v can be serialized.\n"
