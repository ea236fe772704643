"""adapt: what it changes, what it reports, and that an error changes nothing."""

from __future__ import annotations

import weakref
from typing import Any

import pytest
import torch
from torch import nn

import peftrt
from peftrt.formats.errors import AdapterNameError, ConfigError, UnsupportedError
from peftrt.nn import AdapterLinear
from tests.adapters.tiny import KINDS, ONE, build, config, logits, unchanged
from tests.tolerances import assert_same_bits


class Net(nn.Module):
    """A model that is nobody's: plain torch."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(16, 64)
        self.conv = nn.Conv2d(1, 1, 1)
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(64, 96), nn.GELU(), nn.Linear(96, 64)) for _ in range(2))
        self.head = nn.Linear(64, 16, bias=False)

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        x = self.embed(ids)
        for block in self.blocks:
            x = x + block(x)
        return self.head(x)


IDS = torch.arange(12).view(3, 4)


@pytest.mark.parametrize("quantize", [None, "nf4"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_new_adapter_changes_nothing_until_it_is_trained(kind: str, quantize: str | None) -> None:
    model = build(kind)
    before = logits(model)
    report = peftrt.adapt(model, config(kind, init_lora_weights=True), name="fr", quantize=quantize)
    assert peftrt.adapter_names(model) == ("fr",)
    assert peftrt.active_adapters(model) == {"fr": 1.0}
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert trained == {f"{path}.lora_{side}@fr" for path in report.matched for side in "AB"}
    after = logits(model)
    if quantize is None:
        assert_same_bits(after, before)
    else:
        assert 0 < (after - before).abs().max() < 0.2
    model.train()
    out = model(IDS)
    (out.logits.sum() if kind != "bert" else out.logits[:, 0].sum()).backward()
    grads = {name for name, parameter in model.named_parameters() if parameter.grad is not None}
    assert grads == trained


def test_report_has_fields_and_reads_well() -> None:
    model = build("llama")
    report = peftrt.adapt(
        model, config("llama", target_modules=["q_proj", "down_proj"], rank_pattern={"down_proj": 2}), name="fr"
    )
    assert len(report.sites) == 4
    site = report.sites[1]
    assert (site.path, site.r, site.scaling, site.storage) == ("model.layers.0.mlp.down_proj", 2, 4.0, "float32")
    assert (site.in_features, site.out_features) == (96, 64)
    assert site.choice.op == "lora_linear"
    assert report.left_out["lm_head"] == "not among target_modules"
    assert report.trainable == 2 * (4 * (64 + 64) + 2 * (96 + 64))
    assert report.trainable_share == report.trainable / sum(p.numel() for p in model.parameters())
    assert report.bytes_after == report.bytes_before + 4 * report.trainable
    text = str(report)
    for part in ("'fr'", "model.layers.*.mlp.down_proj", "2x", "64 x 96", "float32", "lora_linear by", "not adapted"):
        assert part in text, part
    assert f"{report.trainable:,} of {report.total:,}" in text
    assert max(map(len, text.splitlines())) < 120


def test_report_counts_a_four_bit_weight_as_a_weight() -> None:
    model = build("llama")
    numbers = sum(p.numel() for p in model.parameters())
    report = peftrt.adapt(model, config("llama"), quantize="nf4")
    assert report.total == numbers + report.trainable
    assert all(site.storage == "nf4" for site in report.sites)
    assert report.bytes_after < report.bytes_before


def test_any_torch_model() -> None:
    model = Net()
    report = peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear", r=2), quantize="nf4")
    # nothing says what the head of this model is
    assert report.matched == ("blocks.0.0", "blocks.0.2", "blocks.1.0", "blocks.1.2", "head")
    assert model(IDS).shape == (3, 4, 16)


@pytest.mark.parametrize("quantize", [None, "nf4"])
def test_torch_s_own_encoder(quantize: str | None) -> None:
    """In eval() it reads its children's weights itself, unless it is kept from that."""
    model = nn.TransformerEncoder(nn.TransformerEncoderLayer(64, 4, 128, batch_first=True), 2).eval()
    options = {"r": 4, "init_lora_weights": False}
    peftrt.adapt(model, peftrt.LoraConfig(target_modules=["linear1", "linear2"], **options), quantize=quantize)
    x, padding = torch.randn(2, 5, 64), torch.tensor([[False] * 5, [False] * 3 + [True] * 2])
    slow = model(x, src_key_padding_mask=padding)
    with torch.no_grad():
        fast = model(x, src_key_padding_mask=padding)
        peftrt.set_active(model, None)
        bare = model(x, src_key_padding_mask=padding)
    assert_same_bits(fast, slow.detach())
    assert (bare - fast)[~padding].abs().max() > 1e-2


def test_hooks_and_modes_survive() -> None:
    model = Net()
    calls = []
    model.head.register_forward_hook(lambda module, args, output: calls.append(type(module).__name__))
    model.blocks[0][0].eval()
    peftrt.adapt(model, peftrt.LoraConfig(target_modules=["head", "blocks.0.0", "blocks.1.0"]))
    model(IDS)
    assert calls == ["LoRALinear"]
    assert not model.blocks[0][0].training
    assert model.blocks[1][0].training


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], type[Exception], str]] = {
    "a typing slip": ({"target_modules": ["q_prj"]}, {}, ConfigError, "'q_prj'.*close names: .*q_proj"),
    "one of two": ({"target_modules": ["q_proj", "w_proj"]}, {}, ConfigError, "'w_proj' matches no module"),
    "a pattern": ({"target_modules": r".*\.nothing"}, {}, ConfigError, "nothing"),
    "nothing like it": ({"target_modules": ["zzz"]}, {}, ConfigError, "linear modules are called .*q_proj"),
    "norm": ({"target_modules": ["input_layernorm"]}, {}, UnsupportedError, "input_layernorm .*RMSNorm is neither"),
    "container": ({"target_modules": ["mlp"]}, {}, UnsupportedError, "mlp cannot be adapted"),
    "all excluded": ({"target_modules": ["q_proj"], "exclude_modules": ["q_proj"]}, {}, ConfigError, "q_proj"),
    "rank pattern": ({"rank_pattern": {"q_prj": 2}}, {}, ConfigError, r"rank_pattern\['q_prj'\]"),
    "layers": ({"layers_to_transform": [7]}, {}, ConfigError, "target_modules"),
    "saved": ({"modules_to_save": ["lm_haed"]}, {}, ConfigError, "'lm_haed'.*close names: lm_head"),
    "quantize": ({}, {"quantize": "int4"}, ValueError, "'nf4' or None, got 'int4'"),
    "block size": ({}, {"quantize": "nf4", "block_size": 48}, ValueError, "block_size .* 48"),
    "adapter dtype": ({}, {"adapter_dtype": torch.int8}, TypeError, "adapter_dtype"),
    "name with a dot": ({}, {"name": "a.b"}, AdapterNameError, "'a.b'"),
    "name with an at": ({}, {"name": "a@b"}, AdapterNameError, "'@'"),
    "name of a path": ({}, {"name": "../x"}, AdapterNameError, "must not contain"),
    "no name": ({}, {"name": ""}, AdapterNameError, "empty"),
}


class TestErrors:
    """Every error is raised before anything is changed, and names what is wrong."""

    @pytest.mark.parametrize("case", CASES)
    def test_first_adapter(self, case: str) -> None:
        changes, arguments, error, message = CASES[case]
        model = build("llama")
        with unchanged(model), pytest.raises(error, match=message):
            peftrt.adapt(model, config("llama", **changes), **arguments)

    @pytest.mark.parametrize("case", CASES)
    def test_second_adapter(self, case: str) -> None:
        changes, arguments, error, message = CASES[case]
        model = build("llama")
        peftrt.adapt(model, config("llama", target_modules=["q_proj"]), name="one", quantize=None)
        with unchanged(model), pytest.raises(error, match=message):
            peftrt.adapt(model, config("llama", **changes), **{"name": "two", **arguments})

    def test_name_that_is_taken(self) -> None:
        model = build("llama")
        peftrt.adapt(model, config("llama"), name="fr")
        for name in ("fr", "FR"):
            with unchanged(model), pytest.raises(AdapterNameError, match="in use"):
                peftrt.adapt(model, config("llama"), name=name)

    @pytest.mark.parametrize(
        "second",
        [{"quantize": None}, {"quantize": "nf4", "block_size": 32}, {"quantize": "nf4", "double_quant": False}],
    )
    def test_quantize_must_agree(self, second: dict[str, Any]) -> None:
        model = build("llama")
        peftrt.adapt(model, config("llama"), quantize="nf4")
        with unchanged(model), pytest.raises(ValueError, match="quantize='nf4', block_size=64"):
            peftrt.adapt(model, config("llama"), name="two", **second)

    def test_not_a_model_or_configuration(self) -> None:
        with pytest.raises(TypeError, match=r"nn.Module, got dict"):
            peftrt.adapt({}, config("llama"))  # type: ignore[arg-type]
        with pytest.raises(TypeError, match=r"config must be one of peftrt\.LoraConfig, .*got dict"):
            peftrt.adapt(build("llama"), {"r": 8})  # type: ignore[arg-type]
        with pytest.raises(UnsupportedError, match="from_linear"):
            peftrt.adapt(nn.Linear(4, 4), peftrt.LoraConfig(target_modules="all-linear"))

    def test_conv2d_and_attention_projection(self) -> None:
        model = Net()
        with (
            unchanged(model),
            pytest.raises(
                UnsupportedError, match=r"conv cannot be adapted: Conv2d is a convolution; .* out of its scope"
            ),
        ):
            peftrt.adapt(model, peftrt.LoraConfig(target_modules=["conv"]))
        attention = nn.Sequential(nn.MultiheadAttention(8, 2))
        with unchanged(attention), pytest.raises(UnsupportedError, match="MultiheadAttention"):
            peftrt.adapt(attention, peftrt.LoraConfig(target_modules=["out_proj"]))

    def test_nan_is_not_quantised(self) -> None:
        model = Net()
        with torch.no_grad():
            model.blocks[1][2].weight[3, 3] = torch.nan
        with unchanged(model), pytest.raises(ValueError, match=r"blocks\.1\.2\.weight holds NaN"):
            peftrt.adapt(model, peftrt.LoraConfig(target_modules=["0.0", "1.2"]), quantize="nf4")

    def test_bitsandbytes_layers(self) -> None:
        bnb = pytest.importorskip("bitsandbytes")
        model = nn.Sequential(nn.Linear(64, 64), bnb.nn.Linear4bit(64, 64))
        for targets in ("all-linear", ["1"]):
            with unchanged(model), pytest.raises(UnsupportedError, match=r"1 .*quantised by bitsandbytes already"):
                peftrt.adapt(model, peftrt.LoraConfig(target_modules=targets), quantize="nf4")

    def test_layers_with_adapters_of_their_own(self) -> None:
        model = nn.Sequential(peftrt.LoRALinear(8, 8, r=2), nn.Linear(8, 8))
        with pytest.raises(UnsupportedError, match="adapters of its own"):
            peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear"), name="fr")

    @pytest.mark.parametrize("at", [0, 5])
    def test_failure_in_the_middle(self, at: int, monkeypatch: pytest.MonkeyPatch) -> None:
        add, calls = AdapterLinear.add_adapter, []

        def failing(self: AdapterLinear, *args: Any, **kwargs: Any) -> Any:
            calls.append(self)
            if len(calls) > at:
                raise MemoryError("no more")
            return add(self, *args, **kwargs)

        model = build("bert")
        monkeypatch.setattr(AdapterLinear, "add_adapter", failing)
        with unchanged(model), pytest.raises(MemoryError):
            peftrt.adapt(model, config("bert", modules_to_save=["classifier"]))
        monkeypatch.undo()
        assert peftrt.adapt(model, config("bert", modules_to_save=["classifier"])).saved == ("classifier",)

    def test_failure_while_quantising_says_how_far_it_came(self, monkeypatch: pytest.MonkeyPatch) -> None:
        quantize, calls = peftrt.NF4Weight.quantize, []

        def failing(*args: Any, **kwargs: Any) -> Any:
            calls.append(args)
            if len(calls) > 3:
                raise MemoryError("no more")
            return quantize(*args, **kwargs)

        model = build("llama")
        monkeypatch.setattr(peftrt.NF4Weight, "quantize", failing)
        with pytest.raises(MemoryError) as caught:
            peftrt.adapt(model, config("llama"), quantize="nf4")
        assert "3 of 12 weights were quantised" in caught.value.__notes__[0]
        monkeypatch.undo()
        report = peftrt.adapt(model, config("llama"), quantize="nf4")
        assert {site.storage for site in report.sites} == {"nf4"}


class TestSecondAdapter:
    def test_other_targets(self) -> None:
        model = build("llama")
        peftrt.adapt(model, config("llama", target_modules=["q_proj"]), name="fr", quantize="nf4")
        fr = logits(model)
        report = peftrt.adapt(model, config("llama", target_modules=["q_proj", "up_proj"]), name="de", quantize="nf4")
        assert len(report.sites) == 4
        assert peftrt.active_adapters(model) == {"de": 1.0}
        trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
        assert trained
        assert all(name.endswith("@de") for name in trained)
        peftrt.set_active(model, "fr")
        # up_proj has been quantised since
        assert (logits(model) - fr).abs().max() < 0.1
        assert model.model.layers[0].mlp.up_proj.adapter_names == ("de",)

    def test_two_copies_of_a_head(self) -> None:
        model = build("bert")
        bare = logits(model)
        heads = {}
        for name in ("fr", "de"):
            peftrt.adapt(model, config("bert", target_modules=["query"], task_type="SEQ_CLS"), name=name)
            with torch.no_grad():
                for parameter in model.classifier.chosen.parameters():
                    parameter.add_(torch.randn_like(parameter))
            heads[name] = logits(model)
        assert model.classifier.adapter_names == ("fr", "de")
        assert not model.classifier.base.weight.requires_grad
        assert not torch.equal(heads["fr"], heads["de"])
        for name, expected in heads.items():
            peftrt.set_active(model, name)
            assert_same_bits(logits(model), expected)
        peftrt.set_active(model, None)
        assert_same_bits(logits(model), bare)
        with unchanged(model), pytest.raises(ValueError, match=r"classifier.*modules_to_save"):
            peftrt.set_active(model, {"fr": 0.5, "de": 0.5})
        assert model.classifier.out_features == 3  # others look at a head without calling it

    def test_adapters_of_a_head_exclude_each_other(self) -> None:
        model = build("bert")
        peftrt.adapt(model, config("bert", target_modules=["query"], modules_to_save=["classifier"]), name="fr")
        with unchanged(model), pytest.raises(UnsupportedError, match=r"classifier cannot be adapted.*modules_to_save"):
            peftrt.adapt(model, config("bert", target_modules=["classifier"]), name="de")
        model = build("bert")
        peftrt.adapt(model, config("bert", target_modules=["classifier"]), name="fr")
        with unchanged(model), pytest.raises(UnsupportedError, match="classifier cannot be trained whole"):
            peftrt.adapt(model, config("bert", target_modules=["query"], modules_to_save=["classifier"]), name="de")


class TestQuantising:
    def test_no_second_copy(self, monkeypatch: pytest.MonkeyPatch) -> None:
        """While a weight is quantised, those before it are gone."""
        model = Net()
        dense = [weakref.ref(module.weight) for module in model.modules() if isinstance(module, nn.Linear)]
        quantize, alive = peftrt.NF4Weight.quantize, []

        def counting(*args: Any, **kwargs: Any) -> Any:
            alive.append(sum(reference() is not None for reference in dense))
            return quantize(*args, **kwargs)

        monkeypatch.setattr(peftrt.NF4Weight, "quantize", counting)
        peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear", r=2), quantize="nf4")
        assert alive == [5, 4, 3, 2, 1]
        assert not any(reference() is not None for reference in dense)

    @pytest.mark.parametrize("kind", ["gpt2", "llama"])
    def test_a_tied_head_stays_tied_and_dense(self, kind: str) -> None:
        model = build(kind, tied=True)
        embedding = model.get_input_embeddings().weight
        bits = embedding.detach().clone()
        report = peftrt.adapt(model, config(kind, target_modules=[ONE[kind], "lm_head"]), quantize="nf4")
        assert model.lm_head.weight is embedding
        assert_same_bits(embedding.detach(), bits)
        site = next(site for site in report.sites if site.path == "lm_head")
        assert site.storage == "float32"
        assert "wte" in site.note or "embed_tokens" in site.note
        assert site.note in str(report)
        assert {site.storage for site in report.sites if site.path != "lm_head"} == {"nf4"}

    def test_what_a_model_keeps_in_full_precision(self) -> None:
        """T5 casts its hidden state to the dtype of ``wo.weight``, which must not be that of bytes."""
        transformers = pytest.importorskip("transformers")
        sizes = {"vocab_size": 96, "d_model": 64, "d_kv": 16, "d_ff": 96, "num_layers": 1, "num_heads": 4}
        model = transformers.T5ForConditionalGeneration(transformers.T5Config(decoder_start_token_id=0, **sizes)).eval()
        report = peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear"), quantize="nf4")
        storage = {site.path.rpartition(".")[2]: site.storage for site in report.sites}
        assert storage == {**dict.fromkeys(("q", "k", "v", "o", "wi"), "nf4"), "wo": "float32"}
        assert "_keep_in_fp32_modules" in str(report)
        assert model(input_ids=IDS, labels=IDS).loss.isfinite()

    def test_a_shared_module_is_one_layer(self) -> None:
        shared = nn.Linear(64, 64)
        model = nn.ModuleDict({"a": nn.Sequential(shared), "b": nn.Sequential(shared)})
        report = peftrt.adapt(model, peftrt.LoraConfig(target_modules="all-linear", r=2), quantize="nf4")
        assert report.matched == ("a.0",)
        assert isinstance(model["a"][0], peftrt.QLoRALinear)
        assert model["a"][0] is model["b"][0]

    def test_nf4_layers_are_taken_over(self) -> None:
        layer = peftrt.NF4Linear(64, 32)
        model = nn.Sequential(layer, nn.Linear(32, 4))
        x = torch.randn(2, 64)
        before = layer(x)
        peftrt.adapt(model, peftrt.LoraConfig(target_modules=["0"]), quantize="nf4")
        assert isinstance(model[0], peftrt.QLoRALinear)
        assert model[0].weight is layer.weight
        assert_same_bits(model[0](x), before)

    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_half_precision_models(self, dtype: torch.dtype) -> None:
        model = build("llama").to(dtype)
        peftrt.adapt(model, config("llama"), quantize="nf4")
        out = model(IDS).logits
        assert out.dtype == dtype
        out.float().sum().backward()
        q_proj = model.model.layers[0].self_attn.q_proj
        assert q_proj.lora_A.dtype == q_proj.lora_A.grad.dtype == torch.float32
