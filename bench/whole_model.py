"""Whole models whose training step is measured: their shapes, and the contenders over copies of one model and batch."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import peftrt
from bench import problem, truth
from bench.measure import Contender
from bench.peers import bitsandbytes_nf4, need, peft_lora
from bench.shapes import ENCODER, LLAMA_8B, RANK, Site

ALPHA = 2 * RANK
Pairs = list[tuple[Tensor, Tensor]]  # A and B of every site


@dataclass(frozen=True)
class Model:
    """A model's shape, and a batch for it.

    Attributes:
        part: name in the cell.
        site: all of its linear layers as one weight of so many rows.
        config: the class of its configuration in transformers, and the fields.
        batch, tokens: sequences of a step, and their length.
        dtype: of the weights and activations.
        exact: what truth is computed in; float64 unless the model would not fit.
        tolerance: of the last hidden state and of every gradient. Errors of a layer are the next one's input.
    """

    part: str
    site: Site
    config: tuple[str, Mapping[str, Any]]
    batch: int
    tokens: int
    dtype: torch.dtype
    exact: torch.dtype
    tolerance: float

    def build(self, device: str) -> nn.Module:
        """The model without a head, frozen, with random weights, of ``dtype`` from the start."""
        transformers = need("transformers")
        name, fields = self.config
        torch.manual_seed(0)
        with torch.device(device):
            config = getattr(transformers, name)(**fields, use_cache=False)
            model = transformers.AutoModel.from_config(config, dtype=self.dtype)
        if hasattr(model, "pooler"):
            model.pooler = None  # it does not add to the hidden states
        return model.requires_grad_(False)


# MiniLM-L6's shape (Wang et al. 2020, arXiv:2002.10957). Gradients of attention's keys nearly cancel: in fp32 every
# contender is 1e-4 off there.
MINILM = Model(
    "encoder",
    ENCODER,
    (
        "BertConfig",
        {
            "hidden_size": 384,
            "num_hidden_layers": 6,
            "num_attention_heads": 12,
            "intermediate_size": 1536,
            "hidden_dropout_prob": 0.0,
            "attention_probs_dropout_prob": 0.0,
        },
    ),
    batch=8,
    tokens=64,
    dtype=torch.float32,
    exact=torch.float64,
    tolerance=1e-3,
)
# Llama-3.1-8B's. bf16, 32 layers deep: the tolerance is a guess until a device has shown the error.
LLAMA = Model(
    "llama-8b",
    LLAMA_8B,
    (
        "LlamaConfig",
        {
            "hidden_size": 4096,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
            "num_key_value_heads": 8,
            "intermediate_size": 14336,
            "vocab_size": 128256,
            "rope_theta": 5e5,
        },
    ),
    batch=1,
    tokens=2048,
    dtype=torch.bfloat16,
    exact=torch.float32,
    tolerance=0.1,
)
# Shows that the machinery works, and nothing about speed.
TINY = Model(
    "tiny",
    Site(2 * (2 * 256 + 2 * 128 + 3 * 512), 256),
    (
        "LlamaConfig",
        {
            "hidden_size": 256,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 512,
            "vocab_size": 96,
        },
    ),
    batch=2,
    tokens=8,
    dtype=torch.float32,
    exact=torch.float64,
    tolerance=1e-4,
)


class Step:
    """One model and batch, and the contenders' training steps: forward, backward, AdamW.

    Every linear layer has an adapter. All work on the same values: those of the NF4 weights.
    """

    def __init__(self, shape: Model, device: str) -> None:
        self.shape = shape
        self.model = shape.build(device)
        width = self.model.config.hidden_size
        with torch.device(device):
            self.ids = torch.randint(self.model.config.vocab_size, (shape.batch, shape.tokens))
        rows = shape.batch * shape.tokens
        self.dy = problem.activations(rows, width, shape.dtype, device).view(shape.batch, shape.tokens, width)
        self.sites = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
        self.quantized = copy.deepcopy(self.model)
        config = peftrt.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear")
        peftrt.adapt(self.quantized, config, quantize="nf4", fuse=True)
        self.nf4 = {name: self.quantized.get_submodule(name).nf4_weight() for name in self.sites}
        self.adapters = {name: problem.adapter(Site(*layer.weight.shape), device) for name, layer in self.sites.items()}
        with torch.no_grad():
            for name, (lora_A, lora_B) in self.adapters.items():
                layer = self.quantized.get_submodule(name)
                layer.lora_A.copy_(lora_A)
                layer.lora_B.copy_(lora_B)
        self.embedded = self.model.get_input_embeddings()(self.ids).detach()

    def own(self) -> Contender:
        """QLoRA by peftrt, layers of one input in one call."""
        return self._by_peftrt(self.quantized)

    def one_by_one(self) -> Contender:
        """The same, each layer in a call of its own: copies of weights do not lie together."""
        return self._by_peftrt(copy.deepcopy(self.quantized))

    def _by_peftrt(self, model: nn.Module) -> Contender:
        layers = [model.get_submodule(name) for name in self.sites]
        return self._trained(model, [(layer.lora_A, layer.lora_B) for layer in layers])

    def qlora_peer(self) -> Contender:
        """QLoRA by peft over bitsandbytes."""

        def base(name: str) -> nn.Module:
            layer = bitsandbytes_nf4.linear(self.nf4[name], self.shape.dtype)
            layer.bias = self.sites[name].bias
            return layer

        return self._by_peft(sharing(self.model), base)

    def lora_peer(self) -> Contender:
        """LoRA by peft over a dense model."""
        model = sharing(self.dense)
        return self._by_peft(model, model.get_submodule)

    def frozen(self) -> Contender:
        """The dense model without adapters, forward and backward down to its embeddings."""
        embedded = self.embedded.clone().requires_grad_()

        def call() -> tuple[Tensor, ...]:
            y = self.dense(inputs_embeds=embedded).last_hidden_state
            return y.detach(), *torch.autograd.grad(y, embedded, self.dy)

        return self._contender(call, self.truths[0], resident(self.dense))

    @functools.cached_property
    def dense(self) -> nn.Module:
        """The model with its decoded weights."""
        return self._decoded(self.shape.dtype)

    @functools.cached_property
    def truths(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Exactly: the last hidden state and the embeddings' gradient of the frozen model; the last hidden state and
        every adapter's gradients of the adapted one.
        """
        model, dy = self._decoded(self.shape.exact), self.dy.to(self.shape.exact)
        x = self.embedded.to(self.shape.exact).requires_grad_()
        y = model(inputs_embeds=x).last_hidden_state
        frozen = y.detach(), *torch.autograd.grad(y, x, dy)
        del y
        for name in self.sites:
            model.set_submodule(name, Exact(model.get_submodule(name), *self.adapters[name]))
        layers = [model.get_submodule(name) for name in self.sites]
        y = model(input_ids=self.ids).last_hidden_state
        parameters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
        return frozen, (y.detach(), *torch.autograd.grad(y, parameters, dy))

    def _decoded(self, dtype: torch.dtype) -> nn.Module:
        model = sharing(self.model) if dtype == self.shape.dtype else copy.deepcopy(self.model).to(dtype)
        for name, layer in self.sites.items():
            weight = truth.decode(self.nf4[name], self.shape.dtype).to(dtype)
            model.get_submodule(name).weight = nn.Parameter(weight.view_as(layer.weight), requires_grad=False)
        return model

    def _by_peft(self, model: nn.Module, base: Callable[[str], nn.Module]) -> Contender:
        pairs: Pairs = []
        for name, (lora_A, lora_B) in self.adapters.items():
            adapted = peft_lora.lora(base(name), lora_A, lora_B, ALPHA)
            model.set_submodule(name, adapted)
            pairs.append(peft_lora.parameters(adapted))
        return self._trained(model, pairs)

    def _trained(self, model: nn.Module, pairs: Pairs) -> Contender:
        """A learning rate of 0 changes nothing, and costs what others cost."""
        parameters = [parameter for pair in pairs for parameter in pair]
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

        def call() -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            y = model(input_ids=self.ids).last_hidden_state
            y.backward(self.dy)
            optimizer.step()
            return y.detach(), *(parameter.grad for parameter in parameters)

        call()  # makes the optimizer's state
        state = [value for entry in optimizer.state.values() for value in entry.values()]
        return self._contender(call, self.truths[1], resident(model, *parameters, *state))

    def _contender(self, call: Callable[[], tuple[Tensor, ...]], expected: tuple[Tensor, ...], held: int) -> Contender:
        return Contender((call,), expected, self.shape.tolerance, captured=False, resident=held)


class Exact(nn.Module):
    """A dense layer and an adapter, written out."""

    def __init__(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (nn.Parameter(part.to(base.weight.dtype)) for part in (lora_A, lora_B))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.lora_A.t() @ self.lora_B.t())


def sharing(model: nn.Module) -> nn.Module:
    """A copy with modules of its own around the same Parameters."""
    return copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})


def resident(model: nn.Module, *more: Any) -> int:
    """Bytes of what a model holds between steps, quantisation statistics included, and of ``more``; each once."""
    tensors = [value for value in (*model.state_dict().values(), *more) if isinstance(value, Tensor)]
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(storages.values())
