"""What adamw_step and gradient_norm are tried on: tensors of many sizes, and their state in pages."""

from __future__ import annotations

import copy
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor

from peftrt import ops
from peftrt.formats.adamw_state import moments
from peftrt.ops import CHUNK, DTYPE_CODES, Gradients
from peftrt.optim.page_table import Kind, PageTable
from tests.cases import randn

# Elements on both sides of a tensor, and bytes on both sides of the pages, which nothing may change.
GUARD = 64
# a single element, less than a block, blocks, a tile and a bit, a chunk, several chunks, many pages
SIZES = (1, 255, 256, 700, 1025, 4096, 9001)


class Case:
    """One call's operands.

    Args:
        sizes: elements of each tensor.
        bits: of the state.
        dtype: of the tensors.
        blocks: of a page.
        absent: tensors without a gradient.
        clipped: gradients have a coefficient.
        crooked: tensors begin one element behind a multiple of 16 bytes.
    """

    def __init__(
        self,
        sizes: Sequence[int] = SIZES,
        bits: int = 32,
        dtype: torch.dtype = torch.float32,
        *,
        blocks: int = 19,
        absent: Collection[int] = (),
        clipped: bool = False,
        crooked: bool = False,
        seed: int = 0,
    ) -> None:
        self.bits, self.dtype, self.aligned, self.absent = bits, dtype, not crooked, set(absent)
        # not a multiple of a block's bytes: what is left of a page belongs to nobody
        self.page_bytes = -(-blocks * (2048 if bits == 32 else 520) // 16) * 16 + 32
        kind = Kind(bits, dtype)
        self.table = PageTable(sizes, [kind] * len(sizes), self.page_bytes)
        self.sizes, self.first = tuple(sizes), GUARD + crooked
        rooms = [-(-n // 16) * 16 + 2 * GUARD for n in sizes]
        self.memory = [randn(2, room, seed=seed + i, dtype=dtype) for i, room in enumerate(rooms)]
        self.state = self._pages(seed + 1000)
        self.hyper = _hyper(len(sizes))
        self.coefficient = torch.tensor(0.37) if clipped else None

    def _pages(self, seed: int) -> Tensor:
        """Random moments; every byte between them has some value, too."""
        state = torch.randint(256, (2 * GUARD + self.table.nbytes,), generator=torch.Generator().manual_seed(seed))
        state = state.to(torch.uint8)
        for page in range(len(self.table.pages)):
            first = GUARD + page * self.page_bytes
            parts = moments(state[first : first + self.page_bytes], self.bits)
            for i, part in enumerate(parts):
                if part is not None and part.dtype == torch.float32:
                    values = randn(part.numel(), seed=seed + 10 * page + i)
                    part.copy_(values if i == 0 else values.abs() * (1e-3 if i == 3 else 0.1))
        return state

    @property
    def params(self) -> list[Tensor]:
        return [memory[0, self.first : self.first + n] for memory, n in zip(self.memory, self.sizes, strict=True)]

    @property
    def grads(self) -> list[Tensor | None]:
        parts = [memory[1, self.first : self.first + n] for memory, n in zip(self.memory, self.sizes, strict=True)]
        return [None if i in self.absent else part for i, part in enumerate(parts)]

    def gradients(self) -> Gradients:
        params, grads = self.params, self.grads
        rows = [
            (p.data_ptr(), 0 if g is None else g.data_ptr(), DTYPE_CODES[p.dtype])
            for p, g in zip(params, grads, strict=True)
        ]
        return Gradients(params, grads, torch.tensor(rows, device=self.state.device), self.aligned)

    def to(self, device: str) -> Case:
        """The same on a device, in memory of its own."""
        other = copy.copy(self)
        other.memory = [_aligned(memory.to(device, copy=True)) for memory in self.memory]
        other.state, other.hyper = self.state.to(device, copy=True), self.hyper.to(device)
        other.coefficient = None if self.coefficient is None else self.coefficient.to(device)
        return other

    def step_args(self) -> tuple[Any, ...]:
        """Arguments of ``adamw_step``."""
        pages = range(len(self.table.pages))
        rows = [row for page in pages for row in self.table.chunks(page, page * self.page_bytes, CHUNK)]
        chunks = torch.tensor(rows, dtype=torch.int64, device=self.state.device).view(-1, 5)
        state = self.state[GUARD : GUARD + self.table.nbytes]
        own = (self.bits, self.page_bytes, self.dtype)
        return state, chunks, self.gradients(), self.hyper, self.coefficient, *own

    def step(self) -> None:
        ops.adamw_step(*self.step_args())

    def norm_args(self, max_norm: float) -> tuple[Any, ...]:
        """Arguments of ``gradient_norm``; what it writes is NaN."""
        rows = [(i, o, min(CHUNK, n - o)) for i, n in enumerate(self.sizes) for o in range(0, n, CHUNK)]
        device = self.state.device
        chunks = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3)
        partials = torch.full((len(rows),), torch.nan, dtype=torch.float64, device=device)
        return self.gradients(), chunks, partials, max_norm, torch.full((2,), torch.nan, device=device)

    def norm(self, max_norm: float) -> tuple[Tensor, Tensor]:
        """Norm with coefficient, and the chunks' sums."""
        args = self.norm_args(max_norm)
        ops.gradient_norm(*args)
        return args[4], args[2]

    def assert_equals(self, expected: Case) -> None:
        """Every bit of tensors and pages, with all that lies around them."""
        for actual, wanted in zip(self.memory, expected.memory, strict=True):
            assert_same(actual, wanted)
        # as numbers, for a scale or a moment that is NaN may differ in its payload
        assert_same(self.state.view(torch.float32), expected.state.view(torch.float32))


def _hyper(count: int) -> Tensor:
    """As of step 3, with a learning rate of each tensor's own."""
    rows = []
    for i in range(count):
        lr, beta1, beta2 = 1e-3 * (i + 1), 0.9, 0.999
        rows.append((1 - beta1, 1 - beta2, lr / (1 - beta1**3), (1 - beta2**3) ** -0.5, 1e-8, 0.01 * i * lr))
    return torch.tensor(rows, dtype=torch.float32)


def _aligned(tensor: Tensor) -> Tensor:
    assert tensor.data_ptr() % 16 == 0
    return tensor


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but that one NaN is like another."""
    got, want = actual.cpu(), expected.cpu()
    integer = {2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    same = (got.view(integer) == want.view(integer)) | (got.isnan() & want.isnan())
    assert got.shape == want.shape
    assert bool(same.all()), f"{int((~same).sum())} of {same.numel()} differ, first at {(~same).nonzero()[0].tolist()}"
