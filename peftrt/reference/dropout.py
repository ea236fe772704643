"""Dropout whose mask is a function of a seed and the element's position, so that no mask is stored.

The same integers come out on every device and in every kernel: the element of flat index j, 64 bits, is kept iff
``mix(mix(lo(j) ^ lo(seed)) ^ mix(hi(j)) ^ key) >= p 2^32`` with ``key = mix(mix(lo(seed) ^ 0x9E3779B9) ^ hi(seed))``,
where ``lo`` and ``hi`` are halves of 32 bits and ``mix`` is the 32-bit finaliser of MurmurHash3 (Appleby 2011). The key
has all of the seed in it: without, the mask of a neighbouring seed would be this one's with its elements exchanged.
"""

from __future__ import annotations

import torch
from torch import Tensor

_LOW = 0xFFFFFFFF


def _mix(word: Tensor) -> Tensor:
    """MurmurHash3's finaliser on 32-bit words held in int64 (products wrap, their low 32 bits are right)."""
    word = word ^ (word >> 16)
    word = (word * 0x85EBCA6B) & _LOW
    word = word ^ (word >> 13)
    word = (word * 0xC2B2AE35) & _LOW
    return word ^ (word >> 16)


def keep_mask(seed: Tensor, rows: int, columns: int, p: float) -> Tensor:
    """bool [rows, columns]: True with probability ``1 - p``. ``seed``: int64 [1], on the device of the mask."""
    index = torch.arange(rows * columns, device=seed.device, dtype=torch.int64)
    low, high = seed & _LOW, (seed >> 32) & _LOW
    word = _mix((index & _LOW) ^ low) ^ _mix(index >> 32) ^ _mix(_mix(low ^ 0x9E3779B9) ^ high)
    return (_mix(word) >= round(p * 2**32)).view(rows, columns)


def dropout(x: Tensor, seed: Tensor | None, p: float) -> Tensor:
    """``x / (1 - p)`` where it is kept, 0 elsewhere; x itself for ``p = 0``. x: [..., K]."""
    if p == 0.0:
        return x
    assert seed is not None
    return torch.where(keep_mask(seed, x.numel(), 1, p).view(x.shape), x / (1.0 - p), 0.0)
