"""The programs of bottleneck: rows from x to y, and the two of few rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from peftrt.kernels import _schedule, bottleneck, low_rank
from peftrt.kernels._adapter import RANKS
from tests.kernels.compiled_multi_lora import Program

# On AMD a quotient is made of FMA.
QUOTIENTS = (bottleneck.bottleneck_activate_kernel,)
SIZES = ("M", "K", "R", "stride_down_r", "stride_down_k", "stride_up_k", "stride_up_r", "numel")


def programs(dtypes: dict[str, int], architecture: str) -> Iterator[Program]:
    """Adapters in fp32 and in x's dtype; of few ranks and of many; sizes and addresses round or not."""
    precision = _schedule.PRECISION[architecture]
    tile: dict[str, Any] = {"BM": bottleneck.ROWS, "RANKS": RANKS, "PRECISION": precision}
    tile |= {"stride_up_r": 1}
    options = {"num_warps": bottleneck.WARPS}
    of_rows = options | {"num_stages": low_rank.STAGES[architecture]}
    for number, activation in enumerate(bottleneck.ACTIVATIONS):
        types = dict.fromkeys(("p_sum", "p_inner", "p_activated"), "*fp32") | {"p_down_bias": "*fp32"}
        types |= {"numel": "i32", "R": "i32"}
        constants = {"ACTIVATION": activation, "SIZE": bottleneck.ACTIVATE_SIZE}
        name = f"bottleneck_activate {activation}"
        yield Program(name, bottleneck.bottleneck_activate_kernel, types, constants, {}, number % 2 == 0, False)
    for dtype, itemsize in dtypes.items():
        tile["BN"] = bottleneck.COLUMNS[itemsize]
        for number, adapter in enumerate(dict.fromkeys((dtype, "fp32"))):
            types = dict.fromkeys(SIZES, "i32") | {"scaling": "fp32"}
            types |= dict.fromkeys(("p_x", "p_residual", "p_out"), f"*{dtype}")
            types |= dict.fromkeys(("p_down", "p_down_bias", "p_up", "p_up_bias"), f"*{adapter}")
            types |= dict.fromkeys(("p_inner", "p_activated"), "*fp32")
            for rank in (16, 256):
                for activation in ("relu", "gelu", "tanh"):
                    own = {"ACTIVATION": activation, "BK": bottleneck.DEPTH, "BR": bottleneck.rank_tile(rank)}
                    constants = tile | own | {"stride_down_k": 1}
                    name = f"bottleneck {dtype} {adapter} rank={rank} {activation}"
                    round_sizes = rank == 256 or number == 1
                    yield Program(name, bottleneck.bottleneck_kernel, types, constants, of_rows, round_sizes, True)
            for round_sizes in (True, False):
                name = f"bottleneck_up {dtype} {adapter} round={round_sizes}"
                yield Program(name, bottleneck.bottleneck_up_kernel, types, dict(tile), options, round_sizes, True)
