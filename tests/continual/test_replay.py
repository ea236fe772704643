"""ReplayBuffer: what it keeps is fair, what it draws is mixed in whole, and it goes on bit for bit."""

from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

from peftrt.continual import ReplayBuffer
from peftrt.formats.errors import FormatError, MissingFileError
from peftrt.formats.safe import write_tensors


def values(buffer: ReplayBuffer) -> list[int]:
    return [int(sample) for sample in buffer]


def chi_square(counts: np.ndarray, rounds: int, share: float) -> float:
    """Chi-square of n - 1 degrees of freedom, where n samples are chosen ``rounds`` times with probability ``share``.

    A choice of a fixed number has variance ``share (1 - share)`` a sample, and samples stand in one another's way.
    """
    expected = rounds * share
    return float(((counts - expected) ** 2).sum() / (expected * (1 - share)) * (len(counts) - 1) / len(counts))


def test_a_reservoir_is_uniform() -> None:
    """4000 buffers of 8 out of 40: each sample is kept 800 times, give or take.

    Chi-square with 39 degrees of freedom is beyond 72.1 one time in 1000, with 7 beyond 24.3.
    """
    kept = np.zeros(40)
    places = np.zeros((8, 40))
    for seed in range(4000):
        buffer = ReplayBuffer(8, seed=seed)
        buffer.add(torch.arange(40))
        assert len(set(values(buffer))) == 8
        kept[values(buffer)] += 1
        places[range(8), values(buffer)] += 1
    assert chi_square(kept, 4000, 8 / 40) < 72.1
    # where the last sample is kept, it is in any slot alike
    last = places[:, 39]
    assert chi_square(last, int(last.sum()), 1 / 8) < 24.3


def test_a_class_of_a_balanced_buffer_is_uniform() -> None:
    """Of 60 samples of class 0, then 12 of class 1, each class's 6 places go to its samples alike."""
    kept = np.zeros(72)
    labels = torch.tensor([0] * 60 + [1] * 12)
    for seed in range(3000):
        buffer = ReplayBuffer(12, "class-balanced", seed)
        buffer.add(torch.arange(72), labels)
        assert buffer.counts == {0: 6, 1: 6}
        kept[values(buffer)] += 1
    # 59 and 11 degrees of freedom: 98.3 and 31.3 are passed one time in 1000
    assert chi_square(kept[:60], 3000, 6 / 60) < 98.3
    assert chi_square(kept[60:], 3000, 6 / 12) < 31.3


@pytest.mark.parametrize("order", ["one by one", "shuffled", "largest first"])
def test_classes_with_enough_samples_hold_equally_many(order: str) -> None:
    sizes = {3: 500, -7: 40, 11: 200, 0: 2, 5: 60}
    labels = [label for label, count in sizes.items() for _ in range(count)]
    if order == "one by one":
        labels.sort()
    elif order == "shuffled":
        random.Random(1).shuffle(labels)
    buffer = ReplayBuffer(43, "class-balanced", 0)
    buffer.add(torch.arange(len(labels)), labels)
    # two of the class that has two; 41 places for four others
    counts = buffer.counts
    assert counts.pop(0) == 2
    assert sorted(counts.values()) == [10, 10, 10, 11]
    assert len(buffer) == 43
    assert buffer.seen == len(labels)
    assert all(labels[value] == label for value, label in zip(values(buffer), buffer._labels, strict=True))


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced"])
def test_cutting_into_batches_changes_nothing(policy: str) -> None:
    whole, parts = ReplayBuffer(10, policy, 4), ReplayBuffer(10, policy, 4)
    data, labels = torch.arange(100), torch.arange(100) % 3 if policy == "class-balanced" else None
    whole.add(data, labels)
    for start in (0, 1, 8, 9, 50):
        end = {0: 1, 1: 8, 8: 9, 9: 50, 50: 100}[start]
        parts.add(data[start:end], None if labels is None else labels[start:end])
    assert values(whole) == values(parts)
    assert torch.equal(whole.sample(5), parts.sample(5))
    other = ReplayBuffer(10, policy, 5)
    other.add(data, labels)
    assert values(other) != values(whole)


def test_samples_are_copies_in_the_form_they_came_in() -> None:
    ids = torch.arange(12).view(4, 3)
    for batch in (ids, {"ids": ids, "n": np.arange(4)}, (ids, torch.arange(4)), [ids, torch.arange(4)]):
        buffer = ReplayBuffer(4)
        buffer.add(batch)
        drawn, one = buffer.sample(2), next(iter(buffer))
        assert type(drawn) is type(one) is (tuple if isinstance(batch, list) else type(batch))
        first = drawn if isinstance(drawn, Tensor) else drawn["ids"] if isinstance(drawn, dict) else drawn[0]
        assert first.shape == (2, 3)
        if isinstance(drawn, dict):
            assert (drawn["ids"][:, 0] // 3).tolist() == drawn["n"].tolist(), "samples were taken apart"
    before = [sample[0].tolist() for sample in buffer]
    ids.zero_()
    assert [sample[0].tolist() for sample in buffer] == before
    assert buffer.nbytes == 4 * (3 + 1) * 8


def test_a_sample_is_drawn_once_in_a_batch_and_all_are_drawn_alike() -> None:
    buffer = ReplayBuffer(10)
    buffer.add(torch.arange(10))
    drawn = np.zeros(10)
    for _ in range(2000):
        batch = buffer.sample(3).tolist()
        assert len(set(batch)) == 3
        drawn[batch] += 1
    # 9 degrees of freedom, one time in 1000
    assert chi_square(drawn, 2000, 3 / 10) < 27.9
    assert sorted(buffer.sample(10).tolist()) == list(range(10))


@pytest.mark.parametrize(("share", "more"), [(0.5, 8), (0.2, 2), (0.05, 0), (0.9, 12)])
def test_mixed_batches_hold_their_share(share: float, more: int) -> None:
    buffer = ReplayBuffer(12)
    buffer.add({"x": -torch.arange(1, 13), "y": torch.ones(12, 2)})
    data = TensorDataset(torch.arange(16), torch.zeros(16, 2))
    batches = ({"y": y, "x": x} for x, y in DataLoader(data, batch_size=8))
    found = list(buffer.mix(batches, share))
    for start, batch in zip((0, 8), found, strict=True):
        assert batch["x"][:8].tolist() == list(range(start, start + 8))
        assert len(batch["x"]) == len(batch["y"]) == 8 + more
        assert (batch["x"][8:] < 0).all()
        assert batch["y"].sum() == 2 * more
    assert more == 0 or found[0]["x"][8:].tolist() != found[1]["x"][8:].tolist()


def test_before_anything_was_added_batches_are_as_they_were() -> None:
    buffer = ReplayBuffer(4)
    data = [torch.arange(3), torch.arange(2)]
    assert all(new is batch for new, batch in zip(buffer.mix(data, 0.5), data, strict=True))
    assert [old for _, old in buffer.beside(data, 2)] == [None, None]
    # what is added on the way is replayed from then on
    sizes = []
    for batch in buffer.mix(data, 0.5):
        sizes.append(len(batch))
        buffer.add(batch)
    assert sizes == [3, 4]


def test_a_loss_of_its_own() -> None:
    buffer = ReplayBuffer(3)
    buffer.add(torch.tensor([[5.0], [6.0], [7.0]]))
    for new, old in buffer.beside([torch.zeros(4, 1)], 8):
        assert new.tolist() == [[0.0]] * 4
        assert sorted(old.flatten().tolist()) == [5.0, 6.0, 7.0]


def test_texts_of_several_lengths_are_filled_up() -> None:
    buffer = ReplayBuffer(4, padding={"ids": 9, "labels": -100})
    buffer.add({"ids": torch.ones(1, 2, dtype=torch.long), "labels": torch.ones(1, 2, dtype=torch.long)})
    buffer.add({"ids": torch.full((1, 4), 2), "labels": torch.full((1, 4), 2)})
    batch = buffer.sample(2)
    assert sorted(batch["ids"].tolist()) == [[1, 1, 9, 9], [2, 2, 2, 2]]
    assert sorted(batch["labels"].tolist()) == [[1, 1, -100, -100], [2, 2, 2, 2]]
    (mixed,) = buffer.mix([{"ids": torch.zeros(2, 3).long(), "labels": torch.zeros(2, 3).long()}], 0.5)
    assert mixed["ids"].shape == (4, 4)
    assert mixed["ids"][0].tolist() == [0, 0, 0, 9]
    assert mixed["labels"][1].tolist() == [0, 0, 0, -100]


@pytest.mark.parametrize("policy", ["reservoir", "class-balanced"])
@pytest.mark.parametrize("through", ["file", "state"])
def test_it_goes_on_bit_for_bit(policy: str, through: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)

    def batch(n: int) -> tuple[Any, Any]:
        ids = torch.randint(0, 99, (n, 1 + n % 4), generator=generator)
        labels = torch.randint(0, 4, (n,), generator=generator)
        data = {"ids": ids, "x": torch.randn(n, generator=generator).half(), "flag": labels > 1}
        return data, labels if policy == "class-balanced" else None

    straight = ReplayBuffer(9, policy, 3)
    for n in (3, 8, 5):
        straight.add(*batch(n))
    straight.sample(2)
    resumed = ReplayBuffer(9, policy, 77)
    if through == "file":
        straight.save(tmp_path / "replay.safetensors")
        resumed.load(tmp_path / "replay.safetensors")
    else:
        resumed.load_state_dict(straight.state_dict())
    for n in (7, 2, 11):
        data, labels = batch(n)
        straight.add(data, labels)
        resumed.add(data, labels)
        for ours, expected in zip(resumed.sample(6).values(), straight.sample(6).values(), strict=True):
            assert ours.dtype == expected.dtype
            assert torch.equal(ours, expected)
    assert resumed.counts == straight.counts
    assert resumed.seen == straight.seen == 36


def test_an_empty_buffer_is_saved_too(tmp_path: Path) -> None:
    ReplayBuffer(3, seed=5).save(tmp_path / "empty.safetensors")
    buffer, other = ReplayBuffer(3), ReplayBuffer(3, seed=5)
    buffer.load(tmp_path / "empty.safetensors")
    for each in (buffer, other):
        each.add(torch.arange(50))
    assert values(buffer) == values(other)


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 9)), max_size=12), st.integers(1, 7), st.integers(0, 99))
def test_whatever_comes_the_books_are_right(batches: list[tuple[int, int]], capacity: int, seed: int) -> None:
    buffer = ReplayBuffer(capacity, "class-balanced", seed)
    seen: list[int] = []
    for label, count in batches:
        buffer.add(torch.arange(len(seen), len(seen) + count), [label] * count)
        seen += [label] * count
        assert buffer.seen == len(seen)
        assert len(buffer) == min(capacity, len(seen)) == sum(buffer.counts.values())
        held = values(buffer)
        assert len(set(held)) == len(held)
        counts = {label: [seen[i] for i in held].count(label) for label in set(seen)}
        assert {label: count for label, count in buffer.counts.items() if count} == {
            label: count for label, count in counts.items() if count
        }
        largest = max(counts.values())
        for label, count in counts.items():
            # a class is behind the largest by more than one only where it has no more samples
            assert count >= min(seen.count(label), largest - 1)


def test_what_is_refused() -> None:
    def refused(call: Callable[[], Any], message: str, error: type[Exception] = ValueError) -> None:
        with pytest.raises(error, match=message):
            call()

    refused(lambda: ReplayBuffer(0), "capacity must be an integer of at least 1, got 0")
    refused(lambda: ReplayBuffer(True), "capacity must be an integer of at least 1, got True")
    refused(lambda: ReplayBuffer(4, "fifo"), "policy must be one of reservoir, class-balanced, got 'fifo'")
    refused(lambda: ReplayBuffer(4, seed=-1), "seed must be an integer from 0 on, got -1")
    buffer = ReplayBuffer(4)
    refused(lambda: buffer.sample(1), r"count must be in 1 \.\.\. 0")
    refused(lambda: buffer.add("text"), "a batch must be a tensor, .* got str", TypeError)
    refused(lambda: buffer.add({"a": [1, 2]}), "'a' must be a tensor or an array, got list", TypeError)
    refused(lambda: buffer.add(torch.tensor(1)), "with a batch dimension, got shape")
    refused(lambda: buffer.add((torch.zeros(2), torch.zeros(3))), "equally many samples, got {'0': 2, '1': 3}")
    refused(lambda: buffer.add(()), "equally many samples")
    refused(lambda: buffer.add(torch.zeros(2, dtype=torch.complex64)), "safetensors file cannot hold", TypeError)
    refused(lambda: buffer.add(torch.zeros(2), [0, 1]), "labels are for policy 'class-balanced'")
    buffer.add(torch.arange(3))
    before = buffer.state_dict()
    refused(
        lambda: buffer.add(torch.zeros(3)), r"expected a tensor \(: int64 of 0 dimensions .* got a tensor \(: float32"
    )
    refused(lambda: buffer.add(torch.zeros(3, 1).long()), "int64 of 1 dimensions")
    refused(lambda: list(buffer.mix([torch.zeros(3)], 0.5)), r"mix: expected a tensor \(: int64")
    refused(lambda: buffer.mix([], 1.0), "share must be between 0 and 1, got 1.0")
    refused(lambda: buffer.beside([], 0), "count must be an integer of at least 1, got 0")
    refused(lambda: buffer.sample(4), r"count must be in 1 \.\.\. 3, what is held, got 4")
    assert buffer.state_dict()["settings"] == before["settings"]
    balanced = ReplayBuffer(4, "class-balanced")
    refused(lambda: balanced.add(torch.zeros(2)), "'class-balanced' needs labels")
    refused(lambda: balanced.add(torch.zeros(2), [0]), r"labels must be integers \[2\], got int64 \[1\]")
    refused(lambda: balanced.add(torch.zeros(2), [0.5, 1.0]), r"labels must be integers \[2\], got float32 \[2\]")
    assert len(balanced) == balanced.seen == 0


def test_files_that_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "replay.safetensors"
    buffer = ReplayBuffer(4, seed=1)
    buffer.add(torch.arange(9))
    buffer.save(path)
    kept = values(buffer)

    def refused(message: str, error: type[Exception] = FormatError, reader: ReplayBuffer = buffer) -> None:
        with pytest.raises(error, match=message):
            reader.load(path)
        assert values(buffer) == kept

    refused("capacity must be 5, as here, got 4", reader=ReplayBuffer(5))
    refused("policy must be 'class-balanced', as here, got 'reservoir'", reader=ReplayBuffer(4, "class-balanced"))
    whole = path.read_bytes()
    flipped = bytearray(whole)
    flipped[-50] ^= 1
    path.write_bytes(bytes(flipped))
    refused("the file is damaged")
    path.write_bytes(whole[:-1])
    refused("replay.safetensors: ")
    write_tensors(path, {"labels": torch.zeros(4, dtype=torch.int64)})
    refused("expected a checksum")
    path.unlink()
    refused("no such file", MissingFileError)
    state = buffer.state_dict()
    for tensors, message in (
        ({".values": torch.arange(3)}, r"\.values must be torch\.int64 \[4\]"),
        ({".shapes": torch.zeros(3, 0, dtype=torch.int64)}, r"\.shapes must be int64 \[4, 0\]"),
        ({"labels": torch.zeros(5, dtype=torch.int64)}, r"\.shapes must be int64 \[5, 0\]"),
    ):
        with pytest.raises(ValueError, match=message):
            buffer.load_state_dict({**state, "tensors": {**state["tensors"], **tensors}})
    for settings, message in (
        ({"seen": [[0, 3]]}, "4 samples are held of {0: 3} seen"),
        ({"form": ["list", [""], ["I64"], [0]]}, "none of a batch"),
        ({"random": None}, "the state is incomplete|random"),
    ):
        with pytest.raises(ValueError, match=message):
            buffer.load_state_dict({**state, "settings": {**state["settings"], **settings}})
    assert values(buffer) == kept
