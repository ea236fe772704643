"""param_groups: what is trained, sorted into an optimizer's groups, each with its own learning rate and decay."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from torch import nn

# A Parameter's own name, without the adapter's ("lora_A@fr"), -> its group. HF peft keeps adapters in dictionaries
# ("lora_A.fr.weight"), so each part of a path is looked up.
_GROUPS = {
    "lora_A": "lora_A",
    "lora_B": "lora_B",
    "lora_embedding_A": "embedding",
    "lora_embedding_B": "embedding",
    "lora_magnitude": "magnitude",
    "lora_magnitude_vector": "magnitude",
    "ia3_l": "factors",
}
# The order of the groups in the result.
_ORDER = ("lora_A", "lora_B", "embedding", "magnitude", "factors", "other", "no_decay")


def param_groups(
    model: nn.Module | Mapping[str, nn.Parameter],
    lr: float,
    *,
    loraplus_lr_ratio: float | None = None,
    weight_decay: float = 0.0,
    embedding_lr: float | None = None,
) -> list[dict[str, Any]]:
    """Sort what a model trains into groups for any optimizer of torch's: ``AdamW(param_groups(model, 2e-4))``.

    ====================  =============================================  ===========================  ============
    name                  Parameters                                     learning rate                weight decay
    ====================  =============================================  ===========================  ============
    ``lora_A``            A of every adapter                             lr                           weight_decay
    ``lora_B``            B of every adapter                             lr x loraplus_lr_ratio       weight_decay
    ``embedding``         A and B of adapted embeddings                  embedding_lr                 weight_decay
    ``magnitude``         DoRA's magnitude vectors                       lr x loraplus_lr_ratio       0
    ``factors``           IA3's                                          lr                           0
    ``other``             matrices of modules that are trained whole     lr                           weight_decay
    ``no_decay``          biases, norms and other vectors                lr x loraplus_lr_ratio       0
    ====================  =============================================  ===========================  ============

    Only what requires gradients is in a group, each Parameter once however many names it has, and a group that would be
    empty is left out. Vectors go with B, as in the authors' implementation of LoRA+. HF peft's
    ``create_loraplus_optimizer`` gives the same rates where ``embedding_lr`` is its 1e-6.

    Args:
        model: a module; or name -> Parameter, where norms are known by having one dimension only.
        lr: learning rate, at least 0.
        loraplus_lr_ratio: what B's learning rate is multiplied by, above 0; the paper advises 16 or so. None is 1.
        weight_decay: at least 0.
        embedding_lr: learning rate of adapted embeddings; None is ``lr``.

    Returns:
        One dictionary a group: ``params``, ``lr``, ``weight_decay``, ``name``.

    Raises:
        TypeError: ``model`` is neither.
        ValueError: a number is out of its range, or nothing requires gradients.

    Source: LoRA+, Hayou et al. 2024 (arXiv:2402.12354).
    """
    ratio = 1.0 if loraplus_lr_ratio is None else loraplus_lr_ratio
    _expect_number("lr", lr)
    _expect_number("weight_decay", weight_decay)
    _expect_number("loraplus_lr_ratio", ratio, positive=True)
    if embedding_lr is not None:
        _expect_number("embedding_lr", embedding_lr)
    members: dict[str, list[nn.Parameter]] = {name: [] for name in _ORDER}
    seen: set[int] = set()
    for name, parameter, is_norm in _trained(model):
        if id(parameter) not in seen:
            seen.add(id(parameter))
            members[_group(name, parameter, is_norm)].append(parameter)
    if not seen:
        raise ValueError("param_groups: nothing in the model requires gradients")
    rates = dict.fromkeys(_ORDER, lr) | dict.fromkeys(("lora_B", "magnitude", "no_decay"), lr * ratio)
    rates["embedding"] = lr if embedding_lr is None else embedding_lr
    decays = dict.fromkeys(_ORDER, weight_decay) | dict.fromkeys(("magnitude", "factors", "no_decay"), 0.0)
    return [
        {"params": members[name], "lr": rates[name], "weight_decay": decays[name], "name": name}
        for name in _ORDER
        if members[name]
    ]


def _trained(model: nn.Module | Mapping[str, nn.Parameter]) -> Iterator[tuple[str, nn.Parameter, bool]]:
    """Name, Parameter, and whether a norm holds it."""
    if isinstance(model, nn.Module):
        for path, module in model.named_modules():
            is_norm = "norm" in type(module).__name__.lower()
            for name, parameter in module._parameters.items():
                if parameter is not None and parameter.requires_grad:
                    yield f"{path}.{name}", parameter, is_norm
    elif isinstance(model, Mapping):
        yield from ((name, parameter, False) for name, parameter in model.items() if parameter.requires_grad)
    else:
        raise TypeError(f"param_groups: expected a module, or Parameters by name, got {type(model).__name__}")


def _group(name: str, parameter: nn.Parameter, is_norm: bool) -> str:
    for part in reversed(name.split(".")):
        group = _GROUPS.get(part.partition("@")[0])
        if group is not None:
            return group
    return "no_decay" if is_norm or parameter.dim() < 2 else "other"


def _expect_number(name: str, value: float, positive: bool = False) -> None:
    least = "above 0" if positive else "of at least 0"
    if not math.isfinite(value) or value < 0 or (positive and value == 0):
        raise ValueError(f"param_groups: {name} must be a finite number {least}, got {value!r}")
