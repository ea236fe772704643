"""Data files: what is read, and what is said about what cannot be."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from peftrt.finetune.errors import UserError
from peftrt.finetune.records import MAX_LINE, Record, check_file, read_records


def test_jsonl(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(
        b'\xef\xbb\xbf{"text": "one", "label": "x", "more": null}\r\n\n{"label": 3, "text": "tw\\u00f6"}\n'
        b'{"text": "  ", "label": "x"}\n{"text": "end", "label": "y"}'
    )
    assert list(read_records(path, "text", "label")) == [
        Record("one", "x", 1),
        Record("twö", "3", 3),
        Record("end", "y", 5),
    ]
    assert [record.label for record in read_records(path, "text")] == [None] * 3


def test_csv_with_quotes_and_line_ends_inside(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('id,body,class\n1,"a, ""b""\nc",x\n\n2,d,7\n')
    assert list(read_records(path, "body", "class")) == [Record('a, "b"\nc', "x", 3), Record("d", "7", 5)]


def test_txt_keeps_its_lines(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("one\n\ntwo")
    assert [record.text for record in read_records(path, "")] == ["one\n", "\n", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", '{"text": "a", "label": "x"}\n{"text": "a"', ":2: bad JSON"),
        ("a.jsonl", '{"text": "a", "label": "x"}\n[1]', ":2: expected a JSON object, got a list"),
        ("a.jsonl", '{"txt": "a", "label": "x"}', ":1: no column 'text'; there are 'txt', 'label'"),
        ("a.jsonl", '{"text": "a", "lable": "x"}', "no column 'label'.*--label-column"),
        ("a.jsonl", '{"text": 3, "label": "x"}', ":1: 'text' must be a string, got a number"),
        ("a.jsonl", '{"text": null, "label": "x"}', "got null"),
        ("a.jsonl", '{"text": "a", "label": 0.5}', "whole number, got a number"),
        ("a.jsonl", '{"text": "a", "label": true}', "got a boolean"),
        ("a.jsonl", '{"text": "a", "label": ""}', "got an empty one"),
        ("a.jsonl", '{"text": "\\ud800", "label": "x"}', ":1: the text holds half of a surrogate pair"),
        ("a.jsonl", "[" * 100_000, ":1: bad JSON"),
        ("a.csv", "text,label\na,b,c\n", ":2: expected 2 columns as in the header, got 3"),
        ("a.csv", "text,label\na\n", ":2: expected 2 columns as in the header, got 1"),
        ("a.csv", "text,text\na,b\n", "'text' is there twice"),
        ("a.csv", "\n", "expected a header"),
        ("a.csv", 'text,label\n"a,b\n', "bad CSV"),
        ("a.csv", "body,label\na,b\n", "no column 'text'; there are 'body', 'label'"),
    ],
)
def test_errors_name_the_file_and_the_line(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / name
    path.write_text(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read_records(path, "text", "label"))
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_bytes_that_are_not_text(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"fine\n" + bytes(range(128, 200)))
    with pytest.raises(UserError, match="not UTF-8"):
        list(read_records(path, ""))


def test_a_line_without_end_is_not_read_whole(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with open(path, "wb") as file:
        file.truncate(MAX_LINE + 100)
    with pytest.raises(UserError, match=":1: the line is longer than"):
        list(read_records(path, "text"))


def test_files_are_checked_before_they_are_opened(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--data: no such file"):
        check_file(tmp_path / "missing.csv", "--data")
    with pytest.raises(UserError, match="not a regular file"):
        check_file(tmp_path, "--data")
    pipe = tmp_path / "pipe.csv"
    os.mkfifo(pipe)
    with pytest.raises(UserError, match="not a regular file"):
        check_file(pipe, "--data")
    empty = tmp_path / "empty.txt"
    empty.touch()
    with pytest.raises(UserError, match="is empty"):
        check_file(empty, "--data")
    other = tmp_path / "data.parquet"
    other.write_text("x")
    with pytest.raises(UserError, match=r"ends in \.jsonl, \.csv, \.txt"):
        check_file(other, "--data")
