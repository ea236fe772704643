"""merge, unmerge and export."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import nn

import peftrt
from peftrt.formats import stream
from peftrt.formats.errors import FormatError
from peftrt.nn import AdapterLinear
from tests.adapters.tiny import KINDS, build, config, logits, quiet, tokens, unchanged
from tests.tolerances import assert_close, assert_same_bits


def bits(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: value.clone() for key, value in model.state_dict().items()}


def adapted(kind: str, quantize: str | None = None, dtype: torch.dtype = torch.float32, **changes: Any) -> Any:
    model = build(kind).to(dtype)
    peftrt.adapt(model, config(kind, **changes), name="fr", quantize=quantize)
    return model


class TestMerge:
    @pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
    @pytest.mark.parametrize("kind", KINDS)
    def test_there_and_back(self, kind: str, dtype: torch.dtype) -> None:
        changes = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
        model = adapted(kind, dtype=dtype, **changes)
        before, expected = bits(model), logits(model)
        peftrt.set_active(model, None)
        peftrt.merge(model, "fr")
        assert peftrt.active_adapters(model) == {"fr": 1.0}
        assert peftrt.explain(model).sites[next(iter(peftrt.explain(model).sites))].op == "linear"
        assert_close(logits(model), expected, roundings=12)
        peftrt.unmerge(model)
        for key, value in bits(model).items():
            assert_same_bits(value, before[key])
        assert_same_bits(logits(model), expected)
        peftrt.unmerge(model)  # nothing to do

    def test_a_weighted_sum(self) -> None:
        model = adapted("gpt2")
        peftrt.adapt(model, config("gpt2", target_modules=["c_fc"], r=2), name="de")
        peftrt.set_active(model, {"fr": 0.5, "de": 2.0})
        expected = logits(model)
        peftrt.merge(model)
        assert_close(logits(model), expected, roundings=4)

    def test_a_merged_model_refuses_what_would_mislead(self) -> None:
        model = adapted("llama")
        peftrt.adapt(model, config("llama", target_modules=["q_proj"]), name="de")
        peftrt.merge(model, "fr")
        for call in (
            lambda: peftrt.merge(model, "de"),
            lambda: peftrt.set_active(model, "de"),
            lambda: peftrt.rows(model, ["fr"]).__enter__(),
            lambda: peftrt.adapt(model, config("llama"), name="it"),
            lambda: peftrt.remove(model, "fr"),
            lambda: peftrt.export(model, "nowhere", name="de"),
        ):
            with unchanged(model), pytest.raises(ValueError, match=r"'fr'.*merged.*unmerge"):
                call()

    def test_what_cannot_be_merged(self) -> None:
        model = adapted("llama")
        peftrt.set_active(model, None)
        with unchanged(model), pytest.raises(ValueError, match="no adapter is active"):
            peftrt.merge(model)
        with unchanged(model), pytest.raises(ValueError, match="no adapter 'it'"):
            peftrt.merge(model, "it")

    def test_nf4_refuses_and_says_why(self) -> None:
        model = adapted("llama", "nf4", init_lora_weights=True)
        for module in model.modules():
            if isinstance(module, AdapterLinear):
                # 1 % of the weight: what a fine-tuning changes
                delta = (
                    0.01 * module.nf4_weight().dequantize().std() / module.adapter("fr").delta().std().clamp_min(1e-9)
                )
                module.lora_B.data.normal_()
                delta = 0.01 * module.nf4_weight().dequantize().std() / module.adapter("fr").delta().std()
                module.lora_B.data.mul_(delta)
        with (
            unchanged(model),
            pytest.raises(ValueError, match=r"would lose \d+\.\d% .*12 layers.*export.*force=True") as e,
        ):
            peftrt.merge(model, "fr")
        share = float(str(e.value).partition("would lose ")[2].partition("%")[0])
        assert share > 50
        before = bits(model)
        peftrt.merge(model, "fr", force=True)
        peftrt.unmerge(model)
        for key, value in bits(model).items():
            assert_same_bits(value, before[key])

    @pytest.mark.parametrize("force", [False, True])
    def test_failure_in_the_middle(self, force: bool, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted("bert", "nf4" if force else None, modules_to_save=["classifier"])
        peftrt.set_active(model, None)
        merge, calls = AdapterLinear.merge, []

        def failing(self: AdapterLinear, *args: Any, **kwargs: Any) -> None:
            calls.append(self)
            if len(calls) == 4:
                raise MemoryError("no more")
            merge(self, *args, **kwargs)

        monkeypatch.setattr(AdapterLinear, "merge", failing)
        with unchanged(model), pytest.raises(MemoryError):
            peftrt.merge(model, "fr", force=force)

    def test_a_tied_weight_keeps_its_own(self) -> None:
        """Merging into a tied head does not reach the embedding, and unmerging ties them again."""
        model = build("llama", tied=True)
        peftrt.adapt(model, config("llama", target_modules=["lm_head"]), name="fr")
        embedding = model.model.embed_tokens.weight
        before, expected = embedding.detach().clone(), logits(model)
        peftrt.merge(model)
        assert_same_bits(embedding.detach(), before)
        assert_close(logits(model), expected, roundings=4)
        peftrt.unmerge(model)
        assert model.lm_head.weight is embedding


def reload(kind: str, path: Path) -> Any:
    import transformers

    quiet()
    cls = {"llama": "LlamaForCausalLM", "gpt2": "GPT2LMHeadModel", "bert": "BertForSequenceClassification"}[kind]
    model, info = getattr(transformers, cls).from_pretrained(path, output_loading_info=True)
    assert not any(info[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys")), info
    return model.eval()


class TestExport:
    @pytest.mark.parametrize("quantize", [None, "nf4"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_transformers_loads_it(self, kind: str, quantize: str | None, tmp_path: Path) -> None:
        changes = {"modules_to_save": ["classifier"]} if kind == "bert" else {}
        model = adapted(kind, quantize, **changes)
        if kind == "bert":
            model.classifier.chosen.weight.data.mul_(-1.0)
        with unchanged(model):
            peftrt.export(model, tmp_path / "out", dtype=torch.float32)
        assert_close(logits(reload(kind, tmp_path / "out")), logits(model), roundings=6)

    def test_bfloat16_by_default(self, tmp_path: Path) -> None:
        model = adapted("llama", "nf4")
        peftrt.export(model, tmp_path / "out")
        found = reload("llama", tmp_path / "out")
        assert found.dtype == torch.bfloat16
        assert found.config.architectures == ["LlamaForCausalLM"]
        layer = model.model.layers[0].mlp.down_proj
        expected = layer.nf4_weight().dequantize(torch.float32) + layer.delta_weight("fr")
        assert_same_bits(found.model.layers[0].mlp.down_proj.weight.detach(), expected.bfloat16())

    @pytest.mark.parametrize("what", ["name", "none", "merged", "weights"])
    def test_which_adapter(self, what: str, tmp_path: Path) -> None:
        model = adapted("llama")
        peftrt.adapt(model, config("llama", target_modules=["q_proj"], r=2), name="de")
        wanted: dict[str, Any] = {"name": "fr", "none": None, "merged": "fr", "weights": {"fr": 0.5, "de": -1.0}}
        peftrt.set_active(model, wanted[what])
        expected = logits(model)
        if what == "merged":
            peftrt.merge(model)
        if what in ("name", "weights"):
            peftrt.set_active(model, "de")
            peftrt.export(model, tmp_path / "out", name=wanted[what], dtype=torch.float32)
        else:
            peftrt.export(model, tmp_path / "out", dtype=torch.float32)
        assert_close(logits(reload("llama", tmp_path / "out")), expected, roundings=4)

    @pytest.mark.parametrize("merged", [False, True])
    @pytest.mark.parametrize("target", ["lm_head", "q_proj"])
    def test_tied_weights(self, target: str, merged: bool, tmp_path: Path) -> None:
        """A tie is kept where it holds, and given up in the configuration where an adapter broke it."""
        model = build("llama", tied=True)
        peftrt.adapt(model, config("llama", target_modules=[target]), name="fr")
        expected = logits(model)
        if merged:
            peftrt.merge(model)
        peftrt.export(model, tmp_path / "out", dtype=torch.float32)
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            assert ("lm_head.weight" in file.keys()) == (target == "lm_head")  # noqa: SIM118
        assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] == (target == "q_proj")
        assert_close(logits(reload("llama", tmp_path / "out")), expected, roundings=4)

    def test_a_tied_head_trained_whole(self, tmp_path: Path) -> None:
        model = build("llama", tied=True)
        peftrt.adapt(model, config("llama", target_modules=["q_proj"], modules_to_save=["lm_head"]), name="fr")
        with torch.no_grad():
            model.lm_head.chosen.weight.mul_(-1.0)
        peftrt.export(model, tmp_path / "out", dtype=torch.float32)
        assert_close(logits(reload("llama", tmp_path / "out")), logits(model), roundings=4)

    def test_shards(self, tmp_path: Path) -> None:
        model = adapted("gpt2", "nf4")
        peftrt.export(model, tmp_path / "out", dtype=torch.float32, max_shard_bytes=60_000)
        files = sorted(path.name for path in (tmp_path / "out").glob("*.safetensors"))
        assert len(files) > 2
        assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
        assert all((tmp_path / "out" / file).stat().st_size < 70_000 for file in files)
        assert_close(logits(reload("gpt2", tmp_path / "out")), logits(model), roundings=6)

    def test_one_tensor_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        """A dense tensor is made when the one before it has been written."""
        model, events = adapted("llama", "nf4"), []
        dequantize = peftrt.NF4Weight.dequantize

        def making(self: Any, *args: Any) -> torch.Tensor:
            events.append("made")
            return dequantize(self, *args)

        def writing(data: Any) -> memoryview:
            events.append("written")
            return memoryview(data)

        monkeypatch.setattr(peftrt.NF4Weight, "dequantize", making)
        monkeypatch.setattr(stream, "memoryview", writing, raising=False)
        peftrt.export(model, tmp_path / "out")
        assert events.count("made") == 12
        assert all(first != "made" or second == "written" for first, second in itertools.pairwise(events))

    def test_a_model_that_is_nobody_s(self, tmp_path: Path) -> None:
        model = nn.Sequential(nn.Linear(64, 32), nn.BatchNorm1d(32), peftrt.NF4Linear(32, 4))
        expected = {key: value for key, value in model.state_dict().items() if not key.startswith("2.weight")}
        peftrt.adapt(model, peftrt.LoraConfig(target_modules=["0"]), name="fr")
        peftrt.export(model, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["model.safetensors"]
        with safe_open(tmp_path / "out" / "model.safetensors", "pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        assert set(tensors) == {*expected, "2.weight"}
        assert tensors["1.running_var"].dtype == torch.float32  # statistics keep their precision
        assert tensors["1.weight"].dtype == torch.bfloat16
        assert_same_bits(tensors["2.weight"], model[2].nf4_weight().dequantize(torch.float32).bfloat16())

    def test_whole_or_nothing(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = adapted("llama")

        def failing(*args: Any, **kwargs: Any) -> None:
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(type(model.config), "save_pretrained", failing)
        with pytest.raises(OSError, match="No space left"):
            peftrt.export(model, tmp_path / "out")
        assert os.listdir(tmp_path) == []
        (tmp_path / "out").mkdir()
        (tmp_path / "out" / "tokenizer.json").write_text("{}")
        with pytest.raises(OSError, match="No space left"):
            peftrt.export(model, tmp_path / "out")
        assert os.listdir(tmp_path / "out") == ["tokenizer.json"]
        monkeypatch.undo()
        peftrt.export(model, tmp_path / "out")
        assert {"tokenizer.json", "model.safetensors", "config.json"} <= set(os.listdir(tmp_path / "out"))
        with pytest.raises(FormatError, match="holds a model already"):
            peftrt.export(model, tmp_path / "out")
        with pytest.raises(FormatError, match="got a file"):
            peftrt.export(model, tmp_path / "out" / "config.json")
        with pytest.raises(TypeError, match="floating dtype"):
            peftrt.export(model, tmp_path / "int", dtype=torch.int8)
        assert logits(reload("llama", tmp_path / "out"), tokens()).shape == (3, 6, 96)
