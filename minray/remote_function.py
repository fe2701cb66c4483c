"""``@minray.remote`` on a function: calls that run elsewhere and return futures."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any, Generic, TypeVar

from minray import api, options
from minray.core_worker import CoreWorker, name_of
from minray.generator import made_of, refuse_in_jobs
from minray.task_spec import TASK, TaskOptions

R = TypeVar("R")


class RemoteFunction(Generic[R]):
    """A function whose calls are tasks: ``f.remote(...)`` returns an `ObjectRef` at once.

    >>> @minray.remote
    ... def double(x):
    ...     return 2 * x
    >>> minray.get(double.remote(21))
    42
    """

    def __init__(self, function: Callable[..., R], given: dict[str, Any]) -> None:
        if inspect.iscoroutinefunction(function):
            raise TypeError(
                f"{function.__name__}() is a coroutine function, which cannot be a task. "
                "Use a plain function that calls asyncio.run(...)."
            )
        if inspect.isasyncgenfunction(function):
            raise TypeError(
                f"{function.__name__}() is an async generator function, which cannot be a task. "
                "Use a plain generator function, or a method of an actor."
            )
        self._function = function
        self._options = given
        self._num_returns, self._streaming, self._backpressure = options.returns_of(function, given)
        self._known_to: object = None  # the token of the core that knows it under the number:
        self._template_no = 0
        functools.update_wrapper(self, function)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        name = name_of(self._function)
        raise TypeError(
            f"{name} is a remote function: call it with {name}.remote(...), "
            f"or the function itself, in this process, with {name}._function(...)."
        )

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        """Submit a call; an `ObjectRef`, a list of them for num_returns > 1, None for num_returns=0.

        Of a generator function: an `ObjectRefGenerator`, unless num_returns says otherwise."""
        core = api.core()
        if core.token is not self._known_to:
            self._introduce(core)
        refs = core.submit(self._template_no, self._num_returns, args, kwargs)
        if self._num_returns == 1:
            return refs[0]
        if self._streaming:
            return made_of(core, refs, self._streaming, self._backpressure)
        return refs or None

    def _introduce(self, core: CoreWorker) -> None:
        given = self._options
        if self._streaming:
            refuse_in_jobs(core, name_of(self._function))
        function_id = core.export(self._function)
        resources = options.resources_of(given, default_cpus=1)
        name = given.get("name") or name_of(self._function).rpartition("<locals>.")[2]
        self._template_no = core.template(
            TaskOptions(
                kind=TASK,
                function_id=function_id,
                name=name,
                num_returns=self._num_returns,
                resources=resources,
                max_retries=given.get("max_retries", 3),
                retry_exceptions=options.retry_exceptions_of(given.get("retry_exceptions", False)),
                streaming=self._streaming,
                backpressure=self._backpressure,
                runtime_env=core.environment_of(given.get("runtime_env")),
                # As in Ray: what a library holds of a GPU's memory is free again only when its process has ended.
                max_calls=given.get("max_calls", 1 if given.get("num_gpus") else 0),
                placement=options.placement_of(given, resources, core.captured, name),
                labels=options.labels_of(given),
            )
        )
        self._known_to = core.token

    def options(self, **given: Any) -> RemoteFunction[R]:
        """The same function with other options."""
        return RemoteFunction(self._function, options.check(given, options.TASK, "options", self._options))

    def _remote(self, args: Any = (), kwargs: Any = None, **given: Any) -> Any:
        return self.options(**given).remote(*(args or ()), **(kwargs or {}))

    def bind(self, *args: Any, **kwargs: Any) -> Any:
        """A node of a graph that is run later: see `minray.dag`."""
        from minray.dag import FunctionNode

        return FunctionNode(self, args, kwargs)

    def __minray_counts__(self) -> Any:
        """For code_digest.py: of its other options only the environment changes a result."""
        return (self._function, self._num_returns, *options.environment_that_counts(self._options))

    def __reduce__(self) -> Any:
        return (RemoteFunction, (self._function, self._options))
