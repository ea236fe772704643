"""An int32 of each device that kernels set where what they were given is wrong, read without waiting for them."""

from __future__ import annotations

import threading

import torch
from torch import Tensor

_flags: dict[torch.device, Tensor] = {}
_lock = threading.Lock()


def flag(device: torch.device) -> Tensor:
    """The device's flag: int32 [1] in memory of the host that the device can write; always the same one.

    The first call of a device allocates it, which a CUDA graph's capture may refuse: as with every kernel, the first
    call comes before that.
    """
    found = _flags.get(device)
    if found is not None:
        return found
    with _lock, torch.inference_mode(False):
        if device not in _flags:
            _flags[device] = torch.zeros(1, dtype=torch.int32, pin_memory=device.type == "cuda")
        return _flags[device]


def raise_if_set(op: str, device: torch.device) -> None:
    """Clears the flag, and raises if a kernel has set it by now. Nothing is waited for.

    Raises:
        ValueError: an earlier call on the device had a slot id that is no slot.
    """
    found = _flags.get(device)
    if found is not None and int(found):
        found.zero_()
        raise ValueError(
            f"{op}: slot_ids must be in -1 ... E - 1: those of an earlier call on {device} were not, and its rows with "
            "such ids had the base alone"
        )
