"""Prefix and prompt tuning: what is refused, by name, and that it changes nothing; how prompts begin."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import peftrt
from peftrt.adapters.saved import SavedModule
from peftrt.formats.errors import ConfigError, FormatError, NonFiniteError, UnsupportedError
from peftrt.nn.prefix import PrefixTuning
from peftrt.nn.prompt import Prompt
from tests.adapters.tiny import TASKS, assert_unchanged, inputs_of, state_of, tokens, unchanged
from tests.adapters.virtual import (
    KINDS,
    LIMIT,
    TOKENS,
    WAYS,
    build,
    config,
    hooks,
    loaded,
    loaded_by_peft,
    logits_of,
    peft_model,
    saved_by_peft,
    without_warnings,
)

WEIGHTS, CONFIG = "adapter_model.safetensors", "adapter_config.json"


class TestConfig:
    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_virtual_tokens": 0}, "num_virtual_tokens"),
            ({"num_virtual_tokens": -1}, "num_virtual_tokens"),
            ({"num_virtual_tokens": 2**31}, "num_virtual_tokens"),
            ({"num_virtual_tokens": "8"}, "num_virtual_tokens"),
            ({"num_virtual_tokens": 8.5}, "num_virtual_tokens"),
            ({"num_virtual_tokens": True}, "num_virtual_tokens"),
            ({"token_dim": 0}, "token_dim"),
            ({"num_layers": "2"}, "num_layers"),
            ({"num_attention_heads": -4}, "num_attention_heads"),
            ({"num_transformer_submodules": 3}, "num_transformer_submodules"),
            ({"task_type": "CHAT"}, "task_type"),
        ],
    )
    @pytest.mark.parametrize("kind", [peftrt.PrefixTuningConfig, peftrt.PromptTuningConfig])
    def test_of_both(self, kind: type, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            kind(**{"num_virtual_tokens": 4, **fields})

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"prefix_projection": 1}, "prefix_projection"),
            ({"shift_positions": None}, "shift_positions"),
            ({"encoder_hidden_size": 0}, "encoder_hidden_size"),
            ({"init_weights": "ones"}, "init_weights"),
            ({"attention_modules": "attn"}, "attention_modules"),
        ],
    )
    def test_of_prefixes(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            peftrt.PrefixTuningConfig(num_virtual_tokens=4, **fields)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"prompt_tuning_init": "ZERO"}, "prompt_tuning_init"),
            ({"prompt_tuning_init": "TEXT"}, "prompt_tuning_init_text"),
            ({"prompt_tuning_init_text": 3}, "prompt_tuning_init_text"),
            ({"tokenizer": "bert-base"}, "tokenizer"),
            ({"tokenizer_kwargs": []}, "tokenizer_kwargs"),
            ({"stack_module": ""}, "stack_module"),
        ],
    )
    def test_of_prompts(self, fields: dict[str, Any], message: str) -> None:
        with pytest.raises(ConfigError, match=message):
            peftrt.PromptTuningConfig(num_virtual_tokens=4, **fields)


class TestAdapt:
    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", KINDS)
    def test_sizes_that_are_not_the_model_s(self, kind: str, way: str) -> None:
        model = build(kind)
        wrong: list[dict[str, Any]] = [{"token_dim": 48}]
        if way != "prompt":
            wrong += [{"num_layers": 3}, {"num_attention_heads": 8}, {"num_transformer_submodules": 1 + (kind != "t5")}]
        elif kind != "t5":
            wrong += [{"num_transformer_submodules": 2}]
        for fields in wrong:
            with unchanged(model), pytest.raises(ConfigError, match=next(iter(fields))):
                peftrt.adapt(model, config(way, **fields))
        sizes = {"token_dim": 32 if kind == "llama" and way != "prompt" else 64}
        peftrt.adapt(model, config(way, **sizes))

    @pytest.mark.parametrize("way", WAYS)
    @pytest.mark.parametrize("kind", ["gpt2", "bert"])
    def test_more_tokens_than_positions(self, kind: str, way: str) -> None:
        model = build(kind)
        with unchanged(model), pytest.raises(ConfigError, match=r"num_virtual_tokens: .*32 positions, got 32"):
            peftrt.adapt(model, config(way, 32))
        peftrt.adapt(model, config(way, 28))
        model(tokens(length=4))
        with pytest.raises(ValueError, match="5 tokens behind 28 virtual ones"):
            model(tokens(length=5))

    def test_models_that_do_not_offer_it(self) -> None:
        model = nn.Sequential(nn.Linear(4, 4), nn.TransformerEncoderLayer(8, 2))
        with unchanged(model), pytest.raises(UnsupportedError, match="past_key_values"):
            peftrt.adapt(model, config("prefix"))
        with unchanged(model), pytest.raises(UnsupportedError, match="get_input_embeddings"):
            peftrt.adapt(model, config("prompt"))
        with unchanged(model), pytest.raises(UnsupportedError, match="attention_modules: 0 is no self-attention"):
            peftrt.adapt(model, config("prefix", attention_modules=["0"]))

    def test_names_that_match_nothing(self) -> None:
        model = build("llama")
        with unchanged(model), pytest.raises(ConfigError, match="attention_modules: 'attn' matches no module"):
            peftrt.adapt(model, config("prefix", attention_modules=["self_attn", "attn"]))
        with unchanged(model), pytest.raises(ConfigError, match="stack_module: 'decoder' matches no module"):
            peftrt.adapt(model, config("prompt", stack_module="decoder"))
        with unchanged(model), pytest.raises(ConfigError, match=r"stack_module: 'q_proj' matches .*expected one"):
            peftrt.adapt(model, config("prompt", stack_module="q_proj"))

    def test_positions_that_are_not_found(self) -> None:
        model = build("llama")
        model.model.rotary_emb.__class__ = type("Turning", (type(model.model.rotary_emb),), {})
        with unchanged(model), pytest.raises(UnsupportedError, match="shift_positions: where this model looks"):
            peftrt.adapt(model, config("prefix"))
        peftrt.adapt(model, config("prefix", shift_positions=False))

    def test_distances_always_count(self) -> None:
        model = build("t5")
        with unchanged(model), pytest.raises(UnsupportedError, match="shift_positions: distances"):
            peftrt.adapt(model, config("prefix", shift_positions=False))

    def test_prefixes_in_front_of_others(self) -> None:
        model = build("llama")
        peftrt.adapt(model, config("prefix", attention_modules=["0.self_attn"]), name="fr")
        with unchanged(model), pytest.raises(UnsupportedError, match=r"in front of model.layers.0.self_attn$"):
            peftrt.adapt(model, config("prefix"), name="de")
        with unchanged(model), pytest.raises(ValueError, match="de"):
            peftrt.set_active(model, "de")

    def test_masks_of_another_form(self) -> None:
        model = build("llama")
        peftrt.adapt(model, config("prefix"))
        attention = model.model.layers[0].self_attn
        x = torch.zeros(1, 3, 64)
        turned = model.model.rotary_emb(x, torch.arange(3)[None])
        with pytest.raises(TypeError, match="flex_attention is not supported"):
            attention(x, position_embeddings=turned, attention_mask=object())
        peftrt.adapt(model, config("prompt"), name="prompt")
        four = torch.ones(3, 1, 6, 6, dtype=torch.bool)
        with pytest.raises(TypeError, match=r"got Tensor \[3, 1, 6, 6\]"):
            model(tokens(), attention_mask=four)

    @pytest.mark.parametrize("way", WAYS)
    def test_over_nf4(self, way: str) -> None:
        model = build("llama")
        peftrt.adapt(model, config(way), quantize="nf4")
        assert type(model.model.layers[0].self_attn.k_proj).__name__ == "QLoRALinear"
        found = logits_of(model.eval(), tokens())
        peftrt.set_active(model, None)
        assert (logits_of(model, tokens()) - found).abs().max() > 1e-3


class TestShift:
    def test_is_written_where_it_is_not_peft_s(self, tmp_path: Path) -> None:
        model = build("gpt2")
        peftrt.adapt(model, config("prefix", shift_positions=False, task_type="CAUSAL_LM"), name="fr")
        model.eval()
        peftrt.save(model, tmp_path)
        assert json.loads((tmp_path / CONFIG).read_text())["shift_positions"] is False
        again = loaded("gpt2", tmp_path)
        assert torch.equal(logits_of(again, tokens()), logits_of(model, tokens()))
        # peft shifts, and says that it does not know the field
        with pytest.warns(UserWarning, match="shift_positions"):
            pytest.importorskip("peft").PeftConfig.from_pretrained(tmp_path)
        assert (logits_of(loaded_by_peft("gpt2", tmp_path), tokens()) - logits_of(model, tokens())).abs().max() > 1e-3

    def test_rows_of_both(self) -> None:
        model = build("llama").double()
        for name, shift in (("fr", True), ("de", False)):
            peftrt.adapt(model, config("prefix", shift_positions=shift), name=name)
        model.eval().double()
        ids = tokens()
        with peftrt.rows(model, ["fr", "de", None]):
            found = logits_of(model, ids)
        for row, name in enumerate(["fr", "de", None]):
            peftrt.set_active(model, name)
            assert (logits_of(model, ids[row : row + 1])[0] - found[row]).abs().max() < 1e-9


@pytest.fixture(params=["prefix", "prompt"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An adapter of the tiny BERT as peft writes it, head included."""
    return saved_by_peft(peft_model("bert", request.param), tmp_path)


def change_tensors(directory: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file({key: value.contiguous() for key, value in tensors.items()}, directory / WEIGHTS, {"format": "pt"})


def change_config(directory: Path, **fields: Any) -> None:
    values = json.loads((directory / CONFIG).read_text())
    (directory / CONFIG).write_text(json.dumps({**values, **fields}))


KEY = "prompt_embeddings"


class TestLoad:
    @pytest.mark.parametrize(
        ("change", "message"),
        [
            (lambda t: t.pop(KEY), "no key 'prompt_embeddings'"),
            (lambda t: t.update({KEY: t[KEY][:-1]}), r"expected \[5, "),
            (lambda t: t.update({KEY: t[KEY][:, :-2]}), "expected .*got"),
            (lambda t: t.update({KEY: t[KEY][None]}), "expected a matrix"),
            (lambda t: t.update({KEY: t[KEY][:0]}), "expected a matrix that is not empty"),
            (lambda t: t.update({KEY: t[KEY].to(torch.int8)}), "int8"),
            (lambda t: t.update({KEY: t[KEY].double()}), "float64"),
            (lambda t: t.update({"prompt_encoder.weight": t[KEY].clone()}), "'prompt_encoder.weight' is not supported"),
            (lambda t: t.update({"base_model.bert.pooler.x": t[KEY].clone()}), "is not supported"),
            (lambda t: t.pop("base_model.classifier.bias"), "classifier"),
            (lambda t: t.update({"base_model.classifier.bias": torch.zeros(4)}), "classifier"),
            (lambda t: t.update({"base_model.nowhere.score.weight": torch.zeros(4)}), "nowhere"),
        ],
    )
    def test_tensors(self, change: Callable[[dict[str, Tensor]], Any], message: str, directory: Path) -> None:
        change_tensors(directory, change)
        model = build("bert")
        with unchanged(model), pytest.raises(FormatError, match=message) as error:
            peftrt.load(model, directory, name="p")
        assert str(directory) in str(error.value)

    def test_what_is_not_finite(self, directory: Path) -> None:
        change_tensors(directory, lambda tensors: tensors[KEY].view(-1)[3:4].fill_(torch.nan))
        model = build("bert")
        with unchanged(model), pytest.raises(NonFiniteError):
            peftrt.load(model, directory, name="p")
        peftrt.load(model, directory, name="p", allow_nonfinite=True)

    @pytest.mark.parametrize(
        ("fields", "message"),
        [
            ({"num_virtual_tokens": None}, "num_virtual_tokens is missing"),
            ({"num_virtual_tokens": 6}, r"expected \[6, "),
            ({"token_dim": 32}, "token_dim"),
            ({"num_transformer_submodules": 2}, "num_transformer_submodules"),
            ({"peft_type": "P_TUNING"}, "P_TUNING"),
            ({"something_new": 3}, "something_new"),
            ({"modules_to_save": "classifier"}, "modules_to_save"),
        ],
    )
    def test_fields(self, fields: dict[str, Any], message: str, directory: Path) -> None:
        change_config(directory, **fields)
        model = build("bert")
        with unchanged(model), pytest.raises(FormatError, match=message) as error:
            peftrt.load(model, directory, name="p")
        assert str(directory) in str(error.value)

    def test_over_another_model(self, directory: Path) -> None:
        for kind in ("llama", "t5"):
            model = build(kind)
            with unchanged(model), pytest.raises(FormatError):
                peftrt.load(model, directory, name="p")

    def test_replaced(self, directory: Path) -> None:
        model = loaded("bert", directory)
        expected = logits_of(model, tokens())
        change_tensors(directory, lambda tensors: tensors[KEY].neg_())
        peftrt.load(model, directory, name="p", replace=True)
        assert peftrt.active_adapters(model) == {"p": 1.0}
        assert (logits_of(model, tokens()) - expected).abs().max() > 1e-3

    def test_a_failure_in_the_middle(self, directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        model = build("bert")
        before, number = state_of(model), hooks(model)

        def fail(*_: Any) -> None:
            raise MemoryError

        # the head's copy is the last that is made
        monkeypatch.setattr(SavedModule, "add_copy", fail)
        with pytest.raises(MemoryError):
            peftrt.load(model, directory, name="p")
        monkeypatch.undo()
        assert_unchanged(model, before)
        assert hooks(model) == number
        peftrt.load(model, directory, name="p")

    def test_projected_and_trainable(self, tmp_path: Path) -> None:
        """What is in a file is what a projection made: training goes on with that."""
        saved_by_peft(peft_model("llama", "projected"), tmp_path)
        model = loaded("llama", tmp_path, trainable=True)
        trained = {name: each for name, each in model.named_parameters() if each.requires_grad}
        assert {each.shape for each in trained.values()} == {(TOKENS, 64)}
        peftrt.save(model, tmp_path / "again")
        assert (
            logits_of(loaded_by_peft("llama", tmp_path / "again"), tokens()) - logits_of(model, tokens())
        ).abs().max() <= LIMIT


class TestBeginning:
    """How prompts begin."""

    @staticmethod
    def prompt_of(model: Any) -> Prompt:
        return next(module for module in model.modules() if isinstance(module, Prompt))

    def test_from_the_vocabulary(self) -> None:
        model = build("gpt2")
        peftrt.adapt(model, config("prompt", prompt_tuning_init="SAMPLE_VOCAB"))
        table = model.transformer.wte.weight
        for row in self.prompt_of(model).weight:
            assert (table == row).all(dim=1).any()

    @pytest.mark.parametrize("answer", [[4, 7], {"input_ids": [4, 7, 9, 11, 13, 15, 17]}, torch.tensor([[4, 7, 9]])])
    def test_from_a_text(self, answer: Any, tmp_path: Path) -> None:
        asked: list[str] = []
        model = build("t5")
        fields = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "to French:", "task_type": "SEQ_2_SEQ_LM"}
        peftrt.adapt(model, config("prompt", tokenizer=lambda text: asked.append(text) or answer, **fields))
        assert asked == ["to French:"]
        ids = answer["input_ids"] if isinstance(answer, dict) else torch.as_tensor(answer).flatten().tolist()
        # peft: over and over, through the part of the decoder as well
        expected = model.shared.weight[(ids * 10)[: 2 * TOKENS]]
        assert torch.equal(self.prompt_of(model).weight, expected)
        assert self.prompt_of(model).weight.data_ptr() != model.shared.weight.data_ptr()
        # a tokenizer has no name here, without which peft would not read the text
        peftrt.save(model, tmp_path)
        with without_warnings():
            found = logits_of(loaded_by_peft("t5", tmp_path), tokens())
        assert (found - logits_of(model.eval(), tokens())).abs().max() <= LIMIT

    @pytest.mark.parametrize(
        ("answer", "message"),
        [(None, "got None"), ("4 7", "list of token ids"), ([], "got none"), ([96], "below 96"), ([True], "below 96")],
    )
    def test_what_a_tokenizer_may_not_answer(self, answer: Any, message: str) -> None:
        model = build("gpt2")
        tokenizer = None if answer is None else lambda text: answer
        text = {"prompt_tuning_init": "TEXT", "prompt_tuning_init_text": "x", "tokenizer": tokenizer}
        with unchanged(model), pytest.raises(ConfigError, match=f"tokenizer: .*{message}"):
            peftrt.adapt(model, config("prompt", **text))

    def test_random_is_peft_s(self) -> None:
        model = build("gpt2")
        theirs = peft_model("gpt2", "prompt")
        torch.manual_seed(11)
        peftrt.adapt(model, config("prompt"))
        assert torch.equal(self.prompt_of(model).weight, theirs.prompt_encoder["default"].embedding.weight)


def test_layers_of_a_prefix_that_nothing_takes() -> None:
    """peft lays a prefix of an encoder-decoder out so that some are not looked at: they are kept, and not trained."""
    model = build("t5")
    peftrt.adapt(model, config("prefix"), name="fr")
    flags = {name: each.requires_grad for name, each in model.named_parameters() if "adapter@fr" in name}
    assert flags == {f"decoder.prefix_tuning.adapter@fr.layers.{layer}": layer == 0 for layer in range(2)}
    loss = model(tokens(), labels=tokens()).loss
    loss.backward()
    assert all((each.grad is not None) == each.requires_grad for each in model.parameters())


def test_report_and_explanation() -> None:
    model = build("bert")
    report = peftrt.adapt(model, config("prefix", task_type=TASKS["bert"]), name="fr")
    assert report.saved == ("classifier",)
    assert report.matched == tuple(f"bert.encoder.layer.{layer}.attention.self" for layer in range(2))
    assert "prefix_tuning by torch" in str(report)
    assert report.trainable == 2 * 2 * 64 * TOKENS + 3 * 64 + 3
    explained = peftrt.explain(model)
    assert explained.sites["bert.prefix_tuning"].op == PrefixTuning.kind
    peftrt.adapt(model, config("prompt"), name="de")
    model(tokens(), **inputs_of(model, tokens()))
