"""HF peft: a LoRA adapter injected over a dense layer, or over a bitsandbytes one."""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from bench.peers import need

NAME = "peft"
NAME_NF4 = "peft+bitsandbytes"


def lora(base: nn.Module, lora_A: Tensor, lora_B: Tensor, alpha: float) -> nn.Module:
    """``base`` with an adapter of the given ``A [R, K]`` and ``B [N, R]``, copied, and scaling ``alpha / R``."""
    peft = need("peft")
    model = nn.Sequential(OrderedDict(base=base))
    # transformers sets this mark on a model that it loads in 4 bits; peft chooses the adapter's class by it
    model.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    config = peft.LoraConfig(r=lora_A.shape[0], lora_alpha=alpha, target_modules=["base"], lora_dropout=0.0)
    layer = peft.inject_adapter_in_model(config, model).base
    layer.lora_A["default"].weight.data.copy_(lora_A)
    layer.lora_B["default"].weight.data.copy_(lora_B)
    return layer


def parameters(layer: nn.Module) -> tuple[Tensor, Tensor]:
    """A and B of a layer made by :func:`lora`."""
    return layer.lora_A["default"].weight, layer.lora_B["default"].weight
