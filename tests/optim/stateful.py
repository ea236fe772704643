"""Optimizers with some steps behind them, and what is compared of them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from peftrt.optim import PagedAdamW

# Small and large for min_8bit_size; within one page, over many, a scalar; one without elements, whose gradient counts
# as none, and one that never has any.
SHAPES = ((70, 100), (5,), (33, 256), (), (4096,), (3, 4099), (0, 3), (300,), (2, 2500))
EMPTY, IDLE = 6, 7
PAGE = 4096


def parameters(dtype: torch.dtype = torch.float32, shapes: Sequence[tuple[int, ...]] = SHAPES) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(shape, generator=generator).to(dtype)) for shape in shapes]


def train(params: Sequence[nn.Parameter], optimizer: Any, steps: range, idle: int | None = IDLE) -> None:
    """Steps with gradients that depend on their number alone."""
    for step in steps:
        generator = torch.Generator().manual_seed(100 + step)
        for number, parameter in enumerate(params):
            grad = torch.randn(parameter.shape, generator=generator).to(parameter)
            parameter.grad = None if number == idle else grad
        optimizer.step()


def make(
    bits: int = 32, steps: int = 3, page_size: int = PAGE, params: list[nn.Parameter] | None = None, **options: Any
) -> PagedAdamW:
    """One that has had some steps, with two groups."""
    params = parameters() if params is None else params
    groups = [{"params": params[:4], "lr": 1e-2}, {"params": params[4:], "weight_decay": 0.1}]
    optimizer = PagedAdamW(groups, lr=1e-3, bits=bits, page_size=page_size, **options)
    train(params, optimizer, range(steps))
    return optimizer


def bits_of(value: Any) -> Any:
    """What holds tensors, as bytes: NaN compares equal, and 0 and -0 do not."""
    if isinstance(value, Tensor):
        data = value.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        return value.dtype, tuple(value.shape), data.numpy().tobytes()
    if isinstance(value, dict):
        return {key: bits_of(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [bits_of(item) for item in value]
    return value


def everything(optimizer: PagedAdamW) -> Any:
    """All that a failed load must leave alone."""
    pages = [optimizer.read_page(page).clone() for page in range(len(optimizer.table.pages))]
    groups = [{key: value for key, value in group.items() if key != "params"} for group in optimizer.param_groups]
    return bits_of([pages, groups]), optimizer.steps.tolist(), bits_of(list(optimizer.parameters))


def named(optimizer: PagedAdamW) -> dict[str, Tensor]:
    """The Parameters, as they go into a checkpoint."""
    return {str(number): parameter for number, parameter in enumerate(optimizer.parameters)}
