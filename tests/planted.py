"""Can the simulation find bugs?  Each patch in tests/planted/ is one; this shows which seed finds it, and by what.

`python tests/planted.py [NAME…] [--seeds N]` copies minray/, applies one patch, runs seeds until one fails, and so on.

A patch is prose (what the bug is, who makes such ones, how it shows) and a unified diff.  It is applied by its
context, which must be in the file exactly once, letter by letter; line numbers are not looked at.  So a patch
whose source has changed does not apply: then see whether the bug is still possible, and write its lines anew.
What only one seed in thousands meets says "Search from seed N." in its prose: the 10,000 of a push find it, too.
"""

from __future__ import annotations

import argparse
import re
import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import seeds

HERE = Path(__file__).parent
PATCHES = HERE / "planted"
SOURCE = HERE.parent / "minray"
MAX_SEEDS = 1000


class Hunk(NamedTuple):
    path: str  # beginning with minray/
    before: list[str]
    after: list[str]


class DoesNotApply(Exception):
    pass


def names() -> list[str]:
    return sorted(path.stem for path in PATCHES.glob("*.patch"))


def parse(text: str) -> tuple[str, list[Hunk]]:
    """The prose, and the hunks."""
    prose, _, diff = text.partition("\n--- a/")
    hunks: list[Hunk] = []
    path = ""
    before: list[str] = []
    after: list[str] = []

    def close() -> None:
        if before or after:
            hunks.append(Hunk(path, before[:], after[:]))
            before.clear()
            after.clear()

    for line in ("--- a/" + diff).splitlines():
        if line.startswith("--- a/"):
            close()
        elif line.startswith("+++ b/"):
            path = line.removeprefix("+++ b/")
        elif line.startswith("@@ "):
            close()
        else:
            if line[:1] in (" ", "-", ""):
                before.append(line[1:])
            if line[:1] in (" ", "+", ""):
                after.append(line[1:])
    close()
    return prose.strip(), hunks


def apply(hunks: list[Hunk], root: Path) -> None:
    for hunk in hunks:
        file = root / hunk.path
        lines, length = file.read_text().splitlines(), len(hunk.before)
        found = [at for at in range(len(lines) - length + 1) if lines[at : at + length] == hunk.before]
        if len(found) != 1:
            told = "\n".join(hunk.before)
            raise DoesNotApply(f"these lines are {len(found)} times in {hunk.path}, not once:\n{told}")
        lines[found[0] : found[0] + length] = hunk.after
        file.write_text("\n".join(lines) + "\n")


def search(name: str, max_seeds: int = MAX_SEEDS) -> dict[str, Any]:
    """What `seeds.run_seeds` found in a minray with that bug."""
    prose, hunks = parse((PATCHES / f"{name}.patch").read_text())
    if not prose or not hunks:
        raise DoesNotApply(f"{name}.patch lacks its prose or its diff")
    with tempfile.TemporaryDirectory(prefix="minray-planted-") as directory:
        shutil.copytree(SOURCE, Path(directory) / "minray", ignore=shutil.ignore_patterns("__pycache__"))
        apply(hunks, Path(directory))
        hint = re.search(r"Search from seed (\d+)\.", prose)
        first = int(hint[1]) if hint else 0
        return seeds.outcome(seeds.start(range(first, first + max_seeds), directory))


def main() -> int:
    parser = argparse.ArgumentParser(description="Which seed finds which planted bug.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"of {', '.join(names())}; all if none is given")
    parser.add_argument("--seeds", type=int, default=MAX_SEEDS, metavar="N", help="give up after so many (%(default)s)")
    arguments = parser.parse_args()
    if unknown := sorted(set(arguments.names) - set(names())):
        parser.error(f"there is no {', '.join(unknown)} in {PATCHES}")
    print(f"{'bug':34} {'seed':>5} {'after':>6}  what was said")
    missed = 0
    for name in arguments.names or names():
        try:
            found = search(name, arguments.seeds)
        except DoesNotApply as why:
            missed += 1
            print(f"{name:34} {'-':>5} {'-':>6}  DOES NOT APPLY: {why}", flush=True)
            continue
        missed += found["seed"] is None
        if found["seed"] is None:
            print(f"{name:34} {'-':>5} {found['ran']:>6}  NOT FOUND", flush=True)
        else:
            print(f"{name:34} {found['seed']:>5} {found['ran']:>6}  {found['said'][:100]}", flush=True)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
