"""The conventional ways: the head alone, the head over kept features, everything."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import peftrt
from peftrt.formats.errors import ConfigError, FormatError, UnsupportedError
from peftrt.formats.safe import read_tensors
from peftrt.nn import Features, FeatureStats
from tests.adapters.tiny import build, config, logits, tokens, unchanged
from tests.tolerances import assert_close, assert_same_bits

HEADS = (peftrt.OutputLayer, peftrt.FeatureExtraction)


def trained(model: nn.Module) -> list[str]:
    return [name for name, parameter in model.named_parameters() if parameter.requires_grad]


def step(model: Any, ids: Tensor, lr: float = 0.1) -> None:
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=lr)
    model.train()
    model(ids, labels=torch.zeros(len(ids), dtype=torch.int64)).loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    model.eval()


def features(model: nn.Module) -> Features:
    return next(module for module in model.modules() if isinstance(module, Features))


def stats(model: nn.Module) -> FeatureStats:
    return features(model).stats()


def without_dropout(kind: str = "bert") -> Any:
    model = build(kind)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


@pytest.mark.parametrize("kind", HEADS)
def test_only_the_head_is_trained(kind: Any) -> None:
    model = build("bert")
    before, base = copy.deepcopy(model.state_dict()), logits(model)
    report = peftrt.adapt(model, kind())
    assert trained(model) == ["classifier.copy@default.weight", "classifier.copy@default.bias"]
    assert report.saved == ("classifier",)
    assert report.trainable == 3 * 64 + 3
    assert "trained whole: classifier" in str(report)
    assert_same_bits(logits(model), base)
    step(model, tokens())
    after = logits(model)
    assert not torch.equal(after, base)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items() if key in before)
    peftrt.set_active(model, None)
    assert_same_bits(logits(model), base)
    with peftrt.rows(model, ["default", None, "default"]):
        mixed = logits(model)
    assert_close(mixed[0], after[0])
    assert_close(mixed[1], base[1])
    peftrt.remove(model, "default")
    assert list(model.state_dict()) == list(before)
    assert "forward" not in model.bert.__dict__
    assert_same_bits(logits(model), base)


def test_the_head_of_a_language_model_is_its_output_embedding() -> None:
    model = build("llama")
    peftrt.adapt(model, peftrt.OutputLayer())
    assert trained(model) == ["lm_head.copy@default.weight"]
    # quantised is all but the head
    model = build("llama")
    peftrt.adapt(model, peftrt.OutputLayer(), quantize="nf4")
    assert trained(model) == ["lm_head.copy@default.weight"]
    assert isinstance(model.model.layers[0].mlp.up_proj, peftrt.QLoRALinear)


def test_modules_can_be_named() -> None:
    model = build("bert")
    report = peftrt.adapt(model, peftrt.OutputLayer(modules=["classifier", "pooler"]), quantize="nf4")
    assert set(report.saved) == {"bert.pooler", "classifier"}
    assert isinstance(model.bert.pooler.copy_of("default").dense, nn.Linear)
    with pytest.raises(ConfigError, match="'head' matches no module"):
        peftrt.adapt(build("bert"), peftrt.OutputLayer(modules=["head"]))
    with pytest.raises(ConfigError, match="modules: the model has no head that could be found"):
        peftrt.adapt(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2)), peftrt.OutputLayer())
    with pytest.raises(ConfigError, match="another word for modules_to_save"):
        peftrt.OutputLayer(modules=["a"], modules_to_save=["b"])


@pytest.mark.parametrize("kind", HEADS)
def test_a_head_is_saved_and_loaded(kind: Any, tmp_path: Path) -> None:
    model = build("bert")
    peftrt.adapt(model, kind())
    step(model, tokens())
    peftrt.save(model, tmp_path / "head")
    keys = set(read_tensors(tmp_path / "head" / "adapter_model.safetensors"))
    assert keys == {"base_model.model.classifier.weight", "base_model.model.classifier.bias"}
    other = build("bert")
    found = peftrt.load(other, tmp_path / "head", name="mine")
    assert type(found) is kind
    assert found.modules_to_save == ("classifier",)
    assert_same_bits(logits(other), logits(build("bert")))
    peftrt.set_active(other, "mine")
    assert_same_bits(logits(other), logits(model))
    # beside an adapter of the body
    peftrt.adapt(other, config("bert"), name="lora")
    peftrt.set_active(other, {"lora": 1.0, "mine": 1.0})
    assert not torch.equal(logits(other), logits(model))


def test_files_that_do_not_fit(tmp_path: Path) -> None:
    model = build("bert")
    peftrt.adapt(model, peftrt.OutputLayer())
    peftrt.save(model, tmp_path / "head")
    path = tmp_path / "head" / "adapter_config.json"
    text = path.read_text()
    llama = build("llama")
    with unchanged(llama), pytest.raises(FormatError, match="no module 'classifier'"):
        peftrt.load(llama, tmp_path / "head")
    path.write_text(text.replace('"classifier"', '"classifier", "score"'))
    with pytest.raises(FormatError, match=r"(?s)modules.*no tensor for modules_to_save entry 'score'|entry 'score'"):
        peftrt.load(build("bert"), tmp_path / "head")
    path.write_text(text.replace("OUTPUT_LAYER", "FULL_FINE_TUNING"))
    with pytest.raises(UnsupportedError, match="load it as a model"):
        peftrt.load(build("bert"), tmp_path / "head")
    path.write_text(text.replace('"modules_to_save"', '"modules_to_keep"'))
    with pytest.raises(ConfigError, match="modules_to_save is missing"):
        peftrt.load(build("bert"), tmp_path / "head")


def test_features_are_computed_once() -> None:
    model, plain = without_dropout(), without_dropout()
    peftrt.adapt(model, peftrt.FeatureExtraction())
    calls: list[int] = []
    model.bert.encoder.register_forward_pre_hook(lambda module, args: calls.append(args[0].shape[0]))
    model.train()
    plain.eval()
    ids = tokens(6, seed=1)
    for number, rows in enumerate(([0, 1, 2], [2, 3, 2], [0, 1, 2], [5, 5, 4])):
        assert_close(model(ids[rows]).logits, plain(ids[rows]).logits), number
    # row 3 alone in the second batch, nothing in the third, rows 5 and 4 in the last
    assert calls == [3, 1, 2]
    assert stats(model)[:3] == (6, 6, 6)
    # of each row what the body returns, 6 states and the pooled one
    assert stats(model).nbytes == 6 * 4 * (6 * 64 + 64)
    assert "6 of 12 rows were kept ones, 6 are" in str(peftrt.explain(model))


def test_kept_features_have_the_bits_that_were_computed() -> None:
    model = without_dropout()
    peftrt.adapt(model, peftrt.FeatureExtraction())
    model.train()
    ids, mask = tokens(), torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 5 + [0]])
    first = model(input_ids=ids, attention_mask=mask).logits
    assert_same_bits(model(input_ids=ids, attention_mask=mask).logits, first)
    assert_same_bits(model(input_ids=ids.flip(0), attention_mask=mask.flip(0)).logits, first.flip(0))
    assert stats(model)[:2] == (6, 3)
    # the mask is a part of what a row is
    model(input_ids=ids, attention_mask=torch.ones_like(mask))
    assert stats(model)[:2] == (7, 5)
    # in eval() and without gradients nothing is counted or kept
    model.eval()
    assert_same_bits(model(input_ids=ids, attention_mask=mask).logits, first)
    assert stats(model)[:3] == (7, 5, 5)


def test_the_body_runs_in_eval_and_without_gradients() -> None:
    model = build("bert")
    for module in model.bert.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.5
    peftrt.adapt(model, peftrt.FeatureExtraction())
    model.train()
    pooled: list[Tensor] = []
    model.bert.register_forward_hook(lambda module, args, output: pooled.append(output.pooler_output))
    model(tokens())
    model.eval()
    model(tokens())
    assert_same_bits(pooled[0], pooled[1])
    assert not pooled[0].requires_grad
    model.train()
    model(tokens())
    assert all(module.training for module in model.modules()), "the modes are put back"


@pytest.mark.parametrize("change", ["load_state_dict", "in place", "adapter", "data"])
def test_features_of_a_body_that_changes_are_forgotten(change: str) -> None:
    model, plain = without_dropout(), without_dropout()
    peftrt.adapt(model, peftrt.FeatureExtraction())
    model.train()
    model(tokens())
    other = {name: value + 0.1 for name, value in model.bert.state_dict().items()}
    if change == "load_state_dict":
        model.bert.load_state_dict(other)
        plain.bert.load_state_dict(other)
    elif change == "data":
        for mine in (model, plain):
            mine.bert.pooler.dense.weight.data = mine.bert.pooler.dense.weight.data * 2
    elif change == "in place":
        with torch.no_grad():
            for mine in (model, plain):
                mine.bert.pooler.dense.weight.mul_(2)
    else:
        peftrt.adapt(model, config("bert"), name="lora")
        model.requires_grad_(False)
        peftrt.set_active(model, {"default": 1.0, "lora": 1.0})
        model(tokens())
        peftrt.set_active(model, {"default": 1.0, "lora": 0.5})
    before = stats(model)
    found = model(tokens()).logits
    assert stats(model).hits == before.hits
    if change != "adapter":
        assert_close(found, plain.eval()(tokens()).logits)
    assert model(tokens()).logits.equal(found)
    assert stats(model).hits == before.hits + 3


def test_nothing_is_kept_of_a_body_that_is_trained() -> None:
    model = without_dropout()
    peftrt.adapt(model, peftrt.FeatureExtraction())
    peftrt.adapt(model, config("bert"), name="lora")
    peftrt.set_active(model, {"default": 1.0, "lora": 1.0})
    model.train()
    model(tokens()).logits.sum().backward()
    assert model.bert.encoder.layer[0].attention.self.query.lora_A.grad is not None
    assert stats(model)[:3] == (0, 0, 0)
    with peftrt.rows(model, ["default", "lora", None]):
        model(tokens())
    assert stats(model)[:3] == (0, 0, 0)


def test_room_is_bounded() -> None:
    model = without_dropout()
    each = 4 * (6 * 64 + 64)
    peftrt.adapt(model, peftrt.FeatureExtraction(max_bytes=2 * each))
    model.train()
    first = model(tokens()).logits
    assert (stats(model).entries, stats(model).nbytes) == (2, 2 * each)
    assert_close(model(tokens()).logits, first)
    # those that came first stayed
    assert stats(model)[:2] == (2, 4)


def test_two_heads_share_the_features() -> None:
    model = without_dropout()
    for name in ("one", "two"):
        peftrt.adapt(model, peftrt.FeatureExtraction(), name=name)
    model.train()
    model(tokens())
    peftrt.set_active(model, "one")
    model(tokens())
    assert stats(model)[:3] == (3, 3, 3)
    peftrt.remove(model, "two")
    peftrt.set_active(model, None)
    model(tokens())
    assert stats(model)[:2] == (3, 3)


def test_a_body_in_parts() -> None:
    """A head at the end of a chain: every module before it keeps its own."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4), nn.Linear(4, 2))
    expected = copy.deepcopy(model)
    peftrt.adapt(model, peftrt.FeatureExtraction(modules=["3"]))
    x = torch.randn(5, 8)
    for _ in range(2):
        assert_close(model(x), expected(x))
    parts = [module for module in model.modules() if isinstance(module, Features)]
    assert [part.stats()[:2] for part in parts] == [(5, 5), (5, 5)]


def test_a_cache_in_the_output_is_told() -> None:
    transformers = pytest.importorskip("transformers")
    settings = transformers.LlamaConfig(
        vocab_size=96,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_labels=2,
        pad_token_id=0,
    )
    model = transformers.LlamaForSequenceClassification(settings)
    peftrt.adapt(model, peftrt.FeatureExtraction())
    model.train()
    first = model(tokens()).logits
    if stats(model).refused:
        assert "set model.config.use_cache = False" in str(peftrt.explain(model))
        model.config.use_cache = False
        model(tokens())
    assert_close(model(tokens()).logits, first)
    assert stats(model).hits == 3


def test_a_copy_has_features_of_its_own() -> None:
    model = without_dropout()
    peftrt.adapt(model, peftrt.FeatureExtraction())
    model.train()
    model(tokens())
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert stats(other) == FeatureStats(0, 0, 0, 0, "")
        with torch.no_grad():
            other.bert.pooler.dense.weight.zero_()
        found = other(tokens()).logits
        assert_close(found, model.classifier.copy_of("default").bias.expand(3, 3) + 0 * found)
        assert stats(other)[:2] == (0, 3)
    assert stats(model)[:2] == (0, 3)


def test_full_fine_tuning_trains_everything() -> None:
    model = build("bert")
    before = copy.deepcopy(model.state_dict())
    report = peftrt.adapt(model, peftrt.FullFineTuning())
    assert report.trainable == report.total == sum(p.numel() for p in model.parameters())
    assert len(trained(model)) == len(list(model.parameters()))
    step(model, tokens())
    changed = [key for key, value in model.state_dict().items() if not torch.equal(value, before[key])]
    assert "bert.encoder.layer.0.attention.self.query.weight" in changed
    assert "classifier.bias" in changed
    found = logits(model)
    peftrt.set_active(model, "default")
    peftrt.remove(model, "default")
    assert_same_bits(logits(model), found)
    assert not trained(model)
    assert list(model.state_dict()) == list(before)
    assert not model._forward_pre_hooks


def test_full_fine_tuning_has_no_base_and_no_neighbours(tmp_path: Path) -> None:
    model = build("bert")
    peftrt.adapt(model, config("bert"), name="lora")
    peftrt.save(model, tmp_path / "lora")
    with unchanged(model), pytest.raises(ValueError, match="adapt: the new one is full fine-tuning"):
        peftrt.adapt(model, peftrt.FullFineTuning(), name="all")
    model = build("bert")
    peftrt.adapt(model, peftrt.FullFineTuning(), name="all")
    with unchanged(model):
        for names in (None, {"all": 0.5}):
            with pytest.raises(ValueError, match="changes the base itself"):
                peftrt.set_active(model, names)
        with pytest.raises(ValueError, match=r"adapt: adapter 'all' is full fine-tuning.*remove\(model, 'all'\) first"):
            peftrt.adapt(model, config("bert"), name="lora")
        with pytest.raises(ValueError, match="load: adapter 'all' is full fine-tuning"):
            peftrt.load(model, tmp_path / "lora", name="lora")
        with peftrt.rows(model, ["all", None, "all"]), pytest.raises(ValueError, match="rows: adapter 'all' is full"):
            model(tokens())
        with peftrt.rows(model, ["all"] * 3):
            model(tokens())


def test_full_fine_tuning_of_what_cannot_be_trained() -> None:
    model = build("bert")
    with unchanged(model), pytest.raises(UnsupportedError, match="quantize='nf4'"):
        peftrt.adapt(model, peftrt.FullFineTuning(), quantize="nf4")
    peftrt.adapt(model, config("bert"), quantize="nf4")
    peftrt.remove(model, "default")
    with unchanged(model), pytest.raises(UnsupportedError, match="is NF4, whose sixteen levels"):
        peftrt.adapt(model, peftrt.FullFineTuning())
    with pytest.raises(UnsupportedError, match="in its place, not a copy"):
        peftrt.FullFineTuning(modules_to_save=["classifier"])


def test_full_fine_tuning_is_exported_not_saved(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    model = build("bert")
    peftrt.adapt(model, peftrt.FullFineTuning())
    step(model, tokens())
    with pytest.raises(UnsupportedError, match=r"write it with peftrt\.export"):
        peftrt.save(model, tmp_path / "adapter")
    assert not (tmp_path / "adapter").exists()
    peftrt.export(model, tmp_path / "model", dtype=torch.float32)
    again = transformers.AutoModelForSequenceClassification.from_pretrained(tmp_path / "model").eval()
    assert_same_bits(logits(again), logits(model))
    other = copy.deepcopy(model)
    peftrt.remove(other, "default")
    assert trained(model)
    assert not trained(other)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"max_bytes": "1 PB"}, "max_bytes must be like"),
        ({"max_bytes": -1}, "max_bytes must not be negative"),
        ({"device": "cpux"}, "device: expected the name of a device"),
        ({"modules": "classifier"}, "modules: expected a list of names"),
    ],
)
def test_mistakes_in_a_configuration(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        peftrt.FeatureExtraction(**fields)
