"""What lora_linear must compute, in fp64, and the bases and backends that its tests go over."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt.formats.nf4 import NF4Weight
from peftrt.reference.dropout import keep_mask
from tests.cases import BACKENDS, FLOATS, nf4, randn

SCALING = 0.75


def base(kind: str, n: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor | NF4Weight:
    if kind == "dense":
        return randn(n, k, seed=seed, dtype=dtype)
    return nf4(n, k, seed=seed, dtype=dtype if dtype in FLOATS else torch.float32, nested=kind == "nested")


def truth(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    bias: Tensor | None = None,
    keep: Tensor | float = 1.0,
    scaling: float = SCALING,
    row_scale: Tensor | float = 1.0,
) -> Tensor:
    """y of fp64 inputs; ``keep``: what the adapter's input is multiplied with."""
    y = row_scale * (x @ weight.t() + scaling * ((x * keep) @ lora_A.t() @ lora_B.t()))
    return y if bias is None else y + bias


def kept(seed: int, x: Tensor, p: float) -> Tensor:
    rows, k = x.numel() // x.shape[-1], x.shape[-1]
    return (keep_mask(torch.tensor([seed]), rows, k, p) / (1 - p)).view(x.shape).double() if p else torch.ones(())


def truth_with_gradients(
    values: list[Tensor | None], dy: Tensor, keep: Tensor, squared: bool = False
) -> tuple[Tensor, list[Tensor]]:
    """y and the gradients of what is given, (x, W, A, B, b) or (x, W, A, B, b, c), in fp64.

    ``squared``: of the squares of all. The map is linear in each argument: this is the sum of the squares of the
    terms that a result is summed from, and its root the magnitude of the sum if nothing cancels.
    """
    power = 2 if squared else 1
    leaves = [None if v is None else v.detach().double().pow(power).requires_grad_() for v in values]
    x, weight, lora_A, lora_B, bias, *row_scale = leaves
    assert x is not None and weight is not None and lora_A is not None and lora_B is not None  # noqa: PT018
    y = truth(x, weight, lora_A, lora_B, bias, keep**power, SCALING**power, *row_scale)  # type: ignore[arg-type]
    grads = torch.autograd.grad(y, [leaf for leaf in leaves if leaf is not None], dy.double().pow(power))
    return y.detach(), list(grads)


def largest(squares: Tensor) -> float:
    return squares.max().sqrt().item() if squares.numel() else 0.0


COMBINATIONS = [(kind, backend) for kind in ("dense", "plain", "nested") for backend in BACKENDS]


def combinations() -> list[Any]:
    """(base, backend) with the skip of a backend that is not built."""
    marked = []
    for kind, backend in COMBINATIONS:
        values = backend.values[0] if hasattr(backend, "values") else backend
        marked.append(pytest.param(kind, values, marks=getattr(backend, "marks", ())))
    return marked
