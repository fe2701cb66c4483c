"""Digests of code and of values that are the same in every run of a program: what "unchanged" means to a durable job.

Two questions are answered, both in 16 bytes:

* `code_digest(function)`: would this function, or class, do the same?  It covers the bytecode, constants, names,
  defaults, values in the closure, and the globals that the code names, each by value: functions and classes of
  the user's own modules recursively, importable ones too (a pickle would only name them).  It does not cover file
  names, line numbers, comments and annotations, so moving a function changes nothing.  (A docstring is a constant.)
* `value_digest(value)`: is this the same argument?  Pickles cannot tell: they differ with the order of a set, which
  differs in every process, and with which equal strings happen to be one object.  So the walk asks of each object
  what a pickler would ask (its ``__reduce_ex__``), and hashes the answers by value.

Where the user's code ends (the standard library, installed packages, minray itself) a thing counts by its name and
its package's version.  What a module does when it is imported does not count, nor what is reached only through
`getattr`, files or the environment: a digest cannot know.

What cannot be digested (a lock, an open file) counts by its type, in code, where a pickle by value would have failed
anyway.  A class of minray's own says what counts by a method `__minray_counts__`.  An ObjectRef in a value counts by
its position: what it refers to is the node's affair.  In code (a global, a closure) it counts as itself, and so as
something new in each run: better run again than mix.

Left out: hashing source text (a comment would change it, a global would not), and excluding docstrings (the
compiler may use the same constant in the code).
"""

from __future__ import annotations

import builtins
import copyreg
import dis
import hashlib
import os
import pickle
import re
import struct
import sys
import sysconfig
from collections.abc import Callable, Iterable
from functools import lru_cache
from types import BuiltinFunctionType, CodeType, FunctionType, MethodType, ModuleType
from typing import TYPE_CHECKING, Any

from minray.object_ref import ObjectRef

if TYPE_CHECKING:
    from minray.task_spec import TaskOptions

DIGEST_BYTES = 16

_SCALARS = frozenset({type(None), bool, int, float, complex, str, bytes, type(Ellipsis), type(NotImplemented)})
_FLAT = 64  # Items of a container worth a look before the walk.
_CLASS_NOISE = frozenset(
    {
        "__dict__", "__weakref__", "__module__", "__annotations__", "__annotate__", "__annotate_func__",
        "__annotations_cache__", "__conditional_annotations__", "__firstlineno__", "__static_attributes__",
        "_abc_impl", "__abstractmethods__",
    }
)  # fmt: skip
"""Attributes of a class that differ without its code doing so, or whose order does."""
_GLOBAL_OPS = ("LOAD_GLOBAL", "LOAD_NAME", "STORE_GLOBAL", "DELETE_GLOBAL")


def code_digest(thing: Any) -> bytes:
    """Of a function, a class, or anything else that can be called.

    >>> def f(x): return x + 1
    >>> def g(x): return x + 1
    >>> def h(x): return x + 2
    >>> code_digest(f) == code_digest(g) != code_digest(h)
    True
    """
    return _hash(b"code", bytes(sys.version_info[:2]), _Walk(in_code=True).digest(thing))


def value_digest(value: Any) -> bytes:
    """Of arguments or a value that is put.  Raises whatever the value's own code raises, and RecursionError.

    >>> value_digest({"b", "a"}) == value_digest({"a", "b"})
    True
    """
    quick = _quick(value)
    return _hash(b"quick", quick) if quick is not None else _Walk(in_code=False).digest(value)


def _quick(value: Any) -> bytes | None:
    """Most arguments are a few scalars: their repr tells them apart."""
    kind = type(value)
    if kind is tuple or kind is list:
        if len(value) > _FLAT or not _SCALARS.issuperset(map(type, value)):
            return None
    elif kind not in _SCALARS:
        return None
    try:
        return repr(value).encode()
    except ValueError:  # An integer of thousands of digits.
        return None


def _hash(*parts: bytes | memoryview) -> bytes:
    found = hashlib.blake2b(digest_size=DIGEST_BYTES)
    for part in parts:
        found.update(struct.pack("<Q", len(part)))
        found.update(part)
    return found.digest()


def without_session(environment: str) -> str:
    """An environment, the same in every run: snapshots lie in the session's directory, and are named by contents."""
    return re.sub(r'"[^"]*/runtime_env/', '"', environment)


class Digester:
    """What a process of a durable job notes of each call: see `of_call`."""

    def __init__(self) -> None:
        self._functions: dict[bytes, tuple[bytes, bytes]] = {}  # its name and the digest of its code, by function ID
        self._templates: dict[int, tuple[bytes, bytes]] = {}  # likewise, with the options that matter

    def learn_function(self, function_id: bytes, function: Any, name: str) -> None:
        self._functions[function_id] = (name.encode(), code_digest(function))

    def learn_template(self, number: int, options: TaskOptions) -> None:
        name, code = self._functions.get(options.function_id, (options.name.encode(), b""))
        parts = [name, options.method.encode(), b"%d" % options.num_returns]
        if options.runtime_env:  # Without the session's directory: the name of a snapshot tells its contents.
            parts.append(without_session(options.runtime_env).encode())
        self._templates[number] = (_hash(*parts), code)

    def of_call(self, template_no: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        """What is called with what (16 bytes), and the code of it (16 bytes); b"" if that cannot be told."""
        head, code = self._templates[template_no]
        arguments = self.of_value([args, kwargs] if kwargs else args)
        return _hash(head, arguments) + (code or head) if arguments else b""

    def of_value(self, value: Any) -> bytes:
        try:
            return value_digest(value)
        except Exception:  # Whatever its class does when it is asked how it is made.
            return b""


class _Walk:
    """One walk over one value.  Each object is looked at once; one that contains itself is told by its depth."""

    def __init__(self, in_code: bool) -> None:
        self.in_code = in_code
        self._known: dict[int, bytes] = {}  # by id(): digests, and the depths of what is being walked
        self._kept: list[Any] = []  # so that no id() is used again
        self._refs: dict[bytes, int] = {}
        self._depth = 0

    def digest(self, value: Any) -> bytes:
        kind = type(value)
        if kind in _SCALARS:
            return self._scalar(value)
        known = self._known.get(id(value))
        if known is not None:
            return known
        self._known[id(value)] = b"cycle %d" % self._depth
        self._kept.append(value)
        self._depth += 1
        found = self._known[id(value)] = self._digest(value, kind)
        self._depth -= 1
        return found

    def _scalar(self, value: Any) -> bytes:
        kind = type(value)
        if kind is str:
            return _hash(b"str", value.encode("utf-8", "surrogatepass"))
        if kind is bytes:
            return _hash(b"bytes", value)
        if kind is int:
            return _hash(b"int", value.to_bytes(value.bit_length() // 8 + 1, "little", signed=True))
        return _hash(kind.__name__.encode(), repr(value).encode())

    def _digest(self, value: Any, kind: type) -> bytes:
        if kind is tuple or kind is list:
            return _hash(kind.__name__.encode(), *map(self.digest, value))
        if kind is dict:
            return _hash(b"dict", *(self.digest(part) for item in value.items() for part in item))
        if kind is set or kind is frozenset:
            return _hash(kind.__name__.encode(), *sorted(map(self.digest, value)))
        if kind is bytearray:
            return _hash(b"bytearray", value)
        if kind is ObjectRef:
            if self.in_code:
                return _hash(b"this ref", bytes(value))
            return _hash(b"ref", b"%d" % self._refs.setdefault(bytes(value), len(self._refs)))
        if kind is FunctionType:
            return self._function(value)
        if issubclass(kind, type):
            return self._class(value)
        if kind is ModuleType:
            return self._module(value, ())
        if kind is CodeType:
            return self._code(value)
        if kind is MethodType:
            return _hash(b"method", self.digest(value.__self__), self.digest(value.__func__))
        if kind is staticmethod or kind is classmethod:
            return _hash(kind.__name__.encode(), self.digest(value.__func__))
        if kind is property:
            return _hash(b"property", *map(self.digest, (value.fget, value.fset, value.fdel)))
        if kind is BuiltinFunctionType and not isinstance(value.__self__, (ModuleType, type(None))):
            return _hash(b"method", self.digest(value.__self__), value.__name__.encode())
        if kind is pickle.PickleBuffer:
            return _hash(b"buffer", value.raw())
        return self._object(value, kind)

    # ------------------------------------------------------------ code

    def _function(self, function: FunctionType) -> bytes:
        if not is_own(function.__module__):
            return self._named(function)
        names = list(global_names(function.__code__))
        cells = (self._cell(cell) for cell in function.__closure__ or ())
        return _hash(
            b"function", self._code(function.__code__), self._walk_code(function.__defaults__),
            self._walk_code(function.__kwdefaults__), *cells, *(self._global(function, name) for name in names),
            *(self._imported(function, name) for name in imported_names(function.__code__)),
        )  # fmt: skip

    def _walk_code(self, value: Any) -> bytes:
        """What belongs to a function is code wherever the function is found."""
        outside, self.in_code = self.in_code, True
        try:
            return self.digest(value)
        finally:
            self.in_code = outside

    def _cell(self, cell: Any) -> bytes:
        try:
            return self._walk_code(cell.cell_contents)
        except ValueError:
            return b"empty"

    def _global(self, function: FunctionType, name: str) -> bytes:
        if name not in function.__globals__:
            return _hash(b"builtin" if hasattr(builtins, name) else b"missing", name.encode())
        value = function.__globals__[name]
        if type(value) is ModuleType:
            return _hash(b"global", name.encode(), self._module(value, attribute_names(function.__code__)))
        return _hash(b"global", name.encode(), self._walk_code(value))

    def _imported(self, function: FunctionType, name: str) -> bytes:
        """A module that is imported when the function runs: what is there of it now, or else its file."""
        package = function.__globals__.get("__package__")
        for full in (name, f"{package}.{name}"):
            module = sys.modules.get(full)
            if module is not None:
                return _hash(b"import", self._module(module, attribute_names(function.__code__)))
        return _hash(b"import", name.encode(), _source_of(name))

    def _module(self, module: ModuleType, names: Iterable[str]) -> bytes:
        """One of the user's counts by those of its attributes that the code names."""
        if not is_own(module.__name__):
            return _hash(b"module", module.__name__.encode(), version_of(module.__name__))
        parts = [b"module", module.__name__.encode()]
        for name in names:
            value = vars(module).get(name)
            if type(value) is ModuleType:
                if id(value) not in self._known:
                    self._known[id(value)] = b"cycle"
                    parts += [name.encode(), self._module(value, names)]
                    del self._known[id(value)]  # Another function may name other attributes of it.
            elif name in vars(module):
                parts += [name.encode(), self._walk_code(value)]
        return _hash(*parts)

    def _code(self, code: CodeType) -> bytes:
        consts = [self._code(const) if type(const) is CodeType else self.digest(const) for const in code.co_consts]
        counts = (code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount, code.co_flags)
        return _hash(
            b"bytecode", code.co_code, getattr(code, "co_exceptiontable", b""), repr(counts).encode(),
            repr((code.co_names, code.co_varnames, code.co_freevars, code.co_cellvars)).encode(), *consts,
        )  # fmt: skip

    def _class(self, cls: type) -> bytes:
        if not is_own(cls.__module__):
            return self._named(cls)
        parts = [b"class", cls.__name__.encode(), self.digest(type(cls)), *map(self.digest, cls.__bases__)]
        for name, value in sorted(vars(cls).items()):
            if name not in _CLASS_NOISE:
                parts += [name.encode(), self._walk_code(value)]
        return _hash(*parts)

    def _named(self, thing: Any) -> bytes:
        """In code the version counts: a later one may do something else.  As part of a value it is but a maker."""
        module, name = getattr(thing, "__module__", None) or "", getattr(thing, "__qualname__", type(thing).__name__)
        version = version_of(module) if self.in_code else b""
        return _hash(b"named", module.encode(), name.encode(), version)

    # ------------------------------------------------------------ everything else

    def _object(self, value: Any, kind: type) -> bytes:
        counts = getattr(kind, "__minray_counts__", None)
        if counts is not None:
            return _hash(b"counts", *map(self.digest, counts(value)))
        try:
            reduced = self._reduced(value, kind)
        except Exception:
            if not self.in_code:
                raise
            return _hash(b"opaque", self.digest(kind))  # A lock, an open file: of its kind.
        if isinstance(reduced, str):
            wrapped = getattr(value, "__wrapped__", None)  # functools.cache and its like.
            return _hash(b"global", self._named(value), reduced.encode(), self.digest(wrapped))
        maker, args, state, items, pairs = (*reduced, None, None, None)[:5]
        parts = [b"object", self.digest(maker), self.digest(args), self.digest(state)]
        parts += [self.digest(item) for item in items or ()]
        parts.append(b"pairs")
        parts += [self.digest(part) for pair in pairs or () for part in pair]
        return _hash(*parts)

    def _reduced(self, value: Any, kind: type) -> Any:
        from minray import serialization

        reducer: Callable[[Any], Any] | None = serialization.reducer_of(kind) or copyreg.dispatch_table.get(kind)
        if reducer is not None:
            return reducer(value)
        return value.__reduce_ex__(pickle.HIGHEST_PROTOCOL)


# ---------------------------------------------------------------- what code names


def _codes(code: CodeType) -> Iterable[CodeType]:
    """It, and the functions, comprehensions and classes inside."""
    yield code
    for const in code.co_consts:
        if type(const) is CodeType:
            yield from _codes(const)


@lru_cache(maxsize=1024)
def global_names(code: CodeType) -> tuple[str, ...]:
    """The globals that it names, sorted."""
    found = {
        instruction.argval
        for inner in _codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname in _GLOBAL_OPS
    }
    return tuple(sorted(found))


@lru_cache(maxsize=1024)
def imported_names(code: CodeType) -> tuple[str, ...]:
    """The modules that it imports when it runs, sorted."""
    found = {
        instruction.argval
        for inner in _codes(code)
        for instruction in dis.get_instructions(inner)
        if instruction.opname == "IMPORT_NAME"
    }
    return tuple(sorted(found))


@lru_cache(maxsize=1024)
def attribute_names(code: CodeType) -> tuple[str, ...]:
    """All names in it that may be attributes, sorted: a few too many do no harm."""
    return tuple(sorted({name for inner in _codes(code) for name in inner.co_names}))


# ---------------------------------------------------------------- where the user's code ends

_OWN_FILES = os.path.dirname(os.path.abspath(__file__)) + os.sep
_LIBRARIES = tuple(
    {os.path.realpath(sysconfig.get_paths()[name]) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
)


@lru_cache(maxsize=4096)
def is_own(module_name: str | None) -> bool:
    """Whether a module is the user's: not part of Python, not installed, not minray."""
    if not module_name or module_name == "__main__":
        return True
    if module_name.partition(".")[0] in (*sys.stdlib_module_names, *sys.builtin_module_names):
        return False
    file = getattr(sys.modules.get(module_name), "__file__", None)
    if file is None:
        return module_name not in sys.modules or not hasattr(sys.modules[module_name], "__path__")
    path = os.path.realpath(file)
    if path.startswith(_OWN_FILES):
        return False
    return not (path.startswith(_LIBRARIES) or "site-packages" in path or "dist-packages" in path)


def _source_of(module_name: str) -> bytes:
    """The file of a module of the user's that nobody has imported yet; b"" for any other."""
    from minray.serialization import find_spec

    try:
        spec = find_spec(module_name)
        origin = os.path.realpath(spec.origin) if spec is not None and spec.has_location else ""
        if not origin or origin.startswith((*_LIBRARIES, _OWN_FILES)):
            return b""
        with open(origin, "rb") as file:
            return file.read()
    except Exception:  # Whatever a finder, or a file, has against it.
        return b""


def version_of(module_name: str) -> bytes:
    """Of the package that a module belongs to, as it says; Python's own modules are as old as their bytecode."""
    package = sys.modules.get(module_name.partition(".")[0])
    return str(getattr(package, "__version__", "")).encode()
