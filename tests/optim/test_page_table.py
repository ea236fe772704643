"""Every element has one place in one page, and pages are full but for the last of their kind."""

from __future__ import annotations

import hypothesis
import torch
from hypothesis import strategies as st

from peftrt.formats.adamw_state import BLOCK, capacity
from peftrt.optim.page_table import Kind, PageTable

FULL, SMALL = Kind(32, torch.float32), Kind(8, torch.bfloat16)
PAGE = 16384

tensors = st.lists(st.tuples(st.integers(0, 5000), st.sampled_from([FULL, SMALL])), min_size=1, max_size=20)


@hypothesis.given(tensors=tensors, most=st.sampled_from([BLOCK, 1024, 4096]))
def test_every_element_has_one_place(tensors: list[tuple[int, Kind]], most: int) -> None:
    sizes, kinds = [size for size, _ in tensors], [kind for _, kind in tensors]
    table = PageTable(sizes, kinds, PAGE)
    counts = [torch.zeros(size, dtype=torch.int64) for size in sizes]
    for number, page in enumerate(table.pages):
        room = torch.zeros(capacity(PAGE, page.kind.bits), dtype=torch.int64)
        chunks = table.chunks(number, 7 * PAGE, most)
        assert {tensor for tensor, *_ in chunks} == {segment.tensor for segment in page.segments}
        for tensor, first, count, offset, start in chunks:
            assert 0 < count <= most
            assert offset == 7 * PAGE
            assert start % BLOCK == 0
            assert kinds[tensor] == page.kind
            counts[tensor][first : first + count] += 1
            assert start + count <= len(room)
            room[start : start + count] += 1
        assert room.max() == 1, "two chunks overlap"
    assert all(bool((count == 1).all()) for count in counts)
    for tensor, places in enumerate(table.places):
        assert sum(segment.length for _, segment in places) == sizes[tensor]
        assert [segment.first for _, segment in places] == sorted(segment.first for _, segment in places)


def test_tensors_come_as_backward_makes_their_gradients() -> None:
    table = PageTable([10, 20, 30], [FULL] * 3, PAGE)
    assert [segment.tensor for segment in table.pages[0].segments] == [2, 1, 0]


def test_a_page_has_one_kind_and_only_the_last_of_a_kind_is_not_full() -> None:
    table = PageTable([3000, 4000, 5000, 60000], [FULL, SMALL, FULL, SMALL], PAGE)
    by_kind: dict[Kind, list[int]] = {}
    for page in table.pages:
        used = max(segment.start + segment.length for segment in page.segments)
        by_kind.setdefault(page.kind, []).append(used)
    assert set(by_kind) == {FULL, SMALL}
    for kind, used in by_kind.items():
        room = capacity(PAGE, kind.bits)
        assert all(room - each < BLOCK for each in used[:-1])
    assert table.nbytes == len(table.pages) * PAGE


def test_a_block_is_never_cut() -> None:
    """8-bit scales are of 256 elements from a tensor's beginning: a page ends between two of them."""
    table = PageTable([100_001], [SMALL], PAGE)
    assert len(table.pages) > 5
    assert all(segment.first % BLOCK == 0 for page in table.pages for segment in page.segments)
