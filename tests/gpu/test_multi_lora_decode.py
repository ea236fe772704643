"""multi_lora_linear over NF4 on a GPU: a row against float64 and against itself alone, launches, graphs, wrong ids."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from bench import truth
from peftrt import ops
from peftrt.ops import AdapterTable, SlotAdapter
from tests.gpu.places import Place, backends, decoded, launches, on_gpu, places, random_weight
from tests.tolerances import assert_same_bits

N, K, SPLITS = 320, 512, (128, 192)
RANKS = ((16, 16), (3, 40), (0, 8), (64, 0))
ROWS = (1, 8, 33, 64)
ALLOWED = {torch.bfloat16: 3 * 2.0**-9, torch.float16: 3 * 2.0**-12}
SEVERAL = pytest.mark.parametrize("place", places(None, "native"))
NATIVE = pytest.mark.parametrize("backend", backends("native"))


def adapters(seed: int = 0) -> list[SlotAdapter]:
    """Four slots of mixed ranks, the second with factors and a bias."""
    draw = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=draw)

    slots = []
    for ranks in RANKS:
        pairs = [(normal(r, K) / 8, normal(n, r) / 8, 0.5) if r else None for r, n in zip(ranks, SPLITS, strict=True)]
        slots.append(SlotAdapter(pairs))
    return [slots[0], dataclasses.replace(slots[1], x_scale=normal(K), y_scale=normal(N), bias=normal(N)), *slots[2:]]


def table(device: str, dtype: torch.dtype) -> AdapterTable:
    made = AdapterTable.stack(adapters(), splits=SPLITS, k=K)
    tensors = {name: value.to(device) for name, value in vars(made).items() if isinstance(value, Tensor)}
    return dataclasses.replace(made, **(tensors | {"values": tensors["values"].to(dtype)}))


def inputs(m: int, dtype: torch.dtype, device: str) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(m)
    ids = torch.randint(-1, len(RANKS), (m,), dtype=torch.int32, generator=draw)
    return torch.randn(m, K, generator=draw).to(device, dtype), ids.to(device)


@SEVERAL
@pytest.mark.parametrize("dtype", ALLOWED)
@pytest.mark.parametrize("m", ROWS)
def test_every_row_is_near_float64_and_its_bits_are_its_own(m: int, dtype: torch.dtype, place: Place) -> None:
    weight, mixed = random_weight(N, K, place.device), table(place.device, dtype)
    x, ids = inputs(m, dtype, place.device)
    got = place.run(lambda: ops.multi_lora_linear(x, weight, mixed, ids))
    assert got is not None
    exact = dataclasses.replace(table("cpu", dtype), values=mixed.values.cpu().double())
    seen = x.cpu().double()
    expected = ops.multi_lora_linear(seen, decoded(weight, dtype).cpu().double(), exact, ids.cpu())
    assert truth.relative_error(got.cpu(), expected) <= ALLOWED[dtype]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(1)).to(place.device)
    for some in (order, order[: m // 2 + 1], order[:1]):
        alone = place.run(lambda some=some: ops.multi_lora_linear(x[some], weight, mixed, ids[some]))
        assert alone is not None
        if place.on_gpu:  # the reference multiplies by torch, which has other sums for other M
            assert_same_bits(alone, got[some])


@SEVERAL
def test_the_result_goes_where_it_is_wanted(place: Place) -> None:
    weight, mixed = random_weight(N, K, place.device), table(place.device, torch.bfloat16)
    x, ids = inputs(8, torch.bfloat16, place.device)
    whole = torch.full((8, N + 64), 7.0, dtype=torch.bfloat16, device=place.device)
    out = whole[:, 32 : 32 + N]
    place.run(lambda: ops.multi_lora_linear(x, weight, mixed, ids, out=out))
    assert_same_bits(out, place.run(lambda: ops.multi_lora_linear(x, weight, mixed, ids)))
    assert whole[:, :32].eq(7).all()
    assert whole[:, 32 + N :].eq(7).all()


@on_gpu
@NATIVE
def test_launches_do_not_depend_on_the_mix(backend: str) -> None:
    place, weight, mixed = Place("cuda", backend), random_weight(N, K, "cuda"), table("cuda", torch.bfloat16)
    x, _ = inputs(16, torch.bfloat16, "cuda")
    for slots in ([-1], [0], [0, 1, 2, 3]):
        ids = torch.tensor(slots * (16 // len(slots)), dtype=torch.int32, device="cuda")
        assert launches(lambda ids=ids: place.run(lambda: ops.multi_lora_linear(x, weight, mixed, ids))) == 2


@on_gpu
@NATIVE
def test_a_captured_graph_replays_any_mix(backend: str) -> None:
    place, weight, mixed = Place("cuda", backend), random_weight(N, K, "cuda"), table("cuda", torch.bfloat16)
    x, ids = inputs(16, torch.bfloat16, "cuda")

    def call() -> Tensor:
        y = place.run(lambda: ops.multi_lora_linear(x, weight, mixed, ids))
        assert y is not None
        return y

    call()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    for shift in range(3):
        ids.copy_((ids + 1 + shift) % (len(RANKS) + 1) - 1)
        graph.replay()
        assert_same_bits(captured, call())


@on_gpu
@NATIVE
def test_a_wrong_id_is_told_by_the_next_call(backend: str) -> None:
    place, weight, mixed = Place("cuda", backend), random_weight(N, K, "cuda"), table("cuda", torch.bfloat16)
    x, ids = inputs(8, torch.bfloat16, "cuda")
    wrong, none = ids.clone(), ids.clone()
    wrong[3], none[3] = len(RANKS), -1
    got = place.run(lambda: ops.multi_lora_linear(x, weight, mixed, wrong))
    torch.cuda.synchronize()
    with pytest.raises(ValueError, match="multi_lora_linear: slot_ids"):
        place.run(lambda: ops.multi_lora_linear(x, weight, mixed, ids))
    assert got is not None
    assert_same_bits(got, place.run(lambda: ops.multi_lora_linear(x, weight, mixed, none)))
