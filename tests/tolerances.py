"""How far a result may be from the truth: one dictionary, each figure with its reason.

A bound is ``roundings * rtol * |expected| + atol * scale``, where ``scale`` is the largest finite magnitude in
``expected``: an output near zero is a difference of large partial sums and carries their error. ``roundings`` is how
often the computation rounds to the dtype on its way: 1 for an operation that sums in fp32 and rounds at the end. Where
``expected`` is itself rounded to the dtype, it may lie on the other side of the truth, and ``rtol`` counts twice.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Tolerance(NamedTuple):
    rtol: float
    atol: float


TOLERANCES = {
    # Only the order of summation differs: a few hundred terms of 1.1e-16 each, most of which cancel.
    torch.float64: Tolerance(1e-12, 1e-12),
    # Sums of up to a few thousand products in fp32 (6.0e-8 each): blocked sums measure 1e-7 to 6e-7 of the largest
    # output.
    torch.float32: Tolerance(1e-6, 2e-6),
    # One rounding to 8 significant bits; the sums before it are in fp32 and add what fp32 adds.
    torch.bfloat16: Tolerance(2.0**-8, 2e-6),
    # As bf16, with 11 significant bits.
    torch.float16: Tolerance(2.0**-11, 2e-6),
}


def bound(expected: Tensor, dtype: torch.dtype, roundings: int = 1, intermediate: float = 0.0) -> Tensor:
    """The permitted absolute error of every element, fp64; 0 where ``expected`` is not finite."""
    rtol, atol = TOLERANCES[dtype]
    if expected.dtype == dtype:
        rtol *= 2
    magnitude = expected.detach().cpu().double().abs().nan_to_num(nan=0.0, posinf=0.0)
    scale = magnitude.max() if magnitude.numel() else magnitude.new_zeros(())
    scale = scale.clamp(min=intermediate)
    # below the normal range a rounding is of a fixed size: half of the smallest subnormal
    least = torch.finfo(dtype).smallest_normal * torch.finfo(dtype).eps / 2
    # beyond the first, a rounding is of an intermediate, which may be larger than the final value
    return rtol * magnitude + atol * scale + (roundings - 1) * rtol * scale + 2 * roundings * least


def assert_close(
    actual: Tensor,
    expected: Tensor,
    dtype: torch.dtype | None = None,
    *,
    roundings: int = 1,
    intermediate: float = 0.0,
) -> None:
    """``actual`` is within the tolerance of ``dtype`` (default: its own) of ``expected``; NaN and inf in place.

    ``intermediate``: magnitude of the partial results, where that may be beyond the results'. A failure names the first
    and the worst mismatch by coordinate and value.
    """
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    dtype = dtype or actual.dtype
    limit = bound(expected, dtype, roundings, intermediate)
    got, want = actual.detach().cpu().double(), expected.detach().cpu().double()
    error = (got - want).abs()
    same = (got == want) | (got.isnan() & want.isnan())
    wrong = ~(same | (error <= limit))
    if wrong.any():
        raise AssertionError(_report(got, want, error / limit, wrong, str(dtype).removeprefix("torch.")))


def assert_same_bits(actual: Tensor, expected: Tensor) -> None:
    """Same shape, dtype and bytes: 0.0 and -0.0 differ, equal NaNs do not."""
    assert actual.shape == expected.shape, f"shape {list(actual.shape)}, expected {list(expected.shape)}"
    assert actual.dtype == expected.dtype, f"dtype {actual.dtype}, expected {expected.dtype}"
    got, want = actual.detach().cpu().contiguous(), expected.detach().cpu().contiguous()
    integer = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[got.element_size()]
    wrong = got.view(integer) != want.view(integer)
    if wrong.any():
        error = (got.double() - want.double()).abs()
        raise AssertionError(_report(got.double(), want.double(), error, wrong, "bits"))


def _report(got: Tensor, want: Tensor, badness: Tensor, wrong: Tensor, what: str) -> str:
    places = wrong.nonzero()
    worst = badness.where(wrong, -1.0).nan_to_num(nan=torch.inf, posinf=torch.inf).argmax()
    coordinates = (tuple(places[0].tolist()), tuple(int(i) for i in torch.unravel_index(worst, wrong.shape)))
    lines = [f"{places.shape[0]} of {wrong.numel()} elements differ ({what}):"]
    for label, at in zip(("first", "worst"), coordinates, strict=True):
        lines.append(
            f"  {label} at {at}: got {got[at].item()!r}, expected {want[at].item()!r} ({badness[at].item():.3g})"
        )
    return "\n".join(lines)
