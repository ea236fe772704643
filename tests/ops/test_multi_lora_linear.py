"""multi_lora_linear against a loop over the rows in fp64."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.ops import AdapterTable, SlotAdapter
from peftrt.ops._multi_lora_linear import row_stride
from peftrt.ops._weight import weight_args
from tests.cases import FLOATS, LAYOUTS, exact, laid_out, nf4, randn
from tests.ops.multi_lora import Adapters, adapters, base, by_row, ids
from tests.tolerances import assert_close, assert_same_bits


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
    vectors = SlotAdapter((None, None), randn(64), randn(6), randn(6))
    (first, _), second = adapters([2, 3], 4, 64), adapters([9], 2, 64)[0]
    table = AdapterTable.stack([SlotAdapter((first, second)), vectors], splits=(4, 2))
    pairs = (table.values.detach().requires_grad_(), table.ranks, table.A_pages, table.B_pages, table.scaling)
    for slots in ((), (0, 1, -1, 1)):
        x, dy, b = (randn(*s).requires_grad_() for s in ((len(slots), 64), (len(slots), 6), (6,)))
        call = (x, *args, *pairs, table.vectors, table.vector_starts, [4, 2], ids(*slots))
        torch.library.opcheck(torch.ops.peftrt.multi_lora_linear.default, (*call, b))
        tests = ("test_schema", "test_faketensor")  # they have no gradient of their own
        plain = [t.detach() if isinstance(t, Tensor) else t for t in (dy, x, *args, *pairs, [4, 2], ids(*slots))]
        for wanted in ((True, True), (True, False), (False, True)):
            backward = torch.ops.peftrt.multi_lora_linear_backward.default
            torch.library.opcheck(backward, (*plain, *wanted), test_utils=tests)
        plain = [t.detach() if isinstance(t, Tensor) else t for t in (*call, b)]
        out = torch.ops.peftrt.multi_lora_linear.out
        torch.library.opcheck(out, (*plain, torch.empty(len(slots), 6)), test_utils=tests)


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


@pytest.mark.parametrize("slots", [(0, 2), (-2, 0), (2**31 - 1, 0), (-(2**31), 0)])
def test_a_slot_id_out_of_range_is_refused(slots: tuple[int, int]) -> None:
    table = AdapterTable.stack(adapters([2, 2], 6, 64))
    with pytest.raises(
        ValueError, match=rf"multi_lora_linear: slot_ids must be in -1 ... 1, got {min(slots)} ... {max(slots)}"
    ):
        ops.multi_lora_linear(torch.zeros(2, 64), nf4(6, 64), table, ids(*slots))


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("ranks", 9, r"ranks must be in 0 \.\.\. 8, what 1 pages hold"),
        ("ranks", -1, r"ranks must be in 0 \.\.\. 8"),
        ("A_pages", -1, "A_pages must be within the 1120 values"),
        ("A_pages", 1120 - 2 * 64 + 1, "A_pages must be within"),
        ("B_pages", 2**62, "B_pages must be within"),
    ],
)
def test_a_table_that_points_outside_of_itself_is_refused(field: str, value: int, message: str) -> None:
    changed = getattr(TABLE, field).clone()
    changed[1] = value
    table = dataclasses.replace(TABLE, **{field: changed})
    with pytest.raises(ValueError, match=f"multi_lora_linear: {message}"):
        ops.multi_lora_linear(X, nf4(6, 64), table, ids(0, 1, 0))
    ops.multi_lora_linear(X, nf4(6, 64), table, ids(0, -1, 0))


def test_vectors_outside_of_themselves_are_refused() -> None:
    table = AdapterTable.stack([SlotAdapter((None,), y_scale=torch.ones(6))], splits=(6,), k=64)
    assert table.vector_starts is not None
    table = dataclasses.replace(table, vector_starts=table.vector_starts + 2)
    with pytest.raises(ValueError, match="multi_lora_linear: vector_starts must be within the 6 vectors"):
        ops.multi_lora_linear(X, None, table, ids(0, 0, 0))


TABLE = AdapterTable.stack(adapters([2, 2], 6, 64))
X = torch.zeros(3, 64)
BAD: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "too few ids": ({"slot_ids": ids(0, 1)}, ValueError, r"slot_ids must be of shape \[3\], got int32 \[2\]"),
    "ids of two dimensions": ({"slot_ids": ids(0, 1, 0)[None]}, ValueError, r"slot_ids must be of shape \[3\]"),
    "ids of int64": ({"slot_ids": ids(0, 1, 0).long()}, TypeError, r"slot_ids must be torch.int32, got int64 \[3\]"),
    "ids elsewhere": ({"slot_ids": ids(0, 1, 0).to("meta")}, ValueError, "slot_ids must be on cpu.*on meta"),
    "x of another width": ({"x": X[:, 1:]}, ValueError, r"x must be \[\.\.\., K = 64\].*got float32 \[3, 63\]"),
    "x of integers": ({"x": X.int()}, TypeError, r"x must be one of float32.*got int32"),
    "values of two dimensions": ({"values": TABLE.values[None]}, ValueError, r"values must be of shape \[S\]"),
    "values of integers": ({"values": TABLE.values.int()}, TypeError, r"values must be one of float32.*got int32"),
    "values elsewhere": ({"values": TABLE.values.to("meta")}, ValueError, "values must be on cpu.*on meta"),
    "ranks of one dimension": ({"ranks": TABLE.ranks[:, 0]}, ValueError, r"ranks must be of shape \[E, P\]"),
    "ranks of int64": ({"ranks": TABLE.ranks.long()}, TypeError, r"ranks must be torch.int32, got int64 \[2, 1\]"),
    "pages of int32": ({"A_pages": TABLE.A_pages.int()}, TypeError, r"A_pages must be torch.int64, got int32"),
    "too few pages": ({"B_pages": TABLE.B_pages[:1]}, ValueError, r"B_pages must be of shape \[2, 1, 1\]"),
    "scaling of fp64": ({"scaling": TABLE.scaling.double()}, TypeError, r"scaling must be torch.float32, got float64"),
    "bias of another length": ({"bias": torch.zeros(5)}, ValueError, r"bias must be \[N\] = \[6\], got float32 \[5\]"),
    "weight of another dtype": ({"weight": torch.zeros(6, 64).half()}, TypeError, "weight must be of x's dtype"),
    "weight of other sizes": ({"weight": torch.zeros(5, 64)}, ValueError, r"splits must be sizes that sum to N = 5"),
    "splits of other sizes": ({"splits": (5, 2)}, ValueError, "splits must be sizes that sum to N"),
    "vectors alone": ({"vectors": torch.zeros(6)}, ValueError, "vector_starts must be given with vectors"),
    "out of another shape": ({"out": torch.empty(3, 5)}, ValueError, r"out must be torch.float32 \[3, 6\]"),
    "out of another dtype": ({"out": torch.empty(3, 6).half()}, ValueError, r"out must be torch.float32 \[3, 6\]"),
    "out in columns": ({"out": torch.empty(6, 3).t()}, ValueError, "out must be of rows at one stride"),
}


@pytest.mark.parametrize("kind", ["dense", "none"])
@pytest.mark.parametrize("case", BAD)
def test_a_bad_argument_is_named(case: str, kind: str) -> None:
    change, error, message = BAD[case]
    if kind == "none" and case in ("weight of another dtype", "weight of other sizes", "splits of other sizes"):
        pytest.skip("without a weight, the table says what K and N are")
    table = dataclasses.replace(TABLE, **{k: v for k, v in change.items() if k in TABLE.__dict__})
    weight = change.get("weight", base(kind, 6, 64, torch.float32))
    x, slots, bias, out = (change.get(*c) for c in (("x", X), ("slot_ids", ids(0, 1, 0)), ("bias",), ("out",)))
    with pytest.raises(error, match="multi_lora_linear: " + message):
        ops.multi_lora_linear(x, weight, table, slots, bias, out=out)


@pytest.mark.parametrize("kind", ["none", "dense", "nf4"])
@pytest.mark.parametrize("lead", [(5,), (2, 3), (0,)], ids=str)
def test_out_is_written_between_what_lies_around_it(kind: str, lead: tuple[int, ...]) -> None:
    weight, x, b = base(kind, 6, 64, torch.float32), randn(*lead, 64), randn(6)
    slots = ids(*(i % 3 - 1 for i in range(math.prod(lead))))
    around = torch.full((*lead, 11), 7.0)
    out = around[..., 2:8]
    assert ops.multi_lora_linear(x, weight, TABLE, slots, b, out=out) is out
    assert_same_bits(out, ops.multi_lora_linear(x, weight, TABLE, slots, b))
    assert (around[..., :2] == 7).all()
    assert (around[..., 8:] == 7).all()


def test_out_takes_no_part_in_gradients() -> None:
    x = X.clone().requires_grad_()
    with pytest.raises(ValueError, match="multi_lora_linear: out takes no part in gradients"):
        ops.multi_lora_linear(x, None, TABLE, ids(0, 1, 0), out=torch.empty(3, 6))
    with torch.no_grad():
        ops.multi_lora_linear(x, None, TABLE, ids(0, 1, 0), out=torch.empty(3, 6))


def test_row_stride_is_one_number_or_none() -> None:
    whole = torch.empty(4, 3, 10)
    assert row_stride(whole) == 10
    assert row_stride(whole[..., 2:5]) == 10
    assert row_stride(whole[:, :2, 2:5]) is None
    assert row_stride(whole.transpose(0, 1)) is None
    assert row_stride(torch.empty(3).expand(4, 3)) is None
    assert row_stride(whole[0, 1, 2:5]) == 3
    assert row_stride(whole[:, 1:2, :3]) == 30
