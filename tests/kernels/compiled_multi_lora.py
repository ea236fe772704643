"""The programs of multi_lora_linear: those of a few rows, of rows by slot, and of the pages' gradients."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any, NamedTuple

from peftrt.kernels import _routes, _schedule, multi_lora_decode, multi_lora_gradient, multi_lora_grouped

POINTERS = {
    "p_ranks": "*i32",
    "p_pages": "*i64",
    "p_scaling": "*fp32",
    "p_vectors": "*fp32",
    "p_starts": "*i32",
    "p_vector_starts": "*i64",
    "p_slot_ids": "*i32",
    "p_flag": "*i32",
    "p_order": "*i32",
    "p_tiles": "*i32",
    "p_chain": "*i32",
    "p_base": "*fp32",
    "p_shrunk": "*fp32",
    "p_left": "*fp32",
}
SIZES = ("M", "N", "K", "E", "P", "W", "steps", "columns", "tiles", "entries", "stride_out")


class Program(NamedTuple):
    """As a ``Variant`` of tests/kernels/compiled.py, for any target."""

    name: str
    kernel: Any
    types: dict[str, Any]
    constants: dict[str, Any]
    options: dict[str, Any]
    round_sizes: bool
    tensor_cores: bool


def programs(dtypes: dict[str, int], architecture: str) -> Iterator[Program]:
    """Adapters in x's dtype and in fp32; sizes and addresses round or not; one map or three, of few or many pages."""
    for dtype in dtypes:
        for values in dict.fromkeys((dtype, "fp32")):
            for round_sizes, parts in ((True, 1), (False, 3)) if values == dtype else ((True, 3),):
                case = Case(dtype, values, round_sizes, parts, _schedule.PRECISION[architecture])
                yield from case.decode()
                yield from case.grouped(multi_lora_grouped.SHRINK_STAGES[architecture])
                yield from case.gradient()
    ones = ("P", "E", "W", "steps", "entries")
    case = Case("fp16", "fp16", True, 1, _schedule.PRECISION[architecture], ones)
    for program in (*case.decode(), *case.grouped(multi_lora_grouped.SHRINK_STAGES[architecture]), *case.gradient()):
        yield program._replace(name=f"{program.name} ones")
    yield from _routing()


class Case(NamedTuple):
    dtype: str
    values: str
    round_sizes: bool
    parts: int
    precision: str
    ones: tuple[str, ...] = ("P",)  # sizes that are 1, with which Triton compiles another program

    def _program(
        self,
        kernel: Any,
        what: str,
        own: dict[str, str],
        constants: dict[str, Any],
        options: dict[str, Any],
        dots: bool,
    ) -> Program:
        types = POINTERS | dict.fromkeys(SIZES, "i32") | {"sizes": ("i32",) * self.parts}
        types |= {"p_x": f"*{self.dtype}", "p_values": f"*{self.values}", "p_bias": f"*{self.dtype}", **own}
        if self.parts == 1:
            constants = {size: 1 for size in self.ones if size in kernel.arg_names} | constants
        name = f"{what} {self.dtype} values={self.values} parts={self.parts} round={self.round_sizes}"
        tile = {key: value for key, value in constants.items() if not key.startswith("num_")}
        options = options | {key: value for key, value in constants.items() if key.startswith("num_")}
        types = {argument: kind for argument, kind in types.items() if argument in kernel.arg_names}
        return Program(name, kernel, types, tile, options, self.round_sizes, dots)

    def decode(self) -> Iterator[Program]:
        module = multi_lora_decode
        scale = {"p_out": f"*{self.dtype}", "p_starts": "*i64"}
        yield self._program(module.scale_rows_kernel, "scale_rows", scale, {"SIZE": module.SCALE_COLUMNS}, {}, False)
        for ranks in (8, 16):
            tile = {"BR": ranks, "BK": module.SHRINK_COLUMNS, "num_warps": module.SHRINK_WARPS}
            own = {"p_out": "*fp32"}
            yield self._program(module.shrink_rows_kernel, f"shrink_rows ranks={ranks}", own, tile, {}, False)
        for pages, base, vectors in ((1, 8, False), (2, 1, True), (32, 4, True), (4, 0, False)):
            tile = {"BASE": base, "SPLITS": 8 if base else 1, "VECTORS": vectors, "BIAS": vectors, "WP": pages}
            tile |= {"BR": min(8 * pages, module.RANKS), "BN": module.EXPAND_COLUMNS, "num_warps": module.EXPAND_WARPS}
            own = {"p_out": f"*{self.dtype}", "p_starts": "*i64"}
            what = f"expand_rows pages={pages} base={base} vectors={vectors}"
            yield self._program(module.expand_rows_kernel, what, own, tile, {}, False)

    def grouped(self, stages: int) -> Iterator[Program]:
        module = multi_lora_grouped
        shared = {"BM": _routes.TILE_ROWS, "PRECISION": self.precision}
        for ranks, parted in itertools.product((16, 32), (False, True)):
            tile = {"PARTED": parted, "SPLITS": 4, "BR": ranks, "BK": module.SHRINK_COLUMNS, **shared}
            tile["num_warps"] = module.SHRINK_WARPS[ranks]
            what = f"shrink_groups ranks={ranks} parted={parted}"
            yield self._program(
                module.shrink_groups_kernel, what, {"p_out": "*fp32"}, tile, {"num_stages": stages}, True
            )
        for pages, base, add, parted in ((2, 1, False, True), (32, 0, True, True), (8, 2, False, False)):
            tile = {"BASE": base, "ADD": add, "PARTED": parted, "VECTORS": parted, "BIAS": parted and not add}
            tile |= {"SPLITS": 4, "WP": pages, **shared, **module.EXPAND}
            what = f"expand_groups pages={pages} base={base} add={add} parted={parted}"
            own = {"p_out": f"*{self.dtype}"}
            yield self._program(module.expand_groups_kernel, what, own, tile, {}, True)

    def gradient(self) -> Iterator[Program]:
        module = multi_lora_gradient
        for ranks, parted in itertools.product((16, 32), (False, True)):
            tile = {"PARTED": parted, "SPLITS": 4, "BR": ranks, "PRECISION": self.precision, **module.GRADIENT}
            what = f"page_gradient ranks={ranks} parted={parted}"
            own = {"p_out": f"*{self.values}"}
            yield self._program(module.page_gradient_kernel, what, own, tile, {}, True)


def _routing() -> Iterator[Program]:
    case = Case("fp32", "fp32", True, 1, "ieee")
    tile = {"BM": _routes.TILE_ROWS, **_routes.ROUTE}
    for ones in ((), ("E",)):
        own = case._replace(ones=ones)
        yield own._program(_routes.route_kernel, f"route ones={ones}", {}, tile, {}, False)
    chain = multi_lora_gradient.page_chain_kernel
    for parts in (1, 3):
        case = case._replace(parts=parts)
        yield case._program(chain, "page_chain", {}, dict(multi_lora_gradient.CHAIN), {}, False)
