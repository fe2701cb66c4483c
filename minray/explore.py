"""Explore: run a program again and again, each time in another order, until one fails; and show that order.

A run is a session in local mode (local.py) in which a random number says at each step who goes on: which task or call
begins, which of those that wait and could go on does.  So what two callers of an actor, or two tasks, can do to
each other comes up within some dozens of runs, without a sleep; and as nothing else is left to chance, the number
that the run began with, its *seed*, repeats it exactly.

Owns the choice, the names of tasks in a schedule (``bump #2``), and the printed schedule.  Arguments and results are
shown without running any code of theirs.

Half of the runs prefer to let the same one go on: most races need few switches, and such schedules are easier to read.
Left out: trying all schedules (there are too many as soon as a program is of interest), and making a failing one
shorter (a seed among a hundred that fails with few steps is as good).
"""

from __future__ import annotations

import gc
import io
import os
import pickle
import random
import reprlib
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from minray import api, ids
from minray.serialization import in_words
from minray.stage import Candidate, Strand
from minray.task_spec import (
    ACTOR_CREATION, ACTOR_EXITED, ACTOR_METHOD, CANCELLED, OK, RETRYABLE_ERROR, TaskOptions, TaskSpec,
)  # fmt: skip

SEED_VARIABLE = "MINRAY_EXPLORE_SEED"
KEEP_GOING = (0.0, 0.0, 0.5, 0.8)
"""How likely a run lets the one go on that has just stood aside; each run draws one of these."""
LONGEST_SCHEDULE = 200
"""Of a longer one the first steps are left out when it is printed."""


class ExplorationFailed(AssertionError):
    """A schedule was found in which the program fails; the message shows it.  Its cause is the program's error."""

    seed: int
    """What repeats it."""
    schedule: list[str]
    """Its steps, one a line."""


class Exploration(NamedTuple):
    """What `explore` has tried."""

    seeds: int
    """How many runs there were."""
    schedules: int
    """How many of them differed in the order of their steps."""
    steps: int
    """Of all runs together."""


def explore(
    test: Callable[[], Any],
    seeds: Iterable[int] = range(100),
    *,
    num_cpus: float = 4,
    num_gpus: float = 0,
    resources: dict[str, float] | None = None,
    max_steps: int = 10_000,
    step_timeout_s: float | None = 60.0,
) -> Exploration:
    """Run `test` once for each seed, each time in another order of what can run at once; raise when one fails.

    A run has a session in local mode of its own, begun before `test` is called and ended after it.  Time is virtual:
    ``time.sleep`` and timeouts take none, and ``time.time`` and its kin follow.

    Args:
        test: a program that uses minray and calls no `init`; it fails by raising anything.
        seeds: whole numbers, one for each run.  MINRAY_EXPLORE_SEED in the environment takes their place.
        num_cpus, num_gpus, resources: of the sessions; a seed repeats a run only with the same.
        max_steps: a run that takes more is taken to go on for ever.
        step_timeout_s: real seconds that one step may take; None: any number.

    Raises:
        ExplorationFailed: with the first schedule that fails and its seed.  A deadlock is a failure, too.
        RuntimeError: there is a session already.

    >>> @minray.remote
    ... def double(x):
    ...     return 2 * x
    >>> def test():
    ...     assert minray.get([double.remote(i) for i in range(3)]) == [0, 2, 4]
    >>> minray.testing.explore(test, seeds=range(20)).seeds
    20
    """
    if not callable(test):
        raise TypeError(f"explore() takes a function that uses minray, got {test!r}")
    if api.is_initialized():
        raise RuntimeError(
            "explore() makes a session of its own for each run, and there is one already. Call minray.shutdown() first "
            "(with the pytest plugin: leave minray_session and its kin out of the test)."
        )
    wanted = os.environ.get(SEED_VARIABLE)
    if wanted:
        try:
            seeds = [int(wanted)]
        except ValueError:
            raise ValueError(f"{SEED_VARIABLE} must be a whole number, got {wanted!r}.") from None
    seeds = list(seeds)
    if not seeds or not all(type(seed) is int for seed in seeds):
        raise ValueError(f"explore(seeds=...) takes whole numbers, at least one, got {reprlib.repr(seeds)}.")
    amounts: dict[str, float] = {"CPU": num_cpus, "memory": float(1 << 40), **(resources or {})}
    if num_gpus:
        amounts["GPU"] = num_gpus
    seen, steps = set(), 0
    was_enabled, state = gc.isenabled(), random.getstate()
    # What the garbage collector drops, and when, must not depend on what was there before.
    gc.disable()
    gc.collect()
    gc.freeze()
    try:
        for number, seed in enumerate(seeds, 1):
            run = _Run(seed, amounts, max_steps, step_timeout_s)
            run.perform(test, number, len(seeds))
            seen.add(hash(tuple(run.turns)))
            steps += run.steps
    finally:
        random.setstate(state)
        gc.unfreeze()
        if was_enabled:
            gc.enable()
    return Exploration(len(seeds), len(seen), steps)


class _Run:
    """One run: chooses, and keeps the journal."""

    def __init__(self, seed: int, amounts: dict[str, float], max_steps: int, step_timeout_s: float | None) -> None:
        self.seed = seed
        self.amounts = amounts
        self.max_steps = max_steps
        self.step_timeout_s = step_timeout_s
        self.random = random.Random(seed)
        self.keep_going = self.random.choice(KEEP_GOING)
        self.names: dict[bytes, str] = {}
        self.counts: Counter[str] = Counter()
        self.turns: list[str] = []
        self.steps = 0
        self.lines: list[tuple[str, list[str]]] = [("driver", [])]

    def perform(self, test: Callable[[], Any], number: int, of: int) -> None:
        from minray.local import LocalDriver

        core = LocalDriver(
            self.amounts, 1 << 30, "explore", None, seed=b"explore", choose=self.choose, virtual=True
        )
        stage = core.stage
        stage.journal, stage.max_steps, stage.step_timeout_s = self, self.max_steps, self.step_timeout_s
        api.set_core(core)
        random.seed(self.seed)
        try:
            test()
        except BaseException as error:
            if not isinstance(error, Exception) and type(error).__name__ != "Failed":  # pytest.fail() raises that.
                raise
            raise self._failed(error, number, of) from error
        finally:
            self.steps = stage.steps
            stage.journal = None
            api.shutdown()
            gc.collect()

    def choose(self, candidates: list[Candidate]) -> int:
        if len(candidates) == 1:
            return 0
        if self.keep_going and self.random.random() < self.keep_going:
            latest = max(range(len(candidates)), key=lambda at: candidates[at][0])
            if candidates[latest][1] is not None:
                return latest
        return self.random.randrange(len(candidates))

    # ------------------------------------------------------------ the journal

    def turn(self, strand: Strand) -> None:
        self.turns.append(strand.name)
        last, notes = self.lines[-1]
        if last != strand.name:
            if not notes:
                notes.append("goes on")
            known = strand.is_driver or any(name == strand.name for name, _ in self.lines)
            self.lines.append((strand.name, [] if known else ["begins"]))

    def note(self, text: str) -> None:
        self.lines[-1][1].append(text)

    def submits(self, spec: TaskSpec, options: TaskOptions) -> None:
        name = options.name.rpartition("<locals>.")[2].removesuffix(".__init__")
        self.counts[name] += 1
        name = self.names[spec.task_id] = f"{name}#{self.counts[name]}"
        verb = {ACTOR_CREATION: "creates", ACTOR_METHOD: "calls"}.get(options.kind, "submits")
        self.note(f"{verb} {name}{self._arguments(spec)}")

    def waits(self, object_ids: Sequence[bytes]) -> None:
        names = list(dict.fromkeys(self.name_of(object_id) for object_id in object_ids))
        more = f" and {len(names) - 3} more" if len(names) > 3 else ""
        self.note(f"waits for {', '.join(names[:3])}{more}")

    def ends(self, task_id: bytes, status: int, payload: Any) -> None:
        if status == OK:
            if type(payload) is bytes:
                shown = _shown(payload, self.name_of)
                self.note("ends" if shown == "None" else f"returns {shown}")
            else:
                self.note("ends")
        elif status == CANCELLED:
            self.note("is cancelled")
        elif status == ACTOR_EXITED:
            self.note("ends its actor")
        else:
            self.note(f"raises {payload[1]}" + (", to be retried" if status == RETRYABLE_ERROR else ""))

    def name_of(self, object_id: bytes) -> str:
        object_id = bytes(object_id)
        if ids.is_put(object_id):
            return f"put {ids.short(object_id).rpartition('.p')[2]}"
        return self.names.get(ids.task_of(object_id)) or ids.short(object_id)

    def _arguments(self, spec: TaskSpec) -> str:
        if spec.args is None:
            return "()"
        return _shown_arguments(spec.args, self.name_of, spec.deps) if spec.args else "(...)"

    # ------------------------------------------------------------ the report

    def schedule(self) -> list[str]:
        steps = [(who, notes) for who, notes in self.lines if notes]
        width = max((len(who) for who, _ in steps), default=0)
        lines = []
        for number, (who, notes) in enumerate(steps, 1):
            together = [notes] if len("; ".join(notes)) > 80 else [["; ".join(notes)]]
            for at, text in enumerate(together[0]):
                lines.append(f"{number:4}  {who:{width}}  {text}" if not at else f"{'':{width + 6}}  {text}")
        return lines

    def _failed(self, error: BaseException, number: int, of: int) -> ExplorationFailed:
        lines = self.schedule()
        shown = lines[-LONGEST_SCHEDULE:]
        if len(shown) < len(lines):
            shown.insert(0, f"      ({len(lines) - len(shown):,} lines before)")
        failed = ExplorationFailed(
            f"the program fails when it runs in the order of seed {self.seed} (run {number} of {of}): "
            f"{in_words(error)}\n\n"
            + "\n".join(shown)
            + f"\n\nTo repeat exactly this: explore(..., seeds=[{self.seed}]), or {SEED_VARIABLE}={self.seed} in the "
            "environment."
        )
        failed.seed, failed.schedule = self.seed, lines
        return failed


# ---------------------------------------------------------------- values, shown without running their code


class _Thing:
    """Stands for an instance of any class, or for what any function returns."""

    def __init__(self, name: str) -> None:
        self.name = name

    def __setstate__(self, state: Any) -> None: ...

    def __repr__(self) -> str:
        return self.name

    def append(self, item: Any) -> None: ...

    def extend(self, items: Any) -> None: ...

    def __setitem__(self, key: Any, value: Any) -> None: ...


class _Shower(pickle.Unpickler):
    """Finds no class and no function: what would be called makes a `_Thing`."""

    def __init__(self, data: bytes, name_of: Callable[[bytes], str], deps: Sequence[bytes] = ()) -> None:
        super().__init__(io.BytesIO(data))
        self._name_of = name_of
        self._deps = deps

    def find_class(self, module: str, name: str) -> Any:
        def make(cls: Any, *args: Any) -> Any:
            thing: Any = object.__new__(made)
            if name == "Resolved":
                text = self._name_of(self._deps[args[0]])
            elif name == "restore":
                text = self._name_of(args[0])
            elif name == "ActorHandle":
                text = repr(args[0])
            else:
                text = f"<{name}>"
            _Thing.__init__(thing, text)
            return thing

        made = type(name, (_Thing,), {"__new__": make, "__init__": lambda self, *args: None})
        return made


_short = reprlib.Repr()
_short.maxstring = _short.maxother = 60


def _shown(data: bytes, name_of: Callable[[bytes], str]) -> str:
    try:
        return _short.repr(_Shower(data, name_of).load())
    except Exception:
        return "..."


def _shown_arguments(data: bytes, name_of: Callable[[bytes], str], deps: Sequence[bytes]) -> str:
    """Arguments are pickled as a tuple, or, with keywords, as a list of the tuple and the dict."""
    try:
        packed = _Shower(data, name_of, deps).load()
        positional, keywords = packed if type(packed) is list else (packed, {})
        parts = [_short.repr(arg) for arg in positional]
        parts += [f"{name}={_short.repr(value)}" for name, value in keywords.items()]
        return f"({', '.join(parts)})"
    except Exception:
        return "(...)"
