"""Many parameters and gradients of odd sizes at odd addresses, pages of their state, and bytes around all of it."""

from __future__ import annotations

import copy
import math
from collections.abc import Collection, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.adamw_state import Moments, block_bytes, moments
from peftrt.ops import CHUNK, DTYPE_CODES, Gradients
from peftrt.optim.page_table import Kind, PageTable
from tests.cases import randn
from tests.tolerances import assert_same_bits

# An element, less than a vector, a block and its neighbours, a chunk, several, pages; tiles and a bit.
SIZES = (1, 7, 255, 256, 257, 4096, 5000, 1, 12345, 700, 1025, 9001)
ABSENT = (3, 6)
# Elements on both sides of a tensor, and bytes on both sides of the pages, which nothing may change.
GUARD = 64


class Room(NamedTuple):
    """Random bytes, and a tensor that lies among them."""

    memory: Tensor
    inner: Tensor

    def to(self, device: str) -> Room:
        """The same on a device, in memory of its own and as crooked as here."""
        memory, start = self.memory.to(device, copy=True), self.inner.storage_offset()
        assert memory.data_ptr() % 16 == 0
        return Room(memory, memory.view(self.inner.dtype)[start : start + self.inner.numel()])


def random_bytes(count: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (count,), dtype=torch.uint8, generator=generator)


def guarded(values: Tensor, place: int, seed: int) -> Room:
    """A room for a tensor with these values that begins ``place`` elements behind its guard."""
    width, first = values.element_size(), GUARD + place
    memory = random_bytes((values.numel() + first + GUARD) * width, seed)
    return Room(memory, memory.view(values.dtype)[first : first + values.numel()].copy_(values.flatten()))


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


def gradients(params: Sequence[Tensor], grads: Sequence[Tensor | None], aligned: bool = False) -> Gradients:
    """Tensors with their addresses."""
    rows = [
        [p.data_ptr(), 0 if g is None else g.data_ptr(), DTYPE_CODES[p.dtype]]
        for p, g in zip(params, grads, strict=True)
    ]
    device = params[0].device if params else None
    return Gradients(params, grads, torch.tensor(rows, dtype=torch.int64, device=device).view(-1, 3), aligned)


def chunks_of(sizes: Sequence[int], most: int = CHUNK) -> Tensor:
    """Tensors cut into ``gradient_norm``'s chunks."""
    rows = [(t, i, min(most, n - i)) for t, n in enumerate(sizes) for i in range(0, n, most)]
    return torch.tensor(rows, dtype=torch.int64).view(-1, 3)


class ManyTensors:
    """Operands of ``adamw_step`` and ``gradient_norm``, with the state as after some steps.

    Where a page is not used it holds random bytes, and so does the end of a page, which has no room for a block.

    Args:
        sizes: elements of each tensor.
        bits: of the state.
        dtype: of the tensors.
        absent: tensors without a gradient.
        aligned: tensors begin at multiples of 16 bytes, not anywhere.
        blocks: of a page.
        waste: bytes of a page behind its blocks.
        coefficient: of the gradients, or None.
        seed: of all values.
        hyper: what ``hyper_row`` takes, for all tensors instead of each tensor's own.
    """

    def __init__(
        self,
        sizes: Sequence[int] = SIZES,
        bits: int = 32,
        dtype: torch.dtype = torch.float32,
        *,
        absent: Collection[int] = (),
        aligned: bool = False,
        blocks: int = 16,
        waste: int = 32,
        coefficient: float | None = None,
        seed: int = 0,
        **hyper: Any,
    ) -> None:
        self.sizes, self.bits, self.dtype = tuple(sizes), bits, dtype
        self.absent, self.aligned = frozenset(absent), aligned
        page_bytes = -(-blocks * block_bytes(bits) // 16) * 16 + waste
        self.table = PageTable(sizes, [Kind(bits, dtype)] * len(sizes), page_bytes)
        self.param_rooms, self.grad_rooms = [], []
        for t, size in enumerate(sizes):
            values = randn(size, seed=seed + 2 * t, dtype=dtype)
            spread = randn(size, seed=seed + 2 * t + 1, dtype=torch.float64)
            gradient = (spread * 10 ** randn(size, seed=seed + t, dtype=torch.float64)).clamp(-1e4, 1e4)
            places = (0, 0) if aligned else ((t + 1) % 7, (t + 5) % 7)
            self.param_rooms.append(guarded(values, places[0], seed + t))
            self.grad_rooms.append(guarded(gradient.to(dtype), places[1], seed + t + 1))
        self.state_room = guarded(random_bytes(self.table.nbytes, seed), 0, seed + 1)
        for t in range(len(sizes)):
            for i, part in enumerate(self.moments_of(t)):
                _fill(part, seed + 10 * t + i)
        own = [{"step": t + 1, "lr": 1e-2 / (t + 1), "weight_decay": 1e-2 * t} for t in range(len(sizes))]
        self.hyper = torch.tensor([hyper_row(**settings | hyper) for settings in own]).view(-1, 6)
        self.coefficient = None if coefficient is None else torch.tensor(coefficient)
        self.chunks = self._cut(CHUNK)

    def _cut(self, most: int) -> Tensor:
        pages = range(len(self.table.pages))
        rows = [row for page in pages for row in self.table.chunks(page, page * self.page_bytes, most)]
        return torch.tensor(rows, dtype=torch.int64, device=self.state.device).view(-1, 5)

    def to(self, device: str) -> ManyTensors:
        """The same on a device, in memory of its own."""
        other = copy.copy(self)
        other.param_rooms = [room.to(device) for room in self.param_rooms]
        other.grad_rooms = [room.to(device) for room in self.grad_rooms]
        other.state_room, other.chunks = self.state_room.to(device), self.chunks.to(device, copy=True)
        other.hyper = self.hyper.to(device, copy=True)
        other.coefficient = None if self.coefficient is None else self.coefficient.to(device, copy=True)
        return other

    def copy(self, most: int | None = None) -> ManyTensors:
        """The same in memory of its own; ``most`` cuts the chunks of a step anew."""
        other = self.to(self.state.device.type)
        if most is not None:
            other.chunks = other._cut(most)
        return other

    @property
    def params(self) -> list[Tensor]:
        return [room.inner for room in self.param_rooms]

    @property
    def grads(self) -> list[Tensor | None]:
        return [None if t in self.absent else room.inner for t, room in enumerate(self.grad_rooms)]

    def grad(self, tensor: int) -> Tensor:
        """Of a tensor that has one."""
        assert tensor not in self.absent
        return self.grad_rooms[tensor].inner

    @property
    def state(self) -> Tensor:
        return self.state_room.inner

    @property
    def page_bytes(self) -> int:
        return self.table.page_bytes

    def moments_of(self, tensor: int) -> list[Moments]:
        """A tensor's state, piece by piece."""
        return [
            moments(self.state[page * self.page_bytes :][: self.page_bytes], self.bits).narrow(
                segment.start, segment.length
            )
            for page, segment in self.table.places[tensor]
        ]

    def gradients(self) -> Gradients:
        return gradients(self.params, self.grads, self.aligned)

    def step_args(self, spare: int = 0) -> tuple[Any, ...]:
        """Arguments of ``adamw_step``."""
        own = (self.bits, self.page_bytes, self.dtype, spare)
        return self.state, self.chunks, self.gradients(), self.hyper, self.coefficient, *own

    def step(self, backend: str | None = None, spare: int = 0) -> ManyTensors:
        """One step; itself."""
        with peftrt.backend(backend):
            ops.adamw_step(*self.step_args(spare))
        return self

    def norm_args(self, max_norm: float) -> tuple[Any, ...]:
        """Arguments of ``gradient_norm``; what it writes is NaN."""
        device = self.state.device
        chunks = chunks_of(self.sizes).to(device)
        partials = torch.full((len(chunks),), torch.nan, dtype=torch.float64, device=device)
        return self.gradients(), chunks, partials, max_norm, torch.full((2,), torch.nan, device=device)

    def norm(self, max_norm: float = 1.0, backend: str | None = None) -> tuple[Tensor, Tensor]:
        """Norm with coefficient, and the chunks' sums."""
        *args, _ = self.norm_args(max_norm)
        room = torch.full((10,), torch.nan, device=self.state.device)
        out = room[4:6]  # at a multiple of 16 bytes, as norm_args has it: a kernel is compiled for one or the other
        with peftrt.backend(backend):
            ops.gradient_norm(*args, out)
        assert room[:4].isnan().all()
        assert room[6:].isnan().all()
        return out, args[2]

    def everything(self) -> list[Tensor]:
        """All that an operation could write, guards too, as bytes."""
        return [room.memory for room in (self.state_room, *self.param_rooms, *self.grad_rooms)]

    def assert_equals(self, expected: ManyTensors) -> None:
        """Every bit of tensors and pages, with all that lies around them, but that one NaN is like another."""
        for got, wanted in zip(self._quiet().everything(), expected._quiet().everything(), strict=True):
            assert_same_bits(got, wanted)

    def _quiet(self) -> ManyTensors:
        """On a CPU, with one NaN for all in what a step writes as numbers; codes and guards stay as they are."""
        made = self.to("cpu")
        state = [part for t in range(len(self.sizes)) for piece in made.moments_of(t) for part in piece]
        for part in (*made.params, *state):
            if part is not None and part.is_floating_point():
                part.copy_(quiet(part))
        return made


def _fill(part: Moments, seed: int) -> None:
    m, v = (randn(part.exp_avg.numel(), seed=seed + i, dtype=torch.float64) for i in (1, 2))
    if part.exp_avg_scale is None or part.exp_avg_sq_scale is None:
        part.exp_avg.copy_(0.1 * m)
        part.exp_avg_sq.copy_(1e-2 * v.square())
        return  # the codes are random as they are
    part.exp_avg_scale.copy_(m[: part.exp_avg_scale.numel()].abs())
    part.exp_avg_sq_scale.copy_(v[: part.exp_avg_sq_scale.numel()].abs())


def quiet(tensor: Tensor) -> Tensor:
    """With one NaN for all: which of its bits a NaN has is nobody's promise."""
    return tensor.masked_fill(tensor.isnan(), torch.nan)


def assert_same(actual: Tensor, expected: Tensor) -> None:
    """The same bits, but that one NaN is like another."""
    assert_same_bits(quiet(actual), quiet(expected))
