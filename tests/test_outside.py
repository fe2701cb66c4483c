"""Programs that were written for Ray, unchanged, as judges: tests/outside.

programs/ follow the patterns of Ray's documentation and import nothing but ray (and numpy); they always run.
libraries/ use a library from PyPI that uses Ray; each runs where that library is installed, and is skipped elsewhere:

    pip install -e ".[outside]"
    pip install --no-deps easy-ray-threads ray-ease ray-map     # These name Ray among their needs.
    pytest -m outside
"""

import ast
import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.one_python

OUTSIDE = Path(__file__).parent / "outside"
PROGRAMS = sorted((OUTSIDE / "programs").glob("*.py"))
LIBRARIES = sorted((OUTSIDE / "libraries").glob("*.py"))
ENVIRONMENT = {
    "modin_frame.py": {"MINRAY_PLACEHOLDERS": "ray.data"},
    "xgboost_ray_train.py": {"MINRAY_PLACEHOLDERS": "ray.train"},
}
"""What a library's program needs beside itself: docs/compatibility.md says why."""


def run(path, directory):
    how = ["-m", "pytest", "-q", "-p", "no:cacheprovider"] if path.stem.endswith("_tests") else []
    return subprocess.run(
        [sys.executable, "-m", "minray.as_ray", *how, str(path)],
        capture_output=True, text=True, timeout=110, cwd=directory,
        env={**os.environ, **ENVIRONMENT.get(path.name, {})},
    )  # fmt: skip


def judge(path, directory):
    done = run(path, directory)
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-6000:]}"


@pytest.mark.parametrize("path", PROGRAMS, ids=lambda path: path.stem)
def test_a_program_of_the_documentations_kind_runs(path, tmp_path):
    judge(path, tmp_path)


def needed(path):
    """The modules that a program imports: other than ray and the standard library's."""
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        names = [one.name for one in node.names] if isinstance(node, ast.Import) else [getattr(node, "module", None)]
        for name in names:
            root = (name or "").partition(".")[0]
            if isinstance(node, (ast.Import, ast.ImportFrom)) and root not in (*sys.stdlib_module_names, "ray"):
                yield root


@pytest.mark.outside
@pytest.mark.parametrize("path", LIBRARIES, ids=lambda path: path.stem)
def test_a_library_that_uses_ray_runs(path, tmp_path):
    missing = sorted({name for name in needed(path) if importlib.util.find_spec(name) is None})
    if missing:
        pytest.skip(f"not installed: {', '.join(missing)}")
    judge(path, tmp_path)


def test_programs_import_ray_and_nothing_of_minray():
    for path in PROGRAMS + LIBRARIES:
        assert set(needed(path)).isdisjoint({"minray"}), path
        assert "import ray" in path.read_text("utf-8") or path in LIBRARIES, path
    for path in PROGRAMS:
        assert set(needed(path)) <= {"numpy", "pytest", "travelling_module"}, path
