"""What the driver and every worker can do alike: submit, put, get, wait.

The public API calls these methods.  A `CoreWorker` turns values into bytes and back,
makes IDs, counts references, and speaks with the node in the words of messages.py.
How an event reaches the node is the subclass's: the driver has the node in its own
process (driver.py), a worker has a socket (worker.py).
"""

from __future__ import annotations

import concurrent.futures
import errno
import hashlib
import inspect
import itertools
import pickle
import threading
import weakref
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from operator import countOf
from time import monotonic
from typing import TYPE_CHECKING, Any, NoReturn

import cloudpickle

from minray import exceptions, ids, object_ref, object_store
from minray.interrupts import uninterruptible
from minray.generator import ObjectRefGenerator
from minray.loop import Loop, Waiter
from minray.messages import (
    ActorKillRequested, BlockRefused, BlockRequested, BlocksSpilled, CancelRequested, Event, FunctionExported,
    ObjectLost, ObjectPut, ObjectsAwaited, RequestAbandoned, RoomAbandoned, TemplateDefined, Value,
)  # fmt: skip
from minray.object_ref import ObjectRef, new_ref
from minray.reference_counter import ReferenceCounter, References
from minray.serialization import INLINE_LIMIT, Serialized, deserialize, flat_chunks, serialize, to_bytes, write_flat
from minray.task_spec import ActorOptions, Placement, TaskOptions, TaskSpec

if TYPE_CHECKING:
    import asyncio

    from minray.code_digest import Digester

REQUEST_TIMEOUT_S = 60.0
"""For answers that depend on no task; the node is down if they take longer."""


_first = threading.Lock()  # Two threads of a task that begin to count at once must not both begin at 1.


class TaskContext:
    """The task that a thread executes: who its children are."""

    __slots__ = ("task_id", "options", "mark", "numbers")

    def __init__(self, task_id: bytes, options: TaskOptions | None, mark: int = 0) -> None:
        self.task_id = task_id
        self.options = options
        self.mark = mark  # as RunTasks has it: below 0, so many attempts have raised before this one
        self.numbers: tuple[bytes, bytes, Any, Any, bytes] = (b"", b"", None, None, b"")  # whose, of children and puts

    def next_task_id(self) -> bytes:
        numbers = self.numbers
        if numbers[0] is not self.task_id:
            numbers = self._new_numbers()
        return ids.pack_id(numbers[1], next(numbers[2]), 0)

    def next_put_id(self) -> bytes:
        numbers = self.numbers
        if numbers[0] is not self.task_id:
            numbers = self._new_numbers()
        return ids.put_id(numbers[4], next(numbers[3]))

    def _new_numbers(self) -> tuple[bytes, bytes, Any, Any, bytes]:
        """The first child or put of an execution.

        After a crash, or to rebuild what was lost, an execution numbers as the one before did, and finds what that has
        made.  After an exception it does not: what that has made may be why it was raised.

        An execution has an ID object of its own, so nobody has to reset anything when the next task begins, while a
        thread that the last one has left behind may be numbering its children."""
        with _first:
            task_id = self.task_id
            if self.numbers[0] is not task_id:
                raised = -self.mark if self.mark < 0 else 0
                prefix, putting = ids.children_prefix(task_id, raised), ids.putting_id(task_id, raised)
                self.numbers = (task_id, prefix, itertools.count(1), itertools.count(1), putting)
            return self.numbers


class Resolved:
    """Stands in pickled arguments for the value of the spec's dependency number `index`."""

    __slots__ = ("index",)

    def __init__(self, index: int) -> None:
        self.index = index

    def __reduce__(self) -> tuple[Any, ...]:
        return (Resolved, (self.index,))


class ValueLost(Exception):
    """A value could not be read where the node said it lies: the caller tells the node, and waits for it anew."""

    def __init__(self, object_id: bytes, data: Any, reason: str) -> None:
        super().__init__(object_id, data, reason)
        self.object_id = object_id
        self.data = data
        self.reason = reason


class CoreWorker(ABC):
    def __init__(self) -> None:
        self.references: References = ReferenceCounter()
        self.loop: Loop
        self.arena: object_store.Arena
        self.namespace = ""
        self.session_path = ""
        self._environments: dict[tuple[str, str], str] = {}  # that were asked for here
        self.runtime_env = ""  # what tasks submitted here inherit, as in TaskOptions
        self.default_lifetime: str | None = None  # of actors that do not say: see JobConfig
        self.job_id = b""
        self.unpinned: deque[bytes] = deque()  # appended to by finalizers, in any thread
        self._requests: dict[int, Waiter] = {}
        self._request_ids = itertools.count(1)
        self._templates: dict[TaskOptions, int] = {}
        self._functions: weakref.WeakKeyDictionary[Any, bytes] = weakref.WeakKeyDictionary()
        self._template_numbers = itertools.count(1)
        self.interrupts_change: Callable[[], bool]  # whether the calling thread was in the middle of telling the node
        self._export_lock = threading.RLock()  # A finalizer that comes in between may export, too.
        self.digester: Digester | None = None  # in durable jobs
        self.placement: Placement = ()  # of the task or actor that this process runs
        self.captured: Placement = ()  # where tasks go that it submits without saying where; a token for each such
        self.token = object()  # for remote functions, to note that they are known here; they must not keep the session

    @property
    def node_id(self) -> bytes:
        return ids.pack_id(self.job_id[:8], 0, ids.NODE)

    def connect(self) -> None:
        """Count this process's refs here."""
        object_ref.connect(lambda: self, self.references.born, self.references.dropped)

    # ------------------------------------------------------------ what a subclass does

    @abstractmethod
    def send(self, event: Event) -> None:
        """Tell the node, now or with the next frame, in order."""

    @abstractmethod
    def send_now(self, event: Event) -> None:
        """Tell the node without delay: an answer is waited for."""

    @abstractmethod
    def submit_spec(self, spec: TaskSpec, num_returns: int) -> None: ...

    @abstractmethod
    def context(self) -> TaskContext: ...

    @abstractmethod
    def get_values(self, refs: Sequence[ObjectRef[Any]], deadline: float | None) -> list[Any]: ...

    @abstractmethod
    def ready_positions(self, refs: Sequence[ObjectRef[Any]], num_ready: int, deadline: float | None) -> list[int]:
        """Where the ready ones stand, at most `num_ready`, once there are so many or time is over."""

    client = 0

    # ------------------------------------------------------------ requests

    def request(self, make: Callable[[int], Event], deadline: float | None = None) -> Any:
        """Send an event that is answered; return the answer.  Raises TimeoutError (and abandons it) at the deadline."""
        if self.interrupts_change():
            raise RuntimeError(
                "get(), wait() or a large put() in a finalizer (__del__) or a signal handler came in the middle of a "
                "change to minray's tables, and cannot wait for its end. Nothing was done. Tasks can be submitted "
                "there, and actors called and killed."
            )
        waiter = Waiter()
        request_id = next(self._request_ids)
        self._requests[request_id] = waiter
        try:
            self.send_now(make(request_id))
            if not self.loop.wait(waiter, deadline):
                raise TimeoutError
        except BaseException:
            # Time is over, or Ctrl-C: whatever it is, nobody waits any more.
            if self._requests.pop(request_id, None) is not None:
                self.send_now(RequestAbandoned(self.client, request_id))
            else:
                self.answered_in_vain(waiter.answer)
            raise
        return waiter.answer

    def ask(self, make: Callable[[int], Event]) -> Any:
        return self.request(make, monotonic() + REQUEST_TIMEOUT_S)

    def answered(self, request_id: int, answer: Any) -> Waiter | None:
        """The waiter whose answer came (to be set when no lock is held), None if it has given up."""
        waiter = self._requests.pop(request_id, None)
        if waiter is not None:
            waiter.answer = answer
        return waiter

    def answered_in_vain(self, answer: Any) -> None:
        """Nobody will look at it: values in it, or the actor that was found, are not pinned any longer."""
        if type(answer) is list:
            self.unpin_unread(item for item in answer if type(item) is tuple and type(item[-1]) is bytes)
        elif type(answer) is tuple and type(answer[0]) is bytes:
            self.unpinned.append(answer[0])

    def end_futures(self, why: str) -> None:
        """No more answers will come: who waits for a future is told."""
        for request_id, waiter in list(self._requests.items()):
            if isinstance(waiter, _FutureWaiter) and self._requests.pop(request_id, None) is not None:
                waiter.fail(RuntimeError(why))

    # ------------------------------------------------------------ functions

    def export(self, function: Any) -> bytes:
        """The ID of a function or class that the node knows from now on."""
        try:
            return self._functions[function]
        except (KeyError, TypeError):
            pass
        with self._export_lock:
            pickled = serialize_function(function)
            function_id = hashlib.blake2b(pickled, digest_size=16).digest()
            name = name_of(function)
            module = getattr(function, "__module__", "") or ""
            self.send(FunctionExported(self.client, function_id, pickled, name, module, _source_of(function)))
            if self.digester is not None:
                self.digester.learn_function(function_id, function, name)
            try:
                self._functions[function] = function_id
            except TypeError:
                pass  # Not weakly referable: exported again at each use, to the same ID.
        return function_id

    def template(self, options: TaskOptions) -> int:
        """The number under which the node knows these options."""
        number = self._templates.get(options)
        if number is None:
            with self._export_lock:
                number = self._templates.get(options)
                if number is None:
                    number = next(self._template_numbers)
                    self.send(TemplateDefined(self.client, number, options))
                    if self.digester is not None:
                        self.digester.learn_template(number, options)
                    self._templates[options] = number  # Only now: other threads use it without the lock.
        return number

    def environment_of(self, given: Mapping[str, Any] | None) -> str:
        """What a task with this runtime_env runs in, when it is submitted here.  Raises ValueError if it cannot be.

        Its directories are read once: ``f.options(runtime_env=...)`` may stand in a loop."""
        if not given:
            return self.runtime_env
        from minray.runtime_env import resolve
        from minray.worker_environment import store_in

        key = self.runtime_env, repr(given)
        found = self._environments.get(key)
        if found is None:
            found = self._environments[key] = resolve(self.runtime_env, given, store_in(self.session_path))
        return found

    # ------------------------------------------------------------ submitting

    def submit(
        self,
        template_no: int,
        num_returns: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        actor_id: bytes | None = None,
        actor: ActorOptions | None = None,
        task_id: bytes | None = None,
    ) -> list[ObjectRef[Any]]:
        if task_id is None:
            task_id = self.context().next_task_id()
        stored = None  # Keeps large arguments until the task has taken them over.
        if args or kwargs:
            spec, stored = self._spec_with_arguments(task_id, template_no, args, kwargs, actor_id, actor)
        else:
            spec = TaskSpec(task_id, template_no, None, (), (), actor_id, actor)
        if self.digester is not None:
            spec.digest = self.digester.of_call(template_no, args, kwargs)
        # The refs first: should Ctrl-C come in between, they drop what was submitted.
        if num_returns == 1:
            refs = [new_ref(task_id)]
        else:
            refs = [new_ref(ids.return_id(task_id, index)) for index in range(num_returns)]
        self.submit_spec(spec, num_returns)
        del stored
        return refs

    def _spec_with_arguments(
        self,
        task_id: bytes,
        template_no: int,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        actor_id: bytes | None,
        actor: ActorOptions | None,
    ) -> tuple[TaskSpec, ObjectRef[Any] | None]:
        deps: list[bytes] = []

        def resolve(value: Any) -> Any:
            if type(value) is ObjectRef:
                deps.append(bytes(value))
                return Resolved(len(deps) - 1)
            return value

        if ObjectRef in map(type, args):
            args = tuple(map(resolve, args))
        if kwargs and ObjectRef in map(type, kwargs.values()):
            kwargs = {name: resolve(value) for name, value in kwargs.items()}
        serialized = serialize([args, kwargs], "args, kwargs") if kwargs else serialize(args, "args")
        stored = None
        if serialized.size <= INLINE_LIMIT:
            data = to_bytes(serialized)
        else:
            # Too large for a message: the arguments become an object, the last dependency.
            stored = self._put_serialized(serialized)
            deps.append(bytes(stored))
            data = b""
        return TaskSpec(task_id, template_no, data, tuple(deps), serialized.refs, actor_id, actor), stored

    # ------------------------------------------------------------ values in

    def put(self, value: Any) -> ObjectRef[Any]:
        if type(value) is ObjectRef:
            raise TypeError(
                "put() takes a value, got an ObjectRef: what it refers to is in the store already. "
                "To store the ref itself, put it in a list: minray.put([ref])"
            )
        digest = self.digester.of_value(value) if self.digester is not None else b""
        return self._put_serialized(serialize(value), digest)

    def _put_serialized(self, serialized: Serialized, digest: bytes = b"") -> ObjectRef[Any]:
        object_id = self.context().next_put_id()
        self.references.adopt(object_id)
        ref = new_ref(object_id)
        try:
            self.send(ObjectPut(self.client, object_id, self.store(object_id, serialized), digest))
        except BaseException:
            # No room, or Ctrl-C; nothing happens if the node has taken the object over already.
            self.send(RoomAbandoned(self.client, object_id))
            raise
        return ref

    def store(self, object_id: bytes, serialized: Serialized) -> Value:
        """Put the bytes where they belong: into the message, into shared memory, or into a file."""
        size = serialized.size
        if size <= INLINE_LIMIT:
            return (to_bytes(serialized), size, serialized.refs)
        answer = self.ask(lambda rid: BlockRequested(self.client, rid, object_id, size))
        while True:
            kind = answer[0]
            if kind == "block":
                offset, fresh = answer[1], answer[2]
                try:
                    if fresh:
                        self.arena.back(offset, size)
                except OSError:
                    answer = self.ask(lambda rid: BlockRefused(self.client, rid, object_id, offset, size))  # noqa: B023
                    continue
                write_flat(serialized, self.arena.write_view(offset, size))
                return (offset, size, serialized.refs)
            if kind == "spill":
                spilled = [(victim, self._spill(offset, length, path)) for victim, offset, length, path in answer[1]]
                answer = self.ask(lambda rid: BlocksSpilled(self.client, rid, spilled, object_id, size))  # noqa: B023
                continue
            path = answer[1]
            try:
                object_store.write_file(path, *flat_chunks(serialized))
            except OSError as error:
                raise exceptions.ObjectStoreFullError(
                    f"an object of {size:,} bytes found no room: the object store ({self.arena.capacity:,} bytes) is "
                    f"in use, and the disk took no more either ({error}). Nothing was stored. Drop refs or arrays that "
                    "are not needed, free disk space, or give minray.init(object_store_memory=...) more."
                ) from error
            return (path, size, serialized.refs)

    def _spill(self, offset: int, size: int, path: str) -> str:
        """Write an object to its file; '' if that cannot be."""
        try:
            object_store.write_file(path, self.arena.write_view(offset, size))
        except OSError:
            return ""
        return path

    # ------------------------------------------------------------ values out

    def load(self, object_id: bytes, data: Any, size: int) -> Any:
        """The value of fetched data; views into shared memory stay pinned until they are gone.

        Raises ValueLost."""
        return deserialize(data if type(data) is bytes else self.view(object_id, data, size))

    @uninterruptible  # An exception after the finalizer is there, and it would be unpinned twice.
    def view(self, object_id: bytes, data: Any, size: int) -> memoryview:
        """What is pinned is unpinned once: when the last view of it has gone, or here and now if there can be none."""

        @uninterruptible
        def unpin() -> None:
            self.unpinned.append(object_id)
            object_ref.rouse()

        try:
            if type(data) is int:
                return self.arena.pinned_view(data, size, unpin)
            return object_store.map_file(data, unpin)
        except OSError as error:
            unpin()
            if error.errno in NO_FAULT_OF_THE_FILE:
                raise
            raise ValueLost(object_id, data, f"its file {data} {_fault(error)}") from None
        except BaseException:
            unpin()
            raise

    def tell_lost(self, lost: ValueLost) -> None:
        """The node makes it anew from its lineage, or lets it become an error."""
        self.send(ObjectLost(self.client, lost.object_id, lost.data, lost.reason))

    def unpin_unread(self, fetched: Iterable[Any]) -> None:
        """Values that were sent, and that nobody will look at."""
        for item in fetched:
            if item is not None and type(item[0]) is not bytes:
                self.unpinned.append(item[3])

    def load_or_raise(self, data: Any, size: int, is_error: bool, object_id: bytes) -> Any:
        if is_error:
            raise_stored(self.load(object_id, data, size))
        return self.load(object_id, data, size)

    def take_unpinned(self) -> list[bytes]:
        return [self.unpinned.popleft() for _ in range(len(self.unpinned))]

    # ------------------------------------------------------------ waiting

    def deadline_in(self, seconds: float) -> float:
        """The moment so many seconds from now, on the clock that `loop.wait` goes by."""
        return monotonic() + seconds

    def get(self, refs: Any, timeout: float | None) -> Any:
        deadline = None if timeout is None or timeout < 0 else self.deadline_in(timeout)
        if type(refs) is ObjectRef:
            return self.get_values((refs,), deadline)[0]
        if not isinstance(refs, (list, tuple)):
            refs = self._explain_no_refs("get", refs)
        for ref in refs:
            if type(ref) is not ObjectRef:
                self._explain_no_refs("get", ref, "a list with ")
        return self.get_values(refs, deadline)

    @staticmethod
    def _explain_no_refs(what: str, got: Any, where: str = "") -> Any:
        hint = ""
        if type(got) is ObjectRefGenerator:
            hint = " Did you mean get(next(gen)), or get(list(gen)) for all of them?"
            if what == "wait":
                hint = " Did you mean wait([gen])?"
        elif hasattr(got, "remote"):
            name = getattr(got, "__name__", "f")
            hint = f" Did you mean {what}({name}.remote(...))?"
        elif isinstance(got, (set, frozenset)) or hasattr(got, "__next__"):
            hint = f" Did you mean {what}(list(...))?"
        elif what == "wait" and isinstance(got, ObjectRef):
            hint = " Did you mean wait([ref])?"
        elif what == "get" and not where:
            hint = " A value needs no get()."
        raise TypeError(
            f"{what}() takes an ObjectRef or a list of them, got {where}{_describe(got)}.{hint}"
            if what == "get"
            else f"{what}() takes a list of ObjectRefs, got {where}{_describe(got)}.{hint}"
        )

    def wait(
        self, refs: Any, num_returns: int, timeout: float | None
    ) -> tuple[list[ObjectRef[Any]], list[ObjectRef[Any]]]:
        if not isinstance(refs, (list, tuple)):
            self._explain_no_refs("wait", refs)
        if not refs:
            return [], []
        awaited = refs
        if countOf(map(type, refs), ObjectRef) != len(refs):  # In C: who drains refs one by one looks at all each time.
            for ref in refs:
                if type(ref) is not ObjectRef and type(ref) is not ObjectRefGenerator:
                    self._explain_no_refs("wait", ref, "a list with ")
            awaited = [ref.awaited() if type(ref) is ObjectRefGenerator else ref for ref in refs]
        if len(set(refs)) != len(refs):
            raise ValueError(f"wait() takes each ObjectRef once; {len(refs) - len(set(refs))} of them came twice.")
        if type(num_returns) is not int or not 0 < num_returns <= len(refs):
            raise ValueError(
                f"wait(num_returns=...) must be between 1 and the number of refs ({len(refs)}), got {num_returns!r}."
            )
        deadline = None if timeout is None else self.deadline_in(timeout)
        positions = self.ready_positions(awaited, num_returns, deadline)
        if len(positions) == 1:  # Draining one by one: slices are 50 times faster than looking at each.
            (at,) = positions
            return [refs[at]], [*refs[:at], *refs[at + 1 :]]
        chosen = set(positions)
        return [refs[at] for at in positions], [ref for at, ref in enumerate(refs) if at not in chosen]

    def future(self, ref: ObjectRef[Any]) -> concurrent.futures.Future[Any]:
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()
        self.await_future(_FutureWaiter(self, ref, result))
        return result

    def answer_to(self, make: Callable[[int], Event]) -> concurrent.futures.Future[Any]:
        """Send an event that is answered; a future of the answer."""
        result: concurrent.futures.Future[Any] = concurrent.futures.Future()
        request_id = next(self._request_ids)
        self._requests[request_id] = _AnswerWaiter(result)
        self.send_soon(make(request_id))
        return result

    def taken_over(self, object_id: bytes, had: Sequence[bytes]) -> ObjectRef[Any]:
        """A ref that the node has counted for this process when it answered.

        `had`: for what this process had refs to before, it has kept another hold until now."""
        if object_id in had:
            self.unpinned.append(object_id)
            return object_ref.restore(object_id)
        self.references.adopt(object_id)
        return new_ref(object_id)

    def await_future(self, waiter: _FutureWaiter) -> None:
        request_id = next(self._request_ids)
        self._requests[request_id] = waiter
        # The ref itself is kept by the waiter; plain bytes travel.
        self.send_soon(ObjectsAwaited(self.client, request_id, [bytes(waiter.ref)], 1, True, False))

    def send_soon(self, event: Event) -> None:
        """Tell the node before this thread sleeps."""
        self.send_now(event)

    def asyncio_future(self, ref: ObjectRef[Any]) -> asyncio.Future[Any]:
        """A future of the event loop that runs in this thread."""
        import asyncio

        try:
            loop = asyncio.get_running_loop()
        except RuntimeError:
            raise RuntimeError(
                "`await ref` and ref.as_future() need a running event loop of asyncio, and there is none in this "
                "thread. Use minray.get(ref), or run the coroutine with asyncio.run(...)."
            ) from None
        result = loop.create_future()
        self.await_future(_LoopWaiter(self, ref, result))
        return result

    def value_now(self, ref: ObjectRef[Any], answer: Any) -> Any:
        """The value that an answer brings; its error, or ValueLost, is raised.  Does not wait: it runs in the loop."""
        return self.load_or_raise(*answer[0])

    # ------------------------------------------------------------ the rest

    def cancel(self, ref: ObjectRef[Any], force: bool, recursive: bool) -> None:
        if not force:
            self.send_now(CancelRequested(self.client, bytes(ref), force, recursive))
        elif not self.ask(lambda rid: CancelRequested(self.client, bytes(ref), force, recursive, rid)):
            raise ValueError(
                "cancel(force=True) would end the actor whose call this is, with all its other calls. Nothing was "
                "cancelled. Without force the call is cancelled if it has not begun; minray.kill(handle) ends the "
                "actor."
            )

    def kill_actor(self, actor_id: bytes, no_restart: bool) -> None:
        self.send_now(ActorKillRequested(self.client, actor_id, no_restart))


class _FutureWaiter(Waiter):
    """Sets a future instead of waking a thread."""

    __slots__ = ("_core", "ref", "_future")

    def __init__(self, core: CoreWorker, ref: ObjectRef[Any], future: Any) -> None:
        super().__init__()
        self._core = core
        self.ref = ref
        self._future = future  # of concurrent.futures; an event loop's, in a `_LoopWaiter`

    def set(self, answer: Any = None) -> None:
        self.done = True
        self._settle(answer)

    def fail(self, error: BaseException) -> None:
        self.done = True
        if self._is_wanted():
            self._raise(error)

    def _settle(self, answer: Any) -> None:
        """With the value that the answer brings; if that is lost, the future waits anew."""
        if not self._is_wanted():
            self._core.unpin_unread(answer or ())
            return
        try:
            value = self._core.value_now(self.ref, answer)
        except ValueLost as lost:
            self._core.tell_lost(lost)
            self._core.await_future(self)
        except BaseException as error:
            self._raise(error)
        else:
            self._future.set_result(value)

    def _is_wanted(self) -> bool:
        """It has not been cancelled, and cannot be any more."""
        return bool(self._future.running() or self._future.set_running_or_notify_cancel())

    def _raise(self, error: BaseException) -> None:
        self._future.set_exception(error)


class _AnswerWaiter(_FutureWaiter):
    """Sets a future to the answer as it is."""

    __slots__ = ()

    def __init__(self, future: concurrent.futures.Future[Any]) -> None:
        Waiter.__init__(self)
        self._future = future

    def _settle(self, answer: Any) -> None:
        if self._is_wanted():
            self._future.set_result(answer)


class _LoopWaiter(_FutureWaiter):
    """Sets a future of an event loop, in that loop's thread."""

    __slots__ = ("_loop", "_thread")

    def __init__(self, core: CoreWorker, ref: ObjectRef[Any], future: asyncio.Future[Any]) -> None:
        super().__init__(core, ref, future)
        self._loop = future.get_loop()
        self._thread = threading.get_ident()

    def set(self, answer: Any = None) -> None:
        self.done = True
        if threading.get_ident() == self._thread:
            self._settle(answer)
        else:
            self._in_loop(self._settle, answer)

    def fail(self, error: BaseException) -> None:
        self.done = True
        self._in_loop(super().fail, error)

    def _in_loop(self, act: Callable[[Any], None], argument: Any) -> None:
        try:
            self._loop.call_soon_threadsafe(act, argument)
        except RuntimeError:  # The loop has been closed, so nobody waits.
            if act == self._settle:
                self._core.unpin_unread(argument or ())

    def _is_wanted(self) -> bool:
        return not self._future.done()

    def _raise(self, error: BaseException) -> None:
        try:
            self._future.set_exception(error)
        except TypeError:  # A StopIteration cannot leave a coroutine.
            self._future.set_exception(RuntimeError(f"the task raised StopIteration: {error}"))


NO_FAULT_OF_THE_FILE = (errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Why a file cannot be read that may be whole: another time it can be."""


def _fault(error: OSError) -> str:
    if isinstance(error, object_store.DamagedFileError):
        return str(error.strerror)
    return "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read: {error.strerror}"


def raise_stored(error: BaseException) -> NoReturn:
    """Raise an error object: a task's error as an instance of the cause's class as well.

    No frame keeps the error: with its traceback that would be a cycle, which keeps the caller's
    refs and arrays until the garbage collector comes."""
    try:
        raise (error.as_instanceof_cause() if isinstance(error, exceptions.RayTaskError) else error) from None
    finally:
        del error


def serialize_function(function: Any) -> bytes:
    """Functions and classes travel by cloudpickle.  Raises TypeError naming what cannot be pickled."""
    serialized = serialize(function, getattr(function, "__name__", "function"))
    return to_bytes(serialized)


def name_of(function: Any) -> str:
    """Not everything that can be called has a name: partial objects do not."""
    return str(getattr(function, "__qualname__", type(function).__name__))


def _source_of(function: Any) -> str | None:
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):
        return None


def _describe(thing: Any) -> str:
    kind = type(thing).__name__
    name = getattr(thing, "__name__", None)
    if hasattr(thing, "remote"):
        return f"the remote function {name}" if name else f"a {kind}"
    text = repr(thing)
    return f"{kind} {text if len(text) < 60 else text[:57] + '...'}"


def pickle_classes(classes: Iterable[type]) -> bytes:
    return bytes(cloudpickle.dumps(tuple(classes), protocol=5))


def unpickle_classes(data: bytes) -> tuple[type, ...]:
    return tuple(pickle.loads(data))
