"""The yardstick itself: what it lets pass and what not."""

from __future__ import annotations

import pytest
import torch

from bench.shapes import GPU_ROWS, GPU_SITES
from tests.cases import randn
from tests.gpu.places import Place, assert_as_accurate, decoded, random_weight, rows_of, site_on, usual_linear


def _results() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    weight, x = random_weight(256, 512, "cpu"), randn(40, 512, dtype=torch.bfloat16)
    exact = x.double() @ decoded(weight, torch.float32).double().t()
    usual = usual_linear(x, decoded(weight, torch.bfloat16))
    # W unrounded: the best that a kernel can do
    return exact, usual, exact.to(torch.bfloat16)


def test_the_usual_way_and_a_better_one_pass() -> None:
    exact, usual, better = _results()
    assert_as_accurate(usual, exact, usual)
    assert_as_accurate(better, exact, usual)


def test_a_fifth_more_error_fails() -> None:
    exact, usual, _ = _results()
    worse = exact + 1.2 * (usual.double() - exact)
    with pytest.raises(AssertionError, match="of the usual way"):
        assert_as_accurate(worse, exact, usual.double())


def test_one_wrong_element_in_many_fails() -> None:
    exact, usual, better = _results()
    better[17, 31] += 3 * (usual.double() - exact).abs().max().item()
    with pytest.raises(AssertionError, match="largest error"):
        assert_as_accurate(better, exact, usual)


def test_a_value_that_is_not_a_number_fails() -> None:
    exact, usual, better = _results()
    better[0, 0] = float("nan")
    with pytest.raises(AssertionError):
        assert_as_accurate(better, exact, usual)


def test_every_m_meets_a_third_of_the_sites_and_all_on_request() -> None:
    for M in GPU_ROWS:
        assert sum(M in rows_of(site, "cuda", everything=False) for site in GPU_SITES) == len(GPU_SITES) / 3
    assert rows_of(GPU_SITES[4], "cuda", everything=True) == list(GPU_ROWS)
    assert all(side % 64 == 0 for site in GPU_SITES for side in site_on(site, "cpu"))


def test_what_the_native_code_of_a_gpu_has_to_take() -> None:
    native = Place("cuda", "native")
    assert native.must("nf4_linear", torch.bfloat16, 64)
    assert not native.must("nf4_linear", torch.bfloat16, 65)
    assert not native.must("nf4_linear", torch.float32, 1)
    assert not native.must("nf4_linear_dx", torch.float16, 1)
    assert native.must("nf4_dequantize", torch.float32)
    assert Place("cuda", "triton").must("nf4_linear_dx", torch.float32, 8192)
