"""Exceptions: Ray's names and inheritance, minray's words.

Owns every class that minray raises for something that happened elsewhere, and how a
task's exception comes home: `make_task_error` (in the worker) turns what the task raised
into a `RayTaskError` with the user's part of the traceback; that travels as the task's
result; ``get`` raises its `as_instanceof_cause`, which is an instance both of
`RayTaskError` and of the class that the task raised, so ``except ValueError`` works
across processes.

The exception itself travels as a pickle inside the error's pickle, tried out before it is
sent: one that cannot be pickled, or rebuilt here, costs its class but never its traceback.
In its place `cause` is then an `UnserializableException` that says why.

All other classes are made from a message alone (the node that reports a failure knows no
classes, it sends names and text: see `build`); what a program may want to look at comes
as attributes, IDs in full.

Knows nothing of sockets or processes.  Left out: Ray's errors of features that minray does
not have (channels, other languages), and source lines of code that only the driver has
(cells of a notebook show their line numbers).
"""

from __future__ import annotations

import functools
import os
import pickle
import re
import traceback
from typing import Any

from minray import serialization


name_prefix = "minray"
"""Whose tasks they are, in the header of a traceback: ``minray::f()``; "ray" under `minray.as_ray`."""


class RayError(Exception):
    """Anything that minray raises for what happened to a task, an actor or an object."""

    def __init__(self, message: str | None = None, **attributes: Any) -> None:
        super().__init__((type(self).__doc__ or "").partition("\n")[0] if message is None else message)
        vars(self).update(attributes)


# --- tasks ------------------------------------------------------------------------------


class RayTaskError(RayError):
    """A task raised an exception.

    ``str`` of it is the traceback in the worker; `cause` is the exception itself.
    """

    def __init__(
        self,
        function_name: str,
        traceback_str: str,
        cause: BaseException,
        proctitle: str | None = None,
        pid: int | None = None,
        ip: str | None = None,
        actor_repr: str | None = None,
        actor_id: str | None = None,
    ) -> None:
        super().__init__(traceback_str)
        self.function_name = function_name
        self.traceback_str = traceback_str
        self.cause = cause
        self.proctitle = proctitle or f"{name_prefix}::{function_name}"
        self.pid = pid
        self.ip = ip
        self.actor_repr = actor_repr
        self.actor_id = actor_id
        self.remark = ""  # Why this is not an instance of its cause's class, where it should be.

    def as_instanceof_cause(self) -> RayTaskError:
        """This error as an instance of its cause's class too; itself, with a remark, where Python refuses."""
        cause = vars(self)["cause"]  # Not self.cause: the class of the cause may define that name otherwise.
        kind = type(cause)
        if isinstance(self, kind) or isinstance(cause, UnserializableException):
            return self
        # Raised as themselves these would end the driver, or a loop, without a word.
        if not isinstance(cause, Exception) or isinstance(cause, (StopIteration, StopAsyncIteration)):
            return self
        try:
            error = _as_both(cause)
        except Exception as refusal:
            name = kind.__qualname__
            self.remark = f"This is a plain RayTaskError, since {name} cannot be subclassed: {refusal}"
            return self
        vars(error).update(vars(self))
        return error

    def __str__(self) -> str:
        own = vars(self)
        lost = own["cause"] if isinstance(own["cause"], UnserializableException) else None
        return "\n".join(str(part) for part in (own["traceback_str"], lost, own["remark"]) if part)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        state = dict(vars(self))
        return _rebuild_task_error, (_pack(state.pop("cause")), state, type(self) is not RayTaskError)


class TaskCancelledError(RayError):
    """The task was cancelled."""

    task_id: str | None = None


class TaskUnschedulableError(RayError):
    """No node can ever run the task."""


class TaskPlacementGroupRemoved(RayError):
    """The placement group of the task was removed."""


class PlacementGroupUnschedulableError(RayError):
    """The placement group can never be placed: no node is large enough, or there are too few."""


class WorkerCrashedError(RayError):
    """The worker died while it ran the task."""


class TaskCancelledByForceError(TaskCancelledError, WorkerCrashedError):
    """The task was cancelled with force=True: its worker was killed.

    Ray raises WorkerCrashedError for this one, so it is both."""


class ReplayDivergedError(RayError):
    """A task did something else when it was run again: it does not depend on its arguments alone."""


class LocalRayletDiedError(RayError):
    """The node that the task was submitted to died."""


class NodeDiedError(RayError):
    """The node died."""


class GetTimeoutError(RayError, TimeoutError):
    """The value was not there in time."""


class PendingCallsLimitExceeded(RayError):
    """The actor has as many unfinished calls as its max_pending_calls allows."""


class RuntimeEnvSetupError(RayError):
    """The runtime environment of a task or an actor could not be made."""


# --- actors -----------------------------------------------------------------------------


class RayActorError(RayError):
    """The actor did not finish the call."""

    actor_id: str | None = None
    actor_init_failed: bool = False
    preempted: bool = False


class ActorDiedError(RayActorError):
    """The actor is dead."""

    cause: BaseException | None = None


class ActorUnavailableError(RayActorError):
    """The actor cannot be reached now; it may be back later."""


class CheckpointError(RayActorError):
    """The state of an actor with exact recovery cannot be saved, or not be made from what was saved."""


class ActorUnschedulableError(RayError):
    """No node can ever run the actor."""


class ActorPlacementGroupRemoved(RayError):
    """The placement group of the actor was removed."""


class AsyncioActorExit(RayError):
    """An asyncio actor leaves by exit_actor()."""


# --- objects and machines ---------------------------------------------------------------


class ObjectLostError(RayError):
    """The object's value is lost."""

    object_ref_hex: str | None = None


class ObjectFetchTimedOutError(ObjectLostError):
    """The object could not be fetched from its node in time."""


class ReferenceCountingAssertionError(ObjectLostError, AssertionError):
    """The object was freed while a reference to it lived: an error in minray."""


class OwnerDiedError(ObjectLostError):
    """The process that owned the object died."""


class ObjectReconstructionFailedError(ObjectLostError):
    """The object is lost and cannot be rebuilt."""


class ObjectReconstructionFailedMaxAttemptsExceededError(ObjectReconstructionFailedError):
    """The object is lost, and its task has no attempts left."""


class ObjectReconstructionFailedLineageEvictedError(ObjectReconstructionFailedError):
    """The object is lost, and so is the description of its task."""


class ObjectStoreFullError(RayError):
    """The object store is full."""


class OutOfDiskError(RayError):
    """The disk is full."""


class OutOfMemoryError(RayError):
    """The machine is out of memory."""


class PlasmaObjectNotAvailable(RayError):
    """The object is not in this node's object store."""


class UnserializableException(RayError):
    """The exception could not be pickled, or not be rebuilt from its pickle."""


class OufOfBandObjectRefSerializationException(RayError):
    """An ObjectRef was pickled outside minray, where it cannot be counted."""


class RaySystemError(RayError):
    """minray itself failed."""


class AuthenticationError(RayError):
    """A peer could not prove who it is."""


def build(class_name: str, message: str, **attributes: Any) -> RayError:
    """An error from what the node reports: the name of its class, its text, what else is known.

    >>> build("WorkerCrashedError", "worker 41c7 was killed by SIGKILL", pid=8123).pid
    8123
    """
    kind = globals().get(class_name)
    if isinstance(kind, type) and issubclass(kind, RayError) and not issubclass(kind, RayTaskError):
        return kind(message, **attributes)
    return RaySystemError(f"{class_name}: {message}", **attributes)


def error_payload(class_name: str, message: str, **attributes: Any) -> bytes:
    """An error of the node's own, as the bytes of an object: see `build`."""
    return pickle.dumps(build(class_name, message, **attributes), 5)


# --- a task's exception on its way home -------------------------------------------------


def make_task_error(
    error: BaseException,
    function_name: str,
    pid: int | None = None,
    *,
    ip: str | None = None,
    actor_id: str | None = None,
    actor_repr: str | None = None,
) -> RayTaskError:
    """What `function_name` raised, ready to be serialized as its result.  Never raises itself.

    If what it raised is itself a task's error (it called ``get``), the cause is that task's cause,
    and the traceback shows both.
    """
    where = {"pid": pid, "ip": ip, "actor_id": actor_id, "repr": actor_repr}
    known = ", ".join(f"{name}={value}" for name, value in where.items() if value is not None)
    text = f"{name_prefix}::{function_name}()" + (f" ({known})" if known else "") + "\n" + user_traceback(error)
    cause = vars(error)["cause"] if isinstance(error, RayTaskError) else error
    return RayTaskError(function_name, text, cause, None, pid, ip, actor_repr, actor_id)


def make_argument_error(error: BaseException, function_name: str) -> BaseException:
    """The result of a task that did not run because computing an argument of it ended in `error`.

    >>> print(make_argument_error(WorkerCrashedError("worker 41c7 was killed"), "total"))
    minray::total() did not run, since one of its arguments could not be computed:
    worker 41c7 was killed
    """
    if not isinstance(error, RayError):
        return error
    own = vars(error)
    said = own["traceback_str"] if isinstance(error, RayTaskError) else str(error)
    # Of a chain of such tasks only the last and the first are told: chains can be long.
    text = f"{name_prefix}::{function_name}{_NOT_RUN}{said.rpartition(_NOT_RUN)[2]}"
    if not isinstance(error, RayTaskError):
        return type(error)(text, **own)
    return RayTaskError(function_name, text, own["cause"], None, own["pid"], own["ip"]).as_instanceof_cause()


_NOT_RUN = "() did not run, since one of its arguments could not be computed:\n"
_OWN_FILES = os.path.dirname(os.path.abspath(__file__)) + os.sep
_TEXT_LIMIT = 50_000  # Characters; a message can be a whole array.
_HEAD = "Traceback (most recent call last):\n"
_OWN_PREFIX = re.compile(r"^minray\.exceptions\.RayTaskError(\(.*?\))?: (?=(?:min)?ray::)", re.MULTILINE)


def user_traceback(error: BaseException) -> str:
    """The traceback without minray's own frames; causes, contexts, groups and notes included."""
    try:
        told = traceback.TracebackException(type(error), error, error.__traceback__)
        _drop_own_frames(told)
        text = _OWN_PREFIX.sub("", "".join(told.format()).rstrip("\n"))
    except Exception as failure:  # Its class may do as it likes in __str__, __getattr__, ...
        text = f"{type(error).__qualname__} (its traceback cannot be shown: {type(failure).__name__})"
    text = text.removeprefix(_HEAD)
    if len(text) > _TEXT_LIMIT:
        half = _TEXT_LIMIT // 2
        text = f"{text[:half]}\n... ({len(text) - 2 * half} characters left out) ...\n{text[-half:]}"
    return text


def _drop_own_frames(told: traceback.TracebackException) -> None:
    pending = [told]
    for one in pending:  # Not by recursion: chains of thousands exist.
        one.stack[:] = [frame for frame in one.stack if not frame.filename.startswith(_OWN_FILES)]
        related = (one.__cause__, one.__context__, *(getattr(one, "exceptions", None) or ()))
        pending += [other for other in related if other is not None]


@functools.lru_cache(maxsize=256)  # Bounded: classes made inside functions come anew with each call.
def _dual_class(kind: Any) -> Any:
    """The class of errors that are both a RayTaskError and a `kind`."""

    def __getattr__(self: Any, name: str) -> Any:  # What `kind` keeps in its instances.
        if name.startswith("__") or "cause" not in vars(self):
            raise AttributeError(name)
        return getattr(vars(self)["cause"], name)

    body = {"__module__": __name__, "__doc__": kind.__doc__, "__getattr__": __getattr__}
    return type(f"RayTaskError({kind.__name__})", (RayTaskError, kind), body)


def _as_both(cause: Exception) -> RayTaskError:
    """An error that is both, with all that `cause` keeps in C, still without a RayTaskError's attributes."""
    kind: Any = type(cause)
    _, made_of, *state = serialization.builtin_base(kind).__reduce__(cause)
    error: RayTaskError = serialization.past_init(_dual_class(kind), made_of)
    object.__setattr__(error, "args", cause.args)
    for name, value in (state[0] or {}).items() if state else ():
        if name not in vars(cause):  # ImportError.name and the like; attributes are found by __getattr__.
            object.__setattr__(error, name, value)
    return error


def _pack(cause: BaseException) -> bytes:
    """The exception as bytes that are known to load, at least here."""
    try:
        packed = serialization.serialize(cause, type(cause).__qualname__)
        data = serialization.to_bytes(packed)
        if not isinstance(serialization.deserialize(data), BaseException):
            raise TypeError("its pickle is of something that is no exception")
    except Exception as failure:
        lost = _lost(type(cause), "could not be pickled", failure)
        return serialization.to_bytes(serialization.serialize(lost))
    for ref in packed.refs:
        serialization.note_ref(ref)
    return data


def _rebuild_task_error(packed: bytes, state: dict[str, Any], dual: bool) -> RayTaskError:
    error = RayTaskError.__new__(RayTaskError)
    vars(error).update(state)
    error.args = (error.traceback_str,)
    try:
        error.cause = serialization.deserialize(packed)
    except Exception as failure:  # Its module is not there, its __setstate__ raises, ...
        error.cause = _lost(None, "could not be rebuilt in this process", failure)
    return error.as_instanceof_cause() if dual else error


def _lost(kind: type | None, what: str, failure: BaseException) -> UnserializableException:
    name = f"its {kind.__qualname__}" if kind is not None else "the exception itself"
    reason = "\n".join(traceback.format_exception_only(type(failure), failure)).partition("\n")[0]
    return UnserializableException(f"This is a plain RayTaskError, since {name} {what}: {reason}")
