"""dropout: zeros that are a function of seed and position, the same by every backend."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.reference.dropout import keep_mask
from tests.cases import BACKENDS, FLOATS, randn
from tests.tolerances import assert_same_bits


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@given(
    shape=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    seed=st.integers(-(2**63), 2**63 - 1),
    p=st.floats(1e-6, 0.999),
)
def test_zeros_are_the_masks(backend: str, dtype: torch.dtype, shape: list[int], seed: int, p: float) -> None:
    x = randn(*shape, seed=3).abs().add(0.5).to(dtype)
    with peftrt.backend(backend):
        y = ops.dropout(x, p, seed)
    kept = keep_mask(torch.tensor([seed]), x.numel(), 1, p).view(x.shape)
    assert_same_bits(y, torch.where(kept, (x.float() / (1.0 - p)).to(dtype), torch.zeros((), dtype=dtype)))


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_do_not_matter(backend: str) -> None:
    x = randn(6, 10, 4).transpose(0, 2)
    with peftrt.backend(backend):
        assert_same_bits(ops.dropout(x, 0.4, 11), ops.dropout(x.contiguous(), 0.4, 11))


def test_gradient_has_the_same_zeros() -> None:
    x = torch.ones(50, requires_grad=True)
    y = ops.dropout(x, 0.3, 9)
    y.sum().backward()
    assert x.grad is not None
    assert_same_bits(x.grad, y.detach())
    wide = randn(4, 5, dtype=torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: ops.dropout(x, 0.3, 9), wide)
    assert torch.autograd.gradgradcheck(lambda x: ops.dropout(x, 0.3, 9), wide)


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(backend: str) -> None:
    with peftrt.backend(backend):
        args = (randn(3, 7).requires_grad_(), torch.tensor([5]), 0.25)
        torch.library.opcheck(torch.ops.peftrt.dropout.default, args)


def test_default_seed_follows_torchs_generator() -> None:
    def draw(seed: int) -> Tensor:
        torch.manual_seed(seed)
        return ops.dropout(torch.ones(100), 0.5)

    assert_same_bits(draw(1), draw(1))
    assert not torch.equal(draw(1), draw(2))


def test_p_of_zero_is_the_input_itself() -> None:
    x = randn(3)
    assert ops.dropout(x, 0.0) is x


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_bad_probability_is_named(p: float) -> None:
    with pytest.raises(ValueError, match=r"dropout: p must be in \[0, 1\), got"):
        ops.dropout(randn(3), p, 1)


def test_bad_seed_or_dtype_is_named() -> None:
    with pytest.raises(ValueError, match=r"dropout: seed must be int64 \[1\].*got float32 \[1\]"):
        ops.dropout(randn(3), 0.5, torch.ones(1))
    with pytest.raises(TypeError, match=r"dropout: x must be one of float32.*got int64"):
        ops.dropout(torch.ones(3, dtype=torch.int64), 0.5, 1)
