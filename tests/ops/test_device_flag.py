"""The flag that a device's kernels set: read without waiting, cleared when it is told."""

from __future__ import annotations

import pytest
import torch

from peftrt.ops import _device_flag

DEVICE = torch.device("cuda", 0)


@pytest.fixture
def flag(monkeypatch: pytest.MonkeyPatch) -> torch.Tensor:
    """That of a device that need not be there."""
    empty = torch.zeros(1, dtype=torch.int32)
    monkeypatch.setattr(_device_flag, "_flags", {DEVICE: empty})
    return empty


def test_it_is_allocated_once_in_pinned_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    made = []

    def zeros(*size: int, pin_memory: bool, dtype: torch.dtype) -> torch.Tensor:
        assert pin_memory
        made.append(torch.ones(*size, dtype=dtype) - 1)
        return made[-1]

    monkeypatch.setattr(_device_flag, "_flags", {})
    monkeypatch.setattr(_device_flag.torch, "zeros", zeros)
    first, again = _device_flag.flag(DEVICE), _device_flag.flag(DEVICE)
    other = _device_flag.flag(torch.device("cuda", 1))
    assert first is again
    assert other is not first
    assert len(made) == 2
    assert (first.dtype, first.tolist()) == (torch.int32, [0])


def test_it_is_told_once(flag: torch.Tensor) -> None:
    _device_flag.raise_if_set("multi_lora_linear", DEVICE)
    _device_flag.raise_if_set("multi_lora_linear", torch.device("cuda", 1))
    flag.fill_(1)
    with pytest.raises(ValueError, match=r"multi_lora_linear: slot_ids .* an earlier call on cuda:0"):
        _device_flag.raise_if_set("multi_lora_linear", DEVICE)
    _device_flag.raise_if_set("multi_lora_linear", DEVICE)
