"""Layers that gradient checkpointing runs again do so as in their forward."""

from __future__ import annotations

import _thread
import threading

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import peftrt
from peftrt.nn import recompute
from tests.adapters.tiny import NAMES, tokens, two_adapters
from tests.tolerances import assert_same_bits


class Blocks(nn.Module):
    """Regions to checkpoint, in whichever way."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def region(self, x: torch.Tensor) -> torch.Tensor:
        return self.layers[2](self.layers[1](x).tanh()).relu()

    def forward(self, x: torch.Tensor, how: str = "plain") -> torch.Tensor:
        reentrant = "reentrant" in how.split()
        x = self.layers[0](x)
        if how == "plain":
            x = self.region(x)
        elif "nested" in how:
            x = checkpoint(lambda x: checkpoint(self.region, x, use_reentrant=reentrant), x, use_reentrant=reentrant)
        else:
            x = checkpoint(self.region, x, use_reentrant=reentrant)
        return self.layers[3](x.sin())


HOW = (
    "reentrant",
    "non-reentrant",
    "nested reentrant",
    "nested non-reentrant",
    "whole reentrant",
    "whole non-reentrant",
)


class TestCheckpointing:
    """What runs again in the backward does so as in its forward, although the block has ended."""

    @staticmethod
    def model() -> Blocks:
        model = Blocks()
        for name in ("fr", "de"):
            rest = {"r": 2, "init_lora_weights": False}
            peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear", **rest), name=name)
        for parameter in model.parameters():
            parameter.requires_grad_(True)
        return model

    @staticmethod
    def run(model: Blocks, x: torch.Tensor, how: str) -> torch.Tensor:
        if "whole" in how:
            return checkpoint(model, x, use_reentrant="reentrant" in how.split())
        return model(x, how)

    @staticmethod
    def grads(model: Blocks, *inputs: torch.Tensor) -> list[torch.Tensor]:
        found = [parameter.grad for parameter in model.parameters()] + [x.grad for x in inputs]
        for tensor in (*model.parameters(), *inputs):
            tensor.grad = None
        return found

    @pytest.mark.parametrize("inside", [False, True])
    @pytest.mark.parametrize("how", HOW)
    def test_two_blocks_in_one_backward(self, how: str, inside: bool) -> None:
        model = self.model()
        first, second, third = (torch.randn(3, 8, requires_grad=True) for _ in range(3))

        def step(how: str) -> list[torch.Tensor]:
            with peftrt.rows(model, NAMES):
                loss = self.run(model, first, how).sum()
            with peftrt.rows(model, ["fr", "fr", "de"]):
                loss = loss + 2 * self.run(model, second, how).sum()
                if inside:
                    loss.backward()
            if not inside:
                # and one outside of any block
                (loss + 3 * self.run(model, third, how).sum()).backward()
            return self.grads(model, first, second, third)

        for got, expected in zip(step(how), step("plain"), strict=True):
            if expected is None:
                assert got is None
            else:
                assert_same_bits(got, expected)

    @pytest.mark.parametrize("engines", [False, True])
    @pytest.mark.parametrize("how", ["reentrant", "non-reentrant", "nested reentrant"])
    def test_backward_in_another_thread(self, how: str, engines: bool) -> None:
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)
        with peftrt.rows(model, NAMES):
            self.run(model, x, "plain").sum().backward()
        expected = self.grads(model, x)
        with peftrt.rows(model, NAMES):
            loss = self.run(model, x, how).sum()
        if engines:
            # what torch's threads for a device are to Python: it did not start them
            done = threading.Event()
            _thread.start_new_thread(lambda: (loss.backward(), done.set()), ())
            assert done.wait(60)
        else:
            thread = threading.Thread(target=loss.backward)
            thread.start()
            thread.join()
        for got, want in zip(self.grads(model, x), expected, strict=True):
            assert_same_bits(got, want)

    def test_a_forward_whose_thread_cannot_be_told(self) -> None:
        """A number that this thread has given a node, too: an error, not another thread's routing."""
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)
        made = {}

        def forward() -> None:
            with peftrt.rows(model, NAMES):
                made["loss"] = self.run(model, x, "non-reentrant").sum()

        thread = threading.Thread(target=forward)
        thread.start()
        thread.join()
        for _ in range(100):
            x.sin()
        with pytest.raises(RuntimeError, match=r"call backward in the thread of the forward"):
            made["loss"].backward()

    @pytest.mark.parametrize("how", ["reentrant", "non-reentrant"])
    def test_a_block_inside_the_region(self, how: str) -> None:
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)

        def region(x: torch.Tensor) -> torch.Tensor:
            with peftrt.rows(model, NAMES):
                return model.region(x)

        region(x).sum().backward()
        expected = self.grads(model, x)
        with peftrt.rows(model, ["fr"] * 3):
            loss = checkpoint(region, x, use_reentrant=how == "reentrant").sum()
        loss.backward()
        for got, want in zip(self.grads(model, x), expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                assert_same_bits(got, want)

    def test_a_failed_backward_leaves_nothing_behind(self) -> None:
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)

        def fail(grad: torch.Tensor) -> None:
            raise RuntimeError("stop")

        with peftrt.rows(model, NAMES):
            hidden = model.layers[0](x)
            hidden.register_hook(fail)
            loss = checkpoint(model.region, hidden, use_reentrant=True).sum()
        with pytest.raises(RuntimeError, match="stop"):
            loss.backward()
        self.grads(model, x)
        self.run(model, x, "plain").sum().backward()
        expected = self.grads(model, x)
        self.run(model, x, "nested reentrant").sum().backward()
        for got, want in zip(self.grads(model, x), expected, strict=True):
            assert (got is None) == (want is None)
            if want is not None:
                assert_same_bits(got, want)

    def test_a_graph_older_than_what_is_remembered(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(recompute, "MAX_SPANS", 4)
        model = self.model()
        x = torch.randn(3, 8, requires_grad=True)
        with peftrt.rows(model, NAMES):
            old = self.run(model, x, "non-reentrant").sum()
        for _ in range(recompute.MAX_SPANS + 1):
            with peftrt.rows(model, NAMES):
                new = self.run(model, x, "non-reentrant").sum()
        new.backward()
        with pytest.raises(RuntimeError, match="more than 4 rows"):
            old.backward()

    def test_serving_remembers_nothing(self) -> None:
        model = self.model()

        def serve() -> None:
            with torch.no_grad(), peftrt.rows(model, NAMES):
                model(torch.randn(3, 8))
            kept.append(len(recompute._local.spans.spans))

        kept: list[int] = []
        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        assert kept == [0]

    @pytest.mark.parametrize("reentrant", [True, False])
    def test_hugging_face(self, reentrant: bool) -> None:
        model = two_adapters()
        for name, parameter in model.named_parameters():
            parameter.requires_grad_("lora_" in name)
        model.train()
        model.enable_input_require_grads()

        def step() -> dict[str, torch.Tensor]:
            with peftrt.rows(model, NAMES):
                loss = model(tokens(), labels=tokens()).loss
            loss.backward()
            found = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
            model.zero_grad()
            return found

        expected = step()
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        got = step()
        assert got.keys() == expected.keys()
        assert any("@de" in name for name in got)
        for name, value in expected.items():
            assert_same_bits(got[name], value)
