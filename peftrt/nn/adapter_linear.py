"""AdapterLinear: what the linear layers with LoRA adapters share, whatever their base weight is stored in."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import initialisation
from peftrt.nn.principal import PrincipalParts, Term, in_one
from peftrt.nn.routing import AdapterSet, Routing, current

DEFAULT = "default"


@dataclass(frozen=True)
class Adapter:
    """One adapter of a layer: its hyper-parameters, and its Parameters as they are now.

    Attributes:
        lora_A: ``[R, K]``.
        lora_B: ``[N, R]``.
        r, lora_alpha, lora_dropout, use_rslora: as given to ``add_adapter``.
    """

    lora_A: nn.Parameter
    lora_B: nn.Parameter
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        """s: alpha / R, or alpha / sqrt(R) for rsLoRA."""
        return scaling_of(self.r, self.lora_alpha, self.use_rslora)

    @torch.no_grad()
    def delta(self) -> Tensor:
        """s B A, fp32 [N, K]."""
        return self.scaling * (self.lora_B.float() @ self.lora_A.float())


@dataclass(frozen=True)
class _Settings:
    r: int
    lora_alpha: float
    lora_dropout: float
    use_rslora: bool


class AdapterLinear(PrincipalParts):
    """A linear layer with any number of named LoRA adapters: ``y = x W^T + b + sum_a w_a s_a (drop(x) A_a^T) B_a^T``.

    The sum goes over the active adapters with their weights. Under a routing (``peftrt.rows``) every row has its own
    adapter instead. An adapter's matrices are Parameters of the layer itself: ``lora_A`` and ``lora_B`` for the one
    called "default", ``lora_A@fr`` and ``lora_B@fr`` for one called "fr". Subclasses say where the base weight is:
    ``base_weight``.
    """

    # what an adapter's Parameters are called
    fields: ClassVar[tuple[str, str]] = ("lora_A", "lora_B")

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    owner: AdapterSet

    def _init_adapters(self) -> None:
        self._settings: dict[str, _Settings] = {}
        self._active: dict[str, float] = {}
        self._merged: dict[str, float] | None = None
        self._backup: dict[str, Tensor] = {}
        self.owner = AdapterSet()
        self._init_principal()

    def base_weight(self) -> Tensor | NF4Weight:
        """W [N, K], without adapters unless they are merged."""
        raise NotImplementedError

    def _base(self, x: Tensor) -> Tensor:
        raise NotImplementedError

    def add_adapter(
        self,
        name: str = DEFAULT,
        *,
        r: int = 8,
        lora_alpha: float = 8,
        lora_dropout: float = 0.0,
        use_rslora: bool = False,
        init: bool | str = True,
        loftq_config: Mapping[str, Any] | None = None,
        original: Tensor | None = None,
        adapter_dtype: torch.dtype = torch.float32,
    ) -> Adapter:
        """Add a trainable adapter, not yet active, on the base's device.

        Args:
            name: a new name, without "." or "@".
            r: R, at least 1.
            lora_alpha: alpha.
            lora_dropout: probability in [0, 1) that an element of the adapter's input is zeroed in training.
            use_rslora: scale by alpha / sqrt(R).
            init: as peft's ``init_lora_weights``, see :mod:`peftrt.nn.initialisation`. True: A Kaiming-uniform, B zero.
                "gaussian": A normal with deviation 1 / R, B zero. "orthogonal": neither is zero, B A is. False: both
                Kaiming-uniform, so that the adapter changes the output from the start (for tests). "pissa" and
                "pissa_niter_<n>": s B A is the principal part of W, which leaves the base and comes back where the
                adapter does not act (:class:`PrincipalParts`); over an NF4 base the rest is quantised anew. "loftq":
                NF4 base and s B A together are closer to W than nf4(W).
            loftq_config: ``{"loftq_bits": 4, "loftq_iter": n}``, n = 1 by default.
            original: W [N, K] as it was before it was quantised: "loftq" needs it; without it "pissa" over an NF4 base
                begins with the dequantised weight.
            adapter_dtype: of A and B.

        Raises:
            ValueError: the name is taken or unusable, or a value is out of its range.
        """
        _check_new(name, self._settings, r, lora_alpha, lora_dropout)
        scaling = scaling_of(r, lora_alpha, use_rslora)
        reason = initialisation.refusal(init, r, scaling, self.out_features, self.in_features)
        if reason is not None:
            raise ValueError(reason)
        if initialisation.parse(init).takes_weight:
            given = (original, loftq_config, adapter_dtype)
            lora_A, lora_B = self._begin_with_weight(name, init, r, scaling, *given)
        else:
            lora_A, lora_B = self._draw(init, r, adapter_dtype)
        # past register_parameter, which would refuse "lora_A" because the property of that name exists
        for field, half in zip(self.fields, (lora_A, lora_B), strict=True):
            self._parameters[_key(field, name)] = nn.Parameter(half)
        self._settings[name] = _Settings(r, float(lora_alpha), float(lora_dropout), use_rslora)
        return self.adapter(name)

    def _draw(self, init: bool | str, r: int, dtype: torch.dtype) -> initialisation.Pair:
        """A and B of an initialisation that does not look at the weight."""
        return initialisation.draw(init, r, self.out_features, self.in_features, dtype, self.weight.device)

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; it must exist and not be merged."""
        self._expect_known(name)
        if self._merged and name in self._merged:
            raise ValueError(f"adapter {name!r} is merged; unmerge before removing it")
        self._settle_principal(name)
        for field in self.fields:
            del self._parameters[_key(field, name)]
        del self._settings[name]
        self._active.pop(name, None)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names in the order in which they were added."""
        return tuple(self._settings)

    def adapter(self, name: str) -> Adapter:
        """The adapter of that name; KeyError where there is none."""
        self._expect_known(name)
        settings = self._settings[name]
        lora_A, lora_B = (self._parameters[_key(field, name)] for field in self.fields)
        assert lora_A is not None
        assert lora_B is not None
        return Adapter(lora_A, lora_B, settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora)

    def set_active(self, names: str | Mapping[str, float] | None) -> None:
        """Choose what forward adds to the base: nothing, one adapter, or a weighted sum. ``requires_grad`` stays.

        Raises:
            KeyError: an unknown name.
            ValueError: a weight that is not finite, or adapters are merged.
        """
        weights = as_weights(names)
        for name in weights:
            self._expect_known(name)
        if self._merged is not None and weights != self._active:
            raise ValueError(f"adapters {sorted(self._merged)} are merged; unmerge before activating others")
        self._active = weights

    @property
    def active(self) -> dict[str, float]:
        """The active adapters and their weights."""
        return dict(self._active)

    @property
    def lora_A(self) -> nn.Parameter:
        """A [R, K] of the active adapter; an error where there is not exactly one."""
        return self._only_active().lora_A

    @property
    def lora_B(self) -> nn.Parameter:
        """B [N, R] of the active adapter; an error where there is not exactly one."""
        return self._only_active().lora_B

    @property
    def scaling(self) -> float:
        """s of the active adapter; an error where there is not exactly one."""
        return self._only_active().scaling

    def _only_active(self) -> Adapter:
        if len(self._active) != 1:
            # not AttributeError: nn.Module.__getattr__ would swallow the reason
            raise LookupError(f"one active adapter is needed, there are {len(self._active)}: {sorted(self._active)}")
        return self.adapter(next(iter(self._active)))

    def _expect_known(self, name: str) -> None:
        if name not in self._settings:
            raise KeyError(f"no adapter {name!r}; there are {sorted(self._settings)}")

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; see :func:`peftrt.ops.lora_linear` and
        :func:`peftrt.ops.multi_lora_linear`.
        """
        routing = current(self.owner)
        if routing is not None:
            return self._routed(x, routing)
        # not by is_bare: torch.compile watches whether a dictionary is empty only where it is tested itself
        if self._merged is not None or not (self._active or self._principal):
            return self._base(x)
        return self._adapted(x)

    def is_bare(self, weights: Mapping[str, float]) -> bool:
        """Whether the base alone is the layer's map where adapters act with these weights."""
        return not weights and not self._principal

    def terms(self, weights: Mapping[str, float]) -> list[Term]:
        """The terms of adapters that act with these weights."""
        adapters = [(self.adapter(name), weight) for name, weight in weights.items()]
        return [Term(a.lora_A, a.lora_B, a.scaling * weight, a.lora_dropout) for a, weight in adapters]

    def _adapted(self, x: Tensor) -> Tensor:
        terms, taken_out = self.terms(self._active), self.principal_terms(self._active)
        dropouts = {term.dropout if self.training else 0.0 for term in terms}
        if len(dropouts) > 1:
            raise ValueError(f"active adapters train together only with one lora_dropout, got {sorted(dropouts)}")
        dropout_p = max(dropouts, default=0.0)
        if dropout_p and taken_out:
            # what belongs to the base is not dropped
            whole = ops.lora_linear(x, self.base_weight(), *in_one(taken_out), self.bias)
            table = ops.AdapterTable.stack([in_one(terms)])
            slot_ids = torch.zeros(x.shape[:-1].numel(), dtype=torch.int32, device=x.device)
            return whole + ops.multi_lora_linear(nn.functional.dropout(x, dropout_p), None, table, slot_ids)
        lora_A, lora_B, scaling = in_one([*terms, *taken_out])
        return ops.lora_linear(x, self.base_weight(), lora_A, lora_B, scaling, self.bias, dropout_p=dropout_p)

    def _routed(self, x: Tensor, routing: Routing) -> Tensor:
        if self._merged is not None:
            raise ValueError(f"rows: adapters {sorted(self._merged)} are merged into the base; unmerge first")
        slots = routing.held(self.adapter_names)
        slot_ids = routing.slot_ids(slots, x)
        dropouts = [self.adapter(name).lora_dropout if self.training else 0.0 for name in slots]
        # what a row lacks of the base; the last is that of rows without an adapter, which id -1 finds
        taken_out = [self.principal_terms({name: 1.0} if name else {}) for name in (*slots, None)]
        if not any(dropouts):
            adapters = [[*self.terms({name: 1.0}), *rest] for name, rest in zip(slots, taken_out, strict=False)]
            return self._by_row(x, self.base_weight(), [*adapters, taken_out[-1]], slot_ids, self.bias)
        whole = self._by_row(x, self.base_weight(), taken_out, slot_ids, self.bias)
        # id -1 finds the last entry: rows without an adapter drop nothing
        drop = torch.tensor([*dropouts, 0.0], device=x.device)[slot_ids].view(*x.shape[:-1], 1)
        dropped = torch.where(torch.rand(x.shape, device=x.device) >= drop, x / (1 - drop).to(x.dtype), 0.0)
        adapters = [self.terms({name: 1.0}) for name in slots]
        return whole + self._by_row(dropped.to(x.dtype), None, [*adapters, []], slot_ids, None)

    def _by_row(
        self,
        x: Tensor,
        weight: Tensor | NF4Weight | None,
        terms: list[list[Term]],
        slot_ids: Tensor,
        bias: Tensor | None,
    ) -> Tensor:
        """Every row through the base and the terms of its slot; the last are those of slot -1."""
        filled = [slot for slot, entry in enumerate(terms) if entry]
        if not filled:
            return self._base(x)
        table = ops.AdapterTable.stack([in_one(terms[slot]) for slot in filled])
        if filled != list(range(len(terms) - 1)):
            place = {slot: i for i, slot in enumerate(filled)}
            places = torch.tensor([place.get(slot, -1) for slot in range(len(terms))], dtype=torch.int32)
            slot_ids = places.to(x.device)[slot_ids]
        return ops.multi_lora_linear(x, weight, table, slot_ids, bias)

    @property
    def merged(self) -> dict[str, float] | None:
        """The adapters that are merged into the base, with their weights; None where none is."""
        return None if self._merged is None else dict(self._merged)

    def original_weight(self) -> Tensor:
        """The Parameter that ``weight`` was before anything was merged into it."""
        return self._backup.get("weight", self.weight)

    def _chosen(self, names: str | Mapping[str, float] | None) -> dict[str, float]:
        """The adapters named, with their weights; the active ones by default."""
        return self.active if names is None else as_weights(names)

    def delta_weight(self, names: str | Mapping[str, float] | None = None) -> Tensor:
        """What the base lacks of the map, fp32 [N, K]: ``sum_a w_a s_a B_a A_a`` of the active adapters by default, and
        what others have taken out of it.
        """
        weights = self._chosen(names)
        delta = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        for name, weight in weights.items():
            delta += weight * self.adapter(name).delta()
        for term in self.principal_terms(weights):
            delta += term.delta()
        return delta

    def whole_weight(self, weights: Mapping[str, float]) -> Tensor:
        """The base with adapters of these weights in it, fp32 [N, K]; what is merged already is not added again."""
        base = self.base_weight()
        dense = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base.detach().float()
        return dense if self._merged is not None or self.is_bare(weights) else dense + self.delta_weight(weights)

    @torch.no_grad()
    def merge(self, names: str | Mapping[str, float] | None = None, *, force: bool = False) -> None:
        """Add adapters (by default the active ones) to the base weight; ``unmerge`` takes them out.

        Raises:
            ValueError: already merged, or the base is NF4 and ``force`` is not set: requantising throws most of a
                fine-tuning away, and the message says how much.
        """
        if self._merged is not None:
            raise ValueError(f"adapters {sorted(self._merged)} are already merged")
        weights = self._chosen(names)
        for name in weights:
            self._expect_known(name)
        self._backup = self._merge_into_base(weights, force)
        self._merged = weights

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the base weight back as it was before ``merge``, bit for bit; nothing where nothing is merged."""
        if self._merged is None:
            return
        for name, tensor in self._backup.items():
            now = self._parameters[name]
            assert now is not None
            dtype = now.dtype if tensor.is_floating_point() else tensor.dtype
            restored = tensor.to(now.device, dtype)  # the layer may have been moved while merged
            self._parameters[name] = restored if isinstance(restored, nn.Parameter) else nn.Parameter(restored, False)
        self._merged, self._backup = None, {}

    def _expect_unmerged(self, what: str) -> None:
        if self._merged is not None:
            raise ValueError(f"{what}, into which {sorted(self._merged)} are merged; unmerge first")

    def _merge_into_base(self, weights: Mapping[str, float], force: bool) -> dict[str, Tensor]:
        """Replace the base's Parameters by merged ones; returns those replaced, by name."""
        raise NotImplementedError

    def extra_repr(self) -> str:
        """Sizes and adapters, as shown by ``print(model)``."""
        ranks = ", ".join(f"{name}: r={settings.r}" for name, settings in self._settings.items())
        return f"{super().extra_repr()}, adapters=({ranks}), active={list(self._active)}"


def _key(field: str, name: str) -> str:
    """Name of the Parameter that holds ``lora_A`` or ``lora_B`` of an adapter."""
    return field if name == DEFAULT else f"{field}@{name}"


def scaling_of(r: int, lora_alpha: float, use_rslora: bool) -> float:
    """What B A is multiplied by."""
    return lora_alpha / (math.sqrt(r) if use_rslora else r)


def as_weights(names: str | Mapping[str, float] | None) -> dict[str, float]:
    """What ``set_active`` takes, as name -> weight; ValueError for a weight that is not finite."""
    if names is None:
        return {}
    if isinstance(names, str):
        return {names: 1.0}
    weights = {name: float(weight) for name, weight in names.items()}
    for name, weight in weights.items():
        if not math.isfinite(weight):
            raise ValueError(f"adapter {name!r}: weight must be finite, got {weight}")
    return weights


def _check_new(name: str, taken: Mapping[str, Any], r: int, lora_alpha: float, lora_dropout: float) -> None:
    if not isinstance(name, str) or not name or "." in name or "@" in name:
        raise ValueError(f"adapter name must be non-empty, without '.' and '@', got {name!r}")
    if name in taken:
        raise ValueError(f"adapter {name!r} exists already")
    if isinstance(r, bool) or not isinstance(r, int) or r < 1:
        raise ValueError(f"r must be an integer of at least 1, got {r!r}")
    if not math.isfinite(lora_alpha):
        raise ValueError(f"lora_alpha must be finite, got {lora_alpha!r}")
    if not 0.0 <= lora_dropout < 1.0:
        raise ValueError(f"lora_dropout must be in [0, 1), got {lora_dropout!r}")
