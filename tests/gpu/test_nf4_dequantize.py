"""nf4_dequantize: the CPU's bits, in one launch, whatever the size."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

import peftrt
from bench.shapes import GPU_SITES, Site
from peftrt import NF4Weight, ops
from peftrt.formats.nf4 import float_bytes
from tests.cases import FLOATS, misaligned
from tests.gpu.places import (
    EVERYWHERE,
    Place,
    assert_not_by_the_reference,
    backends,
    decoded,
    launches,
    on_gpu,
    random_weight,
    site_on,
)
from tests.tolerances import assert_same_bits


@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("n", "k", "block"), [(1, 1, 64), (3, 31, 32), (67, 97, 64), (130, 192, 64), (70, 160, 4096)])
@EVERYWHERE
def test_the_bits_of_the_cpu(place: Place, n: int, k: int, block: int, nested: bool) -> None:
    weight = random_weight(n, k, "cpu", block=block, nested=nested)
    moved = weight.to(place.device)
    for dtype in FLOATS:
        expected = decoded(weight, dtype)
        got = place.run(lambda dtype=dtype: ops.nf4_dequantize(moved, dtype))
        assert got is not None
        assert_same_bits(got, expected)
        guarded = torch.full((n * k + 128,), 7.0, dtype=dtype, device=place.device)
        out = guarded[64:-64].view(n, k)
        out.fill_(math.nan)
        place.run(lambda out=out: ops.nf4_dequantize(moved, out=out))
        assert_same_bits(out, expected)
        assert bool((guarded[:64] == 7).all() & (guarded[-64:] == 7).all())
        off = misaligned(torch.empty(n, k, dtype=dtype, device=place.device))
        place.run(lambda off=off: ops.nf4_dequantize(moved, out=off))
        assert_same_bits(off, expected)


@EVERYWHERE
@pytest.mark.parametrize("site", GPU_SITES, ids=str)
def test_every_site(site: Site, place: Place) -> None:
    weight = random_weight(*site_on(site, place.device), "cpu", seed=GPU_SITES.index(site))
    expected = decoded(weight, torch.bfloat16).to(place.device)
    moved = weight.to(place.device)
    got = place.run(lambda: ops.nf4_dequantize(moved, torch.bfloat16))
    assert got is not None
    assert torch.equal(got.view(torch.int16), expected.view(torch.int16))


@EVERYWHERE
def test_scales_that_are_no_ordinary_numbers(place: Place) -> None:
    values = [0.0, -0.0, 1e-40, 3.4e38, 65504.0, -1.0, math.inf, math.nan]
    weight = random_weight(len(values), 64, "cpu", nested=False)
    scales = float_bytes(torch.tensor(values)).view(len(values), 4)
    odd = replace(weight, absmax=scales)
    for dtype in FLOATS:
        got = place.run(lambda dtype=dtype: ops.nf4_dequantize(odd.to(place.device), dtype))
        assert got is not None
        expected = decoded(odd, dtype)
        same = (got.cpu() == expected) | (got.cpu().isnan() & expected.isnan())
        assert bool(same.all()), f"rows {(~same).any(1).nonzero().flatten().tolist()} of {dtype}"
        assert_same_bits(got[:2], expected[:2])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EVERYWHERE
def test_opcheck(place: Place, dtype: torch.dtype) -> None:
    weight = random_weight(6, 64, place.device)
    scales = (weight.absmax, weight.nested_absmax, weight.nested_offset)
    out = torch.empty(6, 64, dtype=dtype, device=place.device)
    with peftrt.backend(place.backend):
        torch.library.opcheck(torch.ops.peftrt.nf4_dequantize.default, (weight.codes, *scales, [6, 64], 64, dtype))
        torch.library.opcheck(torch.ops.peftrt.nf4_dequantize.out, (weight.codes, *scales, [6, 64], 64, out))


@on_gpu
@pytest.mark.parametrize("backend", backends(None, "native", "triton"))
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
def test_one_launch(nested: bool, backend: str | None) -> None:
    weight = random_weight(4096, 4096, "cuda", nested=nested)
    out = torch.empty(4096, 4096, dtype=torch.bfloat16, device="cuda")
    with peftrt.backend(backend):
        assert launches(lambda: ops.nf4_dequantize(weight, out=out)) == 1
    scales = (weight.absmax, weight.nested_absmax, weight.nested_offset)
    assert_not_by_the_reference("nf4_dequantize.out", weight.codes, *scales, [4096, 4096], 64, out)


@on_gpu
@pytest.mark.parametrize("backend", backends("native", "triton"))
def test_more_than_two_to_the_31_weights(backend: str) -> None:
    n, k = 40960, 65536
    weight = random_weight(n, k, "cuda")
    out = torch.full((n, k), math.nan, dtype=torch.bfloat16, device="cuda")
    with peftrt.backend(backend):
        ops.nf4_dequantize(weight, out=out)
    # all of it in pieces, each of them small enough for 32 bits
    for start in range(0, n, 4096):
        rows = slice(start, start + 4096)
        runs = slice(start * k // 64 // 256 * 4, (start + 4096) * k // 64 // 256 * 4)
        assert weight.nested_absmax is not None
        part = NF4Weight(
            weight.codes[rows],
            weight.absmax[rows],
            weight.nested_absmax[runs],
            weight.nested_offset,
            (4096, k),
            torch.bfloat16,
        )
        assert torch.equal(out[rows], decoded(part, torch.bfloat16)), f"rows from {start}"
