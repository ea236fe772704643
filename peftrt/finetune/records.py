"""Reads training data record by record: .jsonl, .csv and .txt, never a whole file at once."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from peftrt.finetune.errors import UserError

SUFFIXES = (".jsonl", ".csv", ".txt")
MAX_LINE = 16 << 20  # characters; a longer "line" is a file of another kind


@dataclass(frozen=True)
class Record:
    """One example: its text, its label where there is one, and where it stands in the file."""

    text: str
    label: str | None
    line: int


def check_file(path: Path, option: str) -> None:
    """Raise UserError unless ``path`` is a readable, non-empty regular file of a known kind."""
    if not path.exists():
        raise UserError(f"{option}: no such file: {path}")
    if not path.is_file():
        raise UserError(f"{option}: {path} is not a regular file")
    if path.suffix.lower() not in SUFFIXES:
        raise UserError(f"{option}: {path}: expected a file that ends in {', '.join(SUFFIXES)}")
    if not os.access(path, os.R_OK):
        raise UserError(f"{option}: {path} cannot be read (permission denied)")
    if path.stat().st_size == 0:
        raise UserError(f"{option}: {path} is empty")


def read_records(path: Path, text_column: str, label_column: str | None = None) -> Iterator[Record]:
    """The records of a .jsonl or .csv file, or the lines of a .txt, in their order.

    Args:
        path: UTF-8, with or without a byte order mark.
        text_column: the key or column of the text.
        label_column: the key or column of the label; None where labels are not wanted.

    Raises:
        UserError: a line that cannot be read, named by its number; a column that is missing.
    """
    kind = path.suffix.lower()
    with open(path, encoding="utf-8-sig", errors="strict", newline="") as file:
        if kind == ".txt":
            for number, line in _lines(file, path):
                yield Record(line, None, number)
            return
        rows = _json_rows(file, path) if kind == ".jsonl" else _csv_rows(file, path)
        for number, row in rows:
            text = _column(row, text_column, "--text-column", path, number)
            if not isinstance(text, str):
                raise UserError(f"{path}:{number}: {text_column!r} must be a string, got {_kind(text)}")
            _check_unicode(text, path, number)
            label = None
            if label_column is not None:
                label = _label(_column(row, label_column, "--label-column", path, number), label_column, path, number)
            if text.strip():
                yield Record(text, label, number)


def _lines(file: IO[str], path: Path) -> Iterator[tuple[int, str]]:
    number = 0
    while True:
        number += 1
        try:
            line = file.readline(MAX_LINE + 1)
        except UnicodeDecodeError as error:
            # The decoder reads ahead of the lines: the number is where it had come to.
            raise UserError(f"{path}: not UTF-8 text, at or after line {number}: {error.reason}") from None
        if not line:
            return
        if len(line) > MAX_LINE:
            raise UserError(f"{path}:{number}: the line is longer than {MAX_LINE:,} characters")
        yield number, line


def _json_rows(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in _lines(file, path):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{path}:{number}: bad JSON: {reason}") from None
        if not isinstance(row, dict):
            raise UserError(f"{path}:{number}: expected a JSON object, got {_kind(row)}")
        yield number, row


def _csv_rows(file: IO[str], path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    csv.field_size_limit(MAX_LINE)
    lines = (line for _, line in _lines(file, path))
    reader = csv.reader(lines, strict=True)
    try:
        header = next(reader, None)
        if not header:
            raise UserError(f"{path}: expected a header with the columns' names in the first line")
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            raise UserError(f"{path}:1: the column {twice[0]!r} is there twice")
        for cells in reader:
            if not cells:
                continue
            if len(cells) != len(header):
                raise UserError(
                    f"{path}:{reader.line_num}: expected {len(header)} columns as in the header, got {len(cells)}"
                )
            yield reader.line_num, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise UserError(f"{path}:{reader.line_num}: bad CSV: {error}") from None


def _column(row: dict[str, Any], name: str, option: str, path: Path, number: int) -> Any:
    if name not in row:
        there = ", ".join(repr(key) for key in row) or "none"
        raise UserError(f"{path}:{number}: no column {name!r}; there are {there} (choose with {option})")
    return row[name]


def _label(value: Any, column: str, path: Path, number: int) -> str:
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        got = "an empty one" if value == "" else _kind(value)
        raise UserError(f"{path}:{number}: the label {column!r} must be a string or a whole number, got {got}")
    return str(value)


def _check_unicode(text: str, path: Path, number: int) -> None:
    """JSON can write half of a surrogate pair, which no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise UserError(f"{path}:{number}: the text holds half of a surrogate pair") from None


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
