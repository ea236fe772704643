"""The demo's data: what Python's own standard library says about itself."""

from __future__ import annotations

import ast
import hashlib
import sysconfig
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

SHORTEST = 30  # characters; a docstring must be longer
PACKAGES = 10
HELD_OUT = 0.2
# Tests document themselves, if at all, with names; not every Python comes with them; and the rest is not the library.
_LEFT_OUT = {"test", "tests", "idle_test", "site-packages", "dist-packages", "__pycache__"}


@dataclass(frozen=True)
class Docstring:
    """A docstring, the top-level package (or module) it comes from, and the kind of thing that it documents."""

    text: str
    package: str
    kind: str

    @property
    def held_out(self) -> bool:
        """By a hash of the text: the same on every machine, whatever other docstrings there are."""
        digest = hashlib.sha256(self.text.encode("utf-8", "replace")).digest()
        return int.from_bytes(digest[:8], "big") < HELD_OUT * 2**64


def read_docstrings(root: Path | None = None) -> list[Docstring]:
    """Every docstring of the running interpreter's library, each text once; nothing is imported.

    Args:
        root: another directory of Python files, for instance a small one.
    """
    root = root or Path(sysconfig.get_path("stdlib"))
    found: dict[str, Docstring] = {}
    for path in sorted(root.rglob("*.py")):
        place = path.relative_to(root)
        if _LEFT_OUT.isdisjoint(place.parts):
            for text, kind in _in_file(path):
                if len(text) > SHORTEST:
                    found.setdefault(text, Docstring(text, place.parts[0].removesuffix(".py"), kind))
    return list(found.values())


def most_frequent(docstrings: Sequence[Docstring], packages: int = PACKAGES) -> list[Docstring]:
    """Those of the packages that have the most."""
    counts = Counter(docstring.package for docstring in docstrings)
    kept = {package for package, _ in sorted(counts.items(), key=lambda item: (-item[1], item[0]))[:packages]}
    return [docstring for docstring in docstrings if docstring.package in kept]


def _in_file(path: Path) -> Iterator[tuple[str, str]]:
    try:
        tree = ast.parse(path.read_bytes())
    except (SyntaxError, ValueError):  # lib2to3 keeps files that are not Python 3
        return
    yield from _in_node(tree, "module")


def _in_node(node: ast.AST, kind: str) -> Iterator[tuple[str, str]]:
    if kind and (text := ast.get_docstring(node)):  # type: ignore[arg-type]
        yield text, kind
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.ClassDef):
            yield from _in_node(child, "class")
        elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _in_node(child, "method" if isinstance(node, ast.ClassDef) else "function")
        else:
            yield from _in_node(child, "")
