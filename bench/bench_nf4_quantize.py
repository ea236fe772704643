"""nf4_quantize in blocks of 64, with plain and with nested statistics, against bitsandbytes."""

from __future__ import annotations

import torch

from bench import problem, shapes, truth
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.peers import bitsandbytes_nf4
from bench.results import OWN
from peftrt import ops

# The largest error, as a share of the largest byte of codes, is that of a value which lies on a threshold but for a
# rounding of the scale: one step of a high nibble.
ONE_STEP = 16 / 240


def cells(device: str, quick: bool) -> list[Cell]:
    """One site of a CPU: bitsandbytes takes seconds for a call there."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    stored = {"plain": "N*K*(1/2 + 4/64)", "nested": NF4_BYTES}
    return [
        Cell("nf4_quantize", part, site, 0, dtype, f"s*N*K + {codes}", "N*K")
        for site in shapes.sites(device, quick)[: 1 if device == "cpu" else None]
        for dtype in dtypes
        for part, codes in stored.items()
    ]


def bench_nf4_quantize(cell: Cell, runner: Runner) -> None:
    dense = problem.dense(cell.site, cell.dtype, runner.device)
    nested = cell.part == "nested"
    expected = (truth.encode(dense),)
    rotated = problem.copies(dense, runner.timer.rotation_bytes)

    def own(weight: torch.Tensor) -> Contender:
        calls = tuple(lambda w=w: ops.nf4_quantize(w, double_quant=nested).codes.reshape(-1) for w in rotated)
        return Contender(calls, expected, 0.0, backend_of("nf4_quantize", weight, 64, nested))

    builders = {
        OWN: lambda: own(dense),
        bitsandbytes_nf4.NAME: lambda: Contender(
            tuple(bitsandbytes_nf4.quantize(w, nested) for w in rotated), expected, ONE_STEP
        ),
    }
    runner.run(cell, builders)
