"""nf4_dequantize into a given tensor and into a new one, against bitsandbytes and the bare cost of the memory."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench import problem, shapes
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.peers import bitsandbytes_nf4, torch_dense
from bench.results import OWN
from peftrt import NF4Weight, ops

ZEROS = "torch.zeros"


def cells(device: str, quick: bool) -> list[Cell]:
    """``out`` writes into a tensor that is there; ``new`` allocates it, as a call without ``out`` does."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    return [
        Cell("nf4_dequantize", part, site, 0, dtype, f"{NF4_BYTES} + s*N*K", "N*K")
        for site in shapes.sites(device, quick)
        for dtype in dtypes
        for part in ("out", "new")
    ]


def bench_nf4_dequantize(cell: Cell, runner: Runner) -> None:
    weight = problem.weight(cell.site, cell.dtype, runner.device)
    expected = problem.decoded(cell.site, cell.dtype, runner.device)
    rotated = problem.copies(weight, runner.timer.rotation_bytes)
    # written into the one tensor again and again, a GPU's cache would hold it
    outs = problem.copies(torch.empty_like(expected), runner.timer.rotation_bytes) if cell.part == "out" else [None]
    pairs = [(w, outs[i % len(outs)]) for i, w in enumerate(rotated)]
    device = expected.device

    def own(w: NF4Weight, out: torch.Tensor | None) -> Callable[[], torch.Tensor]:
        return lambda: ops.nf4_dequantize(w, out=out)

    scales = (weight.absmax, weight.nested_absmax, weight.nested_offset)
    chosen = ("nf4_dequantize", weight.codes, *scales, list(weight.shape), weight.block_size, weight.dtype)
    builders = {
        OWN: lambda: Contender(tuple(own(*pair) for pair in pairs), (expected,), 0.0, backend_of(*chosen)),
        bitsandbytes_nf4.NAME: lambda: Contender(
            tuple(bitsandbytes_nf4.dequantize(*pair) for pair in pairs), (expected,), 0.0
        ),
    }
    if cell.part == "new":
        nothing = expected.new_zeros(()).expand_as(expected)
        allocate = lambda: torch_dense.zeros(weight.shape, cell.dtype, device)  # noqa: E731
        builders[ZEROS] = lambda: Contender((allocate,) * len(rotated), (nothing,), 0.0)
    runner.run(cell, builders)
