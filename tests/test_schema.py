"""The committed SQL agrees with the documented list, and every name is explained."""

from __future__ import annotations

import sqlite3

import pytest

from minray import schema


def _shape(sql: str) -> dict[str, object]:
    """Tables and views as SQLite sees them, so that how a version of sqlite-utils quotes does not matter."""
    database = sqlite3.connect(":memory:")
    database.executescript(sql)
    shape: dict[str, object] = {"version": database.execute("PRAGMA user_version").fetchone()}
    for name, kind, text in database.execute("SELECT name, type, sql FROM sqlite_master").fetchall():
        columns = database.execute("SELECT * FROM pragma_table_info(?)", (name,)).fetchall()
        shape[name] = (kind, columns, text.partition(" AS ")[2] if kind == "view" else "")
    database.close()
    return shape


def test_the_committed_sql_is_what_sqlite_utils_makes_of_the_list():
    pytest.importorskip("sqlite_utils")
    assert _shape(schema.SQL_FILE.read_text()) == _shape(schema.build()), "run python -m minray.schema"


def test_every_table_and_column_has_a_sentence():
    for table in schema.TABLES.values():
        assert table.meaning.endswith(".")
        for column in table.columns.values():
            assert column.meaning[0].isupper() or column.meaning[0].isdigit()
            assert column.meaning.endswith(".")
    assert all(view.meaning.endswith(".") for view in schema.VIEWS.values())


def test_details_of_a_view_are_columns_of_it():
    database = sqlite3.connect(":memory:")
    database.executescript(schema.SQL_FILE.read_text())
    for name, view in schema.VIEWS.items():
        columns = {column for (column,) in database.execute("SELECT name FROM pragma_table_info(?)", (name,))}
        assert set(view.details) <= columns
    database.close()


def test_the_documentation_names_every_table_column_and_view():
    text = "\n".join(schema.documentation())
    for name, table in schema.TABLES.items():
        assert f"table {name}:" in text
        assert all(f"  {column} " in text for column in table.columns)
    assert all(f"view {name}:" in text for name in schema.VIEWS)
    assert "0 PENDING_ARGS_AVAIL" in text
