"""HF peft: a LoRA adapter injected over a dense layer, or over a bitsandbytes one."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor, nn

from bench.peers import UnavailableError, need

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


def mixed(
    base: nn.Module, adapters: Mapping[int, tuple[Tensor, Tensor, float]], slot_ids: Sequence[int]
) -> Callable[[Tensor], Tensor]:
    """A model of one layer whose rows have the adapters of ``slot_ids``, by name in each call; -1 is the base alone.

    ``adapters``: A ``[R, K]``, B ``[N, R]`` and the scaling of each in use.
    """
    peft = need("peft")
    wrapped = nn.Sequential(OrderedDict(base=base))
    wrapped.is_loaded_in_4bit = type(base).__name__ == "Linear4bit"
    model = None
    for slot, (A, _, scaling) in adapters.items():
        R = A.shape[0]
        config = peft.LoraConfig(r=R, lora_alpha=scaling * R, target_modules=["base"], lora_dropout=0.0)
        # nothing is drawn: the values are set below
        if model is None:
            model = peft.get_peft_model(wrapped, config, adapter_name=_name(slot), low_cpu_mem_usage=True)
        else:
            model.add_adapter(_name(slot), config, low_cpu_mem_usage=True)
    if model is None:
        raise UnavailableError("no row has an adapter")
    layer = model.base_model.model.base
    for slot, (A, B, _) in adapters.items():
        layer.lora_A[_name(slot)].weight = nn.Parameter(A, requires_grad=False)
        layer.lora_B[_name(slot)].weight = nn.Parameter(B, requires_grad=False)
    model.eval()
    names = [_name(slot) for slot in slot_ids]
    return lambda x: model(x, adapter_names=names)


def _name(slot: int) -> str:
    return "__base__" if slot < 0 else f"adapter{slot}"


def parameters(layer: nn.Module) -> tuple[Tensor, ...]:
    """A and B of a layer made by :func:`lora`, and DoRA's magnitude."""
    found = (layer.lora_A["default"].weight, layer.lora_B["default"].weight)
    vectors = layer.lora_magnitude_vector
    return (*found, vectors["default"].weight) if vectors else found
