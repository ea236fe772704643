"""adamw_step: the same bits by every backend, the arithmetic by hand, against torch's AdamW in fp64."""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peftrt
from peftrt.formats.adamw_state import EXP_AVG_MAP, EXP_AVG_SQ_MAP, Moments, block_bytes, moments
from peftrt.formats.nf4 import midpoints
from peftrt.ops import _native
from peftrt.ops._adamw_step import STEP, adamw_step
from tests.cases import BACKENDS, FLOATS, NATIVE, randn
from tests.ops.many_tensors import ABSENT, SIZES, ManyTensors, gradients, hyper_row
from tests.tolerances import assert_same_bits

BITS = (32, 8)
needs_native = pytest.mark.skipif(_native.load() is not None, reason="the native library is not built")


def problem(dtype: torch.dtype = torch.float32, bits: int = 32, **changes: Any) -> ManyTensors:
    """All sizes, at odd addresses, two of them without a gradient."""
    return ManyTensors(**{"sizes": SIZES, "bits": bits, "dtype": dtype, "absent": ABSENT} | changes)


@pytest.mark.parametrize("coefficient", [None, 0.37])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", [NATIVE])
def test_native_writes_the_references_bytes(
    backend: str, dtype: torch.dtype, bits: int, coefficient: float | None
) -> None:
    start = problem(dtype, bits, coefficient=coefficient)
    got, want = start.copy(), start.copy()
    for _ in range(3):  # what was written is read by the next step
        got.step(backend).assert_equals(want.step("reference"))
    assert not torch.equal(got.state, start.state)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_without_gradient_nothing_is_changed(backend: str, bits: int) -> None:
    start = problem(bits=bits)
    got = start.copy().step(backend)
    for t in range(len(SIZES)):
        changed = not torch.equal(got.params[t], start.params[t])
        assert changed == (t not in ABSENT)
        for mine, before in zip(got.moments_of(t), start.moments_of(t), strict=True):
            assert torch.equal(mine.exp_avg, before.exp_avg) == (t in ABSENT)
            if bits == 8:
                assert torch.equal(mine.exp_avg_scale, before.exp_avg_scale) == (t in ABSENT)
    for room, before in zip(got.grad_rooms, start.grad_rooms, strict=True):
        assert torch.equal(room.memory, before.memory)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_how_chunks_are_cut_changes_no_bit(backend: str, bits: int) -> None:
    start = problem(bits=bits, coefficient=0.5)
    want = start.copy().step(backend)
    for most in (256, 512, 1280):
        start.copy(most=most).step(backend).assert_equals(want)
    if bits == 32:
        start.copy(most=4096).step(backend).assert_equals(want)
    shuffled = start.copy()
    shuffled.chunks = shuffled.chunks[torch.randperm(len(shuffled.chunks))]
    shuffled.step(backend).assert_equals(want)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", [NATIVE])
def test_the_number_of_threads_changes_no_bit(backend: str, bits: int) -> None:
    start = problem(bits=bits, sizes=(60_000, 1, 50_001, *range(1, 300)), absent=(), blocks=300)
    before, seen = torch.get_num_threads(), []
    try:
        for threads, spare in ((1, 0), (2, 0), (3, 0), (3, 1), (3, 3), (2, 9)):
            torch.set_num_threads(threads)
            seen.append(start.copy().step(backend, spare))
    finally:
        torch.set_num_threads(before)
    for other in seen[1:]:
        other.assert_equals(seen[0])


def by_hand(p: ManyTensors, tensor: int) -> tuple[np.ndarray, list[tuple[np.ndarray, ...]]]:
    """A tensor after a step, and each piece of its state, in numpy's fp32."""
    f = np.float32
    one_minus_beta1, one_minus_beta2, step_size, correction, eps, decay = p.hyper[tensor].numpy()
    grad, before = p.grad(tensor).float().numpy(), p.params[tensor].float().numpy()
    if p.coefficient is not None:
        grad = grad * f(p.coefficient.item())
    after, state, done = np.empty_like(before), [], 0
    for part in p.moments_of(tensor):
        m, v = decoded(part)
        g, weight = grad[done : done + m.size], before[done : done + m.size]
        m = m + one_minus_beta1 * (g - m)
        v = v + one_minus_beta2 * (g * g - v)
        denominator = np.sqrt(v) * correction + eps
        after[done : done + m.size] = weight - (decay * weight + step_size * (m / denominator))
        assert all(x.dtype == f for x in (m, v, denominator))
        state.append((m, v) if p.bits == 32 else (*encoded(m, EXP_AVG_MAP), *encoded(v, EXP_AVG_SQ_MAP)))
        done += m.size
    return after, state


def decoded(part: Moments) -> tuple[np.ndarray, np.ndarray]:
    if part.exp_avg_scale is None or part.exp_avg_sq_scale is None:
        return part.exp_avg.numpy(), part.exp_avg_sq.numpy()
    pairs = ((part.exp_avg, part.exp_avg_scale, EXP_AVG_MAP), (part.exp_avg_sq, part.exp_avg_sq_scale, EXP_AVG_SQ_MAP))
    m, v = (levels.numpy()[c.numpy()] * np.repeat(s.numpy(), 256)[: c.numel()] for c, s, levels in pairs)
    return m, v


def encoded(values: np.ndarray, levels: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """Codes and scales, a block and an element at a time."""
    codes, scales = np.empty(values.size, np.uint8), []
    for start in range(0, values.size, 256):
        block = values[start : start + 256]
        scales.append(np.abs(block).max())
        for i, x in enumerate(block / scales[-1]):
            codes[start + i] = int((midpoints(levels).numpy() < x).sum())
    return codes, np.array(scales, np.float32)


@pytest.mark.parametrize("coefficient", [None, 0.37])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", BACKENDS)
def test_arithmetic_by_hand(backend: str, bits: int, coefficient: float | None) -> None:
    start = problem(bits=bits, sizes=(1, 300, 1000), absent=(), blocks=2, coefficient=coefficient)
    got = start.copy().step(backend)
    for t in range(3):
        parameter, state = by_hand(start, t)
        assert_same_bits(got.params[t], torch.from_numpy(parameter))
        for part, want in zip(got.moments_of(t), state, strict=True):
            order = (0, 1) if bits == 32 else (0, 2, 1, 3)
            for i, values in zip(order, want, strict=True):
                assert_same_bits(part[i], torch.from_numpy(values))  # type: ignore[arg-type]


EXTREMES: list[dict[str, Any]] = [
    {"eps": 0.0},
    {"betas": (0.0, 0.999)},
    {"betas": (0.9, 0.0)},
    {"betas": (0.0, 0.0), "eps": 0.0},
    {"weight_decay": 0.0},
    {"eps": 1e30},
    {"betas": (0.999999, 0.99999999)},
]


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("hyper", EXTREMES, ids=str)
@pytest.mark.parametrize("backend", [NATIVE])
def test_extreme_settings(backend: str, hyper: dict[str, Any], bits: int) -> None:
    start = problem(bits=bits, **hyper)
    start.copy().step(backend).assert_equals(start.copy().step("reference"))


@pytest.mark.parametrize("backend", BACKENDS)
def test_lr_of_zero_changes_the_state_alone(backend: str) -> None:
    start = problem()
    start.hyper = torch.tensor([hyper_row(lr=0.0)] * len(SIZES))
    got = start.copy().step(backend)
    for room, before in zip(got.param_rooms, start.param_rooms, strict=True):
        assert_same_bits(room.memory, before.memory)
    assert not torch.equal(got.state, start.state)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", [NATIVE])
def test_what_is_not_finite_stays_in_its_block(backend: str, dtype: torch.dtype, bits: int, value: float) -> None:
    start = problem(dtype, bits)
    clean = start.copy().step("reference")
    for t, at in ((0, 0), (4, 256), (8, 700)):
        start.grad(t)[at] = value
    start.params[5][9] = value
    got = start.copy().step(backend)
    got.assert_equals(start.copy().step("reference"))
    block = slice(512, 768)
    outside = [t for t in range(len(SIZES)) if t not in (0, 4, 5, 8)]
    for t in outside:
        assert_same_bits(got.param_rooms[t].memory, clean.param_rooms[t].memory)
    mine, theirs = got.params[8], clean.params[8]
    assert not mine[700].isfinite()
    same = mine == theirs
    assert same[: block.start].all()
    assert same[block.stop :].all()
    for part, other in zip(got.moments_of(8), clean.moments_of(8), strict=True):
        assert (part.exp_avg != other.exp_avg).sum() <= (1 if bits == 32 else 256)


@pytest.mark.parametrize("magnitude", [0.0, 1e-45, 3e-42, 1e-38, 3e38])
@pytest.mark.parametrize("backend", [NATIVE])
def test_scales_that_are_zero_subnormal_or_huge(backend: str, magnitude: float) -> None:
    start = problem(bits=8, betas=(0.5, 0.5))
    for t in range(len(SIZES)):
        for part in start.moments_of(t):
            part.exp_avg_scale.fill_(magnitude)  # type: ignore[union-attr]
            part.exp_avg_sq_scale.fill_(magnitude)  # type: ignore[union-attr]
        if t not in start.absent:
            start.grad(t).mul_(min(magnitude, 1.0))
    got = start.copy().step(backend)
    got.assert_equals(start.copy().step("reference"))
    if magnitude == 0:
        for part in got.moments_of(8):
            assert (part.exp_avg == 127).all()
            assert (part.exp_avg_sq == 0).all()
            assert not part.exp_avg_scale.any()  # type: ignore[union-attr]


@pytest.mark.parametrize("backend", [NATIVE])
def test_every_code_and_every_midpoint(backend: str) -> None:
    """Values at every midpoint of both maps, one ulp beside it, and all codes as they are."""
    values = []
    for levels in (EXP_AVG_MAP, EXP_AVG_SQ_MAP):
        exact = torch.cat([midpoints(levels), levels, -midpoints(levels)])
        inf = torch.tensor(torch.inf)
        values += [exact, exact.nextafter(inf), exact.nextafter(-inf)]
    grads = torch.cat(values).clamp(-1, 1)
    blocks = -(-grads.numel() // 255)  # each has a one, so that its scale is 1
    grads = torch.nn.functional.pad(grads, (0, 255 * blocks - grads.numel())).view(-1, 255)
    grads = torch.cat([grads, torch.ones(blocks, 1)], 1).flatten()
    for squared in (False, True):
        start = problem(bits=8, sizes=(grads.numel(),), absent=(), blocks=blocks)
        start.hyper = torch.tensor([[1.0, 1.0, 1e-3, 1.0, 1e-8, 0.0]])  # the moments become g and g^2
        start.grad(0).copy_(grads.abs().sqrt() if squared else grads)
        for part in start.moments_of(0):
            part.exp_avg.copy_(torch.arange(part.exp_avg.numel()) % 256)
            part.exp_avg_sq.copy_(torch.arange(part.exp_avg.numel()) % 256)
        for _ in range(2):
            start.copy().step(backend).assert_equals(start.copy().step("reference"))
            start.hyper[0, :2] = 0.25


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_thousand_steps_are_as_exact_as_torchs(backend: str) -> None:
    """Against torch.optim.AdamW in fp64, the error is no larger than twice that of its fused fp32 kernel."""
    size, settings = 600, {"lr": 3e-3, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    start = randn(size)
    exact, fused = start.double().requires_grad_(), start.clone().requires_grad_()
    optimizers = [torch.optim.AdamW([exact], **settings), torch.optim.AdamW([fused], fused=True, **settings)]  # type: ignore[arg-type]
    ours = problem(sizes=(size,), absent=())
    ours.state.zero_()
    ours.params[0].copy_(start)
    mean, wide = randn(size, seed=5), randn(size, seed=6).abs() * 3
    for step in range(1, 1001):
        grad = (mean + wide * randn(size, seed=100 + step)) * 1e-3
        exact.grad, fused.grad = grad.double(), grad
        for optimizer in optimizers:
            optimizer.step()
        ours.grad(0).copy_(grad)
        ours.hyper = torch.tensor([hyper_row(step, **settings)])  # type: ignore[arg-type]
        ours.step(backend)
    theirs = (fused.double() - exact).abs().max()
    error = (ours.params[0].double() - exact).abs().max()
    assert error <= 2 * theirs, f"{error:.3g}, torch's fused {theirs:.3g}"


def test_no_chunks_and_no_elements() -> None:
    start = problem(sizes=(), absent=())
    assert len(start.chunks) == 0
    for backend in ("reference", *(() if _native.load() else ("native",))):
        start.copy().step(backend)


@needs_native
def test_native_comes_first() -> None:
    assert STEP.choice(*problem().step_args()).backend.name == "native"  # type: ignore[union-attr]


BAD: list[tuple[str, dict[str, Any]]] = [
    ("bits must be one of", {"bits": 16}),
    ("state must be uint8", {"state": torch.zeros(64)}),
    ("state must be uint8", {"state": torch.zeros(8, 8, dtype=torch.uint8)}),
    ("chunks must be int64", {"chunks": torch.zeros(1, 5, dtype=torch.int32)}),
    ("chunks must be int64", {"chunks": torch.zeros(1, 3, dtype=torch.int64)}),
    ("hyper must be fp32", {"hyper": torch.zeros(len(SIZES), 5)}),
    ("hyper must be fp32", {"hyper": torch.zeros(len(SIZES) + 1, 6)}),
    ("hyper must be fp32", {"hyper": torch.zeros(len(SIZES), 6).double()}),
]


@pytest.mark.parametrize(("message", "change"), BAD, ids=range(len(BAD)))
def test_a_bad_call_is_refused(message: str, change: dict[str, Any]) -> None:
    names = ("state", "chunks", "gradients", "hyper", "coefficient", "bits", "page_bytes", "dtype", "spare")
    good = dict(zip(names, problem().step_args(), strict=True))
    with pytest.raises(ValueError, match=f"adamw_step: {message}"):
        adamw_step(**good | change)


ROOM = 4096
BAD_ROWS: list[tuple[str, list[int]]] = [
    ("a tensor of addresses", [2, 0, 4, 0, 0]),
    ("a tensor of addresses", [-1, 0, 4, 0, 0]),
    ("1 to 4096 elements of a tensor", [0, -1, 4, 0, 0]),
    ("1 to 4096 elements of a tensor", [0, 0, 0, 0, 0]),
    ("1 to 4096 elements of a tensor", [0, 0, 4097, 0, 0]),
    ("a page of state", [0, 0, 4, 8, 0]),
    ("a page of state", [0, 0, 4, -16, 0]),
    ("a page of state", [0, 0, 4, 16, 0]),
    ("a page of state", [0, 0, 4, 2**62, 0]),
    ("elements from a block of its page", [0, 0, 4, 0, 8]),
    ("elements from a block of its page", [0, 0, 4, 0, -256]),
    ("elements from a block of its page", [0, 0, 257, 0, ROOM - 256]),
    ("elements from a block of its page", [0, 0, 4, 0, 2**62]),
    ("a tensor of the call's dtype", [1, 0, 4, 0, 0]),
]


@needs_native
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize(("message", "row"), BAD_ROWS, ids=range(len(BAD_ROWS)))
def test_a_table_that_would_write_astray_is_refused(message: str, row: list[int], bits: int) -> None:
    page_bytes = block_bytes(bits) * ROOM // 256
    params = [torch.ones(ROOM), torch.ones(ROOM).half()]
    state = torch.zeros(page_bytes, dtype=torch.uint8)
    many = gradients(params, params)
    good = [0, 0, 4, 0, 0]
    with pytest.raises(RuntimeError, match=f"adamw_step: row 1 of chunks must name {message}"):
        adamw_step(state, torch.tensor([good, row]), many, torch.zeros(2, 6), None, bits, page_bytes, torch.float32)
    assert all((p == 1).all() for p in params)
    assert not state.any()


@needs_native
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("state must be \\[bytes", {0: torch.zeros(2, 4096, dtype=torch.uint8)}),
        ("state must be a contiguous", {0: torch.zeros(2 * 8192, dtype=torch.uint8)[::2]}),
        ("chunks must be int64", {1: torch.zeros(1, 4, dtype=torch.int64)}),
        ("addresses must be int64", {2: torch.zeros(1, 2, dtype=torch.int64)}),
        ("addresses must be of a parameter", {2: torch.tensor([[0, 64, 0]])}),
        ("addresses must be with a dtype's code", {2: torch.tensor([[64, 0, 3]])}),
        ("hyper must be float32", {3: torch.zeros(1, 6).double()}),
        ("hyper must be of as many rows", {3: torch.zeros(2, 6)}),
        ("coefficient must be one float32", {4: torch.zeros(2)}),
        ("coefficient must be one float32", {4: torch.tensor(1.0).double()}),
        ("bits must be 32 or 8", {5: 16}),
        ("page_bytes must be a multiple of 16", {6: 8200}),
        ("page_bytes must be a multiple of 16", {6: 0}),
        ("dtype must be 0, 1 or 2", {7: 3}),
    ],
)
def test_the_library_refuses_what_it_cannot_take(message: str, change: dict[int, Any]) -> None:
    arguments = [torch.zeros(8192, dtype=torch.uint8), torch.tensor([[0, 0, 1, 0, 0]]), torch.zeros(1, 3).long()]
    arguments += [torch.zeros(1, 6), None, 32, 8192, 0, 0]  # type: ignore[list-item]
    torch.ops.peftrt_cpu.adamw_step(*arguments)
    with pytest.raises(RuntimeError, match=f"adamw_step: {message}"):
        torch.ops.peftrt_cpu.adamw_step(*(change.get(i, value) for i, value in enumerate(arguments)))


def test_a_forced_backend_that_is_not_there_is_named() -> None:
    with pytest.raises(peftrt.BackendError, match="adamw_step: no backend can run this call"):
        problem().step("triton")


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("backend", [NATIVE])
def test_sizes_around_a_vector_and_a_block(backend: str, bits: int) -> None:
    sizes = [
        size + extra for size, extra in itertools.product((0, 8, 16, 32, 256, 512), range(-3, 4)) if size + extra > 0
    ]
    for dtype in FLOATS:
        start = problem(dtype, bits, sizes=sizes, absent=(), blocks=7, waste=0)
        start.copy().step(backend).assert_equals(start.copy().step("reference"))


@pytest.mark.parametrize("bits", BITS)
def test_a_page_that_wastes_bytes(bits: int) -> None:
    """Behind what a whole number of blocks takes nothing is read or written."""
    page = torch.arange(block_bytes(bits) * 3 + 48).to(torch.uint8)
    assert moments(page, bits).exp_avg.numel() == 768
