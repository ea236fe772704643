"""LoRALinear and QLoRALinear: LoRA adapters over a dense and over an NF4 base."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftrt.formats.nf4 import NF4Weight
from peftrt.nn.adapter import DEFAULT
from peftrt.nn.adapter_linear import AdapterLinear
from peftrt.nn.initialisation import Pair, loftq, parse
from peftrt.nn.nf4_linear import NF4Linear
from peftrt.nn.principal import Term
from peftrt.nn.source import carry_over, make_dense, read_dense


class LoRALinear(AdapterLinear):
    """A frozen dense linear layer with LoRA or DoRA adapters: ``y = c * (x W^T + s (drop(x) A^T) B^T) + b``.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        r: R of the adapter that the layer begins with; None for a layer without adapters.
        lora_alpha, lora_dropout, use_rslora, use_dora, init, adapter_dtype: see :meth:`AdapterLinear.add_adapter`.
        adapter_name: name of that adapter, which is active.
        device, dtype: of the base weight and bias.

    c is 1 for LoRA; for DoRA see :class:`AdapterLinear`.

    Source: LoRA, Hu et al. 2021 (arXiv:2106.09685); DoRA, Liu et al. 2024 (arXiv:2402.09353).
    """

    weight: Tensor

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int | None = 8,
        adapter_name: str = DEFAULT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **adapter: Any,
    ) -> None:
        super().__init__()
        self._take_over(nn.Linear(in_features, out_features, bias, device=device, dtype=dtype))
        begin(self, r, adapter_name, adapter)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, r: int | None = 8, adapter_name: str = DEFAULT, **adapter: Any) -> Self:
        """Wrap an ``nn.Linear`` or Conv1D, whose Parameters (now frozen), hooks and training flag are taken over.

        Raises:
            TypeError: another kind of module.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(linear)
        begin(layer, r, adapter_name, adapter)
        return layer

    def _take_over(self, linear: nn.Module) -> None:
        source = read_dense(linear)
        self.in_features, self.out_features = source.in_features, source.out_features
        self._origin, self._transposed = type(linear), source.transposed
        self.register_parameter("weight", linear.weight.requires_grad_(False))  # type: ignore[arg-type]
        self.register_parameter("bias", None if linear.bias is None else linear.bias.requires_grad_(False))  # type: ignore[arg-type]
        self._init_adapters()
        carry_over(linear, self)

    def base_weight(self) -> Tensor:
        """W [N, K]; a view where Conv1D stores it as [K, N]."""
        return self.weight.t() if self._transposed else self.weight

    def _base(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.base_weight(), self.bias)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense layer with the active adapters in it, of the class that was wrapped."""
        dtype = dtype or self.weight.dtype
        bias = self.adapted_bias()
        bias = None if bias is None else bias.to(dtype, copy=True)
        plain = self._merged is not None or self.is_bare(self._active)
        weight = self.base_weight() if plain else self.adapted_weight()
        return make_dense(self._origin, weight.to(dtype, copy=True), bias, self._transposed)

    def _merge_into_base(self, weights: Mapping[str, float], force: bool) -> dict[str, Tensor]:
        before = self.weight
        self._store_base(self.adapted_weight(weights))
        return {"weight": before}

    def _store_base(self, weight: Tensor) -> None:
        stored = weight.to(self.weight.dtype)
        # a new Parameter: the old one may be a backup, and a module that shares it keeps its own bits
        self.weight = nn.Parameter(stored.t() if self._transposed else stored, requires_grad=False)

    def _settle_principal(self, name: str) -> None:
        """A dense base takes back what the adapter held of it."""
        pair = self.principal_pair(name)
        if pair is None:
            return
        self._expect_unmerged(f"adapter {name!r} holds a part of the base")
        part = Term(*pair, self._principal[name])
        self._store_base(self.base_weight().float() + part.delta())
        self._drop_principal(name)

    def extra_repr(self) -> str:
        """Sizes and adapters, as shown by ``print(model)``."""
        sizes = f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
        return sizes + super().extra_repr()


class QLoRALinear(AdapterLinear, NF4Linear):
    """A linear layer stored in NF4 with LoRA or DoRA adapters: ``y = c * (x W^T + s (drop(x) A^T) B^T) + b``.

    Args:
        in_features, out_features, bias, block_size, double_quant, device, dtype: see :class:`NF4Linear`.
        r, adapter_name, and the rest: see :class:`LoRALinear`.

    Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314), equation 5.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        r: int | None = 8,
        adapter_name: str = DEFAULT,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **adapter: Any,
    ) -> None:
        NF4Linear.__init__(
            self,
            in_features,
            out_features,
            bias,
            block_size=block_size,
            double_quant=double_quant,
            device=device,
            dtype=dtype,
        )
        begin(self, r, adapter_name, adapter)

    @classmethod
    def from_linear(
        cls,
        linear: nn.Module,
        *,
        r: int | None = 8,
        adapter_name: str = DEFAULT,
        block_size: int = 64,
        double_quant: bool = True,
        **adapter: Any,
    ) -> Self:
        """Quantise an ``nn.Linear`` or Conv1D and add an adapter; bias, hooks and training flag are taken over.

        Raises:
            TypeError: another kind of module.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(linear, block_size, double_quant)
        if r is not None and parse(adapter.get("init", True)).takes_weight:
            adapter["original"] = read_dense(linear).weight
        begin(layer, r, adapter_name, adapter)
        return layer

    def _take_over(
        self, linear: nn.Module, block_size: int, double_quant: bool, quantized: NF4Weight | None = None
    ) -> None:
        self._init_adapters()
        super()._take_over(linear, block_size, double_quant, quantized)

    def base_weight(self) -> NF4Weight:
        """W [N, K]."""
        return self.nf4_weight()

    def _base(self, x: Tensor) -> Tensor:
        return NF4Linear.forward(self, x)

    def _merged_weight(self, dtype: torch.dtype) -> Tensor:
        if self._merged is not None or self.is_bare(self._active):
            return self.nf4_weight().dequantize(dtype)
        return self.adapted_weight().to(dtype)

    def _merged_bias(self) -> Tensor | None:
        return self.adapted_bias()

    def _merge_into_base(self, weights: Mapping[str, float], force: bool) -> dict[str, Tensor]:
        if not force:
            raise ValueError(
                f"merging {sorted(weights)} into NF4 would lose {self.merge_loss(weights):.1%} of their change, which "
                "rounding to 16 levels swallows; export the merged model in bf16 (to_linear, peftrt.export), or pass "
                "force=True"
            )
        before: dict[str, Tensor] = {**self.weight_parameters()}
        self._set_weight(self._requantized(weights))
        return before

    def _requantized(self, weights: Mapping[str, float]) -> NF4Weight:
        merged = self.adapted_weight(weights)
        return NF4Weight.quantize(merged.to(self.weight_dtype), self.block_size, self.double_quant)

    def _quantized(self, weight: Tensor) -> NF4Weight:
        """fp32 [N, K] in the layer's form; not rounded to the base's dtype first."""
        return replace(NF4Weight.quantize(weight, self.block_size, self.double_quant), dtype=self.weight_dtype)

    def _store_base(self, weight: Tensor) -> None:
        self._set_weight(self._quantized(weight))

    def _begin_with_loftq(self, weight: Tensor, r: int, scaling: float, iterations: int) -> Pair:
        if not weight.numel():
            raise ValueError(
                "init 'loftq' needs the weight as it was before it was quantised, which this layer has not: begin with "
                "the dense layer (QLoRALinear.from_linear, peftrt.adapt with quantize='nf4')"
            )
        lora_A, lora_B, base = loftq(weight, r, scaling, iterations, self._quantized)
        self._set_weight(base)
        return lora_A, lora_B

    @torch.no_grad()
    def merge_loss(self, names: str | Mapping[str, float] | None = None) -> float:
        """Share of the adapters' change that requantising the merged weight would lose, in 0 ... 1.

        ``1 - <W1 - W0, D> / <D, D>``, clipped: W0 the base, D what merging adds to it, W1 the requantised sum.
        """
        weights = self._chosen(names)
        base = self.nf4_weight().dequantize(torch.float32)
        delta = self.adapted_weight(weights) - base
        change = self._requantized(weights).dequantize(torch.float32) - base
        norm = (delta * delta).sum().item()
        return 0.0 if norm == 0.0 else min(1.0, max(0.0, 1.0 - (change * delta).sum().item() / norm))


def begin(layer: AdapterLinear, r: int | None, name: str, adapter: Mapping[str, Any]) -> None:
    """Add and activate the adapter that a new layer begins with."""
    if r is None:
        if adapter:
            raise ValueError(f"r is None, but {', '.join(sorted(adapter))} are given for an adapter")
        return
    layer.add_adapter(name, r=r, **adapter)
    layer.set_active(name)
