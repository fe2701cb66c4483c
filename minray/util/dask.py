"""A scheduler of Dask: ``dask.compute(x, scheduler=minray_dask_get)``.

Each task of Dask's graph is a task here, submitted at once with the refs of what it
depends on: intermediate results lie in the object store and never pass through the driver,
and each is freed when its last reader has run.  The order of submission is Dask's own
(`dask.order`), which keeps few of them alive at a time.

Tasks appear in the tables under Dask's names for them ("sum", "read-csv").

Left out: Dask's callbacks (its ProgressBar), which want the state of its own local scheduler;
`minray status` and `minray tasks` show how far a computation is.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import dask
from dask.core import flatten
from dask.order import order
from dask.utils import key_split

try:
    from dask._task_spec import Alias, DataNode, convert_legacy_graph
except ImportError as error:
    raise ImportError(f"minray.util.dask needs dask 2024.12 or newer, and this is {dask.__version__}.") from error

import minray


def _run_node(node: Any, keys: tuple[Any, ...], *values: Any) -> Any:
    return node(dict(zip(keys, values)))


def minray_dask_get(dsk: Any, keys: Any, *, ray_remote_args: Mapping[str, Any] | None = None) -> Any:
    """Compute `keys` of a graph of Dask; a scheduler as `dask.compute(scheduler=...)` takes it.

    Args:
        dsk: the graph.
        keys: a key, or a list of keys (of lists of keys, …).
        ray_remote_args: options of the tasks: ``dask.compute(x, ray_remote_args={"num_cpus": 2})``.

    Returns:
        The values, in the shape of `keys`.

    >>> import dask
    >>> from minray.util.dask import minray_dask_get
    >>> double = dask.delayed(lambda x: 2 * x)
    >>> total = dask.delayed(sum)([double(x) for x in range(5)])
    >>> dask.compute(total, scheduler=minray_dask_get)
    (20,)
    """
    graph = convert_legacy_graph(dsk if isinstance(dsk, Mapping) else dsk.__dask_graph__())
    wanted = list(flatten(keys)) if isinstance(keys, list) else [keys]
    readers = Counter(key for node in graph.values() for key in node.dependencies)
    readers.update(wanted)
    run = minray.remote(_run_node).options(**(ray_remote_args or {}))
    named: dict[str, Any] = {}
    refs: dict[Any, Any] = {}  # of what somebody is still to read
    priorities = order(graph)
    for key in sorted(graph, key=priorities.__getitem__):
        node = graph[key]
        if isinstance(node, Alias):
            refs[key] = refs[node.target]
        elif isinstance(node, DataNode):
            refs[key] = minray.put(node())
        else:
            name = key_split(key)
            if name not in named:
                named[name] = run.options(name=name)
            needed = tuple(node.dependencies)
            refs[key] = named[name].remote(node, needed, *(refs[other] for other in needed))
        for other in node.dependencies:
            readers[other] -= 1
            if not readers[other]:
                del refs[other]  # The tasks that read it keep it.
    values = dict(zip(wanted, minray.get([refs[key] for key in wanted])))
    return _in_shape(keys, values)


def _in_shape(keys: Any, values: dict[Any, Any]) -> Any:
    return tuple(_in_shape(key, values) for key in keys) if isinstance(keys, list) else values[keys]


def enable_dask_on_ray(shuffle: str | None = "tasks") -> Any:
    """Make this Dask's scheduler from now on, or for the length of a ``with`` block.

    Args:
        shuffle: how Dask shuffles data frames meanwhile: "tasks" or "disk"; None: as it is configured.
    """
    settings = {} if shuffle is None else {"dataframe.shuffle.method": shuffle}
    return dask.config.set({"scheduler": minray_dask_get, **settings})


def disable_dask_on_ray() -> Any:
    """Give Dask back the scheduler that it chooses itself."""
    return dask.config.set({"scheduler": None, "dataframe.shuffle.method": None})


ray_dask_get = minray_dask_get

__all__ = ["disable_dask_on_ray", "enable_dask_on_ray", "minray_dask_get", "ray_dask_get"]
