"""Bottleneck adapters on whole models: places, arithmetic, life, files, faults."""

from __future__ import annotations

import copy
import json
import pickle
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import peftrt
from peftrt.adapters.blocks import sub_layers
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError
from peftrt.nn.bottleneck import Bottleneck, BottleneckSite
from tests.adapters.tiny import KINDS, assert_unchanged, build, config, logits, state_of, tokens, unchanged
from tests.tolerances import assert_same_bits

PLACEMENTS = ("houlsby", "pfeiffer", "parallel")
CASES = [(kind, placement) for kind in KINDS for placement in PLACEMENTS]


def adapted(kind: str, placement: str, name: str = "fr", seed: int = 1, **changes: Any) -> Any:
    """A model whose adapter changes its output by far."""
    model = build(kind)
    add(model, placement, name, seed, **changes)
    return model


def add(model: nn.Module, placement: str, name: str, seed: int = 1, **changes: Any) -> None:
    peftrt.adapt(model, peftrt.BottleneckConfig(placement=placement, **changes), name=name)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.2)


def sites_of(model: nn.Module) -> list[BottleneckSite]:
    return [module for module in model.modules() if isinstance(module, BottleneckSite)]


def written_out(bottleneck: Bottleneck, u: Tensor, h: Tensor) -> Tensor:
    act = {"relu": torch.relu, "silu": nn.functional.silu}[bottleneck.activation]
    inner = act(u @ bottleneck.down_weight.t() + bottleneck.down_bias)
    return h + bottleneck.scaling * (inner @ bottleneck.up_weight.t() + bottleneck.up_bias)


class Block(nn.Module):
    """A pre-norm block that names no class of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.mix = nn.LayerNorm(8), nn.Linear(8, 8)
        self.norm2, self.ffn = nn.LayerNorm(8), nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mix(self.norm1(x))
        return x + self.ffn(self.norm2(x))


class Own(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList([Block(), Block()])

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x)
        return x


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_arithmetic_of_norms_that_come_first(placement: str) -> None:
    """Against a Llama block written out: u is h, h + x or x."""
    model = adapted("llama", placement)
    block = model.model.layers[0]
    seen: dict[str, Any] = {}
    block.post_attention_layernorm.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    block.mlp.down_proj.register_forward_hook(lambda m, args, output: seen.update(h=output))
    block.register_forward_hook(lambda m, args, output: seen.update(y=output))
    logits(model)
    h, x = seen["h"], seen["x"]
    u = {"houlsby": h, "pfeiffer": h + x, "parallel": x}[placement]
    expected = x + written_out(block.mlp.bottleneck.adapter("fr"), u, h)
    assert (seen["y"] - expected).abs().max() < 1e-6
    assert (seen["y"] - (x + h)).abs().max() > 0.01


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_arithmetic_of_norms_that_follow(placement: str) -> None:
    """Against a BERT block written out: Pfeiffer's input has been through the model's own norm."""
    model = adapted("bert", placement)
    block = model.bert.encoder.layer[0]
    seen: dict[str, Any] = {}
    block.intermediate.register_forward_pre_hook(lambda m, args: seen.update(x=args[0]))
    block.output.dense.register_forward_hook(lambda m, args, output: seen.update(h=output))
    block.register_forward_hook(lambda m, args, output: seen.update(y=output))
    logits(model)
    h, x, norm = seen["h"], seen["x"], block.output.LayerNorm
    u = {"houlsby": h, "pfeiffer": norm(h + x), "parallel": x}[placement]
    expected = norm(x + written_out(block.output.dropout.bottleneck.adapter("fr"), u, h))
    y = seen["y"][0] if isinstance(seen["y"], tuple) else seen["y"]
    assert (y - expected).abs().max() < 2e-6


@pytest.mark.parametrize(("kind", "placement"), CASES)
def test_life_of_an_adapter(kind: str, placement: str, tmp_path: Path) -> None:
    model = build(kind)
    base, before = logits(model), state_of(model)
    report = peftrt.adapt(model, peftrt.BottleneckConfig(placement=placement), name="fr")
    per_block = 2 if placement == "houlsby" else 1
    assert len(report.sites) == 2 * per_block
    assert {site.r for site in report.sites} == {32 if placement == "parallel" else 4}
    assert report.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    peftrt.remove(model, "fr")
    model.requires_grad_(True)
    assert_unchanged(model, before)
    add(model, placement, "fr")
    with_fr = logits(model)
    assert (with_fr - base).abs().max() > 1e-3
    peftrt.set_active(model, None)
    assert_same_bits(logits(model), base)
    peftrt.set_active(model, "fr")
    for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert_same_bits(logits(twin), with_fr)
        peftrt.set_active(twin, None)
        assert_same_bits(logits(twin), base)  # its own hooks, not the original's
    assert_same_bits(logits(model), with_fr)
    peftrt.save(model, tmp_path)
    other = build(kind)
    peftrt.load(other, tmp_path, name="de")
    assert_same_bits(logits(other), base)  # loading does not activate
    peftrt.set_active(other, "de")
    assert_same_bits(logits(other), with_fr)
    peftrt.load(other, tmp_path, name="de", replace=True)
    assert_same_bits(logits(other), with_fr)


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_rows(placement: str) -> None:
    model = adapted("llama", placement)
    add(model, "houlsby", "de", seed=2, reduction_factor=8)
    alone = {}
    for name in ("fr", "de", None):
        peftrt.set_active(model, name)
        alone[name] = logits(model)
    with peftrt.rows(model, ["de", None, "fr"]):
        mixed = logits(model)
    for row, name in enumerate(["de", None, "fr"]):
        assert (mixed[row] - alone[name][row]).abs().max() < 1e-5
    with peftrt.rows(model, ["fr", "fr", "fr"]):
        assert_same_bits(logits(model), alone["fr"])
    with peftrt.rows(model, [None, None, None]):
        assert_same_bits(logits(model), alone[None])
    with peftrt.rows(model, ["fr", "de"]), pytest.raises(ValueError, match="2 names"):
        logits(model)


def test_several_kinds_on_one_model() -> None:
    model = build("llama")
    base = logits(model)
    peftrt.adapt(model, config("llama"), name="lora")
    with_lora = logits(model)
    add(model, "pfeiffer", "bn")
    with_bn = logits(model)
    peftrt.set_active(model, {"lora": 1.0, "bn": 1.0})
    both = logits(model)
    assert min((both - other).abs().max() for other in (base, with_lora, with_bn)) > 1e-3
    with peftrt.rows(model, ["lora", "bn", None]):
        mixed = logits(model)
    for row, expected in enumerate([with_lora, with_bn, base]):
        assert (mixed[row] - expected[row]).abs().max() < 1e-5
    peftrt.remove(model, "bn")
    peftrt.set_active(model, "lora")
    assert_same_bits(logits(model), with_lora)


def test_what_stands_in_a_layer_s_place_keeps_its_bottleneck() -> None:
    """The host is a linear layer, which LoRA then replaces."""
    model = Own()
    x = torch.randn(3, 8)
    peftrt.adapt(model, peftrt.BottleneckConfig(placement="houlsby", target_modules=["mix"]), name="bn")
    with_bn = model(x)
    peftrt.adapt(model, peftrt.LoraConfig(r=2, target_modules=["mix"]), name="lora")
    assert isinstance(model.blocks[0].mix, peftrt.LoRALinear)
    assert_same_bits(model(x), Own()(x))  # B is zero
    peftrt.set_active(model, "bn")
    assert_same_bits(model(x), with_bn)
    peftrt.remove(model, "bn")
    assert not [name for name, _ in model.named_modules() if "bottleneck" in name]


def test_only_one_at_a_place_is_active() -> None:
    model = adapted("llama", "pfeiffer")
    add(model, "parallel", "de")
    for weights in ({"fr": 1.0, "de": 1.0}, {"fr": 0.5}):
        with unchanged(model), pytest.raises(ValueError, match="one can be active, with weight 1"):
            peftrt.set_active(model, weights)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("placement", PLACEMENTS)
def test_checkpointing_gives_the_same_gradients(placement: str, reentrant: bool) -> None:
    model = Own()
    targets = ["mix", "ffn"]
    if placement == "pfeiffer":
        model, targets = nn.TransformerEncoder(nn.TransformerEncoderLayer(8, 2, 16, 0.0), 2, None, False).eval(), None
        inner = list(model.layers)
    else:
        inner = list(model.blocks)
    add(model, placement, "fr", target_modules=targets)
    x = torch.randn(3, 5, 8, requires_grad=True)
    model(x).square().sum().backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert all(grad.abs().max() > 0 for grad in expected.values())
    model.zero_grad(set_to_none=True)
    y = x
    for block in inner:
        y = checkpoint(block, y, use_reentrant=reentrant)
    y.square().sum().backward()
    for name, parameter in model.named_parameters():
        if name in expected:
            assert_same_bits(parameter.grad, expected[name])


def test_threads_do_not_see_each_other_s_residuals() -> None:
    model = adapted("llama", "pfeiffer")
    batches = [tokens(seed=seed) for seed in range(4)]
    expected = [logits(model, batch) for batch in batches]
    wrong: list[int] = []

    def run(number: int) -> None:
        for _ in range(20):
            if not torch.equal(logits(model, batches[number]), expected[number]):
                wrong.append(number)

    threads = [threading.Thread(target=run, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert not any(site._seen for site in sites_of(model))


@pytest.mark.parametrize("placement", PLACEMENTS)
def test_compiled(placement: str) -> None:
    model = adapted("llama", placement)
    expected = logits(model)
    compiled = torch.compile(model, backend="eager", fullgraph=True)
    with torch.no_grad():
        assert (compiled(tokens(), use_cache=False).logits - expected).abs().max() < 1e-6
    assert not any(site._seen for site in sites_of(model))


def test_training_lowers_the_loss_and_leaves_the_base_alone() -> None:
    model = build("bert")
    before = {name: value.clone() for name, value in model.state_dict().items()}
    peftrt.adapt(model, peftrt.BottleneckConfig(placement="houlsby", task_type="SEQ_CLS"))
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    ids, labels = tokens(), torch.tensor([0, 1, 2])
    losses = []
    for _ in range(30):
        loss = model(ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    after = model.state_dict()
    for name, value in before.items():
        assert_same_bits(after[name], value)


def test_the_head_of_a_task_goes_with_it(tmp_path: Path) -> None:
    model = build("bert")
    peftrt.adapt(model, peftrt.BottleneckConfig(task_type="SEQ_CLS"), name="fr")
    with torch.no_grad():
        model.classifier.copy_of("fr").weight.add_(1)
    expected = logits(model)
    peftrt.save(model, tmp_path)
    other = build("bert")
    peftrt.load(other, tmp_path, name="fr")
    peftrt.set_active(other, "fr")
    assert_same_bits(logits(other), expected)


def test_over_a_quantised_base(tmp_path: Path) -> None:
    model = build("llama")
    report = peftrt.adapt(model, peftrt.BottleneckConfig(placement="houlsby"), name="fr", quantize="nf4")
    quantised = [path for path, module in model.named_modules() if isinstance(module, peftrt.NF4Linear)]
    assert len(quantised) == 14  # all linear layers but the head
    assert report.bytes_after < report.bytes_before / 2
    alone = build("llama")
    peftrt.adapt(alone, peftrt.LoraConfig(target_modules="all-linear"), quantize="nf4")
    peftrt.set_active(model, None)
    peftrt.set_active(alone, None)
    assert_same_bits(logits(model), logits(alone))
    peftrt.adapt(model, config("llama", target_modules="all-linear"), name="de", quantize="nf4")
    with unchanged(model), pytest.raises(ValueError, match="adapted with quantize='nf4'"):
        peftrt.adapt(model, config("llama"), name="es")
    peftrt.adapt(model, peftrt.BottleneckConfig(), name="es")  # leaves the base as it is stored


def test_cannot_be_put_into_weights(tmp_path: Path) -> None:
    model = adapted("llama", "houlsby")
    with unchanged(model):
        with pytest.raises(ValueError, match=r"merge: adapter 'fr' \(BottleneckConfig\) is no change of weights"):
            peftrt.merge(model)
        with pytest.raises(ValueError, match=r"export: adapter 'fr' \(BottleneckConfig\) is no change of weights"):
            peftrt.export(model, tmp_path / "out")
    peftrt.set_active(model, None)
    peftrt.export(model, tmp_path / "out", dtype=torch.float32)
    expected = build("llama").state_dict()
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert set(written) <= set(expected)
    assert not [name for name in written if "bottleneck" in name]


def test_places_of_every_kind_of_block() -> None:
    torch_model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(8, 2, 16, norm_first=True), 3, enable_nested_tensor=False
    )
    assert [layer.output for layer in sub_layers(torch_model)][:2] == ["layers.0.dropout1", "layers.0.dropout2"]
    assert [layer.number for layer in sub_layers(torch_model)] == [0, 0, 1, 1, 2, 2]
    transformers = pytest.importorskip("transformers")
    t5 = transformers.T5Model(
        transformers.T5Config(
            vocab_size=32, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_decoder_layers=1, num_heads=4
        )
    )
    found = {layer.output: layer.role for layer in sub_layers(t5)}
    assert found == {
        "encoder.block.0.layer.0.dropout": "attention",
        "encoder.block.0.layer.1.dropout": "feed_forward",
        "decoder.block.0.layer.0.dropout": "attention",
        "decoder.block.0.layer.1.dropout": "cross_attention",
        "decoder.block.0.layer.2.dropout": "feed_forward",
    }
    distilbert = transformers.DistilBertModel(
        transformers.DistilBertConfig(vocab_size=32, dim=16, hidden_dim=32, n_layers=1, n_heads=4)
    )
    assert [layer.output for layer in sub_layers(distilbert)] == [
        "transformer.layer.0.attention", "transformer.layer.0.ffn",
    ]  # fmt: skip


def test_blocks_can_be_left_out() -> None:
    model = build("llama")
    report = peftrt.adapt(model, peftrt.BottleneckConfig(leave_out=[0]))
    assert report.matched == ("model.layers.1.mlp",)
    with pytest.raises(ConfigError, match="leave_out: no block has the index 7; there are 0 to 1"):
        peftrt.adapt(build("llama"), peftrt.BottleneckConfig(leave_out=[7]))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"placement": "houlsbi"}, "placement: expected one of houlsby, pfeiffer, parallel, got 'houlsbi'"),
        ({"reduction_factor": 0}, "reduction_factor: expected a number above 0, got 0"),
        ({"reduction_factor": float("nan")}, "reduction_factor: expected a finite number"),
        ({"reduction_factor": True}, "reduction_factor: expected a finite number, got True"),
        ({"activation": "swoosh"}, "activation: expected one of relu, .* got 'swoosh'"),
        ({"scaling": float("inf")}, "scaling: expected a finite number"),
        ({"init": "zero"}, "init: expected one of bert, houlsby, mam_adapter, got 'zero'"),
        ({"leave_out": "0"}, "leave_out: expected a list of layers' indices"),
        ({"leave_out": [-1]}, "leave_out: expected integers in"),
        ({"target_modules": ["mlp"]}, "target_modules: a 'pfeiffer' adapter needs the block's residual"),
        ({"placement": "houlsby", "target_modules": []}, "target_modules: must not be empty"),
        ({"placement": "houlsby", "target_modules": "("}, "target_modules: '\\('"),
        ({"placement": "houlsby", "target_modules": ["mlp"], "leave_out": [0]}, "leave_out: blocks cannot be left out"),
        ({"task_type": "NONE"}, "task_type: expected one of"),
    ],
)
def test_bad_fields_are_named(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        peftrt.BottleneckConfig(**fields)


def test_models_in_which_no_place_is_found() -> None:
    model = Own()
    with unchanged(model):
        with pytest.raises(UnsupportedError, match="no blocks like Llama's"):
            peftrt.adapt(model, peftrt.BottleneckConfig())
        with pytest.raises(ConfigError, match=r"'fnn' matches no module of the model; close names: .*ffn"):
            peftrt.adapt(model, peftrt.BottleneckConfig(placement="houlsby", target_modules=["fnn"]))
    report = peftrt.adapt(model, peftrt.BottleneckConfig(placement="parallel", target_modules=["ffn"]))
    assert report.matched == ("blocks.0.ffn.2", "blocks.1.ffn.2")


def saved(tmp_path: Path) -> Path:
    peftrt.save(adapted("llama", "pfeiffer"), tmp_path)
    return tmp_path


KEY = "base_model.model.model.layers.0.mlp.bottleneck."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop(KEY + "down.bias"), r"has no key base_model.*down\.bias"),
        (lambda t: t.update({KEY + "up.weight": torch.zeros(64, 5)}), r"up_weight is \[64, 5\].*make it \[64, 4\]"),
        (
            lambda t: t.update({KEY + "up.bias": torch.zeros(64, dtype=torch.float64)}),
            "expected float32, bfloat16 or float16",
        ),
        (lambda t: t.update({KEY.replace("mlp", "nlp") + key: t.pop(KEY + key) for key in NAMES}), "no module"),
        (lambda t: t.update({"stray": torch.zeros(1)}), "key 'stray' is neither a bottleneck's"),
        (lambda t: [t.pop(KEY + key) for key in NAMES], "no tensors for 'model.layers.0.mlp'"),
        (lambda t: t[KEY + "up.bias"].fill_(float("nan")), "NaN|finite"),
    ],
)
def test_bad_files(change: Any, message: str, tmp_path: Path) -> None:
    path = saved(tmp_path) / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    model = build("llama")
    with unchanged(model), pytest.raises(FormatError, match=message):
        peftrt.load(model, tmp_path)


NAMES = ("down.weight", "down.bias", "up.weight", "up.bias")


def test_fields_that_are_not_known_are_refused(tmp_path: Path) -> None:
    path = saved(tmp_path) / "adapter_config.json"
    fields = json.loads(path.read_text())
    path.write_text(json.dumps({**fields, "use_gating": True}))
    with pytest.raises(UnsupportedError, match="use_gating = True is not a field that peftrt knows"):
        peftrt.load(build("llama"), tmp_path)
