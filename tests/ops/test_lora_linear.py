"""lora_linear against fp64, for every backend, dense and NF4."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.ops._weight import weight_args
from peftrt.reference.dropout import keep_mask
from tests.cases import BACKENDS, FLOATS, LAYOUTS, NATIVE, exact, laid_out, nf4, randn
from tests.ops.lora_truth import SCALING, base, combinations, kept, largest, truth, truth_with_gradients
from tests.tolerances import assert_close, assert_same_bits

sizes = st.one_of(st.integers(1, 50), st.sampled_from([64, 127, 130]))
leads = st.one_of(st.tuples(), st.tuples(st.integers(0, 20)), st.tuples(st.integers(0, 3), st.integers(1, 5)))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
@given(
    lead=leads,
    n=sizes,
    k=sizes,
    r=st.integers(1, 20),
    adapter=st.sampled_from(FLOATS),
    bias=st.booleans(),
    p=st.sampled_from([0.0, 0.0, 0.3]),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_forward_and_gradients_equal_fp64(
    kind: str,
    backend: str,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    n: int,
    k: int,
    r: int,
    adapter: torch.dtype,
    bias: bool,
    p: float,
    layout: str,
    seed: int,
) -> None:
    weight = base(kind, n, k, dtype, seed)
    x = laid_out(randn(*lead, k, seed=seed + 1, dtype=dtype), layout).detach().requires_grad_()
    lora_A, lora_B = (randn(*s, seed=seed + 2, dtype=adapter).requires_grad_() for s in ((r, k), (n, r)))
    b = randn(n, seed=seed + 3, dtype=dtype).requires_grad_() if bias else None
    if isinstance(weight, Tensor):
        weight.requires_grad_()
    dy = randn(*lead, n, seed=seed + 4, dtype=dtype)
    with peftrt.backend(backend):
        y = ops.lora_linear(x, weight, lora_A, lora_B, SCALING, b, dropout_p=p, seed=seed if p else None)
    assert y.dtype == dtype

    values = [x, exact(weight, dtype), lora_A, lora_B, b]
    expected, grads = truth_with_gradients(values, dy, kept(seed, x, p))
    squares, grad_squares = truth_with_gradients(values, dy, kept(seed, x, p), squared=True)
    # over a dense base torch's product is rounded before the adapter's share is added, and that is a rounding too
    added = (kind, backend) == ("dense", "native")
    assert_close(y, expected, roundings=2 if added else 1, intermediate=largest(squares))

    leaves = [x, weight, lora_A, lora_B, b]
    wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
    own = torch.autograd.grad(y, [leaves[i] for i in wanted], dy)
    for grad, i in zip(own, wanted, strict=True):
        assert grad.dtype == leaves[i].dtype
        assert_close(grad, grads[i], roundings=3 if i == 0 and added else 1, intermediate=largest(grad_squares[i]))


ROWS = [0, *range(1, 10), 16, 17, 40, 513]


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("backend", [NATIVE])
def test_every_path_of_the_kernel_equals_fp64(backend: str, m: int, dtype: torch.dtype, p: float) -> None:
    """y, rounded once, and ``drop(x) A^T``; ranks below and above a vector, a panel and N."""
    for case, (r, (n, k)) in enumerate(itertools.product((1, 3, 8, 16, 64, 300), ((37, 131), (40, 192)))):
        weight, adapter = nf4(n, k, nested=case % 3 == 0), dtype if case % 2 else torch.float32
        x = laid_out(randn(m, k, seed=m, dtype=dtype), ("contiguous", "strided", "transposed")[case % 3])
        lora_A, lora_B = randn(r, k, seed=2, dtype=adapter), laid_out(randn(n, r, dtype=adapter), LAYOUTS[case % 4])
        bias = randn(n, seed=4, dtype=dtype) if case % 4 < 2 else None
        seed = torch.tensor([case]) if p else None
        with peftrt.backend(backend):
            y, xa = torch.ops.peftrt.lora_linear(
                x, *weight_args("lora_linear", weight), lora_A, lora_B, SCALING, bias, p, seed, None, []
            )
        assert_same_bits(y, ops.lora_linear(x, weight, lora_A, lora_B, SCALING, bias, dropout_p=p, seed=case))
        keep = kept(case, x, p)
        wide = [None if t is None else t.double() for t in (x, exact(weight, dtype), lora_A, lora_B, bias)]
        squares = truth(*[None if t is None else t.square() for t in wide], keep.square(), SCALING**2)  # type: ignore[arg-type]
        assert_close(y, truth(*wide, keep), intermediate=largest(squares))  # type: ignore[arg-type]
        assert_close(xa, (x.double() * keep) @ lora_A.double().t())


@pytest.mark.parametrize("backend", [NATIVE])
@pytest.mark.parametrize("m", [1, 4, 8, 9, 16, 40])
def test_a_row_does_not_depend_on_its_neighbours(m: int, backend: str) -> None:
    for k in (131, 192):
        weight, x, A, B = nf4(37, k), randn(m, k), randn(20, k), randn(37, 20)
        others = torch.arange(m) != m // 2
        with peftrt.backend(backend):
            y = ops.lora_linear(x, weight, A, B, SCALING)
            x[others] = math.nan
            assert_same_bits(ops.lora_linear(x, weight, A, B, SCALING)[m // 2], y[m // 2])


def test_adapters_in_fp64_are_computed_in_fp32() -> None:
    weight, x, A, B = nf4(6, 64), randn(3, 64), randn(2, 64), randn(6, 2)
    assert_same_bits(
        ops.lora_linear(x, weight, A.double(), B.double(), SCALING), ops.lora_linear(x, weight, A, B, SCALING)
    )


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_fp64_stays_in_fp64_without_gradients(kind: str) -> None:
    weight, x, A, B = base(kind, 6, 64, torch.float64), randn(3, 64, dtype=torch.float64), randn(2, 64), randn(6, 2)
    y = ops.lora_linear(x, weight, A, B, SCALING)
    assert_close(y, truth(x, exact(weight, torch.float64), A.double(), B.double()))


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_autocast_without_gradients_leaves_the_sums_in_fp32(kind: str) -> None:
    weight, x, A, B = base(kind, 6, 64, torch.bfloat16), randn(3, 64), randn(2, 64), randn(6, 2)
    expected = ops.lora_linear(x.bfloat16(), weight, A, B, SCALING)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        assert_same_bits(ops.lora_linear(x, weight, A, B, SCALING), expected)


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_gradients_equal_finite_differences(kind: str, p: float) -> None:
    k, n, r = 33, 3, 2
    weight = base(kind, n, k, torch.float64)
    shapes = {"x": (2, 1, k), "A": (r, k), "B": (n, r), "b": (n,)}
    inputs = [randn(*shape, seed=i, dtype=torch.float64).requires_grad_() for i, shape in enumerate(shapes.values())]
    if isinstance(weight, Tensor):
        inputs.append(weight.requires_grad_())

    def function(x: Tensor, A: Tensor, B: Tensor, b: Tensor, w: Tensor | None = None) -> Tensor:
        return ops.lora_linear(x, weight if w is None else w, A, B, SCALING, b, dropout_p=p, seed=5 if p else None)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


def test_gradient_through_xa_equals_finite_differences() -> None:
    """The op's second result, ``drop(x) A^T``, is differentiable too."""
    args = weight_args("lora_linear", nf4(3, 33))
    inputs = [randn(*s, seed=i, dtype=torch.float64).requires_grad_() for i, s in enumerate(((2, 33), (2, 33), (3, 2)))]

    def function(x: Tensor, A: Tensor, B: Tensor) -> tuple[Tensor, Tensor]:
        y, xa = torch.ops.peftrt.lora_linear(x, *args, A, B, SCALING, None, 0.25, torch.tensor([9]), None, [])
        return y, xa

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck(kind: str, backend: str, p: float) -> None:
    weight = weight_args("lora_linear", base(kind, 6, 64, torch.float32))
    seed = torch.tensor([3]) if p else None
    for m in (0, 3):
        x, A, B, b = (randn(*s).requires_grad_() for s in ((m, 64), (2, 64), (6, 2), (6,)))
        with peftrt.backend(backend):
            torch.library.opcheck(
                torch.ops.peftrt.lora_linear.default, (x, *weight, A, B, SCALING, b, p, seed, None, [])
            )


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_gradients_for_a_gradient_are_those_of_the_kernels(kind: str, p: float, dtype: torch.dtype) -> None:
    """Where a second gradient may follow, the first is made of operations that have one."""
    weight = base(kind, 24, 128, dtype)
    inputs = [randn(*s, seed=i, dtype=d).requires_grad_() for i, (s, d) in enumerate(_with_dtypes(dtype))]

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        y = ops.lora_linear(*inputs[:1], weight, *inputs[1:], SCALING, dropout_p=p, seed=4 if p else None)
        return torch.autograd.grad(y.float().square().sum(), inputs, create_graph=create_graph)

    for got, want in zip(gradients(False), gradients(True), strict=True):
        assert want.requires_grad
        assert_close(got, want.detach(), roundings=3, intermediate=want.abs().max().item())


def _with_dtypes(dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((9, 128), dtype), ((4, 128), torch.float32), ((24, 4), torch.float32)]


@pytest.mark.parametrize("backend", [NATIVE])
def test_gradients_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    weight, x, A, B = nf4(640, 320), randn(70, 320), randn(20, 320), randn(640, 20)
    inputs = [t.requires_grad_() for t in (x, A, B)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with peftrt.backend(backend):
                y = ops.lora_linear(x, weight, A, B, SCALING, dropout_p=0.2, seed=1)
                results.append(torch.autograd.grad(y.sin().sum(), inputs))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
def test_kept_between_passes_is_drop_x_a_in_fp32(backend: str, dtype: torch.dtype) -> None:
    weight, x, A, B = nf4(6, 64), randn(5, 64, dtype=dtype), randn(3, 64), randn(6, 3)
    with peftrt.backend(backend):
        xa = torch.ops.peftrt.lora_linear(
            x, *weight_args("lora_linear", weight), A, B, SCALING, None, 0.3, torch.tensor([7]), None, []
        )[1]
    assert xa.dtype == torch.float32
    dropped = x.double() * keep_mask(torch.tensor([7]), 5, 64, 0.3) / 0.7
    assert_close(xa, dropped @ A.double().t())


@pytest.mark.parametrize("p", [0.0, 0.5])
@pytest.mark.parametrize("kind", ["dense", "plain", "nested"])
def test_saved_are_x_xa_and_parameters_alone(kind: str, p: float) -> None:
    """Nothing of the size of y or of W is kept for the backward, and offloading hooks see every tensor that is."""
    weight = base(kind, 24, 64, torch.float32)
    args = weight_args("lora_linear", weight)
    x, A, B, b = (randn(*s).requires_grad_() for s in ((10, 64), (2, 64), (24, 2), (24,)))
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ops.lora_linear(x, weight, A, B, SCALING, b, dropout_p=p, seed=1 if p else None)
    known = {t.data_ptr() for t in (x, A, B, *args[:4]) if isinstance(t, Tensor)}
    others = [t for t in seen if t.data_ptr() not in known]
    assert [t.shape for t in others if t.is_floating_point()] == [(10, 2)]
    assert [t.numel() for t in others if not t.is_floating_point()] == ([1] if p else [])
    offloaded = torch.autograd.grad(y.sum(), (x, A, B, b))
    plain = ops.lora_linear(x, weight, A, B, SCALING, b, dropout_p=p, seed=1 if p else None)
    for got, want in zip(offloaded, torch.autograd.grad(plain.sum(), (x, A, B, b)), strict=True):
        assert_same_bits(got, want)


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_nan_in_one_row_stays_in_that_row(kind: str, backend: str) -> None:
    weight = base(kind, 16, 64, torch.float32)
    x, A, B = randn(6, 64), randn(4, 64), randn(16, 4)
    others = [0, 1, 2, 4, 5]
    with peftrt.backend(backend):
        clean = ops.lora_linear(x, weight, A, B, SCALING)
        x[3, 0] = math.nan
        y = ops.lora_linear(x, weight, A, B, SCALING)
    assert y[3].isnan().all()
    assert_same_bits(y[others], clean[others])


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_zero_b_adds_exactly_nothing(kind: str, backend: str) -> None:
    weight = base(kind, 16, 64, torch.float32)
    x, A, b = randn(6, 64), randn(4, 64), randn(16)
    with peftrt.backend(backend):
        y = ops.lora_linear(x, weight, A, torch.zeros(16, 4), SCALING, b)
        assert_same_bits(y, ops.lora_linear(x, weight, A * 9, torch.zeros(16, 4), 3 * SCALING, b))
    assert_close(y, x.double() @ exact(weight, x.dtype).t() + b)


def test_dropout_mask_is_its_seeds_and_only_the_adapters_input_is_dropped() -> None:
    weight, x, A, B = nf4(16, 64), randn(6, 64), randn(4, 64), randn(16, 4)

    def run(p: float, seed: int | Tensor | None) -> Tensor:
        return ops.lora_linear(x, weight, A, B, SCALING, dropout_p=p, seed=seed)

    assert_same_bits(run(0.5, 3), run(0.5, 3))
    assert_same_bits(run(0.5, 3), run(0.5, torch.tensor([3])))
    assert not torch.equal(run(0.5, 3), run(0.5, 4))
    wide = [t.double() for t in (x, weight.dequantize(), A, B)]
    assert_close(run(0.5, 3), truth(*wide, None, kept(3, x, 0.5)))
    assert_same_bits(run(0.0, None), run(0.0, 3))


def test_default_seed_is_drawn_from_torchs_generator() -> None:
    weight, x, A, B = nf4(16, 64), randn(6, 64), randn(4, 64), randn(16, 4)
    torch.manual_seed(1)
    first, second = (ops.lora_linear(x, weight, A, B, SCALING, dropout_p=0.5) for _ in range(2))
    torch.manual_seed(1)
    again = ops.lora_linear(x, weight, A, B, SCALING, dropout_p=0.5)
    assert_same_bits(first, again)
    assert not torch.equal(first, second)


def test_without_dropout_torchs_generator_is_left_alone() -> None:
    state = torch.get_rng_state()
    ops.lora_linear(randn(2, 64), nf4(4, 64), randn(2, 64), randn(4, 2), 1.0)
    assert torch.equal(torch.get_rng_state(), state)


X, W, A, B = torch.zeros(2, 64), nf4(6, 64), torch.zeros(3, 64), torch.zeros(6, 3)
GOOD: dict[str, Any] = {"x": X, "weight": W, "lora_A": A, "lora_B": B, "scaling": 1.0}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "A of another width": ({"lora_A": A[:, 1:]}, ValueError, r"lora_A must be \[R, K = 64\], got float32 \[3, 63\]"),
    "A flat": ({"lora_A": A[0]}, ValueError, r"lora_A must be \[R, K = 64\], got float32 \[64\]"),
    "A of integers": ({"lora_A": A.int()}, TypeError, r"lora_A must be one of float32.*got int32"),
    "A elsewhere": ({"lora_A": A.to("meta")}, ValueError, r"lora_A must be on cpu.*on meta"),
    "B of another rank": (
        {"lora_B": B[:, :2]},
        ValueError,
        r"lora_B must be \[N, R\] = \[6, 3\].*got float32 \[6, 2\]",
    ),
    "B transposed": ({"lora_B": B.t()}, ValueError, r"lora_B must be \[N, R\] = \[6, 3\].*got float32 \[3, 6\]"),
    "B of integers": ({"lora_B": B.int()}, TypeError, r"lora_B must be one of float32.*got int32"),
    "B elsewhere": ({"lora_B": B.to("meta")}, ValueError, r"lora_B must be on cpu.*on meta"),
    "x of another width": ({"x": X[:, 1:]}, ValueError, r"x must be \[\.\.\., K = 64\].*got float32 \[2, 63\]"),
    "x of integers": ({"x": X.int()}, TypeError, r"x must be one of float32.*got int32"),
    "bias of another length": ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[N\] = \[6\], got float32 \[5\]"),
    "bias of another dtype": ({"bias": torch.zeros(6).half()}, TypeError, r"bias must be of x's dtype.*got float16"),
    "dense of another dtype": (
        {"weight": torch.zeros(6, 64).half()},
        TypeError,
        r"weight must be of x's dtype torch.float32, got float16",
    ),
    "dense of three dimensions": ({"weight": torch.zeros(6, 64, 1)}, ValueError, r"weight must be a matrix \[N, K\]"),
    "dense elsewhere": ({"weight": torch.zeros(6, 64, device="meta")}, ValueError, "weight must be on cpu.*on meta"),
    "not a weight": ({"weight": [[0.0]]}, TypeError, "weight must be a Tensor or an NF4Weight, got list"),
    "p of 1": ({"dropout_p": 1.0}, ValueError, r"dropout_p must be in \[0, 1\), got 1\.0"),
    "p negative": ({"dropout_p": -0.1}, ValueError, r"dropout_p must be in \[0, 1\), got -0\.1"),
    "p NaN": ({"dropout_p": math.nan}, ValueError, r"dropout_p must be in \[0, 1\), got nan"),
    "seed of floats": (
        {"dropout_p": 0.1, "seed": torch.zeros(1)},
        ValueError,
        r"seed must be int64 \[1\].*got float32 \[1\]",
    ),
    "two seeds": (
        {"dropout_p": 0.1, "seed": torch.zeros(2, dtype=torch.int64)},
        ValueError,
        r"seed must be int64 \[1\].*got int64 \[2\]",
    ),
    "seed elsewhere": (
        {"dropout_p": 0.1, "seed": torch.zeros(1, dtype=torch.int64, device="meta")},
        ValueError,
        "seed must be on cpu.*on meta",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match="lora_linear: " + message):
        ops.lora_linear(**{**GOOD, **change})


def test_the_good_arguments_pass() -> None:
    assert ops.lora_linear(**GOOD).shape == (2, 6)
