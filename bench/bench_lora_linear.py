"""lora_linear, forward and forward + backward, against peft (over bitsandbytes under NF4) and the bare base; DoRA's
forward + backward against peft's and LoRA's.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from bench import problem, shapes, truth
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner, backend_of
from bench.measure import Contender
from bench.peers import bitsandbytes_nf4, peft_lora, torch_dense
from bench.results import OWN
from bench.shapes import RANK
from peftrt import LoRALinear, NF4Weight, QLoRALinear, ops
from peftrt.ops._weight import weight_args

BASE = "base"  # the same base without an adapter, frozen: peftrt's own for NF4, torch's for a dense one
LORA = "lora"  # beside DoRA: the same layer without magnitudes
ALPHA = 2 * RANK
SCALING = ALPHA / RANK

# The weight and the activations once in each direction, A and B once, and their gradients once; in fp32 on a CPU.
DENSE_BYTES = "s*N*K"
FORWARD = ("{base} + s*M*(N + K) + 4*R*(N + K)", "2*M*N*K + 2*M*R*(N + K)")
TRAIN = ("2*({base}) + 2*s*M*(N + K) + 8*R*(N + K)", "4*M*N*K + 6*M*R*(N + K)")
# The weight once more for the norms of W + s B A; y, which the magnitude's gradient is of, once more in each direction.
DORA = ("3*({base}) + 2*s*M*(N + K) + 2*s*M*N + 12*R*(N + K)", "4*M*N*K + 6*M*R*(N + K) + 2*N*K*R")


def cells(device: str, quick: bool) -> list[Cell]:
    """``part`` is the base and what is run: forward alone, with the gradients of x, A and B, or DoRA with them and that
    of the magnitudes.
    """
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    made = []
    for site in shapes.sites(device, quick):
        for base, traffic in (("nf4", NF4_BYTES), ("dense", DENSE_BYTES)):
            for part, (nbytes, flops) in (("forward", FORWARD), ("train", TRAIN), ("dora", DORA)):
                for M in shapes.rows(device, quick, lora=True):
                    nbytes_here = nbytes.format(base=traffic)
                    made.append(Cell("lora_linear", f"{base}-{part}", site, M, dtype, nbytes_here, flops))
    return made


def bench_lora_linear(cell: Cell, runner: Runner) -> None:
    base, part = cell.part.split("-")
    lora = Lora(cell, runner.device, part == "dora")
    run = forward if part == "forward" else train
    with_adapter, without = (lora.truth_forward if part == "forward" else lora.truth_train)()
    operand = lora.weight if base == "nf4" else lora.dense
    rotated = problem.copies(operand, runner.timer.rotation_bytes)
    peer = peft_lora.NAME_NF4 if base == "nf4" else peft_lora.NAME

    def contender(make: Callable[..., Subject], expected: tuple[Tensor, ...], backend: str | None = None) -> Contender:
        calls = tuple(run(make(w), lora) for w in rotated)
        return Contender(calls, expected, truth.TOLERANCES[cell.dtype], backend)

    contenders = {
        OWN: lambda: contender(lora.own, with_adapter, lora.backend(operand)),
        peer: lambda: contender(lora.peft, with_adapter),
        BASE: lambda: contender(lora.bare, without),
    }
    if part == "dora":
        plain = Lora(cell, runner.device)
        contenders |= {LORA: lambda: contender(plain.own, plain.truth_train()[0])}
    runner.run(cell, contenders)


class Subject:
    """A layer or function of x, and the adapter's parameters where it has one."""

    def __init__(self, call: Callable[[Tensor], Tensor], parameters: tuple[Tensor, ...] = ()) -> None:
        self.call, self.parameters = call, parameters


def forward(subject: Subject, lora: Lora) -> Callable[[], Tensor]:
    """Inference: nothing is kept for a backward."""
    return torch.no_grad()(partial(subject.call, lora.x.detach()))


def train(subject: Subject, lora: Lora) -> Callable[[], tuple[Tensor, ...]]:
    """Forward, and the gradients of x and of the adapter; a frozen base has x's alone."""
    return lambda: torch.autograd.grad(subject.call(lora.x), (lora.x, *subject.parameters), lora.dy)


class Lora:
    """One cell's operands, and its contenders over a given copy of the weight."""

    def __init__(self, cell: Cell, device: str, dora: bool = False) -> None:
        site, dtype = cell.site, cell.dtype
        self.weight = problem.weight(site, dtype, device)
        self.dense = problem.decoded(site, dtype, device)
        self.x = problem.activations(cell.M, site.K, dtype, device).requires_grad_()
        self.dy = problem.activations(cell.M, site.N, dtype, device, seed=4)
        self.A, self.B = problem.adapter(site, device)
        # not the norms themselves: the factors are to be seen in the results
        norms = truth.row_norms(self.dense, self.A, self.B, SCALING).float()
        self.magnitude = 1.25 * norms if dora else None

    def truth_forward(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """y with the adapter and without."""
        return (truth.lora(self.x, self.dense, self.A, self.B, SCALING),), (truth.linear(self.x, self.dense),)

    def truth_train(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """(dX, dA, dB), of DoRA also dm, with the adapter, (dX,) without."""
        gradients = truth.lora_gradients(self.x, self.dy, self.dense, self.A, self.B, SCALING, self.magnitude)
        return gradients, (truth.linear_dx(self.dy, self.dense),)

    def own(self, weight: Tensor | NF4Weight) -> Subject:
        """The drop-in layer, as a user has it."""
        layer: QLoRALinear | LoRALinear
        options: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "use_dora": self.magnitude is not None}
        if isinstance(weight, NF4Weight):
            N, K = weight.shape
            layer = QLoRALinear(K, N, bias=False, device=self.x.device, dtype=self.x.dtype, **options)
            layer.load_state_dict(weight.to_bnb(), strict=False)
        else:
            layer = LoRALinear.from_linear(torch_dense.linear(weight), **options)
        parameters = layer.adapter("default").parameters
        with torch.no_grad():
            for parameter, value in zip(parameters, (self.A, self.B, self.magnitude), strict=False):
                parameter.copy_(value)
        return Subject(layer, parameters)

    def peft(self, weight: Tensor | NF4Weight) -> Subject:
        """peft's layer over the peer's base."""
        base = self._peer_base(weight)
        layer = peft_lora.lora(base, self.A, self.B, ALPHA, self.magnitude)
        return Subject(layer, peft_lora.parameters(layer))

    def _peer_base(self, weight: Tensor | NF4Weight) -> nn.Module:
        if isinstance(weight, NF4Weight):
            return bitsandbytes_nf4.linear(weight, self.x.dtype)
        return torch_dense.linear(weight)

    def bare(self, weight: Tensor | NF4Weight) -> Subject:
        """The base alone."""
        if isinstance(weight, NF4Weight):
            return Subject(partial(ops.nf4_linear, weight=weight))
        return Subject(torch_dense.linear(weight))

    def backend(self, weight: Tensor | NF4Weight) -> str:
        """What serves the call."""
        parts = weight_args("lora_linear", weight)
        return backend_of("lora_linear", self.x, *parts, self.A, self.B, SCALING, None, 0.0, None, self.magnitude, [])
