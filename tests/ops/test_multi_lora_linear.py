"""multi_lora_linear against a loop over the rows in fp64."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.ops import AdapterTable
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, LAYOUTS, exact, laid_out, nf4, randn
from tests.tolerances import assert_close, assert_same_bits

Adapters = list[tuple[Tensor, Tensor, float]]


def ids(*values: int) -> Tensor:
    return torch.tensor(values, dtype=torch.int32)


def adapters(
    ranks: list[int], n: int, k: int, seed: int = 0, dtype: torch.dtype = torch.float32, grad: bool = False
) -> Adapters:
    return [
        (
            randn(r, k, seed=seed + 2 * e, dtype=dtype).requires_grad_(grad),
            randn(n, r, seed=seed + 2 * e + 1, dtype=dtype).requires_grad_(grad),
            0.5 + e,
        )
        for e, r in enumerate(ranks)
    ]


def by_row(x: Tensor, weight: Tensor | None, loras: Adapters, slot_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """One row after the other, each with matrices of its own."""
    flat = x.double().reshape(-1, x.shape[-1])
    n = loras[0][1].shape[0]
    rows = []
    for i, slot in enumerate(slot_ids.tolist()):
        row = flat.new_zeros(n) if weight is None else weight @ flat[i]
        if slot >= 0:
            lora_A, lora_B, scaling = loras[slot]
            row = row + scaling * (lora_B.double() @ (lora_A.double() @ flat[i]))
        rows.append(row if bias is None else row + bias.double())
    return (torch.stack(rows) if rows else flat.new_zeros(0, n)).view(*x.shape[:-1], n)


def base(kind: str, n: int, k: int, dtype: torch.dtype, seed: int = 1) -> Tensor | NF4Weight | None:
    if kind == "none":
        return None
    return nf4(n, k, seed=seed) if kind == "nf4" else randn(n, k, seed=seed, dtype=dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
@given(
    lead=st.one_of(st.tuples(), st.tuples(st.integers(0, 12)), st.tuples(st.integers(0, 3), st.integers(1, 4))),
    n=st.one_of(st.integers(1, 40), st.just(65)),
    k=st.one_of(st.integers(1, 40), st.just(130)),
    ranks=st.lists(st.integers(1, 9), min_size=1, max_size=4),
    adapter=st.sampled_from(FLOATS),
    bias=st.booleans(),
    layout=st.sampled_from(LAYOUTS),
    seed=st.integers(0, 2**20),
    data=st.data(),
)
def test_every_row_and_gradient_equals_its_own(
    kind: str,
    dtype: torch.dtype,
    lead: tuple[int, ...],
    n: int,
    k: int,
    ranks: list[int],
    adapter: torch.dtype,
    bias: bool,
    layout: str,
    seed: int,
    data: Any,
) -> None:
    m = math.prod(lead)
    slot_ids = ids(*data.draw(st.lists(st.integers(-1, len(ranks) - 1), min_size=m, max_size=m)))
    x = laid_out(randn(*lead, k, seed=seed, dtype=dtype), layout).detach().requires_grad_()
    weight = base(kind, n, k, dtype, seed)
    loras = adapters(ranks, n, k, seed, adapter, grad=True)
    b = randn(n, seed=seed, dtype=dtype).requires_grad_() if bias else None
    matrices = [t for lora_A, lora_B, _ in loras for t in (lora_A, lora_B)]
    leaves = [x, *matrices, *([] if b is None else [b])]
    y = ops.multi_lora_linear(x, weight, AdapterTable.stack(loras), slot_ids, b)
    dy = randn(*lead, n, seed=seed + 9, dtype=dtype)
    grads = torch.autograd.grad(y, leaves, dy)

    wide = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide_loras = [(wide[1 + 2 * e], wide[2 + 2 * e], s) for e, (_, _, s) in enumerate(loras)]
    dense = None if weight is None else exact(weight, dtype)
    expected = by_row(wide[0], dense, wide_loras, slot_ids, wide[-1] if bias else None)
    assert y.dtype == dtype
    assert_close(y, expected, intermediate=_terms(x, dense, loras))
    # an adapter that no row uses has a gradient of zeros
    wanted = torch.autograd.grad((expected * dy).sum() + sum(0 * leaf.sum() for leaf in wide), wide)
    for i, (leaf, grad, want) in enumerate(zip(leaves, grads, wanted, strict=True)):
        assert grad.dtype == leaf.dtype
        size = _terms(dy, None if dense is None else dense.t(), [(B.t(), A.t(), s) for A, B, s in loras])
        assert_close(grad, want, roundings=3 if i == 0 else 1, intermediate=size if i == 0 else _sum_size(x, dy, loras))


def _terms(x: Tensor, weight: Tensor | None, loras: Adapters) -> float:
    """Magnitude of the sums that a result is made of if nothing cancels."""
    flat = x.detach().double().reshape(-1, x.shape[-1]).pow(2)
    total = 0.0
    if flat.numel():
        total = 0.0 if weight is None else (flat @ weight.detach().pow(2).t()).max().item()
        for lora_A, lora_B, s in loras:
            squares = flat @ lora_A.detach().double().pow(2).t() @ lora_B.detach().double().pow(2).t()
            total += s * s * squares.max().item()
    return math.sqrt(total)


def _sum_size(x: Tensor, dy: Tensor, loras: Adapters) -> float:
    """The same for dA and dB: sums over the rows of an element of x A^T or dY B times one of dY or x."""
    if not x.numel():
        return 0.0
    xs, dys = (t.detach().double().reshape(-1, t.shape[-1]).pow(2) for t in (x, dy))
    size = 0.0
    for lora_A, lora_B, s in loras:
        A, B = lora_A.detach().double().pow(2), lora_B.detach().double().pow(2)
        size = max(size, s * s * ((dys @ B).t() @ xs).max().item(), s * s * (dys.t() @ (xs @ A.t())).max().item())
    return math.sqrt(size)


@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
def test_gradients_equal_finite_differences(kind: str) -> None:
    n, k = 3, 33
    weight = base(kind, n, k, torch.float64)
    loras = adapters([1, 3, 2], n, k, dtype=torch.float64)
    slots = ids(2, -1, 0, 2)
    x, b = (randn(*s, dtype=torch.float64).requires_grad_() for s in ((4, k), (n,)))
    inputs = [x, b, *(t.requires_grad_() for lora_A, lora_B, _ in loras for t in (lora_A, lora_B))]
    if isinstance(weight, Tensor):
        inputs.append(weight.requires_grad_())

    def function(x: Tensor, b: Tensor, *rest: Tensor) -> Tensor:
        matrices, own = (rest[:-1], rest[-1]) if kind == "dense" else (rest, weight)
        table = AdapterTable.stack([(matrices[2 * e], matrices[2 * e + 1], s) for e, (_, _, s) in enumerate(loras)])
        return ops.multi_lora_linear(x, own, table, slots, b)

    assert torch.autograd.gradcheck(function, inputs)


@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
def test_opcheck(kind: str) -> None:
    weight = base(kind, 6, 64, torch.float32)
    args = (None, None, None, None, 6, 64, 0) if weight is None else weight_args("multi_lora_linear", weight)
    table = AdapterTable.stack(adapters([2, 3], 6, 64))
    for slots in ((), (0, 1, -1, 1)):
        A, B = table.A.detach().requires_grad_(), table.B.detach().requires_grad_()
        rest = (A, B, table.ranks, table.offsets, table.scaling, ids(*slots))
        x, dy, b = (randn(*s).requires_grad_() for s in ((len(slots), 64), (len(slots), 6), (6,)))
        torch.library.opcheck(torch.ops.peftrt.multi_lora_linear.default, (x, *args, *rest, b))
        tests = ("test_schema", "test_faketensor")  # it has no gradient of its own
        plain = [t.detach() for t in (dy, x, *rest)]
        torch.library.opcheck(torch.ops.peftrt.multi_lora_linear_backward.default, plain, test_utils=tests)


def test_a_second_gradient_is_refused_not_wrong() -> None:
    loras = adapters([2], 3, 8, grad=True)
    x = randn(2, 8).requires_grad_()
    y = ops.multi_lora_linear(x, None, AdapterTable.stack(loras), ids(0, 0))
    with pytest.raises((RuntimeError, UserWarning)):
        torch.autograd.grad(torch.autograd.grad(y.sum(), x, create_graph=True)[0].sum(), x)


@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
def test_without_an_adapter_a_row_is_the_bases(kind: str) -> None:
    weight, x, b = base(kind, 16, 64, torch.float32), randn(5, 64), randn(16)
    table = AdapterTable.stack(adapters([4, 2], 16, 64))
    y = ops.multi_lora_linear(x, weight, table, ids(-1, -1, -1, -1, -1), b)
    dense = torch.zeros(16, 64) if weight is None else exact(weight, x.dtype)
    assert_close(y, x.double() @ dense.double().t() + b)
    assert_same_bits(ops.multi_lora_linear(x, weight, table, ids(0, -1, 1, 0, -1), b)[[1, 4]], y[[1, 4]])


def test_one_slot_equals_lora_linear() -> None:
    weight, x, b = nf4(16, 64), randn(5, 64), randn(16)
    ((lora_A, lora_B, s),) = loras = adapters([4], 16, 64)
    y = ops.multi_lora_linear(x, weight, AdapterTable.stack(loras), ids(0, 0, 0, 0, 0), b)
    with peftrt.backend("reference"):
        assert_close(y, ops.lora_linear(x, weight, lora_A, lora_B, s, b))


@pytest.mark.parametrize("lead", [(0,), (2, 0), (0, 3)], ids=str)
@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
def test_empty_batch(kind: str, lead: tuple[int, ...]) -> None:
    loras = adapters([4, 2], 16, 64, grad=True)
    x = randn(*lead, 64).requires_grad_()
    y = ops.multi_lora_linear(x, base(kind, 16, 64, torch.float32), AdapterTable.stack(loras), ids())
    assert y.shape == (*lead, 16)
    y.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert all(grad is not None and (grad == 0).all() for A, B, _ in loras for grad in (A.grad, B.grad))


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_nan_in_one_row_stays_in_that_row(bad: float) -> None:
    weight, x, dy = nf4(16, 64), randn(6, 64), randn(6, 16)
    table, slots, others = AdapterTable.stack(adapters([4, 2], 16, 64)), ids(0, 1, 0, 1, -1, 0), [0, 1, 3, 4, 5]

    def run() -> tuple[Tensor, Tensor]:
        leaf = x.clone().requires_grad_()
        y = ops.multi_lora_linear(leaf, weight, table, slots)
        return y.detach(), torch.autograd.grad(y, leaf, dy)[0]

    clean, clean_dx = run()
    x[2, 3], dy[2, 3] = bad, bad
    y, dx = run()
    assert not y[2].isfinite().any()
    assert not dx[2].isfinite().any()
    assert_same_bits(y[others], clean[others])
    assert_same_bits(dx[others], clean_dx[others])


def test_nan_in_an_adapter_stays_in_its_rows() -> None:
    loras = adapters([4, 2], 16, 64)
    loras[1][0][0, 0] = math.nan
    y = ops.multi_lora_linear(randn(4, 64), nf4(16, 64), AdapterTable.stack(loras), ids(0, 1, -1, 1))
    assert y.isnan().all(1).tolist() == [False, True, False, True]
    assert y[[0, 2]].isfinite().all()


def test_twice_gives_the_same_bits() -> None:
    x, weight, table = randn(9, 64), nf4(16, 64), AdapterTable.stack(adapters([4, 2], 16, 64))
    first, second = (ops.multi_lora_linear(x, weight, table, ids(0, 1, 1, 0, -1, 0, 1, 1, 0)) for _ in range(2))
    assert_same_bits(first, second)


def test_slots_may_share_rows_of_the_table() -> None:
    """Two scalings of one adapter: its gradient is the sum of both slots'."""
    ((lora_A, lora_B, _),) = adapters([3], 5, 8)
    A, B = lora_A.clone().requires_grad_(), lora_B.t().clone().requires_grad_()
    table = AdapterTable(A, B, ids(3, 3), ids(0, 0), torch.tensor([0.5, 2.0]))
    x = randn(3, 8)
    y = ops.multi_lora_linear(x, None, table, ids(0, 1, 1))
    y.sum().backward()
    wide_A, wide_B = (t.double().requires_grad_() for t in (lora_A, lora_B))
    expected = by_row(x, None, [(wide_A, wide_B, 0.5), (wide_A, wide_B, 2.0)], ids(0, 1, 1))
    expected.sum().backward()
    assert_close(y, expected)
    assert_close(A.grad, wide_A.grad)
    assert_close(B.grad, wide_B.grad.t())


def test_stack_lays_mixed_ranks_one_below_the_other() -> None:
    loras = adapters([4, 1, 3], 16, 64)
    table = AdapterTable.stack(loras)
    assert (table.ranks.tolist(), table.offsets.tolist()) == ([4, 1, 3], [0, 4, 5])
    assert (table.ranks.dtype, table.offsets.dtype, table.scaling.dtype) == (torch.int32, torch.int32, torch.float32)
    assert table.scaling.tolist() == [0.5, 1.5, 2.5]
    for (lora_A, lora_B, _), start, r in zip(loras, table.offsets.tolist(), table.ranks.tolist(), strict=True):
        assert_same_bits(table.A[start : start + r], lora_A)
        assert_same_bits(table.B[start : start + r], lora_B.t())


def test_stack_refuses_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="AdapterTable: needs at least one adapter"):
        AdapterTable.stack([])
    good = adapters([2], 16, 64)[0]
    with pytest.raises(ValueError, match=r"AdapterTable: adapter 1: .*got \[2, 64\] and \[2, 16\]"):
        AdapterTable.stack([good, (good[0], good[1].t(), 1.0)])


@pytest.mark.parametrize("slots", [(0, 2), (-2, 0), (2**31 - 1, 0), (-(2**31), 0)])
def test_a_slot_id_out_of_range_is_refused(slots: tuple[int, int]) -> None:
    table = AdapterTable.stack(adapters([2, 2], 6, 64))
    with pytest.raises(
        ValueError, match=rf"multi_lora_linear: slot_ids must be in -1 ... 1, got {min(slots)} ... {max(slots)}"
    ):
        ops.multi_lora_linear(torch.zeros(2, 64), nf4(6, 64), table, ids(*slots))


@pytest.mark.parametrize(
    ("ranks", "offsets"), [((2, 3), (0, 2)), ((-1, 2), (0, 2)), ((2, 2), (0, -1)), ((2, 2**31 - 1), (0, 1))]
)
def test_a_table_that_points_outside_of_itself_is_refused(ranks: tuple[int, ...], offsets: tuple[int, ...]) -> None:
    table = AdapterTable(torch.zeros(4, 64), torch.zeros(4, 6), ids(*ranks), ids(*offsets), torch.ones(2))
    with pytest.raises(ValueError, match="multi_lora_linear: ranks and offsets must be slices of the 4 rows of A"):
        ops.multi_lora_linear(torch.zeros(2, 64), nf4(6, 64), table, ids(0, 1))


TABLE = AdapterTable.stack(adapters([2, 2], 6, 64))
X = torch.zeros(3, 64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few ids": ({"slot_ids": ids(0, 1)}, ValueError, r"slot_ids must be of shape \[3\], got int32 \[2\]"),
    "ids of two dimensions": ({"slot_ids": ids(0, 1, 0)[None]}, ValueError, r"slot_ids must be of shape \[3\]"),
    "ids of int64": ({"slot_ids": ids(0, 1, 0).long()}, TypeError, r"slot_ids must be torch.int32, got int64 \[3\]"),
    "ids elsewhere": ({"slot_ids": ids(0, 1, 0).to("meta")}, ValueError, "slot_ids must be on cpu.*on meta"),
    "x of another width": ({"x": X[:, 1:]}, ValueError, r"x must be \[\.\.\., K = 64\].*got float32 \[3, 63\]"),
    "x of integers": ({"x": X.int()}, TypeError, r"x must be one of float32.*got int32"),
    "A of another width": ({"A": TABLE.A[:, 1:]}, ValueError, r"A must be of shape \[4, 64\], got float32 \[4, 63\]"),
    "A of integers": ({"A": TABLE.A.int()}, TypeError, r"A must be one of float32.*got int32"),
    "A elsewhere": ({"A": TABLE.A.to("meta")}, ValueError, "A must be on cpu.*on meta"),
    "B of fewer rows": ({"B": TABLE.B[1:]}, ValueError, r"B must be of shape \[4, 6\], got float32 \[3, 6\]"),
    "B not transposed": ({"B": TABLE.B.t()}, ValueError, r"B must be of shape \[4, 6\], got float32 \[6, 4\]"),
    "ranks of int64": ({"ranks": TABLE.ranks.long()}, TypeError, r"ranks must be torch.int32, got int64 \[2\]"),
    "too few offsets": ({"offsets": TABLE.offsets[:1]}, ValueError, r"offsets must be of shape \[2\], got int32 \[1\]"),
    "scaling of fp64": ({"scaling": TABLE.scaling.double()}, TypeError, r"scaling must be torch.float32, got float64"),
    "bias of another length": ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[N\] = \[6\], got float32 \[5\]"),
    "weight of another dtype": ({"weight": torch.zeros(6, 64).half()}, TypeError, "weight must be of x's dtype"),
    "weight of other sizes": ({"weight": torch.zeros(5, 64)}, ValueError, r"B must be of shape \[4, 5\]"),
}


@pytest.mark.parametrize("kind", ["dense", "none"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str, kind: str) -> None:
    change, error, message = BAD[case]
    if kind == "none" and case in ("x of another width", "A of another width", "B not transposed"):
        pytest.skip("without a weight, the table says what K and N are")
    table = AdapterTable(**{**TABLE.__dict__, **{k: v for k, v in change.items() if k in TABLE.__dict__}})
    weight = change.get("weight", base(kind, 6, 64, torch.float32))
    with pytest.raises(error, match="multi_lora_linear: " + message):
        ops.multi_lora_linear(
            change.get("x", X), weight, table, change.get("slot_ids", ids(0, 1, 0)), change.get("bias")
        )
