"""Paged optimizer state that leaves a device and comes back: the same bits as on a CPU, from torch's AdamW too."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from peftrt.optim import PagedAdamW
from tests.optim.stateful import PAGE, bits_of, make, named, parameters, train

OPTIONS: list[dict[str, Any]] = [{}, {"page_size": 4 * PAGE}, {"device_budget": "48KiB"}]


def moved(device: torch.device, dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    return [nn.Parameter(parameter.detach().to(device)) for parameter in parameters(dtype)]


@pytest.mark.parametrize("bits", [32, 8])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_it_goes_from_device_to_device(
    device: torch.device, tmp_path: Path, bits: int, options: dict[str, Any], dtype: torch.dtype
) -> None:
    host = make(bits=bits, params=parameters(dtype))
    there = make(bits=bits, params=moved(device, dtype), **options)
    assert bits_of(there.state_dict()) == bits_of(host.state_dict())
    for source, params in ((host, moved(device, dtype)), (there, parameters(dtype))):
        source.save(tmp_path / "state.safetensors", extra=named(source))
        other = make(bits=bits, params=params, steps=0, **options)
        for parameter, value in zip(params, other.load(tmp_path / "state.safetensors").values(), strict=True):
            parameter.data.copy_(value)
        train(params, other, range(3, 5))
        assert bits_of(other.state_dict()) == bits_of(continued(bits, dtype).state_dict())
        assert bits_of(list(other.parameters)) == bits_of(list(continued(bits, dtype).parameters))


def continued(bits: int, dtype: torch.dtype) -> PagedAdamW:
    optimizer = make(bits=bits, params=parameters(dtype))
    train(list(optimizer.parameters), optimizer, range(3, 5))
    return optimizer


@pytest.mark.parametrize("options", [{"foreach": True}, {"fused": True}, {"capturable": True}], ids=str)
def test_torchs_state_of_a_device_is_taken_and_given(device: torch.device, options: dict[str, bool]) -> None:
    if device.type == "cpu" and "capturable" in options:
        pytest.skip("torch has it for accelerators only")
    params, again = moved(device), moved(device)
    peer = torch.optim.AdamW([{"params": params[:4], "lr": 1e-2}, {"params": params[4:]}], **options)
    train(params, peer, range(3))
    optimizer = make(params=again, steps=0, **OPTIONS[2])
    optimizer.load_state_dict(peer.state_dict())
    for number, entry in optimizer.state_dict()["state"].items():
        assert bits_of(entry) == bits_of(peer.state_dict()["state"][number])
    other = torch.optim.AdamW([{"params": params[:4], "lr": 1e-2}, {"params": params[4:]}], **options)
    other.load_state_dict(optimizer.state_dict())
    assert bits_of(other.state_dict()["state"]) == bits_of(peer.state_dict()["state"])
    train(params, other, range(3, 5))
