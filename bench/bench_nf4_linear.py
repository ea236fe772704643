"""nf4_linear, forward and input gradient, against bitsandbytes and the dense layer it replaces."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench import problem, shapes, truth
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.peers import bitsandbytes_nf4, torch_dense
from bench.results import OWN
from peftrt import NF4Weight, ops

FLOPS = "2*M*N*K"


def cells(device: str, quick: bool) -> list[Cell]:
    """By site and dtype, so that one weight at a time is held."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    return [
        Cell("nf4_linear", part, site, M, dtype, f"{NF4_BYTES} + s*M*(N + K)", FLOPS)
        for site in shapes.sites(device, quick)
        for dtype in dtypes
        for part in ("forward", "dx")
        for M in shapes.rows(device, quick)
    ]


def bench_nf4_linear(cell: Cell, runner: Runner) -> None:
    make = _forward if cell.part == "forward" else _dx
    runner.run(cell, make(cell, runner.device, runner.timer.rotation_bytes))


def _forward(cell: Cell, device: str, rotation: int) -> dict[str, Callable[[], Contender]]:
    weight = problem.weight(cell.site, cell.dtype, device)
    dense = problem.decoded(cell.site, cell.dtype, device)
    x = problem.activations(cell.M, cell.site.K, cell.dtype, device)
    expected = (truth.linear(x, dense),)

    def contender(calls: list[Callable[[], Tensor]], backend: str | None = None) -> Contender:
        return Contender(tuple(calls), expected, truth.TOLERANCES[cell.dtype], backend)

    def call(layer: nn.Module) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: layer(x))

    def own(w: NF4Weight) -> Callable[[], Tensor]:
        return torch.no_grad()(lambda: ops.nf4_linear(x, w))

    nf4 = problem.copies(weight, rotation)
    return {
        OWN: lambda: contender([own(w) for w in nf4], backend_of("nf4_linear", x, weight, None)),
        bitsandbytes_nf4.NAME: lambda: contender([call(bitsandbytes_nf4.linear(w, cell.dtype)) for w in nf4]),
        torch_dense.NAME: lambda: contender([call(torch_dense.linear(w)) for w in problem.copies(dense, rotation)]),
    }


def _dx(cell: Cell, device: str, rotation: int) -> dict[str, Callable[[], Contender]]:
    """Each contender's own backward, through autograd, of a forward that is run once."""
    weight = problem.weight(cell.site, cell.dtype, device)
    dense = problem.decoded(cell.site, cell.dtype, device)
    x = problem.activations(cell.M, cell.site.K, cell.dtype, device).requires_grad_()
    dy = problem.activations(cell.M, cell.site.N, cell.dtype, device, seed=4)
    expected = (truth.linear_dx(dy, dense),)

    def contender(outputs: list[Tensor], backend: str | None = None) -> Contender:
        calls = tuple(_gradient(y, x, dy) for y in outputs)
        return Contender(calls, expected, truth.TOLERANCES[cell.dtype], backend)

    nf4 = problem.copies(weight, rotation)
    return {
        OWN: lambda: contender([ops.nf4_linear(x, w) for w in nf4], backend_of("nf4_linear_dx", dy, weight)),
        bitsandbytes_nf4.NAME: lambda: contender([bitsandbytes_nf4.linear(w, cell.dtype)(x) for w in nf4]),
        torch_dense.NAME: lambda: contender([torch_dense.linear(w)(x) for w in problem.copies(dense, rotation)]),
    }


def _gradient(y: Tensor, x: Tensor, dy: Tensor) -> Callable[[], Tensor]:
    return lambda: torch.autograd.grad(y, x, dy, retain_graph=True)[0]
