"""What the driver shows of its workers' output: the time is an argument, so no test waits."""

from __future__ import annotations

import doctest
import io
import sys
import tracemalloc

import pytest

from minray import output
from minray.output import OutputPrinter, print_lines


@pytest.fixture
def printer() -> OutputPrinter:
    return OutputPrinter(log_of=lambda pid: f"logs/worker-{pid}.log")


def out(*texts: str) -> list[tuple[str, str]]:
    return [("stdout", text) for text in texts]


def test_the_docstrings_example_runs() -> None:
    assert doctest.testmod(output).failed == 0


def test_a_line_says_who_printed_it(printer: OutputPrinter) -> None:
    assert printer.feed("resize", 7, "stdout", b"one\ntwo\n", 0.0) == out(
        "(resize pid=7) one", "(resize pid=7) two"
    )
    assert printer.feed("resize", 7, "stderr", b"three\n", 0.0) == [("stderr", "(resize pid=7) three")]


def test_an_unfinished_line_waits_for_its_end_in_its_own_stream(printer: OutputPrinter) -> None:
    assert printer.feed("f", 7, "stdout", b"half ", 0.0) == []
    assert printer.feed("f", 7, "stderr", b"else\n", 0.0) == [("stderr", "(f pid=7) else")]
    assert printer.feed("f", 7, "stdout", b"whole\n", 0.0) == out("(f pid=7) half whole")


def test_a_worker_that_ends_leaves_no_line_behind(printer: OutputPrinter) -> None:
    printer.feed("f", 7, "stdout", b"last words", 0.0)
    assert printer.close(7, 0.1) == out("(f pid=7) last words")
    assert printer.close(7, 0.1) == []
    assert printer.next_deadline() is None


def test_a_character_cut_in_two_is_mended_and_bad_bytes_are_marked(printer: OutputPrinter) -> None:
    assert printer.feed("f", 7, "stdout", b"caf\xc3", 0.0) == []
    assert printer.feed("f", 7, "stdout", b"\xa9 \xff\n", 0.0) == out("(f pid=7) café �")


@pytest.mark.parametrize("chunks", [[b" 10%\r 20%\r 30%\n"], [b" 10%\r", b" 20%\r", b" 30%\r", b"\n"]])
def test_of_a_progress_bar_the_last_state_counts(printer: OutputPrinter, chunks: list[bytes]) -> None:
    lines = [line for chunk in chunks for line in printer.feed("f", 7, "stderr", chunk, 0.0)]
    assert lines == [("stderr", "(f pid=7)  30%")]


def test_an_endless_progress_bar_and_an_endless_line_take_no_memory(printer: OutputPrinter) -> None:
    tracemalloc.start()
    for index in range(2_000):
        printer.feed("f", 7, "stderr", b"#" * 1000 + b"\r", float(index))
        printer.feed("f", 7, "stdout", b"#" * 1000, float(index))
    used, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert used < 500_000


def test_the_same_line_of_many_workers_is_shown_once_and_then_counted(printer: OutputPrinter) -> None:
    assert printer.feed("f", 1, "stdout", b"loading\n", 10.0) == out("(f pid=1) loading")
    for pid in (2, 3, 4, 2):
        assert printer.feed("f", pid, "stdout", b"loading\n", 11.0) == []
    assert printer.next_deadline() == 15.0
    assert printer.tick(14.9) == []
    assert printer.tick(15.0) == out("(f pid=2) loading [repeated 4x by 3 workers]")
    assert printer.next_deadline() is None
    assert printer.feed("f", 3, "stdout", b"loading\n", 15.1) == out("(f pid=3) loading")


def test_one_repetition_is_shown_as_it_is(printer: OutputPrinter) -> None:
    printer.feed("f", 1, "stdout", b"loading\n", 0.0)
    printer.feed("f", 2, "stdout", b"loading\n", 0.0)
    assert printer.tick(5.0) == out("(f pid=2) loading")


def test_a_worker_may_repeat_itself_and_numbers_make_a_difference(printer: OutputPrinter) -> None:
    for _ in range(2):
        assert printer.feed("f", 1, "stdout", b"again\n", 0.0) == out("(f pid=1) again")
    assert printer.feed("f", 2, "stdout", b"part 1\n", 0.0) == out("(f pid=2) part 1")
    assert printer.feed("f", 3, "stdout", b"part 2\n", 0.0) == out("(f pid=3) part 2")


def test_a_repeated_line_is_due_before_newer_output(printer: OutputPrinter) -> None:
    for pid in (1, 2, 3):
        printer.feed("f", pid, "stdout", b"loading\n", 0.0)
    lines = printer.feed("f", 1, "stdout", b"ready\n", 6.0)
    assert lines == out("(f pid=3) loading [repeated 2x by 2 workers]", "(f pid=1) ready")


def test_deduplication_can_be_turned_off() -> None:
    printer = OutputPrinter(log_of=str, deduplicate=False)
    assert printer.feed("f", 1, "stdout", b"x\n", 0.0) + printer.feed("f", 2, "stdout", b"x\n", 0.0) == out(
        "(f pid=1) x", "(f pid=2) x"
    )


def test_a_burst_passes_and_a_flood_is_counted_once_a_second(printer: OutputPrinter) -> None:
    assert len(printer.feed("f", 7, "stdout", b"".join(b"%d\n" % i for i in range(5_000)), 100.0)) == 5_000
    assert printer.feed("f", 7, "stdout", b"a\nb\nc", 100.0) == []
    assert printer.feed("f", 7, "stderr", b"d\n", 100.5) == []
    assert printer.feed("f", 8, "stdout", b"another worker is heard\n", 100.5) != []
    assert printer.next_deadline() == 101.0
    [(stream, note)] = printer.tick(101.0)
    assert (stream, note) == (
        "stderr",
        "(f pid=7) [4 lines (7 bytes) left out: more than 500 lines or 250 kB a second; "
        "all output is in logs/worker-7.log]",
    )
    # The rest of a line whose beginning was left out is not shown as if it were a line.
    assert printer.feed("f", 7, "stdout", b"ccc", 101.1) == []
    assert printer.feed("f", 7, "stdout", b"c\nwhole\n", 101.2) == out("(f pid=7) whole")


def test_a_gigabyte_costs_a_few_lines_and_little_time(printer: OutputPrinter) -> None:
    chunk, shown = b"x" * 79 + b"\n", 0
    chunk *= 800
    for index in range(2_000):  # 128 MB in two seconds; its cost does not grow with the size.
        shown += len(printer.feed("f", 7, "stdout", chunk, index / 1000))
    assert shown < 8_000
    [(_, note)] = printer.close(7, 2.0)[-1:]
    assert "left out" in note


def test_the_end_of_the_session_shows_what_was_held_back(printer: OutputPrinter) -> None:
    for pid in (1, 2, 3):
        printer.feed("f", pid, "stdout", b"loading\n", 0.0)
    printer.feed("f", 1, "stdout", b"tail", 0.0)
    lines = printer.close_all(0.1)
    assert lines == out("(f pid=1) tail", "(f pid=3) loading [repeated 2x by 2 workers]")
    assert printer.close_all(0.2) == []


def test_lines_go_to_the_streams_of_the_moment(capsys: pytest.CaptureFixture[str]) -> None:
    print_lines([("stdout", "a"), ("stderr", "b"), ("stdout", "c")])
    assert capsys.readouterr() == ("a\nc\n", "b\n")


def test_a_terminal_that_cannot_spell_or_has_gone_harms_nobody(monkeypatch: pytest.MonkeyPatch) -> None:
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    monkeypatch.setattr(sys, "stderr", None)
    print_lines([("stdout", "café"), ("stderr", "lost")])
    ascii_only.seek(0)
    assert ascii_only.read() == "caf\\xe9\n"
    ascii_only.close()
    print_lines([("stdout", "into the void")])
