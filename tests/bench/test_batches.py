"""Batches of many adapters: who has which, the truth of it, and that the memory which is rotated holds the same."""

from __future__ import annotations

from collections import Counter

import pytest
import torch

from bench import batches, bench_multi_lora_linear, measure, problem, truth
from bench.batches import Mix, Rotation, Stack
from bench.bench_multi_lora_linear import cells
from bench.cells import evaluate
from bench.shapes import SLOTS, Site
from tests.ops.multi_lora import by_row
from tests.tolerances import assert_close, assert_same_bits

SITE = Site(48, 64)
MIXES = ("distinct-r16-e8", "distinct-bare-rmix-e64", "uniform-r8-e64", "zipf-rmix-e128", "identical-r64-e8")


@pytest.mark.parametrize("name", [*MIXES, "identical-bare-r16-e8"])
@pytest.mark.parametrize("M", [1, 4, 32, 200])
def test_ids_are_in_the_table_and_the_same_every_time(name: str, M: int) -> None:
    mix = Mix.of(f"nf4-{name}")
    assert str(mix) == name
    ids = mix.ids(M)
    torch.rand(3)
    assert ids == mix.ids(M)
    assert len(ids) == M
    used = {*ids} - {-1}
    assert used == set(range(len(used)))
    assert len(used) <= mix.slots
    assert ids.count(-1) == (round(M / 4) if "bare" in name or name[0] in "uz" else 0)


def test_how_adapters_are_chosen() -> None:
    assert Mix.of("distinct-r8-e8").ids(10) == [0, 1, 2, 3, 4, 5, 6, 7, 0, 1]
    assert Mix.of("identical-r8-e8").ids(3) == [0, 0, 0]
    few, many = (Counter(Mix.of(f"{name}-r8-e64").ids(400)) for name in ("zipf", "uniform"))
    for counted in (few, many):
        counted.pop(-1)
    assert max(few.values()) > 80 > 20 > max(many.values())
    assert len(few) < len(many)


def test_another_part_is_refused() -> None:
    with pytest.raises(ValueError, match="nf4-forward: expected it to end in <popularity>"):
        Mix.of("nf4-forward")


def test_the_formulas_count_adapters_in_use_and_rows_that_have_one() -> None:
    mix = Mix("distinct", True, None, 8)
    ids, ranks = mix.ids(12), mix.ranks
    assert mix.letters(12) == (
        ("T", sum(ranks[slot] for slot in {*ids} - {-1})),
        ("Q", sum(ranks[slot] for slot in ids if slot >= 0)),
    )
    (cell,) = (c for c in cells("cpu", quick=False) if c.id == "dense-distinct-r16-e64-fp32-4096x4096-M32")
    assert dict(cell.letters) == {"T": 32 * 16, "Q": 32 * 16}
    assert cell.evaluate(cell.bytes) == 4 * (4096**2 + 32 * 16 * 2 * 4096 + 32 * 2 * 4096)
    assert cell.evaluate(cell.flops) == 2 * 32 * 4096**2 + 2 * 32 * 16 * 2 * 4096
    assert evaluate(cell.bytes, cell.describe()) == cell.evaluate(cell.bytes)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
@pytest.mark.parametrize("quick", [True, False])
def test_every_cell_is_there_once(device: str, quick: bool) -> None:
    made = cells(device, quick)
    assert len({cell.id for cell in made}) == len(made)
    for cell in made:
        assert f"{Mix.of(cell.part)}" == cell.part.split("-", 1)[1]


@pytest.mark.parametrize("name", MIXES)
@pytest.mark.parametrize("weight", [True, False])
def test_the_truth_is_that_of_each_row(name: str, weight: bool) -> None:
    mix = Mix.of(name)
    adapters = batches.adapters(SITE, tuple(mix.ranks), torch.float32, "cpu")
    x, ids = problem.activations(20, SITE.K, torch.float32, "cpu"), mix.ids(20)
    W = torch.randn(*SITE) if weight else None
    expected = by_row(x, None if W is None else W.double(), list(adapters), torch.tensor(ids))
    assert_close(truth.multi_lora(x, W, adapters, ids), expected)


def test_a_stack_is_the_adapters_padded() -> None:
    ranks = tuple(Mix.of("zipf-rmix-e8").ranks)
    adapters = batches.adapters(SITE, ranks, torch.bfloat16, "cpu")
    stack = Stack.of(adapters)
    assert (stack.slots, stack.ranks, tuple(stack.A.shape)) == (8, (*ranks, 0), (9, 128, SITE.K))
    for slot, (A, B, scaling) in enumerate(adapters):
        assert_same_bits(stack.A[slot, : ranks[slot]], A)
        assert_same_bits(stack.B[slot, :, : ranks[slot]], B)
        assert_same_bits(stack.folded().B[slot, :, : ranks[slot]], scaling * B)
        assert not stack.A[slot, ranks[slot] :].any()
        assert not stack.B[slot, :, ranks[slot] :].any()
    assert not stack.A[-1].any()


@pytest.mark.parametrize("name", [*MIXES, *(f"identical-rmix-e{slots}" for slots in SLOTS)])
def test_calls_of_a_turn_differ_in_place_and_not_in_work(name: str) -> None:
    mix, M = Mix.of(name), 32
    ids, ranks = mix.ids(M), mix.ranks
    rotation = Rotation.plan(mix, M, call_bytes=1e6, rotation_bytes=20_500_000)
    assert rotation.calls == 21
    seen: set[tuple[int, int]] = set()
    for call in range(rotation.calls):
        moved = rotation.ids(ids, call)
        assert [slot < 0 for slot in moved] == [slot < 0 for slot in ids]
        assert [ranks[a] for a in moved if a >= 0] == [ranks[b] for b in ids if b >= 0]
        places = {(rotation.table(call), slot) for slot in moved if slot >= 0}
        assert not places & seen
        seen |= places
        assert rotation.table(call) < rotation.tables
    assert Rotation.plan(mix, M, 1e6, 0).calls == 1
    assert Rotation.plan(mix, M, 1.0, 10**9).calls == batches.MOST_CALLS


class Session:
    """What a benchmark's cell needs of a run: it keeps the contenders that are checked."""

    def __init__(self, rotation_bytes: int = 0) -> None:
        self.device, self.timer = "cpu", self
        self.rotation_bytes = rotation_bytes
        self.found = measure.Field()

    def run(self, cell: object, builders: dict) -> None:
        self.found = measure.assemble(builders)


@pytest.mark.parametrize("cell", cells("cpu", quick=True), ids=lambda cell: cell.id)
def test_every_contender_is_right_in_every_call(cell) -> None:
    session = Session(rotation_bytes=3_000_000)
    bench_multi_lora_linear.bench_multi_lora_linear(cell, session)
    found = session.found
    assert not found.skipped
    base = cell.part.split("-")[0]
    peers = {"nf4": {"base", "peft+bitsandbytes", "bitsandbytes"}, "dense": {"base", "peft"}, "none": set()}[base]
    one = {"one adapter"} if "rmix" not in cell.part and cell.M > 1 else set()
    assert set(found.contenders) == {"peftrt", "loop"} | peers | one
    own = found.contenders["peftrt"]
    assert len(own.calls) > 1
    batch = bench_multi_lora_linear.Batch(cell, "cpu", 3_000_000)
    for call, run in enumerate(own.calls):
        ids = batch.rotation.ids(batch.ids, call)
        expected = truth.multi_lora(batch.x, batch.dense, batch.adapters, ids)
        assert truth.relative_error(run(), expected) < 1e-5


def test_a_wrong_adapter_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    cell = next(cell for cell in cells("cpu", quick=True) if cell.M == 16)
    original = bench_multi_lora_linear.ops.multi_lora_linear
    wrong = lambda x, weight, table, ids: original(x, weight, table, ids.roll(1))  # noqa: E731
    monkeypatch.setattr(bench_multi_lora_linear.ops, "multi_lora_linear", wrong)
    with pytest.raises(measure.WrongResultError, match="peftrt"):
        bench_multi_lora_linear.bench_multi_lora_linear(cell, Session())


def test_invariance_is_a_contender_where_rows_are_few(monkeypatch: pytest.MonkeyPatch) -> None:
    bench = bench_multi_lora_linear
    made = [cell for cell in cells("cpu", quick=False) if cell.part == "nf4-distinct-r16-e64" and cell.M <= 16]
    assert [cell.M for cell in made] == [1, 4, 16]
    small = bench._cell("cpu", SITE, "dense", "distinct-r16-e64", 4)
    session = Session()
    monkeypatch.delattr(bench.peftrt, "batch_invariant", raising=False)
    bench.bench_multi_lora_linear(small, session)
    assert session.found.skipped == {"batch invariant": "UnavailableError: this peftrt has no batch_invariant"}
    inside: list[str] = []

    class Within:
        def __enter__(self) -> None:
            inside.append("in")

        def __exit__(self, *_: object) -> None:
            inside.append("out")

    monkeypatch.setattr(bench.peftrt, "batch_invariant", Within, raising=False)
    bench.bench_multi_lora_linear(small, session)
    assert "batch invariant" in session.found.contenders
    assert inside == ["in", "out"]
