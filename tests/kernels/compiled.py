"""Every kernel, dtype and configuration compiled for devices that are not there, and what the code must show.

``python -m tests.kernels.compiled`` compiles all of it (``make compile-all``); test_triton_compiled.py a sample.
"""

from __future__ import annotations

import argparse
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from peftrt.kernels import (
    _schedule,
    lora_linear,
    lora_linear_dense,
    lora_weight_norm,
    low_rank,
    nf4_dequantize,
    nf4_linear,
)
from peftrt.kernels._adapter import RANKS
from peftrt.kernels._nf4 import CHUNKS, ODD, STRADDLING
from tests.kernels import compiled_adamw, compiled_bottleneck, compiled_multi_lora, sass

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
# The part of the configurations that a target takes.
ARCHITECTURE = {"sm_80": "sm_80", "sm_90": "sm_90", "sm_100": "sm_90", "gfx942": "hip"}
# Bytes of shared memory a program may have; sm_80's code also serves sm_86 and sm_89, which have less than it.
SHARED = {"sm_80": 101376, "sm_90": 232448, "sm_100": 232448, "gfx942": 65536}
SPILL_FREE = ("sm_90",)
DTYPES = {"fp32": 4, "bf16": 2, "fp16": 2}
# Odd sizes and addresses off 16 bytes make Triton compile another program than round ones.
ALIGNED = [["tt.divisibility", 16]]
ODD_SIZES = ("steps", "splits", "limit", "first", "E", "P", "W", "tiles", "entries")  # and M


@dataclass(frozen=True)
class Variant:
    """One program: a kernel with types and constants, and whether it is to use tensor cores."""

    name: str
    target: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    round_sizes: bool
    tensor_cores: bool

    def compile(self) -> Any:
        names = self.kernel.arg_names
        signature = {name: "constexpr" if name in self.constants else self.types[name] for name in names}
        aligned = [i for i, name in enumerate(names) if self.round_sizes and name not in self.constants and name != "M"]
        aligned = [i for i in aligned if signature[names[i]] != "fp32" and names[i] not in ODD_SIZES]
        attributes = {path: ALIGNED for i in aligned for path in _paths(i, signature[names[i]])}
        source = ASTSource(self.kernel, signature=signature, constexprs=self.constants, attrs=attributes)
        options = {"enable_fp_fusion": False, **self.options}
        return triton.compile(source, target=TARGETS[self.target], options=options)


def _paths(i: int, kind: str | tuple[str, ...]) -> list[tuple[int, ...]]:
    """Where Triton's attributes of an argument, or of each element of a tuple, stand."""
    return [(i,)] if isinstance(kind, str) else [(i, j) for j in range(len(kind))]


def variants(target: str) -> Iterator[Variant]:
    yield from dequantize_variants(target)
    yield from linear_variants(target)
    yield from lora_variants(target)
    architecture = ARCHITECTURE[target]
    for program in (
        *compiled_multi_lora.programs(DTYPES, architecture),
        *compiled_bottleneck.programs(DTYPES, architecture),
        *compiled_adamw.programs(),
    ):
        name, kernel, types, constants, options, round_sizes, tensor_cores = program
        yield Variant(name, target, kernel, types, constants, options, round_sizes, tensor_cores)
    for dtype in DTYPES:
        for bias in (True, False):
            types = {"p_parts": "*fp32", "p_scale": "*fp32", "p_bias": f"*{dtype}", "p_out": f"*{dtype}"}
            types |= dict.fromkeys(("numel", "columns", "splits"), "i32")
            constants = {"SCALE": bias, "BIAS": bias, "SIZE": _schedule.SUM_SIZE}
            name = f"sum_splits {dtype} bias={bias}"
            yield Variant(name, target, _schedule.sum_splits_kernel, types, constants, {}, True, False)


def dequantize_variants(target: str) -> Iterator[Variant]:
    for dtype in DTYPES:
        for nested in (True, False):
            for block in (32, 64, 4096):
                for size in ("i32", "i64"):
                    types = _weight_types(nested) | {"p_out": f"*{dtype}", "numel": size, "num_bytes": size}
                    constants = {"BLOCK": block, "GROUPS": nf4_dequantize.GROUPS, "NESTED": nested}
                    name = f"nf4_dequantize {dtype} nested={nested} block={block} {size}"
                    options = {"num_warps": nf4_dequantize.WARPS}
                    round_sizes = block == 64
                    kernel = nf4_dequantize.nf4_dequantize_kernel
                    yield Variant(name, target, kernel, types, constants, options, round_sizes, False)
            for block in (64, 4096):
                types = _weight_types(nested) | {"p_out": f"*{dtype}"}
                types |= dict.fromkeys(("groups", "row_bytes", "first_byte", "out_groups"), "i32")
                constants = {"BLOCK": block, "GROUPS": nf4_dequantize.GROUPS, "NESTED": nested}
                name = f"nf4_dequantize_columns {dtype} nested={nested} block={block}"
                options = {"num_warps": nf4_dequantize.WARPS}
                kernel = nf4_dequantize.nf4_dequantize_columns_kernel
                yield Variant(name, target, kernel, types, constants, options, True, False)


def linear_variants(target: str) -> Iterator[Variant]:
    architecture = ARCHITECTURE[target]
    for dtype, itemsize in DTYPES.items():
        for dx in (False, True):
            for align, block in ((CHUNKS, 64), (CHUNKS, 256), (STRADDLING, 64), (STRADDLING, 32), (ODD, 64), (ODD, 32)):
                # ranges of rows may share a tile
                ranges = nf4_linear.configs(architecture, dx, itemsize, align.value)
                for config in dict.fromkeys(replace(config, rows=0) for config in ranges):
                    for nested in (True, False):
                        for split in (False, True) if config.split else (False,):
                            yield _linear(target, dtype, dx, align.value, block, config, nested, split)


def _linear(
    target: str, dtype: str, dx: bool, align: int, block: int, config: _schedule.Config, nested: bool, split: bool
) -> Variant:
    types = _weight_types(nested) | dict.fromkeys(("p_x", "p_dy", "p_bias"), f"*{dtype}")
    types |= {"p_out": "*fp32" if split else f"*{dtype}"}
    types |= dict.fromkeys(("M", "N", "K", "row_bytes", "steps"), "i32")
    constants = {"BLOCK": block, "ALIGNMENT": align, "NESTED": nested, "SPLIT": split}
    constants |= {"BM": config.BM, "BN": config.BN, "BK": config.BK}
    constants["PRECISION"] = _schedule.PRECISION[ARCHITECTURE[target]]
    if not dx:
        constants["BIAS"] = not split
    kernel = nf4_linear.nf4_linear_dx_kernel if dx else nf4_linear.nf4_linear_kernel
    tile = f"{config.BM}x{config.BN}x{config.BK}"
    name = f"nf4_linear{'_dx' if dx else ''} {dtype} {tile} align={align} block={block} nested={nested} split={split}"
    options = {"num_warps": config.warps, "num_stages": config.stages}
    return Variant(name, target, kernel, types, constants, options, align == CHUNKS.value, True)


def lora_variants(target: str) -> Iterator[Variant]:
    for base in linear_variants(target):
        if base.constants["BLOCK"] == 64 and base.constants["NESTED"]:
            yield from (_lora(base, everything) for everything in (False, True))
    architecture = ARCHITECTURE[target]
    for dtype, itemsize in DTYPES.items():
        ranges = lora_linear_dense.DENSE_CONFIGS[architecture, itemsize]
        for config in dict.fromkeys(replace(config, rows=0) for config in ranges):
            for split in (False, True):
                for dx, drop in ((False, False), (True, False), (True, True)):
                    yield _lora_dense(target, dtype, config, split, dx, drop)
        for rank in (16, 32, 64):
            yield from (
                _low_rank(target, dtype, rank, split, drop) for split in (False, True) for drop in (False, True)
            )
            yield from (_low_rank_gradient(target, dtype, rank, drop) for drop in (False, True))
        yield from (_share(target, dtype, drop, aligned) for drop in (False, True) for aligned in (False, True))
        yield from (_norm(target, dtype, align) for align in (None, CHUNKS, STRADDLING, ODD))


SIZES = ("M", "N", "K", "R", "S", "C", "row_bytes", "steps", "limit", "first", "columns")
STRIDES = ("stride_s", "stride_c", "stride_r", "stride_k", "stride_n", "stride_right", "stride_out")


def _lora_types(dtype: str, *own: str) -> dict[str, str]:
    """fp32 adapters; ``own`` are of ``dtype``."""
    types = dict.fromkeys(("p_a", "p_b", "p_left", "p_right", "p_xa", "p_g"), "*fp32") | {"p_seed": "*i64"}
    types |= dict.fromkeys(("p_row_scale", "p_column_scale"), "*fp32") | dict.fromkeys(("scaling", "factor"), "fp32")
    types |= dict.fromkeys((*SIZES, *STRIDES), "i32")
    return types | dict.fromkeys(own, f"*{dtype}")


def _lora(base: Variant, everything: bool) -> Variant:
    """The base's product, with an adapter; ``everything``: dropout and a row scale too."""
    dx = base.kernel is nf4_linear.nf4_linear_dx_kernel
    types = _lora_types("bf16") | base.types
    constants = base.constants | {"BR": RANKS, "ROW_SCALE": everything and (dx or not base.constants["SPLIT"])}
    if dx:
        constants |= {"DROPOUT": everything, "WIDE": False}
    kernel = lora_linear.lora_linear_dx_kernel if dx else lora_linear.lora_linear_kernel
    name = base.name.replace("nf4_linear", "lora_linear") + f" everything={everything}"
    return replace(base, name=name, kernel=kernel, types=types, constants=constants)


def _lora_dense(target: str, dtype: str, config: _schedule.Config, split: bool, dx: bool, drop: bool) -> Variant:
    """A weight and a B whose rows are contiguous: W and B transposed for y, W and A for dX."""
    types = _lora_types(dtype, "p_x", "p_w", "p_bias") | {"p_out": "*fp32" if split else f"*{dtype}"}
    ones = ("stride_c", "stride_right") if dx else ("stride_s", "stride_r")
    constants = {"SCALED_SUM": drop, "SCALED_RESULT": not dx and not split, "BIAS": not dx and not split}
    constants |= {"DROPOUT": drop, "WIDE": False, "SPLIT": split, "BM": config.BM, "BN": config.BN, "BK": config.BK}
    constants |= {"BR": RANKS, "PRECISION": _schedule.PRECISION[ARCHITECTURE[target]], **dict.fromkeys(ones, 1)}
    name = f"lora_linear_dense {dtype} {config.BM}x{config.BN}x{config.BK} split={split} dx={dx} drop={drop}"
    options = {"num_warps": config.warps, "num_stages": config.stages}
    kernel = lora_linear_dense.lora_linear_dense_kernel
    return Variant(name, target, kernel, types, constants, options, True, True)


def _low_rank(target: str, dtype: str, rank: int, split: bool, drop: bool) -> Variant:
    """Of x and A; without dropout of dY and B."""
    config = low_rank.narrow_configs(ARCHITECTURE[target], rank, DTYPES[dtype])[0]
    constants = {"COLUMN_SCALE": not drop, "DROPOUT": drop, "WIDE": False, "SPLIT": split}
    constants |= {"BM": config.BM, "BN": config.BN, "BK": config.BK, "stride_k" if drop else "stride_r": 1}
    constants["PRECISION"] = _schedule.PRECISION[ARCHITECTURE[target]]
    options = {"num_warps": config.warps, "num_stages": config.stages}
    types = _lora_types(dtype, "p_x") | {"p_out": "*fp32"}
    name = f"low_rank {dtype} rank={rank} split={split} drop={drop}"
    return Variant(name, target, low_rank.low_rank_kernel, types, constants, options, True, True)


def _low_rank_gradient(target: str, dtype: str, rank: int, drop: bool) -> Variant:
    """Of A; without dropout of B."""
    constants = {"COLUMN_SCALE": not drop, "DROPOUT": drop, "WIDE": False, "stride_k" if drop else "stride_r": 1}
    constants |= {"BM": low_rank.GRADIENT_ROWS, "BK": low_rank.GRADIENT_COLUMNS, "BR": min(rank, 32)}
    constants["PRECISION"] = _schedule.PRECISION[ARCHITECTURE[target]]
    options = {"num_warps": low_rank.GRADIENT_WARPS, "num_stages": low_rank.STAGES[ARCHITECTURE[target]]}
    types = _lora_types(dtype, "p_x") | {"p_out": "*fp32"}
    name = f"low_rank_gradient {dtype} rank={rank} drop={drop}"
    return Variant(name, target, low_rank.low_rank_gradient_kernel, types, constants, options, rank != 64, True)


def _share(target: str, dtype: str, drop: bool, aligned: bool) -> Variant:
    tile = {key: value for key, value in lora_linear_dense.SHARE.items() if key != "num_warps"}
    constants = {"SCALED_RESULT": not drop, "BIAS": not drop, "DROPOUT": drop, "WIDE": drop, "BR": RANKS, **tile}
    constants |= {"PRECISION": _schedule.PRECISION[ARCHITECTURE[target]], "stride_right" if drop else "stride_r": 1}
    types = _lora_types(dtype, "p_out", "p_bias")
    options = {"num_warps": lora_linear_dense.SHARE["num_warps"]}
    name = f"adapter_share {dtype} drop={drop} aligned={aligned}"
    return Variant(name, target, lora_linear_dense.adapter_share_kernel, types, constants, options, aligned, True)


def _norm(target: str, dtype: str, align: Any) -> Variant:
    dense = align is None
    types = _lora_types(dtype) | _weight_types(True) | {"p_weight": f"*{dtype}" if dense else "*u8", "p_out": "*fp32"}
    constants = {"DENSE": dense, "BLOCK": 1 if dense else 64, "ALIGNMENT": CHUNKS.value if dense else align.value}
    constants |= {"NESTED": not dense, "BM": lora_weight_norm.ROWS, "BK": lora_weight_norm.COLUMNS}
    constants |= {"BR": RANKS, "PRECISION": _schedule.PRECISION[ARCHITECTURE[target]]}
    options = {"num_warps": lora_weight_norm.WARPS, "num_stages": lora_weight_norm.STAGES}
    name = f"lora_weight_norm {dtype} {'dense' if dense else f'align={align.value}'}"
    round_sizes = dense or align is CHUNKS
    return Variant(name, target, lora_weight_norm.lora_weight_norm_kernel, types, constants, options, round_sizes, True)


def _weight_types(nested: bool) -> dict[str, str]:
    absmax = "*u8" if nested else "*fp32"
    floats = dict.fromkeys(("p_nested_absmax", "p_nested_offset", "p_tables"), "*fp32")
    return {"p_codes": "*u8", "p_absmax": absmax, **floats}


def faults(variant: Variant) -> list[str]:
    """Compile, and say what is wrong with the code."""
    code = variant.compile()
    found = []
    if code.metadata.shared > SHARED[variant.target]:
        found.append(f"{code.metadata.shared} bytes of shared memory")
    found += _amd_faults(variant, code) if variant.target == "gfx942" else _nvidia_faults(variant, code)
    return found


def _nvidia_faults(variant: Variant, code: Any) -> list[str]:
    ptx, found = code.asm["ptx"], []
    if "fma.rn.f32" in ptx:
        found.append("a product and a sum are contracted")
    if variant.kernel in (nf4_dequantize.nf4_dequantize_kernel, nf4_dequantize.nf4_dequantize_columns_kernel):
        found += _rounding_faults(variant, ptx)
    if variant.tensor_cores and not any(name in ptx for name in ("mma.sync", "wgmma.mma_async", "tcgen05.mma")):
        found.append("no tensor-core instruction")
    lines = sass.disassemble(code.asm["cubin"])
    if variant.target in SPILL_FREE and (spills := sass.count(lines, "STL", "LDL")):
        found.append(f"{spills} instructions spill registers")
    if variant.kernel in compiled_adamw.KERNELS:
        found += compiled_adamw.ptx_faults(variant.kernel, variant.constants, ptx)
    elif sass.count(lines, "FFMA"):
        found.append("FFMA: a product and a sum are contracted")
    if variant.target == "sm_90" and variant.tensor_cores:
        found += _hopper_faults(variant, code, lines)
    return found


def _rounding_faults(variant: Variant, ptx: str) -> list[str]:
    wanted = {"*bf16": "cvt.rn.bf16", "*fp16": "cvt.rn.f16"}.get(variant.types["p_out"])
    found = [f"rounds with {mode}" for mode in (".rz.", ".rm.", ".rp.", ".ftz") if f"cvt{mode}" in ptx or ".ftz" in ptx]
    return found + ([f"no {wanted}"] if wanted is not None and wanted not in ptx else [])


def _hopper_faults(variant: Variant, code: Any, lines: list[sass.Line]) -> list[str]:
    if variant.constants["BM"] < 64:
        return [] if sass.count(lines, "HMMA") else ["no HMMA"]
    found = [] if sass.count(lines, "HGMMA") else ["no HGMMA"]
    return found + sass.races(lines) + sass.serialised(code.asm["ptx"])


def _amd_faults(variant: Variant, code: Any) -> list[str]:
    assembly, found = code.asm["amdgcn"], []
    if re.search(r"\.vgpr_spill_count:\s+[1-9]", assembly):
        found.append("registers spill")
    if variant.tensor_cores and "v_mfma" not in assembly:
        found.append("no v_mfma")
    if variant.kernel in compiled_adamw.KERNELS:
        found += compiled_adamw.amd_faults(variant.kernel, assembly)
    elif (
        not variant.tensor_cores
        and variant.kernel not in compiled_bottleneck.QUOTIENTS
        and any(name in assembly for name in ("v_fma_f32", "v_fmac_f32", "v_mad_f32", "v_pk_fma"))
    ):
        found.append("a product and a sum are contracted")
    return found


def sample(size: int, seed: int) -> list[Variant]:
    """A share of every target's variants: with each kernel among them on sm_90, elsewhere one of each file."""
    drawn: list[Variant] = []
    for target in TARGETS:
        groups: dict[str, list[Variant]] = {}
        for variant in variants(target):
            kernel = variant.kernel
            groups.setdefault(kernel.__name__ if target == "sm_90" else kernel.__module__, []).append(variant)
        for name, own in groups.items():
            drawn += random.Random(f"{seed} {target} {name}").sample(own, min(size, len(own)))
    return drawn


def main() -> int:
    parser = argparse.ArgumentParser(description="Compile every kernel, dtype and configuration, and check the code.")
    parser.add_argument("--target", choices=TARGETS, action="append", help="default: all")
    parser.add_argument("--match", default="", help="only variants with this in their name")
    options = parser.parse_args()
    start, wrong, total = time.monotonic(), 0, 0
    for target in options.target or TARGETS:
        for variant in variants(target):
            if options.match not in variant.name:
                continue
            total += 1
            try:
                found = faults(variant)
            except Exception as error:  # whatever the compiler raises is a result here
                found = [f"does not compile: {type(error).__name__}: {str(error)[:300]}"]
            if found:
                wrong += 1
                print(f"{target} {variant.name}: {'; '.join(dict.fromkeys(found))}", flush=True)
    print(f"{total} programs compiled in {time.monotonic() - start:.0f} s, {wrong} with faults")
    return 1 if wrong else 0


if __name__ == "__main__":
    sys.exit(main())
