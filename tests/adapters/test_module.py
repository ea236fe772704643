"""An adapted model is still a module: copies, state dicts, torch.compile."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

import peftrt
from tests.adapters.tiny import NAMES, build, logits, two_adapters
from tests.tolerances import assert_close, assert_same_bits


class TestModule:
    """An adapted model is still a module like any other."""

    @pytest.mark.parametrize("quantize", [None, "nf4"])
    @pytest.mark.parametrize("through", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
    def test_copies(self, through: Any, quantize: str | None) -> None:
        model = two_adapters("bert", quantize, modules_to_save=["classifier"])
        peftrt.set_active(model, {"fr": 1.0, "de": 0.5})
        copied = through(model)
        assert_same_bits(logits(copied), logits(model))
        before = logits(model)
        peftrt.set_active(copied, None)
        with peftrt.rows(copied, NAMES):
            mixed = logits(copied)
        with peftrt.rows(model, NAMES):
            assert_same_bits(logits(model), mixed)
        peftrt.remove(copied, "fr")
        assert peftrt.adapter_names(model) == ("fr", "de")
        assert_same_bits(logits(model), before)

    @pytest.mark.parametrize("quantize", [None, "nf4"])
    def test_state_dict(self, quantize: str | None) -> None:
        model = two_adapters("bert", quantize, modules_to_save=["classifier"])
        state = model.state_dict()
        # the base's keys are what they were
        assert set(build("bert").state_dict()) <= set(state)
        assert {"classifier.copy@fr.weight", "classifier.copy@fr.bias"} < set(state)
        torch.manual_seed(99)
        other = two_adapters("bert", quantize, modules_to_save=["classifier"])
        with torch.no_grad():
            for parameter in other.parameters():
                if parameter.is_floating_point():
                    parameter.add_(1.0)
        other.load_state_dict(state)
        for name in ("fr", "de"):
            peftrt.set_active(model, name)
            peftrt.set_active(other, name)
            assert_same_bits(logits(other), logits(model))

    def test_a_dense_checkpoint_loads_into_a_quantised_model(self) -> None:
        model = two_adapters("bert", "nf4", modules_to_save=["classifier"])
        peftrt.set_active(model, None)
        expected = logits(model)
        base = build("bert").state_dict()
        result = model.load_state_dict(base, strict=False)
        assert not result.unexpected_keys
        assert all("lora_" in key or "copy@" in key for key in result.missing_keys)
        assert_same_bits(logits(model), expected)

    def test_compile_without_a_break(self) -> None:
        class Small(nn.Module):
            def __init__(self) -> None:
                super().__init__()
                self.up, self.head = nn.Linear(64, 64), nn.Linear(64, 4)

            def forward(self, x: torch.Tensor) -> torch.Tensor:
                return self.head(self.up(x).relu())

        model = Small()
        changes = {"r": 2, "init_lora_weights": False, "modules_to_save": ["head"]}
        peftrt.adapt(model, peftrt.LoraConfig(target_modules=["up"], **changes), name="fr", quantize="nf4")
        x = torch.randn(3, 64)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with peftrt.rows(model, ["fr"] * 3):  # a block in the past must not matter
            model(x).sum().backward()
        model.zero_grad()
        assert_close(compiled(x), model(x))
        compiled(x).sum().backward()
        got = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        model.zero_grad()
        model(x).sum().backward()
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                assert_close(got[name], parameter.grad)
        # functions of peftrt take the compiled model, too
        peftrt.set_active(compiled, None)
        assert peftrt.active_adapters(model) == {}
        assert_close(compiled(x), model(x))
