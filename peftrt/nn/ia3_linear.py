"""IA3Linear: IA3's factors over a dense base."""

from __future__ import annotations

from typing import Any, Self

import torch
from torch import nn

from peftrt.nn.adapter import DEFAULT
from peftrt.nn.lora_linear import LoRALinear


class IA3Linear(LoRALinear):
    """A frozen dense linear layer whose outputs have learned factors, ``y = c * (x W^T + b)``, or its inputs,
    ``y = (u * x) W^T + b``.

    Adapters of other kinds can be added beside, as to every layer. Over an NF4 base: ``QLoRALinear(..., r=None)`` and
    its ``add_ia3``.

    Args:
        in_features: K.
        out_features: N.
        bias: whether there is a bias [N].
        feedforward: factors of the inputs, as for the second map of a feed-forward layer; otherwise of the outputs.
        adapter_name: name of the adapter that the layer begins with, which is active.
        init, adapter_dtype: see :meth:`peftrt.nn.AdapterLinear.add_ia3`.
        device, dtype: of the base weight and bias.

    Source: IA3, Liu et al. 2022 (arXiv:2205.05638), section 3.3.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        feedforward: bool = False,
        adapter_name: str = DEFAULT,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        **adapter: Any,
    ) -> None:
        super().__init__(in_features, out_features, bias, r=None, device=device, dtype=dtype)
        self.add_ia3(adapter_name, feedforward=feedforward, **adapter)
        self.set_active(adapter_name)

    @classmethod
    def from_linear(
        cls, linear: nn.Module, *, feedforward: bool = False, adapter_name: str = DEFAULT, **adapter: Any
    ) -> Self:
        """Wrap an ``nn.Linear`` or Conv1D, whose Parameters (now frozen), hooks and training flag are taken over.

        Raises:
            TypeError: another kind of module.
        """
        layer = super().from_linear(linear, r=None)
        layer.add_ia3(adapter_name, feedforward=feedforward, **adapter)
        layer.set_active(adapter_name)
        return layer
