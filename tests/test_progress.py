"""The bar's loop, on a `minray` of two functions: what is ready when is decided here."""

from __future__ import annotations

import io
from typing import Any

import pytest

import minray
from minray.progress import progress


class Ref(bytes):
    pass


REFS = [Ref(b"%d" % index) for index in range(5)]


@pytest.fixture(autouse=True)
def turns(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Two refs become ready in each turn; returns how many were pending, turn by turn."""
    seen: list[int] = []

    def wait(refs: list[Ref], num_returns: int, timeout: float) -> tuple[list[Ref], list[Ref]]:
        assert len(set(refs)) == len(refs) == num_returns
        assert timeout > 0
        seen.append(len(refs))
        return refs[:2], refs[2:]

    def get(refs: list[Ref]) -> list[int]:
        if Ref(b"bad") in refs:
            raise ValueError("the third image is broken")
        return [int(ref) for ref in refs]

    monkeypatch.setattr(minray, "wait", wait, raising=False)
    monkeypatch.setattr(minray, "get", get, raising=False)
    monkeypatch.setattr(minray, "ObjectRef", Ref, raising=False)
    return seen


def bar(refs: Any, **options: Any) -> tuple[list[Any], str]:
    file = io.StringIO()
    return progress(refs, file=file, ascii=True, **options), file.getvalue()


def test_the_bar_ends_full_and_the_values_come_in_order(turns: list[int]) -> None:
    values, drawn = bar(iter(REFS), desc="resize")
    assert values == [0, 1, 2, 3, 4]
    assert turns == [5, 3, 1]
    last = drawn.split("\r")[-1]
    assert last.startswith("resize: 100%") and "5/5" in last


def test_a_ref_named_twice_is_waited_for_once() -> None:
    assert bar([REFS[1], REFS[1]])[0] == [1, 1]


def test_errors_come_at_the_end_as_from_get(turns: list[int]) -> None:
    with pytest.raises(ValueError, match="broken"):
        bar([*REFS, Ref(b"bad")])
    assert turns == [6, 4, 2]


def test_nothing_to_wait_for_is_an_empty_list() -> None:
    assert bar([])[0] == []


def test_a_single_ref_is_refused_with_the_way_out() -> None:
    with pytest.raises(TypeError, match=r"progress\(\[ref\]\)"):
        progress(REFS[0])
