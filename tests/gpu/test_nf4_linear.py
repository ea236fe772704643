"""nf4_linear and its input gradient: every site and M, odd sizes, layouts; rows that keep their bits."""

from __future__ import annotations

import functools
import math

import pytest
import torch

import peftrt
from bench import problem, truth
from bench.shapes import GPU_SITES, Site
from peftrt import NF4Weight, ops
from peftrt.ops import _native, _paths
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, LAYOUTS, laid_out, randn, sum_size
from tests.gpu.places import (
    BY_DEFAULT,
    EVERYWHERE,
    HALVES,
    Place,
    assert_as_accurate,
    assert_not_by_the_reference,
    backends,
    decoded,
    dx,
    on_gpu,
    random_weight,
    rows_of,
    site_on,
    usual_dx,
    usual_linear,
)
from tests.tolerances import assert_close, assert_same_bits


# pytest runs the parameters of one site one after the other
@functools.lru_cache(maxsize=1)
def _site_weight(site: Site, device: str) -> NF4Weight:
    return random_weight(*site_on(site, device), device, seed=GPU_SITES.index(site))


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@EVERYWHERE
@pytest.mark.parametrize("site", GPU_SITES, ids=str)
def test_as_accurate_as_decoding_first(site: Site, place: Place, dtype: torch.dtype, request) -> None:
    weight = _site_weight(site, place.device)
    exact, wide = decoded(weight, torch.float32), decoded(weight, dtype)
    n, k = weight.shape
    for m in rows_of(site, place.device, request.config.getoption("--fuzz")):
        x, dy = (problem.activations(m, size, dtype, place.device, seed=m) for size in (k, n))
        y = place.run(lambda x=x: ops.nf4_linear(x, weight), place.must("nf4_linear", dtype, m))
        if y is not None:
            assert_as_accurate(y, truth.linear(x, exact), usual_linear(x, wide))
        grad = place.run(lambda dy=dy: dx(dy, weight), place.must("nf4_linear_dx", dtype, m))
        if grad is not None:
            assert_as_accurate(grad, truth.linear_dx(dy, exact), usual_dx(dy, wide))


ODD = [(67, 97, 64), (130, 200, 32), (255, 513, 64), (33, 1, 64), (1, 320, 128), (96, 4160, 64), (70, 160, 4096)]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("nested", [True, False], ids=["nested", "plain"])
@pytest.mark.parametrize(("n", "k", "block"), ODD)
@EVERYWHERE
def test_odd_sizes_blocks_and_biases(
    place: Place, n: int, k: int, block: int, nested: bool, dtype: torch.dtype
) -> None:
    weight = random_weight(n, k, place.device, block=block, nested=nested)
    wide = decoded(weight, dtype).double()
    bias = randn(n, seed=3, dtype=dtype, device=place.device)
    for m in (0, 1, 3, 17, 64, 65, 200):
        x, dy = (randn(m, size, seed=m, dtype=dtype, device=place.device) for size in (k, n))
        for b in (bias, None):
            y = place.run(lambda x=x, b=b: ops.nf4_linear(x, weight, b), place.must("nf4_linear", dtype, m))
            if y is not None:
                expected = x.double() @ wide.t() + (0 if b is None else b.double())
                # a kernel that leaves W unrounded is closer to W and farther from its rounded values
                assert_close(y, expected, roundings=2, intermediate=sum_size(x, wide.t(), b))
        grad = place.run(lambda dy=dy: dx(dy, weight), place.must("nf4_linear_dx", dtype, m))
        if grad is not None:
            assert_close(grad, dy.double() @ wide, roundings=2, intermediate=sum_size(dy, wide))


@pytest.mark.parametrize("lead", [(), (0,), (2, 0), (3, 1, 5)], ids=str)
@BY_DEFAULT
def test_leading_dimensions(place: Place, lead: tuple[int, ...]) -> None:
    weight = random_weight(48, 128, place.device)
    x = randn(*lead, 128, device=place.device, dtype=torch.bfloat16)
    y = place.run(lambda: ops.nf4_linear(x, weight))
    assert y is not None
    assert y.shape == (*lead, 48)
    flat = place.run(lambda: ops.nf4_linear(x.reshape(-1, 128), weight))
    assert flat is not None
    assert_same_bits(y, flat.view(*lead, 48))


@pytest.mark.parametrize("layout", LAYOUTS)
@EVERYWHERE
def test_any_layout_of_x(place: Place, layout: str) -> None:
    weight = random_weight(130, 192, place.device)
    wide = decoded(weight, torch.bfloat16).double()
    for m in (1, 5, 40, 130):
        x, dy = (
            laid_out(randn(m, size, seed=m, dtype=torch.bfloat16, device=place.device), layout) for size in (192, 130)
        )
        before = x.clone()
        y = place.run(lambda x=x: ops.nf4_linear(x, weight), place.must("nf4_linear", torch.bfloat16, m))
        if y is not None:
            assert_close(y, x.double() @ wide.t(), roundings=2, intermediate=sum_size(x, wide.t()))
        grad = place.run(lambda dy=dy: dx(dy, weight), place.must("nf4_linear_dx", torch.bfloat16, m))
        if grad is not None:
            assert_close(grad, dy.double() @ wide, roundings=2, intermediate=sum_size(dy, wide))
        assert_same_bits(x, before)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EVERYWHERE
def test_codes_at_any_address(place: Place, dtype: torch.dtype) -> None:
    """Views into a file's buffer begin anywhere."""
    weight = random_weight(70, 192, place.device)
    moved = {name: torch.cat([tensor.new_zeros(1), tensor.view(-1)])[1:] for name, tensor in weight.tensors().items()}
    shifted = NF4Weight.assemble(**moved, shape=weight.shape, dtype=weight.dtype, block_size=64)
    assert shifted.codes.data_ptr() % 2 == 1
    x = randn(9, 192, dtype=dtype, device=place.device)
    must = place.must("nf4_linear", dtype, 9)
    y = place.run(lambda: ops.nf4_linear(x, shifted), must)
    expected = place.run(lambda: ops.nf4_linear(x, weight), must)
    if y is not None and expected is not None:
        assert_same_bits(y, expected)


RANGES = (3, 8, 16, 40, 64, 130, 300, 600, 2048)  # of M, as far as kernels tell them apart


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EVERYWHERE
def test_a_row_does_not_depend_on_its_neighbours(place: Place, dtype: torch.dtype) -> None:
    n, k = (1024, 2048) if place.on_gpu else (64, 192)
    weight = random_weight(n, k, place.device)
    for m in RANGES if place.on_gpu else RANGES[:6]:
        row = m // 2
        for op, call, size in (("nf4_linear", ops.nf4_linear, k), ("nf4_linear_dx", dx, n)):
            must = place.must(op, dtype, m)
            one, other = (randn(m, size, seed=seed, dtype=dtype, device=place.device) for seed in (m, m + 1))
            other[row] = one[row]
            other[0, 5], other[-1, 7] = math.nan, math.inf
            results = [place.run(lambda x=x, call=call: call(x, weight), must) for x in (one, other)]
            if results[0] is not None and results[1] is not None:
                assert_same_bits(results[1][row], results[0][row])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EVERYWHERE
def test_a_hundred_runs_give_the_same_bits(place: Place, dtype: torch.dtype) -> None:
    n, k, runs = (4096, 4096, 100) if place.on_gpu else (64, 192, 10)
    weight = random_weight(n, k, place.device)
    for m in (1, 8, 33, 130, 2048) if place.on_gpu else (1, 8, 130):
        for op, call, size in (("nf4_linear", ops.nf4_linear, k), ("nf4_linear_dx", dx, n)):
            x = randn(m, size, seed=m, dtype=dtype, device=place.device)
            must = place.must(op, dtype, m)
            first = place.run(lambda x=x, call=call: call(x, weight), must)
            if first is None:
                continue
            # compared where they are: a hundred copies to the host would take longer than the runs
            bits = first.view(torch.int16 if dtype != torch.float32 else torch.int32)
            for _ in range(runs - 1):
                again = place.run(lambda x=x, call=call: call(x, weight), must)
                assert again is not None
                assert torch.equal(again.view(bits.dtype), bits), f"{op}, M = {m}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@BY_DEFAULT
def test_gradients_of_x_and_bias(place: Place, dtype: torch.dtype) -> None:
    weight = random_weight(70, 192, place.device)
    wide = decoded(weight, dtype).double()
    for m in (1, 40, 300):
        x = randn(m, 192, dtype=dtype, device=place.device).requires_grad_()
        bias = randn(70, seed=3, dtype=dtype, device=place.device).requires_grad_()
        dy = randn(m, 70, seed=4, dtype=dtype, device=place.device)
        with peftrt.backend(place.backend):
            y = ops.nf4_linear(x, weight, bias)
            grads = torch.autograd.grad(y, (x, bias), dy)
        assert_close(grads[0], dy.double() @ wide, roundings=2, intermediate=sum_size(dy, wide))
        assert_close(grads[1], dy.double().sum(0), intermediate=float(dy.double().norm(dim=0).max()))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@EVERYWHERE
def test_opcheck(place: Place, dtype: torch.dtype) -> None:
    weight = weight_args("nf4_linear", random_weight(6, 64, place.device))
    for m in (0, 3):
        x, dy, b = (randn(*s, dtype=dtype, device=place.device).requires_grad_() for s in ((m, 64), (m, 6), (6,)))
        for op, args, first in (("nf4_linear", (x, *weight, b), x), ("nf4_linear_dx", (dy, *weight), dy)):
            # backward calls the other operation
            if place.must("nf4_linear_dx", first.dtype, m):
                with peftrt.backend(place.backend):
                    torch.library.opcheck(getattr(torch.ops.peftrt, op).default, args)


@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gpu_is_served_by_kernels(dtype: torch.dtype) -> None:
    for n, k, block in [(4096, 4096, 64), *ODD]:
        weight = weight_args("nf4_linear", random_weight(n, k, "cuda", block=block))
        for m in (1, 8, 64, 65, 512, 2048):
            x, dy = (randn(m, size, dtype=dtype, device="cuda") for size in (k, n))
            assert_not_by_the_reference("nf4_linear", x, *weight, None)
            assert_not_by_the_reference("nf4_linear_dx", dy, *weight)


@on_gpu
@pytest.mark.parametrize("backend", backends("native", "triton"))
def test_more_than_two_to_the_31_weights(backend: str) -> None:
    """Rows on either side of the place where 32-bit counts of weights, or of bytes of their decoded values, end."""
    n, k, m = 40960, 65536, 3
    weight = random_weight(n, k, "cuda")
    assert weight.numel > 2**31
    x, dy = (randn(m, size, dtype=torch.bfloat16, device="cuda") for size in (k, n))
    with peftrt.backend(backend):
        y = ops.nf4_linear(x, weight)
    with peftrt.backend("triton"):
        grad = dx(dy, weight)
    exact_dx = torch.zeros(m, k, dtype=torch.float64, device="cuda")
    for start in range(0, n, 4096):
        part = {"codes": weight.codes[start : start + 4096], "absmax": weight.absmax[start : start + 4096]}
        runs = slice(start * k // 64 // 256 * 4, (start + 4096) * k // 64 // 256 * 4)
        part |= {"nested_absmax": weight.nested_absmax[runs], "nested_offset": weight.nested_offset}
        wide = decoded(NF4Weight(**part, shape=(4096, k), dtype=torch.bfloat16), torch.bfloat16)
        expected = truth.linear(x, wide)
        got = y[:, start : start + 4096]
        assert_close(got, expected, roundings=2, intermediate=sum_size(x, wide[:64].double().t()))
        exact_dx += truth.linear_dx(dy[:, start : start + 4096].contiguous(), wide)
    assert_close(grad, exact_dx, roundings=2, intermediate=float(exact_dx.abs().max()))


@on_gpu
def test_the_library_knows_what_a_device_has() -> None:
    if _native.load_cuda() is not None:
        pytest.skip(str(_native.load_cuda()))
    wide = torch.cuda.get_device_capability() == (9, 0) and "9.0a" in torch.ops.peftrt_cuda.sm().split()
    assert _native.cuda_rows(torch.device("cuda", 0)) == (_paths.WIDE_ROWS if wide else _paths.NATIVE_ROWS)
