"""ia3_linear, factors of inputs and of outputs, against the bare base and against passes over x and y beside it."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from bench import problem, shapes, truth
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.results import OWN
from bench.shapes import Site
from peftrt import NF4Weight, ops
from peftrt.ops._weight import weight_args

FLOPS = "2*M*N*K"
NF4, DENSE = "nf4", "dense"
INPUTS, OUTPUTS = "inputs", "outputs"
BASE = "base"  # the same rows without factors: peftrt's own for NF4, torch's for a dense one
PASSES = "passes"  # the base's product, and the factors in passes of their own, as HF peft has them
ROWS = (1, 16, 512)


def cells(device: str, quick: bool) -> list[Cell]:
    """``part`` is the base and the side: ``nf4-outputs``."""
    dtypes = (torch.float32, torch.bfloat16) if device == "cpu" else (torch.bfloat16,)
    site = shapes.QUICK_SITES[0] if quick else Site(4096, 4096)
    traffic = {NF4: NF4_BYTES, DENSE: "s*N*K"}
    return [
        Cell("ia3_linear", f"{base}-{side}", site, M, dtype, f"{traffic[base]} + s*M*(N + K)", FLOPS)
        for dtype in dtypes
        for base in (NF4, DENSE)
        # torch multiplies bf16 so slowly on a CPU without instructions for it that many rows take seconds
        for M in (shapes.QUICK_ROWS if quick else ROWS if (device, base, dtype) != _SLOW else ROWS[:2])
        for side in (INPUTS, OUTPUTS)
    ]


_SLOW = ("cpu", DENSE, torch.bfloat16)


def bench_ia3_linear(cell: Cell, runner: Runner) -> None:
    runner.run(cell, _forward(cell, runner.device, runner.timer.rotation_bytes))


def _forward(cell: Cell, device: str, rotation: int) -> dict[str, Callable[[], Contender]]:
    base, side = cell.part.split("-")
    dense = problem.decoded(cell.site, cell.dtype, device)
    weight = problem.weight(cell.site, cell.dtype, device) if base == NF4 else dense
    x = problem.activations(cell.M, cell.site.K, cell.dtype, device)
    size = cell.site.K if side == INPUTS else cell.site.N
    factors = problem.activations(1, size, torch.float32, device, seed=5)[0]
    u, c = (factors, None) if side == INPUTS else (None, factors)
    seen = x if u is None else (x * u).to(x.dtype)
    bare = truth.linear(x, dense)
    scaled = truth.linear(seen, dense) if c is None else bare * c.double()
    weights = problem.copies(weight, rotation)

    def contender(
        call: Callable[[Tensor | NF4Weight], Tensor], expected: Tensor, backend: str | None = None
    ) -> Contender:
        calls = tuple(torch.no_grad()(lambda w=w: call(w)) for w in weights)
        return Contender(calls, (expected,), truth.TOLERANCES[cell.dtype], backend)

    def product(rows: Tensor, w: Tensor | NF4Weight) -> Tensor:
        return ops.nf4_linear(rows, w) if isinstance(w, NF4Weight) else F.linear(rows, w)

    def passes(w: Tensor | NF4Weight) -> Tensor:
        if u is not None:
            return product((x * u).to(x.dtype), w)
        return (product(x, w) * c).to(x.dtype)

    return {
        OWN: lambda: contender(
            lambda w: ops.ia3_linear(x, w, u, c),
            scaled,
            backend_of("ia3_linear", x, *weight_args("ia3_linear", weight), u, c, None),
        ),
        BASE: lambda: contender(lambda w: product(x, w), bare),
        PASSES: lambda: contender(passes, scaled),
    }
