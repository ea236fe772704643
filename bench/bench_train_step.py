"""A training step of a whole encoder: QLoRA with its optimizer, against peft over bitsandbytes and the frozen model.

The encoder has the shape of MiniLM-L6 and random weights. Every linear layer is in NF4 and has an adapter; a step is
forward, backward and AdamW over a batch of 8 x 64 tokens. The frozen encoder, dense in fp32, runs forward and backward
down to its embeddings.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

import peftrt
from bench import problem, truth
from bench.cells import NF4_BYTES, Cell
from bench.harness import Runner
from bench.measure import Contender
from bench.peers import bitsandbytes_nf4, need, peft_lora
from bench.results import OWN
from bench.shapes import ENCODER, RANK, Site
from peftrt import NF4Weight

FROZEN = "frozen"
ALPHA = 2 * RANK
LAYERS, HIDDEN, HEADS, INTERMEDIATE = 6, ENCODER.K, 12, 4 * ENCODER.K
BATCH, TOKENS = 8, 64
# Errors of a layer are the next one's input: about 1e-6 in what the last one gives, and in the gradients.
TOLERANCE = 1e-4


def cells(device: str, quick: bool) -> list[Cell]:
    """The products with the weights, forward and back, are what no step can do without."""
    if device != "cpu" or quick:
        return []
    M = BATCH * TOKENS
    return [Cell("train_step", "encoder", ENCODER, M, torch.float32, f"2*({NF4_BYTES})", "4*M*N*K")]


def bench_train_step(cell: Cell, runner: Runner) -> None:
    step = Step()
    runner.run(cell, {OWN: step.own, peft_lora.NAME_NF4: step.peer, FROZEN: step.frozen})


class Step:
    """One encoder and batch, and the contenders over copies of it."""

    def __init__(self) -> None:
        transformers = need("transformers")
        torch.manual_seed(0)
        config = transformers.BertConfig(
            hidden_size=HIDDEN,
            num_hidden_layers=LAYERS,
            num_attention_heads=HEADS,
            intermediate_size=INTERMEDIATE,
            hidden_dropout_prob=0.0,
            attention_probs_dropout_prob=0.0,
        )
        self.model = transformers.BertModel(config, add_pooling_layer=False).requires_grad_(False)
        self.ids = torch.randint(config.vocab_size, (BATCH, TOKENS))
        self.dy = problem.activations(BATCH * TOKENS, HIDDEN, torch.float32, "cpu").view(BATCH, TOKENS, HIDDEN)
        self.sites = {name: layer for name, layer in self.model.named_modules() if isinstance(layer, nn.Linear)}
        self.nf4 = {name: NF4Weight.quantize(layer.weight) for name, layer in self.sites.items()}
        self.adapters = {name: problem.adapter(Site(*layer.weight.shape), "cpu") for name, layer in self.sites.items()}

    def own(self) -> Contender:
        model = copy.deepcopy(self.model)
        peftrt.adapt(model, peftrt.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules="all-linear"), quantize="nf4")
        layers = [model.get_submodule(name) for name in self.sites]
        return self._contender(model, [(layer.lora_A, layer.lora_B) for layer in layers])

    def peer(self) -> Contender:
        model = copy.deepcopy(self.model)
        pairs = []
        for name, layer in self.sites.items():
            base = bitsandbytes_nf4.linear(self.nf4[name], torch.float32)
            base.bias = layer.bias
            adapted = peft_lora.lora(base, *self.adapters[name], ALPHA)
            model.set_submodule(name, adapted)
            pairs.append(peft_lora.parameters(adapted))
        return self._contender(model, pairs)

    def frozen(self) -> Contender:
        model = self._dense(torch.float32, adapted=False)
        embedded = self.model.get_input_embeddings()(self.ids).requires_grad_()

        def call() -> tuple[Tensor, ...]:
            y = model(inputs_embeds=embedded).last_hidden_state
            return y.detach(), *torch.autograd.grad(y, embedded, self.dy)

        exact = self._dense(torch.float64, adapted=False)
        x = embedded.detach().double().requires_grad_()
        y = exact(inputs_embeds=x).last_hidden_state
        return Contender((call,), (y.detach(), *torch.autograd.grad(y, x, self.dy.double())), TOLERANCE)

    def _contender(self, model: nn.Module, pairs: list[tuple[Tensor, Tensor]]) -> Contender:
        """``pairs``: A and B of every site. A learning rate of 0 changes nothing, and costs what others cost."""
        parameters = [parameter for pair in pairs for parameter in pair]
        with torch.no_grad():
            for parameter, value in zip(parameters, self._values(), strict=True):
                parameter.copy_(value)
        optimizer = torch.optim.AdamW(parameters, lr=0.0, fused=True)

        def call() -> tuple[Tensor, ...]:
            optimizer.zero_grad()
            y = model(input_ids=self.ids).last_hidden_state
            y.backward(self.dy)
            optimizer.step()
            return y.detach(), *(parameter.grad for parameter in parameters)

        return Contender((call,), self._truth(), TOLERANCE)

    def _values(self) -> Iterator[Tensor]:
        for pair in self.adapters.values():
            yield from pair

    def _truth(self) -> tuple[Tensor, ...]:
        """The last hidden state, and the gradients of every A and B, in float64."""
        model = self._dense(torch.float64, adapted=True)
        y = model(input_ids=self.ids).last_hidden_state
        layers = [model.get_submodule(name) for name in self.sites]
        parameters = [parameter for layer in layers for parameter in (layer.lora_A, layer.lora_B)]
        return y.detach(), *torch.autograd.grad(y, parameters, self.dy.double())

    def _dense(self, dtype: torch.dtype, adapted: bool) -> nn.Module:
        """The encoder with its decoded weights, and with adapters in plain torch."""
        model = copy.deepcopy(self.model).to(dtype)
        for name in self.sites:
            dense = model.get_submodule(name)
            dense.weight.copy_(truth.decode(self.nf4[name], torch.float32))
            if adapted:
                model.set_submodule(name, Exact(dense, *self.adapters[name]))
        return model


class Exact(nn.Module):
    """A dense layer and an adapter, written out."""

    def __init__(self, base: nn.Module, lora_A: Tensor, lora_B: Tensor) -> None:
        super().__init__()
        self.base = base
        self.lora_A, self.lora_B = (nn.Parameter(part.double()) for part in (lora_A, lora_B))

    def forward(self, x: Tensor) -> Tensor:
        return self.base(x) + ALPHA / RANK * (x @ self.lora_A.t() @ self.lora_B.t())
