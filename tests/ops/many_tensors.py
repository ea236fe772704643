"""Many parameters and gradients of odd sizes at odd addresses, pages of their state, and bytes around all of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

import peftrt
from peftrt.formats.adamw_state import BLOCK, Moments, moments
from peftrt.ops._adamw_step import adamw_step
from peftrt.ops._addresses import CHUNK, DTYPE_CODES, Gradients
from peftrt.optim.page_table import Kind, PageTable
from tests.cases import randn

BLOCK_BYTES = {32: 8 * BLOCK, 8: 2 * BLOCK + 8}
SIZES = (1, 7, 255, 256, 257, 4096, 5000, 1, 12345)
ABSENT = (3, 6)
GUARD = 32


def random_bytes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def guarded(values: Tensor, place: int, seed: int) -> tuple[Tensor, Tensor]:
    """A room of random bytes, and in it a tensor with these values that begins ``place`` elements behind its guard."""
    width = values.element_size()
    room = random_bytes(values.numel() * width + (2 * GUARD + place) * width, seed)
    inner = room.view(values.dtype)[GUARD + place : GUARD + place + values.numel()]
    return room, inner.copy_(values.flatten())


def hyper_row(
    step: int = 3,
    lr: float = 1e-2,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
) -> list[float]:
    """What a tensor's row of ``adamw_step``'s hyper says of a step of AdamW."""
    return [
        1 - betas[0],
        1 - betas[1],
        lr / (1 - betas[0] ** step),
        1 / math.sqrt(1 - betas[1] ** step),
        eps,
        lr * weight_decay,
    ]


@dataclass
class Problem:
    """The arguments of ``adamw_step``, and the rooms that its tensors lie in."""

    bits: int
    dtype: torch.dtype
    state: Tensor
    params: list[tuple[Tensor, Tensor]]
    grads: list[tuple[Tensor, Tensor] | None]
    hyper: Tensor
    table: PageTable
    coefficient: Tensor | None = None
    most: int = CHUNK
    chunks: Tensor = field(init=False)

    def __post_init__(self) -> None:
        pages = range(len(self.table.pages))
        rows = [row for page in pages for row in self.table.chunks(page, page * self.page_bytes, self.most)]
        self.chunks = torch.tensor(rows, dtype=torch.int64).view(-1, 5)

    @property
    def page_bytes(self) -> int:
        return self.table.page_bytes

    def copy(self, **changes: Any) -> Problem:
        """Another with the same values in rooms of its own."""
        made = copy.copy(self)
        made.state = self.state.clone()
        made.params = [self._moved(pair) for pair in self.params]
        made.grads = [None if pair is None else self._moved(pair) for pair in self.grads]
        for name, value in changes.items():
            setattr(made, name, value)
        made.__post_init__()
        return made

    @staticmethod
    def _moved(pair: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        room, inner = pair[0].clone(), pair[1]
        start = inner.storage_offset()
        return room, room.view(inner.dtype)[start : start + inner.numel()]

    def gradients(self) -> Gradients:
        params = [inner for _, inner in self.params]
        grads = [None if pair is None else pair[1] for pair in self.grads]
        return gradients(params, grads)

    def run(self, backend: str) -> Problem:
        """One step; itself."""
        with peftrt.backend(backend):
            adamw_step(
                self.state,
                self.chunks,
                self.gradients(),
                self.hyper,
                self.coefficient,
                self.bits,
                self.page_bytes,
                self.dtype,
            )
        return self

    def everything(self) -> list[Tensor]:
        """All that a step could write, guards too."""
        return [self.state, *(room for room, _ in self.params), *(pair[0] for pair in self.grads if pair is not None)]

    def moments_of(self, tensor: int) -> list[Moments]:
        """A tensor's state, piece by piece."""
        return [
            moments(self.state[page * self.page_bytes :][: self.page_bytes], self.bits).narrow(
                segment.start, segment.length
            )
            for page, segment in self.table.places[tensor]
        ]


def gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None]) -> Gradients:
    """Tensors of a CPU with their addresses."""
    rows = [
        [p.data_ptr(), 0 if g is None else g.data_ptr(), DTYPE_CODES[p.dtype]]
        for p, g in zip(params, grads, strict=True)
    ]
    return Gradients(params, grads, torch.tensor(rows, dtype=torch.int64).view(-1, 3))


def problem(
    dtype: torch.dtype = torch.float32,
    bits: int = 32,
    *,
    sizes: Sequence[int] = SIZES,
    absent: Sequence[int] = ABSENT,
    blocks: int = 16,
    coefficient: float | None = None,
    seed: int = 0,
    **hyper: Any,
) -> Problem:
    """A state as after some steps, in pages of so many blocks; where a page is not used it holds random bytes."""
    page_bytes = -(-blocks * BLOCK_BYTES[bits] // 16) * 16
    table = PageTable(sizes, [Kind(bits, dtype)] * len(sizes), page_bytes)
    params, grads = [], []
    for t, size in enumerate(sizes):
        params.append(guarded(randn(size, seed=seed + 2 * t, dtype=dtype), t % 7, seed + t))
        spread = randn(size, seed=seed + 2 * t + 1, dtype=torch.float64)
        gradient = (spread * 10 ** randn(size, seed=seed + t, dtype=torch.float64)).to(dtype)
        grads.append(None if t in absent else guarded(gradient, (t + 3) % 7, seed + t + 1))
    rows = [hyper_row(t + 1, lr=1e-2 / (t + 1), **hyper) for t in range(len(sizes))]
    made = Problem(
        bits,
        dtype,
        random_bytes(len(table.pages) * table.page_bytes, seed),
        params,
        grads,
        torch.tensor(rows).view(-1, 6),
        table,
        None if coefficient is None else torch.tensor(coefficient),
    )
    for t in range(len(sizes)):
        for i, part in enumerate(made.moments_of(t)):
            _fill(part, seed + 10 * t + i)
    return made


def _fill(part: Moments, seed: int) -> None:
    m, v = (randn(part.exp_avg.numel(), seed=seed + i, dtype=torch.float64) for i in (1, 2))
    if part.exp_avg_scale is None or part.exp_avg_sq_scale is None:
        part.exp_avg.copy_(0.1 * m)
        part.exp_avg_sq.copy_(1e-2 * v.square())
        return  # the codes are random as they are
    part.exp_avg_scale.copy_(m[: part.exp_avg_scale.numel()].abs())
    part.exp_avg_sq_scale.copy_(v[: part.exp_avg_sq_scale.numel()].abs())
