"""Strict JSON: each key once, finite numbers, bounded size and depth, valid Unicode."""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

from peftrt.formats.errors import FormatError

# The deepest legitimate document is a config inside a config; 32 leaves room and keeps every walk shallow.
MAX_DEPTH = 32
_MAX_DIGITS = 40


def loads_strict(data: bytes, source: str) -> Any:
    """Parse ``data``, UTF-8 JSON read from ``source`` (named in errors).

    Raises:
        FormatError: not UTF-8, not JSON, a key twice in one object, NaN, an infinite or over-long number, a lone
            surrogate, or nesting deeper than ``MAX_DEPTH``.
    """
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise FormatError(f"{source}: expected JSON in UTF-8, got an invalid byte at offset {error.start}") from None

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(items)
        if len(result) != len(items):
            seen: set[str] = set()
            twice = next(key for key, _ in items if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise FormatError(f"{source}: key {twice!a} appears twice in one object")
        return result

    def integer(token: str) -> int:
        if len(token) > _MAX_DIGITS:
            raise FormatError(f"{source}: a number of {len(token)} digits, at most {_MAX_DIGITS} are accepted")
        return int(token)

    def real(token: str) -> float:
        value = float(token)
        if not math.isfinite(value):
            raise FormatError(f"{source}: number {token[:_MAX_DIGITS]} is too large for a float")
        return value

    def constant(token: str) -> NoReturn:
        raise FormatError(f"{source}: {token} is not JSON; numbers must be finite")

    try:
        value = json.loads(text, object_pairs_hook=pairs, parse_int=integer, parse_float=real, parse_constant=constant)
    except FormatError:
        raise
    except RecursionError:
        raise FormatError(f"{source}: JSON nested deeper than {MAX_DEPTH} levels") from None
    except ValueError as error:
        raise FormatError(f"{source}: not valid JSON: {error}") from None
    _check_tree(value, source)
    return value


def _check_tree(value: Any, source: str) -> None:
    level = [value]
    for _ in range(MAX_DEPTH + 1):
        below: list[Any] = []
        for item in level:
            if isinstance(item, dict):
                for key in item:
                    _check_text(key, source)
                below.extend(item.values())
            elif isinstance(item, list):
                below.extend(item)
            elif isinstance(item, str):
                _check_text(item, source)
        if not below:
            return
        level = below
    raise FormatError(f"{source}: JSON nested deeper than {MAX_DEPTH} levels")


def _check_text(text: str, source: str) -> None:
    if text.isascii():
        return
    try:
        text.encode("utf-8")
    except UnicodeEncodeError:
        raise FormatError(f"{source}: string {text[:40]!a} is not valid Unicode: it holds a lone surrogate") from None
