"""What kernels are told of a step: which chunks there are, where parameters and gradients lie, the hyper-parameters.

All of it is allocated once. What changes from step to step goes to the device in one copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from peftrt.ops import CHUNK
from peftrt.optim.page_table import Kind, PageTable

_ADDRESS, _HYPER = 3, 6  # columns: Gradients.addresses, adamw_step's hyper
_ROW = 8 * _ADDRESS + 4 * _HYPER
_STAGES = 2


class Launch(NamedTuple):
    """One call of ``adamw_step``: pages of one kind, and the rows of their chunks."""

    kind: Kind
    chunks: Tensor


class StepTables:
    """The tables of T parameters on their device.

    Args:
        table: the pages.
        sizes: elements of each parameter.
        with_norm: the norm of all gradients is asked for.
        device: where the tables are.

    Attributes:
        addresses, hyper: int64 ``[T, 3]`` and fp32 ``[T, 6]``, written by ``upload``.
        norm_chunks, partials, norm: arguments of ``gradient_norm``; None without norm.
    """

    def __init__(self, table: PageTable, sizes: Sequence[int], with_norm: bool, device: torch.device) -> None:
        self._table = table
        self._device = device
        count = len(sizes)
        with torch.inference_mode(False):
            self._rows = torch.zeros(count * _ROW, dtype=torch.uint8, device=device)
            self.addresses = self._rows[: 8 * _ADDRESS * count].view(torch.int64).view(count, _ADDRESS)
            self.hyper = self._rows[8 * _ADDRESS * count :].view(torch.float32).view(count, _HYPER)
            on_gpu = device.type == "cuda"
            # A stage is written again when the copy out of it, two steps ago, is done: the host hardly ever waits.
            self._stages = [
                torch.zeros(count * _ROW, dtype=torch.uint8, pin_memory=on_gpu) for _ in range(_STAGES if on_gpu else 1)
            ]
            self._copied = [torch.cuda.Event() for _ in self._stages] if on_gpu else []
            self._turn = 0
            self.norm_chunks: Tensor | None = None
            self.partials: Tensor | None = None
            self.norm: Tensor | None = None
            if with_norm:
                self.norm_chunks = torch.tensor(_norm_chunks(sizes), dtype=torch.int64).view(-1, 3).to(device)
                self.partials = torch.zeros(len(self.norm_chunks), dtype=torch.float64, device=device)
                self.norm = torch.zeros(2, dtype=torch.float32, device=device)
            count = sum(_chunk_count(segment.length) for page in table.pages for segment in page.segments)
            self.chunks = torch.zeros(count, 5, dtype=torch.int64, device=device)

    def place(self, resident: int) -> None:
        """Let so many pages lie in the slab from its beginning on, and every other one where it is asked for."""
        table = self._table
        rows: list[tuple[int, ...]] = []
        spans: list[tuple[int, Kind, int, int]] = []  # page or -1, kind, rows from, to
        for number, page in enumerate(table.pages):
            first = len(rows)
            rows += table.chunks(number, number * table.page_bytes if number < resident else 0, CHUNK)
            where = -1 if number < resident else number
            if spans and where == -1 and spans[-1][:2] == (-1, page.kind):
                first = spans.pop()[2]
            spans.append((where, page.kind, first, len(rows)))
        self.chunks.copy_(torch.tensor(rows, dtype=torch.int64).view(-1, 5))
        self._launches: dict[int, list[Launch]] = {-1: []}
        for where, kind, first, last in spans:
            self._launches.setdefault(where, []).append(Launch(kind, self.chunks[first:last]))

    def launches(self, page: int) -> list[Launch]:
        """Those of a page that is in the ring, or of all resident ones (-1)."""
        return self._launches[page]

    def upload(self, addresses: np.ndarray, hyper: np.ndarray) -> None:
        """Bring int64 ``[T, 3]`` and fp32 ``[T, 6]`` to the device, behind what the current stream has been given."""
        stage = self._stages[self._turn]
        if self._copied:
            self._copied[self._turn].synchronize()
        target = stage.numpy()
        split = addresses.nbytes
        target[:split] = addresses.view(np.uint8).reshape(-1)
        target[split:] = hyper.view(np.uint8).reshape(-1)
        self._rows.copy_(stage, non_blocking=True)
        if self._copied:
            self._copied[self._turn].record(torch.cuda.current_stream(self._device))
        self._turn = (self._turn + 1) % len(self._stages)

    @property
    def nbytes(self) -> int:
        """On the device."""
        held = (self._rows, self.chunks, self.norm_chunks, self.partials, self.norm)
        return sum(tensor.nbytes for tensor in held if tensor is not None)


def table_bytes(table: PageTable, sizes: Sequence[int], with_norm: bool) -> int:
    """What the tables will take of the device, before there are any."""
    chunks = sum(_chunk_count(segment.length) for page in table.pages for segment in page.segments)
    norm = (3 + 1) * 8 * sum(map(_chunk_count, sizes)) + 8 if with_norm else 0
    return len(sizes) * _ROW + chunks * 5 * 8 + norm


def _chunk_count(length: int) -> int:
    return -(-length // CHUNK)


def _norm_chunks(sizes: Sequence[int]) -> list[tuple[int, ...]]:
    """In the order in which parameters were given: the sum's order is theirs alone."""
    return [(i, first, min(CHUNK, size - first)) for i, size in enumerate(sizes) for first in range(0, size, CHUNK)]
