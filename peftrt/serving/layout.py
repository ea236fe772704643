"""What an adapter looks like on the device: pages of 8 ranks, made once on the host as one image of bytes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from peftrt.formats.errors import NonFiniteError
from peftrt.formats.pages import PAGE, Y_SCALE
from peftrt.nn import AdapterLinear
from peftrt.serving.arena import round_up

FP32_BYTES = 4


@dataclass(frozen=True, eq=False)
class Site:
    """A layer of the model that adapters of the pool can act on.

    Attributes:
        index: among the pool's sites.
        path: in the model.
        layer: the module.
        n, k: N and K.
    """

    index: int
    path: str
    layer: AdapterLinear
    n: int
    k: int


@dataclass(frozen=True, eq=False)
class Part:
    """An adapter's share of one site.

    Attributes:
        lora_A, lora_B: ``[R, K]`` and ``[N, R]``.
        scaling: s.
        y_scale: fp32 ``[N]``, DoRA's c; None for LoRA.
    """

    lora_A: Tensor
    lora_B: Tensor
    scaling: float
    y_scale: Tensor | None = None


# For each site the rank, 0 where the adapter has nothing there, and whether there is a y_scale.
Shape = tuple[tuple[int, bool], ...]


class Layout:
    """Which pages an adapter has, by number, for a pool of L sites; the same for all adapters of equal ranks.

    Attributes:
        sizes: bytes of each page or vector, multiples of 64; an image holds them one behind the other.
        offsets: int64, where in the image each begins.
        nbytes: of all.
        ranks: int32 ``[L]``.
        A_pages, B_pages: int64 ``[L, W']``, the numbers of a site's pages, W' the most that one has; 0 behind the last.
        vectors: int64 ``[L, 3]``, the numbers of x_scale, y_scale and bias; -1: none.
        has_vectors: whether some site has one.
    """

    def __init__(self, sites: Sequence[Site], shape: Shape, itemsize: int) -> None:
        self.sizes: list[int] = []
        most = max((-(-rank // PAGE) for rank, _ in shape), default=0)
        ranks = torch.zeros(len(sites), dtype=torch.int32)
        pages = torch.zeros(2, len(sites), most, dtype=torch.int64)
        vectors = torch.full((len(sites), 3), -1)
        for site, (rank, scaled) in zip(sites, shape, strict=True):
            count = -(-rank // PAGE)
            ranks[site.index] = rank
            for half, width in enumerate((site.k, site.n)):
                pages[half, site.index, :count] = torch.arange(count) + len(self.sizes)
                self.sizes += [round_up(PAGE * width * itemsize)] * count
            if scaled:
                vectors[site.index, Y_SCALE] = len(self.sizes)
                self.sizes.append(round_up(site.n * FP32_BYTES))
        ends = torch.tensor([0, *self.sizes]).cumsum(0)
        self.offsets = ends[:-1]
        self.nbytes = int(ends[-1])
        self.ranks, self.vectors = ranks, vectors
        self.has_vectors = any(scaled for _, scaled in shape)
        self.A_pages, self.B_pages = pages


def write_image(image: Tensor, layout: Layout, parts: Sequence[Part | None], dtype: torch.dtype, source: str) -> None:
    """Fill an adapter's image, uint8 ``[nbytes]`` of zeros: A and B in ``dtype``, vectors in fp32.

    Args:
        parts: one or None a site.
        source: named in errors.

    Raises:
        NonFiniteError: a finite value is beyond the range of ``dtype``.
    """
    for index, part in enumerate(parts):
        if part is None:
            continue
        for numbers, matrix in ((layout.A_pages, part.lora_A), (layout.B_pages, part.lora_B.t())):
            first, count = int(numbers[index, 0]), -(-matrix.shape[0] // PAGE)
            start, size = int(layout.offsets[first]), layout.sizes[first]
            _write_pages(image[start : start + count * size].view(count, size), matrix, dtype, source)
        if part.y_scale is not None:
            start = int(layout.offsets[layout.vectors[index, Y_SCALE]])
            target = image[start : start + part.y_scale.numel() * FP32_BYTES]
            target.view(torch.float32).copy_(part.y_scale)


def _write_pages(target: Tensor, matrix: Tensor, dtype: torch.dtype, source: str) -> None:
    """``matrix [R, D]`` as pages ``[8, D]``, uint8 ``[pages, bytes]``; ranks behind the last stay as they are."""
    rank, width = matrix.shape
    values = matrix.to(dtype)
    if dtype != matrix.dtype and bool((matrix.isfinite() & ~values.isfinite()).any()):
        raise NonFiniteError(f"{source}: holds values beyond the range of {dtype}, in which the pool keeps adapters")
    pages = target.view(dtype)[:, : PAGE * width].unflatten(1, (PAGE, width))
    whole, rest = divmod(rank, PAGE)
    pages[:whole].copy_(values[: whole * PAGE].reshape(whole, PAGE, width))
    if rest:
        pages[whole, :rest].copy_(values[whole * PAGE :])
