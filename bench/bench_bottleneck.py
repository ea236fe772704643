"""bottleneck, forward and forward + backward, against torch's operations, compiled ones, and AdapterHub's module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bench import problem, shapes, truth
from bench.cells import Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.results import OWN
from bench.shapes import Site
from peftrt import ops

TORCH = "torch"  # two products, the activation, the factor and the sum
COMPILED = "torch.compile"  # the same, by inductor
MODULE = "AdapterHub's form"  # nn.Sequential and nn.Linear, as its Adapter has them
SCALING, ACTIVATION = 0.5, "gelu"
ROWS = (1, 16, 512)

# N is the adapter's rank: D is [N, K], U [K, N], both fp32. The floor reads them and x and the residual once and writes
# y once; in training it does so once in each direction (dY for y, dX for the residual), and writes the gradients of D
# and U.
FORWARD = ("8*N*K + 3*s*M*K", "4*M*N*K")
TRAIN = ("24*N*K + 6*s*M*K", "12*M*N*K")


def cells(device: str, quick: bool) -> list[Cell]:
    """``part`` is ``forward`` or ``train``, which has the gradients of x, the residual and all four parameters."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    return [
        Cell("bottleneck", part, site, M, dtype, *floor)
        for dtype in dtypes
        for site in ((Site(16, 256),) if quick else shapes.BOTTLENECKS)
        for part, floor in (("forward", FORWARD), ("train", TRAIN))
        for M in (shapes.QUICK_ROWS if quick else ROWS)
    ]


def bench_bottleneck(cell: Cell, runner: Runner) -> None:
    adapter = Adapter(cell, runner.device)
    expected = adapter.truth_forward() if cell.part == "forward" else adapter.truth_train()
    run = adapter.forward if cell.part == "forward" else adapter.train

    def contender(call: Callable[..., Tensor], backend: str | None = None) -> Contender:
        return Contender((run(call),), expected, truth.TOLERANCES[cell.dtype], backend)

    contenders = {
        OWN: lambda: contender(own, backend_of("bottleneck", *adapter.inputs, SCALING, ACTIVATION)),
        TORCH: lambda: contender(composed),
        MODULE: lambda: contender(adapter.module()),
    }
    if cell.part == "forward":
        contenders |= {COMPILED: lambda: contender(torch.compile(composed, dynamic=False))}
    runner.run(cell, contenders)


def own(*inputs: Tensor) -> Tensor:
    return ops.bottleneck(*inputs, SCALING, ACTIVATION)


def composed(x: Tensor, residual: Tensor, D: Tensor, b_d: Tensor, U: Tensor, b_u: Tensor) -> Tensor:
    """An fp32 adapter beside a bf16 model takes x in fp32, and what it gives is rounded."""
    inner = F.linear(x.to(D.dtype), D, b_d)
    return residual + (SCALING * F.linear(F.gelu(inner), U, b_u)).to(x.dtype)


class Module:
    """A function of x and the residual with parameters of its own."""

    def __init__(self, call: Callable[..., Tensor], parameters: tuple[nn.Parameter, ...]) -> None:
        self.call, self.parameters = call, parameters

    def __call__(self, *inputs: Tensor) -> Tensor:
        return self.call(*inputs)


class Adapter:
    """One cell's operands: x, the residual, D, b_d, U and b_u."""

    def __init__(self, cell: Cell, device: str) -> None:
        (R, K), M = cell.site, cell.M
        scaled = ((R, K, 2, K**-0.5), (1, R, 3, 1.0), (K, R, 4, R**-0.5), (1, K, 5, 1.0))
        D, b_d, U, b_u = (f * problem.activations(n, k, torch.float32, device, seed=i) for n, k, i, f in scaled)
        x, residual, self.dy = (problem.activations(M, K, cell.dtype, device, seed=i) for i in (1, 6, 7))
        self.inputs = (x, residual, D, b_d[0], U, b_u[0])

    def forward(self, call: Callable[..., Tensor]) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: call(*self.inputs))

    def train(self, call: Callable[..., Tensor]) -> Callable[[], Any]:
        leaves = [t.detach().requires_grad_() for t in self.inputs]
        if isinstance(call, Module):
            leaves[2:] = call.parameters
        return lambda: torch.autograd.grad(call(*leaves), leaves, self.dy)

    def module(self) -> Callable[..., Tensor]:
        """AdapterHub's form written as torch's modules, with the cell's tensors for their parameters."""
        _, _, D, b_d, U, b_u = self.inputs
        R, K = D.shape
        down, up = nn.Sequential(nn.Linear(K, R), nn.GELU()).to(D.device), nn.Linear(R, K).to(D.device)
        parameters = (down[0].weight, down[0].bias, up.weight, up.bias)
        with torch.no_grad():
            for parameter, value in zip(parameters, (D, b_d, U, b_u), strict=True):
                parameter.copy_(value)

        def call(x: Tensor, residual: Tensor, *_: Tensor) -> Tensor:
            return (up(down(x.to(D.dtype))) * SCALING).to(x.dtype) + residual

        return Module(call, parameters)

    def truth_forward(self) -> tuple[Tensor, ...]:
        return (self._truth([t.double() for t in self.inputs]),)

    def truth_train(self) -> tuple[Tensor, ...]:
        leaves = [t.double().requires_grad_() for t in self.inputs]
        return torch.autograd.grad(self._truth(leaves), leaves, self.dy.double())

    @staticmethod
    def _truth(inputs: list[Tensor]) -> Tensor:
        x, residual, D, b_d, U, b_u = inputs
        return residual + SCALING * (F.gelu(x @ D.t() + b_d) @ U.t() + b_u)
