"""NF4Linear: a linear layer whose weight is stored in NF4."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any, Self

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.formats.nf4 import BLOCK_SIZES, NF4Weight, stored_sizes
from peftrt.nn.source import carry_over, make_dense, read_dense

# Parameter name of each stored tensor, and the name it has in a state dict, which is bitsandbytes'.
_STORED = {
    "codes": ("weight", "weight"),
    "absmax": ("weight_absmax", "weight.absmax"),
    "nested_absmax": ("weight_nested_absmax", "weight.nested_absmax"),
    "nested_offset": ("weight_nested_offset", "weight.nested_offset"),
}


class NF4Linear(nn.Module):
    """A frozen linear layer over an NF4 weight: ``y = x W^T + b``.

    The codes and scales are uint8 Parameters without gradient, so that no change of a model's dtype, autocast or
    sharding touches them. ``load_state_dict`` takes this layer's own keys (``weight``, ``weight.absmax``, ...), those
    that bitsandbytes writes, or a dense ``weight`` [N, K], which it quantises.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        block_size: weights that share a scale; a power of two in 32 ... 4096.
        double_quant: store the scales in 8 bits.
        device: of the Parameters.
        dtype: of the bias, and of the weight when decoded: fp32, bf16 or fp16; default: torch's default dtype.

    A new layer holds nn.Linear's random initial weight, quantised.

    Raises:
        ValueError: another block size, or a size below 1.
        TypeError: another dtype.

    Source: QLoRA, Dettmers et al. 2023 (arXiv:2305.14314).
    """

    weight: Tensor
    weight_absmax: Tensor
    weight_nested_absmax: Tensor | None
    weight_nested_offset: Tensor | None
    bias: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        block_size: int = 64,
        double_quant: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        _check_sizes(in_features, out_features, block_size)
        linear = nn.Linear(in_features, out_features, bias, device=device, dtype=dtype)
        self._take_over(linear, block_size, double_quant)

    @classmethod
    def from_linear(cls, linear: nn.Module, *, block_size: int = 64, double_quant: bool = True) -> Self:
        """Quantise an ``nn.Linear`` or Conv1D; its bias, hooks and training flag are taken over.

        Raises:
            TypeError: another kind of module.
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(linear, block_size, double_quant)
        return layer

    @classmethod
    def from_quantized(cls, linear: nn.Module, weight: NF4Weight) -> Self:
        """Put a weight that is NF4 already in the place of an ``nn.Linear`` or Conv1D, whose own is not looked at.

        Raises:
            TypeError: another kind of module.
            ValueError: the weight has another shape than [N, K].
        """
        layer = cls.__new__(cls)
        nn.Module.__init__(layer)
        layer._take_over(linear, weight.block_size, weight.is_nested, weight)
        return layer

    def _take_over(
        self, linear: nn.Module, block_size: int, double_quant: bool, quantized: NF4Weight | None = None
    ) -> None:
        source = read_dense(linear)
        if quantized is not None and quantized.shape != (source.out_features, source.in_features):
            expected = [source.out_features, source.in_features]
            raise ValueError(f"expected a weight of shape {expected}, got {list(quantized.shape)}")
        self.in_features, self.out_features = source.in_features, source.out_features
        _check_sizes(self.in_features, self.out_features, block_size)
        self._origin, self._transposed = type(linear), source.transposed
        self._set_weight(quantized or NF4Weight.quantize(source.weight, block_size, double_quant))
        self.register_parameter("bias", None if linear.bias is None else linear.bias.requires_grad_(False))  # type: ignore[arg-type]
        carry_over(linear, self)

    def _set_weight(self, weight: NF4Weight) -> None:
        """Store an NF4 weight of the layer's shape."""
        self.block_size, self.double_quant, self.weight_dtype = weight.block_size, weight.is_nested, weight.dtype
        stored = weight.tensors()
        for field, (name, _) in _STORED.items():
            tensor = stored.get(field)
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor, requires_grad=False))

    def nf4_weight(self) -> NF4Weight:
        """The weight as NF4Weight, sharing the layer's tensors."""
        return NF4Weight(
            self.weight,
            self.weight_absmax,
            self.weight_nested_absmax,
            self.weight_nested_offset,
            (self.out_features, self.in_features),
            self.weight_dtype,
            self.block_size,
        )

    base_weight = nf4_weight  # the name under which every layer with adapters finds its base

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; see :func:`peftrt.ops.nf4_linear`."""
        return ops.nf4_linear(x, self.nf4_weight(), self.bias)

    @torch.no_grad()
    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The dense layer, of the class it was made from; ``dtype`` by default that of the quantised weight."""
        dtype = dtype or self.weight_dtype
        bias = self._merged_bias()
        bias = None if bias is None else bias.to(dtype, copy=True)
        return make_dense(self._origin, self._merged_weight(dtype), bias, self._transposed)

    def _merged_bias(self) -> Tensor | None:
        """The bias as the layer computes with it."""
        return self.bias

    def _merged_weight(self, dtype: torch.dtype) -> Tensor:
        """W [N, K] as the layer computes with it; layers with adapters add theirs."""
        return self.nf4_weight().dequantize(dtype)

    def extra_repr(self) -> str:
        """Sizes and storage, as shown by ``print(model)``."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"block_size={self.block_size}, double_quant={self.double_quant}"
        )

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name, key in _STORED.values():
            if prefix + name in destination:
                destination[prefix + key] = destination.pop(prefix + name)

    def _load_from_state_dict(
        self,
        state_dict: Mapping[str, Any],
        prefix: str,
        local_metadata: Mapping[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        own = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        try:
            self._read_weight(own, prefix)
        except (ValueError, TypeError, KeyError) as error:
            reason = f"missing key {error}" if isinstance(error, KeyError) else error
            error_msgs.append(f'While reading "{prefix}weight": {reason}')
            return
        missing: list[str] = []
        super()._load_from_state_dict(own, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        keys = {prefix + name: prefix + key for name, key in _STORED.values()}
        missing_keys += [keys.get(key, key) for key in missing]

    def _read_weight(self, own: dict[str, Any], prefix: str) -> None:
        """Bring the weight's keys, in whichever of the three forms, under the names of the Parameters."""
        weight = own.get(prefix + "weight")
        if weight is None:
            return
        shape = (self.out_features, self.in_features)
        if any(key.startswith(f"{prefix}weight.quant_state.") for key in own):
            found = NF4Weight.from_bnb(own, prefix + "weight")
        elif weight.is_floating_point():
            if tuple(weight.shape) != shape:
                raise ValueError(f"expected a dense weight of shape {list(shape)}, got {list(weight.shape)}")
            found = NF4Weight.quantize(weight, self.block_size, self.double_quant)
        else:
            found = self._native_weight(own, prefix)
        if found.shape != shape:
            raise ValueError(f"expected a weight of shape {list(shape)}, got {list(found.shape)}")
        for key in [key for key in own if key.startswith(prefix + "weight.")]:
            del own[key]
        stored = found.tensors()
        own.update({prefix + name: stored[field] for field, (name, _) in _STORED.items() if field in stored})
        if (found.block_size, found.is_nested) != (self.block_size, self.double_quant):
            device = self.weight.device
            empty: dict[str, Any] = {field: torch.empty_like(t, device=device) for field, t in stored.items()}
            self._set_weight(replace(found, **empty))
        self.weight_dtype = found.dtype

    def _native_weight(self, own: Mapping[str, Any], prefix: str) -> NF4Weight:
        """The weight under this class's own keys; nested or not as the keys say, in blocks of the layer's size."""
        parts: dict[str, Any] = {field: own.get(prefix + key) for field, (_, key) in _STORED.items()}
        nested = parts["nested_absmax"] is not None
        sizes = stored_sizes(self.out_features * self.in_features, self.block_size, nested)
        for field, size in sizes.items():
            tensor, key = parts[field], _STORED[field][1]
            if tensor is None:
                raise KeyError(f"{prefix}{key}")
            if tensor.dtype != torch.uint8 or tensor.numel() != size:
                got = f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
                raise ValueError(f"expected {key} of {size} bytes for blocks of {self.block_size}, got {got}")
        shape = (self.out_features, self.in_features)
        return NF4Weight.assemble(**parts, shape=shape, dtype=self.weight_dtype, block_size=self.block_size)


def _check_sizes(in_features: int, out_features: int, block_size: int) -> None:
    for name, size in (("in_features", in_features), ("out_features", out_features)):
        if size < 1:
            raise ValueError(f"{name} must be at least 1, got {size}")
    if block_size not in BLOCK_SIZES:
        raise ValueError(f"block_size must be one of {BLOCK_SIZES}, got {block_size!r}")
