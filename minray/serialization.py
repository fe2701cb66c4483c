"""Serialization: a value becomes bytes and buffers, and back.

Owns the form in which values travel and rest, and the answer to "why can this not be
pickled?".  A value becomes a `Serialized`: one pickle (protocol 5), the large buffers
that it refers to (array data stays where it is until it is copied to its place, once),
and the ObjectRefs found inside.  Laid out flat it has one of two forms, told apart by
the first byte:

* ``0x80``: just the pickle, when there are no buffers;
* ``0x01``: a header (number of buffers, length of the pickle, length of each buffer),
  the pickle, and the buffers, each at a multiple of 64 bytes from the start.

`deserialize` of the second form copies no array: arrays are read-only windows on the
block and keep it alive.

What goes by name and what by value.  A function or class that a worker can import goes
by name; anything else (of ``__main__``, local, lambdas, of modules that were loaded in
a way which a worker cannot repeat) goes by value, through cloudpickle.  Plain pickle
would name things of ``__main__`` that no worker has, so it is used for builtin types only.

Knows nothing of processes, objects' places or numpy (numpy hands out its buffers by
protocol 5 itself).  Left out: compression (memcpy is faster than any), reuse of picklers
(saves 0.6 µs of 1.4, but a ``__reduce__`` that pickles would enter one twice), and large
bytes *inside* containers stay in the pickle (one copy more; only top-level ones go out of band).
"""

from __future__ import annotations

import builtins
import copyreg
import functools
import io
import os
import pickle
import struct
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from types import FunctionType, MethodType, ModuleType
from typing import Any, NamedTuple, TextIO

import cloudpickle

from minray.object_store import copy_into

INLINE_LIMIT = 64 * 1024
"""Objects up to this many bytes travel inside messages; larger ones live in shared memory."""

PROTOCOL = 5
ALIGNMENT = 64  # A cache line, and what SIMD loads want.
PLAIN, BUFFERED = 0x80, 0x01  # The first byte of each flat form; 0x80 is pickle's own.
_HEADER = struct.Struct("<B3xIQ")  # BUFFERED, number of buffers, length of the pickle


class Serialized(NamedTuple):
    """A value on its way."""

    data: bytes  # The pickle.
    buffers: Sequence[memoryview]  # Contiguous, of bytes; they still belong to the value.
    refs: tuple[bytes, ...]  # The ObjectRefs inside, each once, in order of appearance.
    size: int  # Bytes that the flat form takes.


# --- value -> Serialized ----------------------------------------------------------------

_SCALARS = frozenset({type(None), bool, int, float, str, bytes})
_SMALL = 16  # Items of a container worth looking at before a pickler is made (1 µs).
_make = tuple.__new__  # NamedTuple's own __new__ costs 0.1 µs more.
_dumps, _loads = pickle.dumps, pickle.loads


def serialize(value: Any, what: str = "value") -> Serialized:
    """Pickle `value`; a value that cannot be is a TypeError that names the culprit.

    `what` names the value in the error (``args[0].x.lock``); names parted by commas name
    the members of a tuple: ``serialize((args, kwargs), "args, kwargs")``.

    The hot path: a small int takes 0.5 µs, a flat tuple 1 µs, anything else from 2 µs (measured).

    >>> serialize([1, 2, 3]).size
    22
    """
    if value is None:
        return _NONE
    kind = type(value)
    if kind in _SCALARS:
        plain = kind is not bytes or len(value) <= INLINE_LIMIT
    elif kind is tuple or kind is list:
        plain = len(value) <= _SMALL and _SCALARS.issuperset(map(type, value))
    elif kind is dict:
        plain = (
            len(value) <= _SMALL
            and _SCALARS.issuperset(map(type, value))
            and _SCALARS.issuperset(map(type, value.values()))
        )
    else:
        plain = False
    if plain:
        data = _dumps(value, PROTOCOL)
        return _make(Serialized, (data, (), (), len(data)))

    file = io.BytesIO()
    pickle_buffers: list[pickle.PickleBuffer] = []
    refs: list[bytes] = []
    outer, _pickling.refs = _pickling.refs, refs
    try:
        large = (kind is bytes or kind is bytearray) and len(value) > INLINE_LIMIT
        pickler = _Pickler(file, PROTOCOL, buffer_callback=pickle_buffers.append)
        pickler.dump(_Large(value) if large else value)
    except MemoryError:
        raise
    except Exception as error:
        raise TypeError(_explain(value, what, error)) from error
    finally:
        _pickling.refs = outer
    data = file.getvalue()
    found = tuple(dict.fromkeys(refs)) if refs else ()
    if not pickle_buffers:
        return _make(Serialized, (data, (), found, len(data)))
    buffers = [buffer.raw() for buffer in pickle_buffers]
    return Serialized(data, buffers, found, _layout([view.nbytes for view in buffers], len(data))[-1])


_NONE = Serialized(pickle.dumps(None, PROTOCOL), (), (), len(pickle.dumps(None, PROTOCOL)))


class _Pickling(threading.local):
    refs: list[bytes] | None = None  # Of the innermost pickling in progress on this thread.


_pickling = _Pickling()


def note_ref(ref: bytes) -> None:
    """Called by ``ObjectRef.__reduce__``: the value being pickled on this thread holds `ref`."""
    if _pickling.refs is not None:
        _pickling.refs.append(ref)


class _Large:
    """Large top-level bytes: they go out of band (no copy here) and come back as what they were."""

    def __init__(self, value: bytes | bytearray) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self.value), (pickle.PickleBuffer(self.value),)


class _Pickler(cloudpickle.CloudPickler):  # type: ignore[misc]
    """cloudpickle's pickler, with its price paid only by what needs it.

    cloudpickle sets up each pickler in Python and looks every type up in a ChainMap; here
    construction is C's alone, and `reducer_override` answers for the common cases first
    (1.4 µs a pickler instead of 2.1, measured).
    """

    __init__ = pickle.Pickler.__init__
    dump = pickle.Pickler.dump
    dispatch_table = copyreg.dispatch_table

    @functools.cached_property
    def globals_ref(self) -> dict[int, dict[str, Any]]:
        """cloudpickle's: functions that shared their globals share them again."""
        return {}

    def reducer_override(self, obj: Any) -> Any:
        kind = type(obj)
        if kind is FunctionType or issubclass(kind, type):
            return NotImplemented if _goes_by_name(obj) else super().reducer_override(obj)
        if kind is ModuleType:
            worker_can_import(obj.__name__)  # Tells cloudpickle, if it cannot.
        reducer = _reducers.get(kind)
        if reducer is not None:
            return reducer(obj)
        if issubclass(kind, BaseException):
            return _reduce_exception(obj)
        return NotImplemented


_Reducer = Callable[[Any], Any]
_cloudpickle_reducers: dict[type, _Reducer] = dict(cloudpickle.CloudPickler.dispatch_table.maps[0])
_reducers = dict(_cloudpickle_reducers)


def register_serializer(
    cls: type, *, serializer: Callable[[Any], Any], deserializer: Callable[[Any], Any]
) -> None:
    """Pickle instances of exactly `cls` as ``serializer(instance)``, in this process, from now on.

    The deserializer travels with each value, so only the sender has to register.
    """
    _reducers[cls] = lambda instance: (deserializer, (serializer(instance),))


def deregister_serializer(cls: type) -> None:
    """Undo `register_serializer`; a class that has none is left as it is."""
    _reducers.pop(cls, None)
    if cls in _cloudpickle_reducers:
        _reducers[cls] = _cloudpickle_reducers[cls]


@contextmanager
def substituted(cls: type, reducer: _Reducer) -> Iterator[None]:
    """Meanwhile instances of exactly `cls` are pickled by `reducer`, in this process."""
    outer = _reducers.get(cls)
    _reducers[cls] = reducer
    try:
        yield
    finally:
        del _reducers[cls]
        if outer is not None:
            _reducers[cls] = outer


def reducer_of(cls: type) -> _Reducer | None:
    """How instances of exactly `cls` are pickled, if not in their own way."""
    return _reducers.get(cls)


# --- by name or by value ----------------------------------------------------------------

_importable: dict[str, bool] = {"__main__": False}


def _goes_by_name(thing: Any) -> bool:
    """Whether this class or function is found under its name by whoever imports its module.

    A quick yes for the usual case.  "No" only means that cloudpickle looks closer: nested classes, or
    modules that the user (or `worker_can_import`) has registered with it to go by value.
    """
    name = thing.__module__
    module = sys.modules.get(name)
    if module is None or not worker_can_import(name) or cloudpickle.list_registry_pickle_by_value():
        return False
    return getattr(module, "__dict__", {}).get(thing.__qualname__) is thing


def worker_can_import(name: str) -> bool:
    """Whether a fresh process with this ``sys.path`` gets this same module by importing `name`.

    Asked once a module (some 100 µs).  A module that fails, such as those that pytest loads with
    ``--import-mode=importlib``, is registered with cloudpickle: its things travel by value.
    """
    known = _importable.get(name)
    if known is None:
        try:
            known = _is_found(name)
        except Exception:  # A finder that raises has not said no.
            known = True
        _importable[name] = known
        if not known and name in sys.modules:
            cloudpickle.register_pickle_by_value(sys.modules[name])
    return known


def _is_found(name: str) -> bool:
    parent, _, _ = name.rpartition(".")
    if name.partition(".")[0] in sys.stdlib_module_names:
        return True
    if parent and not worker_can_import(parent):
        return False
    file = getattr(sys.modules.get(name), "__file__", None)
    spec = find_spec(name)
    if spec is None:  # Without a file, a submodule was made by its parent and will be again (six.moves).
        return bool(parent) and file is None
    return file is None or spec.origin is None or _same_file(spec.origin, file)


def find_spec(name: str) -> Any:
    """What an import of `name` would load, without importing anything and without ``sys.modules``' word."""
    parent, _, _ = name.rpartition(".")
    path = None
    if parent:
        path = getattr(sys.modules.get(parent), "__path__", None)
        if path is None:
            path = getattr(find_spec(parent), "submodule_search_locations", None)
        if path is None:
            return None
    specs = (finder.find_spec(name, path) for finder in sys.meta_path if hasattr(finder, "find_spec"))
    return next((spec for spec in specs if spec is not None), None)


def _same_file(one: str, other: str) -> bool:
    with suppress(OSError):
        return one == other or os.path.samefile(one, other)
    return False


# --- exceptions -------------------------------------------------------------------------


def in_words(error: BaseException) -> str:
    """Its class and what it says, as a traceback ends."""
    try:
        said = str(error).strip()
    except Exception:  # Its class may do as it likes.
        said = "its message cannot be shown"
    return f"{type(error).__name__}: {said}" if said else type(error).__name__


def in_one_line(error: BaseException) -> str:
    """The start of it: for tables, logs and sentences."""
    return in_words(error).partition("\n")[0][:500]


def _reduce_exception(error: BaseException) -> Any:
    """Pickle calls ``cls(*args)``, which fails where ``__init__`` takes other arguments than it passes on."""
    cls = type(error)
    python_made = FunctionType in (type(cls.__init__), type(cls.__new__))
    own_way = cls.__reduce_ex__ is not object.__reduce_ex__ or type(cls.__reduce__) is FunctionType
    if own_way or not python_made:
        return NotImplemented
    reduced: Any = error.__reduce__()
    return rebuild_exception, (cls, reduced[1], error.args), vars(error), None, None, _set_attributes


def rebuild_exception(cls: Any, made_of: tuple[Any, ...], args: tuple[Any, ...]) -> BaseException:
    """Make the exception the usual way, else past its ``__init__``; its attributes follow."""
    error: BaseException
    try:
        error = cls(*made_of)
    except Exception:
        error = past_init(cls, made_of)
    object.__setattr__(error, "args", args)  # An __init__ that got the message for an argument garbles them.
    return error


def past_init(cls: type[BaseException], made_of: tuple[Any, ...]) -> Any:
    """An exception of this class that only the builtin class under it has initialised: no user code runs."""
    builtin = builtin_base(cls)
    error = builtin.__new__(cls, *made_of)
    builtin.__init__(error, *made_of)
    return error


def builtin_base(cls: type[BaseException]) -> Any:
    """The builtin exception class that decides what an instance keeps beside its attributes (errno, ...)."""
    return next(base for base in cls.__mro__ if getattr(builtins, base.__name__, None) is base)


def _set_attributes(error: BaseException, attributes: dict[str, Any]) -> None:
    vars(error).update(attributes)  # Not by setattr: it may be a frozen dataclass.


# --- Serialized <-> flat ----------------------------------------------------------------


def _layout(sizes: Sequence[int], pickle_size: int) -> list[int]:
    """Where each buffer begins, and, last, where the block ends."""
    end = _HEADER.size + 8 * len(sizes) + pickle_size
    starts = []
    for size in sizes:
        start = -(-end // ALIGNMENT) * ALIGNMENT
        starts.append(start)
        end = start + size
    return [*starts, end]


def flat_chunks(serialized: Serialized) -> Iterator[bytes | memoryview]:
    """The flat form, piece by piece, without copying the buffers: for a file, or for `write_flat`."""
    data, buffers, _, _ = serialized
    if not buffers:
        yield data
        return
    sizes = [view.nbytes for view in buffers]
    head = _HEADER.pack(BUFFERED, len(buffers), len(data)) + struct.pack(f"<{len(sizes)}Q", *sizes) + data
    yield head
    end = len(head)
    for start, view in zip(_layout(sizes, len(data)), buffers, strict=False):
        yield bytes(start - end)
        yield view
        end = start + view.nbytes


def write_flat(serialized: Serialized, target: memoryview) -> None:
    """Copy the value to its place, once; `target` is a writable view of ``serialized.size`` bytes or more."""
    at = 0
    for chunk in flat_chunks(serialized):
        copy_into(target[at : at + len(chunk)], chunk)
        at += len(chunk)


def to_bytes(serialized: Serialized) -> bytes:
    """The flat form as bytes of its own, for a message."""
    return b"".join(flat_chunks(serialized)) if serialized.buffers else serialized.data


def deserialize(data: bytes | bytearray | memoryview, writable: bool = False) -> Any:
    """The value back; its arrays are windows on `data`, which lives as long as they do: read-only ones, unless
    it is the caller's alone and `writable`.

    Raises whatever the value's own code raises, and UnpicklingError for bytes of another format.
    """
    if data[0] == PLAIN:
        return _loads(data)
    if data[0] != BUFFERED:
        raise pickle.UnpicklingError(f"bytes that begin with {data[0]:#04x} are not a minray object")
    view = memoryview(data) if writable else memoryview(data).toreadonly()
    _, count, pickle_size = _HEADER.unpack_from(view)
    sizes = struct.unpack_from(f"<{count}Q", view, _HEADER.size)
    start = _HEADER.size + 8 * count
    buffers = [view[at : at + n] for at, n in zip(_layout(sizes, pickle_size), sizes, strict=False)]
    return _loads(view[start : start + pickle_size], buffers=buffers)


# --- why can this not be pickled? -------------------------------------------------------
#
# The walk asks of each object what the pickler asks (how is it reduced, and to what?), in the
# pickler's order, and gives each step a name that a person knows.  It keeps its own stack, so
# it goes as deep as it must, and it looks at each object once, so cycles end.

_WALK_LIMIT = 200_000  # Objects, a second or so: some values make new ones for ever.
_ATOMS = _SCALARS | {bytearray, complex, type(...), type(NotImplemented)}
_NAMED_PARTS: dict[type, tuple[str, ...]] = {
    functools.partial: ("func", "args", "keywords"),
    MethodType: ("__func__", "__self__"),
    property: ("fget", "fset", "fdel"),
}
_Part = tuple[str, Any]


@dataclass(frozen=True, eq=False)
class FailureTuple:
    """An object that cannot be pickled: `obj`, its `name` (the path to it), the `parent` that holds it."""

    obj: Any = field(repr=False)
    name: str
    parent: Any = field(repr=False)
    reason: str
    steps: tuple[str, ...] = field(repr=False)


def inspect_serializability(
    base_obj: Any, name: str | None = None, depth: int | None = None, print_file: TextIO | None = None
) -> tuple[bool, set[FailureTuple]]:
    """Find what keeps `base_obj` from being pickled, and print it as a tree to `print_file` (or stdout).

    `depth`: name what is this many steps down, even if the culprit is deeper (default: all the way).
    Returns whether it can be serialized, and a `FailureTuple` for each culprit.

    >>> import threading
    >>> fine, culprits = inspect_serializability({"lock": threading.Lock()}, name="config")
    config cannot be serialized:
    config
      ['lock']: a _thread.lock (cannot pickle '_thread.lock' object)
    >>> fine, [culprit.name for culprit in culprits]
    (False, ["config['lock']"])
    """
    name = name or getattr(base_obj, "__name__", None) or type(base_obj).__name__
    try:
        serialize(base_obj, name)
    except TypeError as error:
        found = list(_culprits(base_obj, name, depth))
        if not found:
            found = [FailureTuple(base_obj, name, None, _reason(error.__cause__ or error), (name,))]
    else:
        print(f"{name} can be serialized.", file=print_file)
        return True, set()
    print(f"{name} cannot be serialized:", file=print_file)
    above: tuple[str, ...] = ()
    for failure in found:
        shared = len(os.path.commonprefix([above, failure.steps]))
        for level, step in enumerate(failure.steps[shared:], shared):
            last = level == len(failure.steps) - 1
            verdict = f": {_kind(failure.obj)} ({failure.reason})" if last else ""
            print("  " * level + step + verdict, file=print_file)
        above = failure.steps
    return False, set(found)


def _explain(value: Any, what: str, error: Exception) -> str:
    """The message for a value that could not be pickled."""
    culprit = next(_culprits(value, what), None)
    if culprit is not None:
        return (
            f"{_shortened(culprit.name)} cannot be pickled: it is {_kind(culprit.obj)} ({culprit.reason}).\n"
            f"{_advice(culprit.obj)} "
            "All such parts of a value: minray.util.inspect_serializability(value)."
        )
    if isinstance(error, RecursionError):
        return (
            f"{what} cannot be pickled: it is nested too deeply for Python's recursion limit of "
            f"{sys.getrecursionlimit()}.\nMake it flatter (a long linked list: send it as a list)."
        )
    return f"{what} cannot be pickled: {_reason(error)}."


def _advice(culprit: Any) -> str:
    if hasattr(culprit, "__next__"):
        return "An iterator lives where it was made: send list(...) of it, or what it is made from."
    return "Make it inside the task that needs it, or leave it out in its owner's __getstate__."


def _culprits(value: Any, what: str, depth: int | None = None) -> Iterator[FailureTuple]:
    """All parts of `value` that cannot be pickled, in the order in which the pickler meets them."""
    pickler = _Pickler(io.BytesIO(), PROTOCOL)
    seen: dict[int, Any] = {}  # It holds what it has seen: the ID of a dead object may come again.
    names = what.split(", ")
    roots = zip(names, value, strict=True) if len(names) > 1 else [(what, value)]
    stack: list[tuple[str, Any, Iterator[_Part]]] = [("", None, iter(roots))]

    def failure(error: Exception) -> FailureTuple:
        way = stack[1:] if depth is None else stack[1 : depth + 2]
        steps = tuple(step for step, _, _ in way)
        parent = way[-2][1] if len(way) > 1 else None
        return FailureTuple(way[-1][1], "".join(steps), parent, _reason(error), steps)

    while stack and len(seen) < _WALK_LIMIT:
        try:
            step, part = next(stack[-1][2])
        except StopIteration:
            stack.pop()
            continue
        except Exception as error:  # Its own iteration over its items raised.
            yield failure(error)
            stack.pop()
            continue
        if type(part) in _ATOMS or id(part) in seen:
            continue
        seen[id(part)] = part
        stack.append((step, part, iter(())))
        try:
            stack[-1] = (step, part, _parts(part, pickler))
        except Exception as error:
            yield failure(error)


def _parts(obj: Any, pickler: _Pickler) -> Iterator[_Part]:
    """What the pickler would pickle for `obj`, by name; raises if `obj` itself is at fault."""
    kind = type(obj)
    if kind is list or kind is tuple:
        return _members(obj)
    if kind is set or kind is frozenset:
        return ((f".<member {index}>", member) for index, member in enumerate(obj))
    if kind is dict:
        return _items(obj.items())
    if kind in _NAMED_PARTS:
        return iter([(f".{name}", getattr(obj, name)) for name in _NAMED_PARTS[kind]])
    if kind is pickle.PickleBuffer:
        obj.raw()  # Raises unless it is contiguous.
        return iter(())
    reduced = pickler.reducer_override(obj)
    if reduced is NotImplemented and not issubclass(kind, (FunctionType, type)):
        reducer = copyreg.dispatch_table.get(kind)
        reduced = reducer(obj) if reducer is not None else obj.__reduce_ex__(PROTOCOL)
    if reduced is NotImplemented or isinstance(reduced, str):
        pickle.dumps(obj, PROTOCOL)  # It goes by name: is it there?
        return iter(())
    return _reduced_parts(obj, *reduced)


def _reduced_parts(
    obj: Any,
    maker: Any,
    args: tuple[Any, ...],
    state: Any = None,
    members: Iterable[Any] | None = None,
    items: Iterable[tuple[Any, Any]] | None = None,
    _setter: Any = None,
) -> Iterator[_Part]:
    """The parts of a reduction in the sense of ``object.__reduce_ex__``."""
    kind = type(obj)
    if kind is FunctionType:
        yield from _function_parts(obj, *state)
        return
    if issubclass(kind, type):
        yield ".__bases__", obj.__bases__
    else:
        yield (".__class__" if maker is kind else ".<maker>"), maker
        base = ".args" if isinstance(obj, BaseException) else ".<args>"
        for index, arg in enumerate(args):
            yield (".__class__" if arg is kind else f"{base}[{index}]"), arg
    for attributes in state if isinstance(state, tuple) and len(state) == 2 else (state,):
        if type(attributes) is dict:
            yield from ((f".{name}", value) for name, value in attributes.items())
        else:
            yield ".<state>", attributes
    yield from _members(members or ())
    yield from _items(items or ())


def _function_parts(
    function: FunctionType, attributes: dict[str, Any], slots: dict[str, Any]
) -> Iterator[_Part]:
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with suppress(ValueError):  # An empty cell: the variable has no value yet.
            yield f".<closure>.{name}", cell.cell_contents
    yield from ((f".<globals>.{name}", value) for name, value in slots["__globals__"].items())
    yield from ((f".{name}", slots[name]) for name in ("__defaults__", "__kwdefaults__", "__annotations__"))
    yield from ((f".{name}", value) for name, value in attributes.items())


def _members(members: Iterable[Any]) -> Iterator[_Part]:
    return ((f"[{index}]", member) for index, member in enumerate(members))


def _items(items: Iterable[tuple[Any, Any]]) -> Iterator[_Part]:
    for key, value in items:
        name = f"{key!r:.60}" if type(key) in _ATOMS else f"<{type(key).__name__}>"
        yield f".<key {name}>", key
        yield f"[{name}]", value


def _kind(obj: Any) -> str:
    """The object in an error: by its type, since its own repr may be endless or raise."""
    kind = type(obj)
    if kind is FunctionType or issubclass(kind, type):
        return f"the {'function' if kind is FunctionType else 'class'} {obj.__module__}.{obj.__qualname__}"
    name = kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"
    return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"


def _reason(error: BaseException) -> str:
    """In one line; pickle's own errors without their class."""
    text = in_one_line(error)
    pickles_own = isinstance(error, (TypeError, pickle.PicklingError)) and "pickle" in text
    return text.removeprefix(f"{type(error).__name__}: ") if pickles_own else text


def _shortened(path: str) -> str:
    return path if len(path) <= 400 else f"{path[:200]} ... {path[-200:]}"
