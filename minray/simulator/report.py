"""`minray simulate`: the command line, and how outcomes are shown: as text, in the terminal, as JSON or PNG."""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import os
import sys
import time
from collections.abc import Callable, Sequence

from minray.policy import Policy
from minray.simulator import costs as costing
from minray.simulator.costs import Costs
from minray.simulator.workloads import EXPERIMENTS, FAULTS, Line, Outcome, parse_faults, run_flood

WIDTH, HEIGHT = 72, 12
MARKS = "*o+x"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    parser = _parser()
    options = parser.parse_args(argv)
    try:
        return _run(options)
    except (OSError, ValueError) as error:
        print(f"minray simulate: {error}", file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="minray simulate",
        description="A cluster in virtual time: the real node, made-up machines. Same arguments, same run.",
    )
    add = parser.add_argument
    add("--nodes", type=int, default=10, help="how many machines (default: 10)")
    add("--workers", type=int, default=4, help="workers, and CPUs, of each (default: 4)")
    add("--tasks", type=int, default=100_000, help="how many tasks in all (default: 100000)")
    add("--task-ms", type=float, default=1.0, help="what a task takes, in milliseconds (default: 1)")
    add("--seed", type=int, default=0, help="of all that is random (default: 0)")
    add("--faults", default="", metavar="WHAT@SECONDS,...", help=f"{', '.join(FAULTS)}; with an argument: cut_node:2@5")
    add("--policy", metavar="FILE", help="a Python file with a subclass of minray.policy.Policy")
    add("--experiment", choices=list(EXPERIMENTS), help="one of the Ray paper's figures, instead of a flood of tasks")
    add("--costs", metavar="FILE", help="JSON with what things cost, as --calibrate writes it")
    add("--calibrate", nargs="?", const="-", metavar="FILE", help="measure this machine; print the costs (to FILE)")
    add("--json", action="store_true", help="print JSON, for programs")
    add("--plot", metavar="FILE", help="draw a PNG (needs matplotlib)")
    return parser


def _run(options: argparse.Namespace) -> int:
    if options.calibrate:
        costs = costing.calibrate()
        if options.calibrate != "-":
            costing.save(costs, options.calibrate)
        print(json.dumps(costs._asdict(), indent=2))
        return 0
    for name in ("nodes", "workers", "tasks"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be at least 1, not {getattr(options, name)}")
    if not 0 <= options.task_ms < math.inf:
        raise ValueError(f"--task-ms must be a number from 0, not {options.task_ms:g}")
    if options.plot:
        _check_plot(options.plot)
    costs = costing.load(options.costs) if options.costs else Costs()
    policy = load_policy(options.policy) if options.policy else Policy
    faults = parse_faults(options.faults)
    started = time.perf_counter()
    if options.experiment:
        if faults:
            raise ValueError("an experiment has its own faults: leave out --faults")
        outcome = EXPERIMENTS[options.experiment](options.seed, costs, policy)
    else:
        outcome = run_flood(
            options.nodes, options.workers, options.tasks, options.task_ms / 1e3, options.seed, costs, policy, faults
        )
    took_s = time.perf_counter() - started
    if options.json:
        found = {"title": outcome.title, "seed": options.seed, **outcome.figures, "real_s": round(took_s, 3)}
        found["lines"] = {line.name: line.points for line in outcome.lines}
        print(json.dumps(found))
    else:
        print(as_text(outcome))
        print(f"\n(seed {options.seed}; virtual time; simulated in {took_s:.1f} s of real time)")
    if options.plot:
        draw_png(outcome, options.plot)
    return 0


def load_policy(path: str) -> Callable[[], Policy]:
    """The subclass of `Policy` that the file defines.  Raises ValueError if there is not exactly one."""
    spec = importlib.util.spec_from_file_location("minray_simulated_policy", path)
    if spec is None or spec.loader is None:
        raise ValueError(f"{path} is no Python file")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    found = [
        value for value in vars(module).values()
        if isinstance(value, type) and issubclass(value, Policy) and value.__module__ == module.__name__
    ]  # fmt: skip
    if len(found) != 1:
        raise ValueError(f"{path} must define one subclass of minray.policy.Policy, and it has {len(found)}")
    return found[0]


def as_text(outcome: Outcome) -> str:
    lines = [outcome.title, ""]
    width = max(map(len, outcome.figures))
    for name, value in outcome.figures.items():
        shown = f"{value:,}" if isinstance(value, (int, float)) and not isinstance(value, bool) else str(value)
        if isinstance(value, list):
            shown = "; ".join(map(str, value)) or "-"
        lines.append(f"  {name:<{width}}  {shown}")
    lines += ["", *draw(outcome.lines, outcome.axes)]
    return "\n".join(lines)


def draw(lines: list[Line], axes: tuple[str, str]) -> list[str]:
    """For a terminal: each line's points, from 0 to the largest y."""
    points = [point for line in lines for point in line.points]
    if not points:
        return ["(too short to draw)"]
    most_y = max(y for _, y in points) or 1.0
    least_x, most_x = min(x for x, _ in points), max(x for x, _ in points)
    span = (most_x - least_x) or 1.0
    canvas = [[" "] * WIDTH for _ in range(HEIGHT)]
    for number, line in enumerate(lines):
        for x, y in line.points:
            column = round((x - least_x) / span * (WIDTH - 1))
            row = HEIGHT - 1 - round(y / most_y * (HEIGHT - 1))
            canvas[row][column] = MARKS[number % len(MARKS)]
    drawn = []
    for row, cells in enumerate(canvas):
        is_marked = row % 4 == 0 or row == HEIGHT - 1
        label = f"{most_y * (HEIGHT - 1 - row) / (HEIGHT - 1):>12,.0f}" if is_marked else " " * 12
        drawn.append(f"{label} |{''.join(cells).rstrip()}")
    drawn.append(" " * 13 + "+" + "-" * WIDTH)
    ends = f"{least_x:g}", f"{most_x:g}  {axes[0]}"
    drawn.append(" " * 14 + ends[0] + ends[1].rjust(WIDTH - len(ends[0])))
    if len(lines) > 1:
        drawn += [" " * 14 + f"{MARKS[n % len(MARKS)]} {line.name} ({axes[1]})" for n, line in enumerate(lines)]
    return drawn


def _check_plot(path: str) -> None:
    """Before minutes of simulation, what would make the drawing fail after them."""
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib, which is not installed: pip install matplotlib")
    if not os.path.isdir(os.path.dirname(os.path.abspath(path))):
        raise ValueError(f"--plot {path}: there is no such directory")


def draw_png(outcome: Outcome, path: str) -> None:
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    for line in outcome.lines:
        axis.plot([x for x, _ in line.points], [y for _, y in line.points], marker="o", markersize=3, label=line.name)
    axis.set_xlabel(outcome.axes[0])
    axis.set_ylabel(outcome.axes[1])
    axis.set_ylim(bottom=0)
    axis.set_title(outcome.title, fontsize=10)
    axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
