"""The public functions: init, remote, get, wait, put, cancel, kill, shutdown and their kin.

Thin: each checks what it is given, and calls the `CoreWorker` of this process.  Owns the
one global of the library, `_core`: which session this process is part of.
"""

from __future__ import annotations

import atexit
import errno
import os
import sys
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, overload

from minray import exceptions, options
from minray.core_worker import CoreWorker
from minray.generator import ObjectRefGenerator
from minray.interrupts import raise_deferred
from minray.object_ref import ObjectRef

if TYPE_CHECKING:
    from minray.actor import ActorClass, ActorHandle
    from minray.job_config import JobConfig
    from minray.policy import Policy
    from minray.remote_function import RemoteFunction

_core: CoreWorker | None = None
_init_lock = threading.RLock()


def core() -> CoreWorker:
    """This process's part of the session; starts one if there is none."""
    if _core is None:
        _address(None)
        _start({})
        assert _core is not None
    return _core


_core_of_this_process = core


def set_core(new: CoreWorker | None) -> None:
    global _core
    _core = new


def set_core_lookup(lookup: Callable[[], CoreWorker] | None) -> None:
    """In local mode (local.py) each thread has its own part of the session; None: the process has one."""
    global core
    core = lookup or _core_of_this_process


class Context(Mapping[str, Any]):
    """What `init` returns: a mapping with what there is to know, and a context manager that ends the session."""

    dashboard_url = None
    """There is no dashboard."""

    def __init__(self, facts: dict[str, Any]) -> None:
        self.address_info = facts

    @property
    def python_version(self) -> str:
        return sys.version.split()[0]

    @property
    def ray_version(self) -> str:
        """The version of Ray whose documentation minray follows."""
        from minray.as_ray import VERSION

        return VERSION

    @property
    def ray_commit(self) -> str:
        from minray import __version__

        return f"minray {__version__}"

    def __getitem__(self, key: str) -> Any:
        return self.address_info[key]

    def __iter__(self) -> Iterator[str]:
        return iter(self.address_info)

    def __len__(self) -> int:
        return len(self.address_info)

    def __enter__(self) -> Context:
        return self

    def __exit__(self, *exc: Any) -> None:
        shutdown()

    def disconnect(self) -> None:
        shutdown()

    def __repr__(self) -> str:
        return f"minray.Context({self.address_info})"


LEAST_STORE_BYTES = 1 << 20
"""Less shared memory than this is hardly meant."""

_ACCEPTED = {
    "include_dashboard": "there is no dashboard: see `minray status`, `minray tasks`, minray.state",
    "dashboard_host": "there is no dashboard",
    "dashboard_port": "there is no dashboard",
    "configure_logging": "minray sets up no logging",
    "logging_level": "minray sets up no logging",
    "logging_format": "minray sets up no logging",
    "logging_config": "minray sets up no logging",
    "_system_config": "it names internals of Ray",
    "_redis_password": "there is no Redis",
    "_node_ip_address": "nothing listens on one machine",
    "_enable_object_reconstruction": "it names internals of Ray",
}
"""Options of Ray that a program may give and that have nothing to act on here; who asks for something is told."""
_OWN = (
    "address", "num_cpus", "num_gpus", "resources", "object_store_memory", "namespace", "log_to_driver",
    "ignore_reinit_error", "history", "policy", "job", "storage", "runtime_env",
    "job_config", "labels", "local_mode", "_memory", "_temp_dir",
)  # fmt: skip
_NODE_RESOURCES = {"ray": {"node:127.0.0.1": 1.0, "node:__internal_head__": 1.0}}
"""By these programs that were written for Ray bind a task to a node; under `minray.as_ray` they are there."""


def init(
    address: str | None = None,
    *,
    num_cpus: float | None = None,
    num_gpus: float | None = None,
    resources: Mapping[str, float] | None = None,
    object_store_memory: int | None = None,
    namespace: str | None = None,
    log_to_driver: bool = True,
    ignore_reinit_error: bool = False,
    history: int = 100_000,
    policy: Policy | None = None,
    job: str | None = None,
    storage: str | os.PathLike[str] | None = None,
    runtime_env: Mapping[str, Any] | None = None,
    job_config: JobConfig | Mapping[str, Any] | None = None,
    labels: Mapping[str, str] | None = None,
    local_mode: bool = False,
    **more: Any,
) -> Context:
    """Start a session: this process becomes its driver.

    Needed only to say something about it; the first call of anything else starts one as well.

    Args:
        address: None or "local" start a session; the address of a `minray.cluster_utils.Cluster`, or "auto" for the
            newest, starts it with the Cluster's resources; anything else is a ConnectionError.
        num_cpus: CPUs to schedule on; default: what affinity and cgroups allow this process.
        num_gpus: GPUs to schedule on (they need not exist); default: those in CUDA_VISIBLE_DEVICES, else 0.
        resources: amounts of resources of your own, by name.
        object_store_memory: bytes of shared memory; default: 30 % of the machine's memory.
        namespace: where names of actors are looked up; default: one of this session alone.
        log_to_driver: show what workers print.
        ignore_reinit_error: return the running session instead of raising when there is one.
        history: how many finished tasks the GCS file keeps.
        policy: a `minray.policy.Policy` with the scheduler's choices.
        job: the name of a durable job: what a run of it has finished, later runs return without running it again.
        storage: the file that keeps a durable job's results; default: one for each job, where sessions are kept.
        runtime_env: what tasks and actors run in (environment variables, directories, packages), see
            `minray.runtime_env.RuntimeEnv`.
        job_config: a `minray.job_config.JobConfig`; options that are given here count more.
        _temp_dir: where this session's directory is made, instead of $MINRAY_HOME.
        labels: of this node, for label_selector= and NodeLabelSchedulingStrategy.
        local_mode: everything in this process, one thing at a time: for unit tests and debuggers (see the guide).
        more: options of Ray that have nothing to act on here are accepted (include_dashboard, logging_level, …).

    Returns:
        A mapping with "address", "node_id", "session_dir", "node_ip_address"; also a context manager that calls
        `shutdown`.

    Raises:
        RuntimeError: there is a session already, or this is a worker, or another driver runs this job.
        ValueError, OSError: the storage cannot be used, and why.
        TypeError: an option of another name, with the nearest one.
        RuntimeEnvSetupError: packages of the runtime_env could not be installed; no session is left.

    >>> with minray.init(num_cpus=2):
    ...     minray.cluster_resources()["CPU"]
    2.0
    """
    _check_init_options(more)
    cluster = None
    if _core is not None and not _core.client and address not in (None, "local", "auto"):
        from minray import cluster_utils

        cluster_utils.find(address)  # Raises ConnectionError: the session that runs is not there.
    elif _core is None and (address := _address(address)) not in (None, "local"):
        from minray import cluster_utils

        cluster = cluster_utils.find(address)
        if (num_cpus, num_gpus, resources, object_store_memory) != (None,) * 4:
            raise ValueError(
                f"init(address={address!r}): the nodes of a Cluster say what they have. Leave out num_cpus, num_gpus, "
                "resources and object_store_memory here, and give them to add_node()."
            )
    _check_kinds(namespace, log_to_driver, policy)
    _check_labels(labels)
    if job is None and storage is not None:
        raise ValueError("init(storage=...) keeps the results of a durable job, so it needs init(job=...): its name.")
    if local_mode and job is not None:
        raise ValueError("init(local_mode=True, job=...): a session in one process keeps no job's results.")
    given = {
        "num_cpus": num_cpus, "num_gpus": num_gpus, "resources": resources, "object_store_memory": object_store_memory,
        "namespace": namespace, "log_to_driver": log_to_driver, "history": history, "policy": policy,
        "memory": more.get("_memory"), "job": (job, storage) if job is not None else None,
        "root": _root(more.get("_temp_dir")),
        "labels": labels,
        "local_mode": local_mode,
        **(cluster.options() if cluster is not None else {}),
    }  # fmt: skip
    _add_job(given, runtime_env, job_config)
    with _init_lock:
        if _core is not None:
            if not ignore_reinit_error:
                where = "this is a worker of a session" if core().client else "a session is running in this process"
                raise RuntimeError(
                    f"minray.init() was called, but {where} already. It was not changed. Call minray.shutdown() first "
                    "(in the driver), leave init() out, or pass ignore_reinit_error=True to go on with that session."
                )
            running = getattr(_core, "job", None)
            if job is not None and (running is None or running.name != job):
                raise RuntimeError(
                    f"minray.init(job={job!r}) was called, but the session that is running is not of that job. It was "
                    "not changed. Call minray.shutdown() first."
                )
            return _context(_core)
        context = _start(given, announce=True)
        if cluster is not None:
            cluster.connected = True
        return context


def _address(given: Any) -> str | None:
    """Where Ray would connect to: it looks into RAY_ADDRESS, too, which means nothing to a program of minray's own.

    Not asked while a session is running: init(address="auto", ignore_reinit_error=True) in a task is that session."""
    if given is not None and not isinstance(given, str):
        raise ValueError(f"init(address=...) must be a string, got {given!r}.")
    if given is None and exceptions.name_prefix == "ray":
        given = os.environ.get("RAY_ADDRESS") or None
        if given is not None and given != "local":
            raise ConnectionError(
                f"RAY_ADDRESS={given} asks for a cluster, and minray has none to connect to. Unset it, or say "
                'ray.init(address="local"), to start a session here.'
            )
    return given or None


def _check_init_options(more: Mapping[str, Any]) -> None:
    for name, value in more.items():
        if name in _ACCEPTED:
            if value and name in ("include_dashboard", "_system_config"):
                print(f"minray: init({name}=...) has no effect: {_ACCEPTED[name]}.", file=sys.stderr)
        elif name not in _OWN:
            known = dict.fromkeys((*_OWN, *_ACCEPTED))
            raise TypeError(f"init() has no option {name!r}.{options.nearest(name, known)}")


def _start(given: Mapping[str, Any], announce: bool = False) -> Context:
    global _core
    from minray import __version__, machine
    from minray.driver import Driver

    with _init_lock:
        if _core is None:
            if given.get("local_mode"):
                from minray.local import start

                _core = start(given, _resources, _store_bytes(given))
                return _context(_core)
            memory = given.get("memory") or machine.total_memory_bytes() * 7 // 10
            try:
                _core = Driver(  # If Ctrl-C was pressed meanwhile, that is felt below: there is a session by then.
                    resources={**_resources(given, memory), **_NODE_RESOURCES.get(exceptions.name_prefix, {})},
                    object_store_memory=_store_bytes(given),
                    namespace=given.get("namespace") or f"anonymous-{os.urandom(4).hex()}",
                    log_to_driver=given.get("log_to_driver", True),
                    history=_amount(given, "history", 100_000, whole=True),
                    policy=given.get("policy"),
                    version=__version__,
                    warn=lambda text: print(f"minray: {text}", file=sys.stderr),
                    job=given.get("job"),
                    root=given.get("root"),
                    default_lifetime=given.get("default_lifetime"),
                    search_path=given.get("search_path", ()),
                    labels=given.get("labels"),
                )
            except OSError as error:
                if error.errno != errno.ENOSPC:
                    raise
                raise exceptions.OutOfDiskError(
                    f"init() found no room for a session: {error}. Nothing was started. Make room there, or have "
                    "sessions elsewhere: MINRAY_HOME=/path/of/a/directory."
                ) from error
            if given.get("runtime_env"):
                _enter(_core, given["runtime_env"])
            raise_deferred()
            if announce and sys.stderr is not None and sys.stderr.isatty():
                cpus = _core.node.describe("resources").get("CPU", 0)
                print(
                    f"minray {__version__}: {cpus:g} CPUs, {_core.arena.capacity / 1e9:.1f} GB object store, "
                    f"session {_core.session.name} (see it with: minray status)",
                    file=sys.stderr,
                )
        return _context(_core)


def _root(temp_dir: Any) -> str | None:
    if temp_dir is None:
        return None
    if not isinstance(temp_dir, (str, os.PathLike)) or not os.fspath(temp_dir):
        raise ValueError(f"init(_temp_dir=...) must be the path of a directory, got {temp_dir!r}.")
    return os.fspath(temp_dir)


def _add_job(given: dict[str, Any], runtime_env: Any, job_config: Any) -> None:
    """What the job says of its environment, where init() itself does not."""
    if runtime_env is not None:
        from minray.runtime_env import checked

        given["runtime_env"] = checked(runtime_env, "init")
    if job_config is None:
        return
    from minray.job_config import JobConfig

    if isinstance(job_config, Mapping):
        job_config = JobConfig.from_json(job_config)
    if not isinstance(job_config, JobConfig):
        raise TypeError(f"init(job_config=...) must be a minray.job_config.JobConfig, got {job_config!r}.")
    if runtime_env is None:
        given["runtime_env"] = job_config.runtime_env
    if given["namespace"] is None:
        given["namespace"] = job_config.ray_namespace
    given["default_lifetime"] = job_config.default_actor_lifetime
    given["search_path"] = job_config.search_path


def _enter(core: CoreWorker, runtime_env: Mapping[str, Any]) -> None:
    """The job's environment is what all of its tasks inherit.  Its packages are installed now, while somebody waits."""
    import json

    from minray.worker_environment import install_packages

    try:
        core.runtime_env = core.environment_of(runtime_env)
        env = json.loads(core.runtime_env or "{}")
        if env.get("config", {}).get("eager_install", True):
            installed = install_packages(env, core.session_path)
            if installed is not None:
                os.close(installed[1])
    except BaseException:
        shutdown()
        raise


def _resources(given: Mapping[str, Any], memory: int) -> dict[str, float]:
    from minray import machine

    own = dict(given.get("resources") or {})
    for name, amount in own.items():
        if name in ("CPU", "GPU", "memory") or not isinstance(amount, (int, float)) or amount < 0:
            raise ValueError(
                f"init(resources={{{name!r}: {amount!r}}}): CPU, GPU and memory have options of their own "
                "(num_cpus, num_gpus, _memory); amounts are numbers, 0 or more."
            )
    cpus = _amount(given, "num_cpus", None)
    resources: dict[str, float] = {"CPU": machine.cpu_count() if cpus is None else cpus}
    gpus = _amount(given, "num_gpus", None, whole=True)
    if gpus is None:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "")
        gpus = len([gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"])
    if gpus:
        resources["GPU"] = gpus
    resources["memory"] = memory
    return {**resources, **own}


def _amount(given: Mapping[str, Any], name: str, default: Any, whole: bool = False) -> Any:
    value = given.get(name)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < float("inf"):
        raise ValueError(f"init({name}=...) must be a number, 0 or more, got {value!r}.")
    if whole and value != int(value):
        raise ValueError(f"init({name}=...) must be a whole number, got {value!r}.")
    return int(value) if whole else value


def _check_kinds(namespace: Any, log_to_driver: Any, policy: Any) -> None:
    from minray.policy import Policy

    if namespace is not None and (not isinstance(namespace, str) or not namespace):
        raise ValueError(f"init(namespace=...) must be a string that is not empty, got {namespace!r}.")
    if not isinstance(log_to_driver, bool):
        raise ValueError(f"init(log_to_driver=...) must be True or False, got {log_to_driver!r}.")
    if policy is not None and not isinstance(policy, Policy):
        raise ValueError(f"init(policy=...) must be a minray.policy.Policy, got {policy!r}.")


def _check_labels(labels: Any) -> None:
    if labels is None:
        return
    if not isinstance(labels, Mapping):
        raise ValueError(f"init(labels=...) must be a dict of names and values, got {labels!r}.")
    for name, value in labels.items():
        if not isinstance(name, str) or not isinstance(value, str) or not name:
            raise ValueError(f"init(labels={{{name!r}: {value!r}}}): names and values of labels are strings.")
        if name.startswith("ray.io/"):
            raise ValueError(f"init(labels={{{name!r}: ...}}): labels that begin with ray.io/ are minray's own.")


def _store_bytes(given: Mapping[str, Any]) -> int | None:
    amount: int | None = _amount(given, "object_store_memory", None, whole=True)
    if amount is not None and amount < LEAST_STORE_BYTES:
        raise ValueError(f"init(object_store_memory=...) must be at least {LEAST_STORE_BYTES:,} bytes, got {amount:,}.")
    return amount


def _context(core: CoreWorker) -> Context:
    path = core.config["session"] if core.client else core.session.path  # type: ignore[attr-defined]
    facts = {"address": "local", "node_id": core.node_id.hex(), "session_dir": path, "node_ip_address": "127.0.0.1"}
    return Context(facts)


def add_resources(resources: dict[str, float]) -> None:
    """The node has so much more from now on (a Cluster's add_node); in the driver."""
    core().add_resources(resources)  # type: ignore[attr-defined]


def is_initialized() -> bool:
    """Whether this process is part of a session."""
    return _core is not None


def shutdown() -> None:
    """End the session: every process, all shared memory.  Without one it does nothing.

    Arrays that came from `get` stay readable.  The history stays on disk (`minray tasks`).
    """
    global _core
    with _init_lock:
        if _core is None or core().client:
            return
        ending, _core = _core, None
        ending.close()  # type: ignore[attr-defined]
        raise_deferred()


atexit.register(shutdown)


def _forget_in_child() -> None:
    """A process that the driver forks is not part of the session; it may start its own."""
    global _core, _init_lock
    if _core is not None and not _core.client:
        _forgotten.append(_core)  # Its finalizers would close what belongs to the parent.
        _core.forget()  # type: ignore[attr-defined]
        _core = None
    _init_lock = threading.RLock()


_forgotten: list[CoreWorker] = []
os.register_at_fork(after_in_child=_forget_in_child)


@overload
def remote(target: type, /) -> ActorClass: ...  # type: ignore[overload-overlap]  # a class is callable, too
@overload
def remote(target: Callable[..., Any], /) -> RemoteFunction[Any]: ...
@overload
def remote(**given: Any) -> Callable[[Any], Any]: ...


def remote(*args: Any, **given: Any) -> Any:
    """Make a function's calls tasks, or a class's instances actors.

    Options of tasks: num_cpus (default 1), num_gpus, memory, resources, num_returns, name, max_retries (3),
    retry_exceptions (False), max_calls.  Of actors: num_cpus (default 0), num_gpus, memory, resources,
    name, namespace, get_if_exists, lifetime, max_concurrency, concurrency_groups, max_restarts, max_task_retries,
    max_pending_calls.  Of both: runtime_env, scheduling_strategy, placement_group, label_selector,
    fallback_strategy, accelerator_type.

    >>> @minray.remote(num_cpus=0.5, max_retries=0)
    ... def half(x):
    ...     return x / 2
    >>> minray.get(half.remote(3))
    1.5
    """
    if len(args) == 1 and not given and callable(args[0]):
        return _make_remote(args[0], {})
    if args or not given:
        raise TypeError("remote is used as @minray.remote, or with options by name as @minray.remote(num_cpus=2).")
    return lambda target: _make_remote(target, given)


def _make_remote(target: Any, given: dict[str, Any]) -> Any:
    from minray.actor import ActorClass
    from minray.remote_function import RemoteFunction

    if isinstance(target, type):
        return ActorClass(target, options.check(given, options.ACTOR, "remote"))
    if isinstance(getattr(target, "__origin__", None), type):  # A[int]: callable, and makes an A.
        raise TypeError(f"@minray.remote goes on the class itself, {target.__origin__.__name__}, not on {target!r}.")
    if not callable(target):
        raise TypeError(f"@minray.remote goes on a function or a class, got {target!r}.")
    if isinstance(target, (RemoteFunction, ActorClass)):
        name = target.__name__  # type: ignore[union-attr]
        raise TypeError(f"{name} is remote already; to change its options: {name}.options(...)")
    return RemoteFunction(target, options.check(given, options.TASK, "remote"))


def get(refs: Any, *, timeout: float | None = None) -> Any:
    """The value of an ObjectRef, or the list of values of a list of them; waits until they are ready.

    Arrays are read-only views into shared memory.

    Args:
        refs: one ObjectRef or a list of them.
        timeout: seconds to wait at most; None: without end.

    Raises:
        GetTimeoutError: not all were ready in time (it is a TimeoutError, too).
        RayTaskError: the task raised; the error is an instance of the class of what it raised, too.
        RayError: another of `minray.exceptions`: the worker crashed, the actor is dead, …

    >>> minray.get([minray.put(1), minray.put(2)])
    [1, 2]
    """
    return core().get(refs, timeout)


def put(value: Any, *, _owner: Any = None) -> ObjectRef[Any]:
    """Store a value; tasks that get the ref as an argument share it without copies.

    _owner (Ray: an actor, with which the value would be lost) has no effect: values are the session's.
    """
    return core().put(value)


def wait(
    refs: Sequence[Any], *, num_returns: int = 1, timeout: float | None = None, fetch_local: bool = True
) -> tuple[list[Any], list[Any]]:
    """Wait until `num_returns` of the refs are ready, or `timeout` seconds are over.

    Returns:
        (ready, not ready), each in the order given; `ready` has at most `num_returns`.

    An `ObjectRefGenerator` among them is ready when its next item is there, or when it has come to its end.
    fetch_local has no effect on one machine.

    Raises:
        TypeError: no list of refs.
        ValueError: a ref came twice, or there are not so many; a timeout below 0.

    >>> ready, rest = minray.wait([minray.put(1), minray.put(2)])
    >>> len(ready), len(rest)
    (1, 1)
    """
    if timeout is not None and timeout < 0:
        raise ValueError(f"wait(timeout=...) must be a number of seconds, 0 or more, got {timeout!r}.")
    return core().wait(refs, num_returns, timeout)


def cancel(ref: ObjectRef[Any] | ObjectRefGenerator, *, force: bool = False, recursive: bool = True) -> None:
    """Cancel a task: getting its result raises TaskCancelledError, unless it has finished.

    A task or call that has not started will not.  In a task that runs KeyboardInterrupt is raised, in a coroutine
    method of an actor asyncio.CancelledError, where it awaits.  Other methods that run go on: they may ask
    ``get_runtime_context().is_canceled()``.

    Args:
        ref: what the task returned.
        force: kill the worker of a task that runs; getting its result then raises an error that is a
            WorkerCrashedError, too.
        recursive: cancel what the task has submitted as well (calls of actors never by force).

    Raises:
        ValueError: force=True for a call of an actor: it would end the actor.
        TypeError: `ref` is no ObjectRef.
    """
    if isinstance(ref, ObjectRefGenerator):
        ref = ref.completed()
    if type(ref) is not ObjectRef:
        raise TypeError(
            f"cancel() takes the ObjectRef or ObjectRefGenerator that a task returned, got {ref!r}. "
            "To end an actor: minray.kill()"
        )
    core().cancel(ref, force, recursive)


def kill(actor: ActorHandle, *, no_restart: bool = True) -> None:
    """End an actor at once, as if its process had crashed; calls that are not done fail with ActorDiedError."""
    from minray.actor import ActorHandle

    if not isinstance(actor, ActorHandle):
        raise ValueError(f"kill() takes an actor's handle, got {actor!r}. To end a task: minray.cancel(ref)")
    core().kill_actor(actor._minray_id, no_restart)


def cluster_resources() -> dict[str, float]:
    """The resources of all nodes: {"CPU": 2.0, …}."""
    result: dict[str, float] = _query("resources")
    return result


def available_resources() -> dict[str, float]:
    """The resources that no task or actor holds now."""
    result: dict[str, float] = _query("available")
    return {name: amount for name, amount in result.items() if amount}


def nodes() -> list[dict[str, Any]]:
    """The nodes of the session, in Ray's words: NodeID, Alive, Resources, …"""
    import socket

    return [
        {
            "NodeID": core().node_id.hex(),
            "Alive": True,
            "alive": True,
            "NodeName": "127.0.0.1",
            "NodeManagerHostname": socket.gethostname(),
            "NodeManagerAddress": "127.0.0.1",
            "Resources": _query("resources"),
            "Labels": _query("labels"),
        }
    ]


def _query(what: str) -> Any:
    from minray.messages import NodeQueried

    current = core()
    return current.ask(lambda rid: NodeQueried(current.client, rid, what))


def flush_records(timeout: float = 30.0) -> str | None:
    """Wait until the GCS has written what the node knows; the path of its file, None without a session."""
    if _core is None:
        return None
    if _core.client:  # A worker: the file is being written by the driver's GCS.
        return os.path.join(_core.config["session"], "gcs.sqlite")  # type: ignore[attr-defined]
    return _core.flush_records(timeout)  # type: ignore[attr-defined, no-any-return]
