"""lora_linear with factors of its rows, and DoRA's magnitudes, against fp64."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, LAYOUTS, NATIVE, exact, laid_out, nf4, randn
from tests.ops.lora_truth import SCALING, base, combinations, kept, largest, truth, truth_with_gradients
from tests.tolerances import assert_close, assert_same_bits

# rows of x, N, K, R: every path of the kernels, whole groups and others
SHAPES = [((1,), 24, 64, 1), ((3,), 37, 131, 3), ((2, 4), 40, 192, 16), ((9,), 25, 130, 70), ((40,), 33, 320, 256)]


def factors(n: int) -> Tensor:
    return randn(n, seed=8).abs() + 0.5


@pytest.mark.parametrize("p", [0.0, 0.3])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_forward_and_gradients_equal_fp64(kind: str, backend: str, dtype: torch.dtype, p: float) -> None:
    for case, (lead, n, k, r) in enumerate(SHAPES):
        weight = base(kind, n, k, dtype, case)
        x = laid_out(randn(*lead, k, seed=1, dtype=dtype), LAYOUTS[case % 4])
        adapter = FLOATS[case % 3]
        b = randn(n, seed=4, dtype=dtype) if case % 2 else None
        leaves = [x, weight, randn(r, k, seed=2, dtype=adapter), randn(n, r, seed=3, dtype=adapter), b, factors(n)]
        leaves = [leaf.detach().requires_grad_() if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        x, _, lora_A, lora_B, b, scale = leaves
        dy = randn(*lead, n, seed=5, dtype=dtype)
        with peftrt.backend(backend):
            y = ops.lora_linear(
                x, leaves[1], lora_A, lora_B, SCALING, b, dropout_p=p, seed=7 if p else None, row_scale=scale
            )
        wanted = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
        own = dict(zip(wanted, torch.autograd.grad(y, [leaves[i] for i in wanted], dy), strict=True))

        values = [x, exact(weight, dtype), lora_A, lora_B, b, scale]
        expected, grads = truth_with_gradients(values, dy, kept(7, x, p))
        squares, sizes = truth_with_gradients(values, dy, kept(7, x, p), squared=True)
        # over a dense base torch rounds its products before the rest is done to them
        added = (kind, backend) == ("dense", "native")
        assert_close(y, expected, roundings=2 if added else 1, intermediate=largest(squares) * (1.5 if added else 1))
        given = [i for i, value in enumerate(values) if value is not None]
        for i, grad, size in zip(given, grads, sizes, strict=True):
            if i not in own:
                continue
            assert own[i].dtype == leaves[i].dtype
            if i == 5:  # out of y, as it is rounded
                terms = (dy.double() * expected).abs().reshape(-1, n).sum(0) / scale.detach()
                assert_close(own[i], grad, dtype, roundings=2, intermediate=largest(terms.square()))
            else:
                assert_close(own[i], grad, roundings=4 if i < 2 and added else 2, intermediate=largest(size))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [0, *range(1, 10), 17, 513])
@pytest.mark.parametrize("backend", [NATIVE])
def test_every_path_of_the_kernel_rounds_once(backend: str, m: int, dtype: torch.dtype) -> None:
    for case, (n, k) in enumerate(((37, 131), (40, 192))):
        weight, scale = nf4(n, k, nested=bool(case)), factors(n)
        x, bias = randn(m, k, seed=m, dtype=dtype), randn(n, seed=4, dtype=dtype) if case else None
        lora_A, lora_B = randn(5, k, seed=2), randn(n, 5, seed=3)
        with peftrt.backend(backend):
            y = ops.lora_linear(x, weight, lora_A, lora_B, SCALING, bias, row_scale=scale)
        wide = [None if t is None else t.double() for t in (x, exact(weight, dtype), lora_A, lora_B, bias)]
        squares = truth(*[None if t is None else t.square() for t in wide], 1.0, SCALING**2, scale.double().square())  # type: ignore[arg-type]
        assert_close(y, truth(*wide, row_scale=scale.double()), intermediate=largest(squares))  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_factors_of_one_change_no_bit(kind: str, backend: str, dtype: torch.dtype) -> None:
    if (kind, backend) == ("dense", "native") and dtype != torch.float32:
        pytest.skip("torch's product is rounded with its bias where there is no factor")
    weight, ones = base(kind, 24, 128, dtype), torch.ones(24)
    inputs = [randn(*s, seed=i, dtype=d) for i, (s, d) in enumerate(_with_dtypes(dtype))]
    results = []
    for scale in (None, ones):
        leaves = [t.clone().requires_grad_() for t in inputs]
        with peftrt.backend(backend):
            y = ops.lora_linear(leaves[0], weight, *leaves[1:], SCALING, row_scale=scale)
            results.append((y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)))
    for got, want in zip(*results, strict=True):
        assert_same_bits(got, want)


def _with_dtypes(dtype: torch.dtype) -> list[tuple[tuple[int, ...], torch.dtype]]:
    return [((9, 128), dtype), ((4, 128), torch.float32), ((24, 4), torch.float32)]


@pytest.mark.parametrize("p", [0.0, 0.4])
@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_gradients_equal_finite_differences(kind: str, p: float) -> None:
    k, n, r = 33, 3, 2
    weight = base(kind, n, k, torch.float64)
    inputs = [randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(((2, 1, k), (r, k), (n, r), (n,)))]
    inputs += [factors(n).double(), *([weight] if isinstance(weight, Tensor) else [])]
    inputs = [t.requires_grad_() for t in inputs]

    def function(x: Tensor, A: Tensor, B: Tensor, b: Tensor, c: Tensor, w: Tensor | None = None) -> Tensor:
        base = weight if w is None else w
        return ops.lora_linear(x, base, A, B, SCALING, b, dropout_p=p, seed=5 if p else None, row_scale=c)

    assert torch.autograd.gradcheck(function, inputs)
    assert torch.autograd.gradgradcheck(function, inputs, fast_mode=True)


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_gradient_of_a_magnitude_equals_finite_differences(kind: str) -> None:
    """The norm is a constant: what it depends on is held here."""
    weight, (x, A, B) = (
        base(kind, 3, 33, torch.float64),
        (randn(*s, dtype=torch.float64) for s in ((2, 33), (2, 33), (3, 2))),
    )
    m = factors(3).double().requires_grad_()
    assert torch.autograd.gradcheck(lambda m: ops.lora_linear(x, weight, A, B, SCALING, magnitude=m), (m,))


def test_gradient_through_xa_equals_finite_differences() -> None:
    args = weight_args("lora_linear", nf4(3, 33))
    inputs = [randn(*s, seed=i, dtype=torch.float64) for i, s in enumerate(((2, 33), (2, 33), (3, 2)))]
    inputs = [t.requires_grad_() for t in (*inputs, factors(3).double())]

    def function(x: Tensor, A: Tensor, B: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
        y, xa = torch.ops.peftrt.lora_linear(x, *args, A, B, SCALING, None, 0.25, torch.tensor([9]), c, [])
        return y, xa

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck(kind: str, backend: str) -> None:
    weight = weight_args("lora_linear", base(kind, 6, 64, torch.float32))
    for m, grows in itertools.product((0, 3), (True, False)):
        x, A, B, b = (randn(*s).requires_grad_() for s in ((m, 64), (2, 64), (6, 2), (6,)))
        scale = factors(6).requires_grad_(grows)
        with peftrt.backend(backend):
            torch.library.opcheck(
                torch.ops.peftrt.lora_linear.default, (x, *weight, A, B, SCALING, b, 0.0, None, scale, [])
            )


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_opcheck_of_the_backward(kind: str, backend: str) -> None:
    weight = weight_args("lora_linear", base(kind, 6, 64, torch.float32))
    dy, x, xa, A, B = (randn(*s) for s in ((2, 3, 6), (2, 3, 64), (2, 3, 2), (2, 64), (6, 2)))
    args = (dy, x, xa, *weight, A, B, SCALING, 0.5, torch.tensor([3]), factors(6), True, True, True, [])
    with peftrt.backend(backend):
        torch.library.opcheck(torch.ops.peftrt.lora_linear_backward.default, args)


@pytest.mark.parametrize("kind", ["dense", "nested"])
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_gradients_for_a_gradient_are_those_of_the_kernels(kind: str, dtype: torch.dtype) -> None:
    weight = base(kind, 24, 128, dtype)
    inputs = [randn(*s, seed=i, dtype=d).requires_grad_() for i, (s, d) in enumerate(_with_dtypes(dtype))]
    scale = factors(24).requires_grad_()

    def gradients(create_graph: bool) -> tuple[Tensor, ...]:
        y = ops.lora_linear(*inputs[:1], weight, *inputs[1:], SCALING, row_scale=scale)
        return torch.autograd.grad(y.float().square().sum(), (*inputs, scale), create_graph=create_graph)

    for got, want in zip(gradients(False), gradients(True), strict=True):
        assert want.requires_grad
        assert_close(got, want.detach(), dtype, roundings=3, intermediate=want.abs().max().item())


@pytest.mark.parametrize("learns", [True, False])
@pytest.mark.parametrize("kind", ["dense", "plain", "nested"])
def test_saved_are_x_xa_y_and_parameters_alone(kind: str, learns: bool) -> None:
    """y only where the magnitude has a gradient; offloading hooks see every tensor that is kept."""
    weight = base(kind, 24, 64, torch.float32)
    x, A, B, b = (randn(*s).requires_grad_() for s in ((10, 64), (2, 64), (24, 2), (24,)))
    m, seen = factors(24).requires_grad_(learns), []

    def pack(tensor: Tensor) -> Tensor:
        seen.append(tensor)
        return tensor.clone()

    def run() -> Tensor:
        return ops.lora_linear(x, weight, A, B, SCALING, b, dropout_p=0.5, seed=1, magnitude=m)

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y = run()
    known = {t.data_ptr() for t in (x, A, B, b, *weight_args("", weight)[:4]) if isinstance(t, Tensor)}
    others = [t for t in seen if t.data_ptr() not in known]
    # beside xa: c; and for the magnitude's gradient y, and the norms it is divided by
    expected = [(10, 2), (24,), *([(10, 24), (24,)] if learns else [])]
    assert sorted(tuple(t.shape) for t in others if t.is_floating_point()) == sorted(expected)
    assert [t.numel() for t in others if not t.is_floating_point()] == [1]
    wanted = (x, A, B, b, *([m] if learns else []))
    for got, want in zip(torch.autograd.grad(y.sum(), wanted), torch.autograd.grad(run().sum(), wanted), strict=True):
        assert_same_bits(got, want)


def test_a_result_that_is_changed_in_place_gives_no_wrong_gradient() -> None:
    m = factors(24)
    inputs = [randn(10, 64), nf4(24, 64), randn(2, 64).requires_grad_(), randn(24, 2), SCALING]
    ops.lora_linear(*inputs, magnitude=m).relu_().sum().backward()  # y is not kept
    y = ops.lora_linear(*inputs, magnitude=m.requires_grad_()).relu_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_a_magnitude_is_that_over_the_norm(kind: str, backend: str) -> None:
    weight, x, A, B, m = base(kind, 6, 64, torch.float32), randn(3, 64), randn(2, 64), randn(6, 2), factors(6)
    with peftrt.backend(backend):
        y = ops.lora_linear(x, weight, A, B, SCALING, magnitude=m)
    adapted = exact(weight, torch.float32) + SCALING * B.double() @ A.double()
    assert_close(y, x.double() @ (adapted * (m.double() / adapted.norm(dim=1))[:, None]).t(), roundings=2)


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_autocast_takes_the_norm_of_the_weight_as_it_is(kind: str) -> None:
    weight, x, A, B, m = base(kind, 6, 64, torch.float32), randn(3, 64), randn(2, 64), randn(6, 2), factors(6)
    scale = ops.dora_scale(weight, A, B, SCALING, m)
    rounded = weight.bfloat16() if isinstance(weight, Tensor) else weight
    expected = ops.lora_linear(x.bfloat16(), rounded, A, B, SCALING, row_scale=scale)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same_bits(ops.lora_linear(x, weight, A, B, SCALING, magnitude=m), expected)


@pytest.mark.parametrize(("kind", "backend"), combinations())
def test_a_row_of_zeros_and_of_no_magnitude_is_its_bias(kind: str, backend: str) -> None:
    dense = randn(6, 64)
    dense[2] = 0.0
    weight = dense if kind == "dense" else peftrt.NF4Weight.quantize(dense, 64, kind == "nested")
    x, A, B, b, m = (t.requires_grad_() for t in (randn(3, 64), randn(2, 64), torch.zeros(6, 2), randn(6), factors(6)))
    with torch.no_grad():
        m[2] = 0.0
    with peftrt.backend(backend):
        y = ops.lora_linear(x, weight, A, B, SCALING, b, magnitude=m)
        grads = torch.autograd.grad(y.square().sum(), (x, A, B, b, m))
    assert_same_bits(y[:, 2].detach(), b[2].detach().expand(3))
    assert all(grad.isfinite().all() for grad in grads)
    assert grads[-1][2] == 0


@pytest.mark.parametrize("kind", ["dense", "nested"])
def test_compiles_in_one_graph(kind: str) -> None:
    weight = base(kind, 24, 64, torch.float32)
    x, A, B, m = (randn(*s).requires_grad_() for s in ((10, 64), (2, 64), (24, 2), (24,)))

    def run(x: Tensor, A: Tensor, B: Tensor, m: Tensor) -> Tensor:
        return ops.lora_linear(x, weight, A, B, SCALING, magnitude=m)

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    want, got = run(x, A, B, m), compiled(x, A, B, m)
    assert_same_bits(got.detach(), want.detach())
    for a, b in zip(*(torch.autograd.grad(y.square().sum(), (x, A, B, m)) for y in (got, want)), strict=True):
        assert_close(a, b)


X, W, A, B, Y = torch.zeros(2, 64), nf4(6, 64), torch.zeros(3, 64), torch.zeros(6, 3), torch.ones(6)
BAD = {
    "c of another length": ({"row_scale": Y[1:]}, ValueError, r"row_scale must be \[N\] = \[6\]"),
    "c of integers": ({"row_scale": Y.int()}, TypeError, "row_scale must be one of float32"),
    "c elsewhere": ({"row_scale": Y.to("meta")}, ValueError, "row_scale must be on cpu.*on meta"),
    "both": ({"row_scale": Y, "magnitude": Y}, ValueError, "row_scale must be None beside a magnitude"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str) -> None:
    change, error, message = BAD[case]
    with pytest.raises(error, match="lora_linear: " + message):
        ops.lora_linear(X, W, A, B, 1.0, **change)


def test_nan_in_one_factor_stays_in_that_column() -> None:
    scale = factors(24)
    clean = ops.lora_linear(randn(20, 64), nf4(24, 64), randn(3, 64), randn(24, 3), SCALING, row_scale=scale)
    scale[5] = math.nan
    y = ops.lora_linear(randn(20, 64), nf4(24, 64), randn(3, 64), randn(24, 3), SCALING, row_scale=scale)
    assert y[:, 5].isnan().all()
    others = torch.arange(24) != 5
    assert_same_bits(y[:, others], clean[:, others])
