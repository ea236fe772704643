"""How AdamW's state lies in a page, and the 8-bit maps: bitsandbytes' levels, the nearest of them."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftrt.formats.adamw_state import (
    BITS,
    BLOCK,
    EXP_AVG_MAP,
    EXP_AVG_SQ_MAP,
    capacity,
    dequantize,
    moments,
    quantize,
)
from tests.cases import randn
from tests.tolerances import assert_same_bits

MAPS = pytest.mark.parametrize("levels", [EXP_AVG_MAP, EXP_AVG_SQ_MAP], ids=["signed", "unsigned"])


@pytest.mark.parametrize(("levels", "signed"), [(EXP_AVG_MAP, True), (EXP_AVG_SQ_MAP, False)])
def test_maps_are_those_of_bitsandbytes(levels: Tensor, signed: bool) -> None:
    functional = pytest.importorskip("bitsandbytes.functional")
    assert_same_bits(levels, functional.create_dynamic_map(signed=signed))


def test_maps_do_not_depend_on_the_cpu() -> None:
    """torch.linspace would: 31 levels are others on a CPU without FMA."""
    code = (
        "import hashlib; from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP; "
        "print(hashlib.sha256(EXP_AVG_MAP.numpy().tobytes() + EXP_AVG_SQ_MAP.numpy().tobytes()).hexdigest())"
    )
    environment = {**os.environ, "ATEN_CPU_CAPABILITY": "default", "PYTHONPATH": str(Path(__file__).parents[2])}
    run = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=True)
    here = hashlib.sha256(EXP_AVG_MAP.numpy().tobytes() + EXP_AVG_SQ_MAP.numpy().tobytes()).hexdigest()
    assert run.stdout.strip() == here


@MAPS
def test_levels_rise_to_one_through_zero(levels: Tensor) -> None:
    assert levels.shape == (256,)
    assert (levels[1:] > levels[:-1]).all()
    assert levels[-1] == 1
    assert (levels == 0).sum() == 1


def brute_force(values: Tensor, levels: Tensor) -> tuple[Tensor, Tensor]:
    """Of every value the level that is nearest in fp64, the lower of two; and the scales."""
    codes, scales = [], []
    for block in values.split(BLOCK):
        scales.append(block.abs().max())
        scaled = (block / scales[-1]).double()
        distance = (scaled[:, None] - levels.double()).abs()
        codes.append(distance.argmin(dim=1))  # the first of equals
    return torch.cat(codes).to(torch.uint8), torch.stack(scales)


@MAPS
@pytest.mark.parametrize("size", [1, 255, 256, 257, 5000])
def test_quantize_finds_the_nearest_level(size: int, levels: Tensor) -> None:
    values = randn(size, seed=size) * 10 ** (2 * randn(size, seed=1))
    if levels is EXP_AVG_SQ_MAP:
        values = values.square()
    codes, scale = quantize(values, levels)
    want, scales = brute_force(values, levels)
    assert_same_bits(scale, scales)
    # midpoints are rounded to fp32, so that a value beside one may be half an ulp nearer to the other level
    differ = codes != want
    assert differ.sum() <= size / 1000
    near = (dequantize(codes, scale, levels) - dequantize(want, scale, levels)).abs()
    assert (near[differ] <= values.abs().max()).all()
    assert ((codes.int() - want.int()).abs() <= 1).all()
    assert dequantize(codes, scale, levels).dtype == torch.float32


@MAPS
def test_levels_come_back_and_ties_go_down(levels: Tensor) -> None:
    codes, scale = quantize(levels, levels)  # 1 is among them: the scale
    assert scale.tolist() == [1]
    assert torch.equal(codes, torch.arange(256, dtype=torch.uint8))
    assert_same_bits(dequantize(codes, scale, levels), levels)
    middle = (levels[1:] + levels[:-1]) / 2
    for i, shift in ((0, -torch.inf), (0, 0.0), (1, torch.inf)):
        moved = middle if shift == 0 else middle.nextafter(torch.tensor(shift))
        codes, _ = quantize(torch.cat([moved, torch.ones(1)]), levels)
        assert torch.equal(codes[:-1], (torch.arange(255) + i).to(torch.uint8))


@MAPS
def test_zeros_and_what_is_not_finite(levels: Tensor) -> None:
    zero, top = (levels == 0).nonzero().item(), 255
    values = torch.zeros(4 * BLOCK)
    values[BLOCK], values[BLOCK + 1] = torch.nan, 3.0
    values[2 * BLOCK], values[2 * BLOCK + 1] = torch.inf, 3.0
    values[3 * BLOCK : 3 * BLOCK + 2] = torch.tensor([1e-45, 0.0])
    codes, scale = quantize(values, levels)
    assert scale[0] == 0
    assert scale[1].isnan()
    assert scale[2] == torch.inf
    assert scale[3] > 0
    assert (codes[:BLOCK] == zero).all()
    assert (codes[BLOCK : 2 * BLOCK] == top).all()
    assert codes[2 * BLOCK] == top
    assert (codes[2 * BLOCK + 1 : 3 * BLOCK] == zero).all()
    assert codes[3 * BLOCK] == top
    assert (codes[3 * BLOCK + 1 :] == zero).all()


@pytest.mark.parametrize("bits", BITS)
def test_parts_of_a_page_lie_one_behind_the_other(bits: int) -> None:
    for page_bytes in (2 * BLOCK + 16, 8 * BLOCK, 8 * BLOCK + 16, 1 << 16, (1 << 20) + 48):
        room, page = capacity(page_bytes, bits), torch.zeros(page_bytes, dtype=torch.uint8)
        assert room % BLOCK == 0
        parts = [part for part in moments(page, bits) if part is not None]
        assert [part.numel() for part in parts] == [room, room, room // BLOCK, room // BLOCK][: len(parts)]
        end = page.data_ptr()
        for part in parts:
            assert part.data_ptr() == end or room == 0
            end += part.nbytes
        waste = page.data_ptr() + page_bytes - end
        assert 0 <= waste < (8 * BLOCK if bits == 32 else 2 * BLOCK + 8)


@pytest.mark.parametrize("bits", BITS)
def test_narrow_keeps_scales_with_their_blocks(bits: int) -> None:
    page = torch.zeros(1 << 16, dtype=torch.uint8)
    whole = moments(page, bits)
    part = whole.narrow(2 * BLOCK, BLOCK + 1)
    assert part.exp_avg.data_ptr() == whole.exp_avg[2 * BLOCK :].data_ptr()
    assert part.exp_avg.numel() == part.exp_avg_sq.numel() == BLOCK + 1
    if bits == 8:
        for scale, of_page in zip(part[2:], whole[2:], strict=True):
            assert scale is not None
            assert of_page is not None
            assert scale.data_ptr() == of_page[2:].data_ptr()
            assert scale.numel() == 2
    else:
        assert part[2:] == (None, None)
