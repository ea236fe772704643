"""The layers that tests of several files go over, and a Conv1D like GPT-2's."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from peftrt.nn import AdapterLinear, LoRALinear, NF4Linear, QLoRALinear
from tests.cases import randn

K, N, M = 64, 48, 5


class Conv1D(nn.Module):
    """A linear layer that stores its weight [K, N], as GPT-2's does."""

    def __init__(self, nf: int, nx: int) -> None:
        super().__init__()
        self.nf, self.nx = nf, nx
        self.weight = nn.Parameter(torch.empty(nx, nf))
        self.bias = nn.Parameter(torch.zeros(nf))

    def forward(self, x: Tensor) -> Tensor:
        return x @ self.weight + self.bias


def dense(k: int = K, n: int = N, bias: bool = True, dtype: torch.dtype = torch.float32) -> nn.Linear:
    linear = nn.Linear(k, n, bias, dtype=dtype)
    with torch.no_grad():
        linear.weight.copy_(randn(n, k, seed=1))
        if bias:
            linear.bias.copy_(randn(n, seed=2))
    return linear


def conv1d(k: int = K, n: int = N) -> Conv1D:
    module = Conv1D(n, k)
    with torch.no_grad():
        module.weight.copy_(randn(k, n, seed=1))
        module.bias.copy_(randn(n, seed=2))
    return module


def adapted(cls: type, linear: nn.Module | None = None, **options: object) -> AdapterLinear:
    """A layer with an adapter of rank 4 that changes the output."""
    layer: AdapterLinear = cls.from_linear(
        linear or dense(),
        **{"r": 4, "lora_alpha": 6, "init": False, **options},  # type: ignore[attr-defined]
    )
    return layer


def dora(cls: type, linear: nn.Module | None = None, **options: object) -> AdapterLinear:
    """A layer with a DoRA adapter that changes the output, also by its magnitudes."""
    layer = adapted(cls, linear, use_dora=True, **options)
    assert layer.lora_magnitude is not None
    with torch.no_grad():
        layer.lora_magnitude.mul_(randn(layer.out_features, seed=6).abs() + 0.5)
    return layer


LAYERS: dict[str, Callable[[], nn.Module]] = {
    "NF4Linear": lambda: NF4Linear.from_linear(dense()),
    "LoRALinear": lambda: adapted(LoRALinear),
    "QLoRALinear": lambda: adapted(QLoRALinear),
    "QLoRALinear, plain scales": lambda: adapted(QLoRALinear, double_quant=False),
    "QLoRALinear, odd sizes": lambda: adapted(QLoRALinear, dense(33, 7), block_size=32),
    "QLoRALinear, Conv1D": lambda: adapted(QLoRALinear, conv1d()),
    "LoRALinear, Conv1D": lambda: adapted(LoRALinear, conv1d()),
    "LoRALinear, DoRA": lambda: dora(LoRALinear),
    "LoRALinear, Conv1D, DoRA": lambda: dora(LoRALinear, conv1d()),
    "QLoRALinear, DoRA": lambda: dora(QLoRALinear),
}
DORA = {name: make for name, make in LAYERS.items() if "DoRA" in name}
# those whose adapters can be summed
ADAPTED = {name: make for name, make in LAYERS.items() if name not in ("NF4Linear", *DORA)}


def input_of(layer: nn.Module, *lead: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return randn(*(lead or (M,)), layer.in_features, seed=9, dtype=dtype)  # type: ignore[arg-type]
