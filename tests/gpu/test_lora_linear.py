"""lora_linear, dropout and a layer's training step on a GPU, against float64 and against the CPU."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor

import peftrt
from bench import truth
from peftrt import QLoRALinear, ops
from tests.cases import FLOATS, randn
from tests.gpu.places import (
    BY_DEFAULT,
    EVERYWHERE,
    Place,
    assert_not_by_the_reference,
    decoded,
    launches,
    on_gpu,
    random_weight,
)
from tests.tolerances import assert_same_bits

N, K, R, SCALING = 256, 320, 16, 2.0
# The largest error as a share of the largest true value: sums of a few hundred products, in three roundings to the
# dtype (base, adapter's share, sum); fp32 allows for products of three TF32.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 3 * 2.0**-9, torch.float16: 3 * 2.0**-12}


def _wishes(place: Place, dtype: torch.dtype, m: int) -> dict[str, str]:
    """The backend of lora_linear and its gradients, and of the product with W that the native one is made of."""
    if place.backend is None:
        return {}
    wishes = {"lora_linear": place.backend, "lora_linear_backward": place.backend}
    return wishes | ({"nf4_linear": place.backend} if place.must("nf4_linear", dtype, m) else {})


def _near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = truth.relative_error(actual, expected.to(actual.device))
    assert error <= ALLOWED[dtype], f"{error:.3g} of {ALLOWED[dtype]:.3g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base", ["nf4", "dense"])
@EVERYWHERE
def test_forward_and_gradients_equal_fp64(place: Place, base: str, dtype: torch.dtype) -> None:
    nf4 = random_weight(N, K, place.device)
    wide = decoded(nf4, dtype)
    weight = nf4 if base == "nf4" else wide
    A = randn(R, K, seed=2, device=place.device).mul_(K**-0.5).requires_grad_()
    B = randn(N, R, seed=3, device=place.device).mul_(R**-0.5).requires_grad_()
    for m in (0, 1, 40, 300):
        x = randn(m, K, seed=m, dtype=dtype, device=place.device).requires_grad_()
        dy = randn(m, N, seed=4, dtype=dtype, device=place.device)
        with peftrt.backend(**_wishes(place, dtype, m)):
            y = ops.lora_linear(x, weight, A, B, SCALING)
            assert y.shape == (m, N)
        grads = torch.autograd.grad(y, (x, A, B), dy)
        if m == 0:
            assert all(not grad.any() for grad in grads)
            continue
        _near(y, truth.lora(x, wide, A, B, SCALING), dtype)
        for grad, expected in zip(grads, truth.lora_gradients(x, dy, wide, A, B, SCALING), strict=True):
            _near(grad, expected, dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@BY_DEFAULT
def test_dropout_has_the_zeros_of_the_cpu(place: Place, dtype: torch.dtype) -> None:
    x = randn(67, 129, dtype=dtype)
    for seed in (0, 1, 2**62):
        assert_same_bits(ops.dropout(x.to(place.device), 0.3, seed), ops.dropout(x, 0.3, seed))


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("m", [3, 40, 700])
@BY_DEFAULT
def test_dropout_before_the_adapter_has_the_zeros_of_the_cpu(place: Place, m: int, base: str) -> None:
    """In y and in all gradients; at 700 rows W is multiplied by panels on a GPU."""
    nf4, x, dy = random_weight(N, K, "cpu"), randn(m, K), randn(m, N, seed=4)
    A, B, bias = randn(R, K, seed=2), randn(N, R, seed=3), randn(N, seed=5)
    weight = nf4 if base == "nf4" else decoded(nf4, torch.float32)
    results = []
    for device in (place.device, "cpu"):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (x, A, B, bias)]
        y = ops.lora_linear(
            leaves[0], weight.to(device), *leaves[1:3], SCALING, leaves[3], dropout_p=0.5, seed=2**40 + 7
        )
        results.append((y.detach(), *torch.autograd.grad(y, leaves, dy.to(device))))
    for got, expected in zip(*results, strict=True):
        _near(got, expected.double(), torch.float32)


@pytest.mark.parametrize("base", ["nf4", "dense"])
@pytest.mark.parametrize("m", [3, 40, 700])
@BY_DEFAULT
def test_a_magnitude_has_the_results_of_the_cpu(place: Place, m: int, base: str) -> None:
    """DoRA: the norms of the rows, y and all gradients."""
    nf4, x, dy = random_weight(N, K, "cpu"), randn(m, K), randn(m, N, seed=4)
    A, B, bias, magnitude = randn(R, K, seed=2), randn(N, R, seed=3), randn(N, seed=5), randn(N, seed=6).abs() + 0.5
    weight = nf4 if base == "nf4" else decoded(nf4, torch.float32)
    results = []
    for device in (place.device, "cpu"):
        leaves = [t.to(device, copy=True).requires_grad_() for t in (x, A, B, bias, magnitude)]
        there = weight.to(device)
        norms = ops.lora_weight_norm(there, *leaves[1:3], SCALING)
        y = ops.lora_linear(leaves[0], there, *leaves[1:3], SCALING, leaves[3], magnitude=leaves[4])
        results.append((norms, y.detach(), *torch.autograd.grad(y, leaves, dy.to(device))))
    for got, expected in zip(*results, strict=True):
        _near(got, expected.double(), torch.float32)


@pytest.mark.parametrize("rank", [1, 3, 64, 256])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@BY_DEFAULT
def test_ranks(place: Place, dtype: torch.dtype, rank: int) -> None:
    nf4 = random_weight(N, K, place.device)
    wide = decoded(nf4, dtype)
    A = randn(rank, K, seed=2, device=place.device).mul_(K**-0.5).requires_grad_()
    B = randn(N, rank, seed=3, device=place.device).mul_(rank**-0.5).requires_grad_()
    x = randn(70, K, seed=1, dtype=dtype, device=place.device).requires_grad_()
    dy = randn(70, N, seed=4, dtype=dtype, device=place.device)
    y = ops.lora_linear(x, nf4, A, B, SCALING)
    _near(y, truth.lora(x, wide, A, B, SCALING), dtype)
    true = truth.lora_gradients(x, dy, wide, A, B, SCALING)
    for grad, expected in zip(torch.autograd.grad(y, (x, A, B), dy), true, strict=True):
        _near(grad, expected, dtype)


@on_gpu
@pytest.mark.parametrize("p", [0.0, 0.1])
@pytest.mark.parametrize("m", [8, 130, 600])
def test_the_result_is_written_once_beside_the_narrow_products(m: int, p: float) -> None:
    """x A^T and the base with it, and the parts of a sum for each of them where it is split; no pass over y besides."""
    nf4, seed = random_weight(4096, 4096, "cuda"), torch.tensor([3], device="cuda")
    A, B = randn(R, 4096, seed=2, device="cuda"), randn(4096, R, seed=3, device="cuda")
    x = randn(m, 4096, dtype=torch.bfloat16, device="cuda")
    assert launches(lambda: ops.lora_linear(x, nf4, A, B, SCALING, dropout_p=p, seed=seed)) <= 4


def _step(layer: QLoRALinear, x: Tensor, dy: Tensor) -> tuple[Tensor, ...]:
    """Two steps of SGD; outputs, gradients and what became of the adapter."""
    optimizer = torch.optim.SGD([p for p in layer.parameters() if p.requires_grad], lr=1e-3)
    y = torch.empty(0)
    for _ in range(2):
        optimizer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = layer(leaf)
        y.backward(dy)
        optimizer.step()
    assert leaf.grad is not None
    return y.detach(), leaf.grad, layer.lora_A.detach(), layer.lora_B.detach()


@pytest.mark.parametrize("m", [3, 40, 300])
@BY_DEFAULT
def test_training_steps_of_a_layer_equal_the_cpus(place: Place, m: int) -> None:
    here = QLoRALinear.from_linear(torch.nn.Linear(K, N), r=R, lora_alpha=32)
    with torch.no_grad():
        here.lora_B.copy_(randn(N, R, seed=3))
    there = copy.deepcopy(here).to(place.device)
    x, dy = randn(m, K, seed=5), randn(m, N, seed=6)
    expected = _step(here, x, dy)
    for got, wanted in zip(_step(there, x.to(place.device), dy.to(place.device)), expected, strict=True):
        assert got.device.type == place.device
        _near(got, wanted.double(), torch.float32)


@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gpu_is_not_served_by_the_reference(dtype: torch.dtype) -> None:
    from peftrt.ops._weight import weight_args

    A, B = randn(R, K, device="cuda"), randn(N, R, device="cuda")
    weight = weight_args("lora_linear", random_weight(N, K, "cuda"))
    for m in (1, 300):
        x = randn(m, K, dtype=dtype, device="cuda")
        assert_not_by_the_reference("lora_linear", x, *weight, A, B, SCALING, None, 0.0, None, None, [])
