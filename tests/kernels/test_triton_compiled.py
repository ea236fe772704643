"""A sample of the kernels compiled for devices that are not there, and trials of the checks on the code."""

from __future__ import annotations

import dataclasses
import itertools
import os

import pytest

pytest.importorskip("triton")
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("the interpreter compiles nothing", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.compiler import ASTSource

from peftrt.kernels import _schedule, lora_linear, lora_linear_dense, low_rank, nf4_linear
from peftrt.ops import _paths
from tests.kernels import compiled, sass

SAMPLE = compiled.sample(1, seed=1)
WAIT = "/*0000*/ WARPGROUP.DEPBAR.LE gsb0, 0x0 ;"
FROM_REGISTERS = "/*0000*/ HGMMA.64x64x16.F32.BF16 R24, R64, gdesc[UR4], R24, gsb0 ;"
FROM_SHARED = "/*0000*/ HGMMA.64x64x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;"


@pytest.mark.parametrize("variant", SAMPLE, ids=lambda variant: f"{variant.target} {variant.name}")
def test_compiles_to_sound_code(variant: compiled.Variant) -> None:
    assert compiled.faults(variant) == []


KERNELS = {
    "forward": (nf4_linear.nf4_linear_kernel, lora_linear.lora_linear_kernel),
    "dx": (nf4_linear.nf4_linear_dx_kernel, lora_linear.lora_linear_dx_kernel),
}


def test_every_configuration_is_among_the_variants() -> None:
    for target in compiled.TARGETS:
        tiles = {
            (
                v.kernel,
                v.types["p_x"],
                *(v.constants.get(side) for side in ("BM", "BN", "BK")),
                v.options.get("num_stages"),
            )
            for v in compiled.variants(target)
            if v.tensor_cores and "p_x" in v.types
        }
        architecture = compiled.ARCHITECTURE[target]
        tables = [(key, configs, KERNELS[key[1]]) for key, configs in nf4_linear.CONFIGS.items()]
        dense = (lora_linear_dense.lora_linear_dense_kernel,)
        tables += [(key, configs, dense) for key, configs in lora_linear_dense.DENSE_CONFIGS.items()]
        for (owner, *_, itemsize), configs, kernels in tables:
            for dtype in (d for d, size in compiled.DTYPES.items() if size == itemsize and owner == architecture):
                for c, kernel in itertools.product(configs, kernels):
                    assert (kernel, f"*{dtype}", c.BM, c.BN, c.BK, c.stages) in tiles


def test_every_number_of_rows_has_a_configuration() -> None:
    everything = [*nf4_linear.CONFIGS.values(), *nf4_linear.STRADDLING_CONFIGS.values()]
    everything += [*lora_linear_dense.DENSE_CONFIGS.values(), low_rank.narrow_configs("sm_90", 16, 2)]
    for configs in everything:
        rows = [config.rows for config in configs]
        assert rows == sorted(set(rows))
        assert rows[-1] == _schedule.MANY


def test_every_range_is_one_that_the_table_sends_here() -> None:
    """Beyond its limit calls go by panels, except where blocks straddle rows."""
    for (architecture, direction, itemsize), configs in nf4_linear.CONFIGS.items():
        classes = {"sm_90": ("sm_90", "sm_100")}.get(architecture, (architecture,))
        most = max(_paths.TABLE[name][direction, itemsize].tile for name in classes)
        *ranges, last = configs
        assert last.rows == _schedule.MANY
        assert all(config.rows < most for config in ranges), (architecture, direction, itemsize)


@pytest.mark.parametrize(
    ("rows", "columns", "splits"),
    [
        # 32 tiles of y for each tile of rows, 264 programs of an H200
        (1, 4096, 8),
        (64, 4096, 8),
        (65, 4096, 8),
        (128, 4096, 8),
        (129, 4096, 4),
        (256, 4096, 4),
        (257, 4096, 2),
        (511, 4096, 2),
        (8, 28672, 1),
        (8, 64, 16),
    ],
)
def test_programs_are_two_a_multiprocessor_at_most(
    rows: int, columns: int, splits: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And no fewer than half of that, unless the sum is too short."""
    monkeypatch.setattr(_schedule, "processors", lambda device: 132)
    ranges = nf4_linear.configs("sm_90", False, 2, compiled.CHUNKS.value)
    config, fewest = _schedule.config_for(ranges, rows)
    assert fewest <= rows <= config.rows
    total, tiles = 4096 // config.BK, triton.cdiv(columns, config.BN) * triton.cdiv(fewest, config.BM)
    steps = _schedule.steps_for(config, tiles, total, torch.device("cpu"))
    assert triton.cdiv(total, steps) == splits
    assert splits == 1 or tiles * splits <= 264


@pytest.mark.parametrize(
    ("body", "found"),
    [
        ([FROM_REGISTERS, WAIT, "/*0000*/ LDS.128 R64, [R2] ;"], 0),
        ([FROM_REGISTERS, "/*0000*/ LDS.128 R61, [R2] ;", WAIT], 1),
        ([FROM_REGISTERS, "/*0000*/ @P0 IMAD.MOV.U32 R67, RZ, RZ, R1 ;", WAIT], 1),
        ([FROM_REGISTERS, "/*0000*/ STG.E R64, [R2], R3 ;", "/*0000*/ MOV R68, R1 ;", WAIT], 0),
        ([FROM_REGISTERS, "/*0000*/ WARPGROUP.DEPBAR.LE gsb0, 0x1 ;", "/*0000*/ MOV R64, R1 ;", WAIT], 1),
        ([FROM_SHARED, WAIT, "/*0000*/ STS.128 [R2], R4 ;"], 0),
        ([FROM_SHARED, "/*0000*/ STS.128 [R2], R4 ;", WAIT], 1),
        ([FROM_SHARED, "/*0000*/ MOV R64, R1 ;", WAIT], 0),
    ],
)
def test_races_in_straight_code(body: list[str], found: int) -> None:
    assert len(sass.races(sass.parse("\n".join(body)))) == found


def test_a_race_with_the_next_step_of_a_loop_is_found() -> None:
    loop = [".L_x_1:", "/*0000*/ MOV R64, R1 ;", FROM_REGISTERS, "/*0010*/ @P0 BRA `(.L_x_1) ;", WAIT]
    assert len(sass.races(sass.parse("\n".join(loop)))) == 1
    waiting = [*loop[:3], WAIT, *loop[3:]]
    assert sass.races(sass.parse("\n".join(waiting))) == []


@triton.jit
def weight_in_registers(p_w, p_x, p_out, K, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr):
    """What nf4_linear avoids: a converted weight as the operand in registers."""
    o_m, o_n = tl.arange(0, BM), tl.arange(0, BN)
    b_sum = tl.zeros((BN, BM), tl.float32)
    for i in range(0, K, BK):
        o_k = i + tl.arange(0, BK)
        b_w = tl.load(p_w + o_n[:, None] * K + o_k[None, :]).to(tl.float32) * 0.5
        b_sum = tl.dot(b_w.to(tl.bfloat16), tl.load(p_x + o_k[:, None] + o_m[None, :] * K), b_sum)
    tl.store(p_out + o_n[:, None] * BM + o_m[None, :], b_sum)


def test_the_race_of_triton_9433_is_found_or_mended() -> None:
    tile = {"BM": 128, "BN": 128, "BK": 64}
    types = {"p_w": "*i8", "p_x": "*bf16", "p_out": "*fp32", "K": "i32", **dict.fromkeys(tile, "constexpr")}
    attributes = {(i,): compiled.ALIGNED for i in range(4)}
    source = ASTSource(weight_in_registers, signature=types, constexprs=tile, attrs=attributes)
    code = triton.compile(source, target=compiled.TARGETS["sm_90"], options={"num_warps": 8, "num_stages": 3})
    lines = sass.disassemble(code.asm["cubin"])
    assert sass.count(lines, "HGMMA")
    known = tuple(int(part) for part in triton.__version__.split(".")[:2]) <= (3, 7)
    assert bool(sass.races(lines)) == known


def test_spills_and_contractions_are_counted() -> None:
    body = ("STL.64 [R1], R2", "@!P0 LDL R2, [R1]", "FFMA R1, R2, R3, R4", "LDS R1, [R2]")
    lines = sass.parse("\n".join(f"/*0000*/ {instruction} ;" for instruction in body))
    assert (sass.count(lines, "STL", "LDL"), sass.count(lines, "FFMA"), sass.count(lines, "HGMMA")) == (2, 1, 0)


@pytest.mark.parametrize("target", ["sm_90", "gfx942"])
@pytest.mark.parametrize("name", ["adamw_step fp32 bits=32 aligned=True clipped=True i32", "sum_chunk aligned=True"])
def test_a_contraction_is_found_where_each_operation_is_to_be_rounded(target: str, name: str) -> None:
    (variant,) = [v for v in compiled.variants(target) if v.name == name]
    assert compiled.faults(variant) == []
    fused = dataclasses.replace(variant, options={**variant.options, "enable_fp_fusion": True})
    assert any("FMA" in fault or "fma" in fault for fault in compiled.faults(fused))
