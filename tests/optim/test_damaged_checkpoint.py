"""Checkpoints that are damaged, or of something else: an error that names the file, and nothing is changed."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from peftrt.formats import stream
from peftrt.formats.errors import FormatError
from peftrt.formats.safe import TensorReader, write_tensors
from peftrt.optim import PagedAdamW
from tests.optim.conftest import NAME
from tests.optim.stateful import IDLE, PAGE, everything, make, parameters


def flipped(path: Path, byte: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    data[byte] ^= 1 << bit
    path.write_bytes(data)


def places(path: Path) -> dict[str, int]:
    """A byte of each part of a file."""
    with TensorReader(path, allow_nonfinite=True) as reader:
        entries = reader.entries
        header = path.read_bytes()[: next(iter(entries.values())).start]
        return {
            "length": 0,
            "length, its high end": 7,
            "header, its first byte": 8,
            "a name": header.index(b"state.0.exp_avg_q") + 6,
            "a dtype": header.index(b'"U8"') + 2,
            "a shape": header.index(b'"shape":[') + 9,
            "an offset": header.index(b'"data_offsets":[') + 17,
            "a hyper-parameter": header.index(b"weight_decay") + 16,
            "a step": header.index(b'"steps":"[') + 10,
            "the version": header.index(b'"version":"') + 11,
            "padding": len(header) - 1,
            "codes": entries["state.0.exp_avg_q"].start + 5000,
            "scales": entries["state.0.exp_avg_absmax"].start + 3,
            "fp32": entries["state.1.exp_avg_sq"].start + 2,
            "extra": entries["extra.0"].start + 1,
            "the last before the checksum": entries["sha256"].start - 1,
            "the checksum": entries["sha256"].start,
            "the checksum's end": path.stat().st_size - 1,
        }


@pytest.mark.parametrize("bit", [0, 5, 7])
def test_one_flipped_bit_is_found(saved: Path, bit: int) -> None:
    optimizer = make(bits=8, steps=1)
    before, good = everything(optimizer), saved.read_bytes()
    for place, byte in places(saved).items():
        flipped(saved, byte, bit)
        with pytest.raises(FormatError, match=NAME) as caught:
            optimizer.load(saved)
        if byte >= places_of_data(good):
            assert "the checksum is" in str(caught.value), place
        assert everything(optimizer) == before, place
        saved.write_bytes(good)
    optimizer.load(saved)


def places_of_data(data: bytes) -> int:
    return 8 + int.from_bytes(data[:8], "little")


def test_any_flipped_bit_is_found(saved: Path) -> None:
    optimizer = make(bits=8, steps=1)
    generator = torch.Generator().manual_seed(3)
    before, good = everything(optimizer), saved.read_bytes()
    header = places_of_data(good)
    spots = torch.cat(
        [torch.randint(0, header, (60,), generator=generator), torch.randint(0, len(good), (60,), generator=generator)]
    )
    for byte in spots.tolist():
        flipped(saved, byte, byte % 8)
        with pytest.raises(FormatError, match=NAME):
            optimizer.load(saved)
        saved.write_bytes(good)
    assert everything(optimizer) == before


@pytest.mark.parametrize("keep", [0, 7, 8, 100, 0.3, 0.9, -33, -32, -1])
def test_a_truncated_file_is_refused(saved: Path, keep: float) -> None:
    data = saved.read_bytes()
    saved.write_bytes(data[: int(keep * len(data)) if isinstance(keep, float) else keep])
    optimizer = make(bits=8, steps=1)
    before = everything(optimizer)
    with pytest.raises(FormatError, match=NAME):
        optimizer.load(saved)
    assert everything(optimizer) == before


def test_bytes_behind_the_end_are_refused(saved: Path) -> None:
    saved.write_bytes(saved.read_bytes() + b"\0")
    with pytest.raises(FormatError, match="trailing"):
        make(bits=8).load(saved)


def signed(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """A file with a good checksum."""
    promises = [stream.Promise(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]
    stream.write_stream(path, promises, tensors.values(), metadata, checksum="sha256")


FAULTS: dict[str, tuple[Callable[[dict[str, Tensor], dict[str, str]], Any], str]] = {
    "another's": (lambda t, m: m.update(kind="someone's"), "expected a file with metadata"),
    "a later version": (lambda t, m: m.update(version="2"), "expected a file with metadata"),
    "no groups": (lambda t, m: m.pop("param_groups"), "param_groups: not valid JSON"),
    "no steps": (lambda t, m: m.pop("steps"), "steps: not valid JSON"),
    "a step fewer": (lambda t, m: m.update(steps="[1, 1]"), "steps must be 9 whole numbers"),
    "half a step": (lambda t, m: m.update(steps=str([0.5] * 9)), "steps must be 9 whole numbers"),
    "steps back": (lambda t, m: m.update(steps=str([-1] * 9)), "steps must be 9 whole numbers"),
    "steps without end": (lambda t, m: m.update(steps=str([1 << 63] * 9)), "steps must be 9 whole numbers"),
    "groups that are none": (lambda t, m: m.update(param_groups="3"), "expected 2 groups, got int"),
    "a tensor missing": (lambda t, m: t.pop("state.8.exp_avg_sq_q"), "state of parameter 8: expected"),
    "a tensor more": (lambda t, m: t.update({"state.8.more": torch.zeros(1)}), "'state.8.more' is neither"),
    "state without a step": (lambda t, m: t.update({f"state.{IDLE}.exp_avg": torch.zeros(300)}), "is neither"),
    "another shape": (lambda t, m: t.update({"state.1.exp_avg": torch.zeros(6)}), r"parameter 1: .*\[5\], got .*\[6\]"),
    "another dtype": (
        lambda t, m: t.update({"state.1.exp_avg": torch.zeros(5, dtype=torch.float64)}),
        "float32 of shape .*, got torch.float64",
    ),
    "scales missing": (lambda t, m: t.update({"state.8.exp_avg_absmax": torch.zeros(19)}), r"\[20\], got .*\[19\]"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_file_that_does_not_fit_changes_nothing(saved: Path, fault: str) -> None:
    apply, message = FAULTS[fault]
    with TensorReader(saved, allow_nonfinite=True) as reader:
        tensors = {name: reader.read(name) for name in reader.entries if name != "sha256"}
        metadata = dict(reader.metadata)
    signed(saved, tensors, metadata)
    optimizer = make(bits=8, steps=1)
    optimizer.load(saved)
    optimizer = make(bits=8, steps=1)
    before = everything(optimizer)
    apply(tensors, metadata)
    signed(saved, tensors, metadata)
    with pytest.raises(FormatError, match=rf"{NAME}: .*{message}"):
        optimizer.load(saved)
    assert everything(optimizer) == before


def test_another_models_file_is_refused(saved: Path) -> None:
    for shapes, message in (
        ([(3,)], "expected 1 groups, got 2"),
        ([(3,), (4,)], r"param_groups\[0\]: expected 1 parameters, got 4"),
    ):
        params = parameters(shapes=shapes)
        optimizer = PagedAdamW([{"params": [p]} for p in params], page_size=PAGE)
        with pytest.raises(ValueError, match=message):
            optimizer.load(saved)
    write_tensors(saved, {"a": torch.ones(3)})
    with pytest.raises(FormatError, match="expected a checksum"):
        make().load(saved)


def test_a_checksum_must_be_at_the_end(saved: Path) -> None:
    write_tensors(saved, {"sha256": torch.zeros(32, dtype=torch.uint8), "z": torch.zeros(3, dtype=torch.uint8)})
    with pytest.raises(FormatError, match="expected a checksum"):
        make().load(saved)
