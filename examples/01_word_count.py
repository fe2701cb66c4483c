"""Word count: tasks, and `wait` to take each result as soon as it is there.

The input is the source of Python's own standard library: some thousand files that are
already on your disk.  Each task counts the words of a few of them; the driver merges
the counts in the order in which tasks finish, so that a slow one holds nothing up.
At the end the same work is done in this process alone, and the two are compared.
"""

import argparse
import re
import sysconfig
import time
from collections import Counter
from pathlib import Path

import minray

WORD = re.compile(r"[A-Za-z_]\w+")

parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--files", type=int, default=None, help="count the first so many files only")
parser.add_argument("--files-per-task", type=int, default=30)


def count_words(paths):
    counts = Counter()
    for path in paths:
        counts.update(WORD.findall(path.read_text(encoding="utf-8", errors="replace")))
    return counts


count_words_remotely = minray.remote(count_words)  # What the decorator @minray.remote does.


def main(options):
    library = Path(sysconfig.get_path("stdlib"))
    paths = sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    paths = paths[: options.files]
    size = options.files_per_task
    batches = [paths[i : i + size] for i in range(0, len(paths), size)]

    started = time.perf_counter()
    unfinished = [count_words_remotely.remote(batch) for batch in batches]
    total = Counter()
    while unfinished:
        finished, unfinished = minray.wait(unfinished)
        total.update(minray.get(finished[0]))
    elapsed = time.perf_counter() - started

    megabytes = sum(path.stat().st_size for path in paths) / 1e6
    print(f"{len(paths)} files of {library}, {megabytes:.1f} MB")
    print(f"{total.total():,} words, {len(total):,} different ones; the most frequent:")
    for word, count in total.most_common(8):
        print(f"  {count:7,}  {word}")

    started = time.perf_counter()
    assert count_words(paths) == total, "the tasks and the plain loop disagree"
    alone = time.perf_counter() - started
    print(f"{len(batches)} tasks took {elapsed:.2f} s, a plain loop {alone:.2f} s; their counts agree")


if __name__ == "__main__":
    options = parser.parse_args()
    with minray.init():
        main(options)
