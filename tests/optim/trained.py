"""Parameters of many sizes that are trained on gradients drawn from a seed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftrt.formats.adamw_state import moments
from peftrt.optim import PagedAdamW, stores

SIZES = ((1000,), (128, 256), (300, 1000), (7,), (65536,), (100, 1000), (1,), (2, 3, 5))
PAGES = {"device_budget": "512KiB", "page_size": "64KiB"}


def parameters(dtype: torch.dtype = torch.float32, sizes: Sequence[tuple[int, ...]] = SIZES) -> list[nn.Parameter]:
    draw = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(size, generator=draw).to(dtype)) for size in sizes]


def gradients(params: Sequence[Tensor], step: int, scale: float = 1.0) -> None:
    """The gradients of a step; every fifth Parameter in turn has none."""
    draw = torch.Generator().manual_seed(1000 + step)
    for i, p in enumerate(params):
        grad = scale * torch.randn(p.shape, generator=draw)
        p.grad = None if (i + step) % 5 == 0 else grad.to(p.dtype)


def train(
    steps: int = 6,
    dtype: torch.dtype = torch.float32,
    between: Callable[[int, PagedAdamW], Any] | None = None,
    **options: Any,
) -> tuple[list[nn.Parameter], PagedAdamW]:
    """Parameters and their optimizer after so many steps; ``between`` is called after each."""
    params = parameters(dtype)
    optimizer = PagedAdamW(params, lr=1e-2, weight_decay=0.1, **options)
    for step in range(steps):
        gradients(params, step)
        optimizer.step()
        if between is not None:
            between(step, optimizer)
    return params, optimizer


def same(a: Sequence[Tensor], b: Sequence[Tensor]) -> bool:
    """Bit for bit."""
    return all(torch.equal(raw(x), raw(y)) for x, y in zip(a, b, strict=True))


def raw(tensor: Tensor) -> Tensor:
    return tensor.detach().reshape(-1).view(torch.uint8)


def same_pages(a: PagedAdamW, b: PagedAdamW) -> bool:
    """The state of every Parameter is the same, bit for bit, wherever it lies."""
    return a.steps.tolist() == b.steps.tolist() and all(
        same(moments_of(a, i), moments_of(b, i)) for i in range(len(a.parameters))
    )


def moments_of(optimizer: PagedAdamW, index: int) -> list[Tensor]:
    """A Parameter's state as it lies in the pages, in one piece each."""
    parts = []
    for page, segment in optimizer.table.places[index]:
        kind = optimizer.table.pages[page].kind
        found = moments(optimizer.read_page(page), kind.bits).narrow(segment.start, segment.length)
        parts.append([part.clone() for part in found if part is not None])
    return [torch.cat(pieces) for pieces in zip(*parts, strict=True)]


def refuse_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """A store asks for page-locked memory in vain."""
    zeros = torch.zeros

    def refusing(*size: Any, pin_memory: bool = False, **options: Any) -> Tensor:
        if pin_memory:
            raise RuntimeError("CUDA error: out of memory\nmore words")
        return zeros(*size, **options)

    monkeypatch.setattr(stores.torch, "zeros", refusing)
