"""bottleneck against fp64, for every backend and activation."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

import peftrt
from peftrt import ops
from tests.cases import BACKENDS, FLOATS, LAYOUTS, NATIVE, laid_out, randn
from tests.tolerances import assert_close, assert_same_bits

SCALING = 0.75
ACTIVATIONS = {
    "relu": torch.relu,
    "gelu": functional.gelu,
    "gelu_new": lambda v: functional.gelu(v, approximate="tanh"),
    "silu": functional.silu,
    "tanh": torch.tanh,
    "sigmoid": torch.sigmoid,
    "leaky_relu": lambda v: functional.leaky_relu(v, 0.01),
}
# a few rows, tiles of them, a group of a thread's, and groups: every path of the kernels
ROWS = [0, 1, 3, 8, 9, 16, 17, 40, 140, 330]
NAMES = ("x", "residual", "down_weight", "down_bias", "up_weight", "up_bias")

sizes = st.one_of(st.integers(1, 50), st.sampled_from([64, 127, 130]))
leads = st.one_of(st.tuples(), st.tuples(st.integers(0, 20)), st.tuples(st.integers(0, 3), st.integers(1, 5)))


def operands(lead: tuple[int, ...], k: int, r: int, dtype: torch.dtype, adapter: torch.dtype, seed: int = 0) -> Any:
    shapes = ((*lead, k), (*lead, k), (r, k), (r,), (k, r), (k,))
    dtypes = (dtype, dtype, *[adapter] * 4)
    factors = (1, 1, max(k, 1) ** -0.5, 1, max(r, 1) ** -0.5, 1)
    drawn = zip(shapes, dtypes, factors, strict=True)
    return [(randn(*s, seed=seed + i) * f).to(d) for i, (s, d, f) in enumerate(drawn)]


class Truth(NamedTuple):
    """A result, and the magnitude of its sum where nothing cancels."""

    value: Tensor
    size: float


def truths(
    inputs: list[Tensor], inner: Tensor, dy: Tensor, activation: str, scaling: float = SCALING
) -> dict[str, Truth]:
    """Of what was computed of ``inner``, and of inner itself, whose own error is not the next result's."""
    x, residual, down, down_bias, up, up_bias = (t.detach().double() for t in inputs)
    m, (k, r) = math.prod(x.shape[:-1]), up.shape
    x, residual, dy = x.reshape(m, k), residual.reshape(m, k), dy.double().reshape(m, k)
    leaf = inner.detach().double().reshape(m, r).requires_grad_()
    h = ACTIVATIONS[activation](leaf)
    (slope,) = torch.autograd.grad(h.sum(), leaf)
    h, g = h.detach(), scaling * (dy @ up) * slope
    g2 = scaling**2 * (dy.square() @ up.square()) * slope.square()
    pairs = {
        "inner": (x @ down.t() + down_bias, x.square() @ down.square().t() + down_bias.square()),
        "y": (
            residual + scaling * (h @ up.t() + up_bias),
            residual.square() + scaling**2 * (h.square() @ up.square().t() + up_bias.square()),
        ),
        "x": (g @ down, g2 @ down.square()),
        "residual": (dy, dy.square()),
        "down_weight": (g.t() @ x, g2.t() @ x.square()),
        "down_bias": (g.sum(0), g2.sum(0)),
        "up_weight": (scaling * dy.t() @ h, scaling**2 * dy.square().t() @ h.square()),
        "up_bias": (scaling * dy.sum(0), scaling**2 * dy.square().sum(0)),
    }
    shapes = dict(zip(NAMES, (t.shape for t in inputs), strict=True)) | {"inner": inner.shape, "y": inputs[0].shape}
    return {
        name: Truth(value.reshape(shapes[name]), squares.max().sqrt().item() if squares.numel() else 0.0)
        for name, (value, squares) in pairs.items()
    }


def check(inputs: list[Tensor], activation: str) -> None:
    """y, inner and all gradients of a call, each rounded once."""
    leaves = [t.detach().requires_grad_() for t in inputs]
    y, inner = torch.ops.peftrt.bottleneck(*(t.detach() for t in inputs), SCALING, activation)
    own = ops.bottleneck(*leaves, SCALING, activation)
    assert_same_bits(own.detach(), y)
    dy = randn(*y.shape, seed=77, dtype=y.dtype)
    expected = truths(inputs, inner, dy, activation)
    got = dict(zip(NAMES, torch.autograd.grad(own, leaves, dy), strict=True)) | {"y": y, "inner": inner}
    assert inner.dtype == torch.float32
    for name, truth in expected.items():
        if name in NAMES:
            assert got[name].dtype == inputs[NAMES.index(name)].dtype
        assert_close(got[name], truth.value, intermediate=truth.size)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", BACKENDS)
@given(
    lead=leads,
    k=sizes,
    r=st.integers(1, 40),
    adapter=st.sampled_from(FLOATS),
    activation=st.sampled_from(sorted(ACTIVATIONS)),
    layout=st.sampled_from(LAYOUTS),
    other=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
)
def test_results_and_gradients_equal_fp64(
    backend: str,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    k: int,
    r: int,
    adapter: torch.dtype,
    activation: str,
    layout: str,
    other: str,
    seed: int,
) -> None:
    x, residual, down, down_bias, up, up_bias = operands(lead, k, r, dtype, adapter, seed)
    inputs = [laid_out(x, layout), laid_out(residual, other), laid_out(down, other), down_bias, laid_out(up, layout)]
    with peftrt.backend(backend):
        check([*inputs, up_bias], activation)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", ROWS)
@pytest.mark.parametrize("backend", [NATIVE])
def test_every_path_of_the_kernels_equals_fp64(backend: str, m: int, dtype: torch.dtype) -> None:
    """Ranks below and above a vector, a panel and a panel's depth."""
    for case, (r, k) in enumerate(((1, 131), (48, 64), (300, 33), (16, 300))):
        activation = list(ACTIVATIONS)[(case + m) % 7]
        inputs = operands((m,), k, r, dtype, FLOATS[(case + m) % 3], seed=m)
        with peftrt.backend(backend):
            check([laid_out(t, LAYOUTS[(case + i) % 4]) for i, t in enumerate(inputs)], activation)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("m", "k", "r"), [(3, 0, 4), (3, 5, 0), (0, 5, 0), (1, 1, 1), (20, 5, 0), (20, 0, 4)])
def test_sizes_of_zero_and_one(m: int, k: int, r: int, backend: str) -> None:
    with peftrt.backend(backend):
        check(operands((m,), k, r, torch.float32, torch.float32), "gelu")


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_those_of_torch(activation: str) -> None:
    """Over their whole range, infinities and NaN included, in every backend: D, U and s are 1, the rest is 0."""
    values = torch.cat([torch.linspace(-30, 30, 3001), torch.tensor([math.inf, -math.inf, math.nan, 0.0, 1e30, -1e4])])
    x, one, zero = values[:, None], torch.ones(1, 1), torch.zeros(1)
    expected = ACTIVATIONS[activation](values.double())
    (slope,) = torch.autograd.grad(ACTIVATIONS[activation](leaf := values.double().requires_grad_()).sum(), leaf)
    for name in (b.values[0] if hasattr(b, "values") else b for b in BACKENDS):
        if name == "native" and ops._bottleneck._native.load() is not None:
            continue
        with peftrt.backend(name):
            leaf = x.clone().requires_grad_()
            y = ops.bottleneck(leaf, torch.zeros_like(x), one, zero, one, zero, 1.0, activation)
            (dx,) = torch.autograd.grad(y.sum(), leaf)
        finite = values.abs() <= 1e4  # beyond, fp32 and fp64 overflow at different places
        assert_close(y[finite, 0], expected[finite], intermediate=2.0)
        assert_close(dx[finite, 0], slope[finite], intermediate=2.0)
        assert torch.equal(y[~finite, 0].isnan(), ACTIVATIONS[activation](values[~finite]).isnan())
        assert torch.equal(y[~finite, 0].isposinf(), expected[~finite].isposinf())


@pytest.mark.parametrize("backend", BACKENDS)
def test_swish_is_silu(backend: str) -> None:
    inputs = operands((5,), 12, 3, torch.float32, torch.float32)
    with peftrt.backend(backend):
        assert_same_bits(ops.bottleneck(*inputs, activation="swish"), ops.bottleneck(*inputs, activation="silu"))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [1, 12, 300])
@pytest.mark.parametrize("backend", BACKENDS)
def test_the_residual_may_be_x_itself(backend: str, m: int, dtype: torch.dtype) -> None:
    x, _, *adapter = operands((m,), 40, 6, dtype, torch.float32)
    with peftrt.backend(backend):
        leaf, x2, residual = (x.clone().requires_grad_() for _ in range(3))
        y = ops.bottleneck(leaf, leaf, *adapter, SCALING, "gelu")
        assert_same_bits(y.detach(), ops.bottleneck(x2, residual, *adapter, SCALING, "gelu").detach())
        dy = randn(m, 40, seed=5, dtype=dtype)
        (dx,) = torch.autograd.grad(y, leaf, dy)
        parts = torch.autograd.grad(ops.bottleneck(x2, residual, *adapter, SCALING, "gelu"), (x2, residual), dy)
    assert_same_bits(dx, parts[0] + parts[1])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("m", [1, 6, 30, 300])
def test_nan_in_one_row_stays_in_that_row(m: int, backend: str) -> None:
    inputs = operands((m,), 70, 9, torch.float32, torch.float32)
    others = torch.arange(m) != m // 2
    with peftrt.backend(backend):
        clean = ops.bottleneck(*inputs, SCALING, "gelu")
        inputs[0][m // 2, 0] = math.nan
        y = ops.bottleneck(*inputs, SCALING, "gelu")
    assert y[m // 2].isnan().all()
    assert_same_bits(y[others], clean[others])


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("backend", [NATIVE])
def test_a_rows_bits_do_not_depend_on_other_rows_nor_on_threads(backend: str, dtype: torch.dtype) -> None:
    """In a batch of few, of some and of many rows; those of the last two are the same."""
    x, residual, *adapter = operands((700,), 96, 20, dtype, torch.float32)
    before, results = torch.get_num_threads(), {}
    try:
        for threads, invariant in itertools.product((1, 2, 3), (False, True)):
            torch.set_num_threads(threads)
            with peftrt.backend(backend), ops._invariant.set_invariant(invariant):
                for m in (1, 2, 8, 9, 40, 290, 700):
                    y = ops.bottleneck(x[700 - m :], residual[700 - m :], *adapter, SCALING, "gelu")
                    results[threads, invariant, m] = y[m - 1]
    finally:
        torch.set_num_threads(before)
    of_few = results[1, False, 1]
    of_many = results[1, True, 1]
    for (_, invariant, m), row in results.items():
        assert_same_bits(row, of_few if m <= 8 and not invariant else of_many)


@pytest.mark.parametrize("backend", [NATIVE])
def test_gradients_of_parameters_do_not_depend_on_the_number_of_threads(backend: str) -> None:
    inputs = [t.requires_grad_() for t in operands((700,), 320, 20, torch.float32, torch.float32)]
    results, before = [], torch.get_num_threads()
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            with peftrt.backend(backend):
                y = ops.bottleneck(*inputs, SCALING, "silu")
                results.append(torch.autograd.grad(y.sin().sum(), inputs[2:]))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        for got, want in zip(other, results[0], strict=True):
            assert_same_bits(got, want)


def test_adapters_in_fp64_are_computed_in_fp32() -> None:
    inputs = operands((3,), 20, 4, torch.float32, torch.float32)
    wide = [*inputs[:2], *(t.double() for t in inputs[2:])]
    assert_same_bits(ops.bottleneck(*wide, SCALING, "gelu"), ops.bottleneck(*inputs, SCALING, "gelu"))
    leaves = [t.requires_grad_() for t in wide[2:]]
    grads = torch.autograd.grad(ops.bottleneck(*wide[:2], *leaves, SCALING, "gelu").sum(), leaves)
    assert [grad.dtype for grad in grads] == [torch.float64] * 4


def test_fp64_is_computed_in_fp64() -> None:
    inputs = operands((3,), 20, 4, torch.float64, torch.float64)
    inner = inputs[0] @ inputs[2].t() + inputs[3]
    assert_close(ops.bottleneck(*inputs, SCALING, "gelu"), truths(inputs, inner, inputs[0], "gelu")["y"].value)


@pytest.mark.parametrize("recorded", [False, True])
def test_under_autocast_y_has_the_dtype_of_torchs_sum(recorded: bool) -> None:
    """A residual stream in fp32 stays one, and is not rounded on the way."""
    x, residual, *adapter = operands((4,), 20, 4, torch.float32, torch.float32)
    adapter = [t.requires_grad_(recorded) for t in adapter]
    for given_dtype in (torch.float32, torch.bfloat16):
        for x_dtype in (torch.float32, torch.bfloat16):
            wide, narrow = residual.to(given_dtype), x.to(x_dtype)
            want = ops.bottleneck(narrow.to(given_dtype), wide, *adapter, SCALING, "gelu")
            with torch.autocast("cpu", dtype=torch.bfloat16):
                y = ops.bottleneck(narrow, wide, *adapter, SCALING, "gelu")
                torchs = wide + functional.linear(narrow, adapter[0]) @ adapter[0]
            assert y.dtype == torchs.dtype
            assert_same_bits(y.detach(), want.detach())


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_gradients_equal_finite_differences(activation: str) -> None:
    inputs = [t.requires_grad_() for t in operands((2, 3), 7, 4, torch.float64, torch.float64)]

    def function(*tensors: Tensor) -> Tensor:
        return ops.bottleneck(*tensors, SCALING, activation)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)
    # and through x D^T + b_d, the operation's second result
    both = lambda *tensors: torch.ops.peftrt.bottleneck(*tensors, SCALING, activation)  # noqa: E731
    assert torch.autograd.gradcheck(both, inputs)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("same", [False, True])
def test_opcheck(same: bool, backend: str) -> None:
    for m in (0, 3):
        x, residual, *adapter = (t.requires_grad_() for t in operands((m,), 12, 4, torch.float32, torch.float32))
        call = (x, x if same else residual, *adapter, SCALING, "gelu")
        with peftrt.backend(backend):
            torch.library.opcheck(torch.ops.peftrt.bottleneck.default, call)
            dy, inner = randn(m, 12), randn(m, 4)
            backward = (dy, x.detach(), inner, adapter[0].detach(), adapter[2].detach(), SCALING, "gelu")
            for wanted in itertools.product((False, True), repeat=3):
                torch.library.opcheck(torch.ops.peftrt.bottleneck_backward.default, (*backward, *wanted))


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_gradient_that_is_not_wanted_is_none(backend: str) -> None:
    for wanted in range(6):
        inputs = operands((5,), 12, 4, torch.float32, torch.float32)
        inputs[wanted].requires_grad_()
        with peftrt.backend(backend):
            y = ops.bottleneck(*inputs, SCALING, "gelu")
            y.sum().backward()
            every = [t.detach().requires_grad_() for t in inputs]
            all_of = torch.autograd.grad(ops.bottleneck(*every, SCALING, "gelu").sum(), every)
        assert_same_bits(inputs[wanted].grad, all_of[wanted])
        assert all(t.grad is None for i, t in enumerate(inputs) if i != wanted)


def test_saved_are_x_inner_and_the_two_weights_alone() -> None:
    inputs = [t.requires_grad_() for t in operands((10,), 64, 3, torch.float32, torch.float32)]
    seen: list[Tensor] = []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = ops.bottleneck(*inputs, SCALING, "gelu")
    known = {inputs[i].data_ptr() for i in (0, 2, 4)}
    assert [t.shape for t in seen if t.data_ptr() not in known] == [(10, 3)]
    offloaded = torch.autograd.grad(y.sum(), inputs)
    plain = torch.autograd.grad(ops.bottleneck(*inputs, SCALING, "gelu").sum(), inputs)
    for got, want in zip(offloaded, plain, strict=True):
        assert_same_bits(got, want)


X, D, U = torch.zeros(2, 8), torch.zeros(3, 8), torch.zeros(8, 3)
GOOD: dict[str, Any] = {
    "x": X,
    "residual": X,
    "down_weight": D,
    "down_bias": torch.zeros(3),
    "up_weight": U,
    "up_bias": torch.zeros(8),
}
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "x of integers": ({"x": X.int()}, TypeError, r"x must be one of float32.*got int32"),
    "x of no dimension": ({"x": torch.zeros(())}, ValueError, r"x must be \[\.\.\., K\], got float32 \[\]"),
    "x of another width": ({"x": X[:, 1:]}, ValueError, r"down_weight must be \[R, K = 7\], got float32 \[3, 8\]"),
    "residual of another shape": (
        {"residual": X[:1]},
        ValueError,
        r"residual must be \[2, 8\], of x's shape.*\[1, 8\]",
    ),
    "residual of another dtype": ({"residual": X.half()}, TypeError, r"residual must be of x's dtype torch.float32"),
    "residual elsewhere": ({"residual": X.to("meta")}, ValueError, r"residual must be on cpu.*on meta"),
    "D flat": ({"down_weight": D[0]}, ValueError, r"down_weight must be \[R, K = 8\], got float32 \[8\]"),
    "D of integers": ({"down_weight": D.int()}, TypeError, r"down_weight must be one of float32.*got int32"),
    "D elsewhere": ({"down_weight": D.to("meta")}, ValueError, r"down_weight must be on cpu.*on meta"),
    "U transposed": ({"up_weight": U.t()}, ValueError, r"up_weight must be \[K, R\] = \[8, 3\], got float32 \[3, 8\]"),
    "U of integers": ({"up_weight": U.int()}, TypeError, r"up_weight must be one of float32.*got int32"),
    "b_d of another size": (
        {"down_bias": torch.zeros(4)},
        ValueError,
        r"down_bias must be \[R\] = \[3\], got float32 \[4\]",
    ),
    "b_d a column": ({"down_bias": torch.zeros(3, 1)}, ValueError, r"down_bias must be \[R\] = \[3\]"),
    "b_d of integers": ({"down_bias": torch.zeros(3).int()}, TypeError, r"down_bias must be one of float32"),
    "b_u of another size": (
        {"up_bias": torch.zeros(3)},
        ValueError,
        r"up_bias must be \[K\] = \[8\], got float32 \[3\]",
    ),
    "b_u elsewhere": ({"up_bias": torch.zeros(8, device="meta")}, ValueError, r"up_bias must be on cpu.*on meta"),
    "no such activation": ({"activation": "mish"}, ValueError, r"activation must be one of relu, gelu,.*got 'mish'"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match="bottleneck: " + message):
        ops.bottleneck(**{**GOOD, **change})


def test_the_good_arguments_pass() -> None:
    assert ops.bottleneck(**GOOD).shape == (2, 8)


def test_a_bad_gradient_is_named() -> None:
    backward = torch.ops.peftrt.bottleneck_backward
    rest = (D, U, SCALING, "gelu", True, True, True)
    with pytest.raises(
        ValueError, match=r"bottleneck_backward: dy must be torch.float32 \[2, 8\], got float32 \[2, 7\]"
    ):
        backward(X[:, 1:], X, torch.zeros(2, 3), *rest)
    with pytest.raises(ValueError, match=r"bottleneck_backward: inner must be torch.float32 \[2, 3\], got float16"):
        backward(X, X, torch.zeros(2, 3).half(), *rest)
