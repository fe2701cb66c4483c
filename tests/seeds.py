"""Seeds of the simulation, one after the other, until one fails: `python tests/seeds.py FIRST END [STEP]`.

Prints one line of JSON, {"ran", "seed", "said"}; "seed" is null if none has failed.  It is a program of its own so that
the suite uses all processors, and so that tests/planted.py can run it against another copy of minray.

`Node.check` looks at everything, and takes most of the time.  It looks after each event in every fifth seed, and
in the others after every seventh and at the end; what the world itself checks is checked after each event in all.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import traceback
from typing import Any


def check_every(seed: int) -> int:
    """So many events pass between two looks of `Node.check`."""
    return 7 if seed % 5 else 1  # 5, so that each of 2, 4 or 8 processes gets its share of both.


def run_seeds(seeds: range) -> dict[str, Any]:
    from simulation import Simulation

    for ran, seed in enumerate(seeds, 1):
        try:
            Simulation(seed, check_every=check_every(seed)).run()
        except Exception as error:
            at = traceback.extract_tb(error.__traceback__)[-1]
            said = str(error) if type(error) is AssertionError else repr(error)
            return {"ran": ran, "seed": seed, "said": said or f"{at.line} ({os.path.basename(at.filename)}:{at.lineno})"}
    return {"ran": len(seeds), "seed": None, "said": ""}


def start(seeds: range, minray_in: str) -> subprocess.Popen[str]:
    """A process that runs them, with the minray that is in that directory."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join((minray_in, os.path.dirname(os.path.abspath(__file__))))}
    command = [sys.executable, os.path.abspath(__file__), *map(str, (seeds.start, seeds.stop, seeds.step))]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True)


def outcome(process: subprocess.Popen[str]) -> dict[str, Any]:
    """What it found.  It is ended if this is interrupted."""
    with process:
        try:
            printed, _ = process.communicate()
        finally:
            process.kill()
    if process.returncode:
        raise RuntimeError(f"the seeds could not be run: exit code {process.returncode}, see above")
    return json.loads(printed)  # type: ignore[no-any-return]


if __name__ == "__main__":
    print(json.dumps(run_seeds(range(*map(int, sys.argv[1:])))))
