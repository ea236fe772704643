"""Which bytes of a slab are taken: best-fit allocation in units of 64 bytes, with neighbouring holes made one."""

from __future__ import annotations

from bisect import bisect_left, bisect_right, insort
from collections.abc import Sequence
from itertools import accumulate
from typing import NamedTuple

UNIT = 64


def round_up(nbytes: int) -> int:
    """The next multiple of ``UNIT`` bytes."""
    return -(-nbytes // UNIT) * UNIT


class Piece(NamedTuple):
    """Some pages one behind the other.

    Attributes:
        offset, nbytes: of the piece, in bytes.
        first, end: the pages ``first ... end - 1`` lie in it.
    """

    offset: int
    nbytes: int
    first: int
    end: int


class Arena:
    """Byte ranges ``offset ... offset + size`` out of ``0 ... nbytes``; a range is given once until it is freed.

    Args:
        nbytes: of the whole, rounded down to a multiple of ``UNIT``.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes // UNIT * UNIT
        self.used = 0
        self._taken: dict[int, int] = {}  # offset -> size
        self._holes: dict[int, int] = {}  # offset -> size
        self._ends: dict[int, int] = {}  # end of a hole -> its offset
        self._by_size: list[tuple[int, int]] = []  # (size, offset), sorted
        if self.nbytes:
            self._add_hole(0, self.nbytes)

    @property
    def free_bytes(self) -> int:
        """Bytes in holes."""
        return self.nbytes - self.used

    @property
    def largest_hole(self) -> int:
        """Bytes of the largest range that can be had."""
        return self._by_size[-1][0] if self._by_size else 0

    @property
    def holes(self) -> dict[int, int]:
        """Offset -> size of what is free."""
        return dict(self._holes)

    def allocate(self, nbytes: int) -> int | None:
        """The offset of ``nbytes`` (at least 1, rounded up to units) in the smallest hole that has them; None where
        none has.
        """
        if nbytes < 1:
            raise ValueError(f"allocate: expected at least 1 byte, got {nbytes}")
        size = round_up(nbytes)
        place = bisect_left(self._by_size, (size, -1))
        if place == len(self._by_size):
            return None
        hole, offset = self._by_size[place]
        self._remove_hole(offset, hole)
        if hole > size:
            self._add_hole(offset + size, hole - size)
        self._taken[offset] = size
        self.used += size
        return offset

    def allocate_pages(self, sizes: Sequence[int]) -> list[Piece] | None:
        """Room for pages of these sizes (each a multiple of ``UNIT``), in their order, in as few pieces as there can
        be when the largest holes are filled first; None, and nothing taken, where there is not room for all.
        """
        ends = list(accumulate(sizes))
        if not ends or ends[-1] > self.free_bytes:
            return None if ends else []
        pieces: list[Piece] = []
        first = done = 0
        while first < len(sizes):
            end = min(bisect_right(ends, done + self.largest_hole), len(sizes))
            offset = self.allocate(ends[end - 1] - done) if end > first else None
            if offset is None:
                for piece in pieces:
                    self.free(piece.offset)
                return None
            pieces.append(Piece(offset, ends[end - 1] - done, first, end))
            first, done = end, ends[end - 1]
        return pieces

    def free(self, offset: int) -> None:
        """Give back all of what was allocated at ``offset``; ValueError where nothing was."""
        size = self._taken.pop(offset, None)
        if size is None:
            raise ValueError(f"free: nothing is allocated at {offset}")
        self.used -= size
        start, end = offset, offset + size
        before = self._ends.get(start)
        if before is not None:
            self._remove_hole(before, start - before)
            start = before
        after = self._holes.get(end)
        if after is not None:
            self._remove_hole(end, after)
            end += after
        self._add_hole(start, end - start)

    def _add_hole(self, offset: int, size: int) -> None:
        self._holes[offset] = size
        self._ends[offset + size] = offset
        insort(self._by_size, (size, offset))

    def _remove_hole(self, offset: int, size: int) -> None:
        del self._holes[offset]
        del self._ends[offset + size]
        del self._by_size[bisect_left(self._by_size, (size, offset))]
