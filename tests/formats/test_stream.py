"""write_stream: what is promised is written, with a checksum where one is asked for; and reading parts of a tensor."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor

from peftrt.formats.errors import FormatError
from peftrt.formats.safe import TensorReader, read_tensors
from peftrt.formats.stream import Promise, verify_checksum, write_stream

PROMISES = [Promise("a", torch.float32, (2, 3)), Promise("b", torch.bfloat16, ()), Promise("c", torch.uint8, (0, 4))]


def tensors() -> list[Tensor]:
    return [
        torch.arange(6.0).view(3, 2).t(),
        torch.tensor(2.5, dtype=torch.bfloat16),
        torch.zeros(0, 4).to(torch.uint8),
    ]


@pytest.mark.parametrize("checksum", [None, "sum"])
def test_what_is_promised_is_written(tmp_path: Path, checksum: str | None) -> None:
    path = tmp_path / "x.safetensors"
    write_stream(path, PROMISES, tensors(), {"note": "é"}, checksum)
    found = read_tensors(path)
    assert list(found)[:3] == ["a", "b", "c"]
    for promise, tensor in zip(PROMISES, tensors(), strict=True):
        assert found[promise.name].dtype == promise.dtype
        assert torch.equal(found[promise.name], tensor)
    with TensorReader(path) as reader:
        assert reader.metadata == {"note": "é"}
        if checksum is None:
            assert list(found) == ["a", "b", "c"]
            with pytest.raises(FormatError, match="expected a checksum"):
                verify_checksum(reader, "sum")
        else:
            assert bytes(found["sum"].tolist()) == hashlib.sha256(path.read_bytes()[:-32]).digest()
            verify_checksum(reader, "sum")
            with pytest.raises(FormatError, match=r"expected a checksum, uint8 .* 'other'"):
                verify_checksum(reader, "other")


def test_a_checksum_over_many_pieces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("peftrt.formats.stream._CHUNK", 64)
    path = tmp_path / "x.safetensors"
    write_stream(path, [Promise("a", torch.uint8, (1000,))], [torch.arange(1000).to(torch.uint8)], checksum="sum")
    data = path.read_bytes()
    for place in range(0, len(data), 37):
        path.write_bytes(data[:place] + bytes([data[place] ^ 16]) + data[place + 1 :])
        with pytest.raises(FormatError), TensorReader(path) as reader:
            verify_checksum(reader, "sum")
    path.write_bytes(data)
    with TensorReader(path) as reader:
        verify_checksum(reader, "sum")
        os.utime(path, ns=(1, 1))
        with pytest.raises(FormatError, match="changed while it was read"):
            verify_checksum(reader, "sum")


def test_each_tensor_is_asked_for_when_the_one_before_is_written(tmp_path: Path) -> None:
    path, sizes = tmp_path / "x.safetensors", []

    def source() -> Iterator[Tensor]:
        for _ in range(3):
            sizes.append(sum(os.path.getsize(tmp_path / name) for name in os.listdir(tmp_path)))
            yield torch.zeros(1 << 20, dtype=torch.uint8)

    write_stream(path, [Promise(name, torch.uint8, (1 << 20,)) for name in "abc"], source(), checksum="sum")
    assert [size >> 20 for size in sizes] == [0, 1, 2]


@pytest.mark.parametrize("place", [0, 1])
def test_a_promise_that_is_not_kept_leaves_nothing(tmp_path: Path, place: int) -> None:
    wrong = tensors()
    wrong[place] = wrong[place].double()
    with pytest.raises(FormatError, match=r"expected torch\..* got torch.float64"):
        write_stream(tmp_path / "x.safetensors", PROMISES, wrong, checksum="sum")
    with pytest.raises(FormatError, match="cannot be written, or not twice"):
        write_stream(tmp_path / "x.safetensors", PROMISES, tensors(), checksum="a")
    assert not os.listdir(tmp_path)


def test_a_part_of_a_tensor(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    write_stream(path, PROMISES, tensors())
    with TensorReader(path) as reader:
        flat = tensors()[0].reshape(-1)
        for first in range(7):
            for count in range(7 - first):
                assert torch.equal(reader.read_range("a", first, count), flat[first : first + count])
        for first, count in ((0, 7), (6, 1), (-1, 2), (2, -1)):
            with pytest.raises(ValueError, match=r"tensor 'a' of shape \[2, 3\] has no"):
                reader.read_range("a", first, count)
        with pytest.raises(KeyError):
            reader.read_range("z", 0, 0)
