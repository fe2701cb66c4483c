"""What does an asynchronous call cost in this build, and what in another one?

    git worktree add ../before 1261a36
    python tests/compare_builds.py ../before --rounds 30

Rates swing by a factor of two on a machine that does other things as well, and the two builds would not meet the same half.  So this
counts CPU time, of all processes of a session together; the builds take turns, many short ones, each in a fresh process; and
what is compared are neighbours: printed is the median of the ratios, with its quartiles.

CPU time is what /proc/PID/schedstat says, in nanoseconds, before and after some batches (Linux).  It is not free of the others: who shares
a cache, or a core's second thread, with somebody runs slower.  Turns of a second see the same neighbours, mostly; and the fastest tenth of all
turns, shown as well, has met nobody.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parents[1]
BATCH = 1000
TURN_S = 0.4


def descendants() -> list[int]:
    """This process, and all that it and its children have started."""
    children: dict[int, list[int]] = {}
    for name in os.listdir("/proc"):
        if name.isdigit():
            try:
                with open(f"/proc/{name}/stat", "rb") as file:
                    parent = int(file.read().rpartition(b")")[2].split()[1])
            except OSError:
                continue
            children.setdefault(parent, []).append(int(name))
    found = [os.getpid()]
    for pid in found:
        found += children.get(pid, [])
    return found


def cpu_ns() -> dict[tuple[int, int], int]:
    """By process and thread."""
    spent: dict[tuple[int, int], int] = {}
    for pid in descendants():
        try:
            for thread in os.listdir(f"/proc/{pid}/task"):
                with open(f"/proc/{pid}/task/{thread}/schedstat", "rb") as file:
                    spent[pid, int(thread)] = int(file.read().split()[0])
        except OSError:
            continue  # It has ended.
    return spent


def batches(minray: Any) -> dict[str, tuple[Callable[[], object], int]]:
    """The asynchronous rows of the microbenchmark: a batch of each, and how many calls it is."""

    @minray.remote
    def small_value() -> bytes:
        return b"ok"

    @minray.remote
    def submit(count: int) -> int:
        return len(minray.get([small_value.remote() for _ in range(count)]))

    @minray.remote
    class Server:
        def small_value(self) -> bytes:
            return b"ok"

    server = Server.remote()
    get = minray.get
    return {
        "single client tasks async": (lambda: get([small_value.remote() for _ in range(BATCH)]), BATCH),
        "1:1 actor calls async": (lambda: get([server.small_value.remote() for _ in range(BATCH)]), BATCH),
        "nested tasks async": (lambda: get([submit.remote(BATCH // 2) for _ in range(2)]), BATCH),
    }


def take_turn() -> None:
    """In a process of its own, with one of the builds: µs of CPU time a call, of each row and part of it."""
    import minray

    answers = {}
    with minray.init(num_cpus=2):
        for name, (batch, count) in batches(minray).items():
            until = time.perf_counter() + TURN_S / 2
            while time.perf_counter() < until:
                batch()  # Warm.
            before, calls, until = cpu_ns(), 0, time.perf_counter() + TURN_S
            while time.perf_counter() < until:
                batch()
                calls += count
            time.sleep(0.06)  # Their rows are written behind.
            workers = [worker.pid for worker in minray.api._core.node.scheduler.workers.values()]
            parts = dict.fromkeys((name, "  driver", "  workers", "  GCS and zygote"), 0.0)
            for (pid, thread), ns in cpu_ns().items():
                took = (ns - before.get((pid, thread), 0)) / calls / 1000
                part = "  driver" if pid == os.getpid() else "  workers" if pid in workers else "  GCS and zygote"
                parts[name] += took
                parts[part] += took
            answers[name] = list(parts.items())
    print(json.dumps([part for row in answers.values() for part in row]))


def turn_of(build: Path) -> list[tuple[str, float]]:
    environment = {**os.environ, "PYTHONPATH": str(build)}
    command = [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(build)!r}); import minray; "
               f"assert minray.__file__.startswith({str(build)!r}), minray.__file__; "
               f"sys.path.append({str(HERE / 'tests')!r}); import compare_builds; compare_builds.take_turn()"]  # fmt: skip
    done = subprocess.run(command, env=environment, cwd=build, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)  # type: ignore[no-any-return]


def main() -> None:
    parser = argparse.ArgumentParser(description="CPU time a call: this build against another one.")
    parser.add_argument("other", type=Path, help="the other build's directory")
    parser.add_argument("--this", type=Path, default=HERE, metavar="DIR", help="instead of this one")
    parser.add_argument("--rounds", type=int, default=20, metavar="N", help="turns of each (%(default)s)")
    arguments = parser.parse_args()
    builds = [arguments.other.resolve(), arguments.this.resolve()]
    turns: list[list[list[tuple[str, float]]]] = [[], []]
    for number in range(arguments.rounds):
        for which in (0, 1) if number % 2 else (1, 0):
            turns[which].append(turn_of(builds[which]))
    print(f"{arguments.rounds} turns each   fastest tenth: other, this, ratio     median: other, this, ratio of neighbours (quartiles)")
    for number, (row, _) in enumerate(turns[0][0]):
        other, this = ([turn[number][1] for turn in side] for side in turns)
        low, ratio, high = statistics.quantiles([b / a for a, b in zip(other, this)], n=4)
        fast = [statistics.quantiles(side, n=10)[0] for side in (other, this)]
        fastest = f"{fast[0]:7.2f} {fast[1]:7.2f} {fast[1] / fast[0]:6.3f}"
        usual = f"{statistics.median(other):7.2f} {statistics.median(this):7.2f} {ratio:6.3f} ({low:.2f}-{high:.2f})"
        print(f"{row:28} {fastest}    {usual}   µs of CPU time a call")


if __name__ == "__main__":
    main()
