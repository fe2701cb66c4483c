"""A worker: runs one task at a time, or hosts one actor.

The main thread executes.  Between tasks it leads the loop (loop.py), which here is a
blocking read of its one socket.  While a task computes, the caretaker takes over after 5 ms:
it gives unstarted tasks back, cancels, and sends results that wait.

Results may wait for each other to be sent in one frame, but only while nobody could
notice: the next task is one that has always been short (the node says so), and the last
frame is less than a millisecond old.  In all other cases a result leaves at once.

A task can do anything to its process.  It may close file descriptors (ours are numbered
high), change the directory (put back), fork (the child ends where the task ends), exit
(an error to the caller), raise anything.
"""

from __future__ import annotations

import atexit
import fcntl
import gc
import io
import json
import os
import random
import select
import signal
import socket
import sys
import termios
import threading
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from contextlib import suppress
from itertools import compress, count, islice
from time import monotonic
from types import CoroutineType, FrameType
from typing import Any

from minray import api, exceptions, ids, object_ref, process_title
from minray.clock import EPOCH
from minray.channel import RECEIVE_BYTES, FrameReader, frame
from minray.checkpoint import Checkpoints
from minray.concurrent_calls import ConcurrentCalls, ThreadedCalls
from minray.core_worker import CoreWorker, Resolved, TaskContext, ValueLost, unpickle_classes
from minray.exceptions import (
    ActorDiedError, CheckpointError, GetTimeoutError, ObjectStoreFullError, RuntimeEnvSetupError, make_argument_error,
    make_task_error,
)  # fmt: skip
from minray.generator import Producer
from minray.interrupts import interrupt, raise_deferred, uninterruptible
from minray.loop import HOLD_S, SPIN_S, WORTH_SPINNING_S, Loop, Waiter
from minray.messages import ArgumentLost, CheckpointFailed, Event, ObjectsAwaited
from minray.object_ref import ObjectRef
from minray.object_store import Arena
from minray.output_labels import LabelledFile
from minray.serialization import INLINE_LIMIT, deserialize, in_one_line, serialize, to_bytes
from minray.surroundings import OWN_FDS_FROM, Surroundings
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, ACTOR_METHOD, CANCELLED, ERROR, OK, RETRYABLE_ERROR, STREAMING, TASK, Placement,
    TaskOptions,
    TaskSpec,
)  # fmt: skip

TITLE_AFTER_S = 0.05
"""A task that has been executed for so long gives its process its name."""
BLACK_BOX_SLOTS = 4096
BLACK_BOX_BYTES = 17 * BLACK_BOX_SLOTS
"""The start of the arena: for each worker the ID of the task that it executes, so that when it dies, or holds the GIL
and cannot answer, the node knows which of the tasks it had in hand is the one; and a byte by which the node holds
it."""

NONE = serialize(None).data


def black_box_offset(number: int) -> int:
    return 16 * (number % BLACK_BOX_SLOTS)


def hold_offset(number: int) -> int:
    return 16 * BLACK_BOX_SLOTS + number % BLACK_BOX_SLOTS


class _ArgumentFailed(Exception):
    """A dependency is an error: the task is not run."""


class ActorExit(BaseException):
    """Raised by exit_actor(), saying why; not an Exception, so that a method's own handlers let it pass."""


class Worker(CoreWorker):
    def __init__(self, sock: socket.socket, config: dict[str, Any], number: int) -> None:
        super().__init__()
        self.client = number
        self.config = config
        self.job_id = config["job_id"]
        self.namespace = config["namespace"]
        self.session_path = config["session"]
        self.default_lifetime = config["default_lifetime"]
        if config["job"] is not None:
            from minray.code_digest import Digester

            self.digester = Digester()
        self._open_channel(sock, config, number)
        self._forgets = 0
        self._released = 0  # how many Forget commands it has read, modulo 256
        self._in_hand: tuple[Any, ...] | None = None  # what the main thread took from the queue last
        self._dropped: tuple[Any, ...] | None = None  # that one, if it was to be forgotten before it had started
        self.queue: deque[tuple[Any, ...]] = deque()  # tasks not yet started
        self._work = Waiter()  # the main thread waits on it when the queue is empty
        self._idle = False
        self._out: list[tuple[Any, ...]] = []  # messages to send
        self._results: deque[tuple[bytes, int, Any, float, float]] = deque()
        self._specs: list[tuple[Any, ...]] = []  # submitted, not yet in a message
        self._specs_parent = b""
        self._within: deque[tuple[Any, ...]] = deque()  # messages of code that interrupted the holder of the lock
        self._out_lock = threading.RLock()  # never taken again by its holder: it only knows who that is
        self.interrupts_change = self._out_lock._is_owned  # type: ignore[attr-defined]
        self._sent_s = 0.0
        self._templates_known: dict[int, TaskOptions] = {}
        self._pickled: dict[bytes, bytes] = {}
        self._loaded: dict[bytes, Any] = {}
        self._context = TaskContext(ids.NIL, None)  # of the main thread
        self._contexts: dict[int, TaskContext] = {}  # of an actor's threads
        self._executing: bytes | None = None  # may be interrupted: user code of this task runs in the main thread
        self._cancelled: set[bytes] = set()
        self._blocked = 0
        self.resources: dict[str, float] = {"CPU": 1.0}
        self.gpu_ids: tuple[int | str, ...] = ()
        self._tokens: dict[Placement, object] = {}  # by what is captured
        self.actor: Any = None
        self.actor_id: bytes | None = None
        self.actor_options: TaskOptions | None = None
        self._concurrent: ConcurrentCalls | None = None  # runs an actor's calls beside each other
        self._serve: Callable[[], None] | None = None  # what the main thread does instead, once an actor is there
        self._exiting = False
        self._over = False  # The actor has ended itself: nothing more is run.
        self._forked = False
        self.reconstructed = False
        # Another one before the first task in an environment, and in an actor with exact recovery: others pay nothing.
        self._run_one = self._execute
        self._environment = ""  # to be set up, or set up
        self._title = process_title.IDLE  # what the process is called between tasks
        self._titled = False  # it is called after a task
        self._seen = b""  # the task that was executed at the last look, and at the first look at it:
        self._seen_s = 0.0
        self._checkpoints: Checkpoints | None = None
        self._saving = False
        self._restore_from: tuple[int, Any] | None = None  # its number, and the checkpoint as it was fetched
        self._settle_in()

    def _open_channel(self, sock: socket.socket, config: dict[str, Any], number: int) -> None:
        """What connects this process to the node.  (In local mode it is no process: local.py.)"""
        high = fcntl.fcntl(sock.fileno(), fcntl.F_DUPFD_CLOEXEC, OWN_FDS_FROM)
        sock.close()
        self.sock = socket.socket(fileno=high)
        wake_r, wake_w = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._wake_r = fcntl.fcntl(wake_r, fcntl.F_DUPFD_CLOEXEC, OWN_FDS_FROM)
        self._wake_w = fcntl.fcntl(wake_w, fcntl.F_DUPFD_CLOEXEC, OWN_FDS_FROM)
        os.close(wake_r)
        os.close(wake_w)
        self.arena = Arena.attach(config["arena"])
        self._black_box = self.arena.write_view(black_box_offset(number), 16)
        self._holds = self.arena.write_view(hold_offset(number), 1)  # how often the node has held it: see HoldNext
        self._reader = FrameReader()
        self._roused = False  # something was dropped or submitted while the caretaker slept
        self._spin = False  # the last read waited so little that spinning would have met it
        self._poll_object = select.poll()
        self._poll_object.register(self.sock, select.POLLIN)
        self._poll_object.register(self._wake_r, select.POLLIN)
        self.loop = Loop(self._poll, self._wake, "minray-caretaker")
        self.loop.glance = self._mind_title  # A task that waits in get() leads the loop itself.

    def _settle_in(self) -> None:
        sys.stdout = sys.__stdout__ = _labelled(1, self)  # type: ignore[misc]
        sys.stderr = sys.__stderr__ = _labelled(2, self)  # type: ignore[misc]
        self.surroundings = Surroundings(self._on_interrupt)
        os.register_at_fork(after_in_child=self._after_fork)

    # ------------------------------------------------------------ the main thread

    def run(self) -> None:
        self.connect()
        self.loop.start()
        self.surroundings.watch()
        queue = self.queue
        while not self._over:
            try:
                self._in_hand = queue[0]  # Never in neither place: see _on_Forget.
                task = queue.popleft()
            except IndexError:
                if self._exiting or self._serve is not None:
                    break
                self._work.done = False
                self._idle = True  # Before the look: what comes after it rings, and what others submit they send.
                self.flush()
                if not queue and not self._exiting:
                    with suppress(KeyboardInterrupt):
                        self.loop.wait(self._work)
                self._idle = False
                continue
            if self._concurrent is not None:  # The actor is there, and all that comes is a call of it.
                if self._serve is not None:
                    queue.appendleft(task)
                    break
                self._concurrent.take(task)
            else:
                # First the ID, then the look: the node counts first, and then looks for the ID.
                self._black_box[:] = task[0]
                if self._holds[0] != self._released:
                    self._stand_still(task)
                    continue
                if self._dropped is task:
                    continue
                self._run_one(task, self._context)
                if self._titled:
                    self._untitle()
                # The next may be long: send, unless it is known to be short and the last frame is young.
                # A result that waits is lost with this process, and its task runs again: both must allow it.
                if not (queue and queue[0][4] is True and task[4] is True and monotonic() - self._sent_s < HOLD_S):
                    self.flush()
                else:
                    object_ref.rouse()  # Should the caretaker be in the poll already, it sends this in a moment.
        self.flush()
        if self._serve is not None and not self._over:
            self._serve()
        if self._concurrent is not None:
            self._concurrent.close()
        self.flush()
        self._end_actor()

    def _stand_still(self, task: tuple[Any, ...]) -> None:
        """The last task let nobody speak to this process: wait until the node has said what others have by now."""
        self.queue.appendleft(task)
        self._black_box[:] = ids.NIL
        self.flush()
        while self._holds[0] != self._released:
            self._idle = True
            self._work.done = False
            if self._holds[0] != self._released:
                with suppress(KeyboardInterrupt):
                    self.loop.wait(self._work)
            self._idle = False

    def _end_actor(self) -> None:
        """In an orderly end (not after kill) an actor may say its last word: Ray's `__ray_shutdown__`."""
        last_word = getattr(self.actor, "__ray_shutdown__", None)
        if last_word is not None:
            try:
                said = last_word()
                if type(said) is CoroutineType and self._concurrent is not None:
                    self._concurrent.complete(said)
            except BaseException:
                traceback.print_exc()

    def _execute_in_environment(self, task: tuple[Any, ...], context: TaskContext) -> None:
        """The first task: before it, this process becomes what its environment says; if it cannot, the task fails."""
        from minray.worker_environment import set_up

        env = json.loads(self._environment)
        context.options = self._templates_known[task[1]]  # For the labels of what is said meanwhile.
        variables, path, directory = dict(os.environ), sys.path[:], os.open(".", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._executing = task[0]  # It may be cancelled meanwhile: packages can take minutes.
            if task[0] in self._cancelled:
                raise KeyboardInterrupt
            set_up(env, self.session_path)
            self._executing = None
        except BaseException as error:  # noqa: B036  (a hook may raise anything)
            self._executing = None
            # The next task tries again, from the same start.  (What a hook has imported stays.)
            os.environ.clear()
            os.environ.update(variables)
            sys.path[:] = path
            os.fchdir(directory)
            self._environment_failed(task, error)
            return
        finally:
            os.close(directory)
        if "working_dir" in env:
            self.surroundings.stay_here()
        # AssignResources leaves these alone from now on.
        self.config["environment"] = {**self.config["environment"], **env.get("env_vars", {})}
        self.runtime_env = self._environment
        self.token = object()  # What was submitted here before has inherited nothing.
        self._run_one = self._execute
        self._run_one(task, context)

    def _environment_failed(self, task: tuple[Any, ...], error: BaseException) -> None:
        task_id, options = task[0], self._templates_known[task[1]]
        why = str(error) if isinstance(error, RuntimeEnvSetupError) else in_one_line(error)
        failure = RuntimeEnvSetupError(
            f"the runtime environment of {options.name} [task {ids.short(task_id)}] could not be set up: {why}\n"
            "It was not run, and minray will not try again by itself. Mend the runtime_env, and submit it again."
        )
        now = EPOCH + monotonic()
        self.unpin_unread(task[3] or ())
        self._black_box[:] = ids.NIL
        if isinstance(error, KeyboardInterrupt) and task_id in self._cancelled:
            self._cancelled.discard(task_id)
            self._results.append((task_id, CANCELLED, (b"", "cancelled"), now, now))
            return
        text = f"RuntimeEnvSetupError: {why.partition(chr(10))[0][:500]}"
        self._results.append((task_id, ERROR, (to_bytes(serialize(failure)), text), now, now))

    def _execute(self, task: tuple[Any, ...], context: TaskContext) -> None:
        task_id, template_no, args, values, mark = task
        options = self._templates_known[template_no]
        in_main = context is self._context
        context.mark = mark  # Before the ID, by which it is seen that another execution has begun.
        context.task_id = task_id
        context.options = options
        started_s = EPOCH + monotonic()
        status: int = OK
        payload: Any
        try:
            arguments, keywords = self._arguments(args, values) if args is not None else ((), {})
            function = self._function(options)
            if in_main:
                self._executing = task_id
            if self._cancelled and task_id in self._cancelled:
                raise KeyboardInterrupt
            value = function(*arguments, **keywords)
            if options.num_returns > 1:
                value = self._parts(options, value)  # If it is a generator, the task's code runs now.
            self._executing = None
            del arguments, keywords
            if value is None and options.num_returns == 1:
                payload = NONE
            else:
                payload = self._returns(task_id, options, value)
                # `value` lives until the result is in the list: were its refs dropped before, the caretaker could
                # report that ahead of the result that contains them.
        except ValueLost as lost:
            self._not_started(task_id, lost, in_main)
            return
        except BaseException as error:  # noqa: B036  (whatever the task raises is its caller's)
            self._executing = None
            status, payload = self._failure(error, options, task_id)
            error.__traceback__ = None
        finally:
            self._executing = None
        if self._forked:
            os._exit(0)
        if self._cancelled:
            self._cancelled.discard(task_id)
        around = self.surroundings
        if around.disturbed or sys.stdout is not around.stdout or sys.stderr is not around.stderr:
            if self.actor is None and in_main:
                around.restore()
        finished_s = EPOCH + monotonic()
        if in_main:
            self._black_box[:] = ids.NIL
        self._results.append((task_id, status, payload, started_s, finished_s))

    def _not_started(self, task_id: bytes, lost: ValueLost, in_main: bool) -> None:
        """An argument is lost: the task goes back to the node, which makes that anew first."""
        if in_main:
            self._black_box[:] = ids.NIL
        self.send(ArgumentLost(self.client, task_id, lost.object_id, lost.data, lost.reason))

    def _function(self, options: TaskOptions) -> Callable[..., Any]:
        if options.kind == ACTOR_METHOD:
            if options.method == "__ray_call__":
                return lambda function, *args, **kwargs: function(self.actor, *args, **kwargs)
            if options.method == "__ray_terminate__":
                raise ActorExit("__ray_terminate__ was called on it")
            if options.method == "__ray_ready__":
                return lambda: True
            return getattr(self.actor, options.method)  # type: ignore[no-any-return]
        function = self._loaded.get(options.function_id)
        if function is None:
            function = deserialize(self._pickled[options.function_id])
            self._loaded[options.function_id] = function
        if options.kind == ACTOR_CREATION:
            return lambda *args, **kwargs: self._construct(function, options, args, kwargs)
        return function  # type: ignore[no-any-return]

    def function_name(self, options: TaskOptions) -> str:
        """As it was defined, not as the task is called."""
        if options.kind == ACTOR_METHOD:
            return f"{type(self.actor).__qualname__}.{options.method}"
        loaded = self._loaded.get(options.function_id)
        name: str = getattr(loaded, "__qualname__", options.name)
        return f"{name}.__init__" if options.kind == ACTOR_CREATION else name

    def _construct(self, cls: Any, options: TaskOptions, args: Any, kwargs: Any) -> None:
        self.actor_id = self._context.task_id
        self.actor_options = options
        self._title = options.name.partition(".")[0]
        self._entitle(self._title)
        if options.checkpoint_every or options.checkpoint_interval_s:
            self._checkpoints = Checkpoints(cls, options)
            self._run_one = self._execute_and_save
            self.actor = self._restored(lambda: cls(*args, **kwargs))
        elif options.is_async:
            from minray.async_actor import AsyncCalls

            calls = self._concurrent = AsyncCalls(self, options)
            self._serve = calls.serve
            self.actor = calls.construct(cls, args, kwargs)
        else:
            self.actor = cls(*args, **kwargs)
            if options.concurrency > 1:
                self._concurrent = ThreadedCalls(self, options)

    # ------------------------------------------------------------ exact recovery

    def _restored(self, construct: Callable[[], Any]) -> Any:
        """The actor as its last instance was at the last checkpoint, or a new one."""
        checkpoints, source = self._checkpoints, self._restore_from
        if checkpoints is None or source is None:
            return construct()
        checkpoints.number, (data, size, is_error, object_id) = source
        self._restore_from = None
        try:
            flat = data if type(data) is bytes else self.view(object_id, data, size)
        except ValueLost as lost:
            raise CheckpointError(f"its checkpoint {checkpoints.number} is lost: {lost.reason}") from None
        if is_error:
            raise deserialize(flat)
        return checkpoints.restore(construct, flat)

    def _execute_and_save(self, task: tuple[Any, ...], context: TaskContext) -> None:
        self._execute(task, context)
        checkpoints = self._checkpoints
        if checkpoints is not None and not self._over and checkpoints.is_due(task[2]):
            self._save(checkpoints)
            checkpoints.restart()

    def _save(self, checkpoints: Checkpoints) -> None:
        """One frame, in this order: the results that the node does not have yet, then the state that they are in."""
        object_id = ids.checkpoint_id(self.actor_id or b"", checkpoints.number + 1)
        self._saving = True
        self._black_box[:] = object_id  # Its own code runs here, too, and may be this process's end.
        try:
            serialized = checkpoints.capture(self.actor)
            value = self.store(object_id, serialized)
        except ObjectStoreFullError as full:
            self.send_now(CheckpointFailed(self.client, object_id, str(full), False))
            return
        except BaseException as error:  # noqa: B036  (the state's own code may raise anything)
            self._checkpoints = None
            why = str(error) if isinstance(error, CheckpointError) else in_one_line(error)
            self.send_now(CheckpointFailed(self.client, object_id, why, True))
            return
        finally:
            self._black_box[:] = ids.NIL
            self._saving = False
        checkpoints.number += 1
        with self._out_lock:
            self._collect_specs()
            results = [self._results.popleft() for _ in range(len(self._results))]
            if results:
                self._out.append(("TasksFinished", results))
            self._out.append(("CheckpointTaken", object_id, value, not checkpoints.own_way))
        self._flush()

    def ask(self, make: Callable[[int], Event]) -> Any:
        """While its state is saved an actor may come to its end, and then the node answers no more."""

        def make_unless_exiting(request_id: int) -> Event:
            if self._exiting:  # Looked at when the answer is awaited already: if not here, _on_ExitWorker ends that.
                raise ActorExit("it ended while its state was saved")
            return make(request_id)

        return super().ask(make_unless_exiting if self._saving else make)

    def _arguments(self, args: bytes, values: list[Any] | None) -> tuple[Any, dict[str, Any]]:
        """Unpickle, and put the values of dependencies in their places."""
        resolved: list[Any] = []
        if values is not None:
            unread = iter(values)
            try:
                for fetched in unread:
                    loaded, is_error = self._load_argument(*fetched)
                    if is_error:
                        raise _ArgumentFailed(loaded)
                    resolved.append(loaded)
            finally:
                self.unpin_unread(unread)  # None, unless one was an error or could not be unpickled.
        packed = deserialize(args) if args else resolved.pop()
        positional, keywords = packed if type(packed) is list else (packed, {})
        if resolved:
            positional = tuple(resolved[a.index] if type(a) is Resolved else a for a in positional)
            keywords = {k: resolved[a.index] if type(a) is Resolved else a for k, a in keywords.items()}
        return positional, keywords

    def _load_argument(self, data: Any, size: int, is_error: bool, object_id: bytes) -> tuple[Any, bool]:
        """The value or error.  Raises ValueLost in a plain task, which then comes again; an actor waits here."""
        while True:
            try:
                return self.load(object_id, data, size), is_error
            except ValueLost as lost:
                if self.actor_id is None:
                    raise
                self.tell_lost(lost)
                data, size, is_error, _ = self._await((object_id,), 1, True, None)[0]

    # ------------------------------------------------------------ results

    def _returns(self, task_id: bytes, options: TaskOptions, value: Any) -> Any:
        """The payload of OK: the pickled value, or a `Value` for each return."""
        count = options.num_returns
        if count == 1:
            serialized = serialize(value, f"the result of {options.name}()")
            if serialized.size <= INLINE_LIMIT and not serialized.refs:
                return to_bytes(serialized)
            return [self.store(task_id, serialized)]
        if count == 0:
            return []
        serialized_parts = [
            serialize(part, f"the result of {options.name}()[{index}]") for index, part in enumerate(value)
        ]  # All of them before any is stored: a failure must not leave memory behind.
        return [self.store(ids.return_id(task_id, i), part) for i, part in enumerate(serialized_parts)]

    def _parts(self, options: TaskOptions, value: Any) -> list[Any]:
        if options.streaming:
            return self._stream(options, value)
        count = options.num_returns
        if not hasattr(value, "__iter__"):
            raise ValueError(
                f"{options.name}() has num_returns={count} and returned one {type(value).__name__}, not {count} values."
            )
        parts = list(value)
        if len(parts) != count:
            raise ValueError(f"{options.name}() has num_returns={count} and returned {len(parts)} values.")
        return parts

    def _stream(self, options: TaskOptions, generator: Any) -> list[Any]:
        """Run a generator to its end, and send what it yields on the way; its two returns (see node_streams.py)."""
        producer = self._producer(self.context().task_id, options, generator)
        if options.streaming == STREAMING:
            return [producer.run(generator), None]
        try:
            producer.run(generator)
        except Exception as error:
            self._put_error(producer, options, error)
        return [producer.result(), None]

    async def _stream_beside_others(self, task_id: bytes, options: TaskOptions, generator: Any) -> list[Any]:
        """The same, in an actor whose calls share an event loop."""
        if type(generator) is CoroutineType:
            generator = await generator
        producer = self._producer(task_id, options, generator)
        if options.streaming == STREAMING:
            return [await producer.run_beside_others(generator), None]
        try:
            await producer.run_beside_others(generator)
        except Exception as error:
            self._put_error(producer, options, error)
        return [producer.result(), None]

    def _producer(self, task_id: bytes, options: TaskOptions, generator: Any) -> Producer:
        if not hasattr(generator, "__next__") and not hasattr(generator, "__anext__"):
            kind = "streaming" if options.streaming == STREAMING else "dynamic"
            raise ValueError(
                f'{options.name}() has num_returns="{kind}" and returned one {type(generator).__name__}, not a '
                "generator. Let it yield its values, or leave num_returns out."
            )
        return Producer(self, task_id, options)

    def _put_error(self, producer: Producer, options: TaskOptions, error: Exception) -> None:
        """A "dynamic" generator has raised: a last item, unless it is to run again."""
        status, payload = self._failure(error, options, producer.task_id)
        if status != ERROR:
            raise error
        producer.put_error(payload[0])

    def _failure(self, error: BaseException, options: TaskOptions, task_id: bytes) -> tuple[int, Any]:
        """The status and payload of a task that raised."""
        if isinstance(error, KeyboardInterrupt) and task_id in self._cancelled:
            self._cancelled.discard(task_id)
            return CANCELLED, (b"", "cancelled")
        if isinstance(error, ActorExit):
            if self._concurrent is None or options.kind != ACTOR_METHOD:
                self._exiting = self._over = True
                self.queue.clear()
            elif isinstance(self._concurrent, ThreadedCalls):
                self._concurrent.leave(options.method != "__ray_terminate__")
            return ACTOR_EXITED, (b"", str(error))
        wrapped: BaseException
        if isinstance(error, _ArgumentFailed):
            wrapped = make_argument_error(error.args[0], options.name)
        else:
            actor_id = self.actor_id.hex() if self.actor_id is not None else None
            ip = "127.0.0.1" if exceptions.name_prefix == "ray" else None  # Ray's form has it; it tells nothing here.
            wrapped = make_task_error(
                error, options.name, os.getpid(), ip=ip, actor_id=actor_id, actor_repr=self._repr()
            )
        text = in_one_line(error)
        if options.kind == ACTOR_CREATION:
            name = options.name.removesuffix(".__init__")
            what = "its constructor failed. No call was run."
            if self.reconstructed:
                what = "its worker had died, and it could not be made again."
            wrapped = ActorDiedError(
                f"actor {name} [{ids.short(task_id)}] is dead: {what}\n{wrapped}",
                actor_id=task_id.hex(),
                actor_init_failed=True,
                cause=wrapped,
            )
        elif options.retry_exceptions and isinstance(error, Exception):
            retry = options.retry_exceptions
            if retry is True or isinstance(error, unpickle_classes(retry)):
                return RETRYABLE_ERROR, (to_bytes(serialize(wrapped)), text)
        return ERROR, (to_bytes(serialize(wrapped)), text)

    def _repr(self) -> str | None:
        if self.actor is None:
            return None
        if type(self.actor).__repr__ is object.__repr__ and exceptions.name_prefix != "ray":  # type: ignore[comparison-overlap]
            return None
        try:
            return repr(self.actor)
        except Exception:
            return None

    # ------------------------------------------------------------ the title

    def _entitle(self, title: str) -> None:
        process_title.show(title)

    def _mind_title(self) -> float | None:
        """Look whether the process shall be called after a task; when to look again, in seconds.

        Called by the caretaker: a short task never comes this far."""
        if self._titled or self.actor_id is not None:
            return None
        running, now = bytes(self._black_box), monotonic()
        if running != self._seen or running == ids.NIL:
            self._seen, self._seen_s = running, now
        if running == ids.NIL or now - self._seen_s < TITLE_AFTER_S:
            return TITLE_AFTER_S
        self._titled = True  # First: if the task ends now, `_untitle` has its say, or the look below.
        process_title.show(self.label() or "task")
        if bytes(self._black_box) != running:
            self._titled = False
            process_title.show(self._title)
        return None

    def _untitle(self) -> None:
        self._titled = False
        self._seen = b""
        process_title.show(self._title)
        self._wake()  # The caretaker, if it goes on: the next task may be long as well.

    # ------------------------------------------------------------ sending

    def label(self) -> str | None:
        """Under which name the output of this thread appears."""
        options = self.context().options
        if options is None:
            return None
        return options.name.rpartition("<locals>.")[2] if options.kind == TASK else options.name.partition(".")[0]

    def context(self) -> TaskContext:
        return self._contexts.get(threading.get_ident(), self._context) if self._contexts else self._context

    def send(self, event: Event) -> None:
        message = (type(event).__name__, *event[1:])
        if self.interrupts_change():
            self._within.append(message)
            return
        with self._out_lock:
            self._collect_specs()
            self._out.append(message)

    def send_now(self, event: Event) -> None:
        self.send(event)
        self.flush()

    def submit_spec(self, spec: TaskSpec, num_returns: int) -> None:
        parent = self.context().task_id
        if self.interrupts_change():  # A finalizer, which the garbage collector calls anywhere, or a signal handler.
            for index in range(num_returns):
                self.references.adopt(ids.return_id(spec.task_id, index))
            self._within.append(("TasksSubmitted", parent, [spec.to_wire()]))
            return
        with self._out_lock:
            if parent != self._specs_parent or self._within:
                self._collect_specs()
                self._specs_parent = parent
            self._specs.append(spec.to_wire())
            for index in range(num_returns):
                self.references.adopt(ids.return_id(spec.task_id, index))
        if self._blocked or monotonic() - self._sent_s > HOLD_S or len(self._specs) >= 100 or self._idle:
            self.flush()  # Also when the main thread only reads, in get() or for work: nobody else would send this.
        else:
            object_ref.rouse()  # Should this task compute now, the caretaker sends the rest.

    def send_item(self, task_id: bytes, item: int, value: Any, failed: bool) -> None:
        """What a generator has yielded leaves at once, unless the node has not even read the last frame: then nobody
        waits for it, and it goes with what follows, or in a moment."""
        self._note_item(task_id, item, value, failed)
        if monotonic() - self._sent_s < HOLD_S and self._num_unread():
            object_ref.rouse()  # Should the generator compute now, the caretaker sends it.
        else:
            self.flush()

    @uninterruptible
    def _note_item(self, task_id: bytes, item: int, value: Any, failed: bool) -> None:
        with self._out_lock:
            self._collect_specs()
            last = self._out[-1] if self._out else None
            if last is not None and last[0] == "ItemsYielded" and last[1] == task_id and not failed:
                last[3].append(value)
            else:
                self._out.append(("ItemsYielded", task_id, item, [value], failed))

    def _num_unread(self) -> int:
        """Bytes of what was sent that the node has not read (and some more: the kernel counts its own)."""
        return int.from_bytes(fcntl.ioctl(self.sock, termios.TIOCOUTQ, b"\0\0\0\0"), sys.byteorder)

    def _collect_specs(self) -> None:
        if self._specs:
            self._out.append(("TasksSubmitted", self._specs_parent, self._specs))
            self._specs = []
        while self._within:
            self._out.append(self._within.popleft())

    def flush(self) -> None:
        """Send everything there is, in an order in which nothing is freed that is still needed."""
        self._flush()
        raise_deferred()

    @uninterruptible
    def _flush(self) -> None:
        if self.interrupts_change():
            return  # Whoever is interrupted sends it, here or with its own.
        self._send_out()
        while self._within:
            self._send_out()

    def _send_out(self) -> None:
        with self._out_lock:
            references = self.references
            # Counted first: what is done while we collect the rest goes with the next frame.
            droppable, finished = len(references.dropped), len(self._results)
            self._collect_specs()
            messages, self._out = self._out, []
            if references.born:
                acquired = references.count_born()
                if acquired:
                    messages.insert(0, ("ReferencesChanged", acquired, []))
            if finished:
                messages.append(("TasksFinished", [self._results.popleft() for _ in range(finished)]))
            if droppable:
                released = references.count_dropped(droppable)
                if released:
                    messages.append(("ReferencesChanged", [], released))
            if self.unpinned:
                messages.append(("Unpinned", self.take_unpinned()))
            if not messages:
                return
            if sys.stdout is not None:
                with suppress(Exception):
                    sys.stdout.flush()
                    sys.stderr.flush()
            try:
                self.sock.sendall(frame(messages))
            except OSError:
                os._exit(1)  # The node is gone.
            self._sent_s = monotonic()

    # ------------------------------------------------------------ receiving

    def _wake(self) -> None:
        with suppress(OSError):
            os.write(self._wake_w, b"w")

    def _poll(self, timeout: float | None, caretaking: bool) -> None:
        caretaking = caretaking or self._concurrent is not None  # Then others run the tasks, and this thread can.
        if caretaking and self._roused:
            self._roused = False  # More may follow: a burst goes in large frames.
            timeout = HOLD_S if timeout is None else min(timeout, HOLD_S)
        elif caretaking:
            object_ref.rouse_by(self._wake)  # Before it looks: what is dropped or submitted from now on rings.
            self._take_care()
            if timeout is None:
                timeout = self._mind_title()
        if caretaking or timeout is not None:
            for fd, _ in self._poll_object.poll(None if timeout is None else timeout * 1000):
                if fd == self._wake_r:
                    self._roused = caretaking
                    with suppress(BlockingIOError):
                        os.read(self._wake_r, 4096)
                else:
                    self._receive()
        else:
            self._receive()
        raise_deferred()

    def _take_care(self) -> None:
        """A task has been computing for some ms: nobody may wait for what was done before it."""
        if self._results or self._specs or self._out or self.references.dropped or self.unpinned:
            self._flush()

    @uninterruptible
    def _receive(self) -> None:
        try:
            data = self._next_bytes()
        except InterruptedError:
            return
        except OSError:
            data = b""
        if not data:
            os._exit(1)  # The node is gone, and with it everyone who could want a result.
        for messages in self._reader.feed(data):
            for message in messages:
                getattr(self, "_on_" + message[0])(*message[1:])

    def _next_bytes(self) -> bytes:
        """Read; spin for a moment first while answers come fast (see loop.SPIN_S)."""
        recv = self.sock.recv
        started = now = monotonic()
        while self._spin and now - started < SPIN_S:
            try:
                return recv(RECEIVE_BYTES, socket.MSG_DONTWAIT)
            except BlockingIOError:
                now = monotonic()
        data = recv(RECEIVE_BYTES)
        self._spin = monotonic() - started < WORTH_SPINNING_S
        return data

    def _on_RunTasks(self, tasks: list[tuple[Any, ...]]) -> None:
        self.queue.extend(tasks)
        if self._blocked and self.actor is None:
            # They were on their way when the running task blocked.  Queued first, then looked, while the other thread
            # counts itself blocked first, then looks: one of the two sees them, or they would wait behind that task.
            self._on_TakeBack(len(self.queue))
        elif self._idle:
            self._work.set()

    def _on_DefineFunction(self, function_id: bytes, pickled: bytes) -> None:
        self._pickled[function_id] = pickled

    def _on_DefineTemplate(self, template_no: int, options: tuple[Any, ...]) -> None:
        self._templates_known[template_no] = TaskOptions(*options)

    def _on_AssignResources(
        self, num_cpus: float, gpu_ids: tuple[int, ...], resources: dict[str, float], placement: Placement
    ) -> None:
        names = self.config["gpus"]
        self.resources = resources
        self.gpu_ids = tuple(names[gpu] for gpu in gpu_ids) if names else gpu_ids
        self._set_variables(num_cpus)
        self.placement = placement
        captured: Placement = (placement[0], -1, True) if placement and placement[2] else ()
        if captured != self.captured:
            # What remote functions know of their numbers here is true in one group (or outside of all).
            self._tokens[self.captured] = self.token
            self.captured = captured
            self.token = self._tokens.setdefault(captured, object())

    def _set_variables(self, num_cpus: float) -> None:
        if "CUDA_VISIBLE_DEVICES" not in self.config["environment"]:
            os.environ["CUDA_VISIBLE_DEVICES"] = ",".join(map(str, self.gpu_ids))
        if "OMP_NUM_THREADS" not in self.config["environment"]:
            os.environ["OMP_NUM_THREADS"] = str(max(1, int(num_cpus)))

    def _on_SetUpEnvironment(self, environment: str) -> None:
        self._environment = environment
        self._run_one = self._execute_in_environment  # Not here: that may take long, and this thread may serve others.

    def _on_MarkReconstructed(self) -> None:
        self.reconstructed = True

    def _on_RestoreActor(self, number: int, checkpoint: Any) -> None:
        self._restore_from = (number, checkpoint)

    def _on_TakeBack(self, count: int) -> None:
        taken: list[bytes] = []
        while len(taken) < count:
            try:
                taken.append(self.queue.pop()[0])  # The main thread takes from the other end.
            except IndexError:
                break
        self._give_back(taken[::-1])

    def _give_back(self, task_ids: list[bytes]) -> None:
        with self._out_lock:
            self._out.append(("TasksReturned", task_ids, self._forgets))
        self._flush()

    def _on_Forget(self, task_ids: list[bytes]) -> None:
        forgotten = set(task_ids)
        for task in list(self.queue):
            if task[0] in forgotten:
                with suppress(ValueError):
                    self.queue.remove(task)
                    forgotten.discard(task[0])
        # By identity: what was given back meanwhile may come again under the same ID.
        if self._in_hand is not None and self._in_hand[0] in forgotten:
            self._dropped = self._in_hand
        self._forgets += bool(task_ids)
        self._released = (self._released + 1) % 256
        if self._idle:
            self._work.set()

    def _on_CancelTask(self, task_id: bytes) -> None:
        for task in list(self.queue):
            if task[0] == task_id:
                with suppress(ValueError):
                    self.queue.remove(task)
                    self._give_back([task_id])  # Not as a result: it may have been given to others, see TasksReturned.
                    return
        if self._concurrent is not None and self._concurrent.drop(task_id):
            self._give_back([task_id])
            return
        self._cancelled.add(task_id)
        if self._concurrent is not None:
            self._concurrent.interrupt(task_id)
        if self._executing == task_id and self.actor is None:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)

    def _on_Reply(self, request_id: int, answer: Any) -> None:
        waiter = self.answered(request_id, answer)
        if waiter is not None:
            waiter.set(answer)
        else:
            self.answered_in_vain(answer)

    def _on_ExitWorker(self) -> None:
        self._exiting = True
        if self._saving:
            for request_id in list(self._requests):
                self._on_Reply(request_id, ("exit",))
        if self._idle:
            self._work.set()

    def _on_interrupt(self, number: int, at: FrameType | None) -> None:
        task_id = self._executing

        def act() -> None:
            if task_id is not None and self._executing == task_id and task_id in self._cancelled:
                raise KeyboardInterrupt

        interrupt(at, act)

    def _after_fork(self) -> None:
        """In a child that a task has forked: it must not speak for this worker."""
        self._forked = True
        with suppress(OSError):
            self.sock.close()

    # ------------------------------------------------------------ waiting

    def _await(self, refs: Sequence[bytes], num_ready: int, fetch: bool, deadline: float | None) -> Any:
        object_ids = [bytes(ref) for ref in refs]
        return self.stand_still(
            lambda rid, blocks: ObjectsAwaited(self.client, rid, object_ids, num_ready, fetch, blocks), deadline
        )

    def stand_still(self, make: Callable[[int, bool], Event], deadline: float | None = None) -> Any:
        """The answer to an event that a task waits for; others may use its CPU, and have the tasks behind it."""
        in_main = threading.current_thread() is threading.main_thread()
        blocks = in_main or self._concurrent is not None
        self._blocked += in_main  # Before the look at the queue: see _on_RunTasks.
        try:
            if in_main and self.actor is None and self.queue:
                self._on_TakeBack(len(self.queue))  # This may take long: let others have them.
            return self.request(lambda rid: make(rid, blocks), deadline)
        finally:
            self._blocked -= in_main

    def get_values(self, refs: Sequence[ObjectRef[Any]], deadline: float | None) -> list[Any]:
        if not refs:
            return []
        try:
            fetched = self._await(refs, len(refs), True, deadline)
        except TimeoutError:
            pending = list(self._await(refs, 0, False, None)).count(False)
            if pending:  # Else they were ready all the time: get(timeout=0) looks, and does not wait.
                raise GetTimeoutError(
                    f"get() waited for {len(refs)} object(s); {pending} of them were not ready in time. "
                    "Their tasks go on; get() may be called again, minray.cancel() ends them."
                ) from None
            fetched = self._await(refs, len(refs), True, None)
        unread = iter(fetched)
        try:
            # None: not ready. Then another one is an error, which is raised here.
            return [self._load_or_raise_again(item, deadline) for item in unread if item is not None]
        finally:
            self.unpin_unread(unread)

    def _load_or_raise_again(self, item: Any, deadline: float | None) -> Any:
        try:
            return self.load_or_raise(*item)
        except ValueLost as lost:
            self.tell_lost(lost)
            return self.get_values((ObjectRef(item[3]),), deadline)[0]

    def ready_positions(self, refs: Sequence[ObjectRef[Any]], num_ready: int, deadline: float | None) -> list[int]:
        try:
            flags = self._await(refs, num_ready, False, deadline)
        except TimeoutError:
            flags = self._await(refs, 0, False, None)
        return list(islice(compress(count(), flags), num_ready))


def main(sock: socket.socket, config: dict[str, Any], number: int, path: list[str], directory: str) -> None:
    """The body of a worker process, just forked from the zygote."""
    process_title.show(process_title.IDLE)
    sys.path[:] = [*path, *config["search_path"]]
    sys.argv = [""]
    with suppress(OSError):
        os.chdir(directory)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    random.seed()  # All workers are copies of one process: their random numbers must not be.
    numpy_random = sys.modules.get("numpy.random")  # numpy loads it when it is first used: 15 ms.
    if numpy_random is not None:
        numpy_random.seed()
    gc.unfreeze()
    worker = Worker(sock, config, number)
    api.set_core(worker)
    worker.run()
    atexit._run_exitfuncs()


def _labelled(fd: int, worker: Worker) -> io.TextIOWrapper:
    file = io.BufferedWriter(LabelledFile(fd, worker.label))
    return io.TextIOWrapper(file, "utf-8", "backslashreplace", line_buffering=True)
