"""Whose output it is: labels are written between the data, and taken out again wherever reads cut them."""

import os

import pytest

from minray.output_labels import NAME_BYTES, LabelledFile, LabelReader


def written(*steps):
    """What a pipe receives for (label, data) written one after the other."""
    r, w = os.pipe()
    labels = [label for label, _ in steps]
    file = LabelledFile(w, lambda: labels.pop(0))  # It is asked once for each write.
    for _, data in steps:
        file.write(data)
    os.close(w)
    with open(r, "rb") as pipe:
        return pipe.read()


def read(reader, *chunks):
    """What is read of each label, in order; neighbours of one label are joined."""
    parts = []
    for label, data in [part for chunk in chunks for part in reader.feed(chunk)] + reader.close():
        if parts and parts[-1][0] == label:
            parts[-1] = (label, parts[-1][1] + data)
        else:
            parts.append((label, data))
    return parts


STEPS = [("f", b"one\n"), ("f", b"two\n"), ("größe", b"three\n"), (None, b"four\n"), ("f", b"five\n")]
READ = [("f", b"one\ntwo\n"), ("größe", b"three\nfour\n"), ("f", b"five\n")]


def test_each_line_has_the_name_of_who_wrote_it():
    assert read(LabelReader(), written(*STEPS)) == READ


def test_a_name_is_written_only_when_it_changes():
    assert written(("f", b"x"), ("f", b"y")) == b"\x1eminray:f\x1fxy"


@pytest.mark.parametrize("size", [1, 2, 3, 7, 10])
def test_reads_may_cut_anywhere(size):
    data = written(*STEPS)
    assert read(LabelReader(), *(data[i : i + size] for i in range(0, len(data), size))) == READ


def test_what_only_looks_like_a_label_is_data():
    too_long = b"\x1eminray:" + b"x" * 500 + b"\x1f"
    for data in (b"\x1e", b"\x1eminray", b"a\x1eb\x1f", b"\x1eminray:never ended", too_long):
        assert read(LabelReader(), data) == [("", data)]
        assert read(LabelReader(), *(data[i : i + 1] for i in range(len(data)))) == [("", data)]


def test_long_names_are_cut():
    assert read(LabelReader(), written(("n" * 500, b"x"))) == [("n" * NAME_BYTES, b"x")]
