"""An optimizer's cells: the truth is AdamW, the floors count what is moved, and what is moved arrives."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

from bench import bench_paged_adamw, links, measure, peers, truth
from bench.bench_paged_adamw import OPTIONS, Training, cells
from bench.ceilings import Ceilings
from bench.peers import torchao_offload
from peftrt.formats import adamw_state
from tests.tolerances import assert_close

QUICK = {cell.id: cell for cell in cells("cpu", quick=True)}


def _training(cell_id: str, folder: Any) -> Training:
    return Training(QUICK[cell_id], "cpu", str(folder), 0)


def test_the_truth_is_adamw() -> None:
    parameter = nn.Parameter(torch.randn(300, dtype=torch.float64))
    values = parameter.detach().clone(), torch.zeros(300), torch.zeros(300)
    optimizer = torch.optim.AdamW([parameter], **OPTIONS)
    for step in range(1, 4):
        parameter.grad = torch.randn(300, dtype=torch.float64)
        optimizer.step()
        values = truth.adamw(values, parameter.grad, step, **OPTIONS)
    assert_close(values[0], parameter.detach())


@pytest.mark.parametrize("codebook", [adamw_state.EXP_AVG_MAP, adamw_state.EXP_AVG_SQ_MAP])
def test_eight_bits_as_the_format_has_them(codebook: torch.Tensor) -> None:
    values = torch.randn(2, 512)
    values = values.square() if codebook.min() >= 0 else values
    codes, scale = adamw_state.quantize(values.view(-1), codebook)
    expected = adamw_state.dequantize(codes, scale, codebook).view_as(values)
    assert_close(truth.eight_bits(values, codebook).float(), expected)


def test_a_cell_holds_and_moves_what_its_formulas_say(tmp_path: Any) -> None:
    for name, resident in (("32bit-rho0.5-fp32-12x8192", False), ("8bit-resident-bf16-1x131072", True)):
        cell, training = QUICK[name], _training(name, tmp_path)
        made: list[Any] = []
        contender = _recorded(training, made)
        contender.calls[0]()
        before = made[0].stats()
        contender.calls[0]()
        after = made[0].stats()
        moved = cell.evaluate(cell.moved) if cell.moved else 0
        assert after.bytes_in - before.bytes_in == after.bytes_out - before.bytes_out == moved
        assert (moved == 0) is resident
        assert (after.pages, after.device_bytes) == (cell.describe()["W"], contender.resident)
        assert after.device_bytes <= after.budget < after.device_bytes + after.page_bytes


def _recorded(training: Training, made: list[Any]) -> measure.Contender:
    """peftrt's contender, and the optimizer that it made."""
    plain = bench_paged_adamw.PagedAdamW

    def make(*args: Any, **options: Any) -> Any:
        made.append(plain(*args, **options))
        return made[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bench_paged_adamw, "PagedAdamW", make)
        return training.own()


def test_bytes_an_element() -> None:
    """Parameters and gradients of 4 or 2 bytes; state of 8, or of 2 and a scale a block, read and written."""
    per_element = {"32bit-resident-fp32": 28, "32bit-resident-bf16": 22, "8bit-resident-bf16": 10.0625}
    for name, expected in per_element.items():
        cell = QUICK[f"{name}-12x8192"]
        assert cell.evaluate(cell.bytes) / (12 * 8192) == expected


def test_a_floor_is_the_slowest_of_its_ways() -> None:
    limits = Ceilings(100.0, 1.0, "float32", link_gb_s=5.0, host_copy_gb_s=20.0)
    assert limits.floor(1e11, 0) == 1.0
    assert limits.floor(1e11, 0, 1e10) == 2.0
    assert Ceilings(100.0, 1.0, "float32", 50.0, 10.0).floor(1e11, 0, 1e10) == 2.0


@pytest.mark.parametrize(("name", "value"), [("lr", 1.2e-2), ("weight_decay", 5.0), ("betas", (0.5, 0.999))])
def test_a_wrong_step_is_seen(tmp_path: Any, name: str, value: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With the loosest tolerance, that of bf16 and 8 bits."""
    training = _training("8bit-resident-bf16-12x8192", tmp_path)
    measure.check("right", training.own())
    monkeypatch.setitem(OPTIONS, name, value)
    with pytest.raises(measure.WrongResultError):
        measure.check("wrong", training.own())


def test_pages_of_a_file_are_moved() -> None:
    link = links.FileLink(pages=3, page_bytes=8192)
    link.arrived.zero_()
    assert torch.equal(link.run().double(), links.content(8192, "cpu"))


class Offload:
    """As torchao's: hooks take gradients away, the step is on other tensors, which are copied back."""

    def __init__(self, params: Any, optimizer_class: Any, *, offload_gradients: bool, **options: Any) -> None:
        assert offload_gradients
        self.pairs = [(p, nn.Parameter(p.detach().clone())) for p in params]
        self.optimizers = [optimizer_class([host], **options) for _, host in self.pairs]
        self.queue: list[Any] = []
        for pair in self.pairs:
            pair[0].register_post_accumulate_grad_hook(lambda p, pair=pair: self._take(*pair))

    def _take(self, parameter: nn.Parameter, host: nn.Parameter) -> None:
        assert parameter.grad is not None
        host.grad, parameter.grad = parameter.grad.clone(), None
        self.queue.append(parameter)

    def step(self) -> None:
        assert len(self.queue) == len(self.pairs)
        self.queue.clear()
        for optimizer, (parameter, host) in zip(self.optimizers, self.pairs, strict=True):
            optimizer.step()
            with torch.no_grad():
                parameter.copy_(host)


def test_torchao_gets_its_gradients_from_a_backward(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchao_offload, "need_gpu", lambda device: None)
    monkeypatch.setattr(torchao_offload, "need", lambda name: SimpleNamespace(CPUOffloadOptimizer=Offload))
    training = _training("32bit-rho0-fp32-12x8192", tmp_path)
    contender = training.torchao()
    measure.check("torchao", contender)
    contender.calls[0]()


def test_what_pages_in_managed_memory_is_for_a_gpu(tmp_path: Any) -> None:
    with pytest.raises(peers.UnavailableError, match="need a GPU"):
        _training("32bit-resident-fp32-12x8192", tmp_path).bitsandbytes(paged=True)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_every_share_is_another_number_of_pages(device: str) -> None:
    made = cells(device, quick=False)
    assert len(made) == len({cell.id for cell in made}) == 2 * 2 * 2 * 4
    for first in range(0, len(made), 4):
        sizes = [cell.describe_size() for cell in made[first : first + 4]]
        slots = [size["X"] for size in sizes]
        assert slots == sorted(set(slots), reverse=True)
        assert (slots[0], slots[-1]) == (sizes[0]["W"], 3)
