"""HF peft: a LoRA adapter injected over a dense layer, or over a bitsandbytes one."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from bench.peers import need

NAME = "peft"
NAME_NF4 = "peft+bitsandbytes"


def lora(base: nn.Module, lora_A: Tensor, lora_B: Tensor, alpha: float, magnitude: Tensor | None = None) -> nn.Module:
    """``base`` with an adapter of the given ``A [R, K]`` and ``B [N, R]``, copied, and scaling ``alpha / R``; with
    DoRA's ``magnitude [N]`` where one is given.
    """
    peft = need("peft")
    model = nn.Sequential(OrderedDict(base=base))
    # transformers sets this mark on a model that it loads in 4 bits; peft chooses the adapter's class by it
    model.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    options = {"target_modules": ["base"], "lora_dropout": 0.0, "use_dora": magnitude is not None}
    config = peft.LoraConfig(r=lora_A.shape[0], lora_alpha=alpha, **options)
    layer = peft.inject_adapter_in_model(config, model).base
    layer.lora_A["default"].weight.data.copy_(lora_A)
    layer.lora_B["default"].weight.data.copy_(lora_B)
    if magnitude is not None:
        layer.lora_magnitude_vector["default"].weight.data.copy_(magnitude)
    return layer


def parameters(layer: nn.Module) -> tuple[Tensor, ...]:
    """A and B of a layer made by :func:`lora`, and DoRA's magnitude."""
    found = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    vectors = layer.lora_magnitude_vector
    return (*found, vectors["default"].weight) if vectors else found
