"""The methods that are compared: the configuration of each, and the learning rate that it is given.

One rate for all would compare rates, not methods: a prompt of twenty rows needs a hundred times that of a whole model.

Those "of the sweep" were the better of two or three, a factor of about three apart: held-out accuracy after 200 steps
of 8 of the demo's docstrings, whose packages were to be told, with one seed (Zen 3, November 2026).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

import peftrt
from peftrt.adapters.configs.base import AdapterConfig
from peftrt.finetune.errors import UserError

FULL, HEAD, BODY = "model", "head", "body"
# What IA3 scales, by how families of models call it: the projections of keys and values, and the feed-forward network's
# second map, last (Liu et al. 2022, section 3.3; HF peft has the same lists).
_IA3_NAMES = (
    ("key", "value", "output.dense"),
    ("k_proj", "v_proj", "down_proj"),
    ("k_proj", "v_proj", "fc2"),
    ("k_lin", "v_lin", "ffn.lin2"),
    ("c_attn", "mlp.c_proj"),
)


@dataclass(frozen=True)
class Method:
    """One way to fine-tune.

    Attributes:
        name: on the command line and in the table.
        config: the configuration's class.
        fields: what it is made with.
        lr: the highest learning rate.
        source: where that is from.
        quantize: how the frozen weights are kept, "nf4" or None.
        place: what is adapted: the model; its head alone; or its body, beside which the head is trained.
    """

    name: str
    config: type[AdapterConfig]
    lr: float
    source: str
    fields: Mapping[str, Any] = field(default_factory=dict)
    quantize: str | None = None
    place: str = BODY

    def make(self, body: nn.Module, head: Sequence[str]) -> AdapterConfig:
        """The configuration for a model with this body; ``head`` are the paths of the modules that are its head.

        Raises:
            UserError: it is not known what IA3 would scale.
        """
        fields = dict(self.fields)
        if self.place == HEAD:
            fields["modules"] = tuple(head)
        if self.name == "ia3":
            names = _ia3_names(body)
            fields |= {"target_modules": names, "feedforward_modules": names[-1:]}
        return self.config(**fields)


def _lora(r: int, lr: float, quantize: str | None = None) -> Method:
    # alpha is 2 r: the higher the rank, the further a step of one rate moves the weights
    name = f"lora-{r}" if quantize is None else f"qlora-{r}"
    fields = {"r": r, "lora_alpha": 2 * r, "target_modules": "all-linear"}
    return Method(name, peftrt.LoraConfig, lr, "of the sweep", fields, quantize)


def _bottleneck(placement: str, lr: float, source: str) -> Method:
    return Method(placement, peftrt.BottleneckConfig, lr, source, {"placement": placement})


def _ia3_names(body: nn.Module) -> tuple[str, ...]:
    paths = [path for path, _ in body.named_modules()]
    for names in _IA3_NAMES:
        if all(any(path.endswith("." + name) for path in paths) for name in names):
            return names
    raise UserError(f"ia3: {type(body).__name__} has none of the modules that are known to be scaled: leave it out")


METHODS = {
    method.name: method
    for method in (
        Method("full", peftrt.FullFineTuning, 3e-4, "of the sweep", place=FULL),
        Method("output-layer", peftrt.OutputLayer, 3e-2, "of the sweep", place=HEAD),
        Method("feature-extraction", peftrt.FeatureExtraction, 3e-2, "the output layer's", place=HEAD),
        _lora(4, 3e-3),
        _lora(8, 3e-3),
        _lora(16, 2e-3),
        _lora(64, 1e-3),
        _lora(16, 2e-3, "nf4"),
        _bottleneck("houlsby", 3e-3, "of the sweep; Houlsby et al. 2019 (arXiv:1902.00751) try 3e-5 to 3e-3"),
        _bottleneck("pfeiffer", 3e-3, "as houlsby"),
        Method(
            "prefix",
            peftrt.PrefixTuningConfig,
            3e-2,
            "of the sweep",
            {"num_virtual_tokens": 20},
        ),
        Method(
            "prompt",
            peftrt.PromptTuningConfig,
            3e-2,
            "of the sweep; Lester et al. 2021 (arXiv:2104.08691) have 0.3, by Adafactor",
            {"num_virtual_tokens": 20},
        ),
        Method(
            "ia3", peftrt.IA3Config, 1e-2, "of the sweep; Liu et al. 2022 (arXiv:2205.05638) have 3e-3, by Adafactor"
        ),
    )
}


def choose(names: Sequence[str] | None) -> list[Method]:
    """The methods of these names, or all that there are.

    Raises:
        UserError: an unknown name.
    """
    if names is None:
        return list(METHODS.values())
    for name in names:
        if name not in METHODS:
            raise UserError(f"--methods: no method {name!r}; there are {', '.join(METHODS)}")
    return [METHODS[name] for name in dict.fromkeys(names)]
