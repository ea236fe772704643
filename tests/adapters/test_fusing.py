"""fuse: q, k and v, or gate and up, in one call; every layer stays what it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt import ops
from tests.adapters.tiny import build, config, logits, tokens
from tests.nn.layers import conv1d
from tests.tolerances import assert_close, assert_same_bits

ALL = {"target_modules": "all-linear"}


@contextmanager
def counted(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[int]]:
    """How many layers each call of lora_linear serves."""
    calls: list[int] = []
    plain = ops.lora_linear

    def count(*args: Any, **options: Any) -> Tensor:
        calls.append(len(options.get("splits", ())) or 1)
        return plain(*args, **options)

    with monkeypatch.context() as patch:
        patch.setattr(ops, "lora_linear", count)
        yield calls


def pair(kind: str, quantize: str | None, **changes: Any) -> tuple[Any, Any]:
    """A model that is fused, and the same one by one."""
    fused = build(kind)
    # the scales of weights as small as these cannot be nested in runs of their own
    options: dict[str, Any] = {"quantize": quantize, "double_quant": False, "fuse": True}
    peftrt.adapt(fused, config(kind, **{**ALL, **changes}), name="fr", **options)
    apart = copy.deepcopy(fused)  # takes weights apart
    return fused, apart


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize(("kind", "sizes"), [("llama", [3, 1, 2, 1] * 2), ("bert", [3, 1, 1, 1] * 2 + [1, 1])])
def test_one_call_gives_what_several_give(
    kind: str, sizes: list[int], quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    fused, apart = pair(kind, quantize)
    ids = tokens()
    results = []
    for model, expected in ((fused, sizes), (apart, [1] * sum(sizes))):
        with counted(monkeypatch) as calls:
            y = model(ids).logits
            y.square().sum().backward()
        assert calls == expected
        results.append((y, *(p.grad for p in model.parameters() if p.requires_grad)))
    for got, want in zip(*results, strict=True):
        assert_close(got, want, roundings=4, intermediate=want.detach().abs().max().item())


def test_bits_names_and_files_stay(tmp_path: Path) -> None:
    """Quantised together, a weight is one of its own: in state dicts, for bitsandbytes, in adapters' files."""
    fused, apart = pair("llama", "nf4")
    assert list(fused.state_dict()) == list(apart.state_dict())
    for (name, value), other in zip(fused.state_dict().items(), apart.state_dict().values(), strict=True):
        assert_same_bits(value, other), name
    layer = fused.model.layers[0].self_attn.k_proj
    again = peftrt.NF4Weight.from_bnb(layer.nf4_weight().to_bnb())
    assert_same_bits(again.dequantize(), layer.nf4_weight().dequantize())
    peftrt.save(fused, tmp_path / "fused")
    peftrt.save(apart, tmp_path / "apart")
    files = [(tmp_path / name / "adapter_model.safetensors").read_bytes() for name in ("fused", "apart")]
    assert files[0] == files[1]


class Attention(nn.Module):
    """Projections whose scales, nested, fill runs."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(128, n) for n in (256, 128, 128))

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.q_proj(x), self.k_proj(x), self.v_proj(x)], dim=-1)


def nested(fuse: bool) -> Attention:
    model = Attention()
    peftrt.adapt(model, config("llama", **ALL), quantize="nf4", fuse=fuse)
    return model


def test_nested_scales_are_nearly_those_of_weights_quantised_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    together, one_by_one = nested(fuse=True), nested(fuse=False)
    for path in ("q_proj", "k_proj", "v_proj"):
        own, other = (getattr(model, path).nf4_weight() for model in (together, one_by_one))
        assert_same_bits(own.codes, other.codes)
        assert not torch.equal(own.nested_offset, other.nested_offset)
        difference = (own.dequantize() - other.dequantize()).abs().max()
        assert difference < 0.02 * other.dequantize().abs().max()
    x = torch.randn(3, 128)
    with counted(monkeypatch) as calls:
        got = together(x)
    assert calls == [3]
    assert_close(got, copy.deepcopy(together)(x))


def test_offsets_that_a_checkpoint_brings_are_each_layers_own() -> None:
    together, one_by_one = nested(fuse=True), nested(fuse=False)
    x = torch.randn(3, 128)
    together(x)
    together.load_state_dict(one_by_one.state_dict())
    assert_same_bits(together(x), one_by_one(x))


def test_no_second_copy_of_the_weights() -> None:
    fused, apart = pair("llama", "nf4")
    q, k = fused.model.layers[0].self_attn.q_proj, fused.model.layers[0].self_attn.k_proj
    assert q.weight.untyped_storage().data_ptr() == k.weight.untyped_storage().data_ptr()
    assert peftrt.adapters.report.model_bytes(fused) == peftrt.adapters.report.model_bytes(apart)


def test_after_a_move_layers_are_apart_until_they_are_fused_again(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, apart = pair("llama", "nf4")
    before = logits(fused)
    assert peftrt.explain(fused).sites["model.layers.0.self_attn.q_proj"].layers == 3
    assert peftrt.explain(apart).sites["model.layers.0.self_attn.q_proj"].layers == 1
    told = peftrt.fuse(apart)
    assert set(told.values()) == {None}
    assert "model.layers.0.self_attn.q_proj + model.layers.0.self_attn.k_proj" in next(iter(told))
    with counted(monkeypatch) as calls:
        assert_same_bits(logits(apart), before)
    assert 3 in calls
    assert "3 layers in one call" in str(peftrt.explain(apart))


def test_weights_that_were_quantised_apart_stay_apart() -> None:
    model, x = nested(fuse=False), torch.randn(3, 128)
    before = model(x)
    assert "quantised one by one" in str(peftrt.fuse(model)["q_proj + k_proj + v_proj"])
    assert_same_bits(model(x), before)


def test_scales_that_do_not_fill_runs_are_nested_apart() -> None:
    model = build("llama")
    peftrt.adapt(model, config("llama", **ALL), quantize="nf4", fuse=True)
    assert {site.layers for site in peftrt.explain(model).sites.values()} == {1}


def test_a_loaded_state_is_seen() -> None:
    other = build("llama")
    peftrt.adapt(other, config("llama", **ALL), name="fr", quantize="nf4", double_quant=False)
    fused, _ = pair("llama", "nf4")
    logits(fused)
    fused.load_state_dict(other.state_dict())
    assert_close(logits(fused), logits(other), roundings=3, intermediate=10.0)


def test_what_acts_differently_is_computed_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, apart = pair("llama", None)
    for model in (fused, apart):
        torch.manual_seed(5)
        peftrt.adapt(model, config("llama", r=2, target_modules=["q_proj"]), name="de")
        peftrt.set_active(model, {"fr": 0.5, "de": 2.0})
    with counted(monkeypatch) as calls:
        got = logits(fused)
    assert 3 not in calls
    assert 2 in calls, "gate and up still go together"
    assert_same_bits(got, logits(apart))
    names = ["de", None, "fr"]
    with peftrt.rows(fused, names), peftrt.rows(apart, names):
        assert_same_bits(logits(fused), logits(apart))
    peftrt.set_active(fused, None)
    peftrt.set_active(apart, None)
    assert_same_bits(logits(fused), logits(apart))


def test_merging_and_back(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, apart = pair("llama", None)
    before = logits(fused)
    for model in (fused, apart):
        peftrt.merge(model, "fr")
    assert_same_bits(logits(fused), logits(apart))
    peftrt.unmerge(fused)
    with counted(monkeypatch) as calls:
        assert_same_bits(logits(fused), before)
    assert 3 in calls


OPTIONS: list[dict[str, Any]] = [{"use_dora": True}, {"alpha_pattern": {"k_proj": 3}}, {"use_rslora": True}]


@pytest.mark.parametrize("changes", OPTIONS, ids=str)
def test_options(changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    fused, apart = pair("llama", "nf4", **changes)
    with counted(monkeypatch) as calls:
        got = logits(fused)
    assert 3 in calls
    assert_close(got, logits(apart), roundings=3, intermediate=10.0)


def test_with_dropout_all_see_the_same_zeros() -> None:
    fused, _ = pair("llama", None, lora_dropout=0.5, r=64, lora_alpha=64)
    attention = fused.model.layers[0].self_attn.train()
    for layer in (attention.q_proj, attention.k_proj):
        adapter = layer.adapter("fr")
        with torch.no_grad():
            adapter.lora_A.copy_(torch.eye(64))
            adapter.lora_B.copy_(torch.eye(layer.out_features, 64))
    x = torch.ones(2, 3, 64)
    seen_by_q, seen_by_k = (layer(x) - layer._base(x) for layer in (attention.q_proj, attention.k_proj))
    assert set(seen_by_q.detach().round(decimals=3).unique().tolist()) == {0.0, 2.0}
    assert_close(seen_by_k, seen_by_q[..., :32], roundings=2, intermediate=2.0)


def test_x_that_changed_in_place_is_multiplied_anew() -> None:
    fused, apart = pair("llama", None)
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        for model in (fused, apart):
            model.model.layers[0].self_attn.q_proj(x)
        x.mul_(2)
        got, want = (model.model.layers[0].self_attn.k_proj(x) for model in (fused, apart))
        assert_close(got, want)
        other = torch.randn(2, 3, 64)
        got, want = (model.model.layers[0].self_attn.v_proj(other) for model in (fused, apart))
        assert_close(got, want)


def test_a_setting_that_changed_is_heeded() -> None:
    fused, _ = pair("llama", None)
    attention = fused.model.layers[0].self_attn
    x = torch.randn(2, 3, 64)
    with torch.no_grad():
        attention.q_proj(x)
    assert attention.k_proj(x).requires_grad
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert attention.v_proj(x).dtype == torch.bfloat16
    with torch.inference_mode():
        assert_close(attention.q_proj(x), attention.q_proj._adapted(x))


def test_x_that_begins_to_need_a_gradient_gets_one() -> None:
    fused, _ = pair("llama", None)
    attention = fused.model.layers[0].self_attn
    x = torch.randn(2, 3, 64)
    attention.q_proj(x)
    x.requires_grad_()
    assert torch.autograd.grad(attention.k_proj(x).sum(), x)[0].abs().sum() > 0


def test_a_shallow_copy_computes_for_itself() -> None:
    fused, _ = pair("llama", None)
    attention = fused.model.layers[0].self_attn
    x = torch.randn(2, 3, 64)
    replica = copy.copy(attention.q_proj)
    assert_same_bits(replica(x), attention.q_proj._adapted(x))
    assert_close(attention.q_proj(x), replica(x))


def test_results_may_be_changed_in_place() -> None:
    fused, apart = pair("llama", None)
    grads = []
    for model in (fused, apart):
        attention = model.model.layers[0].self_attn
        x = torch.ones(2, 3, 64, requires_grad=True)
        q, k = attention.q_proj(x).mul_(0.5), attention.k_proj(x)
        grads.append(torch.autograd.grad((q.sum() * k.sum()), x)[0])
    assert_close(*grads, roundings=2, intermediate=grads[1].abs().max().item())


def test_layers_with_inputs_of_their_own_stop_computing_for_others(monkeypatch: pytest.MonkeyPatch) -> None:
    fused, apart = pair("llama", None)
    attention, other = (model.model.layers[0].self_attn for model in (fused, apart))
    with counted(monkeypatch) as calls, torch.no_grad():
        for seed in range(12):
            x = torch.randn(2, 3, 64, generator=torch.Generator().manual_seed(seed))
            assert_close(attention.q_proj(x), other.q_proj(x))
    assert calls.count(3) <= 6


def test_nothing_is_kept_once_all_have_fetched() -> None:
    fused, _ = pair("llama", None)
    attention = fused.model.layers[0].self_attn
    with torch.no_grad():
        x = torch.randn(2, 3, 64)
        results = [layer(x) for layer in (attention.q_proj, attention.k_proj, attention.v_proj)]
    storage = weakref.ref(results[0].untyped_storage())
    kept = [weakref.ref(result) for result in results]
    del results
    gc.collect()
    assert not any(ref() is not None for ref in kept)
    assert storage() is None


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_checkpointing(use_reentrant: bool) -> None:
    fused, apart = pair("llama", "nf4")
    grads = []
    for model in (fused, apart):
        model.train()
        model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
        model.enable_input_require_grads()
        model(tokens()).logits.square().sum().backward()
        grads.append([p.grad for p in model.parameters() if p.requires_grad])
    for got, want in zip(*grads, strict=True):
        assert_close(got, want, roundings=4, intermediate=want.abs().max().item())


def test_compiled_whole() -> None:
    fused, _ = pair("llama", None)
    mlp = fused.model.layers[0].mlp
    x = torch.randn(3, 64)
    expected = mlp(x)
    assert_close(torch.compile(mlp, fullgraph=True, backend="eager")(x), expected, roundings=3, intermediate=10.0)


def test_copies_and_pickles_work_alone() -> None:
    fused, _ = pair("llama", "nf4")
    before = logits(fused)
    for other in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        assert_close(logits(other), before, roundings=3, intermediate=10.0)
        member = other.model.layers[0].self_attn.q_proj
        assert member.fused.layers[0] is member


def test_from_a_checkpoint(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    dense = build("llama")
    save_file({k: v.clone() for k, v in dense.state_dict().items()}, tmp_path / "model.safetensors")
    with peftrt.empty_weights():
        empty = type(dense)(dense.config)
    options: dict[str, Any] = {"quantize": "nf4", "double_quant": False, "fuse": True}
    torch.manual_seed(1)
    peftrt.adapt(empty, config("llama", **ALL), name="fr", **options, checkpoint=tmp_path)
    torch.manual_seed(1)
    fused = build("llama")
    peftrt.adapt(fused, config("llama", **ALL), name="fr", **options)
    assert_same_bits(logits(empty.eval()), logits(fused))
    assert peftrt.explain(empty).sites["model.layers.0.self_attn.q_proj"].layers == 3


def test_what_cannot_be_fused_is_said() -> None:
    model = build("llama")
    with pytest.raises(ValueError, match="fuse does not go with init_lora_weights='pissa'"):
        peftrt.adapt(model, config("llama", **ALL, init_lora_weights="pissa"), quantize="nf4", fuse=True)
    assert not any(isinstance(module, peftrt.QLoRALinear) for module in model.modules())
    gpt2 = build("gpt2")
    peftrt.adapt(gpt2, config("gpt2"), fuse=True)
    assert peftrt.fuse(gpt2) == {}


def tie(model: Any) -> None:
    model.head = nn.Linear(128, 128, bias=False)
    model.head.weight = model.k_proj.weight


def halve(model: Any) -> None:
    model.k_proj.bfloat16()


def narrow(model: Any) -> None:
    model.k_proj = nn.Linear(64, 128)


def without_bias(model: Any) -> None:
    model.k_proj.bias = None


def in_columns(model: Any) -> None:
    model.q_proj, model.k_proj, model.v_proj = (conv1d(128, n) for n in (256, 128, 128))


APART: list[tuple[str, Callable[[Any], None], str | None]] = [
    ("k_proj: its weight is also that of head", tie, None),
    ("they are of several devices or dtypes", halve, None),
    ("their inputs have several sizes", narrow, None),
    ("some have a bias and some none", without_bias, None),
    ("Conv1D stores columns", in_columns, None),
    ("their weights are of several forms", halve, "nf4"),
]


@pytest.mark.parametrize(("reason", "change", "quantize"), APART, ids=[reason for reason, *_ in APART])
def test_layers_that_stay_apart_say_why_and_compute_as_before(
    reason: str, change: Callable[[Any], None], quantize: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    model: Any = Attention()
    change(model)
    dtypes = [layer.weight.dtype for layer in (model.q_proj, model.k_proj, model.v_proj)]
    peftrt.adapt(model, config("llama", **ALL), quantize=quantize, double_quant=False)
    x = torch.randn(3, 128)

    def results() -> list[Tensor]:
        layers = (model.q_proj, model.k_proj, model.v_proj)
        return [layer(x[:, : layer.in_features].to(dtype)) for layer, dtype in zip(layers, dtypes, strict=True)]

    before = results()
    assert peftrt.fuse(model) == {"q_proj + k_proj + v_proj": reason}
    with counted(monkeypatch) as calls:
        after = results()
    assert calls == [1, 1, 1]
    for got, want in zip(after, before, strict=True):
        assert_same_bits(got, want)
