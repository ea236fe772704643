"""Models built without data, filled from a checkpoint while they are quantised."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import peftrt
from peftrt.formats.errors import FormatError
from tests.adapters.tiny import KINDS, build, config, logits
from tests.tolerances import assert_same_bits


class TestWithoutData:
    """Models that are built without data are filled from a checkpoint while they are quantised."""

    @staticmethod
    def saved(tmp_path: Path, kind: str, **options: Any) -> Path:
        build(kind).save_pretrained(str(tmp_path / "base"), **options)
        return tmp_path / "base"

    @staticmethod
    def empty(kind: str) -> Any:
        model = build(kind)
        with peftrt.empty_weights():
            return type(model)(model.config).eval()

    @pytest.mark.parametrize("quantize", [None, "nf4"])
    @pytest.mark.parametrize("kind", KINDS)
    def test_the_same_as_from_memory(self, kind: str, quantize: str | None, tmp_path: Path) -> None:
        path = self.saved(tmp_path, kind, max_shard_size="50KB")
        assert len(list(path.glob("*.safetensors"))) > 1
        model, expected = self.empty(kind), build(kind)
        assert all(parameter.is_meta for parameter in model.parameters())
        for each, arguments in ((expected, {}), (model, {"checkpoint": path})):
            torch.manual_seed(0)
            peftrt.adapt(each, config(kind, init_lora_weights=True), quantize=quantize, **arguments)
        assert not any(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
        for key, value in expected.state_dict().items():
            if "lora_" not in key:  # drawn in another order
                assert_same_bits(model.state_dict()[key], value)
        assert_same_bits(logits(model), logits(expected))
        if kind == "gpt2":
            assert model.lm_head.weight is model.transformer.wte.weight

    def test_one_weight_at_a_time(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        path = self.saved(tmp_path, "llama")
        model = self.empty("llama")
        quantize, largest = peftrt.NF4Weight.quantize, []

        def counting(*args: Any, **kwargs: Any) -> Any:
            real = [p for p in model.parameters() if not p.is_meta and p.is_floating_point()]
            largest.append(sum(p.nbytes for p in real))
            return quantize(*args, **kwargs)

        monkeypatch.setattr(peftrt.NF4Weight, "quantize", counting)
        peftrt.adapt(model, config("llama"), quantize="nf4", checkpoint=path)
        assert len(largest) == 12
        assert max(largest) == 96 * 64 * 4  # the largest of the weights, alone

    def test_bitsandbytes_checkpoint(self, tmp_path: Path) -> None:
        """Weights that bitsandbytes quantised are taken as they are."""
        from safetensors.torch import save_file

        model = build("llama")
        state = dict(model.state_dict())
        for name in [key for key in state if key.endswith("_proj.weight")]:
            weight = peftrt.NF4Weight.quantize(state.pop(name))
            state.update(weight.to_bnb(name))
        save_file(state, tmp_path / "model.safetensors")
        model, expected = self.empty("llama"), build("llama")
        peftrt.adapt(expected, config("llama", target_modules="all-linear"), quantize="nf4")
        peftrt.adapt(model, config("llama"), quantize="nf4", checkpoint=tmp_path)
        # up_proj has no adapter, but is quantised in the file
        assert type(model.model.layers[0].mlp.up_proj) is peftrt.NF4Linear
        peftrt.set_active(model, None)
        peftrt.set_active(expected, None)
        assert_same_bits(logits(model), logits(expected))
        model = self.empty("llama")
        with unchanged_meta(model), pytest.raises(FormatError, match="pass quantize='nf4'"):
            peftrt.adapt(model, config("llama"), checkpoint=tmp_path)
        with unchanged_meta(model), pytest.raises(FormatError, match=r"block_size=64.*block_size=32"):
            peftrt.adapt(model, config("llama"), checkpoint=tmp_path, quantize="nf4", block_size=32)

    def test_errors(self, tmp_path: Path) -> None:
        from safetensors.torch import load_file, save_file

        path = self.saved(tmp_path, "llama") / "model.safetensors"
        state = load_file(path)
        model = self.empty("llama")
        with unchanged_meta(model), pytest.raises(ValueError, match=r"meta device.*checkpoint=PATH"):
            peftrt.adapt(model, config("llama"), quantize="nf4")
        missing = {key: value for key, value in state.items() if "layers.1.mlp.up_proj" not in key}
        save_file(missing, tmp_path / "missing.safetensors")
        with unchanged_meta(model), pytest.raises(FormatError, match=r"model\.layers\.1\.mlp\.up_proj\.weight"):
            peftrt.adapt(model, config("llama"), checkpoint=tmp_path / "missing.safetensors")
        save_file({**state, "lm_head.weight": torch.zeros(96, 32)}, tmp_path / "shape.safetensors")
        with unchanged_meta(model), pytest.raises(FormatError, match=r"lm_head.weight.*\[96, 32\].*\[96, 64\]"):
            peftrt.adapt(model, config("llama"), checkpoint=tmp_path / "shape.safetensors")
        late = "model.norm.weight"
        save_file({**state, late: torch.full_like(state[late], torch.nan)}, tmp_path / "nan.safetensors")
        with unchanged_meta(model), pytest.raises(FormatError, match="NaN"):
            peftrt.adapt(model, config("llama"), quantize="nf4", checkpoint=tmp_path / "nan.safetensors")
        peftrt.adapt(model, config("llama"), quantize="nf4", checkpoint=path)
        with torch.device("meta"):
            model = type(model)(model.config)
        with pytest.raises(ValueError, match=r"inv_freq is on the meta device.*empty_weights"):
            peftrt.adapt(model, config("llama"), checkpoint=path)

    def test_a_checkpoint_of_the_inner_model(self, tmp_path: Path) -> None:
        """Encoders are saved without the prefix that a model with a head puts before their names."""
        from safetensors.torch import save_file

        expected = build("bert")
        state = {key.removeprefix("bert."): value for key, value in expected.state_dict().items()}
        save_file(state, tmp_path / "model.safetensors")
        (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
        model = self.empty("bert")
        peftrt.adapt(model, config("bert", init_lora_weights=True), checkpoint=tmp_path)
        assert_same_bits(logits(model), logits(expected))


class unchanged_meta:  # noqa: N801 - reads like the function it stands for
    """As ``unchanged``, for a model whose tensors cannot be compared."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model

    def look(self) -> Any:
        return [
            (name, type(module), [id(p) for p in module.parameters()]) for name, module in self.model.named_modules()
        ]

    def __enter__(self) -> None:
        self.before = self.look()

    def __exit__(self, *error: object) -> None:
        assert self.look() == self.before
        assert peftrt.adapter_names(self.model) == ()
