"""Where and by whom a call is run, on which sizes, and how close to float64 it must come.

The tests of this folder run on a CPU too, on smaller sizes: what they ask is then known to be right but for the device.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

import peftrt
from bench.shapes import GPU_ROWS, GPU_SITES, Site
from peftrt import BackendError, NF4Weight
from peftrt.formats.nf4 import float_bytes
from peftrt.ops import _native
from peftrt.ops._define import OPS
from peftrt.ops._weight import weight_args

HALVES = (torch.bfloat16, torch.float16)
NATIVE_ROWS = 64  # the CUDA library multiplies up to so many rows itself, whatever the device
SHRINK = 32  # a CPU's sites are so much smaller on each side


class Place(NamedTuple):
    """A device, and the backend that is forced there; None for the package's own choice."""

    device: str
    backend: str | None

    def __str__(self) -> str:
        return f"{self.device}-{self.backend or 'default'}"

    @property
    def on_gpu(self) -> bool:
        return self.device == "cuda"

    def must(self, op: str, dtype: torch.dtype, rows: int = 1) -> bool:
        """Whether the backend has to take such a call. The CUDA library has no product of many rows, nor dX."""
        if not self.on_gpu or self.backend != "native" or not op.startswith("nf4_linear"):
            return True
        return op == "nf4_linear" and dtype in HALVES and rows <= NATIVE_ROWS

    def run(self, call: Callable[[], Tensor], must: bool = True) -> Tensor | None:
        """The call's result; None where the backend refuses one that it need not take."""
        try:
            with peftrt.backend(self.backend):
                return call()
        except BackendError:
            if must:
                raise
            return None


def on_gpu(test: Callable[..., None]) -> Callable[..., None]:
    """Marks a test that has no meaning on a CPU."""
    return pytest.mark.gpu(pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")(test))


def backends(*names: str | None) -> list[Any]:
    """Backends of a GPU as parameters; the native one is skipped where it is not built, which the build has said."""
    missing = _native.load_cuda() if torch.cuda.is_available() else None
    unbuilt = pytest.mark.skipif(missing is not None, reason=f"native kernels: {missing}")
    return [pytest.param(name, id=name or "default", marks=[unbuilt] if name == "native" else []) for name in names]


def places(*names: str | None) -> list[object]:
    """The CPU by itself; on a GPU, where there is one, each of the backends."""
    found: list[object] = [pytest.param(Place("cpu", None), id="cpu-default")]
    for parameter in backends(*names) if torch.cuda.is_available() else []:
        place, marks = Place("cuda", parameter.values[0]), [pytest.mark.gpu, *parameter.marks]
        found.append(pytest.param(place, id=str(place), marks=marks))
    return found


EVERYWHERE = pytest.mark.parametrize("place", places(None, "native", "triton"))
BY_DEFAULT = pytest.mark.parametrize("place", places(None))
# nf4_quantize has no Triton kernel
QUANTIZERS = pytest.mark.parametrize("place", places(None, "native"))


def site_on(site: Site, device: str) -> Site:
    """The site itself on a GPU, a small one of the same proportions on a CPU."""
    if device == "cuda":
        return site
    return Site(*(max(64, side // SHRINK // 64 * 64) for side in site))


def rows_of(site: Site, device: str, everything: bool) -> list[int]:
    """A third of all M, another third for the next site, so that each M meets three sites; all on request."""
    first = 0 if everything else GPU_SITES.index(site) % 3
    rows = GPU_ROWS[first :: 1 if everything else 3]
    return list(rows) if device == "cuda" else [M for M in rows if M <= 512]


def random_weight(n: int, k: int, device: str, *, block: int = 64, nested: bool = True, seed: int = 0) -> NF4Weight:
    """Every code, and every code of a nested scale, as likely as another; scales from 0.03 to 0.07."""
    draw = torch.Generator().manual_seed(seed)
    blocks = -(-n * k // block)
    codes = torch.randint(256, (-(-n * k // 2),), dtype=torch.uint8, generator=draw)
    if nested:
        absmax = torch.randint(256, (blocks,), dtype=torch.uint8, generator=draw)
        steps = 0.01 + 0.01 * torch.rand(-(-blocks // 256), generator=draw)
        scales = (absmax, float_bytes(steps), float_bytes(torch.tensor([0.05])))
    else:
        scales = (float_bytes(0.03 + 0.04 * torch.rand(blocks, generator=draw)), None, None)
    return NF4Weight.assemble(codes, *scales, (n, k), torch.bfloat16, block).to(device)


def decoded(weight: NF4Weight, dtype: torch.dtype) -> Tensor:
    """By the reference on the weight's own device; test_nf4_dequantize.py holds it against the CPU's."""
    with peftrt.backend("reference"):
        return weight.dequantize(dtype)


def dx(dy: Tensor, weight: NF4Weight) -> Tensor:
    """The operation that a backward runs."""
    return torch.ops.peftrt.nf4_linear_dx(dy, *weight_args("nf4_linear_dx", weight))


def assert_not_by_the_reference(op: str, *args: object) -> None:
    """What the package chooses by itself is a kernel."""
    choice = OPS[op].choice(*args)
    assert choice.backend is not None, choice
    assert choice.backend.name != "reference", choice


def launches(call: Callable[[], object]) -> int:
    """How many kernels, copies and fills a call puts on the GPU, after one that compiles and loads."""
    call()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    on_device = [event for event in profile.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    assert on_device, "the profiler saw nothing on the GPU"
    return len(on_device)


def assert_as_accurate(actual: Tensor, exact: Tensor, usual: Tensor) -> None:
    """The error against float64 is at most 1.1 times that of decoding W to the dtype and summing in fp32.

    Args:
        actual: the result.
        exact: its true value, float64.
        usual: what that other way gives, rounded to the dtype.
    """
    assert actual.shape == exact.shape
    assert actual.dtype == usual.dtype
    if actual.numel() == 0:
        return
    own, other = (tensor.double() - exact for tensor in (actual, usual))
    size = exact.norm()
    mean = float(own.norm() / size), float(other.norm() / size)
    assert mean[0] <= 1.1 * mean[1], f"relative error {mean[0]:.3g}, of the usual way {mean[1]:.3g}"
    # One wrong element among millions does not move the mean. The largest of so many rounding errors differs by chance
    # between two ways of summing, by far less than a wrong element is off.
    worst = float(own.abs().max()), float(other.abs().max())
    assert worst[0] <= 2 * worst[1], f"largest error {worst[0]:.3g}, of the usual way {worst[1]:.3g}"


def usual_linear(x: Tensor, wide: Tensor) -> Tensor:
    """W decoded to the dtype, the products summed in fp32 and rounded once."""
    return (x.float() @ wide.float().t()).to(x.dtype)


def usual_dx(dy: Tensor, wide: Tensor) -> Tensor:
    """The same for the input gradient."""
    return (dy.float() @ wide.float()).to(dy.dtype)
