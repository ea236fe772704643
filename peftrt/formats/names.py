"""Adapter names and relative paths that come from outside: what is accepted and what is refused.

A name is used as a key of modules, in messages and in routing tables, so it must read the same for a person and for the
program. Decisions: no dot (names of submodules and parameters cannot hold one), no path separator, no control, format
(bidirectional, zero-width) or unassigned character, no white space but single inner spaces, at most 255 bytes of
UTF-8, and no name that torch's module containers use themselves (``forward``, ``keys``, ``train``, ...).
"""

from __future__ import annotations

import functools
import os
import unicodedata
from collections.abc import Iterable
from pathlib import Path

from torch import nn

from peftrt.formats.errors import AdapterNameError

MAX_NAME_BYTES = 255

# Control, format (bidi marks, zero-width), surrogate, private, unassigned, line and paragraph separators.
_REFUSED_CATEGORIES = {"Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp"}


def check_adapter_name(name: str, existing: Iterable[str] = ()) -> str:
    """Return ``name`` if it can name an adapter beside those in ``existing``.

    Args:
        name: the name asked for.
        existing: names in use; equal names, and names that differ only by case or Unicode form, collide.

    Raises:
        TypeError: ``name`` is not a ``str``.
        AdapterNameError: the name cannot be used (the module's docstring has the rules) or collides.
    """
    if not isinstance(name, str):
        raise TypeError(f"adapter name must be a str, got {type(name).__name__}")
    _check_characters(name, "adapter name")
    if not name:
        raise AdapterNameError("adapter name must not be empty")
    for forbidden in "./\\":
        if forbidden in name:
            raise AdapterNameError(f"adapter name {_show(name)} must not contain {forbidden!r}")
    if name != name.strip() or "  " in name:
        raise AdapterNameError(f"adapter name {_show(name)} must not begin or end with a space, or hold two in a row")
    if name in _container_attributes():
        raise AdapterNameError(
            f"adapter name {_show(name)} is an attribute of torch's module containers; choose another"
        )
    folded = fold_name(name)
    for other in existing:
        if other == name:
            raise AdapterNameError(f"adapter name {_show(name)} is already in use")
        if fold_name(other) == folded:
            raise AdapterNameError(
                f"adapter name {_show(name)} differs from {_show(other)}, which is in use, only by case or Unicode form"
            )
    return name


def resolve_inside(root: str | os.PathLike[str], relative: str | os.PathLike[str]) -> Path:
    """Return the real path of ``relative`` under ``root``, which need not exist.

    Args:
        root: the directory that must not be left.
        relative: a relative path without ``..``; symbolic links in it are followed as long as they stay inside.

    Raises:
        AdapterNameError: the path is absolute, holds ``..`` or a refused character, or leaves the root by a link.
    """
    text = os.fspath(relative)
    if not isinstance(text, str):
        raise TypeError(f"path must be a str or PathLike of str, got {type(text).__name__}")
    for part in text.replace("\\", "/").split("/"):
        _check_characters(part, "path")
        if part == "..":
            raise AdapterNameError(f"path {_show(text)} must not contain '..'")
    drive = os.path.splitdrive(text)[0]
    if not text or drive or text[0] in "/\\":
        raise AdapterNameError(f"path {_show(text)} must be relative and not empty")
    return require_inside(root, os.path.join(os.fspath(root), text))


def require_inside(root: str | os.PathLike[str], path: str | os.PathLike[str]) -> Path:
    """Return the real path of ``path``, links followed; ``AdapterNameError`` where that is not under ``root``."""
    if "\0" in os.fspath(path) or "\0" in os.fspath(root):
        raise AdapterNameError(f"path {_show(os.fspath(path))} must not contain NUL")
    real_root = os.path.realpath(root)
    real = os.path.realpath(path)
    if real != real_root and not real.startswith(real_root.rstrip(os.sep) + os.sep):
        shown, out_of, to = (_show(os.fspath(text), limit=512) for text in (path, root, real))
        raise AdapterNameError(f"path {shown} leads out of {out_of}, to {to}")
    return Path(real)


def _check_characters(text: str, what: str) -> None:
    try:
        size = len(text.encode("utf-8"))
    except UnicodeEncodeError:
        raise AdapterNameError(f"{what} {_show(text)} is not valid Unicode: it holds a lone surrogate") from None
    if size > MAX_NAME_BYTES:
        raise AdapterNameError(f"{what} {_show(text)} has {size} bytes of UTF-8, at most {MAX_NAME_BYTES} are accepted")
    for char in text:
        category = unicodedata.category(char)
        if category in _REFUSED_CATEGORIES or (category == "Zs" and char != " "):
            kind = unicodedata.name(char, "a control character")
            raise AdapterNameError(f"{what} {_show(text)} must not contain U+{ord(char):04X} ({kind})")


def fold_name(name: str) -> str:
    """What names have in common that differ only by case or Unicode form: two such cannot be used side by side."""
    # Case folding can undo a normal form, so the name is normalised again after it.
    return unicodedata.normalize("NFKC", unicodedata.normalize("NFKC", name).casefold())


def _show(text: str, limit: int = 80) -> str:
    return ascii(text if len(text) <= limit else text[: limit - 3] + "...")


@functools.cache
def _container_attributes() -> frozenset[str]:
    return frozenset(dir(nn.ModuleDict())) | frozenset(dir(nn.ParameterDict()))
