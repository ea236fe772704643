"""The arena: ranges never overlap, whatever is taken and freed in whichever order, and all comes back."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from peftrt.serving.arena import UNIT, Arena, Piece, round_up

STEPS = st.lists(st.tuples(st.booleans(), st.integers(1, 40 * UNIT), st.integers(0, 1 << 30)), max_size=80)


def check(arena: Arena, held: dict[int, int]) -> None:
    """Held ranges and holes are a partition of the whole; no two holes touch."""
    ranges = sorted([*held.items(), *arena.holes.items()])
    position = 0
    for offset, size in ranges:
        assert offset == position
        assert size > 0
        assert offset % UNIT == size % UNIT == 0
        position += size
    assert position == arena.nbytes
    assert arena.used == sum(held.values())
    assert arena.free_bytes == arena.nbytes - arena.used
    assert arena.largest_hole == max(arena.holes.values(), default=0)
    ends = {offset + size for offset, size in arena.holes.items()}
    assert not ends & arena.holes.keys()


@given(st.integers(0, 100 * UNIT), STEPS)
def test_ranges_never_overlap_and_all_comes_back(nbytes: int, steps: list[tuple[bool, int, int]]) -> None:
    arena, held = Arena(nbytes), dict[int, int]()
    for take, size, which in steps:
        if take or not held:
            before = arena.holes
            offset = arena.allocate(size)
            fitting = [hole for hole in before.values() if hole >= round_up(size)]
            assert (offset is None) == (not fitting)
            if offset is not None:
                assert before[offset] == min(fitting), "not the best fit"
                held[offset] = round_up(size)
        else:
            offset = sorted(held)[which % len(held)]
            arena.free(offset)
            del held[offset]
        check(arena, held)
    for offset in held:
        arena.free(offset)
    check(arena, {})
    assert arena.holes == ({0: arena.nbytes} if arena.nbytes else {})


@given(STEPS, st.lists(st.integers(1, 20).map(lambda n: n * UNIT), max_size=20))
def test_pages_go_into_what_holes_there_are_or_nothing_is_taken(
    steps: list[tuple[bool, int, int]], sizes: list[int]
) -> None:
    arena, held = Arena(100 * UNIT), dict[int, int]()
    for take, size, which in steps:
        if take or not held:
            if (offset := arena.allocate(size)) is not None:
                held[offset] = round_up(size)
        else:
            offset = sorted(held)[which % len(held)]
            arena.free(offset)
            del held[offset]
    pieces = arena.allocate_pages(sizes)
    if pieces is None:
        assert sum(sizes) > max(arena.holes.values(), default=0), "one hole had room for all"
    else:
        assert [page for piece in pieces for page in range(piece.first, piece.end)] == list(range(len(sizes)))
        for piece in pieces:
            assert piece.nbytes == sum(sizes[piece.first : piece.end])
            held[piece.offset] = piece.nbytes
    check(arena, held)


def test_pages_are_split_where_no_hole_has_room_for_all() -> None:
    arena = Arena(8 * UNIT)
    offsets = [arena.allocate(UNIT) for _ in range(8)]
    assert offsets == [UNIT * i for i in range(8)]
    for i in (0, 1, 4, 5, 6):
        arena.free(UNIT * i)
    assert arena.allocate_pages([UNIT] * 5) == [Piece(4 * UNIT, 3 * UNIT, 0, 3), Piece(0, 2 * UNIT, 3, 5)]
    assert arena.free_bytes == 0


def test_a_range_is_freed_once_and_whole() -> None:
    arena = Arena(4 * UNIT)
    assert arena.allocate(UNIT + 1) == 0
    for offset in (UNIT, 7, -1):
        with pytest.raises(ValueError, match=f"nothing is allocated at {offset}"):
            arena.free(offset)
    arena.free(0)
    with pytest.raises(ValueError, match="nothing is allocated at 0"):
        arena.free(0)
    with pytest.raises(ValueError, match="at least 1 byte"):
        arena.allocate(0)
