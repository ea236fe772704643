"""LoRAEmbedding against its equation, HF peft's layer, and the table that it must leave alone."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from peftrt.nn import LoRAEmbedding, routed
from tests.cases import randn
from tests.tolerances import assert_close, assert_same_bits

V, D = 11, 6
IDS = torch.tensor([[1, 4, 4, 0], [10, 2, 3, 1], [5, 5, 0, 9]])


def table(dtype: torch.dtype = torch.float32, **options: Any) -> nn.Embedding:
    embedding = nn.Embedding(V, D, dtype=dtype, **options)
    with torch.no_grad():
        embedding.weight.copy_(randn(V, D, seed=1))
    return embedding


def adapted(dtype: torch.dtype = torch.float32, adapter: dict[str, Any] | None = None, **options: Any) -> Any:
    """A layer with the adapters "default" (r 4) and "fr" (r 2, rsLoRA)."""
    settings = {"r": 4, "lora_alpha": 6, "init": False, **(adapter or {})}
    layer = LoRAEmbedding.from_embedding(table(dtype, **options), **settings)
    layer.add_adapter("fr", r=2, lora_alpha=3, use_rslora=True, init=False)
    return layer


def truth(layer: Any, ids: Tensor, weights: dict[str, float]) -> Tensor:
    whole = layer.weight.detach().double()
    for name, share in weights.items():
        a = layer.adapter(name)
        whole = whole + share * a.scaling * (a.lora_B.double() @ a.lora_A.double()).t()
    return whole[ids]


@pytest.mark.parametrize("active", [None, "default", "fr", {"fr": 0.7, "default": -0.3}, {"fr": 0.0}], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_forward_is_the_equation(dtype: torch.dtype, active: Any) -> None:
    layer = adapted(dtype)
    layer.set_active(active)
    for ids in (IDS, IDS[0], IDS[0, 0], IDS[:0], IDS.int()):
        y = layer(ids)
        assert y.dtype == dtype
        assert_close(y, truth(layer, ids, layer.active), dtype)


def test_a_new_adapter_changes_nothing() -> None:
    layer = LoRAEmbedding.from_embedding(table(), r=4)
    assert_same_bits(layer(IDS).detach(), table()(IDS).detach())
    assert layer.lora_A.abs().max() == 0
    assert layer.lora_B.std() > 0.3
    assert set(layer.state_dict()) == {"weight", "lora_embedding_A", "lora_embedding_B"}
    assert {name for name, p in layer.named_parameters() if p.requires_grad} == {"lora_embedding_A", "lora_embedding_B"}
    assert layer.lora_A.shape == (4, V)
    assert layer.lora_B.shape == (D, 4)


@pytest.mark.parametrize("options", [{}, {"padding_idx": 4}, {"scale_grad_by_freq": True}], ids=str)
def test_gradients_and_options_equal_peft_s(options: dict[str, Any]) -> None:
    peft = pytest.importorskip("peft")
    ours = adapted(**options)
    holder = nn.Sequential(table(**options))
    config = peft.LoraConfig(target_modules=["0"], r=4, lora_alpha=6, lora_dropout=0.5)
    theirs = peft.get_peft_model(holder, config).base_model.model[0]
    with torch.no_grad():
        theirs.lora_embedding_A["default"].copy_(ours.lora_A)
        theirs.lora_embedding_B["default"].copy_(ours.lora_B)
    results = []
    for layer, A, B in (
        (ours, ours.lora_A, ours.lora_B),
        (theirs, theirs.lora_embedding_A["default"], theirs.lora_embedding_B["default"]),
    ):
        y = layer.train()(IDS)
        (y * randn(*y.shape, seed=3)).sum().backward()
        results.append((y.detach(), A.grad, B.grad))
    for got, want in zip(*results, strict=True):
        assert_close(got, want)
    assert results[0][1].abs().max() > 0
    if "padding_idx" in options:
        assert results[0][1][:, 4].abs().max() == 0


def test_a_sparse_table_trains() -> None:
    """HF peft's layer fails in the backward here."""
    grads = []
    for sparse in (False, True):
        torch.manual_seed(0)
        layer = adapted(sparse=sparse)
        layer(IDS).square().sum().backward()
        grads.append(layer.lora_A.grad)
        assert layer.to_embedding().sparse == sparse
    assert_same_bits(*grads)


@pytest.mark.parametrize("names", [["default", None, "fr"], [None] * 3, ["fr"] * 3], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_rows(dtype: torch.dtype, names: list[str | None]) -> None:
    layer = adapted(dtype)
    expected = torch.stack([truth(layer, IDS[i], {name: 1.0} if name else {}) for i, name in enumerate(names)])
    with routed(layer.owner, names):
        y = layer(IDS)
    assert_close(y, expected, dtype)
    if any(names):
        y.float().sum().backward()
        for name in layer.adapter_names:
            assert (layer.adapter(name).lora_A.grad is not None) == (name in names)
    with (
        routed(layer.owner, names),
        pytest.raises(ValueError, match="3 names for a batch whose leading dimension is 2"),
    ):
        layer(IDS[:2])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merge_is_exact_and_taken_back_bit_for_bit(dtype: torch.dtype) -> None:
    layer = adapted(dtype)
    layer.set_active({"default": 1.0, "fr": 0.5})
    before, weight = layer.weight.clone(), layer.weight
    plain = layer.to_embedding()
    layer.merge()
    assert_close(layer(IDS), truth_of(before, layer)[IDS], dtype)
    assert_same_bits(plain(IDS), layer(IDS))
    with routed(layer.owner, [None] * 3), pytest.raises(ValueError, match="are merged; unmerge first"):
        layer(IDS)
    layer.unmerge()
    assert layer.weight is weight
    assert_same_bits(layer.weight.detach(), before)


def truth_of(weight: Tensor, layer: Any) -> Tensor:
    whole = weight.double()
    for name, share in layer.active.items():
        a = layer.adapter(name)
        whole = whole + share * a.scaling * (a.lora_B.double() @ a.lora_A.double()).t()
    return whole


def test_merging_goes_over_the_table_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    from peftrt.nn import lora_embedding

    monkeypatch.setattr(lora_embedding, "_CHUNK", 4)
    layer = adapted()
    layer.merge("fr")
    assert layer.merged == {"fr": 1.0}
    a = layer.adapter("fr")
    assert_close(layer.weight, table().weight + a.scaling * (a.lora_B @ a.lora_A).t(), roundings=2)


def test_to_embedding_keeps_the_options() -> None:
    layer = adapted(padding_idx=2, scale_grad_by_freq=True)
    plain = layer.to_embedding(torch.bfloat16)
    assert type(plain) is nn.Embedding
    assert (plain.padding_idx, plain.scale_grad_by_freq, plain.weight.dtype) == (2, True, torch.bfloat16)
    assert not plain.weight.requires_grad
    layer.set_active(None)
    assert_same_bits(layer.to_embedding().weight, table().weight.detach())


def test_a_shared_table_is_left_alone() -> None:
    embedding, head = table(), nn.Linear(D, V, bias=False)
    head.weight = embedding.weight
    before = head.weight.detach().clone()
    layer = LoRAEmbedding.from_embedding(embedding, r=2, init=False)
    assert layer.weight is head.weight
    layer.merge()
    assert_same_bits(head.weight.detach(), before)
    layer.unmerge()
    assert layer.weight is head.weight


def test_copies_removal_and_state() -> None:
    layer = adapted()
    copied = copy.deepcopy(layer)
    other = adapted()
    other.load_state_dict(layer.state_dict())
    for each in (copied, other):
        each.set_active("fr")
        assert_same_bits(each(IDS).detach(), truth_bits(layer, "fr"))
    layer.set_active("default")
    layer.remove_adapter("default")
    assert set(layer.state_dict()) == {"weight", "lora_embedding_A@fr", "lora_embedding_B@fr"}
    assert layer.active == {}
    assert_same_bits(layer(IDS), table()(IDS).detach())
    text = repr(layer)
    assert "11, 6" in text
    assert "fr: r=2" in text


def truth_bits(layer: Any, name: str) -> Tensor:
    layer.set_active(name)
    return layer(IDS).detach()


def test_nothing_of_the_size_of_the_table_is_made() -> None:
    """A table of 64 MB, an adapter of 0.5: forward and backward allocate no more than a few times the latter."""
    from torch.profiler import ProfilerActivity, profile

    embedding = nn.Embedding(1 << 16, 256)
    layer = LoRAEmbedding.from_embedding(embedding, r=2)
    ids = torch.arange(64)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        layer(ids).sum().backward()
    allocated = sum(max(0, event.self_cpu_memory_usage) for event in seen.events())
    adapter = 4 * 2 * (1 << 16)
    assert 0 < allocated < 6 * adapter < embedding.weight.nbytes / 16


def test_compiled() -> None:
    layer = adapted()
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    for active in (None, "fr", {"fr": 0.5, "default": 1.0}, None):
        layer.set_active(active)
        assert_close(compiled(IDS), truth(layer, IDS, layer.active))


class Scaled(nn.Embedding):
    def forward(self, ids: Tensor) -> Tensor:
        return 8 * super().forward(ids)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: nn.Linear(2, 2), "Linear is no nn.Embedding"),
        (lambda: nn.Embedding(V, D, max_norm=1.0), "has max_norm, which rewrites rows"),
        (lambda: Scaled(V, D), "Scaled has a forward of its own"),
        (lambda: nn.Embedding(V, D, dtype=torch.float64), "fp32, bf16 and fp16 are supported"),
    ],
)
def test_what_cannot_be_wrapped_is_refused(make: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        LoRAEmbedding.from_embedding(make())


@pytest.mark.parametrize("init", ["pissa", "loftq", "orthogonal"])
def test_beginnings_that_an_embedding_has_not(init: str) -> None:
    with pytest.raises(ValueError, match=f"begins with init True, False or 'gaussian', not with '{init}'"):
        LoRAEmbedding.from_embedding(table(), r=2, init=init)
