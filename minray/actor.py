"""``@minray.remote`` on a class: actors, their handles and their methods.

A handle contains an ObjectRef to what the constructor "returns".  So handles are
counted, pickled and freed as refs are, and an actor ends when its last handle goes.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

from minray import api, options
from minray.checkpoint import check_class
from minray.core_worker import CoreWorker
from minray.exceptions import PendingCallsLimitExceeded
from minray.generator import made_of, refuse_in_jobs
from minray.messages import ActorLookedUp, CallsCounted
from minray.object_ref import ObjectRef, restore
from minray.serialization import deserialize, serialize, to_bytes
from minray.task_spec import ACTOR_CREATION, ACTOR_METHOD, ActorOptions, TaskOptions
from minray.types import ActorID

_METHOD_OPTIONS = "__minray_method_options__"
_BUILT_IN = ("__ray_ready__", "__ray_call__", "__ray_terminate__")
"""Methods that every actor has, under the names that Ray's users know."""
ASYNC_CONCURRENCY = 1000
"""So many calls of an actor with coroutine methods run at the same time, unless it says otherwise."""
EXACT_TASK_RETRIES = 3
"""With exact recovery a call is repeated anyway when its actor's worker dies; if it runs each time, so often."""


class ActorClassInheritanceException(TypeError):
    """An actor class was inherited from, instead of the plain class that it is made of."""


def method(**given: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Options for a method of an actor: num_returns, max_task_retries, retry_exceptions, concurrency_group.

    >>> @minray.remote
    ... class Pair:
    ...     @minray.method(num_returns=2)
    ...     def both(self):
    ...         return 1, 2
    """
    checked = options.check(given, options.METHOD, "method")
    if not given:
        raise TypeError("method() without options has no effect; leave it out, or say num_returns=...")

    def decorate(function: Callable[..., Any]) -> Callable[..., Any]:
        setattr(function, _METHOD_OPTIONS, checked)
        return function

    return decorate


class MethodTemplate:
    """One way of calling a method, and the number under which a session knows it.

    It knows no handle: handles keep these, and a cycle would keep an actor alive."""

    __slots__ = ("name", "given", "num_returns", "streaming", "backpressure", "known_to", "template_no")

    def __init__(self, name: str, given: dict[str, Any]) -> None:
        self.name = name
        self.given = given
        self.num_returns, self.streaming, self.backpressure = options.returns_of(None, given)
        self.known_to: object = None  # the token of the core that does
        self.template_no = 0


class Interface:
    """What every handle to an actor of one class (with the same options) shares.  It travels with each."""

    __slots__ = (
        "class_name", "methods", "max_task_retries", "max_pending_calls", "groups", "is_exact", "templates"
    )  # fmt: skip

    def __init__(
        self,
        class_name: str,
        methods: dict[str, dict[str, Any]],
        max_task_retries: int,
        max_pending_calls: int,
        groups: tuple[str, ...] = (),
        is_exact: bool = False,
    ) -> None:
        self.class_name = class_name
        self.methods = methods  # names and their @method options
        self.max_task_retries = max_task_retries
        self.max_pending_calls = max_pending_calls  # -1: no limit
        self.groups = groups  # names of its concurrency groups
        self.is_exact = is_exact
        self.templates: dict[str, MethodTemplate] = {}  # of this process; those that were used

    def template(self, name: str) -> MethodTemplate:
        found = self.templates.get(name)
        if found is None:
            given = self.methods.get(name)
            if given is None and name not in _BUILT_IN:
                hint = options.nearest(name, self.methods).replace("=?", ".remote()?")
                raise AttributeError(f"actor {self.class_name} has no method {name!r}.{hint}")
            found = self.templates[name] = MethodTemplate(name, given or {})
        return found

    def __reduce__(self) -> Any:
        return (
            Interface,
            (
                self.class_name, self.methods, self.max_task_retries, self.max_pending_calls, self.groups,
                self.is_exact,
            ),
        )  # fmt: skip

    def check_group(self, name: str, given: dict[str, Any]) -> None:
        """Raises ValueError if these options of the method put it into a group that there is not."""
        group = given.get("concurrency_group")
        if group is not None and group not in self.groups:
            known = f"It has {', '.join(map(repr, self.groups))}." if self.groups else "It has none."
            raise ValueError(
                f"{self.class_name}.{name}() is to run in the concurrency group {group!r}, which {self.class_name} "
                f"does not have. {known} Groups are made with "
                f"@minray.remote(concurrency_groups={{{group!r}: 2}}) or {self.class_name}.options(...)."
            )


class ActorClass:
    """A class whose instances live in processes of their own: ``A.remote(...)`` returns a handle."""

    def __init__(
        self, cls: type, given: dict[str, Any], methods: dict[str, dict[str, Any]] | None = None
    ) -> None:
        self._is_async = _has_coroutines(cls)
        options.check_exact(given, cls.__name__, self._is_async)
        exact = options.is_exact(given)
        if exact:
            check_class(cls, "exact recovery")
        self._class = cls
        self._options = given
        self._methods = _methods_of(cls) if methods is None else methods
        self._interface = Interface(
            cls.__name__,
            self._methods,
            given.get("max_task_retries", EXACT_TASK_RETRIES if exact else 0),
            given.get("max_pending_calls", -1),
            tuple(given.get("concurrency_groups", ())),
            exact,
        )
        self._signature: inspect.Signature | None = None
        self._known_to: object = None  # the token of the core that knows it under the number:
        self._template_no = 0
        self.__name__ = cls.__name__
        self.__qualname__ = cls.__qualname__
        self.__module__ = cls.__module__
        self.__doc__ = cls.__doc__

    def __minray_counts__(self) -> Any:
        """For code_digest.py: of the options only the environment changes a result."""
        return (self._class, *options.environment_that_counts(self._options))

    @property
    def __ray_metadata__(self) -> Any:
        """The plain class, where programs look for it in Ray: ``A.__ray_metadata__.modified_class``."""
        return SimpleNamespace(modified_class=self._class, class_name=self.__name__)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"{self.__name__} is an actor class: make one with {self.__name__}.remote(...).")

    def __mro_entries__(self, bases: Any) -> Any:
        name = self.__name__
        raise ActorClassInheritanceException(
            f"{name} is an actor class and cannot be inherited from. "
            f"Keep the plain class (class {name}: ...), inherit from that, and decorate the heir."
        )

    def options(self, **given: Any) -> ActorClass:
        """The same class with other options."""
        return ActorClass(self._class, options.check(given, options.ACTOR, "options", self._options), self._methods)

    def _remote(self, args: Any = (), kwargs: Any = None, **given: Any) -> ActorHandle:
        return self.options(**given).remote(*(args or ()), **(kwargs or {}))

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a graph that is run later: see `minray.dag`."""
        from minray.dag import ClassNode

        return ClassNode(self, args, kwargs)

    def remote(self, *args: Any, **kwargs: Any) -> ActorHandle:
        """Start an actor; returns its handle at once.  Errors of the constructor come with the first call.

        Raises:
            TypeError: the constructor cannot take these arguments.
            ValueError: the name is taken (and get_if_exists was not given).
        """
        core = api.core()
        given = self._options
        if core.token is not self._known_to:
            self._introduce(core)
        self._check_arguments(args, kwargs)
        name = given.get("name")
        if given.get("get_if_exists") and name is None:
            raise ValueError("get_if_exists=True needs name=...")
        actor_options = ActorOptions(
            class_name=self._class.__name__,
            name=name,
            namespace=given.get("namespace") or core.namespace,
            detached=(given.get("lifetime") or core.default_lifetime) == "detached",
            max_restarts=given.get("max_restarts", -1 if options.is_exact(given) else 0),
        )
        actor_id = core.context().next_task_id()
        if name is not None:
            return self._named(core, actor_id, actor_options, args, kwargs)
        (ref,) = core.submit(self._template_no, 1, args, kwargs, actor=actor_options, task_id=actor_id)
        return ActorHandle(ref, self._interface)

    def _named(self, core: CoreWorker, actor_id: bytes, wanted: ActorOptions, args: Any, kwargs: Any) -> ActorHandle:
        """The name is looked up before, to spare the work, and after: then the node has decided whose it is."""
        name, namespace = wanted.name or "", wanted.namespace
        holder = _look_up(core, name, namespace)
        if holder is None:
            (ref,) = core.submit(self._template_no, 1, args, kwargs, actor=wanted, task_id=actor_id)
            mine = ActorHandle(ref, self._interface)
            holder = _look_up(core, name, namespace)
            if holder is None:
                return mine  # It is dead already; its calls say why.
        if holder._minray_id == actor_id or self._options.get("get_if_exists"):
            return holder
        raise ValueError(
            f"the name {name!r} is taken by another actor (namespace {namespace!r}). "
            "minray.get_actor() finds it; get_if_exists=True takes it, or makes one if there is none."
        )

    def _introduce(self, core: CoreWorker) -> None:
        given = self._options
        for name, method_options in self._methods.items():
            self._interface.check_group(name, method_options)
        # An actor holds what it asks for as long as it lives; without a word, nothing,
        # so that a dozen actors fit on two CPUs.
        resources = options.resources_of(given, default_cpus=0)
        self._template_no = core.template(
            TaskOptions(
                kind=ACTOR_CREATION,
                function_id=core.export(self._class),
                name=f"{self._class.__name__}.__init__",
                resources=resources,
                max_retries=0,
                max_concurrency=given.get("max_concurrency", ASYNC_CONCURRENCY if self._is_async else 1),
                checkpoint_every=given.get("checkpoint_every", 0),
                checkpoint_interval_s=float(given.get("checkpoint_interval_s", 0)),
                interface=to_bytes(serialize(self._interface, f"the @method options of {self.__name__}")),
                is_async=self._is_async,
                concurrency_groups=tuple(given.get("concurrency_groups", {}).items()),
                runtime_env=core.environment_of(given.get("runtime_env")),
                placement=options.placement_of(given, resources, core.captured, self.__name__),
                labels=options.labels_of(given),
            )
        )
        self._known_to = core.token

    def _check_arguments(self, args: Any, kwargs: Any) -> None:
        """A constructor call that cannot work is refused here, where the mistake is."""
        if self._signature is None:
            self._signature = _signature_of(self._class)
        try:
            self._signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"{self.__name__}.remote(): {error}") from None

    def __reduce__(self) -> Any:
        return (ActorClass, (self._class, self._options, self._methods))


class ActorMethod:
    """A method of one actor: ``handle.method.remote(...)``.  Like a bound method, made anew at each look."""

    __slots__ = ("_handle", "_template")

    def __init__(self, handle: ActorHandle, template: MethodTemplate) -> None:
        self._handle = handle
        self._template = template

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        raise TypeError(f"methods of actors are called with .remote(): handle.{self._template.name}.remote(...)")

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submit a call; an `ObjectRef`, a list of them for num_returns > 1, None for num_returns=0.

        Raises:
            PendingCallsLimitExceeded: the actor has max_pending_calls calls that it has not finished.
        """
        core = api.core()
        handle, template = self._handle, self._template
        if core.token is not template.known_to:
            self._introduce(core)
        if handle._minray_interface.max_pending_calls > 0:
            handle._minray_admit(core, template.name)
        num_returns = template.num_returns
        refs = core.submit(template.template_no, num_returns, args, kwargs, handle._minray_id)
        if num_returns == 1:
            return refs[0]
        if template.streaming:
            return made_of(core, refs, template.streaming, template.backpressure)
        return refs or None

    def _introduce(self, core: CoreWorker) -> None:
        template, interface = self._template, self._handle._minray_interface
        given = template.given
        if template.streaming:
            refuse_in_jobs(core, f"{interface.class_name}.{template.name}")
            if interface.is_exact:
                raise NotImplementedError(
                    f"{interface.class_name}.{template.name}() is a generator whose items would have refs of their "
                    "own, and the actor has exact recovery: its calls are logged with their results, and items are not "
                    "yet. The call was not submitted. Return a list, say num_returns=n, or leave out the checkpoints."
                )
        template.template_no = core.template(
            TaskOptions(
                kind=ACTOR_METHOD,
                function_id=b"",
                name=given.get("name") or f"{interface.class_name}.{template.name}",
                method=template.name,
                num_returns=template.num_returns,
                max_retries=given.get("max_task_retries", interface.max_task_retries),
                retry_exceptions=options.retry_exceptions_of(given.get("retry_exceptions", False)),
                streaming=template.streaming,
                backpressure=template.backpressure,
                concurrency_group=given.get("concurrency_group", ""),
            )
        )
        template.known_to = core.token

    def options(self, **given: Any) -> ActorMethod:
        checked = options.check(given, options.METHOD, "options")
        template = self._template
        self._handle._minray_interface.check_group(template.name, checked)
        return ActorMethod(self._handle, MethodTemplate(template.name, {**template.given, **checked}))

    def _remote(self, args: Any = (), kwargs: Any = None, **given: Any) -> Any:
        return self.options(**given).remote(*(args or ()), **(kwargs or {}))

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a graph that is run later: see `minray.dag`."""
        from minray.dag import ClassMethodNode

        return ClassMethodNode(self, args, kwargs)


class ActorHandle:
    """A reference to an actor; pass it to tasks and other actors as you like.

    Methods of the actor are attributes of the handle: ``handle.method.remote(...)``.
    """

    def __init__(self, ref: ObjectRef[Any], interface: Interface) -> None:
        self._minray_ref = ref  # counted: the actor lives as long as one of these
        self._minray_id = bytes(ref)
        self._minray_interface = interface
        self._minray_calls = 0  # at least as many as are pending, if there is a limit to them

    @property
    def _actor_id(self) -> ActorID:
        return ActorID(self._minray_id)

    _ray_actor_id = _actor_id

    def __getattr__(self, name: str) -> ActorMethod:
        interface = self.__dict__.get("_minray_interface")
        if interface is None:
            raise AttributeError(name)
        return ActorMethod(self, interface.templates.get(name) or interface.template(name))

    def _minray_admit(self, core: CoreWorker, method_name: str) -> None:
        """One more call, if the limit allows it.  The node is asked only when this handle has made that many."""
        interface = self._minray_interface
        limit = interface.max_pending_calls
        if self._minray_calls >= limit:
            actor_id = self._minray_id
            self._minray_calls = core.ask(lambda rid: CallsCounted(core.client, rid, actor_id))
            if self._minray_calls >= limit:
                raise PendingCallsLimitExceeded(
                    f"{interface.class_name}.{method_name}() was not submitted: {self._minray_calls} calls of this "
                    f"process to the actor have not finished, and it was made with max_pending_calls={limit}. "
                    "Wait for some of them (minray.wait), or allow more.",
                    actor_id=actor_id.hex(),
                )
        self._minray_calls += 1

    def __dir__(self) -> list[str]:
        return list(self._minray_interface.methods)  # Wrappers of handles look here what can be called.

    def __repr__(self) -> str:
        return f"Actor({self._minray_interface.class_name}, {self._minray_id.hex()})"

    def __hash__(self) -> int:
        return hash(self._minray_id)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, ActorHandle) and other._minray_id == self._minray_id

    def __reduce__(self) -> Any:
        return (ActorHandle, (self._minray_ref, self._minray_interface))


def handle_of(actor_id: bytes, interface: bytes) -> ActorHandle:
    """A handle out of what the node knows."""
    return ActorHandle(restore(actor_id), deserialize(interface))


def _look_up(core: CoreWorker, name: str, namespace: str) -> ActorHandle | None:
    found = core.ask(lambda rid: ActorLookedUp(core.client, rid, namespace, name))
    if found is None:
        return None
    handle = handle_of(*found)
    core.unpinned.append(handle._minray_id)  # The node has kept it for us since it answered; the ref does now.
    return handle


def get_actor(name: str, namespace: str | None = None) -> ActorHandle:
    """The handle of a named actor.

    Raises ValueError when there is none of that name (in `namespace`, or in this job's).
    """
    if not isinstance(name, str) or not name:
        raise ValueError(f"get_actor() takes a name, got {name!r}.")
    core = api.core()
    space = namespace or core.namespace
    handle = _look_up(core, name, space)
    if handle is None:
        raise ValueError(
            f"there is no live actor named {name!r} in namespace {space!r}. "
            "Names are given with Class.options(name=...).remote() and are free again when the actor is dead."
        )
    return handle


def exit_actor() -> None:
    """End the actor whose method calls this; that call and later ones fail with ActorDiedError."""
    from minray.worker import ActorExit, Worker

    core = api.core()
    if not isinstance(core, Worker) or core.actor_id is None:
        raise TypeError(
            "exit_actor() ends the actor that calls it, and this is not an actor. To end another: minray.kill(handle)"
        )
    raise ActorExit("it called exit_actor()")


def _methods_of(cls: type) -> dict[str, dict[str, Any]]:
    methods = {}
    for name, member in inspect.getmembers(cls, callable):
        if (name.startswith("__") and name != "__call__") or isinstance(member, type):
            continue
        function = inspect.unwrap(member)
        methods[name] = getattr(function, _METHOD_OPTIONS, {})
        yields = inspect.isgeneratorfunction(function) or inspect.isasyncgenfunction(function)
        if yields and "num_returns" not in methods[name]:
            methods[name] = {**methods[name], "num_returns": "streaming"}
    return methods


def _has_coroutines(cls: type) -> bool:
    """Whether it has a method with `async def`, be it the constructor: then its calls share an event loop."""
    return any(
        inspect.iscoroutinefunction(member) or inspect.isasyncgenfunction(member)
        for base in cls.__mro__[:-1]
        for member in map(_function_in, vars(base).values())
    )


def _function_in(member: Any) -> Any:
    if isinstance(member, (staticmethod, classmethod)):
        member = member.__func__
    return inspect.unwrap(member) if inspect.isroutine(member) else member


def _signature_of(cls: type) -> inspect.Signature:
    """Of a constructor; one that takes anything where Python does not know."""
    anything = inspect.signature(lambda *args, **kwargs: None)
    if type(cls).__call__ is not type.__call__:
        return anything
    for maker in (cls.__init__, cls.__new__):  # type: ignore[misc]
        if maker is not object.__init__ and maker is not object.__new__:
            try:
                signature = inspect.signature(maker)
            except (TypeError, ValueError):
                return anything
            parameters = list(signature.parameters.values())
            if parameters and parameters[0].kind is not inspect.Parameter.VAR_POSITIONAL:
                del parameters[0]  # self or cls
            return signature.replace(parameters=parameters)
    return inspect.Signature()


__all__ = [
    "ActorClass", "ActorClassInheritanceException", "ActorHandle", "ActorMethod", "PendingCallsLimitExceeded",
    "exit_actor", "get_actor", "handle_of", "method",
]  # fmt: skip
