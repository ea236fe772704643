"""Prefix and PrefixTuning: the values, the mask, the cache, and attention of a model of the user's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import peftrt
from peftrt.nn.prefix import Prefix, PrefixedCache
from peftrt.nn.prefix_mask import extended
from peftrt.nn.virtual import Served
from tests.cases import randn
from tests.tolerances import assert_close, assert_same_bits

T, L, H, D = 3, 2, 2, 4
HEADS = 4  # of queries


class TestPrefix:
    def test_flat_is_peft_s_order(self) -> None:
        """Of every token: keys and then values of each layer."""
        flat = randn(T, 2 * L * H * D, seed=1)
        prefix = Prefix.from_flat(flat, H, H * D)
        assert prefix.num_layers == L
        assert torch.equal(prefix.flat(), flat)
        expected = flat.view(T, 2 * L, H, D).permute(1, 2, 0, 3)
        for layer in range(L):
            keys, values = prefix.keys_values(layer)
            assert torch.equal(keys, expected[2 * layer])
            assert torch.equal(values, expected[2 * layer + 1])

    def test_projection(self) -> None:
        prefix = Prefix(T, L, H, H * D, encoder_hidden_size=5)
        assert prefix.embedding is not None
        hidden = torch.tanh(prefix.embedding.weight @ prefix.hidden.weight.T + prefix.hidden.bias)
        expected = torch.cat([hidden @ out.weight.T + out.bias for out in prefix.out], dim=1)
        assert_close(prefix.flat(), expected)
        again = Prefix.from_flat(prefix.flat(), H, H * D)
        for layer in range(L):
            for mine, other in zip(prefix.keys_values(layer), again.keys_values(layer), strict=True):
                assert_close(mine, other)

    def test_a_projection_is_remembered_until_it_changes(self, monkeypatch: pytest.MonkeyPatch) -> None:
        prefix = Prefix(T, L, H, H * D, encoder_hidden_size=5).eval()
        runs: list[int] = []
        layer_of = Prefix._layer
        monkeypatch.setattr(Prefix, "_layer", lambda self, layer: runs.append(layer) or layer_of(self, layer))
        with torch.no_grad():
            first, _ = prefix.keys_values(0)
            again, _ = prefix.keys_values(0)
            assert runs == [0]
            assert again is first
            prefix.hidden.bias.add_(1)
            assert not torch.equal(prefix.keys_values(0)[0], first)
            assert runs == [0, 0]
        prefix.keys_values(0)[0].sum().backward()
        assert prefix.hidden.bias.grad is not None
        prefix.train()
        with torch.no_grad():
            prefix.keys_values(0)
            prefix.keys_values(0)
        assert runs == [0] * 5

    def test_zero(self) -> None:
        assert not Prefix(T, L, H, H * D, zero=True).flat().any()
        projected = Prefix(T, L, H, H * D, zero=True, encoder_hidden_size=5)
        assert not projected.flat().any()
        assert projected.embedding is not None
        assert projected.embedding.weight.any()


class Grows:
    """A cache of the user's own: what it must offer, and no more."""

    def __init__(self) -> None:
        self.held: list[Tensor] = []

    def update(self, keys: Tensor, values: Tensor, layer: int) -> tuple[Tensor, Tensor]:
        self.held = (
            [keys, values]
            if not self.held
            else [torch.cat(pair, 2) for pair in zip(self.held, (keys, values), strict=True)]
        )
        return self.held[0], self.held[1]

    def get_seq_length(self, layer: int = 0) -> int:
        return self.held[0].shape[2] if self.held else 0


class Attention(nn.Module):
    """Of several queries for each key, that sees what is before it."""

    num_heads, head_dim, num_key_value_heads = HEADS, D, H

    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(16, HEADS * D)
        self.k = nn.Linear(16, H * D)
        self.v = nn.Linear(16, H * D)

    def forward(self, x: Tensor, attention_mask: Tensor | None = None, past_key_values: Any = None) -> Tensor:
        heads = [each(x).unflatten(2, (-1, D)).transpose(1, 2) for each in (self.q, self.k, self.v)]
        query, keys, values = heads
        if past_key_values is not None:
            keys, values = past_key_values.update(keys, values, 0)
        if attention_mask is None:
            past = keys.shape[2] - x.shape[1]
            attention_mask = torch.ones(x.shape[1], keys.shape[2], dtype=torch.bool).tril(past)
        keys, values = (each.repeat_interleave(HEADS // H, 1) for each in (keys, values))
        return F.scaled_dot_product_attention(query, keys, values, attn_mask=attention_mask).transpose(1, 2).flatten(2)


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = Attention(), Attention()

    def forward(self, x: Tensor, mask: Tensor | None = None, caches: Any = (None, None)) -> Tensor:
        return self.second(self.first(x, mask, caches[0]), attention_mask=mask, past_key_values=caches[1])


def own_config(**changes: Any) -> peftrt.PrefixTuningConfig:
    named = {"attention_modules": ["first", "second"], "shift_positions": False}
    return peftrt.PrefixTuningConfig(num_virtual_tokens=T, **{**named, **changes})


def by_hand(module: Attention, prefix: Prefix, layer: int, x: Tensor, seen: Tensor) -> Tensor:
    """softmax(q [P_k; K]^T / sqrt(D)) [P_v; V], written out; ``seen [S, S]`` of the real tokens."""
    of_prefix = prefix.flat().view(T, 2 * L, H, D)
    rows = []
    for entry in x:
        query, keys, values = (each(entry).view(len(entry), -1, D) for each in (module.q, module.k, module.v))
        out = torch.empty(len(entry), HEADS, D)
        for head in range(HEADS):
            shared = head * H // HEADS
            all_keys = torch.cat([of_prefix[:, 2 * layer, shared], keys[:, shared]])
            all_values = torch.cat([of_prefix[:, 2 * layer + 1, shared], values[:, shared]])
            scores = query[:, head] @ all_keys.T / D**0.5
            scores[:, T:][~seen] = -torch.inf
            out[:, head] = scores.softmax(1) @ all_values
        rows.append(out.flatten(1))
    return torch.stack(rows)


class TestOwnModel:
    @torch.no_grad()
    def test_by_hand(self) -> None:
        model = Own()
        peftrt.adapt(model, own_config(), name="fr")
        prefix = next(module for module in model.modules() if isinstance(module, Prefix))
        x = randn(2, 5, 16, seed=2)
        seen = torch.ones(5, 5, dtype=torch.bool).tril()
        expected = by_hand(model.second, prefix, 1, by_hand(model.first, prefix, 0, x, seen), seen)
        assert_close(model(x), expected, roundings=4)
        everywhere = torch.ones(2, 1, 5, 5, dtype=torch.bool)
        whole = by_hand(model.second, prefix, 1, by_hand(model.first, prefix, 0, x, seen | True), seen | True)
        assert_close(model(x, everywhere), whole, roundings=4)
        assert_close(model(x, torch.zeros(2, 1, 5, 5)), whole, roundings=4)

    @torch.no_grad()
    def test_step_by_step(self) -> None:
        model = Own()
        peftrt.adapt(model, own_config(), name="fr")
        x = randn(2, 5, 16, seed=2)
        caches = (Grows(), Grows())
        steps = [model(part, caches=caches) for part in (x[:, :3], x[:, 3:4], x[:, 4:])]
        assert_close(torch.cat(steps, dim=1), model(x), roundings=4)
        # the cache holds the real tokens alone
        assert caches[0].get_seq_length() == 5

    @torch.no_grad()
    def test_rows(self) -> None:
        model = Own()
        peftrt.adapt(model, own_config(), name="fr")
        peftrt.adapt(model, own_config(), name="de")
        x = randn(3, 5, 16, seed=2)
        caches = (Grows(), Grows())
        with peftrt.rows(model, ["de", None, "fr"]):
            found = model(x)
            steps = torch.cat([model(part, caches=caches) for part in (x[:, :4], x[:, 4:])], dim=1)
        for row, name in enumerate(["de", None, "fr"]):
            peftrt.set_active(model, name)
            expected = model(x[row : row + 1])[0]
            assert_close(found[row], expected, roundings=4)
            assert_close(steps[row], expected, roundings=4)

    def test_keys_of_another_form(self) -> None:
        keys = values = randn(1, H, T, D, seed=1)
        cache = PrefixedCache(None, keys, values)
        with pytest.raises(ValueError, match=r"keys are \[2, 5, 2, 4\]"):
            cache.update(randn(2, 5, H, D, seed=2), randn(2, 5, H, D, seed=3), 0)


def served(*counts: int) -> Served:
    """Two entries with so many virtual tokens; none are given where all have T."""
    if not counts:
        return Served(("fr",), T)
    return Served(("fr", "de"), T, torch.tensor([0, 1]), torch.tensor(counts))


class Implementation(nn.Module):
    def __init__(self, name: str, is_causal: bool) -> None:
        super().__init__()
        self.config = type("Config", (), {"_attn_implementation": name})()
        self.is_causal = is_causal


class TestMask:
    """Columns of the prefix, left of what was there."""

    X = torch.zeros(2, 4, 8)

    def test_of_one_prefix(self) -> None:
        causal, everywhere = Implementation("sdpa", True), Implementation("sdpa", False)
        seen = torch.rand(2, 1, 4, 6) > 0.5
        found = extended(seen, served(), causal, self.X, None, None)
        assert found is not None
        assert torch.equal(found, torch.cat([torch.ones(2, 1, 4, T, dtype=torch.bool), seen], dim=3))
        added = torch.randn(1, 1, 4, 6)
        found = extended(added, served(), causal, self.X, None, None)
        assert found is not None
        assert torch.equal(found, torch.cat([torch.zeros(2, 1, 4, T), added.expand(2, -1, -1, -1)], dim=3))
        # None: what is before, or all
        found = extended(None, served(), causal, self.X, None, None)
        assert found is not None
        assert torch.equal(found[0, 0], torch.cat([torch.ones(4, T), torch.ones(4, 4).tril()], dim=1).bool())
        assert extended(None, served(), everywhere, self.X, None, None) is None
        assert extended(None, served(), causal, self.X, None, False) is None
        assert extended(None, served(), causal, self.X[:, :1], None, None) is None

    @pytest.mark.parametrize("name", ["sdpa", "eager", "own"])
    def test_of_several(self, name: str) -> None:
        module = Implementation(name, False)
        found = extended(None, served(3, 1), module, self.X, None, None)
        assert found is not None
        seen = found if name == "sdpa" else found == 0
        assert seen.shape == (2, 1, 4, T + 4)
        assert seen[0].all()
        assert not seen[1, ..., :2].any()
        assert seen[1, ..., 2:].all()
        if name != "sdpa":
            assert found[1, ..., :2].max() == torch.finfo(torch.float32).min

    def test_flash(self) -> None:
        """Which aligns its own causal mask with the last key, and takes what is seen of each entry."""
        module = Implementation("flash_attention_2", True)
        assert extended(None, served(), module, self.X, None, None) is None
        mask = torch.tensor([[0, 1, 1, 1], [1, 1, 1, 1]])
        found = extended(mask, served(), module, self.X, None, None)
        assert found is not None
        assert found.tolist() == [[1, 1, 1, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]]
        found = extended(mask, served(2, 0), module, self.X, None, None)
        assert found is not None
        assert found.tolist() == [[0, 1, 1, 0, 1, 1, 1], [0, 0, 0, 1, 1, 1, 1]]
        found = extended(None, served(2, 0), module, self.X, None, None)
        assert found is not None
        assert found.tolist() == [[False, True, True] + [True] * 4, [False] * 3 + [True] * 4]


def test_gather_pads_in_front() -> None:
    vectors = [torch.arange(1.0, 4)[:, None], torch.tensor([[7.0]])]
    of = Served(("fr", "de"), T, torch.tensor([1, 2, 0]), torch.tensor([1, 0, 3]))
    assert of.gather(vectors, 0)[..., 0].tolist() == [[0, 0, 7], [0, 0, 0], [1, 2, 3]]
    seen = of.seen()
    assert seen is not None
    assert seen.tolist() == [[False, False, True], [False] * 3, [True] * 3]
    assert_same_bits(of.gather([vectors[0][None], vectors[1][None]], 1)[2], vectors[0][None])
