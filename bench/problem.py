"""The operands of the cells: the same for every contender, drawn from a fixed seed."""

from __future__ import annotations

import functools
import math
from dataclasses import replace

import torch
from torch import Tensor

from bench import truth
from bench.shapes import RANK, Site
from peftrt import NF4Weight

SEED = 20250801


def _normal(*shape: int, device: str, seed: int, scale: float = 1.0) -> Tensor:
    generator = torch.Generator(device).manual_seed(SEED + seed)
    return scale * torch.randn(*shape, generator=generator, device=device)


def dense(site: Site, dtype: torch.dtype, device: str) -> Tensor:
    """A normal weight of standard deviation ``1 / sqrt(K)``, ``[N, K]``."""
    return _normal(site.N, site.K, device=device, seed=0, scale=site.K**-0.5).to(dtype)


# One site's weights at a time: the largest takes 0.7 GB in its three forms, and cells come ordered by site.
@functools.lru_cache(maxsize=1)
def weight(site: Site, dtype: torch.dtype, device: str) -> NF4Weight:
    """:func:`dense`, quantised with nested statistics from ``dtype``."""
    return NF4Weight.quantize(dense(site, dtype, device))


@functools.lru_cache(maxsize=1)
def decoded(site: Site, dtype: torch.dtype, device: str) -> Tensor:
    """The true value of :func:`weight`, ``[N, K]``: what the dense peers multiply with."""
    return truth.decode(weight(site, dtype, device), dtype)


def activations(M: int, features: int, dtype: torch.dtype, device: str, seed: int = 1) -> Tensor:
    """Normal rows ``[M, features]``."""
    return _normal(M, features, device=device, seed=seed).to(dtype)


def adapter(site: Site, device: str) -> tuple[Tensor, Tensor]:
    """A ``[R, K]`` and B ``[N, R]`` in fp32, sized so that the adapter adds about as much as the base gives."""
    A = _normal(RANK, site.K, device=device, seed=2, scale=site.K**-0.5)
    return A, _normal(site.N, RANK, device=device, seed=3, scale=RANK**-0.5)


def copies(operand: Tensor | NF4Weight, rotation_bytes: int) -> list[Tensor] | list[NF4Weight]:
    """``operand`` and as many clones as fill ``rotation_bytes``: a GPU's cache then holds none of them for long."""
    count = max(1, math.ceil(rotation_bytes / operand.nbytes))
    if isinstance(operand, Tensor):
        return [operand] + [operand.clone() for _ in range(count - 1)]
    clones = ({name: tensor.clone() for name, tensor in operand.tensors().items()} for _ in range(count - 1))
    return [operand, *(replace(operand, **tensors) for tensors in clones)]  # type: ignore[arg-type]
