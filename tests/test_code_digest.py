"""What counts as unchanged: code by what it does, values by what they are; and the same in every process."""

from __future__ import annotations

import functools
import importlib
import os
import subprocess
import sys
import textwrap
import threading

import numpy as np
import pytest

import minray
from minray.code_digest import Digester, code_digest, is_own, value_digest
from minray.object_ref import new_ref
from minray.task_spec import TaskOptions


def function(source, name="f"):
    """A function as a program of one file would have it."""
    scope = {"__name__": "__main__"}
    exec(compile(textwrap.dedent(source), "<test>", "exec"), scope)
    return scope[name]


SAME = {
    "its line": ("def f(x): return x + 1", "\n\n\n# moved\ndef f(x): return x + 1"),
    "its name": ("def f(x): return x + 1", "def g(x): return x + 1\nf = g"),
    "comments and annotations": ("def f(x): return x", "def f(x: int) -> int:\n    # as it is\n    return x"),
    "globals that it does not name": ("def f(x): return x", "a = 3\ndef f(x): return x"),
    "an attribute that is called like a global": ("a = 1\ndef f(x): return x.a", "a = 2\ndef f(x): return x.a"),
    "the order of a set": ("a = {'x', 'y', 'z'}\ndef f(): return a", "a = {'z', 'y', 'x'}\ndef f(): return a"),
    "equal strings that are not one object": (
        "a = ['ab', 'ab']\ndef f(): return a",
        "a = ['ab', ''.join(['a', 'b'])]\ndef f(): return a",
    ),
}
DIFFERENT = {
    "a constant": ("def f(x): return x + 1", "def f(x): return x + 2"),
    "an operation": ("def f(x): return x + 1", "def f(x): return x - 1"),
    "a default": ("def f(x=1): return x", "def f(x=2): return x"),
    "a keyword default": ("def f(*, x=1): return x", "def f(*, x=2): return x"),
    "a global": ("a = 1\ndef f(): return a", "a = 2\ndef f(): return a"),
    "a type of equal values": ("a = 1\ndef f(): return a", "a = True\ndef f(): return a"),
    "a function that it calls": (
        "def g(): return 1\ndef f(): return g()",
        "def g(): return 2\ndef f(): return g()",
    ),
    "a function that that one calls": (
        "def h(): return 1\ndef g(): return h()\ndef f(): return g()",
        "def h(): return 2\ndef g(): return h()\ndef f(): return g()",
    ),
    "a global of a comprehension": ("a = 1\ndef f(): return [a for _ in 'x']", "a = 2\ndef f(): return [a for _ in 'x']"),
    "a global of an inner function": (
        "a = 1\ndef f():\n    def g(): return a\n    return g()",
        "a = 2\ndef f():\n    def g(): return a\n    return g()",
    ),
    "a closure": (
        "def make(n):\n    def g(): return n\n    return g\nf = make(1)",
        "def make(n):\n    def g(): return n\n    return g\nf = make(2)",
    ),
    "a method of a class": (
        "class C:\n    def m(self): return 1\ndef f(): return C().m()",
        "class C:\n    def m(self): return 2\ndef f(): return C().m()",
    ),
    "an attribute of a class": ("class C: a = 1\ndef f(): return C.a", "class C: a = 2\ndef f(): return C.a"),
    "a base class": (
        "class B:\n    def m(self): return 1\nclass C(B): pass\ndef f(): return C().m()",
        "class B:\n    def m(self): return 2\nclass C(B): pass\ndef f(): return C().m()",
    ),
    "a property": (
        "class C:\n    @property\n    def p(self): return 1\ndef f(): return C().p",
        "class C:\n    @property\n    def p(self): return 2\ndef f(): return C().p",
    ),
    "an exception that it handles": (
        "def f():\n    try: pass\n    except KeyError: return 1",
        "def f():\n    try: pass\n    except ValueError: return 1",
    ),
    "a cached function that it calls": (
        "import functools\n@functools.cache\ndef g(): return 1\ndef f(): return g()",
        "import functools\n@functools.cache\ndef g(): return 2\ndef f(): return g()",
    ),
    "a partial": (
        "import functools\ndef g(x): return x\nh = functools.partial(g, 1)\ndef f(): return h()",
        "import functools\ndef g(x): return x\nh = functools.partial(g, 2)\ndef f(): return h()",
    ),
    "a remote function that it submits": (
        "import minray\n@minray.remote\ndef g(): return 1\ndef f(): return g.remote()",
        "import minray\n@minray.remote\ndef g(): return 2\ndef f(): return g.remote()",
    ),
    "an actor class that it makes": (
        "import minray\n@minray.remote\nclass A:\n    def m(self): return 1\ndef f(): return A.remote()",
        "import minray\n@minray.remote\nclass A:\n    def m(self): return 2\ndef f(): return A.remote()",
    ),
    "an array": (
        "import numpy as np\na = np.zeros(3)\ndef f(): return a",
        "import numpy as np\na = np.ones(3)\ndef f(): return a",
    ),
}


@pytest.mark.parametrize("what", SAME)
def test_code_is_the_same_whatever(what):
    one, other = SAME[what]
    assert code_digest(function(one)) == code_digest(function(other))


@pytest.mark.parametrize("what", DIFFERENT)
def test_code_is_another_with_another(what):
    one, other = DIFFERENT[what]
    assert code_digest(function(one)) == code_digest(function(one)), "the same code is the same"
    assert code_digest(function(one)) != code_digest(function(other))


def test_functions_that_call_each_other_have_a_digest():
    even = "def even(n): return n == 0 or odd(n - 1)\ndef odd(n): return n != 0 and even(n - 1)\nf = even"
    assert code_digest(function(even)) == code_digest(function(even))
    assert code_digest(function(even)) != code_digest(function(even.replace("n != 0", "n > 0")))


def test_options_of_a_remote_function_do_not_count_but_how_much_it_returns_does():
    def submits(options):
        return function(f"import minray\n@minray.remote({options})\ndef g(): pass\ndef f(): return g.remote()")

    assert code_digest(submits("num_cpus=1")) == code_digest(submits("num_cpus=0.5, max_retries=0"))
    assert code_digest(submits("num_returns=1")) != code_digest(submits("num_returns=2"))


def test_a_lock_in_a_closure_counts_by_its_type():
    def make():
        lock = threading.Lock()
        return lambda: lock

    assert code_digest(make()) == code_digest(make())


def test_a_ref_in_a_closure_is_never_the_same():
    def make(ref):
        return lambda: ref

    assert code_digest(make(new_ref(b"a" * 16))) != code_digest(make(new_ref(b"b" * 16)))


# ---------------------------------------------------------------- modules


@pytest.fixture
def module(tmp_path, monkeypatch):
    """Writes a module of the user's and imports it."""
    monkeypatch.syspath_prepend(str(tmp_path))
    names = []

    def write(name, source):
        (tmp_path / f"{name}.py").write_text(textwrap.dedent(source))
        names.append(name)
        sys.modules.pop(name, None)
        importlib.invalidate_caches()
        is_own.cache_clear()
        return importlib.import_module(name)

    yield write
    for name in names:
        sys.modules.pop(name, None)
    is_own.cache_clear()


USES = {
    "by a function from it": "from helper_of_mine import g\ndef f(): return g()",
    "by its name": "import helper_of_mine\ndef f(): return helper_of_mine.g()",
    "by an import when it runs": "def f():\n    from helper_of_mine import g\n    return g()",
}


@pytest.mark.parametrize("how", USES)
def test_an_imported_module_of_ones_own_counts(how, module):
    module("helper_of_mine", "def g(): return 1")
    before = code_digest(function(USES[how]))
    module("helper_of_mine", "\n\ndef unused(): pass\ndef g(): return 1")
    assert code_digest(function(USES[how])) == before, "only what is used counts"
    module("helper_of_mine", "def g(): return 2")
    assert code_digest(function(USES[how])) != before


def test_a_module_that_is_imported_later_counts_by_its_file(module, tmp_path):
    module("helper_of_mine", "def g(): return 1")
    del sys.modules["helper_of_mine"]
    source = USES["by an import when it runs"]
    before = code_digest(function(source))
    (tmp_path / "helper_of_mine.py").write_text("def g(): return 2")
    assert code_digest(function(source)) != before


def test_installed_packages_count_by_their_version(monkeypatch):
    uses = "import numpy\ndef f(): return numpy.sum([1])"
    before = code_digest(function(uses))
    monkeypatch.setattr(np, "__version__", "0.0.1")
    assert code_digest(function(uses)) != before
    assert not is_own("numpy.linalg") and not is_own("json.decoder") and not is_own("minray.api")
    assert is_own("__main__") and is_own("tests.somewhere")


# ---------------------------------------------------------------- values


class Point:
    def __init__(self, x):
        self.x = x


def test_values_are_told_apart_by_what_they_are():
    values = [
        None, 0, 1, True, 1.0, -0.0, 0.0, 1j, "1", b"1", bytearray(b"1"), (), [], {}, set(), frozenset(), (1,), [1],
        {1}, {1: 2}, {2: 1}, {"a": 1, "b": 2}, [[]], [()], [[1], 2], [1, [2]], "a" * 100, 10**5000, -1, 255, -256, "ä",
        Point(1), Point(2), Point([1]), np.zeros(3), np.zeros(3, "f4"), np.zeros((3, 1)), np.arange(3), len, np.sum,
        functools.partial(len, "a"), slice(1), range(3), range(4), float("inf"), Point, "\ud800",
    ]  # fmt: skip
    digests = [value_digest([value]) for value in values]
    assert len(set(digests)) == len(values)
    assert digests == [value_digest([value]) for value in values]


def test_a_value_that_contains_itself_has_a_digest():
    def ring(x):
        items = [x]
        items.append(items)
        return items

    assert value_digest([ring(1)]) == value_digest([ring(1)]) != value_digest([ring(2)])


def test_refs_in_a_value_count_by_their_position():
    a, b = new_ref(b"a" * 16), new_ref(b"b" * 16)
    assert value_digest([a, 1]) == value_digest([b, 1])
    assert value_digest([a, a]) != value_digest([a, b])


def test_a_value_that_cannot_be_digested_is_said_to_be_none():
    class Odd:
        def __reduce__(self):
            raise ZeroDivisionError

    deep = []
    for _ in range(100_000):
        deep = [deep]
    digester = Digester()
    assert digester.of_value(Odd()) == b"" and digester.of_value(deep) == b""
    while deep:
        deep = deep.pop()
    assert digester.of_value([1]) != b""


def test_a_call_is_what_is_called_and_with_what():
    digester = Digester()
    for function_id, number in ((b"f", 1), (b"g", 2)):
        digester.learn_function(function_id, function(f"def f(x): return {number}"), "f")
        digester.learn_template(number, TaskOptions(0, function_id, "f"))
    digester.learn_template(3, TaskOptions(0, b"f", "f", num_returns=2))
    one = digester.of_call(1, (1,), {})
    assert one == digester.of_call(1, (1,), {}) and len(one) == 32
    changed = digester.of_call(2, (1,), {})
    assert changed[:16] == one[:16] and changed[16:] != one[16:], "the first half is the same while code changes"
    others = [digester.of_call(1, (2,), {}), digester.of_call(1, (), {"x": 1}), digester.of_call(3, (1,), {})]
    assert len({one[:16], *(other[:16] for other in others)}) == 4
    assert {other[16:] for other in others} == {one[16:]}


PROGRAM = """
import sys
sys.path.insert(0, {root!r})
from minray.code_digest import code_digest, value_digest
import numpy as np
class P:
    names = {{"a", "b", "c"}}
    def m(self): return [x for x in self.names if x in {{"a", "b"}}]
def f(x, y={{"p", "q", "r"}}): return P().m(), np.sum(x), x in {{"k", "l", "m"}}
print(code_digest(f).hex(), value_digest([P(), {{"u", "v", "w"}}, frozenset(P.names), np.arange(4)]).hex())
"""


def test_digests_are_the_same_in_every_process():
    root = os.path.dirname(os.path.dirname(os.path.abspath(minray.__file__)))
    printed = {
        subprocess.run(
            [sys.executable, "-c", PROGRAM.format(root=root)],
            env={**os.environ, "PYTHONHASHSEED": seed}, capture_output=True, text=True, check=True, timeout=60,
        ).stdout
        for seed in ("0", "1", "2")
    }  # fmt: skip
    assert len(printed) == 1
