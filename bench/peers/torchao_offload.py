"""torchao: ``CPUOffloadOptimizer``, which steps on the CPU, sends gradients there and gets parameters back."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from bench.peers import need, need_gpu

NAME = "torchao off-load"


def step(params: Sequence[nn.Parameter], grads: Sequence[Tensor], options: Mapping[str, Any]) -> Callable[[], None]:
    """A step with the gradients' way to the host, which hooks of a backward send them; ``grads`` is read each time."""
    need_gpu(params[0].device)
    optimizer = need("torchao.optim").CPUOffloadOptimizer(params, torch.optim.AdamW, offload_gradients=True, **options)

    def call() -> None:
        for parameter in params:
            parameter.grad = None
        torch.autograd.backward(list(params), list(grads))
        optimizer.step()

    return call
