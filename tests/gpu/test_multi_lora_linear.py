"""multi_lora_linear on a GPU against float64: every row its own adapter, whatever the batch holds."""

from __future__ import annotations

import dataclasses
import functools

import pytest
import torch
from torch import Tensor

import peftrt
from bench import truth
from peftrt import NF4Weight, ops
from peftrt.ops import AdapterTable, SlotAdapter
from tests.cases import FLOATS, randn
from tests.gpu.places import (
    BY_DEFAULT,
    Place,
    assert_not_by_the_reference,
    decoded,
    launches,
    on_gpu,
    random_weight,
)
from tests.tolerances import assert_same_bits

K, SPLITS = 320, (256, 64, 64)
N = sum(SPLITS)
RANKS = ((16, 16, 16), (8, 0, 64), (1, 3, 5), (128, 33, 8))
ROWS = (1, 40, 64, 65, 300, 700)  # a few, by slot over tiles, by slot over cuBLAS
# As in test_lora_linear.py: the base, the adapter's share and their sum may each be rounded.
ALLOWED = {torch.float32: 5e-6, torch.bfloat16: 3 * 2.0**-9, torch.float16: 3 * 2.0**-12}
BASES = ("none", "dense", "nf4")


def _table(device: str, dtype: torch.dtype, vectors: bool = False, scale: int = 1) -> AdapterTable:
    """Slots of mixed ranks, one of them empty; the last has factors and a bias where ``vectors``."""
    k, splits = K * scale, tuple(size * scale for size in SPLITS)
    slots: list[SlotAdapter | None] = [None]
    for e, ranks in enumerate(RANKS):
        pairs = []
        for p, (rank, n) in enumerate(zip(ranks, splits, strict=True)):
            A = randn(rank, k, seed=10 * e + p, dtype=dtype, device=device) * k**-0.5
            B = randn(n, rank, seed=10 * e + p + 5, dtype=dtype, device=device) * max(rank, 1) ** -0.5
            pairs.append((A, B, 1.0 + e) if rank else None)
        slots.append(SlotAdapter(pairs))
    if vectors:
        u, c, b = (randn(size, seed=90 + size, device=device) for size in (k, sum(splits), sum(splits)))
        slots[-1] = SlotAdapter(slots[-1].pairs, u.abs() + 0.5, c.abs() + 0.5, b)  # type: ignore[union-attr]
    return AdapterTable.stack(slots, splits=splits, k=k)


def _ids(m: int, device: str, seed: int = 0) -> Tensor:
    """Every slot, and none, as likely as another."""
    draw = torch.Generator().manual_seed(seed)
    return torch.randint(-1, len(RANKS) + 1, (m,), generator=draw, dtype=torch.int32).to(device)


def _weight(base: str, dtype: torch.dtype, device: str, scale: int = 1) -> tuple[Tensor | NF4Weight | None, Tensor]:
    """The operand, and W in its dtype."""
    nf4 = random_weight(N * scale, K * scale, device)
    wide = decoded(nf4, dtype)
    if base == "none":
        return None, torch.zeros_like(wide)
    return (nf4 if base == "nf4" else wide), wide


def _wide(table: AdapterTable) -> AdapterTable:
    vectors = None if table.vectors is None else table.vectors.detach().double()
    return dataclasses.replace(table, values=table.values.detach().double(), vectors=vectors)


def _true(x: Tensor, wide: Tensor, table: AdapterTable, slot_ids: Tensor, bias: Tensor | None = None) -> Tensor:
    """By the reference in float64, on the CPU."""
    moved = {f.name: getattr(table, f.name) for f in dataclasses.fields(table)}
    moved = {name: value.cpu() if isinstance(value, Tensor) else value for name, value in moved.items()}
    bias = None if bias is None else bias.cpu().double()
    with peftrt.backend("reference"):
        return ops.multi_lora_linear(x.cpu().double(), wide.cpu().double(), AdapterTable(**moved), slot_ids.cpu(), bias)


def _near(actual: Tensor, expected: Tensor, dtype: torch.dtype) -> None:
    error = truth.relative_error(actual.cpu(), expected)
    assert error <= ALLOWED[dtype], f"{error:.3g} of {ALLOWED[dtype]:.3g}"


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("base", BASES)
@BY_DEFAULT
def test_forward_and_gradients_equal_fp64(place: Place, base: str, dtype: torch.dtype) -> None:
    weight, wide = _weight(base, dtype, place.device)
    for m in ROWS if place.on_gpu else (1, 70):
        for values in dict.fromkeys((dtype, torch.float32)):
            table = _table(place.device, values)
            table = dataclasses.replace(table, values=table.values.requires_grad_())
            slot_ids, bias = _ids(m, place.device), randn(N, seed=7, dtype=dtype, device=place.device)
            x = randn(m, K, seed=m, dtype=dtype, device=place.device).requires_grad_()
            dy = randn(m, N, seed=4, dtype=dtype, device=place.device)
            y = ops.multi_lora_linear(x, weight, table, slot_ids, bias)
            grads = torch.autograd.grad(y, (x, table.values), dy)
            leaves = [x.detach().cpu().double().requires_grad_(), _wide(table).values.cpu().requires_grad_()]
            true = _true_with(leaves, wide, table, slot_ids, bias)
            _near(y, true.detach(), dtype)
            expected = torch.autograd.grad(true, leaves, dy.cpu().double())
            _near(grads[0], expected[0], dtype)
            assert grads[1].dtype == values
            _near(grads[1], expected[1], dtype if values == dtype else torch.float32)


def _true_with(leaves: list[Tensor], wide: Tensor, table: AdapterTable, slot_ids: Tensor, bias: Tensor) -> Tensor:
    own = dataclasses.replace(_wide(table), values=leaves[1])
    return _true(leaves[0], wide, own, slot_ids, bias)


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@BY_DEFAULT
def test_factors_and_biases_of_slots(place: Place, dtype: torch.dtype, base: str) -> None:
    weight, wide = _weight(base, dtype, place.device)
    table = _table(place.device, torch.float32, vectors=True)
    for m in (3, 70, 700) if place.on_gpu else (3, 70):
        x, slot_ids = randn(m, K, dtype=dtype, device=place.device), _ids(m, place.device)
        y = ops.multi_lora_linear(x, weight, table, slot_ids)
        # the factors of x are rounded with it
        _near(y, _true(x, wide, _wide(table), slot_ids), dtype)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("m", [40, 300])
@BY_DEFAULT
def test_a_row_does_not_depend_on_the_others(place: Place, m: int, dtype: torch.dtype) -> None:
    """Nor on its place: bit for bit, in y and dX; and a slot's gradient is that of its rows alone."""
    table = _table(place.device, torch.float32, vectors=True)
    table = dataclasses.replace(table, values=table.values.requires_grad_())
    x, dy, slot_ids = randn(m, K, dtype=dtype), randn(m, N, seed=1, dtype=dtype), _ids(m, "cpu")

    def run(rows: Tensor) -> tuple[Tensor, ...]:
        leaf = x[rows].to(place.device).requires_grad_()
        y = ops.multi_lora_linear(leaf, None, table, slot_ids[rows].to(place.device))
        return y, *torch.autograd.grad(y, (leaf, table.values), dy[rows].to(place.device))

    def same(got: Tensor, wanted: Tensor) -> None:
        """The reference on a CPU says nothing of bits."""
        if place.on_gpu:
            assert_same_bits(got, wanted)
        else:
            _near(got.detach(), wanted.detach().double(), got.dtype)

    everything = torch.arange(m)
    y, dx, dvalues = run(everything)
    order = torch.randperm(m, generator=torch.Generator().manual_seed(5))
    moved = run(order)
    same(moved[0], y[order])
    same(moved[1], dx[order])
    half = everything[m // 4 : m // 4 + m // 2]
    if m == 300:  # both by slot
        same(run(half)[0], y[half])
    alone = torch.zeros_like(dvalues)
    for slot in range(len(RANKS) + 1):
        alone += run(everything[slot_ids == slot])[2]
    same(alone, dvalues)


@BY_DEFAULT
def test_a_result_goes_where_it_is_wanted(place: Place) -> None:
    table, (weight, _) = _table(place.device, torch.bfloat16), _weight("nf4", torch.bfloat16, place.device)
    for m in (5, 70, 700) if place.on_gpu else (5, 70):
        x, slot_ids = randn(m, K, dtype=torch.bfloat16, device=place.device), _ids(m, place.device)
        room = torch.full((m, N + 24), 7.0, dtype=torch.bfloat16, device=place.device)
        ops.multi_lora_linear(x, weight, table, slot_ids, out=room[:, 8 : N + 8])
        assert_same_bits(room[:, 8 : N + 8].contiguous(), ops.multi_lora_linear(x, weight, table, slot_ids))
        assert bool((room[:, :8] == 7).all() and (room[:, N + 8 :] == 7).all())


@on_gpu
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("m", [16, 300, 700])
def test_a_captured_graph_serves_any_slots(m: int, base: str) -> None:
    """And a call copies nothing to the device and waits for nothing."""
    table, (weight, _) = _table("cuda", torch.bfloat16, vectors=True), _weight(base, torch.bfloat16, "cuda")
    x, slot_ids = randn(m, K, dtype=torch.bfloat16, device="cuda"), _ids(m, "cuda")
    mixes = [_ids(m, "cuda", seed) for seed in (1, 2)] + [torch.full_like(slot_ids, slot) for slot in (-1, 4)]
    expected = [ops.multi_lora_linear(x, weight, table, mix) for mix in mixes]
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        ops.multi_lora_linear(x, weight, table, slot_ids)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = ops.multi_lora_linear(x, weight, table, slot_ids)
    for mix, wanted in zip(mixes, expected, strict=True):
        slot_ids.copy_(mix)
        y.zero_()
        graph.replay()
        assert_same_bits(y, wanted)


@on_gpu
def test_gradients_wait_for_nothing() -> None:
    table, (weight, _) = _table("cuda", torch.bfloat16), _weight("nf4", torch.bfloat16, "cuda")
    table = dataclasses.replace(table, values=table.values.requires_grad_())
    for m in (16, 300):
        x, slot_ids = randn(m, K, dtype=torch.bfloat16, device="cuda").requires_grad_(), _ids(m, "cuda")
        dy = randn(m, N, dtype=torch.bfloat16, device="cuda")
        for mode in ("default", "error"):  # the first call compiles
            torch.cuda.set_sync_debug_mode(mode)
            try:
                y = ops.multi_lora_linear(x, weight, table, slot_ids)
                torch.autograd.grad(y, (x, table.values), dy)
            finally:
                torch.cuda.set_sync_debug_mode("default")


@on_gpu
@pytest.mark.parametrize(("m", "most"), [(16, 3), (300, 5)])
def test_the_number_of_launches_does_not_depend_on_the_slots(m: int, most: int) -> None:
    """A few rows: the base, x A^T, and B with all that is added. By slot, the order of the rows is one more."""
    table, (weight, _) = _table("cuda", torch.bfloat16), _weight("nf4", torch.bfloat16, "cuda")
    x = randn(m, K, dtype=torch.bfloat16, device="cuda")
    for slot_ids in (_ids(m, "cuda"), torch.full((m,), -1, dtype=torch.int32, device="cuda")):
        assert launches(functools.partial(ops.multi_lora_linear, x, weight, table, slot_ids)) <= most


@on_gpu
def test_two_streams_do_not_meet() -> None:
    table, (weight, _) = _table("cuda", torch.bfloat16, scale=4), _weight("nf4", torch.bfloat16, "cuda", scale=4)
    for m in (16, 300):
        calls = [
            (randn(m, 4 * K, seed=seed, dtype=torch.bfloat16, device="cuda"), _ids(m, "cuda", seed)) for seed in (1, 2)
        ]
        expected = [ops.multi_lora_linear(x, weight, table, slot_ids) for x, slot_ids in calls]
        torch.cuda.synchronize()
        streams = [torch.cuda.Stream() for _ in calls]
        results: list[list[Tensor]] = [[], []]
        for _ in range(8):
            for stream, (x, slot_ids), found in zip(streams, calls, results, strict=True):
                with torch.cuda.stream(stream):
                    found.append(ops.multi_lora_linear(x, weight, table, slot_ids))
        torch.cuda.synchronize()
        for found, wanted in zip(results, expected, strict=True):
            for y in found:
                assert_same_bits(y, wanted)


@pytest.mark.parametrize("wrong", [-2, len(RANKS) + 1])
@BY_DEFAULT
def test_slot_ids_outside_the_table(place: Place, wrong: int) -> None:
    """On a CPU an error; on a GPU the base serves the row, and the next call raises the error."""
    table = _table(place.device, torch.float32)
    for m in (4, 70):
        x, slot_ids = randn(m, K, device=place.device), _ids(m, place.device)
        y = ops.multi_lora_linear(x, None, table, slot_ids)
        bad = slot_ids.clone()
        bad[2] = wrong
        words = r"multi_lora_linear: slot_ids must be in -1 \.\.\. "
        if not place.on_gpu:
            with pytest.raises(ValueError, match=words):
                ops.multi_lora_linear(x, None, table, bad)
            continue
        served = ops.multi_lora_linear(x, None, table, bad)
        torch.cuda.synchronize()
        assert not bool(served[2].any())
        others = torch.arange(m, device=place.device) != 2
        assert_same_bits(served[others], y[others])
        with pytest.raises(ValueError, match=words + "E - 1: those of an earlier call"):
            ops.multi_lora_linear(x, None, table, slot_ids)
        assert_same_bits(ops.multi_lora_linear(x, None, table, slot_ids), y)


@on_gpu
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_a_gpu_is_not_served_by_the_reference(dtype: torch.dtype) -> None:
    t, x, slot_ids = _table("cuda", dtype), randn(3, K, dtype=dtype, device="cuda"), _ids(3, "cuda")
    pairs = (t.values, t.ranks, t.A_pages, t.B_pages, t.scaling)
    call = (x, None, None, None, None, N, K, 0, *pairs, None, None, list(SPLITS), slot_ids, None)
    assert_not_by_the_reference("multi_lora_linear", *call)
    dz = randn(3, N, dtype=dtype, device="cuda")
    call = (dz, x, None, None, None, None, N, K, 0, *pairs, list(SPLITS), slot_ids, True, True)
    assert_not_by_the_reference("multi_lora_linear_backward", *call)
