"""How the products are shared among programs: tiles, splits of a sum, and the order in which their parts are added."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from peftrt.kernels._launch import processors


@triton.jit
def sum_splits_kernel(
    p_parts,
    p_scale,
    p_bias,
    p_out,
    numel,
    columns,
    splits,
    SCALE: tl.constexpr,
    BIAS: tl.constexpr,
    SIZE: tl.constexpr,
):
    """out = the parts of all splits, summed in their order, x scale + bias: the same bits in every run."""
    o = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    m = o < numel
    b_sum = tl.zeros((SIZE,), tl.float32)
    p_part = p_parts + o
    for _ in range(splits):
        b_sum += tl.load(p_part, mask=m, other=0.0)
        p_part += numel
    if SCALE:
        b_sum *= tl.load(p_scale + o % columns, mask=m, other=0.0)
    if BIAS:
        b_sum += tl.load(p_bias + o % columns, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, b_sum.to(p_out.dtype.element_ty), mask=m)


@dataclass(frozen=True)
class Config:
    """A tile and its schedule, for calls of up to ``rows`` rows.

    The sum runs over BK in the forward pass and over BN in dX. ``split`` shares it among programs where the tiles of
    the fewest rows that come here would not fill the device.
    """

    rows: int
    BM: int
    BN: int
    BK: int
    warps: int
    stages: int
    split: bool = False


MANY = 1 << 62


def ranges(rows: tuple[int, ...], *tile: int, **schedule: Any) -> tuple[Config, ...]:
    """One tile for several ranges of rows, each of which splits its sums for itself."""
    return tuple(Config(most, *tile, **schedule) for most in rows)


# Products of fp32: three of TF32 on NVIDIA's tensor cores (errors near 1e-6), plain fp32 on AMD and in the interpreter.
PRECISION = {"sm_90": "tf32x3", "sm_80": "tf32x3", "hip": "ieee"}
LEAST_STEPS = 4
SUM_SIZE = 1024
# The rows that tiles and splits are chosen for where a row's bits may not depend on M: few enough that one row does not
# wait for a tile of many.
ANY_ROWS = 16
_for_any_rows: ContextVar[bool] = ContextVar("peftrt_schedule_for_any_rows", default=False)


@contextmanager
def for_any_rows() -> Iterator[None]:
    """In this block every M has the same tiles and splits, and so every row the same order of summation."""
    token = _for_any_rows.set(True)
    try:
        yield
    finally:
        _for_any_rows.reset(token)


def any_rows() -> bool:
    """Whether this is in such a block."""
    return _for_any_rows.get()


@functools.cache
def architecture_of(device: torch.device) -> str:
    """The part of the table for a device; the interpreter takes the largest."""
    if torch.version.hip:
        return "hip"
    return "sm_80" if device.type == "cuda" and torch.cuda.get_device_capability(device) < (9, 0) else "sm_90"


@dataclass(frozen=True)
class Schedule:
    """How a product is shared among programs: tiles of the result, and ``splits`` of ``steps`` steps of its sums."""

    config: Config
    grid: tuple[int, int]
    steps: int

    @property
    def splits(self) -> int:
        return self.grid[1]

    def parts(self, out: Tensor) -> Tensor:
        """Where the programs write: the result, or the parts of its sums."""
        return out if self.splits == 1 else out.new_empty((self.splits, *out.shape), dtype=torch.float32)

    def constants(self, x: Tensor) -> dict[str, Any]:
        """What every kernel of products takes beside its own."""
        c = self.config
        precision = PRECISION[architecture_of(x.device)] if x.is_cuda else "ieee"
        tile = {"SPLIT": self.splits > 1, "BM": c.BM, "BN": c.BN, "BK": c.BK, "PRECISION": precision}
        return tile | {"num_warps": c.warps, "num_stages": c.stages, "enable_fp_fusion": False}


def schedule(by_rows: tuple[Config, ...], M: int, N: int, K: int, dx: bool, device: torch.device) -> Schedule:
    """For M rows: a sum over K for N columns, or for dX the other way round."""
    config, fewest = config_for(by_rows, ANY_ROWS if any_rows() else M)
    tiles = triton.cdiv(K, config.BK) if dx else triton.cdiv(N, config.BN)
    total = triton.cdiv(N, config.BN) if dx else triton.cdiv(K, config.BK)
    steps = steps_for(config, tiles * triton.cdiv(fewest, config.BM), total, device)
    return Schedule(config, (triton.cdiv(M, config.BM) * tiles, max(triton.cdiv(total, steps), 1)), steps)


def config_for(by_rows: tuple[Config, ...], M: int) -> tuple[Config, int]:
    """The configuration for M rows, and the fewest rows that it serves."""
    fewest = 1
    for config in by_rows:
        if config.rows >= M:
            break
        fewest = config.rows + 1
    return config, fewest


def steps_for(config: Config, tiles: int, total: int, device: torch.device) -> int:
    """Steps of the sum that a program takes; all of them where the configuration does not split sums.

    ``tiles`` are those of the fewest rows of the configuration's range: M has no say, so that a row's bits depend on
    its own values within the range.
    """
    return split_steps(tiles, total, device) if config.split else max(total, 1)


def split_steps(tiles: int, total: int, device: torch.device) -> int:
    """Steps of ``total`` that a program takes, so that ``tiles`` and their splits are two programs a multiprocessor.

    Never more, which would wait for a second round.
    """
    splits = min(2 * processors(device) // tiles, total // LEAST_STEPS)
    return max(triton.cdiv(total, max(splits, 1)), 1)


def sum_splits(parts: Tensor, scale: Tensor | None, bias: Tensor | None, out: Tensor) -> None:
    """``out = scale * (parts[0] + parts[1] + ...) + bias``, on the tensors' device.

    Args:
        parts: fp32 [splits, ...].
        scale: fp32 [columns], or None.
        bias: [columns], or None.
        out: [..., columns], contiguous.
    """
    sum_splits_kernel[(triton.cdiv(out.numel(), SUM_SIZE),)](
        parts,
        out if scale is None else scale,
        out if bias is None else bias,
        out,
        out.numel(),
        out.shape[-1],
        parts.shape[0],
        SCALE=scale is not None,
        BIAS=bias is not None,
        SIZE=SUM_SIZE,
        enable_fp_fusion=False,
    )
