"""What is trained: a model with its body and its head, the demo's encoder or a Hugging Face model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import peftrt
from peftrt.compare.methods import BODY, Method
from peftrt.compare.settings import Settings
from peftrt.demo.encoder import load_encoder
from peftrt.finetune import models
from peftrt.finetune.examples import Batch

_MULTIPLE = 16


class Sentence(nn.Module):
    """The mean of an encoder's last states over the tokens, ``[B, K]``."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        states = self.encoder(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state
        # virtual tokens, where a method puts some, stand first
        states = states[:, -attention_mask.shape[1] :]
        mask = attention_mask.unsqueeze(-1).to(states.dtype)
        return (states * mask).sum(1) / mask.sum(1)


class Classifier(nn.Module):
    """A linear map of a sentence's embedding: logits ``[B, classes]``."""

    def __init__(self, encoder: nn.Module, width: int, classes: int) -> None:
        super().__init__()
        self.sentence = Sentence(encoder)
        self.classifier = nn.Linear(width, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        return self.classifier(self.sentence(input_ids, attention_mask))


@dataclass
class Subject:
    """A model that classifies.

    Attributes:
        model: takes ``input_ids`` and ``attention_mask``.
        body: the part of it that adapters go on.
        head: paths in the model of what is new, and trained along whatever the method.
        device: where it is.
        multiple: batches are padded to a multiple of so many tokens.
    """

    model: nn.Module
    body: nn.Module
    head: tuple[str, ...]
    device: torch.device
    multiple: int = 1

    @classmethod
    def load(cls, settings: Settings, labels: Sequence[str]) -> Subject:
        """The model as it was published, in fp32, with a new head.

        Raises:
            UserError: there is none, or it does not classify.
        """
        device = models.choose_device(settings.device)
        model: Any
        if settings.model is None:
            encoder: Any = load_encoder()
            model = Classifier(encoder, encoder.config.hidden_size, len(labels))
            return cls(model.to(device), encoder, ("classifier",), device)
        tokenizer = models.load_tokenizer(settings.model)
        model, whole = models.load_classifier(settings.model, tuple(labels), tokenizer.pad_token_id, torch.float32)
        for module in model.modules():
            # as the demo's: what is compared are methods, each without dropout
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        return cls(model.to(device), getattr(model, model.base_model_prefix), tuple(whole), device)

    def logits(self, batch: Batch) -> Tensor:
        missing = -batch.input_ids.shape[1] % self.multiple
        ids, mask = (F.pad(part, (0, missing)) for part in (batch.input_ids, batch.attention_mask))
        output = self.model(input_ids=ids, attention_mask=mask)
        return output if isinstance(output, Tensor) else output.logits

    def adapt(self, method: Method) -> None:
        """Adapt the model as a method says; its head is trained along."""
        config = method.make(self.body, self.head)
        if isinstance(config, peftrt.FeatureExtraction):
            # features are kept of a row with its padding: in another batch it shall have the same
            self.multiple = _MULTIPLE
        if method.place != BODY:
            peftrt.adapt(self.model, config)
            return
        # a part of the body that is new is trained whole
        prefix = self._body_path + "."
        inside = tuple(path.removeprefix(prefix) for path in self.head if path.startswith(prefix))
        if inside and isinstance(config, peftrt.LoraConfig):
            config = replace(config, exclude_modules=inside)
        peftrt.adapt(self.body, config, quantize=method.quantize)
        for path in self.head:
            self.model.get_submodule(path).requires_grad_(True)

    def trained(self) -> dict[str, nn.Parameter]:
        return {name: parameter for name, parameter in self.model.named_parameters() if parameter.requires_grad}

    def head_modules(self) -> dict[str, nn.Module]:
        return {path: self.model.get_submodule(path) for path in self.head}

    def put_head(self, modules: dict[str, nn.Module]) -> None:
        """Put other modules in the place of the head's."""
        for path, module in modules.items():
            parent, _, name = path.rpartition(".")
            setattr(self.model.get_submodule(parent), name, module)

    def adapted(self, method: Method) -> nn.Module:
        """The module that the method's adapter is on."""
        return self.body if method.place == BODY else self.model

    @property
    def _body_path(self) -> str:
        return next(path for path, module in self.model.named_modules() if module is self.body)
