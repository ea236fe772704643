"""nf4_quantize on a GPU writes the CPU's bytes."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import NF4Weight
from peftrt.formats.nf4 import NF4_CODEBOOK, midpoints
from tests.cases import FLOATS, randn, strided
from tests.gpu.places import QUANTIZERS, Place
from tests.tolerances import assert_same_bits


def _assert_same_bytes(place: Place, dense: Tensor, block: int, nested: bool) -> None:
    with peftrt.backend("reference"):
        expected = NF4Weight.quantize(dense, block, nested)
    with peftrt.backend(place.backend):
        got = NF4Weight.quantize(dense.to(place.device), block, nested)
    assert got.tensors().keys() == expected.tensors().keys()
    for name, tensor in expected.tensors().items():
        assert getattr(got, name).device.type == place.device
        # scales that are NaN may differ in their payload
        if name == "absmax" and not nested:
            numbers, wanted = (t.cpu().view(torch.float32) for t in (got.absmax, tensor))
            assert bool(((numbers == wanted) | (numbers.isnan() & wanted.isnan())).all())
        else:
            assert_same_bits(getattr(got, name), tensor)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize("block", [32, 64, 256, 4096])
@QUANTIZERS
def test_the_bytes_of_the_cpu(place: Place, block: int, nested: bool, dtype: torch.dtype) -> None:
    for shape in ((1,), (63,), (64, 64), (67, 97), (5, 3, 70), (512, 1024)):
        _assert_same_bytes(place, randn(*shape, seed=len(shape), dtype=dtype), block, nested)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@QUANTIZERS
def test_values_on_and_beside_the_thresholds(place: Place, dtype: torch.dtype) -> None:
    """A block whose largest magnitude is 1 holds every level, every midpoint, and their neighbours in fp32."""
    points = torch.cat([NF4_CODEBOOK, midpoints(NF4_CODEBOOK)])
    up, down = (points.nextafter(torch.tensor(limit)) for limit in (2.0, -2.0))
    values = torch.cat([points, up, down]).clamp(-1, 1)
    blocks = torch.cat([values, torch.ones(128 - values.numel())]).view(2, 64)
    for scale in (1.0, 0.37, 1e-6, 1e4):
        _assert_same_bytes(place, (blocks * scale).to(dtype), 64, False)


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@QUANTIZERS
def test_zeros_and_values_that_are_not_finite(place: Place, nested: bool) -> None:
    dense = randn(6, 64)
    dense[1] = 0
    dense[2, 3] = 1e-42
    if not nested:
        # a scale that is not finite spoils the mean of all of them
        dense[3, 5], dense[4, 7] = math.nan, -math.inf
    _assert_same_bytes(place, dense, 64, nested)


@QUANTIZERS
def test_a_weight_that_is_not_contiguous(place: Place) -> None:
    _assert_same_bytes(place, strided(randn(40, 96)), 64, True)
    _assert_same_bytes(place, randn(40, 96).t(), 64, True)


@QUANTIZERS
def test_a_site_of_a_model(place: Place) -> None:
    n, k = (4096, 14336) if place.on_gpu else (256, 448)
    _assert_same_bytes(place, randn(n, k, dtype=torch.bfloat16), 64, True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@QUANTIZERS
def test_opcheck(place: Place, dtype: torch.dtype) -> None:
    for nested in (True, False):
        with peftrt.backend(place.backend):
            torch.library.opcheck(
                torch.ops.peftrt.nf4_quantize.default, (randn(6, 65, dtype=dtype, device=place.device), 64, nested)
            )
