"""ia3_linear against fp64: every base, backend, dtype and side, its gradients, and what it refuses."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import AdapterTable, SlotAdapter, _ia3_linear
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, LAYOUTS, NATIVE, exact, laid_out, nf4, randn
from tests.ops.lora_truth import base, combinations, largest
from tests.tolerances import assert_close, assert_same_bits

# rows of x, N, K: every path of the kernels, whole groups and others
SHAPES = [((1,), 24, 64), ((3,), 37, 131), ((2, 4), 40, 192), ((9,), 25, 130), ((40,), 33, 320)]
# which factors there are: of the inputs, of the outputs
SIDES = [(True, False), (False, True), (True, True), (False, False)]


def factors(size: int, seed: int = 8) -> Tensor:
    return randn(size, seed=seed).abs() + 0.5


def truth(values: list[Tensor | None], dy: Tensor, power: int = 1) -> tuple[Tensor, list[Tensor | None]]:
    """y and the gradients of what is given of x, W, u, c and b, in fp64; of the powers of all."""
    leaves = [None if v is None else v.detach().double().pow(power).requires_grad_() for v in values]
    x, weight, u, c, b = leaves
    assert x is not None
    assert weight is not None
    y = (x if u is None else x * u) @ weight.t()
    y = y if c is None else y * c
    y = y if b is None else y + b
    given = [leaf for leaf in leaves if leaf is not None]
    grads = iter(torch.autograd.grad(y, given, dy.double().pow(power)))
    return y.detach(), [None if leaf is None else next(grads) for leaf in leaves]


@pytest.mark.parametrize("sides", SIDES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_forward_and_gradients_equal_fp64(
    kind: str, backend: str, dtype: torch.dtype, sides: tuple[bool, bool]
) -> None:
    for case, (lead, n, k) in enumerate(SHAPES):
        weight = base(kind, n, k, dtype, case)
        if isinstance(weight, Tensor) and case % 2:
            weight = weight.t().contiguous().t()  # as Conv1D stores it
        x = laid_out(randn(*lead, k, seed=1, dtype=dtype), LAYOUTS[case % 4])
        u, c = (factors(size, seed) if has else None for has, size, seed in zip(sides, (k, n), (8, 9), strict=True))
        b = randn(n, seed=4, dtype=dtype) if case % 2 else None
        leaves = [t.detach().requires_grad_() if isinstance(t, Tensor) else t for t in (x, weight, u, c, b)]
        dy = randn(*lead, n, seed=5, dtype=dtype)
        with peftrt.backend(backend):
            y = ops.ia3_linear(*leaves)
        wanted = [leaf for leaf in leaves if isinstance(leaf, Tensor)]
        grads = iter(torch.autograd.grad(y, wanted, dy))
        own = [next(grads) if isinstance(leaf, Tensor) else None for leaf in leaves]

        values = [x, exact(weight, dtype), u, c, b]
        expected, want = truth(values, dy)
        squares, sizes = truth(values, dy, power=2)
        # u * x is rounded to the dtype of x
        assert_close(y, expected, roundings=2 if sides[0] else 1, intermediate=largest(squares))
        for i, grad in enumerate(own):
            if grad is None:
                continue
            assert grad.dtype == leaves[i].dtype
            if i == 3:  # out of y, as it is rounded
                terms = (dy.double() * expected).abs().reshape(-1, n).sum(0) / c
                assert_close(grad, want[i], dtype, roundings=3, intermediate=largest(terms.square()))
            else:
                assert_close(grad, want[i], dtype, roundings=3, intermediate=largest(sizes[i]))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [0, *range(1, 10), 17, 513])
@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize("backend", [NATIVE])
def test_the_kernels_have_the_bits_of_a_row_of_multi_lora_linear(
    backend: str, kind: str, m: int, dtype: torch.dtype
) -> None:
    for (n, k), sides in itertools.product(((37, 131), (40, 192)), SIDES[:3]):
        weight, x, bias = base(kind, n, k, dtype), randn(m, k, seed=m, dtype=dtype), randn(n, seed=4, dtype=dtype)
        u, c = (factors(size) if has else None for has, size in zip(sides, (k, n), strict=True))
        table = AdapterTable.stack([SlotAdapter(x_scale=u, y_scale=c)], splits=(n,), k=k)
        with peftrt.backend(backend):
            one = ops.ia3_linear(x, weight, u, c, bias)
            assert_same_bits(one, ops.multi_lora_linear(x, weight, table, torch.zeros(m, dtype=torch.int32), bias))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_without_factors_it_is_the_base(kind: str, backend: str, dtype: torch.dtype) -> None:
    weight, x, b = base(kind, 24, 128, dtype), randn(9, 128, dtype=dtype), randn(24, seed=3, dtype=dtype)
    with peftrt.backend(backend):
        plain = ops.ia3_linear(x, weight, bias=b)
        assert_same_bits(ops.ia3_linear(x, weight, torch.ones(128), torch.ones(24), b), plain)
        if isinstance(weight, NF4Weight):
            assert_same_bits(ops.nf4_linear(x, weight, b), plain)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(0, 12),
    n=st.integers(1, 70),
    k=st.integers(1, 140),
    dtype=st.sampled_from(FLOATS),
    layout=st.sampled_from(LAYOUTS),
    kind=st.sampled_from(("dense", "plain", "nested")),
    sides=st.sampled_from(SIDES),
)
def test_any_shape_equals_fp64(
    m: int, n: int, k: int, dtype: torch.dtype, layout: str, kind: str, sides: tuple[bool, bool]
) -> None:
    weight, x = base(kind, n, k, dtype), laid_out(randn(m, k, seed=2, dtype=dtype), layout)
    u, c = (factors(size) if has else None for has, size in zip(sides, (k, n), strict=True))
    values = [x, exact(weight, dtype), u, c, None]
    dy = torch.ones(m, n)
    squares, _ = truth(values, dy, power=2)
    y = ops.ia3_linear(x, weight, u, c)
    assert_close(y, truth(values, dy)[0], roundings=2 if sides[0] else 1, intermediate=largest(squares))


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_gradients_equal_finite_differences(kind: str) -> None:
    k, n = 33, 3
    weight = base(kind, n, k, torch.float64)
    inputs = [randn(2, 1, k, dtype=torch.float64), factors(k).double(), factors(n).double(), randn(n).double()]
    inputs += [weight] if isinstance(weight, Tensor) else []
    inputs = [t.requires_grad_() for t in inputs]

    def function(x: Tensor, u: Tensor, c: Tensor, b: Tensor, w: Tensor | None = None) -> Tensor:
        return ops.ia3_linear(x, weight if w is None else w, u, c, b)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck(kind: str, backend: str) -> None:
    weight = weight_args("ia3_linear", base(kind, 6, 64, torch.float32))
    for m, sides in itertools.product((0, 3), SIDES):
        x, b = randn(m, 64).requires_grad_(), randn(6).requires_grad_()
        u, c = (factors(size).requires_grad_() if has else None for has, size in zip(sides, (64, 6), strict=True))
        with peftrt.backend(backend):
            torch.library.opcheck(torch.ops.peftrt.ia3_linear.default, (x, *weight, u, c, b))


@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_for_a_gradient_are_those_of_the_kernels(kind: str, dtype: torch.dtype) -> None:
    weight = base(kind, 24, 128, dtype)
    inputs = [randn(9, 128, dtype=dtype), factors(128), factors(24)]
    inputs = [t.requires_grad_() for t in inputs]

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        y = ops.ia3_linear(inputs[0], weight, *inputs[1:])
        return torch.autograd.grad(y.float().square().sum(), inputs, create_graph=create_graph)

    for got, want in zip(gradients(False), gradients(True), strict=True):
        assert want.requires_grad
        assert_close(got, want.detach(), dtype, roundings=3, intermediate=want.abs().max().item())


@pytest.mark.parametrize("sides", SIDES)
def test_saved_is_what_a_gradient_needs(sides: tuple[bool, bool]) -> None:
    """x where u learns, y where c does; offloading hooks see every tensor that is kept."""
    weight, x, b = nf4(24, 64), randn(10, 64).requires_grad_(), randn(24)
    u, c = (factors(size).requires_grad_() if has else None for has, size in zip(sides, (64, 24), strict=True))
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ops.ia3_linear(x, weight, u, c, b)
    large = [tuple(t.shape) for t in seen if t.is_floating_point() and t.dim() == 2]
    assert large == [*([(10, 64)] if sides[0] else []), *([(10, 24)] if sides[1] else [])]
    wanted = [t for t in (x, u, c) if t is not None]
    plain = torch.autograd.grad(ops.ia3_linear(x, weight, u, c, b).sum(), wanted)
    for got, want in zip(torch.autograd.grad(y.sum(), wanted), plain, strict=True):
        assert_same_bits(got, want)


def test_a_result_that_is_changed_in_place_gives_no_wrong_gradient() -> None:
    x, weight, c = randn(10, 64).requires_grad_(), nf4(24, 64), factors(24)
    ops.ia3_linear(x, weight, None, c).relu_().sum().backward()  # y is not kept
    y = ops.ia3_linear(x, weight, None, c.requires_grad_()).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_a_weight_in_columns_is_not_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    """fp32 goes to torch, which reads it as it lies; elsewhere the kernel's copy is the faster way."""
    called = []
    run = _ia3_linear._torch_forward
    monkeypatch.setattr(_ia3_linear, "_torch_forward", lambda *args: called.append(args[0].dtype) or run(*args))
    for dtype in FLOATS:
        for weight in (randn(24, 64, dtype=dtype), randn(64, 24, dtype=dtype).t()):
            x, u, c = randn(3, 64, dtype=dtype), factors(64), factors(24)
            y = ops.ia3_linear(x, weight, u, c)
            want, _ = truth([x, weight, u, c, None], y)
            assert_close(y, want, roundings=2, intermediate=20.0)
    assert called == ([torch.float32] if _ia3_linear._native.load() is None else [])


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_compiles_in_one_graph(kind: str) -> None:
    weight = base(kind, 24, 64, torch.float32)
    inputs = [t.requires_grad_() for t in (randn(10, 64), factors(64), factors(24))]

    def run(x: Tensor, u: Tensor, c: Tensor) -> Tensor:
        return ops.ia3_linear(x, weight, u, c)

    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(*inputs), compiled(*inputs)
    assert_same_bits(got.detach(), want.detach())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), inputs) for y in (got, want)), strict=True):
        assert_close(a, b)


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_autocast_takes_x_in_its_dtype_and_factors_as_they_are(kind: str) -> None:
    weight, x, u, c = base(kind, 6, 64, torch.float32), randn(3, 64), factors(64), factors(6)
    rounded = weight.bfloat16() if isinstance(weight, Tensor) else weight
    expected = ops.ia3_linear(x.bfloat16(), rounded, u, c)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(ops.ia3_linear(x, weight, u, c), expected)


def test_a_factor_of_zero_gives_the_bias_and_no_gradient() -> None:
    x, weight, b, c = randn(3, 64).requires_grad_(), nf4(6, 64), randn(6), factors(6)
    c[2] = 0.0
    y = ops.ia3_linear(x, weight, None, c.requires_grad_(), b)
    dx, dc = torch.autograd.grad(y.square().sum(), (x, c))
    assert_same_bits(y[:, 2].detach(), b[2].expand(3))
    assert dx.isfinite().all()
    assert dc[2] == 0
    assert (dc != 0).sum() == 5


def test_a_row_does_not_depend_on_the_others() -> None:
    weight, x, u, c = nf4(24, 128), randn(8, 128), factors(128), factors(24)
    clean = ops.ia3_linear(x, weight, u, c)
    x[5] = math.nan
    y = ops.ia3_linear(x, weight, u, c)
    others = torch.arange(8) != 5
    assert y[5].isnan().all()
    assert_same_bits(y[others], clean[others])
    with ops.batch_invariant():
        clean = ops.ia3_linear(x, weight, u, c)
        assert_same_bits(ops.ia3_linear(x[others], weight, u, c), clean[others])
        assert_same_bits(ops.ia3_linear(x[:1], weight, u, c), clean[:1])


X, W, U, C = torch.zeros(2, 64), nf4(6, 64), torch.ones(64), torch.ones(6)
BAD = {
    "u too long": ({"x_scale": torch.ones(65)}, ValueError, r"x_scale must be \[K\] = \[64\]"),
    "u too short": ({"x_scale": U[1:]}, ValueError, r"x_scale must be \[K\] = \[64\]"),
    "u of integers": ({"x_scale": U.int()}, TypeError, "x_scale must be one of float32"),
    "u elsewhere": ({"x_scale": U.to("meta")}, ValueError, "x_scale must be on cpu.*on meta"),
    "u as peft has it": ({"x_scale": U[None]}, ValueError, r"x_scale must be \[K\] = \[64\]"),
    "c too long": ({"y_scale": torch.ones(7)}, ValueError, r"y_scale must be \[N\] = \[6\]"),
    "c of integers": ({"y_scale": C.int()}, TypeError, "y_scale must be one of float32"),
    "c elsewhere": ({"y_scale": C.to("meta")}, ValueError, "y_scale must be on cpu.*on meta"),
    "both too long": (
        {"x_scale": torch.ones(65), "y_scale": torch.ones(7)},
        ValueError,
        r"x_scale must be \[K\] = \[64\]",
    ),
    "bias of another dtype": ({"bias": C.half()}, TypeError, "bias must be of x's dtype"),
    "bias too long": ({"bias": torch.ones(7), "y_scale": C}, ValueError, r"bias must be \[N\] = \[6\]"),
    "x of another width": ({"x": torch.zeros(2, 63)}, ValueError, r"x must be \[..., K = 64\]"),
}


@pytest.mark.parametrize("weight", [W, torch.zeros(6, 64), torch.zeros(64, 6).t()], ids=["nf4", "dense", "columns"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str, weight: Tensor | NF4Weight) -> None:
    change, error, message = BAD[case]
    call = {"x": X, "weight": weight, **change}
    with pytest.raises(error, match="ia3_linear: " + message):
        ops.ia3_linear(**call)


def test_a_dense_weight_of_another_dtype_is_named() -> None:
    with pytest.raises(TypeError, match="ia3_linear: weight must be of x's dtype"):
        ops.ia3_linear(X, torch.zeros(6, 64, dtype=torch.bfloat16))
    with pytest.raises(TypeError, match="ia3_linear: weight must be a Tensor or an NF4Weight, got str"):
        ops.ia3_linear(X, "weight")  # type: ignore[arg-type]
