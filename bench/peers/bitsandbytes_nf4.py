"""bitsandbytes: NF4 through ``bitsandbytes.nn.Linear4bit`` and ``quantize_4bit`` and ``dequantize_4bit``."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from bench.peers import need
from peftrt import NF4Weight

NAME = "bitsandbytes"


def linear(weight: NF4Weight, dtype: torch.dtype) -> nn.Module:
    """A ``Linear4bit`` without bias over the same bytes that peftrt multiplies with."""
    bnb = need("bitsandbytes")
    N, K = weight.shape
    layer = bnb.nn.Linear4bit(K, N, bias=False, compute_dtype=dtype, quant_type="nf4", device="meta")
    layer.weight = _params(weight, layer)
    return layer


def dequantize(weight: NF4Weight, out: Tensor | None = None) -> Callable[[], Tensor]:
    """A call of ``dequantize_4bit`` to the weight's own dtype, into ``out`` where one is given.

    bitsandbytes 0.50 takes ``out`` on a GPU only: on a CPU it allocates, as its users have it.
    """
    bnb = need("bitsandbytes")
    params = _params(weight, None)
    if weight.device.type == "cpu":
        out = None
    return lambda: bnb.functional.dequantize_4bit(params.data, params.quant_state, out=out)


def quantize(dense: Tensor, double_quant: bool) -> Callable[[], Tensor]:
    """A call of ``quantize_4bit`` in blocks of 64; it returns the packed codes."""
    bnb = need("bitsandbytes")

    def call() -> Tensor:
        return bnb.functional.quantize_4bit(dense, compress_statistics=double_quant, quant_type="nf4", blocksize=64)[0]

    return lambda: call().reshape(-1)


def _params(weight: NF4Weight, layer: nn.Module | None) -> Tensor:
    bnb = need("bitsandbytes")
    state = weight.to_bnb()
    codes = state.pop("weight")
    stats = {name.removeprefix("weight."): tensor for name, tensor in state.items()}
    return bnb.nn.Params4bit.from_prequantized(codes, stats, device=weight.device, module=layer)
