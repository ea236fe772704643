"""The errors that reading and writing files raise; a subclass exists only where a caller acts on the difference."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager


class FormatError(ValueError):
    """A file, directory, key or field is not what it must be; the message names it, what was expected and what came."""


class MissingFileError(FormatError, FileNotFoundError):
    """The file or directory is not there; also a ``FileNotFoundError``."""


class UnsafeFileError(FormatError):
    """The file could run code when opened (a pickle); it was not opened, and the message says how to convert it."""


class NonFiniteError(FormatError):
    """A tensor holds NaN or infinity; reading again with ``allow_nonfinite=True`` accepts it."""


class ConfigError(FormatError):
    """A field of a configuration is missing, of the wrong type or out of its range."""


class UnsupportedError(ConfigError):
    """A field is valid for HF peft, would change the result, and peftrt does not implement it."""


class AdapterNameError(FormatError):
    """An adapter's name or a relative path cannot be used, or collides with one in use."""


@contextmanager
def named(source: str) -> Iterator[None]:
    """Put ``source``, a file or a directory, in front of what a FormatError of the block says."""
    try:
        yield
    except FormatError as error:
        raise type(error)(f"{source}: {error}") from None
