"""joblib's parallel loops on processes of minray.

joblib cuts a loop into batches (their size follows how long they take: `AutoBatchingMixin`,
joblib's own) and hands them to an `Executor`, which stays for all loops of one
``with parallel_backend("minray")``.

An array of `max_nbytes` (a megabyte) or more that is an argument of a call is put into the object store
once a loop, and all calls read that memory: cross-validation sends its data once, not with
each fit.  Such arrays are read-only in the calls, as those that joblib maps itself.

A loop inside a loop runs in threads of the process that it is in, and one inside that
without: joblib's rule, kept because the outermost loop has taken all CPUs already.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
from joblib.parallel import AutoBatchingMixin, FallbackToBackend, ParallelBackendBase, SequentialBackend

import minray
from minray import ObjectRef
from minray.util.executor import Executor
from minray.util.multiprocessing import cpu_count

_OF_JOBLIB = ("context", "mmap_mode", "temp_folder", "verbose")
"""What joblib says to every backend about forking and mapping files, which minray does in its own way."""


class _Shared:
    """Stands for an array in what is pickled; it is the array when it has arrived."""

    def __init__(self, ref: ObjectRef[Any]) -> None:
        self._ref = ref

    def __reduce__(self) -> Any:
        return (minray.get, (self._ref,))


class MinrayBackend(AutoBatchingMixin, ParallelBackendBase):  # type: ignore[misc]
    """Keyword arguments of `parallel_backend("minray", ...)` are options of the processes: ``num_cpus=1``, …"""

    supports_retrieve_callback = True
    supports_inner_max_num_threads = True

    def __init__(self, **given: Any) -> None:
        super().__init__(**given)
        self._executor: Executor | None = None
        self._share_from: int | None = None  # bytes; None: never
        self._shared: dict[int, tuple[Any, _Shared]] = {}  # by the address of the array, which is kept meanwhile

    def effective_n_jobs(self, n_jobs: int | None) -> int:
        if n_jobs == 0:
            raise ValueError("n_jobs == 0 in Parallel has no meaning")
        if n_jobs is None:
            return 1
        return n_jobs if n_jobs > 0 else max(cpu_count() + 1 + n_jobs, 1)

    def configure(
        self, n_jobs: int = 1, parallel: Any = None, prefer: Any = None, require: Any = None, **options: Any
    ) -> int:
        n_jobs = self.effective_n_jobs(n_jobs)
        if n_jobs == 1:
            raise FallbackToBackend(SequentialBackend(nesting_level=self.nesting_level))
        self.parallel = parallel
        self._share_from = options.pop("max_nbytes", None)
        options = {name: value for name, value in options.items() if name not in _OF_JOBLIB}
        executor = self._executor
        if executor is None or executor._max_workers != n_jobs or not executor.is_usable():
            environment = self._prepare_worker_env(n_jobs)
            self._executor = Executor(
                n_jobs,
                initializer=_limit_threads,
                initargs=(environment,),
                actor_options={**self.backend_kwargs, **options},
            )
        return n_jobs

    def start_call(self) -> None:
        self._shared.clear()

    stop_call = start_call

    def submit(self, func: Any, callback: Callable[[Any], Any] | None = None) -> Future[Any]:
        assert self._executor is not None
        if hasattr(func, "items"):  # joblib's BatchedCalls: (function, args, kwargs) each
            func.items = [
                (function, tuple(map(self._share, args)), {name: self._share(value) for name, value in kwargs.items()})
                for function, args, kwargs in func.items
            ]
        future = self._executor.submit(func)
        if callback is not None:
            future.add_done_callback(callback)
        return future

    def _share(self, value: Any) -> Any:
        if type(value) is not np.ndarray or self._share_from is None or value.nbytes < self._share_from:
            return value
        known = self._shared.get(id(value))
        if known is None:
            known = self._shared[id(value)] = value, _Shared(minray.put(value))
        return known[1]

    def retrieve_result_callback(self, future: Future[Any]) -> Any:
        return future.result()

    def terminate(self) -> None:
        """The end of one loop: the processes stay for the next, until this backend is dropped."""
        self.reset_batch_stats()

    def abort_everything(self, ensure_ready: bool = True) -> None:
        """A call has raised, or Ctrl-C: nobody wants the rest."""
        if self._executor is not None:
            self._executor.kill_workers()
            self._executor = None
        if ensure_ready:
            self.configure(n_jobs=self.parallel.n_jobs, parallel=self.parallel)

    def __reduce__(self) -> Any:
        raise TypeError("the backend of a running loop cannot be pickled")


def _limit_threads(environment: dict[str, str]) -> None:
    """So that n processes with n threads each do not fight for n CPUs.

    The environment is for libraries that are loaded later, threadpoolctl for those that are there."""
    os.environ.update(environment)
    try:
        import threadpoolctl
    except ImportError:
        return
    threadpoolctl.threadpool_limits(int(environment["OMP_NUM_THREADS"]))
