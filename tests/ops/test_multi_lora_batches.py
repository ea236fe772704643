"""multi_lora_linear on seeded random batches: 60 of them, with --fuzz 2,000.

A failure names its seed; ``Batch(seed)`` is the call.
"""

from __future__ import annotations

import pytest
import torch

import peftrt
from tests.cases import BACKENDS, NATIVE
from tests.ops.multi_lora import Batch, check_gradients, check_rows, named, run
from tests.tolerances import assert_same_bits

CHUNK = 20


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "seeds" in metafunc.fixturenames:
        count = 2000 if metafunc.config.getoption("--fuzz") else 60
        metafunc.parametrize("seeds", [range(i, i + CHUNK) for i in range(0, count, CHUNK)], ids=lambda r: f"{r.start}")


@pytest.mark.parametrize("name", BACKENDS)
def test_every_row_equals_its_truth(name: str, seeds: range) -> None:
    for seed in seeds:
        with peftrt.backend(multi_lora_linear=name):
            check_rows(Batch(seed))


@pytest.mark.parametrize("name", BACKENDS)
def test_gradients_equal_their_truth(name: str, seeds: range) -> None:
    """And an adapter's, bit for bit, those of its own rows alone."""
    for seed in seeds:
        with peftrt.backend(multi_lora_linear_backward=name, nf4_linear_dx=name):
            check_gradients(Batch(seed), solo=name == "native")


@pytest.mark.parametrize("name", [NATIVE])
def test_a_row_does_not_depend_on_its_neighbours(name: str, seeds: range) -> None:
    """Bit for bit, under any permutation, and whatever the other rows hold and whom they belong to."""
    for seed in seeds:
        batch = Batch(seed)
        with peftrt.backend(multi_lora_linear=name), named(batch):
            y = run(batch)
            order = torch.randperm(batch.m, generator=torch.Generator().manual_seed(seed))
            assert_same_bits(run(batch, order), y[order])
            if batch.m > 1:
                kept = batch.m // 2
                batch.x[kept:] = batch.x[kept:].flip(0) * 3
                batch.slot_ids[kept:] = batch.slot_ids[kept:].roll(1)
                assert_same_bits(run(batch)[:kept], y[:kept])


@pytest.mark.parametrize("name", [NATIVE])
def test_a_row_alone_has_the_bits_of_a_batch_where_bits_count(name: str, seeds: range) -> None:
    for seed in seeds:
        batch = Batch(seed, large=False)
        with peftrt.backend(multi_lora_linear=name), peftrt.batch_invariant(), named(batch):
            y = run(batch)
            for i in range(0, batch.m, max(batch.m // 4, 1)):
                assert_same_bits(run(batch, torch.tensor([i])), y[i : i + 1])
