"""The demo: the four examples one after the other in one session, then what the GCS knows of it.

`make demo` runs this.  It ends with a summary of every function that ran, asked from the
session's SQLite file through `minray.state`, and with a picture of which worker ran what
and when.  The session's file stays on disk, for the `minray` command.
"""

import argparse
import importlib
import os
import shutil
import sys
import time
from pathlib import Path

import matplotlib

import minray
import minray.state

EXAMPLES = ["01_word_count", "02_external_sort", "03_parameter_server", "04_evolution_strategies"]

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--picture", default="demo-timeline.png", help="where the timeline picture goes")
parser.add_argument("--tiny", action="store_true", help="small inputs, to see that everything works")

TINY = {
    "01_word_count": ["--files=40", "--files-per-task=10"],
    "02_external_sort": ["--megabytes=24", "--store-megabytes=8", "--parts=6"],
    "03_parameter_server": ["--steps=400"],
    "04_evolution_strategies": ["--generations=2", "--directions=4", "--noise-megabytes=1"],
}


def headline(text):
    print(f"\n=== {text}", flush=True)


def run_example(name, module, arguments):
    headline(f"examples/{name}.py")
    print(module.__doc__.splitlines()[0])
    started = time.perf_counter()
    module.main(module.parser.parse_args(arguments))
    return time.perf_counter() - started


def print_summary(functions):
    width = max(map(len, functions))
    print(f"{'':{width}}  {'calls':>6}  {'mean ms':>9}  {'longest':>9}   states")
    for name, about in functions.items():
        calls = sum(about["state_counts"].values())
        states = ", ".join(f"{count:,} {state}" for state, count in about["state_counts"].items())
        mean, longest = about["run_us"] / calls / 1000, about["longest_us"] / 1000
        print(f"{name:{width}}  {calls:6,}  {mean:9.2f}  {longest:9.2f}   {states}")


def draw(tasks, path):
    """One row a worker, one bar a task, one colour a function."""
    matplotlib.use("Agg")  # A picture in a file needs no screen.
    from matplotlib import pyplot

    bars = {}
    for task in tasks:
        spans = bars.setdefault((task.func_or_class_name, task.worker_pid), [])
        spans.append((task.start_time_ms / 1000, task.run_us / 1e6))
    functions, workers = (list(dict.fromkeys(column)) for column in zip(*bars))
    zero = min(start for spans in bars.values() for start, _ in spans)
    figure, axes = pyplot.subplots(figsize=(12, 1.5 + 0.25 * len(workers)), layout="constrained")
    for (function, worker), spans in bars.items():
        colour = pyplot.colormaps["tab20"](functions.index(function) % 20)
        row = workers.index(worker)
        shifted = [(start - zero, seconds) for start, seconds in spans]
        # The thin edge keeps tasks visible that are shorter than a pixel.
        axes.broken_barh(shifted, (row - 0.4, 0.8), facecolors=colour, edgecolor=colour, linewidth=0.4)
    for number, function in enumerate(functions):
        axes.plot([], [], color=pyplot.colormaps["tab20"](number % 20), linewidth=6, label=function)
    axes.set(xlabel="seconds", ylabel="worker (pid)", title=f"{len(tasks):,} tasks on {len(workers)} workers")
    axes.set_yticks(range(len(workers)), [str(worker) for worker in workers], fontsize=7)
    axes.legend(loc="upper left", bbox_to_anchor=(1, 1), fontsize=8)
    figure.savefig(path, dpi=110)


def main(options):
    modules = {name: importlib.import_module(name) for name in EXAMPLES}
    arguments = {name: TINY[name] if options.tiny else [] for name in EXAMPLES}
    sort = modules["02_external_sort"].parser.parse_args(arguments["02_external_sort"])

    started = time.perf_counter()
    with minray.init(object_store_memory=sort.store_megabytes * 1_000_000):
        took = {name: run_example(name, module, arguments[name]) for name, module in modules.items()}

        headline("What the GCS has recorded")
        print_summary(minray.state.summarize_tasks()["cluster"]["summary"])
        finished = [("state", "=", "FINISHED")]
        draw(minray.state.list_tasks(filters=finished, limit=100_000, detail=True), options.picture)

    headline(f"All of it took {time.perf_counter() - started:.1f} s")
    for name, seconds in took.items():
        print(f"  {seconds:5.1f} s  {name}")
    print(f"The timeline is drawn in {options.picture}")
    # The command stands beside the Python that runs this, and is on the path only where that environment is active.
    command = "minray" if shutil.which("minray") else os.path.relpath(Path(sys.executable).with_name("minray"))
    print(f"More about this session:  {command} tasks    {command} summary    {command} sql 'select ...'")


if __name__ == "__main__":
    main(parser.parse_args())
