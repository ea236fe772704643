"""The sizes that are measured: weights as (N, K), rows as M. The one place for them."""

from __future__ import annotations

from typing import NamedTuple


class Site(NamedTuple):
    """A linear layer's weight: N out features, K in features."""

    N: int
    K: int

    def __str__(self) -> str:
        return f"{self.N}x{self.K}"


RANK = 16
SMALLEST_SIDE = 2000  # of a weight; below it a call's fixed cost decides, and marks without sites do not count

CPU_SITES = (Site(4096, 4096), Site(14336, 4096), Site(4096, 14336))
CPU_ROWS = (1, 4, 16, 64, 512)
CPU_LORA_ROWS = (1, 16, 256, 512)

# A bottleneck's rank and features: of a model of Llama's width, and of BERT-base as Pfeiffer has it.
BOTTLENECKS = (Site(256, 4096), Site(48, 768))

# An encoder of MiniLM-L6's shape (Wang et al. 2020, arXiv:2002.10957): six layers of four weights 384 x 384 and two of
# 1536 by 384, all as one matrix.
ENCODER = Site(6 * (4 * 384 + 2 * 1536), 384)
# Llama-3.1-8B's linear layers as one matrix: 32 layers of q, k, v, o and three of the feed-forward part.
LLAMA_8B = Site(32 * (2 * 4096 + 2 * 1024 + 3 * 14336), 4096)

GPU_SITES = (
    # Llama-3.1-8B: qkv, o, gate_up, down
    Site(6144, 4096),
    Site(4096, 4096),
    Site(28672, 4096),
    Site(4096, 14336),
    # 70B at tensor-parallel 8: qkv, o, gate_up, down
    Site(1280, 8192),
    Site(8192, 1024),
    Site(7168, 8192),
    Site(8192, 3584),
    Site(8192, 8192),
)
GPU_ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 512, 2048, 8192)
GPU_LORA_ROWS = (1, 16, 512, 2048, 8192)

# Batches of many adapters: slots of a table, ranks, and the ranks of a table that mixes them, slot after slot. Eight of
# them, which divide every number of slots: adapters eight slots on have the same ranks.
SLOTS = (8, 64, 128)
RANKS = (8, 16, 64, 128)
MIXED_RANKS = (8, 16, 32, 64, 128, 8, 16, 32)
GPU_MULTI_ROWS = (1, 8, 32, 128, 2048)

# What an optimizer is given, as N tensors of K elements: A and B of rank 8 on the seven linear layers of Llama-3.1-8B's
# 32 blocks, were they all 4096 wide; and one large tensor, smaller on a CPU to save time and memory.
LORA_TENSORS = Site(448, 8 * 4096)
FLAT_CPU, FLAT_GPU = Site(1, 1 << 24), Site(1, 1 << 26)
QUICK_TENSORS = (Site(12, 8192), Site(1, 1 << 17))

# Small enough that every cell takes well under a second: shows that the machinery works, and nothing about speed.
QUICK_SITES = (Site(512, 1024),)
QUICK_ROWS = (1, 16)


def sites(device: str, quick: bool = False) -> tuple[Site, ...]:
    """The weights to measure on ``"cpu"`` or ``"cuda"``."""
    if quick:
        return QUICK_SITES
    return CPU_SITES if device == "cpu" else GPU_SITES


def tensors(device: str, quick: bool = False) -> tuple[Site, ...]:
    """What an optimizer is given on ``"cpu"`` or ``"cuda"``."""
    if quick:
        return QUICK_TENSORS
    return LORA_TENSORS, FLAT_CPU if device == "cpu" else FLAT_GPU


def rows(device: str, quick: bool = False, lora: bool = False) -> tuple[int, ...]:
    """The values of M to measure on ``"cpu"`` or ``"cuda"``; fewer for ``lora``, whose cells cost more."""
    if quick:
        return QUICK_ROWS
    if device == "cpu":
        return CPU_LORA_ROWS if lora else CPU_ROWS
    return GPU_LORA_ROWS if lora else GPU_ROWS
