"""Numbers of bytes as people write them."""

from __future__ import annotations

_UNITS = {"": 1, "B": 1, "KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30, "TiB": 1 << 40}


def expect_bytes(value: int | str, name: str) -> int:
    """A number of bytes, from an int or a text such as "2GiB".

    Raises:
        TypeError, ValueError: anything else.
    """
    if isinstance(value, bool) or not isinstance(value, int | str):
        raise TypeError(f"{name} must be a number of bytes or a text such as '2GiB', got {value!r}")
    if isinstance(value, int):
        number = value
    else:
        digits = value.strip().rstrip("BKMGTi").strip()
        unit = value.strip()[len(digits) :].strip()
        try:
            number = int(float(digits) * _UNITS[unit])
        except (ValueError, KeyError, OverflowError):
            raise ValueError(f"{name} must be like 1048576, '512MiB' or '2GiB', got {value!r}") from None
    if number < 0:
        raise ValueError(f"{name} must not be negative, got {value!r}")
    return number
