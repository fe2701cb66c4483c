"""``python -m minray.as_ray …`` is ``python …`` with a ``ray`` that is minray.

It replaces itself by a Python that finds ray in path/.  So the program is run by nobody but Python: it is
``__main__``, with its own tracebacks, its directory first in `sys.path`, and with every option that Python has.
"""

from __future__ import annotations

import os
import subprocess
import sys

from minray.as_ray import search_path

USAGE = """\
usage: python -m minray.as_ray [options of Python] script.py [arguments]
       python -m minray.as_ray -m module [arguments]        (-m pytest tests)
       python -m minray.as_ray -c program [arguments]

Runs a program written for Ray on minray, unchanged: in it, in its workers and in the processes that it starts,
`import ray` gives minray.  What is the same and what is not: docs/compatibility.md"""


def main(arguments: list[str]) -> None:
    if not arguments or arguments[0] in ("-h", "--help"):
        print(USAGE)
        raise SystemExit(0 if arguments else 2)
    options = subprocess._args_from_interpreter_flags()  # type: ignore[attr-defined]
    if sys.flags.ignore_environment or arguments[0] in ("-I", "-E"):
        raise SystemExit(
            "minray.as_ray: the options -I and -E make Python ignore PYTHONPATH, which is how the program finds minray "
            "under Ray's name. Leave them out."
        )
    environment = {**os.environ, "PYTHONPATH": search_path(os.environ.get("PYTHONPATH"))}
    os.execve(sys.executable, [sys.executable, *options, *arguments], environment)


if __name__ == "__main__":
    main(sys.argv[1:])
