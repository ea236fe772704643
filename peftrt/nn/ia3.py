"""IA3 adapters of a linear layer: a learned factor for each of its inputs, or for each of its outputs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn.adapter import DEFAULT, Settings, as_weights, check_name, parameter_name
from peftrt.nn.principal import PrincipalParts, in_one
from peftrt.nn.remembered import Remembered

FIELD = "ia3_l"


@dataclass(frozen=True)
class IA3Adapter:
    """One IA3 adapter of a layer, and its Parameter as it is now.

    Attributes:
        ia3_l: ``[1, K]`` of a feed-forward layer, ``[N, 1]`` of others, as HF peft has it.
        feedforward: as given to ``add_ia3``.
    """

    ia3_l: nn.Parameter
    feedforward: bool

    @property
    def parameters(self) -> tuple[nn.Parameter, ...]:
        """What is trained of it."""
        return (self.ia3_l,)

    @property
    def x_scale(self) -> Tensor | None:
        """u, ``[K]``; None where the outputs are scaled."""
        return self.ia3_l.view(-1) if self.feedforward else None

    @property
    def y_scale(self) -> Tensor | None:
        """c, ``[N]``; None where the inputs are scaled."""
        return None if self.feedforward else self.ia3_l.view(-1)

    def of_weight(self, weight: Tensor) -> Tensor:
        """fp32 W [N, K] with the factors in it: of its columns, or of its rows."""
        return weight * self.ia3_l.detach().float()

    def of_bias(self, bias: Tensor | None) -> Tensor | None:
        """The bias with the factors in it, rounded to its dtype; the bias itself where the inputs are scaled."""
        if bias is None or self.feedforward:
            return bias
        return (self.ia3_l.view(-1) * bias).to(bias.dtype)

    def slot(self, bias: Tensor | None) -> ops.SlotAdapter:
        """What a slot of a batch has for it, where every row is given the layer's bias as it is."""
        more = None if bias is None or self.feedforward else (self.ia3_l.view(-1).float() - 1.0) * bias.float()
        return ops.SlotAdapter((None,), x_scale=self.x_scale, y_scale=self.y_scale, bias=more)


@dataclass(frozen=True)
class IA3Settings:
    """What a layer keeps of an IA3 adapter beside its Parameter."""

    feedforward: bool


class IA3Factors(PrincipalParts):
    """A linear layer with IA3 adapters: ``y = (u * x) W^T + b`` of a feed-forward one, ``c * (x W^T + b)`` of others.

    The factors are a Parameter of the layer itself: ``ia3_l`` for the adapter called "default", ``ia3_l@fr`` for "fr".
    They multiply the base's share, so that such an adapter cannot be summed with others: it is active alone, with
    weight 1. c times the bias is remembered in ``eval()`` without gradients.

    Source: IA3, Liu et al. 2022 (arXiv:2205.05638), section 3.3.
    """

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    _settings: dict[str, Settings | IA3Settings]
    _active: dict[str, float]
    _merged: dict[str, float] | None
    _scales: Remembered[Tensor]

    def base_weight(self) -> Tensor | NF4Weight:
        """W [N, K], without adapters unless they are merged."""
        raise NotImplementedError

    def add_ia3(
        self,
        name: str = DEFAULT,
        *,
        feedforward: bool = False,
        init: bool = True,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> IA3Adapter:
        """Add a trainable IA3 adapter, not yet active, on the base's device.

        Args:
            name: a new name, without "." or "@".
            feedforward: a factor for each input, as for the second map of a feed-forward layer; otherwise one for each
                output, bias included.
            init: as peft's ``init_ia3_weights``. True: all 1, which changes nothing. False: normal (for tests).
            adapter_dtype: of the factors.

        Raises:
            ValueError: the name is taken or unusable.
        """
        check_name(name, self._settings)
        shape = (1, self.in_features) if feedforward else (self.out_features, 1)
        draw = torch.ones if init else torch.randn
        factors = draw(shape, dtype=adapter_dtype, device=self.weight.device)
        # past register_parameter, which would refuse "ia3_l" because the property of that name exists
        self._parameters[parameter_name(FIELD, name)] = nn.Parameter(factors)
        self._settings[name] = IA3Settings(bool(feedforward))
        return IA3Adapter(self._parameters[parameter_name(FIELD, name)], bool(feedforward))  # type: ignore[arg-type]

    def ia3(self, name: str) -> IA3Adapter | None:
        """The IA3 adapter of that name; None where there is none, or it is of another kind."""
        settings = self._settings.get(name)
        if not isinstance(settings, IA3Settings):
            return None
        factors = self._parameters[parameter_name(FIELD, name)]
        assert factors is not None
        return IA3Adapter(factors, settings.feedforward)

    @property
    def ia3_l(self) -> nn.Parameter:
        """The factors of the active adapter; an error where it is not one of IA3."""
        adapter = self._ia3_alone(self._active)
        if adapter is None:
            raise LookupError(f"an active adapter of IA3 is needed, there are {sorted(self._active)}")
        return adapter.ia3_l

    def _why_no_sum_of_ia3(self, weights: Mapping[str, float]) -> str | None:
        """Why IA3 adapters cannot act with these weights; None where they can, or there are none."""
        names = [name for name in weights if isinstance(self._settings.get(name), IA3Settings)]
        if names and (len(weights) > 1 or weights[names[0]] != 1.0):
            return (
                f"{', '.join(map(repr, names))} of IA3 cannot be summed: its factors multiply the base's share too. "
                f"Such an adapter is used alone, with weight 1; got {dict(weights)}"
            )
        return None

    def _ia3_alone(self, weights: Mapping[str, float]) -> IA3Adapter | None:
        """The IA3 adapter that acts with weights in which no sum is refused; None where none does."""
        return self.ia3(next(iter(weights), ""))

    def _with_factors(self, x: Tensor, name: str, adapter: IA3Adapter) -> Tensor:
        """The layer's map where an IA3 adapter is active."""
        bias, taken_out = self._bias_of(name, adapter), self.principal_terms(self._active)
        if not taken_out:
            return ops.ia3_linear(x, self.base_weight(), adapter.x_scale, adapter.y_scale, bias)
        seen = x if adapter.x_scale is None else (x * adapter.x_scale).to(x.dtype)
        return ops.lora_linear(seen, self.base_weight(), *in_one(taken_out), bias, row_scale=adapter.y_scale)

    def _bias_of(self, name: str, adapter: IA3Adapter) -> Tensor | None:
        """c * b, remembered in ``eval()`` without gradients; b where the inputs are scaled."""
        bias = self.bias
        if bias is None or adapter.feedforward:
            return bias
        if self.training or (torch.is_grad_enabled() and adapter.ia3_l.requires_grad):
            return adapter.of_bias(bias)

        def compute() -> Tensor:
            scaled = adapter.of_bias(bias)
            assert scaled is not None
            return scaled

        # "@": no adapter can be called so
        return self._scales.get(f"bias@{name}", (adapter.ia3_l, bias), None, compute)

    @torch.no_grad()
    def adapted_bias(self, names: str | Mapping[str, float] | None = None) -> Tensor | None:
        """b with adapters (by default the active ones) in it, which IA3's factors of outputs multiply; the bias as it
        is while merged.

        Raises:
            ValueError: an IA3 adapter among others, or with another weight than 1.
        """
        weights = self._active if names is None else as_weights(names)
        if (reason := self._why_no_sum_of_ia3(weights)) is not None:
            raise ValueError(reason)
        adapter = self._ia3_alone(weights)
        return self.bias if adapter is None or self._merged is not None else adapter.of_bias(self.bias)
