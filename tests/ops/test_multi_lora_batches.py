"""multi_lora_linear on seeded random batches: 60 of them, with --fuzz 2,000.

A failure names its seed; ``Batch(seed)`` is the call.
"""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt import ops
from peftrt.ops import AdapterTable
from peftrt.ops._define import OPS
from peftrt.ops._weight import weight_args
from peftrt.reference.multi_lora_linear import places
from tests.cases import BACKENDS
from tests.ops.multi_lora import Batch
from tests.tolerances import assert_close, assert_same_bits

CHUNK = 20


def run(batch: Batch, rows: Tensor | None = None) -> Tensor:
    """The call, or that of some of its rows."""
    x, slot_ids = (t if rows is None else t[rows] for t in (batch.x, batch.slot_ids))
    return ops.multi_lora_linear(x, batch.weight, batch.table(), slot_ids, batch.bias)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        count = 2000 if metafunc.config.getoption("--fuzz") else 60
        metafunc.parametrize("seeds", [range(i, i + CHUNK) for i in range(0, count, CHUNK)], ids=lambda r: f"{r.start}")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_equals_its_truth(name: str, seeds: range) -> None:
    for seed in seeds:
        batch = Batch(seed)
        with peftrt.backend(multi_lora_linear=name):
            y = run(batch)
        try:
            assert_close(y, batch.truth(), intermediate=batch.size())
        except AssertionError as error:
            raise AssertionError(f"{batch}: {error}") from error


@pytest.mark.parametrize("name", BACKENDS)
def test_a_row_does_not_depend_on_its_neighbours(name: str, seeds: range) -> None:
    """Bit for bit, under any permutation, and whatever the other rows hold and whom they belong to."""
    if name == "reference":
        pytest.skip("torch's product of a few rows differs from that of many")
    for seed in seeds:
        batch = Batch(seed)
        with peftrt.backend(multi_lora_linear=name):
            y = run(batch)
            order = torch.randperm(batch.m, generator=torch.Generator().manual_seed(seed))
            assert_same_bits(run(batch, order), y[order])
            if batch.m > 1:
                kept = batch.m // 2
                batch.x[kept:] = batch.x[kept:].flip(0) * 3
                batch.slot_ids[kept:] = batch.slot_ids[kept:].roll(1)
                assert_same_bits(run(batch)[:kept], y[:kept])


def backward(batch: Batch, table: AdapterTable, rows: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """dX and dvalues of the call, or of some of its rows."""
    dz, x, slot_ids = (t if rows is None else t[rows] for t in (batch.dy, batch.x, batch.slot_ids))
    nothing = (None, None, None, None, batch.n, batch.k, 0)
    weight = nothing if batch.weight is None else weight_args("test", batch.weight)
    pairs = (table.values, table.ranks, table.A_pages, table.B_pages, table.scaling)
    return OPS["multi_lora_linear_backward"](dz, x, *weight, *pairs, list(table.splits), slot_ids, True, True)


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_equal_their_truth(name: str, seeds: range) -> None:
    """And an adapter's, bit for bit, those of its own rows alone."""
    for seed in seeds:
        batch = Batch(seed)
        table = batch.table()
        (want_dx, wanted), (size_dx, sizes) = batch.gradients(), batch.gradients(power=2)
        with peftrt.backend(multi_lora_linear_backward=name, nf4_linear_dx=name):
            dx, dvalues = backward(batch, table)
            solo = {e: backward(batch, table, (batch.slot_ids == e).nonzero().squeeze(1))[1] for e, _ in wanted}
        untouched = torch.ones(dvalues.shape, dtype=torch.bool)
        try:
            assert_close(dx, want_dx, intermediate=size_dx.max().sqrt().item() if size_dx.numel() else 0.0)
            for (e, part), pair in wanted.items():
                rank = int(table.ranks[e, part])
                for which, width in ((0, batch.k), (1, batch.splits[part])):
                    at = places((table.A_pages, table.B_pages)[which][e, part], rank, width)
                    size = sizes[e, part][which].max().sqrt().item()
                    assert_close(dvalues[at], pair[which].reshape(-1), intermediate=size)
                    if name != "reference":
                        assert_same_bits(solo[e][at], dvalues[at])
                    untouched[at] = False
            assert (dvalues[untouched] == 0).all()
        except AssertionError as error:
            raise AssertionError(f"{batch}: {error}") from error
