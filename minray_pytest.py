"""A pytest plugin: sessions of minray for tests.

Fixtures:

    minray_session  one session for the whole run (for each process of pytest-xdist), reset after each test in
                    milliseconds: actors are killed, tasks cancelled, and what was left is reported
    minray_fresh    a session of its own for the test
    minray_local    a session in this process (local mode): no children, breakpoints work

Markers:

    @pytest.mark.minray(num_cpus=4, ...)   options for `minray.init`, for any of the fixtures
    @pytest.mark.minray_leaks              the test fails if it leaves a ref, an actor, a task, shared memory,
                                           a process, a file descriptor or a session behind

Options: --minray-num-cpus (minray_num_cpus in the ini file, default 2), and minray_leaks = warn | error | ignore: what
becomes of a test without that marker which leaves something behind in minray_session.
In short tests it is usual to leave handles to actors in local variables: they are gone when the test returns.

A module beside the package, not in it, for pytest imports it in each run, whether or not minray is used: it imports
minray only when a fixture is asked for.  The shared session exists for those tests only that ask for it: others find no
session, and may begin one or call `minray.testing.explore`.
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Iterator
from typing import Any

import pytest

FIXTURES = ("minray_session", "minray_fresh", "minray_local")
LEAKS = ("warn", "error", "ignore")


class MinrayLeakWarning(pytest.PytestWarning):
    """A test has left something behind in the shared session."""


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("minray")
    group.addoption(
        "--minray-num-cpus", type=float, default=None, metavar="N", help="CPUs of the sessions of minray's fixtures"
    )
    parser.addini("minray_num_cpus", "CPUs of the sessions of minray's fixtures (default: 2)", default="2")
    parser.addini("minray_leaks", "when a test leaves something in minray_session: warn, error, ignore", default="warn")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "minray(num_cpus=..., ...): options for minray.init() in minray's fixtures")
    config.addinivalue_line("markers", "minray_leaks: the test fails if it leaves anything of minray behind")
    config.stash[_shared] = _Shared()


def pytest_unconfigure(config: pytest.Config) -> None:
    shared = config.stash.get(_shared, None)
    if shared is not None:
        shared.end()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    shared = item.config.stash[_shared]
    if shared.core is not None and "minray_session" not in getattr(item, "fixturenames", ()):
        shared.step_aside()


class _Shared:
    """The session that tests share.  While a test runs that does not ask for it, this process is not part of it."""

    def __init__(self) -> None:
        self.core: Any = None
        self.options: dict[str, Any] = {}
        self.left: list[str] = []  # by the test that ends, which must leave nothing

    def enter(self, options: dict[str, Any]) -> Any:
        """Begin it, or go on with it, or begin another if the options differ."""
        import minray
        from minray import api

        if self.core is not None and (options != self.options or self.core.raylet.closed or self.core.raylet.broken):
            self.end()
        if self.core is not None:
            if api._core is not self.core:
                _refuse_a_running_session()
                self.core.connect()
                api.set_core(self.core)
            return api._context(self.core)
        _refuse_a_running_session()
        context = minray.init(**options)
        self.core, self.options = api._core, options
        return context

    def step_aside(self) -> None:
        api = sys.modules["minray.api"]
        if api._core is self.core:
            api.set_core(None)

    def end(self) -> None:
        if self.core is not None:
            core, self.core = self.core, None
            api = sys.modules["minray.api"]
            if not core.raylet.closed:
                if api._core is core:
                    api.shutdown()
                else:
                    core.close()


_shared = pytest.StashKey[_Shared]()


def _refuse_a_running_session() -> None:
    from minray import api

    if api._core is not None:
        pytest.fail(
            "a session of minray is running already, which another test or fixture has begun and not ended. End it "
            "with minray.shutdown(), or begin it with `with minray.init(...):`.",
            pytrace=False,
        )


def _options(request: pytest.FixtureRequest) -> dict[str, Any]:
    config = request.config
    num_cpus = config.getoption("--minray-num-cpus")
    options: dict[str, Any] = {"num_cpus": float(config.getini("minray_num_cpus")) if num_cpus is None else num_cpus}
    marker = request.node.get_closest_marker("minray")
    if marker is not None:
        if marker.args:
            raise pytest.UsageError("@pytest.mark.minray takes options by name, as minray.init() does")
        options.update(marker.kwargs)
    return options


@pytest.fixture(autouse=True)
def _minray_leaks(request: pytest.FixtureRequest) -> Iterator[None]:
    if request.node.get_closest_marker("minray_leaks") is None:
        yield
        return
    shared = request.config.stash[_shared]
    if "minray_session" in request.fixturenames:
        shared.enter(_options(request))  # Before the count: it stays.
    before = _Inventory(shared.core)
    yield
    left = [*shared.left, *before.leaks()]
    shared.left.clear()
    if left:
        pytest.fail("the test has left behind:\n" + "\n".join(f"  {what}" for what in left), pytrace=False)


@pytest.fixture
def minray_session(request: pytest.FixtureRequest, _minray_leaks: None) -> Iterator[Any]:
    """A session that tests share; it is as new at the beginning of each."""
    shared = request.config.stash[_shared]
    yield shared.enter(_options(request))
    from minray import api
    from minray.reset import reset

    if shared.core is None or api._core is not shared.core or shared.core.raylet.closed:
        shared.end()  # The test has shut it down; the next gets another.
        return
    try:
        left = reset()
    except (TimeoutError, RuntimeError) as error:
        shared.end()
        pytest.fail(f"{error}, so this session was ended; the next test gets another.", pytrace=False)
    _report(request, left)


def _report(request: pytest.FixtureRequest, left: Any) -> None:
    how = request.config.getini("minray_leaks")
    if how not in LEAKS:
        raise pytest.UsageError(f"minray_leaks = {how!r}: it is one of {', '.join(LEAKS)}")
    if not left:
        return
    if request.node.get_closest_marker("minray_leaks") is not None:
        request.config.stash[_shared].left.append(f"in the session: {left}")  # _minray_leaks tells it with the rest.
        return
    if how == "ignore":
        return
    text = f"{request.node.nodeid} has left behind in the session: {left}"
    if how == "error":
        pytest.fail(text, pytrace=False)
    warnings.warn(MinrayLeakWarning(text), stacklevel=1)


@pytest.fixture
def minray_fresh(request: pytest.FixtureRequest, _minray_leaks: None) -> Iterator[Any]:
    """A session of the test's own."""
    yield from _own_session(request, {})


@pytest.fixture
def minray_local(request: pytest.FixtureRequest, _minray_leaks: None) -> Iterator[Any]:
    """A session in local mode: everything in this process."""
    yield from _own_session(request, {"local_mode": True})


def _own_session(request: pytest.FixtureRequest, options: dict[str, Any]) -> Iterator[Any]:
    import minray

    if "minray_session" in request.fixturenames:
        pytest.fail("a test has one session: ask for one of " + ", ".join(FIXTURES), pytrace=False)
    _refuse_a_running_session()
    with minray.init(**{**_options(request), **options}) as context:
        yield context


class _Inventory:
    """What this process has now; `leaks` tells what has come since."""

    def __init__(self, shared: Any) -> None:
        self.shared = shared
        self.descriptors = _descriptors()
        self.children = _children(self._but())
        self.used = shared.node.lineage.arena.used if shared is not None else 0

    def _but(self) -> int:
        return self.shared.zygote.pid if self.shared is not None and hasattr(self.shared, "zygote") else 0

    def leaks(self) -> list[str]:
        left = []
        api = sys.modules.get("minray.api")
        if api is not None and api._core is not None and api._core is not self.shared:
            left.append("a session that was not shut down (it is ended now)")
            api.shutdown()
        if self.shared is not None and self.shared.raylet.closed:
            return left
        ours = set(self.shared.raylet._by_fd) if self.shared is not None and hasattr(self.shared, "zygote") else set()
        for fd, what in sorted(_descriptors() - self.descriptors):
            if fd not in ours:
                left.append(f"file descriptor {fd}: {what}")
        left += [f"process {pid}: {what}" for pid, what in sorted(_children(self._but()) - self.children)]
        if self.shared is not None:
            more = self.shared.node.lineage.arena.used - self.used
            if more > 0:
                left.append(f"{more:,} bytes of shared memory")
        return left


def _descriptors() -> set[tuple[int, str]]:
    found = set()
    for fd in os.listdir("/proc/self/fd"):
        try:
            found.add((int(fd), os.readlink(f"/proc/self/fd/{fd}")))
        except OSError:
            pass  # The one that this listing used.
    return found


def _children(but: int) -> set[tuple[int, str]]:
    """All processes that descend from this one, by number and command line, without those that descend from `but`."""
    parents, commands = {}, {}
    for name in os.listdir("/proc"):
        if name.isdecimal():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parents[int(name)] = int(file.read().rpartition(b")")[2].split()[1])
                with open(f"/proc/{name}/cmdline", "rb") as file:
                    commands[int(name)] = file.read().replace(b"\0", b" ").decode("utf-8", "replace").strip()[:100]
            except OSError:
                pass  # It has ended meanwhile.
    found = set()
    for pid in parents:
        line = [pid]
        while line[-1] not in (0, 1, but, os.getpid()):
            line.append(parents.get(line[-1], 0))
        if line[-1] == os.getpid() and len(line) > 1 and "resource_tracker" not in commands.get(pid, ""):
            found.add((pid, commands.get(pid, "")))
    return found
