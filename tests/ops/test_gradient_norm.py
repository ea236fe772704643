"""gradient_norm: the same bits by every backend, against math.fsum, in the order that is promised."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import peftrt
from peftrt.ops import _native
from peftrt.ops._addresses import CHUNK
from peftrt.ops._gradient_norm import NORM, gradient_norm
from tests.cases import BACKENDS, FLOATS, NATIVE, randn
from tests.ops.many_tensors import chunks_of, gradients, guarded
from tests.tolerances import assert_same_bits

SIZES = (1, 7, 255, 256, 257, 1024, 4096, 5000, 1, 12345, 1023)
needs_native = pytest.mark.skipif(_native.load() is not None, reason="the native library is not built")


def many(dtypes: Sequence[torch.dtype] = FLOATS, sizes: Sequence[int] = SIZES) -> list[Tensor]:
    """Gradients at odd addresses, of these dtypes in turn."""
    return [
        guarded(randn(size, seed=t, dtype=dtypes[t % len(dtypes)]) * 10 ** (t % 3), t % 5, t).inner
        for t, size in enumerate(sizes)
    ]


def norm(
    grads: Sequence[Tensor | None],
    backend: str,
    max_norm: float = 1.0,
    chunks: Tensor | None = None,
    like: Sequence[Tensor] | None = None,
) -> Tensor:
    """Norm and coefficient."""
    params = list(like) if like is not None else [torch.empty_like(g) for g in grads if g is not None]
    chunks = chunks_of([p.numel() for p in params]) if chunks is None else chunks
    partials, out = torch.full((len(chunks),), torch.nan, dtype=torch.float64), torch.full((4,), torch.nan)
    with peftrt.backend(backend):
        gradient_norm(gradients(params, grads), chunks, partials, max_norm, out[1:3])
    assert out[[0, 3]].isnan().all()
    return out[1:3]


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e9, math.inf])
@pytest.mark.parametrize("dtypes", [*([dtype] for dtype in FLOATS), FLOATS], ids=str)
@pytest.mark.parametrize("backend", [NATIVE])
def test_native_writes_the_references_bits(backend: str, dtypes: Sequence[torch.dtype], max_norm: float) -> None:
    grads = many(dtypes)
    for most in (CHUNK, 1000, 256, 77):
        chunks = chunks_of(SIZES, most)
        partials = [torch.full((len(chunks),), torch.nan, dtype=torch.float64) for _ in range(2)]
        outs = [torch.full((2,), torch.nan) for _ in range(2)]
        for name, memory, out in zip((backend, "reference"), partials, outs, strict=True):
            with peftrt.backend(name):
                gradient_norm(gradients(grads, grads), chunks, memory, max_norm, out)
        assert_same_bits(partials[0], partials[1])
        assert_same_bits(outs[0], outs[1])


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_equals_an_exact_sum(backend: str) -> None:
    grads = many()
    exact = math.sqrt(math.fsum(x * x for g in grads for x in g.double().tolist()))
    for max_norm in (0.5, exact * 2):
        got = norm(grads, backend, max_norm)
        assert got[0].item() == np.float32(exact)
        assert got[1].item() == np.float32(min(1.0, max_norm / (exact + 1e-6)))


def by_lanes(values: np.ndarray, lanes: int) -> float:
    """What the docstring promises, an addition at a time."""
    total = [0.0] * lanes
    for i, value in enumerate(values.tolist()):
        total[i % lanes] += value
    while len(total) > 1:
        half = len(total) // 2
        total = [a + b for a, b in zip(total[:half], total[half:], strict=True)]
    return total[0]


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_order_is_the_one_promised(backend: str) -> None:
    """With magnitudes so far apart that any other order gives other bits."""
    size, most = 300_000, 256
    grad = randn(size) * 10 ** (4 * randn(size, seed=1))
    chunks = chunks_of([size], most)
    partials, out = torch.full((len(chunks),), torch.nan, dtype=torch.float64), torch.empty(2)
    wide = chunks_of([size], CHUNK)
    of_wide, other = torch.full((len(wide),), torch.nan, dtype=torch.float64), torch.empty(2)
    with peftrt.backend(backend):
        gradient_norm(gradients([grad], [grad]), chunks, partials, 1.0, out)
        gradient_norm(gradients([grad], [grad]), wide, of_wide, 1.0, other)
    squares = grad.double().square().numpy()
    assert partials.tolist() == [by_lanes(squares[i : i + most], 256) for i in range(0, size, most)]
    assert of_wide.tolist() == [by_lanes(squares[i : i + CHUNK], 256) for i in range(0, size, CHUNK)]
    for sums, result in ((partials, out), (of_wide, other)):
        assert result[0].item() == np.float32(math.sqrt(by_lanes(sums.numpy(), 1024)))
    # the test sees an order: summed one after the other, the chunks differ
    assert of_wide.tolist() != [sum(squares[i : i + CHUNK].tolist()) for i in range(0, size, CHUNK)]


@pytest.mark.parametrize("backend", [NATIVE])
def test_the_number_of_threads_changes_no_bit(backend: str) -> None:
    grads = many(sizes=(200_000, *range(1, 200), 100_001))
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            seen.append(norm(grads, backend))
    finally:
        torch.set_num_threads(before)
    assert_same_bits(seen[1], seen[0])
    assert_same_bits(seen[2], seen[0])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_one_nan_is_enough(backend: str, dtype: torch.dtype) -> None:
    for at in (0, 255, 4096, 12344):
        grads = many([dtype])
        grads[9][at] = torch.nan
        assert norm(grads, backend).isnan().all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_an_infinity_makes_the_norm_infinite(backend: str) -> None:
    for value in (math.inf, -math.inf):
        grads = many()
        grads[4][3] = value
        assert norm(grads, backend).tolist() == [math.inf, 0.0]
        got = norm(grads, backend, math.inf)
        assert got[0] == math.inf
        assert got[1].isnan()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_largest_and_the_smallest_numbers(backend: str) -> None:
    largest = torch.full((4096,), 3e38)
    assert norm([largest], backend).tolist() == [math.inf, np.float32(1 / (math.sqrt(4096) * 3e38)).item()]
    tiny = torch.full((4096,), 1e-45)
    assert norm([tiny], backend)[0].item() == np.float32(64 * tiny[0].item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_is_clipped_by_an_infinite_bound(backend: str) -> None:
    assert norm(many(), backend, math.inf)[1] == 1
    assert norm([torch.zeros(9)], backend, math.inf).tolist() == [0, 1]
    assert norm([torch.zeros(9)], backend, 1e-3).tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_what_has_no_gradient_counts_as_zero(backend: str) -> None:
    params = many()
    grads: list[Tensor | None] = list(params)
    grads[2] = grads[9] = None
    zeros = [torch.zeros_like(p) if g is None else p for p, g in zip(params, grads, strict=True)]
    assert_same_bits(norm(grads, backend, like=params), norm(zeros, backend))
    assert norm([None], backend, like=params[:1]).tolist() == [0, 1]
    assert norm([], backend, like=[]).tolist() == [0, 1]


@pytest.mark.parametrize("backend", BACKENDS)
def test_it_clips_as_torch_does(backend: str) -> None:
    grads = many([torch.float32])
    for max_norm in (0.1, 1e6):
        parameters = [torch.nn.Parameter(torch.empty_like(g)) for g in grads]
        for parameter, grad in zip(parameters, grads, strict=True):
            parameter.grad = grad.clone()
        total = torch.nn.utils.clip_grad_norm_(parameters, max_norm)
        got = norm(grads, backend, max_norm)
        assert got[0].item() == pytest.approx(total.item(), rel=1e-6)
        for parameter, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(grad * got[1], parameter.grad, rtol=1e-6, atol=0)


@needs_native
def test_native_comes_first() -> None:
    grads = many()
    arguments = (gradients(grads, grads), chunks_of(SIZES), torch.empty(len(chunks_of(SIZES))).double(), 1.0)
    assert NORM.choice(*arguments, torch.empty(2)).backend.name == "native"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("chunks must be int64", {"chunks": torch.zeros(1, 3)}),
        ("chunks must be int64", {"chunks": torch.zeros(1, 5, dtype=torch.int64)}),
        ("partials must be fp64", {"partials": torch.zeros(1)}),
        ("partials must be fp64", {"partials": torch.zeros(2).double()}),
        ("out must be fp32", {"out": torch.zeros(3)}),
        ("out must be fp32", {"out": torch.zeros(2).double()}),
        ("max_norm must be above 0", {"max_norm": 0.0}),
        ("max_norm must be above 0", {"max_norm": math.nan}),
    ],
)
def test_a_bad_call_is_refused(message: str, change: dict[str, Any]) -> None:
    good = {"chunks": torch.tensor([[0, 0, 4]]), "partials": torch.zeros(1).double(), "max_norm": 1.0}
    good |= {"out": torch.zeros(2)} | change
    with pytest.raises(ValueError, match=f"gradient_norm: {message}"):
        gradient_norm(gradients([torch.ones(4)], [torch.ones(4)]), **good)


@needs_native
@pytest.mark.parametrize(
    ("message", "change"),
    [
        ("row 0 of chunks must name a tensor", {1: torch.tensor([[1, 0, 4]])}),
        ("row 0 of chunks must name a tensor", {1: torch.tensor([[-1, 0, 4]])}),
        ("row 0 of chunks must name 1 to 4096 elements", {1: torch.tensor([[0, 0, 4097]])}),
        ("row 0 of chunks must name 1 to 4096 elements", {1: torch.tensor([[0, 0, 0]])}),
        ("row 0 of chunks must name 1 to 4096 elements", {1: torch.tensor([[0, -4, 4]])}),
        ("addresses must be int64", {0: torch.zeros(1, 2, dtype=torch.int64)}),
        ("addresses must be with a dtype's code", {0: torch.tensor([[64, 0, 7]])}),
        ("partials must be float64", {2: torch.zeros(1)}),
        ("partials must be float64", {2: torch.zeros(2).double()}),
        ("out must be float32", {4: torch.zeros(3)}),
        ("max_norm must be above 0", {3: -1.0}),
    ],
)
def test_the_library_refuses_what_it_cannot_take(message: str, change: dict[int, Any]) -> None:
    arguments: list[Any] = [torch.zeros(1, 3).long(), torch.tensor([[0, 0, 4]]), torch.zeros(1).double(), 1.0]
    arguments.append(torch.zeros(2))
    torch.ops.peftrt_cpu.gradient_norm(*arguments)
    with pytest.raises(RuntimeError, match=f"gradient_norm: {message}"):
        torch.ops.peftrt_cpu.gradient_norm(*(change.get(i, value) for i, value in enumerate(arguments)))
