"""Virtual tokens among other adapters: a row each, with LoRA, under checkpointing, in threads, copied and removed."""

from __future__ import annotations

import copy
import pickle
import threading
from typing import Any

import pytest
import torch
from torch import Tensor

import peftrt
from peftrt.nn.virtual import VirtualTokens
from tests.adapters import tiny
from tests.adapters.tiny import inputs_of, state_of, tokens
from tests.adapters.virtual import (
    GENERATING,
    KINDS,
    SIDES,
    WAYS,
    batch,
    build,
    config,
    hooks,
    logits_of,
    loss_of,
    text,
    without_dropout,
)
from tests.tolerances import assert_close, assert_same_bits

# of a batch of three; "fr" has more virtual tokens than "de"
BATCHES: list[list[str | None]] = [["fr", None, "de"], ["de", "de", "de"], [None, None, None], ["de", None, "de"]]


def two(kind: str, way: str, lora: bool = False) -> Any:
    """A model with the adapters "fr" and "de", in fp64: what is left of a difference is an error."""
    model = build(kind)
    if lora:
        peftrt.adapt(model, tiny.config(kind), name="lora")
    peftrt.adapt(model, config(way, 5), name="fr")
    peftrt.adapt(model, config(way, 3), name="de")
    return model.eval().double()


def alone(model: Any, names: list[str | None], ids: Tensor, mask: Tensor | None) -> Tensor:
    """Every row's logits by itself, with its adapter active."""
    found = []
    for row, name in enumerate(names):
        peftrt.set_active(model, name)
        found.append(logits_of(model, ids[row : row + 1], None if mask is None else mask[row : row + 1]))
    peftrt.set_active(model, None)
    return torch.cat(found)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
class TestRows:
    @pytest.mark.parametrize("attention", ["sdpa", "eager"])
    def test_each_row_as_alone(self, kind: str, way: str, attention: str) -> None:
        # written-out attention takes its softmax in fp32, where fp64's lowest number is minus infinity
        exact = attention == "sdpa"
        model = two(kind, way) if exact else two(kind, way).float()
        model.set_attn_implementation(attention)
        for side in SIDES:
            ids, mask = batch(side)
            for names in BATCHES:
                for seen in (mask, None) if side == "none" else (mask,):
                    with peftrt.rows(model, names):
                        found = logits_of(model, ids, seen)
                    assert_close(found, alone(model, names, ids, seen), roundings=1 if exact else 8)

    def test_another_length_than_the_batch(self, kind: str, way: str) -> None:
        model = two(kind, way)
        ids = tokens()
        for names in (["fr", None], ["fr"], [None, None, None, None]):
            with peftrt.rows(model, names), pytest.raises(ValueError, match="one name an entry"):
                model(ids, **inputs_of(model, ids))


@pytest.mark.parametrize("way", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", GENERATING)
def test_rows_generate(kind: str, way: str) -> None:
    model = two(kind, way)
    names: list[str | None] = ["fr", None, "de"]
    for side in ("none", "left"):
        ids, mask = batch(side)
        with peftrt.rows(model, names):
            found = text(model, ids, mask)
        for row, name in enumerate(names):
            peftrt.set_active(model, name)
            expected = text(model, ids[row : row + 1], mask[row : row + 1])
            assert torch.equal(found[row], expected[0])
    with peftrt.rows(model, names, expand=2):
        found = text(model, ids, mask, num_beams=2)
    for row, name in enumerate(names):
        peftrt.set_active(model, name)
        expected = text(model, ids[row : row + 1], mask[row : row + 1], num_beams=2)
        assert torch.equal(found[row], expected[0])


@pytest.mark.parametrize("way", ["prefix", "prompt"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
class TestWithLora:
    def test_rows_of_both_kinds(self, kind: str, way: str) -> None:
        model = two(kind, way, lora=True)
        names: list[str | None] = ["lora", "fr", None]
        ids, mask = batch("right")
        with peftrt.rows(model, names):
            found = logits_of(model, ids, mask)
        assert_close(found, alone(model, names, ids, mask))

    def test_together(self, kind: str, way: str) -> None:
        """As the adapter over a model into which LoRA is merged."""
        model = two(kind, way, lora=True)
        ids, mask = batch("left")
        peftrt.set_active(model, {"lora": 1.0, "fr": 1.0})
        found = logits_of(model, ids, mask)
        peftrt.set_active(model, "fr")
        assert (logits_of(model, ids, mask) - found).abs().max() > 1e-3
        peftrt.set_active(model, None)
        peftrt.merge(model, "lora")
        # what is merged stays active, so the comparison is made on a copy without adapters
        merged = build(kind).double()
        for path, layer in merged.named_modules():
            other = model.get_submodule(path)
            if getattr(layer, "weight", None) is not None and hasattr(other, "adapter_names"):
                layer.weight.data.copy_(other.weight)
        holder = next(module for module in model.modules() if isinstance(module, VirtualTokens))
        peftrt.adapt(merged, config(way, 5), name="fr")
        merged = merged.double().eval()
        own = next(module for module in merged.modules() if isinstance(module, VirtualTokens))
        own.adapter("fr").load_state_dict(holder.adapter("fr").state_dict())
        # a merge sums in fp32
        assert_close(found, logits_of(merged, ids, mask), torch.float32)

    def test_what_cannot_be_active_together(self, kind: str, way: str) -> None:
        model = two(kind, way, lora=True)
        for weights in ({"fr": 1.0, "de": 1.0}, {"fr": 0.5}, {"lora": 1.0, "de": 2.0}):
            before = peftrt.active_adapters(model)
            with pytest.raises(ValueError, match="one can be active, with weight 1"):
                peftrt.set_active(model, weights)
            assert peftrt.active_adapters(model) == before
        with pytest.raises(ValueError, match="merge"):
            peftrt.merge(model, "fr")


class TestCheckpointing:
    """Layers that run again in the backward have the prefix of their forward, as peft's cannot."""

    @pytest.mark.parametrize("reentrant", [False, True])
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_same_loss_and_gradients(self, kind: str, way: str, reentrant: bool) -> None:
        model = build(kind)
        peftrt.adapt(model, config(way), name="fr")
        model.double().train()
        without_dropout(model)
        expected = self.run(model)
        model.enable_input_require_grads()
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        self.compare(self.run(model), expected)

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["llama", "bert"])
    def test_rows_after_their_block(self, kind: str, way: str) -> None:
        model = two(kind, way).train()
        without_dropout(model)
        model.requires_grad_(False)
        for holder in (module for module in model.modules() if isinstance(module, VirtualTokens)):
            holder.requires_grad_(True)
        expected = self.run(model, ["fr", None, "de"])
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        self.compare(self.run(model, ["fr", None, "de"]), expected)

    @staticmethod
    def run(model: Any, names: list[str | None] | None = None) -> tuple[Tensor, dict[str, Tensor]]:
        model.zero_grad()
        if names is None:
            loss = loss_of(model)
        else:
            with peftrt.rows(model, names):
                loss = loss_of(model)
        loss.backward()
        grads = {name: each.grad.clone() for name, each in model.named_parameters() if each.grad is not None}
        return loss.detach(), grads

    @staticmethod
    def compare(found: tuple[Tensor, dict[str, Tensor]], expected: tuple[Tensor, dict[str, Tensor]]) -> None:
        assert_close(found[0], expected[0])
        assert found[1].keys() == expected[1].keys()
        assert all("adapter@" in name for name in found[1])
        assert any(grad.abs().max() > 1e-6 for grad in expected[1].values())
        for name, grad in expected[1].items():
            assert_close(found[1][name], grad)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", KINDS)
class TestModel:
    def test_nothing_is_left(self, kind: str, way: str) -> None:
        model = build(kind).requires_grad_(False)
        before, expected, number = state_of(model), logits_of(model, tokens()), hooks(model)
        for name in ("fr", "de"):
            peftrt.adapt(model, config(way), name=name)
        assert not torch.equal(logits_of(model, tokens()), expected)
        peftrt.set_active(model, None)
        assert_same_bits(logits_of(model, tokens()), expected)
        for name in ("fr", "de"):
            peftrt.remove(model, name)
        assert_same_bits(logits_of(model, tokens()), expected)
        after = state_of(model)
        assert after.keys() == before.keys()
        assert hooks(model) == number

    def test_training(self, kind: str, way: str) -> None:
        model = build(kind)
        report = peftrt.adapt(model, config(way))
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        assert report.trainable == sum(each.numel() for each in trained.values())
        assert all("adapter@default" in name for name in trained)
        frozen = {name: each.clone() for name, each in model.named_parameters() if not each.requires_grad}
        optimizer = torch.optim.AdamW(trained.values(), lr=0.3)
        first = float(loss_of(model).detach())
        for _ in range(20):
            optimizer.zero_grad()
            loss = loss_of(model)
            loss.backward()
            optimizer.step()
        assert loss.item() < first - 1e-4
        for name, each in model.named_parameters():
            if name in frozen:
                assert each.grad is None
                assert torch.equal(each, frozen[name])

    def test_copies_are_their_own(self, kind: str, way: str) -> None:
        model = build(kind)
        peftrt.adapt(model, config(way), name="fr")
        model.eval()
        expected = logits_of(model, tokens())
        for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert_same_bits(logits_of(other, tokens()), expected)
            holder = next(module for module in other.modules() if isinstance(module, VirtualTokens))
            with torch.no_grad():
                for parameter in holder.parameters():
                    parameter.add_(1)
            assert not torch.equal(logits_of(other, tokens()), expected)
            assert_same_bits(logits_of(model, tokens()), expected)
            peftrt.remove(other, "fr")
            assert hooks(other) == hooks(build(kind))
        other = build(kind)
        peftrt.adapt(other, config(way), name="fr")
        other.load_state_dict(model.state_dict())
        assert_same_bits(logits_of(other.eval(), tokens()), expected)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bert"])
def test_half_precision(kind: str, way: str) -> None:
    model = build(kind).to(torch.bfloat16)
    peftrt.adapt(model, config(way), name="fr")
    model.eval()
    trained = [each for each in model.parameters() if each.requires_grad]
    assert all(each.dtype == torch.float32 for each in trained)
    found = logits_of(model, tokens())
    assert found.dtype == torch.bfloat16
    expected = logits_of(copy.deepcopy(model).double(), tokens())
    assert (found - expected).abs().max() < 0.05 * expected.abs().max()
    loss_of(model).backward()
    assert any(each.grad is not None and each.grad.abs().max() > 0 for each in trained)


def test_threads() -> None:
    """Each has rows of its own."""
    model = two("llama", "projected")
    ids, mask = batch("left")
    batches: list[list[str | None]] = [["fr", "de", None], [None, "fr", "fr"], ["de", "de", "de"], [None, None, None]]
    expected = [alone(model, names, ids, mask) for names in batches]
    wrong: list[str] = []

    def serve(place: int) -> None:
        for _ in range(5):
            with peftrt.rows(model, batches[place]):
                found = logits_of(model, ids, mask)
            if (found - expected[place]).abs().max() > 1e-9:
                wrong.append(f"{batches[place]}")

    threads = [threading.Thread(target=serve, args=(place,)) for place in range(len(batches))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("way", ["prefix", "prompt"])
def test_compiled(way: str) -> None:
    model = build("llama")
    peftrt.adapt(model, config(way))
    model.eval()
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    ids = tokens()
    with torch.no_grad():
        assert_same_bits(compiled(ids, use_cache=False).logits, model(ids, use_cache=False).logits)


def test_prefix_and_prompt_together() -> None:
    model = build("llama")
    peftrt.adapt(model, config("prefix", 4), name="prefix")
    peftrt.adapt(model, config("prompt", 3), name="prompt")
    model.eval()
    peftrt.set_active(model, {"prefix": 1.0, "prompt": 1.0})
    ids, mask = batch("left")
    assert torch.equal(text(model, ids, mask), text(model, ids, mask, use_cache=False))
    for row, (of_row, seen) in enumerate(zip(ids, mask, strict=True)):
        only = of_row[seen == 1][None]
        expected = text(model, only, torch.ones_like(only))
        assert torch.equal(text(model, ids, mask)[row, -7:], expected[0, -7:])
