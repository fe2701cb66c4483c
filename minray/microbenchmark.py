"""`minray microbenchmark`: how fast minray is, beside the alternatives, in one run.

A row is a piece of work, written once, as a function of a *backend*; each backend that can do that work
does it.  Rows that Ray's public microbenchmark has too carry its names and do work of its kind, sized for a
small machine; the others are named for what they measure.  Backends:

* `minray` and `ray` (if it is installed): the very same code, with one module in the other's place;
* `pool`: `concurrent.futures.ProcessPoolExecutor` with forked workers, its fastest way;
* `socketpair`: a forked process that echoes 64 bytes, the floor under any call to another process (both ends
  block at once; minray's ends look for a tenth of a millisecond first, which costs CPU time: see its row);
* `memcpy`: `numpy.copyto` between warm arrays, the floor under any `put`.

How it is measured, so that the figures mean something:

* Nothing is special-cased for minray: public API only, default options (GCS recording on), no private switch.
  Ray is started without its dashboard, which would cost it time and memory that minray has no use for.
* A backend runs alone, in a fresh interpreter that imports no other, and the last of its processes has ended
  before the next one starts: no daemon of one takes time from another.  Backends take turns, group of rows by
  group of rows, in several rounds that each begin with a different one, so that a noisy machine is noisy for
  all.  Shown are medians over rounds.
* All workers have worked before the clock runs.  A rate is warmed up, then run for a fixed time.  Every result
  is fetched; nothing is only submitted.
* A factor such as (2.5x) means: minray is 2.5 times as good as this, be it more a second or less time.
* "Ray publishes" are figures of the Ray project for a 64-core server: another machine, so read them as aims.
* A row that fails is shown as failed with its reason; it is never left out.
* Memory is PSS, summed over all processes of the session: a page shared by n processes counts 1/n for each.
  Pages of the interpreter's file that other programs on this machine have mapped as well count partly.
* Tasks that nap for 1 ms sleep rather than compute: with fewer cores than busy processes the row would
  otherwise measure the cores.
* "Inside one async task" is minray alone, and the one row that looks behind the public API: where the CPU time
  of `get([f.remote() for _ in range(1000)])` goes, in all processes.  The driver's part is split by wrapping what
  it calls once a batch, so watching costs each task little (the rates are measured without it).

Left out: `Executor.map(chunksize=...)`, which is batching by hand, and latency percentiles, which need a
quiet machine.  Memory rows need Linux's /proc.  Rows marked "long" take minutes and run when named, or with
`--long`.  What to conclude is docs/performance.md's business.
"""

from __future__ import annotations

import fnmatch
import importlib
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple

# subprocess, tempfile, argparse and minray's own modules are imported where they are used: the memory rows of
# a child would show them, and the pool's child has no business with minray.

RAYLIKE = ("minray", "ray")
CALLERS = ("minray", "pool", "ray")
clock = time.perf_counter  # One clock for all processes of a machine: stamps of workers can be compared.

Work = Callable[["Backend"], "float | tuple[float, ...]"]


class Figure(NamedTuple):
    """One line of the table.  Units that end in "/s", and "%", are better high, all others low."""

    name: str
    unit: str
    published: float | None = None

    @property
    def more_is_better(self) -> bool:
        return self.unit.endswith(("/s", "%"))


class Row(NamedTuple):
    """A piece of work, and the figures it yields, in their order."""

    work: Work
    group: str
    on: tuple[str, ...]
    figures: tuple[Figure, ...]
    long: bool


ROWS: dict[str, Row] = {}
"""All rows by the name of their function, in the order in which they run and are shown."""


def row(group: str, on: tuple[str, ...], *figures: Figure, long: bool = False) -> Callable[[Work], Work]:
    """Register a function of a backend as the row (or rows) that yields these figures."""

    def register(work: Work) -> Work:
        ROWS[work.__name__] = Row(work, group, on, figures, long)
        return work

    return register


# --- What tasks run.  In this module, so every backend can import or pickle them. ---


def small_value() -> bytes:
    return b"ok"


def stamp_now() -> float:
    return clock()


def own_pid() -> int:
    return os.getpid()


def pause() -> None:
    time.sleep(0.05)


def nap() -> tuple[float, float]:
    """Take a millisecond; tell when it began and ended."""
    began = clock()
    time.sleep(0.001)
    return began, clock()


def count_up(n: int) -> Iterator[int]:
    yield from range(n)


class Server:
    """The actor that is called."""

    def small_value(self) -> bytes:
        return b"ok"

    def small_value_arg(self, value: object) -> bytes:
        return b"ok"


class AsyncServer:
    """The asyncio actor that is called."""

    async def small_value(self) -> bytes:
        return b"ok"

    async def small_value_arg(self, value: object) -> bytes:
        return b"ok"


# --- Backends ---


class Backend:
    """What rows need of any library.  `start` fills in the functions that rows call: the library's own."""

    name: str
    module: str
    ray: Any
    """The module minray or ray."""
    noop: Callable[[], Any]
    """Submit the cheapest call there is; returns a reference."""
    get: Callable[[Any], Any]
    """The value of a reference, or the values of a list of them."""
    put: Callable[[Any], Any]
    drain: Callable[[list[Any]], None]
    """Take references one by one, as they become ready."""
    remote: Callable[[Callable[..., Any]], Callable[..., Any]]
    """Of a function, the function that submits it."""

    def __init__(self, seconds: float, cpus: int) -> None:
        self.seconds, self.cpus = seconds, cpus

    def start(self, cpus: int) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError

    def use_all_workers(self, cpus: int) -> None:
        """Let each of them work once, where there are any."""
        if self.name in CALLERS:
            take_pause = self.remote(pause)
            self.get([take_pause() for _ in range(2 * cpus)])

    def rate(self, operation: Callable[[], object], count: float = 1.0) -> float:
        """Units a second, where one operation does `count` units."""
        operation()  # The first time is typical of nothing.
        repeats = 1
        while True:  # Warm up, and find how often to read the clock: about twenty times in all.
            began = clock()
            for _ in range(repeats):
                operation()
            if clock() - began > self.seconds / 20:
                break
            repeats *= 2
        done, began = 0, clock()
        while (elapsed := clock() - began) < self.seconds:
            for _ in range(repeats):
                operation()
            done += repeats
        return done * count / elapsed


class Minray(Backend):
    name = module = "minray"

    def __init__(self, seconds: float, cpus: int) -> None:
        super().__init__(seconds, cpus)
        self.ray = importlib.import_module(self.module)

    def start(self, cpus: int) -> None:
        ray = self.ray
        ray.init(num_cpus=cpus, include_dashboard=False)
        self.get, self.put = ray.get, ray.put

        def drain(refs: list[Any]) -> None:
            while refs:
                refs = ray.wait(refs)[1]

        self.drain = drain
        self.remote = lambda function: ray.remote(function).remote
        self.noop = self.remote(small_value)

    def stop(self) -> None:
        self.ray.shutdown()


class Ray(Minray):
    name = module = "ray"


class Pool(Backend):
    name, module = "pool", "concurrent.futures.process"

    def __init__(self, seconds: float, cpus: int) -> None:
        super().__init__(seconds, cpus)
        importlib.import_module(self.module)  # Now, so that the time to start it does not contain it.

    def start(self, cpus: int) -> None:
        import concurrent.futures
        import multiprocessing

        context = multiprocessing.get_context("fork")
        pool = self.pool = concurrent.futures.ProcessPoolExecutor(cpus, mp_context=context)

        def get(refs: Any) -> Any:
            return [ref.result() for ref in refs] if isinstance(refs, list) else refs.result()

        def drain(refs: list[Any]) -> None:
            for _ in concurrent.futures.as_completed(refs):  # wait() in a loop takes ten times as long.
                pass

        self.get, self.drain = get, drain
        self.remote = lambda function: partial(pool.submit, function)
        self.noop = self.remote(small_value)

    def stop(self) -> None:
        self.pool.shutdown()


class Socketpair(Backend):
    name = "socketpair"

    def start(self, cpus: int) -> None:
        self.socket, theirs = socket.socketpair()
        self.pid = os.fork()
        if not self.pid:
            self.socket.close()
            while data := theirs.recv(64):
                theirs.sendall(data)
            os._exit(0)
        theirs.close()
        send, receive, ping = self.socket.sendall, self.socket.recv, b"." * 64

        def noop() -> bytes:
            send(ping)
            return receive(64)

        self.noop, self.get = noop, lambda reply: reply

    def stop(self) -> None:
        self.socket.close()
        os.waitpid(self.pid, 0)


class Memcpy(Backend):
    name = "memcpy"

    def start(self, cpus: int) -> None:
        import numpy

        self.put = partial(numpy.copyto, numpy.ones(100_000_000, numpy.uint8))

    def stop(self) -> None:
        pass


BACKENDS: dict[str, type[Backend]] = {cls.name: cls for cls in (Minray, Pool, Socketpair, Memcpy, Ray)}


# --- Rows: objects ---


@row("objects", RAYLIKE, Figure("single client get calls", "gets/s"))
def get_calls(b: Backend) -> float:
    ref = b.put(0)
    return b.rate(lambda: b.get(ref))


@row("objects", RAYLIKE, Figure("single client put calls", "puts/s"))
def put_calls(b: Backend) -> float:
    return b.rate(lambda: b.put(0))


@row("objects", RAYLIKE, Figure("multi client put calls", "puts/s", 16_526))
def multi_client_put_calls(b: Backend) -> float:
    ray = b.ray

    def put_100() -> None:
        for _ in range(100):
            ray.put(0)

    client = b.remote(put_100)
    return b.rate(lambda: b.get([client() for _ in range(10)]), 1000)


@row("objects", (*RAYLIKE, "memcpy"), Figure("put of 10 x 100 MB that are kept, into fresh memory", "GB/s"))
def put_fresh(b: Backend) -> float:
    import numpy

    array = numpy.ones(100_000_000, numpy.uint8)
    put = array.copy if b.name == "memcpy" else partial(b.put, array)
    began = clock()
    kept = [put() for _ in range(10)]
    return 0.1 * len(kept) / (clock() - began)


@row("objects", (*RAYLIKE, "memcpy"), Figure("single client put gigabytes", "GB/s"))
def put_gigabytes(b: Backend) -> float:
    import numpy

    array = numpy.ones(100_000_000, numpy.uint8)
    for _ in range(150):  # A store may take fresh memory for long: Ray's gains speed for the first ten gigabytes.
        b.put(array)
    return b.rate(lambda: b.put(array), 0.1)


@row("objects", (*RAYLIKE, "memcpy"), Figure("get of 100 MB (memcpy: a copy of it)", "µs"))
def get_100_mb(b: Backend) -> float:
    import numpy

    array = numpy.ones(100_000_000, numpy.uint8)
    if b.name == "memcpy":
        return 1e6 / b.rate(lambda: b.put(array))
    ref = b.put(array)
    return 1e6 / b.rate(lambda: b.get(ref))


@row("objects", RAYLIKE, Figure("single client get object containing 10k refs", "gets/s", 13.4))
def get_10k_refs(b: Backend) -> float:
    ref = b.put([b.put(0) for _ in range(10_000)])
    return b.rate(lambda: b.get(ref))


# --- Rows: tasks ---


@row("tasks", (*CALLERS, "socketpair"), Figure("single client tasks sync", "tasks/s"))
def tasks_sync(b: Backend) -> float:
    get, noop = b.get, b.noop
    return b.rate(lambda: get(noop()))


@row("tasks", CALLERS, Figure("single client tasks async", "tasks/s", 8_040))
def tasks_async(b: Backend) -> float:
    get, noop = b.get, b.noop
    return b.rate(lambda: get([noop() for _ in range(1000)]), 1000)


@row("tasks", RAYLIKE, Figure("multi client tasks async", "tasks/s", 21_230))
def multi_client_tasks_async(b: Backend) -> float:
    ray, noop = b.ray, b.ray.remote(small_value)

    class Client:
        def run(self, count: int) -> None:
            ray.get([noop.remote() for _ in range(count)])

    clients = [ray.remote(Client).remote() for _ in range(4)]
    return b.rate(lambda: b.get([client.run.remote(1000) for client in clients]), 4000)


@row("tasks", RAYLIKE, Figure("single client streaming generator items", "items/s"))
def generator_items(b: Backend) -> float:
    get, stream = b.get, b.ray.remote(num_returns="streaming")(count_up)

    def read() -> None:
        for ref in stream.remote(1000):
            get(ref)

    return b.rate(read, 1000)


@row("tasks", CALLERS, Figure("single client wait 1k refs", "drains/s", 5.1))
def wait_1k_refs(b: Backend) -> float:
    noop, drain = b.noop, b.drain
    return b.rate(lambda: drain([noop() for _ in range(1000)]))


@row("tasks", CALLERS, Figure("workers busy with 1 ms tasks while the driver computes", "%"))
def driver_busy(b: Backend) -> float:
    take_nap = b.remote(nap)
    b.get([take_nap() for _ in range(100)])
    lasts_s = 2 * b.seconds  # In a shorter time it is chance whether the pool's threads get the GIL at all.
    refs = [take_nap() for _ in range(int(2000 * lasts_s * b.cpus))]  # Twice what the time can hold.
    began, turns = clock(), 0
    while (ended := clock()) < began + lasts_s:
        turns += 1  # Pure Python that holds the GIL.
    spans = b.get(refs)
    busy: float = sum(max(0.0, min(stop, ended) - max(start, began)) for start, stop in spans)
    return 100 * busy / (b.cpus * (ended - began))


@row(
    "tasks",
    CALLERS,
    Figure("one task, sync: the call that submits it returns", "µs"),
    Figure("one task, sync: then until the function runs", "µs"),
    Figure("one task, sync: then until get() returns", "µs"),
    Figure("one task, sync: CPU time of all processes", "µs"),
)
def breakdown_sync(b: Backend) -> tuple[float, ...]:
    get, stamp = b.get, b.remote(stamp_now)
    b.rate(lambda: get(stamp()))
    parts: list[tuple[float, float, float]] = []
    used_s = sum(cpu_times().values())
    until = clock() + 1.5 * b.seconds
    while (called := clock()) < until or len(parts) < 50:
        ref = stamp()
        submitted = clock()
        ran = get(ref)
        parts.append((submitted - called, ran - submitted, clock() - ran))
    used_s = sum(cpu_times().values()) - used_s
    return (*(1e6 * median(part) for part in zip(*parts, strict=True)), 1e6 * used_s / len(parts))


@row(
    "tasks",
    CALLERS,
    Figure("one task, async: CPU time of the driver", "µs"),
    Figure("one task, async: CPU time of the workers", "µs"),
    Figure("one task, async: CPU time of all other processes", "µs"),
)
def breakdown_async(b: Backend) -> tuple[float, ...]:
    get, noop, pid_of = b.get, b.noop, b.remote(own_pid)
    workers = set(get([pid_of() for _ in range(2000)]))
    tasks, before, until = 0, cpu_times(), clock() + 2 * b.seconds  # The kernel counts in 10 ms.
    while clock() < until:
        get([noop() for _ in range(1000)])
        tasks += 1000
    return tuple(1e6 * used_s / tasks for used_s in used_since(before, workers))


# --- Rows: where the time of a task goes, inside minray ---


class Stopwatch:
    """CPU time by part: each moment of a thread counts once, for the innermost part that the thread is in."""

    def __init__(self) -> None:
        self._local = threading.local()
        self._threads: list[defaultdict[str, float]] = []

    def run(self, part: str, function: Callable[..., Any], *args: Any) -> Any:
        local, now = self._local, time.thread_time()
        if not hasattr(local, "parts"):
            local.parts, local.since, local.spent = [], now, defaultdict(float)
            self._threads.append(local.spent)
        if local.parts:
            local.spent[local.parts[-1]] += now - local.since
        local.parts.append(part)
        local.since = now
        try:
            return function(*args)
        finally:
            now = time.thread_time()
            local.spent[local.parts.pop()] += now - local.since
            local.since = now

    def wrap(self, owner: type, method: str, part: str) -> None:
        """From now on all calls of this method are this part."""
        function = getattr(owner, method)
        setattr(owner, method, lambda *args: self.run(part, function, *args))

    def spent(self) -> dict[str, float]:
        return {part: sum(spent[part] for spent in self._threads) for spent in self._threads for part in spent}


PARTS = {
    "submit": "driver: f.remote()",
    "references": "driver: counts references",
    "take_in": "driver: node takes it in, chooses a worker",
    "send": "driver: pickles, sends to the worker",
    "worker_io": "workers: receive, unpickle; pickle, send",
    "worker_run": "workers: run it, pickle the result",
    "receive": "driver: receives, unpickles",
    "result": "driver: node files the result, chooses the next",
    "get": "driver: get()",
    "poll": "driver: waits for news (spins, polls)",
    "rows": "driver: makes, pickles and sends rows for the GCS",
    "rest": "driver: everything else",
    "gcs": "GCS (and zygote): rows into SQLite",
}
"""What the CPU time of a task is made of, in the order in which a task meets it; together all there is."""


@row("inside", ("minray",), *(Figure(f"inside one async task, {part}", "µs") for part in PARTS.values()))
def inside_async(b: Backend) -> tuple[float, ...]:
    from minray.node import Node
    from minray.raylet import Raylet

    watch, took_s, handle = Stopwatch(), [], Node.handle
    node_parts = {"TasksSubmitted": "take_in", "TasksFinished": "result", "ReferencesChanged": "references"}

    def watched_handle(node: Node, event: Any, now: float) -> Any:
        kind = type(event).__name__
        if kind == "TasksFinished":  # Workers say when each task began and ended; one is enough of a sample.
            took_s.append(event.results[-1][4] - event.results[-1][3])
        return watch.run(node_parts.get(kind, "rest"), handle, node, event, now)

    get, noop, pid_of = b.get, b.noop, b.remote(own_pid)
    workers = set(get([pid_of() for _ in range(2000)]))
    # For good: this row is the last that this interpreter runs.
    setattr(Node, "handle", watched_handle)  # noqa: B010  (to mypy a method is not for assignment)
    for method, part in {
        "_drain_locked": "references", "_do": "send", "_take_from_worker": "receive", "poll": "poll",
        "_flush": "rows", "_take_from_gcs": "rows",
    }.items():  # fmt: skip
        watch.wrap(Raylet, method, part)

    def batch() -> None:
        refs = watch.run("submit", lambda: [noop() for _ in range(1000)])
        watch.run("get", get, refs)
        watch.run("references", refs.clear)

    b.rate(batch)
    took_s.clear()
    tasks, before, until = 0, cpu_times(), clock() + 2 * b.seconds
    earlier, driver_s = watch.spent(), time.process_time()
    while clock() < until:
        batch()
        tasks += 1000
    spent, driver_s = watch.spent(), time.process_time() - driver_s
    _, workers_s, others_s = used_since(before, workers)
    spent = {part: spent_s - earlier.get(part, 0.0) for part, spent_s in spent.items()}
    spent["rest"] = driver_s - sum(spent_s for part, spent_s in spent.items() if part != "rest")
    spent["worker_run"] = median(took_s) * tasks  # By the clock; the sum of it would hold what preempted them.
    spent["worker_io"] = workers_s - spent["worker_run"]
    spent["gcs"] = others_s
    return tuple(1e6 * spent[part] / tasks for part in PARTS)


# --- Rows: actors ---


@row("actors", RAYLIKE, Figure("1:1 actor calls sync", "calls/s"))
def actor_sync(b: Backend) -> float:
    server = b.ray.remote(Server).remote()
    return b.rate(lambda: b.get(server.small_value.remote()))


@row("actors", RAYLIKE, Figure("1:1 actor calls async", "calls/s"))
def actor_async(b: Backend) -> float:
    server = b.ray.remote(Server).remote()
    return b.rate(lambda: b.get([server.small_value.remote() for _ in range(1000)]), 1000)


@row("actors", RAYLIKE, Figure("1:1 actor calls concurrent", "calls/s", 5_775))
def actor_concurrent(b: Backend) -> float:
    server = b.ray.remote(Server).options(max_concurrency=16).remote()
    return b.rate(lambda: b.get([server.small_value.remote() for _ in range(1000)]), 1000)


@row("actors", RAYLIKE, Figure("1:1 async-actor calls sync", "calls/s", 1_460))
def async_actor_sync(b: Backend) -> float:
    server = b.ray.remote(AsyncServer).remote()
    return b.rate(lambda: b.get(server.small_value.remote()))


@row("actors", RAYLIKE, Figure("1:1 async-actor calls async", "calls/s", 4_260))
def async_actor_async(b: Backend) -> float:
    server = b.ray.remote(AsyncServer).remote()
    return b.rate(lambda: b.get([server.small_value.remote() for _ in range(1000)]), 1000)


@row("actors", RAYLIKE, Figure("1:1 async-actor calls with args async", "calls/s", 2_836))
def async_actor_with_args(b: Backend) -> float:
    server = b.ray.remote(AsyncServer).remote()
    return b.rate(lambda: b.get([server.small_value_arg.remote(n) for n in range(1000)]), 1000)


def batch_caller(ray: Any) -> Any:
    """An actor class that calls other actors, as many times each as it is told."""

    class Caller:
        def __init__(self, servers: list[Any]) -> None:
            self.servers = servers

        def call(self, count: int) -> None:
            ray.get([server.small_value.remote() for server in self.servers for _ in range(count)])

        def call_with_arg(self, count: int) -> None:
            ref = ray.put(0)
            ray.get([server.small_value_arg.remote(ref) for server in self.servers for _ in range(count)])

    return ray.remote(Caller)


def one_to_n(b: Backend, cls: type) -> float:
    server = b.ray.remote(cls)
    caller = batch_caller(b.ray).remote([server.remote() for _ in range(b.cpus)])
    return b.rate(lambda: b.get(caller.call.remote(1000)), 1000 * b.cpus)


def n_to_n(b: Backend, cls: type) -> float:
    server, caller_class = b.ray.remote(cls), batch_caller(b.ray)
    servers = [server.remote() for _ in range(b.cpus)]
    callers = [caller_class.remote(servers) for _ in range(4)]
    return b.rate(lambda: b.get([caller.call.remote(500) for caller in callers]), 2000 * b.cpus)


@row("actors", RAYLIKE, Figure("1:n actor calls async", "calls/s", 8_038))
def actor_one_to_n(b: Backend) -> float:
    return one_to_n(b, Server)


@row("actors", RAYLIKE, Figure("n:n actor calls async", "calls/s", 27_376))
def actor_n_to_n(b: Backend) -> float:
    return n_to_n(b, Server)


@row("actors", RAYLIKE, Figure("1:n async-actor calls async", "calls/s", 8_038))
def async_actor_one_to_n(b: Backend) -> float:
    return one_to_n(b, AsyncServer)


@row("actors", RAYLIKE, Figure("n:n async-actor calls async", "calls/s", 27_376))
def async_actor_n_to_n(b: Backend) -> float:
    return n_to_n(b, AsyncServer)


@row("actors", RAYLIKE, Figure("n:n actor calls with arg async", "calls/s"))
def actor_n_to_n_with_arg(b: Backend) -> float:
    server, caller_class = b.ray.remote(Server), batch_caller(b.ray)
    callers = [caller_class.remote([server.remote()]) for _ in range(b.cpus)]
    return b.rate(lambda: b.get([caller.call_with_arg.remote(500) for caller in callers]), 500 * b.cpus)


@row("actors", RAYLIKE, Figure("actor start to first reply", "ms"))
def actor_start(b: Backend) -> float:
    server, actors, times = b.ray.remote(Server), [], []
    for _ in range(5):
        began = clock()
        actors.append(server.remote())
        b.get(actors[-1].small_value.remote())
        times.append(clock() - began)
    return 1000 * median(times)


@row("actors", RAYLIKE, Figure("100 actors: start to last first reply", "s"))
def hundred_actors(b: Backend) -> float:
    server, began = b.ray.remote(Server), clock()
    actors = [server.remote() for _ in range(100)]
    b.get([actor.small_value.remote() for actor in actors])
    return clock() - began


@row("placement", RAYLIKE, Figure("placement group create/removal", "groups/s", 765))
def placement_groups(b: Backend) -> float:
    """As in Ray's: groups of one bundle that is ready at once; each waited for, then removed."""
    util = importlib.import_module(f"{b.ray.__name__}.util")

    def make_and_remove_100() -> None:
        groups = []
        for _ in range(100):
            group = util.placement_group([{"CPU": 0.01}])
            b.get(group.ready())
            groups.append(group)
        for group in groups:
            util.remove_placement_group(group)

    return b.rate(make_and_remove_100, 100)


class Tally(Server):
    """An actor with a state, and a way to see in which process it is."""

    def __init__(self) -> None:
        self.calls = 0

    def add(self) -> int:
        self.calls += 1
        return self.calls

    def pid(self) -> int:
        return os.getpid()


@row("recovery", ("minray",), Figure("1:1 exact actor calls async, a checkpoint after every 100", "calls/s"))
def exact_actor_async(b: Backend) -> float:
    tally = b.ray.remote(checkpoint_every=100)(Tally).remote()
    return b.rate(lambda: b.get([tally.add.remote() for _ in range(1000)]), 1000)


@row("recovery", ("minray",), Figure("1:1 exact actor calls async, a checkpoint after each", "calls/s"))
def exact_actor_checkpoints(b: Backend) -> float:
    tally = b.ray.remote(checkpoint_every=1)(Tally).remote()
    return b.rate(lambda: b.get([tally.add.remote() for _ in range(1000)]), 1000)


class Holder:
    """An actor whose state is so many bytes of array."""

    def __init__(self, size_bytes: int) -> None:
        import numpy

        self.array = numpy.ones(size_bytes, numpy.uint8)

    def touch(self) -> None:
        self.array[0] += 1


STATES_MIB = (1, 16, 64)


@row("recovery", ("minray",), *(Figure(f"one call of an exact actor that saves {mib} MiB", "ms") for mib in STATES_MIB))
def checkpoint_sizes(b: Backend) -> tuple[float, ...]:
    took = []
    for mib in STATES_MIB:
        touch = b.ray.remote(checkpoint_every=1)(Holder).remote(mib << 20).touch
        took.append(1000 / b.rate(partial(lambda touch: b.get(touch.remote()), touch)))
    return tuple(took)


LOGS = {"an empty log": 0, "1,000 logged calls": 1000, "10,000 logged calls": 10_000}


@row("recovery", ("minray",), *(Figure(f"actor with {log}: kill -9 to first reply", "ms") for log in LOGS))
def exact_actor_recovery(b: Backend) -> tuple[float, ...]:
    tally_class = b.ray.remote(checkpoint_every=1_000_000)(Tally)
    medians = []
    for num_calls in LOGS.values():
        times = []
        for _ in range(5):
            tally = tally_class.remote()
            b.get([tally.add.remote() for _ in range(num_calls)])
            pid = b.get(tally.pid.remote())
            began = clock()
            os.kill(pid, signal.SIGKILL)
            while b.get(tally.pid.remote()) == pid:
                pass  # The dead one's last words.
            times.append(clock() - began)
            assert b.get(tally.add.remote()) == num_calls + 1
        medians.append(1000 * median(times))
    return tuple(medians)


# --- Rows: the session itself.  These start and stop their backend on their own. ---


@row("session", CALLERS, Figure("import", "ms"))
def import_time(b: Backend) -> float:
    import subprocess

    code = f"from time import perf_counter as c; began = c(); import {b.module}; print(c() - began)"
    runs = [subprocess.run([sys.executable, "-c", code], capture_output=True, check=True) for _ in range(3)]
    return 1000 * median([float(run.stdout.split()[-1]) for run in runs])


@row(
    "session",
    CALLERS,
    Figure("init to first result", "ms"),
    Figure("idle session of 2 workers: PSS of all processes", "MB"),
    Figure("shutdown", "ms"),
)
def session(b: Backend) -> tuple[float, float, float]:
    began = clock()
    b.start(2)
    b.get(b.noop())
    ready = clock()
    b.use_all_workers(2)
    time.sleep(1.0)
    idle_mb = pss_mb(session_pids())
    stopping = clock()
    b.stop()
    return 1000 * (ready - began), idle_mb, 1000 * (clock() - stopping)


@row(
    "session",
    ("minray",),
    Figure("durable job: tasks async", "tasks/s"),
    Figure("durable job: init and get of 10,000 results of an earlier run", "ms"),
)
def durable_job(b: Backend) -> tuple[float, float]:
    import tempfile

    ray, runs = b.ray, []
    with tempfile.TemporaryDirectory(prefix="minray-bench-") as directory:
        for _ in range(2):
            began = clock()
            ray.init(num_cpus=b.cpus, job="bench", storage=os.path.join(directory, "jobs.sqlite"))
            stamp, ready = ray.remote(stamp_now), clock()
            stamps = [ray.get([stamp.remote() for _ in range(1000)]) for _ in range(10)]
            runs.append((clock() - ready, clock() - began, stamps))
            ray.shutdown()
    (working_s, _, first), (_, resumed_s, second) = runs
    assert first == second, "the second run has executed tasks again"
    return 10_000 / working_s, 1000 * resumed_s


@row(
    "endurance",
    CALLERS,
    Figure("1,000,000 tasks", "tasks/s"),
    Figure("1,000,000 tasks: PSS of all processes after the first 100,000", "MB"),
    Figure("1,000,000 tasks: its growth for each 100,000 more", "MB"),
    Figure("1,000,000 tasks: files on disk after the first 100,000", "MB"),
    Figure("1,000,000 tasks: their growth for each 100,000 more", "MB"),
    long=True,
)
def million_tasks(b: Backend) -> tuple[float, ...]:
    get, noop, working_s, samples = b.get, b.noop, 0.0, []
    for _ in range(10):
        began = clock()
        for _ in range(100):
            get([noop() for _ in range(1000)])
        working_s += clock() - began
        time.sleep(1.0)  # What is written behind is written.
        samples.append((pss_mb(session_pids()), tree_mb(home())))
    (memory, disk), (last_memory, last_disk) = samples[0], samples[-1]
    return 1_000_000 / working_s, memory, (last_memory - memory) / 9, disk, (last_disk - disk) / 9


# --- Looking at processes and files ---


def home() -> str:
    """The directory where minray or Ray keep their sessions during this measurement."""
    return os.environ["MINRAY_HOME"]


def session_pids() -> list[int]:
    """This process, its descendants, and daemons that inherited our environment from them."""
    return family({os.getpid()}, home())


def family(first: set[int], directory: str) -> list[int]:
    """These processes, those that a measurement in this directory has started, and all their descendants."""
    parents, mark, marked = {}, b"MINRAY_HOME=" + os.fsencode(directory), set(first)
    for entry in os.listdir("/proc") if os.path.isdir("/proc") else ():
        if entry.isdigit():
            try:
                parents[int(entry)] = int(stat_fields(int(entry))[1])
                with open(f"/proc/{entry}/environ", "rb") as environ:
                    if mark in environ.read().split(b"\0"):
                        marked.add(int(entry))
            except OSError:  # It has ended, or belongs to somebody else.
                continue
    while more := {pid for pid, parent in parents.items() if parent in marked} - marked:
        marked |= more
    return sorted(marked)


def pss_mb(pids: Iterable[int]) -> float:
    """The proportional share of memory of these processes together."""
    total_kb = 0
    for pid in pids:
        try:
            with open(f"/proc/{pid}/smaps_rollup") as rollup:
                total_kb += next(int(line.split()[1]) for line in rollup if line.startswith("Pss:"))
        except (ProcessLookupError, StopIteration):  # It has just ended.
            continue
    return total_kb * 1024 / 1e6


def cpu_time(pid: int) -> float:
    """Seconds of CPU that all threads of a process have used; 0 if it has ended."""
    try:
        fields = stat_fields(pid)
    except OSError:
        return 0.0
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def cpu_times() -> dict[int, float]:
    """CPU seconds of each process of this session."""
    return {pid: cpu_time(pid) for pid in session_pids()}


def used_since(before: dict[int, float], workers: set[int]) -> tuple[float, float, float]:
    """CPU seconds since then: of this process, of the workers, of all others."""
    used = {pid: now - before.get(pid, 0.0) for pid, now in cpu_times().items()}
    driver, by_workers = used.pop(os.getpid()), sum(used[pid] for pid in used if pid in workers)
    return driver, by_workers, sum(used.values()) - by_workers


def stat_fields(pid: int) -> list[bytes]:
    """What /proc/PID/stat says after the process's name, which may hold anything."""
    with open(f"/proc/{pid}/stat", "rb") as stat:
        return stat.read().rpartition(b")")[2].split()


def tree_mb(directory: str) -> float:
    """Size of all files under a directory."""
    paths = [os.path.join(base, name) for base, _, names in os.walk(directory) for name in names]
    return sum(os.lstat(path).st_size for path in paths if os.path.exists(path)) / 1e6


def median(values: Iterable[float]) -> float:
    ordered = sorted(values)  # Not `statistics`: its imports would show up in the memory rows.
    middle = len(ordered) // 2
    return ordered[middle] if len(ordered) % 2 else (ordered[middle - 1] + ordered[middle]) / 2


# --- The measuring child, and the parent that takes turns ---


class Job(NamedTuple):
    """What a child is to measure, and the file where it writes a line of JSON for each row."""

    backend: str
    rows: list[str]
    seconds: float
    cpus: int
    result: str


def measure(text: str) -> None:
    """The child's whole life: start a backend, run rows on it, stop it."""
    job = Job(*json.loads(text))
    backend = BACKENDS[job.backend](job.seconds, job.cpus)
    starts_itself = ROWS[job.rows[0]].group == "session"
    with open(job.result, "w", buffering=1) as result:
        if not starts_itself:
            backend.start(job.cpus)
            backend.use_all_workers(job.cpus)
        for name in job.rows:
            try:
                figures = ROWS[name].work(backend)
                answer: Any = figures if isinstance(figures, tuple) else (figures,)
            except Exception as error:
                answer = f"{type(error).__name__}: {error}".splitlines()[0]
            result.write(json.dumps([name, answer]) + "\n")
        if not starts_itself:
            backend.stop()


def run_child(seconds: float, cpus: int, timeout_s: float, backend: str, rows: list[str]) -> dict[str, Any]:
    """Measure rows of one group in a fresh interpreter: figures for each row, or a sentence why not."""
    import subprocess
    import tempfile

    with tempfile.TemporaryDirectory(prefix="mb-", ignore_cleanup_errors=True) as directory:
        job = Job(backend, rows, seconds, cpus, os.path.join(directory, "result"))
        package = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
        # A module of its own: `import minray.microbenchmark` would bring minray into every backend's child.
        os.symlink(os.path.abspath(__file__), os.path.join(directory, "benchmark_rows.py"))
        environment = {
            **os.environ,
            "MINRAY_HOME": directory,
            "RAY_TMPDIR": directory,
            "RAY_USAGE_STATS_ENABLED": "0",  # A benchmark does not report to anybody.
            "PYTHONPATH": os.pathsep.join(filter(None, [directory, package, os.environ.get("PYTHONPATH")])),
        }
        code = f"from benchmark_rows import measure; measure({json.dumps(job)!r})"
        with open(os.path.join(directory, "log"), "w+b") as log:
            child = subprocess.Popen(
                [sys.executable, "-c", code],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                env=environment,
                start_new_session=True,
            )
            try:
                status = child.wait(timeout_s)
                reason = f"exit status {status}"
            except subprocess.TimeoutExpired:
                reason = f"no answer within {timeout_s:.0f} s"
            finally:
                if child.poll() is not None:
                    end_what_is_left(directory)
                else:
                    started = family({child.pid}, directory)  # Later their descent may not show any more.
                    os.killpg(child.pid, signal.SIGKILL)
                    child.wait()
                    end_what_is_left(directory, started, 1.0)  # Time enough for minray's zygote to tidy up.
            log.seek(0)
            if last := log.read().decode(errors="replace").strip().splitlines()[-1:]:
                reason += f"; it said: {last[0]}"
        answers: dict[str, Any] = dict.fromkeys(rows, reason)
        if os.path.exists(job.result):
            with open(job.result) as lines:
                answers.update(json.loads(line) for line in lines)
        return answers


def end_what_is_left(directory: str, known: Iterable[int] = (), patience_s: float = 10.0) -> None:
    """Wait for the other processes of a measurement; end those that stay: the next one has the machine alone."""
    if sys.platform != "linux":
        return  # Neither /proc nor pidfds: what a backend leaves behind there stays.
    import select

    deadline = clock() + patience_s
    pids = {*known, *family(set(), directory)}
    while pids:
        for pid in pids:
            try:
                process = os.pidfd_open(pid)
            except ProcessLookupError:
                continue
            if not select.select([process], [], [], max(0.0, deadline - clock()))[0]:
                signal.pidfd_send_signal(process, signal.SIGKILL)
                select.select([process], [], [], 1.0)
            os.close(process)
        if clock() > deadline + patience_s:
            return  # Not even SIGKILL ends it.
        pids = set(family(set(), directory))


class Results:
    """All samples, by figure and backend, and the reasons of failures."""

    def __init__(self, backends: Sequence[str]) -> None:
        self.backends = list(backends)
        self.samples: dict[tuple[str, str], list[float]] = {}
        self.failures: dict[tuple[str, str], str] = {}

    def add(self, backend: str, answers: dict[str, Any]) -> None:
        for name, answer in answers.items():
            for index, figure in enumerate(ROWS[name].figures):
                if isinstance(answer, str):
                    self.failures[figure.name, backend] = answer
                else:
                    self.samples.setdefault((figure.name, backend), []).append(answer[index])

    def median(self, figure: Figure, backend: str) -> float | None:
        samples = self.samples.get((figure.name, backend))
        return median(samples) if samples else None

    def factor(self, figure: Figure, other: float | None) -> float | None:
        """How many times as good as `other` minray is."""
        ours = self.median(figure, "minray")
        if ours is None or other is None or min(ours, other) <= 0:
            return None
        return ours / other if figure.more_is_better else other / ours

    def as_json(self, names: Iterable[str]) -> list[dict[str, Any]]:
        return [
            {
                "name": figure.name,
                "unit": figure.unit,
                "more_is_better": figure.more_is_better,
                "published_by_ray": figure.published,
                "backends": {
                    backend: {
                        "median": self.median(figure, backend),
                        "samples": self.samples.get((figure.name, backend), []),
                        "minray_is_better_by": self.factor(figure, self.median(figure, backend)),
                        "failure": self.failures.get((figure.name, backend)),
                    }
                    for backend in self.backends
                    if backend in ROWS[name].on
                },
            }
            for name in names
            for figure in ROWS[name].figures
        ]

    def table(self, names: Iterable[str]) -> str:
        """The medians as text, a column for each backend, and the reasons of what failed."""
        lines = [["", "", *self.backends, "Ray publishes"]]
        for name in names:
            for figure in ROWS[name].figures:
                line = [figure.name, figure.unit]
                for backend in self.backends:
                    value = self.median(figure, backend)
                    if (figure.name, backend) in self.failures:
                        line.append("failed")
                    else:
                        line.append(number(value) + self._factor_text(figure, value, backend != "minray"))
                published = figure.published
                lines.append([*line, number(published) + self._factor_text(figure, published, True)])
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        aligns = "<<" + ">" * (len(widths) - 2)
        text = [
            "  ".join(
                f"{cell:{align}{width}}" for cell, align, width in zip(line, aligns, widths, strict=True)
            )
            for line in lines
        ]
        failed: dict[tuple[str, str], list[str]] = {}
        for (name, backend), why in self.failures.items():
            failed.setdefault((backend, why), []).append(name)
        text += [f"failed on {backend}: {', '.join(rows)}: {why}" for (backend, why), rows in failed.items()]
        return "\n".join(line.rstrip() for line in text)

    def _factor_text(self, figure: Figure, value: float | None, wanted: bool) -> str:
        factor = self.factor(figure, value) if wanted else None
        return "" if factor is None else f" ({factor:.{0 if factor >= 10 else 1 if factor >= 1 else 2}f}x)"

    def plot(self, names: Iterable[str], path: str) -> None:
        """Bars of how many times as good minray is, on a logarithmic axis; ImportError without matplotlib."""
        importlib.import_module("matplotlib").use("Agg")
        pyplot: Any = importlib.import_module("matplotlib.pyplot")
        figures = [figure for name in names for figure in ROWS[name].figures]
        others = [name for name in self.backends if name != "minray"]
        bars: dict[str, list[float | None]] = {
            other: [self.factor(figure, self.median(figure, other)) for figure in figures] for other in others
        }
        bars["what Ray publishes (64 cores)"] = [self.factor(figure, figure.published) for figure in figures]
        bars = {label: values for label, values in bars.items() if any(values)}
        shown = [index for index in range(len(figures)) if any(values[index] for values in bars.values())]
        canvas, axes = pyplot.subplots(figsize=(10, 1.5 + 0.4 * len(shown)), layout="constrained")
        height = 0.8 / max(1, len(bars))
        for nth, (label, values) in enumerate(bars.items()):
            drawn = [(at, value) for at, index in enumerate(shown) if (value := values[index])]
            tops, widths = [at + nth * height for at, _ in drawn], [value - 1 for _, value in drawn]
            axes.barh(tops, widths, height, left=1, label=f"compared with {label}")
        axes.set_xscale("log")
        axes.axvline(1, color="black", linewidth=0.8)
        axes.set_yticks([at + 0.4 - height / 2 for at in range(len(shown))], [figures[i].name for i in shown])
        axes.invert_yaxis()
        axes.set_xlabel("minray is this many times as good")
        if bars:
            axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=2)  # Above the bars, not on them.
        canvas.savefig(path, dpi=150)
        pyplot.close(canvas)


def number(value: float | None) -> str:
    """Three significant digits or whole numbers; "-" for none."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def take_turns(
    results: Results, names: list[str], rounds: int, measured: Callable[[str, list[str]], dict[str, Any]]
) -> None:
    """Round by round and group by group, each backend in turn; a different one begins each round."""
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(ROWS[name].group, []).append(name)
    for turn in range(rounds):
        for group, members in groups.items():
            for nth in range(len(results.backends)):
                backend = results.backends[(turn + nth) % len(results.backends)]
                rows = [name for name in members if backend in ROWS[name].on]
                if rows and not (turn and ROWS[rows[0]].long):  # The long ones once.
                    note(f"round {turn + 1} of {rounds}: {group} on {backend}")
                    results.add(backend, measured(backend, rows))


def describe_machine(cpus: int) -> dict[str, Any]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    from minray import __version__, machine

    try:
        ray_version = version("ray")
    except PackageNotFoundError:
        ray_version = None
    return {
        "cpus": cpus,
        "memory_gb": round(machine.total_memory_bytes() / 1e9, 1),
        "system": platform.platform(),
        "python": platform.python_version(),
        "minray": __version__,
        "ray": ray_version,
        "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "load_before": round(os.getloadavg()[0], 2),  # Much above zero: the figures are somebody else's, too.
    }


def select(patterns: Sequence[str], long: bool) -> list[str]:
    """The rows of which a figure's name matches a pattern, a glob or a part of it; without patterns, all."""
    if not patterns:
        return [name for name, entry in ROWS.items() if long or not entry.long]
    globs = [pattern.lower() for pattern in patterns]
    globs += [f"*{glob}*" for glob in globs]
    return [
        name
        for name, entry in ROWS.items()
        if any(fnmatch.fnmatchcase(figure.name.lower(), glob) for figure in entry.figures for glob in globs)
    ]


def main(argv: list[str]) -> int:
    """Run the benchmark.  Returns 0, or 1 if a row failed, or 2 if there is nothing to run."""
    import argparse

    from minray import machine

    parser = argparse.ArgumentParser(prog="minray microbenchmark", description=__doc__.split("\n\n")[0])
    add = parser.add_argument
    add("--rows", action="append", default=[], metavar="PATTERN", help="only rows that match (repeatable)")
    add("--backends", metavar="NAMES", help=f"comma-separated, of: {', '.join(BACKENDS)}")
    add("--rounds", type=int, metavar="N", help="turns of each backend (default: 5)")
    add("--seconds", type=float, metavar="S", help="time for one rate (default: 0.5)")
    add("--cpus", type=int, metavar="N", default=machine.cpu_count(), help="workers (default: one a CPU)")
    add("--timeout", type=float, metavar="S", default=900.0, help="for a group of rows (default: 900)")
    add("--quick", action="store_true", help="one round of 0.1 s each: a look, not a measurement")
    add("--long", action="store_true", help="the rows that take minutes, too")
    add("--list", action="store_true", help="list rows and their backends, run nothing")
    add("--json", metavar="FILE", help="write all samples as JSON (-: to standard output)")
    add("--plot", metavar="FILE.png", help="draw the factors")
    options = parser.parse_args(argv)

    names = select(options.rows, options.long)
    if not names:
        patterns = " or ".join(options.rows)
        print(f"No row matches {patterns}. All rows: minray microbenchmark --list", file=sys.stderr)
        return 2
    if options.list:
        for name in names:
            for figure in ROWS[name].figures:
                long = ", long" if ROWS[name].long else ""
                print(f"{figure.name} [{figure.unit}] on {', '.join(ROWS[name].on)}{long}")
        return 0
    chosen = options.backends.split(",") if options.backends else list(BACKENDS)
    if unknown := [name for name in chosen if name not in BACKENDS]:
        parser.error(f"unknown backend {', '.join(unknown)}; there are: {', '.join(BACKENDS)}")
    if options.plot and importlib.util.find_spec("matplotlib") is None:
        parser.error("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if not options.backends and importlib.util.find_spec("ray") is None:
        chosen.remove("ray")
    chosen = [backend for backend in chosen if any(backend in ROWS[name].on for name in names)]
    names = [name for name in names if not set(chosen).isdisjoint(ROWS[name].on)]
    rounds = options.rounds or (1 if options.quick else 5)
    seconds = options.seconds or (0.1 if options.quick else 0.5)

    facts = describe_machine(options.cpus)
    results, status = Results(chosen), 0
    # SIGTERM is as Ctrl-C: what runs is ended, and the samples so far are shown.
    on_terminate = signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        take_turns(results, names, rounds, partial(run_child, seconds, options.cpus, options.timeout))
    except KeyboardInterrupt:
        status = 130
    finally:
        signal.signal(signal.SIGTERM, on_terminate)
    note("")
    if status:
        print("Interrupted: these are the samples so far.", file=sys.stderr)

    report = json.dumps(
        {"machine": facts, "rounds": rounds, "seconds": seconds, "rows": results.as_json(names)}, indent=1
    )
    if options.json == "-":
        print(report)
    else:
        print(", ".join(f"{key} {value}" for key, value in facts.items() if value is not None))
        print(f"medians of {rounds} rounds of {seconds} s; (2.0x): minray is twice as good\n")
        print(results.table(names))
        if options.json:
            with open(options.json, "w") as file:
                file.write(report + "\n")
    if options.plot:
        results.plot(names, options.plot)
    return status or int(bool(results.failures))


def note(text: str) -> None:
    """One line on a terminal that is rewritten; nothing where nobody watches."""
    if sys.stderr.isatty():
        print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
