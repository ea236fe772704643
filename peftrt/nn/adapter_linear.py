"""AdapterLinear: what the linear layers with adapters share, whatever their base weight is stored in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, ClassVar, Self

import torch
from torch import Tensor, nn

from peftrt import ops
from peftrt.formats.nf4 import NF4Weight
from peftrt.nn import initialisation
from peftrt.nn.adapter import DEFAULT, FIELDS, Adapter, Settings, as_weights, check_new, parameter_name, scaling_of
from peftrt.nn.holder import AdapterHolder
from peftrt.nn.ia3 import FIELD as IA3_FIELD
from peftrt.nn.ia3 import IA3Factors
from peftrt.nn.principal import Term, in_one
from peftrt.nn.remembered import Remembered
from peftrt.nn.routing import AdapterSet, current
from peftrt.nn.rows import by_row

if TYPE_CHECKING:
    from peftrt.nn.fused import Fused


class AdapterLinear(IA3Factors, AdapterHolder):
    """A linear layer with any number of named LoRA adapters: ``y = x W^T + b + sum_a w_a s_a (drop(x) A_a^T) B_a^T``.

    The sum goes over the active adapters with their weights. A DoRA adapter, active alone, gives ``y = c * (x W^T + s
    (drop(x) A^T) B^T) + b`` with ``c = m / ||W + s B A||``; of IA3's see :class:`IA3Factors`. Under a routing
    (``peftrt.rows``) every row has its own adapter instead, of whichever kind. An adapter's tensors are Parameters of
    the layer itself: ``lora_A``, ``lora_B`` and, for DoRA, ``lora_magnitude`` for the one called "default",
    ``lora_A@fr`` ... for one called "fr". Subclasses say where the base weight is: ``base_weight``.

    In ``eval()`` without gradients c is remembered until W, A, B or m changes, and so are the adapters that the rows of
    a batch had, stacked. A change through ``.data``, which torch does not count, is seen after the next ``train()`` or
    ``eval()``.
    """

    # what an adapter's Parameters are called
    fields: ClassVar[tuple[str, str, str]] = FIELDS

    in_features: int
    out_features: int
    weight: Tensor
    bias: Tensor | None
    # the layers that are multiplied in one call with this one
    fused: Fused | None = None

    def _init_adapters(self) -> None:
        self._settings = {}
        self._active: dict[str, float] = {}
        self._merged: dict[str, float] | None = None
        self._backup: dict[str, Tensor] = {}
        self._scales: Remembered[Tensor] = Remembered()
        self._tables: Remembered[ops.AdapterTable] = Remembered()
        self.owner = AdapterSet()
        self._init_principal()

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
        use_dora: bool = False,
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
            use_dora: train the rows' magnitudes apart, which begin as those of the adapted weight (Liu et al. 2024,
                arXiv:2402.09353): it changes nothing at first.
            init: as peft's ``init_lora_weights``, see :mod:`peftrt.nn.initialisation`. True: A Kaiming-uniform, B zero.
                "gaussian": A normal with deviation 1 / R, B zero. "orthogonal": neither is zero, B A is. False: both
                Kaiming-uniform, so that the adapter changes the output from the start (for tests). "pissa" and
                "pissa_niter_<n>": s B A is the principal part of W, which leaves the base and comes back where the
                adapter does not act (:class:`PrincipalParts`); over an NF4 base the rest is quantised anew. "loftq":
                NF4 base and s B A together are closer to W than nf4(W).
            loftq_config: ``{"loftq_bits": 4, "loftq_iter": n}``, n = 1 by default.
            original: W [N, K] as it was before it was quantised: "loftq" needs it; without it "pissa" over an NF4 base
                begins with the dequantised weight.
            adapter_dtype: of A, B and the magnitude.

        Raises:
            ValueError: the name is taken or unusable, or a value is out of its range; for DoRA also if something is
                merged into the weight whose norms are asked for.
        """
        if use_dora:
            self._expect_dora_fits()
        check_new(name, self._settings, r, lora_alpha, lora_dropout)
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
        for field, half in zip(self.fields, (lora_A, lora_B), strict=False):
            self._parameters[parameter_name(field, name)] = nn.Parameter(half)
        self._settings[name] = Settings(r, float(lora_alpha), float(lora_dropout), use_rslora)
        if use_dora:
            self._parameters[parameter_name("lora_magnitude", name)] = self._first_magnitude(name, adapter_dtype)
        return self.adapter(name)

    def _draw(self, init: bool | str, r: int, dtype: torch.dtype) -> initialisation.Pair:
        """A and B of an initialisation that does not look at the weight."""
        return initialisation.draw(init, r, self.out_features, self.in_features, dtype, self.weight.device)

    def _expect_dora_fits(self) -> None:
        if self._merged is not None:
            raise ValueError(f"adapters {sorted(self._merged)} are merged; unmerge before adding one with use_dora")

    def _first_magnitude(self, name: str, dtype: torch.dtype) -> nn.Parameter:
        """``||W + s B A||``, so that c is 1."""
        if self.weight.is_meta:
            return nn.Parameter(torch.empty(self.out_features, dtype=dtype, device="meta"))
        low_rank = in_one([*self.terms({name: 1.0}), *self.principal_terms({name: 1.0})])
        return nn.Parameter(ops.lora_weight_norm(self.base_weight(), *low_rank).to(dtype))

    def remove_adapter(self, name: str) -> None:
        """Forget an adapter; it must exist and not be merged."""
        self._expect_known(name)
        if self._merged and name in self._merged:
            raise ValueError(f"adapter {name!r} is merged; unmerge before removing it")
        self._settle_principal(name)
        for field in (*self.fields, IA3_FIELD):
            self._parameters.pop(parameter_name(field, name), None)
        del self._settings[name]
        self._active.pop(name, None)

    @property
    def adapter_names(self) -> tuple[str, ...]:
        """Names in the order in which they were added."""
        return tuple(self._settings)

    def adapter(self, name: str) -> Adapter:
        """The LoRA adapter of that name; KeyError where there is none, or it is of another kind."""
        self._expect_known(name)
        settings = self._settings[name]
        if not isinstance(settings, Settings):
            raise KeyError(f"adapter {name!r} is one of IA3: see ia3()")
        lora_A, lora_B, magnitude = (self._parameters.get(parameter_name(field, name)) for field in self.fields)
        assert lora_A is not None
        assert lora_B is not None
        values = settings.r, settings.lora_alpha, settings.lora_dropout, settings.use_rslora
        return Adapter(lora_A, lora_B, *values, magnitude)

    def adapter_parameters(self, name: str) -> tuple[nn.Parameter, ...]:
        """What is trained of an adapter: A, B, and DoRA's magnitude; or IA3's factors."""
        ia3 = self.ia3(name)
        return self.adapter(name).parameters if ia3 is None else ia3.parameters

    def set_active(self, names: str | Mapping[str, float] | None) -> None:
        """Choose what forward adds to the base: nothing, one adapter, or a weighted sum. ``requires_grad`` stays.

        Raises:
            KeyError: an unknown name.
            ValueError: a weight that is not finite, adapters are merged, or an adapter of DoRA or IA3 is not alone or
                has another weight than 1.
        """
        weights = as_weights(names)
        for name in weights:
            self._expect_known(name)
        self._dora_among(weights)
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
    def lora_magnitude(self) -> nn.Parameter | None:
        """m [N] of the active adapter, None where it is not DoRA's; an error where there is not exactly one."""
        return self._only_active().magnitude

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

    def why_inactive(self, weights: Mapping[str, float]) -> str | None:
        """Why adapters cannot act with these weights together; None where they can."""
        if (reason := self._why_no_sum_of_ia3(weights)) is not None:
            return reason
        names = self._of_dora(weights)
        if names and (len(weights) > 1 or weights[names[0]] != 1.0):
            return (
                f"{', '.join(map(repr, names))} of DoRA (use_dora) cannot be summed: a magnitude multiplies the base's "
                f"share too. Such an adapter is used alone, with weight 1; got {dict(weights)}"
            )
        return None

    def _of_dora(self, names: Iterable[str]) -> list[str]:
        return [name for name in names if parameter_name("lora_magnitude", name) in self._parameters]

    def _dora_among(self, weights: Mapping[str, float]) -> Adapter | None:
        """The one DoRA adapter that is asked for; None where none is, an error where adapters cannot act together."""
        reason = self.why_inactive(weights)
        if reason is not None:
            raise ValueError(reason)
        names = self._of_dora(weights)
        return self.adapter(names[0]) if names else None

    def train(self, mode: bool = True) -> Self:
        """As of ``nn.Module``; what is remembered in ``eval()`` is computed again."""
        self._forget()
        return super().train(mode)

    def _apply(self, *args: Any, **kwargs: Any) -> Self:
        # memory that is given up here may come back under the same address
        self._forget()
        return super()._apply(*args, **kwargs)

    def _forget(self) -> None:
        self._scales.forget()
        self._tables.forget()

    def forward(self, x: Tensor) -> Tensor:
        """``[..., K]`` to ``[..., N]``; see :func:`peftrt.ops.lora_linear` and
        :func:`peftrt.ops.multi_lora_linear`.
        """
        routing = current(self.owner)
        if routing is not None:
            return by_row(self, x, routing)
        # not by is_bare: torch.compile watches whether a dictionary is empty only where it is tested itself
        if self._merged is not None or not (self._active or self._principal):
            return self._base(x)
        together = None if self.fused is None else self.fused.result(self, x)
        return self._adapted(x) if together is None else together

    def is_bare(self, weights: Mapping[str, float]) -> bool:
        """Whether the base alone is the layer's map where adapters act with these weights."""
        return not weights and not self._principal

    def terms(self, weights: Mapping[str, float]) -> list[Term]:
        """The terms of adapters that act with these weights; IA3's have none."""
        adapters = [(self.adapter(name), weight) for name, weight in weights.items() if self.ia3(name) is None]
        return [Term(a.lora_A, a.lora_B, a.scaling * weight, a.lora_dropout) for a, weight in adapters]

    def _adapted(self, x: Tensor) -> Tensor:
        ia3 = self._ia3_alone(self._active)
        if ia3 is not None:
            return self._with_factors(x, next(iter(self._active)), ia3)
        terms, taken_out = self.terms(self._active), self.principal_terms(self._active)
        dropouts = {term.dropout if self.training else 0.0 for term in terms}
        if len(dropouts) > 1:
            raise ValueError(f"active adapters train together only with one lora_dropout, got {sorted(dropouts)}")
        dropout_p = max(dropouts, default=0.0)
        row_scale = self._row_scale([*terms, *taken_out])
        if dropout_p and taken_out:
            return self._adapted_beside(x, terms, taken_out, dropout_p, row_scale)
        lora_A, lora_B, scaling = in_one([*terms, *taken_out])
        options: dict[str, Any] = {"dropout_p": dropout_p, "row_scale": row_scale}
        return ops.lora_linear(x, self.base_weight(), lora_A, lora_B, scaling, self.bias, **options)

    def _adapted_beside(
        self, x: Tensor, terms: list[Term], taken_out: list[Term], dropout_p: float, row_scale: Tensor | None
    ) -> Tensor:
        """Adapters with dropout over a base of which parts are out: what belongs to the base is not dropped."""
        whole = ops.lora_linear(x, self.base_weight(), *in_one(taken_out), self.bias, row_scale=row_scale)
        table = ops.AdapterTable.stack([in_one(terms)])
        slot_ids = torch.zeros(x.shape[:-1].numel(), dtype=torch.int32, device=x.device)
        change = ops.multi_lora_linear(nn.functional.dropout(x, dropout_p), None, table, slot_ids)
        return whole + (change if row_scale is None else (change * row_scale).to(change.dtype))

    def _row_scale(self, terms: list[Term]) -> Tensor | None:
        """c where a DoRA adapter is active; None where none is."""
        # where one of DoRA's is active it is alone, and others need not pay for more than this look
        name = next(iter(self._active), None)
        return None if name is None else self.row_scale(name, terms)

    def row_scale(self, name: str, terms: list[Term]) -> Tensor | None:
        """c of a DoRA adapter, whose terms these are, remembered in ``eval()`` without gradients; None for others."""
        if parameter_name("lora_magnitude", name) not in self._parameters:
            return None
        adapter = self.adapter(name)
        magnitude = adapter.magnitude
        assert magnitude is not None

        def compute() -> Tensor:
            return ops.dora_scale(self.base_weight(), *in_one(terms), magnitude)

        if self.training or (torch.is_grad_enabled() and any(p.requires_grad for p in adapter.parameters)):
            return compute()
        halves = [half for term in terms for half in (term.lora_A, term.lora_B)]
        read = (magnitude, *halves, *self.weight_parameters().values())
        return self._scales.get(name, read, adapter.scaling, compute)

    @property
    def merged(self) -> dict[str, float] | None:
        """The adapters that are merged into the base, with their weights; None where none is."""
        return None if self._merged is None else dict(self._merged)

    def weight_parameters(self) -> dict[str, nn.Parameter]:
        """The Parameters that hold the base weight, by name: one, or NF4's codes and scales."""
        return {name: p for name, p in self._parameters.items() if p is not None and name.startswith("weight")}

    def original_weight(self) -> Tensor:
        """The Parameter that ``weight`` was before anything was merged into it."""
        return self._backup.get("weight", self.weight)

    def _chosen(self, names: str | Mapping[str, float] | None) -> dict[str, float]:
        """The adapters named, with their weights; the active ones by default."""
        return self.active if names is None else as_weights(names)

    @torch.no_grad()
    def adapted_weight(self, names: str | Mapping[str, float] | None = None) -> Tensor:
        """W with adapters (by default the active ones) in it, fp32 [N, K]; the weight as it is while merged.

        ``W + sum_a w_a s_a B_a A_a``, or ``c * (W + s B A)`` of a DoRA adapter, or W times IA3's factors.

        Raises:
            KeyError, ValueError: as of :meth:`set_active`.
        """
        base = self.base_weight()
        wide = base.dequantize(torch.float32) if isinstance(base, NF4Weight) else base.detach().float()
        weights = self._chosen(names)
        dora, ia3 = self._dora_among(weights), self._ia3_alone(weights)
        if self._merged is not None or self.is_bare(weights):
            return wide
        terms = [*self.terms(weights), *self.principal_terms(weights)]
        adapted = wide + sum(term.delta() for term in terms)
        if ia3 is not None:
            return ia3.of_weight(adapted)
        if dora is None or dora.magnitude is None:
            return adapted
        return adapted * ops.dora_scale(base, *in_one(terms), dora.magnitude).unsqueeze(1)

    def delta_weight(self, names: str | Mapping[str, float] | None = None) -> Tensor:
        """What adapters (by default the active ones) add to W, fp32 [N, K]: ``sum_a w_a s_a B_a A_a``, less the part of
        W that one began with; of an adapter of DoRA or IA3, what it makes of W less W.

        Raises:
            KeyError, ValueError: as of :meth:`set_active`, or an adapter of DoRA or IA3 while something is merged.
        """
        weights = self._chosen(names)
        if self._dora_among(weights) is None and self._ia3_alone(weights) is None:
            return self._low_rank_sum(weights)
        if self._merged is not None:
            raise ValueError(f"adapters {sorted(self._merged)} are merged; unmerge to see what {list(weights)} adds")
        return self.adapted_weight(weights) - self.adapted_weight({})

    def _low_rank_sum(self, weights: Mapping[str, float]) -> Tensor:
        delta = torch.zeros(self.out_features, self.in_features, device=self.weight.device)
        for name, weight in weights.items():
            delta += weight * self.adapter(name).delta()
            if (pair := self.principal_pair(name)) is not None:
                delta -= weight * Term(*pair, self._principal[name]).delta()
        return delta

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
        self._dora_among(weights)
        bias = self.adapted_bias(weights)
        self._backup = self._merge_into_base(weights, force)
        if bias is not self.bias and self.bias is not None and bias is not None:
            self._backup["bias"] = self.bias
            self.bias = nn.Parameter(bias, requires_grad=False)
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
        shown = ", ".join(f"{name}: {self._kind(name)}" for name in self._settings)
        return f"{super().extra_repr()}, adapters=({shown}), active={list(self._active)}"

    def _kind(self, name: str) -> str:
        settings = self._settings[name]
        if isinstance(settings, Settings):
            return f"r={settings.r}" + (", DoRA" if parameter_name("lora_magnitude", name) in self._parameters else "")
        return "IA3 of inputs" if settings.feedforward else "IA3 of outputs"
