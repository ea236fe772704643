"""Sizes of a Transformer, as far as its memory depends on them: of the models that papers compare, or any other's."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Linear:
    """A linear module that an adapter may stand on: its path, N and K."""

    path: str
    n: int
    k: int

    @property
    def weights(self) -> int:
        return self.n * self.k


@dataclass(frozen=True)
class Shape:
    """What is counted.

    Attributes:
        name: for people.
        layers, hidden, intermediate, vocabulary: sizes, as in the model's configuration.
        heads, kv_heads, head_dim: of attention.
        gated: the feed-forward network has two maps up, one of which gates the other (Llama), or one (BERT, GPT-2).
        fp32_norms: norms keep their input in fp32, whatever is computed in (RMSNorm as Llama has it).
        linears: every linear module of the layers.
        head: numbers in the output head; 0 where it is tied to the embedding.
        parameters: numbers in all, the head's among them.
        classes: outputs of the head where it classifies; 0 for a language model.
    """

    name: str
    layers: int
    hidden: int
    intermediate: int
    vocabulary: int
    heads: int
    kv_heads: int
    head_dim: int
    gated: bool
    fp32_norms: bool
    linears: tuple[Linear, ...]
    head: int
    parameters: int
    classes: int = 0

    @property
    def query_size(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_size(self) -> int:
        return self.kv_heads * self.head_dim


def llama(
    name: str, hidden: int, layers: int, heads: int, intermediate: int, kv_heads: int = 0, vocabulary: int = 32000
) -> Shape:
    """A Llama: no biases, an untied head, a gated feed-forward network."""
    kv_heads = kv_heads or heads
    size = hidden // heads
    maps = {
        "self_attn.q_proj": (hidden, hidden),
        "self_attn.k_proj": (kv_heads * size, hidden),
        "self_attn.v_proj": (kv_heads * size, hidden),
        "self_attn.o_proj": (hidden, hidden),
        "mlp.gate_proj": (intermediate, hidden),
        "mlp.up_proj": (intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    linears = tuple(
        Linear(f"model.layers.{layer}.{path}", n, k) for layer in range(layers) for path, (n, k) in maps.items()
    )
    norms = (2 * layers + 1) * hidden
    table = vocabulary * hidden
    total = sum(linear.weights for linear in linears) + 2 * table + norms
    return Shape(
        name, layers, hidden, intermediate, vocabulary, heads, kv_heads, size, True, True, linears, table, total
    )


# Touvron et al. 2023 (arXiv:2302.13971), table 2, and the widths of its feed-forward networks as released; Llama 3.1
# from Dubey et al. 2024 (arXiv:2407.21783), table 3.
PRESETS = {
    shape.name: shape
    for shape in (
        llama("llama-7b", 4096, 32, 32, 11008),
        llama("llama-13b", 5120, 40, 40, 13824),
        llama("llama-33b", 6656, 60, 52, 17920),
        llama("llama-65b", 8192, 80, 64, 22016),
        llama("llama-3.1-8b", 4096, 32, 32, 14336, kv_heads=8, vocabulary=128256),
        llama("llama-3.1-70b", 8192, 80, 64, 28672, kv_heads=8, vocabulary=128256),
    )
}
