"""Graphs of calls that are made first and run later: `bind` in place of `remote`, then `execute`.

A node is what to call and with which arguments; arguments that are nodes are its parents.
`execute` walks the graph once, parents first, and calls ``.remote`` for each node, with the
refs of its parents: so the tasks of a graph run as any others do, each as soon as its
arguments are there.  A node that several others use runs once.

Nothing is kept between two runs: a class node makes a new actor in each.  Calls to a class
node's actor run in the order in which they were bound, and a call takes those bound before
it along, even if their results are used nowhere: they may have changed the actor.

Left out: compiled graphs (Ray's `experimental_compile`), which keep channels between actors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from minray import options as known_options
from minray.actor import ActorClass, ActorMethod
from minray.core_worker import name_of
from minray.remote_function import RemoteFunction

PARENT_CLASS_NODE_KEY = "parent_class_node"
PREV_CLASS_METHOD_CALL_KEY = "prev_class_method_call"
"""Ray's names for the two parents of a method's node that are not among its arguments."""


class DAGNode:
    """A call that has not been made."""

    def __init__(self, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> None:
        self._args = args
        self._kwargs = kwargs or {}

    def execute(self, *args: Any, **kwargs: Any) -> Any:
        """Run the graph that ends here; what ``.remote`` returns, at once.

        Args:
            args, kwargs: what the graph's `InputNode` stands for.

        >>> @minray.remote
        ... def add(a, b):
        ...     return a + b
        >>> graph = add.bind(add.bind(1, 2), 3)
        >>> minray.get(graph.execute())
        6
        """
        order = self._parents_first()
        inputs = [node for node in order if isinstance(node, InputNode)]
        if len(inputs) > 1:
            raise ValueError(f"a graph has one InputNode, this one has {len(inputs)}.")
        if inputs and not args and not kwargs:
            raise TypeError("the graph has an InputNode: execute() takes the value that it stands for.")
        if not inputs and (args or kwargs):
            raise TypeError("execute() was given an input, and the graph has no InputNode to take it.")
        results: dict[DAGNode, Any] = {}
        for given in inputs:
            results[given] = args[0] if len(args) == 1 and not kwargs else _Several(args, kwargs)
        for node in order:
            if node not in results:
                results[node] = node._run(results)
        return results[self]

    def _parents_first(self) -> list[DAGNode]:
        """The nodes of the graph, each once.  A loop: a chain may be longer than Python's stack."""
        order: dict[DAGNode, None] = {}
        waiting: list[DAGNode] = [self]
        while waiting:
            first = [parent for parent in waiting[-1]._parents() if parent not in order]
            if first:
                waiting.extend(reversed(first))
            else:
                order[waiting.pop()] = None
        return list(order)

    def get_args(self) -> tuple[Any, ...]:
        return self._args

    def get_kwargs(self) -> dict[str, Any]:
        return dict(self._kwargs)

    def get_options(self) -> dict[str, Any]:
        return {}

    def get_other_args_to_resolve(self) -> dict[str, Any]:
        """Parents that are not among the arguments."""
        return {}

    def experimental_compile(self, *args: Any, **kwargs: Any) -> Any:
        raise NotImplementedError("experimental_compile(): compiled graphs are not supported yet; use execute().")

    def _parents(self) -> Iterator[DAGNode]:
        for parent in self.get_other_args_to_resolve().values():
            if parent is not None:
                yield parent
        yield from _nodes_in((self._args, self._kwargs))

    def _run(self, results: dict[DAGNode, Any]) -> Any:
        """Make the call, now that the results of all parents are there."""
        raise NotImplementedError


class FunctionNode(DAGNode):
    """`f.bind(...)`."""

    def __init__(self, function: RemoteFunction[Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(args, kwargs)
        self._function = function

    def get_options(self) -> dict[str, Any]:
        return dict(self._function._options)

    def _run(self, results: dict[DAGNode, Any]) -> Any:
        return self._function.remote(*_resolved(self._args, results), **_resolved(self._kwargs, results))

    def __repr__(self) -> str:
        return f"{name_of(self._function._function)}.bind(...)"


class ClassNode(DAGNode):
    """`Class.bind(...)`: its methods are bound as ``node.method.bind(...)``; `execute` returns a handle.

    >>> @minray.remote
    ... class Counter:
    ...     def __init__(self, start):
    ...         self.value = start
    ...     def add(self, x):
    ...         self.value += x
    ...     def get(self):
    ...         return self.value
    >>> counter = Counter.bind(10)
    >>> _ = counter.add.bind(5)
    >>> minray.get(counter.get.bind().execute())
    15
    """

    def __init__(self, actor_class: ActorClass, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        super().__init__(args, kwargs)
        self._actor_class = actor_class
        self._last_call: ClassMethodNode | None = None

    def get_options(self) -> dict[str, Any]:
        return dict(self._actor_class._options)

    def _run(self, results: dict[DAGNode, Any]) -> Any:
        return self._actor_class.remote(*_resolved(self._args, results), **_resolved(self._kwargs, results))

    def __getattr__(self, name: str) -> _BindableMethod:
        if name.startswith("_"):
            raise AttributeError(name)
        methods = self._actor_class._methods
        if name not in methods:
            hint = known_options.nearest(name, methods).replace("=?", ".bind()?")
            raise AttributeError(f"class {self._actor_class.__name__} has no method {name!r}.{hint}")
        return _BindableMethod(self, name, {})

    def __repr__(self) -> str:
        return f"{self._actor_class.__name__}.bind(...)"


class _BindableMethod:
    """`node.method` of a class node."""

    def __init__(self, node: ClassNode, name: str, given: dict[str, Any]) -> None:
        self._node = node
        self._name = name
        self._given = given

    def options(self, **given: Any) -> _BindableMethod:
        checked = known_options.check(given, known_options.METHOD, "options")
        return _BindableMethod(self._node, self._name, {**self._given, **checked})

    def bind(self, *args: Any, **kwargs: Any) -> ClassMethodNode:
        node = self._node
        node._last_call = ClassMethodNode(self._name, args, kwargs, node, node._last_call, self._given)
        return node._last_call

    def remote(self, *args: Any, **kwargs: Any) -> Any:
        raise AttributeError(
            f"{self._name}.remote(): the actor of a bound class is not there yet. Did you mean {self._name}.bind(...)?"
        )


class ClassMethodNode(DAGNode):
    """A method's `bind`, of a class node or of the handle of a live actor."""

    def __init__(
        self,
        method: str | ActorMethod,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        parent: ClassNode | None = None,
        before: ClassMethodNode | None = None,
        given: dict[str, Any] | None = None,
    ) -> None:
        super().__init__(args, kwargs)
        self._method = method
        self._parent = parent
        self._before = before
        self._given = given or {}

    def get_options(self) -> dict[str, Any]:
        return dict(self._given if isinstance(self._method, str) else self._method._template.given)

    def get_other_args_to_resolve(self) -> dict[str, Any]:
        if self._parent is None:
            return {}
        return {PARENT_CLASS_NODE_KEY: self._parent, PREV_CLASS_METHOD_CALL_KEY: self._before}

    def get_method_name(self) -> str:
        return self._method if isinstance(self._method, str) else self._method._template.name

    def _run(self, results: dict[DAGNode, Any]) -> Any:
        method = self._method
        if isinstance(method, str):
            assert self._parent is not None  # A method of a live actor is no name, but the method itself.
            method = getattr(results[self._parent], method)
            if self._given:
                method = method.options(**self._given)
        return method.remote(*_resolved(self._args, results), **_resolved(self._kwargs, results))

    def __repr__(self) -> str:
        return f"{self.get_method_name()}.bind(...)"


class InputNode(DAGNode):
    """Stands for what `execute` is given.

    One value: the node is that value, ``node[key]`` and ``node.name`` are its items and attributes.  Several: they are
    taken out as ``node[0]``, ``node.name``.

    >>> from minray.dag import InputNode
    >>> @minray.remote
    ... def scale(x, factor):
    ...     return x * factor
    >>> with InputNode() as given:
    ...     graph = scale.bind(given[0], given.factor)
    >>> minray.get(graph.execute(7, factor=6))
    42
    """

    def __init__(self, *, input_type: Any = None) -> None:
        super().__init__()
        self.input_type = input_type  # for those who read the graph; nothing is checked against it

    def __enter__(self) -> InputNode:
        return self

    def __exit__(self, *exc: Any) -> None:
        pass

    def __getitem__(self, key: Any) -> InputAttributeNode:
        return InputAttributeNode(self, key, is_item=True)

    def __getattr__(self, name: str) -> InputAttributeNode:
        if name.startswith("_"):
            raise AttributeError(name)
        return InputAttributeNode(self, name, is_item=False)

    def __iter__(self) -> Any:
        raise TypeError("an InputNode has no length; its parts are node[0], node[1], ...")

    def __repr__(self) -> str:
        return "InputNode()"


class _Several:
    """The input, where it is more than one value."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.args = args
        self.kwargs = kwargs

    def part(self, key: Any) -> Any:
        try:
            return self.args[key] if isinstance(key, int) else self.kwargs[key]
        except LookupError:
            raise ValueError(
                f"the graph wants the part {key!r} of its input; execute() was given {len(self.args)} values"
                + (f" and {', '.join(self.kwargs)}." if self.kwargs else ".")
            ) from None


class InputAttributeNode(DAGNode):
    """A part of the input: ``input_node[key]`` or ``input_node.name``."""

    def __init__(self, whole: InputNode, key: Any, is_item: bool) -> None:
        super().__init__((whole,))
        self._whole = whole
        self._key = key
        self._is_item = is_item

    def _run(self, results: dict[DAGNode, Any]) -> Any:
        whole = results[self._whole]
        if isinstance(whole, _Several):
            return whole.part(self._key)
        return whole[self._key] if self._is_item else getattr(whole, self._key)

    def __repr__(self) -> str:
        return f"InputNode()[{self._key!r}]" if self._is_item else f"InputNode().{self._key}"


class MultiOutputNode(DAGNode):
    """A graph with several results: `execute` returns the list of their refs.

    >>> from minray.dag import InputNode, MultiOutputNode
    >>> @minray.remote
    ... def plus(x, y):
    ...     return x + y
    >>> with InputNode() as x:
    ...     graph = MultiOutputNode([plus.bind(x, 1), plus.bind(x, 2)])
    >>> minray.get(graph.execute(10))
    [11, 12]
    """

    def __init__(self, args: list[DAGNode] | tuple[DAGNode, ...]) -> None:
        if not isinstance(args, (list, tuple)):
            raise ValueError(f"MultiOutputNode() takes a list of nodes, got {args!r}.")
        super().__init__(tuple(args))

    def _run(self, results: dict[DAGNode, Any]) -> Any:
        return list(_resolved(self._args, results))

    def __repr__(self) -> str:
        return f"MultiOutputNode({list(self._args)})"


def _nodes_in(value: Any) -> Iterator[DAGNode]:
    """Nodes among arguments, in lists, tuples and dicts as well."""
    if isinstance(value, DAGNode):
        yield value
    elif type(value) in (list, tuple):
        for item in value:
            yield from _nodes_in(item)
    elif type(value) is dict:
        for item in value.values():
            yield from _nodes_in(item)


def _resolved(value: Any, results: dict[DAGNode, Any]) -> Any:
    """The same value with each node's result in its place."""
    if isinstance(value, DAGNode):
        result = results[value]
        if isinstance(result, _Several):
            raise ValueError(
                "execute() was given several values: take them from the InputNode, as node[0] or as node.name."
            )
        return result
    if type(value) in (list, tuple):
        return type(value)(_resolved(item, results) for item in value)
    if type(value) is dict:
        return {key: _resolved(item, results) for key, item in value.items()}
    return value


__all__ = [
    "PARENT_CLASS_NODE_KEY", "PREV_CLASS_METHOD_CALL_KEY", "ClassMethodNode", "ClassNode", "DAGNode", "FunctionNode",
    "InputAttributeNode", "InputNode", "MultiOutputNode",
]  # fmt: skip
