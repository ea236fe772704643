"""The truth is decoded and multiplied apart from the package, and agrees with its reference."""

from __future__ import annotations

import pytest
import torch

from bench import problem, truth
from bench.cells import NF4_BYTES, Cell
from bench.shapes import Site
from peftrt import NF4Weight, backend
from tests.tolerances import assert_close, assert_same_bits

SITE = Site(130, 192)


@pytest.mark.parametrize("double_quant", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_decoded_as_the_reference_decodes(dtype: torch.dtype, double_quant: bool, monkeypatch) -> None:
    monkeypatch.setattr(truth, "CHUNK", 64)
    weight = NF4Weight.quantize(torch.randn(*SITE), double_quant=double_quant)
    with backend("reference"):
        expected = weight.dequantize(dtype)
    assert_same_bits(truth.decode(weight, dtype), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_encoded_as_the_reference_encodes(dtype: torch.dtype) -> None:
    dense = torch.randn(*SITE).to(dtype)
    with backend("reference"):
        expected = NF4Weight.quantize(dense).codes
    assert_same_bits(truth.encode(dense), expected.reshape(-1))


def test_products_in_chunks_are_the_products(monkeypatch) -> None:
    monkeypatch.setattr(truth, "CHUNK", 64)
    x, dy, weight = torch.randn(5, SITE.K), torch.randn(5, SITE.N), torch.randn(*SITE)
    A, B = torch.randn(4, SITE.K), torch.randn(SITE.N, 4)
    leaves = [tensor.double().requires_grad_() for tensor in (x, A, B)]
    y = leaves[0] @ weight.double().t() + 2.0 * (leaves[0] @ leaves[1].t() @ leaves[2].t())
    assert_close(truth.lora(x, weight, A, B, 2.0), y.detach())
    expected = torch.autograd.grad(y, leaves, dy.double())
    for actual, wanted in zip(truth.lora_gradients(x, dy, weight, A, B, 2.0), expected, strict=True):
        assert_close(actual, wanted)


def test_operands_are_the_same_every_time() -> None:
    first = problem.activations(3, 8, torch.float32, "cpu")
    torch.rand(7)
    assert_same_bits(problem.activations(3, 8, torch.float32, "cpu"), first)


def test_copies_fill_the_memory_to_rotate_over() -> None:
    weight = problem.weight(SITE, torch.float32, "cpu")
    rotated = problem.copies(weight, 3 * weight.nbytes - 1)
    assert len(rotated) == 3
    assert len({copy.codes.data_ptr() for copy in rotated}) == 3
    assert_same_bits(rotated[2].dequantize(), weight.dequantize())
    assert problem.copies(weight, 0) == [weight]


def test_the_formula_of_the_bytes_is_the_weights_size() -> None:
    site = Site(512, 1024)
    cell = Cell("nf4_linear", "forward", site, 4, torch.bfloat16, f"{NF4_BYTES} + s*M*(N + K)", "2*M*N*K")
    stored = problem.weight(site, torch.float32, "cpu").nbytes
    assert cell.evaluate(cell.bytes) == stored - 4 + 2 * 4 * (512 + 1024)  # all but the 4 bytes of the offset
    assert cell.evaluate(cell.flops) == 2 * 4 * 512 * 1024
    assert cell.id == "forward-bf16-512x1024-M4"
