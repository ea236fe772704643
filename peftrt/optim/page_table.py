"""Where the state of every parameter lies: one flat address space, cut into pages that span many tensors.

Parameters come in the reverse of the order in which they were given, as backward makes their gradients, sorted by kind
(bits of the state, dtype): the pages of a kind follow one another, and a kernel is launched for one kind. A tensor
begins at a block of 256 elements, the unit of 8-bit scales, so that a small one wastes at most 255; it goes on in the
next page where a page ends.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch

from peftrt.formats.adamw_state import BLOCK, capacity


class Kind(NamedTuple):
    """What all tensors in a page have in common."""

    bits: int
    dtype: torch.dtype


class Segment(NamedTuple):
    """A part of a parameter in a page: ``length`` elements from ``first``, which lie from ``start`` on."""

    tensor: int
    first: int
    length: int
    start: int


@dataclass(frozen=True)
class Page:
    """A page's kind and what lies in it, in order; ``segments`` never overlap."""

    kind: Kind
    segments: tuple[Segment, ...]


class PageTable:
    """The pages of T parameters.

    Args:
        sizes: elements of each parameter.
        kinds: kind of each.
        page_bytes: of a page; room for a block at least.

    Attributes:
        pages: in order.
        page_bytes: as given.
        places: for each parameter, its ``(page, segment)`` in order.
    """

    def __init__(self, sizes: Sequence[int], kinds: Sequence[Kind], page_bytes: int) -> None:
        self.page_bytes = page_bytes
        self.pages: list[Page] = []
        self.places: list[list[tuple[int, Segment]]] = [[] for _ in sizes]
        for kind in dict.fromkeys(kinds):
            members = [t for t in reversed(range(len(sizes))) if kinds[t] == kind]
            for segments in self._fill(members, sizes, capacity(page_bytes, kind.bits)):
                for segment in segments:
                    self.places[segment.tensor].append((len(self.pages), segment))
                self.pages.append(Page(kind, tuple(segments)))

    def _fill(self, tensors: Sequence[int], sizes: Sequence[int], room: int) -> Iterator[list[Segment]]:
        page: list[Segment] = []
        used = 0
        for tensor in tensors:
            first = 0
            while first < sizes[tensor]:
                if used == room:
                    yield page
                    page, used = [], 0
                length = min(sizes[tensor] - first, room - used)
                page.append(Segment(tensor, first, length, used))
                first += length
                used += -(-length // BLOCK) * BLOCK
        if page:
            yield page

    @property
    def nbytes(self) -> int:
        """Of all pages."""
        return len(self.pages) * self.page_bytes

    def chunks(self, page: int, offset: int, most: int) -> list[tuple[int, int, int, int, int]]:
        """The page's rows of ``adamw_step``'s chunks, of at most ``most`` elements, with the page at ``offset``."""
        return [
            (tensor, first + done, min(most, length - done), offset, start + done)
            for tensor, first, length, start in self.pages[page].segments
            for done in range(0, length, most)
        ]
