"""AdamW over pages of state: all of them resident, against other optimizers; and half, a tenth and none of them, with
the time that the copies take alone and the time that the kernels take alone.
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from bench import links, problem, shapes, truth
from bench.cells import Cell
from bench.harness import Runner
from bench.measure import Contender
from bench.peers import bitsandbytes_adamw, torch_adamw, torchao_offload
from bench.results import OWN
from bench.shapes import Site
from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP
from peftrt.optim import PagedAdamW
from peftrt.optim.page_table import Kind, PageTable
from peftrt.optim.paged_adamw import PAGE_SIZES
from peftrt.optim.pager import RING
from peftrt.optim.step_tables import table_bytes

RESIDENT, COPIES = "resident", "copies"  # the same work without copies, and the copies without the work
SHARES = (1.0, 0.5, 0.1, 0.0)  # of the pages beside the ring's three that stay
STATE = {32: "8", 8: "(2 + 8/256)"}  # bytes an element
QUICK_PAGE = 1 << 15  # bytes; otherwise what small budgets have by default

CHUNK = 1 << 20  # elements that truth is computed for at a time: its temporaries are many

# Parameters are as small as a step, and no gradient is near zero, where 8 bits tell little: a wrong step shows.
OPTIONS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 1e-2}
# A moment in 8 bits that is rounded to the level beside the true one, as a share of the largest parameter.
ONE_LEVEL = 2.0**-6


def cells(device: str, quick: bool) -> list[Cell]:
    """``part`` is the state's bits and what stays on the device. W pages of G bytes, X of them in the device's memory:
    at the end of a step the ring's three are there, too, and the next one begins with them.
    """
    made = []
    page_bytes = QUICK_PAGE if quick else PAGE_SIZES[-1]
    for site in shapes.tensors(device, quick):
        for dtype in (torch.float32, torch.bfloat16):
            for bits, state in STATE.items():
                pages = len(_table(site, dtype, bits, page_bytes).pages)
                for share in SHARES:
                    slots = RING + math.ceil(share * (pages - RING))
                    # parameter, read and written, gradient and state; and once more each way what is paged
                    nbytes = f"(3*s + 2*{state})*N*K" + ("" if share == 1 else " + 2*(W - X)*G")
                    part = f"{bits}bit-" + ("resident" if share == 1 else f"rho{share:g}")
                    letters = (("W", pages), ("X", slots), ("G", page_bytes))
                    moved = "" if share == 1 else "(W - X)*G"
                    made.append(Cell("paged_adamw", part, site, 0, dtype, nbytes, "15*N*K", letters, moved))
    return made


def _table(site: Site, dtype: torch.dtype, bits: int, page_bytes: int) -> PageTable:
    return PageTable([site.K] * site.N, [Kind(bits, dtype)] * site.N, page_bytes)


def bench_paged_adamw(cell: Cell, runner: Runner) -> None:
    with tempfile.TemporaryDirectory() as folder:
        training = Training(cell, runner.device, folder, runner.timer.rotation_bytes)
        contenders = {OWN: training.own}
        if cell.moved:
            contenders |= {RESIDENT: training.resident, COPIES: training.copies}
        contenders |= {torch_adamw.NAME: training.torch}
        if not cell.moved:
            contenders |= {
                bitsandbytes_adamw.NAME: training.bitsandbytes,
                bitsandbytes_adamw.NAME_PAGED: lambda: training.bitsandbytes(paged=True),
            }
        elif training.bits == 32:
            contenders |= {torchao_offload.NAME: training.torchao}
        runner.run(cell, contenders)


class Training:
    """One cell's parameters and gradients, and the contenders, each over copies of its own.

    A contender has taken two steps when it is checked with the third: so is what it keeps between steps.
    """

    def __init__(self, cell: Cell, device: str, folder: str, rotation_bytes: int) -> None:
        (N, K), self.dtype = cell.site, cell.dtype
        self.size = dict(cell.letters)
        self.bits = int(cell.part.partition("bit")[0])
        self.device, self.backing = device, folder if device == "cpu" else "host"
        self.initial = OPTIONS["lr"] * problem.activations(N, K, torch.float32, device).to(self.dtype)
        self.grads = [self._gradient(problem.activations(N, K, torch.float32, device, seed)) for seed in (2, 3)]
        self.count = max(1, -(-rotation_bytes // round(cell.evaluate(cell.bytes) / 2)))
        table = _table(cell.site, cell.dtype, self.bits, self.size["G"])
        tables = table_bytes(table, [K] * N, False)
        self.budget = {slots: slots * self.size["G"] + tables for slots in (self.size["X"], self.size["W"])}
        self._truths: dict[int, tuple[Tensor, ...]] = {}

    def _gradient(self, normal: Tensor) -> Tensor:
        """Of magnitudes 1/2 to 3/2."""
        return (normal.sign() * (0.5 + normal.abs().frac())).to(self.dtype)

    def own(self) -> Contender:
        """As many of the pages in the device's memory as the cell says."""
        return self._paged(self.size["X"])

    def resident(self) -> Contender:
        """All of them."""
        return self._paged(self.size["W"])

    def _paged(self, slots: int) -> Contender:
        where = {"device_budget": self.budget[slots], "page_size": self.size["G"], "backing": self.backing}
        held = 0

        def make(params: list[nn.Parameter], grads: list[Tensor]) -> Callable[[], Any]:
            nonlocal held
            optimizer = PagedAdamW(params, bits=self.bits, **where, **OPTIONS)
            held = optimizer.stats().device_bytes
            return optimizer.step

        return replace(self._contender(make, self.bits), resident=held)

    def torch(self) -> Contender:
        """In the same kernel for all tensors."""
        return self._contender(lambda params, grads: torch_adamw.adamw(params, OPTIONS).step, 32)

    def bitsandbytes(self, paged: bool = False) -> Contender:
        """A kernel for each tensor."""
        return self._contender(
            lambda params, grads: bitsandbytes_adamw.adamw(params, OPTIONS, self.bits, paged).step, self.bits
        )

    def torchao(self) -> Contender:
        """On the CPU."""
        return self._contender(lambda params, grads: torchao_offload.step(params, grads, OPTIONS), 32)

    def copies(self) -> Contender:
        """What is moved in a step, by itself: as many pages each way, both ways at once."""
        link = links.link(self.device, self.size["W"] - self.size["X"], self.size["G"])
        return Contender((link.run,), (links.content(self.size["G"], self.device),), 0.0, captured=False)

    def _contender(self, make: Callable[[list[nn.Parameter], list[Tensor]], Callable[[], Any]], bits: int) -> Contender:
        calls = tuple(self._started(make) for _ in range(self.count))
        tolerance = truth.TOLERANCES[self.dtype]
        if bits not in self._truths:
            self._truths[bits] = self._truth(bits).unbind()
        expected = self._truths[bits]
        return Contender(calls, expected, tolerance + (ONE_LEVEL if bits == 8 else 0.0), captured=False)

    def _started(
        self, make: Callable[[list[nn.Parameter], list[Tensor]], Callable[[], Any]]
    ) -> Callable[[], tuple[Tensor, ...]]:
        """A call that takes a step, behind two of them; it returns the parameters."""
        params = [nn.Parameter(row.clone()) for row in self.initial]
        grads: list[Tensor] = [torch.empty(0)] * len(params)
        step = make(params, grads)
        for of_step in self.grads:
            grads[:] = of_step.unbind()
            for parameter, grad in zip(params, grads, strict=True):
                parameter.grad = grad
            step()

        def call() -> tuple[Tensor, ...]:
            step()
            return tuple(params)

        return call

    def _truth(self, bits: int) -> Tensor:
        """The parameters after three steps."""
        pieces = zip(*(tensor.view(-1).split(CHUNK) for tensor in (self.initial, *self.grads)), strict=True)
        return torch.cat([_after_three_steps(*piece, bits) for piece in pieces]).view_as(self.initial)


def _after_three_steps(initial: Tensor, first: Tensor, second: Tensor, bits: int) -> Tensor:
    zeros = torch.zeros_like(initial, dtype=torch.float64)
    values = initial, zeros, zeros
    for step, grad in enumerate((first, second, second), start=1):
        parameter, *moments = truth.adamw(values, grad, step, **OPTIONS)
        if bits == 8:
            maps = (EXP_AVG_MAP, EXP_AVG_SQ_MAP)
            moments = [truth.eight_bits(*pair) for pair in zip(moments, maps, strict=True)]
        values = parameter, moments[0], moments[1]
    return values[0]
