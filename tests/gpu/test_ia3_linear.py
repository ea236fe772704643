"""ia3_linear on a GPU against float64: factors of inputs and of outputs, whichever way the base's product goes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from bench import truth
from peftrt import NF4Weight, ops
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, randn
from tests.gpu.places import BY_DEFAULT, Place, assert_not_by_the_reference, decoded, on_gpu, random_weight

K, N = 320, 384
ROWS = (1, 40, 64, 65, 300, 700)  # a few, tiles, cuBLAS
# The base and what is made of it may each be rounded, and so are the factors of x with it.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 3 * 2.0**-9, torch.float16: 3 * 2.0**-12}
SIDES = [(True, False), (False, True), (True, True)]


def _factors(size: int, has: bool, device: str) -> Tensor | None:
    return (randn(size, seed=size, device=device).abs() + 0.5) if has else None


def _weight(base: str, dtype: torch.dtype, device: str) -> tuple[Tensor | NF4Weight, Tensor]:
    """The operand, and W in its dtype."""
    nf4 = random_weight(N, K, device)
    wide = decoded(nf4, dtype)
    return (nf4 if base == "nf4" else wide), wide


def _near(actual: Tensor, expected: Tensor, dtype: torch.dtype, times: int = 1) -> None:
    error, allowed = truth.relative_error(actual.cpu(), expected), times * ALLOWED[dtype]
    assert error <= allowed, f"{error:.3g} of {allowed:.3g}"


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@BY_DEFAULT
def test_forward_and_gradients_equal_fp64(
    place: Place, base: str, dtype: torch.dtype, sides: tuple[bool, bool]
) -> None:
    weight, wide = _weight(base, dtype, place.device)
    for m in ROWS if place.on_gpu else (1, 70):
        u, c = (_factors(size, has, place.device) for size, has in zip((K, N), sides, strict=True))
        x, bias = randn(m, K, seed=m, dtype=dtype, device=place.device), randn(N, dtype=dtype, device=place.device)
        leaves = [None if t is None else t.requires_grad_() for t in (x, u, c)]
        y = ops.ia3_linear(leaves[0], weight, *leaves[1:], bias)
        dy = randn(m, N, seed=4, dtype=dtype, device=place.device)
        grads = torch.autograd.grad(y, [t for t in leaves if t is not None], dy)
        wides = [None if t is None else t.detach().cpu().double().requires_grad_() for t in leaves]
        rows, inputs, outputs = wides
        assert rows is not None
        z = (rows if inputs is None else rows * inputs) @ wide.cpu().double().t()
        true = (z if outputs is None else z * outputs) + bias.cpu().double()
        _near(y.detach(), true.detach(), dtype)
        expected = torch.autograd.grad(true, [t for t in wides if t is not None], dy.cpu().double())
        for got, want in zip(grads, expected, strict=True):
            # of the outputs' factors: out of y, which is rounded with its bias
            _near(got, want, dtype, times=2)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@on_gpu
def test_a_kernel_takes_it(base: str) -> None:
    for m in ROWS:
        x, (weight, _) = randn(m, K, dtype=torch.bfloat16, device="cuda"), _weight(base, torch.bfloat16, "cuda")
        u, c = _factors(K, True, "cuda"), _factors(N, True, "cuda")
        assert_not_by_the_reference("ia3_linear", x, *weight_args("ia3_linear", weight), u, c, None)
