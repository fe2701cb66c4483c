"""What the documentation shows is run, and what it says of the code is looked up.

A page is run from top to bottom, as a reader would who types it into one interpreter:

    ```python   is executed; all blocks of a page share one namespace
    ```text     straight after a python block: what that block prints ("..." stands for anything)
    ```console  lines that begin with "$ minray" are given to the command, which must succeed; if
                output is shown, its first line (a table's heads, mostly) must be among what is printed

Every page and every docstring has a session of its own.  To bring docs/schema.md up to date:

    python tests/test_docs.py
"""

import contextlib
import doctest
import importlib
import io
import os
import pkgutil
import re
import shlex
import sys
import textwrap
import time
from pathlib import Path

import pytest

import minray
from minray import as_ray, command, node_tables, schema

pytestmark = pytest.mark.one_python

ROOT = Path(__file__).resolve().parent.parent
PAGES = sorted([ROOT / "README.md", *(ROOT / "docs").rglob("*.md")])
BLOCK = re.compile(r"^```(python|text|console)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
BETWEEN = "<!-- schema:begin -->\n", "<!-- schema:end -->\n"
OUTPUT_WITHIN_S = 5.0
"""What workers print arrives when it arrives; a page that shows it is waited for so long."""


def page_id(path):
    return str(path.relative_to(ROOT))


def blocks(page):
    """(language, text, line of its first character, whether only blank lines part it from the one before)"""
    text = page.read_text(encoding="utf-8")
    found, end = [], 0
    for match in BLOCK.finditer(text):
        line = text.count("\n", 0, match.start(2)) + 1
        found.append((match[1], match[2], line, not text[end : match.start()].strip()))
        end = match.end()
    return found


def agree(expected, got):
    check = doctest.OutputChecker().check_output
    return check(expected, got, doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)


def run_python(page, code, line, namespace, expected):
    # Empty lines in front, so that a traceback names the line of the page.
    program = compile("\n" * (line - 1) + code, str(page), "exec")
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        exec(program, namespace)
        deadline = time.monotonic() + OUTPUT_WITHIN_S
        while expected is not None and not agree(expected, printed.getvalue()) and time.monotonic() < deadline:
            if not minray.is_initialized():
                break
            minray.wait([minray.put(None)], timeout=0)  # Workers' lines are printed by whoever runs the loop.
            time.sleep(0.02)
    if expected is not None and not agree(expected, printed.getvalue()):
        pytest.fail(
            f"{page_id(page)}:{line}: the block printed\n{textwrap.indent(printed.getvalue(), '    ')}"
            f"and the page shows\n{textwrap.indent(expected, '    ')}",
            pytrace=False,
        )


def run_console(page, text, line):
    shown = text.splitlines()
    for at, prompt in enumerate(shown):
        if not prompt.startswith("$ minray "):
            continue
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            status = command.main(shlex.split(prompt.partition("#")[0])[2:])
        assert status == 0, f"{page_id(page)}:{line + at}: {prompt} ended with status {status}"
        first = shown[at + 1] if at + 1 < len(shown) else "$"
        if first and not first.startswith("$"):
            lines = [" ".join(one.split()) for one in printed.getvalue().splitlines()]
            assert any(agree(" ".join(first.split()), one) for one in lines), (
                f"{page_id(page)}:{line + at}: {prompt} printed\n{printed.getvalue()}"
            )


@pytest.mark.parametrize("page", [page for page in PAGES if blocks(page)], ids=page_id)
def test_what_a_page_shows_runs_and_prints_what_it_shows(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "__main__"}
    found = blocks(page)
    try:
        for at, (language, text, line, _) in enumerate(found):
            if language == "python":
                follows = at + 1 < len(found) and found[at + 1][0] == "text" and found[at + 1][3]
                run_python(page, text, line, namespace, found[at + 1][1] if follows else None)
            elif language == "console":
                run_console(page, text, line)
    finally:
        namespace.clear()
        minray.shutdown()
        as_ray.uninstall()


def docstrings():
    for module in pkgutil.walk_packages(minray.__path__, "minray."):
        yield from with_examples(importlib.import_module(module.name))
    yield from with_examples(minray)


def with_examples(module):
    for found in doctest.DocTestFinder(exclude_empty=True).find(module, extraglobs={"minray": minray}):
        if found.examples:
            yield pytest.param(found, id=found.name)


@pytest.mark.parametrize("docstring", list(docstrings()))
def test_examples_of_docstrings_show_what_happens(docstring, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    report = io.StringIO()
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    docstring.globs["__name__"] = "__main__"
    try:
        failed = runner.run(docstring, out=report.write).failed
    finally:
        minray.shutdown()
    assert not failed, report.getvalue()


# ---------------------------------------------------------------- what pages say


def test_links_between_pages_lead_somewhere():
    for page in PAGES:
        text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.MULTILINE | re.DOTALL)
        for target in re.findall(r"\]\(([^)]+)\)", text):
            if re.match(r"https?:", target):
                continue
            path, _, anchor = target.partition("#")
            aim = (page.parent / path).resolve() if path else page
            assert aim.exists(), f"{page_id(page)} links to {target}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", aim.read_text(encoding="utf-8"), re.MULTILINE)
                assert anchor in map(slug, heads), f"{page_id(page)} links to {target}, a heading that is not there"


def slug(head):
    """The anchor that GitHub gives to a heading."""
    return re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-")


def test_names_of_minray_and_files_that_pages_mention_exist():
    for page in PAGES:
        text = page.read_text(encoding="utf-8")
        for name in set(re.findall(r"`@?minray\.([a-z_][\w.]*)", text)):
            assert resolve(name.rstrip(".")), f"{page_id(page)} mentions minray.{name}, which does not exist"
        for path in set(re.findall(r"`((?:minray|examples|tests|docs)/[\w./-]+)`", text)):
            assert (ROOT / path).exists(), f"{page_id(page)} mentions {path}, which does not exist"


def resolve(name):
    thing, path = minray, "minray"
    for part in name.split("."):
        path += f".{part}"
        with contextlib.suppress(ImportError):
            thing = importlib.import_module(path)
            continue
        if not hasattr(thing, part):
            return False
        thing = getattr(thing, part)
    return True


def test_decisions_are_numbered_and_dated():
    pages = sorted((ROOT / "docs" / "decisions").glob("*.md"))
    assert [page.name[:9] for page in pages] == [f"{n:04}-why-" for n in range(1, len(pages) + 1)]
    for page in pages:
        text = page.read_text(encoding="utf-8")
        assert re.match(rf"# {page.name[:4]}\. Why .*\n\n\d{{4}}-\d\d-\d\d\. ", text), page_id(page)
        assert len(text.split()) < 450, f"{page_id(page)} is longer than half a page"


def figures(page):
    """Rows of the table between the markers, by their first cell."""
    found = re.search(r"<!-- figures:begin -->(.*?)<!-- figures:end -->", page.read_text("utf-8"), re.DOTALL)
    assert found, f"{page_id(page)} has no figures between markers"
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in found[1].splitlines() if line[:1] == "|"]
    assert rows, f"{page_id(page)} has no table of figures"
    return {row[0]: row[1:] for row in rows}


def test_figures_in_the_readme_are_those_of_the_performance_page():
    measured = figures(ROOT / "docs" / "performance.md")
    for name, cells in figures(ROOT / "README.md").items():
        assert name in measured, f"README has a row {name!r} that docs/performance.md has not"
        if any(cells[1:]):
            assert cells == measured[name][: len(cells)], f"README's row {name!r} is not that of docs/performance.md"


def with_schema(text):
    head, rest = text.split(BETWEEN[0])
    tail = rest.split(BETWEEN[1])[1]
    body = "\n".join(["```", *schema.documentation(), "```", ""])
    return head + BETWEEN[0] + body + BETWEEN[1] + tail


def test_the_schema_page_is_what_the_schema_says():
    page = ROOT / "docs" / "schema.md"
    assert page.read_text("utf-8") == with_schema(page.read_text("utf-8")), "run python tests/test_docs.py"


def test_the_reading_order_leads_past_every_module():
    order = (ROOT / "docs" / "architecture.md").read_text("utf-8").partition("## Reading order")[2]
    named = set(re.findall(r"`(\w+)`", order))
    chapters = set(re.findall(r"^(\w+)\.py ", node_tables.__doc__, re.MULTILINE))
    modules = {file.stem for file in (ROOT / "minray").glob("*.py")} - {"__init__"}
    assert not modules - named - chapters
    assert all((ROOT / "minray" / name / "__init__.py").exists() for name in named - modules)


if __name__ == "__main__":
    sys.stdout.write(f"writing {os.path.relpath(ROOT / 'docs' / 'schema.md')}\n")
    (ROOT / "docs" / "schema.md").write_text(with_schema((ROOT / "docs" / "schema.md").read_text("utf-8")), "utf-8")
