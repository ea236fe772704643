"""Elastic weight consolidation of adapters that come, go, begin with the base, or are no LoRA."""

from __future__ import annotations

from typing import Any

import pytest

import peftrt
from peftrt.continual import EWC
from tests.continual.test_ewc import Net, batches, explicit, move, nll
from tests.tolerances import assert_close


def test_another_adapter_goes_on_from_the_first() -> None:
    """Task B gets an adapter of its own beside the frozen one of task A; the change since is its own."""
    model = Net()
    peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules=["hidden"]), name="a")
    move(model, 0.2)
    ewc = EWC(model, 1.0)
    ewc.consolidate(batches(), nll)
    fisher = ewc.state_dict()["tensors"]["0.layer.hidden.fisher"]
    peftrt.adapt(model, peftrt.LoraConfig(r=3, target_modules=["hidden"]), name="b")
    peftrt.set_active(model, {"a": 1.0, "b": 1.0})
    assert ewc.penalty().item() == 0.0
    move(model, 0.2)
    layer: Any = model.hidden
    assert_close(ewc.penalty().detach(), (fisher * layer.delta_weight("b") ** 2).sum(), roundings=4)
    ewc.penalty().backward()
    assert layer.adapter("b").lora_A.grad.any()
    assert layer.adapter("a").lora_A.grad is None
    # without any adapter the change since is that of the first, taken back
    peftrt.set_active(model, None)
    assert_close(ewc.penalty(), (fisher * layer.delta_weight("a") ** 2).sum(), roundings=4)


def test_a_part_of_the_base_that_an_adapter_began_with_belongs_to_its_change() -> None:
    """PiSSA: without the adapter the part comes back, and the change is what is between the two."""
    model = Net()
    peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules=["hidden"], init_lora_weights="pissa"))
    move(model, 0.05)
    ewc = EWC(model, 1.0)
    ewc.consolidate(batches(), nll)
    layer: Any = model.hidden
    fisher = ewc.state_dict()["tensors"]["0.layer.hidden.fisher"]
    expected = (fisher * (layer.adapted_weight({"default": 1.0}) - layer.adapted_weight({})) ** 2).sum()
    assert ewc.penalty().item() == 0.0
    peftrt.set_active(model, None)
    assert_close(ewc.penalty(), expected, roundings=4)


@pytest.mark.parametrize("method", ["ia3", "bottleneck", "dora"])
def test_other_methods_are_kept_by_their_parameters(method: str) -> None:
    model = Net()
    if method == "dora":
        peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules=["hidden"], use_dora=True))
    elif method == "ia3":
        peftrt.adapt(model, peftrt.IA3Config(target_modules=["hidden"], feedforward_modules=[]))
    else:
        config = peftrt.BottleneckConfig(placement="houlsby", reduction_factor=4, target_modules=["hidden"])
        peftrt.adapt(model, config)
    move(model, 0.1)
    ewc = EWC(model, 1.0)
    assert ewc.target == "parameters"
    ewc.consolidate(batches(), nll)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, value in explicit(model.eval(), trained, batches()).items():
        assert_close(ewc.state_dict()["tensors"][f"0.parameter.{name}.fisher"], value)
    move(model, 0.1)
    assert ewc.penalty() > 0
