"""The programs of adamw_step and gradient_norm, and what shows that their operations are rounded one by one."""

from __future__ import annotations

import collections
import itertools
import re
from collections.abc import Iterator
from typing import Any

import triton.language as tl

from peftrt.kernels import adamw_step, gradient_norm
from tests.kernels.compiled_multi_lora import Program

ELEMENTS = {"fp32": tl.float32, "bf16": tl.bfloat16, "fp16": tl.float16}
KERNELS = (adamw_step.adamw_step_kernel, gradient_norm.sum_chunk_kernel, gradient_norm.gradient_norm_kernel)


def programs() -> Iterator[Program]:
    """Nothing is known of sizes and addresses but what the kernels say themselves."""
    types = {"p_state": "*u8", "p_chunks": "*i64", "p_addresses": "*i64", "p_hyper": "*fp32", "p_coefficient": "*fp32"}
    types |= {"p_tables": "*fp32"}
    for dtype, bits, aligned, clipped in itertools.product(ELEMENTS, (32, 8), (True, False), (True, False)):
        for blocks in ("i32", "i64") if dtype == "fp32" and aligned and clipped else ("i32",):
            tile = dict(adamw_step.CONFIGS[bits])
            options = {"num_warps": tile.pop("num_warps")}
            constants = {
                "ELEMENT": ELEMENTS[dtype],
                "BITS": bits,
                "ALIGNED": aligned,
                "HAS_COEFFICIENT": clipped,
                **tile,
            }
            name = f"adamw_step {dtype} bits={bits} aligned={aligned} clipped={clipped} {blocks}"
            kernel, own = adamw_step.adamw_step_kernel, types | {"blocks": blocks}
            yield Program(name, kernel, own, constants, options, False, False)
    types = {"p_addresses": "*i64", "p_chunks": "*i64", "p_partials": "*fp64", "p_out": "*fp32"}
    types |= {"C": "i32", "max_norm": "i64"}
    for aligned in (True, False):
        options = {"num_warps": gradient_norm.WARPS}
        name = f"sum_chunk aligned={aligned}"
        yield Program(name, gradient_norm.sum_chunk_kernel, types, {"ALIGNED": aligned}, options, False, False)
    for bits in ("i64", "i32"):  # those of a subnormal number fit the latter
        options, constants = {"num_warps": gradient_norm.FINAL_WARPS}, {"ROWS": gradient_norm.FINAL_ROWS}
        own = types | {"max_norm": bits}
        yield Program(
            f"gradient_norm {bits}", gradient_norm.gradient_norm_kernel, own, constants, options, False, False
        )


def ptx_faults(kernel: Any, constants: dict[str, Any], ptx: str) -> list[str]:
    """In machine code roots and quotients are made of FMA, too: what is contracted is seen before that."""
    found = [f"{name} in PTX" for name in (".ftz", ".approx", "div.full", "fma.rn") if name in ptx]
    wanted = {adamw_step.adamw_step_kernel: ("sqrt.rn.f32", "div.rn.f32", "mul.rn.f32|mul.f32")}
    wanted |= {gradient_norm.gradient_norm_kernel: ("sqrt.rn.f64", "div.rn.f64", "cvt.rn.f32.f64")}
    found += [f"no {name}" for name in wanted.get(kernel, ()) if not re.search(name, ptx)]
    if kernel is adamw_step.adamw_step_kernel:
        narrow = {tl.bfloat16: "cvt.rn.bf16", tl.float16: "cvt.rn.f16"}.get(constants["ELEMENT"])
        found += [f"no {narrow}"] if narrow is not None and narrow not in ptx else []
    if constants.get("ALIGNED"):
        found += [] if "ld.global.v4.b32" in ptx else ["no load of 16 bytes"]
        if kernel is adamw_step.adamw_step_kernel and "bar.sync" in ptx:
            found.append("values change threads")
    return found


def amd_faults(kernel: Any, assembly: str) -> list[str]:
    """In fp32 a root has two FMA of its own, a quotient five; what sums in fp64 has neither roots nor quotients."""
    names = collections.Counter(re.findall(r"^\tv_(\w+?)(?:_e32|_e64)?\s", assembly, flags=re.MULTILINE))
    fused = {name: count for name, count in names.items() if re.match(r"(pk_)?(fma|mad|mac)", name)}
    if kernel is gradient_norm.gradient_norm_kernel:
        return []
    single = sum(count for name, count in fused.items() if "64" not in name)
    own = 2 * names["sqrt_f32"] + 5 * names["div_fixup_f32"]
    found = [] if single == own else [f"{single} FMA, {own} of them for roots and quotients"]
    found += ["FMA in fp64"] if any("64" in name for name in fused) and kernel is gradient_norm.sum_chunk_kernel else []
    return found + (["subnormal numbers are flushed"] if "denorm_mode_32 3" not in assembly else [])
